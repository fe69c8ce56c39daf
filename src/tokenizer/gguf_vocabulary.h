// The vocabulary that a GGUF file carries (keys tokenizer.ggml.*). It is not a third kind of
// tokenizer: "gpt2" is turned into a tokenizer.json, "llama" and "t5" into a SentencePiece model,
// and those are opened. The same forms are what `convert` writes beside a safetensors file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/special_names.h"
#include "tokenizer/tokenizer.h"

namespace krait {

struct GgufVocabulary {
  enum TokenType : int64_t { normal = 1, unknown, control, user_defined, unused, byte };

  std::string file;   ///< for messages
  std::string model;  ///< "gpt2", "llama", "t5"
  std::string pre;    ///< gpt2: how text is cut into words; empty where the file does not say
  std::vector<std::string> tokens;  ///< by id
  std::vector<int64_t> types;       ///< TokenType; empty: all normal
  std::vector<float> scores;        ///< llama, t5
  std::vector<std::string> merges;  ///< gpt2: "a b", best first
  std::string charsmap;             ///< t5: table of the normaliser
  std::optional<int64_t> bos_id, eos_id, unknown_id, padding_id;
  std::optional<bool> add_bos, add_eos, add_space_prefix, remove_extra_whitespaces;
};

/// Errors: format (lists of different lengths, text that is not UTF-8, ids out of range, no
/// tokens), unsupported (another model). The same for the functions below.
[[nodiscard]] std::unique_ptr<Tokenizer> make_gguf_tokenizer(const GgufVocabulary& vocabulary);

/// Whether the vocabulary is of the kind that a SentencePiece model holds.
[[nodiscard]] bool is_sentencepiece(const GgufVocabulary& vocabulary);
/// A vocabulary of model "gpt2" as a tokenizer.json.
[[nodiscard]] nlohmann::json gguf_tokenizer_json(const GgufVocabulary& vocabulary);
/// A vocabulary of another model as the bytes of a SentencePiece model.
[[nodiscard]] std::string gguf_sentencepiece(const GgufVocabulary& vocabulary);
/// The other way: the vocabulary of a tokenizer.json or SentencePiece .model file, with the special
/// tokens that the files beside it name. Error unsupported: a component that GGUF has no word for.
[[nodiscard]] GgufVocabulary read_gguf_vocabulary(const std::filesystem::path& tokenizer_file);
/// The special tokens, as tokenizer_config.json would name them.
[[nodiscard]] SpecialNames gguf_special_names(const GgufVocabulary& vocabulary);

}  // namespace krait
