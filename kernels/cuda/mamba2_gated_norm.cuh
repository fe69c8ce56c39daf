// The norm between scan and out_proj of Mamba-2 as a block does it: mamba2_gated_norm.cu.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/ops.h"

namespace krait::cuda {

constexpr int kMaxNormThreads = 1024;

template <typename T>
struct GateInputs {
  T* out;  // may be y
  const T *y, *z;
  const float* weight;
  int64_t out_stride, y_stride, z_stride;
  int width;
  float eps;
};

/// z is not read again: it leaves L2 first, so that y and the result stay there for out_proj.
template <typename T>
__device__ __forceinline__ Vec16<T> load_once(const T* from) {
  union {
    uint4 raw;
    Vec16<T> vec;
  } u{__ldcs(reinterpret_cast<const uint4*>(from))};
  return u.vec;
}

/// Block (row, group); a thread has up to kVecs pieces of 16 bytes, blockDim.x apart.
template <typename T, int kVecs>
__device__ __forceinline__ void gated_norm(const GateInputs<T>& p) {
  constexpr int kPer = Vec16<T>::kSize;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.width;
  // From the last row on, which is the likeliest to be still in L2; so the first ones are for
  // out_proj, which begins with them.
  const int64_t row = gridDim.x - 1 - blockIdx.x;
  const auto place = [](int q) { return kPer * static_cast<int>(threadIdx.x + q * blockDim.x); };
  // The weights don't depend on the kernel before this one: they are on their way while it ends.
  float4 w[kVecs][kPer / 4];
#pragma unroll
  for (int q = 0; q < kVecs; ++q) {
    if (place(q) >= p.width) continue;
#pragma unroll
    for (int j = 0; j < kPer / 4; ++j) {
      w[q][j] = *reinterpret_cast<const float4*>(p.weight + first + place(q) + 4 * j);
    }
  }
  after_previous();
  Vec16<T> y[kVecs], z[kVecs];
#pragma unroll
  for (int q = 0; q < kVecs; ++q) {
    const int i = place(q);
    if (i >= p.width) continue;
    y[q] = *reinterpret_cast<const Vec16<T>*>(p.y + row * p.y_stride + first + i);
    z[q] = load_once(p.z + row * p.z_stride + first + i);
  }
  float v[kVecs][kPer];
  float sum = 0.0F;
#pragma unroll
  for (int q = 0; q < kVecs; ++q) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      v[q][j] = place(q) < p.width ? to_float(y[q].v[j]) * silu(to_float(z[q].v[j])) : 0.0F;
      sum = fmaf(v[q][j], v[q][j], sum);
    }
  }
  const float scale = rsqrtf(block_sum(sum) / static_cast<float>(p.width) + p.eps);
#pragma unroll
  for (int q = 0; q < kVecs; ++q) {
    if (place(q) >= p.width) continue;
    Vec16<T> out;
#pragma unroll
    for (int j = 0; j < kPer; j += 4) {
      out.v[j] = from_float<T>(v[q][j] * scale * w[q][j / 4].x);
      out.v[j + 1] = from_float<T>(v[q][j + 1] * scale * w[q][j / 4].y);
      out.v[j + 2] = from_float<T>(v[q][j + 2] * scale * w[q][j / 4].z);
      out.v[j + 3] = from_float<T>(v[q][j + 3] * scale * w[q][j / 4].w);
    }
    *reinterpret_cast<Vec16<T>*>(p.out + row * p.out_stride + first + place(q)) = out;
  }
}

template <typename T>
GateInputs<T> gate_inputs(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                          int64_t n_group, float eps) {
  return {out.as<T>(),
          y.as<T>(),
          z.as<T>(),
          weight.as<float>(),
          out.row_stride,
          y.row_stride,
          z.row_stride,
          static_cast<int>(y.dim(1) / n_group),
          eps};
}

/// Threads of a block of gated_norm<T, kVecs>; 0 where groups don't divide into aligned pieces, or
/// into too many.
template <typename T>
int64_t gated_norm_threads(const GateInputs<T>& p, int64_t vecs) {
  constexpr int64_t kPer = Vec16<T>::kSize;
  const auto aligned = [](const void* at, int64_t stride) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride % kPer == 0;
  };
  const int64_t pieces = p.width / kPer;
  const bool fits = p.width % kPer == 0 && pieces <= vecs * kMaxNormThreads &&
                    aligned(p.y, p.y_stride) && aligned(p.z, p.z_stride) &&
                    aligned(p.out, p.out_stride) && aligned(p.weight, kPer);
  return fits ? ceil_div(ceil_div(pieces, vecs), 32) * 32 : 0;
}

}  // namespace krait::cuda
