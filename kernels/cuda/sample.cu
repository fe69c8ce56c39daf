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
// One block per row is too few for a large vocabulary. So first many blocks go through the row, a
// part each: they apply biases and penalties, and note the best token of the part. That settles
// greedy; and of top-k with k up to kParts it leaves little: the k-th best of the parts' best
// tokens is no better than the k-th best of all, so only tokens from it on are candidates, most
// often fewer than 2k, and only parts whose best is among them need be read again.
//
// Shapes   logits f32 [n_seq, vocab_rows]; state by slot; part_best u64 [n_seq, kParts]
// Launch   one warp per part, then one block of 1024 threads per row

// Bytes    4 * vocab, then about a third of that with top-k, nothing more for greedy; without top-k
//          4 * vocab per filter, from L2
// Same as  kernels/cpu sample; tests/ops/sample_test.cpp
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/verbs.h"
#include "kernels/sampling.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2 * kThreads;
constexpr int kListSize = 2048;
constexpr int kParts = Mailbox::kParts;
constexpr int kSorted = kThreads / 4;
constexpr int kPartThreads = 256;
static_assert(kParts % kWarps == 0 && kParts <= kThreads && kParts % (kPartThreads / 32) == 0);
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

/// The part of a row of n tokens: a multiple of 4 tokens each.
struct Part {
  int begin, end;
  __device__ Part(int n, int part) {
    const int size = (n + kParts * 4 - 1) / (kParts * 4) * 4;
    begin = min(part * size, n);
    end = min(begin + size, n);
  }
};

/// f(i, logit) for the tokens of a part, the lanes of a warp sharing them; 8 loads are in flight. A
/// lane without a token gets -inf.
template <typename F>
__device__ void each_of_part(const float* logit, const Part& part, F&& f) {
  constexpr int kAhead = 8;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int first = part.begin; first < part.end; first += 32 * kAhead) {
    float l[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + 32 * j + lane;
      l[j] = i < part.end ? __ldcg(logit + i) : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + 32 * j < part.end) f(first + 32 * j + lane, sampling::clean(l[j]));
    }
  }
}

constexpr int kRun = 32 * 32;  // tokens

/// The logits of kRun tokens of a part from `first` on, all on their way at once: a lane has 8
/// times 4 neighbours. `vector`: rows that allow 16-byte loads, which may pass the end of the part,
/// not of the row. What is past the end is -inf.
__device__ __forceinline__ void load_run(float (&l)[32], const float* logit, const Part& part,
                                         int first, bool vector) {
  const int own = first + 4 * static_cast<int>(threadIdx.x % 32);
  if (vector) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int i = own + 128 * j;
      float4 v{};
      if (i < part.end) v = __ldcg(reinterpret_cast<const float4*>(logit + i));
      l[4 * j] = v.x;
      l[4 * j + 1] = v.y;
      l[4 * j + 2] = v.z;
      l[4 * j + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const int i = own + j / 4 * 128 + j % 4;
      l[j] = i < part.end ? __ldcg(logit + i) : 0.0F;
    }
  }
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    if (own + j / 4 * 128 + j % 4 >= part.end) l[j] = -INFINITY;
  }
}

