#include "tokenizer/jinja_parser.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/error.h"
#include "tokenizer/unicode.h"

namespace krait::jinja {

namespace {

constexpr int kMaxDepth = 400;   // of nested statements and parentheses
constexpr int kMaxHeight = 200;  // of an expression's tree: a + b + c + ... grows on the left
constexpr size_t kMaxSource = 1 << 20;

enum class Type : uint8_t {
  text,
  output,
  output_end,
  tag,
  tag_end,
  name,
  string,
  integer,
  real,
  sign,
  end
};
struct Token {
  Type type;
  std::string text;
  int line;
};

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_name_start(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name(char c) { return is_name_start(c) || is_digit(c); }

/// Template text to tokens, with the white space around tags removed as the tags say.
class Lexer {
 public:
  Lexer(std::string_view source, const std::string& name) : name_(name) {
    if (source.size() > kMaxSource) fail("a template longer than a megabyte");
    if (!unicode::is_valid(source)) fail("a template that is not UTF-8");
    // Line ends become one kind, and the last one does not count.
    for (size_t i = 0; i < source.size(); ++i) {
      const bool carriage = source[i] == '\r';
      source_ += carriage ? '\n' : source[i];
      if (carriage && i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
    if (source_.ends_with('\n')) source_.pop_back();
  }

  std::vector<Token> tokens() {
    while (at_ < source_.size()) {
      const size_t open = next_tag();
      if (open == std::string::npos) {
        text(source_.size(), '+', false);
        at_ = source_.size();
        break;
      }
      const char kind = source_[open + 1];
      const char sign = open + 2 < source_.size() ? source_[open + 2] : ' ';
      text(open, sign, kind != '{');
      at_ = open + 2 + (sign == '-' || sign == '+' ? 1 : 0);
      if (kind == '#') {
        comment();
      } else {
        put(kind == '{' ? Type::output : Type::tag, "");
        inside(kind == '{' ? "}}" : "%}");
        put(kind == '{' ? Type::output_end : Type::tag_end, "");
        if (kind == '%') raw();
      }
    }
    put(Type::end, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::format, fmt::format("{}, line {}: {}", name_, line_, what));
  }
  void put(Type type, std::string text) { tokens_.push_back({type, std::move(text), line_}); }
  [[nodiscard]] std::string_view rest() const { return std::string_view(source_).substr(at_); }

  [[nodiscard]] size_t next_tag() const {
    for (size_t i = source_.find('{', at_); i != std::string::npos; i = source_.find('{', i + 1)) {
      if (i + 1 == source_.size()) return std::string::npos;
      const char c = source_[i + 1];
      if (c == '{' || c == '%' || c == '#') return i;
    }
    return std::string::npos;
  }

  /// The text up to `end`, where a tag with this sign begins; `lstrip`: white space that alone
  /// stands before the tag on its line goes.
  void text(size_t end, char sign, bool lstrip) {
    std::string_view s(source_.data() + at_, end - at_);
    const int lines = static_cast<int>(std::count(s.begin(), s.end(), '\n'));
    const size_t line_start = s.rfind('\n') + 1;  // 0 where there is none
    const bool starts_line = line_start > 0 || at_line_start_;
    if (sign == '-') {
      while (!s.empty() && is_space(s.back())) s.remove_suffix(1);
    } else if (lstrip && sign != '+' && starts_line &&
               std::all_of(s.begin() + static_cast<std::ptrdiff_t>(line_start), s.end(),
                           is_space)) {
      s = s.substr(0, line_start);
    }
    if (!s.empty()) put(Type::text, std::string(s));
    line_ += lines;
  }

  /// Behind the end of a tag: `-` takes all white space along, else a statement one line break.
  void after_tag(char sign, bool trim) {
    const size_t begin = at_;
    if (sign == '-') {
      while (at_ < source_.size() && is_space(source_[at_])) ++at_;
    } else if (trim && sign != '+' && at_ < source_.size() && source_[at_] == '\n') {
      ++at_;
    }
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(begin),
                                         source_.begin() + static_cast<std::ptrdiff_t>(at_), '\n'));
    at_line_start_ = at_ > begin && source_[at_ - 1] == '\n';
  }

  void comment() {
    const size_t end = source_.find("#}", at_);
    if (end == std::string::npos) fail("a comment that does not end");
    const char sign = end > at_ ? source_[end - 1] : ' ';
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(at_),
                                         source_.begin() + static_cast<std::ptrdiff_t>(end), '\n'));
    at_ = end + 2;
    after_tag(sign == '-' || sign == '+' ? sign : ' ', true);
  }

