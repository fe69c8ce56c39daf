// config.json of either world, its leftovers, and its damage.
#include "model/config.h"

#include <gmock/gmock.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "model/random_weights.h"
#include "support/test_support.h"

namespace krait {
namespace {

using nlohmann::json;
using test::throws;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

json hugging_face() {
  return json::parse(R"({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 3,
    "vocab_size": 512, "state_size": 16, "conv_kernel": 4, "expand": 2, "intermediate_size": 128,
    "time_step_rank": 4, "layer_norm_epsilon": 1e-05, "tie_word_embeddings": true,
    "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "use_bias": false})");
}

json state_spaces() {
  return json::parse(R"({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {},
    "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true,
    "pad_vocab_size_multiple": 8})");
}

ModelConfig parse(const json& j) { return parse_config(j, "config.json"); }

ModelConfig parse_with(json base, const char* key, json value) {
  base[key] = std::move(value);
  return parse(base);
}

TEST(Config, HuggingFace) {
  const ModelConfig c = parse(hugging_face());
  EXPECT_EQ(c.family, "mamba1");
  EXPECT_EQ(c.layout, "huggingface");
  EXPECT_EQ(c.d_model, 64);
  EXPECT_EQ(c.n_layer, 3);
  EXPECT_EQ(c.vocab_size, 512);
  EXPECT_EQ(c.vocab_rows, 0);
  EXPECT_EQ(c.d_inner, 128);
  EXPECT_EQ(c.d_state, 16);
  EXPECT_EQ(c.d_conv, 4);
  EXPECT_EQ(c.dt_rank, 4);
  EXPECT_FLOAT_EQ(c.norm_eps, 1e-5F);
  EXPECT_TRUE(c.tie_embeddings);
  EXPECT_THAT(c.eos_ids, ElementsAre(0));
  EXPECT_EQ(c.bos_id, 0);
  EXPECT_THAT(c.other_n_layer, IsEmpty());
  EXPECT_THAT(c.other_d_inner, IsEmpty());
}

TEST(Config, StateSpaces) {
  const ModelConfig c = parse(state_spaces());
  EXPECT_EQ(c.family, "mamba1");
  EXPECT_EQ(c.layout, "state-spaces");
  EXPECT_EQ(c.d_model, 768);
  EXPECT_EQ(c.n_layer, 24);
  EXPECT_EQ(c.vocab_size, 50277);
  EXPECT_EQ(c.d_inner, 1536);
  EXPECT_EQ(c.d_state, 16);
  EXPECT_EQ(c.d_conv, 4);
  EXPECT_EQ(c.dt_rank, 48);
  EXPECT_TRUE(c.tie_embeddings);
  EXPECT_THAT(c.eos_ids, IsEmpty());
  EXPECT_FALSE(c.bos_id.has_value());
}

TEST(Config, StateSpacesMixerArguments) {
  const json ssm{{"d_state", 8}, {"d_conv", 3}, {"expand", 3}, {"dt_rank", 5}, {"layer", "Mamba1"}};
  const ModelConfig c = parse_with(state_spaces(), "ssm_cfg", ssm);
  EXPECT_EQ(c.d_state, 8);
  EXPECT_EQ(c.d_conv, 3);
  EXPECT_EQ(c.d_inner, 3 * 768);
  EXPECT_EQ(c.dt_rank, 5);
}

TEST(Config, FalconMamba) {
  json j = hugging_face();
  j["model_type"] = "falcon_mamba";
  j["expand"] = 16;  // as the published file says, whose intermediate_size is right
  j["tie_word_embeddings"] = false;
  const ModelConfig c = parse(j);
  EXPECT_EQ(c.family, "falcon-mamba");
  EXPECT_EQ(c.d_inner, 128);
  EXPECT_FALSE(c.tie_embeddings);
  EXPECT_FLOAT_EQ(c.mixer_norm_eps, 1e-6F);
  EXPECT_FLOAT_EQ(parse_with(j, "mixer_rms_eps", 1e-4).mixer_norm_eps, 1e-4F);
  EXPECT_FLOAT_EQ(parse(hugging_face()).mixer_norm_eps, 0.0F);
  EXPECT_TRUE(
      throws(ErrorKind::format, "mixer_rms_eps", [&] { (void)parse_with(j, "mixer_rms_eps", 0); }));
}

json mamba2() {
  return json::parse(R"({"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 3,
    "vocab_size": 512, "state_size": 32, "conv_kernel": 4, "expand": 2, "num_heads": 8,
    "head_dim": 16, "n_groups": 4, "layer_norm_epsilon": 1e-04, "time_step_limit": [0.0, null]})");
}

