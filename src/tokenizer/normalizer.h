// The "normalizer" of a tokenizer.json: text to text, before it is cut into words.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tokenizer/json_node.h"

namespace krait {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  /// Valid UTF-8 in, valid UTF-8 out.
  [[nodiscard]] virtual std::string normalize(std::string_view text) const = 0;
};

/// NFC, NFD, NFKC, NFKD, Lowercase, Strip, StripAccents, Prepend, Replace, Sequence. Others: Error
/// of kind unsupported with the component's name.
[[nodiscard]] std::unique_ptr<Normalizer> make_normalizer(const JsonNode& node, int depth = 0);

}  // namespace krait
