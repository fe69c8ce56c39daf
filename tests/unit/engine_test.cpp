// The engine's promises, on a tiny random model: faults of recurrent engines are silent and in
// range, so every way of arriving at a state is held against another.
#include "runtime/engine.h"

#include <gmock/gmock.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <set>

#include "support/test_models.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

using ::testing::Each;
using ::testing::ElementsAreArray;
using ::testing::Lt;

// Two orders of the same f32 sums, after a few layers: a few hundred roundings of 6e-8.
constexpr double kRounding = 2e-5;

class EngineTest : public ::testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    model_ = load_tiny(GetParam());
    vocab_ = model_.model->config().vocab_size;
  }
  [[nodiscard]] Engine engine(EngineOptions options = {}) const {
    return Engine(*model_.model, *model_.op, options);
  }
  [[nodiscard]] Engine engine_of_slots(int64_t n, bool poison = false) const {
    EngineOptions options;
    options.n_slot = n;
    options.poison = poison;
    return engine(options);
  }
  [[nodiscard]] std::vector<int32_t> prompt(size_t n, uint64_t seed = 1) const {
    return random_ids(n, vocab_, seed);
  }
  [[nodiscard]] static std::vector<float> copy(std::span<const float> v) {
    return {v.begin(), v.end()};
  }

  LoadedModel model_;
  int64_t vocab_ = 0;
  /// A GPU replays what came before, at the latest when it comes for the sixth time.
  int times_ = std::string_view(GetParam().name) == "Gpu" ? 6 : 2;
};

/// Random sampling, each sequence with a stream of its own.
SampleParams stream(uint64_t sequence) {
  SampleParams p;
  p.temperature = 1.5F;
  p.seed = 42;
  p.sequence = sequence;
  return p;
}

TEST_P(EngineTest, PrefillAndStepEqualsALongerPrefill) {
  constexpr int64_t kChunk = 16;
  EngineOptions options;
  options.prefill_chunk = kChunk;
  Engine e = engine(options);
  e.keep_logits(true);
  for (const size_t n : {1U, 2U, 3U, 4U, 5U, 6U, 15U, 16U, 17U, 31U, 32U, 33U}) {
    std::vector<int32_t> ids = prompt(n, n);
    e.open(0, greedy());
    e.prefill(0, ids);
    e.step({{0}});
    ids.push_back(e.receive()[0]);
    const auto stepped = copy(e.logits());
    const int32_t next = e.receive()[0];

    e.open(0, greedy());
    e.prefill(0, ids);
    EXPECT_EQ(e.receive()[0], next);
    EXPECT_TRUE(near_std(stepped, e.logits(), kRounding)) << "prompt of " << n;
  }
}

TEST_P(EngineTest, AnySplitEqualsTheWhole) {
  const auto ids = prompt(200);
  Engine whole = engine();
  const auto want = all_logits(whole, vocab_, ids);
  for (const std::vector<size_t>& pieces :
       {std::vector<size_t>(200, 1), {1}, {3}, {100, 1, 1, 98}, {199, 1}, {5, 4, 3, 2, 1}}) {
    Engine e = engine();
    EXPECT_TRUE(near_std(all_logits(e, vocab_, ids, pieces), want, kRounding));
  }
  EngineOptions options;
  options.prefill_chunk = 7;
  Engine chunked = engine(options);
  EXPECT_TRUE(near_std(all_logits(chunked, vocab_, ids), want, kRounding));
}

TEST_P(EngineTest, RaggedBatchEqualsEachAlone) {
  constexpr size_t kSequences = 5;
  constexpr size_t kTokens = 30;
  std::vector<std::vector<int32_t>> alone;
  for (size_t s = 0; s < kSequences; ++s) {
    Engine e = engine();
    e.open(0, stream(s));
    alone.push_back(generate(e, 0, prompt(1 + 9 * s, s), kTokens));
  }

  Engine e = engine_of_slots(kSequences);
  std::vector<std::vector<int32_t>> together(kSequences);
  const auto take = [&](const std::vector<int32_t>& slots) {
    const auto tokens = e.receive();
    for (size_t i = 0; i < slots.size(); ++i) {
      together[static_cast<size_t>(slots[i])].push_back(tokens[i]);
    }
  };
  // Sequences join one by one between steps, the batch changes its order each time, and those that
  // are done leave.
  std::mt19937 random(7);
  std::vector<int32_t> running;
  for (int32_t joining = 0;;) {
    if (joining < static_cast<int32_t>(kSequences)) {
      e.open(joining, stream(static_cast<uint64_t>(joining)));
      const auto j = static_cast<size_t>(joining);
      e.prefill(joining, prompt(1 + 9 * j, j));
      take({joining});
      running.push_back(joining++);
    }
    for (int i = 0; i < 3; ++i) {
      std::erase_if(running,
                    [&](int32_t s) { return together[static_cast<size_t>(s)].size() == kTokens; });
      if (running.empty()) break;
      std::shuffle(running.begin(), running.end(), random);
      e.step(running);
      take(running);
    }
    if (running.empty()) break;
  }
  for (size_t s = 0; s < kSequences; ++s) EXPECT_EQ(together[s], alone[s]) << "sequence " << s;
}

