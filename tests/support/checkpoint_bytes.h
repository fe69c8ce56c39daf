// Builds checkpoint files byte by byte, well-formed or damaged on purpose.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace krait::test {

/// Little-endian bytes of a number.
template <typename T>
[[nodiscard]] std::string le(T v) {
  std::string s(sizeof v, '\0');
  std::memcpy(s.data(), &v, sizeof v);
  return s;
}

[[nodiscard]] inline std::string float_bytes(const std::vector<float>& values) {
  std::string s;
  for (const float v : values) s += le(v);
  return s;
}

[[nodiscard]] inline std::string safetensors(std::string_view header, std::string_view data) {
  return le(uint64_t{header.size()}) + std::string(header) + std::string(data);
}

// GGUF: `key` and `tensor` give one item of the header each.
namespace gguf {

[[nodiscard]] inline std::string text(const std::string& s) { return le(uint64_t{s.size()}) + s; }
[[nodiscard]] inline std::string key(const std::string& name, uint32_t type,
                                     const std::string& value) {
  return text(name) + le(type) + value;
}
[[nodiscard]] inline std::string key(const std::string& name, const std::string& value) {
  return key(name, 8, text(value));
}
[[nodiscard]] inline std::string key(const std::string& name, uint32_t value) {
  return key(name, 4, le(value));
}
/// `elements` holds `n` of them, packed.
[[nodiscard]] inline std::string array(const std::string& name, uint32_t type, uint64_t n,
                                       const std::string& elements) {
  return key(name, 9, le(type) + le(n) + elements);
}
/// `dims` as in the file: the fastest first.
[[nodiscard]] inline std::string tensor(const std::string& name, const std::vector<uint64_t>& dims,
                                        uint32_t type, uint64_t offset) {
  std::string s = text(name) + le(static_cast<uint32_t>(dims.size()));
  for (const uint64_t d : dims) s += le(d);
  return s + le(type) + le(offset);
}
[[nodiscard]] inline std::string file(const std::vector<std::string>& keys,
                                      const std::vector<std::string>& tensors,
                                      const std::string& data, size_t alignment = 32,
                                      uint32_t version = 3) {
  std::string s = "GGUF" + le(version) + le(uint64_t{tensors.size()}) + le(uint64_t{keys.size()});
  for (const auto& k : keys) s += k;
  for (const auto& t : tensors) s += t;
  if (!data.empty()) s.resize((s.size() + alignment - 1) / alignment * alignment);
  return s + data;
}

}  // namespace gguf

// Pickles (protocol 2): each function gives the opcodes that push one value.
namespace pickle {

[[nodiscard]] inline std::string global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}
[[nodiscard]] inline std::string text(const std::string& s) {
  return "X" + le(static_cast<uint32_t>(s.size())) + s;
}
/// LONG1 of eight bytes, so that any number can be claimed.
[[nodiscard]] inline std::string integer(int64_t v) { return "\x8a\x08" + le(v); }
[[nodiscard]] inline std::string tuple(const std::vector<std::string>& items) {
  std::string s = "(";
  for (const auto& i : items) s += i;
  return s + "t";
}
[[nodiscard]] inline std::string integers(const std::vector<int64_t>& values) {
  std::vector<std::string> items;
  items.reserve(values.size());
  for (const int64_t v : values) items.push_back(integer(v));
  return tuple(items);
}
[[nodiscard]] inline std::string storage(const std::string& key, int64_t numel,
                                         const std::string& type = global("torch",
                                                                          "FloatStorage")) {
  return tuple({text("storage"), type, text(key), text("cpu"), integer(numel)}) + "Q";
}
[[nodiscard]] inline std::string ordered_dict() {
  return global("collections", "OrderedDict") + ")R";
}
[[nodiscard]] inline std::string tensor(const std::string& storage, int64_t offset,
                                        const std::vector<int64_t>& sizes,
                                        const std::vector<int64_t>& strides) {
  return global("torch._utils", "_rebuild_tensor_v2") +
         tuple({storage, integer(offset), integers(sizes), integers(strides), "\x89",
                ordered_dict()}) +
         "R";
}
[[nodiscard]] inline std::string dict(
    const std::vector<std::pair<std::string, std::string>>& items) {
  std::string s = ordered_dict() + "(";
  for (const auto& [key, value] : items) s += text(key) + value;
  return s + "u";
}
[[nodiscard]] inline std::string whole(const std::string& value) {
  return "\x80\x02" + value + ".";
}

}  // namespace pickle

