// bench_ops: every verb on its own, at the published shapes. For each: microseconds, GB/s by the
// bytes it must move (each input read once, each output written once), TFLOP/s, and the share of
// the ceiling that binds it, where the ceilings are measured on the same device in the same run (a
// copy, a matrix product).
//
//   bench_ops [--device cpu|cuda[:N]] [--model 130m,2.8b] [--tokens 1,64,2048] [--verb NAME]
//   [--dtype bf16]
//
// One sequence per token up to 1024 tokens (a decode step), one sequence of that length above
// (prefill). Weights and state rotate over copies that don't fit the cache together; calls are
// recorded once (Ops::replay) so that launches cost what they cost in a captured step. Median of 9
// repetitions.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/ops.h"

namespace {

using namespace krait;

struct Shapes {
  std::string name;
  int64_t d_model;
  int64_t vocab = 50280;
  int64_t d_state = 16;
  int64_t d_conv = 4;
  [[nodiscard]] int64_t d_inner() const { return 2 * d_model; }
  [[nodiscard]] int64_t dt_rank() const { return d_model / 16; }
};

constexpr size_t kColdBytes = size_t{256} << 20;  // several times the largest L2 cache
constexpr int kRepetitions = 9;

class Bench {
 public:
  Bench(Ops& op, DType weights, std::string verb)
      : op_(op), W_(weights), T_(op.activation_dtype(weights)), verb_(std::move(verb)) {
    measure_ceilings();
  }

  void run(const Shapes& s, int64_t n_tok) {
    const bool prefill = n_tok > 1024;
    const int64_t n_seq = prefill ? 1 : n_tok;
    std::vector<int32_t> start(static_cast<size_t>(n_seq) + 1);
    std::vector<int32_t> slot(static_cast<size_t>(n_seq));
    for (size_t i = 0; i < start.size(); ++i)
      start[i] = static_cast<int32_t>(prefill ? i * n_tok : i);
    for (size_t i = 0; i < slot.size(); ++i) slot[i] = static_cast<int32_t>(i);
    const Batch batch{n_tok, n_seq, prefill ? n_tok : 1, ints(start), ints(slot)};

    const int64_t D = s.d_model;
    const int64_t E = s.d_inner();
    const int64_t N = s.d_state;
    const int64_t R = s.dt_rank();
    const auto w = static_cast<double>(itemsize(W_));
    const auto t = static_cast<double>(itemsize(T_));
    const auto n = static_cast<double>(n_tok);
    const auto d_model = static_cast<double>(D);
    const auto d_inner = static_cast<double>(E);
    const auto d_state = static_cast<double>(N);
    const auto carried = static_cast<double>(s.d_conv - 1);
    const auto vocab = static_cast<double>(s.vocab);

    const Tensor residual = fresh(DType::f32, {n_tok, D});
    const Tensor u = fresh(T_, {n_tok, D});
    const Tensor xz = fresh(T_, {n_tok, 2 * E});
    const Tensor x = fresh(T_, {n_tok, E});
    const Tensor dbc = fresh(T_, {n_tok, R + 2 * N});
    const Tensor dt = fresh(T_, {n_tok, E});
    const Tensor y = fresh(T_, {n_tok, E});
    const Tensor f32_vec = fresh(DType::f32, {E});

    const std::string at = s.name + " " + std::to_string(n_tok);
    measure("rms_norm", at, n * d_model * (4 + t), 0, 0,
            [&](int) { op_.rms_norm(u, residual, f32_vec, 1e-5F); });
    const auto linear = [&](const char* name, const Tensor& out, const Tensor& in, bool add) {
      const auto n_out = static_cast<double>(out.dim(1));
      const auto n_in = static_cast<double>(in.dim(1));
      const std::vector<Tensor> weights = rotated(W_, {out.dim(1), in.dim(1)});
      const auto out_bytes = static_cast<double>(itemsize(out.dtype)) * (add ? 2 : 1);
      measure(name, at, n_out * n_in * w + n * (n_in * t + n_out * out_bytes), 2 * n * n_out * n_in,
              weights.size(), [&](int i) {
                const Tensor& m = weights[static_cast<size_t>(i) % weights.size()];
                add ? op_.linear_add(out, in, m, {}) : op_.linear(out, in, m, {});
              });
    };
    linear("in_proj", xz, u, false);
    linear("x_proj", dbc, x, false);
    linear("dt_proj", dt, dbc.columns(0, R), false);
    linear("out_proj", residual, y, true);

    const std::vector<Tensor> conv = rotated(T_, {n_seq, s.d_conv - 1, E});
    const Tensor conv_w = fresh(DType::f32, {E, s.d_conv});
    const auto seqs = static_cast<double>(n_seq);
    measure("conv1d_silu", at, 2 * n * d_inner * t + 2 * seqs * carried * d_inner * t, 0,
            conv.size(), [&](int i) {
              op_.conv1d_silu(x, xz.columns(0, E), conv_w, f32_vec,
                              conv[static_cast<size_t>(i) % conv.size()], batch);
            });

    const Tensor A = fresh(DType::f32, {E, N}, -1.0F);
    const ScanInputs scan{
        x, dt, A, dbc.columns(R, N), dbc.columns(R + N, N), f32_vec, xz.columns(E, E), f32_vec};
    for (const DType state_type : {DType::f32, DType::bf16}) {
      const std::vector<Tensor> state = rotated(state_type, {n_seq, E, N});
      measure(state_type == DType::f32 ? "selective_scan" : "selective_scan/bf16-state", at,
              4 * n * d_inner * t +
                  2 * seqs * d_inner * d_state * static_cast<double>(itemsize(state_type)) +
                  4 * d_inner * d_state,
              0, state.size(), [&](int i) {
                op_.selective_scan(y, scan, state[static_cast<size_t>(i) % state.size()], batch);
              });
    }
    const int64_t rows = prefill ? 1 : n_tok;
    const Tensor logits = fresh(DType::f32, {rows, s.vocab});
    {
      const std::vector<Tensor> heads = rotated(W_, {s.vocab, D});
      const Tensor normed = u.rows(0, rows);
      measure("head", at, vocab * d_model * w + static_cast<double>(rows) * vocab * 4,
              2 * static_cast<double>(rows) * vocab * d_model, heads.size(), [&](int i) {
                op_.linear(logits, normed, heads[static_cast<size_t>(i) % heads.size()], {});
              });
    }
    sampling(at, logits, s.vocab, batch, rows);
    buffers_.clear();
  }

