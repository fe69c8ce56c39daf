// sample.cu - one token for each row of logits, chosen on the device.
//
// The rules (filters, their order, integer masses, ties) are those of kernels/sampling.h, to the
// last bit: sums of integers don't depend on their order, so a block may add in parallel and still
// draw what the plain definition draws.
//
// Nothing is sorted. A filter keeps a prefix of some order, so it is enough to find the last token
// it keeps: a histogram of masses over the ordered values finds the bin where the running mass
// reaches the target; the few tokens of that bin move to shared memory, where histograms over ever
// narrower ranges of keys find the token. What a filter leaves moves to shared memory too, in the
// order of ids, as soon as it fits; before that, a dropped token becomes -inf in `logits`.
//
// Shapes   logits f32 [n_seq, vocab_rows]; state by slot
// Launch   one block of 1024 threads per row
// Bytes    4 * vocab per pass, from L2: one pass for greedy, 5 for top-k; later filters work on
// what is left Same as  kernels/cpu sample; tests/ops/sample_test.cpp
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"
#include "kernels/sampling.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2 * kThreads;
constexpr int kListSize = 2048;
constexpr uint64_t kNoKey = ~uint64_t{0};

struct Shared {
  unsigned long long bins[kBins];
  uint64_t warp[kWarps];
  uint64_t result[2];
  float list_logit[kListSize];
  int32_t list_id[kListSize];
  int gathered;
};

/// The tokens that are still in play: a whole row of logits, or a list in shared memory in the
/// order of the ids. Those at -inf are out.
struct Candidates {
  float* logit;
  const int32_t* id;  // null: the index is the id
  int n;
  bool vector;  // a row that allows 16-byte loads

  __device__ int32_t token(int i) const { return id != nullptr ? id[i] : i; }
  __device__ float at(int i) const { return sampling::clean(logit[i]); }

  /// f(index, logit) for every candidate, the block's threads sharing them.
  template <typename F>
  __device__ void each(F&& f) const {
    const auto visit = [&](int i, float raw) {
      const float l = sampling::clean(raw);
      if (l > -INFINITY) f(i, l);
    };
    int done = 0;
    if (vector) {
      done = n / 4 * 4;
#pragma unroll 2
      for (int i = 4 * static_cast<int>(threadIdx.x); i < done; i += 4 * kThreads) {
        const float4 l = *reinterpret_cast<const float4*>(logit + i);
        visit(i, l.x);
        visit(i + 1, l.y);
        visit(i + 2, l.z);
        visit(i + 3, l.w);
      }
    }
    for (int i = done + static_cast<int>(threadIdx.x); i < n; i += kThreads) visit(i, logit[i]);
  }
};

template <typename T, typename Combine>
__device__ T block_reduce(T value, T identity, Combine combine, Shared& s) {
  static_assert(sizeof(T) == 8);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value = combine(value, __shfl_xor_sync(0xffffffffU, value, d));
  __syncthreads();  // readers of the last reduction are done
  if (threadIdx.x % 32 == 0) s.warp[threadIdx.x / 32] = static_cast<uint64_t>(value);
  __syncthreads();
  T total = identity;
  for (int w = 0; w < kWarps; ++w) total = combine(total, static_cast<T>(s.warp[w]));
  return total;
}

__device__ uint64_t block_sum(uint64_t v, Shared& s) {
  return block_reduce(
      v, uint64_t{0}, [](uint64_t a, uint64_t b) { return a + b; }, s);
}
__device__ uint64_t block_min(uint64_t v, Shared& s) {
  return block_reduce(
      v, kNoKey, [](uint64_t a, uint64_t b) { return a < b ? a : b; }, s);
}
__device__ uint64_t block_max(uint64_t v, Shared& s) {
  return block_reduce(
      v, uint64_t{0}, [](uint64_t a, uint64_t b) { return a > b ? a : b; }, s);
}

