// Matrix products of four warps together on 16-bit tiles in shared memory, f32 accumulation: wgmma
// on Hopper (sm_90a), where one instruction does the work of the four warps' 64 rows and reads the
// tiles by itself; ldmatrix and mma.sync elsewhere, with the same tiles and the same fragments.
//
// A tile [rows, cols] lies as panels of 64 columns, so that a row of a panel has 128 bytes, its
// pieces of 16 bytes permuted by row % 8: the 128-byte swizzle of the PTX ISA (wgmma, "shared
// memory layout"). Eight rows, or eight pieces of one column of pieces, then fall into all banks.
//
// Warp w of the four has rows 16 w .. 16 w + 15 of the accumulators, v[j] being the C fragment of
// columns 8 j .. 8 j + 7 (mma.cuh).
//
//   start();  by_rows(...); ...;  end();     ...     await<0>();
//
// Between start and await the accumulators and operands in registers belong to the tensor cores.
#pragma once

#include "kernels/cuda/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KRAIT_WGMMA 1
#else
#define KRAIT_WGMMA 0
#endif

namespace krait::cuda {

/// Memory for a tile. Places are addresses in the window of shared memory: a tile begins at a
/// multiple of 1024, so that steps over pieces are exclusive ors of an address.
template <typename T, int kRows, int kCols>
struct alignas(1024) Tile {
  static constexpr uint32_t kPanelBytes = 128 * kRows;  ///< 64 columns
  T v[kCols / 64][kRows][64];
};

template <typename V>
__device__ __forceinline__ V& shared_at(uint32_t address) {
  return *static_cast<V*>(__cvta_shared_to_generic(address));
}

/// From the begin of a panel to piece `piece` (8 columns) of a row. The same piece of row + 8 i is
/// 1024 i further; piece ^ i of the same row is at the address ^ 16 i.
__device__ __forceinline__ uint32_t piece_offset(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ row) % 8) * 16);
}

/// What threads wrote to shared memory is there for wgmma after this and a barrier.
__device__ __forceinline__ void show_to_products() {
#if KRAIT_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

namespace detail {

#if KRAIT_WGMMA
/// The lower half of the descriptor of a swizzled operand in one panel; steps of 16 bytes are added
/// to it.
__device__ __forceinline__ uint32_t descriptor(uint32_t at) { return (at & 0x3FFFFU) >> 4; }

/// The upper half: groups of 8 rows follow each other, and the swizzle is that of 128 bytes.
constexpr uint32_t kDescriptorHigh = 1U << 30 | 1024 >> 4;

#define KRAIT_C4(f, j) f(c[j][0]), f(c[j][1]), f(c[j][2]), f(c[j][3])
#define KRAIT_C32(f)                                                                              \
  KRAIT_C4(f, 0), KRAIT_C4(f, 1), KRAIT_C4(f, 2), KRAIT_C4(f, 3), KRAIT_C4(f, 4), KRAIT_C4(f, 5), \
      KRAIT_C4(f, 6), KRAIT_C4(f, 7)
#define KRAIT_WGMMA_64(type)                                                                    \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                   \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19," \
  " %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

/// c (+)= A [64, 16] B [64, 16]^T
template <typename T, bool kAdd>
__device__ __forceinline__ void wgmma(float (*c)[4], uint32_t a, uint32_t b) {
#define KRAIT_SS(type, f)                                               \
  asm volatile(                                                         \
      "{.reg .pred add; .reg .b64 a, b; setp.ne.b32 add, %34, 0;\n"     \
      "mov.b64 a, {%32, %35}; mov.b64 b, {%33, %35};\n" KRAIT_WGMMA_64( \
          type) "a, b, add, 1, 1, 0, 0;}"                               \
      : KRAIT_C32(f)                                                    \
      : "r"(a), "r"(b), "n"(kAdd ? 1 : 0), "n"(kDescriptorHigh))
  if constexpr (std::is_same_v<T, __half> && kAdd) {
    KRAIT_SS("f16", "+f");
  } else if constexpr (std::is_same_v<T, __half>) {
    KRAIT_SS("f16", "=f");
  } else if constexpr (kAdd) {
    KRAIT_SS("bf16", "+f");
  } else {
    KRAIT_SS("bf16", "=f");
  }
#undef KRAIT_SS
}

/// c += A [64, 16] B [16, 64]
template <typename T>
__device__ __forceinline__ void wgmma(float (*c)[4], const uint32_t (&a)[4], uint32_t b) {
#define KRAIT_RS(type)                                                  \
  asm volatile("{.reg .b64 b; mov.b64 b, {%36, %37};\n" KRAIT_WGMMA_64( \
                   type) "{%32, %33, %34, %35}, b, 1, 1, 1, 1;}"        \
               : KRAIT_C32("+f")                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh))
  if constexpr (std::is_same_v<T, __half>) {
    KRAIT_RS("f16");
  } else {
    KRAIT_RS("bf16");
  }
#undef KRAIT_RS
}
#undef KRAIT_WGMMA_64
#undef KRAIT_C32
#undef KRAIT_C4
#endif

}  // namespace detail

