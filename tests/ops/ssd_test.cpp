// ssd_scan and gated_rms_norm, the verbs of Mamba-2: every backend against the definition and, over
// many lengths, against a float64 loop; groups, head and state sizes, state types, extreme inputs,
// and what must hold however a text is cut into steps.
#include <numeric>

#include "ops/recurrence_test_util.h"

namespace krait::test {
namespace {

struct SsdCase {
  std::string name;
  int64_t n_head = 4;
  int64_t head_dim = 64;
  int64_t n_group = 1;
  int64_t d_state = 128;
  std::vector<int32_t> lengths{11};
  std::vector<int32_t> slots{1};
  DType weights = DType::f32;
  DType state = DType::f32;
  float dt_min = 0;
  float dt_max = kInf;
  int64_t left = 16;  ///< columns before x in its matrix: 16 bytes and more, or not aligned
  Rounding rounding = Rounding::nearest;
};

void PrintTo(const SsdCase& c, std::ostream* os) { *os << c.name; }

struct SsdData {
  Values x, dt, A, B, C, D, dt_bias, state;
};

SsdData ssd_data(const SsdCase& c, DType T) {
  Random r(41);
  const int64_t n_tok = count_tokens(c.lengths);
  SsdData d;
  d.x = rounded(r.uniform(n_tok * c.n_head * c.head_dim, -1, 1), T);
  d.dt = rounded(r.uniform(n_tok * c.n_head, -1, 1), T);
  d.A = r.uniform(c.n_head, -16, -1);  // as models begin
  d.B = rounded(r.uniform(n_tok * c.n_group * c.d_state, -1, 1), T);
  d.C = rounded(r.uniform(n_tok * c.n_group * c.d_state, -1, 1), T);
  d.D = r.uniform(c.n_head, -1, 1);
  d.dt_bias = r.uniform(c.n_head, -6, -2);  // softplus: steps of 0.001 .. 0.3
  const int64_t width = c.n_head * c.head_dim * c.d_state;
  d.state = rounded(r.uniform(kSlots * width, -1, 1), c.state);
  poison_free_slots(d.state, c.slots, width);
  return d;
}

using SsdResult = RecurrenceResult;

SsdResult run_ssd(Backend b, const SsdCase& c, const SsdData& data) {
  Device d(b);
  const DType T = d.op.activation_dtype(c.weights);
  Batch batch = d.batch(c.lengths, c.slots);
  batch.rounding = c.rounding;
  const int64_t E = c.n_head * c.head_dim;
  const int64_t GN = c.n_group * c.d_state;
  SsdInputs in;
  in.x = d.view(data.x, {batch.n_tok, E}, T, c.left, 2 * GN);
  in.dt = d.view(data.dt, {batch.n_tok, c.n_head}, T, 5, 3);
  in.A = d.tensor(data.A, {c.n_head});
  in.B = d.view(data.B, {batch.n_tok, GN}, T, c.left + E, GN);
  in.C = d.view(data.C, {batch.n_tok, GN}, T, c.left + E + GN, 0);
  in.D = d.tensor(data.D, {c.n_head});
  in.dt_bias = d.tensor(data.dt_bias, {c.n_head});
  in.n_group = c.n_group;
  in.dt_min = c.dt_min;
  in.dt_max = c.dt_max;
  const Tensor y = d.filled(kNan, {batch.n_tok, E}, T);
  const Tensor state = d.tensor(data.state, {kSlots, c.n_head, c.head_dim, c.d_state}, c.state);
  d.op.ssd_scan(y, in, state, batch);
  return {d.read(y), d.read(state), T};
}

/// The recurrence in float64, token by token; the state is rounded once, at the end.
SsdResult oracle(const SsdCase& c, const SsdData& d) {
  const auto at = [](const Values& v, int64_t i) {
    return static_cast<double>(v[static_cast<size_t>(i)]);
  };
  SsdResult r{Values(d.x.size(), kNan), d.state, DType::f32};
  const int64_t E = c.n_head * c.head_dim;
  const int64_t GN = c.n_group * c.d_state;
  int64_t begin = 0;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t end = begin + c.lengths[s];
    for (int64_t e = 0; e < E && c.slots[s] >= 0; ++e) {
      const int64_t h = e / c.head_dim;
      const int64_t g = h / (c.n_head / c.n_group);
      const int64_t S0 = (c.slots[s] * E + e) * c.d_state;
      std::vector<double> S;
      for (int64_t n = 0; n < c.d_state; ++n) S.push_back(at(d.state, S0 + n));
      for (int64_t t = begin; t < end; ++t) {
        const double v = at(d.dt, t * c.n_head + h) + at(d.dt_bias, h);
        const double dt = std::clamp(v > 20 ? v : std::log1p(std::exp(v)),
                                     static_cast<double>(c.dt_min), static_cast<double>(c.dt_max));
        const double x = at(d.x, t * E + e);
        const double decay = std::exp(dt * at(d.A, h));
        double y = at(d.D, h) * x;
        for (int64_t n = 0; n < c.d_state; ++n) {
          double& Sn = S[static_cast<size_t>(n)];
          Sn = decay * Sn + dt * x * at(d.B, t * GN + g * c.d_state + n);
          y += at(d.C, t * GN + g * c.d_state + n) * Sn;
        }
        r.y[static_cast<size_t>(t * E + e)] = static_cast<float>(y);
      }
      for (int64_t n = 0; n < c.d_state; ++n) {
        r.state[static_cast<size_t>(S0 + n)] =
            rounded(static_cast<float>(S[static_cast<size_t>(n)]), c.state);
      }
    }
    begin = end;
  }
  return r;
}

void expect_near(const SsdCase& c, const SsdData& data, const SsdResult& got, const SsdResult& want,
                 double y_limit, double state_limit) {
  const int64_t E = c.n_head * c.head_dim;
  const auto [got_y, want_y] = expect_near({c.lengths, c.slots, E, E * c.d_state, c.state},
                                           data.state, got, want, y_limit, state_limit);
  // The largest of many errors is a few standard deviations out; their mean is held tighter.
  const double unit = got.type == DType::bf16 ? 0x1p-8 : got.type == DType::f16 ? 0x1p-11 : y_limit;
  EXPECT_LE(compare(got_y, want_y).nmse, unit * unit);
}

/// What y may be off by, in standard deviations: the first tokens, which still feel the given
/// state, lie up to 25 of them out. In 16 bits the factors of a chunk's products (C B^T with its
/// decays, the state, dt x) are rounded once each, as in the reference's chunked kernels.
double y_tolerance(DType T) { return 4 * tolerance(T); }

/// Likewise the state, whose products round dt * decay * x or B once; a state of 16 bits may round
/// the other way where the two differ in the last bits of f32.
double state_tolerance(DType T, DType state) {
  return std::max(2 * tolerance(T), tolerance(state));
}

std::vector<SsdCase> ssd_cases() {
  std::vector<SsdCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const SsdCase base{.name = std::string(dtype_name(t)), .weights = t};
    const auto vary = [&](const std::string& what, auto&& set) {
      SsdCase c = base;
      set(c);
      c.name += "_" + what;
      cases.push_back(c);
      c.name += "_decode";
      for (int32_t& n : c.lengths) n = 1;
      cases.push_back(c);
    };
    vary("base", [](SsdCase&) {});
    vary("groups2", [](SsdCase& c) { c.n_group = 2, c.lengths = {150}; });
    vary("groups8", [](SsdCase& c) { c.n_head = 16, c.n_group = 8, c.lengths = {77}; });
    vary("groups4_of_4", [](SsdCase& c) { c.n_group = 4, c.lengths = {70}; });
    for (const int64_t h : {1, 3, 80}) {
      vary(fmt::format("heads{}", h), [&](SsdCase& c) { c.n_head = h; });
    }
    for (const int64_t p : {1, 3, 8, 16, 32, 48, 63, 65, 80, 128}) {
      vary(fmt::format("dim{}", p), [&](SsdCase& c) { c.head_dim = p, c.lengths = {67}; });
    }
    for (const int64_t n : {1, 5, 8, 16, 31, 32, 64, 96, 100, 256}) {
      vary(fmt::format("state{}", n), [&](SsdCase& c) { c.d_state = n, c.lengths = {67}; });
    }
    for (const DType s : {DType::bf16, DType::f16}) {
      vary(fmt::format("S{}", dtype_name(s)), [&](SsdCase& c) { c.state = s, c.lengths = {130}; });
      vary(fmt::format("S{}_state20", dtype_name(s)),
           [&](SsdCase& c) { c.state = s, c.d_state = 20, c.lengths = {9}; });
    }
    vary("batch", [](SsdCase& c) { c.lengths = {300, 1, 64, 2}, c.slots = {4, 0, 3, 1}; });
    vary("ragged", [](SsdCase& c) {
      c.lengths = {5, 1, 140, 2, 63}, c.slots = {4, 0, 5, 1, 2}, c.n_group = 2;
    });
    vary("padding", [](SsdCase& c) { c.lengths = {5, 2, 90, 1}, c.slots = {4, -1, 0, -1}; });
    vary("empty", [](SsdCase& c) { c.lengths = {2, 0, 3}, c.slots = {1, 0, 2}; });
    cases.back().lengths = {1, 1, 1};
    vary("limits", [](SsdCase& c) { c.dt_min = 0.01F, c.dt_max = 0.05F, c.lengths = {70}; });
    vary("unaligned", [](SsdCase& c) { c.left = 3, c.lengths = {70}; });
  }
  return cases;
}

