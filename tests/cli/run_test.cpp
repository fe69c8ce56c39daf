// krait run through the built program: prompts, flags, streams, determinism, interruption.
#include <gmock/gmock.h>

#include <algorithm>

#include "checkpoint/checkpoint.h"
#include "cli/cli_support.h"

namespace krait::test {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

/// stdout of a run that must succeed.
std::string out(const Args& args, const std::string& input = {},
                const std::map<std::string, std::string>& env = {}) {
  const RunResult r = run_krait(args, input, env);
  EXPECT_EQ(r.exit_code, 0) << r.err;
  return r.out;
}

Json json_out(const Args& args) {
  const Json j = Json::parse(out(args), nullptr, false);
  EXPECT_TRUE(j.is_object());
  return j;
}

// ---- the whole way -----------------------------------------------------------------------------

TEST(Run, TextInTextOutAsTransformersDoes) {
  const Json cases = Json::parse(read_file(golden("mamba1-neox-vocab") + "/e2e.json"));
  ASSERT_FALSE(cases.empty());
  for (const Json& c : cases) {
    const auto prompt = c["prompt"].get<std::string>();
    SCOPED_TRACE(prompt);
    const Args args = run_text({"--greedy", "--ignore-eos", "-n", "24", "-p", prompt});
    const Json j = json_out(args + Args{"--json"});
    EXPECT_EQ(j["prompt_ids"], c["prompt_ids"]);
    EXPECT_EQ(j["ids"], c["new_ids"]);
    EXPECT_EQ(j["text"], c["new_text"]);
    EXPECT_EQ(out(args), c["new_text"].get<std::string>()) << "streamed";
  }
}

TEST(Run, TheShippedModelIsTheDefault) {
  const RunResult r = run_krait({"run", "Once upon a time", "-n", "4", "-s", "1"});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_FALSE(r.out.empty());
}

TEST(Run, SafetensorsFileAndFolderAreTheSameModel) {
  const std::string folder = out(run_ids({"--greedy", "-n", "8"}));
  const std::string file = out({"run", "-m", tiny() + "/model.safetensors", "--ids", "5,6,7",
                                "--print-ids", "--greedy", "-n", "8"});
  EXPECT_EQ(folder, file);
  EXPECT_THAT(folder, MatchesRegex("[0-9]+(,[0-9]+){7}\n"));
}

TEST(Run, ModelOfTheHuggingFaceCache) {
  const ScratchDir cache;
  const auto repository = cache.path() / "models--some-one--tiny-mamba";
  std::filesystem::create_directories(repository / "refs");
  std::filesystem::create_directories(repository / "snapshots");
  write_file(repository / "refs" / "main", "0123abcd");
  std::filesystem::create_directory_symlink(tiny(), repository / "snapshots" / "0123abcd");
  const Args args{"run", "-m", "some-one/tiny-mamba", "--ids", "5,6,7", "--print-ids", "--greedy",
                  "-n",  "8"};
  const std::string want = out(run_ids({"--greedy", "-n", "8"}));
  EXPECT_EQ(out(args, "", {{"HF_HUB_CACHE", cache.path()}}), want);

  const ScratchDir home;
  std::filesystem::create_directory_symlink(cache.path(), home.path() / "hub");
  EXPECT_EQ(out(args, "", {{"HF_HOME", home.path()}}), want);

  const RunResult missing =
      run_krait({"run", "-m", "some-one/else", "--ids", "1"}, "", {{"HF_HUB_CACHE", cache.path()}});
  EXPECT_EQ(missing.exit_code, 3);
  EXPECT_THAT(missing.err, HasSubstr("hint: download it first"));
}

// ---- prompts -----------------------------------------------------------------------------------

TEST(RunPrompt, EveryWayIsTheSame) {
  const ScratchDir dir;
  write_file(dir.path() / "prompt", "Hello world\n");
  write_file(dir.path() / "ids", "[12092, 1533]\n");
  const Args rest{"--greedy", "-n", "6"};
  const std::string want = out(run_text({"Hello world"}) + rest);
  EXPECT_EQ(out(run_text({"-p", "Hello world"}) + rest), want);
  EXPECT_EQ(out(run_text({"-f", dir.path() / "prompt"}) + rest), want);
  EXPECT_EQ(out(run_text({"-f", "-"}) + rest, "Hello world\r\n"), want);
  EXPECT_EQ(out(run_text() + rest, "Hello world"), want);
  EXPECT_EQ(out(run_text({"--ids", "12092,1533"}) + rest), want);
  EXPECT_EQ(out(run_text({"--ids", "@" + (dir.path() / "ids").string()}) + rest), want);
  EXPECT_NE(out(run_text({"-p", "Hello world\n"}) + rest), want)
      << "a line break in an argument was meant";
}

TEST(RunPrompt, MayLookLikeAFlag) {
  const Json j = json_out(run_text({"-p", "--help", "--json", "-n", "1"}));
  EXPECT_EQ(j["prompt"], "--help");
  EXPECT_EQ(json_out(run_text({"--json", "-n", "1", "--", "-v"}))["prompt"], "-v");
}

TEST(RunPrompt, EmptyArgumentStartsFromTheEndOfTextToken) {
  EXPECT_EQ(json_out(run_text({"-p", "", "--json", "-n", "1"}))["prompt_ids"], Json({0}));
  EXPECT_EQ(json_out(run_text({"", "--json", "-n", "1"}))["prompt_ids"], Json({0}));
}

TEST(RunPrompt, SpecialTokensInTheTextCount) {
  EXPECT_EQ(json_out(run_text({"-p", "<|endoftext|>Hi", "--json", "-n", "1"}))["prompt_ids"],
            Json({0, 12764}));
}

TEST(RunPrompt, CommandLineReplacesEnvironment) {
  const Args args = run_text({"--json", "-n", "1"});
  EXPECT_EQ(Json::parse(out(args, "", {{"KRAIT_PROMPT", "Hello"}}))["prompt"], "Hello");
  EXPECT_EQ(Json::parse(out(args + Args{"-p", "world"}, "", {{"KRAIT_PROMPT", "Hello"}}))["prompt"],
            "world");
  EXPECT_EQ(Json::parse(out(args + Args{"world"}, "", {{"KRAIT_IDS", "1,2"}}))["prompt"], "world");
}

TEST(RunPrompt, Refusals) {
  const auto refused = [](const Args& args, const std::string& part,
                          const std::string& input = {}) {
    const RunResult r = run_krait(args, input);
    EXPECT_EQ(r.exit_code, 2) << r.err;
    EXPECT_THAT(r.err, StartsWith("krait: error: "));
    EXPECT_THAT(r.err, HasSubstr(part));
    EXPECT_EQ(r.out, "");
  };
  refused(run_text({"-p", "a", "b"}), "more than one prompt");
  refused(run_text({"-p", "a", "--ids", "1"}), "more than one prompt");
  refused(run_text(), "stdin is empty");
  refused(run_text({"-p", "caf\xe9"}), "not UTF-8: byte 3 is 0xe9");
  refused(run_text(), "not UTF-8: byte 0 is 0xff", "\xff\xfe");
  refused(run_text({"-p", "\xed\xa0\x80"}), "not UTF-8");  // a surrogate
  refused({"run", "-m", tiny(), "--ids", "1,x,3", "--print-ids"}, "found \"x\"");
  refused({"run", "-m", tiny(), "--ids", "-1", "--print-ids"}, "found \"-1\"");
  refused({"run", "-m", tiny(), "--ids", "99999999999", "--print-ids"}, "expected token ids");
  refused({"run", "-m", tiny(), "--ids", "", "--print-ids"}, "empty");
  refused({"run", "-m", tiny(), "--ids", "512", "--print-ids"}, "outside");
}

/// A Mamba of one layer and four channels, all weights zero: for prompts whose length is the point.
std::filesystem::path write_smallest_model(const ScratchDir& dir) {
  write_file(dir.path() / "config.json",
             R"({"model_type": "mamba", "hidden_size": 2, "intermediate_size": 4, "expand": 2,
                 "num_hidden_layers": 1, "state_size": 2, "conv_kernel": 2, "time_step_rank": 1,
                 "vocab_size": 16, "tie_word_embeddings": true})");
  static std::vector<float> zeros(64);
  std::vector<Checkpoint::Entry> tensors;
  const auto add = [&](const std::string& name, const Shape& shape) {
    tensors.push_back({name, Tensor(zeros.data(), DType::f32, shape), ""});
  };
  const std::string layer = "backbone.layers.0.";
  add("backbone.embeddings.weight", {16, 2});
  add(layer + "norm.weight", {2});
  add(layer + "mixer.in_proj.weight", {8, 2});
  add(layer + "mixer.conv1d.weight", {4, 1, 2});
  add(layer + "mixer.conv1d.bias", {4});
  add(layer + "mixer.x_proj.weight", {5, 4});
  add(layer + "mixer.dt_proj.weight", {4, 1});
  add(layer + "mixer.dt_proj.bias", {4});
  add(layer + "mixer.A_log", {4, 2});
  add(layer + "mixer.D", {4});
  add(layer + "mixer.out_proj.weight", {2, 4});
  add("backbone.norm_f.weight", {2});
  write_safetensors(dir.path() / "model.safetensors", tensors);
  return dir.path();
}

