// Any bytes as text, through two small tokenizers: what comes out are ids of the vocabulary, and
// where nothing can be lost, the text comes back.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "tokenizer/tokenizer_json.h"
#include "tokenizer/unicode.h"

namespace {

using krait::Tokenizer;

/// All 256 bytes as ids 0-255 in the byte-level alphabet, some merges, runs of spaces.
std::unique_ptr<Tokenizer> byte_level() {
  std::string vocab;
  int next = 0x100;
  for (int b = 0; b < 256; ++b) {
    const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    char entry[32];
    std::snprintf(entry, sizeof entry, "\"\\u%04x\":%d,", itself ? b : next, b);
    next += itself ? 0 : 1;
    vocab += entry;
  }
  vocab += R"("\u0120\u0120": 256, "th": 257, "the": 258, "\u0120the": 259, "aa": 260)";
  return krait::parse_tokenizer_json(
      R"({"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
          "decoder": {"type": "ByteLevel"},
          "added_tokens": [{"id": 261, "content": "<|end|>", "special": true, "normalized": false},
                           {"id": 262, "content": "    ", "special": false, "normalized": true}],
          "model": {"type": "BPE", "merges": ["\u0120 \u0120", "t h", "th e", "\u0120 the", "a a"],
                    "vocab": {)" +
          vocab + "}}}",
      "byte level");
}

/// The other components: a regular expression, Falcon's splits, Metaspace, added tokens that strip.
std::unique_ptr<Tokenizer> many_parts() {
  return krait::parse_tokenizer_json(
      R"({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "StripAccents"},
            {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
          "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Punctuation", "behavior": "Contiguous"}, {"type": "Digits", "individual_digits": false},
            {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
             "behavior": "MergedWithPrevious"},
            {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": true}]},
          "decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"},
          "added_tokens": [{"id": 9, "content": "ab", "lstrip": true, "rstrip": true, "normalized": true},
                           {"id": 10, "content": "<x>", "single_word": true, "normalized": false, "special": true}],
          "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "merges": ["a b", "_ a"],
                    "vocab": {"<unk>": 0, "a": 1, "b": 2, "_": 3, "ab": 4, "_a": 5, "1": 6, ".": 7, "e": 8}}})",
      "many parts");
}

std::vector<int32_t> checked_ids(const Tokenizer& t, std::string_view text, bool special) {
  const auto ids = t.encode(text, {.add_special = false, .parse_special = special});
  for (const int32_t id : ids) {
    if (id < 0 || id >= t.vocab_size()) std::abort();
  }
  return ids;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto bytes = byte_level();
  static const auto parts = many_parts();
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::string want =
      krait::unicode::normalize(krait::unicode::to_valid(text), krait::unicode::Form::nfc);
  for (const bool special : {false, true}) {
    // Normalisation stops at special tokens, so only text without them is sure to be NFC.
    const auto ids = checked_ids(*bytes, text, special);
    const bool plain = text.find("<|end|>") == std::string_view::npos;
    if ((plain || !special) && bytes->decode(ids, true) != want) std::abort();
    if (!krait::unicode::is_valid(parts->decode(checked_ids(*parts, text, special), true))) {
      std::abort();
    }
  }
  return 0;
}
