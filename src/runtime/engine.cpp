#include "runtime/engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <tuple>

#include "kernels/sampling.h"
#include "model/family.h"
#include "runtime/state_pool.h"

namespace krait {

namespace {

constexpr size_t kMaxOutstanding = 8;  // launches not yet received; Ops::receive
constexpr int64_t kMaxSlots = 1 << 20;
// Logits of many positions go through the head in blocks of about this size.
constexpr int64_t kLogitsBlockBytes = 16 << 20;
// Tokens of a short prefill. H100: at 2,048 tokens of narrow models repeated launches still gain
// 5%, at 8,192 1%.
constexpr int64_t kShortMost = 2048;
// Tokens times d_model up to which the host may take longer to launch the kernels of a prefill than
// a GPU takes to run them.
constexpr int64_t kHostWork = int64_t{1024} * 768;

/// The engine's memory besides state and weights, in the order of step_tensors().
enum StepTensor : size_t {
  kResidual,        ///< f32 [n_tok, d_model]
  kIds,             ///< i32 [n_slot]: what the next step feeds
  kNormed,          ///< T [n_row, d_model]
  kLogits,          ///< f32 [n_row, vocab_rows]
  kChunk,           ///< i32: what describes a prefill chunk, see ChunkLayout
  kEnd,             ///< f32 [n_slot, d_model]: the residual rows that the tokens are drawn from
  kScored,          ///< f32 [n_row, d_model]: residual rows to score; null unless scoring
  kLogProb,         ///< f32 [n_tok], or null
  kBest,            ///< i32 [n_tok], or null
  kDecodeStart,     ///< i32 [n_slot + 1]: 0, 1, 2, ...
  kDecodeSlot,      ///< i32 [n_slot]
  kDecodePosition,  ///< i64 [n_slot]
  kParams,          ///< this and the rest: SampleState
  kPosition,
  kNextId,
  kSeen,
  kSeenLen,
  kCounts,
  kBiasId,
  kBiasValue,
  kFirstActivation,  ///< Model::activations(), [n_tok, ...] each
};

/// One upload describes a prefill chunk: its ids, Batch::seq_start, slot and position, the rows
/// that end a prompt or are scored, and the slots that draw a token after it. Offsets in i32.
struct ChunkLayout {
  ChunkLayout(int64_t n_tok, int64_t n_seq, int64_t n_draw, int64_t n_score)
      : start(aligned(n_tok)),
        slot(start + aligned(n_seq + 1)),
        position(slot + aligned(n_seq)),
        end(position + aligned(2 * n_seq)),
        draw(end + aligned(n_seq)),
        score(draw + aligned(n_draw)),
        target(score + aligned(n_score)),
        size(target + aligned(n_score)) {}
  int64_t start;     ///< i32 [n_seq + 1]; the ids [n_tok] are at 0
  int64_t slot;      ///< i32 [n_seq]
  int64_t position;  ///< i64 [n_seq]
  int64_t end;       ///< i32 [as many as prompts end]
  int64_t draw;      ///< i32 [n_draw]
  int64_t score;     ///< i32 [n_score]
  int64_t target;    ///< i32 [n_score]: the tokens whose probability is wanted
  int64_t size;

 private:
  static constexpr int64_t aligned(int64_t n) { return (n + 63) / 64 * 64; }
};

/// What decides the launches of a chunk.
struct ChunkShape {
  int64_t n_tok = 0;
  int64_t n_seq = 0;
  int64_t max_len = 0;  ///< of a sequence

  /// The smallest of a few shapes that holds this one: padding is at most a sixteenth of more than
  /// 256 tokens. One token of each sequence stays one token of each.
  [[nodiscard]] ChunkShape padded(int64_t most_tok, int64_t most_seq) const {
    ChunkShape p;
    p.n_seq = std::min(Engine::step_rows(n_seq), most_seq);
    if (max_len == 1) return {p.n_seq, p.n_seq, 1};
    const auto step = std::max<int64_t>(
        16, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n_tok)) / 32));
    p.n_tok = std::min((n_tok + step - 1) / step * step, most_tok);
    p.max_len = n_seq == 1
                    ? p.n_tok
                    : std::min(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(max_len))),
                               p.n_tok);
    return p;
  }
};

int64_t logits_rows(const ModelConfig& c, const EngineOptions& o) {
  const int64_t block = kLogitsBlockBytes / (c.vocab_rows * static_cast<int64_t>(sizeof(float)));
  return std::max(o.n_slot, std::clamp<int64_t>(block, 1, o.prefill_chunk));
}

