// Logging goes to stderr through spdlog; stdout belongs to results.
#pragma once

#include <spdlog/spdlog.h>

namespace krait {

/// Sets up the default logger on stderr: "warning: ..." lines, colours only on a terminal without
/// NO_COLOR.
void init_logging(spdlog::level::level_enum level);

}  // namespace krait
