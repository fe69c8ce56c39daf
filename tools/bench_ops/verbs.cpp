#include "tools/bench_ops/verbs.h"

#include <array>
#include <functional>
#include <numeric>

namespace krait {

namespace {

constexpr int64_t kLongestStep = 1024;

/// The batch and the sizes that all cases share; counts as doubles, for the work.
struct Step {
  Step(Harness& h, const std::string& name, const ModelConfig& config, int64_t n)
      : c(config), n_tok(n), n_seq(n > kLongestStep ? 1 : n) {
    std::vector<int32_t> start(static_cast<size_t>(n_seq) + 1);
    std::vector<int32_t> slot(static_cast<size_t>(n_seq));
    std::iota(start.begin(), start.end(), 0);
    std::iota(slot.begin(), slot.end(), 0);
    if (n_seq != n_tok) start.back() = static_cast<int32_t>(n_tok);
    std::vector<int64_t> position(static_cast<size_t>(n_seq));
    std::iota(position.begin(), position.end(), 1000);
    batch = {n_tok,         n_seq,        n_seq == n_tok ? 1 : n_tok,
             h.ints(start), h.ints(slot), h.longs(position)};
    at = name + " " + std::to_string(n_tok);
    w = static_cast<double>(itemsize(h.W()));
    t = static_cast<double>(itemsize(h.T()));
    rows = static_cast<double>(n_tok);
    seqs = static_cast<double>(n_seq);
    D = static_cast<double>(c.d_model);
    E = static_cast<double>(c.d_inner);
    V = static_cast<double>(c.vocab_rows);
    const auto carried = static_cast<double>(c.d_conv - 1);
    state_rows = carried + std::min(rows / seqs, carried);
  }