TEST(Config, Mamba2) {
  const ModelConfig c = parse(mamba2());
  EXPECT_EQ(c.family, "mamba2");
  EXPECT_EQ(c.d_inner, 128);
  EXPECT_EQ(c.d_state, 32);
  EXPECT_EQ(c.n_head, 8);
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_EQ(c.n_group, 4);
  EXPECT_EQ(c.dt_rank, 0);
  EXPECT_FLOAT_EQ(c.mixer_norm_eps, 1e-4F);
  EXPECT_EQ(c.dt_min, 0.0F);
  EXPECT_TRUE(std::isinf(c.dt_max));
}

TEST(Config, Mamba2DefaultsDependOnTheWorld) {
  const ModelConfig original =
      parse_with(state_spaces(), "ssm_cfg", {{"layer", "Mamba2"}, {"headdim", 32}});
  EXPECT_EQ(original.family, "mamba2");
  EXPECT_EQ(original.d_inner, 1536);
  EXPECT_EQ(original.d_state, 128);
  EXPECT_EQ(original.n_head, 48);
  EXPECT_EQ(original.n_group, 1);
  EXPECT_FLOAT_EQ(original.mixer_norm_eps, 1e-5F);
  json j = mamba2();  // transformers' class describes Codestral
  j["hidden_size"] = 4096;
  for (const char* key : {"state_size", "num_heads", "head_dim", "n_groups"}) j.erase(key);
  const ModelConfig c = parse(j);
  EXPECT_EQ(c.d_state, 128);
  EXPECT_EQ(c.n_head, 128);
  EXPECT_EQ(c.n_group, 8);
}

TEST(Config, MistralsParams) {
  const json params = json::parse(R"({"dim": 4096, "n_layers": 64, "vocab_size": 32768,
    "n_groups": 8, "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true,
    "pad_vocab_size_multiple": 1, "tie_embeddings": false, "model_type": "mamba"})");
  const ModelConfig c = parse(params);
  EXPECT_EQ(c.family, "mamba2");
  EXPECT_EQ(c.layout, "mistral");
  EXPECT_EQ(c.d_model, 4096);
  EXPECT_EQ(c.n_layer, 64);
  EXPECT_EQ(c.d_inner, 8192);
  EXPECT_EQ(c.n_head, 128);
  EXPECT_EQ(c.n_group, 8);
  EXPECT_EQ(c.d_state, 128);
  EXPECT_EQ(c.d_conv, 4);
  EXPECT_FALSE(c.tie_embeddings);
  // Mistral's other models use the same keys.
  EXPECT_TRUE(throws(ErrorKind::unsupported, "transformer",
                     [&] { (void)parse_with(params, "model_type", "transformer"); }));
  json none = params;
  none.erase("model_type");
  EXPECT_TRUE(throws(ErrorKind::unsupported, "model_type", [&] { (void)parse(none); }));
}

TEST(Config, Mamba2LimitsOfDt) {
  const auto limit = [](json pair) {
    return parse_with(mamba2(), "time_step_limit", std::move(pair));
  };
  EXPECT_FLOAT_EQ(limit({0.001, 0.5}).dt_min, 0.001F);
  EXPECT_FLOAT_EQ(limit({0.001, 0.5}).dt_max, 0.5F);
  EXPECT_TRUE(std::isinf(limit({0.0, {{"__float__", "Infinity"}}}).dt_max));
  for (const json& bad :
       {json(1), json::array({0.0}), json::array({-1, 1}), json::array({2, 1}),
        json::array({"a", 1}), json::array({nullptr, 1}), json::array({0, {{"__float__", 7}}})}) {
    EXPECT_TRUE(throws(ErrorKind::format, "time_step_limit", [&] { (void)limit(bad); })) << bad;
  }
}

TEST(Config, Mamba2SizesThatDoNotDivide) {
  for (const auto& [key, bad] : {std::pair{"head_dim", 24}, {"num_heads", 16}, {"n_groups", 3}}) {
    EXPECT_TRUE(throws(ErrorKind::format, key, [&, k = key, b = bad] {
      (void)parse_with(mamba2(), k, b);
    })) << key;
  }
  for (const auto& [key, bad] : {std::pair{"D_has_hdim", json(true)},
                                 {"rmsnorm", json(false)},
                                 {"norm_before_gate", json(true)},
                                 {"d_ssm", json(768)}}) {
    EXPECT_TRUE(throws(ErrorKind::unsupported, key, [&, k = key, b = bad] {
      (void)parse_with(state_spaces(), "ssm_cfg", {{"layer", "Mamba2"}, {k, b}});
    })) << key;
  }
}

