// Translates config.json and params.json: the keys that all families share. What krait does not
// build (LayerNorm, MLP or attention layers, other activations) is refused by its key.
#include "model/config.h"

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.h"
#include "model/config_reader.h"
#include "model/family.h"

namespace krait {

namespace {

using Json = nlohmann::json;

constexpr int kMaxJsonDepth = 32;
constexpr std::uintmax_t kMaxConfigBytes = 4U << 20;
constexpr double kMaxExpand = 1024;

// What every family has; the rest is read by the family.
constexpr int64_t kMaxLayers = 1 << 14;
constexpr SizeKey kSizeKeys[] = {
    {&ModelConfig::d_model, {"hidden_size", "d_model", "dim"}, 1, 1 << 20, 0},
    {&ModelConfig::n_layer, {"num_hidden_layers", "n_layer", "n_layers"}, 1, kMaxLayers, 0},
    {&ModelConfig::vocab_size, {"vocab_size", "vocab_size", "vocab_size"}, 1, 1 << 27, 0},
    {&ModelConfig::d_conv, {"conv_kernel", "ssm_cfg.d_conv"}, 1, 1 << 10, 4},
};

/// A state-spaces config names its family by ssm_cfg.layer ("Mamba1" when absent); a Hugging Face
/// one by model_type. Where both are there, ssm_cfg.layer is the more exact. Mistral's files say
/// model_type "mamba" and mean Mamba-2: mistral-inference builds nothing else from them.
const Family& family_of(const ConfigReader& in) {
  const auto model_type = in.text("model_type");
  const auto layer = in.text("ssm_cfg.layer");
  const bool original = in.find("d_model") != nullptr && in.find("n_layer") != nullptr;
  const bool mistral = in.layout() == Layout::mistral && model_type == "mamba";
  if (!model_type && !original) {
    in.unsupported("neither model_type nor d_model and n_layer: no config of a Mamba model");
  }
  const bool by_layer = layer.has_value() || !model_type || mistral;
  const std::string name = layer ? *layer : mistral ? "Mamba2" : model_type.value_or("Mamba1");
  for (const Family& f : families()) {
    if (name != (by_layer ? f.ssm_layer : f.model_type)) continue;
    if (f.load == nullptr) in.unsupported(fmt::format("{} is not supported yet", f.title));
    return f;
  }
  in.unsupported(fmt::format("{} \"{}\" is unknown", by_layer ? "ssm_cfg.layer" : "model_type",
                             name.substr(0, 60)));
}

void refuse_what_is_not_built(const ConfigReader& in) {
  if (const auto act = in.text("hidden_act"); act && *act != "silu" && *act != "swish") {
    in.unsupported(fmt::format("hidden_act \"{}\" (expected silu)", act->substr(0, 60)));
  }
  if (!in.boolean("rms_norm", true)) in.unsupported("rms_norm false (LayerNorm)");
  if (in.integer("d_intermediate", 0, kMaxInner).value_or(0) > 0) {
    in.unsupported("d_intermediate above 0 (blocks with an MLP)");
  }
  if (const Json* v = in.find("attn_layer_idx"); v != nullptr && !v->empty()) {
    in.unsupported("attn_layer_idx (attention layers)");
  }
}

/// Ids may be one integer, a list, or absent. A negative id means "none" in some files.
std::vector<int32_t> id_list(const ConfigReader& in, const char* key) {
  const Json* v = in.find(key);
  if (v == nullptr) return {};
  const Json list = v->is_array() ? *v : Json::array({*v});
  std::vector<int32_t> ids;
  for (const Json& e : list) {
    if (!e.is_number_integer() || (e.is_number_unsigned() && e.get<uint64_t>() > INT32_MAX) ||
        e.get<int64_t>() > INT32_MAX) {
      in.fail(key, "expected a token id or a list of them");
    }
    if (e.get<int64_t>() >= 0) ids.push_back(e.get<int32_t>());
  }
  return ids;
}

/// Adds the values that differ from `taken`.
void keep_others(std::vector<int64_t>& others, int64_t taken,
                 std::initializer_list<std::optional<int64_t>> values) {
  for (const auto& v : values) {
    if (v && *v != taken) others.push_back(*v);
  }
}

/// Python's json writes Infinity and NaN, which JSON does not know: replaces these words, outside
/// of strings, by a value of no use of the same length, so that positions in messages stay true.
void replace_python_numbers(std::string& text) {
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (in_string) {
      if (text[i] == '\\') {
        ++i;
      } else if (text[i] == '"') {
        in_string = false;
      }
      continue;
    }
    if (text[i] == '"') in_string = true;
    for (const std::string_view word : {"-Infinity", "Infinity", "NaN"}) {
      if (text.compare(i, word.size(), word) != 0) continue;
      const std::string_view value = word.size() < 4 ? "[]" : "null";
      text.replace(i, word.size(), fmt::format("{:<{}}", value, word.size()));
    }
  }
}

}  // namespace

