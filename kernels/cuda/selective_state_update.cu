// selective_state_update.cu - one decode step of the Mamba-1 recurrence for n_seq sequences.
//
//   dt  = softplus(dt_raw + dt_bias)                    softplus(v) = v for v > 20
//   h'  = exp(dt * A) * h + dt * B * x                  per channel e, state n
//   y   = (sum_n C[n] * h'[n] + D * x) * silu(z)
//
// Shapes   x, dt_raw, z, y T [n_seq, d_inner]; B, C T [n_seq, d_state] views; A f32 [d_inner,
// d_state];
//          h S [slot, d_inner, d_state]
// Launch   d_state 16: grid (channels, groups of sequences), 128 threads. The lanes of a channel (4
//          with f32 state, 2 with 16-bit ones) hold 16 bytes of its state each, of as many
//          sequences as they are: so each computes what one sequence needs once for the channel.
//          Many short blocks: blocks that loop over more sequences, with the next ones' states on
//          the way in registers, were up to a third slower, and with four groups on the way to
//          shared memory made steps 2 to 8% longer, with or without dt_proj inside. In a captured
//          step of few sequences the first blocks have their states before the kernel before this
//          one is done. Other d_state: one sequence a block, 4 threads a channel that stride over
//          its states
// Bytes    n_seq * d_inner * (2 * d_state * sizeof(S) + 4 * sizeof(T)) + 4 * d_inner * d_state
// Roofline under 1 FLOP per byte: bandwidth-bound; below ~10 MB the launch dominates
// Measured H100 80GB HBM3, d_inner 5120, us at batch 64, 256 and 1024 (tools/bench_ops): f32 state
//          15.4, 60.3 and 248; bf16 state 8.2, 30.7 and 133. A copy of the states alone in the same
//          launch: f32 15.5 and 224 (64, 1024); bf16 8.4, 29.6 and 113; other shapes of blocks,
//          cache hints and orders copied no faster
// Same as  selective_scan in kernels/cpu with one token; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kStates = 16;  // of the fast form

template <typename T>
struct UpdateInputs {
  const T *x, *dt, *z, *B, *C;  // y may be x or dt
  const float *A, *D, *dt_bias;
  T* y;
  const int32_t* slots;
  int d_inner, n_seq, d_state;
  bool stochastic;  // h is rounded so
  bool early;       // h may be read before the kernels before this one are done
  int x_pitch, dt_pitch, z_pitch, y_pitch, B_pitch, C_pitch, state_pitch;  // bytes
};

/// Row `row`, given row 0 and the bytes from row to row: one instruction.
template <typename T>
__device__ __forceinline__ T* at_row(T* first, int row, int pitch) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + static_cast<int64_t>(row) * pitch);
}

/// 16 bytes of states as they come from memory: unpacked only when they are used, which halves the
/// registers of those on the way.
template <typename S>
struct Packed {
  static constexpr int kSize = 16 / sizeof(S);
  uint4 raw;

  __device__ __forceinline__ void unpack(float (&v)[kSize]) const {
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(S) == 4) {
        v[i] = __uint_as_float(word[i]);
      } else {
        unpack_pair<S>(word[i], v[2 * i], v[2 * i + 1]);
      }
    }
  }
  __device__ __forceinline__ void pack_from(const float (&v)[kSize]) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(S) == 4) {
        word[i] = __float_as_uint(v[i]);
      } else {
        word[i] = pack<S>(v[2 * i], v[2 * i + 1]);
      }
    }
    raw = {word[0], word[1], word[2], word[3]};
  }
};

/// The sum of part[s] over the kLanes lanes that share a channel, in lane s of them; each adds in
/// the same way.
template <int kLanes>
__device__ __forceinline__ float sum_of_own(const float (&part)[kLanes], int own) {
  constexpr unsigned kAll = 0xffffffffU;
  if constexpr (kLanes == 2) {
    return (own == 0 ? part[0] : part[1]) + __shfl_xor_sync(kAll, own == 0 ? part[1] : part[0], 1);
  } else {
    static_assert(kLanes == 4);
    const bool upper = own >= 2;
    const float even =
        (upper ? part[2] : part[0]) + __shfl_xor_sync(kAll, upper ? part[0] : part[2], 2);
    const float odd =
        (upper ? part[3] : part[1]) + __shfl_xor_sync(kAll, upper ? part[1] : part[3], 2);
    return (own % 2 == 0 ? even : odd) + __shfl_xor_sync(kAll, own % 2 == 0 ? odd : even, 1);
  }
}

