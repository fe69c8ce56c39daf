// ssd_scan.cpp - the recurrence of Mamba-2, any number of tokens per sequence.
//
//   dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)       per head h, token t
//   S  = exp(dt * A) * S + (dt * x) * B                      per channel p of the head, state n
//   y  = sum_n C * S + D * x
//
// A tile is one head x some tokens of one sequence. The decays and dt are one number per token. The
// recurrence runs with vectors across states, which lie side by side in memory: kVectors of them
// stay in registers over the tokens of the tile, and y gathers the sums of these blocks. Threads
// share out pairs of sequence and head.
//
// Bytes   n_tok * 4 * (2 * H * P + 2 * G * N + H), and per sequence 2 * H * P * N * sizeof(state)
// Bound   by arithmetic: two multiply-adds and a product for each token, channel and state
// Same as PlainOps::ssd_scan (plain.cpp); tests/ops/ssd_test.cpp
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ssd_scan.cpp"
#include "kernels/cpu/targets.h"
// targets.h chooses what foreach_target compiles, so it comes first.
#include <hwy/foreach_target.h>

#include <cmath>
#include <vector>

#include "kernels/cpu/fast.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::cpu::HWY_NAMESPACE {
namespace {

constexpr int64_t kTokens = 16;  // of a tile
constexpr int64_t kMaxState = 512;
constexpr int kMaxVectors = 4;  // of S in registers

/// Scratch of one tile. States are padded with zeros to whole vectors: zeros stay zeros.
struct SsdTile {
  HWY_ALIGN float B[kTokens * kMaxState];
  HWY_ALIGN float C[kTokens * kMaxState];
  HWY_ALIGN float S[kMaxState];  ///< of one channel
  float dt[kTokens];             ///< after softplus and limits
  float decay[kTokens];          ///< exp(dt * A)
  float y[kTokens];              ///< of one channel
};

/// States [i, i + kVectors * lanes) of one channel over the tokens of the tile; adds to tile.y.
template <int kVectors>
HWY_INLINE void recur(SsdTile& tile, int64_t i, int64_t padded, const float* x, int64_t x_stride,
                      int64_t n_tok) {
  const F32 d;
  const int64_t n = lanes();
  V32 S[kVectors];
  KRAIT_UNROLL for (int v = 0; v < kVectors; ++v) S[v] = hn::Load(d, tile.S + i + v * n);
  for (int64_t t = 0; t < n_tok; ++t) {
    const V32 decay = hn::Set(d, tile.decay[t]);
    const V32 dtx = hn::Set(d, tile.dt[t] * x[t * x_stride]);
    const float* B = tile.B + t * padded + i;
    const float* C = tile.C + t * padded + i;
    V32 sum = hn::Zero(d);
    KRAIT_UNROLL for (int v = 0; v < kVectors; ++v) {
      S[v] = hn::MulAdd(decay, S[v], hn::Mul(dtx, hn::Load(d, B + v * n)));
      sum = hn::MulAdd(hn::Load(d, C + v * n), S[v], sum);
    }
    tile.y[t] += hn::GetLane(hn::SumOfLanes(d, sum));
  }
  KRAIT_UNROLL for (int v = 0; v < kVectors; ++v) hn::Store(S[v], d, tile.S + i + v * n);
}

/// Head h over tokens [begin, end).
template <typename State>
void scan_head(const Tensor& y, const SsdInputs& in, State* state, int64_t P, int64_t N, int64_t h,
               int64_t begin, int64_t end, Rounding rounding) {
  const F32 d;
  const int64_t n = lanes();
  const int64_t padded = (N + n - 1) / n * n;
  const int64_t group = h / (in.A.dim(0) / in.n_group);
  const float A = in.A.as<float>()[h];
  const float D = in.D.as<float>()[h];
  const float bias = in.dt_bias.as<float>()[h];
  SsdTile tile;
  // Between tiles S rests here, so that a state of 16 bits is rounded once, at the end. It keeps
  // its memory from call to call.
  thread_local std::vector<float> kept;
  kept.assign(static_cast<size_t>(P * padded), 0.0F);
  for (int64_t p = 0; p < P; ++p) {
    for (int64_t i = 0; i < N; ++i) kept[p * padded + i] = static_cast<float>(state[p * N + i]);
  }
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t n_tok = std::min(kTokens, end - first);
    for (int64_t t = 0; t < n_tok; ++t) {
      const int64_t row = first + t;
      const float* B = in.B.as<float>() + row * in.B.row_stride + group * N;
      const float* C = in.C.as<float>() + row * in.C.row_stride + group * N;
      for (int64_t i = 0; i < padded; i += n) {
        hn::Store(load_n(B + i, N - i), d, tile.B + t * padded + i);
        hn::Store(load_n(C + i, N - i), d, tile.C + t * padded + i);
      }
      const float v = in.dt.as<float>()[row * in.dt.row_stride + h] + bias;
      const float dt = v > 20.0F ? v : std::log1p(std::exp(v));
      tile.dt[t] = std::min(std::max(dt, in.dt_min), in.dt_max);
      tile.decay[t] = std::exp(tile.dt[t] * A);
    }
    for (int64_t p = 0; p < P; ++p) {
      const float* x = in.x.as<float>() + first * in.x.row_stride + h * P + p;
      for (int64_t t = 0; t < n_tok; ++t) tile.y[t] = D * x[t * in.x.row_stride];
      float* S = kept.data() + p * padded;
      std::copy_n(S, padded, tile.S);
      int64_t i = 0;
      for (; i + kMaxVectors * n <= padded; i += kMaxVectors * n) {
        recur<kMaxVectors>(tile, i, padded, x, in.x.row_stride, n_tok);
      }
      for (; i < padded; i += n) recur<1>(tile, i, padded, x, in.x.row_stride, n_tok);
      std::copy_n(tile.S, padded, S);
      float* to = y.as<float>() + first * y.row_stride + h * P + p;
      for (int64_t t = 0; t < n_tok; ++t) to[t * y.row_stride] = tile.y[t];
    }
  }
  for (int64_t p = 0; p < P; ++p) {
    for (int64_t i = 0; i < N; ++i) {
      state[p * N + i] = round_state<State>(kept[p * padded + i], rounding, (h * P + p) * N + i);
    }
  }
}

