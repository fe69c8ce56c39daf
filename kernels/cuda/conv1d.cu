// conv1d.cu - causal depthwise convolution over time, then SiLU, from a given state to a given
// state.
//
//   out[t, e] = silu(bias[e] + sum_j weight[e, j] * u[t - (K-1) + j, e])          K = d_conv
//
// Shapes   u T [n_tok, d_inner] view, out T [n_tok, d_inner], conv_state T [slot, K-1, d_inner]
// Launch   prompts: grid (128 channels, stretches of the longest sequence, n_seq), 4 warps, one
//          stretch each; a thread walks 4 neighbouring channels through 8 to 64 tokens with the
//          last K inputs in registers and the next 8 on their way. One token a sequence: grid
//          (512 channels, groups of up to 16 sequences), as many blocks as run at once; a thread
//          has 4 channels of 2 sequences at a time. A layout without accesses of 4 elements, or up
//          to 7 sequences: a thread a channel
// Bytes    2 * n_tok * d_inner * sizeof(T) and the state, of which one token reads K - 1 rows and
//          writes one; the K-1 inputs before a tile come from L2
// Measured H100 80GB HBM3, bf16 (tools/bench_ops). Decode, 5,120 channels: 1.7 us for 64 sequences,
//          6.1 for 256, 23.3 for 1,024 (63 MB); before the state was a ring (84 MB) 2.0, 7.2 and
//          30.2. 4 channels of 4 sequences at a time: 1.9, 6.6 and 22.9; of one: 2.0, 7.0 and 24.7;
//          2 channels of 2: 1.7, 7.1 and 25.7; 8 of one: 3.2, 8.4 and 28.0. Each thread finding the
//          places of 4 sequences by itself: 3.6, 8.4 and 32.0. The weights before the wait for the
//          kernel before: 2.0, 5.8 and 23.2. 2,048 tokens of one sequence, 5,120 channels, 1 to 6
//          chunks a thread: 25.5, 21.1, 19.1, 20.9, 16.0, 17.3 us; 1,536 channels: 7.1, 6.2, 5.5,
//          10.2, 10.7, 7.7
// Same as  kernels/cpu; tests/ops
#include <algorithm>
#include <limits>

#include "kernels/cuda/conv_ring.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 8;       // tokens of a thread of the plain form
constexpr int kMostEach = 16;  // sequences of a block where each has one token

/// So many bytes of neighbouring channels of one row. What is moved, too, stays whole: the compiler
/// stores the elements of a struct one by one.
template <size_t kBytes>
using Lane = std::conditional_t<
    kBytes == 2, unsigned short,
    std::conditional_t<kBytes == 4, unsigned, std::conditional_t<kBytes == 8, uint2, uint4>>>;

/// Prompts in a layout without accesses of 4 elements: a thread walks one channel through kTile
/// tokens, all of them loaded before the first is used.
template <typename T, int K>
__global__ void __launch_bounds__(kThreads)
    conv1d_kernel(T* out, const T* u, const float* weight, const float* bias, T* conv_state,
                  const int32_t* seq_start, const int32_t* slots, const int64_t* positions,
                  int64_t d_inner, int64_t out_stride, int64_t u_stride) {
  static_assert(kTile >= K - 1);  // only the first tile reaches back to the state
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
  const int oldest = conv_row<K>(positions[seq]);
  T tile[K - 1 + kTile];  // u[t0 - (K-1)], u[t0 - (K-1) + 1], ...
#pragma unroll
  for (int i = 0; i < K - 1; ++i) {
    tile[i] =
        *(t0 == 0 ? state + conv_row<K>(oldest + i) * d_inner : x + (t0 + i - (K - 1)) * u_stride);
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (t0 + i < len) tile[K - 1 + i] = x[(t0 + i) * u_stride];
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
    for (int64_t t = max(len - (K - 1), int64_t{0}); t < len; ++t) {
      state[conv_row<K>(oldest + t) * d_inner] = x[t * u_stride];
    }
  }
}