TEST(Config, PublishedShapesAreThoseOfTheTable) {
  EXPECT_EQ(published_config("130m").dt_rank, 48);
  EXPECT_EQ(published_config("2.8b").d_inner, 5120);
  EXPECT_EQ(published_config("2.8b").n_layer, 64);
  EXPECT_EQ(published_config("mamba2-2.7b").n_head, 80);
  EXPECT_EQ(published_config("codestral-mamba-7b").n_group, 8);
  EXPECT_TRUE(throws(ErrorKind::usage, "3b", [] { (void)published_config("3b"); }));
}

TEST(Config, TimeStepRankAutoRoundsUp) {
  EXPECT_EQ(parse_with(hugging_face(), "time_step_rank", "auto").dt_rank, 4);
  json j = hugging_face();
  j["hidden_size"] = 65;
  EXPECT_EQ(parse_with(j, "time_step_rank", "auto").dt_rank, 5);
  j.erase("time_step_rank");
  EXPECT_EQ(parse(j).dt_rank, 5);
}

TEST(Config, IntermediateSizeOverridesExpand) {
  json j = hugging_face();
  j["expand"] = 16;  // as in falcon-mamba-7b, whose ratio is 2
  const ModelConfig c = parse(j);
  EXPECT_EQ(c.d_inner, 128);
  EXPECT_THAT(c.other_d_inner, ElementsAre(1024));
  j.erase("intermediate_size");
  EXPECT_EQ(parse(j).d_inner, 1024);
}

TEST(Config, LeftoversOfEarlyConversionsAreKept) {
  json j = hugging_face();
  j["n_layer"] = 48;
  j["d_inner"] = 160;
  const ModelConfig c = parse(j);
  EXPECT_EQ(c.n_layer, 3);
  EXPECT_THAT(c.other_n_layer, ElementsAre(48));
  EXPECT_EQ(c.d_inner, 128);
  EXPECT_THAT(c.other_d_inner, ElementsAre(160));
}

TEST(Config, EosIsOneIdOrAList) {
  EXPECT_THAT(parse_with(hugging_face(), "eos_token_id", 7).eos_ids, ElementsAre(7));
  EXPECT_THAT(parse_with(hugging_face(), "eos_token_id", {0, 11}).eos_ids, ElementsAre(0, 11));
  EXPECT_THAT(parse_with(hugging_face(), "eos_token_id", nullptr).eos_ids, IsEmpty());
  EXPECT_THAT(parse_with(hugging_face(), "eos_token_id", -1).eos_ids, IsEmpty());
  for (const json& bad : {json("x"), json(1.5), json(int64_t{1} << 40), json{{1, "x"}}}) {
    EXPECT_TRUE(throws(ErrorKind::format, "eos_token_id", [&] {
      (void)parse_with(hugging_face(), "eos_token_id", bad);
    })) << bad;
  }
}

