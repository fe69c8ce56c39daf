#include "tokenizer/jinja_value.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "tokenizer/unicode.h"

namespace krait::jinja {

namespace {

constexpr int kMaxDepth = 32;

/// repr() of a float: the shortest digits that read back, with an exponent from 1e16 on.
std::string real_text(double v) {
  if (std::isnan(v)) return "nan";
  if (std::isinf(v)) return v > 0 ? "inf" : "-inf";
  const double size = std::fabs(v);
  const bool fixed = v == 0 || (size >= 1e-4 && size < 1e16);
  char buffer[40];
  const auto [end, error] =
      std::to_chars(buffer, buffer + sizeof buffer, v,
                    fixed ? std::chars_format::fixed : std::chars_format::scientific);
  std::string s(buffer, error == std::errc() ? end : buffer);
  if (fixed && s.find('.') == std::string::npos) s += ".0";
  return s;
}

/// repr() of a str.
std::string python_quoted(std::string_view s) {
  const bool twice =
      s.find('\'') != std::string_view::npos && s.find('"') == std::string_view::npos;
  const char quote = twice ? '"' : '\'';
  std::string out(1, quote);
  for (size_t at = 0; at < s.size();) {
    const unicode::Char c = unicode::next(s, at);
    if (c.code == static_cast<unsigned char>(quote) || c.code == '\\') {
      out += '\\';
      out += static_cast<char>(c.code);
    } else if (c.code == '\n') {
      out += "\\n";
    } else if (c.code == '\r') {
      out += "\\r";
    } else if (c.code == '\t') {
      out += "\\t";
    } else if (c.code < 0x20 || (c.code >= 0x7f && c.code <= 0xa0) || c.code == 0xad) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c.code));
    } else {
      out += s.substr(at, c.length);
    }
    at += c.length;
  }
  return out + quote;
}

/// Writes repr() or JSON of nested values, no further than `limit` bytes.
class Writer {
 public:
  explicit Writer(size_t limit) : limit_(limit) {}
  [[nodiscard]] std::string take() { return std::move(out_); }

  void repr(const Value& v, int depth) {
    if (full() || depth > kMaxDepth) {
      out_ += "...";
      return;
    }
    switch (v.kind) {
      case Kind::string:
        out_ += python_quoted(*v.text);
        break;
      case Kind::list:
      case Kind::tuple: {
        const bool tuple = v.kind == Kind::tuple;
        out_ += tuple ? '(' : '[';
        for (size_t i = 0; i < v.list->size() && !full(); ++i) {
          if (i > 0) out_ += ", ";
          repr((*v.list)[i], depth + 1);
        }
        if (tuple && v.list->size() == 1) out_ += ',';
        out_ += tuple ? ')' : ']';
        break;
      }
      case Kind::dict:
        out_ += '{';
        for (size_t i = 0; i < v.dict->items.size() && !full(); ++i) {
          if (i > 0) out_ += ", ";
          out_ += python_quoted(v.dict->items[i].first) + ": ";
          repr(v.dict->items[i].second, depth + 1);
        }
        out_ += '}';
        break;
      default:
        out_ += to_text(v, limit_);
    }
  }

  [[nodiscard]] bool json(const Value& v, const JsonStyle& style, int depth) {
    if (full() || depth > kMaxDepth) return false;
    switch (v.kind) {
      case Kind::none:
        out_ += "null";
        return true;
      case Kind::boolean:
        out_ += v.boolean ? "true" : "false";
        return true;
      case Kind::integer:
        out_ += fmt::to_string(v.integer);
        return true;
      case Kind::real:
        if (std::isnan(v.real)) {
          out_ += "NaN";
        } else if (std::isinf(v.real)) {
          out_ += v.real > 0 ? "Infinity" : "-Infinity";
        } else {
          out_ += real_text(v.real);
        }
        return true;
      case Kind::string:
        json_text(*v.text);
        return true;
      case Kind::list:
      case Kind::tuple:
        return members(*v.list, '[', ']', style, depth,
                       [&](const Value& item) { return json(item, style, depth + 1); });
      case Kind::dict: {
        auto items = v.dict->items;
        if (style.sort_keys) {
          std::sort(items.begin(), items.end(),
                    [](const auto& a, const auto& b) { return a.first < b.first; });
        }
        return members(items, '{', '}', style, depth, [&](const auto& item) {
          json_text(item.first);
          out_ += style.key_separator;
          return json(item.second, style, depth + 1);
        });
      }
      default:
        return false;
    }
  }

