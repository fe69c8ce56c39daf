// From names to typed weights: WeightLoader finds a checkpoint's tensors under either spelling,
// checks their shapes, and brings them to the device; a table per family (weights.cpp) says which
// tensor becomes which member. It knows no file format and no equation.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "kernels/ops.h"
#include "model/config.h"

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

class WeightLoader {
 public:
  /// `dtype` of the matrices; empty: as in the file.
  WeightLoader(const ModelConfig& config, const Checkpoint& checkpoint, Ops& op,
               std::optional<DType> dtype, std::function<void(size_t, size_t)> progress);

  [[nodiscard]] DType dtype() const noexcept { return dtype_; }

  // By the name that state-spaces uses, e.g. "backbone.layers.0.norm.weight". A missing tensor is
  // an error of kind format; so is a shape other than `shape`.

  [[nodiscard]] Tensor matrix(const std::string& name, const Shape& shape);  ///< as dtype()
  [[nodiscard]] Tensor vector(const std::string& name, const Shape& shape);  ///< as f32
  /// Null when the file has none.
  [[nodiscard]] Tensor optional_vector(const std::string& name, const Shape& shape);
  /// -exp(A_log), taken once in f32.
  [[nodiscard]] Tensor negative_exp(const std::string& name, const Shape& shape);
  /// The head: `embedding` when the file has none, or one that repeats the embedding.
  [[nodiscard]] Tensor head(const Tensor& embedding, const Shape& shape);

  /// Waits for the device, and warns of tensors that nothing asked for.
  void finish();

  [[nodiscard]] int64_t parameter_count() const noexcept { return parameter_count_; }
  [[nodiscard]] size_t weight_bytes() const noexcept { return weight_bytes_; }
  /// Computed weights that the device may view; to be kept as long as the weights.
  [[nodiscard]] std::vector<std::vector<float>>&& take_host_copies() {
    return std::move(host_copies_);
  }

 private:
  const Checkpoint::Entry& require(const std::string& name, const Shape& shape);
  Tensor import(const Checkpoint::Entry& entry, const Shape& shape, DType as);
  Tensor import_computed(std::vector<float> values, const Shape& shape, DType as);

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  Ops& op_;
  DType dtype_ = DType::f32;
  std::function<void(size_t, size_t)> progress_;
  size_t bytes_done_ = 0;
  size_t bytes_total_ = 0;
  int64_t parameter_count_ = 0;
  size_t weight_bytes_ = 0;
  std::unordered_set<const Checkpoint::Entry*> used_;
  std::vector<std::vector<float>> host_copies_;
};

/// The entry of that name under any spelling: "embedding" or "embeddings", with or without a
/// leading "model."; null if there is none.
[[nodiscard]] const Checkpoint::Entry* find_tensor(const Checkpoint& checkpoint,
                                                   std::string_view name);

[[nodiscard]] std::vector<Mamba1Layer> load_mamba1_layers(WeightLoader& in,
                                                          const ModelConfig& config);

}  // namespace krait
