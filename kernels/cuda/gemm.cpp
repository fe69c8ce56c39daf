#include "kernels/cuda/gemm.h"

#include <cublasLt.h>

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/trials.h"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

void check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(ErrorKind::device,
              fmt::format("{} failed: {}", call, cublasLtGetStatusString(status)));
}
#define KRAIT_CUBLAS(call) check((call), #call)

cudaDataType_t cuda_type(DType t) {
  switch (t) {
    case DType::f32:
      return CUDA_R_32F;
    case DType::f16:
      return CUDA_R_16F;
    case DType::bf16:
      return CUDA_R_16BF;
    default:
      break;
  }
  throw Error(ErrorKind::unsupported,
              fmt::format("matrix products of {} are not built", dtype_name(t)));
}

/// Largest power of two up to 16 that divides both the address and the stride in bytes.
uint32_t alignment(const Tensor& t) {
  const auto stride = static_cast<uintptr_t>(t.row_stride) * itemsize(t.dtype);
  const uintptr_t both = reinterpret_cast<uintptr_t>(t.data) | stride;
  uint32_t a = 16;
  while (both % a != 0) a /= 2;
  return a;
}

template <typename T, cublasStatus_t (*destroy)(T)>
struct Handle {
  T value{};
  Handle() = default;
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle(Handle&& o) noexcept : value(std::exchange(o.value, T{})) {}
  Handle& operator=(Handle&& o) noexcept {
    std::swap(value, o.value);
    return *this;
  }
  ~Handle() {
    if (value != T{}) destroy(value);
  }
};
using Layout = Handle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;

Layout make_layout(cudaDataType_t type, int64_t rows, int64_t cols, int64_t leading) {
  Layout layout;
  KRAIT_CUBLAS(cublasLtMatrixLayoutCreate(&layout.value, type, static_cast<uint64_t>(rows),
                                          static_cast<uint64_t>(cols), leading));
  return layout;
}

/// Products of at least so many rows and operations are worth the search for a faster algorithm.
/// H100, bf16, best of 8 against the first choice: 16,384 rows of 370m and 130m 10 to 16%, 8,192 of
/// 130m to 2.8b 0 to 11%, 2,048 of 2.8b 5%; 1,024 and 256 rows 0 to 2%.
constexpr int64_t kManyRows = 2048;
constexpr double kManyOperations = 5e9;
/// Narrow ones (x_proj) gave nothing.
constexpr int64_t kWide = 512;
/// The weights come so many times before the search: H100, it took 70 to 120 ms in all (new kernels
/// are loaded), which a short run would not get back.
constexpr int kPassesBefore = 2;
/// Algorithms that cuBLASLt is asked for: it names no more. Asking for other numbers of rows gave
/// up to 15 others, which gained 1.6% once in 12 shapes.
constexpr int kMostAlgos = 8;
/// What an algorithm may need of the workspace: a counter of tiles for blocks that take several.
constexpr size_t kCounterBytes = 4096;
/// Rows that show whether two algorithms give the same bits, at least: a tile of the tallest.
constexpr int64_t kLeastCompared = 256;

/// cuBLASLt is column-major: our row-major out [n, n_out] is its matrix [n_out, n], so it computes
/// out = W^T' * in with W as the transposed operand A and `in` as B.
struct Plan {
  Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product;
  Layout a, b, d;
  std::vector<cublasLtMatmulAlgo_t> algos;  // of equal results; none: cuBLASLt can't do this one
  bool open = false;                        // the first of them may not be the fastest
  const void* first_W = nullptr;            // while open: the weights of the first use,
  int passes = 0;                           // and how often they came
  std::optional<Trials> trials;             // of the algorithms
};

