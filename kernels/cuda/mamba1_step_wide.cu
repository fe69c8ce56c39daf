// mamba1_step_wide.cu - a decode step of a whole Mamba-1 model for up to 8 sequences, in one
// launch: the form for models of which a layer doesn't fit into the ring of mamba1_step.cu.
//
// As there, one block per SM stays for the whole step. Its producer warp walks through all the
// weights that the block will ever need and copies them into a ring in shared memory as fast as the
// ring empties; what the other warps have to wait for - the other blocks, three times a layer -
// costs nothing as long as the ring isn't full. So what is exchanged takes none of the ring's room,
// and nobody waits for a fence. A block owns a run of channels (its rows of in_proj for x and z,
// their convolution and state), a run of the rows of out_proj, and a run of the vocabulary. Per
// layer, with f the scale of the norm before and w the norm's weights:
//
//   1. v = in_proj_x u; x = silu(conv(v * scale / f)) of the own channels, scale from the squares
//      of all blocks; the own channels' share of x_proj x goes to a sum over all blocks;
//      z = in_proj_z u while the shares are on their way                    | dt_low, B, C
//   2. dt = softplus(dt_proj dt_low + bias); state update; y of the own channels          | y
//   3. residual += out_proj y, of the own rows; u = residual * f * w of these, rounded, and the sum
//      of their squares                                                    | u, squares
//
// and in the end logits = lm_head u * scale / f. Scaling by f keeps u within f16; whoever reads u
// does no more to it.
//
// Exchanges. u and y are exchanged in the weights' type, two neighbours a word, laid out as the
// tensor cores take them: a lane reads 16 bytes for each 32 columns of one sequence, from L2 into
// the registers that hold them during the product. Half the bytes of f32, no copy in shared memory.
// What is exchanged says itself whether it is there: a place is kAbsent before, two numbers that
// are not a number as no rounding leaves them. Two buffers take turns from layer to layer; a warp
// of each block empties its places in the one that all have read (empty_places() says when that
// is). A fence follows, so that they are empty before the block publishes anything more, hence
// before anybody looks there again; the other warps don't wait for that fence, which takes
// microseconds while weights stream. Two sets of buffers take turns from step to step: a step
// empties that of the next.
//   The sums of x_proj are as in mamba1_step.cu: integers, a share its value in fixed point with a
// count of one in the top byte; readers take the difference to the sum of the layer before, until
// the count is that of the blocks. Nothing depends on the order in which things arrive, so a step
// gives the same bits each time. All blocks are resident (cooperative launch), so every wait ends.
//
// Products: 8 rows of a weight against 8 columns, one per sequence, on the tensor cores
// (mma.m16n8k16, the weights in place of B). A warp has the columns (warp + 16 i) * 32 .. + 31 of
// every matrix. The warps' shares are summed through shared memory; there are four block-wide
// barriers a layer. dt_proj dt_low takes dt_low as the sum of two numbers of the weights' type,
// which is as good as f32.
//
// Launch   cooperative, one block per SM: 16 consumer warps, the producer, and empty_places()
// Needs    sm_90 (bulk copies), d_state 16, d_conv 4, sizes as in supports() of mamba1_step.cu and
//          in run() below; else the verbs
// Memory   besides the weights: x_proj transposed, and the channels' small parameters side by side,
//          100 bytes a channel and layer
// Errors   what is no number, and shares of a sum beyond 2^15, come out as NaN
// Bytes    the weights, and state read and written, once; from L2, blocks * n_seq * 2 * (d_model +
//          d_inner) a layer
// Measured H100 80GB HBM3, bf16, f32 state, tokens/s at batch 1, 2, 4, 8: 1.4b 929, 1,688, 3,168,
//          6,318; 2.8b 480, 904, 1,716, 3,339. With pieces of 1,536 columns 1.4b 913 and 6,178 (1,
//          8), with 1,024 2.8b 470 and 3,303; of 2,560 columns 2.8b 3% less at batch 8. With grid
//          barriers, and activations in shared memory, 2.8b 2,390 at batch 8. What mattered there:
//          no local memory, which doesn't fit into L1 beside the ring, and fences beside the other
//          warps, not among them (the end of phase 3 took 6,500 cycles with a fence). 34 KB on
//          their way at once were 6 to 15% slower, 84 and more 1 to 5%
// Same as  the verbs, one by one, as Mamba1::forward calls them; tests/unit/mamba1_step_test.cpp
#include <algorithm>

#include "kernels/cuda/block_sums.cuh"
#include "kernels/cuda/conv_ring.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mamba1_step.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/verbs.h"
#include "kernels/cuda/weight_ring.cuh"