class Ssd : public ::testing::TestWithParam<std::tuple<Backend, SsdCase>> {};

TEST_P(Ssd, EqualsDefinition) {
  const auto& [backend, c] = GetParam();
  const DType T = ops(backend).activation_dtype(c.weights);
  const SsdData data = ssd_data(c, T);
  expect_near(c, data, run_ssd(backend, c, data), run_ssd(Backend::plain, c, data), y_tolerance(T),
              state_tolerance(T, c.state));
}

OPS_TEST_BACKENDS(Ssd, ::testing::ValuesIn(ssd_cases()));

class SsdRounding : public ::testing::TestWithParam<std::tuple<Backend, SsdCase>> {};

TEST_P(SsdRounding, IsStochasticInSteps) {
  auto [backend, c] = GetParam();
  const SsdData data = ssd_data(c, c.weights);
  c.rounding = Rounding::stochastic;
  const SsdResult got = run_ssd(backend, c, data);
  const DType type = c.state;
  c.state = DType::f32;
  expect_rounded_stochastically(
      of_slots(got.state, c.slots, c.n_head * c.head_dim * c.d_state),
      of_slots(run_ssd(backend, c, data).state, c.slots, c.n_head * c.head_dim * c.d_state), type);
}

std::vector<SsdCase> rounding_cases() {
  std::vector<SsdCase> cases;
  for (const DType state : {DType::bf16, DType::f16}) {
    for (const int64_t d_state : {128, 24}) {
      cases.push_back({.name = fmt::format("{}_state{}", dtype_name(state), d_state),
                       .d_state = d_state,
                       .lengths = {1, 1, 1, 1},
                       .slots = {3, 0, 5, 1},
                       .weights = DType::bf16,
                       .state = state});
    }
  }
  return cases;
}

