// safetensors (https://github.com/huggingface/safetensors, "Format"):
//
//   u64 n, little-endian | n bytes of JSON, first byte '{' | data
//   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__":
//   {}}
//
// Offsets count from the start of the data. Sorted by offset the tensors fill the data exactly.
#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "base/output_file.h"
#include "checkpoint/parse.h"
#include "checkpoint/strict_sax.h"

namespace krait {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // the reference's limit
constexpr std::string_view kMetadata = "__metadata__";

struct TypeName {
  std::string_view name;
  std::optional<DType> dtype;  ///< none: a type of the format that krait has no use for
};
constexpr TypeName kTypes[] = {
    {"F32", DType::f32},
    {"F16", DType::f16},
    {"BF16", DType::bf16},
    {"F64", DType::f64},
    {"I8", DType::i8},
    {"U8", DType::u8},
    {"I16", DType::i16},
    {"U16", DType::u16},
    {"I32", DType::i32},
    {"U32", DType::u32},
    {"I64", DType::i64},
    {"U64", DType::u64},
    {"BOOL", DType::boolean},
    {"F8_E4M3", {}},
    {"F8_E5M2", {}},
    {"F8_E8M0", {}},
    {"F8_E4M3FNUZ", {}},
    {"F8_E5M2FNUZ", {}},
    {"F4", {}},
    {"F6_E2M3", {}},
    {"F6_E3M2", {}},
    {"C64", {}},
};

/// One tensor as the header has it.
struct Info {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  int64_t begin = 0;
  int64_t end = 0;
};

class HeaderReader final : public StrictSax {
 public:
  explicit HeaderReader(const std::string& file) : StrictSax(file) {}

  std::vector<Info> infos;

  bool start_object(size_t) override {
    if (depth_ >= 2 || in_array_) fail("an object");
    ++depth_;
    dtype_.reset();
    dims_.reset();
    offsets_.reset();
    return true;
  }
  bool key(string_t& k) override {
    if (depth_ == 1) {
      name_ = k;
      if (name_ == kMetadata && std::exchange(has_metadata_, true)) fail("a second __metadata__");
    } else {
      field_ = k;
      if (name_ != kMetadata && field_ != "dtype" && field_ != "shape" &&
          field_ != "data_offsets") {
        fail("that field");
      }
    }
    return true;
  }
  bool string(string_t& s) override {
    if (depth_ != 2 || in_array_) fail("a string");
    if (name_ == kMetadata) return true;  // informational; nothing in krait depends on it
    if (field_ != "dtype" || dtype_) fail(fmt::format("\"{}\"", printable(s)));
    dtype_ = s;
    return true;
  }
  bool start_array(size_t) override {
    auto& target = field_ == "shape" ? dims_ : offsets_;
    if (depth_ != 2 || in_array_ || name_ == kMetadata || field_ == "dtype" || target) {
      fail("an array");
    }
    target.emplace();
    in_array_ = true;
    return true;
  }
  bool end_array() override {
    in_array_ = false;
    return true;
  }
  bool number_unsigned(number_unsigned_t v) override {
    if (!in_array_ || v > INT64_MAX) fail(fmt::format("the number {}", v));
    auto& target = field_ == "shape" ? *dims_ : *offsets_;
    if (field_ == "data_offsets" && target.size() == 2) fail("more");
    target.push_back(static_cast<int64_t>(v));
    return true;
  }
  bool end_object() override {
    if (depth_-- == 2 && name_ != kMetadata) add();
    return true;
  }

 protected:
  [[nodiscard]] std::string place() const override {
    if (depth_ == 0) return "expected the header to be one object";
    if (depth_ == 1) return fmt::format("tensor {}: expected an object", printable(name_));
    if (name_ == kMetadata) return "expected __metadata__ to map strings to strings, once";
    if (field_ == "dtype")
      return fmt::format("tensor {}: expected one type name", printable(name_));
    if (field_ == "shape" || field_ == "data_offsets") {
      return fmt::format("tensor {}: expected {} to be one array of {}", printable(name_), field_,
                         field_ == "shape" ? "sizes" : "two offsets");
    }
    return fmt::format("tensor {}: expected dtype, shape and data_offsets at \"{}\"",
                       printable(name_), printable(field_));
  }

 private:
  void add() {
    const auto corrupt = [&](const std::string& what) {
      return Error(ErrorKind::format,
                   fmt::format("{}: tensor {}: {}", where_, printable(name_), what));
    };
    if (!dtype_ || !dims_ || !offsets_ || offsets_->size() != 2) {
      throw corrupt("expected dtype, shape and two data_offsets, found only a part of them");
    }
    const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                    [&](const TypeName& t) { return t.name == *dtype_; });
    if (type == std::end(kTypes)) {
      throw corrupt(fmt::format("expected a type of safetensors, found {}", printable(*dtype_)));
    }
    if (!type->dtype) {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: tensor {} is of type {}, which krait does "
                              "not read",
                              where_, printable(name_), *dtype_));
    }
    Info info{name_, *type->dtype, {}, (*offsets_)[0], (*offsets_)[1]};
    if (dims_->size() > Shape::kMaxRank) {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: tensor {} has {} dimensions, krait reads up to {}", where_,
                              printable(name_), dims_->size(), Shape::kMaxRank));
    }
    for (const int64_t d : *dims_) info.shape.push_back(d);
    const std::optional<int64_t> want = checked_bytes(*dims_, info.dtype);
    if (!want || info.end < info.begin || info.end - info.begin != *want) {
      throw corrupt(
          fmt::format("expected data_offsets that span the {} bytes of {} {}, found [{}, "
                      "{}]",
                      want ? std::to_string(*want) : "more than 2^63", *dtype_, info.shape.str(),
                      info.begin, info.end));
    }
    infos.push_back(std::move(info));
  }

  int depth_ = 0;
  bool in_array_ = false;
  bool has_metadata_ = false;
  std::string name_;
  std::string field_;
  std::optional<std::string> dtype_;
  std::optional<std::vector<int64_t>> dims_;
  std::optional<std::vector<int64_t>> offsets_;
};

}  // namespace

