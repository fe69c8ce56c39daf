// The host launchers of the kernels, one file each. Shapes and equations: kernels/ops.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops.h"

namespace krait::cuda {

void embed(const Tensor& residual, const Tensor& ids, const Tensor& table, cudaStream_t stream);
void gather_rows(const Tensor& out, const Tensor& src, const Tensor& index, cudaStream_t stream);
/// dst = src with another element type; both dense, n elements. f64 is read, not written.
void convert(void* dst, DType dst_type, const void* src, DType src_type, int64_t n,
             cudaStream_t stream);
void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps,
              cudaStream_t stream);
void rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps,
                    cudaStream_t stream);

/// out (+)= in * W^T + bias for any number of rows, the weights streamed once for each 4 rows.
void gemv(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias, bool accumulate,
          cudaStream_t stream);
/// The same on Hopper's tensor cores, made for the rows of a decode step; false, and nothing done,
/// where it is not built for the device, the types, the alignment or so many rows. It takes no more
/// than most_blocks multiprocessors, or as few as it can.
[[nodiscard]] bool skinny_gemm(const Tensor& out, const Tensor& in, const Tensor& W,
                               const Tensor& bias, bool accumulate, int most_blocks,
                               cudaStream_t stream);
/// *count += the words of 4 bytes in which a and b differ; a rest of `bytes` is not looked at.
void count_differences(uint32_t* count, const void* a, const void* b, size_t bytes,
                       cudaStream_t stream);
/// out += bias, row by row.
void add_bias(const Tensor& out, const Tensor& bias, cudaStream_t stream);

/// `early`, also below: where there is one token per sequence, the state may be read before the
/// kernels before this one are done, since none of them writes it.
void conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
                 const Tensor& conv_state, const Batch& batch, bool early, cudaStream_t stream);
/// Any lengths: parallel over channels and, inside a tile, over time.
void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream);
/// One token per sequence: the recurrent step.
void selective_state_update(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                            const Batch& batch, bool early, cudaStream_t stream);

// mamba2_*.cu
/// Any lengths, by chunks on tensor cores; false, and nothing done, where the types or sizes are
/// not built. `scratch` has ssd_scratch_bytes().
[[nodiscard]] bool ssd_scan_chunks(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                                   const Batch& batch, void* scratch, cudaStream_t stream);
[[nodiscard]] size_t ssd_scratch_bytes();
/// Any lengths and sizes, token after token in f32.
void ssd_scan_steps(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream);
/// One token per sequence.
void ssd_state_update(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                      const Batch& batch, cudaStream_t stream);
/// ssd_mixer for one token of a few sequences; false, and nothing done, where that is not built.
[[nodiscard]] bool ssd_mixer_step(const Tensor& y, const SsdMixer& in, const Tensor& conv_state,
                                  const Tensor& ssm_state, const Batch& batch, cudaStream_t stream);
void gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                    int64_t n_group, float eps, cudaStream_t stream);

/// Tokens on their way to the host. `ring` is pinned host memory that the device writes: kPosts x
/// kMaxRows words, each the number of the post, from 1 on, above the token. So each word says by
/// itself that it is there, and the device need not wait until others are.
struct Mailbox {
  static constexpr int kPosts = 8;
  static constexpr int kMaxRows = 8192;
  static constexpr int kParts = 64;  // of a row, that blocks of the sampler share
  volatile uint64_t* ring = nullptr;
  uint64_t* posts = nullptr;      // device: so far
  uint64_t* part_best = nullptr;  // device, kMaxRows x kParts: scratch
};
void sample(const Tensor& logits, int64_t vocab, const SampleState& state, const Tensor& slot,
            int64_t n_seq, const Mailbox& mailbox, cudaStream_t stream);

void log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits, int64_t vocab,
              const Tensor& target, cudaStream_t stream);

// ceilings.cu
void stream_copy(void* dst, const void* src, size_t bytes, cudaStream_t stream);
void stream_read(void* sum, const void* src, size_t bytes, cudaStream_t stream);

/// Ops::start_core_clock() and mean_core_clock(), behind what is on `stream`.
void start_core_clock(cudaStream_t stream);
double mean_core_clock(cudaStream_t stream);

}  // namespace krait::cuda
