// A SentencePiece .model file. The library encodes; decoding, which must work token by token, and
// the listing of pieces are ours.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tokenizer/special_names.h"
#include "tokenizer/tokenizer.h"

namespace krait {

/// From the bytes of the file; `name` stands in front of messages.
[[nodiscard]] std::unique_ptr<Tokenizer> parse_sentencepiece(std::string_view bytes,
                                                             const std::string& name,
                                                             const SpecialNames& names = {});

}  // namespace krait
