// krait logits through the built program, against the golden models.
#include <gmock/gmock.h>

#include <cmath>
#include <cstring>

#include "checkpoint/checkpoint.h"
#include "cli/cli_support.h"

namespace krait::test {
namespace {

using ::testing::HasSubstr;

std::vector<float> floats(const Checkpoint& file, const std::string& name) {
  const Checkpoint::Entry* e = file.find(name);
  if (e == nullptr || e->tensor.dtype != DType::f32) throw std::runtime_error(name);
  std::vector<float> v(static_cast<size_t>(e->tensor.numel()));
  std::memcpy(v.data(), e->tensor.data, e->tensor.bytes());
  return v;
}

std::string id_list(const Checkpoint& file, const std::string& name) {
  const Checkpoint::Entry* e = file.find(name);
  std::vector<int64_t> ids(static_cast<size_t>(e->tensor.numel()));
  std::memcpy(ids.data(), e->tensor.data, e->tensor.bytes());
  return fmt::format("{}", fmt::join(ids, ","));
}

TEST(Logits, FileHoldsEveryPosition) {
  const ScratchDir dir;
  const auto file = dir.path() / "out.safetensors";
  const auto expected = open_safetensors(tiny() + "/expected.safetensors");
  const std::string ids = id_list(*expected, "prompt_17");
  const RunResult r = run_krait({"logits", "-m", tiny(), "--ids", ids, "-o", file});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_EQ(r.out, "");
  const auto got = open_safetensors(file);
  ASSERT_NE(got->find("logits"), nullptr);
  EXPECT_EQ(got->find("logits")->tensor.shape, (Shape{17, 512}));
  EXPECT_EQ(got->find("ids")->tensor.dtype, DType::i64);
  EXPECT_EQ(id_list(*got, "ids"), ids);
  EXPECT_TRUE(near_std(floats(*got, "logits"), floats(*expected, "logits_17"), 1e-4));
}

TEST(Logits, ChunksDoNotMatterAndLastIsTheLastRow) {
  const ScratchDir dir;
  const auto expected = open_safetensors(tiny() + "/expected.safetensors");
  const std::string ids = id_list(*expected, "prompt_130");
  for (const char* chunk : {"1", "7", "130", "0"}) {
    const auto all = dir.path() / "all.safetensors";
    const auto last = dir.path() / "last.safetensors";
    const Args args{"logits", "-m", tiny(), "--ids", ids, "--prefill-chunk", chunk};
    ASSERT_EQ(run_krait(args + Args{"-o", all}).exit_code, 0);
    ASSERT_EQ(run_krait(args + Args{"-o", last, "--last"}).exit_code, 0);
    const std::vector<float> rows = floats(*open_safetensors(all), "logits");
    ASSERT_EQ(rows.size(), 130U * 512);
    const std::vector<float> want = floats(*expected, "logits_130");
    EXPECT_TRUE(near_std(std::span(rows).last(512), want, 1e-4)) << chunk;
    EXPECT_EQ(open_safetensors(last)->find("logits")->tensor.shape, (Shape{1, 512}));
    EXPECT_TRUE(near_std(floats(*open_safetensors(last), "logits"), want, 1e-4)) << chunk;
  }
}

TEST(Logits, WithoutAFileTheLikeliestTokensAreListed) {
  const RunResult table = run_krait({"logits", "-m", golden("mamba1-neox-vocab"), "--tokenizer",
                                     neox_tokenizer(), "-p", "Once upon a time", "--top", "2"});
  ASSERT_EQ(table.exit_code, 0) << table.err;
  EXPECT_THAT(table.out, HasSubstr("22866"));  // the first greedy id of e2e.json
  EXPECT_EQ(std::count(table.out.begin(), table.out.end(), '\n'), 3) << "a header and two rows";

  const RunResult r = run_krait({"logits", "-m", tiny(), "--ids", "5,6,7", "--json", "--top", "3"});
  const Json j = Json::parse(r.out);
  EXPECT_EQ(j["position"], 2);
  ASSERT_EQ(j["top"].size(), 3U);
  EXPECT_GE(j["top"][0]["logit"], j["top"][1]["logit"]);
  const RunResult greedy = run_krait(run_ids({"--greedy", "-n", "1"}));
  EXPECT_EQ(fmt::format("{}\n", j["top"][0]["id"].get<int>()), greedy.out);
}

TEST(Logits, NoPartialFileIsLeft) {
  const ScratchDir dir;
  const auto file = dir.path() / "out.safetensors";
  const char* moved = std::getenv("KRAIT_TEST_PROGRAM");
  // A limit of 8 blocks of 512 bytes on the size of files stands for the full disk.
  const std::string command = fmt::format(
      "trap '' XFSZ; ulimit -f 8; '{}' logits -m '{}' --ids 1,2,3,4,5,6,7,8 -o '{}' 2>/dev/null",
      moved != nullptr ? moved : KRAIT_TEST_PROGRAM, tiny(), file.string());
  EXPECT_EQ(WEXITSTATUS(std::system(command.c_str())), 3);
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(Logits, Refusals) {
  const ScratchDir dir;
  const Args args{"logits", "-m", tiny(), "--ids", "1,2"};
  EXPECT_EQ(run_krait(args + Args{"-o", "/no/such/folder/x"}).exit_code, 3);
  const RunResult folder = run_krait(args + Args{"-o", dir.path()});
  EXPECT_EQ(folder.exit_code, 2);
  EXPECT_THAT(folder.err, HasSubstr("no regular file"));
  EXPECT_EQ(run_krait(args + Args{"-o", "/dev/null"}).exit_code, 2);
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
  EXPECT_EQ(run_krait(args + Args{"--top", "0"}).exit_code, 2);
  EXPECT_EQ(run_krait({"logits", "-m", tiny(), "--ids", "512"}).exit_code, 2);
}

}  // namespace
}  // namespace krait::test
