// selective_scan.cu - the Mamba-1 recurrence over whole sequences.
//
//   dt = softplus(dt_raw + dt_bias)
//   h  = exp(dt * A) * h + dt * B * x        per channel e, state n, from h = ssm_state[slot]
//   y  = (sum_n C * h + D * x) * silu(z)
//
// Serial in time, parallel over channels and states: a time-parallel scan needs its exponentials
// twice, and they and the issue slots bind. Exponentials don't depend on the recurrence: a warp
// takes them two tokens ahead, with its loads four to eight ahead, and the chain itself is one FMA
// a token. 8 lanes share a channel and hold 2 of 16 states each; the lanes' shares of y are summed
// for 8 tokens at a time, by a transposition that takes 7 shuffles instead of 24.
//
// A block has as many channels as share one sequence evenly among the multiprocessors (12 to 40 in
// the published models), in quads of 4. A warp for each quad does nothing but the recurrence.
// Others work beside: they fetch tiles of 32 tokens by asynchronous copies, prepare them ahead of
// the recurrence (softplus and dt * x once per channel and token, B and C to f32) and finish them
// behind it (D, gate, store). Both sides go through rings of tiles with a gate for each tile, so
// that no warp waits for the slowest of a block. Which scheduler a warp sits on decides a third of
// the time where a block has few warps of the recurrence: see place_helpers.
//
// Shapes   x, dt, z, y T [n_tok, d_inner]; B, C T [n_tok, d_state] views; A f32 [d_inner, d_state];
//          ssm_state [slot, d_inner, d_state] in f32, bf16 or f16
// Launch   grid (channels / (4 * n_quad), n_seq), up to 20 warps, some of which leave at once
// Types    arithmetic f32. With 16-bit inputs exp is the special-function unit's (2 ulp); with f32
//          inputs a polynomial (1 ulp), since a long memory adds up what a decay close to 1 is off.
//          More than 16 states are done 16 at a time, tile by tile
// Bytes    n_tok * d_inner * 4 * sizeof(T), and per block its share of B, C and the state
// Roofline d_state + 3 special-function results per channel and token; and in instructions of a
//          thread about 140 in the recurrence and 80 beside it: bound by both, not by bytes
// Measured H100 80GB HBM3, bf16, 2048 tokens of one sequence, us at d_inner 1536, 2048, 3072, 4096
//          and 5120 (tools/bench_ops): 44, 47, 63, 74 and 94. Special functions alone would need
//          14, 19, 29, 38 and 48
// Same as  kernels/cpu; tests/ops
#include <algorithm>
#include <bit>
#include <limits>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kQuad = 4;      // channels, or states of B and C, that a thread prepares together
constexpr int kTile = 32;     // tokens
constexpr int kRing = 4;      // tiles between being prepared and being finished
constexpr int kAhead = 2;     // tiles between being requested from memory and being prepared
constexpr int kStages = 8;    // tiles between being requested and being finished
constexpr int kStagesBC = 4;  // steps between being requested and being prepared
constexpr int kStates = 16;   // states of a pass
constexpr int kLanes = 8;     // of a channel
constexpr int kHeld = kStates / kLanes;
constexpr int kGroup = 8;      // tokens whose y are summed over the lanes together
constexpr int kMaxQuads = 12;  // of a block
constexpr int kMaxWarps = 20;  // of a block
constexpr int kItemsBC = kTile * kStates / kQuad / 32;  // warp's turns with B and C of a tile
static_assert(kTile == 32 && kGroup == kLanes && kHeld == 2);
// A warp that has every second tile requests twice as far ahead.
static_assert(kStages >= kRing + 2 * kAhead && kStagesBC > kAhead);

struct ScanShape {
  int64_t d_inner;
  int d_state;
  int n_pass;        // ceil(d_state / kStates)
  int n_quad;        // of a block
  unsigned helpers;  // bit w: warp w works beside the recurrence
  bool quads;        // x, dt, z, y allow accesses of 4 elements
  bool quads_BC;     // so do B and C
  DType state;       // of ssm_state
  int64_t x_stride, dt_stride, z_stride, y_stride, B_stride, C_stride;
};

template <typename T>
struct ScanPointers {
  const T *x, *dt, *z, *B, *C;  // y may be x or dt: no __restrict__
  const float *A, *D, *dt_bias;
  T* y;
  void* ssm_state;
  const int32_t *seq_start, *slots;
};

