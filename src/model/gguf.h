// GGUF as a source and a target of models: its keys and tensor names beside krait's, and what ggml
// stores in another form. Architectures "mamba" (Mamba-1, Falcon-Mamba) and "mamba2".
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "checkpoint/checkpoint.h"
#include "model/config.h"

namespace krait {

/// The metadata of a GGUF checkpoint in the keys of a Hugging Face config.json. Errors: format (a
/// missing key or a wrong type), unsupported (another architecture).
[[nodiscard]] nlohmann::json gguf_config_json(const Checkpoint& gguf);

/// parse_config() of that, with the layout "gguf".
[[nodiscard]] ModelConfig gguf_config(const Checkpoint& gguf);

/// The tensors of a GGUF checkpoint, which must outlive the result, under krait's names and in
/// krait's shapes. Where krait has A_log, ggml stores A = -exp(A_log): it is called "mixer.A" here.
[[nodiscard]] std::unique_ptr<Checkpoint> rename_gguf(const Checkpoint& gguf,
                                                      const ModelConfig& config);

/// ggml's name of a tensor by krait's ("backbone.layers.0.norm.weight"); empty where it has none.
[[nodiscard]] std::optional<std::string> gguf_name(std::string_view krait_name);

}  // namespace krait
