// mamba2_chunks.cu - the Mamba-2 recurrence over whole sequences by matrix products on chunks of
// tokens (state space duality, Dao & Gu 2024, section 6), on tensor cores.
//
//   dt_t = clamp(softplus(dt_raw + dt_bias));  sum_t = dt_0 A + ... + dt_t A inside a chunk, <= 0
//   M_ts = (C_t . B_s) exp(sum_t - sum_s) dt_s    for s <= t, else 0             [Q, Q]
//   Y    = M X + exp(sum_t) C S + D X                                            [Q, P]
//   S    = exp(sum_last) S + X^T (exp(sum_last - sum_s) dt_s B_s)                [P, N]
//
// per head, S being the state before the chunk, then after it. Decays are taken of differences of
// sums, which can't overflow; tokens past the end have dt = 0, x = 0 and change nothing.
//
// A block walks the chunks of two heads of a group one after the other, which share its tiles of B
// and C: four warps, a team, per head. S stays in the registers of the team in f32 from the first
// chunk to the last; a copy rounded to T lies in shared memory as an operand. C B^T comes as
// accumulators, which, weighted and rounded, are the operand of M X. Products run while the next
// operands are made; the next chunk is on its way to shared memory meanwhile.
//
// One sequence has too few heads to fill a GPU. Then its chunks are cut into segments, and a first
// launch brings each segment's own state (from zero; the first from ssm_state) to `scratch`; a
// block of the second launch begins with the chain of the segments before its own:
//   S = exp(sum over a segment) S + that segment's state
//
// Shapes   as ssd_scan in kernels/ops.h; P = 64, N = 64 or 128; T bf16 or f16; rows of x, B, C and
//          y begin at multiples of 16 bytes. Everything else goes to mamba2_scan.cu, and so does
//          everything on devices before Ampere.
// Launch   grid (segments, pairs of heads, n_seq), 8 warps, one block an SM: warp w of a team has
//          rows 16 w .. 16 w + 15 of Y (tokens) and of S (channels). Shared memory at N = 128: 148
//          KB; where a block can't have so much, or a group has one head, blocks have one head, 4
//          warps and 98 KB
// Types    products of T with f32 accumulation; M, S and exp(..) dt X are rounded to T once as
//          operands, as in the reference; sums, decays and the state that is handed on are f32
// Bytes    n_tok * sizeof(T) * (2 E + 2 G N), and 2 N H / 2 more from L2: each pair of heads reads
//          its group's B and C; the first launch reads x and B once more
// Roofline 2 n_tok H (Q (N + P) + 2 N P) FLOP by wgmma, 900 cycles a head and chunk of an SM, and
//          about 1,000 of its shared memory; but some 900 instructions a warp and chunk bind, at
//          two warps to hide the latency of each other
// Measured H100, bf16, mamba2-2.7b, 2048 tokens: 18.3 us for the segments and 35.3 for the output
//          in a prefill; 50.3 together in tools/bench_ops
// Same as  ssd_scan in kernels/cpu; tests/ops/ssd_test.cpp
#include <algorithm>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/mamba2.cuh"
#include "kernels/cuda/tile_products.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kQ = 64;           // tokens of a chunk
constexpr int kP = 64;           // channels of a head
constexpr int kTeam = 128;       // threads of a head
constexpr int kLeastChunks = 4;  // of a segment
constexpr int kMostHeads = 2;    // of a block
constexpr int kFewStages = 2;    // of input tiles, where a chunk takes long
constexpr int kManyStages = 4;   // where it is quickly done

/// kStages of each tile: the one in use and those on their way.
template <typename T, int kN, int kHeads, int kStages>
struct InputTiles {
  Tile<T, kQ, kP> x[kHeads][kStages];
  Tile<T, kQ, kN> B[kStages];
  struct Steps {
    float sum[4][kQ];  ///< of the next chunks, times log2(e)
    float key[4][kQ];  ///< sum_s - log2(dt_s): exp(sum_t - sum_s) dt_s is 2^(sum_t - key_s)
  } steps[kHeads];
};

