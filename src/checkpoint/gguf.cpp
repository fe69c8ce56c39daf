// GGUF, all little-endian:
//
//   "GGUF" | u32 version | u64 tensors | u64 keys
//   keys times      string key | u32 type | value
//   tensors times   string name | u32 n_dims | u64 dims[n_dims] | u32 type | u64 offset
//   zeros up to a multiple of the alignment | data
//
// A string is a u64 length and that many bytes; an array u32 element type, u64 count and the
// elements. dims[0] is the index that varies fastest: the reverse of krait's shapes. Offsets count
// from the start of the data; sorted by offset, each tensor begins at the next multiple of the
// alignment (general.alignment, 32 where absent) behind the one before it.
#include "checkpoint/gguf.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "checkpoint/ggml_blocks.h"

namespace krait {

namespace {

constexpr uint32_t kMaxVersion = 3;
constexpr uint64_t kMaxDims = 4;
constexpr int kMaxNesting = 4;  // arrays in arrays, which the format allows and nobody writes
constexpr uint64_t kMaxKey = 65535;
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = 1U << 20;

/// Tensor types by ggml's number. A type of the list with neither dtype nor block format is known
/// by name only.
struct TypeName {
  uint32_t id;
  std::string_view name;
  std::optional<DType> dtype;
};
constexpr TypeName kTypes[] = {
    {0, "F32", DType::f32},  {1, "F16", DType::f16},    {2, "Q4_0", {}},
    {3, "Q4_1", {}},         {6, "Q5_0", {}},           {7, "Q5_1", {}},
    {8, "Q8_0", {}},         {9, "Q8_1", {}},           {10, "Q2_K", {}},
    {11, "Q3_K", {}},        {12, "Q4_K", {}},          {13, "Q5_K", {}},
    {14, "Q6_K", {}},        {15, "Q8_K", {}},          {16, "IQ2_XXS", {}},
    {17, "IQ2_XS", {}},      {18, "IQ3_XXS", {}},       {19, "IQ1_S", {}},
    {20, "IQ4_NL", {}},      {21, "IQ3_S", {}},         {22, "IQ2_S", {}},
    {23, "IQ4_XS", {}},      {24, "I8", DType::i8},     {25, "I16", DType::i16},
    {26, "I32", DType::i32}, {27, "I64", DType::i64},   {28, "F64", DType::f64},
    {29, "IQ1_M", {}},       {30, "BF16", DType::bf16}, {34, "TQ1_0", {}},
    {35, "TQ2_0", {}},       {39, "MXFP4", {}},         {40, "NVFP4", {}},
};

/// Bytes of one value of a type of fixed size; 0 for a string or an array.
uint64_t fixed_size(GgufType t) {
  constexpr uint8_t kSizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kSizes[static_cast<size_t>(t)];
}

template <typename T>
T load(const std::byte* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// An element of a number type as T.
template <typename T>
T number_at(GgufType type, const std::byte* p) {
  switch (type) {
    case GgufType::u8:
    case GgufType::boolean:
      return static_cast<T>(load<uint8_t>(p));
    case GgufType::i8:
      return static_cast<T>(load<int8_t>(p));
    case GgufType::u16:
      return static_cast<T>(load<uint16_t>(p));
    case GgufType::i16:
      return static_cast<T>(load<int16_t>(p));
    case GgufType::u32:
      return static_cast<T>(load<uint32_t>(p));
    case GgufType::i32:
      return static_cast<T>(load<int32_t>(p));
    case GgufType::f32:
      return static_cast<T>(load<float>(p));
    case GgufType::u64:
      return static_cast<T>(load<uint64_t>(p));
    case GgufType::i64:
      return static_cast<T>(load<int64_t>(p));
    case GgufType::f64:
      return static_cast<T>(load<double>(p));
    case GgufType::text:
    case GgufType::array:
      break;
  }
  return T{};
}

bool is_integer(GgufType t) {
  return t != GgufType::f32 && t != GgufType::f64 && t != GgufType::boolean &&
         t != GgufType::text && t != GgufType::array;
}

bool is_number(GgufType t) { return is_integer(t) || t == GgufType::f32 || t == GgufType::f64; }

/// Walks the bytes of a file; every step is checked against what is left.
class Cursor {
 public:
  Cursor(std::span<const std::byte> file, const std::string& name) : file_(file), name_(name) {}

  [[nodiscard]] size_t position() const { return at_; }
  [[nodiscard]] const std::string& name() const { return name_; }

  std::span<const std::byte> take(uint64_t n, std::string_view what) {
    if (n > file_.size() - at_) {
      throw Error(ErrorKind::format,
                  fmt::format("{}: expected {} bytes of {} at byte {}, found the end of the file "
                              "after {}",
                              name_, n, what, at_, file_.size() - at_),
                  "The file is damaged or its download is incomplete.");
    }
    const auto part = file_.subspan(at_, n);
    at_ += n;
    return part;
  }
  template <typename T>
  T number(std::string_view what) {
    return load<T>(take(sizeof(T), what).data());
  }
  std::string_view text(uint64_t most, std::string_view what) {
    const auto n = number<uint64_t>(what);
    if (n > most) fail(fmt::format("expected {} of at most {} bytes, found {}", what, most, n));
    return text_of(take(n, what));
  }

  GgufMetadata::Value value() {
    GgufMetadata::Value v;
    v.type = type();
    const size_t begin = v.type == GgufType::array ? at_ + 12 : at_;  // behind type and count
    if (v.type == GgufType::array) {
      v.is_array = true;
      std::tie(v.type, v.count) = elements(1);
    } else {
      skip(v.type, 1, 0);
    }
    v.bytes = file_.subspan(begin, at_ - begin);
    return v;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::format, fmt::format("{}: {}", name_, what));
  }

 private:
  GgufType type() {
    const auto id = number<uint32_t>("a value's type");
    if (id > static_cast<uint32_t>(GgufType::f64)) {
      fail(fmt::format("expected a type of metadata at byte {}, found {}", at_ - 4, id));
    }
    return static_cast<GgufType>(id);
  }
  std::pair<GgufType, uint64_t> elements(int depth) {
    const GgufType t = type();
    const auto n = number<uint64_t>("an array's length");
    skip(t, n, depth);
    return {t, n};
  }
  void skip(GgufType t, uint64_t n, int depth) {
    if (const uint64_t size = fixed_size(t); size > 0) {
      if (n > file_.size() / size) take(UINT64_MAX, "metadata");
      const auto bytes = take(n * size, "metadata");
      const auto boolean = [](std::byte b) { return b <= std::byte{1}; };
      if (t == GgufType::boolean && !std::all_of(bytes.begin(), bytes.end(), boolean)) {
        fail("expected 0 or 1 as a boolean of the metadata, found another number");
      }
      return;
    }
    if (depth == kMaxNesting) fail(fmt::format("arrays nested deeper than {}", kMaxNesting));
    for (uint64_t i = 0; i < n; ++i) {  // each takes 8 bytes or more, so this ends with the file
      if (t == GgufType::text) {
        (void)text(UINT64_MAX, "a string of the metadata");
      } else {
        (void)elements(depth + 1);
      }
    }
  }

  std::span<const std::byte> file_;
  const std::string& name_;
  size_t at_ = 0;
};

/// One tensor as the header has it.
struct Info {
  std::string_view name;
  Shape shape;  ///< in elements
  std::optional<DType> dtype;
  const BlockFormat* blocks = nullptr;  ///< where there is no dtype
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

Info read_info(Cursor& in, const std::string& file) {
  Info info;
  info.name = in.text(kMaxKey, "a tensor's name");
  const auto corrupt = [&](const std::string& what) {
    in.fail(fmt::format("tensor {}: {}", printable(info.name), what));
  };
  const auto n_dims = in.number<uint32_t>("a tensor's rank");
  if (n_dims > kMaxDims) corrupt(fmt::format("expected at most 4 dimensions, found {}", n_dims));
  std::array<int64_t, kMaxDims> dims{};
  for (uint32_t i = 0; i < n_dims; ++i) {
    const auto d = in.number<uint64_t>("a tensor's size");
    if (d > INT64_MAX) corrupt(fmt::format("expected sizes below 2^63, found {}", d));
    dims[n_dims - 1 - i] = static_cast<int64_t>(d);
  }
  for (uint32_t i = 0; i < n_dims; ++i) info.shape.push_back(dims[i]);

  const auto type = in.number<uint32_t>("a tensor's type");
  info.offset = in.number<uint64_t>("a tensor's offset");
  const auto* known = std::find_if(std::begin(kTypes), std::end(kTypes),
                                   [&](const TypeName& t) { return t.id == type; });
  if (known != std::end(kTypes)) {
    info.dtype = known->dtype;
    info.blocks = find_block_format(known->name);
  }
  if (!info.dtype && info.blocks == nullptr) {
    throw Error(
        ErrorKind::unsupported,
        fmt::format(
            "{}: tensor {} is of type {}, which krait does not read", file, printable(info.name),
            known != std::end(kTypes) ? std::string(known->name) : fmt::format("number {}", type)),
        "krait reads F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and Q2_K to Q6_K.");
  }

  // Elements first, as if of 8 bytes: Shape::numel() counts them, and no block takes more.
  const std::span<int64_t> sizes = std::span(dims).first(n_dims);
  if (!checked_bytes(sizes, DType::f64)) {
    corrupt(fmt::format("expected sizes that fit into memory, found {}", info.shape.str()));
  }
  if (info.blocks != nullptr) {
    const BlockFormat& b = *info.blocks;
    if (n_dims == 0 || sizes.back() % b.elements != 0) {
      corrupt(fmt::format("expected rows of whole blocks of {} elements ({}), found {}", b.elements,
                          b.name, info.shape.str()));
    }
    sizes.back() = sizes.back() / b.elements * b.bytes;
  }
  const std::optional<int64_t> bytes = checked_bytes(sizes, info.dtype.value_or(DType::u8));
  info.bytes = static_cast<uint64_t>(*bytes);
  return info;
}

/// `offset` is at most the size of a file, so that this does not overflow.
uint64_t aligned(uint64_t offset, uint64_t alignment) {
  return (offset + alignment - 1) / alignment * alignment;
}

/// Each tensor behind the one before it, and the last one inside the data.
void check_places(std::vector<Info>& infos, uint64_t data_size, uint64_t alignment,
                  const Cursor& in) {
  std::sort(infos.begin(), infos.end(), [](const Info& a, const Info& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  uint64_t end = 0;
  for (const Info& i : infos) {
    const uint64_t want = aligned(end, alignment);
    if (i.offset != want) {
      in.fail(fmt::format("tensor {}: expected its data at offset {}, found {}, which {}",
                          printable(i.name), want, i.offset,
                          i.offset < want ? "overlaps another tensor" : "leaves a hole"));
    }
    if (i.offset > data_size || i.bytes > data_size - i.offset) {
      throw Error(ErrorKind::format,
                  fmt::format("{}: tensor {}: expected {} bytes of data at offset {}, found {} "
                              "bytes of data in all",
                              in.name(), printable(i.name), i.bytes, i.offset, data_size),
                  "The file is damaged or its download is incomplete.");
    }
    end = i.offset + i.bytes;
  }
  if (data_size > aligned(end, alignment)) {
    in.fail(fmt::format("expected {} bytes of data, found {}", end, data_size));
  }
}

}  // namespace

GgufMetadata::GgufMetadata(std::string file, std::vector<std::pair<std::string_view, Value>> values)
    : file_(std::move(file)), values_(std::move(values)) {
  std::sort(values_.begin(), values_.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  const auto twice =
      std::adjacent_find(values_.begin(), values_.end(),
                         [](const auto& a, const auto& b) { return a.first == b.first; });
  if (twice != values_.end()) {
    throw Error(ErrorKind::format,
                fmt::format("{}: the key {} occurs twice", file_, printable(twice->first)));
  }
}

const GgufMetadata::Value* GgufMetadata::find(std::string_view key) const {
  const auto it = std::lower_bound(values_.begin(), values_.end(), key,
                                   [](const auto& v, std::string_view k) { return v.first < k; });
  return it != values_.end() && it->first == key ? &it->second : nullptr;
}

void GgufMetadata::fail(std::string_view key, std::string_view expected) const {
  constexpr std::string_view kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                         "bool", "string", "array", "u64", "i64", "f64"};
  const Value* v = find(key);
  std::string found = "nothing";
  if (v != nullptr) {
    found = kNames[static_cast<size_t>(v->type)];
    if (v->is_array) {
      found = fmt::format("an array of {} {}", v->count, found);
    } else if (is_integer(v->type)) {
      found += fmt::format(" {}", number_at<int64_t>(v->type, v->bytes.data()));
    } else if (is_number(v->type)) {
      found += fmt::format(" {}", number_at<double>(v->type, v->bytes.data()));
    } else if (v->type == GgufType::text) {
      found += fmt::format(" \"{}\"", printable(*text(key)));
    }
  }
  throw Error(ErrorKind::format,
              fmt::format("{}: {}: expected {}, found {}", file_, printable(key), expected, found));
}

std::optional<std::string_view> GgufMetadata::text(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array || v->type != GgufType::text) fail(key, "a string");
  return text_of(v->bytes.subspan(sizeof(uint64_t)));
}

std::optional<int64_t> GgufMetadata::integer(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array || !is_integer(v->type) ||
      (v->type == GgufType::u64 && load<uint64_t>(v->bytes.data()) > INT64_MAX)) {
    fail(key, "an integer");
  }
  return number_at<int64_t>(v->type, v->bytes.data());
}

std::optional<double> GgufMetadata::number(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array || !is_number(v->type)) fail(key, "a number");
  return number_at<double>(v->type, v->bytes.data());
}

std::optional<bool> GgufMetadata::boolean(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array || v->type != GgufType::boolean) fail(key, "a boolean");
  return v->bytes[0] != std::byte{0};
}

