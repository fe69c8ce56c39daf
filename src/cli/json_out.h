// JSON as the commands print it.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

namespace krait {

using OrderedJson = nlohmann::ordered_json;

/// Dumps UTF-8; bytes that are none (a token cut inside a character) become U+FFFD. `indent` -1:
/// one line.
[[nodiscard]] inline std::string dump_json(const OrderedJson& json, int indent = -1) {
  return json.dump(indent, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
}

/// A float with as many digits as it has: 0.1F is 0.1, not 0.10000000149011612.
[[nodiscard]] inline double short_double(float value) {
  return std::stod(fmt::format("{}", value));
}

/// A measurement, without digits that mean nothing.
[[nodiscard]] inline double to_thousandths(double value) { return std::round(value * 1e3) / 1e3; }

}  // namespace krait