std::vector<TensorSpec> step_tensors(const ModelConfig& c, DType T, const EngineOptions& o,
                                     const std::vector<TensorSpec>& activations) {
  const int64_t n_tok = std::max(o.prefill_chunk, o.n_slot);
  const int64_t n_row = logits_rows(c, o);
  const int64_t n_score = o.scoring ? o.prefill_chunk : 0;
  const int64_t n_penalty = o.penalties ? o.n_slot : 0;
  std::vector<TensorSpec> specs{
      {"residual", {n_tok, c.d_model}, DType::f32},
      {"ids", {o.n_slot}, DType::i32},
      {"normed", {n_row, c.d_model}, T},
      {"logits", {n_row, c.vocab_rows}, DType::f32},
      {"chunk",
       {ChunkLayout(o.prefill_chunk, std::min(o.prefill_chunk, o.n_slot), o.n_slot, n_score).size},
       DType::i32},
      {"end", {o.n_slot, c.d_model}, DType::f32},
      {"scored", {o.scoring ? n_row : 0, c.d_model}, DType::f32},
      {"logprob", {n_score}, DType::f32},
      {"best", {n_score}, DType::i32},
      {"decode_start", {o.n_slot + 1}, DType::i32},
      {"decode_slot", {o.n_slot}, DType::i32},
      {"decode_position", {o.n_slot}, DType::i64},
      {"params", {o.n_slot, static_cast<int64_t>(sizeof(SampleParams))}, DType::u8},
      {"position", {o.n_slot}, DType::i64},
      {"next_id", {o.n_slot}, DType::i32},
      {"seen", {n_penalty, o.max_seen_window}, DType::i32},
      {"seen_len", {o.n_slot}, DType::i64},
      {"counts", {n_penalty, o.vocab_limit}, DType::i32},
      {"bias_id", {o.n_slot, o.max_bias}, DType::i32},
      {"bias_value", {o.n_slot, o.max_bias}, DType::f32},
  };
  for (const TensorSpec& a : activations) {
    Shape shape{n_tok};
    for (int i = 0; i < a.shape.rank(); ++i) shape.push_back(a.shape[i]);
    specs.push_back({a.name, shape, a.dtype});
  }
  return specs;
}

EngineOptions checked(EngineOptions o, const ModelConfig& c, const Ops& op, DType weights) {
  const auto require = [](bool ok, std::string_view what, int64_t found, int64_t least,
                          int64_t most) {
    if (ok) return;
    throw Error(ErrorKind::usage,
                fmt::format("{}: expected {} to {}, found {}", what, least, most, found));
  };
  if (o.prefill_chunk == 0) o.prefill_chunk = default_prefill_chunk(c, op, weights);
  const auto in = [](int64_t v, int64_t a, int64_t b) { return v >= a && v <= b; };
  require(in(o.n_slot, 1, kMaxSlots), "sequences at once", o.n_slot, 1, kMaxSlots);
  require(in(o.prefill_chunk, 1, 1 << 20), "prefill chunk", o.prefill_chunk, 1, 1 << 20);
  require(in(o.max_seen_window, 1, 1 << 24), "window of seen tokens", o.max_seen_window, 1,
          1 << 24);
  require(in(o.max_bias, 0, 1 << 20), "logit biases", o.max_bias, 0, 1 << 20);
  if (!is_float16_or_32(o.state_dtype)) {
    throw Error(ErrorKind::usage, fmt::format("state type: expected f32, bf16 or f16, found {}",
                                              dtype_name(o.state_dtype)));
  }
  if (o.short_prefill < 0) {
    o.short_prefill = op.backend() == "cpu" ? 0 : kShortMost;
  }
  require(o.short_prefill <= kShortMost, "tokens of a short prefill", o.short_prefill, 0,
          kShortMost);
  o.short_prefill = std::min(o.short_prefill, o.prefill_chunk);
  if (o.vocab_limit <= 0 || o.vocab_limit > c.vocab_size) o.vocab_limit = c.vocab_size;
  return o;
}

bool has_penalties(const SampleParams& p) {
  return p.repeat_penalty != 1.0F || p.presence_penalty != 0.0F || p.frequency_penalty != 0.0F;
}

/// Writes one slot's row of a per-slot tensor.
void upload_row(Ops& op, const Tensor& to, int64_t slot, const void* from) {
  const Tensor row = to.rows(slot, 1);
  op.upload(row.data, from, row.bytes());
}

/// Graphs are remembered under a key for as long as the backend lives, so two engines on one
/// backend need different keys.
uint64_t next_engine_id() {
  static std::atomic<uint64_t> id{0};
  return ++id;
}

}  // namespace

int64_t default_prefill_chunk(const ModelConfig& config, const Ops& op, DType weights) {
  if (op.backend() == "cpu") return 512;
  constexpr int64_t kLeast = 4096;
  constexpr int64_t kMost = 32768;
  constexpr int64_t kActivationBytes = int64_t{1} << 30;
  const DType T = op.activation_dtype(weights);
  int64_t token_bytes = config.d_model * static_cast<int64_t>(sizeof(float));  // the residual's
  for (const TensorSpec& a : family_named(config.family).activations(config, T)) {
    token_bytes += a.shape.numel() * static_cast<int64_t>(itemsize(a.dtype));
  }
  int64_t n = kMost;
  while (n > kLeast && n * token_bytes > kActivationBytes) n /= 2;
  return n;
}

