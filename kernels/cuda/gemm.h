// Matrix products by cuBLASLt: the projections where there are more than a few rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "base/buffer.h"
#include "base/tensor.h"

namespace krait::cuda {

/// Owns the cuBLASLt handle, its workspace and the algorithms chosen so far, one for each shape,
/// type and alignment. Products are in f32 throughout (no tf32) for f32 weights, and accumulate in
/// f32 for 16-bit ones.
///
/// The first algorithm is cuBLASLt's own choice, a matter of microseconds. Large products that come
/// again and again, captures aside, try the others that it names, one a use, and stay with the
/// fastest. Tried is only what gives the same bits: no result depends on what was measured.
class Gemm {
 public:
  explicit Gemm(Buffer workspace);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  /// out (+)= in * W^T. Shapes as in Ops::linear, without bias. Returns false if cuBLASLt has no
  /// algorithm for the operands (odd alignments): the caller has another way.
  [[nodiscard]] bool run(const Tensor& out, const Tensor& in, const Tensor& W, bool accumulate,
                         cudaStream_t stream);

  /// Products so far whose algorithm was still open after them, captured ones aside.
  [[nodiscard]] uint64_t n_open() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace krait::cuda