OPS_TEST_ALL_BACKENDS(SsdRounding, ::testing::ValuesIn(rounding_cases()));

std::vector<SsdCase> length_cases() {
  std::vector<SsdCase> cases;
  for (const DType t : {DType::f32, DType::bf16}) {
    for (const int32_t n : {1,  2,  3,  4,  5,   15,  16,  17,  31,  32,  33,  63,   64,
                            65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 1025, 2049}) {
      cases.push_back({.name = fmt::format("{}_L{}", dtype_name(t), n),
                       .n_head = 2,
                       .lengths = {n},
                       .weights = t});
      cases.push_back({.name = fmt::format("{}_L{}_small", dtype_name(t), n),
                       .n_head = 4,
                       .head_dim = 16,
                       .n_group = 2,
                       .d_state = 32,
                       .lengths = {n, 3},
                       .slots = {2, 4},
                       .weights = t});
    }
  }
  return cases;
}

class SsdLength : public ::testing::TestWithParam<std::tuple<Backend, SsdCase>> {};

TEST_P(SsdLength, EqualsFloat64) {
  const auto& [backend, c] = GetParam();
  const DType T = ops(backend).activation_dtype(c.weights);
  const SsdData data = ssd_data(c, T);
  expect_near(c, data, run_ssd(backend, c, data), oracle(c, data), y_tolerance(T),
              state_tolerance(T, c.state));
}

