// Any bytes as a chat template, rendered with a conversation: a text or an Error, in little time
// and memory.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/unicode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto kMessages = nlohmann::ordered_json::parse(
      R"([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé\n<b>"},
          {"role": "assistant", "content": null, "tool_calls": [{"id": 1, "x": [1.5, true, {}]}]}])");
  krait::ChatOptions options;
  options.special_tokens = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  options.now = 1'700'000'000;
  try {
    const std::string_view source(reinterpret_cast<const char*>(data), size);
    const std::string text = krait::ChatTemplate(source, "t").render(kMessages, options);
    if (!krait::unicode::is_valid(text)) std::abort();
  } catch (const krait::Error& e) {
    if (e.message().empty()) std::abort();
  }
  return 0;
}
