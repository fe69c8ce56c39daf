#include "runtime/state_pool.h"

namespace krait {

std::vector<TensorSpec> StatePool::specs(int64_t n_layer,
                                         const std::vector<TensorSpec>& layer_state,
                                         int64_t n_slot) {
  std::vector<TensorSpec> all;
  for (int64_t layer = 0; layer < n_layer; ++layer) {
    for (const TensorSpec& s : layer_state) {
      Shape shape{n_slot};
      for (int i = 0; i < s.shape.rank(); ++i) shape.push_back(s.shape[i]);
      all.push_back({s.name, shape, s.dtype});
    }
  }
  return all;
}

StatePool::StatePool(Ops& op, int64_t n_layer, const std::vector<TensorSpec>& layer_state,
                     int64_t n_slot, bool poison)
    : op_(op), slab_(op, specs(n_layer, layer_state, n_slot), "the state of sequences", poison) {
  size_t i = 0;
  for (int64_t layer = 0; layer < n_layer; ++layer) {
    LayerState& tensors = layers_.emplace_back();
    for (size_t k = 0; k < layer_state.size(); ++k) tensors.push_back(slab_[i++]);
  }
}

void StatePool::clear(int64_t slot) {
  for (const LayerState& layer : layers_) {
    for (const Tensor& t : layer) {
      const Tensor row = t.rows(slot, 1);
      op_.zero(row.data, row.bytes());
    }
  }
}

}  // namespace krait
