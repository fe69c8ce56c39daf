#include "model/weights.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "base/log.h"
#include "model/family.h"

namespace krait {

namespace {

constexpr std::string_view kEmbedding = "backbone.embedding.weight";
constexpr std::string_view kHead = "lm_head.weight";

enum class Role { matrix, vector, optional_vector, negative_exp };

/// One tensor of a block: its name under "backbone.layers.N.", where it goes, its shape.
struct LayerEntry {
  std::string_view name;
  Tensor Mamba1Layer::*member;
  Role role;
  Shape shape;
};

std::string layer_name(int64_t layer, std::string_view rest) {
  return fmt::format("backbone.layers.{}.{}", layer, rest);
}

[[noreturn]] void missing(const std::string& name, const Checkpoint& checkpoint) {
  throw Error(
      ErrorKind::format,
      fmt::format("the tensor {} is missing ({} tensors found)", name, checkpoint.entries().size()),
      "the file may be cut short, or be of another model than its config.json");
}

/// Element i of a host tensor that may be unaligned, as float.
template <typename T>
float element(const std::byte* data, size_t i) {
  T v;
  std::memcpy(&v, data + i * sizeof(T), sizeof(T));
  return static_cast<float>(v);
}

std::vector<float> to_f32(const Tensor& t) {
  const auto* data = t.as<std::byte>();
  std::vector<float> values(static_cast<size_t>(t.numel()));
  const auto fill = [&](auto get) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = get(data, i);
  };
  switch (t.dtype) {
    case DType::f64:
      fill(element<double>);
      break;
    case DType::f32:
      fill(element<float>);
      break;
    case DType::f16:
      fill(element<f16_t>);
      break;
    default:
      fill(element<bf16_t>);
      break;
  }
  return values;
}

bool is_float(DType t) { return is_float16_or_32(t) || t == DType::f64; }

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape &&
         (a.data == b.data || std::memcmp(a.data, b.data, a.bytes()) == 0);
}

/// N of "backbone.layers.N.", or -1.
int64_t layer_index(std::string_view name) {
  if (name.starts_with("model.")) name.remove_prefix(6);
  constexpr std::string_view kPrefix = "backbone.layers.";
  if (!name.starts_with(kPrefix)) return -1;
  name.remove_prefix(kPrefix.size());
  int64_t n = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), n);
  return error == std::errc() && end != name.data() + name.size() && *end == '.' ? n : -1;
}

/// `said` if the tensors agree with it, else the one of `others` that they agree with.
int64_t settle(std::string_view what, int64_t said, const std::vector<int64_t>& others,
               int64_t found) {
  if (said == found) return said;
  if (std::find(others.begin(), others.end(), found) == others.end()) {
    throw Error(ErrorKind::format,
                fmt::format("config.json says {}={}, but the tensors have {}", what, said, found),
                "check that config.json and the tensors come from the same release");
  }
  spdlog::warn("config.json says both {}={} and {}={}; the tensors have {}", what, said, what,
               found, found);
  return found;
}

}  // namespace

const Checkpoint::Entry* find_tensor(const Checkpoint& checkpoint, std::string_view name) {
  const std::string plain(name);
  std::string plural = plain;
  if (const auto at = plural.find("embedding."); at != std::string::npos)
    plural.insert(at + 9, "s");
  for (const std::string& spelling : {plain, plural, "model." + plain, "model." + plural}) {
    if (const auto* e = checkpoint.find(spelling)) return e;
  }
  return nullptr;
}

