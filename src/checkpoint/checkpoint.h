// A checkpoint is a set of named tensors in files. It knows names, types and shapes, and nothing of
// models.
//
// Files are mapped read-only and tensors are views into the mapping, which lives as long as the
// Checkpoint. Every length and offset in a file is checked before it is used: a damaged or hostile
// file gives an Error of kind format, never a crash and never memory allocated on its word.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor.h"
#include "checkpoint/tensor_writer.h"

namespace krait {

struct BlockFormat;
class GgufMetadata;

class Checkpoint {
 public:
  struct Entry {
    std::string name;
    Tensor tensor;     ///< dense host view; may be unaligned: use memcpy semantics
    std::string file;  ///< file name (without folder) that holds it, for messages
    /// Set where the tensor is quantised (GGUF): then `tensor` is its bytes, u8 [..., bytes of a
    /// row], and shape() what they stand for.
    const BlockFormat* blocks = nullptr;

    /// In elements.
    [[nodiscard]] Shape shape() const;
    /// "f32", or ggml's name of a quantised type ("Q4_K").
    [[nodiscard]] std::string_view type_name() const;
  };

  virtual ~Checkpoint() = default;

  /// All tensors, in the order of their names.
  [[nodiscard]] virtual const std::vector<Entry>& entries() const = 0;
  /// The entry of that name, or null.
  [[nodiscard]] const Entry* find(std::string_view name) const;
  /// "safetensors", "pytorch", "gguf"
  [[nodiscard]] virtual std::string_view format() const = 0;
  /// Keys and values, which only GGUF has: null elsewhere.
  [[nodiscard]] virtual const GgufMetadata* metadata() const { return nullptr; }
};

/// Opens `path`: a .safetensors, .bin or .gguf file, or a folder that holds model.safetensors,
/// model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json or
/// consolidated.safetensors (looked for in this order). Errors: file (missing), format (corrupt),
/// unsupported (a format krait does not read).
[[nodiscard]] std::unique_ptr<Checkpoint> open_checkpoint(const std::filesystem::path& path);

/// One safetensors file (https://github.com/huggingface/safetensors, "Format").
[[nodiscard]] std::unique_ptr<Checkpoint> open_safetensors(const std::filesystem::path& file);
/// A zip archive written by torch.save since PyTorch 1.6, read by a restricted unpickler.
[[nodiscard]] std::unique_ptr<Checkpoint> open_torch_bin(const std::filesystem::path& file);
/// Shards named by an index `{"weight_map": {tensor: file}}`; each shard of either kind.
[[nodiscard]] std::unique_ptr<Checkpoint> open_sharded(const std::filesystem::path& index_json);

/// A GGUF file (gguf.h), with its metadata.
[[nodiscard]] std::unique_ptr<Checkpoint> open_gguf(const std::filesystem::path& file);

/// Writes tensors as one safetensors file, under a temporary name first, so that no partial file is
/// left.
void write_safetensors(const std::filesystem::path& file,
                       const std::vector<Checkpoint::Entry>& tensors);
void write_safetensors(const std::filesystem::path& file, const std::vector<OutputTensor>& tensors);

}  // namespace krait
