// The progress of a batch, for the person in front of it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

#include "cli/batch_queue.h"
#include "runtime/continuous.h"

namespace krait {

/// A line on stderr while the run lasts: how far it is, how fast, how full.
class BatchStatus {
 public:
  BatchStatus(bool enabled, int64_t n_line, const Answers& answers,
              const std::deque<BatchProgress>& engines);
  ~BatchStatus();
  BatchStatus(const BatchStatus&) = delete;
  BatchStatus& operator=(const BatchStatus&) = delete;

 private:
  void run();

  bool enabled_;
  int64_t n_line_;
  const Answers& answers_;
  const std::deque<BatchProgress>& engines_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::mutex mutex_;
  std::condition_variable changed_;
  bool end_ = false;
  std::thread thread_;
};

}  // namespace krait
