// The fast CPU form: vectors of the width that the processor has, all threads of the pool. Each
// kernel below is compiled for several instruction sets and picks one when it is first called.
//
// A value never depends on how the work was divided: neither on the number of threads, nor on which
// other tokens share its step.
#pragma once

#include "kernels/cpu/plain.h"

namespace krait {

class FastOps : public PlainOps {
 public:
  explicit FastOps(int n_threads);

  void embed(const Tensor& residual, const Tensor& ids, const Tensor& table) override;
  void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps) override;
  void rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps) override;
  void linear(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias) override;
  void linear_add(const Tensor& acc, const Tensor& in, const Tensor& W,
                  const Tensor& bias) override;
  void conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
                   const Tensor& conv_state, const Batch& batch) override;
  void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                      const Batch& batch) override;
  void log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits, int64_t vocab,
                const Tensor& target) override;
  void ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                const Batch& batch) override;
  void gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                      int64_t n_group, float eps) override;

 protected:
  void sort_keys(std::span<uint64_t> keys) const override;
};

namespace cpu {

/// Name of the instruction set that the kernels run on: "AVX2", "AVX-512", ...
std::string vector_target();

void rms_norm(ThreadPool& pool, const Tensor& out, const Tensor& x, const Tensor& weight,
              float eps);
void rms_norm_parts(ThreadPool& pool, const Tensor& x, const std::array<int64_t, 3>& widths,
                    float eps);
void linear(ThreadPool& pool, const Tensor& out, const Tensor& in, const Tensor& W,
            const Tensor& bias, bool add);
void conv1d_silu(ThreadPool& pool, const Tensor& out, const Tensor& u, const Tensor& weight,
                 const Tensor& bias, const Tensor& conv_state, const Batch& batch);
void selective_scan(ThreadPool& pool, const Tensor& y, const ScanInputs& in,
                    const Tensor& ssm_state, const Batch& batch);
void ssd_scan(ThreadPool& pool, const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
              const Batch& batch);
void gated_rms_norm(ThreadPool& pool, const Tensor& out, const Tensor& y, const Tensor& z,
                    const Tensor& weight, int64_t n_group, float eps);

}  // namespace cpu
}  // namespace krait
