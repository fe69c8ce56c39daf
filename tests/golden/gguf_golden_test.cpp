// GGUF both ways: what llama.cpp's converter wrote, read and held against the reference's answers;
// what krait writes, read back to the same logits; and the tokenizers inside.
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/elements.h"
#include "checkpoint/gguf.h"
#include "cli/gguf_vocabulary.h"
#include "model/export.h"
#include "model/gguf.h"
#include "support/test_models.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

namespace fs = std::filesystem;

fs::path model_folder(const std::string& name) { return data_dir() / "golden" / "models" / name; }

std::vector<int32_t> ids_of(const Checkpoint& expected, const std::string& name) {
  const Tensor& t = expected.find(name)->tensor;
  const auto* from = t.as<int64_t>();
  return {from, from + t.numel()};
}

std::vector<float> logits_of(const LoadedModel& m, const std::vector<int32_t>& ids) {
  Engine engine(*m.model, *m.op, EngineOptions{});
  return all_logits(engine, m.model->config().vocab_size, ids);
}

/// Every tensor of a checkpoint dequantised to f32.
MemoryCheckpoint plain(const Checkpoint& from) {
  MemoryCheckpoint out;
  for (const auto& e : from.entries()) {
    std::vector<float> values(static_cast<size_t>(e.shape().numel()));
    read_elements(e, 0, std::ssize(values), values.data());
    out.put(e.name, e.shape(), values);
  }
  return out;
}

/// A file that llama.cpp's converter wrote.
struct Written {
  const char* folder;
  const char* file;
  const char* family;
  DType dtype;   ///< of the matrices where none is asked for
  double limit;  ///< of the KL divergence from the f32 original
};
// Eight bits of weight cost 2e-4 on a model of 32 channels.
constexpr Written kWritten[] = {
    {"mamba1-neox-vocab", "model-q8_0.gguf", "mamba1", DType::f16, 4e-4},
    {"mamba2-neox-vocab", "model-f16.gguf", "mamba2", DType::f16, 1e-6},
};

class GgufModel : public ::testing::TestWithParam<Backend> {};

TEST_P(GgufModel, WhatLlamaCppWroteIsCloseToTheReference) {
  for (const Written& w : kWritten) {
    const fs::path folder = model_folder(w.folder);
    const auto expected = open_safetensors(folder / "expected.safetensors");
    const ModelConfig config = gguf_config(*open_checkpoint(folder / w.file));
    EXPECT_EQ(config.family, w.family);
    for (const auto dtype : {std::optional(DType::f32), std::optional<DType>()}) {
      const LoadedModel m = load(GetParam(), config, open_checkpoint(folder / w.file), dtype);
      EXPECT_EQ(m.model->weight_dtype(), dtype.value_or(w.dtype));
      double kl = 0;
      for (const int length : {1, 4, 17, 130, 600}) {
        const auto got = logits_of(m, ids_of(*expected, fmt::format("prompt_{}", length)));
        const Tensor& want = expected->find(fmt::format("logits_{}", length))->tensor;
        const auto vocab = static_cast<size_t>(config.vocab_size);
        kl = std::max(kl, mean_kl({want.as<float>(), vocab}, std::span(got).last(vocab), vocab));
      }
      std::printf("%s: KL %.3g of %.1g\n", w.file, kl, w.limit);
      EXPECT_TRUE(kl <= w.limit) << w.file << ": " << kl;
    }
  }
}

TEST_P(GgufModel, StepsEqualTheWholePrompt) {
  for (const Written& w : kWritten) {
    const fs::path file = model_folder(w.folder) / w.file;
    const ModelConfig config = gguf_config(*open_checkpoint(file));
    const LoadedModel m = load(GetParam(), config, open_checkpoint(file));
    const auto ids = random_ids(20, config.vocab_size, 7);
    const auto whole = logits_of(m, ids);
    Engine engine(*m.model, *m.op, EngineOptions{});
    for (const std::vector<size_t>& pieces :
         {std::vector<size_t>(ids.size(), 1), std::vector<size_t>{3, 4, 1, 5}}) {
      EXPECT_TRUE(near_std(all_logits(engine, config.vocab_size, ids, pieces), whole, 1e-4));
    }
  }
}

