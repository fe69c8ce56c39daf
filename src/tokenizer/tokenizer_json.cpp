#include "tokenizer/tokenizer_json.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/decoder.h"
#include "tokenizer/json_node.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/post_processor.h"
#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/stream.h"
#include "tokenizer/unicode.h"

namespace krait {

namespace {

std::optional<JsonNode> component(const JsonNode& root, std::string_view key) {
  if (!root.has(key)) return std::nullopt;
  return root.at(key);
}

const JsonNode* pointer(const std::optional<JsonNode>& node) { return node ? &*node : nullptr; }

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(const JsonNode& root, const SpecialNames& names, std::string description)
      : description_(std::move(description)),
        normalizer_(root.has("normalizer") ? make_normalizer(root.at("normalizer")) : nullptr),
        pre_tokenizer_(root.has("pre_tokenizer") ? make_pre_tokenizer(root.at("pre_tokenizer"))
                                                 : nullptr),
        decoder_(pointer(component(root, "decoder"))),
        added_(pointer(component(root, "added_tokens")), normalizer_.get()),
        bpe_(root.at("model")) {
    if (root.has("post_processor")) surround_ = read_post_processor(root.at("post_processor"));
    if (names.found) {
      bos_ = first_known({names.bos.value_or("")});
      eos_ = first_known({names.eos.value_or("")});
    } else {
      // A tokenizer.json by itself does not say: Llama's two tokens or GPT-2's one, by custom.
      bos_ = first_known({"<s>", "<|endoftext|>"});
      eos_ = first_known({"</s>", "<|endoftext|>"});
    }
  }

  [[nodiscard]] int64_t vocab_size() const override {
    return std::max(bpe_.size(), added_.largest_id() + 1);
  }

  [[nodiscard]] std::vector<int32_t> encode(std::string_view text,
                                            EncodeOptions options) const override {
    std::string repaired;
    if (!unicode::is_valid(text)) text = repaired = unicode::to_valid(text);

    std::vector<int32_t> ids;
    if (options.add_special) ids = surround_.before;
    WordCache cache;
    for (const Section& raw : added_.split(text, false, options.parse_special)) {
      if (raw.id) {
        ids.push_back(*raw.id);
        continue;
      }
      const std::string clean =
          normalizer_ ? normalizer_->normalize(raw.text) : std::string(raw.text);
      for (const Section& section : added_.split(clean, true, options.parse_special)) {
        if (section.id) {
          ids.push_back(*section.id);
          continue;
        }
        const bool at_start = raw.text.data() == text.data() && section.text.data() == clean.data();
        Words words(std::string(section.text), at_start);
        if (pre_tokenizer_) pre_tokenizer_->apply(words);
        for (const Words::Span& s : words.spans) cache.encode(bpe_, words.word(s), ids);
      }
    }
    if (options.add_special) {
      ids.insert(ids.end(), surround_.after.begin(), surround_.after.end());
    }
    return ids;
  }

  [[nodiscard]] std::string token_bytes(int32_t id, bool first, bool special) const override {
    if (const AddedToken* token = added_.find(id)) {
      return token->special && !special ? std::string() : decoder_.bytes(token->content, first);
    }
    const std::string* token = bpe_.token(id);
    return token == nullptr ? std::string() : decoder_.bytes(*token, first);
  }

  [[nodiscard]] std::string decode(std::span<const int32_t> ids, bool special) const override {
    return decode_by_stream(*this, ids, special);
  }

  [[nodiscard]] std::string token_text(int32_t id) const override {
    if (const AddedToken* token = added_.find(id)) return token->content;
    const std::string* token = bpe_.token(id);
    return token == nullptr ? std::string() : *token;
  }

  [[nodiscard]] std::optional<int32_t> token_id(std::string_view token) const override {
    if (const AddedToken* added = added_.find(token)) return added->id;
    return bpe_.token_id(token);
  }

  [[nodiscard]] bool is_special(int32_t id) const override {
    const AddedToken* token = added_.find(id);
    return token != nullptr && token->special;
  }

  [[nodiscard]] std::optional<int32_t> bos_id() const override { return bos_; }
  [[nodiscard]] std::optional<int32_t> eos_id() const override { return eos_; }
  [[nodiscard]] std::string description() const override { return description_; }

 private:
  [[nodiscard]] std::optional<int32_t> first_known(
      std::initializer_list<std::string> tokens) const {
    for (const std::string& token : tokens) {
      if (token.empty()) continue;
      if (const auto id = token_id(token)) return id;
    }
    return std::nullopt;
  }

  std::string description_;
  std::unique_ptr<Normalizer> normalizer_;
  std::unique_ptr<PreTokenizer> pre_tokenizer_;
  Decoder decoder_;
  AddedTokens added_;
  Bpe bpe_;
  Surround surround_;
  std::optional<int32_t> bos_;
  std::optional<int32_t> eos_;
};

}  // namespace

std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text, const std::string& name,
                                                const SpecialNames& names) {
  const nlohmann::json json = parse_json(text, name);
  const JsonNode root(json, name);
  root.expect_object();
  return make_tokenizer_json(root, names, "bpe (tokenizer.json)");
}

std::unique_ptr<Tokenizer> make_tokenizer_json(const JsonNode& root, const SpecialNames& names,
                                               std::string description) {
  return std::make_unique<BpeTokenizer>(root, names, std::move(description));
}

}  // namespace krait
