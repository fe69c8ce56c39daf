// What a step must move and compute, by count: the least that any implementation can do, so that a
// measured time has a floor to be compared with. Each weight is read once a step, each state is
// read and written once a step; activations are assumed to stay on the chip.
//
// The counts follow from the family's own tables of tensors and state.
#pragma once

#include <cstdint>

#include "model/model.h"

namespace krait {

/// Elements of a model, summed over its layers.
struct ModelCounts {
  int64_t matrices = 0;   ///< of the projections of all blocks
  int64_t small = 0;      ///< kept in f32: convolutions, biases, A, D, norms
  int64_t head = 0;       ///< vocab_rows * d_model, the embedding when tied
  int64_t embedding = 0;  ///< a table of its own; 0 when tied
  int64_t ssm = 0;        ///< elements of h, for one sequence
  /// Flops of a token in a prompt that are matrix products beside those with weights (the chunked
  /// scan of Mamba-2); 0 where the scan is elementwise.
  int64_t scan_products = 0;

  [[nodiscard]] int64_t parameters() const { return matrices + small + head + embedding; }
};

/// `config` has its vocab_rows. Biases of the projections, which no published model has, are not
/// counted. Error unsupported: a family that is not built.
[[nodiscard]] ModelCounts count_model(const ModelConfig& config);

/// Bytes and flops of some steps.
struct Work {
  double bytes = 0;
  double products = 0;  ///< flops of matrix products
  double scan = 0;      ///< flops of the recurrence, 9 for each element of h and token

  [[nodiscard]] double flops() const { return products + scan; }
  Work& operator+=(const Work& o) {
    bytes += o.bytes;
    products += o.products;
    scan += o.scan;
    return *this;
  }
  friend Work operator*(int64_t n, const Work& w) {
    const auto f = static_cast<double>(n);
    return {f * w.bytes, f * w.products, f * w.scan};
  }
};

/// The types that decide the bytes.
struct WorkTypes {
  DType weights = DType::f32;
  DType activation = DType::f32;  ///< of the convolution's state
  DType ssm = DType::f32;
};

/// One step of `batch` sequences, a token each.
[[nodiscard]] Work decode_work(const ModelConfig& config, const WorkTypes& types, int64_t batch);

/// Prompts of `n_tok` tokens for `batch` sequences, with the logits of each one's last token.
[[nodiscard]] Work prefill_work(const ModelConfig& config, const WorkTypes& types, int64_t batch,
                                int64_t n_tok);

/// Seconds that `work` takes at least: max(bytes / bandwidth, products / product_rate). The
/// recurrence runs on other units than matrix products do, and can hide behind them.
[[nodiscard]] double floor_seconds(const Work& work, double bytes_per_second,
                                   double flops_per_second);

}  // namespace krait
