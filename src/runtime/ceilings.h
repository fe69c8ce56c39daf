// What a device can do at best, measured on it: the denominators of every share of the floor.
#pragma once

#include "kernels/ops.h"

namespace krait {

/// Bytes per second of memory, out of the reach of caches.
struct MemoryCeiling {
  double copy = 0;  ///< bytes read and bytes written, both counted
  double read = 0;
};

/// Takes up to 2 GiB of the device's memory for the time of the call. Error device: no memory.
[[nodiscard]] MemoryCeiling measure_memory(Ops& op);

/// Flops per second of a large square matrix product (Ops::linear) with weights of this type.
[[nodiscard]] double measure_product(Ops& op, DType weights);

}  // namespace krait
