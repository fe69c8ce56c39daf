// OutputFile writes a file under a temporary name beside its place and renames it when it is
// complete: a reader sees the old file or the whole new one, and a failure leaves nothing behind.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace krait {

class OutputFile {
 public:
  /// Errors of kind file, here and below: the folder is missing or not writable, the disk is full.
  explicit OutputFile(std::filesystem::path file);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();  ///< removes the temporary file unless commit() returned

  void write(std::span<const std::byte> bytes);
  /// Flushes to the disk and puts the file in its place.
  void commit();

 private:
  [[noreturn]] void fail(const char* what) const;

  std::filesystem::path file_;
  std::filesystem::path temporary_;
  int fd_ = -1;
};

}  // namespace krait
