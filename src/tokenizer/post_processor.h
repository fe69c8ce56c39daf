// The "post_processor" of a tokenizer.json: the ids put around those of the text.
#pragma once

#include <cstdint>
#include <vector>

#include "tokenizer/json_node.h"

namespace krait {

struct Surround {
  std::vector<int32_t> before;
  std::vector<int32_t> after;
};

/// TemplateProcessing (its form for one text), BertProcessing, RobertaProcessing, Sequence;
/// ByteLevel, which changes offsets only. Others: Error of kind unsupported.
[[nodiscard]] Surround read_post_processor(const JsonNode& node, int depth = 0);

}  // namespace krait