  /// {% raw %}: what follows is text up to {% endraw %}.
  void raw() {
    const size_t n = tokens_.size();
    if (n < 3 || tokens_[n - 2].text != "raw" || tokens_[n - 2].type != Type::name ||
        tokens_[n - 3].type != Type::tag) {
      return;
    }
    tokens_.resize(n - 3);
    for (size_t open = source_.find("{%", at_); open != std::string::npos;
         open = source_.find("{%", open + 2)) {
      size_t p = open + 2;
      const char sign = p < source_.size() ? source_[p] : ' ';
      if (sign == '-' || sign == '+') ++p;
      while (p < source_.size() && is_space(source_[p])) ++p;
      if (source_.compare(p, 6, "endraw") != 0) continue;
      p += 6;
      while (p < source_.size() && is_space(source_[p])) ++p;
      const char end_sign = p < source_.size() ? source_[p] : ' ';
      if (end_sign == '-' || end_sign == '+') ++p;
      if (source_.compare(p, 2, "%}") != 0) continue;
      text(open, sign, true);
      at_ = p + 2;
      after_tag(end_sign, true);
      return;
    }
    fail("raw text that does not end with endraw");
  }

  /// The tokens of a tag, up to `close` outside of all brackets.
  void inside(std::string_view close) {
    std::string brackets;
    for (;;) {
      while (at_ < source_.size() && is_space(source_[at_]))
        line_ += source_[at_++] == '\n' ? 1 : 0;
      if (at_ == source_.size()) fail(fmt::format("a tag that does not end with {}", close));
      if (brackets.empty()) {
        const char sign = rest()[0];
        const size_t skip = sign == '-' || sign == '+' ? 1 : 0;
        if (rest().substr(skip).starts_with(close)) {
          at_ += skip + close.size();
          after_tag(skip > 0 ? sign : ' ', close == "%}");
          return;
        }
      }
      const char c = source_[at_];
      if (c == '"' || c == '\'') {
        string(c);
      } else if (is_digit(c)) {
        number();
      } else if (is_name_start(c)) {
        const size_t begin = at_;
        while (at_ < source_.size() && is_name(source_[at_])) ++at_;
        put(Type::name, source_.substr(begin, at_ - begin));
      } else {
        sign(brackets);
      }
    }
  }

  void sign(std::string& brackets) {
    constexpr std::string_view kSigns[] = {"**", "//", "==", "!=", "<=", ">=", "+", "-", "*",
                                           "/",  "%",  "~",  "|",  "=",  "<",  ">", "(", ")",
                                           "[",  "]",  "{",  "}",  ",",  ".",  ":"};
    for (const std::string_view s : kSigns) {
      if (!rest().starts_with(s)) continue;
      const char c = s[0];
      if (c == '(' || c == '[' || c == '{') {
        if (brackets.size() == kMaxDepth) fail("brackets nested too deeply");
        brackets += c == '(' ? ')' : c == '[' ? ']' : '}';
      } else if (c == ')' || c == ']' || c == '}') {
        if (brackets.empty() || brackets.back() != c) fail(fmt::format("an unexpected '{}'", c));
        brackets.pop_back();
      }
      at_ += s.size();
      put(Type::sign, std::string(s));
      return;
    }
    fail(fmt::format("an unexpected character '{}'",
                     rest().substr(0, unicode::next(source_, at_).length)));
  }

