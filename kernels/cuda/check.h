// Checked calls of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

namespace krait::cuda {

/// Throws an Error of kind device that names the call, the reason and the place; clears the last
/// error.
void check(cudaError_t status, const char* call, const char* file, int line);
#define KRAIT_CUDA(call) ::krait::cuda::check((call), #call, __FILE__, __LINE__)

/// An attribute of the calling thread's device: several devices may be in use, a thread each.
[[nodiscard]] int device_attribute(cudaDeviceAttr attribute);

}  // namespace krait::cuda
