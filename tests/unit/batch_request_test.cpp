// The lines of a batch as requests: what they may say, and that no damage to a line does more than
// fail it. Also the reader of lines and the set of those that are done.
#include "cli/batch_request.h"

#include <gmock/gmock.h>

#include <random>

#include "cli/batch_input.h"
#include "cli/batch_output.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

BatchRules rules(BatchFormat format = BatchFormat::automatic, bool score = false) {
  return {.format = format, .score = score, .vocab = 1000};
}

std::string refusal(const std::string& line, const BatchRules& r = rules()) {
  try {
    (void)parse_batch_line(line, r);
  } catch (const BadLine& bad) {
    return bad.message;
  }
  return "accepted";
}

constexpr const char* kFull =
    R"({"custom_id": "é 1", "method": "POST", "url": "/v1/completions", "body": {"model": "m",)"
    R"( "prompt": [1, 2, 999], "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3,)"
    R"( "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.5, "presence_penalty": -1,)"
    R"( "frequency_penalty": 2, "repeat_last_n": -1, "seed": 9007199254740993, "stop": ["a", "b"],)"
    R"( "n": 4, "logprobs": 2, "logit_bias": {"5": -100, "6": 1.5}, "ignore_eos": true,)"
    R"( "stream": false, "echo": null, "user": "u"}})";

TEST(BatchRequest, SaysWhatTheLineSays) {
  const BatchRequest r = parse_batch_line(kFull, rules());
  EXPECT_EQ(r.format, BatchFormat::openai);
  EXPECT_EQ(r.id, "é 1");
  EXPECT_FALSE(r.prompt.is_text);
  EXPECT_THAT(r.prompt.ids, ElementsAre(1, 2, 999));
  EXPECT_EQ(r.max_tokens, 7);
  EXPECT_EQ(r.n, 4);
  EXPECT_EQ(r.n_logprobs, 2);
  EXPECT_THAT(*r.stops, ElementsAre("a", "b"));
  EXPECT_THAT(*r.bias, ElementsAre(std::pair(5, -100.0F), std::pair(6, 1.5F)));
  EXPECT_EQ(r.ignore_eos, true);
  SampleParams defaults;
  defaults.top_k = 77;
  defaults.seed = 1;
  const SampleParams p = r.params(defaults);
  EXPECT_EQ(p.temperature, 0.5F);
  EXPECT_EQ(p.top_p, 0.9F);
  EXPECT_EQ(p.top_k, 3);
  EXPECT_EQ(p.min_p, 0.1F);
  EXPECT_EQ(p.typical_p, 0.8F);
  EXPECT_EQ(p.repeat_penalty, 1.5F);
  EXPECT_EQ(p.presence_penalty, -1.0F);
  EXPECT_EQ(p.frequency_penalty, 2.0F);
  EXPECT_EQ(p.repeat_last_n, -1);
  EXPECT_EQ(p.seed, 9007199254740993U) << "past what a double holds";

  const BatchRequest few = parse_batch_line(R"({"id": 12, "prompt": "x"})", rules());
  EXPECT_EQ(few.format, BatchFormat::simple);
  EXPECT_EQ(few.id, "12");
  EXPECT_TRUE(few.id_is_number);
  EXPECT_EQ(few.params(defaults).top_k, 77);
  const BatchRequest text = parse_batch_line(R"({"prompt": "x"})", rules(BatchFormat::text));
  EXPECT_EQ(text.prompt.text, R"({"prompt": "x"})") << "plain text is not looked into";
}

