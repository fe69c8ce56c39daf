// Any bytes as the index of a sharded checkpoint: plain file names, or an Error.
#include <cstdint>
#include <cstdlib>

#include "checkpoint/parse.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    for (const auto& [tensor, file] :
         krait::parse_index(std::as_bytes(std::span(data, size)), "fuzz")) {
      if (file.empty() || file.find('/') != std::string::npos) std::abort();
    }
  } catch (const krait::Error&) {
  }
  return 0;
}
