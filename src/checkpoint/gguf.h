// GGUF (https://github.com/ggml-org/ggml, docs/gguf.md), the file format of llama.cpp: metadata by
// key, then tensors, which may be quantised. Versions 2 and 3, little-endian.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/parse.h"

namespace krait {

/// The types of metadata values, by their numbers in the file.
enum class GgufType : uint32_t {
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  f32,
  boolean,
  text,
  array,
  u64,
  i64,
  f64
};

/// The keys of a file and their values, which are views of the file. The getters throw an Error of
/// kind format that names file and key where the value has another type.
class GgufMetadata {
 public:
  struct Value {
    GgufType type = GgufType::u8;  ///< of an array: of its elements
    bool is_array = false;
    uint64_t count = 1;                ///< elements
    std::span<const std::byte> bytes;  ///< packed as in the file; checked to be whole
  };

  /// Keys and bytes must outlive the object; Error of kind format for a key that occurs twice.
  GgufMetadata(std::string file, std::vector<std::pair<std::string_view, Value>> values);

  [[nodiscard]] const Value* find(std::string_view key) const;
  [[nodiscard]] std::optional<std::string_view> text(std::string_view key) const;
  /// Of any integer type.
  [[nodiscard]] std::optional<int64_t> integer(std::string_view key) const;
  /// Of any number type.
  [[nodiscard]] std::optional<double> number(std::string_view key) const;
  [[nodiscard]] std::optional<bool> boolean(std::string_view key) const;
  // Arrays; empty where the key is missing.
  [[nodiscard]] std::vector<std::string_view> texts(std::string_view key) const;
  [[nodiscard]] std::vector<int64_t> integers(std::string_view key) const;
  [[nodiscard]] std::vector<float> numbers(std::string_view key) const;

  [[nodiscard]] const std::string& file() const noexcept { return file_; }
  /// In the order of their names.
  [[nodiscard]] const std::vector<std::pair<std::string_view, Value>>& all() const noexcept {
    return values_;
  }
  [[noreturn]] void fail(std::string_view key, std::string_view expected) const;

 private:
  std::string file_;
  std::vector<std::pair<std::string_view, Value>> values_;  // sorted by key
};

struct ParsedGguf {
  GgufMetadata metadata;
  ParsedTensors tensors;
};
/// `name` is the file's name for messages. What is returned views `file`.
[[nodiscard]] ParsedGguf parse_gguf(std::span<const std::byte> file, const std::string& name);

}  // namespace krait
