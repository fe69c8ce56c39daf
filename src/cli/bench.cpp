// krait bench: tokens per second of prefill and decode, as a user of the engine gets them: prefill
// includes the logits of the last token, decode includes the draw on the device and the token's way
// back to the host. Beside each rate stands its share of the floor: what the bytes and flops that
// the step can't avoid take at the ceilings of this device, measured in the same run.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include "base/log.h"
#include "base/stats.h"
#include "cli/bench_result.h"
#include "cli/command.h"
#include "cli/console.h"
#include "cli/plot.h"
#include "cli/session.h"

namespace krait {

namespace {

constexpr double kWideSpread = 0.03;

struct BenchFlags {
  std::vector<std::string> models;
  std::vector<std::string> random_weights;
  DeviceFlags device;  ///< but its dtypes, which are lists here
  DTypeLists dtypes;
  std::vector<int64_t> prompts{512};
  std::vector<int64_t> batches{1};
  std::vector<std::string> mixed;
  float temperature = 0;
  int64_t n_gen = 128;
  int repetitions = 5;
  double warm_up = 1;  ///< seconds, at least; up to twice as many
  bool no_ceilings = false;
  std::string output = "md";
  std::string plot;
};

// ---- one test -----------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct WarmedUp {
  double once;  ///< seconds of the shortest run
  bool steady;
};

/// Runs `body` until the device works as it will go on working.
///
/// The first runs are no measure: kernels are loaded in the first and launches captured in the
/// second. So there are kFirst of them, unless they are long. Then come windows, at least `least`
/// seconds of them: a GPU that has idled, or did something lighter, runs heavy work at its highest
/// clock until its limit of power takes hold. Where that limit rules, the clock goes on swinging by
/// some percent around what the limit allows, about once a second on an H100: then the windows
/// don't agree, however long one waits.
template <typename F>
WarmedUp warm_up(double least, F&& body) {
  constexpr int kFirst = 4;
  constexpr double kFirstSeconds = 0.1;
  constexpr double kLong = 0.5;
  constexpr double kWindow = 0.25;
  constexpr size_t kWindows = 4;  // that must agree
  constexpr double kAgree = 0.01;
  constexpr double kMost = 2;
  double once = std::numeric_limits<double>::infinity();
  const auto run = [&] {
    const auto start = Clock::now();
    body();
    const double took = seconds_since(start);
    once = std::min(once, took);
    return took;
  };
  double spent = 0;
  for (int n = 0; spent < kFirstSeconds || (n < kFirst && spent < kLong); ++n) spent += run();
  if (spent >= kMost * least) return {once, true};

  std::vector<double> windows;  // mean seconds of a run in each of the last
  const auto agree = [&] {
    return windows.size() == kWindows && relative_range(windows) <= kAgree;
  };
  for (spent = 0; spent < least || (spent < kMost * least && !agree());) {
    double window = 0;
    int n = 0;
    for (; window < kWindow; ++n) window += run();
    if (windows.size() == kWindows) windows.erase(windows.begin());
    windows.push_back(window / n);
    spent += window;
  }
  return {once, agree()};
}

/// Fills in the row's seconds: `body`, `repetitions` times after a warm-up. A repetition takes in
/// a pause of the host and, where the clock swings, its whole swing: with as many bodies as that
/// needs. `body` returns the seconds until each sequence had its first token.
template <typename F>
void time(BenchRow& row, const BenchFlags& flags, Ops& op, F&& body) {
  constexpr double kSteady = 0.2;
  constexpr double kSwinging = 1;
  const WarmedUp warm = warm_up(flags.warm_up, body);
  const double sample = warm.steady ? kSteady : kSwinging;
  const int times = std::max(1, static_cast<int>(std::ceil(sample / warm.once)));
  for (int r = 0; r < flags.repetitions; ++r) {
    double first_token = 0;
    op.start_core_clock();
    const auto start = Clock::now();
    for (int i = 0; i < times; ++i) first_token += body();
    row.seconds.push_back(seconds_since(start) / times);
    if (row.test.n_prompt > 0) row.first_token.push_back(first_token / times);
    if (const double clock = op.mean_core_clock(); clock > 0) row.clock.push_back(clock);
  }
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

/// Runs tests of one model and state type. The engine is kept from test to test while the batch
/// stays the same, so that a batch that does not fit the device costs only its own tests.
class Runner {
 public:
  Runner(const Session& session, const BenchFlags& flags, DType state)
      : model_(*session.model), op_(*session.ops), flags_(flags), state_(state) {}

  void run(BenchRow& row) {
    const BenchTest& t = row.test;
    Engine& engine = engine_for(t.n_batch);
    const std::vector<int32_t> ids =
        some_ids(t.n_batch * std::max<int64_t>(t.n_prompt, 1), model_.config().vocab_size);
    if (t.n_prompt == 0) start(engine, ids, 1);
    time(row, flags_, op_, [&] {
      double first_token = 0;
      if (t.n_prompt > 0) {
        const auto begin = Clock::now();
        start(engine, ids, t.n_prompt);
        first_token = seconds_since(begin);
      }
      decode(engine, t.n_steps());
      return first_token;
    });
    if (t.n_prompt > 0 && t.n_batch == 1) row.logits_hash = hash_logits(engine, ids, t.n_prompt);
  }

 private:
  Engine& engine_for(int64_t batch) {
    if (batch == batch_) return *engine_;
    engine_.reset();  // its memory goes before the next one's comes
    batch_ = 0;
    EngineOptions options;
    options.n_slot = batch;
    options.prefill_chunk = flags_.device.prefill_chunk;
    options.state_dtype = state_;
    options.state_rounding = flags_.device.ssm_rounding();
    options.penalties = false;
    engine_ = std::make_unique<Engine>(model_, op_, options);
    batch_ = batch;
    slots_.resize(static_cast<size_t>(batch));
    std::iota(slots_.begin(), slots_.end(), 0);
    return *engine_;
  }

  /// Opens every sequence and feeds it `n_prompt` of the ids; returns when each has a token.
  void start(Engine& engine, const std::vector<int32_t>& ids, int64_t n_prompt) {
    const auto n = static_cast<size_t>(n_prompt);
    std::vector<PrefillRequest> requests;
    for (const int32_t slot : slots_) {
      SampleParams params = default_sampling({});
      params.temperature = flags_.temperature;
      params.sequence = static_cast<uint64_t>(slot);
      engine.open(slot, params);
      requests.push_back({slot, std::span(ids).subspan(static_cast<size_t>(slot) * n, n)});
    }
    engine.prefill(requests);
    (void)engine.receive();
  }

  /// Of the prompt's last token, computed once more: the same on each run of the same build.
  std::string hash_logits(Engine& engine, const std::vector<int32_t>& ids, int64_t n_prompt) {
    engine.keep_logits(true);
    start(engine, ids, n_prompt);
    const std::span<const float> logits = engine.logits();
    engine.keep_logits(false);
    return fmt::format("{:016x}", XXH3_64bits(logits.data(), logits.size_bytes()));
  }

  void decode(Engine& engine, int64_t n) {
    if (n == 0) return;
    engine.step(slots_);
    for (int64_t i = 1; i < n; ++i) {
      engine.step(slots_);  // one ahead, as generation does
      (void)engine.receive();
    }
    (void)engine.receive();
  }

  const Model& model_;
  Ops& op_;
  const BenchFlags& flags_;
  DType state_;
  int64_t batch_ = 0;
  std::unique_ptr<Engine> engine_;
  std::vector<int32_t> slots_;
};

// ---- floors -------------------------------------------------------------------------------------

/// The ceilings of the device, each measured when it is first asked for.
class Ceilings {
 public:
  explicit Ceilings(const BenchFlags& flags) : flags_(flags) {}

  /// Before the first model takes the memory.
  void measure() {
    if (flags_.no_ceilings) return;
    or_without([&] { memory_ = measure_memory(*open_device(flags_.device)); });
  }

  /// Fills in the row's work and floor. The steps of a mixed test add up.
  void apply(BenchRow& row, const Model& model, Ops& op) {
    const ModelConfig& c = model.config();
    const BenchTest& t = row.test;
    const WorkTypes types{row.model.dtype, op.activation_dtype(row.model.dtype),
                          row.model.state_dtype};
    const Work prompt = t.n_prompt > 0 ? prefill_work(c, types, t.n_batch, t.n_prompt) : Work{};
    const Work step = decode_work(c, types, t.n_batch);
    row.work = prompt;
    *row.work += t.n_steps() * step;
    if (!memory_) return;
    if (!products_.contains(types.weights)) {
      or_without([&] { products_[types.weights] = measure_product(op, types.weights); });
      if (!memory_) return;
    }
    const double bytes = memory_->copy;
    const double flops = products_[types.weights];
    row.floor = {*memory_, flops,
                 floor_seconds(prompt, bytes, flops) +
                     static_cast<double>(t.n_steps()) * floor_seconds(step, bytes, flops)};
  }

 private:
  /// The rates can be measured without the ceilings, so a device too full for these is no failure.
  template <typename F>
  void or_without(F&& measure_one) {
    try {
      measure_one();
    } catch (const Error& e) {
      memory_.reset();
      spdlog::warn("no share of the floor: {}", e.message());
    }
  }

  const BenchFlags& flags_;
  std::optional<MemoryCeiling> memory_;
  std::map<DType, double> products_;
};

// ---- the whole ----------------------------------------------------------------------------------

/// One line on stderr that says what is being measured: wiped on a terminal, kept elsewhere.
class Progress {
 public:
  Progress(size_t total, bool quiet)
      : total_(total), quiet_(quiet), terminal_(stderr_is_terminal()) {}
  ~Progress() { wipe(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void next(const std::string& what) {
    ++done_;
    if (quiet_) return;
    if (terminal_) {
      wipe();
      fmt::print(stderr, "[{}/{}] {}", done_, total_, what);
      drawn_ = true;
    } else {
      spdlog::info("[{}/{}] {}", done_, total_, what);
    }
  }
  void skip(size_t n) { done_ += n; }
  void wipe() {
    if (drawn_) fmt::print(stderr, "\r\x1b[K");
    drawn_ = false;
  }

 private:
  size_t total_;
  size_t done_ = 0;
  bool quiet_;
  bool terminal_;
  bool drawn_ = false;
};

std::string now_utc() {
  const std::time_t t = std::time(nullptr);
  std::tm tm{};
  gmtime_r(&t, &tm);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &tm);
  return text;
}

std::vector<BenchTest> planned_tests(const BenchFlags& flags) {
  std::vector<BenchTest> tests;
  for (const int64_t n : flags.prompts) {
    if (n > 0) tests.push_back({n, 0, 1});
  }
  for (const int64_t batch : flags.batches) {
    if (flags.n_gen > 0) tests.push_back({0, flags.n_gen, batch});
  }
  for (const std::string& pair : flags.mixed) {
    const std::vector<int32_t> n = parse_ids(pair);
    if (n.size() != 2 || n[0] < 1 || n[1] < 1) {
      throw Error(
          ErrorKind::usage,
          fmt::format("-pg: expected two numbers above 0 such as 2048,128, found \"{}\"", pair));
    }
    for (const int64_t batch : flags.batches) tests.push_back({n[0], n[1], batch});
  }
  if (tests.empty()) throw Error(ErrorKind::usage, "-p, -n and -pg leave nothing to measure");
  return tests;
}

class Bench {
 public:
  Bench(const BenchFlags& flags, const CommonFlags& common)
      : flags_(flags),
        common_(common),
        tests_(planned_tests(flags)),
        ceilings_(flags),
        models_(flags.random_weights.empty() ? flags.models : flags.random_weights),
        rows_of_a_load_(tests_.size() * flags.dtypes.state.size()),
        planned_(models_.size() * flags.dtypes.weights.size() * rows_of_a_load_),
        progress_(planned_, common.quiet) {}

  int run() {
    if (!flags_.plot.empty()) require_plotting(flags_.plot);
    machine_ = describe_machine();
    writer_ = make_bench_writer(flags_.output, machine_, [this](std::string_view text) {
      progress_.wipe();
      write_stdout(text);
    });
    ceilings_.measure();
    for (const std::string& model : models_) {
      for (const std::string& dtype : flags_.dtypes.weights) measure(model, dtype);
    }
    progress_.wipe();
    if (n_measured_ == 0) {
      throw Error(first_failure_, fmt::format("none of the {} tests could be run", planned_));
    }
    writer_->end();
    if (!flags_.plot.empty()) plot_bench(dump_json(plotted_), flags_.plot);
    return n_failed_ == 0 ? 0 : exit_code(first_failure_);
  }

 private:
  [[nodiscard]] BenchMachine describe_machine() const {
    const auto op = open_device(flags_.device);
    const std::string processor = make_cpu_ops(1, /*fast=*/false)->info().processor;
    return {std::string(op->backend()), op->info(), processor, flags_.device.threads,
            flags_.repetitions};
  }

  /// All tests of one model with weights of one type.
  void measure(const std::string& name, const std::string& dtype) {
    DeviceFlags device = flags_.device;
    device.dtype = dtype;
    const std::string title = flags_.random_weights.empty() && !name.empty() ? name
                              : name.empty()                                 ? "the shipped model"
                                             : name + " (random weights)";
    Session session;
    try {
      session = flags_.random_weights.empty() ? open_session({name, {}}, device, common_)
                                              : open_random_session(name, device);
    } catch (const Error& e) {
      fail(e, title, rows_of_a_load_);
      progress_.skip(rows_of_a_load_);
      return;
    }
    const Model& model = *session.model;
    BenchRow row;
    row.model = {session.source.name,
                 session.source.checkpoint.string(),
                 model.config().family,
                 model.weight_bytes(),
                 model.parameter_count(),
                 model.weight_dtype(),
                 DType::f32,
                 "",
                 session.load_seconds};
    for (const std::string& state : flags_.dtypes.state) {
      device.state_dtype = state;
      row.model.state_dtype = device.ssm_dtype();
      row.model.state_rounding = row.model.state_dtype == DType::f32 ? "" : device.state_rounding;
      Runner runner(session, flags_, row.model.state_dtype);
      for (const BenchTest& test : tests_) {
        row.test = test;
        measure(row, runner, session);
      }
    }
  }

  void measure(BenchRow row, Runner& runner, const Session& session) {
    const std::string title =
        fmt::format("{} {}, state {}: {}, batch {}", row.model.name, dtype_name(row.model.dtype),
                    dtype_name(row.model.state_dtype), row.test.name(), row.test.n_batch);
    progress_.next(title);
    row.time = now_utc();
    try {
      ceilings_.apply(row, *session.model, *session.ops);
      runner.run(row);
    } catch (const Error& e) {
      fail(e, title, 1);
      row.error = e.message();
    }
    if (row.error.empty()) {
      ++n_measured_;
      if (row.spread() > kWideSpread) {
        progress_.wipe();
        spdlog::warn("{}: the repetitions lie {:.1f}% apart, over {:.0f}%: is the device busy?",
                     title, 100 * row.spread(), 100 * kWideSpread);
      }
    }
    emit(row);
  }

  void emit(const BenchRow& row) {
    // Rows that failed wait for the first that did not: without one nothing goes to stdout.
    if (n_measured_ == 0) return waiting_.push_back(row);
    for (const BenchRow& r : std::exchange(waiting_, {})) emit(r);
    writer_->row(row);
    if (!flags_.plot.empty()) plotted_.push_back(bench_json(machine_, row));
  }

  /// One sentence for `n` rows; the only thing there was to do ends the program with it.
  void fail(const Error& e, const std::string& title, size_t n) {
    if (n == planned_) throw e;
    if (n_failed_ == 0) first_failure_ = e.kind();
    n_failed_ += n;
    progress_.wipe();
    spdlog::error("{}: {}", title, e.message());
  }

  const BenchFlags& flags_;
  const CommonFlags& common_;
  std::vector<BenchTest> tests_;
  Ceilings ceilings_;
  std::vector<std::string> models_;
  size_t rows_of_a_load_;
  size_t planned_;
  Progress progress_;
  BenchMachine machine_;
  std::unique_ptr<BenchWriter> writer_;
  std::vector<BenchRow> waiting_;
  OrderedJson plotted_ = OrderedJson::array();
  size_t n_measured_ = 0;
  size_t n_failed_ = 0;
  ErrorKind first_failure_ = ErrorKind::runtime;
};

int bench(BenchFlags flags, const CommonFlags& common) {
  if (!flags.random_weights.empty() && !flags.models.empty()) {
    throw Error(ErrorKind::usage, "-m and --random-weights exclude each other");
  }
  if (flags.models.empty()) flags.models.emplace_back();  // the one that ships
  return Bench(flags, common).run();
}

}  // namespace

Command add_bench_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub = app.add_subcommand("bench", "Tokens per second of prefill and decode");
  auto flags = std::make_shared<BenchFlags>();
  with_env(sub->add_option("-m,--model", flags->models,
                           "Model as for run; repeatable (default: the one that ships with krait)"))
      ->allow_extra_args(false)
      ->type_name("MODEL");
  with_env(sub->add_option("--random-weights", flags->random_weights,
                           "Models of published shapes with random weights, made in memory, e.g. "
                           "130m,2.8b"))
      ->delimiter(',')
      ->type_name("LIST");
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
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("LIST");
  with_env(sub->add_option("--n-prompt-gen", flags->mixed,
                           "Also -pg: each sequence is fed P tokens, then generates N; repeatable"))
      ->allow_extra_args(false)
      ->type_name("P,N");
  with_env(sub->add_option("--temp,--temperature", flags->temperature,
                           "Of sampling; with one above 0 come top-k 40, top-p 0.95 and min-p 0.05 "
                           "(default 0: greedy)"))
      ->check(CLI::Range(0.0F, 100.0F))
      ->type_name("T");
  with_env(sub->add_option("-r,--repetitions", flags->repetitions,
                           "Timed repetitions of each test (default 5)"))
      ->check(CLI::Range(1, 1 << 20))
      ->type_name("N");
  with_env(sub->add_option("--warmup", flags->warm_up,
                           "Seconds that each test runs before it is timed (default 1); twice as "
                           "long where its speed keeps changing by more than 1%, and then a "
                           "repetition lasts a second"))
      ->check(CLI::Range(0.0, 3600.0))
      ->type_name("SECONDS");
  with_env(sub->add_flag("--no-ceilings", flags->no_ceilings,
                         "Don't measure what the device can do; no share of the floor"));
  with_env(sub->add_option("-o,--output", flags->output, "md (default), json, jsonl or csv"))
      ->check(CLI::IsMember({"md", "json", "jsonl", "csv"}))
      ->type_name("FORMAT");
  with_env(sub->add_option("--plot", flags->plot,
                           "Also draw the throughput (needs python3 with matplotlib)"))
      ->type_name("FILE.png|svg");
  add_backend_flags(*sub, flags->device);
  add_dtype_lists(*sub, flags->dtypes);
  add_common_flags(*sub, common);
  return {sub, [flags, &common] { return bench(*flags, common); }};
}

}  // namespace krait
