// mamba2_scan.cu - the Mamba-2 recurrence over whole sequences, token after token, exact in f32.
//
//   dt = clamp(softplus(dt_raw + dt_bias))
//   S  = exp(dt * A) * S + dt * x * B               per head h, channel p, state n, from S =
//   ssm_state[slot] y  = sum_n C * S + D * x
//
// For inputs in f32, whose products must not be rounded to the tensor cores' types, and for sizes
// that mamba2_chunks.cu is not built for.
//
// Shapes   as ssd_scan in kernels/ops.h
// Launch   grid (channels of a head / channels of a block, H, n_seq), 256 threads: kN / 16
//          neighbouring threads share a channel, each with 16 of its states in registers. Tiles of
//          16 or 32 tokens lie in shared memory: B and C as f32, x, dt and the decays.
// Types    arithmetic f32; S rounded once, at the end
// Bytes    each block reads B and C of its group and its own share of x: H / G times B and C, from
// L2 Roofline 3 instructions per token, channel and state and 1/4 of a shared load: bound by issue
// Same as  ssd_scan in kernels/cpu; tests/ops/ssd_test.cpp
#include <string>

#include "kernels/cuda/mamba2.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOwn = 16;  // states of a thread

/// kN: d_state rounded up; what is above d_state is zero and stays so.
template <typename T, typename S, int kN>
__global__ void __launch_bounds__(kThreads) ssd_steps_kernel(SsdPointers<T> p, S* ssm_state) {
  constexpr int kLanes = kN / kOwn;
  constexpr int kChannels = kThreads / kLanes;
  constexpr int kTile = kN > 128 ? 16 : 32;  // tokens: B and C fit into static shared memory
  __shared__ float4 B[kTile][kN / 4];
  __shared__ float4 C[kTile][kN / 4];
  __shared__ float x[kTile][kChannels];
  __shared__ float dt[kTile];
  __shared__ float decay[kTile];

  after_previous();
  const int h = static_cast<int>(blockIdx.y);
  const int64_t seq = blockIdx.z;
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const int64_t begin = p.seq_start[seq];
  const int64_t len = p.seq_start[seq + 1] - begin;
  const int channel = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int first_p = static_cast<int>(blockIdx.x) * kChannels;
  const int c = first_p + channel;
  const bool live = c < p.head_dim;  // dead threads stay for the barriers
  const int64_t e = static_cast<int64_t>(h) * p.head_dim + c;
  const int64_t group = static_cast<int64_t>(h / p.heads_per_group) * p.d_state;
  const float A = p.A[h] * kLog2e;
  const float D = p.D[h];

  // State i of the thread: quads of neighbouring lanes follow each other, so that they read B, C
  // and S without conflicts.
  const auto state_of = [&](int i) { return (i / 4 * kLanes + lane) * 4 + i % 4; };
  S* kept = ssm_state + (static_cast<int64_t>(slot) * p.n_head * p.head_dim + e) * p.d_state;
  float state[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    state[i] = live && state_of(i) < p.d_state ? to_float(kept[state_of(i)]) : 0.0F;
  }

  for (int64_t t0 = 0; t0 < len; t0 += kTile) {
    const int n_tok = static_cast<int>(min(static_cast<int64_t>(kTile), len - t0));
    __syncthreads();  // the last readers of the tile are done
    for (int i = threadIdx.x; i < n_tok * kN; i += kThreads) {
      const int64_t t = begin + t0 + i / kN;
      const int n = i % kN;
      const bool inside = n < p.d_state;
      reinterpret_cast<float*>(B)[i] = inside ? to_float(p.B[t * p.B_stride + group + n]) : 0.0F;
      reinterpret_cast<float*>(C)[i] = inside ? to_float(p.C[t * p.C_stride + group + n]) : 0.0F;
    }
    for (int i = threadIdx.x; i < n_tok * kChannels; i += kThreads) {
      const int64_t t = begin + t0 + i / kChannels;
      const int q = first_p + i % kChannels;
      x[i / kChannels][i % kChannels] =
          q < p.head_dim ? to_float(p.x[t * p.x_stride + static_cast<int64_t>(h) * p.head_dim + q])
                         : 0.0F;
    }
    if (threadIdx.x < n_tok) {
      const float step = p.step_size(begin + t0 + threadIdx.x, h);
      dt[threadIdx.x] = step;
      decay[threadIdx.x] = exp2_fast(step * A);
    }
    __syncthreads();

    for (int i = 0; i < n_tok; ++i) {
      const float xi = x[i][channel];
      const float dtx = dt[i] * xi;
      const float by = decay[i];
      float sum = 0.0F;
#pragma unroll
      for (int q = 0; q < kOwn / 4; ++q) {
        const float4 b = B[i][q * kLanes + lane];
        const float4 k = C[i][q * kLanes + lane];
        state[4 * q] = fmaf(by, state[4 * q], dtx * b.x);
        state[4 * q + 1] = fmaf(by, state[4 * q + 1], dtx * b.y);
        state[4 * q + 2] = fmaf(by, state[4 * q + 2], dtx * b.z);
        state[4 * q + 3] = fmaf(by, state[4 * q + 3], dtx * b.w);
        sum = fmaf(k.x, state[4 * q], sum);
        sum = fmaf(k.y, state[4 * q + 1], sum);
        sum = fmaf(k.z, state[4 * q + 2], sum);
        sum = fmaf(k.w, state[4 * q + 3], sum);
      }
#pragma unroll
      for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
      if (live && lane == 0) {
        p.y[(begin + t0 + i) * p.y_stride + e] = from_float<T>(fmaf(D, xi, sum));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (live && state_of(i) < p.d_state) kept[state_of(i)] = from_float<S>(state[i]);
  }
}

}  // namespace

void ssd_scan_steps(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream) {
  if (ssm_state.dim(3) > 256) {
    throw Error(ErrorKind::unsupported,
                "the CUDA scan of Mamba-2 is built for d_state up to 256, found " +
                    std::to_string(ssm_state.dim(3)),
                "run this model with --device cpu");
  }
  visit_type(in.x.dtype, "ssd_scan x", [&](auto t) {
    using T = decltype(t);
    const SsdPointers<T> p = ssd_pointers<T>(y, in, ssm_state, batch);
    visit_type(ssm_state.dtype, "ssd_scan state", [&](auto s) {
      using S = decltype(s);
      const auto run = [&](auto n, auto* kernel) {
        const int64_t channels = kThreads / (decltype(n)::value / kOwn);
        const dim3 grid(static_cast<unsigned>(ceil_div(p.head_dim, channels)),
                        static_cast<unsigned>(p.n_head), static_cast<unsigned>(batch.n_seq));
        launch("ssd_scan_steps", kernel, grid, kThreads, 0, stream, p, ssm_state.as<S>());
      };
      if (p.d_state <= 32) {
        return run(std::integral_constant<int, 32>{}, &ssd_steps_kernel<T, S, 32>);
      }
      if (p.d_state <= 64) {
        return run(std::integral_constant<int, 64>{}, &ssd_steps_kernel<T, S, 64>);
      }
      if (p.d_state <= 128) {
        return run(std::integral_constant<int, 128>{}, &ssd_steps_kernel<T, S, 128>);
      }
      run(std::integral_constant<int, 256>{}, &ssd_steps_kernel<T, S, 256>);
    });
  });
}

}  // namespace krait::cuda
