// The tensors of Mamba-1 and Falcon-Mamba.
#pragma once

#include <vector>

#include "kernels/mamba1_step.h"
#include "model/weights.h"

namespace krait {

[[nodiscard]] std::vector<LayerRow<Mamba1Layer>> mamba1_rows(const ModelConfig& config);

/// The rows without their members.
[[nodiscard]] std::vector<TensorRow> mamba1_tensors(const ModelConfig& config);

void read_mamba1_config(const ConfigReader& in, ModelConfig& config);
void read_falcon_mamba_config(const ConfigReader& in, ModelConfig& config);

}  // namespace krait
