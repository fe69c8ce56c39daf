// mamba2_segments.cuh - what comes before the output of the chunked Mamba-2 scan: the convolution,
// and the states between segments of a sequence.
//
//   x, B, C = silu(bias + sum_j weight[:, j] * u[t - 3 + j])        as conv1d.cu, bit for bit
//   S_i     = sum over segment i of exp(sum_end - sum_t) x_t (dt_t B_t)^T              [P, N]
//
// per head, S_0 beginning with the given state. The convolution moves memory and the states
// occupy the tensor cores, so a block does both at once: half of its warps read x, write it
// convolved, and hand it on through shared memory to the other half, a team of four for each of
// two heads, which weigh it and multiply it by B.
//
// Shapes   as ssd_mixer in kernels/ops.h; d_conv = 4; the rest as mamba2_chunks.cu
// Launch   B and C first: grid (128 channels, 32 tokens, n_seq), 4 warps. Then (segments, pairs of
//          heads, n_seq), 16 warps, one block an SM, 148 KB of shared memory at N = 128 (one
//          head: 8 warps, 98 KB). The last segment of a sequence is convolved only. Without
//          convolution (ssd_scan) x is copied to shared memory instead
// Bytes    2 * n_tok * (E + 2 G N) * sizeof(T), and from L2 B once for each pair of heads
// Roofline per SM and chunk of a pair, in cycles: 2,300 of HBM, 1,600 of instructions a scheduler
// Measured H100, bf16, mamba2-2.7b, in a prefill: 5.1 and 28.1 us for 2048 tokens, 6.4 and 49.6 for
//          4096; before, convolution and states by themselves took 21.8 and 18.3 for 2048. Inputs
//          that come through registers: 31.3; the given state added at the end: 31.3
//          16,384 tokens: 184 us at 1.75 GHz, HBM at 57%; the half that convolves waits at its
//          barriers for a fifth of its time
// Same as  ssd_mixer and ssd_scan in kernels/cpu; tests/ops/ssd_test.cpp
#pragma once

#include "kernels/cuda/conv_ring.cuh"
#include "kernels/cuda/mamba2_chunks.cuh"

namespace krait::cuda {

constexpr int kTaps = 4;      // of the convolution
constexpr int kRows = 8;      // tokens of a thread together
constexpr int kChannels = 4;  // of a thread

template <typename T>
struct ConvPointers {
  const T* u;  ///< x, B, C before
  T* out;      ///< and after the convolution
  const float *weight, *bias;
  T* state;  ///< [slot, kTaps - 1, width]
  const int64_t* positions;
  int64_t u_stride, out_stride, width;
};

/// The inputs of a sequence from a channel on. Before time 0 they are in the state.
template <typename T>
struct ConvInputs {
  const T* u;
  T* state;
  int64_t stride, width;
  int oldest;  ///< row of the state

  __device__ __forceinline__ ConvInputs(const ConvPointers<T>& c, int64_t begin, int64_t slot,
                                        int oldest, int channel)
      : u(c.u + begin * c.u_stride + channel),
        state(c.state + slot * (kTaps - 1) * c.width + channel),
        stride(c.u_stride),
        width(c.width),
        oldest(oldest) {}
  __device__ __forceinline__ T* kept(int t) const {
    return state + conv_row<kTaps>(oldest + t + kTaps - 1) * width;
  }
  __device__ __forceinline__ const T* at(int t) const { return t >= 0 ? u + t * stride : kept(t); }
};

/// The last inputs of kChannels channels, which are left to the next call.
template <typename T>
struct LastInputs {
  uint2 in[kTaps - 1];

  __device__ __forceinline__ void load(const ConvInputs<T>& from, int len) {
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
      in[j] = *reinterpret_cast<const uint2*>(from.at(len - (kTaps - 1) + j));
    }
  }
  /// Nobody may read the old ones any more.
  __device__ __forceinline__ void store(const ConvInputs<T>& to, int len) const {
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
      *reinterpret_cast<uint2*>(to.kept(len - (kTaps - 1) + j)) = in[j];
    }
  }
};

/// The parameters of kChannels channels of the convolution.
template <typename T>
struct ConvChannels {
  float w[kChannels][kTaps], b[kChannels];
  static_assert(kChannels * sizeof(T) == sizeof(uint2) && kRows >= kTaps - 1);