/// Steps "bias" and "penalty" of kernels/sampling.h, and the first key of each part. One warp a
/// part. Also counts the posts.
__global__ void __launch_bounds__(kPartThreads)
    sample_parts_kernel(float* logits, int vocab, int64_t row_stride, SampleState state, int n_bias,
                        int64_t counts_stride, const int32_t* slots, uint64_t* part_best,
                        uint64_t* posts) {
  // No kernel writes these.
  const int64_t seq = blockIdx.y;
  const int32_t slot = slots[seq];
  float repeat = 1.0F, presence = 0.0F, frequency = 0.0F;
  if (slot >= 0) {
    const SampleParams& p = static_cast<const SampleParams*>(state.params.data)[slot];
    repeat = p.repeat_penalty;
    presence = p.presence_penalty;
    frequency = p.frequency_penalty;
  }
  after_previous();
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *posts += 1;
  if (slot < 0) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int index = static_cast<int>((blockIdx.x * kPartThreads + threadIdx.x) / 32);
  const Part part(vocab, index);
  float* logit = logits + seq * row_stride;
  const bool vector = row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  float l[kRun / 32];
  load_run(l, logit, part, part.begin, vector);
  const int32_t* bias_id = static_cast<const int32_t*>(state.bias_id.data) + slot * n_bias;
  const float* bias_value = static_cast<const float*>(state.bias_value.data) + slot * n_bias;

  // Both are rare: they change the row, which is then read again.
  bool changed = false;
  for (int b = lane; b < n_bias; b += 32) {
    const int32_t id = bias_id[b];
    if (id < part.begin || id >= part.end) continue;
    changed = true;
    bool first = true;  // the first entry of a token applies them all, in their order
    for (int a = 0; a < b; ++a) first = first && bias_id[a] != id;
    if (!first) continue;
    float sum = sampling::clean(logit[id]);
    for (int a = b; a < n_bias; ++a) {
      if (bias_id[a] == id) sum = sampling::clean(sum + bias_value[a]);
    }
    logit[id] = sum;
  }
  const bool penalise = repeat != 1.0F || presence != 0.0F || frequency != 0.0F;
  if (penalise && state.counts.data != nullptr) {
    __syncwarp();
    const int32_t* counts = static_cast<const int32_t*>(state.counts.data) + slot * counts_stride;
#pragma unroll 4
    for (int i = part.begin + lane; i < part.end; i += 32) {
      if (counts[i] <= 0) continue;
      changed = true;
      logit[i] = sampling::penalised(sampling::clean(__ldcg(logit + i)), counts[i], repeat,
                                     presence, frequency);
    }
  }
  if (__any_sync(0xffffffffU, changed)) {
    __syncwarp();
    load_run(l, logit, part, part.begin, vector);
  }

  // A lane's tokens come in the order of their ids, so the first of equals stays.
  float most = -INFINITY;
  int at = 0;
  for (int first = part.begin; first < part.end; first += kRun) {
    if (first > part.begin) load_run(l, logit, part, first, vector);
#pragma unroll
    for (int j = 0; j < kRun / 32; ++j) {
      const float v = sampling::clean(l[j]);
      if (v > most) {
        most = v;
        at = first + j / 4 * 128 + 4 * lane + j % 4;
      }
    }
  }
  uint64_t best = most > -INFINITY ? sampling::descending_key(most, at) : kNoKey;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) best = min(best, __shfl_xor_sync(0xffffffffU, best, d));
  if (lane == 0) part_best[seq * kParts + index] = best;
}

/// Moves the candidates for top-k with k <= kParts to the list in shared memory, in the order of
/// ids: the tokens up to the k-th of the parts' first keys. Leaves `c` alone where there are too
/// many.
__device__ void gather_top(Candidates& c, int k, const uint64_t* part_best, Shared& s) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  // The rank of each part's first key; keys differ, but for parts that have none.
  if (thread < kParts) {
    const uint64_t mine = part_best[thread];
    int rank = 0;
    for (int i = 0; i < kParts; ++i) {
      const uint64_t other = part_best[i];
      rank += other < mine || (other == mine && i < thread) ? 1 : 0;
    }
    if (rank == k - 1) s.result[0] = mine;
  }
  __syncthreads();
  const uint64_t last = s.result[0];
  if (last == kNoKey) return;  // fewer than k parts have tokens at all

  // Each warp takes kParts / kWarps neighbouring parts: counts, then writes behind those before it.
  const auto visit = [&](auto&& f) {
    for (int i = 0; i < kParts / kWarps; ++i) {
      const int at = warp * (kParts / kWarps) + i;
      if (part_best[at] > last) continue;
      each_of_part(c.logit, Part(c.n, at), [&](int id, float l) {
        f(l > -INFINITY && sampling::descending_key(l, id) <= last, id, l);
      });
    }
  };
  int mine = 0;
  visit([&](bool in, int, float) { mine += __popc(__ballot_sync(0xffffffffU, in)); });
  if (lane == 0) s.warp[warp] = static_cast<uint64_t>(mine);
  __syncthreads();
  int total = 0;
  int at = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) at = total;
    total += static_cast<int>(s.warp[w]);
  }
  __syncthreads();
  if (total > kListSize) return;
  visit([&](bool in, int id, float l) {
    const unsigned all = __ballot_sync(0xffffffffU, in);
    if (in) {
      const int to = at + __popc(all & ((1U << lane) - 1));
      s.list_logit[to] = l;
      s.list_id[to] = id;
    }
    at += __popc(all);
  });
  __syncthreads();
  c = {s.list_logit, s.list_id, total, false};
}

