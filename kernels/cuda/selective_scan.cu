// selective_scan.cu - the Mamba-1 recurrence over whole sequences, parallel over channels and over
// time.
//
//   dt = softplus(dt_raw + dt_bias)
//   h  = exp(dt * A) * h + dt * B * x               per channel e, state n, from h =
//   ssm_state[slot] y  = (sum_n C * h + D * x) * silu(z)
//
// Parallel in time because the recurrence composes: a stretch of tokens acts on the state it is
// given as h -> exp(A * sum(dt)) * h + s, where s is the stretch's own scan from zero. So a tile of
// kTile tokens is cut into kSegments stretches, and
//   1. every thread (channel, segment) scans its stretch from zero: s, and sum(dt);
//   2. the stretches' states are chained from the state before the tile, one thread per (channel,
//   state);
//   3. every thread scans its stretch again, from the state now known, and writes y.
// The decays exp(dt * A) of a stretch stay in registers between 1 and 3. Tiles of a sequence follow
// each other inside the block, the state waiting in shared memory; the inputs of a tile are
// requested while the one before is computed.
//
// Shapes   x, dt, z, y T [n_tok, d_inner]; B, C T [n_tok, d_state] views; A f32 [d_inner, d_state];
//          ssm_state S [slot, d_inner, d_state]
// Launch   grid (channels / kChannels, n_seq), kChannels x kSegments threads, one block per SM (its
//          registers); channels vary fastest: x, dt and z are read in whole sectors, B and C as
//          broadcasts
// Types    arithmetic f32; states beyond kStates are done in groups, y summed over the groups
// Bytes    n_tok * d_inner * 4 * sizeof(T), and per block its share of B, C and the state
// Roofline (1 + 1 / kPerSegment) * d_state + 6 special-function results per channel and token:
//          bound by them, not by bytes
// Measured H100, bf16, 2048 tokens of one sequence, us at d_inner 1536 and 5120 (tools/bench_ops):
//          89 and 277; the special-function units alone would need 20 and 68. Other blocks:
//          16 x 16 x 4, two per SM: 168 and 309; 32 x 8 x 8: 178 and 370; 32 x 8 x 4, two per SM:
//          290 and 332
// Same as  kernels/cpu; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kChannels = 16;
constexpr int kSegments = 16;
constexpr int kPerSegment = 8;  // tokens of a stretch
constexpr int kTile = kSegments * kPerSegment;
constexpr int kStates = 16;  // states in registers at a time
constexpr int kThreads = kChannels * kSegments;

struct ScanShape {
  int64_t d_inner;
  int d_state;
  int64_t x_stride, dt_stride, z_stride, y_stride, B_stride, C_stride;
};

template <typename T>
struct ScanPointers {
  const T *x, *dt, *z, *B, *C;  // y may be x or dt: no __restrict__
  const float *A, *D, *dt_bias;
  T* y;
  const int32_t *seq_start, *slots;
};

/// Shared memory. Channels vary fastest. The two segments of a warp share banks: a two-way
/// conflict.
struct SharedTile {
  float decay[kSegments][kStates][kChannels];  // exp(A * sum(dt)) of a stretch
  float state[kSegments][kStates]
             [kChannels];  // its scan from zero; after step 2 the state before it
  float4 B[kTile][kStates / 4];
  float4 C[kTile][kStates / 4];
};

/// A thread's inputs of one tile, as they lie in memory.
template <typename T>
struct StretchInputs {
  T x[kPerSegment], dt[kPerSegment], z[kPerSegment];
};

