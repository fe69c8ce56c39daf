#include "kernels/cpu/plain.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/cpu/verb_checks.h"

namespace krait {

namespace {

/// Element i of row r of an f32 matrix or view.
float& at(const Tensor& t, int64_t r, int64_t i) { return t.as<float>()[r * t.row_stride + i]; }

float silu(float v) { return v / (1.0F + std::exp(-v)); }

float softplus(float v) { return v > 20.0F ? v : std::log1p(std::exp(v)); }

/// acc[t, o] (+)= sum_i in[t, i] * W[o, i] (+ bias[o])
void multiply(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias, bool add) {
  visit_dtype(W.dtype, "linear: W", [&](auto element) {
    const auto* weight = W.as<decltype(element)>();
    for (int64_t t = 0; t < in.dim(0); ++t) {
      for (int64_t o = 0; o < W.dim(0); ++o) {
        float sum = 0;
        for (int64_t i = 0; i < W.dim(1); ++i) {
          sum += at(in, t, i) * static_cast<float>(weight[o * W.row_stride + i]);
        }
        if (bias) sum += bias.as<float>()[o];
        at(out, t, o) = add ? at(out, t, o) + sum : sum;
      }
    }
  });
}

}  // namespace

void PlainOps::embed(const Tensor& residual, const Tensor& ids, const Tensor& table) {
  cpu::check_embed(residual, ids, table);
  visit_dtype(table.dtype, "embed: table", [&](auto element) {
    for (int64_t t = 0; t < residual.dim(0); ++t) {
      const auto* row = table.as<decltype(element)>() + ids.as<int32_t>()[t] * table.row_stride;
      for (int64_t i = 0; i < residual.dim(1); ++i) at(residual, t, i) = static_cast<float>(row[i]);
    }
  });
}

void PlainOps::gather_rows(const Tensor& out, const Tensor& src, const Tensor& index) {
  cpu::check_gather_rows(out, src, index);
  for (int64_t i = 0; i < out.dim(0); ++i) {
    const Tensor to = out.rows(i, 1);
    const int32_t row = index.as<int32_t>()[i];
    if (row < 0) {
      std::memset(to.data, 0, to.bytes());
    } else {
      std::memcpy(to.data, src.rows(row, 1).data, to.bytes());
    }
  }
}

void PlainOps::rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps) {
  cpu::check_rms_norm(out, x, weight);
  const int64_t d = x.dim(1);
  for (int64_t t = 0; t < x.dim(0); ++t) {
    float squares = 0;
    for (int64_t i = 0; i < d; ++i) squares += at(x, t, i) * at(x, t, i);
    const float scale = 1.0F / std::sqrt(squares / static_cast<float>(d) + eps);
    for (int64_t i = 0; i < d; ++i) at(out, t, i) = at(x, t, i) * scale * weight.as<float>()[i];
  }
}

void PlainOps::rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps) {
  cpu::check_rms_norm_parts(x, widths);
  for (int64_t t = 0; t < x.dim(0); ++t) {
    int64_t begin = 0;
    for (const int64_t width : widths) {
      float squares = 0;
      for (int64_t i = begin; i < begin + width; ++i) squares += at(x, t, i) * at(x, t, i);
      const float scale = 1.0F / std::sqrt(squares / static_cast<float>(width) + eps);
      for (int64_t i = begin; i < begin + width; ++i) at(x, t, i) *= scale;
      begin += width;
    }
  }
}

void PlainOps::linear(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias) {
  cpu::check_linear("linear", out, in, W, bias);
  multiply(out, in, W, bias, false);
}

void PlainOps::linear_add(const Tensor& acc, const Tensor& in, const Tensor& W,
                          const Tensor& bias) {
  cpu::check_linear("linear_add", acc, in, W, bias);
  multiply(acc, in, W, bias, true);
}

void PlainOps::conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight,
                           const Tensor& bias, const Tensor& conv_state, const Batch& batch) {
  cpu::check_conv1d_silu(out, u, weight, bias, conv_state, batch);
  const int64_t d_inner = weight.dim(0);
  const int64_t d_conv = weight.dim(1);
  for (int64_t s = 0; s < batch.n_seq; ++s) {
    const int32_t slot = batch.slot.as<int32_t>()[s];
    if (slot < 0) continue;
    const int64_t begin = batch.seq_start.as<int32_t>()[s];
    const int64_t len = batch.seq_start.as<int32_t>()[s + 1] - begin;
    const int64_t position = batch.position.as<int64_t>()[s];
    float* state = conv_state.as<float>() + slot * (d_conv - 1) * d_inner;

    // Where the state has input t of the sequence: t = -1 is the newest before this step.
    const auto kept = [&](int64_t t) {
      return state + (position + t + d_conv - 1) % (d_conv - 1) * d_inner;
    };
    const auto input = [&](int64_t t, int64_t e) {
      return t >= 0 ? at(u, begin + t, e) : kept(t)[e];
    };
    for (int64_t t = 0; t < len; ++t) {
      for (int64_t e = 0; e < d_inner; ++e) {
        float sum = bias ? bias.as<float>()[e] : 0.0F;
        for (int64_t j = 0; j < d_conv; ++j) {
          sum += at(weight, e, j) * input(t - (d_conv - 1) + j, e);
        }
        at(out, begin + t, e) = silu(sum);
      }
    }
    for (int64_t t = std::max<int64_t>(len - (d_conv - 1), 0); t < len; ++t) {
      for (int64_t e = 0; e < d_inner; ++e) kept(t)[e] = input(t, e);
    }
  }
}

