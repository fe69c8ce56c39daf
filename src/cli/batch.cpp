// krait batch: a file of prompts through continuous batching.
//
// One thread reads and tokenizes lines ahead of the devices; each device has a thread with an
// engine of its own, and all take their jobs from the same queue. Answers are written as they come.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "base/output_file.h"
#include "cli/batch_answer.h"
#include "cli/batch_input.h"
#include "cli/batch_output.h"
#include "cli/command.h"
#include "cli/console.h"
#include "cli/json_out.h"
#include "cli/session.h"
#include "cli/version.h"
#include "runtime/continuous.h"

namespace krait {

namespace {

using Clock = std::chrono::steady_clock;

struct BatchFlags {
  ModelFlags model;
  DeviceFlags device;
  SamplingFlags sampling;
  std::string random_weights;
  std::string input;
  std::string output;
  std::string errors;
  std::string format = "auto";
  bool ordered = false;
  bool strict = false;
  bool overwrite = false;
  bool score = false;
  bool print_ids = false;
  std::string shared_prefix;
  int64_t max_batch = 0;
  std::string shard = "1/1";
  std::vector<std::string> merge;
  std::string summary;
};

/// "cuda:0,1" as "cuda:0", "cuda:1".
std::vector<std::string> devices(const std::string& list) {
  std::vector<std::string> all;
  size_t begin = 0;
  while (begin <= list.size()) {
    const size_t end = std::min(list.find(',', begin), list.size());
    std::string item = list.substr(begin, end - begin);
    if (item.find_first_not_of("0123456789") == std::string::npos) item = "cuda:" + item;
    all.push_back(std::move(item));
    begin = end + 1;
  }
  return all;
}

/// A seed of its own for each line that names none (splitmix64; 53 bits, so that JSON keeps them).
uint64_t seed_of_line(uint64_t base, int64_t line) {
  uint64_t z = base + static_cast<uint64_t>(line) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return (z ^ (z >> 31)) >> 11;
}

std::string errors_beside(const std::filesystem::path& output) {
  std::filesystem::path p = output;
  p.replace_filename(output.stem().string() + ".errors" + output.extension().string());
  return p.string();
}

bool penalises(const SampleParams& p) {
  return p.repeat_penalty != 1.0F || p.presence_penalty != 0.0F || p.frequency_penalty != 0.0F;
}

/// The output and the error file, and the order of lines where it matters.
class Answers {
 public:
  explicit Answers(const BatchFlags& flags)
      : ordered_(flags.ordered), out_(flags.output, flags.overwrite) {
    require_other_file(out_, flags.input);
    std::string errors = flags.errors;
    if (errors.empty() && out_.is_regular()) errors = errors_beside(flags.output);
    if (errors.empty()) return;
    errors_.emplace(errors, flags.overwrite);
    require_other_file(*errors_, flags.input);
    if (errors_->is(flags.output)) {
      throw Error(ErrorKind::usage, "the output and the error file are the same");
    }
  }

  /// Lines that an earlier run has answered; they are not asked again.
  void resume() {
    done_ = out_.resume();
    if (errors_) failed_ = errors_->resume();
  }
  [[nodiscard]] bool is_done(int64_t line) const {
    return done_.contains(line) || failed_.contains(line);
  }
  [[nodiscard]] int64_t n_done_before() const { return done_.size() + failed_.size(); }
  [[nodiscard]] int64_t n_failed_before() const { return failed_.size(); }

  /// In the order in which answers are to be written. Waits while too many are held back behind one
  /// that takes long, unless `stop`.
  void expect(int64_t line, const std::function<bool()>& stop) {
    if (!ordered_) return;
    constexpr size_t kMostHeld = 8192;
    std::unique_lock lock(mutex_);
    while (expected_.size() >= kMostHeld && !stop()) {
      room_.wait_for(lock, std::chrono::milliseconds(100));
    }
    expected_.push_back(line);
  }

