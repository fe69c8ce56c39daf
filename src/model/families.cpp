#include <array>

#include "model/family.h"

namespace krait {

std::span<const Family> families() {
  static const std::array kFamilies{
      mamba1_family(),
      falcon_mamba_family(),
      mamba2_family(),
      Family{"mamba3", "mamba3", "Mamba3", "Mamba-3"},
      Family{"jamba", "jamba", "", "Jamba"},
      Family{"zamba", "zamba", "", "Zamba"},
      Family{"zamba2", "zamba2", "", "Zamba2"},
      Family{"bamba", "bamba", "", "Bamba"},
      Family{"granite-h", "granitemoehybrid", "", "Granite 4 hybrid"},
      Family{"nemotron-h", "nemotron_h", "", "Nemotron-H"},
      Family{"falcon-h1", "falcon_h1", "", "Falcon-H1"},
  };
  return kFamilies;
}

const Family& family_named(std::string_view name) {
  for (const Family& f : families()) {
    if (f.name == name && f.load != nullptr) return f;
  }
  throw Error(ErrorKind::unsupported, fmt::format("models of the family {} are not built", name));
}

size_t state_bytes_per_sequence(const ModelConfig& config, DType activation, DType ssm) {
  size_t bytes = 0;
  for (const TensorSpec& s : family_named(config.family).layer_state(config, activation, ssm)) {
    bytes += static_cast<size_t>(s.shape.numel()) * itemsize(s.dtype);
  }
  return bytes * static_cast<size_t>(config.n_layer);
}

}  // namespace krait
