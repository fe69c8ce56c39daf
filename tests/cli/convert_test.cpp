// krait convert through the built program: there and back with the same tokens, and nothing left
// behind by a conversion that fails.
#include <gmock/gmock.h>

#include "cli/cli_support.h"

namespace krait::test {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class Convert : public ::testing::Test {
 protected:
  RunResult convert(const std::string& from, const std::string& to, const Args& more = {}) const {
    return run_krait(Args{"convert", from, to} + more);
  }
  std::string at(const char* name) const { return (dir_.path() / name).string(); }
  static std::string tokens(const std::string& model, const Args& more) {
    const RunResult r = run_krait(
        Args{"run", "-m", model, "--greedy", "-n", "16", "--print-ids", "-q", "--device", "cpu"} +
        more);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    return r.out;
  }
  bool is_empty() const { return fs::is_empty(dir_.path()); }

  ScratchDir dir_;
};

TEST_F(Convert, GgufWithTokenizerThereAndBack) {
  const Args text{"Once upon a time", "--dtype", "f32"};
  const Args same = text + Args{"--tokenizer", neox_tokenizer()};
  const std::string want = tokens(golden("mamba1-neox-vocab"), same);
  const RunResult there =
      convert(golden("mamba1-neox-vocab"), at("m.gguf"), {"--tokenizer", neox_tokenizer()});
  ASSERT_EQ(there.exit_code, 0) << there.err;
  EXPECT_EQ(there.out, "");
  EXPECT_THAT(there.err, HasSubstr("in f32"));
  EXPECT_EQ(tokens(at("m.gguf"), text), want);

  ASSERT_EQ(convert(at("m.gguf"), at("back")).exit_code, 0);
  for (const char* file :
       {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}) {
    EXPECT_TRUE(fs::exists(dir_.path() / "back" / file)) << file;
  }
  EXPECT_EQ(tokens(at("back"), text), want);
}

TEST_F(Convert, HognoseKeepsItsTokenizer) {
  const std::string hognose = (models_dir() / "hognose").string();
  const Args text{"Once upon a time", "--repeat-penalty", "1"};
  ASSERT_EQ(convert(hognose, at("h.gguf")).exit_code, 0);
  EXPECT_EQ(tokens(at("h.gguf"), text), tokens(hognose, text));
  ASSERT_EQ(convert(at("h.gguf"), at("back")).exit_code, 0);
  EXPECT_TRUE(fs::exists(dir_.path() / "back" / "tokenizer.model"));
  EXPECT_EQ(tokens(at("back"), text), tokens(hognose, text));
}

TEST_F(Convert, OriginalNamesBecomeHuggingFaces) {
  ASSERT_EQ(convert(golden("mamba1-original-bin"), at("hf"), {"--no-tokenizer"}).exit_code, 0);
  const Json config = Json::parse(read_file(dir_.path() / "hf" / "config.json"));
  EXPECT_EQ(config["model_type"], "mamba");
  EXPECT_EQ(config["architectures"], Json({"MambaForCausalLM"}));
  EXPECT_EQ(config["layer_norm_epsilon"], 1e-5);
  EXPECT_EQ(config["vocab_size"], 504);
  const Args ids{"--ids", "5,6,7"};
  EXPECT_EQ(tokens(at("hf"), ids), tokens(golden("mamba1-original-bin"), ids));
}

TEST_F(Convert, DtypeIsOfTheMatrices) {
  ASSERT_EQ(convert(tiny(), at("h.gguf"), {"--dtype", "bf16"}).exit_code, 0);
  const RunResult r = run_krait({"inspect", at("h.gguf"), "--json", "--device", "cpu"});
  const Json j = Json::parse(r.out);
  EXPECT_EQ(j["dtype"], "bf16");
  for (const auto& t : j["tensors"]) {
    const std::string name = t["name"];
    const bool matrix = name == "token_embd.weight" || name.ends_with("ssm_in.weight") ||
                        name.ends_with("ssm_x.weight") || name.ends_with("ssm_dt.weight") ||
                        name.ends_with("ssm_out.weight");
    EXPECT_EQ(t["dtype"], matrix ? "bf16" : "f32") << name;
  }
}

TEST_F(Convert, LeavesNothingWhereItFails) {
  const RunResult biases = convert(golden("mamba1-hf-odd"), at("m.gguf"));
  EXPECT_EQ(biases.exit_code, 4);
  EXPECT_THAT(biases.err, HasSubstr("in_proj.bias"));
  EXPECT_TRUE(is_empty());

  const RunResult tokenizer = convert(tiny(), at("m.gguf"), {"--tokenizer", neox_tokenizer()});
  EXPECT_EQ(tokenizer.exit_code, 3);
  EXPECT_THAT(tokenizer.err, HasSubstr("tokens, the model rows for 512"));
  EXPECT_TRUE(is_empty());

  EXPECT_EQ(convert(tiny(), at("none/m.gguf")).exit_code, 3);
  EXPECT_EQ(convert(at("none"), at("m.gguf")).exit_code, 3);
  EXPECT_EQ(convert(tiny(), at("m.safetensors")).exit_code, 2);
  EXPECT_EQ(convert(tiny(), tiny()).exit_code, 2);
  EXPECT_EQ(run_krait({"convert", tiny()}).exit_code, 2);
  EXPECT_TRUE(is_empty());
  write_file(dir_.path() / "file", "x");
  EXPECT_EQ(convert(tiny(), at("file")).exit_code, 3);
  EXPECT_EQ(read_file(dir_.path() / "file"), "x");
}

}  // namespace
}  // namespace krait::test
