// What lies between the reader of a batch, its engines and its files: the queue of jobs, and the
// answers on their way to the disk. Both are used by several threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "cli/batch_answer.h"
#include "cli/batch_flags.h"
#include "cli/batch_output.h"
#include "runtime/continuous.h"

namespace krait {

/// The output and the error file, and the order of lines where it matters.
class Answers {
 public:
  /// Opens and locks the files. Errors: usage (one of them is the input, or both are one), file.
  explicit Answers(const BatchFlags& flags);

  /// Takes up what an earlier run has answered, which is not asked again; with --overwrite, removes
  /// it.
  void resume();
  [[nodiscard]] bool is_done(int64_t line) const;
  [[nodiscard]] int64_t n_done_before() const { return done_.size() + failed_.size(); }
  [[nodiscard]] int64_t n_failed_before() const { return failed_.size(); }

  /// In the order in which answers are to be written. Waits while too many are held back behind one
  /// that takes long, unless `stop`.
  void expect(int64_t line, const std::function<bool()>& stop);

  /// `text` is a whole line.
  void write(int64_t line, std::string text);
  void write_failure(int64_t line, std::string text);

  [[nodiscard]] int64_t written() const { return written_; }
  [[nodiscard]] int64_t failures() const { return failures_; }

  /// Waits for the disk; an error file without errors is removed.
  void sync();
  [[nodiscard]] std::string errors_name() const { return errors_ ? errors_->name() : out_.name(); }

 private:
  static void require_other_file(const AppendFile& file, const std::string& input);

  /// Writes the held answers whose turn it is.
  void flush();

  bool ordered_;
  bool overwrite_;
  AppendFile out_;
  std::optional<AppendFile> errors_;
  LineSet done_;
  LineSet failed_;
  std::atomic<int64_t> written_ = 0;
  std::atomic<int64_t> failures_ = 0;
  std::mutex mutex_;
  std::condition_variable room_;
  std::deque<int64_t> expected_;         ///< lines asked, not yet written
  std::map<int64_t, std::string> held_;  ///< answers that wait for an earlier one
};

/// The queue between the reader and the engines, with what is known of the jobs in them.
class JobQueue : public BatchJobs {
 public:
  explicit JobQueue(size_t room) : room_(room) {}

  [[nodiscard]] std::optional<BatchJob> take(bool wait) override;

  /// Waits for room. False when nobody takes jobs any more.
  [[nodiscard]] bool put(Asked asked, BatchJob job);

  /// No more jobs come.
  void close();
  /// Somebody failed: everybody ends.
  void stop(std::exception_ptr error);
  [[nodiscard]] bool stopping() const;
  /// The failure, if somebody stopped.
  void rethrow() const;

  /// Who asked for job `key`; once.
  Asked answered(int64_t key);

 private:
  size_t room_;
  std::mutex mutex_;
  std::condition_variable filled_;
  std::condition_variable emptied_;
  std::deque<BatchJob> jobs_;
  std::unordered_map<int64_t, Asked> asked_;
  bool closed_ = false;
  std::atomic<bool> stopped_ = false;
  std::exception_ptr error_;
};

}  // namespace krait
