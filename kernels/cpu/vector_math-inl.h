// Functions of vectors that the fast verbs share; included once for each vector target.
#if defined(KRAIT_CPU_VECTOR_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_CPU_VECTOR_MATH_INL_H_
#undef KRAIT_CPU_VECTOR_MATH_INL_H_
#else
#define KRAIT_CPU_VECTOR_MATH_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "base/dtype.h"

// Before a loop over an array of vectors: the array lies in registers only if the loop is unrolled,
// which GCC does by itself at -O3 alone.
#if defined(__GNUC__) && !defined(__clang__)
#define KRAIT_UNROLL _Pragma("GCC unroll 8")
#else
#define KRAIT_UNROLL
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using V32 = hn::Vec<F32>;

HWY_INLINE int64_t lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }

// ---- loads that widen to f32

HWY_INLINE V32 load(const float* p) { return hn::LoadU(F32(), p); }

HWY_INLINE V32 load(const bf16_t* p) {
  const hn::Rebind<uint16_t, F32> d16;
  const hn::RebindToUnsigned<F32> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(F32(), hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

HWY_INLINE V32 load(const f16_t* p) {
  const hn::Rebind<hwy::float16_t, F32> d16;
  return hn::PromoteTo(F32(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
}

/// The first n lanes, zeros after them; reads nothing beyond.
template <typename T>
HWY_INLINE V32 load_n(const T* p, int64_t n) {
  if (n >= lanes()) return load(p);
  HWY_ALIGN float part[HWY_MAX_BYTES / sizeof(float)] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = static_cast<float>(p[i]);
  return hn::Load(F32(), part);
}

/// Stores the first n lanes; writes nothing beyond.
HWY_INLINE void store_n(V32 v, float* p, int64_t n) {
  if (n >= lanes()) return hn::StoreU(v, F32(), p);
  HWY_ALIGN float part[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, F32(), part);
  std::copy_n(part, n, p);
}

// ---- elementary functions; a NaN stays a NaN

/// 2^v for v <= 0, within 2 ulp; results below 2^-126 come out as 2^-126.
HWY_INLINE V32 exp2_of_nonpositive(V32 v) {
  const F32 d;
  const hn::RebindToSigned<F32> di;
  v = hn::Max(hn::Set(d, -126.0F), v);
  // Next to 1.5 * 2^23 floats are integers: the addition rounds v and leaves the integer in the low
  // bits, from where a shift puts it into the exponent (the bits above fall out).
  const auto magic = hn::Set(d, 12582912.0F);
  const auto shifted = hn::Add(v, magic);
  const auto f = hn::Sub(v, hn::Sub(shifted, magic));
  // 2^f = 1 + f * p(f) on [-1/2, 1/2]: p interpolates (2^f - 1) / f at the Chebyshev nodes, with a
  // relative error of 2^f under 2e-8.
  auto p = hn::Set(d, 0.000154531634F);
  p = hn::MulAdd(p, f, hn::Set(d, 0.00133908633F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.00961808302F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.0555035695F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.240226507F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.693147182F));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0F));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
}

/// v / (1 + exp(-v)), within 3 ulp.
HWY_INLINE V32 silu(V32 v) {
  const F32 d;
  // Above 88 exp would overflow; silu(-88) is -5e-37 already.
  const auto e = hn::Exp(d, hn::Min(hn::Set(d, 88.0F), hn::Neg(v)));
  return hn::Div(v, hn::Add(hn::Set(d, 1.0F), e));
}

/// v > 20 ? v : log(1 + exp(v)), within 4 ulp.
HWY_INLINE V32 softplus(V32 v) {
  const F32 d;
  const auto e = hn::Exp(d, hn::Min(hn::Set(d, 20.0F), v));
  const auto keep = hn::Or(hn::Gt(v, hn::Set(d, 20.0F)), hn::IsNaN(v));
  return hn::IfThenElse(keep, v, hn::Log1p(d, e));
}

}  // namespace krait::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard of this target
