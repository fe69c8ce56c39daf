#include "cli/version.h"

namespace krait {

std::string_view version() noexcept { return KRAIT_VERSION; }
std::string_view commit() noexcept { return KRAIT_COMMIT; }
std::string_view source_dir() noexcept { return KRAIT_SOURCE_DIR; }

}  // namespace krait
