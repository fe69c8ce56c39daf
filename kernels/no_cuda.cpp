// Stands in for kernels/cuda in a build without the CUDA backend: asking for it is an error, never
// a quiet fallback.
#include "kernels/ops.h"
#include "kernels/primitives.h"

namespace krait {

namespace {

[[noreturn]] void no_cuda() {
  throw Error(ErrorKind::device,
              "a CUDA device was asked for, but this krait was built without CUDA",
              "build with the preset cuda-release, or use --device cpu");
}

}  // namespace

std::unique_ptr<Ops> make_cuda_ops(int) { no_cuda(); }

std::vector<Primitive> measure_primitives(int) { no_cuda(); }

int cuda_device_count() noexcept { return 0; }

}  // namespace krait
