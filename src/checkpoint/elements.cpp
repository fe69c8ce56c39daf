#include "checkpoint/elements.h"

#include <cstring>

#include "checkpoint/ggml_blocks.h"

namespace krait {

namespace {

/// The data may be unaligned.
template <typename T>
void read_as(const std::byte* data, int64_t begin, int64_t n, float* out) {
  data += static_cast<size_t>(begin) * sizeof(T);
  for (int64_t i = 0; i < n; ++i) {
    T v;
    std::memcpy(&v, data + static_cast<size_t>(i) * sizeof(T), sizeof v);
    out[i] = static_cast<float>(v);
  }
}

}  // namespace

bool is_real(const Checkpoint::Entry& entry) {
  return entry.blocks != nullptr || is_float16_or_32(entry.tensor.dtype) ||
         entry.tensor.dtype == DType::f64;
}

void read_elements(const Checkpoint::Entry& entry, int64_t begin, int64_t n, float* out) {
  const auto* data = entry.tensor.as<const std::byte>();
  if (const BlockFormat* b = entry.blocks) {
    b->dequantize(data + begin / b->elements * b->bytes, n / b->elements, out);
    return;
  }
  if (entry.tensor.dtype == DType::f64) return read_as<double>(data, begin, n, out);
  visit_dtype(entry.tensor.dtype, entry.name,
              [&](auto type) { read_as<decltype(type)>(data, begin, n, out); });
}

}  // namespace krait
