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
  static constexpr size_t kBlocks = 8;

  void allocate();

  std::byte* pinned_ = nullptr;                 ///< kBlocks blocks, from the first upload on
  std::array<cudaEvent_t, kBlocks> emptied_{};  ///< each recorded after its block's last copy
  size_t block_ = 0;                            ///< the one being filled
  size_t used_ = kBlockBytes;                   ///< bytes of it; a full one makes way for the next
};

}  // namespace krait::cuda
