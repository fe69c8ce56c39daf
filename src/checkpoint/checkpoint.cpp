#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <array>

#include "base/log.h"
#include "base/mapped_file.h"
#include "checkpoint/ggml_blocks.h"
#include "checkpoint/gguf.h"
#include "checkpoint/parse.h"

namespace krait {

namespace fs = std::filesystem;

const Checkpoint::Entry* Checkpoint::find(std::string_view name) const {
  const auto& all = entries();
  const auto it = std::lower_bound(all.begin(), all.end(), name,
                                   [](const Entry& e, std::string_view n) { return e.name < n; });
  return it != all.end() && it->name == name ? &*it : nullptr;
}

Shape Checkpoint::Entry::shape() const {
  if (blocks == nullptr) return tensor.shape;
  Shape s;
  const int last = tensor.shape.rank() - 1;
  for (int i = 0; i < last; ++i) s.push_back(tensor.shape[i]);
  s.push_back(tensor.shape[last] / blocks->bytes * blocks->elements);
  return s;
}

std::string_view Checkpoint::Entry::type_name() const {
  return blocks != nullptr ? blocks->name : dtype_name(tensor.dtype);
}

namespace {

MappedFile map_tensors(const fs::path& path) {
  MappedFile file(path);
  if (is_lfs_pointer(file.bytes())) {
    throw Error(ErrorKind::format,
                fmt::format("{}: expected tensors, found a Git LFS pointer", path.string()),
                "The file itself was not downloaded: run git lfs pull in its folder.");
  }
  return file;
}

/// One mapped file and the views into it.
class FileCheckpoint final : public Checkpoint {
 public:
  using Parser = ParsedTensors (*)(std::span<const std::byte>, const std::string&);

  FileCheckpoint(const fs::path& file, Parser parse, std::string_view format)
      : file_(map_tensors(file)), format_(format) {
    tensors_ = parse(file_.bytes(), file.filename().string());
  }
  [[nodiscard]] const std::vector<Entry>& entries() const override { return tensors_.entries; }
  [[nodiscard]] std::string_view format() const override { return format_; }

 private:
  MappedFile file_;
  ParsedTensors tensors_;
  std::string_view format_;
};

class GgufCheckpoint final : public Checkpoint {
 public:
  explicit GgufCheckpoint(const fs::path& file)
      : file_(map_tensors(file)), parsed_(parse_gguf(file_.bytes(), file.filename().string())) {}
  [[nodiscard]] const std::vector<Entry>& entries() const override {
    return parsed_.tensors.entries;
  }
  [[nodiscard]] std::string_view format() const override { return "gguf"; }
  [[nodiscard]] const GgufMetadata* metadata() const override { return &parsed_.metadata; }

 private:
  MappedFile file_;
  ParsedGguf parsed_;
};

/// Several files and the index that says which tensor is in which.
class ShardedCheckpoint final : public Checkpoint {
 public:
  explicit ShardedCheckpoint(const fs::path& index) {
    const MappedFile file(index);
    const std::string index_name = index.filename().string();
    const auto weight_map = parse_index(file.bytes(), index_name);
    std::map<std::string, std::unique_ptr<Checkpoint>> shards;
    for (const auto& [tensor, shard] : weight_map) {
      std::unique_ptr<Checkpoint>& open = shards[shard];
      if (!open) open = open_shard(index.parent_path() / shard, index_name);
      const Entry* entry = open->find(tensor);
      if (entry == nullptr) {
        throw Error(ErrorKind::format,
                    fmt::format("{}: expected the tensor {}, which {} places here, found none of "
                                "that name",
                                printable(shard), printable(tensor), index_name),
                    "Check that the index and the shards come from the same release.");
      }
      entries_.push_back(*entry);
    }
    format_ = shards.begin()->second->format();
    for (auto& [name, shard] : shards) {
      for (const Entry& e : shard->entries()) {
        if (find(e.name) == nullptr) {
          spdlog::warn("{}: the tensor {} is not in {} and is left out", name, printable(e.name),
                       index_name);
        }
      }
      shards_.push_back(std::move(shard));
    }
  }
  [[nodiscard]] const std::vector<Entry>& entries() const override { return entries_; }
  [[nodiscard]] std::string_view format() const override { return format_; }

 private:
  static std::unique_ptr<Checkpoint> open_shard(const fs::path& file, const std::string& index) {
    std::error_code unreadable;
    if (!fs::exists(file, unreadable)) {
      throw Error(ErrorKind::file,
                  fmt::format("{} names the shard {}, which is missing", index,
                              printable(file.filename().string())),
                  "Download the rest of the checkpoint into the same folder.");
    }
    if (file.extension() == ".safetensors") return open_safetensors(file);
    return open_torch_bin(file);
  }

