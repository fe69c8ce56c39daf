// Where MODEL is: turns what the user typed into files, and finds the tokenizer that belongs to it.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "model/config.h"
#include "tokenizer/tokenizer.h"

namespace krait {

struct ModelSource {
  std::string name;                  ///< for people: what was typed, or the default's name
  std::filesystem::path folder;      ///< holds config.json and what lies beside it
  std::filesystem::path checkpoint;  ///< what open_checkpoint() takes: the folder or one file
};

/// `model` is a folder, a .safetensors or .bin file with its config.json beside it, or org/name in
/// the Hugging Face cache (HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub); empty means the
/// model that ships with krait. Errors: file (not there, no config.json), unsupported (a format
/// that krait does not read).
[[nodiscard]] ModelSource find_model(const std::string& model);

/// The folder of the models that ship: beside the installed program, else in the source tree.
[[nodiscard]] std::filesystem::path shipped_models();

/// The tokenizer of `--tokenizer` (`flag`), else the one beside the model, else, for state-spaces
/// checkpoints, which carry none, the GPT-NeoX-20B one that ships, if the vocabulary fits. Null
/// where there is none: a model without a tokenizer works on ids.
[[nodiscard]] std::unique_ptr<Tokenizer> find_tokenizer(const ModelSource& source,
                                                        const ModelConfig& config,
                                                        const std::string& flag);

}  // namespace krait
