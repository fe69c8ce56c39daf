// The beginning- and end-of-sequence tokens that the files beside a tokenizer name.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace krait {

struct SpecialNames {
  bool found = false;                ///< there are such files
  std::optional<std::string> bos{};  ///< token text
  std::optional<std::string> eos{};
  std::optional<bool> add_bos{};  ///< add_bos_token, add_eos_token
  std::optional<bool> add_eos{};
};

/// From tokenizer_config.json, then special_tokens_map.json, in `folder`; both may be missing.
[[nodiscard]] SpecialNames read_special_names(const std::filesystem::path& folder);

/// The whole file; Error of kind file with its name if that cannot be read.
[[nodiscard]] std::string read_tokenizer_file(const std::filesystem::path& file);

}  // namespace krait
