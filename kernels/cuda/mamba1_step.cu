// mamba1_step.cu - a decode step of a whole Mamba-1 model for up to 8 sequences, in one launch.
//
// At batch 1 a step reads every weight once and computes next to nothing: the floor is the time to
// stream the weights. Kernel by kernel the stream stops at each end of a kernel. Here it never
// does: one block per SM stays for the whole step, and its producer warp walks through all the
// weights that the block will ever need, layer by layer, copying them into a ring in shared memory
// as fast as the ring empties. What the other warps have to wait for - the other blocks, two or
// three times a layer - costs only latency, and the ring holds the weights of 5 to 9 microseconds.
//
// A block owns a run of channels (its rows of in_proj for x and z, their convolution and state),
// a run of the rows of out_proj, and a run of the vocabulary. Per layer:
//
//   1. u = norm(residual); x = silu(conv(in_proj_x u)) of the own channels;
//      the own channels' share of x_proj x goes to a sum over all blocks;
//      z = in_proj_z u while the shares are on their way                    | dt_low, B, C
//   2. dt = softplus(dt_proj dt_low + bias); state update; y of the own channels          | y
//   3. residual += out_proj y, of the own rows                                     | residual
//
// and in the end logits = lm_head norm_f(residual).
//
// Narrow models, one sequence (class Narrow): latency is all there is. out_proj is split by the own
// channels too: their share of out_proj y goes to sums over all blocks, and every block keeps the
// whole residual, the same bits everywhere. That is d_model sums more and an exchange less, and
// nothing is left of 3. Weights are in registers before what they are multiplied with comes.
//
// Exchanges. Nobody raises a flag: what is exchanged says itself whether it is there, so an
// exchange costs one way to L2 and one successful look. y and the residual are f32 whose last bit
// is the parity of the layer (y is rounded to the weights' type before, so it loses nothing, the
// residual half a unit in the last place; its owner keeps it whole). A sum is an integer: a share
// is its value in fixed point and a count of one in the top byte, added by a relaxed reduction;
// readers take the difference to the sum of the layer before, until the count is that of the
// blocks. Integer sums don't depend on their order, so a step gives the same bits each time. Four
// copies of a sum keep shares from queueing at one address. Looks that come too soon are in the way
// of the shares, so the first look at many sums is late (kFirstLook).
//   Each place is written again one layer later, when everybody has read it: who writes y of layer
// l + 1 has all shares of its x_proj sum; a block adds its share after all its warps have seen the
// residual of layer l, which every block publishes after its own warps have read y of layer l. And
// so round the circle; in the narrow form, where the sums of out_proj stand for y and the residual,
// too. Two sets of places take turns from step to step: a step zeroes the set of the next. All
// blocks are resident (cooperative launch), so every wait ends.
//
// Products: on the tensor cores (mma.m16n8k16), the weights in place of A, 8 columns for the
// sequences; of one sequence in a wide model in place of B, where 8 pieces of a matrix share an
// accumulator. A warp has the columns (warp + 16 i) * 32 .. + 31 of every matrix, so what it
// gathers of the residual or y it needs alone: no block-wide barrier between an exchange and the
// product. The warps' shares are summed through shared memory; there are three or four block-wide
// barriers a layer, and in the narrow form only who needs what a barrier guards waits at it.
//
// Launch   cooperative, one block per SM: 16 consumer warps and the producer
// Needs    sm_90 (bulk copies), d_state 16, d_conv 4, sizes as in supports() and lay_out(): a layer
//          of a block in its ring, as in 130m and 370m. Else mamba1_step_wide.cu or the verbs.
//          Narrow: d_model up to 1,024, 16 channels a block, no norms of dt_low, B and C
// Memory   besides the weights: x_proj transposed, and the channels' small parameters side by side,
//          100 bytes a channel and layer; of narrow models out_proj transposed (130m 57 MB, 370m
//          201 MB)
// Errors   what is no number, and shares of a sum beyond 2^15, come out as NaN
// Bytes    the weights, and state read and written, once
// Measured H100 80GB HBM3, bf16, f32 state, tokens/s at batch 1, 2, 4, 8: 130m 6,563, 8,134,
//          15,210, 24,671; 370m 2,985 and 3,061 (1; first look after 1,000 and
//          1,300 cycles); 2.8b 457 (1). With three exchanges at batch 1: 130m
//          4,840, 370m 2,273. The narrow form by steps, 130m: products by mma from shared memory
//          4,006; the first look 800 cycles later 4,975; weights in registers 5,377; the
//          convolution's parameters too 5,549; no registers held by accident, no branches between
//          an exchange and the next 6,458; the first look after 1,200 cycles instead of 1,000
//          6,563. A layer takes about 11,000 cycles with profile code in the version of 5,240
//          tokens/s, 6,000 of them the two exchanges; about 16 microseconds a step go by between
//          two launches of the kernel (the sampler, graph to graph).
//          Tried and dropped: bulk reductions instead of one reduction a lane (1,024 sums 2.03
//          microseconds for 1.90); two looks on their way at once (2.77); sums spread over more
//          lines (two copies as fast as four, four slower); a first look that learns; less of the
//          ring on its way (24 KB: 130m 5,845, 370m 2,626; 70 KB: 370m 2,431 against 2,532); pieces
//          half as large or a fixed pace of the producer for 2.8b; launches of the sampler that
//          overlap the step's end
// Same as  the verbs, one by one, as Mamba1::forward calls them; tests/unit/mamba1_step_test.cpp
#include <algorithm>

#include "kernels/cuda/block_sums.cuh"
#include "kernels/cuda/conv_ring.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mamba1_step.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/parity_exchange.cuh"
#include "kernels/cuda/verbs.h"
#include "kernels/cuda/weight_ring.cuh"

namespace krait::cuda {
namespace {

constexpr int kWarps = 16;  // consumers
constexpr int kThreads = 32 * kWarps;
constexpr int kMostPiece = 42 << 10;  // bytes, of a matrix
// Bytes of a block on their way at once. With all of the ring some blocks get theirs long before
// others, and the slowest is whom all wait for.
constexpr int kMostFlying = 45 << 10;
constexpr int kState = 16;        // d_state
constexpr int kConv = 4;          // d_conv
constexpr int kLanes = 8;         // that share a channel in the state update
constexpr int kMaxChannels = 64;  // of a block
// The narrow form: most channels of a block, d_model and n_proj.
constexpr int kMostNarrow = 16;
constexpr int kNarrowModel = 2 * kWarps * 32;
constexpr int kNarrowProj = 512;
// Cycles from a block's shares of the residual to its first look at the sums. Who looks earlier
// sees nothing yet and is in the way of the shares: 1,024 sums take 1.18 microseconds with 900
// cycles, 2.0 without.
[[maybe_unused]] constexpr unsigned kFirstLook = 1200;
// The same before y or the residual of one sequence is gathered, in the form that is not narrow.
[[maybe_unused]] constexpr unsigned kLaterLook = 700;
constexpr int kTiles = kMaxChannels / 16;
constexpr int kChannelPitch = kMaxChannels + 16;
constexpr int kCopies = 4;  // of a sum, each of a quarter of the blocks

/// Of the warps' shares of sums of 64 rows and B sequences, in floats.
template <int B>
constexpr int kWarpPitch = 64 * B + 2;

struct StepLayer {
  // transposed: x_proj_t [E, proj_pitch], out_proj_t [E, D] or null
  const void *in_proj, *x_proj_t, *dt_proj, *out_proj, *out_proj_t;
  const float *norm, *out_bias;
  void *conv_state, *ssm_state;
};

/// What a block needs of a layer besides matrices and states, for each of its channels: where it
/// lies in the block's record, in units of its number of channels.
enum Param {
  kConvWeight = 0,
  kA = kConv,
  kConvBias = kA + kState,
  kXBias,
  kZBias,
  kDtBias,
  kD,
  kParams
};

/// Where things lie in shared memory, in bytes (norm and windows: from `small` on); pitches in
/// elements.
struct Layout {
  int held, slots, table, v, v_pitch, x, y, dbc, seen, squares, scale, shares, small, small_bytes,
      windows, norm, ring, ring_bytes;
};

struct StepParams {
  const StepLayer* layers;
  const float* records;  // [n_layer][blocks][kParams, n_channels], each block's 16-byte aligned
  int record;            // floats
  int n_layer, d_model, d_inner, dt_rank, n_proj, proj_pitch, vocab_rows;
  const void *embedding, *head;
  const float* norm_f;
  float eps, mixer_eps;
  float mean;  // 1 / d_model
  const int32_t *ids, *slots;
  const int64_t* positions;
  int n_seq;
  float* logits;
  int64_t logits_stride;
  // [2 sets][x_proj: u64 [kCopies][8][n_proj], y: f32 [8][d_inner], residual: f32 [8][d_model],
  // narrow form: u64 [kCopies][kNarrowModel], [kCopies][kNarrowProj]]
  char* exchange;
  int64_t set_bytes;
  unsigned* launches;
  DType state_type;
  int in_rows, out_rows;  // of a piece: 8, 4, 2 or 1
  int most_channels;
  int window_pitch;  // of what the convolution remembers, elements
  Layout at;
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// ---- sums over all blocks -----------------------------------------------------------------------

/// The sum of the copies of a sum, `stride` words apart.
__device__ __forceinline__ unsigned long long poll(const unsigned long long* from, int64_t stride) {
  static_assert(kCopies == 4);
  unsigned long long v[4];
  asm volatile(
      "ld.relaxed.gpu.global.u64 %0, [%4];\n"
      "ld.relaxed.gpu.global.u64 %1, [%5];\n"
      "ld.relaxed.gpu.global.u64 %2, [%6];\n"
      "ld.relaxed.gpu.global.u64 %3, [%7];\n"
      : "=&l"(v[0]), "=&l"(v[1]), "=&l"(v[2]), "=&l"(v[3])
      : "l"(from), "l"(from + stride), "l"(from + 2 * stride), "l"(from + 3 * stride)
      : "memory");
  return v[0] + v[1] + (v[2] + v[3]);
}
/// The same in the narrow form, whose copies lie at fixed distances.
__device__ __forceinline__ unsigned long long poll_narrow(const unsigned long long* from) {
  unsigned long long v[4];
  asm volatile(
      "ld.relaxed.gpu.global.u64 %0, [%4];\n"
      "ld.relaxed.gpu.global.u64 %1, [%4+%5];\n"
      "ld.relaxed.gpu.global.u64 %2, [%4+%6];\n"
      "ld.relaxed.gpu.global.u64 %3, [%4+%7];\n"
      : "=&l"(v[0]), "=&l"(v[1]), "=&l"(v[2]), "=&l"(v[3])
      : "l"(from), "n"(kNarrowProj * 8), "n"(2 * kNarrowProj * 8), "n"(3 * kNarrowProj * 8)
      : "memory");
  return v[0] + v[1] + (v[2] + v[3]);
}
/// Two neighbouring sums of the residual.
__device__ __forceinline__ void poll_narrow(unsigned long long (&sum)[2],
                                            const unsigned long long* from) {
  unsigned long long v[4][2];
  asm volatile(
      "ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%8];\n"
      "ld.relaxed.gpu.global.v2.u64 {%2, %3}, [%8+%9];\n"
      "ld.relaxed.gpu.global.v2.u64 {%4, %5}, [%8+%10];\n"
      "ld.relaxed.gpu.global.v2.u64 {%6, %7}, [%8+%11];\n"
      : "=&l"(v[0][0]), "=&l"(v[0][1]), "=&l"(v[1][0]), "=&l"(v[1][1]), "=&l"(v[2][0]),
        "=&l"(v[2][1]), "=&l"(v[3][0]), "=&l"(v[3][1])
      : "l"(from), "n"(kNarrowModel * 8), "n"(2 * kNarrowModel * 8), "n"(3 * kNarrowModel * 8)
      : "memory");
#pragma unroll
  for (int i = 0; i < 2; ++i) sum[i] = v[0][i] + v[1][i] + (v[2][i] + v[3][i]);
}

/// Barriers of the consumers alone.
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
/// A barrier of the first n warps.
__device__ __forceinline__ void warps_sync(int n) {
  asm volatile("bar.sync 2, %0;" ::"r"(32 * n) : "memory");
}

// ---- the ring -----------------------------------------------------------------------------------

/// Pieces of any size one after the other in a circle of shared memory. The producer and every
/// consumer warp walk through the same sequence.
struct Ring {
  char* base;
  uint32_t full, empty;  // shared addresses of [kRingPieces] barriers each
  int* places;           // [kRingPieces] where a piece lies, behind base
  unsigned piece = 0;    // of all

