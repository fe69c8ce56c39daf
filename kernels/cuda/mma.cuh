// Warp-wide matrix products on 16-bit types (mma.sync m16n8k16, f32 accumulation), and how their
// operands come from shared memory: ldmatrix.
//
// In a warp, g = lane / 4 and q = lane % 4. The fragments of one product, two elements a register:
//   A [16, 16]  a[0] (g, 2q..)  a[1] (g + 8, 2q..)  a[2] (g, 2q + 8..)  a[3] (g + 8, 2q + 8..)
//   B [16, 8]   b0 (2q.., g)    b1 (2q + 8.., g)    rows are k
//   C [16, 8]   c[0], c[1] (g, 2q..)   c[2], c[3] (g + 8, 2q..)
// So the C fragments of two neighbouring products are, rounded, the A fragment of the next.
#pragma once

#include "kernels/cuda/device.cuh"

namespace krait::cuda {

/// Place of element e among 16: what a lane needs of a column of B lies together.
__device__ __forceinline__ int permuted(int e) {
  return (e & ~15) + (e & 7) / 2 * 4 + (e & 8) / 4 + (e & 1);
}

/// Four 8 x 8 matrices: lane i gives the address of row i % 8 of matrix i / 8; register m holds
/// elements (g, 2q..) of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared) {
#if __CUDA_ARCH__ >= 800
  const uint32_t from = shared_address(shared);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
#endif
}

/// The same, each matrix transposed: register m holds elements (2q.., g) of what lies there.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void* shared) {
#if __CUDA_ARCH__ >= 800
  const uint32_t from = shared_address(shared);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
#endif
}

/// The opposite of load_matrices: lane i gives the address where row i % 8 of matrix i / 8 goes.
__device__ __forceinline__ void store_matrices(void* shared, const uint32_t (&r)[4]) {
  const uint32_t to = shared_address(shared);
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
    const uint32_t row = __shfl_sync(0xffffffffU, to, 8 * m + lane / 4);
    *static_cast<uint32_t*>(__cvta_shared_to_generic(row + 4 * (lane % 4))) = r[m];
  }
#endif
}

/// c += A * B
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

/// Two neighbours, loaded or stored by one instruction; 16-bit ones share a register, the first in
/// the lower half.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  const Pair<T> pair{{from_float<T>(first), from_float<T>(second)}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/// The two in f32.
template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t bits, float& first, float& second) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of an f32
    first = __uint_as_float(bits << 16);
    second = __uint_as_float(bits & 0xffff0000U);
  } else {
    Pair<T> pair;
    memcpy(&pair, &bits, sizeof bits);
    first = to_float(pair.v[0]);
    second = to_float(pair.v[1]);
  }
}

}  // namespace krait::cuda
