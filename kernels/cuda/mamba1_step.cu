// mamba1_step.cu - a decode step of a whole Mamba-1 model for up to 8 sequences, in one launch.
//
// At batch 1 a step reads every weight once and computes next to nothing: the floor is the time to
// stream the weights. Kernel by kernel the stream stops at each end of a kernel. Here it never
// does: one block per SM stays for the whole step, and its producer warp walks through all the
// weights that the block will ever need, layer by layer, copying them into a ring in shared memory
// as fast as the ring empties. What the other warps have to wait for - the other blocks, three
// times a layer - costs only latency, and the ring holds the weights of 5 to 9 microseconds.
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
// Exchanges. Nobody raises a flag: what is exchanged says itself whether it is there, so an
// exchange costs one way to L2 and one successful look. y and the residual are f32 whose last bit
// is the parity of the layer (y is rounded to the weights' type before, so it loses nothing, the
// residual half a unit in the last place; its owner keeps it whole). A sum is an integer: a share
// is its value in fixed point and a count of one in the top byte, added by a relaxed reduction;
// readers take the difference to the sum of the layer before, until the count is that of the
// blocks. Integer sums don't depend on their order, so a step gives the same bits each time. Four
// copies of a sum keep shares from queueing at one address.
//   Each place is written again one layer later, when everybody has read it: who writes y of layer
// l + 1 has all shares of its x_proj sum; a block adds its share after all its warps have seen the
// residual of layer l, which every block publishes after its own warps have read y of layer l. And
// so round the circle. Two sets of places take turns from step to step: a step zeroes the set of
// the next. All blocks are resident (cooperative launch), so every wait ends.
//
// Products: 8 rows of a weight against 8 columns, one per sequence, on the tensor cores
// (mma.m16n8k16, the weights in place of B). A warp has the columns (warp + 16 i) * 32 .. + 31 of
// every matrix, so what it gathers of the residual or y it needs alone: no block-wide barrier
// between an exchange and the product. The warps' shares are summed through shared memory; there
// are four block-wide barriers a layer. For less than 8 sequences the next rows' results take the
// columns that are left.
//
// Launch   cooperative, one block per SM: 16 consumer warps and the producer
// Needs    sm_90 (bulk copies), d_state 16, d_conv 4, sizes as in supports() and lay_out(); else
//          mamba1_step_wide.cu or the verbs
// Memory   besides the weights: x_proj transposed, and the channels' small parameters side by side,
//          100 bytes a channel and layer
// Errors   what is no number, and shares of a sum beyond 2^15, come out as NaN
// Bytes    the weights, and state read and written, once
// Measured H100 80GB HBM3, bf16, f32 state, tokens/s at batch 1, 2, 4, 8: 130m 4,240, 7,250,
// 12,880,
//          19,860; 370m 2,040 and 9,320 (1, 8); 1.4b 858 (1); 2.8b 456 (1), 430 with all of the
//          ring on its way. The wide form in the same run: 370m 2,750, 4,510, 6,950 (2, 4, 8); 1.4b
//          768, 2,540 (1, 4); 2.8b 420 (1). An exchange by itself takes 1.0 to 1.1 microseconds,
//          that of 80 or 192 sums 1.35 (bench_ops --primitives). Tried and dropped: out_proj split
//          along its columns too, which spares an exchange and adds d_model sums (1.6 to 3.9
//          microseconds); flags beside the data; parameters requested a layer ahead into registers
// Same as  the verbs, one by one, as Mamba1::forward calls them; tests/unit/mamba1_step_test.cpp
#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mamba1_step.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/persistent.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kWarps = 16;  // consumers
constexpr int kThreads = 32 * kWarps;
constexpr int kPieces = 32;           // of the ring on their way or in use at once
constexpr int kMostPiece = 66 << 10;  // bytes, of a matrix
// Bytes of a block on their way at once. With all of the ring some blocks get theirs long before
// others, and the slowest is whom all wait for.
constexpr int kMostFlying = 45 << 10;
constexpr int kState = 16;        // d_state
constexpr int kConv = 4;          // d_conv
constexpr int kLanes = 8;         // that share a channel in the state update
constexpr int kMaxChannels = 64;  // of a block
constexpr int kTiles = kMaxChannels / 16;
constexpr int kChannelPitch = kMaxChannels + 16;
constexpr int kCopies = 4;      // of a sum, each of a quarter of the blocks
constexpr int kHeadPieces = 8;  // of the vocabulary before a sum over the warps

