// A restricted reader of Python pickles: what torch.save writes (protocol 2), as data.
//
// A pickle is a program that names and calls Python functions. This reader runs none of them: a
// global outside the caller's list is an error, and a call of one in the list becomes a value of
// kind `call` for the caller to understand.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

struct PickleValue {
  enum class Kind : uint8_t {
    none,
    boolean,     ///< integer: 0 or 1
    integer,     ///< integer
    real,        ///< its value is of no use to anyone here and is not kept
    text,        ///< text
    sequence,    ///< tuple, list or set: items
    dict,        ///< items: key, value, key, value, ...
    global,      ///< text: "module.name"
    call,        ///< items: the global and the sequence of its arguments
    persistent,  ///< items: the id of an object kept outside the pickle
  };
  Kind kind = Kind::none;
  int64_t integer = 0;
  std::string_view text;        ///< view into the pickle, or into the caller's list of globals
  std::vector<uint32_t> items;  ///< indices of values
};

/// Values refer to each other by index: a pickle may nest a million deep or contain itself, and
/// neither harms a reader that does not recurse.
struct Pickle {
  std::vector<PickleValue> values;
  uint32_t root = 0;

  [[nodiscard]] const PickleValue& operator[](uint32_t i) const { return values[i]; }
};

/// "expected ..., found {}": what a value is, in Python's words.
[[nodiscard]] std::string_view kind_name(PickleValue::Kind kind);

/// Reads one pickle. `globals` lists what may be named, as "module.name"; it must outlive the
/// result. Errors: unsupported (a global outside the list), format (anything else). Memory is at
/// most about 60 times the size of the pickle and never more than about 200 MB.
[[nodiscard]] Pickle parse_pickle(std::span<const std::byte> pickle, const std::string& name,
                                  std::span<const std::string_view> globals);

}  // namespace krait