ModelConfig resolve_config(const ModelConfig& config, const Checkpoint& checkpoint) {
  ModelConfig c = config;
  int64_t n_layer = 0;
  for (const auto& e : checkpoint.entries()) n_layer = std::max(n_layer, layer_index(e.name) + 1);
  if (n_layer == 0) missing(layer_name(0, "norm.weight"), checkpoint);
  c.n_layer = settle("n_layer", c.n_layer, c.other_n_layer, n_layer);

  if (find_tensor(checkpoint, layer_name(0, "mixer.x_proj.weight")) == nullptr &&
      find_tensor(checkpoint, layer_name(0, "mixer.dt_bias")) != nullptr) {
    throw Error(ErrorKind::unsupported,
                fmt::format("config.json says {}, but the tensors are those of Mamba-2 "
                            "(mixer.dt_bias, no mixer.x_proj)",
                            c.family));
  }
  if (const auto* D = find_tensor(checkpoint, layer_name(0, "mixer.D"));
      D != nullptr && D->tensor.shape.rank() == 1) {
    c.d_inner = settle("d_inner", c.d_inner, c.other_d_inner, D->tensor.dim(0));
  }
  c.other_n_layer.clear();
  c.other_d_inner.clear();

  const auto* embedding = find_tensor(checkpoint, kEmbedding);
  if (embedding == nullptr) missing(std::string(kEmbedding), checkpoint);
  const Shape& shape = embedding->tensor.shape;
  if (shape.rank() != 2 || shape[0] < c.vocab_size || shape[0] > INT32_MAX) {
    throw Error(ErrorKind::format,
                fmt::format("{} in {}: expected at least vocab_size={} rows of {}, found {}",
                            embedding->name, embedding->file, c.vocab_size, c.d_model, shape.str()),
                "check that config.json and the tensors come from the same release");
  }
  c.vocab_rows = shape[0];
  return c;
}

WeightLoader::WeightLoader(const ModelConfig& config, const Checkpoint& checkpoint, Ops& op,
                           std::optional<DType> dtype, std::function<void(size_t, size_t)> progress)
    : config_(config), checkpoint_(checkpoint), op_(op), progress_(std::move(progress)) {
  for (const auto& e : checkpoint.entries()) bytes_total_ += e.tensor.bytes();
  if (dtype) {
    dtype_ = *dtype;
  } else if (const auto* e = find_tensor(checkpoint, layer_name(0, "mixer.in_proj.weight"));
             e != nullptr && is_float16_or_32(e->tensor.dtype)) {
    dtype_ = e->tensor.dtype;
  }
}

const Checkpoint::Entry& WeightLoader::require(const std::string& name, const Shape& shape) {
  const auto* e = find_tensor(checkpoint_, name);
  if (e == nullptr) missing(name, checkpoint_);
  if (!is_float(e->tensor.dtype)) {
    throw Error(ErrorKind::unsupported,
                fmt::format("{} in {}: expected f32, f16, bf16 or f64, found {}", e->name, e->file,
                            dtype_name(e->tensor.dtype)));
  }
  // conv1d.weight is [E, 1, K] from PyTorch, and [E, K] where a converter squeezed it.
  const Shape& found = e->tensor.shape;
  const bool squeezed = shape.rank() == 2 && found == Shape{shape[0], 1, shape[1]};
  if (found != shape && !squeezed) {
    throw Error(ErrorKind::format,
                fmt::format("{} in {}: expected {}, found {} {}", e->name, e->file, shape.str(),
                            found.str(), dtype_name(e->tensor.dtype)),
                fmt::format("config.json gives d_model={}, d_inner={}, d_state={}, d_conv={}, "
                            "dt_rank={}: check that it and the tensors come from the same release",
                            config_.d_model, config_.d_inner, config_.d_state, config_.d_conv,
                            config_.dt_rank));
  }
  return *e;
}

Tensor WeightLoader::import_computed(std::vector<float> values, const Shape& shape, DType as) {
  host_copies_.push_back(std::move(values));
  return op_.import_weight(Tensor(host_copies_.back().data(), DType::f32, shape), as);
}

Tensor WeightLoader::import(const Checkpoint::Entry& entry, const Shape& shape, DType as) {
  used_.insert(&entry);
  parameter_count_ += shape.numel();
  weight_bytes_ += static_cast<size_t>(shape.numel()) * itemsize(as);
  const Tensor host(entry.tensor.data, entry.tensor.dtype, shape);
  const Tensor device = host.dtype == DType::f64 ? import_computed(to_f32(host), shape, as)
                                                 : op_.import_weight(host, as);
  bytes_done_ += host.bytes();
  if (progress_) progress_(bytes_done_, bytes_total_);
  return device;
}

Tensor WeightLoader::matrix(const std::string& name, const Shape& shape) {
  return import(require(name, shape), shape, dtype_);
}

Tensor WeightLoader::vector(const std::string& name, const Shape& shape) {
  return import(require(name, shape), shape, DType::f32);
}

