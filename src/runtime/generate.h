// Generation of one text: the loop between the engine's tokens and the caller's callback. It keeps
// the device one step ahead of the host, decodes as it goes, and decides when to stop. It knows no
// command line and prints nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/engine.h"
#include "tokenizer/tokenizer.h"

namespace krait {

/// What generation needs of an engine, for one sequence. EngineSource is the real one; tests bring
/// their own.
class TokenSource {
 public:
  virtual ~TokenSource() = default;
  /// Launches the prompt and the draw of the first token; false if `cancelled` ended it early.
  virtual bool prefill(std::span<const int32_t> ids, const std::function<bool()>& cancelled) = 0;
  virtual void step() = 0;                      ///< launches the next token
  [[nodiscard]] virtual int32_t receive() = 0;  ///< waits for the oldest token not yet received
  /// The logits that the latest launch drew from, before penalties; [vocab_size]. Asked for only
  /// when `n_logprobs` >= 0.
  [[nodiscard]] virtual std::span<const float> logits() = 0;
};

/// Slot 0 of an engine.
class EngineSource : public TokenSource {
 public:
  EngineSource(Engine& engine, const SampleParams& params, const LogitBias& bias, bool keep_logits);
  bool prefill(std::span<const int32_t> ids, const std::function<bool()>& cancelled) override;
  void step() override;
  [[nodiscard]] int32_t receive() override;
  [[nodiscard]] std::span<const float> logits() override;

 private:
  Engine& engine_;
};

struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;  ///< natural logarithm, from the softmax of the logits before penalties
};

struct GeneratedToken {
  int32_t id = 0;
  std::string_view text;  ///< what may be shown now; may lag behind the token, or be empty
  float logprob = 0;
  std::vector<TokenLogprob> top;  ///< the n_logprobs likeliest, likeliest first
};

enum class FinishReason { eos, stop, length, cancelled };

struct GenerateOptions {
  int64_t max_new_tokens = -1;   ///< -1: until something else ends the text
  std::vector<int32_t> eos_ids;  ///< ids that end the text
  std::vector<std::string> stops;
  int n_logprobs = -1;    ///< -1: none; 0: of the drawn token alone
  bool at_start = false;  ///< nothing was written before (StreamDecoder)
};

struct GenerateResult {
  std::vector<int32_t> ids;  ///< every token drawn, the end-of-text token included
  std::string text;          ///< without the end-of-text token or the stop string
  FinishReason finish = FinishReason::length;
  double prompt_seconds = 0;    ///< until the first token was here
  double generate_seconds = 0;  ///< from then until the last one was
};

/// The text of one sequence, token by token: complete characters only, and no stop string.
class TextBuilder {
 public:
  /// `tokenizer` may be null: then there is no text, and no stop.
  TextBuilder(const Tokenizer* tokenizer, const std::vector<std::string>& stops, bool at_start);
  /// The text that may be shown now.
  [[nodiscard]] std::string push(int32_t id);
  /// What was held back, once no more tokens come. It may complete a stop string.
  [[nodiscard]] std::string finish();
  [[nodiscard]] bool stopped() const noexcept { return stops_.stopped(); }

 private:
  std::optional<StreamDecoder> decoder_;
  StopMatcher stops_;
};

/// Generates after `prompt`, which is not empty. `tokenizer` may be null: then the text stays empty
/// and `stops` must be. `on_token` is called for each token in order, and once more at the end,
/// with id -1, if held-back text is left. `cancelled` is asked once per token and between prompt
/// chunks.
[[nodiscard]] GenerateResult generate(
    TokenSource& source, const Tokenizer* tokenizer, std::span<const int32_t> prompt,
    const GenerateOptions& options, const std::function<void(const GeneratedToken&)>& on_token = {},
    const std::function<bool()>& cancelled = {});

/// log_softmax(logits)[id] for the drawn token and for the n largest logits. Ties go to the lower
/// id.
[[nodiscard]] float log_probability(std::span<const float> logits, int32_t id);
[[nodiscard]] std::vector<TokenLogprob> top_log_probabilities(std::span<const float> logits, int n);

}  // namespace krait
