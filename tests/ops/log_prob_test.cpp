// log_prob against its equation in double.
#include "ops/ops_test_util.h"

namespace krait::test {
namespace {

class LogProb : public ::testing::TestWithParam<std::tuple<Backend, int64_t>> {};

TEST_P(LogProb, IsTheEquation) {
  const auto [backend, vocab] = GetParam();
  constexpr int64_t kRows = 13;
  constexpr int64_t kPadding = 3;
  const int64_t n_col = vocab + kPadding;
  Random r(5);
  Values logits = r.uniform(kRows * n_col, -12, 12);
  std::vector<int32_t> targets;
  for (int64_t i = 0; i < kRows; ++i) {
    float* row = &logits[static_cast<size_t>(i * n_col)];
    for (int64_t v = vocab; v < n_col; ++v) row[v] = 1e9F;
    // Two equal largest ones, the later one first in the order of a backward search.
    if (vocab > 40 && i % 2 == 0) row[vocab - 2] = row[i + 20] = 13;
    targets.push_back(i % 3 == 0 ? static_cast<int32_t>(i + 20 < vocab ? i + 20 : 0)
                                 : r.below(static_cast<int32_t>(vocab)));
  }
  Device d(backend);
  const Tensor logprob = d.filled(kNan, {kRows});
  const Tensor best = d.ints(std::vector<int32_t>(kRows, -1));
  d.op.log_prob(logprob, best, d.tensor(logits, {kRows, n_col}), vocab, d.ints(targets));

  std::vector<int32_t> got_best(kRows);
  d.op.download(got_best.data(), best.data, best.bytes());
  const Values got = d.read(logprob);
  for (int64_t i = 0; i < kRows; ++i) {
    const float* row = &logits[static_cast<size_t>(i * n_col)];
    double sum = 0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v]));
    const auto at = static_cast<size_t>(i);
    EXPECT_NEAR(got[at], row[targets[at]] - std::log(sum), 1e-5) << "row " << i;
    EXPECT_EQ(got_best[at], std::max_element(row, row + vocab) - row) << "row " << i;
  }
}

TEST_P(LogProb, LargeLogitsDoNotOverflow) {
  const auto [backend, vocab] = GetParam();
  Values logits(static_cast<size_t>(vocab), -3e38F);
  logits[0] = 1000;
  Device d(backend);
  const Tensor logprob = d.filled(kNan, {1});
  const Tensor best = d.ints({-1});
  d.op.log_prob(logprob, best, d.tensor(logits, {1, vocab}), vocab, d.ints({0}));
  EXPECT_EQ(d.read(logprob)[0], 0.0F);
}

OPS_TEST_ALL_BACKENDS(LogProb, ::testing::Values(1, 2, 31, 257, 50277));

}  // namespace
}  // namespace krait::test