struct Engine::Impl {
  Impl(const Model& m, Ops& ops, const EngineOptions& o)
      : model(m),
        c(m.config()),
        op(ops),
        options(checked(o, c, ops, m.weight_dtype())),
        T(ops.activation_dtype(m.weight_dtype())),
        state(ops, c.n_layer, m.layer_state(T, options.state_dtype), options.n_slot, o.poison),
        step_memory(ops, step_tensors(c, T, options, m.activations(T)), "activations", o.poison),
        act(m.activations(T).size()),
        bytes_per_sequence(state_bytes_per_sequence(c, T, options.state_dtype)),
        step_key(next_engine_id() << 32),
        slots(static_cast<size_t>(options.n_slot)) {
    std::vector<int32_t> iota(static_cast<size_t>(options.n_slot) + 1);
    for (size_t i = 0; i < iota.size(); ++i) iota[i] = static_cast<int32_t>(i);
    const Tensor& start = step_memory[kDecodeStart];
    op.upload(start.data, iota.data(), start.bytes());
    sampling = {step_memory[kParams], step_memory[kPosition], step_memory[kNextId],
                step_memory[kSeen],   step_memory[kSeenLen],  step_memory[kCounts],
                step_memory[kBiasId], step_memory[kBiasValue]};
    decode_slots.reserve(slots.size());
    tokens.resize(slots.size());
    chunk.reserve(static_cast<size_t>(step_memory[kChunk].dim(0)));
  }

  /// What the host knows of a slot.
  struct Slot {
    SampleParams params;
    int64_t n_fed = 0;  ///< tokens fed since open
    bool open = false;
    bool sampled = false;  ///< next_id holds a token
    bool biased = true;    ///< the device may hold biases; it begins with any
    bool drawn = false;    ///< a token was sampled since open: the device knows more than `history`
    int64_t n_seen = 0;    ///< tokens put into the window of seen tokens before any was drawn
    std::vector<int32_t> history;  ///< the last of them, at most as many as the window holds
  };

  Slot& slot_at(int slot) {
    if (slot < 0 || slot >= options.n_slot || !slots[static_cast<size_t>(slot)].open) {
      throw Error(ErrorKind::runtime, fmt::format("slot {} is not open", slot));
    }
    return slots[static_cast<size_t>(slot)];
  }

  /// Error runtime when a slot is twice in the list.
  template <typename Range, typename SlotOf>
  void require_distinct(const Range& range, SlotOf&& slot_of) {
    ++mark;
    for (const auto& item : range) {
      const int64_t slot = slot_of(item);
      uint64_t& at = marks[static_cast<size_t>(slot)];
      if (at == mark) throw Error(ErrorKind::runtime, fmt::format("slot {} twice in a step", slot));
      at = mark;
    }
  }

  /// The blocks, on the first rows of the step's memory.
  void forward(const Tensor& ids, const Batch& b) {
    for (size_t i = 0; i < act.size(); ++i) {
      act[i] = step_memory[kFirstActivation + i].rows(0, b.n_tok);
    }
    model.forward(op, residual(0, b.n_tok), ids, b, act, state.layers());
  }

  [[nodiscard]] Tensor residual(int64_t begin, int64_t n) const {
    return step_memory[kResidual].rows(begin, n);
  }

  /// Logits of n rows of the residual stream.
  Tensor head(const Tensor& rows) {
    const int64_t n = rows.dim(0);
    const Tensor logits = step_memory[kLogits].rows(0, n);
    model.head(op, logits, step_memory[kNormed].rows(0, n), rows);
    return logits;
  }

  /// Samples from `logits` [n, vocab_rows], which are kept first where they were asked for.
  void sample(const SampleState& s, const Tensor& logits, const Tensor& slot, int64_t n) {
    if (keep) op.copy(kept[0].data, logits.data, logits.bytes());
    op.sample(logits, options.vocab_limit, s, slot, n);
  }

  /// Brings the ids and positions of the first n of kDecodeSlot, the last of which are padding, to
  /// kIds and kDecodePosition.
  void begin_rows(int64_t n) {
    op.gather_rows(Tensor(step_memory[kIds].data, DType::i32, {n, 1}),
                   Tensor(sampling.next_id.data, DType::i32, {options.n_slot, 1}),
                   step_memory[kDecodeSlot].rows(0, n));
    std::vector<int64_t> positions(static_cast<size_t>(n), 0);
    std::ranges::transform(decode_slots, positions.begin(),
                           [&](int32_t slot) { return slots[static_cast<size_t>(slot)].n_fed; });
    op.upload(step_memory[kDecodePosition].data, positions.data(),
              positions.size() * sizeof(int64_t));
  }

