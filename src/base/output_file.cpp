#include "base/output_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace krait {

OutputFile::OutputFile(std::filesystem::path file) : file_(std::move(file)) {
  // O_EXCL and a counter rather than mkstemp, whose 0600 would ignore the user's umask.
  constexpr int kTries = 1000;
  for (int i = 0; i < kTries && fd_ < 0; ++i) {
    temporary_ = file_;
    temporary_ += fmt::format(".part-{}-{}", getpid(), i);
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0 && errno != EEXIST) break;
  }
  if (fd_ < 0) fail("cannot write");
}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_.c_str());
}

void OutputFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      fail("cannot write");
    }
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void OutputFile::commit() {
  // fsync before rename: after a power cut the name must not point to an empty file.
  if (fsync(fd_) != 0) fail("cannot write");
  if (rename(temporary_.c_str(), file_.c_str()) != 0) fail("cannot rename the temporary file to");
  close(std::exchange(fd_, -1));
  const std::filesystem::path folder = file_.has_parent_path() ? file_.parent_path() : ".";
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) {
    fsync(fd);  // makes the rename itself durable; some file systems refuse, and that is no error
    close(fd);
  }
}

void OutputFile::fail(const char* what) const {
  throw Error(ErrorKind::file, fmt::format("{} {}: {}", what, file_.string(), strerror(errno)));
}

}  // namespace krait
