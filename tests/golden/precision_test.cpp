// What 16-bit weights cost: the shipped model on real text, against the same weights in f32.
//
// For every position of the text, p is the next-token distribution of the f32 run and q that of the
// 16-bit run. Limits (design, section 4): mean KL(p || q) < 2e-3, the most likely token equal in
// more than 98% of positions.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "model/config.h"
#include "model/model.h"
#include "runtime/engine.h"
#include "support/test_support.h"
#include "tokenizer/tokenizer.h"

namespace krait::test {
namespace {

/// The model in models/ that ships with krait: the one folder there with weights.
std::filesystem::path shipped_model() {
  for (const auto& entry : std::filesystem::directory_iterator(models_dir())) {
    if (std::filesystem::exists(entry.path() / "model.safetensors")) return entry.path();
  }
  throw std::runtime_error("models/ holds no model.safetensors");
}

struct Divergence {
  double mean_kl = 0;
  double top1 = 0;  ///< share of positions whose most likely token is equal
};

class Text {
 public:
  Text() : tokenizer_(open_tokenizer(shipped_model())) {
    ids_ = tokenizer_->encode(read_file(data_dir() / "text" / "wind-in-the-willows.txt"));
    ids_.resize(std::min<size_t>(ids_.size(), 4096));
  }
  [[nodiscard]] std::span<const int32_t> ids() const { return ids_; }

 private:
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<int32_t> ids_;
};

/// Log-probabilities of every position, f32 [n, vocab].
std::vector<float> log_probs(Ops& op, DType weights, DType state, std::span<const int32_t> ids) {
  const auto checkpoint = open_checkpoint(shipped_model());
  const auto config = resolve_config(read_config(shipped_model() / "config.json"), *checkpoint);
  const auto model = load_model(config, *checkpoint, op, weights);
  EngineOptions options;
  options.state_dtype = state;
  Engine engine(*model, op, options);
  engine.open(0, SampleParams{});
  const auto vocab = static_cast<size_t>(config.vocab_size);
  std::vector<float> all(ids.size() * vocab);
  engine.prefill(0, ids, /*sample=*/false, [&](int64_t first, int64_t n, const float* rows) {
    for (int64_t r = 0; r < n; ++r) {
      const float* from = rows + r * config.vocab_size;
      float* to = &all[static_cast<size_t>(first + r) * vocab];
      const float top = *std::max_element(from, from + vocab);
      double sum = 0;
      for (size_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(from[v] - top));
      const auto log_sum = static_cast<float>(std::log(sum)) + top;
      for (size_t v = 0; v < vocab; ++v) to[v] = from[v] - log_sum;
    }
  });
  return all;
}

Divergence diverge(const std::vector<float>& p, const std::vector<float>& q, size_t n) {
  const size_t vocab = p.size() / n;
  Divergence d;
  for (size_t t = 0; t < n; ++t) {
    const float* a = &p[t * vocab];
    const float* b = &q[t * vocab];
    for (size_t v = 0; v < vocab; ++v) {
      d.mean_kl += std::exp(static_cast<double>(a[v])) * (static_cast<double>(a[v]) - b[v]);
    }
    d.top1 += std::max_element(a, a + vocab) - a == std::max_element(b, b + vocab) - b ? 1 : 0;
  }
  d.mean_kl /= static_cast<double>(n);
  d.top1 /= static_cast<double>(n);
  return d;
}

void expect_close(Ops& op, DType weights, DType state) {
  const Text text;
  const auto ids = text.ids().first(op.backend() == "cpu" ? 1024 : text.ids().size());
  const auto p = log_probs(op, DType::f32, DType::f32, ids);
  const auto q = log_probs(op, weights, state, ids);
  const Divergence d = diverge(p, q, ids.size());
  std::printf("%s, weights %s, state %s: mean KL %.2e, top-1 equal %.2f%%\n",
              std::string(op.backend()).c_str(), std::string(dtype_name(weights)).c_str(),
              std::string(dtype_name(state)).c_str(), d.mean_kl, d.top1 * 100);
  EXPECT_TRUE(d.mean_kl < 2e-3) << d.mean_kl;
  EXPECT_TRUE(d.top1 > 0.98) << d.top1;
}

TEST(Precision, CpuF16) { expect_close(*make_cpu_ops(0), DType::f16, DType::f32); }
TEST(Precision, CpuBf16) { expect_close(*make_cpu_ops(0), DType::bf16, DType::f32); }

TEST(Precision, GpuF16) { expect_close(*make_cuda_ops(0), DType::f16, DType::f32); }
TEST(Precision, GpuBf16) { expect_close(*make_cuda_ops(0), DType::bf16, DType::f32); }
TEST(Precision, GpuF16State) { expect_close(*make_cuda_ops(0), DType::bf16, DType::f16); }

/// The two backends in f32, on real text: the CPU is the definition.
TEST(Precision, GpuF32EqualsCpu) {
  const Text text;
  const auto cpu = make_cpu_ops(0);
  const auto gpu = make_cuda_ops(0);
  const auto ids = text.ids().first(512);
  const auto want = log_probs(*cpu, DType::f32, DType::f32, ids);
  EXPECT_TRUE(near_std(log_probs(*gpu, DType::f32, DType::f32, ids), want, 1e-4));
}

}  // namespace
}  // namespace krait::test
