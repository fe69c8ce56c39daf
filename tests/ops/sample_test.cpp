// sample and receive: exact cases for each filter, penalty and bias; distributions against a
// float64 oracle; streams of random numbers; the window of seen tokens; and every backend against
// the definition, token for token.
#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "ops/ops_test_util.h"

namespace krait::test {
namespace {

/// The sampling state of some slots on a backend.
class Sampler {
 public:
  struct Sizes {
    int64_t vocab = 8;
    int64_t n_slot = 3;
    int64_t window = 16;
    int64_t padding = 3;  ///< columns of the logits that are not tokens
    bool penalties = true;
  };

  Sampler(Backend b, const Sizes& sizes) : d_(b), sizes_(sizes) {
    const int64_t n = sizes.n_slot;
    params_.resize(static_cast<size_t>(n));
    const std::vector<std::byte> zeros(static_cast<size_t>(n * (sizes.vocab + 8 * 1024)) * 8);
    state_.position = d_.bytes(zeros.data(), DType::i64, {n});
    state_.next_id = d_.bytes(zeros.data(), DType::i32, {n});
    if (sizes.penalties) {
      state_.seen = d_.bytes(zeros.data(), DType::i32, {n, sizes.window});
      state_.seen_len = d_.bytes(zeros.data(), DType::i64, {n});
      state_.counts = d_.bytes(zeros.data(), DType::i32, {n, sizes.vocab});
    }
    state_.params = d_.bytes(params_.data(), DType::u8, {n, int64_t{sizeof(SampleParams)}});
  }

  void set(int64_t slot, const SampleParams& p) {
    params_[static_cast<size_t>(slot)] = p;
    d_.op.upload(state_.params.data, params_.data(), state_.params.bytes());
  }
  void set_all(const SampleParams& p) {
    for (int64_t s = 0; s < sizes_.n_slot; ++s) set(s, p);
  }
  void set_position(int64_t slot, int64_t position) {
    d_.op.upload(state_.position.as<int64_t>() + slot, &position, sizeof(position));
  }
  void set_counts(int64_t slot, const std::vector<int32_t>& counts) {
    d_.op.upload(state_.counts.rows(slot, 1).data, counts.data(), counts.size() * 4);
  }
  /// The same biases in every slot, followed by an unused entry.
  void set_bias(std::vector<std::pair<int32_t, float>> bias) {
    bias.emplace_back(-1, 1e6F);
    std::vector<int32_t> id;
    Values value;
    for (int64_t s = 0; s < sizes_.n_slot; ++s) {
      for (const auto& [i, v] : bias) id.push_back(i), value.push_back(v);
    }
    const Shape shape{sizes_.n_slot, std::ssize(bias)};
    state_.bias_id = d_.bytes(id.data(), DType::i32, shape);
    state_.bias_value = d_.tensor(value, shape);
  }

  /// Samples from rows of `vocab` logits; the padding columns hold larger ones.
  void launch(const Values& logits, const std::vector<int32_t>& slots) {
    const int64_t n = std::ssize(slots);
    Values wide;
    for (int64_t s = 0; s < n; ++s) {
      append(wide, rows(logits, s, s + 1, sizes_.vocab));
      wide.resize(wide.size() + static_cast<size_t>(sizes_.padding), 1e9F);
    }
    const Tensor device_logits = d_.tensor(wide, {n, sizes_.vocab + sizes_.padding});
    state_.row_id = d_.ints(std::vector<int32_t>(slots.size(), -7));
    std::vector<int64_t> positions(slots.size());
    std::iota(positions.begin(), positions.end(), (int64_t{1} << 32) - 1);
    state_.row_position = d_.bytes(positions.data(), DType::i64, {n});
    d_.op.sample(device_logits, sizes_.vocab, state_, d_.ints(slots), n);
  }
  std::vector<int32_t> receive(int64_t n) {
    std::vector<int32_t> tokens(static_cast<size_t>(n));
    d_.op.receive(tokens);
    return tokens;
  }
  std::vector<int32_t> sample(const Values& logits, const std::vector<int32_t>& slots) {
    launch(logits, slots);
    return receive(std::ssize(slots));
  }
  int32_t sample(const Values& logits) { return sample(logits, {0})[0]; }

