#include "tokenizer/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <vector>

namespace krait::unicode {

namespace {

uint8_t byte_at(std::string_view text, size_t pos) { return static_cast<uint8_t>(text[pos]); }

utf8proc_category_t category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

// The properties are tables in utf8proc; ASCII is most of most text and must not call it.
bool is_ascii_letter(char32_t c) { return (c | 0x20) >= 'a' && (c | 0x20) <= 'z'; }
bool is_ascii_digit(char32_t c) { return c >= '0' && c <= '9'; }

}  // namespace

Scan scan(std::string_view text, size_t pos) {
  using Kind = Scan::Kind;
  const uint8_t lead = byte_at(text, pos);
  if (lead < 0x80) return {Kind::valid, lead, 1};
  // Table 3-7 of the Unicode standard: the first continuation byte carries the restrictions.
  size_t length = 0;
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  char32_t code = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    code = lead & 0x1FU;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    code = lead & 0x0FU;
    if (lead == 0xE0) low = 0xA0;   // overlong below
    if (lead == 0xED) high = 0x9F;  // surrogates above
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    code = lead & 0x07U;
    if (lead == 0xF0) low = 0x90;   // overlong below
    if (lead == 0xF4) high = 0x8F;  // beyond U+10FFFF above
  } else {
    return {Kind::invalid, kReplacement, 1};
  }
  for (size_t i = 1; i < length; ++i) {
    if (pos + i >= text.size()) return {Kind::incomplete, kReplacement, i};
    const uint8_t b = byte_at(text, pos + i);
    if (b < low || b > high) return {Kind::invalid, kReplacement, i};
    code = (code << 6) | (b & 0x3FU);
    low = 0x80;
    high = 0xBF;
  }
  return {Kind::valid, code, length};
}

Char next(std::string_view text, size_t pos) {
  const uint8_t lead = byte_at(text, pos);
  if (lead < 0x80) return {lead, 1};
  const auto tail = [&](size_t i) -> char32_t { return byte_at(text, pos + i) & 0x3FU; };
  if (lead < 0xE0) return {(lead & 0x1FU) << 6 | tail(1), 2};
  if (lead < 0xF0) return {(lead & 0x0FU) << 12 | tail(1) << 6 | tail(2), 3};
  return {(lead & 0x07U) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4};
}

size_t previous(std::string_view text, size_t pos) {
  do {
    --pos;
  } while (pos > 0 && (byte_at(text, pos) & 0xC0U) == 0x80);
  return pos;
}

void append(std::string& out, char32_t c) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6);
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3F));
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

bool is_valid(std::string_view text) {
  for (size_t pos = 0; pos < text.size();) {
    const Scan s = scan(text, pos);
    if (s.kind != Scan::Kind::valid) return false;
    pos += s.length;
  }
  return true;
}

std::string to_valid(std::string_view text) {
  std::string held(text);
  return take_valid(held, true);
}

std::string take_valid(std::string& held, bool last) {
  std::string out;
  out.reserve(held.size());
  size_t pos = 0;
  while (pos < held.size()) {
    const Scan s = scan(held, pos);
    if (s.kind == Scan::Kind::incomplete && !last) break;
    if (s.kind == Scan::Kind::valid) {
      out.append(held, pos, s.length);
    } else {
      append(out, kReplacement);
    }
    pos += s.length;
  }
  held.erase(0, pos);
  return out;
}

bool is_white_space(char32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0D);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_letter(char32_t c) {
  if (c < 0x80) return is_ascii_letter(c);
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}

bool is_numeric(char32_t c) {
  if (c < 0x80) return is_ascii_digit(c);
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO;
}

bool is_mark(char32_t c) {
  if (c < 0x80) return false;
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_MN && k <= UTF8PROC_CATEGORY_ME;
}

bool is_punctuation(char32_t c) {
  if (c < 0x80) return c > ' ' && c != 0x7F && !is_ascii_letter(c) && !is_ascii_digit(c);
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO;
}

