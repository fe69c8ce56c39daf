// What kernels share that stay on every multiprocessor for a whole decode step (mamba1_step.cu,
// mamba1_step_wide.cu): bulk copies into shared memory, the share of a block, what a step is given,
// and a launch of all blocks at once or not at all.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/cuda/mbarrier.cuh"
#include "kernels/ops.h"

namespace krait::cuda {

/// The run of n things that falls to block `b` of `blocks`.
struct Run {
  int begin, n;
  __host__ __device__ Run(int total, int b, int blocks)
      : begin(part(total, b, blocks)), n(part(total, b + 1, blocks) - begin) {}

 private:
  /// In 32 bits, which total * blocks fits: in 64 a division takes a device hundreds of cycles.
  __host__ __device__ static int part(int total, int b, int blocks) {
    return static_cast<int>(static_cast<unsigned>(total) * static_cast<unsigned>(b) /
                            static_cast<unsigned>(blocks));
  }
};

/// Two neighbours of T, loaded or stored by one instruction.
template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T a, b;
};

/// v, worked out anew wherever it is needed. What the compiler would otherwise prepare before the
/// loop over the layers doesn't fit into registers, and local memory not into the L1 that the ring
/// leaves.
__device__ __forceinline__ int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

/// Waits until so many cycles have gone since `begin`, a clock().
__device__ __forceinline__ void wait_since(unsigned begin, unsigned cycles) {
  while (static_cast<unsigned>(clock()) - begin < cycles) {
  }
}
__device__ __forceinline__ void wait_cycles(unsigned cycles) {
  wait_since(static_cast<unsigned>(clock()), cycles);
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t bar,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

#endif

/// Calls f(S{}) with the type of a state: float, __nv_bfloat16 or __half.
template <typename F>
__device__ __forceinline__ void with_state_type(DType state, F&& f) {
  if (state == DType::f32) {
    f(float{});
  } else if (state == DType::bf16) {
    f(__nv_bfloat16{});
  } else {
    f(__half{});
  }
}

/// to[c, r] = from[r, c], rows of `to_pitch`
template <typename T>
__global__ void transpose_kernel(T* to, const T* from, int64_t n_rows, int64_t n_columns,
                                 int64_t to_pitch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= to_pitch * n_columns) return;
  const int64_t r = i % to_pitch;
  to[i] = r < n_rows ? from[r * n_columns + i / to_pitch] : T{};
}

[[nodiscard]] inline int round_up(int64_t n, int64_t to) {
  return static_cast<int>(ceil_div(n, to) * to);
}

/// Whether the device has bulk copies and launches of all blocks at once.
[[nodiscard]] inline bool launches_together() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
         device_attribute(cudaDevAttrCooperativeLaunch) != 0;
}

/// Device memory for what a plan keeps, in `kept`.
struct PlanMemory {
  const std::function<Buffer(size_t bytes, std::string_view what)>& allocate;
  cudaStream_t stream;
  std::vector<Buffer>& kept;

  [[nodiscard]] void* keep(int64_t bytes) const {
    kept.push_back(allocate(static_cast<size_t>(bytes), "decode step"));
    return kept.back().data();
  }
  [[nodiscard]] void* zeroed(int64_t bytes) const {
    void* at = keep(bytes);
    KRAIT_CUDA(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream));
    return at;
  }
  /// `values` must stay until the stream has come so far.
  template <typename V>
  [[nodiscard]] V* copy_of(const std::vector<V>& values) const {
    const size_t bytes = values.size() * sizeof(V);
    void* at = keep(static_cast<int64_t>(bytes));
    KRAIT_CUDA(cudaMemcpyAsync(at, values.data(), bytes, cudaMemcpyHostToDevice, stream));
    return static_cast<V*>(at);
  }
};

/// The plan that was made for `layers`, compared byte by byte, or null.
template <typename Plan, typename Layer>
Plan* find_plan(const std::vector<std::unique_ptr<Plan>>& plans, const std::vector<Layer>& layers) {
  for (const auto& plan : plans) {
    if (plan->layers.size() == layers.size() &&
        std::memcmp(plan->layers.data(), layers.data(), layers.size() * sizeof(Layer)) == 0) {
      return plan.get();
    }
  }
  return nullptr;
}

/// What Ops::mamba1_step or mamba2_step is given, as far as every form of the kernel takes it.
template <typename Params, typename Weights>
void set_inputs(Params& p, const Weights& weights, const Tensor& logits, const Tensor& ids,
                const Batch& batch, std::span<const std::vector<Tensor>> state) {
  p.embedding = weights.embedding.data;
  p.head = weights.lm_head.data;
  p.vocab_rows = static_cast<int>(weights.lm_head.dim(0));
  p.norm_f = weights.norm_f.template as<float>();
  p.eps = weights.norm_eps;
  p.mixer_eps = weights.mixer_norm_eps;
  p.ids = ids.as<int32_t>();
  p.slots = batch.slot.as<int32_t>();
  p.positions = batch.position.as<int64_t>();
  p.n_seq = static_cast<int>(batch.n_seq);
  p.logits = logits.as<float>();
  p.logits_stride = logits.row_stride;
  p.state_type = state.front()[1].dtype;
}

/// Launches `blocks` blocks that wait for each other, so all of them must be there, or none: false
/// and nothing launched where the device has no room. `refused`: nor will it have.
template <typename Params>
bool launch_together(void (*kernel)(Params), int blocks, int threads, int shared_bytes,
                     const Params& p, bool& refused, cudaStream_t stream) {
  KRAIT_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  int resident = 0;
  KRAIT_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads,
                                                           static_cast<size_t>(shared_bytes)));
  if (resident < 1) return false;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, p);
  if (status == cudaErrorCooperativeLaunchTooLarge) {  // a GPU of which we have only a part
    (void)cudaGetLastError();
    refused = true;
    return false;
  }
  KRAIT_CUDA(status);
  return true;
}

}  // namespace krait::cuda
