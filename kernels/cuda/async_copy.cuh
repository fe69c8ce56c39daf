// Copies from global to shared memory in the background (cp.async, sm_80). Before sm_80 they are
// made at once. A thread waits for its own copies; a barrier then shows them to others.
#pragma once

#include "kernels/cuda/device.cuh"

namespace krait::cuda {

/// Copies 8 or 16 bytes; zeros where `inside` is false (then nothing is read).
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside = true) {
  static_assert(kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const uint32_t to = shared_address(shared);
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  }
#else
  using Raw = std::conditional_t<kBytes == 16, uint4, uint2>;
  *static_cast<Raw*>(shared) = inside ? *static_cast<const Raw*>(global) : Raw{};
#endif
}
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool inside = true) {
  copy_async<16>(shared, global, inside);
}

/// Ends a group of copies.
__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until no more than `n` of this thread's latest groups are under way.
template <int n>
__device__ __forceinline__ void await_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

}  // namespace krait::cuda
