// selective_scan: every backend against the definition and, over many lengths, against a float64
// loop; state types, extreme inputs, and what must hold however a text is cut into steps.
#include "ops/recurrence_test_util.h"

namespace krait::test {
namespace {

struct ScanCase {
  std::string name;
  int64_t d_inner = 37;
  int64_t d_state = 16;
  std::vector<int32_t> lengths{11};
  std::vector<int32_t> slots{1};
  DType weights = DType::f32;
  DType state = DType::f32;
  enum class In { separate, y_is_x, y_is_dt } in = In::separate;
  Rounding rounding = Rounding::nearest;
};

void PrintTo(const ScanCase& c, std::ostream* os) { *os << c.name; }

struct ScanData {
  Values x, dt, A, B, C, D, z, dt_bias, state;
};

ScanData scan_data(const ScanCase& c, DType T) {
  Random r(31);
  const int64_t n_tok = count_tokens(c.lengths);
  ScanData d;
  d.x = rounded(r.uniform(n_tok * c.d_inner, -1, 1), T);
  d.dt = rounded(r.uniform(n_tok * c.d_inner, -1, 1), T);
  for (int64_t e = 0; e < c.d_inner; ++e) {  // A = -(1 .. d_state), as models begin, a little off
    for (int64_t n = 0; n < c.d_state; ++n) {
      d.A.push_back(-static_cast<float>(n + 1) * r.uniform(0.5F, 1.5F));
    }
  }
  d.B = rounded(r.uniform(n_tok * c.d_state, -1, 1), T);
  d.C = rounded(r.uniform(n_tok * c.d_state, -1, 1), T);
  d.D = r.uniform(c.d_inner, -1, 1);
  d.z = rounded(r.uniform(n_tok * c.d_inner, -2, 2), T);
  d.dt_bias = r.uniform(c.d_inner, -5, -2);  // softplus: steps of 0.002 .. 0.3
  d.state = rounded(r.uniform(kSlots * c.d_inner * c.d_state, -1, 1), c.state);
  poison_free_slots(d.state, c.slots, c.d_inner * c.d_state);
  return d;
}

using ScanResult = RecurrenceResult;

ScanResult run_scan(Backend b, const ScanCase& c, const ScanData& data) {
  Device d(b);
  const DType T = d.op.activation_dtype(c.weights);
  Batch batch = d.batch(c.lengths, c.slots);
  batch.rounding = c.rounding;
  const Shape wide{batch.n_tok, c.d_inner};
  const Shape narrow{batch.n_tok, c.d_state};
  ScanInputs in;
  in.x = d.tensor(data.x, wide, T);
  in.dt = d.tensor(data.dt, wide, T);
  in.A = d.tensor(data.A, {c.d_inner, c.d_state});
  in.B = d.view(data.B, narrow, T, 5, 3);
  in.C = d.view(data.C, narrow, T, 7, 2);
  in.D = d.tensor(data.D, {c.d_inner});
  in.z = d.view(data.z, wide, T, 16, 8);
  in.dt_bias = d.tensor(data.dt_bias, {c.d_inner});
  const Tensor y = c.in == ScanCase::In::y_is_x    ? in.x
                   : c.in == ScanCase::In::y_is_dt ? in.dt
                                                   : d.filled(kNan, wide, T);
  const Tensor state = d.tensor(data.state, {kSlots, c.d_inner, c.d_state}, c.state);
  d.op.selective_scan(y, in, state, batch);
  return {d.read(y), d.read(state), T};
}

/// The recurrence token by token in arithmetic of type Real; the state is rounded once, at the end.
template <typename Real>
ScanResult plain_loop(const ScanCase& c, const ScanData& d) {
  const auto at = [](const Values& v, int64_t i) {
    return static_cast<Real>(v[static_cast<size_t>(i)]);
  };
  ScanResult r{Values(d.x.size(), kNan), d.state, DType::f32};
  int64_t begin = 0;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t end = begin + c.lengths[s];
    for (int64_t e = 0; e < c.d_inner && c.slots[s] >= 0; ++e) {
      const int64_t h0 = (c.slots[s] * c.d_inner + e) * c.d_state;
      std::vector<Real> h;
      for (int64_t n = 0; n < c.d_state; ++n) h.push_back(at(d.state, h0 + n));
      for (int64_t t = begin; t < end; ++t) {
        const Real v = at(d.dt, t * c.d_inner + e) + at(d.dt_bias, e);
        const Real dt = v > 20 ? v : std::log1p(std::exp(v));
        const Real x = at(d.x, t * c.d_inner + e);
        const Real z = at(d.z, t * c.d_inner + e);
        Real y = at(d.D, e) * x;
        for (int64_t n = 0; n < c.d_state; ++n) {
          Real& hn = h[static_cast<size_t>(n)];
          hn = std::exp(dt * at(d.A, e * c.d_state + n)) * hn + dt * at(d.B, t * c.d_state + n) * x;
          y += at(d.C, t * c.d_state + n) * hn;
        }
        r.y[static_cast<size_t>(t * c.d_inner + e)] =
            static_cast<float>(y * z / (1 + std::exp(-z)));
      }
      for (int64_t n = 0; n < c.d_state; ++n) {
        r.state[static_cast<size_t>(h0 + n)] =
            rounded(static_cast<float>(h[static_cast<size_t>(n)]), c.state);
      }
    }
    begin = end;
  }
  return r;
}

ScanResult oracle(const ScanCase& c, const ScanData& d) { return plain_loop<double>(c, d); }

void expect_near(const ScanCase& c, const ScanData& data, const ScanResult& got,
                 const ScanResult& want, double y_limit, double state_limit) {
  expect_near({c.lengths, c.slots, c.d_inner, c.d_inner * c.d_state, c.state,
               c.in == ScanCase::In::separate},
              data.state, got, want, y_limit, state_limit);
}

/// A rounded state may round the other way where the two differ in the last bits of f32. With
/// 16-bit inputs a device may take exponentials that are 2 ulp off, which a slow decay adds up.
double state_tolerance(const ScanCase& c, DType T) {
  if (c.state != DType::f32) return tolerance(c.state);
  return T == DType::f32 ? 1e-5 : 2e-5;
}

std::vector<ScanCase> scan_cases() {
  std::vector<ScanCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const ScanCase base{.name = std::string(dtype_name(t)), .weights = t};
    const auto vary = [&](const std::string& what, auto&& set) {
      ScanCase c = base;
      set(c);
      c.name += "_" + what;
      cases.push_back(c);
    };
    vary("base", [](ScanCase&) {});
    for (const int64_t d : {1, 2, 7, 8, 15, 16, 17, 24, 31, 33, 64, 72, 120, 129, 1536}) {
      vary(fmt::format("d{}", d), [&](ScanCase& c) { c.d_inner = d; });
    }
    for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 32, 33, 64, 100, 128, 255, 256}) {
      vary(fmt::format("state{}", n), [&](ScanCase& c) { c.d_state = n; });
      vary(fmt::format("state{}_decode", n), [&](ScanCase& c) {
        c.d_state = n, c.lengths = {1, 1}, c.slots = {3, 0};
      });
    }
    for (const DType s : {DType::bf16, DType::f16}) {
      vary(fmt::format("h{}", dtype_name(s)), [&](ScanCase& c) { c.state = s; });
      vary(fmt::format("h{}_decode", dtype_name(s)), [&](ScanCase& c) {
        c.state = s, c.lengths = {1, 1, 1}, c.slots = {5, 1, 0};
      });
      vary(fmt::format("h{}_state5", dtype_name(s)),
           [&](ScanCase& c) { c.state = s, c.d_state = 5; });
    }
    vary("decode", [](ScanCase& c) { c.lengths = {1, 1, 1, 1}, c.slots = {4, 0, 3, 1}; });
    for (const DType state : {DType::f32, DType::bf16, DType::f16}) {
      vary(fmt::format("decode5_{}_state", dtype_name(state)), [&](ScanCase& c) {
        c.state = state, c.d_inner = 100;
        c.lengths = {1, 1, 1, 1, 1}, c.slots = {4, -1, 5, 1, 2};
      });
    }
    // Widths of whole models, whose channels a device may share out otherwise.
    for (const int64_t d : {2048, 2560, 3076, 4096, 5120, 8192}) {
      vary(fmt::format("d{}", d), [&](ScanCase& c) { c.d_inner = d, c.lengths = {35}; });
    }
    vary("d1536_ragged", [](ScanCase& c) {
      c.d_inner = 1536, c.lengths = {33, 1, 70, 5}, c.slots = {4, 0, 5, 1};
    });
    vary("ragged", [](ScanCase& c) { c.lengths = {5, 1, 40, 2, 3}, c.slots = {4, 0, 5, 1, 2}; });
    vary("padding", [](ScanCase& c) { c.lengths = {5, 2, 3, 1}, c.slots = {4, -1, 0, -1}; });
    vary("decode_padding", [](ScanCase& c) { c.lengths = {1, 1, 1}, c.slots = {4, -1, 0}; });
    vary("empty", [](ScanCase& c) { c.lengths = {2, 0, 3}, c.slots = {1, 0, 2}; });
    vary("y_is_x", [](ScanCase& c) { c.in = ScanCase::In::y_is_x; });
    vary("y_is_dt", [](ScanCase& c) { c.in = ScanCase::In::y_is_dt; });
    vary("y_is_dt_decode", [](ScanCase& c) { c.in = ScanCase::In::y_is_dt, c.lengths = {1}; });
  }
  return cases;
}

