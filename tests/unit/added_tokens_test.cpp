#include "tokenizer/added_tokens.h"

#include "support/test_support.h"

namespace krait {
namespace {

using nlohmann::json;
using test::throws;

/// The sections as "text" or "id:text", with a bar between.
std::string cut(const AddedTokens& tokens, const std::string& text, bool special = true,
                bool normalized = false) {
  std::string out;
  for (const Section& s : tokens.split(text, normalized, special)) {
    if (!out.empty()) out += "|";
    if (s.id) out += std::to_string(*s.id) + ":";
    out += s.text;
  }
  return out;
}

json token(int id, const std::string& content, const json& flags = json::object()) {
  json t{{"id", id}, {"content", content}, {"normalized", false}, {"special", false}};
  t.update(flags);
  return t;
}

std::string cut(const json& list, const std::string& text, bool special = true) {
  const JsonNode node(list, "added_tokens");
  return cut(AddedTokens(&node, nullptr), text, special);
}

TEST(AddedTokens, LeftmostLongest) {
  const json list{token(1, "  "), token(2, "    "), token(3, "<a>")};
  EXPECT_EQ(cut(list, "x     y"), "x|2:    | y");
  EXPECT_EQ(cut(list, "       "), "2:    |1:  | ");
  EXPECT_EQ(cut(list, "<a><a>"), "3:<a>|3:<a>");
  EXPECT_EQ(cut(list, "<a <a"), "<a <a");
  EXPECT_EQ(cut(list, ""), "");
}

TEST(AddedTokens, None) { EXPECT_EQ(cut(AddedTokens(nullptr, nullptr), "abc"), "abc"); }

TEST(AddedTokens, SpecialTokensCanBeLeftInTheText) {
  const json list{token(1, "<a>", {{"special", true}}), token(2, "<a"), token(3, "  ")};
  EXPECT_EQ(cut(list, "x<a>  ", true), "x|1:<a>|3:  ");
  EXPECT_EQ(cut(list, "x<a>  ", false), "x|2:<a|>|3:  ");
}

TEST(AddedTokens, SingleWord) {
  const json list{token(1, "ab", {{"single_word", true}})};
  EXPECT_EQ(cut(list,
                "ab ab,abc xab \u00E9"
                "ab ab"),
            "1:ab| |1:ab|,abc xab \u00E9"
            "ab |1:ab");
}

TEST(AddedTokens, Strip) {
  EXPECT_EQ(cut(json{token(1, "<a>", {{"lstrip", true}})}, "x \u3000<a> y"), "x|1: \u3000<a>| y");
  EXPECT_EQ(cut(json{token(1, "<a>", {{"rstrip", true}})}, "x <a> \ny"), "x |1:<a> \n|y");
  const json both{token(1, "<a>", {{"lstrip", true}, {"rstrip", true}})};
  EXPECT_EQ(cut(both, " <a>  <a> "), "1: <a>  |1:<a> ");
}

TEST(AddedTokens, NormalizedTokensAreLookedForInNormalizedText) {
  const json lower{{"type", "Lowercase"}};
  const auto normalizer = make_normalizer({lower, "normalizer"});
  const json list{token(1, "ABC", {{"normalized", true}}), token(2, "XYZ")};
  const JsonNode node(list, "added_tokens");
  const AddedTokens tokens(&node, normalizer.get());
  EXPECT_EQ(cut(tokens, "abcXYZ", true, true), "1:abc|XYZ");
  EXPECT_EQ(cut(tokens, "abcXYZ", true, false), "abc|2:XYZ");
}

TEST(AddedTokens, ASpecialTokenWinsOverAnEqualOne) {
  const json list{token(1, "<a>"), token(2, "<a>", {{"special", true}})};
  EXPECT_EQ(cut(list, "<a>"), "2:<a>");
}

TEST(AddedTokens, Lookup) {
  const json list{token(7, "<a>"), token(3, "<b>")};
  const JsonNode node(list, "added_tokens");
  const AddedTokens tokens(&node, nullptr);
  EXPECT_EQ(tokens.find(7)->content, "<a>");
  EXPECT_EQ(tokens.find("<b>")->id, 3);
  EXPECT_EQ(tokens.find(4), nullptr);
  EXPECT_EQ(tokens.find("<c>"), nullptr);
  EXPECT_EQ(tokens.largest_id(), 7);
}

TEST(AddedTokens, Errors) {
  EXPECT_TRUE(throws(ErrorKind::format, "added_tokens[0].id: expected a number from 0 to",
                     [] { cut(json{token(-1, "a")}, ""); }));
  EXPECT_TRUE(throws(ErrorKind::format, "added_tokens[0].id: expected a number from 0 to",
                     [] { cut(json{token(2'000'000'000, "a")}, ""); }));
  EXPECT_TRUE(throws(ErrorKind::format, "added_tokens[0]: the key \"content\" is missing", [] {
    cut(json{{{"id", 1}}}, "");
  }));
  EXPECT_TRUE(throws(ErrorKind::format, "added_tokens: expected an array, found object",
                     [] { cut(json::object(), ""); }));
  EXPECT_TRUE(throws(ErrorKind::format, "added_tokens[0].lstrip: expected true or false", [] {
    cut(json{token(1, "a", {{"lstrip", 1}})}, "");
  }));
}

}  // namespace
}  // namespace krait