namespace krait::cuda {
namespace {

constexpr int kWarps = 16;  // consumers
constexpr int kThreads = 32 * kWarps;
constexpr int kAllThreads = kThreads + 64;  // with the producer and the warp of empty_places()
constexpr int kRows = 8;                    // of a piece of a matrix
constexpr int kSpan = 32 * kWarps;          // columns of a matrix of which each warp has 32
constexpr int kHeld = 10;                   // spans of which a thread has its part in registers
// Bytes of a block on their way at once. With all of the ring some blocks get theirs long before
// others, and the slowest is whom all wait for.
constexpr int kMostFlying = 50 << 10;
constexpr int kState = 16;                // d_state
constexpr int kConv = 4;                  // d_conv
constexpr int kSeqs = 8;                  // there is room for
constexpr int kMaxChannels = 4 * kWarps;  // of a block: 8 a pair of warps in the state update
constexpr int kMaxRows = 32;              // of out_proj of a block: a lane each
constexpr int kTiles = kMaxChannels / 16;
constexpr int kChannelPitch = kMaxChannels + 16;
[[maybe_unused]] constexpr uint32_t kAbsent = 0xffffffffU;

// Of the warps' shares of the sums of 8 rows, in floats: row r of sequence s at s * 8 + r, and from
// a warp, and from 8 rows, to the next; 4 times 8 rows lie in different banks.
template <int B>
constexpr int kWarpPitch = B* kRows + 2;
template <int B>
constexpr int kGroupPitch = kWarps* kWarpPitch<B> + kRows;

constexpr int kSquares = 3;  // sums of squares that a lane reads
static_assert(kSquares * 4 * kWarps >= kMostSummands);

/// Neighbouring channels, or rows, are exchanged together.
struct PairRun : Run {
  __host__ __device__ PairRun(int total, int b, int blocks) : Run(total / 2, b, blocks) {
    begin *= 2;
    n *= 2;
  }
};

struct StepLayer {
  const void *in_proj, *x_proj_t, *dt_proj, *out_proj;  // x_proj_t [E, proj_pitch]: transposed
  void *conv_state, *ssm_state;
};

/// What a block needs of a layer besides matrices and states. For each of its channels: where it
/// lies in the block's record, in units of its number of channels. Then, for each of its rows of
/// out_proj, the weight of the next norm; then the bias.
enum Param {
  kConvWeight = 0,
  kA = kConv,  // times log2(e)
  kConvBias = kA + kState,
  kXBias,
  kZBias,
  kDtBias,
  kD,
  kParams
};

/// Where things lie in shared memory, in bytes (windows: from `small` on); pitches in elements.
struct Layout {
  int held, own, table, x, dbc, low, low_pitch, residual, squares, scale, shares, shares_bytes,
      small, small_bytes, windows, ring, ring_bytes;
};

struct StepParams {
  const StepLayer* layers;
  const float* records;  // [n_layer][blocks], each block's 16-byte aligned
  int record;            // floats
  int n_layer, d_model, d_inner, dt_rank, n_proj, proj_pitch, vocab_rows;
  const void *embedding, *head;
  const float *norm, *norm_f;  // of layer 0, of the head
  float eps, mixer_eps;
  const int32_t *ids, *slots;
  const int64_t* positions;
  int n_seq;
  float* logits;
  int64_t logits_stride;
  // [2 sets][x_proj: u64 [8][n_proj], [2 buffers][u: uint4 [d_model / 32][8][4], y: uint4
  // [d_inner / 32][8][4], squares: f32 [blocks][8]]]
  char* exchange;
  int64_t set_bytes, buffer_bytes;
  unsigned* launches;
  DType state_type;
  int most_channels, most_rows;
  int window_pitch;  // of what the convolution remembers, elements
  int groups;        // of 8 rows, whose sums over the warps there is room for
  Layout at;
};

/// What is a block's.
struct Own {
  PairRun channels, rows;  // of d_inner, d_model
  Run words;               // of the vocabulary
  unsigned live;           // bit n: there is a sequence n
  int slot[kSeqs];
  int oldest[kSeqs];  // row of conv_state
  char* set;          // of what is exchanged in this step
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// ---- words that all wait for --------------------------------------------------------------------

__device__ __forceinline__ void publish(uint32_t* to, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ bool absent(const uint4& v) {
  return v.x == kAbsent || v.y == kAbsent || v.z == kAbsent || v.w == kAbsent;
}
/// The word of elements d and d + 1 of u or y of a sequence: for each 32 elements and sequence,
/// four times what a lane gives the tensor cores, elements 2 q, 2 q + 1, 8 + 2 q, ..., 25 + 2 q.
__device__ __forceinline__ int place(int d, int seq) {
  return d / 32 * (kSeqs * 16) + seq * 16 + d % 8 / 2 * 4 + d % 32 / 8;
}

/// A barrier of the consumers alone.
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

__device__ __forceinline__ char* shared_at(int offset) {
  extern __shared__ __align__(128) char shared[];
  return shared + anew(offset);
}
template <typename V>
__device__ __forceinline__ V* shared_array(int offset) {
  return reinterpret_cast<V*>(shared_at(offset));
}
struct Thread {
  int warp, lane;
  __device__ __forceinline__ Thread() {
    const int tid = anew(static_cast<int>(threadIdx.x));
    warp = tid / 32;
    lane = tid % 32;
  }
};

// ---- the ring -----------------------------------------------------------------------------------

/// Pieces of any size one after the other in a circle of shared memory; a piece that would cross
/// the end starts at the beginning. The producer and every consumer warp walk through the same
/// sequence.
struct Ring {
  const StepParams& p;
  int at = 0;
  int piece = 0;  // of kRingPieces
  uint32_t parity = 0;

  __device__ uint32_t full_at(int i) const { return shared_address(shared_at(8 * i)); }
  __device__ uint32_t empty_at(int i) const {
    return shared_address(shared_at(8 * (kRingPieces + i)));
  }
  /// Where a piece of so many bytes lies.
  __device__ int place(int bytes) const { return at + bytes <= p.at.ring_bytes ? at : 0; }
  __device__ void advance(int place, int bytes) {
    at = place + bytes;
    if (++piece == kRingPieces) {
      piece = 0;
      parity ^= 1;
    }
  }
  __device__ const char* wait(int bytes) const {
    mbarrier_wait(full_at(piece), parity);
    return shared_at(p.at.ring + place(bytes));
  }
  /// Every warp must release every piece.
  __device__ void release(int bytes) {
    __syncwarp();
    if (warp_arrives()) mbarrier_arrive(empty_at(piece));
    advance(place(bytes), bytes);
  }
};

/// Bytes from row to row in the ring: 16 more than a row put eight rows into different banks.
__device__ __forceinline__ int row_pitch(int columns) { return 2 * columns + 16; }
/// Columns of the piece that begins at column `first`, of kSpans spans at most.
template <int kSpans>
__device__ __forceinline__ int piece_columns(int n_columns, int first) {
  return min(kSpans * kSpan, n_columns - first);
}

/// The barriers that follow those of the ring: of what a layer needs besides it.
__device__ __forceinline__ uint32_t small_full(int l) {
  return shared_address(shared_at(16 * kRingPieces + 8 * (l % 2)));
}
__device__ __forceinline__ uint32_t small_empty(int l) { return small_full(l) + 16; }
/// Those of the consumers and the warp of empty_places(), who wait for each other once a layer: u
/// has been read, and the places are empty.
__device__ __forceinline__ uint32_t u_read() {
  return shared_address(shared_at(16 * kRingPieces + 32));
}
__device__ __forceinline__ uint32_t places_empty() { return u_read() + 8; }
__device__ __forceinline__ const char* small_of(const StepParams& p, int l) {
  return shared_at(p.at.small + l % 2 * p.at.small_bytes);
}
__device__ __forceinline__ const Own& own_of(const StepParams& p) {
  return *shared_array<const Own>(p.at.own);
}
__device__ __forceinline__ bool lives(const Own& own, int seq) {
  return (own.live >> seq & 1) != 0;
}

/// Fills the ring, in the order in which the consumers walk through it. A warp.
struct Producer {
  const StepParams& p;
  Ring ring{p};
  uint64_t policy = evict_first_policy();
  RingRoom room{};

  /// Makes room; announces the bytes that will come.
  __device__ uint32_t begin(int bytes, int expected) {
    int* held = shared_array<int>(p.at.held);  // [kRingPieces]
    const int to = ring.place(bytes);
    const int need = bytes + (to == ring.at ? 0 : p.at.ring_bytes - ring.at);
    room.take(ring, held, p.at.ring_bytes, kMostFlying, need);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      held[ring.piece] = need;
      mbarrier_expect(ring.full_at(ring.piece), expected);
    }
    __syncwarp();
    room.taken(need);
    return shared_address(shared_at(p.at.ring + to));
  }
  __device__ void copy(uint32_t to, const void* from, int bytes) const {
    bulk_copy(to, from, bytes, ring.full_at(ring.piece), policy);
  }
  __device__ void end(int bytes) { ring.advance(ring.place(bytes), bytes); }

  /// n_columns of n rows of a matrix, `pitch` elements from row to row.
  template <int kSpans>
  __device__ void rows(const char* from, int n, int n_columns, int64_t pitch) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int row = 0; row < n; row += kRows) {
      const int here = min(kRows, n - row);
      for (int first = 0; first < n_columns; first += kSpans * kSpan) {
        const int columns = piece_columns<kSpans>(n_columns, first);
        const int bytes = here * row_pitch(columns);
        const uint32_t to = begin(bytes, here * 2 * columns);
        if (lane < here) {
          copy(to + lane * row_pitch(columns), from + 2 * ((row + lane) * pitch + first),
               2 * columns);
        }
        end(bytes);
      }
    }
  }
};

template <typename T, int B, int kSpans>
__device__ void produce(const StepParams& p) {
  Producer out{p};
  const Own& own = own_of(p);
  const int64_t D = p.d_model;
  const int64_t E = p.d_inner;
  const int R = p.dt_rank;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int n = own.channels.n;
  const int n_live = __popc(own.live);
  const int64_t first = own.channels.begin;
  const int state_row = kState * (p.state_type == DType::f32 ? 4 : 2);
  const int slot = lane < B ? own.slot[lane] : -1;
  const int oldest = lane < B ? own.oldest[lane] : 0;
  const auto at = [](const void* base, int64_t element) {
    return static_cast<const char*>(base) + element * static_cast<int64_t>(sizeof(T));
  };
  // A run of 16-bit values with the 16-byte lines it lies in.
  const int skew = static_cast<int>(first * 2 % 16);
  const int line_bytes = (skew + n * 2 + 15) / 16 * 16;
  const int record = ((n * kParams + 2 * own.rows.n) * 4 + 15) / 16 * 16;
  const int lines = n > 0 ? n_live * (kConv - 1) * line_bytes : 0;
  for (int l = 0; l < p.n_layer; ++l) {
    const StepLayer& w = shared_array<const StepLayer>(p.at.table)[l];
    mbarrier_wait(small_empty(l), static_cast<uint32_t>(l / 2 + 1) % 2);
    const uint32_t small = shared_address(small_of(p, l));
    if (lane == 0) {
      mbarrier_expect(small_full(l), record + lines);
      if (record > 0) {
        bulk_copy(small, p.records + (static_cast<int64_t>(l) * gridDim.x + blockIdx.x) * p.record,
                  record, small_full(l), out.policy);
      }
    }
    __syncwarp();
    if (lines > 0 && slot >= 0) {
      for (int j = 0; j < kConv - 1; ++j) {
        const int64_t row = static_cast<int64_t>(slot) * (kConv - 1) + conv_row<kConv>(oldest + j);
        bulk_copy(small + p.at.windows + (lane * (kConv - 1) + j) * 2 * p.window_pitch,
                  at(w.conv_state, row * E + first) - skew, line_bytes, small_full(l), out.policy);
      }
    }
    if (n > 0) {
      out.rows<kSpans>(at(w.in_proj, first * D), n, p.d_model, D);
      const int x_bytes = n * p.proj_pitch * 2;
      uint32_t to = out.begin(x_bytes, x_bytes);
      if (lane == 0) out.copy(to, at(w.x_proj_t, first * p.proj_pitch), x_bytes);
      out.end(x_bytes);
      out.rows<kSpans>(at(w.in_proj, (E + first) * D), n, p.d_model, D);
      const int dt_bytes = n * 2 * R;
      to = out.begin(dt_bytes, dt_bytes);
      if (lane == 0) out.copy(to, at(w.dt_proj, first * R), dt_bytes);
      out.end(dt_bytes);
      to = out.begin(B * n * state_row, n_live * n * state_row);
      if (slot >= 0) {
        out.copy(to + lane * n * state_row,
                 static_cast<const char*>(w.ssm_state) + (slot * E + first) * state_row,
                 n * state_row);
      }
      out.end(B * n * state_row);
    }
    for (int turn = 0; turn < p.d_inner; turn += kHeld * kSpan) {
      out.rows<kSpans>(at(w.out_proj, own.rows.begin * E + turn), own.rows.n,
                       min(kHeld * kSpan, p.d_inner - turn), E);
    }
  }
  out.rows<kSpans>(at(p.head, own.words.begin * D), own.words.n, p.d_model, D);
}

// ---- the places of what is exchanged ------------------------------------------------------------

/// Where u of layer l is exchanged; y and the squares follow.
__device__ __forceinline__ char* buffer_of(const StepParams& p, int l) {
  return own_of(p).set + int64_t{8} * kSeqs * anew(p.n_proj) + l % 2 * p.buffer_bytes;
}

/// Empties the own places in the buffer of the layer before, for the layer after. A warp: once its
/// block has read u of layer l, all blocks have published that, so all have read u and y of the
/// layer before; and nobody looks there again before this block has published y of layer l.
template <int B>
__device__ void empty_places(const StepParams& p) {
  const Own& own = own_of(p);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t y_at = int64_t{16} * p.d_model;
  const int64_t squares_at = y_at + int64_t{16} * p.d_inner;
#pragma unroll 1
  for (int l = 0; l < p.n_layer; ++l) {
    mbarrier_wait(u_read(), l % 2);
    char* buffer = buffer_of(p, l + 1);
    const auto empty = [&](char* places, const Run& run) {
      for (int i = lane; i < run.n / 2 * B; i += 32) {
        publish(reinterpret_cast<uint32_t*>(places) + place(run.begin + i / B * 2, i % B), kAbsent);
      }
    };
    empty(buffer, own.rows);
    empty(buffer + y_at, own.channels);
    if (lane < B) {
      publish(reinterpret_cast<uint32_t*>(buffer + squares_at) + blockIdx.x * kSeqs + lane,
              kAbsent);
    }
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    __syncwarp();
    if (warp_arrives()) mbarrier_arrive(places_empty());
  }
}

// ---- the consumers ------------------------------------------------------------------------------

/// v[i] = what the lane needs of columns (warp + 16 i) * 32 .. + 31 of u or y, as soon as it is
/// there. While the first that is missing stays away, only that is asked for again: what all blocks
/// ask for in vain takes L2's time from the weights.
template <int B>
__device__ __forceinline__ void gather(const StepParams& p, uint4 (&v)[kHeld], const char* from,
                                       int n_columns) {
  n_columns = anew(n_columns);
  const Thread t;
  const int seq = t.lane / 4 % B;
  const bool live = lives(own_of(p), seq);
  const uint4* at = reinterpret_cast<const uint4*>(from) + (t.warp * kSeqs + seq) * 4 + t.lane % 4;
  unsigned ask = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const bool wanted = live && (t.warp + i * kWarps) * 32 < n_columns;
    const uint32_t fill = wanted ? kAbsent : 0;
    v[i] = uint4{fill, fill, fill, fill};
    ask |= wanted ? 1U << i : 0;
  }
  unsigned missing;
  unsigned waiting;
  do {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %5, 0;\n"
          "@wanted ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
          "}\n"
          : "+r"(v[i].x), "+r"(v[i].y), "+r"(v[i].z), "+r"(v[i].w)
          : "l"(at + i * (kWarps * kSeqs * 4)), "r"(ask & (1U << i)));
    }
    missing = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) missing |= absent(v[i]) ? 1U << i : 0;
    waiting = __ballot_sync(0xffffffffU, missing != 0);
    ask = (ask & ~missing) != 0 ? missing : missing & (0U - missing);
  } while (waiting != 0);
}