TEST_P(GgufModel, QuantisedTensorsAreLoadedAsTheirValues) {
  const fs::path file = model_folder("mamba1-neox-vocab") / "model-q8_0.gguf";
  const auto gguf = open_checkpoint(file);
  const ModelConfig config = gguf_config(*gguf);
  const auto ids = random_ids(40, config.vocab_size, 5);
  const auto renamed = rename_gguf(*gguf, config);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const LoadedModel quantised = load(GetParam(), config, open_checkpoint(file), dtype);
    const LoadedModel values =
        load(GetParam(), config, std::make_unique<MemoryCheckpoint>(plain(*renamed)), dtype);
    EXPECT_EQ(logits_of(quantised, ids), logits_of(values, ids)) << dtype_name(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, GgufModel, ::testing::ValuesIn(kBackends),
                         [](const auto& test) { return std::string(test.param.name); });

class Exported : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    folder_ = model_folder(GetParam());
    config_ = read_config(config_file(folder_));
    ids_ = random_ids(50, config_.vocab_size, 3);
    want_ = logits_of(load(kBackends[1], config_, open_checkpoint(folder_)), ids_);
  }

  ScratchDir dir_;
  fs::path folder_;
  ModelConfig config_;
  std::vector<int32_t> ids_;
  std::vector<float> want_;
};

TEST_P(Exported, GgufHasTheSameLogitsBitForBit) {
  const auto checkpoint = open_checkpoint(folder_);
  const ModelExport model(config_, *checkpoint, DType::f32);
  GgufKeys keys;
  model.gguf_keys(keys);
  const fs::path file = dir_.path() / "m.gguf";
  write_gguf(file, keys, model.gguf_tensors());

  auto gguf = open_checkpoint(file);
  ModelConfig config = gguf_config(*gguf);
  EXPECT_EQ(config.family, config_.family);
  EXPECT_EQ(config.mixer_norm_eps, config_.mixer_norm_eps);
  EXPECT_EQ(config.dt_rank, config_.dt_rank);
  EXPECT_EQ(config.n_head, config_.n_head);
  EXPECT_EQ(config.n_group, config_.n_group);
  config.vocab_size = config_.vocab_size;  // GGUF counts the padding too
  EXPECT_EQ(logits_of(load(kBackends[1], config, std::move(gguf)), ids_), want_);
}

TEST_P(Exported, SafetensorsHaveTheSameLogitsBitForBit) {
  const auto checkpoint = open_checkpoint(folder_);
  const ModelExport model(config_, *checkpoint, {});
  write_safetensors(dir_.path() / "model.safetensors", model.hugging_face_tensors());
  write_file(dir_.path() / "config.json", model.hugging_face_config().dump());

  ModelConfig config = read_config(dir_.path() / "config.json");
  EXPECT_EQ(config.layout, "huggingface");
  config.vocab_size = config_.vocab_size;
  auto written = open_checkpoint(dir_.path());
  const auto* conv = written->find("backbone.layers.0.mixer.conv1d.weight");
  ASSERT_NE(conv, nullptr);
  EXPECT_EQ(conv->shape().rank(), 3);
  EXPECT_NE(written->find("backbone.embeddings.weight"), nullptr);
  EXPECT_EQ(logits_of(load(kBackends[1], config, std::move(written)), ids_), want_);
}

TEST_P(Exported, GgufBackToSafetensorsKeepsTheLogitsToRounding) {
  // A = -exp(A_log) and back is not exact: log of a float is off by half a unit in the last place.
  const auto checkpoint = open_checkpoint(folder_);
  const ModelExport first(config_, *checkpoint, DType::f32);
  GgufKeys keys;
  first.gguf_keys(keys);
  write_gguf(dir_.path() / "m.gguf", keys, first.gguf_tensors());
  const auto gguf = open_checkpoint(dir_.path() / "m.gguf");
  const ModelExport second(gguf_config(*gguf), *gguf, {});
  write_safetensors(dir_.path() / "model.safetensors", second.hugging_face_tensors());
  write_file(dir_.path() / "config.json", second.hugging_face_config().dump());
  ModelConfig config = read_config(dir_.path() / "config.json");
  config.vocab_size = config_.vocab_size;
  const auto got = logits_of(load(kBackends[1], config, open_checkpoint(dir_.path())), ids_);
  EXPECT_TRUE(near_std(got, want_, 1e-5));
}

