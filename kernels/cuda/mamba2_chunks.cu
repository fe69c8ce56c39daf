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
// and C. Half of its warps bring the state, half make the output, a team of four per head each:
//   state   copies the tiles of the next chunk in the background; weighs X, which is the operand of
//           X^T B. S stays in its registers in f32 from the first chunk to the last; a copy rounded
//           to T lies in shared memory as an operand of the output.
//   output  C B^T comes as accumulators, which, weighted and rounded, are the operand of M X.
// They begin each chunk together.
//
// One sequence has too few heads to fill a GPU. Then its chunks are cut into segments, and a launch
// before (mamba2_segments.cuh) brings each segment's own state (from zero; the first from
// ssm_state) to `scratch`; a block begins with the chain of the segments before its own:
//   S = exp(sum over a segment) S + that segment's state
// In ssd_mixer that launch does the convolution too.
//
// Shapes   as ssd_scan in kernels/ops.h; P = 64, N = 64 or 128; T bf16 or f16; rows of x, B, C and
//          y begin at multiples of 16 bytes. Everything else goes to mamba2_scan.cu, and so does
//          everything on devices before Ampere.
// Launch   grid (segments, pairs of heads, n_seq), 16 warps, one block an SM: warp w of a team has
//          rows 16 w .. 16 w + 15 of Y (tokens) or of S (channels). Shared memory at N = 128: 148
//          KB; where a block can't have so much, or a group has one head, blocks have one head, 8
//          warps and 98 KB
// Types    products of T with f32 accumulation; M, S and exp(..) dt X are rounded to T once as
//          operands, as in the reference; sums, decays and the state that is handed on are f32
// Bytes    n_tok * sizeof(T) * (2 E + 2 G N), and 2 N H / 2 more from L2: each pair of heads reads
//          its group's B and C
// Roofline per SM and chunk of a pair, in cycles: 1,800 of wgmma (2 n_tok H (Q (N + P) + 2 N P)
//          FLOP), 2,500 of shared memory, 1,700 of instructions a scheduler, 2,300 of HBM
// Measured H100, bf16, mamba2-2.7b, in a prefill: 31.3 us for 2048 tokens, 55.8 for 4096, so about
//          2.2 a chunk of a block. Unclear what binds: HBM is at 49%, L1 and shared memory at 57%,
//          issue at 29%. Halves that run further apart, Y being written while the next products
//          run, were no faster (57.8 and 59.1 in one run)
//          With the gated norm in here (the blocks of a group exchange sums of squares, a chunk is
//          written two chunks later) y need not come back from memory, and yet ssd_mixer of 16,384
//          tokens took 594 to 690 us for 548 to 559: each half of a block has two warps a
//          scheduler, which wait for their own latencies, and no registers left
// Same as  ssd_scan in kernels/cpu; tests/ops/ssd_test.cpp
#include <algorithm>

#include "kernels/cuda/mamba2_mixer.h"
#include "kernels/cuda/mamba2_segments.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kLeastChunks = 4;  // of a segment
constexpr int kStages = 2;       // of input tiles: the one in use and one on its way

template <typename T, int kN, int kHeads>
struct OutputTiles {
  Tile<T, kQ, kN> C[kStages];
  Tile<T, kP, kN> S[kHeads];
  Tile<T, kQ, kP> x[kHeads][kStages];
  Tile<T, kQ, kN> B[kStages];
  Steps steps[kHeads];
  Tile<T, kQ, kP> Y[kHeads];  ///< on its way out; one head's goes through C

  static constexpr size_t bytes() {
    return kHeads > 1 ? sizeof(OutputTiles) : offsetof(OutputTiles, Y);
  }
};

/// What both halves of a block have of its place.
template <typename T, int kN, int kHeads>
struct Place {
  using Tiles = OutputTiles<T, kN, kHeads>;
  // A block of one head is what devices of small shared memory run: with their instructions
  // everywhere, so that it is tested wherever the tests run.
  using Products = TeamProducts<T, (kHeads > 1)>;
  static constexpr uint32_t kXBytes = sizeof(Tile<T, kQ, kP>);
  static constexpr uint32_t kBCBytes = sizeof(Tile<T, kQ, kN>);