/// A piece of a matrix is up to 8 rows, and its product with up to 8 sequences a part of an
/// accumulator: of kSide pieces one below the other.
template <int B>
constexpr int kSide = 8 / B;
template <int B>
constexpr int kGroups = kMaxChannels / 8 / kSide<B>;
constexpr int kWarpPitch = 64 + 2;  // of the warps' shares of a sum, in floats

// A share of a sum: 1 in the top byte, the count of shares, and below it the value in units of
// 2^-25 plus a bias that makes it positive. What lies beyond 2^15 or is no number adds so much that
// no sum of values reaches it, nor any number of such shares the count.
constexpr int kMaxBlocks = 180;
constexpr int kCountBit = 56;
constexpr unsigned long long kCountOne = 1ULL << kCountBit;
[[maybe_unused]] constexpr float kFixedOne = 33554432.0F;  // 2^25
[[maybe_unused]] constexpr float kFixedRange = 32768.0F;   // 2^15
constexpr unsigned long long kBias = 1ULL << 40;           // kFixedOne * kFixedRange
constexpr unsigned long long kNoNumber = kMaxBlocks * 2 * kBias + 1;
static_assert(kMaxBlocks * kNoNumber < kCountOne);

struct StepLayer {
  const void *in_proj, *x_proj_t, *dt_proj, *out_proj;  // x_proj_t [E, proj_pitch]: transposed
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
  int held, slots, table, v, v_pitch, x, dbc, seen, squares, scale, shares, small, small_bytes,
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
  const int32_t *ids, *slots;
  int n_seq;
  float* logits;
  int64_t logits_stride;
  // [2 sets][x_proj: u64 [kCopies][8][n_proj], y: f32 [8][d_inner], residual: f32 [8][d_model]]
  char* exchange;
  int64_t set_bytes;
  unsigned* launches;
  DType state_type;
  int in_rows, out_rows;  // of a piece: 8 or fewer
  int most_channels;
  int window_pitch;  // of what the convolution remembers, elements
  Layout at;
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// ---- sums over all blocks -----------------------------------------------------------------------

__device__ __forceinline__ unsigned long long share_of(float v) {
  const auto fixed = static_cast<unsigned long long>(__float2ll_rn(v * kFixedOne)) + kBias;
  return kCountOne + (fabsf(v) < kFixedRange ? fixed : kNoNumber);
}
__device__ __forceinline__ float total_of(unsigned long long word) {
  const unsigned long long sum = word & (kCountOne - 1);
  const auto value = static_cast<long long>(sum - gridDim.x * kBias);
  return sum >= kNoNumber ? __int_as_float(0x7fc00000)
                          : static_cast<float>(value) * (1.0F / kFixedOne);
}
__device__ __forceinline__ bool complete(unsigned long long word) {
  return static_cast<unsigned>(word >> kCountBit) == gridDim.x;
}
__device__ __forceinline__ void add_share(unsigned long long* to, float v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(share_of(v)) : "memory");
}
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

/// A barrier of the consumers alone.
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
// ---- the ring -----------------------------------------------------------------------------------

/// Pieces of any size one after the other in a circle of shared memory; a piece that would cross
/// the end starts at the beginning. The producer and every consumer warp walk through the same
/// sequence.
struct Ring {
  char* base;
  uint32_t full, empty;  // shared addresses of [kPieces] barriers each
  int capacity;
  int at = 0;
  int piece = 0;  // of kPieces
  uint32_t parity = 0;

  /// Where a piece of so many bytes lies.
  __device__ int place(int bytes) const { return at + bytes <= capacity ? at : 0; }
  __device__ void advance(int place, int bytes) {
    at = place + bytes;
    if (++piece == kPieces) {
      piece = 0;
      parity ^= 1;
    }
  }
  __device__ const char* wait(int bytes) const {
    mbarrier_wait(full + 8 * piece, parity);
    return base + place(bytes);
  }
  /// Every warp must release every piece.
  __device__ void release(int bytes) {
    __syncwarp();
    if (warp_arrives()) mbarrier_arrive(empty + 8 * piece);
    advance(place(bytes), bytes);
  }
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
  T* x;                      // [B][kChannelPitch] permuted
  float* dbc;                // [B][n_proj]
  unsigned long long* seen;  // [B][n_proj]
  float* squares;            // [B][kWarps]
  float* scale;              // [2][B] of the norms of this layer's predecessor and its own, in turn
  float* left;               // [B] what products with v are still to be multiplied by
  float* shares;             // [2][groups][kWarps][kWarpPitch]
  const char* small;         // [2][small_bytes]: record, norm, windows of two layers in turn
  uint32_t small_full, small_empty;
  const int* slot;
  unsigned live;  // bit n: there is a sequence n
};

