// mamba2_persistent.cu - a decode step of a whole Mamba-2 model for up to four sequences, in one
// launch.
//
// As in mamba1_step.cu one block per SM stays for the whole step. Its producer warp walks through
// all the weights that the block will ever need, layer by layer, copying them into a ring in shared
// memory as fast as the ring empties, so that the stream of weights goes on while the other warps
// wait for the other blocks.
//
// A block owns a run of channels (their rows of in_proj for x and z, convolution, state), a run of
// the rows of in_proj for B, C and dt, a run of the rows of out_proj, and one of the vocabulary.
// Per layer:
//
//   1. B, C and dt of the own rows: in_proj norm(residual), convolution, softplus      | B, C, dt
//   2. x of the own channels, while those are on their way; state update; z; v = y * silu(z)   | v
//   3. residual += out_proj norm(v), of the own rows                                   | residual
//
// and in the end logits = lm_head norm_f(residual). So two of the three exchanges are waited for.
//
// Exchanges. What is exchanged says itself whether it is there: a f32 whose last bit is the parity
// of the layer. What goes into a norm is multiplied by the norm's weights by its owner, and each
// block publishes the sum of the squares of its own part a little later, of v for each group of
// channels by itself. A warp, the scout, awaits the squares while the others await what they are
// of; a block multiplies by the scale when the product is done. (With several groups, each of which
// has its own, or f16, which could overflow, before it.) Looks that come too soon hold up what they
// look for: the scout's first is late, too.
//   Each place is written again one layer later, when everybody has read it: who publishes its part
// of v has seen the squares of the residual from all blocks, which every block publishes after all
// its warps have read v of the layer before; who publishes its part of the residual has seen the
// squares of v from all blocks, which follow the reading of the residual and of B, C and dt. Two
// sets of places take turns from step to step: a step zeroes the set of the next. All blocks are
// resident (cooperative launch), so every wait ends.
//
// Stream. Whole rows come, as many as fit into 40 KB, by one copy. With a copy for each part of a
// row, which padding between rows needs, memory gives 2.6 TB/s even when nobody waits for anybody.
// The state is brought forward before the weights of z come: so only the gate is left when they
// are there.
//
// Products: 8 rows of a weight on the tensor cores (mma.m16n8k16, the weights in place of B). The
// same column of all rows lies in the same banks. So of the 128 bytes of a span a warp takes one
// half of the even rows while it takes the other of the odd ones, and multiplies them by 16 rows of
// A: a half of up to 8 sequences each, in v in the order in which lanes take them. Half of the
// result is wanted. A warp has the spans warp + 16 i of every matrix, so what it gathers of the
// residual or v it needs alone. The warps' shares are summed through shared memory; all consumers
// meet twice a layer, else only those wait who sum up.
//
// As little as can be is kept in local memory: while weights stream, a load that misses L1 takes 2
// microseconds. So what a block knows lies in shared memory, at fixed places.
//
// Launch   cooperative, one block per SM: 16 consumer warps, producer and scout
// Needs    sm_90 (bulk copies), d_state 128, d_conv 4, sizes as in supports() and lay_out(); else
//          the verbs
// Memory   besides the weights: the small parameters of each block side by side
// Errors   what is no number stays none
// Bytes    the weights, and state read and written, once
// Measured H100 80GB HBM3, bf16, f32 state, tokens/s at batch 1: mamba2-130m 3,745, mamba2-2.7b 486
//          (batch 4: 1,424), codestral-mamba-7b 189. 2.7b with the scout's first look 700 cycles
//          sooner 482, at once 464. 16 layers of Codestral's shape: 713, with pieces of 40 KB 693,
//          with 70 KB on their way 701, without a scout 681, nobody waiting for anybody 702, and
//          742 with 100 KB on their way, which delay the exchanges too much (691). 2.7b, in an
//          earlier form: pieces of 20 KB 2 to 4% slower, of 80 KB 8%; with 60, 80, 100 KB on their
//          way (20 KB each) 8, 10, 13%
// Same as  the verbs, one by one, as Mamba2::forward calls them; tests/unit/mamba2_step_test.cpp
#include <algorithm>

#include "kernels/cuda/conv_ring.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mamba2_persistent.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/parity_exchange.cuh"
#include "kernels/cuda/persistent.cuh"
#include "kernels/cuda/weight_ring.cuh"

namespace krait::cuda {
namespace {

constexpr int kWarps = 16;  // consumers
constexpr int kThreads = 32 * kWarps;
constexpr int kAllThreads = kThreads + 64;  // with the producer and the scout
constexpr int kLooks = 10;                  // of a lane of the scout at once
constexpr int kMostBatch = 4;
constexpr int kMinWidthOfTwo = 1536;   // d_model, below which two sequences take the verbs
constexpr int kMinWidthOfFour = 2560;  // three or four: as measured, down to here
constexpr int kWideModel = 1536;       // d_model, from which on waits are longer
constexpr int kMaxGroups = 8;
constexpr int kMaxBlocks = 256;
constexpr int kState = 128;  // d_state
constexpr int kConv = 4;     // d_conv
constexpr int kUnits = 4;    // channels of a warp
constexpr int kMaxChannels = kUnits * kWarps;
constexpr int kMaxRows = 64;        // of out_proj of a block
constexpr int kWarpPitch = 64 + 2;  // of the warps' shares of a sum, in floats
constexpr int kGroupShares = kWarps * kWarpPitch;
constexpr int kRows = 8;              // of a weight that the tensor cores take at once
constexpr int kSpan = 64;             // neighbouring columns of a warp, 128 bytes of each row
constexpr int kKeptSpans = 5;         // of a vector, in a warp's registers during a product
constexpr int kMostPiece = 40 << 10;  // bytes of a matrix that one copy brings
constexpr int kWideRow = 12 << 10;    // bytes, from which on copies bring half as much
// Bytes of a block on their way at once: more of them delay what the blocks exchange.
constexpr int kMostFlying = 50 << 10;
constexpr int kRound = kWarps * kSpan;
constexpr int kMostColumns = 8 * kRound;  // what gather() takes

/// Whole rows of n_columns that one copy brings; they divide kRows.
__host__ __device__ constexpr int rows_at_once(int piece_bytes, int n_columns) {
  const int n = piece_bytes / (2 * n_columns);
  return n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
}

struct StepLayer {
  const void *in_proj, *out_proj;
  void *conv_state, *ssm_state;
};

/// What a block needs of a layer besides matrices and states: for each of its channels, its rows of
/// B, C and dt, and its rows of out_proj. In units of the most of each that a block has.
enum ChannelParam { kConvBias = kConv, kXBias, kZBias, kA, kD, kGatedNorm, kChannelParams };
enum SideParam { kSideConvBias = kConv, kSideBias, kSideParams };
enum RowParam { kOutBias, kNextNorm, kRowParams };

/// Where what has no fixed place lies in shared memory, in bytes; pitches in elements.
struct Layout {
  int shares[4];  // of the warps in the sums of a Product
  int v_pitch, table, small, small_bytes, windows, side_windows, ring, ring_bytes, piece_bytes;
};

struct StepParams {
  const StepLayer* layers;
  const float* records;                   // [n_layer][blocks][record]
  const int* side_begin;                  // [blocks + 1]: the rows of B, C and dt of each block
  int record, record_sides, record_rows;  // floats; where those of the second and third kind begin
  int n_layer, d_model, d_inner, n_bc, n_side, vocab_rows, n_group, head_dim;
  const void *embedding, *head;
  const float *norm_first, *norm_f;
  float eps, mixer_eps, dt_min, dt_max;
  const int32_t *ids, *slots;
  const int64_t* positions;
  int n_seq;
  float* logits;
  int64_t logits_stride;
  // [2 sets] of f32: v [2][d_inner], residual [2][d_model], B, C, dt [2][side_pitch], squares of v
  // [2][2][block_pitch] and of the residual [2][block_pitch]
  float* exchange;
  int64_t set;                                          // floats
  int residual_at, sides_at, v_squares_at, squares_at;  // in a set
  int side_pitch, block_pitch, group_width;
  unsigned* launches;
  DType state_type;
  int most_channels, most_sides, most_rows;
  int window_pitch, side_window_pitch;  // of what the convolution remembers, elements
  int head_rows;                        // of the vocabulary before a sum over the warps
  // Cycles before the first look at them.
  unsigned residual_late, v_late, squares_late;
  Layout at;
};

/// What a block owns.
struct Owned {
  int first_channel, channels, first_row, rows, first_word, words;
  int first_side, sides, side_channels;  // rows of B, C and dt; those that pass the convolution
  int group, next_group;  // of the first channel; the first channel of the next, counted from it
  int side_warps, row_warps;  // that sum up products with `sides` and `rows` rows
  int slot[kMostBatch];
  int oldest[kMostBatch];  // row of conv_state
};

/// What has a fixed place in shared memory, so that no register need hold it.
template <int B>
struct Shared {
  uint64_t full[kRingPieces], empty[kRingPieces], small_full[2], small_empty[2];
  // Of the squares of the residual and of v: the own ones are published; the scales are known.
  uint64_t published[2], known[2];
  int held[kRingPieces];
  Owned own;
  float* set;                          // of places for exchanges
  int8_t group_of[kMaxBlocks];         // the group of the first channel of each block
  alignas(16) float bc[B][4][kState];  // B and C of the first own group, and of the next
  float dt[B][kMaxChannels];
  float y[B][kMaxChannels];
  float residual[B * kMaxRows];  // of the row of out_proj of each thread that has one
  float squares[B][2][kWarps];
  float scale[B];                 // of the norm of the residual
  float v_scale[B * kMaxGroups];  // [B][n_group] of that of v
};
template <int B>
constexpr int kSharedBytes = (static_cast<int>(sizeof(Shared<B>)) + 127) / 128 * 128;
enum Norm { kOfResidual, kOfV };
enum Product { kSides, kX, kZ, kOut };  // with the rows of B, C, dt, of x, of z, of out_proj

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ __forceinline__ int thread() { return anew(static_cast<int>(threadIdx.x)); }
/// A barrier of the consumers alone.
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
/// Barriers at which only the first warps wait: those that sum up what all have written. Between
/// two uses of one of them all consumers meet.
enum Gate { kSideGate = 2, kRowGate, kSquaresGate, kRowSquaresGate };

/// What every thread of a block knows.
template <typename T, int B>
struct Block {
  const StepParams& p;
  Shared<B>& s;
  // [B][v_pitch]: what products take. A warp touches its own columns only. Each 8 values are 4 of
  // the first half of a span and 4 of the second, by pairs in turn: first those of which the column
  // has no 4 among its bits, then the others.
  T* v;
  const StepLayer* layers;
  char* memory;   // shared
  unsigned live;  // bit n: there is a sequence n

