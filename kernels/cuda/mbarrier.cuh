// Barriers in shared memory that count arrivals and the bytes of copies in the background, as sm_90
// and later have them, and what those copies may say of L2.
#pragma once

#include "kernels/cuda/device.cuh"

namespace krait::cuda {

/// A warp arrives at a barrier by one lane, after __syncwarp: 32 arrivals would queue. racecheck
/// takes only the lane that arrives for ordered, so under it (KRAIT_RACECHECK, tools/sanitize.sh)
/// all do.
#ifdef KRAIT_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ bool warp_arrives() { return threadIdx.x % 32 < kWarpArrivals; }

/// A barrier of kThreads threads at which some only arrive; under racecheck, which loses count of
/// those, all wait. Whole warps.
template <int kId, int kThreads>
__device__ __forceinline__ void meet(bool waits) {
  if (waits || kWarpArrivals > 1) {
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
  } else {
    asm volatile("bar.arrive %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
  }
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ __forceinline__ void mbarrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
/// Makes barriers that were just set up known to the copy engine and to the cluster.
__device__ __forceinline__ void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
/// A warp, of which all lanes have done what it arrives for.
__device__ __forceinline__ void warp_arrive(uint32_t bar) {
  __syncwarp();
  if (warp_arrives()) mbarrier_arrive(bar);
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

/// What is used once, L2 may drop first.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

#endif

}  // namespace krait::cuda