/// Place of element e among 16: what a lane needs of a column of B lies together.
__device__ __forceinline__ int permuted(int e) {
  return (e & ~15) + (e & 7) / 2 * 4 + (e & 8) / 4 + (e & 1);
}

/// Fills the ring, in the order in which the consumers walk through it. A warp.
struct Producer {
  Ring ring;
  uint64_t policy;
  int* held;     // [kPieces]
  int used = 0;  // bytes of the ring
  int oldest = 0;
  int n_held = 0;
  uint32_t oldest_parity = 0;
  int flying = 0;  // bytes on their way
  int n_flying = 0;
  int next_to_land = 0;
  uint32_t next_parity = 0;

  /// Makes room; announces the bytes that will come.
  __device__ uint32_t begin(int bytes, int expected) {
    const int to = ring.place(bytes);
    const int need = bytes + (to == ring.at ? 0 : ring.capacity - ring.at);
    while (used + need > ring.capacity || n_held == kPieces) {
      mbarrier_wait(ring.empty + 8 * oldest, oldest_parity);
      used -= held[oldest];
      --n_held;
      if (++oldest == kPieces) {
        oldest = 0;
        oldest_parity ^= 1;
      }
    }
    while (n_flying == kPieces || (n_flying > 0 && flying + need > kMostFlying)) {
      mbarrier_wait(ring.full + 8 * next_to_land, next_parity);
      flying -= held[next_to_land];
      --n_flying;
      if (++next_to_land == kPieces) {
        next_to_land = 0;
        next_parity ^= 1;
      }
    }
    flying += need;
    ++n_flying;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      held[ring.piece] = need;
      mbarrier_expect(ring.full + 8 * ring.piece, expected);
    }
    __syncwarp();
    used += need;
    ++n_held;
    return shared_address(ring.base + to);
  }
  __device__ void copy(uint32_t to, const void* from, int bytes) const {
    bulk_copy(to, from, bytes, ring.full + 8 * ring.piece, policy);
  }
  __device__ void end(int bytes) { ring.advance(ring.place(bytes), bytes); }

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
      end(bytes);
    }
  }
};

template <typename T, int B>
__device__ void produce(const Block<T, B>& b, Ring ring) {
  const StepParams& p = b.p;
  Producer out{ring, evict_first_policy(),
               reinterpret_cast<int*>(ring.base - p.at.ring + p.at.held)};
  const int64_t D = p.d_model;
  const int64_t E = p.d_inner;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int n = b.channels.n;
  const int64_t first = b.channels.begin;
  const int state_row = kState * (p.state_type == DType::f32 ? 4 : 2);
  const int slot = lane < B ? b.slot[lane] : -1;
  const auto at = [](const void* base, int64_t element) {
    return static_cast<const char*>(base) + element * static_cast<int64_t>(sizeof(T));
  };
  // A run of 16-bit values with the 16-byte lines it lies in.
  const int skew = static_cast<int>(first * 2 % 16);
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
        bulk_copy(
            small + p.at.windows + (lane * (kConv - 1) + j) * 2 * p.window_pitch,
            at(b.layers[l].conv_state, (static_cast<int64_t>(slot) * (kConv - 1) + j) * E + first) -
                skew,
            line_bytes, full, out.policy);
      }
    }
    if (!layer) break;
    const StepLayer& w = b.layers[l];
    if (n > 0) {
      out.rows(at(w.in_proj, first * D), n, p.d_model, p.in_rows);
      const int x_bytes = n * p.proj_pitch * 2;
      uint32_t to = out.begin(x_bytes, x_bytes);
      if (lane == 0) out.copy(to, at(w.x_proj_t, first * p.proj_pitch), x_bytes);
      out.end(x_bytes);
      out.rows(at(w.in_proj, (E + first) * D), n, p.d_model, p.in_rows);
      const int dt_bytes = n * p.dt_rank * 2;
      const int bytes = dt_bytes + B * n * state_row;
      to = out.begin(bytes, dt_bytes + __popc(b.live) * n * state_row);
      if (lane == 0) out.copy(to, at(w.dt_proj, first * p.dt_rank), dt_bytes);
      if (slot >= 0) {
        out.copy(to + dt_bytes + lane * n * state_row,
                 static_cast<const char*>(w.ssm_state) + (slot * E + first) * state_row,
                 n * state_row);
      }
      out.end(bytes);
    }
    if (b.rows.n > 0) {
      out.rows(at(w.out_proj, b.rows.begin * E), b.rows.n, p.d_inner, p.out_rows);
    }
  }
  const int head_rows = kHeadPieces * p.in_rows;
