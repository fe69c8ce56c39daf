// One line of a batch file as a request: OpenAI's batch form, the simple form, or plain text. Only
// the line is read here; what the flags say fills the rest.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "kernels/ops.h"
#include "runtime/engine.h"

namespace krait {

enum class BatchFormat { automatic, openai, simple, text };

/// Text or token ids.
struct BatchText {
  std::string text;
  std::vector<int32_t> ids;
  bool is_text = true;
  [[nodiscard]] bool empty() const { return is_text ? text.empty() : ids.empty(); }
};

/// A checked line. Empty fields were not given.
struct BatchRequest {
  BatchFormat format = BatchFormat::simple;  ///< what it is answered in; never automatic
  std::string id;                            ///< custom_id, or the simple form's "id"
  bool has_id = false;
  bool id_is_number = false;  ///< and is written back as one
  bool chat = false;
  std::string messages;  ///< of a chat, as JSON: a list of {"role", "content"}
  BatchText prompt;
  std::optional<BatchText> continuation;  ///< of scoring
  std::string model;

  std::optional<int64_t> max_tokens;
  std::optional<float> temperature, top_p, min_p, typical_p;
  std::optional<float> repeat_penalty, presence_penalty, frequency_penalty;
  std::optional<int32_t> top_k, repeat_last_n;
  std::optional<int64_t> seed;
  std::optional<std::vector<std::string>> stops;
  std::optional<bool> ignore_eos;
  std::optional<LogitBias> bias;
  std::optional<int> n_logprobs;
  int n = 1;

  /// The defaults with what the line says in their place.
  [[nodiscard]] SampleParams params(SampleParams defaults) const;
};

struct BatchRules {
  BatchFormat format = BatchFormat::automatic;
  bool score = false;
  int64_t vocab = 0;  ///< ids are below
};

/// A line that is no request. `id` is its custom_id or id, as far as it could be read.
struct BadLine {
  std::string message;
  std::string id;
  bool has_id = false;
  bool id_is_number = false;
  BatchFormat format = BatchFormat::simple;
};

/// Reads a line, which is not blank unless the format is text. Throws BadLine.
[[nodiscard]] BatchRequest parse_batch_line(const std::string& line, const BatchRules& rules);

/// What a file whose first line is this one contains, as far as "automatic" asks: text or JSON.
[[nodiscard]] BatchFormat guess_format(std::string_view first_line);

[[nodiscard]] bool is_blank(std::string_view line);

}  // namespace krait