struct ZipFile {
  std::string name;
  std::string data;
  uint16_t method = 0;
  uint16_t flags = 0;
};

/// A stored zip archive as torch.save lays it out: data at multiples of 64, sizes in the central
/// directory. With `zip64` every size and offset is in the ZIP64 fields.
[[nodiscard]] inline std::string zip(const std::vector<ZipFile>& files, bool zip64 = false) {
  std::string out;
  std::string directory;
  for (const auto& f : files) {
    const auto header = static_cast<uint32_t>(out.size());
    const auto size = static_cast<uint32_t>(f.data.size());
    const auto name_size = static_cast<uint16_t>(f.name.size());
    const size_t unpadded = out.size() + 30 + f.name.size() + 4;
    const auto padding = static_cast<uint16_t>((64 - unpadded % 64) % 64);
    out += le(uint32_t{0x04034b50}) + le(uint16_t{20}) + le(f.flags) + le(f.method) +
           le(uint32_t{0}) + le(uint32_t{0}) + le(size) + le(size) + le(name_size) +
           le(static_cast<uint16_t>(padding + 4)) + f.name + "FB" + le(padding) +
           std::string(padding, 'Z') + f.data;
    const std::string extra = zip64 ? le(uint16_t{1}) + le(uint16_t{24}) + le(uint64_t{size}) +
                                          le(uint64_t{size}) + le(uint64_t{header})
                                    : "";
    const uint32_t saturated = UINT32_MAX;
    directory += le(uint32_t{0x02014b50}) + le(uint16_t{0}) + le(uint16_t{20}) + le(f.flags) +
                 le(f.method) + le(uint32_t{0}) + le(uint32_t{0}) + le(zip64 ? saturated : size) +
                 le(zip64 ? saturated : size) + le(name_size) +
                 le(static_cast<uint16_t>(extra.size())) + le(uint16_t{0}) + le(uint16_t{0}) +
                 le(uint16_t{0}) + le(uint32_t{0}) + le(zip64 ? saturated : header) + f.name +
                 extra;
  }
  const uint64_t offset = out.size();
  const uint64_t n = files.size();
  out += directory;
  if (zip64) {
    const uint64_t end64 = out.size();
    out += le(uint32_t{0x06064b50}) + le(uint64_t{44}) + le(uint16_t{45}) + le(uint16_t{45}) +
           le(uint32_t{0}) + le(uint32_t{0}) + le(n) + le(n) + le(uint64_t{directory.size()}) +
           le(offset);
    out += le(uint32_t{0x07064b50}) + le(uint32_t{0}) + le(end64) + le(uint32_t{1});
  }
  out += le(uint32_t{0x06054b50}) + le(uint16_t{0}) + le(uint16_t{0}) +
         le(static_cast<uint16_t>(zip64 ? UINT16_MAX : n)) +
         le(static_cast<uint16_t>(zip64 ? UINT16_MAX : n)) +
         le(zip64 ? UINT32_MAX : static_cast<uint32_t>(directory.size())) +
         le(zip64 ? UINT32_MAX : static_cast<uint32_t>(offset)) + le(uint16_t{0});
  return out;
}

/// A PyTorch checkpoint: the pickle and the storages "0", "1", ...
[[nodiscard]] inline std::string torch_bin(const std::string& pickle,
                                           const std::vector<std::string>& storages = {},
                                           const std::vector<ZipFile>& more = {},
                                           bool zip64 = false) {
  std::vector<ZipFile> files{{"archive/data.pkl", pickle}};
  for (size_t i = 0; i < storages.size(); ++i) {
    files.push_back({"archive/data/" + std::to_string(i), storages[i]});
  }
  files.push_back({"archive/version", "3\n"});
  files.insert(files.end(), more.begin(), more.end());
  return zip(files, zip64);
}

}  // namespace krait::test
