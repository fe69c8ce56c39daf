#include "cli/batch_queue.h"

#include <chrono>
#include <filesystem>

#include "cli/console.h"

namespace krait {

namespace {

// Ctrl-C notifies nobody, so whoever waits looks up now and then.
constexpr std::chrono::milliseconds kLookUp{100};

std::string errors_beside(const std::filesystem::path& output) {
  std::filesystem::path p = output;
  p.replace_filename(output.stem().string() + ".errors" + output.extension().string());
  return p.string();
}

}  // namespace

Answers::Answers(const BatchFlags& flags)
    : ordered_(flags.ordered), overwrite_(flags.overwrite), out_(flags.output) {
  require_other_file(out_, flags.input);
  std::string errors = flags.errors;
  if (errors.empty() && out_.is_regular()) errors = errors_beside(flags.output);
  if (errors.empty()) return;
  if (out_.is(errors)) {
    throw Error(ErrorKind::usage, "the output and the error file are the same");
  }
  errors_.emplace(errors);
  require_other_file(*errors_, flags.input);
}

void Answers::resume() {
  if (overwrite_) {
    out_.clear();
    if (errors_) errors_->clear();
    return;
  }
  done_ = out_.resume();
  if (errors_) failed_ = errors_->resume();
}

bool Answers::is_done(int64_t line) const { return done_.contains(line) || failed_.contains(line); }

void Answers::expect(int64_t line, const std::function<bool()>& stop) {
  if (!ordered_) return;
  constexpr size_t kMostHeld = 8192;
  std::unique_lock lock(mutex_);
  while (expected_.size() >= kMostHeld && !stop()) {
    room_.wait_for(lock, kLookUp);
  }
  expected_.push_back(line);
}

void Answers::write(int64_t line, std::string text) {
  ++written_;
  if (!ordered_) return out_.append(text);
  const std::lock_guard lock(mutex_);
  held_.emplace(line, std::move(text));
  flush();
}

void Answers::write_failure(int64_t line, std::string text) {
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

void Answers::sync() {
  out_.sync();
  if (!errors_) return;
  errors_->sync();
  std::error_code ec;
  if (std::filesystem::file_size(errors_->name(), ec) == 0 && !ec) {
    std::filesystem::remove(errors_->name(), ec);
  }
}

void Answers::require_other_file(const AppendFile& file, const std::string& input) {
  if (!file.is(input)) return;
  throw Error(ErrorKind::usage, fmt::format("{} is the input", file.name()),
              "the output must be another file");
}

void Answers::flush() {
  while (!expected_.empty()) {
    const auto next = held_.find(expected_.front());
    if (next == held_.end()) return;
    if (!next->second.empty()) out_.append(next->second);
    held_.erase(next);
    expected_.pop_front();
    room_.notify_one();
  }
}

std::optional<BatchJob> JobQueue::take(bool wait) {
  std::unique_lock lock(mutex_);
  // Ctrl-C notifies nobody.
  while (wait && jobs_.empty() && !closed_ && !InterruptGuard::requested()) {
    filled_.wait_for(lock, kLookUp);
  }
  if (jobs_.empty()) return std::nullopt;
  BatchJob job = std::move(jobs_.front());
  jobs_.pop_front();
  emptied_.notify_one();
  return job;
}

bool JobQueue::put(Asked asked, BatchJob job) {
  std::unique_lock lock(mutex_);
  while (jobs_.size() >= room_ && !stopping()) {
    emptied_.wait_for(lock, kLookUp);
  }
  if (stopping()) return false;
  asked_.emplace(job.key, std::move(asked));
  jobs_.push_back(std::move(job));
  filled_.notify_one();
  return true;
}

void JobQueue::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  filled_.notify_all();
}

void JobQueue::stop(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  if (!error_) error_ = std::move(error);
  stopped_ = closed_ = true;
  jobs_.clear();
  filled_.notify_all();
  emptied_.notify_all();
}

bool JobQueue::stopping() const { return stopped_ || InterruptGuard::requested(); }

void JobQueue::rethrow() const {
  if (error_) std::rethrow_exception(error_);
}

Asked JobQueue::answered(int64_t key) {
  const std::lock_guard lock(mutex_);
  const auto it = asked_.find(key);
  Asked a = std::move(it->second);
  asked_.erase(it);
  return a;
}

}  // namespace krait
