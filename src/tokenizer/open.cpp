// Which kind of tokenizer a path holds, and the parts of Tokenizer that all kinds share.
#include <algorithm>

#include "base/error.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/special_names.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/tokenizer_json.h"

namespace krait {

namespace fs = std::filesystem;

std::unique_ptr<Tokenizer> open_tokenizer_json(const fs::path& file) {
  return parse_tokenizer_json(read_tokenizer_file(file), file.string(),
                              read_special_names(file.parent_path()));
}

std::unique_ptr<Tokenizer> open_sentencepiece(const fs::path& file) {
  return parse_sentencepiece(read_tokenizer_file(file), file.string(),
                             read_special_names(file.parent_path()));
}

std::optional<fs::path> tokenizer_in(const fs::path& folder) {
  std::error_code error;
  if (fs::exists(folder / "tokenizer.json", error)) return folder / "tokenizer.json";
  // Mistral's own layout puts a version behind the name: tokenizer.model.v3.
  std::vector<fs::path> models;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name == "tokenizer.model" || name.starts_with("tokenizer.model.v")) {
      models.push_back(entry.path());
    }
  }
  if (models.empty()) return std::nullopt;
  return *std::max_element(models.begin(), models.end());
}

fs::path find_tokenizer_file(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error)) {
    throw Error(ErrorKind::file, fmt::format("the tokenizer {} does not exist", path.string()));
  }
  if (!fs::is_directory(path, error)) return path;
  if (const auto file = tokenizer_in(path)) return *file;
  throw Error(ErrorKind::file,
              fmt::format("{} holds neither tokenizer.json nor tokenizer.model", path.string()),
              "Name a tokenizer with --tokenizer.");
}

std::unique_ptr<Tokenizer> open_tokenizer(const fs::path& path) {
  const fs::path file = find_tokenizer_file(path);
  return file.extension() == ".json" ? open_tokenizer_json(file) : open_sentencepiece(file);
}

}  // namespace krait
