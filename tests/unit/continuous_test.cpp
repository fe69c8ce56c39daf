// Continuous batching against each prompt run alone by generate(), on a tiny random model: random
// mixes of lengths, limits, stops, choices, arrivals, slots and chunks.
#include "runtime/continuous.h"

#include <gmock/gmock.h>

#include <deque>
#include <map>
#include <random>

#include "support/piece_tokenizer.h"
#include "support/test_models.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

/// Letters, and bytes that are only together a character.
PieceTokenizer letters(int64_t vocab) {
  std::vector<std::string> pieces{"<end>"};
  while (std::ssize(pieces) < vocab) {
    const auto i = pieces.size();
    pieces.push_back(i % 10 == 3   ? "\xc3"
                     : i % 10 == 4 ? "\xa9"
                                   : std::string(1, static_cast<char>('a' + i % 26)));
  }
  return PieceTokenizer(pieces);
}

/// Hands out a list; now and then it says that there is nothing yet.
class ListOfJobs : public BatchJobs {
 public:
  explicit ListOfJobs(const std::vector<BatchJob>& jobs, uint64_t pauses = 0)
      : jobs_(jobs.begin(), jobs.end()), pauses_(pauses) {}
  std::optional<BatchJob> take(bool wait) override {
    pauses_ = pauses_ * 6364136223846793005ULL + (pauses_ != 0 ? 1442695040888963407ULL : 0);
    if (jobs_.empty() || (!wait && (pauses_ >> 62) != 0)) return std::nullopt;
    BatchJob job = jobs_.front();
    jobs_.pop_front();
    return job;
  }

 private:
  std::deque<BatchJob> jobs_;
  uint64_t pauses_;
};

class ContinuousTest : public ::testing::TestWithParam<Backend> {
 protected:
  void SetUp() override { model_ = load_tiny(GetParam()); }

  [[nodiscard]] int64_t vocab() const { return model_.model->config().vocab_size; }

  struct Shape {
    int64_t n_slot = 4;
    int64_t chunk = 16;
    uint64_t pauses = 0;
    bool pad = false;
    std::vector<int32_t> prefix = {};
  };
  std::map<int64_t, BatchResult> run(const std::vector<BatchJob>& jobs, const Shape& shape) {
    EngineOptions options;
    options.n_slot = shape.n_slot;
    options.prefill_chunk = shape.chunk;
    options.pad_steps = shape.pad;
    options.scoring = true;
    options.poison = true;
    Engine engine(*model_.model, *model_.op, options);
    ListOfJobs list(jobs, shape.pauses);
    std::map<int64_t, BatchResult> results;
    BatchProgress progress;
    EXPECT_TRUE(run_continuous(
        engine, &tokenizer_, {shape.n_slot, shape.prefix}, list,
        [&](BatchResult r) {
          const int64_t key = r.job.key;
          EXPECT_TRUE(results.emplace(key, std::move(r)).second) << "twice: " << key;
        },
        {}, progress));
    EXPECT_EQ(results.size(), jobs.size());
    int64_t prompt_tokens = 0;
    int64_t generated = 0;
    for (const auto& [key, r] : results) {
      for (const BatchChoice& c : r.choices) generated += std::ssize(c.ids);
      prompt_tokens += r.n_shared;
    }
    EXPECT_EQ(progress.generated_tokens, generated);
    EXPECT_GE(progress.prompt_tokens, prompt_tokens);
    return results;
  }

  /// Choice k of the job, alone on a fresh engine.
  GenerateResult alone(const BatchJob& job, int k, std::vector<BatchToken>* tokens = nullptr) {
    Engine engine(*model_.model, *model_.op, EngineOptions{});
    SampleParams params = job.params;
    params.sequence += static_cast<uint64_t>(k);
    EngineSource source(engine, params, job.bias, job.n_logprobs >= 0);
    GenerateOptions o;
    o.max_new_tokens = job.max_new_tokens;
    o.eos_ids = job.eos_ids;
    o.stops = job.stops;
    o.n_logprobs = job.n_logprobs;
    return generate(source, &tokenizer_, job.prompt, o, [&](const GeneratedToken& t) {
      if (tokens != nullptr && t.id >= 0) tokens->push_back({t.id, t.logprob, t.top});
    });
  }

