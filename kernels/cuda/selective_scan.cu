// selective_scan.cu - the Mamba-1 recurrence over whole sequences.
//
//   dt = softplus(dt_raw + dt_bias)
//   h  = exp(dt * A) * h + dt * B * x        per channel e, state n, from h = ssm_state[slot]
//   y  = (sum_n C * h + D * x) * silu(z)
//
// Serial in time is one FMA a token and state: the decays exp(dt * A) and what is added, dt * x *
// B, don't depend on h. So warps take turns in time. A warp owns the 8 tokens of its turn for all
// channels of the block, and does them in units, one group of 8 channels after the other: it makes
// all decays and addends of a unit in registers, waits for the h of this group that the warp with
// the turn before hands on through shared memory, runs the chain, hands h on itself, and sums over
// the states and gates while the next warps run theirs. Nothing else passes between warps. In the
// registers that the sums leave, the decays and addends of the warp's next unit appear, which mixes
// special functions with FMAs.
//
// What a warp's units share is done once a round: B and C are made f32, and rows of x, dt, z and y
// come and go in pieces of as many channels as the block has, so that no sector of memory is asked
// for twice. Where the groups of a block each had warps of their own, a unit took a third more
// accesses to shared memory, and L2 was busy for 71% of the time for 37%.
//
// A link of the chain, from one warp's handing on to the next one's, must be short where a block
// has few groups: nothing but the wait, a load, the chain and a store belongs between them. A block
// of one group takes about 156 cycles for it, one of two about 230.
//
// dt comes from a product of its own. Made by the warps that scan it costs them as much as that
// takes, and more from 8192 tokens on; made by other blocks on multiprocessors that the scan leaves
// idle it gains less than filling these with the scan.
//
// 4 lanes share a channel and hold 4 of 16 states each; their shares of y are summed for 4 tokens
// at a time by a transposition, after which each lane has the y of those tokens whose x, dt and z
// it prepared. A block may have half a group more, 4 channels of 8 lanes with 2 states each: 1536
// channels are 96 blocks of two groups, but 128 of one and a half.
//
// Shapes   x, dt, z, y T [n_tok, d_inner]; B, C T [n_tok, d_state] views; A f32 [d_inner, d_state];
//          ssm_state [slot, d_inner, d_state] in f32, bf16 or f16
// Launch   grid (half groups of 4 channels / n_half, n_seq), n_turn warps; choose_plan()
// Types    arithmetic f32. With 16-bit inputs exp is the special-function unit's (2 ulp); with f32
//          inputs a polynomial (1 ulp), since a long memory adds up what a decay close to 1 is off.
//          More than 16 states are done 16 at a time, unit by unit
// Bytes    n_tok * d_inner * 4 * sizeof(T), and per block its share of B, C and the state
// Roofline d_state + 3 special-function results per channel and token, and about 160 instructions
//          of a thread: bound by both, not by bytes
// Measured H100 80GB HBM3, bf16, 2048 tokens of one sequence, us at d_inner 1536, 2048, 3072, 4096
//          and 5120 (tools/bench_ops): 31, 36, 51, 65 and 81; 8192 tokens of 1536: 109. Special
//          functions alone would need 14, 19, 29, 38 and 48. What binds is the pipe of shared
//          memory, 89 cycles a unit: with neither gates nor exponentials 8192 tokens of 2048 take
//          105 us of 126, with the pipe by count at 89%. Without gates alone 119, without
//          exponentials alone 118; at 5120, 2048 tokens, 76 and 69 of 81. A part of the
//          exponentials as polynomials costs more issue slots than it saves: 2, 4, 6 and 8 of 16
//          states take 83, 85, 94 and 108 us at 5120. Units of 16 tokens with 8 warps: 34, 40 and
//          95 us at 1536, 2048 and 5120
// Same as  kernels/cpu; tests/ops
#include <algorithm>
#include <climits>
#include <limits>
#include <type_traits>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kStates = 16;     // of a pass
constexpr int kMaxWarps = 16;   // of a block
constexpr int kMaxHalves = 10;  // of a block: half groups of channels

struct ScanShape {
  int d_inner;
  int d_state;
  int n_pass;                 // ceil(d_state / kStates)
  DType state;                // of ssm_state
  int64_t x, dt, z, y, B, C;  // elements from a row to the next
};

template <typename T>
struct ScanPointers {
  const T *x, *dt, *z, *B, *C;  // y may be x or dt: no __restrict__
  const float *A, *D, *dt_bias;
  T* y;
  void* ssm_state;
  const int32_t *seq_start, *slots;
};