  std::vector<int32_t> next_id() { return d_.read_as<int32_t>(state_.next_id); }
  std::vector<int32_t> row_id() { return d_.read_as<int32_t>(state_.row_id); }
  std::vector<int64_t> row_position() { return d_.read_as<int64_t>(state_.row_position); }
  std::vector<int64_t> position() { return d_.read_as<int64_t>(state_.position); }
  std::vector<int32_t> seen() { return d_.read_as<int32_t>(state_.seen); }
  std::vector<int64_t> seen_len() { return d_.read_as<int64_t>(state_.seen_len); }
  std::vector<int32_t> counts() { return d_.read_as<int32_t>(state_.counts); }

 private:
  Device d_;
  Sizes sizes_;
  SampleState state_;
  std::vector<SampleParams> params_;
};

SampleParams greedy() {
  SampleParams p;
  p.temperature = 0;
  return p;
}

/// Changes one thing about the defaults.
template <typename F>
SampleParams with(F&& set) {
  SampleParams p;
  set(p);
  return p;
}

class Sample : public ::testing::TestWithParam<Backend> {};

#define EACH_BACKEND(suite)                                                  \
  INSTANTIATE_TEST_SUITE_P(Plain, suite, ::testing::Values(Backend::plain)); \
  INSTANTIATE_TEST_SUITE_P(Cpu, suite, ::testing::Values(Backend::fast));    \
  INSTANTIATE_TEST_SUITE_P(Gpu, suite, ::testing::Values(Backend::gpu))

EACH_BACKEND(Sample);

TEST_P(Sample, GreedyTakesTheLargestLowestFirst) {
  Sampler s(GetParam(), {.vocab = 6});
  s.set_all(greedy());
  EXPECT_EQ(s.sample({1, 5, 2, 5, 5, 0}), 1);
  EXPECT_EQ(s.sample({-3, -1, -2, -5, -1, -9}), 1);
  EXPECT_EQ(s.sample({0, 0, 0, 0, 0, 0.5F}), 5);
  EXPECT_EQ(s.sample({-0.0F, 0.0F, -1, -1, -1, -1}), 0);
  EXPECT_EQ(s.next_id()[0], 0);
  EXPECT_EQ(s.position()[0], 4);
}

TEST_P(Sample, BiasComesFirst) {
  Sampler s(GetParam(), {.vocab = 6});
  s.set_all(greedy());
  s.set_bias({{2, 2.5F}, {1, -kInf}, {2, 1.0F}});
  EXPECT_EQ(s.sample({1, 9, 2, 5.25F, 5, 0}), 2);  // 2 + 2.5 + 1; token 1 is forbidden
  EXPECT_EQ(s.sample({1, 9, 2, 5.75F, 5, 0}), 3);
  EXPECT_EQ(s.sample({1, kInf, 2, 3, 8, 0}), 4);  // a forbidden token stays forbidden
}

TEST_P(Sample, PenaltiesOfSeenTokens) {
  const auto first_wins = [&](const SampleParams& p, float logit, int32_t count, float rival) {
    Sampler s(GetParam(), {.vocab = 2});
    s.set_all(p);
    s.set_counts(0, {count, 0});
    return s.sample({logit, rival}) == 0;
  };
  SampleParams p = greedy();
  p.repeat_penalty = 1.5F;
  EXPECT_TRUE(first_wins(p, 3, 2, 1.99F));
  EXPECT_FALSE(first_wins(p, 3, 2, 2.01F));
  EXPECT_TRUE(first_wins(p, -2, 1, -3.01F));
  EXPECT_FALSE(first_wins(p, -2, 1, -2.99F));
  EXPECT_TRUE(first_wins(p, 3, 0, 2.99F)) << "not seen";
  p = greedy();
  p.presence_penalty = 0.5F;
  EXPECT_TRUE(first_wins(p, 1, 3, 0.49F));
  EXPECT_FALSE(first_wins(p, 1, 3, 0.51F));
  p.frequency_penalty = 0.25F;
  EXPECT_TRUE(first_wins(p, 1, 3, -0.26F));
  EXPECT_FALSE(first_wins(p, 1, 3, -0.24F));
  p.repeat_penalty = 2;  // the division comes before the subtraction
  EXPECT_TRUE(first_wins(p, 1, 3, -0.76F));
  EXPECT_FALSE(first_wins(p, 1, 3, -0.74F));
}

TEST_P(Sample, LogitsThatAreNotNumbers) {
  Sampler s(GetParam(), {.vocab = 4});
  s.set_bias({{0, -kInf}});
  for (const float temperature : {0.0F, 1.0F}) {
    s.set_all(with([&](SampleParams& p) { p.temperature = temperature, p.top_p = 0.9F; }));
    EXPECT_EQ(s.sample({-kInf, -kInf, -kInf, -kInf}), 0) << "nothing is allowed: the lowest";
    EXPECT_EQ(s.sample({kNan, kNan, 1, kNan}), 2);
    EXPECT_EQ(s.sample({1, 2, kInf, 3}), 2);
    EXPECT_EQ(s.sample({5, -kInf, -kInf, 1}), 3);
  }
  s.set_all(greedy());
  EXPECT_EQ(s.sample({kNan, kNan, kNan, kNan}), 1) << "the lowest that is not forbidden";
}

/// The tokens that come up in many draws.
std::set<int32_t> drawn(Backend b, const SampleParams& p, const Values& logits) {
  const int64_t n = 64;
  Sampler s(b, {.vocab = std::ssize(logits), .n_slot = n, .penalties = false});
  Values batch;
  std::vector<int32_t> slots;
  for (int32_t i = 0; i < n; ++i) {
    SampleParams own = p;
    own.sequence = static_cast<uint64_t>(i);
    s.set(i, own);
    append(batch, logits);
    slots.push_back(i);
  }
  std::set<int32_t> tokens;
  for (int i = 0; i < 12; ++i) {
    for (const int32_t t : s.sample(batch, slots)) tokens.insert(t);
  }
  return tokens;
}

/// Logits of these probabilities, off by a constant.
Values log_of(std::initializer_list<double> p) {
  Values v;
  for (const double x : p) v.push_back(static_cast<float>(std::log(x) + 1.7));
  return v;
}

using Ids = std::set<int32_t>;

TEST_P(Sample, FiltersKeepTheRightTokens) {
  const Backend b = GetParam();
  const Values p = log_of({0.1, 0.4, 0.05, 0.25, 0.2});
  EXPECT_EQ(drawn(b, {}, p), (Ids{0, 1, 2, 3, 4}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_k = 2; }), p), (Ids{1, 3}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_k = 1; }), p), (Ids{1}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_k = 9; }), p), (Ids{0, 1, 2, 3, 4}));

  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_p = 0.39F; }), p), (Ids{1}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_p = 0.41F; }), p), (Ids{1, 3}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_p = 0.84F; }), p), (Ids{1, 3, 4}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_p = 0.86F; }), p), (Ids{0, 1, 3, 4}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_p = 0; }), p), (Ids{1}));

  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.min_p = 0.51F; }), p), (Ids{1, 3}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.min_p = 0.49F; }), p), (Ids{1, 3, 4}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.min_p = 1; }), p), (Ids{1}));

  // Entropy 1.416 nats; distances from it: 0.887, 0.499, 1.580, 0.029, 0.194 for tokens 0 .. 4.
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.typical_p = 0.24F; }), p), (Ids{3}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.typical_p = 0.26F; }), p), (Ids{3, 4}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.typical_p = 0.46F; }), p), (Ids{1, 3, 4}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.typical_p = 0.86F; }), p), (Ids{0, 1, 3, 4}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.typical_p = 0; }), p), (Ids{3}));
}

