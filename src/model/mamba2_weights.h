// The tensors of Mamba-2.
#pragma once

#include <vector>

#include "model/weights.h"

namespace krait {

/// One block of Mamba-2. E = d_inner = H * P, D = d_model, N = d_state, G = n_group, H = n_head,
/// K = d_conv; W is the weight type, everything else f32.
struct Mamba2Layer {
  Tensor norm;           ///< [D]
  Tensor in_proj;        ///< W [2E + 2GN + H, D]: rows of z, x, B, C, dt
  Tensor in_proj_bias;   ///< [2E + 2GN + H] or null
  Tensor conv1d;         ///< [E + 2GN, K]: channels of x, B, C
  Tensor conv1d_bias;    ///< [E + 2GN] or null
  Tensor dt_bias;        ///< [H]
  Tensor A;              ///< [H], -exp(A_log)
  Tensor D;              ///< [H]
  Tensor gated_norm;     ///< [E]
  Tensor out_proj;       ///< W [D, E]
  Tensor out_proj_bias;  ///< [D] or null
};

[[nodiscard]] std::vector<LayerRow<Mamba2Layer>> mamba2_rows(const ModelConfig& config);

/// The rows without their members.
[[nodiscard]] std::vector<TensorRow> mamba2_tensors(const ModelConfig& config);

void read_mamba2_config(const ConfigReader& in, ModelConfig& config);

}  // namespace krait