__device__ __forceinline__ float load_state(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_float(static_cast<const __half*>(p)[i]);
}
__device__ __forceinline__ void store_state(void* p, DType type, int64_t i, float v) {
  if (type == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else if (type == DType::bf16) {
    static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
  } else {
    static_cast<__half*>(p)[i] = from_float<__half>(v);
  }
}

/// 2^v to 1 ulp by arithmetic alone, for v <= 128; below 2^-126 it becomes 0.
__device__ __forceinline__ float exp2_exact(float v) {
  const float n = rintf(v);
  const float f = v - n;  // exact, |f| <= 0.5
  // 2^f = e^(f ln 2), Taylor to the seventh power: the rest is below 2^-27
  float p = 1.5252733e-5F;
  p = fmaf(p, f, 1.5403530e-4F);
  p = fmaf(p, f, 1.3333558e-3F);
  p = fmaf(p, f, 9.6181291e-3F);
  p = fmaf(p, f, 5.5504109e-2F);
  p = fmaf(p, f, 2.4022651e-1F);
  p = fmaf(p, f, 6.9314718e-1F);
  p = fmaf(p, f, 1.0F);
  const float scaled = __int_as_float(__float_as_int(p) + (static_cast<int>(n) << 23));
  return v < -125.5F ? 0.0F : scaled;
}

/// Of a value that all lanes have: tells the compiler so, which then knows that a branch on it
/// keeps the warp together.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xffffffffU, v, 0); }

/// Warps meet here, turn after turn: some arrive, others wait until `count` of them have.
struct Gate {
  alignas(8) unsigned long long state;

  __device__ __forceinline__ uint32_t at() const { return shared_address(&state); }
  /// By one thread, before a block barrier. `warps` of them arrive in a turn.
  __device__ __forceinline__ void open(unsigned warps) {
    const unsigned count = warps * kWarpArrivals;
#if __CUDA_ARCH__ >= 800
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at()), "r"(count) : "memory");
#else
    state = static_cast<unsigned long long>(count) << 32;  // and below it, arrivals so far
#endif
  }
  /// By a whole warp, once a turn.
  __device__ __forceinline__ void arrive(int lane) {
    __syncwarp();
    if (lane >= kWarpArrivals) return;
#if __CUDA_ARCH__ >= 800
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(at()) : "memory");
#else
    __threadfence_block();
    atomicAdd(reinterpret_cast<unsigned*>(&state), 1U);
#endif
  }
  /// Until all have arrived for the `turn`th time, counted from 0. At most one turn behind them.
  __device__ __forceinline__ void wait(int turn) const {
#if __CUDA_ARCH__ >= 900
    mbarrier_wait(at(), static_cast<uint32_t>(turn & 1));
#elif __CUDA_ARCH__ >= 800
    unsigned done = 0;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(at()), "r"(turn & 1)
          : "memory");
    } while (!__all_sync(0xffffffffU, done));
#else
    const volatile unsigned* arrived = reinterpret_cast<const volatile unsigned*>(&state);
    const unsigned count = arrived[1];
    while (!__all_sync(0xffffffffU, arrived[0] >= (turn + 1) * count)) __nanosleep(64);
    __threadfence_block();
#endif
  }
};

// How the lanes of a warp share a unit: of a group of 8 channels 4 lanes each, or, of the half
// group that a block may have last, 8.
constexpr int kChannels = 8;  // of a group
constexpr int kTokens = 8;    // of a unit
constexpr int kHeld = 4;      // states of a lane, at most
constexpr int kItems = 2;     // tokens whose x, dt, z and y a lane has, at most

struct Share {
  int lanes;    // of a channel
  int state;    // which of them this one is
  int channel;  // of the unit

  // Lane bits: 1 is a channel's, 0 a state's, so that a load of B or C and one of dt and dt * x
  // have the same address in lanes that differ in that bit alone, which halves their cost.
  __device__ __forceinline__ Share(bool half, int lane)
      : lanes(half ? 8 : 4),
        state((lane & 1) | (lane >> 1 & (half ? 6 : 2))),
        channel((lane >> 1 & 1) | lane >> (half ? 4 : 3) << 1) {}
  [[nodiscard]] __device__ __forceinline__ int held() const { return kStates / lanes; }
  [[nodiscard]] __device__ __forceinline__ int items() const { return kTokens / lanes; }
};

/// What a lane holds of a channel's states.
__device__ __forceinline__ void load_held(float (&v)[kHeld], const void* from, const Share& share) {
  if (share.held() == 4) {
    const float4 q = *static_cast<const float4*>(from);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else {
    const float2 q = *static_cast<const float2*>(from);
    v[0] = q.x, v[1] = q.y;
  }
}
__device__ __forceinline__ void store_held(void* to, const float (&v)[kHeld], const Share& share) {
  if (share.held() == 4) {
    *static_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
  } else {
    *static_cast<float2*>(to) = {v[0], v[1]};
  }
}

/// Of each 2 * kHalf tokens a lane gives half away and adds what it gets to the rest, after which
/// it has kLeft.
template <int kHalf, int kMask, int kLeft>
__device__ __forceinline__ void sum_round(float (&v)[kTokens], int lane) {
  const bool upper = (lane & kMask) != 0;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    const int lower = i / kHalf * (2 * kHalf) + i % kHalf;
    const float give = upper ? v[lower] : v[lower + kHalf];
    const float have = upper ? v[lower + kHalf] : v[lower];
    v[i] = have + __shfl_xor_sync(0xffffffffU, give, kMask);
  }
}
/// The lanes' shares v[token] to sums: v[i] becomes the sum of token i * share.lanes + share.state.
__device__ __forceinline__ void sum_lanes(float (&v)[kTokens], const Share& share, int lane) {
  if (share.lanes == 8) {
    sum_round<4, 8, 4>(v, lane);
    sum_round<2, 4, 2>(v, lane);
    sum_round<1, 1, 1>(v, lane);
  } else {
    sum_round<2, 4, 4>(v, lane);
    sum_round<1, 1, 2>(v, lane);
  }
}

