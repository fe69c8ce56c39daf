#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <nlohmann/json.hpp>

#include "support/test_support.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/tokenizer_json.h"

namespace krait {
namespace {

/// Bytes as tokens 0-255 ("<0xNN>"), then ▁a = 256, ▁ = 257 and the special token <eos> = 258.
const Tokenizer& byte_tokenizer() {
  static const auto tokenizer = [] {
    nlohmann::json vocab;
    for (int b = 0; b < 256; ++b) vocab[fmt::format("<0x{:02X}>", b)] = b;
    vocab
        ["\u2581"
         "a"] = 256;
    vocab["\u2581"] = 257;
    const nlohmann::json json{
        {"model",
         {{"type", "BPE"},
          {"byte_fallback", true},
          {"vocab", vocab},
          {"merges", nlohmann::json::array()}}},
        {"added_tokens",
         {{{"id", 258}, {"content", "<eos>"}, {"special", true}, {"normalized", false}}}},
        {"decoder",
         {{"type", "Sequence"},
          {"decoders",
           {{{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}},
            {{"type", "ByteFallback"}},
            {{"type", "Fuse"}},
            {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}}};
    return parse_tokenizer_json(json.dump(), "test");
  }();
  return *tokenizer;
}

TEST(StreamDecoder, HoldsBackWhatMayBecomeACharacter) {
  StreamDecoder d(byte_tokenizer());
  EXPECT_EQ(d.push(0xF0), "");
  EXPECT_EQ(d.push(0x9F), "");
  EXPECT_EQ(d.push(0x99), "");
  EXPECT_EQ(d.push(0x82), "\U0001F642");
  EXPECT_EQ(d.push('x'), "x");
  EXPECT_EQ(d.push(0xC3), "");
  EXPECT_EQ(d.push('y'), "\uFFFDy");  // it can no longer become one
  EXPECT_EQ(d.push(0xFF), "\uFFFD");
  EXPECT_EQ(d.push(0xE6), "");
  EXPECT_EQ(d.finish(), "\uFFFD");
  EXPECT_EQ(d.finish(), "");
}

TEST(StreamDecoder, TheFirstSpaceIsDroppedOnlyAtTheStartOfTheText) {
  StreamDecoder start(byte_tokenizer(), true);
  EXPECT_EQ(start.push(256), "a");
  EXPECT_EQ(start.push(256), " a");
  StreamDecoder later(byte_tokenizer());
  EXPECT_EQ(later.push(256), " a");
  StreamDecoder space(byte_tokenizer(), true);
  EXPECT_EQ(space.push(257), "");
  EXPECT_EQ(space.push(256), " a");
}

TEST(StreamDecoder, TokensThatAreNotShownDoNotBeginTheText) {
  StreamDecoder d(byte_tokenizer(), true);
  EXPECT_EQ(d.push(258), "");
  EXPECT_EQ(d.push(-1), "");
  EXPECT_EQ(d.push(100000), "");
  EXPECT_EQ(d.push(256), "a");
  StreamDecoder special(byte_tokenizer(), true, true);
  EXPECT_EQ(special.push(258), "<eos>");
  EXPECT_EQ(special.push(256), " a");
}

RC_GTEST_PROP(StreamDecoder, EqualsTheWholeDecode, ()) {
  const auto ids = *rc::gen::container<std::vector<int32_t>>(rc::gen::inRange(-1, 261));
  StreamDecoder d(byte_tokenizer(), true);
  std::string text;
  for (const int32_t id : ids) text += d.push(id);
  text += d.finish();
  RC_ASSERT(text == byte_tokenizer().decode(ids));
}

/// What a matcher shows of text that comes in pieces of the given sizes.
std::string show(const std::vector<std::string>& stops, std::string_view text,
                 const std::vector<size_t>& sizes = {}) {
  StopMatcher matcher(stops);
  std::string shown;
  for (const size_t size : sizes) {
    shown += matcher.push(text.substr(0, size));
    text.remove_prefix(std::min(size, text.size()));
  }
  shown += matcher.push(text);
  return shown + matcher.finish();
}

TEST(StopMatcher, HoldsBackWhatMayBeginAStop) {
  StopMatcher m({"END"});
  EXPECT_EQ(m.push("abE"), "ab");
  EXPECT_EQ(m.push("EN"), "E");
  EXPECT_EQ(m.push("x"), "ENx");
  EXPECT_EQ(m.push("E"), "");
  EXPECT_EQ(m.push("ND tail"), "");
  EXPECT_TRUE(m.stopped());
  EXPECT_EQ(m.push("more"), "");
  EXPECT_EQ(m.finish(), "");
}

TEST(StopMatcher, FinishShowsWhatWasHeldBack) {
  StopMatcher m({"END"});
  EXPECT_EQ(m.push("EN"), "");
  EXPECT_EQ(m.finish(), "EN");
  EXPECT_FALSE(m.stopped());
}

TEST(StopMatcher, TheStopThatIsCompleteFirstWins) {
  EXPECT_EQ(show({"abcd", "bc"}, "xabcd"), "xa");
  EXPECT_EQ(show({"bc", "abc"}, "xabcd"), "x");  // of two that end together, the longer
  EXPECT_EQ(show({"aab"}, "aaab"), "a");
  EXPECT_EQ(show({"abab"}, "abaabab"), "aba");
  EXPECT_EQ(show({"", "z"}, "abc"), "abc");
  EXPECT_EQ(show({}, "abc"), "abc");
}

RC_GTEST_PROP(StopMatcher, DoesNotDependOnHowTheTextIsCut, ()) {
  const auto word = rc::gen::container<std::string>(rc::gen::elementOf(std::string("ab")));
  const auto stops = *rc::gen::container<std::vector<std::string>>(word);
  const std::string text = *word + *word;
  const auto sizes = *rc::gen::container<std::vector<size_t>>(rc::gen::inRange<size_t>(0, 4));
  const std::string whole = show(stops, text);
  RC_ASSERT(show(stops, text, sizes) == whole);
  RC_ASSERT(text.starts_with(whole));
  for (const std::string& stop : stops) {
    RC_ASSERT(stop.empty() || whole.find(stop) == std::string::npos);
  }
}

}  // namespace
}  // namespace krait