  __device__ bool lives(int seq) const { return B == 1 || (live >> seq & 1) != 0; }
  /// Records and windows of a layer; two take turns.
  __device__ char* small(int layer) const {
    return memory + p.at.small + layer % 2 * p.at.small_bytes;
  }
  __device__ float* shares(Product product) const {
    return reinterpret_cast<float*>(memory + p.at.shares[product]);
  }
};

/// A run of n 16-bit values from element `first` on, with the 16-byte lines that it lies in.
struct Lines {
  int skew, bytes;
  __device__ Lines(int first, int n)
      : skew(first * 2 % 16), bytes(n > 0 ? (first * 2 % 16 + n * 2 + 15) / 16 * 16 : 0) {}
};

template <typename T, int B>
__device__ void produce(const Block<T, B>& b, WeightRing ring) {
  const StepParams& p = b.p;
  const Owned own = b.s.own;
  RingProducer out{ring, evict_first_policy(), b.s.held, kMostFlying};
  const int D = p.d_model;
  const int E = p.d_inner;
  const int D_rows = rows_at_once(p.at.piece_bytes, D);
  const int E_rows = rows_at_once(p.at.piece_bytes, E);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int n = own.channels;
  const int state_row = kState * (p.state_type == DType::f32 ? 4 : 2);
  const int slot = lane < B ? b.s.own.slot[lane] : -1;
  const int oldest = lane < B ? b.s.own.oldest[lane] : 0;
  const int64_t width = E + p.n_bc;
  const Lines x_lines(own.first_channel, n);
  const Lines side_lines(own.first_side, own.side_channels);
  for (int l = 0; l < p.n_layer; ++l) {
    const StepLayer& w = b.layers[l];
    const uint32_t full = shared_address(&b.s.small_full[l % 2]);
    mbarrier_wait(shared_address(&b.s.small_empty[l % 2]), static_cast<uint32_t>(l / 2 + 1) % 2);
    const uint32_t small = shared_address(b.small(l));
    if (lane == 0) {
      mbarrier_expect(
          full, p.record * 4 + __popc(b.live) * (kConv - 1) * (x_lines.bytes + side_lines.bytes));
    }
    __syncwarp();
    if (lane == 0) {
      bulk_copy(small, p.records + (static_cast<int64_t>(l) * gridDim.x + blockIdx.x) * p.record,
                p.record * 4, full, out.policy);
    }
    if (slot >= 0) {
      const auto window = [&](int at, int pitch, int64_t first, Lines lines) {
        for (int j = 0; j < kConv - 1 && lines.bytes > 0; ++j) {
          const int64_t row =
              static_cast<int64_t>(slot) * (kConv - 1) + conv_row<kConv>(oldest + j);
          const int64_t from = row * width + first;
          bulk_copy(small + at + (lane * (kConv - 1) + j) * 2 * pitch,
                    static_cast<const char*>(w.conv_state) + from * 2 - lines.skew, lines.bytes,
                    full, out.policy);
        }
      };
      window(p.at.windows, p.window_pitch, own.first_channel, x_lines);
      window(p.at.side_windows, p.side_window_pitch, E + own.first_side, side_lines);
    }
    out.rows(w.in_proj, 2 * E + own.first_side, own.sides, D, D_rows);
    out.rows(w.in_proj, E + own.first_channel, n, D, D_rows);
    for (int seq = 0; seq < B && n > 0; ++seq) {
      if (!b.lives(seq)) continue;
      const uint32_t to = out.begin(n * state_row, n * state_row);
      if (lane == seq) {
        out.copy(to,
                 static_cast<const char*>(w.ssm_state) +
                     (static_cast<int64_t>(slot) * E + own.first_channel) * state_row,
                 n * state_row);
      }
      out.end(n * state_row);
    }
    out.rows(w.in_proj, own.first_channel, n, D, D_rows);
    out.rows(w.out_proj, own.first_row, own.rows, E, E_rows);
  }
  out.rows(p.head, own.first_word, own.words, D, D_rows);
}

// ---- exchanges ----------------------------------------------------------------------------------

/// v = the columns of a vector of `length` that the warp multiplies with, of all sequences, as soon
/// as they are published, times factor(seq, column) once before() is done. Looks that come too soon
/// are in the way of what they look for, and of the weights: the first is `late` cycles from now.
template <typename T, int B, typename Before, typename Factor>
__device__ __forceinline__ void gather(const Block<T, B>& b, const float* from, int length,
                                       unsigned parity, unsigned late, Before before,
                                       Factor factor) {
  wait_cycles(late);
  const int lane = thread() % 32;
  const int warp = thread() / 32;
  constexpr int kStride = 2 * kRound;
  const int column = (warp + kWarps * (lane / 16)) * kSpan + lane % 16 * 4;
  const int four = lane % 16;  // of the 16 of a span
  T* to = b.v + (column - four * 4) + four % 2 * 32 + four % 8 / 2 * 8 + four / 8 * 2;
#pragma unroll 1
  for (int seq = 0; seq < B; ++seq) {
    if (!b.lives(seq)) continue;
    uint4 word[4];
    bool wanted[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wanted[j] = column + j * kStride < length;
      word[j] = uint4{parity, parity, parity, parity};
    }
    unsigned all, any;
    do {
      load4(word, from + static_cast<int64_t>(seq) * length + column, kStride, wanted);
      all = ~0U;
      any = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 v = word[j];
        all &= v.x & v.y & v.z & v.w;
        any |= v.x | v.y | v.z | v.w;
      }
    } while (__any_sync(0xffffffffU, ((all ^ parity) | (any ^ parity)) & 1));
    before();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!wanted[j]) continue;
      const float f = factor(seq, column + j * kStride);
      auto* at = reinterpret_cast<uint32_t*>(to + seq * b.p.at.v_pitch + j * kStride);
      at[0] = pack<T>(value_of(word[j].x) * f, value_of(word[j].y) * f);
      at[2] = pack<T>(value_of(word[j].z) * f, value_of(word[j].w) * f);
    }
  }
  __syncwarp();
}