  const ModelConfig& c;
  int64_t n_tok;
  int64_t n_seq;
  Batch batch;
  std::string at;  ///< "2.8b 64"
  double w, t;     ///< bytes of an element of a matrix and of an activation
  double rows, seqs, D, E, V;
  double state_rows;  ///< of its convolution's state that a sequence reads and writes
};

/// in and out may be views of the tensors that the case before wrote: those lie in the caches, as
/// they do in a step.
void bench_linear(Harness& h, const Step& s, const std::string& name, const Tensor& out,
                  const Tensor& in, bool add) {
  if (!h.wanted(name)) return;
  const std::vector<Tensor> weights = h.rotated(name, h.W(), {out.dim(1), in.dim(1)});
  const auto n = static_cast<double>(out.dim(0));
  const auto n_out = static_cast<double>(out.dim(1));
  const auto n_in = static_cast<double>(in.dim(1));
  const auto out_bytes = static_cast<double>(itemsize(out.dtype)) * (add ? 2 : 1);
  const CallWork work{n_out * n_in * s.w + n * (n_in * s.t + n_out * out_bytes),
                      2 * n * n_out * n_in};
  h.measure(name, s.at, work, weights.size(), [&](size_t i) {
    add ? h.op().linear_add(out, in, weights[i], {}) : h.op().linear(out, in, weights[i], {});
  });
}

/// The causal convolution over `channels` columns of `in`, beginning at `first`.
void bench_conv(Harness& h, const Step& s, const Tensor& out, const Tensor& in, int64_t first,
                int64_t channels) {
  const std::string name = "conv1d_silu";
  if (!h.wanted(name)) return;
  const int64_t carried = s.c.d_conv - 1;
  const std::vector<Tensor> state = h.rotated(name, h.T(), {s.n_seq, carried, channels});
  const Tensor weight = h.fresh(DType::f32, {channels, s.c.d_conv});
  const Tensor bias = h.fresh(DType::f32, {channels});
  const double columns = static_cast<double>(channels);
  const double bytes = (2 * s.rows + s.seqs * s.state_rows) * columns * s.t;
  h.measure(name, s.at, {bytes}, state.size(), [&](size_t i) {
    h.op().conv1d_silu(out, in.columns(first, channels), weight, bias, state[i], s.batch);
  });
}

/// A recurrence, with its state in f32 and in bf16. Its flops run on other units than the products
/// that the ceiling is of, so they don't count. `bytes`: of all but the state.
void bench_scan(Harness& h, const Step& s, const std::string& verb, const Shape& state_shape,
                double bytes, const std::function<void(const Tensor& state)>& scan) {
  for (const DType type : {DType::f32, DType::bf16}) {
    const std::string name = verb + "/" + std::string(dtype_name(type)) + "-state";
    if (!h.wanted(name)) continue;
    const std::vector<Tensor> state = h.rotated(name, type, state_shape);
    const double moved = 2 * static_cast<double>(state.front().bytes());
    h.measure(name, s.at, {bytes + moved}, state.size(), [&](size_t i) { scan(state[i]); });
  }
}

void bench_mamba2(Harness& h, const Step& s) {
  Ops& op = h.op();
  const ModelConfig& c = s.c;
  const int64_t D = c.d_model;
  const int64_t E = c.d_inner;
  const int64_t H = c.n_head;
  const int64_t GN = c.n_group * c.d_state;
  const int64_t xbc_width = E + 2 * GN;
  const Tensor residual = h.fresh(DType::f32, {s.n_tok, D});
  const Tensor u = h.fresh(h.T(), {s.n_tok, D});
  const Tensor zxbcdt = h.fresh(h.T(), {s.n_tok, E + xbc_width + H});
  const Tensor xbc = h.fresh(h.T(), {s.n_tok, xbc_width});
  const Tensor y = h.fresh(h.T(), {s.n_tok, E});
  const Tensor norm = h.fresh(DType::f32, {std::max(D, E)});
  const auto first = [&](int64_t n) { return Tensor(norm.data, DType::f32, {n}); };

  h.measure("rms_norm", s.at, {s.rows * s.D * (4 + s.t)}, 1,
            [&](size_t) { op.rms_norm(u, residual, first(D), 1e-5F); });
  bench_linear(h, s, "linear/in_proj", zxbcdt, u, false);
  bench_conv(h, s, xbc, zxbcdt, E, xbc_width);
  const Tensor A = h.fresh(DType::f32, {H}, -1.0F);
  const SsdInputs scan{xbc.columns(0, E),
                       zxbcdt.columns(E + xbc_width, H),
                       A,
                       xbc.columns(E, GN),
                       xbc.columns(E + GN, GN),
                       first(H),
                       first(H),
                       c.n_group,
                       c.dt_min,
                       c.dt_max};
  const auto columns = static_cast<double>(2 * E + 2 * GN + H);  // x, y; B, C; dt
  bench_scan(h, s, "ssd_scan", {s.n_seq, H, c.head_dim, c.d_state}, s.rows * columns * s.t,
             [&](const Tensor& state) { op.ssd_scan(y, scan, state, s.batch); });
  h.measure("gated_rms_norm", s.at, {3 * s.rows * s.E * s.t}, 1, [&](size_t) {
    op.gated_rms_norm(y, y, zxbcdt.columns(0, E), first(E), c.n_group, 1e-5F);
  });
  const SsdMixer mixer{zxbcdt.columns(0, E),
                       zxbcdt.columns(E, xbc_width),
                       zxbcdt.columns(E + xbc_width, H),
                       h.fresh(DType::f32, {xbc_width, c.d_conv}),
                       h.fresh(DType::f32, {xbc_width}),
                       A,
                       first(H),
                       first(H),
                       first(E),
                       c.n_group,
                       c.dt_min,
                       c.dt_max,
                       1e-5F};
  const Tensor inputs = h.fresh(h.T(), {s.n_seq, c.d_conv - 1, xbc_width});
  const auto widths = static_cast<double>(2 * E + xbc_width + H);  // z, y; x, B, C; dt
  bench_scan(h, s, "ssd_mixer", {s.n_seq, H, c.head_dim, c.d_state},
             s.rows * widths * s.t + s.seqs * s.state_rows * static_cast<double>(xbc_width) * s.t,
             [&](const Tensor& state) { op.ssd_mixer(y, xbc, mixer, inputs, state, s.batch); });
  bench_linear(h, s, "linear_add/out_proj", residual, y, true);
}

void bench_mamba1(Harness& h, const Step& s) {
  Ops& op = h.op();
  const ModelConfig& c = s.c;
  const int64_t D = c.d_model;
  const int64_t E = c.d_inner;
  const int64_t N = c.d_state;
  const int64_t R = c.dt_rank;
  const Tensor residual = h.fresh(DType::f32, {s.n_tok, D});
  const Tensor u = h.fresh(h.T(), {s.n_tok, D});
  const Tensor xz = h.fresh(h.T(), {s.n_tok, 2 * E});
  const Tensor x = h.fresh(h.T(), {s.n_tok, E});
  const Tensor dbc = h.fresh(h.T(), {s.n_tok, R + 2 * N});
  const Tensor dt = h.fresh(h.T(), {s.n_tok, E});
  const Tensor y = h.fresh(h.T(), {s.n_tok, E});
  const Tensor vector = h.fresh(DType::f32, {std::max(D, E)});
  const auto first = [&](int64_t n) { return Tensor(vector.data, DType::f32, {n}); };

  h.measure("rms_norm", s.at, {s.rows * s.D * (4 + s.t)}, 1,
            [&](size_t) { op.rms_norm(u, residual, first(D), 1e-5F); });
  bench_linear(h, s, "linear/in_proj", xz, u, false);
  bench_conv(h, s, x, xz, 0, E);
  bench_linear(h, s, "linear/x_proj", dbc, x, false);
  const std::array<int64_t, 3> parts{R, N, N};
  h.measure("rms_norm_parts", s.at, {2 * s.rows * static_cast<double>(R + 2 * N) * s.t}, 1,
            [&](size_t) { op.rms_norm_parts(dbc, parts, 1e-6F); });
  bench_linear(h, s, "linear/dt_proj", dt, dbc.columns(0, R), false);

  const Tensor A = h.fresh(DType::f32, {E, N}, -1.0F);
  const ScanInputs scan{
      x, dt, A, dbc.columns(R, N), dbc.columns(R + N, N), first(E), xz.columns(E, E), first(E)};
  bench_scan(h, s, "selective_scan", {s.n_seq, E, N},
             4 * s.rows * s.E * s.t + 4 * s.E * static_cast<double>(N),
             [&](const Tensor& state) { op.selective_scan(y, scan, state, s.batch); });
  bench_linear(h, s, "linear_add/out_proj", residual, y, true);
}

void bench_ends(Harness& h, const Step& s) {
  Ops& op = h.op();
  const ModelConfig& c = s.c;
  const int64_t D = c.d_model;
  const Tensor residual = h.fresh(DType::f32, {s.n_tok, D});
  const Tensor normed = h.fresh(h.T(), {s.n_seq, D});
  const Tensor table = h.fresh(h.W(), {c.vocab_rows, D});
  std::vector<int32_t> spread(static_cast<size_t>(s.n_tok));
  for (size_t i = 0; i < spread.size(); ++i) {
    spread[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(c.vocab_size));
  }
  const Tensor ids = h.ints(spread);
  h.measure("embed", s.at, {s.rows * s.D * (s.w + 4)}, 1,
            [&](size_t) { op.embed(residual, ids, table); });

  const Tensor next = h.zeros(DType::i32, {s.n_seq, 1});
  const Tensor gathered = h.zeros(DType::i32, {s.n_seq, 1});
  h.measure("gather_rows", s.at, {3 * 4 * s.seqs}, 1,
            [&](size_t) { op.gather_rows(gathered, next, s.batch.slot); });

  const Tensor logits = h.fresh(DType::f32, {s.n_seq, c.vocab_rows});
  bench_linear(h, s, "linear/head", logits, normed, false);

  const Tensor logprob = h.zeros(DType::f32, {s.n_seq});
  const Tensor best = h.zeros(DType::i32, {s.n_seq});
  const Tensor target = h.zeros(DType::i32, {s.n_seq});
  h.measure("log_prob", s.at, {4 * s.seqs * s.V}, 1,
            [&](size_t) { op.log_prob(logprob, best, logits, c.vocab_size, target); });

  SampleParams greedy;
  greedy.temperature = 0;
  SampleParams filtered;
  filtered.temperature = 0.8F;
  filtered.top_k = 40;
  filtered.top_p = 0.95F;
  filtered.min_p = 0.05F;
  SampleParams penalised = filtered;
  penalised.repeat_penalty = 1.1F;
  // The sampler scribbles on its logits, so each call starts with a copy, which the work counts.
  const Tensor source = h.fresh(DType::f32, {s.n_seq, c.vocab_rows}, 8.0F);
  for (const auto& [name, params] : {std::pair{"sample/greedy", greedy},
                                     {"sample/k40-p95-m05", filtered},
                                     {"sample/penalties", penalised}}) {
    if (!h.wanted(name)) continue;
    const std::vector<SampleParams> all(static_cast<size_t>(s.n_seq), params);
    SampleState state;
    state.params = h.zeros(DType::u8, {s.n_seq, static_cast<int64_t>(sizeof(SampleParams))});
    op.upload(state.params.data, all.data(), all.size() * sizeof(SampleParams));
    op.synchronize();
    state.position = h.zeros(DType::i64, {s.n_seq});
    state.next_id = h.zeros(DType::i32, {s.n_seq});
    state.seen = h.zeros(DType::i32, {s.n_seq, 64});
    state.seen_len = h.zeros(DType::i64, {s.n_seq});
    state.counts = h.zeros(DType::i32, {s.n_seq, c.vocab_size});
    std::vector<int32_t> tokens(static_cast<size_t>(s.n_seq));
    h.measure_posting(
        name, s.at, {3 * s.seqs * s.V * 4},
        [&] {
          op.copy(logits.data, source.data, logits.bytes());
          op.sample(logits, c.vocab_size, state, s.batch.slot, s.n_seq);
        },
        [&] { op.receive(tokens); });
  }
}

/// Moving state about: what opening, copying and forgetting sequences costs.
void bench_memory(Harness& h, const Step& s) {
  Ops& op = h.op();
  const std::string name = "copy_rows/state";
  const std::string zeroing = "zero_rows/state";
  if (!h.wanted(name) && !h.wanted(zeroing)) return;
  const int64_t row = s.c.d_inner * s.c.d_state;  // of a layer, in either family
  const Tensor from = h.fresh(DType::f32, {s.c.n_layer, 2 * row});
  const size_t pitch = static_cast<size_t>(2 * row) * sizeof(float);
  const size_t width = pitch / 2;
  const auto n = static_cast<size_t>(s.c.n_layer);
  const double bytes = static_cast<double>(width) * static_cast<double>(n);
  auto* first = static_cast<std::byte*>(from.data);
  const std::string at = s.at.substr(0, s.at.find(' ')) + ", a sequence";
  h.measure(name, at, {2 * bytes}, 1,
            [&](size_t) { op.copy_rows(first + width, first, pitch, width, n); });
  h.measure(zeroing, at, {bytes}, 1, [&](size_t) { op.zero_rows(first, pitch, width, n); });
}

}  // namespace

void bench_verbs(Harness& h, const std::string& name, const ModelConfig& config, int64_t n_tok) {
  const Step step(h, name, config, n_tok);
  config.family == "mamba2" ? bench_mamba2(h, step) : bench_mamba1(h, step);
  bench_ends(h, step);
  if (n_tok == 1) bench_memory(h, step);
  h.drop();
}

}  // namespace krait
