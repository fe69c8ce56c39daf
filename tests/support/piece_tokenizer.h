// A tokenizer whose tokens are given strings of bytes.
#pragma once

#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace krait::test {

/// Token i is `pieces[i]`; token 0 is special.
class PieceTokenizer : public Tokenizer {
 public:
  explicit PieceTokenizer(std::vector<std::string> pieces) : pieces_(std::move(pieces)) {}
  int64_t vocab_size() const override { return static_cast<int64_t>(pieces_.size()); }
  std::vector<int32_t> encode(std::string_view, EncodeOptions) const override { return {}; }
  std::string token_bytes(int32_t id, bool, bool special) const override {
    return id == 0 && !special ? "" : pieces_.at(static_cast<size_t>(id));
  }
  std::string decode(std::span<const int32_t>, bool) const override { return {}; }
  std::string token_text(int32_t id) const override { return pieces_.at(static_cast<size_t>(id)); }
  std::optional<int32_t> token_id(std::string_view) const override { return std::nullopt; }
  bool is_special(int32_t id) const override { return id == 0; }
  std::optional<int32_t> bos_id() const override { return std::nullopt; }
  std::optional<int32_t> eos_id() const override { return 0; }
  std::string description() const override { return "pieces"; }

 private:
  std::vector<std::string> pieces_;
};

}  // namespace krait::test
