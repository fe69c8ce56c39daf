#include "tokenizer/pattern.h"

#include <ctime>

#include "support/test_support.h"

namespace krait {
namespace {

using test::throws;
using List = std::vector<std::string>;

List matches(const std::string& expression, const std::string& text) {
  List out;
  for (const Match& m : Pattern::regex(expression, "test").find_all(text)) {
    out.push_back(text.substr(m.begin, m.end - m.begin));
  }
  return out;
}

TEST(Pattern, LiteralIsNotAnExpression) {
  EXPECT_EQ(Pattern::literal(".").replace_all("a.b.", "-"), "a-b-");
  EXPECT_EQ(Pattern::literal("aa").replace_all("aaaaa", "b"), "bba");
  EXPECT_EQ(Pattern::literal("").replace_all("abc", "x"), "abc");
}

TEST(Pattern, WhiteSpaceIsThatOfUnicode) {
  // PCRE2's own \s holds U+180E and needs UCP for the others.
  const std::string text = " \t\n\x0B\f\r\u0085\u00A0\u1680\u2003\u2028\u2029\u202F\u205F\u3000";
  EXPECT_EQ(matches(R"(\s+)", text), List{text});
  EXPECT_EQ(matches(R"(\s)", "\u180E\u200B\uFEFF\x1C"), List{});
  EXPECT_EQ(matches(R"(\S)", "a\u180E "), (List{"a", "\u180E"}));
  EXPECT_EQ(matches(R"([\S])", "a\u180E "), (List{"a", "\u180E"}));
  EXPECT_EQ(matches(R"([^\s]+)", "a\u180E b"), (List{"a\u180E", "b"}));
  EXPECT_EQ(matches(R"([^\S]+)", "a \u3000b"), List{" \u3000"});
}

TEST(Pattern, WordCharactersAreThoseOfOniguruma) {
  EXPECT_EQ(matches(R"(\w+)", "e\u0301_\u203F\u24D0-\u216B\u00B2\u2460"),
            (List{"e\u0301_\u203F\u24D0", "\u216B\u00B2"}));
  EXPECT_EQ(matches(R"([\w]+)", "a\u00B2b"), (List{"a", "b"}));
  EXPECT_EQ(matches(R"(\W+)", "a, b"), List{", "});
  EXPECT_EQ(matches(R"(\bb)", "ab b"), List{"b"});
  EXPECT_EQ(matches(R"(\Bb)", "ab b"), List{"b"});
  EXPECT_EQ(matches(R"(\h+)", "xyz beef 7G"), (List{"beef", "7"}));
  EXPECT_EQ(matches(R"(\H+)", "a z"), List{" z"});
}

TEST(Pattern, Properties) {
  EXPECT_EQ(matches(R"(\p{L}+|\p{N}{1,3})", "ab1234"), (List{"ab", "123", "4"}));
  EXPECT_EQ(matches(R"(\p{^L}+)", "ab12"), List{"12"});
  EXPECT_EQ(matches(R"(\P{Ll}+)", "abAB"), List{"AB"});
  // U+3001 is of script Common, with Han among its script extensions.
  EXPECT_EQ(matches(R"(\p{Han}+)", "\u4E2D\u3001\u6587"), (List{"\u4E2D", "\u6587"}));
  EXPECT_EQ(matches(R"([\u4e00-\u9fff]+)", "a\u4E2D\u6587"), List{"\u4E2D\u6587"});
}

TEST(Pattern, RubySyntax) {
  EXPECT_EQ(matches("^a|b$", "a\nab\nb"), (List{"a", "a", "b", "b"}));
  EXPECT_EQ(matches(".+", "ab\ncd\re"), (List{"ab", "cd\re"}));
  EXPECT_EQ(matches("(?i:'s|'re)", "'S'Re"), (List{"'S", "'Re"}));
  EXPECT_EQ(matches("[]a]+", "]a"), List{"]a"});
  EXPECT_EQ(matches("[[:alpha:]]+", "ab1"), List{"ab"});
}

TEST(Pattern, EmptyMatches) {
  // As in the reference, none directly behind another match.
  std::vector<Match> found = Pattern::regex("a*", "test").find_all("aab\u00E9");
  std::vector<std::pair<size_t, size_t>> spans;
  for (const Match& m : found) spans.emplace_back(m.begin, m.end);
  EXPECT_EQ(spans, (std::vector<std::pair<size_t, size_t>>{{0, 2}, {3, 3}, {5, 5}}));
}

TEST(Pattern, WhatDiffersBeyondTranslationIsAnError) {
  for (const char* expression : {"[a[bc]]", "[a-z&&[^b]]", "(?m:a.b)", "(?i-x)a", "(*UTF)a",
                                 R"(\Qa\E)", R"([\W])", R"(a\Kb)", R"(\u12)"}) {
    EXPECT_TRUE(throws(ErrorKind::unsupported, "test: the regular expression", [&] {
      (void)Pattern::regex(expression, "test");
    })) << expression;
  }
  for (const char* expression : {"(", "[a", "a{2,1}", "\\", R"(\p{Nonsense})"}) {
    EXPECT_TRUE(throws(ErrorKind::format, "is not valid", [&] {
      (void)Pattern::regex(expression, "test");
    })) << expression;
  }
}

TEST(Pattern, NestedParenthesesDoNotOverflowTheStack) {
  const std::string deep = std::string(100000, '(') + std::string(100000, ')');
  EXPECT_TRUE(
      throws(ErrorKind::format, "is not valid", [&] { (void)Pattern::regex(deep, "test"); }));
}

TEST(Pattern, AnExplodingExpressionGivesUpWithASentence) {
  const Pattern p = Pattern::regex("(a+a+)+b", "test");
  EXPECT_TRUE(throws(ErrorKind::runtime, "gave up at byte 0",
                     [&] { (void)p.find_all(std::string(60, 'a') + "cb"); }));
}

TEST(Pattern, AMegabyteIsFastAndNeedsNoStack) {
  const Pattern p = Pattern::regex(
      R"([^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
      "test");
  const std::clock_t start = std::clock();
  EXPECT_EQ(p.find_all(std::string(1 << 20, 'a')).size(), 1U);
  EXPECT_EQ(p.find_all(std::string(1 << 20, ' ') + "a").size(), 2U);
  EXPECT_EQ(p.find_all(std::string(1 << 20, '\n')).size(), 1U);
  EXPECT_LT(std::clock() - start, 5 * CLOCKS_PER_SEC);  // CPU time
}

}  // namespace
}  // namespace krait
