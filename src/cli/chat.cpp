#include "cli/chat.h"

#include "checkpoint/gguf.h"

namespace krait {

namespace {

std::optional<Chat> own_chat(const Session& s) {
  const GgufMetadata* metadata = s.checkpoint ? s.checkpoint->metadata() : nullptr;
  if (metadata == nullptr) return read_chat(s.source.folder);
  constexpr std::string_view kKey = "tokenizer.chat_template";
  const auto source = metadata->text(kKey);
  if (!source) return std::nullopt;
  return Chat{ChatTemplate(*source, fmt::format("{}: {}", metadata->file(), kKey))};
}

}  // namespace

Chat find_chat(const Session& s, const std::string& file) {
  std::optional<Chat> chat = file.empty() ? own_chat(s) : Chat{ChatTemplate(read_text(file), file)};
  if (!chat) {
    throw Error(ErrorKind::file, fmt::format("{} has no chat template", s.source.name),
                "it may be no chat model; give a template with --chat-template FILE");
  }
  const Tokenizer& tokenizer = s.require_tokenizer();
  auto& tokens = chat->options.special_tokens;
  if (!s.source.gguf && tokens.empty()) tokens = read_special_tokens(s.source.folder);
  // Where no file says it, the tokenizer does.
  if (const auto bos = tokenizer.bos_id()) tokens.emplace("bos_token", tokenizer.token_text(*bos));
  if (const auto eos = tokenizer.eos_id()) tokens.emplace("eos_token", tokenizer.token_text(*eos));
  return std::move(*chat);
}

std::vector<int32_t> chat_ids(const Session& session, const Chat& chat,
                              const nlohmann::ordered_json& messages) {
  Prompt prompt;
  prompt.text = chat.chat_template.render(messages, chat.options);
  prompt.rendered = true;
  return prompt_ids(session, prompt);
}

}  // namespace krait