#pragma unroll 1
  for (int row = 0; row < b.words.n; row += head_rows) {
    out.rows(at(p.head, (b.words.begin + row) * D), min(head_rows, b.words.n - row), p.d_model,
             p.in_rows);
  }
}

// ---- the consumers ------------------------------------------------------------------------------

/// acc = n rows of the matrix in the ring times v, the own columns of the warp: of piece u, row
/// 2 quarter + i of sequence g % B in acc[u / kSide][i] of the lanes with g / B = u % kSide.
template <typename T, int B>
__device__ __forceinline__ void product(const Block<T, B>& b, Ring& ring, int n, int n_columns,
                                        int at_once, float (&acc)[kGroups<B>][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4;
  const int pitch = 2 * n_columns + 16;
  const int steps = (n_columns / 32 - warp + kWarps - 1) / kWarps;
  // 32 columns at a time, from a column of 32 * warp.
  const char* v =
      reinterpret_cast<const char*>(b.v + group % B * b.p.at.v_pitch) + warp * 64 + lane % 4 * 16;
#pragma unroll
  for (int g = 0; g < kGroups<B>; ++g) {
#pragma unroll 1
    for (int side = 0; side < kSide<B>; ++side) {
      const int here = min(at_once, n - (g * kSide<B> + side) * at_once);
      if (here <= 0) break;
      const int bytes = here * pitch;
      const char* a =
          ring.wait(bytes) + min(lane % 8, here - 1) * pitch + lane / 8 * 16 + warp * 64;
      const bool mine = B == 8 || group / B == side;
#pragma unroll 4
      for (int i = 0; i < steps; ++i) {
        uint4 x{0, 0, 0, 0};
        if (mine) x = *reinterpret_cast<const uint4*>(v + i * (kWarps * 64));
        uint32_t w[4];
        load_matrices(w, a + i * (kWarps * 64));
        multiply_add<T>(acc[g], {x.x, 0, x.y, 0}, w[0], w[1]);
        multiply_add<T>(acc[g], {x.z, 0, x.w, 0}, w[2], w[3]);
      }
      ring.release(bytes);
    }
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
  const int bytes = n * pitch;
  const char* piece = n > 0 ? ring.wait(bytes) : nullptr;
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
      multiply_add<T>(acc, a, group < B ? column.x : 0, group < B ? column.y : 0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int seq = 2 * quarter + i % 2;
      const int out = t * 16 + group + i / 2 * 8;
      if (seq < B && out < J && (b.live >> seq & 1) != 0) add_share(sums + seq * J + out, acc[i]);
    }
  }
  if (n > 0) ring.release(bytes);
}

/// A value that everybody waits for: its last bit says which of two uses of the place it is from.
__device__ __forceinline__ void publish(float* to, float v, unsigned parity) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to),
               "r"((__float_as_uint(v) & ~1U) | parity)
               : "memory");
}

/// What is wanted of four places. One statement: else the compiler looks at each word before it
/// asks for the next.
__device__ __forceinline__ void load4(uint4 (&v)[4], const float* at, int64_t stride,
                                      const bool (&wanted)[4]) {
  asm volatile(
      "{\n"
      ".reg .pred p0, p1, p2, p3;\n"
      "setp.ne.u32 p0, %20, 0;\n"
      "setp.ne.u32 p1, %21, 0;\n"
      "setp.ne.u32 p2, %22, 0;\n"
      "setp.ne.u32 p3, %23, 0;\n"
      "@p0 ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%16];\n"
      "@p1 ld.relaxed.gpu.global.v4.u32 {%4, %5, %6, %7}, [%17];\n"
      "@p2 ld.relaxed.gpu.global.v4.u32 {%8, %9, %10, %11}, [%18];\n"
      "@p3 ld.relaxed.gpu.global.v4.u32 {%12, %13, %14, %15}, [%19];\n"
      "}\n"
      : "+r"(v[0].x), "+r"(v[0].y), "+r"(v[0].z), "+r"(v[0].w), "+r"(v[1].x), "+r"(v[1].y),
        "+r"(v[1].z), "+r"(v[1].w), "+r"(v[2].x), "+r"(v[2].y), "+r"(v[2].z), "+r"(v[2].w),
        "+r"(v[3].x), "+r"(v[3].y), "+r"(v[3].z), "+r"(v[3].w)
      : "l"(at), "l"(at + stride), "l"(at + 2 * stride), "l"(at + 3 * stride),
        "r"(static_cast<unsigned>(wanted[0])), "r"(static_cast<unsigned>(wanted[1])),
        "r"(static_cast<unsigned>(wanted[2])), "r"(static_cast<unsigned>(wanted[3]))
      : "memory");
}

