// A whole decode step of a Mamba-1 model in one persistent kernel: mamba1_step.cu and, for wide
// models, mamba1_step_wide.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels/mamba1_step.h"
#include "kernels/ops.h"

namespace krait::cuda {

/// The step of a model that Mamba1Stepper supports, in another form; the same interface.
class Mamba1WideStepper {
 public:
  using Allocate = std::function<Buffer(size_t bytes, std::string_view what)>;

  explicit Mamba1WideStepper(Allocate allocate);
  ~Mamba1WideStepper();
  Mamba1WideStepper(const Mamba1WideStepper&) = delete;
  Mamba1WideStepper& operator=(const Mamba1WideStepper&) = delete;

  bool run(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
           const Batch& batch, std::span<const std::vector<Tensor>> state, cudaStream_t stream);

 private:
  struct Plan;
  Allocate allocate_;
  std::vector<std::unique_ptr<Plan>> plans_;
  bool refused_ = false;  // the device can't hold all blocks at once, so the verbs do it
};

class Mamba1Stepper {
 public:
  using Allocate = Mamba1WideStepper::Allocate;

  explicit Mamba1Stepper(Allocate allocate);
  ~Mamba1Stepper();
  Mamba1Stepper(const Mamba1Stepper&) = delete;
  Mamba1Stepper& operator=(const Mamba1Stepper&) = delete;

  /// Ops::mamba1_step. The first call for a model and its states allocates and prepares; later ones
  /// launch only, so that they can be captured.
  bool run(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
           const Batch& batch, std::span<const std::vector<Tensor>> state, cudaStream_t stream);

 private:
  struct Plan;
  /// False: too little shared memory for this batch, or none of the blocks could start.
  bool launch(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
              const Batch& batch, std::span<const std::vector<Tensor>> state, cudaStream_t stream);

  Allocate allocate_;
  std::vector<std::unique_ptr<Plan>> plans_;
  bool refused_ = false;  // the device can't hold all blocks at once, so the verbs do it
  Mamba1WideStepper wide_;
};

}  // namespace krait::cuda
