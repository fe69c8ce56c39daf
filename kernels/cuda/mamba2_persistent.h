// A whole decode step of a Mamba-2 model in one persistent kernel: mamba2_persistent.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels/mamba2_step.h"
#include "kernels/ops.h"

namespace krait::cuda {

class Mamba2Stepper {
 public:
  using Allocate = std::function<Buffer(size_t bytes, std::string_view what)>;

  explicit Mamba2Stepper(Allocate allocate);
  ~Mamba2Stepper();
  Mamba2Stepper(const Mamba2Stepper&) = delete;
  Mamba2Stepper& operator=(const Mamba2Stepper&) = delete;

  /// Ops::mamba2_step. The first call for a model and its states allocates and prepares; later ones
  /// launch only, so that they can be captured.
  bool run(const Mamba2Weights& weights, const Tensor& logits, const Tensor& ids,
           const Batch& batch, std::span<const std::vector<Tensor>> state, cudaStream_t stream);

 private:
  struct Plan;
  Allocate allocate_;
  std::vector<std::unique_ptr<Plan>> plans_;
  bool refused_ = false;  // the device can't hold all blocks at once, so the verbs do it
};

}  // namespace krait::cuda
