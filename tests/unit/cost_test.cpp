// The counts behind every share of the floor, against the tables of published shapes that were
// computed independently: parameters, bytes and floors of an H100 with 3.0 TB/s and 790 TFLOP/s.
#include "model/cost.h"

#include <gtest/gtest.h>

#include "checkpoint/checkpoint.h"
#include "kernels/ops.h"
#include "model/random_weights.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

constexpr double kBandwidth = 3.0e12;
constexpr double kProducts = 790e12;
constexpr WorkTypes kF32{DType::f32, DType::f32, DType::f32};
constexpr WorkTypes kBf16{DType::bf16, DType::bf16, DType::bf16};
constexpr WorkTypes kBf16F32State{DType::bf16, DType::f32, DType::f32};

/// The tables print a few digits: within 1%, or half of the last digit printed.
void expect_printed(double got, double printed, double digit) {
  EXPECT_NEAR(got, printed, std::max(0.01 * printed, digit / 2));
}

/// A row of the table of parameters and bytes per decoded token.
struct Published {
  const char* name;
  double parameters, matrices, head;  ///< millions
  double f32, bf16, int8, int4;       ///< GB of weights read by a step
  double state, moved, moved_bf16;    ///< MB a sequence: f32, f32 read and written, bf16 likewise
  double decode_us;                   ///< floor at batch 1, bf16 weights, f32 state
  double batched[4];                  ///< tok/s at 8, 64, 256, 1024; bf16 weights, f32 state
  double prefill;                     ///< tok/s of a long prompt, matrix products alone
};
const Published kPublished[] = {
    {"130m",
     129.1,
     89.7,
     38.6,
     0.517,
     0.260,
     0.132,
     0.070,
     2.8,
     5.6,
     2.8,
     89,
     {78732, 310369, 453243, 512187},
     4405864},
    {"370m",
     371.5,
     317.7,
     51.5,
     1.486,
     0.748,
     0.378,
     0.200,
     7.5,
     14.9,
     7.5,
     254,
     {27676, 112679, 167947, 191420},
     1243239},
    {"790m",
     793.2,
     712.5,
     77.2,
     3.173,
     1.593,
     0.804,
     0.421,
     11.2,
     22.4,
     11.2,
     539,
     {13539, 63413, 104758, 125160},
     554380},
    {"1.4b",
     1372.2,
     1264.6,
     103.0,
     5.489,
     2.754,
     1.386,
     0.724,
     14.9,
     29.9,
     14.9,
     928,
     {8020, 41147, 73818, 92099},
     312356},
    {"2.8b",
     2768.3,
     2631.9,
     128.7,
     11.073,
     5.552,
     2.791,
     1.454,
     24.9,
     49.8,
     24.9,
     1867,
     {4033, 21969, 41961, 54319},
     150080},
    {"falcon-mamba-7b",
     7272.7,
     6727.7,
     266.3,
     28.025,
     14.037,
     7.043,
     3.656,
     39.8,
     79.7,
     39.8,
     4706,
     {1635, 10033, 22301, 32120},
     58713},
    {"mamba2-2.7b",
     2702.6,
     2571.6,
     128.7,
     10.810,
     5.410,
     2.709,
     1.401,
     171.9,
     343.8,
     171.9,
     1918,
     {2941, 7004, 8221, 8594},
     147552},
    {"codestral-mamba-7b",
     7285.4,
     7012.9,
     134.2,
     28.605,
     14.311,
     7.163,
     3.702,
     276.3,
     552.6,
     276.3,
     4954,
     {1281, 3865, 4930, 5295},
     54977},
};