 private:
  [[nodiscard]] bool full() const { return out_.size() > limit_; }

  template <typename Items, typename Write>
  bool members(const Items& items, char open, char close, const JsonStyle& style, int depth,
               Write write) {
    out_ += open;
    const auto line = [&](int levels) {
      if (style.indent < 0) return;
      out_ += '\n';
      out_.append(static_cast<size_t>(style.indent * levels), ' ');
    };
    bool first = true;
    for (const auto& item : items) {
      if (!first) out_ += style.item_separator;
      first = false;
      line(depth + 1);
      if (!write(item)) return false;
    }
    if (!first) line(depth);
    out_ += close;
    return true;
  }

  void json_text(std::string_view s) {
    out_ += '"';
    for (const char c : s) {
      switch (c) {
        case '"':
          out_ += "\\\"";
          break;
        case '\\':
          out_ += "\\\\";
          break;
        case '\n':
          out_ += "\\n";
          break;
        case '\r':
          out_ += "\\r";
          break;
        case '\t':
          out_ += "\\t";
          break;
        case '\b':
          out_ += "\\b";
          break;
        case '\f':
          out_ += "\\f";
          break;
        default:
          if (static_cast<unsigned char>(c) < 0x20) {
            out_ += fmt::format("\\u{:04x}", static_cast<int>(c));
          } else {
            out_ += c;
          }
      }
    }
    out_ += '"';
  }

  size_t limit_;
  std::string out_;
};

}  // namespace

Value Value::undefined(std::string name) {
  Value v;
  v.text = std::make_shared<const std::string>(std::move(name));
  return v;
}

const Value* Dict::find(std::string_view key) const {
  const auto it = index_.find(key);
  return it == index_.end() ? nullptr : &items[it->second].second;
}

void Dict::set(const std::string& key, Value value) {
  const auto [it, added] = index_.emplace(key, items.size());
  if (added) {
    items.emplace_back(key, std::move(value));
  } else {
    items[it->second].second = std::move(value);
  }
}

Value Arena::list(List items, Kind kind) {
  Value v = Value::of(kind);
  v.list = lists_.emplace_back(std::make_unique<List>(std::move(items))).get();
  return v;
}

Value Arena::dict(Kind kind) {
  Value v = Value::of(kind);
  v.dict = dicts_.emplace_back(std::make_unique<Dict>()).get();
  return v;
}

Value Arena::loop(List items, int64_t depth) {
  Value v = Value::of(Kind::loop);
  v.loop = loops_.emplace_back(std::make_unique<Loop>()).get();
  v.loop->items = std::move(items);
  v.loop->depth = depth;
  return v;
}

Value Arena::function(std::string name, std::function<Value(const Arguments&)> call) {
  Value v = Value::of(Kind::function);
  v.function =
      functions_
          .emplace_back(std::make_unique<Function>(Function{std::move(name), std::move(call)}))
          .get();
  return v;
}

Value Arena::from_json(const nlohmann::ordered_json& json, int depth) {
  if (depth == 0) throw Error(ErrorKind::usage, "the messages are nested deeper than 32 levels");
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number_unsigned() && json.get<uint64_t>() > INT64_MAX) return json.get<double>();
  if (json.is_number_integer()) return json.get<int64_t>();
  if (json.is_number_float()) return json.get<double>();
  if (json.is_string()) return json.get<std::string>();
  if (json.is_array()) {
    List items;
    for (const auto& item : json) items.push_back(from_json(item, depth - 1));
    return list(std::move(items));
  }
  if (json.is_object()) {
    Value v = dict();
    for (const auto& [key, value] : json.items()) v.dict->set(key, from_json(value, depth - 1));
    return v;
  }
  return Value::none();
}

bool truth(const Value& v) {
  switch (v.kind) {
    case Kind::undefined:
    case Kind::none:
      return false;
    case Kind::boolean:
      return v.boolean;
    case Kind::integer:
      return v.integer != 0;
    case Kind::real:
      return v.real != 0;
    case Kind::string:
      return !v.text->empty();
    case Kind::list:
    case Kind::tuple:
      return !v.list->empty();
    case Kind::dict:
      return !v.dict->items.empty();
    case Kind::space:
    case Kind::loop:
    case Kind::function:
      return true;
  }
  return false;
}

