// Memory and weights: what a backend hands out, copies, converts and refuses.
#include <gmock/gmock.h>

#include <chrono>

#include "ops/ops_test_util.h"

namespace krait::test {
namespace {

class Memory : public ::testing::TestWithParam<Backend> {};

INSTANTIATE_TEST_SUITE_P(Plain, Memory, ::testing::Values(Backend::plain));
INSTANTIATE_TEST_SUITE_P(Cpu, Memory, ::testing::Values(Backend::fast));
INSTANTIATE_TEST_SUITE_P(Gpu, Memory, ::testing::Values(Backend::gpu));

TEST_P(Memory, IsAlignedAndCopied) {
  Ops& op = ops(GetParam());
  const Buffer a = op.allocate(1001, "a");
  const Buffer b = op.allocate(1001, "b");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data()) % 256, 0U);
  EXPECT_EQ(a.bytes(), 1001U);
  std::vector<uint8_t> bytes(1001);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 7);
  op.upload(a.data(), bytes.data(), bytes.size());
  op.zero(b.data(), 1001);
  op.copy(b.data(), a.data(), 1000);
  std::vector<uint8_t> back(1001, 1);
  op.download(back.data(), b.data(), 1001);
  bytes[1000] = 0;
  EXPECT_EQ(back, bytes);
}

TEST_P(Memory, RowsAreCopiedAndZeroedAtTheirPitch) {
  Ops& op = ops(GetParam());
  constexpr size_t kPitch = 96;
  constexpr size_t kRows = 7;
  std::vector<uint8_t> want(kPitch * kRows);
  for (size_t i = 0; i < want.size(); ++i) want[i] = static_cast<uint8_t>(i * 5 + 1);
  const Buffer b = op.allocate(want.size(), "rows");
  auto* at = static_cast<std::byte*>(b.data());
  op.upload(at, want.data(), want.size());
  op.copy_rows(at + 40, at + 8, kPitch, 20, kRows);
  op.zero_rows(at + 70, kPitch, 9, kRows);
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t i = 0; i < 20; ++i) want[r * kPitch + 40 + i] = want[r * kPitch + 8 + i];
    for (size_t i = 0; i < 9; ++i) want[r * kPitch + 70 + i] = 0;
  }
  std::vector<uint8_t> back(want.size());
  op.download(back.data(), b.data(), back.size());
  EXPECT_EQ(back, want);
}

TEST_P(Memory, UploadsTakeTheSourceBeforeTheyReturn) {
  // More and larger ones than a staging area holds, from memory that is written over at once.
  Ops& op = ops(GetParam());
  std::vector<uint8_t> want;
  std::vector<size_t> sizes{1, 7, 64, 65, 4000, 524287, 524288, 524289, 3000001};
  for (int i = 0; i < 2000; ++i) sizes.push_back(static_cast<size_t>(i * 37 % 9001));
  size_t total = 0;
  for (const size_t n : sizes) total += n;
  const Buffer b = op.allocate(total, "uploads");
  std::vector<uint8_t> source(3000001);
  size_t done = 0;
  for (const size_t n : sizes) {
    for (size_t i = 0; i < n; ++i) source[i] = static_cast<uint8_t>((done + i) * 31 >> 3);
    op.upload(static_cast<std::byte*>(b.data()) + done, source.data(), n);
    want.insert(want.end(), source.begin(), source.begin() + static_cast<ptrdiff_t>(n));
    done += n;
  }
  std::vector<uint8_t> back(total);
  op.download(back.data(), b.data(), total);
  EXPECT_TRUE(back == want);
}

TEST_P(Memory, NothingIsABuffer) {
  Ops& op = ops(GetParam());
  const Buffer none = op.allocate(0, "nothing");
  op.zero(none.data(), 0);
  op.upload(none.data(), nullptr, 0);
}

/// Sizes around the blocks in which a backend goes through memory, and a range inside a buffer.
TEST_P(Memory, StreamsCopyAndReadEveryWord) {
  Ops& op = ops(GetParam());
  Random r(11);
  for (const size_t n : {4U, 8U, 2044U, 8192U, 8196U, 1000004U}) {
    std::vector<uint32_t> words(n + 8);
    for (uint32_t& w : words) w = static_cast<uint32_t>(r.below(INT32_MAX)) * 3;
    const size_t bytes = words.size() * sizeof(uint32_t);
    const Buffer from = op.allocate(bytes, "from");
    const Buffer to = op.allocate(bytes, "to");
    const Buffer sum = op.allocate(sizeof(uint32_t), "sum");
    op.upload(from.data(), words.data(), bytes);
    op.zero(to.data(), bytes);
    const auto* inside = static_cast<std::byte*>(from.data()) + 16;
    op.stream_copy(static_cast<std::byte*>(to.data()) + 16, inside, n * sizeof(uint32_t));
    op.stream_read(sum.data(), inside, n * sizeof(uint32_t));

    std::vector<uint32_t> want(words.size());
    uint32_t total = 0;
    for (size_t i = 4; i < n + 4; ++i) {
      want[i] = words[i];
      total ^= words[i];
    }
    std::vector<uint32_t> got(words.size());
    op.download(got.data(), to.data(), bytes);
    EXPECT_EQ(got, want) << n;
    uint32_t got_sum = 0;
    op.download(&got_sum, sum.data(), sizeof got_sum);
    EXPECT_EQ(got_sum, total) << n;
  }
}