bool is_word(char32_t c) {
  if (c < 0x80) return is_ascii_letter(c) || is_ascii_digit(c) || c == '_';
  const auto k = category(c);
  if ((k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC) {
    return true;  // L, M, Nd, Nl, Pc
  }
  // The symbols with Other_Alphabetic (circled and squared letters), then Join_Control.
  return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
         (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189) || c == 0x200C ||
         c == 0x200D;
}

namespace {

bool is_composed(Form form) { return form == Form::nfc || form == Form::nfkc; }
bool is_compatible(Form form) { return form == Form::nfkc || form == Form::nfkd; }

/// Characters that stay themselves in the form and never join a neighbour before them: text may be
/// cut in front of them. The ranges are a part of the truth that covers most text; leaving a
/// character out costs time, not exactness.
bool is_inert(char32_t c, Form form) {
  if (c < 0x80) return true;
  if (c >= 0x4E00 && c <= 0x9FFF) return true;  // CJK ideographs
  if (form == Form::nfc) {
    // Up to the combining marks; Cyrillic up to its marks; dashes, quotes and bullets; syllables.
    return c < 0x300 || (c >= 0x400 && c <= 0x482) || (c >= 0x2010 && c <= 0x2027) ||
           (c >= 0xAC00 && c <= 0xD7A3);
  }
  return false;
}

/// Canonical order: stable sort of every run of non-starters by combining class.
void reorder(std::vector<utf8proc_int32_t>& codes) {
  const auto ccc = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  for (size_t i = 0; i < codes.size();) {
    if (ccc(codes[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < codes.size() && ccc(codes[end]) != 0) ++end;
    std::stable_sort(codes.begin() + static_cast<ptrdiff_t>(i),
                     codes.begin() + static_cast<ptrdiff_t>(end),
                     [&](auto a, auto b) { return ccc(a) < ccc(b); });
    i = end;
  }
}

/// Normalises all of `text`. utf8proc_map() would do, but it orders marks by insertion, which is
/// quadratic on a long run of them: so the steps are taken one by one.
void normalize_run(std::string& out, std::string_view text, Form form) {
  int options = UTF8PROC_STABLE | (is_composed(form) ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE);
  if (is_compatible(form)) options |= UTF8PROC_COMPAT;
  const auto decompose = static_cast<utf8proc_option_t>(options);

  std::vector<utf8proc_int32_t> codes;
  for (size_t pos = 0; pos < text.size();) {
    const Char c = next(text, pos);
    pos += c.length;
    utf8proc_int32_t parts[32];  // the longest decomposition, of U+FDFA, has 18
    int boundary = 0;
    const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.code), parts, 32,
                                           decompose, &boundary);
    if (n < 0 || n > 32) throw std::logic_error("utf8proc_decompose_char failed");
    codes.insert(codes.end(), parts, parts + n);
  }
  reorder(codes);
  auto size = static_cast<utf8proc_ssize_t>(codes.size());
  if (is_composed(form)) size = utf8proc_normalize_utf32(codes.data(), size, decompose);
  for (utf8proc_ssize_t i = 0; i < size; ++i) {
    append(out, static_cast<char32_t>(codes[static_cast<size_t>(i)]));
  }
}

}  // namespace

std::string normalize(std::string_view text, Form form) {
  std::string out;
  size_t done = 0;     // text[0, done) is in out
  size_t current = 0;  // start of the last inert character, where a run may begin
  for (size_t pos = 0; pos < text.size();) {
    const Char c = next(text, pos);
    if (is_inert(c.code, form)) {
      current = pos;
      pos += c.length;
      continue;
    }
    out.append(text, done, current - done);
    size_t end = pos;
    while (end < text.size()) {
      const Char d = next(text, end);
      if (is_inert(d.code, form)) break;
      end += d.length;
    }
    normalize_run(out, text.substr(current, end - current), form);
    done = current = pos = end;
  }
  out.append(text, done, text.size() - done);
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const Char c = next(text, pos);
    pos += c.length;
    if (c.code == 0x130) {  // the one character whose lower case is two: i and a dot above
      out += "i\u0307";
    } else {
      append(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c.code))));
    }
  }
  return out;
}

}  // namespace krait::unicode