  void write(int64_t line, std::string text) {
    ++written_;
    if (!ordered_) return out_.append(text);
    const std::lock_guard lock(mutex_);
    held_.emplace(line, std::move(text));
    flush();
  }

  void write_failure(int64_t line, std::string text) {
    ++failures_;
    if (errors_) {
      errors_->append(text);
      if (!ordered_) return;
      text.clear();
    } else if (!ordered_) {
      return out_.append(text);
    }
    const std::lock_guard lock(mutex_);
    held_.emplace(line, std::move(text));
    flush();
  }

  [[nodiscard]] int64_t written() const { return written_; }
  [[nodiscard]] int64_t failures() const { return failures_; }

  void sync() {
    out_.sync();
    if (!errors_) return;
    errors_->sync();
    std::error_code ec;
    if (std::filesystem::file_size(errors_->name(), ec) == 0 && !ec) {
      std::filesystem::remove(errors_->name(), ec);
    }
  }
  [[nodiscard]] std::string errors_name() const { return errors_ ? errors_->name() : out_.name(); }

 private:
  static void require_other_file(const AppendFile& file, const std::string& input) {
    if (!file.is(input)) return;
    throw Error(ErrorKind::usage, fmt::format("{} is the input", file.name()),
                "the output must be another file");
  }

  void flush() {
    while (!expected_.empty()) {
      const auto next = held_.find(expected_.front());
      if (next == held_.end()) return;
      if (!next->second.empty()) out_.append(next->second);
      held_.erase(next);
      expected_.pop_front();
      room_.notify_one();
    }
  }

  bool ordered_;
  AppendFile out_;
  std::optional<AppendFile> errors_;
  LineSet done_;
  LineSet failed_;
  std::atomic<int64_t> written_ = 0;
  std::atomic<int64_t> failures_ = 0;
  std::mutex mutex_;
  std::condition_variable room_;
  std::deque<int64_t> expected_;         ///< lines asked, not yet written
  std::map<int64_t, std::string> held_;  ///< answers that wait for an earlier one
};

/// Turns lines into jobs, by what the flags and the model's files say.
class JobMaker {
 public:
  JobMaker(const BatchFlags& flags, const Session& session)
      : flags_(flags),
        session_(session),
        defaults_(flags.sampling.params(session.generation)),
        bias_(flags.sampling.bias()),
        max_tokens_(flags.sampling.max_new_tokens(session.generation)),
        eos_(
            end_of_text_ids(session.generation, session.model->config(), session.tokenizer.get())) {
    // Random, but the same when the run resumes.
    const int64_t seed = flags.sampling.seed().value_or(0);
    if (seed < 0) {
      throw Error(ErrorKind::usage, "--seed -1: a run that can resume needs a seed that stays",
                  "give one, or none for 0");
    }
    base_seed_ = static_cast<uint64_t>(seed);
  }

  [[nodiscard]] BatchRules rules() const {
    BatchRules r;
    r.format = flags_.format == "openai"   ? BatchFormat::openai
               : flags_.format == "simple" ? BatchFormat::simple
               : flags_.format == "text"   ? BatchFormat::text
                                           : BatchFormat::automatic;
    r.score = flags_.score;
    r.vocab = session_.model->config().vocab_size;
    return r;
  }

  /// Error usage: a request that this model cannot answer.
  void check(const BatchRequest& r) const {
    if (r.chat) {
      throw Error(ErrorKind::usage,
                  "this model has no chat template: \"/v1/completions\" is expected");
    }
    const bool text = r.prompt.is_text || (r.continuation && r.continuation->is_text);
    if (session_.tokenizer == nullptr && text) {
      throw Error(ErrorKind::usage,
                  "this model has no tokenizer: a prompt of token ids is expected");
    }
    if (session_.tokenizer == nullptr && !r.stops.value_or(flags_.sampling.stops).empty()) {
      throw Error(ErrorKind::usage, "this model has no tokenizer: \"stop\" has no text to look at");
    }
  }