/// Logits of sequences 0 .. n-1 after a few steps in a batch, where sequence s lives in slots[s]
/// and the batch lists them in `order`.
std::vector<std::vector<float>> batch_logits(Engine& e, const std::vector<int32_t>& slots,
                                             const std::vector<size_t>& order, int64_t vocab) {
  e.keep_logits(true);
  std::vector<int32_t> batch;
  for (const size_t s : order) {
    e.open(slots[s], stream(s));
    e.prefill(slots[s], random_ids(3 + 5 * s, vocab, s));
    (void)e.receive();
    batch.push_back(slots[s]);
  }
  for (int i = 0; i < 4; ++i) {
    e.step(batch);
    (void)e.receive();
  }
  std::vector<std::vector<float>> logits(order.size());
  for (size_t row = 0; row < order.size(); ++row) {
    const auto l = e.logits(static_cast<int64_t>(row));
    logits[order[row]] = {l.begin(), l.end()};
  }
  return logits;
}

TEST_P(EngineTest, PackedPromptsEqualEachAlone) {
  // Lengths around d_conv and the chunk, so that chunks end some prompts, begin others and split
  // the long ones; prefilled in one call or in two pieces each.
  constexpr int64_t kChunk = 16;
  const std::vector<size_t> lengths{1, 15, 40, 2, 3, 16, 5, 1, 17, 4, 100, 1};
  EngineOptions options;
  options.prefill_chunk = kChunk;
  options.n_slot = std::ssize(lengths);
  options.poison = true;
  std::vector<std::vector<float>> want;
  std::vector<int32_t> want_ids;
  std::vector<std::vector<int32_t>> prompts;
  Engine alone = engine();
  alone.keep_logits(true);
  for (const size_t n : lengths) {
    prompts.push_back(prompt(n, n + prompts.size()));
    alone.open(0, stream(prompts.size()));
    alone.prefill(0, prompts.back());
    want_ids.push_back(alone.receive()[0]);
    want.push_back(copy(alone.logits()));
  }
  for (const bool in_pieces : {false, true}) {
    Engine e = engine(options);
    e.keep_logits(true);
    std::vector<PrefillRequest> requests;
    for (size_t i = 0; i < prompts.size(); ++i) {
      const auto slot = static_cast<int32_t>((i * 5 + 3) % prompts.size());
      e.open(slot, stream(i + 1));
      requests.push_back({slot, prompts[i], true});
    }
    if (in_pieces) {
      std::vector<PrefillRequest> begins;
      for (PrefillRequest& r : requests) {
        const size_t n = r.ids.size() / 3;
        if (n > 0) begins.push_back({r.slot, r.ids.first(n), false});
        r.ids = r.ids.subspan(n);
      }
      EXPECT_TRUE(e.prefill(begins));
      EXPECT_TRUE(throws(ErrorKind::runtime, "receive", [&] { (void)e.receive(); }));
    }
    EXPECT_TRUE(e.prefill(requests));
    EXPECT_THAT(e.receive(), ElementsAreArray(want_ids));
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_TRUE(near_std(e.logits(static_cast<int64_t>(i)), want[i], kRounding)) << lengths[i];
    }
    // The states are right too: all go on together.
    std::vector<int32_t> slots;
    for (const PrefillRequest& r : requests) slots.push_back(r.slot);
    e.step(slots);
    const auto stepped = e.receive();
    const std::vector<int32_t> next(stepped.begin(), stepped.end());
    for (size_t i = 0; i < want.size(); ++i) {
      alone.open(0, stream(i + 1));
      EXPECT_EQ(generate(alone, 0, prompts[i], 2)[1], next[i]) << lengths[i];
    }
  }
}

TEST_P(EngineTest, PackedPrefillMixesRequestsThatSampleAndThatDoNot) {
  Engine e = engine_of_slots(3);
  for (int slot = 0; slot < 3; ++slot) e.open(slot, greedy());
  const auto a = prompt(7, 1);
  const auto b = prompt(9, 2);
  const std::vector<PrefillRequest> requests{{2, a, false}, {0, b, true}, {1, a, true}};
  EXPECT_TRUE(e.prefill(requests));
  const std::vector<int32_t> got = [&] {
    const auto tokens = e.receive();
    return std::vector<int32_t>(tokens.begin(), tokens.end());
  }();
  Engine alone = engine();
  for (const auto& [ids, token] : {std::pair{b, got[0]}, {a, got[1]}}) {
    alone.open(0, greedy());
    EXPECT_EQ(generate(alone, 0, ids, 1)[0], token);
  }
  EXPECT_TRUE(throws(ErrorKind::runtime, "slot 2", [&] { e.step({{2}}); }));
  EXPECT_TRUE(throws(ErrorKind::runtime, "twice", [&] {
    const std::vector<PrefillRequest> twice{{0, a, true}, {0, b, true}};
    e.prefill(twice);
  }));
  EXPECT_TRUE(e.prefill(std::span<const PrefillRequest>()));
}

