// The reader of PyTorch zip checkpoints: golden files, strides, ties, and every kind of damage.
#include <gtest/gtest.h>

#include <cstring>

#include "checkpoint/checkpoint.h"
#include "checkpoint/parse.h"
#include "checkpoint/pickle.h"
#include "checkpoint/zip.h"
#include "support/checkpoint_bytes.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

namespace pk = pickle;

std::span<const std::byte> bytes_of(const std::string& s) { return std::as_bytes(std::span(s)); }

ParsedTensors parse(const std::string& file) { return parse_torch_bin(bytes_of(file), "f.bin"); }

const std::string kSix = float_bytes({0, 1, 2, 3, 4, 5});

/// The values of the tensor `name` of the file.
std::vector<float> floats(const ParsedTensors& t, const std::string& name) {
  for (const auto& e : t.entries) {
    if (e.name != name) continue;
    std::vector<float> v(static_cast<size_t>(e.tensor.numel()));
    std::memcpy(v.data(), e.tensor.data, e.tensor.bytes());
    return v;
  }
  return {};
}

/// The error that a state dict gives in an archive with one storage of six floats.
::testing::AssertionResult refused(const std::string& value, const std::string& part,
                                   ErrorKind kind = ErrorKind::format) {
  const std::string file = torch_bin(pk::whole(value), {kSix});
  return throws(kind, part, [&] { (void)parse(file); });
}
::testing::AssertionResult tensor_refused(const std::string& tensor, const std::string& part,
                                          ErrorKind kind = ErrorKind::format) {
  return refused(pk::dict({{"w", tensor}}), part, kind);
}

TEST(TorchBin, ReadsGoldenModel) {
  const auto checkpoint =
      open_torch_bin(data_dir() / "golden/models/mamba1-original-bin/pytorch_model.bin");
  EXPECT_EQ(checkpoint->format(), "pytorch");
  const auto* embedding = checkpoint->find("backbone.embedding.weight");
  ASSERT_NE(embedding, nullptr);
  EXPECT_EQ(embedding->tensor.shape, (Shape{504, 64}));
  EXPECT_EQ(embedding->tensor.dtype, DType::f32);
  EXPECT_EQ(embedding->file, "pytorch_model.bin");
  const auto* head = checkpoint->find("lm_head.weight");
  ASSERT_NE(head, nullptr);
  EXPECT_EQ(head->tensor.data, embedding->tensor.data) << "tied weights share their storage";
}

TEST(TorchBin, ReadsViewsOfOneStorage) {
  for (const bool zip64 : {false, true}) {
    const std::string s = pk::storage("0", 6);
    const std::string file =
        torch_bin(pk::whole(pk::dict({{"row", pk::tensor(s, 3, {3}, {1})},
                                      {"all", pk::tensor(s, 0, {2, 3}, {3, 1})},
                                      {"odd", pk::tensor(s, 0, {1, 6, 1}, {99, 1, 77})},
                                      {"empty", pk::tensor(s, 6, {0, 3}, {3, 1})},
                                      {"scalar", pk::tensor(s, 5, {}, {})}})),
                  {kSix}, {}, zip64);
    const ParsedTensors t = parse(file);
    ASSERT_EQ(t.entries.size(), 5U);
    EXPECT_TRUE(t.gathered.empty()) << "contiguous views are not copied";
    EXPECT_EQ(floats(t, "row"), (std::vector<float>{3, 4, 5}));
    EXPECT_EQ(floats(t, "all"), (std::vector<float>{0, 1, 2, 3, 4, 5}));
    EXPECT_EQ(floats(t, "odd"), (std::vector<float>{0, 1, 2, 3, 4, 5}));
    EXPECT_EQ(floats(t, "scalar"), (std::vector<float>{5}));
  }
}

TEST(TorchBin, GathersStridedTensorsOnce) {
  const std::string s = pk::storage("0", 6);
  const ParsedTensors t = parse(torch_bin(pk::whole(pk::dict({
                                              {"t", pk::tensor(s, 0, {3, 2}, {1, 3})},
                                              {"tied", pk::tensor(s, 0, {3, 2}, {1, 3})},
                                              {"even", pk::tensor(s, 0, {3}, {2})},
                                              {"same", pk::tensor(s, 4, {3}, {0})},
                                          })),
                                          {kSix}));
  EXPECT_EQ(floats(t, "t"), (std::vector<float>{0, 3, 1, 4, 2, 5}));
  EXPECT_EQ(floats(t, "even"), (std::vector<float>{0, 2, 4}));
  EXPECT_EQ(floats(t, "same"), (std::vector<float>{4, 4, 4}));
  EXPECT_EQ(t.gathered.size(), 3U) << "the tied pair is gathered once";
}