  void expect_like_alone(const std::vector<BatchJob>& jobs, const Shape& shape) {
    const auto results = run(jobs, shape);
    for (const BatchJob& job : jobs) {
      const BatchResult& r = results.at(job.key);
      ASSERT_EQ(std::ssize(r.choices), job.n);
      for (int k = 0; k < job.n; ++k) {
        const BatchChoice& c = r.choices[static_cast<size_t>(k)];
        std::vector<BatchToken> tokens;
        const GenerateResult want = alone(job, k, &tokens);
        EXPECT_EQ(c.ids, want.ids) << "job " << job.key << ", prompt of " << job.prompt.size();
        EXPECT_EQ(c.text, want.text);
        EXPECT_EQ(c.finish, want.finish);
        if (job.n_logprobs < 0) continue;
        ASSERT_EQ(c.tokens.size(), tokens.size());
        for (size_t i = 0; i < tokens.size(); ++i) {
          EXPECT_EQ(c.tokens[i].id, tokens[i].id);
          EXPECT_NEAR(c.tokens[i].logprob, tokens[i].logprob, 1e-4);
          EXPECT_EQ(c.tokens[i].top.size(), tokens[i].top.size());
        }
      }
    }
  }

  [[nodiscard]] BatchJob job(int64_t key, size_t n_prompt, int64_t max_new,
                             float temperature = 0) const {
    BatchJob j;
    j.key = key;
    j.prompt = random_ids(n_prompt, vocab(), static_cast<uint64_t>(key) + 1);
    j.max_new_tokens = max_new;
    j.params.temperature = temperature;
    j.params.seed = static_cast<uint64_t>(key) * 77;
    return j;
  }

  LoadedModel model_;
  PieceTokenizer tokenizer_ = letters(101);
};

TEST_P(ContinuousTest, RandomMixesGiveWhatEachPromptGivesAlone) {
  std::mt19937 random(20);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 8; ++round) {
    std::vector<BatchJob> jobs;
    const bool logprobs = round % 4 == 3;
    for (int i = 0; i < 25; ++i) {
      const size_t length = below(8) == 0 ? 200 + static_cast<size_t>(below(1500))
                                          : 1 + static_cast<size_t>(below(40));
      BatchJob j = job(i, length, below(30), below(3) == 0 ? 1.2F : 0.0F);
      if (below(3) == 0) j.eos_ids = {7, 21};
      if (below(3) == 0) j.stops = {"a", "xyz", "\xc3\xa9"};
      if (below(5) == 0) j.n = 2 + below(4);
      if (below(4) == 0) {
        j.params.repeat_penalty = 1.3F;
        j.params.repeat_last_n = below(30);
      }
      if (below(6) == 0) j.bias = {{5, 3.0F}, {8, -100.0F}};
      if (below(10) == 0) {  // until something ends it
        j.max_new_tokens = -1;
        j.params.temperature = 2;
        for (int32_t id = 0; id < 30; ++id) j.eos_ids.push_back(id);
      }
      if (logprobs && below(2) == 0) j.n_logprobs = below(3);
      jobs.push_back(j);
    }
    Shape shape;
    shape.n_slot = 1 + below(12);
    shape.chunk = 1 + below(round % 2 == 0 ? 40 : 600);
    shape.pauses = static_cast<uint64_t>(round);
    shape.pad = below(2) == 0;
    SCOPED_TRACE(fmt::format("round {}: {} slots, chunks of {}", round, shape.n_slot, shape.chunk));
    expect_like_alone(jobs, shape);
  }
}

TEST_P(ContinuousTest, ASharedPrefixChangesNothing) {
  std::vector<BatchJob> jobs;
  const std::vector<int32_t> prefix = random_ids(37, vocab(), 99);
  for (int i = 0; i < 20; ++i) {
    BatchJob j = job(i, 5, 12, i % 2 == 0 ? 0.0F : 1.0F);
    // Most begin with the prefix; one is the prefix, one a part of it.
    if (i % 5 != 4) j.prompt.insert(j.prompt.begin(), prefix.begin(), prefix.end());
    if (i == 7) j.prompt = prefix;
    if (i == 8) j.prompt.assign(prefix.begin(), prefix.end() - 1);
    if (i % 4 == 1) {
      j.params.repeat_penalty = 1.4F;
      j.params.repeat_last_n = -1;
    }
    if (i % 6 == 2) j.n = 3;
    jobs.push_back(j);
  }
  Shape shape;
  shape.prefix = prefix;
  for (const int64_t n_slot : {1, 2, 3, 5, 16}) {
    shape.n_slot = n_slot;
    expect_like_alone(jobs, shape);
  }
  const auto results = run(jobs, shape);
  EXPECT_EQ(results.at(0).n_shared, 37);
  EXPECT_EQ(results.at(7).n_shared, 0);
  EXPECT_EQ(results.at(4).n_shared, 0);
}

