// mamba1_step_wide.cu - a decode step of a whole Mamba-1 model for up to 8 sequences, in one
// launch: the form for wide models at batch 4 and 8, which leave too little shared memory for
// mamba1_step.cu. Where that waits for the data themselves, this has grid-wide barriers.
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
//   1. u = norm(residual); xz = in_proj u, of the own channels; x = silu(conv(x));
//      the own channels' share of x_proj x is added to a sum over all blocks     | barrier
//   2. dt = softplus(dt_proj dt_low + bias); state update; y of the own channels | barrier
//   3. residual += out_proj y, of the own rows                                   | barrier
//
// and in the end logits = lm_head norm_f(residual).
//
// The sum over blocks is taken in 64-bit fixed point (a unit is 2^-40): integer sums don't depend
// on their order, so a step gives the same bits each time. Values beyond 2^23 would overflow;
// dt_low, B and C are of order 1 to 100.
//
// Products: 16 rows of a weight against 8 columns, one per sequence, on the tensor cores
// (mma.m16n8k16). For one sequence 7 of 8 columns are wasted, which costs nothing: weights arrive
// at 23 GB/s per SM. A warp reads 16 bytes of a row at a time, 8 neighbouring weights, and takes
// them as the k indices that the instruction wants; the activations are read the same way, so the
// order of k inside a product differs from memory's, the sum doesn't.
//
// Launch   cooperative, one block per SM: 16 consumer warps and the producer
// Needs    sm_90 (bulk copies), d_state 16, d_conv 4, sizes as in supports() of mamba1_step.cu
// Bytes    the weights, and state read and written, once
// Measured H100 80GB HBM3, bf16, f32 state, batch 1, cycles of a layer at 1.9 GHz, 130m / 2.8b
// (phase
//          1, 2, 3 with the wait that ends each): 10,300 / 40,000, 5,100 / 6,300, 7,700 / 20,900.
//          The products of 2.8b run at 2.6 TB/s; 130m is bound by the latency of its 14 block-wide
//          steps a layer. Tried and dropped: a warp for each stage instead of all (batch 8 3%
//          faster, batch 1 4% slower), 3 to 12 stages on their way (no difference), several stages
//          at a time and functions that are not inlined (no faster)
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
constexpr int kRows = 16;      // of a block of rows: the m of the tensor core
constexpr int kColumns = 512;  // of a stage of the ring
// 64 bytes of padding put neighbouring rows into different halves of the banks.
constexpr int kPitch = kColumns * 2 + 64;
constexpr int kStageBytes = kRows * kPitch;
constexpr int kMaxStages = 16;
constexpr int kState = 16;  // d_state
constexpr int kConv = 4;    // d_conv
constexpr int kLanes = 8;   // that share a channel in phase 2
constexpr int kMaxChannels = kThreads / kLanes;
[[maybe_unused]] constexpr float kFixedOne = 1099511627776.0F;  // 2^40
// Sums of x_proj are set to zero one layer before they are used, which is late enough to find them
// in L2 then, and two layers after they were used last.
constexpr int kSums = 3;

/// Rows whose products are summed over the warps together; then a thread has one output at most.
constexpr int kPassRows = 64;
static_assert(kPassRows * 8 <= kThreads && kMaxChannels <= kPassRows);

/// Floats for the warps' shares of a sum.
template <int B>
constexpr int kScratchFloats = std::max(4096, kPassRows* kWarps* B);

struct StepLayer {
  const void *in_proj, *x_proj_t, *dt_proj, *out_proj;  // x_proj_t [E, R + 2N]: transposed
  const float *norm, *in_bias, *conv, *conv_bias, *dt_bias, *A, *D, *out_bias;
  void *conv_state, *ssm_state;
};

/// Where things lie in shared memory, in bytes; pitches in elements.
struct Layout {
  int slots, table, activations, activation_pitch, xz, xz_pitch, residual, residual_pitch, dbc,
      sums, scale, scratch, ring;
};