__device__ __forceinline__ float load_state(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_float(static_cast<const __half*>(p)[i]);
}
__device__ __forceinline__ void store_state(void* p, DType type, int64_t i, float v) {
  if (type == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else if (type == DType::bf16) {
    static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
  } else {
    static_cast<__half*>(p)[i] = from_float<__half>(v);
  }
}

/// 2^v to 1 ulp by arithmetic alone, for v <= 128; below 2^-126 it becomes 0.
__device__ __forceinline__ float exp2_exact(float v) {
  const float n = rintf(v);
  const float f = v - n;  // exact, |f| <= 0.5
  // 2^f = e^(f ln 2), Taylor to the seventh power: the rest is below 2^-27
  float p = 1.5252733e-5F;
  p = fmaf(p, f, 1.5403530e-4F);
  p = fmaf(p, f, 1.3333558e-3F);
  p = fmaf(p, f, 9.6181291e-3F);
  p = fmaf(p, f, 5.5504109e-2F);
  p = fmaf(p, f, 2.4022651e-1F);
  p = fmaf(p, f, 6.9314718e-1F);
  p = fmaf(p, f, 1.0F);
  const float scaled = __int_as_float(__float_as_int(p) + (static_cast<int>(n) << 23));
  return v < -125.5F ? 0.0F : scaled;
}

/// Of a value that all lanes have: tells the compiler so, which then knows that a branch on it
/// keeps the warp together.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xffffffffU, v, 0); }

/// Warps meet here, turn after turn: some arrive, others wait until `count` of them have.
struct Gate {
  alignas(8) unsigned long long state;

  __device__ __forceinline__ uint32_t at() const { return shared_address(&state); }
  /// By one thread, before a block barrier. `warps` of them arrive in a turn.
  __device__ __forceinline__ void open(unsigned warps) {
    const unsigned count = warps * kWarpArrivals;
#if __CUDA_ARCH__ >= 800
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at()), "r"(count) : "memory");
#else
    state = static_cast<unsigned long long>(count) << 32;  // and below it, arrivals so far
#endif
  }
  /// By a whole warp, once a turn.
  __device__ __forceinline__ void arrive() {
    __syncwarp();
    if (!warp_arrives()) return;
#if __CUDA_ARCH__ >= 800
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(at()) : "memory");
#else
    __threadfence_block();
    atomicAdd(reinterpret_cast<unsigned*>(&state), 1U);
#endif
  }
  /// Until all have arrived for the `turn`th time, counted from 0. At most one turn behind them.
  __device__ __forceinline__ void wait(int turn) const {
#if __CUDA_ARCH__ >= 800
    unsigned done = 0;
    do {
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(at()), "r"(turn & 1)
          : "memory");
#else
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(at()), "r"(turn & 1)
          : "memory");
#endif
    } while (!__all_sync(0xffffffffU, done));
#else
    const volatile unsigned* arrived = reinterpret_cast<const volatile unsigned*>(&state);
    const unsigned count = arrived[1];
    while (!__all_sync(0xffffffffU, arrived[0] >= (turn + 1) * count)) __nanosleep(64);
    __threadfence_block();
#endif
  }
};

/// Where things lie in shared memory, in bytes. A quad's share of a ring is followed by 16 bytes,
/// which spreads neighbouring quads over the banks; so is a token's B and C.
struct Layout {
  static constexpr int kFineTile = kTile * kQuad * 8;   // (dt, dt * x)
  static constexpr int kSumTile = kTile * kQuad * 4;    // sum_n C * h
  static constexpr int kFine = kRing * kFineTile + 16;  // of a quad
  static constexpr int kSum = kRing * kSumTile + 16;    // of a quad
  static constexpr int kBC = kStates * 8 + 16;          // (B, C) of a token
  static constexpr int kBCTile = kTile * kBC;
  int fine, sum, bc, raw, raw_bc, full, done, carried, end;

  __host__ __device__ constexpr Layout(int n_quad, int n_pass, int itemsize) {
    fine = 0;
    sum = fine + n_quad * kFine;
    bc = sum + n_quad * kSum;
    raw = bc + kRing * kBCTile;  // x, dt, z of a turn, thread by thread
    raw_bc = raw + kStages * n_quad * 3 * 32 * kQuad * itemsize;
    full = raw_bc + kStagesBC * kItemsBC * 2 * 32 * kQuad * itemsize;
    done = full + kRing * 8;
    carried = done + kRing * 8;  // 16-byte aligned: kRing is even
    // With several passes h and A of each wait here.
    end = carried + (n_pass > 1 ? n_pass * n_quad * kQuad * kStates * 8 : 0);
  }
};

