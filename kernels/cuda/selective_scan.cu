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
// That costs the exponentials twice and needs no expanded state in memory. The tiles of a sequence
// follow each other inside the block, the state waiting in shared memory.
//
// Shapes   x, dt, z, y T [n_tok, d_inner]; B, C T [n_tok, d_state] views; A f32 [d_inner, d_state];
//          ssm_state S [slot, d_inner, d_state]
// Launch   grid (channels / kChannels, n_seq), kChannels x kSegments threads: a warp is 32 channels
// of one
//          segment, so that loads of x, dt and z are coalesced and B, C are read as broadcasts
// Types    arithmetic f32; states beyond kStates are done in groups, y summed over the groups
// Bytes    n_tok * d_inner * 4 * sizeof(T), and per block its share of B, C and the state
// Roofline 2 * d_state + 6 special-function results per channel and token: bound by them, not by
// bytes Same as  kernels/cpu; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kChannels = 32;
constexpr int kSegments = 8;
constexpr int kPerSegment = 8;  // tokens of a stretch
constexpr int kTile = kSegments * kPerSegment;
constexpr int kStates = 16;  // states in registers at a time
constexpr int kThreads = kChannels * kSegments;
constexpr float kLog2e = 1.4426950408889634F;

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

/// Shared memory, in floats. Channels vary fastest: no bank conflicts.
struct SharedTile {
  float decay[kSegments][kStates][kChannels];  // exp(A * sum(dt)) of a stretch
  float state[kSegments][kStates]
             [kChannels];  // its scan from zero; after step 2 the state before it
  float B[kTile][kStates];
  float C[kTile][kStates];
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    selective_scan_kernel(ScanPointers<T> p, ScanShape shape, S* ssm_state) {
  extern __shared__ float4 shared_raw[];
  SharedTile& tile = *reinterpret_cast<SharedTile*>(shared_raw);
  float* carry = reinterpret_cast<float*>(shared_raw) +
                 sizeof(SharedTile) / sizeof(float);  // [d_state][kChannels]

  after_previous();
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
  const int n_group = (shape.d_state + kStates - 1) / kStates;

  // The state of this block's channels: [kChannels, d_state] in memory, transposed into shared
  // memory.
  S* state_rows = ssm_state + (slot * shape.d_inner + e0) * shape.d_state;
  const int64_t n_state = min(static_cast<int64_t>(kChannels), shape.d_inner - e0) * shape.d_state;
  for (int64_t i = threadIdx.x; i < n_state; i += kThreads) {
    carry[(i % shape.d_state) * kChannels + i / shape.d_state] = to_float(state_rows[i]);
  }

  const float bias = live ? p.dt_bias[e] : 0.0F;
  const float D = live ? p.D[e] : 0.0F;
  float A[kStates];

  for (int64_t t0 = 0; t0 < len; t0 += kTile) {
    const int64_t first = t0 + segment * kPerSegment;  // this thread's stretch
    float x[kPerSegment], dt[kPerSegment], y[kPerSegment];
    float dt_sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kPerSegment; ++i) {
      // Past the end dt = 0 and x = 0: exp(0) = 1 and nothing is added, so the state passes
      // unchanged.
      const bool inside = live && first + i < len;
      const int64_t t = begin + first + i;
      x[i] = inside ? to_float(p.x[t * shape.x_stride + e]) : 0.0F;
      dt[i] = inside ? softplus(to_float(p.dt[t * shape.dt_stride + e]) + bias) : 0.0F;
      dt_sum += dt[i];
      y[i] = D * x[i];
    }

    for (int g = 0; g < n_group; ++g) {
      const int n0 = g * kStates;
      const int n_here = min(kStates, shape.d_state - n0);
      if (n_group > 1 || t0 == 0) {
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          A[n] = live && n < n_here ? p.A[e * shape.d_state + n0 + n] * kLog2e : 0.0F;
        }
      }
      __syncthreads();  // the last group's readers of B, C and state are done; carry is written
      for (int i = threadIdx.x; i < kTile * kStates; i += kThreads) {
        const int64_t t = t0 + i / kStates;
        const int n = i % kStates;
        const bool inside = t < len && n < n_here;
        tile.B[i / kStates][n] =
            inside ? to_float(p.B[(begin + t) * shape.B_stride + n0 + n]) : 0.0F;
        tile.C[i / kStates][n] =
            inside ? to_float(p.C[(begin + t) * shape.C_stride + n0 + n]) : 0.0F;
      }
      __syncthreads();

      // 1. The stretch from zero.
      float h[kStates] = {};
#pragma unroll
      for (int i = 0; i < kPerSegment; ++i) {
        const float dx = dt[i] * x[i];
        const float* B = tile.B[segment * kPerSegment + i];
#pragma unroll
        for (int n = 0; n < kStates; ++n) h[n] = fmaf(exp2f(dt[i] * A[n]), h[n], dx * B[n]);
      }
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        tile.decay[segment][n][lane] = exp2f(dt_sum * A[n]);
        tile.state[segment][n][lane] = h[n];
      }
      __syncthreads();

      // 2. Chain the stretches.
      for (int i = threadIdx.x; i < n_here * kChannels; i += kThreads) {
        const int n = i / kChannels;
        const int c = i % kChannels;
        float running = carry[(n0 + n) * kChannels + c];
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
          const float after = fmaf(tile.decay[s][n][c], running, tile.state[s][n][c]);
          tile.state[s][n][c] = running;
          running = after;
        }
        carry[(n0 + n) * kChannels + c] = running;
      }
      __syncthreads();

      // 3. The stretch from the state it really starts with.
#pragma unroll
      for (int n = 0; n < kStates; ++n) h[n] = tile.state[segment][n][lane];
#pragma unroll
      for (int i = 0; i < kPerSegment; ++i) {
        const float dx = dt[i] * x[i];
        const float* B = tile.B[segment * kPerSegment + i];
        const float* C = tile.C[segment * kPerSegment + i];
        float sum = 0.0F;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          h[n] = fmaf(exp2f(dt[i] * A[n]), h[n], dx * B[n]);
          sum = fmaf(C[n], h[n], sum);
        }
        y[i] += sum;
      }
    }

#pragma unroll
    for (int i = 0; i < kPerSegment; ++i) {
      if (live && first + i < len) {
        const int64_t t = begin + first + i;
        p.y[t * shape.y_stride + e] =
            from_float<T>(y[i] * silu(to_float(p.z[t * shape.z_stride + e])));
      }
    }
  }

  __syncthreads();
  for (int64_t i = threadIdx.x; i < n_state; i += kThreads) {
    state_rows[i] = from_float<S>(carry[(i % shape.d_state) * kChannels + i / shape.d_state]);
  }
}

}  // namespace

void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream) {
  const ScanShape shape{in.x.dim(1),     static_cast<int>(in.A.dim(1)),
                        in.x.row_stride, in.dt.row_stride,
                        in.z.row_stride, y.row_stride,
                        in.B.row_stride, in.C.row_stride};
  const size_t shared =
      sizeof(SharedTile) + sizeof(float) * kChannels * static_cast<size_t>(shape.d_state);
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
