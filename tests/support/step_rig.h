// What the tests of whole decode steps share (Ops::mamba1_step, Ops::mamba2_step): a model with its
// states and a step's memory, and what every such step must hold. A Case has the name, n_layer, the
// types `weights` and `state`, and the slots of the sequences, -1 for a padding row.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "runtime/state_pool.h"
#include "support/test_models.h"
#include "support/test_support.h"

namespace krait::test {

inline constexpr int kSlots = 9;
inline constexpr int kSteps = 6;

/// A model on one device with its states and a step's memory.
class Rig {
 public:
  template <typename Case>
  Rig(Ops& op, const Case& c, const Model& model)
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
    batch_ = {n_,
              n_,
              1,
              tensor(DType::i32, {n_ + 1}),
              tensor(DType::i32, {n_}),
              tensor(DType::i64, {n_})};
    op.upload(batch_.seq_start.data, start.data(), batch_.seq_start.bytes());
    op.upload(batch_.slot.data, c.slots.data(), batch_.slot.bytes());
  }

  /// Logits of the rows that have a slot, after feeding one token to each sequence.
  std::vector<float> feed(const std::vector<int32_t>& ids, bool whole_step,
                          const std::vector<int32_t>& slots) {
    op_.upload(ids_.data, ids.data(), ids_.bytes());
    const std::vector<int64_t> positions(static_cast<size_t>(n_), n_fed_++);
    op_.upload(batch_.position.data, positions.data(), batch_.position.bytes());
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
    op_.zero(batch_.position.data, batch_.position.bytes());
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
  int64_t n_fed_ = 0;
};

/// Who does the steps: the verbs, the whole step, or one and the other in turn.
enum class Steps { verbs, whole, in_turn };

/// Logits of kSteps tokens, the same for every device.
template <typename Case>
std::vector<float> run(const LoadedModel& m, const Case& c, Steps steps) {
  Rig rig(*m.op, c, *m.model);
  std::vector<float> all;
  for (int t = 0; t < kSteps; ++t) {
    const auto ids =
        random_ids(c.slots.size(), m.model->config().vocab_size, static_cast<uint64_t>(t) + 1);
    const bool whole = steps == Steps::whole || (steps == Steps::in_turn && t % 2 == 0);
    const auto rows = rig.feed(ids, whole, c.slots);
    all.insert(all.end(), rows.begin(), rows.end());
  }
  return all;
}

/// The step may not be further from `want` than the verbs are, nor where it goes on from their
/// states and they from its.
template <typename Case>
void expect_as_exact_as_the_verbs(const LoadedModel& gpu, const Case& c,
                                  const std::vector<float>& want) {
  const Comparison verbs = compare(run(gpu, c, Steps::verbs), want);
  EXPECT_LT(verbs.nmse, 1e-3) << verbs.text;
  for (const Steps steps : {Steps::whole, Steps::in_turn}) {
    const Comparison step = compare(run(gpu, c, steps), want);
    EXPECT_LE(step.nmse, 1.5 * verbs.nmse) << step.text << "; the verbs: " << verbs.text;
  }
}

/// What is no number in the first sequence, in slot 3, comes out as none there and nowhere else.
template <typename Case>
void expect_no_number_stays_none(const LoadedModel& gpu, const Case& c) {
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

/// 2,000 steps give the same bits twice, and numbers.
template <typename Case>
void expect_the_same_after_two_thousand_steps(const LoadedModel& gpu, const Case& c) {
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

}  // namespace krait::test