  [[nodiscard]] __device__ uint32_t full_at(int i) const { return full + 8 * i; }
  [[nodiscard]] __device__ uint32_t empty_at(int i) const { return empty + 8 * i; }
  [[nodiscard]] __device__ unsigned index(unsigned ahead = 0) const {
    return (piece + ahead) % kRingPieces;
  }
  [[nodiscard]] __device__ const char* wait(unsigned ahead = 0) const {
    mbarrier_wait(full + 8 * index(ahead), (piece + ahead) / kRingPieces % 2);
    return base + places[index(ahead)];
  }
  /// Every warp must release every piece.
  __device__ void release(unsigned ahead = 0) const { warp_arrive(empty + 8 * index(ahead)); }
  __device__ void advance(unsigned n = 1) { piece += n; }
};

/// 16 bytes more than a row put eight rows into different banks.
__device__ __forceinline__ int piece_bytes(int rows, int columns) {
  return rows * (2 * columns + 16);
}

/// What every thread of a block knows.
template <typename T, int B>
struct Block {
  const StepParams& p;
  Run channels, rows, words;  // of d_inner, d_model, the vocabulary
  const StepLayer* layers;
  T* v;                      // [B][v_pitch] permuted: u or y. A warp touches its own columns only
  T *x, *y;                  // [B][kChannelPitch] permuted
  float* dbc;                // [B][n_proj]
  unsigned long long* seen;  // [B][n_proj]
  float* squares;            // [B][kWarps]
  float* scale;              // [2][B] of the norms of this layer's predecessor and its own, in turn
  float* left;               // [B] what products with v are still to be multiplied by
  float* shares;             // [2][kWarps][kWarpPitch]: of row r and sequence s at r * B + s
  const char* small;         // [2][small_bytes]: record, norm, windows of two layers in turn
  uint32_t small_full, small_empty;
  const int* slot;  // [B], the ids of the sequences [B], the oldest row of conv_state [B]
  unsigned live;    // bit n: there is a sequence n
  unsigned launch;
};

/// Fills the ring, in the order in which the consumers walk through it. A warp.
struct Producer {
  Ring ring;
  uint64_t policy;
  int* held;  // [kRingPieces]
  int capacity;
  int at = 0;
  RingRoom room{};

  /// Makes room; announces the bytes that will come. A piece that would cross the end of the ring
  /// starts at the beginning.
  __device__ uint32_t begin(int bytes, int expected) {
    const int to = at + bytes <= capacity ? at : 0;
    const int need = bytes + (to == at ? 0 : capacity - at);
    room.take(ring, held, capacity, kMostFlying, need);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      held[ring.index()] = need;
      ring.places[ring.index()] = to;
      mbarrier_expect(ring.full + 8 * ring.index(), expected);
    }
    __syncwarp();
    room.taken(need);
    at = to + bytes;
    return shared_address(ring.base + to);
  }
  __device__ void copy(uint32_t to, const void* from, int bytes) const {
    bulk_copy(to, from, bytes, ring.full + 8 * ring.index(), policy);
  }
  __device__ void end() { ring.advance(); }

