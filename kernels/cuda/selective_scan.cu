// selective_scan.cu - the Mamba-1 recurrence over whole sequences.
//
//   dt = softplus(dt_raw + dt_bias)
//   h  = exp(dt * A) * h + dt * B * x        per channel e, state n, from h = ssm_state[slot]
//   y  = (sum_n C * h + D * x) * silu(z)
//
// Serial in time is one FMA a token and state: the decays exp(dt * A) and what is added, dt * x *
// B, don't depend on h. So warps take turns in time. A warp owns a unit, 8 tokens of a group of 8
// channels: it makes all decays and addends of the unit in registers, waits for the h that the warp
// with the unit before hands on through shared memory, runs the chain, hands h on itself, and sums
// over the states, gates and stores while the next warps run theirs. Nothing else passes between
// warps, so no scheduler idles for another. In the registers that the sums leave, the decays and
// addends of the warp's next unit appear, which mixes special functions with FMAs.
//
// A link of the chain, from one warp's handing on to the next one's, must be short where a block
// has few groups: nothing but the wait, a load, the chain and a store belongs between them. So
// short it hardly binds: with no waits at all 2048 channels would take 5% less.
//
// 4 lanes share a channel and hold 4 of 16 states each; their shares of y are summed for 4 tokens
// at a time by a transposition, after which each lane has the y of those tokens whose x, dt and z
// it prepared.
//
// Shapes   x, dt, z, y T [n_tok, d_inner]; B, C T [n_tok, d_state] views; A f32 [d_inner, d_state];
//          ssm_state [slot, d_inner, d_state] in f32, bf16 or f16
// Launch   grid (groups of 8 channels / n_group, n_seq), n_group * n_turn warps; choose_plan()
// Types    arithmetic f32. With 16-bit inputs exp is the special-function unit's (2 ulp); with f32
//          inputs a polynomial (1 ulp), since a long memory adds up what a decay close to 1 is off.
//          More than 16 states are done 16 at a time, unit by unit
// Bytes    n_tok * d_inner * 4 * sizeof(T), and per block its share of B, C and the state
// Roofline d_state + 3 special-function results per channel and token, and about 165 instructions
//          of a thread: bound by both, not by bytes
// Measured H100 80GB HBM3, bf16, 2048 tokens of one sequence, us at d_inner 1536, 2048, 3072, 4096
//          and 5120 (tools/bench_ops): 38, 38, 56, 72 and 90. Special functions alone would need
//          14, 19, 29, 38 and 48. At 5120 L1 with shared memory is busy for 79% of it, L2 for 71%
//          and issue slots for 55%; no part, left out alone, makes 2048 or 5120 quicker by over 7%
// Same as  kernels/cpu; tests/ops
#include <algorithm>
#include <climits>
#include <limits>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kStates = 16;    // of a pass
constexpr int kMaxWarps = 16;  // of a block

struct ScanShape {
  int d_inner;
  int d_state;
  int n_pass;                 // ceil(d_state / kStates)
  int n_group;                // groups of channels of a block
  int n_turn;                 // warps of a block that take turns with a group
  DType state;                // of ssm_state
  int64_t x, dt, z, y, B, C;  // elements from a row to the next
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
  __device__ __forceinline__ void arrive(int lane) {
    __syncwarp();
    if (lane >= kWarpArrivals) return;
#if __CUDA_ARCH__ >= 800
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(at()) : "memory");
#else
    __threadfence_block();
    atomicAdd(reinterpret_cast<unsigned*>(&state), 1U);
#endif
  }
  /// Until all have arrived for the `turn`th time, counted from 0. At most one turn behind them.
  __device__ __forceinline__ void wait(int turn) const {
#if __CUDA_ARCH__ >= 900
    mbarrier_wait(at(), static_cast<uint32_t>(turn & 1));
#elif __CUDA_ARCH__ >= 800
    unsigned done = 0;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(at()), "r"(turn & 1)
          : "memory");
    } while (!__all_sync(0xffffffffU, done));
