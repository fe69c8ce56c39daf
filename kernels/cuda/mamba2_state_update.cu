// mamba2_state_update.cu - one decode step of the Mamba-2 recurrence for n_seq sequences.
//
//   dt = clamp(softplus(dt_raw + dt_bias))                 per head h; softplus(v) = v for v > 20
//   S' = exp(dt * A) * S + dt * x * B                      per channel p of the head, state n
//   y  = sum_n C[n] * S'[n] + D * x
//
// Shapes   x, y T [n_seq, H * P]; dt_raw T [n_seq, H]; B, C T [n_seq, G * N]; A, D, dt_bias f32
// [H];
//          S [slot, H, P, N] in f32, bf16 or f16
// Launch   grid (channels / channels of a block, n_seq), 4 warps. N * sizeof(S) / 16 neighbouring
//          lanes share a channel, each with 16 bytes of its states: a warp reads and writes 512
//          bytes without a gap, kUnits times, all loads before the first use. Where rows of states
//          don't divide so, a warp strides over one channel at a time.
// Types    arithmetic f32; S rounded once on store
// Bytes    n_seq * H * P * (2 * N * sizeof(S) + 2 * sizeof(T)): each element of S read once,
// written
//          once
// Roofline 3 FLOP per 2 * sizeof(S) bytes: bandwidth-bound; at a few sequences latency decides,
//          so S is on its way to L2 while the kernel before this one still runs
// Same as  ssd_scan in kernels/cpu with one token; tests/ops/ssd_test.cpp
#include "kernels/cuda/mamba2.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kWarps = 4;

/// n neighbours of T, loaded by as few instructions as their size takes.
template <typename T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {
  T v[n];
};

/// kLanes lanes share a channel; a warp has 32 / kLanes channels at a time, kUnits times.
template <typename T, typename S, int kLanes, int kUnits>
__global__ void __launch_bounds__(32 * kWarps)
    state_update_kernel(SsdPointers<T> p, S* ssm_state, int64_t n_slot) {
  constexpr int kPer = Vec16<S>::kSize;  // states of a lane
  constexpr int kTogether = 32 / kLanes;
  constexpr int kChannels = kTogether * kUnits;  // of a warp, all of one head
  const int64_t seq = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int n0 = lane % kLanes * kPer;
  const int e0 =
      (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32) * kChannels +
      lane / kLanes;
  const int E = p.n_head * p.head_dim;
  if (e0 - lane / kLanes >= E) return;  // whole warps: kChannels divides head_dim
  const int h = e0 / p.head_dim;
  const float A = p.A[h] * kLog2e;
  const float D = p.D[h];

  // A slot read before its time may be that of an earlier step: then the wrong lines come, no more.
  {
    const int32_t early = p.slots[seq];
    if (early >= 0 && early < n_slot) {
      const S* from = ssm_state + (static_cast<int64_t>(early) * E + e0) * p.d_state + n0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) prefetch_l2(from + u * kTogether * p.d_state);
    }
  }
  after_previous();
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  S* state = ssm_state + (static_cast<int64_t>(slot) * E + e0) * p.d_state + n0;

  Vec16<S> part[kUnits];
  float x[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    part[u] = *reinterpret_cast<const Vec16<S>*>(state + u * kTogether * p.d_state);
    x[u] = to_float(p.x[seq * p.x_stride + e0 + u * kTogether]);
  }
  const int64_t at = static_cast<int64_t>(h / p.heads_per_group) * p.d_state + n0;
  const auto B = *reinterpret_cast<const Pack<T, kPer>*>(p.B + seq * p.B_stride + at);
  const auto C = *reinterpret_cast<const Pack<T, kPer>*>(p.C + seq * p.C_stride + at);
  const float dt = p.step_size(seq, h);
  const float decay = exp2_fast(dt * A);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const float dtx = dt * x[u];
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float next = fmaf(decay, to_float(part[u].v[i]), dtx * to_float(B.v[i]));
      sum = fmaf(to_float(C.v[i]), next, sum);
      const auto element = static_cast<uint32_t>((e0 + u * kTogether) * p.d_state + n0 + i);
      part[u].v[i] = from_float<S>(p.stochastic ? stochastic<S>(next, element) : next);
    }
    *reinterpret_cast<Vec16<S>*>(state + u * kTogether * p.d_state) = part[u];
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
    if (n0 == 0) p.y[seq * p.y_stride + e0 + u * kTogether] = from_float<T>(fmaf(D, x[u], sum));
  }
}