  /// n rows of a matrix with n_columns, so many at a time.
  __device__ void rows(const char* from, int n, int n_columns, int at_once) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t row_bytes = int64_t{2} * n_columns;
    for (int r = 0; r < n; r += at_once) {
      const int here = min(at_once, n - r);
      const int bytes = piece_bytes(here, n_columns);
      const uint32_t to = begin(bytes, here * 2 * n_columns);
      if (lane < here) {
        copy(to + lane * (2 * n_columns + 16), from + (r + lane) * row_bytes, 2 * n_columns);
      }
      end();
    }
  }
};

template <typename T, int B, bool kNarrow>
__device__ void produce(const Block<T, B>& b, Ring ring) {
  const StepParams& p = b.p;
  Producer out{ring, evict_first_policy(),
               reinterpret_cast<int*>(ring.base - p.at.ring + p.at.held), p.at.ring_bytes};
  const int64_t D = p.d_model;
  const int64_t E = p.d_inner;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int n = b.channels.n;
  const int64_t first = b.channels.begin;
  const int state_row = kState * (p.state_type == DType::f32 ? 4 : 2);
  const int slot = lane < B ? b.slot[lane] : -1;
  const int oldest = lane < B ? b.slot[2 * B + lane] : 0;
  const auto at = [](const void* base, int64_t element) {
    return static_cast<const char*>(base) + element * static_cast<int64_t>(sizeof(T));
  };
  // A run of 16-bit values with the 16-byte lines it lies in.
  const int skew = static_cast<int>(first * 2 % 16);
  const int in_rows = kNarrow ? kMostNarrow : p.in_rows;
  const int line_bytes = (skew + n * 2 + 15) / 16 * 16;
  for (int l = 0; l <= p.n_layer; ++l) {
    const uint32_t full = b.small_full + 8 * (l % 2);
    mbarrier_wait(b.small_empty + 8 * (l % 2), static_cast<uint32_t>(l / 2 + 1) % 2);
    const uint32_t small = shared_address(b.small) + l % 2 * p.at.small_bytes;
    const bool layer = l < p.n_layer;
    const int record = layer ? (n * kParams * 4 + 15) / 16 * 16 : 0;
    const int lines = layer && n > 0 ? __popc(b.live) * (kConv - 1) * line_bytes : 0;
    if (lane == 0) mbarrier_expect(full, record + p.d_model * 4 + lines);
    __syncwarp();
    if (lane == 0) {
      if (record > 0) {
        bulk_copy(small, p.records + (static_cast<int64_t>(l) * gridDim.x + blockIdx.x) * p.record,
                  record, full, out.policy);
      }
      bulk_copy(small + p.at.norm, layer ? b.layers[l].norm : p.norm_f, p.d_model * 4, full,
                out.policy);
    }
    if (lines > 0 && slot >= 0) {
      for (int j = 0; j < kConv - 1; ++j) {
        const int64_t row = static_cast<int64_t>(slot) * (kConv - 1) + conv_row<kConv>(oldest + j);
        bulk_copy(small + p.at.windows + (lane * (kConv - 1) + j) * 2 * p.window_pitch,
                  at(b.layers[l].conv_state, row * E + first) - skew, line_bytes, full, out.policy);
      }
    }
    if (!layer) break;
    const StepLayer& w = b.layers[l];
    if (n > 0) {
      out.rows(at(w.in_proj, first * D), n, p.d_model, in_rows);
      const int x_bytes = n * p.proj_pitch * 2;
      uint32_t to = out.begin(x_bytes, x_bytes);
      if (lane == 0) out.copy(to, at(w.x_proj_t, first * p.proj_pitch), x_bytes);
      out.end();
      out.rows(at(w.in_proj, (E + first) * D), n, p.d_model, in_rows);
      const int dt_bytes = n * p.dt_rank * 2;
      const int bytes = dt_bytes + B * n * state_row;
      to = out.begin(bytes, dt_bytes + __popc(b.live) * n * state_row);
      if (lane == 0) out.copy(to, at(w.dt_proj, first * p.dt_rank), dt_bytes);
      if (slot >= 0) {
        out.copy(to + dt_bytes + lane * n * state_row,
                 static_cast<const char*>(w.ssm_state) + (slot * E + first) * state_row,
                 n * state_row);
      }
      out.end();
      if (kNarrow) out.rows(at(w.out_proj_t, first * D), n, p.d_model, in_rows);
    }
    if (!kNarrow && b.rows.n > 0) {
      out.rows(at(w.out_proj, b.rows.begin * E), b.rows.n, p.d_inner, p.out_rows);
    }
  }
#pragma unroll 1
  for (int row = 0; row < b.words.n; row += 8 * p.in_rows) {
    out.rows(at(p.head, (b.words.begin + row) * D), min(8 * p.in_rows, b.words.n - row), p.d_model,
             p.in_rows);
  }
}

// ---- the consumers ------------------------------------------------------------------------------

/// A product with one sequence, the weights in place of B: of piece u, row 2 quarter + i in acc[i]
/// of the lanes of group u. 8 pieces at most.
template <typename T>
__device__ __forceinline__ void product(const Block<T, 1>& b, Ring& ring, int n, int n_columns,
                                        int at_once, float (&acc)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int pitch = 2 * n_columns + 16;
  const int steps = (n_columns / 32 - warp + kWarps - 1) / kWarps;
  const char* v = reinterpret_cast<const char*>(b.v) + warp * 64 + lane % 4 * 16;
  float other[4] = {};  // two chains of products
#pragma unroll 1
  for (int u = 0; u * at_once < n; ++u) {
    const int here = min(at_once, n - u * at_once);
    const char* a = ring.wait() + min(lane % 8, here - 1) * pitch + lane / 8 * 16 + warp * 64;
    const bool mine = lane / 4 == u;
#pragma unroll 5
    for (int i = 0; i < steps; ++i) {
      uint4 x{0, 0, 0, 0};
      if (mine) x = *reinterpret_cast<const uint4*>(v + i * (kWarps * 64));
      uint32_t w[4];
      load_matrices(w, a + i * (kWarps * 64));
      multiply_add<T>(acc, {x.x, 0, x.y, 0}, w[0], w[1]);
      multiply_add<T>(other, {x.z, 0, x.w, 0}, w[2], w[3]);
    }
    ring.release();
    ring.advance();
  }
  acc[0] += other[0];
  acc[1] += other[1];
}

/// acc = n rows of the matrix in the ring times v, the own columns of the warp: acc[m] is rows
/// 16 m .. + 15, its column i that of sequence i % B.
template <typename T, int B>
__device__ __forceinline__ void product(const Block<T, B>& b, Ring& ring, int n, int n_columns,
                                        int at_once, float (&acc)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4;
  const int pitch = 2 * n_columns + 16;
  const int steps = (n_columns / 32 - warp + kWarps - 1) / kWarps;
  // 32 columns at a time, from a column of 32 * warp.
  const char* v =
      reinterpret_cast<const char*>(b.v + group % B * b.p.at.v_pitch) + warp * 64 + lane % 4 * 16;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int rows = min(16, n - 16 * m);
    if (rows <= 0) break;
    float other[4] = {};  // two chains of products
#pragma unroll 1
    for (int r = 0; r < rows; r += at_once) {
      const int here = min(at_once, rows - r);
      const int first = r % 8;
      const char* a =
          ring.wait() + min(max(lane % 8 - first, 0), here - 1) * pitch + lane / 8 * 16 + warp * 64;
      const bool mine = group >= first && group < first + at_once;
      const uint32_t low = mine && r < 8 ? ~0U : 0;
      const uint32_t high = mine && r >= 8 ? ~0U : 0;
#pragma unroll 4
      for (int i = 0; i < steps; ++i) {
        const uint4 x = *reinterpret_cast<const uint4*>(v + i * (kWarps * 64));
        uint32_t w[4];
        load_matrices(w, a + i * (kWarps * 64));
        multiply_add<T>(acc[m], {w[0] & low, w[0] & high, w[1] & low, w[1] & high}, x.x, x.y);
        multiply_add<T>(other, {w[2] & low, w[2] & high, w[3] & low, w[3] & high}, x.z, x.w);
      }
      ring.release();
      ring.advance();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[m][i] += other[i];
  }
}

/// Adds the share of the own channels in x_proj x to the sums over all blocks.
template <typename T, int B>
__device__ __forceinline__ void add_x_proj(const Block<T, B>& b, Ring& ring,
                                           unsigned long long* sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4;
  const int quarter = lane % 4;
  const int n = b.channels.n;
  const int J = b.p.n_proj;
  const int pitch = b.p.proj_pitch * 2;
  const char* piece = n > 0 ? ring.wait() : nullptr;
#pragma unroll 1
  for (int t = warp; t * 16 < J; t += kWarps) {
    float acc[4] = {};
    // Of a last tile with less than 16 columns, what lies beyond them is not used.
    const int column_at = min(t * 32 + lane / 8 % 2 * 16, pitch - 16);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (k * 16 >= n) break;
      const uint2 column =
          *reinterpret_cast<const uint2*>(b.x + group % B * kChannelPitch + k * 16 + quarter * 4);
      uint32_t a[4];
      load_transposed(a, piece + min(k * 16 + lane % 8 + lane / 16 * 8, n - 1) * pitch + column_at);
      multiply_add<T>(acc, a, column.x, column.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int seq = 2 * quarter + i % 2;
      const int out = t * 16 + group + i / 2 * 8;
      if (seq < B && out < J && (b.live >> seq & 1) != 0) add_share(sums + seq * J + out, acc[i]);
    }
  }
  if (n > 0) {
    ring.release();
    ring.advance();
  }
}

/// use(seq, d, values) for the own columns of a warp, four at a time, of all sequences, as soon as
/// they are published. Four loads are on their way: of several rounds of 4 * kWarps * 32 columns
/// for one sequence, else of several sequences.
template <typename T, int B, typename Use>
__device__ __forceinline__ void gather(const Block<T, B>& b, const float* from, int length,
                                       unsigned parity, Use use) {
  if constexpr (B == 1) {
    wait_cycles(kLaterLook);
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  constexpr int kStride = 4 * kWarps * 32;
  const int first_column = (warp + kWarps * (lane / 8)) * 32 + lane % 8 * 4;
  const auto values = [](const uint4& v) {
    return float4{value_of(v.x), value_of(v.y), value_of(v.z), value_of(v.w)};
  };
  if (B == 1 && length <= kStride) {
    const bool wanted = first_column < length;
    uint4 v{parity, parity, parity, parity};
    do {
      if (wanted) {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from + first_column)
                     : "memory");
      }
    } while (
        __any_sync(0xffffffffU,
                   (((v.x & v.y & v.z & v.w) ^ parity) | ((v.x | v.y | v.z | v.w) ^ parity)) & 1));
    if (wanted) use(0, first_column, values(v));
    __syncwarp();
    return;
  }
#pragma unroll 1
  for (int seq0 = 0; seq0 < B; seq0 += 4) {
#pragma unroll 1
    for (int base = warp * 32; base < length; base += B == 1 ? 4 * kStride : kStride) {
      const int column = base + first_column - warp * 32;
      uint4 word[4];
      bool wanted[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wanted[j] = B == 1 ? column + j * kStride < length
                           : column < length && (b.live >> (seq0 + j) & 1) != 0;
        word[j] = uint4{parity, parity, parity, parity};
      }
      unsigned all, any;
      do {
        load4(word, from + static_cast<int64_t>(seq0) * length + column, B == 1 ? kStride : length,
              wanted);
        all = ~0U;
        any = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint4 v = word[j];
          all &= v.x & v.y & v.z & v.w;
          any |= v.x | v.y | v.z | v.w;
        }
      } while (__any_sync(0xffffffffU, ((all ^ parity) | (any ^ parity)) & 1));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (wanted[j]) {
          use(B == 1 ? 0 : seq0 + j, B == 1 ? column + j * kStride : column, values(word[j]));
        }
      }
    }
  }
  __syncwarp();
}

template <typename T, int B>
__device__ __forceinline__ const T* embedding(const Block<T, B>& b, int seq, int d) {
  return static_cast<const T*>(b.p.embedding) +
         static_cast<int64_t>(b.slot[B + seq]) * b.p.d_model + d;
}

/// Four columns of u or y where product() looks for them.
template <typename T, int B>
__device__ __forceinline__ void store4(const Block<T, B>& b, int seq, int d, float4 f) {
  T* to = b.v + seq * b.p.at.v_pitch + (d & ~31) + (d & 4) * 4 + (d & 16) / 4 + (d & 8) / 4;
  *reinterpret_cast<Two<T>*>(to) = {from_float<T>(f.x), from_float<T>(f.y)};
  *reinterpret_cast<Two<T>*>(to + 8) = {from_float<T>(f.z), from_float<T>(f.w)};
}

