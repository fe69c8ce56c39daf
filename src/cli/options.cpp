#include "cli/options.h"

#include <unistd.h>
#include <utf8proc.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>

#include "base/log.h"

namespace krait {

namespace {

constexpr const char* kGenerationGroup = "Generation";
constexpr const char* kDeviceGroup = "Device";
constexpr const char* kModelGroup = "Model";
constexpr const char* kOutputGroup = "Messages";

const std::vector<std::string> kStateTypes{"f32",      "bf16",    "f16", "float32",
                                           "bfloat16", "float16", "half"};
const std::vector<std::string> kWeightTypes = [] {
  std::vector<std::string> types = kStateTypes;
  types.emplace_back("auto");
  return types;
}();

/// "temperature" of `--temp,--temperature`; "prompt" of `-p,--prompt`.
std::string long_name(const CLI::Option& option) {
  return option.get_lnames().empty() ? std::string() : option.get_lnames().back();
}

std::string environment_name(const CLI::Option& option) {
  std::string name = "KRAIT_" + long_name(option);
  for (char& c : name) {
    c = c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return name;
}

void require(bool ok, const char* flag, const std::string& expected, const std::string& found) {
  if (!ok) {
    throw Error(ErrorKind::usage, fmt::format("{}: expected {}, found {}", flag, expected, found));
  }
}

template <typename T>
void require_range(const std::optional<T>& value, const char* flag, T least, T most,
                   const char* expected) {
  if (value) require(*value >= least && *value <= most, flag, expected, fmt::to_string(*value));
}

}  // namespace

DType parse_dtype(const std::string& name) {
  if (name == "bf16" || name == "bfloat16") return DType::bf16;
  if (name == "f16" || name == "float16" || name == "half") return DType::f16;
  return DType::f32;
}

CLI::Option* with_env(CLI::Option* option) { return option->envname(environment_name(*option)); }

bool on_command_line(const CLI::Option& option) {
  if (option.count() == 0) return false;
  const char* env =
      option.get_envname().empty() ? nullptr : std::getenv(option.get_envname().c_str());
  return env == nullptr || option.results() != std::vector<std::string>{env};
}

// ---- messages ---------------------------------------------------------------------------------

void add_common_flags(CLI::App& app, CommonFlags& flags) {
  with_env(
      app.add_flag("-v,--verbose", flags.verbose, "Say more on stderr: device, seed, settings"))
      ->group(kOutputGroup);
  with_env(app.add_flag("-q,--quiet", flags.quiet, "Only errors on stderr; no bar, no statistics"))
      ->group(kOutputGroup);
  with_env(app.add_option("--log-level", flags.log_level, "Least severe message to print"))
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error", "off"}))
      ->type_name("LEVEL")
      ->group(kOutputGroup);
}

void apply_common_flags(const CommonFlags& flags) {
  spdlog::level::level_enum level = spdlog::level::info;
  if (flags.verbose) level = spdlog::level::debug;
  if (flags.quiet) level = spdlog::level::err;
  if (!flags.log_level.empty()) level = spdlog::level::from_str(flags.log_level);
  spdlog::set_level(level);
}

// ---- model and device -------------------------------------------------------------------------

void add_model_flags(CLI::App& app, ModelFlags& flags) {
  with_env(app.add_option(
               "-m,--model", flags.model,
               "Folder, .safetensors, .bin or .gguf file, or org/name in the Hugging Face cache "
               "(default: the model that ships with krait)"))
      ->type_name("MODEL")
      ->group(kModelGroup);
  with_env(
      app.add_option("--tokenizer", flags.tokenizer,
                     "tokenizer.json, tokenizer.model or a folder that holds one (default: the "
                     "one beside the model)"))
      ->type_name("PATH")
      ->group(kModelGroup);
}

std::optional<DType> DeviceFlags::weight_dtype() const {
  return dtype == "auto" ? std::nullopt : std::optional(parse_dtype(dtype));
}

DType DeviceFlags::ssm_dtype() const { return parse_dtype(state_dtype); }

Rounding DeviceFlags::ssm_rounding() const {
  return state_rounding == "stochastic" ? Rounding::stochastic : Rounding::nearest;
}

void add_backend_flags(CLI::App& app, DeviceFlags& flags, bool several) {
  const auto is_device = [](std::string_view v) {
    return v == "auto" || v == "cpu" || v == "cuda" ||
           (v.substr(0, 5) == "cuda:" && v.size() > 5 && v.size() < 9 &&
            v.find_first_not_of("0123456789", 5) == std::string_view::npos);
  };
  const CLI::Validator device(
      [several, is_device](std::string& s) {
        bool ok = true;
        std::string_view rest = s;
        for (bool first = true; first || !rest.empty(); first = false) {
          const size_t comma = several ? rest.find(',') : std::string_view::npos;
          const std::string_view item = rest.substr(0, comma);
          const bool number = !first && !item.empty() && item.size() < 4 &&
                              item.find_first_not_of("0123456789") == std::string_view::npos;
          ok = ok && (number || is_device(item));
          if (comma == std::string_view::npos) break;
          rest.remove_prefix(comma + 1);
          ok = ok && !rest.empty();
        }
        return ok ? std::string()
                  : fmt::format("expected auto, cpu, cuda{}, found \"{}\"",
                                several ? ", cuda:N or a list such as cuda:0,1" : " or cuda:N", s);
      },
      "", "device");
  with_env(
      app.add_option("--device", flags.device,
                     "auto (a CUDA device where there is one, else the CPU), cpu, cuda, cuda:N"))
      ->check(device)
      ->type_name("DEVICE")
      ->group(kDeviceGroup);
  with_env(app.add_option("-t,--threads", flags.threads, "CPU threads (0: all cores)"))
      ->check(CLI::Range(0, 4096))
      ->type_name("N")
      ->group(kDeviceGroup);
  with_env(app.add_option("--prefill-chunk", flags.prefill_chunk,
                          "Prompt tokens per step (0: chosen for the device)"))
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->type_name("N")
      ->group(kDeviceGroup);
  with_env(app.add_option("--state-rounding", flags.state_rounding,
                          "Of an SSM state in 16 bits: nearest, or stochastic, which loses nothing "
                          "on average"))
      ->check(CLI::IsMember({"nearest", "stochastic"}))
      ->type_name("HOW")
      ->group(kDeviceGroup);
}

void add_device_flags(CLI::App& app, DeviceFlags& flags, bool several) {
  add_backend_flags(app, flags, several);
  with_env(
      app.add_option("--dtype", flags.dtype, "Weights as auto (as in the file), f32, bf16, f16"))
      ->check(CLI::IsMember(kWeightTypes))
      ->type_name("DTYPE")
      ->group(kDeviceGroup);
  with_env(app.add_option("--state-dtype", flags.state_dtype, "SSM state as f32, bf16, f16"))
      ->check(CLI::IsMember(kStateTypes))
      ->type_name("DTYPE")
      ->group(kDeviceGroup);
}

void add_dtype_lists(CLI::App& app, DTypeLists& lists) {
  with_env(app.add_option("--dtype", lists.weights,
                          "Weights as auto (as in the file), f32, bf16, f16; several: f32,bf16"))
      ->delimiter(',')
      ->check(CLI::IsMember(kWeightTypes))
      ->type_name("LIST")
      ->group(kDeviceGroup);
  with_env(app.add_option("--state-dtype", lists.state,
                          "SSM state as f32, bf16, f16; several: f32,bf16"))
      ->delimiter(',')
      ->check(CLI::IsMember(kStateTypes))
      ->type_name("LIST")
      ->group(kDeviceGroup);
}

// ---- prompts ----------------------------------------------------------------------------------

std::vector<int32_t> parse_ids(const std::string& list) {
  std::string text = list;
  if (!list.empty() && list[0] == '@') text = read_text(list.substr(1));
  std::vector<int32_t> ids;
  const char* p = text.data();
  const char* end = p + text.size();
  const auto separator = [](char c) {
    return c == ',' || c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '[' || c == ']';
  };
  while (p != end) {
    if (separator(*p)) {
      ++p;
      continue;
    }
    int32_t id = 0;
    const auto [next, ec] = std::from_chars(p, end, id);
    if (ec != std::errc() || id < 0 || (next != end && !separator(*next))) {
      std::string word(p, std::find_if(p, end, separator));
      if (word.size() > 20) word = word.substr(0, 17) + "...";
      throw Error(ErrorKind::usage,
                  fmt::format("expected token ids such as 1,2,3, found \"{}\"", word));
    }
    ids.push_back(id);
    p = next;
  }
  return ids;
}

std::string read_text(const std::string& file) {
  std::string text;
  if (file == "-") {
    text.assign(std::istreambuf_iterator<char>(std::cin), {});
    return text;
  }
  std::error_code ec;
  if (std::filesystem::is_directory(file, ec)) {
    throw Error(ErrorKind::file, fmt::format("{} is a folder, a file is expected", file));
  }
  std::ifstream in(file, std::ios::binary);
  if (!in) throw Error(ErrorKind::file, fmt::format("cannot read {}: {}", file, strerror(errno)));
  text.assign(std::istreambuf_iterator<char>(in), {});
  if (in.bad()) throw Error(ErrorKind::file, fmt::format("cannot read {}", file));
  return text;
}

void require_utf8(std::string_view text, std::string_view what) {
  const auto* p = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  const auto size = static_cast<utf8proc_ssize_t>(text.size());
  for (utf8proc_ssize_t i = 0; i < size;) {
    utf8proc_int32_t c = 0;
    const utf8proc_ssize_t n = p[i] < 0x80 ? 1 : utf8proc_iterate(p + i, size - i, &c);
    if (n <= 0) {
      throw Error(ErrorKind::usage,
                  fmt::format("{} is not UTF-8: byte {} is 0x{:02x}, which starts no character",
                              what, i, p[i]),
                  "convert it first, e.g. with iconv -f latin1 -t utf-8");
    }
    i += n;
  }
}

void PromptFlags::add(CLI::App& app, bool positional, bool trim) {
  trim_ = trim;
  if (positional) {
    positional_option_ = app.add_option("PROMPT", positional_,
                                        "Text to start from; else -p, -f, "
                                        "--ids or stdin")
                             ->type_name("");
  }
  text_option_ = with_env(app.add_option("-p,--prompt", text_, "Text"))->type_name("TEXT");
  file_option_ = with_env(app.add_option("-f,--file", file_, "Text from a file (- for stdin)"))
                     ->type_name("FILE");
  ids_option_ = with_env(app.add_option("--ids", ids_, "Token ids instead of text: 1,2,3 or @FILE"))
                    ->type_name("IDS");
}

std::vector<CLI::Option*> PromptFlags::sources() const {
  std::vector<CLI::Option*> given;
  for (CLI::Option* o : {positional_option_, text_option_, file_option_, ids_option_}) {
    if (o != nullptr && o->count() > 0) given.push_back(o);
  }
  // What the command line says replaces what the environment says.
  if (std::any_of(given.begin(), given.end(), [](auto* o) { return on_command_line(*o); })) {
    std::erase_if(given, [](auto* o) { return !on_command_line(*o); });
  }
  return given;
}

bool PromptFlags::given() const {
  const std::vector<CLI::Option*> given = sources();
  return !given.empty() && on_command_line(*given[0]);
}

Prompt PromptFlags::read() const {
  const std::vector<CLI::Option*> given = sources();
  if (given.size() > 1) {
    throw Error(ErrorKind::usage, fmt::format("more than one prompt is given: {} and {}",
                                              given[0]->get_name(), given[1]->get_name()));
  }

  Prompt prompt;
  if (!given.empty() && given[0] == ids_option_) {
    prompt.ids = parse_ids(ids_);
    if (prompt.ids.empty()) throw Error(ErrorKind::usage, "--ids: the list is empty");
    return prompt;
  }
  if (!given.empty() && given[0] != file_option_) {
    prompt.text = given[0] == positional_option_ ? positional_ : text_;
  } else {
    if (given.empty() && isatty(STDIN_FILENO) == 1) {
      throw Error(
          ErrorKind::usage, "no prompt is given",
          "write it as an argument in quotes, or use -p TEXT, -f FILE, --ids 1,2,3, or stdin");
    }
    prompt.text = read_text(given.empty() ? "-" : file_);
    if (trim_ && !prompt.text->empty() && prompt.text->back() == '\n') {
      prompt.text->pop_back();
      if (!prompt.text->empty() && prompt.text->back() == '\r') prompt.text->pop_back();
    }
    if (trim_ && prompt.text->empty()) {
      throw Error(ErrorKind::usage,
                  given.empty() ? "the prompt on stdin is empty"
                                : fmt::format("the prompt in {} is empty", file_),
                  "-p \"\" generates from the start-of-text token alone");
    }
  }
  require_utf8(*prompt.text, trim_ ? "the prompt" : "the text");
  return prompt;
}

// ---- sampling ---------------------------------------------------------------------------------

void SamplingFlags::add(CLI::App& app) {
  const auto option = [&](const char* names, auto& target, const char* text, const char* type) {
    return with_env(app.add_option(names, target, text))->type_name(type)->group(kGenerationGroup);
  };
  const auto flag = [&](const char* names, bool& target, const char* text) {
    return with_env(app.add_flag(names, target, text))->group(kGenerationGroup);
  };
  option(
      "-n,--max-new-tokens", max_new_tokens_,
      "Tokens to generate at most; -1: until the end of text (default: generation_config.json's, "
      "else 128)",
      "N");
  option("-s,--seed", seed_, "Seed of the draws; -1: a random one (default)", "N");
  temperature_option_ =
      option("--temp,--temperature", temperature_, "0: greedy (default 0.8)", "T");
  option("--top-k", top_k_, "Draw from the K likeliest; 0: off (default 40)", "K");
  option("--top-p", top_p_, "Draw from the likeliest that make up P; 1: off (default 0.95)", "P");
  option("--min-p", min_p_,
         "Drop tokens less likely than P times the likeliest; 0: off (default 0.05)", "P");
  option("--typical-p", typical_p_, "Locally typical sampling; 1: off (default)", "P");
  option("--repeat-penalty,--repetition-penalty", repeat_penalty_,
         "Divide the logits of tokens seen; 1: off (default)", "R");
  option("--presence-penalty", presence_penalty_, "Subtract from the logits of tokens seen", "R");
  option("--frequency-penalty", frequency_penalty_, "Subtract for each time a token was seen", "R");
  option("--repeat-last-n", repeat_last_n_,
         "Window of the penalties in tokens; 0: off, -1: all (default 64)", "N");
  option("--logit-bias", logit_bias_, "Add V to the logit of a token; -inf forbids it (repeatable)",
         "ID=V")
      ->allow_extra_args(false);
  option("--stop", stops, "End before this text, which is not shown (repeatable)", "TEXT")
      ->allow_extra_args(false);
  flag("--ignore-eos", ignore_eos, "Never draw the end-of-text token");
  greedy_option_ = flag("--greedy", greedy_, "The likeliest token each time, as --temp 0");
  option("--logprobs", logprobs,
         "With --json: log-probabilities of each token and of the N likeliest", "N")
      ->check(CLI::Range(0, 1 << 20));
}

SampleParams SamplingFlags::params(const GenerationConfig& config) const {
  require_range(temperature_, "--temp", 0.0F, 1e6F, "a number of at least 0");
  require_range(top_k_, "--top-k", 0, std::numeric_limits<int32_t>::max(), "0 or more");
  require_range(top_p_, "--top-p", 0.0F, 1.0F, "a number from 0 to 1");
  require_range(min_p_, "--min-p", 0.0F, 1.0F, "a number from 0 to 1");
  require_range(typical_p_, "--typical-p", 0.0F, 1.0F, "a number from 0 to 1");
  require_range(repeat_penalty_, "--repeat-penalty", 1e-6F, 1e6F, "a number above 0");
  require_range(presence_penalty_, "--presence-penalty", -1e6F, 1e6F, "a finite number");
  require_range(frequency_penalty_, "--frequency-penalty", -1e6F, 1e6F, "a finite number");
  require_range(repeat_last_n_, "--repeat-last-n", -1, std::numeric_limits<int32_t>::max(),
                "-1 or more");
  require_range(seed_, "--seed", int64_t{-1}, std::numeric_limits<int64_t>::max(), "-1 or more");

  SampleParams p = default_sampling(config);
  const bool filters = top_k_ || top_p_ || min_p_ || typical_p_;
  if (p.temperature <= 0.0F && !temperature_ && filters) {
    // Greedy was only the file's wish, and a filter means nothing without a draw.
    GenerationConfig sampling = config;
    sampling.do_sample = true;
    p = default_sampling(sampling);
  }
  p.temperature = temperature_.value_or(p.temperature);
  p.top_k = top_k_.value_or(p.top_k);
  p.top_p = top_p_.value_or(p.top_p);
  p.min_p = min_p_.value_or(p.min_p);
  p.typical_p = typical_p_.value_or(p.typical_p);
  if (repeat_penalty_) {
    p.repeat_penalty = *repeat_penalty_;
    p.repeat_last_n = SampleParams{}.repeat_last_n;
  }
  p.presence_penalty = presence_penalty_.value_or(p.presence_penalty);
  p.frequency_penalty = frequency_penalty_.value_or(p.frequency_penalty);
  p.repeat_last_n = repeat_last_n_.value_or(p.repeat_last_n);
  // A --temp on the command line wins over a KRAIT_GREEDY in the environment.
  const bool temp_wins = on_command_line(*temperature_option_) && !on_command_line(*greedy_option_);
  if (greedy_ && !temp_wins) p.temperature = 0.0F;
  if (seed_ && *seed_ >= 0) {
    p.seed = static_cast<uint64_t>(*seed_);
  } else {
    // 32 bits are enough to be different, and short enough to type again.
    p.seed = std::random_device{}();
  }
  return p;
}

LogitBias SamplingFlags::bias() const {
  LogitBias bias;
  for (const std::string& item : logit_bias_) {
    const size_t equals = item.find('=');
    int32_t id = -1;
    float value = 0;
    bool ok = false;
    if (equals != std::string::npos) {
      const char* first = item.data();
      const auto [id_end, id_error] = std::from_chars(first, first + equals, id);
      const std::string text = item.substr(equals + 1);
      char* value_end = nullptr;
      value = std::strtof(text.c_str(), &value_end);
      ok = id_error == std::errc() && id_end == first + equals && id >= 0 && !text.empty() &&
           *value_end == '\0' && !std::isnan(value);
    }
    require(ok, "--logit-bias", "ID=V, such as 187=-1.5 or 0=-inf", "\"" + item + "\"");
    bias.emplace_back(id, value);
  }
  return bias;
}

int64_t SamplingFlags::max_new_tokens(const GenerationConfig& config) const {
  constexpr int64_t kDefault = 128;
  require_range(max_new_tokens_, "--max-new-tokens", int64_t{-1},
                std::numeric_limits<int64_t>::max(), "-1 or more");
  return max_new_tokens_.value_or(config.max_new_tokens.value_or(kDefault));
}

}  // namespace krait
