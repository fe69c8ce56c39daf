// The hyper-parameters of a model in krait's names, read from the config.json of either world:
// Hugging Face (`model_type`) or the state-spaces originals (`d_model`, `n_layer`, `ssm_cfg`).
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

namespace krait {

struct ModelConfig {
  std::string family;  ///< "mamba1"
  std::string layout;  ///< whose names the config uses: "huggingface" or "state-spaces"
  int64_t d_model = 0;
  int64_t n_layer = 0;
  int64_t vocab_size = 0;  ///< tokens that may be sampled
  int64_t vocab_rows =
      0;  ///< rows of the embedding: vocab_size and padding; 0 until the tensors are seen
  int64_t d_inner = 0;
  int64_t d_state = 0;
  int64_t d_conv = 0;
  int64_t dt_rank = 0;
  float norm_eps = 1e-5F;
  bool tie_embeddings = true;  ///< as the config says; a head in the file that differs wins
  std::vector<int32_t> eos_ids;
  std::optional<int32_t> bos_id;
  /// Early conversions carry keys of both worlds, which may disagree ("num_hidden_layers": 32
  /// beside "n_layer": 48): the values that lost, for resolve_config() to try against the tensors.
  std::vector<int64_t> other_n_layer;
  std::vector<int64_t> other_d_inner;
};

/// Translates a parsed config.json. `where` names the file in messages. Errors: format (a missing
/// or impossible value), unsupported (a family krait does not build, by its name).
[[nodiscard]] ModelConfig parse_config(const nlohmann::json& json, const std::string& where);

/// The same from the text of a config.json, which may use Python's Infinity and NaN.
[[nodiscard]] ModelConfig parse_config_text(std::string text, const std::string& where);

/// Reads and parses `file`.
[[nodiscard]] ModelConfig read_config(const std::filesystem::path& file);

}  // namespace krait