/// Rounds of the sum over the lanes of a channel of v[token]: in each a lane gives away half of its
/// tokens and adds what it gets to the rest.
template <int kHalf, int kMask>
__device__ __forceinline__ void sum_round(float (&v)[kGroup], int lane) {
  const bool upper = (lane & kMask) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float give = upper ? v[i] : v[i + kHalf];
    const float have = upper ? v[i + kHalf] : v[i];
    v[i] = have + __shfl_xor_sync(0xffffffffU, give, kMask);
  }
}

/// One lane of the recurrence: two states of one channel.
template <typename T>
struct Recurrence {
  const char* fine;  // the channel's, of the ring's first token
  const char* bc;    // the states', of the ring's first token
  char* sum;         // the channel's, of the ring's token that this lane sums in a group
  int lane;
  float h[kHeld], A[kHeld];

  static __device__ __forceinline__ float decay(float v) {
    if constexpr (sizeof(T) == 4) {
      return exp2_exact(v);
    } else {
      return exp2_fast(v);
    }
  }

  /// n_tile tiles from tile k and step q. `add`: to the sums of an earlier pass.
  __device__ __forceinline__ void run(int k, int q, int n_tile, bool add, Gate* full, Gate* done) {
    // Of the token in the recurrence everything is in registers. B, C and the decays of the kNear
    // tokens after it are there or on their way, dt and dt * x of a whole group.
    constexpr int kNear = kGroup / 2;
    constexpr int kNext = 2;
    constexpr int kGroups = kTile / kGroup;
    float a[kNext][kHeld];
    float4 near_bc[kNear];  // B, C, B, C
    float2 step[kGroup];
    float share[2][kGroup];
    const auto fine_at = [&](const char* of_tile, int t) {
      return *reinterpret_cast<const float2*>(of_tile + t * (kQuad * 8));
    };
    const auto bc_at = [&](const char* of_tile, int t) {
      return *reinterpret_cast<const float4*>(of_tile + t * Layout::kBC);
    };
    const char* this_fine = fine + k % kRing * Layout::kFineTile;
    const char* this_bc = bc + q % kRing * Layout::kBCTile;
    const char* next_fine = this_fine;
    const char* next_bc = this_bc;
    char* this_sum = sum + k % kRing * Layout::kSumTile;
    char* last_sum = this_sum;
    bool first = true;
    full[q % kRing].wait(q / kRing);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      step[i] = fine_at(this_fine, i);
      share[1][i] = 0.0F;
    }
#pragma unroll
    for (int i = 0; i < kNear; ++i) {
      near_bc[i] = bc_at(this_bc, i);
#pragma unroll
      for (int n = 0; n < kHeld; ++n) a[i % kNext][n] = decay(step[i % kNext].x * A[n]);
    }
    const auto token = [&](int t) {
      const int i = t % kGroup;
      const int u = t / kGroup % 2;
      // The sums of the group before.
      if (i == 0) sum_round<4, 8>(share[1 - u], lane);
      if (i == 2) sum_round<2, 4>(share[1 - u], lane);
      if (i == 4) sum_round<1, 1>(share[1 - u], lane);
      if (i == 6 && (t > kGroup || !first)) {
        auto* to =
            reinterpret_cast<float*>(t > kGroup ? this_sum + (t / kGroup - 1) * (kGroup * kQuad * 4)
                                                : last_sum + (kGroups - 1) * (kGroup * kQuad * 4));
        *to = add ? *to + share[1 - u][0] : share[1 - u][0];
      }
      float4& of = near_bc[t % kNear];
      float(&of_a)[kHeld] = a[t % kNext];
      const float dx = step[i].y;
      h[0] = fmaf(of_a[0], h[0], dx * of.x);
      h[1] = fmaf(of_a[1], h[1], dx * of.z);
      share[u][i] = fmaf(of.w, h[1], of.y * h[0]);
      const float dt = step[(i + kNext) % kGroup].x;
      of_a[0] = decay(dt * A[0]);
      of_a[1] = decay(dt * A[1]);
      of = t + kNear < kTile ? bc_at(this_bc, t + kNear) : bc_at(next_bc, t + kNear - kTile);
      step[i] = t + kGroup < kTile ? fine_at(this_fine, t + kGroup)
                                   : fine_at(next_fine, t + kGroup - kTile);
    };
    for (; n_tile > 0; --n_tile) {
#pragma unroll
      for (int t = 0; t < kTile / 2; ++t) token(t);
      if (!first) done[(q - 1) % kRing].arrive();  // the tile before is summed
      ++k;
      ++q;
      if (n_tile > 1) {
        full[q % kRing].wait(q / kRing);
        next_fine = fine + k % kRing * Layout::kFineTile;
        next_bc = bc + q % kRing * Layout::kBCTile;
      }
#pragma unroll
      for (int t = kTile / 2; t < kTile; ++t) token(t);
      last_sum = this_sum;
      this_sum = sum + k % kRing * Layout::kSumTile;
      this_fine = next_fine;
      this_bc = next_bc;
      first = false;
    }
    sum_round<4, 8>(share[1], lane);
    sum_round<2, 4>(share[1], lane);
    sum_round<1, 1>(share[1], lane);
    auto* to = reinterpret_cast<float*>(last_sum + (kGroups - 1) * (kGroup * kQuad * 4));
    *to = add ? *to + share[1][0] : share[1][0];
    done[(q - 1) % kRing].arrive();
  }
};

