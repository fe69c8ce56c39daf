// Chat templates: the part of a tokenizer's files that turns messages into the text a chat model
// was trained on. They are Jinja2 programs; jinja_*.h run the part of the language that they use,
// as transformers sets it up.
#pragma once

#include <ctime>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace krait {

namespace jinja {
struct Node;
}

struct ChatOptions {
  /// End with what begins the assistant's answer.
  bool add_generation_prompt = true;
  /// "bos_token": "<s>", ...: variables of the template.
  std::map<std::string, std::string> special_tokens{};
  /// Descriptions of functions, a list; null: none.
  nlohmann::ordered_json tools{};
  /// More variables, an object; null: none.
  nlohmann::ordered_json variables{};
  std::optional<std::time_t> now{};  ///< for strftime_now(); empty: the time it is
};

class ChatTemplate {
 public:
  /// `name` stands in front of messages. Errors: format (a mistake in the template), unsupported (a
  /// part of the language that is not built, by its name).
  ChatTemplate(std::string_view source, std::string name);
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  /// `messages` is a list of objects with a "role" and, as a rule, a "content". The text contains
  /// the special tokens: encode it with EncodeOptions::rendered and without add_special. Errors:
  /// usage (no such list; the template refuses the messages), format and unsupported as above.
  [[nodiscard]] std::string render(const nlohmann::ordered_json& messages,
                                   const ChatOptions& options) const;

 private:
  std::string name_;
  std::unique_ptr<jinja::Node> root_;
};

/// A template and the special tokens that it needs.
struct Chat {
  ChatTemplate chat_template;
  ChatOptions options{};
};

/// Of a model folder: chat_template.jinja, else chat_template in tokenizer_config.json (a text, or
/// a list from which "default" is taken), with the special tokens of the latter. Empty where there
/// is none.
[[nodiscard]] std::optional<Chat> read_chat(const std::filesystem::path& folder);

/// The text of that template alone.
[[nodiscard]] std::optional<std::string> chat_template_source(const std::filesystem::path& folder);

/// The "..._token" members of a tokenizer_config.json, as texts; empty where there is none.
[[nodiscard]] std::map<std::string, std::string> read_special_tokens(
    const std::filesystem::path& folder);

}  // namespace krait