/// Any sizes: one warp per channel.
template <typename T, typename S>
__global__ void __launch_bounds__(32 * kWarps)
    state_update_any_kernel(SsdPointers<T> p, S* ssm_state) {
  after_previous();
  const int64_t seq = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int e = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  const int32_t slot = p.slots[seq];
  if (e >= p.n_head * p.head_dim || slot < 0) return;  // whole warps
  const int h = e / p.head_dim;
  S* state = ssm_state + (static_cast<int64_t>(slot) * p.n_head * p.head_dim + e) * p.d_state;
  const int64_t group = static_cast<int64_t>(h / p.heads_per_group) * p.d_state;
  const T* B = p.B + seq * p.B_stride + group;
  const T* C = p.C + seq * p.C_stride + group;
  const float x = to_float(p.x[seq * p.x_stride + e]);
  const float dt = p.step_size(seq, h);
  const float decay = exp2_fast(dt * (p.A[h] * kLog2e));
  float sum = 0.0F;
  for (int n = lane; n < p.d_state; n += 32) {
    const float next = fmaf(decay, to_float(state[n]), dt * x * to_float(B[n]));
    sum = fmaf(to_float(C[n]), next, sum);
    const auto element = static_cast<uint32_t>(e * p.d_state + n);
    state[n] = from_float<S>(p.stochastic ? stochastic<S>(next, element) : next);
  }
  sum = warp_sum(sum);
  if (lane == 0) p.y[seq * p.y_stride + e] = from_float<T>(fmaf(p.D[h], x, sum));
}

}  // namespace

void ssd_state_update(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                      const Batch& batch, cudaStream_t stream) {
  visit_type(in.x.dtype, "ssd_scan x", [&](auto t) {
    using T = decltype(t);
    const SsdPointers<T> p = ssd_pointers<T>(y, in, ssm_state, batch);
    const auto n_seq = static_cast<unsigned>(batch.n_seq);
    const int64_t E = ssm_state.dim(1) * ssm_state.dim(2);
    visit_type(ssm_state.dtype, "ssd_scan state", [&](auto s) {
      using S = decltype(s);
      // Few channels a warp while that fills the GPU, more where there is plenty to do.
      const auto run = [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        const auto go = [&](auto units, auto* kernel) {
          const int64_t channels = kWarps * decltype(units)::value * (32 / kLanes);
          const dim3 grid(static_cast<unsigned>(ceil_div(E, channels)), n_seq);
          launch("ssd_state_update", kernel, grid, 32 * kWarps, 0, stream, p, ssm_state.as<S>(),
                 ssm_state.dim(0));
        };
        using One = std::integral_constant<int, 1>;
        using Four = std::integral_constant<int, 4>;
        constexpr int64_t kFills = 4096;  // warps
        const bool plenty = batch.n_seq * E / (4 * (32 / kLanes)) >= kFills;
        if (plenty && p.head_dim % (4 * (32 / kLanes)) == 0) {
          go(Four{}, &state_update_kernel<T, S, kLanes, 4>);
        } else {
          go(One{}, &state_update_kernel<T, S, kLanes, 1>);
        }
      };
      const int64_t lanes = p.d_state % Vec16<S>::kSize == 0 ? p.d_state / Vec16<S>::kSize : 0;
      const bool aligned = aligned16(ssm_state) && aligned16(in.B) && aligned16(in.C) &&
                           p.d_state * sizeof(T) % 16 == 0;
      const auto whole = [&](int64_t l) { return lanes == l && p.head_dim % (32 / l) == 0; };
      if (aligned && whole(32)) return run(std::integral_constant<int, 32>{});
      if (aligned && whole(16)) return run(std::integral_constant<int, 16>{});
      if (aligned && whole(8)) return run(std::integral_constant<int, 8>{});
      if (aligned && whole(4)) return run(std::integral_constant<int, 4>{});
      if (aligned && whole(2)) return run(std::integral_constant<int, 2>{});
      launch("ssd_state_update", state_update_any_kernel<T, S>,
             dim3(static_cast<unsigned>(ceil_div(E, kWarps)), n_seq), 32 * kWarps, 0, stream, p,
             ssm_state.as<S>());
    });
  });
}

}  // namespace krait::cuda
