// Ops::mamba1_step, the whole decode step in one launch, against the verbs it replaces: both are
// held to the CPU's float32 forward pass of the same 16-bit weights, and the step may not be
// further from it than the verbs are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/state_pool.h"
#include "support/test_models.h"
#include "support/test_support.h"

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

constexpr int kSlots = 9;
constexpr int kSteps = 6;

/// A model on one device with its states and a step's memory.
class Rig {
 public:
  Rig(Ops& op, const StepCase& c, const Model& model)
      : op_(op),
        model_(model),
        n_(static_cast<int64_t>(c.slots.size())),
        T_(op.activation_dtype(c.weights)),
        pool_(op, c.n_layer, model.layer_state(T_, c.state), kSlots, /*poison=*/false) {
    for (int s = 0; s < kSlots; ++s) pool_.clear(s);
    const ModelConfig& m = model.config();
    residual_ = tensor(DType::f32, {n_, m.d_model});
    normed_ = tensor(T_, {n_, m.d_model});
    ids_ = tensor(DType::i32, {n_});
    logits_ = tensor(DType::f32, {n_, m.vocab_rows});
    for (const TensorSpec& s : model.activations(T_))
      act_.push_back(tensor(s.dtype, {n_, s.shape[0]}));
    std::vector<int32_t> start;
    for (int32_t i = 0; i <= n_; ++i) start.push_back(i);
    batch_ = {n_, n_, 1, tensor(DType::i32, {n_ + 1}), tensor(DType::i32, {n_})};
    op.upload(batch_.seq_start.data, start.data(), batch_.seq_start.bytes());
    op.upload(batch_.slot.data, c.slots.data(), batch_.slot.bytes());
  }

  /// Logits of the rows that have a slot, after feeding one token to each sequence.
  std::vector<float> feed(const std::vector<int32_t>& ids, bool whole_step,
                          const std::vector<int32_t>& slots) {
    op_.upload(ids_.data, ids.data(), ids_.bytes());
    if (whole_step) {
      EXPECT_TRUE(model_.step(op_, logits_, ids_, batch_, pool_.layers()));
    } else {
      model_.forward(op_, residual_, ids_, batch_, act_, pool_.layers());
      model_.head(op_, logits_, normed_, residual_);
    }
    std::vector<float> all(static_cast<size_t>(logits_.numel()));
    op_.download(all.data(), logits_.data, logits_.bytes());
    std::vector<float> rows;
    const int64_t width = logits_.dim(1);
    for (size_t i = 0; i < slots.size(); ++i) {
      if (slots[i] < 0) continue;
      const auto from = all.begin() + static_cast<ptrdiff_t>(i) * width;
      rows.insert(rows.end(), from, from + width);
    }
    return rows;
  }

  /// Fills what the convolution of layer 0 remembers of a slot; weights in bf16.
  void set_window(int slot, float value) {
    const Tensor& t = pool_.layers().front()[0];
    const size_t bytes = t.bytes() / kSlots;
    const std::vector<bf16_t> values(bytes / sizeof(bf16_t), bf16_t(value));
    op_.upload(static_cast<std::byte*>(t.data) + static_cast<size_t>(slot) * bytes, values.data(),
               bytes);
  }

  [[nodiscard]] bool steps_at_once() {
    return model_.step(op_, logits_, ids_, batch_, pool_.layers());
  }

 private:
  Tensor tensor(DType t, const Shape& shape) {
    const Tensor view(nullptr, t, shape);
    memory_.push_back(op_.allocate(view.bytes(), "test"));
    return {memory_.back().data(), t, shape};
  }

  Ops& op_;
  const Model& model_;
  int64_t n_;
  DType T_;
  StatePool pool_;
  std::vector<Buffer> memory_;
  Tensor residual_, normed_, ids_, logits_;
  Activations act_;
  Batch batch_;
};

/// Logits of kSteps tokens, the same for every device.
std::vector<float> run(const LoadedModel& m, const StepCase& c, bool whole_step) {
  Rig rig(*m.op, c, *m.model);
  std::vector<float> all;
  for (int t = 0; t < kSteps; ++t) {
    const auto ids =
        random_ids(c.slots.size(), m.model->config().vocab_size, static_cast<uint64_t>(t) + 1);
    const auto rows = rig.feed(ids, whole_step, c.slots);
    all.insert(all.end(), rows.begin(), rows.end());
  }
  return all;
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
  const auto want = run(load_case(kBackends[1], exact, c.weights), exact, false);
  const LoadedModel gpu = load_case(kBackends[2], c, c.weights);
  const Comparison verbs = compare(run(gpu, c, false), want);
  const Comparison step = compare(run(gpu, c, true), want);
  EXPECT_LT(verbs.nmse, 1e-3) << verbs.text;
  EXPECT_LE(step.nmse, 1.5 * verbs.nmse) << step.text << "; the verbs: " << verbs.text;
}

TEST_P(Mamba1StepGpuTest, GivesTheSameBitsAgain) {
  const StepCase& c = GetParam();
  const LoadedModel gpu = load_case(kBackends[2], c, c.weights);
  const auto first = run(gpu, c, true);
  EXPECT_EQ(run(gpu, c, true), first);
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
    const auto ids = random_ids(c.slots.size(), gpu.model->config().vocab_size, 1);
    const auto clean = Rig(*gpu.op, c, *gpu.model).feed(ids, true, c.slots);
    const auto width = static_cast<ptrdiff_t>(clean.size() / c.slots.size());
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30F}) {
      Rig rig(*gpu.op, c, *gpu.model);
      rig.set_window(3, bad);
      const auto first = rig.feed(ids, true, c.slots);
      EXPECT_TRUE(std::none_of(first.begin(), first.begin() + width,
                               [](float v) { return std::isfinite(v); }))
          << c.name << ' ' << bad;
      EXPECT_TRUE(std::equal(first.begin() + width, first.end(), clean.begin() + width))
          << c.name << ' ' << bad;
      // The state is no number any more.
      const auto second = rig.feed(ids, true, c.slots);
      EXPECT_FALSE(std::isfinite(second.front())) << c.name << ' ' << bad;
      EXPECT_EQ(std::isfinite(second.back()), c.slots.size() > 1) << c.name << ' ' << bad;
    }
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
    const auto last = [&] {
      Rig rig(*gpu.op, c, *gpu.model);
      std::vector<float> logits;
      for (uint64_t t = 0; t < 2000; ++t) {
        const auto ids = random_ids(c.slots.size(), gpu.model->config().vocab_size, t);
        logits = rig.feed(ids, true, c.slots);
      }
      return logits;
    };
    const auto first = last();
    EXPECT_TRUE(std::all_of(first.begin(), first.end(), [](float v) { return std::isfinite(v); }))
        << c.name;
    EXPECT_EQ(last(), first) << c.name;
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