 private:
  void sampling(const std::string& at, const Tensor& logits, int64_t vocab, const Batch& batch,
                int64_t n) {
    SampleParams greedy;
    greedy.temperature = 0;
    SampleParams filtered;
    filtered.temperature = 0.8F;
    filtered.top_k = 40;
    filtered.top_p = 0.95F;
    filtered.min_p = 0.05F;
    const Tensor source = fresh(DType::f32, {n, vocab}, 8.0F);
    for (const auto& [name, params] :
         {std::pair{"sample/greedy", greedy}, {"sample/k40-p95-m05", filtered}}) {
      const std::vector<SampleParams> all(static_cast<size_t>(n), params);
      SampleState state;
      state.params = fresh(DType::u8, {n, static_cast<int64_t>(sizeof(SampleParams))});
      op_.upload(state.params.data, all.data(), all.size() * sizeof(SampleParams));
      state.position = zeros(DType::i64, {n});
      state.next_id = zeros(DType::i32, {n});
      state.seen = zeros(DType::i32, {n, 64});
      state.seen_len = zeros(DType::i64, {n});
      state.counts = zeros(DType::i32, {n, vocab});
      std::vector<int32_t> tokens(static_cast<size_t>(n));
      // The sampler scribbles on its logits, so each call starts with a copy; posts are read back
      // at once.
      measure(
          name, at, 3.0 * static_cast<double>(n * vocab) * 4, 0, 1,
          [&](int) {
            op_.copy(logits.data, source.data, logits.bytes());
            op_.sample(logits, vocab, state, batch.slot, n);
          },
          [&] { op_.receive(tokens); });
    }
  }

  Tensor zeros(DType type, const Shape& shape) {
    buffers_.push_back(op_.allocate(static_cast<size_t>(shape.numel()) * itemsize(type), "bench"));
    const Tensor t(buffers_.back().data(), type, shape);
    op_.zero(t.data, t.bytes());
    return t;
  }

  /// Random values, uniform in [-scale, scale] (or [scale, 0] if negative).
  Tensor fresh(DType type, const Shape& shape, float scale = 0.1F) {
    const Tensor t = zeros(type, shape);
    if (!is_float16_or_32(type)) return t;
    static const std::vector<float> noise = [] {
      std::mt19937 random(1);
      std::uniform_real_distribution<float> value(-1, 1);
      std::vector<float> v(1 << 20);
      std::generate(v.begin(), v.end(), [&] { return value(random); });
      return v;
    }();
    visit_dtype(type, "bench", [&](auto zero) {
      using E = decltype(zero);
      std::vector<E> host(static_cast<size_t>(t.numel()));
      for (size_t i = 0; i < host.size(); ++i) {
        const float v = noise[i % noise.size()];
        host[i] = E(scale < 0 ? scale * (v + 1) / 2 : scale * v);
      }
      op_.upload(t.data, host.data(), t.bytes());
      op_.synchronize();
    });
    return t;
  }

  std::vector<Tensor> rotated(DType type, const Shape& shape) {
    const size_t bytes = static_cast<size_t>(shape.numel()) * itemsize(type);
    const bool cuda = op_.backend() == "cuda";
    const size_t copies = cuda ? std::clamp<size_t>(kColdBytes / bytes, 1, 64) : 1;
    std::vector<Tensor> all{fresh(type, shape)};
    while (all.size() < copies) {
      all.push_back(zeros(type, shape));
      op_.copy(all.back().data, all.front().data, bytes);
    }
    return all;
  }

