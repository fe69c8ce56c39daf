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
// A block walks the chunks of one head one after the other. S stays in the registers of its warps
// in f32 from the first chunk to the last; a copy rounded to T lies in shared memory as an operand.
// M is made 16 columns at a time: the accumulators of C B^T, scaled, are the operand of M X. The
// next chunk but one is on its way to shared memory meanwhile.
//
// One sequence has too few heads to fill a GPU. Then its chunks are cut into segments, and a first
// launch brings each segment's own state (from zero; the first from ssm_state) to `scratch`; a
// block of the second launch begins with the chain of the segments before its own:
//   S = exp(sum over a segment) S + that segment's state
//
// Shapes   as ssd_scan in kernels/ops.h; P = 64, N = 64 or 128; T bf16 or f16; rows of x, B, C and
// y
//          begin at multiples of 16 bytes. Everything else goes to mamba2_scan.cu, and so does
//          everything on devices before Ampere or with less shared memory for a block (107 KB at
//          N = 128, 67 KB at N = 64).
// Launch   grid (segments, H, n_seq), 4 warps, two blocks an SM: warp w has rows 16 w .. 16 w + 15
//          of Y (tokens) and of S (channels)
// Types    products of T with f32 accumulation; M, S and exp(..) dt X are rounded to T once as
//          operands, as in the reference; sums, decays and the state that is handed on are f32
// Bytes    n_tok * sizeof(T) * (2 E + 2 G N), and 2 (H - G) N more from L2: each head reads its
//          group's B and C
// Roofline 2 n_tok H (Q (N + P) / 2 + 2 N P) FLOP, but shared memory binds: about 106 ldmatrix.x4 a
//          warp and chunk are 1,700 cycles of a block, its products 1,200
// Same as  ssd_scan in kernels/cpu; tests/ops/ssd_test.cpp
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/mamba2.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kQ = 16 * kWarps;  // tokens of a chunk
constexpr int kP = 16 * kWarps;  // channels of a head
constexpr int kPad = 8;          // elements after a row: 8 rows of ldmatrix fall into 8 bank groups
constexpr int kBlocks = 264;     // that fill a GPU: two on each of 132 SMs
constexpr int kLeastChunks = 4;  // of a segment

/// Two of each tile: the one in use and the one on its way.
template <typename T, int kN>
struct Tiles {
  T x[2][kQ][kP + kPad];
  T B[2][kQ][kN + kPad];
  // Every warp has its own copy, so that no barrier is needed.
  float dt[kWarps][kQ];
  float sum[kWarps][kQ];  ///< times log2(e)
  // The first launch, which only wants states, stops here.
  T C[2][kQ][kN + kPad];
  T S[kP][kN + kPad];
};

/// The state of a head as the warps hold it: warp w has channels 16 w + g and 16 w + g + 8, all
/// states, as the C fragments of mma.cuh.
template <int kN>
struct HeadState {
  float v[kN / 8][4];

  /// Calls f(element, channel, state) for pairs of neighbouring states.
  template <typename F>
  __device__ __forceinline__ void each_pair(F&& f) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
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
  __device__ __forceinline__ void store(S* to, int stride = kN) {
    each_pair([&](const float* pair, int p, int n) {
      *reinterpret_cast<Pair<S>*>(to + p * stride +
                                  n) = {{from_float<S>(pair[0]), from_float<S>(pair[1])}};
    });
  }
  /// v = v * by + added
  __device__ __forceinline__ void chain(float by, const float* added) {
    each_pair([&](float* pair, int p, int n) {
      const auto two = *reinterpret_cast<const Pair<float>*>(added + p * kN + n);
      pair[0] = fmaf(pair[0], by, two.v[0]);
      pair[1] = fmaf(pair[1], by, two.v[1]);
    });
  }
};

/// Per head and segment i: the state before segment 1 (i = 1) or what segment i - 1 adds (i > 1),
/// and the sum of dt * A * log2(e) over segment i - 1. Index 0 keeps the state before segment 0,
/// because the block that ends the sequence overwrites it in ssm_state.
struct Scratch {
  float* states;
  float* sums;
};