/// The sums of squares of the residual that fall to a warp, those of every 16th block: for each
/// lane one sequence and every fourth of these blocks.
template <int B>
struct Squares {
  const uint32_t* from;
  uint32_t v[kSquares];

  __device__ __forceinline__ Squares(const StepParams& p, const char* table) {
    const Thread t;
    const int block = t.warp + kWarps * (t.lane / kSeqs);
    const bool live = lives(own_of(p), t.lane % kSeqs);
    from = reinterpret_cast<const uint32_t*>(table) + block * kSeqs + t.lane % kSeqs;
#pragma unroll
    for (int j = 0; j < kSquares; ++j) {
      v[j] = live && block + 4 * kWarps * j < static_cast<int>(gridDim.x) ? kAbsent : 0;
    }
  }
  __device__ __forceinline__ void look() {
#pragma unroll
    for (int j = 0; j < kSquares; ++j) {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.eq.u32 wanted, %0, 0xffffffff;\n"
          "@wanted ld.relaxed.gpu.global.u32 %0, [%1];\n"
          "}\n"
          : "+r"(v[j])
          : "l"(from + j * 4 * kWarps * kSeqs));
    }
  }
  /// To the warps' shares of the sums.
  __device__ __forceinline__ void finish(const StepParams& p) {
    while (__any_sync(0xffffffffU, v[0] == kAbsent || v[1] == kAbsent || v[2] == kAbsent)) look();
    float sum = __uint_as_float(v[0]) + __uint_as_float(v[1]) + __uint_as_float(v[2]);
    sum += __shfl_xor_sync(0xffffffffU, sum, 8);
    sum += __shfl_xor_sync(0xffffffffU, sum, 16);
    const Thread t;
    if (t.lane < B) shared_array<float>(p.at.squares)[t.lane * kWarps + t.warp] = sum;
  }
};