/// scale[seq][group] = 1 / the root of the mean square over each group of `width`, from what the
/// blocks publish of the squares of the parts that they own: [seq][sides][block_pitch], the sums
/// over the group of their first channel and, where there are several groups, over the next.
/// Neighbouring lanes share a scale.
template <typename T, int B>
__device__ __forceinline__ void read_scales(const Block<T, B>& b, float* scale, const float* from,
                                            int n_group, int width, float eps, unsigned parity) {
  const StepParams& p = b.p;
  const int lane = thread() % 32;
  const auto blocks = static_cast<int>(gridDim.x);
  int sharing = 32;
  while (sharing * B * n_group > 32) sharing /= 2;
  const int item = lane / sharing;
  const int seq = item / n_group;
  const int group = item - seq * n_group;
  const int n_side = n_group > 1 ? 2 : 1;
  const bool mine = seq < B && b.lives(seq);
  const auto owner = [&](int channel) {
    return static_cast<int>(
        (static_cast<unsigned>(channel + 1) * static_cast<unsigned>(blocks) - 1) /
        static_cast<unsigned>(p.d_inner));
  };
  int block = (n_group > 1 ? owner(group * width) : 0) + lane % sharing;
  const int end = !mine ? 0 : n_group > 1 ? owner((group + 1) * width - 1) + 1 : blocks;
  from += seq * n_side * p.block_pitch;
  float sum = 0.0F;
#pragma unroll 1
  for (; __any_sync(0xffffffffU, block < end); block += kLooks * sharing) {
    unsigned word[kLooks];
    const float* at[kLooks];
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      const int of = block + j * sharing;
      const int side = n_group > 1 && of < end ? group - b.s.group_of[of] : 0;
      at[j] = of < end && side >= 0 && side < n_side ? from + side * p.block_pitch + of : nullptr;
      word[j] = parity;
    }
    bool here;
    do {
      here = true;
#pragma unroll
      for (int j = 0; j < kLooks; ++j) {
        if (at[j] != nullptr) {
          asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                       : "=r"(word[j])
                       : "l"(at[j])
                       : "memory");
        }
      }
#pragma unroll
      for (int j = 0; j < kLooks; ++j) here = here && ((word[j] ^ parity) & 1) == 0;
    } while (!__all_sync(0xffffffffU, here));
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      if (at[j] != nullptr) sum += value_of(word[j]);
    }
  }
#pragma unroll 1
  for (int d = 1; d < sharing; d *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
  if (mine && lane % sharing == 0) {
    scale[item] = rsqrtf(sum / static_cast<float>(width) + eps);
  }
}

/// Waits until the scales of a norm in this layer are known.
template <typename T, int B>
__device__ __forceinline__ void await_scales(const Block<T, B>& b, Norm norm, int layer) {
  mbarrier_wait(shared_address(&b.s.known[norm]), static_cast<uint32_t>(layer) % 2);
}

/// A warp that awaits the squares, beside those that await what they are of. It begins when the own
/// ones are published, as then the others' soon will be.
template <typename T, int B>
__device__ void scout(const Block<T, B>& b) {
  const StepParams& p = b.p;
#pragma unroll 1
  for (int l = 0;; ++l) {
    const auto phase = static_cast<uint32_t>(l) % 2;
    mbarrier_wait(shared_address(&b.s.published[kOfResidual]), phase);
    wait_cycles(p.squares_late);
    read_scales(b, b.s.scale, b.s.set + p.squares_at, 1, p.d_model, p.eps, phase ^ 1);
    warp_arrive(shared_address(&b.s.known[kOfResidual]));
    if (l == p.n_layer) break;
    mbarrier_wait(shared_address(&b.s.published[kOfV]), phase);
    wait_cycles(p.squares_late);
    read_scales(b, b.s.v_scale, b.s.set + p.v_squares_at, p.n_group, p.group_width, p.mixer_eps,
                phase ^ 1);
    warp_arrive(shared_address(&b.s.known[kOfV]));
  }
}

// ---- the consumers ------------------------------------------------------------------------------

/// A lane's 32 bytes of a span of 128, 16 from each half.
struct Halves {
  uint4 a, b;
  __device__ __forceinline__ void load(const char* at, int first) {
    a = *reinterpret_cast<const uint4*>(at + first);
    b = *reinterpret_cast<const uint4*>(at + (first ^ 64));
  }
};

/// c += the products of a span of up to 8 sequences with 8 rows of a weight. Of an even row w.a is
/// of the first half, of an odd one of the second; so of c[0] the products of even rows with the
/// first half of v are wanted, and of odd ones with the second, of c[1] the others.
template <typename T>
__device__ __forceinline__ void multiply_span(float (&c)[2][4], const Halves& v, const Halves& w) {
  multiply_add<T>(c[0], {v.a.x, v.a.y, v.a.z, v.a.w}, w.a.x, w.a.y);
  multiply_add<T>(c[1], {v.a.x, v.a.y, v.a.z, v.a.w}, w.b.x, w.b.y);
  multiply_add<T>(c[0], {v.b.x, v.b.y, v.b.z, v.b.w}, w.a.z, w.a.w);
  multiply_add<T>(c[1], {v.b.x, v.b.y, v.b.z, v.b.w}, w.b.z, w.b.w);
}

