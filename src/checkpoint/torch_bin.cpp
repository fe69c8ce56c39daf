// PyTorch's zip checkpoint (torch.save since 1.6): archive/data.pkl is a pickle of the state dict,
// in which each tensor names its storage archive/data/<key>, an element offset, sizes and strides.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#include "checkpoint/parse.h"
#include "checkpoint/pickle.h"
#include "checkpoint/zip.h"

namespace krait {
namespace {

using Kind = PickleValue::Kind;

/// Storage classes (before PyTorch 2) and dtypes (with UntypedStorage), in PyTorch's names.
struct TypeName {
  std::string_view name;
  std::optional<DType> dtype;  ///< none: krait has no use for the type
};
constexpr TypeName kTypes[] = {
    {"torch.FloatStorage", DType::f32},
    {"torch.HalfStorage", DType::f16},
    {"torch.BFloat16Storage", DType::bf16},
    {"torch.DoubleStorage", DType::f64},
    {"torch.LongStorage", DType::i64},
    {"torch.IntStorage", DType::i32},
    {"torch.ShortStorage", DType::i16},
    {"torch.CharStorage", DType::i8},
    {"torch.ByteStorage", DType::u8},
    {"torch.BoolStorage", DType::boolean},
    {"torch.ComplexFloatStorage", {}},
    {"torch.ComplexDoubleStorage", {}},
    {"torch.QInt8Storage", {}},
    {"torch.QUInt8Storage", {}},
    {"torch.QInt32Storage", {}},
    {"torch.float32", DType::f32},
    {"torch.float16", DType::f16},
    {"torch.bfloat16", DType::bf16},
    {"torch.float64", DType::f64},
    {"torch.int64", DType::i64},
    {"torch.int32", DType::i32},
    {"torch.int16", DType::i16},
    {"torch.int8", DType::i8},
    {"torch.uint64", DType::u64},
    {"torch.uint32", DType::u32},
    {"torch.uint16", DType::u16},
    {"torch.uint8", DType::u8},
    {"torch.bool", DType::boolean},
    {"torch.float8_e4m3fn", {}},
    {"torch.float8_e5m2", {}},
    {"torch.float8_e4m3fnuz", {}},
    {"torch.float8_e5m2fnuz", {}},
    {"torch.float8_e8m0fnu", {}},
    {"torch.complex64", {}},
    {"torch.complex128", {}},
};
constexpr std::string_view kUntyped = "torch.storage.UntypedStorage";
constexpr std::string_view kTensorV2 = "torch._utils._rebuild_tensor_v2";
constexpr std::string_view kTensorV3 = "torch._utils._rebuild_tensor_v3";
constexpr std::string_view kWrappers[] = {"torch._utils._rebuild_parameter",
                                          "torch.nn.parameter.Parameter"};

constexpr auto kGlobals = [] {
  std::array<std::string_view, std::size(kTypes) + 6> all{};
  size_t n = 0;
  for (const TypeName& t : kTypes) all[n++] = t.name;
  for (const std::string_view s : {std::string_view("collections.OrderedDict"), kUntyped, kTensorV2,
                                   kTensorV3, kWrappers[0], kWrappers[1]}) {
    all[n++] = s;
  }
  return all;
}();

class StateDict {
 public:
  StateDict(std::span<const std::byte> file, const std::string& name)
      : name_(name), file_bytes_(file.size()), zip_(parse_zip(file, name)) {}

  ParsedTensors read() {
    find_prefix();
    const auto byteorder = zip_.find(prefix_ + "byteorder");
    if (byteorder != zip_.end() && text(byteorder->second) != "little") {
      throw Error(ErrorKind::unsupported,
                  fmt::format(R"({}: expected the byte order "little", found "{}")", name_,
                              printable(text(byteorder->second))));
    }
    pickle_ = parse_pickle(plain_entry("data.pkl"), name_, kGlobals);

    const PickleValue& dict = state_dict();
    for (size_t i = 0; i < dict.items.size(); i += 2) {
      const PickleValue& key = pickle_[dict.items[i]];
      if (key.kind != Kind::text) {
        fail(fmt::format("expected tensors by name, found {} as a key", kind_name(key.kind)));
      }
      tensor_ = key.text;
      // Before the name is copied: one long name may be recalled a million times.
      if (!names_.insert(tensor_).second) fail(fmt::format("{} occurs twice", printable(tensor_)));
      out_.entries.push_back({std::string(key.text), tensor(dict.items[i + 1]), name_});
    }
    std::sort(out_.entries.begin(), out_.entries.end(),
              [](const auto& a, const auto& b) { return a.name < b.name; });
    return std::move(out_);
  }