TEST(TorchBin, ReadsEveryStorageType) {
  for (const auto& [name, type] :
       std::vector<std::pair<std::string, DType>>{{"Float", DType::f32},
                                                  {"Half", DType::f16},
                                                  {"BFloat16", DType::bf16},
                                                  {"Double", DType::f64},
                                                  {"Long", DType::i64},
                                                  {"Int", DType::i32},
                                                  {"Short", DType::i16},
                                                  {"Char", DType::i8},
                                                  {"Byte", DType::u8},
                                                  {"Bool", DType::boolean}}) {
    const std::string s = pk::storage("0", 2, pk::global("torch", name + "Storage"));
    const ParsedTensors t =
        parse(torch_bin(pk::whole(pk::dict({{"w", pk::tensor(s, 0, {2}, {1})}})),
                        {std::string(2 * itemsize(type), '\1')}));
    EXPECT_EQ(t.entries.at(0).tensor.dtype, type) << name;
  }
  EXPECT_TRUE(tensor_refused(
      pk::tensor(pk::storage("0", 3, pk::global("torch", "ComplexFloatStorage")), 0, {3}, {1}),
      "tensor w is of type torch.ComplexFloatStorage", ErrorKind::unsupported));
}

std::string tensor_v3(const std::string& dtype, int64_t bytes) {
  return pk::global("torch._utils", "_rebuild_tensor_v3") +
         pk::tuple({pk::storage("0", bytes, pk::global("torch.storage", "UntypedStorage")),
                    pk::integer(1), pk::integers({2}), pk::integers({1}), "\x89",
                    pk::ordered_dict(), pk::global("torch", dtype)}) +
         "R";
}

TEST(TorchBin, ReadsUntypedStorages) {
  const std::string file =
      torch_bin(pk::whole(pk::dict({{"w", tensor_v3("float32", 24)}})), {kSix});
  const ParsedTensors t = parse(file);  // views of `file`
  EXPECT_EQ(floats(t, "w"), (std::vector<float>{1, 2}));
  EXPECT_TRUE(tensor_refused(tensor_v3("float32", 6), "expected 6 bytes"));
  EXPECT_TRUE(
      tensor_refused(tensor_v3("float8_e4m3fn", 24), "float8_e4m3fn", ErrorKind::unsupported));
}

TEST(TorchBin, UnwrapsParametersAndTrainingCheckpoints) {
  const std::string w = pk::tensor(pk::storage("0", 6), 0, {6}, {1});
  const std::string parameter =
      pk::global("torch._utils", "_rebuild_parameter") + pk::tuple({w, "\x88", "}"}) + "R";
  const std::string metadata = "}" + pk::text("_metadata") + pk::ordered_dict() + "sb";
  for (const char* nested : {"state_dict", "model"}) {
    const std::string file =
        torch_bin(pk::whole(pk::dict({{"epoch", pk::integer(3)},
                                      {nested, pk::dict({{"w", parameter}}) + metadata},
                                      {"lr", "G" + std::string(8, '\0')},
                                      {"none", "N"}})),
                  {kSix});
    const ParsedTensors t = parse(file);
    ASSERT_EQ(t.entries.size(), 1U) << nested;
    EXPECT_EQ(floats(t, "w").size(), 6U);
  }
}

TEST(TorchBin, FindsTheFolderOfTheArchive) {
  const std::string pickle =
      pk::whole(pk::dict({{"w", pk::tensor(pk::storage("0", 6), 0, {6}, {1})}}));
  EXPECT_EQ(parse(zip({{"a/b/data.pkl", pickle}, {"a/b/data/0", kSix}})).entries.size(), 1U);
  EXPECT_EQ(parse(zip({{"data.pkl", pickle}, {"data/0", kSix}})).entries.size(), 1U);
  EXPECT_TRUE(throws(ErrorKind::format, "one data.pkl, found 0", [&] {
    (void)parse(zip({{"a/mydata.pkl", pickle}}));
  }));
  EXPECT_TRUE(throws(ErrorKind::format, "one data.pkl, found 2", [&] {
    (void)parse(zip({{"a/data.pkl", pickle}, {"b/data.pkl", pickle}}));
  }));
}

