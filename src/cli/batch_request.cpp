#include "cli/batch_request.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_map>

#include "cli/options.h"

namespace krait {

namespace {

using Json = nlohmann::json;

constexpr int kMaxChoices = 128;
constexpr int64_t kMaxTokens = int64_t{1} << 31;

/// Thrown by the readers of fields; parse_batch_line() adds which line it was.
struct BadField {
  std::string message;
};

std::string short_text(std::string text) {
  constexpr size_t kMost = 40;
  if (text.size() <= kMost) return text;
  size_t end = kMost;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

std::string dumped(const Json& value) {
  return short_text(value.dump(-1, ' ', false, Json::error_handler_t::replace));
}

[[noreturn]] void wrong(std::string_view key, std::string_view expected, const Json& found) {
  throw BadField{fmt::format("\"{}\": expected {}, found {}", key, expected, dumped(found))};
}

std::string string_of(const std::string& key, const Json& v) {
  if (!v.is_string()) wrong(key, "a string", v);
  return v.get<std::string>();
}

bool bool_of(const std::string& key, const Json& v) {
  if (!v.is_boolean()) wrong(key, "true or false", v);
  return v.get<bool>();
}

int64_t integer_of(const std::string& key, const Json& v, int64_t least, int64_t most) {
  const auto fail = [&] {
    wrong(key, fmt::format("a whole number from {} to {}", least, most), v);
  };
  if (!v.is_number_integer()) fail();
  if (v.is_number_unsigned() &&
      v.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    fail();
  }
  const auto n = v.get<int64_t>();
  if (n < least || n > most) fail();
  return n;
}

float number_of(const std::string& key, const Json& v, double least, double most) {
  const bool ok = v.is_number() && v.get<double>() >= least && v.get<double>() <= most;
  if (!ok) wrong(key, fmt::format("a number from {} to {}", least, most), v);
  return v.get<float>();
}

BatchText text_of(const std::string& key, const Json& v, const BatchRules& rules) {
  BatchText t;
  if (v.is_string()) {
    t.text = v.get<std::string>();
  } else if (v.is_array() &&
             std::all_of(v.begin(), v.end(), [](const Json& i) { return i.is_number_integer(); })) {
    t.is_text = false;
    for (const Json& id : v) {
      t.ids.push_back(static_cast<int32_t>(integer_of(key, id, 0, rules.vocab - 1)));
    }
  } else if (v.is_array()) {
    throw BadField{fmt::format(
        "\"{}\": expected a string or a list of token ids; several prompts are several lines",
        key)};
  } else {
    wrong(key, "a string or a list of token ids", v);
  }
  if (t.empty()) throw BadField{fmt::format("\"{}\" is empty", key)};
  return t;
}

std::vector<std::string> stops_of(const std::string& key, const Json& v) {
  std::vector<std::string> stops;
  for (const Json& s : v.is_array() ? v : Json::array({v})) {
    if (!s.is_string() || s.get_ref<const std::string&>().empty()) {
      wrong(key, "a string, or a list of strings, none empty", v);
    }
    stops.push_back(s.get<std::string>());
  }
  return stops;
}

LogitBias bias_of(const std::string& key, const Json& v, const BatchRules& rules) {
  constexpr size_t kMost = 1024;
  if (!v.is_object() || v.size() > kMost) {
    wrong(key, fmt::format("an object of at most {} token ids and numbers", kMost), v);
  }
  LogitBias bias;
  for (const auto& [id_text, value] : v.items()) {
    int32_t id = -1;
    const char* end = id_text.data() + id_text.size();
    const auto [at, error] = std::from_chars(id_text.data(), end, id);
    if (error != std::errc() || at != end || id < 0 || id >= rules.vocab) {
      throw BadField{fmt::format(R"("{}": expected token ids from 0 to {}, found "{}")", key,
                                 rules.vocab - 1, short_text(id_text))};
    }
    bias.emplace_back(id, number_of(key, value, -1e6, 1e6));
  }
  return bias;
}

std::string messages_of(const Json& v) {
  if (!v.is_array() || v.empty()) wrong("messages", "a list of messages", v);
  for (const Json& m : v) {
    const bool ok = m.is_object() && m.contains("role") && m["role"].is_string() &&
                    m.contains("content") && m["content"].is_string();
    if (!ok) wrong("messages", R"(messages with the strings "role" and "content")", m);
  }
  return v.dump();
}

using Reader =
    std::function<void(BatchRequest&, const std::string&, const Json&, const BatchRules&)>;

/// What a completion can say, in OpenAI's body and in the simple form alike. null is as if the key
/// were not there.
const std::unordered_map<std::string_view, Reader>& readers() {
  using R = BatchRequest;
  using S = const std::string&;
  using J = const Json&;
  using Rules = const BatchRules&;
  static const auto number = [](auto member, double least, double most) -> Reader {
    return [=](R& r, S key, J v, Rules) { r.*member = number_of(key, v, least, most); };
  };
  static const auto integer = [](auto member, int64_t least, int64_t most) -> Reader {
    return [=](R& r, S key, J v, Rules) {
      using Value = typename std::remove_reference_t<decltype(r.*member)>::value_type;
      r.*member = static_cast<Value>(integer_of(key, v, least, most));
    };
  };
  static const auto only = [](Json value, std::string_view why) -> Reader {
    return [value = std::move(value), why](R&, S key, J v, Rules) {
      if (v != value)
        throw BadField{fmt::format("\"{}\": {} is not supported: {}", key, dumped(v), why)};
    };
  };
  constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();
  static const std::unordered_map<std::string_view, Reader> table{
      {"prompt", [](R& r, S key, J v, Rules rules) { r.prompt = text_of(key, v, rules); }},
      {"model", [](R& r, S key, J v, Rules) { r.model = string_of(key, v); }},
      {"user", [](R&, S key, J v, Rules) { (void)string_of(key, v); }},
      {"max_tokens", integer(&R::max_tokens, -1, kMaxTokens)},
      {"max_new_tokens", integer(&R::max_tokens, -1, kMaxTokens)},
      {"max_completion_tokens", integer(&R::max_tokens, -1, kMaxTokens)},
      {"temperature", number(&R::temperature, 0, 1e6)},
      {"top_p", number(&R::top_p, 0, 1)},
      {"min_p", number(&R::min_p, 0, 1)},
      {"typical_p", number(&R::typical_p, 0, 1)},
      {"top_k", integer(&R::top_k, 0, kInt32)},
      {"repetition_penalty", number(&R::repeat_penalty, 1e-6, 1e6)},
      {"repeat_penalty", number(&R::repeat_penalty, 1e-6, 1e6)},
      {"presence_penalty", number(&R::presence_penalty, -1e6, 1e6)},
      {"frequency_penalty", number(&R::frequency_penalty, -1e6, 1e6)},
      {"repeat_last_n", integer(&R::repeat_last_n, -1, kInt32)},
      {"seed", integer(&R::seed, 0, std::numeric_limits<int64_t>::max())},
      {"stop", [](R& r, S key, J v, Rules) { r.stops = stops_of(key, v); }},
      {"ignore_eos", [](R& r, S key, J v, Rules) { r.ignore_eos = bool_of(key, v); }},
      {"logit_bias", [](R& r, S key, J v, Rules rules) { r.bias = bias_of(key, v, rules); }},
      {"n",
       [](R& r, S key, J v, Rules) { r.n = static_cast<int>(integer_of(key, v, 1, kMaxChoices)); }},
      {"stream", only(false, "a file is no stream")},
      {"echo", only(false, "the output has the completion alone")},
      {"best_of", only(1, "choose among n")},
      {"suffix", only("", "the model continues text, it fills no gap")},
  };
  return table;
}

void read_field(BatchRequest& r, const std::string& key, const Json& v, const BatchRules& rules) {
  if (v.is_null()) return;
  if (key == "logprobs") {
    // The chat form says whether, and "top_logprobs" how many; the other says how many.
    if (v.is_boolean()) {
      if (v.get<bool>()) r.n_logprobs = r.n_logprobs.value_or(0);
    } else {
      r.n_logprobs = static_cast<int>(integer_of(key, v, 0, 100));
    }
    return;
  }
  if (key == "top_logprobs") {
    r.n_logprobs = static_cast<int>(integer_of(key, v, 0, 100));
    return;
  }
  if (key == "messages" && r.format == BatchFormat::openai) {
    r.messages = messages_of(v);
    return;
  }
  if (key == "continuation" && rules.score) {
    r.continuation = text_of(key, v, rules);
    return;
  }
  const auto reader = readers().find(key);
  if (reader == readers().end())
    throw BadField{fmt::format("unknown field \"{}\"", short_text(key))};
  reader->second(r, key, v, rules);
}

void read_openai(BatchRequest& r, const Json& line, const BatchRules& rules) {
  if (rules.score) {
    throw BadField{R"(--score takes lines {"prompt": ..., "continuation": ...}, not OpenAI's)"};
  }
  for (const auto& [key, value] : line.items()) {
    if (key != "custom_id" && key != "method" && key != "url" && key != "body") {
      throw BadField{fmt::format("unknown field \"{}\"", short_text(key))};
    }
  }
  if (!r.has_id) throw BadField{"\"custom_id\" is missing"};
  if (line.contains("method") && line["method"] != "POST")
    wrong("method", "\"POST\"", line["method"]);
  if (!line.contains("url")) throw BadField{"\"url\" is missing"};
  const Json& url = line["url"];
  r.chat = url == "/v1/chat/completions";
  if (!r.chat && url != "/v1/completions") {
    wrong("url", R"("/v1/completions" or "/v1/chat/completions")", url);
  }
  if (!line.contains("body") || !line["body"].is_object()) throw BadField{"\"body\" is no object"};
  for (const auto& [key, value] : line["body"].items()) read_field(r, key, value, rules);
  if (r.chat && r.messages.empty()) throw BadField{"\"messages\" is missing"};
  if (r.chat && !r.prompt.empty()) throw BadField{R"(a chat has "messages", not "prompt")"};
  if (!r.chat && !r.messages.empty()) throw BadField{"\"messages\" belong to a chat"};
}

void read_simple(BatchRequest& r, const Json& line, const BatchRules& rules) {
  for (const auto& [key, value] : line.items()) {
    if (key != "id") read_field(r, key, value, rules);
  }
  if (rules.score && !r.continuation) throw BadField{"\"continuation\" is missing"};
  if (rules.score && r.continuation->is_text != r.prompt.is_text && !r.prompt.empty()) {
    throw BadField{R"("prompt" and "continuation" are text and token ids: expected one kind)"};
  }
}

}  // namespace

SampleParams BatchRequest::params(SampleParams p) const {
  p.temperature = temperature.value_or(p.temperature);
  p.top_p = top_p.value_or(p.top_p);
  p.min_p = min_p.value_or(p.min_p);
  p.typical_p = typical_p.value_or(p.typical_p);
  p.repeat_penalty = repeat_penalty.value_or(p.repeat_penalty);
  p.presence_penalty = presence_penalty.value_or(p.presence_penalty);
  p.frequency_penalty = frequency_penalty.value_or(p.frequency_penalty);
  p.top_k = top_k.value_or(p.top_k);
  p.repeat_last_n = repeat_last_n.value_or(p.repeat_last_n);
  if (seed) p.seed = static_cast<uint64_t>(*seed);
  return p;
}

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

BatchFormat guess_format(std::string_view first_line) {
  const size_t at = first_line.find_first_not_of(" \t\r");
  return at != std::string_view::npos && first_line[at] == '{' ? BatchFormat::automatic
                                                               : BatchFormat::text;
}

BatchRequest parse_batch_line(const std::string& line, const BatchRules& rules) {
  BatchRequest r;
  r.format = rules.format == BatchFormat::automatic ? BatchFormat::simple : rules.format;
  try {
    require_utf8(line, "the line");
    if (rules.format == BatchFormat::text) {
      if (rules.score) throw BadField{"--score takes lines of JSON"};
      r.prompt.text = line;
      if (line.empty()) throw BadField{"the prompt is empty"};
      return r;
    }
    const Json json = Json::parse(line);
    if (!json.is_object()) throw BadField{"expected a JSON object"};
    if (rules.format == BatchFormat::automatic &&
        (json.contains("custom_id") || json.contains("url") || json.contains("body"))) {
      r.format = BatchFormat::openai;
    }
    const char* id = r.format == BatchFormat::openai ? "custom_id" : "id";
    if (json.contains(id)) {
      const Json& v = json[id];
      // A number is taken as it is written.
      if (v.is_string()) {
        r.id = v.get<std::string>();
      } else if (v.is_number_integer() && r.format == BatchFormat::simple) {
        r.id = v.dump();
        r.id_is_number = true;
      } else {
        wrong(id, "a string", v);
      }
      r.has_id = true;
    }
    if (r.format == BatchFormat::openai) {
      read_openai(r, json, rules);
    } else {
      read_simple(r, json, rules);
    }
    if (!r.chat && r.prompt.empty()) throw BadField{"\"prompt\" is missing"};
    return r;
  } catch (const BadField& e) {
    throw BadLine{e.message, r.id, r.has_id, r.id_is_number, r.format};
  } catch (const Json::parse_error& e) {
    throw BadLine{fmt::format("not JSON: an error at byte {}", e.byte), r.id, r.has_id,
                  r.id_is_number, r.format};
  } catch (const Error& e) {  // not UTF-8
    throw BadLine{e.message(), r.id, r.has_id, r.id_is_number, r.format};
  } catch (const Json::exception&) {
    throw BadLine{"numbers or nesting that cannot be read", r.id, r.has_id, r.id_is_number,
                  r.format};
  }
}

}  // namespace krait
