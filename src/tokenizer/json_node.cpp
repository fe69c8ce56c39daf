#include "tokenizer/json_node.h"

#include "base/error.h"

namespace krait {

bool JsonNode::has(std::string_view key) const {
  if (!value_->is_object()) return false;
  const auto it = value_->find(key);
  return it != value_->end() && !it->is_null();
}

JsonNode JsonNode::at(std::string_view key) const {
  expect_object();
  if (!has(key)) fail(fmt::format("the key \"{}\" is missing", key));
  return {*value_->find(key), fmt::format("{}.{}", where_, key)};
}

JsonNode JsonNode::item(size_t index) const {
  return {(*value_)[index], fmt::format("{}[{}]", where_, index)};
}

std::string JsonNode::string() const {
  if (!value_->is_string()) wrong_type("a string");
  return value_->get<std::string>();
}

bool JsonNode::boolean() const {
  if (!value_->is_boolean()) wrong_type("true or false");
  return value_->get<bool>();
}

int64_t JsonNode::integer(int64_t low, int64_t high) const {
  if (!value_->is_number_integer()) wrong_type("a whole number");
  const auto wide = value_->is_number_unsigned() && value_->get<uint64_t>() > INT64_MAX;
  const int64_t v = wide ? INT64_MAX : value_->get<int64_t>();
  if (wide || v < low || v > high) {
    fail(fmt::format("expected a number from {} to {}, found {}", low, high, value_->dump()));
  }
  return v;
}

size_t JsonNode::array_size() const {
  if (!value_->is_array()) wrong_type("an array");
  return value_->size();
}

void JsonNode::expect_object() const {
  if (!value_->is_object()) wrong_type("an object");
}

std::optional<std::string> JsonNode::optional_string(std::string_view key) const {
  if (!has(key)) return std::nullopt;
  return at(key).string();
}

bool JsonNode::boolean(std::string_view key, bool missing) const {
  return has(key) ? at(key).boolean() : missing;
}

void JsonNode::fail(const std::string& what) const {
  throw Error(ErrorKind::format, fmt::format("{}: {}", where_, what));
}

void JsonNode::unsupported(const std::string& what) const {
  throw Error(ErrorKind::unsupported, fmt::format("{}: {}", where_, what),
              "krait builds the components of GPT-2, GPT-NeoX, Falcon and Llama tokenizers.");
}

void JsonNode::wrong_type(std::string_view expected) const {
  fail(fmt::format("expected {}, found {}", expected, value_->type_name()));
}

nlohmann::json parse_json(std::string_view text, const std::string& name) {
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& e) {
    throw Error(
        ErrorKind::format,
        fmt::format("{} is not valid JSON: an error at byte {} of {}", name, e.byte, text.size()),
        "The file may be cut short, or a pointer file of a large-file store.");
  } catch (const nlohmann::json::exception&) {  // 1e999
    throw Error(ErrorKind::format, fmt::format("{} has a number that is out of range", name));
  }
}

}  // namespace krait