#else
    const volatile unsigned* arrived = reinterpret_cast<const volatile unsigned*>(&state);
    const unsigned count = arrived[1];
    while (!__all_sync(0xffffffffU, arrived[0] >= (turn + 1) * count)) __nanosleep(64);
    __threadfence_block();
#endif
  }
};

// How the lanes of a warp share a unit.
constexpr int kHeld = 4;                  // states of a lane
constexpr int kLanes = kStates / kHeld;   // of a channel
constexpr int kChannels = 32 / kLanes;    // of a unit
constexpr int kTokens = 8;                // of a unit
constexpr int kItems = kTokens / kLanes;  // of them those whose x, dt, z and y a lane has

// Lane bits: 1 is a channel's, 0 a state's, so that a load of B or C and one of dt and dt * x have
// the same address in lanes that differ in that bit alone, which halves their cost.
__device__ __forceinline__ int state_of(int lane) { return (lane & 1) | (lane >> 1 & 2); }
__device__ __forceinline__ int channel_of(int lane) { return (lane >> 1 & 1) | lane >> 3 << 1; }

/// Of each 2 * kHalf tokens a lane gives half away and adds what it gets to the rest.
template <int kHalf, int kMask>
__device__ __forceinline__ void sum_round(float (&v)[kTokens], int lane) {
  const bool upper = (lane & kMask) != 0;
#pragma unroll
  for (int i = 0; i < kItems * kHalf; ++i) {
    const int lower = i / kHalf * (2 * kHalf) + i % kHalf;
    const float give = upper ? v[lower] : v[lower + kHalf];
    const float have = upper ? v[lower + kHalf] : v[lower];
    v[i] = have + __shfl_xor_sync(0xffffffffU, give, kMask);
  }
}
/// The lanes' shares v[token] to sums: v[i] becomes the sum of token i * kLanes + state_of(lane).
__device__ __forceinline__ void sum_lanes(float (&v)[kTokens], int lane) {
  sum_round<2, 4>(v, lane);
  sum_round<1, 1>(v, lane);
}

/// Shared memory of a block, in bytes: for each warp what it has of its units, and for each warp
/// and pass the h it hands on and the gate that says so.
template <typename T>
struct Layout {
  static constexpr int kAhead = 2;  // units of a warp on their way from memory
  // Of a unit as it comes: rows of x, of dt, of z, then of B and of C
  static constexpr int kRow = kChannels * static_cast<int>(sizeof(T));
  static constexpr int kRowBC = kStates * static_cast<int>(sizeof(T));
  static constexpr int kRawBC = kTokens * 3 * kRow;
  static constexpr int kRaw = kRawBC + kTokens * 2 * kRowBC;
  // In f32: (dt, dt * x), channel by channel; 16 bytes more spread the channels over the banks
  static constexpr int kFineChannel = kTokens * 8 + 16;
  static constexpr int kFine = kChannels * kFineChannel;
  static constexpr int kBC = kTokens * kStates * 4;                // of B, and as much for C
  static constexpr int kOfWarp = kFine + 3 * kBC + kAhead * kRaw;  // C twice
  static constexpr int kCarried = kChannels * kStates * 4;         // of a warp and a pass
  static_assert(kFine % 16 == 0 && kRaw % 16 == 0);
  int carried, gates, end;

  __host__ __device__ constexpr Layout(int n_warp, int n_pass) {
    carried = n_warp * kOfWarp;
    gates = carried + n_warp * n_pass * kCarried;
    end = gates + n_warp * n_pass * 8;
  }
};

/// x, dt and z in the order in which a unit keeps them, each with its elements from row to row.
template <typename T>
struct ChannelInput {
  const T* of;
  int64_t stride;
};
template <typename T>
__device__ __forceinline__ ChannelInput<T> channel_input(const ScanPointers<T>& p,
                                                         const ScanShape& shape, int array) {
  return {array == 0   ? p.x
          : array == 1 ? p.dt
                       : p.z,
          array == 0   ? shape.x
          : array == 1 ? shape.dt
                       : shape.z};
}

