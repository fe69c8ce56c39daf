// The model that ships, on a real passage, against transformers
// (tools/compare_logits/write_golden.py).
#include <cmath>
#include <fstream>
#include <iterator>

#include "model/config.h"
#include "runtime/generation_config.h"
#include "support/test_models.h"
#include "support/test_support.h"
#include "tokenizer/tokenizer.h"

namespace krait::test {
namespace {

std::filesystem::path golden() { return data_dir() / "golden" / "models" / "hognose"; }

std::string passage() {
  std::ifstream in(golden() / "passage.txt", std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<int32_t> ids_of(const Checkpoint& from, const std::string& name) {
  const Tensor& t = from.find(name)->tensor;
  return {t.as<int64_t>(), t.as<int64_t>() + t.numel()};
}

TEST(HognoseTokenizer, EncodesAsItsTrainerDoesAndLosesNothing) {
  const auto expected = open_safetensors(golden() / "expected.safetensors");
  const auto tokenizer = open_tokenizer(models_dir() / "hognose");
  const auto want = ids_of(*expected, "ids");
  ASSERT_GT(want.size(), 400U);
  EncodeOptions special;
  special.add_special = true;
  EXPECT_EQ(tokenizer->encode(passage(), special), want);
  EXPECT_EQ(tokenizer->decode(want), passage());
  EXPECT_EQ(tokenizer->eos_id(), 1);
}

TEST(HognoseConfig, SamplingDefaultsAreRead) {
  const GenerationConfig c = read_generation_config(models_dir() / "hognose");
  EXPECT_FLOAT_EQ(c.temperature.value(), 0.8F);
  EXPECT_FLOAT_EQ(c.min_p.value(), 0.08F);
  EXPECT_FLOAT_EQ(c.repetition_penalty.value(), 1.2F);
  EXPECT_EQ(c.eos_ids, std::vector<int32_t>{1});
}

class Hognose : public ::testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    expected_ = open_safetensors(golden() / "expected.safetensors");
    const auto folder = models_dir() / "hognose";
    model_ = load(GetParam(), read_config(folder / "config.json"), open_checkpoint(folder));
    vocab_ = static_cast<size_t>(model_.model->config().vocab_size);
  }

  std::unique_ptr<Checkpoint> expected_;
  LoadedModel model_;
  size_t vocab_ = 0;
};

TEST_P(Hognose, LogitsAndLikelihoodOfAPassage) {
  Engine e(*model_.model, *model_.op, EngineOptions{});
  const auto ids = ids_of(*expected_, "ids");
  const auto logits = all_logits(e, static_cast<int64_t>(vocab_), ids);
  const Tensor& want = expected_->find("logits")->tensor;
  const auto positions = ids_of(*expected_, "positions");
  ASSERT_EQ(want.dim(0), static_cast<int64_t>(positions.size()));
  ASSERT_EQ(want.dim(1), static_cast<int64_t>(vocab_));
  for (size_t i = 0; i < positions.size(); ++i) {
    const auto at = static_cast<size_t>(positions[i]);
    EXPECT_TRUE(near_std(std::span(logits).subspan(at * vocab_, vocab_),
                         std::span(want.as<float>() + i * vocab_, vocab_), 1e-4))
        << "position " << at;
  }

  double nats = 0;
  for (size_t i = 0; i + 1 < ids.size(); ++i) {
    const auto row = std::span(logits).subspan(i * vocab_, vocab_);
    const double top = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (const float v : row) sum += std::exp(v - top);
    nats += top + std::log(sum) - row[static_cast<size_t>(ids[i + 1])];
  }
  nats /= static_cast<double>(ids.size() - 1);
  EXPECT_NEAR(nats, expected_->find("nats")->tensor.as<float>()[0], 1e-5);
}

TEST_P(Hognose, GreedyContinuation) {
  Engine e(*model_.model, *model_.op, EngineOptions{});
  const auto ids = ids_of(*expected_, "ids");
  const auto want = ids_of(*expected_, "greedy");
  e.open(0, greedy());
  EXPECT_EQ(generate(e, 0, std::span(ids).first(64), want.size()), want);
}

// The plain forms take half a minute here and are held to the fast ones elsewhere.
INSTANTIATE_TEST_SUITE_P(Backends, Hognose, ::testing::Values(kBackends[1], kBackends[2]),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace krait::test
