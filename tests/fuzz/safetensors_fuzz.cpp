// Any bytes as a safetensors file: tensors inside the file, or an Error.
#include <cstdint>

#include "checkpoint/parse.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  uint64_t sum = 0;
  try {
    const krait::ParsedTensors tensors = krait::parse_safetensors(file, "fuzz");
    for (const auto& e : tensors.entries) {
      // Read every byte, so that a view outside the file is seen.
      const auto* p = e.tensor.as<const uint8_t>();
      for (size_t i = 0; i < e.tensor.bytes(); ++i) sum += p[i];
    }
  } catch (const krait::Error&) {
  }
  return sum == UINT64_MAX ? 1 : 0;
}
