#include "base/thread_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace krait {
namespace {

using Range = std::pair<int64_t, int64_t>;

std::vector<Range> ranges_of(ThreadPool& pool, int64_t n, int64_t grain) {
  std::mutex mutex;
  std::vector<Range> ranges;
  pool.parallel_for(n, grain, [&](int64_t b, int64_t e) {
    const std::lock_guard lock(mutex);
    ranges.emplace_back(b, e);
  });
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

TEST(ThreadPool, RangesCoverEverythingOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (const int64_t n : {1, 2, 7, 8, 9, 100, 1001}) {
      for (const int64_t grain : {0, 1, 3, 64, 5000}) {
        const std::vector<Range> ranges = ranges_of(pool, n, grain);
        int64_t at = 0;
        for (size_t i = 0; i < ranges.size(); ++i) {
          EXPECT_EQ(ranges[i].first, at);
          at = ranges[i].second;
          if (i + 1 < ranges.size()) {
            EXPECT_GE(ranges[i].second - ranges[i].first, grain);
          }
        }
        EXPECT_EQ(at, n) << threads << " threads, grain " << grain;
      }
    }
  }
}

TEST(ThreadPool, RangesDoNotDependOnTiming) {
  ThreadPool pool(4);
  const std::vector<Range> first = ranges_of(pool, 1000, 7);
  EXPECT_GT(first.size(), 4U);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(ranges_of(pool, 1000, 7), first);
}

TEST(ThreadPool, NothingToDo) {
  ThreadPool pool(2);
  pool.parallel_for(0, 1, [](int64_t, int64_t) { FAIL() << "called for an empty range"; });
  pool.parallel_for(-5, 1, [](int64_t, int64_t) { FAIL() << "called for a negative range"; });
}

TEST(ThreadPool, OtherThreadsTakePart) {
  ThreadPool pool(3);
  std::mutex mutex;
  std::set<std::thread::id> who;
  // Two of the three must be inside at the same time for this loop to end.
  std::atomic<int> inside{0};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  pool.parallel_for(3, 1, [&](int64_t, int64_t) {
    {
      const std::lock_guard lock(mutex);
      who.insert(std::this_thread::get_id());
    }
    inside.fetch_add(1);
    while (inside.load() < 2 && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
  });
  EXPECT_GE(who.size(), 2U);
}

// Loops follow each other at once and after pauses in which the workers go to sleep; each must see
// the results of the one before.
TEST(ThreadPool, ManyLoopsInARow) {
  ThreadPool pool(4);
  std::vector<int64_t> value(777, 0);
  constexpr int kLoops = 3000;
  for (int i = 0; i < kLoops; ++i) {
    pool.parallel_for(777, 10, [&](int64_t b, int64_t e) {
      for (int64_t k = b; k < e; ++k) value[static_cast<size_t>(776 - k)] += k;
    });
    std::reverse(value.begin(), value.end());
    if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  std::reverse(value.begin(), value.end());
  int64_t sum = 0;
  for (const int64_t v : value) sum += v;
  EXPECT_EQ(sum, int64_t{kLoops} * 777 * 776 / 2);
}

TEST(ThreadPool, ManyPoolsComeAndGo) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(1 + i % 4);
    std::atomic<int64_t> sum{0};
    if (i % 2 == 0) pool.parallel_for(10, 1, [&](int64_t b, int64_t e) { sum += e - b; });
    EXPECT_EQ(sum.load(), i % 2 == 0 ? 10 : 0);
  }
}

TEST(ThreadPool, AllCoresByDefault) { EXPECT_GE(ThreadPool(0).size(), 1); }

}  // namespace
}  // namespace krait
