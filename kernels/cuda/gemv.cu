// gemv.cu - out (+)= in * W^T (+ bias) for few rows of `in`: the projections of a decode step.
//
// Shapes   in T [n, n_in] view, W [n_out, n_in], bias f32 [n_out], out T or f32 [n, n_out] view
// Launch   blocks of 8 warps. A group of 1, 2, 4 or 8 warps computes R rows of W for up to 4 rows
// of
//          `in`; the group splits n_in. Small matrices split more, so that there are always enough
//          loads in flight to keep HBM busy (about 16 KB per SM on an H100).
// Bytes    n_out * n_in * sizeof(T) per 4 rows of `in`; `in` comes from L1
// Roofline 1 FMA per weight: bandwidth-bound
// Same as  linear and linear_add in kernels/cpu; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kPrefetch = 4;  // 16-byte loads per thread and row that are requested ahead

struct Strides {
  int64_t out;
  int64_t in;
};

/// kVector: n_in and all rows allow 16-byte loads. kTok rows of `in`, kRows rows of W per group.
template <typename T, typename Out, int kTok, int kRows, bool kVector>
__global__ void __launch_bounds__(kWarps * 32)
    gemv_kernel(Out* out, const T* in, const T* W, const float* bias, int64_t n_out, int64_t n_in,
                Strides stride, int warps_per_group, bool accumulate) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = warp / warps_per_group;
  const int part = warp % warps_per_group;
  const int64_t row0 =
      (static_cast<int64_t>(blockIdx.x) * (kWarps / warps_per_group) + group) * kRows;

  float acc[kRows][kTok] = {};
  constexpr int kStep = kVector ? Vec16<T>::kSize : 1;
  // Rows past the end repeat the last one: the loads stay in range and the result is not stored.
  const T* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = W + min(row0 + r, n_out - 1) * n_in;

  const int64_t stride_k = static_cast<int64_t>(warps_per_group) * 32 * kStep;
  if constexpr (kVector) {
    // The weights don't depend on the kernel before this one: bring the first ones to L2 while it
    // ends.
    for (int64_t k = (part * 32 + lane) * kStep, i = 0; k < n_in && i < kPrefetch;
         k += stride_k, ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) prefetch_l2(rows[r] + k);
    }
  }
  after_previous();

#pragma unroll 4
  for (int64_t k = (part * 32 + lane) * kStep; k < n_in; k += stride_k) {
    if constexpr (kVector) {
      Vec16<T> w[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) w[r] = load_streaming(rows[r] + k);
#pragma unroll
      for (int t = 0; t < kTok; ++t) {
        const auto x = *reinterpret_cast<const Vec16<T>*>(in + t * stride.in + k);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const float xi = to_float(x.v[i]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) acc[r][t] = fmaf(to_float(w[r].v[i]), xi, acc[r][t]);
        }
      }
    } else {
#pragma unroll
      for (int t = 0; t < kTok; ++t) {
        const float xi = to_float(in[t * stride.in + k]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) acc[r][t] = fmaf(to_float(rows[r][k]), xi, acc[r][t]);
      }
    }
  }

  __shared__ float partial[kWarps][kRows * kTok];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTok; ++t) {
      const float sum = warp_sum(acc[r][t]);
      if (lane == 0) partial[warp][r * kTok + t] = sum;
    }
  }
  __syncthreads();

  if (part != 0 || lane >= kRows * kTok) return;
  const int64_t row = row0 + lane / kTok;
  const int t = lane % kTok;
  if (row >= n_out) return;
  float sum = 0.0F;
  for (int p = 0; p < warps_per_group; ++p) sum += partial[warp + p][lane];
  if (bias != nullptr) sum += bias[row];
  Out* target = out + t * stride.out + row;
  if (accumulate) sum += to_float(*target);
  *target = from_float<Out>(sum);
}

template <typename T, typename Out, int kTok>
void launch_gemv(Out* out, const T* in, const T* W, const float* bias, int64_t n_out, int64_t n_in,
                 Strides stride, bool vector, bool accumulate, cudaStream_t stream) {
  // Two rows per group halve the reads of `in`, where that leaves enough groups.
  constexpr int kRowsLarge = 2;
  constexpr int64_t kWantedWarps = 4096;
  const bool two = n_out >= 8192;
  const int64_t groups = ceil_div(n_out, two ? kRowsLarge : 1);
  const int64_t per_warp = 32 * (vector ? Vec16<T>::kSize : 1);
  int warps_per_group = 1;
  while (warps_per_group < kWarps && groups * warps_per_group < kWantedWarps &&
         per_warp * warps_per_group < n_in) {
    warps_per_group *= 2;
  }
  const auto grid = static_cast<unsigned>(ceil_div(groups, kWarps / warps_per_group));
  const auto run = [&](auto* kernel) {
    launch("gemv", kernel, grid, kWarps * 32, 0, stream, out, in, W, bias, n_out, n_in, stride,
           warps_per_group, accumulate);
  };
  if (vector && two) return run(&gemv_kernel<T, Out, kTok, kRowsLarge, true>);
  if (vector) return run(&gemv_kernel<T, Out, kTok, 1, true>);
  if (two) return run(&gemv_kernel<T, Out, kTok, kRowsLarge, false>);
  run(&gemv_kernel<T, Out, kTok, 1, false>);
}

}  // namespace

void gemv(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias, bool accumulate,
          cudaStream_t stream) {
  visit_type(W.dtype, "linear weight", [&](auto w) {
    using T = decltype(w);
    const auto run = [&](auto o) {
      using Out = decltype(o);
      const bool vector = W.dim(1) % Vec16<T>::kSize == 0 && aligned16(W) && aligned16(in);
      for (int64_t t = 0; t < in.dim(0); t += 4) {
        const Tensor y = out.rows(t, std::min<int64_t>(4, in.dim(0) - t));
        const Tensor x = in.rows(t, y.dim(0));
        const auto go = [&](auto n) {
          launch_gemv<T, Out, decltype(n)::value>(
              y.as<Out>(), x.as<T>(), W.as<T>(), bias.as<float>(), W.dim(0), W.dim(1),
              {out.row_stride, in.row_stride}, vector, accumulate, stream);
        };
        switch (y.dim(0)) {
          case 1:
            go(std::integral_constant<int, 1>{});
            break;
          case 2:
            go(std::integral_constant<int, 2>{});
            break;
          case 3:
            go(std::integral_constant<int, 3>{});
            break;
          default:
            go(std::integral_constant<int, 4>{});
            break;
        }
      }
    };
    if (out.dtype == DType::f32) return run(float{});
    run(T{});
  });
}

}  // namespace krait::cuda