TEST(RunPrompt, FileOfAMillionTokens) {
  const ScratchDir dir;
  const std::filesystem::path model = write_smallest_model(dir);
  std::string ids;
  for (int i = 0; i < 1000000; ++i) ids += std::to_string(i % 16) + "\n";
  write_file(dir.path() / "ids", ids);
  const RunResult r = run_krait({"run", "-m", model, "--ids", "@" + (dir.path() / "ids").string(),
                                 "--print-ids", "-n", "2", "--greedy"});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_EQ(r.out, "0,0\n") << "all logits are equal";
  EXPECT_THAT(r.err, StartsWith("1000000 prompt tokens"));
}

// ---- sampling ----------------------------------------------------------------------------------

TEST(RunSampling, SameSeedSameTextOtherSeedOtherText) {
  const std::string seven = out(run_ids({"-s", "7", "-n", "32", "--temp", "1"}));
  EXPECT_EQ(out(run_ids({"--seed", "7", "-n", "32", "--temperature", "1"})), seven);
  EXPECT_NE(out(run_ids({"-s", "8", "-n", "32", "--temp", "1"})), seven);
}

TEST(RunSampling, WithoutASeedEachRunDiffers) {
  const Args args = run_ids({"-n", "32", "--temp", "1"});
  EXPECT_NE(out(args), out(args));
  EXPECT_NE(out(args + Args{"-s", "-1"}), out(args + Args{"-s", "-1"}));
}

