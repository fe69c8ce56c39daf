// gated_rms_norm.cpp - v = y * silu(z); out = v * rsqrt(mean(v^2) + eps) * weight, the mean over
// each group of a row by itself.
//
// Bytes   n * d * 16: v waits in out between the two passes, which may be y
// Same as PlainOps::gated_rms_norm (plain.cpp); tests/ops/ssd_test.cpp
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gated_rms_norm.cpp"
#include "kernels/cpu/targets.h"
// targets.h chooses what foreach_target compiles, so it comes first.
#include <hwy/foreach_target.h>

#include <cmath>

#include "kernels/cpu/fast.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::cpu::HWY_NAMESPACE {
namespace {

/// One group of one row.
void normalise_gated(float* out, const float* y, const float* z, const float* weight, int64_t width,
                     float eps) {
  const F32 d;
  const int64_t n = lanes();
  V32 sum = hn::Zero(d);
  for (int64_t i = 0; i < width; i += n) {
    const V32 v = hn::Mul(load_n(y + i, width - i), silu(load_n(z + i, width - i)));
    sum = hn::MulAdd(v, v, sum);
    store_n(v, out + i, width - i);
  }
  const float mean = hn::GetLane(hn::SumOfLanes(d, sum)) / static_cast<float>(width);
  const V32 scale = hn::Set(d, 1.0F / std::sqrt(mean + eps));
  for (int64_t i = 0; i < width; i += n) {
    const V32 v = hn::Mul(load_n(out + i, width - i), scale);
    store_n(hn::Mul(v, load_n(weight + i, width - i)), out + i, width - i);
  }
}

void gated_rms_norm_kernel(ThreadPool& pool, const Tensor& out, const Tensor& y, const Tensor& z,
                           const Tensor& weight, int64_t n_group, float eps) {
  const int64_t d = y.dim(1);
  const int64_t width = d / n_group;
  const int64_t rows_per_range = 1 + (1 << 13) / std::max<int64_t>(d, 1);
  pool.parallel_for(y.dim(0), rows_per_range, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t at = 0; at < d; at += width) {
        normalise_gated(out.as<float>() + t * d + at, y.as<float>() + t * d + at,
                        z.as<float>() + t * z.row_stride + at, weight.as<float>() + at, width, eps);
      }
    }
  });
}

}  // namespace
}  // namespace krait::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::cpu {

HWY_EXPORT(gated_rms_norm_kernel);

void gated_rms_norm(ThreadPool& pool, const Tensor& out, const Tensor& y, const Tensor& z,
                    const Tensor& weight, int64_t n_group, float eps) {
  HWY_DYNAMIC_DISPATCH(gated_rms_norm_kernel)(pool, out, y, z, weight, n_group, eps);
}

}  // namespace krait::cpu
#endif