ModelConfig parse_config(const Json& json, const std::string& where) {
  if (!json.is_object()) {
    throw Error(ErrorKind::format, fmt::format("{}: expected a JSON object", where));
  }
  const ConfigReader in(json, where);
  const Family& family = family_of(in);
  refuse_what_is_not_built(in);

  constexpr std::string_view kLayouts[] = {"huggingface", "state-spaces", "mistral"};
  const bool hf = in.layout() == Layout::huggingface;
  ModelConfig c;
  c.family = family.name;
  c.layout = kLayouts[static_cast<size_t>(in.layout())];
  for (const SizeKey& k : kSizeKeys) in.size(k, c);
  if (c.d_conv < 2) in.unsupported("a convolution of width 1");

  // d_inner = expand * d_model; in a Hugging Face config an explicit intermediate_size wins.
  const char* expand_key = in.name({"expand", "ssm_cfg.expand"});
  const double expand = in.number(expand_key, 0, kMaxExpand).value_or(2);
  const auto product = static_cast<int64_t>(expand * static_cast<double>(c.d_model));
  const auto explicit_inner = hf ? in.integer("intermediate_size", 1, kMaxInner) : std::nullopt;
  c.d_inner = explicit_inner.value_or(product);
  if (c.d_inner < 1 || c.d_inner > kMaxInner) {
    in.fail(expand_key != nullptr ? expand_key : "dim",
            fmt::format("expected expand * d_model from 1 to {}", kMaxInner));
  }

  c.norm_eps = static_cast<float>(
      in.number(in.name({"layer_norm_epsilon", "norm_epsilon"}), 0, 1).value_or(1e-5));
  c.tie_embeddings =
      in.boolean(in.name({"tie_word_embeddings", "tie_embeddings", "tie_embeddings"}), true);
  c.eos_ids = id_list(in, "eos_token_id");
  if (const auto bos = id_list(in, "bos_token_id"); !bos.empty()) c.bos_id = bos.front();

  if (hf) {
    keep_others(c.other_n_layer, c.n_layer, {in.integer("n_layer", 1, kMaxLayers)});
    keep_others(c.other_d_inner, c.d_inner, {in.integer("d_inner", 1, kMaxInner), product});
  }
  family.read_config(in, c);
  return c;
}

ModelConfig parse_config_text(std::string text, const std::string& where) {
  replace_python_numbers(text);
  const auto limit_depth = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > kMaxJsonDepth) {
      throw Error(ErrorKind::format,
                  fmt::format("{}: JSON nested deeper than {} levels", where, kMaxJsonDepth));
    }
    return true;
  };
  Json json;
  try {
    json = Json::parse(text, limit_depth);
  } catch (const Json::exception& e) {
    throw Error(ErrorKind::format, fmt::format("{}: not valid JSON ({})", where, e.what()));
  }
  return parse_config(json, where);
}

std::filesystem::path config_file(const std::filesystem::path& folder) {
  std::error_code ignored;
  const bool mistral = !std::filesystem::exists(folder / "config.json", ignored) &&
                       std::filesystem::exists(folder / "params.json", ignored);
  return folder / (mistral ? "params.json" : "config.json");
}

ModelConfig read_config(const std::filesystem::path& file) {
  std::error_code error;
  const auto bytes = std::filesystem::file_size(file, error);
  std::ifstream in(file, std::ios::binary);
  if (error || !in) {
    throw Error(ErrorKind::file, fmt::format("cannot read {}", file.string()),
                "a model folder holds config.json beside its tensors");
  }
  if (bytes > kMaxConfigBytes) {
    throw Error(ErrorKind::format, fmt::format("{}: {} bytes, expected at most {}", file.string(),
                                               bytes, kMaxConfigBytes));
  }
  std::string text((std::istreambuf_iterator<char>(in)), {});
  return parse_config_text(std::move(text), file.string());
}

}  // namespace krait
