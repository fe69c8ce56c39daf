// Bad input of every class through the built program: one sentence on stderr, nothing on stdout,
// and the exit code that design promises (2 usage, 3 file or format, 4 unsupported, 5 device).
#include <gmock/gmock.h>

#include <algorithm>
#include <functional>

#include "checkpoint/checkpoint.h"
#include "cli/cli_support.h"

namespace krait::test {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::StartsWith;

void expect_error(const Args& args, int code, const std::string& part,
                  const std::map<std::string, std::string>& env = {}) {
  const RunResult r = run_krait(args, "", env);
  EXPECT_EQ(r.exit_code, code) << r.err;
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, HasSubstr("krait: error: "));
  EXPECT_THAT(r.err, HasSubstr(part));
  // The error is the last thing said: one line, and at most one more for the hint.
  const std::string error = r.err.substr(r.err.find("krait: error: "));
  const auto lines = std::count(error.begin(), error.end(), '\n');
  EXPECT_TRUE(lines == 1 || (lines == 2 && error.find("\nhint: ") != std::string::npos)) << r.err;
}

// ---- the command line
// ------------------------------------------------------------------------------

TEST(CommandLine, HelpAndVersionAreNoErrors) {
  for (const Args& args : std::vector<Args>{{"--help"},
                                            {"-h"},
                                            {"run", "--help"},
                                            {"tokenize", "-h"},
                                            {"logits", "--help"},
                                            {"inspect", "--help"},
                                            {"bench", "--help"}}) {
    const RunResult r = run_krait(args);
    EXPECT_EQ(r.exit_code, 0) << args[0];
    EXPECT_THAT(r.out, HasSubstr("Usage: krait")) << args[0];
    EXPECT_EQ(r.err, "");
  }
  const RunResult r = run_krait({"--version"});
  EXPECT_EQ(r.exit_code, 0);
  EXPECT_THAT(r.out, StartsWith("krait 0."));
}

TEST(CommandLine, EveryFlagHasAnEnvironmentName) {
  for (const char* command : {"run", "tokenize", "logits", "inspect", "bench"}) {
    std::istringstream help(run_krait({command, "--help"}).out);
    std::string line;
    while (std::getline(help, line)) {
      const size_t dashes = line.find("--");
      if (line.rfind("  -", 0) != 0 || dashes == std::string::npos) continue;
      if (line.find("--help") != std::string::npos) continue;
      EXPECT_THAT(line, HasSubstr("(Env:KRAIT_")) << command;
    }
  }
}

TEST(CommandLine, Mistakes) {
  expect_error({}, 2, "a command is expected");
  expect_error({"sing"}, 2, "");
  expect_error({"run", "--no-such-flag"}, 2, "--no-such-flag");
  expect_error({"run", "-n"}, 2, "-n");
  expect_error({"run", "-m", tiny(), "-n", "five", "--ids", "1", "--print-ids"}, 2, "five");
  expect_error({"run", "-m", tiny(), "two", "words"}, 2, "words");
  expect_error({"run", "-m", tiny(), "--ids", "1", "--json", "--print-ids"}, 2,
               "exclude each other");
  expect_error(run_ids(), 2, "warm", {{"KRAIT_TEMPERATURE", "warm"}});
  expect_error({"bench", "-m", tiny(), "--random-weights", "130m"}, 2, "exclude each other");
  expect_error({"bench", "--random-weights", "13b"}, 2, "13b");
  expect_error({"bench", "-m", tiny(), "-p", "1,x"}, 2, "x");
  expect_error({"bench", "-m", tiny(), "-b", "0"}, 2, "");
}

// ---- models
// ------------------------------------------------------------------------------------------

Args run_model(const fs::path& model) {
  return {"run", "-m", model.string(), "--ids", "1,2,3", "--print-ids", "-n", "2"};
}

