// The index of a sharded checkpoint, model.safetensors.index.json or pytorch_model.bin.index.json:
//
//   {"metadata": {"total_size": ...}, "weight_map": {"tensor": "model-00001-of-00003.safetensors"}}
//
// The metadata is informational and often wrong; only the weight_map is used.
#include <algorithm>

#include "checkpoint/parse.h"
#include "checkpoint/strict_sax.h"

namespace krait {
namespace {

class IndexReader final : public StrictSax {
 public:
  explicit IndexReader(const std::string& file) : StrictSax(file) {}

  std::map<std::string, std::string> weight_map;

  bool null() override { return skip("null"); }
  bool boolean(bool) override { return skip("a boolean"); }
  bool number_integer(number_integer_t) override { return skip("a number"); }
  bool number_unsigned(number_unsigned_t) override { return skip("a number"); }
  bool number_float(number_float_t, const string_t&) override { return skip("a number"); }
  bool string(string_t& s) override {
    if (!in_map()) return skip("a string");
    check_file_name(s);
    if (!weight_map.emplace(tensor_, s).second) fail("it twice");
    return true;
  }
  bool start_object(size_t) override { return open("an object"); }
  bool start_array(size_t) override {
    if (depth_ == 0 || (depth_ == 1 && section_ == "weight_map")) fail("an array");
    return open("an array");
  }
  bool end_object() override {
    --depth_;
    return true;
  }
  bool end_array() override { return end_object(); }
  bool key(string_t& k) override {
    if (depth_ == 1) {
      section_ = k;
      if (section_ == "weight_map" && std::exchange(has_map_, true)) fail("a second one");
    } else if (in_map()) {
      tensor_ = k;
    }
    return true;
  }

 protected:
  [[nodiscard]] std::string place() const override {
    if (depth_ == 0) return "expected the index to be one object";
    if (in_map()) return fmt::format("tensor {}: expected one file name", printable(tensor_));
    if (section_ == "weight_map") return "expected weight_map to be one object";
    return fmt::format("expected at most {} levels under {}", kMaxDepth, printable(section_));
  }

 private:
  static constexpr int kMaxDepth = 16;

  [[nodiscard]] bool in_map() const { return depth_ == 2 && section_ == "weight_map"; }
  bool skip(const char* found) const {
    if (depth_ == 0 || section_ == "weight_map") fail(found);
    return true;
  }
  bool open(const char* found) {
    if (depth_ == kMaxDepth || in_map()) fail(found);
    ++depth_;
    return true;
  }
  /// Shards lie beside the index: a name that leads elsewhere is refused.
  void check_file_name(const std::string& s) const {
    const bool plain =
        !s.empty() && s != "." && s.find("..") == std::string::npos &&
        s.find_first_of("/\\") == std::string::npos &&
        std::none_of(s.begin(), s.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
    if (!plain) fail(fmt::format("\"{}\", which is not a plain file name", printable(s)));
  }

  int depth_ = 0;
  bool has_map_ = false;
  std::string section_;
  std::string tensor_;
};

}  // namespace

std::map<std::string, std::string> parse_index(std::span<const std::byte> json,
                                               const std::string& name) {
  IndexReader reader(name);
  reader.parse(json);
  if (reader.weight_map.empty()) {
    throw Error(
        ErrorKind::format,
        fmt::format("{}: expected a weight_map that names tensors and files, found none", name));
  }
  return std::move(reader.weight_map);
}

}  // namespace krait