// out type, in type, n, n_out, n_in, strides of out and in, alignments of the three
using Key = std::tuple<DType, DType, int64_t, int64_t, int64_t, int64_t, int64_t, uint32_t,
                       uint32_t, uint32_t>;

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  KRAIT_CUDA(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

struct Gemm::Impl {
  cublasLtHandle_t handle = nullptr;
  Buffer workspace;
  std::map<Key, Plan> plans;
  uint64_t n_open = 0;

  Plan make_plan(const Tensor& out, const Tensor& in, const Tensor& W) {
    Plan plan;
    KRAIT_CUBLAS(cublasLtMatmulDescCreate(&plan.product.value, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transpose = CUBLAS_OP_T;
    KRAIT_CUBLAS(cublasLtMatmulDescSetAttribute(plan.product.value, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transpose, sizeof(transpose)));
    plan.a = make_layout(cuda_type(W.dtype), W.dim(1), W.dim(0), W.row_stride);
    plan.b = make_layout(cuda_type(in.dtype), in.dim(1), in.dim(0), in.row_stride);
    plan.d = make_layout(cuda_type(out.dtype), out.dim(1), out.dim(0), out.row_stride);

    const auto found =
        heuristic(plan, out, in, W, 1, workspace.bytes(), CUBLASLT_REDUCTION_SCHEME_MASK);
    if (found.empty()) return plan;
    plan.algos = {found[0].algo};
    const double operations =
        2.0 * static_cast<double>(out.numel()) * static_cast<double>(in.dim(1));
    plan.open = in.dim(0) >= kManyRows && operations >= kManyOperations &&
                std::min(in.dim(1), out.dim(1)) >= kWide && found[0].workspaceSize <= kCounterBytes;
    return plan;
  }

  /// Up to `most` algorithms, those first that cuBLASLt expects to be the fastest.
  std::vector<cublasLtMatmulHeuristicResult_t> heuristic(const Plan& plan, const Tensor& out,
                                                         const Tensor& in, const Tensor& W,
                                                         int most, size_t workspace_bytes,
                                                         uint32_t reductions) const {
    Handle<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> wish;
    KRAIT_CUBLAS(cublasLtMatmulPreferenceCreate(&wish.value));
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      KRAIT_CUBLAS(
          cublasLtMatmulPreferenceSetAttribute(wish.value, attribute, &value, sizeof(value)));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(W));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(in));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(out));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out));
    std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(most));
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, plan.product.value, plan.a.value, plan.b.value, plan.d.value, plan.d.value,
        wish.value, most, results.data(), &found);
    results.resize(status == CUBLAS_STATUS_SUCCESS ? static_cast<size_t>(found) : 0);
    return results;
  }

  cublasStatus_t multiply(const Plan& plan, const cublasLtMatmulAlgo_t& algo, const Layout& b,
                          const Layout& d, void* out, const void* in, const void* W,
                          bool accumulate, cudaStream_t stream) const {
    const float alpha = 1.0F;
    const float beta = accumulate ? 1.0F : 0.0F;
    return cublasLtMatmul(handle, plan.product.value, &alpha, W, plan.a.value, in, b.value, &beta,
                          out, d.value, out, d.value, &algo, workspace.data(), workspace.bytes(),
                          stream);
  }

  /// Adds to the first algorithm those that give the same bits: that add up each output in the same
  /// order, so that no result tells which of them ran. Compared are the first rows of the product
  /// at hand, as many as two halves of the workspace hold.
  void find_equals(Plan& plan, const Tensor& out, const Tensor& in, const Tensor& W,
                   cudaStream_t stream) const {
    constexpr size_t kCountBytes = sizeof(uint32_t) * 64;
    static_assert(kMostAlgos <= 64);
    const size_t half = (workspace.bytes() - kCounterBytes - kCountBytes) / 2 / 256 * 256;
    const size_t row_bytes = static_cast<size_t>(out.row_stride) * itemsize(out.dtype);
    const int64_t n = std::min(in.dim(0), static_cast<int64_t>(half / row_bytes));
    if (n < kLeastCompared) return;
    const size_t bytes = static_cast<size_t>(n) * row_bytes;
    std::byte* const n_different = static_cast<std::byte*>(workspace.data()) + kCounterBytes;
    std::byte* const want = n_different + kCountBytes;
    std::byte* const got = want + half;
    const Layout b = make_layout(cuda_type(in.dtype), in.dim(1), n, in.row_stride);
    const Layout d = make_layout(cuda_type(out.dtype), out.dim(1), n, out.row_stride);
    const auto runs = [&](const cublasLtMatmulAlgo_t& algo, std::byte* to) {
      KRAIT_CUDA(cudaMemsetAsync(to, 0xff, bytes, stream));  // what no algorithm writes is equal
      return multiply(plan, algo, b, d, to, in.data, W.data, false, stream) ==
             CUBLAS_STATUS_SUCCESS;
    };

    if (!runs(plan.algos[0], want)) return;
    KRAIT_CUDA(cudaMemsetAsync(n_different, 0, kCountBytes, stream));
    std::vector<cublasLtMatmulAlgo_t> others;
    for (const auto& result :
         heuristic(plan, out, in, W, kMostAlgos, kCounterBytes, CUBLASLT_REDUCTION_SCHEME_NONE)) {
      if (std::ranges::equal(result.algo.data, plan.algos[0].data)) continue;
      if (!runs(result.algo, got)) continue;
      count_differences(reinterpret_cast<uint32_t*>(n_different) + others.size(), want, got, bytes,
                        stream);
      others.push_back(result.algo);
    }
    std::vector<uint32_t> counts(others.size());
    KRAIT_CUDA(cudaMemcpyAsync(counts.data(), n_different, counts.size() * sizeof(uint32_t),
                               cudaMemcpyDeviceToHost, stream));
    KRAIT_CUDA(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < others.size(); ++i) {
      if (counts[i] == 0) plan.algos.push_back(others[i]);
    }
  }

  /// The trials that a use of an open plan is one of, or null.
  Trials* trials(Plan& plan, const Tensor& out, const Tensor& in, const Tensor& W,
                 cudaStream_t stream) const {
    if (plan.trials) return &*plan.trials;
    if (plan.first_W == nullptr) plan.first_W = W.data;
    if (W.data != plan.first_W || ++plan.passes <= kPassesBefore) return nullptr;
    find_equals(plan, out, in, W, stream);
    if (plan.algos.size() > 1) return &plan.trials.emplace(plan.algos.size());
    plan.open = false;
    return nullptr;
  }
};