INSTANTIATE_TEST_SUITE_P(Models, Exported,
                         ::testing::Values("mamba1-hf", "mamba1-hf-sharded", "mamba1-original-bin",
                                           "falcon-mamba-hf", "mamba2-hf", "mamba2-hf-groups",
                                           "mamba2-original-bin", "mamba2-codestral-tiny"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(Export, WhatGgufHasNoPlaceForIsNamed) {
  const fs::path folder = model_folder("mamba1-hf-odd");
  const auto checkpoint = open_checkpoint(folder);
  const ModelExport model(read_config(folder / "config.json"), *checkpoint, {});
  EXPECT_TRUE(
      throws(ErrorKind::unsupported, "mixer.in_proj.bias", [&] { (void)model.gguf_tensors(); }));
}

// ---- tokenizers -------------------------------------------------------------------------------

class GgufTokenizer : public ::testing::TestWithParam<const char*> {
 protected:
  static fs::path file() {
    const std::string name = GetParam();
    if (name == "gpt-neox-20b") return models_dir() / "gpt-neox-20b" / "tokenizer.json";
    const auto json = data_dir() / "tokenizers" / (name + ".tokenizer.json");
    return fs::exists(json) ? json : data_dir() / "tokenizers" / (name + ".model");
  }
};

/// Through a file, so that the reader and the writer agree.
std::unique_ptr<Tokenizer> through_gguf(const GgufVocabulary& vocabulary, const ScratchDir& dir) {
  GgufKeys keys;
  add_vocabulary_keys(vocabulary, std::ssize(vocabulary.tokens) + 5, keys);
  write_gguf(dir.path() / "v.gguf", keys, {});
  return gguf_tokenizer(*open_gguf(dir.path() / "v.gguf")->metadata());
}

TEST_P(GgufTokenizer, EveryLineHasTheReferenceIdsAndText) {
  const ScratchDir dir;
  const auto original = open_tokenizer(file());
  const auto tokenizer = through_gguf(read_gguf_vocabulary(file()), dir);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->vocab_size(), original->vocab_size());
  EXPECT_EQ(tokenizer->bos_id(), original->bos_id());
  EXPECT_EQ(tokenizer->eos_id(), original->eos_id());
  std::ifstream in(data_dir() / "golden" / "tokenize" / (std::string(GetParam()) + ".jsonl"));
  int lines = 0;
  for (std::string s; std::getline(in, s); ++lines) {
    const auto json = nlohmann::json::parse(s);
    const auto ids = json.at("ids").get<std::vector<int32_t>>();
    EXPECT_EQ(tokenizer->encode(json.at("text").get<std::string>()), ids) << s;
    EXPECT_EQ(tokenizer->decode(ids, true), original->decode(ids, true)) << s;
  }
  EXPECT_EQ(lines, 454);
  for (const char* text : {"", "Hello world"}) {
    EXPECT_EQ(tokenizer->encode(text, {.add_special = true}),
              original->encode(text, {.add_special = true}));
  }
}

INSTANTIATE_TEST_SUITE_P(All, GgufTokenizer,
                         ::testing::Values("gpt-neox-20b", "gpt2", "falcon", "mistral-v1",
                                           "mistral-v3", "spm-unigram-nfkc-1k",
                                           "spm-unigram-nmt-nfkc-4k"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(GgufTokenizerOfLlamaCpp, EveryLineHasTheReferenceIds) {
  const auto gguf = open_gguf(model_folder("mamba1-neox-vocab") / "model-q8_0.gguf");
  const auto tokenizer = gguf_tokenizer(*gguf->metadata());
  EXPECT_EQ(tokenizer->description(), "bpe (gguf, olmo)");
  EXPECT_EQ(tokenizer->vocab_size(), 50277);  // without the rows of padding
  std::ifstream in(data_dir() / "golden" / "tokenize" / "gpt-neox-20b.jsonl");
  for (std::string s; std::getline(in, s);) {
    const auto json = nlohmann::json::parse(s);
    EXPECT_EQ(tokenizer->encode(json.at("text").get<std::string>()),
              json.at("ids").get<std::vector<int32_t>>());
  }
}

}  // namespace
}  // namespace krait::test