OPS_TEST_ALL_BACKENDS(SsdLength, ::testing::ValuesIn(length_cases()));

TEST(SsdLong, SlowGpuPast64kTokens) {
  for (const DType t : {DType::f32, DType::bf16}) {
    const SsdCase c{.name = "long", .n_head = 1, .lengths = {66000}, .weights = t};
    const SsdData data = ssd_data(c, t);
    expect_near(c, data, run_ssd(Backend::gpu, c, data), oracle(c, data), y_tolerance(t),
                state_tolerance(t, c.state));
  }
}

// The state of the last slot begins past 2^31 elements.
TEST(SsdLong, SlowGpuSlotPast2To31Elements) {
  constexpr int32_t kLast = 65600;
  for (const int32_t length : {1, 200}) {
    const SsdCase c{.name = "far", .lengths = {length}, .slots = {0}, .weights = DType::bf16};
    SsdData data = ssd_data(c, DType::bf16);
    const int64_t width = c.n_head * c.head_dim * c.d_state;
    data.state.assign(data.state.size(), 0.0F);
    const SsdResult near = run_ssd(Backend::gpu, c, data);

    Device d(Backend::gpu);
    const Batch batch = d.batch(c.lengths, {kLast});
    const int64_t E = c.n_head * c.head_dim;
    const Tensor state(nullptr, DType::f16, {kLast + 1, c.n_head, c.head_dim, c.d_state});
    const Buffer memory = d.op.allocate(state.bytes(), "a state of 4.3 GB");
    Tensor far = state;
    far.data = memory.data();
    d.op.zero(far.data, far.bytes());
    const auto put = [&](const Values& v, int64_t n) {
      return d.tensor(v, {batch.n_tok, n}, DType::bf16);
    };
    const SsdInputs in{put(data.x, E),
                       put(data.dt, c.n_head),
                       d.tensor(data.A, {c.n_head}),
                       put(data.B, c.d_state),
                       put(data.C, c.d_state),
                       d.tensor(data.D, {c.n_head}),
                       d.tensor(data.dt_bias, {c.n_head}),
                       1,
                       0.0F,
                       kInf};
    const Tensor y = d.filled(kNan, {batch.n_tok, E}, DType::bf16);
    d.op.ssd_scan(y, in, far, batch);
    EXPECT_TRUE(same_bits(d.read(y), near.y));
    EXPECT_TRUE(
        near_std(d.read(far.rows(kLast, 1)), rows(near.state, 0, 1, width), tolerance(DType::f16)));
  }
}

class SsdRanges : public ::testing::TestWithParam<std::tuple<Backend, RangeCase>> {};

