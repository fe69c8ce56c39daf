// The streams of the program: stdout carries the result alone, written at once; everything for the
// person in front of it goes to stderr.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>

namespace krait {

/// Thrown when the reader of stdout has gone (`krait run | head -1`): the program ends quietly.
struct StdoutClosed {};

/// Writes all of `text` to stdout before it returns. Errors: runtime (the disk is full, ...).
void write_stdout(std::string_view text);

[[nodiscard]] bool stdout_is_terminal();
[[nodiscard]] bool stderr_is_terminal();

/// While one of these lives, the first Ctrl-C or SIGTERM sets requested() and the second ends the
/// program.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  [[nodiscard]] static bool requested() noexcept;
};

/// A line on stderr that shows how far a long step has come. It appears when the step has taken
/// over a second, only on a terminal, and is wiped at the end.
class ProgressBar {
 public:
  ProgressBar(std::string label, bool enabled);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  void update(size_t done, size_t total);  ///< in bytes

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_;
  bool enabled_;
  bool drawn_ = false;
  Clock::time_point start_;
  Clock::time_point last_;
};

/// "438 kB", "61 MB", "2.77 GB": powers of ten, as disks and memory bandwidth are given.
[[nodiscard]] std::string human_bytes(size_t bytes);

}  // namespace krait
