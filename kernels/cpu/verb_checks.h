// The shapes and types of each verb's tensors, as kernels/ops.h states them, for the CPU backend
// (activations are f32).
#pragma once

#include "kernels/checks.h"
#include "kernels/ops.h"

namespace krait::cpu {

void check_embed(const Tensor& residual, const Tensor& ids, const Tensor& table);
void check_gather_rows(const Tensor& out, const Tensor& src, const Tensor& index);
void check_rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight);
void check_rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths);
void check_linear(std::string_view verb, const Tensor& out, const Tensor& in, const Tensor& W,
                  const Tensor& bias);
void check_conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
                       const Tensor& conv_state, const Batch& batch);
void check_selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                          const Batch& batch);
void check_ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                    const Batch& batch);
void check_gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                          int64_t n_group);
void check_sample(const Tensor& logits, int64_t vocab, const SampleState& state, const Tensor& slot,
                  int64_t n_seq);
void check_log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits, int64_t vocab,
                    const Tensor& target);

}  // namespace krait::cpu