/// A unit, and shared memory of a block, in bytes: for each group what all warps need of it, then
/// what each warp has of its own.
template <typename T>
struct Layout {
  static constexpr int kAhead = 2;  // rounds of a warp on their way
  // As it comes: B, C, then rows of x, of dt, of z with all groups of the block. A sector of memory
  // shall be 32 bytes here too, or it comes twice; and four tokens lie in different banks.
  static constexpr int kRow = kChannels * static_cast<int>(sizeof(T));  // of a group
  static constexpr int kRowBC = kStates * static_cast<int>(sizeof(T));
  static constexpr int kRawBC = kTokens * 2 * kRowBC;
  // In f32: (dt, dt * x), channel by channel; 32 bytes more spread the channels over the banks
  static constexpr int kFineChannel = kTokens * 8 + 32;
  static constexpr int kFine = kChannels * kFineChannel;
  static constexpr int kBC = kTokens * kStates * 4;  // of B, and twice as much for C
  static constexpr int kOwn = kFine + 3 * kBC;
  // Of a group: A [channel][state], (dt_bias, D) of each channel, then by pass h as it is handed on
  // by even and by odd turns, and of each turn the gate that says so
  static constexpr int kEdges = kChannels * kStates * 4;
  static constexpr int kCarried = kEdges + kChannels * 8;
  static constexpr int kH = kChannels * kStates * 4;
  static_assert(kCarried % 16 == 0);
  static constexpr int kGates = kCarried + 2 * kH;  // of the first pass
  static constexpr int kPass = 2 * kH + kMaxWarps * 8;
  int pitch, of_array, of_round, of_group, own, of_warp;

  /// With a half group a row begins up to 24 bytes into a sector.
  __host__ __device__ constexpr Layout(int n_half, int n_pass)
      : pitch(((n_half * kRow / 2 + (n_half % 2 == 1 ? 24 : 0) + 31) / 32 | 1) * 32),
        of_array(kTokens * pitch),
        of_round(kRawBC + 3 * of_array),
        of_group(kCarried + n_pass * kPass),
        own((n_half + 1) / 2 * of_group),
        of_warp(kOwn + kAhead * of_round + of_array) {}
  [[nodiscard]] constexpr int bytes(int n_turn) const { return own + n_turn * of_warp; }
};

/// Of a row's first byte from that of its sector.
template <typename T>
__device__ __forceinline__ int shift_of(int e0) {
  return e0 * static_cast<int>(sizeof(T)) % 32;
}

/// Copies of the tokens of a warp's rounds on their way to shared memory, a lane's pieces of them:
/// of 8 tokens at a time every fourth piece of a row. Where a half group lies half in a piece, the
/// whole of it comes.
template <typename T, int kHalves>
class RawRounds {
  using At = Layout<T>;