// Above all, nothing overflows: decays are taken of differences of the summed dt * A.
TEST_P(SsdRanges, EqualsFloat64) {
  const auto& [backend, range] = GetParam();
  const SsdCase c{.name = "range", .n_head = 2, .lengths = {300}};
  SsdData data = ssd_data(c, DType::f32);
  range.apply(data.dt, data.dt_bias, data.A);
  // A decay next to 1 has an error of up to 6e-8, which 300 tokens add up.
  expect_near(c, data, run_ssd(backend, c, data), oracle(c, data), 1e-4, 1e-4);
}

OPS_TEST_ALL_BACKENDS(SsdRanges, ::testing::ValuesIn(range_cases()));

class SsdCuts : public ::testing::TestWithParam<std::tuple<Backend, CutCase>> {};

TEST_P(SsdCuts, DoNotMatter) {
  const auto& [backend, cut] = GetParam();
  const DType T = ops(backend).activation_dtype(cut.weights);
  SsdCase c{.name = "whole", .n_group = 2, .lengths = {cut.length}, .weights = cut.weights};
  const SsdData data = ssd_data(c, T);
  const SsdResult whole = run_ssd(backend, c, data);
  const int64_t E = c.n_head * c.head_dim;
  const int64_t GN = c.n_group * c.d_state;
  const int64_t width = E * c.d_state;
  const auto part = [&](SsdData d, int64_t begin, int64_t end) {
    d.x = rows(data.x, begin, end, E);
    d.dt = rows(data.dt, begin, end, c.n_head);
    d.B = rows(data.B, begin, end, GN);
    d.C = rows(data.C, begin, end, GN);
    c.lengths = {static_cast<int32_t>(end - begin)};
    return run_ssd(backend, c, d);
  };
  for (const int32_t n : cut.cuts) {
    SsdData d = data;
    const SsdResult first = part(d, 0, n);
    d.state = first.state;
    const SsdResult second = part(d, n, cut.length);
    Values y = first.y;
    append(y, second.y);
    EXPECT_TRUE(near_std(without_rounding(y, whole.y, T), whole.y, y_tolerance(T)))
        << "cut at " << n;
    EXPECT_TRUE(near_std(rows(second.state, 1, 2, width), rows(whole.state, 1, 2, width),
                         state_tolerance(T, c.state)));
    if (ops(backend).backend() == "cpu") {
      EXPECT_TRUE(same_bits(y, whole.y) && same_bits(second.state, whole.state)) << n;
    }
  }
}

OPS_TEST_ALL_BACKENDS(SsdCuts, ::testing::ValuesIn(cut_cases()));

class SsdNeighbours : public ::testing::TestWithParam<std::tuple<Backend, SsdCase>> {};

// A sequence alone, and the same among others, in another order and other slots.
TEST_P(SsdNeighbours, DoNotMatter) {
  const auto& [backend, base] = GetParam();
  SsdCase c = base;
  c.lengths = {5, 1, 140, 64};
  c.slots = {4, 0, 5, 2};
  const DType T = ops(backend).activation_dtype(c.weights);
  const SsdData data = ssd_data(c, T);
  const SsdResult together = run_ssd(backend, c, data);
  const int64_t E = c.n_head * c.head_dim;
  const int64_t GN = c.n_group * c.d_state;
  const int64_t width = E * c.d_state;
  int64_t begin = 0;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t end = begin + c.lengths[s];
    SsdCase alone = c;
    alone.lengths = {c.lengths[s]};
    alone.slots = {3};
    SsdData d = data;
    d.x = rows(data.x, begin, end, E);
    d.dt = rows(data.dt, begin, end, c.n_head);
    d.B = rows(data.B, begin, end, GN);
    d.C = rows(data.C, begin, end, GN);
    const Values start = rows(data.state, c.slots[s], c.slots[s] + 1, width);
    d.state.assign(static_cast<size_t>(kSlots * width), kNan);
    std::copy(start.begin(), start.end(), d.state.begin() + 3 * width);
    const SsdResult got = run_ssd(backend, alone, d);
    EXPECT_TRUE(near_std(got.y, rows(together.y, begin, end, E), y_tolerance(T))) << s;
    EXPECT_TRUE(near_std(rows(got.state, 3, 4, width),
                         rows(together.state, c.slots[s], c.slots[s] + 1, width),
                         state_tolerance(T, c.state)))
        << s;
    begin = end;
  }
}