TEST_P(EngineTest, ScoresAreTheLogitsLogProbabilities) {
  EngineOptions options;
  options.prefill_chunk = 16;
  options.n_slot = 4;
  options.scoring = true;
  Engine e = engine(options);
  std::vector<std::vector<int32_t>> prompts;
  std::vector<std::vector<int32_t>> targets;
  std::vector<std::vector<float>> want;
  std::vector<std::vector<int32_t>> want_best;
  for (const size_t n : {5U, 40U, 1U, 23U}) {
    prompts.push_back(prompt(n, n));
    auto& t = targets.emplace_back(prompt(n, n + 100));
    for (size_t i = 0; i < n; i += 3) t[i] = -1;  // not wanted
    if (n == 1) t[0] = 7;
    const auto logits = all_logits(e, vocab_, prompts.back());
    want.emplace_back();
    want_best.emplace_back();
    for (size_t i = 0; i < n; ++i) {
      if (t[i] < 0) continue;
      const auto row =
          std::span(logits).subspan(i * static_cast<size_t>(vocab_), static_cast<size_t>(vocab_));
      double sum = 0;
      for (const float l : row) sum += std::exp(static_cast<double>(l));
      want.back().push_back(static_cast<float>(row[static_cast<size_t>(t[i])] - std::log(sum)));
      want_best.back().push_back(
          static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin()));
    }
  }
  std::vector<PrefillRequest> requests;
  for (int i = 0; i < 4; ++i) {
    e.open(3 - i, greedy());
    const auto at = static_cast<size_t>(i);
    requests.push_back({3 - i, prompts[at], i == 1, targets[at]});
  }
  std::vector<std::vector<float>> got(4);
  std::vector<std::vector<int32_t>> got_best(4);
  e.prefill(requests, [&](size_t r, std::span<const TokenScore> scores) {
    for (const TokenScore& s : scores) {
      got[r].push_back(s.logprob);
      got_best[r].push_back(s.best);
    }
  });
  EXPECT_EQ(e.receive().size(), 1U);
  EXPECT_EQ(got_best, want_best);
  for (size_t r = 0; r < 4; ++r) {
    ASSERT_EQ(got[r].size(), want[r].size());
    for (size_t i = 0; i < want[r].size(); ++i) EXPECT_NEAR(got[r][i], want[r][i], 1e-4);
  }
  Engine plain = engine();
  plain.open(0, greedy());
  requests[0].slot = 0;
  EXPECT_TRUE(
      throws(ErrorKind::runtime, "scoring", [&] { plain.prefill(std::span(requests).first(1)); }));
}

TEST_P(EngineTest, ACopiedSequenceGoesOnLikeItsSource) {
  // Penalties look back into the copied text.
  SampleParams params = stream(5);
  params.repeat_penalty = 1.5F;
  params.repeat_last_n = 20;
  const auto prefix = prompt(33, 1);
  const auto rest = prompt(4, 2);
  auto whole = prefix;
  whole.insert(whole.end(), rest.begin(), rest.end());
  Engine alone = engine();
  alone.open(0, params);
  const auto want = generate(alone, 0, whole, 30);

  Engine e = engine_of_slots(4, /*poison=*/true);
  e.open(3, greedy());
  e.prefill(3, prefix, /*sample=*/false);
  for (const int slot : {1, 0}) {
    e.open(slot, params);
    e.copy(3, slot);
    EXPECT_EQ(generate(e, slot, rest, 30), want);
  }
  e.open(2, greedy());
  EXPECT_TRUE(throws(ErrorKind::runtime, "slot 0", [&] { e.copy(0, 2); }));
  EXPECT_TRUE(throws(ErrorKind::runtime, "slot 1", [&] { e.copy(3, 1); }));
}

TEST_P(EngineTest, PaddedStepsGiveTheSameTokens) {
  // 11 sequences that end one by one: steps of 11, 10, ... 1, padded to 11, 8, 4, 2 and 1 rows.
  const auto run = [&](bool pad) {
    EngineOptions options;
    options.n_slot = 11;
    options.pad_steps = pad;
    options.poison = true;
    Engine e = engine(options);
    std::vector<int32_t> slots;
    std::vector<std::vector<int32_t>> texts(11);
    for (int32_t s = 0; s < 11; ++s) {
      e.open(s, stream(static_cast<uint64_t>(s)));
      e.prefill(s, prompt(3, static_cast<uint64_t>(s)));
      texts[static_cast<size_t>(s)].push_back(e.receive()[0]);
      slots.push_back(s);
    }
    for (; !slots.empty(); slots.erase(slots.begin() + std::ssize(slots) / 2)) {
      for (int i = 0; i < 3; ++i) {  // a backend may replay what it did before
        e.step(slots);
        const auto tokens = e.receive();
        EXPECT_EQ(tokens.size(), slots.size());
        for (size_t k = 0; k < slots.size(); ++k) {
          texts[static_cast<size_t>(slots[k])].push_back(tokens[k]);
        }
      }
    }
    return texts;
  };
  EXPECT_EQ(run(true), run(false));
}

