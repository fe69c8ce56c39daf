// The families of models: families.cpp names them, one line each. A family that krait recognises
// but does not build has no functions, and is refused by its name.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "model/model.h"

namespace krait {

struct Family {
  std::string_view name;        ///< krait's name, as in ModelConfig::family
  std::string_view model_type;  ///< of a Hugging Face config.json
  std::string_view
      ssm_layer;           ///< ssm_cfg.layer of a state-spaces config.json; "" where none exists
  std::string_view title;  ///< for messages

  std::unique_ptr<Model> (*load)(const ModelConfig&, WeightLoader&) = nullptr;
  std::vector<TensorSpec> (*layer_state)(const ModelConfig&, DType activation, DType ssm) = nullptr;
  std::vector<TensorSpec> (*activations)(const ModelConfig&, DType activation) = nullptr;
};

[[nodiscard]] std::span<const Family> families();

/// The family of that name. Error unsupported: unknown or not built.
[[nodiscard]] const Family& family_named(std::string_view name);

// mamba1.cpp
std::unique_ptr<Model> load_mamba1(const ModelConfig& config, WeightLoader& in);
std::vector<TensorSpec> mamba1_layer_state(const ModelConfig& config, DType activation, DType ssm);
std::vector<TensorSpec> mamba1_activations(const ModelConfig& config, DType activation);

}  // namespace krait