  ConvChannels() = default;
  __device__ __forceinline__ ConvChannels(const ConvPointers<T>& c, int channel) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float4 taps = *reinterpret_cast<const float4*>(c.weight + kTaps * (channel + i));
      w[i][0] = taps.x;
      w[i][1] = taps.y;
      w[i][2] = taps.z;
      w[i][3] = taps.w;
      b[i] = c.bias != nullptr ? c.bias[channel + i] : 0.0F;
    }
  }
  /// Of the last kTaps inputs, oldest first.
  __device__ __forceinline__ uint2 result(const uint2* in) const {
    float sum[kChannels] = {b[0], b[1], b[2], b[3]};
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      float u[kChannels];
      unpack_pair<T>(in[j].x, u[0], u[1]);
      unpack_pair<T>(in[j].y, u[2], u[3]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(w[c][j], u[c], sum[c]);
    }
    return {pack<T>(silu(sum[0]), silu(sum[1])), pack<T>(silu(sum[2]), silu(sum[3]))};
  }
};

/// The channels of B and C.
template <typename T>
__global__ void __launch_bounds__(128)
    ssd_conv_bc_kernel(ConvPointers<T> c, int first, const int32_t* seq_start,
                       const int32_t* slots) {
  const int channel = first + static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32) * kChannels;
  if (channel >= c.width) return after_previous();
  const ConvChannels<T> channels(c, channel);
  after_previous();
  const int64_t seq = blockIdx.z;
  const int32_t slot = slots[seq];
  const int64_t begin = seq_start[seq];
  const int len = static_cast<int>(seq_start[seq + 1] - begin);
  const int t = (static_cast<int>(blockIdx.y) * 4 + static_cast<int>(threadIdx.x) / 32) * kRows;
  if (slot < 0 || t >= len) return;
  const ConvInputs<T> inputs(c, begin, slot, conv_row<kTaps>(c.positions[seq]), channel);
  uint2 in[kTaps - 1 + kRows];
#pragma unroll
  for (int i = 0; i < kTaps - 1 + kRows; ++i) {
    const int at = t - (kTaps - 1) + i;
    if (at < len) in[i] = *reinterpret_cast<const uint2*>(inputs.at(at));
  }
  T* to = c.out + (begin + t) * c.out_stride + channel;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (t + i < len) *reinterpret_cast<uint2*>(to + i * c.out_stride) = channels.result(in + i);
  }
  if (t == 0) {
    LastInputs<T> last;
    last.load(inputs, len);
    last.store(inputs, len);
  }
}

/// Buffers: those in use and those on their way.
constexpr int kUStages = 4;  // two in use: a chunk begins with the last inputs of the one before
constexpr int kXStages = 2;
constexpr int kBStages = 3;  // two in use: the product of the chunk before is under way

template <typename T, int kN, int kHeads>
struct SegmentTiles {
  Tile<T, kQ, kP> x[kHeads][kXStages];
  Tile<T, kQ, kN> B[kBStages];
  alignas(16) T u[kUStages][kQ][kHeads * kP];  ///< x before the convolution
  Steps steps[kHeads];
};