ParsedTensors parse_safetensors(std::span<const std::byte> file, const std::string& name) {
  const auto corrupt = [&](const std::string& what) {
    return Error(ErrorKind::format, fmt::format("{}: {}", name, what),
                 "The file is damaged or its download is incomplete.");
  };
  uint64_t n = 0;
  if (file.size() < sizeof n) {
    throw corrupt(fmt::format("expected a safetensors file, found {} bytes", file.size()));
  }
  std::memcpy(&n, file.data(), sizeof n);
  if (n > kMaxHeader) {
    throw corrupt(fmt::format("expected a header of at most {} bytes, found {}", kMaxHeader, n));
  }
  if (n > file.size() - sizeof n) {
    throw corrupt(fmt::format("expected a header of {} bytes, found {} in the file", n,
                              file.size() - sizeof n));
  }
  const auto header = file.subspan(sizeof n, n);
  const auto data = file.subspan(sizeof n + n);
  if (header.empty() || header[0] != std::byte{'{'}) {
    throw corrupt("expected a header that begins with '{'");
  }
  HeaderReader reader(name);
  reader.parse(header);

  // In the order of the data each tensor begins where the one before it ends.
  std::vector<Info>& infos = reader.infos;
  std::sort(infos.begin(), infos.end(), [](const Info& a, const Info& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  int64_t end = 0;
  for (const Info& i : infos) {
    if (i.begin != end) {
      throw corrupt(fmt::format("tensor {}: expected its data at offset {}, found {}, which {}",
                                printable(i.name), end, i.begin,
                                i.begin < end ? "overlaps another tensor" : "leaves a hole"));
    }
    end = i.end;
  }
  if (static_cast<uint64_t>(end) != data.size()) {
    throw corrupt(fmt::format("expected {} bytes of data, found {}", end, data.size()));
  }

  std::sort(infos.begin(), infos.end(),
            [](const Info& a, const Info& b) { return a.name < b.name; });
  ParsedTensors out;
  for (Info& i : infos) {
    if (!out.entries.empty() && out.entries.back().name == i.name) {
      throw corrupt(fmt::format("tensor {} occurs twice", printable(i.name)));
    }
    // Views are of mutable type because Tensor serves outputs too; nobody writes to weights.
    auto* p = const_cast<std::byte*>(data.data()) + i.begin;
    out.entries.push_back({std::move(i.name), Tensor(p, i.dtype, i.shape), name});
  }
  return out;
}

void write_safetensors(const std::filesystem::path& file,
                       const std::vector<Checkpoint::Entry>& tensors) {
  std::vector<OutputTensor> out;
  out.reserve(tensors.size());
  for (const Checkpoint::Entry& e : tensors) {
    const Tensor& t = e.tensor;
    if (!t.dense()) {
      throw Error(ErrorKind::runtime, fmt::format("cannot write {}: the tensor {} is not dense",
                                                  file.string(), printable(e.name)));
    }
    out.push_back({e.name, t.dtype, t.shape, [t](const OutputTensor::Sink& sink) {
                     sink({static_cast<const std::byte*>(t.data), t.bytes()});
                   }});
  }
  write_safetensors(file, out);
}

void write_safetensors(const std::filesystem::path& file,
                       const std::vector<OutputTensor>& tensors) {
  const auto refuse = [&](const OutputTensor& t, const char* why) {
    throw Error(ErrorKind::runtime, fmt::format("cannot write {}: the tensor {} {}", file.string(),
                                                printable(t.name), why));
  };
  std::vector<const OutputTensor*> order;
  order.reserve(tensors.size());
  for (const auto& t : tensors) order.push_back(&t);
  std::sort(order.begin(), order.end(),
            [](const auto* a, const auto* b) { return a->name < b->name; });
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i]->name == kMetadata) refuse(*order[i], "has a reserved name");
    if (i > 0 && order[i]->name == order[i - 1]->name) refuse(*order[i], "occurs twice");
  }
  // As the reference writes: wider types first, so that every tensor is aligned, then by name.
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return itemsize(a->dtype) > itemsize(b->dtype);
  });
  // "pt" is what Hugging Face's loader insists on finding here.
  std::string json = R"({"__metadata__":{"format":"pt"})";
  int64_t end = 0;
  for (const auto* t : order) {
    const int64_t begin = end;
    end += static_cast<int64_t>(t->bytes());
    std::vector<int64_t> dims;
    dims.reserve(Shape::kMaxRank);
    for (int i = 0; i < t->shape.rank(); ++i) dims.push_back(t->shape[i]);
    const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                    [&](const TypeName& n) { return n.dtype == t->dtype; });
    const nlohmann::ordered_json info = {
        {"dtype", type->name}, {"shape", dims}, {"data_offsets", {begin, end}}};
    // A name that is not UTF-8 cannot stand in JSON: its bad bytes are replaced.
    json += fmt::format(
        ",{}:{}",
        nlohmann::json(t->name).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace),
        info.dump());
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');  // the data begins at a multiple of 8

  OutputFile out(file);
  const uint64_t n = json.size();
  out.write(std::as_bytes(std::span(&n, 1)));
  out.write(std::as_bytes(std::span(json)));
  for (const auto* t : order) write_tensor(*t, out);
  out.commit();
}

}  // namespace krait