/// use(seq, d, values) for the own columns of a warp, four at a time, of all sequences, as soon as
/// they are published. Four loads are on their way: of several rounds of 4 * kWarps * 32 columns
/// for one sequence, else of several sequences.
template <typename T, int B, typename Use>
__device__ __forceinline__ void gather(const Block<T, B>& b, const float* from, int length,
                                       unsigned parity, Use use) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  constexpr int kStride = 4 * kWarps * 32;
  const int first_column = (warp + kWarps * (lane / 8)) * 32 + lane % 8 * 4;
  const auto values = [](const uint4& v) {
    return float4{__uint_as_float(v.x & ~1U), __uint_as_float(v.y & ~1U),
                  __uint_as_float(v.z & ~1U), __uint_as_float(v.w & ~1U)};
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
  return static_cast<const T*>(b.p.embedding) + static_cast<int64_t>(b.p.ids[seq]) * b.p.d_model +
         d;
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
                                          const float* all_r) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int D = b.p.d_model;
  const float* weights = reinterpret_cast<const float*>(small + b.p.at.norm);
  const float* scale = b.scale + l % 2 * B;
  float squares[B] = {};
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
#pragma unroll
  for (int s = 0; s < B; ++s) {
    const float sum = warp_sum(squares[s]);
    if (lane == 0) b.squares[s * kWarps + warp] = sum;
  }
  __syncwarp();
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
  return rsqrtf(sum / static_cast<float>(b.p.d_model) + b.p.eps);
}

/// The warp's part of n rows of the matrix in the ring times v goes to its place among the shares:
/// value i of lane j to place 2 j + i, which thread 2 j + i sums up.
template <typename T, int B>
__device__ __forceinline__ void multiply(const Block<T, B>& b, Ring& ring, int n, int n_columns,
                                         int at_once, float* shares) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  float acc[kGroups<B>][4] = {};
  product(b, ring, n, n_columns, at_once, acc);
#pragma unroll
  for (int g = 0; g < kGroups<B>; ++g) {
    if (g * kSide<B> * at_once >= n) break;
    *reinterpret_cast<float2*>(shares + (g * kWarps + warp) * kWarpPitch + lane * 2) =
        float2{acc[g][0], acc[g][1]};
  }
}
__device__ __forceinline__ float summed(const float* shares) {
  const int tid = static_cast<int>(threadIdx.x);
  const float* from = shares + tid / 64 * kWarps * kWarpPitch + tid % 64;
  float v[4] = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v[i % 4] += from[i * kWarpPitch];
  return v[0] + v[1] + (v[2] + v[3]);
}

