// The safetensors reader and writer: golden files, and every kind of damage.
#include <gtest/gtest.h>

#include <cstring>

#include "base/mapped_file.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/parse.h"
#include "support/checkpoint_bytes.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

namespace fs = std::filesystem;

std::span<const std::byte> bytes_of(const std::string& s) { return std::as_bytes(std::span(s)); }

ParsedTensors parse(const std::string& file) { return parse_safetensors(bytes_of(file), "f"); }

/// The error that a header gives, with `data` bytes behind it.
::testing::AssertionResult refused(const std::string& header, size_t data, const std::string& part,
                                   ErrorKind kind = ErrorKind::format) {
  const std::string file = safetensors(header, std::string(data, '\0'));
  return throws(kind, part, [&] { (void)parse(file); });
}

TEST(Safetensors, ReadsGoldenModel) {
  const auto checkpoint =
      open_safetensors(data_dir() / "golden/models/mamba1-hf/model.safetensors");
  EXPECT_EQ(checkpoint->format(), "safetensors");
  const auto* e = checkpoint->find("backbone.embeddings.weight");
  ASSERT_NE(e, nullptr);
  EXPECT_EQ(e->tensor.dtype, DType::f32);
  EXPECT_EQ(e->tensor.shape, (Shape{512, 64}));
  EXPECT_EQ(e->file, "model.safetensors");
  EXPECT_EQ(checkpoint->find("backbone.embeddings"), nullptr);
  EXPECT_EQ(checkpoint->find("zzz"), nullptr);
  for (size_t i = 1; i < checkpoint->entries().size(); ++i) {
    EXPECT_LT(checkpoint->entries()[i - 1].name, checkpoint->entries()[i].name);
  }
}

TEST(Safetensors, ReadsExpectedTensorsOfGoldenModel) {
  const auto checkpoint =
      open_checkpoint(data_dir() / "golden/models/mamba1-hf/expected.safetensors");
  const auto* greedy = checkpoint->find("greedy_17");
  ASSERT_NE(greedy, nullptr);
  EXPECT_EQ(greedy->tensor.dtype, DType::i64);
  EXPECT_EQ(greedy->tensor.shape, Shape{48});
  const auto* logits = checkpoint->find("logits_17");
  ASSERT_NE(logits, nullptr);
  EXPECT_EQ(logits->tensor.shape, (Shape{17, 512}));
}

TEST(Safetensors, ViewsTheFileWithoutCopy) {
  const std::string file = safetensors(R"({"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                       R"("a":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})",
                                       float_bytes({1.5F, -2.0F}) + "xyz");
  const ParsedTensors t = parse(file);
  ASSERT_EQ(t.entries.size(), 2U);
  EXPECT_TRUE(t.gathered.empty());
  EXPECT_EQ(t.entries[0].name, "a");
  EXPECT_EQ(t.entries[0].tensor.data, file.data() + file.size() - 3);
  EXPECT_EQ(t.entries[1].tensor.data, file.data() + file.size() - 11);
}

TEST(Safetensors, AcceptsScalarsEmptyTensorsMetadataAndSpaces) {
  const ParsedTensors t =
      parse(safetensors(R"({"__metadata__":{"format":"pt","dtype":"x"},)"
                        R"("s":{"dtype":"F64","shape":[],"data_offsets":[0,8]},)"
                        R"("e":{"shape":[4,0],"data_offsets":[8,8],"dtype":"BF16"}}     )",
                        std::string(8, '\0')));
  ASSERT_EQ(t.entries.size(), 2U);
  EXPECT_EQ(t.entries[0].tensor.numel(), 0);
  EXPECT_EQ(t.entries[1].tensor.shape.rank(), 0);
  EXPECT_EQ(t.entries[1].tensor.numel(), 1);
  EXPECT_TRUE(parse(safetensors("{}", "")).entries.empty());
}

TEST(Safetensors, ReadsEveryTypeOfKrait) {
  for (const auto& [name, type] :
       std::vector<std::pair<std::string, DType>>{{"F32", DType::f32},
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
                                                  {"BOOL", DType::boolean}}) {
    const size_t n = 3 * itemsize(type);
    const auto t = parse(safetensors(fmt::format(R"({{"t":{{"dtype":"{}","shape":[3],)"
                                                 R"("data_offsets":[0,{}]}}}})",
                                                 name, n),
                                     std::string(n, '\1')));
    ASSERT_EQ(t.entries.size(), 1U);
    EXPECT_EQ(t.entries[0].tensor.dtype, type) << name;
  }
}