/// v = residual before layer l times the norm's weights, and the squares of the residual, of the
/// warp's own columns. What products with v are still to be multiplied by to make them those of
/// rms_norm follows from all squares, later: so nobody waits for the mean. To keep within f16, v is
/// multiplied by the scale of the norm before this one, at first 1.
template <typename T, int B>
__device__ __forceinline__ void normalise(const Block<T, B>& b, const char* small, int l,
                                          const float* all_r, float (&squares)[B]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int D = b.p.d_model;
  const float* weights = reinterpret_cast<const float*>(small + b.p.at.norm);
  const float* scale = b.scale + l % 2 * B;
  for (float& s : squares) s = 0.0F;
  const auto use = [&](int seq, int d, float4 r) {
    const float4 w = *reinterpret_cast<const float4*>(weights + d);
    const float f = scale[seq];
    store4(b, seq, d, {r.x * f * w.x, r.y * f * w.y, r.z * f * w.z, r.w * f * w.w});
    const float sum = r.x * r.x + r.y * r.y + (r.z * r.z + r.w * r.w);
#pragma unroll
    for (int s = 0; s < B; ++s) squares[s] += s == seq ? sum : 0.0F;
  };
  if (l > 0) {
    gather(b, all_r, D, static_cast<unsigned>(l) % 2, use);
  } else {
    for (int seq = 0; seq < B; ++seq) {
      if ((b.live >> seq & 1) == 0) continue;
      for (int d = (warp + kWarps * (lane / 8)) * 32 + lane % 8 * 4; d < D; d += 128 * kWarps) {
        const auto e = *reinterpret_cast<const Quad<T>*>(embedding(b, seq, d));
        use(seq, d, {to_float(e.v[0]), to_float(e.v[1]), to_float(e.v[2]), to_float(e.v[3])});
      }
    }
  }
  __syncwarp();
}
template <typename T, int B>
__device__ __forceinline__ void keep_squares(const Block<T, B>& b, const float (&squares)[B]) {
#pragma unroll
  for (int s = 0; s < B; ++s) {
    const float sum = warp_sum(squares[s]);
    if (threadIdx.x % 32 == 0) b.squares[s * kWarps + threadIdx.x / 32] = sum;
  }
}

/// 1 / the root of the mean square of the residual.
template <typename T, int B>
__device__ __forceinline__ float norm_scale(const Block<T, B>& b, int seq) {
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kWarps; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(b.squares + seq * kWarps + i);
    sum += v.x + v.y + (v.z + v.w);
  }
  return rsqrtf(fmaf(sum, b.p.mean, b.p.eps));
}

/// The warp's part of n rows of the matrix in the ring times v goes to its place among the shares.
template <typename T, int B>
__device__ __forceinline__ void multiply(const Block<T, B>& b, Ring& ring, int n, int n_columns,
                                         int at_once, float* shares) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int quarter = lane % 4;
  if constexpr (B == 1) {
    float acc[4] = {};
    product(b, ring, n, n_columns, at_once, acc);
    float* to = shares + threadIdx.x / 32 * kWarpPitch<1> + lane / 4 * at_once + 2 * quarter;
    if (2 * quarter < at_once) to[0] = acc[0];
    if (2 * quarter + 1 < at_once) to[1] = acc[1];
    return;
  }
  float acc[kTiles][4] = {};
  product(b, ring, n, n_columns, at_once, acc);
  // Columns i and i + B of a product are the same, so lanes share the tiles.
  constexpr int kDistinct = B / 2 > 1 ? B / 2 : 1;  // quarters
  float* to = shares + threadIdx.x / 32 * kWarpPitch<B> + lane / 4 * B +
              (B == 1 ? 0 : 2 * (quarter % kDistinct));
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    if (m * 16 >= n) break;
    if (m % (4 / kDistinct) != quarter / kDistinct) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* at = to + (m * 16 + half * 8) * B;
      if constexpr (B == 1) {
        *at = acc[m][2 * half];
      } else {
        *reinterpret_cast<float2*>(at) = float2{acc[m][2 * half], acc[m][2 * half + 1]};
      }
    }
  }
}
template <int B>
__device__ __forceinline__ float summed(const float* shares) {
  const float* from = shares + threadIdx.x;
  float v[4] = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v[i % 4] += from[i * kWarpPitch<B>];
  return v[0] + v[1] + (v[2] + v[3]);
}

/// x = silu(conv(v)) of a channel and a sequence. What can be had before v is, is loaded before.
template <typename T>
struct Convolution {
  T now;
  float last_weight, sum, bias;

  template <int B>
  __device__ void load(const Block<T, B>& b, const char* small, int channel, int seq) {
    const StepParams& p = b.p;
    const int n = b.channels.n;
    const float* record = reinterpret_cast<const float*>(small);
    const T* from = reinterpret_cast<const T*>(small + p.at.windows) +
                    seq * (kConv - 1) * p.window_pitch + b.channels.begin % 8 + channel;
    const float4 weight = *reinterpret_cast<const float4*>(record + channel * kConv);
    last_weight = weight.w;
    bias = record[kXBias * n + channel];
    sum = fmaf(weight.x, to_float(from[0]), record[kConvBias * n + channel]);
    sum = fmaf(weight.y, to_float(from[p.window_pitch]), sum);
    sum = fmaf(weight.z, to_float(from[2 * p.window_pitch]), sum);
  }
  __device__ T result(float v) {
    now = from_float<T>(v + bias);
    return from_float<T>(silu(fmaf(last_weight, to_float(now), sum)));
  }
  /// In the place of the oldest input.
  template <int B>
  __device__ void keep(const Block<T, B>& b, const StepLayer& w, int channel, int seq) const {
    const int64_t row = static_cast<int64_t>(b.slot[seq]) * (kConv - 1) + b.slot[2 * B + seq];
    static_cast<T*>(w.conv_state)[row * b.p.d_inner + b.channels.begin + channel] = now;
  }
};

/// dbc from the sums over all blocks.
template <typename T, int B>
__device__ __forceinline__ void read_dbc(const Block<T, B>& b, const unsigned long long* sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int J = b.p.n_proj;
#pragma unroll 1
  for (int base = warp * 32; base < B * J; base += kThreads) {
    const int i = base + lane;
    const bool wanted = i < B * J && (B == 1 || (b.live >> i / J & 1) != 0);
    const unsigned long long before = wanted ? b.seen[i] : 0;
    unsigned long long word = 0;
    do {
      if (wanted) word = poll(sums + i, 8 * J);
    } while (__any_sync(0xffffffffU, wanted && !complete(word - before)));
    if (wanted) {
      b.dbc[i] = total_of(word - before);
      b.seen[i] = word;
    }
  }
  consumers_sync();
  if (b.p.mixer_eps > 0.0F) {  // Falcon-Mamba: dt_low, B and C each by its root mean square
    for (int unit = warp; unit < 3 * B; unit += kWarps) {
      const int part = unit % 3;
      const int R = b.p.dt_rank;
      const int width = part == 0 ? R : kState;
      float* v = b.dbc + unit / 3 * J + (part == 0 ? 0 : R + (part - 1) * kState);
      float sum = 0.0F;
      for (int i = lane; i < width; i += 32) sum += v[i] * v[i];
      const float f = rsqrtf(warp_sum(sum) / static_cast<float>(width) + b.p.mixer_eps);
      for (int i = lane; i < width; i += 32) v[i] *= f;
    }
    consumers_sync();
  }
}

/// dt, the state and y of the own channels: 8 lanes share a channel, 2 states each. z is still
/// among the warps' shares.
template <typename T, int B>
__device__ __forceinline__ void update_state(const Block<T, B>& b, Ring& ring, const StepLayer& w,
                                             const char* small, const float* z_shares, float* all_y,
                                             unsigned parity) {
  const StepParams& p = b.p;
  const int n = b.channels.n;
  const int R = p.dt_rank;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int c = static_cast<int>(threadIdx.x) / kLanes % p.most_channels;
  const int first = static_cast<int>(threadIdx.x) / kLanes / p.most_channels;
  const int at_once = kThreads / kLanes / p.most_channels;  // sequences
  const int channel = min(c, n - 1);
  const int state_bytes = n * kState * (p.state_type == DType::f32 ? 4 : 2);
  const char* piece = ring.wait();
  const T* row = reinterpret_cast<const T*>(piece) + channel * R;
  const float* record = reinterpret_cast<const float*>(small);
#pragma unroll 1
  for (int base = 0; base < B; base += at_once) {
    const bool mine =
        c < n && first < at_once && base + first < B && (b.live >> (base + first) & 1) != 0;
    if (!__any_sync(0xffffffffU, mine)) continue;
    const int seq = mine ? base + first : 0;
    const float* dbc = b.dbc + seq * p.n_proj;
    float dt = 0.0F;
#pragma unroll 2
    for (int r = 2 * lane; r < R; r += 2 * kLanes) {
      const auto two = *reinterpret_cast<const Two<T>*>(row + r);
      const float2 low = *reinterpret_cast<const float2*>(dbc + r);
      dt = fmaf(to_float(two.b), low.y, fmaf(to_float(two.a), low.x, dt));
    }
    const float* from = z_shares + 2 * lane * kWarpPitch<B> + channel * B + seq;
    static_assert(kWarps == 2 * kLanes);
    float z = from[0] + from[kWarpPitch<B>];
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) {
      dt += __shfl_xor_sync(0xffffffffU, dt, d);
      z += __shfl_xor_sync(0xffffffffU, z, d);
    }
    float y = 0.0F;
    const float x = to_float(b.x[seq * kChannelPitch + permuted(channel)]);
    if (mine) {
      const int in = c * kState + 2 * lane;
      const float2 A = *reinterpret_cast<const float2*>(record + kA * n + in);
      const float2 of_B = *reinterpret_cast<const float2*>(dbc + R + 2 * lane);
      const float2 of_C = *reinterpret_cast<const float2*>(dbc + R + kState + 2 * lane);
      const float step = softplus(dt + record[kDtBias * n + c]);
      const float dx = step * x;
      const float decay[2] = {exp2_fast(step * (A.x * kLog2e)), exp2_fast(step * (A.y * kLog2e))};
      const int64_t to =
          (b.slot[seq] * static_cast<int64_t>(p.d_inner) + b.channels.begin) * kState + in;
      with_state_type(p.state_type, [&](auto s) {
        using S = decltype(s);
        const auto old = *reinterpret_cast<const Two<S>*>(
            reinterpret_cast<const S*>(piece + n * R * 2 + seq * state_bytes) + in);
        const float h0 = fmaf(decay[0], to_float(old.a), dx * of_B.x);
        const float h1 = fmaf(decay[1], to_float(old.b), dx * of_B.y);
        *reinterpret_cast<Two<S>*>(static_cast<S*>(w.ssm_state) + to) = {from_float<S>(h0),
                                                                         from_float<S>(h1)};
        y = fmaf(of_C.y, h1, of_C.x * h0);
      });
    }
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) y += __shfl_xor_sync(0xffffffffU, y, d);
    if (mine && lane == 0) {
      z = to_float(from_float<T>(fmaf(z, b.left[seq], record[kZBias * n + c])));
      const T gated = from_float<T>(fmaf(record[kD * n + c], x, y) * silu(z));
      publish(all_y + static_cast<int64_t>(seq) * p.d_inner + b.channels.begin + c, to_float(gated),
              parity);
    }
  }
  ring.release();
  ring.advance();
}