 public:
  __device__ __forceinline__ void begin(const ScanPointers<T>& p, const ScanShape& shape, int row,
                                        int e0, int n_turn, int lane) {
    const int64_t step = n_turn * kTokens * int64_t{sizeof(T)};
    const int token = lane / 4;
    const int e = e0 / Vec16<T>::kSize * Vec16<T>::kSize + lane % 4 * Vec16<T>::kSize;
    shift_ = shift_of<T>(e0) / 16 * 16;
    const T* const of[3] = {p.x + (row + token) * shape.x + e, p.dt + (row + token) * shape.dt + e,
                            p.z + (row + token) * shape.z + e};
    const int64_t stride[3] = {shape.x, shape.dt, shape.z};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      from_[i] = reinterpret_cast<const char*>(of[i]);
      step_[i] = static_cast<int>(step * stride[i]);
    }
#pragma unroll
    for (int i = 0; i < kOfLaneBC; ++i) {
      const int at = i * 32 + lane;
      const bool of_C = at >= kPiecesBC / 2;
      const int t = at / kOfRowBC % kTokens;
      const int n = at % kOfRowBC * Vec16<T>::kSize;
      tokenBC_[i] = n < shape.d_state ? t : INT_MAX;
      fromBC_[i] = reinterpret_cast<const char*>(of_C ? p.C + (row + t) * shape.C + n
                                                      : p.B + (row + t) * shape.B + n);
      stepBC_[i] = static_cast<int>(step * (of_C ? shape.C : shape.B));
    }
  }
  /// The next of them, of which `left` tokens exist (less than 1: nothing); the rest becomes 0.
  __device__ __forceinline__ void request(char* to, int left, int lane) {
    if (left > 0) {
      constexpr Layout<T> at(kHalves, 1);
      const int token = lane / 4;
      char* const rows = to + At::kRawBC + token * at.pitch + shift_ + lane % 4 * 16;
#pragma unroll
      for (int column = 0; column < kOfRow; column += 4) {
        if (column + lane % 4 < kOfRow) {
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            copy_async<16>(rows + i * at.of_array + column * 16, from_[i] + column * 16,
                           token < left);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) from_[i] += step_[i];
#pragma unroll
      for (int i = 0; i < kOfLaneBC; ++i) {
        copy_async<16>(to + (i * 32 + lane) * 16, fromBC_[i], tokenBC_[i] < left);
        fromBC_[i] += stepBC_[i];
      }
    }
    end_copies();
  }

 private:
  static constexpr int kOfRow = (kHalves * At::kRow / 2 + 15) / 16;
  static constexpr int kOfRowBC = At::kRowBC / 16;
  static constexpr int kPiecesBC = 2 * kTokens * kOfRowBC;
  static constexpr int kOfLaneBC = kPiecesBC / 32;
  static_assert(kPiecesBC % 32 == 0);
  const char *from_[3], *fromBC_[kOfLaneBC];
  int step_[3], stepBC_[kOfLaneBC];  // bytes to the warp's next round
  int tokenBC_[kOfLaneBC];           // place in the unit
  int shift_;
};

/// The same without copies in the background, for any alignment and number of channels: a group's
/// x, dt and z, and B and C of a pass.
template <typename T>
__device__ __forceinline__ void load_channels(char* to, int pitch, const ScanPointers<T>& p,
                                              const ScanShape& shape, int row, int left, int e0,
                                              int lane) {
  constexpr int kArray = kTokens * kChannels;
#pragma unroll 1
  for (int at = lane; at < 3 * kArray; at += 32) {
    const int array = at / kArray;
    const int t = at / kChannels % kTokens;
    const int e = e0 + at % kChannels;
    const T* const of = array == 0 ? p.x : array == 1 ? p.dt : p.z;
    const int64_t stride = array == 0 ? shape.x : array == 1 ? shape.dt : shape.z;
    const bool there = t < left && e < shape.d_inner;
    reinterpret_cast<T*>(to + at / kChannels * pitch)[at % kChannels] =
        there ? of[(row + t) * stride + e] : T(0.0F);
  }
}
template <typename T>
__device__ __forceinline__ void load_states(char* to, const ScanPointers<T>& p,
                                            const ScanShape& shape, int row, int left, int pass,
                                            int lane) {
  constexpr int kArray = kTokens * kStates;
#pragma unroll 1
  for (int at = lane; at < 2 * kArray; at += 32) {
    const bool of_C = at >= kArray;
    const int t = at % kArray / kStates;
    const int n = pass * kStates + at % kStates;
    const int64_t from = (row + t) * (of_C ? shape.C : shape.B) + n;
    const bool there = t < left && n < shape.d_state;
    reinterpret_cast<T*>(to)[at] = there ? (of_C ? p.C : p.B)[from] : T(0.0F);
  }
}

/// B and C of kTokens tokens to f32.
template <typename T>
__device__ __forceinline__ void convert_states(float* B, float* C, const char* raw, int lane) {
  constexpr int kOfLane = kTokens * kStates / 4 / 32;  // of B and of C
  Quad<T> in[2 * kOfLane];
#pragma unroll
  for (int i = 0; i < 2 * kOfLane; ++i) {
    in[i] = reinterpret_cast<const Quad<T>*>(raw)[i * 32 + lane];
  }
#pragma unroll
  for (int i = 0; i < 2 * kOfLane; ++i) {
    float4 out;
    if constexpr (sizeof(T) == 4) {
      out = {in[i].v[0], in[i].v[1], in[i].v[2], in[i].v[3]};
    } else {
      uint32_t two[2];
      memcpy(two, &in[i], sizeof two);
      unpack_pair<T>(two[0], out.x, out.y);
      unpack_pair<T>(two[1], out.z, out.w);
    }
    float* const to = i < kOfLane ? B : C;
    reinterpret_cast<float4*>(to)[i % kOfLane * 32 + lane] = out;
  }
}

/// Stores v where `inside` holds, without a branch: those keep the work before it from overlapping.
template <typename T>
__device__ __forceinline__ void store_if(bool inside, T* to, T v) {
  if constexpr (sizeof(T) == 4) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.f32 [%1], %2; }" ::"r"(
                     static_cast<int>(inside)),
                 "l"(to), "f"(v)
                 : "memory");
  } else {
    unsigned short bits;
    memcpy(&bits, &v, sizeof bits);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.u16 [%1], %2; }" ::"r"(
                     static_cast<int>(inside)),
                 "l"(to), "h"(bits)
                 : "memory");
  }
}