template <typename T, int kN, int kHeads>
struct OutputTiles {
  Tile<T, kQ, kN> C[2];
  Tile<T, kP, kN> S[kHeads];
  InputTiles<T, kN, kHeads, kFewStages> in;
  Tile<T, kQ, kP> Y[kHeads];  ///< on its way out; one head's goes through C

  static constexpr size_t bytes() {
    return kHeads > 1 ? sizeof(OutputTiles) : offsetof(OutputTiles, Y);
  }
};

/// Waits for the four warps of a head.
__device__ __forceinline__ void team_barrier(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeam) : "memory");
}

__device__ __forceinline__ float log2_fast(float v) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

/// The state of a head as its four warps hold it: warp w has channels 16 w + g and 16 w + g + 8,
/// all states, as the C fragments of mma.cuh.
template <int kN>
struct HeadState {
  float v[kN / 8][4];

  /// Calls f(element, channel, state) for pairs of neighbouring states.
  template <typename F>
  __device__ __forceinline__ void each_pair(F&& f) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = static_cast<int>(threadIdx.x) % kTeam / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      f(&v[j][0], row, 8 * j + 2 * (lane % 4));
      f(&v[j][2], row + 8, 8 * j + 2 * (lane % 4));
    }
  }
  template <typename S>
  __device__ __forceinline__ void load(const S* from) {
    each_pair([&](float* pair, int p, int n) {
      const auto two = *reinterpret_cast<const Pair<S>*>(from + p * kN + n);
      pair[0] = to_float(two.v[0]);
      pair[1] = to_float(two.v[1]);
    });
  }
  template <typename S>
  __device__ __forceinline__ void store(S* to) {
    each_pair([&](const float* pair, int p, int n) {
      *reinterpret_cast<Pair<S>*>(to + p * kN +
                                  n) = {{from_float<S>(pair[0]), from_float<S>(pair[1])}};
    });
  }
  __device__ __forceinline__ void scale(float by) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[j][i] *= by;
    }
  }
  /// v = v * by + added, which keep() wrote: in the threads' order, 16 bytes at a time.
  __device__ __forceinline__ void chain(float by, const float* added) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 four = reinterpret_cast<const float4*>(added)[j * kTeam + threadIdx.x % kTeam];
      v[j][0] = fmaf(v[j][0], by, four.x);
      v[j][1] = fmaf(v[j][1], by, four.y);
      v[j][2] = fmaf(v[j][2], by, four.z);
      v[j][3] = fmaf(v[j][3], by, four.w);
    }
  }
  __device__ __forceinline__ void keep(float* to) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      reinterpret_cast<float4*>(to)[j * kTeam + threadIdx.x % kTeam] = {v[j][0], v[j][1], v[j][2],
                                                                        v[j][3]};
    }
  }
  /// Rounded to T, as a tile; `rows` is where this lane's row of it begins: row lane % 16 of the
  /// warp's, piece lane / 16.
  template <typename T>
  __device__ __forceinline__ void store_tile(uint32_t rows) {
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
      const uint32_t r[4] = {pack<T>(v[2 * k][0], v[2 * k][1]), pack<T>(v[2 * k][2], v[2 * k][3]),
                             pack<T>(v[2 * k + 1][0], v[2 * k + 1][1]),
                             pack<T>(v[2 * k + 1][2], v[2 * k + 1][3])};
      store_matrices(&shared_at<T>((rows ^ k % 4 * 32) + k / 4 * Tile<T, kP, kN>::kPanelBytes), r);
    }
  }
};

/// Per head and segment i: the state before segment 1 (i = 1) or what segment i - 1 adds (i > 1),
/// and the sum of dt * A * log2(e) over segment i - 1. Index 0 keeps the state before segment 0,
/// because the block that ends the sequence overwrites it in ssm_state.
struct Scratch {
  float* states;
  float* sums;
};

