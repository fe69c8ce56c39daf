// mamba2_step.cu - what Mamba-2 does between its projections for one token of a few sequences:
// convolution, state update and gated norm in two launches instead of three, bit for bit the same.
//
//   x, B, C = silu(conv_bias + sum_j conv[:, j] * (the last d_conv inputs))            rounded to T
//   dt = clamp(softplus(dt_raw + dt_bias));  S' = exp(dt A) S + dt x B;  y = sum_n C S' + D x
//   out = norm(y * silu(z)), each group of channels by itself              mamba2_gated_norm.cuh
//
// The first kernel's blocks each compute B and C of their group again, which costs less than a
// launch. So none of them may write the convolution's new inputs of B and C where others still
// read: that is left to blocks of the second.
//
// Shapes   as ssd_mixer in kernels/ops.h, one token per sequence; d_conv = 4; N * sizeof(S) is 128,
//          256 or 512; whole blocks divide a head. Everything else is done by the three verbs.
// Launch   first kernel: grid (channels / channels of a block, n_seq), 8 warps; N * sizeof(S) / 16
//          neighbouring lanes share a channel, each with 16 bytes of its states.
//          second: grid (n_seq, n_group + 1), as the gated norm's; the last group moves the inputs
// Types    T bf16 or f16; arithmetic f32; S rounded once on store
// Bytes    n_seq * E * 2 * N * sizeof(S) and, from L2, each block 2 N * (16 + 5 * sizeof(T))
// Roofline latency: 3 MB of states from L2, where they were sent for while the kernel before ran
// Measured H100, bf16, mamba2-2.7b (tools/bench_ops), against the three verbs: f32 state 5.3
// and 5.9
//          us at one sequence, 19.4 and 20.7 at 8; bf16 state 4.6 and 5.5, but 14.7 and 13.2 at 8:
//          hence most_sequences()
// Same as  kernels/cpu; tests/ops/ssd_test.cpp
#include "kernels/cuda/conv_ring.cuh"
#include "kernels/cuda/mamba2.cuh"
#include "kernels/cuda/mamba2_gated_norm.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kConv = 4;

/// Up to so many the two launches are faster than the three verbs: each block computes B and C of
/// its group again, for which states in 16 bits leave less time.
int64_t most_sequences(DType state) { return state == DType::f32 ? 8 : 3; }

template <typename T>
struct StepPointers {
  const T *u, *dt;  ///< u: inputs of the convolution: x, B, C
  const float *conv, *conv_bias, *A, *D, *dt_bias;
  T *y, *conv_state;
  const int32_t* slots;
  const int64_t* positions;
  int64_t u_stride, dt_stride, y_stride;
  int n_head, head_dim, heads_per_group, width;  ///< width: channels of the convolution
  float dt_min, dt_max;
};

/// The inputs of one channel, oldest first, and its weights.
template <typename T>
struct Taps {
  float4 weight;
  float bias;
  T before[kConv - 1], now;

  __device__ __forceinline__ void load_weights(const StepPointers<T>& p, int channel) {
    weight = *reinterpret_cast<const float4*>(p.conv + kConv * channel);
    bias = p.conv_bias != nullptr ? p.conv_bias[channel] : 0.0F;
  }
  static __device__ __forceinline__ void prefetch(const StepPointers<T>& p, int32_t slot,
                                                  int channel) {
    const T* state = p.conv_state + static_cast<int64_t>(slot) * (kConv - 1) * p.width + channel;
#pragma unroll
    for (int j = 0; j < kConv - 1; ++j) prefetch_l2(state + j * p.width);
  }
  /// `oldest`: row of the state
  __device__ __forceinline__ void load_inputs(const StepPointers<T>& p, int64_t seq, int32_t slot,
                                              int oldest, int channel) {
    const T* state = p.conv_state + static_cast<int64_t>(slot) * (kConv - 1) * p.width + channel;
#pragma unroll
    for (int j = 0; j < kConv - 1; ++j) before[j] = state[conv_row<kConv>(oldest + j) * p.width];
    now = p.u[seq * p.u_stride + channel];
  }
  __device__ __forceinline__ float result() const {
    float sum = fmaf(weight.x, to_float(before[0]), bias);
    sum = fmaf(weight.y, to_float(before[1]), sum);
    sum = fmaf(weight.z, to_float(before[2]), sum);
    sum = fmaf(weight.w, to_float(now), sum);
    return to_float(from_float<T>(silu(sum)));
  }
};

