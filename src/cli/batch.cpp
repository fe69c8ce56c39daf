// krait batch: a file of prompts through continuous batching.
//
// One thread reads and tokenizes lines ahead of the devices; each device has a thread with an
// engine of its own, and all take their jobs from the same queue. Answers are written as they come.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <memory>
#include <span>
#include <thread>

#include "base/output_file.h"
#include "cli/batch_flags.h"
#include "cli/batch_input.h"
#include "cli/batch_jobs.h"
#include "cli/batch_output.h"
#include "cli/batch_queue.h"
#include "cli/batch_status.h"
#include "cli/command.h"
#include "cli/console.h"
#include "cli/json_out.h"
#include "cli/session.h"
#include "cli/version.h"
#include "runtime/continuous.h"

namespace krait {

namespace {

using Clock = std::chrono::steady_clock;

/// "cuda:0,1" as "cuda:0", "cuda:1".
std::vector<std::string> devices(const std::string& list) {
  std::vector<std::string> all;
  size_t begin = 0;
  while (begin <= list.size()) {
    const size_t end = std::min(list.find(',', begin), list.size());
    std::string item = list.substr(begin, end - begin);
    if (item.find_first_not_of("0123456789") == std::string::npos) item.insert(0, "cuda:");
    all.push_back(std::move(item));
    begin = end + 1;
  }
  return all;
}

Asked asked_of(const BatchRequest& r, int64_t line) {
  return {line, r.format, r.id, r.has_id, r.id_is_number, r.chat, r.model};
}
Asked asked_of(const BadLine& bad, int64_t line) {
  return {line, bad.format, bad.id, bad.has_id, bad.id_is_number, false, {}};
}

class BatchCommand {
 public:
  BatchCommand(const BatchFlags& flags, const CommonFlags& common)
      : flags_(flags),
        common_(common),
        shard_(parse_shard(flags.shard)),
        devices_(devices(flags.device.device)) {
    if (flags.input.empty() || flags.output.empty()) {
      throw Error(ErrorKind::usage, "-i and -o are expected: the prompts and where the answers go",
                  "krait batch -i prompts.jsonl -o answers.jsonl; - is stdin and stdout");
    }
    if (flags.score && (flags.sampling.logprobs || !flags.sampling.stops.empty())) {
      throw Error(ErrorKind::usage, "--score draws nothing: --logprobs and --stop have no use");
    }
  }

  int run() {
    // What can be wrong with the files is found before the model is loaded.
    LineReader input(flags_.input, [] { return InterruptGuard::requested(); });
    Answers answers(flags_);
    answers.resume();
    if (flags_.shared_prefix == "auto" && !input.is_file()) {
      throw Error(ErrorKind::usage, "--shared-prefix auto needs a file that can be read twice",
                  "give the prefix in a file of its own");
    }
    std::optional<OutputFile> summary;
    if (!flags_.summary.empty()) summary.emplace(flags_.summary);

    const Session session = open(devices_[0], common_);
    const JobMaker maker(flags_, session);
    const InterruptGuard interrupt;
    const Survey survey = first_pass(maker, answers, input.is_file());
    if (InterruptGuard::requested()) return kExitInterrupted;
    const std::vector<int32_t> prefix = shared_prefix(maker, survey);

    const auto start = Clock::now();
    JobQueue queue(256);
    std::deque<BatchProgress> progress(devices_.size());
    std::vector<std::thread> threads;
    {
      const BatchStatus status(!common_.quiet, input.is_file() ? survey.n_line : -1, answers,
                               progress);
      threads.emplace_back([&] { guarded(queue, [&] { produce(maker, input, answers, queue); }); });
      for (size_t i = 1; i < devices_.size(); ++i) {
        threads.emplace_back([&, i] {
          guarded(queue, [&] {
            // A CUDA device belongs to the thread that works with it.
            CommonFlags silent = common_;  // one bar is enough
            silent.quiet = true;
            const Session own = open(devices_[i], silent);
            work(own, session, survey, prefix, answers, queue, progress[i]);
          });
        });
      }
      guarded(queue, [&] { work(session, session, survey, prefix, answers, queue, progress[0]); });
      for (std::thread& t : threads) t.join();
    }
    queue.rethrow();
    answers.sync();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const OrderedJson s = summarise(session, answers, progress, prefix, seconds);
    report(s, answers);
    if (summary) {
      const std::string text = dump_json(s, 2);
      summary->write(std::as_bytes(std::span(text)));
      summary->commit();
    }
    if (InterruptGuard::requested()) return kExitInterrupted;
    constexpr int kExitFailedLines = 6;
    return answers.failures() + answers.n_failed_before() > 0 ? kExitFailedLines : 0;
  }

