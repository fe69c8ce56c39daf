// A fixed set of threads for data-parallel loops inside one verb. Waiting threads spin briefly,
// then sleep: a decode step of a small model is made of loops of a few microseconds.
#pragma once

#include <cstdint>
#include <memory>

namespace krait {

/// Cores this process may use: those of its affinity mask, and no more than its cgroup pays for.
[[nodiscard]] int usable_cores();

class ThreadPool {
 public:
  /// `n_threads` counts the caller, who works too. 0: the number of cores this process may use.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  [[nodiscard]] int size() const noexcept;

  /// Calls f(begin, end) for disjoint ranges that cover [0, n), each at least `grain` long but the
  /// last, and returns when all are done. The ranges never depend on timing. f must not throw.
  template <typename F>
  void parallel_for(int64_t n, int64_t grain, F&& f) {
    run(
        n, grain, [](void* c, int64_t b, int64_t e) { (*static_cast<F*>(c))(b, e); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  void run(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace krait
