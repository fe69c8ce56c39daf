// The comparer itself: a comparer that lets NaN or a sign flip pass would hide every other fault.
#include <cmath>
#include <vector>

#include "support/test_support.h"

namespace krait::test {
namespace {

const std::vector<float> kWant{1.0F, -2.0F, 3.0F, 0.5F};

TEST(Compare, EqualPasses) { EXPECT_TRUE(near_std(kWant, kWant, 0.0)); }

TEST(Compare, NanFails) {
  std::vector<float> got = kWant;
  got[2] = std::nanf("");
  EXPECT_FALSE(near_std(got, kWant, 1e9));
}

TEST(Compare, SignFlipFails) {
  std::vector<float> got = kWant;
  got[1] = -got[1];
  EXPECT_FALSE(near_std(got, kWant, 1e-2));
}

TEST(Compare, ZerosFail) { EXPECT_FALSE(near_std(std::vector<float>(4, 0.0F), kWant, 1e-2)); }

TEST(Compare, WrongSizeFails) { EXPECT_FALSE(near_std(std::vector<float>(3, 1.0F), kWant, 1e9)); }

TEST(Compare, LimitIsRelativeToTheSpread) {
  std::vector<float> got = kWant;
  got[0] += 0.01F;
  EXPECT_TRUE(near_std(got, kWant, 0.01));
  EXPECT_FALSE(near_std(got, kWant, 0.001));
}

}  // namespace
}  // namespace krait::test
