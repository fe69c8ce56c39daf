// A model: weights on a device and the equations that use them. It is stateless between calls; the
// sequences' state lives in the StatePool, everything else in the caller's Activations.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "kernels/ops.h"
#include "model/config.h"

namespace krait {

/// One tensor of a layer's per-sequence state, or of a step's activations: the shape is that of one
/// slot or one token.
struct TensorSpec {
  std::string name;
  Shape shape;
  DType dtype = DType::f32;
};

/// A layer's state tensors for all slots, in the order of Model::layer_state(): [n_slot, ...] each.
using LayerState = std::vector<Tensor>;

/// A step's scratch, in the order of Model::activations(): [n_tok, ...] each.
using Activations = std::vector<Tensor>;

class WeightLoader;

/// Memory of a weight that the host computed. From new, so aligned for every dtype.
using HostCopy = std::unique_ptr<std::byte[]>;

class Model {
 public:
  virtual ~Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  [[nodiscard]] const ModelConfig& config() const noexcept { return config_; }
  [[nodiscard]] DType weight_dtype() const noexcept { return weight_dtype_; }
  [[nodiscard]] int64_t parameter_count() const noexcept { return parameter_count_; }
  /// Bytes of all weights on the device, and those a decode step reads (a tied embedding counts
  /// once).
  [[nodiscard]] size_t weight_bytes() const noexcept { return weight_bytes_; }

  /// State of one layer and one sequence. `ssm` is the type chosen by --state-dtype.
  [[nodiscard]] std::vector<TensorSpec> layer_state(DType activation, DType ssm) const;
  [[nodiscard]] std::vector<TensorSpec> activations(DType activation) const;

  /// The blocks: residual f32 [n_tok, d_model] goes in as the embedding of `ids` and comes out as
  /// the input of the final norm. state[layer] belongs to layer `layer`.
  virtual void forward(Ops& op, const Tensor& residual, const Tensor& ids, const Batch& batch,
                       const Activations& act, const std::vector<LayerState>& state) const = 0;

  /// A whole decode step, one token per sequence, where the backend has one for this model: logits
  /// f32 [n_seq, vocab_rows] of ids. False, with nothing done, where it has none: then forward()
  /// and head() do it.
  virtual bool step(Ops& op, const Tensor& logits, const Tensor& ids, const Batch& batch,
                    const std::vector<LayerState>& state) const {
    (void)op, (void)logits, (void)ids, (void)batch, (void)state;
    return false;
  }

  /// Final norm and head: logits f32 [n, vocab_rows] of residual f32 [n, d_model]; normed T [n,
  /// d_model].
  void head(Ops& op, const Tensor& logits, const Tensor& normed, const Tensor& residual) const;

 protected:
  /// Loads what all families share: embedding, final norm, head.
  Model(const ModelConfig& config, WeightLoader& in);
  /// Ends a family's constructor: waits for the weights, counts them, warns of unused tensors.
  void finish(WeightLoader& in);

  ModelConfig config_;
  DType weight_dtype_ = DType::f32;
  int64_t parameter_count_ = 0;
  size_t weight_bytes_ = 0;
  Tensor embedding_;  ///< W [vocab_rows, d_model]
  Tensor norm_f_;     ///< f32 [d_model]
  Tensor lm_head_;    ///< W [vocab_rows, d_model]; the embedding when tied

 private:
  std::vector<HostCopy> host_copies_;  ///< computed weights that a CPU tensor views
};

/// The config as the tensors confirm it: fills in vocab_rows, and where an early conversion gives
/// two values for the layer count or d_inner, takes the one that fits. Errors: format (neither
/// fits), unsupported (the tensors are of another family).
[[nodiscard]] ModelConfig resolve_config(const ModelConfig& config, const Checkpoint& checkpoint);

/// Bytes of state, over all layers, that one sequence of the model takes.
[[nodiscard]] size_t state_bytes_per_sequence(const ModelConfig& config, DType activation,
                                              DType ssm);

/// Loads the weights of `config` from `checkpoint` to the device of `op`, as `dtype` (the type of
/// the file's matrices when empty). The checkpoint must live as long as `op`. `progress`, if set,
/// is called with bytes done and bytes in all. Errors: format (missing tensor, wrong shape, a
/// config that contradicts the tensors), unsupported (a tensor type). Unused tensors are warned of
/// by name.
[[nodiscard]] std::unique_ptr<Model> load_model(
    const ModelConfig& config, const Checkpoint& checkpoint, Ops& op, std::optional<DType> dtype,
    const std::function<void(size_t, size_t)>& progress = {});

}  // namespace krait
