#include "checkpoint/tensor_writer.h"

#include "base/error.h"

namespace krait {

void write_tensor(const OutputTensor& tensor, OutputFile& out) {
  size_t written = 0;
  tensor.write([&](std::span<const std::byte> bytes) {
    out.write(bytes);
    written += bytes.size();
  });
  if (written != tensor.bytes()) {
    throw Error(ErrorKind::runtime, fmt::format("internal error: {} gave {} bytes instead of {}",
                                                tensor.name, written, tensor.bytes()));
  }
}

}  // namespace krait