class SelectiveScan : public ::testing::TestWithParam<std::tuple<Backend, ScanCase>> {};

TEST_P(SelectiveScan, EqualsDefinition) {
  const auto& [backend, c] = GetParam();
  const DType T = ops(backend).activation_dtype(c.weights);
  const ScanData data = scan_data(c, T);
  expect_near(c, data, run_scan(backend, c, data), run_scan(Backend::plain, c, data), tolerance(T),
              state_tolerance(c, T));
}

OPS_TEST_BACKENDS(SelectiveScan, ::testing::ValuesIn(scan_cases()));

class ScanRounding : public ::testing::TestWithParam<std::tuple<Backend, ScanCase>> {};

TEST_P(ScanRounding, IsStochasticInSteps) {
  auto [backend, c] = GetParam();
  const ScanData data = scan_data(c, c.weights);
  const ScanResult nearest = run_scan(backend, c, data);
  c.rounding = Rounding::stochastic;
  const ScanResult got = run_scan(backend, c, data);
  EXPECT_TRUE(same_bits(run_scan(backend, c, data).state, got.state));
  const DType type = c.state;
  c.state = DType::f32;
  if (c.lengths.front() == 1) {
    expect_rounded_stochastically(
        of_slots(got.state, c.slots, c.d_inner * c.d_state),
        of_slots(run_scan(backend, c, data).state, c.slots, c.d_inner * c.d_state), type);
  } else {  // after a prompt: once, to nearest
    EXPECT_TRUE(same_bits(got.state, nearest.state));
  }
}

