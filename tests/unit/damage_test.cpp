// Properties of the checkpoint readers over random damage: flipped bytes and truncation end in an
// Error or in tensors that lie inside the file, and never in much memory. And what the writer
// writes, the reader reads.
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "checkpoint/checkpoint.h"
#include "checkpoint/gguf.h"
#include "checkpoint/parse.h"
#include "support/checkpoint_bytes.h"
#include "support/test_support.h"

namespace {

// Bytes asked of operator new, freed or not.
size_t g_allocated = 0;

}  // namespace

// GCC 12 takes the free() of an inlined delete for a mistake, though the new is ours as well.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(size_t n) {
  g_allocated += n;
  if (void* p = std::malloc(n)) return p;
  throw std::bad_alloc();
}
void* operator new(size_t n, const std::nothrow_t&) noexcept {
  g_allocated += n;
  return std::malloc(n);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace krait::test {
namespace {

namespace pk = pickle;

// The same cases in every run.
[[maybe_unused]] const int kConfigured = setenv("RC_PARAMS", "seed=20 max_success=3000", 0);

std::string sample_safetensors() {
  return safetensors(R"({"__metadata__":{"format":"pt"},)"
                     R"("a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                     R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]},)"
                     R"("c":{"dtype":"U8","shape":[],"data_offsets":[28,29]}})",
                     std::string(29, '\3'));
}

std::string sample_torch(bool zip64) {
  const std::string s = pk::storage("0", 6);
  return torch_bin(
      pk::whole(pk::dict({{"a", pk::tensor(s, 0, {2, 3}, {3, 1})},
                          {"b", "q\1" + pk::tensor(s, 0, {3, 2}, {1, 3}) + "q\2"},
                          {"c", pk::tensor(pk::storage("1", 2, pk::global("torch", "HalfStorage")),
                                           1, {1}, {1})}})),
      {float_bytes({0, 1, 2, 3, 4, 5}), "abcd"}, {}, zip64);
}

std::string sample_gguf() {
  namespace g = gguf;
  return g::file({g::key("general.architecture", "mamba"), g::key("general.alignment", 32),
                  g::array("tokens", 8, 2, g::text("a") + g::text("bc")),
                  g::array("nested", 9, 1, le(uint32_t{4}) + le(uint64_t{1}) + le(uint32_t{7}))},
                 {g::tensor("a", {3, 2}, 0, 0), g::tensor("b", {32, 2}, 8, 32)},
                 std::string(32 + 68, '\3'));
}

/// Damaged as the generated numbers say: bytes overwritten, then cut.
std::string damaged(std::string file) {
  const auto edits = *rc::gen::container<std::vector<std::pair<size_t, uint8_t>>>(
      rc::gen::pair(rc::gen::inRange<size_t>(0, file.size()), rc::gen::arbitrary<uint8_t>()));
  for (const auto& [at, byte] : edits) file[at] = static_cast<char>(byte);
  if (*rc::gen::inRange(0, 4) == 0) file.resize(*rc::gen::inRange<size_t>(0, file.size() + 1));
  return file;
}

template <typename Parse>
void survives(const std::string& file, Parse parse) {
  constexpr size_t kLimit = 2 << 20;
  const size_t before = g_allocated;
  try {
    const ParsedTensors t = parse(std::as_bytes(std::span(file)), "f");
    for (const auto& e : t.entries) {
      const auto* p = static_cast<const char*>(e.tensor.data);
      bool inside = p >= file.data() && p + e.tensor.bytes() <= file.data() + file.size();
      for (const auto& g : t.gathered) {
        inside = inside || (e.tensor.data == g.data() && e.tensor.bytes() == g.size());
      }
      RC_ASSERT(inside);
    }
  } catch (const Error& e) {
    RC_ASSERT(!e.message().empty());
  }
  RC_ASSERT(g_allocated - before < kLimit);
}

RC_GTEST_PROP(Damage, SafetensorsSurvives, ()) {
  survives(damaged(sample_safetensors()), parse_safetensors);
}

RC_GTEST_PROP(Damage, TorchBinSurvives, ()) {
  survives(damaged(sample_torch(*rc::gen::arbitrary<bool>())), parse_torch_bin);
}

RC_GTEST_PROP(Damage, GgufSurvives, ()) {
  survives(damaged(sample_gguf()), [](std::span<const std::byte> file, const std::string& name) {
    ParsedGguf g = parse_gguf(file, name);
    for (const auto& [key, value] : g.metadata.all()) {
      if (value.is_array && value.type == GgufType::text) (void)g.metadata.texts(key);
    }
    return std::move(g.tensors);
  });
}