TEST(Safetensors, NamesTensorAndTypeItDoesNotRead) {
  EXPECT_TRUE(refused(R"({"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}})", 2,
                      "tensor w is of type F8_E4M3", ErrorKind::unsupported));
  EXPECT_TRUE(refused(R"({"w":{"dtype":"F33","shape":[2],"data_offsets":[0,2]}})", 2,
                      "expected a type of safetensors, found F33"));
  EXPECT_TRUE(refused(R"({"w":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[0,1]}})", 1,
                      "5 dimensions", ErrorKind::unsupported));
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string file = safetensors(
      R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})", std::string(24, '\0'));
  EXPECT_EQ(parse(file).entries.size(), 1U);
  for (size_t n = 0; n < file.size(); ++n) {
    EXPECT_TRUE(throws(ErrorKind::format, "f: ", [&] { (void)parse(file.substr(0, n)); })) << n;
  }
  EXPECT_TRUE(throws(ErrorKind::format, "expected 24 bytes of data, found 25",
                     [&] { (void)parse(file + '\0'); }));
}

TEST(Safetensors, RefusesHeaderSizesThatLie) {
  EXPECT_TRUE(
      throws(ErrorKind::format, "at most 100000000", [] { (void)parse(le(UINT64_MAX) + "{}"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "at most 100000000",
                     [] { (void)parse(le(uint64_t{100'000'001}) + "{}"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "expected a header of 90000000 bytes, found 2",
                     [] { (void)parse(le(uint64_t{90'000'000}) + "{}"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "begins with '{'", [] { (void)parse(le(uint64_t{0})); }));
  EXPECT_TRUE(refused(" {}", 0, "begins with '{'"));
}

TEST(Safetensors, RefusesBrokenJson) {
  EXPECT_TRUE(refused("{", 0, "JSON is not valid"));
  EXPECT_TRUE(refused("{}{}", 0, "JSON is not valid"));
  EXPECT_TRUE(refused(R"({"a":)" + std::string(100'000, '['), 0, "tensor a"));
  EXPECT_TRUE(refused(R"({"a":{"shape":)" + std::string(100'000, '['), 0, "shape"));
  EXPECT_TRUE(refused(R"({"a":{"b":{}}})", 0, "tensor a"));
  EXPECT_TRUE(refused(std::string("{}\0 ", 4), 0, "a zero byte"));
  EXPECT_TRUE(refused("{\"a\xff\":{}}", 0, "JSON is not valid"));
  EXPECT_TRUE(refused(R"({"a":1})", 0, "tensor a: expected an object, found the number 1"));
  EXPECT_TRUE(refused(R"({"a":null})", 0, "found null"));
  EXPECT_TRUE(refused(R"({"__metadata__":{"a":1}})", 0, "__metadata__"));
  EXPECT_TRUE(refused(R"({"__metadata__":{"a":{}}})", 0, "__metadata__"));
  EXPECT_TRUE(refused(R"({"__metadata__":{"a":["x"]}})", 0, "__metadata__"));
  EXPECT_TRUE(refused(R"({"__metadata__":{},"__metadata__":{}})", 0, "__metadata__"));
}

TEST(Safetensors, RefusesWrongFields) {
  EXPECT_TRUE(refused(R"({"a":{}})", 0, "tensor a: expected dtype, shape and two data_offsets"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[1]}})", 1, "only a part"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "only a part"));
  EXPECT_TRUE(
      refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}})", 1, "two offsets"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "-1"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, "1.5"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}})", 1, "shape"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1, "shape"));
  EXPECT_TRUE(
      refused(R"({"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}})", 1, "type name"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1,
                      "one type name"));
  EXPECT_TRUE(
      refused(R"({"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})", 1, "shape"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"stride":[1]}})", 1,
                      "stride"));
}

TEST(Safetensors, RefusesSizesThatDoNotMatch) {
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,7]}})", 7,
                      "span the 8 bytes of F32 [2], found [0, 7]"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "[8, 0]"));
  // Products that wrap around 64 bits to the right number of bytes.
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],)"
                      R"("data_offsets":[0,0]}})",
                      0, "more than 2^63"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[4611686018427387905],)"
                      R"("data_offsets":[0,4]}})",
                      4, "more than 2^63"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[18446744073709551615],)"
                      R"("data_offsets":[0,4]}})",
                      4, "18446744073709551615"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[1],)"
                      R"("data_offsets":[9223372036854775806,9223372036854775807]}})",
                      1, "leaves a hole"));
}

TEST(Safetensors, RefusesOverlapsHolesAndRepeats) {
  const auto two = [](const char* a, const char* b, const char* name_b = "b") {
    return fmt::format(
        R"({{"a":{{"dtype":"U8","shape":[4],"data_offsets":{}}},"{}":{{"dtype":"U8","shape":[4],"data_offsets":{}}}}})",
        a, name_b, b);
  };
  EXPECT_TRUE(refused(two("[0,4]", "[0,4]"), 4, "overlaps"));
  EXPECT_TRUE(refused(two("[0,4]", "[3,7]"), 7, "overlaps"));
  EXPECT_TRUE(refused(two("[0,4]", "[5,9]"), 9, "leaves a hole"));
  EXPECT_TRUE(refused(two("[1,5]", "[5,9]"), 9, "leaves a hole"));
  EXPECT_TRUE(refused(two("[0,4]", "[4,8]"), 7, "expected 8 bytes of data, found 7"));
  EXPECT_TRUE(refused(two("[0,4]", "[4,8]", "a"), 8, "tensor a occurs twice"));
}

