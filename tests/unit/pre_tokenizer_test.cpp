#include "tokenizer/pre_tokenizer.h"

#include "support/test_support.h"

namespace krait {
namespace {

using test::throws;
using List = std::vector<std::string>;

List run(const std::string& json, const std::string& text, bool at_start = true) {
  const auto value = nlohmann::json::parse(json);
  Words words(text, at_start);
  make_pre_tokenizer({value, "pre_tokenizer"})->apply(words);
  List out;
  for (const Words::Span& s : words.spans) out.emplace_back(words.word(s));
  return out;
}

List split(const char* behavior, const char* text, bool invert = false) {
  return run(fmt::format(R"({{"type": "Split", "pattern": {{"String": "-"}}, "behavior": "{}",
                              "invert": {}}})",
                         behavior, invert),
             text);
}

// The examples of the reference's documentation, "the-final--countdown".
TEST(PreTokenizer, SplitBehaviours) {
  const char* text = "the-final--countdown";
  EXPECT_EQ(split("Removed", text), (List{"the", "final", "countdown"}));
  EXPECT_EQ(split("Isolated", text), (List{"the", "-", "final", "-", "-", "countdown"}));
  EXPECT_EQ(split("MergedWithPrevious", text), (List{"the-", "final-", "-", "countdown"}));
  EXPECT_EQ(split("MergedWithNext", text), (List{"the", "-final", "-", "-countdown"}));
  EXPECT_EQ(split("Contiguous", text), (List{"the", "-", "final", "--", "countdown"}));
}

TEST(PreTokenizer, SplitAtTheEdges) {
  EXPECT_EQ(split("Removed", "--"), List{});
  EXPECT_EQ(split("Isolated", "-a-"), (List{"-", "a", "-"}));
  EXPECT_EQ(split("MergedWithPrevious", "-a-"), (List{"-", "a-"}));
  EXPECT_EQ(split("MergedWithNext", "-a-"), (List{"-a", "-"}));
  EXPECT_EQ(split("Contiguous", "--a"), (List{"--", "a"}));
  EXPECT_EQ(split("Isolated", ""), List{});
}

TEST(PreTokenizer, SplitInverted) {
  EXPECT_EQ(split("Removed", "a-bb--", true), (List{"-", "-", "-"}));
  EXPECT_EQ(split("Isolated", "a-bb", true), (List{"a", "-", "bb"}));
  EXPECT_EQ(split("MergedWithNext", "a-bb", true), (List{"a-", "bb"}));
}

TEST(PreTokenizer, SplitByRegex) {
  EXPECT_EQ(run(R"({"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"},
                    "behavior": "Isolated", "invert": false})",
                "a1234567"),
            (List{"a", "123", "456", "7"}));
}

TEST(PreTokenizer, ByteLevel) {
  const char* plain = R"({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true})";
  EXPECT_EQ(run(plain, "Hello  w\u00F6rld"), (List{"Hello", "\u0120", "\u0120w\u00C3\u00B6rld"}));
  const char* prefixed = R"({"type": "ByteLevel", "add_prefix_space": true})";
  EXPECT_EQ(run(prefixed, "a b"), (List{"\u0120a", "\u0120b"}));
  EXPECT_EQ(run(prefixed, " a"), List{"\u0120a"});
  EXPECT_EQ(run(prefixed, "\na"), (List{"\u0120", "\u010A", "a"}));
  const char* whole = R"({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false})";
  EXPECT_EQ(run(whole, "a b"), List{"a\u0120b"});
}

TEST(PreTokenizer, Digits) {
  EXPECT_EQ(run(R"({"type": "Digits", "individual_digits": true})", "ab12\u00B2c"),
            (List{"ab", "1", "2", "\u00B2", "c"}));
  EXPECT_EQ(run(R"({"type": "Digits", "individual_digits": false})", "ab12\u00B2c"),
            (List{"ab", "12\u00B2", "c"}));
}

TEST(PreTokenizer, Punctuation) {
  EXPECT_EQ(run(R"({"type": "Punctuation"})", "a$b, c"), (List{"a", "$", "b", ",", " c"}));
  EXPECT_EQ(run(R"({"type": "Punctuation", "behavior": "Contiguous"})", "a?!\u3002b\u20AC"),
            (List{"a", "?!\u3002", "b\u20AC"}));
  EXPECT_EQ(run(R"({"type": "Punctuation", "behavior": "Removed"})", "a?!b"), (List{"a", "b"}));
}

