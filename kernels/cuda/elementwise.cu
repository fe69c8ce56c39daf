// elementwise.cu - embed, gather_rows, convert, add_bias: copies with an index or a change of type;
// and count_differences.
//
// Launch   one block per row (embed, gather, bias), a grid-stride loop (convert, count)
// Bytes    every element read once and written once: bandwidth-bound
// Same as  kernels/cpu; tests/ops
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {
namespace {

template <typename W>
__global__ void embed_kernel(float* residual, const int32_t* ids, const W* table, int64_t d_model) {
  after_previous();
  const int64_t t = blockIdx.x;
  const W* row = table + ids[t] * d_model;
  for (int64_t i = threadIdx.x; i < d_model; i += blockDim.x) {
    residual[t * d_model + i] = to_float(row[i]);
  }
}

template <typename E>
__global__ void gather_kernel(E* out, const E* src, const int32_t* index, int64_t width,
                              int64_t out_stride, int64_t src_stride) {
  after_previous();
  const int64_t i = blockIdx.x;
  const int32_t from = index[i];
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    out[i * out_stride + c] = from < 0 ? E{} : src[from * src_stride + c];
  }
}

template <typename To, typename From>
__global__ void convert_kernel(To* dst, const From* src, int64_t n) {
  after_previous();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    if constexpr (std::is_same_v<From, double>) {
      dst[i] = from_float<To>(static_cast<float>(src[i]));
    } else {
      dst[i] = from_float<To>(to_float(src[i]));
    }
  }
}

template <typename T>
__global__ void add_bias_kernel(T* out, const float* bias, int64_t n, int64_t stride) {
  after_previous();
  T* row = out + blockIdx.x * stride;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    row[i] = from_float<T>(to_float(row[i]) + bias[i]);
  }
}

__global__ void count_differences_kernel(uint32_t* count, const uint32_t* a, const uint32_t* b,
                                         size_t n) {
  after_previous();
  uint32_t found = 0;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    found += a[i] != b[i] ? 1 : 0;
  }
  if (found > 0) atomicAdd(count, found);
}

}  // namespace

void embed(const Tensor& residual, const Tensor& ids, const Tensor& table, cudaStream_t stream) {
  visit_type(table.dtype, "embed table", [&](auto w) {
    using W = decltype(w);
    launch("embed", embed_kernel<W>, static_cast<unsigned>(ids.dim(0)), 256, 0, stream,
           residual.as<float>(), ids.as<int32_t>(), table.as<W>(), table.dim(1));
  });
}

void gather_rows(const Tensor& out, const Tensor& src, const Tensor& index, cudaStream_t stream) {
  const auto run = [&](auto e) {
    using E = decltype(e);
    launch("gather_rows", gather_kernel<E>, static_cast<unsigned>(index.dim(0)),
           out.dim(1) > 32 ? 256 : 32, 0, stream, out.as<E>(), src.as<E>(), index.as<int32_t>(),
           out.dim(1), out.row_stride, src.row_stride);
  };
  switch (itemsize(src.dtype)) {
    case 2:
      return run(uint16_t{});
    case 4:
      return run(uint32_t{});
    default:
      break;
  }
  throw_not_float(src.dtype, "gather_rows");
}

void convert(void* dst, DType dst_type, const void* src, DType src_type, int64_t n,
             cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(std::min<int64_t>(ceil_div(n, 256), 132 * 16));
  visit_type(dst_type, "convert to", [&](auto to) {
    using To = decltype(to);
    if (src_type == DType::f64) {
      launch("convert", convert_kernel<To, double>, grid, 256, 0, stream, static_cast<To*>(dst),
             static_cast<const double*>(src), n);
      return;
    }
    visit_type(src_type, "convert from", [&](auto from) {
      using From = decltype(from);
      launch("convert", convert_kernel<To, From>, grid, 256, 0, stream, static_cast<To*>(dst),
             static_cast<const From*>(src), n);
    });
  });
}

void add_bias(const Tensor& out, const Tensor& bias, cudaStream_t stream) {
  visit_type(out.dtype, "add_bias out", [&](auto t) {
    using T = decltype(t);
    launch("add_bias", add_bias_kernel<T>, static_cast<unsigned>(out.dim(0)), 256, 0, stream,
           out.as<T>(), bias.as<float>(), out.dim(1), out.row_stride);
  });
}

void count_differences(uint32_t* count, const void* a, const void* b, size_t bytes,
                       cudaStream_t stream) {
  launch("count_differences", count_differences_kernel, 1024U, 256, 0, stream, count,
         static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), bytes / 4);
}

}  // namespace krait::cuda
