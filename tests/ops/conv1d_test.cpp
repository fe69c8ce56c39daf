// conv1d_silu: every backend against the definition, the definition against float64, and what must
// hold however a text is cut into steps.
#include "ops/ops_test_util.h"

namespace krait::test {
namespace {

struct ConvCase {
  std::string name;
  int64_t d_inner = 37;
  int64_t d_conv = 4;
  std::vector<int32_t> lengths{11};
  std::vector<int32_t> slots{1};
  DType weights = DType::f32;
  bool bias = true;
  int64_t position = 5;  ///< of the first sequence; the next are each 2^32 further
};

void PrintTo(const ConvCase& c, std::ostream* os) { *os << c.name; }

std::vector<ConvCase> conv_cases() {
  std::vector<ConvCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const ConvCase base{.name = std::string(dtype_name(t)), .weights = t};
    const auto vary = [&](const std::string& what, auto&& set) {
      ConvCase c = base;
      set(c);
      c.name += "_" + what;
      cases.push_back(c);
    };
    vary("base", [](ConvCase&) {});
    for (const int64_t p : {0, 1, 6, 7, 419}) {  // where the ring begins
      vary(fmt::format("position{}", p), [&](ConvCase& c) { c.position = p; });
      vary(fmt::format("position{}_decode", p), [&](ConvCase& c) {
        c.position = p, c.lengths = {1, 1, 1}, c.slots = {4, 0, 3};
      });
    }
    for (const int64_t d : {1, 7, 8, 15, 16, 17, 31, 33, 64, 129, 1536}) {
      vary(fmt::format("d{}", d), [&](ConvCase& c) { c.d_inner = d; });
    }
    for (const int64_t k : {2, 3, 4, 5, 8}) {
      for (const int32_t n : {1, 2, 3, 4, 5, 9, 70}) {
        vary(fmt::format("conv{}_n{}", k, n), [&](ConvCase& c) { c.d_conv = k, c.lengths = {n}; });
      }
    }
    vary("no_bias", [](ConvCase& c) { c.bias = false; });
    vary("decode", [](ConvCase& c) { c.lengths = {1, 1, 1, 1}, c.slots = {4, 0, 3, 1}; });
    for (const int64_t k : {2, 3, 4, 8}) {
      for (const int64_t d : {37, 68, 1536}) {  // of one token each, more than a thread has
        vary(fmt::format("decode11_conv{}_d{}", k, d), [&](ConvCase& c) {
          c.d_conv = k, c.d_inner = d;
          c.lengths.assign(11, 1);
          c.slots = {4, 0, 13, 1, -1, 2, 12, 5, 9, 7, 3};
        });
      }
    }
    vary("decode11_empty", [](ConvCase& c) {  // rows that are not their sequences' numbers
      c.d_inner = 68, c.lengths = {1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1};
      c.slots = {4, 0, 13, 1, 6, 2, 12, 5, 9, -1, 3};
    });
    vary("ragged", [](ConvCase& c) { c.lengths = {5, 1, 17, 2, 3}, c.slots = {4, 0, 5, 1, 2}; });
    // Enough work for a device to walk long stretches of each channel.
    vary("wide_ragged", [](ConvCase& c) {
      c.d_inner = 5120, c.lengths = {500, 3, 97}, c.slots = {4, 0, 5};
    });
    vary("wide_padding", [](ConvCase& c) {
      c.d_inner = 2052, c.lengths = {31, 800, 257}, c.slots = {-1, 1, 2};
    });
    vary("padding", [](ConvCase& c) { c.lengths = {5, 2, 3, 1}, c.slots = {4, -1, 0, -1}; });
    vary("empty", [](ConvCase& c) { c.lengths = {2, 0, 3}, c.slots = {1, 0, 2}; });
  }
  return cases;
}

constexpr int32_t kSlots = 14;

struct ConvData {
  Values u, weight, bias, state;
};

ConvData conv_data(const ConvCase& c, DType activation) {
  Random r(21);
  int64_t n_tok = 0;
  for (const int32_t n : c.lengths) n_tok += n;
  ConvData d;
  d.u = rounded(r.uniform(n_tok * c.d_inner, -1, 1), activation);
  d.weight = r.uniform(c.d_inner * c.d_conv, -1, 1);
  d.bias = r.uniform(c.d_inner, -1, 1);
  d.state = rounded(r.uniform(kSlots * (c.d_conv - 1) * c.d_inner, -1, 1), activation);
  // Free slots hold NaN: whoever reads one shows it.
  const int64_t width = (c.d_conv - 1) * c.d_inner;
  for (int32_t s = 0; s < kSlots; ++s) {
    if (std::find(c.slots.begin(), c.slots.end(), s) != c.slots.end()) continue;
    std::fill_n(d.state.begin() + s * width, width, kNan);
  }
  return d;
}

struct ConvResult {
  Values out, state;
};

ConvResult run_conv(Backend b, const ConvCase& c, const ConvData& data) {
  Device d(b);
  const DType T = d.op.activation_dtype(c.weights);
  std::vector<int64_t> positions;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    positions.push_back(c.position + (static_cast<int64_t>(s) << 32));
  }
  const Batch batch = d.batch(c.lengths, c.slots, positions);
  const Tensor out = d.filled(kNan, {batch.n_tok, c.d_inner}, T);
  const Tensor state = d.tensor(data.state, {kSlots, c.d_conv - 1, c.d_inner}, T);
  d.op.conv1d_silu(out, d.view(data.u, {batch.n_tok, c.d_inner}, T, 8, 16),
                   d.tensor(data.weight, {c.d_inner, c.d_conv}),
                   c.bias ? d.tensor(data.bias, {c.d_inner}) : Tensor{}, state, batch);
  return {d.read(out), d.read(state)};
}

