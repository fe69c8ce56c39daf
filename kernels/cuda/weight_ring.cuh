// The stream of weights of a kernel that stays on every multiprocessor for a whole decode step
// (mamba2_persistent.cu; mamba1_step.cu and mamba1_step_wide.cu have rings of their own, but count
// their room as here): one warp copies all that the block will need, in the order in which it is
// needed, into a ring in shared memory; all other warps walk through the same sequence.
#pragma once

#include "kernels/cuda/persistent.cuh"

namespace krait::cuda {

constexpr int kRingPieces = 32;  // on their way or in use at once

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

/// Pieces of any size one after the other in a circle of shared memory; a piece that would cross
/// the end starts at the beginning. The producer and every consumer warp walk through the same
/// sequence.
struct WeightRing {
  char* base;
  uint32_t full, empty;  // shared addresses of [kRingPieces] barriers each
  int capacity;
  int at = 0;
  int piece = 0;  // of kRingPieces
  uint32_t parity = 0;

  [[nodiscard]] __device__ uint32_t full_at(int i) const { return full + 8 * i; }
  [[nodiscard]] __device__ uint32_t empty_at(int i) const { return empty + 8 * i; }
  /// Where a piece of so many bytes lies.
  __device__ int place(int bytes) const { return at + bytes <= capacity ? at : 0; }
  __device__ void advance(int place, int bytes) {
    at = place + bytes;
    if (++piece == kRingPieces) {
      piece = 0;
      parity ^= 1;
    }
  }
  __device__ const char* wait(int bytes) const {
    mbarrier_wait(full + 8 * piece, parity);
    return base + place(bytes);
  }
  /// Every warp must release every piece.
  __device__ void release(int bytes) {
    warp_arrive(empty + 8 * piece);
    advance(place(bytes), bytes);
  }
};

/// What a producer knows of its ring: the pieces in use and those on their way, the oldest first.
struct RingRoom {
  int used = 0;  // bytes of the ring
  int oldest = 0;
  int n_held = 0;
  uint32_t oldest_parity = 0;
  int flying = 0;  // bytes on their way
  int n_flying = 0;
  int next_to_land = 0;
  uint32_t next_parity = 0;

  /// Waits until the ring, of `capacity` bytes, has room for a piece of `need`, and no more than
  /// `most_flying` bytes will be on their way with it. held [kRingPieces]: the bytes of the pieces
  /// before. Ring: full_at(i) and empty_at(i) are the barriers of piece i.
  template <typename Ring>
  __device__ __forceinline__ void take(const Ring& ring, const int* held, int capacity,
                                       int most_flying, int need) {
    while (used + need > capacity || n_held == kRingPieces) {
      mbarrier_wait(ring.empty_at(oldest), oldest_parity);
      used -= held[oldest];
      --n_held;
      if (++oldest == kRingPieces) {
        oldest = 0;
        oldest_parity ^= 1;
      }
    }
    while (n_flying == kRingPieces || (n_flying > 0 && flying + need > most_flying)) {
      mbarrier_wait(ring.full_at(next_to_land), next_parity);
      flying -= held[next_to_land];
      --n_flying;
      if (++next_to_land == kRingPieces) {
        next_to_land = 0;
        next_parity ^= 1;
      }
    }
    flying += need;
    ++n_flying;
  }
  /// After its bytes were written down in `held`.
  __device__ __forceinline__ void taken(int need) {
    used += need;
    ++n_held;
  }
};

/// Fills the ring, in the order in which the consumers walk through it. A warp.
struct RingProducer {
  WeightRing ring;
  uint64_t policy;
  int* held;  // [kRingPieces]
  int most_flying;
  RingRoom room{};

  /// Makes room for a piece and announces the bytes that will come; its address.
  __device__ uint32_t begin(int bytes, int expected) {
    const int to = ring.place(bytes);
    const int need = bytes + (to == ring.at ? 0 : ring.capacity - ring.at);
    room.take(ring, held, ring.capacity, most_flying, need);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      held[ring.piece] = need;
      mbarrier_expect(ring.full + 8 * ring.piece, expected);
    }
    __syncwarp();
    room.taken(need);
    return shared_address(ring.base + to);
  }
  __device__ void copy(uint32_t to, const void* from, int bytes) const {
    bulk_copy(to, from, bytes, ring.full + 8 * ring.piece, policy);
  }
  __device__ void end(int bytes) { ring.advance(ring.place(bytes), bytes); }

  /// n rows of a matrix with n_columns from row `first` on, so many at once: neighbours in memory,
  /// which one copy brings.
  __device__ void rows(const void* matrix, int64_t first, int n, int n_columns, int at_once) {
    const char* from = static_cast<const char*>(matrix) + 2 * first * n_columns;
    for (int r = 0; r < n; r += at_once) {
      const int bytes = min(at_once, n - r) * 2 * n_columns;
      const uint32_t to = begin(bytes, bytes);
      if (threadIdx.x % 32 == 0) copy(to, from + 2 * static_cast<int64_t>(r) * n_columns, bytes);
      end(bytes);
    }
  }
};

#endif

}  // namespace krait::cuda
