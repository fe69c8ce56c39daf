// Any bytes as a SentencePiece model: an Error, or a tokenizer that encodes and decodes. The
// library behind it must only see files that it can stand.
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/unicode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    const auto tokenizer = krait::parse_sentencepiece(bytes, "fuzz");
    const auto ids = tokenizer->encode("ab  ba <s>1234, e\u0301\uFB01 \u65E5\U0001F642\n\xFF");
    for (const int32_t id : ids) {
      if (id < 0 || id >= tokenizer->vocab_size()) std::abort();
    }
    if (!krait::unicode::is_valid(tokenizer->decode(ids, true))) std::abort();
  } catch (const krait::Error&) {
  }
  return 0;
}
