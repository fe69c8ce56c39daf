#include "runtime/generation_config.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

namespace krait {

namespace {

using nlohmann::json;

[[noreturn]] void wrong(const std::string& where, const char* key, const char* expected,
                        const json& found) {
  std::string text = found.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 40) text = text.substr(0, 37) + "...";
  throw Error(ErrorKind::format,
              fmt::format("{}: {}: expected {}, found {}", where, key, expected, text));
}

/// The value of `key`, or null where it is missing (JSON null means the same to transformers).
const json* value(const json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

std::optional<bool> boolean(const json& object, const char* key, const std::string& where) {
  const json* v = value(object, key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_boolean()) wrong(where, key, "true or false", *v);
  return v->get<bool>();
}

std::optional<float> number(const json& object, const char* key, const std::string& where,
                            float least, float most) {
  const json* v = value(object, key);
  if (v == nullptr) return std::nullopt;
  const std::string expected = fmt::format("a number from {} to {}", least, most);
  if (!v->is_number()) wrong(where, key, expected.c_str(), *v);
  const auto f = v->get<double>();
  if (!(f >= least && f <= most)) wrong(where, key, expected.c_str(), *v);
  return static_cast<float>(f);
}

std::optional<int32_t> integer(const json& object, const char* key, const std::string& where,
                               int32_t least) {
  const json* v = value(object, key);
  if (v == nullptr) return std::nullopt;
  const std::string expected = fmt::format("a whole number of at least {}", least);
  constexpr auto kMost = std::numeric_limits<int32_t>::max();
  if (!v->is_number_integer() || *v < least || *v > kMost) wrong(where, key, expected.c_str(), *v);
  return v->get<int32_t>();
}

constexpr float kBig = 1e6F;

}  // namespace

GenerationConfig read_generation_config(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "generation_config.json";
  std::error_code ec;
  if (!std::filesystem::exists(file, ec)) return {};
  // The published ones have under a kilobyte.
  if (constexpr uintmax_t kLargest = 1 << 20; std::filesystem::file_size(file, ec) > kLargest) {
    throw Error(ErrorKind::format, fmt::format("{}: larger than a megabyte", file.string()));
  }
  std::ifstream in(file, std::ios::binary);
  if (!in) throw Error(ErrorKind::file, fmt::format("cannot read {}", file.string()));
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    throw Error(ErrorKind::format, fmt::format("{}: expected a JSON object", file.string()));
  }

  const std::string where = file.string();
  GenerationConfig c;
  c.do_sample = boolean(object, "do_sample", where);
  c.temperature = number(object, "temperature", where, 0, kBig);
  c.top_p = number(object, "top_p", where, 0, 1);
  c.min_p = number(object, "min_p", where, 0, 1);
  c.typical_p = number(object, "typical_p", where, 0, 1);
  c.repetition_penalty = number(object, "repetition_penalty", where, 1e-6F, kBig);
  c.top_k = integer(object, "top_k", where, 0);
  c.max_new_tokens = integer(object, "max_new_tokens", where, 0);
  c.bos_id = integer(object, "bos_token_id", where, -1);
  if (const json* eos = value(object, "eos_token_id"); eos != nullptr && eos->is_array()) {
    for (const json& e : *eos) {
      const json one = {{"eos_token_id", e}};
      if (const auto id = integer(one, "eos_token_id", where, -1)) c.eos_ids.push_back(*id);
    }
  } else if (const auto id = integer(object, "eos_token_id", where, -1)) {
    c.eos_ids.push_back(*id);
  }
  std::erase(c.eos_ids, -1);  // "none"
  if (c.bos_id == -1) c.bos_id.reset();
  return c;
}

SampleParams default_sampling(const GenerationConfig& config) {
  SampleParams p;
  if (config.do_sample.value_or(false)) {
    p.temperature = 1.0F;
    p.top_k = 50;
  } else {
    p.temperature = 0.8F;
    p.top_k = 40;
    p.top_p = 0.95F;
    p.min_p = 0.05F;
  }
  p.temperature = config.temperature.value_or(p.temperature);
  p.top_k = config.top_k.value_or(p.top_k);
  p.top_p = config.top_p.value_or(p.top_p);
  p.min_p = config.min_p.value_or(p.min_p);
  p.typical_p = config.typical_p.value_or(p.typical_p);
  if (config.repetition_penalty) {
    p.repeat_penalty = *config.repetition_penalty;
    p.repeat_last_n = -1;
  }
  if (!config.do_sample.value_or(true)) p.temperature = 0.0F;
  return p;
}

std::vector<int32_t> end_of_text_ids(const GenerationConfig& generation, const ModelConfig& model,
                                     const Tokenizer* tokenizer) {
  std::vector<int32_t> ids = generation.eos_ids.empty() ? model.eos_ids : generation.eos_ids;
  if (tokenizer != nullptr) {
    std::optional<int32_t> own = tokenizer->eos_id();
    if (!own) {
      // A bare tokenizer.json does not say which of its tokens ends a text.
      own = tokenizer->token_id("<|endoftext|>");
      if (own && !tokenizer->is_special(*own)) own.reset();
    }
    if (own) {
      std::erase_if(ids, [&](int32_t id) {
        if (id == *own || tokenizer->is_special(id)) return false;
        spdlog::warn(
            "the model's config names token {} (\"{}\") as its end of text, which is an ordinary "
            "token of its tokenizer: using {} (\"{}\")",
            id, tokenizer->token_text(id), *own, tokenizer->token_text(*own));
        return true;
      });
      ids.push_back(*own);
    }
  }
  std::erase_if(ids, [&](int32_t id) { return id < 0 || id >= model.vocab_size; });
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

std::optional<int32_t> start_of_text_id(const GenerationConfig& generation,
                                        const ModelConfig& model, const Tokenizer* tokenizer) {
  if (tokenizer != nullptr) {
    if (const auto bos = tokenizer->bos_id()) return bos;
  } else if (const auto bos = generation.bos_id ? generation.bos_id : model.bos_id) {
    return bos;
  }
  const std::vector<int32_t> ends = end_of_text_ids(generation, model, tokenizer);
  return ends.empty() ? std::nullopt : std::optional(ends.front());
}

}  // namespace krait