/// Of the own row `lane` and sequence `warp`.
__device__ __forceinline__ float& residual_of(const StepParams& p) {
  const Thread t;
  return shared_array<float>(p.at.residual)[t.warp * 32 + t.lane];
}

template <int B>
__device__ __forceinline__ float* shares_of(const StepParams& p, int i) {
  return shared_array<float>(p.at.shares + (i & 1) * p.at.shares_bytes);
}

/// The warp's part of n rows of the matrix in the ring times v goes to its place among the shares;
/// `more`: is added to what is there.
template <typename T, int B, int kSpans>
__device__ __forceinline__ void multiply(Ring& ring, int n, int n_columns, const uint4 (&v)[kHeld],
                                         float* shares, bool more = false) {
  n_columns = anew(n_columns);
  const Thread t;
  float* to = shares + t.warp * kWarpPitch<B> + t.lane * 2;
  // Of 32 columns, the first and third 8, then the second and fourth.
  const int column = t.lane / 16 * 16 + t.lane / 8 % 2 * 32 + t.warp * 64;
#pragma unroll 1
  for (int row = 0; row < n; row += kRows) {
    const int here = min(kRows, n - row);
    const int mine = min(t.lane % 8, here - 1);
    // v[j] are two products' sequences in one operand: its first 8 rows, of the first and third 8
    // columns, and its last 8 rows, of the others. The other halves of the sums mean nothing.
    float first[4] = {};
    float second[4] = {};
#pragma unroll
    for (int i = 0; i < kHeld; i += kSpans) {
      if (i * kSpan >= n_columns) break;
      const int pitch = row_pitch(piece_columns<kSpans>(n_columns, i * kSpan));
      const int bytes = here * pitch;
      const char* a = ring.wait(bytes) + mine * pitch + column;
#pragma unroll
      for (int j = i; j < i + kSpans && j < kHeld; ++j) {
        if ((t.warp + j * kWarps) * 32 >= n_columns) break;
        const uint32_t of_j[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
        uint32_t w[4];
        load_matrices(w, a + (j - i) * (kWarps * 64));
        multiply_add<T>(first, of_j, w[0], w[1]);
        multiply_add<T>(second, of_j, w[2], w[3]);
      }
      ring.release(bytes);
    }
    if (t.lane / 4 < B) {
      auto& share = *reinterpret_cast<float2*>(to + row / kRows * kGroupPitch<B>);
      const float2 before = more ? share : float2{0.0F, 0.0F};
      share = {before.x + (first[0] + second[2]), before.y + (first[1] + second[3])};
    }
  }
}
/// Row `row` of a product, of a sequence.
template <int B>
__device__ __forceinline__ float summed(const float* shares, int row, int seq) {
  const float* from = shares + row / kRows * kGroupPitch<B> + seq * kRows + row % kRows;
  float v[4] = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v[i % 4] += from[i * kWarpPitch<B>];
  return v[0] + v[1] + (v[2] + v[3]);
}

/// 1 / the root of the mean square of the residual.
__device__ __forceinline__ float norm_scale(const StepParams& p, int seq) {
  const float* squares = shared_array<const float>(p.at.squares) + seq * kWarps;
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kWarps; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(squares + i);
    sum += v.x + v.y + (v.z + v.w);
  }
  return rsqrtf(sum / static_cast<float>(anew(p.d_model)) + p.eps);
}
/// [B] what u of layer l was multiplied by.
template <int B>
__device__ __forceinline__ float* scale_of(const StepParams& p, int l) {
  return shared_array<float>(p.at.scale) + l % 2 * B;
}
/// [B] what the products with u of this layer are still to be multiplied by.
template <int B>
__device__ __forceinline__ float* left_of(const StepParams& p) {
  return shared_array<float>(p.at.scale) + 2 * B;
}