__device__ __forceinline__ unsigned bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ unsigned bits_of(__half v) { return __half_as_ushort(v); }

/// Where a step's blocks exchange; clears the places of the next step.
struct Exchange {
  unsigned long long* x_sums;  // [kCopies][8][n_proj]
  float *y, *residual;         // [8][d_inner], [8][d_model]
  // Of the narrow form: [kCopies][kNarrowModel], [kCopies][kNarrowProj]
  unsigned long long *narrow_r, *narrow_x;

  __device__ Exchange(const StepParams& p, unsigned launch) {
    char* set = p.exchange + launch % 2 * p.set_bytes;
    x_sums = reinterpret_cast<unsigned long long*>(set);
    y = reinterpret_cast<float*>(set + int64_t{kCopies} * 8 * p.n_proj * 8);
    residual = y + int64_t{8} * p.d_inner;
    narrow_r = reinterpret_cast<unsigned long long*>(residual + int64_t{8} * p.d_model);
    narrow_x = narrow_r + kCopies * kNarrowModel;
    auto* other_set = reinterpret_cast<uint4*>(p.exchange + (launch + 1) % 2 * p.set_bytes);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
         i < p.set_bytes / 16; i += static_cast<int64_t>(gridDim.x) * kThreads) {
      other_set[i] = uint4{0, 0, 0, 0};
    }
  }
};

/// Logits of the own words, from v and the squares.
template <typename T, int B>
__device__ __forceinline__ void head(const Block<T, B>& b, Ring& ring) {
  const StepParams& p = b.p;
  const int tid = static_cast<int>(threadIdx.x);
  const int seq = tid % B;
  const int row = tid / B;
#pragma unroll 1
  for (int first = 0; first < b.words.n; first += 8 * p.in_rows) {
    const int here = min(8 * p.in_rows, b.words.n - first);
    float* shares = b.shares + (p.n_layer + first / (8 * p.in_rows)) % 2 * (kWarps * kWarpPitch<B>);
    multiply(b, ring, here, p.d_model, p.in_rows, shares);
    consumers_sync();
    if (row < here && (b.live >> seq & 1) != 0) {
      p.logits[seq * p.logits_stride + b.words.begin + first + row] =
          summed<B>(shares) * __fdividef(norm_scale(b, seq), b.scale[p.n_layer % 2 * B + seq]);
    }
  }
  // Everybody has read it, or could not have published what this block has waited for.
  if (blockIdx.x == 0 && tid == 0) *p.launches = b.launch + 1;
}

template <typename T, int B>
__device__ void consume(const Block<T, B>& b, Ring ring) {
  const StepParams& p = b.p;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / 32;
  const int D = p.d_model;
  const int E = p.d_inner;
  const int J = p.n_proj;
  const int n = b.channels.n;
  const Exchange x(p, b.launch);

  // The row of a product whose sum over the warps this thread takes.
  const int seq = tid % B;
  const int row = tid / B;
  const bool sums_up = row < kMaxChannels && (b.live >> seq & 1) != 0;
  // The warps that have a part in x and its product.
  const auto warps_of = [](int threads) { return min((threads + 31) / 32, kWarps); };
  const int x_warps = max(warps_of(max(n, 1) * B), warps_of(2 * J));
  float residual = 0.0F;  // of `row`
  if (sums_up && row < b.rows.n) residual = to_float(*embedding(b, seq, b.rows.begin + row));

  constexpr int kShares = kWarps * kWarpPitch<B>;
  if (tid < B) b.scale[tid] = 1.0F;
  consumers_sync();

  float squares[B];
#pragma unroll 1
  for (int l = 0; l < p.n_layer; ++l) {
    const StepLayer& w = b.layers[l];
    const float* scale = b.scale + l % 2 * B;
    const char* small = b.small + l % 2 * p.at.small_bytes;
    const auto parity = static_cast<unsigned>(l + 1) % 2;
    // A buffer is written again only after a barrier that follows its reading.
    float* const even = b.shares + l % 2 * kShares;
    float* const odd = b.shares + (l + 1) % 2 * kShares;

    // 1
    mbarrier_wait(b.small_full + 8 * (l % 2), static_cast<uint32_t>(l / 2) % 2);
    normalise(b, small, l, x.residual, squares);
    multiply(b, ring, n, D, p.in_rows, even);
    keep_squares(b, squares);
    const bool convolves = sums_up && row < n;
    Convolution<T> convolution{};
    if (convolves) convolution.load(b, small, row, seq);
    const float inverse = sums_up ? __fdividef(1.0F, scale[seq]) : 0.0F;
    consumers_sync();
    float s = 0.0F;
    if (convolves || (sums_up && row == 0)) {
      s = norm_scale(b, seq);
      if (convolves) {
        b.x[seq * kChannelPitch + permuted(row)] =
            convolution.result(summed<B>(even) * (s * inverse));
      }
    }
    if (warp < x_warps) warps_sync(x_warps);
    if (sums_up && row == 0) {
      b.left[seq] = s * inverse;
      b.scale[(l + 1) % 2 * B + seq] = s;
    }
    if (convolves) convolution.keep(b, w, row, seq);
    add_x_proj(b, ring, x.x_sums + blockIdx.x % kCopies * 8 * J);
    multiply(b, ring, n, D, p.in_rows, odd);

    // 2
    read_dbc(b, x.x_sums);
    if (n > 0) update_state(b, ring, w, small, odd, x.y, parity);
    warp_arrive(b.small_empty + 8 * (l % 2));

    // 3
    gather(b, x.y, E, parity, [&](int i, int d, float4 y) { store4(b, i, d, y); });
    multiply(b, ring, b.rows.n, E, p.out_rows, even);
    consumers_sync();
    if (sums_up && row < b.rows.n) {
      const int d = b.rows.begin + row;
      residual += summed<B>(even) + (w.out_bias != nullptr ? w.out_bias[d] : 0.0F);
      publish(x.residual + static_cast<int64_t>(seq) * D + d, residual, parity);
    }
  }

  const int last = p.n_layer;
  mbarrier_wait(b.small_full + 8 * (last % 2), static_cast<uint32_t>(last / 2) % 2);
  normalise(b, b.small + last % 2 * p.at.small_bytes, last, x.residual, squares);
  keep_squares(b, squares);
  head(b, ring);
}

/// The step of one sequence through a narrow model, kMostNarrow channels a block at most. Every
/// block keeps the whole residual, and out_proj is split by the own channels like x_proj, so a
/// layer has two exchanges instead of three. What can be had before an exchange ends is in
/// registers by then: weights, the convolution's parameters, the state. A warp has the columns
/// (warp + 16 i) * 32 .. + 31 of D, i < 2.
template <typename T>
class Narrow {
 public:
  __device__ Narrow(const Block<T, 1>& block, const Ring& start)
      : b(block), ring(start), exchange(block.p, block.launch) {}

  __device__ void step() {
    if (mine) {
      const auto e = *reinterpret_cast<const Two<T>*>(embedding(b, 0, d));
      residual[0] = to_float(e.a);
      residual[1] = to_float(e.b);
    }
    if (tid == 0) b.scale[0] = 1.0F;
    consumers_sync();
#pragma unroll 1
    for (int l = 0; l < b.p.n_layer; ++l) layer(l);

    const int last = b.p.n_layer;
    mbarrier_wait(b.small_full + 8 * (last % 2), static_cast<uint32_t>(last / 2) % 2);
    normalise(last);
    const float sum = warp_sum(square);
    if (lane == 0) b.squares[warp] = sum;
    head(b, ring);
  }

 private:
  static constexpr int kPitch = kWarpPitch<1>;
  static constexpr int kChunk = kWarps * 64;  // bytes from 32 columns of a warp to its next
  static constexpr int kDtAhead = 4;

