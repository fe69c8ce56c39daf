#include "tokenizer/jinja_interpreter.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>

#include "base/error.h"
#include "tokenizer/unicode.h"

namespace krait::jinja {

namespace {

constexpr size_t kMaxBytes = size_t{64} << 20;  // of all strings and lists made
constexpr int64_t kMaxSteps = 4'000'000;
constexpr int kMaxDepth = 400;  // of nodes within each other, macros included
constexpr int64_t kMaxRange = 100'000;

// Statements leave a loop by these.
enum class Flow { on, leave, next };

/// Names and values of one block of the template, within those of another.
struct Scope {
  Scope* outer = nullptr;
  std::map<std::string, Value, std::less<>> values{};

  [[nodiscard]] const Value* find(std::string_view name) const {
    for (const Scope* s = this; s != nullptr; s = s->outer) {
      if (const auto it = s->values.find(name); it != s->values.end()) return &it->second;
    }
    return nullptr;
  }
  void set(const std::string& name, Value v) { values.insert_or_assign(name, std::move(v)); }
};

// ---- text as Python sees it ------------------------------------------------------------------

bool is_python_space(char32_t c) { return unicode::is_white_space(c) || (c >= 0x1c && c <= 0x1f); }

int64_t length_of(std::string_view s) {
  return std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

/// The byte at which character `n` begins.
size_t byte_of(std::string_view s, int64_t n) {
  size_t at = 0;
  while (n-- > 0 && at < s.size()) at += unicode::next(s, at).length;
  return at;
}

std::string_view strip(std::string_view s, const std::string* chars, bool left, bool right) {
  const auto goes = [&](std::string_view character, char32_t code) {
    return chars == nullptr ? is_python_space(code) : chars->find(character) != std::string::npos;
  };
  while (left && !s.empty()) {
    const unicode::Char c = unicode::next(s, 0);
    if (!goes(s.substr(0, c.length), c.code)) break;
    s.remove_prefix(c.length);
  }
  while (right && !s.empty()) {
    const size_t at = unicode::previous(s, s.size());
    if (!goes(s.substr(at), unicode::next(s, at).code)) break;
    s.remove_suffix(s.size() - at);
  }
  return s;
}

std::string repeated(const std::string& s, size_t times) {
  std::string out;
  const size_t size = s.size() * times;
  out.reserve(size);
  if (size > 0) out = s;
  while (out.size() < size) out.append(out, 0, size - out.size());
  return out;
}

template <typename Map>
std::string mapped(std::string_view s, Map map) {
  std::string out;
  for (size_t at = 0; at < s.size();) {
    const unicode::Char c = unicode::next(s, at);
    unicode::append(out, map(c.code));
    at += c.length;
  }
  return out;
}
char32_t upper(char32_t c) {
  return static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c)));
}
char32_t lower(char32_t c) {
  return static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
}
std::string upper_text(std::string_view s) { return mapped(s, upper); }
std::string lower_text(std::string_view s) { return mapped(s, lower); }
std::string capitalized(std::string_view s) {
  bool first = true;
  return mapped(s, [&](char32_t c) { return std::exchange(first, false) ? upper(c) : lower(c); });
}
/// A capital behind every character for which `starts` holds.
template <typename Starts>
std::string titled(std::string_view s, Starts starts) {
  bool start = true;
  return mapped(s, [&](char32_t c) {
    const char32_t out = start ? upper(c) : lower(c);
    start = starts(c);
    return out;
  });
}

class Interpreter {
 public:
  Interpreter(const std::string& name, Arena& arena, const Variables& variables)
      : name_(name), arena_(arena), now_(variables.now) {
    for (const auto& [key, value] : variables.values) globals_.set(key, value);
    add_globals();
  }

  std::string run(const Node& root) {
    Scope top;
    top.outer = &globals_;
    top_ = &top;
    (void)statements(root.body, top);
    return std::move(out_);
  }