/// Two neighbours as they are exchanged.
template <typename T>
__device__ __forceinline__ uint32_t word_of(T first, T second) {
  const Pair<T> pair{{first, second}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/// u of layer l and the squares, of the own rows and a sequence, a row a lane.
template <typename T, int B>
__device__ __forceinline__ void publish_residual(const StepParams& p, int l, int seq,
                                                 float residual, float weight) {
  const Thread t;
  const Run rows = own_of(p).rows;
  const bool mine = t.lane < rows.n;
  const float u = residual * scale_of<B>(p, l)[seq] * weight;
  const float next = __shfl_down_sync(0xffffffffU, u, 1);
  char* now = buffer_of(p, l);
  if (mine && t.lane % 2 == 0) {
    const int at = place(rows.begin + t.lane, seq);
    publish(reinterpret_cast<uint32_t*>(now) + at, word_of(from_float<T>(u), from_float<T>(next)));
  }
  const float sum = warp_sum(mine ? residual * residual : 0.0F);
  if (t.lane == 0) {
    const int64_t at = int64_t{16} * (anew(p.d_model) + p.d_inner) + (blockIdx.x * kSeqs + seq) * 4;
    publish(reinterpret_cast<uint32_t*>(now + at), sum == sum ? __float_as_uint(sum) : 0x7fffffffU);
  }
}

/// Adds the share of the own channels in x_proj x to the sums over all blocks.
template <typename T, int B>
__device__ __forceinline__ void add_x_proj(const StepParams& p, Ring& ring) {
  const Thread t;
  const Own& own = own_of(p);
  const int group = t.lane / 4;
  const int quarter = t.lane % 4;
  const int n = own.channels.n;
  const int J = anew(p.n_proj);
  const int pitch = anew(p.proj_pitch) * 2;
  const int bytes = n * pitch;
  auto* sums = reinterpret_cast<unsigned long long*>(own.set);
  const T* x = shared_array<const T>(p.at.x) + group % B * kChannelPitch + quarter * 4;
  const char* piece = n > 0 ? ring.wait(bytes) : nullptr;
#pragma unroll 1
  for (int tile = t.warp; tile * 16 < J; tile += kWarps) {
    float acc[4] = {};
    // Of a last tile with less than 16 columns, what lies beyond them is not used.
    const int column_at = min(tile * 32 + t.lane / 8 % 2 * 16, pitch - 16);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (k * 16 >= n) break;
      const uint2 column = *reinterpret_cast<const uint2*>(x + k * 16);
      uint32_t a[4];
      load_transposed(
          a, piece + min(k * 16 + t.lane % 8 + t.lane / 16 * 8, n - 1) * pitch + column_at);
      multiply_add<T>(acc, a, column.x, column.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int seq = 2 * quarter + i % 2;
      const int out = tile * 16 + group + i / 2 * 8;
      if (seq < B && out < J && lives(own, seq)) add_share(sums + seq * J + out, acc[i]);
    }
  }
  if (n > 0) ring.release(bytes);
}

/// x = silu(conv(v)) of a channel and a sequence; v takes the place of the oldest input.
template <typename T>
__device__ __forceinline__ void convolve(const StepParams& p, int l, int channel, int seq,
                                         float v) {
  const Own& own = own_of(p);
  const int n = own.channels.n;
  const char* small = small_of(p, l);
  const float* record = reinterpret_cast<const float*>(small);
  const T* past = reinterpret_cast<const T*>(small + p.at.windows) +
                  seq * (kConv - 1) * p.window_pitch + own.channels.begin % 8 + channel;
  const float4 weight = *reinterpret_cast<const float4*>(record + channel * kConv);
  const T now = from_float<T>(v + record[kXBias * n + channel]);
  float s = fmaf(weight.x, to_float(past[0]), record[kConvBias * n + channel]);
  s = fmaf(weight.y, to_float(past[p.window_pitch]), s);
  s = fmaf(weight.z, to_float(past[2 * p.window_pitch]), s);
  s = fmaf(weight.w, to_float(now), s);
  shared_array<T>(p.at.x)[seq * kChannelPitch + permuted(channel)] = from_float<T>(silu(s));
  const int64_t row = static_cast<int64_t>(own.slot[seq]) * (kConv - 1) + own.oldest[seq];
  static_cast<T*>(shared_array<const StepLayer>(p.at.table)[l]
                      .conv_state)[row * p.d_inner + own.channels.begin + channel] = now;
}

/// dt_low as the sum of two numbers of type T: [2][B][low_pitch].
template <typename T, int B>
__device__ __forceinline__ void store_low(const StepParams& p, int seq, int j, float v) {
  T* to = shared_array<T>(p.at.low) + seq * p.at.low_pitch + j;
  const T high = from_float<T>(v);
  to[0] = high;
  to[B * p.at.low_pitch] = from_float<T>(v - to_float(high));
}

/// dt_low, B and C from the sums over all blocks; the warps divide them by sequence. A thread has
/// seen those up to the layer before.
template <typename T, int B, int kSums>
__device__ __forceinline__ void read_dbc(const StepParams& p, int l,
                                         unsigned long long (&seen)[kSums]) {
  constexpr int kStride = kThreads / B;
  const Thread t;
  const int J = anew(p.n_proj);
  const int R = anew(p.dt_rank);
  const int seq = t.warp % B;
  const int first = t.warp / B * 32 + t.lane;
  const auto* at = reinterpret_cast<const unsigned long long*>(own_of(p).set) + seq * J + first;
  const bool live = lives(own_of(p), seq);
  float* dbc = shared_array<float>(p.at.dbc);  // [B][n_proj]
  unsigned wanted = 0;
  unsigned long long word[kSums];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    word[k] = 0;
    if (first + k * kStride < J && live) wanted |= 1U << k;
  }
  unsigned missing = wanted;
  do {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %2, 0;\n"
          "@wanted ld.relaxed.gpu.global.u64 %0, [%1];\n"
          "}\n"
          : "+l"(word[k])
          : "l"(at + k * kStride), "r"(missing & (1U << k)));
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      if (complete(word[k] - seen[k])) missing &= ~(1U << k);
    }
  } while (__any_sync(0xffffffffU, missing != 0));
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    if ((wanted >> k & 1) == 0) continue;
    const int j = first + k * kStride;
    const float v = total_of(word[k] - seen[k]);
    seen[k] = word[k];
    if (j < R && p.mixer_eps <= 0.0F) {
      store_low<T, B>(p, seq, j, v);
    } else {
      dbc[seq * J + j] = v;
    }
  }
  consumers_sync();
  mbarrier_wait(places_empty(), l % 2);
  if (p.mixer_eps > 0.0F) {  // Falcon-Mamba: dt_low, B and C each by its root mean square
#pragma unroll 1
    for (int unit = t.warp; unit < 3 * B; unit += kWarps) {
      const int part = unit % 3;
      const int width = part == 0 ? R : kState;
      float* v = dbc + unit / 3 * J + (part == 0 ? 0 : R + (part - 1) * kState);
      float sum = 0.0F;
#pragma unroll 1
      for (int i = t.lane; i < width; i += 32) sum += v[i] * v[i];
      const float f = rsqrtf(warp_sum(sum) / static_cast<float>(width) + p.mixer_eps);
#pragma unroll 1
      for (int i = t.lane; i < width; i += 32) {
        if (part == 0) {
          store_low<T, B>(p, unit / 3, i, v[i] * f);
        } else {
          v[i] *= f;
        }
      }
    }
    consumers_sync();
  }
}

/// The sum of v[q % N] over the four lanes of a quad, in lane q of it.
template <int N>
__device__ __forceinline__ float quad_sum(const float (&v)[N], int q) {
  static_assert(N == 1 || N == 2 || N == 4);
  const auto other = [](float f, int d) { return __shfl_xor_sync(0xffffffffU, f, d); };
  float even;
  float odd;
  if constexpr (N == 4) {
    const bool upper = q >= 2;
    even = (upper ? v[2] : v[0]) + other(upper ? v[0] : v[2], 2);
    odd = (upper ? v[3] : v[1]) + other(upper ? v[1] : v[3], 2);
  } else {
    even = v[0] + other(v[0], 2);
    odd = N == 1 ? even : v[N - 1] + other(v[N - 1], 2);
  }
  return q % 2 == 0 ? even + other(odd, 1) : odd + other(even, 1);
}

/// A lane's 4 states of a channel and a sequence, and what they give to y.
template <typename S>
__device__ __forceinline__ float advance_state(void* to, const char* from, float step, float dx,
                                               float4 A, float4 of_B, float4 of_C) {
  const auto old = *reinterpret_cast<const Quad<S>*>(from);
  const float h[4] = {fmaf(exp2_fast(step * A.x), to_float(old.v[0]), dx * of_B.x),
                      fmaf(exp2_fast(step * A.y), to_float(old.v[1]), dx * of_B.y),
                      fmaf(exp2_fast(step * A.z), to_float(old.v[2]), dx * of_B.z),
                      fmaf(exp2_fast(step * A.w), to_float(old.v[3]), dx * of_B.w)};
  *static_cast<Quad<S>*>(to) = {from_float<S>(h[0]), from_float<S>(h[1]), from_float<S>(h[2]),
                                from_float<S>(h[3])};
  return fmaf(of_C.x, h[0], of_C.y * h[1]) + fmaf(of_C.z, h[2], of_C.w * h[3]);
}