OPS_TEST_ALL_BACKENDS(
    SsdNeighbours,
    ::testing::Values(SsdCase{.name = "f32"}, SsdCase{.name = "f32_Sbf16", .state = DType::bf16},
                      SsdCase{.name = "bf16", .weights = DType::bf16},
                      SsdCase{.name = "bf16_Sbf16", .weights = DType::bf16, .state = DType::bf16},
                      SsdCase{.name = "f16_Sf16", .weights = DType::f16, .state = DType::f16}));

// ---- ssd_mixer

struct MixerCase {
  std::string name;
  SsdCase scan;  ///< sizes, sequences and types
  int64_t d_conv = 4;
  bool conv_bias = true;
};

void PrintTo(const MixerCase& c, std::ostream* os) { *os << c.name; }

std::vector<MixerCase> mixer_cases() {
  std::vector<MixerCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const SsdCase base{.name = "", .weights = t};
    const auto vary = [&](const std::string& what, auto&& set) {
      MixerCase c{.name = std::string(dtype_name(t)) + "_" + what, .scan = base};
      set(c);
      cases.push_back(c);
      c.name += "_decode";
      for (int32_t& n : c.scan.lengths) n = 1;
      cases.push_back(c);
    };
    vary("base", [](MixerCase&) {});
    vary("no_bias", [](MixerCase& c) { c.conv_bias = false; });
    vary("width3", [](MixerCase& c) { c.d_conv = 3; });
    vary("heads80", [](MixerCase& c) { c.scan.n_head = 80, c.scan.lengths = {200}; });
    vary("groups8", [](MixerCase& c) { c.scan.n_head = 16, c.scan.n_group = 8; });
    vary("heads5_of_group", [](MixerCase& c) { c.scan.n_head = 10, c.scan.n_group = 2; });
    for (const int64_t n : {16, 32, 64, 256}) {
      vary(fmt::format("state{}", n), [&](MixerCase& c) { c.scan.d_state = n; });
    }
    for (const int64_t p : {8, 16, 48}) {
      vary(fmt::format("dim{}", p), [&](MixerCase& c) { c.scan.head_dim = p; });
    }
    for (const DType s : {DType::bf16, DType::f16}) {
      vary(fmt::format("S{}", dtype_name(s)), [&](MixerCase& c) { c.scan.state = s; });
      vary(fmt::format("S{}_state64", dtype_name(s)),
           [&](MixerCase& c) { c.scan.state = s, c.scan.d_state = 64; });
    }
    vary("batch", [](MixerCase& c) {
      c.scan.lengths = {5, 2, 300, 1}, c.scan.slots = {4, -1, 0, 2};
      c.scan.dt_min = 0.01F, c.scan.dt_max = 0.05F;
    });
    vary("unaligned", [](MixerCase& c) { c.scan.left = 3; });
    // Long enough that a GPU cuts them into segments.
    vary("long", [](MixerCase& c) { c.scan.lengths = {1100}; });
    vary("long_state64", [](MixerCase& c) { c.scan.lengths = {513}, c.scan.d_state = 64; });
    vary("long_groups", [](MixerCase& c) {
      c.scan.n_head = 10, c.scan.n_group = 2, c.scan.lengths = {514}, c.conv_bias = false;
    });
    vary("long_batch", [](MixerCase& c) {
      c.scan.lengths = {2, 770, 1, 512, 300}, c.scan.slots = {4, 0, 1, -1, 2};
      c.scan.state = DType::bf16;
    });
  }
  return cases;
}

