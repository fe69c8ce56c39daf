// skinny_gemm.cu - out (+)= in * W^T (+ bias) for the rows of a decode step: as fast as the weights
// can be streamed.
//
// Shapes   in T [n, n_in] view, W [n_out, n_in], bias f32 [n_out], out T or f32 [n, n_out] view
// Launch   a block has N outputs and all rows of `in`, up to 128, a warpgroup 64 of them; one more
//          warp copies W and `in`, 64 columns at a time, into a ring in shared memory. `in` is the
//          A operand of wgmma and W its B operand: so N can be a multiple of 8, and one block per
//          SM has work for all. The blocks of a cluster divide n_in among them and add up in a
//          fixed order. The ring is filled with weights before the kernel waits for the one before
//          it: they are there when the rows of `in` are ready.
// Needs    sm_90a, 16-bit types, rows of W and `in` at multiples of 16 bytes
// Bytes    n_out * n_in * sizeof(T) from memory; blocks * n_in / split * (N + n) * 2 from L2
// Roofline 2 n FLOP per weight: bandwidth-bound
// Measured H100 80GB HBM3, bf16, 2.8b, us of in_proj, out_proj, x_proj, dt_proj, head one after the
//          other (tools/bench_ops): 16 rows 18.0, 11.3, 3.4, 2.4, 88.8 (cuBLASLt 20.6, 13.6, 6.8,
//          3.1, 97.5); 64 rows 19.3, 12.0, 3.4, 2.8, 92 (21.0, 12.4, 7.1, 3.3, 100.6). Tried and
//          dropped: copies of `in` shared by the blocks of a cluster (no faster), 256 rows (slower
//          than cuBLASLt: bound by the way to shared memory), the decode convolution in the
//          epilogue (10% slower steps), one carve-out for all kernels, so that blocks of the next
//          fit beside these (slower), the next weights to L2 as soon as these are read, by bulk
//          copies or by lines, 8 to 40 MB of them (1 to 35% slower steps), tiles of `in` in
//          clusters that share W for 256 and 1,024 rows (bf16 out: in_proj 24.2 and 101 us against
//          cuBLASLt's 25.9 and 78, but steps of 256 sequences 10% slower)
// Same as  linear and linear_add in kernels/cpu; tests/ops
#include <cudaTypedefs.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kGroupRows = 64;  // of `in` of a warpgroup
constexpr int kMaxGroups = 2;
constexpr int kMaxRows = kMaxGroups * kGroupRows;
constexpr int kStep = 64;             // columns of a stage: the 128 bytes of a swizzled row
constexpr int kRowBytes = kStep * 2;  // of a stage
constexpr int kMaxStages = 32;
constexpr int kRingBytes = 200 * 1024;  // bytes on their way: 100 KB were 3 to 15% slower
constexpr int kMaxShared = 227 * 1024;
constexpr int kMaxThreads = kMaxGroups * 128 + 32;
// wgmma reads 64 rows where fewer were copied. What it finds there goes to rows of the result that
// nobody stores; it must only be inside of shared memory.
constexpr int kSlack = kGroupRows * kRowBytes;

struct SkinnyParams {
  void* out;
  const float* bias;
  int64_t out_stride;
  int n, n_out;
  int steps;  // of kStep columns
  int split;  // blocks of a cluster, which divide n_in
  int rows;   // n, padded to a multiple of 8: of `in` in a stage
  int n_stage;
  int ring_bytes;  // with slack
  bool f32_out, accumulate;
  bool wide;  // four neighbours of out are aligned
};

/// Floats from row to row of a block's sums: neighbouring rows begin in different banks.
__host__ __device__ constexpr int tile_pitch(int N) { return N + 8; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int kThreadsBuilt = kMaxThreads;
#else
constexpr int kThreadsBuilt = 32;  // tells the host that this build has no such kernel
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/// out[row, column ..] = v (+ bias) (+ old), V values of which those inside are stored.
template <typename Out, int V>
__device__ __forceinline__ void load_old(const SkinnyParams& p, int row, int column,
                                         float (&old)[V]) {
  const Out* at = static_cast<const Out*>(p.out) + row * p.out_stride + column;
  if (p.wide && column + V <= p.n_out) {
    struct alignas(V * sizeof(Out)) Run {
      Out v[V];
    };
    const Run run = *reinterpret_cast<const Run*>(at);
#pragma unroll
    for (int i = 0; i < V; ++i) old[i] = to_float(run.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) old[i] = column + i < p.n_out ? to_float(at[i]) : 0.0F;
  }
}
template <typename Out, int V>
__device__ __forceinline__ void store(const SkinnyParams& p, int row, int column, float (&v)[V]) {
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += column + i < p.n_out ? p.bias[column + i] : 0.0F;
  }
  Out* at = static_cast<Out*>(p.out) + row * p.out_stride + column;
  if (p.wide && column + V <= p.n_out) {
    struct alignas(V * sizeof(Out)) Run {
      Out v[V];
    } run;
#pragma unroll
    for (int i = 0; i < V; ++i) run.v[i] = from_float<Out>(v[i]);
    *reinterpret_cast<Run*>(at) = run;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (column + i < p.n_out) at[i] = from_float<Out>(v[i]);
    }
  }
}