__device__ uint64_t warp_inclusive_sum(uint64_t v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint64_t below = __shfl_up_sync(0xffffffffU, v, d);
    if (lane >= d) v += below;
  }
  return v;
}

/// Sum of `v` over the threads before this one.
__device__ uint64_t block_exclusive_sum(uint64_t v, Shared& s) {
  const uint64_t inclusive = warp_inclusive_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 31) s.warp[threadIdx.x / 32] = inclusive;
  __syncthreads();
  uint64_t before = 0;
  for (int w = 0; w < static_cast<int>(threadIdx.x / 32); ++w) before += s.warp[w];
  return before + inclusive - v;
}

/// The first key, ascending: the largest logit, the lowest id on ties.
__device__ uint64_t first_key(const Candidates& c, Shared& s) {
  uint64_t key = kNoKey;
  c.each([&](int i, float l) { key = min(key, sampling::descending_key(l, c.token(i))); });
  return block_min(key, s);
}

__device__ float logit_of_key(uint64_t key) {
  const auto ascending = ~static_cast<uint32_t>(key >> 32);
  return __uint_as_float((ascending >> 31) != 0 ? ascending & 0x7fffffffU : ~ascending);
}

/// Finds the bin where the running mass reaches `target`, which becomes what is missing before that
/// bin.
__device__ int find_bin(uint64_t& target, Shared& s) {
  __syncthreads();
  const uint64_t a = s.bins[2 * threadIdx.x];
  const uint64_t b = s.bins[2 * threadIdx.x + 1];
  const uint64_t before = block_exclusive_sum(a + b, s);
  if (before < target && target <= before + a + b) {
    const bool second = before + a < target;
    s.result[0] = 2 * threadIdx.x + (second ? 1 : 0);
    s.result[1] = target - before - (second ? a : 0);
  }
  __syncthreads();
  target = s.result[1];
  return static_cast<int>(s.result[0]);
}

/// The key of the first candidate, by ascending key, at which the running mass is >= target (which
/// is at least 1 and at most the whole mass). value(i, logit) >= 0 grows with the key and spreads
/// the candidates over the first histogram: one bin is 1/64 nat.
template <typename Value, typename Key, typename Mass>
__device__ uint64_t select(const Candidates& c, uint64_t target, Shared& s, Value value, Key key,
                           Mass mass) {
  const auto clear = [&] {
    __syncthreads();
    s.bins[2 * threadIdx.x] = 0;
    s.bins[2 * threadIdx.x + 1] = 0;
    __syncthreads();
  };
  const auto coarse = [&](int i, float l) {
    return static_cast<int>(fminf(value(i, l) * 64.0F, static_cast<float>(kBins - 1)));
  };

  clear();
  c.each([&](int i, float l) {
    const uint64_t m = mass(i, l);
    if (m != 0) atomicAdd(&s.bins[coarse(i, l)], static_cast<unsigned long long>(m));
  });
  const int bin = find_bin(target, s);

  // The bin's candidates: those of a row move to the list, if they fit.
  const auto in_bin = [&](auto&& f) {
    c.each([&](int i, float l) {
      if (coarse(i, l) == bin) f(i, l);
    });
  };
  int n_list = 0;
  if (c.id == nullptr) {
    if (threadIdx.x == 0) s.gathered = 0;
    __syncthreads();
    in_bin([&](int i, float l) {
      const int at = atomicAdd(&s.gathered, 1);
      if (at < kListSize) {
        s.list_id[at] = i;
        s.list_logit[at] = l;
      }
    });
    __syncthreads();
    n_list = s.gathered <= kListSize ? s.gathered : 0;
  }
  uint64_t low = 0;
  uint64_t high = kNoKey;
  const auto each_inside = [&](auto&& f) {
    const auto visit = [&](int i, float l) {
      const uint64_t k = key(i, l);
      if (k >= low && k <= high) f(k, i, l);
    };
    if (n_list == 0) return in_bin(visit);
    for (int j = threadIdx.x; j < n_list; j += kThreads) visit(s.list_id[j], s.list_logit[j]);
  };
  for (;;) {
    uint64_t least = kNoKey;
    uint64_t most = 0;
    each_inside([&](uint64_t k, int, float) {
      least = min(least, k);
      most = max(most, k);
    });
    least = block_min(least, s);
    most = block_max(most, s);
    low = least;
    high = most;
    if (low >= high) return low;

    const int bits = 64 - __clzll(static_cast<long long>(high - low));
    const int shift = max(0, bits - 11);
    clear();
    each_inside([&](uint64_t k, int i, float l) {
      atomicAdd(&s.bins[(k - low) >> shift], static_cast<unsigned long long>(mass(i, l)));
    });
    const auto part = static_cast<uint64_t>(find_bin(target, s));
    low += part << shift;
    high = low + ((uint64_t{1} << shift) - 1);
  }
}

