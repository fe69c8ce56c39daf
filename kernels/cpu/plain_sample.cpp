// plain_sample.cpp - the definition of sampling. The arithmetic that decides is in
// kernels/sampling.h, so that other backends can reach the same decisions bit for bit.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/plain.h"
#include "kernels/cpu/verb_checks.h"
#include "kernels/sampling.h"

namespace krait {

namespace {

using sampling::weight;

/// The tokens still in play, most likely first (ties: lower token first).
struct Candidates {
  std::span<const float> logits;
  std::vector<uint64_t> keys;  ///< sampling::descending_key

  [[nodiscard]] int64_t size() const { return std::ssize(keys); }
  [[nodiscard]] int32_t token(int64_t i) const {
    return sampling::token_of_key(keys[static_cast<size_t>(i)]);
  }
  [[nodiscard]] float logit(int64_t i) const { return logits[static_cast<size_t>(token(i))]; }
  /// max - logit_i; the weight is exp(-nats_i).
  [[nodiscard]] float nats(int64_t i) const { return logit(0) - logit(i); }
  [[nodiscard]] uint64_t mass() const {
    uint64_t total = 0;
    for (int64_t i = 0; i < size(); ++i) total += weight(nats(i));
    return total;
  }
  void keep(int64_t n) { keys.resize(static_cast<size_t>(n)); }
};

void keep_top_p(Candidates& c, float top_p) {
  const uint64_t enough = sampling::kept_from(top_p, c.mass());
  uint64_t sum = 0;
  for (int64_t i = 0; i < c.size(); ++i) {
    sum += weight(c.nats(i));
    if (sum >= enough) return c.keep(i + 1);
  }
}

void keep_min_p(Candidates& c, float min_p) {
  const uint64_t least = sampling::min_weight(min_p);
  int64_t n = 1;
  while (n < c.size() && weight(c.nats(n)) >= least) ++n;
  c.keep(n);
}

}  // namespace

void PlainOps::sort_keys(std::span<uint64_t> keys) const { std::sort(keys.begin(), keys.end()); }

int32_t PlainOps::choose(std::span<float> logits, const SampleParams& params,
                         int64_t position) const {
  Candidates c{.logits = logits, .keys = {}};
  const auto vocab = std::ssize(logits);
  c.keys.reserve(logits.size());
  for (int64_t i = 0; i < vocab; ++i) {
    c.keys.push_back(
        sampling::descending_key(logits[static_cast<size_t>(i)], static_cast<int32_t>(i)));
  }
  const int32_t best = sampling::token_of_key(*std::min_element(c.keys.begin(), c.keys.end()));
  // Greedy; or every token is forbidden, which leaves the lowest.
  if (!(params.temperature > 0.0F)) return best;
  if (logits[static_cast<size_t>(best)] == -std::numeric_limits<float>::infinity()) return best;

  sort_keys(c.keys);
  if (params.top_k > 0 && params.top_k < vocab) c.keep(params.top_k);

  if (params.typical_p < 1.0F) {
    uint64_t terms = 0;
    for (int64_t i = 0; i < c.size(); ++i) {
      terms += sampling::typical_term(weight(c.nats(i)), c.nats(i));
    }
    const uint64_t total = c.mass();
    std::vector<uint64_t> typical;
    for (int64_t i = 0; i < c.size(); ++i) {
      typical.push_back(
          sampling::ascending_key(sampling::typical_distance(c.nats(i), terms, total), c.token(i)));
    }
    sort_keys(typical);
    const uint64_t enough = sampling::kept_above(params.typical_p, total);
    const float max = c.logit(0);
    uint64_t sum = 0;
    c.keys.clear();
    for (const uint64_t key : typical) {
      const int32_t token = sampling::token_of_key(key);
      const float logit = logits[static_cast<size_t>(token)];
      c.keys.push_back(sampling::descending_key(logit, token));
      sum += weight(max - logit);
      if (sum > enough) break;
    }
    sort_keys(c.keys);
  }

  if (params.top_p < 1.0F) keep_top_p(c, params.top_p);
  if (params.min_p > 0.0F) keep_min_p(c, params.min_p);

  // The draw walks the tokens by id, so that a backend need not have them sorted by probability.
  std::vector<uint64_t> weights(logits.size(), 0);
  uint64_t total = 0;
  for (int64_t i = 0; i < c.size(); ++i) {
    const uint64_t w = weight(c.nats(i) / params.temperature);
    weights[static_cast<size_t>(c.token(i))] = w;
    total += w;
  }
  const uint64_t threshold =
      sampling::draw_threshold(sampling::uniform24(params.seed, params.sequence, position), total);
  uint64_t sum = 0;
  int32_t token = 0;
  while ((sum += weights[static_cast<size_t>(token)]) <= threshold) ++token;
  return token;
}

void PlainOps::sample(const Tensor& logits, int64_t vocab, const SampleState& state,
                      const Tensor& slot, int64_t n_seq) {
  cpu::check_sample(logits, vocab, state, slot, n_seq);
  std::vector<int32_t> tokens(static_cast<size_t>(n_seq), -1);  // -1 for a padding row
  for (int64_t s = 0; s < n_seq; ++s) {
    const int32_t at = slot.as<int32_t>()[s];
    if (state.row_id) state.row_id.as<int32_t>()[s] = 0;
    if (state.row_position) ++state.row_position.as<int64_t>()[s];
    if (at < 0) continue;
    SampleParams params;
    std::memcpy(&params, state.params.rows(at, 1).data, sizeof(params));
    const std::span<float> row(logits.as<float>() + s * logits.row_stride,
                               static_cast<size_t>(vocab));
    for (float& v : row) v = sampling::clean(v);

    if (state.bias_id) {
      const auto* id = state.bias_id.rows(at, 1).as<int32_t>();
      const auto* value = state.bias_value.rows(at, 1).as<float>();
      for (int64_t i = 0; i < state.bias_id.dim(1); ++i) {
        if (id[i] < 0 || id[i] >= vocab) continue;
        float& v = row[static_cast<size_t>(id[i])];
        v = sampling::clean(v + value[i]);
      }
    }
    int32_t* counts = state.counts ? state.counts.rows(at, 1).as<int32_t>() : nullptr;
    if (counts != nullptr) {
      for (int64_t i = 0; i < vocab; ++i) {
        if (counts[i] <= 0) continue;
        float& v = row[static_cast<size_t>(i)];
        v = sampling::penalised(v, counts[i], params.repeat_penalty, params.presence_penalty,
                                params.frequency_penalty);
      }
    }

    int64_t& position = state.position.as<int64_t>()[at];
    const int32_t token = choose(row, params, position);
    ++position;
    state.next_id.as<int32_t>()[at] = token;
    tokens[static_cast<size_t>(s)] = token;
    if (state.row_id) state.row_id.as<int32_t>()[s] = token;

    if (counts != nullptr) {
      auto* ring = state.seen.rows(at, 1).as<int32_t>();
      const int64_t length = state.seen.dim(1);
      const int64_t window = sampling::window_length(params.repeat_last_n, length);
      int64_t& seen = state.seen_len.as<int64_t>()[at];
      if (window > 0) {
        // The token that leaves is read first: where the window is the ring, it lies at `seen`.
        if (seen >= window) --counts[ring[(seen - window) % length]];
        ++counts[token];
      }
      if (length > 0) ring[seen % length] = token;
      ++seen;
    }
  }
  post(std::move(tokens));
}

}  // namespace krait