struct StepParams {
  const StepLayer* layers;
  int n_layer, d_model, d_inner, dt_rank, n_proj, vocab_rows;  // n_proj = dt_rank + 2 * kState
  const void *embedding, *head;
  const float* norm_f;
  float eps, mixer_eps;
  const int32_t *ids, *slots;
  int n_seq;
  float* logits;
  int64_t logits_stride;
  float* residual;          // [8, d_model]
  void* y;                  // T [8, d_inner]
  unsigned long long* dbc;  // [kSums, 8, n_proj]: layer l has sums l % kSums; the first are zero
  unsigned* barrier;        // arrivals ever; arrivals at the start of the step
  DType state_type;
  int n_stage;
  Layout at;
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// ---- PTX ----------------------------------------------------------------------------------------

/// A barrier of the consumers alone.
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
// Parameters that are wanted after a barrier are requested before it: volatile keeps them there.
__device__ __forceinline__ float4 request4(const float* p) {
  float4 v;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ float2 request2(const float* p) {
  float2 v;
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ float request(const float* p) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}

// ---- the ring -----------------------------------------------------------------------------------

/// A place in the ring: the producer and each consumer walk through the same sequence of stages.
struct Ring {
  char* base;
  uint32_t full, empty;  // shared addresses of [n_stage] barriers each
  int n_stage;
  int stage = 0;
  uint32_t parity = 0;

  __device__ const char* data() const { return base + stage * kStageBytes; }
  __device__ void wait_full() const { mbarrier_wait(full + 8 * stage, parity); }
  __device__ void wait_empty() const { mbarrier_wait(empty + 8 * stage, parity ^ 1); }
  /// A consumer warp is done with the stage. Every warp must see every stage: else it could be a
  /// whole round ahead or behind and take one filling of a stage for another.
  __device__ void release() {
    __syncwarp();
    if (warp_arrives()) mbarrier_arrive(empty + 8 * stage);
    advance();
  }
  __device__ void advance() {
    if (++stage == n_stage) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// The states of this many sequences share a stage.
__device__ __forceinline__ int blocks_per_stage(int bytes) {
  return bytes > 0 ? kStageBytes / bytes : 32;
}

/// Fills the ring, in the order in which the consumers walk through it. A warp.
struct Producer {
  Ring ring;
  uint64_t policy;

  /// n_rows of a matrix with n_columns, 16 rows and 512 columns at a time.
  template <typename RowAt>
  __device__ void rows(int n_rows, int n_columns, RowAt row_at) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int first = 0; first < n_rows; first += kRows) {
      const int n = min(kRows, n_rows - first);
      for (int k = 0; k < n_columns; k += kColumns) {
        const int bytes = 2 * min(kColumns, n_columns - k);
        ring.wait_empty();
        const uint32_t bar = ring.full + 8 * ring.stage;
        if (lane == 0) mbarrier_expect(bar, n * bytes);
        __syncwarp();
        if (lane < n) {
          bulk_copy(shared_address(ring.data() + lane * kPitch), row_at(first + lane) + 2 * k,
                    bytes, bar, policy);
        }
        ring.advance();
      }
    }
  }

  /// n_rows contiguous rows of row_bytes each, as many to a stage as fit.
  __device__ void slices(const char* from, int n_rows, int row_bytes) {
    const int per_stage = kStageBytes / row_bytes;
    for (int row = 0; row < n_rows; row += per_stage) {
      const int bytes = min(per_stage, n_rows - row) * row_bytes;
      ring.wait_empty();
      const uint32_t bar = ring.full + 8 * ring.stage;
      if (threadIdx.x % 32 == 0) {
        mbarrier_expect(bar, bytes);
        bulk_copy(shared_address(ring.data()), from + static_cast<int64_t>(row) * row_bytes, bytes,
                  bar, policy);
      }
      ring.advance();
    }
  }

  /// n blocks of `bytes` each, as many to a stage as fit; a lane knows where its own lies, null:
  /// there is none, and its place is left as it is.
  __device__ void blocks(const char* own, int n, int bytes) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int per_stage = blocks_per_stage(bytes);
    for (int first = 0; first < n; first += per_stage) {
      const bool mine =
          lane >= first && lane < min(n, first + per_stage) && own != nullptr && bytes > 0;
      const int copies = __popc(__ballot_sync(0xffffffffU, mine));
      ring.wait_empty();
      const uint32_t bar = ring.full + 8 * ring.stage;
      if (lane == 0) mbarrier_expect(bar, copies * bytes);
      __syncwarp();
      if (mine) {
        bulk_copy(shared_address(ring.data() + (lane - first) * bytes), own, bytes, bar, policy);
      }
      ring.advance();
    }
  }
};

/// What every thread of a block knows.
template <typename T, int B>
struct Block {
  const StepParams& p;
  Run channels, rows, words;  // of d_inner, d_model, the vocabulary
  const StepLayer* layers;    // in shared memory
  T* activations;             // [B][activation_pitch]: the input of the product at hand
  float* xz;                  // [B][xz_pitch]: x, then z, of the own channels
  float* residual;            // [B][residual_pitch]: the own rows
  float* dbc;                 // [B][n_proj]: dt_low, B, C
  float* sums;                // [B][kWarps]
  float* scale;               // [B] of the last norm, [B] what is left to multiply by
  float* scratch;             // [kScratchFloats]
  const int* slot;            // [B], -1: no such sequence
};

template <typename T, int B>
__device__ void produce(const Block<T, B>& b, Ring ring) {
  const StepParams& p = b.p;
  Producer out{ring, evict_first_policy()};
  const int64_t D = p.d_model;
  const int64_t E = p.d_inner;
  const int state_row = kState * (p.state_type == DType::f32 ? 4 : 2);
  for (int l = 0; l < p.n_layer; ++l) {
    const StepLayer& w = b.layers[l];
    const auto at = [](const void* base, int64_t element) {
      return static_cast<const char*>(base) + element * static_cast<int64_t>(sizeof(T));
    };
    out.rows(2 * b.channels.n, p.d_model, [&](int i) {
      const bool is_x = i < b.channels.n;
      return at(w.in_proj, (b.channels.begin + (is_x ? i : E + i - b.channels.n)) * D);
    });
    out.slices(at(w.x_proj_t, static_cast<int64_t>(b.channels.begin) * p.n_proj), b.channels.n,
               p.n_proj * 2);
    out.slices(at(w.dt_proj, static_cast<int64_t>(b.channels.begin) * p.dt_rank), b.channels.n,
               p.dt_rank * 2);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int slot = lane < B ? b.slot[lane] : -1;
    out.blocks(slot < 0 ? nullptr
                        : static_cast<const char*>(w.ssm_state) +
                              (slot * E + b.channels.begin) * state_row,
               B, b.channels.n * state_row);
    out.rows(b.rows.n, p.d_inner, [&](int i) { return at(w.out_proj, (b.rows.begin + i) * E); });
  }
  out.rows(b.words.n, p.d_model, [&](int i) {
    return static_cast<const char*>(p.head) +
           (b.words.begin + i) * D * static_cast<int64_t>(sizeof(T));
  });
}

// ---- the consumers ------------------------------------------------------------------------------

/// All blocks have arrived, and what they wrote before is visible. arrive() and wait() are called
/// by all consumers; between them a thread may request what it will need and nobody writes.
struct GridBarrier {
  unsigned* arrivals;
  unsigned target;

