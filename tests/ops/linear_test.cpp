// linear and linear_add: every backend against the definition, the definition against float64.
// GCC 12 at -O3 takes the dimensions of a Shape, which are always set, for uninitialised.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <array>
#include <cstddef>

#include "ops/ops_test_util.h"

namespace krait::test {
namespace {

struct LinearCase {
  std::string name;
  int64_t n = 5;
  int64_t n_in = 67;
  int64_t n_out = 43;
  DType weights = DType::f32;
  bool bias = false;
  bool strided = false;
  bool f32_out = false;
};

void PrintTo(const LinearCase& c, std::ostream* os) { *os << c.name; }

std::vector<LinearCase> linear_cases() {
  std::vector<LinearCase> cases;
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const std::string type(dtype_name(t));
    const LinearCase base{.name = type, .weights = t};
    const auto vary = [&](const std::string& what, auto&& set) {
      LinearCase c = base;
      set(c);
      c.name += "_" + what;
      cases.push_back(c);
    };
    vary("base", [](LinearCase&) {});
    // Around the tiles: rows of the input, outputs, and the length of the sum.
    for (const int64_t n : {1, 2, 3, 4, 6, 7, 8, 9, 12, 13, 16, 17, 31, 33, 65, 130}) {
      vary(fmt::format("n{}", n), [&](LinearCase& c) { c.n = n; });
    }
    for (const int64_t n : {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 127, 129, 257}) {
      vary(fmt::format("out{}", n), [&](LinearCase& c) { c.n_out = n; });
    }
    for (const int64_t n : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 1025}) {
      vary(fmt::format("in{}", n), [&](LinearCase& c) { c.n_in = n; });
    }
    vary("bias", [](LinearCase& c) { c.bias = true; });
    vary("strided", [](LinearCase& c) { c.strided = true; });
    vary("strided_n1", [](LinearCase& c) { c.strided = true, c.n = 1; });
    vary("f32_out", [](LinearCase& c) { c.f32_out = true; });
    vary("f32_out_bias", [](LinearCase& c) { c.f32_out = c.bias = true; });
    // What the copy engine of a Hopper GPU can fetch: rows of a multiple of 8 elements.
    for (const int64_t n : {1, 4, 8, 9, 40, 64, 65, 128, 129, 300}) {
      for (const int64_t n_out : {203, 640}) {
        vary(fmt::format("n{}_in1096_out{}", n, n_out),
             [&](LinearCase& c) { c.n = n, c.n_in = 1096, c.n_out = n_out; });
      }
    }
    vary("n70_in1096_f32_out_bias",
         [](LinearCase& c) { c.n = 70, c.n_in = 1096, c.n_out = 203, c.f32_out = c.bias = true; });
    vary("n70_in1096_strided_bias",
         [](LinearCase& c) { c.n = 70, c.n_in = 1096, c.n_out = 200, c.strided = c.bias = true; });
    vary("decode", [](LinearCase& c) { c.n = 1, c.n_in = 768, c.n_out = 3072; });
    vary("prefill", [](LinearCase& c) { c.n = 150, c.n_in = 768, c.n_out = 515; });
  }
  return cases;
}

struct LinearData {
  Values in, weight, bias, acc;
};

LinearData linear_data(const LinearCase& c, DType activation) {
  Random r(7);
  LinearData d;
  d.in = rounded(r.uniform(c.n * c.n_in, -1, 1), activation);
  d.weight = rounded(r.uniform(c.n_out * c.n_in, -1, 1), c.weights);
  d.bias = r.uniform(c.n_out, -1, 1);
  d.acc = r.uniform(c.n * c.n_out, -1, 1);
  return d;
}

/// Runs on `b`; `activation` is the type of `in` and, unless f32_out, of `out` there.
Values run_linear(Backend b, const LinearCase& c, const LinearData& d, bool add) {
  Device device(b);
  const DType T = device.op.activation_dtype(c.weights);
  const DType out_type = c.f32_out || add ? DType::f32 : T;
  const int64_t gap = c.strided ? 8 : 0;
  const Tensor in = device.view(d.in, {c.n, c.n_in}, T, 2 * gap, gap);
  const Tensor W = device.tensor(d.weight, {c.n_out, c.n_in}, c.weights);
  const Tensor bias = c.bias ? device.tensor(d.bias, {c.n_out}) : Tensor{};
  if (add) {
    const Tensor acc = device.tensor(d.acc, {c.n, c.n_out});
    device.op.linear_add(acc, in, W, bias);
    return device.read(acc);
  }
  const Tensor wide = device.filled(kNan, {c.n, c.n_out + 3 * gap}, out_type);
  const Tensor out = wide.columns(gap, c.n_out);
  device.op.linear(out, in, W, bias);
  if (c.strided) {  // what lies beside the view stays
    EXPECT_TRUE(all_nan(device.read(wide.columns(0, gap))));
    EXPECT_TRUE(all_nan(device.read(wide.columns(gap + c.n_out, 2 * gap))));
  }
  return device.read(out);
}

class Linear : public ::testing::TestWithParam<std::tuple<Backend, LinearCase>> {};

