// The parts of sampling that every backend must compute to the last bit, so that a seed gives the
// same tokens everywhere: random numbers, weights, masses, orders and the window of seen tokens.
//
// Masses are integers. A weight is round-down(2^32 * exp(-(max - logit) / temperature)), computed
// in integer arithmetic, so that sums do not depend on their order and a device may add in
// parallel. Orders are those of 64-bit keys (orderkey << 32 | token), ascending: ties always go to
// the lower token. The remaining float operations are single IEEE operations (no a * b + c that a
// compiler could contract).
//
// The filters, each on the tokens that the ones before it left (max: the largest logit left,
// w_i = weight(max - logit_i), Q = sum w_i):
//   bias      logit = clean(clean(logit) + bias), for each bias in the order of the list
//   penalty   logit = penalised(logit, count, ...), where count > 0
//   greedy    temperature <= 0: the first token by descending_key; nothing below applies
//   top-k     the first k by descending_key
//   typical   d_i = |(max - logit_i) - (float)(sum_i typical_term_i / Q)|: the first by
//             ascending_key(d) until the running mass exceeds typical_p (kept_above)
//   top-p     the first by descending_key until the running mass reaches top_p (kept_from)
//   min-p     w_i >= min_weight(min_p)
//   draw      w_i = weight((max - logit_i) / temperature); the first token, by id, whose running
//             sum of w exceeds draw_threshold
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define KRAIT_HD __host__ __device__
#else
#define KRAIT_HD
#endif

namespace krait::sampling {

struct Philox {
  uint32_t word[4];
};

/// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011): 128 random bits for a counter and a key.
KRAIT_HD constexpr Philox philox4x32_10(Philox counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53U} * counter.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57U} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  return counter;
}

/// The uniform random number of one draw, in units of 2^-24.
KRAIT_HD constexpr uint32_t uniform24(uint64_t seed, uint64_t sequence, int64_t position) {
  const auto p = static_cast<uint64_t>(position);
  const Philox r =
      philox4x32_10({{static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32),
                      static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32)}},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return r.word[0] >> 8;
}

/// floor(u * total) for u = u24 / 2^24, without a 128-bit product.
KRAIT_HD constexpr uint64_t draw_threshold(uint32_t u24, uint64_t total) {
  return u24 * (total >> 24) + ((u24 * (total & 0xFFFFFFU)) >> 24);
}

/// A logit that can be compared and subtracted: NaN becomes the lowest finite float (so that it
/// loses to everything but a forbidden token), +inf the largest, -0 becomes 0; -inf (forbidden)
/// stays.
KRAIT_HD constexpr float clean(float logit) {
  constexpr float kLargest = 3.40282347e+38F;
  if (logit != logit) return -kLargest;
  if (logit > kLargest) return kLargest;
  return logit + 0.0F;
}

/// The logit of a token that occurs `count` > 0 times in the window of seen tokens.
KRAIT_HD inline float penalised(float logit, int32_t count, float repeat, float presence,
                                float frequency) {
  logit = logit > 0.0F ? logit / repeat : logit * repeat;
#ifdef __CUDA_ARCH__
  const float frequent = __fmul_rn(static_cast<float>(count), frequency);
#else
  const float frequent = static_cast<float>(count) * frequency;
#endif
  const float minus = frequent + presence;
  return clean(logit - minus);
}

/// 2^32 * exp(-nats), rounded down, for nats >= 0 (inf and NaN give 0); it never grows with nats,
/// and is within 2^-29 of exp, relatively, before the rounding.
KRAIT_HD constexpr uint64_t weight(float nats) {
  if (!(nats < 23.0F)) return 0;  // exp(-23) < 2^-33
  // exp(-nats) = 2^-(n + f) = 2^(1-f) / 2^(n+1). One double product, then integers only.
  const auto exponent =
      static_cast<uint64_t>(static_cast<double>(nats) * 1.4426950408889634 * 4294967296.0);
  const uint64_t n = exponent >> 32;
  const uint64_t f = exponent & 0xFFFFFFFFU;
  if (f == 0) return (uint64_t{1} << 32) >> n;
  // 2^g - 1 by its Taylor series, ln(2)^k / k! for k = 10 .. 1, in units of 2^-32.
  const uint64_t g = (uint64_t{1} << 32) - f;
  constexpr uint64_t kTerm[] = {30,      437,      5676,      65510,      661577,
                                5726720, 41309550, 238388332, 1031764991, 2977044472};
  uint64_t r = 0;
  for (const uint64_t term : kTerm) r = ((r + term) * g) >> 32;
  return ((uint64_t{1} << 32) + r) >> (n + 1);
}

/// Token i's part of the mean surprise: w_i * (max - logit_i), in the units of w.
KRAIT_HD constexpr uint64_t typical_term(uint64_t w, float nats) {
  // w > 0 means nats < 23, so the product stays under 2^61.
  return w == 0 ? 0 : (w * static_cast<uint64_t>(nats * 16777216.0F)) >> 24;
}

/// How far token i's surprise is from the entropy. Both are counted from the surprise of the most
/// likely token, which cancels: -log p_i = (max - logit_i) + log(sum w).
KRAIT_HD inline float typical_distance(float nats, uint64_t sum_of_terms, uint64_t total) {
  const auto mean =
      static_cast<float>(static_cast<double>(sum_of_terms) / static_cast<double>(total));
  return std::fabs(nats - mean);
}

/// Top-p keeps tokens up to and with the first where the running mass is >= this.
KRAIT_HD inline uint64_t kept_from(float top_p, uint64_t total) {
  if (!(top_p > 0.0F)) return 1;
  return static_cast<uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

/// Typical keeps tokens up to and with the first where the running mass is > this.
KRAIT_HD constexpr uint64_t kept_above(float typical_p, uint64_t total) {
  if (!(typical_p > 0.0F)) return 0;
  return static_cast<uint64_t>(static_cast<double>(typical_p) * static_cast<double>(total));
}

/// Min-p keeps weights >= this; the most likely token is always kept.
KRAIT_HD inline uint64_t min_weight(float min_p) {
  if (min_p >= 1.0F) return uint64_t{1} << 32;
  return static_cast<uint64_t>(std::ceil(static_cast<double>(min_p) * 4294967296.0));
}

/// Sorts tokens by a value >= 0, smallest first.
KRAIT_HD constexpr uint64_t ascending_key(float value, int32_t token) {
  return uint64_t{std::bit_cast<uint32_t>(value)} << 32 | static_cast<uint32_t>(token);
}

/// Sorts tokens by a clean logit, largest first.
KRAIT_HD constexpr uint64_t descending_key(float logit, int32_t token) {
  const auto bits = std::bit_cast<uint32_t>(logit);
  const uint32_t ascending = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return uint64_t{~ascending} << 32 | static_cast<uint32_t>(token);
}

KRAIT_HD constexpr int32_t token_of_key(uint64_t key) { return static_cast<int32_t>(key); }

/// Length of the window in which tokens count as seen; `ring` is the length of a slot's ring.
/// When token number n (from 0) of a sequence is put into ring[n % ring], the token that leaves the
/// window is number n - length, if n >= length; with length = ring it is the one overwritten.
KRAIT_HD constexpr int64_t window_length(int32_t repeat_last_n, int64_t ring) {
  return repeat_last_n < 0 || repeat_last_n > ring ? ring : repeat_last_n;
}

}  // namespace krait::sampling
