#include "cli/gguf_vocabulary.h"

#include "base/error.h"

namespace krait {

namespace {

constexpr std::string_view kPrefix = "tokenizer.ggml.";
std::string key(std::string_view name) { return std::string(kPrefix).append(name); }

}  // namespace

bool has_vocabulary(const GgufMetadata& m) {
  const auto model = m.text(key("model"));
  return model && *model != kNoVocabulary;
}

GgufVocabulary gguf_vocabulary(const GgufMetadata& m) {
  GgufVocabulary v;
  v.file = m.file();
  v.model = m.text(key("model")).value_or("");
  v.pre = m.text(key("pre")).value_or("");
  const auto texts = [&](std::string_view name) {
    const auto views = m.texts(key(name));
    return std::vector<std::string>(views.begin(), views.end());
  };
  v.tokens = texts("tokens");
  v.types = m.integers(key("token_type"));
  v.scores = m.numbers(key("scores"));
  v.merges = texts("merges");
  if (const auto* map = m.find(key("precompiled_charsmap"))) {
    if (!map->is_array || map->bytes.size() != map->count) {
      m.fail(key("precompiled_charsmap"), "an array of bytes");
    }
    v.charsmap.assign(reinterpret_cast<const char*>(map->bytes.data()), map->bytes.size());
  }
  v.bos_id = m.integer(key("bos_token_id"));
  v.eos_id = m.integer(key("eos_token_id"));
  v.unknown_id = m.integer(key("unknown_token_id"));
  v.padding_id = m.integer(key("padding_token_id"));
  v.add_bos = m.boolean(key("add_bos_token"));
  v.add_eos = m.boolean(key("add_eos_token"));
  v.add_space_prefix = m.boolean(key("add_space_prefix"));
  v.remove_extra_whitespaces = m.boolean(key("remove_extra_whitespaces"));
  return v;
}

std::unique_ptr<Tokenizer> gguf_tokenizer(const GgufMetadata& m) {
  return has_vocabulary(m) ? make_gguf_tokenizer(gguf_vocabulary(m)) : nullptr;
}

void add_vocabulary_keys(const GgufVocabulary& vocabulary, int64_t rows, GgufKeys& keys) {
  GgufVocabulary v = vocabulary;
  if (std::ssize(v.tokens) > rows) {
    throw Error(ErrorKind::format,
                fmt::format("the tokenizer {} has {} tokens, the model rows for {}", v.file,
                            v.tokens.size(), rows),
                "name the model's own with --tokenizer, or leave it out with --no-tokenizer");
  }
  constexpr float kUnusedScore = -10000;
  if (v.types.empty()) v.types.resize(v.tokens.size(), GgufVocabulary::normal);
  while (std::ssize(v.tokens) < rows) {
    v.tokens.push_back(fmt::format("[PAD{}]", v.tokens.size()));
    v.types.push_back(GgufVocabulary::unused);
    if (!v.scores.empty()) v.scores.push_back(kUnusedScore);
  }
  keys.text(key("model"), v.model);
  keys.text(key("pre"), v.pre);
  keys.texts(key("tokens"), v.tokens);
  if (!v.scores.empty()) keys.floats(key("scores"), v.scores);
  keys.i32s(key("token_type"), {v.types.begin(), v.types.end()});
  if (!v.merges.empty()) keys.texts(key("merges"), v.merges);
  const auto id = [&](const char* name, const std::optional<int64_t>& value) {
    if (value) keys.u32(key(name), static_cast<uint32_t>(*value));
  };
  id("bos_token_id", v.bos_id);
  id("eos_token_id", v.eos_id);
  id("unknown_token_id", v.unknown_id);
  id("padding_token_id", v.padding_id);
  const auto flag = [&](const char* name, const std::optional<bool>& value) {
    if (value) keys.boolean(key(name), *value);
  };
  flag("add_bos_token", v.add_bos);
  flag("add_eos_token", v.add_eos);
  flag("add_space_prefix", v.add_space_prefix);
  flag("remove_extra_whitespaces", v.remove_extra_whitespaces);
  if (!v.charsmap.empty()) keys.u8s(key("precompiled_charsmap"), v.charsmap);
}

}  // namespace krait
