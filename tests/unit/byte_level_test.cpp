#include "tokenizer/byte_level.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <set>

#include "support/test_support.h"
#include "tokenizer/pattern.h"
#include "tokenizer/unicode.h"

namespace krait::byte_level {
namespace {

std::vector<std::string> words(const std::string& text) {
  std::vector<size_t> ends;
  split_words(text, ends);
  std::vector<std::string> out;
  size_t begin = 0;
  for (const size_t end : ends) {
    out.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  EXPECT_EQ(begin, text.size());
  return out;
}

using List = std::vector<std::string>;

TEST(ByteLevel, AlphabetIsOneToOne) {
  std::set<char32_t> seen;
  for (int b = 0; b < 256; ++b) {
    const char32_t c = char_of(static_cast<unsigned char>(b));
    seen.insert(c);
    EXPECT_EQ(byte_of(c), b);
  }
  EXPECT_EQ(seen.size(), 256U);
  EXPECT_EQ(char_of(' '), 0x120U);
  EXPECT_EQ(char_of('\n'), 0x10AU);
  EXPECT_EQ(char_of(0x7F), 0x121U);
  EXPECT_EQ(char_of(0xAD), 0x143U);
  EXPECT_EQ(byte_of(' '), -1);
  EXPECT_EQ(byte_of(0x144), -1);
  EXPECT_EQ(byte_of(0x10FFFF), -1);
}

TEST(ByteLevel, MapsBytesAndBack) {
  const std::string text = "caf\u00E9 \n";
  std::string mapped(2 * text.size(), '\0');
  mapped.resize(static_cast<size_t>(map(text, mapped.data()) - mapped.data()));
  EXPECT_EQ(mapped, "caf\u00C3\u00A9\u0120\u010A");
  EXPECT_EQ(unmapped(mapped), text);
  // An added token is plain text and holds characters that stand for no byte.
  EXPECT_EQ(unmapped("two  spaces"), "two  spaces");
}

TEST(ByteLevel, WordsOfThePattern) {
  EXPECT_EQ(words("Hello my name"), (List{"Hello", " my", " name"}));
  EXPECT_EQ(words("a  b"), (List{"a", " ", " b"}));
  EXPECT_EQ(words("a \n b"), (List{"a", " \n", " b"}));
  EXPECT_EQ(words("a\n\nb"), (List{"a", "\n", "\n", "b"}));
  EXPECT_EQ(words("a\n"), (List{"a", "\n"}));
  EXPECT_EQ(words("a   "), (List{"a", "   "}));
  EXPECT_EQ(words("I've they'll DON'T 'she"),
            (List{"I", "'ve", " they", "'ll", " DON", "'", "T", " '", "she"}));
  EXPECT_EQ(words("'she'"), (List{"'s", "he", "'"}));
  EXPECT_EQ(words("3.14 x\u00B2"), (List{"3", ".", "14", " x", "\u00B2"}));
  EXPECT_EQ(words("x\u00A0y"), (List{"x", "\u00A0", "y"}));
  EXPECT_EQ(words("x \u00A0y"), (List{"x", " ", "\u00A0", "y"}));
  EXPECT_EQ(words("e\u0301"), (List{"e", "\u0301"}));
  EXPECT_EQ(words(""), List{});
}

// The scanner is a fast form of the regular expression; both must cut alike.
RC_GTEST_PROP(ByteLevel, ScannerEqualsTheRegularExpression, ()) {
  static const Pattern pattern = Pattern::regex(
      R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)", "test");
  static const std::vector<std::string> pool{" ",          " ",       "  ",
                                             "a",          "B",       "s",
                                             "'",          "'re",     "l",
                                             "1",          "\u00B2",  "\u2160",
                                             ".",          "!",       "-",
                                             "\n",         "\t",      "\u00A0",
                                             "\u3000",     "\u0085",  "\u180E",
                                             "\u00E9",     "e\u0301", "\u65E5",
                                             "\U0001F642", "\u200D",  std::string(1, '\0'),
                                             "\u0E33"};
  const auto parts = *rc::gen::container<std::vector<std::string>>(rc::gen::elementOf(pool));
  std::string text;
  for (const std::string& p : parts) text += p;
  List want;
  for (const Match& m : pattern.find_all(text))
    want.push_back(text.substr(m.begin, m.end - m.begin));
  RC_ASSERT(words(text) == want);
}

}  // namespace
}  // namespace krait::byte_level