/// One token of each sequence. A block has some channels of n_each sequences, one after the other,
/// and a thread V neighbouring ones, of kTogether sequences at once: all their inputs are on the
/// way together. seq_start null: token i is that of sequence i. `early`: what the step does not
/// write and the state may be read before the kernels before this one are done.
template <typename T, int K, int V, int kTogether>
__global__ void __launch_bounds__(kThreads)
    conv1d_decode_kernel(T* out, const T* u, const float* weight, const float* bias, T* conv_state,
                         const int32_t* seq_start, const int32_t* slots, const int64_t* positions,
                         int n_seq, int n_each, int d_inner, int64_t out_stride, int64_t u_stride,
                         bool early) {
  using Row = Lane<V * sizeof(T)>;
  static_assert(sizeof(Row) == V * sizeof(T));
  /// Where a sequence's first channel lies: the inputs, oldest first, K - 1 of them in the state;
  /// and the result, -1 for a sequence that has none.
  struct Places {
    int64_t in[K], out;
  };
  __shared__ Places places[kMostEach];
  const auto thread = static_cast<int>(threadIdx.x);
  const int e = (static_cast<int>(blockIdx.x) * kThreads + thread) * V;
  const int first = static_cast<int>(blockIdx.y) * n_each;
  const int n = min(n_each, n_seq - first);
  if (!early) after_previous();
  if (thread < n) {
    const int seq = first + thread;
    const int64_t slot = slots[seq];
    const int oldest = conv_row<K>(positions[seq]);
    int64_t token = seq;
    bool live = slot >= 0;
    if (seq_start != nullptr) {
      token = seq_start[seq];
      live = live && seq_start[seq + 1] > token;
    }
    Places& of = places[thread];
#pragma unroll
    for (int j = 0; j < K - 1; ++j) {
      of.in[j] = (slot * (K - 1) + conv_row<K>(oldest + j)) * d_inner;
    }
    of.in[K - 1] = token * u_stride;
    of.out = live ? token * out_stride : -1;
  }
  alignas(16) float w[V * K] = {};
  float b[V] = {};
  if (e < d_inner) {
    if constexpr (V > 1 && K == 4) {
#pragma unroll
      for (int c = 0; c < V; ++c) {
        *reinterpret_cast<float4*>(w + c * K) = reinterpret_cast<const float4*>(weight)[e + c];
      }
    } else {
#pragma unroll
      for (int i = 0; i < V * K; ++i) w[i] = weight[static_cast<int64_t>(e) * K + i];
    }
#pragma unroll
    for (int c = 0; c < V; ++c) b[c] = bias != nullptr ? bias[e + c] : 0.0F;
  }
  __syncthreads();
  if (e >= d_inner) {
    if (early) after_previous();
    return;
  }
  conv_state += e;
  u += e;
  out += e;
#pragma unroll 1
  for (int s = 0; s < n; s += kTogether) {
    Row in[kTogether][K];
    bool live[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      live[i] = s + i < n && places[s + i].out >= 0;
#pragma unroll
      for (int j = 0; j < K - 1; ++j) {
        if (live[i]) in[i][j] = *reinterpret_cast<const Row*>(conv_state + places[s + i].in[j]);
      }
    }
    if (early && s == 0) after_previous();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (live[i]) in[i][K - 1] = *reinterpret_cast<const Row*>(u + places[s + i].in[K - 1]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      Row row;
#pragma unroll
      for (int c = 0; c < V; ++c) {
        float sum = b[c];
#pragma unroll
        for (int j = 0; j < K; ++j) {
          sum = fmaf(w[c * K + j], to_float(reinterpret_cast<const T*>(&in[i][j])[c]), sum);
        }
        reinterpret_cast<T*>(&row)[c] = from_float<T>(silu(sum));
      }
      if (!live[i]) continue;
      *reinterpret_cast<Row*>(conv_state + places[s + i].in[0]) = in[i][K - 1];
      *reinterpret_cast<Row*>(out + places[s + i].out) = row;
    }
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
                          const int32_t* slots, const int64_t* positions, int64_t d_inner,
                          int64_t out_stride, int64_t u_stride, int n_chunk) {
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
  const int oldest = conv_row<K>(positions[seq]);
  const auto at = [](const T* p) { return *reinterpret_cast<const Row*>(p); };
  const bool first = t0 == 0;
  const T* from = x + t0 * u_stride;
  Row tile[K - 1 + kRows];  // u[t0 - (K-1)], u[t0 - (K-1) + 1], ...
#pragma unroll
  for (int i = 0; i < K - 1; ++i) {
    tile[i] =
        at(first ? state + conv_row<K>(oldest + i) * d_inner : from + (i - (K - 1)) * u_stride);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (t0 + i < len) tile[K - 1 + i] = at(from + i * u_stride);
  }
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
    const int64_t rest = len - (K - 1);
    Row last[K - 1];
#pragma unroll
    for (int j = 0; j < K - 1; ++j) {
      if (rest + j >= 0) last[j] = at(x + (rest + j) * u_stride);
    }
#pragma unroll
    for (int j = 0; j < K - 1; ++j) {
      if (rest + j < 0) continue;
      *reinterpret_cast<Row*>(state + conv_row<K>(oldest + rest + j) * d_inner) = last[j];
    }
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
      const auto quads = [](const Tensor& t) {
        return reinterpret_cast<uintptr_t>(t.data) % sizeof(Quad<T>) == 0 && t.row_stride % 4 == 0;
      };
      const bool by_four = d_inner % 4 == 0 && quads(out) && quads(u) && quads(conv_state);
      // One token per sequence.
      if (batch.max_len == 1) {
        const auto decode = [&](int width, int together, auto* kernel) {
          const int64_t columns = ceil_div(d_inner, int64_t{kThreads} * width);
          // As many blocks as run at once.
          const int64_t room = int64_t{8} * device_attribute(cudaDevAttrMultiProcessorCount);
          int64_t n_each = ceil_div(columns * batch.n_seq, room);
          n_each = std::clamp<int64_t>(ceil_div(n_each, together) * together, 1, kMostEach);
          launch("conv1d_silu", kernel,
                 dim3(static_cast<unsigned>(columns),
                      static_cast<unsigned>(ceil_div(batch.n_seq, n_each))),
                 kThreads, 0, stream, out.as<T>(), u.as<T>(), weight.as<float>(), bias.as<float>(),
                 conv_state.as<T>(),
                 batch.n_tok == batch.n_seq ? nullptr : batch.seq_start.as<int32_t>(),
                 batch.slot.as<int32_t>(), batch.position.as<int64_t>(),
                 static_cast<int>(batch.n_seq), static_cast<int>(n_each), static_cast<int>(d_inner),
                 out.row_stride, u.row_stride, early);
        };
        const bool wide = by_four && batch.n_seq >= 8 && aligned16(weight);
        return wide ? decode(4, 2, &conv1d_decode_kernel<T, K, 4, 2>)
                    : decode(1, 1, &conv1d_decode_kernel<T, K, 1, 1>);
      }
      if (by_four) {
        const int64_t columns = ceil_div(d_inner, 32 * kChannels);
        const int64_t n_chunk = choose_chunks(columns, batch);
        const dim3 grid(static_cast<unsigned>(columns),
                        static_cast<unsigned>(ceil_div(batch.max_len, kWarps * kRows * n_chunk)),
                        static_cast<unsigned>(batch.n_seq));
        launch("conv1d_silu", &conv1d_prefill_kernel<T, K>, grid, 32 * kWarps, 0, stream,
               out.as<T>(), u.as<T>(), weight.as<float>(), bias.as<float>(), conv_state.as<T>(),
               batch.seq_start.as<int32_t>(), batch.slot.as<int32_t>(),
               batch.position.as<int64_t>(), d_inner, out.row_stride, u.row_stride,
               static_cast<int>(n_chunk));
        return;
      }
      const dim3 grid(static_cast<unsigned>(ceil_div(d_inner, kThreads)),
                      static_cast<unsigned>(ceil_div(batch.max_len, kTile)),
                      static_cast<unsigned>(batch.n_seq));
      launch("conv1d_silu", &conv1d_kernel<T, K>, grid, kThreads, 0, stream, out.as<T>(), u.as<T>(),
             weight.as<float>(), bias.as<float>(), conv_state.as<T>(),
             batch.seq_start.as<int32_t>(), batch.slot.as<int32_t>(), batch.position.as<int64_t>(),
             d_inner, out.row_stride, u.row_stride);
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
