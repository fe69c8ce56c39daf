// Sums over all blocks of a kernel that stays on every multiprocessor for a whole decode step
// (mamba1_step.cu, mamba1_step_wide.cu): a sum is an integer that says itself whether all shares
// are there, and does not depend on their order.
//
// A share of a sum: 1 in the top byte, the count of shares, and below it the value in units of
// 2^-25 plus a bias that makes it positive. What lies beyond 2^15 or is no number adds so much that
// no sum of values reaches it, nor any number of such shares the count.
#pragma once

#include "kernels/cuda/device.cuh"

namespace krait::cuda {

constexpr int kMostSummands = 180;  // blocks
constexpr int kCountBit = 56;
constexpr unsigned long long kCountOne = 1ULL << kCountBit;
[[maybe_unused]] constexpr float kFixedOne = 33554432.0F;  // 2^25
[[maybe_unused]] constexpr float kFixedRange = 32768.0F;   // 2^15
constexpr unsigned long long kBias = 1ULL << 40;           // kFixedOne * kFixedRange
constexpr unsigned long long kNoNumber = kMostSummands * 2 * kBias + 1;
static_assert(kMostSummands * kNoNumber < kCountOne);

__device__ __forceinline__ unsigned long long share_of(float v) {
  const auto fixed = static_cast<unsigned long long>(__float2ll_rn(v * kFixedOne)) + kBias;
  return kCountOne + (fabsf(v) < kFixedRange ? fixed : kNoNumber);
}
/// Of a sum to which every block has added one share; `word` may be a difference of two such.
__device__ __forceinline__ float total_of(unsigned long long word) {
  const unsigned long long sum = word & (kCountOne - 1);
  const auto value = static_cast<long long>(sum - gridDim.x * kBias);
  return sum >= kNoNumber ? __int_as_float(0x7fc00000)
                          : static_cast<float>(value) * (1.0F / kFixedOne);
}
__device__ __forceinline__ bool complete(unsigned long long word) {
  return static_cast<unsigned>(word >> kCountBit) == gridDim.x;
}
__device__ __forceinline__ void add_share(unsigned long long* to, float v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(share_of(v)) : "memory");
}

}  // namespace krait::cuda
