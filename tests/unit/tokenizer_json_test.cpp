// A whole small tokenizer.json: what its parts do together, the files beside it, and damage.
#include "tokenizer/tokenizer_json.h"

#include <nlohmann/json.hpp>

#include "support/test_support.h"

namespace krait {
namespace {

using nlohmann::json;
using test::ScratchDir;
using test::throws;
using test::write_file;
using Ids = std::vector<int32_t>;

json small() {
  return json::parse(R"({
    "version": "1.0", "truncation": null, "padding": null,
    "added_tokens": [
      {"id": 0, "content": "<s>", "special": true, "normalized": false},
      {"id": 8, "content": "<|end|>", "special": true, "normalized": false},
      {"id": 9, "content": "  ", "special": false, "normalized": true}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "\u0120": 4,
              "\u00c3": 5, "\u00a9": 6, "<": 7}, "merges": ["a b"]}})");
}

std::unique_ptr<Tokenizer> parse(const json& j, const SpecialNames& names = {}) {
  return parse_tokenizer_json(j.dump(), "tokenizer.json", names);
}

TEST(TokenizerJson, Encodes) {
  const auto t = parse(small());
  EXPECT_EQ(t->encode("ab ba"), (Ids{3, 4, 2, 1}));
  EXPECT_EQ(t->encode("ab   b"), (Ids{3, 9, 4, 2}));
  EXPECT_EQ(t->encode("e\u0301"), (Ids{5, 6}));  // composed first
  EXPECT_EQ(t->encode(""), Ids{});
  EXPECT_EQ(t->encode("ab", {.add_special = true}), (Ids{0, 3}));
  EXPECT_EQ(t->encode("a<s>b"), (Ids{1, 0, 2}));
  EXPECT_EQ(t->encode("a<s>  b", {.parse_special = false}), (Ids{1, 7, 9, 2}));
}

TEST(TokenizerJson, Decodes) {
  const auto t = parse(small());
  EXPECT_EQ(t->decode(Ids{0, 3, 4, 5, 6, 9}), "ab \u00E9  ");
  EXPECT_EQ(t->decode(Ids{0, 3, 8}, true), "<s>ab<|end|>");
  EXPECT_EQ(t->decode(Ids{5, 1}), "\uFFFDa");
  EXPECT_EQ(t->decode(Ids{-1, 1, 10, 1 << 30}), "a");
  EXPECT_EQ(t->token_bytes(5, true, false), "\xC3");
}

TEST(TokenizerJson, Listing) {
  const auto t = parse(small());
  EXPECT_EQ(t->vocab_size(), 10);
  EXPECT_EQ(t->token_text(4), "\u0120");
  EXPECT_EQ(t->token_text(8), "<|end|>");
  EXPECT_EQ(t->token_text(10), "");
  EXPECT_EQ(t->token_id("ab"), 3);
  EXPECT_EQ(t->token_id("<|end|>"), 8);
  EXPECT_EQ(t->token_id("zz"), std::nullopt);
  EXPECT_TRUE(t->is_special(0) && t->is_special(8));
  EXPECT_FALSE(t->is_special(9) || t->is_special(3) || t->is_special(100));
  EXPECT_EQ(t->description(), "bpe (tokenizer.json)");
}

TEST(TokenizerJson, InvalidBytesAreReadAsReplacementCharacters) {
  json j = small();
  j["model"]["vocab"]["\u00EF"] = 10;  // U+FFFD is EF BF BD
  const auto t = parse(j);
  EXPECT_EQ(t->encode("a\xFF"
                      "b"),
            (Ids{1, 10, 2}));
}