template <typename T>
__device__ __forceinline__ float decay(float v) {
  if constexpr (sizeof(T) == 4) {
    return exp2_exact(v);
  } else {
    return exp2_fast(v);
  }
}

/// kPlain: one pass does all states, rows can be copied in pieces and groups have all channels.
template <typename T, int kHalves, bool kPlain>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    selective_scan_kernel(ScanPointers<T> p, ScanShape shape) {
  using At = Layout<T>;
  extern __shared__ float4 shared_raw[];
  char* const s = reinterpret_cast<char*>(shared_raw);
  const int n_pass = kPlain ? 1 : shape.n_pass;
  const int n_turn = static_cast<int>(blockDim.x) / 32;
  constexpr int kGroups = (kHalves + 1) / 2;
  constexpr int kOfBlock = kHalves * kChannels / 2;
  const int first = static_cast<int>(blockIdx.x) * kOfBlock;  // channel
  const Layout<T> at(kHalves, n_pass);
  {
    const auto thread = static_cast<int>(threadIdx.x);
    const auto threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < n_turn * kGroups * n_pass; i += threads) {
      char* const of = s + i / n_pass % kGroups * at.of_group + i % n_pass * At::kPass;
      reinterpret_cast<Gate*>(of + At::kGates)[i / n_pass / kGroups].open(1);
    }
    for (int i = thread; i < kGroups * kChannels; i += threads) {
      const int e = min(first + i, shape.d_inner - 1);
      char* const of = s + i / kChannels * at.of_group + At::kEdges;
      reinterpret_cast<float2*>(of)[i % kChannels] = {p.dt_bias[e], p.D[e]};
    }
    if constexpr (kPlain) {
      constexpr int kOfGroup = kChannels * kStates;
      for (int i = thread; i < kOfBlock * kStates; i += threads) {
        const int n = i % kStates;
        const int64_t from = int64_t{first + i / kStates} * shape.d_state + n;
        reinterpret_cast<float*>(s + i / kOfGroup * at.of_group)[i % kOfGroup] =
            n < shape.d_state ? p.A[from] * kLog2e : 0.0F;
      }
    }
  }
  __syncthreads();
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int before = warp > 0 ? warp - 1 : n_turn - 1;  // the warp of the unit before
  const Share of_group(false, lane);
  const Share of_half(true, lane);
  const auto share_of = [&](int g) { return 2 * g + 1 == kHalves ? of_half : of_group; };
  const auto each_state = [&](int g, int pass, auto f) {
    const Share my = share_of(g);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int n = pass * kStates + my.state * my.held() + i;
      if (i < my.held() && n < shape.d_state) f(i, n);
    }
  };
  // Lanes of channels past the last one do its work once more and keep it to themselves.
  const auto exists = [&](int g) {
    return kPlain || first + g * kChannels + share_of(g).channel < shape.d_inner;
  };
  const auto channel_in = [&](int g) {
    return int64_t{min(first + g * kChannels + share_of(g).channel, shape.d_inner - 1)};
  };
  // A lane's first of a group's states, in bytes
  const auto quad = [&](int g) {
    const Share my = share_of(g);
    return (my.channel * my.lanes + my.state) * my.held() * 4;
  };
  float A[kHeld];
  const auto load_A = [&](int g, int pass) {
    if constexpr (kPlain) {
      load_held(A, s + g * at.of_group + quad(g), share_of(g));
    } else {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) A[i] = 0.0F;
      each_state(g, pass,
                 [&](int i, int n) { A[i] = p.A[channel_in(g) * shape.d_state + n] * kLog2e; });
    }
  };
  char* const own = s + at.own + warp * at.of_warp;
  const auto fine = [&](int g) { return own + share_of(g).channel * At::kFineChannel; };
  auto* const B = reinterpret_cast<float*>(own + At::kFine);
  constexpr int kC = kTokens * kStates;
  const auto of_lane = [&](int g) { return share_of(g).state * share_of(g).held(); };  // of B, C
  char* const raw = own + At::kOwn;
  // h goes from turn to turn through two places by turns; one turn alone needs one.
  const auto carried = [&](int turn) {
    return s + At::kCarried + (n_turn > 1 ? turn & 1 : 0) * At::kH;
  };
  char* const h_from = carried(before);
  char* const h_to = carried(warp);
  const auto place = [&](int g, int pass) { return g * at.of_group + pass * At::kPass; };
  char* const gate_from = s + At::kGates + before * 8;
  char* const gate_to = s + At::kGates + warp * 8;

  after_previous();
  const int seq = static_cast<int>(blockIdx.y);
  const int32_t slot = p.slots[seq];
  const int end = uniform(p.seq_start[seq + 1]);
  const int len = end - uniform(p.seq_start[seq]);
  if (slot < 0 || len == 0) return;
  const auto row_of_state = [&](int g) {
    return (int64_t{slot} * shape.d_inner + channel_in(g)) * shape.d_state;
  };
  int row = end - len + warp * kTokens;
  const int step = n_turn * kTokens;
  int left = end - row;  // tokens from the unit's first to the last
  // y of a round goes out in whole rows, a lane's pieces of them like those that come in.
  char* const y_rows = raw + At::kAhead * at.of_round;
  constexpr int kRowBytes = kOfBlock * static_cast<int>(sizeof(T));
  constexpr int kPiece = kRowBytes % 16 == 0 ? 16 : 8;
  constexpr int kOfRow = kRowBytes / kPiece;
  auto* y = reinterpret_cast<char*>(p.y + (row + lane / 4) * shape.y + first) + lane % 4 * kPiece;
  const int64_t y_round = step * shape.y * int64_t{sizeof(T)};
  RawRounds<T, kHalves> ahead;
  if constexpr (kPlain) {
    ahead.begin(p, shape, row, first, n_turn, lane);
#pragma unroll
    for (int i = 0; i < At::kAhead; ++i) {
      ahead.request(raw + i * at.of_round, left - i * step, lane);
    }
  }
  // The first h, as if handed on by the warp before the first one; by the last warps, which have
  // the most time.
  for (int g = n_turn - 1 - warp; g < kGroups; g += n_turn) {
    for (int pass = 0; pass < n_pass; ++pass) {
      float h[kHeld] = {};
      each_state(g, pass, [&](int i, int n) {
        h[i] = load_state(p.ssm_state, shape.state, row_of_state(g) + n);
      });
      const int of = place(g, pass);
      store_held(carried(n_turn - 1) + of + quad(g), h, share_of(g));
      reinterpret_cast<Gate*>(s + At::kGates + (n_turn - 1) * 8 + of)->arrive(lane);
    }
  }
  if (left <= 0) return;

  // Of each unit, first, as long as others have their turns: dt, dt * x, B and C in f32 to shared
  // memory. D * x and z stay in registers for y.
  float Dx[kItems], z[kItems];
  const auto C_of = [&](int round, int pass) {
    return B + kC + ((kPlain ? round : round * n_pass + pass) & 1) * kC;
  };
  const auto stage = [&](int round, int g, int pass, int at_row, int n_tok) {
    char* const tokens = raw + (kPlain ? (round & 1) * at.of_round : 0);
    const Share my = share_of(g);
    const char* const of = tokens + At::kRawBC + my.state * at.pitch + g * At::kRow +
                           shift_of<T>(first) +
                           my.channel * static_cast<int>(sizeof(T));  // x of its first token
    if constexpr (kPlain) {
      if (g == 0) await_copies<At::kAhead - 1>();
    } else {
      if (pass == 0) {
        load_channels<T>(tokens + At::kRawBC + shift_of<T>(first), at.pitch, p, shape, at_row,
                         n_tok, first + g * kChannels, lane);
      }
      load_states<T>(tokens, p, shape, at_row, n_tok, pass, lane);
    }
    __syncwarp();
    if (!kPlain || g == 0) convert_states<T>(B, C_of(round, pass), tokens, lane);
    if (kPlain || pass == 0) {
      const auto item = [&](int array, int i) {
        return *reinterpret_cast<const T*>(of + array * at.of_array + i * my.lanes * at.pitch);
      };
      const float2 edge =
          *reinterpret_cast<const float2*>(s + At::kEdges + my.channel * 8 + g * at.of_group);
      T raw_x[kItems], raw_dt[kItems], raw_z[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i >= my.items()) continue;
        raw_dt[i] = item(1, i);
        raw_x[i] = item(0, i);
        raw_z[i] = item(2, i);
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i >= my.items()) continue;
        const float x = to_float(raw_x[i]);
        z[i] = to_float(raw_z[i]);
        const float v = softplus(to_float(raw_dt[i]) + edge.x);
        // Past the end dt = 0: exp(0) = 1 and nothing is added, so the state passes unchanged.
        const int t = i * my.lanes + my.state;
        const float dt = t < n_tok ? v : 0.0F;
        *reinterpret_cast<float2*>(fine(g) + t * 8) = {dt, dt * x};
        Dx[i] = edge.y * x;
      }
    }
    __syncwarp();
    if constexpr (kPlain) {
      if (g + 1 == kGroups) ahead.request(tokens, n_tok - At::kAhead * step, lane);
    }
  };
  // Then, in registers, the decays a and what is added, which the chain turns into h.
  float a[kTokens][kHeld], h[kTokens][kHeld];
  const auto prepare = [&](int t, int g) {
    const Share my = share_of(g);
    const float4 of_two = *reinterpret_cast<const float4*>(fine(g) + t * 8);
    const float dt[2] = {of_two.x, of_two.z}, dx[2] = {of_two.y, of_two.w};
    float b[2][kHeld];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_held(b[i], B + of_lane(g) + (t + i) * kStates, my);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
        if (n >= my.held()) continue;
        a[t + i][n] = decay<T>(dt[i] * A[n]);
        h[t + i][n] = dx[i] * b[i][n];
      }
    }
  };
  stage(0, 0, 0, row, left);
  load_A(0, 0);
