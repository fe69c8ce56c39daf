// What a backend needs to know of a Mamba-2 model to run a whole decode step of it at once:
// Ops::mamba2_step.
#pragma once

#include <span>
#include <vector>

#include "base/tensor.h"

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

/// The whole model. The layers must stay where they are as long as steps are run.
struct Mamba2Weights {
  std::span<const Mamba2Layer> layers;
  Tensor embedding;  ///< W [vocab_rows, D]
  Tensor norm_f;     ///< f32 [D]
  Tensor lm_head;    ///< W [vocab_rows, D]
  int64_t n_group = 1;
  float norm_eps = 1e-5F;
  float mixer_norm_eps = 1e-5F;
  float dt_min = 0.0F;  ///< limits of dt after softplus
  float dt_max = 0.0F;
};

}  // namespace krait