 private:
  [[nodiscard]] Session open(const std::string& device, const CommonFlags& common) const {
    DeviceFlags d = flags_.device;
    d.device = device;
    return flags_.random_weights.empty() ? open_session(flags_.model, d, common)
                                         : open_random_session(flags_.random_weights, d);
  }

  /// Runs one thread's share; its failure ends all.
  template <typename F>
  static void guarded(JobQueue& queue, F&& f) {
    try {
      f();
    } catch (...) {
      queue.stop(std::current_exception());
    }
  }

  [[nodiscard]] bool asked(int64_t line, const Answers& answers) const {
    return shard_.has(line) && !answers.is_done(line);
  }

  [[noreturn]] void fail_strictly(const BadLine& bad, int64_t line) const {
    throw Error(ErrorKind::format, fmt::format("{}, line {}: {}", flags_.input, line, bad.message),
                "without --strict such lines go to the error file, and the rest is done");
  }

  /// Reads a whole file once, so that bad lines are known before the first token. A stream can't
  /// be: it gets room for what it may bring.
  [[nodiscard]] Survey first_pass(const JobMaker& maker, const Answers& answers,
                                  bool is_file) const {
    Survey s;
    if (!is_file) {
      s.n_sequence = std::numeric_limits<int64_t>::max();
      s.penalties = !flags_.score;
      s.window = EngineOptions{}.max_seen_window;
      s.n_bias = 1100;
      return s;
    }
    LineReader in(flags_.input, [] { return InterruptGuard::requested(); });
    RequestReader reader(maker.rules(), [&](const BatchRequest& r) { maker.check(r); });
    constexpr int64_t kMostReported = 10;
    std::string line;
    while (!InterruptGuard::requested() && in.next(line)) {
      try {
        const std::optional<BatchRequest> r = reader.read(line, in.number());
        if (!r || !asked(in.number(), answers)) continue;
        ++s.n_line;
        maker.survey(*r, in.number(), s);
      } catch (const BadLine& bad) {
        if (!asked(in.number(), answers)) continue;
        if (flags_.strict) fail_strictly(bad, in.number());
        ++s.n_line;
        if (s.n_bad++ < kMostReported) {
          spdlog::warn("{}, line {}: {}", flags_.input, in.number(), bad.message);
        }
      }
    }
    if (s.n_bad > kMostReported) spdlog::warn("... and {} more", s.n_bad - kMostReported);
    return s;
  }

  [[nodiscard]] std::vector<int32_t> shared_prefix(const JobMaker& maker, const Survey& s) const {
    if (flags_.shared_prefix.empty()) return {};
    BatchText text = s.common;
    if (flags_.shared_prefix != "auto") {
      text = {};
      text.text = read_text(flags_.shared_prefix);
      require_utf8(text.text, "the shared prefix");
    }
    std::vector<int32_t> ids = maker.prefix_ids(std::move(text), s);
    spdlog::debug("shared prefix: {} tokens", ids.size());
    return ids;
  }