  /// One step of the first n of kDecodeSlot, from their kIds to the next. Nothing here depends on
  /// anything but n and `keep` that does not lie in device memory.
  void decode(int64_t n) {
    const Batch b{n,
                  n,
                  1,
                  step_memory[kDecodeStart].rows(0, n + 1),
                  step_memory[kDecodeSlot].rows(0, n),
                  step_memory[kDecodePosition].rows(0, n),
                  options.state_rounding};
    const Tensor ids = step_memory[kIds].rows(0, n);
    Tensor logits = step_memory[kLogits].rows(0, n);
    if (!model.step(op, logits, ids, b, state.layers())) {
      forward(ids, b);
      logits = head(residual(0, n));
    }
    SampleState s = sampling;
    s.row_id = ids;
    s.row_position = b.position;
    sample(s, logits, b.slot, n);
  }

  /// The key of a short prefill's launches: bit 31 tells it from a decode step's.
  [[nodiscard]] uint64_t short_key(const ChunkShape& shape, bool draws) const {
    static_assert(kShortMost < 1 << 12);
    const auto n_tok = static_cast<uint64_t>(shape.n_tok);
    const auto n_seq = static_cast<uint64_t>(shape.n_seq);
    const auto max_len =
        static_cast<uint64_t>(std::bit_width(static_cast<uint64_t>(shape.max_len)));
    return step_key + (uint64_t{1} << 31 | n_tok << 18 | n_seq << 6 | max_len << 2 |
                       (draws ? 2U : 0U) | (keep ? 1U : 0U));
  }

  /// Notes a launch of n_seq sequences that sampled n_row rows, padding rows last.
  void posted(int64_t n_seq, int64_t n_row) {
    outstanding[(first_outstanding + n_outstanding++) % kMaxOutstanding] = {n_seq, n_row};
    last_rows = keep ? n_seq : 0;
  }

  void require_room() const {
    if (n_outstanding == kMaxOutstanding) {
      throw Error(ErrorKind::runtime, fmt::format("{} launches wait for receive()", n_outstanding));
    }
  }

  /// Downloads n rows of logits without their padding.
  const float* to_host(const Tensor& logits) {
    const auto rows = static_cast<size_t>(logits.dim(0));
    const auto stride = static_cast<size_t>(c.vocab_rows);
    const auto vocab = static_cast<size_t>(c.vocab_size);
    host_logits.resize(std::max(host_logits.size(), rows * stride));
    op.download(host_logits.data(), logits.data, logits.bytes());
    for (size_t r = 1; r < rows && stride != vocab; ++r) {
      std::memmove(&host_logits[r * vocab], &host_logits[r * stride], vocab * sizeof(float));
    }
    return host_logits.data();
  }

  /// Puts tokens of a prompt into the window of seen tokens, as sample() does with sampled ones.
  void remember(int slot, std::span<const int32_t> ids) {
    if (!sampling.counts) return;
    Slot& s = slot_at(slot);
    const int64_t ring_length = sampling.seen.dim(1);
    std::vector<int32_t> ring;
    if (s.drawn && has_penalties(s.params)) {
      ring.resize(static_cast<size_t>(ring_length));
      op.download(&s.n_seen, sampling.seen_len.rows(slot, 1).data, sizeof s.n_seen);
      op.download(ring.data(), sampling.seen.rows(slot, 1).data, ring.size() * sizeof(int32_t));
      s.history.clear();
      for (int64_t n = std::max<int64_t>(0, s.n_seen - ring_length); n < s.n_seen; ++n) {
        s.history.push_back(ring[static_cast<size_t>(n % ring_length)]);
      }
    }
    // Ids past the limit are never sampled, so never penalised; of the others the last are enough.
    const auto counts = [&](int32_t id) { return id < options.vocab_limit; };
    s.n_seen += std::ranges::count_if(ids, counts);
    std::vector<int32_t> last;
    for (auto id = ids.rbegin(); id != ids.rend() && std::ssize(last) < ring_length; ++id) {
      if (counts(*id)) last.push_back(*id);
    }
    s.history.insert(s.history.end(), last.rbegin(), last.rend());
    const int64_t surplus = std::ssize(s.history) - ring_length;
    if (surplus > 0) s.history.erase(s.history.begin(), s.history.begin() + surplus);
    if (s.drawn) upload_history(slot);
  }

  /// Makes the slot's window on the device what the host knows of it.
  void upload_history(int slot) {
    const Slot& s = slot_at(slot);
    if (!sampling.counts || !has_penalties(s.params)) return;
    const int64_t ring_length = sampling.seen.dim(1);
    const int64_t window = sampling::window_length(s.params.repeat_last_n, ring_length);
    std::vector<int32_t> ring(static_cast<size_t>(ring_length));
    std::vector<int32_t> counts(static_cast<size_t>(options.vocab_limit));
    const auto kept_tokens = std::ssize(s.history);
    for (int64_t i = 0; i < kept_tokens; ++i) {
      const int32_t id = s.history[static_cast<size_t>(i)];
      ring[static_cast<size_t>((s.n_seen - kept_tokens + i) % ring_length)] = id;
      if (kept_tokens - i <= window) ++counts[static_cast<size_t>(id)];
    }
    upload_row(op, sampling.seen, slot, ring.data());
    upload_row(op, sampling.seen_len, slot, &s.n_seen);
    upload_row(op, sampling.counts, slot, counts.data());
  }

