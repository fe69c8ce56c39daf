// Mamba-1: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
// figure 3 and algorithm 2. Rows are the n_tok tokens of a step, its sequences packed.
//
// Falcon-Mamba (Zuo et al. 2024) is the same with one thing more: dt (before its projection), B and
// C are normalised by their root mean square, without weights.
#include <algorithm>

#include "model/family.h"
#include "model/mamba1_weights.h"

namespace krait {

namespace {

// In the order of layer_state() and activations() below.
enum StateTensor : size_t { kConvState, kSsmState };
enum ActivationTensor : size_t { kU, kXz, kX, kDbc, kDt };

class Mamba1 final : public Model {
 public:
  Mamba1(const ModelConfig& config, WeightLoader& in)
      : Model(config, in), layers_(load_layers(in, config, mamba1_rows(config))) {
    finish(in);
  }

  void forward(Ops& op, const Tensor& residual, const Tensor& ids, const Batch& batch,
               const Activations& act, const std::vector<LayerState>& state) const override {
    op.embed(residual, ids, embedding_);  // residual [n_tok, d_model]
    for (size_t i = 0; i < layers_.size(); ++i)
      layer(op, layers_[i], residual, act, batch, state[i]);
  }

  bool step(Ops& op, const Tensor& logits, const Tensor& ids, const Batch& batch,
            const std::vector<LayerState>& state) const override {
    return op.mamba1_step({layers_, embedding_, norm_f_, lm_head_, config_.norm_eps,
                           std::max(config_.mixer_norm_eps, 0.0F)},
                          logits, ids, batch, state);
  }

 private:
  /// residual += out_proj(mixer(norm(residual)))
  void layer(Ops& op, const Mamba1Layer& w, const Tensor& residual, const Activations& act,
             const Batch& b, const LayerState& s) const {
    const int64_t E = config_.d_inner;
    const int64_t N = config_.d_state;
    const int64_t R = config_.dt_rank;
    const Tensor& u = act[kU];
    const Tensor& xz = act[kXz];
    const Tensor x_in = xz.columns(0, E);
    const Tensor z = xz.columns(E, E);
    const Tensor& x = act[kX];
    const Tensor& dbc = act[kDbc];
    const Tensor dt_low = dbc.columns(0, R);
    const Tensor B = dbc.columns(R, N);
    const Tensor C = dbc.columns(R + N, N);
    const Tensor& dt = act[kDt];
    const Tensor& y = x;  // the scan writes over its input
    const ScanInputs scan{x, dt, w.A, B, C, w.D, z, w.dt_bias};

    op.rms_norm(u, residual, w.norm, config_.norm_eps);                  // [n_tok, d_model]
    op.linear_soon(xz, E, u, w.in_proj, w.in_proj_bias, b);              // [n_tok, 2*d_inner]
    op.conv1d_silu(x, x_in, w.conv1d, w.conv1d_bias, s[kConvState], b);  // [n_tok, d_inner]
    op.linear(dbc, x, w.x_proj, Tensor());  // [n_tok, dt_rank + 2*d_state]
    if (config_.mixer_norm_eps > 0) op.rms_norm_parts(dbc, {{R, N, N}}, config_.mixer_norm_eps);
    op.linear(dt, dt_low, w.dt_proj, Tensor());   // [n_tok, d_inner]; its bias is the scan's
    op.settle();                                  // z
    op.selective_scan(y, scan, s[kSsmState], b);  // [n_tok, d_inner]
    op.linear_add(residual, y, w.out_proj, w.out_proj_bias);  // [n_tok, d_model]
  }

  std::vector<Mamba1Layer> layers_;
};

std::unique_ptr<Model> load(const ModelConfig& config, WeightLoader& in) {
  return std::make_unique<Mamba1>(config, in);
}

std::vector<TensorSpec> layer_state(const ModelConfig& c, DType activation, DType ssm) {
  return {
      {"conv_state", {c.d_conv - 1, c.d_inner}, activation},  // its last inputs, a ring
      {"ssm_state", {c.d_inner, c.d_state}, ssm},             // h
  };
}

std::vector<TensorSpec> activations(const ModelConfig& c, DType activation) {
  return {
      {"u", {c.d_model}, activation},  {"xz", {2 * c.d_inner}, activation},
      {"x", {c.d_inner}, activation},  {"dbc", {c.dt_rank + 2 * c.d_state}, activation},
      {"dt", {c.d_inner}, activation},
  };
}

}  // namespace

Family mamba1_family() {
  return {.name = "mamba1",
          .model_type = "mamba",
          .ssm_layer = "Mamba1",
          .title = "Mamba-1",
          .read_config = read_mamba1_config,
          .tensors = mamba1_tensors,
          .load = load,
          .layer_state = layer_state,
          .activations = activations};
}

Family falcon_mamba_family() {
  Family f = mamba1_family();
  f.name = "falcon-mamba";
  f.model_type = "falcon_mamba";
  f.ssm_layer = "";
  f.title = "Falcon-Mamba";
  f.read_config = read_falcon_mamba_config;
  return f;
}

}  // namespace krait