/// x = silu(conv(v)) of a channel and a sequence; what the convolution remembers moves on.
template <typename T, int B>
__device__ __forceinline__ void convolve(const Block<T, B>& b, const StepLayer& w,
                                         const char* small, int channel, int seq, float v) {
  const StepParams& p = b.p;
  const int n = b.channels.n;
  const float* record = reinterpret_cast<const float*>(small);
  const T* past = reinterpret_cast<const T*>(small + p.at.windows) +
                  seq * (kConv - 1) * p.window_pitch + b.channels.begin % 8 + channel;
  const float4 weight = *reinterpret_cast<const float4*>(record + channel * kConv);
  const T past1 = past[p.window_pitch];
  const T past2 = past[2 * p.window_pitch];
  const T now = from_float<T>(v + record[kXBias * n + channel]);
  float s = fmaf(weight.x, to_float(past[0]), record[kConvBias * n + channel]);
  s = fmaf(weight.y, to_float(past1), s);
  s = fmaf(weight.z, to_float(past2), s);
  s = fmaf(weight.w, to_float(now), s);
  b.x[seq * kChannelPitch + permuted(channel)] = from_float<T>(silu(s));
  T* state = static_cast<T*>(w.conv_state) +
             static_cast<int64_t>(b.slot[seq]) * (kConv - 1) * p.d_inner + b.channels.begin +
             channel;
  state[0] = past1;
  state[p.d_inner] = past2;
  state[2 * p.d_inner] = now;
}

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
  const int bytes = n * R * 2 + B * state_bytes;
  const char* piece = ring.wait(bytes);
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
    const int m = channel / p.in_rows * B + seq;
    const float* from =
        z_shares + (m / 8 * kWarps + 2 * lane) * kWarpPitch + m % 8 * 8 + channel % p.in_rows;
    static_assert(kWarps == 2 * kLanes);
    float z = from[0] + from[kWarpPitch];
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
      const auto update = [&](auto s) {
        using S = decltype(s);
        const auto old = *reinterpret_cast<const Two<S>*>(
            reinterpret_cast<const S*>(piece + n * R * 2 + seq * state_bytes) + in);
        const float h0 = fmaf(decay[0], to_float(old.a), dx * of_B.x);
        const float h1 = fmaf(decay[1], to_float(old.b), dx * of_B.y);
        *reinterpret_cast<Two<S>*>(static_cast<S*>(w.ssm_state) + to) = {from_float<S>(h0),
                                                                         from_float<S>(h1)};
        y = fmaf(of_C.y, h1, of_C.x * h0);
      };
      if (p.state_type == DType::f32) {
        update(float{});
      } else if (p.state_type == DType::bf16) {
        update(__nv_bfloat16{});
      } else {
        update(__half{});
      }
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
  ring.release(bytes);
}

template <typename T, int B>
__device__ void consume(const Block<T, B>& b, Ring ring) {
  const StepParams& p = b.p;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % 32;
  const int warp = tid / 32;
  const int D = p.d_model;
  const int E = p.d_inner;
  const int J = p.n_proj;
  const int n = b.channels.n;
  const unsigned launch = __ldcg(p.launches);
  char* set = p.exchange + launch % 2 * p.set_bytes;
  auto* x_sums = reinterpret_cast<unsigned long long*>(set);
  auto* all_y = reinterpret_cast<float*>(set + int64_t{kCopies} * 8 * J * 8);
  float* all_r = all_y + int64_t{8} * E;
  auto* other_set = reinterpret_cast<uint4*>(p.exchange + (launch + 1) % 2 * p.set_bytes);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + tid; i < p.set_bytes / 16;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    other_set[i] = uint4{0, 0, 0, 0};
  }

  // The row of a product whose sum over the warps this thread takes.
  const int seq = tid / 8 % B;
  const bool sums_up = tid < 64 * kGroups<B> && (b.live >> seq & 1) != 0;
  const auto row_of = [&](int at_once) {
    return tid % 8 < at_once ? tid / 8 / B * at_once + tid % 8 : 1 << 20;
  };
  const int channel = row_of(p.in_rows);
  const int row = row_of(p.out_rows);
  float residual = 0.0F;  // of `row`
  if (sums_up && row < b.rows.n) residual = to_float(*embedding(b, seq, b.rows.begin + row));

  constexpr int kShares = kGroups<B> * kWarps * kWarpPitch;
  if (tid < B) b.scale[tid] = 1.0F;
  consumers_sync();

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
    normalise(b, small, l, all_r);
    multiply(b, ring, n, D, p.in_rows, even);
    consumers_sync();
    if (warp == kWarps - 1 && lane < B) {
      const float s = norm_scale(b, lane);
      b.left[lane] = __fdividef(s, scale[lane]);
      b.scale[(l + 1) % 2 * B + lane] = s;
    }
    if (sums_up && channel < n) {
      convolve(b, w, small, channel, seq,
               summed(even) * __fdividef(norm_scale(b, seq), scale[seq]));
    }
    consumers_sync();
    add_x_proj(b, ring, x_sums + blockIdx.x % kCopies * 8 * J);
    multiply(b, ring, n, D, p.in_rows, odd);

    // 2
    read_dbc(b, x_sums);
    if (n > 0) update_state(b, ring, w, small, odd, all_y, parity);
    __syncwarp();
    if (warp_arrives()) mbarrier_arrive(b.small_empty + 8 * (l % 2));

    // 3
    gather(b, all_y, E, parity, [&](int s, int d, float4 y) { store4(b, s, d, y); });
    multiply(b, ring, b.rows.n, E, p.out_rows, even);
    consumers_sync();
    if (sums_up && row < b.rows.n) {
      const int d = b.rows.begin + row;
      residual += summed(even) + (w.out_bias != nullptr ? w.out_bias[d] : 0.0F);
      publish(all_r + static_cast<int64_t>(seq) * D + d, residual, parity);
    }
  }

  const int last = p.n_layer;
  const int head_rows = kHeadPieces * p.in_rows;
  mbarrier_wait(b.small_full + 8 * (last % 2), static_cast<uint32_t>(last / 2) % 2);
  normalise(b, b.small + last % 2 * p.at.small_bytes, last, all_r);