template <typename T>
__device__ __forceinline__ void fetch_quad(char* to, const T* from, int n) {
  Quad<T> v;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) v.v[i] = i < n ? from[i] : T(0.0F);
  *reinterpret_cast<Quad<T>*>(to) = v;
}

/// One thread beside the recurrence, with one of its turns: 4 channels of one token of each tile.
template <typename T>
struct ChannelItem {
  static constexpr int kBytes = kQuad * static_cast<int>(sizeof(T));
  const T *x, *dt, *z;  // of the tile to be requested next
  T* y;                 // of the tile to be finished next
  char* raw;            // this thread's place of the first stage: x, and after it dt and z
  char* fine;           // its places of the ring's first tile
  const char* sum;
  int tokens;  // from one of its tiles to the next
  int n_tile;  // tiles in which this token is of the sequence
  int n;       // channels that exist
  float4 bias, D;

  __device__ __forceinline__ void request(int k, int stage_bytes, const ScanShape& shape) {
    if (k >= n_tile) return;
    char* to = raw + k % kStages * stage_bytes;
    if (shape.quads) {
      copy_async<kBytes>(to, x);
      copy_async<kBytes>(to + 32 * kBytes, dt);
      copy_async<kBytes>(to + 64 * kBytes, z);
    } else {
      fetch_quad(to, x, n);
      fetch_quad(to + 32 * kBytes, dt, n);
      fetch_quad(to + 64 * kBytes, z, n);
    }
    x += tokens * shape.x_stride;
    dt += tokens * shape.dt_stride;
    z += tokens * shape.z_stride;
  }
  __device__ __forceinline__ void prepare(int k, int stage_bytes) const {
    auto* to = reinterpret_cast<float4*>(fine + k % kRing * Layout::kFineTile);
    if (k >= n_tile) {
      // Past the end dt = 0: exp(0) = 1 and nothing is added, so the state passes unchanged.
      to[0] = to[1] = float4{};
      return;
    }
    const char* from = raw + k % kStages * stage_bytes;
    const auto of_x = *reinterpret_cast<const Quad<T>*>(from);
    const auto of_dt = *reinterpret_cast<const Quad<T>*>(from + 32 * kBytes);
    const float v[kQuad] = {
        softplus(to_float(of_dt.v[0]) + bias.x), softplus(to_float(of_dt.v[1]) + bias.y),
        softplus(to_float(of_dt.v[2]) + bias.z), softplus(to_float(of_dt.v[3]) + bias.w)};
    to[0] = {v[0], v[0] * to_float(of_x.v[0]), v[1], v[1] * to_float(of_x.v[1])};
    to[1] = {v[2], v[2] * to_float(of_x.v[2]), v[3], v[3] * to_float(of_x.v[3])};
  }
  __device__ __forceinline__ void finish(int k, int stage_bytes, const ScanShape& shape) {
    if (k >= n_tile) return;
    const char* from = raw + k % kStages * stage_bytes;
    const auto of_x = *reinterpret_cast<const Quad<T>*>(from);
    const auto of_z = *reinterpret_cast<const Quad<T>*>(from + 64 * kBytes);
    const float4 s = *reinterpret_cast<const float4*>(sum + k % kRing * Layout::kSumTile);
    const auto gated = [](float v, float of_D, T x, T z) {
      return from_float<T>(fmaf(of_D, to_float(x), v) * silu(to_float(z)));
    };
    const Quad<T> out = {
        gated(s.x, D.x, of_x.v[0], of_z.v[0]), gated(s.y, D.y, of_x.v[1], of_z.v[1]),
        gated(s.z, D.z, of_x.v[2], of_z.v[2]), gated(s.w, D.w, of_x.v[3], of_z.v[3])};
    if (shape.quads) {
      *reinterpret_cast<Quad<T>*>(y) = out;
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (i < n) y[i] = out.v[i];
      }
    }
    y += tokens * shape.y_stride;
  }
};