/// All steps after the penalties, for up to kSorted candidates and 0 < top_k <= kParts, without
/// typical: the best top_k are put in order, and then one warp does the rest, since what top-p and
/// min-p keep is a beginning of that order.
__device__ int32_t choose_sorted(const Candidates& c, const SampleParams& p, int64_t position,
                                 Shared& s) {
  const int thread = static_cast<int>(threadIdx.x);
  // The rank of a key is the number of smaller ones: keys differ. Four threads share a key.
  auto* keys = reinterpret_cast<uint64_t*>(s.bins);              // [kSorted], as they come
  auto* sorted = reinterpret_cast<uint64_t*>(s.bins) + kSorted;  // [kParts]
  if (thread < kSorted) {
    keys[thread] = thread < c.n ? sampling::descending_key(c.at(thread), c.token(thread)) : kNoKey;
  }
  __syncthreads();
  const uint64_t mine = keys[thread / 4];
  int rank = 0;
  for (int i = thread % 4; i < c.n; i += 4) rank += keys[i] < mine ? 1 : 0;
  rank += __shfl_xor_sync(0xffffffffU, rank, 1);
  rank += __shfl_xor_sync(0xffffffffU, rank, 2);
  if (thread % 4 == 0 && mine != kNoKey && rank < kParts) sorted[rank] = mine;
  __syncthreads();

  if (thread < 32) {
    constexpr int kPer = kParts / 32;  // neighbouring ranks of a lane
    const float top = logit_of_key(sorted[0]);
    uint64_t key[kPer], weight[kPer];
    uint64_t sum = 0;
    int n = min(p.top_k, c.n);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int at = thread * kPer + i;
      key[i] = at < n ? sorted[at] : kNoKey;
      weight[i] = at < n ? sampling::weight(top - logit_of_key(key[i])) : 0;
      sum += weight[i];
    }
    if (p.top_p < 1.0F) {  // up to the first at which the running mass reaches the target
      const uint64_t inclusive = warp_inclusive_sum(sum);
      const uint64_t total = __shfl_sync(0xffffffffU, inclusive, 31);
      const uint64_t target = sampling::kept_from(p.top_p, total);
      uint64_t running = inclusive - sum;
      int kept = n;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        running += weight[i];
        if (running >= target) kept = min(kept, thread * kPer + i + 1);
      }
#pragma unroll
      for (int d = 16; d > 0; d /= 2) kept = min(kept, __shfl_xor_sync(0xffffffffU, kept, d));
      n = kept;
    }
    const uint64_t least = p.min_p > 0.0F ? sampling::min_weight(p.min_p) : 0;
    uint64_t total = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const bool kept = thread * kPer + i < n && weight[i] >= least;
      weight[i] = kept ? sampling::weight((top - logit_of_key(key[i])) / p.temperature) : 0;
      total += weight[i];
    }
    total = warp_sum(total);
    const uint64_t threshold =
        sampling::draw_threshold(sampling::uniform24(p.seed, p.sequence, position), total);
    // By id: a token is drawn if the mass of the lower ids is at most the threshold, and with its
    // own it is more.
    uint64_t below[kPer] = {};
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      for (int lane = 0; lane < 32; ++lane) {
        const uint64_t other = __shfl_sync(0xffffffffU, key[i], lane);
        const uint64_t mass = __shfl_sync(0xffffffffU, weight[i], lane);
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (static_cast<uint32_t>(other) < static_cast<uint32_t>(key[j])) below[j] += mass;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (weight[i] != 0 && below[i] <= threshold && threshold < below[i] + weight[i]) {
        s.result[0] = sampling::token_of_key(key[i]);
      }
    }
  }
  __syncthreads();
  return static_cast<int32_t>(s.result[0]);
}

/// Without a temperature that is all, for the first warp.
__device__ int32_t choose_best(const uint64_t* part_best) {
  uint64_t best = kNoKey;
#pragma unroll
  for (int i = 0; i < kParts; i += 32) best = min(best, part_best[i + threadIdx.x]);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) best = min(best, __shfl_xor_sync(0xffffffffU, best, d));
  return best == kNoKey ? 0 : sampling::token_of_key(best);
}