  [[nodiscard]] SampleParams params(const BatchRequest& r, int64_t line) const {
    SampleParams p = defaults_;
    p.seed = seed_of_line(base_seed_, line);
    p = r.params(p);
    p.sequence = 0;
    return p;
  }
  [[nodiscard]] int64_t max_tokens(const BatchRequest& r) const {
    return r.max_tokens.value_or(max_tokens_);
  }
  [[nodiscard]] int64_t n_bias(const BatchRequest& r) const {
    return std::ssize(r.bias.value_or(bias_)) + std::ssize(eos_);
  }
  [[nodiscard]] int n_logprobs(const BatchRequest& r) const {
    return r.n_logprobs.value_or(flags_.sampling.logprobs.value_or(-1));
  }

  [[nodiscard]] std::vector<int32_t> encode(const BatchText& text) const {
    Prompt prompt;
    if (text.is_text) {
      prompt.text = text.text;
    } else {
      prompt.ids = text.ids;
    }
    return prompt_ids(session_, prompt);
  }

  /// Error usage: as check(), where it takes the tokens to see it.
  [[nodiscard]] BatchJob make(const BatchRequest& r, int64_t line) const {
    BatchJob job;
    job.key = line;
    job.prompt = encode(r.prompt);
    job.params = params(r, line);
    if (flags_.score) {
      job.score_from = std::ssize(job.prompt);
      if (r.continuation->is_text) {
        BatchText whole = r.prompt;
        whole.text += r.continuation->text;
        job.prompt = encode(whole);
      } else {
        job.prompt.insert(job.prompt.end(), r.continuation->ids.begin(), r.continuation->ids.end());
      }
      if (std::ssize(job.prompt) <= job.score_from) {
        throw Error(ErrorKind::usage, "the continuation adds no token to the prompt");
      }
      return job;
    }
    job.n = r.n;
    job.max_new_tokens = max_tokens(r);
    job.bias = r.bias.value_or(bias_);
    job.stops = r.stops.value_or(flags_.sampling.stops);
    job.n_logprobs = n_logprobs(r);
    if (r.ignore_eos.value_or(flags_.sampling.ignore_eos)) {
      for (const int32_t id : eos_) job.bias.emplace_back(id, -INFINITY);
    } else {
      job.eos_ids = eos_;
    }
    return job;
  }

  /// Adds a line to what the engines must have room for.
  void survey(const BatchRequest& r, int64_t line, Survey& s) const {
    const SampleParams p = params(r, line);
    s.n_sequence += r.n;
    if (penalises(p)) {
      s.penalties = true;
      const int64_t all = std::ssize(r.prompt.text) + std::ssize(r.prompt.ids) + 1 +
                          std::max<int64_t>(max_tokens(r), 4096);
      constexpr int64_t kMost = 1 << 20;
      const int64_t window = p.repeat_last_n < 0 ? all : p.repeat_last_n;
      s.window = std::clamp<int64_t>(window, s.window, kMost);
    }
    s.n_bias = std::max(s.n_bias, n_bias(r));
    s.logprobs = s.logprobs || n_logprobs(r) >= 0;
    constexpr size_t kExamples = 8;
    if (s.examples.size() < kExamples) s.examples.push_back(r.prompt);
    if (s.n_sequence == r.n) {
      s.common = r.prompt;
    } else if (s.common.is_text != r.prompt.is_text) {
      s.common = {};
    } else {
      const auto shorten = [](auto& common, const auto& other) {
        const auto ends = std::mismatch(common.begin(), common.end(), other.begin(), other.end());
        common.erase(ends.first, common.end());
      };
      shorten(s.common.text, r.prompt.text);
      shorten(s.common.ids, r.prompt.ids);
    }
  }

