// The families of models: families.cpp names them, one line each. A family is its equations
// (NAME.cpp), the table of its tensors and the config keys that it alone has (NAME_weights.cpp);
// nothing else knows one from another. A family that krait recognises but does not build has no
// functions, and is refused by its name.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "model/model.h"

namespace krait {

class ConfigReader;

/// How a tensor of a block is read.
enum class Role : uint8_t { matrix, vector, optional_vector, negative_exp };

/// How a model of random weights fills it.
enum class Init : uint8_t {
  absent,  ///< an optional tensor that the published models don't have
  zeros,
  ones,
  matrix,   ///< uniform in +-sqrt(3 / fan_in): keeps the variance
  out,      ///< the same, divided by sqrt(n_layer), the number of additions to the residual
  uniform,  ///< uniform in +-sqrt(1 / fan_in)
  decay,    ///< log of -A: of 1 .. d_state along a row, or of values from 1 to 16 where A is [H]
  dt_bias,  ///< inverse softplus of values from 0.001 to 0.1
};

/// One tensor of a block.
struct TensorRow {
  std::string_view name;  ///< after "backbone.layers.N."
  Role role;
  Init init;
  Shape shape;
};

struct Family {
  std::string_view name;        ///< krait's name, as in ModelConfig::family
  std::string_view model_type;  ///< of a Hugging Face config.json
  std::string_view
      ssm_layer;           ///< ssm_cfg.layer of a state-spaces config.json; "" where none exists
  std::string_view title;  ///< for messages

  /// Completes a config whose common sizes are read.
  void (*read_config)(const ConfigReader& in, ModelConfig& config) = nullptr;
  std::vector<TensorRow> (*tensors)(const ModelConfig&) = nullptr;  ///< of one block
  std::unique_ptr<Model> (*load)(const ModelConfig&, WeightLoader&) = nullptr;
  std::vector<TensorSpec> (*layer_state)(const ModelConfig&, DType activation, DType ssm) = nullptr;
  std::vector<TensorSpec> (*activations)(const ModelConfig&, DType activation) = nullptr;
  /// Flops of a token in a prompt that are matrix products beside those with weights; null: none.
  int64_t (*scan_products)(const ModelConfig&) = nullptr;
};

[[nodiscard]] std::span<const Family> families();

/// The family of that name. Error unsupported: unknown or not built.
[[nodiscard]] const Family& family_named(std::string_view name);

// Each beside its equations.
[[nodiscard]] Family mamba1_family();
[[nodiscard]] Family falcon_mamba_family();
[[nodiscard]] Family mamba2_family();

}  // namespace krait
