// Sharded checkpoints, and what open_checkpoint makes of a path.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>

#include "checkpoint/checkpoint.h"
#include "checkpoint/parse.h"
#include "support/checkpoint_bytes.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

namespace fs = std::filesystem;
namespace pk = pickle;

std::map<std::string, std::string> parse(const std::string& json) {
  return parse_index(std::as_bytes(std::span(json)), "i.json");
}
::testing::AssertionResult refused(const std::string& json, const std::string& part) {
  return throws(ErrorKind::format, part, [&] { (void)parse(json); });
}

std::string one_tensor(const std::string& name) {
  return safetensors(
      fmt::format(R"({{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}})", name),
      float_bytes({7}));
}
std::string one_torch_tensor(const std::string& name) {
  return torch_bin(pk::whole(pk::dict({{name, pk::tensor(pk::storage("0", 1), 0, {1}, {1})}})),
                   {float_bytes({7})});
}

TEST(Sharded, ReadsGoldenModel) {
  const fs::path folder = data_dir() / "golden/models/mamba1-hf-sharded";
  const auto checkpoint = open_checkpoint(folder);
  EXPECT_EQ(checkpoint->format(), "safetensors");
  EXPECT_GT(checkpoint->entries().size(), 7U);
  std::set<std::string> files;
  for (const auto& e : checkpoint->entries()) {
    files.insert(e.file);
    const auto shard = open_safetensors(folder / e.file);
    const auto* same = shard->find(e.name);
    ASSERT_NE(same, nullptr);
    EXPECT_EQ(std::memcmp(same->tensor.data, e.tensor.data, e.tensor.bytes()), 0);
  }
  EXPECT_EQ(files.size(), 7U);
}

TEST(Sharded, ReadsTorchShards) {
  const ScratchDir dir;
  write_file(dir.path() / "pytorch_model-00001-of-00002.bin", one_torch_tensor("a"));
  write_file(dir.path() / "pytorch_model-00002-of-00002.bin", one_torch_tensor("b"));
  write_file(dir.path() / "pytorch_model.bin.index.json",
             R"({"metadata":{"total_size":8,"x":[null,true,{"y":-1.5}]},"weight_map":)"
             R"({"b":"pytorch_model-00002-of-00002.bin","a":"pytorch_model-00001-of-00002.bin"}})");
  const auto checkpoint = open_checkpoint(dir.path());
  EXPECT_EQ(checkpoint->format(), "pytorch");
  ASSERT_EQ(checkpoint->entries().size(), 2U);
  EXPECT_EQ(checkpoint->entries()[0].name, "a");
  EXPECT_EQ(*checkpoint->find("b")->tensor.as<float>(), 7.0F);
}

