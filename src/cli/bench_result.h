// What `krait bench` measures, and the formats in which it prints it. bench.cpp fills these in,
// bench_output.cpp writes them.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/json_out.h"
#include "kernels/ops.h"
#include "model/cost.h"
#include "runtime/ceilings.h"

namespace krait {

/// One measurement: n_batch sequences, each fed n_prompt tokens and then generating n_gen.
struct BenchTest {
  int64_t n_prompt = 0;
  int64_t n_gen = 0;
  int64_t n_batch = 1;

  /// As llama-bench calls it: "pp512", "tg128", "pp2048+tg128".
  [[nodiscard]] std::string name() const;
  [[nodiscard]] int64_t tokens() const { return n_batch * (n_prompt + n_gen); }
  /// Steps of decoding: the prompt, if there is one, gives the first token.
  [[nodiscard]] int64_t n_steps() const { return n_prompt == 0 || n_gen == 0 ? n_gen : n_gen - 1; }
  /// What the time is divided by for ms: the steps of tg; anything with a prompt counts as one.
  [[nodiscard]] int64_t n_timed() const { return n_prompt == 0 ? n_gen : 1; }
};

/// Where and with what all rows of one call were measured.
struct BenchMachine {
  std::string backend;
  DeviceInfo device;
  std::string processor;  ///< of the host
  int threads = 0;        ///< as --threads says
  int repetitions = 0;
};

struct BenchModel {
  std::string name;
  std::string file;    ///< "" for random weights
  std::string family;  ///< "mamba1"
  size_t bytes = 0;
  int64_t parameters = 0;
  DType dtype = DType::f32;
  DType state_dtype = DType::f32;
  std::string state_rounding;  ///< of a 16-bit state; "" where nothing is rounded
  double load_seconds = 0;
};

/// The least time that a test's work takes on this device, and the ceilings that say so.
struct BenchFloor {
  MemoryCeiling memory;
  double product = 0;  ///< flop/s
  double seconds = 0;
};

struct BenchRow {
  BenchModel model;
  BenchTest test;
  std::vector<double> seconds = {};  ///< one for each repetition
  std::vector<double> first_token =
      {};                          ///< seconds until each sequence had one; tests with a prompt
  std::vector<double> clock = {};  ///< Hz of the device's cores in each; none on a CPU
  std::optional<Work> work = {};   ///< none where the test failed before
  std::optional<BenchFloor> floor = {};  ///< none without ceilings
  std::string logits_hash = {};          ///< of the prompt's last token: equal for equal results
  std::string time = {};                 ///< when it was measured, UTC
  std::string error = {};                ///< why there are no seconds

  [[nodiscard]] double rate(double s) const { return static_cast<double>(test.tokens()) / s; }
  [[nodiscard]] double spread() const;  ///< slowest to fastest repetition, relative to the median
};

/// The row as JSON, keys as in llama-bench as far as it has them.
[[nodiscard]] OrderedJson bench_json(const BenchMachine& machine, const BenchRow& row);

/// Writes rows as they come; what it gives to `write` is whole lines.
class BenchWriter {
 public:
  using Write = std::function<void(std::string_view)>;
  BenchWriter(BenchMachine machine, Write write)
      : machine_(std::move(machine)), write_(std::move(write)) {}
  virtual ~BenchWriter() = default;
  BenchWriter(const BenchWriter&) = delete;
  BenchWriter& operator=(const BenchWriter&) = delete;
  virtual void row(const BenchRow& row) = 0;
  virtual void end() {}

 protected:
  const BenchMachine machine_;
  const Write write_;
};

/// `format` is md, json, jsonl or csv.
[[nodiscard]] std::unique_ptr<BenchWriter> make_bench_writer(std::string_view format,
                                                             BenchMachine machine,
                                                             BenchWriter::Write write);

}  // namespace krait