/// kOutput false: the first launch, for all segments but a sequence's last.
template <typename T, typename S, int kN, bool kOutput>
__global__ void __launch_bounds__(kThreads, 2)
    ssd_chunks_kernel(SsdPointers<T> p, S* ssm_state, Scratch scratch, int segment_chunks) {
  after_previous();
  extern __shared__ float4 shared_raw[];
  auto& tiles = *reinterpret_cast<Tiles<T, kN>*>(shared_raw);
  const int segment = static_cast<int>(blockIdx.x);
  const int h = static_cast<int>(blockIdx.y);
  const int64_t seq = blockIdx.z;
  const int32_t slot = p.slots[seq];
  const int64_t begin = p.seq_start[seq];
  const int64_t len = p.seq_start[seq + 1] - begin;
  if (slot < 0 || len == 0) return;
  const int n_chunk = static_cast<int>((len + kQ - 1) / kQ);
  const int last = (n_chunk - 1) / segment_chunks;  // the segment that ends the sequence
  if (kOutput ? segment > last : segment >= last) return;
  const int first_chunk = segment * segment_chunks;
  const int end_chunk = min(n_chunk, first_chunk + segment_chunks);

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  const float A = p.A[h] * kLog2e;
  const float D = p.D[h];
  const T* x = p.x + begin * p.x_stride + static_cast<int64_t>(h) * kP;
  const int64_t group = static_cast<int64_t>(h / p.heads_per_group) * kN;
  const T* B = p.B + begin * p.B_stride + group;
  const T* C = p.C + begin * p.C_stride + group;

  const auto request = [&](int chunk) {
    const int buffer = chunk % 2;
    const int64_t t0 = static_cast<int64_t>(chunk) * kQ;
    constexpr int kX = kP / 8;  // pieces of 16 bytes in a row
    constexpr int kBC = kN / 8;
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < kQ * kX; i += kThreads) {
      const int64_t t = t0 + i / kX;
      copy16_async(&tiles.x[buffer][i / kX][i % kX * 8],
                   t < len ? x + t * p.x_stride + i % kX * 8 : x, t < len);
    }
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < kQ * kBC; i += kThreads) {
      const int64_t t = t0 + i / kBC;
      copy16_async(&tiles.B[buffer][i / kBC][i % kBC * 8],
                   t < len ? B + t * p.B_stride + i % kBC * 8 : B, t < len);
      if constexpr (kOutput) {
        copy16_async(&tiles.C[buffer][i / kBC][i % kBC * 8],
                     t < len ? C + t * p.C_stride + i % kBC * 8 : C, t < len);
      }
    }
  };
  request(first_chunk);
  end_copies();
  if (first_chunk + 1 < end_chunk) request(first_chunk + 1);
  end_copies();

  // dt before softplus, of this lane's two tokens of a chunk.
  const auto raw_dt = [&](int chunk) {
    const int64_t t = static_cast<int64_t>(chunk) * kQ + 2 * lane;
    Pair<T> raw{{T(0.0F), T(0.0F)}};
    if (t < len) raw.v[0] = p.dt_raw(begin + t, h);
    if (t + 1 < len) raw.v[1] = p.dt_raw(begin + t + 1, h);
    return raw;
  };
  Pair<T> next_dt = raw_dt(first_chunk);

  HeadState<kN> state;
  S* kept = ssm_state + (static_cast<int64_t>(slot) * p.n_head + h) * kP * kN;
  const int64_t own = (seq * p.n_head + h) * gridDim.x;
  // The first launch has one segment less.
  const int64_t scratch_row = kOutput ? own : own + seq * p.n_head + h;
  float* states = scratch.states + scratch_row * kP * kN;
  float* sums = scratch.sums + scratch_row;
  if (kOutput && segment > 0) {
    state.load(states + kP * kN);
    for (int i = 2; i <= segment; ++i) state.chain(exp2_fast(sums[i]), states + i * kP * kN);
  } else if (kOutput && last > 0) {
    state.load(states);
  } else if (segment == 0) {
    state.load(kept);
    if (!kOutput) state.store(states);
  } else {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.v[j][i] = 0.0F;
    }
  }
  if constexpr (kOutput) state.store(&tiles.S[0][0], kN + kPad);

  float sum_all = 0.0F;
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    const int buffer = chunk % 2;
    const int64_t t0 = static_cast<int64_t>(chunk) * kQ;

    // dt and its sums: lane l has tokens 2 l and 2 l + 1.
    const float bias = p.dt_bias[h];
    const auto step = [&](const T& raw, int64_t t) {
      const float dt = fminf(fmaxf(softplus(to_float(raw) + bias), p.dt_min), p.dt_max);
      return t < len ? dt : 0.0F;
    };
    const float dt0 = step(next_dt.v[0], t0 + 2 * lane);
    const float dt1 = step(next_dt.v[1], t0 + 2 * lane + 1);
    if (chunk + 1 < end_chunk) next_dt = raw_dt(chunk + 1);
    float until = (dt0 + dt1) * A;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float before = __shfl_up_sync(0xffffffffU, until, d);
      if (lane >= d) until += before;
    }
    const float sum_last = __shfl_sync(0xffffffffU, until, 31);
    sum_all += sum_last;
    __syncwarp();  // the last readers of the chunk before are done
    tiles.dt[warp][2 * lane] = dt0;
    tiles.dt[warp][2 * lane + 1] = dt1;
    tiles.sum[warp][2 * lane] = until - dt1 * A;
    tiles.sum[warp][2 * lane + 1] = until;
    await_copies<1>();
    __syncthreads();  // the chunk's tiles are there, and S as well

    if constexpr (kOutput) {
      const int row = 16 * warp + g;  // and row + 8
      const float sum_row[2] = {tiles.sum[warp][row], tiles.sum[warp][row + 8]};
      uint32_t c[kN / 16][4];  // C, rows of this warp
#pragma unroll
      for (int k = 0; k < kN / 16; ++k) {
        load_matrices(c[k], &tiles.C[buffer][16 * warp + lane % 16][16 * k + lane / 16 * 8]);
      }
      // Y = exp(sum_t) C S
      float y[kP / 8][4] = {};
#pragma unroll
      for (int k = 0; k < kN / 16; ++k) {
#pragma unroll
        for (int j = 0; j < kP / 16; ++j) {
          uint32_t b[4];
          load_matrices(b, &tiles.S[16 * j + lane / 16 * 8 + lane % 8][16 * k + lane / 8 % 2 * 8]);
          multiply_add<T>(y[2 * j], c[k], b[0], b[1]);
          multiply_add<T>(y[2 * j + 1], c[k], b[2], b[3]);
        }
      }
      const float grown[2] = {exp2_fast(sum_row[0]), exp2_fast(sum_row[1])};
#pragma unroll
      for (int j = 0; j < kP / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) y[j][i] *= grown[i / 2];
      }
      // Y += M X, 16 columns of M at a time, up to the diagonal.
      for (int block = 0; block <= warp; ++block) {
        float m[2][4] = {};
#pragma unroll
        for (int k = 0; k < kN / 16; ++k) {
          uint32_t b[4];
          load_matrices(
              b,
              &tiles.B[buffer][16 * block + lane / 16 * 8 + lane % 8][16 * k + lane / 8 % 2 * 8]);
          multiply_add<T>(m[0], c[k], b[0], b[1]);
          multiply_add<T>(m[1], c[k], b[2], b[3]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int s = 16 * block + 8 * j + 2 * q + i % 2;
            const float decay = exp2_fast(fminf(sum_row[i / 2] - tiles.sum[warp][s], 0.0F));
            m[j][i] *= s <= row + 8 * (i / 2) ? decay * tiles.dt[warp][s] : 0.0F;
          }
        }
        const uint32_t a[4] = {pack<T>(m[0][0], m[0][1]), pack<T>(m[0][2], m[0][3]),
                               pack<T>(m[1][0], m[1][1]), pack<T>(m[1][2], m[1][3])};
#pragma unroll
        for (int j = 0; j < kP / 16; ++j) {
          uint32_t b[4];
          load_transposed(b, &tiles.x[buffer][16 * block + lane % 16][16 * j + lane / 16 * 8]);
          multiply_add<T>(y[2 * j], a, b[0], b[1]);
          multiply_add<T>(y[2 * j + 1], a, b[2], b[3]);
        }
      }
      // This warp's rows of C are in registers: Y passes through them, to be written in pieces of
      // 16 bytes.
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kP / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto xs =
              *reinterpret_cast<const Pair<T>*>(&tiles.x[buffer][row + 8 * i][8 * j + 2 * q]);
          *reinterpret_cast<Pair<T>*>(&tiles.C[buffer][row + 8 * i][8 * j + 2 * q]) = {
              {from_float<T>(fmaf(D, to_float(xs.v[0]), y[j][2 * i])),
               from_float<T>(fmaf(D, to_float(xs.v[1]), y[j][2 * i + 1]))}};
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = lane; i < 16 * kP / 8; i += 32) {
        const int t = 16 * warp + i / (kP / 8);
        const int at = i % (kP / 8) * 8;
        if (t0 + t < len) {
          *reinterpret_cast<Vec16<T>*>(p.y + (begin + t0 + t) * p.y_stride +
                                       static_cast<int64_t>(h) * kP + at) =
              *reinterpret_cast<const Vec16<T>*>(&tiles.C[buffer][t][at]);
        }
      }
    }

    // S = exp(sum_last) S + X^T (exp(sum_last - sum_s) dt_s B_s)
    const float kept_share = exp2_fast(sum_last);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.v[j][i] *= kept_share;
    }