/// Copies of a warp's units on their way to shared memory, a lane's pieces of them.
template <typename T>
class RawUnits {
  using At = Layout<T>;

 public:
  __device__ __forceinline__ void begin(const ScanPointers<T>& p, const ScanShape& shape, int row,
                                        int e0, int lane) {
    const int64_t step = shape.n_turn * kTokens * int64_t{sizeof(T)};
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int at = min(i * 32 + lane, kPieces - 1);
      const int array = at / (kTokens * kOfRow);
      token_[i] = at / kOfRow % kTokens;
      const auto [of, stride] = channel_input(p, shape, array);
      from_[i] = reinterpret_cast<const char*>(of + (row + token_[i]) * stride + e0) +
                 at % kOfRow * kPiece;
      step_[i] = static_cast<int>(step * stride);
    }
#pragma unroll
    for (int i = 0; i < kOfLaneBC; ++i) {
      const int at = i * 32 + lane;
      const bool of_C = at >= kPiecesBC / 2;
      const int t = at / kOfRowBC % kTokens;
      const int n = at % kOfRowBC * Vec16<T>::kSize;
      tokenBC_[i] = n < shape.d_state ? t : INT_MAX;
      fromBC_[i] = reinterpret_cast<const char*>(of_C ? p.C + (row + t) * shape.C + n
                                                      : p.B + (row + t) * shape.B + n);
      stepBC_[i] = static_cast<int>(step * (of_C ? shape.C : shape.B));
    }
  }
  /// The next of them, of which `left` tokens exist (less than 1: nothing); the rest becomes 0.
  __device__ __forceinline__ void request(char* to, int left, int lane) {
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int at = i * 32 + lane;
        if (at < kPieces) copy_async<kPiece>(to + at * kPiece, from_[i], token_[i] < left);
        from_[i] += step_[i];
      }
#pragma unroll
      for (int i = 0; i < kOfLaneBC; ++i) {
        copy_async<16>(to + At::kRawBC + (i * 32 + lane) * 16, fromBC_[i], tokenBC_[i] < left);
        fromBC_[i] += stepBC_[i];
      }
    }
    end_copies();
  }

 private:
  static constexpr int kPiece = 16;
  static constexpr int kOfRow = At::kRow / kPiece;
  static constexpr int kPieces = 3 * kTokens * kOfRow;
  static constexpr int kOfLane = (kPieces + 31) / 32;
  static constexpr int kOfRowBC = At::kRowBC / 16;
  static constexpr int kPiecesBC = 2 * kTokens * kOfRowBC;
  static constexpr int kOfLaneBC = kPiecesBC / 32;
  static_assert(kPiecesBC % 32 == 0 && kPiece >= 8);
  const char *from_[kOfLane], *fromBC_[kOfLaneBC];
  int step_[kOfLane], stepBC_[kOfLaneBC];    // bytes to the warp's next unit
  int token_[kOfLane], tokenBC_[kOfLaneBC];  // place in the unit
};

/// The same without copies in the background, for any alignment and number of channels.
template <typename T>
__device__ __forceinline__ void load_channels(char* to, const ScanPointers<T>& p,
                                              const ScanShape& shape, int row, int left, int e0,
                                              int lane) {
  constexpr int kArray = kTokens * kChannels;
#pragma unroll 1
  for (int at = lane; at < 3 * kArray; at += 32) {
    const int array = at / kArray;
    const int t = at / kChannels % kTokens;
    const int e = e0 + at % kChannels;
    const auto [of, stride] = channel_input(p, shape, array);
    const bool there = t < left && e < shape.d_inner;
    reinterpret_cast<T*>(to)[at] = there ? of[(row + t) * stride + e] : T(0.0F);
  }
}
template <typename T>
__device__ __forceinline__ void load_states(char* to, const ScanPointers<T>& p,
                                            const ScanShape& shape, int row, int left, int pass,
                                            int lane) {
  constexpr int kArray = kTokens * kStates;
#pragma unroll 1
  for (int at = lane; at < 2 * kArray; at += 32) {
    const bool of_C = at >= kArray;
    const int t = at % kArray / kStates;
    const int n = pass * kStates + at % kStates;
    const int64_t from = (row + t) * (of_C ? shape.C : shape.B) + n;
    const bool there = t < left && n < shape.d_state;
    reinterpret_cast<T*>(to)[at] = there ? (of_C ? p.C : p.B)[from] : T(0.0F);
  }
}

