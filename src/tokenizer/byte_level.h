// The byte-level alphabet and the word pattern of GPT-2 (Radford et al. 2019).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace krait::byte_level {

/// The character that stands for each byte: printable Latin-1 for itself, the other 68 bytes from
/// U+0100 up ("Ġ" is the space).
[[nodiscard]] char32_t char_of(unsigned char byte);
/// The byte a character stands for, or -1.
[[nodiscard]] int byte_of(char32_t c);

/// Writes the character of every byte, as UTF-8, to `out`, which has room for two bytes for each,
/// and returns the end of what was written.
char* map(std::string_view bytes, char* out);
/// The bytes of a token; a token with a character outside the alphabet is plain text and comes back
/// as it is.
[[nodiscard]] std::string unmapped(std::string_view token);

/// Appends the ends of the words that the pattern
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// cuts `text` into. The words cover the text without gaps.
void split_words(std::string_view text, std::vector<size_t>& ends);

}  // namespace krait::byte_level