/// The device's clock agrees with the host's on work that is long against both of their steps.
TEST_P(Memory, SecondsAreThoseOfTheWork) {
  Ops& op = ops(GetParam());
  const size_t bytes = size_t{1} << 24;
  const Buffer a = op.allocate(bytes, "a");
  const Buffer b = op.allocate(bytes, "b");
  op.zero(a.data(), bytes);
  const auto copies = [&](int n) {
    for (int i = 0; i < n; ++i) op.stream_copy(b.data(), a.data(), bytes);
  };
  copies(10);
  op.synchronize();
  // Until the host's scheduler, which may come milliseconds late, matters little.
  double seconds = 0;
  std::chrono::duration<double> host{};
  for (int n = 100; host < std::chrono::milliseconds(50); n *= 2) {
    const auto start = std::chrono::steady_clock::now();
    seconds = op.seconds([&] { copies(n); });
    host = std::chrono::steady_clock::now() - start;
  }
  EXPECT_GT(seconds, 0.0);
  EXPECT_LE(seconds, host.count());
  EXPECT_GT(seconds, 0.3 * host.count());
  EXPECT_LT(op.seconds([] {}), 0.5 * seconds);
}

TEST_P(Memory, TooMuchIsRefusedWithTheNumbers) {
  Ops& op = ops(GetParam());
  EXPECT_TRUE(throws(ErrorKind::device, "1125899906842624",
                     [&] { (void)op.allocate(size_t{1} << 50, "the moon"); }));
  EXPECT_TRUE(throws(ErrorKind::device, "the moon",
                     [&] { (void)op.allocate(size_t{1} << 50, "the moon"); }));
}

TEST_P(Memory, InfoNamesTheDevice) {
  const DeviceInfo info = ops(GetParam()).info();
  EXPECT_FALSE(info.name.empty());
  EXPECT_GT(info.memory_total, size_t{1} << 28);
  EXPECT_GT(info.memory_free, 0U);
  EXPECT_LE(info.memory_free, info.memory_total);
  const bool gpu = GetParam() == Backend::gpu;
  EXPECT_EQ(info.driver.empty(), !gpu);
  EXPECT_EQ(info.processor.empty(), gpu);
  if (gpu) {
    EXPECT_THAT(info.clocks, ::testing::HasSubstr("SMs up to"));
  }
}

TEST_P(Memory, WeightsOfEveryTypeBecomeEveryType) {
  Ops& op = ops(GetParam());
  Random r(3);
  // Longer than a staging block, and not a multiple of anything.
  const int64_t n = 70001;
  const Values values = r.uniform(n, -100, 100);
  std::deque<std::vector<std::byte>> files;
  std::vector<std::tuple<Tensor, DType, DType>> imported;
  for (const DType from : {DType::f32, DType::bf16, DType::f16}) {
    for (const DType to : {DType::f32, DType::bf16, DType::f16}) {
      for (const size_t offset : {0, 1, 2, 6}) {  // a file may put a tensor anywhere
        std::vector<std::byte>& file = files.emplace_back(n * itemsize(from) + 8);
        visit_dtype(from, "test", [&](auto e) {
          for (size_t i = 0; i < values.size(); ++i) {
            const decltype(e) v(values[i]);
            std::memcpy(file.data() + offset + i * sizeof(v), &v, sizeof(v));
          }
        });
        imported.emplace_back(op.import_weight(Tensor(file.data() + offset, from, {n}), to), from,
                              to);
      }
    }
  }
  op.weights_ready();
  Device d(GetParam());
  for (const auto& [t, from, to] : imported) {
    EXPECT_EQ(t.dtype, to);
    EXPECT_TRUE(same_bits(d.read(t), rounded(rounded(values, from), to)))
        << dtype_name(from) << " to " << dtype_name(to);
  }
}

TEST_P(Memory, IntegersAreNoWeights) {
  std::vector<int32_t> host(4);
  EXPECT_TRUE(throws(ErrorKind::unsupported, "i32", [&] {
    (void)ops(GetParam()).import_weight(Tensor(host.data(), DType::i32, {4}), DType::f32);
  }));
}

TEST(MemoryCpu, AWeightOfTheRightTypeIsAView) {
  for (const Backend b : {Backend::plain, Backend::fast}) {
    alignas(8) std::byte host[64] = {};
    EXPECT_EQ(ops(b).import_weight(Tensor(host, DType::f32, {4}), DType::f32).data, host);
    EXPECT_EQ(ops(b).import_weight(Tensor(host + 2, DType::bf16, {4}), DType::bf16).data, host + 2);
    EXPECT_NE(ops(b).import_weight(Tensor(host + 2, DType::f32, {4}), DType::f32).data, host + 2);
    EXPECT_NE(ops(b).import_weight(Tensor(host, DType::f32, {4}), DType::bf16).data, host);
  }
}

TEST(MemoryCuda, IsAnErrorWhereThereIsNone) {
  if (cuda_device_count() > 0) {
    EXPECT_TRUE(throws(ErrorKind::device, "", [] { (void)make_cuda_ops(cuda_device_count()); }));
  } else {
    EXPECT_TRUE(throws(ErrorKind::device, "CUDA", [] { (void)make_cuda_ops(0); }));
  }
}

}  // namespace
}  // namespace krait::test