/// The warp's part of n rows of the matrix in the ring times v goes to its place among the shares:
/// row r of sequence s is number (r / 8 * B + s) * 8 + r % 8 of 64 in a group.
template <typename T, int B>
__device__ __forceinline__ void multiply(const Block<T, B>& b, WeightRing& ring, int n,
                                         int n_columns, float* shares) {
  constexpr int kStride = kRound * 2;
  const int lane = thread() % 32;
  const int warp = thread() / 32;
  const int group = lane / 4;
  const int quarter = lane % 4;
  const int n_span = (n_columns / kSpan - warp + kWarps - 1) / kWarps;
  const int pitch = 2 * n_columns;
  const int at_once = rows_at_once(b.p.at.piece_bytes, n_columns);
  const int of_v = quarter * 16;
  const int of_w = of_v + group % 2 * 64;
  const char* v =
      reinterpret_cast<const char*>(b.v + group % B * b.p.at.v_pitch) + warp * (kSpan * 2);
  Halves kept[kKeptSpans] = {};
#pragma unroll
  for (int i = 0; i < kKeptSpans; ++i) {
    if (i < n_span) kept[i].load(v + i * kStride, of_v);
  }
#pragma unroll 1
  for (int first = 0; first < n; first += kRows) {
    const int here = min(kRows, n - first);
    const int row = min(group, here - 1);
    WeightRing taken = ring;
    const char* w = nullptr;
#pragma unroll 1
    for (int r = 0; r < here; r += at_once) {
      const int bytes = min(at_once, here - r) * pitch;
      const char* piece = ring.wait(bytes);
      if (row >= r) w = piece + (row - r) * pitch;
      ring.advance(ring.place(bytes), bytes);
    }
    w += warp * (kSpan * 2);
    float acc[2][4] = {};
#pragma unroll
    for (int i = 0; i < kKeptSpans; ++i) {
      if (i >= n_span) break;
      Halves part;
      part.load(w + i * kStride, of_w);
      multiply_span<T>(acc, kept[i], part);
    }
#pragma unroll 1
    for (int i = kKeptSpans; i < n_span; ++i) {
      Halves part, of_columns;
      part.load(w + i * kStride, of_w);
      of_columns.load(v + i * kStride, of_v);
      multiply_span<T>(acc, of_columns, part);
    }
#pragma unroll 1
    for (int r = 0; r < here; r += at_once) taken.release(min(at_once, here - r) * pitch);
    // Sequence g and rows 2 q and 2 q + 1 are in a lane of group g and quarter q.
    if (group < B) {
      const int m = first / kRows * B + group;
      *reinterpret_cast<float2*>(shares + m / 8 * kGroupShares + warp * kWarpPitch + m % 8 * 8 +
                                 2 * quarter) = {acc[0][0] + acc[1][2], acc[0][3] + acc[1][1]};
    }
  }
}

/// Number tid of the sums over the warps.
__device__ __forceinline__ float summed(const float* shares) {
  const int tid = thread();
  const float* from = shares + tid / 64 * kGroupShares + tid % 64;
  float v[4] = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v[i % 4] += from[i * kWarpPitch];
  return v[0] + v[1] + (v[2] + v[3]);
}

/// Which of the sums of a product over n rows is this thread's.
template <int B>
struct Summand {
  int seq, row;
  bool mine;
  __device__ __forceinline__ explicit Summand(int n) {
    const int tid = thread();
    seq = tid / 8 % B;
    row = tid / 8 / B * 8 + tid % 8;
    mine = row < n;
  }
  /// Warps that have any.
  __device__ static int warps(int n) { return ((n + 7) / 8 * B * 8 + 31) / 32; }
};

/// conv(v) of a channel, and v as the convolution remembers it.
template <typename T>
struct Convolved {
  float sum;
  T now;
  /// weight: [kConv]; past: [kConv - 1] of `pitch`
  __device__ __forceinline__ Convolved(const float* weight, float bias, const T* past, int pitch,
                                       float v) {
    const float4 w = *reinterpret_cast<const float4*>(weight);
    now = from_float<T>(v);
    sum = fmaf(w.x, to_float(past[0]), bias);
    sum = fmaf(w.y, to_float(past[pitch]), sum);
    sum = fmaf(w.z, to_float(past[2 * pitch]), sum);
    sum = fmaf(w.w, to_float(now), sum);
  }
};

/// The input of a channel takes the place of the oldest that the convolution remembers.
template <typename T, int B>
__device__ __forceinline__ void remember(const Block<T, B>& b, const StepLayer& w, int seq,
                                         int channel, T input) {
  const int64_t row = static_cast<int64_t>(b.s.own.slot[seq]) * (kConv - 1) + b.s.own.oldest[seq];
  static_cast<T*>(w.conv_state)[row * (b.p.d_inner + b.p.n_bc) + channel] = input;
}

/// B, C or dt of the thread's row, from its product v.
template <typename T, int B>
__device__ __forceinline__ float side_value(const Block<T, B>& b, const StepLayer& w,
                                            const char* small, const Summand<B>& s, float v) {
  const StepParams& p = b.p;
  const float* record = reinterpret_cast<const float*>(small) + p.record_sides;
  const auto param = [&](int which) { return record[which * p.most_sides + s.row]; };
  v += param(kSideBias);
  if (s.row >= b.s.own.side_channels) return fminf(fmaxf(softplus(v), p.dt_min), p.dt_max);
  const T* past = reinterpret_cast<const T*>(small + p.at.side_windows) +
                  s.seq * (kConv - 1) * p.side_window_pitch + b.s.own.first_side % 8 + s.row;
  const Convolved<T> conv(record + s.row * kConv, param(kSideConvBias), past, p.side_window_pitch,
                          v);
  remember(b, w, s.seq, p.d_inner + b.s.own.first_side + s.row, conv.now);
  return silu(conv.sum);
}

/// B and C of the own groups, and dt of the own channels, from what all blocks publish.
template <typename T, int B>
__device__ __forceinline__ void read_sides(const Block<T, B>& b, unsigned parity) {
  const StepParams& p = b.p;
  const Owned& own = b.s.own;
  const int lane = thread() % 32;
  const int warp = thread() / 32;
  if (own.channels == 0 || warp >= 6) return;
#pragma unroll 1
  for (int seq = 0; seq < B; ++seq) {
    if (!b.lives(seq)) continue;
    const float* at = b.s.set + p.sides_at + seq * p.side_pitch;
    if (warp < 4) {  // B and C of the first group, then of the next
      const int group = own.group + warp / 2;
      if (group >= p.n_group) continue;
      *reinterpret_cast<float4*>(&b.s.bc[seq][warp][lane * 4]) =
          await4(at + (warp % 2) * (p.n_bc / 2) + group * kState + lane * 4, true, parity);
    } else {
      const int channel = (warp - 4) * 32 + lane;
      const bool wanted = channel < own.channels;
      const int head = (own.first_channel + (wanted ? channel : 0)) / p.head_dim;
      b.s.dt[seq][channel] = await(at + p.n_bc + head, wanted, parity);
    }
  }
}

/// Four states in shared memory.
template <typename S>
__device__ __forceinline__ float4 load_states(const S* from) {
  if constexpr (std::is_same_v<S, float>) {
    return *reinterpret_cast<const float4*>(from);
  } else {
    const auto v = *reinterpret_cast<const uint2*>(from);
    float4 f;
    unpack_pair<S>(v.x, f.x, f.y);
    unpack_pair<S>(v.y, f.z, f.w);
    return f;
  }
}
/// Nobody reads them again in this step.
template <typename S>
__device__ __forceinline__ void store_states(S* to, float4 v) {
  if constexpr (std::is_same_v<S, float>) {
    __stcs(reinterpret_cast<float4*>(to), v);
  } else {
    __stcs(reinterpret_cast<uint2*>(to), uint2{pack<S>(v.x, v.y), pack<S>(v.z, v.w)});
  }
}

/// Channel `channel` of the product among `shares`, of a sequence, in all of the 8 lanes that share
/// the channel.
template <int B>
__device__ __forceinline__ float channel_sum(const float* shares, int channel, int seq) {
  const int part = thread() % 8;
  const int m = channel / kRows * B + seq;
  const float* from =
      shares + m / 8 * kGroupShares + part * 2 * kWarpPitch + m % 8 * 8 + channel % kRows;
  float t = from[0] + from[kWarpPitch];
#pragma unroll
  for (int d = 1; d < 8; d *= 2) t += __shfl_xor_sync(0xffffffffU, t, d);
  return t;
}

