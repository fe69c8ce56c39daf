// Hopper's own instructions: clusters, tensor copies (TMA), and the products of a warpgroup
// (wgmma). Only for sm_90a.
#pragma once

#include <cuda.h>  // CUtensorMap

#include "kernels/cuda/mbarrier.cuh"

namespace krait::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// ---- clusters -----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// A barrier of all threads of the cluster; what was written before it can be read after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}
/// The same without order among writes.
__device__ __forceinline__ void cluster_meet() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;\n" ::
          : "memory");
}
/// 16 bytes at the same place of the shared memory of another block of the cluster.
__device__ __forceinline__ float4 load_from(uint32_t address, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}\n"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

// ---- tensor copies ------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// The box of `map` that begins at column x of row y.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int x, int y,
                                         uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(bar), "l"(policy)
      : "memory");
}
// ---- products of a warpgroup --------------------------------------------------------------------

/// Describes rows of 64 16-bit elements in shared memory as the copy engine swizzles them: 128
/// bytes a row, 8 rows an atom of 1024 bytes, atoms one after the other. `address` may point 32, 64
/// or 96 bytes into the first row, at the next 16 elements.
__device__ __forceinline__ uint64_t swizzled_rows(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) |
         static_cast<uint64_t>((address & 0x3ffffU) >> 4);
}

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kUnderWay>
__device__ __forceinline__ void wgmma_await() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnderWay) : "memory");
}

/// c += A * B^T with A [64, 16] and B [N, 16] in shared memory. Warp w of the warpgroup has rows
/// 16 w to 16 w + 15 of c. In it, with g = lane / 4 and q = lane % 4, c[4 j] to c[4 j + 3] are
/// (g, 8 j + 2 q), (g, 8 j + 2 q + 1), (g + 8, 8 j + 2 q), (g + 8, 8 j + 2 q + 1).
template <typename T, int N>
struct Wgmma;

#define KRAIT_C4(i) "+f"(c[i]), "+f"(c[(i) + 1]), "+f"(c[(i) + 2]), "+f"(c[(i) + 3])
#define KRAIT_C8(i)                                                                   \
  "+f"(c[i]), "+f"(c[(i) + 1]), "+f"(c[(i) + 2]), "+f"(c[(i) + 3]), "+f"(c[(i) + 4]), \
      "+f"(c[(i) + 5]), "+f"(c[(i) + 6]), "+f"(c[(i) + 7])
#define KRAIT_WGMMA(type, name, n, registers, a_b, ...)                                            \
  template <>                                                                                      \
  struct Wgmma<type, n> {                                                                          \
    __device__ static __forceinline__ void add(float (&c)[(n) / 2], uint64_t a, uint64_t b) {      \
      asm volatile(                                                                                \
          "{ .reg .pred add; setp.ne.b32 add, 1, 0; "                                              \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, " a_b \
          ", add, 1, 1, 0, 0; }"                                                                   \
          : __VA_ARGS__                                                                            \
          : "l"(a), "l"(b));                                                                       \
    }                                                                                              \
  };
#define KRAIT_WGMMA_BOTH(...)                     \
  KRAIT_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__) \
  KRAIT_WGMMA(__half, "f16", __VA_ARGS__)
#define KRAIT_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KRAIT_R16 KRAIT_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define KRAIT_R20 KRAIT_R16 ", %16, %17, %18, %19"
#define KRAIT_R24 KRAIT_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define KRAIT_R32 KRAIT_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define KRAIT_R40 KRAIT_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define KRAIT_R48 KRAIT_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define KRAIT_R64 \
  KRAIT_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format off
KRAIT_WGMMA_BOTH(16, KRAIT_R8, "%8, %9", KRAIT_C8(0))
KRAIT_WGMMA_BOTH(32, KRAIT_R16, "%16, %17", KRAIT_C8(0), KRAIT_C8(8))
KRAIT_WGMMA_BOTH(40, KRAIT_R20, "%20, %21", KRAIT_C8(0), KRAIT_C8(8), KRAIT_C4(16))
KRAIT_WGMMA_BOTH(48, KRAIT_R24, "%24, %25", KRAIT_C8(0), KRAIT_C8(8), KRAIT_C8(16))
KRAIT_WGMMA_BOTH(64, KRAIT_R32, "%32, %33", KRAIT_C8(0), KRAIT_C8(8), KRAIT_C8(16), KRAIT_C8(24))
KRAIT_WGMMA_BOTH(80, KRAIT_R40, "%40, %41", KRAIT_C8(0), KRAIT_C8(8), KRAIT_C8(16), KRAIT_C8(24),
                 KRAIT_C8(32))
KRAIT_WGMMA_BOTH(96, KRAIT_R48, "%48, %49", KRAIT_C8(0), KRAIT_C8(8), KRAIT_C8(16), KRAIT_C8(24),
                 KRAIT_C8(32), KRAIT_C8(40))
KRAIT_WGMMA_BOTH(128, KRAIT_R64, "%64, %65", KRAIT_C8(0), KRAIT_C8(8), KRAIT_C8(16), KRAIT_C8(24),
                 KRAIT_C8(32), KRAIT_C8(40), KRAIT_C8(48), KRAIT_C8(56))
// clang-format on
#undef KRAIT_R8
#undef KRAIT_R16
#undef KRAIT_R20
#undef KRAIT_R24
#undef KRAIT_R32
#undef KRAIT_R40
#undef KRAIT_R48
#undef KRAIT_R64
#undef KRAIT_WGMMA_BOTH
#undef KRAIT_WGMMA
#undef KRAIT_C8
#undef KRAIT_C4

#endif

}  // namespace krait::cuda
