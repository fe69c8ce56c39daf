// krait tokenize through the built program.
#include <gmock/gmock.h>

#include <fstream>

#include "cli/cli_support.h"

namespace krait::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

Args tokenize(const Args& more) { return Args{"tokenize", "--tokenizer", neox_tokenizer()} + more; }

std::string out(const Args& args, const std::string& input = {}) {
  const RunResult r = run_krait(args, input);
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_EQ(r.err, "");
  return r.out;
}

TEST(Tokenize, TextToIdsAndBack) {
  EXPECT_EQ(out(tokenize({"-p", "Hello  world"})), "12092,50276,10186\n");
  EXPECT_EQ(out(tokenize({"Hello  world"})), "12092,50276,10186\n");
  EXPECT_EQ(out(tokenize({"--decode", "--ids", "12092,50276,10186"})), "Hello  world");
  EXPECT_EQ(out(tokenize({"--decode", "-p", "12092 50276 10186"})), "Hello  world");
  EXPECT_EQ(out(tokenize({"--decode"}), out(tokenize({"-p", "Hello  world"}))), "Hello  world");
}

TEST(Tokenize, FilesAreTakenExactly) {
  const ScratchDir dir;
  write_file(dir.path() / "text", "Hello\n");
  EXPECT_EQ(out(tokenize({"-f", dir.path() / "text"})), "12092,187\n");
  EXPECT_EQ(out(tokenize({}), "Hello\n"), "12092,187\n");
  EXPECT_EQ(out(tokenize({}), ""), "\n") << "no text, no ids";
}

TEST(Tokenize, Json) {
  const Json j = Json::parse(out(tokenize({"--json", "-p", "Hello world"})));
  EXPECT_EQ(
      j, Json({{"text", "Hello world"}, {"ids", {12092, 1533}}, {"tokens", {"Hello", "Ġworld"}}}));
  EXPECT_EQ(Json::parse(out(tokenize({"--json", "--decode", "--ids", "12092"})))["text"], "Hello");
}

TEST(Tokenize, SpecialTokens) {
  EXPECT_EQ(out(tokenize({"--decode", "--ids", "0,12092"})), "Hello");
  EXPECT_EQ(out(tokenize({"--decode", "--special", "--ids", "0,12092"})), "<|endoftext|>Hello");
}

TEST(Tokenize, LinesComeBackWithIdsAndOtherKeysStay) {
  const ScratchDir dir;
  write_file(
      dir.path() / "in.jsonl",
      "{\"id\": \"a\", \"text\": \"Hello world\"}\n\n{\"text\": \"\"}\n{\"text\": \"\\u00e9\"}");
  const std::string lines = out(tokenize({"--jsonl", dir.path() / "in.jsonl"}));
  EXPECT_EQ(lines,
            "{\"id\":\"a\",\"text\":\"Hello world\",\"ids\":[12092,1533]}\n"
            "{\"text\":\"\",\"ids\":[]}\n"
            "{\"text\":\"é\",\"ids\":[860]}\n");
  EXPECT_EQ(out(tokenize({"--jsonl", "-", "--decode"}), "{\"ids\": [12092, 1533]}\n"),
            "{\"ids\":[12092,1533],\"text\":\"Hello world\"}\n");
}

TEST(Tokenize, BadLinesAreNamed) {
  const auto refused = [](const Args& more, const std::string& input, const std::string& part) {
    const RunResult r = run_krait(tokenize(Args{"--jsonl", "-"} + more), input);
    EXPECT_EQ(r.exit_code, 3) << input;
    EXPECT_THAT(r.err, HasSubstr(part));
  };
  refused({}, "{\"text\": \"a\"}\n{\"text\": 5}\n", "line 2: expected an object with a string");
  refused({}, "{\"text\": \"a\"", "line 1");
  refused({}, "[]", "line 1");
  refused({}, std::string(100000, '['), "line 1");
  refused({}, "{\"text\": \"\xff\"}", "line 1");
  refused({"--decode"}, "{\"text\": \"a\"}", "a list \"ids\"");
  refused({"--decode"}, "{\"ids\": [1.5]}", "whole numbers");
  refused({"--decode"}, "{\"ids\": [-1]}", "whole numbers");
}

TEST(Tokenize, GoldenLines) {
  const auto golden_file = data_dir() / "golden" / "tokenize" / "gpt-neox-20b.jsonl";
  std::ifstream in(golden_file);
  ASSERT_TRUE(in);
  const std::string lines = out(tokenize({"--jsonl", golden_file}));
  std::istringstream got(lines);
  std::string want_line;
  std::string got_line;
  int n = 0;
  while (std::getline(in, want_line)) {
    ASSERT_TRUE(std::getline(got, got_line));
    EXPECT_EQ(Json::parse(got_line), Json::parse(want_line));
    ++n;
  }
  EXPECT_GT(n, 400);
}

TEST(Tokenize, AMegabyteOfOneLetter) {
  const std::string ids = out(tokenize({}), std::string(1 << 20, 'a'));
  EXPECT_GT(ids.size(), 1000U);
  EXPECT_EQ(out(tokenize({"--decode"}), ids), std::string(1 << 20, 'a'));
}

TEST(Tokenize, TheShippedModelsTokenizerIsTheDefault) {
  const std::string ids = out({"tokenize", "-p", "Once upon a time"});
  EXPECT_EQ(out({"tokenize", "--decode"}, ids), "Once upon a time");
}

TEST(Tokenize, ModelMayBeATokenizerFileOrFolder) {
  EXPECT_EQ(out({"tokenize", "-m", neox_tokenizer(), "Hello"}), "12092\n");
  EXPECT_EQ(out({"tokenize", "-m", models_dir() / "gpt-neox-20b", "Hello"}), "12092\n");
}

TEST(Tokenize, MistralsTokenizerHasAVersionBehindItsName) {
  const ScratchDir dir;
  const auto model = copy_model(dir);
  std::filesystem::copy_file(data_dir() / "tokenizers" / "mistral-v3.model",
                             model / "tokenizer.model.v7");
  EXPECT_THAT(run_krait({"inspect", model.string()}).out, HasSubstr("sentencepiece"));
}

TEST(Tokenize, Refusals) {
  const auto refused = [](const Args& args, int code, const std::string& part) {
    const RunResult r = run_krait(args);
    EXPECT_EQ(r.exit_code, code) << r.err;
    EXPECT_THAT(r.err, StartsWith("krait: error: "));
    EXPECT_THAT(r.err, HasSubstr(part));
    EXPECT_EQ(r.out, "");
  };
  refused(tokenize({"-p", "\xff"}), 2, "not UTF-8");
  refused(tokenize({"--ids", "1"}), 2, "--decode");
  refused(tokenize({"--decode", "-p", "one"}), 2, "token ids");
  refused(tokenize({"-p", "a", "--jsonl", "x"}), 2, "--jsonl");
  refused(tokenize({"-f", "/no/such/file"}), 3, "/no/such/file");
  refused(tokenize({"--jsonl", "/no/such/file"}), 3, "/no/such/file");
  refused({"tokenize", "--tokenizer", "/no/such/file", "a"}, 3, "/no/such/file");
  refused({"tokenize", "-m", tiny(), "a"}, 3, "has no tokenizer");
}

}  // namespace
}  // namespace krait::test