/// B and C of a unit, a lane's part on its way to f32.
template <typename T>
struct States {
  static constexpr int kSize = Vec16<T>::kSize;
  static constexpr int kOfRow = kStates / kSize;
  static constexpr int kOfB = kTokens * kOfRow;
  static constexpr int kOfLane = 2 * kOfB / 32;
  Vec16<T> v[kOfLane];

  __device__ __forceinline__ void load(const char* raw, int lane) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      v[i] = *reinterpret_cast<const Vec16<T>*>(raw + (i * 32 + lane) * 16);
    }
  }
  __device__ __forceinline__ void store(float* B, float* C, int lane) const {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int at = i * 32 + lane;
      float f[kSize];
      unpack(f, v[i]);
      float* to = (at < kOfB ? B : C) + at % kOfB * kSize;
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        *reinterpret_cast<float4*>(to + j) = {f[j], f[j + 1], f[j + 2], f[j + 3]};
      }
    }
  }

 private:
  static __device__ __forceinline__ void unpack(float (&to)[kSize], const Vec16<T>& from) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) to[i] = from.v[i];
    } else {
      uint32_t two[kSize / 2];
      memcpy(two, &from, sizeof two);
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) unpack_pair<T>(two[i], to[2 * i], to[2 * i + 1]);
    }
  }
};

/// Stores v where `inside` holds, without a branch: those keep the work before it from overlapping.
template <typename T>
__device__ __forceinline__ void store_if(bool inside, T* to, T v) {
  if constexpr (sizeof(T) == 4) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.f32 [%1], %2; }" ::"r"(
                     static_cast<int>(inside)),
                 "l"(to), "f"(v)
                 : "memory");
  } else {
    unsigned short bits;
    memcpy(&bits, &v, sizeof bits);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.u16 [%1], %2; }" ::"r"(
                     static_cast<int>(inside)),
                 "l"(to), "h"(bits)
                 : "memory");
  }
}

template <typename T>
__device__ __forceinline__ float decay(float v) {
  if constexpr (sizeof(T) == 4) {
    return exp2_exact(v);
  } else {
    return exp2_fast(v);
  }
}

