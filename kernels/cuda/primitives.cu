// primitives.cu - latencies and rates that decide the design of the fast paths
// (kernels/primitives.h).
//
// Barriers are timed inside one cooperative launch of a block a multiprocessor: time of many rounds
// by their number. Each figure is the median of some launches after a warm-up.
#include <cooperative_groups.h>

#include <algorithm>
#include <functional>
#include <tuple>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/persistent.cuh"
#include "kernels/cuda/verbs.h"
#include "kernels/primitives.h"

namespace krait::cuda {

namespace {

namespace cg = cooperative_groups;

constexpr int kRounds = 1000;

// ---- barriers -----------------------------------------------------------------------------------

__device__ __forceinline__ void add_release(unsigned* p, unsigned v) {
#if __CUDA_ARCH__ >= 700
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v = 0;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(unsigned* p, unsigned v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__global__ void cooperative_rounds(int rounds) {
  const cg::grid_group grid = cg::this_grid();
  for (int i = 0; i < rounds; ++i) grid.sync();
}

/// Every block adds one; all wait until all have.
__device__ __forceinline__ void counter_barrier(unsigned* counter, unsigned goal) {
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(counter, 1);
    while (load_acquire(counter) < goal) {
    }
  }
  __syncthreads();
}

__global__ void counter_rounds(unsigned* counter, int rounds) {
  for (int i = 1; i <= rounds; ++i) counter_barrier(counter, static_cast<unsigned>(i) * gridDim.x);
}

/// Every block raises its own flag and looks at all of them.
__global__ void flag_rounds(unsigned* flags, int rounds) {
  for (int i = 1; i <= rounds; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flags + blockIdx.x, static_cast<unsigned>(i));
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
      while (load_acquire(flags + b) < static_cast<unsigned>(i)) {
      }
    }
    __syncthreads();
  }
}

/// The first and the last block answer each other.
__global__ void ping_pong(unsigned* flags, int rounds) {
  if (threadIdx.x != 0 || (blockIdx.x != 0 && blockIdx.x != gridDim.x - 1)) return;
  unsigned* mine = blockIdx.x == 0 ? flags : flags + 64;
  unsigned* other = blockIdx.x == 0 ? flags + 64 : flags;
  for (unsigned i = 1; i <= static_cast<unsigned>(rounds); ++i) {
    if (blockIdx.x == 0) store_release(mine, i);
    while (load_acquire(other) < i) {
    }
    if (blockIdx.x != 0) store_release(mine, i);
  }
}

/// A barrier as a phase of a decode step has it: every block writes its part of a vector of n
/// floats and then reads all of it. Two vectors take turns, so one barrier a round is enough.
__global__ void exchange_rounds(unsigned* counter, float* vectors, float* sink, int n, int rounds) {
  const int part = (n + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int begin = part * static_cast<int>(blockIdx.x);
  const int end = min(begin + part, n);
  float sum = 0;
  for (int i = 1; i <= rounds; ++i) {
    float* v = vectors + static_cast<int64_t>(i % 2) * n;
    for (int e = begin + static_cast<int>(threadIdx.x); e < end;
         e += static_cast<int>(blockDim.x)) {
      __stcg(v + e, sum + static_cast<float>(e));
    }
    counter_barrier(counter, static_cast<unsigned>(i) * gridDim.x);
    float part_sum = 0;
    for (int e = static_cast<int>(threadIdx.x); e < n; e += static_cast<int>(blockDim.x)) {
      part_sum += __ldcg(v + e);
    }
    sum = part_sum * 1e-6F;
  }
  if (sum == -1.0F) *sink = sum;  // never: keeps the loads
}

/// Sums over all blocks that say themselves when they are complete: every block adds its share and
/// a count of one in the top byte to each of n words (in one of kCopies copies), then reads the
/// words until the count is that of the blocks, at first `pause` cycles later: looks that come too
/// soon are in the way of the shares. Two sets of words take turns; differences to the last use
/// spare setting them to zero. `rounds` is even.
template <int kCopies>
__global__ void __launch_bounds__(512, 1)
    sum_rounds(unsigned long long* words, float* sink, int n, unsigned pause, int rounds) {
#if __CUDA_ARCH__ >= 700
  constexpr int kCountBit = 56;
  constexpr int kPer = 2;  // words of a thread: n <= kPer * 512
  unsigned long long last[2][kPer] = {};
  unsigned long long value = threadIdx.x;
  for (int i = 0; i < rounds; i += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned long long* set = words + static_cast<int64_t>(half) * n * kCopies;
      unsigned long long sum = 0;
      for (int e = static_cast<int>(threadIdx.x); e < n; e += static_cast<int>(blockDim.x)) {
        asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(
                         set + static_cast<int64_t>(blockIdx.x % kCopies) * n + e),
                     "l"((1ULL << kCountBit) + value % 1024)
                     : "memory");
      }
      wait_cycles(pause);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int e = static_cast<int>(threadIdx.x + j * blockDim.x);
        if (e >= n) break;
        unsigned long long total;
        do {
          unsigned long long part[kCopies];
#pragma unroll
          for (int c = 0; c < kCopies; ++c) {
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                         : "=l"(part[c])
                         : "l"(set + static_cast<int64_t>(c) * n + e)
                         : "memory");
          }
          total = 0;
#pragma unroll
          for (int c = 0; c < kCopies; ++c) total += part[c];
        } while ((total - last[half][j]) >> kCountBit != gridDim.x);
        last[half][j] = total;
        sum += total;
      }
      value = sum & 255;
      __syncthreads();
    }
  }
  if (value == ~0ULL) *sink = 1.0F;  // never: keeps the loads
