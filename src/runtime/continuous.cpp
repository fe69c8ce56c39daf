#include "runtime/continuous.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <limits>
#include <memory>
#include <unordered_map>

#include "runtime/scheduler.h"

namespace krait {

namespace {

using Clock = std::chrono::steady_clock;

/// Shorter prefixes cost more to copy than to prefill.
constexpr size_t kShortestPrefix = 8;
/// Slots below which sharing a prompt between choices is not worth a slot of its own.
constexpr int64_t kSlotsForParents = 4;

/// A job at work.
struct Job {
  BatchJob job;
  std::vector<BatchChoice> choices;
  std::vector<int32_t> targets;  ///< of scoring, one for each token fed
  std::vector<TokenScore> scores;
  int64_t n_shared = 0;
  int choices_left = 0;
  bool started = false;
  Clock::time_point start;
};

/// A sequence of the scheduler: a choice of a job, or a prompt that choices begin with.
struct Sequence {
  std::shared_ptr<Job> job;  ///< null: the shared prefix
  std::span<const int32_t> ids;
  std::span<const int32_t> targets;
  int choice = -1;  ///< -1: draws nothing
  std::optional<TextBuilder> text;
};

class Run {
 public:
  Run(Engine& engine, const Tokenizer* tokenizer, const ContinuousOptions& options, BatchJobs& jobs,
      const std::function<void(BatchResult)>& on_result, BatchProgress& progress)
      : engine_(engine),
        tokenizer_(tokenizer),
        options_(options),
        jobs_(jobs),
        on_result_(on_result),
        progress_(progress),
        scheduler_({options.n_slot, engine.prefill_chunk()}) {
    if (options.prefix.size() < kShortestPrefix || options.n_slot < 2) return;
    prefix_ = next_id_++;
    Sequence s;
    s.ids = options.prefix;
    submit(prefix_, std::move(s), {.n_children = std::numeric_limits<int64_t>::max()});
  }

  ~Run() { progress_.running = progress_.waiting = 0; }

  bool run(const std::function<bool()>& cancelled) {
    for (;;) {
      if (cancelled && cancelled()) {
        while (!launches_.empty()) discard();
        return false;
      }
      if (!take()) return true;
      const size_t before = launches_.size();
      const Scheduler::Plan plan = scheduler_.next();
      launch(plan);
      // The plan before this one is read while this one runs; when there is nothing left to launch,
      // everything is read.
      for (size_t n = plan.empty() ? launches_.size() : before; n > 0 && !launches_.empty(); --n) {
        deliver();
      }
      progress_.running = scheduler_.running() - (prefix_ >= 0 ? 1 : 0);
      progress_.waiting = scheduler_.waiting();
    }
  }

 private:
  /// Fills the queue; false when all is done.
  bool take() {
    // Enough to fill the free slots, and a few to choose from; and no more prompts than the next
    // two plans can prefill, because another engine may be short of work: so engines share a file
    // by how fast they read it, not by who comes first.
    const auto enough = [&] {
      const int64_t n_free = scheduler_.n_slot() - scheduler_.running();
      return scheduler_.waiting() >= n_free + scheduler_.n_slot() / 8 + 8 ||
             scheduler_.waiting_tokens() >= 2 * engine_.prefill_chunk();
    };
    while (!enough()) {
      const bool idle = jobs_at_work_ == 0 && launches_.empty();
      std::optional<BatchJob> job = jobs_.take(idle);
      if (!job && idle) return false;
      if (!job) break;
      add(std::move(*job));
    }
    return true;
  }

  void submit(int64_t id, Sequence sequence, SequenceSpec spec) {
    spec.n_prompt = std::ssize(sequence.ids);
    scheduler_.submit(id, spec);
    sequences_.emplace(id, std::move(sequence));
  }

