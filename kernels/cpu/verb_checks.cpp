#include "kernels/cpu/verb_checks.h"

#include <fmt/ranges.h>

#include <numeric>

namespace krait::cpu {

namespace {

constexpr auto kF32 = {DType::f32};
constexpr auto kI32 = {DType::i32};
constexpr auto kFloats = {DType::f32, DType::bf16, DType::f16};

int64_t dim(const Tensor& t, int i) { return i < t.shape.rank() ? t.dim(i) : -1; }

void check_batch(std::string_view verb, const Batch& b) {
  check_tensor(verb, "seq_start", b.seq_start, {b.n_seq + 1}, kI32);
  check_tensor(verb, "slot", b.slot, {b.n_seq}, kI32);
}

}  // namespace

void check_embed(const Tensor& residual, const Tensor& ids, const Tensor& table) {
  const int64_t n = dim(residual, 0);
  const int64_t d = dim(residual, 1);
  check_dense("embed", "residual", residual, {n, d}, kF32);
  check_tensor("embed", "ids", ids, {n}, kI32);
  check_dense("embed", "table", table, {dim(table, 0), d}, kFloats);
}

void check_gather_rows(const Tensor& out, const Tensor& src, const Tensor& index) {
  const int64_t n = dim(out, 0);
  const int64_t width = dim(out, 1);
  check_dense("gather_rows", "out", out, {n, width}, {src.dtype});
  check_shape("gather_rows", "src", src, {dim(src, 0), width});
  check_tensor("gather_rows", "index", index, {n}, kI32);
}

void check_rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight) {
  const int64_t n = dim(x, 0);
  const int64_t d = dim(x, 1);
  check_dense("rms_norm", "x", x, {n, d}, kF32);
  check_dense("rms_norm", "out", out, {n, d}, kF32);
  check_tensor("rms_norm", "weight", weight, {d}, kF32);
}

void check_rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths) {
  check_tensor("rms_norm_parts", "x", x, {dim(x, 0), dim(x, 1)}, kF32);
  if (std::accumulate(widths.begin(), widths.end(), int64_t{0}) > x.dim(1)) {
    wrong_tensor("rms_norm_parts", "x", fmt::format("{} or more columns", fmt::join(widths, " + ")),
                 x);
  }
}

void check_linear(std::string_view verb, const Tensor& out, const Tensor& in, const Tensor& W,
                  const Tensor& bias) {
  const int64_t n = dim(in, 0);
  const int64_t n_in = dim(in, 1);
  const int64_t n_out = dim(out, 1);
  check_tensor(verb, "in", in, {n, n_in}, kF32);
  check_tensor(verb, "out", out, {n, n_out}, kF32);
  check_dense(verb, "W", W, {n_out, n_in}, kFloats);
  if (bias) check_tensor(verb, "bias", bias, {n_out}, kF32);
}

void check_conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
                       const Tensor& conv_state, const Batch& batch) {
  constexpr std::string_view kVerb = "conv1d_silu";
  const int64_t d_inner = dim(weight, 0);
  const int64_t d_conv = dim(weight, 1);
  check_dense(kVerb, "out", out, {batch.n_tok, d_inner}, kF32);
  check_tensor(kVerb, "u", u, {batch.n_tok, d_inner}, kF32);
  check_dense(kVerb, "weight", weight, {d_inner, d_conv}, kF32);
  if (bias) check_tensor(kVerb, "bias", bias, {d_inner}, kF32);
  check_dense(kVerb, "conv_state", conv_state, {dim(conv_state, 0), d_conv - 1, d_inner}, kF32);
  check_batch(kVerb, batch);
  check_tensor(kVerb, "position", batch.position, {batch.n_seq}, {DType::i64});
}

void check_selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                          const Batch& batch) {
  constexpr std::string_view kVerb = "selective_scan";
  const int64_t n_tok = batch.n_tok;
  const int64_t d_inner = dim(in.A, 0);
  const int64_t d_state = dim(in.A, 1);
  check_dense(kVerb, "y", y, {n_tok, d_inner}, kF32);
  check_dense(kVerb, "x", in.x, {n_tok, d_inner}, kF32);
  check_dense(kVerb, "dt", in.dt, {n_tok, d_inner}, kF32);
  check_dense(kVerb, "A", in.A, {d_inner, d_state}, kF32);
  check_tensor(kVerb, "B", in.B, {n_tok, d_state}, kF32);
  check_tensor(kVerb, "C", in.C, {n_tok, d_state}, kF32);
  check_tensor(kVerb, "D", in.D, {d_inner}, kF32);
  check_tensor(kVerb, "z", in.z, {n_tok, d_inner}, kF32);
  check_tensor(kVerb, "dt_bias", in.dt_bias, {d_inner}, kF32);
  check_dense(kVerb, "ssm_state", ssm_state, {dim(ssm_state, 0), d_inner, d_state}, kFloats);
  check_batch(kVerb, batch);
}