/// kPlain: one pass does all states, rows can be copied in pieces and groups have all channels.
template <typename T, bool kPlain>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    selective_scan_kernel(ScanPointers<T> p, ScanShape shape) {
  using At = Layout<T>;
  extern __shared__ float4 shared_raw[];
  char* const s = reinterpret_cast<char*>(shared_raw);
  const int n_pass = kPlain ? 1 : shape.n_pass;
  const int n_warp = static_cast<int>(blockDim.x) / 32;
  const At at(n_warp, n_pass);
  auto* const gates = reinterpret_cast<Gate*>(s + at.gates);
  for (int i = static_cast<int>(threadIdx.x); i < n_warp * n_pass;
       i += static_cast<int>(blockDim.x)) {
    gates[i].open(1);
  }
  __syncthreads();
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int turn = warp % shape.n_turn;
  const int before = turn > 0 ? warp - 1 : warp + shape.n_turn - 1;  // the warp of the unit before
  const int state = state_of(lane);
  const int channel = channel_of(lane);
  const int e0 = (static_cast<int>(blockIdx.x) * shape.n_group + warp / shape.n_turn) * kChannels;
  if (e0 >= shape.d_inner) return;
  // Lanes of channels past the last one do its work once more and keep it to themselves.
  const bool exists = kPlain || e0 + channel < shape.d_inner;
  const int e = exists ? e0 + channel : shape.d_inner - 1;
  const auto each_state = [&](int pass, auto f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int n = pass * kStates + state * kHeld + i;
      if (n < shape.d_state) f(i, n);
    }
  };
  float A[kHeld];
  const auto load_A = [&](int pass) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) A[i] = 0.0F;
    each_state(pass, [&](int i, int n) {
      A[i] = p.A[static_cast<int64_t>(e) * shape.d_state + n] * kLog2e;
    });
  };
  load_A(0);
  const float dt_bias = p.dt_bias[e];
  const float D = p.D[e];
  char* const own = s + warp * At::kOfWarp;
  char* const fine = own + channel * At::kFineChannel;
  auto* const B = reinterpret_cast<float*>(own + At::kFine);
  constexpr int kC = kTokens * kStates;
  float* const C = B + kC;            // of even steps; of odd ones after it
  const int of_lane = state * kHeld;  // its first B and C of a token
  char* const raw = own + At::kFine + 3 * At::kBC;
  const auto carried = [&](int of_warp, int pass) {
    return reinterpret_cast<float4*>(s + at.carried + (of_warp * n_pass + pass) * At::kCarried) +
           channel * kLanes + state;
  };

  after_previous();
  const int seq = static_cast<int>(blockIdx.y);
  const int32_t slot = p.slots[seq];
  const int end = uniform(p.seq_start[seq + 1]);
  const int len = end - uniform(p.seq_start[seq]);
  if (slot < 0 || len == 0) return;
  const int64_t row_of_state = (int64_t{slot} * shape.d_inner + e) * shape.d_state;
  if (turn == 0) {
    // As if handed on by the warp before.
    for (int pass = 0; pass < n_pass; ++pass) {
      float h[kHeld] = {};
      each_state(pass, [&](int i, int n) {
        h[i] = load_state(p.ssm_state, shape.state, row_of_state + n);
      });
      *carried(before, pass) = {h[0], h[1], h[2], h[3]};
      gates[before * n_pass + pass].arrive(lane);
    }
  }

  int row = end - len + turn * kTokens;
  const int step = shape.n_turn * kTokens;
  int left = end - row;  // tokens from the unit's first to the last
  if (left <= 0) return;
  T* y = p.y + (row + state) * shape.y + e;
  RawUnits<T> ahead;
  if constexpr (kPlain) {
    ahead.begin(p, shape, row, e0, lane);
#pragma unroll
    for (int i = 0; i < At::kAhead; ++i) ahead.request(raw + i * At::kRaw, left - i * step, lane);
  }

  // Of each unit, first, as long as others have their turns: dt, dt * x, B and C in f32 to shared
  // memory. x and z stay in registers for y.
  float x[kItems], z[kItems];
  const auto stage = [&](int round, int at_row, int n_tok, int pass, float* to_C) {
    char* const of_unit = raw + (kPlain ? round % At::kAhead * At::kRaw : 0);
    if constexpr (kPlain) {
      await_copies<At::kAhead - 1>();
    } else {
      if (pass == 0) load_channels<T>(of_unit, p, shape, at_row, n_tok, e0, lane);
      load_states<T>(of_unit + At::kRawBC, p, shape, at_row, n_tok, pass, lane);
    }
    __syncwarp();
    T raw_x[kItems], raw_dt[kItems], raw_z[kItems];
    States<T> states;
    const auto* of = reinterpret_cast<const T*>(of_unit) + state * kChannels + channel;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      raw_dt[i] = of[(kTokens + i * kLanes) * kChannels];
      raw_x[i] = of[i * kLanes * kChannels];
      raw_z[i] = of[(2 * kTokens + i * kLanes) * kChannels];
    }
    states.load(of_unit + At::kRawBC, lane);
    if (kPlain || pass == 0) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        x[i] = to_float(raw_x[i]);
        z[i] = to_float(raw_z[i]);
        const float dt = softplus(to_float(raw_dt[i]) + dt_bias);
        *reinterpret_cast<float2*>(fine + (i * kLanes + state) * 8) = {dt, dt * x[i]};
      }
      if (n_tok < kTokens) {
        // Past the end dt = 0: exp(0) = 1 and nothing is added, so the state passes unchanged.
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int t = i * kLanes + state;
          if (t >= n_tok) *reinterpret_cast<float2*>(fine + t * 8) = {0.0F, 0.0F};
        }
      }
    }
    states.store(B, to_C, lane);
    __syncwarp();
    if constexpr (kPlain) ahead.request(of_unit, n_tok - At::kAhead * step, lane);
  };
  // Then, in registers, the decays a and what is added, which the chain turns into h.
  float a[kTokens][kHeld], h[kTokens][kHeld];
  const auto prepare = [&](int t) {
    const float4 of_two = *reinterpret_cast<const float4*>(fine + t * 8);
    const float4 b[2] = {*reinterpret_cast<const float4*>(B + of_lane + t * kStates),
                         *reinterpret_cast<const float4*>(B + of_lane + (t + 1) * kStates)};
    const float dt[2] = {of_two.x, of_two.z}, dx[2] = {of_two.y, of_two.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kHeld; ++n) a[t + i][n] = decay<T>(dt[i] * A[n]);
      h[t + i][0] = dx[i] * b[i].x;
      h[t + i][1] = dx[i] * b[i].y;
      h[t + i][2] = dx[i] * b[i].z;
      h[t + i][3] = dx[i] * b[i].w;
    }
  };
  stage(0, row, left, 0, C);
