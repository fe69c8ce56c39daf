// rms_norm.cpp - out = x * rsqrt(mean(x^2) + eps) * weight, per row; and the same without weights
// for parts of a row.
//
// Bytes   n * d * 12: two passes over a row, the second from the cache
// Same as PlainOps::rms_norm and rms_norm_parts (plain.cpp); tests/ops/rows_test.cpp
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rms_norm.cpp"
#include "kernels/cpu/targets.h"
// targets.h chooses what foreach_target compiles, so it comes first.
#include <hwy/foreach_target.h>

#include <cmath>

#include "kernels/cpu/fast.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::cpu::HWY_NAMESPACE {
namespace {

/// rsqrt(mean(x^2) + eps) of d values.
HWY_INLINE float inverse_rms(const float* x, int64_t d, float eps) {
  const F32 f32;
  const int64_t n = lanes();
  // Four sums, so that an addition need not wait for the one before it.
  V32 sum[4];
  for (V32& s : sum) s = hn::Zero(f32);
  int64_t i = 0;
  for (; i + 4 * n <= d; i += 4 * n) {
    KRAIT_UNROLL for (int64_t j = 0; j < 4; ++j) {
      const V32 v = load(x + i + j * n);
      sum[j] = hn::MulAdd(v, v, sum[j]);
    }
  }
  for (; i < d; i += n) {
    const V32 v = load_n(x + i, d - i);
    sum[0] = hn::MulAdd(v, v, sum[0]);
  }
  const V32 total = hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]));
  const float mean = hn::GetLane(hn::SumOfLanes(f32, total)) / static_cast<float>(d);
  return 1.0F / std::sqrt(mean + eps);
}

void normalise(float* HWY_RESTRICT out, const float* x, const float* weight, int64_t d, float eps) {
  const V32 scale = hn::Set(F32(), inverse_rms(x, d, eps));
  for (int64_t i = 0; i < d; i += lanes()) {
    const V32 v = hn::Mul(load_n(x + i, d - i), scale);
    store_n(hn::Mul(v, load_n(weight + i, d - i)), out + i, d - i);
  }
}

void rms_norm_kernel(ThreadPool& pool, const Tensor& out, const Tensor& x, const Tensor& weight,
                     float eps) {
  const int64_t d = x.dim(1);
  const int64_t rows_per_range = 1 + (1 << 14) / std::max<int64_t>(d, 1);
  pool.parallel_for(x.dim(0), rows_per_range, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      normalise(out.as<float>() + t * d, x.as<float>() + t * d, weight.as<float>(), d, eps);
    }
  });
}

void rms_norm_parts_kernel(ThreadPool& pool, const Tensor& x, const std::array<int64_t, 3>& widths,
                           float eps) {
  const int64_t rows_per_range = 1 + (1 << 14) / std::max<int64_t>(x.dim(1), 1);
  pool.parallel_for(x.dim(0), rows_per_range, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* part = x.as<float>() + t * x.row_stride;
      for (const int64_t width : widths) {
        const V32 scale = hn::Set(F32(), inverse_rms(part, width, eps));
        for (int64_t i = 0; i < width; i += lanes()) {
          store_n(hn::Mul(load_n(part + i, width - i), scale), part + i, width - i);
        }
        part += width;
      }
    }
  });
}

const char* target_kernel() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace krait::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::cpu {

HWY_EXPORT(rms_norm_kernel);
HWY_EXPORT(rms_norm_parts_kernel);
HWY_EXPORT(target_kernel);

void rms_norm(ThreadPool& pool, const Tensor& out, const Tensor& x, const Tensor& weight,
              float eps) {
  HWY_DYNAMIC_DISPATCH(rms_norm_kernel)(pool, out, x, weight, eps);
}

void rms_norm_parts(ThreadPool& pool, const Tensor& x, const std::array<int64_t, 3>& widths,
                    float eps) {
  HWY_DYNAMIC_DISPATCH(rms_norm_parts_kernel)(pool, x, widths, eps);
}

std::string vector_target() {
  const std::string name = HWY_DYNAMIC_DISPATCH(target_kernel)();
  return name == "AVX3" ? "AVX-512" : name;  // Highway's name for it
}

}  // namespace krait::cpu
#endif
