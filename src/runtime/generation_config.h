// What a model's files say about generation: the sampling defaults of generation_config.json, and
// which token ends a text. Values are those of transformers; a key the file lacks stays empty.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "model/config.h"
#include "tokenizer/tokenizer.h"

namespace krait {

struct GenerationConfig {
  std::optional<bool> do_sample;
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> typical_p;
  std::optional<float> repetition_penalty;
  std::optional<int32_t> top_k;
  std::optional<int64_t> max_new_tokens;
  std::vector<int32_t> eos_ids;
  std::optional<int32_t> bos_id;
};

/// Reads `folder`/generation_config.json; all empty where there is none. Errors: format (not JSON,
/// or a value of another type or range than transformers allows).
[[nodiscard]] GenerationConfig read_generation_config(const std::filesystem::path& folder);

/// The sampling that applies when no flag is given:
/// - do_sample false: greedy;
/// - do_sample true: the file's values, and transformers' defaults (temperature 1, top_k 50) for
///   what it leaves out;
/// - not said: llama.cpp's defaults (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05), each
///   replaced by the file's value where there is one.
/// A repetition_penalty of the file looks at the whole text, as it does in transformers; otherwise
/// penalties look at the last 64 tokens.
[[nodiscard]] SampleParams default_sampling(const GenerationConfig& config);

/// The ids that end a text, in rising order: those of generation_config.json, else config.json's,
/// and the one that the tokenizer names. Early conversions of the GPT-NeoX models name ordinary
/// tokens (1 and 2); such an id is left out, with a warning, where the tokenizer knows better.
[[nodiscard]] std::vector<int32_t> end_of_text_ids(const GenerationConfig& generation,
                                                   const ModelConfig& model,
                                                   const Tokenizer* tokenizer);

/// The token that an unconditional text starts from: the beginning-of-sequence token, else an
/// end-of-text token, which is what separated the texts in training. Empty if there is neither.
[[nodiscard]] std::optional<int32_t> start_of_text_id(const GenerationConfig& generation,
                                                      const ModelConfig& model,
                                                      const Tokenizer* tokenizer);

}  // namespace krait