 private:
  // ---- limits and errors ----

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::format, fmt::format("{}, line {}: {}", name_, line_, what));
  }
  [[noreturn]] void unsupported(const std::string& what) const {
    throw Error(ErrorKind::unsupported, fmt::format("{}, line {}: {}", name_, line_, what),
                "krait reads the part of Jinja that chat templates use");
  }
  void step() {
    if (++steps_ > kMaxSteps) fail("the template does not come to an end");
  }
  /// Counts what is made, before it is made.
  void spend(size_t bytes) {
    if (bytes > kMaxBytes || (spent_ += bytes) > kMaxBytes)
      fail("the template takes too much memory");
    steps_ += static_cast<int64_t>(bytes / 64);
  }
  Value text(std::string s) {
    spend(s.size());
    return s;
  }
  Value list(List items, Kind kind = Kind::list) {
    spend(items.size() * sizeof(Value));
    return arena_.list(std::move(items), kind);
  }
  std::string str(const Value& v) {
    if (v.kind == Kind::undefined) return {};
    std::string s = to_text(v, kMaxBytes);
    spend(s.size());
    return s;
  }
  struct Depth {
    explicit Depth(Interpreter& i) : self(i) {
      if (++self.depth_ > kMaxDepth) self.fail("the template calls itself too deeply");
    }
    ~Depth() { --self.depth_; }
    Depth(const Depth&) = delete;
    Depth& operator=(const Depth&) = delete;
    Interpreter& self;
  };

  // ---- statements ----

  Flow statements(const std::vector<NodePtr>& body, Scope& scope) {
    const Depth depth(*this);
    for (const NodePtr& n : body) {
      const Flow flow = statement(*n, scope);
      if (flow != Flow::on) return flow;
    }
    return Flow::on;
  }
  /// What `body` writes, instead of writing it.
  std::string captured(const std::vector<NodePtr>& body, Scope& scope) {
    std::string outer = std::exchange(out_, {});
    (void)statements(body, scope);
    return std::exchange(out_, std::move(outer));
  }
  void write(std::string_view s) {
    spend(s.size());
    out_ += s;
  }

  Flow statement(const Node& n, Scope& scope) {
    step();
    line_ = n.line;
    switch (n.op) {
      case Op::text:
        write(n.text);
        return Flow::on;
      case Op::output:
        write(str(eval(*n.kids[0], scope)));
        return Flow::on;
      case Op::sequence:
        return statements(n.body, scope);
      case Op::branch:
        return statements(truth(eval(*n.kids[0], scope)) ? n.body : n.other, scope);
      case Op::loop:
        return loop(n, scope);
      case Op::assign:
        assign(n, eval(*n.kids[0], scope), scope);
        return Flow::on;
      case Op::assign_block: {
        Scope inner{&scope};
        Value v = captured(n.body, inner);
        if (!n.kids.empty()) v = filter_chain(*n.kids[0], std::move(v), scope);
        assign(n, std::move(v), scope);
        return Flow::on;
      }
      case Op::macro:
        define(n, scope);
        return Flow::on;
      case Op::filter_block: {
        Scope inner{&scope};
        write(str(filter_chain(*n.kids[0], captured(n.body, inner), scope)));
        return Flow::on;
      }
      case Op::scope: {
        Scope inner{&scope};
        for (size_t i = 0; i < n.names.size(); ++i) inner.set(n.names[i], eval(*n.kids[i], inner));
        return statements(n.body, inner);
      }
      case Op::leave:
        return Flow::leave;
      case Op::next:
        return Flow::next;
      default:
        return Flow::on;
    }
  }

  void unpack(const std::vector<std::string>& names, const Value& v, Scope& scope) {
    if (names.size() == 1) {
      scope.set(names[0], v);
      return;
    }
    const List parts = items_of(v);
    if (parts.size() != names.size()) {
      fail(fmt::format("{} names for {} values", names.size(), parts.size()));
    }
    for (size_t i = 0; i < names.size(); ++i) scope.set(names[i], parts[i]);
  }

  void assign(const Node& n, Value v, Scope& scope) {
    if (n.text.empty()) {
      unpack(n.names, v, scope);
      return;
    }
    const Value* target = scope.find(n.text);
    if (target == nullptr || target->kind != Kind::space) {
      fail(fmt::format("{}.{} cannot be set: {} is no namespace", n.text, n.names[0], n.text));
    }
    spend(sizeof v);
    target->dict->set(n.names[0], std::move(v));
  }

  Flow loop(const Node& n, Scope& scope) {
    List items = items_of(eval(*n.kids[0], scope));
    if (n.kids.size() > 1) {
      List kept;
      for (Value& item : items) {
        step();
        Scope inner{&scope};
        unpack(n.names, item, inner);
        if (truth(eval(*n.kids[1], inner))) kept.push_back(std::move(item));
      }
      items = std::move(kept);
    }
    if (items.empty()) return statements(n.other, scope);
    const Value* outside = scope.find("loop");
    const int64_t level =
        outside != nullptr && outside->kind == Kind::loop ? outside->loop->depth + 1 : 1;
    spend(items.size() * sizeof(Value));
    const Value state = arena_.loop(std::move(items), level);
    Loop& l = *state.loop;
    for (l.index = 0; l.index < l.items.size(); ++l.index) {
      step();
      Scope inner{&scope};
      inner.set("loop", state);
      unpack(n.names, l.items[l.index], inner);
      if (statements(n.body, inner) == Flow::leave) break;
    }
    return Flow::on;
  }

  /// A macro sees its parameters and the template's variables as they are at the time of the call.
  void define(const Node& n, Scope& scope) {
    // Not the scope of a loop or another macro, which may end before the call.
    Scope* around = top_;
    scope.set(n.text, arena_.function(n.text, [this, &n, around](const Arguments& a) {
      const Depth depth(*this);
      if (a.values.size() > n.names.size()) {
        fail(fmt::format("the macro {} takes {} arguments, found {}", n.text, n.names.size(),
                         a.values.size()));
      }
      Scope inner{around};
      const size_t first_default = n.names.size() - n.kids.size();
      for (size_t i = 0; i < n.names.size(); ++i) {
        const auto named = std::find_if(a.named.begin(), a.named.end(),
                                        [&](const auto& p) { return p.first == n.names[i]; });
        if (i < a.values.size()) {
          inner.set(n.names[i], a.values[i]);
        } else if (named != a.named.end()) {
          inner.set(n.names[i], named->second);
        } else if (i >= first_default) {
          inner.set(n.names[i], eval(*n.kids[i - first_default], inner));
        } else {
          inner.set(n.names[i], Value::undefined(n.names[i]));
        }
      }
      for (const auto& [key, value] : a.named) {
        if (std::find(n.names.begin(), n.names.end(), key) == n.names.end()) {
          fail(fmt::format("the macro {} has no parameter {}", n.text, key));
        }
      }
      return Value(captured(n.body, inner));
    }));
  }

  // ---- expressions ----

  Value eval(const Node& n, Scope& scope) {
    const Depth depth(*this);
    step();
    switch (n.op) {
      case Op::constant:
        return n.value;
      case Op::name: {
        const Value* v = scope.find(n.text);
        return v != nullptr ? *v : Value::undefined(n.text);
      }
      case Op::list:
      case Op::tuple: {
        List items;
        for (const NodePtr& kid : n.kids) items.push_back(eval(*kid, scope));
        return list(std::move(items), n.op == Op::list ? Kind::list : Kind::tuple);
      }
      case Op::dict: {
        Value v = arena_.dict();
        for (size_t i = 0; i + 1 < n.kids.size(); i += 2) {
          const Value key = eval(*n.kids[i], scope);
          if (!key.is_string()) unsupported("a dict whose keys are no strings is not built");
          spend(key.text->size() + sizeof(Value));
          v.dict->set(*key.text, eval(*n.kids[i + 1], scope));
        }
        return v;
      }
      case Op::attribute:
        return attribute(eval(*n.kids[0], scope), n.text);
      case Op::item: {
        const Value target = eval(*n.kids[0], scope);
        return item(target, eval(*n.kids[1], scope));
      }
      case Op::slice:
        return slice(n, scope);
      case Op::call:
        return call(n, scope);
      case Op::filter: {
        Value target = eval(*n.kids[0], scope);
        return filter(n, std::move(target), scope);
      }
      case Op::test: {
        const Value target = eval(*n.kids[0], scope);
        return test(n.text, target, arguments(n, scope));
      }
      case Op::unary: {
        const Value v = eval(*n.kids[0], scope);
        if (n.text == "not") return !truth(v);
        require_defined(v);
        if (!v.is_number()) fail(fmt::format("{} of {}", n.text, type_name(v)));
        if (n.text == "+") return v.kind == Kind::real ? v : Value(v.to_integer());
        if (v.kind == Kind::real) return -v.real;
        if (v.to_integer() == INT64_MIN) overflow();
        return -v.to_integer();
      }
      case Op::binary:
        return binary(n, scope);
      case Op::compare: {
        Value left = eval(*n.kids[0], scope);
        for (size_t i = 0; i < n.names.size(); ++i) {
          Value right = eval(*n.kids[i + 1], scope);
          if (!holds(n.names[i], left, right)) return false;
          left = std::move(right);
        }
        return true;
      }
      case Op::choice:
        if (truth(eval(*n.kids[1], scope))) return eval(*n.kids[0], scope);
        return n.kids[2] ? eval(*n.kids[2], scope) : Value::undefined("the result of an if");
      default:
        return {};
    }
  }

  void require_defined(const Value& v) const {
    if (v.kind == Kind::undefined)
      fail(fmt::format("{} is undefined", v.text ? *v.text : "a value"));
  }
  [[noreturn]] void overflow() const { unsupported("a number of more than 64 bits is not built"); }

  Value binary(const Node& n, Scope& scope) {
    const std::string& op = n.text;
    Value a = eval(*n.kids[0], scope);
    if (op == "and") return truth(a) ? eval(*n.kids[1], scope) : a;
    if (op == "or") return truth(a) ? a : eval(*n.kids[1], scope);
    const Value b = eval(*n.kids[1], scope);
    if (op == "~") return text(str(a) + str(b));
    require_defined(a);
    require_defined(b);
    if (op == "+" && a.is_string() && b.is_string()) {
      spend(a.text->size() + b.text->size());
      return *a.text + *b.text;
    }
    if (op == "+" && a.is_sequence() && a.kind == b.kind) {
      List items = *a.list;
      items.insert(items.end(), b.list->begin(), b.list->end());
      return list(std::move(items), a.kind);
    }
    if (op == "*" && ((a.is_string() && b.is_integer()) || (a.is_integer() && b.is_string()))) {
      const std::string& s = a.is_string() ? *a.text : *b.text;
      const int64_t times = std::max<int64_t>(0, (a.is_string() ? b : a).to_integer());
      if (!s.empty() && static_cast<uint64_t>(times) > kMaxBytes / s.size()) spend(SIZE_MAX);
      spend(s.size() * static_cast<size_t>(times));
      return repeated(s, static_cast<size_t>(times));
    }
    if (op == "%" && a.is_string()) unsupported("formatting a string with % is not built");
    if (!a.is_number() || !b.is_number()) {
      fail(fmt::format("{} between {} and {}", op, type_name(a), type_name(b)));
    }
    if (op == "/" || op == "//" || op == "%") {
      if (b.to_real() == 0) fail("division by zero");
    }
    if (op == "/") return a.to_real() / b.to_real();
    if (a.kind == Kind::real || b.kind == Kind::real) return real(op, a.to_real(), b.to_real());
    return integer(op, a.to_integer(), b.to_integer());
  }
  [[nodiscard]] Value real(const std::string& op, double a, double b) const {
    if (op == "+") return a + b;
    if (op == "-") return a - b;
    if (op == "*") return a * b;
    if (op == "//") return std::floor(a / b);
    if (op == "**") return std::pow(a, b);
    const double rest = std::fmod(a, b);  // %: with the sign of b
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
  }
  [[nodiscard]] Value integer(const std::string& op, int64_t a, int64_t b) const {
    int64_t v = 0;
    bool over = false;
    if (op == "+") {
      over = __builtin_add_overflow(a, b, &v);
    } else if (op == "-") {
      over = __builtin_sub_overflow(a, b, &v);
    } else if (op == "*") {
      over = __builtin_mul_overflow(a, b, &v);
    } else if (op == "**") {
      if (b < 0) return std::pow(static_cast<double>(a), static_cast<double>(b));
      v = 1;
      // More than 63 doublings overflow; 0, 1 and -1 repeat.
      const int64_t times = b <= 64 ? b : 64 + b % 2;
      for (int64_t i = 0; i < times && !over; ++i) over = __builtin_mul_overflow(v, a, &v);
    } else {
      if (a == INT64_MIN && b == -1) overflow();
      const int64_t rest = a % b;
      const bool below = rest != 0 && (rest < 0) != (b < 0);  // Python rounds down
      v = op == "%" ? (below ? rest + b : rest) : a / b - (below ? 1 : 0);
    }
    if (over) overflow();
    return v;
  }

  bool holds(const std::string& op, const Value& a, const Value& b) {
    if (op == "==") return equal(a, b);
    if (op == "!=") return !equal(a, b);
    if (op == "in") return contains(b, a);
    if (op == "not in") return !contains(b, a);
    const std::optional<int> order = compare(a, b);
    if (!order) {
      require_defined(a);
      require_defined(b);
      fail(fmt::format("{} between {} and {}", op, type_name(a), type_name(b)));
    }
    return op == "<" ? *order < 0 : op == "<=" ? *order <= 0 : op == ">" ? *order > 0 : *order >= 0;
  }

  bool contains(const Value& in, const Value& v) {
    if (in.kind == Kind::undefined) return false;
    if (in.is_string()) {
      if (!v.is_string()) fail(fmt::format("in: {} in a str", type_name(v)));
      steps_ += static_cast<int64_t>(in.text->size() / 64);
      return in.text->find(*v.text) != std::string::npos;
    }
    if (in.is_mapping()) return v.is_string() && in.dict->find(*v.text) != nullptr;
    if (!in.is_sequence()) fail(fmt::format("in: a {} holds nothing", type_name(in)));
    steps_ += static_cast<int64_t>(in.list->size());
    return std::any_of(in.list->begin(), in.list->end(),
                       [&](const Value& item) { return equal(item, v); });
  }

  /// What a for statement or a filter walks over.
  List items_of(const Value& v) {
    switch (v.kind) {
      case Kind::undefined:
        return {};
      case Kind::list:
      case Kind::tuple:
        spend(v.list->size() * sizeof(Value));
        return *v.list;
      case Kind::dict: {
        List keys;
        for (const auto& [key, value] : v.dict->items) keys.emplace_back(text(key));
        spend(keys.size() * sizeof(Value));
        return keys;
      }
      case Kind::string: {
        List characters;
        spend(v.text->size() * sizeof(Value));
        for (size_t at = 0; at < v.text->size();) {
          const size_t n = unicode::next(*v.text, at).length;
          characters.emplace_back(v.text->substr(at, n));
          at += n;
        }
        return characters;
      }
      default:
        fail(fmt::format("a {} cannot be walked over", type_name(v)));
    }
  }

  // ---- members ----

  Value attribute(const Value& v, const std::string& name) {
    switch (v.kind) {
      case Kind::undefined:
        require_defined(v);
        break;
      case Kind::dict:
        // Jinja looks for a method first, then for a key.
        if (Value m = dict_method(v, name); m.kind != Kind::undefined) return m;
        [[fallthrough]];
      case Kind::space: {
        const Value* member = v.dict->find(name);
        return member != nullptr ? *member : Value::undefined(name);
      }
      case Kind::loop:
        return loop_member(v, name);
      case Kind::string:
        return string_method(v, name);
      case Kind::list:
      case Kind::tuple:
        return list_method(v, name);
      default:
        break;
    }
    return Value::undefined(name);
  }

  Value item(const Value& v, const Value& index) {
    require_defined(v);
    if (index.is_string()) {
      if (v.is_mapping() || v.kind == Kind::space) {
        const Value* member = v.dict->find(*index.text);
        if (member != nullptr) return *member;
      }
      return attribute(v, *index.text);
    }
    if (!index.is_integer()) return Value::undefined("an item");
    int64_t i = index.to_integer();
    if (v.is_sequence()) {
      const auto n = std::ssize(*v.list);
      if (i < 0) i += n;
      return i >= 0 && i < n ? (*v.list)[static_cast<size_t>(i)] : Value::undefined("an item");
    }
    if (v.is_string()) {
      const int64_t n = length_of(*v.text);
      steps_ += n / 64;
      if (i < 0) i += n;
      if (i < 0 || i >= n) return Value::undefined("an item");
      const size_t at = byte_of(*v.text, i);
      return text(v.text->substr(at, unicode::next(*v.text, at).length));
    }
    return Value::undefined("an item");
  }

  Value slice(const Node& n, Scope& scope) {
    const Value v = eval(*n.kids[0], scope);
    require_defined(v);
    std::array<std::optional<int64_t>, 3> bounds;
    for (size_t i = 0; i < 3; ++i) {
      if (!n.kids[i + 1]) continue;
      const Value b = eval(*n.kids[i + 1], scope);
      if (b.kind == Kind::none) continue;
      if (!b.is_integer()) fail(fmt::format("a slice by {}", type_name(b)));
      bounds[i] = b.to_integer();
    }
    if (!v.is_string() && !v.is_sequence()) fail(fmt::format("a slice of {}", type_name(v)));
    const List items = items_of(v);
    const auto size = std::ssize(items);
    const int64_t stride = bounds[2].value_or(1);
    if (stride == 0) fail("a slice in steps of 0");
    const auto clip = [&](const std::optional<int64_t>& b, int64_t otherwise) {
      if (!b) return otherwise;
      const int64_t at = *b < 0 ? std::max<int64_t>(*b + size, -1) : *b;
      return stride > 0 ? std::clamp<int64_t>(at, 0, size) : std::clamp<int64_t>(at, -1, size - 1);
    };
    const int64_t begin = clip(bounds[0], stride > 0 ? 0 : size - 1);
    const int64_t end = clip(bounds[1], stride > 0 ? size : -1);
    List out;
    for (int64_t i = begin; stride > 0 ? i < end : i > end;) {
      out.push_back(items[static_cast<size_t>(i)]);
      if (__builtin_add_overflow(i, stride, &i)) break;
    }
    if (!v.is_string()) return list(std::move(out), v.kind);
    std::string s;
    for (const Value& c : out) s += *c.text;
    return text(std::move(s));
  }

  Value loop_member(const Value& v, const std::string& name) {
    Loop& l = *v.loop;
    const auto i = static_cast<int64_t>(l.index);
    const auto n = std::ssize(l.items);
    if (name == "index") return i + 1;
    if (name == "index0") return i;
    if (name == "revindex") return n - i;
    if (name == "revindex0") return n - i - 1;
    if (name == "first") return i == 0;
    if (name == "last") return i + 1 == n;
    if (name == "length") return n;
    if (name == "depth") return l.depth;
    if (name == "depth0") return l.depth - 1;
    if (name == "previtem") return i > 0 ? l.items[l.index - 1] : Value::undefined("loop.previtem");
    if (name == "nextitem")
      return i + 1 < n ? l.items[l.index + 1] : Value::undefined("loop.nextitem");
    if (name == "cycle") {
      return method("cycle", [this, i](const Arguments& a) {
        if (a.values.empty()) fail("loop.cycle() without values");
        return a.values[static_cast<size_t>(i) % a.values.size()];
      });
    }
    if (name == "changed") {
      return method("changed", [&l](const Arguments& a) {
        const bool same =
            l.changed &&
            std::equal(l.changed->begin(), l.changed->end(), a.values.begin(), a.values.end(),
                       [](const Value& x, const Value& y) { return equal(x, y); });
        l.changed = a.values;
        return Value(!same);
      });
    }
    return Value::undefined("loop." + name);
  }

  Value method(std::string name, std::function<Value(const Arguments&)> f) {
    spend(sizeof(Function));
    return arena_.function(std::move(name), std::move(f));
  }

  Value dict_method(const Value& v, const std::string& name) {
    const Dict* d = v.dict;
    if (name == "items") return method(name, [this, d](const Arguments&) { return items(*d); });
    if (name == "keys")
      return method(name, [this, v](const Arguments&) { return list(items_of(v)); });
    if (name == "values") {
      return method(name, [this, d](const Arguments&) {
        List out;
        for (const auto& [key, value] : d->items) out.push_back(value);
        return list(std::move(out));
      });
    }
    if (name == "get") {
      return method(name, [this, d](const Arguments& a) {
        const Value& key = argument(a, 0, "key", "get");
        const Value* member = key.is_string() ? d->find(*key.text) : nullptr;
        if (member != nullptr) return *member;
        return a.values.size() > 1 ? a.values[1] : Value::none();
      });
    }
    if (name == "update" || name == "pop" || name == "setdefault" || name == "clear" ||
        name == "popitem") {
      if (d->find(name) == nullptr)
        unsupported(fmt::format("dict.{}() would change a value", name));
    }
    return {};
  }
  Value items(const Dict& d) {
    List out;
    for (const auto& [key, value] : d.items) out.push_back(list({text(key), value}, Kind::tuple));
    return list(std::move(out));
  }

  Value list_method(const Value& v, const std::string& name) {
    const List* l = v.list;
    if (name == "index" || name == "count") {
      return method(name, [this, l, name](const Arguments& a) {
        const Value& wanted = argument(a, 0, "value", name);
        int64_t count = 0;
        for (size_t i = 0; i < l->size(); ++i) {
          step();
          if (!equal((*l)[i], wanted)) continue;
          if (name == "index") return Value(static_cast<int64_t>(i));
          ++count;
        }
        if (name == "index") fail("list.index(): there is no such value");
        return Value(count);
      });
    }
    constexpr std::string_view kChanges[] = {"append", "extend", "insert", "pop",
                                             "remove", "clear",  "sort",   "reverse"};
    if (std::find(std::begin(kChanges), std::end(kChanges), name) != std::end(kChanges)) {
      unsupported(fmt::format("list.{}() would change a value", name));
    }
    return Value::undefined(name);
  }

  [[nodiscard]] const Value& argument(const Arguments& a, size_t i, std::string_view key,
                                      std::string_view of) const {
    if (i < a.values.size()) return a.values[i];
    for (const auto& [name, value] : a.named) {
      if (name == key) return value;
    }
    fail(fmt::format("{}: the argument {} is missing", of, key));
  }
  [[nodiscard]] const Value* optional_argument(const Arguments& a, size_t i,
                                               std::string_view key) const {
    if (i < a.values.size()) return &a.values[i];
    for (const auto& [name, value] : a.named) {
      if (name == key) return &value;
    }
    return nullptr;
  }
  [[nodiscard]] const std::string& string_argument(const Arguments& a, size_t i,
                                                   std::string_view key,
                                                   std::string_view of) const {
    const Value& v = argument(a, i, key, of);
    if (!v.is_string()) fail(fmt::format("{}: expected a str, found {}", of, type_name(v)));
    return *v.text;
  }
  [[nodiscard]] int64_t integer_argument(const Arguments& a, size_t i, std::string_view key,
                                         int64_t otherwise) const {
    const Value* v = optional_argument(a, i, key);
    if (v == nullptr || v->kind == Kind::none) return otherwise;
    if (!v->is_integer()) fail(fmt::format("{}: expected an int, found {}", key, type_name(*v)));
    return v->to_integer();
  }

  Value string_method(const Value& v, const std::string& name) {
    // The value is kept by the function, so that its text lives as long.
    const auto of = [&](auto f) {
      return method(name, [this, v, name, f](const Arguments& a) -> Value {
        steps_ += static_cast<int64_t>(v.text->size() / 64);
        return f(*v.text, a);
      });
    };
    if (name == "strip" || name == "lstrip" || name == "rstrip") {
      return of([this, name](const std::string& s, const Arguments& a) {
        const Value* chars = optional_argument(a, 0, "chars");
        const bool given = chars != nullptr && chars->is_string();
        return text(std::string(
            strip(s, given ? chars->text.get() : nullptr, name != "rstrip", name != "lstrip")));
      });
    }
    if (name == "startswith" || name == "endswith") {
      return of([this, name](const std::string& s, const Arguments& a) {
        const Value& part = argument(a, 0, "prefix", name);
        const auto fits = [&](const Value& p) {
          if (!p.is_string())
            fail(fmt::format("str.{}(): expected a str, found {}", name, type_name(p)));
          return name == "startswith" ? s.starts_with(*p.text) : s.ends_with(*p.text);
        };
        if (part.kind != Kind::tuple) return Value(fits(part));
        return Value(std::any_of(part.list->begin(), part.list->end(), fits));
      });
    }
    if (name == "split" || name == "rsplit") {
      return of([this, name](const std::string& s, const Arguments& a) {
        const Value* by = optional_argument(a, 0, "sep");
        const int64_t most = integer_argument(a, 1, "maxsplit", -1);
        if (by == nullptr || by->kind == Kind::none) {
          if (name == "rsplit") unsupported("str.rsplit() at white space is not built");
          return split_at_space(s, most);
        }
        if (!by->is_string() || by->text->empty()) fail("str.split(): expected a text to split at");
        return split(s, *by->text, most, name == "rsplit");
      });
    }
    if (name == "splitlines") {
      return of([this](const std::string& s, const Arguments&) {
        List lines;
        for (size_t at = 0; at < s.size();) {
          size_t end = s.find_first_of("\r\n", at);
          if (end == std::string::npos) end = s.size();
          lines.push_back(text(s.substr(at, end - at)));
          at = end + (s.compare(end, 2, "\r\n") == 0 ? 2 : 1);
        }
        return list(std::move(lines));
      });
    }
    if (name == "replace") {
      return of([this](const std::string& s, const Arguments& a) {
        return replace(s, string_argument(a, 0, "old", "str.replace()"),
                       string_argument(a, 1, "new", "str.replace()"),
                       integer_argument(a, 2, "count", -1));
      });
    }
    if (name == "join") {
      return of([this](const std::string& s, const Arguments& a) {
        return join(items_of(argument(a, 0, "iterable", "str.join()")), s, /*strict=*/true);
      });
    }
    if (name == "find" || name == "rfind" || name == "index" || name == "count") {
      return of([this, name](const std::string& s, const Arguments& a) {
        const std::string& part = string_argument(a, 0, "sub", "str." + name + "()");
        if (a.values.size() > 1)
          unsupported(fmt::format("str.{}() within bounds is not built", name));
        if (name == "count") {
          int64_t n = 0;
          if (part.empty()) return Value(length_of(s) + 1);
          for (size_t i = s.find(part); i != std::string::npos; i = s.find(part, i + part.size()))
            ++n;
          return Value(n);
        }
        const size_t at = name == "rfind" ? s.rfind(part) : s.find(part);
        if (at == std::string::npos && name == "index") fail("str.index(): there is no such text");
        if (at == std::string::npos) return Value(int64_t{-1});
        return Value(length_of(std::string_view(s).substr(0, at)));
      });
    }
    if (name == "removeprefix" || name == "removesuffix") {
      return of([this, name](const std::string& s, const Arguments& a) {
        const std::string& part = string_argument(a, 0, "affix", "str." + name + "()");
        if (name == "removeprefix" && s.starts_with(part)) return text(s.substr(part.size()));
        if (name == "removesuffix" && s.ends_with(part))
          return text(s.substr(0, s.size() - part.size()));
        return text(s);
      });
    }
    const auto plain = [&](auto f) {
      return of([this, f](const std::string& s, const Arguments&) { return text(f(s)); });
    };
    if (name == "upper") return plain([](const std::string& s) { return upper_text(s); });
    if (name == "lower") return plain([](const std::string& s) { return lower_text(s); });
    if (name == "capitalize") return plain([](const std::string& s) { return capitalized(s); });
    if (name == "title") {
      return plain([](const std::string& s) {
        return titled(s, [](char32_t c) { return !unicode::is_letter(c); });
      });
    }
    if (name == "isdigit" || name == "isalpha" || name == "isalnum" || name == "isspace" ||
        name == "isupper" || name == "islower") {
      return of([name](const std::string& s, const Arguments&) {
        bool all = !s.empty();
        bool cased = false;
        for (size_t at = 0; at < s.size();) {
          const unicode::Char c = unicode::next(s, at);
          at += c.length;
          const bool letter = unicode::is_letter(c.code);
          const bool digit = unicode::is_numeric(c.code);
          if (name == "isdigit") all = all && digit;
          if (name == "isalpha") all = all && letter;
          if (name == "isalnum") all = all && (letter || digit);
          if (name == "isspace") all = all && is_python_space(c.code);
          if (name == "isupper") all = all && c.code == upper(c.code);
          if (name == "islower") all = all && c.code == lower(c.code);
          cased = cased || upper(c.code) != lower(c.code);
        }
        return Value(all && (cased || !(name == "isupper" || name == "islower")));
      });
    }
    constexpr std::string_view kKnown[] = {
        "format",     "encode",    "center",   "ljust",    "rjust",      "zfill",      "partition",
        "rpartition", "translate", "casefold", "swapcase", "expandtabs", "format_map", "rindex"};
    if (std::find(std::begin(kKnown), std::end(kKnown), name) != std::end(kKnown)) {
      unsupported(fmt::format("str.{}() is not built", name));
    }
    return Value::undefined(name);
  }

  Value split(const std::string& s, const std::string& by, int64_t most, bool from_right) {
    std::vector<size_t> cuts;
    if (from_right) {
      for (size_t end = s.size(); most < 0 || std::ssize(cuts) < most;) {
        if (end < by.size()) break;
        const size_t at = s.rfind(by, end - by.size());
        if (at == std::string::npos) break;
        cuts.insert(cuts.begin(), at);
        end = at;
        step();
      }
    } else {
      for (size_t at = s.find(by); at != std::string::npos && (most < 0 || std::ssize(cuts) < most);
           at = s.find(by, at + by.size())) {
        cuts.push_back(at);
        step();
      }
    }
    List parts;
    size_t begin = 0;
    for (const size_t cut : cuts) {
      parts.push_back(text(s.substr(begin, cut - begin)));
      begin = cut + by.size();
    }
    parts.push_back(text(s.substr(begin)));
    return list(std::move(parts));
  }
  Value split_at_space(std::string_view s, int64_t most) {
    List parts;
    for (;;) {
      s = strip(s, nullptr, true, false);
      if (s.empty()) break;
      size_t end = 0;
      if (most >= 0 && std::ssize(parts) >= most) {
        end = strip(s, nullptr, false, true).size();
        parts.push_back(text(std::string(s.substr(0, end))));
        break;
      }
      while (end < s.size() && !is_python_space(unicode::next(s, end).code)) {
        end += unicode::next(s, end).length;
      }
      parts.push_back(text(std::string(s.substr(0, end))));
      s.remove_prefix(end);
    }
    return list(std::move(parts));
  }
  Value replace(const std::string& s, const std::string& from, const std::string& to,
                int64_t count) {
    std::string out;
    size_t at = 0;
    for (; count != 0; --count) {
      step();
      if (from.empty()) {  // Python puts `to` around every character
        spend(to.size());
        out += to;
        if (at >= s.size()) break;
        const size_t n = unicode::next(s, at).length;
        out.append(s, at, n);
        at += n;
        continue;
      }
      const size_t found = s.find(from, at);
      if (found == std::string::npos) break;
      spend(found - at + to.size());
      out.append(s, at, found - at);
      out += to;
      at = found + from.size();
    }
    out.append(s, std::min(at, s.size()));
    return text(std::move(out));
  }
  Value join(const List& parts, const std::string& by, bool strict) {
    std::string out;
    for (size_t i = 0; i < parts.size(); ++i) {
      step();
      if (strict && !parts[i].is_string()) {
        fail(fmt::format("str.join(): expected str, found {}", type_name(parts[i])));
      }
      spend(by.size());
      if (i > 0) out += by;
      out += str(parts[i]);
    }
    return out;
  }

  // ---- calls ----

  Arguments arguments(const Node& n, Scope& scope) {
    Arguments a;
    const size_t n_plain = n.kids.size() - n.names.size();
    for (size_t i = 1; i < n.kids.size(); ++i) {
      Value v = eval(*n.kids[i], scope);
      if (i < n_plain) {
        a.values.push_back(std::move(v));
      } else {
        a.named.emplace_back(n.names[i - n_plain], std::move(v));
      }
    }
    return a;
  }

  Value call(const Node& n, Scope& scope) {
    const Value callee = eval(*n.kids[0], scope);
    const Node& c = *n.kids[0];
    if (callee.kind != Kind::function) {
      if (c.op == Op::attribute || c.op == Op::name) {
        fail(fmt::format("{} is no function", c.text));
      }
      fail(fmt::format("a {} is called", type_name(callee)));
    }
    const Arguments a = arguments(n, scope);
    line_ = n.line;
    return callee.function->call(a);
  }

  void add_globals() {
    const auto add = [&](const char* name, std::function<Value(const Arguments&)> f) {
      globals_.set(name, arena_.function(name, std::move(f)));
    };
    add("range", [this](const Arguments& a) {
      if (a.values.empty() || a.values.size() > 3) fail("range() takes one to three numbers");
      for (const Value& v : a.values) {
        if (!v.is_integer()) fail(fmt::format("range(): expected an int, found {}", type_name(v)));
      }
      const int64_t begin = a.values.size() > 1 ? a.values[0].to_integer() : 0;
      const int64_t end = a.values[a.values.size() > 1 ? 1 : 0].to_integer();
      const int64_t by = a.values.size() > 2 ? a.values[2].to_integer() : 1;
      if (by == 0) fail("range() in steps of 0");
      List out;
      for (int64_t i = begin; by > 0 ? i < end : i > end;) {
        if (std::ssize(out) >= kMaxRange)
          fail(fmt::format("range() of more than {} numbers", kMaxRange));
        out.emplace_back(i);
        if (__builtin_add_overflow(i, by, &i)) break;
      }
      return list(std::move(out));
    });
    const auto make_dict = [this](Kind kind) {
      return [this, kind](const Arguments& a) {
        Value v = arena_.dict(kind);
        for (const Value& from : a.values) {
          if (!from.is_mapping()) fail(fmt::format("dict() of {}", type_name(from)));
          for (const auto& [key, value] : from.dict->items) v.dict->set(key, value);
          spend(from.dict->items.size() * sizeof(Value));
        }
        for (const auto& [key, value] : a.named) v.dict->set(key, value);
        spend(a.named.size() * sizeof(Value));
        return v;
      };
    };
    add("dict", make_dict(Kind::dict));
    add("namespace", make_dict(Kind::space));
    add("raise_exception", [this](const Arguments& a) -> Value {
      const Value& message = argument(a, 0, "message", "raise_exception()");
      throw Error(ErrorKind::usage, fmt::format("the chat template refuses the messages: {}",
                                                str(message).substr(0, 300)));
    });
    add("strftime_now", [this](const Arguments& a) {
      const std::string& format = string_argument(a, 0, "format", "strftime_now()");
      std::tm local{};
      localtime_r(&now_, &local);
      std::array<char, 256> buffer{};
      if (format.size() > 100) fail("strftime_now() with a format of more than 100 bytes");
      const size_t n = std::strftime(buffer.data(), buffer.size(), format.c_str(), &local);
      return text(unicode::to_valid({buffer.data(), n}));
    });
  }

  // ---- filters ----

  /// The chain of a filter block or block assignment: its innermost filter has no target node.
  Value filter_chain(const Node& n, Value v, Scope& scope) {
    const Depth depth(*this);
    if (n.kids[0]) v = filter_chain(*n.kids[0], std::move(v), scope);
    return filter(n, std::move(v), scope);
  }
  Value filter(const Node& n, Value v, Scope& scope) {
    const Arguments a = arguments(n, scope);
    line_ = n.line;
    return apply(n.text, std::move(v), a);
  }

  Value apply(const std::string& name, Value v, const Arguments& a) {
    step();
    if (name == "trim") {
      const Value* chars = optional_argument(a, 0, "chars");
      const std::string s = str(v);
      return text(std::string(strip(
          s, chars != nullptr && chars->is_string() ? chars->text.get() : nullptr, true, true)));
    }
    if (name == "tojson") {
      JsonStyle style;
      if (const Value* ascii = optional_argument(a, 0, "ensure_ascii"); ascii && truth(*ascii)) {
        unsupported("tojson(ensure_ascii=true) is not built");
      }
      style.indent = std::min<int64_t>(integer_argument(a, 1, "indent", -1), 64);
      if (style.indent >= 0) style.item_separator = ",";
      if (const Value* sort = optional_argument(a, 3, "sort_keys")) style.sort_keys = truth(*sort);
      if (const Value* s = optional_argument(a, 2, "separators");
          s != nullptr && s->kind == Kind::tuple && s->list->size() == 2 &&
          (*s->list)[0].is_string() && (*s->list)[1].is_string()) {
        style.item_separator = *(*s->list)[0].text;
        style.key_separator = *(*s->list)[1].text;
      }
      auto json = to_json(v, style, kMaxBytes);
      if (!json) fail(fmt::format("tojson: a {} has no JSON form", type_name(v)));
      return text(std::move(*json));
    }
    if (name == "length" || name == "count") {
      if (v.kind == Kind::undefined) return int64_t{0};
      if (v.is_string()) return length_of(*v.text);
      if (v.is_sequence()) return std::ssize(*v.list);
      if (v.is_mapping()) return std::ssize(v.dict->items);
      fail(fmt::format("length of {}", type_name(v)));
    }
    if (name == "default" || name == "d") {
      const Value* otherwise = optional_argument(a, 0, "default_value");
      const Value* falsy = optional_argument(a, 1, "boolean");
      const bool replace_it =
          v.kind == Kind::undefined || (falsy != nullptr && truth(*falsy) && !truth(v));
      if (!replace_it) return v;
      return otherwise != nullptr ? *otherwise : Value(std::string());
    }
    if (name == "upper") return text(upper_text(str(v)));
    if (name == "lower") return text(lower_text(str(v)));
    if (name == "capitalize") return text(capitalized(str(v)));
    if (name == "title") {
      // Jinja's filter starts words at white space, hyphens and opening brackets only.
      return text(titled(str(v), [](char32_t c) {
        return is_python_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
      }));
    }
    if (name == "string") return v.is_string() ? v : text(str(v));
    if (name == "safe" || name == "escape" || name == "e") {
      if (name == "safe") return v;
      std::string s = str(v);
      for (const auto& [from, to] :
           {std::pair("&", "&amp;"), std::pair("<", "&lt;"), std::pair(">", "&gt;"),
            std::pair("'", "&#39;"), std::pair("\"", "&#34;")}) {
        s = *replace(s, from, to, -1).text;
      }
      return s;
    }
    if (name == "int") return to_int(v, a);
    if (name == "float") return to_float(v, a);
    if (name == "abs") {
      if (!v.is_number()) fail(fmt::format("abs of {}", type_name(v)));
      if (v.kind == Kind::real) return std::fabs(v.real);
      if (v.to_integer() == INT64_MIN) overflow();
      return std::abs(v.to_integer());
    }
    if (name == "round") {
      if (!v.is_number()) fail(fmt::format("round of {}", type_name(v)));
      const double scale = std::pow(10.0, static_cast<double>(std::clamp<int64_t>(
                                              integer_argument(a, 0, "precision", 0), -300, 300)));
      return std::nearbyint(v.to_real() * scale) / scale;
    }
    if (name == "replace") {
      return replace(str(v), string_argument(a, 0, "old", "replace"),
                     string_argument(a, 1, "new", "replace"), integer_argument(a, 2, "count", -1));
    }
    if (name == "indent") return indent(str(v), a);
    if (name == "items") {
      if (v.kind == Kind::undefined) return list({});
      if (!v.is_mapping()) fail(fmt::format("items of {}", type_name(v)));
      return items(*v.dict);
    }
    if (name == "dictsort") {
      if (!v.is_mapping()) fail(fmt::format("dictsort of {}", type_name(v)));
      Value pairs = items(*v.dict);
      std::stable_sort(pairs.list->begin(), pairs.list->end(), [](const Value& x, const Value& y) {
        return lower_text(*(*x.list)[0].text) < lower_text(*(*y.list)[0].text);
      });
      return pairs;
    }
    return apply_to_items(name, v, a);
  }

  /// The filters of lists.
  Value apply_to_items(const std::string& name, const Value& v, const Arguments& a) {
    if (name == "reverse" && v.is_string()) {
      List characters = items_of(v);
      std::reverse(characters.begin(), characters.end());
      std::string s;
      for (const Value& c : characters) s += *c.text;
      return text(std::move(s));
    }
    List all = items_of(v);
    if (name == "list") return list(std::move(all));
    if (name == "first" || name == "last") {
      if (all.empty()) return Value::undefined("the " + name + " item of an empty sequence");
      return name == "first" ? all.front() : all.back();
    }
    if (name == "reverse") {
      std::reverse(all.begin(), all.end());
      return list(std::move(all));
    }
    if (name == "join") {
      const Value* by = optional_argument(a, 0, "d");
      if (const Value* path = optional_argument(a, 1, "attribute")) {
        for (Value& item : all) item = member(item, *path);
      }
      return join(all, by != nullptr ? str(*by) : "", /*strict=*/false);
    }
    if (name == "sum") {
      Value total = int64_t{0};
      if (const Value* path = optional_argument(a, 0, "attribute");
          path != nullptr && path->kind != Kind::none) {
        for (Value& item : all) item = member(item, *path);
      }
      for (const Value& item : all) {
        if (!item.is_number()) fail(fmt::format("sum of {}", type_name(item)));
        total = total.kind == Kind::real || item.kind == Kind::real
                    ? Value(total.to_real() + item.to_real())
                    : integer("+", total.to_integer(), item.to_integer());
      }
      return total;
    }
    if (name == "sort" || name == "min" || name == "max") return sorted(name, std::move(all), a);
    if (name == "unique") {
      List out;
      for (Value& item : all) {
        const Value key = item.is_string() ? Value(lower_text(*item.text)) : item;
        const bool known = std::any_of(out.begin(), out.end(), [&](const Value& o) {
          step();
          return equal(o.is_string() ? Value(lower_text(*o.text)) : o, key);
        });
        if (!known) out.push_back(std::move(item));
      }
      return list(std::move(out));
    }
    if (name == "map") return map(std::move(all), a);
    return select(name, std::move(all), a);
  }

  Value to_int(const Value& v, const Arguments& a) {
    const int64_t otherwise = integer_argument(a, 0, "default", 0);
    if (integer_argument(a, 1, "base", 10) != 10) unsupported("int() of another base is not built");
    if (v.is_integer()) return v.to_integer();
    if (v.is_string()) {
      if (const auto i = parsed<int64_t>(*v.text)) return *i;
    }
    const double d = v.kind == Kind::real ? v.real
                     : v.is_string()      ? parsed<double>(*v.text).value_or(NAN)
                                          : NAN;
    if (!(std::fabs(d) < 9e18)) return otherwise;
    return static_cast<int64_t>(d);
  }
  template <typename T>
  static std::optional<T> parsed(std::string_view s) {
    s = strip(s, nullptr, true, true);
    if (s.starts_with('+')) s.remove_prefix(1);
    T v{};
    const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), v);
    return error == std::errc() && end == s.data() + s.size() ? std::optional(v) : std::nullopt;
  }
  Value to_float(const Value& v, const Arguments& a) {
    const Value* otherwise = optional_argument(a, 0, "default");
    const double fallback =
        otherwise != nullptr && otherwise->is_number() ? otherwise->to_real() : 0.0;
    if (v.is_number()) return v.to_real();
    return v.is_string() ? parsed<double>(*v.text).value_or(fallback) : fallback;
  }

  Value indent(const std::string& s, const Arguments& a) {
    const Value* width = optional_argument(a, 0, "width");
    std::string by(4, ' ');
    if (width != nullptr && width->is_string()) by = *width->text;
    if (width != nullptr && width->is_integer()) {
      by = std::string(static_cast<size_t>(std::clamp<int64_t>(width->to_integer(), 0, 1000)), ' ');
    }
    const Value* first = optional_argument(a, 1, "first");
    const Value* blank = optional_argument(a, 2, "blank");
    std::string out;
    size_t at = 0;
    for (bool start = true;; start = false) {
      step();
      const size_t end = std::min(s.find('\n', at), s.size());
      const std::string_view line(s.data() + at, end - at);
      const bool wanted = start ? first != nullptr && truth(*first)
                                : !line.empty() || (blank != nullptr && truth(*blank));
      if (!start) out += '\n';
      if (wanted) {
        spend(by.size());
        out += by;
      }
      out += line;
      if (end == s.size()) break;
      at = end + 1;
    }
    return text(std::move(out));
  }

  /// "a.b" or an index, of an item.
  Value member(const Value& v, const Value& path) {
    step();
    if (path.is_integer()) return item(v, path);
    if (!path.is_string()) fail("expected the name of an attribute");
    Value at = v;
    const std::string& p = *path.text;
    for (size_t begin = 0; begin <= p.size();) {
      const size_t end = std::min(p.find('.', begin), p.size());
      const std::string part = p.substr(begin, end - begin);
      if (at.kind == Kind::undefined) return at;
      const bool number =
          !part.empty() && part.size() < 10 &&
          std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
      at = number ? item(at, Value(int64_t{std::stoll(part)})) : item(at, Value(part));
      begin = end + 1;
    }
    return at;
  }

  Value sorted(const std::string& name, List all, const Arguments& a) {
    const bool sort = name == "sort";
    const Value* reverse = sort ? optional_argument(a, 0, "reverse") : nullptr;
    const Value* sensitive = optional_argument(a, sort ? 1 : 0, "case_sensitive");
    const Value* path = optional_argument(a, sort ? 2 : 1, "attribute");
    if (all.empty() && !sort) return Value::undefined("the " + name + " of an empty sequence");
    std::vector<std::pair<Value, Value>> keyed;  // key, item
    for (Value& item : all) {
      Value key = path != nullptr && path->kind != Kind::none ? member(item, *path) : item;
      if (key.is_string() && (sensitive == nullptr || !truth(*sensitive)))
        key = text(lower_text(*key.text));
      keyed.emplace_back(std::move(key), std::move(item));
    }
    // Orders are checked first: a comparison that fails must not leave a sort half done.
    for (size_t i = 1; i < keyed.size(); ++i) {
      if (!compare(keyed[0].first, keyed[i].first)) {
        fail(fmt::format("{} of {} and {}", name, type_name(keyed[0].first),
                         type_name(keyed[i].first)));
      }
    }
    const bool down = reverse != nullptr && truth(*reverse);
    steps_ += std::ssize(keyed) * 4;
    std::stable_sort(keyed.begin(), keyed.end(), [&](const auto& x, const auto& y) {
      const int order = compare(x.first, y.first).value_or(0);
      return down ? order > 0 : order < 0;
    });
    if (name == "min") return keyed.front().second;
    if (name == "max") {
      // The first of equals.
      const auto it = std::find_if(keyed.begin(), keyed.end(), [&](const auto& k) {
        return compare(k.first, keyed.back().first).value_or(1) == 0;
      });
      return it->second;
    }
    List out;
    for (auto& [key, item] : keyed) out.push_back(std::move(item));
    return list(std::move(out));
  }

  Value map(List all, const Arguments& a) {
    const Value* path = optional_argument(a, SIZE_MAX, "attribute");
    const Value* otherwise = optional_argument(a, SIZE_MAX, "default");
    Arguments rest;
    std::string inner;
    if (path == nullptr) {
      inner = string_argument(a, 0, "filter", "map");
      if (!has_filter(inner)) unsupported(fmt::format("the filter {} is not built", inner));
      rest.values.assign(a.values.begin() + 1, a.values.end());
      rest.named = a.named;
    }
    const Depth depth(*this);
    for (Value& item : all) {
      if (path != nullptr) {
        item = member(item, *path);
        if (item.kind == Kind::undefined && otherwise != nullptr) item = *otherwise;
      } else {
        item = apply(inner, std::move(item), rest);
      }
    }
    return list(std::move(all));
  }

  /// select, reject, selectattr, rejectattr
  Value select(const std::string& name, List all, const Arguments& a) {
    const bool by_attribute = name.ends_with("attr");
    const bool keep = name.starts_with("select");
    const size_t at = by_attribute ? 1 : 0;
    std::string test_name;
    Arguments rest;
    if (a.values.size() > at) {
      test_name = string_argument(a, at, "test", name);
      if (!has_test(test_name)) unsupported(fmt::format("the test {} is not built", test_name));
      rest.values.assign(a.values.begin() + static_cast<std::ptrdiff_t>(at) + 1, a.values.end());
    }
    List out;
    for (Value& item : all) {
      step();
      const Value tested = by_attribute ? member(item, argument(a, 0, "attribute", name)) : item;
      const bool yes = test_name.empty() ? truth(tested) : test(test_name, tested, rest);
      if (yes == keep) out.push_back(std::move(item));
    }
    return list(std::move(out));
  }

  // ---- tests ----

  bool test(const std::string& name, const Value& v, const Arguments& a) {
    if (name == "defined") return v.kind != Kind::undefined;
    if (name == "undefined") return v.kind == Kind::undefined;
    if (name == "none") return v.kind == Kind::none;
    if (name == "string") return v.is_string();
    if (name == "boolean") return v.kind == Kind::boolean;
    if (name == "true") return v.kind == Kind::boolean && v.boolean;
    if (name == "false") return v.kind == Kind::boolean && !v.boolean;
    if (name == "integer") return v.kind == Kind::integer;
    if (name == "float") return v.kind == Kind::real;
    if (name == "number") return v.is_number();
    if (name == "mapping") return v.is_mapping();
    if (name == "iterable") {
      return v.is_string() || v.is_sequence() || v.is_mapping() || v.kind == Kind::undefined;
    }
    if (name == "sequence") {
      return v.is_string() || v.is_sequence() || v.is_mapping() || v.kind == Kind::undefined;
    }
    if (name == "callable") return v.kind == Kind::function;
    if (name == "upper")
      return v.is_string() && upper_text(*v.text) == *v.text && lower_text(*v.text) != *v.text;
    if (name == "lower")
      return v.is_string() && lower_text(*v.text) == *v.text && upper_text(*v.text) != *v.text;
    if (name == "odd" || name == "even" || name == "divisibleby") {
      const int64_t by = name == "divisibleby" ? integer_argument(a, 0, "num", 0) : 2;
      if (!v.is_integer())
        fail(fmt::format("is {}: expected an int, found {}", name, type_name(v)));
      if (by == 0) fail("division by zero");
      const bool divides = by == -1 || v.to_integer() % by == 0;
      return divides == (name != "odd");
    }
    const Value& other = argument(a, 0, "other", name);
    if (name == "in") return contains(other, v);
    if (name == "sameas") return v.kind == other.kind && equal(v, other);
    if (name == "eq" || name == "equalto" || name == "==") return equal(v, other);
    if (name == "ne" || name == "!=") return !equal(v, other);
    const bool less = name == "lt" || name == "lessthan" || name == "<";
    const bool greater = name == "gt" || name == "greaterthan" || name == ">";
    return holds(less ? "<" : greater ? ">" : name == "le" || name == "<=" ? "<=" : ">=", v, other);
  }

  const std::string& name_;
  Arena& arena_;
  std::time_t now_;
  Scope globals_;
  Scope* top_ = nullptr;  // the template's own
  std::string out_;
  int line_ = 1;
  int depth_ = 0;
  int64_t steps_ = 0;
  size_t spent_ = 0;
};

