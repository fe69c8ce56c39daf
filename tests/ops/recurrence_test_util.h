// What the tests of the recurrences share (selective_scan, ssd_scan): sequences in slots of a pool,
// their comparison, and the cases that both must pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "ops/ops_test_util.h"

namespace krait::test {

constexpr int32_t kSlots = 6;

inline int64_t count_tokens(const std::vector<int32_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

inline bool is_free(int32_t slot, const std::vector<int32_t>& slots) {
  return std::find(slots.begin(), slots.end(), slot) == slots.end();
}

/// Makes the state of slots that no sequence has NaN. `width` elements a slot.
inline void poison_free_slots(Values& state, const std::vector<int32_t>& slots, int64_t width) {
  for (int32_t s = 0; s < kSlots; ++s) {
    if (is_free(s, slots)) std::fill_n(state.begin() + s * width, width, kNan);
  }
}

/// The state of the sequences in `slots`, one after the other.
inline Values of_slots(const Values& state, const std::vector<int32_t>& slots, int64_t width) {
  Values v;
  for (const int32_t slot : slots) append(v, rows(state, slot, slot + 1, width));
  return v;
}

struct RecurrenceResult {
  Values y, state;
  DType type = DType::f32;  ///< of y
};

/// Where the results of a case lie: sequence s has lengths[s] rows of d_inner in y and `width`
/// elements in slots[s] of the state.
struct RecurrenceShape {
  std::vector<int32_t> lengths, slots;
  int64_t d_inner = 0;
  int64_t width = 0;
  DType state = DType::f32;
  bool padding_stays = true;  ///< y is its own tensor, so that rows of padding stay NaN
};

/// Compares what belongs to used slots, and sees that the rest was left alone, the state of free
/// slots as in `start`. Returns the rows of y that were compared.
inline std::pair<Values, Values> expect_near(const RecurrenceShape& c, const Values& start,
                                             const RecurrenceResult& got,
                                             const RecurrenceResult& want, double y_limit,
                                             double state_limit) {
  Values got_y, want_y, got_h, want_h;
  int64_t begin = 0;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t end = begin + c.lengths[s];
    if (c.slots[s] >= 0) {
      append(got_y, rows(got.y, begin, end, c.d_inner));
      append(want_y, rows(want.y, begin, end, c.d_inner));
      append(got_h, rows(got.state, c.slots[s], c.slots[s] + 1, c.width));
      append(want_h, rows(want.state, c.slots[s], c.slots[s] + 1, c.width));
    } else if (c.padding_stays) {
      EXPECT_TRUE(all_nan(rows(got.y, begin, end, c.d_inner))) << "a padding row was written";
    }
    begin = end;
  }
  for (int32_t s = 0; s < kSlots; ++s) {
    if (!is_free(s, c.slots)) continue;
    EXPECT_TRUE(same_bits(rows(got.state, s, s + 1, c.width), rows(start, s, s + 1, c.width)))
        << "free slot " << s << " was written";
  }
  EXPECT_TRUE(close_to(without_rounding(got_y, want_y, got.type), want_y, y_limit));
  EXPECT_TRUE(close_to(without_rounding(got_h, want_h, c.state), want_h, state_limit));
  return {std::move(got_y), std::move(want_y)};
}

/// A state of 16 bits after a step that rounds stochastically, against the same step in f32: each
/// element is one of the two neighbours, without bias, and a quarter of them on average is not the
/// nearer one.
inline void expect_rounded_stochastically(const Values& got, const Values& exact, DType type) {
  ASSERT_EQ(got.size(), exact.size());
  double bias = 0;
  int64_t n = 0;
  int64_t farther = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::isnan(exact[i])) continue;
    const double v = exact[i];
    const int exponent = std::max(std::ilogb(v), type == DType::bf16 ? -126 : -14);
    const double step = std::ldexp(1.0, exponent - (type == DType::bf16 ? 7 : 10));
    const double error = (got[i] - v) / step;
    ASSERT_LE(std::fabs(error), 1.001) << i << ": " << got[i] << " for " << v;
    bias += error;
    farther += std::fabs(error) > 0.5 ? 1 : 0;
    ++n;
  }
  ASSERT_GE(n, 20000);
  EXPECT_NEAR(bias / static_cast<double>(n), 0, 0.02);
  EXPECT_NEAR(static_cast<double>(farther) / static_cast<double>(n), 0.25, 0.02);
}

/// One dt, and one decay, for all.
struct RangeCase {
  std::string name;
  float dt = 0;     ///< before softplus
  float decay = 0;  ///< exp(dt * A); 0: A stays as it is

  void apply(Values& all_dt, Values& dt_bias, Values& A) const {
    std::fill(all_dt.begin(), all_dt.end(), dt);
    std::fill(dt_bias.begin(), dt_bias.end(), 0.0F);
    if (decay > 0) {
      const double step = std::log1p(std::exp(static_cast<double>(dt)));
      std::fill(A.begin(), A.end(),
                static_cast<float>(std::log(static_cast<double>(decay)) / step));
    }
  }
};

inline void PrintTo(const RangeCase& c, std::ostream* os) { *os << c.name; }

inline std::vector<RangeCase> range_cases() {
  return {{"dt_m100", -100},      {"dt_m20", -20},        {"dt_0", 0},
          {"dt_20", 20},          {"dt_20_001", 20.001F}, {"dt_100", 100},
          {"slow", 0, 1 - 1e-6F}, {"half", 0, 0.5F},      {"fast", 0, 1e-6F}};
}

/// A text cut in two at each of `cuts`.
struct CutCase {
  std::string name;
  int32_t length = 9;
  std::vector<int32_t> cuts;  ///< first parts
  DType weights = DType::f32;
};

inline void PrintTo(const CutCase& c, std::ostream* os) { *os << c.name; }

inline std::vector<CutCase> cut_cases() {
  std::vector<CutCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const std::string type(dtype_name(t));
    cases.push_back({type + "_short", 9, {1, 2, 3, 4, 5, 8}, t});
    cases.push_back({type + "_long", 300, {1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 299}, t});
  }
  return cases;
}

}  // namespace krait::test
