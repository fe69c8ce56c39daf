// What every kernel file shares: checked calls, the one way to launch, conversions, and reductions
// by scope.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "base/dtype.h"
#include "base/tensor.h"
#include "kernels/cuda/check.h"
#include "kernels/state_rounding.h"

namespace krait::cuda {

/// Throws an Error of kind device that names the call, the reason and the place; clears the last
/// error.
void check(cudaError_t status, const char* call, const char* file, int line);
#define KRAIT_CUDA(call) ::krait::cuda::check((call), #call, __FILE__, __LINE__)

/// As launch below, with clusters of so many neighbouring blocks.
template <typename... Params, typename... Args>
void launch_clusters(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                     int cluster, size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchAttribute attributes[2] = {};
  unsigned n = 0;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[n].val.clusterDim.y = attributes[n].val.clusterDim.z = 1;
    ++n;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = n;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name, __FILE__,
        __LINE__);
}

/// The one way to launch: a failed launch is an Error that names the kernel. Launching nothing is
/// fine.
///
/// From Hopper on a kernel may start while the one before it still runs (programmatic dependent
/// launch), which hides its launch and its first weight loads. So every kernel begins with
/// after_previous(), and before it touches nothing but what no kernel writes: weights, which
/// sequences there are, and in a captured step the states (CudaOps::early).
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  launch_clusters(name, kernel, grid, block, 1, shared_bytes, stream, std::forward<Args>(args)...);
}

/// Waits until the kernels before this one are done and their writes are visible; lets the next
/// kernel begin to start.
__device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

/// Calls f(T{}) with T = float, __half or __nv_bfloat16.
template <typename F>
decltype(auto) visit_type(DType t, const char* what, F&& f) {
  switch (t) {
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(__half{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    default:
      break;
  }
  throw_not_float(t, what);
}

[[nodiscard]] constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[nodiscard]] inline bool aligned16(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (t.shape.rank() < 2 || t.dim(0) == 1 ||
          t.row_stride * static_cast<int64_t>(itemsize(t.dtype)) % 16 == 0);
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

/// v on its way to element `element` of a state of type S, rounded stochastically: exact in S.
template <typename S>
__device__ __forceinline__ float stochastic(float v, uint32_t element) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) return stochastic_bf16(v, element);
  if constexpr (std::is_same_v<S, __half>) return stochastic_f16(v, element);
  return v;
}

/// Where `p`, which points into shared memory, lies in it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// 16 bytes of T, loaded or stored by one instruction.
template <typename T>
struct alignas(16) Vec16 {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

/// Four neighbours of T, 8 or 16 bytes, loaded or stored by one instruction.
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};

/// Weights are read once per step: keep them out of L1, so that the activations stay there.
template <typename T>
__device__ __forceinline__ Vec16<T> load_streaming(const T* p) {
  union {
    uint4 raw;
    Vec16<T> vec;
  } u;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(u.raw.x), "=r"(u.raw.y), "=r"(u.raw.z), "=r"(u.raw.w)
      : "l"(p));
  return u.vec;
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffU, v, d);
  return v;
}

/// The sum of `v` over the block (whole warps, up to 1024 threads), in every thread. Once per
/// kernel: a second sum could overwrite the first before all have read it.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float partial[32];
  const int warps = static_cast<int>(blockDim.x / 32);
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  return warp_sum(lane < warps ? partial[lane] : 0.0F);
}

/// exp(v) = 2^(v * kLog2e)
constexpr float kLog2e = 1.4426950408889634F;

/// 2^v by the special-function unit: relative error 2^-22, results below 2^-126 become 0.
__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ float silu(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0F + exp2_fast(-kLog2e * v)));
  return v * r;
}

/// log(1 + exp(v)) without branches: max(v, 0) + log1p(exp(-|v|)), with log1p(e) / e as a
/// polynomial on 0 .. 1, minimax in relative error: with f32 rounding 1.7e-7.
__device__ __forceinline__ float softplus(float v) {
  const float e = exp2_fast(-kLog2e * fabsf(v));
  float p = 5.23269475e-3F;
  p = fmaf(p, e, -2.95052408e-2F);
  p = fmaf(p, e, 7.82259554e-2F);
  p = fmaf(p, e, -1.36632461e-1F);
  p = fmaf(p, e, 1.91060069e-1F);
  p = fmaf(p, e, -2.48429823e-1F);
  p = fmaf(p, e, 3.33190968e-1F);
  p = fmaf(p, e, -4.99994931e-1F);
  p = fmaf(p, e, 9.99999970e-1F);
  return fmaf(e, p, fmaxf(v, 0.0F));
}

}  // namespace krait::cuda
