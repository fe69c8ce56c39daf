// Writes GGUF files, version 3 (gguf.h has the reader).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/tensor_writer.h"

namespace krait {

/// Metadata in the order in which it is added. A key must be added once.
class GgufKeys {
 public:
  void text(std::string_view key, std::string_view value);
  void u32(std::string_view key, uint32_t value);
  void f32(std::string_view key, float value);
  void boolean(std::string_view key, bool value);
  void texts(std::string_view key, const std::vector<std::string>& values);
  void floats(std::string_view key, const std::vector<float>& values);
  void i32s(std::string_view key, const std::vector<int32_t>& values);
  void u8s(std::string_view key, std::string_view bytes);

  [[nodiscard]] uint64_t count() const noexcept { return count_; }
  [[nodiscard]] const std::string& bytes() const noexcept { return bytes_; }

 private:
  void head(std::string_view key, uint32_t type);
  void array(std::string_view key, uint32_t type, uint64_t n);

  uint64_t count_ = 0;
  std::string bytes_;
};

/// Writes under a temporary name first, so that no partial file is left. Tensors of type f32, f16
/// or bf16, in the order given, with krait's shapes (outermost first). Errors: file.
void write_gguf(const std::filesystem::path& file, const GgufKeys& keys,
                const std::vector<OutputTensor>& tensors);

}  // namespace krait