TEST(Safetensors, MessagesCarryNoControlCharacters) {
  const std::string name = R"(\u001b[2J)" + std::string(100'000, 'n');
  try {
    (void)parse(safetensors("{\"" + name + "\":1}", ""));
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.message().find('\x1b'), std::string::npos);
    EXPECT_LT(e.message().size(), 400U);
  }
}

TEST(Safetensors, WriterRoundTripsEveryTypeAligned) {
  const ScratchDir dir;
  std::string data(64, '\0');
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 7);
  std::vector<Checkpoint::Entry> tensors;
  for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
    const auto type = static_cast<DType>(i);
    tensors.push_back({fmt::format("t\"{}\u00e9", dtype_name(type)),
                       Tensor(data.data() + i, type, Shape{1, 3}), ""});
  }
  tensors.push_back({"scalar", Tensor(data.data(), DType::f32, Shape{}), ""});
  tensors.push_back({"empty", Tensor(data.data(), DType::f16, Shape{0, 5}), ""});
  const fs::path file = dir.path() / "out.safetensors";
  write_safetensors(file, tensors);

  const auto read = open_safetensors(file);
  ASSERT_EQ(read->entries().size(), tensors.size());
  const std::string raw = read_file(file);
  const auto* start = static_cast<const char*>(read->find("t\"i64\u00e9")->tensor.data);
  for (const auto& t : tensors) {
    const auto* got = read->find(t.name);
    ASSERT_NE(got, nullptr) << t.name;
    EXPECT_EQ(got->tensor.dtype, t.tensor.dtype);
    EXPECT_EQ(got->tensor.shape, t.tensor.shape);
    EXPECT_EQ(std::memcmp(got->tensor.data, t.tensor.data, t.tensor.bytes()), 0) << t.name;
    // Relative to an 8-byte tensor, which is aligned as the data itself is.
    const auto at = static_cast<const char*>(got->tensor.data) - start;
    EXPECT_EQ(at % static_cast<std::ptrdiff_t>(itemsize(t.tensor.dtype)), 0) << t.name;
  }
  uint64_t header = 0;
  std::memcpy(&header, raw.data(), sizeof header);
  EXPECT_EQ(header % 8, 0U);
  EXPECT_NE(raw.find(R"("__metadata__":{"format":"pt"})"), std::string::npos);
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path()), {}), 1) << "a temporary file is left";
}

TEST(Safetensors, WriterReplacesAFileThatIsMapped) {
  const ScratchDir dir;
  const fs::path file = dir.path() / "a.safetensors";
  float one = 1;
  float two = 2;
  write_safetensors(file, {{"x", Tensor(&one, DType::f32, Shape{1}), ""}});
  const auto old = open_safetensors(file);
  write_safetensors(file, {{"x", Tensor(&two, DType::f32, Shape{1}), ""}});
  EXPECT_EQ(*old->find("x")->tensor.as<float>(), 1.0F);
  EXPECT_EQ(*open_safetensors(file)->find("x")->tensor.as<float>(), 2.0F);
}

TEST(Safetensors, WriterRefusesAndLeavesNothing) {
  const ScratchDir dir;
  float x[4] = {};
  const Tensor t(x, DType::f32, Shape{2, 2});
  const fs::path file = dir.path() / "a.safetensors";
  EXPECT_TRUE(throws(ErrorKind::runtime, "x occurs twice", [&] {
    write_safetensors(file, {{"x", t, ""}, {"x", t, ""}});
  }));
  EXPECT_TRUE(throws(ErrorKind::runtime, "x is not dense", [&] {
    write_safetensors(file, {{"x", t.columns(0, 1), ""}});
  }));
  EXPECT_TRUE(throws(ErrorKind::runtime, "reserved", [&] {
    write_safetensors(file, {{"__metadata__", t, ""}});
  }));
  EXPECT_TRUE(throws(ErrorKind::file, "cannot write", [&] {
    write_safetensors(dir.path() / "no/such/folder", {{"x", t, ""}});
  }));
  // A folder in the place of the file: the rename fails and the temporary file goes.
  fs::create_directories(file / "inside");
  EXPECT_TRUE(throws(ErrorKind::file, "a.safetensors", [&] {
    write_safetensors(file, {{"x", t, ""}});
  }));
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path()), {}), 1);
}

}  // namespace
}  // namespace krait::test