TEST(Cost, PublishedShapes) {
  for (const Published& p : kPublished) {
    SCOPED_TRACE(p.name);
    const ModelConfig c = published_config(p.name);
    const ModelCounts n = count_model(c);
    expect_printed(static_cast<double>(n.parameters()) / 1e6, p.parameters, 0.1);
    expect_printed(static_cast<double>(n.matrices) / 1e6, p.matrices, 0.1);
    expect_printed(static_cast<double>(n.head) / 1e6, p.head, 0.1);

    // A step without sequences reads the weights; each sequence adds its state, there and back.
    const double f32 = decode_work(c, kF32, 0).bytes;
    const double bf16 = decode_work(c, kBf16, 0).bytes;
    expect_printed(f32 / 1e9, p.f32, 0.001);
    expect_printed(bf16 / 1e9, p.bf16, 0.001);
    // Quantised matrices beside small tensors in f32: 8 bits, and 4 with an f16 scale for 128.
    const auto quantised = [&](double bits) {
      const double embedding_row = n.embedding > 0 ? static_cast<double>(c.d_model) : 0;
      const double matrices = static_cast<double>(n.matrices + n.head) + embedding_row;
      return matrices * bits / 8 + 4 * static_cast<double>(n.small);
    };
    expect_printed(quantised(8) / 1e9, p.int8, 0.001);
    expect_printed(quantised(4 + 16.0 / 128) / 1e9, p.int4, 0.001);
    expect_printed((decode_work(c, kF32, 1).bytes - f32) / 1e6, p.moved, 0.1);
    expect_printed((decode_work(c, kBf16, 1).bytes - bf16) / 1e6, p.moved_bf16, 0.1);
    expect_printed((prefill_work(c, kF32, 1, 1).bytes - f32) / 1e6, p.state, 0.1);
  }
}

TEST(Cost, PublishedFloors) {
  for (const Published& p : kPublished) {
    SCOPED_TRACE(p.name);
    const ModelConfig c = published_config(p.name);
    const auto floor = [](const Work& w) { return floor_seconds(w, kBandwidth, kProducts); };
    expect_printed(floor(decode_work(c, kBf16F32State, 1)) * 1e6, p.decode_us, 1);
    int64_t batch = 8;
    for (const double rate : p.batched) {
      const double b = static_cast<double>(batch);
      expect_printed(b / floor(decode_work(c, kBf16F32State, batch)), rate, 1);
      batch = batch == 8 ? 64 : batch * 4;
    }
    const int64_t n_tok = 1 << 20;
    expect_printed(static_cast<double>(n_tok) / floor(prefill_work(c, kBf16, 1, n_tok)), p.prefill,
                   1);
    // A short prompt is bound by reading the weights.
    EXPECT_NEAR(floor(prefill_work(c, kBf16, 1, 16)) * kBandwidth,
                prefill_work(c, kBf16, 1, 16).bytes, 1);
  }
}

TEST(Cost, AddsUp) {
  const ModelConfig c = published_config("130m");
  const Work one = prefill_work(c, kBf16, 1, 100);
  const Work four = prefill_work(c, kBf16, 4, 100);
  EXPECT_DOUBLE_EQ(four.products, 4 * one.products);
  EXPECT_DOUBLE_EQ(four.scan, 4 * one.scan);
  EXPECT_LT(four.bytes, 4 * one.bytes);  // the weights are shared
  Work sum = one;
  sum += four;
  EXPECT_DOUBLE_EQ(sum.bytes, one.bytes + four.bytes);
  EXPECT_DOUBLE_EQ(sum.flops(), one.flops() + four.flops());
  EXPECT_DOUBLE_EQ((3 * one).bytes, 3 * one.bytes);
  EXPECT_DOUBLE_EQ((3 * one).flops(), 3 * one.flops());
}

/// The counts are those of the tensors that a model loads; biases of the projections, which no
/// published model has, are left out.
TEST(Cost, AgreesWithLoadedModels) {
  for (const char* name : {"mamba1-hf", "mamba1-hf-odd", "mamba1-original-bin"}) {
    SCOPED_TRACE(name);
    const auto folder = data_dir() / "golden" / "models" / name;
    const auto checkpoint = open_checkpoint(folder);
    const auto op = make_cpu_ops(1, /*fast=*/false);
    const auto model =
        load_model(read_config(folder / "config.json"), *checkpoint, *op, DType::bf16);
    const ModelCounts n = count_model(model->config());
    const ModelConfig& c = model->config();
    const int64_t biases =
        std::string_view(name) == "mamba1-hf-odd" ? c.n_layer * (2 * c.d_inner + c.d_model) : 0;
    EXPECT_EQ(n.parameters() + biases, model->parameter_count());
    const int64_t matrices = n.matrices + n.head + n.embedding;
    EXPECT_EQ(static_cast<size_t>(2 * matrices + 4 * (n.small + biases)), model->weight_bytes());
  }
}

TEST(Cost, UnknownFamily) {
  ModelConfig c = published_config("130m");
  c.family = "hydra";
  EXPECT_TRUE(throws(ErrorKind::unsupported, "hydra", [&] { (void)count_model(c); }));
}

}  // namespace
}  // namespace krait::test