#endif
}

/// Every block writes its part of n floats, each with the parity of the round in its last bit, and
/// reads all of them until their parity is right. Two vectors take turns.
__global__ void __launch_bounds__(512, 1)
    parity_rounds(unsigned* words, float* sink, int n, int rounds) {
#if __CUDA_ARCH__ >= 700
  const auto first = [&](int64_t block) { return static_cast<int>(n * block / gridDim.x); };
  unsigned value = threadIdx.x;
  for (int i = 0; i < rounds; ++i) {
    unsigned* set = words + static_cast<int64_t>(i % 2) * n;
    const unsigned parity = (i / 2 + 1) % 2;
    for (int e = first(blockIdx.x) + static_cast<int>(threadIdx.x); e < first(blockIdx.x + 1);
         e += static_cast<int>(blockDim.x)) {
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(set + e), "r"((value & ~1U) | parity)
                   : "memory");
    }
    unsigned sum = 0;
    for (int e = 4 * static_cast<int>(threadIdx.x); e < n; e += 4 * static_cast<int>(blockDim.x)) {
      uint4 v;
      do {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(set + e)
                     : "memory");
      } while ((((v.x ^ parity) | (v.y ^ parity) | (v.z ^ parity) | (v.w ^ parity)) & 1) != 0);
      sum += v.x + v.y + v.z + v.w;
    }
    value = sum & 255;
    __syncthreads();
  }
  if (value == ~0U) *sink = 1.0F;  // never: keeps the loads
#endif
}

// ---- kernels in a graph -------------------------------------------------------------------------

__global__ void nothing() {}
__global__ void nothing_overlapped() { after_previous(); }

// ---- special functions --------------------------------------------------------------------------

constexpr int kChains = 8;     // independent chains a thread: enough to fill the unit's latency
constexpr int kUnrolled = 64;  // instructions of each chain between two tests of the loop

enum class Unit { ex2_f32, ex2_f16x2, tanh_f32 };

template <Unit unit>
__global__ void special(unsigned* sink, int iterations) {
  unsigned v[kChains];
  for (int c = 0; c < kChains; ++c) v[c] = threadIdx.x + static_cast<unsigned>(c);
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        if constexpr (unit == Unit::ex2_f32) {
          asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+r"(v[c]));
        } else if constexpr (unit == Unit::ex2_f16x2) {
          asm volatile("ex2.approx.f16x2 %0, %0;" : "+r"(v[c]));
        } else {
          asm volatile("tanh.approx.f32 %0, %0;" : "+r"(v[c]));
        }
      }
    }
  }
  unsigned all = 0;
  for (int c = 0; c < kChains; ++c) all |= v[c];
  if (all == 0x12345678U) *sink = all;
}

// ---- host ---------------------------------------------------------------------------------------

class Primitives {
 public:
  Primitives() {
    sms_ = device_attribute(cudaDevAttrMultiProcessorCount);
    KRAIT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    KRAIT_CUDA(cudaEventCreate(&begin_));
    KRAIT_CUDA(cudaEventCreate(&end_));
    KRAIT_CUDA(cudaMalloc(&scratch_, kScratch));
  }
  ~Primitives() {
    cudaFree(scratch_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }
  Primitives(const Primitives&) = delete;
  Primitives& operator=(const Primitives&) = delete;

  std::vector<Primitive> run() {
    barriers();
    graphs();
    special_functions();
    reads();
    return std::move(found_);
  }

 private:
  static constexpr size_t kScratch = size_t{1} << 20;

  void add(const std::string& name, double value, const char* unit) {
    found_.push_back({name, value, unit});
  }

  /// Median seconds of `work` on the stream; `before` runs ahead of each, not timed.
  double seconds(const std::function<void()>& work, const std::function<void()>& before = {}) {
    std::vector<float> ms(9);
    for (int i = -2; i < static_cast<int>(ms.size()); ++i) {
      if (before) before();
      KRAIT_CUDA(cudaEventRecord(begin_, stream_));
      work();
      KRAIT_CUDA(cudaEventRecord(end_, stream_));
      KRAIT_CUDA(cudaEventSynchronize(end_));
      if (i >= 0) KRAIT_CUDA(cudaEventElapsedTime(&ms[static_cast<size_t>(i)], begin_, end_));
    }
    std::sort(ms.begin(), ms.end());
    return static_cast<double>(ms[ms.size() / 2]) * 1e-3;
  }

  template <typename... Params, typename... Args>
  void cooperative(void (*kernel)(Params...), int threads, Args... args) {
    std::tuple<Params...> values(static_cast<Params>(args)...);
    std::apply(
        [&](auto&... v) {
          void* pointers[] = {static_cast<void*>(&v)...};
          KRAIT_CUDA(cudaLaunchCooperativeKernel(
              reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(sms_)),
              dim3(static_cast<unsigned>(threads)), pointers, 0, stream_));
        },
        values);
  }

