// Where MODEL is: turns what the user typed into files, and finds the tokenizer that belongs to it.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "checkpoint/checkpoint.h"
#include "model/config.h"
#include "runtime/generation_config.h"
#include "tokenizer/tokenizer.h"

namespace krait {

struct ModelSource {
  std::string name;                  ///< for people: what was typed, or the default's name
  std::filesystem::path folder;      ///< holds config.json and what lies beside it
  std::filesystem::path checkpoint;  ///< what open_checkpoint() takes: the folder or one file
  bool gguf = false;                 ///< one file holds all, and what lies beside it counts nothing
};

/// `model` is a folder, a .gguf file, a .safetensors or .bin file with its config.json beside it,
/// or org/name in the Hugging Face cache (HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub);
/// empty means the model that ships with krait. Errors: file (not there, no config.json),
/// unsupported (a format that krait does not read).
[[nodiscard]] ModelSource find_model(const std::string& model);

/// The folder of the models that ship: beside the installed program, else in the source tree.
[[nodiscard]] std::filesystem::path shipped_models();

/// The config and the generation config that belong to the model: of the folder, or of the GGUF
/// file's metadata.
[[nodiscard]] ModelConfig read_config(const ModelSource& source, const Checkpoint& checkpoint);
[[nodiscard]] GenerationConfig read_generation_config(const ModelSource& source);

/// The tokenizer of `--tokenizer` (`flag`), else the one in the GGUF file (`metadata`, null for
/// other formats) or beside the model, else, for state-spaces
/// checkpoints, which carry none, the GPT-NeoX-20B one that ships, if the vocabulary fits. Null
/// where there is none: a model without a tokenizer works on ids.
[[nodiscard]] std::unique_ptr<Tokenizer> find_tokenizer(const ModelSource& source,
                                                        const ModelConfig& config,
                                                        const GgufMetadata* metadata,
                                                        const std::string& flag);

/// The file that find_tokenizer() would open; empty where there is none, or where the GGUF file
/// itself has it.
[[nodiscard]] std::optional<std::filesystem::path> find_tokenizer_path(const ModelSource& source,
                                                                       const ModelConfig& config,
                                                                       const std::string& flag);

}  // namespace krait