  const Model& model;
  const ModelConfig& c;
  Ops& op;
  EngineOptions options;
  DType T;  ///< of activations
  StatePool state;
  Slab step_memory;
  Activations act;
  SampleState sampling;
  size_t bytes_per_sequence;
  uint64_t step_key;
  std::vector<Slot> slots;
  std::vector<uint64_t> marks = std::vector<uint64_t>(slots.size());  ///< of require_distinct()
  uint64_t mark = 0;
  std::vector<int32_t> decode_slots;  ///< what kDecodeSlot holds, without padding
  std::vector<int32_t> padded_slots;
  bool has_rows = false;       ///< kIds and kDecodePosition hold what they feed next
  std::vector<int32_t> chunk;  ///< what kChunk holds

  struct Launch {
    int64_t n_seq = 0;
    int64_t n_row = 0;  ///< with padding rows, which come last
  };
  std::array<Launch, kMaxOutstanding> outstanding{};  ///< a ring
  size_t first_outstanding = 0;
  size_t n_outstanding = 0;
  std::vector<int32_t> tokens;

  bool keep = false;
  int64_t last_rows = 0;  ///< rows of `kept` that the latest launch wrote
  Slab kept;              ///< f32 [n_slot, vocab_rows]
  std::vector<float> host_logits;
};

Engine::Engine(const Model& model, Ops& op, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(model, op, options)) {}

Engine::~Engine() {
  try {
    impl_->op.synchronize();  // launches may still use the memory
  } catch (const Error&) {    // NOLINT(bugprone-empty-catch): whoever waits next hears of it
  }
}

void Engine::open(int slot, const SampleParams& params, const LogitBias& bias) {
  Impl& e = *impl_;
  const EngineOptions& o = e.options;
  if (slot < 0 || slot >= o.n_slot) {
    throw Error(ErrorKind::runtime, fmt::format("slot {} of {}", slot, o.n_slot));
  }
  if (static_cast<int64_t>(bias.size()) > o.max_bias) {
    throw Error(ErrorKind::usage,
                fmt::format("{} logit biases, expected at most {}", bias.size(), o.max_bias));
  }
  for (const auto& [id, value] : bias) {
    if (id < 0 || id >= o.vocab_limit) {
      throw Error(ErrorKind::usage,
                  fmt::format("logit bias: the token id {} is outside of the vocabulary of {}", id,
                              o.vocab_limit));
    }
  }
  if (has_penalties(params) && !e.sampling.counts) {
    throw Error(ErrorKind::runtime, "penalties need an engine made with EngineOptions::penalties");
  }

  Impl::Slot fresh;
  fresh.params = params;
  fresh.open = true;
  fresh.biased = !bias.empty();
  const bool was_biased =
      std::exchange(e.slots[static_cast<size_t>(slot)], std::move(fresh)).biased;
  e.state.clear(slot);
  const auto clear = [&](const Tensor& t) {
    if (t) e.op.zero(t.rows(slot, 1).data, t.rows(slot, 1).bytes());
  };
  const SampleState& s = e.sampling;
  upload_row(e.op, s.params, slot, &params);
  clear(s.position);
  if (s.seen) {
    for (const Tensor& t : {s.seen, s.seen_len, s.counts}) clear(t);
  }
  if (s.bias_id && (was_biased || !bias.empty())) {
    std::vector<int32_t> ids(static_cast<size_t>(o.max_bias), -1);
    std::vector<float> values(ids.size(), 0.0F);
    for (size_t i = 0; i < bias.size(); ++i) std::tie(ids[i], values[i]) = bias[i];
    upload_row(e.op, s.bias_id, slot, ids.data());
    upload_row(e.op, s.bias_value, slot, values.data());
  }
}

void Engine::copy(int from, int to) {
  Impl& e = *impl_;
  const Impl::Slot& source = e.slot_at(from);
  Impl::Slot& target = e.slot_at(to);
  if (source.drawn || target.drawn) {
    throw Error(ErrorKind::runtime,
                fmt::format("slot {} has tokens of its own", source.drawn ? from : to));
  }
  if (from == to) return;
  e.state.copy(from, to);
  target.n_fed = source.n_fed;
  target.n_seen = source.n_seen;
  target.history = source.history;
}

bool Engine::prefill(int slot, std::span<const int32_t> ids, bool sample, const LogitsSink& sink,
                     bool last_only, const std::function<bool()>& cancelled) {
  const PrefillRequest request{slot, ids, sample};
  return prefill_packed(std::span(&request, 1), {}, sink, last_only, cancelled);
}

