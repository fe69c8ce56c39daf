// mamba2_gated_norm.cu - the norm between scan and out_proj of Mamba-2.
//
//   v = y * silu(z);   out = v * rsqrt(mean(v^2) + eps) * weight        mean over each group by
//   itself
//
// Shapes   y, out T [n, d], z T [n, d] view, weight f32 [d]; n_group groups of width d / n_group
// Launch   grid (n, n_group), one block per group of a row, as many threads as it has groups of 16
//          bytes, up to 1024. A thread keeps up to kVecs of them in registers, so that y and z are
//          read once. Groups that don't divide into aligned 16 bytes are walked twice.
// Types    arithmetic f32, rounded once on store
// Bytes    3 * n * d * sizeof(T) + 4 * d
// Roofline 1 special-function pair per element: bandwidth-bound; latency-bound for a few rows
// Same as  gated_rms_norm in kernels/cpu; tests/ops/ssd_test.cpp
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kMaxThreads = 1024;

template <typename T>
struct GateInputs {
  T* out;  // may be y
  const T *y, *z;
  const float* weight;
  int64_t out_stride, y_stride, z_stride;
  int width;
  float eps;
};

template <typename T, int kVecs>
__global__ void __launch_bounds__(kMaxThreads) gated_norm_kernel(GateInputs<T> p) {
  constexpr int kPer = Vec16<T>::kSize;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.width;
  const int64_t row = blockIdx.x;
  after_previous();
  Vec16<T> y[kVecs], z[kVecs];
#pragma unroll
  for (int q = 0; q < kVecs; ++q) {
    const int i = kPer * static_cast<int>(threadIdx.x + q * blockDim.x);
    if (i >= p.width) continue;
    y[q] = *reinterpret_cast<const Vec16<T>*>(p.y + row * p.y_stride + first + i);
    z[q] = *reinterpret_cast<const Vec16<T>*>(p.z + row * p.z_stride + first + i);
  }
  float v[kVecs][kPer];
  float sum = 0.0F;
#pragma unroll
  for (int q = 0; q < kVecs; ++q) {
    const bool inside = kPer * static_cast<int>(threadIdx.x + q * blockDim.x) < p.width;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      v[q][j] = inside ? to_float(y[q].v[j]) * silu(to_float(z[q].v[j])) : 0.0F;
      sum = fmaf(v[q][j], v[q][j], sum);
    }
  }
  const float scale = rsqrtf(block_sum(sum) / static_cast<float>(p.width) + p.eps);
#pragma unroll
  for (int q = 0; q < kVecs; ++q) {
    const int i = kPer * static_cast<int>(threadIdx.x + q * blockDim.x);
    if (i >= p.width) continue;
    Vec16<T> out;
#pragma unroll
    for (int j = 0; j < kPer; j += 4) {
      const float4 w = *reinterpret_cast<const float4*>(p.weight + first + i + j);
      out.v[j] = from_float<T>(v[q][j] * scale * w.x);
      out.v[j + 1] = from_float<T>(v[q][j + 1] * scale * w.y);
      out.v[j + 2] = from_float<T>(v[q][j + 2] * scale * w.z);
      out.v[j + 3] = from_float<T>(v[q][j + 3] * scale * w.w);
    }
    *reinterpret_cast<Vec16<T>*>(p.out + row * p.out_stride + first + i) = out;
  }
}

template <typename T>
__global__ void __launch_bounds__(256) gated_norm_any_kernel(GateInputs<T> p) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.width;
  const int64_t row = blockIdx.x;
  after_previous();
  const T* y = p.y + row * p.y_stride + first;
  const T* z = p.z + row * p.z_stride + first;
  const auto gated = [&](int i) { return to_float(y[i]) * silu(to_float(z[i])); };
  float sum = 0.0F;
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) sum = fmaf(gated(i), gated(i), sum);
  const float scale = rsqrtf(block_sum(sum) / static_cast<float>(p.width) + p.eps);
  // A thread writes what it alone reads, so out may be y.
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
    p.out[row * p.out_stride + first + i] = from_float<T>(gated(i) * scale * p.weight[first + i]);
  }
}

}  // namespace

void gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                    int64_t n_group, float eps, cudaStream_t stream) {
  const int64_t width = y.dim(1) / n_group;
  visit_type(y.dtype, "gated_rms_norm y", [&](auto t) {
    using T = decltype(t);
    const GateInputs<T> p{out.as<T>(),
                          y.as<T>(),
                          z.as<T>(),
                          weight.as<float>(),
                          out.row_stride,
                          y.row_stride,
                          z.row_stride,
                          static_cast<int>(width),
                          eps};
    const dim3 grid(static_cast<unsigned>(y.dim(0)), static_cast<unsigned>(n_group));
    const int64_t pieces = width / Vec16<T>::kSize;
    const bool vectors = width % Vec16<T>::kSize == 0 && pieces <= 4 * kMaxThreads &&
                         aligned16(y) && aligned16(z) && aligned16(out) && aligned16(weight);
    if (!vectors) {
      launch("gated_rms_norm", gated_norm_any_kernel<T>, grid, 256, 0, stream, p);
      return;
    }
    const auto run = [&](auto* kernel, int64_t per_thread) {
      const auto threads = static_cast<unsigned>(ceil_div(ceil_div(pieces, per_thread), 32) * 32);
      launch("gated_rms_norm", kernel, grid, threads, 0, stream, p);
    };
    if (pieces <= kMaxThreads) return run(&gated_norm_kernel<T, 1>, 1);
    if (pieces <= 2 * kMaxThreads) return run(&gated_norm_kernel<T, 2>, 2);
    run(&gated_norm_kernel<T, 4>, 4);
  });
}

}  // namespace krait::cuda