/// The fragments of a warp, straight to memory.
template <typename Out, int N>
__device__ __forceinline__ void store_fragments(const SkinnyParams& p, int row0, int column0,
                                                const float (&c)[N / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + lane / 4 + 8 * h;
    if (row >= p.n) continue;
    float old[N / 8][2] = {};
    if (p.accumulate) {
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
        load_old<Out>(p, row, column0 + 8 * j + 2 * (lane % 4), old[j]);
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      float v[2] = {c[4 * j + 2 * h] + old[j][0], c[4 * j + 2 * h + 1] + old[j][1]};
      store<Out>(p, row, column0 + 8 * j + 2 * (lane % 4), v);
    }
  }
}

/// The sum of the blocks that divided n_in, of this block's share of the outputs. tile: f32 [rows,
/// tile_pitch(N)] in the shared memory of each.
template <typename Out, int N>
__device__ __forceinline__ void store_sums(const SkinnyParams& p, uint32_t tile, int column0,
                                           int part) {
  const int quads = p.n * (N / 4);
  const int begin = quads * part / p.split;
  const int end = quads * (part + 1) / p.split;
  const int consumers = static_cast<int>(blockDim.x) - 32;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += consumers) {
    const int row = i / (N / 4);
    const int column = i % (N / 4) * 4;
    float old[4] = {};
    if (p.accumulate) load_old<Out>(p, row, column0 + column, old);
    const uint32_t at = tile + (row * tile_pitch(N) + column) * 4;
    float v[4] = {};
#pragma unroll 8
    for (int r = 0; r < p.split; ++r) {
      const float4 share = load_from(at, r);
      v[0] += share.x;
      v[1] += share.y;
      v[2] += share.z;
      v[3] += share.w;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] += old[k];
    store<Out>(p, row, column0 + column, v);
  }
}
#endif

template <typename T, int N>
__global__ void __launch_bounds__(kThreadsBuilt, 1)
    skinny_gemm_kernel(const __grid_constant__ CUtensorMap W_map,
                       const __grid_constant__ CUtensorMap in_map, const SkinnyParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared[];
  constexpr int kWeightBytes = N * kRowBytes;
  const int stage_bytes = kWeightBytes + p.rows * kRowBytes;
  const uint32_t ring = shared_address(shared);
  const uint32_t full = ring + p.ring_bytes;
  const uint32_t empty = full + 8 * kMaxStages;

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int consumer_warps = static_cast<int>(blockDim.x / 32) - 1;
  const int part = static_cast<int>(blockIdx.x) % p.split;
  const int tile = static_cast<int>(blockIdx.x) / p.split;
  const int column0 = tile * N;
  const int begin = p.steps * part / p.split;
  const int n_step = p.steps * (part + 1) / p.split - begin;

  cudaTriggerProgrammaticLaunchCompletion();
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.n_stage; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, consumer_warps);
    }
    mbarrier_init_done();
  }
  __syncthreads();

  float acc[N / 2];
  if (warp == consumer_warps) {
    if (lane == 0) {
      prefetch_map(W_map);
      prefetch_map(in_map);
      const uint64_t once = evict_first_policy();
      const uint64_t often = evict_last_policy();
      const auto copy_W = [&](int i, int stage) {
        mbarrier_expect(full + 8 * stage, stage_bytes);
        copy_box(ring + stage * stage_bytes, W_map, (begin + i) * kStep, column0, full + 8 * stage,
                 once);
      };
      const auto copy_in = [&](int i, int stage) {
        copy_box(ring + stage * stage_bytes + kWeightBytes, in_map, (begin + i) * kStep, 0,
                 full + 8 * stage, often);
      };
      const int ahead = min(p.n_stage, n_step);
      for (int i = 0; i < ahead; ++i) copy_W(i, i);
      cudaGridDependencySynchronize();
      for (int i = 0; i < ahead; ++i) copy_in(i, i);
      int stage = 0;
      uint32_t parity = 0;
      for (int i = ahead; i < n_step; ++i) {
        mbarrier_wait(empty + 8 * stage, parity);
        copy_W(i, stage);
        copy_in(i, stage);
        if (++stage == p.n_stage) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
    __syncwarp();
  } else {
    cudaGridDependencySynchronize();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.0F;
    int stage = 0;
    int before = 0;
    uint32_t parity = 0;
    for (int i = 0; i < n_step; ++i) {
      mbarrier_wait(full + 8 * stage, parity);
      const uint32_t W_at = ring + stage * stage_bytes;
      const uint32_t in_at = W_at + kWeightBytes + warp / 4 * kGroupRows * kRowBytes;
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        Wgmma<T, N>::add(acc, swizzled_rows(in_at + 32 * k), swizzled_rows(W_at + 32 * k));
      }
      wgmma_end();
      // The products before these are done: their stage is free.
      wgmma_await<1>();
      if (i > 0 && lane == 0) mbarrier_arrive(empty + 8 * before);
      before = stage;
      if (++stage == p.n_stage) {
        stage = 0;
        parity ^= 1;
      }
    }
    wgmma_await<0>();
    if (p.split == 1) {
      const int row = warp * 16;
      if (p.f32_out) {
        store_fragments<float, N>(p, row, column0, acc);
      } else {
        store_fragments<T, N>(p, row, column0, acc);
      }
    }
  }
  if (p.split == 1) return;

  if (warp < consumer_warps) {
    // All of this block are done with the ring, which now holds their sums.
    asm volatile("bar.sync 1, %0;" ::"r"(32 * consumer_warps) : "memory");
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp * 16 + lane / 4 + 8 * h;
      if (row >= p.n) continue;
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        *reinterpret_cast<float2*>(sums + row * tile_pitch(N) + 8 * j + 2 * (lane % 4)) = {
            acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]};
      }
    }
  }
  __syncwarp();
  cluster_sync();
  if (warp < consumer_warps) {
    if (p.f32_out) {
      store_sums<float, N>(p, ring, column0, part);
    } else {
      store_sums<T, N>(p, ring, column0, part);
    }
  }
  __syncwarp();
  cluster_meet();  // nobody leaves while its sums are read
