// The arithmetic that all samplers share, against published vectors and against <cmath>.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/sampling.h"

namespace krait::sampling {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kOne = 4294967296.0;  // 2^32

// Known answers published with Random123 (kat_vectors, philox4x32 10).
TEST(SamplingMath, PhiloxKnownAnswers) {
  const auto check = [](Philox counter, uint32_t key0, uint32_t key1, Philox want) {
    const Philox got = philox4x32_10(counter, key0, key1);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(got.word[i], want.word[i]) << i;
  };
  check({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check({{~0U, ~0U, ~0U, ~0U}}, ~0U, ~0U, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
        {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(SamplingMath, EveryPartOfTheKeyMatters) {
  const uint32_t base = uniform24(1, 2, 3);
  EXPECT_NE(base, uniform24(1 + (uint64_t{1} << 32), 2, 3));
  EXPECT_NE(base, uniform24(2, 2, 3));
  EXPECT_NE(base, uniform24(1, 2 + (uint64_t{1} << 32), 3));
  EXPECT_NE(base, uniform24(1, 3, 3));
  EXPECT_NE(base, uniform24(1, 2, 3 + (int64_t{1} << 32)));
  EXPECT_NE(base, uniform24(1, 2, 4));
  EXPECT_LT(base, 1U << 24);
}

TEST(SamplingMath, WeightIsExp) {
  for (int i = 0; i <= 230000; ++i) {
    const float nats = static_cast<float>(i) * 1e-4F;
    const double want = kOne * std::exp(-static_cast<double>(nats));
    ASSERT_NEAR(static_cast<double>(weight(nats)), want, 1.0 + want * 0x1p-29) << nats;
  }
  EXPECT_EQ(weight(0.0F), uint64_t{1} << 32);
  EXPECT_EQ(weight(23.0F), 0U);
  EXPECT_EQ(weight(kInf), 0U);
  EXPECT_EQ(weight(kNan), 0U);
}

TEST(SamplingMath, WeightNeverGrows) {
  uint64_t last = weight(0.0F);
  // Every float near the octaves, where the integer form changes its shift.
  for (int octave = 1; octave < 33; ++octave) {
    float nats = static_cast<float>(octave * 0.6931471805599453);
    for (int i = 0; i < 2000; ++i) nats = std::nextafter(nats, 0.0F);
    last = weight(nats);
    for (int i = 0; i < 4000; ++i) {
      nats = std::nextafter(nats, kInf);
      const uint64_t w = weight(nats);
      ASSERT_LE(w, last) << nats;
      last = w;
    }
  }
}

TEST(SamplingMath, ThresholdIsTheExactProduct) {
  for (const uint64_t total : {uint64_t{1} << 32, (uint64_t{1} << 50) + 12345677, uint64_t{7}}) {
    for (const uint32_t u : {0U, 1U, 0x7FFFFFU, 0xABCDEFU, 0xFFFFFFU}) {
      __extension__ typedef unsigned __int128 u128;
      EXPECT_EQ(draw_threshold(u, total), static_cast<uint64_t>((u128{u} * total) >> 24));
      EXPECT_LT(draw_threshold(u, total), total);
    }
  }
}

TEST(SamplingMath, KeysOrderLogitsThenTokens) {
  const std::vector<float> sorted{3.4e38F, 2.0F, 1e-40F, 0.0F, -1e-40F, -1.0F, -3.4e38F, -kInf};
  for (size_t i = 0; i + 1 < sorted.size(); ++i) {
    EXPECT_LT(descending_key(sorted[i], 9), descending_key(sorted[i + 1], 1)) << i;
    EXPECT_LT(descending_key(sorted[i], 1), descending_key(sorted[i], 2)) << i;
  }
  EXPECT_EQ(token_of_key(descending_key(-1.0F, 65023)), 65023);
  EXPECT_EQ(descending_key(clean(-0.0F), 5), descending_key(0.0F, 5));
  EXPECT_LT(ascending_key(0.5F, 9), ascending_key(0.75F, 1));
  EXPECT_LT(ascending_key(1e9F, 9), ascending_key(kInf, 1));
  EXPECT_LT(ascending_key(0.5F, 1), ascending_key(0.5F, 2));
}

TEST(SamplingMath, CleanedLogitsCompare) {
  EXPECT_EQ(clean(-kInf), -kInf);
  EXPECT_EQ(clean(kInf), std::numeric_limits<float>::max());
  EXPECT_EQ(clean(kNan), std::numeric_limits<float>::lowest());
  EXPECT_EQ(clean(1.5F), 1.5F);
  EXPECT_FALSE(std::signbit(clean(-0.0F)));
}

TEST(SamplingMath, PenaltiesFollowTheSignOfTheLogit) {
  EXPECT_EQ(penalised(3.0F, 2, 1.5F, 0.25F, 0.5F), 3.0F / 1.5F - 1.25F);
  EXPECT_EQ(penalised(-3.0F, 1, 1.5F, 0.0F, 0.0F), -4.5F);
  EXPECT_EQ(penalised(-kInf, 1, 1.5F, 1.0F, 1.0F), -kInf);
}

TEST(SamplingMath, BoundsOfMass) {
  const uint64_t total = uint64_t{5} << 32;
  EXPECT_EQ(kept_from(0.5F, total), uint64_t{5} << 31);
  EXPECT_EQ(kept_from(0.5F, 3), 2U);
  EXPECT_EQ(kept_above(0.5F, 3), 1U);
  EXPECT_EQ(kept_from(-1.0F, total), 1U);
  EXPECT_EQ(kept_above(-1.0F, total), 0U);
  EXPECT_EQ(min_weight(0.25F), uint64_t{1} << 30);
  EXPECT_EQ(min_weight(2.0F), uint64_t{1} << 32);
}

TEST(SamplingMath, Window) {
  EXPECT_EQ(window_length(64, 100), 64);
  EXPECT_EQ(window_length(-1, 100), 100);
  EXPECT_EQ(window_length(101, 100), 100);
  EXPECT_EQ(window_length(0, 100), 0);
}

}  // namespace
}  // namespace krait::sampling
