// ceilings.cu - what the memory can do: a copy and a read as fast as the device has them.
//
//   stream_copy   dst = src
//   stream_read   sum = exclusive or of the u32 words of src
//
// Launch   blocks of 512 threads, each block on 32 KB in a row: every thread has four loads of
//          16 bytes in flight, neighbours side by side, and no loop to wait in
// Bytes    copy: 2 * bytes; read: bytes. Loads stay out of L1, stores are marked to leave L2 first
// Same as  CpuOps::stream_copy, CpuOps::stream_read; tests/ops/memory_test.cpp
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kInFlight = 4;
constexpr int64_t kBlockVectors = kThreads * kInFlight;

__device__ __forceinline__ uint4 load_vector(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/// The vectors of this thread, n in all: index of the first; the others follow kThreads apart.
__device__ __forceinline__ int64_t first_vector() {
  return static_cast<int64_t>(blockIdx.x) * kBlockVectors + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(uint4* __restrict__ dst, const uint4* __restrict__ src, int64_t n) {
  after_previous();
  const int64_t first = first_vector();
  uint4 v[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i * kThreads < n) v[i] = load_vector(src + first + i * kThreads);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i * kThreads < n) __stcs(dst + first + i * kThreads, v[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    read_kernel(uint32_t* __restrict__ sum, const uint4* __restrict__ src, int64_t n) {
  after_previous();
  const int64_t first = first_vector();
  uint4 v[kInFlight] = {};
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i * kThreads < n) v[i] = load_vector(src + first + i * kThreads);
  }
  uint32_t part = 0;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) part ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) part ^= __shfl_xor_sync(0xffffffffU, part, d);
  __shared__ uint32_t of_warp[kThreads / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) part ^= of_warp[w];
  atomicXor(sum, part);
}

dim3 blocks_for(int64_t n) { return {static_cast<unsigned>(ceil_div(n, kBlockVectors))}; }

}  // namespace

void stream_copy(void* dst, const void* src, size_t bytes, cudaStream_t stream) {
  const auto n = static_cast<int64_t>(bytes / sizeof(uint4));
  launch("stream_copy", copy_kernel, blocks_for(n), dim3(kThreads), 0, stream,
         static_cast<uint4*>(dst), static_cast<const uint4*>(src), n);
}

void stream_read(void* sum, const void* src, size_t bytes, cudaStream_t stream) {
  const auto n = static_cast<int64_t>(bytes / sizeof(uint4));
  KRAIT_CUDA(cudaMemsetAsync(sum, 0, sizeof(uint32_t), stream));
  launch("stream_read", read_kernel, blocks_for(n), dim3(kThreads), 0, stream,
         static_cast<uint32_t*>(sum), static_cast<const uint4*>(src), n);
}

}  // namespace krait::cuda