/// Which chunks of which sequence a block has.
struct Segment {
  int begin, len;  ///< of the sequence, in tokens
  int first, end;  ///< chunks
  int last;        ///< the segment that ends the sequence
  int slot;

  template <typename T>
  __device__ __forceinline__ Segment(const SsdPointers<T>& p, int64_t seq, int segment, int chunks)
      : begin(p.seq_start[seq]), len(p.seq_start[seq + 1] - begin), slot(p.slots[seq]) {
    const int n_chunk = (len + kQ - 1) / kQ;
    last = (n_chunk - 1) / chunks;
    first = segment * chunks;
    end = min(n_chunk, first + chunks);
  }
};

/// kOutput false: what each segment adds to a state of zero, for all but a sequence's last.
template <typename T, typename S, int kN, int kHeads, bool kOutput>
__global__ void __launch_bounds__(kTeam* kHeads, 1)
    ssd_chunks_kernel(SsdPointers<T> p, S* ssm_state, Scratch scratch, int segment_chunks,
                      int n_segment) {
  // A block of one head is what devices of small shared memory run: with their instructions
  // everywhere, so that it is tested wherever the tests run.
  using Products = TeamProducts<T, (kHeads > 1)>;
  // Chunks that only add to the state are quickly done: more of them must be on their way, and one
  // may still be read by products.
  constexpr int kStages = kOutput ? kFewStages : kManyStages;
  constexpr int kAhead = kOutput ? 1 : 2;
  extern __shared__ __align__(1024) float4 shared_raw[];
  auto& out = *reinterpret_cast<OutputTiles<T, kN, kHeads>*>(shared_raw);
  auto& tiles = [&]() -> InputTiles<T, kN, kHeads, kStages>& {
    if constexpr (kOutput) {
      return out.in;
    } else {
      return *reinterpret_cast<InputTiles<T, kN, kHeads, kStages>*>(shared_raw);
    }
  }();
  // The same in all lanes of a warp, which the compiler can't see by itself.
  const int team = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kTeam, 0);
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) % kTeam / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  const int teams_per_group = static_cast<int>(ceil_div(p.heads_per_group, kHeads));
  const int group = static_cast<int>(blockIdx.y) / teams_per_group;
  const int in_group = static_cast<int>(blockIdx.y) % teams_per_group * kHeads + team;
  // A team without a head works on the last one's, and its results are not stored.
  const bool live = in_group < p.heads_per_group;
  const int h = group * p.heads_per_group + min(in_group, p.heads_per_group - 1);
  const float A = p.A[h] * kLog2e;
  const float D = p.D[h];
  const float bias = p.dt_bias[h];

  after_previous();

  const int segment = static_cast<int>(blockIdx.x);
  const int64_t seq = blockIdx.z;
  const Segment own(p, seq, segment, segment_chunks);
  if (own.slot < 0 || own.len == 0) return;
  if (kOutput ? segment > own.last : segment >= own.last) return;

  constexpr uint32_t kXBytes = sizeof(tiles.x[0][0]);
  constexpr uint32_t kBCBytes = sizeof(tiles.B[0]);
  const uint32_t x_tiles = shared_address(&tiles.x[team][0]);
  const uint32_t B_tiles = shared_address(&tiles.B[0]);
  const uint32_t C_tiles = shared_address(&out.C[0]);
  const uint32_t S_tile = shared_address(&out.S[team]);
  auto& steps = tiles.steps[team];

  // Of each 16 bytes that this thread copies, the first: the others are whole groups of 8 rows
  // further.
  constexpr int kX = kP / 8;  // pieces in a row
  constexpr int kBC = kN / 8;
  constexpr int kXRows = kTeam / kX;
  constexpr int kBCRows = kTeam * kHeads / kBC;
  static_assert(kXRows % 8 == 0 && kBCRows % 8 == 0);
  const int x_row = static_cast<int>(threadIdx.x) % kTeam / kX;
  const int x_piece = static_cast<int>(threadIdx.x) % kX;
  const int bc_row = static_cast<int>(threadIdx.x) / kBC;
  const int bc_piece = static_cast<int>(threadIdx.x) % kBC;
  const uint32_t x_to = x_tiles + piece_offset(x_row, x_piece);
  const uint32_t bc_to =
      piece_offset(bc_row, bc_piece % 8) + bc_piece / 8 * Tile<T, kQ, kN>::kPanelBytes;
  const auto request = [&](int chunk) {
    if (chunk >= own.end) return end_copies();  // so that groups can be counted
    const uint32_t buffer = chunk % kStages;
    const int64_t t0 = own.begin + chunk * kQ;
    const int left = own.len - chunk * kQ;
    const T* x = p.x + (t0 + x_row) * p.x_stride + static_cast<int64_t>(h) * kP + x_piece * 8;
#pragma unroll
    for (int row = 0; row < kQ; row += kXRows) {
      copy16_async(&shared_at<uint4>(x_to + buffer * kXBytes + row * 128), x, row + x_row < left);
      x += kXRows * p.x_stride;
    }
    const T* B = p.B + (t0 + bc_row) * p.B_stride + static_cast<int64_t>(group) * kN + bc_piece * 8;
#pragma unroll
    for (int row = 0; row < kQ; row += kBCRows) {
      if (kQ % kBCRows != 0 && row + bc_row >= kQ) break;
      copy16_async(&shared_at<uint4>(B_tiles + bc_to + buffer * kBCBytes + row * 128), B,
                   row + bc_row < left);
      B += kBCRows * p.B_stride;
    }
    if constexpr (kOutput) {
      const T* C =
          p.C + (t0 + bc_row) * p.C_stride + static_cast<int64_t>(group) * kN + bc_piece * 8;
#pragma unroll
      for (int row = 0; row < kQ; row += kBCRows) {
        if (kQ % kBCRows != 0 && row + bc_row >= kQ) break;
        copy16_async(&shared_at<uint4>(C_tiles + bc_to + buffer * kBCBytes + row * 128), C,
                     row + bc_row < left);
        C += kBCRows * p.C_stride;
      }
    }
    end_copies();
  };
  for (int i = 0; i < kAhead; ++i) request(own.first + i);

  // The steps of four chunks are made at once, a warp having one of them.
  // Lane l has tokens 2 l and 2 l + 1; what they need is on its way since the chunk four before.
  Pair<T> raw_dt{};
  const auto request_dt = [&](int chunk) {
    const int t = chunk * kQ + 2 * lane;
    if (t < own.len) raw_dt.v[0] = p.dt_raw(int64_t{own.begin} + t, h);
    if (t + 1 < own.len) raw_dt.v[1] = p.dt_raw(int64_t{own.begin} + t + 1, h);
  };
  const auto make_steps = [&](int chunk) {
    const int t = chunk * kQ + 2 * lane;
    const auto step = [&](const T& raw, bool inside) {
      const float dt = fminf(fmaxf(softplus(to_float(raw) + bias), p.dt_min), p.dt_max);
      return inside ? dt : 0.0F;
    };
    const float dt0 = step(raw_dt.v[0], t < own.len);
    const float dt1 = step(raw_dt.v[1], t + 1 < own.len);
    float until = (dt0 + dt1) * A;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float before = __shfl_up_sync(0xffffffffU, until, d);
      if (lane >= d) until += before;
    }
    const float until0 = until - dt1 * A;
    *reinterpret_cast<float2*>(&steps.sum[warp][2 * lane]) = {until0, until};
    *reinterpret_cast<float2*>(&steps.key[warp][2 * lane]) = {until0 - log2_fast(dt0),
                                                              until - log2_fast(dt1)};
    request_dt(chunk + 4);
  };
  request_dt(own.first + warp);

  HeadState<kN> state = {};
  S* kept = ssm_state + (static_cast<int64_t>(own.slot) * p.n_head + h) * kP * kN;
  float* states = scratch.states + (seq * p.n_head + h) * n_segment * kP * kN;
  float* sums = scratch.sums + (seq * p.n_head + h) * n_segment;
  if (kOutput && segment > 0) {
    for (int i = 1; i <= segment; ++i) {
      state.chain(i > 1 ? exp2_fast(sums[i]) : 0.0F, states + i * kP * kN);
    }
  } else if (kOutput && own.last > 0) {
    state.chain(0.0F, states);
  } else if (segment == 0) {
    state.load(kept);
    if (!kOutput && live) state.keep(states);
  }
  // This lane's row of a tile in the shape of an accumulator.
  const uint32_t lane_row = piece_offset(16 * warp + lane % 16, lane / 16);
  if constexpr (kOutput) state.template store_tile<T>(S_tile + lane_row);
  // X^T (exp(sum_last - sum_s) dt_s) of a chunk, as operand.
  const auto weigh_x = [&](uint32_t(&xt)[4][4], uint32_t X, uint32_t keys, float sum_last) {
    const uint32_t from = X + piece_offset(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kQ / 16; ++k) {
      load_transposed(xt[k], &shared_at<T>(from + 2048 * k));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const auto pair = shared_at<float2>(keys + 64 * k + 32 * j);
        const float first = exp2_fast(sum_last - pair.x);
        const float second = exp2_fast(sum_last - pair.y);
        xt[k][2 * j] = scaled<T>(xt[k][2 * j], first, second);
        xt[k][2 * j + 1] = scaled<T>(xt[k][2 * j + 1], first, second);
      }
    }
  };

  // The tiles of a chunk are there, and S; those of kAhead + 1 chunks before are free.
  const auto await_chunk = [&] {
    await_copies<kAhead - 1>();
    show_to_products();
    __syncthreads();
  };
  // All have begun the chunk, so that the steps of those before it are free.
  const auto prepare_steps = [&](int chunk) {
    if ((chunk - own.first) % 4 != 0) return;
    make_steps(chunk + warp);
    team_barrier(team);
  };
  // Of sum_s - log2(dt_s), the pair of columns 16 i + 8 j + 2 q lies 64 i + 32 j further.
  const auto keys_of = [&](int chunk) {
    return shared_address(&steps.key[(chunk - own.first) % 4][2 * q]);
  };

  float sum_all = 0.0F;
  if constexpr (!kOutput) {
    const auto prepare = [&](uint32_t(&operand)[4][4], int chunk) {
      await_chunk();
      request(chunk + kAhead);
      prepare_steps(chunk);
      const float sum_last = steps.sum[(chunk - own.first) % 4][kQ - 1];
      sum_all += sum_last;
      weigh_x(operand, x_tiles + chunk % kStages * kXBytes, keys_of(chunk), sum_last);
      return exp2_fast(sum_last);
    };
    // The operand of the next chunk is made while this one's product runs.
    const auto add = [&](const uint32_t(&operand)[4][4], uint32_t(&next)[4][4], int chunk) {
      Products::start();
      Products::template by_columns<kN>(state.v, operand, B_tiles + chunk % kStages * kBCBytes, 4);
      Products::end();
      float share = 1.0F;
      if (chunk + 1 < own.end) share = prepare(next, chunk + 1);
      Products::template await<0>();
      state.scale(share);
    };
    uint32_t even[4][4];
    uint32_t odd[4][4];
    state.scale(prepare(even, own.first));
    for (int chunk = own.first; chunk < own.end; chunk += 2) {
      add(even, odd, chunk);
      if (chunk + 1 < own.end) add(odd, even, chunk + 1);
    }
  } else {
    for (int chunk = own.first; chunk < own.end; ++chunk) {
      const uint32_t buffer = chunk % kStages;
      const uint32_t X = x_tiles + buffer * kXBytes;
      const uint32_t B = B_tiles + buffer * kBCBytes;
      const uint32_t C = C_tiles + buffer * kBCBytes;
      // A head by itself has no more use for a warp's rows of C when they are multiplied.
      const uint32_t Y_tile = kHeads > 1 ? shared_address(&out.Y[team]) : C;
      const uint32_t keys = keys_of(chunk);
      await_chunk();

      // C B^T, and C S.
      float cb[kQ / 8][4];
      float y[kP / 8][4];
      Products::start();
      Products::template by_rows<kN>(cb, C, B, warp + 1);
      Products::end();
      Products::template by_rows<kN>(y, C, S_tile, 4);
      Products::end();

      request(chunk + kAhead);
      prepare_steps(chunk);
      const float* sums_of = steps.sum[(chunk - own.first) % 4];
      const float sum_last = sums_of[kQ - 1];
      // Meanwhile, for the end:  S = exp(sum_last) S + X^T (exp(sum_last - sum_s) dt_s B_s)
      uint32_t xt[4][4];
      weigh_x(xt, X, keys, sum_last);
      state.scale(exp2_fast(sum_last));

      // M = (C B^T) exp(sum_t - sum_s) dt_s, up to the diagonal.
      const float sum_row[2] = {sums_of[16 * warp + g], sums_of[16 * warp + g + 8]};
      const float grown[2] = {exp2_fast(sum_row[0]), exp2_fast(sum_row[1])};
      uint32_t m[4][4] = {};
      Products::template await<1>();
      const auto weigh = [&](int block, auto diagonal) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const auto pair = shared_at<float2>(keys + 64 * block + 32 * j);
          float v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            v[i] =
                cb[2 * block + j][i] * exp2_fast(sum_row[i / 2] - (i % 2 == 0 ? pair.x : pair.y));
            if (decltype(diagonal)::value && 8 * j + 2 * q + i % 2 > g + 8 * (i / 2)) v[i] = 0.0F;
          }
          m[block][2 * j] = pack<T>(v[0], v[1]);
          m[block][2 * j + 1] = pack<T>(v[2], v[3]);
        }
      };
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        if (block < warp) {
          weigh(block, std::false_type{});
        } else if (block == warp) {
          weigh(block, std::true_type{});
        }
      }

      // Y = exp(sum_t) C S + M X
      Products::template await<0>();
