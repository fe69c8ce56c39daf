#include "runtime/ceilings.h"

#include <functional>
#include <random>
#include <vector>

#include "base/stats.h"

namespace krait {

namespace {

/// Seconds of one call: median of some runs after a warm-up that also brings the clocks up.
double seconds_of(Ops& op, const std::function<void()>& call) {
  const auto run = [&](int calls) {
    call();  // so that the launches of those that count are behind it
    return op.seconds([&] {
      for (int i = 0; i < calls; ++i) call();
    }) / calls;
  };
  constexpr double kWarmUp = 0.05;
  constexpr double kRun = 0.01;
  constexpr int kRuns = 7;
  double once = run(1);
  for (double spent = 2 * once; spent < kWarmUp; spent += 2 * once) once = run(1);
  const int calls = std::max(1, static_cast<int>(kRun / once));
  std::vector<double> seconds(kRuns);
  for (double& s : seconds) s = run(calls);
  return median(seconds);
}

/// Uniform in [-1, 1]: a chip computes faster on zeros, which cost it less power.
Tensor random_matrix(Ops& op, const Buffer& memory, DType dtype, int64_t n) {
  const Tensor t(memory.data(), dtype, {n, n});
  visit_dtype(dtype, "a matrix", [&](auto zero) {
    using E = decltype(zero);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> value(-1, 1);
    std::vector<E> rows(static_cast<size_t>(std::min<int64_t>(n, 64) * n));
    for (E& e : rows) e = E(value(random));
    for (int64_t row = 0; row < n; row += 64) {
      const Tensor part = t.rows(row, std::min<int64_t>(64, n - row));
      op.upload(part.data, rows.data(), part.bytes());
    }
    op.synchronize();
  });
  return t;
}

}  // namespace

MemoryCeiling measure_memory(Ops& op) {
  const size_t largest = op.backend() == "cpu" ? size_t{1} << 28 : size_t{1} << 30;
  const size_t bytes = std::min(largest, op.info().memory_free / 4) & ~size_t{0xff};
  if (bytes < size_t{1} << 20) {
    throw Error(ErrorKind::device, "too little memory is free to measure its speed");
  }
  const Buffer a = op.allocate(bytes, "measuring the memory");
  const Buffer b = op.allocate(bytes, "measuring the memory");
  const Buffer sum = op.allocate(sizeof(uint32_t), "measuring the memory");
  op.zero(a.data(), bytes);
  op.zero(b.data(), bytes);
  const auto n = static_cast<double>(bytes);
  MemoryCeiling c;
  c.copy = 2 * n / seconds_of(op, [&] { op.stream_copy(b.data(), a.data(), bytes); });
  c.read = n / seconds_of(op, [&] { op.stream_read(sum.data(), a.data(), bytes); });
  return c;
}

double measure_product(Ops& op, DType weights) {
  const DType T = op.activation_dtype(weights);
  const int64_t n = op.backend() == "cpu" ? 1024 : 8192;
  const auto elements = static_cast<size_t>(n * n);
  const Buffer in = op.allocate(elements * itemsize(T), "measuring the product");
  const Buffer W = op.allocate(elements * itemsize(weights), "measuring the product");
  const Buffer out = op.allocate(elements * itemsize(T), "measuring the product");
  const Tensor x = random_matrix(op, in, T, n);
  const Tensor w = random_matrix(op, W, weights, n);
  const Tensor y(out.data(), T, {n, n});
  const auto size = static_cast<double>(n);
  return 2 * size * size * size / seconds_of(op, [&] { op.linear(y, x, w, {}); });
}

}  // namespace krait