template <typename T, typename S, bool kStochastic>
__global__ void __launch_bounds__(kThreads) state_update_kernel(UpdateInputs<T> p, S* ssm_state) {
  constexpr unsigned kAll = 0xffffffffU;
  constexpr int kHeld = Packed<S>::kSize;  // states of a thread
  constexpr int kLanes = kStates / kHeld;  // that share a channel
  constexpr int kSeqs = kLanes;            // of a block
  const auto at = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) / kLanes);
  const bool live = at < p.d_inner;  // dead threads stay for the shuffles, with channel 0
  const int e = live ? at : 0;
  const auto own = static_cast<int>(threadIdx.x % kLanes);
  const int n0 = own * kHeld;
  const int first = static_cast<int>(blockIdx.y) * kSeqs;

  // Which sequences there are, and parameters: no kernel writes them.
  int32_t slot[kSeqs];  // -1: no such sequence
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) slot[s] = first + s < p.n_seq ? p.slots[first + s] : -1;
  if (!p.early) after_previous();

  S* const states = ssm_state + (e * kStates + n0);
  uint4* home[kSeqs];
  Packed<S> h[kSeqs];
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    home[s] = reinterpret_cast<uint4*>(at_row(states, slot[s], p.state_pitch));
    // Of each state element one read and one write: L2 need not keep them.
    if (slot[s] >= 0) h[s].raw = __ldcs(home[s]);
  }
  float A[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; i += 4) {
    const float4 a = *reinterpret_cast<const float4*>(p.A + e * kStates + n0 + i);
    A[i] = a.x * kLog2e;
    A[i + 1] = a.y * kLog2e;
    A[i + 2] = a.z * kLog2e;
    A[i + 3] = a.w * kLog2e;
  }
  const float bias = p.dt_bias[e];
  const float D = p.D[e];
  if (p.early) after_previous();
  // What a channel needs once for a sequence, one of its lanes computes.
  const int own_seq = first + own;
  T x{}, dt{}, z{};
  if (own_seq < p.n_seq) {
    x = *at_row(p.x + e, own_seq, p.x_pitch);
    dt = *at_row(p.dt + e, own_seq, p.dt_pitch);
    z = *at_row(p.z + e, own_seq, p.z_pitch);
  }
  __shared__ float4 BC[kSeqs][2][kStates / 4];  // B and C, which all channels share
  static_assert(kSeqs * 2 * kStates <= kThreads);
  if (const unsigned i = threadIdx.x; i < kSeqs * 2 * kStates) {
    const int seq = first + static_cast<int>(i / (2 * kStates));
    const bool is_B = i / kStates % 2 == 0;
    if (seq < p.n_seq) {
      reinterpret_cast<float*>(BC)[i] =
          to_float(*at_row((is_B ? p.B : p.C) + i % kStates, seq, is_B ? p.B_pitch : p.C_pitch));
    }
  }
  __syncthreads();

  const float value = to_float(x);
  const float own_step = softplus(to_float(dt) + bias);
  const float own_dx = own_step * value;
  bool own_live = false;
  float part[kSeqs];
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    const float step = __shfl_sync(kAll, own_step, s, kLanes);
    const float dx = __shfl_sync(kAll, own_dx, s, kLanes);
    part[s] = 0.0F;
    if (slot[s] < 0) continue;  // the whole block
    own_live |= s == own;
    float state[kHeld];
    h[s].unpack(state);
