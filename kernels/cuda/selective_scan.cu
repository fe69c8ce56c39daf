// selective_scan.cu - the Mamba-1 recurrence over whole sequences.
//
//   dt = softplus(dt_raw + dt_bias)
//   h  = exp(dt * A) * h + dt * B * x        per channel e, state n, from h = ssm_state[slot]
//   y  = (sum_n C * h + D * x) * silu(z)
//
// Serial in time, parallel over channels and states: a time-parallel scan needs its exponentials
// twice, and the exponentials are what binds. They don't depend on the recurrence, so a warp runs
// several tokens ahead with them while the chain itself is one FMA a token. 8 lanes share a channel
// and hold 2 of 16 states each; the lanes' shares of y are summed for 8 tokens at a time, by a
// transposition that takes 7 shuffles instead of 24.
//
// Half of a block's warps do nothing but the recurrence. The other half prepare a tile of 64 tokens
// ahead of it (softplus and dt * x, once per channel and token) and finish one behind it (D, gate,
// store), and keep a ring of 3 tiles filled from memory by asynchronous copies. One barrier per
// tile.
//
// Shapes   x, dt, z, y T [n_tok, d_inner]; B, C T [n_tok, d_state] views; A f32 [d_inner, d_state];
//          ssm_state [slot, d_inner, d_state] in f32, bf16 or f16
// Launch   grid (channels / 16, n_seq), 128 + 128 threads
// Types    arithmetic f32. With 16-bit inputs exp is the special-function unit's (2 ulp); with f32
//          inputs a polynomial (1 ulp), since a long memory adds up what a decay close to 1 is off.
//          More than 16 states are done 16 at a time, tile by tile
// Bytes    n_tok * d_inner * 4 * sizeof(T), and per block its share of B, C and the state
// Roofline d_state + 6 special-function results per channel and token, and about 10 instructions
//          per state and token: bound by both, not by bytes
// Measured H100 80GB HBM3, bf16, 2048 tokens of one sequence, us at d_inner 1536 and 5120
//          (tools/bench_ops): 135 and 145. Special functions alone would need 20 and 62: a
//          scheduler has one to three warps of the recurrence, which wait for shared memory and
//          shuffles
// Same as  kernels/cpu; tests/ops
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kHalf = 128;     // threads of the recurrence, and as many beside it
constexpr int kChannels = 16;  // of a block
constexpr int kTile = 64;      // tokens
constexpr int kStates = 16;    // states of a pass
constexpr int kLanes = 8;      // of a channel
constexpr int kGroup = 8;      // tokens whose y are summed over the lanes together
// Tiles in the ring: one to finish and then on its way, one in the recurrence, one to prepare.
constexpr int kRing = 3;
static_assert(kGroup == kLanes && kTile % kGroup == 0 && kChannels * kLanes == kHalf);
// Beside the recurrence a thread has 8 neighbouring channels of one token, and 8 states of B and C.
constexpr int kEight = 8;
static_assert(kTile * kChannels / kEight == kHalf && kTile * kStates / kEight == kHalf);

struct ScanShape {
  int64_t d_inner;
  int d_state;
  int n_pass;      // ceil(d_state / kStates)
  bool eights;     // x, dt, z, y allow accesses of 8 elements
  bool eights_BC;  // so do B and C
  DType state;     // of ssm_state
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

/// 8 neighbours.
template <typename T>
struct alignas(16) Eight {
  T v[kEight];
};

/// Inputs of a tile as they lie in memory, each thread's own.
template <typename T>
struct RawTile {
  Eight<T> x[kHalf], dt[kHalf], z[kHalf];
};
template <typename T>
struct RawBC {  // of one pass
  Eight<T> B[kHalf], C[kHalf];
};

/// A tile ready for the recurrence, and what comes out of it.
struct Tile {
  float2 dt_dx[kTile][kChannels];  // softplus(dt), and that times x
  float y[kTile][kChannels + 4];   // sum_n C * h; the padding spreads a store over the banks
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

/// Copies 8 elements to shared memory, zeros where !inside, in the background.
template <typename T>
__device__ __forceinline__ void copy_eight(Eight<T>* to, const T* from, bool inside) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Eight<T>)); i += 16) {
    copy16_async(reinterpret_cast<char*>(to) + i, reinterpret_cast<const char*>(from) + i, inside);
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

/// The sum over the 8 lanes of a channel of v[lane], v[i] being each lane's share of token i: three
/// rounds, in each of which a lane gives away half of its tokens and adds what it gets to the rest.
__device__ __forceinline__ float transposed_sum(float (&v)[kGroup], int lane) {
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float give = upper ? v[i] : v[i + half];
      const float have = upper ? v[i + half] : v[i];
      v[i] = have + __shfl_xor_sync(0xffffffffU, give, half);
    }
  }
  return v[0];
}