  void number() {
    const auto digits = [&] {
      while (at_ < source_.size() && (is_digit(source_[at_]) || source_[at_] == '_')) {
        if (source_[at_] != '_') number_ += source_[at_];
        ++at_;
      }
    };
    number_.clear();
    digits();
    bool real = false;
    if (at_ + 1 < source_.size() && source_[at_] == '.' && is_digit(source_[at_ + 1])) {
      real = true;
      number_ += source_[at_++];
      digits();
    }
    size_t exponent = at_ + 1;
    if (at_ < source_.size() && (source_[at_] == 'e' || source_[at_] == 'E')) {
      if (exponent < source_.size() && (source_[exponent] == '-' || source_[exponent] == '+')) {
        ++exponent;
      }
      if (exponent < source_.size() && is_digit(source_[exponent])) {
        real = true;
        number_.append(source_, at_, exponent - at_);
        at_ = exponent;
        digits();
      }
    }
    put(real ? Type::real : Type::integer, number_);
  }

  void string(char quote) {
    std::string s;
    for (++at_;; ++at_) {
      if (at_ >= source_.size()) fail("a string that does not end");
      const char c = source_[at_];
      if (c == quote) break;
      if (c == '\n') ++line_;
      if (c != '\\') {
        s += c;
        continue;
      }
      if (++at_ >= source_.size()) fail("a string that does not end");
      escape(s);
    }
    ++at_;
    put(Type::string, std::move(s));
  }

  /// What stands behind a backslash, as in Python; at_ ends on its last character.
  void escape(std::string& s) {
    constexpr std::string_view kLetters = "abfnrtv\\'\"";
    constexpr std::string_view kMeaning = "\a\b\f\n\r\t\v\\'\"";
    const char c = source_[at_];
    if (const size_t i = kLetters.find(c); i != std::string_view::npos) {
      s += kMeaning[i];
      return;
    }
    const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {  // Python keeps a backslash that means nothing
      if (is_digit(c)) fail("a string with an octal escape, which is not built");
      s += '\\';
      if (c != '\n') --at_;  // read again as it is
      if (c == '\n') s.pop_back(), ++line_;
      return;
    }
    uint32_t code = 0;
    const char* begin = source_.data() + at_ + 1;
    const char* limit = source_.data() + std::min(source_.size(), at_ + 1 + digits);
    const auto [end, error] = std::from_chars(begin, limit, code, 16);
    if (error != std::errc() || end != begin + digits || code > 0x10FFFF ||
        (code >= 0xD800 && code < 0xE000)) {
      fail("a string with a broken escape");
    }
    unicode::append(s, code);
    at_ += digits;
  }

  const std::string& name_;
  std::string source_;
  std::string number_;
  size_t at_ = 0;
  int line_ = 1;
  bool at_line_start_ = true;
  std::vector<Token> tokens_;
};

class Parser {
 public:
  Parser(std::vector<Token> tokens, const std::string& name)
      : tokens_(std::move(tokens)), name_(name) {}

  NodePtr whole() {
    NodePtr root = node(Op::sequence);
    root->body = statements({});
    return root;
  }

 private:
  using Ends = std::initializer_list<std::string_view>;

  /// Counts how deep the parser is in itself.
  struct Depth {
    explicit Depth(Parser& p) : parser(p) {
      if (++parser.depth_ > kMaxDepth) parser.fail("it is nested too deeply");
    }
    ~Depth() { --parser.depth_; }
    Depth(const Depth&) = delete;
    Depth& operator=(const Depth&) = delete;
    Parser& parser;
  };

  // ---- tokens ----

