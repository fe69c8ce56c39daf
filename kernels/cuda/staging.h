// Staging takes small host data to the device without waiting for the work before it: a ring of
// pinned memory that the host fills and the stream empties. (From pageable memory cudaMemcpyAsync
// may wait until the stream has come to the copy.)
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>

namespace krait::cuda {

class Staging {
 public:
  Staging() = default;
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// Enqueues dst = src on `stream`, always the same one; src has been read on return. Waits only
  /// if the whole ring is on its way.
  void upload(void* dst, const void* src, size_t bytes, cudaStream_t stream);

 private:
  static constexpr size_t kBlockBytes = size_t{512} << 10;
  struct Block {
    std::byte* pinned = nullptr;
    cudaEvent_t emptied = nullptr;  ///< recorded after the block's last copy
  };

  std::array<Block, 8> blocks_;
  size_t block_ = 0;           ///< the one being filled
  size_t used_ = kBlockBytes;  ///< bytes of it; a full one makes way for the next
};

}  // namespace krait::cuda
