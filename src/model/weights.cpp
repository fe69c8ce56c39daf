#include "model/weights.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>

#include "base/log.h"
#include "checkpoint/elements.h"
#include "checkpoint/ggml_blocks.h"

namespace krait {

namespace {

constexpr std::string_view kEmbedding = "backbone.embedding.weight";
constexpr std::string_view kHead = "lm_head.weight";

std::string layer_name(int64_t layer, std::string_view rest) {
  return fmt::format("backbone.layers.{}.{}", layer, rest);
}

[[noreturn]] void missing(const std::string& name, const Checkpoint& checkpoint) {
  throw Error(
      ErrorKind::format,
      fmt::format("the tensor {} is missing ({} tensors found)", name, checkpoint.entries().size()),
      "the file may be cut short, or be of another model than its config.json");
}

HostCopy to_f32(const Checkpoint::Entry& e) {
  const int64_t n = e.shape().numel();
  auto copy = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(n) * sizeof(float));
  read_elements(e, 0, n, reinterpret_cast<float*>(copy.get()));
  return copy;
}

/// Where a GGUF file has A instead of A_log.
std::string plain_a(std::string_view name) {
  constexpr std::string_view kLog = "_log";
  return std::string(name.ends_with(kLog) ? name.substr(0, name.size() - kLog.size()) : name);
}

/// "d_model=64, n_layer=3, ..."
std::string sizes_of(const ModelConfig& c) {
  std::string s;
  for (const ConfigSize& size : kConfigSizes) {
    if (c.*size.value == 0) continue;
    s += fmt::format("{}{}={}", s.empty() ? "" : ", ", size.name, c.*size.value);
  }
  return s;
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

/// Whether the first block has a tensor for every row of the family's table.
bool has_tensors_of(const Family& family, const ModelConfig& config, const Checkpoint& checkpoint) {
  const auto table = family.tensors(config);
  return std::all_of(table.begin(), table.end(), [&](const TensorRow& row) {
    const std::string name = layer_name(0, row.name);
    return row.role == Role::optional_vector || find_tensor(checkpoint, name) != nullptr ||
           (row.role == Role::negative_exp && find_tensor(checkpoint, plain_a(name)) != nullptr);
  });
}

/// Another family whose names the tensors have, while they lack those of the config's; else null.
const Family* other_family(const ModelConfig& config, const Checkpoint& checkpoint) {
  if (has_tensors_of(family_named(config.family), config, checkpoint)) return nullptr;
  for (const Family& f : families()) {
    if (f.load != nullptr && has_tensors_of(f, config, checkpoint)) return &f;
  }
  return nullptr;
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

bool same_bytes(const Checkpoint::Entry& x, const Checkpoint::Entry& y) {
  const Tensor& a = x.tensor;
  const Tensor& b = y.tensor;
  return x.blocks == y.blocks && a.dtype == b.dtype && a.shape == b.shape &&
         (a.data == b.data || std::memcmp(a.data, b.data, a.bytes()) == 0);
}

DType matrix_dtype(const Checkpoint& checkpoint) {
  const auto* e = find_tensor(checkpoint, layer_name(0, "mixer.in_proj.weight"));
  // Of the 16-bit types f16 is closer to what a block says: its scale is one, times a few bits.
  if (e != nullptr && e->blocks != nullptr) return DType::f16;
  return e != nullptr && is_float16_or_32(e->tensor.dtype) ? e->tensor.dtype : DType::f32;
}

ModelConfig resolve_config(const ModelConfig& config, const Checkpoint& checkpoint) {
  ModelConfig c = config;
  int64_t n_layer = 0;
  for (const auto& e : checkpoint.entries()) n_layer = std::max(n_layer, layer_index(e.name) + 1);
  if (n_layer == 0) missing(layer_name(0, "norm.weight"), checkpoint);
  c.n_layer = settle("n_layer", c.n_layer, c.other_n_layer, n_layer);

  const Family* of_tensors = other_family(c, checkpoint);
  if (of_tensors != nullptr) {
    throw Error(ErrorKind::format,
                fmt::format("config.json says {}, but the tensors are those of {}",
                            family_named(c.family).title, of_tensors->title),
                "check that config.json and the tensors come from the same release");
  }
  if (const auto* out = find_tensor(checkpoint, layer_name(0, "mixer.out_proj.weight"));
      out != nullptr && out->shape().rank() == 2 && out->shape()[0] == c.d_model) {
    c.d_inner = settle("d_inner", c.d_inner, c.other_d_inner, out->shape()[1]);
  }
  c.other_n_layer.clear();
  c.other_d_inner.clear();

  const auto* embedding = find_tensor(checkpoint, kEmbedding);
  if (embedding == nullptr) missing(std::string(kEmbedding), checkpoint);
  const Shape shape = embedding->shape();
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
  dtype_ = dtype.value_or(matrix_dtype(checkpoint));
}

const Checkpoint::Entry& require_tensor(const Checkpoint& checkpoint, const ModelConfig& config,
                                        const std::string& name, const Shape& shape) {
  const auto* e = find_tensor(checkpoint, name);
  if (e == nullptr) missing(name, checkpoint);
  if (!is_real(*e)) {
    throw Error(ErrorKind::unsupported,
                fmt::format("{} in {}: expected f32, f16, bf16 or f64, found {}", e->name, e->file,
                            e->type_name()));
  }
  // conv1d.weight is [E, 1, K] from PyTorch, and [E, K] where a converter squeezed it.
  const Shape found = e->shape();
  const bool squeezed = shape.rank() == 2 && found == Shape{shape[0], 1, shape[1]};
  if (found != shape && !squeezed) {
    throw Error(ErrorKind::format,
                fmt::format("{} in {}: expected {}, found {} {}", e->name, e->file, shape.str(),
                            found.str(), e->type_name()),
                fmt::format("config.json gives {}: check that it and the tensors come from the "
                            "same release",
                            sizes_of(config)));
  }
  return *e;
}

const Checkpoint::Entry& WeightLoader::require(const std::string& name, const Shape& shape) {
  return require_tensor(checkpoint_, config_, name, shape);
}

Tensor WeightLoader::import_computed(HostCopy values, DType dtype, const Shape& shape, DType as) {
  const Tensor weight = op_.import_weight(Tensor(values.get(), dtype, shape), as);
  if (weight.data == values.get()) host_copies_.push_back(std::move(values));
  return weight;
}

/// Dequantises straight to `as`, so that the host holds no second form of a large matrix.
Tensor WeightLoader::import_dequantized(const Checkpoint::Entry& entry, const Shape& shape,
                                        DType as) {
  const BlockFormat& format = *entry.blocks;
  const int64_t n_block = shape.numel() / format.elements;
  auto values = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(shape.numel()) *
                                                            itemsize(as));
  if (!pool_) pool_ = std::make_unique<ThreadPool>(0);
  visit_dtype(as, "a weight", [&](auto type) {
    using T = decltype(type);
    auto* out = reinterpret_cast<T*>(values.get());
    pool_->parallel_for(n_block, 64, [&](int64_t begin, int64_t end) {
      std::array<float, 256> block{};  // of the largest block
      for (int64_t i = begin; i < end; ++i) {
        read_elements(entry, i * format.elements, format.elements, block.data());
        std::transform(block.begin(), block.begin() + format.elements, out + i * format.elements,
                       [](float v) { return static_cast<T>(v); });
      }
    });
  });
  return import_computed(std::move(values), as, shape, as);
}

Tensor WeightLoader::import(const Checkpoint::Entry& entry, const Shape& shape, DType as) {
  used_.insert(&entry);
  parameter_count_ += shape.numel();
  weight_bytes_ += static_cast<size_t>(shape.numel()) * itemsize(as);
  const Tensor host(entry.tensor.data, entry.tensor.dtype, shape);
  const Tensor device = entry.blocks != nullptr ? import_dequantized(entry, shape, as)
                        : host.dtype == DType::f64
                            ? import_computed(to_f32(entry), DType::f32, shape, as)
                            : op_.import_weight(host, as);
  bytes_done_ += entry.tensor.bytes();
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
  if (find_tensor(checkpoint_, name) == nullptr &&
      find_tensor(checkpoint_, plain_a(name)) != nullptr) {
    return vector(plain_a(name), shape);
  }
  const auto& entry = require(name, shape);
  used_.insert(&entry);
  parameter_count_ += shape.numel();
  weight_bytes_ += static_cast<size_t>(shape.numel()) * sizeof(float);
  HostCopy copy = to_f32(entry);
  auto* values = reinterpret_cast<float*>(copy.get());
  for (int64_t i = 0; i < shape.numel(); ++i) values[i] = -std::exp(values[i]);
  bytes_done_ += entry.tensor.bytes();
  return import_computed(std::move(copy), DType::f32, shape, DType::f32);
}

Tensor WeightLoader::layer_tensor(int64_t layer, const TensorRow& row) {
  const std::string name = layer_name(layer, row.name);
  switch (row.role) {
    case Role::matrix:
      return matrix(name, row.shape);
    case Role::vector:
      return vector(name, row.shape);
    case Role::optional_vector:
      return optional_vector(name, row.shape);
    case Role::negative_exp:
      return negative_exp(name, row.shape);
  }
  return {};
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
  if (same_bytes(head, *find_tensor(checkpoint_, kEmbedding))) {
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

}  // namespace krait