  void add(BatchJob wanted) {
    auto job = std::make_shared<Job>();
    job->job = std::move(wanted);
    const BatchJob& j = job->job;
    ++jobs_at_work_;
    const bool scoring = j.score_from > 0;
    job->choices.resize(scoring ? 0 : static_cast<size_t>(j.n));
    if (!scoring && j.max_new_tokens == 0) return complete(*job);
    if (j.n_logprobs >= 0) ++logprob_jobs_;

    std::span<const int32_t> ids = j.prompt;
    if (scoring) {
      // Token i + 1 is scored by the logits after token i, so the last one is not fed.
      ids = ids.first(ids.size() - 1);
      job->targets.assign(ids.size(), -1);
      for (size_t i = static_cast<size_t>(j.score_from) - 1; i < ids.size(); ++i) {
        job->targets[i] = j.prompt[i + 1];
      }
    }
    int64_t parent = -1;
    const size_t n_prefix = options_.prefix.size();
    if (prefix_ >= 0 && ids.size() > n_prefix &&
        (!scoring || static_cast<size_t>(j.score_from) > n_prefix) &&
        std::equal(options_.prefix.begin(), options_.prefix.end(), ids.begin())) {
      parent = prefix_;
      ids = ids.subspan(n_prefix);
      job->n_shared = static_cast<int64_t>(n_prefix);
    }
    if (scoring) {
      Sequence s;
      s.job = job;
      s.ids = ids;
      s.targets = std::span<const int32_t>(job->targets).last(ids.size());
      submit(next_id_++, std::move(s), {.max_new = 0, .parent = parent});
      return;
    }
    job->choices_left = j.n;
    if (j.n > 1 && ids.size() >= kShortestPrefix && scheduler_.n_slot() >= kSlotsForParents) {
      // All but the last token once: the draws differ, and each begins with that token's logits.
      Sequence s;
      s.job = job;
      s.ids = ids.first(ids.size() - 1);
      ids = ids.last(1);
      const int64_t id = next_id_++;
      submit(id, std::move(s), {.parent = parent, .n_children = j.n});
      parent = id;
    }
    const bool at_start =
        j.starts_text ||
        (tokenizer_ != nullptr && std::all_of(j.prompt.begin(), j.prompt.end(), [&](int32_t id) {
           return tokenizer_->is_special(id);
         }));
    for (int choice = 0; choice < j.n; ++choice) {
      Sequence s;
      s.job = job;
      s.ids = ids;
      s.choice = choice;
      s.text.emplace(tokenizer_, j.stops, at_start);
      submit(next_id_++, std::move(s), {.max_new = j.max_new_tokens, .parent = parent});
    }
  }

  void launch(const Scheduler::Plan& plan) {
    if (plan.empty()) return;
    const bool want_logits = logprob_jobs_ > 0;
    engine_.keep_logits(want_logits);
    std::vector<PrefillRequest> requests;
    std::vector<int64_t> drawing;
    for (const Scheduler::Piece& p : plan.prefill) {
      const Sequence& s = sequences_.at(p.id);
      if (p.begin == 0) open(p, s);
      const auto part = [&](std::span<const int32_t> all) {
        return all.empty() ? all
                           : all.subspan(static_cast<size_t>(p.begin), static_cast<size_t>(p.n));
      };
      requests.push_back({p.slot, part(s.ids), p.draws, part(s.targets)});
      if (p.draws) drawing.push_back(p.id);
    }
    if (!requests.empty()) {
      engine_.prefill(requests, [&](size_t request, std::span<const TokenScore> scores) {
        std::vector<TokenScore>& all = sequences_.at(plan.prefill[request].id).job->scores;
        all.insert(all.end(), scores.begin(), scores.end());
      });
      ++progress_.prefill_calls;
    }
    for (const Scheduler::Piece& p : plan.prefill) {
      progress_.prompt_tokens += p.n;
      const auto it = sequences_.find(p.id);
      if (!p.ends || p.draws || p.id == prefix_) continue;
      const std::shared_ptr<Job> job = it->second.job;  // scored, or a prompt for its choices
      sequences_.erase(it);
      if (job->job.score_from > 0) complete(*job);
    }
    if (!drawing.empty()) launches_.push_back(std::move(drawing));
    // The logits are those of the latest launch, so with logprobs the next launch waits.
    if (want_logits && !launches_.empty()) deliver_all();

    if (plan.decode.empty()) return;
    std::vector<int32_t> slots;
    std::vector<int64_t> ids;
    for (const Scheduler::Row& r : plan.decode) {
      slots.push_back(r.slot);
      ids.push_back(r.id);
    }
    engine_.step(slots);
    ++progress_.decode_steps;
    progress_.decode_rows += std::ssize(slots);
    launches_.push_back(std::move(ids));
    if (want_logits) deliver_all();
  }