  std::vector<Entry> entries_;
  std::vector<std::unique_ptr<Checkpoint>> shards_;
  std::string_view format_;
};

bool starts_with(std::span<const std::byte> bytes, std::string_view magic) {
  return bytes.size() >= magic.size() &&
         std::equal(magic.begin(), magic.end(), bytes.begin(),
                    [](char a, std::byte b) { return static_cast<std::byte>(a) == b; });
}

std::unique_ptr<Checkpoint> open_folder(const fs::path& folder) {
  using Open = std::unique_ptr<Checkpoint> (*)(const fs::path&);
  constexpr std::array<std::pair<const char*, Open>, 5> kKnown{{
      {"model.safetensors", open_safetensors},
      {"model.safetensors.index.json", open_sharded},
      {"pytorch_model.bin", open_torch_bin},
      {"pytorch_model.bin.index.json", open_sharded},
      {"consolidated.safetensors", open_safetensors},  // Mistral's layout
  }};
  std::error_code unreadable;
  for (const auto& [name, open] : kKnown) {
    if (fs::exists(folder / name, unreadable)) return open(folder / name);
  }
  std::string hint = "If the weights have another name, give the path of the file itself.";
  for (fs::directory_iterator it(folder, unreadable), end; !unreadable && it != end;
       it.increment(unreadable)) {
    if (it->path().extension() == ".gguf") {
      hint = fmt::format("For a GGUF file give its own path, e.g. {}.", it->path().string());
    }
  }
  throw Error(ErrorKind::file,
              fmt::format("no checkpoint in the folder {}: looked for model.safetensors, "
                          "model.safetensors.index.json, pytorch_model.bin, "
                          "pytorch_model.bin.index.json and consolidated.safetensors",
                          folder.string()),
              hint);
}

}  // namespace

std::unique_ptr<Checkpoint> open_safetensors(const fs::path& file) {
  return std::make_unique<FileCheckpoint>(file, parse_safetensors, "safetensors");
}

std::unique_ptr<Checkpoint> open_torch_bin(const fs::path& file) {
  return std::make_unique<FileCheckpoint>(file, parse_torch_bin, "pytorch");
}

std::unique_ptr<Checkpoint> open_gguf(const fs::path& file) {
  return std::make_unique<GgufCheckpoint>(file);
}

std::unique_ptr<Checkpoint> open_sharded(const fs::path& index_json) {
  return std::make_unique<ShardedCheckpoint>(index_json);
}

std::unique_ptr<Checkpoint> open_checkpoint(const fs::path& path) {
  std::error_code unreadable;
  const fs::file_status status = fs::status(path, unreadable);
  if (!fs::exists(status)) {
    throw Error(ErrorKind::file,
                fmt::format("no checkpoint at {}: there is no such file or folder", path.string()));
  }
  if (fs::is_directory(status)) return open_folder(path);

  const std::string extension = path.extension().string();
  if (extension == ".safetensors") return open_safetensors(path);
  if (extension == ".bin" || extension == ".pt" || extension == ".pth") return open_torch_bin(path);
  if (extension == ".gguf") return open_gguf(path);
  if (extension == ".json") return open_sharded(path);
  // Any other name, such as a blob of a download cache: the first bytes tell.
  const MappedFile file(path);
  const auto bytes = file.bytes();
  if (starts_with(bytes, "GGUF")) return open_gguf(path);
  if (starts_with(bytes, "PK\x03\x04")) return open_torch_bin(path);
  if (bytes.size() > 8 && bytes[8] == std::byte{'{'}) return open_safetensors(path);
  throw Error(ErrorKind::unsupported,
              fmt::format("{}: expected a safetensors file, a PyTorch checkpoint (zip), a GGUF "
                          "file or an index (.json), found a file that begins like none of them",
                          path.string()));
}

// Helpers of the parsers.

bool is_lfs_pointer(std::span<const std::byte> file) {
  return starts_with(file, "version https://git-lfs.github.com/");
}

std::string printable(std::string_view text) {
  constexpr size_t kMax = 200;
  std::string s(text.substr(0, kMax));
  for (char& c : s) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text.size() > kMax ? s + "..." : s;
}

std::optional<int64_t> checked_bytes(std::span<const int64_t> dims, DType dtype) {
  auto n = static_cast<int64_t>(itemsize(dtype));
  bool empty = false;
  for (const int64_t d : dims) {
    if (d < 0) return std::nullopt;
    empty = empty || d == 0;
    // A zero counts only at the end, so that what follows it is held to the same limit.
    if (d != 0 && __builtin_mul_overflow(n, d, &n)) return std::nullopt;
  }
  return empty ? 0 : n;
}

}  // namespace krait