  void produce(const JobMaker& maker, LineReader& in, Answers& answers, JobQueue& queue) const {
    RequestReader reader(maker.rules(), [&](const BatchRequest& r) { maker.check(r); });
    std::string line;
    while (!queue.stopping() && in.next(line)) {
      const int64_t number = in.number();
      BadLine bad;
      Asked who;
      try {
        const std::optional<BatchRequest> r = reader.read(line, number);
        if (!r || !asked(number, answers)) continue;
        who = asked_of(*r, number);
        BatchJob job = maker.make(*r, number);
        answers.expect(number, [&] { return queue.stopping(); });
        if (!queue.put(std::move(who), std::move(job))) return;
        continue;
      } catch (const BadLine& b) {
        if (!asked(number, answers)) continue;
        bad = b;
        who = asked_of(b, number);
      } catch (const Error& e) {
        if (e.kind() != ErrorKind::usage) throw;
        bad.message = e.message();
      }
      if (flags_.strict) fail_strictly(bad, number);
      if (!in.is_file()) spdlog::warn("{}, line {}: {}", flags_.input, number, bad.message);
      answers.expect(number, [&] { return queue.stopping(); });
      answers.write_failure(number, failure_line(who, bad.message));
    }
    queue.close();
  }

  [[nodiscard]] EngineOptions engine_options(const Session& session, const Session& first,
                                             const Survey& survey, bool prefix) const {
    EngineOptions o;
    // The scheduler gathers prompts for a chunk, and sequences that are under way wait for it:
    // nothing larger was measured for batches.
    constexpr int64_t kLargestChunk = 4096;
    o.prefill_chunk = flags_.device.prefill_chunk;
    if (o.prefill_chunk == 0) {
      o.prefill_chunk =
          std::min(kLargestChunk, default_prefill_chunk(session.model->config(), *session.ops,
                                                        session.model->weight_dtype()));
    }
    o.state_dtype = flags_.device.ssm_dtype();
    o.state_rounding = flags_.device.ssm_rounding();
    o.penalties = survey.penalties;
    o.max_seen_window = survey.window;
    o.max_bias = survey.n_bias;
    o.scoring = flags_.score;
    // A changing number of sequences would make a backend remember very many steps.
    o.pad_steps = session.ops->backend() != "cpu";
    if (first.tokenizer) o.vocab_limit = first.tokenizer->vocab_size();

    // As many slots as there is work for and memory allows, up to where more no longer help: the
    // state of a slot is read and written in each step, so beyond some hundreds the weights hardly
    // count.
    const int64_t cap = session.ops->backend() == "cpu" ? 32 : 1024;
    constexpr int64_t kMostSlots = 8192;
    int64_t n = flags_.max_batch > 0 ? std::min(flags_.max_batch, kMostSlots) : cap;
    n = std::clamp<int64_t>(survey.n_sequence, 1, n);
    if (prefix) ++n;
    const ModelConfig& config = session.model->config();
    const auto bytes = [&](int64_t n_slot) {
      EngineOptions wanted = o;
      wanted.n_slot = n_slot;
      const EngineMemory m =
          plan_memory(config, *session.ops, session.model->weight_dtype(), wanted);
      const auto rows = static_cast<size_t>(survey.logprobs ? n_slot * config.vocab_rows : 0);
      return m.state + m.activations + rows * sizeof(float);
    };
    // The rest is for libraries and captured steps.
    const auto available = static_cast<size_t>(
        static_cast<double>(session.ops->info().memory_free) * 0.9 /
        static_cast<double>(session.ops->backend() == "cpu" ? devices_.size() : 1));
    int64_t least = 1;
    if (bytes(n) > available && flags_.max_batch == 0) {
      while (least + 1 < n) {
        const int64_t middle = (least + n) / 2;
        (bytes(middle) <= available ? least : n) = middle;
      }
      n = least;
    }
    o.n_slot = n;
    spdlog::debug("{}: {} sequences at once, {}", session.ops->info().name, n,
                  human_bytes(bytes(n)));
    return o;
  }

