// What a backend needs to know of a Mamba-1 (or Falcon-Mamba) model to run a whole decode step of
// it at once: Ops::mamba1_step.
#pragma once

#include <span>
#include <vector>

#include "base/tensor.h"

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

/// The whole model. The layers must stay where they are as long as steps are run.
struct Mamba1Weights {
  std::span<const Mamba1Layer> layers;
  Tensor embedding;  ///< W [vocab_rows, D]
  Tensor norm_f;     ///< f32 [D]
  Tensor lm_head;    ///< W [vocab_rows, D]
  float norm_eps = 1e-5F;
  float mixer_norm_eps = 0.0F;  ///< > 0: dt, B and C are normalised (Falcon-Mamba)
};

}  // namespace krait