TEST(Config, ImpossibleValuesAreNamed) {
  const json bad_sizes[] = {0, -1, int64_t{1} << 40, UINT64_MAX, 1.5, "64", true, json::array({1})};
  for (const char* key : {"hidden_size", "num_hidden_layers", "vocab_size", "state_size",
                          "conv_kernel", "intermediate_size", "time_step_rank"}) {
    for (const json& bad : bad_sizes) {
      EXPECT_TRUE(
          throws(ErrorKind::format, key, [&] { (void)parse_with(hugging_face(), key, bad); }))
          << key << " " << bad;
    }
  }
  for (const json& bad : {json(0), json(-2), json(1e9), json("2"), json(false)}) {
    EXPECT_TRUE(throws(ErrorKind::format, "expand", [&] {
      (void)parse_with(hugging_face(), "expand", bad);
    })) << bad;
  }
  EXPECT_TRUE(throws(ErrorKind::format, "layer_norm_epsilon",
                     [] { (void)parse_with(hugging_face(), "layer_norm_epsilon", -1e-5); }));
  EXPECT_TRUE(throws(ErrorKind::format, "tie_word_embeddings",
                     [] { (void)parse_with(hugging_face(), "tie_word_embeddings", "yes"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "ssm_cfg.d_state", [] {
    (void)parse_with(state_spaces(), "ssm_cfg", {{"d_state", 0}});
  }));
}

TEST(Config, ExpandedWidthHasALimit) {
  json j = hugging_face();
  j.erase("intermediate_size");
  j["hidden_size"] = 1 << 20;
  j["expand"] = 1000;
  EXPECT_TRUE(throws(ErrorKind::format, "expand", [&] { (void)parse(j); }));
  j["hidden_size"] = 1;
  j["expand"] = 0.5;
  EXPECT_TRUE(throws(ErrorKind::format, "expand", [&] { (void)parse(j); }));
}

TEST(Config, RequiredKeysAreNamed) {
  for (const char* key : {"hidden_size", "num_hidden_layers", "vocab_size"}) {
    json j = hugging_face();
    j.erase(key);
    EXPECT_TRUE(throws(ErrorKind::format, key, [&] { (void)parse(j); }));
  }
  json j = state_spaces();
  j.erase("vocab_size");
  EXPECT_TRUE(throws(ErrorKind::format, "vocab_size", [&] { (void)parse(j); }));
}

TEST(Config, OtherFamiliesAreRefusedByName) {
  const std::pair<const char*, const char*> families[] = {
      {"mamba3", "Mamba-3"},        {"jamba", "Jamba"},         {"zamba2", "Zamba2"},
      {"nemotron_h", "Nemotron-H"}, {"falcon_h1", "Falcon-H1"}, {"llama", "\"llama\" is unknown"}};
  for (const auto& [type, name] : families) {
    EXPECT_TRUE(throws(ErrorKind::unsupported, name, [&] {
      (void)parse_with(hugging_face(), "model_type", type);
    })) << type;
  }
  for (const auto& [layer, name] : {std::pair{"Mamba3", "Mamba-3"}, {"Mamba9", "Mamba9"}}) {
    EXPECT_TRUE(throws(ErrorKind::unsupported, name, [&] {
      (void)parse_with(state_spaces(), "ssm_cfg", {{"layer", layer}});
    })) << layer;
  }
  // Both names: the layer's is the more exact.
  EXPECT_TRUE(throws(ErrorKind::unsupported, "Mamba-3", [] {
    (void)parse_with(hugging_face(), "ssm_cfg", {{"layer", "Mamba3"}});
  }));
}

TEST(Config, PartsThatAreNotBuiltAreRefused) {
  EXPECT_TRUE(throws(ErrorKind::unsupported, "rms_norm",
                     [] { (void)parse_with(state_spaces(), "rms_norm", false); }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "d_intermediate",
                     [] { (void)parse_with(state_spaces(), "d_intermediate", 1024); }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "attn_layer_idx", [] {
    (void)parse_with(state_spaces(), "attn_layer_idx", {9, 18});
  }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "hidden_act",
                     [] { (void)parse_with(hugging_face(), "hidden_act", "gelu"); }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "width 1",
                     [] { (void)parse_with(hugging_face(), "conv_kernel", 1); }));
}

TEST(Config, NotAMamba) {
  EXPECT_TRUE(throws(ErrorKind::unsupported, "model_type", [] { (void)parse(json::object()); }));
  EXPECT_TRUE(throws(ErrorKind::format, "object", [] { (void)parse(json::array()); }));
  EXPECT_TRUE(throws(ErrorKind::format, "model_type", [] {
    (void)parse(json{{"model_type", 5}});
  }));
}

TEST(ConfigText, PythonNumbersAreAccepted) {
  const ModelConfig c = parse_config_text(
      R"({"a": Infinity, "b": [0.0, -Infinity, NaN], "c": "NaN \" Infinity", "model_type": "mamba",
          "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8})",
      "config.json");
  EXPECT_EQ(c.d_model, 64);
  EXPECT_TRUE(throws(ErrorKind::format, "expand", [] {
    (void)parse_config_text(
        R"({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8,
            "expand": NaN})",
        "config.json");
  }));
}

TEST(ConfigText, DamagedJson) {
  for (const std::string text :
       {"", "{", "{\"a\":}", "nul", "\xff\xfe", "{\"a\": \"\x80\"}", "[[", "\0"}) {
    EXPECT_TRUE(throws(ErrorKind::format, "config.json", [&] {
      (void)parse_config_text(text, "config.json");
    })) << text;
  }
}

TEST(ConfigText, DeepJsonIsRefused) {
  const std::string deep = std::string(100000, '[');
  EXPECT_TRUE(throws(ErrorKind::format, "nested deeper",
                     [&] { (void)parse_config_text(deep, "config.json"); }));
  std::string objects;
  for (int i = 0; i < 1000; ++i) objects += "{\"a\":";
  EXPECT_TRUE(throws(ErrorKind::format, "nested deeper",
                     [&] { (void)parse_config_text(objects, "config.json"); }));
}

TEST(ConfigFile, MissingAndHuge) {
  const test::ScratchDir dir;
  EXPECT_TRUE(throws(ErrorKind::file, "config.json",
                     [&] { (void)read_config(dir.path() / "config.json"); }));
  test::write_file(dir.path() / "config.json", std::string((4 << 20) + 1, ' '));
  EXPECT_TRUE(throws(ErrorKind::format, "config.json",
                     [&] { (void)read_config(dir.path() / "config.json"); }));
  test::write_file(dir.path() / "config.json", hugging_face().dump());
  EXPECT_EQ(read_config(dir.path() / "config.json").n_layer, 3);
  EXPECT_TRUE(throws(ErrorKind::file, "", [&] { (void)read_config(dir.path()); }));
}

}  // namespace
}  // namespace krait
