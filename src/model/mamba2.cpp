// Mamba-2: Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms
// Through Structured State Space Duality", sections 6 and 7. Rows are the n_tok tokens of a step,
// its sequences packed.
//
// The norm before out_proj takes its mean over each group of channels by itself, as the original
// (mamba_ssm) and Mistral's Codestral do. transformers' Mamba2 takes it over all channels; the two
// differ where there is more than one group.
#include "model/mamba2_weights.h"

namespace krait {

namespace {

// In the order of layer_state() and activations() below.
enum StateTensor : size_t { kConvState, kSsmState };
enum ActivationTensor : size_t { kU, kZxbcdt, kXbc, kY };

/// Channels of the convolution: x, B and C.
int64_t conv_dim(const ModelConfig& c) { return c.d_inner + 2 * c.n_group * c.d_state; }

class Mamba2 final : public Model {
 public:
  Mamba2(const ModelConfig& config, WeightLoader& in)
      : Model(config, in), layers_(load_layers(in, config, mamba2_rows(config))) {
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
    return op.mamba2_step(
        {layers_, embedding_, norm_f_, lm_head_, config_.n_group, config_.norm_eps,
         config_.mixer_norm_eps, config_.dt_min, config_.dt_max},
        logits, ids, batch, state);
  }

 private:
  /// residual += out_proj(mixer(norm(residual)))
  void layer(Ops& op, const Mamba2Layer& w, const Tensor& residual, const Activations& act,
             const Batch& b, const LayerState& s) const {
    const int64_t E = config_.d_inner;
    const int64_t G = config_.n_group;
    const int64_t GN = G * config_.d_state;
    const Tensor& u = act[kU];
    const Tensor& zxbcdt = act[kZxbcdt];
    const Tensor z = zxbcdt.columns(0, E);
    const Tensor xbc = zxbcdt.columns(E, E + 2 * GN);
    const Tensor dt = zxbcdt.columns(2 * E + 2 * GN, config_.n_head);
    const Tensor& y = act[kY];
    const SsdMixer mixer{z,
                         xbc,
                         dt,
                         w.conv1d,
                         w.conv1d_bias,
                         w.A,
                         w.D,
                         w.dt_bias,
                         w.gated_norm,
                         G,
                         config_.dt_min,
                         config_.dt_max,
                         config_.mixer_norm_eps};

    op.rms_norm(u, residual, w.norm, config_.norm_eps);  // [n_tok, d_model]
    op.linear(zxbcdt, u, w.in_proj, w.in_proj_bias);     // [n_tok, 2*d_inner + 2*G*N + H]
    // Convolution of x, B and C; recurrence; norm of y * silu(z).
    op.ssd_mixer(y, act[kXbc], mixer, s[kConvState], s[kSsmState], b);  // [n_tok, d_inner]
    op.linear_add(residual, y, w.out_proj, w.out_proj_bias);            // [n_tok, d_model]
  }

  std::vector<Mamba2Layer> layers_;
};

std::unique_ptr<Model> load(const ModelConfig& config, WeightLoader& in) {
  return std::make_unique<Mamba2>(config, in);
}

std::vector<TensorSpec> layer_state(const ModelConfig& c, DType activation, DType ssm) {
  return {
      {"conv_state", {c.d_conv - 1, conv_dim(c)}, activation},  // its last inputs, a ring
      {"ssm_state", {c.n_head, c.head_dim, c.d_state}, ssm},    // S
  };
}

std::vector<TensorSpec> activations(const ModelConfig& c, DType activation) {
  return {
      {"u", {c.d_model}, activation},
      {"zxbcdt", {c.d_inner + conv_dim(c) + c.n_head}, activation},
      {"xbc", {conv_dim(c)}, activation},
      {"y", {c.d_inner}, activation},
  };
}

/// Matrix products of the scan in chunks of Q tokens, flops a token: C B^T for each group, the
/// causal half of its product with x, the chunk's state and its contribution for each head.
int64_t scan_products(const ModelConfig& c) {
  constexpr int64_t Q = 128;
  return c.n_layer *
         (c.n_head * (Q * c.head_dim + 4 * c.d_state * c.head_dim) + c.n_group * Q * c.d_state);
}

}  // namespace

Family mamba2_family() {
  return {.name = "mamba2",
          .model_type = "mamba2",
          .ssm_layer = "Mamba2",
          .title = "Mamba-2",
          .read_config = read_mamba2_config,
          .tensors = mamba2_tensors,
          .load = load,
          .layer_state = layer_state,
          .activations = activations,
          .scan_products = scan_products};
}

}  // namespace krait
