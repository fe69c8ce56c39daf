// krait inspect: what is in a model, and what it costs, without bringing its weights to a device.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "cli/command.h"
#include "cli/console.h"
#include "cli/json_out.h"
#include "cli/session.h"
#include "runtime/engine.h"

namespace krait {

namespace {

struct InspectFlags {
  std::string positional;
  ModelFlags model;
  DeviceFlags device;
  int64_t batch = 1;
  bool json = false;
};

/// The counts behind the listing.
struct Costs {
  DType weight_dtype = DType::f32;
  DType activation_dtype = DType::f32;
  EngineMemory memory;       ///< at the batch asked for
  size_t read_per_step = 0;  ///< weights read, state read and written by one decode step
};

Costs count(const Model& model, const Ops& op, const InspectFlags& flags) {
  const ModelConfig& config = model.config();
  EngineOptions options;
  options.n_slot = flags.batch;
  options.prefill_chunk = flags.device.prefill_chunk;
  options.state_dtype = flags.device.ssm_dtype();
  Costs c;
  c.weight_dtype = model.weight_dtype();
  c.activation_dtype = op.activation_dtype(c.weight_dtype);
  c.memory = plan_memory(config, op, c.weight_dtype, options);
  c.memory.weights = model.weight_bytes();
  // A step gathers one row of the embedding for each sequence: the table itself is read as the
  // head, when tied, or not at all.
  const auto table =
      static_cast<size_t>(config.vocab_rows * config.d_model) * itemsize(c.weight_dtype);
  c.read_per_step = c.memory.weights - (config.tie_embeddings ? 0 : table) +
                    static_cast<size_t>(flags.batch) * 2 * c.memory.state_per_sequence;
  return c;
}

OrderedJson config_json(const ModelConfig& c) {
  OrderedJson j = {{"family", c.family}, {"layout", c.layout}};
  for (const ConfigSize& size : kConfigSizes) {
    if (c.*size.value > 0) j[std::string(size.name)] = c.*size.value;
  }
  j["norm_eps"] = short_double(c.norm_eps);
  if (c.mixer_norm_eps > 0) j["mixer_norm_eps"] = short_double(c.mixer_norm_eps);
  j["tie_embeddings"] = c.tie_embeddings;
  j["eos_ids"] = c.eos_ids;
  j["bos_id"] = c.bos_id ? OrderedJson(*c.bos_id) : OrderedJson();
  return j;
}

std::string dims(const Shape& shape) {
  std::string s;
  for (int i = 0; i < shape.rank(); ++i) s += fmt::format("{}{}", i > 0 ? " x " : "", shape[i]);
  return s;
}

int inspect(const InspectFlags& flags) {
  if (!flags.positional.empty() && !flags.model.model.empty() &&
      flags.positional != flags.model.model) {
    throw Error(ErrorKind::usage, fmt::format("two models are named: {} and {}", flags.positional,
                                              flags.model.model));
  }
  const ModelSource source =
      find_model(flags.positional.empty() ? flags.model.model : flags.positional);
  const auto checkpoint = open_checkpoint(source.checkpoint);
  const ModelConfig config = read_config(source, *checkpoint);
  // The plain CPU backend uses weights where the file is mapped, so counting them reads next to
  // nothing; the device itself only says how it would compute.
  const auto host = make_cpu_ops(1, /*fast=*/false);
  const auto model = load_model(config, *checkpoint, *host, flags.device.weight_dtype());
  const auto tokenizer =
      find_tokenizer(source, model->config(), checkpoint->metadata(), flags.model.tokenizer);
  const Costs c = count(*model, *open_device(flags.device), flags);
  const auto n = static_cast<size_t>(flags.batch);
  const EngineMemory& m = c.memory;
  const size_t memory = m.weights + m.state + m.activations;

  if (flags.json) {
    OrderedJson j = {{"model", source.name}, {"format", checkpoint->format()}};
    j["config"] = config_json(model->config());
    j["tokenizer"] = tokenizer ? OrderedJson(tokenizer->description()) : OrderedJson();
    j["parameters"] = model->parameter_count();
    j["dtype"] = dtype_name(c.weight_dtype);
    j["activation_dtype"] = dtype_name(c.activation_dtype);
    j["state_dtype"] = dtype_name(flags.device.ssm_dtype());
    j["weight_bytes"] = m.weights;
    j["state_bytes_per_sequence"] = m.state_per_sequence;
    j["batch"] = flags.batch;
    j["state_bytes"] = m.state;
    j["activation_bytes"] = m.activations;
    j["memory_bytes"] = memory;
    j["bytes_per_step"] = c.read_per_step;
    j["bytes_per_token"] = c.read_per_step / n;
    j["tensors"] = OrderedJson::array();
    for (const Checkpoint::Entry& e : checkpoint->entries()) {
      OrderedJson shape = OrderedJson::array();
      const Shape dims = e.shape();
      for (int i = 0; i < dims.rank(); ++i) shape.push_back(dims[i]);
      j["tensors"].push_back({{"name", e.name},
                              {"dtype", e.type_name()},
                              {"shape", shape},
                              {"bytes", e.tensor.bytes()},
                              {"file", e.file}});
    }
    write_stdout(dump_json(j, 2));
    return 0;
  }

  std::string out = fmt::format("{} ({}, {} tensors)\n\n", source.name, checkpoint->format(),
                                checkpoint->entries().size());
  const OrderedJson keys = config_json(model->config());
  for (const auto& [key, value] : keys.items()) {
    out += fmt::format("  {:<26}{}\n", key,
                       value.is_string() ? value.get<std::string>() : value.dump());
  }
  out += fmt::format("  {:<26}{}\n\n", "tokenizer", tokenizer ? tokenizer->description() : "none");
  const auto line = [&](std::string_view key, const std::string& value) {
    out += fmt::format("  {:<26}{}\n", key, value);
  };
  line("parameters", fmt::format("{}", model->parameter_count()));
  line("weights", fmt::format("{} in {}", human_bytes(m.weights), dtype_name(c.weight_dtype)));
  line("state per sequence",
       fmt::format("{} (ssm in {}, convolution in {})", human_bytes(m.state_per_sequence),
                   dtype_name(flags.device.ssm_dtype()), dtype_name(c.activation_dtype)));
  line(fmt::format("memory at batch {}", n),
       fmt::format("{} (weights {}, state {}, activations {})", human_bytes(memory),
                   human_bytes(m.weights), human_bytes(m.state), human_bytes(m.activations)));
  line(fmt::format("bytes per token, batch {}", n),
       fmt::format("{} (weights once a step; state read and written)",
                   human_bytes(c.read_per_step / n)));
  size_t width = 0;
  for (const auto& e : checkpoint->entries()) width = std::max(width, e.name.size());
  out += fmt::format("\n  {:<{}}  {:<5}  {:<20}  {:>10}\n", "tensor", width, "dtype", "shape",
                     "bytes");
  for (const auto& e : checkpoint->entries()) {
    out += fmt::format("  {:<{}}  {:<5}  {:<20}  {:>10}\n", e.name, width, e.type_name(),
                       dims(e.shape()), e.tensor.bytes());
  }
  write_stdout(out);
  return 0;
}

}  // namespace

Command add_inspect_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub = app.add_subcommand("inspect", "Config, tensors and costs of a model");
  auto flags = std::make_shared<InspectFlags>();
  sub->add_option("MODEL", flags->positional, "As for -m")->type_name("");
  with_env(
      sub->add_option("--batch", flags->batch, "Sequences for the memory and bytes (default 1)"))
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("N");
  with_env(sub->add_flag("--json", flags->json, "JSON instead of a listing"));
  add_model_flags(*sub, flags->model);
  add_device_flags(*sub, flags->device);
  add_common_flags(*sub, common);
  return {sub, [flags] { return inspect(*flags); }};
}

}  // namespace krait
