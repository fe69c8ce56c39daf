// The engine moves sequences through a model: it owns the state slots, the step's activations and
// the sampling state, splits prompts into chunks, and launches decode steps ahead of their reading.
//
// A sequence is a slot. prefill() and step() launch work and end by sampling one token for each of
// their sequences; receive() hands these tokens back in the order of the launches. A caller who
// launches the next step before it receives the last token keeps the device busy:
//
//   engine.open(slot, params); engine.prefill(slot, prompt);
//   for (;;) { engine.step({slot}); token = engine.receive(); ... }
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "model/model.h"

namespace krait {

struct EngineOptions {
  int64_t n_slot = 1;              ///< sequences that can be open at once
  int64_t prefill_chunk = 0;       ///< tokens per prefill step; 0: chosen by the backend
  DType state_dtype = DType::f32;  ///< of the ssm state
  Rounding state_rounding = Rounding::nearest;  ///< of an ssm state in 16 bits, in steps
  bool penalties = true;  ///< keep token counts, so that penalties can be used
  int64_t max_seen_window =
      4096;                 ///< largest repeat_last_n that is honoured; -1 in params means this
  int64_t max_bias = 64;    ///< largest number of logit biases per sequence
  int64_t vocab_limit = 0;  ///< tokens from here on are never sampled; 0: the model's vocab_size
  /// Fill steps up with padding rows to one of a few sizes (Engine::step_rows), for callers whose
  /// number of sequences changes often: a backend remembers the launches of each size.
  bool pad_steps = false;
  /// Prefills of up to so many tokens in all, without scores or a sink, may be remembered too; the
  /// shortest are filled up for that. 0: none, -1: chosen by the backend.
  int64_t short_prefill = -1;
  bool scoring = false;  ///< room for PrefillRequest::targets
  bool poison = false;   ///< starts all memory as NaN, so that a read of a free slot shows
};

/// Bytes of device memory by use, as `inspect` and the statistics line report them.
struct EngineMemory {
  size_t weights = 0;
  size_t state = 0;
  size_t activations = 0;  ///< with logits and the state of sampling
  size_t state_per_sequence = 0;
};

/// The memory that an engine with `options` would take on the device of `op`, without making one,
/// for weights of type `weights` (whose own bytes are left 0). `config` is that of
/// resolve_config().
[[nodiscard]] EngineMemory plan_memory(const ModelConfig& config, const Ops& op, DType weights,
                                       const EngineOptions& options);

/// The prefill chunk that an engine takes when none is asked for, with weights of type `weights`.
/// On a GPU large chunks fill the device better: as many tokens as a gigabyte of activations holds,
/// between 4,096 and 32,768. H100, twice the tokens of half a gigabyte: 130m 2.2%, 370m 1.4%, 1.4b
/// 1.6%, mamba2-2.7b 1.1%, 2.8b 0.4% faster at 32,768.
[[nodiscard]] int64_t default_prefill_chunk(const ModelConfig& config, const Ops& op,
                                            DType weights);

/// Logits of consecutive positions of the sequence (0 is the first token after open), on the host:
/// rows f32 [n_rows, vocab_size], valid during the call.
using LogitsSink = std::function<void(int64_t first_position, int64_t n_rows, const float* rows)>;

using LogitBias = std::vector<std::pair<int32_t, float>>;

/// Tokens for one sequence of a packed prefill.
struct PrefillRequest {
  int32_t slot = 0;
  std::span<const int32_t> ids;
  bool sample = true;  ///< draw a token after the last of them; false: more will follow
  /// targets[i], unless negative, is the token whose log-probability after ids[i] is wanted. Empty:
  /// none. Only with EngineOptions::scoring.
  std::span<const int32_t> targets = {};
};

/// What a target of PrefillRequest brought.
struct TokenScore {
  float logprob = 0;  ///< natural logarithm, from the softmax of the logits
  int32_t best = 0;   ///< the likeliest token there
};

/// The scores of one request's next targets, in their order.
using ScoreSink = std::function<void(size_t request, std::span<const TokenScore> scores)>;

class Engine {
 public:
  Engine(const Model& model, Ops& op, const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Starts an empty sequence in `slot`: zero state, position 0. Errors: usage when there are more
  /// biases than max_bias or an id outside the vocabulary.
  void open(int slot, const SampleParams& params, const LogitBias& bias = {});

  /// Feeds `ids` to the sequence; then samples a token unless `sample` is false. With `sink`, hands
  /// over the logits of every position (or of the last alone, `last_only`). `cancelled`, asked
  /// between chunks, ends the call early with false. Exactly `ids` are fed: a token that was
  /// sampled but not yet fed by step() is not among them unless the caller puts it there. Errors:
  /// usage when an id is outside the vocabulary, or ids is empty.
  bool prefill(int slot, std::span<const int32_t> ids, bool sample = true,
               const LogitsSink& sink = {}, bool last_only = false,
               const std::function<bool()>& cancelled = {});

  /// The same for several sequences, packed without padding into chunks of at most prefill_chunk
  /// tokens: a chunk may end some prompts and begin others. The tokens of all requests that sample
  /// are one launch to receive, in the order of the requests. Each slot may occur once. `scores`
  /// gets those of the targets, chunk by chunk, which waits for the chunk.
  bool prefill(std::span<const PrefillRequest> requests, const ScoreSink& scores = {},
               const std::function<bool()>& cancelled = {});

  /// Feeds slot `to`, which is open, what was fed to slot `from`, by copying its state. Of neither
  /// may a token have been sampled since it was opened.
  void copy(int from, int to);

  /// Each slot feeds the token it sampled last and samples the next. Launches only. At most 8
  /// launches may be waiting for receive().
  void step(std::span<const int32_t> slots);
  /// Rows that a step of n sequences has with EngineOptions::pad_steps, unless n_slot is less.
  [[nodiscard]] static int64_t step_rows(int64_t n);

  /// Waits for the oldest prefill or step not yet received and returns its tokens, in the order of
  /// its slots; valid until the next call.
  [[nodiscard]] std::span<const int32_t> receive();

  /// Logits of row `row` of the latest launch, before penalties: f32 [vocab_size] on the host.
  /// Waits for it. Only with keep_logits(true), which must be set before the launch.
  void keep_logits(bool keep);
  [[nodiscard]] std::span<const float> logits(int64_t row = 0);

  [[nodiscard]] EngineMemory memory() const noexcept;
  [[nodiscard]] int64_t prefill_chunk() const noexcept;

 private:
  bool prefill_packed(std::span<const PrefillRequest> requests, const ScoreSink& scores,
                      const LogitsSink& sink, bool last_only,
                      const std::function<bool()>& cancelled);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace krait