std::vector<ScanCase> rounding_cases() {
  std::vector<ScanCase> cases;
  for (const DType state : {DType::bf16, DType::f16}) {
    for (const int64_t d_state : {16, 24}) {
      for (const int32_t length : {1, 3}) {
        cases.push_back({.name = fmt::format("{}_state{}_L{}", dtype_name(state), d_state, length),
                         .d_inner = 1536,
                         .d_state = d_state,
                         .lengths = {length, length},
                         .slots = {3, 0},
                         .weights = DType::bf16,
                         .state = state});
      }
    }
  }
  return cases;
}

OPS_TEST_ALL_BACKENDS(ScanRounding, ::testing::ValuesIn(rounding_cases()));

std::vector<ScanCase> length_cases() {
  std::vector<ScanCase> cases;
  for (const int32_t n : {1,   2,   3,   4,   5,   31,  32,  33,  63,  64,   65,   127,  128, 129,
                          191, 192, 193, 223, 224, 225, 255, 256, 257, 2047, 2048, 2049, 4096}) {
    cases.push_back({.name = fmt::format("L{}", n), .d_inner = 19, .lengths = {n}});
    cases.push_back(
        {.name = fmt::format("L{}_state7", n), .d_inner = 5, .d_state = 7, .lengths = {n}});
  }
  return cases;
}

class ScanLength : public ::testing::TestWithParam<std::tuple<Backend, ScanCase>> {};

TEST_P(ScanLength, EqualsFloat64) {
  const auto& [backend, c] = GetParam();
  const ScanData data = scan_data(c, DType::f32);
  expect_near(c, data, run_scan(backend, c, data), oracle(c, data), 1e-5, 1e-5);
}

OPS_TEST_ALL_BACKENDS(ScanLength, ::testing::ValuesIn(length_cases()));

class ScanRange : public ::testing::TestWithParam<std::tuple<Backend, RangeCase>> {};

