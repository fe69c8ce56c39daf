// state_drift: what a 16-bit state costs over a long text. The text goes through the model token by
// token, so that the state is rounded after every token as in decoding, once with the state in f32
// and once for each other type; the next-token distributions are compared at every position.
//
//   state_drift -m MODEL --text FILE [--tokens 100000] [--device cuda]
//               [--state bf16,bf16-stochastic,f16,f16-stochastic]
//
// Prints, for each tenth of the text and for all of it: the perplexity of the text, the mean KL
// divergence from the f32 state's distribution (nats), and how often the most likely token is the
// same. Drift would show as figures that grow from tenth to tenth.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <span>
#include <string>
#include <vector>

#include "cli/session.h"
#include "runtime/engine.h"

namespace krait {
namespace {

constexpr int64_t kRows = 500;  // positions compared at a time

struct Flags {
  std::string model, text;
  int64_t tokens = 100000;
  std::vector<std::string> states{"bf16", "bf16-stochastic", "f16", "f16-stochastic"};
  DeviceFlags device;
};

/// Sums over positions.
struct Sums {
  double nll = 0;  // of the next token of the text
  double kl = 0;
  int64_t same = 0;
  int64_t n = 0;

  Sums& operator+=(const Sums& o) {
    nll += o.nll, kl += o.kl, same += o.same, n += o.n;
    return *this;
  }
};

/// log softmax of a row, in place of it.
void log_softmax(float* row, int64_t n) {
  const float top = *std::max_element(row, row + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(row[i] - top));
  const auto shift = static_cast<float>(top + std::log(sum));
  for (int64_t i = 0; i < n; ++i) row[i] -= shift;
}

Sums compare(const std::vector<float>& want, const std::vector<float>& got,
             std::span<const int32_t> next, int64_t vocab) {
  Sums s;
  for (size_t t = 0; t < next.size(); ++t) {
    const float* p = want.data() + static_cast<int64_t>(t) * vocab;
    const float* q = got.data() + static_cast<int64_t>(t) * vocab;
    s.nll -= q[next[t]];
    for (int64_t i = 0; i < vocab; ++i) s.kl += std::exp(double{p[i]}) * (double{p[i]} - q[i]);
    s.same += std::max_element(p, p + vocab) - p == std::max_element(q, q + vocab) - q ? 1 : 0;
    ++s.n;
  }
  return s;
}

void print(const std::string& state, int64_t begin, const Sums& s) {
  const auto n = static_cast<double>(s.n);
  std::printf("| %-15s | %7ld | %7ld | %10.4f | %9.2e | %7.3f%% |\n", state.c_str(),
              static_cast<long>(begin), static_cast<long>(begin + s.n), std::exp(s.nll / n),
              s.kl / n, 100.0 * static_cast<double>(s.same) / n);
  std::fflush(stdout);
}

int state_drift(const Flags& flags) {
  ModelFlags model;
  model.model = flags.model;
  const Session session = open_session(model, flags.device, CommonFlags{});
  const int64_t vocab = session.model->config().vocab_size;
  std::vector<int32_t> ids = session.require_tokenizer().encode(read_text(flags.text));
  ids.resize(std::min(ids.size(), static_cast<size_t>(flags.tokens) + 1));
  const int64_t n = std::ssize(ids) - 1;
  if (n < 10) throw Error(ErrorKind::usage, flags.text + " has fewer than ten tokens");

  std::vector<std::string> names{"f32"};
  names.insert(names.end(), flags.states.begin(), flags.states.end());
  std::deque<Engine> engines;  // not movable
  for (const std::string& name : names) {
    EngineOptions options;
    options.prefill_chunk = 1;
    options.state_dtype = parse_dtype(name.substr(0, name.find('-')));
    options.state_rounding =
        name.ends_with("-stochastic") ? Rounding::stochastic : Rounding::nearest;
    options.penalties = false;
    engines.emplace_back(*session.model, *session.ops, options);
    engines.back().open(0, SampleParams{});
  }
  std::printf("| state | from | to | perplexity | mean KL | top-1 equal |\n");
  std::printf("| --- | ---: | ---: | ---: | ---: | ---: |\n");
  std::vector<Sums> all(names.size());
  std::vector<std::vector<float>> rows(names.size());
  for (int tenth = 0; tenth < 10; ++tenth) {
    const int64_t from = n * tenth / 10;
    const int64_t to = n * (tenth + 1) / 10;
    std::vector<Sums> part(names.size());
    for (int64_t begin = from; begin < to; begin += kRows) {
      const auto count = static_cast<size_t>(std::min(kRows, to - begin));
      const std::span<const int32_t> now(ids.data() + begin, count);
      const std::span<const int32_t> next(ids.data() + begin + 1, count);
      for (size_t i = 0; i < engines.size(); ++i) {
        rows[i].clear();
        engines[i].prefill(0, now, false, [&](int64_t, int64_t n_rows, const float* logits) {
          rows[i].insert(rows[i].end(), logits, logits + n_rows * vocab);
        });
        for (size_t t = 0; t < count; ++t) {
          log_softmax(rows[i].data() + static_cast<int64_t>(t) * vocab, vocab);
        }
        part[i] += compare(rows[0], rows[i], next, vocab);
      }
    }
    for (size_t i = 0; i < names.size(); ++i) {
      print(names[i], from, part[i]);
      all[i] += part[i];
    }
  }
  for (size_t i = 0; i < names.size(); ++i) print(names[i], 0, all[i]);
  return 0;
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) try {
  CLI::App app("What a 16-bit state costs over a long text.");
  krait::Flags flags;
  app.add_option("-m,--model", flags.model, "folder, file or org/name")->required();
  app.add_option("--text", flags.text, "UTF-8 text")->required()->check(CLI::ExistingFile);
  app.add_option("--tokens", flags.tokens, "at most")->check(CLI::Range(10, 100000000));
  app.add_option("--state", flags.states, "types and roundings to compare with f32")
      ->delimiter(',')
      ->check(CLI::IsMember({"bf16", "bf16-stochastic", "f16", "f16-stochastic"}));
  app.add_option("--device", flags.device.device, "auto, cpu, cuda or cuda:N");
  app.add_option("--dtype", flags.device.dtype, "of the weights: auto, f32, bf16, f16");
  app.add_option("-t,--threads", flags.device.threads, "CPU threads (0: all cores)");
  CLI11_PARSE(app, argc, argv);
  return krait::state_drift(flags);
} catch (const krait::Error& e) {
  std::fprintf(stderr, "state_drift: %s\n", e.what());
  return krait::exit_code(e.kind());
} catch (const std::exception& e) {
  std::fprintf(stderr, "state_drift: %s\n", e.what());
  return 1;
}
