// krait bench: tokens per second of prefill and decode, as a user of the engine gets them: prefill
// includes the logits of the last token, decode includes the draw on the device and the token's way
// back to the host.
#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <vector>

#include "cli/command.h"
#include "cli/console.h"
#include "cli/json_out.h"
#include "cli/session.h"
#include "cli/version.h"
#include "model/random_weights.h"

namespace krait {

namespace {

struct BenchFlags {
  ModelFlags model;
  DeviceFlags device;
  std::string random_weights;
  std::vector<int64_t> prompts{512};
  std::vector<int64_t> batches{1};
  int64_t n_gen = 128;
  int repetitions = 5;
  std::string output = "md";
};

struct Result {
  int64_t n_prompt = 0;
  int64_t n_gen = 0;
  int64_t n_batch = 1;
  std::vector<double> seconds = {};  ///< one for each repetition

  [[nodiscard]] int64_t tokens() const { return n_batch * (n_prompt + n_gen); }
  [[nodiscard]] int64_t steps() const { return n_gen > 0 ? n_gen : 1; }
  [[nodiscard]] std::string name() const {
    return n_gen > 0 ? fmt::format("tg{}", n_gen) : fmt::format("pp{}", n_prompt);
  }
  [[nodiscard]] double rate(double s) const { return static_cast<double>(tokens()) / s; }
  [[nodiscard]] double median() const {
    std::vector<double> s = seconds;
    std::sort(s.begin(), s.end());
    const size_t h = s.size() / 2;
    return s.size() % 2 == 1 ? s[h] : (s[h - 1] + s[h]) / 2;
  }
  [[nodiscard]] double best() const { return *std::min_element(seconds.begin(), seconds.end()); }
  [[nodiscard]] double worst() const { return *std::max_element(seconds.begin(), seconds.end()); }
};

/// Runs `body` once to warm up and then `repetitions` times.
template <typename F>
std::vector<double> time(int repetitions, F&& body) {
  std::vector<double> seconds;
  for (int r = -1; r < repetitions; ++r) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const auto stop = std::chrono::steady_clock::now();
    if (r >= 0) seconds.push_back(std::chrono::duration<double>(stop - start).count());
  }
  return seconds;
}

/// Ids from all over the vocabulary, the same each time (a linear congruential generator, Knuth's
/// MMIX constants).
std::vector<int32_t> some_ids(int64_t n, int64_t vocab) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  uint64_t x = 1;
  for (int32_t& id : ids) {
    x = x * 6364136223846793005ULL + 1442695040888963407ULL;
    id = static_cast<int32_t>((x >> 33) % static_cast<uint64_t>(vocab));
  }
  return ids;
}

Result bench_prefill(Engine& engine, int64_t n, const BenchFlags& flags, int64_t vocab) {
  Result result{.n_prompt = n};
  const std::vector<int32_t> ids = some_ids(n, vocab);
  result.seconds = time(flags.repetitions, [&] {
    engine.open(0, default_sampling({}));
    engine.prefill(0, ids);
    (void)engine.receive();
  });
  return result;
}

Result bench_decode(Engine& engine, int64_t batch, const BenchFlags& flags, int64_t vocab) {
  Result result{.n_gen = flags.n_gen, .n_batch = batch};
  std::vector<int32_t> slots(static_cast<size_t>(batch));
  std::iota(slots.begin(), slots.end(), 0);
  const std::vector<int32_t> ids = some_ids(batch, vocab);
  for (const int32_t slot : slots) {
    SampleParams params = default_sampling({});
    params.sequence = static_cast<uint64_t>(slot);
    engine.open(slot, params);
    engine.prefill(slot, std::span(ids).subspan(static_cast<size_t>(slot), 1));
    (void)engine.receive();
  }
  result.seconds = time(flags.repetitions, [&] {
    engine.step(slots);
    for (int64_t i = 1; i < flags.n_gen; ++i) {
      engine.step(slots);  // one ahead, as generation does
      (void)engine.receive();
    }
    (void)engine.receive();
  });
  return result;
}

Session open_random(const BenchFlags& flags) {
  Session s;
  s.source.name = flags.random_weights + " (random weights)";
  ModelConfig config = published_config(flags.random_weights);
  s.ops = open_device(flags.device);
  const bool cuda = s.ops->backend() == "cuda";
  const DType dtype = flags.device.weight_dtype().value_or(cuda ? DType::bf16 : DType::f32);
  // The CPU uses the weights where they lie; a device gets a copy.
  s.checkpoint = make_random_checkpoint(config, dtype, /*seed=*/0,
                                        cuda ? RandomMemory::shared : RandomMemory::distinct);
  s.model = load_model(config, *s.checkpoint, *s.ops, dtype);
  return s;
}

