// rms_norm.cu - out = x * rsqrt(mean(x^2) + eps) * weight, per row.
//
// Shapes   x f32 [n, d], weight f32 [d], out T [n, d]
// Launch   few rows: one block per row, as many threads as the row has groups of 4 elements, up to
//          1024: in a decode step latency decides. Many: 64 to 256 threads a row, several rows a
//          block. A thread keeps up to kQuads groups in registers, so that the row is read once.
//          Rows that don't divide into aligned groups are walked twice.
// Bytes    n * d * (4 + sizeof(T)) + 4 * d
// Measured H100 80GB HBM3, bf16, 2,048 rows, us at d 768, 1024, 2560: 2.4, 2.9, 5.4; a block a row
//          took 3.0, 3.2, 8.2, a warp a row 2.6, 3.1, 7.5
// Same as  kernels/cpu; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kMaxThreads = 1024;
/// From so many rows on a block has several.
constexpr int64_t kManyRows = 512;
constexpr int64_t kManyThreads = 256;

template <typename T, int kQuads>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(T* out, const float* x, const float* weight, float eps, int d, int64_t n,
                    int64_t out_stride, int64_t x_stride) {
  // The weights don't depend on the kernel before this one: they are on their way while it ends.
  float4 w[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int i = 4 * static_cast<int>(threadIdx.x + q * blockDim.x);
    w[q] = i < d ? *reinterpret_cast<const float4*>(weight + i) : float4{};
  }
  after_previous();

  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < n;
  float4 v[kQuads];
  float sum = 0.0F;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int i = 4 * static_cast<int>(threadIdx.x + q * blockDim.x);
    v[q] = live && i < d ? *reinterpret_cast<const float4*>(x + row * x_stride + i) : float4{};
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    sum += v[q].x * v[q].x + v[q].y * v[q].y + v[q].z * v[q].z + v[q].w * v[q].w;
  }
  // The warps of a row add up their sums.
  __shared__ float shares[kMaxThreads / 32];
  const auto warps = static_cast<int>(blockDim.x / 32);
  const int first = static_cast<int>(threadIdx.y) * warps;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  sum = warp_sum(sum);
  if (lane == 0) shares[first + static_cast<int>(threadIdx.x / 32)] = sum;
  __syncthreads();
  sum = warp_sum(lane < warps ? shares[first + lane] : 0.0F);
  const float scale = rsqrtf(sum / static_cast<float>(d) + eps);
  if (!live) return;
  T* y = out + row * out_stride;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int i = 4 * static_cast<int>(threadIdx.x + q * blockDim.x);
    if (i >= d) break;
    *reinterpret_cast<Quad<T>*>(y + i) = {
        from_float<T>(v[q].x * scale * w[q].x), from_float<T>(v[q].y * scale * w[q].y),
        from_float<T>(v[q].z * scale * w[q].z), from_float<T>(v[q].w * scale * w[q].w)};
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_any_kernel(T* out, const float* x, const float* weight, float eps, int64_t d,
                        int64_t out_stride, int64_t x_stride) {
  after_previous();
  const float* row = x + blockIdx.x * x_stride;
  float sum = 0.0F;
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) sum = fmaf(row[i], row[i], sum);
  const float scale = rsqrtf(block_sum(sum) / static_cast<float>(d) + eps);
  T* y = out + blockIdx.x * out_stride;
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
    y[i] = from_float<T>(row[i] * scale * weight[i]);
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps,
              cudaStream_t stream) {
  const int64_t d = x.dim(1);
  const auto rows = static_cast<unsigned>(x.dim(0));
  const bool quads = d % 4 == 0 && d <= 4 * 4 * kMaxThreads && aligned16(x) && aligned16(weight) &&
                     reinterpret_cast<uintptr_t>(out.data) % 16 == 0 && out.row_stride % 4 == 0;
  visit_type(out.dtype, "rms_norm out", [&](auto t) {
    using T = decltype(t);
    if (!quads) {
      launch("rms_norm", rms_norm_any_kernel<T>, rows, 256, 0, stream, out.as<T>(), x.as<float>(),
             weight.as<float>(), eps, d, out.row_stride, x.row_stride);
      return;
    }
    const int64_t groups = d / 4;
    const auto launch_rows = [&](auto* kernel, int64_t threads, int64_t rows_per_block) {
      const dim3 block(static_cast<unsigned>(threads), static_cast<unsigned>(rows_per_block));
      launch("rms_norm", kernel, static_cast<unsigned>(ceil_div(x.dim(0), rows_per_block)), block,
             0, stream, out.as<T>(), x.as<float>(), weight.as<float>(), eps, static_cast<int>(d),
             x.dim(0), out.row_stride, x.row_stride);
    };
    if (x.dim(0) >= kManyRows && groups <= 5 * kManyThreads) {
      int64_t threads = 64;
      while (groups > 5 * threads) threads *= 2;
      const int64_t together = kManyThreads / threads;
      if (groups <= 3 * threads) return launch_rows(&rms_norm_kernel<T, 3>, threads, together);
      if (groups <= 4 * threads) return launch_rows(&rms_norm_kernel<T, 4>, threads, together);
      return launch_rows(&rms_norm_kernel<T, 5>, threads, together);
    }
    const auto run = [&](auto* kernel, int64_t per_thread) {
      launch_rows(kernel, ceil_div(ceil_div(groups, per_thread), 32) * 32, 1);
    };
    if (groups <= kMaxThreads) return run(&rms_norm_kernel<T, 1>, 1);
    if (groups <= 2 * kMaxThreads) return run(&rms_norm_kernel<T, 2>, 2);
    run(&rms_norm_kernel<T, 4>, 4);
  });
}

}  // namespace krait::cuda
