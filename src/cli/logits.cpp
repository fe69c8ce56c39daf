// krait logits: the logits of every position of a text, to compare implementations.
#include <algorithm>
#include <cmath>
#include <memory>
#include <span>

#include "base/output_file.h"
#include "cli/command.h"
#include "cli/console.h"
#include "cli/json_out.h"
#include "cli/session.h"
#include "runtime/generate.h"

namespace krait {

namespace {

struct LogitsFlags {
  ModelFlags model;
  DeviceFlags device;
  PromptFlags prompt;
  std::string output;
  bool last = false;
  bool json = false;
  int top = 10;
};

/// A safetensors file with `ids` int64 [L] and `logits` float32 [rows, vocab], written row by row:
/// the logits of a long text do not fit into memory. (Format: 8 bytes length of the header, the
/// header as JSON padded with spaces to a multiple of 8, then the data.)
class LogitsFile {
 public:
  LogitsFile(const std::string& path, const std::vector<int32_t>& ids, int64_t rows, int64_t vocab)
      : file_(path) {
    const std::vector<int64_t> wide(ids.begin(), ids.end());
    const size_t ids_bytes = wide.size() * sizeof(int64_t);
    const size_t logits_bytes = static_cast<size_t>(rows * vocab) * sizeof(float);
    const OrderedJson header = {
        {"ids",
         {{"dtype", "I64"}, {"shape", {wide.size()}}, {"data_offsets", {size_t{0}, ids_bytes}}}},
        {"logits",
         {{"dtype", "F32"},
          {"shape", {rows, vocab}},
          {"data_offsets", {ids_bytes, ids_bytes + logits_bytes}}}}};
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const auto size = static_cast<uint64_t>(text.size());
    file_.write(std::as_bytes(std::span(&size, 1)));
    file_.write(std::as_bytes(std::span(text)));
    file_.write(std::as_bytes(std::span(wide)));
  }
  void append(const float* rows, size_t count) {
    file_.write(std::as_bytes(std::span(rows, count)));
  }
  void commit() { file_.commit(); }

 private:
  OutputFile file_;
};

void print_top(const LogitsFlags& flags, const Session& session, const std::vector<int32_t>& ids,
               std::span<const float> last) {
  const std::vector<TokenLogprob> top = top_log_probabilities(last, flags.top);
  const Tokenizer* tokenizer = session.tokenizer.get();
  if (flags.json) {
    OrderedJson j = {{"model", session.source.name}, {"ids", ids}, {"position", ids.size() - 1}};
    j["top"] = OrderedJson::array();
    for (const TokenLogprob& t : top) {
      OrderedJson row = {{"id", t.id}};
      if (tokenizer != nullptr) row["token"] = tokenizer->token_text(t.id);
      row["logit"] = short_double(last[static_cast<size_t>(t.id)]);
      row["logprob"] = short_double(t.logprob);
      j["top"].push_back(std::move(row));
    }
    write_stdout(dump_json(j));
    return;
  }
  std::string table = fmt::format("{:>8} {:>12} {:>10}  token\n", "id", "logit", "logprob");
  for (const TokenLogprob& t : top) {
    table += fmt::format("{:>8} {:>12.5f} {:>10.4f}  {}\n", t.id, last[static_cast<size_t>(t.id)],
                         t.logprob, tokenizer != nullptr ? tokenizer->token_text(t.id) : "");
  }
  write_stdout(table);
}

int logits(const LogitsFlags& flags, const CommonFlags& common) {
  const Prompt prompt = flags.prompt.read();
  const Session session = open_session(flags.model, flags.device, common);
  const std::vector<int32_t> ids = prompt_ids(session, prompt);
  const int64_t vocab = session.model->config().vocab_size;

  EngineOptions options;
  options.prefill_chunk = flags.device.prefill_chunk;
  options.state_dtype = flags.device.ssm_dtype();
  options.state_rounding = flags.device.ssm_rounding();
  options.penalties = false;
  Engine engine(*session.model, *session.ops, options);
  engine.open(0, SampleParams{});

  const InterruptGuard interrupt;
  const auto cancelled = [] { return InterruptGuard::requested(); };
  const bool last_only = flags.last || flags.output.empty();
  if (flags.output.empty()) {
    std::vector<float> last;
    const auto keep = [&](int64_t, int64_t n, const float* rows) {
      last.assign(rows + (n - 1) * vocab, rows + n * vocab);
    };
    if (!engine.prefill(0, ids, false, keep, last_only, cancelled)) return kExitInterrupted;
    print_top(flags, session, ids, last);
    return 0;
  }

  const auto n_rows = last_only ? int64_t{1} : static_cast<int64_t>(ids.size());
  if (std::error_code ec; std::filesystem::exists(flags.output, ec) &&
                          !std::filesystem::is_regular_file(flags.output, ec)) {
    // The finished file takes the place of what is there, which must not be a folder or a device.
    throw Error(ErrorKind::usage, fmt::format("-o {} is no regular file", flags.output));
  }
  LogitsFile file(flags.output, ids, n_rows, vocab);
  const auto append = [&](int64_t, int64_t n, const float* rows) {
    file.append(rows, static_cast<size_t>(n * vocab));
  };
  if (!engine.prefill(0, ids, false, append, last_only, cancelled)) return kExitInterrupted;
  file.commit();
  return 0;
}

}  // namespace

Command add_logits_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub =
      app.add_subcommand("logits", "Logits of a text: a file, or the likeliest next tokens");
  auto flags = std::make_shared<LogitsFlags>();
  flags->prompt.add(*sub, /*positional=*/true, /*trim=*/true);
  with_env(sub->add_option("-o,--output", flags->output,
                           "Write logits float32 [L, vocab] and ids int64 [L] as safetensors"))
      ->type_name("FILE");
  with_env(sub->add_flag("--last", flags->last, "Only the last position (without -o always)"));
  with_env(sub->add_option("--top", flags->top, "Without -o: how many tokens to list (default 10)"))
      ->check(CLI::Range(1, 1 << 20))
      ->type_name("N");
  with_env(sub->add_flag("--json", flags->json, "Without -o: JSON instead of a table"));
  add_model_flags(*sub, flags->model);
  add_device_flags(*sub, flags->device);
  add_common_flags(*sub, common);
  return {sub, [flags, &common] { return logits(*flags, common); }};
}

}  // namespace krait
