// krait tokenize: text to token ids, and with --decode the other way.
#include <fstream>
#include <iostream>
#include <memory>

#include "cli/command.h"
#include "cli/console.h"
#include "cli/gguf_vocabulary.h"
#include "cli/json_out.h"
#include "cli/model_source.h"

namespace krait {

namespace {

struct TokenizeFlags {
  ModelFlags model;
  PromptFlags prompt;
  std::string jsonl;
  bool decode = false;
  bool special = false;
  bool json = false;
};

/// Opens the tokenizer alone: no weights are read.
std::unique_ptr<Tokenizer> open(const ModelFlags& flags) {
  if (!flags.tokenizer.empty()) return open_tokenizer(flags.tokenizer);
  // MODEL may be a tokenizer's own file, or a folder without a config.
  std::error_code ec;
  const std::filesystem::path path = flags.model;
  if (path.filename() == "tokenizer.json" || path.extension() == ".model") {
    return open_tokenizer(path);
  }
  if (std::filesystem::is_directory(path, ec) && !std::filesystem::exists(config_file(path), ec)) {
    return open_tokenizer(path);
  }
  const ModelSource source = find_model(flags.model);
  std::unique_ptr<Tokenizer> tokenizer;
  if (source.gguf) {
    const auto checkpoint = open_checkpoint(source.checkpoint);
    tokenizer = gguf_tokenizer(*checkpoint->metadata());
  } else {
    tokenizer = find_tokenizer(source, read_config(config_file(source.folder)), nullptr, {});
  }
  if (!tokenizer) {
    throw Error(ErrorKind::file, fmt::format("{} has no tokenizer", source.name),
                "give one with --tokenizer PATH");
  }
  return tokenizer;
}

std::string join(const std::vector<int32_t>& ids) {
  return fmt::format("{}\n", fmt::join(ids, ","));
}

/// Lines {"text": ...} come back with "ids"; with --decode, lines with "ids" come back with "text".
/// Other keys stay.
void tokenize_lines(const TokenizeFlags& flags, const Tokenizer& tokenizer) {
  std::ifstream file;
  if (flags.jsonl != "-") {
    file.open(flags.jsonl, std::ios::binary);
    if (!file) throw Error(ErrorKind::file, fmt::format("cannot read {}", flags.jsonl));
  }
  std::istream& in = flags.jsonl == "-" ? std::cin : file;
  constexpr size_t kBlock = 1 << 16;
  std::string out;
  std::string line;
  for (int64_t number = 1; std::getline(in, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    OrderedJson object = OrderedJson::parse(line, nullptr, /*allow_exceptions=*/false);
    const auto fail = [&](std::string_view expected) {
      throw Error(ErrorKind::format,
                  fmt::format("{}, line {}: expected {}", flags.jsonl, number, expected));
    };
    if (flags.decode) {
      if (!object.is_object() || !object.contains("ids") || !object["ids"].is_array()) {
        fail("an object with a list \"ids\"");
      }
      std::vector<int32_t> ids;
      for (const auto& id : object["ids"]) {
        if (!id.is_number_integer() || id < 0 || id > INT32_MAX) fail("whole numbers in \"ids\"");
        ids.push_back(id.get<int32_t>());
      }
      object["text"] = tokenizer.decode(ids, flags.special);
    } else {
      if (!object.is_object() || !object.contains("text") || !object["text"].is_string()) {
        fail("an object with a string \"text\"");
      }
      object["ids"] = tokenizer.encode(object["text"].get_ref<const std::string&>(),
                                       {.add_special = flags.special});
    }
    out += dump_json(object);
    if (out.size() >= kBlock) {
      write_stdout(out);
      out.clear();
    }
  }
  if (in.bad()) throw Error(ErrorKind::file, fmt::format("cannot read {}", flags.jsonl));
  write_stdout(out);
}

int tokenize(const TokenizeFlags& flags) {
  if (!flags.jsonl.empty()) {
    if (flags.prompt.given()) {
      throw Error(ErrorKind::usage, "--jsonl and another text exclude each other");
    }
    tokenize_lines(flags, *open(flags.model));
    return 0;
  }
  Prompt prompt = flags.prompt.read();
  const auto tokenizer = open(flags.model);
  if (flags.decode) {
    const std::vector<int32_t> ids = prompt.text ? parse_ids(*prompt.text) : prompt.ids;
    const std::string text = tokenizer->decode(ids, flags.special);
    if (flags.json) {
      write_stdout(dump_json({{"ids", ids}, {"text", text}}));
    } else {
      write_stdout(text);
      if (stdout_is_terminal() && !text.ends_with('\n')) write_stdout("\n");
    }
    return 0;
  }
  if (!prompt.text) {
    throw Error(ErrorKind::usage, "--ids are ids already", "--decode turns them into text");
  }
  const std::vector<int32_t> ids = tokenizer->encode(*prompt.text, {.add_special = flags.special});
  if (flags.json) {
    OrderedJson tokens = OrderedJson::array();
    for (const int32_t id : ids) tokens.push_back(tokenizer->token_text(id));
    write_stdout(dump_json({{"text", *prompt.text}, {"ids", ids}, {"tokens", tokens}}));
  } else {
    write_stdout(join(ids));
  }
  return 0;
}

}  // namespace

Command add_tokenize_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub = app.add_subcommand("tokenize", "Text to token ids, or back with --decode");
  auto flags = std::make_shared<TokenizeFlags>();
  flags->prompt.add(*sub, /*positional=*/true, /*trim=*/false);
  with_env(
      sub->add_option("--jsonl", flags->jsonl,
                      "Lines {\"text\": ...} from a file (- for stdin), written back with ids"))
      ->type_name("FILE");
  with_env(sub->add_flag("--decode", flags->decode, "Ids to text"));
  with_env(sub->add_flag("--special", flags->special,
                         "Add the special tokens of a prompt; with --decode, show them"));
  with_env(sub->add_flag("--json", flags->json, "One JSON object with text, ids and tokens"));
  add_model_flags(*sub, flags->model);
  add_common_flags(*sub, common);
  return {sub, [flags] { return tokenize(*flags); }};
}

}  // namespace krait