/// Drops the candidates that `kept` refuses. Each warp owns a run of consecutive candidates, so
/// that the list stays in order.
template <typename Kept>
__device__ void keep(Candidates& c, Shared& s, Kept kept) {
  __syncthreads();
  if (c.id == nullptr) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int run = static_cast<int>(ceil_div(ceil_div(c.n, kWarps), 32)) * 32;
    const int begin = min(warp * run, c.n);
    const int end = min(begin + run, c.n);
    const auto stays = [&](int i) {
      if (i >= end) return false;
      const float l = c.at(i);
      return l > -INFINITY && kept(i, l);
    };
    uint64_t mine = 0;
#pragma unroll 4
    for (int i = begin; i < end; i += 32) mine += stays(i + lane) ? 1 : 0;
    mine = warp_sum(mine);
    __syncthreads();
    if (lane == 0) s.warp[warp] = mine;
    __syncthreads();
    int total = 0;
    int at = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) at = total;
      total += static_cast<int>(s.warp[w]);
    }
    if (total <= kListSize) {
      for (int i = begin; i < end; i += 32) {
        const bool in = stays(i + lane);
        const unsigned all = __ballot_sync(0xffffffffU, in);
        if (in) {
          const int to = at + __popc(all & ((1U << lane) - 1));
          s.list_logit[to] = c.at(i + lane);
          s.list_id[to] = i + lane;
        }
        at += __popc(all);
      }
      __syncthreads();
      c = {s.list_logit, s.list_id, total, false};
      return;
    }
  }
  c.each([&](int i, float l) {
    if (!kept(i, l)) c.logit[i] = -INFINITY;
  });
  __syncthreads();
}

/// The first candidate, by id, whose running sum of weights exceeds `threshold`. Each warp owns a
/// run of consecutive candidates; the warp that holds the answer walks it.
template <typename Mass>
__device__ int32_t draw(const Candidates& c, uint64_t threshold, Shared& s, Mass mass) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int run = static_cast<int>(ceil_div(ceil_div(c.n, kWarps), 32)) * 32;
  const int begin = min(warp * run, c.n);
  const int end = min(begin + run, c.n);
  const auto mass_at = [&](int i) -> uint64_t {
    if (i >= end) return 0;
    const float l = c.at(i);
    return l > -INFINITY ? mass(i, l) : 0;
  };
  uint64_t sum = 0;
  for (int i = begin; i < end; i += 32) sum += mass_at(i + lane);
  sum = warp_sum(sum);
  __syncthreads();
  if (lane == 0) s.warp[warp] = sum;
  __syncthreads();
  uint64_t before = 0;
  for (int w = 0; w < warp; ++w) before += s.warp[w];
  if (before <= threshold && threshold < before + sum) {
    for (int i = begin; i < end; i += 32) {
      const uint64_t inclusive = warp_inclusive_sum(mass_at(i + lane));
      const unsigned past = __ballot_sync(0xffffffffU, before + inclusive > threshold);
      if (past != 0) {
        if (lane == 0)
          s.result[0] = static_cast<uint64_t>(c.token(i + __ffs(static_cast<int>(past)) - 1));
        break;
      }
      before += __shfl_sync(0xffffffffU, inclusive, 31);
    }
  }
  __syncthreads();
  return static_cast<int32_t>(s.result[0]);
}

