// Typed access to a config, for config.cpp and the families: every complaint names key and file.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "model/config.h"

namespace krait {

/// Whose names a config uses.
enum class Layout : uint8_t { huggingface, state_spaces, mistral };

/// A key as each layout spells it: "a.b" is key b of the object a; null: it has none.
struct ConfigKey {
  const char* huggingface = nullptr;
  const char* state_spaces = nullptr;
  const char* mistral = nullptr;
};

/// A size: its key, its range, and its value where the key is absent (0: it may not be).
struct SizeKey {
  int64_t ModelConfig::*field;
  ConfigKey key;
  int64_t least;
  int64_t most;
  int64_t otherwise;
};

// Limits keep every product of two sizes, times layers and item size, far below 2^63; no published
// model comes near any of them.
constexpr int64_t kMaxInner = 1 << 22;
constexpr int64_t kMaxState = 1 << 14;
constexpr int64_t kMaxRank = 1 << 20;

class ConfigReader {
 public:
  ConfigReader(const nlohmann::json& json, const std::string& where);

  [[nodiscard]] Layout layout() const noexcept { return layout_; }
  /// The layout's spelling of `key`; null where it has none.
  [[nodiscard]] const char* name(const ConfigKey& key) const noexcept;

  /// The value of "key" or "object.key"; null when it is absent or null, or when `path` is null.
  [[nodiscard]] const nlohmann::json* find(const char* path) const;
  [[nodiscard]] std::optional<int64_t> integer(const char* key, int64_t least, int64_t most) const;
  [[nodiscard]] std::optional<double> number(const char* key, double above, double most) const;
  [[nodiscard]] bool boolean(const char* key, bool otherwise) const;
  [[nodiscard]] std::optional<std::string> text(const char* key) const;
  void size(const SizeKey& key, ModelConfig& config) const;

  [[noreturn]] void fail(const char* key, const std::string& expected) const;
  [[noreturn]] void unsupported(const std::string& what) const;

 private:
  const nlohmann::json& json_;
  const std::string& where_;
  Layout layout_ = Layout::state_spaces;
};

}  // namespace krait
