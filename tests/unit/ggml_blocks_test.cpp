// Quantised blocks against the values that the gguf Python package gives them
// (tools/gguf/write_golden_blocks.py), bit for bit.
#include "checkpoint/ggml_blocks.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstring>

#include "checkpoint/checkpoint.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

class GgmlBlocks : public ::testing::TestWithParam<const char*> {};

TEST_P(GgmlBlocks, ValuesAreThoseOfTheReferenceBitForBit) {
  const std::string name = GetParam();
  const auto golden = open_safetensors(data_dir() / "golden/gguf/blocks.safetensors");
  const Tensor& blocks = golden->find(name + ".blocks")->tensor;
  const Tensor& values = golden->find(name + ".values")->tensor;
  const BlockFormat* format = find_block_format(name);
  ASSERT_NE(format, nullptr);
  ASSERT_EQ(format->bytes, blocks.dim(1));
  ASSERT_EQ(format->elements, values.dim(1));

  // One byte off: a file aligns tensors, but nothing may depend on it.
  std::vector<std::byte> unaligned(blocks.bytes() + 1);
  std::memcpy(unaligned.data() + 1, blocks.data, blocks.bytes());
  std::vector<float> got(static_cast<size_t>(values.numel()) + 1, 7.0F);
  format->dequantize(unaligned.data() + 1, blocks.dim(0), got.data());
  const auto* want = values.as<float>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(got[static_cast<size_t>(i)]),
              std::bit_cast<uint32_t>(want[i]))
        << "element " << i % values.dim(1) << " of block " << i / values.dim(1) << ": "
        << got[static_cast<size_t>(i)] << ", expected " << want[i];
  }
  EXPECT_EQ(got.back(), 7.0F);  // nothing behind the end
}

INSTANTIATE_TEST_SUITE_P(All, GgmlBlocks,
                         ::testing::Values("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K",
                                           "Q4_K", "Q5_K", "Q6_K"),
                         [](const auto& test) { return std::string(test.param); });

TEST(GgmlBlocks, OtherFormatsAreUnknown) {
  EXPECT_EQ(find_block_format("Q8_K"), nullptr);
  EXPECT_EQ(find_block_format("F32"), nullptr);
}

}  // namespace
}  // namespace krait::test
