// Chat templates: where they are found, mistakes named with their line, and limits that nothing in
// a template or a message gets past. What templates render is in tests/golden/chat_test.cpp.
#include "tokenizer/chat_template.h"

#include <gtest/gtest.h>

#include "support/test_support.h"
#include "tokenizer/tokenizer.h"

namespace krait::test {
namespace {

using Json = nlohmann::ordered_json;

const Json kHello = {{{"role", "user"}, {"content", "Hello"}}};

std::string render(const std::string& source, const Json& messages = kHello,
                   const ChatOptions& options = {}) {
  return ChatTemplate(source, "t").render(messages, options);
}

::testing::AssertionResult refused(const std::string& source, ErrorKind kind,
                                   const std::string& part) {
  return throws(kind, part, [&] { (void)render(source); });
}

TEST(ChatTemplate, MistakesAreNamedWithTheirLine) {
  const auto format = ErrorKind::format;
  EXPECT_TRUE(refused("a\n\n{% if x %}", format, "t, line 3: expected endif, found the end"));
  EXPECT_TRUE(refused("{% for x in %}", format, "line 1: expected an expression"));
  EXPECT_TRUE(refused("{{ 'a }}", format, "a string that does not end"));
  EXPECT_TRUE(refused("{{ a", format, "a tag that does not end with }}"));
  EXPECT_TRUE(refused("{# a", format, "a comment that does not end"));
  EXPECT_TRUE(refused("{{ a b }}", format, "expected the end of the expression, found 'b'"));
  EXPECT_TRUE(refused("{{ (a] }}", format, "an unexpected ']'"));
  EXPECT_TRUE(refused("{{ a ! b }}", format, "an unexpected character '!'"));
  EXPECT_TRUE(refused("{% endif %}", format, "\"endif\" is unknown here"));
  EXPECT_TRUE(refused("{% break %}", format, "break outside of a loop"));
  EXPECT_TRUE(refused("{% raw %} x", format, "does not end with endraw"));
  EXPECT_TRUE(refused("\xff", format, "not UTF-8"));
  EXPECT_TRUE(refused("{{ '\\ud800' }}", format, "a broken escape"));
}

TEST(ChatTemplate, WhatIsNotBuiltIsNamed) {
  const auto unsupported = ErrorKind::unsupported;
  EXPECT_TRUE(refused("{% include 'x' %}", unsupported, "line 1: the tag include is not built"));
  EXPECT_TRUE(refused("{% call f() %}{% endcall %}", unsupported, "the tag call"));
  EXPECT_TRUE(
      refused("\n{{ 1|frobnicate }}", unsupported, "line 2: the filter frobnicate is not built"));
  EXPECT_TRUE(refused("{{ 1 is frobnicated }}", unsupported, "the test frobnicated is not built"));
  EXPECT_TRUE(refused("{{ 'a'.zfill(3) }}", unsupported, "str.zfill() is not built"));
  EXPECT_TRUE(refused("{% set x = [] %}{{ x.append(1) }}", unsupported,
                      "list.append() would change a value"));
  EXPECT_TRUE(refused("{{ f(*x) }}", unsupported, "arguments with *"));
  EXPECT_TRUE(refused("{{ '%s' % 1 }}", unsupported, "formatting a string with %"));
  EXPECT_TRUE(refused("{{ 99999999999999999999 }}", unsupported, "more than 64 bits"));
  EXPECT_TRUE(refused("{{ 2 ** 64 }}", unsupported, "more than 64 bits"));
}

TEST(ChatTemplate, WhatGoesWrongIsNamed) {
  const auto format = ErrorKind::format;
  EXPECT_TRUE(refused("a\n{{ nothing.there }}", format, "t, line 2: nothing is undefined"));
  EXPECT_TRUE(refused("{{ nothing() }}", format, "nothing is no function"));
  EXPECT_TRUE(refused("{{ 'a' + 1 }}", format, "+ between str and int"));
  EXPECT_TRUE(refused("{{ 1 < 'a' }}", format, "< between int and str"));
  EXPECT_TRUE(refused("{{ 1 // 0 }}", format, "division by zero"));
  EXPECT_TRUE(refused("{% for x in 5 %}{% endfor %}", format, "a int cannot be walked over"));
  EXPECT_TRUE(refused("{% for a, b in [[1]] %}{% endfor %}", format, "2 names for 1 values"));
  EXPECT_TRUE(refused("{% set x.y = 1 %}", format, "x is no namespace"));
  EXPECT_TRUE(
      refused("{% macro f(a) %}{% endmacro %}{{ f(1, 2) }}", format, "takes 1 arguments, found 2"));
  EXPECT_TRUE(refused("{{ raise_exception('no') }}", ErrorKind::usage, "refuses the messages: no"));
  EXPECT_TRUE(refused("{{ range|tojson }}", format, "a function has no JSON form"));
}

TEST(ChatTemplate, NothingRunsForeverOrEatsMemory) {
  const auto format = ErrorKind::format;
  EXPECT_TRUE(refused(
      "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
      format, "does not come to an end"));
  EXPECT_TRUE(
      refused("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
              format, "takes too much memory"));
  EXPECT_TRUE(refused("{{ 'x' * 99999999999 }}", format, "takes too much memory"));
  EXPECT_TRUE(
      refused("{% set ns = namespace(s='x') %}{% for i in range(40) %}"
              "{% set ns.s = ns.s + ns.s %}{% endfor %}",
              format, "takes too much memory"));
  EXPECT_TRUE(refused("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", format, "too deeply"));
  EXPECT_TRUE(refused("{{ " + std::string(100'000, '(') + " }}", format, "too deeply"));
  EXPECT_TRUE(refused("{{ " + std::string(100'000, '-') + "1 }}", format, "too deeply"));
  std::string sum = "{{ 1";
  for (int i = 0; i < 100'000; ++i) sum += "+1";
  EXPECT_TRUE(refused(sum + " }}", format, "too long"));
  std::string nested;
  for (int i = 0; i < 100'000; ++i) nested += "{% if 1 %}";
  EXPECT_TRUE(refused(nested, format, "too deeply"));
  EXPECT_TRUE(refused(std::string(2 << 20, 'x'), format, "longer than a megabyte"));
  // Values within each other many times over, and in a circle.
  std::string twice = "{% set x = [] %}{% set y = [] %}";
  for (int i = 0; i < 40; ++i) twice += "{% set x = [x, x] %}{% set y = [y, y] %}";
  EXPECT_EQ(render(twice + "{{ x == y }}"), "False");
  EXPECT_NO_THROW((void)render("{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a }}"));
}

TEST(ChatTemplate, MessagesAreChecked) {
  const auto bad = [](const Json& messages, const std::string& part) {
    return throws(ErrorKind::usage, part, [&] { (void)render("x", messages); });
  };
  EXPECT_TRUE(bad({}, "expected a list"));
  EXPECT_TRUE(bad(Json::array(), "at least one message"));
  EXPECT_TRUE(bad({{"role", "user"}}, "expected a list"));
  EXPECT_TRUE(bad({"text"}, "number 0: expected an object"));
  EXPECT_TRUE(bad({{{"content", "x"}}}, "number 0: expected a role"));
  EXPECT_TRUE(bad({{{"role", 1}}}, "expected a role that is a string"));
  Json deep = "x";
  for (int i = 0; i < 100; ++i) deep = Json::array({deep});
  EXPECT_TRUE(bad({{{"role", "user"}, {"content", deep}}}, "deeper than 32"));
}

TEST(ChatTemplate, TimeIsThatOfTheOptions) {
  ChatOptions options;
  options.now = 1'700'000'000;  // 14 November 2023, in every time zone the 14th or 15th
  const std::string text = render("{{ strftime_now('%Y-%m') }}", kHello, options);
  EXPECT_EQ(text, "2023-11");
}

TEST(ChatTemplate, IsFoundBesideTheTokenizer) {
  const ScratchDir dir;
  EXPECT_FALSE(read_chat(dir.path()));
  const auto config = dir.path() / "tokenizer_config.json";
  write_file(config,
             R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": true})");
  EXPECT_FALSE(read_chat(dir.path()));
  write_file(config, R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>",
                        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"})");
  const auto chat = read_chat(dir.path());
  ASSERT_TRUE(chat);
  EXPECT_EQ(chat->chat_template.render(kHello, chat->options), "<s>Hello</s>");
  write_file(config, R"({"chat_template": [{"name": "tool_use", "template": "t"},
                                           {"name": "default", "template": "d"}]})");
  EXPECT_EQ(read_chat(dir.path())->chat_template.render(kHello, {}), "d");
  write_file(config, R"({"chat_template": [{"name": "tool_use", "template": "t"}]})");
  EXPECT_TRUE(
      throws(ErrorKind::format, "with the name default", [&] { (void)read_chat(dir.path()); }));
  write_file(config, R"({"chat_template": 5})");
  EXPECT_TRUE(throws(ErrorKind::format, "chat_template", [&] { (void)read_chat(dir.path()); }));
  write_file(dir.path() / "chat_template.jinja", "own");
  EXPECT_EQ(read_chat(dir.path())->chat_template.render(kHello, {}), "own");
}

TEST(ChatTemplate, RenderedTextIsEncodedWithControlPieces) {
  const auto t = open_sentencepiece(data_dir() / "tokenizers" / "mistral-v3.model");
  const auto ids = [&](const std::string& text) { return t->encode(text, {.rendered = true}); };
  using Ids = std::vector<int32_t>;
  // Mistral's own encoding of a turn: each part by itself, with a space in front (tokens 23325 and
  // 2294 are "\u2581Hello" and "\u2581world").
  EXPECT_EQ(ids("<s>[INST] Hello[/INST] world</s>"), (Ids{1, 3, 23325, 4, 2294, 2}));
  EXPECT_EQ(ids("Hello world"), t->encode("Hello world"));
  EXPECT_EQ(ids(" Hello"), t->encode(" Hello"));
  EXPECT_EQ(ids(""), Ids{});
  EXPECT_EQ(ids("[INST]"), Ids{3});
  // No space is added behind a control piece.
  EXPECT_EQ(t->decode(ids("<s>Hello"), true), "<s>Hello");
  EXPECT_EQ(t->encode("[INST]").size() > 1, true);  // and elsewhere it is text
}

}  // namespace
}  // namespace krait::test