TEST_P(Sample, FiltersWorkOnWhatIsLeft) {
  const Backend b = GetParam();
  const Values p = log_of({0.1, 0.4, 0.05, 0.25, 0.2});
  // Of the three that top-k leaves, the first has 0.47 of the mass and the first two 0.76.
  const auto top_k_p = [](float top_p) {
    return with([&](SampleParams& q) { q.top_k = 3, q.top_p = top_p; });
  };
  EXPECT_EQ(drawn(b, top_k_p(0.46F), p), (Ids{1}));
  EXPECT_EQ(drawn(b, top_k_p(0.75F), p), (Ids{1, 3}));
  EXPECT_EQ(drawn(b, top_k_p(0.77F), p), (Ids{1, 3, 4}));
  // Typical leaves 3 and 4 without the most likely token; 3 is 0.56 of them, 4 is 0.8 of 3.
  const auto typical = [](float top_p, float min_p) {
    return with([&](SampleParams& q) { q.typical_p = 0.26F, q.top_p = top_p, q.min_p = min_p; });
  };
  EXPECT_EQ(drawn(b, typical(0.55F, 0), p), (Ids{3}));
  EXPECT_EQ(drawn(b, typical(0.56F, 0), p), (Ids{3, 4}));
  EXPECT_EQ(drawn(b, typical(1, 0.79F), p), (Ids{3, 4}));
  EXPECT_EQ(drawn(b, typical(1, 0.81F), p), (Ids{3}));
  // The filters come before the temperature: a flat distribution does not widen top-p.
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_p = 0.39F, q.temperature = 50; }), p),
            (Ids{1}));
}

