// What the tests of the commands share: models in the tree, and a child process that is talked to
// while it runs.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/test_support.h"

namespace krait::test {

using Args = std::vector<std::string>;
using Json = nlohmann::json;

inline std::string golden(const std::string& name) {
  return (data_dir() / "golden" / "models" / name).string();
}

inline std::string neox_tokenizer() {
  return (models_dir() / "gpt-neox-20b" / "tokenizer.json").string();
}

/// 512 ids, no tokenizer: the quickest model to open.
inline std::string tiny() { return golden("mamba1-hf"); }

inline Args operator+(Args a, const Args& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// `krait run` on ids of the tiny model, printing ids, greedy unless `more` says otherwise.
inline Args run_ids(const Args& more = {}) {
  return Args{"run", "-m", tiny(), "--ids", "5,6,7", "--print-ids"} + more;
}

/// `krait run` with text: random weights under a real tokenizer.
inline Args run_text(const Args& more = {}) {
  return Args{"run", "-m", golden("mamba1-neox-vocab"), "--tokenizer", neox_tokenizer()} + more;
}

/// A copy of a golden model whose files may be changed.
inline std::filesystem::path copy_model(const ScratchDir& to,
                                        const std::string& name = "mamba1-hf") {
  const std::filesystem::path folder = to.path() / name;
  std::filesystem::create_directory(folder);
  for (const auto& entry : std::filesystem::directory_iterator(golden(name))) {
    if (entry.path().filename() == "expected.safetensors") continue;
    const auto copy = folder / entry.path().filename();
    std::filesystem::copy_file(entry.path(), copy);
    std::filesystem::permissions(copy, std::filesystem::perms::owner_write,
                                 std::filesystem::perm_options::add);
  }
  return folder;
}

/// A running krait whose stdout and stderr are one end of a pipe or of a terminal.
class Child {
 public:
  enum class Kind { pipe, terminal };
  Child(const Args& args, Kind kind) {
    int out[2] = {-1, -1};
    if (kind == Kind::terminal) {
      if (openpty(&out[0], &out[1], nullptr, nullptr, nullptr) != 0)
        throw std::runtime_error("openpty");
    } else if (pipe(out) != 0) {
      throw std::runtime_error("pipe");
    }
    pid_ = fork();
    if (pid_ == 0) {
      const int null = open("/dev/null", O_RDWR);
      dup2(null, 0);
      dup2(out[1], 1);
      dup2(kind == Kind::terminal ? out[1] : null, 2);
      close(out[0]);
      close(out[1]);
      const char* moved = std::getenv("KRAIT_TEST_PROGRAM");
      Args words = Args{moved != nullptr ? moved : KRAIT_TEST_PROGRAM} + args;
      std::vector<char*> argv;
      for (std::string& w : words) argv.push_back(w.data());
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(out[1]);
    fd_ = out[0];
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() {
    close_output();
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }

  /// What can be read now, waiting for something to come; empty at the end.
  std::string read_some() {
    std::string text(1 << 16, '\0');
    const ssize_t n = ::read(fd_, text.data(), text.size());
    text.resize(n > 0 ? static_cast<size_t>(n) : 0);  // a terminal ends with EIO
    return text;
  }
  std::string read_all() {
    std::string all;
    for (std::string s = read_some(); !s.empty(); s = read_some()) all += s;
    return all;
  }
  void interrupt() const { kill(pid_, SIGINT); }
  void close_output() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  /// The exit code, or 128 + signal.
  int wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

 private:
  pid_t pid_ = -1;
  int fd_ = -1;
};

}  // namespace krait::test