/// The same with 4 states of B and C of one token.
template <typename T>
struct StateItem {
  static constexpr int kBytes = kQuad * static_cast<int>(sizeof(T));
  const T *B, *C;  // of the step to be requested next
  char* raw;       // this thread's place of the first stage: B, and after it C
  char* bc;        // its place of the ring's first step
  int n_tile;      // tiles in which this token is of the sequence
  int n0;          // states n0 .. n0 + 3 of each pass

  __device__ __forceinline__ void request(int k, int pass, int q, int n_pass,
                                          const ScanShape& shape) {
    if (k >= n_tile) return;  // dt is 0 there: whatever B and C are
    char* to = raw + q % kStagesBC * (kItemsBC * 2 * 32 * kBytes);
    const int n = shape.d_state - pass * kStates - n0;
    if (shape.quads_BC) {
      copy_async<kBytes>(to, n > 0 ? B : B - n0, n > 0);
      copy_async<kBytes>(to + 32 * kBytes, n > 0 ? C : C - n0, n > 0);
    } else {
      fetch_quad(to, B, n);
      fetch_quad(to + 32 * kBytes, C, n);
    }
    const bool last = pass + 1 == n_pass;
    B += last ? kTile * shape.B_stride - pass * kStates : kStates;
    C += last ? kTile * shape.C_stride - pass * kStates : kStates;
  }
  __device__ __forceinline__ void prepare(int k, int q) const {
    auto* to = reinterpret_cast<float4*>(bc + q % kRing * Layout::kBCTile);
    if (k >= n_tile) {
      to[0] = to[1] = float4{};
      return;
    }
    const char* from = raw + q % kStagesBC * (kItemsBC * 2 * 32 * kBytes);
    const auto B = *reinterpret_cast<const Quad<T>*>(from);
    const auto C = *reinterpret_cast<const Quad<T>*>(from + 32 * kBytes);
    to[0] = {to_float(B.v[0]), to_float(C.v[0]), to_float(B.v[1]), to_float(C.v[1])};
    to[1] = {to_float(B.v[2]), to_float(C.v[2]), to_float(B.v[3]), to_float(C.v[3])};
  }
};