/// dt, the state and y of the own channels: two warps share 8 channels, each has half of the
/// sequences; four lanes share a channel, 4 states each. z is still among the warps' shares.
template <typename T, int B>
__device__ __forceinline__ void update_state(const StepParams& p, Ring& ring, int l,
                                             const float* z_shares, char* y) {
  constexpr int kHalves = B > 1 ? 2 : 1;
  constexpr int kHere = B / kHalves;  // sequences of a warp
  const Thread t;
  const Own& own = own_of(p);
  const int n = own.channels.n;
  const int R = anew(p.dt_rank);
  const int group = t.lane / 4;
  const int quarter = t.lane % 4;
  const int tile = t.warp / kHalves;
  const int seq0 = t.warp % kHalves * kHere;
  const bool busy = tile * 8 < n;
  const bool inside = tile * 8 + group < n;
  const int channel = min(tile * 8 + group, n - 1);
  const float* record = reinterpret_cast<const float*>(small_of(p, l));
  const T* x_of = shared_array<const T>(p.at.x) + permuted(channel);

  // Of sequences 2 quarter and 2 quarter + 1.
  const int dt_bytes = n * 2 * R;
  const char* piece = ring.wait(dt_bytes);
  float step[2] = {};
  float dx[2] = {};
  if (busy) {
    // Of 32 columns a lane takes 8 neighbours of its row: 2, 2 and 2, 2 as two products want them.
    const char* row = piece + channel * 2 * R + quarter * 16;
    const T* low = shared_array<const T>(p.at.low) + group % B * p.at.low_pitch + 8 * quarter;
    float acc[2][4] = {};
#pragma unroll 2
    for (int k = 0; k < R; k += 32) {
      uint4 a{0, 0, 0, 0};
      if (k + 8 * quarter < R) a = *reinterpret_cast<const uint4*>(row + 2 * k);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 x = *reinterpret_cast<const uint4*>(low + h * B * p.at.low_pitch + k);
        multiply_add<T>(acc[h], {a.x, 0, a.y, 0}, x.x, x.y);
        multiply_add<T>(acc[h], {a.z, 0, a.w, 0}, x.z, x.w);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int seq = min(2 * quarter + i, B - 1);
      step[i] = softplus(acc[0][i] + acc[1][i] + record[kDtBias * n + channel]);
      dx[i] = step[i] * to_float(x_of[seq * kChannelPitch]);
    }
  }
  ring.release(dt_bytes);

  const int row_bytes = anew(kState) * (p.state_type == DType::f32 ? 4 : 2);
  const char* states = ring.wait(B * n * row_bytes);
  if (busy) {
    const float4 A =
        *reinterpret_cast<const float4*>(record + kA * n + channel * kState + 4 * quarter);
    char* to = static_cast<char*>(shared_array<const StepLayer>(p.at.table)[l].ssm_state) +
               quarter * (row_bytes / 4);
    float y_share[kHere];
    float z_share[kHere];
#pragma unroll
    for (int j = 0; j < kHere; ++j) {
      const int seq = seq0 + j;
      const int from = (t.lane & ~3) + seq / 2;
      const float s = __shfl_sync(0xffffffffU, seq % 2 == 0 ? step[0] : step[1], from);
      const float d = __shfl_sync(0xffffffffU, seq % 2 == 0 ? dx[0] : dx[1], from);
      const float* z =
          z_shares + tile * kGroupPitch<B> + 4 * quarter * kWarpPitch<B> + seq * kRows + group;
      z_share[j] = z[0] + z[kWarpPitch<B>] + (z[2 * kWarpPitch<B>] + z[3 * kWarpPitch<B>]);
      y_share[j] = 0.0F;
      if (!inside || !lives(own, seq)) continue;
      const float* dbc = shared_array<const float>(p.at.dbc) + seq * p.n_proj + R + 4 * quarter;
      const float4 of_B = *reinterpret_cast<const float4*>(dbc);
      const float4 of_C = *reinterpret_cast<const float4*>(dbc + kState);
      char* state =
          to + (own.slot[seq] * static_cast<int64_t>(p.d_inner) + own.channels.begin + channel) *
                   row_bytes;
      const char* old = states + (seq * n + channel) * row_bytes + quarter * (row_bytes / 4);
      with_state_type(p.state_type, [&](auto type) {
        y_share[j] = advance_state<decltype(type)>(state, old, s, d, A, of_B, of_C);
      });
    }
    const int seq = seq0 + quarter % kHere;
    const float z = to_float(from_float<T>(
        fmaf(quad_sum(z_share, quarter), left_of<B>(p)[seq], record[kZBias * n + channel])));
    const float gated = fmaf(record[kD * n + channel], to_float(x_of[seq * kChannelPitch]),
                             quad_sum(y_share, quarter)) *
                        silu(z);
    const float next = __shfl_down_sync(0xffffffffU, gated, 4);
    if (inside && group % 2 == 0 && quarter < kHere && lives(own, seq)) {
      const int at = place(own.channels.begin + channel, seq);
      publish(reinterpret_cast<uint32_t*>(y) + at,
              word_of(from_float<T>(gated), from_float<T>(next)));
    }
  }
  ring.release(B * n * row_bytes);
}

template <typename T, int B, int kSums, int kTurns, int kSpans>
__device__ void consume(const StepParams& p) {
  Ring ring{p};
  const int D = p.d_model;
  const int E = p.d_inner;
  {
    const Thread t;
    const int64_t sum_bytes = int64_t{8} * kSeqs * p.n_proj;
    auto* other_set = reinterpret_cast<uint4*>(
        own_of(p).set == p.exchange ? p.exchange + p.set_bytes : p.exchange);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + t.warp * 32 + t.lane;
         i < p.set_bytes / 16; i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const uint32_t fill = i < sum_bytes / 16 ? 0 : kAbsent;
      other_set[i] = uint4{fill, fill, fill, fill};
    }
    if (t.warp == 0 && t.lane < B) scale_of<B>(p, 0)[t.lane] = 1.0F;
  }
  const auto u_of = [&](int l) { return buffer_of(p, l); };
  const auto y_of = [&](int l) { return u_of(l) + int64_t{16} * anew(D); };
  const auto squares_of = [&](int l) { return y_of(l) + int64_t{16} * anew(E); };

  consumers_sync();
  {
    const Thread t;
    const Own& own = own_of(p);
    if (t.warp < B && lives(own, t.warp)) {
      float weight = 0.0F;
      float& residual = residual_of(p);
      residual = 0.0F;
      if (t.lane < own.rows.n) {
        residual = to_float(static_cast<const T*>(
            p.embedding)[static_cast<int64_t>(p.ids[t.warp]) * D + own.rows.begin + t.lane]);
        weight = p.norm[own.rows.begin + t.lane];
      }
      publish_residual<T, B>(p, 0, t.warp, residual, weight);
    }
  }
  uint4 v[kHeld];
  unsigned long long seen[kSums] = {};

#pragma unroll 1
  for (int l = 0; l < p.n_layer; ++l) {
    // 1
    {
      gather<B>(p, v, u_of(l), D);
      Squares<B> squares(p, squares_of(l));
      squares.look();
      multiply<T, B, kSpans>(ring, own_of(p).channels.n, D, v, shares_of<B>(p, l));
      squares.finish(p);
    }
    __syncwarp();
    if (warp_arrives()) mbarrier_arrive(u_read());
    consumers_sync();
    mbarrier_wait(small_full(l), static_cast<uint32_t>(l / 2) % 2);
    {
      const Thread t;
      const float* scale = scale_of<B>(p, l);
      if (t.warp == kWarps - 1 && t.lane < B) {
        const float s = norm_scale(p, t.lane);
        left_of<B>(p)[t.lane] = __fdividef(s, scale[t.lane]);
        scale_of<B>(p, l + 1)[t.lane] = s;
      }
      const int seq = t.warp % B;
      const int channel = t.warp / B * 32 + t.lane;
      if (channel < own_of(p).channels.n && lives(own_of(p), seq)) {
        convolve<T>(p, l, channel, seq,
                    summed<B>(shares_of<B>(p, l), channel, seq) *
                        __fdividef(norm_scale(p, seq), scale[seq]));
      }
    }
    consumers_sync();
    add_x_proj<T, B>(p, ring);
    multiply<T, B, kSpans>(ring, own_of(p).channels.n, D, v, shares_of<B>(p, l + 1));

    // 2
    read_dbc<T, B>(p, l, seen);
    if (own_of(p).channels.n > 0) {
      update_state<T, B>(p, ring, l, shares_of<B>(p, l + 1), y_of(l));
    }

    // 3
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int first = turn * kHeld * kSpan;
      const int columns = min(kHeld * kSpan, anew(E) - first);
      gather<B>(p, v, y_of(l) + first * (2 * kSeqs), columns);
      multiply<T, B, kSpans>(ring, own_of(p).rows.n, columns, v, shares_of<B>(p, l), turn > 0);
    }
    consumers_sync();
    {
      const Thread t;
      const Own& own = own_of(p);
      if (t.warp < B && lives(own, t.warp)) {
        float weight = 0.0F;
        float& residual = residual_of(p);
        if (t.lane < own.rows.n) {
          const float* of_row =
              reinterpret_cast<const float*>(small_of(p, l)) + kParams * own.channels.n + t.lane;
          weight = of_row[0];
          residual += summed<B>(shares_of<B>(p, l), t.lane, t.warp) + of_row[own.rows.n];
        }
        publish_residual<T, B>(p, l + 1, t.warp, residual, weight);
      }
    }
    __syncwarp();
    if (warp_arrives()) mbarrier_arrive(small_empty(l));
  }

  const int end = p.n_layer;
  {
    gather<B>(p, v, u_of(end), D);
    Squares<B> squares(p, squares_of(end));
    squares.finish(p);
  }
  const int head_rows = p.groups * kRows;
  const Run words = own_of(p).words;
