#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "tokenizer/tokenizer.h"

namespace krait {

/// The whole text of `ids`: by definition what a StreamDecoder at the start of the text gives.
[[nodiscard]] std::string decode_by_stream(const Tokenizer& tokenizer, std::span<const int32_t> ids,
                                           bool special);

}  // namespace krait
