#include "kernels/cpu/fast.h"

#include <hwy/contrib/sort/vqsort.h>

#include "kernels/cpu/verb_checks.h"

namespace krait {

FastOps::FastOps(int n_threads) : PlainOps(n_threads) { vectors_ = cpu::vector_target(); }

void FastOps::embed(const Tensor& residual, const Tensor& ids, const Tensor& table) {
  cpu::check_embed(residual, ids, table);
  const int64_t rows_per_range = 1 + (1 << 14) / std::max<int64_t>(residual.dim(1), 1);
  pool_.parallel_for(residual.dim(0), rows_per_range, [&](int64_t begin, int64_t end) {
    Tensor some = ids.rows(begin, end - begin);
    PlainOps::embed(residual.rows(begin, end - begin), some, table);
  });
}

void FastOps::rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps) {
  cpu::check_rms_norm(out, x, weight);
  cpu::rms_norm(pool_, out, x, weight, eps);
}

void FastOps::rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps) {
  cpu::check_rms_norm_parts(x, widths);
  cpu::rms_norm_parts(pool_, x, widths, eps);
}

void FastOps::linear(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias) {
  cpu::check_linear("linear", out, in, W, bias);
  cpu::linear(pool_, out, in, W, bias, false);
}

void FastOps::linear_add(const Tensor& acc, const Tensor& in, const Tensor& W, const Tensor& bias) {
  cpu::check_linear("linear_add", acc, in, W, bias);
  cpu::linear(pool_, acc, in, W, bias, true);
}

void FastOps::conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight,
                          const Tensor& bias, const Tensor& conv_state, const Batch& batch) {
  cpu::check_conv1d_silu(out, u, weight, bias, conv_state, batch);
  cpu::conv1d_silu(pool_, out, u, weight, bias, conv_state, batch);
}

void FastOps::selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                             const Batch& batch) {
  cpu::check_selective_scan(y, in, ssm_state, batch);
  cpu::selective_scan(pool_, y, in, ssm_state, batch);
}

void FastOps::log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits,
                       int64_t vocab, const Tensor& target) {
  cpu::check_log_prob(logprob, best, logits, vocab, target);
  pool_.parallel_for(logits.dim(0), 1, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    PlainOps::log_prob(logprob.rows(begin, n), best.rows(begin, n), logits.rows(begin, n), vocab,
                       target.rows(begin, n));
  });
}

void FastOps::ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                       const Batch& batch) {
  cpu::check_ssd_scan(y, in, ssm_state, batch);
  cpu::ssd_scan(pool_, y, in, ssm_state, batch);
}

void FastOps::gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z,
                             const Tensor& weight, int64_t n_group, float eps) {
  cpu::check_gated_rms_norm(out, y, z, weight, n_group);
  cpu::gated_rms_norm(pool_, out, y, z, weight, n_group, eps);
}

void FastOps::sort_keys(std::span<uint64_t> keys) const {
  const hwy::Sorter sort;
  sort(keys.data(), keys.size(), hwy::SortAscending());
}

std::unique_ptr<Ops> make_cpu_ops(int n_threads, bool fast) {
  if (!fast) return std::make_unique<PlainOps>();
  return std::make_unique<FastOps>(n_threads);
}

}  // namespace krait