bool Engine::prefill(std::span<const PrefillRequest> requests, const ScoreSink& scores,
                     const std::function<bool()>& cancelled) {
  return prefill_packed(requests, scores, {}, false, cancelled);
}

bool Engine::prefill_packed(std::span<const PrefillRequest> requests, const ScoreSink& scores,
                            const LogitsSink& sink, bool last_only,
                            const std::function<bool()>& cancelled) {
  Impl& e = *impl_;
  int64_t n_drawn = 0;  // sequences that draw a token
  int64_t n_left = 0;   // tokens
  bool scoring = false;
  for (const PrefillRequest& r : requests) {
    (void)e.slot_at(r.slot);
    if (r.ids.empty()) throw Error(ErrorKind::usage, "the prompt has no tokens");
    for (const int32_t id : r.ids) {
      if (id >= 0 && id < e.c.vocab_size) continue;
      throw Error(
          ErrorKind::usage,
          fmt::format("the token id {} is outside of the vocabulary of {}", id, e.c.vocab_size),
          "ids must come from the tokenizer of this model");
    }
    if (r.sample) ++n_drawn;
    n_left += std::ssize(r.ids);
    if (r.targets.empty()) continue;
    scoring = true;
    if (!e.options.scoring || r.targets.size() != r.ids.size()) {
      throw Error(
          ErrorKind::runtime,
          fmt::format("{} targets for {} tokens, and an engine made {} scoring", r.targets.size(),
                      r.ids.size(), e.options.scoring ? "for" : "without"));
    }
    for (const int32_t id : r.targets) {
      if (id < e.c.vocab_size) continue;
      throw Error(
          ErrorKind::usage,
          fmt::format("the token id {} is outside of the vocabulary of {}", id, e.c.vocab_size));
    }
  }
  e.require_distinct(requests, [](const PrefillRequest& r) { return r.slot; });
  if (n_drawn > 0) e.require_room();
  e.last_rows = 0;
  std::vector<int32_t> end_slots;
  for (const PrefillRequest& r : requests) {
    e.slot_at(r.slot).sampled = false;
    e.remember(r.slot, r.ids);
    if (!r.sample) continue;
    if (!e.slot_at(r.slot).drawn) e.upload_history(r.slot);
    end_slots.push_back(r.slot);
  }

  struct Piece {
    const PrefillRequest* request;
    int64_t begin;
    int64_t n;
    [[nodiscard]] bool last() const { return begin + n == std::ssize(request->ids); }
  };
  std::vector<Piece> pieces;  // of one chunk
  struct Scored {
    size_t request;
    int32_t target;
    int32_t row;
  };
  std::vector<Scored> scored;  // of one chunk
  auto next = requests.begin();
  int64_t begin = 0;  // of what is left of *next
  const auto take_pieces = [&] {
    pieces.clear();
    int64_t room = e.options.prefill_chunk;
    while (next != requests.end() && room > 0) {
      const int64_t n = std::min(std::ssize(next->ids) - begin, room);
      pieces.push_back({&*next, begin, n});
      room -= n;
      begin += n;
      if (!pieces.back().last()) break;
      ++next;
      begin = 0;
    }
    return e.options.prefill_chunk - room;
  };

  // A short prefill is one chunk, and with its draw a step that the backend may repeat. Where the
  // host would bind it becomes one of a few shapes: what fills it up belongs to no slot. Longer
  // ones stay as they are, and only single prompts are likely to come again.
  const bool fills = n_left * e.c.d_model <= kHostWork;
  const bool is_short =
      n_left <= e.options.short_prefill && !scoring && !sink && (fills || requests.size() == 1);
  const int64_t block = e.step_memory[kLogits].dim(0);
  const Tensor& all = e.step_memory[kChunk];
  const auto part = [&all](int64_t offset, int64_t n) {
    return Tensor(all.as<int32_t>() + offset, DType::i32, {n});
  };
  int64_t n_ended = 0;   // rows of kEnd that are written
  int64_t draw_row = 0;  // rows that draw, those of padding last
  Tensor draw_slot;      // of the rows that draw
  const auto draw = [&] {
    if (draw_row > 0) {
      e.sample(e.sampling, e.head(e.step_memory[kEnd].rows(0, draw_row)), draw_slot, draw_row);
    }
  };
  while (next != requests.end()) {
    if (cancelled && cancelled()) return false;
    const int64_t n_tok = take_pieces();
    const auto n_seq = std::ssize(pieces);
    ChunkShape shape{n_tok, n_seq, 0};
    for (const Piece& p : pieces) shape.max_len = std::max(shape.max_len, p.n);
    const int64_t max_len = shape.max_len;
    if (is_short && fills) {
      shape = shape.padded(e.options.prefill_chunk,
                           std::min(e.options.prefill_chunk, e.options.n_slot));
    }
    if (next == requests.end()) draw_row = is_short && n_drawn > 0 ? shape.n_seq : n_drawn;
    scored.clear();
    int64_t row = 0;
    for (const Piece& p : pieces) {
      const auto targets =
          p.request->targets.empty()
              ? p.request->targets
              : p.request->targets.subspan(static_cast<size_t>(p.begin), static_cast<size_t>(p.n));
      for (size_t i = 0; i < targets.size(); ++i) {
        if (targets[i] < 0) continue;
        scored.push_back({static_cast<size_t>(p.request - requests.data()), targets[i],
                          static_cast<int32_t>(row + static_cast<int64_t>(i))});
      }
      row += p.n;
    }
    const ChunkLayout at(shape.n_tok, shape.n_seq, draw_row, std::ssize(scored));
    e.chunk.assign(static_cast<size_t>(at.size), 0);
    int32_t* chunk = e.chunk.data();
    row = 0;
    int64_t n_end = 0;
    for (int64_t i = 0; i < n_seq; ++i) {
      const Piece& p = pieces[static_cast<size_t>(i)];
      std::copy_n(p.request->ids.begin() + p.begin, p.n, chunk + row);
      row += p.n;
      chunk[at.start + i + 1] = static_cast<int32_t>(row);
      chunk[at.slot + i] = p.request->slot;
      const int64_t position = e.slot_at(p.request->slot).n_fed;
      std::memcpy(chunk + at.position + 2 * i, &position, sizeof(position));
      if (p.request->sample && p.last()) chunk[at.end + n_end++] = static_cast<int32_t>(row - 1);
    }
    for (int64_t i = n_seq; i < shape.n_seq; ++i) {
      if (max_len == 1) ++row;
      chunk[at.start + i + 1] = static_cast<int32_t>(row);
      chunk[at.slot + i] = -1;
    }
    if (draw_row > 0) {
      std::fill_n(std::ranges::copy(end_slots, chunk + at.draw).out, draw_row - n_drawn, -1);
      draw_slot = part(at.draw, draw_row);
    }
    if (is_short && draw_row > 0) {
      std::fill_n(chunk + at.end + n_end, draw_row - n_end, -1);
      n_end = draw_row;
    }
    for (size_t i = 0; i < scored.size(); ++i) {
      chunk[at.score + static_cast<int64_t>(i)] = scored[i].row;
      chunk[at.target + static_cast<int64_t>(i)] = scored[i].target;
    }
    e.op.upload(all.data, chunk, e.chunk.size() * sizeof(int32_t));
    const auto feed = [&] {
      e.forward(part(0, shape.n_tok),
                {shape.n_tok, shape.n_seq, shape.max_len, part(at.start, shape.n_seq + 1),
                 part(at.slot, shape.n_seq),
                 Tensor(all.as<int32_t>() + at.position, DType::i64, {shape.n_seq}),
                 e.options.state_rounding});
      if (n_end > 0) {
        e.op.gather_rows(e.step_memory[kEnd].rows(n_ended, n_end), e.residual(0, shape.n_tok),
                         part(at.end, n_end));
      }
    };
    if (is_short) {
      e.op.replay(e.short_key(shape, draw_row > 0), [&] {
        feed();
        draw();
      });
    } else {
      feed();
    }
    n_ended += n_end;

    if (!scored.empty()) {
      const auto n_score = std::ssize(scored);
      for (int64_t i = 0; i < n_score; i += block) {
        const int64_t n = std::min(block, n_score - i);
        const Tensor rows = e.step_memory[kScored].rows(0, n);
        e.op.gather_rows(rows, e.residual(0, n_tok), part(at.score + i, n));
        e.op.log_prob(e.step_memory[kLogProb].rows(i, n), e.step_memory[kBest].rows(i, n),
                      e.head(rows), e.c.vocab_size, part(at.target + i, n));
      }
      std::vector<float> logprob(scored.size());
      std::vector<int32_t> best(scored.size());
      e.op.download(logprob.data(), e.step_memory[kLogProb].data, logprob.size() * sizeof(float));
      e.op.download(best.data(), e.step_memory[kBest].data, best.size() * sizeof(int32_t));
      std::vector<TokenScore> of_request;
      for (size_t i = 0; i < scored.size(); ++i) {
        of_request.push_back({logprob[i], best[i]});
        if (i + 1 < scored.size() && scored[i + 1].request == scored[i].request) continue;
        if (scores) scores(scored[i].request, of_request);
        of_request.clear();
      }
    }
    if (sink) {  // of one request: its rows are the chunk's
      const Piece& p = pieces[0];
      const int64_t fed = e.slot_at(p.request->slot).n_fed;
      const int64_t first = !last_only ? 0 : p.last() ? n_tok - 1 : n_tok;
      for (int64_t r = first; r < n_tok; r += block) {
        const int64_t n = std::min(block, n_tok - r);
        sink(fed + r, n, e.to_host(e.head(e.residual(r, n))));
      }
    }
    for (const Piece& p : pieces) e.slot_at(p.request->slot).n_fed += p.n;
  }

  if (n_drawn > 0) {
    if (!is_short) draw();
    e.posted(n_drawn, draw_row);
    e.has_rows = false;
    for (const int32_t slot : end_slots) {
      Impl::Slot& s = e.slot_at(slot);
      s.sampled = s.drawn = true;
      s.history.clear();
    }
  }
  return true;
}