TEST_P(Sample, TiesGoToTheLowerToken) {
  const Backend b = GetParam();
  const Values flat(7, -2.5F);
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_k = 3; }), flat), (Ids{0, 1, 2}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.top_p = 0.42F; }), flat), (Ids{0, 1, 2}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.typical_p = 0.42F; }), flat), (Ids{0, 1, 2}));
  EXPECT_EQ(drawn(b, with([](SampleParams& q) { q.min_p = 1; }), flat), (Ids{0, 1, 2, 3, 4, 5, 6}));
}

TEST_P(Sample, ATokenDependsOnSeedSequenceAndPositionAlone) {
  const int64_t vocab = 500;
  Random r(5);
  const Values logits = r.uniform(vocab, -1, 1);
  Values three;
  for (int i = 0; i < 3; ++i) append(three, logits);
  const auto params = [](uint64_t seed, uint64_t sequence) {
    return with([&](SampleParams& p) { p.seed = seed, p.sequence = sequence; });
  };
  const auto stream = [&](const SampleParams& p, int32_t slot) {
    Sampler s(GetParam(), {.vocab = vocab});
    for (int32_t other = 0; other < 3; ++other) {
      s.set(other, other == slot ? p : params(77, static_cast<uint64_t>(other)));
    }
    std::vector<int32_t> tokens;
    for (int i = 0; i < 20; ++i) {
      // The slot is sometimes alone, sometimes among others, in different rows.
      const std::vector<std::vector<int32_t>> orders{{slot}, {0, 1, 2}, {2, 1, 0}};
      const std::vector<int32_t>& order = orders[static_cast<size_t>(i % 3)];
      const auto got = s.sample(order.size() == 1 ? logits : three, order);
      const auto row = std::find(order.begin(), order.end(), slot) - order.begin();
      tokens.push_back(got[static_cast<size_t>(row)]);
    }
    return tokens;
  };
  const std::vector<int32_t> base = stream(params(1, 2), 0);
  EXPECT_GT(std::set<int32_t>(base.begin(), base.end()).size(), 10U);
  EXPECT_EQ(stream(params(1, 2), 0), base);
  EXPECT_EQ(stream(params(1, 2), 2), base) << "another slot";
  EXPECT_NE(stream(params(1, 3), 0), base) << "another sequence";
  EXPECT_NE(stream(params(2, 2), 0), base) << "another seed";

  Sampler later(GetParam(), {.vocab = vocab});
  later.set_all(params(1, 2));
  later.set_position(0, 7);
  EXPECT_EQ(later.sample(logits), base[7]);
}

TEST_P(Sample, PaddingRowsAndOtherSlotsStay) {
  Sampler s(GetParam(), {.vocab = 4, .n_slot = 4});
  s.set_all(greedy());
  const Values logits{0, 9, 0, 0, 9, 0, 0, 0, 0, 0, 0, 9};
  const std::vector<int32_t> tokens = s.sample(logits, {3, -1, 1});
  EXPECT_EQ(tokens[0], 1);
  EXPECT_EQ(tokens[2], 3);
  EXPECT_EQ(s.next_id(), (std::vector<int32_t>{0, 3, 0, 1}));
  EXPECT_EQ(s.row_id(), (std::vector<int32_t>{1, 0, 3}));
  constexpr int64_t kBefore = (int64_t{1} << 32) - 1;
  EXPECT_EQ(s.row_position(), (std::vector<int64_t>{kBefore + 1, kBefore + 2, kBefore + 3}));
  EXPECT_EQ(s.position(), (std::vector<int64_t>{0, 1, 0, 1}));
  EXPECT_EQ(s.seen_len(), (std::vector<int64_t>{0, 1, 0, 1}));
}