/// The channel among a block's own that a lane stands for: warp w has up to four of them, w + 16 u,
/// and lanes 8 u to 8 u + 7 what belongs to one.
struct OwnChannel {
  int channel;         // of the own ones; where there is none, the last
  bool exists, first;  // first: of the lanes that share it
  const float* params;
  int pitch;

  template <typename T, int B>
  __device__ __forceinline__ OwnChannel(const Block<T, B>& b, const char* small)
      : params(reinterpret_cast<const float*>(small)), pitch(b.p.most_channels) {
    const int t = thread();
    const int at = t / 32 + kWarps * (t % 32 / 8);
    exists = at < b.s.own.channels;
    first = exists && t % 8 == 0;
    channel = min(at, b.s.own.channels - 1);
  }
  [[nodiscard]] __device__ __forceinline__ float param(int which) const {
    return params[which * pitch + channel];
  }
  [[nodiscard]] __device__ __forceinline__ const float* taps() const {
    return params + channel * kConv;
  }
};

/// x, the state and y of the own channels of a sequence. For the state all lanes of a warp share a
/// channel, 4 states each.
template <typename T, int B, typename S>
__device__ __forceinline__ void update_state(const Block<T, B>& b, const StepLayer& w,
                                             const char* small, const S* piece, int seq,
                                             float left) {
  const StepParams& p = b.p;
  const int lane = thread() % 32;
  const int warp = thread() / 32;
  const int n = b.s.own.channels;
  const OwnChannel mine(b, small);
  const int channel = mine.channel;
  const float dt = b.s.dt[seq][channel];
  const float decay = exp2_fast(dt * mine.param(kA));
  const T* past = reinterpret_cast<const T*>(small + p.at.windows) +
                  seq * (kConv - 1) * p.window_pitch + b.s.own.first_channel % 8 + channel;
  const Convolved<T> conv(
      mine.taps(), mine.param(kConvBias), past, p.window_pitch,
      fmaf(channel_sum<B>(b.shares(kX), channel, seq), left, mine.param(kXBias)));
  const float x = silu(conv.sum);
  const float dx = dt * x;

  const int next_group = b.s.own.next_group;
  const float* bc = b.s.bc[seq][0] + lane * 4;
  S* state =
      static_cast<S*>(w.ssm_state) +
      (static_cast<int64_t>(b.s.own.slot[seq]) * p.d_inner + b.s.own.first_channel) * kState +
      lane * 4;
  float y[kUnits] = {};
#pragma unroll
  for (int pair = 0; pair < kUnits; pair += 2) {
    if (pair * kWarps >= n) break;
#pragma unroll
    for (int u = pair; u < pair + 2; ++u) {
      const int own = min(warp + u * kWarps, n - 1);
      const float* of = bc + (own >= next_group ? 2 * kState : 0);
      const float4 of_B = *reinterpret_cast<const float4*>(of);
      const float4 of_C = *reinterpret_cast<const float4*>(of + kState);
      const float4 h = load_states(piece + own * kState + lane * 4);
      const float keep = __shfl_sync(0xffffffffU, decay, u * 8);
      const float add = __shfl_sync(0xffffffffU, dx, u * 8);
      const float4 next{fmaf(keep, h.x, add * of_B.x), fmaf(keep, h.y, add * of_B.y),
                        fmaf(keep, h.z, add * of_B.z), fmaf(keep, h.w, add * of_B.w)};
      y[u] = fmaf(of_C.x, next.x, of_C.y * next.y) + fmaf(of_C.z, next.z, of_C.w * next.w);
      if (warp + u * kWarps < n) store_states(state + own * kState, next);
    }
  }
  if (mine.first) remember(b, w, seq, b.s.own.first_channel + channel, conv.now);
  // Lanes 8 u to 8 u + 7 get the sum of y[u].
  const bool upper = (lane & 16) != 0;
  const bool odd = (lane & 8) != 0;
  float even_sum = (upper ? y[2] : y[0]) + __shfl_xor_sync(0xffffffffU, upper ? y[0] : y[2], 16);
  float odd_sum = (upper ? y[3] : y[1]) + __shfl_xor_sync(0xffffffffU, upper ? y[1] : y[3], 16);
  float sum =
      (odd ? odd_sum : even_sum) + __shfl_xor_sync(0xffffffffU, odd ? even_sum : odd_sum, 8);
#pragma unroll
  for (int d = 4; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
  if (mine.first) b.s.y[seq][channel] = fmaf(mine.param(kD), x, sum);
}

/// v = y silu(z) of the own channels of a sequence, and its squares.
template <typename T, int B>
__device__ __forceinline__ void publish_v(const Block<T, B>& b, const char* small, int seq,
                                          float left, unsigned parity) {
  const StepParams& p = b.p;
  const int lane = thread() % 32;
  const int warp = thread() / 32;
  const OwnChannel mine(b, small);
  const int channel = mine.channel;
  const float z = fmaf(channel_sum<B>(b.shares(kZ), channel, seq), left, mine.param(kZBias));
  const float v = b.s.y[seq][channel] * silu(z);
  if (mine.first) {
    publish(b.s.set + static_cast<int64_t>(seq) * p.d_inner + b.s.own.first_channel + channel,
            v * mine.param(kGatedNorm), parity);
  }
  const float square = mine.first ? v * v : 0.0F;
#pragma unroll 1
  for (int side = 0; side < (p.n_group > 1 ? 2 : 1); ++side) {
    float s = (channel >= b.s.own.next_group) == (side == 1) ? square : 0.0F;
    s += __shfl_xor_sync(0xffffffffU, s, 8);
    s += __shfl_xor_sync(0xffffffffU, s, 16);
    if (lane == 0) b.s.squares[seq][side][warp] = s;
  }
}

/// The sums of the squares of the own channels. A warp.
template <typename T, int B>
__device__ __forceinline__ void publish_v_squares(const Block<T, B>& b, unsigned parity) {
  const int lane = thread() % 32;
  const int seq = lane / 2;
  const int n_side = b.p.n_group > 1 ? 2 : 1;
  if (seq >= B || !b.lives(seq) || lane % 2 >= n_side) return;
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += b.s.squares[seq][lane % 2][i];
  publish(b.s.set + b.p.v_squares_at + (seq * n_side + lane % 2) * b.p.block_pitch + blockIdx.x,
          sum, parity);
}

/// The residual of the thread's row, times the weights of the norm that comes; then its squares.
template <typename T, int B>
__device__ __forceinline__ void publish_residual(const Block<T, B>& b, const Summand<B>& s,
                                                 float residual, float norm, unsigned parity) {
  const int lane = thread() % 32;
  const int warp = thread() / 32;
  const bool mine = s.mine && b.lives(s.seq);
  if (mine) {
    publish(b.s.set + b.p.residual_at + s.seq * b.p.d_model + b.s.own.first_row + s.row,
            residual * norm, parity);
  }
  float sum = mine ? residual * residual : 0.0F;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {  // lanes of one sequence
    if (d < 8 || d >= 8 * B) sum += __shfl_xor_sync(0xffffffffU, sum, d);
  }
  if (lane % 8 == 0 && lane / 8 < B) b.s.squares[lane / 8][0][warp] = sum;
  const int warps = b.s.own.row_warps;
  if (warps > 1) {
    asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(kRowSquaresGate)), "r"(32 * warps)
                 : "memory");
  } else {
    __syncwarp();
  }
  if (warp == 0 && lane < B && b.lives(lane)) {
    float total = 0.0F;
    for (int i = 0; i < warps; ++i) total += b.s.squares[lane][0][i];
    publish(b.s.set + b.p.squares_at + lane * b.p.block_pitch + blockIdx.x, total, parity);
  }
}