#pragma unroll
    for (int k = 0; k < kQ / 16; ++k) {
      uint32_t a[4];
      load_transposed(
          a, &tiles.x[buffer][16 * k + lane / 16 * 8 + lane % 8][16 * warp + lane / 8 % 2 * 8]);
      float weight[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = 16 * k + 8 * (i / 2) + 2 * q + i % 2;
        weight[i / 2][i % 2] =
            exp2_fast(fminf(sum_last - tiles.sum[warp][s], 0.0F)) * tiles.dt[warp][s];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = scaled<T>(a[i], weight[i / 2][0], weight[i / 2][1]);
#pragma unroll
      for (int j = 0; j < kN / 16; ++j) {
        uint32_t b[4];
        load_transposed(b, &tiles.B[buffer][16 * k + lane % 16][16 * j + lane / 16 * 8]);
        multiply_add<T>(state.v[2 * j], a, b[0], b[1]);
        multiply_add<T>(state.v[2 * j + 1], a, b[2], b[3]);
      }
    }

    __syncthreads();  // the chunk's tiles and S have been read
    if constexpr (kOutput) state.store(&tiles.S[0][0], kN + kPad);
    if (chunk + 2 < end_chunk) request(chunk + 2);
    end_copies();
  }

  if constexpr (kOutput) {
    if (segment == last) state.store(kept);
  } else {
    state.store(states + (segment + 1) * kP * kN);
    if (threadIdx.x == 0) sums[segment + 1] = sum_all;
  }
}