TEST(RunSampling, VerbosePrintsTheSeedThatRepeatsTheRun) {
  const RunResult first = run_krait(run_ids({"-n", "32", "--temp", "1", "-v"}));
  const size_t at = first.err.find("seed ");
  ASSERT_NE(at, std::string::npos) << first.err;
  const std::string seed = first.err.substr(at + 5, first.err.find(',', at) - at - 5);
  EXPECT_EQ(out(run_ids({"-n", "32", "--temp", "1", "-s", seed})), first.out);
}

TEST(RunSampling, EachFlagReachesTheSampler) {
  const Args base = run_ids({"-s", "3", "-n", "64", "--ignore-eos"});
  const std::string greedy = out(run_ids({"--greedy", "-n", "64", "--ignore-eos"}));
  const Args all{"--temp", "1", "--top-k", "0", "--top-p", "1", "--min-p", "0"};
  const std::string free = out(base + all);
  EXPECT_NE(free, greedy);
  // Each of these leaves one token to draw from.
  EXPECT_EQ(out(base + Args{"--temp", "0"}), greedy);
  EXPECT_EQ(out(base + Args{"--top-k", "1"}), greedy);
  EXPECT_EQ(out(base + Args{"--top-p", "0"}), greedy);
  EXPECT_EQ(out(base + Args{"--min-p", "1"}), greedy);
  // Each of these changes a draw from the whole distribution.
  EXPECT_NE(out(base + all + Args{"--typical-p", "0.2"}), free);
  EXPECT_NE(out(base + all + Args{"--repeat-penalty", "5"}), free);
  EXPECT_NE(out(base + all + Args{"--repetition-penalty", "5"}), free);
  EXPECT_NE(out(base + all + Args{"--presence-penalty", "50"}), free);
  EXPECT_NE(out(base + all + Args{"--frequency-penalty", "50"}), free);
  EXPECT_EQ(out(base + all + Args{"--presence-penalty", "50", "--repeat-last-n", "0"}), free);
}

TEST(RunSampling, PenaltyWindow) {
  // With a penalty that outweighs every logit, no token comes twice within the window.
  const auto ids_of = [](const std::string& text) {
    return Json::parse("[" + text + "]").get<std::vector<int>>();
  };
  const Args base =
      run_ids({"--greedy", "-n", "100", "--presence-penalty", "1000", "--ignore-eos"});
  std::vector<int> all = ids_of(out(base + Args{"--repeat-last-n", "-1"}));
  for (const int id : {5, 6, 7})
    EXPECT_EQ(std::count(all.begin(), all.end(), id), 0) << "the prompt";
  std::sort(all.begin(), all.end());
  EXPECT_EQ(std::adjacent_find(all.begin(), all.end()), all.end());
  const std::vector<int> two = ids_of(out(base + Args{"--repeat-last-n", "2"}));
  for (size_t i = 2; i < two.size(); ++i) {
    EXPECT_NE(two[i], two[i - 1]);
    EXPECT_NE(two[i], two[i - 2]);
  }
}

