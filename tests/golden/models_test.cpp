// Every family against the answers of the reference implementations (tests/data/golden/models):
// logits for every prompt length, greedy tokens, and every way of feeding a prompt.
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>

#include "support/test_models.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

// Design, section 4: the largest logit error in f32, in standard deviations of the logits.
constexpr double kLimit = 1e-4;
// For answers of kernels that round the factors of their products to tf32, as Triton's do.
constexpr double kTf32Limit = 1e-2;

constexpr size_t kPromptLengths[] = {1, 2, 3, 4, 5, 17, 64, 130, 257, 600};

struct Case {
  const char* folder;
  Backend backend;
  double limit;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.folder << " on " << c.backend.name; }

class Golden : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    const auto folder = data_dir() / "golden" / "models" / GetParam().folder;
    expected_ = open_safetensors(folder / "expected.safetensors");
    config_ = read_config(config_file(folder));
    model_ = load(GetParam().backend, config_, open_checkpoint(folder));
    config_ = model_.model->config();
  }

  [[nodiscard]] Engine engine(int64_t prefill_chunk = 0) const {
    EngineOptions options;
    options.prefill_chunk = prefill_chunk;
    return Engine(*model_.model, *model_.op, options);
  }

  [[nodiscard]] std::vector<int32_t> ids(const std::string& name) const {
    const Tensor& t = expected_->find(name)->tensor;
    const auto* from = t.as<int64_t>();
    return {from, from + t.numel()};
  }

  /// Holds the last rows of `got` [n, vocab_size] against the expected rows of that prompt, which
  /// may be fewer and have columns of padding. Records the worst share of the limit.
  void expect_logits(size_t prompt_length, std::span<const float> got, const std::string& what) {
    const Tensor& want = expected_->find(fmt::format("logits_{}", prompt_length))->tensor;
    const auto vocab = static_cast<size_t>(config_.vocab_size);
    const auto rows = static_cast<size_t>(want.dim(0));
    const auto columns = static_cast<size_t>(want.dim(1));
    ASSERT_GE(columns, vocab);
    ASSERT_GE(got.size(), rows * vocab);
    got = got.last(rows * vocab);
    for (size_t r = 0; r < rows; ++r) {
      const auto row = std::span(want.as<float>() + r * columns, vocab);
      const auto result = near_std(got.subspan(r * vocab, vocab), row, GetParam().limit);
      EXPECT_TRUE(result) << what << ", prompt of " << prompt_length << ", row " << r << " of "
                          << rows;
      const Comparison c = compare(got.subspan(r * vocab, vocab), row);
      worst_ = std::max(worst_, c.max_abs / c.want_std / GetParam().limit);
    }
  }

  void TearDown() override {
    if (worst_ > 0) std::printf("used %.3g of the limit %.1e\n", worst_, GetParam().limit);
  }

  std::unique_ptr<Checkpoint> expected_;
  ModelConfig config_;
  LoadedModel model_;
  double worst_ = 0;  ///< share of the limit
};

TEST_P(Golden, LogitsOfEveryPromptLength) {
  Engine e = engine();
  for (const size_t length : kPromptLengths) {
    const auto prompt = ids(fmt::format("prompt_{}", length));
    ASSERT_EQ(prompt.size(), length);
    expect_logits(length, all_logits(e, config_.vocab_size, prompt), "whole prompt");
  }
}

TEST_P(Golden, GreedyTokensAreEqual) {
  auto want = ids("greedy_17");
  ASSERT_EQ(want.size(), 48U);
  // mamba_ssm draws from the rows of padding too, which krait never does: there the texts part.
  const auto padding =
      std::find_if(want.begin(), want.end(), [&](int32_t id) { return id >= config_.vocab_size; });
  want.erase(padding, want.end());
  ASSERT_GE(want.size(), 24U);
  Engine e = engine();
  e.open(0, greedy());
  EXPECT_EQ(generate(e, 0, ids("prompt_17"), want.size()), want);
}