  [[nodiscard]] const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  const Token& take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  [[nodiscard]] bool is(Type type, std::string_view text) const {
    return peek().type == type && peek().text == text;
  }
  [[nodiscard]] bool is_sign(std::string_view s) const { return is(Type::sign, s); }
  [[nodiscard]] bool is_word(std::string_view s) const { return is(Type::name, s); }
  bool skip_sign(std::string_view s) { return is_sign(s) && (take(), true); }
  bool skip_word(std::string_view s) { return is_word(s) && (take(), true); }
  void want_sign(std::string_view s) {
    if (!skip_sign(s)) fail(fmt::format("expected '{}', found {}", s, found()));
  }
  std::string want_name() {
    if (peek().type != Type::name) fail(fmt::format("expected a name, found {}", found()));
    return take().text;
  }
  void want_end_of_tag() {
    if (peek().type != Type::tag_end)
      fail(fmt::format("expected the end of the tag, found {}", found()));
    take();
  }
  [[nodiscard]] std::string found() const {
    switch (peek().type) {
      case Type::text:
      case Type::output:
      case Type::tag:
      case Type::output_end:
      case Type::tag_end:
        return "the end of the tag";
      case Type::end:
        return "the end of the template";
      case Type::string:
        return "a string";
      default:
        return fmt::format("'{}'", peek().text.substr(0, 40));
    }
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::format, fmt::format("{}, line {}: {}", name_, peek().line, what));
  }
  [[noreturn]] void unsupported(const std::string& what) const {
    throw Error(ErrorKind::unsupported, fmt::format("{}, line {}: {}", name_, peek().line, what),
                "krait reads the part of Jinja that chat templates use");
  }
  [[nodiscard]] NodePtr node(Op op, std::string text = {}) const {
    return std::make_unique<Node>(Node{op, peek().line, std::move(text)});
  }
  template <typename... Kids>
  [[nodiscard]] NodePtr node_of(Op op, std::string text, Kids... kids) const {
    NodePtr n = node(op, std::move(text));
    (add(*n, std::move(kids)), ...);
    return n;
  }
  void add(Node& parent, NodePtr kid) const {
    if (kid) parent.height = std::max(parent.height, kid->height + 1);
    if (parent.height > kMaxHeight) fail("an expression that is too long");
    parent.kids.push_back(std::move(kid));
  }

  // ---- statements ----

  /// Up to a tag that begins with one of `ends`, which is not taken; to the end where there is
  /// none.
  std::vector<NodePtr> statements(Ends ends) {
    const Depth depth(*this);
    std::vector<NodePtr> out;
    for (;;) {
      switch (peek().type) {
        case Type::end:
          if (ends.size() > 0) {
            fail(fmt::format("expected {}, found the end of the template", *(ends.end() - 1)));
          }
          return out;
        case Type::text:
          out.push_back(node(Op::text, peek().text));
          take();
          break;
        case Type::output:
          take();
          out.push_back(node(Op::output));
          add(*out.back(), expression_or_tuple());
          if (peek().type != Type::output_end) {
            fail(fmt::format("expected the end of the expression, found {}", found()));
          }
          take();
          break;
        default:  // a tag
          if (peek(1).type == Type::name &&
              std::find(ends.begin(), ends.end(), peek(1).text) != ends.end()) {
            return out;
          }
          take();
          if (NodePtr s = statement()) out.push_back(std::move(s));
      }
    }
  }
  /// The body of a tag, and its end tag.
  std::vector<NodePtr> body_until(std::string_view end) {
    want_end_of_tag();
    auto body = statements({end});
    take();  // {%
    take();  // the name
    // Jinja allows "endmacro name".
    if (end == "endmacro" && peek().type == Type::name) take();
    want_end_of_tag();
    return body;
  }

  NodePtr statement() {
    const std::string word = want_name();
    if (word == "if") return branch();
    if (word == "for") return loop();
    if (word == "set") return assign();
    if (word == "macro") return macro();
    if (word == "with") return scope();
    if (word == "filter") {
      NodePtr n = node(Op::filter_block);
      add(*n, filters(nullptr));
      n->body = body_until("endfilter");
      return n;
    }
    if (word == "break" || word == "continue") {
      NodePtr n = node(word == "break" ? Op::leave : Op::next);
      if (loops_ == 0) fail(fmt::format("{} outside of a loop", word));
      want_end_of_tag();
      return n;
    }
    if (word == "generation") {  // transformers' mark of the assistant's tokens
      NodePtr n = node(Op::sequence);
      n->body = body_until("endgeneration");
      return n;
    }
    constexpr std::string_view kOthers[] = {"include", "import",     "from", "extends", "block",
                                            "call",    "autoescape", "do",   "trans"};
    if (std::find(std::begin(kOthers), std::end(kOthers), word) != std::end(kOthers)) {
      unsupported(fmt::format("the tag {} is not built", word));
    }
    fail(fmt::format("the tag \"{}\" is unknown here", word.substr(0, 40)));
  }