  const Block<T, 1>& b;
  Ring ring;  // of a layer: x, x_proj, z, dt_proj and state, out_proj
  const Exchange exchange;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % 32;
  const int warp = tid / 32;
  const int group = lane / 4;
  const int quarter = lane % 4;
  const int D = b.p.d_model;
  const int J = b.p.n_proj;
  const int R = b.p.dt_rank;
  const int n = b.channels.n;
  // Two neighbours of the warp's columns, whose residual this lane keeps.
  const int chunk = warp + kWarps * (lane / 16);
  const bool mine = chunk * 32 < D;
  const int d = (mine ? chunk * 32 : 0) + lane % 16 * 2;
  T* const u_to = b.v + (d & ~31) + (d & 4) * 4 + (d & 2) * 4 + (d & 16) / 4 + (d & 8) / 4;
  const char* const u = reinterpret_cast<const char*>(b.v) + warp * 64 + quarter * 16;
  const int steps = (D / 32 - warp + kWarps - 1) / kWarps;
  // Where the lane finds its rows of a piece: of in_proj, and of transposed matrices.
  const int column = min(lane % 8 + lane / 16 * 8, n - 1);
  const int in_at = min(lane % 16, n - 1) * (2 * D + 16) + lane / 16 * 16 + warp * 64;
  const int out_at = column * (2 * D + 16) + lane / 8 % 2 * 16 + warp * 64;
  // The warps' shares of the own channels' x and z.
  float* const x_share = b.shares + warp * kPitch + group + 8 * (quarter & 1);
  float* const z_share = x_share + kWarps * kPitch;
  // What the lane adds to, and what it reads.
  const int out = warp * 32 + quarter * 8 + group;
  unsigned long long* const add_x = exchange.narrow_x + blockIdx.x % kCopies * kNarrowProj + out;
  unsigned long long* const add_r = exchange.narrow_r + blockIdx.x % kCopies * kNarrowModel + out;
  const unsigned long long* const read_x = exchange.narrow_x + tid;
  const unsigned long long* const read_r = exchange.narrow_r + d;
  // The first warps take x and its product, the last ones the update, where 8 lanes share a
  // channel, 2 states each.
  const int x_warps = (J + 31) / 32;
  const int first_updating = kWarps - max((n * kLanes + 31) / 32, 1);
  const int c = min((tid - first_updating * 32) / kLanes, n - 1);
  const bool updates = warp >= first_updating && (tid - first_updating * 32) / kLanes < n;
  const int sub = tid % kLanes;
  const int dt_ahead = min(R / (2 * kLanes), kDtAhead);

  float residual[2] = {};
  float square = 0.0F;
  unsigned long long seen_r[2] = {};
  unsigned long long seen_x = 0;
  unsigned added = 0;  // the clock when the last shares of the residual were

  /// What x and its product need besides u.
  struct BeforeX {
    uint32_t in[2][2][4] = {};
    uint32_t x_proj[2][4] = {};
    Convolution<T> convolution{};
    float inverse = 0.0F;
  };
  /// What the update needs besides dt_low, B and C.
  struct BeforeUpdate {
    float2 A{};
    float h[2] = {};
    float dt_bias = 0.0F;
    float z_bias = 0.0F;
    float skip = 0.0F;
    const T* dt_row = nullptr;
    Two<T> dt_weight[kDtAhead]{};
  };

  [[nodiscard]] __device__ __forceinline__ const char* small(int l) const {
    return b.small + l % 2 * b.p.at.small_bytes;
  }

  __device__ __forceinline__ void layer(int l) {
    const StepLayer& w = b.layers[l];
    BeforeX before;
    load(before, l);
    normalise(l);
    {
      const float sum = warp_sum(square);
      float acc[4] = {};
      times_u(before.in, acc);
      if (n > 0) ring.release(0);
      if (lane == 0) b.squares[warp] = sum;
      if (quarter < 2) *x_share = quarter == 0 ? acc[0] : acc[2];
    }
    meet<4, kThreads>(warp < x_warps);
    if (warp < x_warps) take_x(before, w, l);

    // Meanwhile z, and everything for what comes next.
    uint32_t out_proj[2][2][4] = {};
    BeforeUpdate state;
    if (n > 0) {
      uint32_t in[2][2][4] = {};
      load_in(in, ring.wait(2));
      float acc[4] = {};
      times_u(in, acc);
      if (quarter < 2) *z_share = quarter == 0 ? acc[0] : acc[2];
      ring.release(1);
      ring.release(2);
      const char* piece = ring.wait(4) + out_at;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= steps) break;
        load_transposed(out_proj[i][0], piece + i * kChunk);
        load_transposed(out_proj[i][1], piece + i * kChunk + 32);
      }
      if (warp >= first_updating) load(state, l);
    }
    if (warp < x_warps) {
      const bool wanted = tid < J;
      unsigned long long word = 0;
      do {
        if (wanted) word = poll_narrow(read_x);
      } while (__any_sync(0xffffffffU, wanted && !complete(word - seen_x)));
      if (wanted) b.dbc[tid] = total_of(word - seen_x);
      seen_x = word;
    }
    meet<3, kThreads>(warp >= first_updating);
    if (n > 0 && warp >= first_updating) update(state);
    consumers_sync();

    // The own channels' share of out_proj y.
    const uint2 y = *reinterpret_cast<const uint2*>(b.y + quarter * 4);
    float share[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float low[4] = {};
      float high[4] = {};
      multiply_add<T>(low, out_proj[i][0], y.x, y.y);
      multiply_add<T>(high, out_proj[i][1], y.x, y.y);
      share[i] = pick(low, high);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i >= steps) break;
      if (w.out_bias != nullptr && blockIdx.x == 0) share[i] += w.out_bias[out + i * kWarps * 32];
      add_share(add_r + i * kWarps * 32, share[i]);
    }
    added = static_cast<unsigned>(clock());
    if (updates) store(state, w);
    warp_arrive(b.small_empty + 8 * (l % 2));
    if (n > 0) {
      ring.release(3);
      ring.release(4);
      ring.advance(5);
    }
  }

  __device__ __forceinline__ void load_in(uint32_t (&w)[2][2][4], const char* piece) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i >= steps) break;
      load_matrices(w[i][0], piece + in_at + i * kChunk);
      load_matrices(w[i][1], piece + in_at + i * kChunk + 32);
    }
  }
  /// The own columns' part of in_proj u. Beyond D both are zero.
  __device__ __forceinline__ void times_u(const uint32_t (&w)[2][2][4], float (&acc)[4]) const {
    float other[4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(u + i * kChunk);
      multiply_add<T>(acc, w[i][0], v.x, v.y);
      multiply_add<T>(other, w[i][1], v.z, v.w);
    }
    acc[0] += other[0];
    acc[2] += other[2];
  }
  /// All columns of a product are the same: a lane keeps one value of two tiles of 16 rows.
  [[nodiscard]] __device__ __forceinline__ float pick(const float (&low)[4],
                                                      const float (&high)[4]) const {
    const float first = quarter % 2 == 0 ? low[0] : low[2];
    const float second = quarter % 2 == 0 ? high[0] : high[2];
    return quarter < 2 ? first : second;
  }

  __device__ __forceinline__ void load(BeforeX& before, int l) {
    if (n > 0) load_in(before.in, ring.wait(0));
    mbarrier_wait(b.small_full + 8 * (l % 2), static_cast<uint32_t>(l / 2) % 2);
    if (warp >= x_warps) return;
    if (n > 0) {
      const int pitch = 2 * b.p.proj_pitch;
      const char* row = ring.wait(1) + column * pitch;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (warp * 32 + i * 16 >= J) break;
        // Of a last tile with less than 16 columns, what lies beyond them is not used.
        load_transposed(before.x_proj[i],
                        row + min(warp * 64 + i * 32 + lane / 8 % 2 * 16, pitch - 16));
      }
    }
    if (lane < n) before.convolution.load(b, small(l), lane, 0);
    before.inverse = __fdividef(1.0F, b.scale[l % 2]);
  }

  /// u = residual times the norm's weights, and the squares of the residual, of the own columns.
  __device__ __forceinline__ void normalise(int l) {
    const float2 weight = *reinterpret_cast<const float2*>(
        reinterpret_cast<const float*>(small(l) + b.p.at.norm) + d);
    const float f = b.scale[l % 2];
    const float factor[2] = {weight.x * f, weight.y * f};
    if (l > 0) {
      wait_since(added, kFirstLook);
      unsigned long long word[2] = {};
      do {
        if (mine) poll_narrow(word, read_r);
      } while (__any_sync(
          0xffffffffU, mine && !(complete(word[0] - seen_r[0]) && complete(word[1] - seen_r[1]))));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        residual[i] += total_of(word[i] - seen_r[i]);
        seen_r[i] = word[i];
      }
    }
    if (mine) {
      *reinterpret_cast<uint32_t*>(u_to) =
          pack<T>(residual[0] * factor[0], residual[1] * factor[1]);
      square = fmaf(residual[0], residual[0], residual[1] * residual[1]);
    }
    __syncwarp();
  }

  /// x = silu(conv(in_proj u)) of the own channels, and their share of x_proj x.
  __device__ __forceinline__ void take_x(BeforeX& before, const StepLayer& w, int l) {
    const float* from = b.shares + lane % 16;
    float v[4] = {};
#pragma unroll
    for (int i = 0; i < kWarps; ++i) v[i % 4] += from[i * kPitch];
    const float s = norm_scale(b, 0);
    const float left = s * before.inverse;
    T x = before.convolution.result((v[0] + v[1] + (v[2] + v[3])) * left);
    if (lane >= n) x = T{};
    const unsigned bits = bits_of(x);
    unsigned e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      e[i] = __shfl_sync(0xffffffffU, bits, 2 * quarter + i % 2 + i / 2 * 8);
    }
    float low[4] = {};
    float high[4] = {};
    multiply_add<T>(low, before.x_proj[0], e[0] | e[1] << 16, e[2] | e[3] << 16);
    multiply_add<T>(high, before.x_proj[1], e[0] | e[1] << 16, e[2] | e[3] << 16);
    if (out < J) add_share(add_x, pick(low, high));
    if (warp != 0) return;
    if (lane < n) {
      b.x[lane] = x;
      before.convolution.keep(b, w, lane, 0);
    }
    if (lane == 0) {
      b.left[0] = left;
      b.scale[(l + 1) % 2] = s;
    }
  }

  __device__ __forceinline__ void load(BeforeUpdate& state, int l) {
    const float* record = reinterpret_cast<const float*>(small(l));
    const char* piece = ring.wait(3);
    state.dt_row = reinterpret_cast<const T*>(piece) + c * R + 2 * sub;
#pragma unroll
    for (int i = 0; i < kDtAhead; ++i) {
      if (i < dt_ahead) {
        state.dt_weight[i] = *reinterpret_cast<const Two<T>*>(state.dt_row + 2 * kLanes * i);
      }
    }
    state.A = *reinterpret_cast<const float2*>(record + kA * n + c * kState + 2 * sub);
    state.dt_bias = record[kDtBias * n + c];
    state.z_bias = record[kZBias * n + c];
    state.skip = record[kD * n + c];
    with_state_type(b.p.state_type, [&](auto type) {
      using S = decltype(type);
      const auto old = *reinterpret_cast<const Two<S>*>(
          reinterpret_cast<const S*>(piece + n * R * 2) + c * kState + 2 * sub);
      state.h[0] = to_float(old.a);
      state.h[1] = to_float(old.b);
    });
  }

  /// dt, the state and y.
  __device__ __forceinline__ void update(BeforeUpdate& state) {
    float dt = 0.0F;
#pragma unroll
    for (int i = 0; i < kDtAhead; ++i) {
      if (i < dt_ahead) {
        const float2 low = *reinterpret_cast<const float2*>(b.dbc + 2 * (kLanes * i + sub));
        dt = fmaf(to_float(state.dt_weight[i].b), low.y,
                  fmaf(to_float(state.dt_weight[i].a), low.x, dt));
      }
    }
#pragma unroll 1
    for (int r = 2 * kLanes * dt_ahead; r < R - 2 * sub; r += 2 * kLanes) {
      const auto two = *reinterpret_cast<const Two<T>*>(state.dt_row + r);
      const float2 low = *reinterpret_cast<const float2*>(b.dbc + 2 * sub + r);
      dt = fmaf(to_float(two.b), low.y, fmaf(to_float(two.a), low.x, dt));
    }
    const float* from = b.shares + (kWarps + 2 * sub) * kPitch + c;
    float z = from[0] + from[kPitch];
    static_assert(kWarps == 2 * kLanes);
    const float2 of_B = *reinterpret_cast<const float2*>(b.dbc + R + 2 * sub);
    const float2 of_C = *reinterpret_cast<const float2*>(b.dbc + R + kState + 2 * sub);
    const float x = to_float(b.x[c]);
#pragma unroll
    for (int i = kLanes / 2; i > 0; i /= 2) {
      dt += __shfl_xor_sync(0xffffffffU, dt, i);
      z += __shfl_xor_sync(0xffffffffU, z, i);
    }
    const float gate = silu(to_float(from_float<T>(fmaf(z, b.left[0], state.z_bias))));
    const float step = softplus(dt + state.dt_bias);
    const float dx = step * x;
    state.h[0] = fmaf(exp2_fast(step * (state.A.x * kLog2e)), state.h[0], dx * of_B.x);
    state.h[1] = fmaf(exp2_fast(step * (state.A.y * kLog2e)), state.h[1], dx * of_B.y);
    float y = fmaf(of_C.y, state.h[1], of_C.x * state.h[0]);
#pragma unroll
    for (int i = kLanes / 2; i > 0; i /= 2) y += __shfl_xor_sync(0xffffffffU, y, i);
    if (updates && sub == 0) b.y[permuted(c)] = from_float<T>(fmaf(state.skip, x, y) * gate);
  }
  __device__ __forceinline__ void store(const BeforeUpdate& state, const StepLayer& w) const {
    const int64_t at =
        (b.slot[0] * static_cast<int64_t>(b.p.d_inner) + b.channels.begin + c) * kState + 2 * sub;
    with_state_type(b.p.state_type, [&](auto type) {
      using S = decltype(type);
      *reinterpret_cast<Two<S>*>(static_cast<S*>(w.ssm_state) + at) = {from_float<S>(state.h[0]),
                                                                       from_float<S>(state.h[1])};
    });
  }
};