  void work(const Session& session, const Session& first, const Survey& survey,
            const std::vector<int32_t>& prefix, Answers& answers, JobQueue& queue,
            BatchProgress& progress) const {
    const EngineOptions options = engine_options(session, first, survey, !prefix.empty());
    Engine engine(*session.model, *session.ops, options);
    const Tokenizer* tokenizer = first.tokenizer.get();
    const AnswerStyle style{first.source.name, tokenizer, flags_.print_ids};
    run_continuous(
        engine, tokenizer, {options.n_slot, prefix}, queue,
        [&](const BatchResult& result) {
          const int64_t line = result.job.key;
          answers.write(line, answer_line(queue.answered(line), result, style));
        },
        [&] { return queue.stopping(); }, progress);
  }

  [[nodiscard]] OrderedJson summarise(const Session& session, const Answers& answers,
                                      const std::deque<BatchProgress>& progress,
                                      const std::vector<int32_t>& prefix, double seconds) const {
    int64_t prompt = 0;
    int64_t generated = 0;
    OrderedJson engines = OrderedJson::array();
    for (size_t i = 0; i < progress.size(); ++i) {
      const BatchProgress& p = progress[i];
      prompt += p.prompt_tokens;
      generated += p.generated_tokens;
      const double steps = std::max<double>(1, static_cast<double>(p.decode_steps));
      engines.push_back(
          {{"device", devices_[i]},
           {"prompt_tokens", p.prompt_tokens.load()},
           {"generated_tokens", p.generated_tokens.load()},
           {"prefill_calls", p.prefill_calls.load()},
           {"decode_steps", p.decode_steps.load()},
           {"mean_batch", to_thousandths(static_cast<double>(p.decode_rows) / steps)},
           {"waited_for_device_seconds", to_thousandths(static_cast<double>(p.wait_ns) * 1e-9)}});
    }
    const auto per_second = [&](int64_t n) {
      return to_thousandths(seconds > 0 ? static_cast<double>(n) / seconds : 0);
    };
    return {{"lines", answers.written() + answers.failures()},
            {"failed", answers.failures()},
            {"done_before", answers.n_done_before()},
            {"failed_before", answers.n_failed_before()},
            {"interrupted", InterruptGuard::requested()},
            {"seconds", to_thousandths(seconds)},
            {"lines_per_second", per_second(answers.written() + answers.failures())},
            {"prompt_tokens", prompt},
            {"generated_tokens", generated},
            {"tokens_per_second", per_second(prompt + generated)},
            {"generated_per_second", per_second(generated)},
            {"shared_prefix_tokens", prefix.size()},
            {"load_seconds", to_thousandths(session.load_seconds)},
            {"model", session.source.name},
            {"device", session.ops->info().name},
            {"dtype", dtype_name(session.model->weight_dtype())},
            {"state_dtype", dtype_name(flags_.device.ssm_dtype())},
            {"engines", engines},
            {"version", fmt::format("{} ({})", version(), commit())}};
  }

  void report(const OrderedJson& s, const Answers& answers) const {
    if (common_.quiet) return;
    std::string text = fmt::format(
        "{} lines in {:.1f} s, {:.1f}/s; {} prompt tokens and {} generated, {:.0f} tok/s",
        answers.written() + answers.failures(), s["seconds"].get<double>(),
        s["lines_per_second"].get<double>(), s["prompt_tokens"].get<int64_t>(),
        s["generated_tokens"].get<int64_t>(), s["tokens_per_second"].get<double>());
    if (answers.n_done_before() > 0) {
      text += fmt::format("; {} were done before", answers.n_done_before());
    }
    const int64_t failed = answers.failures() + answers.n_failed_before();
    if (failed > 0) text += fmt::format("; {} failed, see {}", failed, answers.errors_name());
    if (InterruptGuard::requested()) text += "; interrupted, the same command goes on from here";
    fmt::print(stderr, "{}\n", text);
  }