  Tiles& tiles;
  const Segment& own;
  Head head;
  int team, warp, lane;
  uint32_t x, B, C, S;  ///< where the tiles begin
  uint32_t lane_row;    ///< this lane's row of a tile in the shape of an accumulator

  __device__ __forceinline__ Place(const SsdPointers<T>& p, Tiles& all, const Segment& segment)
      : tiles(all), own(segment) {
    // The same in all lanes of a warp, which the compiler can't see by itself.
    team = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kTeam % kHeads, 0);
    warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) % kTeam / 32, 0);
    lane = static_cast<int>(threadIdx.x) % 32;
    head = Head::of<kHeads>(p, static_cast<int>(blockIdx.y), team);
    x = shared_address(&tiles.x[team][0]);
    B = shared_address(&tiles.B[0]);
    C = shared_address(&tiles.C[0]);
    S = shared_address(&tiles.S[team]);
    lane_row = piece_offset(16 * warp + lane % 16, lane / 16);
  }
  /// The turn of a chunk among its steps, and where key[2 q] of it lies.
  [[nodiscard]] __device__ __forceinline__ int turn(int chunk) const {
    return (chunk - own.first) % 4;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t keys(int chunk) const {
    return shared_address(&tiles.steps[team].key[turn(chunk)][2 * (lane % 4)]);
  }
};

/// All threads have come to a chunk: its tiles and S are there, those of the chunk before are free.
template <int kHeads>
__device__ __forceinline__ void begin_chunk() {
  barrier_sync<2 * kTeam * kHeads>(0);
}

/// One half of the block: copies the tiles and brings S from chunk to chunk.
template <typename T, typename S, int kN, int kHeads>
__device__ __forceinline__ void bring_state(const SsdPointers<T>& p, S* ssm_state,
                                            const Scratch& scratch,
                                            OutputTiles<T, kN, kHeads>& tiles, const Segment& own,
                                            int n_segment) {
  using At = Place<T, kN, kHeads>;
  using Products = typename At::Products;
  const At at(p, tiles, own);
  const int h = at.head.h;
  const TileCopy<T, kP, kTeam> copy_x(static_cast<int>(threadIdx.x) % kTeam);
  const TileCopy<T, kN, kTeam * kHeads> copy_bc(static_cast<int>(threadIdx.x));
  const auto request = [&](int chunk) {
    if (chunk >= own.end) return;
    const uint32_t buffer = chunk % kStages;
    const int64_t t0 = own.begin + chunk * kQ;
    const int left = own.len - chunk * kQ;
    const int64_t n0 = static_cast<int64_t>(at.head.group) * kN;
    copy_x(at.x + buffer * At::kXBytes, p.x + t0 * p.x_stride + static_cast<int64_t>(h) * kP,
           p.x_stride, left);
    copy_bc(at.B + buffer * At::kBCBytes, p.B + t0 * p.B_stride + n0, p.B_stride, left);
    copy_bc(at.C + buffer * At::kBCBytes, p.C + t0 * p.C_stride + n0, p.C_stride, left);
    end_copies();
  };
  request(own.first);
  Steps& steps = tiles.steps[at.team];
  StepMaker<T> step_maker(p, own, h);
  step_maker.request(own.first + at.warp);

  const int segment = static_cast<int>(blockIdx.x);
  const int64_t seq = blockIdx.z;
  HeadState<kN> state = {};
  S* kept = ssm_state + (static_cast<int64_t>(own.slot) * p.n_head + h) * kP * kN;
  const float* states = scratch.states + (seq * p.n_head + h) * n_segment * kP * kN;
  const float* sums = scratch.sums + (seq * p.n_head + h) * n_segment;
  if (own.last > 0) {
    state.take(states + min(segment, 1) * kP * kN);
    for (int i = 2; i <= segment; ++i) state.chain(exp2_fast(sums[i]), states + i * kP * kN);
  } else {
    state.load(kept);
  }
  state.template store_tile<T>(at.S + at.lane_row);
  step_maker.make(steps, at.warp, own.first + at.warp);

  for (int chunk = own.first; chunk < own.end; ++chunk) {
    await_copies<0>();
    show_to_products();
    begin_chunk<kHeads>();
    request(chunk + 1);
    // The steps of the chunks before are free: those of two chunks at once take their place.
    const int turn = at.turn(chunk);
    if (turn % 2 == 0 && chunk > own.first && (at.warp ^ turn) >= 2) {
      step_maker.make(steps, at.warp, chunk + 2 + at.warp % 2);
    }
    // S = exp(sum_last) S + X^T (exp(sum_last - sum_s) dt_s B_s)
    const float sum_last = steps.sum[turn][kQ - 1];
    const uint32_t buffer = chunk % kStages;
    uint32_t xt[4][4];
    weigh_x<T>(xt, at.x + buffer * At::kXBytes, at.keys(chunk), sum_last, at.warp);
    state.scale(exp2_fast(sum_last));
    Products::start();
    Products::template by_columns<kN>(state.v, xt, at.B + buffer * At::kBCBytes, 4);
    Products::end();
    Products::template await<0>();
    if (chunk + 1 < own.end) {
      barrier_sync<2 * kTeam>(kStateRead + at.team);
      state.template store_tile<T>(at.S + at.lane_row);
    }
  }
  if (at.head.live && segment == own.last) state.store(kept);
}