  __device__ void arrive() {
    consumers_sync();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
    }
    target += gridDim.x;
  }
  __device__ void wait() const {
    if (threadIdx.x == 0) {
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
      } while (static_cast<int>(seen - target) < 0);
    }
    consumers_sync();
  }
};

/// store(row, n, value) for value = row `row` of the matrix in the ring times activations[n], for
/// all rows and the sequences that exist; a thread stores one value per pass, rows ascending with
/// the thread. The activations are in shared memory and everybody knows.
template <typename T, int B, typename Store>
__device__ __forceinline__ void product(const Block<T, B>& b, Ring& ring, int n_rows, int n_columns,
                                        Store store) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int group = lane / 4;    // row of A, column of B
  const int quarter = lane % 4;  // of 32 columns
  const T* in = b.activations + group * b.p.at.activation_pitch + quarter * 8;

  for (int base = 0; base < n_rows; base += kPassRows) {
    const int here = min(kPassRows, n_rows - base);
#pragma unroll 1
    for (int block = 0; block * kRows < here; ++block) {
      float acc[4] = {};
      for (int k = 0; k < n_columns; k += kColumns) {
        const int steps = min(kColumns, n_columns - k) / 32;
        ring.wait_full();
        const char* row = ring.data() + group * kPitch + quarter * 16;
        for (int s = warp; s < steps; s += kWarps) {
          const uint4 upper = *reinterpret_cast<const uint4*>(row + s * 64);
          const uint4 lower = *reinterpret_cast<const uint4*>(row + 8 * kPitch + s * 64);
          const uint4 x =
              group < B ? *reinterpret_cast<const uint4*>(in + k + s * 32) : uint4{0, 0, 0, 0};
          multiply_add<T>(acc, {upper.x, lower.x, upper.y, lower.y}, x.x, x.y);
          multiply_add<T>(acc, {upper.z, lower.z, upper.w, lower.w}, x.z, x.w);
        }
        ring.release();
      }
      // The warps' shares are summed through scratch[block][warp][row][n].
      float* to = b.scratch + (block * kWarps + warp) * kRows * B;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * quarter + i % 2;
        if (n < B) to[(group + i / 2 * 8) * B + n] = acc[i];
      }
    }
    consumers_sync();
    const int row = static_cast<int>(threadIdx.x) / B;
    const int n = static_cast<int>(threadIdx.x) % B;
    if (row < here && b.slot[n] >= 0) {
      const float* from = b.scratch + (row / kRows * kWarps * kRows + row % kRows) * B + n;
      float sum = 0.0F;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += from[i * kRows * B];
      store(base + row, n, sum);
    }
    if (base + kPassRows < n_rows) consumers_sync();  // before scratch is written again
  }
}

/// The norm's weights of a thread: quads threadIdx.x and threadIdx.x + kThreads of a row.
struct NormWeights {
  float4 quad[2];
  __device__ void load(const float* weight, int d_model) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int q = static_cast<int>(threadIdx.x) + i * kThreads;
      if (4 * q < d_model) quad[i] = request4(weight + 4 * q);
    }
  }
};

