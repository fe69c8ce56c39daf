#include "tokenizer/decoder.h"

#include "support/test_support.h"

namespace krait {
namespace {

using test::throws;

/// The bytes of all tokens, the first at the start of the text.
std::string run(const std::string& json, const std::vector<std::string>& tokens) {
  const auto value = nlohmann::json::parse(json);
  const JsonNode node(value, "decoder");
  const Decoder decoder(value.is_null() ? nullptr : &node);
  std::string out;
  for (size_t i = 0; i < tokens.size(); ++i) out += decoder.bytes(tokens[i], i == 0);
  return out;
}

TEST(Decoder, NoneJoinsWithSpaces) { EXPECT_EQ(run("null", {"a", "b", "c"}), "a b c"); }

TEST(Decoder, ByteLevel) {
  EXPECT_EQ(run(R"({"type": "ByteLevel"})", {"Hello", "\u0120w\u00C3", "\u00B6rld", "  "}),
            "Hello w\u00F6rld  ");
}

TEST(Decoder, Metaspace) {
  EXPECT_EQ(run(R"({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"})",
                {"\u2581Hey",
                 "\u2581"
                 "fri",
                 "end"}),
            "Hey friend");
  EXPECT_EQ(
      run(R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"})", {"_a", "_b"}),
      " a b");
  EXPECT_EQ(
      run(R"({"type": "Metaspace", "replacement": "_", "add_prefix_space": true})", {"_a", "_b"}),
      "a b");
}

const char* const kLlama = R"({"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})";

TEST(Decoder, SequenceOfLlama) {
  EXPECT_EQ(run(kLlama, {"\u2581Hello", "\u2581\u2581", "x", "<0xE6>", "<0x97>", "<0xA5>"}),
            "Hello  x\u65E5");
  EXPECT_EQ(run(kLlama, {"\u2581\u2581"
                         "a"}),
            " a");  // only one space was put there
}

TEST(Decoder, ByteFallback) {
  EXPECT_EQ(run(R"({"type": "ByteFallback"})", {"<0x41>", "<0x4a>", "<0x4>", "<0xZZ>", "0x41"}),
            "AJ<0x4><0xZZ>0x41");
}

TEST(Decoder, StripBeforeFuseIsForEachToken) {
  EXPECT_EQ(
      run(R"({"type": "Strip", "content": "_", "start": 2, "stop": 1})", {"___a__", "_b", "___"}),
      "_a_b");
}

TEST(Decoder, ReplaceByRegex) {
  EXPECT_EQ(
      run(R"({"type": "Replace", "pattern": {"Regex": "\\d+"}, "content": "#"})", {"a12", "3b"}),
      "a##b");
}

TEST(Decoder, Errors) {
  const auto unsupported = [](const char* part, const std::string& json) {
    return throws(ErrorKind::unsupported, part, [&] { run(json, {}); });
  };
  EXPECT_TRUE(unsupported("the decoder WordPiece is not built", R"({"type": "WordPiece"})"));
  EXPECT_TRUE(unsupported("the decoder CTC is not built", R"({"type": "CTC"})"));
  const auto after_fuse = [](const std::string& step) {
    return R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, )" + step + "]}";
  };
  EXPECT_TRUE(
      unsupported("the decoder ByteLevel behind Fuse", after_fuse(R"({"type": "ByteLevel"})")));
  EXPECT_TRUE(
      unsupported("only a Strip of one character",
                  after_fuse(R"({"type": "Strip", "content": " ", "start": 0, "stop": 1})")));
  EXPECT_TRUE(unsupported("behind ByteLevel", R"({"type": "Sequence", "decoders": [
      {"type": "ByteLevel"}, {"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}]})"));
  EXPECT_TRUE(throws(ErrorKind::format, "the content to strip is empty", [] {
    run(R"({"type": "Strip", "content": "", "start": 1, "stop": 1})", {"a"});
  }));
}

}  // namespace
}  // namespace krait
