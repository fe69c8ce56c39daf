#include "tokenizer/byte_level.h"

#include <array>
#include <cstdint>

#include "tokenizer/unicode.h"

namespace krait::byte_level {

namespace {

constexpr bool stands_for_itself(int b) {
  return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
}

constexpr auto kCharOf = [] {
  std::array<uint16_t, 256> table{};
  uint16_t next = 0x100;
  for (int b = 0; b < 256; ++b) {
    table[static_cast<size_t>(b)] = stands_for_itself(b) ? static_cast<uint16_t>(b) : next++;
  }
  return table;
}();

constexpr auto kByteOf = [] {
  std::array<int16_t, 0x144> table{};
  for (auto& b : table) b = -1;
  for (size_t b = 0; b < 256; ++b) table[kCharOf[b]] = static_cast<int16_t>(b);
  return table;
}();

enum class Class : uint8_t { other, letter, number, space };

Class class_beyond_ascii(char32_t c) {
  if (unicode::is_letter(c)) return Class::letter;
  if (unicode::is_numeric(c)) return Class::number;
  return unicode::is_white_space(c) ? Class::space : Class::other;
}

constexpr auto kAsciiClass = [] {
  std::array<Class, 128> table{};  // other
  for (size_t c = 0; c < 128; ++c) {
    if (c >= '0' && c <= '9') table[c] = Class::number;
    if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z')) table[c] = Class::letter;
    if ((c >= '\t' && c <= '\r') || c == ' ') table[c] = Class::space;
  }
  return table;
}();

Class class_of(char32_t c) { return c < 128 ? kAsciiClass[c] : class_beyond_ascii(c); }

/// Length of a contraction at the apostrophe text[pos], or 0.
size_t contraction(std::string_view text, size_t pos) {
  const std::string_view rest = text.substr(pos + 1, 2);
  if (rest.starts_with("re") || rest.starts_with("ve") || rest.starts_with("ll")) return 3;
  if (!rest.empty() && std::string_view("stmd").find(rest[0]) != std::string_view::npos) return 2;
  return 0;
}

/// End of the run of characters of class `k` that begins at or before `pos`.
size_t run_end(std::string_view text, size_t pos, Class k) {
  while (pos < text.size()) {
    const unicode::Char c = unicode::next(text, pos);
    if (class_of(c.code) != k) break;
    pos += c.length;
  }
  return pos;
}

size_t word_end(std::string_view text, size_t pos) {
  const unicode::Char first = unicode::next(text, pos);
  if (first.code == '\'') {
    if (const size_t length = contraction(text, pos)) return pos + length;
  }
  const Class k = class_of(first.code);
  if (k != Class::space) return run_end(text, pos + first.length, k);

  // One U+0020, and no other white space, may lead a word.
  if (first.code == ' ' && pos + 1 < text.size()) {
    const unicode::Char c = unicode::next(text, pos + 1);
    const Class after = class_of(c.code);
    if (after != Class::space) return run_end(text, pos + 1 + c.length, after);
  }
  // \s+(?!\S): the run without its last character, unless it ends the text; else \s+.
  const size_t end = run_end(text, pos + first.length, Class::space);
  if (end == text.size()) return end;
  const size_t last = unicode::previous(text, end);
  return last > pos ? last : end;
}

}  // namespace

char32_t char_of(unsigned char byte) { return kCharOf[byte]; }

int byte_of(char32_t c) { return c < kByteOf.size() ? kByteOf[c] : -1; }

char* map(std::string_view bytes, char* out) {
  for (const char b : bytes) {
    const auto c = kCharOf[static_cast<unsigned char>(b)];
    if (c < 0x80) {
      *out++ = static_cast<char>(c);
    } else {
      *out++ = static_cast<char>(0xC0 | c >> 6);
      *out++ = static_cast<char>(0x80 | (c & 0x3F));
    }
  }
  return out;
}

std::string unmapped(std::string_view token) {
  std::string bytes;
  bytes.reserve(token.size());
  for (size_t pos = 0; pos < token.size();) {
    const unicode::Char c = unicode::next(token, pos);
    const int b = byte_of(c.code);
    if (b < 0) return std::string(token);
    bytes.push_back(static_cast<char>(b));
    pos += c.length;
  }
  return bytes;
}

void split_words(std::string_view text, std::vector<size_t>& ends) {
  for (size_t pos = 0; pos < text.size();) {
    pos = word_end(text, pos);
    ends.push_back(pos);
  }
}

}  // namespace krait::byte_level