TEST_P(ScanRange, EqualsFloat64) {
  const auto& [backend, range] = GetParam();
  const ScanCase c{.name = "range", .lengths = {300}};
  ScanData data = scan_data(c, DType::f32);
  range.apply(data.dt, data.dt_bias, data.A);
  // A decay next to 1 has an error of up to 6e-8, which 300 tokens add up.
  expect_near(c, data, run_scan(backend, c, data), oracle(c, data), 1e-4, 1e-4);
}

OPS_TEST_ALL_BACKENDS(ScanRange, ::testing::ValuesIn(range_cases()));

/// One dt (after softplus) for all tokens, and about one decay exp(dt * A) for all states.
struct ErrorCase {
  std::string name;
  int64_t d_inner = 0;
  int64_t d_state = 0;
  int32_t length = 0;
  double dt = 0;
  double decay = 0;
};

void PrintTo(const ErrorCase& c, std::ostream* os) { *os << c.name; }

std::vector<ErrorCase> error_cases() {
  std::vector<ErrorCase> cases;
  const auto add = [&](int64_t d_inner, int64_t d_state, int32_t length) {
    for (const double dt : {1e-4, 1.0, 100.0}) {
      for (const double decay : {1 - 1e-6, 0.5, 1e-6}) {
        std::string name = fmt::format("L{}_state{}_dt{:.0e}_decay{}", length, d_state, dt,
                                       decay > 0.9   ? "slow"
                                       : decay > 0.1 ? "half"
                                                     : "fast");
        std::erase_if(name, [](char ch) { return ch == '-' || ch == '+'; });
        cases.push_back({name, d_inner, d_state, length, dt, decay});
      }
    }
  };
  for (const int64_t n : {4, 16, 256}) {
    for (const int32_t length : {1, 2, 3, 4, 5, 65}) add(256, n, length);
  }
  for (const int64_t n : {4, 16}) add(32, n, 4096);
  add(4, 16, 100000);
  return cases;
}

class ScanError : public ::testing::TestWithParam<std::tuple<Backend, ErrorCase>> {};

TEST_P(ScanError, IsAtMostTwiceThatOfAFloat32Loop) {
  const auto& [backend, e] = GetParam();
  const ScanCase c{
      .name = e.name, .d_inner = e.d_inner, .d_state = e.d_state, .lengths = {e.length}};
  ScanData data = scan_data(c, DType::f32);
  const double before = e.dt > 20 ? e.dt : std::log(std::expm1(e.dt));  // softplus
  RangeCase{e.name, static_cast<float>(before), static_cast<float>(e.decay)}.apply(
      data.dt, data.dt_bias, data.A);
  Random r(7);  // else one product dt * A, whose rounding may be a lucky one, stands for all
  for (float& a : data.A) a *= r.uniform(0.9F, 1.1F);
  const ScanResult want = oracle(c, data);
  const ScanResult plain = plain_loop<float>(c, data);
  const ScanResult got = run_scan(backend, c, data);
  const int64_t width = c.d_inner * c.d_state;
  const auto rms = [](const Values& a, const Values& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a[i]) - b[i], 2);
    return std::sqrt(sum / static_cast<double>(a.size()));
  };
  const auto expect = [&](const Values& g, const Values& p, const Values& w, const char* what) {
    // What a float32 of this size can't say, for where the loop happens to meet it exactly.
    const double ulp = std::ldexp(rms(w, Values(w.size(), 0.0F)), -24);
    EXPECT_LE(rms(g, w), 2 * rms(p, w) + ulp) << what << "; the loop " << rms(p, w);
  };
  expect(got.y, plain.y, want.y, "y");
  expect(of_slots(got.state, c.slots, width), of_slots(plain.state, c.slots, width),
         of_slots(want.state, c.slots, width), "state");
}

OPS_TEST_ALL_BACKENDS(ScanError, ::testing::ValuesIn(error_cases()));

