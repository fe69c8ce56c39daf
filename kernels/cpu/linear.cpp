// linear.cpp - out = in * W^T (+ bias), or out += the same, for f32, bf16 and f16 weights.
//
// Every output element is one vector of partial sums that walks the n_in products in order, summed
// across its lanes at the end. Tiles, blocks and threads decide which elements are computed
// together, never how one is computed: a token's result is the same to the last bit alone, in a
// prompt, and in any batch.
//
// Tile    kTileRows rows of W x up to kTileTokens tokens, one vector register for each element
// Block   tokens whose inputs fit half of the L2 cache, so that W is read once per block
// Bytes   few tokens: n_out * n_in * sizeof(W), read once: bound by memory
// Flops   2 * n * n_out * n_in; many tokens: bound by arithmetic
// Same as PlainOps::linear (plain.cpp); tests/ops/linear_test.cpp
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear.cpp"
#include "kernels/cpu/targets.h"
// targets.h chooses what foreach_target compiles, so it comes first.
#include <hwy/foreach_target.h>

#include "kernels/cpu/fast.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::cpu::HWY_NAMESPACE {
namespace {

// AVX-512 has 32 registers, others have 16: sums, a row of weights each, one input.
constexpr int kTileRows = 4;
constexpr int kTileTokens = HWY_TARGET <= HWY_AVX3 ? 6 : 2;

template <int kRows, int kTokens, typename W>
HWY_INLINE void tile(float* HWY_RESTRICT out, int64_t out_stride, const float* HWY_RESTRICT in,
                     int64_t in_stride, const W* HWY_RESTRICT weight, int64_t n_in,
                     const float* HWY_RESTRICT bias, bool add) {
  const F32 d;
  V32 sum[kRows][kTokens];
  KRAIT_UNROLL for (int r = 0; r < kRows; ++r) {
    KRAIT_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t] = hn::Zero(d);
  }
  const int64_t n = lanes();
  const auto step = [&](int64_t k, auto&& load_weight, auto&& load_input) HWY_ATTR {
    V32 w[kRows];
    KRAIT_UNROLL for (int r = 0; r < kRows; ++r) w[r] = load_weight(weight + r * n_in + k);
    KRAIT_UNROLL for (int t = 0; t < kTokens; ++t) {
      const V32 x = load_input(in + t * in_stride + k);
      KRAIT_UNROLL for (int r = 0; r < kRows; ++r) sum[r][t] = hn::MulAdd(w[r], x, sum[r][t]);
    }
  };
  int64_t k = 0;
  for (; k + n <= n_in; k += n) {
    step(
        k, [](const W* p) HWY_ATTR { return load(p); },
        [](const float* p) HWY_ATTR { return load(p); });
  }
  if (k < n_in) {
    const auto rest = [&](const auto* p) HWY_ATTR { return load_n(p, n_in - k); };
    step(k, rest, rest);
  }
  KRAIT_UNROLL for (int t = 0; t < kTokens; ++t) {
    KRAIT_UNROLL for (int r = 0; r < kRows; ++r) {
      float value = hn::GetLane(hn::SumOfLanes(d, sum[r][t]));
      if (bias != nullptr) value += bias[r];
      float& to = out[t * out_stride + r];
      to = add ? to + value : value;
    }
  }
}

/// kTokens tokens at a time while there are as many; returns the first token left.
template <int kRows, int kTokens, typename W>
int64_t tiles(float* out, int64_t out_stride, const float* in, int64_t in_stride, const W* weight,
              int64_t n_in, const float* bias, bool add, int64_t t, int64_t n_tok) {
  for (; t + kTokens <= n_tok; t += kTokens) {
    tile<kRows, kTokens>(out + t * out_stride, out_stride, in + t * in_stride, in_stride, weight,
                         n_in, bias, add);
  }
  return t;
}

/// Up to kTileRows rows of W and any number of tokens.
template <typename W>
void strip(float* out, int64_t out_stride, const float* in, int64_t in_stride, const W* weight,
           int64_t n_in, const float* bias, bool add, int64_t n_row, int64_t n_tok) {
  if (n_row == kTileRows) {
    int64_t t = 0;
    const auto run = [&](auto count) {
      t = tiles<kTileRows, count()>(out, out_stride, in, in_stride, weight, n_in, bias, add, t,
                                    n_tok);
    };
    run(std::integral_constant<int, kTileTokens>());
    if constexpr (kTileTokens > 3) run(std::integral_constant<int, 3>());
    if constexpr (kTileTokens > 2) run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
    return;
  }
  for (int64_t r = 0; r < n_row; ++r) {
    tiles<1, 1>(out + r, out_stride, in, in_stride, weight + r * n_in, n_in,
                bias != nullptr ? bias + r : nullptr, add, 0, n_tok);
  }
}

template <typename W>
void linear_of(ThreadPool& pool, const Tensor& out, const Tensor& in, const Tensor& W_,
               const Tensor& bias, bool add) {
  const int64_t n_tok = in.dim(0);
  const int64_t n_in = W_.dim(1);
  const int64_t n_out = W_.dim(0);
  const auto* weight = W_.as<W>();
  constexpr int64_t kBlockBytes = int64_t{512} << 10;
  const int64_t row_bytes = n_in * static_cast<int64_t>(sizeof(float));
  const int64_t fit = kBlockBytes / std::max<int64_t>(row_bytes, 1) / kTileTokens * kTileTokens;
  const int64_t block = std::max<int64_t>(fit, int64_t{4} * kTileTokens);
  const int64_t blocks = (n_tok + block - 1) / block;
  const int64_t strips = (n_out + kTileRows - 1) / kTileRows;

  // A range of fewer products than this is not worth another thread (about 10 us).
  constexpr int64_t kProductsPerRange = 1 << 16;
  const int64_t products = kTileRows * std::max<int64_t>(n_in, 1) * std::min(n_tok, block);
  const int64_t grain = 1 + kProductsPerRange / std::max<int64_t>(products, 1);
  pool.parallel_for(blocks * strips, grain, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / strips * block;
      const int64_t o = i % strips * kTileRows;
      const int64_t n = std::min(block, n_tok - t);
      float* to = out.as<float>() + t * out.row_stride + o;
      const float* from = in.as<float>() + t * in.row_stride;
      const float* b = bias ? bias.as<float>() + o : nullptr;
      strip(to, out.row_stride, from, in.row_stride, weight + o * n_in, n_in, b, add,
            std::min<int64_t>(kTileRows, n_out - o), n);
    }
  });
}

void linear_kernel(ThreadPool& pool, const Tensor& out, const Tensor& in, const Tensor& W,
                   const Tensor& bias, bool add) {
  visit_dtype(W.dtype, "linear: W",
              [&](auto element) { linear_of<decltype(element)>(pool, out, in, W, bias, add); });
}

}  // namespace
}  // namespace krait::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::cpu {

HWY_EXPORT(linear_kernel);

void linear(ThreadPool& pool, const Tensor& out, const Tensor& in, const Tensor& W,
            const Tensor& bias, bool add) {
  HWY_DYNAMIC_DISPATCH(linear_kernel)(pool, out, in, W, bias, add);
}

}  // namespace krait::cpu
#endif
