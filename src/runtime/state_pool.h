// The recurrent state of all sequences: for each layer the tensors that the model declares, with
// room for n_slot sequences. It knows neither how many tensors a family has nor what they mean.
#pragma once

#include <vector>

#include "runtime/slab.h"

namespace krait {

class StatePool {
 public:
  /// `layer_state`: one layer's state of one sequence (Model::layer_state).
  StatePool(Ops& op, int64_t n_layer, const std::vector<TensorSpec>& layer_state, int64_t n_slot,
            bool poison);

  /// For Model::forward: [layer][tensor], each [n_slot, ...].
  [[nodiscard]] const std::vector<LayerState>& layers() const noexcept { return layers_; }
  /// Makes the slot's state that of an empty sequence: zero.
  void clear(int64_t slot);
  /// Makes the state of `to` that of `from`.
  void copy(int64_t from, int64_t to);

  [[nodiscard]] size_t bytes() const noexcept { return slab_.bytes(); }

  /// The tensors of a pool, [n_slot, ...] each, layer by layer.
  [[nodiscard]] static std::vector<TensorSpec> specs(int64_t n_layer,
                                                     const std::vector<TensorSpec>& layer_state,
                                                     int64_t n_slot);

 private:
  /// f(row, pitch) for each tensor of a layer: its row of `slot` in the first layer, and the bytes
  /// from there to the same row in the next.
  template <typename F>
  void each_row(int64_t slot, F&& f) const;

  Ops& op_;
  Slab slab_;
  std::vector<LayerState> layers_;
};

}  // namespace krait
