// log_prob.cu - log-probabilities of given tokens, and the likeliest token of each row.
//
//   logprob[i] = logits[i, target[i]] - log(sum_v exp(logits[i, v]))
//   best[i]    = the first v with the largest logit
//
// Shapes   logits f32 [n, vocab_rows], columns from `vocab` on are padding; logprob f32, target and
//          best i32 [n]
// Launch   one block of 256 threads per row, two passes: the largest, then the sum
// Bytes    4 * vocab per row, the second pass from L2
// Same as  kernels/cpu; tests/ops/log_prob_test.cpp
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Largest {
  float logit;
  int id;
};

__device__ Largest larger(Largest a, Largest b) {
  // Ties, and a row of NaN alone, go to the lower id.
  return b.logit > a.logit || (b.logit == a.logit && b.id < a.id) ? b : a;
}

__global__ void __launch_bounds__(kThreads)
    log_prob_kernel(float* logprob, int32_t* best, const float* logits, int64_t row_stride,
                    int vocab, const int32_t* target) {
  after_previous();
  __shared__ Largest warp_largest[kWarps];
  __shared__ float warp_total[kWarps];
  const int64_t i = blockIdx.x;
  const float* row = logits + i * row_stride;
  const int warp = static_cast<int>(threadIdx.x / 32);

  Largest top{-INFINITY, 0x7fffffff};
  for (int v = static_cast<int>(threadIdx.x); v < vocab; v += kThreads) {
    top = larger(top, {row[v], v});
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    top = larger(
        top, {__shfl_xor_sync(0xffffffffU, top.logit, d), __shfl_xor_sync(0xffffffffU, top.id, d)});
  }
  if (threadIdx.x % 32 == 0) warp_largest[warp] = top;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) top = larger(top, warp_largest[w]);

  float sum = 0.0F;
  for (int v = static_cast<int>(threadIdx.x); v < vocab; v += kThreads) {
    sum += expf(row[v] - top.logit);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warp_total[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0F;
    for (int w = 0; w < kWarps; ++w) sum += warp_total[w];
    logprob[i] = (row[target[i]] - top.logit) - logf(sum);
    best[i] = top.id < vocab ? top.id : 0;
  }
}

}  // namespace

void log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits, int64_t vocab,
              const Tensor& target, cudaStream_t stream) {
  launch("log_prob", log_prob_kernel, static_cast<unsigned>(logits.dim(0)), kThreads, 0, stream,
         logprob.as<float>(), best.as<int32_t>(), logits.as<float>(), logits.row_stride,
         static_cast<int>(vocab), target.as<int32_t>());
}

}  // namespace krait::cuda
