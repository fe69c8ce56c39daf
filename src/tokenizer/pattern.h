// What Split and Replace look for: a literal string or a regular expression. Expressions are
// written for Oniguruma (Ruby syntax), which the reference implementation uses, and run on PCRE2:
// they are translated where the two read the same text differently.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/json_node.h"

namespace krait {

struct Match {
  size_t begin;
  size_t end;
};

class Pattern {
 public:
  static Pattern literal(std::string text);
  /// Error of kind unsupported for a construct that has no equal in PCRE2, format for a wrong one;
  /// `where` stands in front of the message.
  static Pattern regex(const std::string& expression, const std::string& where);
  /// {"String": "..."} or {"Regex": "..."}
  static Pattern from_json(const JsonNode& node);

  /// All matches in valid UTF-8 text, from the left, not overlapping.
  [[nodiscard]] std::vector<Match> find_all(std::string_view text) const;
  [[nodiscard]] std::string replace_all(std::string_view text, std::string_view content) const;
  [[nodiscard]] bool is_literal() const { return code_ == nullptr; }

 private:
  Pattern() = default;
  std::string text_;            // the literal, or the expression for messages
  std::shared_ptr<void> code_;  // compiled pcre2_code; null for a literal
};

/// The expression in PCRE2's syntax, for patterns compiled with UTF, UCP and MULTILINE.
[[nodiscard]] std::string translate_oniguruma(std::string_view expression,
                                              const std::string& where);

}  // namespace krait
