// The command line as a whole: picks the command, catches errors once, sets the exit code.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "cli/command.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/version.h"

namespace krait {

namespace {

int report(int code, std::string_view message, std::string_view hint) {
  fmt::print(stderr, "krait: error: {}\n", message);
  if (!hint.empty()) fmt::print(stderr, "hint: {}\n", hint);
  return code;
}

/// CLI11's messages, in one line.
std::string one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

/// The words of the command line, the last one first, as CLI11 takes them.
std::vector<std::string> words(int argc, char** argv) {
  std::vector<std::string> all(argv + std::min(argc, 1), argv + argc);
  // llama-bench's -pg has two letters behind one dash, which would be read as -p g.
  if (!all.empty() && all.front() == "bench") {
    std::replace(all.begin(), all.end(), std::string("-pg"), std::string("--n-prompt-gen"));
  }
  std::reverse(all.begin(), all.end());
  return all;
}

int parse_and_run(int argc, char** argv) {
  CLI::App app("krait runs pretrained language models of the Mamba family.", "krait");
  app.set_version_flag("--version", fmt::format("krait {} ({})", version(), commit()));
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  app.footer("krait COMMAND --help lists the flags of a command.");

  CommonFlags common;
  const std::vector<Command> commands{
      add_run_command(app, common),      add_batch_command(app, common),
      add_tokenize_command(app, common), add_logits_command(app, common),
      add_inspect_command(app, common),  add_convert_command(app, common),
      add_bench_command(app, common)};

  try {
    app.parse(words(argc, argv));
  } catch (const CLI::CallForHelp&) {
    const std::vector<CLI::App*> chosen = app.get_subcommands();
    write_stdout(chosen.empty() ? app.help() : chosen.front()->help("krait"));
    return 0;
  } catch (const CLI::CallForVersion& v) {
    write_stdout(std::string(v.what()) + "\n");
    return 0;
  } catch (const CLI::ParseError& e) {
    const std::vector<CLI::App*> chosen = app.get_subcommands();
    const std::string name = chosen.empty() ? "krait" : "krait " + chosen.front()->get_name();
    std::string message = one_line(e.what());
    if (argc < 2)
      message = "a command is expected: run, batch, tokenize, logits, inspect, convert or bench";
    return report(exit_code(ErrorKind::usage), message, name + " --help lists what there is");
  }

  apply_common_flags(common);
  const auto chosen = std::find_if(commands.begin(), commands.end(),
                                   [](const Command& c) { return c.app->parsed(); });
  return chosen->run();
}

}  // namespace

int cli_main(int argc, char** argv) {
  // A reader of stdout that goes away is seen by write_stdout().
  std::signal(SIGPIPE, SIG_IGN);
  try {
    init_logging(spdlog::level::info);
    return parse_and_run(argc, argv);
  } catch (const StdoutClosed&) {
    return 0;
  } catch (const Error& e) {
    return report(exit_code(e.kind()), e.message(), e.hint());
  } catch (const std::bad_alloc&) {
    return report(exit_code(ErrorKind::device), "out of memory", "");
  } catch (const std::exception& e) {
    return report(exit_code(ErrorKind::runtime), fmt::format("internal error: {}", e.what()),
                  "this is a fault of krait: please report it with the command line");
  }
}

}  // namespace krait