class SsdMixerVerb : public ::testing::TestWithParam<std::tuple<Backend, MixerCase>> {};

// Against the definition, and against the three verbs of the same backend.
TEST_P(SsdMixerVerb, EqualsDefinitionAndVerbs) {
  const auto& [backend, m] = GetParam();
  const SsdCase& c = m.scan;
  const DType T = ops(backend).activation_dtype(c.weights);
  const SsdData data = ssd_data(c, T);
  const int64_t n_tok = count_tokens(c.lengths);
  const int64_t E = c.n_head * c.head_dim;
  const int64_t width = E + 2 * c.n_group * c.d_state;
  Random r(43);
  const Values z = rounded(r.uniform(n_tok * E, -3, 3), T);
  const Values u = rounded(r.uniform(n_tok * width, -2, 2), T);
  const Values conv = r.uniform(width * m.d_conv, -1, 1);
  const Values bias = r.uniform(width, -1, 1);
  const Values norm = r.uniform(E, -2, 2);
  Values conv_state = rounded(r.uniform(kSlots * (m.d_conv - 1) * width, -2, 2), T);
  poison_free_slots(conv_state, c.slots, (m.d_conv - 1) * width);
  struct Result {
    SsdResult scan;
    Values conv_state;
  };
  const auto run = [&](Backend b, bool verbs) {
    Device d(b);
    const DType type = d.op.activation_dtype(c.weights);
    std::vector<int64_t> positions(c.lengths.size());
    std::iota(positions.begin(), positions.end(), 1000);
    const Batch batch = d.batch(c.lengths, c.slots, positions);
    const SsdMixer in{d.view(z, {n_tok, E}, type, c.left, 8),
                      d.view(u, {n_tok, width}, type, 16, 8),
                      d.view(data.dt, {n_tok, c.n_head}, type, 5, 3),
                      d.tensor(conv, {width, m.d_conv}),
                      m.conv_bias ? d.tensor(bias, {width}) : Tensor(),
                      d.tensor(data.A, {c.n_head}),
                      d.tensor(data.D, {c.n_head}),
                      d.tensor(data.dt_bias, {c.n_head}),
                      d.tensor(norm, {E}),
                      c.n_group,
                      c.dt_min,
                      c.dt_max,
                      1e-5F};
    const Tensor y = d.filled(0, {n_tok, E}, type);  // the norm runs over rows of padding, too
    const Tensor xbc = d.filled(0, {n_tok, width}, type);
    const Tensor inputs = d.tensor(conv_state, {kSlots, m.d_conv - 1, width}, type);
    const Tensor state = d.tensor(data.state, {kSlots, c.n_head, c.head_dim, c.d_state}, c.state);
    if (verbs) {
      d.op.Ops::ssd_mixer(y, xbc, in, inputs, state, batch);
    } else {
      d.op.ssd_mixer(y, xbc, in, inputs, state, batch);
    }
    return Result{{d.read(y), d.read(state), type}, d.read(inputs)};
  };
  const Result got = run(backend, false);
  const Result verbs = run(backend, true);
  const Result want = run(Backend::plain, true);
  EXPECT_TRUE(same_bits(got.conv_state, verbs.conv_state));
  EXPECT_TRUE(same_bits(got.scan.y, verbs.scan.y));
  EXPECT_TRUE(same_bits(got.scan.state, verbs.scan.state));
  // x, B and C are rounded to T on the way, and the norm multiplies what y is off by.
  const RecurrenceShape shape{c.lengths, c.slots, E, E * c.d_state, c.state, false};
  expect_near(shape, data.state, got.scan, want.scan, 2 * y_tolerance(T),
              6 * state_tolerance(T, c.state));
}

OPS_TEST_BACKENDS(SsdMixerVerb, ::testing::ValuesIn(mixer_cases()));

