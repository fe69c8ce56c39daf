// krait bench through the built program: what it prints must add up.
#include <gmock/gmock.h>

#include <algorithm>

#include "cli/cli_support.h"

namespace krait::test {
namespace {

using ::testing::HasSubstr;

TEST(Bench, JsonAddsUp) {
  const RunResult r = run_krait(
      {"bench", "-m", tiny(), "-p", "16,33", "-n", "8", "-b", "1,3", "-r", "5", "-o", "json"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const Json tests = Json::parse(r.out);
  ASSERT_EQ(tests.size(), 4U);
  EXPECT_EQ(tests[0]["n_prompt"], 16);
  EXPECT_EQ(tests[1]["n_prompt"], 33);
  EXPECT_EQ(tests[2]["n_batch"], 1);
  EXPECT_EQ(tests[3]["n_batch"], 3);
  for (const Json& t : tests) {
    ASSERT_EQ(t["samples_ts"].size(), 5U);
    const double tokens =
        t["n_batch"].get<double>() * (t["n_prompt"].get<double>() + t["n_gen"].get<double>());
    std::vector<double> rates;
    for (size_t i = 0; i < 5; ++i) {
      const double rate = t["samples_ts"][i].get<double>();
      rates.push_back(rate);
      EXPECT_NEAR(rate * t["samples_ns"][i].get<double>() / 1e9, tokens, 1e-3 * tokens);
    }
    std::sort(rates.begin(), rates.end());
    EXPECT_NEAR(t["median_ts"].get<double>(), rates[2], 1e-6 * rates[2]);
    EXPECT_NEAR(t["min_ts"].get<double>(), rates[0], 1e-6 * rates[0]);
    EXPECT_NEAR(t["max_ts"].get<double>(), rates[4], 1e-6 * rates[4]);
    EXPECT_EQ(t["backends"], "cpu");
    EXPECT_EQ(t["dtype"], "f32");
    EXPECT_FALSE(t["build_commit"].get<std::string>().empty());
  }
}

TEST(Bench, MarkdownTable) {
  const RunResult r = run_krait({"bench", "-m", tiny(), "-p", "8", "-n", "4", "-r", "2"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("| test |"));
  EXPECT_THAT(r.out, HasSubstr("| pp8 |"));
  EXPECT_THAT(r.out, HasSubstr("| tg4 |"));
  EXPECT_THAT(r.out, HasSubstr("weights f32, state f32"));
}

TEST(Bench, ZeroLeavesATestOut) {
  const RunResult r =
      run_krait({"bench", "-m", tiny(), "-p", "0", "-n", "4", "-r", "1", "-o", "json"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_EQ(Json::parse(r.out).size(), 1U);
}

}  // namespace
}  // namespace krait::test
