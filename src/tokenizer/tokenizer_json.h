// A tokenizer.json (the format of the Hugging Face tokenizers library) whose model is BPE.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tokenizer/json_node.h"
#include "tokenizer/special_names.h"
#include "tokenizer/tokenizer.h"

namespace krait {

/// From the text of the file; `name` stands in front of messages.
[[nodiscard]] std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text,
                                                              const std::string& name,
                                                              const SpecialNames& names = {});
/// From its JSON, which need not outlive the result.
[[nodiscard]] std::unique_ptr<Tokenizer> make_tokenizer_json(const JsonNode& root,
                                                             const SpecialNames& names,
                                                             std::string description);

}  // namespace krait
