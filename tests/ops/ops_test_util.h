// The harness of the op tests: the backends, tensors on them, and comparison with the definition.
//
// The plain CPU backend is the reference. OPS_TEST_BACKENDS runs a parametrised suite on the fast
// CPU backend and, in cases whose name begins with Gpu, on CUDA device 0; there they fail where
// there is no device.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/ops.h"
#include "support/test_support.h"

namespace krait::test {

enum class Backend { plain, fast, gpu };

inline void PrintTo(Backend b, std::ostream* os) {
  *os << (b == Backend::plain ? "plain" : b == Backend::fast ? "fast" : "gpu");
}

/// The backend, made once per process. Three threads, so that ranges do not divide evenly.
inline Ops& ops(Backend b) {
  static const std::unique_ptr<Ops> plain = make_cpu_ops(1, false);
  static const std::unique_ptr<Ops> fast = make_cpu_ops(3, true);
  if (b == Backend::plain) return *plain;
  if (b == Backend::fast) return *fast;
  static const std::unique_ptr<Ops> gpu = make_cuda_ops(0);
  return *gpu;
}

#define OPS_TEST_BACKENDS(suite, cases)                                                        \
  INSTANTIATE_TEST_SUITE_P(                                                                    \
      Cpu, suite, ::testing::Combine(::testing::Values(::krait::test::Backend::fast), cases)); \
  INSTANTIATE_TEST_SUITE_P(                                                                    \
      Gpu, suite, ::testing::Combine(::testing::Values(::krait::test::Backend::gpu), cases))

/// For tests of what must hold on every backend by itself: the definition is tested too.
#define OPS_TEST_ALL_BACKENDS(suite, cases)                                                       \
  INSTANTIATE_TEST_SUITE_P(                                                                       \
      Plain, suite, ::testing::Combine(::testing::Values(::krait::test::Backend::plain), cases)); \
  OPS_TEST_BACKENDS(suite, cases)

using Values = std::vector<float>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

/// Fixed seeds: a case fails the same way twice.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(engine_() >> 8) * 0x1p-24F;
  }
  Values uniform(int64_t n, float low, float high) {
    Values v(static_cast<size_t>(n));
    for (float& x : v) x = uniform(low, high);
    return v;
  }
  int32_t below(int32_t n) { return static_cast<int32_t>(engine_() % static_cast<uint32_t>(n)); }

 private:
  std::mt19937 engine_;
};

inline float rounded(float v, DType t) {
  return visit_dtype(t, "test", [&](auto e) { return static_cast<float>(decltype(e)(v)); });
}

/// What remains of `v` in type `t`: the reference then starts from the same numbers.
inline Values rounded(Values v, DType t) {
  for (float& x : v) x = rounded(x, t);
  return v;
}

/// Largest error that a result of type `t` may have, in standard deviations of the reference, when
/// the arithmetic is f32: a few roundings of a value four deviations out.
inline double tolerance(DType t) { return t == DType::f32 ? 1e-5 : t == DType::f16 ? 4e-3 : 3e-2; }

/// Tensors on a backend. The memory lives as long as this object.
class Device {
 public:
  explicit Device(Backend b) : op(ops(b)) {}

  Tensor bytes(const void* data, DType t, const Shape& shape) {
    Tensor tensor(nullptr, t, shape);
    buffers_.push_back(op.allocate(tensor.bytes(), "test"));
    tensor.data = buffers_.back().data();
    op.upload(tensor.data, data, tensor.bytes());
    return tensor;
  }
  Tensor tensor(const Values& v, const Shape& shape, DType t = DType::f32) {
    EXPECT_EQ(std::ssize(v), shape.numel());
    return visit_dtype(t, "test", [&](auto e) {
      std::vector<decltype(e)> converted;
      for (const float x : v) converted.push_back(decltype(e)(x));
      return bytes(converted.data(), t, shape);
    });
  }
  Tensor ints(const std::vector<int32_t>& v) {
    return bytes(v.data(), DType::i32, {std::ssize(v)});
  }
  Tensor filled(float v, const Shape& shape, DType t = DType::f32) {
    return tensor(Values(static_cast<size_t>(shape.numel()), v), shape, t);
  }