/// Where the convolution keeps the input of this step.
template <typename T>
__device__ __forceinline__ T* newest(const StepPointers<T>& p, int32_t slot, int oldest,
                                     int channel) {
  return p.conv_state + (static_cast<int64_t>(slot) * (kConv - 1) + oldest) * p.width + channel;
}

/// kLanes lanes share a channel; a warp has 32 / kLanes channels at a time, kUnits times.
template <typename S, int kLanes>
struct Shape {
  static constexpr int kPer = Vec16<S>::kSize;  // states of a lane
  static constexpr int kN = kLanes * kPer;
  static constexpr int kTogether = 32 / kLanes;
  static constexpr int kUnits = kTogether == 1 ? 2 : 1;
  static constexpr int kChannels = kWarps * kTogether * kUnits;  // of a block
};

template <typename T, typename S, int kLanes>
__global__ void __launch_bounds__(kThreads)
    mixer_step_kernel(StepPointers<T> p, S* ssm_state, int64_t n_slot) {
  using Is = Shape<S, kLanes>;
  constexpr int kPer = Is::kPer;
  constexpr int kN = Is::kN;
  constexpr int kBCEach = (2 * kN + kThreads - 1) / kThreads;
  __shared__ float4 bc[2 * kN / 4];
  __shared__ float xs[Is::kChannels];

  const int64_t seq = blockIdx.y;
  const int e0 = static_cast<int>(blockIdx.x) * Is::kChannels;  // all of one head
  const int h = e0 / p.head_dim;
  const int E = p.n_head * p.head_dim;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % 32;
  const int own = tid / 32 * Is::kTogether * Is::kUnits + lane / kLanes;  // channel in the block
  const int n0 = lane % kLanes * kPer;

  // Channels of the convolution: i < kN is B, then C.
  const int GN = (p.width - E) / 2;
  const int group0 = E + h / p.heads_per_group * kN;
  const auto bc_channel = [&](int i) { return group0 + (i < kN ? i : GN + i - kN); };
  Taps<T> of_bc[kBCEach], of_x;
#pragma unroll
  for (int i = 0; i < kBCEach; ++i) {
    if (tid + i * kThreads < 2 * kN) of_bc[i].load_weights(p, bc_channel(tid + i * kThreads));
  }
  const bool has_x = tid < Is::kChannels;
  if (has_x) of_x.load_weights(p, e0 + tid);
  const float A = p.A[h] * kLog2e;
  const float D = p.D[h];
  const float dt_bias = p.dt_bias[h];
  const auto state_of = [&](int32_t slot) {
    return ssm_state + (static_cast<int64_t>(slot) * E + e0 + own) * kN + n0;
  };
  // A slot read before its time may be that of an earlier step: then the wrong lines come, no more.
  {
    const int32_t early = p.slots[seq];
    if (early >= 0 && early < n_slot) {
#pragma unroll
      for (int u = 0; u < Is::kUnits; ++u) prefetch_l2(state_of(early) + u * Is::kTogether * kN);
#pragma unroll
      for (int i = 0; i < kBCEach; ++i) {
        const int at = tid + i * kThreads;
        if (at < 2 * kN) Taps<T>::prefetch(p, early, bc_channel(at));
      }
      if (has_x) Taps<T>::prefetch(p, early, e0 + tid);
    }
  }
  after_previous();
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const int oldest = conv_row<kConv>(p.positions[seq]);

  S* state = state_of(slot);
  Vec16<S> part[Is::kUnits];
#pragma unroll
  for (int u = 0; u < Is::kUnits; ++u) {
    part[u] = *reinterpret_cast<const Vec16<S>*>(state + u * Is::kTogether * kN);
  }
  const float raw = to_float(p.dt[seq * p.dt_stride + h]);
#pragma unroll
  for (int i = 0; i < kBCEach; ++i) {
    const int at = tid + i * kThreads;
    if (at < 2 * kN) of_bc[i].load_inputs(p, seq, slot, oldest, bc_channel(at));
  }
  if (has_x) of_x.load_inputs(p, seq, slot, oldest, e0 + tid);
#pragma unroll
  for (int i = 0; i < kBCEach; ++i) {
    const int at = tid + i * kThreads;
    if (at < 2 * kN) reinterpret_cast<float*>(bc)[at] = of_bc[i].result();
  }
  if (has_x) {
    xs[tid] = of_x.result();
    *newest(p, slot, oldest, e0 + tid) = of_x.now;
  }
  __syncthreads();

  float B[kPer], C[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i += 4) {
    *reinterpret_cast<float4*>(&B[i]) = bc[(n0 + i) / 4];
    *reinterpret_cast<float4*>(&C[i]) = bc[(kN + n0 + i) / 4];
  }
  const float dt = fminf(fmaxf(softplus(raw + dt_bias), p.dt_min), p.dt_max);
  const float decay = exp2_fast(dt * A);
#pragma unroll
  for (int u = 0; u < Is::kUnits; ++u) {
    const float x = xs[own + u * Is::kTogether];
    const float dtx = dt * x;
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float next = fmaf(decay, to_float(part[u].v[i]), dtx * B[i]);
      sum = fmaf(C[i], next, sum);
      part[u].v[i] = from_float<S>(next);
    }
    *reinterpret_cast<Vec16<S>*>(state + u * Is::kTogether * kN) = part[u];
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
    if (n0 == 0) {
      p.y[seq * p.y_stride + e0 + own + u * Is::kTogether] = from_float<T>(fmaf(D, x, sum));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxNormThreads)
    mixer_norm_kernel(GateInputs<T> norm, StepPointers<T> p, int n_group) {
  if (static_cast<int>(blockIdx.y) < n_group) return gated_norm<T, 1>(norm);
  after_previous();
  const int64_t seq = blockIdx.x;
  const int32_t slot = p.slots[seq];
  if (slot < 0) return;
  const int oldest = conv_row<kConv>(p.positions[seq]);
  for (int c = p.n_head * p.head_dim + static_cast<int>(threadIdx.x); c < p.width;
       c += static_cast<int>(blockDim.x)) {
    *newest(p, slot, oldest, c) = p.u[seq * p.u_stride + c];
  }
}

}  // namespace