/// Logits of prompts of these lengths, fed together to slots in another order, and of a step after
/// it: the states show there.
std::vector<float> short_prefill(Engine& e, int64_t vocab, const std::vector<size_t>& lengths) {
  e.keep_logits(true);
  std::vector<std::vector<int32_t>> prompts;
  std::vector<PrefillRequest> requests;
  std::vector<int32_t> slots;
  for (const size_t n : lengths) prompts.push_back(random_ids(n, vocab, n + prompts.size()));
  for (size_t i = 0; i < lengths.size(); ++i) {
    slots.push_back(static_cast<int32_t>((i * 59 + 2) % lengths.size()));
    e.open(slots.back(), greedy());
    requests.push_back({slots.back(), prompts[i], true});
  }
  std::vector<float> all;
  const auto keep = [&] {
    EXPECT_EQ(e.receive().size(), lengths.size());
    for (size_t i = 0; i < lengths.size(); ++i) {
      const auto row = e.logits(static_cast<int64_t>(i));
      all.insert(all.end(), row.begin(), row.end());
    }
  };
  EXPECT_TRUE(e.prefill(requests));
  keep();
  e.step(slots);
  keep();
  return all;
}

struct ShortCase {
  const char* name;
  const char* family;
  DType weights;
  double limit;
};