#pragma unroll
  for (int t = 0; t < kTokens; t += 2) prepare(t, 0);

  float share[kTokens];
#pragma unroll 1
  for (int round = 0; left > 0; ++round) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll 1
      for (int pass = 0; pass < n_pass; ++pass) {
        const bool ends = kPlain || pass + 1 == n_pass;  // the last pass of the unit
        const bool goes_on = ends && g + 1 == kGroups;   // the last unit of the round
        const int next_pass = ends ? 0 : pass + 1;
        const int next_g = goes_on ? 0 : ends ? g + 1 : g;
        const int next_round = goes_on ? round + 1 : round;
        const int next_left = goes_on ? left - step : left;
        float this_Dx[kItems], this_z[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) this_Dx[i] = Dx[i], this_z[i] = z[i];
        const Share my = share_of(g);
        const float* const of_C = C_of(round, pass) + of_lane(g);
        stage(next_round, next_g, next_pass, goes_on ? row + step : row, next_left);

        const int of = place(g, pass);
        reinterpret_cast<const Gate*>(gate_from + of)->wait(round);
        float now[kHeld];
        load_held(now, h_from + of + quad(g), my);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
#pragma unroll
          for (int n = 0; n < kHeld; ++n) {
            if (n < my.held()) now[n] = h[t][n] = fmaf(a[t][n], now[n], h[t][n]);
          }
        }
        store_held(h_to + of + quad(g), now, my);
        reinterpret_cast<Gate*>(gate_to + of)->arrive(lane);

        // The next warp has its turn. Shares of y, and in the same registers the next unit.
        load_A(next_g, next_pass);
