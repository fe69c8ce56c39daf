#include "kernels/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/check.h"

namespace krait::cuda {

void Staging::upload(void* dst, const void* src, size_t bytes, cudaStream_t stream) {
  auto* to = static_cast<std::byte*>(dst);
  const auto* from = static_cast<const std::byte*>(src);
  while (bytes > 0) {
    if (used_ == kBlockBytes || (bytes > kBlockBytes - used_ && bytes <= kBlockBytes)) {
      if (blocks_[block_].emptied != nullptr) {
        KRAIT_CUDA(cudaEventRecord(blocks_[block_].emptied, stream));
      }
      block_ = (block_ + 1) % blocks_.size();
      used_ = 0;
      Block& next = blocks_[block_];
      if (next.pinned == nullptr) {
        void* pinned = nullptr;
        KRAIT_CUDA(cudaMallocHost(&pinned, kBlockBytes));
        next.pinned = static_cast<std::byte*>(pinned);
        KRAIT_CUDA(cudaEventCreateWithFlags(&next.emptied, cudaEventDisableTiming));
      } else {
        KRAIT_CUDA(cudaEventSynchronize(next.emptied));
      }
    }
    const size_t n = std::min(bytes, kBlockBytes - used_);
    std::byte* pinned = blocks_[block_].pinned + used_;
    std::memcpy(pinned, from, n);
    KRAIT_CUDA(cudaMemcpyAsync(to, pinned, n, cudaMemcpyHostToDevice, stream));
    constexpr size_t kAlign = 64;
    used_ = std::min(kBlockBytes, used_ + (n + kAlign - 1) / kAlign * kAlign);
    to += n;
    from += n;
    bytes -= n;
  }
}

Staging::~Staging() {
  for (const Block& b : blocks_) {
    if (b.pinned == nullptr) continue;
    cudaFreeHost(b.pinned);
    cudaEventDestroy(b.emptied);
  }
}

}  // namespace krait::cuda