// Rows past 2^31 elements of x, dt, z and y: the second sequence lies there.
TEST(ScanLong, SlowGpuPast2To31Elements) {
  constexpr int64_t kWide = 32768;
  constexpr int32_t kBefore = 65537;
  const ScanCase c{.name = "far", .d_inner = kWide, .lengths = {5}, .weights = DType::bf16};
  const ScanData data = scan_data(c, DType::bf16);
  const ScanResult near = run_scan(Backend::gpu, c, data);

  Device d(Backend::gpu);
  const Batch batch = d.batch({kBefore, c.lengths[0]}, {0, c.slots[0]});
  std::vector<Buffer> buffers;
  const auto put = [&](const Values& v, int64_t width) {
    Tensor all(nullptr, DType::bf16, {batch.n_tok, width});
    buffers.push_back(d.op.allocate(all.bytes(), "rows past 2^31 elements"));
    all.data = buffers.back().data();
    d.op.zero(all.data, all.bytes());
    const Tensor last = d.tensor(v, {c.lengths[0], width}, DType::bf16);
    d.op.copy(all.rows(kBefore, c.lengths[0]).data, last.data, last.bytes());
    return all;
  };
  ScanInputs in;
  in.x = put(data.x, kWide);
  in.dt = put(data.dt, kWide);
  in.z = put(data.z, kWide);
  in.B = put(data.B, c.d_state);
  in.C = put(data.C, c.d_state);
  in.A = d.tensor(data.A, {kWide, c.d_state});
  in.D = d.tensor(data.D, {kWide});
  in.dt_bias = d.tensor(data.dt_bias, {kWide});
  Values start = data.state;  // slot 0 begins with zeros
  std::fill_n(start.begin(), kWide * c.d_state, 0.0F);
  const Tensor state = d.tensor(start, {kSlots, kWide, c.d_state});
  d.op.selective_scan(in.x, in, state, batch);
  EXPECT_TRUE(near_std(d.read(in.x.rows(kBefore, c.lengths[0])), near.y, 1e-5));
  EXPECT_TRUE(near_std(of_slots(d.read(state), c.slots, kWide * c.d_state),
                       of_slots(near.state, c.slots, kWide * c.d_state), 1e-5));
}

class ScanCuts : public ::testing::TestWithParam<std::tuple<Backend, CutCase>> {};

TEST_P(ScanCuts, DoNotMatter) {
  const auto& [backend, cut] = GetParam();
  const DType T = ops(backend).activation_dtype(cut.weights);
  ScanCase c{.name = "whole", .lengths = {cut.length}, .weights = cut.weights};
  const ScanData data = scan_data(c, T);
  const ScanResult whole = run_scan(backend, c, data);
  const int64_t width = c.d_inner * c.d_state;
  const auto part = [&](ScanData d, int64_t begin, int64_t end) {
    d.x = rows(data.x, begin, end, c.d_inner);
    d.dt = rows(data.dt, begin, end, c.d_inner);
    d.z = rows(data.z, begin, end, c.d_inner);
    d.B = rows(data.B, begin, end, c.d_state);
    d.C = rows(data.C, begin, end, c.d_state);
    c.lengths = {static_cast<int32_t>(end - begin)};
    return run_scan(backend, c, d);
  };
  for (const int32_t n : cut.cuts) {
    ScanData d = data;
    const ScanResult first = part(d, 0, n);
    d.state = first.state;
    const ScanResult second = part(d, n, cut.length);
    Values y = first.y;
    append(y, second.y);
    EXPECT_TRUE(near_std(y, whole.y, tolerance(T))) << "cut at " << n;
    EXPECT_TRUE(near_std(rows(second.state, 1, 2, width), rows(whole.state, 1, 2, width), 1e-5));
    if (ops(backend).backend() == "cpu") {
      EXPECT_TRUE(same_bits(y, whole.y) && same_bits(second.state, whole.state)) << n;
    }
  }
}

OPS_TEST_ALL_BACKENDS(ScanCuts, ::testing::ValuesIn(cut_cases()));

struct StateCase {
  std::string name;
  DType state = DType::f32;
};

void PrintTo(const StateCase& c, std::ostream* os) { *os << c.name; }

class ScanState : public ::testing::TestWithParam<std::tuple<Backend, StateCase>> {};

