#include "model/config_reader.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/log.h"

namespace krait {

using Json = nlohmann::json;

ConfigReader::ConfigReader(const Json& json, const std::string& where)
    : json_(json), where_(where) {
  // A model_type alone says Hugging Face too, so that what is missing is named by its key there.
  const bool other_width = find("d_model") != nullptr || find("dim") != nullptr;
  if (find("model_type") != nullptr && (find("hidden_size") != nullptr || !other_width)) {
    layout_ = Layout::huggingface;
  } else if (find("dim") != nullptr && find("n_layers") != nullptr) {
    layout_ = Layout::mistral;
  }
}

const char* ConfigReader::name(const ConfigKey& key) const noexcept {
  switch (layout_) {
    case Layout::huggingface:
      return key.huggingface;
    case Layout::mistral:
      return key.mistral;
    default:
      return key.state_spaces;
  }
}

const Json* ConfigReader::find(const char* key) const {
  if (key == nullptr) return nullptr;
  const std::string_view path = key;
  const Json* at = &json_;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    if (!at->is_object()) return nullptr;
    const auto it = at->find(std::string(path.substr(begin, end - begin)));
    if (it == at->end() || it->is_null()) return nullptr;
    at = &*it;
    begin = end + 1;
  }
  return at;
}

std::optional<int64_t> ConfigReader::integer(const char* key, int64_t least, int64_t most) const {
  const Json* v = find(key);
  if (v == nullptr) return std::nullopt;
  const bool unsigned_too_large =
      v->is_number_unsigned() &&
      v->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  const int64_t n = v->is_number_integer() && !unsigned_too_large ? v->get<int64_t>() : least - 1;
  if (n < least || n > most)
    fail(key, fmt::format("expected an integer from {} to {}", least, most));
  return n;
}

std::optional<double> ConfigReader::number(const char* key, double above, double most) const {
  const Json* v = find(key);
  if (v == nullptr) return std::nullopt;
  const double n = v->is_number() ? v->get<double>() : std::nan("");
  if (!(n > above && n <= most))
    fail(key, fmt::format("expected a number above {} and up to {}", above, most));
  return n;
}

bool ConfigReader::boolean(const char* key, bool otherwise) const {
  const Json* v = find(key);
  if (v == nullptr) return otherwise;
  if (!v->is_boolean()) fail(key, "expected true or false");
  return v->get<bool>();
}

std::optional<std::string> ConfigReader::text(const char* key) const {
  const Json* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_string()) fail(key, "expected a string");
  return v->get<std::string>();
}

void ConfigReader::size(const SizeKey& k, ModelConfig& config) const {
  const char* key = name(k.key);
  const auto value = integer(key, k.least, k.most);
  if (!value && k.otherwise == 0) fail(key, "expected an integer");
  if (!value && layout_ == Layout::huggingface) {
    spdlog::info("{}: {} is absent, taking {}", where_, key, k.otherwise);
  }
  config.*k.field = value.value_or(k.otherwise);
}

void ConfigReader::fail(const char* key, const std::string& expected) const {
  const Json* v = find(key);
  std::string found =
      v == nullptr ? "nothing" : v->dump(-1, ' ', true, Json::error_handler_t::replace);
  if (found.size() > 60) found = found.substr(0, 57) + "...";
  throw Error(ErrorKind::format, fmt::format("{}: {}: {}, found {}", where_, key, expected, found));
}

void ConfigReader::unsupported(const std::string& what) const {
  throw Error(ErrorKind::unsupported, fmt::format("{}: {}", where_, what),
              "krait runs Mamba, Falcon-Mamba and Mamba-2 models; README lists what it reads");
}

}  // namespace krait
