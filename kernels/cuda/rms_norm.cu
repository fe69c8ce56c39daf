// rms_norm.cu - out = x * rsqrt(mean(x^2) + eps) * weight, per row.
//
// Shapes   x f32 [n, d], weight f32 [d], out T [n, d]
// Launch   one block of 256 threads per row; the second pass finds the row in L1
// Bytes    n * d * (4 + sizeof(T)) + 4 * d
// Same as  kernels/cpu; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(T* out, const float* x, const float* weight, float eps, int64_t d,
                    int64_t out_stride, int64_t x_stride) {
  after_previous();
  const float* row = x + blockIdx.x * x_stride;
  float sum = 0.0F;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) sum = fmaf(row[i], row[i], sum);

  __shared__ float partial[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0F;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) total += partial[w];

  const float scale = rsqrtf(total / static_cast<float>(d) + eps);
  T* y = out + blockIdx.x * out_stride;
  for (int64_t i = threadIdx.x; i < d; i += kThreads)
    y[i] = from_float<T>(row[i] * scale * weight[i]);
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps,
              cudaStream_t stream) {
  visit_type(out.dtype, "rms_norm out", [&](auto t) {
    using T = decltype(t);
    launch("rms_norm", rms_norm_kernel<T>, static_cast<unsigned>(x.dim(0)), kThreads, 0, stream,
           out.as<T>(), x.as<float>(), weight.as<float>(), eps, x.dim(1), out.row_stride,
           x.row_stride);
  });
}

}  // namespace krait::cuda
