// Tensors, timing and the printed line of a verb, for every case of bench_ops.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "runtime/ceilings.h"

namespace krait {

/// What a call must do at least: each input read once, each output written once.
struct CallWork {
  double bytes = 0;
  double flops = 0;
};

class Harness {
 public:
  /// Measures the ceilings and prints them. `verb`: only names that contain it are measured.
  Harness(Ops& op, DType weights, std::string verb);

  [[nodiscard]] Ops& op() { return op_; }
  [[nodiscard]] DType W() const { return W_; }  ///< of matrices
  [[nodiscard]] DType T() const { return T_; }  ///< of activations
  [[nodiscard]] bool wanted(const std::string& name) const;

  /// Device memory that lives until drop().
  Tensor zeros(DType type, const Shape& shape);
  /// Random values, uniform in [-scale, scale], or in [scale, 0] if it is negative.
  Tensor fresh(DType type, const Shape& shape, float scale = 0.1F);
  Tensor ints(const std::vector<int32_t>& v) { return copied(v.data(), DType::i32, v.size()); }
  Tensor longs(const std::vector<int64_t>& v) { return copied(v.data(), DType::i64, v.size()); }
  /// Copies of one tensor that do not fit the caches together, to be used in turn: what a step
  /// streams, it meets cold. One alone where the verb is not wanted.
  std::vector<Tensor> rotated(const std::string& name, DType type, const Shape& shape);
  void drop() { buffers_.clear(); }

  /// Times call(i), i = 0, 1, ... over the `copies` rotated tensors, and prints its line.
  void measure(const std::string& name, const std::string& at, const CallWork& work, size_t copies,
               const std::function<void(size_t)>& call);
  /// The same for a call that leaves a post in the mailbox, which `receive` takes out again.
  void measure_posting(const std::string& name, const std::string& at, const CallWork& work,
                       const std::function<void()>& call, const std::function<void()>& receive);

 private:
  Tensor copied(const void* values, DType type, size_t n);
  void print(const std::string& name, const std::string& at, const CallWork& work,
             const std::vector<double>& seconds) const;

  Ops& op_;
  DType W_;
  DType T_;
  bool cuda_;
  std::string verb_;
  std::vector<Buffer> buffers_;
  uint64_t key_ = 0;
  MemoryCeiling memory_;
  double product_ = 0;
};

}  // namespace krait