/// A thread's share of a tile's B and C, which all channels of the block use.
constexpr int kShare = kTile * kStates / kThreads;
static_assert(kTile * kStates % kThreads == 0);
template <typename T>
struct SharedInputs {
  T B[kShare], C[kShare];
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, 1)
    selective_scan_kernel(ScanPointers<T> p, ScanShape shape, S* ssm_state) {
  after_previous();
  extern __shared__ float4 shared_raw[];
  SharedTile& tile = *reinterpret_cast<SharedTile*>(shared_raw);
  float* A_of = reinterpret_cast<float*>(shared_raw) + sizeof(SharedTile) / sizeof(float);
  float* carry = A_of + shape.d_state * kChannels;  // both [d_state][kChannels]

  const int seq = static_cast<int>(blockIdx.y);
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const int64_t begin = p.seq_start[seq];
  const int64_t len = p.seq_start[seq + 1] - begin;
  const int lane = threadIdx.x % kChannels;
  const int segment = threadIdx.x / kChannels;
  const int64_t e0 = static_cast<int64_t>(blockIdx.x) * kChannels;
  const int64_t e = e0 + lane;
  const bool live = e < shape.d_inner;

  // State and A of this block's channels: [kChannels, d_state] in memory, transposed in shared
  // memory.
  S* state_rows = ssm_state + (slot * shape.d_inner + e0) * shape.d_state;
  const float* A_rows = p.A + e0 * shape.d_state;
  const int n_state =
      static_cast<int>(min(static_cast<int64_t>(kChannels), shape.d_inner - e0)) * shape.d_state;
  const auto transposed = [&](int i) {
    return (i % shape.d_state) * kChannels + i / shape.d_state;
  };
  for (int i = threadIdx.x; i < shape.d_state * kChannels; i += kThreads) {
    carry[transposed(i)] = i < n_state ? to_float(state_rows[i]) : 0.0F;
    A_of[transposed(i)] = i < n_state ? A_rows[i] * kLog2e : 0.0F;
  }

  const float bias = live ? p.dt_bias[e] : 0.0F;
  const float D = live ? p.D[e] : 0.0F;

  const auto load = [&](int64_t t0) {
    StretchInputs<T> in;
#pragma unroll
    for (int i = 0; i < kPerSegment; ++i) {
      const int64_t at = t0 + segment * kPerSegment + i;
      const bool inside = live && at < len;
      const int64_t t = begin + at;
      in.x[i] = inside ? __ldcg(p.x + t * shape.x_stride + e) : T(0.0F);
      in.dt[i] = inside ? __ldcg(p.dt + t * shape.dt_stride + e) : T(0.0F);
      in.z[i] = inside ? __ldcg(p.z + t * shape.z_stride + e) : T(0.0F);
    }
    return in;
  };

  // This thread's share of B and C of one tile and one group of states.
  const auto load_BC = [&](int64_t t0, int n0) {
    SharedInputs<T> in;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      const int64_t t = begin + t0 + at / kStates;
      const int n = n0 + at % kStates;
      const bool inside = t < begin + len && n < shape.d_state;
      in.B[i] = inside ? __ldcg(p.B + t * shape.B_stride + n) : T(0.0F);
      in.C[i] = inside ? __ldcg(p.C + t * shape.C_stride + n) : T(0.0F);
    }
    return in;
  };

  StretchInputs<T> next = load(0);
  SharedInputs<T> next_BC = load_BC(0, 0);
  for (int64_t t0 = 0; t0 < len; t0 += kTile) {
    const StretchInputs<T> in = next;
    const int64_t first = t0 + segment * kPerSegment;
    float dt[kPerSegment], dx[kPerSegment], y[kPerSegment];
    float dt_sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kPerSegment; ++i) {
      // Past the end dt = 0: exp(0) = 1 and nothing is added, so the state passes unchanged.
      dt[i] = live && first + i < len ? softplus(to_float(in.dt[i]) + bias) : 0.0F;
      const float x = to_float(in.x[i]);
      dx[i] = dt[i] * x;
      dt_sum += dt[i];
      y[i] = D * x;
    }
    // y of this tile may lie over x or dt of this tile, never over those of the next. The loads
    // name the global space (__ldcg): a generic load could not be moved past stores to shared
    // memory.
    if (t0 + kTile < len) next = load(t0 + kTile);

    for (int n0 = 0; n0 < shape.d_state; n0 += kStates) {
      const int n_here = min(kStates, shape.d_state - n0);
      __syncthreads();  // the last readers of B, C and state are done; carry is written
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const int at = i * kThreads + static_cast<int>(threadIdx.x);
        reinterpret_cast<float*>(tile.B)[at] = to_float(next_BC.B[i]);
        reinterpret_cast<float*>(tile.C)[at] = to_float(next_BC.C[i]);
      }
      const bool last_group = n0 + kStates >= shape.d_state;
      next_BC = load_BC(last_group ? t0 + kTile : t0, last_group ? 0 : n0 + kStates);

      // 1. The stretch from zero.
      float decay[kPerSegment][kStates];
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        const float A = n < n_here ? A_of[(n0 + n) * kChannels + lane] : 0.0F;
        tile.decay[segment][n][lane] = exp2_fast(dt_sum * A);
#pragma unroll
        for (int i = 0; i < kPerSegment; ++i) decay[i][n] = exp2_fast(dt[i] * A);
      }
      __syncthreads();
      float h[kStates] = {};
