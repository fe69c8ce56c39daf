// The GGUF reader: well-formed files, and every kind of damage.
#include "checkpoint/gguf.h"

#include <gtest/gtest.h>

#include <cmath>

#include "checkpoint/ggml_blocks.h"
#include "support/checkpoint_bytes.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

namespace g = gguf;

ParsedGguf parse(const std::string& file) {
  return parse_gguf(std::as_bytes(std::span(file)), "f.gguf");
}

::testing::AssertionResult refused(const std::string& file, const std::string& part,
                                   ErrorKind kind = ErrorKind::format) {
  return throws(kind, part, [&] { (void)parse(file); });
}

/// A file of one tensor of that type.
std::string one_tensor(uint32_t type, const std::vector<uint64_t>& dims, size_t bytes) {
  return g::file({}, {g::tensor("t", dims, type, 0)}, std::string(bytes, '\0'));
}

constexpr uint32_t kF32 = 0;
constexpr uint32_t kQ8 = 8;
constexpr uint32_t kQ4K = 12;

TEST(Gguf, ReadsMetadataOfEveryType) {
  const std::string file = g::file(
      {g::key("u8", 0, le(uint8_t{200})), g::key("i8", 1, le(int8_t{-5})),
       g::key("u16", 2, le(uint16_t{65535})), g::key("i16", 3, le(int16_t{-300})),
       g::key("u32", 4, le(uint32_t{4000000000U})), g::key("i32", 5, le(int32_t{-7})),
       g::key("f32", 6, le(1.5F)), g::key("bool", 7, le(uint8_t{1})), g::key("text", "hello"),
       g::key("u64", 10, le(uint64_t{1} << 40)), g::key("i64", 11, le(int64_t{-1})),
       g::key("f64", 12, le(0.1)), g::array("texts", 8, 2, g::text("a") + g::text("")),
       g::array("ints", 5, 3, le(int32_t{1}) + le(int32_t{-2}) + le(int32_t{3})),
       g::array("floats", 6, 2, le(0.5F) + le(-1.0F)), g::array("none", 8, 0, "")},
      {}, "");
  const ParsedGguf p = parse(file);
  const GgufMetadata& m = p.metadata;
  EXPECT_EQ(m.integer("u8"), 200);
  EXPECT_EQ(m.integer("i8"), -5);
  EXPECT_EQ(m.integer("u16"), 65535);
  EXPECT_EQ(m.integer("i16"), -300);
  EXPECT_EQ(m.integer("u32"), 4000000000);
  EXPECT_EQ(m.integer("i32"), -7);
  EXPECT_EQ(m.number("f32"), 1.5);
  EXPECT_EQ(m.boolean("bool"), true);
  EXPECT_EQ(m.text("text"), "hello");
  EXPECT_EQ(m.integer("u64"), int64_t{1} << 40);
  EXPECT_EQ(m.integer("i64"), -1);
  EXPECT_EQ(m.number("f64"), 0.1);
  EXPECT_EQ(m.number("i32"), -7.0);
  EXPECT_EQ(m.texts("texts"), (std::vector<std::string_view>{"a", ""}));
  EXPECT_EQ(m.integers("ints"), (std::vector<int64_t>{1, -2, 3}));
  EXPECT_EQ(m.numbers("floats"), (std::vector<float>{0.5F, -1.0F}));
  EXPECT_TRUE(m.texts("none").empty());
  EXPECT_EQ(m.all().size(), 16U);

  EXPECT_EQ(m.integer("absent"), std::nullopt);
  EXPECT_TRUE(m.texts("absent").empty());
  EXPECT_TRUE(throws(ErrorKind::format, "f.gguf: text: expected an integer, found string \"hello\"",
                     [&] { (void)m.integer("text"); }));
  EXPECT_TRUE(throws(ErrorKind::format,
                     "floats: expected an array of strings, found an array of 2 f32",
                     [&] { (void)m.texts("floats"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "u8: expected a string, found u8 200",
                     [&] { (void)m.text("u8"); }));
}

TEST(Gguf, ReadsTensorsWithTheirDimensionsReversed) {
  for (const uint32_t version : {2U, 3U}) {
    const std::string file =
        g::file({g::key("general.architecture", "mamba")},
                {g::tensor("b", {3, 2}, kF32, 64), g::tensor("a", {64, 2}, kQ8, 96),
                 g::tensor("c", {5}, 1, 0), g::tensor("d", {2, 1, 3}, 30, 32)},
                std::string(96 + 4 * 34, '\1'), 32, version);
    const ParsedGguf p = parse(file);
    const auto& e = p.tensors.entries;
    ASSERT_EQ(e.size(), 4U);
    EXPECT_EQ(e[0].name, "a");
    ASSERT_NE(e[0].blocks, nullptr);
    EXPECT_EQ(e[0].type_name(), "Q8_0");
    EXPECT_EQ(e[0].shape(), (Shape{2, 64}));
    EXPECT_EQ(e[0].tensor.dtype, DType::u8);
    EXPECT_EQ(e[0].tensor.shape, (Shape{2, 68}));
    EXPECT_EQ(e[1].name, "b");
    EXPECT_EQ(e[1].blocks, nullptr);
    EXPECT_EQ(e[1].shape(), (Shape{2, 3}));
    EXPECT_EQ(e[1].tensor.data, file.data() + file.size() - 96 - 4 * 34 + 64);
    EXPECT_EQ(e[2].tensor.dtype, DType::f16);
    EXPECT_EQ(e[2].type_name(), "f16");
    EXPECT_EQ(e[3].tensor.dtype, DType::bf16);
    EXPECT_EQ(e[3].shape(), (Shape{3, 1, 2}));
  }
}

TEST(Gguf, ReadsWhatLlamaCppWrote) {
  const auto checkpoint = open_gguf(data_dir() / "golden/models/mamba1-neox-vocab/model-q8_0.gguf");
  EXPECT_EQ(checkpoint->format(), "gguf");
  EXPECT_EQ(checkpoint->entries().size(), 22U);
  EXPECT_EQ(checkpoint->find("blk.1.ssm_in.weight")->shape(), (Shape{128, 32}));
  EXPECT_EQ(checkpoint->metadata()->text("general.architecture"), "mamba");
  EXPECT_EQ(checkpoint->metadata()->texts("tokenizer.ggml.tokens").size(), 50280U);
}

TEST(Gguf, HonoursTheAlignment) {
  const std::string key = g::key("general.alignment", 64);
  const auto file = [&](uint64_t second) {
    return g::file({key}, {g::tensor("a", {1}, kF32, 0), g::tensor("b", {1}, kF32, second)},
                   std::string(68, '\0'), 64);
  };
  EXPECT_EQ(parse(file(64)).tensors.entries.size(), 2U);
  EXPECT_TRUE(
      refused(file(32), "tensor b: expected its data at offset 64, found 32, which overlaps"));
  EXPECT_TRUE(refused(g::file({g::key("general.alignment", 24)}, {}, ""),
                      "general.alignment: expected a power of two up to 2^20, found u32 24"));
  EXPECT_TRUE(refused(g::file({g::key("general.alignment", 0U)}, {}, ""), "general.alignment"));
  EXPECT_TRUE(refused(g::file({g::key("general.alignment", 5, le(int32_t{-32}))}, {}, ""),
                      "general.alignment"));
}

TEST(Gguf, AcceptsPaddingAtTheEndAndNothingElse) {
  EXPECT_EQ(parse(one_tensor(kF32, {3}, 12)).tensors.entries.size(), 1U);
  EXPECT_EQ(parse(one_tensor(kF32, {3}, 32)).tensors.entries.size(), 1U);
  EXPECT_TRUE(refused(one_tensor(kF32, {3}, 33), "expected 12 bytes of data, found 33"));
  EXPECT_EQ(parse(one_tensor(kF32, {0, 4}, 0)).tensors.entries[0].shape().numel(), 0);
  EXPECT_EQ(parse(one_tensor(kF32, {}, 4)).tensors.entries[0].shape().rank(), 0);
}

TEST(Gguf, RefusesWhatIsNoGguf) {
  EXPECT_TRUE(refused("", "expected a GGUF file, found an empty file"));
  EXPECT_TRUE(refused("GGU", "does not begin with"));
  EXPECT_TRUE(refused("GGML\3\0\0\0", "does not begin with"));
  EXPECT_TRUE(
      refused(g::file({}, {}, "", 32, 1), "version 2 or 3, found 1", ErrorKind::unsupported));
  EXPECT_TRUE(
      refused(g::file({}, {}, "", 32, 4), "version 2 or 3, found 4", ErrorKind::unsupported));
  EXPECT_TRUE(refused(g::file({}, {}, "", 32, 0x03000000U), "big-endian", ErrorKind::unsupported));
  EXPECT_TRUE(refused(g::file({g::key("split.count", 2, le(uint16_t{3}))}, {}, ""),
                      "one of 3 parts", ErrorKind::unsupported));
}

TEST(Gguf, RefusesEveryTruncation) {
  const std::string file = g::file({g::key("k", "value"), g::array("a", 8, 1, g::text("x"))},
                                   {g::tensor("t", {2}, kF32, 0)}, std::string(8, '\0'));
  ASSERT_EQ(parse(file).tensors.entries.size(), 1U);
  for (size_t n = 0; n < file.size(); ++n) {
    EXPECT_TRUE(refused(file.substr(0, n), "expected")) << n;
  }
}

TEST(Gguf, RefusesHugeCounts) {
  const auto header = [](uint64_t tensors, uint64_t keys) {
    return "GGUF" + le(uint32_t{3}) + le(tensors) + le(keys);
  };
  EXPECT_TRUE(refused(header(UINT64_MAX, 0), "found the end of the file"));
  EXPECT_TRUE(refused(header(0, UINT64_MAX), "found the end of the file"));
  EXPECT_TRUE(refused(header(0, 1) + le(UINT64_MAX), "a key of at most 65535 bytes"));
  EXPECT_TRUE(
      refused(g::file({g::key("k", 8, le(UINT64_MAX))}, {}, ""), "found the end of the file"));
  for (const uint32_t type : {0U, 4U, 8U, 9U, 12U}) {
    for (const uint64_t n : {UINT64_MAX, UINT64_MAX / 4 + 1, uint64_t{1} << 61}) {
      EXPECT_TRUE(
          refused(g::file({g::array("k", type, n, "")}, {}, ""), "found the end of the file"))
          << type;
    }
  }
}

TEST(Gguf, RefusesBadMetadata) {
  EXPECT_TRUE(refused(g::file({g::key("k", 13, "")}, {}, ""), "expected a type of metadata"));
  EXPECT_TRUE(refused(g::file({g::key("k", 7, "\2")}, {}, ""), "0 or 1 as a boolean"));
  EXPECT_TRUE(
      refused(g::file({g::key("k", 1U), g::key("k", "x")}, {}, ""), "the key k occurs twice"));
  std::string nested;
  for (int i = 0; i < 5; ++i) nested += le(uint32_t{9}) + le(uint64_t{1});
  EXPECT_TRUE(refused(g::file({g::key("k", 9, nested)}, {}, ""), "nested deeper"));
}

TEST(Gguf, RefusesBadTensors) {
  EXPECT_TRUE(refused(one_tensor(kF32, {1, 1, 1, 1, 1}, 4), "at most 4 dimensions, found 5"));
  EXPECT_TRUE(refused(one_tensor(kF32, {UINT64_MAX}, 4), "sizes below 2^63"));
  EXPECT_TRUE(refused(one_tensor(kF32, {1U << 31U, 1U << 31U, 4}, 4), "sizes that fit"));
  EXPECT_TRUE(refused(one_tensor(kF32, {0, uint64_t{1} << 62, 4}, 0), "sizes that fit"));
  EXPECT_TRUE(refused(one_tensor(kQ4K, {uint64_t{1} << 61}, 4), "sizes that fit"));
  // Found by fuzzing: the bytes of the blocks overflowed before the elements were looked at.
  EXPECT_TRUE(refused(one_tensor(kQ8, {uint64_t{0x7ffd877a24d20000}}, 4), "sizes that fit"));
  EXPECT_TRUE(
      refused(one_tensor(kF32, {3}, 11), "expected 12 bytes of data at offset 0, found 11"));
  EXPECT_TRUE(refused(one_tensor(kQ8, {48}, 51), "whole blocks of 32 elements (Q8_0), found [48]"));
  EXPECT_TRUE(refused(one_tensor(kQ4K, {128, 2}, 144), "whole blocks of 256 elements"));
  EXPECT_TRUE(refused(one_tensor(kQ8, {}, 34), "whole blocks of 32 elements"));
  EXPECT_TRUE(refused(one_tensor(20, {32}, 18),
                      "tensor t is of type IQ4_NL, which krait does not read",
                      ErrorKind::unsupported));
  EXPECT_TRUE(refused(one_tensor(4, {32}, 18), "type number 4", ErrorKind::unsupported));

  const auto two = [](const std::string& name, uint64_t first, uint64_t second) {
    return g::file({}, {g::tensor("a", {8}, kF32, first), g::tensor(name, {8}, kF32, second)},
                   std::string(96, '\0'));
  };
  EXPECT_TRUE(refused(two("b", 0, 0), "which overlaps"));
  EXPECT_TRUE(refused(two("b", 0, 16), "which overlaps"));
  EXPECT_TRUE(refused(two("b", 0, 64), "which leaves a hole"));
  EXPECT_TRUE(refused(two("b", 32, 64), "which leaves a hole"));
  EXPECT_TRUE(refused(two("b", 0, UINT64_MAX - 31), "which leaves a hole"));
  EXPECT_TRUE(refused(g::file({}, {g::tensor("a", {8}, kF32, 0), g::tensor("a", {8}, kF32, 32)},
                              std::string(64, '\0')),
                      "tensor a occurs twice"));
}

}  // namespace
}  // namespace krait::test