TEST(PreTokenizer, WhitespaceKinds) {
  EXPECT_EQ(run(R"({"type": "Whitespace"})", " it's  x_1\u3000!?\n"),
            (List{"it", "'", "s", "x_1", "!?"}));
  EXPECT_EQ(run(R"({"type": "WhitespaceSplit"})", " it's  x_1\u3000!?\n"),
            (List{"it's", "x_1", "!?"}));
}

TEST(PreTokenizer, MetaspaceSchemes) {
  const auto meta = [](const char* scheme, bool split_words) {
    return fmt::format(R"({{"type": "Metaspace", "replacement": "\u2581",
                            "prepend_scheme": "{}", "split": {}}})",
                       scheme, split_words);
  };
  EXPECT_EQ(run(meta("always", true), "Hey my  friend"),
            (List{"\u2581Hey", "\u2581my", "\u2581", "\u2581friend"}));
  EXPECT_EQ(run(meta("always", true), " Hey", false), List{"\u2581Hey"});
  EXPECT_EQ(run(meta("always", false), "a b"), List{"\u2581"
                                                    "a\u2581"
                                                    "b"});
  EXPECT_EQ(run(meta("first", true), "a b", true), (List{"\u2581"
                                                         "a",
                                                         "\u2581"
                                                         "b"}));
  EXPECT_EQ(run(meta("first", true), "a b", false), (List{"a",
                                                          "\u2581"
                                                          "b"}));
  EXPECT_EQ(run(meta("never", true), "a b"), (List{"a",
                                                   "\u2581"
                                                   "b"}));
}

TEST(PreTokenizer, MetaspaceOfOldFiles) {
  EXPECT_EQ(run(R"({"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": true,
                    "str_rep": "\u2581"})",
                "a b", false),
            (List{"\u2581"
                  "a",
                  "\u2581"
                  "b"}));
  EXPECT_EQ(run(R"({"type": "Metaspace", "replacement": "_", "add_prefix_space": false})", "a b"),
            (List{"a", "_b"}));
}

// Falcon's: the last two stages see mapped text, where some bytes of other characters are numbers.
TEST(PreTokenizer, SequenceOfFalcon) {
  const char* falcon = R"({"type": "Sequence", "pretokenizers": [
      {"type": "Punctuation", "behavior": "Contiguous"},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
      {"type": "Digits", "individual_digits": false},
      {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated"}]})";
  EXPECT_EQ(run(falcon, "x == 12345!?"), (List{"x", "\u0120", "==", "\u0120", "123", "45", "!?"}));
  EXPECT_EQ(run(falcon, "\u00B2"), (List{"\u00C2", "\u00B2"}));
}

TEST(PreTokenizer, Errors) {
  for (const char* name : {"BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit"}) {
    EXPECT_TRUE(throws(ErrorKind::unsupported,
                       fmt::format("the pre-tokenizer {} is not built", name),
                       [&] { run(fmt::format(R"({{"type": "{}"}})", name), ""); }));
  }
  EXPECT_TRUE(throws(ErrorKind::unsupported, "pre_tokenizer.behavior: the behaviour Merged",
                     [&] { run(R"({"type": "Punctuation", "behavior": "Merged"})", ""); }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "the scheme sometimes", [&] {
    run(R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "sometimes"})", "");
  }));
  EXPECT_TRUE(throws(ErrorKind::format, "\"behavior\" is missing",
                     [&] { run(R"({"type": "Split", "pattern": {"String": "a"}})", ""); }));
  EXPECT_TRUE(throws(ErrorKind::format, "individual_digits: expected true or false",
                     [&] { run(R"({"type": "Digits", "individual_digits": "yes"})", ""); }));
  std::string deep = R"({"type": "Digits"})";
  for (int i = 0; i < 1000; ++i) deep = R"({"type": "Sequence", "pretokenizers": [)" + deep + "]}";
  EXPECT_TRUE(throws(ErrorKind::format, "nested too deeply", [&] { run(deep, ""); }));
}

}  // namespace
}  // namespace krait
