// From names to weights: spellings, tied and untied heads, optional tensors, types, and every way
// in which a checkpoint can contradict its config.
#include <gmock/gmock.h>
#include <spdlog/sinks/ostream_sink.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "base/log.h"
#include "model/mamba1_weights.h"
#include "support/test_models.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

/// Collects log lines while it lives.
class LogCapture {
 public:
  LogCapture() : before_(spdlog::default_logger()) {
    auto sink = std::make_shared<spdlog::sinks::ostream_sink_mt>(out_);
    spdlog::set_default_logger(std::make_shared<spdlog::logger>("test", sink));
  }
  ~LogCapture() { spdlog::set_default_logger(before_); }
  LogCapture(const LogCapture&) = delete;
  LogCapture& operator=(const LogCapture&) = delete;
  [[nodiscard]] std::string text() {
    spdlog::default_logger()->flush();
    return out_.str();
  }

 private:
  std::ostringstream out_;
  std::shared_ptr<spdlog::logger> before_;
};

std::string layer(int i, const std::string& rest) {
  return fmt::format("backbone.layers.{}.{}", i, rest);
}

class Weights : public ::testing::Test {
 protected:
  std::unique_ptr<Model> load(std::optional<DType> dtype = {}) {
    return load_model(config_, checkpoint_, *op_, dtype);
  }
  /// Logits of a fixed prompt: a fingerprint of the whole model.
  std::vector<float> logits() {
    const auto model = load();
    Engine engine(*model, *op_, EngineOptions{});
    return all_logits(engine, config_.vocab_size, random_ids(20, config_.vocab_size, 3));
  }
  ::testing::AssertionResult refuses(ErrorKind kind, const std::string& part) {
    return throws(kind, part, [&] { (void)load(); });
  }

  ModelConfig config_ = tiny_config();
  MemoryCheckpoint checkpoint_ = tiny_checkpoint(config_);
  std::unique_ptr<Ops> op_ = make_cpu_ops(1, /*fast=*/false);
};

TEST_F(Weights, CountsParametersAndBytes) {
  const auto model = load();
  const int64_t D = 24, E = 40, N = 16, K = 4, R = 3, V = 104;
  const int64_t per_layer =
      D + 2 * E * D + E * K + E + (R + 2 * N) * E + E * R + E + E * N + E + D * E;
  EXPECT_EQ(model->parameter_count(), V * D + D + 2 * per_layer);
  EXPECT_EQ(model->weight_bytes(), static_cast<size_t>(model->parameter_count()) * 4);
  EXPECT_EQ(model->weight_dtype(), DType::f32);
  EXPECT_EQ(model->config().vocab_rows, 104);
  const int64_t matrices = V * D + 2 * (2 * E * D + (R + 2 * N) * E + E * R + D * E);
  EXPECT_EQ(load(DType::bf16)->weight_bytes(),
            static_cast<size_t>(model->parameter_count() * 4 - matrices * 2));
}

TEST_F(Weights, ProgressEndsAtTheWhole) {
  size_t last = 0;
  size_t total = 0;
  const auto model = load_model(config_, checkpoint_, *op_, {}, [&](size_t done, size_t all) {
    EXPECT_GE(done, last);
    EXPECT_LE(done, all);
    last = done;
    total = all;
  });
  EXPECT_GT(total, 0U);
  EXPECT_EQ(last, total);
}

TEST_F(Weights, EverySpellingGivesTheSameModel) {
  const auto want = logits();
  checkpoint_.rename("backbone.embedding.weight", "backbone.embeddings.weight");
  EXPECT_EQ(logits(), want);
  for (const auto& e : std::vector(checkpoint_.entries())) {
    checkpoint_.rename(e.name, "model." + e.name);
  }
  EXPECT_EQ(logits(), want);
}

TEST_F(Weights, SqueezedConvolutionIsTheSame) {
  const auto want = logits();
  for (int i = 0; i < 2; ++i) {
    const Tensor t = checkpoint_.find(layer(i, "mixer.conv1d.weight"))->tensor;
    checkpoint_.put(layer(i, "mixer.conv1d.weight"), DType::f32, {40, 4}, t.data);
  }
  EXPECT_EQ(logits(), want);
}

TEST_F(Weights, HeadIsTiedWhenAbsentOrEqual) {
  const auto want = logits();
  const Tensor embedding = checkpoint_.find("backbone.embedding.weight")->tensor;
  const int64_t tied = load()->parameter_count();
  checkpoint_.put("lm_head.weight", embedding.dtype, embedding.shape, embedding.data);
  EXPECT_EQ(load()->parameter_count(), tied);
  EXPECT_EQ(logits(), want);
  // The config is wrong, the file right.
  config_.tie_embeddings = false;
  EXPECT_EQ(logits(), want);
}