TEST(ModelErrors, WhereItIs) {
  const ScratchDir dir;
  expect_error(run_model("/no/such/model"), 3, "/no/such/model: no such file or folder");
  expect_error(run_model("no-such-model"), 3, "no such file or folder");
  expect_error(run_model(dir.path()), 3, "expected a config.json");
  write_file(dir.path() / "config.json", read_file(tiny() + "/config.json"));
  expect_error(run_model(dir.path()), 3, "");  // no weights
  write_file(dir.path() / "model.gguf", "GGUF");
  expect_error(run_model(dir.path() / "model.gguf"), 3, "model.gguf");
  write_file(dir.path() / "notes.txt", "text");
  expect_error(run_model(dir.path() / "notes.txt"), 4,
               "expected a folder, a .safetensors, .bin or .gguf");
}

TEST(ModelErrors, Architecture) {
  const ScratchDir dir;
  const fs::path model = copy_model(dir);
  Json config = Json::parse(read_file(model / "config.json"));
  for (const char* type : {"mamba3", "zamba2", "llama", "jamba"}) {
    config["model_type"] = type;
    write_file(model / "config.json", config.dump());
    expect_error(run_model(model), 4, "config.json");
    expect_error({"inspect", model.string()}, 4, "config.json");
  }
}

TEST(ModelErrors, Config) {
  const ScratchDir dir;
  const fs::path model = copy_model(dir);
  const Json good = Json::parse(read_file(model / "config.json"));
  const auto with = [&](const std::function<void(Json&)>& change) {
    Json config = good;
    change(config);
    write_file(model / "config.json", config.dump());
  };
  write_file(model / "config.json", "{\"model_type\": \"mamba\"");
  expect_error(run_model(model), 3, "config.json");
  write_file(model / "config.json", std::string(1 << 20, '['));
  expect_error(run_model(model), 3, "config.json");
  write_file(model / "config.json", "");
  expect_error(run_model(model), 3, "config.json");
  with([](Json& c) { c.erase("hidden_size"); });
  expect_error(run_model(model), 3, "found nothing");
  with([](Json& c) { c["hidden_size"] = "64"; });
  expect_error(run_model(model), 3, "hidden_size");
  // A size that contradicts the tensors, and one that would take terabytes.
  with([](Json& c) { c["state_size"] = 32; });
  expect_error(run_model(model), 3, "");
  with([](Json& c) { c["hidden_size"] = 1000000; });
  expect_error(run_model(model), 3, "");
  with([](Json& c) { c["num_hidden_layers"] = 16000; });
  expect_error(run_model(model), 3, "");
  with([](Json& c) { c["vocab_size"] = 100000000; });
  expect_error(run_model(model), 3, "");
  with([](Json& c) { c["hidden_act"] = "relu"; });
  expect_error(run_model(model), 4, "relu");
}

TEST(ModelErrors, GenerationConfig) {
  const ScratchDir dir;
  const fs::path model = copy_model(dir);
  write_file(model / "generation_config.json", R"({"temperature": "hot"})");
  expect_error(run_model(model), 3, "generation_config.json: temperature");
}

TEST(ModelErrors, Safetensors) {
  const ScratchDir dir;
  const fs::path model = copy_model(dir);
  const fs::path file = model / "model.safetensors";
  const std::string good = read_file(file);
  for (const size_t size :
       {size_t{0}, size_t{7}, size_t{8}, size_t{100}, good.size() / 2, good.size() - 1}) {
    write_file(file, good.substr(0, size));
    expect_error(run_model(model), 3, "model.safetensors");
  }
  write_file(file, std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8) + good.substr(8));
  expect_error(run_model(model), 3, "model.safetensors");
  std::string offsets = good;
  offsets.replace(offsets.find("data_offsets\":["), 16, "data_offsets\":[9");
  write_file(file, offsets);
  expect_error(run_model(model), 3, "model.safetensors");
  write_file(file, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n");
  expect_error(run_model(model), 3, "");
}

