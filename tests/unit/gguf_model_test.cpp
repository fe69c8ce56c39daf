// GGUF's keys and vocabularies: what is missing or makes no sense is named.
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "checkpoint/gguf.h"
#include "model/gguf.h"
#include "support/checkpoint_bytes.h"
#include "support/test_support.h"
#include "tokenizer/gguf_vocabulary.h"

namespace krait::test {
namespace {

namespace g = gguf;

/// The keys of a small Mamba-1, but for those named, and with others added.
std::unique_ptr<Checkpoint> with_keys(const ScratchDir& dir,
                                      const std::vector<std::string>& without,
                                      std::vector<std::string> keys = {},
                                      const std::string& arch = "mamba") {
  const std::pair<const char*, uint32_t> sizes[] = {
      {"embedding_length", 32}, {"block_count", 2},     {"ssm.conv_kernel", 4},
      {"ssm.inner_size", 64},   {"ssm.state_size", 16}, {"ssm.time_step_rank", 4},
      {"vocab_size", 100}};
  for (const auto& [name, value] : sizes) {
    if (std::find(without.begin(), without.end(), name) == without.end()) {
      keys.push_back(g::key(arch + "." + name, value));
    }
  }
  keys.push_back(g::key(arch + ".attention.layer_norm_rms_epsilon", 6, le(1e-5F)));
  if (std::find(without.begin(), without.end(), "architecture") == without.end()) {
    keys.push_back(g::key("general.architecture", arch));
  }
  write_file(dir.path() / "m.gguf", g::file(keys, {}, ""));
  return open_gguf(dir.path() / "m.gguf");
}

TEST(GgufConfig, ReadsTheKeysOfTheArchitecture) {
  const ScratchDir dir;
  const auto gguf = with_keys(
      dir, {},
      {g::key("tokenizer.ggml.eos_token_id", 2U), g::key("tokenizer.ggml.eot_token_id", 7U),
       g::key("tokenizer.ggml.bos_token_id", 1U)});
  const ModelConfig c = gguf_config(*gguf);
  EXPECT_EQ(c.family, "mamba1");
  EXPECT_EQ(c.layout, "gguf");
  EXPECT_EQ(c.d_model, 32);
  EXPECT_EQ(c.n_layer, 2);
  EXPECT_EQ(c.d_inner, 64);
  EXPECT_EQ(c.d_state, 16);
  EXPECT_EQ(c.d_conv, 4);
  EXPECT_EQ(c.dt_rank, 4);
  EXPECT_EQ(c.vocab_size, 100);
  EXPECT_EQ(c.norm_eps, 1e-5F);
  EXPECT_TRUE(c.tie_embeddings);
  EXPECT_EQ(c.eos_ids, (std::vector<int32_t>{2, 7}));
  EXPECT_EQ(c.bos_id, 1);
}

TEST(GgufConfig, FalconMambaIsAnOption) {
  const ScratchDir dir;
  const auto gguf = with_keys(dir, {}, {g::key("mamba.ssm.dt_b_c_rms", 7, "\1")});
  const ModelConfig c = gguf_config(*gguf);
  EXPECT_EQ(c.family, "falcon-mamba");
  EXPECT_EQ(c.mixer_norm_eps, 1e-6F);
}

TEST(GgufConfig, Mamba2CountsHeads) {
  const ScratchDir dir;
  const auto gguf = with_keys(dir, {}, {g::key("mamba2.ssm.group_count", 2U)}, "mamba2");
  const nlohmann::json j = gguf_config_json(*gguf);
  EXPECT_EQ(j["model_type"], "mamba2");
  EXPECT_EQ(j["num_heads"], 4);
  EXPECT_EQ(j["head_dim"], 16);
  EXPECT_EQ(j["n_groups"], 2);
  const auto odd = with_keys(
      dir, {"ssm.time_step_rank"},
      {g::key("mamba2.ssm.group_count", 2U), g::key("mamba2.ssm.time_step_rank", 5U)}, "mamba2");
  EXPECT_TRUE(throws(ErrorKind::format, "expected a divisor of ssm.inner_size 64, found u32 5",
                     [&] { (void)gguf_config_json(*odd); }));
}

TEST(GgufConfig, NamesWhatIsMissingOrUnknown) {
  const ScratchDir dir;
  const auto refused = [&](const std::string& without, ErrorKind kind, const std::string& part) {
    const auto gguf = with_keys(dir, {without});
    return throws(kind, part, [&] { (void)gguf_config(*gguf); });
  };
  for (const char* key : {"embedding_length", "block_count", "ssm.conv_kernel", "ssm.inner_size",
                          "ssm.state_size", "ssm.time_step_rank"}) {
    EXPECT_TRUE(refused(key, ErrorKind::format, fmt::format("mamba.{}: expected an integer", key)));
  }
  EXPECT_TRUE(refused("vocab_size", ErrorKind::format, "vocab_size"));
  EXPECT_TRUE(
      refused("architecture", ErrorKind::format, "general.architecture: expected a string"));
  const auto llama = with_keys(dir, {}, {}, "llama");
  EXPECT_TRUE(throws(ErrorKind::unsupported, "general.architecture \"llama\" is not supported",
                     [&] { (void)gguf_config(*llama); }));
  const auto zero = with_keys(dir, {"ssm.state_size"}, {g::key("mamba.ssm.state_size", 0U)});
  EXPECT_TRUE(throws(ErrorKind::format, "state_size", [&] { (void)gguf_config(*zero); }));
}

GgufVocabulary tiny_vocabulary() {
  GgufVocabulary v;
  v.file = "v.gguf";
  v.model = "gpt2";
  v.pre = "gpt-2";
  v.tokens = {"<|end|>", "a", "b", "ab", "\u0120", "  ", "[PAD6]"};
  v.types = {3, 1, 1, 1, 1, 4, 5};
  v.merges = {"a b"};
  v.bos_id = v.eos_id = 0;
  return v;
}

TEST(GgufVocabulary, TypesDecideHowATokenIsUsed) {
  const auto t = make_gguf_tokenizer(tiny_vocabulary());
  EXPECT_EQ(t->vocab_size(), 6);  // the unused one at the end is padding
  EXPECT_EQ(t->encode("ab b"), (std::vector<int32_t>{3, 4, 2}));
  EXPECT_EQ(t->encode("a  <|end|>b"), (std::vector<int32_t>{1, 5, 0, 2}));
  EXPECT_EQ(t->decode(std::vector<int32_t>{3, 5, 4, 2}), "ab   b");
  EXPECT_TRUE(t->is_special(0));
  EXPECT_FALSE(t->is_special(5));
  EXPECT_EQ(t->encode("a", {.add_special = true}), (std::vector<int32_t>{1}));
  GgufVocabulary v = tiny_vocabulary();
  v.add_bos = v.add_eos = true;
  EXPECT_EQ(make_gguf_tokenizer(v)->encode("a", {.add_special = true}),
            (std::vector<int32_t>{0, 1, 0}));
}

TEST(GgufVocabulary, AnUnknownPreTypeCutsAsGpt2) {
  GgufVocabulary v = tiny_vocabulary();
  v.pre = "no-such-type";
  EXPECT_EQ(make_gguf_tokenizer(v)->encode("ab b"), (std::vector<int32_t>{3, 4, 2}));
}

TEST(GgufVocabulary, RefusesWhatMakesNoSense) {
  const auto refused = [](auto change, ErrorKind kind, const std::string& part) {
    GgufVocabulary v = tiny_vocabulary();
    change(v);
    return throws(kind, part, [&] { (void)make_gguf_tokenizer(v); });
  };
  const auto format = ErrorKind::format;
  EXPECT_TRUE(refused([](auto& v) { v.tokens.clear(); }, format, "expected tokens, found 0"));
  EXPECT_TRUE(refused([](auto& v) { v.types.pop_back(); }, format,
                      "token_type: expected one for each of 7"));
  EXPECT_TRUE(refused([](auto& v) { v.types[1] = 9; }, format, "from 1 to 6, found 9"));
  EXPECT_TRUE(
      refused([](auto& v) { v.tokens[1] = "\xff"; }, format, "tokens: number 1 is not UTF-8"));
  EXPECT_TRUE(
      refused([](auto& v) { v.merges = {"\xff a"}; }, format, "merges: number 0 is not UTF-8"));
  EXPECT_TRUE(refused([](auto& v) { v.merges = {"a z"}; }, format, "not in the vocabulary"));
  EXPECT_TRUE(refused([](auto& v) { v.eos_id = 7; }, format, "a special token is number 7 of 7"));
  EXPECT_TRUE(refused([](auto& v) { v.model = "bert"; }, ErrorKind::unsupported,
                      "tokenizer.ggml.model \"bert\" is not built"));
  EXPECT_TRUE(refused([](auto& v) { v.model = "llama"; }, format, "scores: expected a score"));
}

}  // namespace
}  // namespace krait::test