bool ssd_mixer_step(const Tensor& y, const SsdMixer& in, const Tensor& conv_state,
                    const Tensor& ssm_state, const Batch& batch, cudaStream_t stream) {
  const int64_t H = ssm_state.dim(1);
  const int64_t P = ssm_state.dim(2);
  const int64_t N = ssm_state.dim(3);
  if (y.dtype == DType::f32 || batch.max_len != 1 ||
      batch.state_rounding() == Rounding::stochastic ||
      batch.n_seq > most_sequences(ssm_state.dtype) || in.conv.dim(1) != kConv ||
      !aligned16(in.conv) || !aligned16(ssm_state)) {
    return false;
  }
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    const GateInputs<T> norm = gate_inputs<T>(y, y, in.z, in.norm, in.n_group, in.norm_eps);
    const int64_t threads = gated_norm_threads<T>(norm, 1);
    if (threads == 0) return false;
    const StepPointers<T> p{in.xbc.as<T>(),
                            in.dt.as<T>(),
                            in.conv.as<float>(),
                            in.conv_bias.as<float>(),
                            in.A.as<float>(),
                            in.D.as<float>(),
                            in.dt_bias.as<float>(),
                            y.as<T>(),
                            conv_state.as<T>(),
                            batch.slot.as<int32_t>(),
                            batch.position.as<int64_t>(),
                            in.xbc.row_stride,
                            in.dt.row_stride,
                            y.row_stride,
                            static_cast<int>(H),
                            static_cast<int>(P),
                            static_cast<int>(H / in.n_group),
                            static_cast<int>(in.xbc.dim(1)),
                            in.dt_min,
                            in.dt_max};
    const auto n_seq = static_cast<unsigned>(batch.n_seq);
    return visit_type(ssm_state.dtype, "ssd_scan state", [&](auto s) {
      using S = decltype(s);
      const auto run = [&](auto lanes) {
        using Is = Shape<S, decltype(lanes)::value>;
        if (N != Is::kN || P % Is::kChannels != 0) return false;
        launch("ssd_mixer", &mixer_step_kernel<T, S, decltype(lanes)::value>,
               dim3(static_cast<unsigned>(H * P / Is::kChannels), n_seq), kThreads, 0, stream, p,
               ssm_state.as<S>(), ssm_state.dim(0));
        launch("ssd_mixer_norm", &mixer_norm_kernel<T>,
               dim3(n_seq, static_cast<unsigned>(in.n_group) + 1), static_cast<unsigned>(threads),
               0, stream, norm, p, static_cast<int>(in.n_group));
        return true;
      };
      return run(std::integral_constant<int, 32>{}) || run(std::integral_constant<int, 16>{}) ||
             run(std::integral_constant<int, 8>{});
    });
  };
  return y.dtype == DType::f16 ? with_type(__half{}) : with_type(__nv_bfloat16{});
}

}  // namespace krait::cuda