/// Steps "bias" and "penalty" of kernels/sampling.h.
__device__ void bias_and_penalties(float* logit, int n, const SampleParams& p,
                                   const int32_t* bias_id, const float* bias_value, int n_bias,
                                   const int32_t* counts) {
  for (int b = threadIdx.x; b < n_bias; b += kThreads) {
    const int32_t id = bias_id[b];
    if (id < 0 || id >= n) continue;
    bool first = true;  // the first entry of a token applies them all, in their order
    for (int a = 0; a < b; ++a) first = first && bias_id[a] != id;
    if (!first) continue;
    float l = sampling::clean(logit[id]);
    for (int a = b; a < n_bias; ++a) {
      if (bias_id[a] == id) l = sampling::clean(l + bias_value[a]);
    }
    logit[id] = l;
  }
  __syncthreads();
  const bool penalise =
      p.repeat_penalty != 1.0F || p.presence_penalty != 0.0F || p.frequency_penalty != 0.0F;
  if (counts != nullptr && penalise) {
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const int32_t count = counts[i];
      if (count > 0) {
        logit[i] = sampling::penalised(sampling::clean(logit[i]), count, p.repeat_penalty,
                                       p.presence_penalty, p.frequency_penalty);
      }
    }
    __syncthreads();
  }
}

