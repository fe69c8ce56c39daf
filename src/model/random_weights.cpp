#include "model/random_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "model/family.h"

namespace krait {

namespace {

struct PublishedShape {
  std::string_view name;
  std::string_view family;
  int64_t n_layer;
  int64_t d_model;
  int64_t vocab_size;
  int64_t vocab_rows;
  bool tied;
  int64_t n_group = 0;
};
constexpr PublishedShape kPublished[] = {
    {"130m", "mamba1", 24, 768, 50277, 50280, true},
    {"370m", "mamba1", 48, 1024, 50277, 50280, true},
    {"790m", "mamba1", 48, 1536, 50277, 50280, true},
    {"1.4b", "mamba1", 48, 2048, 50277, 50280, true},
    {"2.8b", "mamba1", 64, 2560, 50277, 50280, true},
    {"falcon-mamba-7b", "falcon-mamba", 64, 4096, 65024, 65024, false},
    {"mamba2-130m", "mamba2", 24, 768, 50277, 50288, true, 1},
    {"mamba2-370m", "mamba2", 48, 1024, 50277, 50288, true, 1},
    {"mamba2-780m", "mamba2", 48, 1536, 50277, 50288, true, 1},
    {"mamba2-1.3b", "mamba2", 48, 2048, 50277, 50288, true, 1},
    {"mamba2-2.7b", "mamba2", 64, 2560, 50277, 50288, true, 1},
    {"codestral-mamba-7b", "mamba2", 64, 4096, 32768, 32768, false, 8},
};

/// SplitMix64 (Steele, Lea, Flood 2014): value i of stream `seed`, uniform in [0, 1).
float uniform(uint64_t seed, uint64_t i) {
  uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<float>((z ^ (z >> 31)) >> 40) * 0x1p-24F;
}

// Random numbers are made once per kind of matrix, as one period of this many; every matrix reads
// the repeated period from an offset of its own. A prime, so that no row of a matrix repeats
// another.
constexpr size_t kPeriod = (size_t{1} << 20) + 7;
// Where layers share memory, layer i begins i * kShift elements into it (256 bytes, for alignment).
constexpr size_t kShift = 128;

class RandomCheckpoint final : public Checkpoint {
 public:
  RandomCheckpoint(const ModelConfig& c, DType dtype, uint64_t seed, RandomMemory memory)
      : seed_(seed), shared_(memory == RandomMemory::shared) {
    const Shape table{c.vocab_rows, c.d_model};
    const float embedding_scale = std::sqrt(3.0F) * 0.05F;
    Kind embedding = kind(embedding_scale, dtype, 1);
    add("backbone.embedding.weight", embedding, table, 0);
    if (!c.tie_embeddings) {
      Kind head = kind(embedding_scale, dtype, 1);
      add("lm_head.weight", head, table, 0);
    }
    put("backbone.norm_f.weight", constant({c.d_model}, [](int64_t) { return 1.0F; }));
    for (const TensorRow& row : family_named(c.family).tensors(c)) add_rows(c, row, dtype);
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.name < b.name; });
  }

  [[nodiscard]] const std::vector<Entry>& entries() const override { return entries_; }
  [[nodiscard]] std::string_view format() const override { return "random"; }

 private:
  /// Matrices of one shape and scale.
  struct Kind {
    const std::byte* period;
    DType dtype;
    int64_t n_layer;
    std::byte* shared = nullptr;  ///< the memory in which the layers overlap
  };

  /// Every layer's tensor of that row.
  void add_rows(const ModelConfig& c, const TensorRow& row, DType dtype) {
    const auto name = [&](int64_t i) { return fmt::format("backbone.layers.{}.{}", i, row.name); };
    const auto matrices = [&](float scale) {
      Kind k = kind(scale, row.role == Role::matrix ? dtype : DType::f32, c.n_layer);
      for (int64_t i = 0; i < c.n_layer; ++i) add(name(i), k, row.shape, i);
    };
    const auto constants = [&](auto&& value) {
      const Tensor t = constant(row.shape, value);
      for (int64_t i = 0; i < c.n_layer; ++i) put(name(i), t);
    };
    const int64_t fan_in = row.shape[row.shape.rank() - 1];
    const float width = 1.0F / std::sqrt(static_cast<float>(fan_in));
    const auto random = [&](int64_t i) { return uniform(seed_, static_cast<uint64_t>(i)); };
    switch (row.init) {
      case Init::absent:
        return;
      case Init::zeros:
        return constants([](int64_t) { return 0.0F; });
      case Init::ones:
        return constants([](int64_t) { return 1.0F; });
      case Init::matrix:
        return matrices(std::sqrt(3.0F) * width);
      case Init::out:
        return matrices(std::sqrt(3.0F) * width / std::sqrt(static_cast<float>(c.n_layer)));
      case Init::uniform:
        return matrices(width);
      case Init::decay:
        if (row.shape.rank() == 2) {
          return constants([&](int64_t i) { return std::log(static_cast<float>(i % fan_in + 1)); });
        }
        return constants([&](int64_t i) { return std::log(1.0F + 15.0F * random(i)); });
      case Init::dt_bias:
        return constants([&](int64_t i) {
          const float dt = 0.001F * std::pow(100.0F, random(i));
          return dt + std::log(-std::expm1(-dt));  // inverse of softplus
        });
    }
  }

