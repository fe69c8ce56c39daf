// How a state is rounded when it is stored in 16 bits. To nearest, a change of less than half a
// unit in the last place is lost every time, and a long memory (decay close to 1) stands still.
// Stochastically, a value goes up or down with probabilities in proportion to its distance from the
// two neighbours, so that what is lost is zero on average.
//
// The random bits are a hash of the value itself and of its place in the state: the same tokens
// give the same states on every run, whatever the slot and the neighbours in the batch, and nothing
// has to be counted. A value that comes back unchanged is rounded as before.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "base/dtype.h"
#include "kernels/sampling.h"

namespace krait {

enum class Rounding : uint8_t { nearest, stochastic };

/// 32 bits for a float's bits and the index of its element: multiplications and shifts that let
/// each bit of the input change each bit of the output (as in MurmurHash3's last step, other
/// constants).
KRAIT_HD constexpr uint32_t rounding_bits(uint32_t value, uint32_t element) {
  uint32_t v = value ^ (element * 0x9E3779B9U);
  v ^= v >> 16;
  v *= 0x7FEB352DU;
  v ^= v >> 15;
  v *= 0x846CA68BU;
  v ^= v >> 16;
  return v;
}

/// v or one of its neighbours with 8 bits of significand, which converts to bf16 exactly.
/// Infinities and NaN stay.
KRAIT_HD inline float stochastic_bf16(float v, uint32_t element) {
  const auto bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7F800000U) == 0x7F800000U) return v;
  return std::bit_cast<float>((bits + (rounding_bits(bits, element) & 0xFFFFU)) & 0xFFFF0000U);
}

/// The same for f16, whose smallest step is 2^-24.
KRAIT_HD inline float stochastic_f16(float v, uint32_t element) {
  const auto bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7F800000U) == 0x7F800000U) return v;
  const uint32_t random = rounding_bits(bits, element);
  if (std::fabs(v) >= 0x1p-14F) {
    return std::bit_cast<float>((bits + (random & 0x1FFFU)) & 0xFFFFE000U);
  }
  const float steps = v * 0x1p24F;  // exact, below 2^10
  const float down = std::floor(steps);
  const bool up = (steps - down) * 0x1p24F > static_cast<float>(random >> 8);
  return (up ? down + 1.0F : down) * 0x1p-24F;
}

/// v as it is stored in element `element` of a layer's state. Host only.
template <typename State>
State round_state(float v, Rounding rounding, int64_t element) {
  const auto index = static_cast<uint32_t>(element);
  if (rounding == Rounding::nearest) return State(v);
  if constexpr (std::is_same_v<State, bf16_t>) return State(stochastic_bf16(v, index));
  if constexpr (std::is_same_v<State, f16_t>) return State(stochastic_f16(v, index));
  return State(v);
}

}  // namespace krait