void Engine::step(std::span<const int32_t> slots) {
  Impl& e = *impl_;
  e.require_room();
  if (slots.empty()) throw Error(ErrorKind::runtime, "a step without sequences");
  const auto n = static_cast<int64_t>(slots.size());
  if (n > e.options.n_slot) {
    throw Error(ErrorKind::runtime,
                fmt::format("{} sequences in a step, {} slots", n, e.options.n_slot));
  }
  for (const int32_t slot : slots) {
    if (!e.slot_at(slot).sampled) {
      throw Error(ErrorKind::runtime, fmt::format("slot {} has no token to go on from", slot));
    }
  }
  const int64_t n_row = e.options.pad_steps ? std::min(step_rows(n), e.options.n_slot) : n;
  if (!std::ranges::equal(slots, e.decode_slots)) {
    e.require_distinct(slots, [](int32_t slot) { return slot; });
    e.decode_slots.assign(slots.begin(), slots.end());
    e.padded_slots.assign(static_cast<size_t>(n_row), -1);
    std::ranges::copy(slots, e.padded_slots.begin());
    e.op.upload(e.step_memory[kDecodeSlot].data, e.padded_slots.data(),
                e.padded_slots.size() * sizeof(int32_t));
    e.has_rows = false;
  }
  if (!std::exchange(e.has_rows, true)) e.begin_rows(n_row);
  for (const int32_t slot : slots) ++e.slot_at(slot).n_fed;
  e.op.replay(e.step_key + (static_cast<uint64_t>(n_row) << 1 | (e.keep ? 1U : 0U)),
              [&e, n_row] { e.decode(n_row); });
  e.posted(n, n_row);
}

