// The tokenizer keys of a GGUF file's metadata, which checkpoint/ reads and tokenizer/ understands.
#pragma once

#include <memory>

#include "checkpoint/gguf.h"
#include "checkpoint/gguf_writer.h"
#include "tokenizer/gguf_vocabulary.h"

namespace krait {

/// The value of tokenizer.ggml.model that says that a file has no tokenizer.
inline constexpr std::string_view kNoVocabulary = "no_vocab";
[[nodiscard]] bool has_vocabulary(const GgufMetadata& metadata);

/// Errors: format (a wrong type).
[[nodiscard]] GgufVocabulary gguf_vocabulary(const GgufMetadata& metadata);

/// The tokenizer in the file; null where there is none.
[[nodiscard]] std::unique_ptr<Tokenizer> gguf_tokenizer(const GgufMetadata& metadata);

/// The other way, for an embedding of `rows` rows: those that no token belongs to become unused
/// tokens "[PAD...]". Error format: more tokens than rows.
void add_vocabulary_keys(const GgufVocabulary& vocabulary, int64_t rows, GgufKeys& keys);

}  // namespace krait
