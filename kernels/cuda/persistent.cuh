// What kernels share that stay on every multiprocessor for a whole decode step (mamba1_step.cu,
// mamba1_step_wide.cu): bulk copies into shared memory with the barriers that count them, the share
// of a block, and a launch of all blocks at once or not at all.
#pragma once

#include "kernels/cuda/device.cuh"

namespace krait::cuda {

/// The run of n things that falls to block `b` of `blocks`.
struct Run {
  int begin, n;
  __host__ __device__ Run(int total, int b, int blocks)
      : begin(static_cast<int>(static_cast<int64_t>(total) * b / blocks)),
        n(static_cast<int>(static_cast<int64_t>(total) * (b + 1) / blocks) - begin) {}
};

/// Two neighbours of T, loaded or stored by one instruction.
template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T a, b;
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void mbarrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
/// Weights are used once a step: L2 may drop them first.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t bar,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

#endif

/// to[c, r] = from[r, c], rows of `to_pitch`
template <typename T>
__global__ void transpose_kernel(T* to, const T* from, int64_t n_rows, int64_t n_columns,
                                 int64_t to_pitch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= to_pitch * n_columns) return;
  const int64_t r = i % to_pitch;
  to[i] = r < n_rows ? from[r * n_columns + i / to_pitch] : T{};
}

[[nodiscard]] inline int round_up(int64_t n, int64_t to) {
  return static_cast<int>(ceil_div(n, to) * to);
}

/// Launches `blocks` blocks that wait for each other, so all of them must be there, or none: false
/// and nothing launched where the device has no room. `refused`: nor will it have.
template <typename Params>
bool launch_together(void (*kernel)(Params), int blocks, int threads, int shared_bytes,
                     const Params& p, bool& refused, cudaStream_t stream) {
  KRAIT_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  int resident = 0;
  KRAIT_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads,
                                                           static_cast<size_t>(shared_bytes)));
  if (resident < 1) return false;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, p);
  if (status == cudaErrorCooperativeLaunchTooLarge) {  // a GPU of which we have only a part
    (void)cudaGetLastError();
    refused = true;
    return false;
  }
  KRAIT_CUDA(status);
  return true;
}

}  // namespace krait::cuda
