// bench_ops: every verb on its own, at the published shapes. For each: microseconds (median) and
// spread, GB/s and TFLOP/s by what it must move and compute, and the share of the ceiling that
// binds it, where the ceilings are measured on the same device in the same run.
//
//   bench_ops [--device cpu|cuda[:N]] [--model 130m,2.8b] [--tokens 1,64,2048] [--verb NAME]
//             [--dtype bf16]
//   bench_ops --primitives     barriers, flags, kernels in a graph, ex2, reads of a CUDA device
//
// Weights and state rotate over copies that don't fit the caches together. On a GPU the calls are
// recorded once (Ops::replay) and timed by its own clock, so that they cost what they cost in a
// captured step.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/primitives.h"
#include "model/random_weights.h"
#include "tools/bench_ops/verbs.h"

namespace krait {
namespace {

struct Flags {
  std::string device = "cuda";
  std::vector<std::string> models{"130m", "2.8b"};
  std::vector<int64_t> tokens{1, 64, 2048};
  std::string verb;
  std::string dtype = "bf16";
  int threads = 0;
  bool primitives = false;
};

int bench_ops(const Flags& flags) {
  const int index = flags.device.size() > 5 ? std::stoi(flags.device.substr(5)) : 0;
  if (flags.primitives) {
    for (const Primitive& p : measure_primitives(index)) {
      std::printf("%-64s %10.3f %s\n", p.name.c_str(), p.value, p.unit.c_str());
    }
    return 0;
  }
  const auto op = flags.device == "cpu" ? make_cpu_ops(flags.threads) : make_cuda_ops(index);
  const DType dtype = flags.dtype == "f32"   ? DType::f32
                      : flags.dtype == "f16" ? DType::f16
                                             : DType::bf16;
  Harness harness(*op, dtype, flags.verb);
  for (const std::string& model : flags.models) {
    for (const int64_t n : flags.tokens) {
      try {
        bench_verbs(harness, model, published_config(model), n);
      } catch (const Error& e) {  // does not fit: the others still come
        std::fprintf(stderr, "bench_ops: %s %ld: %s\n", model.c_str(), static_cast<long>(n),
                     e.what());
        if (e.kind() == ErrorKind::usage) return exit_code(e.kind());
        harness.drop();
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) {
  CLI::App app("Times every verb of a backend at the published shapes.");
  krait::Flags flags;
  const CLI::Validator device(
      [](std::string& s) {
        const bool numbered = s.size() > 5 && s.size() < 9 && s.starts_with("cuda:") &&
                              s.find_first_not_of("0123456789", 5) == std::string::npos;
        return s == "cpu" || s == "cuda" || numbered ? std::string()
                                                     : "expected cpu, cuda or cuda:N, found " + s;
      },
      "", "device");
  app.add_option("--device", flags.device, "cpu or cuda[:N]")->check(device)->capture_default_str();
  app.add_option("--model", flags.models, "published shapes")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--tokens", flags.tokens, "rows; over 1024 one sequence, else one token each")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  app.add_option("--verb", flags.verb, "only verbs whose name contains this");
  app.add_option("--dtype", flags.dtype, "of matrices")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}))
      ->capture_default_str();
  app.add_option("-t,--threads", flags.threads, "CPU threads (0: all cores)");
  app.add_flag("--primitives", flags.primitives, "latencies and rates of the device instead");
  CLI11_PARSE(app, argc, argv);
  try {
    return krait::bench_ops(flags);
  } catch (const krait::Error& e) {
    std::fprintf(stderr, "bench_ops: %s\n", e.what());
    return krait::exit_code(e.kind());
  }
}
