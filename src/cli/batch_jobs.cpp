#include "cli/batch_jobs.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace krait {

namespace {

/// A seed of its own for each line that names none (splitmix64; 53 bits, so that JSON keeps them).
uint64_t seed_of_line(uint64_t base, int64_t line) {
  uint64_t z = base + static_cast<uint64_t>(line) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return (z ^ (z >> 31)) >> 11;
}

bool penalises(const SampleParams& p) {
  return p.repeat_penalty != 1.0F || p.presence_penalty != 0.0F || p.frequency_penalty != 0.0F;
}

}  // namespace

JobMaker::JobMaker(const BatchFlags& flags, const Session& session)
    : flags_(flags),
      session_(session),
      defaults_(flags.sampling.params(session.generation)),
      bias_(flags.sampling.bias()),
      max_tokens_(flags.sampling.max_new_tokens(session.generation)),
      eos_(end_of_text_ids(session.generation, session.model->config(), session.tokenizer.get())) {
  // Random, but the same when the run resumes.
  const int64_t seed = flags.sampling.seed().value_or(0);
  if (seed < 0) {
    throw Error(ErrorKind::usage, "--seed -1: a run that can resume needs a seed that stays",
                "give one, or none for 0");
  }
  base_seed_ = static_cast<uint64_t>(seed);
  try {
    chat_ = find_chat(session, flags.chat_template);
  } catch (const Error& e) {  // no fault, unless a line is a chat
    if (!flags.chat_template.empty()) throw;
    why_no_chat_ = e.message();
  }
}

BatchRules JobMaker::rules() const {
  BatchRules r;
  r.format = flags_.format == "openai"   ? BatchFormat::openai
             : flags_.format == "simple" ? BatchFormat::simple
             : flags_.format == "text"   ? BatchFormat::text
                                         : BatchFormat::automatic;
  r.score = flags_.score;
  r.vocab = session_.model->config().vocab_size;
  return r;
}

void JobMaker::check(const BatchRequest& r) const {
  if (r.chat && !chat_) throw Error(ErrorKind::usage, why_no_chat_);
  const bool text = r.prompt.is_text || (r.continuation && r.continuation->is_text);
  if (session_.tokenizer == nullptr && text) {
    throw Error(ErrorKind::usage, "this model has no tokenizer: a prompt of token ids is expected");
  }
  if (session_.tokenizer == nullptr && !r.stops.value_or(flags_.sampling.stops).empty()) {
    throw Error(ErrorKind::usage, "this model has no tokenizer: \"stop\" has no text to look at");
  }
}

SampleParams JobMaker::params(const BatchRequest& r, int64_t line) const {
  SampleParams p = defaults_;
  p.seed = seed_of_line(base_seed_, line);
  p = r.params(p);
  p.sequence = 0;
  return p;
}

int64_t JobMaker::max_tokens(const BatchRequest& r) const {
  return r.max_tokens.value_or(max_tokens_);
}

int64_t JobMaker::n_bias(const BatchRequest& r) const {
  return std::ssize(r.bias.value_or(bias_)) + std::ssize(eos_);
}

int JobMaker::n_logprobs(const BatchRequest& r) const {
  return r.n_logprobs.value_or(flags_.sampling.logprobs.value_or(-1));
}

std::vector<int32_t> JobMaker::encode(const BatchText& text) const {
  Prompt prompt;
  if (text.is_text) {
    prompt.text = text.text;
  } else {
    prompt.ids = text.ids;
  }
  return prompt_ids(session_, prompt);
}

std::vector<int32_t> JobMaker::encode_chat(const BatchRequest& r) const {
  try {
    std::vector<int32_t> ids =
        chat_ids(session_, *chat_, nlohmann::ordered_json::parse(r.messages));
    if (ids.empty()) throw Error(ErrorKind::usage, "the chat template makes an empty prompt of it");
    return ids;
  } catch (const Error& e) {  // whatever the template has against these messages
    throw Error(ErrorKind::usage, e.message());
  }
}

BatchJob JobMaker::make(const BatchRequest& r, int64_t line) const {
  BatchJob job;
  job.key = line;
  job.prompt = r.chat ? encode_chat(r) : encode(r.prompt);
  job.starts_text = r.chat;  // an answer is a text of its own
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

void JobMaker::survey(const BatchRequest& r, int64_t line, Survey& s) const {
  const SampleParams p = params(r, line);
  s.n_sequence += r.n;
  if (penalises(p)) {
    s.penalties = true;
    const int64_t all = std::ssize(r.messages) + std::ssize(r.prompt.text) +
                        std::ssize(r.prompt.ids) + 1 + std::max<int64_t>(max_tokens(r), 4096);
    constexpr int64_t kMost = 1 << 20;
    const int64_t window = p.repeat_last_n < 0 ? all : p.repeat_last_n;
    s.window = std::clamp<int64_t>(window, s.window, kMost);
  }
  s.n_bias = std::max(s.n_bias, n_bias(r));
  s.logprobs = s.logprobs || n_logprobs(r) >= 0;
  constexpr size_t kExamples = 8;
  if (s.examples.size() < kExamples && !r.chat) s.examples.push_back(r.prompt);
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

std::vector<int32_t> JobMaker::prefix_ids(BatchText text, const Survey& s) const {
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

}  // namespace krait