#pragma unroll
      for (int j = 0; j < kP / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) y[j][i] *= grown[i / 2];
      }
      Products::start();
      Products::template by_columns<kP>(y, m, X, warp + 1);
      Products::end();
      Products::start();
      Products::template by_columns<kN>(state.v, xt, B, 4);
      Products::end();
      Products::template await<1>();

      // Y + D X passes through this warp's rows of a tile, to be written in pieces of 16 bytes.
#pragma unroll
      for (int k = 0; k < kP / 16; ++k) {
        uint32_t r[4];  // x, then y
        load_matrices(r, &shared_at<T>((X + lane_row) ^ 32 * k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Pair<T> two;
          memcpy(&two, &r[i], sizeof two);
          const float* of = &y[2 * k + i / 2][i % 2 * 2];
          r[i] = pack<T>(fmaf(D, to_float(two.v[0]), of[0]), fmaf(D, to_float(two.v[1]), of[1]));
        }
        store_matrices(&shared_at<T>((Y_tile + lane_row) ^ 32 * k), r);
      }
      __syncwarp();
      const int t = 16 * warp + lane / 8;
      const uint32_t y_at = Y_tile + piece_offset(t, lane % 8);
      T* to = p.y + (own.begin + chunk * kQ + t) * p.y_stride + static_cast<int64_t>(h) * kP +
              lane % 8 * 8;
      const int left = live ? own.len - chunk * kQ : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (t + 4 * i < left) {
          *reinterpret_cast<Vec16<T>*>(to) = shared_at<Vec16<T>>((y_at ^ i % 2 * 64) + 512 * i);
        }
        to += 4 * p.y_stride;
      }
      Products::template await<0>();
      team_barrier(team);  // all four warps have read S
      state.template store_tile<T>(S_tile + lane_row);
    }
  }

  if (!live) return;
  if constexpr (kOutput) {
    if (segment == own.last) state.store(kept);
  } else {
    state.keep(states + (segment + 1) * kP * kN);
    if (threadIdx.x % kTeam == 0) sums[segment + 1] = sum_all;
  }
}

