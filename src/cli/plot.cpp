#include "cli/plot.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "base/error.h"
#include "cli/version.h"

extern char** environ;

namespace krait {

namespace {

namespace fs = std::filesystem;

/// The codes with which tools/plot_bench.py ends.
constexpr int kNoMatplotlib = 3;
constexpr int kNotStarted = 127;

/// Beside the installed program, else in the source tree.
fs::path script() {
  std::error_code ec;
  const fs::path program = fs::read_symlink("/proc/self/exe", ec);
  fs::path installed = program.parent_path().parent_path() / "share" / "krait" / "plot_bench.py";
  if (!ec && fs::exists(installed, ec)) return installed;
  return fs::path(source_dir()) / "tools" / "plot_bench.py";
}

std::string python() {
  const char* chosen = std::getenv("KRAIT_PYTHON");
  return chosen != nullptr && *chosen != '\0' ? chosen : "python3";
}

/// Runs the script with `input` on its stdin; its exit code. Its stderr is ours.
int run_script(std::vector<std::string> args, std::string_view input) {
  args.insert(args.begin(), {python(), script().string()});
  std::vector<char*> argv;
  argv.reserve(args.size() + 1);
  for (std::string& a : args) argv.push_back(a.data());
  argv.push_back(nullptr);

  int ends[2] = {-1, -1};
  if (pipe2(ends, O_CLOEXEC) != 0) {
    throw Error(ErrorKind::runtime, fmt::format("--plot: pipe failed: {}", strerror(errno)));
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);  // stdout is ours alone
  pid_t child = -1;
  const int failed = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[0]);
  while (failed == 0 && !input.empty()) {
    const ssize_t n = write(ends[1], input.data(), input.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) break;  // it ended early, and its exit code says why
    input.remove_prefix(static_cast<size_t>(n));
  }
  close(ends[1]);
  if (failed != 0) return kNotStarted;
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

void require_plotting(const std::string& file) {
  const std::string extension = fs::path(file).extension().string();
  if (extension != ".png" && extension != ".svg") {
    throw Error(
        ErrorKind::usage,
        fmt::format("--plot: expected a file that ends in .png or .svg, found \"{}\"", file));
  }
  const int code = run_script({"--check"}, {});
  if (code == kNotStarted) {
    throw Error(ErrorKind::runtime, fmt::format("--plot: {} could not be started", python()),
                "drawing needs Python 3 with matplotlib; KRAIT_PYTHON names another interpreter");
  }
  if (code == kNoMatplotlib) {
    throw Error(ErrorKind::runtime, fmt::format("--plot: {} has no matplotlib", python()),
                "pip install matplotlib, or name another interpreter in KRAIT_PYTHON");
  }
  if (code != 0) {
    throw Error(ErrorKind::runtime,
                fmt::format("--plot: {} failed with exit code {}", script().string(), code));
  }
}

void plot_bench(std::string_view json, const std::string& file) {
  const int code = run_script({file}, json);
  if (code != 0) {
    throw Error(ErrorKind::runtime,
                fmt::format("--plot: {} was not drawn: {} ended with exit code {}", file,
                            script().filename().string(), code));
  }
}

}  // namespace krait