  void clear() { KRAIT_CUDA(cudaMemsetAsync(scratch_, 0, kScratch, stream_)); }

  /// Microseconds of a round: a launch of many rounds less one of a few, by their difference.
  template <typename F>
  double round_us(F&& launch_rounds) {
    constexpr int kFew = 10;
    const auto at = [&](int rounds) {
      return seconds([&] { launch_rounds(rounds); }, [&] { clear(); });
    };
    const double many = at(kRounds + kFew);
    return (many - at(kFew)) / kRounds * 1e6;
  }

  void barriers() {
    auto* counter = static_cast<unsigned*>(scratch_);
    auto* vectors = reinterpret_cast<float*>(static_cast<std::byte*>(scratch_) + 4096);
    for (const int threads : {128, 256, 512, 1024}) {
      const std::string size = std::to_string(threads) + " threads";
      add("grid barrier, cooperative groups, " + size,
          round_us([&](int n) { cooperative(cooperative_rounds, threads, n); }), "us");
      add("grid barrier, counter, " + size,
          round_us([&](int n) { cooperative(counter_rounds, threads, counter, n); }), "us");
    }
    add("grid barrier, a flag for each block, 256 threads",
        round_us([&](int n) { cooperative(flag_rounds, 256, counter, n); }), "us");
    add("flag from one block to another (half a round trip)",
        round_us([&](int n) { cooperative(ping_pong, 32, counter, n); }) / 2, "us");
    for (const int length : {2112, 5280}) {
      for (const int threads : {128, 256, 512, 1024}) {
        add("counter barrier and exchange of " + std::to_string(length) + " floats, " +
                std::to_string(threads) + " threads",
            round_us([&](int n) {
              cooperative(exchange_rounds, threads, counter, vectors, vectors, length, n);
            }),
            "us");
      }
    }
    auto* words = static_cast<unsigned long long*>(scratch_);
    for (const int n : {80, 192, 768, 1024}) {
      const std::string name = "exchange of " + std::to_string(n) + " sums over the blocks, ";
      add(name + "one copy",
          round_us([&](int r) { cooperative(sum_rounds<1>, 512, words, vectors, n, 0, r); }), "us");
      for (const int pause : {0, 600, 900}) {
        add(name + "four copies" +
                (pause == 0 ? "" : ", first look after " + std::to_string(pause) + " cycles"),
            round_us([&](int r) { cooperative(sum_rounds<4>, 512, words, vectors, n, pause, r); }),
            "us");
      }
    }
    for (const int n : {768, 1536, 2560, 5120}) {
      add("exchange of " + std::to_string(n) + " floats that carry a parity",
          round_us([&](int r) { cooperative(parity_rounds, 512, counter, vectors, n, r); }), "us");
    }
  }