  /// The ids that all examples begin with, of those of `text`.
  [[nodiscard]] std::vector<int32_t> prefix_ids(BatchText text, const Survey& s) const {
    // A text cut inside a character has other tokens at its end, and so may any: what counts is
    // what the prompts' own ids begin with.
    while (text.is_text && !text.text.empty()) {
      try {
        require_utf8(text.text, "prefix");
        break;
      } catch (const Error&) {
        text.text.pop_back();
      }
    }
    if (text.empty()) return {};
    std::vector<int32_t> ids = encode(text);
    for (const BatchText& example : s.examples) {
      const std::vector<int32_t> other = encode(example);
      if (other.empty() || ids.empty() || other[0] != ids[0]) continue;  // does not share it
      const auto ends = std::mismatch(ids.begin(), ids.end(), other.begin(), other.end());
      ids.erase(ends.first, ids.end());
    }
    return ids;
  }

 private:
  const BatchFlags& flags_;
  const Session& session_;
  SampleParams defaults_;
  LogitBias bias_;
  int64_t max_tokens_;
  std::vector<int32_t> eos_;
  uint64_t base_seed_ = 0;
};

/// The queue between the reader and the engines, with what is known of the jobs in them.
class Queue : public BatchJobs {
 public:
  explicit Queue(size_t room) : room_(room) {}

  std::optional<BatchJob> take(bool wait) override {
    std::unique_lock lock(mutex_);
    // Ctrl-C notifies nobody.
    while (wait && jobs_.empty() && !closed_ && !InterruptGuard::requested()) {
      filled_.wait_for(lock, std::chrono::milliseconds(100));
    }
    if (jobs_.empty()) return std::nullopt;
    BatchJob job = std::move(jobs_.front());
    jobs_.pop_front();
    emptied_.notify_one();
    return job;
  }

  /// False when nobody takes jobs any more.
  bool put(Asked asked, BatchJob job) {
    std::unique_lock lock(mutex_);
    while (jobs_.size() >= room_ && !stopping()) {
      emptied_.wait_for(lock, std::chrono::milliseconds(100));
    }
    if (stopping()) return false;
    asked_.emplace(job.key, std::move(asked));
    jobs_.push_back(std::move(job));
    filled_.notify_one();
    return true;
  }

  /// No more jobs come.
  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    filled_.notify_all();
  }
  /// Somebody failed: everybody ends.
  void stop(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    stopped_ = closed_ = true;
    jobs_.clear();
    filled_.notify_all();
    emptied_.notify_all();
  }
  [[nodiscard]] bool stopping() const { return stopped_ || InterruptGuard::requested(); }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

  Asked answered(int64_t key) {
    const std::lock_guard lock(mutex_);
    const auto it = asked_.find(key);
    Asked a = std::move(it->second);
    asked_.erase(it);
    return a;
  }

 private:
  size_t room_;
  std::mutex mutex_;
  std::condition_variable filled_;
  std::condition_variable emptied_;
  std::deque<BatchJob> jobs_;
  std::unordered_map<int64_t, Asked> asked_;
  bool closed_ = false;
  std::atomic<bool> stopped_ = false;
  std::exception_ptr error_;
};

Asked asked_of(const BatchRequest& r, int64_t line) {
  return {line, r.format, r.id, r.has_id, r.chat, r.model};
}
Asked asked_of(const BadLine& bad, int64_t line) {
  return {line, bad.format, bad.id, bad.has_id, false, {}};
}

/// A line on stderr while the run lasts: how far it is, how fast, how full.
class Status {
 public:
  Status(bool enabled, int64_t n_line, const Answers& answers,
         const std::deque<BatchProgress>& engines)
      : enabled_(enabled && stderr_is_terminal()),
        n_line_(n_line),
        answers_(answers),
        engines_(engines) {
    if (enabled_) thread_ = std::thread([this] { run(); });
  }
  ~Status() {
    if (!enabled_) return;
    {
      const std::lock_guard lock(mutex_);
      end_ = true;
    }
    changed_.notify_one();
    thread_.join();
    std::fputs("\r\x1b[K", stderr);
  }
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;

