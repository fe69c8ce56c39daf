// The verbs at one shape: what bench_ops measures.
#pragma once

#include "model/config.h"
#include "tools/bench_ops/harness.h"

namespace krait {

/// Measures every verb that a step of the model uses, with `n_tok` rows: one sequence of that
/// length if it is over 1024 (a prompt), else a token of each of n_tok sequences (a decode step).
void bench_verbs(Harness& h, const std::string& name, const ModelConfig& config, int64_t n_tok);

}  // namespace krait