/// Says to the scout that what the block owns of the squares is published, which warp 0 has done
/// after all had read the scales before. racecheck follows no order from warp to warp to warp, so
/// under it all arrive.
constexpr int kAnnouncers = kWarpArrivals > 1 ? kWarps : 1;
template <typename T, int B>
__device__ __forceinline__ void announce_squares(const Block<T, B>& b, Norm norm) {
  if (thread() / 32 < kAnnouncers) warp_arrive(shared_address(&b.s.published[norm]));
}

/// u = the input of in_proj or the head. What products with it are still to be multiplied by is
/// left_of().
template <typename T>
constexpr bool kNarrow = std::is_same_v<T, __half>;  // the product's input could leave its range
template <typename T, int B>
__device__ __forceinline__ void take_residual(const Block<T, B>& b, int layer, unsigned parity) {
  gather(
      b, b.s.set + b.p.residual_at, b.p.d_model, parity, b.p.residual_late,
      [&] {
        if (kNarrow<T>) await_scales(b, kOfResidual, layer);
      },
      [&](int seq, int) { return kNarrow<T> ? b.s.scale[seq] : 1.0F; });
}
template <typename T, int B>
__device__ __forceinline__ float left_of(const Block<T, B>& b, int seq) {
  return kNarrow<T> ? 1.0F : b.s.scale[seq];
}

template <typename T, int B>
__device__ void consume(const Block<T, B>& b, WeightRing ring) {
  const StepParams& p = b.p;
  const Owned& own = b.s.own;
  const int tid = thread();
  const int lane = tid % 32;
  const int warp = tid / 32;
  const bool scaled_v = kNarrow<T> || p.n_group > 1;

  {
    const Summand<B> row(own.rows);
    float residual = 0.0F;
    float norm = 0.0F;
    if (row.mine && b.lives(row.seq)) {
      const int d = own.first_row + row.row;
      residual = to_float(
          static_cast<const T*>(p.embedding)[static_cast<int64_t>(p.ids[row.seq]) * p.d_model + d]);
      norm = p.norm_first[d];
      b.s.residual[tid] = residual;
    }
    if (warp < own.row_warps) publish_residual(b, row, residual, norm, 1);
    announce_squares(b, kOfResidual);
  }

#pragma unroll 1
  for (int l = 0;; ++l) {
    // Where the parameters of the layer lie.
    const auto small = [&] { return b.small(anew(l)); };
    const auto parity = static_cast<unsigned>(l + 1) % 2;

    take_residual(b, l, parity);
    if (l == p.n_layer) break;
    mbarrier_wait(shared_address(&b.s.small_full[l % 2]), static_cast<uint32_t>(l / 2) % 2);
    multiply(b, ring, own.sides, p.d_model, b.shares(kSides));
    if (own.sides > 0) {
      meet<kSideGate, kThreads>(warp < own.side_warps);
      if (warp < own.side_warps) await_scales(b, kOfResidual, l);
      const Summand<B> side(own.sides);
      if (side.mine && b.lives(side.seq)) {
        const float v = side_value(b, b.layers[l], small(), side,
                                   summed(b.shares(kSides)) * left_of(b, side.seq));
        publish(b.s.set + p.sides_at + side.seq * p.side_pitch + own.first_side + side.row, v,
                parity);
      }
      __syncwarp();
    }
    multiply(b, ring, own.channels, p.d_model, b.shares(kX));
    read_sides(b, parity);
    await_scales(b, kOfResidual, l);
    consumers_sync();
    if (own.channels > 0) {
      const int bytes = own.channels * kState * (p.state_type == DType::f32 ? 4 : 2);
#pragma unroll 1
      for (int seq = 0; seq < B; ++seq) {
        if (!b.lives(seq)) continue;
        const char* piece = ring.wait(bytes);
        with_state_type(p.state_type, [&](auto s) {
          using S = decltype(s);
          update_state(b, b.layers[l], small(), reinterpret_cast<const S*>(piece), seq,
                       left_of(b, seq));
        });
        ring.release(bytes);
      }
    }
    multiply(b, ring, own.channels, p.d_model, b.shares(kZ));
    consumers_sync();
#pragma unroll 1
    for (int seq = 0; seq < B; ++seq) {
      if (!b.lives(seq)) continue;
      if (own.channels > 0) {
        publish_v(b, small(), seq, left_of(b, seq), parity);
      } else if (lane < 2) {
        b.s.squares[seq][lane][warp] = 0.0F;
      }
    }
    meet<kSquaresGate, kThreads>(warp == 0);
    if (warp == 0) publish_v_squares(b, parity);
    announce_squares(b, kOfV);
    gather(
        b, b.s.set, p.d_inner, parity, p.v_late,
        [&] {
          if (scaled_v) await_scales(b, kOfV, l);
        },
        [&](int seq, int column) {
          return scaled_v ? b.s.v_scale[seq * p.n_group + column / p.group_width] : 1.0F;
        });
    multiply(b, ring, own.rows, p.d_inner, b.shares(kOut));
    meet<kRowGate, kThreads>(warp < own.row_warps);
    if (warp < own.row_warps) {
      await_scales(b, kOfV, l);
      const Summand<B> row(own.rows);
      float residual = 0.0F;
      float norm = 0.0F;
      if (row.mine && b.lives(row.seq)) {
        const float* record = reinterpret_cast<const float*>(small()) + p.record_rows + row.row;
        residual = fmaf(summed(b.shares(kOut)), scaled_v ? 1.0F : b.s.v_scale[row.seq],
                        b.s.residual[thread()] + record[kOutBias * p.most_rows]);
        b.s.residual[thread()] = residual;
        norm = record[kNextNorm * p.most_rows];
      }
      publish_residual(b, row, residual, norm, parity ^ 1);
    }
    announce_squares(b, kOfResidual);
    warp_arrive(shared_address(&b.s.small_empty[l % 2]));
  }

  await_scales(b, kOfResidual, p.n_layer);
  consumers_sync();
#pragma unroll 1
  for (int first = 0, turn = 0; first < own.words; first += p.head_rows, ++turn) {
    const int here = min(p.head_rows, own.words - first);
    float* shares = b.shares(turn % 2 == 0 ? kX : kZ);
    multiply(b, ring, here, p.d_model, shares);
    consumers_sync();
    const Summand<B> word(here);
    if (word.mine && b.lives(word.seq)) {
      p.logits[word.seq * p.logits_stride + own.first_word + first + word.row] =
          summed(shares) * left_of(b, word.seq);
    }
  }
}

