// What the two kernels of the chunked Mamba-2 scan share: mamba2_segments.cu brings the states
// between segments of a sequence, mamba2_chunks.cu the output.
#pragma once

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/mamba2.cuh"
#include "kernels/cuda/tile_products.cuh"

namespace krait::cuda {

constexpr int kQ = 64;         // tokens of a chunk
constexpr int kP = 64;         // channels of a head
constexpr int kTeam = 128;     // threads of a head
constexpr int kMostHeads = 2;  // of a block

/// Barriers of part of a block; where there are two, of a buffer or a team each.
enum BarrierName {
  kTeamBarrier = 1,    ///< a team
  kStatesBarrier = 3,  ///< the half that has the states
  kInputBarrier = 4,   ///< the half that brings x
  kFull = 5,           ///< one half has filled a tile
  kEmpty = 7,          ///< the other has read it
  kStateRead = 9,      ///< the output has read the state
};

/// Waits until kThreads threads have come to the barrier, this one included.
template <int kThreads>
__device__ __forceinline__ void barrier_sync(int name) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(kThreads) : "memory");
}
/// Counts as having come, and goes on.
template <int kThreads>
__device__ __forceinline__ void barrier_arrive(int name) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "n"(kThreads) : "memory");
}
/// Waits for the four warps of a head.
__device__ __forceinline__ void team_barrier(int team) { barrier_sync<kTeam>(kTeamBarrier + team); }

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
  /// What keep() wrote.
  __device__ __forceinline__ void take(const float* from) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 four = reinterpret_cast<const float4*>(from)[j * kTeam + threadIdx.x % kTeam];
      v[j][0] = four.x;
      v[j][1] = four.y;
      v[j][2] = four.z;
      v[j][3] = four.w;
    }
  }
  /// v = v * by + what keep() wrote; enough of it on its way together to hide the latency.
  __device__ __forceinline__ void chain(float by, const float* added) {
    constexpr int kTogether = 8;
#pragma unroll
    for (int j = 0; j < kN / 8; j += kTogether) {
      float4 four[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        four[i] = reinterpret_cast<const float4*>(added)[(j + i) * kTeam + threadIdx.x % kTeam];
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        v[j + i][0] = fmaf(v[j + i][0], by, four[i].x);
        v[j + i][1] = fmaf(v[j + i][1], by, four[i].y);
        v[j + i][2] = fmaf(v[j + i][2], by, four[i].z);
        v[j + i][3] = fmaf(v[j + i][3], by, four[i].w);
      }
    }
  }
  /// In the threads' order, 16 bytes at a time.
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

/// The head of a team: the four warps that work on it together.
struct Head {
  int group, h;
  bool live;  ///< a team without a head works on the last one's, and its results are not stored

  template <int kHeads, typename T>
  static __device__ __forceinline__ Head of(const SsdPointers<T>& p, int block, int team) {
    const int teams_per_group = static_cast<int>(ceil_div(p.heads_per_group, kHeads));
    const int group = block / teams_per_group;
    const int in_group = block % teams_per_group * kHeads + team;
    return {group, group * p.heads_per_group + min(in_group, p.heads_per_group - 1),
            in_group < p.heads_per_group};
  }
};

/// The steps of the next four chunks of a head.
struct Steps {
  float sum[4][kQ];  ///< of dt A inside a chunk, times log2(e)
  float key[4][kQ];  ///< sum_s - log2(dt_s): exp(sum_t - sum_s) dt_s is 2^(sum_t - key_s)
};

/// Makes the steps of four chunks at once, each warp of a team those of one of them. Lane l has
/// tokens 2 l and 2 l + 1; what they need is on its way since the chunk four before.
template <typename T>
class StepMaker {
 public:
  __device__ __forceinline__ StepMaker(const SsdPointers<T>& p, const Segment& own, int h)
      : p_(p), own_(own), h_(h), A_(p.A[h] * kLog2e), bias_(p.dt_bias[h]) {}