TEST_P(EngineTest, ShortPrefillsFilledUpGiveTheSame) {
  constexpr double kOf16Bits = 0.1;
  for (const ShortCase& c : {ShortCase{"Mamba-1", "mamba1", DType::f32, kRounding},
                             {"Mamba-1, bf16", "mamba1", DType::bf16, kOf16Bits},
                             {"Falcon-Mamba", "falcon-mamba", DType::f32, kRounding},
                             {"Mamba-2", "mamba2", DType::f32, kRounding},
                             {"Mamba-2, bf16", "mamba2", DType::bf16, kOf16Bits}}) {
    SCOPED_TRACE(c.name);
    ModelConfig m = tiny_config();
    m.family = c.family;
    m.d_model = 32;
    m.d_inner = 64;
    if (m.family == "falcon-mamba") m.mixer_norm_eps = 1e-6F;
    if (m.family == "mamba2") {
      m.d_inner = 128;
      m.d_state = 64;
      m.n_head = 2;
      m.head_dim = 64;
      m.n_group = 1;
      m.mixer_norm_eps = 1e-5F;
    }
    const LoadedModel model =
        load(GetParam(), m, std::make_unique<MemoryCheckpoint>(tiny_checkpoint(m)), c.weights);
    EngineOptions options;
    options.n_slot = 11;
    options.poison = true;
    options.short_prefill = 0;
    Engine plain(*model.model, *model.op, options);
    options.short_prefill = 700;
    Engine filled(*model.model, *model.op, options);
    for (const std::vector<size_t>& lengths :
         std::vector<std::vector<size_t>>{{1},
                                          {2},
                                          {17},
                                          {16},
                                          {100},
                                          {300},
                                          {640},
                                          {700},
                                          {701},
                                          {1, 1, 1},
                                          {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
                                          {1, 2},
                                          {3, 1, 40},
                                          {5, 70, 1, 33, 64},
                                          {200, 1, 1, 1, 1, 1, 1, 1, 200}}) {
      const auto want = short_prefill(plain, m.vocab_size, lengths);
      const auto first = short_prefill(filled, m.vocab_size, lengths);
      EXPECT_TRUE(near_std(first, want, c.limit))
          << lengths.size() << " prompts, the first of " << lengths[0];
      for (int i = 1; i < times_; ++i) {
        EXPECT_EQ(short_prefill(filled, m.vocab_size, lengths), first)
            << lengths.size() << " prompts, the first of " << lengths[0];
      }
    }
  }
}

TEST_P(EngineTest, ShortPrefillsOfManyShapes) {
  // More shapes than a backend remembers, and the first ones again.
  EngineOptions options;
  options.n_slot = 56;
  options.short_prefill = 256;
  Engine e = engine(options);
  std::map<std::pair<size_t, size_t>, std::vector<float>> first;
  const auto feed = [&](size_t n_seq, size_t n) {
    std::vector<size_t> lengths(n_seq, 1);
    lengths[0] = n - n_seq + 1;
    std::vector<float>& want = first[{n_seq, n}];
    for (int i = 0; i < times_; ++i) {
      const auto got = short_prefill(e, vocab_, lengths);
      if (want.empty()) want = got;
      EXPECT_EQ(got, want) << n_seq << " prompts, " << n << " tokens";
    }
  };
  for (const size_t n_seq : {1U, 2U, 3U, 5U, 9U, 17U, 25U, 33U, 41U, 49U, 1U}) {
    for (size_t n = 64; n <= 256; n += 16) feed(n_seq, n);
  }
}

TEST_P(EngineTest, ShortPrefillsOneAfterTheOther) {
  // Nothing comes between, so the second is captured; without and with a draw.
  EngineOptions options;
  options.short_prefill = 64;
  Engine e = engine(options);
  const auto ids = prompt(50);
  e.keep_logits(true);
  e.open(0, greedy());
  e.prefill(0, ids);
  (void)e.receive();
  const auto want = copy(e.logits());
  std::optional<std::vector<float>> first;
  for (int i = 0; i < 4; ++i) {
    e.open(0, greedy());
    EXPECT_TRUE(e.prefill(0, std::span(ids).first(20), /*sample=*/false));
    EXPECT_TRUE(e.prefill(0, std::span(ids).subspan(20, 20), /*sample=*/false));
    EXPECT_TRUE(throws(ErrorKind::runtime, "receive", [&] { (void)e.receive(); }));
    e.prefill(0, std::span(ids).subspan(40));
    (void)e.receive();
    const auto got = copy(e.logits());
    if (!first) first = got;
    EXPECT_EQ(got, *first);
    EXPECT_TRUE(near_std(got, want, kRounding));
  }
  for (int i = 0; i < 4; ++i) {
    e.open(0, greedy());
    e.prefill(0, ids);
    (void)e.receive();
    EXPECT_EQ(copy(e.logits()), want);
  }
}

TEST(EngineStepRows, AreFew) {
  std::set<int64_t> sizes;
  for (int64_t n = 1; n <= 1024; ++n) {
    const int64_t rows = Engine::step_rows(n);
    EXPECT_GE(rows, n);
    EXPECT_LE(rows, n + std::max<int64_t>(n - 1, 7));
    EXPECT_GE(rows, Engine::step_rows(n - (n > 1 ? 1 : 0)));
    sizes.insert(rows);
  }
  EXPECT_LE(sizes.size(), 50U);
}

TEST_P(EngineTest, SlotsAndTheirOrderChangeNoBit) {
  Engine a = engine_of_slots(3);
  const auto want = batch_logits(a, {0, 1, 2}, {0, 1, 2}, vocab_);
  EXPECT_EQ(batch_logits(a, {0, 1, 2}, {2, 0, 1}, vocab_), want);
  Engine b = engine_of_slots(9);
  EXPECT_EQ(batch_logits(b, {7, 0, 4}, {1, 2, 0}, vocab_), want);
}

TEST_P(EngineTest, TheSameRunTwiceIsEqualToTheBit) {
  Engine a = engine_of_slots(4);
  const auto want = batch_logits(a, {0, 1, 2, 3}, {0, 1, 2, 3}, vocab_);
  EXPECT_EQ(batch_logits(a, {0, 1, 2, 3}, {0, 1, 2, 3}, vocab_), want);
  Engine b = engine_of_slots(4);
  EXPECT_EQ(batch_logits(b, {0, 1, 2, 3}, {0, 1, 2, 3}, vocab_), want);
}

TEST_P(EngineTest, FreeSlotsAreNeverRead) {
  Engine clean = engine_of_slots(8);
  const auto want = batch_logits(clean, {1, 6, 3}, {0, 1, 2}, vocab_);
  Engine poisoned = engine_of_slots(8, /*poison=*/true);
  EXPECT_EQ(batch_logits(poisoned, {1, 6, 3}, {0, 1, 2}, vocab_), want);
}

TEST_P(EngineTest, AReusedSlotStartsClean) {
  SampleParams params = stream(3);
  params.repeat_penalty = 1.3F;
  const LogitBias bias{{5, 4.0F}};
  Engine fresh = engine();
  fresh.open(0, params);
  const auto want = generate(fresh, 0, prompt(20), 40);

  Engine used = engine();
  used.open(0, stream(9), bias);
  (void)generate(used, 0, prompt(33, 2), 25);
  used.open(0, params);
  EXPECT_EQ(generate(used, 0, prompt(20), 40), want);
}

TEST_P(EngineTest, StepsMayRunAheadOfReceiving) {
  Engine e = engine();
  e.open(0, stream(0));
  const auto want = generate(e, 0, prompt(5), 8);
  e.open(0, stream(0));
  e.prefill(0, prompt(5));
  for (int i = 0; i < 7; ++i) e.step({{0}});
  EXPECT_TRUE(throws(ErrorKind::runtime, "receive", [&] { e.step({{0}}); }));
  EXPECT_TRUE(throws(ErrorKind::runtime, "receive", [&] { e.prefill(0, prompt(1)); }));
  std::vector<int32_t> got;
  for (int i = 0; i < 8; ++i) got.push_back(e.receive()[0]);
  EXPECT_EQ(got, want);
}

TEST_P(EngineTest, ASequenceGoesOnWithMoreText) {
  // prompt, 3 tokens of which the last was not fed, more text: as if all had been one prompt.
  Engine e = engine();
  std::vector<int32_t> text = prompt(10);
  e.open(0, greedy());
  const auto new_ids = generate(e, 0, text, 3);
  const auto more = prompt(6, 2);
  e.prefill(0, more);
  const int32_t next = e.receive()[0];

  text.insert(text.end(), new_ids.begin(), new_ids.end() - 1);
  text.insert(text.end(), more.begin(), more.end());
  e.open(0, greedy());
  e.prefill(0, text);
  EXPECT_EQ(e.receive()[0], next);
}

TEST_P(EngineTest, SinkGetsTheRowsItAskedFor) {
  EngineOptions options;
  options.prefill_chunk = 8;
  Engine e = engine(options);
  const auto ids = prompt(20);
  const auto all = all_logits(e, vocab_, ids);
  std::vector<std::pair<int64_t, int64_t>> calls;
  std::vector<float> last;
  const LogitsSink sink = [&](int64_t first, int64_t n, const float* rows) {
    calls.emplace_back(first, n);
    last.assign(rows, rows + vocab_);
  };
  e.open(0, greedy());
  e.prefill(0, ids, /*sample=*/true, sink, /*last_only=*/true);
  EXPECT_THAT(calls, ElementsAreArray({std::pair<int64_t, int64_t>{19, 1}}));
  EXPECT_TRUE(near_std(last, std::span(all).last(static_cast<size_t>(vocab_)), kRounding));
  // Positions go on where the sequence stands: one step fed position 20.
  e.step({{0}});
  (void)e.receive();
  (void)e.receive();
  calls.clear();
  e.prefill(0, prompt(1), /*sample=*/false, sink);
  EXPECT_THAT(calls, ElementsAreArray({std::pair<int64_t, int64_t>{21, 1}}));
}

TEST_P(EngineTest, CancelStopsBetweenChunks) {
  EngineOptions options;
  options.prefill_chunk = 4;
  Engine e = engine(options);
  e.open(0, greedy());
  int asked = 0;
  EXPECT_FALSE(e.prefill(0, prompt(100), true, {}, false, [&] { return ++asked == 3; }));
  EXPECT_EQ(asked, 3);
  EXPECT_TRUE(throws(ErrorKind::runtime, "", [&] { e.step({{0}}); }));
  EXPECT_TRUE(throws(ErrorKind::runtime, "", [&] { (void)e.receive(); }));
  e.open(0, greedy());
  EXPECT_TRUE(e.prefill(0, prompt(100), true, {}, false, [] { return false; }));
  (void)e.receive();
}

TEST_P(EngineTest, LogitBiasForbidsAndForces) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  Engine e = engine();
  e.keep_logits(true);
  e.open(0, greedy());
  e.prefill(0, prompt(9));
  const int32_t best = e.receive()[0];
  const auto logits = copy(e.logits());
  e.open(0, greedy(), {{best, kNever}});
  e.prefill(0, prompt(9));
  EXPECT_NE(e.receive()[0], best);
  EXPECT_EQ(copy(e.logits()), logits) << "logits are those before the bias";
  e.open(0, greedy(), {{77, 1e6F}});
  EXPECT_THAT(generate(e, 0, prompt(9), 5), Each(77));
}