int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

/// Blocks of kHeads heads, as many segments as fill the GPU with one block a multiprocessor.
template <typename T, typename S, int kN, int kHeads>
void run(const SsdPointers<T>& p, S* ssm_state, const Batch& batch, void* scratch,
         cudaStream_t stream) {
  const int64_t blocks = p.n_head / p.heads_per_group * ceil_div(p.heads_per_group, kHeads);
  const int64_t chunks = ceil_div(batch.max_len, kQ);
  const int64_t fill = multiprocessors() / (batch.n_seq * blocks);
  const int64_t segments = std::max<int64_t>(1, std::min(fill, chunks / kLeastChunks));
  const auto segment_chunks = static_cast<int>(ceil_div(chunks, segments));
  // What the division leaves may be fewer segments.
  const auto n_segment = static_cast<int>(ceil_div(chunks, segment_chunks));
  Scratch between{};
  if (n_segment > 1) {
    between.states = static_cast<float*>(scratch);
    between.sums = between.states + batch.n_seq * p.n_head * n_segment * kP * kN;
  }
  const auto n_seq = static_cast<unsigned>(batch.n_seq);
  const auto go = [&](const char* name, auto* kernel, int n, size_t shared) {
    KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)));
    launch(name, kernel, dim3(static_cast<unsigned>(n), static_cast<unsigned>(blocks), n_seq),
           kTeam * kHeads, shared, stream, p, ssm_state, between, segment_chunks, n_segment);
  };
  if (n_segment > 1) {
    go("ssd_segments", &ssd_chunks_kernel<T, S, kN, kHeads, false>, n_segment - 1,
       sizeof(InputTiles<T, kN, kHeads, kManyStages>));
  }
  go("ssd_chunks", &ssd_chunks_kernel<T, S, kN, kHeads, true>, n_segment,
     OutputTiles<T, kN, kHeads>::bytes());
}