TEST_P(Sample, TheMailboxIsFirstInFirstOut) {
  Sampler s(GetParam(), {.vocab = 4});
  s.set_all(greedy());
  s.launch({9, 0, 0, 0}, {0});
  s.launch({0, 9, 0, 0, 0, 0, 9, 0}, {1, 2});
  s.launch({0, 0, 0, 9}, {0});
  EXPECT_EQ(s.receive(1), (std::vector<int32_t>{0}));
  EXPECT_EQ(s.receive(2), (std::vector<int32_t>{1, 2}));
  s.launch({0, 9, 0, 0}, {2});
  EXPECT_EQ(s.receive(1), (std::vector<int32_t>{3}));
  EXPECT_EQ(s.receive(1), (std::vector<int32_t>{1}));
  for (int i = 0; i < 8; ++i) s.launch({0, 0, 9, 0}, {0});  // as many as fit
  for (int i = 0; i < 8; ++i) EXPECT_EQ(s.receive(1), (std::vector<int32_t>{2}));
}

// The ring, its length and the counts after each token, against a list of all tokens.
TEST_P(Sample, WindowOfSeenTokens) {
  constexpr int64_t kVocab = 5;
  constexpr int64_t kRing = 7;
  for (const int32_t last_n : {0, 1, 3, 6, 7, 9, -1}) {
    Sampler s(GetParam(), {.vocab = kVocab, .n_slot = 2, .window = kRing});
    s.set_all(with([&](SampleParams& p) { p.temperature = 0, p.repeat_last_n = last_n; }));
    const int64_t window = last_n < 0 ? kRing : std::min<int64_t>(last_n, kRing);
    std::vector<int32_t> all;
    Random r(6);
    for (int i = 0; i < 25; ++i) {
      const int32_t token = r.below(kVocab);
      Values logits(kVocab, 0.0F);
      logits[static_cast<size_t>(token)] = 100;
      ASSERT_EQ(s.sample(logits, {1})[0], token);
      all.push_back(token);

      std::vector<int32_t> counts(2 * kVocab, 0);
      for (int64_t k = std::max<int64_t>(0, std::ssize(all) - window); k < std::ssize(all); ++k) {
        ++counts[static_cast<size_t>(kVocab + all[static_cast<size_t>(k)])];
      }
      std::vector<int32_t> ring(2 * kRing, 0);
      for (size_t k = 0; k < all.size(); ++k) ring[kRing + k % kRing] = all[k];
      ASSERT_EQ(s.counts(), counts) << "repeat_last_n " << last_n << ", token " << i;
      ASSERT_EQ(s.seen(), ring);
      ASSERT_EQ(s.seen_len(), (std::vector<int64_t>{0, std::ssize(all)}));
    }
  }
}

TEST_P(Sample, PenaltiesEndWithTheWindow) {
  Sampler s(GetParam(), {.vocab = 3, .n_slot = 1});
  s.set_all(with(
      [](SampleParams& p) { p.temperature = 0, p.repeat_last_n = 2, p.presence_penalty = 10; }));
  // Each token is avoided for the two that follow it.
  std::vector<int32_t> tokens;
  for (int i = 0; i < 6; ++i) tokens.push_back(s.sample({3, 2, 1}));
  EXPECT_EQ(tokens, (std::vector<int32_t>{0, 1, 2, 0, 1, 2}));
}

// ---- distributions

struct DistributionCase {
  std::string name;
  SampleParams params;
};

void PrintTo(const DistributionCase& c, std::ostream* os) { *os << c.name; }

