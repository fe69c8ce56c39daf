#define PCRE2_CODE_UNIT_WIDTH 8

#include "tokenizer/pattern.h"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <new>

#include "base/error.h"
#include "tokenizer/unicode.h"

namespace krait {

namespace {

// The insides of character classes, as Oniguruma defines \s and \w on Unicode text. PCRE2's own \s
// also holds U+180E, and its \w is L, N and the underscore only; Oniguruma's is Alphabetic, M, Nd
// and Pc, and outside of brackets also the other numbers of Latin-1.
constexpr std::string_view kSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kWord =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149}\x{1f150}-\x{1f169}\x{1f170}-\x{1f189})";
constexpr std::string_view kLatin1Numbers = R"(\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kHex = "0-9A-Fa-f";

using Code = std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)>;

Code compile(std::string_view expression, int& error, size_t& offset) {
  using Context = std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)>;
  const Context context(pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);  // what . ^ $ go by
  pcre2_set_parens_nest_limit(context.get(), 100);
  // In Ruby syntax ^ and $ match at every line.
  constexpr uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
  return {pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                        kOptions, &error, &offset, context.get()),
          pcre2_code_free};
}

bool compiles(const std::string& expression) {
  int error = 0;
  size_t offset = 0;
  return compile(expression, error, offset) != nullptr;
}

std::string message_of(int error) {
  std::array<char, 200> text{};
  pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(text.data()), text.size());
  return text.data();
}

/// Reads an expression once from left to right and rewrites what differs.
class Translator {
 public:
  Translator(std::string_view in, const std::string& where) : in_(in), where_(where) {}