template <typename T, int B, bool kNarrow>
__global__ void __launch_bounds__(kThreads + 32, 1)
    mamba1_step_kernel(const __grid_constant__ StepParams p) {
  extern __shared__ __align__(128) char shared[];
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  Ring ring{shared + p.at.ring, shared_address(shared), shared_address(shared) + 8 * kRingPieces,
            reinterpret_cast<int*>(shared + p.at.held) + kRingPieces};
  const uint32_t small_full = shared_address(shared) + 16 * kRingPieces;
  // Asked for before the table, so that they are there with it.
  const unsigned launch = __ldcg(p.launches);
  int slots[B];
#pragma unroll
  for (int i = 0; i < B; ++i) slots[i] = i < p.n_seq ? p.slots[i] : -1;
  const int id = tid < p.n_seq ? p.ids[tid] : 0;
  const int oldest = tid < p.n_seq ? conv_row<kConv>(p.positions[tid]) : 0;
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(small_full + 8 * i, 1);
      mbarrier_init(small_full + 16 + 8 * i, kWarps * kWarpArrivals);
    }
    for (int i = 0; i < kRingPieces; ++i) {
      mbarrier_init(ring.full + 8 * i, 1);
      mbarrier_init(ring.empty + 8 * i, kWarps * kWarpArrivals);
    }
    mbarrier_init_done();
  }
  auto* table = reinterpret_cast<StepLayer*>(shared + p.at.table);
  const int words = p.n_layer * static_cast<int>(sizeof(StepLayer) / 8);
  for (int i = tid; i < words; i += kThreads + 32) {
    reinterpret_cast<uint64_t*>(table)[i] = reinterpret_cast<const uint64_t*>(p.layers)[i];
  }
  const auto clear = [&](int from, int bytes) {
    for (int i = tid; i < bytes / 4; i += kThreads + 32) {
      reinterpret_cast<unsigned*>(shared + from)[i] = 0;
    }
  };
  clear(p.at.v, B * p.at.v_pitch * 2);
  clear(p.at.x, B * kChannelPitch * 2);
  clear(p.at.y, B * kChannelPitch * 2);
  clear(p.at.seen, B * p.n_proj * 8);
  unsigned live = 0;
#pragma unroll
  for (int i = 0; i < B; ++i) live |= slots[i] >= 0 ? 1U << i : 0;
  if (live == 0) return;
#pragma unroll
  for (int i = 0; i < B; ++i) {
    if (tid == i) {
      reinterpret_cast<int*>(shared + p.at.slots)[i] = slots[i];
      reinterpret_cast<int*>(shared + p.at.slots)[B + i] = id;
      reinterpret_cast<int*>(shared + p.at.slots)[2 * B + i] = oldest;
    }
  }
  const Block<T, B> b{p,
                      Run(p.d_inner, block, blocks),
                      Run(p.d_model, block, blocks),
                      Run(p.vocab_rows, block, blocks),
                      table,
                      reinterpret_cast<T*>(shared + p.at.v),
                      reinterpret_cast<T*>(shared + p.at.x),
                      reinterpret_cast<T*>(shared + p.at.y),
                      reinterpret_cast<float*>(shared + p.at.dbc),
                      reinterpret_cast<unsigned long long*>(shared + p.at.seen),
                      reinterpret_cast<float*>(shared + p.at.squares),
                      reinterpret_cast<float*>(shared + p.at.scale),
                      reinterpret_cast<float*>(shared + p.at.scale) + 2 * B,
                      reinterpret_cast<float*>(shared + p.at.shares),
                      shared + p.at.small,
                      small_full,
                      small_full + 16,
                      reinterpret_cast<const int*>(shared + p.at.slots),
                      live,
                      launch};
  __syncthreads();
  if (tid / 32 == kWarps) {
    produce<T, B, kNarrow>(b, ring);
  } else if constexpr (kNarrow) {
    Narrow<T>(b, ring).step();
  } else {
    consume(b, ring);
  }
}

#else

template <typename T, int B, bool kNarrow>
__global__ void mamba1_step_kernel(const __grid_constant__ StepParams) {}

#endif

struct ChannelParams {
  const float *conv, *conv_bias, *in_bias, *dt_bias, *A, *D;
};

/// The parameters of the channels of each block, side by side.
__global__ void pack_kernel(float* to, int record, ChannelParams w, int d_inner) {
  const Run run(d_inner, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  float* mine = to + static_cast<int64_t>(blockIdx.x) * record;
  for (int c = static_cast<int>(threadIdx.x); c < run.n; c += static_cast<int>(blockDim.x)) {
    const int e = run.begin + c;
    for (int i = 0; i < kConv; ++i) mine[c * kConv + i] = w.conv[e * kConv + i];
    for (int i = 0; i < kState; ++i) mine[kA * run.n + c * kState + i] = w.A[e * kState + i];
    const auto put = [&](int at, const float* from, int i) {
      mine[at * run.n + c] = from != nullptr ? from[i] : 0.0F;
    };
    put(kConvBias, w.conv_bias, e);
    put(kXBias, w.in_bias, e);
    put(kZBias, w.in_bias, d_inner + e);
    put(kDtBias, w.dt_bias, e);
    put(kD, w.D, e);
  }
}

}  // namespace

/// Everything prepared for one model and the states of one pool.
struct Mamba1Stepper::Plan {
  std::vector<StepLayer> layers;  // what the device has, but for x_proj_t: the plan's identity
  std::vector<Buffer> memory;
  const StepLayer* device_layers = nullptr;
  const float* records = nullptr;
  char* exchange = nullptr;
  int64_t set_bytes = 0;
  unsigned* launches = nullptr;
};