TEST_P(Golden, TokenByToken) {
  Engine e = engine();
  for (const size_t length : {1U, 2U, 3U, 4U, 5U, 17U, 64U}) {
    const std::vector<size_t> ones(length, 1);
    const auto prompt = ids(fmt::format("prompt_{}", length));
    expect_logits(length, all_logits(e, config_.vocab_size, prompt, ones), "token by token");
  }
}

TEST_P(Golden, EveryChunkLength) {
  for (const int64_t chunk : {1, 2, 3, 4, 5, 7, 16, 64}) {
    Engine e = engine(chunk);
    for (const size_t length : {17U, 130U}) {
      const auto prompt = ids(fmt::format("prompt_{}", length));
      expect_logits(length, all_logits(e, config_.vocab_size, prompt),
                    fmt::format("chunks of {}", chunk));
    }
  }
}

TEST_P(Golden, RandomPieces) {
  Engine e = engine(100);
  const auto prompt = ids("prompt_600");
  for (const uint64_t seed : {1U, 2U, 3U}) {
    std::vector<size_t> pieces;
    for (const int32_t n : random_ids(40, 60, seed)) pieces.push_back(static_cast<size_t>(n) + 1);
    expect_logits(600, all_logits(e, config_.vocab_size, prompt, pieces),
                  fmt::format("pieces of seed {}", seed));
  }
}

TEST_P(Golden, SixteenBitWeightsByDivergence) {
  const auto prompt = ids("prompt_257");
  Engine exact = engine();
  const auto want = all_logits(exact, config_.vocab_size, prompt);
  const auto folder = data_dir() / "golden" / "models" / GetParam().folder;
  // bf16 keeps 8 bits of the mantissa and f16 11, so that the mean square of the error, and with it
  // the divergence, is 64 times smaller.
  for (const auto& [dtype, limit] : {std::pair{DType::bf16, 2e-3}, {DType::f16, 2e-4}}) {
    const LoadedModel m = load(GetParam().backend, config_, open_checkpoint(folder), dtype);
    EXPECT_EQ(m.model->weight_dtype(), dtype);
    Engine e(*m.model, *m.op, EngineOptions{});
    const auto got = all_logits(e, config_.vocab_size, prompt);
    const double kl = mean_kl(want, got, static_cast<size_t>(config_.vocab_size));
    std::printf("%s: mean KL %.3g (limit %.1e)\n", std::string(dtype_name(dtype)).c_str(), kl,
                limit);
    EXPECT_TRUE(kl <= limit && kl >= 0) << dtype_name(dtype) << ": " << kl;
  }
}

std::vector<Case> cases(std::initializer_list<const char*> folders, double limit = kLimit) {
  std::vector<Case> all;
  for (const char* folder : folders) {
    for (const Backend& b : kBackends) all.push_back({folder, b, limit});
  }
  return all;
}

std::string case_name(const ::testing::TestParamInfo<Case>& test) {
  std::string name = fmt::format("{}_{}", test.param.folder, test.param.backend.name);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Mamba1, Golden,
                         ::testing::ValuesIn(cases({"mamba1-hf", "mamba1-hf-odd",
                                                    "mamba1-hf-sharded", "mamba1-original-bin",
                                                    "mamba1-neox-vocab"})),
                         case_name);
INSTANTIATE_TEST_SUITE_P(FalconMamba, Golden, ::testing::ValuesIn(cases({"falcon-mamba-hf"})),
                         case_name);
INSTANTIATE_TEST_SUITE_P(Mamba2, Golden,
                         ::testing::ValuesIn(cases({"mamba2-hf", "mamba2-hf-groups",
                                                    "mamba2-codestral-tiny"})),
                         case_name);
INSTANTIATE_TEST_SUITE_P(Mamba2Tf32, Golden,
                         ::testing::ValuesIn(cases({"mamba2-original-bin"}, kTf32Limit)),
                         case_name);

}  // namespace
}  // namespace krait::test