  __device__ __forceinline__ void request(int chunk) {
    const int t = chunk * kQ + 2 * (static_cast<int>(threadIdx.x) % 32);
    if (t < own_.len) raw_.v[0] = p_.dt_raw(int64_t{own_.begin} + t, h_);
    if (t + 1 < own_.len) raw_.v[1] = p_.dt_raw(int64_t{own_.begin} + t + 1, h_);
  }
  __device__ __forceinline__ void make(Steps& steps, int warp, int chunk) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int t = chunk * kQ + 2 * lane;
    const auto step = [&](const T& raw, bool inside) {
      const float dt = fminf(fmaxf(softplus(to_float(raw) + bias_), p_.dt_min), p_.dt_max);
      return inside ? dt : 0.0F;
    };
    const float dt0 = step(raw_.v[0], t < own_.len);
    const float dt1 = step(raw_.v[1], t + 1 < own_.len);
    float until = (dt0 + dt1) * A_;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float before = __shfl_up_sync(0xffffffffU, until, d);
      if (lane >= d) until += before;
    }
    const float until0 = until - dt1 * A_;
    *reinterpret_cast<float2*>(&steps.sum[warp][2 * lane]) = {until0, until};
    *reinterpret_cast<float2*>(&steps.key[warp][2 * lane]) = {until0 - log2_fast(dt0),
                                                              until - log2_fast(dt1)};
    request(chunk + 4);
  }

 private:
  const SsdPointers<T>& p_;
  const Segment& own_;
  int h_;
  float A_, bias_;
  Pair<T> raw_{};
};

/// kThreads threads copy a tile of kCols columns in the background, 16 bytes each at a time.
template <typename T, int kCols, int kThreads>
struct TileCopy {
  static constexpr int kPieces = kCols / 8;  // in a row
  static constexpr int kRows = kThreads / kPieces;
  static_assert(kRows % 8 == 0 && kQ % kRows == 0);
  int row, piece;
  uint32_t first;  ///< where its first 16 bytes go; the others are whole groups of 8 rows further

  explicit __device__ __forceinline__ TileCopy(int thread)
      : row(thread / kPieces),
        piece(thread % kPieces),
        first(piece_offset(row, piece % 8) + piece / 8 * Tile<T, kQ, kCols>::kPanelBytes) {}

  /// Of the rows from `from` on `left` exist; zeros for the others.
  __device__ __forceinline__ void operator()(uint32_t tile, const T* from, int64_t stride,
                                             int left) const {
    from += row * stride + piece * 8;
#pragma unroll
    for (int i = 0; i < kQ; i += kRows) {
      copy16_async(&shared_at<uint4>(tile + first + i * 128), from, i + row < left);
      from += kRows * stride;
    }
  }
};

/// X^T (exp(sum_last - sum_s) dt_s) of a chunk, as operand: this warp's 16 channels. `keys` is
/// where key[2 q] lies: the pair of columns 16 k + 8 j + 2 q is 64 k + 32 j further.
template <typename T>
__device__ __forceinline__ void weigh_x(uint32_t (&xt)[4][4], uint32_t X, uint32_t keys,
                                        float sum_last, int warp) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t from = X + piece_offset(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kQ / 16; ++k) {
    load_transposed(xt[k], &shared_at<T>(from + 2048 * k));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto pair = shared_at<float2>(keys + 64 * k + 32 * j);
      const float first = exp2_fast(sum_last - pair.x);
      const float second = exp2_fast(sum_last - pair.y);
#pragma unroll
      for (int i = 2 * j; i < 2 * j + 2; ++i) {
        float v[2];
        unpack_pair<T>(xt[k][i], v[0], v[1]);
        xt[k][i] = pack<T>(v[0] * first, v[1] * second);
      }
    }
  }
}

}  // namespace krait::cuda
