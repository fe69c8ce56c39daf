#include "model/model.h"

#include "model/family.h"
#include "model/gguf.h"
#include "model/weights.h"

namespace krait {

Model::Model(const ModelConfig& config, WeightLoader& in)
    : config_(config), weight_dtype_(in.dtype()) {
  const Shape table{config.vocab_rows, config.d_model};
  embedding_ = in.matrix("backbone.embedding.weight", table);
  norm_f_ = in.vector("backbone.norm_f.weight", {config.d_model});
  lm_head_ = in.head(embedding_, table);
}

void Model::finish(WeightLoader& in) {
  in.finish();
  parameter_count_ = in.parameter_count();
  weight_bytes_ = in.weight_bytes();
  host_copies_ = in.take_host_copies();
}

std::vector<TensorSpec> Model::layer_state(DType activation, DType ssm) const {
  return family_named(config_.family).layer_state(config_, activation, ssm);
}

std::vector<TensorSpec> Model::activations(DType activation) const {
  return family_named(config_.family).activations(config_, activation);
}

void Model::head(Ops& op, const Tensor& logits, const Tensor& normed,
                 const Tensor& residual) const {
  op.rms_norm(normed, residual, norm_f_, config_.norm_eps);  // normed [n, d_model]
  op.linear(logits, normed, lm_head_, Tensor());             // logits [n, vocab_rows]
}

std::unique_ptr<Model> load_model(const ModelConfig& config, const Checkpoint& checkpoint, Ops& op,
                                  std::optional<DType> dtype,
                                  const std::function<void(size_t, size_t)>& progress) {
  const Family& family = family_named(config.family);
  std::unique_ptr<Checkpoint> renamed;
  if (checkpoint.metadata() != nullptr) renamed = rename_gguf(checkpoint, config);
  const Checkpoint& tensors = renamed ? *renamed : checkpoint;
  const ModelConfig resolved = resolve_config(config, tensors);
  WeightLoader in(resolved, tensors, op, dtype, progress);
  return family.load(resolved, in);
}

}  // namespace krait