/// Half of the block: x comes in, is convolved (or not), and goes to the tiles.
template <typename T, int kN, int kHeads, bool kConv>
__device__ __forceinline__ void bring_x(const SsdPointers<T>& p, const ConvPointers<T>& conv,
                                        SegmentTiles<T, kN, kHeads>& tiles, int segment_chunks) {
  constexpr int kHalf = kTeam * kHeads;
  constexpr int kAhead = kUStages - 2;
  constexpr int kBefore = kConv ? kTaps - 1 : 0;
  constexpr uint32_t kRowBytes = sizeof(tiles.u[0][0]);
  constexpr uint32_t kUBytes = sizeof(tiles.u[0]);
  const int thread = static_cast<int>(threadIdx.x) % kHalf;
  // What this thread convolves: kRows tokens of kChannels channels.
  constexpr int kRowLanes = kHeads * kP / kChannels;
  static_assert(kHalf / kRowLanes * kRows == kQ);
  const int stretch = thread / kRowLanes;
  const int team = thread % kRowLanes / (kP / kChannels);
  const int in_head = thread % (kP / kChannels) * kChannels;
  const Head head = Head::of<kHeads>(p, static_cast<int>(blockIdx.y), team);
  const int channel = head.h * kP + in_head;
  const ConvChannels<T> channels = [&] {
    if constexpr (kConv) return ConvChannels<T>(conv, channel);
    return ConvChannels<T>();
  }();

  after_previous();
  const int segment = static_cast<int>(blockIdx.x);
  const Segment own(p, blockIdx.z, segment, segment_chunks);
  if (own.slot < 0 || own.len == 0 || segment > own.last) return;
  const bool states = segment < own.last;
  if (!kConv && !states) return;

  // What it copies: 16 bytes of every kCopyRows-th row.
  constexpr int kPieces = kHeads * kP / 8;
  constexpr int kCopyRows = kHalf / kPieces;
  const int row = thread / kPieces;
  const int piece = thread % kPieces;
  const int oldest = kConv ? conv_row<kTaps>(conv.positions[blockIdx.z]) : 0;
  const ConvInputs<T> inputs(
      conv, own.begin, own.slot, oldest,
      Head::of<kHeads>(p, static_cast<int>(blockIdx.y), piece / (kP / 8)).h * kP +
          piece % (kP / 8) * 8);
  const uint32_t u_tiles = shared_address(&tiles.u[0]);
  const uint32_t u_to = u_tiles + row * kRowBytes + piece * 16;
  const auto request = [&](int chunk) {
    if (chunk < own.end) {
      const T* from = inputs.u + (int64_t{chunk} * kQ + row) * inputs.stride;
      const uint32_t to = u_to + chunk % kUStages * kUBytes;
      const int left = own.len - chunk * kQ - row;
#pragma unroll
      for (int i = 0; i < kQ; i += kCopyRows) {
        copy16_async(&shared_at<uint4>(to + i * kRowBytes), from, i < left);
        from += kCopyRows * inputs.stride;
      }
    }
    end_copies();  // also of nothing, so that groups can be counted
  };
  if (row < kBefore) {  // the last rows of the chunk before the first
    copy16_async(&shared_at<uint4>(u_to + (own.first + kUStages - 1) % kUStages * kUBytes +
                                   (kQ - kBefore) * kRowBytes),
                 inputs.at(own.first * kQ - kBefore + row));
  }
  for (int i = 0; i < kAhead; ++i) request(own.first + i);
  LastInputs<T> last;
  const bool leaves = kConv && head.live && segment == 0 && stretch == 0;
  if (leaves) last.load(ConvInputs<T>(conv, own.begin, own.slot, oldest, channel), own.len);

  const uint32_t u_from = u_tiles + (stretch * kRows - kBefore) * kRowBytes +
                          thread % kRowLanes * static_cast<uint32_t>(sizeof(uint2));
  const uint32_t to_tile = shared_address(&tiles.x[team][0]) + stretch * 1024 +
                           piece_offset(0, in_head / 8) + in_head % 8 * sizeof(T);
  const auto out_stride = static_cast<int>(conv.out_stride * sizeof(T));
  int t = own.first * kQ + stretch * kRows;
  auto* to =
      reinterpret_cast<char*>(conv.out + (int64_t{own.begin} + t) * conv.out_stride + channel);
  for (int chunk = own.first; chunk < own.end; ++chunk) {
    await_copies<kAhead - 1>();
    barrier_sync<kHalf>(kInputBarrier);  // all rows are there; the chunk before is done
    request(chunk + kAhead);
    const int buffer = chunk % kXStages;
    if (states && chunk >= own.first + kXStages) barrier_sync<2 * kHalf>(kEmpty + buffer);
    const uint32_t from = u_from + chunk % kUStages * kUBytes;
    const uint32_t wrap = stretch == 0 && chunk % kUStages == 0 ? kUStages * kUBytes : 0;
    uint2 in[kBefore + kRows];
#pragma unroll
    for (int i = 0; i < kBefore + kRows; ++i) {
      in[i] = shared_at<uint2>(from + (i < kBefore ? wrap : 0) + i * kRowBytes);
    }
    const uint32_t tile = to_tile + buffer * static_cast<uint32_t>(sizeof(tiles.x[0][0]));
    const int left = kConv && head.live ? own.len - t : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint2 x = kConv ? channels.result(in + i) : in[i];
      if (i < left) *reinterpret_cast<uint2*>(to + int64_t{out_stride} * i) = x;
      if (states) shared_at<uint2>((tile ^ i * 16) + i * 128) = x;  // all its chunks are full
    }
    if (states) barrier_arrive<2 * kHalf>(kFull + buffer);
    t += kQ;
    to += int64_t{out_stride} * kQ;
  }
  if (leaves) last.store(ConvInputs<T>(conv, own.begin, own.slot, oldest, channel), own.len);
}

