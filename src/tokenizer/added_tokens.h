// Added tokens: strings that are found in the text before anything else and become one id each,
// among them the special ones (<|endoftext|>) and, for GPT-NeoX, runs of spaces.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/json_node.h"
#include "tokenizer/normalizer.h"

namespace krait {

struct AddedToken {
  int32_t id;
  std::string content;
  bool single_word;  ///< matches only between characters that are no word characters
  bool lstrip;       ///< takes the white space before it along
  bool rstrip;       ///< takes the white space behind it along
  bool normalized;   ///< is looked for in the normalised text
  bool special;
};

/// A piece of text: an added token, or what lies between.
struct Section {
  std::string_view text;
  std::optional<int32_t> id;
};

class AddedTokens {
 public:
  /// `list` may be null. Tokens with `normalized` are passed through `normalizer` (null: none).
  AddedTokens(const JsonNode* list, const Normalizer* normalizer);

  /// Cuts text at the tokens looked for in raw or in normalised text, leftmost and longest first.
  /// Without `special`, special tokens are ordinary text.
  [[nodiscard]] std::vector<Section> split(std::string_view text, bool normalized,
                                           bool special) const;

  [[nodiscard]] const AddedToken* find(int32_t id) const;
  [[nodiscard]] const AddedToken* find(std::string_view content) const;
  [[nodiscard]] int32_t largest_id() const;  ///< -1 if there is none

 private:
  /// Byte trie. A node's children are a linked list, which is short behind the root.
  class Trie {
   public:
    void insert(std::string_view text, const AddedToken* token);
    /// Whether any token begins with this byte: settles most positions of a text.
    [[nodiscard]] bool begins(char byte) const {
      return !root_.empty() && root_[static_cast<unsigned char>(byte)] >= 0;
    }
    /// The longest token that begins at `pos`, and its length.
    [[nodiscard]] std::pair<const AddedToken*, size_t> longest(std::string_view text, size_t pos,
                                                               bool special) const;

   private:
    struct Node {
      char byte = 0;
      int32_t child = -1;
      int32_t sibling = -1;
      const AddedToken* token = nullptr;
    };
    [[nodiscard]] int32_t child(int32_t node, char byte) const;
    std::vector<Node> nodes_;
    std::vector<int32_t> root_;  // by first byte
  };

  std::map<int32_t, AddedToken> tokens_;
  Trie raw_;
  Trie normalized_;
};

}  // namespace krait
