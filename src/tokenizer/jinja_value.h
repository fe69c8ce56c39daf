// Values of the template language: what Jinja2 templates see of Python. Strings are UTF-8 and count
// characters, as Python's do. Lists and dicts are owned by an Arena, which lives as long as one
// rendering: values may refer to each other in circles.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace krait::jinja {

struct Value;
struct Dict;
struct Loop;
struct Function;
using List = std::vector<Value>;

enum class Kind : uint8_t {
  undefined,
  none,
  boolean,
  integer,
  real,
  string,
  list,
  tuple,
  dict,
  space,
  loop,
  function
};

struct Value {
  Kind kind = Kind::undefined;
  union {
    bool boolean;
    int64_t integer;
    double real;
    List* list;  ///< list, tuple
    Dict* dict;  ///< dict, space (a namespace: the only dict whose members can be set)
    Loop* loop;  ///< the variable `loop`
    Function* function;
  };
  std::shared_ptr<const std::string> text;  ///< string; of an undefined value its name

  Value() : integer(0) {}
  static Value none() { return of(Kind::none); }
  static Value undefined(std::string name);
  Value(bool v) : kind(Kind::boolean), boolean(v) {}     // NOLINT(google-explicit-constructor)
  Value(int64_t v) : kind(Kind::integer), integer(v) {}  // NOLINT(google-explicit-constructor)
  Value(double v) : kind(Kind::real), real(v) {}         // NOLINT(google-explicit-constructor)
  Value(std::string v)                                   // NOLINT(google-explicit-constructor)
      : kind(Kind::string), integer(0), text(std::make_shared<const std::string>(std::move(v))) {}
  Value(const char* v) = delete;  // would become a bool
  static Value of(Kind kind) {
    Value v;
    v.kind = kind;
    return v;
  }

  [[nodiscard]] bool is_string() const { return kind == Kind::string; }
  [[nodiscard]] bool is_integer() const { return kind == Kind::integer || kind == Kind::boolean; }
  [[nodiscard]] bool is_number() const { return is_integer() || kind == Kind::real; }
  [[nodiscard]] bool is_sequence() const { return kind == Kind::list || kind == Kind::tuple; }
  [[nodiscard]] bool is_mapping() const { return kind == Kind::dict; }
  /// Of a number: True counts 1.
  [[nodiscard]] int64_t to_integer() const {
    return kind == Kind::boolean ? int64_t{boolean} : integer;
  }
  [[nodiscard]] double to_real() const {
    return kind == Kind::real ? real : static_cast<double>(to_integer());
  }
};

/// Keys are strings, in the order in which they came.
struct Dict {
  std::vector<std::pair<std::string, Value>> items;
  [[nodiscard]] const Value* find(std::string_view key) const;
  void set(const std::string& key, Value value);

 private:
  std::map<std::string, size_t, std::less<>> index_;
};

/// Where a for statement stands.
struct Loop {
  List items;
  size_t index = 0;
  int64_t depth = 1;
  std::optional<List> changed;  ///< what loop.changed() was last asked with
};

struct Arguments {
  List values;
  std::vector<std::pair<std::string, Value>> named;
};

struct Function {
  std::string name;
  std::function<Value(const Arguments&)> call;
};

class Arena {
 public:
  [[nodiscard]] Value list(List items, Kind kind = Kind::list);
  [[nodiscard]] Value dict(Kind kind = Kind::dict);
  [[nodiscard]] Value loop(List items, int64_t depth);
  [[nodiscard]] Value function(std::string name, std::function<Value(const Arguments&)> call);
  /// Of a JSON value. Error usage if it is nested deeper than 32 levels.
  [[nodiscard]] Value from_json(const nlohmann::ordered_json& json, int depth = 32);

 private:
  std::vector<std::unique_ptr<List>> lists_;
  std::vector<std::unique_ptr<Dict>> dicts_;
  std::vector<std::unique_ptr<Loop>> loops_;
  std::vector<std::unique_ptr<Function>> functions_;
};

/// Python's truth of a value.
[[nodiscard]] bool truth(const Value& v);
/// Python's ==. Values too large or too deep to be compared within reason are not equal.
[[nodiscard]] bool equal(const Value& a, const Value& b);
/// -1, 0 or 1 of Python's < and >; empty where it has no order.
[[nodiscard]] std::optional<int> compare(const Value& a, const Value& b);
/// "str", "int", "NoneType", ...
[[nodiscard]] std::string_view type_name(const Value& v);

/// Python's str() and repr(). Longer than `limit` bytes, or deeper than 32 levels: cut.
[[nodiscard]] std::string to_text(const Value& v, size_t limit);
/// json.dumps(v, ensure_ascii=False), on lines of their own with `indent` 0 or more. Empty where a
/// value has no JSON form.
struct JsonStyle {
  int64_t indent = -1;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};
[[nodiscard]] std::optional<std::string> to_json(const Value& v, const JsonStyle& style,
                                                 size_t limit);

}  // namespace krait::jinja
