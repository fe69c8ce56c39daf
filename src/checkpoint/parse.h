// The parsers behind checkpoint.h, over bytes in memory: what a file holds is checked here, whether
// the bytes come from a mapping, a test or a fuzzer.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/checkpoint.h"

namespace krait {

struct ParsedTensors {
  std::vector<Checkpoint::Entry> entries;  ///< ordered by name; views into the file or `gathered`
  std::vector<std::vector<std::byte>> gathered;  ///< tensors that the file holds strided
};

/// `name` is the file's name for messages and Entry::file. The entries view `file`.
[[nodiscard]] ParsedTensors parse_safetensors(std::span<const std::byte> file,
                                              const std::string& name);
[[nodiscard]] ParsedTensors parse_torch_bin(std::span<const std::byte> file,
                                            const std::string& name);
/// The weight_map of an index: tensor name -> file name, which is a plain name without a folder.
[[nodiscard]] std::map<std::string, std::string> parse_index(std::span<const std::byte> json,
                                                             const std::string& name);

/// Whether the bytes are a Git LFS pointer, which stands in for a file that was not downloaded.
[[nodiscard]] bool is_lfs_pointer(std::span<const std::byte> file);

/// Foreign text made fit for a message: control characters become '?', long text is cut.
[[nodiscard]] std::string printable(std::string_view text);

/// Bytes of a tensor, or nothing if a dimension is negative or the product passes 2^63 - 1.
[[nodiscard]] std::optional<int64_t> checked_bytes(std::span<const int64_t> dims, DType dtype);

}  // namespace krait
