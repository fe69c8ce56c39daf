#include "tokenizer/post_processor.h"

#include "base/error.h"

namespace krait {

namespace {

int32_t read_id(const JsonNode& node) { return static_cast<int32_t>(node.integer(0, INT32_MAX)); }

/// {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, ...],
///  "special_tokens": {"<s>": {"ids": [1]}}}
Surround read_template(const JsonNode& node) {
  const JsonNode parts = node.at("single");
  Surround s;
  bool text_seen = false;
  for (size_t i = 0; i < parts.array_size(); ++i) {
    const JsonNode part = parts.item(i);
    if (part.has("Sequence")) {
      if (text_seen) part.unsupported("a template that holds the text twice is not built");
      text_seen = true;
      continue;
    }
    const std::string name = part.at("SpecialToken").string("id");
    const JsonNode ids = node.at("special_tokens").at(name).at("ids");
    for (size_t j = 0; j < ids.array_size(); ++j) {
      (text_seen ? s.after : s.before).push_back(read_id(ids.item(j)));
    }
  }
  if (!text_seen) parts.fail("expected a {\"Sequence\": ...} for the text, found none");
  return s;
}

/// "cls": ["<s>", 0], "sep": ["</s>", 2]
int32_t read_named_id(const JsonNode& pair) {
  if (pair.array_size() != 2) pair.fail("expected a token and its id");
  return read_id(pair.item(1));
}

}  // namespace

Surround read_post_processor(const JsonNode& node, int depth) {
  const std::string type = node.string("type");
  if (type == "ByteLevel") return {};
  if (type == "TemplateProcessing") return read_template(node);
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    return {{read_named_id(node.at("cls"))}, {read_named_id(node.at("sep"))}};
  }
  if (type == "Sequence") {
    if (depth > 16) node.fail("sequences are nested too deeply");
    const JsonNode list = node.at("processors");
    Surround s;
    for (size_t i = 0; i < list.array_size(); ++i) {
      const Surround outer = read_post_processor(list.item(i), depth + 1);
      s.before.insert(s.before.begin(), outer.before.begin(), outer.before.end());
      s.after.insert(s.after.end(), outer.after.begin(), outer.after.end());
    }
    return s;
  }
  node.unsupported(fmt::format("the post-processor {} is not built", type));
}

}  // namespace krait