std::string markdown(const Session& s, const BenchFlags& flags,
                     const std::vector<Result>& results) {
  std::string out = fmt::format(
      "{}; weights {}, state {}; krait {} ({}); median of {} after a warm-up, slowest to "
      "fastest\n\n",
      s.ops->info().name, dtype_name(s.model->weight_dtype()), dtype_name(flags.device.ssm_dtype()),
      version(), commit(), flags.repetitions);
  out += "| model | size | params | backend | batch | test | t/s | spread | ms/step |\n";
  out += "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: |\n";
  for (const Result& r : results) {
    out +=
        fmt::format("| {} | {} | {:.1f} M | {} | {} | {} | {:.1f} | {:.1f} - {:.1f} | {:.3f} |\n",
                    s.source.name, human_bytes(s.model->weight_bytes()),
                    static_cast<double>(s.model->parameter_count()) / 1e6, s.ops->backend(),
                    r.n_batch, r.name(), r.rate(r.median()), r.rate(r.worst()), r.rate(r.best()),
                    r.median() * 1e3 / static_cast<double>(r.steps()));
  }
  return out;
}

OrderedJson json(const Session& s, const BenchFlags& flags, const std::vector<Result>& results) {
  OrderedJson all = OrderedJson::array();
  for (const Result& r : results) {
    OrderedJson j = {{"build_commit", commit()},
                     {"build_version", version()},
                     {"device", s.ops->info().name},
                     {"backends", s.ops->backend()},
                     {"model", s.source.name},
                     {"model_size", s.model->weight_bytes()},
                     {"model_n_params", s.model->parameter_count()},
                     {"dtype", dtype_name(s.model->weight_dtype())},
                     {"state_dtype", dtype_name(flags.device.ssm_dtype())},
                     {"n_threads", flags.device.threads},
                     {"n_batch", r.n_batch},
                     {"n_prompt", r.n_prompt},
                     {"n_gen", r.n_gen},
                     {"median_ts", r.rate(r.median())},
                     {"min_ts", r.rate(r.worst())},
                     {"max_ts", r.rate(r.best())},
                     {"median_ms_per_step", r.median() * 1e3 / static_cast<double>(r.steps())}};
    for (const double seconds : r.seconds) {
      j["samples_ns"].push_back(static_cast<int64_t>(seconds * 1e9));
      j["samples_ts"].push_back(r.rate(seconds));
    }
    all.push_back(std::move(j));
  }
  return all;
}

int bench(const BenchFlags& flags, const CommonFlags& common) {
  if (!flags.random_weights.empty() && !flags.model.model.empty()) {
    throw Error(ErrorKind::usage, "-m and --random-weights exclude each other");
  }
  const Session s = flags.random_weights.empty() ? open_session(flags.model, flags.device, common)
                                                 : open_random(flags);
  const int64_t vocab = s.model->config().vocab_size;
  EngineOptions options;
  options.n_slot = *std::max_element(flags.batches.begin(), flags.batches.end());
  options.prefill_chunk = flags.device.prefill_chunk;
  options.state_dtype = flags.device.ssm_dtype();
  options.penalties = false;
  Engine engine(*s.model, *s.ops, options);

  std::vector<Result> results;
  for (const int64_t n : flags.prompts) {
    if (n > 0) results.push_back(bench_prefill(engine, n, flags, vocab));
  }
  for (const int64_t batch : flags.batches) {
    if (flags.n_gen > 0) results.push_back(bench_decode(engine, batch, flags, vocab));
  }
  write_stdout(flags.output == "json" ? dump_json(json(s, flags, results), 2)
                                      : markdown(s, flags, results));
  return 0;
}

}  // namespace

Command add_bench_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub = app.add_subcommand("bench", "Tokens per second of prefill and decode");
  auto flags = std::make_shared<BenchFlags>();
  with_env(sub->add_option("-p,--n-prompt", flags->prompts,
                           "Prompt lengths, e.g. 512,2048; 0: none (default 512)"))
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30))
      ->type_name("LIST");
  with_env(sub->add_option("-n,--n-gen", flags->n_gen, "Tokens to generate; 0: none (default 128)"))
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30))
      ->type_name("N");
  with_env(sub->add_option("-b,--batch", flags->batches,
                           "Sequences that decode together, e.g. 1,8,64 (default 1)"))
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 16))
      ->type_name("LIST");
  with_env(sub->add_option("-r,--repetitions", flags->repetitions,
                           "Timed repetitions of each test (default 5)"))
      ->check(CLI::Range(1, 1 << 20))
      ->type_name("N");
  with_env(sub->add_option("--random-weights", flags->random_weights,
                           "A model of a published shape with random weights, made in memory"))
      ->check(CLI::IsMember({"130m", "370m", "790m", "1.4b", "2.8b"}))
      ->type_name("SHAPE");
  with_env(sub->add_option("-o,--output", flags->output, "md (default) or json"))
      ->check(CLI::IsMember({"md", "json"}))
      ->type_name("FORMAT");
  add_model_flags(*sub, flags->model);
  add_device_flags(*sub, flags->device);
  add_common_flags(*sub, common);
  return {sub, [flags, &common] { return bench(*flags, common); }};
}

}  // namespace krait