#pragma unroll
  for (int t = 0; t < kTokens; t += 2) prepare(t);

  bool last = false;
  float share[kTokens];
#pragma unroll 2  // rings of two
  for (int round = 0, pass = 0, q = 0; left > 0; ++q) {
    const bool ends = kPlain || pass + 1 == n_pass;  // the last pass of the unit
    const int next_pass = ends ? 0 : pass + 1;
    const int next_left = ends ? left - step : left;
    float this_x[kItems], this_z[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) this_x[i] = x[i], this_z[i] = z[i];
    const float* const of_C = C + q % 2 * kC + of_lane;
    stage(round + 1, ends ? row + step : row, next_left, next_pass, C + (q + 1) % 2 * kC);

    gates[before * n_pass + pass].wait(round);
    const float4 from = *carried(before, pass);
    float now[kHeld] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int n = 0; n < kHeld; ++n) now[n] = h[t][n] = fmaf(a[t][n], now[n], h[t][n]);
    }
    *carried(warp, pass) = {now[0], now[1], now[2], now[3]};
    gates[warp * n_pass + pass].arrive(lane);

    // The next warp has its turn. Shares of y, and in the same registers the next unit.
    if constexpr (!kPlain) load_A(next_pass);
#pragma unroll
    for (int t = 0; t < kTokens; t += 2) {
#pragma unroll
      for (int i = t; i < t + 2; ++i) {
        const float4 c = *reinterpret_cast<const float4*>(of_C + i * kStates);
        float sum = c.x * h[i][0];
        if (!kPlain && pass > 0) sum += share[i];
        sum = fmaf(c.y, h[i][1], sum);
        sum = fmaf(c.z, h[i][2], sum);
        share[i] = fmaf(c.w, h[i][3], sum);
      }
      prepare(t);
    }
    if (ends) {
      sum_lanes(share, lane);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        store_if(exists && i * kLanes + state < left, y + i * kLanes * shape.y,
                 from_float<T>(fmaf(D, this_x[i], share[i]) * silu(this_z[i])));
      }
      y += step * shape.y;
      row += step;
      ++round;
      last = left <= kTokens;
    }
    left = next_left;
    pass = next_pass;
  }
  if (last && exists) {
    for (int pass = 0; pass < n_pass; ++pass) {
      const float4 v = *carried(warp, pass);
      const float end_h[kHeld] = {v.x, v.y, v.z, v.w};
      each_state(pass, [&](int i, int n) {
        store_state(p.ssm_state, shape.state, row_of_state + n, end_h[i]);
      });
    }
  }
}

/// How channels and turns are dealt to the blocks.
struct Plan {
  int n_group, n_turn;
};

