#include "support/test_support.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>

namespace krait::test {

namespace fs = std::filesystem;

fs::path data_dir() {
  // The packaged tests carry their data beside them.
  const char* moved = std::getenv("KRAIT_TEST_DATA");
  return moved != nullptr ? moved : KRAIT_TEST_DATA;
}

fs::path models_dir() {
  const char* moved = std::getenv("KRAIT_TEST_MODELS");
  return moved != nullptr ? moved : KRAIT_TEST_MODELS;
}

ScratchDir::ScratchDir() {
  std::string name = (fs::temp_directory_path() / "krait-test-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = name;
}

ScratchDir::~ScratchDir() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

void write_file(const fs::path& file, std::string_view bytes) {
  std::ofstream out(file, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) throw std::runtime_error("cannot write " + file.string());
}

std::string read_file(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + file.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

RunResult run_krait(const std::vector<std::string>& args, const std::string& input,
                    const std::map<std::string, std::string>& env) {
  // Streams go through files: no deadlock however much either side writes.
  const ScratchDir dir;
  write_file(dir.path() / "in", input);
  const char* moved = std::getenv("KRAIT_TEST_PROGRAM");
  std::vector<std::string> words{moved != nullptr ? moved : KRAIT_TEST_PROGRAM};
  words.insert(words.end(), args.begin(), args.end());

  const pid_t child = fork();
  if (child == 0) {
    const auto redirect = [&](const char* name, int flags, int to) {
      const int fd = open((dir.path() / name).c_str(), flags, 0600);
      if (fd < 0 || dup2(fd, to) < 0) _exit(126);
      close(fd);
    };
    redirect("in", O_RDONLY, 0);
    redirect("out", O_WRONLY | O_CREAT, 1);
    redirect("err", O_WRONLY | O_CREAT, 2);
    for (const auto& [key, value] : env) setenv(key.c_str(), value.c_str(), 1);
    std::vector<char*> argv;
    for (std::string& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  RunResult r;
  r.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  r.out = read_file(dir.path() / "out");
  r.err = read_file(dir.path() / "err");
  return r;
}

Comparison compare(std::span<const float> got, std::span<const float> want) {
  Comparison c;
  if (got.size() != want.size() || want.empty()) {
    c.max_abs = c.nmse = std::nan("");
    c.text = fmt::format("sizes differ or are zero: {} against {}", got.size(), want.size());
    return c;
  }
  double sum = 0;
  double sum2 = 0;
  double err2 = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double w = want[i];
    const double e = std::abs(static_cast<double>(got[i]) - w);
    sum += w;
    sum2 += w * w;
    err2 += e * e;
    if (!(e <= c.max_abs) && !std::isnan(c.max_abs)) {
      c.max_abs = e;
      c.worst = static_cast<int64_t>(i);
    }
  }
  const auto n = static_cast<double>(want.size());
  c.want_std = std::sqrt(std::max(0.0, sum2 / n - (sum / n) * (sum / n)));
  c.nmse = err2 / sum2;
  const auto w = static_cast<size_t>(std::max<int64_t>(c.worst, 0));
  c.text = fmt::format(
      "largest error {:.3g} ({:.3g} of the standard deviation {:.3g}) at {}: got {}, want {}; nmse "
      "{:.3g}",
      c.max_abs, c.max_abs / c.want_std, c.want_std, w, got[w], want[w], c.nmse);
  return c;
}

::testing::AssertionResult near_std(std::span<const float> got, std::span<const float> want,
                                    double limit) {
  const Comparison c = compare(got, want);
  if (c.max_abs <= limit * c.want_std) return ::testing::AssertionSuccess() << c.text;
  return ::testing::AssertionFailure()
         << c.text << "; limit " << limit << " of the standard deviation";
}

}  // namespace krait::test
