// The verbs: everything the model and the runtime ask of a device. Each verb states its equation,
// shapes and layout here; kernels/cpu is the definition, kernels/cuda the fast form, and a test
// holds the second to the first. Nothing above this header knows which device it runs on.
//
// Conventions
//   n_tok     tokens of the step, the sequences packed one after the other
//   n_seq     sequences of the step; sequence s owns rows seq_start[s] .. seq_start[s+1]
//   slot      index of a sequence's state in the pool; slot -1 marks a padding row, which is
//   skipped T         activation type: Ops::activation_dtype(weight type); on the CPU always f32
//   Matrices are row-major; "[a, b] view" may be a block of columns of a wider matrix (row_stride).
//   A weight W is [out, in] as in checkpoints: linear is in * W^T.
// All verbs are ordered on one stream and return before the work is done where the device is
// asynchronous.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/buffer.h"
#include "base/tensor.h"
#include "kernels/mamba1_step.h"
#include "kernels/mamba2_step.h"
#include "kernels/state_rounding.h"

namespace krait {

/// The sequences of one step. The tensors are in device memory.
struct Batch {
  int64_t n_tok = 0;
  int64_t n_seq = 0;
  int64_t max_len =
      0;             ///< longest sequence of the step; 1 means that every sequence brings one token
  Tensor seq_start;  ///< i32 [n_seq + 1]
  Tensor slot;       ///< i32 [n_seq]
  /// i64 [n_seq]: tokens fed to the sequence before this step. Only the convolution asks.
  Tensor position;
  /// Of an ssm state in 16 bits, where every sequence brings one token. After longer ones it is
  /// rounded to nearest, once.
  Rounding rounding = Rounding::nearest;

  [[nodiscard]] Rounding state_rounding() const {
    return max_len == 1 ? rounding : Rounding::nearest;
  }
};

/// Inputs of selective_scan, in the letters of Gu & Dao 2023, algorithm 2.
struct ScanInputs {
  Tensor x;        ///< T [n_tok, d_inner]        after convolution and SiLU
  Tensor dt;       ///< T [n_tok, d_inner]        before bias and softplus
  Tensor A;        ///< f32 [d_inner, d_state]    -exp(A_log), negative
  Tensor B;        ///< T [n_tok, d_state] view
  Tensor C;        ///< T [n_tok, d_state] view
  Tensor D;        ///< f32 [d_inner]
  Tensor z;        ///< T [n_tok, d_inner] view   gate, before SiLU
  Tensor dt_bias;  ///< f32 [d_inner]
};

/// Inputs of ssd_scan, in the letters of Dao & Gu 2024. H heads of P channels in G groups: head h
/// uses B and C of group h / (H / G).
struct SsdInputs {
  Tensor x;         ///< T [n_tok, H * P] view   after convolution and SiLU
  Tensor dt;        ///< T [n_tok, H] view       before bias and softplus
  Tensor A;         ///< f32 [H]                 -exp(A_log), negative
  Tensor B;         ///< T [n_tok, G * N] view   after convolution and SiLU
  Tensor C;         ///< T [n_tok, G * N] view   after convolution and SiLU
  Tensor D;         ///< f32 [H]
  Tensor dt_bias;   ///< f32 [H]
  int64_t n_group;  ///< G
  float dt_min;     ///< limits of dt after softplus
  float dt_max;
};

/// What Mamba-2 does between its projections, in the letters of SsdInputs.
struct SsdMixer {
  Tensor z;          ///< T [n_tok, E] view           gate, before SiLU
  Tensor xbc;        ///< T [n_tok, E + 2 G N] view   x, B and C before the convolution
  Tensor dt;         ///< T [n_tok, H] view           before bias and softplus
  Tensor conv;       ///< f32 [E + 2 G N, d_conv]
  Tensor conv_bias;  ///< f32 [E + 2 G N] or null
  Tensor A;          ///< f32 [H]                     -exp(A_log), negative
  Tensor D;          ///< f32 [H]
  Tensor dt_bias;    ///< f32 [H]
  Tensor norm;       ///< f32 [E]
  int64_t n_group;   ///< G
  float dt_min;      ///< limits of dt after softplus
  float dt_max;
  float norm_eps;
};

/// How one sequence samples; plain data, so that a device can hold an array of them (one per slot).
/// Definitions and order are llama.cpp's: logit bias, penalties, top-k, typical, top-p, min-p,
/// temperature, then a draw. Each filter works on the softmax of what the filters before it left.
struct SampleParams {
  float temperature = 1.0F;  ///< <= 0: the largest logit (greedy); the filters then don't matter
  float top_p = 1.0F;        ///< >= 1: off. Smallest set of largest probabilities with sum >= top_p
  float min_p = 0.0F;        ///< <= 0: off. Keeps logit >= max + log(min_p)
  float typical_p = 1.0F;    ///< >= 1: off. Meister et al. 2022
  float repeat_penalty = 1.0F;     ///< 1: off. logit > 0 ? logit / p : logit * p, for tokens seen
  float presence_penalty = 0.0F;   ///< logit -= p for tokens seen
  float frequency_penalty = 0.0F;  ///< logit -= p * count
  int32_t top_k = 0;               ///< <= 0: off
  int32_t repeat_last_n =
      64;                ///< window of "seen", counted in tokens; 0 off, -1 the whole sequence
  int32_t reserved = 0;  ///< keeps `seed` aligned and the struct free of padding
  uint64_t seed = 0;
  uint64_t sequence = 0;  ///< with seed and position, the key of the random stream (Philox 4x32-10)
};

/// Everything the sample verb keeps between tokens, in device memory, indexed by slot.
struct SampleState {
  Tensor params;    ///< u8 [n_slot, sizeof(SampleParams)]
  Tensor position;  ///< i64 [n_slot]: tokens sampled so far; sample() adds one
  Tensor next_id;   ///< i32 [n_slot]: the token sampled last, the input of the next step
  Tensor seen;      ///< i32 [n_slot, window]: ring of the last tokens; slot's length in seen_len
  Tensor seen_len;  ///< i64 [n_slot]: tokens ever put into the ring (prompt and generated)
  Tensor counts;   ///< i32 [n_slot, vocab]: occurrences in the window (min(repeat_last_n, window));
                   ///< null: no penalties
  Tensor bias_id;  ///< i32 [n_slot, max_bias]: biased tokens, -1 = unused; null: none
  Tensor bias_value;  ///< f32 [n_slot, max_bias]; -inf forbids a token
  /// Not by slot but by row, for the step that follows; null: not wanted.
  Tensor row_id = {};        ///< i32 [n_seq]: gets the tokens too, 0 in a padding row
  Tensor row_position = {};  ///< i64 [n_seq]: sample() adds one, in a padding row too
};

struct DeviceInfo {
  std::string name;         ///< "NVIDIA H100 80GB HBM3", "CPU (AVX2, 8 threads)"
  std::string processor;    ///< of a CPU, as the system calls it: "AMD EPYC 9654"; "" of a GPU
  std::string driver;       ///< of a GPU: "580.95.05 (CUDA 13.0)"; "" of a CPU
  std::string clocks;       ///< "132 SMs up to 1980 MHz, memory 2619 MHz"; "" where unknown
  size_t memory_total = 0;  ///< bytes
  size_t memory_free = 0;   ///< bytes, now
};

class Ops {
 public:
  virtual ~Ops() = default;
  Ops() = default;
  Ops(const Ops&) = delete;
  Ops& operator=(const Ops&) = delete;