TEST_P(EngineTest, PaddingAndIdsPastTheLimitAreNeverSampled) {
  // Rows from 60 on, padding included, get the largest logits by far.
  const ModelConfig config = tiny_config();
  auto checkpoint = std::make_unique<MemoryCheckpoint>(tiny_checkpoint(config));
  checkpoint->put("lm_head.weight", {config.vocab_rows, config.d_model},
                  std::vector<float>(static_cast<size_t>(config.vocab_rows * config.d_model)));
  float* head = checkpoint->values("lm_head.weight");
  const float* embedding = checkpoint->values("backbone.embedding.weight");
  for (int64_t i = 0; i < config.vocab_rows * config.d_model; ++i) {
    head[i] = embedding[i] * static_cast<float>(i / config.d_model >= 60 ? 1000 : 1);
  }
  const LoadedModel m = load(GetParam(), config, std::move(checkpoint));
  EngineOptions options;
  for (const int64_t limit : {101, 60, 1}) {
    options.vocab_limit = limit;
    Engine e(*m.model, *m.op, options);
    for (const float temperature : {0.0F, 5.0F}) {
      SampleParams p;
      p.temperature = temperature;
      e.open(0, p);
      EXPECT_THAT(generate(e, 0, prompt(4), 100), Each(Lt(limit)));
    }
    EXPECT_TRUE(throws(ErrorKind::usage, "logit bias", [&] {
      e.open(0, greedy(), {{static_cast<int32_t>(limit), 1.0F}});
    }));
  }
}

