// Element types of tensors, and the 16-bit floats as storage types with conversions to and from
// float.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace krait {

enum class DType : uint8_t { f32, f16, bf16, f64, i8, u8, i16, u16, i32, u32, i64, u64, boolean };

[[nodiscard]] constexpr size_t itemsize(DType t) noexcept {
  switch (t) {
    case DType::i8:
    case DType::u8:
    case DType::boolean:
      return 1;
    case DType::f16:
    case DType::bf16:
    case DType::i16:
    case DType::u16:
      return 2;
    case DType::f32:
    case DType::i32:
    case DType::u32:
      return 4;
    case DType::f64:
    case DType::i64:
    case DType::u64:
      return 8;
  }
  return 0;
}

/// Short name as printed and as taken by --dtype: "f32", "bf16", "i64", "bool", ...
[[nodiscard]] constexpr std::string_view dtype_name(DType t) noexcept {
  constexpr std::string_view kNames[] = {"f32", "f16", "bf16", "f64", "i8",  "u8",  "i16",
                                         "u16", "i32", "u32",  "i64", "u64", "bool"};
  return kNames[static_cast<size_t>(t)];
}

[[nodiscard]] constexpr bool is_float16_or_32(DType t) noexcept {
  return t == DType::f32 || t == DType::f16 || t == DType::bf16;
}

/// bfloat16: the upper half of a float. Conversion from float rounds to nearest even; NaN stays
/// NaN.
struct bf16_t {
  uint16_t bits = 0;
  constexpr bf16_t() = default;
  constexpr explicit bf16_t(float f) noexcept {
    const auto u = std::bit_cast<uint32_t>(f);
    bits = (u & 0x7fffffffU) > 0x7f800000U
               ? static_cast<uint16_t>((u >> 16) | 0x40U)
               : static_cast<uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }
  constexpr explicit operator float() const noexcept {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

/// IEEE half. Conversion from float rounds to nearest even, overflows to infinity, keeps
/// subnormals.
struct f16_t {
  uint16_t bits = 0;
  constexpr f16_t() = default;
  constexpr explicit f16_t(float f) noexcept {
    const auto u = std::bit_cast<uint32_t>(f);
    const uint32_t sign = (u >> 16) & 0x8000U;
    const uint32_t a = u & 0x7fffffffU;
    uint32_t h = 0;
    if (a > 0x7f800000U) {
      h = 0x7e00U;  // NaN
    } else if (a >= 0x477ff000U) {
      h = 0x7c00U;  // 65520 and above round to infinity
    } else if (a < 0x38800000U) {
      // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 lines that unit up with the last
      // bit of the float's mantissa, so the float addition itself rounds to nearest even.
      h = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5F) - 0x3f000000U;
    } else {
      h = (a - 0x38000000U + 0xfffU + ((a >> 13) & 1U)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | h);
  }
  constexpr explicit operator float() const noexcept {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
    const uint32_t e = (bits >> 10) & 0x1fU;
    const uint32_t m = bits & 0x3ffU;
    if (e == 0) {
      const float v = static_cast<float>(m) * 0x1p-24F;
      return std::bit_cast<float>(std::bit_cast<uint32_t>(v) | sign);
    }
    if (e == 31) return std::bit_cast<float>(sign | 0x7f800000U | (m << 13));
    return std::bit_cast<float>(sign | ((e + 112) << 23) | (m << 13));
  }
};

/// Error unsupported: "`what`: expected f32, f16 or bf16, found ...".
[[noreturn]] void throw_not_float(DType found, std::string_view what);

/// Calls f(T{}) with T = float, f16_t or bf16_t: the one place where a run-time dtype becomes a
/// type.
template <typename F>
decltype(auto) visit_dtype(DType t, std::string_view what, F&& f) {
  switch (t) {
    case DType::f32:
      return std::forward<F>(f)(float{});
    case DType::f16:
      return std::forward<F>(f)(f16_t{});
    case DType::bf16:
      return std::forward<F>(f)(bf16_t{});
    default:
      break;
  }
  throw_not_float(t, what);
}

}  // namespace krait