TEST(TorchBin, RefusesOtherFormats) {
  const std::string pickle = pk::whole("}");
  EXPECT_TRUE(parse(torch_bin(pickle)).entries.empty());
  EXPECT_TRUE(throws(ErrorKind::unsupported, "TorchScript", [&] {
    (void)parse(torch_bin(pickle, {}, {{"archive/constants.pkl", "x"}}));
  }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "TorchScript", [&] {
    (void)parse(torch_bin(pickle, {}, {{"archive/code/__torch__.py", "x"}}));
  }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "byte order", [&] {
    (void)parse(torch_bin(pickle, {}, {{"archive/byteorder", "big"}}));
  }));
  EXPECT_TRUE(parse(torch_bin(pickle, {}, {{"archive/byteorder", "little"}})).entries.empty());
  EXPECT_TRUE(throws(ErrorKind::unsupported, "PyTorch 1.6", [&] {
    (void)parse("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02");
  }));
  EXPECT_TRUE(throws(ErrorKind::format, "an empty file", [&] { (void)parse(""); }));
  EXPECT_TRUE(throws(ErrorKind::format, "no zip archive", [&] { (void)parse("hello"); }));
}

TEST(TorchBin, RefusesCompressedAndEncryptedEntries) {
  const std::string pickle =
      pk::whole(pk::dict({{"w", pk::tensor(pk::storage("0", 6), 0, {6}, {1})}}));
  for (const auto& [method, flags] : {std::pair(8, 0), std::pair(0, 1)}) {
    const std::string file =
        zip({{"a/data.pkl", pickle},
             {"a/data/0", kSix, static_cast<uint16_t>(method), static_cast<uint16_t>(flags)}});
    EXPECT_TRUE(
        throws(ErrorKind::unsupported, "compressed or encrypted", [&] { (void)parse(file); }));
  }
}

TEST(TorchBin, EveryTruncationIsRefused) {
  for (const bool zip64 : {false, true}) {
    const std::string file =
        torch_bin(pk::whole(pk::dict({{"w", pk::tensor(pk::storage("0", 6), 0, {6}, {1})}})),
                  {kSix}, {}, zip64);
    EXPECT_EQ(parse(file).entries.size(), 1U);
    for (size_t n = 0; n < file.size(); ++n) {
      EXPECT_TRUE(throws(ErrorKind::format, "f.bin: ", [&] { (void)parse(file.substr(0, n)); }))
          << n;
    }
  }
}