TEST(RunSampling, LogitBias) {
  EXPECT_EQ(out(run_ids({"-n", "3", "--logit-bias", "42=1000"})), "42,42,42\n");
  const std::string greedy = out(run_ids({"-n", "1", "--greedy"}));
  const std::string id = greedy.substr(0, greedy.size() - 1);
  EXPECT_NE(out(run_ids({"-n", "1", "--greedy", "--logit-bias", id + "=-inf"})), greedy);
  EXPECT_EQ(out(run_ids({"-n", "1", "--logit-bias", "1=500", "--logit-bias", "2=1000"})), "2\n")
      << "repeatable";
  for (const char* bad : {"5", "=1", "x=1", "5=", "5=x", "5=nan", "-1=2"}) {
    EXPECT_EQ(run_krait(run_ids({"--logit-bias", bad})).exit_code, 2) << bad;
  }
  EXPECT_EQ(run_krait(run_ids({"--logit-bias", "512=1"})).exit_code, 2) << "outside the vocabulary";
}

TEST(RunSampling, ManyBiases) {
  Args args = run_ids({"-n", "2", "--greedy"});
  for (int i = 0; i < 511; ++i) args = args + Args{"--logit-bias", std::to_string(i) + "=-inf"};
  EXPECT_EQ(out(args), "511,511\n");
}

TEST(RunSampling, BadValues) {
  const std::vector<Args> bad{{"--temp", "-1"},
                              {"--temp", "nan"},
                              {"--temp", "warm"},
                              {"--top-k", "-1"},
                              {"--top-p", "1.5"},
                              {"--min-p", "-0.1"},
                              {"--typical-p", "2"},
                              {"-n", "-2"},
                              {"--repeat-penalty", "0"},
                              {"--repeat-last-n", "-2"},
                              {"-s", "-2"},
                              {"-s", "x"},
                              {"--presence-penalty", "inf"},
                              {"--state-dtype", "i8"},
                              {"--dtype", "int8"},
                              {"--device", "tpu"},
                              {"--device", "cuda:x"},
                              {"-t", "-1"},
                              {"--prefill-chunk", "-5"},
                              {"--log-level", "loud"}};
  for (const Args& args : bad) {
    const RunResult r = run_krait(run_ids(args));
    EXPECT_EQ(r.exit_code, 2) << args[0] << " " << args[1] << ": " << r.err;
    EXPECT_THAT(r.err, StartsWith("krait: error: ")) << args[0];
    EXPECT_EQ(r.out, "");
  }
}

// ---- defaults: flag over environment over generation_config.json
// -----------------------------------

TEST(RunDefaults, GenerationConfigThenEnvironmentThenFlag) {
  const ScratchDir dir;
  const auto model = copy_model(dir);
  write_file(model / "generation_config.json",
             R"({"do_sample": true, "temperature": 0.5, "top_k": 7, "max_new_tokens": 3})");
  const Args args{"run", "-m", model, "--ids", "1,2", "--json", "--ignore-eos"};
  Json j = json_out(args);
  EXPECT_EQ(j["sampling"]["temperature"], 0.5);
  EXPECT_EQ(j["sampling"]["top_k"], 7);
  EXPECT_EQ(j["sampling"]["top_p"], 1.0) << "transformers' default beside do_sample";
  EXPECT_EQ(j["usage"]["completion_tokens"], 3);

  const std::map<std::string, std::string> env{
      {"KRAIT_TEMPERATURE", "0.6"}, {"KRAIT_TOP_K", "8"}, {"KRAIT_MAX_NEW_TOKENS", "4"}};
  j = Json::parse(out(args, "", env));
  EXPECT_EQ(j["sampling"]["temperature"], 0.6);
  EXPECT_EQ(j["sampling"]["top_k"], 8);
  EXPECT_EQ(j["usage"]["completion_tokens"], 4);

  j = Json::parse(out(args + Args{"--temp", "0.7", "-n", "5"}, "", env));
  EXPECT_EQ(j["sampling"]["temperature"], 0.7);
  EXPECT_EQ(j["sampling"]["top_k"], 8);
  EXPECT_EQ(j["usage"]["completion_tokens"], 5);

  j = Json::parse(out(args + Args{"--temp", "0.7"}, "", {{"KRAIT_GREEDY", "1"}}));
  EXPECT_EQ(j["sampling"]["temperature"], 0.7);
  j = Json::parse(out(args, "", {{"KRAIT_GREEDY", "1"}}));
  EXPECT_EQ(j["sampling"]["temperature"], 0.0);
}

TEST(RunDefaults, AFilterFlagTurnsAGreedyConfigIntoSampling) {
  const ScratchDir dir;
  const auto model = copy_model(dir);
  write_file(model / "generation_config.json", R"({"do_sample": false})");
  const Args args{"run", "-m", model, "--ids", "1,2", "--json", "-n", "1"};
  EXPECT_EQ(json_out(args)["sampling"]["temperature"], 0.0);
  EXPECT_EQ(json_out(args + Args{"--top-k", "5"})["sampling"]["temperature"], 1.0);
}

