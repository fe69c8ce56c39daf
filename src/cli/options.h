// Flags that several commands share. Each has an environment name, KRAIT_ and the long name in
// capitals; a flag on the command line wins over it.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "kernels/ops.h"
#include "runtime/engine.h"
#include "runtime/generation_config.h"

namespace krait {

/// Adds the environment name of the option's last long name (`--temp,--temperature`:
/// KRAIT_TEMPERATURE).
CLI::Option* with_env(CLI::Option* option);

/// True if the option was written on the command line, not taken from the environment.
[[nodiscard]] bool on_command_line(const CLI::Option& option);

struct CommonFlags {
  bool verbose = false;
  bool quiet = false;
  std::string log_level;
};
void add_common_flags(CLI::App& app, CommonFlags& flags);
/// Sets up logging as the flags say.
void apply_common_flags(const CommonFlags& flags);

struct ModelFlags {
  std::string model;      ///< empty: the one that ships with krait
  std::string tokenizer;  ///< empty: the one beside the model
};
void add_model_flags(CLI::App& app, ModelFlags& flags);

/// A name that --dtype takes, other than auto.
[[nodiscard]] DType parse_dtype(const std::string& name);

struct DeviceFlags {
  std::string device = "auto";
  std::string dtype = "auto";
  std::string state_dtype = "f32";
  std::string state_rounding = "nearest";
  int threads = 0;
  int64_t prefill_chunk = 0;

  [[nodiscard]] std::optional<DType> weight_dtype() const;  ///< empty: auto
  [[nodiscard]] DType ssm_dtype() const;
  [[nodiscard]] Rounding ssm_rounding() const;
};
/// `several`: --device may be a list, such as cuda:0,1.
void add_device_flags(CLI::App& app, DeviceFlags& flags, bool several = false);
/// --device, --threads, --prefill-chunk and --state-rounding alone.
void add_backend_flags(CLI::App& app, DeviceFlags& flags, bool several = false);

/// --dtype and --state-dtype as lists, for a command that tries several.
struct DTypeLists {
  std::vector<std::string> weights{"auto"};
  std::vector<std::string> state{"f32"};
};
void add_dtype_lists(CLI::App& app, DTypeLists& lists);

/// What a prompt is made of: text or ids.
struct Prompt {
  std::optional<std::string> text;
  std::vector<int32_t> ids;
  bool rendered = false;  ///< the text is a chat template's, special tokens and all
};

/// [PROMPT | -p PROMPT | -f FILE | --ids LIST | stdin]
class PromptFlags {
 public:
  /// `trim`: drop the one line break that ends a file or stdin, as llama.cpp does: an editor put it
  /// there, not the writer of the prompt.
  void add(CLI::App& app, bool positional, bool trim);
  /// Errors: usage (none given, several given, text that is not UTF-8, ids that are no numbers,
  /// nothing on stdin), file.
  [[nodiscard]] Prompt read() const;
  /// Whether the command line gives one.
  [[nodiscard]] bool given() const;

 private:
  [[nodiscard]] std::vector<CLI::Option*> sources() const;

  std::string positional_;
  std::string text_;
  std::string file_;
  std::string ids_;
  CLI::Option* positional_option_ = nullptr;
  CLI::Option* text_option_ = nullptr;
  CLI::Option* file_option_ = nullptr;
  CLI::Option* ids_option_ = nullptr;
  bool trim_ = false;
};

/// Reads "1,2,3" (or the ids in the file after '@'), separated by commas or white space.
[[nodiscard]] std::vector<int32_t> parse_ids(const std::string& list);

/// The whole of a file, or of stdin for "-". Errors: file.
[[nodiscard]] std::string read_text(const std::string& file);

/// Error usage unless `text` is UTF-8; `what` names it ("the prompt").
void require_utf8(std::string_view text, std::string_view what);

class SamplingFlags {
 public:
  void add(CLI::App& app);
  /// The defaults of the model's files, replaced by what the flags say. A seed that was not given
  /// is drawn here. Errors: usage (a value out of range).
  [[nodiscard]] SampleParams params(const GenerationConfig& config) const;
  [[nodiscard]] LogitBias bias() const;
  /// Empty where none was given; -1 asks for a random one.
  [[nodiscard]] std::optional<int64_t> seed() const noexcept { return seed_; }
  /// Tokens to generate at most; -1 for no limit.
  [[nodiscard]] int64_t max_new_tokens(const GenerationConfig& config) const;

  std::vector<std::string> stops;
  bool ignore_eos = false;
  std::optional<int> logprobs;

 private:
  std::optional<int64_t> max_new_tokens_;
  std::optional<int64_t> seed_;
  std::optional<float> temperature_, top_p_, min_p_, typical_p_;
  std::optional<float> repeat_penalty_, presence_penalty_, frequency_penalty_;
  std::optional<int32_t> top_k_, repeat_last_n_;
  std::vector<std::string> logit_bias_;
  bool greedy_ = false;
  CLI::Option* greedy_option_ = nullptr;
  CLI::Option* temperature_option_ = nullptr;
};

}  // namespace krait