  NodePtr branch() {
    const Depth depth(*this);
    NodePtr n = node(Op::branch);
    add(*n, expression());
    want_end_of_tag();
    n->body = statements({"elif", "else", "endif"});
    take();
    const std::string word = take().text;
    if (word == "elif") {
      n->other.push_back(branch());
      return n;
    }
    if (word == "else") {
      n->other = body_until("endif");
    } else {
      want_end_of_tag();
    }
    return n;
  }

  NodePtr loop() {
    NodePtr n = node(Op::loop);
    n->names = targets();
    if (!skip_word("in")) fail(fmt::format("expected in, found {}", found()));
    add(*n, expression_or_tuple(/*choice=*/false));
    if (skip_word("if")) add(*n, expression());
    if (is_word("recursive")) unsupported("a recursive loop is not built");
    want_end_of_tag();
    ++loops_;
    n->body = statements({"else", "endfor"});
    --loops_;
    take();
    if (take().text == "else") {
      n->other = body_until("endfor");
    } else {
      want_end_of_tag();
    }
    return n;
  }

  std::vector<std::string> targets() {
    const bool brackets = skip_sign("(");
    std::vector<std::string> names{want_name()};
    while (skip_sign(",")) {
      if (peek().type != Type::name || is_word("in")) break;
      names.push_back(want_name());
    }
    if (brackets) want_sign(")");
    return names;
  }

  NodePtr assign() {
    NodePtr n = node(Op::assign);
    if (peek(1).type == Type::sign && peek(1).text == ".") {
      n->text = want_name();
      take();
      n->names = {want_name()};
    } else {
      n->names = targets();
    }
    if (skip_sign("=")) {
      add(*n, expression_or_tuple());
      want_end_of_tag();
      return n;
    }
    if (n->names.size() != 1 || !n->text.empty())
      fail(fmt::format("expected '=', found {}", found()));
    n->op = Op::assign_block;
    if (is_sign("|")) add(*n, filters(nullptr));
    n->body = body_until("endset");
    return n;
  }

  NodePtr macro() {
    NodePtr n = node(Op::macro, want_name());
    want_sign("(");
    while (!is_sign(")")) {
      n->names.push_back(want_name());
      if (skip_sign("=")) {
        add(*n, expression());
      } else if (!n->kids.empty()) {
        fail("a parameter without a default behind one that has one");
      }
      if (!skip_sign(",")) break;
    }
    want_sign(")");
    const int outside = std::exchange(loops_, 0);
    n->body = body_until("endmacro");
    loops_ = outside;
    return n;
  }

  NodePtr scope() {
    NodePtr n = node(Op::scope);
    while (peek().type == Type::name) {
      n->names.push_back(want_name());
      want_sign("=");
      add(*n, expression());
      if (!skip_sign(",")) break;
    }
    n->body = body_until("endwith");
    return n;
  }

  // ---- expressions, from the loosest binding to the tightest ----

  /// a, b without brackets is a tuple.
  NodePtr expression_or_tuple(bool choice = true) {
    NodePtr first = choice ? expression() : logic_or();
    if (!is_sign(",")) return first;
    NodePtr n = node_of(Op::tuple, "", std::move(first));
    while (skip_sign(",")) {
      if (peek().type == Type::output_end || peek().type == Type::tag_end) break;
      add(*n, choice ? expression() : logic_or());
    }
    return n;
  }

