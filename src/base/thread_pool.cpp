#include "base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace krait {

namespace {

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 50 µs of waiting before a thread sleeps: longer than the gaps between the loops of a decode
// step, much shorter than the pause between two tokens that a human would notice.
constexpr int kSpins = 2000;

// Ranges per thread. More than one, so that a thread that lost its core does not hold up the rest.
constexpr int64_t kRangesPerThread = 4;

}  // namespace

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int n = sched_getaffinity(0, sizeof(set), &set) == 0
              ? CPU_COUNT(&set)
              : static_cast<int>(std::thread::hardware_concurrency());
  std::ifstream cpu_max("/sys/fs/cgroup/cpu.max");  // "quota period" in microseconds, or "max ..."
  double quota = 0;
  double period = 0;
  if (cpu_max >> quota >> period && period > 0) {
    n = std::min(n, static_cast<int>(std::lround(quota / period)));
  }
  return std::max(n, 1);
}

// A loop is open while `generation` is odd. A worker joins by raising `active` and looking again:
// the caller closes the loop first and then waits for `active` to fall to zero, so whoever saw the
// loop open has finished before the caller returns, and whoever slept through it never looks at it.
struct ThreadPool::Impl {
  alignas(64) std::atomic<uint32_t> generation{0};
  alignas(64) std::atomic<int> active{0};
  alignas(64) std::atomic<int64_t> next{0};  ///< first index not yet taken
  std::atomic<bool> stop{false};

  int64_t n = 0;
  int64_t range = 0;
  void (*body)(void*, int64_t, int64_t) = nullptr;
  void* context = nullptr;
  std::vector<std::thread> workers;

  void take_ranges() {
    for (;;) {
      const int64_t begin = next.fetch_add(range, std::memory_order_relaxed);
      if (begin >= n) return;
      body(context, begin, std::min(begin + range, n));
    }
  }

  void work() {
    uint32_t done = 0;  // the generation this worker last took part in
    for (;;) {
      uint32_t g = generation.load();
      for (int i = 0; i < kSpins && (g % 2 == 0 || g == done); ++i) {
        relax();
        g = generation.load();
      }
      // After the load of g: a stop that this misses changes the generation, so wait() returns.
      if (stop.load()) return;
      if (g % 2 == 0 || g == done) {
        generation.wait(g);
      } else {
        active.fetch_add(1);
        g = generation.load();
        if (g % 2 == 1) take_ranges();
        active.fetch_sub(1);
        done = g;
      }
    }
  }
};

ThreadPool::ThreadPool(int n_threads) : impl_(std::make_unique<Impl>()) {
  const int n = n_threads > 0 ? n_threads : usable_cores();
  for (int i = 1; i < n; ++i) impl_->workers.emplace_back([this] { impl_->work(); });
}

ThreadPool::~ThreadPool() {
  impl_->stop.store(true);
  impl_->generation.fetch_add(2);
  impl_->generation.notify_all();
  for (std::thread& t : impl_->workers) t.join();
}

int ThreadPool::size() const noexcept { return static_cast<int>(impl_->workers.size()) + 1; }

void ThreadPool::run(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                     void* context) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t ranges = std::min(n / grain, size() * kRangesPerThread);
  if (size() == 1 || ranges <= 1) {
    body(context, 0, n);
    return;
  }
  Impl& p = *impl_;
  p.n = n;
  p.range = (n + ranges - 1) / ranges;
  p.body = body;
  p.context = context;
  p.next.store(0, std::memory_order_relaxed);
  p.generation.fetch_add(1);
  p.generation.notify_all();
  p.take_ranges();
  p.generation.fetch_add(1);
  while (p.active.load() != 0) relax();
}

}  // namespace krait
