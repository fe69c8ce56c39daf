// A JSON value together with the place where it stands, so that a wrong type or a missing key gives
// a sentence with file and key ("tokenizer.json: model.vocab: expected an object, found null").
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace krait {

class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, std::string where)
      : value_(&value), where_(std::move(where)) {}

  [[nodiscard]] const nlohmann::json& value() const { return *value_; }
  [[nodiscard]] const std::string& where() const { return where_; }

  /// The member is there and is not null.
  [[nodiscard]] bool has(std::string_view key) const;
  [[nodiscard]] JsonNode at(std::string_view key) const;  ///< error if missing or null
  [[nodiscard]] JsonNode item(size_t index) const;        ///< of an array, index in range

  [[nodiscard]] std::string string() const;
  [[nodiscard]] bool boolean() const;
  /// A whole number in [low, high].
  [[nodiscard]] int64_t integer(int64_t low, int64_t high) const;
  [[nodiscard]] size_t array_size() const;  ///< error if not an array
  void expect_object() const;

  [[nodiscard]] std::string string(std::string_view key) const { return at(key).string(); }
  [[nodiscard]] std::optional<std::string> optional_string(std::string_view key) const;
  [[nodiscard]] bool boolean(std::string_view key, bool missing) const;

  [[noreturn]] void fail(const std::string& what) const;         ///< Error of kind format
  [[noreturn]] void unsupported(const std::string& what) const;  ///< Error of kind unsupported

 private:
  [[noreturn]] void wrong_type(std::string_view expected) const;
  const nlohmann::json* value_;
  std::string where_;
};

/// Parses a whole file's text; `name` stands in front of messages.
[[nodiscard]] nlohmann::json parse_json(std::string_view text, const std::string& name);

}  // namespace krait
