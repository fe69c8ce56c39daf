// krait run: generates text after a prompt, streamed to stdout.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "cli/chat.h"
#include "cli/command.h"
#include "cli/console.h"
#include "cli/json_out.h"
#include "cli/session.h"
#include "cli/version.h"
#include "runtime/generate.h"

namespace krait {

namespace {

struct RunFlags {
  ModelFlags model;
  DeviceFlags device;
  PromptFlags prompt;
  bool chat = false;
  std::string system;
  std::string chat_template;
  SamplingFlags sampling;
  bool json = false;
  bool print_ids = false;
};

std::string_view finish_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::eos:
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "interrupted";
  }
  return "";
}

/// Tokens per second; 0 where there was nothing to time.
double rate(size_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0;
}

/// The decode rate leaves out the first token, whose time is the prompt's.
double decode_rate(const GenerateResult& r) {
  return r.ids.size() < 2 ? 0.0 : rate(r.ids.size() - 1, r.generate_seconds);
}

size_t total(const EngineMemory& m) { return m.weights + m.state + m.activations; }

OrderedJson sampling_json(const SampleParams& p) {
  return {{"temperature", short_double(p.temperature)},
          {"top_k", p.top_k},
          {"top_p", short_double(p.top_p)},
          {"min_p", short_double(p.min_p)},
          {"typical_p", short_double(p.typical_p)},
          {"repetition_penalty", short_double(p.repeat_penalty)},
          {"presence_penalty", short_double(p.presence_penalty)},
          {"frequency_penalty", short_double(p.frequency_penalty)},
          {"repeat_last_n", p.repeat_last_n},
          {"seed", p.seed}};
}

OrderedJson token_json(const Tokenizer* tokenizer, int32_t id, float logprob) {
  OrderedJson t = {{"id", id}};
  if (tokenizer != nullptr) t["token"] = tokenizer->token_bytes(id, false, true);
  // -inf, which JSON has no number for, is null.
  t["logprob"] = std::isfinite(logprob) ? OrderedJson(short_double(logprob)) : OrderedJson();
  return t;
}

EngineOptions options_of_engine(const RunFlags& flags, const Session& session,
                                const SampleParams& params, const LogitBias& bias,
                                const std::vector<int32_t>& ids, int64_t max_new_tokens) {
  EngineOptions o;
  o.prefill_chunk = flags.device.prefill_chunk;
  o.state_dtype = flags.device.ssm_dtype();
  o.state_rounding = flags.device.ssm_rounding();
  o.max_bias = std::max(o.max_bias, static_cast<int64_t>(bias.size()));
  o.penalties = params.repeat_penalty != 1.0F || params.presence_penalty != 0.0F ||
                params.frequency_penalty != 0.0F;
  // "All tokens" is as many as there will be, up to a million where nothing limits them.
  constexpr int64_t kLargestWindow = 1 << 20;
  const int64_t all =
      max_new_tokens < 0 ? kLargestWindow : static_cast<int64_t>(ids.size()) + max_new_tokens;
  o.max_seen_window =
      std::clamp<int64_t>(params.repeat_last_n < 0 ? all : params.repeat_last_n, 1, kLargestWindow);
  // Rows between the tokenizer's ids and the model's vocabulary are padding (50277 of 50280).
  if (session.tokenizer) o.vocab_limit = session.tokenizer->vocab_size();
  return o;
}

/// The prompt of one message, after the system's where there is one.
std::vector<int32_t> message_ids(const Session& session, const RunFlags& flags,
                                 const std::string& text) {
  require_utf8(flags.system, "--system");
  OrderedJson messages = OrderedJson::array();
  if (!flags.system.empty()) messages.push_back({{"role", "system"}, {"content", flags.system}});
  messages.push_back({{"role", "user"}, {"content", text}});
  return chat_ids(session, find_chat(session, flags.chat_template), messages);
}