/// activations[n] = residual of sequence n times the norm's weights, and in b.scale[B + n] what the
/// product with them is still to be multiplied by to make it that of rms_norm: so nobody waits for
/// the mean before the rows are in place. To keep within f16 they are multiplied by the scale of
/// the norm before this one (b.scale[n], at first 1). value(n, q) reads quad q of a row.
template <typename T, int B, typename Value>
__device__ __forceinline__ void normalise(const Block<T, B>& b, const NormWeights& weight,
                                          Value value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  constexpr int kAtOnce = B < 4 ? B : 4;
#pragma unroll
  for (int first = 0; first < B; first += kAtOnce) {
    float4 v[kAtOnce][2];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int q = static_cast<int>(threadIdx.x) + i * kThreads;
        v[n][i] =
            4 * q < b.p.d_model ? value(min(first + n, b.p.n_seq - 1), q) : float4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const float f = b.scale[first + n];
      float sum = 0.0F;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int q = static_cast<int>(threadIdx.x) + i * kThreads;
        if (4 * q >= b.p.d_model) break;
        const float4 x = v[n][i];
        const float4 w = weight.quad[i];
        sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        *reinterpret_cast<Quad<T>*>(b.activations + (first + n) * b.p.at.activation_pitch +
                                    4 * q) = {
            from_float<T>(x.x * f * w.x), from_float<T>(x.y * f * w.y),
            from_float<T>(x.z * f * w.z), from_float<T>(x.w * f * w.w)};
      }
      sum = warp_sum(sum);
      if (lane == 0) b.sums[(first + n) * kWarps + warp] = sum;
    }
  }
  consumers_sync();
  if (warp < B) {
    const float sum = warp_sum(lane < kWarps ? b.sums[warp * kWarps + lane] : 0.0F);
    if (lane == 0) {
      const float scale = rsqrtf(sum / static_cast<float>(b.p.d_model) + b.p.eps);
      b.scale[B + warp] = scale / b.scale[warp];
      b.scale[warp] = scale;
    }
  }
  // product() has a barrier before its results, so before the scale is needed.
}

/// What a thread needs for the convolution of the one value that product() hands it.
template <typename T>
struct ConvInputs {
  float4 weight;
  float bias;
  T window[kConv - 1];  // the inputs before this one, oldest first

  template <int B>
  __device__ void load(const Block<T, B>& b, const StepLayer& w) {
    const int row = static_cast<int>(threadIdx.x) / B;
    const int slot = b.slot[static_cast<int>(threadIdx.x) % B];
    if (row >= b.channels.n || slot < 0) return;
    const int64_t e = b.channels.begin + row;
    weight = request4(w.conv + e * kConv);
    bias = w.conv_bias != nullptr ? request(w.conv_bias + e) : 0.0F;
    const T* state = static_cast<const T*>(w.conv_state) +
                     static_cast<int64_t>(slot) * (kConv - 1) * b.p.d_inner + e;
#pragma unroll
    for (int j = 0; j < kConv - 1; ++j) window[j] = __ldcg(state + j * b.p.d_inner);
  }
};

/// The share of the own channels in x_proj x, added to the sum over all blocks.
template <typename T, int B>
__device__ __forceinline__ void add_x_proj(const Block<T, B>& b, Ring& ring,
                                           unsigned long long* dbc) {
  const int J = b.p.n_proj;
  const int pairs = J / 2;
  const int tid = static_cast<int>(threadIdx.x);
  // `split` threads share the channels of a pair of outputs.
  const int split = min(kThreads / pairs, kScratchFloats<B> / (B * J));
  const int j = tid % pairs * 2;
  const int part = tid / pairs;
  float acc[B][2] = {};
  const int per_stage = kStageBytes / (J * 2);
  for (int first = 0; first < b.channels.n; first += per_stage) {
    const int here = min(per_stage, b.channels.n - first);
    ring.wait_full();
    const T* w = reinterpret_cast<const T*>(ring.data()) + j;
    if (part < split) {
#pragma unroll 4
      for (int c = part; c < here; c += split) {
        const auto two = *reinterpret_cast<const Two<T>*>(w + c * J);
        const float w0 = to_float(two.a);
        const float w1 = to_float(two.b);
#pragma unroll
        for (int n = 0; n < B; ++n) {
          const float x = b.xz[n * b.p.at.xz_pitch + first + c];
          acc[n][0] = fmaf(w0, x, acc[n][0]);
          acc[n][1] = fmaf(w1, x, acc[n][1]);
        }
      }
    }
    ring.release();
  }
  if (part < split) {
#pragma unroll
    for (int n = 0; n < B; ++n) {
      *reinterpret_cast<float2*>(b.scratch + (part * B + n) * J + j) = {acc[n][0], acc[n][1]};
    }
  }
  consumers_sync();
  for (int i = tid; i < B * J; i += kThreads) {
    if (b.slot[i / J] < 0) continue;
    float sum = 0.0F;
    for (int s = 0; s < split; ++s) sum += b.scratch[s * B * J + i];
    atomicAdd(dbc + i, static_cast<unsigned long long>(__float2ll_rn(sum * kFixedOne)));
  }
}

/// dbc in shared memory from the sums over all blocks.
template <typename T, int B>
__device__ __forceinline__ void read_dbc(const Block<T, B>& b, const unsigned long long* dbc) {
  const int J = b.p.n_proj;
  for (int i = static_cast<int>(threadIdx.x); i < B * J; i += kThreads) {
    b.dbc[i] = static_cast<float>(static_cast<long long>(__ldcg(dbc + i))) * (1.0F / kFixedOne);
  }
  consumers_sync();
  if (b.p.mixer_eps > 0.0F) {  // Falcon-Mamba: dt_low, B and C each by its root mean square
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int unit = static_cast<int>(threadIdx.x / 32); unit < 3 * B; unit += kWarps) {
      const int part = unit % 3;
      const int width = part == 0 ? b.p.dt_rank : kState;
      float* v = b.dbc + unit / 3 * J + (part == 0 ? 0 : b.p.dt_rank + (part - 1) * kState);
      float sum = 0.0F;
      for (int i = lane; i < width; i += 32) sum += v[i] * v[i];
      const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(width) + b.p.mixer_eps);
      for (int i = lane; i < width; i += 32) v[i] *= scale;
    }
    consumers_sync();
  }
}

