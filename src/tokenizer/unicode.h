// UTF-8 and the Unicode character classes that tokenizers ask for, after Unicode 15 (utf8proc 2.8).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace krait::unicode {

constexpr char32_t kReplacement = 0xFFFD;

/// A decoded character: its code point and its length in bytes.
struct Char {
  char32_t code;
  size_t length;
};

/// What stands at `text[pos]` (pos < text.size()). Strict: no overlong forms, surrogates or values
/// above U+10FFFF.
struct Scan {
  enum class Kind { valid, invalid, incomplete } kind;
  char32_t code;  ///< U+FFFD unless valid
  size_t length;  ///< invalid: of the maximal subpart to replace (Unicode 15, section 3.9)
};
[[nodiscard]] Scan scan(std::string_view text, size_t pos);

/// The character at `pos` of text that is known to be valid.
[[nodiscard]] Char next(std::string_view text, size_t pos);
/// Where the character before `pos` begins, in valid text (pos > 0).
[[nodiscard]] size_t previous(std::string_view text, size_t pos);

void append(std::string& out, char32_t code);

[[nodiscard]] bool is_valid(std::string_view text);
/// Each maximal subpart of an ill-formed sequence becomes one U+FFFD, as browsers and Rust do it.
[[nodiscard]] std::string to_valid(std::string_view text);
/// Cuts the text that is decided from the front of `held` and returns it with U+FFFD for ill-formed
/// sequences. Up to three bytes that may still become a character stay, unless `last`.
[[nodiscard]] std::string take_valid(std::string& held, bool last);

[[nodiscard]] bool is_white_space(char32_t c);  ///< property White_Space; \s of the reference
[[nodiscard]] bool is_letter(char32_t c);       ///< category L
[[nodiscard]] bool is_numeric(char32_t c);      ///< category N
[[nodiscard]] bool is_mark(char32_t c);         ///< category M
[[nodiscard]] bool is_punctuation(
    char32_t c);                         ///< category P, and all ASCII punctuation ($+<=>^`|~)
[[nodiscard]] bool is_word(char32_t c);  ///< \w of UTS 18: Alphabetic, M, Nd, Pc, Join_Control

enum class Form { nfc, nfd, nfkc, nfkd };
/// Unicode normalisation of valid text, in O(n log n) whatever the text.
[[nodiscard]] std::string normalize(std::string_view text, Form form);
/// Full lower-case mapping of each character by itself (no final sigma rule).
[[nodiscard]] std::string to_lower(std::string_view text);

}  // namespace krait::unicode