TEST_P(ContinuousTest, ScoresAreThoseOfTheWholePrompt) {
  std::vector<BatchJob> jobs;
  const std::vector<int32_t> prefix = random_ids(30, vocab(), 5);
  for (int i = 0; i < 12; ++i) {
    BatchJob j = job(i, 2 + static_cast<size_t>(i * i), 0);
    if (i % 2 == 0) j.prompt.insert(j.prompt.begin(), prefix.begin(), prefix.end());
    j.score_from = 1 + i % std::max<int64_t>(1, std::ssize(j.prompt) - 1);
    jobs.push_back(j);
  }
  Shape shape;
  shape.prefix = prefix;
  const auto results = run(jobs, shape);
  Engine engine(*model_.model, *model_.op, EngineOptions{});
  for (const BatchJob& j : jobs) {
    const std::vector<float> logits = all_logits(engine, vocab(), j.prompt);
    const auto& scores = results.at(j.key).scores;
    ASSERT_EQ(std::ssize(scores), std::ssize(j.prompt) - j.score_from);
    for (size_t i = 0; i < scores.size(); ++i) {
      const size_t at = static_cast<size_t>(j.score_from) + i;
      const auto row = std::span<const float>(logits).subspan(
          (at - 1) * static_cast<size_t>(vocab()), static_cast<size_t>(vocab()));
      EXPECT_NEAR(scores[i].logprob, log_probability(row, j.prompt[at]), 1e-4);
      EXPECT_EQ(scores[i].best, std::max_element(row.begin(), row.end()) - row.begin());
    }
  }
}

/// Remembers how far an engine takes jobs ahead of what it has fed.
class WatchedJobs : public BatchJobs {
 public:
  WatchedJobs(const std::vector<BatchJob>& jobs, const BatchProgress& progress)
      : list_(jobs), progress_(progress) {}
  std::optional<BatchJob> take(bool wait) override {
    std::optional<BatchJob> job = list_.take(wait);
    if (job) taken_ += std::ssize(job->prompt);
    ahead_ = std::max(ahead_, taken_ - progress_.prompt_tokens);
    return job;
  }
  [[nodiscard]] int64_t ahead() const { return ahead_; }

 private:
  ListOfJobs list_;
  const BatchProgress& progress_;
  int64_t taken_ = 0;
  int64_t ahead_ = 0;
};

/// Engines share a queue by how fast they prefill: none takes all because it has slots for all.
TEST_P(ContinuousTest, TakesNoMoreThanItCanPrefillSoon) {
  constexpr int64_t kChunk = 32;
  constexpr int kPrompt = 20;
  EngineOptions options;
  options.n_slot = 64;
  options.prefill_chunk = kChunk;
  Engine engine(*model_.model, *model_.op, options);
  std::vector<BatchJob> jobs;
  for (int i = 0; i < 60; ++i) jobs.push_back(job(i, kPrompt, 3));
  BatchProgress progress;
  WatchedJobs watched(jobs, progress);
  int done = 0;
  EXPECT_TRUE(run_continuous(
      engine, nullptr, {64, {}}, watched, [&](const BatchResult&) { ++done; }, {}, progress));
  EXPECT_EQ(done, 60);
  // Two chunks that wait, the prompt that goes over, and one that is prefilled by halves.
  EXPECT_LE(watched.ahead(), 2 * kChunk + 2 * kPrompt);
}

TEST_P(ContinuousTest, CancelLeavesWhatIsDone) {
  EngineOptions options;
  options.n_slot = 2;
  Engine engine(*model_.model, *model_.op, options);
  std::vector<BatchJob> jobs;
  for (int i = 0; i < 10; ++i) jobs.push_back(job(i, 4, 5));
  ListOfJobs list(jobs);
  BatchProgress progress;
  std::vector<int64_t> done;
  const bool whole = run_continuous(
      engine, nullptr, {2, {}}, list, [&](const BatchResult& r) { done.push_back(r.job.key); },
      [&] { return done.size() >= 4; }, progress);
  EXPECT_FALSE(whole);
  EXPECT_GE(done.size(), 4U);
  EXPECT_LT(done.size(), 7U);
  // Nothing of the old run is left in the engine.
  engine.open(0, greedy());
  EXPECT_EQ(generate(engine, 0, jobs[0].prompt, 5), alone(jobs[0], 0).ids);
}

INSTANTIATE_TEST_SUITE_P(Backends, ContinuousTest, ::testing::ValuesIn(kBackends),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace krait::test
