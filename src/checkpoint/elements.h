// The elements of a checkpoint's tensor as floats, whatever type the file has them in.
#pragma once

#include <cstdint>

#include "checkpoint/checkpoint.h"

namespace krait {

/// True for f32, f16, bf16, f64 and the quantised formats: what read_elements() reads.
[[nodiscard]] bool is_real(const Checkpoint::Entry& entry);

/// out[0 .. n) = the elements from `begin` on, rounded to float where they are f64. In a quantised
/// tensor begin and n are multiples of its block.
void read_elements(const Checkpoint::Entry& entry, int64_t begin, int64_t n, float* out);

}  // namespace krait
