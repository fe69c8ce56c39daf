// conv1d.cu - causal depthwise convolution over time, then SiLU, from a given state to a given
// state.
//
//   out[t, e] = silu(bias[e] + sum_j weight[e, j] * u[t - (K-1) + j, e])          K = d_conv
//
// Shapes   u T [n_tok, d_inner] view, out T [n_tok, d_inner], conv_state T [slot, K-1, d_inner]
// Launch   prompts: grid (128 channels, stretches of the longest sequence, n_seq), 4 warps, one
//          stretch each; a thread walks 4 neighbouring channels through 8 to 64 tokens with the
//          last K inputs in registers and the next 8 on their way. One token a sequence: grid
//          (channels, groups of sequences), a thread has 2 channels of 4 sequences. A layout
//          without accesses of 4 elements: a thread a channel
// Bytes    2 * n_tok * d_inner * sizeof(T) and the state; the K-1 inputs before a tile come from L2
// Measured H100 80GB HBM3, bf16 (tools/bench_ops). Decode, 5,120 channels: 2.1 us for 64 sequences,
//          7.2 for 256, 30.2 for 1,024; 4 channels of 2 sequences a thread took 2.5, 10.0 and 32.3,
//          of 4 sequences 2.1, 7.0 and 29.9. A ring for the state would write one value a channel
//          for K-1: 63 MB for 84 at 1,024. 2,048 tokens of one sequence, 5,120 channels, 1 to 6
//          chunks a thread: 25.5, 21.1, 19.1, 20.9, 16.0, 17.3 us; 1,536 channels: 7.1, 6.2, 5.5,
//          10.2, 10.7, 7.7
// Same as  kernels/cpu; tests/ops
#include <algorithm>
#include <limits>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 8;  // tokens of a thread of the plain form

/// V neighbouring channels of one row.
template <typename T, int V>
struct alignas(V * sizeof(T)) Lane {
  T v[V];
};

/// Prompts in a layout without accesses of 4 elements: a thread walks one channel through kTile
/// tokens, all of them loaded before the first is used.
template <typename T, int K>
__global__ void __launch_bounds__(kThreads)
    conv1d_kernel(T* out, const T* u, const float* weight, const float* bias, T* conv_state,
                  const int32_t* seq_start, const int32_t* slots, int64_t d_inner,
                  int64_t out_stride, int64_t u_stride) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool live = e < d_inner;
  // Parameters: they don't depend on the kernel before this one.
  float w[K];
#pragma unroll
  for (int j = 0; j < K; ++j) w[j] = live ? weight[e * K + j] : 0.0F;
  const float b = live && bias != nullptr ? bias[e] : 0.0F;
  after_previous();
  const int64_t seq = blockIdx.z;
  const int32_t slot = slots[seq];
  const int64_t begin = seq_start[seq];
  const int64_t len = seq_start[seq + 1] - begin;
  const int64_t t0 = static_cast<int64_t>(blockIdx.y) * kTile;
  if (!live || slot < 0 || t0 >= len) return;

  const T* x = u + begin * u_stride + e;
  T* state = conv_state + slot * (K - 1) * d_inner + e;
  // The input at time t of this sequence; before time 0 it is in the state, oldest first.
  const auto input = [&](int64_t t) {
    return *(t >= 0 ? x + t * u_stride : state + (K - 1 + t) * d_inner);
  };

  T tile[K - 1 + kTile];  // u[t0 - (K-1)], u[t0 - (K-1) + 1], ...
#pragma unroll
  for (int i = 0; i < K - 1 + kTile; ++i) {
    if (t0 + i - (K - 1) < len) tile[i] = input(t0 + i - (K - 1));
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (t0 + i >= len) break;
    float sum = b;
#pragma unroll
    for (int j = 0; j < K; ++j) sum = fmaf(w[j], to_float(tile[i + j]), sum);
    out[(begin + t0 + i) * out_stride + e] = from_float<T>(silu(sum));
  }

  // The first tile alone touches the state: it has read what it needs of the old one, so nobody
  // races.
  if (t0 == 0) {
    T last[K - 1];
#pragma unroll
    for (int j = 0; j < K - 1; ++j) last[j] = input(len - (K - 1) + j);
#pragma unroll
    for (int j = 0; j < K - 1; ++j) state[j * d_inner] = last[j];
  }
}