#pragma unroll 1
  for (int first = 0; first < b.words.n; first += head_rows) {
    const int here = min(head_rows, b.words.n - first);
    float* shares = b.shares + (last + first / head_rows) % 2 * kShares;
    multiply(b, ring, here, D, p.in_rows, shares);
    consumers_sync();
    if (sums_up && channel < here) {
      p.logits[seq * p.logits_stride + b.words.begin + first + channel] =
          summed(shares) * __fdividef(norm_scale(b, seq), b.scale[last % 2 * B + seq]);
    }
  }
  // Everybody has read it, or could not have published what this block has waited for.
  if (blockIdx.x == 0 && tid == 0) *p.launches = launch + 1;
}

template <typename T, int B>
__global__ void __launch_bounds__(kThreads + 32, 1)
    mamba1_step_kernel(const __grid_constant__ StepParams p) {
  extern __shared__ __align__(128) char shared[];
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  Ring ring{shared + p.at.ring, shared_address(shared), shared_address(shared) + 8 * kPieces,
            p.at.ring_bytes};
  const uint32_t small_full = shared_address(shared) + 16 * kPieces;
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(small_full + 8 * i, 1);
      mbarrier_init(small_full + 16 + 8 * i, kWarps * kWarpArrivals);
    }
    for (int i = 0; i < kPieces; ++i) {
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
  clear(p.at.x, B * kChannelPitch * 2);
  clear(p.at.seen, B * p.n_proj * 8);
  unsigned live = 0;
  for (int i = 0; i < B; ++i) {
    if (i < p.n_seq && p.slots[i] >= 0) live |= 1U << i;
  }
  if (tid < B) reinterpret_cast<int*>(shared + p.at.slots)[tid] = tid < p.n_seq ? p.slots[tid] : -1;
  const Block<T, B> b{p,
                      Run(p.d_inner, block, blocks),
                      Run(p.d_model, block, blocks),
                      Run(p.vocab_rows, block, blocks),
                      table,
                      reinterpret_cast<T*>(shared + p.at.v),
                      reinterpret_cast<T*>(shared + p.at.x),
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
                      live};
  __syncthreads();
  if (tid / 32 == kWarps) {
    produce(b, ring);
  } else {
    consume(b, ring);
  }
}

#else

template <typename T, int B>
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
bool lay_out(StepParams& p, int blocks) {
  const int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Layout& at = p.at;
  int next = 2 * 8 * kPieces + 32;
  const auto place = [&](int bytes) {
    const int here = next;
    next += round_up(bytes, 16);
    return here;
  };
  at.held = place(kPieces * 4);
  at.slots = place(B * 4);
  at.table = place(p.n_layer * static_cast<int>(sizeof(StepLayer)));
  at.v_pitch = round_up(std::max(p.d_model, p.d_inner), 64) + 32;
  at.v = place(B * at.v_pitch * 2);
  at.x = place(B * kChannelPitch * 2);
  at.dbc = place(B * p.n_proj * 4);
  at.seen = place(B * p.n_proj * 8);
  at.squares = place(B * kWarps * 4);
  at.scale = place(3 * B * 4);
  at.shares = place(2 * kGroups<B> * kWarps * kWarpPitch * 4);
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
  if (ceil_div(p.most_channels, p.in_rows) > kMaxChannels / 8 ||
      ceil_div(most_rows, p.out_rows) > kMaxChannels / 8) {
    return false;
  }
  const int state = kState * (p.state_type == DType::f32 ? 4 : 2);
  const int piece =
      std::max({p.in_rows * (2 * p.d_model + 16), p.out_rows * (2 * p.d_inner + 16),
                p.most_channels * p.proj_pitch * 2, p.most_channels * (p.dt_rank * 2 + B * state)});
  // With less than a fifth of a layer in the ring, the other form was faster.
  const int64_t layer = int64_t{2} * p.most_channels * (2 * p.d_model + p.n_proj + p.dt_rank) +
                        int64_t{2} * most_rows * p.d_inner;
  return at.ring_bytes >= 2 * piece && 5 * at.ring_bytes >= layer;
}