/// The other half: Y.
template <typename T, int kN, int kHeads>
__device__ __forceinline__ void make_output(const SsdPointers<T>& p,
                                            OutputTiles<T, kN, kHeads>& tiles, const Segment& own) {
  using At = Place<T, kN, kHeads>;
  using Products = typename At::Products;
  const At at(p, tiles, own);
  const int h = at.head.h;
  const int warp = at.warp;
  const int lane = at.lane;
  const int g = lane / 4;
  const int q = lane % 4;
  const float D = p.D[h];
  for (int chunk = own.first; chunk < own.end; ++chunk) {
    const uint32_t buffer = chunk % kStages;
    const uint32_t X = at.x + buffer * At::kXBytes;
    const uint32_t B = at.B + buffer * At::kBCBytes;
    const uint32_t C = at.C + buffer * At::kBCBytes;
    // A head by itself has no more use for a warp's rows of C when they are multiplied.
    const uint32_t Y_tile = kHeads > 1 ? shared_address(&tiles.Y[at.team]) : C;
    const uint32_t keys = at.keys(chunk);
    begin_chunk<kHeads>();

    // C B^T, and C S.
    float cb[kQ / 8][4];
    float y[kP / 8][4];
    Products::start();
    Products::template by_rows<kN>(cb, C, B, warp + 1);
    Products::end();
    Products::template by_rows<kN>(y, C, at.S, 4);
    Products::end();

    // M = (C B^T) exp(sum_t - sum_s) dt_s, up to the diagonal.
    const float* sums_of = tiles.steps[at.team].sum[at.turn(chunk)];
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
          v[i] = cb[2 * block + j][i] * exp2_fast(sum_row[i / 2] - (i % 2 == 0 ? pair.x : pair.y));
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
    if (chunk + 1 < own.end) barrier_arrive<2 * kTeam>(kStateRead + at.team);
#pragma unroll
    for (int j = 0; j < kP / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] *= grown[i / 2];
    }
    Products::start();
    Products::template by_columns<kP>(y, m, X, warp + 1);
    Products::end();
    uint32_t r[kP / 16][4];  // x, then y
#pragma unroll
    for (int k = 0; k < kP / 16; ++k) {
      load_matrices(r[k], &shared_at<T>((X + at.lane_row) ^ 32 * k));
    }
    Products::template await<0>();

    // Y + D X passes through this warp's rows of a tile, to be written in pieces of 16 bytes.
#pragma unroll
    for (int k = 0; k < kP / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v[2];
        unpack_pair<T>(r[k][i], v[0], v[1]);
        const float* of = &y[2 * k + i / 2][i % 2 * 2];
        r[k][i] = pack<T>(fmaf(D, v[0], of[0]), fmaf(D, v[1], of[1]));
      }
      store_matrices(&shared_at<T>((Y_tile + at.lane_row) ^ 32 * k), r[k]);
    }
    __syncwarp();
    const int t = 16 * warp + lane / 8;
    const uint32_t y_at = Y_tile + piece_offset(t, lane % 8);
    T* to = p.y + (own.begin + chunk * kQ + t) * p.y_stride + static_cast<int64_t>(h) * kP +
            lane % 8 * 8;
    const int left = at.head.live ? own.len - chunk * kQ : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (t + 4 * i < left) {
        *reinterpret_cast<Vec16<T>*>(to) = shared_at<Vec16<T>>((y_at ^ i % 2 * 64) + 512 * i);
      }
      to += 4 * p.y_stride;
    }
    __syncwarp();
  }
}

