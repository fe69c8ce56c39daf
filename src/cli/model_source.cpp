#include "cli/model_source.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <cstdlib>
#include <fstream>
#include <vector>

#include "base/error.h"
#include "cli/gguf_vocabulary.h"
#include "cli/version.h"
#include "model/gguf.h"

namespace krait {

namespace fs = std::filesystem;

namespace {

/// The folder in models/ that is used without -m.
constexpr const char* kDefaultModel = "hognose";

/// Vocabularies are padded up to a multiple of at most this many rows, so a model that belongs to a
/// tokenizer has that many ids or up to this many more.
constexpr int64_t kLargestPadding = 128;

bool is_there(const fs::path& path) {
  std::error_code ec;
  return fs::exists(path, ec);
}

bool is_folder(const fs::path& path) {
  std::error_code ec;
  return fs::is_directory(path, ec);
}

std::optional<fs::path> environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? std::nullopt : std::optional<fs::path>(value);
}

/// Where huggingface_hub keeps its snapshots.
fs::path hub_cache() {
  if (const auto hub = environment("HF_HUB_CACHE")) return *hub;
  if (const auto home = environment("HF_HOME")) return *home / "hub";
  if (const auto xdg = environment("XDG_CACHE_HOME")) return *xdg / "huggingface" / "hub";
  return environment("HOME").value_or(".") / ".cache" / "huggingface" / "hub";
}

bool looks_like_hub_name(const std::string& name) {
  const size_t slash = name.find('/');
  return slash != std::string::npos && slash > 0 && slash + 1 < name.size() &&
         name.find('/', slash + 1) == std::string::npos && name[0] != '.' && name[0] != '~' &&
         name[slash + 1] != '.';
}

/// models--org--name/snapshots/<commit>, with the commit of the branch main.
std::optional<fs::path> find_snapshot(const std::string& name) {
  std::string folder = "models--" + name;
  folder.replace(folder.find('/'), 1, "--");
  const fs::path repository = hub_cache() / folder;
  std::ifstream ref(repository / "refs" / "main");
  std::string commit;
  if (ref >> commit && commit.find('/') == std::string::npos && commit[0] != '.') {
    const fs::path snapshot = repository / "snapshots" / commit;
    if (is_folder(snapshot)) return snapshot;
  }
  // Fetched by commit, so that there is no branch: take it if there is one only.
  std::vector<fs::path> snapshots;
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(repository / "snapshots", ec)) {
    if (entry.is_directory(ec)) snapshots.push_back(entry.path());
  }
  return snapshots.size() == 1 ? std::optional(snapshots.front()) : std::nullopt;
}

ModelSource require_config(ModelSource source) {
  if (!is_there(config_file(source.folder))) {
    throw Error(ErrorKind::file,
                fmt::format("{}: expected a config.json (or Mistral's "
                            "params.json) in {}, found none",
                            source.name, source.folder.string()),
                "a model is a folder with config.json and its weights, as downloaded from the "
                "Hugging Face hub");
  }
  return source;
}

}  // namespace

fs::path shipped_models() {
  std::error_code ec;
  const fs::path program = fs::read_symlink("/proc/self/exe", ec);
  if (!ec) {
    fs::path installed = program.parent_path().parent_path() / "share" / "krait" / "models";
    if (is_folder(installed)) return installed;
  }
  return fs::path(source_dir()) / "models";
}

ModelSource find_model(const std::string& model) {
  if (model.empty()) {
    const fs::path folder = shipped_models() / kDefaultModel;
    if (!is_folder(folder)) {
      throw Error(ErrorKind::file,
                  fmt::format("the model that ships with krait is not at {}", folder.string()),
                  "name a model with -m");
    }
    return require_config({kDefaultModel, folder, folder});
  }
  const fs::path path = model;
  if (is_folder(path)) return require_config({model, path, path});
  if (is_there(path)) {
    const std::string extension = path.extension().string();
    const fs::path folder = path.parent_path().empty() ? fs::path(".") : path.parent_path();
    if (extension == ".gguf") return {model, folder, path, true};
    if (extension != ".safetensors" && extension != ".bin") {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: expected a folder, a .safetensors, .bin or .gguf file", model));
    }
    return require_config({model, folder, path});
  }
  if (looks_like_hub_name(model)) {
    if (const auto snapshot = find_snapshot(model)) {
      return require_config({model, *snapshot, *snapshot});
    }
    throw Error(ErrorKind::file,
                fmt::format("{} is no folder or file, and not in the Hugging Face cache {}", model,
                            hub_cache().string()),
                fmt::format("download it first: huggingface-cli download {}", model));
  }
  throw Error(ErrorKind::file, fmt::format("{}: no such file or folder", model));
}

ModelConfig read_config(const ModelSource& source, const Checkpoint& checkpoint) {
  return source.gguf ? gguf_config(checkpoint) : read_config(config_file(source.folder));
}

GenerationConfig read_generation_config(const ModelSource& source) {
  return source.gguf ? GenerationConfig{} : read_generation_config(source.folder);
}

std::optional<fs::path> find_tokenizer_path(const ModelSource& source, const ModelConfig& config,
                                            const std::string& flag) {
  if (!flag.empty()) return find_tokenizer_file(flag);
  if (source.gguf) return std::nullopt;
  if (auto file = tokenizer_in(source.folder)) return file;
  if (config.layout != "state-spaces") return std::nullopt;
  fs::path neox = shipped_models() / "gpt-neox-20b" / "tokenizer.json";
  if (!is_there(neox)) return std::nullopt;
  const int64_t padding = config.vocab_size - open_tokenizer(neox)->vocab_size();
  if (padding < 0 || padding > kLargestPadding) return std::nullopt;
  spdlog::info("{} has no tokenizer: using GPT-NeoX-20B's, as the state-spaces models do",
               source.name);
  return neox;
}

std::unique_ptr<Tokenizer> find_tokenizer(const ModelSource& source, const ModelConfig& config,
                                          const GgufMetadata* metadata, const std::string& flag) {
  std::unique_ptr<Tokenizer> tokenizer;
  if (const auto path = find_tokenizer_path(source, config, flag)) {
    tokenizer = open_tokenizer(*path);
  } else if (metadata != nullptr) {
    tokenizer = gguf_tokenizer(*metadata);
  }
  if (tokenizer && tokenizer->vocab_size() > config.vocab_size) {
    spdlog::warn(
        "the tokenizer has {} ids but the model's vocabulary only {}: do they belong together?",
        tokenizer->vocab_size(), config.vocab_size);
  }
  return tokenizer;
}

}  // namespace krait