TEST(BatchRequest, NamesWhatIsWrong) {
  EXPECT_THAT(refusal(R"({"prompt": "x", "echo": true})"), HasSubstr("not supported"));
  EXPECT_THAT(refusal(R"({"prompt": "x", "best_of": 3})"), HasSubstr("not supported"));
  EXPECT_THAT(refusal(R"({"prompt": "x", "n": 1.5})"), HasSubstr("whole number"));
  EXPECT_THAT(refusal(R"({"prompt": "x", "continuation": "y"})"), HasSubstr("unknown field"));
  EXPECT_THAT(refusal(R"({"prompt": "x", "messages": []})"), HasSubstr("unknown field"));
  EXPECT_THAT(refusal(R"({"prompt": [1, 1000]})"), HasSubstr("0 to 999"));
  EXPECT_THAT(refusal(R"({"prompt": {"a": 1}})"), HasSubstr("expected a string or"));
  EXPECT_THAT(refusal(R"({"custom_id": 5, "url": "/v1/completions", "body": {"prompt": "x"}})"),
              HasSubstr("expected a string"));
  EXPECT_THAT(refusal(R"({"url": "/v1/completions", "body": {"prompt": "x"}})"),
              HasSubstr("\"custom_id\" is missing"));
  EXPECT_THAT(refusal(R"({"custom_id": "a", "method": "GET", "url": "/v1/completions"})"),
              HasSubstr("POST"));
  EXPECT_THAT(refusal(R"({"custom_id": "a", "url": "/v1/completions", "body": []})"),
              HasSubstr("body"));
  EXPECT_THAT(refusal("{\"prompt\": \"" + std::string(100, 'x') + "\", \"n\": \"" +
                      std::string(10000, 'y') + "\"}"),
              ::testing::SizeIs(::testing::Lt(200U)));
  EXPECT_THAT(refusal(std::string(200000, '[')), HasSubstr("not JSON"));
  const BatchRules score = rules(BatchFormat::automatic, true);
  EXPECT_THAT(refusal(R"({"prompt": "x"})", score), HasSubstr("continuation"));
  EXPECT_THAT(refusal(R"({"prompt": "x", "continuation": [1]})", score), HasSubstr("one kind"));
  EXPECT_THAT(refusal(kFull, score), HasSubstr("--score"));
}

TEST(BatchRequest, DamageFailsTheLineAlone) {
  std::mt19937 random(1);
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string line = kFull;
    for (auto n = 1 + random() % 4; n > 0 && !line.empty(); --n) {
      const size_t at = random() % line.size();
      switch (random() % 4) {
        case 0:
          line[at] = static_cast<char>(random());
          break;
        case 1:
          line.erase(at, random() % 9);
          break;
        case 2:
          line.insert(at, line.substr(random() % line.size(), random() % 12));
          break;
        default:
          line.resize(std::max<size_t>(at, 1));
      }
    }
    const std::string why = refusal(line);
    EXPECT_LT(why.size(), 300U);
    if (why == "accepted") ++accepted;
    (void)answered_line(line);
  }
  EXPECT_GT(accepted, 100);
  EXPECT_LT(accepted, 19000);
}

TEST(LineReader, CutsLinesAsTheyAre) {
  const ScratchDir dir;
  const std::string file = (dir.path() / "in").string();
  const std::string whole = std::string(200000, 'x');  // longer than a block
  write_file(file, "a\r\n\n" + whole + "\nb\rc\n" + std::string("n\0l", 3) + "\nlast");
  LineReader in(file, {});
  std::vector<std::string> lines;
  for (std::string line; in.next(line);) lines.push_back(line);
  EXPECT_THAT(lines, ElementsAre("a", "", whole, "b\rc", std::string("n\0l", 3), "last"));
  EXPECT_EQ(in.number(), 6);
  EXPECT_TRUE(in.is_file());
  write_file(file, "");
  LineReader nothing(file, {});
  std::string line;
  EXPECT_FALSE(nothing.next(line));
}

TEST(BatchLines, ShardsAndSets) {
  int n = 0;
  for (int64_t line = 1; line <= 100; ++line) {
    for (int64_t i = 1; i <= 7; ++i) n += Shard{i, 7}.has(line) ? 1 : 0;
  }
  EXPECT_EQ(n, 100) << "each line belongs to one shard";
  EXPECT_TRUE((Shard{2, 3}.has(2)));
  for (const char* bad : {"0/3", "4/3", "1", "1/", "/3", "1/3x", "-1/3", "a/b", "1/0"}) {
    EXPECT_TRUE(throws(ErrorKind::usage, "--shard", [&] { (void)parse_shard(bad); })) << bad;
  }
  SeenIds ids;
  EXPECT_EQ(ids.first_line("a", 3), 3);
  EXPECT_EQ(ids.first_line("b", 4), 4);
  EXPECT_EQ(ids.first_line("a", 9), 3);
  LineSet set;
  set.add(5);
  set.add(100000);
  set.add(5);
  EXPECT_EQ(set.size(), 2);
  EXPECT_TRUE(set.contains(100000));
  EXPECT_FALSE(set.contains(99999));
  EXPECT_FALSE(set.contains(int64_t{1} << 50));
  EXPECT_EQ(answered_line(R"({"line": 7, "text": ""})"), 7);
  EXPECT_EQ(answered_line(R"({"id": "batch_req_8"})"), 8);
  for (const char* no :
       {"", "x", "[]", "{}", R"({"id": "batch_req_"})", R"({"id": "batch_req_8x"})",
        R"({"line": -1})", R"({"line": "7"})", R"({"line": 1e3})"}) {
    EXPECT_EQ(answered_line(no), 0) << no;
  }
}

}  // namespace
}  // namespace krait::test