#pragma unroll 1
  for (int first = 0; first < words.n; first += head_rows) {
    const int here = min(head_rows, words.n - first);
    float* shares = shares_of<B>(p, end + first / head_rows);
    multiply<T, B, kSpans>(ring, here, D, v, shares);
    consumers_sync();
    const Thread t;
    const int seq = t.warp % B;
    const int row = t.warp / B * 32 + t.lane;
    if (row < here && lives(own_of(p), seq)) {
      p.logits[seq * p.logits_stride + words.begin + first + row] =
          summed<B>(shares, row, seq) * __fdividef(norm_scale(p, seq), scale_of<B>(p, end)[seq]);
    }
  }
  // Everybody has read it, or could not have published what this block has waited for.
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.launches += 1;
}

template <typename T, int B, int kSums, int kTurns, int kSpans>
__global__ void __launch_bounds__(kAllThreads, 1)
    mamba1_step_wide_kernel(const __grid_constant__ StepParams p) {
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  if (tid == 0) {
    const Ring ring{p};
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(small_full(i), 1);
      mbarrier_init(small_empty(i), kWarps * kWarpArrivals);
    }
    mbarrier_init(u_read(), kWarps * kWarpArrivals);
    mbarrier_init(places_empty(), kWarpArrivals);
    for (int i = 0; i < kRingPieces; ++i) {
      mbarrier_init(ring.full_at(i), 1);
      mbarrier_init(ring.empty_at(i), kWarps * kWarpArrivals);
    }
    mbarrier_init_done();
    Own own{PairRun(p.d_inner, block, blocks),
            PairRun(p.d_model, block, blocks),
            Run(p.vocab_rows, block, blocks),
            0,
            {},
            {},
            p.exchange + __ldcg(p.launches) % 2 * p.set_bytes};
    for (int i = 0; i < kSeqs; ++i) {
      own.slot[i] = i < p.n_seq ? p.slots[i] : -1;
      own.oldest[i] = i < p.n_seq ? conv_row<kConv>(p.positions[i]) : 0;
      if (own.slot[i] >= 0) own.live |= 1U << i;
    }
    *shared_array<Own>(p.at.own) = own;
  }
  const int words = p.n_layer * static_cast<int>(sizeof(StepLayer) / 8);
  for (int i = tid; i < words; i += kAllThreads) {
    shared_array<uint64_t>(p.at.table)[i] = reinterpret_cast<const uint64_t*>(p.layers)[i];
  }
  // What no sequence and no channel fills is read all the same.
  for (int i = p.at.x + 4 * tid; i < p.at.squares; i += 4 * kAllThreads) {
    *shared_array<unsigned>(i) = 0;
  }
  __syncthreads();
  if (tid / 32 == kWarps) {
    produce<T, B, kSpans>(p);
  } else if (tid / 32 > kWarps) {
    empty_places<B>(p);
  } else {
    consume<T, B, kSums, kTurns, kSpans>(p);
  }
}

#else

template <typename T, int B, int kSums, int kTurns, int kSpans>
__global__ void mamba1_step_wide_kernel(const __grid_constant__ StepParams) {}

#endif

struct RecordParams {
  const float *conv, *conv_bias, *in_bias, *dt_bias, *A, *D;
  const float *next_norm, *out_bias;
};

/// The parameters of the channels and rows of each block, side by side.
__global__ void pack_kernel(float* to, int record, RecordParams w, int d_inner, int d_model) {
  const auto block = static_cast<int>(blockIdx.x);
  const PairRun run(d_inner, block, static_cast<int>(gridDim.x));
  const PairRun rows(d_model, block, static_cast<int>(gridDim.x));
  const auto threads = static_cast<int>(blockDim.x);
  float* mine = to + static_cast<int64_t>(block) * record;
  for (int c = static_cast<int>(threadIdx.x); c < run.n; c += threads) {
    const int e = run.begin + c;
    for (int i = 0; i < kConv; ++i) mine[c * kConv + i] = w.conv[e * kConv + i];
    for (int i = 0; i < kState; ++i) {
      mine[kA * run.n + c * kState + i] = w.A[e * kState + i] * kLog2e;
    }
    const auto put = [&](int at, const float* from, int i) {
      mine[at * run.n + c] = from != nullptr ? from[i] : 0.0F;
    };
    put(kConvBias, w.conv_bias, e);
    put(kXBias, w.in_bias, e);
    put(kZBias, w.in_bias, d_inner + e);
    put(kDtBias, w.dt_bias, e);
    put(kD, w.D, e);
  }
  float* of_rows = mine + kParams * run.n;
  for (int r = static_cast<int>(threadIdx.x); r < rows.n; r += threads) {
    of_rows[r] = w.next_norm[rows.begin + r];
    of_rows[rows.n + r] = w.out_bias != nullptr ? w.out_bias[rows.begin + r] : 0.0F;
  }
}

}  // namespace

/// Everything prepared for one model and the states of one pool.
struct Mamba1WideStepper::Plan {
  std::vector<StepLayer> layers;  // what the device has, but for x_proj_t: the plan's identity
  std::vector<Buffer> memory;
  const StepLayer* device_layers = nullptr;
  const float* records = nullptr;
  char* exchange = nullptr;
  unsigned* launches = nullptr;
};

