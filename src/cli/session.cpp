#include "cli/session.h"

#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdlib>

#include "cli/console.h"
#include "model/random_weights.h"

namespace krait {

namespace {

Error no_tokenizer(const std::string& model) {
  return {ErrorKind::file, fmt::format("{} has no tokenizer", model),
          "give one with --tokenizer PATH, or work on ids with --ids and --print-ids"};
}

}  // namespace

const Tokenizer& Session::require_tokenizer() const {
  if (!tokenizer) throw no_tokenizer(source.name);
  return *tokenizer;
}

int device_index(const DeviceFlags& flags) {
  const size_t colon = flags.device.find(':');
  return colon == std::string::npos
             ? 0
             : std::atoi(flags.device.c_str() + colon + 1);  // checked by CLI
}

std::unique_ptr<Ops> open_device(const DeviceFlags& flags) {
  if (flags.device == "cpu" || (flags.device == "auto" && cuda_device_count() == 0)) {
    return make_cpu_ops(flags.threads);
  }
  return make_cuda_ops(device_index(flags));
}

Session open_session(const ModelFlags& model, const DeviceFlags& device,
                     const CommonFlags& common) {
  const auto start = std::chrono::steady_clock::now();
  Session s;
  s.source = find_model(model.model);
  s.checkpoint = open_checkpoint(s.source.checkpoint);
  const ModelConfig config = read_config(s.source, *s.checkpoint);
  s.generation = read_generation_config(s.source);
  s.ops = open_device(device);
  {
    ProgressBar bar("loading", !common.quiet);
    s.model = load_model(config, *s.checkpoint, *s.ops, device.weight_dtype(),
                         [&](size_t done, size_t total) { bar.update(done, total); });
  }
  s.tokenizer =
      find_tokenizer(s.source, s.model->config(), s.checkpoint->metadata(), model.tokenizer);
  s.load_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  spdlog::debug("{}: {}, {} parameters, {} on {}, {}; loaded in {:.2f} s", s.source.name,
                s.model->config().family, s.model->parameter_count(),
                dtype_name(s.model->weight_dtype()), s.ops->info().name,
                s.tokenizer ? s.tokenizer->description() : "no tokenizer", s.load_seconds);
  return s;
}

Session open_random_session(const std::string& shape, const DeviceFlags& device) {
  Session s;
  s.source.name = shape;
  const ModelConfig config = published_config(shape);
  s.ops = open_device(device);
  const bool cuda = s.ops->backend() == "cuda";
  const DType dtype = device.weight_dtype().value_or(cuda ? DType::bf16 : DType::f32);
  // The CPU uses the weights where they lie; a device gets a copy.
  s.checkpoint = make_random_checkpoint(config, dtype, /*seed=*/0,
                                        cuda ? RandomMemory::shared : RandomMemory::distinct);
  const auto start = std::chrono::steady_clock::now();
  s.model = load_model(config, *s.checkpoint, *s.ops, dtype);
  s.load_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return s;
}

std::vector<int32_t> prompt_ids(const Session& session, const Prompt& prompt) {
  std::vector<int32_t> ids = prompt.ids;
  if (prompt.text) {
    ids = session.require_tokenizer().encode(
        *prompt.text, {.add_special = !prompt.rendered, .rendered = prompt.rendered});
    if (ids.empty()) {
      const auto start =
          start_of_text_id(session.generation, session.model->config(), session.tokenizer.get());
      if (!start) {
        throw Error(ErrorKind::usage,
                    "the prompt is empty, and the model names no token to start a text from");
      }
      ids.push_back(*start);
    }
  }
  const int64_t vocab = session.model->config().vocab_size;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab) {
      throw Error(ErrorKind::usage,
                  fmt::format("token id {} is outside the model's vocabulary of {}", id, vocab),
                  prompt.text ? "the tokenizer does not belong to this model" : "");
    }
  }
  return ids;
}

}  // namespace krait
