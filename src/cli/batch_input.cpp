#include "cli/batch_input.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace krait {

LineReader::LineReader(const std::string& file, std::function<bool()> stop)
    : name_(file == "-" ? "stdin" : file), stop_(std::move(stop)) {
  fd_ = file == "-" ? STDIN_FILENO : open(file.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info {};
  if (fd_ < 0 || fstat(fd_, &info) != 0) {
    throw Error(ErrorKind::file, fmt::format("cannot read {}: {}", name_, strerror(errno)));
  }
  if (S_ISDIR(info.st_mode)) {
    if (fd_ != STDIN_FILENO) close(fd_);
    throw Error(ErrorKind::file, fmt::format("{} is a folder, a file is expected", name_));
  }
  is_file_ = S_ISREG(info.st_mode) && fd_ != STDIN_FILENO;
}

LineReader::~LineReader() {
  if (fd_ != STDIN_FILENO) close(fd_);
}

bool LineReader::fill() {
  constexpr size_t kBlock = 1 << 16;
  buffer_.erase(0, at_);
  at_ = 0;
  pollfd waiting{fd_, POLLIN, 0};
  while (!is_file_ && poll(&waiting, 1, 100) == 0) {
    if (stop_ && stop_()) return false;
  }
  const size_t old = buffer_.size();
  buffer_.resize(old + kBlock);
  ssize_t n = 0;
  do {
    n = ::read(fd_, buffer_.data() + old, kBlock);
  } while (n < 0 && errno == EINTR);
  if (n < 0) {
    throw Error(ErrorKind::file, fmt::format("cannot read {}: {}", name_, strerror(errno)));
  }
  buffer_.resize(old + static_cast<size_t>(n));
  return n > 0;
}

bool LineReader::next(std::string& line) {
  size_t searched = at_;
  for (;;) {
    const size_t end = buffer_.find('\n', searched);
    if (end != std::string::npos) {
      line.assign(buffer_, at_, end - at_);
      at_ = end + 1;
      break;
    }
    searched = buffer_.size() - at_;  // where it goes on once fill() has moved the rest down
    if (fill()) continue;
    if (at_ == buffer_.size() || (stop_ && stop_())) return false;
    line.assign(buffer_, at_);
    at_ = buffer_.size();
    break;
  }
  if (line.ends_with('\r')) line.pop_back();
  ++number_;
  return true;
}

Shard parse_shard(const std::string& text) {
  Shard s;
  const char* end = text.data() + text.size();
  const auto [slash, error] = std::from_chars(text.data(), end, s.number);
  bool ok = error == std::errc() && slash != end && *slash == '/';
  if (ok) {
    const auto [last, of_error] = std::from_chars(slash + 1, end, s.of);
    ok = of_error == std::errc() && last == end && s.number >= 1 && s.number <= s.of;
  }
  if (!ok) {
    throw Error(ErrorKind::usage,
                fmt::format("--shard: expected I/N with I from 1 to N, found \"{}\"", text));
  }
  return s;
}

int64_t SeenIds::first_line(const std::string& id, int64_t line) {
  const XXH128_hash_t h = XXH3_128bits(id.data(), id.size());
  return lines_.try_emplace({h.low64, h.high64}, line).first->second;
}

std::optional<BatchRequest> RequestReader::read(const std::string& line, int64_t number) {
  if (automatic_ && !is_blank(line)) {
    rules_.format = guess_format(line);
    automatic_ = false;
  }
  if (rules_.format != BatchFormat::text && is_blank(line)) return std::nullopt;
  BatchRequest r = parse_batch_line(line, rules_);
  const auto bad = [&](std::string message) {
    return BadLine{std::move(message), r.id, r.has_id, r.id_is_number, r.format};
  };
  if (r.has_id) {
    const int64_t first = ids_.first_line(r.id, number);
    if (first != number) {
      throw bad(fmt::format("the id \"{}\" is that of line {} already", r.id, first));
    }
  }
  try {
    check_(r);
  } catch (const Error& e) {
    throw bad(e.message());
  }
  return r;
}

}  // namespace krait