/// kOne: one pass does all states, and they stay in registers from the first token to the last.
template <typename T, bool kOne>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    selective_scan_kernel(ScanPointers<T> p, ScanShape shape) {
  extern __shared__ float4 shared_raw[];
  char* const s = reinterpret_cast<char*>(shared_raw);
  const int n_pass = kOne ? 1 : shape.n_pass;
  const int n_quad = shape.n_quad;
  const Layout at(n_quad, n_pass, sizeof(T));
  auto* full = reinterpret_cast<Gate*>(s + at.full);
  auto* done = reinterpret_cast<Gate*>(s + at.done);
  const int64_t e0 = static_cast<int64_t>(blockIdx.x) * n_quad * kQuad;
  const int n_recur = n_quad;
  const int n_helper = __popc(shape.helpers);
  // One set: a warp beside the recurrence has one or two of a tile's turns. Two sets: it has one
  // turn with channels, of every second tile, or one with B and C.
  const bool two_sets = n_helper > n_quad + kItemsBC;
  if (threadIdx.x < kRing) {
    full[threadIdx.x].open(static_cast<unsigned>(two_sets ? n_quad + kItemsBC : n_helper));
    done[threadIdx.x].open(static_cast<unsigned>(n_recur));
  }
  __syncthreads();
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool recurs = warp < n_recur;
  if (!recurs && (shape.helpers >> warp & 1) == 0) return;

  after_previous();
  const int seq = static_cast<int>(blockIdx.y);
  const int32_t slot = p.slots[seq];
  const int64_t begin = p.seq_start[seq];
  const int64_t len = p.seq_start[seq + 1] - begin;
  if (slot < 0 || len == 0) return;
  const int n_tile = uniform(static_cast<int>((len + kTile - 1) / kTile));

  if (recurs) {
    // Lane bits: 1 is a channel's, 0 a state's, so that a load of B and C and one of dt and dt * x
    // have the same address in lanes that differ in that bit alone, which halves their cost.
    const int state = (lane & 1) | (lane >> 1 & 6);
    const int channel = (lane >> 1 & 1) | (lane >> 4 << 1);
    const int64_t e = e0 + warp * kQuad + channel;
    const int64_t row = (slot * shape.d_inner + e) * static_cast<int64_t>(shape.d_state);
    Recurrence<T> r;
    r.fine = s + at.fine + warp * Layout::kFine + channel * 8;
    r.bc = s + at.bc + state * (kHeld * 8);
    r.sum = s + at.sum + warp * Layout::kSum + state * (kQuad * 4) + channel * 4;
    r.lane = lane;
    auto* carried = reinterpret_cast<float2*>(s + at.carried) + threadIdx.x * kHeld;
    const int carried_stride = n_recur * 32 * kHeld;
    const auto exists = [&](int n) { return e < shape.d_inner && n < shape.d_state; };
    for (int pass = 0; pass < n_pass; ++pass) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int n = pass * kStates + state * kHeld + i;
        r.h[i] = exists(n) ? load_state(p.ssm_state, shape.state, row + n) : 0.0F;
        r.A[i] = exists(n) ? p.A[e * shape.d_state + n] * kLog2e : 0.0F;
        if constexpr (!kOne) carried[pass * carried_stride + i] = {r.h[i], r.A[i]};
      }
    }
    if constexpr (kOne) {
      r.run(0, 0, n_tile, false, full, done);
    } else {
      for (int k = 0, q = 0; k < n_tile; ++k) {
        for (int pass = 0; pass < n_pass; ++pass, ++q) {
          float2* c = carried + pass * carried_stride;
#pragma unroll
          for (int i = 0; i < kHeld; ++i) r.h[i] = c[i].x, r.A[i] = c[i].y;
          r.run(k, q, 1, pass > 0, full, done);
#pragma unroll
          for (int i = 0; i < kHeld; ++i) c[i].x = r.h[i];
        }
      }
    }
    for (int pass = 0; pass < n_pass; ++pass) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int n = pass * kStates + state * kHeld + i;
        const float h = kOne ? r.h[i] : carried[pass * carried_stride + i].x;
        if (exists(n)) store_state(p.ssm_state, shape.state, row + n, h);
      }
    }
    return;
  }

  // Beside it. A tile is n_quad turns of a warp with x, dt and z and kItemsBC with B and C; a warp
  // has one or two of them: one or two with channels, or one of each, or one with B and C.
  constexpr int kBytes = kQuad * static_cast<int>(sizeof(T));
  const int stage_bytes = n_quad * (3 * 32 * kBytes);
  const int helper = __popc(shape.helpers & ((1U << warp) - 1));
  const auto tiles_of = [&](int t) { return static_cast<int>((len - t + kTile - 1) / kTile); };
  const auto channels = [&](int turn, int tile, int stride) {
    ChannelItem<T> c;
    const int t = (turn * 32 + lane) / n_quad;
    const int quad = (turn * 32 + lane) % n_quad;
    const int64_t e = e0 + quad * kQuad;
    c.n = static_cast<int>(min(max(shape.d_inner - e, int64_t{0}), int64_t{kQuad}));
    c.n_tile = c.n > 0 ? tiles_of(t) : 0;
    const int64_t row = begin + tile * kTile + t;
    c.x = p.x + row * shape.x_stride + e;
    c.dt = p.dt + row * shape.dt_stride + e;
    c.z = p.z + row * shape.z_stride + e;
    c.y = p.y + row * shape.y_stride + e;
    c.tokens = stride * kTile;
    c.raw = s + at.raw + turn * (3 * 32 * kBytes) + lane * kBytes;
    c.fine = s + at.fine + quad * Layout::kFine + t * (kQuad * 8);
    c.sum = s + at.sum + quad * Layout::kSum + t * (kQuad * 4);
    const auto parameter = [&](const float* v, int j) { return j < c.n ? v[e + j] : 0.0F; };
    c.bias = {parameter(p.dt_bias, 0), parameter(p.dt_bias, 1), parameter(p.dt_bias, 2),
              parameter(p.dt_bias, 3)};
    c.D = {parameter(p.D, 0), parameter(p.D, 1), parameter(p.D, 2), parameter(p.D, 3)};
    return c;
  };
  const int n_channels = two_sets ? 2 * n_quad : n_quad;
  const bool has_item = helper < n_channels;
  const int second = helper + n_helper;
  const bool has_other = second < n_quad;
  const int turn_bc = (has_item ? second : helper) - n_channels;
  const bool has_bc = turn_bc >= 0 && turn_bc < kItemsBC;
  const int first = two_sets && has_item ? helper / n_quad : 0;  // tile, and from it every ..
  const int stride = two_sets && has_item ? 2 : 1;
  ChannelItem<T> item = channels(has_item ? helper % n_quad : 0, first, stride);
  ChannelItem<T> other = channels(has_other ? second : 0, 0, 1);
  StateItem<T> states;
  {
    const int turn = has_bc ? turn_bc : 0;
    const int t = turn * 8 + lane / 4;
    states.n0 = lane % 4 * kQuad;
    states.n_tile = tiles_of(t);
    states.B = p.B + (begin + t) * shape.B_stride + states.n0;
    states.C = p.C + (begin + t) * shape.C_stride + states.n0;
    states.raw = s + at.raw_bc + turn * (2 * 32 * kBytes) + lane * kBytes;
    states.bc = s + at.bc + t * Layout::kBC + states.n0 * 8;
  }

  // A step is one pass over a tile. It is requested kAhead steps before it is prepared; a tile is
  // finished kRing tiles after it was prepared, just before its places are used again.
  int wanted_k = first, wanted_pass = 0;
  const auto request = [&] {
    if (wanted_pass == 0) {
      if (has_item) item.request(wanted_k, stage_bytes, shape);
      if (has_other) other.request(wanted_k, stage_bytes, shape);
    }
    if (has_bc) {
      states.request(wanted_k, wanted_pass, wanted_k * n_pass + wanted_pass, n_pass, shape);
    }
    if (kOne || ++wanted_pass == n_pass) {
      wanted_pass = 0;
      wanted_k += stride;
    }
    end_copies();
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) request();
  int k = first;
  for (; k < n_tile; k += stride) {
    for (int pass = 0; pass < n_pass; ++pass) {
      const int q = k * n_pass + pass;
      await_copies<kAhead - 1>();  // of all steps but the last ones requested
      if (q >= kRing) done[q % kRing].wait(q / kRing - 1);
      if (pass == 0) {
        if (has_item) {
          if (k >= kRing) item.finish(k - kRing, stage_bytes, shape);
          item.prepare(k, stage_bytes);
        }
        if (has_other) {
          if (k >= kRing) other.finish(k - kRing, stage_bytes, shape);
          other.prepare(k, stage_bytes);
        }
      }
      if (has_bc) states.prepare(k, q);
      full[q % kRing].arrive();
      request();
    }
  }
  const int n_step = n_tile * n_pass;
  for (k = max(k - kRing, first); k < n_tile; k += stride) {
    const int q = (k + 1) * n_pass - 1;
    if (q >= n_step - kRing) done[q % kRing].wait(q / kRing);  // else it was waited for above
    if (has_item) item.finish(k, stage_bytes, shape);
    if (has_other) other.finish(k, stage_bytes, shape);
  }
}