TEST(ModelErrors, Tensors) {
  const ScratchDir dir;
  const fs::path model = copy_model(dir);
  const auto original = open_safetensors(fs::path(tiny()) / "model.safetensors");
  const std::string name = "backbone.layers.1.mixer.x_proj.weight";
  ASSERT_NE(original->find(name), nullptr);
  const auto rewrite = [&](const std::function<void(Checkpoint::Entry&)>& change) {
    std::vector<Checkpoint::Entry> kept;
    for (Checkpoint::Entry e : original->entries()) {
      if (e.name == name) change(e);
      if (!e.name.empty()) kept.push_back(e);
    }
    write_safetensors(model / "model.safetensors", kept);
  };
  rewrite([](Checkpoint::Entry& e) { e.name.clear(); });
  expect_error(run_model(model), 3, "x_proj.weight");
  rewrite([](Checkpoint::Entry& e) {
    e.tensor = Tensor(e.tensor.data, e.tensor.dtype, {e.tensor.dim(1), e.tensor.dim(0)});
  });
  expect_error(run_model(model), 3, "x_proj.weight");
  rewrite([](Checkpoint::Entry& e) { e.tensor.dtype = DType::i32; });
  expect_error(run_model(model), 4, "x_proj.weight");
}

TEST(ModelErrors, Shards) {
  const ScratchDir dir;
  const fs::path model = copy_model(dir, "mamba1-hf-sharded");
  fs::remove(model / "model-00004-of-00007.safetensors");
  expect_error(run_model(model), 3, "model-00004-of-00007.safetensors");
  write_file(model / "model.safetensors.index.json",
             R"({"weight_map": {"a": "../../../etc/passwd"}})");
  expect_error(run_model(model), 3, "index.json");
}

TEST(ModelErrors, PyTorchFiles) {
  const ScratchDir dir;
  const fs::path model = copy_model(dir, "mamba1-original-bin");
  const fs::path file = model / "pytorch_model.bin";
  const std::string good = read_file(file);
  for (const size_t size : {size_t{0}, size_t{30}, good.size() / 2, good.size() - 1}) {
    write_file(file, good.substr(0, size));
    expect_error(run_model(model), 3, "pytorch_model.bin");
  }
  // os.system in place of a tensor's rebuild function: the lengths stay the same.
  std::string evil = good;
  const std::string global = "ctorch._utils\n_rebuild_tensor_v2\n";
  if (const size_t at = evil.find(global); at != std::string::npos) {
    evil.replace(at, global.size(), "cposix\nsystem                   \n");
    write_file(file, evil);
    const RunResult r = run_krait(run_model(model));
    EXPECT_TRUE(r.exit_code == 3 || r.exit_code == 4) << r.err;
  }
}

TEST(ModelErrors, Tokenizers) {
  const ScratchDir dir;
  const fs::path file = dir.path() / "tokenizer.json";
  const auto run = [&](const std::string& tokenizer) {
    return Args{"run", "-m", golden("mamba1-neox-vocab"), "--tokenizer", tokenizer, "-p", "a",
                "-n",  "1"};
  };
  expect_error(run("/no/such/tokenizer.json"), 3, "/no/such/tokenizer.json");
  expect_error(run(dir.path()), 3, "");
  const std::string good = read_file(neox_tokenizer());
  write_file(file, good.substr(0, good.size() / 2));
  expect_error(run(file), 3, "tokenizer.json");
  write_file(file, std::string(1 << 20, '['));
  expect_error(run(file), 3, "tokenizer.json");
  Json j = Json::parse(good);
  j["model"]["type"] = "WordPiece";
  write_file(file, j.dump());
  expect_error(run(file), 4, "WordPiece");
  const fs::path model = dir.path() / "tokenizer.model";
  write_file(model, "not a protocol buffer");
  expect_error(run(model), 3, "tokenizer.model");
}

// ---- devices
// -------------------------------------------------------------------------------------------

TEST(DeviceErrors, AbsentDevice) {
  for (const char* command : {"run", "logits"}) {
    expect_error({command, "-m", tiny(), "--ids", "1", "--device", "cuda:99"}, 5, "CUDA");
  }
  expect_error(run_ids(), 5, "CUDA", {{"KRAIT_DEVICE", "cuda:99"}});
}

}  // namespace
}  // namespace krait::test
