#include "model/mamba1_weights.h"

#include <nlohmann/json.hpp>

#include "model/config_reader.h"

namespace krait {

std::vector<LayerRow<Mamba1Layer>> mamba1_rows(const ModelConfig& config) {
  const int64_t D = config.d_model;
  const int64_t E = config.d_inner;
  const int64_t N = config.d_state;
  const int64_t K = config.d_conv;
  const int64_t R = config.dt_rank;
  using L = Mamba1Layer;
  return {
      {{"norm.weight", Role::vector, Init::ones, {D}}, &L::norm},
      {{"mixer.in_proj.weight", Role::matrix, Init::matrix, {2 * E, D}}, &L::in_proj},
      {{"mixer.in_proj.bias", Role::optional_vector, Init::absent, {2 * E}}, &L::in_proj_bias},
      {{"mixer.conv1d.weight", Role::vector, Init::uniform, {E, K}}, &L::conv1d},
      {{"mixer.conv1d.bias", Role::optional_vector, Init::zeros, {E}}, &L::conv1d_bias},
      {{"mixer.x_proj.weight", Role::matrix, Init::matrix, {R + 2 * N, E}}, &L::x_proj},
      {{"mixer.dt_proj.weight", Role::matrix, Init::uniform, {E, R}}, &L::dt_proj},
      {{"mixer.dt_proj.bias", Role::vector, Init::dt_bias, {E}}, &L::dt_bias},
      {{"mixer.A_log", Role::negative_exp, Init::decay, {E, N}}, &L::A},
      {{"mixer.D", Role::vector, Init::ones, {E}}, &L::D},
      {{"mixer.out_proj.weight", Role::matrix, Init::out, {D, E}}, &L::out_proj},
      {{"mixer.out_proj.bias", Role::optional_vector, Init::absent, {D}}, &L::out_proj_bias},
  };
}

std::vector<TensorRow> mamba1_tensors(const ModelConfig& config) {
  const auto table = mamba1_rows(config);
  return {table.begin(), table.end()};
}

void read_mamba1_config(const ConfigReader& in, ModelConfig& c) {
  in.size({&ModelConfig::d_state, {"state_size", "ssm_cfg.d_state"}, 1, kMaxState, 16}, c);
  const char* key = in.name({"time_step_rank", "ssm_cfg.dt_rank"});
  const nlohmann::json* rank = in.find(key);
  const bool automatic = rank == nullptr || *rank == "auto";
  c.dt_rank = automatic ? (c.d_model + 15) / 16 : in.integer(key, 1, kMaxRank).value();
}

void read_falcon_mamba_config(const ConfigReader& in, ModelConfig& c) {
  read_mamba1_config(in, c);
  // The published files don't name it; transformers' class says 1e-6.
  c.mixer_norm_eps = static_cast<float>(in.number("mixer_rms_eps", 0, 1).value_or(1e-6));
}

}  // namespace krait
