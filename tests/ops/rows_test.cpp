// The verbs on single rows: embed, gather_rows, rms_norm, rms_norm_parts.
#include "ops/ops_test_util.h"

namespace krait::test {
namespace {

struct RowCase {
  std::string name;
  int64_t n = 5;
  int64_t d = 67;
  DType weights = DType::f32;
  bool f32_out = false;
  float scale = 1;
};

void PrintTo(const RowCase& c, std::ostream* os) { *os << c.name; }

std::vector<RowCase> row_cases() {
  std::vector<RowCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const std::string type(dtype_name(t));
    for (const int64_t n : {1, 2, 33}) {
      cases.push_back({.name = fmt::format("{}_n{}", type, n), .n = n, .weights = t});
    }
    for (const int64_t d : {1, 2, 7, 16, 31, 64, 129, 768, 1025, 2560, 8192}) {
      cases.push_back({.name = fmt::format("{}_d{}", type, d), .d = d, .weights = t});
    }
    // Rows enough for a GPU to put several into a block.
    for (const int64_t d : {4, 100, 768, 1024, 2560, 5120, 5124}) {
      cases.push_back(
          {.name = fmt::format("{}_n515_d{}", type, d), .n = 515, .d = d, .weights = t});
    }
    cases.push_back({.name = type + "_f32_out", .weights = t, .f32_out = true});
    // eps matters in the first, must not in the second, and squares must not overflow in it.
    cases.push_back({.name = type + "_tiny", .weights = t, .scale = 1e-3F});
    cases.push_back({.name = type + "_huge", .weights = t, .scale = 1e15F});
  }
  return cases;
}

class Rows : public ::testing::TestWithParam<std::tuple<Backend, RowCase>> {};

TEST_P(Rows, RmsNormEqualsDefinition) {
  const auto& [backend, c] = GetParam();
  Random r(11);
  const Values x = r.uniform(c.n * c.d, -c.scale, c.scale);
  const Values w = r.uniform(c.d, -2, 2);
  const auto run = [&](Backend b) {
    Device d(b);
    const DType T = c.f32_out ? DType::f32 : d.op.activation_dtype(c.weights);
    const Tensor out = d.filled(kNan, {c.n, c.d}, T);
    d.op.rms_norm(out, d.tensor(x, {c.n, c.d}), d.tensor(w, {c.d}), 1e-5F);
    return d.read(out);
  };
  const DType T = c.f32_out ? DType::f32 : ops(backend).activation_dtype(c.weights);
  EXPECT_TRUE(near_std(run(backend), run(Backend::plain), tolerance(T)));
}

TEST_P(Rows, RmsNormPartsEqualsDefinition) {
  const auto& [backend, c] = GetParam();
  const std::array<int64_t, 3> widths{c.d, 16, 5};
  const int64_t width = c.d + 21;
  Random r(15);
  const float scale = std::min(c.scale, 1e3F);  // the input is of type T here
  const Values x = r.uniform(c.n * width, -scale, scale);
  const auto run = [&](Backend b, DType T) {
    Device d(b);
    const Tensor v =
        d.view(rounded(x, T), {c.n, width}, b == Backend::plain ? DType::f32 : T, 5, 3);
    d.op.rms_norm_parts(v, widths, 1e-6F);
    // What lies on both sides of the view is left alone.
    const Tensor all = v.columns(-5, width + 8);
    Values before, after;
    const Values wide = d.read(all);
    for (int64_t t = 0; t < c.n; ++t) {
      append(before, rows(wide, t, t + 1, width + 8));
      before.resize(before.size() - static_cast<size_t>(width + 3));
      append(after, Values(wide.begin() + (t + 1) * (width + 8) - 3,
                           wide.begin() + (t + 1) * (width + 8)));
    }
    EXPECT_TRUE(all_nan(before) && all_nan(after));
    return d.read(v);
  };
  const DType T = ops(backend).activation_dtype(c.weights);
  EXPECT_TRUE(near_std(run(backend, T), run(Backend::plain, T), tolerance(T)));
}

TEST_P(Rows, EmbedEqualsTheRowsOfTheTable) {
  const auto& [backend, c] = GetParam();
  constexpr int64_t kVocab = 19;
  Random r(12);
  const Values table = rounded(r.uniform(kVocab * c.d, -1, 1), c.weights);
  Device d(backend);
  const Tensor residual = d.filled(kNan, {c.n, c.d});
  std::vector<int32_t> ids{0, kVocab - 1};
  while (std::ssize(ids) < c.n) ids.push_back(r.below(kVocab));
  ids.resize(static_cast<size_t>(c.n));
  d.op.embed(residual, d.ints(ids), d.tensor(table, {kVocab, c.d}, c.weights));
  Values want;
  for (const int32_t id : ids) append(want, rows(table, id, id + 1, c.d));
  EXPECT_TRUE(same_bits(d.read(residual), want));
}

TEST_P(Rows, GatherCopiesRows) {
  const auto& [backend, c] = GetParam();
  constexpr int64_t kRows = 9;
  Random r(13);
  Device d(backend);
  const DType T = c.f32_out ? DType::f32 : d.op.activation_dtype(c.weights);
  const Values src = rounded(r.uniform(kRows * c.d, -1, 1), T);
  const Tensor out = d.filled(kNan, {c.n, c.d}, T);
  std::vector<int32_t> index{kRows - 1, 0, -1};
  while (std::ssize(index) < c.n) index.push_back(r.below(kRows));
  index.resize(static_cast<size_t>(c.n));
  d.op.gather_rows(out, d.tensor(src, {kRows, c.d}, T), d.ints(index));
  Values want;
  for (const int32_t i : index) {
    append(want, i < 0 ? Values(static_cast<size_t>(c.d)) : rows(src, i, i + 1, c.d));
  }
  EXPECT_TRUE(same_bits(d.read(out), want));
}

OPS_TEST_ALL_BACKENDS(Rows, ::testing::ValuesIn(row_cases()));

TEST(RmsNormDefinition, DividesByTheRootOfTheMeanSquare) {
  Random r(14);
  const Values x = r.uniform(3 * 41, -2, 2);
  const Values w = r.uniform(41, -2, 2);
  Values want;
  for (size_t t = 0; t < 3; ++t) {
    double mean = 0;
    for (size_t i = 0; i < 41; ++i) mean += std::pow(static_cast<double>(x[t * 41 + i]), 2) / 41;
    for (size_t i = 0; i < 41; ++i) {
      want.push_back(static_cast<float>(x[t * 41 + i] / std::sqrt(mean + 0.5) * w[i]));
    }
  }
  Device d(Backend::plain);
  const Tensor out = d.filled(kNan, {3, 41});
  d.op.rms_norm(out, d.tensor(x, {3, 41}), d.tensor(w, {41}), 0.5F);
  EXPECT_TRUE(near_std(d.read(out), want, 1e-6));
}

TEST(RmsNormPartsDefinition, EachPartByItsOwnRootOfTheMeanSquare) {
  Device d(Backend::plain);
  const Tensor x = d.tensor({3, 4, /**/ 6, /**/ 1, 7, /**/ 9}, {1, 6});
  d.op.rms_norm_parts(x, {{2, 1, 2}}, 0.0F);
  const float a = 1 / std::sqrt(12.5F);
  EXPECT_TRUE(near_std(d.read(x), Values{3 * a, 4 * a, 1, 0.2F, 1.4F, 9}, 1e-6));
}

}  // namespace
}  // namespace krait::test