  std::string run() {
    while (pos_ < in_.size()) {
      const char c = in_[pos_];
      if (c == '\\') {
        escape();
      } else if (in_class_) {
        class_character(c);
      } else {
        if (c == '[') {
          open_class();
          continue;
        }
        if (c == '(') check_group();
        take(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void unsupported(const std::string& what) const {
    throw Error(ErrorKind::unsupported,
                fmt::format("{}: the regular expression {} uses {}, which is not built", where_,
                            in_, what));
  }

  void take(size_t n) {
    out_ += in_.substr(pos_, n);
    pos_ += n;
  }

  void replace(size_t n, std::string_view text) {
    out_ += text;
    pos_ += n;
  }

  void open_class() {
    in_class_ = true;
    take(1);
    if (pos_ < in_.size() && in_[pos_] == '^') take(1);
    if (pos_ < in_.size() && in_[pos_] == ']') take(1);  // a literal when it comes first
  }

  void class_character(char c) {
    if (c == '[') {
      const size_t end = in_.substr(pos_, 2) == "[:" ? in_.find(":]", pos_) : std::string::npos;
      if (end == std::string::npos) unsupported("a class inside a class");
      return take(end + 2 - pos_);
    }
    if (in_.substr(pos_, 2) == "&&") unsupported("an intersection of classes");
    if (c == ']') in_class_ = false;
    take(1);
  }

  // (?m) means "dot matches newline" to Ruby and "multi-line" to Perl; behind (?x) a bracket may be
  // part of a comment; (*...) is a verb to Perl alone.
  void check_group() const {
    if (in_.substr(pos_, 2) == "(*") unsupported("a group that begins with *");
    if (in_.substr(pos_, 2) != "(?") return;
    for (size_t i = pos_ + 2; i < in_.size(); ++i) {
      if (in_[i] == 'm' || in_[i] == 'x') unsupported(fmt::format("the flag {}", in_[i]));
      if (in_[i] != 'i' && in_[i] != '-') return;
    }
  }

  void escape() {
    if (pos_ + 1 >= in_.size()) return take(1);  // PCRE2 reports it
    switch (in_[pos_ + 1]) {
      case 's':
        return shorthand(kSpace, false);
      case 'S':
        // PCRE2's \S is right but for U+180E.
        return in_class_ ? replace(2, R"(\S\x{180e})") : shorthand(kSpace, true);
      case 'w':
        return in_class_ ? replace(2, kWord) : replace(2, word("["));
      case 'W':
        if (in_class_) unsupported(R"(\W inside a class)");
        return replace(2, word("[^"));
      case 'h':
        return shorthand(kHex, false);
      case 'H':
        if (in_class_) unsupported(R"(\H inside a class)");
        return shorthand(kHex, true);
      case 'b':
        return in_class_ ? take(2) : boundary(true);
      case 'B':
        return boundary(false);
      case 'u':
        return code_unit();
      case 'p':
      case 'P':
        return property();
      case 'K':  // may move the start of a match before the end of the last one
        unsupported("\\K");
      case 'Q':  // quotes to Perl alone
        unsupported("\\Q");
      default:
        return take(2);
    }
  }

  void shorthand(std::string_view inside, bool negated) {
    if (in_class_) return replace(2, inside);
    replace(2, fmt::format("[{}{}]", negated ? "^" : "", inside));
  }

  static std::string word(std::string_view bracket) {
    return fmt::format("{}{}{}]", bracket, kWord, kLatin1Numbers);
  }

  void boundary(bool at) {
    const std::string w = word("[");
    replace(2, at ? fmt::format("(?:(?<={0})(?!{0})|(?<!{0})(?={0}))", w)
                  : fmt::format("(?:(?<={0})(?={0})|(?<!{0})(?!{0}))", w));
  }

  void code_unit() {  // \uHHHH
    const std::string_view hex = in_.substr(pos_ + 2, 4);
    if (hex.size() != 4 || hex.find_first_not_of("0123456789abcdefABCDEF") != hex.npos) {
      unsupported(R"(\u without four digits)");
    }
    replace(6, fmt::format("\\x{{{}}}", hex));
  }

  void property() {
    if (in_.substr(pos_ + 2, 1) != "{") return take(2);
    const size_t end = in_.find('}', pos_);
    if (end == std::string::npos) return take(2);
    std::string_view name = in_.substr(pos_ + 3, end - pos_ - 3);
    bool negated = in_[pos_ + 1] == 'P';
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    // A script's plain name means Script to Oniguruma and Script_Extensions to PCRE2.
    std::string prefix = name.size() > 2 ? "sc:" : "";
    if (!prefix.empty() && !compiles(fmt::format(R"(\p{{sc:{}}})", name))) prefix.clear();
    replace(end + 1 - pos_, fmt::format("\\{}{{{}{}}}", negated ? 'P' : 'p', prefix, name));
  }

  std::string_view in_;
  const std::string& where_;
  std::string out_;
  size_t pos_ = 0;
  bool in_class_ = false;
};

/// What one search through a text needs beside the compiled pattern.
class Matcher {
 public:
  Matcher(const pcre2_code* code, size_t text_size)
      : code_(code),
        data_(pcre2_match_data_create_from_pattern(code, nullptr), pcre2_match_data_free),
        context_(pcre2_match_context_create(nullptr), pcre2_match_context_free) {
    if (!data_ || !context_) throw std::bad_alloc();
    // Ends a pattern that explodes; one long word alone takes a few steps for each byte.
    constexpr size_t kSteps = 10'000'000;
    const size_t limit = std::min<size_t>(kSteps + 32 * text_size, UINT32_MAX);
    pcre2_set_match_limit(context_.get(), static_cast<uint32_t>(limit));
  }

  /// 1: found, 0: no match from `from` on, negative: an error of PCRE2.
  int next(std::string_view text, size_t from, Match& match) {
    int rc = attempt(text, from);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT && !stack_) {
      // Compiled code begins with 32 KiB of stack, which all but long matches fit in.
      stack_.reset(pcre2_jit_stack_create(size_t{32} << 10, size_t{64} << 20, nullptr));
      pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
      rc = attempt(text, from);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return 0;
    if (rc < 0) return rc;
    const size_t* ovector = pcre2_get_ovector_pointer(data_.get());
    match = {ovector[0], ovector[1]};
    return 1;
  }

 private:
  int attempt(std::string_view text, size_t from) {
    // The text is valid: to check it at every call would be quadratic.
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                       PCRE2_NO_UTF_CHECK, data_.get(), context_.get());
  }

  const pcre2_code* code_;
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data_;
  std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context_;
  std::unique_ptr<pcre2_jit_stack, decltype(&pcre2_jit_stack_free)> stack_{nullptr,
                                                                           pcre2_jit_stack_free};
};

}  // namespace

std::string translate_oniguruma(std::string_view expression, const std::string& where) {
  return Translator(expression, where).run();
}

Pattern Pattern::literal(std::string text) {
  Pattern p;
  p.text_ = std::move(text);
  return p;
}

Pattern Pattern::regex(const std::string& expression, const std::string& where) {
  const std::string translated = translate_oniguruma(expression, where);
  int error = 0;
  size_t offset = 0;
  Code code = compile(translated, error, offset);
  if (!code) {
    throw Error(ErrorKind::format, fmt::format("{}: the regular expression {} is not valid: {}",
                                               where, expression, message_of(error)));
  }
  // Without a JIT for this processor PCRE2 interprets the pattern: slower, the same matches.
  (void)pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  Pattern p;
  p.text_ = expression;
  p.code_ = std::shared_ptr<void>(code.release(),
                                  [](void* c) { pcre2_code_free(static_cast<pcre2_code*>(c)); });
  return p;
}

Pattern Pattern::from_json(const JsonNode& node) {
  if (node.has("String")) return literal(node.string("String"));
  if (node.has("Regex")) return regex(node.string("Regex"), node.where());
  node.fail(R"(expected a pattern {"String": ...} or {"Regex": ...})");
}

std::vector<Match> Pattern::find_all(std::string_view text) const {
  std::vector<Match> matches;
  if (is_literal()) {
    if (text_.empty()) return matches;
    for (size_t at = text.find(text_); at != std::string_view::npos;
         at = text.find(text_, at + text_.size())) {
      matches.push_back({at, at + text_.size()});
    }
    return matches;
  }

  Matcher matcher(static_cast<const pcre2_code*>(code_.get()), text.size());
  size_t from = 0;
  while (from <= text.size()) {
    Match m{};
    const int rc = matcher.next(text, from, m);
    if (rc < 0) {
      throw Error(ErrorKind::runtime,
                  fmt::format("the tokenizer's regular expression {} gave up at byte {} of the "
                              "text: {}",
                              text_, from, message_of(rc)));
    }
    if (rc == 0) break;
    const bool empty = m.begin == m.end;
    // An empty match right behind the last match is none.
    if (!empty || matches.empty() || matches.back().end != m.end) matches.push_back(m);
    from = m.end;
    if (empty) from += m.end < text.size() ? unicode::next(text, m.end).length : 1;
  }
  return matches;
}

std::string Pattern::replace_all(std::string_view text, std::string_view content) const {
  std::string out;
  size_t done = 0;
  for (const Match& m : find_all(text)) {
    out.append(text, done, m.begin - done);
    out += content;
    done = m.end;
  }
  out.append(text, done, text.size() - done);
  return out;
}

}  // namespace krait