template <typename T, typename S, int kN, int kHeads>
__global__ void __launch_bounds__(2 * kTeam * kHeads, 1)
    ssd_chunks_kernel(SsdPointers<T> p, S* ssm_state, Scratch scratch, int segment_chunks,
                      int n_segment) {
  extern __shared__ __align__(1024) float4 shared_raw[];
  auto& tiles = *reinterpret_cast<OutputTiles<T, kN, kHeads>*>(shared_raw);
  after_previous();
  const int segment = static_cast<int>(blockIdx.x);
  const Segment own(p, blockIdx.z, segment, segment_chunks);
  if (own.slot < 0 || own.len == 0 || segment > own.last) return;
  if (threadIdx.x < kTeam * kHeads) {
    bring_state(p, ssm_state, scratch, tiles, own, n_segment);
  } else {
    make_output(p, tiles, own);
  }
}

int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

template <typename... Params, typename... Args>
void go(const char* name, void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
        cudaStream_t stream, Args&&... args) {
  KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)));
  launch(name, kernel, grid, static_cast<unsigned>(threads), shared, stream,
         std::forward<Args>(args)...);
}

/// Blocks of kHeads heads, as many segments as fill the GPU with one block a multiprocessor. With
/// `conv`, x, B and C are made first; false, and nothing done, where sequences are not cut.
template <typename T, int kN, int kHeads>
bool run(const SsdPointers<T>& p, const ConvPointers<T>* conv, const Tensor& ssm_state,
         const Batch& batch, void* scratch, cudaStream_t stream) {
  const int64_t blocks = p.n_head / p.heads_per_group * ceil_div(p.heads_per_group, kHeads);
  const int64_t chunks = ceil_div(batch.max_len, kQ);
  const int64_t fill = multiprocessors() / (batch.n_seq * blocks);
  const int64_t segments = std::max<int64_t>(1, std::min(fill, chunks / kLeastChunks));
  const auto segment_chunks = static_cast<int>(ceil_div(chunks, segments));
  // What the division leaves may be fewer segments.
  const auto n_segment = static_cast<int>(ceil_div(chunks, segment_chunks));
  if (conv != nullptr && n_segment == 1) return false;
  const auto n_seq = static_cast<unsigned>(batch.n_seq);
  const auto grid = [&](int n) {
    return dim3(static_cast<unsigned>(n), static_cast<unsigned>(blocks), n_seq);
  };
  Scratch between{};
  if (n_segment > 1) {
    between.states = static_cast<float*>(scratch);
    between.sums = between.states + batch.n_seq * p.n_head * n_segment * kP * kN;
    const auto states = [&](auto* kernel, const ConvPointers<T>& x) {
      go("ssd_segments", kernel, grid(n_segment), 2 * kTeam * kHeads,
         sizeof(SegmentTiles<T, kN, kHeads>), stream, p, x, ssm_state.data, ssm_state.dtype,
         between, segment_chunks, n_segment);
    };
    if (conv != nullptr) {
      const int first = p.n_head * p.head_dim;  // channel of B
      launch("ssd_conv", &ssd_conv_bc_kernel<T>,
             dim3(static_cast<unsigned>(ceil_div(conv->width - first, 32 * kChannels)),
                  static_cast<unsigned>(ceil_div(batch.max_len, 4 * kRows)), n_seq),
             128, 0, stream, *conv, first, p.seq_start, p.slots);
      states(&ssd_segments_kernel<T, kN, kHeads, true>, *conv);
    } else {
      ConvPointers<T> x{};
      x.u = p.x;
      x.u_stride = p.x_stride;
      states(&ssd_segments_kernel<T, kN, kHeads, false>, x);
    }
  }
  visit_type(ssm_state.dtype, "ssd_scan state", [&](auto s) {
    using S = decltype(s);
    go("ssd_chunks", &ssd_chunks_kernel<T, S, kN, kHeads>, grid(n_segment), 2 * kTeam * kHeads,
       OutputTiles<T, kN, kHeads>::bytes(), stream, p, ssm_state.as<S>(), between, segment_chunks,
       n_segment);
  });
  return true;
}

