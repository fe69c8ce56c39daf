// conv1d_silu.cpp - causal depthwise convolution over time with state, then SiLU.
//
//   out[t, e] = silu(bias[e] + sum_j weight[e, j] * u[t - (d_conv-1) + j, e])
//
// Vectors lie across channels; a range of channels belongs to one thread, which walks all sequences
// and then puts their last inputs into their state. The weights of a block of channels are
// transposed once.
//
// Bytes   n_tok * d_inner * 8, and 4 to 8 * (d_conv-1) * d_inner for each sequence
// Same as PlainOps::conv1d_silu (plain.cpp); tests/ops/conv1d_test.cpp
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/conv1d_silu.cpp"
#include "kernels/cpu/targets.h"
// targets.h chooses what foreach_target compiles, so it comes first.
#include <hwy/foreach_target.h>

#include <cstring>

#include "kernels/cpu/fast.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::cpu::HWY_NAMESPACE {
namespace {

constexpr int64_t kMaxTaps = 64;
constexpr int64_t kTapBytes = int64_t{16} << 10;  // transposed weights of a block, in the L1 cache

/// Channels [e, e + width) of every sequence.
void convolve(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
              const Tensor& conv_state, const Batch& batch, int64_t e, int64_t width) {
  const int64_t d_inner = weight.dim(0);
  const int64_t d_conv = weight.dim(1);
  const int64_t n = lanes();
  float taps[kTapBytes / sizeof(float)];  // [d_conv][width]
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t j = 0; j < d_conv; ++j) {
      taps[j * width + c] = weight.as<float>()[(e + c) * d_conv + j];
    }
  }
  for (int64_t s = 0; s < batch.n_seq; ++s) {
    const int32_t slot = batch.slot.as<int32_t>()[s];
    if (slot < 0) continue;
    const int64_t begin = batch.seq_start.as<int32_t>()[s];
    const int64_t len = batch.seq_start.as<int32_t>()[s + 1] - begin;
    const int64_t position = batch.position.as<int64_t>()[s];
    float* state = conv_state.as<float>() + slot * (d_conv - 1) * d_inner + e;
    const float* input = u.as<float>() + begin * u.row_stride + e;
    float* output = out.as<float>() + begin * d_inner + e;

    // Where the state has input t of the sequence: t = -1 is the newest before this step.
    const auto kept = [&](int64_t t) {
      return state + (position + t + d_conv - 1) % (d_conv - 1) * d_inner;
    };
    const auto row = [&](int64_t t) { return t >= 0 ? input + t * u.row_stride : kept(t); };
    const float* rows[kMaxTaps];
    for (int64_t t = 0; t < len; ++t) {
      for (int64_t j = 0; j < d_conv; ++j) rows[j] = row(t - (d_conv - 1) + j);
      for (int64_t c = 0; c < width; c += n) {
        const int64_t m = width - c;
        V32 sum = bias ? load_n(bias.as<float>() + e + c, m) : hn::Zero(F32());
        for (int64_t j = 0; j < d_conv; ++j) {
          sum = hn::MulAdd(load_n(taps + j * width + c, m), load_n(rows[j] + c, m), sum);
        }
        store_n(silu(sum), output + t * d_inner + c, m);
      }
    }
    for (int64_t t = std::max<int64_t>(len - (d_conv - 1), 0); t < len; ++t) {
      std::memcpy(kept(t), row(t), static_cast<size_t>(width) * sizeof(float));
    }
  }
}

void conv1d_silu_kernel(ThreadPool& pool, const Tensor& out, const Tensor& u, const Tensor& weight,
                        const Tensor& bias, const Tensor& conv_state, const Batch& batch) {
  const int64_t d_inner = weight.dim(0);
  const int64_t d_conv = weight.dim(1);
  if (d_conv > kMaxTaps) {
    throw Error(
        ErrorKind::unsupported,
        fmt::format("conv1d_silu: d_conv is {}, the most that is built is {}", d_conv, kMaxTaps));
  }
  const int64_t n = lanes();
  const int64_t block = std::max(kTapBytes / 4 / d_conv / n * n, n);
  // In vectors of channels, so that only the last range has a remainder.
  constexpr int64_t kValuesPerRange = 1 << 13;
  const int64_t grain = 1 + kValuesPerRange / (n * std::max<int64_t>(batch.n_tok, 1));
  pool.parallel_for((d_inner + n - 1) / n, grain, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * n, d_inner);
    for (int64_t e = first * n; e < end; e += block) {
      convolve(out, u, weight, bias, conv_state, batch, e, std::min(block, end - e));
    }
  });
}

}  // namespace
}  // namespace krait::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::cpu {

HWY_EXPORT(conv1d_silu_kernel);

void conv1d_silu(ThreadPool& pool, const Tensor& out, const Tensor& u, const Tensor& weight,
                 const Tensor& bias, const Tensor& conv_state, const Batch& batch) {
  HWY_DYNAMIC_DISPATCH(conv1d_silu_kernel)(pool, out, u, weight, bias, conv_state, batch);
}

}  // namespace krait::cpu
#endif
