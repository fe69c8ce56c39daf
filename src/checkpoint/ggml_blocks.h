// The quantised block formats of ggml that GGUF files hold: a row of a matrix is a sequence of
// blocks, each with its own scale. ggml_blocks.cpp has the layouts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace krait {

struct BlockFormat {
  std::string_view name;  ///< ggml's: "Q4_K"
  int64_t elements;       ///< of a block, which never passes the end of a row
  int64_t bytes;          ///< of a block
  /// out[0 .. n_block * elements) = the values of `n_block` blocks, which may be unaligned.
  void (*dequantize)(const std::byte* blocks, int64_t n_block, float* out);
};

/// By ggml's name, or null where krait does not read the format.
[[nodiscard]] const BlockFormat* find_block_format(std::string_view name);

}  // namespace krait
