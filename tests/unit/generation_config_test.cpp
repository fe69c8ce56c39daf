#include "runtime/generation_config.h"

#include <gmock/gmock.h>

#include "support/test_support.h"

namespace krait::test {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

GenerationConfig parse(const std::string& json) {
  const ScratchDir dir;
  write_file(dir.path() / "generation_config.json", json);
  return read_generation_config(dir.path());
}

TEST(GenerationConfig, MissingFileSaysNothing) {
  const ScratchDir dir;
  const GenerationConfig c = read_generation_config(dir.path());
  EXPECT_FALSE(c.do_sample || c.temperature || c.top_k || c.max_new_tokens || c.bos_id);
  EXPECT_THAT(c.eos_ids, IsEmpty());
}

TEST(GenerationConfig, ReadsEveryKey) {
  const GenerationConfig c = parse(
      R"({"do_sample": true, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
          "typical_p": 0.8, "repetition_penalty": 1.2, "max_new_tokens": 20,
          "eos_token_id": [11, 10], "bos_token_id": 3, "pad_token_id": 0})");
  EXPECT_EQ(c.do_sample, true);
  EXPECT_EQ(c.temperature, 0.7F);
  EXPECT_EQ(c.top_k, 5);
  EXPECT_EQ(c.top_p, 0.9F);
  EXPECT_EQ(c.min_p, 0.1F);
  EXPECT_EQ(c.typical_p, 0.8F);
  EXPECT_EQ(c.repetition_penalty, 1.2F);
  EXPECT_EQ(c.max_new_tokens, 20);
  EXPECT_THAT(c.eos_ids, ElementsAre(11, 10));
  EXPECT_EQ(c.bos_id, 3);
}

TEST(GenerationConfig, OneEosIdAndNulls) {
  const GenerationConfig c =
      parse(R"({"eos_token_id": 2, "temperature": null, "bos_token_id": -1})");
  EXPECT_THAT(c.eos_ids, ElementsAre(2));
  EXPECT_FALSE(c.temperature);
  EXPECT_FALSE(c.bos_id);
}

TEST(GenerationConfig, BadFilesAreNamed) {
  EXPECT_TRUE(throws(ErrorKind::format, "expected a JSON object", [] { (void)parse("[1, 2"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "expected a JSON object", [] { (void)parse("[]"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "temperature: expected a number",
                     [] { (void)parse(R"({"temperature": "hot"})"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "top_p: expected a number from 0 to 1",
                     [] { (void)parse(R"({"top_p": 1.5})"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "top_k: expected a whole number",
                     [] { (void)parse(R"({"top_k": 99999999999999999999})"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "eos_token_id",
                     [] { (void)parse(R"({"eos_token_id": ["</s>"]})"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "expected a JSON object",
                     [] { (void)parse(std::string(100000, '[')); }));
  EXPECT_TRUE(throws(ErrorKind::format, "larger than a megabyte",
                     [] { (void)parse("{" + std::string(2 << 20, ' ') + "}"); }));
}

TEST(DefaultSampling, NothingSaidMeansLlamaCppsDefaults) {
  const SampleParams p = default_sampling({});
  EXPECT_EQ(p.temperature, 0.8F);
  EXPECT_EQ(p.top_k, 40);
  EXPECT_EQ(p.top_p, 0.95F);
  EXPECT_EQ(p.min_p, 0.05F);
  EXPECT_EQ(p.repeat_penalty, 1.0F);
  EXPECT_EQ(p.repeat_last_n, 64);
}

TEST(DefaultSampling, SamplingConfigsMeanTransformersDefaults) {
  GenerationConfig c;
  c.do_sample = true;
  c.top_p = 0.9F;
  c.repetition_penalty = 1.1F;
  const SampleParams p = default_sampling(c);
  EXPECT_EQ(p.temperature, 1.0F);
  EXPECT_EQ(p.top_k, 50);
  EXPECT_EQ(p.top_p, 0.9F);
  EXPECT_EQ(p.min_p, 0.0F);
  EXPECT_EQ(p.repeat_penalty, 1.1F);
  EXPECT_EQ(p.repeat_last_n, -1) << "transformers penalises the whole text";
}

TEST(DefaultSampling, DoSampleFalseIsGreedy) {
  GenerationConfig c;
  c.do_sample = false;
  c.temperature = 0.7F;
  EXPECT_EQ(default_sampling(c).temperature, 0.0F);
}

/// The GPT-NeoX-20B tokenizer, whose only special tokens are <|endoftext|> = 0 and <|padding|> = 1.
std::unique_ptr<Tokenizer> neox() {
  return open_tokenizer(models_dir() / "gpt-neox-20b" / "tokenizer.json");
}

ModelConfig model(std::vector<int32_t> eos) {
  ModelConfig m;
  m.vocab_size = 50280;
  m.eos_ids = std::move(eos);
  return m;
}

TEST(EndOfText, FromTheFilesInOrder) {
  GenerationConfig g;
  EXPECT_THAT(end_of_text_ids(g, model({7}), nullptr), ElementsAre(7));
  g.eos_ids = {11, 10};
  EXPECT_THAT(end_of_text_ids(g, model({7}), nullptr), ElementsAre(10, 11));
  EXPECT_THAT(end_of_text_ids(g, model({}), nullptr), ElementsAre(10, 11));
}

TEST(EndOfText, IdsOutsideTheVocabularyAreLeftOut) {
  EXPECT_THAT(end_of_text_ids({}, model({50280, -1, 3}), nullptr), ElementsAre(3));
}

TEST(EndOfText, OrdinaryTokensAreNotBelieved) {
  // state-spaces/mamba-*-hf were first published with eos 2, a "!" of this vocabulary.
  const auto tokenizer = neox();
  EXPECT_THAT(end_of_text_ids({}, model({2}), tokenizer.get()), ElementsAre(0));
  EXPECT_THAT(end_of_text_ids({}, model({}), tokenizer.get()), ElementsAre(0));
  EXPECT_THAT(end_of_text_ids({}, model({0}), tokenizer.get()), ElementsAre(0));
}

TEST(StartOfText, BosElseEndOfText) {
  GenerationConfig g;
  EXPECT_EQ(start_of_text_id(g, model({}), nullptr), std::nullopt);
  EXPECT_EQ(start_of_text_id(g, model({5}), nullptr), 5);
  g.bos_id = 3;
  EXPECT_EQ(start_of_text_id(g, model({5}), nullptr), 3);
  EXPECT_EQ(start_of_text_id({}, model({2}), neox().get()), 0);
}

}  // namespace
}  // namespace krait::test