int run(const RunFlags& flags, const CommonFlags& common) {
  const SamplingFlags& sampling = flags.sampling;
  if (sampling.logprobs && !flags.json) {
    throw Error(ErrorKind::usage, "--logprobs prints with --json only");
  }
  if (flags.json && flags.print_ids) {
    throw Error(ErrorKind::usage, "--print-ids and --json exclude each other",
                "the JSON has the ids");
  }
  if (!flags.chat && (!flags.system.empty() || !flags.chat_template.empty())) {
    throw Error(ErrorKind::usage, "--system and --chat-template mean nothing without --chat");
  }
  const Prompt prompt = flags.prompt.read();
  if (flags.chat && !prompt.text) {
    throw Error(ErrorKind::usage, "--chat takes a message as text, not --ids");
  }
  const LogitBias user_bias = sampling.bias();

  Session session = open_session(flags.model, flags.device, common);
  const ModelConfig& config = session.model->config();
  const std::vector<int32_t> ids =
      flags.chat ? message_ids(session, flags, *prompt.text) : prompt_ids(session, prompt);
  const SampleParams params = sampling.params(session.generation);
  spdlog::debug("seed {}, temperature {}, top-k {}, top-p {}, min-p {}, typical-p {}", params.seed,
                params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p);

  // Text is wanted unless ids are; a model without a tokenizer still makes JSON of ids alone.
  const bool want_text = !flags.print_ids && !flags.json;
  if (want_text || !sampling.stops.empty()) (void)session.require_tokenizer();
  const Tokenizer* tokenizer = session.tokenizer.get();

  GenerateOptions options;
  options.max_new_tokens = sampling.max_new_tokens(session.generation);
  options.stops = sampling.stops;
  options.n_logprobs = sampling.logprobs.value_or(-1);
  options.eos_ids = end_of_text_ids(session.generation, config, tokenizer);
  // An answer in a chat is a text of its own.
  options.at_start =
      flags.chat || (tokenizer != nullptr && std::all_of(ids.begin(), ids.end(), [&](int32_t id) {
                       return tokenizer->is_special(id);
                     }));
  LogitBias bias = user_bias;
  if (sampling.ignore_eos) {
    for (const int32_t id : options.eos_ids) bias.emplace_back(id, -INFINITY);
    options.eos_ids.clear();
  }

  const EngineOptions engine_options =
      options_of_engine(flags, session, params, bias, ids, options.max_new_tokens);
  Engine engine(*session.model, *session.ops, engine_options);
  EngineSource source(engine, params, bias, options.n_logprobs >= 0);

  OrderedJson tokens = OrderedJson::array();
  bool first = true;
  const auto on_token = [&](const GeneratedToken& token) {
    if (flags.print_ids) {
      if (token.id >= 0) write_stdout(fmt::format("{}{}", first ? "" : ",", token.id));
    } else if (!flags.json) {
      write_stdout(token.text);
    } else if (options.n_logprobs >= 0 && token.id >= 0) {
      OrderedJson t = token_json(tokenizer, token.id, token.logprob);
      t["top_logprobs"] = OrderedJson::array();
      for (const TokenLogprob& l : token.top) {
        t["top_logprobs"].push_back(token_json(tokenizer, l.id, l.logprob));
      }
      tokens.push_back(std::move(t));
    }
    first = false;
  };

  const InterruptGuard interrupt;
  const GenerateResult result =
      generate(source, tokenizer, ids, options, on_token, InterruptGuard::requested);

  if (flags.json) {
    OrderedJson j;
    j["model"] = session.source.name;
    if (prompt.text) j["prompt"] = *prompt.text;
    j["prompt_ids"] = ids;
    j["text"] = tokenizer != nullptr ? OrderedJson(result.text) : OrderedJson();
    j["ids"] = result.ids;
    if (options.n_logprobs >= 0) j["logprobs"] = std::move(tokens);
    j["finish_reason"] = finish_name(result.finish);
    j["usage"] = {{"prompt_tokens", ids.size()},
                  {"completion_tokens", result.ids.size()},
                  {"total_tokens", ids.size() + result.ids.size()}};
    j["sampling"] = sampling_json(params);
    j["timings"] = {{"load_ms", to_thousandths(session.load_seconds * 1e3)},
                    {"prompt_ms", to_thousandths(result.prompt_seconds * 1e3)},
                    {"prompt_per_second", to_thousandths(rate(ids.size(), result.prompt_seconds))},
                    {"predicted_ms", to_thousandths(result.generate_seconds * 1e3)},
                    {"predicted_per_second", to_thousandths(decode_rate(result))}};
    j["device"] = session.ops->info().name;
    j["backend"] = session.ops->backend();
    j["dtype"] = dtype_name(session.model->weight_dtype());
    j["state_dtype"] = dtype_name(engine_options.state_dtype);
    j["memory_bytes"] = total(engine.memory());
    j["version"] = fmt::format("{} ({})", version(), commit());
    write_stdout(dump_json(j));
  } else if (flags.print_ids || (stdout_is_terminal() && !result.text.ends_with('\n'))) {
    write_stdout("\n");
  }

  if (!common.quiet) {
    fmt::print(
        stderr,
        "{} prompt tokens, {:.1f} tok/s; {} generated, {:.1f} tok/s; first token after {:.0f} "
        "ms; {} on {}\n",
        ids.size(), rate(ids.size(), result.prompt_seconds), result.ids.size(), decode_rate(result),
        result.prompt_seconds * 1e3, human_bytes(total(engine.memory())), session.ops->info().name);
  }
  return result.finish == FinishReason::cancelled ? kExitInterrupted : 0;
}

}  // namespace

Command add_run_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub = app.add_subcommand("run", "Generate text, streamed to stdout");
  auto flags = std::make_shared<RunFlags>();
  flags->prompt.add(*sub, /*positional=*/true, /*trim=*/true);
  with_env(sub->add_flag("--chat", flags->chat,
                         "The prompt is a message to a chat model, put into its template"));
  with_env(
      sub->add_option("--system", flags->system, "With --chat: the system's message before it"))
      ->type_name("TEXT");
  with_env(sub->add_option("--chat-template", flags->chat_template,
                           "With --chat: a Jinja template instead of the model's own"))
      ->type_name("FILE");
  with_env(sub->add_flag("--json", flags->json, "One JSON object instead of text"));
  with_env(sub->add_flag("--print-ids", flags->print_ids, "Token ids instead of text"));
  add_model_flags(*sub, flags->model);
  flags->sampling.add(*sub);
  add_device_flags(*sub, flags->device);
  add_common_flags(*sub, common);
  return {sub, [flags, &common] { return run(*flags, common); }};
}

}  // namespace krait