/// The recurrence over n_group groups of tokens, for one channel and two states a thread. bc points
/// at the lane's B and C, dt_dx at the channel, y at the lane's first token and the channel.
template <typename T>
__device__ __forceinline__ void recur(const float4* __restrict__ bc,
                                      const float2* __restrict__ dt_dx, float* __restrict__ y,
                                      bool add, int n_group, int lane, float (&h)[2],
                                      const float (&A)[2]) {
  const auto decay = [](float v) {
    if constexpr (sizeof(T) == 4) {
      return exp2_exact(v);
    } else {
      return exp2_fast(v);
    }
  };
  const auto decays = [&](int g, float(&to)[kGroup][2]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float dt = dt_dx[(g * kGroup + i) * kChannels].x;
      to[i][0] = decay(dt * A[0]);
      to[i][1] = decay(dt * A[1]);
    }
  };
  // The exponentials of a group are taken while the group before it is in the recurrence.
  float next[kGroup][2];
  decays(0, next);
#pragma unroll 2
  for (int g = 0; g < n_group; ++g) {
    float now[kGroup][2];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      now[i][0] = next[i][0];
      now[i][1] = next[i][1];
    }
    decays(min(g + 1, n_group - 1), next);
    float share[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float4 of = bc[(g * kGroup + i) * kLanes];  // B, B, C, C
      const float dx = dt_dx[(g * kGroup + i) * kChannels].y;
      h[0] = fmaf(now[i][0], h[0], dx * of.x);
      h[1] = fmaf(now[i][1], h[1], dx * of.y);
      share[i] = fmaf(of.w, h[1], of.z * h[0]);
    }
    float& to = y[g * kGroup * (kChannels + 4)];
    const float sum = transposed_sum(share, lane);
    to = add ? to + sum : sum;
  }
}

/// Shared memory. A step is one pass over a tile.
template <typename T>
struct Shared {
  RawTile<T> raw[kRing];        // of tile k in place k % kRing
  RawBC<T> raw_bc[kRing];       // of step q in place q % kRing
  Tile tile[2];                 // of tile k in place k % 2
  float4 bc[2][kTile][kLanes];  // of step q in place q % 2: a lane's two B and two C
  // With several passes h and A of each wait here: float2[n_pass][2][kHalf].
};

/// Both halves of a block meet here from their own code, which __syncthreads() does not allow.
__device__ __forceinline__ void tile_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(2 * kHalf) : "memory");
}

