// The launcher of ssd_mixer over many tokens.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/ops.h"

namespace krait::cuda {

/// ssd_mixer for sequences that are long enough to be cut; false, and nothing done, where they are
/// not, or where the types or sizes are not built. `scratch` has ssd_scratch_bytes().
[[nodiscard]] bool ssd_mixer_chunks(const Tensor& y, const Tensor& xbc, const SsdMixer& in,
                                    const Tensor& conv_state, const Tensor& ssm_state,
                                    const Batch& batch, void* scratch, cudaStream_t stream);

}  // namespace krait::cuda