void PlainOps::selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                              const Batch& batch) {
  cpu::check_selective_scan(y, in, ssm_state, batch);
  const int64_t d_inner = in.A.dim(0);
  const int64_t d_state = in.A.dim(1);
  std::vector<float> h(static_cast<size_t>(d_state));
  visit_dtype(ssm_state.dtype, "selective_scan: ssm_state", [&](auto element) {
    using State = decltype(element);
    for (int64_t s = 0; s < batch.n_seq; ++s) {
      const int32_t slot = batch.slot.as<int32_t>()[s];
      if (slot < 0) continue;
      const int64_t begin = batch.seq_start.as<int32_t>()[s];
      const int64_t end = batch.seq_start.as<int32_t>()[s + 1];
      for (int64_t e = 0; e < d_inner; ++e) {
        State* state = ssm_state.as<State>() + (slot * d_inner + e) * d_state;
        for (int64_t n = 0; n < d_state; ++n) {
          h[static_cast<size_t>(n)] = static_cast<float>(state[n]);
        }
        for (int64_t t = begin; t < end; ++t) {
          const float x = at(in.x, t, e);
          const float z = at(in.z, t, e);
          const float dt = softplus(at(in.dt, t, e) + in.dt_bias.as<float>()[e]);
          float sum = 0;
          for (int64_t n = 0; n < d_state; ++n) {
            float& hn = h[static_cast<size_t>(n)];
            hn = std::exp(dt * at(in.A, e, n)) * hn + dt * at(in.B, t, n) * x;
            sum += at(in.C, t, n) * hn;
          }
          at(y, t, e) = (sum + in.D.as<float>()[e] * x) * silu(z);
        }
        for (int64_t n = 0; n < d_state; ++n) {
          state[n] = round_state<State>(h[static_cast<size_t>(n)], batch.state_rounding(),
                                        e * d_state + n);
        }
      }
    }
  });
}

void PlainOps::ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                        const Batch& batch) {
  cpu::check_ssd_scan(y, in, ssm_state, batch);
  const int64_t H = ssm_state.dim(1);
  const int64_t P = ssm_state.dim(2);
  const int64_t N = ssm_state.dim(3);
  std::vector<float> S(static_cast<size_t>(N));
  visit_dtype(ssm_state.dtype, "ssd_scan: ssm_state", [&](auto element) {
    using State = decltype(element);
    for (int64_t s = 0; s < batch.n_seq; ++s) {
      const int32_t slot = batch.slot.as<int32_t>()[s];
      if (slot < 0) continue;
      const int64_t begin = batch.seq_start.as<int32_t>()[s];
      const int64_t end = batch.seq_start.as<int32_t>()[s + 1];
      for (int64_t e = 0; e < H * P; ++e) {
        const int64_t h = e / P;
        const int64_t g = h / (H / in.n_group);
        State* state = ssm_state.as<State>() + (slot * H * P + e) * N;
        for (int64_t n = 0; n < N; ++n) S[static_cast<size_t>(n)] = static_cast<float>(state[n]);
        for (int64_t t = begin; t < end; ++t) {
          const float x = at(in.x, t, e);
          const float raw = softplus(at(in.dt, t, h) + in.dt_bias.as<float>()[h]);
          const float dt = std::min(std::max(raw, in.dt_min), in.dt_max);
          const float decay = std::exp(dt * in.A.as<float>()[h]);
          float sum = 0;
          for (int64_t n = 0; n < N; ++n) {
            float& Sn = S[static_cast<size_t>(n)];
            Sn = decay * Sn + dt * x * at(in.B, t, g * N + n);
            sum += at(in.C, t, g * N + n) * Sn;
          }
          at(y, t, e) = sum + in.D.as<float>()[h] * x;
        }
        for (int64_t n = 0; n < N; ++n) {
          state[n] =
              round_state<State>(S[static_cast<size_t>(n)], batch.state_rounding(), e * N + n);
        }
      }
    }
  });
}

void PlainOps::gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z,
                              const Tensor& weight, int64_t n_group, float eps) {
  cpu::check_gated_rms_norm(out, y, z, weight, n_group);
  const int64_t width = y.dim(1) / n_group;
  std::vector<float> v(static_cast<size_t>(width));
  for (int64_t t = 0; t < y.dim(0); ++t) {
    for (int64_t begin = 0; begin < y.dim(1); begin += width) {
      float squares = 0;
      for (int64_t i = 0; i < width; ++i) {
        float& vi = v[static_cast<size_t>(i)];
        vi = at(y, t, begin + i) * silu(at(z, t, begin + i));
        squares += vi * vi;
      }
      const float scale = 1.0F / std::sqrt(squares / static_cast<float>(width) + eps);
      for (int64_t i = 0; i < width; ++i) {
        at(out, t, begin + i) = v[static_cast<size_t>(i)] * scale * weight.as<float>()[begin + i];
      }
    }
  }
}

}  // namespace krait