/// kWide: wgmma where there is such a thing.
template <typename T, bool kWide>
struct TeamProducts {
  static constexpr bool kWgmma = KRAIT_WGMMA && kWide;

  static __device__ __forceinline__ void start() {
#if KRAIT_WGMMA
    if constexpr (kWgmma) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
  }
  static __device__ __forceinline__ void end() {
#if KRAIT_WGMMA
    if constexpr (kWgmma) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
  }
  /// Waits until no more than `n` of the latest groups are under way.
  template <int n>
  static __device__ __forceinline__ void await() {
#if KRAIT_WGMMA
    if constexpr (kWgmma) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
#endif
  }

  /// c = A B^T, of whose 64 columns this warp needs the first 16 * n_block; the rest may be
  /// anything. A and B are tiles [64, kDepth].
  template <int kDepth>
  static __device__ __forceinline__ void by_rows(float (&c)[8][4], uint32_t A, uint32_t B,
                                                 [[maybe_unused]] int n_block) {
    constexpr uint32_t kPanel = Tile<T, 64, kDepth>::kPanelBytes;
#if KRAIT_WGMMA
    if constexpr (kWgmma) {
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const uint32_t at = (k / 4 * kPanel + k % 4 * 32) / 16;
        if (k == 0) {
          detail::wgmma<T, false>(c, detail::descriptor(A), detail::descriptor(B));
        } else {
          detail::wgmma<T, true>(c, detail::descriptor(A) + at, detail::descriptor(B) + at);
        }
      }
      return;
    }
#endif
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16;
    const uint32_t a_at = A + piece_offset(row + lane % 16, lane / 16);
    const uint32_t b_at = B + piece_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] = 0.0F;
    }
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[4];
      load_matrices(a, &shared_at<T>((a_at ^ k % 4 * 32) + k / 4 * kPanel));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= n_block) break;
        uint32_t b[4];
        load_matrices(b, &shared_at<T>((b_at ^ k % 4 * 32) + k / 4 * kPanel + j * 2048));
        multiply_add<T>(c[2 * j], a, b[0], b[1]);
        multiply_add<T>(c[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  /// c += A B, A [64, 64] as fragments of 16 columns, of which only the first n_block are not zero;
  /// B a tile [64, kWidth].
  template <int kWidth>
  static __device__ __forceinline__ void by_columns(float (&c)[kWidth / 8][4],
                                                    const uint32_t (&a)[4][4], uint32_t B,
                                                    [[maybe_unused]] int n_block) {
    constexpr uint32_t kPanel = Tile<T, 64, kWidth>::kPanelBytes;
#if KRAIT_WGMMA
    if constexpr (kWgmma) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int half = 0; half < kWidth / 64; ++half) {
          detail::wgmma<T>(&c[8 * half], a[k],
                           detail::descriptor(B) + (half * kPanel + k * 2048) / 16);
        }
      }
      return;
    }
#endif
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t b_at = B + piece_offset(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= n_block) break;
#pragma unroll
      for (int j = 0; j < kWidth / 16; ++j) {
        uint32_t b[4];
        load_transposed(b, &shared_at<T>((b_at ^ j % 4 * 32) + j / 4 * kPanel + k * 2048));
        multiply_add<T>(c[2 * j], a[k], b[0], b[1]);
        multiply_add<T>(c[2 * j + 1], a[k], b[2], b[3]);
      }
    }
  }
};

}  // namespace krait::cuda