namespace {

/// Places everything in shared memory; the ring takes what is left. False: too little is.
template <int B>
bool lay_out(StepParams& p, int spans) {
  const int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Layout& at = p.at;
  int next = 2 * 8 * kRingPieces + 48;
  const auto place = [&](int bytes) {
    const int here = next;
    next += round_up(bytes, 16);
    return here;
  };
  at.held = place(kRingPieces * 4);
  at.own = place(sizeof(Own));
  at.table = place(p.n_layer * static_cast<int>(sizeof(StepLayer)));
  at.x = place(B * kChannelPitch * 2);
  at.dbc = place(B * p.n_proj * 4);
  // Two rows of dt_low lie in different banks.
  at.low_pitch = round_up(p.dt_rank, 32) / 32 % 2 == 1 ? round_up(p.dt_rank, 32)
                                                       : round_up(p.dt_rank, 32) + 32;
  at.low = place(2 * B * at.low_pitch * 2);
  at.residual = place(B * 32 * 4);
  at.squares = place(B * kWarps * 4);
  at.scale = place(3 * B * 4);
  p.groups = static_cast<int>(ceil_div(std::max(p.most_channels, p.most_rows), kRows));
  at.shares_bytes = p.groups * kGroupPitch<B> * 4;
  at.shares = place(2 * at.shares_bytes);
  at.windows = round_up(p.record * 4, 128);
  at.small_bytes = at.windows + round_up(B * (kConv - 1) * 2 * p.window_pitch, 128);
  next = round_up(next, 128);
  at.small = place(2 * at.small_bytes);
  at.ring = round_up(next, 128);
  at.ring_bytes = (shared_limit - at.ring) / 128 * 128;
  const int state = kState * (p.state_type == DType::f32 ? 4 : 2);
  const int piece = std::max({kRows * (2 * spans * kSpan + 16), p.most_channels * p.proj_pitch * 2,
                              p.most_channels * p.dt_rank * 2, p.most_channels * B * state});
  return at.ring_bytes >= 2 * piece;
}

template <typename T, int B, int kSums, int kTurns, int kSpans>
bool launch_step(StepParams p, int blocks, bool& refused, cudaStream_t stream) {
  return lay_out<B>(p, kSpans) &&
         launch_together(&mamba1_step_wide_kernel<T, B, kSums, kTurns, kSpans>, blocks, kAllThreads,
                         p.at.ring + p.at.ring_bytes, p, refused, stream);
}

/// A thread reads as many sums of x_proj as registers are kept for (192 rows, as in 2.8b, or 288,
/// as in 7b), and y in one or two turns.
template <typename T, int B>
bool launch_step(const StepParams& p, int blocks, bool& refused, cudaStream_t stream) {
  constexpr auto kFew = static_cast<int>(ceil_div(192 * B, kThreads));
  constexpr auto kMany = static_cast<int>(ceil_div(288 * B, kThreads));
  const int64_t sums = ceil_div(p.n_proj, kThreads / B);
  const int64_t turns = ceil_div(p.d_inner, kHeld * kSpan);
  if (sums <= kFew && turns == 1) {
    // Three spans a piece where that makes fewer pieces of a row of d_model, else two, which are
    // more alike.
    const int64_t spans = ceil_div(p.d_model, kSpan);
    return ceil_div(spans, 3) < ceil_div(spans, 2)
               ? launch_step<T, B, kFew, 1, 3>(p, blocks, refused, stream)
               : launch_step<T, B, kFew, 1, 2>(p, blocks, refused, stream);
  }
  return sums <= kMany && turns <= 2 && launch_step<T, B, kMany, 2, 2>(p, blocks, refused, stream);
}

template <typename T>
bool launch_step(const StepParams& p, int blocks, bool& refused, cudaStream_t stream) {
  if (p.n_seq == 1) return launch_step<T, 1>(p, blocks, refused, stream);
  if (p.n_seq == 2) return launch_step<T, 2>(p, blocks, refused, stream);
  return p.n_seq <= 4 ? launch_step<T, 4>(p, blocks, refused, stream)
                      : launch_step<T, 8>(p, blocks, refused, stream);
}

StepLayer pointers(const Mamba1Layer& w, const std::vector<Tensor>& state) {
  return {w.in_proj.data, nullptr, w.dt_proj.data, w.out_proj.data, state[0].data, state[1].data};
}

}  // namespace

Mamba1WideStepper::Mamba1WideStepper(Allocate allocate) : allocate_(std::move(allocate)) {}
Mamba1WideStepper::~Mamba1WideStepper() = default;

bool Mamba1WideStepper::run(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
                            const Batch& batch, std::span<const std::vector<Tensor>> state,
                            cudaStream_t stream) {
  if (refused_) return false;
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
  p.most_channels = static_cast<int>(2 * ceil_div(E / 2, blocks));
  p.most_rows = static_cast<int>(2 * ceil_div(D / 2, blocks));
  if (blocks > kMostSummands || p.most_channels > kMaxChannels || p.most_rows > kMaxRows ||
      D > kHeld * kSpan) {
    return false;
  }
  p.window_pitch = round_up(p.most_channels, 8) + 16;
  p.record = round_up(p.most_channels * kParams + 2 * p.most_rows, 4);
  p.norm = l.norm.as<float>();
  p.buffer_bytes = 16 * (D + E) + int64_t{4} * kSeqs * blocks;
  p.set_bytes = int64_t{8} * kSeqs * J + 2 * p.buffer_bytes;
  set_inputs(p, weights, logits, ids, batch, state);

  std::vector<StepLayer> layers;
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    layers.push_back(pointers(weights.layers[i], state[i]));
  }
  Plan* plan = find_plan(plans_, layers);
  if (plan == nullptr) {
    auto made = std::make_unique<Plan>();
    made->layers = layers;
    const PlanMemory memory{allocate_, stream, made->memory};
    const auto fill = [&](void* at, int byte, int64_t bytes) {
      KRAIT_CUDA(cudaMemsetAsync(at, byte, static_cast<size_t>(bytes), stream));
    };
    const int64_t proj_bytes = E * p.proj_pitch * 2;
    auto* transposed = static_cast<char*>(memory.keep(n_layer * proj_bytes));
    auto* records = static_cast<float*>(memory.keep(n_layer * blocks * p.record * 4));
    for (size_t i = 0; i < layers.size(); ++i) {
      const Mamba1Layer& w = weights.layers[i];
      void* to = transposed + static_cast<int64_t>(i) * proj_bytes;
      transpose_kernel<<<static_cast<unsigned>(ceil_div(proj_bytes / 2, 256)), 256, 0, stream>>>(
          static_cast<uint16_t*>(to), w.x_proj.as<uint16_t>(), J, E, p.proj_pitch);
      KRAIT_CUDA(cudaGetLastError());
      layers[i].x_proj_t = to;
      const Tensor& next_norm = i + 1 < layers.size() ? weights.layers[i + 1].norm : weights.norm_f;
      pack_kernel<<<static_cast<unsigned>(blocks), kMaxChannels, 0, stream>>>(
          records + static_cast<int64_t>(i) * blocks * p.record, p.record,
          {w.conv1d.as<float>(), w.conv1d_bias.as<float>(), w.in_proj_bias.as<float>(),
           w.dt_bias.as<float>(), w.A.as<float>(), w.D.as<float>(), next_norm.as<float>(),
           w.out_proj_bias.as<float>()},
          p.d_inner, p.d_model);
      KRAIT_CUDA(cudaGetLastError());
    }
    made->device_layers = memory.copy_of(layers);
    made->records = records;
    made->exchange = static_cast<char*>(memory.keep(2 * p.set_bytes));
    for (int set = 0; set < 2; ++set) {
      char* at = made->exchange + set * p.set_bytes;
      fill(at, 0, p.set_bytes - 2 * p.buffer_bytes);
      fill(at + p.set_bytes - 2 * p.buffer_bytes, 0xff, 2 * p.buffer_bytes);
    }
    made->launches = static_cast<unsigned*>(memory.zeroed(sizeof(unsigned)));
    KRAIT_CUDA(cudaStreamSynchronize(stream));  // `layers` goes
    plans_.push_back(std::move(made));
    plan = plans_.back().get();
  }
  p.layers = plan->device_layers;
  p.records = plan->records;
  p.exchange = plan->exchange;
  p.launches = plan->launches;
  return l.in_proj.dtype == DType::bf16 ? launch_step<__nv_bfloat16>(p, blocks, refused_, stream)
                                        : launch_step<__half>(p, blocks, refused_, stream);
}

}  // namespace krait::cuda