  Kind kind(float scale, DType dtype, int64_t n_layer) {
    std::byte* period = allocate(kPeriod * itemsize(dtype));
    const uint64_t stream = seed_ + 0x632be59bd9b4e019ULL * ++n_kind_;
    visit_dtype(dtype, "random weights", [&](auto zero) {
      using T = decltype(zero);
      for (size_t i = 0; i < kPeriod; ++i) {
        const T v(scale * (2 * uniform(stream, i) - 1));
        std::memcpy(period + i * sizeof(T), &v, sizeof(T));
      }
    });
    return {period, dtype, n_layer};
  }

  std::byte* allocate(size_t bytes) {
    // Uninitialised: every byte is written before it is read.
    memory_.emplace_back(new std::byte[bytes]);
    return memory_.back().get();
  }

  /// n elements of the repeated period, from element `first` on.
  static void repeat(std::byte* to, const Kind& k, size_t first, size_t n) {
    const size_t size = itemsize(k.dtype);
    for (size_t at = first % kPeriod; n > 0; at = 0) {
      const size_t m = std::min(n, kPeriod - at);
      std::memcpy(to, k.period + at * size, m * size);
      to += m * size;
      n -= m;
    }
  }

  void add(const std::string& name, Kind& k, const Shape& shape, int64_t layer) {
    const auto n = static_cast<size_t>(shape.numel());
    const size_t shift = static_cast<size_t>(layer) * kShift;
    std::byte* data = nullptr;
    if (shared_) {
      if (k.shared == nullptr) {
        const size_t length = n + static_cast<size_t>(k.n_layer) * kShift;
        k.shared = allocate(length * itemsize(k.dtype));
        repeat(k.shared, k, 0, length);
      }
      data = k.shared + shift * itemsize(k.dtype);
    } else {
      data = allocate(n * itemsize(k.dtype));
      repeat(data, k, shift, n);
    }
    put(name, Tensor(data, k.dtype, shape));
  }

  template <typename F>
  Tensor constant(const Shape& shape, F&& value) {
    const auto n = static_cast<size_t>(shape.numel());
    auto* data = reinterpret_cast<float*>(allocate(n * sizeof(float)));
    for (size_t i = 0; i < n; ++i) data[i] = value(static_cast<int64_t>(i));
    return {data, DType::f32, shape};
  }

  void put(const std::string& name, const Tensor& tensor) {
    entries_.push_back({name, tensor, "random weights"});
  }

  uint64_t seed_;
  bool shared_;
  uint64_t n_kind_ = 0;
  std::vector<Entry> entries_;
  std::vector<std::unique_ptr<std::byte[]>> memory_;
};

}  // namespace

ModelConfig published_config(std::string_view name) {
  std::string known;
  for (const PublishedShape& p : kPublished) {
    if (p.name == name) {
      ModelConfig c;
      c.family = p.family;
      c.layout = "state-spaces";
      c.d_model = p.d_model;
      c.n_layer = p.n_layer;
      c.vocab_size = p.vocab_size;
      c.vocab_rows = p.vocab_rows;
      c.tie_embeddings = p.tied;
      c.d_inner = 2 * p.d_model;
      c.d_conv = 4;
      if (p.family == "mamba2") {
        c.d_state = 128;
        c.head_dim = 64;
        c.n_head = c.d_inner / c.head_dim;
        c.n_group = p.n_group;
        c.mixer_norm_eps = 1e-5F;
      } else {
        c.d_state = 16;
        c.dt_rank = p.d_model / 16;
        if (p.family == "falcon-mamba") c.mixer_norm_eps = 1e-6F;
      }
      c.eos_ids = {0};
      return c;
    }
    known += (known.empty() ? "" : ", ") + std::string(p.name);
  }
  throw Error(ErrorKind::usage, fmt::format("no published shape is called {}", name),
              fmt::format("one of {}", known));
}

std::unique_ptr<Checkpoint> make_random_checkpoint(const ModelConfig& config, DType dtype,
                                                   uint64_t seed, RandomMemory memory) {
  return std::make_unique<RandomCheckpoint>(config, dtype, seed, memory);
}

}  // namespace krait
