#include "tools/bench_ops/harness.h"

#include <algorithm>
#include <cstdio>
#include <random>

#include "base/stats.h"

namespace krait {

namespace {

constexpr size_t kColdBytes = size_t{256} << 20;  // several times the largest cache
constexpr int kRepetitions = 9;

}  // namespace

Harness::Harness(Ops& op, DType weights, std::string verb)
    : op_(op),
      W_(weights),
      T_(op.activation_dtype(weights)),
      cuda_(op.backend() == "cuda"),
      verb_(std::move(verb)),
      memory_(measure_memory(op)),
      product_(measure_product(op, weights)) {
  const DeviceInfo d = op.info();
  const std::string name = d.name + (d.processor.empty() ? "" : "; " + d.processor) +
                           (d.driver.empty() ? "" : "; driver " + d.driver) +
                           (d.clocks.empty() ? "" : "; " + d.clocks);
  std::printf("%s\nceilings: copy %.0f GB/s, read %.0f GB/s, %s products %.2f TFLOP/s\n\n",
              name.c_str(), memory_.copy / 1e9, memory_.read / 1e9,
              std::string(dtype_name(W_)).c_str(), product_ / 1e12);
  std::printf("%-28s %-22s %10s %7s %9s %9s %9s\n", "verb", "shape, rows", "us", "spread", "GB/s",
              "TFLOP/s", "of floor");
}

bool Harness::wanted(const std::string& name) const {
  return verb_.empty() || name.find(verb_) != std::string::npos;
}

Tensor Harness::zeros(DType type, const Shape& shape) {
  buffers_.push_back(
      op_.allocate(static_cast<size_t>(shape.numel()) * itemsize(type), "bench_ops"));
  const Tensor t(buffers_.back().data(), type, shape);
  op_.zero(t.data, t.bytes());
  return t;
}

Tensor Harness::fresh(DType type, const Shape& shape, float scale) {
  const Tensor t = zeros(type, shape);
  visit_dtype(type, "bench_ops", [&](auto zero) {
    using E = decltype(zero);
    constexpr size_t kPeriod = size_t{1} << 20;
    static const std::vector<float> noise = [] {
      std::mt19937 random(1);
      std::uniform_real_distribution<float> value(-1, 1);
      std::vector<float> v(kPeriod);
      std::generate(v.begin(), v.end(), [&] { return value(random); });
      return v;
    }();
    const auto n = static_cast<size_t>(t.numel());
    std::vector<E> period(std::min(n, kPeriod));
    for (size_t i = 0; i < period.size(); ++i) {
      period[i] = E(scale < 0 ? scale * (noise[i] + 1) / 2 : scale * noise[i]);
    }
    for (size_t i = 0; i < n; i += kPeriod) {
      op_.upload(t.as<E>() + i, period.data(), std::min(kPeriod, n - i) * sizeof(E));
    }
    op_.synchronize();
  });
  return t;
}

Tensor Harness::copied(const void* values, DType type, size_t n) {
  const Tensor t = zeros(type, {static_cast<int64_t>(n)});
  op_.upload(t.data, values, t.bytes());
  op_.synchronize();
  return t;
}

std::vector<Tensor> Harness::rotated(const std::string& name, DType type, const Shape& shape) {
  const size_t bytes = static_cast<size_t>(shape.numel()) * itemsize(type);
  const size_t copies = wanted(name) ? std::clamp<size_t>(kColdBytes / bytes, 1, 64) : 1;
  std::vector<Tensor> all{fresh(type, shape)};
  while (all.size() < copies) {
    all.push_back(zeros(type, shape));
    op_.copy(all.back().data, all.front().data, bytes);
  }
  return all;
}

void Harness::measure(const std::string& name, const std::string& at, const CallWork& work,
                      size_t copies, const std::function<void(size_t)>& call) {
  if (!wanted(name)) return;
  std::vector<double> times;
  if (cuda_) {
    // Recorded once, as a captured step is; a run ahead of the timed one keeps the device busy
    // while that is launched.
    const size_t calls = std::max<size_t>(copies, 32);
    const uint64_t key = ++key_ << 32;
    const auto run = [&] {
      op_.replay(key, [&] {
        for (size_t i = 0; i < calls; ++i) call(i % copies);
      });
    };
    for (int r = -3; r < kRepetitions; ++r) {
      run();
      const double s = op_.seconds(run) / static_cast<double>(calls);
      if (r >= 0) times.push_back(s);
    }
  } else {
    constexpr double kRun = 0.05;
    size_t i = 0;
    const auto run = [&](size_t calls) {
      return op_.seconds([&] {
        for (size_t c = 0; c < calls; ++c) call(i++ % copies);
      }) / static_cast<double>(calls);
    };
    (void)run(1);
    const auto calls = static_cast<size_t>(std::clamp(kRun / run(1), 1.0, 1000.0));
    for (int r = 0; r < kRepetitions; ++r) times.push_back(run(calls));
  }
  print(name, at, work, times);
}

void Harness::measure_posting(const std::string& name, const std::string& at, const CallWork& work,
                              const std::function<void()>& call,
                              const std::function<void()>& receive) {
  if (!wanted(name)) return;
  constexpr int kCalls = 3;  // the mailbox holds eight posts: those of two runs
  const uint64_t key = ++key_ << 32;
  const auto run = [&] {
    op_.replay(key, [&] {
      for (int i = 0; i < kCalls; ++i) call();
    });
  };
  std::vector<double> times;
  for (int r = -3; r < kRepetitions; ++r) {
    run();
    const double s = op_.seconds(run) / kCalls;
    for (int i = 0; i < 2 * kCalls; ++i) receive();
    if (r >= 0) times.push_back(s);
  }
  print(name, at, work, times);
}

void Harness::print(const std::string& name, const std::string& at, const CallWork& work,
                    const std::vector<double>& seconds) const {
  const double s = median(seconds);
  const double floor = std::max(work.bytes / memory_.copy, work.flops / product_);
  std::printf("%-28s %-22s %10.2f %6.1f%% %9.1f %9.2f %8.0f%%\n", name.c_str(), at.c_str(), s * 1e6,
              100 * relative_range(seconds), work.bytes / s / 1e9, work.flops / s / 1e12,
              floor / s * 100);
  std::fflush(stdout);
}

}  // namespace krait
