// The tensors of Mamba-2.
#pragma once

#include <vector>

#include "kernels/mamba2_step.h"
#include "model/weights.h"

namespace krait {

[[nodiscard]] std::vector<LayerRow<Mamba2Layer>> mamba2_rows(const ModelConfig& config);

/// The rows without their members.
[[nodiscard]] std::vector<TensorRow> mamba2_tensors(const ModelConfig& config);

void read_mamba2_config(const ConfigReader& in, ModelConfig& config);

}  // namespace krait
