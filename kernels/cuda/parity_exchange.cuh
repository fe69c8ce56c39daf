// How the blocks of a kernel exchange values without barriers or flags: what is exchanged says
// itself whether it is there. A value is a f32 whose last bit is the parity of its use; whoever
// wants it looks until that bit is right.
#pragma once

#include "kernels/cuda/device.cuh"

namespace krait::cuda {

/// A value that everybody waits for: its last bit says which of two uses of the place it is from.
__device__ __forceinline__ void publish(float* to, float v, unsigned parity) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to),
               "r"((__float_as_uint(v) & ~1U) | parity)
               : "memory");
}
__device__ __forceinline__ float value_of(unsigned word) { return __uint_as_float(word & ~1U); }

/// The value at `at`, where it is wanted, as soon as it is published. A whole warp.
__device__ __forceinline__ float await(const float* at, bool wanted, unsigned parity) {
  unsigned word = parity;
  do {
    if (wanted) {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
    }
  } while (__any_sync(0xffffffffU, (word ^ parity) & 1));
  return value_of(word);
}
/// The four from `at` on.
__device__ __forceinline__ float4 await4(const float* at, bool wanted, unsigned parity) {
  uint4 v{parity, parity, parity, parity};
  do {
    if (wanted) {
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(at)
                   : "memory");
    }
  } while (__any_sync(
      0xffffffffU, (((v.x & v.y & v.z & v.w) ^ parity) | ((v.x | v.y | v.z | v.w) ^ parity)) & 1));
  return {value_of(v.x), value_of(v.y), value_of(v.z), value_of(v.w)};
}

/// What is wanted of four places. One statement: else the compiler looks at each word before it
/// asks for the next.
__device__ __forceinline__ void load4(uint4 (&v)[4], const float* at, int64_t stride,
                                      const bool (&wanted)[4]) {
  asm volatile(
      "{\n"
      ".reg .pred p0, p1, p2, p3;\n"
      "setp.ne.u32 p0, %20, 0;\n"
      "setp.ne.u32 p1, %21, 0;\n"
      "setp.ne.u32 p2, %22, 0;\n"
      "setp.ne.u32 p3, %23, 0;\n"
      "@p0 ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%16];\n"
      "@p1 ld.relaxed.gpu.global.v4.u32 {%4, %5, %6, %7}, [%17];\n"
      "@p2 ld.relaxed.gpu.global.v4.u32 {%8, %9, %10, %11}, [%18];\n"
      "@p3 ld.relaxed.gpu.global.v4.u32 {%12, %13, %14, %15}, [%19];\n"
      "}\n"
      : "+r"(v[0].x), "+r"(v[0].y), "+r"(v[0].z), "+r"(v[0].w), "+r"(v[1].x), "+r"(v[1].y),
        "+r"(v[1].z), "+r"(v[1].w), "+r"(v[2].x), "+r"(v[2].y), "+r"(v[2].z), "+r"(v[2].w),
        "+r"(v[3].x), "+r"(v[3].y), "+r"(v[3].z), "+r"(v[3].w)
      : "l"(at), "l"(at + stride), "l"(at + 2 * stride), "l"(at + 3 * stride),
        "r"(static_cast<unsigned>(wanted[0])), "r"(static_cast<unsigned>(wanted[1])),
        "r"(static_cast<unsigned>(wanted[2])), "r"(static_cast<unsigned>(wanted[3]))
      : "memory");
}

}  // namespace krait::cuda
