// The syntax of templates: text to a tree. The language is Jinja2's, as transformers sets it up for
// chat templates: trim_blocks, lstrip_blocks, the loop controls, and the tag `generation`, which
// marks the assistant's part and changes nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/jinja_value.h"

namespace krait::jinja {

enum class Op : uint8_t {
  // Expressions. Arguments of a call, filter or test stand behind the first kid; the last
  // names.size() of them are keyword arguments.
  constant,   ///< value
  name,       ///< text
  list,       ///< kids
  tuple,      ///< kids
  dict,       ///< kids: key, value, key, value
  attribute,  ///< kids[0].text
  item,       ///< kids[0][kids[1]]
  slice,      ///< kids[0][kids[1]:kids[2]:kids[3]], null where left out
  call,       ///< kids[0](...)
  filter,     ///< kids[0] | text(...)
  test,       ///< kids[0] is text(...)
  unary,      ///< text: "-", "+", "not"
  binary,     ///< text: "+", "-", "*", "/", "//", "%", "**", "~", "and", "or"
  compare,    ///< kids[0] names[0] kids[1] names[1] kids[2] ...
  choice,     ///< kids[0] if kids[1] else kids[2] (null: undefined)
  // Statements.
  text,          ///< text
  output,        ///< {{ kids[0] }}
  sequence,      ///< body
  branch,        ///< if kids[0] body else other
  loop,          ///< for names in kids[0] (if kids[1]) body else other
  assign,        ///< set names = kids[0], or text.names[0] = kids[0] for a namespace
  assign_block,  ///< set names[0] body endset, through the filters of kids[0] (a filter of null)
  macro,         ///< macro text(names) body; kids: defaults of the last parameters
  filter_block,  ///< filter kids[0] (a filter of null) body
  scope,         ///< with names = kids body
  leave,         ///< break
  next,          ///< continue
};

struct Node;
using NodePtr = std::unique_ptr<Node>;
struct Node {
  Op op;
  int line;
  std::string text{};
  Value value{};
  std::vector<NodePtr> kids{};
  std::vector<std::string> names{};
  std::vector<NodePtr> body{};
  std::vector<NodePtr> other{};
  int height = 0;  ///< of an expression's tree
};

/// `name` stands in front of messages. Errors: format (a mistake in the template, with its line),
/// unsupported (a tag, filter or test that is not built, by its name).
[[nodiscard]] NodePtr parse(std::string_view source, const std::string& name);

/// Whether the interpreter has them.
[[nodiscard]] bool has_filter(std::string_view name);
[[nodiscard]] bool has_test(std::string_view name);

}  // namespace krait::jinja