/// kOne: one pass does all states, and they stay in registers from the first token to the last.
template <typename T, bool kOne>
__global__ void __launch_bounds__(2 * kHalf, sizeof(T) == 2 ? 3 : 1)
    selective_scan_kernel(ScanPointers<T> p, ScanShape shape) {
  after_previous();
  extern __shared__ float4 shared_raw[];
  Shared<T>& s = *reinterpret_cast<Shared<T>*>(shared_raw);
  const int n_pass = kOne ? 1 : shape.n_pass;

  const int seq = static_cast<int>(blockIdx.y);
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const int64_t begin = p.seq_start[seq];
  const int64_t len = p.seq_start[seq + 1] - begin;
  const int n_tile = static_cast<int>((len + kTile - 1) / kTile);
  const int64_t e0 = static_cast<int64_t>(blockIdx.x) * kChannels;
  const int tid = static_cast<int>(threadIdx.x) % kHalf;

  if (threadIdx.x < kHalf) {
    // The recurrence: channel e, states 2 * lane and the next of each pass.
    const int lane = tid % kLanes;
    const int channel = tid / kLanes;
    const int64_t e = e0 + channel;
    const int64_t row = (slot * shape.d_inner + e) * static_cast<int64_t>(shape.d_state);
    auto* carried = reinterpret_cast<float2*>(&s + 1) + tid;
    float h[2], A[2];
    const auto exists = [&](int n) { return e < shape.d_inner && n < shape.d_state; };
    for (int pass = 0; pass < n_pass; ++pass) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = pass * kStates + 2 * lane + i;
        h[i] = exists(n) ? load_state(p.ssm_state, shape.state, row + n) : 0.0F;
        A[i] = exists(n) ? p.A[e * shape.d_state + n] * kLog2e : 0.0F;
      }
      if constexpr (!kOne) {
        carried[2 * pass * kHalf] = {h[0], h[1]};
        carried[(2 * pass + 1) * kHalf] = {A[0], A[1]};
      }
    }
    tile_barrier();  // the first step is prepared
    for (int k = 0, q = 0; k < n_tile; ++k) {
      const int64_t left = len - static_cast<int64_t>(k) * kTile;
      const int n_group =
          (static_cast<int>(min(static_cast<int64_t>(kTile), left)) + kGroup - 1) / kGroup;
      Tile& tile = s.tile[k % 2];
      for (int pass = 0; pass < n_pass; ++pass, ++q) {
        if constexpr (!kOne) {
          const float2 of_h = carried[2 * pass * kHalf];
          const float2 of_A = carried[(2 * pass + 1) * kHalf];
          h[0] = of_h.x, h[1] = of_h.y, A[0] = of_A.x, A[1] = of_A.y;
        }
        recur<T>(&s.bc[q % 2][0][lane], &tile.dt_dx[0][channel], &tile.y[lane][channel], pass > 0,
                 n_group, lane, h, A);
        if constexpr (!kOne) carried[2 * pass * kHalf] = {h[0], h[1]};
        tile_barrier();
      }
    }
    for (int pass = 0; pass < n_pass; ++pass) {
      if constexpr (!kOne) {
        const float2 of_h = carried[2 * pass * kHalf];
        h[0] = of_h.x, h[1] = of_h.y;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = pass * kStates + 2 * lane + i;
        if (exists(n)) store_state(p.ssm_state, shape.state, row + n, h[i]);
      }
    }
    return;
  }

  // Beside it: token t of each tile, channels e .. e + 7, states n .. n + 7 of each pass.
  const int t = tid / 2;
  const int c = tid % 2 * kEight;
  const int64_t e = e0 + c;
  float bias[kEight], D[kEight];
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    bias[i] = e + i < shape.d_inner ? p.dt_bias[e + i] : 0.0F;
    D[i] = e + i < shape.d_inner ? p.D[e + i] : 0.0F;
  }
  // This thread's place in the tile to be requested next; `left` tokens of the sequence from there.
  const int64_t at0 = begin + t;
  const T* x_next = p.x + at0 * shape.x_stride + e;
  const T* dt_next = p.dt + at0 * shape.dt_stride + e;
  const T* z_next = p.z + at0 * shape.z_stride + e;
  const T* B_next = p.B + at0 * shape.B_stride + c;
  const T* C_next = p.C + at0 * shape.C_stride + c;
  int64_t left = len - t;
  const int width = static_cast<int>(min(shape.d_inner - e, static_cast<int64_t>(kEight)));
  const auto fetch = [&](Eight<T>* to, const T* from, int n, bool eights) {
    if (eights) return copy_eight(to, left > 0 && n > 0 ? from : p.x, left > 0 && n > 0);
    Eight<T> v;
#pragma unroll
    for (int i = 0; i < kEight; ++i) v.v[i] = left > 0 && i < n ? from[i] : T(0.0F);
    *to = v;
  };
  // One group of copies per step, empty past the end.
  const auto request = [&](int k, int pass, int q) {
    if (k < n_tile) {
      if (pass == 0) {
        RawTile<T>& r = s.raw[k % kRing];
        fetch(&r.x[tid], x_next, width, shape.eights);
        fetch(&r.dt[tid], dt_next, width, shape.eights);
        fetch(&r.z[tid], z_next, width, shape.eights);
      }
      RawBC<T>& r = s.raw_bc[q % kRing];
      const int states = shape.d_state - pass * kStates - c;
      fetch(&r.B[tid], B_next + pass * kStates, states, shape.eights_BC);
      fetch(&r.C[tid], C_next + pass * kStates, states, shape.eights_BC);
      if (pass + 1 == n_pass) {
        x_next += kTile * shape.x_stride;
        dt_next += kTile * shape.dt_stride;
        z_next += kTile * shape.z_stride;
        B_next += kTile * shape.B_stride;
        C_next += kTile * shape.C_stride;
        left -= kTile;
      }
    }
    end_copies();
  };
  const auto prepare = [&](int k, int pass, int q) {
    const RawBC<T>& of = s.raw_bc[q % kRing];
    const Eight<T> B = of.B[tid];
    const Eight<T> C = of.C[tid];
    float4* bc = &s.bc[q % 2][t][c / 2];
#pragma unroll
    for (int i = 0; i < kEight; i += 2) {
      bc[i / 2] = {to_float(B.v[i]), to_float(B.v[i + 1]), to_float(C.v[i]), to_float(C.v[i + 1])};
    }
    if (pass > 0) return;
    const Eight<T> x = s.raw[k % kRing].x[tid];
    const Eight<T> dt = s.raw[k % kRing].dt[tid];
    const float inside = static_cast<int64_t>(k) * kTile + t < len ? 1.0F : 0.0F;
    auto* to = reinterpret_cast<float4*>(&s.tile[k % 2].dt_dx[t][c]);
#pragma unroll
    for (int i = 0; i < kEight; i += 2) {
      // Past the end dt = 0: exp(0) = 1 and nothing is added, so the state passes unchanged.
      const float a = softplus(to_float(dt.v[i]) + bias[i]) * inside;
      const float b = softplus(to_float(dt.v[i + 1]) + bias[i + 1]) * inside;
      to[i / 2] = {a, a * to_float(x.v[i]), b, b * to_float(x.v[i + 1])};
    }
  };
  T* y_next = p.y + at0 * shape.y_stride + e;
  const auto finish = [&](int k) {
    if (static_cast<int64_t>(k) * kTile + t >= len) return;
    const Eight<T> x = s.raw[k % kRing].x[tid];
    const Eight<T> z = s.raw[k % kRing].z[tid];
    const auto* sums = reinterpret_cast<const float4*>(&s.tile[k % 2].y[t][c]);
    const float4 low = sums[0];
    const float4 high = sums[1];
    const float y[kEight] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    Eight<T> out;
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      const float v = fmaf(D[i], to_float(x.v[i]), y[i]);
      out.v[i] = from_float<T>(v * silu(to_float(z.v[i])));
    }
    T* to = y_next;
    y_next += kTile * shape.y_stride;
    if (shape.eights) {
      if (e < shape.d_inner) *reinterpret_cast<Eight<T>*>(to) = out;
    } else {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if (e + i < shape.d_inner) to[i] = out.v[i];
      }
    }
  };
  // A place among the steps.
  struct Place {
    int k = 0, pass = 0, q = 0;
    __device__ void advance(int n_pass) {
      ++q;
      if (++pass == n_pass) {
        pass = 0;
        ++k;
      }
    }
  };
  // A step is requested kRing - 1 ahead of its recurrence, prepared one ahead; a tile is finished
  // in the step after its last one, just before its place in the ring is requested again.
  Place wanted, ahead;
  for (int i = 0; i < kRing - 1; ++i, wanted.advance(n_pass)) {
    request(wanted.k, wanted.pass, wanted.q);
  }
  await_copies<kRing - 2>();  // of all steps but the last ones requested
  if (n_tile > 0) prepare(0, 0, 0);
  ahead.advance(n_pass);
  tile_barrier();
  for (int k = 0; k < n_tile; ++k) {
    for (int pass = 0; pass < n_pass; ++pass) {
      if (pass == 0 && k > 0) finish(k - 1);
      request(wanted.k, wanted.pass, wanted.q);
      wanted.advance(n_pass);
      await_copies<kRing - 2>();  // of all steps but the last ones requested
      if (ahead.k < n_tile) prepare(ahead.k, ahead.pass, ahead.q);
      ahead.advance(n_pass);
      tile_barrier();  // this step is through the recurrence
    }
  }
  if (n_tile > 0) finish(n_tile - 1);
}

