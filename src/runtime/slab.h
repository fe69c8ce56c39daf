// A slab is one allocation cut into tensors by a list of (name, shape, dtype): the engine's memory
// is sized once, at load.
#pragma once

#include <cstring>
#include <span>
#include <vector>

#include "kernels/ops.h"
#include "model/model.h"

namespace krait {

class Slab {
 public:
  static constexpr size_t kAlignment = 256;

  Slab() = default;
  /// A spec without elements gives a null tensor. With `poison`, every byte starts as 0xff: NaN in
  /// all float types.
  Slab(Ops& op, std::span<const TensorSpec> specs, std::string_view what, bool poison);

  [[nodiscard]] const Tensor& operator[](size_t i) const { return tensors_[i]; }
  [[nodiscard]] size_t bytes() const noexcept { return memory_.bytes(); }

  /// The size of a slab of these tensors.
  [[nodiscard]] static size_t bytes_of(std::span<const TensorSpec> specs);

 private:
  Buffer memory_;
  std::vector<Tensor> tensors_;
};

}  // namespace krait