std::vector<std::string_view> GgufMetadata::texts(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) return {};
  if (!v->is_array || v->type != GgufType::text) fail(key, "an array of strings");
  std::vector<std::string_view> out;
  out.reserve(v->count);  // each takes 8 bytes of the file at least
  for (auto rest = v->bytes; !rest.empty();) {
    const auto n = load<uint64_t>(rest.data());
    out.push_back(text_of(rest.subspan(sizeof n, n)));
    rest = rest.subspan(sizeof n + n);
  }
  return out;
}

std::vector<int64_t> GgufMetadata::integers(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) return {};
  if (!v->is_array || !is_integer(v->type)) fail(key, "an array of integers");
  std::vector<int64_t> out(v->count);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = number_at<int64_t>(v->type, v->bytes.data() + i * fixed_size(v->type));
  }
  return out;
}

std::vector<float> GgufMetadata::numbers(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) return {};
  if (!v->is_array || !is_number(v->type)) fail(key, "an array of numbers");
  std::vector<float> out(v->count);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = number_at<float>(v->type, v->bytes.data() + i * fixed_size(v->type));
  }
  return out;
}

ParsedGguf parse_gguf(std::span<const std::byte> file, const std::string& name) {
  Cursor in(file, name);
  if (text_of(file.first(std::min<size_t>(4, file.size()))) != "GGUF") {
    in.fail(fmt::format("expected a GGUF file, found {}",
                        file.empty() ? "an empty file" : "one that does not begin with \"GGUF\""));
  }
  (void)in.take(4, "the magic number");
  const auto version = in.number<uint32_t>("the version");
  if (version < 2 || version > kMaxVersion) {
    const bool swapped = version != 0 && (version & 0xffffU) == 0;
    throw Error(ErrorKind::unsupported,
                swapped ? fmt::format("{}: expected a little-endian GGUF file, found a big-endian "
                                      "one",
                                      name)
                        : fmt::format("{}: expected GGUF version 2 or 3, found {}", name, version),
                "Convert the model again with a current llama.cpp.");
  }
  const auto n_tensor = in.number<uint64_t>("the number of tensors");
  const auto n_key = in.number<uint64_t>("the number of keys");

  // Neither count is trusted with memory: the loops end where the file does.
  std::vector<std::pair<std::string_view, GgufMetadata::Value>> values;
  for (uint64_t i = 0; i < n_key; ++i) {
    const std::string_view key = in.text(kMaxKey, "a key");
    values.emplace_back(key, in.value());
  }
  GgufMetadata metadata(name, std::move(values));
  if (const auto parts = metadata.integer("split.count"); parts && *parts > 1) {
    throw Error(ErrorKind::unsupported,
                fmt::format("{}: it is one of {} parts of a model, which krait does not join", name,
                            *parts),
                "Join them with llama.cpp: llama-gguf-split --merge.");
  }
  const uint64_t alignment =
      static_cast<uint64_t>(metadata.integer("general.alignment").value_or(kDefaultAlignment));
  if (!std::has_single_bit(alignment) || alignment > kMaxAlignment) {
    metadata.fail("general.alignment", "a power of two up to 2^20");
  }

  std::vector<Info> infos;
  for (uint64_t i = 0; i < n_tensor; ++i) infos.push_back(read_info(in, name));
  // A file without tensors (a vocabulary) need not pad its header.
  const uint64_t begin = std::min<uint64_t>(aligned(in.position(), alignment), file.size());
  const auto data = file.subspan(begin);
  check_places(infos, data.size(), alignment, in);

  std::sort(infos.begin(), infos.end(),
            [](const Info& a, const Info& b) { return a.name < b.name; });
  ParsedGguf out{std::move(metadata), {}};
  std::vector<Checkpoint::Entry>& entries = out.tensors.entries;
  for (const Info& i : infos) {
    if (!entries.empty() && entries.back().name == i.name) {
      in.fail(fmt::format("tensor {} occurs twice", printable(i.name)));
    }
    // Views are of mutable type because Tensor serves outputs too; nobody writes to weights.
    auto* p = const_cast<std::byte*>(data.data()) + i.offset;
    Shape stored = i.shape;
    if (i.blocks != nullptr) {
      stored = Shape();
      const int last = i.shape.rank() - 1;
      for (int d = 0; d < last; ++d) stored.push_back(i.shape[d]);
      stored.push_back(i.shape[last] / i.blocks->elements * i.blocks->bytes);
    }
    entries.push_back(
        {std::string(i.name), Tensor(p, i.dtype.value_or(DType::u8), stored), name, i.blocks});
  }
  return out;
}

}  // namespace krait