template <typename T, bool kOne>
void launch_scan(const ScanPointers<T>& p, const ScanShape& shape, int64_t n_seq,
                 cudaStream_t stream) {
  size_t shared = sizeof(Shared<T>);
  if (!kOne) shared += 2 * static_cast<size_t>(shape.n_pass) * kHalf * sizeof(float2);
  auto* kernel = &selective_scan_kernel<T, kOne>;
  KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)));
  const dim3 grid(static_cast<unsigned>(ceil_div(shape.d_inner, kChannels)),
                  static_cast<unsigned>(n_seq));
  launch("selective_scan", kernel, grid, 2 * kHalf, shared, stream, p, shape);
}

/// Whether rows of `t` allow 16-byte accesses of 8 elements (4 for f32, twice).
bool allows_eights(const Tensor& t) { return aligned16(t) && t.dim(1) % kEight == 0; }

}  // namespace

void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream) {
  const auto d_state = static_cast<int>(in.A.dim(1));
  const ScanShape shape{
      in.x.dim(1),
      d_state,
      static_cast<int>(ceil_div(d_state, kStates)),
      allows_eights(in.x) && allows_eights(in.dt) && allows_eights(in.z) && allows_eights(y),
      allows_eights(in.B) && allows_eights(in.C),
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
    if (shape.n_pass > 1) return launch_scan<T, false>(p, shape, batch.n_seq, stream);
    launch_scan<T, true>(p, shape, batch.n_seq, stream);
  });
}

}  // namespace krait::cuda
