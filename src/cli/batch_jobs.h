// From a request of a batch to a job of the engine: the line's own settings, the flags, and what
// the model's files say, in this order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/batch_flags.h"
#include "cli/batch_input.h"
#include "cli/batch_request.h"
#include "cli/chat.h"
#include "cli/session.h"
#include "runtime/continuous.h"

namespace krait {

/// Turns lines into jobs, by what the flags and the model's files say.
class JobMaker {
 public:
  JobMaker(const BatchFlags& flags, const Session& session);

  [[nodiscard]] BatchRules rules() const;
  /// Error usage: a request that this model cannot answer.
  void check(const BatchRequest& r) const;

  /// The job of line `line`. Error usage: as check(), where it takes the tokens to see it.
  [[nodiscard]] BatchJob make(const BatchRequest& r, int64_t line) const;

  /// Adds a line to what the engines must have room for.
  void survey(const BatchRequest& r, int64_t line, Survey& s) const;

  /// The ids that all examples begin with, of those of `text`.
  [[nodiscard]] std::vector<int32_t> prefix_ids(BatchText text, const Survey& s) const;

 private:
  [[nodiscard]] SampleParams params(const BatchRequest& r, int64_t line) const;
  [[nodiscard]] int64_t max_tokens(const BatchRequest& r) const;
  [[nodiscard]] int64_t n_bias(const BatchRequest& r) const;
  [[nodiscard]] int n_logprobs(const BatchRequest& r) const;
  [[nodiscard]] std::vector<int32_t> encode(const BatchText& text) const;
  [[nodiscard]] std::vector<int32_t> encode_chat(const BatchRequest& r) const;

  const BatchFlags& flags_;
  const Session& session_;
  SampleParams defaults_;
  LogitBias bias_;
  int64_t max_tokens_;  ///< of a line that does not say
  std::vector<int32_t> eos_;
  uint64_t base_seed_ = 0;
  std::optional<Chat> chat_;
  std::string why_no_chat_;
};

}  // namespace krait