TEST_F(Weights, HeadThatDiffersIsUsed) {
  const auto tied = logits();
  const int64_t count = load()->parameter_count();
  const Tensor embedding = checkpoint_.find("backbone.embedding.weight")->tensor;
  checkpoint_.put("lm_head.weight", embedding.dtype, embedding.shape, embedding.data);
  float* head = checkpoint_.values("lm_head.weight");
  for (int64_t i = 0; i < embedding.numel(); ++i) head[i] *= 2;
  for (const bool said : {true, false}) {
    config_.tie_embeddings = said;
    std::vector<float> halved = logits();
    for (float& v : halved) v /= 2;
    EXPECT_EQ(halved, tied);  // a power of two: exact
    EXPECT_EQ(load()->parameter_count(), count + embedding.numel());
  }
}

TEST_F(Weights, UntiedHeadMustBeThere) {
  config_.tie_embeddings = false;
  EXPECT_TRUE(refuses(ErrorKind::format, "lm_head.weight"));
}

TEST_F(Weights, BiasesAreUsedWherePresent) {
  const auto want = logits();
  const auto with = [&](const std::string& name, int64_t n, float value) {
    checkpoint_.put(layer(1, name), {n}, std::vector<float>(static_cast<size_t>(n), value));
    const auto got = logits();
    checkpoint_.erase(layer(1, name));
    return got;
  };
  EXPECT_EQ(with("mixer.in_proj.bias", 80, 0), want);
  EXPECT_NE(with("mixer.in_proj.bias", 80, 0.5F), want);
  EXPECT_EQ(with("mixer.out_proj.bias", 24, 0), want);
  EXPECT_NE(with("mixer.out_proj.bias", 24, 0.5F), want);
  // The random model's convolution biases are zero, so leaving them out changes nothing.
  checkpoint_.erase(layer(0, "mixer.conv1d.bias"));
  checkpoint_.erase(layer(1, "mixer.conv1d.bias"));
  EXPECT_EQ(logits(), want);
}

TEST_F(Weights, DecayIsMinusExpOfItsLogarithm) {
  checkpoint_.values(layer(0, "mixer.A_log"))[5] = 1.25F;
  WeightLoader in(config_, checkpoint_, *op_, {}, {});
  const auto layers = load_layers(in, config_, mamba1_rows(config_));
  EXPECT_EQ(layers[0].A.as<float>()[5], -std::exp(1.25F));
  EXPECT_EQ(layers[1].A.as<float>()[0], -1.0F);
  EXPECT_EQ(layers[0].A.shape, (Shape{40, 16}));
  EXPECT_EQ(layers[0].conv1d.shape, (Shape{40, 4}));
  EXPECT_FALSE(layers[0].in_proj_bias);
}

TEST_F(Weights, DoublesAreConverted) {
  const auto want = logits();
  for (const auto& e : std::vector(checkpoint_.entries())) {
    std::vector<double> values(e.tensor.as<float>(), e.tensor.as<float>() + e.tensor.numel());
    checkpoint_.put(e.name, DType::f64, e.tensor.shape, values.data());
  }
  EXPECT_EQ(load()->weight_dtype(), DType::f32);
  EXPECT_EQ(logits(), want);
}

TEST_F(Weights, SixteenBitFilesStayAsTheyAre) {
  for (const auto& e : std::vector(checkpoint_.entries())) {
    std::vector<bf16_t> values;
    for (int64_t i = 0; i < e.tensor.numel(); ++i) values.emplace_back(e.tensor.as<float>()[i]);
    checkpoint_.put(e.name, DType::bf16, e.tensor.shape, values.data());
  }
  const auto model = load();
  EXPECT_EQ(model->weight_dtype(), DType::bf16);
  WeightLoader in(config_, checkpoint_, *op_, {}, {});
  const auto layers = load_layers(in, config_, mamba1_rows(config_));
  EXPECT_EQ(layers[0].in_proj.dtype, DType::bf16);
  for (const Tensor& t : {layers[0].norm, layers[0].conv1d, layers[0].dt_bias, layers[0].A,
                          layers[0].D, layers[0].conv1d_bias}) {
    EXPECT_EQ(t.dtype, DType::f32);
  }
}

