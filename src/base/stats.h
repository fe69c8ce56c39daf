// Summaries of repeated measurements.
#pragma once

#include <algorithm>
#include <vector>

namespace krait {

/// The middle of the values, the mean of the two middle ones if their number is even; 0 of none.
[[nodiscard]] inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t h = values.size() / 2;
  return values.size() % 2 == 1 ? values[h] : (values[h - 1] + values[h]) / 2;
}

/// (largest - smallest) / median: how far repetitions of the same thing lie apart.
[[nodiscard]] inline double relative_range(const std::vector<double>& values) {
  if (values.empty()) return 0;
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  return (*high - *low) / median(values);
}

}  // namespace krait
