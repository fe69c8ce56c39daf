// The definition of the verbs: one thread, plain loops in float32 in the order of the equations.
// Every fast form, here and on the GPU, is tested against it.
#pragma once

#include "kernels/cpu/cpu_ops.h"

namespace krait {

class PlainOps : public CpuOps {
 public:
  explicit PlainOps(int n_threads = 1) : CpuOps(n_threads) {}

  void embed(const Tensor& residual, const Tensor& ids, const Tensor& table) override;
  void gather_rows(const Tensor& out, const Tensor& src, const Tensor& index) override;
  void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps) override;
  void rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps) override;
  void linear(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias) override;
  void linear_add(const Tensor& acc, const Tensor& in, const Tensor& W,
                  const Tensor& bias) override;
  void conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
                   const Tensor& conv_state, const Batch& batch) override;
  void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                      const Batch& batch) override;
  void ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                const Batch& batch) override;
  void gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                      int64_t n_group, float eps) override;
  void sample(const Tensor& logits, int64_t vocab, const SampleState& state, const Tensor& slot,
              int64_t n_seq) override;
  void log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits, int64_t vocab,
                const Tensor& target) override;

 protected:
  /// Sorts keys, none of which is equal to another, in ascending order.
  virtual void sort_keys(std::span<uint64_t> keys) const;

 private:
  [[nodiscard]] int32_t choose(std::span<float> logits, const SampleParams& params,
                               int64_t position) const;
};

}  // namespace krait