TEST_P(Linear, EqualsDefinition) {
  const auto& [backend, c] = GetParam();
  const DType T = ops(backend).activation_dtype(c.weights);
  const LinearData d = linear_data(c, T);
  // Products of up to n_in terms: their error in f32 grows with the root of the number of terms.
  const double scale = 4 * std::sqrt(static_cast<double>(c.n_in)) / 8;
  const double f32_limit = tolerance(DType::f32) * std::max(1.0, scale);
  const double limit = c.f32_out ? f32_limit : std::max(f32_limit, tolerance(T));
  EXPECT_TRUE(
      close_to(run_linear(backend, c, d, false), run_linear(Backend::plain, c, d, false), limit));
  EXPECT_TRUE(
      close_to(run_linear(backend, c, d, true), run_linear(Backend::plain, c, d, true), f32_limit));
}

OPS_TEST_BACKENDS(Linear, ::testing::ValuesIn(linear_cases()));

TEST(LinearDefinition, IsTheProductWithTheTransposedWeight) {
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    const LinearCase c{.name = "oracle", .weights = t, .bias = true, .strided = true};
    const LinearData d = linear_data(c, DType::f32);
    Values want;
    Values want_acc;
    for (int64_t r = 0; r < c.n; ++r) {
      for (int64_t o = 0; o < c.n_out; ++o) {
        double sum = d.bias[static_cast<size_t>(o)];
        for (int64_t i = 0; i < c.n_in; ++i) {
          sum += static_cast<double>(d.in[static_cast<size_t>(r * c.n_in + i)]) *
                 static_cast<double>(d.weight[static_cast<size_t>(o * c.n_in + i)]);
        }
        want.push_back(static_cast<float>(sum));
        want_acc.push_back(static_cast<float>(sum + d.acc[static_cast<size_t>(r * c.n_out + o)]));
      }
    }
    EXPECT_TRUE(near_std(run_linear(Backend::plain, c, d, false), want, 1e-5));
    EXPECT_TRUE(near_std(run_linear(Backend::plain, c, d, true), want_acc, 1e-5));
  }
}

// A token's result does not depend on the tokens beside it: on the CPU to the last bit, so that a
// prompt may be cut anywhere.
TEST(LinearCpu, RowsDoNotDependOnTheirBatch) {
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    LinearCase c{.name = "rows", .n = 133, .n_in = 391, .n_out = 77, .weights = t};
    const LinearData d = linear_data(c, DType::f32);
    const Values whole = run_linear(Backend::fast, c, d, false);
    for (const int64_t part : {1, 2, 3, 5, 8, 61}) {
      Values joined;
      for (int64_t begin = 0; begin < 133; begin += part) {
        LinearData some = d;
        c.n = std::min<int64_t>(part, 133 - begin);
        some.in = rows(d.in, begin, begin + c.n, c.n_in);
        append(joined, run_linear(Backend::fast, c, some, false));
      }
      EXPECT_TRUE(same_bits(joined, whole)) << dtype_name(t) << ", parts of " << part;
    }
  }
}

// On the GPU the kernel depends on the number of rows, but in a step of given size a row's result
// depends neither on what the other rows hold nor on its place among them.
TEST(LinearGpu, RowsDoNotDependOnTheirNeighbours) {
  for (const DType t : {DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t n : {3, 9, 64, 100, 128, 200}) {
      for (const int64_t n_out : {200, 2560}) {
        const LinearCase c{.name = "rows", .n = n, .n_in = 1096, .n_out = n_out, .weights = t};
        const LinearData d = linear_data(c, ops(Backend::gpu).activation_dtype(t));
        const Values whole = run_linear(Backend::gpu, c, d, false);
        const int64_t row = n / 2;
        LinearData other = d;
        std::fill(other.in.begin(), other.in.end(), kNan);
        std::copy_n(d.in.begin() + row * c.n_in, c.n_in, other.in.begin());
        EXPECT_TRUE(same_bits(rows(run_linear(Backend::gpu, c, other, false), 0, 1, n_out),
                              rows(whole, row, row + 1, n_out)))
            << dtype_name(t) << ", " << n << " rows, " << n_out << " outputs";
      }
    }
  }
}