TEST(RunDefaults, WithoutAConfigTheyAreLlamaCpps) {
  const ScratchDir dir;
  const auto model = copy_model(dir);
  std::filesystem::remove(model / "generation_config.json");
  const Json j = json_out({"run", "-m", model, "--ids", "1,2", "--json", "--ignore-eos"});
  EXPECT_EQ(j["sampling"]["temperature"], 0.8);
  EXPECT_EQ(j["sampling"]["top_k"], 40);
  EXPECT_EQ(j["sampling"]["top_p"], 0.95);
  EXPECT_EQ(j["sampling"]["min_p"], 0.05);
  EXPECT_EQ(j["usage"]["completion_tokens"], 128);
}

// ---- the end
// -------------------------------------------------------------------------------------

TEST(RunEnd, EosOfEachSource) {
  // The token that greedy decoding draws third becomes the end of text.
  const std::string ids = out(run_ids({"--greedy", "-n", "6", "--ignore-eos"}));
  const std::vector<int> greedy = Json::parse("[" + ids + "]").get<std::vector<int>>();
  const auto third = std::find(greedy.begin(), greedy.end(), greedy[2]) - greedy.begin();
  const ScratchDir dir;
  const auto model = copy_model(dir);
  Json config = Json::parse(read_file(model / "config.json"));
  config["eos_token_id"] = greedy[2];
  write_file(model / "config.json", config.dump());
  std::filesystem::remove(model / "generation_config.json");
  const Args args{"run", "-m", model, "--ids", "5,6,7", "--greedy", "-n", "6", "--json"};
  Json j = json_out(args);
  EXPECT_EQ(j["finish_reason"], "stop");
  EXPECT_EQ(j["ids"].size(), static_cast<size_t>(third) + 1);

  write_file(model / "generation_config.json", R"({"eos_token_id": [511, 510]})");
  EXPECT_EQ(json_out(args)["ids"], Json(greedy)) << "generation_config.json comes first";
  write_file(model / "generation_config.json", Json{{"eos_token_id", {511, greedy[2]}}}.dump());
  EXPECT_EQ(json_out(args)["finish_reason"], "stop");
  j = json_out(args + Args{"--ignore-eos"});
  EXPECT_EQ(j["ids"].size(), 6U);
  EXPECT_EQ(std::count(j["ids"].begin(), j["ids"].end(), greedy[2]), 0) << "it is never drawn";
}

TEST(RunEnd, StopStringsMayStraddleTokens) {
  const Json cases = Json::parse(read_file(golden("mamba1-neox-vocab") + "/e2e.json"));
  const auto prompt = cases[0]["prompt"].get<std::string>();
  const auto text = cases[0]["new_text"].get<std::string>();  // ";}ilitiescrow spir Alberta ..."
  const Args args = run_text({"--greedy", "-n", "24", "-p", prompt});
  const std::string stop = "escrow sp";  // ends of one token, all of the next, start of a third
  ASSERT_NE(text.find(stop), std::string::npos);
  EXPECT_EQ(out(args + Args{"--stop", stop}), text.substr(0, text.find(stop)));
  EXPECT_EQ(out(args + Args{"--stop", "never", "--stop", " Alberta"}),
            text.substr(0, text.find(" Alberta")));
  const Json j = json_out(args + Args{"--stop", stop, "--json"});
  EXPECT_EQ(j["finish_reason"], "stop");
  EXPECT_EQ(out(args + Args{"--stop", text + "and more"}), text) << "held back, then shown";
  EXPECT_EQ(out(args, "", {{"KRAIT_STOP", " Alberta"}}), text.substr(0, text.find(" Alberta")));
}

TEST(RunEnd, ZeroTokens) {
  EXPECT_EQ(out(run_ids({"-n", "0"})), "\n");
  EXPECT_EQ(out(run_text({"-n", "0", "-p", "Hello"})), "");
}

// ---- output
// --------------------------------------------------------------------------------------

TEST(RunOutput, JsonHasWhatScriptsNeed) {
  const Json j = json_out(run_text({"-p", "Hello world", "--json", "-n", "5", "-s", "9"}));
  EXPECT_EQ(j["model"], golden("mamba1-neox-vocab"));
  EXPECT_EQ(j["prompt"], "Hello world");
  EXPECT_EQ(j["ids"].size(), 5U);
  EXPECT_EQ(j["finish_reason"], "length");
  EXPECT_EQ(j["usage"],
            Json({{"prompt_tokens", 2}, {"completion_tokens", 5}, {"total_tokens", 7}}));
  EXPECT_EQ(j["sampling"]["seed"], 9);
  EXPECT_EQ(j["backend"], "cpu");
  EXPECT_EQ(j["dtype"], "f32");
  EXPECT_GT(j["timings"]["prompt_ms"], 0.0);
  EXPECT_GT(j["memory_bytes"], 6000000);
  EXPECT_FALSE(j.contains("logprobs"));
}

