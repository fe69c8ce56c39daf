#include "tokenizer/chat_template.h"

#include "base/error.h"
#include "tokenizer/jinja_interpreter.h"
#include "tokenizer/json_node.h"
#include "tokenizer/special_names.h"

namespace krait {

namespace fs = std::filesystem;

namespace {

void check_messages(const nlohmann::ordered_json& messages) {
  const auto fail = [](const std::string& what) {
    throw Error(ErrorKind::usage, "messages: " + what,
                R"(they are a list such as [{"role": "user", "content": "Hello"}])");
  };
  if (!messages.is_array() || messages.empty()) fail("expected a list with at least one message");
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& m = messages[i];
    if (!m.is_object()) fail(fmt::format("number {}: expected an object", i));
    const auto role = m.find("role");
    if (role == m.end() || !role->is_string()) {
      fail(fmt::format("number {}: expected a role that is a string", i));
    }
  }
}

/// The text of a template in a tokenizer_config.json; empty where it has none.
std::optional<std::string> template_of(const JsonNode& config) {
  if (!config.has("chat_template")) return std::nullopt;
  const JsonNode node = config.at("chat_template");
  if (node.value().is_string()) return node.string();
  for (size_t i = 0; i < node.array_size(); ++i) {
    const JsonNode named = node.item(i);
    if (named.string("name") == "default") return named.string("template");
  }
  node.fail("expected a template with the name default, found others only");
}

struct Source {
  std::string text;
  std::string where;  ///< for messages
};
std::optional<Source> find_source(const fs::path& folder) {
  std::error_code none;
  const fs::path own = folder / "chat_template.jinja";
  if (fs::is_regular_file(own, none)) return Source{read_tokenizer_file(own), own.string()};
  const fs::path file = folder / "tokenizer_config.json";
  if (!fs::is_regular_file(file, none)) return std::nullopt;
  const auto json = parse_json(read_tokenizer_file(file), file.string());
  const JsonNode config(json, file.string());
  config.expect_object();
  auto text = template_of(config);
  if (!text) return std::nullopt;
  return Source{std::move(*text), file.string() + ": chat_template"};
}

}  // namespace

ChatTemplate::ChatTemplate(std::string_view source, std::string name)
    : name_(std::move(name)), root_(jinja::parse(source, name_)) {}
ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

std::string ChatTemplate::render(const nlohmann::ordered_json& messages,
                                 const ChatOptions& options) const {
  check_messages(messages);
  jinja::Arena arena;
  jinja::Variables variables;
  variables.now = options.now.value_or(std::time(nullptr));
  const auto set = [&](const std::string& key, jinja::Value value) {
    variables.values.emplace_back(key, std::move(value));
  };
  set("messages", arena.from_json(messages));
  set("add_generation_prompt", options.add_generation_prompt);
  set("tools", arena.from_json(options.tools));
  set("documents", jinja::Value::none());
  for (const auto& [key, text] : options.special_tokens) set(key, text);
  for (const auto& [key, value] : options.variables.items()) set(key, arena.from_json(value));
  return jinja::render(*root_, name_, arena, variables);
}

std::map<std::string, std::string> read_special_tokens(const fs::path& folder) {
  std::map<std::string, std::string> tokens;
  const fs::path file = folder / "tokenizer_config.json";
  std::error_code none;
  if (!fs::is_regular_file(file, none)) return tokens;
  const auto json = parse_json(read_tokenizer_file(file), file.string());
  const JsonNode config(json, file.string());
  config.expect_object();
  for (const auto& [key, value] : json.items()) {
    if (!key.ends_with("_token") || key.starts_with("add_")) continue;
    if (value.is_string()) tokens[key] = value;
    if (value.is_object()) tokens[key] = config.at(key).string("content");
  }
  return tokens;
}

std::optional<Chat> read_chat(const fs::path& folder) {
  const auto found = find_source(folder);
  if (!found) return std::nullopt;
  Chat chat{ChatTemplate(found->text, found->where)};
  chat.options.special_tokens = read_special_tokens(folder);
  return chat;
}

std::optional<std::string> chat_template_source(const fs::path& folder) {
  auto found = find_source(folder);
  return found ? std::optional(std::move(found->text)) : std::nullopt;
}

}  // namespace krait