TEST_P(EngineTest, PromptTokensCountAsSeen) {
  // The window of seen tokens runs over prompt, sampled tokens and later text alike. The oracle
  // takes the engine's own logits and the definition of the presence penalty.
  for (const int32_t last_n : {0, 1, 5, 30, -1}) {
    SampleParams p = greedy();
    p.presence_penalty = 1000;
    p.repeat_last_n = last_n;
    EngineOptions options;
    options.max_seen_window = 40;
    Engine e = engine(options);
    e.keep_logits(true);
    e.open(0, p);
    std::vector<int32_t> seen;
    const auto expect_next = [&] {
      const int32_t token = e.receive()[0];
      const auto logits = e.logits();
      const size_t window = last_n < 0 ? 40 : static_cast<size_t>(last_n);
      const size_t n = std::min(window, seen.size());
      const std::set<int32_t> penalised(seen.end() - static_cast<ptrdiff_t>(n), seen.end());
      int32_t best = 0;
      float top = -std::numeric_limits<float>::infinity();
      for (int32_t v = 0; v < static_cast<int32_t>(logits.size()); ++v) {
        const float l = logits[static_cast<size_t>(v)] - (penalised.contains(v) ? 1000.0F : 0.0F);
        if (l > top) {
          top = l;
          best = v;
        }
      }
      ASSERT_EQ(token, best) << "after " << seen.size() << " tokens, window " << last_n;
      seen.push_back(token);
    };
    const auto feed = [&](const std::vector<int32_t>& ids) {
      e.prefill(0, ids);
      seen.insert(seen.end(), ids.begin(), ids.end());
      expect_next();
    };
    feed(prompt(17));
    for (int i = 0; i < 30; ++i) {
      e.step({{0}});
      expect_next();
    }
    feed(prompt(60, 2));
    for (int i = 0; i < 5; ++i) {
      e.step({{0}});
      expect_next();
    }
  }
}

TEST_P(EngineTest, WrongUseIsASentence) {
  Engine e = engine_of_slots(2);
  const auto fails = [](ErrorKind kind, const std::string& part, auto f) {
    EXPECT_TRUE(throws(kind, part, f));
  };
  fails(ErrorKind::runtime, "slot 0", [&] { e.prefill(0, prompt(1)); });
  fails(ErrorKind::runtime, "slot 2", [&] { e.open(2, greedy()); });
  e.open(0, greedy());
  e.open(1, greedy());
  fails(ErrorKind::usage, "no tokens", [&] { e.prefill(0, {}); });
  fails(ErrorKind::usage, "-1", [&] { e.prefill(0, {{3, -1}}); });
  fails(ErrorKind::usage, "101", [&] { e.prefill(0, {{101}}); });  // a row of padding
  fails(ErrorKind::runtime, "slot 0", [&] { e.step({{0}}); });
  fails(ErrorKind::runtime, "receive", [&] { (void)e.receive(); });
  fails(ErrorKind::runtime, "without sequences", [&] { e.step({}); });
  fails(ErrorKind::runtime, "logits", [&] { (void)e.logits(); });
  fails(ErrorKind::usage, "logit bias", [&] { e.open(0, greedy(), {{101, 1.0F}}); });
  fails(ErrorKind::usage, "64", [&] { e.open(0, greedy(), LogitBias(65, {1, 1.0F})); });
  e.open(0, greedy());
  e.prefill(0, {{100}});
  (void)e.receive();
  fails(ErrorKind::runtime, "twice", [&] { e.step({{0, 0}}); });
  fails(ErrorKind::runtime, "slot 1", [&] { e.step({{0, 1}}); });
  fails(ErrorKind::runtime, "slot -1", [&] { e.step({{-1}}); });

  EngineOptions options;
  options.n_slot = 0;
  fails(ErrorKind::usage, "sequences", [&] { (void)engine(options); });
  options = {};
  options.prefill_chunk = -5;
  fails(ErrorKind::usage, "prefill chunk", [&] { (void)engine(options); });
  options = {};
  options.state_dtype = DType::i32;
  fails(ErrorKind::usage, "i32", [&] { (void)engine(options); });
  options = {};
  options.penalties = false;
  Engine plain = engine(options);
  SampleParams p;
  p.repeat_penalty = 1.1F;
  fails(ErrorKind::runtime, "penalties", [&] { plain.open(0, p); });
}

TEST_P(EngineTest, PenaltiesAreOptional) {
  EngineOptions options;
  options.penalties = false;
  options.max_bias = 0;
  Engine without = engine(options);
  Engine with = engine();
  without.open(0, stream(1));
  with.open(0, stream(1));
  EXPECT_EQ(generate(without, 0, prompt(12), 30), generate(with, 0, prompt(12), 30));
}