/// What the parameters make of the logits, in float64 and in the words of their definitions.
std::vector<double> probabilities(const Values& logits, const SampleParams& p) {
  struct Candidate {
    size_t id;
    double logit;
    double p;
  };
  std::vector<Candidate> c;
  for (size_t i = 0; i < logits.size(); ++i) c.push_back({i, logits[i], 0});
  const auto softmax = [&](double temperature) {
    double sum = 0;
    for (Candidate& x : c) sum += x.p = std::exp(x.logit / temperature);
    for (Candidate& x : c) x.p /= sum;
  };
  const auto sort_by = [&](auto&& key) {
    std::stable_sort(c.begin(), c.end(),
                     [&](const Candidate& a, const Candidate& b) { return key(a) < key(b); });
  };
  const auto by_probability = [](const Candidate& x) { return -x.logit; };
  sort_by(by_probability);
  if (p.top_k > 0) c.resize(std::min(c.size(), static_cast<size_t>(p.top_k)));
  if (p.typical_p < 1) {
    softmax(1);
    double entropy = 0;
    for (const Candidate& x : c) entropy -= x.p * std::log(x.p);
    sort_by([&](const Candidate& x) { return std::abs(-std::log(x.p) - entropy); });
    double sum = 0;
    size_t n = 0;
    while (n < c.size() && sum <= static_cast<double>(p.typical_p)) sum += c[n++].p;
    c.resize(n);
    sort_by(by_probability);
  }
  if (p.top_p < 1) {
    softmax(1);
    double sum = 0;
    size_t n = 0;
    while (n < c.size() && sum < static_cast<double>(p.top_p)) sum += c[n++].p;
    c.resize(n);
  }
  if (p.min_p > 0) {
    const double least = c[0].logit + std::log(static_cast<double>(p.min_p));
    while (c.back().logit < least) c.pop_back();
  }
  softmax(static_cast<double>(p.temperature));
  std::vector<double> out(logits.size(), 0.0);
  for (const Candidate& x : c) out[x.id] = x.p;
  return out;
}

std::vector<DistributionCase> distribution_cases() {
  return {
      {"default", {}},
      {"cold", with([](SampleParams& p) { p.temperature = 0.6F; })},
      {"hot", with([](SampleParams& p) { p.temperature = 2.5F; })},
      {"top_k", with([](SampleParams& p) { p.top_k = 7; })},
      {"top_p", with([](SampleParams& p) { p.top_p = 0.8F; })},
      {"min_p", with([](SampleParams& p) { p.min_p = 0.1F; })},
      {"typical", with([](SampleParams& p) { p.typical_p = 0.7F; })},
      {"all", with([](SampleParams& p) {
         p.top_k = 30, p.typical_p = 0.9F, p.top_p = 0.9F, p.min_p = 0.02F, p.temperature = 1.3F;
       })},
  };
}

class SampleDistribution : public ::testing::TestWithParam<std::tuple<Backend, DistributionCase>> {
};

TEST_P(SampleDistribution, ChiSquare) {
  const auto& [backend, c] = GetParam();
  constexpr int64_t kVocab = 41;
  constexpr int32_t kSequences = 100;
  constexpr int kSteps = 300;
  Random r(17);
  const Values logits = r.uniform(kVocab, -2, 2);
  const std::vector<double> p = probabilities(logits, c.params);

  Sampler s(backend, {.vocab = kVocab, .n_slot = kSequences, .penalties = false});
  Values batch;
  std::vector<int32_t> slots;
  for (int32_t i = 0; i < kSequences; ++i) {
    SampleParams own = c.params;
    own.seed = 2024;
    own.sequence = static_cast<uint64_t>(i);
    s.set(i, own);
    append(batch, logits);
    slots.push_back(i);
  }
  std::vector<double> count(kVocab, 0.0);
  for (int i = 0; i < kSteps; ++i) {
    for (const int32_t t : s.sample(batch, slots)) ++count[static_cast<size_t>(t)];
  }
  const double draws = kSequences * kSteps;
  double chi2 = 0;
  double freedom = -1;
  for (size_t i = 0; i < kVocab; ++i) {
    if (p[i] == 0) {
      EXPECT_EQ(count[i], 0) << "token " << i << " was filtered out";
      continue;
    }
    ASSERT_GT(p[i] * draws, 5) << "too rare for the test";
    chi2 += std::pow(count[i] - p[i] * draws, 2) / (p[i] * draws);
    ++freedom;
  }
  EXPECT_GE(freedom, 1);
  // The statistic has mean `freedom` and variance 2 * freedom: four deviations is one in 10,000.
  EXPECT_LE(chi2, freedom + 4 * std::sqrt(2 * freedom));
  EXPECT_GE(chi2, freedom - 4 * std::sqrt(2 * freedom));
}

