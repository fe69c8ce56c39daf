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

template <typename F>
void StatePool::each_row(int64_t slot, F&& f) const {
  // All layers have the same tensors, so they follow each other at one distance.
  for (size_t k = 0; !layers_.empty() && k < layers_[0].size(); ++k) {
    if (!layers_[0][k]) continue;  // a tensor without elements
    const auto address = [&](size_t layer) {
      return reinterpret_cast<uintptr_t>(layers_[layer][k].data);
    };
    const size_t pitch = layers_.size() > 1 ? address(1) - address(0) : slab_.bytes();
    f(layers_[0][k].rows(slot, 1), pitch);
  }
}

void StatePool::clear(int64_t slot) {
  each_row(slot, [&](const Tensor& row, size_t pitch) {
    op_.zero_rows(row.data, pitch, row.bytes(), layers_.size());
  });
}

void StatePool::copy(int64_t from, int64_t to) {
  each_row(from, [&](const Tensor& row, size_t pitch) {
    auto* target =
        static_cast<std::byte*>(row.data) + (to - from) * static_cast<int64_t>(row.bytes());
    op_.copy_rows(target, row.data, pitch, row.bytes(), layers_.size());
  });
}

}  // namespace krait