#pragma unroll
    for (int q = 0; q < kHeld / 4; ++q) {
      const float4 of_B = BC[s][0][n0 / 4 + q];
      const float4 of_C = BC[s][1][n0 / 4 + q];
      const float B[4] = {of_B.x, of_B.y, of_B.z, of_B.w};
      const float C[4] = {of_C.x, of_C.y, of_C.z, of_C.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * q + j;
        state[i] = fmaf(exp2_fast(step * A[i]), state[i], dx * B[j]);
        part[s] = fmaf(C[j], state[i], part[s]);
      }
    }
    if constexpr (kStochastic) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        state[i] = stochastic<S>(state[i], static_cast<uint32_t>(e * kStates + n0 + i));
      }
    }
    h[s].pack_from(state);
    if (live) __stcs(home[s], h[s].raw);
  }
  const float sum = sum_of_own(part, own);
  if (live && own_live) {
    *at_row(p.y + e, own_seq, p.y_pitch) = from_float<T>(fmaf(D, value, sum) * silu(to_float(z)));
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    state_update_any_kernel(UpdateInputs<T> p, S* ssm_state) {
  constexpr int kLanes = 4;
  after_previous();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto seq = static_cast<int>(blockIdx.y);
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const bool live = at < p.d_inner;  // dead threads stay for the shuffles
  const int64_t e = live ? at : 0;

  const float x = to_float(*at_row(p.x + e, seq, p.x_pitch));
  const float dt = softplus(to_float(*at_row(p.dt + e, seq, p.dt_pitch)) + p.dt_bias[e]);
  const float dx = dt * x;
  const T* B = at_row(p.B, seq, p.B_pitch);
  const T* C = at_row(p.C, seq, p.C_pitch);
  const float* A = p.A + e * p.d_state;
  S* h = ssm_state + (static_cast<int64_t>(slot) * p.d_inner + e) * p.d_state;
  float sum = 0.0F;
  for (int n = lane; n < p.d_state; n += kLanes) {
    const float next = fmaf(exp2_fast(dt * (A[n] * kLog2e)), to_float(h[n]), dx * to_float(B[n]));
    sum = fmaf(to_float(C[n]), next, sum);
    const float kept =
        p.stochastic ? stochastic<S>(next, static_cast<uint32_t>(e * p.d_state + n)) : next;
    if (live) h[n] = from_float<S>(kept);
  }
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
  if (live && lane == 0) {
    const float z = to_float(*at_row(p.z + e, seq, p.z_pitch));
    *at_row(p.y + e, seq, p.y_pitch) = from_float<T>(fmaf(p.D[e], x, sum) * silu(z));
  }
}

}  // namespace

void selective_state_update(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                            const Batch& batch, bool early, cudaStream_t stream) {
  visit_type(in.x.dtype, "selective_scan x", [&](auto t) {
    using T = decltype(t);
    const auto pitch = [](const Tensor& t) {
      return static_cast<int>(t.row_stride * static_cast<int64_t>(itemsize(t.dtype)));
    };
    const UpdateInputs<T> p{in.x.as<T>(),
                            in.dt.as<T>(),
                            in.z.as<T>(),
                            in.B.as<T>(),
                            in.C.as<T>(),
                            in.A.as<float>(),
                            in.D.as<float>(),
                            in.dt_bias.as<float>(),
                            y.as<T>(),
                            batch.slot.as<int32_t>(),
                            static_cast<int>(in.x.dim(1)),
                            static_cast<int>(batch.n_seq),
                            static_cast<int>(in.A.dim(1)),
                            batch.state_rounding() == Rounding::stochastic,
                            early,
                            pitch(in.x),
                            pitch(in.dt),
                            pitch(in.z),
                            pitch(y),
                            pitch(in.B),
                            pitch(in.C),
                            pitch(ssm_state)};
    visit_type(ssm_state.dtype, "selective_scan state", [&](auto s) {
      using S = decltype(s);
      const auto run = [&](auto* kernel, int64_t lanes, int64_t seqs) {
        const dim3 grid(static_cast<unsigned>(ceil_div(p.d_inner * lanes, kThreads)),
                        static_cast<unsigned>(ceil_div(batch.n_seq, seqs)));
        launch("selective_state_update", kernel, grid, kThreads, 0, stream, p, ssm_state.as<S>());
      };
      constexpr int64_t kLanes = kStates / Packed<S>::kSize;
      if (p.d_state != kStates) return run(&state_update_any_kernel<T, S>, 4, 1);
      if (p.stochastic) return run(&state_update_kernel<T, S, true>, kLanes, kLanes);
      run(&state_update_kernel<T, S, false>, kLanes, kLanes);
    });
  });
}

}  // namespace krait::cuda
