// Any bytes as a tokenizer.json: an Error, or a tokenizer that encodes and decodes.
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "tokenizer/tokenizer_json.h"
#include "tokenizer/unicode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view json(reinterpret_cast<const char*>(data), size);
  try {
    const auto tokenizer = krait::parse_tokenizer_json(json, "fuzz");
    for (const std::string_view text : {"", "ab  ba <s>1234, e\u0301\u00E9 \u65E5\U0001F642\n"}) {
      for (const bool special : {false, true}) {
        const auto ids =
            tokenizer->encode(text, {.add_special = special, .parse_special = special});
        if (!krait::unicode::is_valid(tokenizer->decode(ids, special))) std::abort();
      }
    }
    (void)tokenizer->token_text(static_cast<int32_t>(tokenizer->vocab_size()) - 1);
  } catch (const krait::Error&) {
  }
  return 0;
}
