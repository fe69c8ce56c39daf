// Streams weights from mapped files to the device: a ring of pinned buffers that several threads of
// the host fill (their page faults read the disk; one thread copies a file in the page cache at
// 4 GB/s, much less than the bus takes) while the copy engine empties the ones before, and
// conversion on the device where the file's type is not the wanted one.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <memory>

#include "base/tensor.h"
#include "base/thread_pool.h"

namespace krait::cuda {

class WeightStream {
 public:
  WeightStream() = default;
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  /// Enqueues dst[0 .. src.numel()) = src as `dtype`. src may be unaligned; it is read before the
  /// return.
  void copy(void* dst, DType dtype, const Tensor& src);
  /// Waits for all copies and gives the buffers back.
  void finish();

 private:
  static constexpr size_t kChunkBytes = size_t{16} << 20;
  struct Stage {
    void* pinned = nullptr;
    void* device = nullptr;  // where a chunk waits for its conversion
    cudaEvent_t done = nullptr;
  };
  void start();
  /// pinned[0 .. bytes) = from
  void fill(void* pinned, const std::byte* from, size_t bytes);

  std::array<Stage, 4> stages_;
  size_t next_ = 0;
  std::unique_ptr<ThreadPool> readers_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace krait::cuda
