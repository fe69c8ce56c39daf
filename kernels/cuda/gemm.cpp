#include "kernels/cuda/gemm.h"

#include <cublasLt.h>

#include <map>
#include <optional>
#include <tuple>

#include "base/error.h"

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

/// cuBLASLt is column-major: our row-major out [n, n_out] is its matrix [n_out, n], so it computes
/// out = W^T' * in with W as the transposed operand A and `in` as B.
struct Plan {
  Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product;
  Layout a, b, d;
  std::optional<cublasLtMatmulAlgo_t> algo;  // none: cuBLASLt can't do this one
};

// out type, in type, n, n_out, n_in, strides of out and in, alignments of the three
using Key = std::tuple<DType, DType, int64_t, int64_t, int64_t, int64_t, int64_t, uint32_t,
                       uint32_t, uint32_t>;

}  // namespace

struct Gemm::Impl {
  cublasLtHandle_t handle = nullptr;
  Buffer workspace;
  std::map<Key, Plan> plans;

  Plan make_plan(const Tensor& out, const Tensor& in, const Tensor& W) {
    Plan plan;
    KRAIT_CUBLAS(cublasLtMatmulDescCreate(&plan.product.value, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transpose = CUBLAS_OP_T;
    KRAIT_CUBLAS(cublasLtMatmulDescSetAttribute(plan.product.value, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transpose, sizeof(transpose)));
    plan.a = make_layout(cuda_type(W.dtype), W.dim(1), W.dim(0), W.row_stride);
    plan.b = make_layout(cuda_type(in.dtype), in.dim(1), in.dim(0), in.row_stride);
    plan.d = make_layout(cuda_type(out.dtype), out.dim(1), out.dim(0), out.row_stride);

    Handle<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> wish;
    KRAIT_CUBLAS(cublasLtMatmulPreferenceCreate(&wish.value));
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      KRAIT_CUBLAS(
          cublasLtMatmulPreferenceSetAttribute(wish.value, attribute, &value, sizeof(value)));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace.bytes()));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(W));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(in));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(out));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out));

    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle, plan.product.value, plan.a.value, plan.b.value,
                                       plan.d.value, plan.d.value, wish.value, 1, &best, &found);
    if (status == CUBLAS_STATUS_SUCCESS && found > 0) plan.algo = best.algo;
    return plan;
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
  const Plan& plan = at->second;
  if (!plan.algo) return false;
  const float alpha = 1.0F;
  const float beta = accumulate ? 1.0F : 0.0F;
  KRAIT_CUBLAS(cublasLtMatmul(impl_->handle, plan.product.value, &alpha, W.data, plan.a.value,
                              in.data, plan.b.value, &beta, out.data, plan.d.value, out.data,
                              plan.d.value, &*plan.algo, impl_->workspace.data(),
                              impl_->workspace.bytes(), stream));
  return true;
}

}  // namespace krait::cuda
