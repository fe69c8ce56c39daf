// Rounding a state to 16 bits (kernels/state_rounding.h): to a neighbour, up with the probability
// that is due, and so that a long memory goes on fading.
#include "kernels/state_rounding.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>

namespace krait::test {
namespace {

template <typename State>
float rounded(float v, uint32_t element = 0) {
  return static_cast<float>(round_state<State>(v, Rounding::stochastic, element));
}

template <typename State>
class StateRounding : public ::testing::Test {};
using States = ::testing::Types<bf16_t, f16_t>;
TYPED_TEST_SUITE(StateRounding, States);

/// The step between neighbours of |v| in the type.
template <typename State>
float step_at(float v) {
  constexpr bool kBf16 = std::is_same_v<State, bf16_t>;
  const int exponent = std::max(std::ilogb(v), kBf16 ? -126 : -14);
  return std::ldexp(1.0F, exponent - (kBf16 ? 7 : 10));
}

TYPED_TEST(StateRounding, KeepsWhatTheTypeHas) {
  for (const float v : {0.0F, -0.0F, 1.0F, -1.5F, 0x1p-14F, 0x1p-20F, 640.0F, -65280.0F}) {
    for (uint32_t element = 0; element < 100; ++element) {
      EXPECT_EQ(rounded<TypeParam>(v, element), v);
    }
  }
  EXPECT_TRUE(std::isinf(rounded<TypeParam>(std::numeric_limits<float>::infinity())));
  EXPECT_TRUE(std::isnan(rounded<TypeParam>(std::numeric_limits<float>::quiet_NaN())));
}

/// Values are grouped by where they lie between their neighbours; of each group the due share must
/// go up. With 20,000 values a group the standard deviation of the share is below 0.36%.
TYPED_TEST(StateRounding, GoesUpAsOftenAsIsDue) {
  constexpr int kGroups = 8;
  constexpr int kEach = 20000;
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(0.0F, 1.0F);
  for (const float scale : {1.0F, -37.0F, 0x1p-12F, 0x1p-18F}) {
    for (int g = 0; g < kGroups; ++g) {
      double due = 0;
      int up = 0;
      for (int i = 0; i < kEach; ++i) {
        const float step = step_at<TypeParam>(scale);
        const float below = std::floor(scale * (1.0F + 0.9F * uniform(random)) / step / 2) * step;
        const float share = (static_cast<float>(g) + uniform(random)) / kGroups;
        const float v = below + share * step_at<TypeParam>(below == 0 ? step : below);
        const float s = step_at<TypeParam>(v);
        const float low = std::floor(v / s) * s;
        const float got = rounded<TypeParam>(v, static_cast<uint32_t>(i));
        ASSERT_TRUE(got == low || got == low + s) << v << " " << got;
        due += (v - low) / s;
        up += got > low ? 1 : 0;
      }
      EXPECT_NEAR(static_cast<double>(up) / kEach, due / kEach, 0.018) << scale << " " << g;
    }
  }
}

/// h' = (1 - d) h, d too small for rounding to nearest, with a little noise as of a text. After n
/// steps exp(-n d) is left.
TYPED_TEST(StateRounding, LongMemoriesFade) {
  constexpr double kDecay = 1e-4;
  constexpr int kSteps = 10000;
  constexpr int kElements = 256;
  double sum = 0;
  float stuck = 1.0F;
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(0.5F, 1.5F);
  std::array<float, kElements> h;
  h.fill(1.0F);
  for (int t = 0; t < kSteps; ++t) {
    const float a = std::exp(-static_cast<float>(kDecay) * uniform(random));
    for (uint32_t i = 0; i < kElements; ++i) h[i] = rounded<TypeParam>(a * h[i], i);
    stuck = static_cast<float>(round_state<TypeParam>(a * stuck, Rounding::nearest, 0));
  }
  for (const float v : h) sum += v;
  EXPECT_NEAR(sum / kElements, std::exp(-kDecay * kSteps), 0.03);
  EXPECT_GT(stuck, 0.99F);
}

/// Elements with the same history do not all err the same way.
TYPED_TEST(StateRounding, ElementsAreIndependent) {
  const float v = 1.0F + step_at<TypeParam>(1.0F) / 2 + 0x1p-20F;
  int up = 0;
  for (uint32_t i = 0; i < 10000; ++i) up += rounded<TypeParam>(v, i) > v ? 1 : 0;
  EXPECT_NEAR(up, 5000, 250);
}

}  // namespace
}  // namespace krait::test