TEST(TokenizerJson, FilesBesideItNameTheEnds) {
  const ScratchDir dir;
  write_file(dir.path() / "tokenizer.json", small().dump());
  auto t = open_tokenizer(dir.path());
  EXPECT_EQ(t->bos_id(), 0);  // "<s>" by custom
  EXPECT_EQ(t->eos_id(), std::nullopt);

  write_file(dir.path() / "tokenizer_config.json", R"({"bos_token": null})");
  EXPECT_EQ(open_tokenizer(dir.path())->bos_id(), std::nullopt);

  write_file(dir.path() / "special_tokens_map.json",
             R"({"bos_token": "b", "eos_token": {"content": "<|end|>", "lstrip": false}})");
  t = open_tokenizer(dir.path());
  EXPECT_EQ(t->bos_id(), 2);
  EXPECT_EQ(t->eos_id(), 8);

  write_file(dir.path() / "tokenizer_config.json", R"({"bos_token": null, "eos_token": "a"})");
  t = open_tokenizer_json(dir.path() / "tokenizer.json");
  EXPECT_EQ(t->bos_id(), 2);
  EXPECT_EQ(t->eos_id(), 1);

  write_file(dir.path() / "tokenizer_config.json", "{");
  EXPECT_TRUE(throws(ErrorKind::format, "tokenizer_config.json is not valid JSON",
                     [&] { (void)open_tokenizer(dir.path()); }));
  write_file(dir.path() / "tokenizer_config.json", R"({"eos_token": 5})");
  EXPECT_TRUE(throws(ErrorKind::format, "eos_token: expected a string, found number",
                     [&] { (void)open_tokenizer(dir.path()); }));
}

TEST(TokenizerJson, FilesThatAreNotThere) {
  const ScratchDir dir;
  EXPECT_TRUE(throws(ErrorKind::file, "holds neither tokenizer.json nor tokenizer.model",
                     [&] { (void)open_tokenizer(dir.path()); }));
  EXPECT_TRUE(throws(ErrorKind::file, "does not exist",
                     [&] { (void)open_tokenizer(dir.path() / "none.json"); }));
  EXPECT_TRUE(throws(ErrorKind::file, "none.json cannot be read: No such file",
                     [&] { (void)open_tokenizer_json(dir.path() / "none.json"); }));
  EXPECT_TRUE(
      throws(ErrorKind::file, "is a folder", [&] { (void)open_tokenizer_json(dir.path()); }));
}

TEST(TokenizerJson, AnyCutOfTheFileIsAnError) {
  const std::string text = small().dump();
  for (size_t n = 0; n < text.size(); ++n) {
    EXPECT_TRUE(throws(ErrorKind::format, "is not valid JSON",
                       [&] { (void)parse_tokenizer_json(text.substr(0, n), "t.json"); }));
  }
}

TEST(TokenizerJson, EveryPartMissingOrOfAnotherTypeIsASentenceOrFine) {
  const std::vector<json> others{nullptr, 1, "x", json::array(), json::object(), -5, true};
  const json flat = small().flatten();
  for (const auto& [path, value] : flat.items()) {
    for (const json& other : others) {
      json damaged = small();
      damaged[json::json_pointer(path)] = other;
      try {
        (void)parse(damaged)->encode("ab <s>  e\u0301");
      } catch (const Error& e) {
        EXPECT_EQ(e.message().rfind("tokenizer.json", 0), 0U) << path << ": " << e.message();
      }
    }
  }
}

TEST(TokenizerJson, Errors) {
  EXPECT_TRUE(throws(ErrorKind::format, "t.json: expected an object, found array",
                     [] { (void)parse_tokenizer_json("[]", "t.json"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "t.json: the key \"model\" is missing",
                     [] { (void)parse_tokenizer_json("{}", "t.json"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "is not valid JSON",
                     [] { (void)parse_tokenizer_json(std::string(1 << 20, '['), "t.json"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "has a number that is out of range",
                     [] { (void)parse_tokenizer_json(R"({"model": 1e999})", "t.json"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "expected an object, found array", [] {
    (void)parse_tokenizer_json(std::string(1 << 20, '[') + std::string(1 << 20, ']'), "t.json");
  }));
  json j = small();
  j["decoder"] = {{"type", "CTC"}};
  EXPECT_TRUE(throws(ErrorKind::unsupported, "tokenizer.json.decoder: the decoder CTC is not built",
                     [&] { (void)parse(j); }));
}

}  // namespace
}  // namespace krait