/// As many heads a block as the device's shared memory and a group have; false if not even one.
template <typename T, int kN>
bool run_heads(const SsdPointers<T>& p, const ConvPointers<T>* conv, const Tensor& ssm_state,
               const Batch& batch, void* scratch, cudaStream_t stream) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 8) return false;
  const auto shared =
      static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const auto fits = [&](auto heads) {
    constexpr int kHeads = decltype(heads)::value;
    return std::max(sizeof(SegmentTiles<T, kN, kHeads>), OutputTiles<T, kN, kHeads>::bytes()) <=
           shared;
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, kMostHeads> kMost;
  if (fits(kMost) && p.heads_per_group > 1) {
    return run<T, kN, kMostHeads>(p, conv, ssm_state, batch, scratch, stream);
  }
  return fits(kOne) && run<T, kN, 1>(p, conv, ssm_state, batch, scratch, stream);
}

template <typename T>
bool run_states(const SsdPointers<T>& p, const ConvPointers<T>* conv, const Tensor& ssm_state,
                const Batch& batch, void* scratch, cudaStream_t stream) {
  return p.d_state == 64 ? run_heads<T, 64>(p, conv, ssm_state, batch, scratch, stream)
                         : run_heads<T, 128>(p, conv, ssm_state, batch, scratch, stream);
}

/// Types, sizes and alignments that are built.
bool built(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state) {
  const int64_t N = ssm_state.dim(3);
  return in.x.dtype != DType::f32 && ssm_state.dim(2) == kP && (N == 64 || N == 128) &&
         aligned16(in.x) && aligned16(in.B) && aligned16(in.C) && aligned16(y);
}

}  // namespace

size_t ssd_scratch_bytes() {
  return static_cast<size_t>(multiprocessors()) * kMostHeads * (kP * 128 + 1) * sizeof(float);
}

bool ssd_scan_chunks(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                     const Batch& batch, void* scratch, cudaStream_t stream) {
  if (!built(y, in, ssm_state)) return false;
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    return run_states<T>(ssd_pointers<T>(y, in, ssm_state, batch), nullptr, ssm_state, batch,
                         scratch, stream);
  };
  return in.x.dtype == DType::f16 ? with_type(__half{}) : with_type(__nv_bfloat16{});
}

bool ssd_mixer_chunks(const Tensor& y, const Tensor& xbc, const SsdMixer& in,
                      const Tensor& conv_state, const Tensor& ssm_state, const Batch& batch,
                      void* scratch, cudaStream_t stream) {
  const int64_t E = y.dim(1);
  const int64_t GN = in.n_group * ssm_state.dim(3);
  const SsdInputs scan{
      xbc.columns(0, E), in.dt,      in.A,      xbc.columns(E, GN), xbc.columns(E + GN, GN), in.D,
      in.dt_bias,        in.n_group, in.dt_min, in.dt_max};
  if (!built(y, scan, ssm_state) || in.conv.dim(1) != kTaps || !aligned16(in.conv) ||
      !aligned16(in.xbc) || !aligned16(conv_state)) {
    return false;
  }
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    const ConvPointers<T> conv{
        in.xbc.as<T>(),           xbc.as<T>(),        in.conv.as<float>(),
        in.conv_bias.as<float>(), conv_state.as<T>(), batch.position.as<int64_t>(),
        in.xbc.row_stride,        xbc.row_stride,     xbc.dim(1)};
    return run_states<T>(ssd_pointers<T>(y, scan, ssm_state, batch), &conv, ssm_state, batch,
                         scratch, stream);
  };
  if (!(y.dtype == DType::f16 ? with_type(__half{}) : with_type(__nv_bfloat16{}))) return false;
  gated_rms_norm(y, y, in.z, in.norm, in.n_group, in.norm_eps, stream);
  return true;
}

}  // namespace krait::cuda