RC_GTEST_PROP(Damage, PickleSurvives, ()) {
  // The pickle alone, in an archive that is whole.
  const std::string whole = sample_torch(false);
  const size_t begin = whole.find("\x80\x02");
  const size_t end = whole.find("u.", begin) + 2;
  const std::string pickle = damaged(whole.substr(begin, end - begin));
  survives(torch_bin(pickle, {float_bytes({0, 1, 2, 3, 4, 5}), "abcd"}), parse_torch_bin);
}

RC_GTEST_PROP(Damage, IndexSurvives, ()) {
  const std::string json = damaged(
      R"({"metadata":{"total_size":1.5e3,"x":[true,null]},"weight_map":{"a":"b.bin","c":"d"}})");
  const size_t before = g_allocated;
  try {
    for (const auto& [tensor, file] : parse_index(std::as_bytes(std::span(json)), "i")) {
      RC_ASSERT(!file.empty());
      RC_ASSERT(file.find('/') == std::string::npos);
    }
  } catch (const Error& e) {
    RC_ASSERT(!e.message().empty());
  }
  RC_ASSERT(g_allocated - before < size_t{1 << 20});
}

TEST(Damage, SamplesAreWhole) {
  const std::string gguf = sample_gguf();
  EXPECT_EQ(parse_gguf(std::as_bytes(std::span(gguf)), "f").tensors.entries.size(), 2U);
  const std::string st = sample_safetensors();
  EXPECT_EQ(parse_safetensors(std::as_bytes(std::span(st)), "f").entries.size(), 3U);
  for (const bool zip64 : {false, true}) {
    const std::string bin = sample_torch(zip64);
    EXPECT_EQ(parse_torch_bin(std::as_bytes(std::span(bin)), "f").entries.size(), 3U);
  }
}

/// Writes and reads back tensors of random names, types and shapes.
void round_trip() {
  const ScratchDir dir;
  // Any text: the generator makes bytes, each a code point below 256 in UTF-8.
  const auto names = *rc::gen::container<std::set<std::vector<uint8_t>>>(
      rc::gen::arbitrary<std::vector<uint8_t>>());
  const std::string data = *rc::gen::container<std::string>(1024, rc::gen::arbitrary<char>());
  std::vector<Checkpoint::Entry> tensors;
  for (const auto& name : names) {
    std::string utf8;
    for (const uint8_t c : name) {
      if (c < 0x80) {
        utf8 += static_cast<char>(c);
      } else {
        utf8 += static_cast<char>(0xc0 | (c >> 6));
        utf8 += static_cast<char>(0x80 | (c & 0x3f));
      }
    }
    Shape shape;
    for (int rank = *rc::gen::inRange(0, 5); rank > 0; --rank) {
      shape.push_back(*rc::gen::inRange<int64_t>(0, 4));
    }
    const auto type = static_cast<DType>(*rc::gen::inRange(0, 13));
    if (shape.numel() * static_cast<int64_t>(itemsize(type)) > 900) continue;
    auto* p = const_cast<char*>(data.data()) + *rc::gen::inRange(0, 100);
    tensors.push_back({utf8, Tensor(p, type, shape), ""});
  }
  write_safetensors(dir.path() / "f.safetensors", tensors);
  const auto read = open_safetensors(dir.path() / "f.safetensors");
  RC_ASSERT(read->entries().size() == tensors.size());
  for (const auto& t : tensors) {
    const auto* got = read->find(t.name);
    RC_ASSERT(got != nullptr);
    RC_ASSERT(got->tensor.dtype == t.tensor.dtype);
    RC_ASSERT(got->tensor.shape == t.tensor.shape);
    RC_ASSERT(std::memcmp(got->tensor.data, t.tensor.data, t.tensor.bytes()) == 0);
  }
}

TEST(RoundTrip, WhatIsWrittenIsRead) {
  rc::detail::TestParams params;
  params.seed = 20;
  params.maxSuccess = 100;
  params.maxSize = 30;
  const auto result = rc::detail::checkTestable(round_trip, rc::detail::TestMetadata(), params);
  EXPECT_TRUE(result.is<rc::detail::SuccessResult>()) << [&] {
    std::ostringstream s;
    rc::detail::printResultMessage(result, s);
    return s.str();
  }();
}

}  // namespace
}  // namespace krait::test
