// Drawing is left to a small Python script with matplotlib; the numbers come from the program.
#pragma once

#include <string>
#include <string_view>

namespace krait {

/// Error usage: the name of `file` ends in neither .png nor .svg. Error runtime, with a hint:
/// python3 or matplotlib is missing. Asked before an hour of measuring rather than after.
void require_plotting(const std::string& file);

/// Draws the rows of `krait bench -o json` into `file`. Errors: runtime.
void plot_bench(std::string_view json, const std::string& file);

}  // namespace krait