TEST(RunOutput, Logprobs) {
  const Json j =
      json_out(run_text({"-p", "Hello", "--json", "-n", "4", "--greedy", "--logprobs", "3"}));
  ASSERT_EQ(j["logprobs"].size(), 4U);
  for (size_t i = 0; i < 4; ++i) {
    const Json& token = j["logprobs"][i];
    EXPECT_EQ(token["id"], j["ids"][i]);
    ASSERT_EQ(token["top_logprobs"].size(), 3U);
    EXPECT_EQ(token["top_logprobs"][0]["id"], token["id"]) << "greedy draws the likeliest";
    EXPECT_EQ(token["top_logprobs"][0]["logprob"], token["logprob"]);
    EXPECT_LT(token["logprob"], 0.0);
    EXPECT_GE(token["top_logprobs"][0]["logprob"], token["top_logprobs"][1]["logprob"]);
  }
  EXPECT_EQ(json_out(run_text({"-p", "Hello", "--json", "-n", "4", "--greedy"}))["ids"], j["ids"]);
  EXPECT_EQ(json_out(run_text({"-p", "Hello", "--json", "-n", "1", "--logprobs",
                               "0"}))["logprobs"][0]["top_logprobs"],
            Json::array());
  EXPECT_EQ(run_krait(run_text({"-p", "Hello", "--logprobs", "3"})).exit_code, 2);
}

TEST(RunOutput, StdoutIsTheResultAlone) {
  const RunResult r = run_krait(run_text({"-p", "Hello", "-n", "4", "--greedy", "-v"}));
  EXPECT_EQ(r.out, out(run_text({"-p", "Hello", "-n", "4", "--greedy"})));
  EXPECT_THAT(r.err, HasSubstr("1 prompt tokens"));
  EXPECT_THAT(r.err, HasSubstr("4 generated"));
  EXPECT_THAT(r.err, HasSubstr("debug: "));
  EXPECT_THAT(r.err, Not(HasSubstr("\x1b"))) << "no colours where stderr is no terminal";
  EXPECT_EQ(run_krait(run_text({"-p", "Hello", "-n", "4", "-q"})).err, "");
}

TEST(RunOutput, NeedsATokenizerForTextOnly) {
  const RunResult r = run_krait({"run", "-m", tiny(), "--ids", "1,2"});
  EXPECT_EQ(r.exit_code, 3);
  EXPECT_THAT(r.err, HasSubstr("has no tokenizer\nhint: give one with --tokenizer"));
  EXPECT_EQ(run_krait({"run", "-m", tiny(), "-p", "text"}).exit_code, 3);
  EXPECT_EQ(run_krait(run_ids({"--stop", "x"})).exit_code, 3);
  const Json j = json_out({"run", "-m", tiny(), "--ids", "1,2", "--json", "-n", "3"});
  EXPECT_TRUE(j["text"].is_null());
  EXPECT_EQ(j["ids"].size(), 3U);
}

TEST(RunOutput, AFullDiskIsAnError) {
  const ScratchDir dir;
  const char* moved = std::getenv("KRAIT_TEST_PROGRAM");
  const std::string program = moved != nullptr ? moved : KRAIT_TEST_PROGRAM;
  const std::string err = (dir.path() / "err").string();
  // /dev/full takes nothing.
  const int status =
      std::system(fmt::format("'{}' run -m '{}' --ids 1 --print-ids -n 2 >/dev/full 2>'{}'",
                              program, tiny(), err)
                      .c_str());
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_THAT(read_file(err), HasSubstr("cannot write to stdout: No space left"));
}

TEST(RunOutput, EachTokenIsWrittenWhenItIsThere) {
  // stdio would hand over 4096 bytes at a time. A reader that gets to run late may find as many,
  // but not each time.
  size_t fewest = SIZE_MAX;
  for (int attempt = 0; attempt < 10 && fewest >= 4096; ++attempt) {
    Child child(run_ids({"-n", "-1", "--ignore-eos"}), Child::Kind::pipe);
    fewest = std::min(fewest, child.read_some().size());
    EXPECT_GT(fewest, 0U);
  }
  EXPECT_LT(fewest, 4096U);
}

TEST(RunOutput, AReaderMayLeave) {
  Child child(run_ids({"-n", "-1", "--ignore-eos"}), Child::Kind::pipe);
  EXPECT_FALSE(child.read_some().empty());
  child.close_output();
  EXPECT_EQ(child.wait(), 0);
}