#endif
}

// ---- the host's side ----------------------------------------------------------------------------

PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              12000, cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

/// Boxes of `rows` rows and kStep columns of a matrix; false if it can't be copied that way.
bool make_map(CUtensorMap& map, const Tensor& t, int rows, bool once) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
  if (encode == nullptr) return false;
  const auto width = static_cast<cuuint64_t>(t.dim(1));
  const auto height = static_cast<cuuint64_t>(t.dim(0));
  // The stride of a single row is not used, but must be valid.
  const cuuint64_t stride =
      height > 1 ? static_cast<cuuint64_t>(t.row_stride) * 2 : (width * 2 + 15) / 16 * 16;
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0 || stride % 16 != 0) return false;
  const cuuint64_t sizes[2] = {width, height};
  const cuuint32_t box[2] = {kStep, static_cast<cuuint32_t>(rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  return encode(&map,
                t.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                2, t.data, sizes, &stride, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B,
                once ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/// How a product is divided among blocks.
struct Plan {
  int N, split;
};

/// Whether this build has code for sm_90a.
bool built() {
  static const bool known = [] {
    cudaFuncAttributes attributes{};
    KRAIT_CUDA(cudaFuncGetAttributes(&attributes, skinny_gemm_kernel<__nv_bfloat16, 96>));
    return attributes.maxThreadsPerBlock >= kMaxThreads;
  }();
  return known;
}

/// Clusters of so many blocks that the device can hold, one block a SM: the SMs of a cluster must
/// be neighbours.
int clusters_at_once(int size) {
  static const std::array<int, 9> known = [] {
    std::array<int, 9> n{};
    auto* kernel = &skinny_gemm_kernel<__nv_bfloat16, 96>;
    KRAIT_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared));
    for (const int clustered : {1, 2, 4, 8}) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(clustered);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(clustered);
      config.blockDim = kMaxThreads;
      config.dynamicSmemBytes = kMaxShared;
      config.attrs = &attribute;
      config.numAttrs = 1;
      auto& at = n[static_cast<size_t>(clustered)];
      KRAIT_CUDA(cudaOccupancyMaxActiveClusters(&at, kernel, &config));
    }
    return n;
  }();
  return std::max(known[static_cast<size_t>(size)], 1);
}

/// Seconds that a product takes, roughly: the slowest of memory, L2, a SM's way in, its shared
/// memory and its tensor cores. The plan must not be timed, so that a product has the same bits in
/// each run.
double estimate(const Plan& s, int64_t n, int64_t n_out, int64_t n_in) {
  const auto groups = static_cast<double>(ceil_div(n, kGroupRows));
  const double rows = static_cast<double>(n);
  const double blocks = static_cast<double>(ceil_div(n_out, s.N) * s.split);
  const double waves = std::ceil(blocks / (clusters_at_once(s.split) * s.split));
  const double k = static_cast<double>(n_in) / s.split;
  const double memory = static_cast<double>(n_out) * static_cast<double>(n_in) * 2 / 3.0e12;
  const double l2 = blocks * k * 2 * (s.N + rows) / 8.0e12;
  const double way_in = waves * std::max(k * 2 * (s.N + rows) / 110e9, k * 2 * s.N / 40e9);
  const double operands = waves * 1.15 * groups * (kGroupRows + s.N) * 32 / 128 / 1.7e9 * k / 16;
  const double stages = waves * std::ceil(k / kStep) * 0.14e-6;  // whatever their size
  const double sums = s.split > 1 ? 0.8e-6 + rows * s.N * 4 / 60e9 : 0.0;
  return std::max({memory, l2, way_in, operands, stages}) + sums + waves * 1e-6;
}

