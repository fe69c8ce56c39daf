#include "model/gguf.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "checkpoint/gguf.h"
#include "model/family.h"

namespace krait {

namespace {

/// Names without the parts "backbone.layers.N." and "blk.N.", which stand for each other. A family
/// has one of the tensors that share a name.
struct NamePair {
  std::string_view krait;
  std::string_view ggml;
};
constexpr NamePair kWholeModel[] = {
    {"backbone.embedding.weight", "token_embd.weight"},
    {"backbone.norm_f.weight", "output_norm.weight"},
    {"lm_head.weight", "output.weight"},
};
constexpr NamePair kBlock[] = {
    {"norm.weight", "attn_norm.weight"},
    {"mixer.in_proj.weight", "ssm_in.weight"},
    {"mixer.conv1d.weight", "ssm_conv1d.weight"},
    {"mixer.conv1d.bias", "ssm_conv1d.bias"},
    {"mixer.x_proj.weight", "ssm_x.weight"},
    {"mixer.dt_proj.weight", "ssm_dt.weight"},
    {"mixer.dt_proj.bias", "ssm_dt.bias"},
    {"mixer.dt_bias", "ssm_dt.bias"},
    {"mixer.A_log", "ssm_a"},
    {"mixer.D", "ssm_d"},
    {"mixer.norm.weight", "ssm_norm.weight"},
    {"mixer.out_proj.weight", "ssm_out.weight"},
};
constexpr std::string_view kKraitBlocks = "backbone.layers.";
constexpr std::string_view kGgmlBlocks = "blk.";

std::string_view ggml_of(std::span<const NamePair> table, std::string_view krait) {
  const auto it =
      std::find_if(table.begin(), table.end(), [&](const NamePair& p) { return p.krait == krait; });
  return it == table.end() ? std::string_view() : it->ggml;
}

/// "N" and what is behind the dot, of "<prefix>N.rest"; both empty for other names.
std::pair<std::string_view, std::string_view> block_and_rest(std::string_view name,
                                                             std::string_view prefix) {
  if (!name.starts_with(prefix)) return {};
  name.remove_prefix(prefix.size());
  const size_t dot = name.find('.');
  if (dot == 0 || dot == std::string_view::npos) return {};
  return {name.substr(0, dot), name.substr(dot + 1)};
}

class RenamedGguf final : public Checkpoint {
 public:
  RenamedGguf(const Checkpoint& gguf, const ModelConfig& config) : gguf_(gguf) {
    std::map<std::string_view, TensorRow> rows;  // by ggml's name
    for (const TensorRow& row : family_named(config.family).tensors(config)) {
      if (const auto name = ggml_of(kBlock, row.name); !name.empty()) rows.emplace(name, row);
    }
    for (Entry e : gguf.entries()) {
      const std::string original = e.name;
      const auto [block, rest] = block_and_rest(original, kGgmlBlocks);
      if (const auto row = rows.find(rest); row != rows.end()) {
        std::string name(row->second.name);
        if (row->second.role == Role::negative_exp) name.resize(name.size() - 4);  // "_log"
        e.name = fmt::format("{}{}.{}", kKraitBlocks, block, name);
        take_shape(e, row->second.shape);
      } else {
        for (const NamePair& p : kWholeModel) {
          if (p.ggml == original) e.name = p.krait;
        }
      }
      if (e.name != original) e.file += ", where it is " + original;
      entries_.push_back(std::move(e));
    }
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.name < b.name; });
  }

  [[nodiscard]] const std::vector<Entry>& entries() const override { return entries_; }
  [[nodiscard]] std::string_view format() const override { return gguf_.format(); }

 private:
  /// ggml has vectors of one value per head as [n_head, 1], and the weight of a norm of groups as
  /// [n_group, width of a group].
  static void take_shape(Entry& e, const Shape& wanted) {
    if (wanted.rank() == 1 && e.blocks == nullptr && e.tensor.numel() == wanted.numel()) {
      e.tensor = Tensor(e.tensor.data, e.tensor.dtype, wanted);
    }
  }

  const Checkpoint& gguf_;
  std::vector<Entry> entries_;
};

}  // namespace