TEST_P(EngineTest, StateInSixteenBits) {
  // The type of the state is independent of the weights': f32 weights, 16-bit state.
  const auto ids = prompt(64);
  Engine exact = engine();
  const auto want = all_logits(exact, vocab_, ids);
  for (const auto& [dtype, limit] : {std::pair{DType::bf16, 0.1}, {DType::f16, 0.02}}) {
    EngineOptions options;
    options.state_dtype = dtype;
    Engine e = engine(options);
    const auto got = all_logits(e, vocab_, ids, std::vector<size_t>(64, 1));
    EXPECT_TRUE(near_std(got, want, limit)) << dtype_name(dtype);
    EXPECT_GT(compare(got, want).max_abs, 0) << "the state was not rounded";
  }
}

TEST_P(EngineTest, MemoryIsAsPlanned) {
  EngineOptions options;
  options.n_slot = 3;
  options.prefill_chunk = 50;
  Engine e = engine(options);
  const EngineMemory plan =
      plan_memory(model_.model->config(), *model_.op, model_.model->weight_dtype(), options);
  const EngineMemory m = e.memory();
  EXPECT_EQ(m.state, plan.state);
  EXPECT_EQ(m.activations, plan.activations);
  EXPECT_EQ(m.state_per_sequence, plan.state_per_sequence);
  EXPECT_EQ(m.weights, model_.model->weight_bytes());
  EXPECT_EQ(e.prefill_chunk(), 50);
  // 4 bytes * n_layer * d_inner * (d_state + d_conv - 1)
  EXPECT_EQ(m.state_per_sequence, 4U * 2 * 40 * (16 + 3));
  EXPECT_GE(m.state, 3 * m.state_per_sequence);
  (void)all_logits(e, vocab_, prompt(1000));
  EXPECT_EQ(e.memory().activations, m.activations);
}

TEST(EngineMemoryTest, PublishedShapes) {
  // The table of state sizes: f32, K-1 columns of convolution.
  EXPECT_EQ(state_bytes_per_sequence(published_config("130m"), DType::f32, DType::f32), 2801664U);
  EXPECT_EQ(state_bytes_per_sequence(published_config("2.8b"), DType::f32, DType::f32), 24903680U);
}

TEST_P(EngineTest, SlowLongPromptEqualsItsChunks) {
  // Past 65,535 tokens in one chunk.
  const auto ids = prompt(70000);
  EngineOptions whole;
  whole.prefill_chunk = 70000;
  EngineOptions chunked;
  chunked.prefill_chunk = 999;
  Engine a = engine(whole);
  Engine b = engine(chunked);
  const auto vocab = static_cast<size_t>(vocab_);
  std::vector<float> last[2];
  for (auto& [e, out] : {std::pair<Engine*, std::vector<float>*>{&a, &last[0]}, {&b, &last[1]}}) {
    e->open(0, greedy());
    const LogitsSink sink = [&, to = out](int64_t first, int64_t n, const float* rows) {
      EXPECT_EQ(first, 69999);
      EXPECT_EQ(n, 1);
      to->assign(rows, rows + vocab);
    };
    e->prefill(0, ids, /*sample=*/false, sink, /*last_only=*/true);
  }
  EXPECT_TRUE(near_std(last[1], last[0], kRounding));
}

/// Resident bytes of this process.
int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t pages = 0;
  statm >> pages >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

TEST_P(EngineTest, SlowHundredThousandTokensWithoutGrowth) {
  Engine e = engine_of_slots(2);
  SampleParams p = stream(0);
  p.repeat_penalty = 1.1F;
  e.open(0, p);
  e.open(1, stream(1));
  e.prefill(0, prompt(10));
  e.prefill(1, prompt(10));
  const std::vector<int32_t> slots{0, 1};
  (void)e.receive();
  (void)e.receive();
  const auto run = [&](int n) {
    for (int i = 0; i < n; ++i) {
      e.step(slots);
      (void)e.receive();
    }
  };
  run(1000);
  const int64_t before = resident_bytes();
  run(50000);  // of two sequences
  const int64_t growth = resident_bytes() - before;
  std::printf("growth over 100,000 tokens: %lld bytes\n", static_cast<long long>(growth));
  EXPECT_LE(growth, 256 << 10);
}

TEST_P(EngineTest, SlowMillionTokenPromptInConstantMemory) {
  Engine e = engine();
  const std::vector<int32_t> ids = prompt(1000000);
  e.open(0, greedy());
  // A shorter prompt whose last chunk is as long as the long one's: what is set up on first use is.
  e.prefill(0, std::span(ids).first(213568));
  EXPECT_LT(e.receive()[0], vocab_);
  const int64_t before = resident_bytes();
  e.prefill(0, ids);
  EXPECT_LT(e.receive()[0], vocab_);
  const int64_t growth = resident_bytes() - before;
  std::printf("growth over a million tokens: %lld bytes\n", static_cast<long long>(growth));
  EXPECT_LE(growth, 1 << 20);
}

INSTANTIATE_TEST_SUITE_P(Backends, EngineTest, ::testing::ValuesIn(kBackends),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace krait::test
