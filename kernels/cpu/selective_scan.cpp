// selective_scan.cpp - the recurrence of Mamba-1 with gate, any number of tokens per sequence.
//
//   dt = softplus(dt + dt_bias)                              per channel e, token t
//   h  = exp(dt * A) * h + (dt * x) * B                      per channel e, state n
//   y  = (sum_n C * h + D * x) * silu(z)
//
// A tile is kChannels channels x some tokens of one sequence. What depends on the channel alone
// (softplus, SiLU, D) is done with vectors across channels, before and after; the recurrence with
// vectors across states, which lie side by side in memory: h stays in registers over the tokens of
// the tile. Threads share out pairs of sequence and channels. exp(dt * A) is 2^(dt * A'), with
// A' = A * log2(e) multiplied once.
//
// Bytes   n_tok * d_inner * 16, and per sequence 2 * d_inner * d_state * sizeof(state)
// Bound   by arithmetic: an exponential for each token, channel and state
// Same as PlainOps::selective_scan (plain.cpp); tests/ops/selective_scan_test.cpp
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/selective_scan.cpp"
#include "kernels/cpu/targets.h"
// targets.h chooses what foreach_target compiles, so it comes first.
#include <hwy/foreach_target.h>

#include "kernels/cpu/fast.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::cpu::HWY_NAMESPACE {
namespace {

constexpr int64_t kChannels = 64;  // four cache lines of a row of x
constexpr int64_t kTokens = 16;    // of a tile
constexpr int64_t kMaxState = 256;

/// Scratch of one tile. States are padded with zeros to whole vectors: zeros stay zeros.
struct Tile {
  HWY_ALIGN float A[kChannels * kMaxState];  ///< A * log2(e)
  HWY_ALIGN float h[kChannels * kMaxState];
  HWY_ALIGN float B[kTokens * kMaxState];
  HWY_ALIGN float C[kTokens * kMaxState];
  HWY_ALIGN float dt[kTokens * kChannels];   ///< after softplus
  HWY_ALIGN float dtx[kTokens * kChannels];  ///< dt * x
  HWY_ALIGN float sum[kTokens * kChannels];  ///< sum_n C * h
};

HWY_INLINE void step(const Tile& tile, int64_t t, int64_t padded, int64_t i, V32 A, V32 dt, V32 dtx,
                     V32& h, V32& sum) {
  const F32 d;
  h = hn::MulAdd(exp2_of_nonpositive(hn::Mul(dt, A)), h,
                 hn::Mul(dtx, hn::Load(d, tile.B + t * padded + i)));
  sum = hn::MulAdd(hn::Load(d, tile.C + t * padded + i), h, sum);
}

/// The recurrence of channel c over the tokens of the tile, h in kVectors registers.
template <int kVectors>
HWY_INLINE void recur(Tile& tile, int64_t c, int64_t n_tok) {
  const F32 d;
  const int64_t n = lanes();
  const int64_t padded = kVectors * n;
  V32 A[kVectors];
  V32 h[kVectors];
  KRAIT_UNROLL for (int v = 0; v < kVectors; ++v) {
    A[v] = hn::Load(d, tile.A + c * padded + v * n);
    h[v] = hn::Load(d, tile.h + c * padded + v * n);
  }
  for (int64_t t = 0; t < n_tok; ++t) {
    const V32 dt = hn::Set(d, tile.dt[t * kChannels + c]);
    const V32 dtx = hn::Set(d, tile.dtx[t * kChannels + c]);
    V32 sum = hn::Zero(d);
    KRAIT_UNROLL for (int v = 0; v < kVectors; ++v)
        step(tile, t, padded, v * n, A[v], dt, dtx, h[v], sum);
    tile.sum[t * kChannels + c] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
  KRAIT_UNROLL for (int v = 0; v < kVectors; ++v) hn::Store(h[v], d, tile.h + c * padded + v * n);
}

/// The same for any number of states, h in memory.
HWY_INLINE void recur_any(Tile& tile, int64_t c, int64_t n_tok, int64_t padded) {
  const F32 d;
  const int64_t n = lanes();
  for (int64_t t = 0; t < n_tok; ++t) {
    const V32 dt = hn::Set(d, tile.dt[t * kChannels + c]);
    const V32 dtx = hn::Set(d, tile.dtx[t * kChannels + c]);
    V32 sum = hn::Zero(d);
    for (int64_t i = 0; i < padded; i += n) {
      V32 h = hn::Load(d, tile.h + c * padded + i);
      step(tile, t, padded, i, hn::Load(d, tile.A + c * padded + i), dt, dtx, h, sum);
      hn::Store(h, d, tile.h + c * padded + i);
    }
    tile.sum[t * kChannels + c] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

/// Channels [e, e + width), width <= kChannels, of tokens [begin, end).
template <typename State>
void scan(const Tensor& y, const ScanInputs& in, State* state, int64_t begin, int64_t end,
          int64_t e, int64_t width, Rounding rounding) {
  const F32 d;
  const int64_t n = lanes();
  const int64_t d_inner = in.A.dim(0);
  const int64_t d_state = in.A.dim(1);
  const int64_t padded = (d_state + n - 1) / n * n;
  const V32 log2e = hn::Set(d, 1.44269504F);
  Tile tile;

  for (int64_t c = 0; c < width; ++c) {
    for (int64_t i = 0; i < padded; i += n) {
      const int64_t at = (e + c) * d_state + i;
      hn::Store(hn::Mul(load_n(in.A.as<float>() + at, d_state - i), log2e), d,
                tile.A + c * padded + i);
      hn::Store(load_n(state + at, d_state - i), d, tile.h + c * padded + i);
    }
  }
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t n_tok = std::min(kTokens, end - first);
    for (int64_t t = 0; t < n_tok; ++t) {
      const int64_t row = first + t;
      for (int64_t i = 0; i < padded; i += n) {
        const float* B = in.B.as<float>() + row * in.B.row_stride;
        const float* C = in.C.as<float>() + row * in.C.row_stride;
        hn::Store(load_n(B + i, d_state - i), d, tile.B + t * padded + i);
        hn::Store(load_n(C + i, d_state - i), d, tile.C + t * padded + i);
      }
      for (int64_t c = 0; c < width; c += n) {
        const int64_t at = row * d_inner + e + c;
        const V32 raw = load_n(in.dt.as<float>() + at, width - c);
        const V32 dt = softplus(hn::Add(raw, load_n(in.dt_bias.as<float>() + e + c, width - c)));
        const V32 dtx = hn::Mul(dt, load_n(in.x.as<float>() + at, width - c));
        store_n(dt, tile.dt + t * kChannels + c, kChannels - c);
        store_n(dtx, tile.dtx + t * kChannels + c, kChannels - c);
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      switch (padded / n) {
        case 1:
          recur<1>(tile, c, n_tok);
          break;
        case 2:
          recur<2>(tile, c, n_tok);
          break;
        case 4:
          recur<4>(tile, c, n_tok);
          break;
        default:
          recur_any(tile, c, n_tok, padded);
      }
    }
    for (int64_t t = 0; t < n_tok; ++t) {
      const int64_t row = first + t;
      for (int64_t c = 0; c < width; c += n) {
        const int64_t m = width - c;
        const V32 x = load_n(in.x.as<float>() + row * d_inner + e + c, m);
        const V32 z = load_n(in.z.as<float>() + row * in.z.row_stride + e + c, m);
        const V32 D = load_n(in.D.as<float>() + e + c, m);
        const V32 sum = load_n(tile.sum + t * kChannels + c, std::min(m, kChannels - c));
        store_n(hn::Mul(hn::MulAdd(D, x, sum), silu(z)), y.as<float>() + row * d_inner + e + c, m);
      }
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    State* to = state + (e + c) * d_state;
    for (int64_t i = 0; i < d_state; ++i) {
      to[i] = round_state<State>(tile.h[c * padded + i], rounding, (e + c) * d_state + i);
    }
  }
}

void selective_scan_kernel(ThreadPool& pool, const Tensor& y, const ScanInputs& in,
                           const Tensor& ssm_state, const Batch& batch) {
  const int64_t d_inner = in.A.dim(0);
  const int64_t d_state = in.A.dim(1);
  if (d_state > kMaxState) {
    throw Error(ErrorKind::unsupported,
                fmt::format("selective_scan: d_state is {}, the most that is built is {}", d_state,
                            kMaxState));
  }
  const int64_t groups = (d_inner + kChannels - 1) / kChannels;
  // A range of fewer updates of a state than this is not worth another thread (about 10 us).
  constexpr int64_t kUpdatesPerRange = 1 << 14;
  const int64_t updates =
      kChannels * d_state * std::max<int64_t>(batch.n_tok, 1) / std::max<int64_t>(batch.n_seq, 1);
  const int64_t grain = 1 + kUpdatesPerRange / std::max<int64_t>(updates, 1);
  visit_dtype(ssm_state.dtype, "selective_scan: ssm_state", [&](auto element) {
    using State = decltype(element);
    pool.parallel_for(batch.n_seq * groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i / groups;
        const int64_t e = i % groups * kChannels;
        const int32_t slot = batch.slot.as<int32_t>()[s];
        if (slot < 0) continue;
        scan(y, in, ssm_state.as<State>() + slot * d_inner * d_state,
             batch.seq_start.as<int32_t>()[s], batch.seq_start.as<int32_t>()[s + 1], e,
             std::min(kChannels, d_inner - e), batch.state_rounding());
      }
    });
  });
}

}  // namespace
}  // namespace krait::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::cpu {

HWY_EXPORT(selective_scan_kernel);

void selective_scan(ThreadPool& pool, const Tensor& y, const ScanInputs& in,
                    const Tensor& ssm_state, const Batch& batch) {
  HWY_DYNAMIC_DISPATCH(selective_scan_kernel)(pool, y, in, ssm_state, batch);
}

}  // namespace krait::cpu
#endif