/// All steps after the penalties.
__device__ int32_t choose(Candidates c, const SampleParams& p, int64_t position, Shared& s) {
  uint64_t best = first_key(c, s);
  if (best == kNoKey)
    return 0;  // every token is forbidden: the lowest id, as in the plain definition
  if (!(p.temperature > 0.0F)) return sampling::token_of_key(best);
  float top = logit_of_key(best);

  const auto nats = [&](int, float l) { return top - l; };
  const auto by_logit = [&](int i, float l) { return sampling::descending_key(l, c.token(i)); };
  const auto weight = [&](int, float l) { return sampling::weight(top - l); };
  const auto sum_of = [&](auto mass) {
    uint64_t mine = 0;
    c.each([&](int i, float l) { mine += mass(i, l); });
    return block_sum(mine, s);
  };
  if (p.top_k > 0 && p.top_k < c.n) {
    const auto one = [](int, float) { return uint64_t{1}; };
    const auto k = static_cast<uint64_t>(p.top_k);
    if (k < sum_of(one)) {
      const uint64_t last = select(c, k, s, nats, by_logit, one);
      keep(c, s, [&](int i, float l) { return by_logit(i, l) <= last; });
    }
  }
  if (p.typical_p < 1.0F) {
    const uint64_t total = sum_of(weight);
    const uint64_t terms = sum_of(
        [&](int, float l) { return sampling::typical_term(sampling::weight(top - l), top - l); });
    const auto distance = [&](int, float l) {
      return sampling::typical_distance(top - l, terms, total);
    };
    const auto by_distance = [&](int i, float l) {
      return sampling::ascending_key(distance(i, l), c.token(i));
    };
    const uint64_t last =
        select(c, sampling::kept_above(p.typical_p, total) + 1, s, distance, by_distance, weight);
    keep(c, s, [&](int i, float l) { return by_distance(i, l) <= last; });
    best = first_key(c, s);  // the most likely token need not be typical
    top = logit_of_key(best);
  }
  if (p.top_p < 1.0F) {
    const uint64_t target = sampling::kept_from(p.top_p, sum_of(weight));
    const uint64_t last = select(c, target, s, nats, by_logit, weight);
    keep(c, s, [&](int i, float l) { return by_logit(i, l) <= last; });
  }
  if (p.min_p > 0.0F) {
    const uint64_t least = sampling::min_weight(p.min_p);
    keep(c, s, [&](int i, float l) { return weight(i, l) >= least; });
  }
  const auto tempered = [&](int, float l) { return sampling::weight((top - l) / p.temperature); };
  const uint64_t total = sum_of(tempered);
  const uint32_t u = sampling::uniform24(p.seed, p.sequence, position);
  return draw(c, sampling::draw_threshold(u, total), s, tempered);
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(float* logits, int vocab, int64_t row_stride, SampleState state, int window,
                  int n_bias, int64_t counts_stride, const int32_t* slots, Mailbox mail) {
  after_previous();
  __shared__ Shared s;
  const int seq = static_cast<int>(blockIdx.x);
  const int32_t slot = slots[seq];
  int32_t token = 0;

  if (slot >= 0) {
    const SampleParams p = static_cast<const SampleParams*>(state.params.data)[slot];
    int64_t* position = static_cast<int64_t*>(state.position.data) + slot;
    int32_t* counts = state.counts.data == nullptr
                          ? nullptr
                          : static_cast<int32_t*>(state.counts.data) + slot * counts_stride;
    const int32_t* bias_id = static_cast<const int32_t*>(state.bias_id.data) + slot * n_bias;
    const float* bias_value = static_cast<const float*>(state.bias_value.data) + slot * n_bias;
    float* row = logits + seq * row_stride;

    bias_and_penalties(row, vocab, p, bias_id, bias_value, n_bias, counts);
    const bool vector = row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
    token = choose({row, nullptr, vocab, vector}, p, *position, s);
    __syncthreads();

    if (threadIdx.x == 0) {
      *position += 1;
      static_cast<int32_t*>(state.next_id.data)[slot] = token;
      if (window > 0) {
        int32_t* ring =
            static_cast<int32_t*>(state.seen.data) + static_cast<int64_t>(slot) * window;
        int64_t* length = static_cast<int64_t*>(state.seen_len.data) + slot;
        const int64_t n = *length;
        const int64_t reach = sampling::window_length(p.repeat_last_n, window);
        if (counts != nullptr && reach > 0) {
          if (n >= reach) counts[ring[(n - reach) % window]] -= 1;
          counts[token] += 1;
        }
        ring[n % window] = token;
        *length = n + 1;
      }
    }
  }

  if (threadIdx.x == 0) {
    volatile int32_t* ring = mail.ring;
    const unsigned long long post = *static_cast<volatile unsigned long long*>(&mail.counters[0]);
    ring[(post % Mailbox::kPosts) * Mailbox::kMaxRows + seq] = slot >= 0 ? token : -1;
    __threadfence_system();
    if (atomicAdd(&mail.counters[1], 1ULL) + 1 == gridDim.x) {
      // All rows are written: the post is complete, and the host may see its number.
      mail.counters[1] = 0;
      mail.counters[0] = post + 1;
      __threadfence_system();
      *static_cast<volatile unsigned long long*>(mail.posted) = post + 1;
    }
  }
}

}  // namespace

void sample(const Tensor& logits, int64_t vocab, const SampleState& state, const Tensor& slot,
            int64_t n_seq, const Mailbox& mailbox, cudaStream_t stream) {
  if (n_seq > Mailbox::kMaxRows) {
    throw Error(ErrorKind::device, "sampling " + std::to_string(n_seq) +
                                       " sequences in one step: at most " +
                                       std::to_string(Mailbox::kMaxRows) + " are built");
  }
  launch("sample", sample_kernel, static_cast<unsigned>(n_seq), kThreads, 0, stream,
         logits.as<float>(), static_cast<int>(vocab), logits.row_stride, state,
         state.seen ? static_cast<int>(state.seen.dim(1)) : 0,
         state.bias_id ? static_cast<int>(state.bias_id.dim(1)) : 0,
         state.counts ? state.counts.row_stride : 0, slot.as<int32_t>(), mailbox);
}

}  // namespace krait::cuda
