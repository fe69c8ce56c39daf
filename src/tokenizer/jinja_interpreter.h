// Runs a template's tree. Nothing a template or a message holds can make it run long or take much
// memory: steps, depth and bytes are counted, and past their limits there is an Error.
#pragma once

#include <ctime>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/jinja_parser.h"

namespace krait::jinja {

/// What the template did not say in so many words; raise_exception() ends as this, too.
struct Variables {
  std::vector<std::pair<std::string, Value>> values;
  std::time_t now = 0;  ///< for strftime_now()
};

/// The text that the tree gives. `arena` owns `variables`. Errors: format (the template asks for
/// what its values don't have, or past a limit), unsupported (a method that is not built), usage
/// (raise_exception: the template refuses the messages).
[[nodiscard]] std::string render(const Node& root, const std::string& name, Arena& arena,
                                 const Variables& variables);

}  // namespace krait::jinja