constexpr std::string_view kFilters[] = {
    "trim",  "tojson", "length",     "count",      "default",   "d",    "upper",    "lower",
    "title", "string", "capitalize", "safe",       "escape",    "e",    "int",      "float",
    "abs",   "round",  "replace",    "indent",     "items",     "list", "dictsort", "first",
    "last",  "join",   "reverse",    "sum",        "sort",      "min",  "max",      "unique",
    "map",   "select", "reject",     "selectattr", "rejectattr"};
constexpr std::string_view kTests[] = {
    "defined",     "undefined", "none",   "string",   "boolean", "true",
    "false",       "integer",   "float",  "number",   "mapping", "iterable",
    "sequence",    "callable",  "upper",  "lower",    "odd",     "even",
    "divisibleby", "in",        "sameas", "eq",       "equalto", "==",
    "ne",          "!=",        "lt",     "lessthan", "<",       "gt",
    "greaterthan", ">",         "le",     "<=",       "ge",      ">="};

}  // namespace

bool has_filter(std::string_view name) {
  return std::find(std::begin(kFilters), std::end(kFilters), name) != std::end(kFilters);
}

bool has_test(std::string_view name) {
  return std::find(std::begin(kTests), std::end(kTests), name) != std::end(kTests);
}

std::string render(const Node& root, const std::string& name, Arena& arena,
                   const Variables& variables) {
  return Interpreter(name, arena, variables).run(root);
}

}  // namespace krait::jinja