int64_t Engine::step_rows(int64_t n) {
  // Up to 8 the powers of two; then steps of an eighth to a quarter of the size, 8 to 32 rows.
  if (n <= 8) return std::bit_ceil(static_cast<uint64_t>(n));
  const int64_t step = n <= 64 ? 8 : n <= 256 ? 16 : 32;
  return (n + step - 1) / step * step;
}

std::span<const int32_t> Engine::receive() {
  Impl& e = *impl_;
  if (e.n_outstanding == 0) throw Error(ErrorKind::runtime, "nothing was launched to receive");
  const Impl::Launch launch = e.outstanding[e.first_outstanding];
  e.first_outstanding = (e.first_outstanding + 1) % kMaxOutstanding;
  --e.n_outstanding;
  const std::span<int32_t> tokens = std::span(e.tokens).first(static_cast<size_t>(launch.n_row));
  e.op.receive(tokens);
  return tokens.first(static_cast<size_t>(launch.n_seq));
}

void Engine::keep_logits(bool keep) {
  Impl& e = *impl_;
  if (keep && e.kept.bytes() == 0) {
    const TensorSpec spec{"kept_logits", {e.options.n_slot, e.c.vocab_rows}, DType::f32};
    e.kept = Slab(e.op, std::span(&spec, 1), "logits", false);
  }
  e.keep = keep;
}

std::span<const float> Engine::logits(int64_t row) {
  Impl& e = *impl_;
  if (row < 0 || row >= e.last_rows) {
    throw Error(ErrorKind::runtime, fmt::format("no logits were kept of row {}", row));
  }
  return {e.to_host(e.kept[0].rows(row, 1)), static_cast<size_t>(e.c.vocab_size)};
}

EngineMemory plan_memory(const ModelConfig& config, const Ops& op, DType weights,
                         const EngineOptions& options) {
  const Family& family = family_named(config.family);
  const EngineOptions o = checked(options, config, op, weights);
  const DType T = op.activation_dtype(weights);
  EngineMemory m;
  m.state = Slab::bytes_of(
      StatePool::specs(config.n_layer, family.layer_state(config, T, o.state_dtype), o.n_slot));
  m.activations = Slab::bytes_of(step_tensors(config, T, o, family.activations(config, T)));
  m.state_per_sequence = state_bytes_per_sequence(config, T, o.state_dtype);
  return m;
}

EngineMemory Engine::memory() const noexcept {
  const Impl& e = *impl_;
  EngineMemory m;
  m.weights = e.model.weight_bytes();
  m.state = e.state.bytes();
  m.activations = e.step_memory.bytes() + e.kept.bytes();
  m.state_per_sequence = e.bytes_per_sequence;
  return m;
}

int64_t Engine::prefill_chunk() const noexcept { return impl_->options.prefill_chunk; }

}  // namespace krait
