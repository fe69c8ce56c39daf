// What each command's file gives to cli.cpp: its flags, and what it does.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

#include "cli/options.h"

namespace krait {

struct Command {
  CLI::App* app = nullptr;
  std::function<int()> run;  ///< returns the exit code, throws Error
};

inline constexpr int kExitInterrupted = 130;

[[nodiscard]] Command add_run_command(CLI::App& app, CommonFlags& common);
[[nodiscard]] Command add_batch_command(CLI::App& app, CommonFlags& common);
[[nodiscard]] Command add_tokenize_command(CLI::App& app, CommonFlags& common);
[[nodiscard]] Command add_logits_command(CLI::App& app, CommonFlags& common);
[[nodiscard]] Command add_inspect_command(CLI::App& app, CommonFlags& common);
[[nodiscard]] Command add_convert_command(CLI::App& app, CommonFlags& common);
[[nodiscard]] Command add_bench_command(CLI::App& app, CommonFlags& common);

}  // namespace krait
