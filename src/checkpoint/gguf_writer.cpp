#include "checkpoint/gguf_writer.h"

#include <array>

#include "base/error.h"
#include "base/output_file.h"
#include "checkpoint/gguf.h"

namespace krait {

namespace {

constexpr uint64_t kAlignment = 32;

template <typename T>
void put(std::string& out, T v) {
  out.append(reinterpret_cast<const char*>(&v), sizeof v);
}

void put_text(std::string& out, std::string_view s) {
  put(out, uint64_t{s.size()});
  out += s;
}

uint32_t id(GgufType t) { return static_cast<uint32_t>(t); }

/// ggml's number of a tensor type.
uint32_t tensor_type(const OutputTensor& t) {
  switch (t.dtype) {
    case DType::f32:
      return 0;
    case DType::f16:
      return 1;
    case DType::bf16:
      return 30;
    default:
      throw_not_float(t.dtype, t.name);
  }
}

}  // namespace

void GgufKeys::head(std::string_view key, uint32_t type) {
  ++count_;
  put_text(bytes_, key);
  put(bytes_, type);
}

void GgufKeys::array(std::string_view key, uint32_t type, uint64_t n) {
  head(key, id(GgufType::array));
  put(bytes_, type);
  put(bytes_, n);
}

void GgufKeys::text(std::string_view key, std::string_view value) {
  head(key, id(GgufType::text));
  put_text(bytes_, value);
}

void GgufKeys::u32(std::string_view key, uint32_t value) {
  head(key, id(GgufType::u32));
  put(bytes_, value);
}

void GgufKeys::f32(std::string_view key, float value) {
  head(key, id(GgufType::f32));
  put(bytes_, value);
}

void GgufKeys::boolean(std::string_view key, bool value) {
  head(key, id(GgufType::boolean));
  put(bytes_, static_cast<uint8_t>(value ? 1 : 0));
}

void GgufKeys::texts(std::string_view key, const std::vector<std::string>& values) {
  array(key, id(GgufType::text), values.size());
  for (const std::string& v : values) put_text(bytes_, v);
}

void GgufKeys::floats(std::string_view key, const std::vector<float>& values) {
  array(key, id(GgufType::f32), values.size());
  for (const float v : values) put(bytes_, v);
}

void GgufKeys::i32s(std::string_view key, const std::vector<int32_t>& values) {
  array(key, id(GgufType::i32), values.size());
  for (const int32_t v : values) put(bytes_, v);
}

void GgufKeys::u8s(std::string_view key, std::string_view bytes) {
  array(key, id(GgufType::u8), bytes.size());
  bytes_ += bytes;
}

void write_gguf(const std::filesystem::path& file, const GgufKeys& keys,
                const std::vector<OutputTensor>& tensors) {
  std::string header = "GGUF";
  put(header, uint32_t{3});
  put(header, uint64_t{tensors.size()});
  put(header, keys.count());
  header += keys.bytes();
  const auto padding = [](uint64_t n) { return (kAlignment - n % kAlignment) % kAlignment; };
  uint64_t offset = 0;
  for (const OutputTensor& t : tensors) {
    put_text(header, t.name);
    put(header, static_cast<uint32_t>(t.shape.rank()));
    for (int i = t.shape.rank() - 1; i >= 0; --i) put(header, static_cast<uint64_t>(t.shape[i]));
    put(header, tensor_type(t));
    put(header, offset);
    offset += t.bytes() + padding(t.bytes());
  }
  header.resize(header.size() + padding(header.size()));

  OutputFile out(file);
  out.write(std::as_bytes(std::span(header)));
  constexpr std::array<std::byte, kAlignment> kZeros{};
  for (const OutputTensor& t : tensors) {
    write_tensor(t, out);
    out.write(std::span(kZeros).first(padding(t.bytes())));
  }
  out.commit();
}

}  // namespace krait