nlohmann::json gguf_config_json(const Checkpoint& gguf) {
  const GgufMetadata& m = *gguf.metadata();
  const auto arch = m.text("general.architecture");
  if (!arch) m.fail("general.architecture", "a string");
  if (*arch != "mamba" && *arch != "mamba2") {
    throw Error(
        ErrorKind::unsupported,
        fmt::format("{}: general.architecture \"{}\" is not supported", m.file(), printable(*arch)),
        "krait reads GGUF files of the architectures mamba and mamba2");
  }
  const auto key = [&](std::string_view name) { return fmt::format("{}.{}", *arch, name); };
  const auto size = [&](std::string_view name) {
    const auto v = m.integer(key(name));
    if (!v) m.fail(key(name), "an integer");
    return *v;
  };

  nlohmann::json j = {{"hidden_size", size("embedding_length")},
                      {"num_hidden_layers", size("block_count")},
                      {"intermediate_size", size("ssm.inner_size")},
                      {"state_size", size("ssm.state_size")},
                      {"conv_kernel", size("ssm.conv_kernel")}};
  const int64_t rank = size("ssm.time_step_rank");
  if (*arch == "mamba2") {
    // ggml calls the number of heads time_step_rank and leaves the width of a head to be divided.
    const int64_t inner = size("ssm.inner_size");
    if (rank < 1 || inner % rank != 0) {
      m.fail(key("ssm.time_step_rank"), fmt::format("a divisor of ssm.inner_size {}", inner));
    }
    j["model_type"] = "mamba2";
    j["num_heads"] = rank;
    j["head_dim"] = inner / rank;
    j["n_groups"] = size("ssm.group_count");
    j["expand"] = static_cast<double>(inner) / static_cast<double>(size("embedding_length"));
  } else {
    // Falcon-Mamba is an option of the architecture. Its eps has no key: the family's own (1e-6)
    // is taken, where llama.cpp takes that of the block norms.
    j["model_type"] = m.boolean(key("ssm.dt_b_c_rms")).value_or(false) ? "falcon_mamba" : "mamba";
    j["time_step_rank"] = rank;
  }
  const auto eps = m.number(key("attention.layer_norm_rms_epsilon"));
  if (!eps) m.fail(key("attention.layer_norm_rms_epsilon"), "a number");
  j["layer_norm_epsilon"] = static_cast<float>(*eps);

  // The vocabulary is the tokens listed; a file without a tokenizer says it or has a row for each.
  const auto* tokens = m.find("tokenizer.ggml.tokens");
  const auto* embedding = gguf.find("token_embd.weight");
  if (const auto n = m.integer(key("vocab_size"))) {
    j["vocab_size"] = *n;
  } else if (tokens != nullptr && tokens->is_array) {
    j["vocab_size"] = tokens->count;
  } else if (embedding != nullptr && embedding->shape().rank() == 2) {
    j["vocab_size"] = embedding->shape()[0];
  }
  j["tie_word_embeddings"] = gguf.find("output.weight") == nullptr;

  std::vector<int64_t> eos;
  for (const char* name : {"eos", "eot", "eom"}) {
    const auto id = m.integer(fmt::format("tokenizer.ggml.{}_token_id", name));
    if (id && *id <= INT32_MAX && std::find(eos.begin(), eos.end(), *id) == eos.end()) {
      eos.push_back(*id);
    }
  }
  j["eos_token_id"] = eos;
  if (const auto bos = m.integer("tokenizer.ggml.bos_token_id"); bos && *bos <= INT32_MAX) {
    j["bos_token_id"] = *bos;
  }
  return j;
}

ModelConfig gguf_config(const Checkpoint& gguf) {
  ModelConfig c = parse_config(gguf_config_json(gguf), gguf.metadata()->file());
  c.layout = "gguf";
  return c;
}

std::unique_ptr<Checkpoint> rename_gguf(const Checkpoint& gguf, const ModelConfig& config) {
  return std::make_unique<RenamedGguf>(gguf, config);
}

std::optional<std::string> gguf_name(std::string_view krait_name) {
  const auto [block, rest] = block_and_rest(krait_name, kKraitBlocks);
  if (const auto name = ggml_of(kBlock, rest); !name.empty()) {
    return fmt::format("{}{}.{}", kGgmlBlocks, block, name);
  }
  if (const auto name = ggml_of(kWholeModel, krait_name); !name.empty()) return std::string(name);
  return std::nullopt;
}

}  // namespace krait