/// A thread's parameters of the state update: channel threadIdx.x / 8, two of its states.
struct UpdateInputs {
  float2 A;
  float D, dt_bias;
  template <typename T, int B>
  __device__ void load(const Block<T, B>& b, const StepLayer& w) {
    const int c = static_cast<int>(threadIdx.x) / kLanes;
    if (c >= b.channels.n) return;
    const int64_t e = b.channels.begin + c;
    A = request2(w.A + e * kState + 2 * (threadIdx.x % kLanes));
    D = request(w.D + e);
    dt_bias = request(w.dt_bias + e);
  }
};

/// Phase 2: dt, the state and y of the own channels. 8 lanes share a channel, 2 states each.
template <typename T, int B>
__device__ __forceinline__ void update_state(const Block<T, B>& b, Ring& ring, const StepLayer& w,
                                             const UpdateInputs& in) {
  const int R = b.p.dt_rank;
  const int c = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool live = c < b.channels.n;
  float dt[B] = {};
  const int per_stage = kStageBytes / (R * 2);
  for (int first = 0; first < b.channels.n; first += per_stage) {
    ring.wait_full();
    if (live && c >= first && c < first + per_stage) {
      const T* row = reinterpret_cast<const T*>(ring.data()) + (c - first) * R;
#pragma unroll 4
      for (int r = 2 * lane; r < R; r += 2 * kLanes) {
        const auto two = *reinterpret_cast<const Two<T>*>(row + r);
        const float w0 = to_float(two.a);
        const float w1 = to_float(two.b);
#pragma unroll
        for (int n = 0; n < B; ++n) {
          const float2 low = *reinterpret_cast<const float2*>(b.dbc + n * b.p.n_proj + r);
          dt[n] = fmaf(w1, low.y, fmaf(w0, low.x, dt[n]));
        }
      }
    }
    ring.release();
  }
#pragma unroll
  for (int n = 0; n < B; ++n) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) dt[n] += __shfl_xor_sync(0xffffffffU, dt[n], d);
  }

  const int64_t e = b.channels.begin + c;
  const int block_bytes = b.channels.n * kState * (b.p.state_type == DType::f32 ? 4 : 2);
  const int per_state = blocks_per_stage(block_bytes);
  float y[B];
#pragma unroll
  for (int n = 0; n < B; ++n) {
    const int place = n % per_state;
    if (place == 0) ring.wait_full();
    y[n] = 0.0F;
    if (live && b.slot[n] >= 0) {
      const float* bc = b.dbc + n * b.p.n_proj + R + 2 * lane;
      const float2 of_B = *reinterpret_cast<const float2*>(bc);
      const float2 of_C = *reinterpret_cast<const float2*>(bc + kState);
      const float step = softplus(dt[n] + in.dt_bias);
      const float dx = step * b.xz[n * b.p.at.xz_pitch + c];
      const float decay[2] = {exp2_fast(step * (in.A.x * kLog2e)),
                              exp2_fast(step * (in.A.y * kLog2e))};
      const int at = c * kState + 2 * lane;
      const int64_t to = (b.slot[n] * static_cast<int64_t>(b.p.d_inner) + e) * kState + 2 * lane;
      const auto update = [&](auto s) {
        using S = decltype(s);
        const auto old = *reinterpret_cast<const Two<S>*>(
            reinterpret_cast<const S*>(ring.data() + place * block_bytes) + at);
        const float h0 = fmaf(decay[0], to_float(old.a), dx * of_B.x);
        const float h1 = fmaf(decay[1], to_float(old.b), dx * of_B.y);
        *reinterpret_cast<Two<S>*>(static_cast<S*>(w.ssm_state) + to) = {from_float<S>(h0),
                                                                         from_float<S>(h1)};
        y[n] = fmaf(of_C.y, h1, of_C.x * h0);
      };
      if (b.p.state_type == DType::f32) {
        update(float{});
      } else if (b.p.state_type == DType::bf16) {
        update(__nv_bfloat16{});
      } else {
        update(__half{});
      }
    }
    if (place == per_state - 1 || n == B - 1) ring.release();
  }
#pragma unroll
  for (int n = 0; n < B; ++n) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) y[n] += __shfl_xor_sync(0xffffffffU, y[n], d);
  }
  // Lane n finishes sequence n.
#pragma unroll
  for (int n = 0; n < B; ++n) {
    if (lane != n || !live || b.slot[n] < 0) continue;
    const float* own = b.xz + n * b.p.at.xz_pitch;
    const float gated = fmaf(in.D, own[c], y[n]) * silu(own[b.channels.n + c]);
    static_cast<T*>(b.p.y)[static_cast<int64_t>(n) * b.p.d_inner + e] = from_float<T>(gated);
  }
}

