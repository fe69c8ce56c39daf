#include "cli/batch_output.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>

#include "base/output_file.h"
#include "cli/console.h"

namespace krait {

namespace {

Error cannot(const char* what, const std::string& name) {
  return {ErrorKind::file, fmt::format("cannot {} {}: {}", what, name, strerror(errno))};
}

Error foreign_line(const std::string& name, int64_t number) {
  return {ErrorKind::format,
          fmt::format("{}, line {}: expected a line that krait batch has written", name, number),
          "give another -o, or --overwrite to start anew"};
}

/// Whether a line without an end may be the beginning of one that a run was writing.
bool may_be_ours(std::string_view cut) {
  const auto begins = [&](std::string_view with) {
    return cut.substr(0, with.size()) == with.substr(0, cut.size());
  };
  return begins(R"({"line":)") || begins(R"({"id":"batch_req_)");
}

}  // namespace

void LineSet::add(int64_t line) {
  const auto at = static_cast<size_t>(line);
  if (at >= bits_.size()) bits_.resize(std::max(at + 1, bits_.size() * 2));
  if (!bits_[at]) ++size_;
  bits_[at] = true;
}

bool LineSet::contains(int64_t line) const {
  return line >= 0 && line < std::ssize(bits_) && bits_[static_cast<size_t>(line)];
}

int64_t answered_line(const std::string& line) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return 0;
  constexpr int64_t kMost = int64_t{1} << 40;
  int64_t n = 0;
  if (json.contains("line") && json["line"].is_number_integer()) {
    n = json["line"].get<int64_t>();
  } else if (json.contains("id") && json["id"].is_string()) {
    constexpr std::string_view kPrefix = "batch_req_";
    const auto& id = json["id"].get_ref<const std::string&>();
    const char* end = id.data() + id.size();
    if (!id.starts_with(kPrefix)) return 0;
    const auto [at, error] = std::from_chars(id.data() + kPrefix.size(), end, n);
    if (error != std::errc() || at != end) return 0;
  }
  return n > 0 && n < kMost ? n : 0;
}

AppendFile::AppendFile(const std::string& file)
    : name_(file == "-" ? "stdout" : file), is_stdout_(file == "-") {
  if (is_stdout_) return;
  fd_ = open(file.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd_ < 0) throw cannot("write", name_);
  if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    const int why = errno;
    close(fd_);
    if (why == EWOULDBLOCK) {
      throw Error(ErrorKind::file, fmt::format("another run is writing to {}", name_),
                  "wait for it, or give another -o");
    }
    errno = why;
    throw cannot("lock", name_);
  }
  struct stat info {};
  is_regular_ = fstat(fd_, &info) == 0 && S_ISREG(info.st_mode);
}

AppendFile::~AppendFile() {
  if (fd_ >= 0) close(fd_);  // and with it the lock
}

bool AppendFile::is(const std::filesystem::path& other) const {
  struct stat mine {};
  struct stat theirs {};
  if (fstat(is_stdout_ ? STDOUT_FILENO : fd_, &mine) != 0) return false;
  if (other == "-") {
    if (fstat(STDIN_FILENO, &theirs) != 0) return false;
  } else if (stat(other.c_str(), &theirs) != 0) {
    return false;
  }
  // Two ends of a terminal or of /dev/null are no danger.
  return S_ISREG(mine.st_mode) && mine.st_dev == theirs.st_dev && mine.st_ino == theirs.st_ino;
}

LineSet AppendFile::resume() {
  LineSet done;
  if (!is_regular_) return done;
  std::ifstream in(name_, std::ios::binary);
  if (!in) throw cannot("read", name_);
  std::string line;
  off_t whole = 0;  // bytes in complete lines
  for (int64_t number = 1; std::getline(in, line); ++number) {
    if (in.eof()) {  // no line break at its end: a crash, or a full disk
      if (!may_be_ours(line)) throw foreign_line(name_, number);
      break;
    }
    const int64_t answered = answered_line(line);
    if (answered == 0) throw foreign_line(name_, number);
    done.add(answered);
    whole += static_cast<off_t>(line.size()) + 1;
  }
  if (in.bad()) throw cannot("read", name_);
  if (ftruncate(fd_, whole) != 0) throw cannot("write", name_);
  return done;
}

void AppendFile::clear() {
  if (is_regular_ && ftruncate(fd_, 0) != 0) throw cannot("write", name_);
}

void AppendFile::append(std::string_view text) {
  const std::lock_guard lock(mutex_);
  if (is_stdout_) return write_stdout(text);
  const off_t whole = lseek(fd_, 0, SEEK_END);
  while (!text.empty()) {
    const ssize_t n = ::write(fd_, text.data(), text.size());
    if (n >= 0) {
      text.remove_prefix(static_cast<size_t>(n));
    } else if (errno != EINTR) {
      const std::string reason = strerror(errno);
      // Half a line helps nobody. If this fails too, resume() removes it.
      [[maybe_unused]] const int ignored = is_regular_ ? ftruncate(fd_, whole) : 0;
      throw Error(ErrorKind::runtime, fmt::format("cannot write to {}: {}", name_, reason),
                  "the lines before are there; the same command goes on from them");
    }
  }
}

void AppendFile::sync() {
  if (is_regular_ && fsync(fd_) != 0 && errno != EINVAL) throw cannot("write", name_);
}

int64_t merge_outputs(const std::vector<std::string>& parts, const std::string& out,
                      const LineSet& wanted) {
  struct Place {
    int64_t line;
    size_t part;
    std::streamoff at;
    size_t bytes;
  };
  std::vector<Place> places;
  std::vector<std::ifstream> files;
  for (const std::string& name : parts) {
    std::ifstream& in = files.emplace_back(name, std::ios::binary);
    if (!in) throw cannot("read", name);
    std::string line;
    std::streamoff at = 0;
    for (int64_t number = 1; std::getline(in, line); ++number) {
      if (in.eof()) {
        throw Error(ErrorKind::format, fmt::format("{} ends in the middle of a line", name),
                    "its run was cut short: run the same command again, then merge");
      }
      const int64_t answered = answered_line(line);
      if (answered == 0) throw foreign_line(name, number);
      places.push_back({answered, files.size() - 1, at, line.size() + 1});
      at += static_cast<std::streamoff>(line.size()) + 1;
    }
    in.clear();
  }
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.line < b.line; });
  int64_t missing = wanted.size();
  for (size_t i = 0; i < places.size(); ++i) {
    if (wanted.contains(places[i].line)) --missing;
    if (i == 0 || places[i].line != places[i - 1].line) continue;
    throw Error(ErrorKind::format,
                fmt::format("input line {} is answered in {} and in {}", places[i].line,
                            parts[places[i - 1].part], parts[places[i].part]));
  }
  OutputFile file(out);
  std::string line;
  for (const Place& p : places) {
    line.resize(p.bytes);
    files[p.part].seekg(p.at);
    if (!files[p.part].read(line.data(), static_cast<std::streamsize>(p.bytes))) {
      throw cannot("read", parts[p.part]);
    }
    file.write(std::as_bytes(std::span(line)));
  }
  file.commit();
  return missing;
}

}  // namespace krait
