// Chat templates against transformers (tools/chat/write_golden.py): the text of every template and
// conversation, byte for byte, and what raise_exception says.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "support/test_support.h"
#include "tokenizer/chat_template.h"

namespace krait::test {
namespace {

TEST(Chat, EveryConversationIsRenderedAsByTransformers) {
  std::ifstream in(data_dir() / "golden" / "chat" / "rendered.jsonl");
  int texts = 0;
  int errors = 0;
  for (std::string line; std::getline(in, line);) {
    const auto c = nlohmann::ordered_json::parse(line);
    const auto name = c.at("template").get<std::string>();
    const ChatTemplate chat(read_file(data_dir() / "chat" / name), name);
    ChatOptions options;
    options.add_generation_prompt = c.at("add_generation_prompt");
    options.tools = c.at("tools");
    for (const auto& [key, value] : c.at("special_tokens").items())
      options.special_tokens[key] = value;
    if (c.contains("error")) {
      EXPECT_TRUE(throws(ErrorKind::usage, c["error"].get<std::string>(), [&] {
        (void)chat.render(c.at("messages"), options);
      })) << line;
      ++errors;
    } else {
      EXPECT_EQ(chat.render(c.at("messages"), options), c.at("text").get<std::string>())
          << name << ": " << c.at("messages");
      ++texts;
    }
  }
  EXPECT_EQ(texts, 124);
  EXPECT_EQ(errors, 20);
}

}  // namespace
}  // namespace krait::test