template <typename T, bool kOne>
void launch_scan(const ScanPointers<T>& p, const ScanShape& shape, int64_t n_seq,
                 cudaStream_t stream) {
  const auto shared = static_cast<size_t>(Layout(shape.n_quad, shape.n_pass, sizeof(T)).end);
  auto* kernel = &selective_scan_kernel<T, kOne>;
  KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)));
  const dim3 grid(static_cast<unsigned>(ceil_div(shape.d_inner, kQuad * shape.n_quad)),
                  static_cast<unsigned>(n_seq));
  const int n_warp = std::max<int>(shape.n_quad, std::bit_width(shape.helpers));
  launch("selective_scan", kernel, grid, 32 * n_warp, shared, stream, p, shape);
}

/// Whether rows of `t` allow accesses of 4 elements.
bool allows_quads(const Tensor& t) {
  const size_t bytes = kQuad * itemsize(t.dtype);
  return reinterpret_cast<uintptr_t>(t.data) % bytes == 0 && t.dim(1) % kQuad == 0 &&
         (t.dim(0) == 1 || t.row_stride % kQuad == 0);
}

/// Quads of a block. The time of a multiprocessor in tokens of a quad: what its blocks have to do,
/// each no less than as if it had 4 quads, and what each takes to begin and to end.
int choose_quads(const ScanShape& shape, int64_t n_seq, int64_t length, int itemsize) {
  constexpr int64_t kLeast = 4;
  constexpr int64_t kEnds = 1200;
  const int64_t n_sm = device_attribute(cudaDevAttrMultiProcessorCount);
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  int best = 1;
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int n = 1; n <= kMaxQuads && Layout(n, shape.n_pass, itemsize).end <= room; ++n) {
    const int64_t blocks = ceil_div(ceil_div(shape.d_inner, kQuad * n) * n_seq, n_sm);
    const int64_t cost = blocks * (std::max<int64_t>(n, kLeast) * length + kEnds);
    if (cost < best_cost) best = n, best_cost = cost;
  }
  return best;
}