/// The other half: the states, from the tiles of x.
template <typename T, int kN, int kHeads>
__device__ __forceinline__ void make_states(const SsdPointers<T>& p, const void* ssm_state,
                                            DType state_type, const Scratch& scratch,
                                            SegmentTiles<T, kN, kHeads>& tiles, int segment_chunks,
                                            int n_segment) {
  // A block of one head is what devices of small shared memory run: with their instructions
  // everywhere, so that it is tested wherever the tests run.
  using Products = TeamProducts<T, (kHeads > 1)>;
  constexpr int kBoth = 2 * kTeam * kHeads;
  // The same in all lanes of a warp, which the compiler can't see by itself.
  const int team = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kTeam, 0);
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) % kTeam / 32, 0);
  const int q = static_cast<int>(threadIdx.x) % 4;
  const Head head = Head::of<kHeads>(p, static_cast<int>(blockIdx.y), team);

  const int segment = static_cast<int>(blockIdx.x);
  const int64_t seq = blockIdx.z;
  after_previous();
  const Segment own(p, seq, segment, segment_chunks);
  if (own.slot < 0 || own.len == 0 || segment >= own.last) return;
  StepMaker<T> step_maker(p, own, head.h);
  step_maker.request(own.first + warp);

  constexpr uint32_t kXBytes = sizeof(tiles.x[0][0]);
  constexpr uint32_t kBBytes = sizeof(tiles.B[0]);
  const uint32_t x_tiles = shared_address(&tiles.x[team][0]);
  const uint32_t B_tiles = shared_address(&tiles.B[0]);
  Steps& steps = tiles.steps[team];
  const TileCopy<T, kN, kTeam * kHeads> copy(static_cast<int>(threadIdx.x));
  const T* B = p.B + own.begin * p.B_stride + static_cast<int64_t>(head.group) * kN;
  const auto request = [&](int chunk) {
    if (chunk >= own.end) return;
    copy(B_tiles + chunk % kBStages * kBBytes, B + int64_t{chunk} * kQ * p.B_stride, p.B_stride,
         kQ);
    end_copies();
  };
  request(own.first);

  HeadState<kN> state = {};
  float* states = scratch.states + (seq * p.n_head + head.h) * n_segment * kP * kN;
  float* sums = scratch.sums + (seq * p.n_head + head.h) * n_segment;
  if (segment == 0) {
    const int64_t kept = (static_cast<int64_t>(own.slot) * p.n_head + head.h) * kP * kN;
    if (state_type == DType::f32) {
      state.load(static_cast<const float*>(ssm_state) + kept);
    } else if (state_type == DType::bf16) {
      state.load(static_cast<const __nv_bfloat16*>(ssm_state) + kept);
    } else {
      state.load(static_cast<const __half*>(ssm_state) + kept);
    }
    if (head.live) state.keep(states);
  }

  float sum_all = 0.0F;
  // The operand of a chunk, while the product of the one before may be under way.
  const auto prepare = [&](uint32_t(&operand)[4][4], int chunk) {
    await_copies<0>();
    show_to_products();
    barrier_sync<kTeam * kHeads>(kStatesBarrier);  // B is there; products two chunks ago are done
    request(chunk + 1);
    const int i = (chunk - own.first) % 4;
    if (i == 0) {
      step_maker.make(steps, warp, chunk + warp);
      team_barrier(team);
    }
    const float sum_last = steps.sum[i][kQ - 1];
    sum_all += sum_last;
    const int buffer = chunk % kXStages;
    barrier_sync<kBoth>(kFull + buffer);
    weigh_x<T>(operand, x_tiles + buffer * kXBytes, shared_address(&steps.key[i][2 * q]), sum_last,
               warp);
    if (chunk + kXStages < own.end) barrier_arrive<kBoth>(kEmpty + buffer);
    return exp2_fast(sum_last);
  };
  const auto add = [&](const uint32_t(&operand)[4][4], uint32_t(&next)[4][4], int chunk) {
    Products::start();
    Products::template by_columns<kN>(state.v, operand, B_tiles + chunk % kBStages * kBBytes, 4);
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

  if (!head.live) return;
  state.keep(states + (segment + 1) * kP * kN);
  if (threadIdx.x % kTeam == 0) sums[segment + 1] = sum_all;
}

template <typename T, int kN, int kHeads, bool kConv>
__global__ void __launch_bounds__(2 * kTeam * kHeads, 1)
    ssd_segments_kernel(SsdPointers<T> p, ConvPointers<T> conv, const void* ssm_state,
                        DType state_type, Scratch scratch, int segment_chunks, int n_segment) {
  extern __shared__ __align__(1024) float4 shared_raw[];
  auto& tiles = *reinterpret_cast<SegmentTiles<T, kN, kHeads>*>(shared_raw);
  if (threadIdx.x < kTeam * kHeads) {
    make_states(p, ssm_state, state_type, scratch, tiles, segment_chunks, n_segment);
  } else {
    bring_x<T, kN, kHeads, kConv>(p, conv, tiles, segment_chunks);
  }
}

}  // namespace krait::cuda
