// Checks at the boundary of a verb: shapes and types that the model and the engine promise. They
// guard against our own mistakes; a file or a flag never reaches them.
#pragma once

#include <initializer_list>
#include <string_view>

#include "base/tensor.h"

namespace krait {

[[noreturn]] inline void wrong_tensor(std::string_view verb, std::string_view name,
                                      std::string_view expected, const Tensor& t) {
  throw Error(ErrorKind::runtime,
              fmt::format("{}: {}: expected {}, found {} {}{}", verb, name, expected, t.shape.str(),
                          dtype_name(t.dtype), t ? "" : " without memory"));
}

inline void check_shape(std::string_view verb, std::string_view name, const Tensor& t,
                        const Shape& shape) {
  if (t.shape != shape || (!t && shape.numel() > 0)) wrong_tensor(verb, name, shape.str(), t);
}

/// One of `dtypes`, and of shape `shape`.
inline void check_tensor(std::string_view verb, std::string_view name, const Tensor& t,
                         const Shape& shape, std::initializer_list<DType> dtypes) {
  check_shape(verb, name, t, shape);
  for (const DType d : dtypes) {
    if (t.dtype == d) return;
  }
  wrong_tensor(verb, name, fmt::format("{} {}", shape.str(), dtype_name(*dtypes.begin())), t);
}

/// The same, and nothing between the rows.
inline void check_dense(std::string_view verb, std::string_view name, const Tensor& t,
                        const Shape& shape, std::initializer_list<DType> dtypes) {
  check_tensor(verb, name, t, shape, dtypes);
  if (!t.dense()) wrong_tensor(verb, name, "rows without gaps", t);
}

}  // namespace krait
