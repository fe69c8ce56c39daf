// What this build is: version, commit, and where its source lay.
#pragma once

#include <string_view>

namespace krait {

[[nodiscard]] std::string_view version() noexcept;     ///< "0.1.0"
[[nodiscard]] std::string_view commit() noexcept;      ///< "189b9e6636-dirty", or "unknown"
[[nodiscard]] std::string_view source_dir() noexcept;  ///< where models/ is found before installing

}  // namespace krait