  /// Microseconds that one more kernel in a chain costs.
  double node_us(void (*kernel)(), bool overlapped, int blocks) {
    const auto time_of = [&](int nodes) {
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t exec = nullptr;
      KRAIT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < nodes; ++i) {
        cudaLaunchAttribute overlap{};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(256);
        config.stream = stream_;
        config.attrs = &overlap;
        config.numAttrs = overlapped ? 1 : 0;
        KRAIT_CUDA(cudaLaunchKernelEx(&config, kernel));
      }
      KRAIT_CUDA(cudaStreamEndCapture(stream_, &graph));
      KRAIT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
      // The one before keeps the device busy while the next is launched.
      const double s = seconds([&] { KRAIT_CUDA(cudaGraphLaunch(exec, stream_)); },
                               [&] { KRAIT_CUDA(cudaGraphLaunch(exec, stream_)); });
      KRAIT_CUDA(cudaGraphExecDestroy(exec));
      KRAIT_CUDA(cudaGraphDestroy(graph));
      return s;
    };
    constexpr int kFew = 100;
    constexpr int kMany = 1100;
    return (time_of(kMany) - time_of(kFew)) / (kMany - kFew) * 1e6;
  }

  void graphs() {
    for (const int blocks : {1, sms_}) {
      const std::string size = std::to_string(blocks) + (blocks == 1 ? " block" : " blocks");
      add("kernel in a graph, " + size, node_us(nothing, false, blocks), "us");
      if (device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
        add("kernel in a graph, programmatic dependent launch, " + size,
            node_us(nothing_overlapped, true, blocks), "us");
      }
    }
  }

  template <Unit unit>
  double rate(int elements) {
    constexpr int kThreads = 512;
    constexpr int kIterations = 200;
    const int blocks = 4 * sms_;
    const double s = seconds([&] {
      special<unit>
          <<<blocks, kThreads, 0, stream_>>>(static_cast<unsigned*>(scratch_), kIterations);
      KRAIT_CUDA(cudaGetLastError());
    });
    const double instructions =
        static_cast<double>(blocks) * kThreads * kIterations * kUnrolled * kChains;
    return instructions * elements / s / 1e12;
  }

  void special_functions() {
    add("ex2 in f32", rate<Unit::ex2_f32>(1), "T/s");
    add("ex2 in f16, two at once", rate<Unit::ex2_f16x2>(2), "T/s");
    add("tanh in f32", rate<Unit::tanh_f32>(1), "T/s");
  }

  void reads() {
    size_t free = 0;
    size_t total = 0;
    KRAIT_CUDA(cudaMemGetInfo(&free, &total));
    const size_t largest = std::min(size_t{4} << 30, free / 2) & ~size_t{0xffff};
    void* memory = nullptr;
    KRAIT_CUDA(cudaMalloc(&memory, largest));
    KRAIT_CUDA(cudaMemsetAsync(memory, 1, largest, stream_));
    for (const size_t bytes :
         {largest, size_t{260} << 20, size_t{70} << 20, size_t{40} << 20, size_t{8} << 20}) {
      const double s = seconds([&] { stream_read(scratch_, memory, bytes, stream_); });
      add("read of " + std::to_string(bytes >> 20) + " MiB, a launch by itself" +
              (bytes < largest ? ", partly from L2" : ""),
          static_cast<double>(bytes) / s / 1e9, "GB/s");
    }
    KRAIT_CUDA(cudaFree(memory));
  }

  int sms_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  void* scratch_ = nullptr;
  std::vector<Primitive> found_;
};

// ---- the clock ----------------------------------------------------------------------------------

constexpr int kMostMultiprocessors = 1024;

/// What a multiprocessor has counted, and when; when is 0 where no block came by.
struct Reading {
  int64_t cycles;
  uint64_t ns;
};
__device__ Reading readings[2][kMostMultiprocessors];  // at the beginning and at the end

/// A block for each multiprocessor, so large that they spread.
__global__ void read_cycles(int which) {
  if (threadIdx.x != 0) return;
  unsigned multiprocessor;
  uint64_t ns;
  asm("mov.u32 %0, %smid;" : "=r"(multiprocessor));
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns)::"memory");
  if (multiprocessor < kMostMultiprocessors) {
    readings[which][multiprocessor] = {clock64(), ns};
  }
}

/// On the stream of the work: a kernel on another one may slow down all later steps
/// (CudaOps::product).
void read_clock(int which, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount));
  read_cycles<<<blocks, 1024, 0, stream>>>(which);
  KRAIT_CUDA(cudaGetLastError());
  KRAIT_CUDA(cudaStreamSynchronize(stream));
}

}  // namespace

void start_core_clock(cudaStream_t stream) { read_clock(0, stream); }

double mean_core_clock(cudaStream_t stream) {
  read_clock(1, stream);
  static Reading at[2][kMostMultiprocessors];
  KRAIT_CUDA(cudaMemcpyFromSymbolAsync(at, readings, sizeof at, 0, cudaMemcpyDeviceToHost, stream));
  KRAIT_CUDA(cudaStreamSynchronize(stream));
  double cycles = 0;
  double ns = 0;
  for (int i = 0; i < kMostMultiprocessors; ++i) {
    if (at[0][i].ns == 0 || at[1][i].ns <= at[0][i].ns) continue;
    cycles += static_cast<double>(at[1][i].cycles - at[0][i].cycles);
    ns += static_cast<double>(at[1][i].ns - at[0][i].ns);
  }
  return ns > 0 ? cycles / (ns * 1e-9) : 0;
}

}  // namespace krait::cuda

namespace krait {

std::vector<Primitive> measure_primitives(int index) {
  KRAIT_CUDA(cudaSetDevice(index));
  return cuda::Primitives().run();
}

}  // namespace krait
