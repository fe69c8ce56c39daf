#include "runtime/slab.h"

#include <algorithm>

namespace krait {

namespace {

size_t aligned_bytes(const TensorSpec& s) {
  const size_t bytes = static_cast<size_t>(s.shape.numel()) * itemsize(s.dtype);
  return (bytes + Slab::kAlignment - 1) / Slab::kAlignment * Slab::kAlignment;
}

}  // namespace

size_t Slab::bytes_of(std::span<const TensorSpec> specs) {
  size_t bytes = 0;
  for (const TensorSpec& s : specs) bytes += aligned_bytes(s);
  return bytes;
}

Slab::Slab(Ops& op, std::span<const TensorSpec> specs, std::string_view what, bool poison)
    : memory_(op.allocate(bytes_of(specs), what)) {
  auto* at = static_cast<std::byte*>(memory_.data());
  for (const TensorSpec& s : specs) {
    tensors_.push_back(s.shape.numel() == 0 ? Tensor() : Tensor(at, s.dtype, s.shape));
    at += aligned_bytes(s);
  }
  if (!poison) return;
  const std::vector<unsigned char> nan(std::min<size_t>(memory_.bytes(), 1U << 20), 0xff);
  for (size_t done = 0; done < memory_.bytes(); done += nan.size()) {
    op.upload(static_cast<std::byte*>(memory_.data()) + done, nan.data(),
              std::min(nan.size(), memory_.bytes() - done));
  }
}

}  // namespace krait