/// Which warps work beside the recurrence, whose warps are 0 .. n_quad - 1: two sets of them where
/// there is room, since one warp is late with each tile of a narrow block. A multiprocessor deals a
/// block's warps to its four schedulers in turn; a warp beside the recurrence goes where there is
/// the least to do, with half the work of one in it. (One after the other instead: 73 us for 51 at
/// d_inner 1536.)
unsigned place_helpers(int n_quad, bool one_pass) {
  int n = n_quad <= 5 && one_pass ? 2 * n_quad + kItemsBC : std::min(n_quad + kItemsBC, 8);
  int load[4] = {};
  unsigned helpers = 0;
  for (int w = 0; w < n_quad; ++w) load[w % 4] += 2;
  for (; n > 0; --n) {
    int best = -1, best_load = 0;
    for (int w = n_quad; w < kMaxWarps; ++w) {
      if ((helpers >> w & 1) != 0) continue;
      if (best < 0 || load[w % 4] < best_load) best = w, best_load = load[w % 4];
    }
    helpers |= 1U << best;
    ++load[best % 4];
  }
  return helpers;
}

}  // namespace

void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream) {
  const auto d_state = static_cast<int>(in.A.dim(1));
  ScanShape shape{
      in.x.dim(1),
      d_state,
      static_cast<int>(ceil_div(d_state, kStates)),
      0,
      0,
      allows_quads(in.x) && allows_quads(in.dt) && allows_quads(in.z) && allows_quads(y),
      allows_quads(in.B) && allows_quads(in.C),
      ssm_state.dtype,
      in.x.row_stride,
      in.dt.row_stride,
      in.z.row_stride,
      y.row_stride,
      in.B.row_stride,
      in.C.row_stride};
  if (!is_float16_or_32(shape.state)) throw_not_float(shape.state, "selective_scan state");
  visit_type(in.x.dtype, "selective_scan x", [&](auto t) {
    using T = decltype(t);
    const ScanPointers<T> p{in.x.as<T>(),
                            in.dt.as<T>(),
                            in.z.as<T>(),
                            in.B.as<T>(),
                            in.C.as<T>(),
                            in.A.as<float>(),
                            in.D.as<float>(),
                            in.dt_bias.as<float>(),
                            y.as<T>(),
                            ssm_state.data,
                            batch.seq_start.as<int32_t>(),
                            batch.slot.as<int32_t>()};
    shape.n_quad = choose_quads(shape, batch.n_seq, batch.max_len, sizeof(T));
    shape.helpers = place_helpers(shape.n_quad, shape.n_pass == 1);
    if (shape.n_pass > 1) return launch_scan<T, false>(p, shape, batch.n_seq, stream);
    launch_scan<T, true>(p, shape, batch.n_seq, stream);
  });
}

}  // namespace krait::cuda
