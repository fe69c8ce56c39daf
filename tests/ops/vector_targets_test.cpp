// The fast kernels on each instruction set that this processor has, not only the best: the others
// run on somebody else's machine.
#include "kernels/cpu/targets.h"
// targets.h chooses the instruction sets, so it comes first.
#include <hwy/highway.h>
#include <hwy/targets.h>

#include "kernels/cpu/fast.h"
#include "ops/ops_test_util.h"

namespace krait::test {
namespace {

struct Outputs {
  Values norm, linear, conv, conv_state, y, ssm_state;
};

Outputs run_all(Backend b, DType weights, int64_t d_inner, int64_t d_state, int32_t len) {
  Device d(b);
  Random r(51);
  const auto dense = [&](const Shape& shape, float low = -1, float high = 1) {
    return d.tensor(r.uniform(shape.numel(), low, high), shape);
  };
  const Shape wide{len, d_inner};
  const Batch batch = d.batch({len}, {0});
  const Tensor x = dense(wide);
  const Tensor norm = d.filled(kNan, wide);
  d.op.rms_norm(norm, x, dense({d_inner}), 1e-5F);
  const Tensor out = d.filled(kNan, {len, 23});
  d.op.linear(out, x,
              d.tensor(rounded(r.uniform(23 * d_inner, -1, 1), weights), {23, d_inner}, weights),
              dense({23}));
  const Tensor conv = d.filled(kNan, wide);
  const Tensor conv_state = dense({1, 3, d_inner});
  d.op.conv1d_silu(conv, x, dense({d_inner, 4}, -30, 30), dense({d_inner}), conv_state, batch);
  ScanInputs in;
  in.x = conv;
  in.dt = dense(wide, -30, 25);
  in.A = dense({d_inner, d_state}, -20, 0);
  in.B = dense({len, d_state});
  in.C = dense({len, d_state});
  in.D = dense({d_inner});
  in.z = dense(wide, -100, 100);
  in.dt_bias = dense({d_inner});
  const Tensor y = d.filled(kNan, wide);
  const Tensor ssm_state = dense({1, d_inner, d_state});
  d.op.selective_scan(y, in, ssm_state, batch);
  return {d.read(norm),       d.read(out), d.read(conv),
          d.read(conv_state), d.read(y),   d.read(ssm_state)};
}

TEST(VectorTargetsCpu, AllEqualTheDefinition) {
  int tested = 0;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    SCOPED_TRACE(cpu::vector_target());
    for (const DType weights : {DType::f32, DType::bf16, DType::f16}) {
      for (const auto& [d_inner, d_state, len] : {std::tuple{37, 16, 7}, std::tuple{16, 5, 1},
                                                  std::tuple{130, 33, 13}, std::tuple{3, 64, 9}}) {
        const Outputs got = run_all(Backend::fast, weights, d_inner, d_state, len);
        const Outputs want = run_all(Backend::plain, weights, d_inner, d_state, len);
        EXPECT_TRUE(near_std(got.norm, want.norm, 1e-5));
        EXPECT_TRUE(near_std(got.linear, want.linear, 1e-5));
        EXPECT_TRUE(near_std(got.conv, want.conv, 1e-5));
        EXPECT_TRUE(same_bits(got.conv_state, want.conv_state));
        EXPECT_TRUE(near_std(got.y, want.y, 1e-5));
        EXPECT_TRUE(near_std(got.ssm_state, want.ssm_state, 1e-5));
      }
    }
    ++tested;
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  EXPECT_GE(tested, 1);
  std::cout << tested << " instruction sets, of which " << cpu::vector_target()
            << " is the best here\n";
}

TEST(VectorTargetsCpu, NanIsNotHidden) {
  Device d(Backend::fast);
  const Batch batch = d.batch({1}, {0});
  const Tensor one = d.filled(1, {1, 1});
  const Tensor ones = d.filled(1, {1});
  const Tensor bad = d.filled(kNan, {1, 1});
  const Tensor conv = d.filled(0, {1, 1});
  d.op.conv1d_silu(conv, bad, d.filled(1, {1, 2}), {}, d.filled(0, {1, 1, 1}), batch);
  EXPECT_TRUE(std::isnan(d.read(conv)[0]));
  for (int input = 0; input < 5; ++input) {
    const auto pick = [&](int i) { return i == input ? bad : one; };
    const ScanInputs in{pick(0), pick(1), d.filled(-1, {1, 1}), pick(2), pick(3), ones,
                        pick(4), ones};
    const Tensor y = d.filled(0, {1, 1});
    d.op.selective_scan(y, in, d.filled(0, {1, 1, 1}), batch);
    EXPECT_TRUE(std::isnan(d.read(y)[0])) << "input " << input;
  }
}

}  // namespace
}  // namespace krait::test