TEST_F(Weights, IntegersAreUnsupported) {
  checkpoint_.put(layer(1, "mixer.out_proj.weight"), DType::i8, {24, 40});
  EXPECT_TRUE(refuses(ErrorKind::unsupported, layer(1, "mixer.out_proj.weight")));
  EXPECT_TRUE(refuses(ErrorKind::unsupported, "i8"));
  checkpoint_.put(layer(0, "mixer.in_proj.weight"), DType::u8, {80, 24});
  EXPECT_TRUE(refuses(ErrorKind::unsupported, layer(0, "mixer.in_proj.weight")));
}

TEST_F(Weights, EveryMissingTensorIsNamed) {
  for (const auto& e : std::vector(checkpoint_.entries())) {
    if (e.name.ends_with("conv1d.bias")) continue;  // optional
    MemoryCheckpoint damaged(checkpoint_);
    damaged.erase(e.name);
    EXPECT_TRUE(throws(ErrorKind::format, e.name, [&] {
      (void)load_model(config_, damaged, *op_, {});
    })) << e.name;
  }
}

TEST_F(Weights, EveryWrongShapeIsNamed) {
  for (const auto& e : std::vector(checkpoint_.entries())) {
    const Shape& s = e.tensor.shape;
    std::vector<Shape> wrong{{}, {1}, {2, 2, 2, 2}};
    Shape swapped;
    for (int i = s.rank() - 1; i >= 0; --i) swapped.push_back(s[i]);
    if (!(swapped == s)) wrong.push_back(swapped);
    Shape longer;
    for (int i = 0; i < s.rank(); ++i) longer.push_back(s[i] + (i == s.rank() - 1 ? 1 : 0));
    wrong.push_back(longer);
    for (const Shape& w : wrong) {
      MemoryCheckpoint damaged(checkpoint_);
      damaged.put(e.name, DType::f32, w);
      // out_proj gives the width of the mixer, so its message speaks of d_inner.
      const bool is_width = e.name == layer(0, "mixer.out_proj.weight") && w == longer;
      EXPECT_TRUE(throws(ErrorKind::format, is_width ? "d_inner" : e.name,
                         [&] { (void)load_model(config_, damaged, *op_, {}); }))
          << e.name << " " << w.str();
    }
  }
}

TEST_F(Weights, ShapeErrorSaysExpectedFoundAndWhere) {
  checkpoint_.put(layer(1, "mixer.in_proj.weight"), DType::bf16, {40, 24}, nullptr,
                  "model-00002.safetensors");
  try {
    (void)load();
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(
        e.message(),
        "backbone.layers.1.mixer.in_proj.weight in model-00002.safetensors: expected [80, 24], "
        "found [40, 24] bf16");
    EXPECT_THAT(e.hint(), HasSubstr("d_inner=40"));
  }
}

TEST_F(Weights, ConfigThatContradictsTheTensors) {
  config_.n_layer = 3;
  EXPECT_TRUE(refuses(ErrorKind::format, "n_layer=3, but the tensors have 2"));
  config_.n_layer = 1;
  EXPECT_TRUE(refuses(ErrorKind::format, "n_layer=1, but the tensors have 2"));
  config_ = tiny_config();
  config_.d_inner = 48;
  EXPECT_TRUE(refuses(ErrorKind::format, "d_inner=48, but the tensors have 40"));
  config_ = tiny_config();
  config_.vocab_size = 105;
  EXPECT_TRUE(refuses(ErrorKind::format, "vocab_size=105"));
  for (int64_t ModelConfig::*size : {&ModelConfig::d_model, &ModelConfig::d_state,
                                     &ModelConfig::d_conv, &ModelConfig::dt_rank}) {
    config_ = tiny_config();
    config_.*size += 1;
    EXPECT_TRUE(refuses(ErrorKind::format, "expected ["));
  }
}

TEST_F(Weights, LeftoversAreSettledByTheTensors) {
  const auto want = logits();
  config_.n_layer = 32;
  config_.other_n_layer = {48, 2};
  config_.d_inner = 384;
  config_.other_d_inner = {40};
  LogCapture log;
  const ModelConfig c = resolve_config(config_, checkpoint_);
  EXPECT_EQ(c.n_layer, 2);
  EXPECT_EQ(c.d_inner, 40);
  EXPECT_EQ(c.vocab_rows, 104);
  EXPECT_THAT(log.text(), HasSubstr("n_layer=32"));
  EXPECT_EQ(logits(), want);
  config_.other_n_layer = {48};
  EXPECT_TRUE(refuses(ErrorKind::format, "n_layer=32, but the tensors have 2"));
}

