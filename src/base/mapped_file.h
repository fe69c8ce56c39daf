// MappedFile is a whole file mapped read-only into memory. Pages are read by the kernel when they
// are first touched, so opening costs nothing whatever the size.
//
// A file that another process cuts short while it is mapped ends this process with SIGBUS, as with
// any mapping; writers that rename a finished file into place (OutputFile) are safe.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace krait {

class MappedFile {
 public:
  MappedFile() = default;
  /// Errors of kind file: missing, unreadable, not a regular file.
  explicit MappedFile(const std::filesystem::path& file);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  /// Valid as long as this object or the one it was moved into.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace krait