OPS_TEST_ALL_BACKENDS(SampleDistribution, ::testing::ValuesIn(distribution_cases()));

// ---- token for token

struct EqualCase {
  std::string name;
  int64_t vocab = 0;
  SampleParams params;
  float spread = 4;
  bool ties = false;
};

void PrintTo(const EqualCase& c, std::ostream* os) { *os << c.name; }

std::vector<EqualCase> equal_cases() {
  std::vector<EqualCase> cases;
  for (const int64_t vocab : {7, 333, 4096, 50280, 65024}) {
    for (const DistributionCase& d : distribution_cases()) {
      cases.push_back({fmt::format("v{}_{}", vocab, d.name), vocab, d.params});
      cases.push_back({fmt::format("v{}_{}_ties", vocab, d.name), vocab, d.params, 4, true});
      cases.push_back({fmt::format("v{}_{}_flat", vocab, d.name), vocab, d.params, 0.01F});
      cases.push_back({fmt::format("v{}_{}_steep", vocab, d.name), vocab, d.params, 40});
    }
    cases.push_back({fmt::format("v{}_greedy", vocab), vocab, greedy(), 4, true});
    cases.push_back({fmt::format("v{}_penalties", vocab), vocab, with([](SampleParams& p) {
                       p.repeat_penalty = 1.3F, p.presence_penalty = 0.2F;
                       p.frequency_penalty = 0.1F, p.repeat_last_n = 5, p.top_p = 0.9F;
                     })});
  }
  return cases;
}

class SampleEquals : public ::testing::TestWithParam<std::tuple<Backend, EqualCase>> {};

TEST_P(SampleEquals, Definition) {
  const auto& [backend, c] = GetParam();
  const auto run = [&](Backend b) {
    Sampler s(b, {.vocab = c.vocab});
    s.set_bias({{3, 1.5F}, {5, -kInf}});
    for (int32_t slot = 0; slot < 3; ++slot) {
      SampleParams p = c.params;
      p.seed = 99;
      p.sequence = static_cast<uint64_t>(slot) * 1000;
      s.set(slot, p);
    }
    Random r(static_cast<uint32_t>(c.vocab));
    std::vector<int32_t> tokens;
    for (int step = 0; step < 3; ++step) {
      Values logits = r.uniform(2 * c.vocab, -c.spread, c.spread);
      if (c.ties) {
        for (float& v : logits) v = std::round(v * 8) / 8;
      }
      const auto got = s.sample(logits, {2, step % 2});
      tokens.insert(tokens.end(), got.begin(), got.end());
    }
    const auto counts = s.counts();
    tokens.insert(tokens.end(), counts.begin(), counts.end());
    return tokens;
  };
  EXPECT_EQ(run(backend), run(Backend::plain));
}

OPS_TEST_BACKENDS(SampleEquals, ::testing::ValuesIn(equal_cases()));

TEST(SampleCpu, ReceivingWhatWasNotPostedIsAnError) {
  for (const Backend b : {Backend::plain, Backend::fast}) {
    std::vector<int32_t> two(2);
    EXPECT_TRUE(throws(ErrorKind::runtime, "no post", [&] { ops(b).receive(two); }));
    Sampler s(b, {.vocab = 2});
    s.launch({1, 2}, {0});
    EXPECT_TRUE(throws(ErrorKind::runtime, "expected 2 tokens", [&] { ops(b).receive(two); }));
    EXPECT_EQ(s.receive(1).size(), 1U);
    for (int i = 0; i < 8; ++i) s.launch({1, 2}, {0});
    EXPECT_TRUE(throws(ErrorKind::runtime, "8 posts", [&] { s.launch({1, 2}, {0}); }));
    for (int i = 0; i < 8; ++i) EXPECT_EQ(s.receive(1).size(), 1U);
  }
}

}  // namespace
}  // namespace krait::test