 private:
  /// The folder that all entries share, with its slash: the one with data.pkl.
  void find_prefix() {
    constexpr std::string_view kPickle = "data.pkl";
    int found = 0;
    for (const auto& [entry, _] : zip_) {
      if (entry.ends_with(kPickle) &&
          (entry.size() == kPickle.size() || entry[entry.size() - kPickle.size() - 1] == '/')) {
        prefix_ = entry.substr(0, entry.size() - kPickle.size());
        ++found;
      }
    }
    if (found != 1) {
      fail(fmt::format("expected a zip archive with one data.pkl, found {}", found));
    }
    const auto code = zip_.lower_bound(prefix_ + "code/");
    if (zip_.contains(prefix_ + "constants.pkl") ||
        (code != zip_.end() && code->first.starts_with(prefix_ + "code/"))) {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: expected a state dict, found a TorchScript program", name_),
                  "Save the module's state_dict() with torch.save.");
    }
  }

  [[nodiscard]] std::span<const std::byte> plain_entry(const std::string& what) const {
    const auto it = zip_.find(prefix_ + what);
    if (it == zip_.end()) {
      fail(fmt::format("expected {} in the zip archive, found no such entry", printable(what)));
    }
    if (!it->second.plain) {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: expected {} to be stored as it is, found it compressed or "
                              "encrypted",
                              name_, printable(it->first)),
                  "Files saved by torch.save are not compressed; use the original.");
    }
    return it->second.data;
  }

  /// The dict of tensors: the whole pickle, or one level down in a training checkpoint.
  [[nodiscard]] const PickleValue& state_dict() const {
    const PickleValue& root = pickle_[pickle_.root];
    if (root.kind != Kind::dict) {
      fail(fmt::format("expected a dict of tensors, found {}", kind_name(root.kind)));
    }
    for (const std::string_view nested : {"state_dict", "model"}) {
      for (size_t i = 0; i < root.items.size(); i += 2) {
        const PickleValue& key = pickle_[root.items[i]];
        const PickleValue& value = pickle_[root.items[i + 1]];
        if (key.kind == Kind::text && key.text == nested && value.kind == Kind::dict) return value;
      }
    }
    return root;
  }

  Tensor tensor(uint32_t index) {
    // Arguments exist before the call that has them, so this ends.
    while (is_call(index, kWrappers[0]) || is_call(index, kWrappers[1])) {
      const auto& args = arguments(index);
      if (args.empty()) fail_tensor("expected the tensor of a parameter, found nothing");
      index = args[0];
    }
    const bool v3 = is_call(index, kTensorV3);
    if (!v3 && !is_call(index, kTensorV2)) {
      fail_tensor(fmt::format("expected a tensor, found {}", kind_name(pickle_[index].kind)));
    }
    // storage, storage_offset, size, stride, requires_grad, backward_hooks [, dtype]
    const auto& args = arguments(index);
    if (args.size() < (v3 ? 7 : 4)) fail_tensor("expected storage, offset, sizes and strides");
    const Storage storage = read_storage(args[0], v3 ? args[6] : args[0], v3);
    const int64_t offset = integer(args[1]);
    const std::vector<int64_t> sizes = integers(args[2]);
    const std::vector<int64_t> strides = integers(args[3]);
    return view(storage, offset, sizes, strides);
  }

  struct Storage {
    std::span<const std::byte> bytes;
    DType dtype = DType::f32;
    [[nodiscard]] int64_t numel() const {
      return static_cast<int64_t>(bytes.size() / itemsize(dtype));
    }
  };

  /// Persistent id: ("storage", class, key, location, number of elements). The location, such as
  /// "cuda:0", says where the tensor was, not where it is.
  [[nodiscard]] Storage read_storage(uint32_t index, uint32_t dtype, bool v3) const {
    const PickleValue& persistent = pickle_[index];
    if (persistent.kind != Kind::persistent) fail_tensor("expected a storage");
    const PickleValue& id = pickle_[persistent.items[0]];
    if (id.kind != Kind::sequence || id.items.size() != 5 ||
        pickle_[id.items[0]].text != "storage" || pickle_[id.items[1]].kind != Kind::global ||
        pickle_[id.items[2]].kind != Kind::text) {
      fail_tensor("expected a storage with class, key, location and size");
    }
    const std::string_view storage_class = pickle_[id.items[1]].text;
    const PickleValue& type = v3 ? pickle_[dtype] : pickle_[id.items[1]];
    const auto* known = std::find_if(std::begin(kTypes), std::end(kTypes),
                                     [&](const TypeName& t) { return t.name == type.text; });
    if (type.kind != Kind::global || known == std::end(kTypes)) {
      fail_tensor(fmt::format("expected an element type, found {}", printable(type.text)));
    }
    if (!known->dtype) {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: tensor {} is of type {}, which krait does not read", name_,
                              printable(tensor_), known->name));
    }
    const std::string key = "data/" + std::string(pickle_[id.items[2]].text);
    const Storage storage{plain_entry(key), *known->dtype};
    // An untyped storage counts bytes.
    const bool untyped = storage_class == kUntyped;
    const int64_t numel = integer(id.items[4]);
    const std::optional<int64_t> want =
        checked_bytes(std::span(&numel, 1), untyped ? DType::u8 : storage.dtype);
    if (want != static_cast<int64_t>(storage.bytes.size())) {
      fail_tensor(fmt::format("expected {} {} of {} in the storage {}, found {} bytes", numel,
                              untyped ? "bytes" : "elements", dtype_name(storage.dtype),
                              printable(key), storage.bytes.size()));
    }
    return storage;
  }

  Tensor view(const Storage& storage, int64_t offset, const std::vector<int64_t>& sizes,
              const std::vector<int64_t>& strides) {
    Shape shape;
    if (sizes.size() != strides.size()) fail_tensor("expected as many strides as sizes");
    for (const int64_t n : sizes) shape.push_back(n);
    const std::optional<int64_t> bytes = checked_bytes(sizes, storage.dtype);
    if (!bytes || offset < 0 || offset > storage.numel()) {
      fail_tensor(
          fmt::format("expected sizes within a storage of {} elements, found {} at offset {}",
                      storage.numel(), shape.str(), offset));
    }
    // Views are of mutable type because Tensor serves outputs too; nobody writes to weights.
    auto* base = const_cast<std::byte*>(storage.bytes.data()) +
                 static_cast<size_t>(offset) * itemsize(storage.dtype);
    if (*bytes == 0) return {base, storage.dtype, shape};

    // Last element touched: offset + sum (size_i - 1) * stride_i.
    int64_t last = offset;
    int64_t dense_stride = 1;
    bool dense = true;
    for (size_t i = sizes.size(); i-- > 0;) {
      int64_t reach = 0;
      if (strides[i] < 0 || __builtin_mul_overflow(sizes[i] - 1, strides[i], &reach) ||
          __builtin_add_overflow(last, reach, &last)) {
        fail_tensor("expected strides that stay inside the storage");
      }
      dense = dense && (sizes[i] == 1 || strides[i] == dense_stride);
      dense_stride *= sizes[i];
    }
    if (last >= storage.numel()) {
      fail_tensor(
          fmt::format("expected at most {} elements in the storage, found {} from offset {}, "
                      "which reaches element {}",
                      storage.numel(), shape.str(), offset, last));
    }
    if (dense) return {base, storage.dtype, shape};
    return gather(base, storage.dtype, shape, strides, *bytes);
  }

  /// Copies a strided view, such as a transposed matrix, into memory of its own.
  Tensor gather(std::byte* base, DType dtype, const Shape& shape,
                const std::vector<int64_t>& strides, int64_t bytes) {
    std::vector<int64_t> key = strides;
    for (int i = 0; i < shape.rank(); ++i) key.push_back(shape[i]);
    Tensor& known = gathered_[{base, dtype, key}];  // tied weights stay tied
    if (known) return known;
    // Stride 0 repeats an element any number of times: what is gathered may not pass the file's own
    // size, so that a small file cannot ask for much memory.
    gathered_bytes_ += static_cast<uint64_t>(bytes);
    if (static_cast<uint64_t>(bytes) > file_bytes_ || gathered_bytes_ > file_bytes_) {
      fail_tensor("its strides make it larger than the whole file");
    }
    std::byte* to = out_.gathered.emplace_back(static_cast<size_t>(bytes)).data();
    known = Tensor(to, dtype, shape);
    const size_t width = itemsize(dtype);
    std::array<int64_t, Shape::kMaxRank> at{};
    const int64_t numel = shape.numel();
    for (int64_t n = 0; n < numel; ++n) {
      int64_t from = 0;
      for (int i = 0; i < shape.rank(); ++i) {
        from += at[static_cast<size_t>(i)] * strides[static_cast<size_t>(i)];
      }
      std::memcpy(to + static_cast<size_t>(n) * width, base + static_cast<size_t>(from) * width,
                  width);
      for (int i = shape.rank() - 1; i >= 0 && ++at[static_cast<size_t>(i)] == shape[i]; --i) {
        at[static_cast<size_t>(i)] = 0;
      }
    }
    return known;
  }

  [[nodiscard]] bool is_call(uint32_t index, std::string_view global) const {
    const PickleValue& v = pickle_[index];
    return v.kind == Kind::call && pickle_[v.items[0]].text == global;
  }
  [[nodiscard]] const std::vector<uint32_t>& arguments(uint32_t call) const {
    return pickle_[pickle_[call].items[1]].items;
  }
  [[nodiscard]] int64_t integer(uint32_t index) const {
    const PickleValue& v = pickle_[index];
    if (v.kind != Kind::integer) {
      fail_tensor(fmt::format("expected an integer, found {}", kind_name(v.kind)));
    }
    return v.integer;
  }
  /// Sizes or strides.
  [[nodiscard]] std::vector<int64_t> integers(uint32_t index) const {
    const PickleValue& v = pickle_[index];
    if (v.kind != Kind::sequence) {
      fail_tensor(fmt::format("expected a tuple of integers, found {}", kind_name(v.kind)));
    }
    if (v.items.size() > Shape::kMaxRank) {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: tensor {} has {} dimensions, krait reads up to {}", name_,
                              printable(tensor_), v.items.size(), Shape::kMaxRank));
    }
    std::vector<int64_t> out;
    for (const uint32_t i : v.items) out.push_back(integer(i));
    return out;
  }
  static std::string_view text(const ZipEntry& e) {
    return {reinterpret_cast<const char*>(e.data.data()), e.data.size()};
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::format, fmt::format("{}: {}", name_, what));
  }
  [[noreturn]] void fail_tensor(const std::string& what) const {
    fail(fmt::format("tensor {}: {}", printable(tensor_), what));
  }

  const std::string& name_;
  uint64_t file_bytes_;
  std::map<std::string, ZipEntry> zip_;
  std::string prefix_;
  Pickle pickle_;
  std::set<std::string_view> names_;
  std::string_view tensor_;  ///< the one being read, for messages
  std::map<std::tuple<const std::byte*, DType, std::vector<int64_t>>, Tensor> gathered_;
  uint64_t gathered_bytes_ = 0;
  ParsedTensors out_;
};

/// Files of torch.save before 1.6 begin with a pickle of this number: PROTO 2, LONG1 of ten bytes.
constexpr std::string_view kLegacyMagic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19");

}  // namespace

ParsedTensors parse_torch_bin(std::span<const std::byte> file, const std::string& name) {
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  if (text.starts_with(kLegacyMagic)) {
    throw Error(
        ErrorKind::unsupported,
        fmt::format("{}: expected the zip format of PyTorch 1.6 and newer, found the older one",
                    name),
        "Load it with PyTorch and save it again, best as safetensors.");
  }
  if (!text.starts_with("PK")) {
    throw Error(ErrorKind::format,
                fmt::format("{}: expected a PyTorch checkpoint (a zip archive), found {}", name,
                            file.empty() ? "an empty file" : "a file that is no zip archive"));
  }
  return StateDict(file, name).read();
}

}  // namespace krait
