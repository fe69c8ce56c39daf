// What the scan kernels of Mamba-2 share: their inputs, and dt.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/ops.h"

namespace krait::cuda {

template <typename T>
struct SsdPointers {
  const T *x, *dt, *B, *C;
  const float *A, *D, *dt_bias;
  T* y;
  const int32_t *seq_start, *slots;
  int64_t x_stride, dt_stride, B_stride, C_stride, y_stride;
  int n_head, head_dim, d_state, heads_per_group;
  float dt_min, dt_max;
  bool stochastic;  ///< the state is rounded so

  /// dt of token t (of the step) and head h, after bias, softplus and limits.
  __device__ __forceinline__ float step_size(int64_t t, int h) const {
    const float dt = softplus(to_float(dt_raw(t, h)) + dt_bias[h]);
    return fminf(fmaxf(dt, dt_min), dt_max);
  }
  __device__ __forceinline__ T dt_raw(int64_t t, int h) const { return dt[t * dt_stride + h]; }
};

template <typename T>
SsdPointers<T> ssd_pointers(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                            const Batch& batch) {
  const auto n_head = static_cast<int>(ssm_state.dim(1));
  return {in.x.as<T>(),
          in.dt.as<T>(),
          in.B.as<T>(),
          in.C.as<T>(),
          in.A.as<float>(),
          in.D.as<float>(),
          in.dt_bias.as<float>(),
          y.as<T>(),
          batch.seq_start.as<int32_t>(),
          batch.slot.as<int32_t>(),
          in.x.row_stride,
          in.dt.row_stride,
          in.B.row_stride,
          in.C.row_stride,
          y.row_stride,
          n_head,
          static_cast<int>(ssm_state.dim(2)),
          static_cast<int>(ssm_state.dim(3)),
          n_head / static_cast<int>(in.n_group),
          in.dt_min,
          in.dt_max,
          batch.state_rounding() == Rounding::stochastic};
}

}  // namespace krait::cuda