void ssd_scan_kernel(ThreadPool& pool, const Tensor& y, const SsdInputs& in,
                     const Tensor& ssm_state, const Batch& batch) {
  const int64_t H = ssm_state.dim(1);
  const int64_t P = ssm_state.dim(2);
  const int64_t N = ssm_state.dim(3);
  if (N > kMaxState) {
    throw Error(ErrorKind::unsupported,
                fmt::format("ssd_scan: d_state is {}, the most that is built is {}", N, kMaxState));
  }
  // A range of fewer updates of a state than this is not worth another thread (about 10 us).
  constexpr int64_t kUpdatesPerRange = 1 << 16;
  const int64_t updates =
      P * N * std::max<int64_t>(batch.n_tok, 1) / std::max<int64_t>(batch.n_seq, 1);
  const int64_t grain = 1 + kUpdatesPerRange / std::max<int64_t>(updates, 1);
  visit_dtype(ssm_state.dtype, "ssd_scan: ssm_state", [&](auto element) {
    using State = decltype(element);
    pool.parallel_for(batch.n_seq * H, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i / H;
        const int64_t h = i % H;
        const int32_t slot = batch.slot.as<int32_t>()[s];
        if (slot < 0) continue;
        scan_head(y, in, ssm_state.as<State>() + (slot * H + h) * P * N, P, N, h,
                  batch.seq_start.as<int32_t>()[s], batch.seq_start.as<int32_t>()[s + 1],
                  batch.state_rounding());
      }
    });
  });
}

}  // namespace
}  // namespace krait::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::cpu {

HWY_EXPORT(ssd_scan_kernel);

void ssd_scan(ThreadPool& pool, const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
              const Batch& batch) {
  HWY_DYNAMIC_DISPATCH(ssd_scan_kernel)(pool, y, in, ssm_state, batch);
}

}  // namespace krait::cpu
#endif
