// Any bytes as a GGUF file: tensors inside the file and metadata that can be read, or an Error.
#include <cstdint>
#include <vector>

#include "checkpoint/ggml_blocks.h"
#include "checkpoint/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using krait::GgufType;
  const auto file = std::as_bytes(std::span(data, size));
  double sum = 0;
  try {
    const krait::ParsedGguf gguf = krait::parse_gguf(file, "fuzz");
    const krait::GgufMetadata& m = gguf.metadata;
    for (const auto& [key, value] : m.all()) {
      try {
        if (value.is_array) {
          sum += static_cast<double>(m.texts(key).size());
        } else {
          sum += m.number(key).value_or(0);
        }
      } catch (const krait::Error&) {  // of another type
      }
    }
    for (const auto& e : gguf.tensors.entries) {
      // Read every byte, so that a view outside the file is seen.
      const auto* p = e.tensor.as<const uint8_t>();
      for (size_t i = 0; i < e.tensor.bytes(); ++i) sum += p[i];
      if (e.blocks == nullptr) continue;
      std::vector<float> values(static_cast<size_t>(e.shape().numel()));
      e.blocks->dequantize(e.tensor.as<const std::byte>(),
                           static_cast<int64_t>(e.tensor.bytes()) / e.blocks->bytes, values.data());
    }
  } catch (const krait::Error&) {
  }
  return sum == -1 ? 1 : 0;
}