/// As many heads a block as the device's shared memory and a group have; false if not even one.
template <typename T, int kN>
bool run_heads(const SsdPointers<T>& p, const Tensor& ssm_state, const Batch& batch, void* scratch,
               cudaStream_t stream) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 8) return false;
  const auto shared =
      static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const auto with = [&](auto heads) {
    constexpr int kHeads = decltype(heads)::value;
    const size_t needed = std::max(sizeof(InputTiles<T, kN, kHeads, kManyStages>),
                                   OutputTiles<T, kN, kHeads>::bytes());
    if (needed > shared || p.heads_per_group <= kHeads / 2) return false;
    visit_type(ssm_state.dtype, "ssd_scan state", [&](auto s) {
      using S = decltype(s);
      run<T, S, kN, kHeads>(p, ssm_state.as<S>(), batch, scratch, stream);
    });
    return true;
  };
  return with(std::integral_constant<int, kMostHeads>{}) || with(std::integral_constant<int, 1>{});
}

}  // namespace

size_t ssd_scratch_bytes() {
  return static_cast<size_t>(multiprocessors()) * kMostHeads * (kP * 128 + 1) * sizeof(float);
}

bool ssd_scan_chunks(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                     const Batch& batch, void* scratch, cudaStream_t stream) {
  const int64_t N = ssm_state.dim(3);
  const bool built = in.x.dtype != DType::f32 && ssm_state.dim(2) == kP && (N == 64 || N == 128) &&
                     aligned16(in.x) && aligned16(in.B) && aligned16(in.C) && aligned16(y);
  if (!built) return false;
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    const SsdPointers<T> p = ssd_pointers<T>(y, in, ssm_state, batch);
    return N == 64 ? run_heads<T, 64>(p, ssm_state, batch, scratch, stream)
                   : run_heads<T, 128>(p, ssm_state, batch, scratch, stream);
  };
  return in.x.dtype == DType::f16 ? with_type(__half{}) : with_type(__nv_bfloat16{});
}

}  // namespace krait::cuda