// A backend may try, in the course of the work, which way to a large product is the fastest. No
// result may show it.
TEST(LinearGpu, EveryUseOfALargeProductGivesTheSameBits) {
  constexpr int kUses = 28;  // of each of two operands: trials come to an end before
  const std::vector<LinearCase> cases{
      {.name = "odd", .n = 2051, .n_in = 2400, .n_out = 515},
      {.name = "odd", .n = 2051, .n_in = 2400, .n_out = 515, .weights = DType::bf16},
      {.name = "wide", .n = 2048, .n_in = 768, .n_out = 1608, .weights = DType::bf16},
      {.name = "strided",
       .n = 2056,
       .n_in = 2504,
       .n_out = 520,
       .weights = DType::f16,
       .strided = true},
  };
  for (const LinearCase& c : cases) {
    Device d(Backend::gpu);
    const DType T = d.op.activation_dtype(c.weights);
    const int64_t gap = c.strided ? 8 : 0;
    const Shape shape{c.n, c.n_out + 2 * gap};
    Random r(23);
    std::array<Tensor, 2> in;
    std::array<Tensor, 2> W;
    for (size_t i = 0; i < 2; ++i) {
      in[i] = d.view(r.uniform(c.n * c.n_in, -1, 1), {c.n, c.n_in}, T, gap, gap);
      W[i] = d.tensor(r.uniform(c.n_out * c.n_in, -1, 1), {c.n_out, c.n_in}, c.weights);
    }
    const Values before = r.uniform(shape.numel(), -1, 1);
    for (const bool add : {false, true}) {
      const DType type = add ? DType::f32 : T;
      const Tensor from = d.tensor(before, shape, type);
      const Tensor out = d.filled(0, shape, type);
      const auto use = [&](size_t i) {
        d.op.copy(out.data, from.data, out.bytes());
        const Tensor to = out.columns(gap, c.n_out);
        add ? d.op.linear_add(to, in[i], W[i], {}) : d.op.linear(to, in[i], W[i], {});
        std::vector<std::byte> bits(out.bytes());
        d.op.download(bits.data(), out.data, bits.size());
        return bits;
      };
      const std::array first{use(0), use(1)};
      int n_different = 0;
      for (int i = 0; i < kUses; ++i) {
        for (const size_t k : {size_t{0}, size_t{1}}) n_different += use(k) == first[k] ? 0 : 1;
      }
      EXPECT_EQ(n_different, 0) << c.name << " " << dtype_name(c.weights) << (add ? ", added" : "");
    }
  }
}

class LinearSoon : public ::testing::TestWithParam<std::tuple<Backend, int64_t>> {};

// A step of large weights, which a backend may divide and remember: the same product, whole when it
// is settled.
TEST_P(LinearSoon, IsLinearOnceItIsSettled) {
  const auto& [backend, n] = GetParam();
  constexpr int64_t kIn = 2056;
  constexpr int64_t kSoon = 2056;
  constexpr int64_t kOut = 2 * kSoon;
  Device d(backend);
  const DType T = d.op.activation_dtype(DType::bf16);
  Random r(19);
  const Tensor in = d.tensor(r.uniform(n * kIn, -1, 1), {n, kIn}, T);
  const Tensor W = d.tensor(r.uniform(kOut * kIn, -1, 1), {kOut, kIn}, DType::bf16);
  const Tensor next = d.tensor(r.uniform(40 * kSoon, -1, 1), {40, kSoon}, DType::bf16);
  const Tensor bias = d.tensor(r.uniform(kOut, -1, 1), {kOut});
  Batch batch;
  batch.n_tok = batch.n_seq = n;
  batch.max_len = 1;
  const auto run = [&](const Tensor& out, const Tensor& later, bool soon) {
    soon ? d.op.linear_soon(out, kSoon, in, W, bias, batch) : d.op.linear(out, in, W, bias);
    d.op.linear(later.rows(0, n), out.columns(0, kSoon), next, {});
    if (soon) d.op.settle();
    d.op.linear(later.rows(n, n), out.columns(kSoon, kSoon), next, {});
  };
  const Tensor out = d.filled(kNan, {n, kOut}, T);
  const Tensor later = d.filled(kNan, {2 * n, 40}, T);
  const Tensor want = d.filled(kNan, {n, kOut}, T);
  const Tensor want_later = d.filled(kNan, {2 * n, 40}, T);
  run(want, want_later, false);
  const uint64_t key = uint64_t{0x50017} << 32 | static_cast<uint64_t>(n);
  for (int i = 0; i < 3; ++i) d.op.replay(key, [&] { run(out, later, true); });
  EXPECT_TRUE(close_to(d.read(out), d.read(want), tolerance(T)));
  EXPECT_TRUE(close_to(d.read(later), d.read(want_later), 4 * tolerance(T)));
}

OPS_TEST_BACKENDS(LinearSoon, ::testing::Values(3, 24, 80, 100, 200));

TEST(LinearCpu, WrongShapesAreRefused) {
  for (const Backend b : {Backend::plain, Backend::fast}) {
    Device d(b);
    const Tensor in = d.filled(1, {3, 5});
    const Tensor W = d.filled(1, {7, 5});
    const Tensor out = d.filled(0, {3, 7});
    d.op.linear(out, in, W, {});
    EXPECT_TRUE(throws(ErrorKind::runtime, "W: expected [6, 5], found [7, 5] f32", [&] {
      d.op.linear(d.filled(0, {3, 6}), in, W, {});
    }));
    EXPECT_TRUE(throws(ErrorKind::runtime, "out", [&] {
      d.op.linear(d.filled(0, {2, 7}), in, W, {});
    }));
    EXPECT_TRUE(throws(ErrorKind::runtime, "without memory", [&] {
      d.op.linear_add(Tensor(nullptr, DType::f32, {3, 7}), in, W, {});
    }));
    EXPECT_TRUE(
        throws(ErrorKind::runtime, "bias", [&] { d.op.linear(out, in, W, d.filled(0, {6})); }));
  }
}

}  // namespace
}  // namespace krait::test