/// Brings to L2 what the next layer needs besides the ring: with the memory busy streaming, a
/// request takes many times its usual latency.
template <typename T, int B>
__device__ __forceinline__ void prefetch_layer(const Block<T, B>& b, const StepLayer& w) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const auto span = [&](int by, const void* from, int bytes) {
    if (by != warp || bytes == 0) return;
    for (int at = lane * 128; at < bytes + 127; at += 32 * 128) {
      prefetch_l2(static_cast<const char*>(from) + min(at, bytes - 1));
    }
  };
  const int64_t first = b.channels.begin;
  const int n = b.channels.n;
  span(0, w.conv + first * kConv, n * kConv * 4);
  span(1, w.A + first * kState, n * kState * 4);
  span(2, w.D + first, n * 4);
  span(3, w.dt_bias + first, n * 4);
  if (w.conv_bias != nullptr) span(4, w.conv_bias + first, n * 4);
  for (int i = warp; i < B * (kConv - 1); i += kWarps) {
    const int slot = b.slot[i / (kConv - 1)];
    if (slot < 0) continue;
    const int64_t row = static_cast<int64_t>(slot) * (kConv - 1) + i % (kConv - 1);
    span(warp, static_cast<const T*>(w.conv_state) + row * b.p.d_inner + first, n * 2);
  }
  // All blocks need the norm's weights: each brings a line of them.
  const int line = static_cast<int>(blockIdx.x) * 128;
  if (threadIdx.x == kThreads - 1 && line < b.p.d_model * 4) {
    prefetch_l2(reinterpret_cast<const char*>(w.norm) + line);
  }
}

template <typename T, int B>
__device__ void consume(const Block<T, B>& b, Ring ring) {
  const StepParams& p = b.p;
  const int tid = static_cast<int>(threadIdx.x);
  const int D = p.d_model;
  const int E = p.d_inner;
  GridBarrier grid{p.barrier, __ldcg(p.barrier + 1)};

  const auto embedded = [&](int n, int q) {
    const T* row = static_cast<const T*>(p.embedding) + static_cast<int64_t>(p.ids[n]) * D;
    const auto v = *reinterpret_cast<const Quad<T>*>(row + 4 * q);
    return float4{to_float(v.v[0]), to_float(v.v[1]), to_float(v.v[2]), to_float(v.v[3])};
  };
  const auto streamed = [&](int n, int q) {
    return __ldcg(
        reinterpret_cast<const float4*>(p.residual + static_cast<int64_t>(n) * D + 4 * q));
  };

  NormWeights norm;
  norm.load(b.layers[0].norm, D);
  ConvInputs<T> conv;
  conv.load(b, b.layers[0]);
  // The own rows of the residual stream stay here; the others read a copy.
  for (int i = tid; i < B * b.rows.n; i += kThreads) {
    const int n = i / b.rows.n;
    const int r = i % b.rows.n;
    if (n >= p.n_seq) continue;
    b.residual[n * p.at.residual_pitch + r] = to_float(
        static_cast<const T*>(p.embedding)[static_cast<int64_t>(p.ids[n]) * D + b.rows.begin + r]);
  }

  if (tid < B) b.scale[tid] = 1.0F;
  consumers_sync();

  for (int l = 0; l < p.n_layer; ++l) {
    const StepLayer& w = b.layers[l];
    const auto sums_of = [&](int layer) { return p.dbc + layer % kSums * 8 * p.n_proj; };
    unsigned long long* dbc = sums_of(l);
    if (l + 1 < p.n_layer) prefetch_layer(b, b.layers[l + 1]);

    // 1
    if (l == 0) {
      normalise(b, norm, embedded);
    } else {
      normalise(b, norm, streamed);
    }
    product(b, ring, 2 * b.channels.n, D, [&](int i, int n, float v) {
      const bool is_x = i < b.channels.n;
      v *= b.scale[B + n];
      if (w.in_bias != nullptr) {
        v += w.in_bias[is_x ? b.channels.begin + i : E + b.channels.begin + i - b.channels.n];
      }
      v = to_float(from_float<T>(v));
      if (is_x) {  // the first pass: the value for which this thread has loaded `conv`
        T* state = static_cast<T*>(w.conv_state) +
                   static_cast<int64_t>(b.slot[n]) * (kConv - 1) * E + b.channels.begin + i;
        state[0] = conv.window[1];
        state[E] = conv.window[2];
        state[2 * E] = from_float<T>(v);
        float c = fmaf(conv.weight.x, to_float(conv.window[0]), conv.bias);
        c = fmaf(conv.weight.y, to_float(conv.window[1]), c);
        c = fmaf(conv.weight.z, to_float(conv.window[2]), c);
        c = fmaf(conv.weight.w, v, c);
        v = to_float(from_float<T>(silu(c)));
      }
      b.xz[n * p.at.xz_pitch + i] = v;
    });
    consumers_sync();
    add_x_proj(b, ring, dbc);
    grid.arrive();
    UpdateInputs update;
    update.load(b, w);
    grid.wait();

    // 2
    read_dbc(b, dbc);
    update_state(b, ring, w, update);
    grid.arrive();
    grid.wait();

    // 3
    for (int i = tid; i < B * (E / 8); i += kThreads) {
      const int n = i / (E / 8);
      const int at = i % (E / 8) * 8;
      if (b.slot[n] < 0) continue;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       shared_address(b.activations + n * p.at.activation_pitch + at)),
                   "l"(static_cast<const T*>(p.y) + static_cast<int64_t>(n) * E + at)
                   : "memory");
    }
    if (static_cast<int>(blockIdx.x) == l % static_cast<int>(gridDim.x)) {
      unsigned long long* next = sums_of(l + 1 < p.n_layer ? l + 1 : 0);
      for (int i = tid; i < 8 * p.n_proj; i += kThreads) next[i] = 0;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    consumers_sync();
    product(b, ring, b.rows.n, E, [&](int i, int n, float v) {
      float& r = b.residual[n * p.at.residual_pitch + i];
      r += w.out_bias != nullptr ? v + w.out_bias[b.rows.begin + i] : v;
      p.residual[static_cast<int64_t>(n) * D + b.rows.begin + i] = r;
    });
    grid.arrive();
    if (l + 1 < p.n_layer) {
      norm.load(b.layers[l + 1].norm, D);
      conv.load(b, b.layers[l + 1]);
    } else {
      norm.load(p.norm_f, D);
    }
    grid.wait();
  }

  normalise(b, norm, streamed);
  product(b, ring, b.words.n, D, [&](int i, int n, float v) {
    p.logits[n * p.logits_stride + b.words.begin + i] = v * b.scale[B + n];
  });
  // Everybody has read it, or could not have arrived at the barriers above.
  if (blockIdx.x == 0 && tid == 0) p.barrier[1] = grid.target;
}

