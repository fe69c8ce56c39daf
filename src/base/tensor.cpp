#include "base/tensor.h"

namespace krait {

void throw_not_float(DType found, std::string_view what) {
  throw Error(ErrorKind::unsupported,
              fmt::format("{}: expected f32, f16 or bf16, found {}", what, dtype_name(found)));
}

std::string Shape::str() const {
  std::string s = "[";
  for (int i = 0; i < rank_; ++i) s += fmt::format("{}{}", i > 0 ? ", " : "", (*this)[i]);
  return s + "]";
}

}  // namespace krait
