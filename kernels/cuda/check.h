// Checked calls of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

namespace krait::cuda {

/// Throws an Error of kind device that names the call, the reason and the place; clears the last
/// error.
void check(cudaError_t status, const char* call, const char* file, int line);
#define KRAIT_CUDA(call) ::krait::cuda::check((call), #call, __FILE__, __LINE__)

/// Whether the current device overlaps the start of a kernel with the end of the one before it.
[[nodiscard]] bool has_programmatic_launch();

/// Streaming multiprocessors of the current device.
[[nodiscard]] int multiprocessor_count();

}  // namespace krait::cuda