template <typename T, int N>
bool run(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias, bool accumulate,
         const Plan& plan, cudaStream_t stream) {
  const auto n = static_cast<int>(in.dim(0));
  SkinnyParams p{};
  p.rows = static_cast<int>(ceil_div(n, 8)) * 8;
  const int stage_bytes = (N + p.rows) * kRowBytes;
  p.steps = static_cast<int>(ceil_div(in.dim(1), kStep));
  p.n_stage = std::clamp((kRingBytes - kSlack) / stage_bytes, 2,
                         std::min(kMaxStages, static_cast<int>(ceil_div(p.steps, plan.split)) + 1));
  const int groups = static_cast<int>(ceil_div(n, kGroupRows));
  p.ring_bytes = p.n_stage * stage_bytes + kSlack;
  if (plan.split > 1) p.ring_bytes = std::max(p.ring_bytes, n * tile_pitch(N) * 4);
  const int shared_bytes = p.ring_bytes + 2 * 8 * kMaxStages;
  if (shared_bytes > kMaxShared) return false;
  CUtensorMap W_map;
  CUtensorMap in_map;
  if (!make_map(W_map, W, N, true) || !make_map(in_map, in, p.rows, false)) return false;

  auto* kernel = &skinny_gemm_kernel<T, N>;
  KRAIT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared));

  p.out = out.data;
  p.bias = bias.as<float>();
  p.out_stride = out.row_stride;
  p.n = n;
  p.n_out = static_cast<int>(out.dim(1));
  p.split = plan.split;
  p.f32_out = out.dtype == DType::f32;
  p.accumulate = accumulate;
  const size_t item = itemsize(out.dtype);
  p.wide = reinterpret_cast<uintptr_t>(out.data) % (4 * item) == 0 && out.row_stride % 4 == 0;
  const auto grid = static_cast<unsigned>(ceil_div(out.dim(1), N) * plan.split);
  launch_clusters("skinny_gemm", kernel, grid, static_cast<unsigned>(groups * 128 + 32), plan.split,
                  static_cast<size_t>(shared_bytes), stream, W_map, in_map, p);
  return true;
}

}  // namespace

bool skinny_gemm(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias,
                 bool accumulate, int most_blocks, cudaStream_t stream) {
  if (itemsize(W.dtype) != 2 || in.dtype != W.dtype ||
      (out.dtype != W.dtype && out.dtype != DType::f32)) {
    return false;
  }
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9 || !built()) return false;
  constexpr int64_t kMax = std::numeric_limits<int>::max() / 2;
  if (in.dim(0) > kMaxRows || out.dim(1) > kMax || in.dim(1) > kMax) return false;

  Plan best{};
  std::pair least(std::numeric_limits<int64_t>::max(), 0.0);  // blocks too many, seconds
  for (const int N : {16, 32, 40, 48, 64, 80, 96, 128}) {
    for (const int split : {1, 2, 4, 8}) {
      if (split > ceil_div(in.dim(1), kStep)) continue;
      const Plan plan{N, split};
      const int64_t blocks = ceil_div(out.dim(1), N) * split;
      const std::pair cost(std::max<int64_t>(blocks - most_blocks, 0),
                           estimate(plan, in.dim(0), out.dim(1), in.dim(1)));
      if (cost < least) {
        least = cost;
        best = plan;
      }
    }
  }
  const auto with = [&](auto N) {
    constexpr int kN = decltype(N)::value;
    if (W.dtype == DType::bf16) {
      return run<__nv_bfloat16, kN>(out, in, W, bias, accumulate, best, stream);
    }
    return run<__half, kN>(out, in, W, bias, accumulate, best, stream);
  };
  switch (best.N) {
    case 16:
      return with(std::integral_constant<int, 16>{});
    case 32:
      return with(std::integral_constant<int, 32>{});
    case 40:
      return with(std::integral_constant<int, 40>{});
    case 48:
      return with(std::integral_constant<int, 48>{});
    case 64:
      return with(std::integral_constant<int, 64>{});
    case 80:
      return with(std::integral_constant<int, 80>{});
    case 96:
      return with(std::integral_constant<int, 96>{});
    default:
      return with(std::integral_constant<int, 128>{});
  }
}

}  // namespace krait::cuda