/// The plan of the least time by what was measured, in cycles of a unit (H100): the issue slots it
/// takes, the least from one link of the chain to the next, what a warp needs from one of its units
/// to the next, and what a block takes to begin and to end.
Plan choose_plan(const ScanShape& shape, int64_t n_seq, int64_t length, int (*end)(int, int)) {
  constexpr int64_t kIssue = 137, kLink = 290, kRound = 2000, kEnds = 6000;
  const int64_t n_sm = device_attribute(cudaDevAttrMultiProcessorCount);
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t groups = ceil_div(int64_t{shape.d_inner}, int64_t{kChannels});
  const int64_t units = ceil_div(length, int64_t{kTokens});
  Plan best{1, 1};
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int n_group = 1; n_group <= kMaxWarps / 2; ++n_group) {
    for (int n_turn = 1; n_group * n_turn <= kMaxWarps; ++n_turn) {
      const int n_warp = n_group * n_turn;
      const int bytes = end(n_warp, shape.n_pass);
      if (bytes > room) break;
      // Blocks of a multiprocessor. Those of 4, 8 .. warps share its schedulers evenly.
      const int64_t together = n_warp % 4 == 0 ? std::min(kMaxWarps / n_warp, room / bytes) : 1;
      const int64_t blocks = ceil_div(groups, int64_t{n_group}) * n_seq;
      const int64_t on_one = std::min(together, ceil_div(blocks, n_sm));
      const int64_t unit = std::max({kIssue * n_group * on_one, kLink, kRound / n_turn});
      const int64_t cost = ceil_div(blocks, n_sm * together) * (unit * units + kEnds * on_one);
      if (cost <= best_cost) best = {n_group, n_turn}, best_cost = cost;
    }
  }
  return best;
}

}  // namespace

void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream) {
  const auto d_state = static_cast<int>(in.A.dim(1));
  visit_type(in.x.dtype, "selective_scan x", [&](auto t) {
    using T = decltype(t);
    ScanShape shape{static_cast<int>(in.x.dim(1)),
                    d_state,
                    static_cast<int>(ceil_div(d_state, kStates)),
                    0,
                    0,
                    ssm_state.dtype,
                    in.x.row_stride,
                    in.dt.row_stride,
                    in.z.row_stride,
                    y.row_stride,
                    in.B.row_stride,
                    in.C.row_stride};
    if (!is_float16_or_32(shape.state)) throw_not_float(shape.state, "selective_scan state");
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
    const Plan plan = choose_plan(shape, batch.n_seq, batch.max_len, [](int n_warp, int n_pass) {
      return Layout<T>(n_warp, n_pass).end;
    });
    shape.n_group = plan.n_group;
    shape.n_turn = plan.n_turn;
    const auto copies = [](const Tensor& of) {
      // Also, that 32 bits count the bytes from a unit to a warp's next.
      return reinterpret_cast<uintptr_t>(of.data) % 16 == 0 &&
             of.row_stride * sizeof(T) % 16 == 0 && of.row_stride < (1 << 20);
    };
    const bool plain = shape.n_pass == 1 && shape.d_inner % kChannels == 0 &&
                       d_state % Vec16<T>::kSize == 0 && copies(in.x) && copies(in.dt) &&
                       copies(in.z) && copies(in.B) && copies(in.C);
    auto* kernel = plain ? &selective_scan_kernel<T, true> : &selective_scan_kernel<T, false>;
    const int n_warp = plan.n_group * plan.n_turn;
    const auto shared = static_cast<size_t>(Layout<T>(n_warp, shape.n_pass).end);
    KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)));
    const int64_t channels = int64_t{plan.n_group} * kChannels;
    const dim3 grid(static_cast<unsigned>(ceil_div(int64_t{shape.d_inner}, channels)),
                    static_cast<unsigned>(batch.n_seq));
    launch("selective_scan", kernel, grid, static_cast<unsigned>(32 * n_warp), shared, stream, p,
           shape);
  });
}

}  // namespace krait::cuda
