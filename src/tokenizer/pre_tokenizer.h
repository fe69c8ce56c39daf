// The "pre_tokenizer" of a tokenizer.json: cuts normalised text into the words that BPE works on.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/json_node.h"

namespace krait {

/// Words as spans of one buffer, in the order of the text, none empty. A step may drop spans, cut
/// them further or write the buffer anew.
struct Words {
  struct Span {
    size_t begin;
    size_t end;
  };
  std::string text;
  std::vector<Span> spans;
  bool at_start = false;  ///< the first span begins the whole text (not only a section of it)

  /// The whole section as one word.
  Words(std::string section, bool starts_text);
  [[nodiscard]] std::string_view word(const Span& s) const {
    return std::string_view(text).substr(s.begin, s.end - s.begin);
  }
};

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual void apply(Words& words) const = 0;
};

/// ByteLevel, Split, Digits, Punctuation, Whitespace, WhitespaceSplit, Metaspace, Sequence. Others:
/// Error of kind unsupported with the component's name.
[[nodiscard]] std::unique_ptr<PreTokenizer> make_pre_tokenizer(const JsonNode& node, int depth = 0);

}  // namespace krait
