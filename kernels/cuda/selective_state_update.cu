// selective_state_update.cu - one decode step of the Mamba-1 recurrence for n_seq sequences.
//
//   dt  = softplus(dt_raw + dt_bias)                    softplus(v) = v for v > 20
//   h'  = exp(dt * A) * h + dt * B * x                  per channel e, state n
//   y   = (sum_n C[n] * h'[n] + D * x) * silu(z)
//
// Shapes   x, dt_raw, z, y T [n_seq, d_inner]; B, C T [n_seq, d_state] views; A f32 [d_inner,
// d_state];
//          h S [slot, d_inner, d_state]
// Launch   d_state 16: grid (channels, groups of kSeqs sequences), 128 threads; a thread holds 16
//          bytes of a channel's state and does that for each sequence of its group, so that A is
//          read once for all of them and kSeqs loads are in flight. Other d_state: one sequence a
//          block, 4 threads a channel that stride over its states
// Bytes    n_seq * d_inner * (2 * d_state * sizeof(S) + 4 * sizeof(T)) + 4 * d_inner * d_state
// Roofline under 1 FLOP per byte: bandwidth-bound; below ~10 MB the launch dominates
// Measured H100 80GB HBM3, d_inner 5120, GB/s at batch 64, 256 and 1024 (tools/bench_ops): f32
//          state 2,530, 2,900 and 2,770; bf16 state 1,820, 2,190 and 2,240
// Same as  selective_scan in kernels/cpu with one token; tests/ops
#include "kernels/cuda/device.cuh"
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
  int64_t d_inner;
  int64_t n_seq;
  int d_state;
  int64_t x_stride, dt_stride, z_stride, y_stride, B_stride, C_stride;
};

/// Of each state element one read and one write: L2 need not keep them.
template <typename S>
__device__ __forceinline__ Vec16<S> load_once(const S* p) {
  union {
    uint4 raw;
    Vec16<S> vec;
  } u;
  u.raw = __ldcs(reinterpret_cast<const uint4*>(p));
  return u.vec;
}
template <typename S>
__device__ __forceinline__ void store_once(S* p, const Vec16<S>& v) {
  union {
    uint4 raw;
    Vec16<S> vec;
  } u;
  u.vec = v;
  __stcs(reinterpret_cast<uint4*>(p), u.raw);
}

