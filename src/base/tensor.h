// Tensor is a view of typed memory with a shape: it owns nothing and is cheap to copy. Where the
// memory lives (host or a device) is known by whoever made the view; a step of one backend never
// mixes the two.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/dtype.h"

namespace krait {

/// Up to four dimensions, outermost first. A default Shape is that of a scalar (rank 0, one
/// element).
class Shape {
 public:
  static constexpr int kMaxRank = 4;

  constexpr Shape() = default;
  constexpr Shape(std::initializer_list<int64_t> dims) {
    for (const int64_t d : dims) push_back(d);
  }

  constexpr void push_back(int64_t d) {
    if (rank_ == kMaxRank)
      throw Error(ErrorKind::unsupported, "a tensor of more than 4 dimensions");
    dims_[static_cast<size_t>(rank_++)] = d;
  }
  [[nodiscard]] constexpr int rank() const noexcept { return rank_; }
  [[nodiscard]] constexpr int64_t operator[](int i) const noexcept {
    return dims_[static_cast<size_t>(i)];
  }
  /// Number of elements. The caller has made sure that it fits (checkpoint readers check for
  /// overflow).
  [[nodiscard]] constexpr int64_t numel() const noexcept {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= dims_[static_cast<size_t>(i)];
    return n;
  }
  friend constexpr bool operator==(const Shape& a, const Shape& b) noexcept {
    if (a.rank_ != b.rank_) return false;
    for (int i = 0; i < a.rank_; ++i) {
      if (a[i] != b[i]) return false;
    }
    return true;
  }
  /// "[10240, 2560]"
  [[nodiscard]] std::string str() const;

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

/// A view. The last index is contiguous; the first index steps by `row_stride` elements, so that a
/// block of columns of a matrix (columns()) is a view too. Higher ranks are dense.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  int64_t row_stride = 0;  ///< elements from one index of dimension 0 to the next

  Tensor() = default;
  Tensor(void* p, DType t, const Shape& s)
      : data(p), dtype(t), shape(s), row_stride(s.rank() > 1 && s[0] > 0 ? s.numel() / s[0] : 1) {}

  [[nodiscard]] explicit operator bool() const noexcept { return data != nullptr; }
  [[nodiscard]] int64_t dim(int i) const noexcept { return shape[i]; }
  [[nodiscard]] int64_t numel() const noexcept { return shape.numel(); }
  [[nodiscard]] size_t bytes() const noexcept {
    return static_cast<size_t>(numel()) * itemsize(dtype);
  }
  [[nodiscard]] bool dense() const noexcept {
    return shape.rank() < 2 || shape[0] <= 1 || row_stride == numel() / shape[0];
  }

  /// Typed pointer to the first element. The caller has checked the dtype.
  template <typename T>
  [[nodiscard]] T* as() const noexcept {
    return static_cast<T*>(data);
  }

  /// Indices [begin, begin + n) of dimension 0.
  [[nodiscard]] Tensor rows(int64_t begin, int64_t n) const {
    Tensor t = *this;
    t.data =
        static_cast<std::byte*>(data) + static_cast<size_t>(begin * row_stride) * itemsize(dtype);
    t.shape = Shape{n};
    for (int i = 1; i < shape.rank(); ++i) t.shape.push_back(shape[i]);
    return t;
  }
  /// Columns [begin, begin + n) of a matrix: same row stride, so nothing is copied.
  [[nodiscard]] Tensor columns(int64_t begin, int64_t n) const {
    Tensor t = *this;
    t.data = static_cast<std::byte*>(data) + static_cast<size_t>(begin) * itemsize(dtype);
    t.shape = Shape{shape[0], n};
    return t;
  }
};

}  // namespace krait
