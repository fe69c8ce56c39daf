// What the writers of checkpoints take: tensors whose bytes are made while they are written, so
// that a model need not fit into memory a second time.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>

#include "base/output_file.h"
#include "base/tensor.h"

namespace krait {

struct OutputTensor {
  using Sink = std::function<void(std::span<const std::byte>)>;

  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  /// Gives the tensor's bytes, dense and in order, in as many pieces as it likes. May throw: then
  /// no file is left.
  std::function<void(const Sink&)> write;

  [[nodiscard]] size_t bytes() const {
    return static_cast<size_t>(shape.numel()) * itemsize(dtype);
  }
};

/// Writes the bytes of `tensor`. Error runtime if it gives another number of them than its shape
/// says.
void write_tensor(const OutputTensor& tensor, OutputFile& out);

}  // namespace krait
