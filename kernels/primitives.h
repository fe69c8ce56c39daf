// The latencies and rates of a CUDA device that decide how a decode step is built: what a barrier
// between its phases costs, what a kernel boundary costs, how fast memory and the special-function
// units are. For `bench_ops --primitives`.
#pragma once

#include <string>
#include <vector>

namespace krait {

struct Primitive {
  std::string name;
  double value = 0;
  std::string unit;
};

/// Measures all of them on CUDA device `index`, one block a multiprocessor unless a name says
/// otherwise. Error device: there is none.
[[nodiscard]] std::vector<Primitive> measure_primitives(int index);

}  // namespace krait