#pragma unroll
        for (int t = 0; t < kTokens; t += 2) {
#pragma unroll
          for (int i = t; i < t + 2; ++i) {
            float c[kHeld];
            load_held(c, of_C + i * kStates, my);
            float sum = c[0] * h[i][0];
            if (!kPlain && pass > 0) sum += share[i];
#pragma unroll
            for (int n = 1; n < kHeld; ++n) {
              if (n < my.held()) sum = fmaf(c[n], h[i][n], sum);
            }
            share[i] = sum;
          }
          prepare(t, next_g);
        }
        if (ends) {
          sum_lanes(share, my, lane);
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (i >= my.items()) continue;
            const int t = i * my.lanes + my.state;
            const T v = from_float<T>((share[i] + this_Dx[i]) * silu(this_z[i]));
            if constexpr (kPlain) {
              *reinterpret_cast<T*>(y_rows + t * at.pitch + g * At::kRow +
                                    my.channel * static_cast<int>(sizeof(T))) = v;
            } else {
              store_if(exists(g) && t < left, p.y + (row + t) * shape.y + first + my.channel, v);
            }
          }
        }
      }
    }
    if constexpr (kPlain) {
      __syncwarp();
#pragma unroll
      for (int column = 0; column < kOfRow; column += 4) {
        if (column + lane % 4 < kOfRow && lane / 4 < left) {
          using Piece = std::conditional_t<kPiece == 16, uint4, uint2>;
          *reinterpret_cast<Piece*>(y + column * kPiece) = *reinterpret_cast<const Piece*>(
              y_rows + lane / 4 * at.pitch + (column + lane % 4) * kPiece);
        }
      }
      y += y_round;
    }
    row += step;
    left -= step;
  }
  if (left + step <= kTokens) {  // it had the last unit
    for (int g = 0; g < kGroups; ++g) {
      for (int pass = 0; pass < n_pass && exists(g); ++pass) {
        float end_h[kHeld];
        load_held(end_h, h_to + place(g, pass) + quad(g), share_of(g));
        each_state(g, pass, [&](int i, int n) {
          store_state(p.ssm_state, shape.state, row_of_state(g) + n, end_h[i]);
        });
      }
    }
  }
}

/// Half groups of channels of a block, and its warps, which take turns.
struct Plan {
  int n_half, n_turn;
};

/// Half groups that a block can have, and its kernel.
constexpr int kForms[] = {2, 3, 4, 6, 8, 10};
template <typename T>
auto* plain_kernel(int n_half) {
  switch (n_half) {
    case 2:
      return &selective_scan_kernel<T, 2, true>;
    case 3:
      return &selective_scan_kernel<T, 3, true>;
    case 4:
      return &selective_scan_kernel<T, 4, true>;
    case 6:
      return &selective_scan_kernel<T, 6, true>;
    case 8:
      return &selective_scan_kernel<T, 8, true>;
    default:
      return &selective_scan_kernel<T, 10, true>;
  }
}

