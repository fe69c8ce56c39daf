// What 16-bit weights cost: the shipped model on real text, against the same weights in f32.
//
// For every position of the text, p is the next-token distribution of the f32 run and q that of the
// 16-bit run. Limits (design, section 4): mean KL(p || q) < 2e-3, the most likely token equal in
// more than 98% of positions.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "model/config.h"
#include "support/test_models.h"
#include "support/test_support.h"
#include "tokenizer/tokenizer.h"

namespace krait::test {
namespace {

constexpr size_t kVocab = 8192;

/// The first `n` tokens of a real text.
std::vector<int32_t> text_ids(size_t n) {
  const auto tokenizer = open_tokenizer(models_dir() / "hognose");
  std::vector<int32_t> ids =
      tokenizer->encode(read_file(data_dir() / "text" / "wind-in-the-willows.txt"));
  ids.resize(std::min(ids.size(), n));
  return ids;
}

/// Logits of every position, f32 [n, kVocab].
std::vector<float> logits(const Backend& backend, DType weights, DType state,
                          const std::vector<int32_t>& ids) {
  const auto folder = models_dir() / "hognose";
  const LoadedModel m =
      load(backend, read_config(folder / "config.json"), open_checkpoint(folder), weights);
  EngineOptions options;
  options.state_dtype = state;
  Engine engine(*m.model, *m.op, options);
  return all_logits(engine, kVocab, ids);
}

void expect_close(const Backend& backend, size_t n, DType weights, DType state) {
  const auto ids = text_ids(n);
  const auto want = logits(backend, DType::f32, DType::f32, ids);
  const auto got = logits(backend, weights, state, ids);
  const auto top = [](const std::vector<float>& rows, size_t t) {
    const auto row = rows.begin() + static_cast<ptrdiff_t>(t * kVocab);
    return std::max_element(row, row + kVocab) - row;
  };
  size_t same = 0;
  for (size_t t = 0; t < ids.size(); ++t) same += top(want, t) == top(got, t) ? 1 : 0;
  const double kl = mean_kl(want, got, kVocab);
  const double top1 = static_cast<double>(same) / static_cast<double>(ids.size());
  std::printf("%s, weights %s, state %s: mean KL %.2e, top-1 equal %.2f%%\n", backend.name,
              std::string(dtype_name(weights)).c_str(), std::string(dtype_name(state)).c_str(), kl,
              top1 * 100);
  EXPECT_TRUE(kl < 2e-3) << kl;
  EXPECT_TRUE(top1 > 0.98) << top1;
}

constexpr const Backend& kCpu = kBackends[1];
constexpr const Backend& kGpu = kBackends[2];

TEST(Precision, CpuF16) { expect_close(kCpu, 1024, DType::f16, DType::f32); }
TEST(Precision, CpuBf16) { expect_close(kCpu, 1024, DType::bf16, DType::f32); }

TEST(Precision, GpuF16) { expect_close(kGpu, 4096, DType::f16, DType::f32); }
TEST(Precision, GpuBf16) { expect_close(kGpu, 4096, DType::bf16, DType::f32); }
TEST(Precision, GpuF16State) { expect_close(kGpu, 4096, DType::bf16, DType::f16); }

/// The two backends in f32, on real text: the CPU is the definition.
TEST(Precision, GpuF32EqualsCpu) {
  const auto ids = text_ids(512);
  const auto want = logits(kCpu, DType::f32, DType::f32, ids);
  EXPECT_TRUE(near_std(logits(kGpu, DType::f32, DType::f32, ids), want, 1e-4));
}

}  // namespace
}  // namespace krait::test