// ---- gated_rms_norm

struct GateCase {
  std::string name;
  int64_t n = 5;
  int64_t d = 96;
  int64_t n_group = 1;
  DType weights = DType::f32;
  bool in_place = false;
  int64_t left = 16;  ///< columns before z in its matrix
};

void PrintTo(const GateCase& c, std::ostream* os) { *os << c.name; }

std::vector<GateCase> gate_cases() {
  std::vector<GateCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const std::string type(dtype_name(t));
    for (const int64_t n : {1, 2, 33}) {
      cases.push_back({.name = fmt::format("{}_n{}", type, n), .n = n, .weights = t});
    }
    for (const int64_t d : {1, 2, 7, 64, 129, 768, 2560, 5120, 8192}) {
      cases.push_back({.name = fmt::format("{}_d{}", type, d), .d = d, .weights = t});
    }
    for (const int64_t g : {2, 4, 8, 96}) {
      cases.push_back({.name = fmt::format("{}_groups{}", type, g), .n_group = g, .weights = t});
    }
    cases.push_back({.name = type + "_codestral", .d = 8192, .n_group = 8, .weights = t});
    // More rows than blocks of a GPU.
    cases.push_back({.name = type + "_rows", .n = 600, .d = 5120, .weights = t, .in_place = true});
    cases.push_back(
        {.name = type + "_rows_groups8", .n = 600, .d = 8192, .n_group = 8, .weights = t});
    cases.push_back({.name = type + "_in_place", .weights = t, .in_place = true});
    cases.push_back({.name = type + "_odd_groups", .d = 75, .n_group = 3, .weights = t});
    cases.push_back({.name = type + "_unaligned", .weights = t, .left = 3});
  }
  return cases;
}

class GatedRmsNorm : public ::testing::TestWithParam<std::tuple<Backend, GateCase>> {};

TEST_P(GatedRmsNorm, EqualsDefinition) {
  const auto& [backend, c] = GetParam();
  const DType T = ops(backend).activation_dtype(c.weights);
  Random r(42);
  const Values y = rounded(r.uniform(c.n * c.d, -2, 2), T);
  const Values z = rounded(r.uniform(c.n * c.d, -3, 3), T);
  const Values w = r.uniform(c.d, -2, 2);
  const auto run = [&](Backend b) {
    Device d(b);
    const DType type = d.op.activation_dtype(c.weights);
    const Tensor in = d.tensor(y, {c.n, c.d}, type);
    const Tensor out = c.in_place ? in : d.filled(kNan, {c.n, c.d}, type);
    d.op.gated_rms_norm(out, in, d.view(z, {c.n, c.d}, type, c.left, 8), d.tensor(w, {c.d}),
                        c.n_group, 1e-5F);
    return d.read(out);
  };
  // The definition adds up to 8192 squares one after the other: twice the usual rounding.
  EXPECT_TRUE(close_to(run(backend), run(Backend::plain), 2 * tolerance(T)));
}

OPS_TEST_BACKENDS(GatedRmsNorm, ::testing::ValuesIn(gate_cases()));

TEST(GatedRmsNormDefinition, EachGroupByItsOwnRootOfTheMeanSquare) {
  Device d(Backend::plain);
  const Values y{3, 4, /**/ 6, -8};
  const Values z{100, 100, /**/ 100, 100};  // silu(z) = z
  const Tensor out = d.filled(kNan, {1, 4});
  d.op.gated_rms_norm(out, d.tensor(y, {1, 4}), d.tensor(z, {1, 4}), d.tensor({1, 1, 2, 1}, {4}), 2,
                      0.0F);
  const float a = 1 / std::sqrt(12.5F);
  EXPECT_TRUE(near_std(d.read(out), Values{3 * a, 4 * a, 6 * a, -4 * a}, 1e-6));
}

}  // namespace
}  // namespace krait::test
