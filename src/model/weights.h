// From names to typed weights: WeightLoader finds a checkpoint's tensors under either spelling,
// checks their shapes, and brings them to the device; a table per family (NAME_weights.cpp) says
// which tensor becomes which member. It knows no file format and no equation.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "base/thread_pool.h"
#include "checkpoint/checkpoint.h"
#include "kernels/ops.h"
#include "model/config.h"
#include "model/family.h"

namespace krait {

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
  /// -exp(A_log), taken once in f32; or "A" as it is, where the file (GGUF) has that.
  [[nodiscard]] Tensor negative_exp(const std::string& name, const Shape& shape);
  /// A block's tensor, by its row of the family's table.
  [[nodiscard]] Tensor layer_tensor(int64_t layer, const TensorRow& row);
  /// The head: `embedding` when the file has none, or one that repeats the embedding.
  [[nodiscard]] Tensor head(const Tensor& embedding, const Shape& shape);

  /// Waits for the device, and warns of tensors that nothing asked for.
  void finish();

  [[nodiscard]] int64_t parameter_count() const noexcept { return parameter_count_; }
  [[nodiscard]] size_t weight_bytes() const noexcept { return weight_bytes_; }
  /// Computed weights that the device views; to be kept as long as the weights.
  [[nodiscard]] std::vector<HostCopy>&& take_host_copies() { return std::move(host_copies_); }

 private:
  const Checkpoint::Entry& require(const std::string& name, const Shape& shape);
  Tensor import(const Checkpoint::Entry& entry, const Shape& shape, DType as);
  Tensor import_dequantized(const Checkpoint::Entry& entry, const Shape& shape, DType as);
  Tensor import_computed(HostCopy values, DType dtype, const Shape& shape, DType as);

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
  std::vector<HostCopy> host_copies_;
  std::unique_ptr<ThreadPool> pool_;  ///< made by the first quantised tensor
};

/// The entry of that name under any spelling: "embedding" or "embeddings", with or without a
/// leading "model."; null if there is none.
[[nodiscard]] const Checkpoint::Entry* find_tensor(const Checkpoint& checkpoint,
                                                   std::string_view name);

/// find_tensor() that throws: Error format where it is missing or has another shape, unsupported
/// where its type is none of the reals.
[[nodiscard]] const Checkpoint::Entry& require_tensor(const Checkpoint& checkpoint,
                                                      const ModelConfig& config,
                                                      const std::string& name, const Shape& shape);

/// The type of the matrices where the user names none: the file's, f16 where they are quantised.
[[nodiscard]] DType matrix_dtype(const Checkpoint& checkpoint);

[[nodiscard]] bool same_bytes(const Checkpoint::Entry& a, const Checkpoint::Entry& b);

/// A row of a family's table and the member that it fills.
template <typename Layer>
struct LayerRow : TensorRow {
  Tensor Layer::*member;
};

template <typename Layer>
[[nodiscard]] std::vector<Layer> load_layers(WeightLoader& in, const ModelConfig& config,
                                             const std::vector<LayerRow<Layer>>& table) {
  std::vector<Layer> layers(static_cast<size_t>(config.n_layer));
  for (int64_t i = 0; i < config.n_layer; ++i) {
    for (const LayerRow<Layer>& row : table) {
      layers[static_cast<size_t>(i)].*row.member = in.layer_tensor(i, row);
    }
  }
  return layers;
}

}  // namespace krait