void check_ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                    const Batch& batch) {
  constexpr std::string_view kVerb = "ssd_scan";
  const int64_t n_tok = batch.n_tok;
  const int64_t n_head = dim(in.A, 0);
  const int64_t head_dim = dim(ssm_state, 2);
  const int64_t d_state = dim(ssm_state, 3);
  check_dense(kVerb, "y", y, {n_tok, n_head * head_dim}, kF32);
  check_tensor(kVerb, "x", in.x, {n_tok, n_head * head_dim}, kF32);
  check_tensor(kVerb, "dt", in.dt, {n_tok, n_head}, kF32);
  check_tensor(kVerb, "A", in.A, {n_head}, kF32);
  check_tensor(kVerb, "B", in.B, {n_tok, in.n_group * d_state}, kF32);
  check_tensor(kVerb, "C", in.C, {n_tok, in.n_group * d_state}, kF32);
  check_tensor(kVerb, "D", in.D, {n_head}, kF32);
  check_tensor(kVerb, "dt_bias", in.dt_bias, {n_head}, kF32);
  check_dense(kVerb, "ssm_state", ssm_state, {dim(ssm_state, 0), n_head, head_dim, d_state},
              kFloats);
  if (in.n_group < 1 || n_head % in.n_group != 0) {
    wrong_tensor(kVerb, "A", fmt::format("a multiple of {} heads", in.n_group), in.A);
  }
  check_batch(kVerb, batch);
}

void check_gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                          int64_t n_group) {
  constexpr std::string_view kVerb = "gated_rms_norm";
  const int64_t n = dim(y, 0);
  const int64_t d = dim(y, 1);
  check_dense(kVerb, "y", y, {n, d}, kF32);
  check_dense(kVerb, "out", out, {n, d}, kF32);
  check_tensor(kVerb, "z", z, {n, d}, kF32);
  check_tensor(kVerb, "weight", weight, {d}, kF32);
  if (n_group < 1 || d % n_group != 0) {
    wrong_tensor(kVerb, "y", fmt::format("rows of {} equal slices", n_group), y);
  }
}

void check_sample(const Tensor& logits, int64_t vocab, const SampleState& state, const Tensor& slot,
                  int64_t n_seq) {
  constexpr std::string_view kVerb = "sample";
  check_tensor(kVerb, "logits", logits, {n_seq, dim(logits, 1)}, kF32);
  if (vocab < 1 || vocab > logits.dim(1)) {
    wrong_tensor(kVerb, "logits", fmt::format("{} or more columns", vocab), logits);
  }
  const int64_t n_slot = dim(state.params, 0);
  check_tensor(kVerb, "slot", slot, {n_seq}, kI32);
  check_dense(kVerb, "params", state.params, {n_slot, int64_t{sizeof(SampleParams)}}, {DType::u8});
  check_tensor(kVerb, "position", state.position, {n_slot}, {DType::i64});
  check_tensor(kVerb, "next_id", state.next_id, {n_slot}, kI32);
  if (state.row_id) check_tensor(kVerb, "row_id", state.row_id, {n_seq}, kI32);
  if (state.row_position) {
    check_tensor(kVerb, "row_position", state.row_position, {n_seq}, {DType::i64});
  }
  if (state.counts) {
    check_dense(kVerb, "counts", state.counts, {n_slot, vocab}, kI32);
    check_dense(kVerb, "seen", state.seen, {n_slot, dim(state.seen, 1)}, kI32);
    check_tensor(kVerb, "seen_len", state.seen_len, {n_slot}, {DType::i64});
  }
  if (state.bias_id) {
    check_dense(kVerb, "bias_id", state.bias_id, {n_slot, dim(state.bias_id, 1)}, kI32);
    check_dense(kVerb, "bias_value", state.bias_value, {n_slot, dim(state.bias_id, 1)}, kF32);
  }
}

void check_log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits, int64_t vocab,
                    const Tensor& target) {
  constexpr std::string_view kVerb = "log_prob";
  const int64_t n = dim(logits, 0);
  check_tensor(kVerb, "logits", logits, {n, dim(logits, 1)}, kF32);
  if (vocab < 1 || vocab > logits.dim(1)) {
    wrong_tensor(kVerb, "logits", fmt::format("{} or more columns", vocab), logits);
  }
  check_tensor(kVerb, "logprob", logprob, {n}, kF32);
  check_tensor(kVerb, "best", best, {n}, kI32);
  check_tensor(kVerb, "target", target, {n}, kI32);
}

}  // namespace krait::cpu