TEST(RunOutput, CtrlCKeepsWhatIsThere) {
  Child child(run_ids({"-n", "-1", "--ignore-eos"}), Child::Kind::pipe);
  std::string text = child.read_some();
  ASSERT_FALSE(text.empty());
  child.interrupt();
  text += child.read_all();
  EXPECT_EQ(child.wait(), 130);
  EXPECT_THAT(text, MatchesRegex("[0-9]+(,[0-9]+)*\n"));
}

TEST(RunOutput, CtrlCEndsAJsonRunWithItsJson) {
  Child child(Args{"run", "-m", tiny(), "--ids", "5", "--json", "-n", "-1", "--ignore-eos", "-v"},
              Child::Kind::terminal);
  std::string err = child.read_some();
  while (err.find("seed") == std::string::npos) err += child.read_some();
  usleep(200000);  // into the loop, where Ctrl-C is heard
  child.interrupt();
  const std::string text = child.read_all();
  EXPECT_EQ(child.wait(), 130);
  EXPECT_THAT(text, HasSubstr("\"finish_reason\":\"interrupted\""));
}

TEST(RunOutput, OnATerminalTheTextEndsWithALineBreak) {
  Child child(run_text({"-p", "Hello", "-n", "4", "--greedy", "-q"}), Child::Kind::terminal);
  const std::string text = child.read_all();
  EXPECT_EQ(child.wait(), 0);
  EXPECT_EQ(text, out(run_text({"-p", "Hello", "-n", "4", "--greedy"})) + "\r\n");
}

// ---- settings that must not change the result
// --------------------------------------------------------

TEST(RunSettings, ChunksThreadsAndNames) {
  const ScratchDir dir;
  std::string ids;
  for (int i = 0; i < 100; ++i) ids += std::to_string(i * 7 % 512) + " ";
  write_file(dir.path() / "ids", ids);
  const Args args{"run",         "-m",       tiny(), "--ids", "@" + (dir.path() / "ids").string(),
                  "--print-ids", "--greedy", "-n",   "16"};
  const std::string want = out(args);
  EXPECT_EQ(out(args + Args{"--prefill-chunk", "7"}), want);
  EXPECT_EQ(out(args + Args{"--prefill-chunk", "1"}), want);
  EXPECT_EQ(out(args + Args{"-t", "1"}), want);
  EXPECT_EQ(out(args + Args{"--threads", "3"}), want);
  EXPECT_EQ(out(args + Args{"--device", "cpu", "--dtype", "float32", "--state-dtype", "float32"}),
            want);
  EXPECT_EQ(out(args, "", {{"KRAIT_PREFILL_CHUNK", "9"}, {"KRAIT_DEVICE", "cpu"}}), want);
}

TEST(RunSettings, DtypesAreUsed) {
  for (const char* dtype : {"bf16", "f16"}) {
    const Json j = json_out({"run", "-m", tiny(), "--ids", "1,2", "--json", "-n", "2", "--dtype",
                             dtype, "--state-dtype", dtype});
    EXPECT_EQ(j["dtype"], dtype);
    EXPECT_EQ(j["state_dtype"], dtype);
  }
}

/// The same twice, not the same as by the nearest value, and with a state in f32 no
/// difference.
TEST(RunSettings, StateRoundingIsUsed) {
  const Args args{"run", "-m", tiny(),       "--ids", "5,6,7",    "--device", "cpu",
                  "-n",  "64", "--logprobs", "1",     "--greedy", "--json"};
  const auto logprobs = [&](const char* dtype, const char* rounding) {
    return json_out(args + Args{"--state-dtype", dtype, "--state-rounding", rounding})["logprobs"];
  };
  const Json stochastic = logprobs("bf16", "stochastic");
  ASSERT_TRUE(stochastic.is_array() || stochastic.is_object());
  EXPECT_EQ(stochastic, logprobs("bf16", "stochastic"));
  EXPECT_NE(stochastic, logprobs("bf16", "nearest"));
  EXPECT_EQ(logprobs("f32", "stochastic"), logprobs("f32", "nearest"));
  EXPECT_EQ(run_krait(run_ids({"--state-rounding", "up"})).exit_code, 2);
}

TEST(RunSettings, AnAbsentDeviceIsAnErrorNotAFallback) {
  const RunResult r = run_krait(run_ids({"--device", "cuda:99"}));
  EXPECT_EQ(r.exit_code, 5);
  EXPECT_THAT(r.err, HasSubstr("CUDA"));
  EXPECT_EQ(r.out, "");
}

// ---- the state-spaces tokenizer rule
// -------------------------------------------------------------

