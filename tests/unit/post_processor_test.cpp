#include "tokenizer/post_processor.h"

#include "support/test_support.h"

namespace krait {
namespace {

using test::throws;
using Ids = std::vector<int32_t>;

Surround read(const std::string& json) {
  const auto value = nlohmann::json::parse(json);
  return read_post_processor({value, "post_processor"});
}

const std::string kLlama = R"({"type": "TemplateProcessing",
  "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": "</s>", "type_id": 0}}],
  "pair": [],
  "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
                     "</s>": {"id": "</s>", "ids": [2, 3], "tokens": ["</s>", "</s>"]}}})";

TEST(PostProcessor, Template) {
  const Surround s = read(kLlama);
  EXPECT_EQ(s.before, Ids{1});
  EXPECT_EQ(s.after, (Ids{2, 3}));
}

TEST(PostProcessor, BertAndRoberta) {
  for (const char* type : {"BertProcessing", "RobertaProcessing"}) {
    const Surround s =
        read(fmt::format(R"({{"type": "{}", "sep": ["</s>", 2], "cls": ["<s>", 0]}})", type));
    EXPECT_EQ(s.before, Ids{0});
    EXPECT_EQ(s.after, Ids{2});
  }
}

TEST(PostProcessor, SequenceWrapsFromInside) {
  const Surround s = read(R"({"type": "Sequence", "processors": [{"type": "ByteLevel"},)" + kLlama +
                          R"(, {"type": "BertProcessing", "sep": ["x", 8], "cls": ["y", 9]}]})");
  EXPECT_EQ(s.before, (Ids{9, 1}));
  EXPECT_EQ(s.after, (Ids{2, 3, 8}));
}

TEST(PostProcessor, Errors) {
  EXPECT_TRUE(throws(ErrorKind::unsupported, "the post-processor Magic is not built",
                     [] { read(R"({"type": "Magic"})"); }));
  EXPECT_TRUE(throws(ErrorKind::format, "special_tokens: the key \"<s>\" is missing", [] {
    read(R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}],
             "special_tokens": {}})");
  }));
  EXPECT_TRUE(throws(ErrorKind::format, "for the text, found none", [] {
    read(R"({"type": "TemplateProcessing", "single": [], "special_tokens": {}})");
  }));
  EXPECT_TRUE(throws(ErrorKind::unsupported, "the text twice", [] {
    read(R"({"type": "TemplateProcessing", "special_tokens": {},
             "single": [{"Sequence": {"id": "A"}}, {"Sequence": {"id": "A"}}]})");
  }));
  EXPECT_TRUE(throws(ErrorKind::format, "expected a token and its id",
                     [] { read(R"({"type": "BertProcessing", "sep": ["x"], "cls": ["y", 9]})"); }));
}

}  // namespace
}  // namespace krait
