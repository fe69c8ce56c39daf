// plain_log_prob.cpp - log-probabilities of given tokens.
//
//   logprob[i] = logits[i, target[i]] - log(sum_v exp(logits[i, v]))
//
// The sum is a double: a vocabulary of 65,000 terms loses digits in float.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/plain.h"
#include "kernels/cpu/verb_checks.h"

namespace krait {

void PlainOps::log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits,
                        int64_t vocab, const Tensor& target) {
  cpu::check_log_prob(logprob, best, logits, vocab, target);
  for (int64_t i = 0; i < logits.dim(0); ++i) {
    const float* row = logits.as<float>() + i * logits.row_stride;
    const float* largest = std::max_element(row, row + vocab);
    double sum = 0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v] - *largest));
    const double of_target = row[target.as<int32_t>()[i]] - *largest;
    logprob.as<float>()[i] = static_cast<float>(of_target - std::log(sum));
    best.as<int32_t>()[i] = static_cast<int32_t>(largest - row);
  }
}

}  // namespace krait
