// Helpers shared by the tests: paths of test data, a scratch folder, running the built program, and
// the comparer of tensors.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"

namespace krait::test {

[[nodiscard]] std::filesystem::path data_dir();    ///< tests/data
[[nodiscard]] std::filesystem::path models_dir();  ///< models/

/// A folder of its own, removed with the object.
class ScratchDir {
 public:
  ScratchDir();
  ~ScratchDir();
  ScratchDir(const ScratchDir&) = delete;
  ScratchDir& operator=(const ScratchDir&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

void write_file(const std::filesystem::path& file, std::string_view bytes);
[[nodiscard]] std::string read_file(const std::filesystem::path& file);

struct RunResult {
  int exit_code = -1;  ///< 128 + signal when killed
  std::string out;
  std::string err;
};
/// Runs the built `krait` with `args`, `input` on stdin and `env` added to the environment.
[[nodiscard]] RunResult run_krait(const std::vector<std::string>& args,
                                  const std::string& input = {},
                                  const std::map<std::string, std::string>& env = {});

/// How far `got` is from `want`. The pass condition is written so that NaN fails.
struct Comparison {
  double max_abs = 0;   ///< largest |got - want|; NaN if any element is
  double want_std = 0;  ///< standard deviation of `want`
  double nmse = 0;      ///< sum (got - want)^2 / sum want^2
  int64_t worst = -1;   ///< index of the largest error
  std::string text;     ///< for messages
};
[[nodiscard]] Comparison compare(std::span<const float> got, std::span<const float> want);

/// Passes if every |got - want| <= limit * std(want) (limit relative to the spread of the
/// reference).
[[nodiscard]] ::testing::AssertionResult near_std(std::span<const float> got,
                                                  std::span<const float> want, double limit);

/// Passes if `f` throws krait::Error of this kind whose message contains `part`.
template <typename F>
[[nodiscard]] ::testing::AssertionResult throws(ErrorKind kind, const std::string& part, F&& f) {
  try {
    f();
  } catch (const Error& e) {
    if (e.kind() != kind || e.message().find(part) == std::string::npos) {
      return ::testing::AssertionFailure()
             << "error of kind " << static_cast<int>(e.kind()) << ": " << e.message();
    }
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "no error was thrown";
}

}  // namespace krait::test
