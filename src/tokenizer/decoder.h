// The "decoder" of a tokenizer.json, token by token: the bytes each token adds to the text. That is
// what streaming needs, so a decoder whose result for a token depends on the tokens after it is not
// built.
//
// The bytes of all tokens are joined and read as UTF-8 once, with U+FFFD for each maximal
// ill-formed part. The reference's ByteFallback instead turns a run of byte tokens that is not
// valid as a whole into one U+FFFD for each token.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "tokenizer/json_node.h"

namespace krait {

class Decoder {
 public:
  /// ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip, Sequence; null: no decoder, tokens
  /// are joined with spaces. Others: Error of kind unsupported with the component's name.
  explicit Decoder(const JsonNode* node);

  /// The bytes of a token; `first`: it begins the text.
  [[nodiscard]] std::string bytes(std::string token, bool first) const;

 private:
  using Step = std::function<std::string(std::string token, bool first)>;
  void add(const JsonNode& node, int depth);
  std::vector<Step> steps_;
  bool fused_ = false;  ///< while reading: a Fuse came before, steps see the whole text
  bool bytes_ = false;  ///< while reading: tokens may hold bytes that are no UTF-8
};

}  // namespace krait
