// What the plain and the fast CPU backend share: memory, weights, the mailbox of sampled tokens.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/ops.h"

namespace krait {

class CpuOps : public Ops {
 public:
  explicit CpuOps(int n_threads) : pool_(n_threads) {}

  [[nodiscard]] std::string_view backend() const override { return "cpu"; }
  [[nodiscard]] DeviceInfo info() const override;
  [[nodiscard]] DType activation_dtype(DType) const override { return DType::f32; }

  [[nodiscard]] Buffer allocate(size_t bytes, std::string_view what) override;
  void upload(void* dst, const void* src, size_t bytes) override;
  void download(void* dst, const void* src, size_t bytes) override;
  void copy(void* dst, const void* src, size_t bytes) override;
  void zero(void* dst, size_t bytes) override;
  void synchronize() override {}

  [[nodiscard]] Tensor import_weight(const Tensor& host, DType dtype) override;
  void weights_ready() override {}

  void receive(std::span<int32_t> tokens) override;

  [[nodiscard]] double seconds(const std::function<void()>& work) override;
  void stream_copy(void* dst, const void* src, size_t bytes) override;
  void stream_read(void* sum, const void* src, size_t bytes) override;

 protected:
  /// Puts the tokens of one sample call into the mailbox.
  void post(std::vector<int32_t> tokens);

  ThreadPool pool_;
  std::string vectors_ = "plain";  ///< what the verbs are built for, as info() reports it

 private:
  std::vector<Buffer> weights_;               // converted copies
  std::deque<std::vector<int32_t>> mailbox_;  // oldest first
};

}  // namespace krait