  /// `v` as a block of columns of a wider matrix, NaN on both sides of it.
  Tensor view(const Values& v, const Shape& shape, DType t, int64_t left, int64_t right) {
    const int64_t n = shape[0];
    const int64_t d = shape[1];
    const int64_t width = left + d + right;
    Values wide(static_cast<size_t>(n * width), kNan);
    for (int64_t r = 0; r < n; ++r) {
      std::copy_n(v.begin() + r * d, d, wide.begin() + r * width + left);
    }
    return tensor(wide, {n, width}, t).columns(left, d);
  }

  Values read(const Tensor& t) {
    op.synchronize();
    Values out;
    visit_dtype(t.dtype, "test", [&](auto e) {
      const int64_t n = t.shape.rank() > 1 ? t.dim(0) : 1;
      const int64_t d = n > 0 ? t.numel() / n : 0;
      std::vector<decltype(e)> row(static_cast<size_t>(d));
      for (int64_t r = 0; r < n; ++r) {
        op.download(row.data(), t.as<decltype(e)>() + r * t.row_stride,
                    row.size() * itemsize(t.dtype));
        for (const auto x : row) out.push_back(static_cast<float>(x));
      }
    });
    return out;
  }
  template <typename T>
  std::vector<T> read_as(const Tensor& t) {
    std::vector<T> out(static_cast<size_t>(t.numel()));
    op.download(out.data(), t.data, t.bytes());
    return out;
  }

  /// A batch of sequences of these lengths in these slots, at these positions; none: at 0.
  Batch batch(const std::vector<int32_t>& lengths, const std::vector<int32_t>& slots,
              std::vector<int64_t> positions = {}) {
    std::vector<int32_t> start{0};
    Batch b;
    for (const int32_t n : lengths) {
      start.push_back(start.back() + n);
      b.max_len = std::max<int64_t>(b.max_len, n);
    }
    b.n_tok = start.back();
    b.n_seq = std::ssize(lengths);
    b.seq_start = ints(start);
    b.slot = ints(slots);
    positions.resize(lengths.size());
    b.position = bytes(positions.data(), DType::i64, {b.n_seq});
    return b;
  }

  Ops& op;

 private:
  std::deque<Buffer> buffers_;
};

/// near_std(), and for a single value its absolute error: one value has no spread.
inline ::testing::AssertionResult close_to(const Values& got, const Values& want, double limit) {
  if (want.size() != 1 || got.size() != 1) return near_std(got, want, limit);
  const double error = std::abs(static_cast<double>(got[0]) - static_cast<double>(want[0]));
  if (error <= limit) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "got " << got[0] << ", want " << want[0];
}

/// `got`, with the values that are no more than one unit of type `t` away from `want` replaced by
/// it: results of products have long tails, where a rounding is many times tolerance(t).
inline Values without_rounding(Values got, const Values& want, DType t) {
  const float unit = t == DType::bf16 ? 0x1p-8F : t == DType::f16 ? 0x1p-11F : 0.0F;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    if (std::abs(got[i] - want[i]) <= unit * std::abs(want[i])) got[i] = want[i];
  }
  return got;
}

/// True if the two are the same bits; NaN equals NaN.
inline bool same_bits(const Values& a, const Values& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline bool all_nan(std::span<const float> v) {
  for (const float x : v) {
    if (!std::isnan(x)) return false;
  }
  return true;
}

/// Rows [begin, end) of a [n, width] matrix.
inline Values rows(const Values& v, int64_t begin, int64_t end, int64_t width) {
  return {v.begin() + begin * width, v.begin() + end * width};
}

inline void append(Values& to, const Values& v) { to.insert(to.end(), v.begin(), v.end()); }

/// Names the cases of a suite of (backend, case) by the case's `name`.
struct CaseName {
  template <typename P>
  std::string operator()(const ::testing::TestParamInfo<P>& info) const {
    return std::get<1>(info.param).name;
  }
};

}  // namespace krait::test
