// A JSON reader for foreign files: events instead of a tree, so that memory is spent only on what
// the caller keeps, and neither depth nor size can be turned against it. A handler overrides the
// events that its format allows; every other event is an error.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "base/error.h"

namespace krait {

class StrictSax : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit StrictSax(std::string where) : where_(std::move(where)) {}

  /// Parses all of `json`. Errors of kind format.
  void parse(std::span<const std::byte> json) {
    const auto* text = reinterpret_cast<const char*>(json.data());
    // The lexer takes a zero byte for the end of the text and would not look behind it.
    if (std::find(json.begin(), json.end(), std::byte{0}) != json.end()) fail("a zero byte");
    nlohmann::json::sax_parse(text, text + json.size(), this);
  }

  bool null() override { fail("null"); }
  bool boolean(bool) override { fail("a boolean"); }
  bool number_integer(number_integer_t v) override { fail(fmt::format("the number {}", v)); }
  bool number_unsigned(number_unsigned_t v) override { fail(fmt::format("the number {}", v)); }
  bool number_float(number_float_t v, const string_t&) override {
    fail(fmt::format("the number {}", v));
  }
  bool string(string_t&) override { fail("a string"); }
  bool binary(binary_t&) override { fail("binary data"); }
  bool start_object(size_t) override { fail("an object"); }
  bool key(string_t&) override { return true; }
  bool end_object() override { return true; }
  bool start_array(size_t) override { fail("an array"); }
  bool end_array() override { return true; }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    throw Error(ErrorKind::format,
                fmt::format("{}: the JSON is not valid at byte {}", where_, position));
  }

 protected:
  /// What stands at this place, for messages: "the shape of ...".
  [[nodiscard]] virtual std::string place() const = 0;

  [[noreturn]] void fail(const std::string& found) const {
    throw Error(ErrorKind::format, fmt::format("{}: {}, found {}", where_, place(), found));
  }

  std::string where_;
};

}  // namespace krait
