#include "model/cost.h"

#include <algorithm>

#include "model/family.h"

namespace krait {

namespace {

double bytes_of(int64_t n, DType t) {
  return static_cast<double>(n) * static_cast<double>(itemsize(t));
}

/// All weights that a step of `batch` sequences reads.
double weights_read(const ModelConfig& c, const ModelCounts& n, DType weights, int64_t batch) {
  double bytes = bytes_of(n.matrices + n.head, weights) + bytes_of(n.small, DType::f32);
  // A tied embedding is read as the head; of another only the tokens' rows are.
  if (n.embedding > 0) bytes += bytes_of(batch * c.d_model, weights);
  return bytes;
}

double state_bytes(const ModelConfig& c, const WorkTypes& t, int64_t batch) {
  return static_cast<double>(state_bytes_per_sequence(c, t.activation, t.ssm)) *
         static_cast<double>(batch);
}

double scan_flops(const ModelCounts& n, int64_t n_tok) {
  // exp(dt A) h + dt B x and C h: dt A, ex2, dt x B, FMA, FMA, and the reduction's share.
  constexpr double kFlopsPerElement = 9;
  return kFlopsPerElement * static_cast<double>(n.ssm) * static_cast<double>(n_tok);
}

}  // namespace

namespace {

/// Products of Mamba-2's chunked scan (Dao & Gu 2024, section 6) for a token, over all layers, in
/// chunks of Q: the lower half of (C B^T) x, the chunk's state and its reading for each of H heads
/// of P channels, and C B^T for each of G groups.
int64_t ssd_products(const ModelConfig& c) {
  constexpr int64_t Q = 128;
  const int64_t head = c.head_dim * (Q + 4 * c.d_state);
  return c.n_layer * (c.n_head * head + c.n_group * Q * c.d_state);
}

}  // namespace

ModelCounts count_model(const ModelConfig& c) {
  const Family& family = family_named(c.family);
  ModelCounts n;
  for (const TensorRow& t : family.tensors(c)) {
    if (t.init == Init::absent) continue;
    (t.role == Role::matrix ? n.matrices : n.small) += c.n_layer * t.shape.numel();
  }
  n.small += c.d_model;  // the final norm
  n.head = c.vocab_rows * c.d_model;
  n.embedding = c.tie_embeddings ? 0 : n.head;
  for (const TensorSpec& s : family.layer_state(c, DType::f32, DType::f32)) {
    if (s.name == "ssm_state") n.ssm += c.n_layer * s.shape.numel();
  }
  if (family.scan_products != nullptr) n.scan_products = family.scan_products(c);
  if (c.n_head > 0) n.scan_products = ssd_products(c);
  return n;
}

Work decode_work(const ModelConfig& c, const WorkTypes& types, int64_t batch) {
  const ModelCounts n = count_model(c);
  Work w;
  w.bytes = weights_read(c, n, types.weights, batch) + 2 * state_bytes(c, types, batch);
  w.products = 2 * static_cast<double>(batch) * static_cast<double>(n.matrices + n.head);
  w.scan = scan_flops(n, batch);
  return w;
}

Work prefill_work(const ModelConfig& c, const WorkTypes& types, int64_t batch, int64_t n_tok) {
  const ModelCounts n = count_model(c);
  const auto sequences = static_cast<double>(batch);
  Work w;
  // The state starts as zeros, which nobody needs to read.
  w.bytes = weights_read(c, n, types.weights, batch * n_tok) + state_bytes(c, types, batch);
  w.products = sequences *
               (static_cast<double>(n_tok) * static_cast<double>(2 * n.matrices + n.scan_products) +
                2 * static_cast<double>(n.head));
  w.scan = n.scan_products > 0 ? 0 : scan_flops(n, batch * n_tok);
  return w;
}

double floor_seconds(const Work& work, double bytes_per_second, double flops_per_second) {
  return std::max(work.bytes / bytes_per_second, work.products / flops_per_second);
}

}  // namespace krait