TEST_F(Weights, TensorsOfAnotherFamily) {
  ModelConfig other = published_config("mamba2-130m");
  other.n_layer = 2;
  other.vocab_rows = other.vocab_size = 101;
  checkpoint_ = tiny_checkpoint(other);
  EXPECT_TRUE(refuses(ErrorKind::format,
                      "config.json says Mamba-1, but the tensors are those of "
                      "Mamba-2"));
  checkpoint_ = tiny_checkpoint(config_);
  config_ = other;
  EXPECT_TRUE(refuses(ErrorKind::format, "the tensors are those of Mamba-1"));
}

TEST_F(Weights, FamiliesThatAreNotBuilt) {
  config_.family = "mamba3";
  EXPECT_TRUE(refuses(ErrorKind::unsupported, "mamba3"));
}

TEST_F(Weights, NoTensorsAtAll) {
  checkpoint_ = MemoryCheckpoint();
  EXPECT_TRUE(refuses(ErrorKind::format, "backbone.layers.0.norm.weight"));
}

TEST_F(Weights, LayerNumbersThatAreLies) {
  for (const char* number : {"999999999999", "99999999999999999999999", "-1", "", "1x", "2"}) {
    MemoryCheckpoint damaged(checkpoint_);
    damaged.put(fmt::format("backbone.layers.{}.norm.weight", number), DType::f32, {24});
    try {
      (void)load_model(config_, damaged, *op_, {});  // names that are no layers are only unused
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::format) << number;
    }
  }
}

TEST_F(Weights, UnusedTensorsAreWarnedOfOnce) {
  {
    LogCapture log;
    (void)load();
    EXPECT_EQ(log.text(), "");
  }
  for (int i = 0; i < 7; ++i) checkpoint_.put(fmt::format("extra.{}", i), DType::i64, {2});
  LogCapture log;
  (void)load();
  const std::string text = log.text();
  EXPECT_THAT(text, HasSubstr("7 tensors"));
  EXPECT_THAT(text, HasSubstr("extra.0"));
  EXPECT_THAT(text, Not(HasSubstr("extra.6")));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
}

TEST_F(Weights, NotANumberInADecayShowsInTheLogits) {
  // The loader does not scan weights; what matters is that nothing crashes.
  checkpoint_.values(layer(0, "mixer.A_log"))[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(logits().back()));
}

TEST(RandomWeights, BothMemoriesHoldTheSameWeights) {
  const ModelConfig config = tiny_config();
  const auto a = make_random_checkpoint(config, DType::bf16, 5, RandomMemory::distinct);
  const auto b = make_random_checkpoint(config, DType::bf16, 5, RandomMemory::shared);
  const auto other = make_random_checkpoint(config, DType::bf16, 6, RandomMemory::shared);
  ASSERT_EQ(a->entries().size(), b->entries().size());
  size_t different = 0;
  for (size_t i = 0; i < a->entries().size(); ++i) {
    const auto& x = a->entries()[i];
    const auto& y = b->entries()[i];
    EXPECT_EQ(x.name, y.name);
    EXPECT_EQ(x.tensor.shape, y.tensor.shape);
    EXPECT_EQ(std::memcmp(x.tensor.data, y.tensor.data, x.tensor.bytes()), 0) << x.name;
    const auto& z = other->entries()[i];
    different += std::memcmp(x.tensor.data, z.tensor.data, x.tensor.bytes()) != 0 ? 1U : 0U;
  }
  EXPECT_GT(different, 5U);
}

TEST(RandomWeights, ActivationsStayFinite) {
  for (const char* name : {"130m", "mamba2-130m"}) {
    ModelConfig config = published_config(name);
    config.n_layer = 4;
    config.vocab_size = 1000;
    config.vocab_rows = 1000;
    const auto op = make_cpu_ops(2);
    const auto checkpoint = make_random_checkpoint(config, DType::bf16, 1, RandomMemory::distinct);
    const auto model = load_model(config, *checkpoint, *op, {});
    Engine engine(*model, *op, EngineOptions{});
    const auto ids = random_ids(40, 1000, 1);
    const auto logits = all_logits(engine, 1000, ids);
    double sum2 = 0;
    for (const float v : logits) sum2 += static_cast<double>(v) * v;
    const double rms = std::sqrt(sum2 / static_cast<double>(logits.size()));
    EXPECT_TRUE(rms > 0.1 && rms < 100) << name << " " << rms;
  }
}

}  // namespace
}  // namespace krait::test