TEST(RunTokenizer, StateSpacesModelsGetGptNeoxWhereItFits) {
  // 501 ids: GPT-NeoX-20B's 50277 do not fit.
  EXPECT_EQ(run_krait({"run", "-m", golden("mamba1-original-bin"), "-p", "Hello"}).exit_code, 3);

  // The same weights as a state-spaces folder: keys of the config and names of tensors are read in
  // either world, so that the config alone makes it one.
  const ScratchDir dir;
  const auto model = copy_model(dir, "mamba1-neox-vocab");
  std::filesystem::remove(model / "generation_config.json");
  write_file(model / "config.json",
             R"({"d_model": 32, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": true,
                 "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 8})");
  const RunResult r =
      run_krait({"run", "-m", model, "-p", "Once upon a time", "--greedy", "-n", "24"});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.err, HasSubstr("GPT-NeoX-20B"));
  const Json cases = Json::parse(read_file(golden("mamba1-neox-vocab") + "/e2e.json"));
  EXPECT_EQ(r.out, cases[0]["new_text"].get<std::string>());
}

TEST(RunTokenizer, BesideTheModel) {
  const ScratchDir dir;
  const auto model = copy_model(dir, "mamba1-neox-vocab");
  std::filesystem::copy_file(neox_tokenizer(), model / "tokenizer.json");
  EXPECT_EQ(out({"run", "-m", model, "-p", "Hello", "--greedy", "-n", "4"}),
            out(run_text({"-p", "Hello", "--greedy", "-n", "4"})));
}

/// A chat model: random weights, GPT-NeoX's tokenizer and a template.
std::filesystem::path chat_model(const ScratchDir& dir) {
  const auto folder = copy_model(dir, "mamba1-neox-vocab");
  std::filesystem::copy_file(neox_tokenizer(), folder / "tokenizer.json");
  write_file(folder / "tokenizer_config.json",
             R"({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template":
                 "{% for m in messages %}{{ m.role + ':' + m.content + '|' }}{% endfor %}A:"})");
  return folder;
}

TEST(Chat, PutsThePromptIntoTheTemplate) {
  const ScratchDir dir;
  const auto model = chat_model(dir);
  const auto prompt_ids = [&](const Args& more) {
    const RunResult r =
        run_krait(Args{"run", "-m", model.string(), "--json", "-n", "1", "--device", "cpu"} + more);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    return Json::parse(r.out)["prompt_ids"];
  };
  EXPECT_EQ(prompt_ids({"--chat", "Hello"}), prompt_ids({"user:Hello|A:"}));
  EXPECT_EQ(prompt_ids({"--chat", "--system", "Be brief", "Hello"}),
            prompt_ids({"system:Be brief|user:Hello|A:"}));
  write_file(dir.path() / "t.jinja", "{{ bos_token }}{{ messages[0]['content'] }}");
  EXPECT_EQ(prompt_ids({"--chat", "--chat-template", (dir.path() / "t.jinja").string(), "Hello"}),
            prompt_ids({"<|endoftext|>Hello"}));
  // The template goes along into a GGUF file, and out of it again.
  const std::string gguf = (dir.path() / "m.gguf").string();
  ASSERT_EQ(run_krait({"convert", model.string(), gguf}).exit_code, 0);
  const RunResult r = run_krait({"run", "-m", gguf, "--json", "-n", "1", "--chat", "Hello"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_EQ(Json::parse(r.out)["prompt_ids"], prompt_ids({"user:Hello|A:"}));
}

TEST(Chat, WhatIsMissingIsSaid) {
  const ScratchDir dir;
  // A tokenizer whose ids the model does not have.
  write_file(dir.path() / "t.jinja", "{{ messages[0].content }}");
  const RunResult other =
      run_krait({"run", "-m", tiny(), "--tokenizer", neox_tokenizer(), "--chat", "--chat-template",
                 (dir.path() / "t.jinja").string(), "Hello"});
  EXPECT_EQ(other.exit_code, 2);
  EXPECT_THAT(other.err, HasSubstr("outside the model's vocabulary"));
  const RunResult none = run_krait(run_text({"--chat", "Hello"}));
  EXPECT_EQ(none.exit_code, 3);
  EXPECT_THAT(none.err, HasSubstr("has no chat template"));
  EXPECT_EQ(run_krait(run_text({"--system", "x", "Hello"})).exit_code, 2);
  EXPECT_EQ(run_krait(run_ids({"--chat"})).exit_code, 2);
  const auto model = chat_model(dir);
  write_file(model / "chat_template.jinja", "{{ raise_exception('no system here') }}");
  const RunResult refused = run_krait({"run", "-m", model.string(), "--chat", "Hello"});
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, HasSubstr("no system here"));
  EXPECT_EQ(refused.out, "");
}

}  // namespace
}  // namespace krait::test