#pragma unroll
      for (int i = 0; i < kPerSegment; ++i) {
#pragma unroll
        for (int q = 0; q < kStates / 4; ++q) {
          const float4 B = tile.B[segment * kPerSegment + i][q];
          h[4 * q] = fmaf(decay[i][4 * q], h[4 * q], dx[i] * B.x);
          h[4 * q + 1] = fmaf(decay[i][4 * q + 1], h[4 * q + 1], dx[i] * B.y);
          h[4 * q + 2] = fmaf(decay[i][4 * q + 2], h[4 * q + 2], dx[i] * B.z);
          h[4 * q + 3] = fmaf(decay[i][4 * q + 3], h[4 * q + 3], dx[i] * B.w);
        }
      }
#pragma unroll
      for (int n = 0; n < kStates; ++n) tile.state[segment][n][lane] = h[n];
      __syncthreads();

      // 2. Chain the stretches.
      for (int i = threadIdx.x; i < n_here * kChannels; i += kThreads) {
        const int n = i / kChannels;
        const int c = i % kChannels;
        float running = carry[(n0 + n) * kChannels + c];
        float by[kSegments], from[kSegments];
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
          by[s] = tile.decay[s][n][c];
          from[s] = tile.state[s][n][c];
        }
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
          tile.state[s][n][c] = running;
          running = fmaf(by[s], running, from[s]);
        }
        carry[(n0 + n) * kChannels + c] = running;
      }
      __syncthreads();

      // 3. The stretch from the state it really starts with.
#pragma unroll
      for (int n = 0; n < kStates; ++n) h[n] = tile.state[segment][n][lane];
#pragma unroll
      for (int i = 0; i < kPerSegment; ++i) {
        float sum[4] = {};
#pragma unroll
        for (int q = 0; q < kStates / 4; ++q) {
          const float4 B = tile.B[segment * kPerSegment + i][q];
          const float4 C = tile.C[segment * kPerSegment + i][q];
          h[4 * q] = fmaf(decay[i][4 * q], h[4 * q], dx[i] * B.x);
          h[4 * q + 1] = fmaf(decay[i][4 * q + 1], h[4 * q + 1], dx[i] * B.y);
          h[4 * q + 2] = fmaf(decay[i][4 * q + 2], h[4 * q + 2], dx[i] * B.z);
          h[4 * q + 3] = fmaf(decay[i][4 * q + 3], h[4 * q + 3], dx[i] * B.w);
          sum[0] = fmaf(C.x, h[4 * q], sum[0]);
          sum[1] = fmaf(C.y, h[4 * q + 1], sum[1]);
          sum[2] = fmaf(C.z, h[4 * q + 2], sum[2]);
          sum[3] = fmaf(C.w, h[4 * q + 3], sum[3]);
        }
        y[i] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
    }

#pragma unroll
    for (int i = 0; i < kPerSegment; ++i) {
      if (live && first + i < len) {
        p.y[(begin + first + i) * shape.y_stride + e] =
            from_float<T>(y[i] * silu(to_float(in.z[i])));
      }
    }
  }

  __syncthreads();
  for (int i = threadIdx.x; i < n_state; i += kThreads)
    state_rows[i] = from_float<S>(carry[transposed(i)]);
}

}  // namespace

void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream) {
  const ScanShape shape{in.x.dim(1),     static_cast<int>(in.A.dim(1)),
                        in.x.row_stride, in.dt.row_stride,
                        in.z.row_stride, y.row_stride,
                        in.B.row_stride, in.C.row_stride};
  const size_t shared =
      sizeof(SharedTile) + 2 * sizeof(float) * kChannels * static_cast<size_t>(shape.d_state);
  const dim3 grid(static_cast<unsigned>(ceil_div(shape.d_inner, kChannels)),
                  static_cast<unsigned>(batch.n_seq));
  visit_type(in.x.dtype, "selective_scan x", [&](auto t) {
    using T = decltype(t);
    const ScanPointers<T> p{in.x.as<T>(),
                            in.dt.as<T>(),
                            in.z.as<T>(),
                            in.B.as<T>(),
                            in.C.as<T>(),
                            in.A.as<float>(),
                            in.D.as<float>(),
                            in.dt_bias.as<float>(),
                            y.as<T>(),
                            batch.seq_start.as<int32_t>(),
                            batch.slot.as<int32_t>()};
    visit_type(ssm_state.dtype, "selective_scan state", [&](auto s) {
      using S = decltype(s);
      auto* kernel = &selective_scan_kernel<T, S>;
      if (shared > 48 * 1024) {
        KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
      }
      launch("selective_scan", kernel, grid, kThreads, shared, stream, p, shape, ssm_state.as<S>());
    });
  });
}

}  // namespace krait::cuda
