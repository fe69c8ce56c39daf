#include "tokenizer/normalizer.h"

#include "support/test_support.h"

namespace krait {
namespace {

using test::throws;

std::string run(const char* json, std::string_view text) {
  const auto value = nlohmann::json::parse(json);
  return make_normalizer({value, "normalizer"})->normalize(text);
}

TEST(Normalizer, UnicodeForms) {
  EXPECT_EQ(run(R"({"type": "NFC"})", "e\u0301"), "\u00E9");
  EXPECT_EQ(run(R"({"type": "NFD"})", "\u00E9"), "e\u0301");
  EXPECT_EQ(run(R"({"type": "NFKC"})", "\uFB01e\u0301"), "fi\u00E9");
  EXPECT_EQ(run(R"({"type": "NFKD"})", "\uFB01\u00E9"), "fie\u0301");
}

TEST(Normalizer, Prepend) {
  const char* json = R"({"type": "Prepend", "prepend": "\u2581"})";
  EXPECT_EQ(run(json, "a"), "\u2581a");
  EXPECT_EQ(run(json, ""), "");
}

TEST(Normalizer, Replace) {
  EXPECT_EQ(run(R"({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})", " a b"),
            "\u2581a\u2581b");
  EXPECT_EQ(run(R"({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})", "a   b c"),
            "a b c");
}

TEST(Normalizer, Strip) {
  EXPECT_EQ(run(R"({"type": "Strip", "strip_left": true, "strip_right": false})", " \u3000a "),
            "a ");
  EXPECT_EQ(run(R"({"type": "Strip", "strip_left": false, "strip_right": true})", " a\u00A0\n"),
            " a");
  EXPECT_EQ(run(R"({"type": "Strip", "strip_left": true, "strip_right": true})", " \t "), "");
}

TEST(Normalizer, StripAccentsRemovesMarksAndDoesNotDecompose) {
  EXPECT_EQ(run(R"({"type": "StripAccents"})", "e\u0301\u00E9\u0903"), "e\u00E9");
}

TEST(Normalizer, Lowercase) { EXPECT_EQ(run(R"({"type": "Lowercase"})", "\u00C9A"), "\u00E9a"); }

TEST(Normalizer, SequenceIsInOrder) {
  EXPECT_EQ(run(R"({"type": "Sequence", "normalizers": [
                    {"type": "Prepend", "prepend": "\u2581"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]})",
                "a b"),
            "\u2581a\u2581b");
  EXPECT_EQ(run(R"({"type": "Sequence", "normalizers": []})", "a b"), "a b");
}

TEST(Normalizer, Errors) {
  for (const char* name : {"BertNormalizer", "Precompiled", "Nmt", "ByteLevel", "nfc"}) {
    EXPECT_TRUE(throws(ErrorKind::unsupported, fmt::format("the normalizer {} is not built", name),
                       [&] { run(fmt::format(R"({{"type": "{}"}})", name).c_str(), ""); }));
  }
  const auto fails = [](const char* part, const char* json) {
    return throws(ErrorKind::format, part, [&] { run(json, ""); });
  };
  EXPECT_TRUE(fails("normalizer: expected an object, found string", R"("NFC")"));
  EXPECT_TRUE(fails("the key \"type\" is missing", "{}"));
  EXPECT_TRUE(fails("normalizer.type: expected a string", R"({"type": 3})"));
  EXPECT_TRUE(fails("\"prepend\" is missing", R"({"type": "Prepend"})"));
  EXPECT_TRUE(fails("normalizer.pattern: expected a pattern",
                    R"({"type": "Replace", "pattern": {}, "content": ""})"));
  EXPECT_TRUE(fails("normalizer.normalizers: expected an array",
                    R"({"type": "Sequence", "normalizers": {}})"));
  EXPECT_TRUE(fails("normalizer.normalizers[0]: expected an object",
                    R"({"type": "Sequence", "normalizers": [null]})"));

  std::string deep = R"({"type": "NFC"})";
  for (int i = 0; i < 1000; ++i) deep = R"({"type": "Sequence", "normalizers": [)" + deep + "]}";
  EXPECT_TRUE(fails("nested too deeply", deep.c_str()));
}

}  // namespace
}  // namespace krait
