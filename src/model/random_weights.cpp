#include "model/random_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

namespace krait {

namespace {

struct PublishedShape {
  std::string_view name;
  int64_t n_layer;
  int64_t d_model;
};
constexpr PublishedShape kPublished[] = {
    {"130m", 24, 768},  {"370m", 48, 1024}, {"790m", 48, 1536},
    {"1.4b", 48, 2048}, {"2.8b", 64, 2560},
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
    const int64_t D = c.d_model;
    const int64_t E = c.d_inner;
    const int64_t N = c.d_state;
    const int64_t R = c.dt_rank;
    const auto width = [](int64_t n) { return 1.0F / std::sqrt(static_cast<float>(n)); };
    // Uniform in +-sqrt(3 / fan_in) keeps the variance; out_proj is scaled down by the number of
    // residual additions.
    const float sqrt3 = std::sqrt(3.0F);
    Kind embedding = kind(sqrt3 * 0.05F, dtype, 1);
    Kind in_proj = kind(sqrt3 * width(D), dtype, c.n_layer);
    Kind x_proj = kind(sqrt3 * width(E), dtype, c.n_layer);
    Kind dt_proj = kind(width(R), dtype, c.n_layer);
    Kind out_proj = kind(sqrt3 * width(E) * width(c.n_layer), dtype, c.n_layer);
    Kind conv = kind(width(c.d_conv), DType::f32, c.n_layer);
    add("backbone.embedding.weight", embedding, {c.vocab_rows, D}, 0);
    const Tensor ones = constant({std::max(D, E)}, [](int64_t) { return 1.0F; });
    const Tensor zeros = constant({E}, [](int64_t) { return 0.0F; });
    const Tensor A_log =
        constant({E, N}, [&](int64_t i) { return std::log(static_cast<float>(i % N + 1)); });
    const Tensor dt_bias = constant({E}, [&](int64_t i) {
      const float dt = 0.001F * std::pow(100.0F, uniform(seed_, static_cast<uint64_t>(i)));
      return dt + std::log(-std::expm1(-dt));  // inverse of softplus
    });
    for (int64_t i = 0; i < c.n_layer; ++i) {
      const auto name = [&](std::string_view rest) {
        return fmt::format("backbone.layers.{}.{}", i, rest);
      };
      put(name("norm.weight"), Tensor(ones.data, DType::f32, {D}));
      add(name("mixer.in_proj.weight"), in_proj, {2 * E, D}, i);
      add(name("mixer.conv1d.weight"), conv, {E, 1, c.d_conv}, i);
      put(name("mixer.conv1d.bias"), zeros);
      add(name("mixer.x_proj.weight"), x_proj, {R + 2 * N, E}, i);
      add(name("mixer.dt_proj.weight"), dt_proj, {E, R}, i);
      put(name("mixer.dt_proj.bias"), dt_bias);
      put(name("mixer.A_log"), A_log);
      put(name("mixer.D"), Tensor(ones.data, DType::f32, {E}));
      add(name("mixer.out_proj.weight"), out_proj, {D, E}, i);
    }
    put("backbone.norm_f.weight", Tensor(ones.data, DType::f32, {D}));
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
      c.family = "mamba1";
      c.layout = "state-spaces";
      c.d_model = p.d_model;
      c.n_layer = p.n_layer;
      c.vocab_size = 50277;
      c.vocab_rows = 50280;
      c.d_inner = 2 * p.d_model;
      c.d_state = 16;
      c.d_conv = 4;
      c.dt_rank = p.d_model / 16;
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