template <typename T, typename S, int kN>
void run(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state, const Batch& batch,
         void* scratch, cudaStream_t stream) {
  const SsdPointers<T> p = ssd_pointers<T>(y, in, ssm_state, batch);
  const int64_t heads = batch.n_seq * p.n_head;
  const int64_t chunks = ceil_div(batch.max_len, kQ);
  const int64_t segments =
      std::max<int64_t>(1, std::min<int64_t>(kBlocks / heads, chunks / kLeastChunks));
  const int64_t segment_chunks = ceil_div(chunks, segments);
  // What the division leaves may be fewer segments.
  const auto n_segment = static_cast<unsigned>(ceil_div(chunks, segment_chunks));
  Scratch s{};
  if (n_segment > 1) {
    s.states = static_cast<float*>(scratch);
    s.sums = s.states + heads * n_segment * kP * kN;
  }
  const auto n_head = static_cast<unsigned>(p.n_head);
  const auto n_seq = static_cast<unsigned>(batch.n_seq);
  const auto go = [&](const char* name, auto* kernel, unsigned n, size_t shared) {
    KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)));
    launch(name, kernel, dim3(n, n_head, n_seq), kThreads, shared, stream, p, ssm_state.as<S>(), s,
           static_cast<int>(segment_chunks));
  };
  using Shared = Tiles<T, kN>;
  if (n_segment > 1) {
    go("ssd_segments", &ssd_chunks_kernel<T, S, kN, false>, n_segment - 1, offsetof(Shared, C));
  }
  go("ssd_chunks", &ssd_chunks_kernel<T, S, kN, true>, n_segment, sizeof(Shared));
}

/// Whether the current device has the instructions, and a block this much shared memory.
bool runs_here(size_t shared) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
         shared <= static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

}  // namespace

size_t ssd_scratch_bytes() { return size_t{kBlocks} * (kP * 128 + 1) * sizeof(float); }

bool ssd_scan_chunks(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                     const Batch& batch, void* scratch, cudaStream_t stream) {
  const int64_t N = ssm_state.dim(3);
  const bool built = in.x.dtype != DType::f32 && ssm_state.dim(2) == kP && (N == 64 || N == 128) &&
                     aligned16(in.x) && aligned16(in.B) && aligned16(in.C) && aligned16(y);
  if (!built || !runs_here(N == 64 ? sizeof(Tiles<__half, 64>) : sizeof(Tiles<__half, 128>))) {
    return false;
  }
  const auto with_state = [&](auto t, auto n) {
    visit_type(ssm_state.dtype, "ssd_scan state", [&](auto s) {
      run<decltype(t), decltype(s), decltype(n)::value>(y, in, ssm_state, batch, scratch, stream);
    });
  };
  const auto with_size = [&](auto t) {
    if (N == 64) return with_state(t, std::integral_constant<int, 64>{});
    with_state(t, std::integral_constant<int, 128>{});
  };
  if (in.x.dtype == DType::f16) {
    with_size(__half{});
  } else {
    with_size(__nv_bfloat16{});
  }
  return true;
}

}  // namespace krait::cuda
