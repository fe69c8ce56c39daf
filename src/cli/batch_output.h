// The output of a batch: a file that grows line by line and is never lost. It is locked against a
// second run; a last line that a crash cut short is removed when the run resumes; a write that
// fails takes its part of a line back.
#pragma once

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace krait {

/// A set of line numbers, a bit each.
class LineSet {
 public:
  void add(int64_t line);
  [[nodiscard]] bool contains(int64_t line) const;
  [[nodiscard]] int64_t size() const noexcept { return size_; }

 private:
  std::vector<bool> bits_;
  int64_t size_ = 0;
};

class AppendFile {
 public:
  /// `-` is stdout, which is neither locked nor resumed. Errors: file (cannot be opened; another
  /// run holds the lock).
  explicit AppendFile(const std::string& file);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  /// The input lines that the file's lines answer (answered_line()). Removes a last line without an
  /// end. Errors: format (a line that no run has written).
  [[nodiscard]] LineSet resume();

  /// Removes all lines.
  void clear();

  /// Appends text, which ends with a line break, as one. May be called by several threads. Errors:
  /// runtime (the disk is full, ...).
  void append(std::string_view text);
  /// Waits until everything is on the disk.
  void sync();

  /// False for stdout, pipes and devices, which are neither resumed nor accompanied.
  [[nodiscard]] bool is_regular() const noexcept { return is_regular_; }
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  /// True if this is the file `other`.
  [[nodiscard]] bool is(const std::filesystem::path& other) const;

 private:
  std::string name_;
  int fd_ = -1;
  bool is_stdout_ = false;
  bool is_regular_ = false;
  std::mutex mutex_;
};

/// The input line that an output line answers: its "line", or the number in "batch_req_N". 0: none.
[[nodiscard]] int64_t answered_line(const std::string& line);

/// Joins the outputs of shards into `out`, in the order of the input lines, each once. Returns how
/// many of the input lines `wanted` none of them answers. Errors: file,
/// format (a line that no run has written, or one that is answered twice).
int64_t merge_outputs(const std::vector<std::string>& parts, const std::string& out,
                      const LineSet& wanted);

}  // namespace krait