/// All steps after the penalties.
__device__ int32_t choose(Candidates c, const SampleParams& p, int64_t position,
                          const uint64_t* part_best, Shared& s) {
  uint64_t best = block_min(threadIdx.x < kParts ? part_best[threadIdx.x] : kNoKey, s);
  if (best == kNoKey)
    return 0;  // every token is forbidden: the lowest id, as in the plain definition
  float top = logit_of_key(best);
  if (p.top_k > 0 && p.top_k <= kParts) {
    gather_top(c, p.top_k, part_best, s);
    if (c.id != nullptr && c.n <= kSorted && !(p.typical_p < 1.0F)) {
      return choose_sorted(c, p, position, s);
    }
  }

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
                  int64_t counts_stride, const int32_t* slots, const uint64_t* part_best,
                  Mailbox mail) {
  __shared__ Shared s;
  const int seq = static_cast<int>(blockIdx.x);
  // No kernel writes these.
  const int32_t slot = slots[seq];
  SampleParams p;
  if (slot >= 0) p = static_cast<const SampleParams*>(state.params.data)[slot];
  after_previous();
  const uint64_t post = *mail.posts;
  const auto deliver = [&](int32_t token) {
    mail.ring[(post - 1) % Mailbox::kPosts * Mailbox::kMaxRows + seq] =
        post << 32 | static_cast<uint32_t>(token);
    if (state.row_id.data != nullptr) {
      static_cast<int32_t*>(state.row_id.data)[seq] = max(token, 0);
    }
    if (state.row_position.data != nullptr) {  // without waiting for the old one
      atomicAdd(static_cast<unsigned long long*>(state.row_position.data) + seq, 1ULL);
    }
  };
  if (slot < 0) {
    if (threadIdx.x == 0) deliver(-1);
    return;
  }
  const bool greedy = !(p.temperature > 0.0F);
  if (greedy && threadIdx.x >= 32) return;
  // All that is loaded is on its way together: a kernel this short is a few latencies long.
  int64_t* position_at = static_cast<int64_t*>(state.position.data) + slot;
  const int64_t position = *position_at;
  int64_t* n_seen_at = static_cast<int64_t*>(state.seen_len.data) + slot;
  const int64_t n = window > 0 ? *n_seen_at : 0;
  int32_t token;
  if (greedy) {
    token = choose_best(part_best + seq * kParts);
  } else {
    float* row = logits + seq * row_stride;
    const bool vector = row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
    token = choose({row, nullptr, vocab, vector}, p, position, part_best + seq * kParts, s);
  }
  if (threadIdx.x != 0) return;
  deliver(token);
  *position_at = position + 1;
  static_cast<int32_t*>(state.next_id.data)[slot] = token;
  if (window == 0) return;
  int32_t* ring = static_cast<int32_t*>(state.seen.data) + static_cast<int64_t>(slot) * window;
  const int64_t reach = sampling::window_length(p.repeat_last_n, window);
  if (state.counts.data != nullptr && reach > 0) {
    int32_t* counts = static_cast<int32_t*>(state.counts.data) + slot * counts_stride;
    if (n >= reach) counts[ring[(n - reach) % window]] -= 1;
    counts[token] += 1;
  }
  ring[n % window] = token;
  *n_seen_at = n + 1;
}

}  // namespace

void sample(const Tensor& logits, int64_t vocab, const SampleState& state, const Tensor& slot,
            int64_t n_seq, const Mailbox& mailbox, cudaStream_t stream) {
  if (n_seq > Mailbox::kMaxRows) {
    throw Error(ErrorKind::device, "sampling " + std::to_string(n_seq) +
                                       " sequences in one step: at most " +
                                       std::to_string(Mailbox::kMaxRows) + " are built");
  }
  const dim3 parts(kParts / (kPartThreads / 32), static_cast<unsigned>(n_seq));
  const int64_t counts_stride = state.counts ? state.counts.row_stride : 0;
  launch("sample_parts", sample_parts_kernel, parts, kPartThreads, 0, stream, logits.as<float>(),
         static_cast<int>(vocab), logits.row_stride, state,
         state.bias_id ? static_cast<int>(state.bias_id.dim(1)) : 0, counts_stride,
         slot.as<int32_t>(), mailbox.part_best, mailbox.posts);
  launch("sample", sample_kernel, static_cast<unsigned>(n_seq), kThreads, 0, stream,
         logits.as<float>(), static_cast<int>(vocab), logits.row_stride, state,
         state.seen ? static_cast<int>(state.seen.dim(1)) : 0, counts_stride, slot.as<int32_t>(),
         mailbox.part_best, mailbox);
}

}  // namespace krait::cuda