  NodePtr expression() {
    const Depth depth(*this);
    NodePtr n = logic_or();
    while (skip_word("if")) {
      NodePtr test = logic_or();
      NodePtr otherwise = skip_word("else") ? expression() : nullptr;
      n = node_of(Op::choice, "", std::move(n), std::move(test), std::move(otherwise));
    }
    return n;
  }
  NodePtr logic_or() {
    NodePtr n = logic_and();
    while (skip_word("or")) n = node_of(Op::binary, "or", std::move(n), logic_and());
    return n;
  }
  NodePtr logic_and() {
    NodePtr n = logic_not();
    while (skip_word("and")) n = node_of(Op::binary, "and", std::move(n), logic_not());
    return n;
  }
  NodePtr logic_not() {
    const Depth depth(*this);
    if (skip_word("not")) return node_of(Op::unary, "not", logic_not());
    return comparison();
  }
  NodePtr comparison() {
    NodePtr n = sum();
    constexpr std::string_view kSigns[] = {"==", "!=", "<", "<=", ">", ">="};
    NodePtr chain;
    for (;;) {
      std::string op;
      const auto* sign = std::find(std::begin(kSigns), std::end(kSigns), peek().text);
      if ((peek().type == Type::sign && sign != std::end(kSigns)) || is_word("in")) {
        op = take().text;
      } else if (is_word("not") && peek(1).type == Type::name && peek(1).text == "in") {
        take();
        take();
        op = "not in";
      } else {
        return chain ? std::move(chain) : std::move(n);
      }
      if (!chain) chain = node_of(Op::compare, "", std::move(n));
      chain->names.push_back(op);
      add(*chain, sum());
    }
  }
  /// Operators of one strength, from the left.
  template <typename Next>
  NodePtr binary(std::initializer_list<std::string_view> signs, Next next) {
    NodePtr n = (this->*next)();
    while (peek().type == Type::sign &&
           std::find(signs.begin(), signs.end(), peek().text) != signs.end()) {
      std::string op = take().text;
      NodePtr right = (this->*next)();
      n = node_of(Op::binary, std::move(op), std::move(n), std::move(right));
    }
    return n;
  }
  NodePtr sum() { return binary({"+", "-"}, &Parser::concatenation); }
  NodePtr concatenation() { return binary({"~"}, &Parser::product); }
  NodePtr product() { return binary({"*", "/", "//", "%"}, &Parser::power); }
  NodePtr power() { return binary({"**"}, &Parser::signed_with_filters); }
  NodePtr signed_with_filters() { return with_sign(true); }
  NodePtr with_sign(bool with_filters) {
    const Depth depth(*this);
    NodePtr n;
    if (is_sign("-") || is_sign("+")) {
      std::string op = take().text;
      n = node_of(Op::unary, std::move(op), with_sign(false));
    } else {
      n = postfix(primary());
    }
    if (!with_filters) return n;
    for (;;) {
      if (is_sign("|")) {
        n = filters(std::move(n));
      } else if (is_word("is")) {
        n = test(std::move(n));
      } else if (is_sign("(") && (n->op == Op::filter)) {
        n = call(std::move(n));
      } else {
        return n;
      }
    }
  }

  /// | a | b(...): `target` is null for the filters of a block.
  NodePtr filters(NodePtr target) {
    bool first = target == nullptr && !is_sign("|");
    while (first || skip_sign("|")) {
      first = false;
      std::string name = want_name();
      if (!has_filter(name)) unsupported(fmt::format("the filter {} is not built", name));
      NodePtr n = node_of(Op::filter, std::move(name), std::move(target));
      if (skip_sign("(")) arguments(*n);
      target = std::move(n);
    }
    return target;
  }

  NodePtr test(NodePtr target) {
    take();  // is
    const bool negated = skip_word("not");
    std::string name = want_name();
    if (!has_test(name)) unsupported(fmt::format("the test {} is not built", name));
    NodePtr n = node_of(Op::test, std::move(name), std::move(target));
    const bool word = peek().type == Type::name && peek().text != "and" && peek().text != "or" &&
                      peek().text != "else" && peek().text != "if" && peek().text != "is" &&
                      peek().text != "in" && peek().text != "not" && peek().text != "recursive";
    if (skip_sign("(")) {
      arguments(*n);
    } else if (word || peek().type == Type::string || peek().type == Type::integer ||
               peek().type == Type::real || is_sign("[") || is_sign("{")) {
      add(*n, postfix(primary()));
    }
    return negated ? node_of(Op::unary, "not", std::move(n)) : std::move(n);
  }

  /// Behind the opening bracket, up to and with the closing one.
  void arguments(Node& n) {
    const Depth depth(*this);
    while (!is_sign(")")) {
      if (is_sign("*") || is_sign("**")) unsupported("arguments with * or ** are not built");
      if (peek().type == Type::name && peek(1).type == Type::sign && peek(1).text == "=") {
        n.names.push_back(take().text);
        take();
      } else if (!n.names.empty()) {
        fail("a plain argument behind one with a name");
      }
      add(n, expression());
      if (!skip_sign(",")) break;
    }
    want_sign(")");
  }

