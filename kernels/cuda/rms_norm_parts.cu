// rms_norm_parts.cu - x *= rsqrt(mean(x^2) + eps), for each of three parts of a row by itself: dt,
// B and C of Falcon-Mamba.
//
// Shapes   x T [n, d] view, in place; parts of `widths` from the first column on
// Launch   one warp per part and row, 8 warps a block: a part is 256 values at most in the
//          published models, read once into registers and again from L1 where it is longer
// Types    arithmetic f32, rounded once on store
// Bytes    2 * n * sum(widths) * sizeof(T): 1 KB a row, so latency decides
// Same as  kernels/cpu; tests/ops/rows_test.cpp
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kKept = 8;  // values of a thread that stay in registers

template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    rms_norm_parts_kernel(T* x, int64_t n, int64_t stride, int w0, int w1, int w2, float eps) {
  after_previous();
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t row = unit / 3;
  if (row >= n) return;  // whole warps
  const int part = static_cast<int>(unit % 3);
  const int width = part == 0 ? w0 : part == 1 ? w1 : w2;
  T* v = x + row * stride + (part == 0 ? 0 : part == 1 ? w0 : w0 + w1);

  float kept[kKept];
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    kept[i] = i * 32 + lane < width ? to_float(v[i * 32 + lane]) : 0.0F;
    sum = fmaf(kept[i], kept[i], sum);
  }
  for (int i = kKept * 32 + lane; i < width; i += 32) sum += to_float(v[i]) * to_float(v[i]);
  const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(width) + eps);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i * 32 + lane < width) v[i * 32 + lane] = from_float<T>(kept[i] * scale);
  }
  for (int i = kKept * 32 + lane; i < width; i += 32) v[i] = from_float<T>(to_float(v[i]) * scale);
}

}  // namespace

void rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps,
                    cudaStream_t stream) {
  visit_type(x.dtype, "rms_norm_parts x", [&](auto t) {
    using T = decltype(t);
    const auto blocks = static_cast<unsigned>(ceil_div(3 * x.dim(0), kWarps));
    launch("rms_norm_parts", rms_norm_parts_kernel<T>, blocks, 32 * kWarps, 0, stream, x.as<T>(),
           x.dim(0), x.row_stride, static_cast<int>(widths[0]), static_cast<int>(widths[1]),
           static_cast<int>(widths[2]), eps);
  });
}

}  // namespace krait::cuda
