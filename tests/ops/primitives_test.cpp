// The primitives of a device: all are measured, and lie where any GPU's must.
#include "kernels/primitives.h"

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <thread>

#include "kernels/ops.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

TEST(Primitives, NoDeviceIsAnError) {
  if (cuda_device_count() > 0) GTEST_SKIP() << "there is a device";
  EXPECT_TRUE(throws(ErrorKind::device, "", [] { (void)measure_primitives(0); }));
  EXPECT_TRUE(throws(ErrorKind::device, "", [] { (void)make_cuda_ops(0); }));
}

TEST(GpuPrimitives, AreMeasured) {
  std::map<std::string, double> of_unit;  // the smallest of each
  std::set<std::string> names;
  for (const Primitive& p : measure_primitives(0)) {
    EXPECT_TRUE(names.insert(p.name).second) << p.name;
    EXPECT_GT(p.value, 0.0) << p.name;
    const auto [at, added] = of_unit.emplace(p.unit, p.value);
    if (!added) at->second = std::min(at->second, p.value);
    // A barrier or a kernel takes between a tenth and some ten microseconds.
    if (p.unit == "us") {
      EXPECT_GT(p.value, 0.1) << p.name;
      EXPECT_LT(p.value, 50.0) << p.name;
    }
  }
  EXPECT_EQ(of_unit.size(), 3U);
  EXPECT_GT(of_unit["GB/s"], 20.0);
  EXPECT_GT(of_unit["T/s"], 0.05);
}

TEST(GpuPrimitives, ClockOfTheCores) {
  const std::unique_ptr<Ops> op = make_cuda_ops(0);
  op->start_core_clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double hz = op->mean_core_clock();
  EXPECT_GT(hz, 0.1e9);
  EXPECT_LT(hz, 5e9);
}

}  // namespace
}  // namespace krait::test
