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
      if (pinned_ != nullptr) KRAIT_CUDA(cudaEventRecord(emptied_[block_], stream));
      block_ = (block_ + 1) % kBlocks;
      used_ = 0;
      if (pinned_ == nullptr) allocate();
      KRAIT_CUDA(cudaEventSynchronize(emptied_[block_]));
    }
    const size_t n = std::min(bytes, kBlockBytes - used_);
    std::byte* pinned = pinned_ + block_ * kBlockBytes + used_;
    std::memcpy(pinned, from, n);
    KRAIT_CUDA(cudaMemcpyAsync(to, pinned, n, cudaMemcpyHostToDevice, stream));
    constexpr size_t kAlign = 64;
    used_ = std::min(kBlockBytes, used_ + (n + kAlign - 1) / kAlign * kAlign);
    to += n;
    from += n;
    bytes -= n;
  }
}

// All of it at once: memory must not grow while a long prompt goes through.
void Staging::allocate() {
  void* pinned = nullptr;
  KRAIT_CUDA(cudaMallocHost(&pinned, kBlocks * kBlockBytes));
  pinned_ = static_cast<std::byte*>(pinned);
  for (cudaEvent_t& e : emptied_) {
    KRAIT_CUDA(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
  }
}

Staging::~Staging() {
  if (pinned_ != nullptr) cudaFreeHost(pinned_);
  for (cudaEvent_t e : emptied_) {
    if (e != nullptr) cudaEventDestroy(e);
  }
}

}  // namespace krait::cuda