class Conv1d : public ::testing::TestWithParam<std::tuple<Backend, ConvCase>> {};

TEST_P(Conv1d, EqualsDefinition) {
  const auto& [backend, c] = GetParam();
  const DType T = ops(backend).activation_dtype(c.weights);
  const ConvData data = conv_data(c, T);
  const ConvResult got = run_conv(backend, c, data);
  const ConvResult want = run_conv(Backend::plain, c, data);

  EXPECT_TRUE(same_bits(got.state, want.state));  // inputs are moved, not changed; NaN stays NaN
  int64_t begin = 0;
  Values got_rows;
  Values want_rows;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t end = begin + c.lengths[s];
    if (c.slots[s] < 0) {
      EXPECT_TRUE(all_nan(rows(got.out, begin, end, c.d_inner))) << "a padding row was written";
    } else {
      append(got_rows, rows(got.out, begin, end, c.d_inner));
      append(want_rows, rows(want.out, begin, end, c.d_inner));
    }
    begin = end;
  }
  EXPECT_TRUE(close_to(got_rows, want_rows, tolerance(T)));
}

OPS_TEST_BACKENDS(Conv1d, ::testing::ValuesIn(conv_cases()));

struct CutCase {
  std::string name;
  int64_t d_conv = 4;
  DType weights = DType::f32;
};

void PrintTo(const CutCase& c, std::ostream* os) { *os << c.name; }

std::vector<CutCase> cut_cases() {
  std::vector<CutCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t k : {2, 3, 4, 7, 8}) {
      cases.push_back({fmt::format("{}_conv{}", dtype_name(t), k), k, t});
    }
  }
  return cases;
}

class Conv1dCuts : public ::testing::TestWithParam<std::tuple<Backend, CutCase>> {};

// The same text in one step and cut in two, with a state in another slot: same rows, same state.
TEST_P(Conv1dCuts, DoNotMatter) {
  const auto& [backend, cut] = GetParam();
  const DType T = ops(backend).activation_dtype(cut.weights);
  constexpr int32_t kLength = 13;
  ConvCase c{.name = "whole", .d_conv = cut.d_conv, .lengths = {kLength}, .weights = cut.weights};
  const ConvData data = conv_data(c, T);
  const ConvResult whole = run_conv(backend, c, data);
  const int64_t width = (c.d_conv - 1) * c.d_inner;
  const Values start = rows(data.state, 1, 2, width);
  for (int32_t n = 1; n < kLength; ++n) {
    ConvCase part = c;
    part.slots = {3};
    ConvData some = data;
    some.state.assign(static_cast<size_t>(kSlots * width), kNan);
    std::copy(start.begin(), start.end(), some.state.begin() + 3 * width);
    part.lengths = {n};
    some.u = rows(data.u, 0, n, c.d_inner);
    const ConvResult first = run_conv(backend, part, some);
    part.position += n;
    part.lengths = {kLength - n};
    some.u = rows(data.u, n, kLength, c.d_inner);
    some.state = first.state;
    const ConvResult second = run_conv(backend, part, some);
    Values joined = first.out;
    append(joined, second.out);
    EXPECT_TRUE(near_std(joined, whole.out, tolerance(T))) << "cut at " << n;
    if (ops(backend).backend() == "cpu") {
      EXPECT_TRUE(same_bits(joined, whole.out)) << n;
    }
    EXPECT_TRUE(same_bits(rows(second.state, 3, 4, width), rows(whole.state, 1, 2, width))) << n;
  }
}

OPS_TEST_ALL_BACKENDS(Conv1dCuts, ::testing::ValuesIn(cut_cases()));

TEST(Conv1dDefinition, IsTheCrossCorrelationOfStateAndInput) {
  const ConvCase c{.name = "oracle", .lengths = {7}, .position = 1000};
  const ConvData d = conv_data(c, DType::f32);
  const ConvResult got = run_conv(Backend::plain, c, d);
  const int64_t width = (c.d_conv - 1) * c.d_inner;
  // Of slot 1, the inputs before a position, oldest first.
  const auto inputs_before = [&](const Values& state, int64_t position) {
    Values line;
    for (int64_t p = position - (c.d_conv - 1); p < position; ++p) {
      const int64_t row = (c.d_conv - 1) + p % (c.d_conv - 1);
      append(line, rows(state, row, row + 1, c.d_inner));
    }
    return line;
  };
  Values line = inputs_before(d.state, c.position);
  append(line, d.u);
  Values want;
  for (int64_t t = 0; t < 7; ++t) {
    for (int64_t e = 0; e < c.d_inner; ++e) {
      double sum = d.bias[static_cast<size_t>(e)];
      for (int64_t j = 0; j < c.d_conv; ++j) {
        sum += static_cast<double>(d.weight[static_cast<size_t>(e * c.d_conv + j)]) *
               static_cast<double>(line[static_cast<size_t>((t + j) * c.d_inner + e)]);
      }
      want.push_back(static_cast<float>(sum / (1 + std::exp(-sum))));
    }
  }
  EXPECT_TRUE(near_std(got.out, want, 1e-6));
  EXPECT_TRUE(
      same_bits(inputs_before(got.state, c.position + 7), Values(line.end() - width, line.end())));
}

}  // namespace
}  // namespace krait::test