template <typename T, typename S, int kSeqs>
__global__ void __launch_bounds__(kThreads) state_update_kernel(UpdateInputs<T> p, S* ssm_state) {
  constexpr int kHeld = Vec16<S>::kSize;  // states of a thread
  constexpr int kLanes = kStates / kHeld;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const bool live = at < p.d_inner;  // dead threads stay for the shuffles
  const int64_t e = live ? at : 0;
  const int n0 = static_cast<int>(threadIdx.x) % kLanes * kHeld;

  // Parameters: they don't depend on the kernel before this one.
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
  after_previous();

  __shared__ float4 BC[kSeqs][2][kStates / 4];  // B and C, which all channels share
  for (int i = static_cast<int>(threadIdx.x); i < kSeqs * 2 * kStates; i += kThreads) {
    const int64_t seq = static_cast<int64_t>(blockIdx.y) * kSeqs + i / (2 * kStates);
    const int n = i % kStates;
    const bool is_B = i / kStates % 2 == 0;
    if (seq < p.n_seq) {
      reinterpret_cast<float*>(BC)[i] =
          to_float(is_B ? p.B[seq * p.B_stride + n] : p.C[seq * p.C_stride + n]);
    }
  }

  Vec16<S> h[kSeqs];
  T x[kSeqs], dt[kSeqs], z[kSeqs];
  S* at_state[kSeqs];  // null: no such sequence
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    const int64_t seq = static_cast<int64_t>(blockIdx.y) * kSeqs + s;
    const int32_t slot = seq < p.n_seq ? p.slots[seq] : -1;
    at_state[s] = slot < 0
                      ? nullptr
                      : ssm_state + (slot * p.d_inner + e) * static_cast<int64_t>(kStates) + n0;
    if (slot < 0) continue;
    h[s] = load_once(at_state[s]);
    x[s] = p.x[seq * p.x_stride + e];
    dt[s] = p.dt[seq * p.dt_stride + e];
    z[s] = p.z[seq * p.z_stride + e];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    if (at_state[s] == nullptr) continue;  // the whole block
    const int64_t seq = static_cast<int64_t>(blockIdx.y) * kSeqs + s;
    const float step = softplus(to_float(dt[s]) + bias);
    const float value = to_float(x[s]);
    const float dx = step * value;
    float sum = 0.0F;
#pragma unroll
    for (int q = 0; q < kHeld / 4; ++q) {
      const float4 of_B = BC[s][0][n0 / 4 + q];
      const float4 of_C = BC[s][1][n0 / 4 + q];
      const float B[4] = {of_B.x, of_B.y, of_B.z, of_B.w};
      const float C[4] = {of_C.x, of_C.y, of_C.z, of_C.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * q + j;
        const float next = fmaf(exp2_fast(step * A[i]), to_float(h[s].v[i]), dx * B[j]);
        sum = fmaf(C[j], next, sum);
        h[s].v[i] = from_float<S>(next);
      }
    }
    if (live) store_once(at_state[s], h[s]);
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
    if (live && n0 == 0) {
      p.y[seq * p.y_stride + e] = from_float<T>(fmaf(D, value, sum) * silu(to_float(z[s])));
    }
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    state_update_any_kernel(UpdateInputs<T> p, S* ssm_state) {
  constexpr int kLanes = 4;
  after_previous();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t seq = blockIdx.y;
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const bool live = at < p.d_inner;  // dead threads stay for the shuffles
  const int64_t e = live ? at : 0;

  const float x = to_float(p.x[seq * p.x_stride + e]);
  const float dt = softplus(to_float(p.dt[seq * p.dt_stride + e]) + p.dt_bias[e]);
  const float dx = dt * x;
  const T* B = p.B + seq * p.B_stride;
  const T* C = p.C + seq * p.C_stride;
  const float* A = p.A + e * p.d_state;
  S* h = ssm_state + (slot * p.d_inner + e) * p.d_state;
  float sum = 0.0F;
  for (int n = lane; n < p.d_state; n += kLanes) {
    const float next = fmaf(exp2_fast(dt * (A[n] * kLog2e)), to_float(h[n]), dx * to_float(B[n]));
    sum = fmaf(to_float(C[n]), next, sum);
    if (live) h[n] = from_float<S>(next);
  }
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
  if (live && lane == 0) {
    const float z = to_float(p.z[seq * p.z_stride + e]);
    p.y[seq * p.y_stride + e] = from_float<T>(fmaf(p.D[e], x, sum) * silu(z));
  }
}

}  // namespace

void selective_state_update(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                            const Batch& batch, cudaStream_t stream) {
  visit_type(in.x.dtype, "selective_scan x", [&](auto t) {
    using T = decltype(t);
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
                            in.x.dim(1),
                            batch.n_seq,
                            static_cast<int>(in.A.dim(1)),
                            in.x.row_stride,
                            in.dt.row_stride,
                            in.z.row_stride,
                            y.row_stride,
                            in.B.row_stride,
                            in.C.row_stride};
    visit_type(ssm_state.dtype, "selective_scan state", [&](auto s) {
      using S = decltype(s);
      const auto run = [&](auto* kernel, int64_t lanes, int64_t seqs) {
        const dim3 grid(static_cast<unsigned>(ceil_div(p.d_inner * lanes, kThreads)),
                        static_cast<unsigned>(ceil_div(batch.n_seq, seqs)));
        launch("selective_state_update", kernel, grid, kThreads, 0, stream, p, ssm_state.as<S>());
      };
      if (p.d_state != kStates) return run(&state_update_any_kernel<T, S>, 4, 1);
      constexpr int64_t kLanes = kStates / Vec16<S>::kSize;
      // More than one sequence a thread where there are enough blocks without it.
      if (batch.n_seq >= 16) return run(&state_update_kernel<T, S, 4>, kLanes, 4);
      run(&state_update_kernel<T, S, 1>, kLanes, 1);
    });
  });
}

}  // namespace krait::cuda
