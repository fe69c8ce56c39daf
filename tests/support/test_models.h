// What tests of models share: the backends by name, checkpoints in memory that can be damaged, tiny
// configurations, and logits by the engine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "kernels/ops.h"
#include "model/model.h"
#include "model/random_weights.h"
#include "runtime/engine.h"

namespace krait::test {

/// A backend to run a case on. Cases on "Gpu" carry that word in their names and so the label gpu;
/// where there is no device they fail.
struct Backend {
  const char* name;
  std::unique_ptr<Ops> (*make)();
};
inline constexpr Backend kBackends[] = {
    {"CpuPlain", [] { return make_cpu_ops(1, /*fast=*/false); }},
    {"CpuFast", [] { return make_cpu_ops(2, /*fast=*/true); }},
    {"Gpu", [] { return make_cuda_ops(0); }},
};
inline void PrintTo(const Backend& b, std::ostream* out) { *out << b.name; }

/// Tensors in memory: copied from another checkpoint, then changed by the test.
class MemoryCheckpoint final : public Checkpoint {
 public:
  MemoryCheckpoint() = default;
  explicit MemoryCheckpoint(const Checkpoint& from) {
    for (const Entry& e : from.entries()) {
      put(e.name, e.tensor.dtype, e.tensor.shape, e.tensor.data, e.file);
    }
  }

  MemoryCheckpoint(const MemoryCheckpoint& from)
      : MemoryCheckpoint(static_cast<const Checkpoint&>(from)) {}
  MemoryCheckpoint(MemoryCheckpoint&&) = default;
  MemoryCheckpoint& operator=(const MemoryCheckpoint&) = delete;
  MemoryCheckpoint& operator=(MemoryCheckpoint&&) = default;

  /// Adds or replaces a tensor with a copy of `data` (zeros when null).
  void put(const std::string& name, DType dtype, const Shape& shape, const void* data = nullptr,
           const std::string& file = "memory") {
    erase(name);
    const Tensor view(nullptr, dtype, shape);
    auto& bytes = memory_.emplace_back(new std::byte[view.bytes() + 1]());
    if (data != nullptr) std::memcpy(bytes.get(), data, view.bytes());
    entries_.push_back({name, Tensor(bytes.get(), dtype, shape), file});
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.name < b.name; });
  }
  void put(const std::string& name, const Shape& shape, const std::vector<float>& values) {
    put(name, DType::f32, shape, values.data());
  }
  void erase(const std::string& name) {
    std::erase_if(entries_, [&](const Entry& e) { return e.name == name; });
  }
  void rename(const std::string& from, const std::string& to) {
    const Entry e = *find(from);
    put(to, e.tensor.dtype, e.tensor.shape, e.tensor.data, e.file);
    erase(from);
  }
  [[nodiscard]] float* values(const std::string& name) const {
    return find(name)->tensor.as<float>();
  }

  [[nodiscard]] const std::vector<Entry>& entries() const override { return entries_; }
  [[nodiscard]] std::string_view format() const override { return "memory"; }

 private:
  std::vector<Entry> entries_;
  std::vector<std::unique_ptr<std::byte[]>> memory_;
};

/// A small model whose dimensions all differ, with padding rows in the vocabulary.
inline ModelConfig tiny_config() {
  ModelConfig c;
  c.family = "mamba1";
  c.layout = "state-spaces";
  c.d_model = 24;
  c.n_layer = 2;
  c.vocab_size = 101;
  c.vocab_rows = 104;
  c.d_inner = 40;
  c.d_state = 16;
  c.d_conv = 4;
  c.dt_rank = 3;
  return c;
}

/// Random weights with a livelier embedding, so that logits differ clearly.
inline MemoryCheckpoint tiny_checkpoint(const ModelConfig& config, uint64_t seed = 1) {
  const auto random = make_random_checkpoint(config, DType::f32, seed, RandomMemory::distinct);
  MemoryCheckpoint c(*random);
  float* embedding = c.values("backbone.embedding.weight");
  for (int64_t i = 0; i < config.vocab_rows * config.d_model; ++i) embedding[i] *= 10;
  return c;
}

/// A model and the device it lives on.
struct LoadedModel {
  std::unique_ptr<Ops> op;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<Model> model;
};
inline LoadedModel load(const Backend& backend, const ModelConfig& config,
                        std::unique_ptr<Checkpoint> checkpoint,
                        std::optional<DType> dtype = DType::f32) {
  LoadedModel m;
  m.op = backend.make();
  m.checkpoint = std::move(checkpoint);
  m.model = load_model(config, *m.checkpoint, *m.op, dtype);
  return m;
}
inline LoadedModel load_tiny(const Backend& backend) {
  return load(backend, tiny_config(),
              std::make_unique<MemoryCheckpoint>(tiny_checkpoint(tiny_config())));
}

/// Logits of every position of `ids` fed to a new sequence in pieces of the given sizes (the rest
/// in one): f32 [ids.size(), vocab_size].
inline std::vector<float> all_logits(Engine& engine, int64_t vocab, std::span<const int32_t> ids,
                                     const std::vector<size_t>& pieces = {}, int slot = 0) {
  std::vector<float> all(ids.size() * static_cast<size_t>(vocab));
  const LogitsSink sink = [&](int64_t first, int64_t n, const float* rows) {
    std::copy_n(rows, n * vocab, all.begin() + first * vocab);
  };
  engine.open(slot, SampleParams{});
  for (const size_t piece : pieces) {
    const size_t n = std::min(piece, ids.size());
    if (n == 0) break;
    engine.prefill(slot, ids.first(n), /*sample=*/false, sink);
    ids = ids.subspan(n);
  }
  if (!ids.empty()) engine.prefill(slot, ids, /*sample=*/false, sink);
  return all;
}

/// Mean of KL(p || q) over positions, p and q the softmax of rows of logits.
inline double mean_kl(std::span<const float> p_logits, std::span<const float> q_logits,
                      size_t vocab) {
  const auto log_softmax = [](std::span<const float> row) {
    const float top = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (const float v : row) sum += std::exp(static_cast<double>(v) - top);
    std::vector<double> out(row.begin(), row.end());
    for (double& v : out) v -= top + std::log(sum);
    return out;
  };
  double kl = 0;
  for (size_t at = 0; at < p_logits.size(); at += vocab) {
    const auto p = log_softmax(p_logits.subspan(at, vocab));
    const auto q = log_softmax(q_logits.subspan(at, vocab));
    for (size_t v = 0; v < vocab; ++v) kl += std::exp(p[v]) * (p[v] - q[v]);
  }
  return kl / (static_cast<double>(p_logits.size()) / static_cast<double>(vocab));
}

/// `n` tokens: the one that prefill sampled, then steps. Keeps one launch ahead, as a program
/// would.
inline std::vector<int32_t> generate(Engine& engine, int slot, std::span<const int32_t> prompt,
                                     size_t n) {
  engine.prefill(slot, prompt);
  std::vector<int32_t> ids;
  while (ids.size() < n) {
    if (ids.size() + 1 < n) engine.step({{slot}});
    ids.push_back(engine.receive()[0]);
  }
  return ids;
}

inline SampleParams greedy() {
  SampleParams p;
  p.temperature = 0;
  return p;
}

/// Random token ids, the same for the same seed.
inline std::vector<int32_t> random_ids(size_t n, int64_t vocab, uint64_t seed) {
  std::vector<int32_t> ids(n);
  for (int32_t& id : ids) {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    id = static_cast<int32_t>((seed >> 33) % static_cast<uint64_t>(vocab));
  }
  return ids;
}

}  // namespace krait::test