template <typename T, int B>
__global__ void __launch_bounds__(kAllThreads, 1)
    mamba2_step_kernel(const __grid_constant__ StepParams p) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<Shared<B>*>(memory);
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  unsigned live = 0;
  for (int i = 0; i < B; ++i) {
    if (i < p.n_seq && p.slots[i] >= 0) live |= 1U << i;
  }
  if (live == 0) return;
  const unsigned launch = __ldcg(p.launches);
  const WeightRing ring{memory + p.at.ring, shared_address(s.full), shared_address(s.empty),
                        p.at.ring_bytes};
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared_address(&s.small_full[i]), 1);
      mbarrier_init(shared_address(&s.small_empty[i]), kWarps * kWarpArrivals);
      mbarrier_init(shared_address(&s.published[i]), kAnnouncers * kWarpArrivals);
      mbarrier_init(shared_address(&s.known[i]), kWarpArrivals);
    }
    for (int i = 0; i < kRingPieces; ++i) {
      mbarrier_init(ring.full + 8 * i, 1);
      mbarrier_init(ring.empty + 8 * i, kWarps * kWarpArrivals);
    }
    mbarrier_init_done();
    const Run channels(p.d_inner, block, blocks);
    const Run rows(p.d_model, block, blocks);
    const Run words(p.vocab_rows, block, blocks);
    const int first_side = p.side_begin[block];
    const int sides = p.side_begin[block + 1] - first_side;
    const int group = channels.begin / p.group_width;
    s.own = {channels.begin,
             channels.n,
             rows.begin,
             rows.n,
             words.begin,
             words.n,
             first_side,
             sides,
             max(0, min(sides, p.n_bc - first_side)),
             group,
             (group + 1) * p.group_width - channels.begin,
             Summand<B>::warps(sides),
             max(1, Summand<B>::warps(rows.n)),
             {},
             {}};
    s.set = p.exchange + launch % 2 * p.set;
    for (int i = 0; i < kMostBatch; ++i) {
      s.own.slot[i] = i < p.n_seq ? p.slots[i] : -1;
      s.own.oldest[i] = i < p.n_seq ? conv_row<kConv>(p.positions[i]) : 0;
    }
  }
  if (tid < blocks) {
    s.group_of[tid] = static_cast<int8_t>(Run(p.d_inner, tid, blocks).begin / p.group_width);
  }
  auto* table = reinterpret_cast<StepLayer*>(memory + p.at.table);
  const int words = p.n_layer * static_cast<int>(sizeof(StepLayer) / 8);
  for (int i = tid; i < words; i += kThreads + 32) {
    reinterpret_cast<uint64_t*>(table)[i] = reinterpret_cast<const uint64_t*>(p.layers)[i];
  }
  auto* other_set = reinterpret_cast<uint4*>(p.exchange + (launch + 1) % 2 * p.set);
  for (int64_t i = static_cast<int64_t>(block) * kAllThreads + tid; i < p.set / 4;
       i += static_cast<int64_t>(blocks) * kAllThreads) {
    other_set[i] = uint4{0, 0, 0, 0};
  }
  const Block<T, B> b{p, s, reinterpret_cast<T*>(memory + kSharedBytes<B>), table, memory, live};
  __syncthreads();
  if (tid / 32 == kWarps) {
    produce(b, ring);
  } else if (tid / 32 > kWarps) {
    scout(b);
  } else {
    consume(b, ring);
    // Everybody has read it, or could not have published what this block has waited for.
    if (block == 0 && tid == 0) *p.launches = launch + 1;
  }
}

#else

template <typename T, int B>
__global__ void mamba2_step_kernel(const __grid_constant__ StepParams) {}

#endif

struct PackInputs {
  const float *conv, *conv_bias, *in_bias, *dt_bias, *A, *D, *gated_norm, *out_bias, *next_norm;
};

/// The parameters of each block, side by side.
__global__ void pack_kernel(float* to, StepParams p, PackInputs w) {
  const int block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  float* mine = to + static_cast<int64_t>(block) * p.record;
  const auto value = [](const float* from, int i) { return from != nullptr ? from[i] : 0.0F; };
  const Run channels(p.d_inner, block, blocks);
  for (int c = static_cast<int>(threadIdx.x); c < channels.n; c += static_cast<int>(blockDim.x)) {
    const int e = channels.begin + c;
    const int h = e / p.head_dim;
    for (int i = 0; i < kConv; ++i) mine[c * kConv + i] = w.conv[e * kConv + i];
    const auto put = [&](int which, float v) { mine[which * p.most_channels + c] = v; };
    put(kConvBias, value(w.conv_bias, e));
    put(kXBias, value(w.in_bias, p.d_inner + e));
    put(kZBias, value(w.in_bias, e));
    put(kA, w.A[h] * kLog2e);
    put(kD, w.D[h]);
    put(kGatedNorm, w.gated_norm[e]);
  }
  mine += p.record_sides;
  const int first = p.side_begin[block];
  const int n_side = p.side_begin[block + 1] - first;
  for (int c = static_cast<int>(threadIdx.x); c < n_side; c += static_cast<int>(blockDim.x)) {
    const int row = first + c;
    const bool is_dt = row >= p.n_bc;
    const int e = p.d_inner + (is_dt ? 0 : row);
    for (int i = 0; i < kConv; ++i) mine[c * kConv + i] = is_dt ? 0.0F : w.conv[e * kConv + i];
    mine[kSideConvBias * p.most_sides + c] = is_dt ? 0.0F : value(w.conv_bias, e);
    mine[kSideBias * p.most_sides + c] =
        value(w.in_bias, 2 * p.d_inner + row) + (is_dt ? w.dt_bias[row - p.n_bc] : 0.0F);
  }
  mine += p.record_rows - p.record_sides;
  const Run rows(p.d_model, block, blocks);
  for (int c = static_cast<int>(threadIdx.x); c < rows.n; c += static_cast<int>(blockDim.x)) {
    mine[kOutBias * p.most_rows + c] = value(w.out_bias, rows.begin + c);
    mine[kNextNorm * p.most_rows + c] = w.next_norm[rows.begin + c];
  }
}

}  // namespace

/// Everything prepared for one model and the states of one pool.
struct Mamba2Stepper::Plan {
  std::vector<StepLayer> layers;
  std::vector<Buffer> memory;
  const StepLayer* device_layers = nullptr;
  const float* records = nullptr;
  int most_sides = 0;
  const int* side_begin = nullptr;
  float* exchange = nullptr;
  unsigned* launches = nullptr;
};

namespace {

/// Deals the rows of B, C and dt out so that all blocks have equally many bytes of a layer to read.
std::vector<int> share_sides(const StepParams& p, int blocks) {
  const int64_t row = int64_t{2} * p.d_model;
  const int state = kState * (p.state_type == DType::f32 ? 4 : 2);
  std::vector<int64_t> bytes;
  for (int i = 0; i < blocks; ++i) {
    bytes.push_back(Run(p.d_inner, i, blocks).n * (2 * row + state) +
                    Run(p.d_model, i, blocks).n * int64_t{2} * p.d_inner);
  }
  std::vector<int> n(bytes.size());
  for (int i = 0; i < p.n_side; ++i) {
    const auto least = std::min_element(bytes.begin(), bytes.end());
    *least += row;
    ++n[static_cast<size_t>(least - bytes.begin())];
  }
  std::vector<int> begin{0};
  for (const int of_block : n) begin.push_back(begin.back() + of_block);
  return begin;
}

/// What follows from how many rows of B, C and dt a block has at most.
void set_records(StepParams& p, int most_sides) {
  p.most_sides = most_sides;
  p.record_sides = round_up(p.most_channels * kChannelParams, 4);
  p.record_rows = p.record_sides + round_up(p.most_sides * kSideParams, 4);
  p.record = p.record_rows + round_up(p.most_rows * kRowParams, 4);
  p.side_window_pitch = round_up(p.most_sides, 8) + 16;
}

/// Places everything in shared memory; the ring takes what is left. False: too little is.
template <int B>
bool lay_out(StepParams& p) {
  const int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Layout& at = p.at;
  at.v_pitch = round_up(std::max(p.d_model, p.d_inner), 64) + 32;
  int shares = kSharedBytes<B> + round_up(B * at.v_pitch * 2, 16);
  const auto place = [&](Product product, int rows) {
    at.shares[product] = shares;
    shares += ceil_div(ceil_div(rows, kRows) * B, 8) * kGroupShares * 4;
  };
  place(kSides, p.most_sides);
  place(kX, p.most_channels);
  place(kZ, p.most_channels);
  place(kOut, p.most_rows);
  at.table = round_up(shares, 16);
  at.windows = round_up(p.record * 4, 128);
  at.side_windows = at.windows + round_up(B * (kConv - 1) * 2 * p.window_pitch, 128);
  at.small_bytes = at.side_windows + round_up(B * (kConv - 1) * 2 * p.side_window_pitch, 128);
  at.small = round_up(at.table + p.n_layer * static_cast<int>(sizeof(StepLayer)), 128);
  at.ring = at.small + 2 * at.small_bytes;
  at.ring_bytes = (shared_limit - at.ring) / 128 * 128;
  const int state = kState * (p.state_type == DType::f32 ? 4 : 2);
  // A warp holds 8 rows, while the ring's end may be too short for the next piece.
  const int widest = 2 * std::max(p.d_model, p.d_inner);
  at.piece_bytes = widest < kWideRow ? kMostPiece : kMostPiece / 2;
  const auto piece = [&] { return std::max(at.piece_bytes, widest); };
  while (at.piece_bytes > widest && kRows * widest + piece() > at.ring_bytes) at.piece_bytes /= 2;
  return p.most_sides <= 64 && p.most_rows <= kMaxRows &&
         kRows * widest + piece() <= at.ring_bytes && 2 * p.most_channels * state <= at.ring_bytes;
}

/// f(std::integral_constant<int, B>) with the least B that takes n_seq sequences.
template <typename F>
bool with_batch(int n_seq, F&& f) {
  if (n_seq == 1) return f(std::integral_constant<int, 1>{});
  if (n_seq == 2) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 4>{});
}