template <typename T, int B>
__global__ void __launch_bounds__(kThreads + 32, 1)
    mamba1_step_wide_kernel(const __grid_constant__ StepParams p) {
  extern __shared__ __align__(128) char shared[];
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  Ring ring{shared + p.at.ring, shared_address(shared), shared_address(shared) + 8 * kMaxStages,
            p.n_stage};
  if (tid == 0) {
    for (int i = 0; i < p.n_stage; ++i) {
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
  const Block<T, B> b{p,
                      Run(p.d_inner, block, blocks),
                      Run(p.d_model, block, blocks),
                      Run(p.vocab_rows, block, blocks),
                      table,
                      reinterpret_cast<T*>(shared + p.at.activations),
                      reinterpret_cast<float*>(shared + p.at.xz),
                      reinterpret_cast<float*>(shared + p.at.residual),
                      reinterpret_cast<float*>(shared + p.at.dbc),
                      reinterpret_cast<float*>(shared + p.at.sums),
                      reinterpret_cast<float*>(shared + p.at.scale),
                      reinterpret_cast<float*>(shared + p.at.scratch),
                      reinterpret_cast<const int*>(shared + p.at.slots)};
  if (tid < B) reinterpret_cast<int*>(shared + p.at.slots)[tid] = tid < p.n_seq ? p.slots[tid] : -1;
  __syncthreads();
  if (tid / 32 == kWarps) {
    produce(b, ring);
  } else {
    consume(b, ring);
  }
}

#else

template <typename T, int B>
__global__ void mamba1_step_wide_kernel(const __grid_constant__ StepParams) {}

#endif

}  // namespace

/// Everything prepared for one model and the states of one pool.
struct Mamba1WideStepper::Plan {
  std::vector<StepLayer> layers;  // what the device has, but for x_proj_t: the plan's identity
  std::vector<Buffer> memory;
  StepParams params{};
  DType weight_type = DType::bf16;
};

namespace {

/// Shared memory for B sequences; the ring takes what is left. n_stage 0: too little is.
template <int B>
void lay_out(StepParams& p, int blocks, int shared_limit) {
  const auto most = [&](int total) { return static_cast<int>(ceil_div(total, blocks)); };
  Layout& at = p.at;
  int next = 2 * 8 * kMaxStages;
  const auto place = [&](int bytes) {
    const int here = next;
    next += round_up(bytes, 16);
    return here;
  };
  at.slots = place(B * 4);
  at.table = place(p.n_layer * static_cast<int>(sizeof(StepLayer)));
  // 16 bytes more than a row spread the sequences over the banks.
  at.activation_pitch = std::max(p.d_model, p.d_inner) + 8;
  at.activations = place(B * at.activation_pitch * 2);
  at.xz_pitch = 2 * most(p.d_inner);
  at.xz = place(B * at.xz_pitch * 4);
  at.residual_pitch = most(p.d_model);
  at.residual = place(B * at.residual_pitch * 4);
  at.dbc = place(B * p.n_proj * 4);
  at.sums = place(B * kWarps * 4);
  at.scale = place(2 * B * 4);
  at.scratch = place(kScratchFloats<B> * 4);
  at.ring = round_up(next, 128);
  p.n_stage = std::clamp((shared_limit - at.ring) / kStageBytes, 0, kMaxStages);
  if (p.n_stage < 4) p.n_stage = 0;
}

/// False: not built for these sizes. `refused`: the device had no room for all blocks at once.
template <typename T, int B>
bool launch_step(StepParams p, bool& refused, cudaStream_t stream) {
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  lay_out<B>(p, blocks, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (p.n_stage == 0) return false;
  auto* kernel = &mamba1_step_wide_kernel<T, B>;
  const int shared = p.at.ring + p.n_stage * kStageBytes;
  return launch_together(kernel, blocks, kThreads + 32, shared, p, refused, stream);
}

template <typename T>
bool launch_step(const StepParams& p, bool& refused, cudaStream_t stream) {
  if (p.n_seq == 1) return launch_step<T, 1>(p, refused, stream);
  if (p.n_seq == 2) return launch_step<T, 2>(p, refused, stream);
  if (p.n_seq <= 4) return launch_step<T, 4>(p, refused, stream);
  return launch_step<T, 8>(p, refused, stream);
}

StepLayer pointers(const Mamba1Layer& w, const std::vector<Tensor>& state) {
  return {w.in_proj.data,        nullptr,
          w.dt_proj.data,        w.out_proj.data,
          w.norm.as<float>(),    w.in_proj_bias.as<float>(),
          w.conv1d.as<float>(),  w.conv1d_bias.as<float>(),
          w.dt_bias.as<float>(), w.A.as<float>(),
          w.D.as<float>(),       w.out_proj_bias.as<float>(),
          state[0].data,         state[1].data};
}

}  // namespace

Mamba1WideStepper::Mamba1WideStepper(Allocate allocate) : allocate_(std::move(allocate)) {}
Mamba1WideStepper::~Mamba1WideStepper() = default;

bool Mamba1WideStepper::run(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
                            const Batch& batch, std::span<const std::vector<Tensor>> state,
                            cudaStream_t stream) {
  if (refused_) return false;
  std::vector<StepLayer> layers;
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    layers.push_back(pointers(weights.layers[i], state[i]));
  }
  Plan* plan = find_plan(plans_, layers);
  const Mamba1Layer& l = weights.layers.front();
  if (plan == nullptr) {
    const int64_t E = l.D.dim(0);
    const int64_t J = l.x_proj.dim(0);
    const auto n_layer = static_cast<int64_t>(layers.size());
    auto made = std::make_unique<Plan>();
    made->layers = layers;
    made->weight_type = l.in_proj.dtype;
    const auto keep = [&](size_t bytes) {
      made->memory.push_back(allocate_(bytes, "decode step"));
      return made->memory.back().data();
    };
    auto* transposed = static_cast<char*>(keep(static_cast<size_t>(n_layer * E * J * 2)));
    for (size_t i = 0; i < layers.size(); ++i) {
      void* to = transposed + static_cast<int64_t>(i) * E * J * 2;
      transpose_kernel<<<static_cast<unsigned>(ceil_div(E * J, 256)), 256, 0, stream>>>(
          static_cast<uint16_t*>(to), weights.layers[i].x_proj.as<uint16_t>(), J, E, J);
      KRAIT_CUDA(cudaGetLastError());
      layers[i].x_proj_t = to;
    }
    StepParams& p = made->params;
    const size_t table = layers.size() * sizeof(StepLayer);
    p.layers = static_cast<StepLayer*>(keep(table));
    KRAIT_CUDA(cudaMemcpyAsync(const_cast<StepLayer*>(p.layers), layers.data(), table,
                               cudaMemcpyHostToDevice, stream));
    p.n_layer = static_cast<int>(n_layer);
    p.d_model = static_cast<int>(l.norm.dim(0));
    p.d_inner = static_cast<int>(E);
    p.dt_rank = static_cast<int>(l.dt_proj.dim(1));
    p.n_proj = static_cast<int>(J);
    p.residual = static_cast<float*>(keep(static_cast<size_t>(8 * l.norm.dim(0) * 4)));
    p.y = keep(static_cast<size_t>(8 * E * 2));
    const auto zeroed = [&](size_t bytes) {
      void* at = keep(bytes);
      KRAIT_CUDA(cudaMemsetAsync(at, 0, bytes, stream));
      return at;
    };
    p.dbc = static_cast<unsigned long long*>(zeroed(static_cast<size_t>(kSums * 8 * J * 8)));
    p.barrier = static_cast<unsigned*>(zeroed(2 * sizeof(unsigned)));
    KRAIT_CUDA(cudaStreamSynchronize(stream));  // `layers` goes
    plans_.push_back(std::move(made));
    plan = plans_.back().get();
  }
  StepParams p = plan->params;
  set_inputs(p, weights, logits, ids, batch, state);
  return plan->weight_type == DType::bf16 ? launch_step<__nv_bfloat16>(p, refused_, stream)
                                          : launch_step<__half>(p, refused_, stream);
}

}  // namespace krait::cuda
