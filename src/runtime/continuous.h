// Continuous batching: many prompts through one engine, each started as soon as a slot is free and
// finished on its own. It joins the scheduler (what runs next), the engine (which runs it) and the
// text of each sequence (where it ends), and keeps the device one plan ahead of the host. It knows
// no file and no command line.
//
// What a job gives does not depend on what runs beside it: its draws are keyed by its own seed, the
// choice's number and the position.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/engine.h"
#include "runtime/generate.h"
#include "tokenizer/tokenizer.h"

namespace krait {

/// A prompt and what is wanted of it.
struct BatchJob {
  int64_t key = 0;  ///< the caller's
  std::vector<int32_t> prompt;
  int n = 1;  ///< texts; text k is drawn from stream params.sequence + k of the seed
  SampleParams params;
  LogitBias bias;
  int64_t max_new_tokens = -1;  ///< -1: until something else ends the text
  std::vector<int32_t> eos_ids;
  std::vector<std::string> stops;
  int n_logprobs = -1;       ///< -1: none; 0: of the drawn token alone
  bool starts_text = false;  ///< what is drawn begins a text, whatever stands before it
  /// Above 0: nothing is drawn, prompt[score_from ..] is scored. The engine is made for scoring.
  int64_t score_from = 0;
};

struct BatchToken {
  int32_t id = 0;
  float logprob = 0;
  std::vector<TokenLogprob> top;
};

struct BatchChoice {
  std::vector<int32_t> ids;  ///< every token drawn, the end-of-text token included
  std::string text;          ///< without the end-of-text token or the stop string
  FinishReason finish = FinishReason::length;
  std::vector<BatchToken> tokens;  ///< one for each id, where logprobs were asked for
};

struct BatchResult {
  BatchJob job;
  std::vector<BatchChoice> choices;
  std::vector<TokenScore> scores;
  int64_t n_shared = 0;  ///< prompt tokens that came from the shared prefix
  double seconds = 0;    ///< from the first work on the job until its end
};

/// Where jobs come from.
class BatchJobs {
 public:
  virtual ~BatchJobs() = default;
  /// The next job; without `wait` only if there is one now. With `wait`, none means that no more
  /// will come.
  [[nodiscard]] virtual std::optional<BatchJob> take(bool wait) = 0;
};

/// How far a run is; may be read while it lasts.
struct BatchProgress {
  std::atomic<int64_t> prompt_tokens = 0;     ///< fed or copied
  std::atomic<int64_t> generated_tokens = 0;  ///< drawn and kept
  std::atomic<int64_t> running = 0;           ///< sequences with a slot
  std::atomic<int64_t> waiting = 0;           ///< sequences taken, without a slot
  std::atomic<int64_t> decode_steps = 0;
  std::atomic<int64_t> decode_rows = 0;  ///< sequences in these steps
  std::atomic<int64_t> prefill_calls = 0;
  /// Time that the host had nothing to do but wait for tokens: while it waits, the device works.
  std::atomic<int64_t> wait_ns = 0;
};

struct ContinuousOptions {
  int64_t n_slot = 1;           ///< of the engine
  std::vector<int32_t> prefix;  ///< jobs whose prompt begins so get its state copied; may be empty
};

/// Runs until `jobs` has no more or `cancelled`, which is asked once per plan, says so. `on_result`
/// gets each job as it ends; with a cancelled run, unfinished jobs are left out. `tokenizer` may be
/// null: then texts stay empty. Returns false when it was cancelled.
bool run_continuous(Engine& engine, const Tokenizer* tokenizer, const ContinuousOptions& options,
                    BatchJobs& jobs, const std::function<void(BatchResult)>& on_result,
                    const std::function<bool()>& cancelled, BatchProgress& progress);

}  // namespace krait
