// The tensors of Mamba-1 and Falcon-Mamba.
#pragma once

#include <vector>

#include "model/weights.h"

namespace krait {

/// One block of Mamba-1. E = d_inner, D = d_model, N = d_state, K = d_conv, R = dt_rank; W is the
/// weight type, everything else f32.
struct Mamba1Layer {
  Tensor norm;           ///< [D]
  Tensor in_proj;        ///< W [2E, D]: rows of x, then rows of z
  Tensor in_proj_bias;   ///< [2E] or null
  Tensor conv1d;         ///< [E, K]
  Tensor conv1d_bias;    ///< [E] or null
  Tensor x_proj;         ///< W [R + 2N, E]: rows of dt, B, C
  Tensor dt_proj;        ///< W [E, R]
  Tensor dt_bias;        ///< [E]
  Tensor A;              ///< [E, N], -exp(A_log)
  Tensor D;              ///< [E]
  Tensor out_proj;       ///< W [D, E]
  Tensor out_proj_bias;  ///< [D] or null
};

[[nodiscard]] std::vector<LayerRow<Mamba1Layer>> mamba1_rows(const ModelConfig& config);

/// The rows without their members.
[[nodiscard]] std::vector<TensorRow> mamba1_tensors(const ModelConfig& config);

void read_mamba1_config(const ConfigReader& in, ModelConfig& config);
void read_falcon_mamba_config(const ConfigReader& in, ModelConfig& config);

}  // namespace krait