// A sequence alone, and the same among others, in another order and other slots.
TEST_P(ScanState, DoesNotDependOnItsNeighbours) {
  const auto& [backend, state] = GetParam();
  ScanCase c{.name = "ragged", .lengths = {5, 1, 70, 33}, .slots = {4, 0, 5, 2}};
  c.state = state.state;
  const ScanData data = scan_data(c, DType::f32);
  const ScanResult together = run_scan(backend, c, data);
  const int64_t width = c.d_inner * c.d_state;
  int64_t begin = 0;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t end = begin + c.lengths[s];
    ScanCase alone = c;
    alone.lengths = {c.lengths[s]};
    alone.slots = {3};
    ScanData d = data;
    d.x = rows(data.x, begin, end, c.d_inner);
    d.dt = rows(data.dt, begin, end, c.d_inner);
    d.z = rows(data.z, begin, end, c.d_inner);
    d.B = rows(data.B, begin, end, c.d_state);
    d.C = rows(data.C, begin, end, c.d_state);
    const Values start = rows(data.state, c.slots[s], c.slots[s] + 1, width);
    d.state.assign(static_cast<size_t>(kSlots * width), kNan);
    std::copy(start.begin(), start.end(), d.state.begin() + 3 * width);
    const ScanResult got = run_scan(backend, alone, d);
    EXPECT_TRUE(near_std(got.y, rows(together.y, begin, end, c.d_inner), 1e-5)) << s;
    EXPECT_TRUE(near_std(rows(got.state, 3, 4, width),
                         rows(together.state, c.slots[s], c.slots[s] + 1, width),
                         state_tolerance(c, c.weights)))
        << s;
    begin = end;
  }
}

OPS_TEST_ALL_BACKENDS(ScanState, ::testing::Values(StateCase{"f32", DType::f32},
                                                   StateCase{"bf16", DType::bf16},
                                                   StateCase{"f16", DType::f16}));

class ScanCaptured : public ::testing::TestWithParam<std::tuple<Backend, StateCase>> {};

// A backend that remembers a step may read its states before the verbs before them are done: it
// must not see the difference, even where a step has a state twice.
TEST_P(ScanCaptured, StepsEqualThoseThatAreNot) {
  const auto& [backend, state] = GetParam();
  constexpr int32_t kSeqs = 40;
  constexpr int64_t E = 1024;
  constexpr int64_t R = 32;
  constexpr int64_t N = 16;
  const auto run = [&, b = backend, type = state.state](bool captured) {
    Device d(b);
    const DType T = d.op.activation_dtype(DType::bf16);
    Random r(53);
    std::vector<int32_t> slots;
    for (int32_t s = 0; s < kSeqs; ++s) slots.push_back(s % 7 == 3 ? -1 : (s * 11) % kSeqs);
    const Batch batch = d.batch(std::vector<int32_t>(kSeqs, 1), slots);
    const Tensor u = d.tensor(r.uniform(kSeqs * E, -1, 1), {kSeqs, E}, T);
    const Tensor taps = d.tensor(r.uniform(E * 4, -1, 1), {E, 4});
    const Tensor W = d.tensor(r.uniform(E * R, -1, 1), {E, R}, DType::bf16);
    const Tensor A = d.tensor(r.uniform(E * N, -2, -1), {E, N});
    const Tensor D = d.tensor(r.uniform(E, -1, 1), {E});
    const Tensor x = d.filled(0, {kSeqs, E}, T);
    const Tensor dt = d.filled(0, {kSeqs, E}, T);
    const Tensor y = d.filled(0, {kSeqs, E}, T);
    std::vector<Tensor> conv, ssm;
    for (int layer = 0; layer < 2; ++layer) {
      conv.push_back(d.tensor(r.uniform(kSeqs * 3 * E, -1, 1), {kSeqs, 3, E}, T));
      ssm.push_back(d.tensor(r.uniform(kSeqs * E * N, -1, 1), {kSeqs, E, N}, type));
    }
    const ScanInputs in{x, dt, A, u.columns(0, N), u.columns(N, N), D, u, D};
    const auto step = [&] {
      for (const size_t layer : {0, 1, 0}) {
        d.op.conv1d_silu(x, u, taps, {}, conv[layer], batch);
        d.op.linear(dt, x.columns(0, R), W, {});
        d.op.selective_scan(y, in, ssm[layer], batch);
        d.op.linear(u.columns(2 * N, R), y.columns(0, R), W.rows(0, R), {});
      }
    };
    static uint64_t key = uint64_t{0x5ca7} << 32;
    ++key;
    for (int i = 0; i < 6; ++i) captured ? d.op.replay(key, step) : step();
    Values all = d.read(y);
    for (const Tensor& t : conv) append(all, d.read(t));
    for (const Tensor& t : ssm) append(all, d.read(t));
    return all;
  };
  EXPECT_TRUE(same_bits(run(true), run(false)));
}

OPS_TEST_BACKENDS(ScanCaptured,
                  ::testing::Values(StateCase{"f32", DType::f32}, StateCase{"bf16", DType::bf16}));

}  // namespace
}  // namespace krait::test
