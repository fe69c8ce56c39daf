#include "kernels/cuda/weight_stream.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/check.h"
#include "kernels/cuda/verbs.h"

namespace krait::cuda {

void WeightStream::start() {
  if (stream_ != nullptr) return;
  KRAIT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  constexpr int kReaders = 8;
  readers_ = std::make_unique<ThreadPool>(std::min(usable_cores(), kReaders));
  for (Stage& s : stages_) {
    KRAIT_CUDA(cudaMallocHost(&s.pinned, kChunkBytes));
    KRAIT_CUDA(cudaMalloc(&s.device, kChunkBytes));
    KRAIT_CUDA(cudaEventCreateWithFlags(&s.done, cudaEventDisableTiming));
  }
}

void WeightStream::copy(void* dst, DType dtype, const Tensor& src) {
  start();
  const size_t from_size = itemsize(src.dtype);
  const auto per_chunk = static_cast<int64_t>(kChunkBytes / from_size);
  for (int64_t i = 0; i < src.numel(); i += per_chunk) {
    const int64_t n = std::min(per_chunk, src.numel() - i);
    const size_t bytes = static_cast<size_t>(n) * from_size;
    Stage& stage = stages_[next_++ % stages_.size()];
    KRAIT_CUDA(cudaEventSynchronize(stage.done));
    fill(stage.pinned, static_cast<const std::byte*>(src.data) + static_cast<size_t>(i) * from_size,
         bytes);
    void* to = static_cast<std::byte*>(dst) + static_cast<size_t>(i) * itemsize(dtype);
    if (dtype == src.dtype) {
      KRAIT_CUDA(cudaMemcpyAsync(to, stage.pinned, bytes, cudaMemcpyHostToDevice, stream_));
    } else {
      KRAIT_CUDA(
          cudaMemcpyAsync(stage.device, stage.pinned, bytes, cudaMemcpyHostToDevice, stream_));
      convert(to, dtype, stage.device, src.dtype, n, stream_);
    }
    KRAIT_CUDA(cudaEventRecord(stage.done, stream_));
  }
}

void WeightStream::fill(void* pinned, const std::byte* from, size_t bytes) {
  constexpr int64_t kPart = int64_t{1} << 20;  // bytes
  const auto n = static_cast<int64_t>(bytes);
  readers_->parallel_for((n + kPart - 1) / kPart, 1, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kPart;
    std::memcpy(static_cast<std::byte*>(pinned) + at, from + at,
                static_cast<size_t>(std::min(n, end * kPart) - at));
  });
}

void WeightStream::finish() {
  if (stream_ == nullptr) return;
  readers_.reset();
  KRAIT_CUDA(cudaStreamSynchronize(stream_));
  for (Stage& s : stages_) {
    cudaFreeHost(s.pinned);
    cudaFree(s.device);
    cudaEventDestroy(s.done);
    s = Stage{};
  }
  cudaStreamDestroy(stream_);
  stream_ = nullptr;
}

WeightStream::~WeightStream() {
  try {
    finish();
  } catch (const Error&) {  // the device is gone: nothing left to give back
  }
}

}  // namespace krait::cuda
