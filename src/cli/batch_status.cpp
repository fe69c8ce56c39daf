#include "cli/batch_status.h"

#include <fmt/format.h>

#include <cstdio>
#include <string>

#include "cli/console.h"

namespace krait {

BatchStatus::BatchStatus(bool enabled, int64_t n_line, const Answers& answers,
                         const std::deque<BatchProgress>& engines)
    : enabled_(enabled && stderr_is_terminal()),
      n_line_(n_line),
      answers_(answers),
      engines_(engines) {
  if (enabled_) thread_ = std::thread([this] { run(); });
}

BatchStatus::~BatchStatus() {
  if (!enabled_) return;
  {
    const std::lock_guard lock(mutex_);
    end_ = true;
  }
  changed_.notify_one();
  thread_.join();
  std::fputs("\r\x1b[K", stderr);
}

void BatchStatus::run() {
  std::unique_lock lock(mutex_);
  int64_t tokens_before = 0;
  double at_before = 0;
  double rate = 0;
  while (!changed_.wait_for(lock, std::chrono::milliseconds(500), [this] { return end_; })) {
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const int64_t done = answers_.written() + answers_.failures();
    int64_t tokens = 0;
    int64_t running = 0;
    int64_t waiting = 0;
    for (const BatchProgress& p : engines_) {
      tokens += p.prompt_tokens + p.generated_tokens;
      running += p.running;
      waiting += p.waiting;
    }
    // The last few seconds count most.
    const double now = static_cast<double>(tokens - tokens_before) / (seconds - at_before);
    rate = tokens_before == 0 ? now : 0.8 * rate + 0.2 * now;
    tokens_before = tokens;
    at_before = seconds;
    const double lines_per_second = static_cast<double>(done) / seconds;
    std::string text = "\r";
    if (n_line_ >= 0) {
      constexpr int64_t kWidth = 20;
      const int64_t filled = n_line_ == 0 ? kWidth : kWidth * done / n_line_;
      text +=
          fmt::format("[{:#<{}}{:.<{}}] {} of {}", "", filled, "", kWidth - filled, done, n_line_);
    } else {
      text += fmt::format("{} lines", done);
    }
    text += fmt::format(", {:.1f}/s", lines_per_second);
    if (n_line_ >= 0 && done > 0) {
      const auto left =
          static_cast<int64_t>(static_cast<double>(n_line_ - done) / lines_per_second);
      text += fmt::format(", {}:{:02}:{:02} left", left / 3600, left / 60 % 60, left % 60);
    }
    text += fmt::format("; {} running, {} waiting; {:.0f} tok/s\x1b[K", running, waiting, rate);
    std::fputs(text.c_str(), stderr);
    std::fflush(stderr);
  }
}

}  // namespace krait
