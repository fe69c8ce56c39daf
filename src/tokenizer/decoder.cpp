#include "tokenizer/decoder.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "tokenizer/byte_level.h"
#include "tokenizer/pattern.h"

namespace krait {

namespace {

/// "<0x0A>" -> the byte; other tokens as they are.
std::string byte_of_fallback(std::string token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return token;
  int value = 0;
  for (const char c : {token[3], token[4]}) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return token;
    value = 16 * value + digit;
  }
  return {static_cast<char>(value)};
}

/// Removes up to `start` leading and `stop` trailing copies of `content`.
std::string strip(const std::string& token, const std::string& content, int64_t start,
                  int64_t stop) {
  size_t begin = 0;
  size_t end = token.size();
  const std::string_view view = token;
  for (int64_t i = 0; i < start && view.substr(begin, end - begin).starts_with(content); ++i) {
    begin += content.size();
  }
  for (int64_t i = 0; i < stop && view.substr(begin, end - begin).ends_with(content); ++i) {
    end -= content.size();
  }
  return token.substr(begin, end - begin);
}

}  // namespace

Decoder::Decoder(const JsonNode* node) {
  if (node != nullptr) {
    add(*node, 0);
  } else {
    steps_.emplace_back(
        [](std::string token, bool first) { return token.insert(0, first ? 0 : 1, ' '); });
  }
}

void Decoder::add(const JsonNode& node, int depth) {
  const std::string type = node.string("type");
  if (type == "Sequence") {
    if (depth > 16) node.fail("sequences are nested too deeply");
    const JsonNode list = node.at("decoders");
    for (size_t i = 0; i < list.array_size(); ++i) add(list.item(i), depth + 1);
    return;
  }
  if (type == "Fuse") {
    fused_ = true;
    return;
  }
  if (fused_ && type != "Strip") {
    node.unsupported(fmt::format("the decoder {} behind Fuse is not built", type));
  }
  if (type == "ByteLevel") {
    bytes_ = true;
    steps_.emplace_back([](const std::string& token, bool) { return byte_level::unmapped(token); });
  } else if (type == "ByteFallback") {
    bytes_ = true;
    steps_.emplace_back([](std::string token, bool) { return byte_of_fallback(std::move(token)); });
  } else if (type == "Replace") {
    Pattern pattern = Pattern::from_json(node.at("pattern"));
    if (bytes_ && !pattern.is_literal()) {
      node.unsupported(
          "a Replace by regular expression behind ByteLevel or ByteFallback is not built");
    }
    steps_.emplace_back(
        [pattern = std::move(pattern), content = node.string("content")](
            const std::string& token, bool) { return pattern.replace_all(token, content); });
  } else if (type == "Strip") {
    const std::string content = node.string("content");
    const int64_t start = node.at("start").integer(0, INT32_MAX);
    const int64_t stop = node.at("stop").integer(0, INT32_MAX);
    if (content.empty()) node.fail("the content to strip is empty");
    if (fused_ && (start > 1 || stop > 0)) {
      node.unsupported("behind Fuse only a Strip of one character at the start is built");
    }
    steps_.emplace_back([=, fused = fused_](const std::string& token, bool first) {
      return fused && !first ? token : strip(token, content, start, stop);
    });
  } else if (type == "Metaspace") {
    const Pattern mark = Pattern::literal(node.string("replacement"));
    const bool prepends = node.has("prepend_scheme") ? node.string("prepend_scheme") != "never"
                                                     : node.boolean("add_prefix_space", true);
    steps_.emplace_back([=](const std::string& token, bool first) {
      return mark.replace_all(token, first && prepends ? "" : " ");
    });
  } else {
    node.unsupported(fmt::format("the decoder {} is not built", type));
  }
}

std::string Decoder::bytes(std::string token, bool first) const {
  for (const Step& step : steps_) token = step(std::move(token), first);
  return token;
}

}  // namespace krait