Tensor WeightLoader::optional_vector(const std::string& name, const Shape& shape) {
  return find_tensor(checkpoint_, name) != nullptr ? vector(name, shape) : Tensor();
}

Tensor WeightLoader::negative_exp(const std::string& name, const Shape& shape) {
  const auto& entry = require(name, shape);
  used_.insert(&entry);
  parameter_count_ += shape.numel();
  weight_bytes_ += static_cast<size_t>(shape.numel()) * sizeof(float);
  std::vector<float> values = to_f32(entry.tensor);
  for (float& v : values) v = -std::exp(v);
  bytes_done_ += entry.tensor.bytes();
  return import_computed(std::move(values), shape, DType::f32);
}

Tensor WeightLoader::head(const Tensor& embedding, const Shape& shape) {
  const auto* e = find_tensor(checkpoint_, kHead);
  if (e == nullptr) {
    if (!config_.tie_embeddings) {
      throw Error(
          ErrorKind::format,
          fmt::format("the tensor {} is missing, and config.json says that it is not tied to "
                      "the embedding",
                      kHead));
    }
    return embedding;
  }
  const auto& head = require(std::string(kHead), shape);
  if (same_bytes(head.tensor, find_tensor(checkpoint_, kEmbedding)->tensor)) {
    used_.insert(&head);
    bytes_done_ += head.tensor.bytes();
    return embedding;
  }
  if (config_.tie_embeddings) {
    spdlog::info("{} differs from the embedding: the head is not tied", kHead);
  }
  return import(head, shape, dtype_);
}

void WeightLoader::finish() {
  op_.weights_ready();
  if (progress_) progress_(bytes_total_, bytes_total_);

  constexpr size_t kNamed = 5;
  std::string names;
  size_t unused = 0;
  for (const auto& e : checkpoint_.entries()) {
    if (used_.contains(&e)) continue;
    if (unused++ < kNamed) names += (names.empty() ? "" : ", ") + e.name;
  }
  if (unused > 0) {
    spdlog::warn("{} tensors of the checkpoint are not used: {}{}", unused, names,
                 unused > kNamed ? ", ..." : "");
  }
}

std::vector<Mamba1Layer> load_mamba1_layers(WeightLoader& in, const ModelConfig& config) {
  const int64_t D = config.d_model;
  const int64_t E = config.d_inner;
  const int64_t N = config.d_state;
  const int64_t K = config.d_conv;
  const int64_t R = config.dt_rank;
  using L = Mamba1Layer;
  const LayerEntry table[] = {
      {"norm.weight", &L::norm, Role::vector, {D}},
      {"mixer.in_proj.weight", &L::in_proj, Role::matrix, {2 * E, D}},
      {"mixer.in_proj.bias", &L::in_proj_bias, Role::optional_vector, {2 * E}},
      {"mixer.conv1d.weight", &L::conv1d, Role::vector, {E, K}},
      {"mixer.conv1d.bias", &L::conv1d_bias, Role::optional_vector, {E}},
      {"mixer.x_proj.weight", &L::x_proj, Role::matrix, {R + 2 * N, E}},
      {"mixer.dt_proj.weight", &L::dt_proj, Role::matrix, {E, R}},
      {"mixer.dt_proj.bias", &L::dt_bias, Role::vector, {E}},
      {"mixer.A_log", &L::A, Role::negative_exp, {E, N}},
      {"mixer.D", &L::D, Role::vector, {E}},
      {"mixer.out_proj.weight", &L::out_proj, Role::matrix, {D, E}},
      {"mixer.out_proj.bias", &L::out_proj_bias, Role::optional_vector, {D}},
  };
  std::vector<Mamba1Layer> layers(static_cast<size_t>(config.n_layer));
  for (int64_t i = 0; i < config.n_layer; ++i) {
    for (const LayerEntry& t : table) {
      const std::string name = layer_name(i, t.name);
      Tensor& to = layers[static_cast<size_t>(i)].*t.member;
      switch (t.role) {
        case Role::matrix:
          to = in.matrix(name, t.shape);
          break;
        case Role::vector:
          to = in.vector(name, t.shape);
          break;
        case Role::optional_vector:
          to = in.optional_vector(name, t.shape);
          break;
        case Role::negative_exp:
          to = in.negative_exp(name, t.shape);
          break;
      }
    }
  }
  return layers;
}

}  // namespace krait
