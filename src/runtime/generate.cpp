#include "runtime/generate.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numeric>

namespace krait {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// log of the sum of exp(logits), in double: a vocabulary of 65,000 terms loses digits in float.
double log_sum_exp(std::span<const float> logits) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float l : logits) sum += std::exp(static_cast<double>(l - largest));
  return static_cast<double>(largest) + std::log(sum);
}

}  // namespace

EngineSource::EngineSource(Engine& engine, const SampleParams& params, const LogitBias& bias,
                           bool keep_logits)
    : engine_(engine) {
  engine_.keep_logits(keep_logits);
  engine_.open(0, params, bias);
}

bool EngineSource::prefill(std::span<const int32_t> ids, const std::function<bool()>& cancelled) {
  return engine_.prefill(0, ids, true, {}, false, cancelled);
}

void EngineSource::step() {
  constexpr std::array<int32_t, 1> kSlots{0};
  engine_.step(kSlots);
}

int32_t EngineSource::receive() { return engine_.receive()[0]; }

std::span<const float> EngineSource::logits() { return engine_.logits(0); }

float log_probability(std::span<const float> logits, int32_t id) {
  return static_cast<float>(logits[static_cast<size_t>(id)] - log_sum_exp(logits));
}

std::vector<TokenLogprob> top_log_probabilities(std::span<const float> logits, int n) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto count = std::min<size_t>(static_cast<size_t>(std::max(n, 0)), order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    [&](int32_t a, int32_t b) {
                      const float la = logits[static_cast<size_t>(a)];
                      const float lb = logits[static_cast<size_t>(b)];
                      return la != lb ? la > lb : a < b;
                    });
  const double total = log_sum_exp(logits);
  std::vector<TokenLogprob> top(count);
  for (size_t i = 0; i < count; ++i) {
    top[i] = {order[i], static_cast<float>(logits[static_cast<size_t>(order[i])] - total)};
  }
  return top;
}

TextBuilder::TextBuilder(const Tokenizer* tokenizer, const std::vector<std::string>& stops,
                         bool at_start)
    : stops_(stops) {
  if (tokenizer != nullptr) decoder_.emplace(*tokenizer, at_start);
}

std::string TextBuilder::push(int32_t id) {
  return decoder_ ? stops_.push(decoder_->push(id)) : std::string();
}

std::string TextBuilder::finish() {
  if (!decoder_ || stopped()) return {};
  std::string text = stops_.push(decoder_->finish());
  if (!stopped()) text += stops_.finish();
  return text;
}

GenerateResult generate(TokenSource& source, const Tokenizer* tokenizer,
                        std::span<const int32_t> prompt, const GenerateOptions& options,
                        const std::function<void(const GeneratedToken&)>& on_token,
                        const std::function<bool()>& cancelled) {
  GenerateResult result;
  TextBuilder text(tokenizer, options.stops, options.at_start);
  const auto is_cancelled = [&] { return cancelled && cancelled(); };
  const auto show = [&](GeneratedToken& token, const std::string& part) {
    token.text = part;
    result.text += part;
    if (on_token) on_token(token);
  };

  Clock::time_point start = Clock::now();
  if (!source.prefill(prompt, is_cancelled)) {
    result.finish = FinishReason::cancelled;
    result.prompt_seconds = seconds_since(start);
    return result;
  }

  // The prefill has drawn one token already; with -n 0 it is received and dropped below.
  int64_t launched = 1;
  int64_t received = 0;
  const bool want_logprobs = options.n_logprobs >= 0;
  const auto unlimited = options.max_new_tokens < 0;
  const auto launch_next = [&] {
    if (unlimited || launched < options.max_new_tokens) {
      source.step();
      ++launched;
    }
  };
  const auto receive = [&] {
    const int32_t id = source.receive();
    if (received++ == 0) {
      result.prompt_seconds = seconds_since(start);
      start = Clock::now();
    }
    return id;
  };

  bool done = options.max_new_tokens == 0;
  while (!done) {
    // One step ahead: the device works on the next token while this one is decoded and written. The
    // logits are those of the latest launch, so with logprobs the next launch waits.
    if (!want_logprobs) launch_next();
    GeneratedToken token;
    token.id = receive();
    result.ids.push_back(token.id);
    if (want_logprobs) {
      const std::span<const float> logits = source.logits();
      token.logprob = log_probability(logits, token.id);
      token.top = top_log_probabilities(logits, options.n_logprobs);
    }

    if (std::find(options.eos_ids.begin(), options.eos_ids.end(), token.id) !=
        options.eos_ids.end()) {
      result.finish = FinishReason::eos;
      show(token, {});
      break;
    }
    show(token, text.push(token.id));
    if (text.stopped()) {
      result.finish = FinishReason::stop;
      break;
    }
    if (is_cancelled()) {
      result.finish = FinishReason::cancelled;
      break;
    }
    if (!unlimited && received >= options.max_new_tokens) {
      result.finish = FinishReason::length;
      break;
    }
    if (want_logprobs) launch_next();
  }
  if (received > 0) result.generate_seconds = seconds_since(start);
  while (received < launched) (void)receive();  // a step launched ahead and not wanted

  // Text that waited for the rest of a character or of a stop string.
  if (!text.stopped()) {
    GeneratedToken rest;
    rest.id = -1;
    const std::string part = text.finish();
    if (text.stopped()) result.finish = FinishReason::stop;
    if (!part.empty()) show(rest, part);
  }
  return result;
}

}  // namespace krait