Gemm::Gemm(Buffer workspace) : impl_(std::make_unique<Impl>()) {
  impl_->workspace = std::move(workspace);
  KRAIT_CUBLAS(cublasLtCreate(&impl_->handle));
}

Gemm::~Gemm() {
  impl_->plans.clear();
  if (impl_->handle != nullptr) cublasLtDestroy(impl_->handle);
}

bool Gemm::run(const Tensor& out, const Tensor& in, const Tensor& W, bool accumulate,
               cudaStream_t stream) {
  const Key key{out.dtype,      in.dtype,      in.dim(0),      W.dim(0),      W.dim(1),
                out.row_stride, in.row_stride, alignment(out), alignment(in), alignment(W)};
  auto at = impl_->plans.find(key);
  if (at == impl_->plans.end()) {
    at = impl_->plans.emplace(key, impl_->make_plan(out, in, W)).first;
  }
  Plan& plan = at->second;
  if (plan.algos.empty()) return false;
  const auto multiply = [&](size_t i) {
    KRAIT_CUBLAS(impl_->multiply(plan, plan.algos[i], plan.b, plan.d, out.data, in.data, W.data,
                                 accumulate, stream));
  };
  Trials* trials = nullptr;
  const bool chooses = plan.open && !is_captured(stream);
  if (chooses) trials = impl_->trials(plan, out, in, W, stream);
  if (trials == nullptr) {
    multiply(0);
  } else {
    multiply(trials->begin(stream));
    trials->end(stream);
    if (const auto best = trials->best()) {
      plan.algos = {plan.algos[*best]};
      plan.trials.reset();
      plan.open = false;
    }
  }
  if (chooses && plan.open) ++impl_->n_open;
  return true;
}

uint64_t Gemm::n_open() const noexcept { return impl_->n_open; }

}  // namespace krait::cuda