namespace {

/// `budget`: values that may still be looked at. Lists that hold each other twice over would
/// otherwise take time without end.
bool equal_within(const Value& a, const Value& b, int depth, int& budget) {
  if (depth == 0 || --budget < 0) return false;
  if (a.is_integer() && b.is_integer()) return a.to_integer() == b.to_integer();
  if (a.is_number() && b.is_number()) return a.to_real() == b.to_real();
  if (a.kind != b.kind) return false;
  switch (a.kind) {
    case Kind::undefined:
    case Kind::none:
      return true;
    case Kind::string:
      return *a.text == *b.text;
    case Kind::list:
    case Kind::tuple:
      return std::equal(
          a.list->begin(), a.list->end(), b.list->begin(), b.list->end(),
          [&](const Value& x, const Value& y) { return equal_within(x, y, depth - 1, budget); });
    case Kind::dict:
      return a.dict->items.size() == b.dict->items.size() &&
             std::all_of(a.dict->items.begin(), a.dict->items.end(), [&](const auto& item) {
               const Value* other = b.dict->find(item.first);
               return other != nullptr && equal_within(item.second, *other, depth - 1, budget);
             });
    case Kind::space:
      return a.dict == b.dict;
    case Kind::loop:
      return a.loop == b.loop;
    case Kind::function:
      return a.function == b.function;
    default:
      return false;
  }
}

std::optional<int> compare_within(const Value& a, const Value& b, int depth) {
  if (depth == 0) return std::nullopt;
  const auto order = [](const auto& x, const auto& y) { return x < y ? -1 : y < x ? 1 : 0; };
  if (a.is_integer() && b.is_integer()) return order(a.to_integer(), b.to_integer());
  if (a.is_number() && b.is_number()) return order(a.to_real(), b.to_real());
  // The order of UTF-8 is that of code points.
  if (a.is_string() && b.is_string()) return order(*a.text, *b.text);
  if (a.kind == b.kind && a.is_sequence()) {
    for (size_t i = 0; i < std::min(a.list->size(), b.list->size()); ++i) {
      if (equal((*a.list)[i], (*b.list)[i])) continue;
      return compare_within((*a.list)[i], (*b.list)[i], depth - 1);
    }
    return order(a.list->size(), b.list->size());
  }
  return std::nullopt;
}

}  // namespace

bool equal(const Value& a, const Value& b) {
  int budget = 100'000;
  return equal_within(a, b, kMaxDepth, budget);
}

std::optional<int> compare(const Value& a, const Value& b) {
  return compare_within(a, b, kMaxDepth);
}

std::string_view type_name(const Value& v) {
  switch (v.kind) {
    case Kind::undefined:
      return "undefined";
    case Kind::none:
      return "NoneType";
    case Kind::boolean:
      return "bool";
    case Kind::integer:
      return "int";
    case Kind::real:
      return "float";
    case Kind::string:
      return "str";
    case Kind::list:
      return "list";
    case Kind::tuple:
      return "tuple";
    case Kind::dict:
      return "dict";
    case Kind::space:
      return "namespace";
    case Kind::loop:
      return "loop";
    case Kind::function:
      return "function";
  }
  return "";
}

std::string to_text(const Value& v, size_t limit) {
  switch (v.kind) {
    case Kind::undefined:
      return {};
    case Kind::none:
      return "None";
    case Kind::boolean:
      return v.boolean ? "True" : "False";
    case Kind::integer:
      return fmt::to_string(v.integer);
    case Kind::real:
      return real_text(v.real);
    case Kind::string:
      return *v.text;
    case Kind::list:
    case Kind::tuple:
    case Kind::dict: {
      Writer w(limit);
      w.repr(v, 0);
      return w.take();
    }
    case Kind::space:
      return "<Namespace>";
    case Kind::loop:
      return fmt::format("<LoopContext {}/{}>", v.loop->index + 1, v.loop->items.size());
    case Kind::function:
      return fmt::format("<function {}>", v.function->name);
  }
  return {};
}

std::optional<std::string> to_json(const Value& v, const JsonStyle& style, size_t limit) {
  Writer w(limit);
  if (!w.json(v, style, 0)) return std::nullopt;
  return w.take();
}

}  // namespace krait::jinja
