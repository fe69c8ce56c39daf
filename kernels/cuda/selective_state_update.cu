// selective_state_update.cu - one decode step of the Mamba-1 recurrence for n_seq sequences.
//
//   dt  = softplus(dt_raw + dt_bias)                    softplus(v) = v for v > 20
//   h'  = exp(dt * A) * h + dt * B * x                  per channel e, state n
//   y   = (sum_n C[n] * h'[n] + D * x) * silu(z)
//
// Shapes   x, dt_raw, z, y T [n_seq, d_inner]; B, C T [n_seq, d_state] views; A f32 [d_inner,
// d_state];
//          h S [slot, d_inner, d_state]
// Launch   grid (channels, n_seq), 256 threads; kLanes neighbouring threads share a channel, each
// with 4
//          states in a row (16 bytes in f32), so that a warp reads and writes the state
//          contiguously. For d_state other than 16 the threads of a channel stride over its states.
// Bytes    n_seq * d_inner * (2 * d_state * sizeof(S) + 4 * sizeof(T)) + 4 * d_inner * d_state
// Roofline under 1 FLOP per byte: bandwidth-bound; below ~10 MB the launch dominates
// Same as  selective_scan in kernels/cpu with one token; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;

template <typename T>
struct UpdateInputs {
  const T *x, *dt, *z, *B, *C;  // y may be x or dt
  const float *A, *D, *dt_bias;
  T* y;
  const int32_t* slots;
  int64_t d_inner;
  int d_state;
  int64_t x_stride, dt_stride, z_stride, y_stride, B_stride, C_stride;
};

template <typename T, typename S, bool kSixteen>
__global__ void __launch_bounds__(kThreads) state_update_kernel(UpdateInputs<T> p, S* ssm_state) {
  after_previous();
  const int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t seq = blockIdx.y;
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const bool live = e < p.d_inner;  // dead threads stay for the shuffles
  const int64_t ec = live ? e : 0;

  const float x = to_float(p.x[seq * p.x_stride + ec]);
  const float dt = softplus(to_float(p.dt[seq * p.dt_stride + ec]) + p.dt_bias[ec]);
  const float dx = dt * x;
  const T* B = p.B + seq * p.B_stride;
  const T* C = p.C + seq * p.C_stride;
  const float* A = p.A + ec * p.d_state;
  S* h = ssm_state + (slot * p.d_inner + ec) * p.d_state;

  float sum = 0.0F;
  if constexpr (kSixteen) {
    const int n0 = lane * 4;
    const float4 a = *reinterpret_cast<const float4*>(A + n0);
    auto quad = *reinterpret_cast<const Quad<S>*>(h + n0);
    const float decay[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float next =
          fmaf(exp2_fast(dt * (decay[i] * kLog2e)), to_float(quad.v[i]), dx * to_float(B[n0 + i]));
      sum = fmaf(to_float(C[n0 + i]), next, sum);
      quad.v[i] = from_float<S>(next);
    }
    if (live) *reinterpret_cast<Quad<S>*>(h + n0) = quad;
  } else {
    for (int n = lane; n < p.d_state; n += kLanes) {
      const float next = fmaf(exp2_fast(dt * (A[n] * kLog2e)), to_float(h[n]), dx * to_float(B[n]));
      sum = fmaf(to_float(C[n]), next, sum);
      if (live) h[n] = from_float<S>(next);
    }
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
    const UpdateInputs<T> p{in.x.as<T>(),     in.dt.as<T>(),
                            in.z.as<T>(),     in.B.as<T>(),
                            in.C.as<T>(),     in.A.as<float>(),
                            in.D.as<float>(), in.dt_bias.as<float>(),
                            y.as<T>(),        batch.slot.as<int32_t>(),
                            in.x.dim(1),      static_cast<int>(in.A.dim(1)),
                            in.x.row_stride,  in.dt.row_stride,
                            in.z.row_stride,  y.row_stride,
                            in.B.row_stride,  in.C.row_stride};
    visit_type(ssm_state.dtype, "selective_scan state", [&](auto s) {
      using S = decltype(s);
      const dim3 grid(static_cast<unsigned>(ceil_div(p.d_inner * kLanes, kThreads)),
                      static_cast<unsigned>(batch.n_seq));
      auto* kernel =
          p.d_state == 16 ? &state_update_kernel<T, S, true> : &state_update_kernel<T, S, false>;
      launch("selective_state_update", kernel, grid, kThreads, 0, stream, p, ssm_state.as<S>());
    });
  });
}

}  // namespace krait::cuda