/// One token of each sequence. A thread has V neighbouring channels of kSeqs sequences: all their
/// inputs are on the way at once, and the weights are read once for all of them. seq_start null:
/// token i is that of sequence i. `early`: the state may be read before the kernels before this one
/// are done.
template <typename T, int K, int V, int kSeqs>
__global__ void __launch_bounds__(kThreads)
    conv1d_decode_kernel(T* out, const T* u, const float* weight, const float* bias, T* conv_state,
                         const int32_t* seq_start, const int32_t* slots, int n_seq, int d_inner,
                         int out_stride, int u_stride, bool early) {
  using Row = Lane<T, V>;
  const int e = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * V;
  if (e >= d_inner) return after_previous();
  const int first = static_cast<int>(blockIdx.y) * kSeqs;
  // Which sequences there are, and parameters: they don't depend on the kernel before this one.
  int32_t slot[kSeqs];  // -1: no such sequence
  int token[kSeqs];
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    const int seq = first + s;
    token[s] = seq;
    slot[s] = seq < n_seq ? slots[seq] : -1;
    if (seq_start != nullptr && seq < n_seq) {
      token[s] = seq_start[seq];
      if (seq_start[seq + 1] == token[s]) slot[s] = -1;
    }
  }
  if (!early) after_previous();

  T* const states = conv_state + e;
  const int64_t pitch = static_cast<int64_t>(K - 1) * d_inner;
  T* state[kSeqs];
  Row in[kSeqs][K];  // the state, oldest first, and the input
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    state[s] = states + slot[s] * pitch;
    if (slot[s] < 0) continue;
#pragma unroll
    for (int j = 0; j < K - 1; ++j)
      in[s][j] = *reinterpret_cast<const Row*>(state[s] + j * d_inner);
  }
  float w[V * K], b[V];
#pragma unroll
  for (int i = 0; i < V * K; ++i) w[i] = weight[static_cast<int64_t>(e) * K + i];
#pragma unroll
  for (int c = 0; c < V; ++c) b[c] = bias != nullptr ? bias[e + c] : 0.0F;
  if (early) after_previous();
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    if (slot[s] < 0) continue;
    in[s][K - 1] = *reinterpret_cast<const Row*>(u + e + static_cast<int64_t>(token[s]) * u_stride);
  }
#pragma unroll
  for (int s = 0; s < kSeqs; ++s) {
    if (slot[s] < 0) continue;
#pragma unroll
    for (int j = 0; j < K - 1; ++j) *reinterpret_cast<Row*>(state[s] + j * d_inner) = in[s][j + 1];
    Row row;
#pragma unroll
    for (int c = 0; c < V; ++c) {
      float sum = b[c];
#pragma unroll
      for (int j = 0; j < K; ++j) sum = fmaf(w[c * K + j], to_float(in[s][j].v[c]), sum);
      row.v[c] = from_float<T>(silu(sum));
    }
    *reinterpret_cast<Row*>(out + e + static_cast<int64_t>(token[s]) * out_stride) = row;
  }
}

constexpr int kWarps = 4;     // of a block of the prefill form
constexpr int kRows = 8;      // tokens that a thread of it loads together
constexpr int kChannels = 4;  // of a thread
constexpr int kMaxChunks = 8;