  NodePtr call(NodePtr callee) {
    NodePtr n = node_of(Op::call, "", std::move(callee));
    take();
    arguments(*n);
    return n;
  }

  NodePtr postfix(NodePtr n) {
    for (;;) {
      if (skip_sign(".")) {
        if (peek().type == Type::integer) {  // a.0 is a[0]
          n = node_of(Op::item, "", std::move(n), primary());
        } else {
          n = node_of(Op::attribute, want_name(), std::move(n));
        }
      } else if (is_sign("[")) {
        take();
        n = subscript(std::move(n));
      } else if (is_sign("(")) {
        n = call(std::move(n));
      } else {
        return n;
      }
    }
  }

  NodePtr subscript(NodePtr target) {
    NodePtr parts[3];
    size_t n_colon = 0;
    while (!is_sign("]")) {
      if (skip_sign(":")) {
        if (++n_colon > 2) fail("a slice with more than two colons");
      } else {
        if (parts[n_colon]) fail(fmt::format("expected ']', found {}", found()));
        parts[n_colon] = expression();
      }
    }
    want_sign("]");
    if (n_colon == 0) {
      if (!parts[0]) fail("expected an index, found ']'");
      return node_of(Op::item, "", std::move(target), std::move(parts[0]));
    }
    return node_of(Op::slice, "", std::move(target), std::move(parts[0]), std::move(parts[1]),
                   std::move(parts[2]));
  }

  [[nodiscard]] NodePtr constant(Value v) const {
    NodePtr n = node(Op::constant);
    n->value = std::move(v);
    return n;
  }

  NodePtr primary() {
    const Depth depth(*this);
    switch (peek().type) {
      case Type::string: {
        std::string s;
        while (peek().type == Type::string) s += take().text;  // 'a' 'b' is 'ab'
        return constant(std::move(s));
      }
      case Type::integer: {
        const std::string& digits = peek().text;
        int64_t v = 0;
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), v);
        if (error != std::errc()) unsupported("a number of more than 64 bits is not built");
        (void)end;
        take();
        return constant(v);
      }
      case Type::real:
        return constant(std::strtod(take().text.c_str(), nullptr));
      case Type::name: {
        const std::string word = take().text;
        if (word == "true" || word == "True") return constant(true);
        if (word == "false" || word == "False") return constant(false);
        if (word == "none" || word == "None") return constant(Value::none());
        return node(Op::name, word);
      }
      case Type::sign:
        break;
      default:
        fail(fmt::format("expected an expression, found {}", found()));
    }
    if (skip_sign("[")) return members(Op::list, "]");
    if (skip_sign("{")) return dict();
    if (skip_sign("(")) {
      if (skip_sign(")")) return node(Op::tuple);
      NodePtr first = expression();
      if (skip_sign(")")) return first;
      want_sign(",");
      NodePtr n = members(Op::tuple, ")");
      add(*n, std::move(first));
      std::rotate(n->kids.begin(), n->kids.end() - 1, n->kids.end());
      return n;
    }
    fail(fmt::format("expected an expression, found {}", found()));
  }
  NodePtr members(Op op, std::string_view close) {
    NodePtr n = node(op);
    while (!is_sign(close)) {
      add(*n, expression());
      if (!skip_sign(",")) break;
    }
    want_sign(close);
    return n;
  }
  NodePtr dict() {
    NodePtr n = node(Op::dict);
    while (!is_sign("}")) {
      add(*n, expression());
      want_sign(":");
      add(*n, expression());
      if (!skip_sign(",")) break;
    }
    want_sign("}");
    return n;
  }

  std::vector<Token> tokens_;
  const std::string& name_;
  size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;
};

}  // namespace

NodePtr parse(std::string_view source, const std::string& name) {
  return Parser(Lexer(source, name).tokens(), name).whole();
}

}  // namespace krait::jinja