  [[nodiscard]] virtual std::string_view backend() const = 0;  ///< "cpu" or "cuda"
  [[nodiscard]] virtual DeviceInfo info() const = 0;
  /// Type of activations between verbs for matrices of type `weights` (f32, f16 or bf16).
  [[nodiscard]] virtual DType activation_dtype(DType weights) const = 0;

  // ---- memory -----------------------------------------------------------------------------------

  /// Device memory, aligned to 256 bytes, uninitialised. Error device when there is none left, with
  /// the bytes wanted and free and `what` they were for.
  [[nodiscard]] virtual Buffer allocate(size_t bytes, std::string_view what) = 0;
  /// Host to device; `src` may be reused on return. Does not wait for the work before it.
  virtual void upload(void* dst, const void* src, size_t bytes) = 0;
  /// Device to host; waits for the work so far.
  virtual void download(void* dst, const void* src, size_t bytes) = 0;
  virtual void copy(void* dst, const void* src, size_t bytes) = 0;  ///< device to device
  virtual void zero(void* dst, size_t bytes) = 0;
  /// The same for n rows of `width` bytes, `pitch` bytes from one row to the next.
  virtual void copy_rows(void* dst, const void* src, size_t pitch, size_t width, size_t n) {
    for (size_t i = 0; i < n; ++i) {
      copy(static_cast<std::byte*>(dst) + i * pitch, static_cast<const std::byte*>(src) + i * pitch,
           width);
    }
  }
  virtual void zero_rows(void* dst, size_t pitch, size_t width, size_t n) {
    for (size_t i = 0; i < n; ++i) zero(static_cast<std::byte*>(dst) + i * pitch, width);
  }
  virtual void synchronize() = 0;

  /// From now on, when all that was launched is done, the cycles of a GPU's cores count.
  virtual void start_core_clock() {}
  /// Their mean clock since then, in Hz, until all that was launched is done. 0: no GPU.
  [[nodiscard]] virtual double mean_core_clock() { return 0; }

