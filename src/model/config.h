// The hyper-parameters of a model in krait's names, read from the config of one of three worlds:
// Hugging Face's config.json (`model_type`), that of the state-spaces originals (`d_model`,
// `n_layer`, `ssm_cfg`), or Mistral's params.json (`dim`, `n_layers`).
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

/// A size is 0 where the family has none of the kind.
struct ModelConfig {
  std::string family;  ///< "mamba1", as in families.cpp
  std::string layout;  ///< whose names the config uses: "huggingface", "state-spaces" or "mistral"
  int64_t d_model = 0;
  int64_t n_layer = 0;
  int64_t vocab_size = 0;  ///< tokens that may be sampled
  int64_t vocab_rows =
      0;  ///< rows of the embedding: vocab_size and padding; 0 until the tensors are seen
  int64_t d_inner = 0;
  int64_t d_state = 0;
  int64_t d_conv = 0;
  int64_t dt_rank = 0;   ///< Mamba-1: rank of the projection to dt
  int64_t n_head = 0;    ///< Mamba-2: d_inner = n_head * head_dim
  int64_t head_dim = 0;  ///< Mamba-2: P
  int64_t n_group = 0;   ///< Mamba-2: G, groups of heads that share B and C
  float norm_eps = 1e-5F;
  float mixer_norm_eps = 0;  ///< of the norms inside the mixer; 0: the family has none
  float dt_min = 0;          ///< Mamba-2: limits of dt after softplus
  float dt_max = std::numeric_limits<float>::infinity();
  bool tie_embeddings = true;  ///< as the config says; a head in the file that differs wins
  std::vector<int32_t> eos_ids;
  std::optional<int32_t> bos_id;
  /// Early conversions carry keys of both worlds, which may disagree ("num_hidden_layers": 32
  /// beside "n_layer": 48): the values that lost, for resolve_config() to try against the tensors.
  std::vector<int64_t> other_n_layer;
  std::vector<int64_t> other_d_inner;
};

/// The sizes by name, for listings and messages.
struct ConfigSize {
  std::string_view name;
  int64_t ModelConfig::*value;
};
inline constexpr ConfigSize kConfigSizes[] = {
    {"d_model", &ModelConfig::d_model},       {"n_layer", &ModelConfig::n_layer},
    {"vocab_size", &ModelConfig::vocab_size}, {"vocab_rows", &ModelConfig::vocab_rows},
    {"d_inner", &ModelConfig::d_inner},       {"d_state", &ModelConfig::d_state},
    {"d_conv", &ModelConfig::d_conv},         {"dt_rank", &ModelConfig::dt_rank},
    {"n_head", &ModelConfig::n_head},         {"head_dim", &ModelConfig::head_dim},
    {"n_group", &ModelConfig::n_group},
};

/// Translates a parsed config.json or params.json. `where` names the file in messages. Errors:
/// format (a missing or impossible value), unsupported (a family krait does not build, by its
/// name).
[[nodiscard]] ModelConfig parse_config(const nlohmann::json& json, const std::string& where);

/// The same from the text of a config.json, which may use Python's Infinity and NaN.
[[nodiscard]] ModelConfig parse_config_text(std::string text, const std::string& where);

/// The config of a folder: config.json, or Mistral's params.json where there is no config.json.
[[nodiscard]] std::filesystem::path config_file(const std::filesystem::path& folder);

/// Reads and parses `file`.
[[nodiscard]] ModelConfig read_config(const std::filesystem::path& file);

}  // namespace krait
