#include "tokenizer/special_names.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "base/error.h"
#include "tokenizer/json_node.h"

namespace krait {

namespace fs = std::filesystem;

namespace {

/// A token stands as its text or as an object with the text under "content".
std::optional<std::string> read_name(const JsonNode& config, std::string_view key) {
  if (!config.has(key)) return std::nullopt;
  const JsonNode token = config.at(key);
  return token.value().is_object() ? token.string("content") : token.string();
}

}  // namespace

std::string read_tokenizer_file(const fs::path& file) {
  std::error_code error;
  if (fs::is_directory(file, error)) {
    throw Error(ErrorKind::file, fmt::format("{} is a folder, expected a file", file.string()));
  }
  std::ifstream in(file, std::ios::binary);
  if (!in) {
    throw Error(ErrorKind::file,
                fmt::format("{} cannot be read: {}", file.string(), std::strerror(errno)));
  }
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  if (in.bad()) {
    throw Error(ErrorKind::file, fmt::format("{} cannot be read to its end", file.string()));
  }
  return bytes;
}

SpecialNames read_special_names(const fs::path& folder) {
  SpecialNames names;
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const fs::path file = folder / name;
    std::error_code error;
    if (!fs::is_regular_file(file, error)) continue;
    names.found = true;
    const auto json = parse_json(read_tokenizer_file(file), file.string());
    const JsonNode config(json, file.string());
    config.expect_object();
    if (!names.bos) names.bos = read_name(config, "bos_token");
    if (!names.eos) names.eos = read_name(config, "eos_token");
    if (!names.add_bos && config.has("add_bos_token")) {
      names.add_bos = config.at("add_bos_token").boolean();
    }
    if (!names.add_eos && config.has("add_eos_token")) {
      names.add_eos = config.at("add_eos_token").boolean();
    }
  }
  return names;
}

}  // namespace krait
