#include "model/mamba2_weights.h"

#include <nlohmann/json.hpp>

#include "model/config_reader.h"

namespace krait {

std::vector<LayerRow<Mamba2Layer>> mamba2_rows(const ModelConfig& config) {
  const int64_t D = config.d_model;
  const int64_t E = config.d_inner;
  const int64_t GN = config.n_group * config.d_state;
  const int64_t H = config.n_head;
  const int64_t K = config.d_conv;
  const int64_t rows = 2 * E + 2 * GN + H;
  using L = Mamba2Layer;
  return {
      {{"norm.weight", Role::vector, Init::ones, {D}}, &L::norm},
      {{"mixer.in_proj.weight", Role::matrix, Init::matrix, {rows, D}}, &L::in_proj},
      {{"mixer.in_proj.bias", Role::optional_vector, Init::absent, {rows}}, &L::in_proj_bias},
      {{"mixer.conv1d.weight", Role::vector, Init::uniform, {E + 2 * GN, K}}, &L::conv1d},
      {{"mixer.conv1d.bias", Role::optional_vector, Init::zeros, {E + 2 * GN}}, &L::conv1d_bias},
      {{"mixer.dt_bias", Role::vector, Init::dt_bias, {H}}, &L::dt_bias},
      {{"mixer.A_log", Role::negative_exp, Init::decay, {H}}, &L::A},
      {{"mixer.D", Role::vector, Init::ones, {H}}, &L::D},
      {{"mixer.norm.weight", Role::vector, Init::ones, {E}}, &L::gated_norm},
      {{"mixer.out_proj.weight", Role::matrix, Init::out, {D, E}}, &L::out_proj},
      {{"mixer.out_proj.bias", Role::optional_vector, Init::absent, {D}}, &L::out_proj_bias},
  };
}

std::vector<TensorRow> mamba2_tensors(const ModelConfig& config) {
  const auto table = mamba2_rows(config);
  return {table.begin(), table.end()};
}

namespace {

/// Element `i` of the pair [least, most] under `key`. Infinity has become null on the way here, or
/// is an object of transformers' ({"__float__": "Infinity"}).
float dt_limit(const ConfigReader& in, const char* key, size_t i, float otherwise) {
  const nlohmann::json* pair = in.find(key);
  if (pair == nullptr) return otherwise;
  constexpr auto kExpected = "expected two numbers, the least and the most, at least 0";
  if (!pair->is_array() || pair->size() != 2) in.fail(key, kExpected);
  const nlohmann::json& v = (*pair)[i];
  if (v.is_null() || v == nlohmann::json{{"__float__", "Infinity"}}) {
    if (i == 0) in.fail(key, kExpected);
    return std::numeric_limits<float>::infinity();
  }
  if (!v.is_number() || !(v.get<double>() >= 0)) in.fail(key, kExpected);
  return v.get<float>();
}

/// Arguments of the original mixer that no published model uses.
void refuse_what_is_not_built(const ConfigReader& in, const ModelConfig& c) {
  if (in.boolean("ssm_cfg.D_has_hdim", false)) in.unsupported("ssm_cfg.D_has_hdim true");
  if (!in.boolean("ssm_cfg.rmsnorm", true)) in.unsupported("ssm_cfg.rmsnorm false");
  if (in.boolean("ssm_cfg.norm_before_gate", false)) {
    in.unsupported("ssm_cfg.norm_before_gate true");
  }
  const auto d_ssm = in.integer("ssm_cfg.d_ssm", 1, kMaxInner);
  if (d_ssm && *d_ssm != c.d_inner) {
    in.unsupported("ssm_cfg.d_ssm below d_inner (a gated MLP beside the scan)");
  }
}

}  // namespace

void read_mamba2_config(const ConfigReader& in, ModelConfig& c) {
  const bool hf = in.layout() == Layout::huggingface;
  refuse_what_is_not_built(in, c);
  in.size({&ModelConfig::d_state, {"state_size", "ssm_cfg.d_state"}, 1, kMaxState, 128}, c);
  in.size({&ModelConfig::head_dim, {"head_dim", "ssm_cfg.headdim"}, 1, kMaxInner, 64}, c);
  const ConfigKey groups{"n_groups", "ssm_cfg.ngroups", "n_groups"};
  in.size({&ModelConfig::n_group, groups, 1, kMaxInner, hf ? 8 : 1}, c);

  const char* head_dim = in.name({"head_dim", "ssm_cfg.headdim"});
  if (c.d_inner % c.head_dim != 0) {
    in.fail(head_dim != nullptr ? head_dim : "dim",
            fmt::format("expected a divisor of d_inner={}", c.d_inner));
  }
  c.n_head = c.d_inner / c.head_dim;
  if (hf && in.integer("num_heads", 1, kMaxInner).value_or(c.n_head) != c.n_head) {
    in.fail("num_heads", fmt::format("expected d_inner={} / head_dim={}", c.d_inner, c.head_dim));
  }
  if (c.n_head % c.n_group != 0) {
    in.fail(in.name(groups), fmt::format("expected a divisor of the {} heads", c.n_head));
  }
  if (c.n_group * c.d_state > kMaxInner) {
    in.fail(in.name(groups), fmt::format("expected n_group * d_state up to {}", kMaxInner));
  }

  const char* limit = in.name({"time_step_limit", "ssm_cfg.dt_limit"});
  c.dt_min = dt_limit(in, limit, 0, c.dt_min);
  c.dt_max = dt_limit(in, limit, 1, c.dt_max);
  if (c.dt_min > c.dt_max) in.fail(limit, "expected the least first");
  // The original fixes it; transformers takes that of the block norms.
  c.mixer_norm_eps = hf ? c.norm_eps : 1e-5F;
}

}  // namespace krait