  /// Brings a weight (dense, in host memory) to the device as `dtype`: a view of the host memory
  /// where that will do (CPU, same dtype, aligned), which must then stay as long as this object,
  /// else a converted copy owned by this object, and `host` is read before the return. Returns at
  /// once where it can; weights_ready() completes all.
  [[nodiscard]] virtual Tensor import_weight(const Tensor& host, DType dtype) = 0;
  virtual void weights_ready() = 0;

  // ---- verbs ------------------------------------------------------------------------------------

  /// residual[t] = table[ids[t]].  residual f32 [n_tok, d_model], ids i32 [n_tok], table W [vocab,
  /// d_model] The caller has checked the ids.
  virtual void embed(const Tensor& residual, const Tensor& ids, const Tensor& table) = 0;

  /// out[i] = src[index[i]]; index -1 gives zeros.  out [n, width], src of the same type (2 or 4
  /// bytes an element), index i32 [n]
  virtual void gather_rows(const Tensor& out, const Tensor& src, const Tensor& index) = 0;

  /// out = x * rsqrt(mean(x^2) + eps) * weight, per row.  out T or f32 [n, d], x f32 [n, d], weight
  /// f32 [d]
  virtual void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps) = 0;

  /// x[i] *= rsqrt(mean(x[i]^2) + eps), for each part of a row by itself: parts of these widths,
  /// one after the other, from the first column. x T [n, d], d >= the sum of `widths`.
  virtual void rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps) = 0;

  /// out = in * W^T (+ bias).  out T or f32 [n, n_out] view, in T [n, n_in] view, W [n_out, n_in],
  /// bias f32 [n_out] or null. Accumulates in f32.
  virtual void linear(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias) = 0;

  /// linear, where nobody reads the columns of `out` from n_soon on before settle(), nor writes
  /// `in`: a backend may compute them beside the verbs that follow.
  virtual void linear_soon(const Tensor& out, int64_t n_soon, const Tensor& in, const Tensor& W,
                           const Tensor& bias, const Batch& batch) {
    (void)n_soon, (void)batch;
    linear(out, in, W, bias);
  }
  virtual void settle() {}

  /// acc += in * W^T (+ bias).  acc f32 [n, n_out]; the rest as linear.
  virtual void linear_add(const Tensor& acc, const Tensor& in, const Tensor& W,
                          const Tensor& bias) = 0;

  /// Causal depthwise convolution over time, then SiLU:
  ///   out[t, e] = silu(bias[e] + sum_j weight[e, j] * u[t - (d_conv-1) + j, e])
  /// where u continues, before the first row of a sequence, in conv_state[slot], which has the last
  /// d_conv-1 inputs (zeros at the start of a text), and afterwards has those that are the last
  /// then. It is a ring: the input at position p of a text lies in row p mod (d_conv-1), so that a
  /// step of one token writes one row. out T [n_tok, d_inner], u T [n_tok, d_inner] view, weight
  /// f32 [d_inner, d_conv], bias f32 [d_inner] or null, conv_state T [n_slot, d_conv-1, d_inner].
  /// out and u do not overlap.
  virtual void conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight,
                           const Tensor& bias, const Tensor& conv_state, const Batch& batch) = 0;

  /// Selective scan of Mamba-1 with gate (Gu & Dao 2023, algorithm 2), per channel e and state n:
  ///   dt = softplus(dt + dt_bias)                      softplus(v) = v for v > 20
  ///   h  = exp(dt * A) * h + dt * B * x                from h = ssm_state[slot], left there at the
  ///   end y  = (sum_n C * h + D * x) * silu(z)
  /// y T [n_tok, d_inner]; ssm_state f32, bf16 or f16 [n_slot, d_inner, d_state]. y may be in.x or
  /// in.dt.
  virtual void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                              const Batch& batch) = 0;

  /// The recurrence of Mamba-2 (Dao & Gu 2024), per head h, channel p and state n:
  ///   dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)
  ///   S  = exp(dt * A) * S + dt * x * B                from S = ssm_state[slot], left there at the
  ///   end y  = sum_n C * S + D * x
  /// y T [n_tok, H * P], overlaps no input; ssm_state f32, bf16 or f16 [n_slot, H, P, N].
  virtual void ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                        const Batch& batch) = 0;

  /// v = y * silu(z); out = v * rsqrt(mean(v^2) + eps) * weight, the mean over each of n_group
  /// equal slices of a row by itself.  out, y T [n, d], z T [n, d] view, weight f32 [d]. out may be
  /// y.
  virtual void gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z,
                              const Tensor& weight, int64_t n_group, float eps) = 0;

  /// The three verbs in a row, as below: x, B and C to `xbc`, the recurrence to y, the norm in
  /// place. y T [n_tok, E]; xbc T [n_tok, E + 2 G N] is scratch, which a backend may leave alone.
  virtual void ssd_mixer(const Tensor& y, const Tensor& xbc, const SsdMixer& in,
                         const Tensor& conv_state, const Tensor& ssm_state, const Batch& batch) {
    const int64_t E = y.dim(1);
    const int64_t GN = in.n_group * ssm_state.dim(3);
    const Tensor x = xbc.columns(0, E);
    const Tensor B = xbc.columns(E, GN);
    const Tensor C = xbc.columns(E + GN, GN);
    conv1d_silu(xbc, in.xbc, in.conv, in.conv_bias, conv_state, batch);
    ssd_scan(y, {x, in.dt, in.A, B, C, in.D, in.dt_bias, in.n_group, in.dt_min, in.dt_max},
             ssm_state, batch);
    gated_rms_norm(y, y, in.z, in.norm, in.n_group, in.norm_eps);
  }

  /// Samples one token for each row of logits f32 [n_seq, vocab_rows]; columns from `vocab` on are
  /// padding and never sampled. Row s belongs to slot[s] (i32 [n_seq]). Writes state.next_id[slot],
  /// adds it to the window of seen tokens and posts the n_seq tokens to the mailbox (see receive).
  /// `logits` is scratch afterwards.
  virtual void sample(const Tensor& logits, int64_t vocab, const SampleState& state,
                      const Tensor& slot, int64_t n_seq) = 0;

  /// Log-probabilities of given tokens, and the likeliest token, of each row of logits f32 [n,
  /// vocab_rows]; columns from `vocab` on are padding:
  ///   logprob[i] = logits[i, target[i]] - log(sum_v exp(logits[i, v]))
  ///   best[i]    = the first v with the largest logit
  /// logprob f32 [n]; best, target i32 [n].
  virtual void log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits,
                        int64_t vocab, const Tensor& target) = 0;

  /// Waits for the oldest post not yet received (one per sample call, first in first out, at most 8
  /// outstanding) and writes its tokens, in the order of its rows.
  virtual void receive(std::span<int32_t> tokens) = 0;

  // ---- for measurements
  // ---------------------------------------------------------------------------

  /// Seconds that the device spends on what `work` launches, by its own clock; on the CPU, that the
  /// call takes. Launches cost nothing while the device is busy with what was launched before.
  [[nodiscard]] virtual double seconds(const std::function<void()>& work) = 0;

  /// dst = src with all the device has, past its caches where that is faster. No overlap; bytes is
  /// a multiple of 16, as are both addresses.
  virtual void stream_copy(void* dst, const void* src, size_t bytes) = 0;
  /// sum = exclusive or of the u32 words of src; reads each once. sum u32 in device memory; bytes
  /// and address of src are multiples of 16.
  virtual void stream_read(void* sum, const void* src, size_t bytes) = 0;

  // ---- whole steps ------------------------------------------------------------------------------

  /// A decode step of a Mamba-1 model at once, from ids i32 [n_seq] to logits f32 [n_seq,
  /// vocab_rows]; state[layer] is conv_state and ssm_state, as the verbs above have them. Returns
  /// false, having done nothing, where this backend has no such step for the model's sizes and
  /// types or the batch: then the verbs do it.
  virtual bool mamba1_step(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
                           const Batch& batch, std::span<const std::vector<Tensor>> state) {
    (void)weights, (void)logits, (void)ids, (void)batch, (void)state;
    return false;
  }
  /// The same of a Mamba-2 model.
  virtual bool mamba2_step(const Mamba2Weights& weights, const Tensor& logits, const Tensor& ids,
                           const Batch& batch, std::span<const std::vector<Tensor>> state) {
    (void)weights, (void)logits, (void)ids, (void)batch, (void)state;
    return false;
  }

  /// Runs `step`, which calls verbs only, and may remember their launches under `key`: a later call
  /// with the same key may repeat them without calling `step`. So everything that changes from call
  /// to call must lie in device memory, and the key must name everything else that `step` depends
  /// on.
  virtual void replay(uint64_t key, const std::function<void()>& step) {
    (void)key;
    step();
  }
};

/// The CPU backend. `fast` false: the plain definition, one thread. `n_threads` 0: all cores.
[[nodiscard]] std::unique_ptr<Ops> make_cpu_ops(int n_threads, bool fast = true);

/// The CUDA backend on device `index`; error device where there is none or this build has no CUDA.
[[nodiscard]] std::unique_ptr<Ops> make_cuda_ops(int index);

/// Number of CUDA devices this build can use; 0 without CUDA, driver or device.
[[nodiscard]] int cuda_device_count() noexcept;

}  // namespace krait
