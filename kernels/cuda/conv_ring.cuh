// conv_ring.cuh - where the convolution of K taps keeps a sequence's last K - 1 inputs: each in the
// row of conv_state that its position in the text says (conv1d_silu in kernels/ops.h).
#pragma once

#include <cstdint>
#include <type_traits>

namespace krait::cuda {

/// The row of the input at `position`. That of the next input is also the oldest's, so from a row
/// `oldest` on conv_row<K>(oldest + j) holds the input j of the last K - 1, oldest first.
template <int K, typename N>
__host__ __device__ __forceinline__ int conv_row(N position) {
  return static_cast<int>(static_cast<std::make_unsigned_t<N>>(position) % (K - 1));
}

}  // namespace krait::cuda