 private:
  void run() {
    std::unique_lock lock(mutex_);
    int64_t tokens_before = 0;
    double at_before = 0;
    double rate = 0;
    while (!changed_.wait_for(lock, std::chrono::milliseconds(500), [this] { return end_; })) {
      const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
      const int64_t done = answers_.written() + answers_.failures();
      int64_t tokens = 0;
      int64_t running = 0;
      int64_t waiting = 0;
      for (const BatchProgress& p : engines_) {
        tokens += p.prompt_tokens + p.generated_tokens;
        running += p.running;
        waiting += p.waiting;
      }
      // The last few seconds count most.
      const double now = static_cast<double>(tokens - tokens_before) / (seconds - at_before);
      rate = tokens_before == 0 ? now : 0.8 * rate + 0.2 * now;
      tokens_before = tokens;
      at_before = seconds;
      const double lines_per_second = static_cast<double>(done) / seconds;
      std::string text = "\r";
      if (n_line_ >= 0) {
        constexpr int64_t kWidth = 20;
        const int64_t filled = n_line_ == 0 ? kWidth : kWidth * done / n_line_;
        text += fmt::format("[{:#<{}}{:.<{}}] {} of {}", "", filled, "", kWidth - filled, done,
                            n_line_);
      } else {
        text += fmt::format("{} lines", done);
      }
      text += fmt::format(", {:.1f}/s", lines_per_second);
      if (n_line_ >= 0 && done > 0) {
        const auto left =
            static_cast<int64_t>(static_cast<double>(n_line_ - done) / lines_per_second);
        text += fmt::format(", {}:{:02}:{:02} left", left / 3600, left / 60 % 60, left % 60);
      }
      text += fmt::format("; {} running, {} waiting; {:.0f} tok/s\x1b[K", running, waiting, rate);
      std::fputs(text.c_str(), stderr);
      std::fflush(stderr);
    }
  }

  bool enabled_;
  int64_t n_line_;
  const Answers& answers_;
  const std::deque<BatchProgress>& engines_;
  Clock::time_point start_ = Clock::now();
  std::mutex mutex_;
  std::condition_variable changed_;
  bool end_ = false;
  std::thread thread_;
};

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

    const Session session = open(devices_[0]);
    const JobMaker maker(flags_, session);
    const InterruptGuard interrupt;
    const Survey survey = first_pass(maker, answers, input.is_file());
    if (InterruptGuard::requested()) return kExitInterrupted;
    const std::vector<int32_t> prefix = shared_prefix(maker, survey);

    const auto start = Clock::now();
    Queue queue(256);
    std::deque<BatchProgress> progress(devices_.size());
    std::vector<std::thread> threads;
    {
      const Status status(!common_.quiet, input.is_file() ? survey.n_line : -1, answers, progress);
      threads.emplace_back([&] { guarded(queue, [&] { produce(maker, input, answers, queue); }); });
      for (size_t i = 1; i < devices_.size(); ++i) {
        threads.emplace_back([&, i] {
          guarded(queue, [&] {
            // A CUDA device belongs to the thread that works with it.
            const Session own = open(devices_[i]);
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
  [[nodiscard]] Session open(const std::string& device) const {
    DeviceFlags d = flags_.device;
    d.device = device;
    return flags_.random_weights.empty() ? open_session(flags_.model, d, common_)
                                         : open_random_session(flags_.random_weights, d);
  }

  /// Runs one thread's share; its failure ends all.
  template <typename F>
  static void guarded(Queue& queue, F&& f) {
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

  void produce(const JobMaker& maker, LineReader& in, Answers& answers, Queue& queue) const {
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
    o.prefill_chunk = flags_.device.prefill_chunk;
    o.state_dtype = flags_.device.ssm_dtype();
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
            const std::vector<int32_t>& prefix, Answers& answers, Queue& queue,
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
  option(
      "--format", flags->format,
      "openai, simple ({\"prompt\": ..., \"temperature\": ...}), text (a prompt a line), or auto",
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