namespace {

/// Places everything in shared memory; the ring takes what is left. False: too little is.
template <int B>
bool lay_out(StepParams& p, int blocks, bool narrow) {
  const int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Layout& at = p.at;
  int next = 2 * 8 * kRingPieces + 32;
  const auto place = [&](int bytes) {
    const int here = next;
    next += round_up(bytes, 16);
    return here;
  };
  at.held = place(2 * kRingPieces * 4);
  at.slots = place(3 * B * 4);
  at.table = place(p.n_layer * static_cast<int>(sizeof(StepLayer)));
  at.v_pitch = round_up(std::max({p.d_model, p.d_inner, narrow ? kNarrowModel : 0}), 64) + 32;
  at.v = place(B * at.v_pitch * 2);
  at.x = place(B * kChannelPitch * 2);
  at.y = place(B * kChannelPitch * 2);
  at.dbc = place(B * p.n_proj * 4);
  at.seen = place(B * p.n_proj * 8);
  at.squares = place(B * kWarps * 4);
  at.scale = place(3 * B * 4);
  at.shares = place(2 * kWarps * kWarpPitch<B> * 4);
  at.norm = round_up(p.record * 4, 128);
  at.windows = at.norm + round_up(p.d_model * 4, 128);
  at.small_bytes = at.windows + round_up(B * (kConv - 1) * 2 * p.window_pitch, 128);
  next = round_up(next, 128);
  at.small = place(2 * at.small_bytes);
  at.ring = round_up(next, 128);
  at.ring_bytes = (shared_limit - at.ring) / 128 * 128;
  const auto rows_of = [&](int n_columns) {
    int rows = 8;
    while (rows > 1 && rows * (2 * n_columns + 16) > kMostPiece) rows /= 2;
    return rows;
  };
  p.in_rows = rows_of(p.d_model);
  p.out_rows = rows_of(p.d_inner);
  const int most_rows = static_cast<int>(ceil_div(p.d_model, blocks));
  if (ceil_div(p.most_channels, p.in_rows) > 8 || ceil_div(most_rows, p.out_rows) > 8) return false;
  const int state = kState * (p.state_type == DType::f32 ? 4 : 2);
  const int piece = std::max({(narrow ? kMostNarrow : p.in_rows) * (2 * p.d_model + 16),
                              p.out_rows * (2 * p.d_inner + 16), p.most_channels * p.proj_pitch * 2,
                              p.most_channels * (p.dt_rank * 2 + B * state)});
  // With less than a layer in the ring, the other form is faster.
  const int64_t layer = int64_t{2} * p.most_channels * (2 * p.d_model + p.n_proj + p.dt_rank) +
                        int64_t{2} * most_rows * p.d_inner;
  return at.ring_bytes >= (narrow ? 5 : 2) * piece && at.ring_bytes >= layer;
}

/// f(std::integral_constant<int, B>) with the least B that takes n_seq sequences.
template <typename F>
bool with_batch(int n_seq, F&& f) {
  if (n_seq == 1) return f(std::integral_constant<int, 1>{});
  if (n_seq == 2) return f(std::integral_constant<int, 2>{});
  if (n_seq <= 4) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

bool supports(const Mamba1Weights& w, std::span<const std::vector<Tensor>> state,
              const Batch& batch) {
  const Mamba1Layer& l = w.layers.front();
  const int64_t D = l.norm.dim(0);
  const int64_t E = l.D.dim(0);
  const int64_t R = l.dt_proj.dim(1);
  const int64_t J = l.x_proj.dim(0);
  const DType T = l.in_proj.dtype;
  return batch.max_len == 1 && batch.n_seq <= 8 && (T == DType::bf16 || T == DType::f16) &&
         w.lm_head.dtype == T && l.A.dim(1) == kState && l.conv1d.dim(1) == kConv && D % 32 == 0 &&
         E % 32 == 0 && D <= 4096 && R % 8 == 0 && J % 8 == 0 && J <= 512 && aligned16(l.norm) &&
         aligned16(w.norm_f) && state.front()[0].dtype == T &&
         ceil_div(E, device_attribute(cudaDevAttrMultiProcessorCount)) <= kMaxChannels;
}

StepLayer pointers(const Mamba1Layer& w, const std::vector<Tensor>& state) {
  return {w.in_proj.data,
          nullptr,
          w.dt_proj.data,
          w.out_proj.data,
          nullptr,
          w.norm.as<float>(),
          w.out_proj_bias.as<float>(),
          state[0].data,
          state[1].data};
}

}  // namespace

Mamba1Stepper::Mamba1Stepper(Allocate allocate) : allocate_(allocate), wide_(std::move(allocate)) {}
Mamba1Stepper::~Mamba1Stepper() = default;

bool Mamba1Stepper::run(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
                        const Batch& batch, std::span<const std::vector<Tensor>> state,
                        cudaStream_t stream) {
  if (refused_ || !launches_together() || weights.layers.empty() ||
      !supports(weights, state, batch)) {
    return false;
  }
  if (batch.state_rounding() == Rounding::stochastic) return false;  // the verbs do that
  return launch(weights, logits, ids, batch, state, stream) ||
         (!refused_ && wide_.run(weights, logits, ids, batch, state, stream));
}

bool Mamba1Stepper::launch(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
                           const Batch& batch, std::span<const std::vector<Tensor>> state,
                           cudaStream_t stream) {
  const Mamba1Layer& l = weights.layers.front();
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  const auto n_layer = static_cast<int64_t>(weights.layers.size());
  const int64_t D = l.norm.dim(0);
  const int64_t E = l.D.dim(0);
  const int64_t J = l.x_proj.dim(0);
  StepParams p{};
  p.n_layer = static_cast<int>(n_layer);
  p.d_model = static_cast<int>(D);
  p.d_inner = static_cast<int>(E);
  p.mean = 1.0F / static_cast<float>(D);
  p.dt_rank = static_cast<int>(l.dt_proj.dim(1));
  p.n_proj = static_cast<int>(J);
  p.proj_pitch = static_cast<int>(J / 8 % 2 == 0 ? J + 8 : J);  // an odd number of 16 bytes
  p.most_channels = static_cast<int>(ceil_div(E, blocks));
  p.window_pitch = round_up(p.most_channels, 8) + 16;
  p.record = round_up(p.most_channels * kParams, 4);
  set_inputs(p, weights, logits, ids, batch, state);
  const bool narrow_model = D <= kNarrowModel && J <= kNarrowProj &&
                            p.most_channels <= kMostNarrow && p.mixer_eps == 0.0F;
  const bool narrow = narrow_model && p.n_seq == 1;
  if (blocks > kMostSummands || !with_batch(p.n_seq, [&](auto b) {
        return lay_out<decltype(b)::value>(p, blocks, narrow);
      })) {
    return false;
  }

  std::vector<StepLayer> layers;
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    layers.push_back(pointers(weights.layers[i], state[i]));
  }
  Plan* plan = find_plan(plans_, layers);
  if (plan == nullptr) {
    auto made = std::make_unique<Plan>();
    made->layers = layers;
    const PlanMemory memory{allocate_, stream, made->memory};
    const int64_t proj_bytes = E * p.proj_pitch * 2;
    auto* transposed = static_cast<char*>(memory.keep(n_layer * proj_bytes));
    auto* out_transposed =
        narrow_model ? static_cast<char*>(memory.keep(n_layer * E * D * 2)) : nullptr;
    auto* records = static_cast<float*>(memory.keep(n_layer * blocks * p.record * 4));
    for (size_t i = 0; i < layers.size(); ++i) {
      const Mamba1Layer& w = weights.layers[i];
      void* to = transposed + static_cast<int64_t>(i) * proj_bytes;
      transpose_kernel<<<static_cast<unsigned>(ceil_div(proj_bytes / 2, 256)), 256, 0, stream>>>(
          static_cast<uint16_t*>(to), w.x_proj.as<uint16_t>(), J, E, p.proj_pitch);
      KRAIT_CUDA(cudaGetLastError());
      layers[i].x_proj_t = to;
      if (narrow_model) {
        to = out_transposed + static_cast<int64_t>(i) * E * D * 2;
        transpose_kernel<<<static_cast<unsigned>(ceil_div(E * D, 256)), 256, 0, stream>>>(
            static_cast<uint16_t*>(to), w.out_proj.as<uint16_t>(), D, E, D);
        KRAIT_CUDA(cudaGetLastError());
        layers[i].out_proj_t = to;
      }
      pack_kernel<<<static_cast<unsigned>(blocks), kMaxChannels, 0, stream>>>(
          records + static_cast<int64_t>(i) * blocks * p.record, p.record,
          {w.conv1d.as<float>(), w.conv1d_bias.as<float>(), w.in_proj_bias.as<float>(),
           w.dt_bias.as<float>(), w.A.as<float>(), w.D.as<float>()},
          p.d_inner);
      KRAIT_CUDA(cudaGetLastError());
    }
    made->device_layers = memory.copy_of(layers);
    made->records = records;
    made->set_bytes = kCopies * 8 * J * 8 + 8 * E * 4 + 8 * D * 4 +
                      (narrow_model ? kCopies * (kNarrowModel + kNarrowProj) * 8 : 0);
    made->exchange = static_cast<char*>(memory.zeroed(2 * made->set_bytes));
    made->launches = static_cast<unsigned*>(memory.zeroed(sizeof(unsigned)));
    KRAIT_CUDA(cudaStreamSynchronize(stream));  // `layers` goes
    plans_.push_back(std::move(made));
    plan = plans_.back().get();
  }
  p.layers = plan->device_layers;
  p.records = plan->records;
  p.exchange = plan->exchange;
  p.set_bytes = plan->set_bytes;
  p.launches = plan->launches;
  const bool bf16 = l.in_proj.dtype == DType::bf16;
  return with_batch(p.n_seq, [&](auto b) {
    constexpr int B = decltype(b)::value;
    const int bytes = p.at.ring + p.at.ring_bytes;
    if constexpr (B == 1) {
      if (narrow) {
        return launch_together(bf16 ? &mamba1_step_kernel<__nv_bfloat16, 1, true>
                                    : &mamba1_step_kernel<__half, 1, true>,
                               blocks, kThreads + 32, bytes, p, refused_, stream);
      }
    }
    return launch_together(
        bf16 ? &mamba1_step_kernel<__nv_bfloat16, B, false> : &mamba1_step_kernel<__half, B, false>,
        blocks, kThreads + 32, bytes, p, refused_, stream);
  });
}

}  // namespace krait::cuda
