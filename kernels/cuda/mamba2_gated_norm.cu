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
// Measured H100, bf16, 2048 rows of 5120: 17.9 to 19.9 us in a prefill, where HBM, which z and the
//          result pass, binds; 15.2 in tools/bench_ops. A loop of rows in each block with the next
//          one on its way was no faster: 21.3 and 17.9.
// Same as  gated_rms_norm in kernels/cpu; tests/ops/ssd_test.cpp
#include "kernels/cuda/mamba2_gated_norm.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

template <typename T, int kVecs>
__global__ void __launch_bounds__(kMaxNormThreads) gated_norm_kernel(GateInputs<T> p) {
  gated_norm<T, kVecs>(p);
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
  visit_type(y.dtype, "gated_rms_norm y", [&](auto t) {
    using T = decltype(t);
    const GateInputs<T> p = gate_inputs<T>(out, y, z, weight, n_group, eps);
    const dim3 grid(static_cast<unsigned>(y.dim(0)), static_cast<unsigned>(n_group));
    const auto run = [&](auto* kernel, int64_t per_thread) {
      const int64_t threads = gated_norm_threads(p, per_thread);
      if (threads == 0) return false;
      launch("gated_rms_norm", kernel, grid, static_cast<unsigned>(threads), 0, stream, p);
      return true;
    };
    if (run(&gated_norm_kernel<T, 1>, 1) || run(&gated_norm_kernel<T, 2>, 2) ||
        run(&gated_norm_kernel<T, 4>, 4)) {
      return;
    }
    launch("gated_rms_norm", gated_norm_any_kernel<T>, grid, 256, 0, stream, p);
  });
}

}  // namespace krait::cuda