  void open(const Scheduler::Piece& p, const Sequence& s) {
    if (s.job != nullptr && !s.job->started) {
      s.job->started = true;
      s.job->start = Clock::now();
    }
    if (s.choice >= 0) {
      SampleParams params = s.job->job.params;
      params.sequence += static_cast<uint64_t>(s.choice);
      engine_.open(p.slot, params, s.job->job.bias);
    } else {
      engine_.open(p.slot, SampleParams{});
    }
    if (p.copy_from >= 0) engine_.copy(p.copy_from, p.slot);
  }

  std::span<const int32_t> receive() {
    const auto start = Clock::now();
    const std::span<const int32_t> tokens = engine_.receive();
    progress_.wait_ns += (Clock::now() - start).count();
    return tokens;
  }

  void discard() {
    (void)receive();
    launches_.pop_front();
  }

  void deliver_all() {
    while (!launches_.empty()) deliver();
  }

  /// Reads the oldest launch.
  void deliver() {
    const std::span<const int32_t> tokens = receive();
    const std::vector<int64_t> ids = std::move(launches_.front());
    launches_.pop_front();
    for (size_t row = 0; row < ids.size(); ++row) {
      const auto it = sequences_.find(ids[row]);
      if (it == sequences_.end()) continue;  // ended before this launch was read
      if (!take_token(it->second, tokens[row], static_cast<int64_t>(row))) continue;
      const Sequence s = std::move(it->second);
      sequences_.erase(it);
      scheduler_.finish(ids[row]);
      if (--s.job->choices_left == 0) complete(*s.job);
    }
  }

  /// True if this token ends the sequence.
  bool take_token(Sequence& s, int32_t id, int64_t row) {
    const BatchJob& job = s.job->job;
    BatchChoice& choice = s.job->choices[static_cast<size_t>(s.choice)];
    choice.ids.push_back(id);
    ++progress_.generated_tokens;
    if (job.n_logprobs >= 0) {
      const std::span<const float> logits = engine_.logits(row);
      choice.tokens.push_back(
          {id, log_probability(logits, id), top_log_probabilities(logits, job.n_logprobs)});
    }
    bool ends = true;
    if (std::find(job.eos_ids.begin(), job.eos_ids.end(), id) != job.eos_ids.end()) {
      choice.finish = FinishReason::eos;
    } else {
      choice.text += s.text->push(id);
      if (s.text->stopped()) {
        choice.finish = FinishReason::stop;
      } else if (std::ssize(choice.ids) == job.max_new_tokens) {
        choice.finish = FinishReason::length;
      } else {
        ends = false;
      }
    }
    if (ends && !s.text->stopped()) {
      choice.text += s.text->finish();
      if (s.text->stopped()) choice.finish = FinishReason::stop;
    }
    return ends;
  }

  void complete(Job& job) {
    --jobs_at_work_;
    progress_.prompt_tokens += job.n_shared;
    if (job.job.n_logprobs >= 0 && job.started) --logprob_jobs_;
    BatchResult result;
    result.job = std::move(job.job);
    result.choices = std::move(job.choices);
    result.scores = std::move(job.scores);
    result.n_shared = job.n_shared;
    if (job.started) {
      result.seconds = std::chrono::duration<double>(Clock::now() - job.start).count();
    }
    on_result_(std::move(result));
  }

  Engine& engine_;
  const Tokenizer* tokenizer_;
  const ContinuousOptions& options_;
  BatchJobs& jobs_;
  const std::function<void(BatchResult)>& on_result_;
  BatchProgress& progress_;
  Scheduler scheduler_;
  std::unordered_map<int64_t, Sequence> sequences_;
  std::deque<std::vector<int64_t>> launches_;  ///< whose tokens each brings, oldest first
  int64_t next_id_ = 0;
  int64_t prefix_ = -1;
  int64_t jobs_at_work_ = 0;
  int64_t logprob_jobs_ = 0;
};

}  // namespace

bool run_continuous(Engine& engine, const Tokenizer* tokenizer, const ContinuousOptions& options,
                    BatchJobs& jobs, const std::function<void(BatchResult)>& on_result,
                    const std::function<bool()>& cancelled, BatchProgress& progress) {
  return Run(engine, tokenizer, options, jobs, on_result, progress).run(cancelled);
}

}  // namespace krait