TEST(Sharded, ReportsMissingShardsAndTensors) {
  const ScratchDir dir;
  const fs::path index = dir.path() / "model.safetensors.index.json";
  write_file(index, R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
  write_file(dir.path() / "1.safetensors", one_tensor("a"));
  EXPECT_TRUE(throws(ErrorKind::file, "names the shard 2.safetensors, which is missing",
                     [&] { (void)open_checkpoint(dir.path()); }));
  write_file(dir.path() / "2.safetensors", one_tensor("c"));
  EXPECT_TRUE(throws(ErrorKind::format, "2.safetensors: expected the tensor b",
                     [&] { (void)open_checkpoint(dir.path()); }));
  write_file(dir.path() / "2.safetensors", one_tensor("b").substr(0, 20));
  EXPECT_TRUE(
      throws(ErrorKind::format, "2.safetensors: ", [&] { (void)open_checkpoint(dir.path()); }));
  write_file(dir.path() / "2.safetensors", one_tensor("b"));
  EXPECT_EQ(open_checkpoint(index)->entries().size(), 2U);
}

TEST(Sharded, ShardNamesCannotLeaveTheFolder) {
  for (const char* name : {"../a.safetensors", "/etc/passwd", "x/a.safetensors", "..", ".", "",
                           R"(..\\a)", R"(a\\b)", R"(a\u0000b)", R"(a\nb)"}) {
    EXPECT_TRUE(
        refused(fmt::format(R"({{"weight_map":{{"t":"{}"}}}})", name), "not a plain file name"))
        << name;
  }
}

TEST(Sharded, RefusesBrokenIndexes) {
  EXPECT_EQ(parse(R"({"weight_map":{"t":"f"}})").at("t"), "f");
  EXPECT_TRUE(refused("", "JSON is not valid"));
  EXPECT_TRUE(refused("{", "JSON is not valid"));
  EXPECT_TRUE(refused("[]", "expected the index to be one object"));
  EXPECT_TRUE(refused("3", "expected the index to be one object"));
  EXPECT_TRUE(refused("{}", "expected a weight_map"));
  EXPECT_TRUE(refused(R"({"weight_map":{}})", "expected a weight_map"));
  EXPECT_TRUE(refused(R"({"weight_map":["f"]})", "weight_map to be one object, found an array"));
  EXPECT_TRUE(refused(R"({"weight_map":"f"})", "weight_map to be one object, found a string"));
  EXPECT_TRUE(refused(R"({"weight_map":{"t":1}})", "tensor t: expected one file name"));
  EXPECT_TRUE(refused(R"({"weight_map":{"t":["f"]}})", "tensor t: expected one file name"));
  EXPECT_TRUE(refused(R"({"weight_map":{"t":{"u":"f"}}})", "tensor t: expected one file name"));
  EXPECT_TRUE(refused(R"({"weight_map":{"t":"f","t":"g"}})", "tensor t"));
  EXPECT_TRUE(refused(R"({"weight_map":{"t":"f"},"weight_map":{"u":"f"}})", "a second one"));
  EXPECT_TRUE(refused(R"({"metadata":)" + std::string(1'000'000, '['), "at most 16 levels"));
  EXPECT_TRUE(refused("{\"weight_map\":{\"t\":\"f\"}}x", "JSON is not valid"));
}

TEST(OpenCheckpoint, LooksForTheKnownNamesInOrder) {
  const ScratchDir dir;
  EXPECT_TRUE(throws(ErrorKind::file,
                     "looked for model.safetensors, model.safetensors.index.json, "
                     "pytorch_model.bin, pytorch_model.bin.index.json and consolidated.safetensors",
                     [&] { (void)open_checkpoint(dir.path()); }));
  write_file(dir.path() / "pytorch_model.bin", one_torch_tensor("b"));
  EXPECT_NE(open_checkpoint(dir.path())->find("b"), nullptr);
  write_file(dir.path() / "model.safetensors", one_tensor("a"));
  EXPECT_NE(open_checkpoint(dir.path())->find("a"), nullptr);
}

TEST(OpenCheckpoint, FollowsSymlinksAndReadsBlobs) {
  const ScratchDir dir;
  // The layout of a download cache: blobs named by hash, links with the real names.
  write_file(dir.path() / "0123abcd", one_tensor("a"));
  write_file(dir.path() / "4567efab", one_torch_tensor("b"));
  fs::create_directory(dir.path() / "snapshot");
  fs::create_symlink("../0123abcd", dir.path() / "snapshot/model.safetensors");
  EXPECT_NE(open_checkpoint(dir.path() / "snapshot")->find("a"), nullptr);
  EXPECT_NE(open_checkpoint(dir.path() / "0123abcd")->find("a"), nullptr);
  EXPECT_NE(open_checkpoint(dir.path() / "4567efab")->find("b"), nullptr);
  fs::create_directory(dir.path() / "broken");
  fs::create_symlink("nowhere", dir.path() / "broken/model.safetensors");
  EXPECT_TRUE(throws(ErrorKind::file, "no checkpoint in the folder",
                     [&] { (void)open_checkpoint(dir.path() / "broken"); }));
}

TEST(OpenCheckpoint, RefusesWhatIsNoCheckpoint) {
  const ScratchDir dir;
  EXPECT_TRUE(throws(ErrorKind::file, "no such file or folder",
                     [&] { (void)open_checkpoint(dir.path() / "none"); }));
  EXPECT_TRUE(throws(ErrorKind::file, "no such file or folder",
                     [&] { (void)open_checkpoint(dir.path() / std::string(5000, 'x')); }));
  write_file(dir.path() / "text", "hello, this is text");
  EXPECT_TRUE(throws(ErrorKind::unsupported, "begins like none",
                     [&] { (void)open_checkpoint(dir.path() / "text"); }));
  for (const char* name : {"e.safetensors", "e.bin", "e.index.json"}) {
    write_file(dir.path() / name, "");
    EXPECT_TRUE(throws(ErrorKind::format, name, [&] { (void)open_checkpoint(dir.path() / name); }));
  }
  write_file(dir.path() / "m.gguf", "GGUF\x03");
  EXPECT_TRUE(throws(ErrorKind::format, "m.gguf: expected 4 bytes of the version",
                     [&] { (void)open_checkpoint(dir.path() / "m.gguf"); }));
  EXPECT_TRUE(throws(ErrorKind::file, "no checkpoint in the folder",
                     [&] { (void)open_checkpoint(dir.path()); }));
  write_file(dir.path() / "p.safetensors", "version https://git-lfs.github.com/spec/v1\noid x\n");
  EXPECT_TRUE(throws(ErrorKind::format, "Git LFS pointer",
                     [&] { (void)open_checkpoint(dir.path() / "p.safetensors"); }));
}

TEST(OpenCheckpoint, RefusesFoldersAndPipesInPlaceOfFiles) {
  const ScratchDir dir;
  fs::create_directories(dir.path() / "model.safetensors");
  EXPECT_TRUE(throws(ErrorKind::file, "expected a file, found a folder",
                     [&] { (void)open_checkpoint(dir.path()); }));
  const fs::path pipe = dir.path() / "pipe.bin";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_TRUE(throws(ErrorKind::file, "expected a file", [&] { (void)open_checkpoint(pipe); }));
}

}  // namespace
}  // namespace krait::test
