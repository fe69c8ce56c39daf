// Ops::mamba1_step, the whole decode step in one launch, against the verbs it replaces: both are
// held to the CPU's float32 forward pass of the same 16-bit weights, and the step may not be
// further from it than the verbs are.
#include <gtest/gtest.h>

#include "support/step_rig.h"

namespace krait::test {
namespace {

struct StepCase {
  const char* name;
  int64_t d_model = 64;
  int64_t d_inner = 128;
  int64_t dt_rank = 8;
  int64_t n_layer = 3;
  int64_t vocab_rows = 304;
  const char* family = "mamba1";
  DType weights = DType::bf16;
  DType state = DType::f32;
  std::vector<int32_t> slots{0};  ///< -1: a padding row
};

void PrintTo(const StepCase& c, std::ostream* out) { *out << c.name; }

ModelConfig config_of(const StepCase& c) {
  ModelConfig m = tiny_config();
  m.family = c.family;
  m.d_model = c.d_model;
  m.d_inner = c.d_inner;
  m.dt_rank = c.dt_rank;
  m.n_layer = c.n_layer;
  m.vocab_rows = c.vocab_rows;
  m.vocab_size = c.vocab_rows - 4;
  if (m.family == "falcon-mamba") {
    m.mixer_norm_eps = 1e-6F;
    m.tie_embeddings = false;
  }
  return m;
}

LoadedModel load_case(const Backend& backend, const StepCase& c, std::optional<DType> dtype) {
  const ModelConfig m = config_of(c);
  return load(backend, m, make_random_checkpoint(m, c.weights, 3, RandomMemory::distinct), dtype);
}

class Mamba1StepGpuTest : public ::testing::TestWithParam<StepCase> {};

TEST_P(Mamba1StepGpuTest, IsAsExactAsTheVerbs) {
  const StepCase& c = GetParam();
  StepCase exact = c;
  exact.state = DType::f32;
  const auto want = run(load_case(kBackends[1], exact, c.weights), exact, Steps::verbs);
  const LoadedModel gpu = load_case(kBackends[2], c, c.weights);
  expect_as_exact_as_the_verbs(gpu, c, want);
}

TEST_P(Mamba1StepGpuTest, GivesTheSameBitsAgain) {
  const StepCase& c = GetParam();
  const LoadedModel gpu = load_case(kBackends[2], c, c.weights);
  const auto first = run(gpu, c, Steps::whole);
  EXPECT_EQ(run(gpu, c, Steps::whole), first);
}

INSTANTIATE_TEST_SUITE_P(
    All, Mamba1StepGpuTest,
    ::testing::Values(
        StepCase{.name = "one"}, StepCase{.name = "another_slot", .slots = {5}},
        StepCase{.name = "two", .slots = {3, 0}}, StepCase{.name = "three", .slots = {8, 1, 4}},
        StepCase{.name = "five_and_padding", .slots = {6, 2, -1, 7, 0, 1, -1}},
        StepCase{.name = "eight", .slots = {7, 6, 5, 4, 3, 2, 1, 8}},
        StepCase{.name = "f16", .weights = DType::f16, .slots = {1, 2}},
        StepCase{.name = "bf16_state", .state = DType::bf16, .slots = {4}},
        StepCase{.name = "f16_state", .state = DType::f16, .slots = {4, 5, 6}},
        StepCase{
            .name = "odd_columns", .d_model = 96, .d_inner = 1056, .dt_rank = 24, .slots = {2}},
        StepCase{.name = "shape_of_130m",
                 .d_model = 768,
                 .d_inner = 1536,
                 .dt_rank = 48,
                 .n_layer = 4,
                 .vocab_rows = 50280},
        StepCase{.name = "shape_of_370m",
                 .d_model = 1024,
                 .d_inner = 2048,
                 .dt_rank = 64,
                 .n_layer = 3,
                 .vocab_rows = 5000,
                 .slots = {8}},
        StepCase{.name = "shape_of_130m_by_8",
                 .d_model = 768,
                 .d_inner = 1536,
                 .dt_rank = 48,
                 .n_layer = 2,
                 .vocab_rows = 5000,
                 .slots = {0, 1, 2, 3, 4, 5, 6, 7}},
        StepCase{.name = "shape_of_1_4b",
                 .d_model = 2048,
                 .d_inner = 4096,
                 .dt_rank = 128,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .slots = {0, 3}},
        StepCase{.name = "shape_of_2_8b",
                 .d_model = 2560,
                 .d_inner = 5120,
                 .dt_rank = 160,
                 .n_layer = 2,
                 .vocab_rows = 20000},
        StepCase{.name = "shape_of_2_8b_by_8",
                 .d_model = 2560,
                 .d_inner = 5120,
                 .dt_rank = 160,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .slots = {0, 1, 2, 3, 4, 5, 6, 7}},
        StepCase{.name = "shape_of_1_4b_by_4",
                 .d_model = 2048,
                 .d_inner = 4096,
                 .dt_rank = 128,
                 .n_layer = 3,
                 .vocab_rows = 1000,
                 .slots = {0, 3, 8, 1}},
        StepCase{.name = "shape_of_2_8b_in_f16_with_padding",
                 .d_model = 2560,
                 .d_inner = 5120,
                 .dt_rank = 160,
                 .n_layer = 3,
                 .vocab_rows = 1000,
                 .weights = DType::f16,
                 .state = DType::f16,
                 .slots = {6, 2, -1, 7, 0, 1}},
        StepCase{.name = "odd_and_wide",
                 .d_model = 2592,
                 .d_inner = 5152,
                 .dt_rank = 168,
                 .n_layer = 2,
                 .vocab_rows = 1004,
                 .state = DType::bf16,
                 .slots = {6, 2, 5, 7, 0}},
        StepCase{.name = "falcon", .family = "falcon-mamba", .slots = {1, 0}},
        StepCase{.name = "shape_of_falcon_7b",
                 .d_model = 4096,
                 .d_inner = 8192,
                 .dt_rank = 256,
                 .n_layer = 1,
                 .vocab_rows = 1000,
                 .family = "falcon-mamba"},
        StepCase{.name = "shape_of_falcon_7b_by_4",
                 .d_model = 4096,
                 .d_inner = 8192,
                 .dt_rank = 256,
                 .n_layer = 2,
                 .vocab_rows = 1000,
                 .family = "falcon-mamba",
                 .slots = {0, 2, 1, 4}}),
    [](const auto& test) { return std::string(test.param.name); });

// Sums over the blocks are integers, which know no infinity: what doesn't fit must still come out
// as no number, in its own sequence and nowhere else.
TEST(Mamba1StepGpu, WhatIsNoNumberStaysNoNumber) {
  for (const StepCase& c :
       {StepCase{.name = "two", .slots = {3, 0}}, StepCase{.name = "one", .slots = {3}}}) {
    const LoadedModel gpu = load_case(kBackends[2], c, c.weights);
    expect_no_number_stays_none(gpu, c);
  }
}

TEST(Mamba1StepGpu, GivesTheSameBitsAfterTwoThousandSteps) {
  const StepCase narrow{
      .name = "three", .d_model = 96, .d_inner = 1056, .dt_rank = 24, .slots = {2, 7, 4}};
  const StepCase wide{.name = "eight",
                      .d_model = 2560,
                      .d_inner = 5120,
                      .dt_rank = 160,
                      .vocab_rows = 1000,
                      .slots = {7, 6, 5, 4, 3, 2, 1, 8}};
  for (const StepCase& c : {narrow, wide}) {
    const LoadedModel gpu = load_case(kBackends[2], c, c.weights);
    expect_the_same_after_two_thousand_steps(gpu, c);
  }
}

TEST(Mamba1StepGpu, LeavesToTheVerbsWhatItIsNotBuiltFor) {
  StepCase many{.name = "nine", .slots = {0, 1, 2, 3, 4, 5, 6, 7, 8}};
  const LoadedModel gpu = load_case(kBackends[2], many, DType::bf16);
  EXPECT_FALSE(Rig(*gpu.op, many, *gpu.model).steps_at_once());
  StepCase f32{.name = "f32", .weights = DType::f32};
  const LoadedModel exact = load_case(kBackends[2], f32, DType::f32);
  EXPECT_FALSE(Rig(*exact.op, f32, *exact.model).steps_at_once());
}

}  // namespace
}  // namespace krait::test
