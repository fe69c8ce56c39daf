// A model's config and tensors as other programs read them: Hugging Face's transformers
// (safetensors beside a config.json) and llama.cpp (GGUF).
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/gguf_writer.h"
#include "checkpoint/tensor_writer.h"
#include "model/config.h"

namespace krait {

class ModelExport {
 public:
  /// `dtype` of the matrices; empty: as in the checkpoint, f16 where they are quantised. The
  /// checkpoint must outlive this object, and this object the tensors it gives. Errors: as
  /// load_model().
  ModelExport(const ModelConfig& config, const Checkpoint& checkpoint, std::optional<DType> dtype);

  [[nodiscard]] const ModelConfig& config() const noexcept { return config_; }
  [[nodiscard]] DType dtype() const noexcept { return dtype_; }

  [[nodiscard]] nlohmann::ordered_json hugging_face_config() const;
  [[nodiscard]] std::vector<OutputTensor> hugging_face_tensors() const;

  /// Everything but general.name and the tokenizer.
  void gguf_keys(GgufKeys& keys) const;
  /// Error unsupported: what llama.cpp has no place for (biases of the projections, d_inner other
  /// than 2 * d_model).
  [[nodiscard]] std::vector<OutputTensor> gguf_tensors() const;

 private:
  [[nodiscard]] const Checkpoint::Entry& tensor(const std::string& name, const Shape& shape) const;

  std::unique_ptr<Checkpoint> renamed_;  ///< a GGUF checkpoint under krait's names
  const Checkpoint& checkpoint_;
  ModelConfig config_;
  DType dtype_;
  bool tied_;  ///< no head of its own
};

}  // namespace krait