/// Prompts: a thread walks 4 neighbouring channels through n_chunk * kRows tokens, with the next
/// kRows on their way while it works on these. A block's warps do one stretch after the other of
/// the same channels.
template <typename T, int K>
__global__ void __launch_bounds__(32 * kWarps, K <= 4 ? 4 : 1)
    conv1d_prefill_kernel(T* __restrict__ out, const T* __restrict__ u, const float* weight,
                          const float* bias, T* conv_state, const int32_t* seq_start,
                          const int32_t* slots, int64_t d_inner, int64_t out_stride,
                          int64_t u_stride, int n_chunk) {
  using Row = Quad<T>;
  static_assert(kRows >= K - 1);  // only the first chunk reaches back to the state
  // Parameters: they don't depend on the kernel before this one. They come in as they lie, and each
  // lane takes those of its channels.
  __shared__ float taps[K * 32 * kChannels + K * 32];
  __shared__ float4 biases[32];
  const int64_t e0 = static_cast<int64_t>(blockIdx.x) * (32 * kChannels);
  const auto n_live = static_cast<int>(min(d_inner - e0, static_cast<int64_t>(32 * kChannels)));
  for (int i = static_cast<int>(threadIdx.x); i < n_live * K; i += 32 * kWarps) {
    taps[i + i / (kChannels * K)] = weight[e0 * K + i];
  }
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread < n_live) {
    reinterpret_cast<float*>(biases)[thread] = bias != nullptr ? bias[e0 + thread] : 0.0F;
  }
  __syncthreads();
  const int lane = thread % 32;
  float w[kChannels][K];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int j = 0; j < K; ++j) w[c][j] = taps[lane * (kChannels * K + 1) + c * K + j];
  }
  const float4 of_bias = biases[lane];
  const float b[kChannels] = {of_bias.x, of_bias.y, of_bias.z, of_bias.w};
  after_previous();

  const int64_t seq = blockIdx.z;
  const int32_t slot = slots[seq];
  const int64_t begin = seq_start[seq];
  const int64_t len = seq_start[seq + 1] - begin;
  const int64_t e = e0 + lane * kChannels;
  int64_t t0 = (static_cast<int64_t>(blockIdx.y) * kWarps + thread / 32) * (n_chunk * kRows);
  if (e >= d_inner || slot < 0 || t0 >= len) return;
  const T* x = u + begin * u_stride + e;
  T* state = conv_state + slot * (K - 1) * d_inner + e;
  const auto at = [](const T* p) { return *reinterpret_cast<const Row*>(p); };
  // The input at time t of this sequence; before time 0 it is in the state, oldest first.
  const auto input = [&](int64_t t) {
    return at(t >= 0 ? x + t * u_stride : state + (K - 1 + t) * d_inner);
  };
  const bool first = t0 == 0;
  Row tile[K - 1 + kRows];  // u[t0 - (K-1)], u[t0 - (K-1) + 1], ...
#pragma unroll
  for (int i = 0; i < K - 1 + kRows; ++i) {
    if (t0 + i - (K - 1) < len) tile[i] = input(t0 + i - (K - 1));
  }
  const T* from = x + t0 * u_stride;
  T* to = out + (begin + t0) * out_stride + e;
  for (int chunk = 0; chunk < n_chunk; ++chunk) {
    const auto left = static_cast<int>(min(len - t0, int64_t{2 * kRows}));
    from += kRows * u_stride;
    Row next[kRows];
    if (chunk + 1 < n_chunk) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (kRows + i < left) next[i] = at(from + i * u_stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Row row;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = b[c];
#pragma unroll
        for (int j = 0; j < K; ++j) sum = fmaf(w[c][j], to_float(tile[i + j].v[c]), sum);
        row.v[c] = from_float<T>(silu(sum));
      }
      if (i < left) *reinterpret_cast<Row*>(to + i * out_stride) = row;
    }
    if (left <= kRows) break;
    to += kRows * out_stride;
    t0 += kRows;
#pragma unroll
    for (int i = 0; i < K - 1; ++i) tile[i] = tile[i + kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) tile[K - 1 + i] = next[i];
  }
  // The first stretch alone touches the state: it has read what it needs of the old one, so nobody
  // races.
  if (first) {
    Row last[K - 1];
#pragma unroll
    for (int j = 0; j < K - 1; ++j) last[j] = input(len - (K - 1) + j);
#pragma unroll
    for (int j = 0; j < K - 1; ++j) *reinterpret_cast<Row*>(state + j * d_inner) = last[j];
  }
}

/// Chunks of a thread. The time of a multiprocessor is that of its blocks, each of which takes
/// about as long to begin as for a chunk; and it needs two of them to hide the latency of its
/// loads.
int64_t choose_chunks(int64_t columns, const Batch& batch) {
  const int64_t n_sm = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t length = ceil_div(batch.n_tok, std::max<int64_t>(batch.n_seq, 1));
  int64_t best = 1;
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t n = 1; n <= kMaxChunks; ++n) {
    const int64_t blocks = columns * batch.n_seq * ceil_div(length, kWarps * kRows * n);
    if (n > 1 && blocks < 2 * n_sm) break;
    const int64_t cost = ceil_div(blocks, n_sm) * (n + 1);
    if (cost < best_cost) best = n, best_cost = cost;
  }
  return best;
}

}  // namespace

void conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
                 const Tensor& conv_state, const Batch& batch, bool early, cudaStream_t stream) {
  visit_type(u.dtype, "conv1d_silu input", [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto k) {
      constexpr int K = decltype(k)::value;
      const int64_t d_inner = u.dim(1);
      constexpr std::integral_constant<int, 1> kOne;
      constexpr std::integral_constant<int, 2> kTwo;
      constexpr std::integral_constant<int, 4> kFour;
      const auto quads = [](const Tensor& t) {
        return reinterpret_cast<uintptr_t>(t.data) % sizeof(Quad<T>) == 0 && t.row_stride % 4 == 0;
      };
      const bool by_four = d_inner % 4 == 0 && quads(out) && quads(u) && quads(conv_state);
      // One token per sequence.
      if (batch.max_len == 1) {
        const auto decode = [&](auto width, auto seqs, auto* kernel) {
          const dim3 grid(
              static_cast<unsigned>(ceil_div(d_inner, kThreads * int64_t{decltype(width)::value})),
              static_cast<unsigned>(ceil_div(batch.n_seq, int64_t{decltype(seqs)::value})));
          launch("conv1d_silu", kernel, grid, kThreads, 0, stream, out.as<T>(), u.as<T>(),
                 weight.as<float>(), bias.as<float>(), conv_state.as<T>(),
                 batch.n_tok == batch.n_seq ? nullptr : batch.seq_start.as<int32_t>(),
                 batch.slot.as<int32_t>(), static_cast<int>(batch.n_seq), static_cast<int>(d_inner),
                 static_cast<int>(out.row_stride), static_cast<int>(u.row_stride), early);
        };
        if (by_four && batch.n_seq >= 8) {
          return decode(kTwo, kFour, &conv1d_decode_kernel<T, K, 2, 4>);
        }
        return decode(kOne, kOne, &conv1d_decode_kernel<T, K, 1, 1>);
      }
      if (by_four) {
        const int64_t columns = ceil_div(d_inner, 32 * kChannels);
        const int64_t n_chunk = choose_chunks(columns, batch);
        const dim3 grid(static_cast<unsigned>(columns),
                        static_cast<unsigned>(ceil_div(batch.max_len, kWarps * kRows * n_chunk)),
                        static_cast<unsigned>(batch.n_seq));
        launch("conv1d_silu", &conv1d_prefill_kernel<T, K>, grid, 32 * kWarps, 0, stream,
               out.as<T>(), u.as<T>(), weight.as<float>(), bias.as<float>(), conv_state.as<T>(),
               batch.seq_start.as<int32_t>(), batch.slot.as<int32_t>(), d_inner, out.row_stride,
               u.row_stride, static_cast<int>(n_chunk));
        return;
      }
      const dim3 grid(static_cast<unsigned>(ceil_div(d_inner, kThreads)),
                      static_cast<unsigned>(ceil_div(batch.max_len, kTile)),
                      static_cast<unsigned>(batch.n_seq));
      launch("conv1d_silu", &conv1d_kernel<T, K>, grid, kThreads, 0, stream, out.as<T>(), u.as<T>(),
             weight.as<float>(), bias.as<float>(), conv_state.as<T>(),
             batch.seq_start.as<int32_t>(), batch.slot.as<int32_t>(), d_inner, out.row_stride,
             u.row_stride);
    };
    switch (weight.dim(1)) {
      case 2:
        return run(std::integral_constant<int, 2>{});
      case 3:
        return run(std::integral_constant<int, 3>{});
      case 4:
        return run(std::integral_constant<int, 4>{});
      case 5:
        return run(std::integral_constant<int, 5>{});
      case 6:
        return run(std::integral_constant<int, 6>{});
      case 7:
        return run(std::integral_constant<int, 7>{});
      case 8:
        return run(std::integral_constant<int, 8>{});
      default:
        break;
    }
    throw Error(
        ErrorKind::unsupported,
        "the CUDA convolution is built for d_conv 2 to 8, found " + std::to_string(weight.dim(1)),
        "run this model with --device cpu");
  });
}

}  // namespace krait::cuda