/// The plan of the least time by what was measured, in cycles (H100): what a unit takes of a
/// multiprocessor, what one of a half group takes, the least from one link of a group's chain to
/// the next, what a warp needs from one of its units to the next, and what a block takes to begin
/// and to end. `max_half` is the most half groups of a block; `bytes_of` tells the shared memory of
/// a plan.
template <typename Bytes>
Plan choose_plan(const ScanShape& shape, int64_t n_seq, int64_t length, int max_half,
                 Bytes bytes_of) {
  constexpr int64_t kUnit = 117, kHalfUnit = 90, kLink = 156, kOwn = 1600, kEnds = 8000;
  const int64_t n_sm = device_attribute(cudaDevAttrMultiProcessorCount);
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t halves = ceil_div(int64_t{shape.d_inner}, int64_t{kChannels}) * 2;
  const int64_t units = ceil_div(length, int64_t{kTokens});
  Plan best{2, 1};
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (const int n_half : kForms) {
    if (n_half > max_half || halves % n_half != 0) continue;
    const int64_t round = n_half / 2 * kUnit + n_half % 2 * kHalfUnit;
    for (int n_turn = 1; n_turn <= kMaxWarps; n_turn += n_turn > 1 ? 2 : 1) {
      const int bytes = bytes_of(n_half, n_turn);
      if (bytes > room) break;
      // Blocks of a multiprocessor. Those of 4, 8 .. warps share its schedulers evenly.
      const int64_t together = n_turn % 4 == 0 ? std::min(kMaxWarps / n_turn, room / bytes) : 1;
      const int64_t blocks = halves / n_half * n_seq;
      const int64_t on_one = std::min(together, ceil_div(blocks, n_sm));
      const int64_t busy = units * on_one * round;
      const int64_t chain = units * kLink;
      const int64_t own = ceil_div(units, int64_t{n_turn}) * round * kOwn / kUnit;
      const int64_t cost =
          ceil_div(blocks, n_sm * together) * (std::max({busy, chain, own}) + kEnds * on_one);
      if (cost <= best_cost) best = {n_half, n_turn}, best_cost = cost;
    }
  }
  return best;
}

}  // namespace

void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                    const Batch& batch, cudaStream_t stream) {
  const auto d_state = static_cast<int>(in.A.dim(1));
  visit_type(in.x.dtype, "selective_scan x", [&](auto t) {
    using T = decltype(t);
    ScanShape shape{static_cast<int>(in.x.dim(1)),
                    d_state,
                    static_cast<int>(ceil_div(d_state, kStates)),
                    ssm_state.dtype,
                    in.x.row_stride,
                    in.dt.row_stride,
                    in.z.row_stride,
                    y.row_stride,
                    in.B.row_stride,
                    in.C.row_stride};
    if (!is_float16_or_32(shape.state)) throw_not_float(shape.state, "selective_scan state");
    const ScanPointers<T> p{in.x.as<T>(),
                            in.dt.as<T>(),
                            in.z.as<T>(),
                            in.B.as<T>(),
                            in.C.as<T>(),
                            in.A.as<float>(),
                            in.D.as<float>(),
                            in.dt_bias.as<float>(),
                            y.as<T>(),
                            ssm_state.data,
                            batch.seq_start.as<int32_t>(),
                            batch.slot.as<int32_t>()};
    const auto copies = [](const Tensor& of) {
      // Also, that 32 bits count the bytes from a unit to a warp's next.
      return reinterpret_cast<uintptr_t>(of.data) % 16 == 0 &&
             of.row_stride * sizeof(T) % 16 == 0 && of.row_stride < (1 << 20);
    };
    const bool plain = shape.n_pass == 1 && shape.d_inner % kChannels == 0 &&
                       d_state % Vec16<T>::kSize == 0 && copies(in.x) && copies(in.dt) &&
                       copies(in.z) && copies(in.B) && copies(in.C) && copies(y);
    const auto bytes_of = [&](int n_half, int n_turn) {
      return Layout<T>(n_half, shape.n_pass).bytes(n_turn);
    };
    const Plan plan =
        choose_plan(shape, batch.n_seq, batch.max_len, plain ? kMaxHalves : 2, bytes_of);
    auto* const kernel = plain ? plain_kernel<T>(plan.n_half) : &selective_scan_kernel<T, 2, false>;
    const int bytes = bytes_of(plan.n_half, plan.n_turn);
    KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const int64_t channels = int64_t{plan.n_half} * kChannels / 2;
    const dim3 grid(static_cast<unsigned>(ceil_div(int64_t{shape.d_inner}, channels)),
                    static_cast<unsigned>(batch.n_seq));
    launch("selective_scan", kernel, grid, static_cast<unsigned>(32 * plan.n_turn),
           static_cast<size_t>(bytes), stream, p, shape);
  });
}

}  // namespace krait::cuda