TEST(TorchBin, RefusesZipFieldsThatLie) {
  const std::string file = zip({{"a/data.pkl", pk::whole("}")}, {"a/version", "3\n"}});
  const size_t central = file.find("PK\x01\x02");
  const size_t second = file.find("PK\x01\x02", central + 1);
  const size_t end = file.find("PK\x05\x06");
  const auto with = [&](size_t at, const std::string& bytes) {
    std::string s = file;
    s.replace(at, bytes.size(), bytes);
    return s;
  };
  const auto bad = [&](const std::string& s, const std::string& part) {
    return throws(ErrorKind::format, part, [&] { (void)parse(s); });
  };
  EXPECT_TRUE(parse(file).entries.empty());
  EXPECT_TRUE(bad(with(central + 20, le(uint32_t{1'000'000})), "two different sizes"));
  EXPECT_TRUE(
      bad(with(central + 20, le(uint64_t{0x000f'4240'000f'4240})), "expected 1000000 bytes"));
  EXPECT_TRUE(bad(with(central + 28, le(uint16_t{60'000})), "inside an entry"));
  EXPECT_TRUE(bad(with(central + 42, le(uint32_t{1})), "header of an entry"));
  EXPECT_TRUE(bad(with(central + 42, le(uint32_t{0x7fff'ffff})), "at offset 2147483647"));
  EXPECT_TRUE(bad(with(second + 42, le(uint32_t{0})), "another name"));
  EXPECT_TRUE(bad(with(30, "b"), "another name"));
  EXPECT_TRUE(bad(with(central, "x"), "central directory"));
  EXPECT_TRUE(bad(with(end + 8, le(uint32_t{0x0003'0003})), "expected 3 entries, found 2"));
  EXPECT_TRUE(bad(with(end + 12, le(uint32_t{0x7fff'ffff})), "bytes at offset"));
  EXPECT_TRUE(bad(with(end + 16, le(uint32_t{0xffff'ffff})), "ZIP64 locator"));
  EXPECT_TRUE(bad(with(end + 20, le(uint16_t{1})), "end record"));
  EXPECT_TRUE(bad(zip({{"a", "1"}, {"a", "2"}}), "occurs twice"));
  // The first entry's data stretched over the second.
  const std::string grown = le(static_cast<uint32_t>(central - 64));
  const std::string overlapping = with(central + 20, grown + grown);
  EXPECT_TRUE(bad(overlapping, "two entries overlap"));
}

TEST(TorchBin, RefusesGlobalsOutsideTheList) {
  EXPECT_TRUE(refused(pk::global("os", "system") + pk::tuple({pk::text("true")}) + "R",
                      "uses os.system", ErrorKind::unsupported));
  EXPECT_TRUE(refused(pk::global("builtins", "eval"), "builtins.eval", ErrorKind::unsupported));
  EXPECT_TRUE(refused(pk::global("torch", "load"), "torch.load", ErrorKind::unsupported));
  EXPECT_TRUE(refused(pk::global("torch._utils", "_rebuild_tensor_v2 "), "_rebuild_tensor_v2 ",
                      ErrorKind::unsupported));
}

TEST(TorchBin, RefusesEveryOtherOpcode) {
  const std::string known =
      std::string("cRbt)]aeu}s(XUJKMGNqrhjQ.") + "\x80\x81\x85\x86\x87\x88\x89\x8a\x8f\x90";
  int refused_opcodes = 0;
  for (int op = 0; op < 256; ++op) {
    if (known.find(static_cast<char>(op)) != std::string::npos) continue;
    EXPECT_TRUE(refused(std::string(1, static_cast<char>(op)),
                        fmt::format("opcode 0x{:02x} is none that torch.save writes", op)));
    ++refused_opcodes;
  }
  EXPECT_EQ(refused_opcodes, 256 - 35);
}

TEST(TorchBin, RefusesBrokenPickles) {
  EXPECT_TRUE(refused("", "the stack is empty"));
  EXPECT_TRUE(refused("R", "the stack is empty"));
  EXPECT_TRUE(refused("(N", "a dict of tensors, found None"));
  EXPECT_TRUE(refused("N(\x85", "the stack is empty"));
  EXPECT_TRUE(refused("t", "no mark"));
  EXPECT_TRUE(refused("NNR", "expected a function"));
  EXPECT_TRUE(refused("NNs", "the stack is empty"));
  EXPECT_TRUE(refused("NNNs", "expected a dict to add to, found None"));
  EXPECT_TRUE(refused("}Na", "expected a tuple or list to add to, found a dict"));
  EXPECT_TRUE(refused("}(Nu", "a key without a value"));
  EXPECT_TRUE(refused(std::string("h\x07", 2), "memo slot 7 is empty"));
  EXPECT_TRUE(refused("j" + le(UINT32_MAX), "memo slot 4294967295 is empty"));
  EXPECT_TRUE(refused("X" + le(UINT32_MAX), "ends inside"));
  EXPECT_TRUE(refused("X" + le(uint32_t{1}) + "\xff", "UTF-8"));
  EXPECT_TRUE(refused("X" + le(uint32_t{3}) + "\xed\xa0\x80", "UTF-8"));
  EXPECT_TRUE(refused("ctorch", "ends inside"));
  EXPECT_TRUE(refused("\x8a\x09" + std::string(9, '\1'), "64 bits"));
  EXPECT_TRUE(refused("\x80\x04", "protocol 2, found 4"));
  EXPECT_TRUE(refused(pk::integer(1), "a dict of tensors, found an integer"));
  EXPECT_TRUE(refused("}" + pk::integer(1) + "Ns", "found an integer as a key"));
  EXPECT_TRUE(refused("}" + pk::text("w") + "Ns", "tensor w: expected a tensor, found None"));
}

TEST(TorchBin, MemoSlotsCostOnlyWhatIsUsed) {
  // A slot number of 2^32 - 1 must not make a table of that size.
  const std::string file = torch_bin(pk::whole("}r" + le(UINT32_MAX) + "j" + le(UINT32_MAX)));
  EXPECT_TRUE(parse(file).entries.empty());
}

TEST(TorchBin, DeepAndCyclicPicklesAreHarmless) {
  // A million nested tuples, and a dict that holds itself.
  EXPECT_TRUE(refused("N" + std::string(1'000'000, '\x85'), "a dict of tensors, found a tuple"));
  EXPECT_TRUE(
      refused("}q" + std::string(1, '\0') + pk::text("self") + "h" + std::string(1, '\0') + "s",
              "tensor self: expected a tensor, found a dict"));
  EXPECT_TRUE(refused(std::string(3'000'000, '('), "at most 2000000 opcodes"));
}

TEST(TorchBin, RepeatedNamesAreRefused) {
  const std::string w = pk::tensor(pk::storage("0", 6), 0, {6}, {1});
  EXPECT_TRUE(refused(pk::dict({{"w", w}, {"w", w}}), "w occurs twice"));
}

TEST(TorchBin, RefusesStoragesThatLie) {
  EXPECT_TRUE(tensor_refused(pk::tensor(pk::storage("0", 7), 0, {6}, {1}),
                             "expected 7 elements of f32 in the storage data/0, found 24 bytes"));
  EXPECT_TRUE(
      tensor_refused(pk::tensor(pk::storage("0", -1), 0, {6}, {1}), "expected -1 elements"));
  EXPECT_TRUE(tensor_refused(pk::tensor(pk::storage("0", INT64_MAX), 0, {6}, {1}), "data/0"));
  EXPECT_TRUE(tensor_refused(pk::tensor(pk::storage("1", 6), 0, {6}, {1}), "no such entry"));
  EXPECT_TRUE(
      tensor_refused(pk::tensor(pk::storage("../data.pkl", 6), 0, {6}, {1}), "no such entry"));
  EXPECT_TRUE(tensor_refused(pk::tensor("N", 0, {6}, {1}), "expected a storage"));
  EXPECT_TRUE(tensor_refused(pk::tensor("NQ", 0, {6}, {1}), "expected a storage with"));
  EXPECT_TRUE(
      tensor_refused(pk::tensor(pk::storage("0", 6, "N"), 0, {6}, {1}), "expected a storage with"));
}

TEST(TorchBin, RefusesViewsOutsideTheStorage) {
  const std::string s = pk::storage("0", 6);
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {7}, {1}), "reaches element 6"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 1, {6}, {1}), "reaches element 6"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, -1, {6}, {1}), "at offset -1"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 7, {0}, {1}), "at offset 7"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, INT64_MAX, {6}, {1}), "at offset"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {2, 3}, {4, 1}), "reaches element 6"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 5, {2}, {-1}), "strides that stay inside"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {3, 3}, {INT64_MAX, INT64_MAX}), "strides"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {-2}, {1}), "sizes within"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {int64_t{1} << 62, 4}, {0, 0}), "sizes within"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {0, INT64_MAX, 2}, {0, 0, 0}), "sizes within"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {2, 3}, {1}), "as many strides as sizes"));
  EXPECT_TRUE(tensor_refused(pk::tensor(s, 0, {1, 1, 1, 1, 6}, {1, 1, 1, 1, 1}), "5 dimensions",
                             ErrorKind::unsupported));
}

TEST(TorchBin, StrideZeroCannotAskForMuchMemory) {
  EXPECT_TRUE(tensor_refused(pk::tensor(pk::storage("0", 6), 0, {int64_t{1} << 40}, {0}),
                             "larger than the whole file"));
  // Nor can many different views of the same few bytes.
  std::vector<std::pair<std::string, std::string>> many;
  for (int i = 0; i < 500; ++i) {
    many.emplace_back(fmt::format("w{}", i),
                      pk::tensor(pk::storage("0", 6), 0, {1000 + i, 6}, {0, 1}));
  }
  EXPECT_TRUE(refused(pk::dict(many), "larger than the whole file"));
}

TEST(TorchBin, RefusesWrongArguments) {
  const std::string v2 = pk::global("torch._utils", "_rebuild_tensor_v2");
  EXPECT_TRUE(tensor_refused(v2 + ")R", "expected storage, offset, sizes and strides"));
  EXPECT_TRUE(tensor_refused(v2 + pk::tuple({pk::storage("0", 6), "N", ")", ")"}) + "R",
                             "expected an integer, found None"));
  EXPECT_TRUE(tensor_refused(v2 + pk::tuple({pk::storage("0", 6), pk::integer(0), "N", ")"}) + "R",
                             "expected a tuple of integers, found None"));
  EXPECT_TRUE(tensor_refused(pk::global("torch._utils", "_rebuild_parameter") + ")R",
                             "the tensor of a parameter"));
  EXPECT_TRUE(tensor_refused(pk::global("torch", "float32") + ")R", "found an object"));
}

}  // namespace
}  // namespace krait::test
