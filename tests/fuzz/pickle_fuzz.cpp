// Any bytes as the pickle of a PyTorch checkpoint, in an archive that is whole: the fuzzer need not
// find its way through a zip archive to reach the stack machine.
#include <cstdint>

#include "checkpoint/parse.h"
#include "support/checkpoint_bytes.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string file =
      krait::test::torch_bin(std::string(reinterpret_cast<const char*>(data), size),
                             {krait::test::float_bytes({0, 1, 2, 3, 4, 5}), std::string(16, 'x')});
  uint64_t sum = 0;
  try {
    const auto tensors = krait::parse_torch_bin(std::as_bytes(std::span(file)), "fuzz");
    for (const auto& e : tensors.entries) {
      const auto* p = e.tensor.as<const uint8_t>();
      for (size_t i = 0; i < e.tensor.bytes(); ++i) sum += p[i];
    }
  } catch (const krait::Error&) {
  }
  return sum == UINT64_MAX ? 1 : 0;
}