  Tensor ints(const std::vector<int32_t>& v) {
    const Tensor t = zeros(DType::i32, {static_cast<int64_t>(v.size())});
    op_.upload(t.data, v.data(), t.bytes());
    op_.synchronize();
    return t;
  }

  /// Seconds per call of f(i): median over repetitions of a recorded run of calls.
  double seconds(size_t copies, const std::function<void(int)>& f,
                 const std::function<void()>& after) {
    const int calls =
        after ? 1 : std::max<int>(static_cast<int>(copies), op_.backend() == "cuda" ? 16 : 1);
    const std::function<void()> body = [&] {
      for (int i = 0; i < calls; ++i) f(i);
    };
    const uint64_t key = ++key_ << 32;
    std::vector<double> times;
    for (int r = 0; r < kRepetitions + 3; ++r) {
      op_.synchronize();
      const auto begin = std::chrono::steady_clock::now();
      op_.replay(key, body);
      if (after) after();
      op_.synchronize();
      const std::chrono::duration<double> d = std::chrono::steady_clock::now() - begin;
      if (r >= 3) times.push_back(d.count() / calls);
    }
    std::ranges::sort(times);
    return times[times.size() / 2];
  }

  void measure(const std::string& name, const std::string& at, double bytes, double flops,
               size_t copies, const std::function<void(int)>& f,
               const std::function<void()>& after = {}) {
    if (!verb_.empty() && name.find(verb_) == std::string::npos) return;
    const double s = seconds(copies, f, after);
    const double floor = std::max(bytes / copy_rate_, flops / product_rate_);
    std::printf("%-28s %-12s %9.2f us %8.1f GB/s %7.1f TFLOP/s %4.0f%%\n", name.c_str(), at.c_str(),
                s * 1e6, bytes / s / 1e9, flops / s / 1e12, floor / s * 100);
    std::fflush(stdout);
  }

  void measure_ceilings() {
    const bool cuda = op_.backend() == "cuda";
    const int64_t bytes = cuda ? int64_t{1} << 30 : int64_t{1} << 28;
    const Tensor a = fresh(DType::f32, {bytes / 4});
    const Tensor b = zeros(DType::f32, {bytes / 4});
    copy_rate_ = 2.0 * static_cast<double>(bytes) /
                 seconds(1, [&](int) { op_.copy(b.data, a.data, a.bytes()); }, {});
    const int64_t m = cuda ? 8192 : 512;
    const Tensor in = fresh(T_, {m, m});
    const Tensor W = fresh(W_, {m, m});
    const Tensor out = fresh(T_, {m, m});
    const auto size = static_cast<double>(m);
    product_rate_ =
        2 * size * size * size / seconds(1, [&](int) { op_.linear(out, in, W, {}); }, {});
    std::printf("%s: copy %.0f GB/s, %s product of %ld^3 %.2f TFLOP/s\n", op_.info().name.c_str(),
                copy_rate_ / 1e9, std::string(dtype_name(W_)).c_str(), static_cast<long>(m),
                product_rate_ / 1e12);
    buffers_.clear();
  }

  Ops& op_;
  DType W_;
  DType T_;
  std::string verb_;
  std::vector<Buffer> buffers_;
  uint64_t key_ = 0;
  double copy_rate_ = 1;
  double product_rate_ = 1;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Times every verb of a backend at the published shapes.");
  std::string device = "cuda";
  std::string models = "130m,2.8b";
  std::string verb;
  std::string dtype = "bf16";
  std::vector<int64_t> tokens{1, 64, 2048};
  app.add_option("--device", device, "cpu or cuda[:N]")->capture_default_str();
  app.add_option("--model", models, "130m, 370m, 790m, 1.4b, 2.8b")->capture_default_str();
  app.add_option("--tokens", tokens, "rows; over 1024 one sequence, else one token each")
      ->delimiter(',');
  app.add_option("--verb", verb, "only verbs whose name contains this");
  app.add_option("--dtype", dtype, "f32, bf16, f16")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    const auto op = device == "cpu"
                        ? make_cpu_ops(0)
                        : make_cuda_ops(device.size() > 5 ? std::stoi(device.substr(5)) : 0);
    Bench bench(*op, dtype == "f32" ? DType::f32 : dtype == "f16" ? DType::f16 : DType::bf16, verb);
    std::istringstream list(models);
    for (std::string name; std::getline(list, name, ',');) {
      const std::vector<Shapes> known{
          {"130m", 768}, {"370m", 1024}, {"790m", 1536}, {"1.4b", 2048}, {"2.8b", 2560}};
      const auto at = std::ranges::find(known, name, &Shapes::name);
      if (at == known.end()) throw Error(ErrorKind::usage, "no published shape is called " + name);
      for (const int64_t n : tokens) bench.run(*at, n);
    }
  } catch (const Error& e) {
    std::fprintf(stderr, "bench_ops: %s\n", e.what());
    return exit_code(e.kind());
  }
}
