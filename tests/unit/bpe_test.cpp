#include "tokenizer/bpe.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <ctime>

#include "support/test_support.h"

namespace krait {
namespace {

using test::throws;
using Ids = std::vector<int32_t>;
using nlohmann::json;

/// A model whose ids are the places of the tokens in the list.
json model_of(const std::vector<std::string>& tokens, const json& merges) {
  json vocab = json::object();
  for (size_t i = 0; i < tokens.size(); ++i) vocab[tokens[i]] = i;
  return {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}};
}

Ids encode(const json& model, const std::string& word) {
  Ids ids;
  Bpe({model, "model"}).encode(word, ids);
  return ids;
}

const std::vector<std::string> kTokens{"a", "b", "c", "ab", "bc", "abc", "aa"};

TEST(Bpe, LowestRankFirst) {
  // "bc" merges before "ab", although "ab" stands to the left.
  EXPECT_EQ(encode(model_of(kTokens, {"b c", "a b"}), "abc"), (Ids{0, 4}));
  EXPECT_EQ(encode(model_of(kTokens, {"a b", "b c"}), "abc"), (Ids{3, 2}));
  EXPECT_EQ(encode(model_of(kTokens, {"b c", "a bc"}), "abc"), (Ids{5}));
}

TEST(Bpe, LeftmostOnATie) {
  EXPECT_EQ(encode(model_of(kTokens, {"a a"}), "aaa"), (Ids{6, 0}));
  EXPECT_EQ(encode(model_of(kTokens, {"a a"}), std::string(101, 'a')).back(), 0);
}

TEST(Bpe, MergesInBothForms) {
  const json pairs = json::array({json::array({"b", "c"}), json::array({"a", "bc"})});
  EXPECT_EQ(encode(model_of(kTokens, pairs), "abc"), (Ids{5}));
  EXPECT_EQ(encode(model_of(kTokens, {"#version: 0.2", "b c", "a bc"}), "abc"), (Ids{5}));
  // Only pairs can hold tokens with a space.
  EXPECT_EQ(encode(model_of({" ", "a", " a"}, json::array({json::array({" ", "a"})})), " a"),
            (Ids{2}));
}

TEST(Bpe, UnknownCharacters) {
  json model = model_of({"<unk>", "a", "b"}, json::array());
  EXPECT_EQ(encode(model, "axxb"), (Ids{1, 2}));  // dropped
  model["unk_token"] = "<unk>";
  EXPECT_EQ(encode(model, "axxb"), (Ids{1, 0, 0, 2}));
  model["fuse_unk"] = true;
  EXPECT_EQ(encode(model, "axxb\u00E9"), (Ids{1, 0, 2, 0}));
}

TEST(Bpe, ByteFallback) {
  std::vector<std::string> tokens{"<unk>", "a"};
  for (int b = 0; b < 256; ++b) tokens.push_back(fmt::format("<0x{:02X}>", b));
  json model = model_of(tokens, json::array());
  model["unk_token"] = "<unk>";
  EXPECT_EQ(encode(model, "a\u00E9"), (Ids{1, 0}));
  model["byte_fallback"] = true;
  EXPECT_EQ(encode(model, "a\u00E9"), (Ids{1, 2 + 0xC3, 2 + 0xA9}));
  model["vocab"].erase("<0xA9>");  // not all of its bytes are tokens
  EXPECT_EQ(encode(model, "a\u00E9b"), (Ids{1, 0, 2 + 'b'}));
}

TEST(Bpe, IgnoreMerges) {
  json model = model_of(kTokens, {"a b"});
  EXPECT_EQ(encode(model, "abc"), (Ids{3, 2}));
  model["ignore_merges"] = true;
  EXPECT_EQ(encode(model, "abc"), (Ids{5}));
  EXPECT_EQ(encode(model, "abca"), (Ids{3, 2, 0}));
}

TEST(Bpe, PrefixAndSuffix) {
  json model = model_of({"a", "##b", "##c</w>", "a</w>", "ab", "abc</w>"}, {"a ##b", "ab ##c</w>"});
  model["continuing_subword_prefix"] = "##";
  model["end_of_word_suffix"] = "</w>";
  EXPECT_EQ(encode(model, "abc"), (Ids{5}));
  EXPECT_EQ(encode(model, "a"), (Ids{3}));
  EXPECT_EQ(encode(model, "ab"), (Ids{0}));  // "##b</w>" is no token
}

TEST(Bpe, Lookup) {
  const json model = model_of(kTokens, json::array());
  const Bpe bpe({model, "model"});
  EXPECT_EQ(bpe.token_id("bc"), 4);
  EXPECT_EQ(bpe.token_id("x"), std::nullopt);
  EXPECT_EQ(*bpe.token(4), "bc");
  EXPECT_EQ(bpe.token(7), nullptr);
  EXPECT_EQ(bpe.token(-1), nullptr);
}

/// All words over a, b, c of up to four letters, merged from parts in an order drawn at random.
json random_model() {
  const auto merges = *rc::gen::container<std::vector<std::pair<int, int>>>(
      40, rc::gen::pair(rc::gen::inRange(0, 1000), rc::gen::inRange(0, 1000)));
  std::vector<std::string> tokens{"a", "b", "c"};
  json list = json::array();
  for (const auto& [i, j] : merges) {
    const std::string left = tokens[static_cast<size_t>(i) % tokens.size()];
    const std::string right = tokens[static_cast<size_t>(j) % tokens.size()];
    const std::string pair = left + " " + right;
    if (left.size() + right.size() > 12 ||
        std::find(list.begin(), list.end(), pair) != list.end()) {
      continue;
    }
    list.push_back(pair);
    if (std::find(tokens.begin(), tokens.end(), left + right) == tokens.end()) {
      tokens.push_back(left + right);
    }
  }
  return model_of(tokens, list);
}

/// The definition, word for word.
Ids encode_plainly(const json& model, const std::string& word) {
  std::vector<std::string> s;
  for (const char c : word) s.emplace_back(1, c);
  for (;;) {
    size_t best = s.size();
    size_t best_rank = SIZE_MAX;
    for (size_t i = 0; i + 1 < s.size(); ++i) {
      const auto& merges = model["merges"];
      const auto at = std::find(merges.begin(), merges.end(), s[i] + " " + s[i + 1]);
      const auto rank = static_cast<size_t>(at - merges.begin());
      if (at != merges.end() && rank < best_rank) {
        best = i;
        best_rank = rank;
      }
    }
    if (best == s.size()) break;
    s[best] += s[best + 1];
    s.erase(s.begin() + static_cast<ptrdiff_t>(best) + 1);
  }
  Ids ids;
  for (const std::string& token : s) ids.push_back(model["vocab"][token]);
  return ids;
}

// Words on both sides of the limit between the short loop and the heap.
RC_GTEST_PROP(Bpe, ShortAndLongWordsFollowTheDefinition, ()) {
  const json model = random_model();
  const Bpe bpe({model, "model"});
  const auto length = *rc::gen::inRange<size_t>(0, 100);
  const auto word =
      *rc::gen::container<std::string>(length, rc::gen::elementOf(std::string("abc")));
  Ids ids{42};  // what is there stays
  bpe.encode(word, ids);
  Ids want = encode_plainly(model, word);
  want.insert(want.begin(), 42);
  RC_ASSERT(ids == want);
}

RC_GTEST_PROP(Bpe, TheCacheChangesNothing, ()) {
  const json model = random_model();
  const Bpe bpe({model, "model"});
  WordCache cache;
  const auto words = *rc::gen::container<std::vector<std::string>>(
      rc::gen::container<std::string>(rc::gen::elementOf(std::string("abc"))));
  Ids with;
  Ids without;
  for (int round = 0; round < 2; ++round) {
    for (const std::string& word : words) {
      cache.encode(bpe, word, with);
      bpe.encode(word, without);
    }
  }
  RC_ASSERT(with == without);
}

TEST(Bpe, AMegabyteWithoutASpaceIsNotQuadratic) {
  std::vector<std::string> tokens{"a"};
  json merges = json::array();
  while (tokens.back().size() < 4096) {  // a a, aa aa, ...
    merges.push_back(tokens.back() + " " + tokens.back());
    tokens.push_back(tokens.back() + tokens.back());
  }
  const std::clock_t start = std::clock();
  EXPECT_EQ(encode(model_of(tokens, merges), std::string(1 << 20, 'a')), Ids(256, 12));
  EXPECT_LT(std::clock() - start, 10 * CLOCKS_PER_SEC);  // CPU time
}

TEST(Bpe, Errors) {
  const auto fails = [](ErrorKind kind, const char* part, const json& model) {
    return throws(kind, part, [&] { Bpe({model, "model"}); });
  };
  EXPECT_TRUE(fails(ErrorKind::unsupported, "the model Unigram is not built",
                    {{"type", "Unigram"}, {"vocab", json::array()}}));
  EXPECT_TRUE(
      fails(ErrorKind::unsupported, "without type and merges", {{"vocab", json::object()}}));
  EXPECT_TRUE(fails(ErrorKind::format, "\"vocab\" is missing", {{"type", "BPE"}}));
  EXPECT_TRUE(fails(ErrorKind::format, "\"merges\" is missing",
                    {{"type", "BPE"}, {"vocab", json::object()}}));
  EXPECT_TRUE(fails(ErrorKind::format, "model.vocab: expected an object",
                    {{"vocab", json::array()}, {"merges", json::array()}}));
  EXPECT_TRUE(fails(ErrorKind::format, "model.merges[1]: the token \"d\" is not in the vocabulary",
                    model_of(kTokens, {"a b", "a d"})));
  EXPECT_TRUE(fails(ErrorKind::format, "the token \"ca\" is not in the vocabulary",
                    model_of(kTokens, {"c a"})));
  EXPECT_TRUE(fails(ErrorKind::format, "expected two tokens with a space between",
                    model_of(kTokens, {"ab"})));
  EXPECT_TRUE(fails(ErrorKind::format, "expected two tokens", model_of(kTokens, {"a b c"})));
  EXPECT_TRUE(fails(ErrorKind::format, "expected \"a b\" or [\"a\", \"b\"], found 7",
                    model_of(kTokens, {7})));
  json model = model_of(kTokens, json::array());
  model["unk_token"] = "<unk>";
  EXPECT_TRUE(fails(ErrorKind::format, "the unk_token <unk> is not in the vocabulary", model));
  // An id is no promise of a table of its size.
  for (const json& id : {json(-1), json(2'000'000'000), json(1ULL << 63), json(1.5), json("1")}) {
    model = model_of(kTokens, json::array());
    model["vocab"]["z"] = id;
    EXPECT_TRUE(fails(ErrorKind::format, "the id of token \"z\" should be a number", model)) << id;
  }
}

}  // namespace
}  // namespace krait