  const BatchFlags& flags_;
  const CommonFlags& common_;
  Shard shard_;
  std::vector<std::string> devices_;
};

int merge(const BatchFlags& flags, const CommonFlags& common) {
  if (flags.output.empty() || flags.output == "-") {
    throw Error(ErrorKind::usage, "--merge: -o FILE is expected");
  }
  LineSet wanted;
  if (!flags.input.empty()) {
    LineReader in(flags.input, {});
    std::string line;
    bool text = flags.format == "text";
    bool known = flags.format != "auto";
    while (in.next(line)) {
      if (!known && !is_blank(line)) {
        text = guess_format(line) == BatchFormat::text;
        known = true;
      }
      if (text || !is_blank(line)) wanted.add(in.number());
    }
  }
  const int64_t missing = merge_outputs(flags.merge, flags.output, wanted);
  if (missing > 0 && !common.quiet) {
    fmt::print(stderr, "{} of {} lines of {} are not answered in these parts\n", missing,
               wanted.size(), flags.input);
  }
  constexpr int kExitFailedLines = 6;
  return missing > 0 ? kExitFailedLines : 0;
}

}  // namespace

Command add_batch_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub = app.add_subcommand("batch", "Answer a file of prompts by continuous batching");
  auto flags = std::make_shared<BatchFlags>();
  const auto option = [&](const char* names, auto& target, const char* text, const char* type) {
    return with_env(sub->add_option(names, target, text))->type_name(type);
  };
  const auto flag = [&](const char* names, bool& target, const char* text) {
    with_env(sub->add_flag(names, target, text));
  };
  option("-i,--input", flags->input, "Prompts, a line each (- for stdin)", "FILE");
  option(
      "-o,--output", flags->output,
      "Answers, appended line by line (- for stdout); a run that was cut short goes on from them",
      "FILE");
  option("--errors", flags->errors, "Lines that failed (default: OUTPUT with .errors in its name)",
         "FILE");
  option("--format", flags->format,
         R"(openai, simple ({"prompt": ..., "temperature": ...}), text (a prompt a line), or auto)",
         "FORMAT")
      ->check(CLI::IsMember({"auto", "openai", "simple", "text"}));
  flag("--ordered", flags->ordered, "Answers in the order of the input");
  flag("--strict", flags->strict, "Stop at a bad line instead of failing it alone");
  flag("--overwrite", flags->overwrite, "Start anew where the output exists");
  flag("--score", flags->score,
       "Log-likelihood of the \"continuation\" of each line instead of new text");
  flag("--print-ids", flags->print_ids, "Token ids beside the text");
  option("--shared-prefix", flags->shared_prefix,
         "Text that prompts begin with, prefilled once: a file, or auto to find it", "FILE|auto");
  option("--chat-template", flags->chat_template,
         "A Jinja template for chats instead of the model's own", "FILE");
  option("--max-batch", flags->max_batch,
         "Sequences at once on a device (0: as many as memory and work allow)", "N")
      ->check(CLI::Range(int64_t{0}, int64_t{8192}));
  option("--shard", flags->shard, "Lines I, I + N, I + 2N, ... alone: one of N machines", "I/N");
  option("--merge", flags->merge,
         "Join these outputs of shards into -o; with -i, say which lines are missing", "FILE...");
  option("--summary", flags->summary, "What the run did, as JSON", "FILE");
  option("--random-weights", flags->random_weights,
         "A model of a published shape with random weights, e.g. 2.8b, to measure", "SHAPE");
  add_model_flags(*sub, flags->model);
  flags->sampling.add(*sub);
  add_device_flags(*sub, flags->device, /*several=*/true);
  add_common_flags(*sub, common);
  return {sub, [flags, &common] {
            return flags->merge.empty() ? BatchCommand(*flags, common).run()
                                        : merge(*flags, common);
          }};
}

}  // namespace krait