bool supports(const Mamba2Weights& w, std::span<const std::vector<Tensor>> state,
              const Batch& batch) {
  const Mamba2Layer& l = w.layers.front();
  const int64_t D = l.norm.dim(0);
  const int64_t E = l.gated_norm.dim(0);
  const int64_t width = E / w.n_group;
  const DType T = l.in_proj.dtype;
  const int64_t blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t channels = ceil_div(E, blocks);
  return batch.max_len == 1 && batch.n_seq <= kMostBatch &&
         D >= (batch.n_seq == 1   ? 0
               : batch.n_seq == 2 ? kMinWidthOfTwo
                                  : kMinWidthOfFour) &&
         batch.state_rounding() == Rounding::nearest && (T == DType::bf16 || T == DType::f16) &&
         w.lm_head.dtype == T && state.front()[0].dtype == T && state.front()[1].dim(3) == kState &&
         l.conv1d.dim(1) == kConv && D % kSpan == 0 && E % kSpan == 0 &&
         std::max(D, E) <= kMostColumns && channels <= kMaxChannels && w.n_group <= kMaxGroups &&
         blocks <= kMaxBlocks && width % 4 == 0 && width >= channels;
}

}  // namespace

Mamba2Stepper::Mamba2Stepper(Allocate allocate) : allocate_(std::move(allocate)) {}
Mamba2Stepper::~Mamba2Stepper() = default;

bool Mamba2Stepper::run(const Mamba2Weights& weights, const Tensor& logits, const Tensor& ids,
                        const Batch& batch, std::span<const std::vector<Tensor>> state,
                        cudaStream_t stream) {
  if (refused_ || !launches_together() || weights.layers.empty() ||
      !supports(weights, state, batch)) {
    return false;
  }
  const Mamba2Layer& l = weights.layers.front();
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  const auto n_layer = static_cast<int64_t>(weights.layers.size());
  StepParams p{};
  p.n_layer = static_cast<int>(n_layer);
  p.d_model = static_cast<int>(l.norm.dim(0));
  p.d_inner = static_cast<int>(l.gated_norm.dim(0));
  p.n_group = static_cast<int>(weights.n_group);
  p.n_bc = 2 * p.n_group * kState;
  p.n_side = p.n_bc + static_cast<int>(l.A.dim(0));
  p.head_dim = p.d_inner / static_cast<int>(l.A.dim(0));
  p.dt_min = weights.dt_min;
  p.dt_max = weights.dt_max;
  p.norm_first = l.norm.as<float>();
  p.most_channels = static_cast<int>(ceil_div(p.d_inner, blocks));
  p.most_rows = static_cast<int>(ceil_div(p.d_model, blocks));
  p.window_pitch = round_up(p.most_channels, 8) + 16;
  p.side_pitch = round_up(p.n_side, 4);
  p.block_pitch = round_up(blocks, 4);
  p.residual_at = kMostBatch * p.d_inner;
  p.sides_at = p.residual_at + kMostBatch * p.d_model;
  p.v_squares_at = p.sides_at + kMostBatch * p.side_pitch;
  p.squares_at = p.v_squares_at + kMostBatch * 2 * p.block_pitch;
  p.set = p.squares_at + kMostBatch * p.block_pitch;
  p.group_width = p.d_inner / p.n_group;
  set_inputs(p, weights, logits, ids, batch, state);
  p.head_rows = round_up(p.most_channels, kRows);
  const bool wide = p.d_model >= kWideModel;
  p.residual_late = wide ? 1200 : 700;
  p.v_late = wide ? 1500 : 700;
  p.squares_late = wide ? 2300 : 0;
  std::vector<StepLayer> layers;
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    const Mamba2Layer& w = weights.layers[i];
    layers.push_back({w.in_proj.data, w.out_proj.data, state[i][0].data, state[i][1].data});
  }
  Plan* plan = find_plan(plans_, layers);
  if (plan == nullptr) {
    auto made = std::make_unique<Plan>();
    made->layers = layers;
    const PlanMemory memory{allocate_, stream, made->memory};
    const std::vector<int> side_begin = share_sides(p, blocks);
    for (size_t i = 0; i + 1 < side_begin.size(); ++i) {
      made->most_sides = std::max(made->most_sides, side_begin[i + 1] - side_begin[i]);
    }
    made->side_begin = p.side_begin = memory.copy_of(side_begin);
    set_records(p, made->most_sides);
    auto* records = static_cast<float*>(memory.zeroed(n_layer * blocks * p.record * 4));
    for (size_t i = 0; i < layers.size(); ++i) {
      const Mamba2Layer& w = weights.layers[i];
      const bool last = i + 1 == layers.size();
      pack_kernel<<<static_cast<unsigned>(blocks), kMaxChannels, 0, stream>>>(
          records + static_cast<int64_t>(i) * blocks * p.record, p,
          {w.conv1d.as<float>(), w.conv1d_bias.as<float>(), w.in_proj_bias.as<float>(),
           w.dt_bias.as<float>(), w.A.as<float>(), w.D.as<float>(), w.gated_norm.as<float>(),
           w.out_proj_bias.as<float>(),
           last ? weights.norm_f.as<float>() : weights.layers[i + 1].norm.as<float>()});
      KRAIT_CUDA(cudaGetLastError());
    }
    made->device_layers = memory.copy_of(layers);
    made->records = records;
    made->exchange = static_cast<float*>(memory.zeroed(2 * p.set * 4));
    made->launches = static_cast<unsigned*>(memory.zeroed(sizeof(unsigned)));
    KRAIT_CUDA(cudaStreamSynchronize(stream));  // `layers` and `side_begin` go
    plans_.push_back(std::move(made));
    plan = plans_.back().get();
  }
  set_records(p, plan->most_sides);
  if (!with_batch(p.n_seq, [&](auto b) { return lay_out<decltype(b)::value>(p); })) return false;
  p.layers = plan->device_layers;
  p.side_begin = plan->side_begin;
  p.records = plan->records;
  p.exchange = plan->exchange;
  p.launches = plan->launches;
  const bool bf16 = l.in_proj.dtype == DType::bf16;
  return with_batch(p.n_seq, [&](auto b) {
    constexpr int B = decltype(b)::value;
    return launch_together(
        bf16 ? &mamba2_step_kernel<__nv_bfloat16, B> : &mamba2_step_kernel<__half, B>, blocks,
        kAllThreads, p.at.ring + p.at.ring_bytes, p, refused_, stream);
  });
}

}  // namespace krait::cuda
