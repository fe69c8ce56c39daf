// krait inspect through the built program. The sizes are counted by hand from the configs.
#include <gmock/gmock.h>

#include "cli/cli_support.h"

namespace krait::test {
namespace {

using ::testing::HasSubstr;

Json inspect(const Args& more) {
  const RunResult r = run_krait(Args{"inspect", "--json", "--device", "cpu"} + more);
  EXPECT_EQ(r.exit_code, 0) << r.err;
  return Json::parse(r.out);
}

TEST(Inspect, MistralsLayout) {
  const Json j = inspect({golden("mamba2-codestral-tiny")});
  EXPECT_EQ(j["config"]["family"], "mamba2");
  EXPECT_EQ(j["config"]["layout"], "mistral");
  EXPECT_EQ(j["config"]["n_head"], 8);
  EXPECT_EQ(j["config"]["n_group"], 8);
  EXPECT_FALSE(j["config"].contains("dt_rank"));
  EXPECT_EQ(j["dtype"], "bf16");
  // State of a layer: S [8, 64, 128] and 3 inputs of the convolution [512 + 2 * 8 * 128], f32.
  EXPECT_EQ(j["state_bytes_per_sequence"], 2 * 4 * (8 * 64 * 128 + 3 * (512 + 2 * 8 * 128)));
}

TEST(Inspect, CountsOfATiedModel) {
  const Json j = inspect({golden("mamba1-neox-vocab")});
  EXPECT_EQ(j["config"]["family"], "mamba1");
  EXPECT_EQ(j["config"]["d_model"], 32);
  EXPECT_EQ(j["config"]["dt_rank"], 2);
  EXPECT_EQ(j["format"], "safetensors");
  // Per layer: in_proj 128*32, conv 64*4+64, x_proj 34*64, dt_proj 64*2+64, A_log 64*16, D 64,
  // out_proj 32*64, norm 32; with embedding 50280*32 and final norm 32.
  constexpr int64_t kLayer =
      128 * 32 + 64 * 4 + 64 + 34 * 64 + 64 * 2 + 64 + 64 * 16 + 64 + 32 * 64 + 32;
  constexpr int64_t kAll = 2 * kLayer + 50280 * 32 + 32;
  EXPECT_EQ(j["parameters"], kAll);
  EXPECT_EQ(j["weight_bytes"], 4 * kAll);
  // State of a layer: h [64, 16] and the last 3 inputs of the convolution, f32.
  constexpr int64_t kState = 2 * (64 * 16 + 3 * 64) * 4;
  EXPECT_EQ(j["state_bytes_per_sequence"], kState);
  EXPECT_EQ(j["bytes_per_step"], 4 * kAll + 2 * kState);
  EXPECT_EQ(j["tensors"].size(), 22U);
  EXPECT_EQ(j["tensors"][0], Json({{"name", "backbone.embeddings.weight"},
                                   {"dtype", "f32"},
                                   {"shape", {50280, 32}},
                                   {"bytes", 50280 * 32 * 4},
                                   {"file", "model.safetensors"}}));
}

TEST(Inspect, BatchAndDtypes) {
  const Json one = inspect({tiny()});
  const Json eight = inspect({tiny(), "--batch", "8"});
  EXPECT_GE(eight["state_bytes"], 8 * one["state_bytes_per_sequence"].get<int64_t>());
  EXPECT_GT(eight["memory_bytes"], one["memory_bytes"]);
  EXPECT_EQ(eight["bytes_per_token"], eight["bytes_per_step"].get<int64_t>() / 8);
  const Json half = inspect({tiny(), "--dtype", "bf16", "--state-dtype", "bf16"});
  EXPECT_EQ(half["dtype"], "bf16");
  EXPECT_EQ(half["parameters"], one["parameters"]);
  EXPECT_LT(half["weight_bytes"], one["weight_bytes"]);
  EXPECT_LT(half["state_bytes_per_sequence"], one["state_bytes_per_sequence"]);
}

TEST(Inspect, UntiedHeadIsReadInsteadOfTheEmbedding) {
  const Json j = inspect({golden("mamba1-hf-odd")});
  EXPECT_EQ(j["config"]["tie_embeddings"], false);
  const int64_t table =
      j["config"]["vocab_rows"].get<int64_t>() * j["config"]["d_model"].get<int64_t>() * 4;
  EXPECT_EQ(j["bytes_per_step"], j["weight_bytes"].get<int64_t>() - table +
                                     2 * j["state_bytes_per_sequence"].get<int64_t>());
}

TEST(Inspect, ShardsAndPyTorchFiles) {
  const Json shards = inspect({golden("mamba1-hf-sharded")});
  EXPECT_EQ(shards["tensors"][0]["file"].get<std::string>().substr(0, 6), "model-");
  EXPECT_EQ(inspect({golden("mamba1-original-bin")})["format"], "pytorch");
  EXPECT_EQ(inspect({golden("mamba1-original-bin")})["config"]["vocab_rows"], 504);
}

TEST(Inspect, ListingForPeople) {
  const RunResult r = run_krait({"inspect", "-m", tiny(), "--device", "cpu"});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("parameters"));
  EXPECT_THAT(r.out, HasSubstr("state per sequence"));
  EXPECT_THAT(r.out, HasSubstr("backbone.layers.0.mixer.in_proj.weight"));
  EXPECT_EQ(run_krait({"inspect"}).exit_code, 0) << "the shipped model";
  EXPECT_EQ(run_krait({"inspect", tiny(), "-m", golden("mamba1-hf-odd")}).exit_code, 2);
}

}  // namespace
}  // namespace krait::test
