// Ops::mamba2_step, the whole decode step in one launch, against the verbs it replaces: both are
// held to the CPU's float32 forward pass of the same 16-bit weights, and the step may not be
// further from it than the verbs are.
#include <gtest/gtest.h>

#include <limits>

#include "support/step_rig.h"

namespace krait::test {
namespace {

constexpr int64_t kWide = 1536;     // narrower models step two sequences by the verbs
constexpr int64_t kForFour = 2560;  // narrower ones three or four

struct StepCase {
  const char* name;
  int64_t d_model = 64;
  int64_t d_inner = 128;
  int64_t head_dim = 64;
  int64_t n_group = 1;
  int64_t n_layer = 3;
  int64_t vocab_rows = 304;
  DType weights = DType::bf16;
  DType state = DType::f32;
  std::vector<int32_t> slots{0};  ///< -1: a padding row
  bool biases = false;
  float dt_max = std::numeric_limits<float>::infinity();
};

void PrintTo(const StepCase& c, std::ostream* out) { *out << c.name; }

ModelConfig config_of(const StepCase& c) {
  ModelConfig m = tiny_config();
  m.family = "mamba2";
  m.d_model = c.d_model;
  m.d_inner = c.d_inner;
  m.d_state = 128;
  m.head_dim = c.head_dim;
  m.n_head = c.d_inner / c.head_dim;
  m.n_group = c.n_group;
  m.n_layer = c.n_layer;
  m.vocab_rows = c.vocab_rows;
  m.vocab_size = c.vocab_rows - 4;
  m.mixer_norm_eps = 1e-5F;
  m.dt_max = c.dt_max;
  m.tie_embeddings = c.n_group == 1;
  return m;
}

/// Random weights, those of the norms too, and the biases that published models leave out.
std::unique_ptr<MemoryCheckpoint> checkpoint_of(const StepCase& c) {
  const ModelConfig m = config_of(c);
  const auto random = make_random_checkpoint(m, c.weights, 3, RandomMemory::distinct);
  auto made = std::make_unique<MemoryCheckpoint>(*random);
  uint64_t seed = 0;
  const auto fill = [&](const std::string& name, int64_t n, float from, float to) {
    std::vector<float> values;
    for (const int32_t v : random_ids(static_cast<size_t>(n), 1000, ++seed)) {
      values.push_back(from + (to - from) * static_cast<float>(v) / 1000.0F);
    }
    made->put(name, {n}, values);
  };
  fill("backbone.norm_f.weight", m.d_model, 0.5F, 1.5F);
  for (int64_t i = 0; i < m.n_layer; ++i) {
    const std::string layer = fmt::format("backbone.layers.{}.", i);
    fill(layer + "norm.weight", m.d_model, 0.5F, 1.5F);
    fill(layer + "mixer.norm.weight", m.d_inner, 0.5F, 1.5F);
    fill(layer + "mixer.D", m.n_head, -1.0F, 1.0F);
    if (!c.biases) continue;
    const int64_t width = m.d_inner + 2 * m.n_group * m.d_state;
    fill(layer + "mixer.in_proj.bias", m.d_inner + width + m.n_head, -0.5F, 0.5F);
    fill(layer + "mixer.conv1d.bias", width, -0.5F, 0.5F);
    fill(layer + "mixer.out_proj.bias", m.d_model, -0.5F, 0.5F);
  }
  return made;
}

LoadedModel load_case(const Backend& backend, const StepCase& c) {
  return load(backend, config_of(c), checkpoint_of(c), c.weights);
}

class Mamba2StepGpuTest : public ::testing::TestWithParam<StepCase> {};

TEST_P(Mamba2StepGpuTest, IsAsExactAsTheVerbs) {
  const StepCase& c = GetParam();
  StepCase exact = c;
  exact.state = DType::f32;
  const auto want = run(load_case(kBackends[1], exact), exact, Steps::verbs);
  const LoadedModel gpu = load_case(kBackends[2], c);
  expect_as_exact_as_the_verbs(gpu, c, want);
}

TEST_P(Mamba2StepGpuTest, GivesTheSameBitsAgain) {
  const StepCase& c = GetParam();
  const LoadedModel gpu = load_case(kBackends[2], c);
  const auto first = run(gpu, c, Steps::whole);
  EXPECT_EQ(run(gpu, c, Steps::whole), first);
}

INSTANTIATE_TEST_SUITE_P(
    All, Mamba2StepGpuTest,
    ::testing::Values(
        StepCase{.name = "one"}, StepCase{.name = "one_layer", .n_layer = 1},
        StepCase{.name = "another_slot", .slots = {5}},
        StepCase{.name = "two", .d_model = kWide, .slots = {3, 0}},
        StepCase{.name = "one_and_padding", .d_model = kWide, .slots = {6, -1}},
        StepCase{.name = "padding_and_one", .d_model = kWide, .slots = {-1, 7}},
        StepCase{.name = "four", .d_model = kForFour, .slots = {3, 0, 8, 5}},
        StepCase{.name = "two_and_padding", .d_model = kForFour, .slots = {6, -1, 2}},
        StepCase{.name = "biases", .slots = {1}, .biases = true},
        StepCase{.name = "limited_dt", .d_model = kWide, .slots = {1, 3}, .dt_max = 0.01F},
        StepCase{.name = "f16", .d_model = kWide, .weights = DType::f16, .slots = {1, 2}},
        StepCase{.name = "f16_groups",
                 .d_inner = 1024,
                 .n_group = 4,
                 .weights = DType::f16,
                 .slots = {1},
                 .biases = true},
        StepCase{.name = "bf16_state", .state = DType::bf16, .slots = {4}},
        StepCase{.name = "f16_state", .d_model = kWide, .state = DType::f16, .slots = {4, 5}},
        StepCase{.name = "groups", .d_inner = 1024, .n_group = 8},
        StepCase{.name = "groups_by_2",
                 .d_model = kWide,
                 .d_inner = 1024,
                 .n_group = 8,
                 .slots = {0, 2}},
        StepCase{.name = "odd_columns",
                 .d_model = kWide + 64,
                 .d_inner = 1152,
                 .head_dim = 32,
                 .n_group = 3,
                 .slots = {2, 5}},
        StepCase{.name = "odd_heads", .d_model = 192, .d_inner = 960, .head_dim = 20},
        StepCase{.name = "shape_of_130m",
                 .d_model = 768,
                 .d_inner = 1536,
                 .n_layer = 4,
                 .vocab_rows = 50288},
        StepCase{.name = "shape_of_1_3b_by_2",
                 .d_model = 2048,
                 .d_inner = 4096,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .slots = {0, 3}},
        StepCase{.name = "shape_of_2_7b",
                 .d_model = 2560,
                 .d_inner = 5120,
                 .n_layer = 2,
                 .vocab_rows = 20000},
        StepCase{.name = "shape_of_2_7b_by_2",
                 .d_model = 2560,
                 .d_inner = 5120,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .state = DType::bf16,
                 .slots = {4, 1}},
        StepCase{.name = "shape_of_2_7b_by_4",
                 .d_model = 2560,
                 .d_inner = 5120,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .slots = {4, 1, 0, 7}},
        StepCase{.name = "wide_groups",
                 .d_model = 2048,
                 .d_inner = 4096,
                 .n_group = 8,
                 .n_layer = 2,
                 .vocab_rows = 1000},
        StepCase{.name = "wide_odd_groups",
                 .d_model = 3136,
                 .d_inner = 6336,
                 .head_dim = 48,
                 .n_group = 3,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .slots = {2}},
        StepCase{.name = "shape_of_codestral",
                 .d_model = 4096,
                 .d_inner = 8192,
                 .n_group = 8,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .slots = {3}},
        StepCase{.name = "shape_of_codestral_by_2",
                 .d_model = 4096,
                 .d_inner = 8192,
                 .n_group = 8,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .state = DType::bf16,
                 .slots = {3, 0}}),
    [](const auto& test) { return std::string(test.param.name); });

// What isn't a number must come out as none, in its own sequence and nowhere else.
TEST(Mamba2StepGpu, WhatIsNoNumberStaysNoNumber) {
  const StepCase c{.name = "two", .d_model = kWide, .slots = {3, 0}};
  const LoadedModel gpu = load_case(kBackends[2], c);
  expect_no_number_stays_none(gpu, c);
}

TEST(Mamba2StepGpu, GivesTheSameBitsAfterTwoThousandSteps) {
  const StepCase c{.name = "two",
                   .d_model = kWide + 64,
                   .d_inner = 1152,
                   .head_dim = 32,
                   .n_group = 3,
                   .slots = {2, 7}};
  const LoadedModel gpu = load_case(kBackends[2], c);
  expect_the_same_after_two_thousand_steps(gpu, c);
}

TEST(Mamba2StepGpu, LeavesToTheVerbsWhatItIsNotBuiltFor) {
  const StepCase many{.name = "five", .d_model = kForFour, .slots = {8, 1, 4, 0, 2}};
  const LoadedModel gpu = load_case(kBackends[2], many);
  EXPECT_FALSE(Rig(*gpu.op, many, *gpu.model).steps_at_once());
  const StepCase narrow{.name = "two", .slots = {0, 1}};
  const LoadedModel small = load_case(kBackends[2], narrow);
  EXPECT_FALSE(Rig(*small.op, narrow, *small.model).steps_at_once());
  const StepCase columns{.name = "odd_columns", .d_model = 160};
  const LoadedModel odd = load_case(kBackends[2], columns);
  EXPECT_FALSE(Rig(*odd.op, columns, *odd.model).steps_at_once());
  const StepCase f32{.name = "f32", .weights = DType::f32};
  const LoadedModel exact = load_case(kBackends[2], f32);
  EXPECT_FALSE(Rig(*exact.op, f32, *exact.model).steps_at_once());
}

}  // namespace
}  // namespace krait::test
