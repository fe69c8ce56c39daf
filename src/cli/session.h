// A model made ready for a command: files, device, weights, tokenizer, in the order in which each
// needs the one before it.
#pragma once

#include <memory>
#include <string>

#include "checkpoint/checkpoint.h"
#include "cli/model_source.h"
#include "cli/options.h"
#include "kernels/ops.h"
#include "model/model.h"
#include "runtime/generation_config.h"
#include "tokenizer/tokenizer.h"

namespace krait {

/// The members are declared so that each is destroyed before what it refers to.
struct Session {
  ModelSource source;
  GenerationConfig generation;
  std::unique_ptr<Checkpoint> checkpoint;  ///< null with random weights
  std::unique_ptr<Ops> ops;
  std::unique_ptr<Model> model;
  std::unique_ptr<Tokenizer> tokenizer;  ///< null where there is none
  double load_seconds = 0;

  /// The tokenizer; error file, with a hint, where there is none.
  [[nodiscard]] const Tokenizer& require_tokenizer() const;
};

/// N of --device cuda:N, else 0.
[[nodiscard]] int device_index(const DeviceFlags& flags);

/// The device of --device; "auto" is the first CUDA device where there is one.
[[nodiscard]] std::unique_ptr<Ops> open_device(const DeviceFlags& flags);

[[nodiscard]] Session open_session(const ModelFlags& model, const DeviceFlags& device,
                                   const CommonFlags& common);

/// A model of a published shape ("2.8b") with random weights, made in memory; no tokenizer.
[[nodiscard]] Session open_random_session(const std::string& shape, const DeviceFlags& device);

/// The ids of a prompt: encoded text (special tokens in it count as such, and what the tokenizer
/// adds is added) or the ids given. Empty text is the start-of-text token. Errors: usage (an id
/// outside the vocabulary, no start token), file (text without a tokenizer).
[[nodiscard]] std::vector<int32_t> prompt_ids(const Session& session, const Prompt& prompt);

}  // namespace krait
