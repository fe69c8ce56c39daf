#include "model/export.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/elements.h"
#include "checkpoint/ggml_blocks.h"
#include "model/family.h"
#include "model/gguf.h"
#include "model/weights.h"

namespace krait {

namespace {

using Entry = Checkpoint::Entry;

constexpr std::string_view kEmbedding = "backbone.embedding.weight";
constexpr std::string_view kNorm = "backbone.norm_f.weight";
constexpr std::string_view kHead = "lm_head.weight";

/// What becomes of each element on its way.
using Change = float (*)(float);
float as_it_is(float v) { return v; }
float a_of_log(float v) { return -std::exp(v); }
float log_of_a(float v) { return std::log(-v); }

/// A part of a tensor at a time, of whole blocks.
constexpr int64_t kPart = 1 << 16;

OutputTensor converted(const Entry& e, std::string name, DType dtype, const Shape& shape,
                       Change change = as_it_is) {
  return {std::move(name), dtype, shape, [&e, dtype, change](const OutputTensor::Sink& sink) {
            if (e.blocks == nullptr && e.tensor.dtype == dtype && change == as_it_is) {
              return sink({e.tensor.as<const std::byte>(), e.tensor.bytes()});
            }
            const int64_t n = e.shape().numel();
            std::vector<float> values(static_cast<size_t>(std::min(n, kPart)));
            visit_dtype(dtype, e.name, [&](auto type) {
              using T = decltype(type);
              std::vector<T> out(values.size());
              for (int64_t i = 0; i < n; i += kPart) {
                const int64_t m = std::min(kPart, n - i);
                read_elements(e, i, m, values.data());
                std::transform(values.begin(), values.begin() + m, out.begin(),
                               [change](float v) { return static_cast<T>(change(v)); });
                sink(std::as_bytes(std::span(out).first(static_cast<size_t>(m))));
              }
            });
          }};
}

OutputTensor zeros(std::string name, const Shape& shape) {
  return {std::move(name), DType::f32, shape, [shape](const OutputTensor::Sink& sink) {
            const std::vector<float> values(static_cast<size_t>(shape.numel()));
            sink(std::as_bytes(std::span(values)));
          }};
}

std::string block(int64_t layer, std::string_view rest) {
  return fmt::format("backbone.layers.{}.{}", layer, rest);
}

/// "mixer.A" of "mixer.A_log": what a GGUF file has instead.
std::string without_log(std::string name) {
  name.resize(name.size() - 4);
  return name;
}

/// The type that keeps a vector as exact as it is.
DType vector_dtype(const Entry& e) {
  return e.blocks != nullptr || e.tensor.dtype == DType::f64 ? DType::f32 : e.tensor.dtype;
}

bool is_conv_weight(const TensorRow& row) { return row.name == "mixer.conv1d.weight"; }

}  // namespace

ModelExport::ModelExport(const ModelConfig& config, const Checkpoint& checkpoint,
                         std::optional<DType> dtype)
    : renamed_(checkpoint.metadata() != nullptr ? rename_gguf(checkpoint, config) : nullptr),
      checkpoint_(renamed_ ? *renamed_ : checkpoint),
      config_(resolve_config(config, checkpoint_)),
      dtype_(dtype.value_or(matrix_dtype(checkpoint_))),
      tied_(find_tensor(checkpoint_, kHead) == nullptr) {
  if (tied_ && !config_.tie_embeddings) {
    throw Error(ErrorKind::format, fmt::format("the tensor {} is missing, and the config says that "
                                               "it is not tied to the embedding",
                                               kHead));
  }
  const Shape table{config_.vocab_rows, config_.d_model};
  const Entry& embedding = tensor(std::string(kEmbedding), table);
  if (!tied_) {
    tied_ = same_bytes(tensor(std::string(kHead), table), embedding);
  }
}

const Entry& ModelExport::tensor(const std::string& name, const Shape& shape) const {
  return require_tensor(checkpoint_, config_, name, shape);
}

nlohmann::ordered_json ModelExport::hugging_face_config() const {
  const ModelConfig& c = config_;
  const Family& family = family_named(c.family);
  const auto is_there = [&](const char* name) {
    return find_tensor(checkpoint_, block(0, name)) != nullptr;
  };
  // "mamba" -> MambaForCausalLM, "falcon_mamba" -> FalconMambaForCausalLM
  std::string architecture;
  bool capital = true;
  for (const char letter : family.model_type) {
    if (letter != '_') {
      architecture += capital ? static_cast<char>(std::toupper(letter)) : letter;
    }
    capital = letter == '_';
  }
  nlohmann::ordered_json j;
  j["architectures"] = {architecture + "ForCausalLM"};
  j["model_type"] = family.model_type;
  j["vocab_size"] = c.vocab_rows;
  j["hidden_size"] = c.d_model;
  j["intermediate_size"] = c.d_inner;
  if (c.d_inner % c.d_model == 0) {
    j["expand"] = c.d_inner / c.d_model;
  } else {
    j["expand"] = static_cast<double>(c.d_inner) / static_cast<double>(c.d_model);
  }
  j["num_hidden_layers"] = c.n_layer;
  j["state_size"] = c.d_state;
  j["conv_kernel"] = c.d_conv;
  if (c.dt_rank > 0) j["time_step_rank"] = c.dt_rank;
  if (c.n_head > 0) {
    j["num_heads"] = c.n_head;
    j["head_dim"] = c.head_dim;
    j["n_groups"] = c.n_group;
    if (std::isfinite(c.dt_max)) j["time_step_limit"] = {c.dt_min, c.dt_max};
  }
  // As the decimal that was meant: 1e-05, not 9.999999747378752e-06.
  const auto decimal = [](float v) { return std::stod(fmt::format("{}", v)); };
  j["layer_norm_epsilon"] = decimal(c.norm_eps);
  if (c.dt_rank > 0 && c.mixer_norm_eps > 0) j["mixer_rms_eps"] = decimal(c.mixer_norm_eps);
  j["hidden_act"] = "silu";
  j["use_bias"] = is_there("mixer.in_proj.bias");
  j["use_conv_bias"] = is_there("mixer.conv1d.bias");
  j["residual_in_fp32"] = true;
  j["tie_word_embeddings"] = tied_;
  if (c.bos_id) j["bos_token_id"] = *c.bos_id;
  if (c.eos_ids.size() == 1) {
    j["eos_token_id"] = c.eos_ids[0];
  } else if (!c.eos_ids.empty()) {
    j["eos_token_id"] = c.eos_ids;
  }
  j["torch_dtype"] = dtype_ == DType::f32   ? "float32"
                     : dtype_ == DType::f16 ? "float16"
                                            : "bfloat16";
  return j;
}

std::vector<OutputTensor> ModelExport::hugging_face_tensors() const {
  const Shape table{config_.vocab_rows, config_.d_model};
  std::vector<OutputTensor> out;
  const Entry& norm = tensor(std::string(kNorm), {config_.d_model});
  out.push_back(converted(tensor(std::string(kEmbedding), table), "backbone.embeddings.weight",
                          dtype_, table));
  out.push_back(converted(norm, std::string(kNorm), vector_dtype(norm), {config_.d_model}));
  if (!tied_) {
    out.push_back(converted(tensor(std::string(kHead), table), std::string(kHead), dtype_, table));
  }
  for (int64_t i = 0; i < config_.n_layer; ++i) {
    for (const TensorRow& row : family_named(config_.family).tensors(config_)) {
      const std::string name = block(i, row.name);
      const bool missing = find_tensor(checkpoint_, name) == nullptr;
      if (missing && row.role == Role::optional_vector) continue;
      if (missing && row.role == Role::negative_exp) {
        const Entry& A = tensor(without_log(name), row.shape);
        out.push_back(converted(A, name, DType::f32, row.shape, log_of_a));
        continue;
      }
      const Entry& e = tensor(name, row.shape);
      Shape shape = row.shape;
      if (is_conv_weight(row)) shape = {row.shape[0], 1, row.shape[1]};  // a PyTorch convolution
      out.push_back(converted(e, name, row.role == Role::matrix ? dtype_ : vector_dtype(e), shape));
    }
  }
  return out;
}

void ModelExport::gguf_keys(GgufKeys& keys) const {
  const ModelConfig& c = config_;
  const bool mamba2 = c.n_head > 0;
  const std::string arch = mamba2 ? "mamba2" : "mamba";
  const auto u32 = [&](const char* name, int64_t v) {
    keys.u32(fmt::format("{}.{}", arch, name), static_cast<uint32_t>(v));
  };
  keys.text("general.architecture", arch);
  keys.text("general.type", "model");
  u32("context_length", 1 << 20);  // a Mamba model has no limit; llama.cpp's converter says this
  u32("embedding_length", c.d_model);
  u32("feed_forward_length", 0);
  u32("attention.head_count", 0);
  u32("block_count", c.n_layer);
  u32("ssm.conv_kernel", c.d_conv);
  u32("ssm.inner_size", c.d_inner);
  u32("ssm.state_size", c.d_state);
  u32("ssm.time_step_rank", mamba2 ? c.n_head : c.dt_rank);
  if (mamba2) u32("ssm.group_count", c.n_group);
  keys.f32(arch + ".attention.layer_norm_rms_epsilon", c.norm_eps);
  if (!mamba2) keys.boolean(arch + ".ssm.dt_b_c_rms", c.mixer_norm_eps > 0);
  u32("vocab_size", c.vocab_rows);
  // llama.cpp's numbers of file types.
  keys.u32("general.file_type", dtype_ == DType::f32 ? 0 : dtype_ == DType::f16 ? 1 : 32);
  keys.u32("general.quantization_version", 2);
}

std::vector<OutputTensor> ModelExport::gguf_tensors() const {
  const ModelConfig& c = config_;
  if (c.d_inner != 2 * c.d_model) {
    throw Error(ErrorKind::unsupported,
                fmt::format("llama.cpp runs models of d_inner = 2 * d_model only, this one has {} "
                            "and {}",
                            c.d_inner, c.d_model));
  }
  const Shape table{c.vocab_rows, c.d_model};
  const auto name_of = [](std::string_view name) { return gguf_name(name).value(); };
  std::vector<OutputTensor> out;
  out.push_back(
      converted(tensor(std::string(kEmbedding), table), name_of(kEmbedding), dtype_, table));
  out.push_back(
      converted(tensor(std::string(kNorm), {c.d_model}), name_of(kNorm), DType::f32, {c.d_model}));
  if (!tied_) {
    out.push_back(converted(tensor(std::string(kHead), table), name_of(kHead), dtype_, table));
  }
  for (int64_t i = 0; i < c.n_layer; ++i) {
    for (const TensorRow& row : family_named(c.family).tensors(c)) {
      const std::string name = block(i, row.name);
      const auto ggml = gguf_name(name);
      const bool missing = find_tensor(checkpoint_, name) == nullptr;
      if (!ggml) {
        if (missing && row.role == Role::optional_vector) continue;
        throw Error(ErrorKind::unsupported,
                    fmt::format("{}: GGUF has no place for this tensor", name));
      }
      // Vectors of a value per head are [n_head, 1] in ggml, and the norm's weight is by groups.
      Shape shape = row.shape;
      if (c.n_head > 0 && (row.name == "mixer.A_log" || row.name == "mixer.D")) {
        shape = {c.n_head, 1};
      }
      if (c.n_head > 0 && row.name == "mixer.norm.weight") {
        shape = {c.n_group, c.d_inner / c.n_group};
      }
      if (missing && row.role == Role::optional_vector) {
        out.push_back(zeros(*ggml, shape));  // llama.cpp wants the bias of the convolution
      } else if (row.role == Role::negative_exp) {
        const Entry& A = tensor(missing ? without_log(name) : name, row.shape);
        out.push_back(converted(A, *ggml, DType::f32, shape, missing ? as_it_is : a_of_log));
      } else {
        const DType dtype = row.role == Role::matrix ? dtype_ : DType::f32;
        out.push_back(converted(tensor(name, row.shape), *ggml, dtype, shape));
      }
    }
  }
  return out;
}

}  // namespace krait