/// f(std::integral_constant<int, B>) with the least B that takes n_seq sequences.
template <typename F>
bool with_batch(int n_seq, F&& f) {
  if (n_seq == 1) return f(std::integral_constant<int, 1>{});
  if (n_seq == 2) return f(std::integral_constant<int, 2>{});
  if (n_seq <= 4) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

bool runs_here() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
         device_attribute(cudaDevAttrCooperativeLaunch) != 0;
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
  return {w.in_proj.data,     nullptr,
          w.dt_proj.data,     w.out_proj.data,
          w.norm.as<float>(), w.out_proj_bias.as<float>(),
          state[0].data,      state[1].data};
}

}  // namespace

Mamba1Stepper::Mamba1Stepper(Allocate allocate) : allocate_(allocate), wide_(std::move(allocate)) {}
Mamba1Stepper::~Mamba1Stepper() = default;

bool Mamba1Stepper::run(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
                        const Batch& batch, std::span<const std::vector<Tensor>> state,
                        cudaStream_t stream) {
  if (refused_ || !runs_here() || weights.layers.empty() || !supports(weights, state, batch)) {
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
  p.dt_rank = static_cast<int>(l.dt_proj.dim(1));
  p.n_proj = static_cast<int>(J);
  p.proj_pitch = static_cast<int>(J / 8 % 2 == 0 ? J + 8 : J);  // an odd number of 16 bytes
  p.most_channels = static_cast<int>(ceil_div(E, blocks));
  p.window_pitch = round_up(p.most_channels, 8) + 16;
  p.record = round_up(p.most_channels * kParams, 4);
  set_inputs(p, weights, logits, ids, batch, state);
  if (blocks > kMaxBlocks ||
      !with_batch(p.n_seq, [&](auto b) { return lay_out<decltype(b)::value>(p, blocks); })) {
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
    const auto keep = [&](int64_t bytes) {
      made->memory.push_back(allocate_(static_cast<size_t>(bytes), "decode step"));
      return made->memory.back().data();
    };
    const auto zeroed = [&](int64_t bytes) {
      void* at = keep(bytes);
      KRAIT_CUDA(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream));
      return at;
    };
    const int64_t proj_bytes = E * p.proj_pitch * 2;
    auto* transposed = static_cast<char*>(keep(n_layer * proj_bytes));
    auto* records = static_cast<float*>(keep(n_layer * blocks * p.record * 4));
    for (size_t i = 0; i < layers.size(); ++i) {
      const Mamba1Layer& w = weights.layers[i];
      void* to = transposed + static_cast<int64_t>(i) * proj_bytes;
      transpose_kernel<<<static_cast<unsigned>(ceil_div(proj_bytes / 2, 256)), 256, 0, stream>>>(
          static_cast<uint16_t*>(to), w.x_proj.as<uint16_t>(), J, E, p.proj_pitch);
      KRAIT_CUDA(cudaGetLastError());
      layers[i].x_proj_t = to;
      pack_kernel<<<static_cast<unsigned>(blocks), kMaxChannels, 0, stream>>>(
          records + static_cast<int64_t>(i) * blocks * p.record, p.record,
          {w.conv1d.as<float>(), w.conv1d_bias.as<float>(), w.in_proj_bias.as<float>(),
           w.dt_bias.as<float>(), w.A.as<float>(), w.D.as<float>()},
          p.d_inner);
      KRAIT_CUDA(cudaGetLastError());
    }
    const size_t table = layers.size() * sizeof(StepLayer);
    auto* device_layers = static_cast<StepLayer*>(keep(static_cast<int64_t>(table)));
    KRAIT_CUDA(
        cudaMemcpyAsync(device_layers, layers.data(), table, cudaMemcpyHostToDevice, stream));
    made->device_layers = device_layers;
    made->records = records;
    made->set_bytes = kCopies * 8 * J * 8 + 8 * E * 4 + 8 * D * 4;
    made->exchange = static_cast<char*>(zeroed(2 * made->set_bytes));
    made->launches = static_cast<unsigned*>(zeroed(sizeof(unsigned)));
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
    return launch_together(
        bf16 ? &mamba1_step_kernel<__nv_bfloat16, B> : &mamba1_step_kernel<__half, B>, blocks,
        kThreads + 32, p.at.ring + p.at.ring_bytes, p, refused_, stream);
  });
}

}  // namespace krait::cuda
