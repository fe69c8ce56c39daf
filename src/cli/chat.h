// A model's chat template found and used: messages to token ids. `run --chat` gives one message,
// other commands whole conversations.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "cli/session.h"
#include "tokenizer/chat_template.h"

namespace krait {

/// The template in `file`, else the model's own: in the GGUF file, in chat_template.jinja or in
/// tokenizer_config.json. Errors: file (there is none), those of ChatTemplate.
[[nodiscard]] Chat find_chat(const Session& session, const std::string& file = {});

/// The prompt that asks for the answer to `messages`, a list of {"role", "content"}. Errors: those
/// of ChatTemplate::render() and of prompt_ids().
[[nodiscard]] std::vector<int32_t> chat_ids(const Session& session, const Chat& chat,
                                            const nlohmann::ordered_json& messages);

}  // namespace krait
