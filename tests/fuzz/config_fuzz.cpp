// Any bytes as config.json: an Error or a config whose sizes are within their limits, never a
// crash.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "base/error.h"
#include "base/log.h"
#include "model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool quiet = [] {
    spdlog::set_level(spdlog::level::off);
    return true;
  }();
  (void)quiet;
  try {
    const krait::ModelConfig c = krait::parse_config_text(
        std::string(reinterpret_cast<const char*>(data), size), "config.json");
    for (const krait::ConfigSize& s : krait::kConfigSizes) {
      if (c.*s.value < 0 || c.*s.value > (int64_t{1} << 27)) std::abort();
    }
    for (const int64_t n : {c.d_model, c.n_layer, c.vocab_size, c.d_inner, c.d_state, c.d_conv}) {
      if (n < 1) std::abort();
    }
    if (c.family == "mamba2") {
      if (c.n_head * c.head_dim != c.d_inner || c.n_head % c.n_group != 0) std::abort();
      if (!(c.dt_min >= 0 && c.dt_min <= c.dt_max)) std::abort();
    } else if (c.dt_rank < 1) {
      std::abort();
    }
    for (const int32_t id : c.eos_ids) {
      if (id < 0) std::abort();
    }
  } catch (const krait::Error& e) {
    if (e.message().empty()) std::abort();
  }
  return 0;
}
