#include "tokenizer/unicode.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <ctime>

#include "support/test_support.h"

namespace krait::unicode {
namespace {

TEST(Unicode, IllFormedBytesBecomeOneReplacementForEachMaximalSubpart) {
  // Table 3-8 of the Unicode standard, and its neighbours.
  EXPECT_EQ(to_valid("a\xF1\x80\x80\xE1\x80\xC2"
                     "b\x80"
                     "c\x80\xBF"
                     "d"),
            "a\uFFFD\uFFFD\uFFFDb\uFFFDc\uFFFD\uFFFDd");
  EXPECT_EQ(to_valid("\xC0\xAF"), "\uFFFD\uFFFD");                      // overlong
  EXPECT_EQ(to_valid("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");            // surrogate
  EXPECT_EQ(to_valid("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");  // beyond U+10FFFF
  EXPECT_EQ(to_valid("\xE2\x82"), "\uFFFD");                            // cut short
  EXPECT_EQ(to_valid("\xF4\x8F\xBF\xBF"), "\U0010FFFF");
  EXPECT_EQ(to_valid(std::string("a\0b", 3)), std::string("a\0b", 3));
}

TEST(Unicode, EveryCharacterSurvivesEncodingAndDecoding) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string s;
    append(s, c);
    const Scan found = scan(s, 0);
    ASSERT_EQ(found.kind, Scan::Kind::valid) << uint32_t{c};
    ASSERT_EQ(found.code, c);
    ASSERT_EQ(found.length, s.size());
    ASSERT_EQ(next(s, 0).code, c);
    ASSERT_EQ(next(s, 0).length, s.size());
    ASSERT_EQ(previous("x" + s, 1 + s.size()), 1U);
    for (size_t n = 1; n < s.size(); ++n) {
      ASSERT_EQ(scan(std::string_view(s).substr(0, n), 0).kind, Scan::Kind::incomplete);
    }
  }
}

RC_GTEST_PROP(Unicode, RepairIsValidAndLeavesValidTextAlone, (const std::string& bytes)) {
  const std::string repaired = to_valid(bytes);
  RC_ASSERT(is_valid(repaired));
  RC_ASSERT(is_valid(bytes) == (repaired == bytes));
}

RC_GTEST_PROP(Unicode, TakeValidInPiecesEqualsTheWhole, (const std::string& bytes)) {
  std::string held;
  std::string text;
  for (const char b : bytes) {
    held += b;
    text += take_valid(held, false);
    RC_ASSERT(held.size() <= 3U);
  }
  text += take_valid(held, true);
  RC_ASSERT(text == to_valid(bytes));
}

TEST(Unicode, Classes) {
  for (const char32_t c : {0x09U, 0x0DU, 0x20U, 0x85U, 0xA0U, 0x2028U, 0x3000U}) {
    EXPECT_TRUE(is_white_space(c)) << uint32_t{c};
  }
  for (const char32_t c : {0x08U, 0x0EU, 0x1CU, 0x180EU, 0x200BU, 0xFEFFU}) {
    EXPECT_FALSE(is_white_space(c)) << uint32_t{c};
  }
  EXPECT_TRUE(is_letter(U'\u00AA') && is_letter(U'\u65E5') && is_letter(U'\u02B0'));
  EXPECT_FALSE(is_letter(U'\u0301') || is_letter(U'\u2160') || is_letter('_'));
  EXPECT_TRUE(is_numeric(U'\u00B2') && is_numeric(U'\u2160') && is_numeric(U'\u0660'));
  EXPECT_TRUE(is_punctuation('$') && is_punctuation('`') && is_punctuation(U'\u3002'));
  EXPECT_FALSE(is_punctuation(U'\u20AC') || is_punctuation(' ') || is_punctuation(0x7F));
  EXPECT_TRUE(is_word('_') && is_word(U'\u0301') && is_word(U'\u24B6') && is_word(U'\u200D'));
  EXPECT_FALSE(is_word(U'\u00B2') || is_word('-'));
}

TEST(Unicode, NormalizationForms) {
  // From the examples of UAX 15: composed and decomposed, order of marks, exclusions, Hangul.
  const std::string decomposed = "A\u030A";
  EXPECT_EQ(normalize(decomposed, Form::nfc), "\u00C5");
  EXPECT_EQ(normalize("\u212B", Form::nfc), "\u00C5");
  EXPECT_EQ(normalize("\u00C5", Form::nfd), decomposed);
  EXPECT_EQ(normalize("q\u0307\u0323", Form::nfc), "q\u0323\u0307");
  EXPECT_EQ(normalize("\u1E0B\u0323", Form::nfc), "\u1E0D\u0307");
  EXPECT_EQ(normalize("\u0958", Form::nfc), "\u0915\u093C");
  EXPECT_EQ(normalize("\u1112\u1161\u11AB", Form::nfc), "\uD55C");
  EXPECT_EQ(normalize("\uAC00\u11A8", Form::nfc), "\uAC01");
  EXPECT_EQ(normalize("\uD55C", Form::nfd), "\u1112\u1161\u11AB");
  EXPECT_EQ(normalize("\uFB01\u2460\u00BD", Form::nfc), "\uFB01\u2460\u00BD");
  EXPECT_EQ(normalize("\uFB01\u2460\u00BD", Form::nfkc), "fi11\u20442");
  EXPECT_EQ(normalize("\u1E9B\u0323", Form::nfkd), "s\u0323\u0307");
  EXPECT_EQ(normalize("", Form::nfc), "");
}

rc::Gen<std::string> gen_text() {
  // Characters that compose, reorder or stay, so that neighbours meet often.
  static const std::vector<char32_t> pool{'a',    'A',    ' ',    0xE9,   0x300,  0x301,  0x323,
                                          0x327,  0x30A,  0x212B, 0x1100, 0x1161, 0x11A8, 0xAC00,
                                          0x4E00, 0xFB01, 0x958,  0x93C,  0x3099, 0x304B, 0x1D15E};
  return rc::gen::map(rc::gen::container<std::vector<char32_t>>(rc::gen::elementOf(pool)),
                      [](const std::vector<char32_t>& codes) {
                        std::string s;
                        for (const char32_t c : codes) append(s, c);
                        return s;
                      });
}

RC_GTEST_PROP(Unicode, NormalFormsRelateAsTheStandardSays, ()) {
  const std::string text = *gen_text();
  const std::string nfc = normalize(text, Form::nfc);
  const std::string nfd = normalize(text, Form::nfd);
  RC_ASSERT(normalize(nfc, Form::nfc) == nfc);
  RC_ASSERT(normalize(nfd, Form::nfd) == nfd);
  RC_ASSERT(normalize(nfd, Form::nfc) == nfc);
  RC_ASSERT(normalize(nfc, Form::nfd) == nfd);
  RC_ASSERT(normalize(normalize(text, Form::nfkd), Form::nfkc) == normalize(text, Form::nfkc));
}

TEST(Unicode, AMegabyteOfMarksInTheWrongOrderIsNotQuadratic) {
  std::string marks = "a";
  while (marks.size() < (1U << 20)) marks += "\u0301\u0323";
  const std::clock_t start = std::clock();
  const std::string sorted = normalize(marks, Form::nfd);
  EXPECT_LT(std::clock() - start, 5 * CLOCKS_PER_SEC);  // CPU time
  EXPECT_EQ(sorted.size(), marks.size());
  EXPECT_EQ(sorted.substr(0, 5), "a\u0323\u0323");
}

TEST(Unicode, LowerCase) {
  EXPECT_EQ(to_lower("\u00C9T\u00C9 \u0130 \u1E9E \u03A3"), "\u00E9t\u00E9 i\u0307 \u00DF \u03C3");
}

}  // namespace
}  // namespace krait::unicode
