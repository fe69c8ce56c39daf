// The generation loop without a model: a source that replays tokens and checks how it is driven.
#include "runtime/generate.h"

#include <gmock/gmock.h>

#include <cmath>
#include <deque>

#include "support/piece_tokenizer.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

/// Gives `script` token by token, then repeats its last token.
class ScriptedSource : public TokenSource {
 public:
  explicit ScriptedSource(std::vector<int32_t> script) : script_(std::move(script)) {}
  bool prefill(std::span<const int32_t> ids, const std::function<bool()>& cancelled) override {
    prompt.assign(ids.begin(), ids.end());
    if (cancelled && cancelled()) return false;
    ++launched;
    return true;
  }
  void step() override { ++launched; }
  int32_t receive() override {
    EXPECT_LT(received, launched) << "received a token that was never launched";
    most_ahead = std::max(most_ahead, launched - received);
    return script_[std::min(static_cast<size_t>(received++), script_.size() - 1)];
  }
  std::span<const float> logits() override {
    EXPECT_EQ(received, launched) << "the logits are those of the latest launch";
    return logits_of_step;
  }

  std::vector<int32_t> prompt;
  std::vector<float> logits_of_step;
  int64_t launched = 0;
  int64_t received = 0;
  int64_t most_ahead = 0;

 private:
  std::vector<int32_t> script_;
};

const std::vector<int32_t> kPrompt{5, 6};

GenerateOptions limit(int64_t n) {
  GenerateOptions o;
  o.max_new_tokens = n;
  return o;
}

TEST(Generate, EndsAtTheLimit) {
  ScriptedSource source({1, 2, 1, 2});
  const PieceTokenizer tokenizer({"<eos>", "a", "b"});
  const GenerateResult r = generate(source, &tokenizer, kPrompt, limit(3));
  EXPECT_EQ(source.prompt, kPrompt);
  EXPECT_THAT(r.ids, ElementsAre(1, 2, 1));
  EXPECT_EQ(r.text, "aba");
  EXPECT_EQ(r.finish, FinishReason::length);
  EXPECT_EQ(source.launched, 3) << "nothing is launched beyond the limit";
  EXPECT_EQ(source.received, 3);
}

TEST(Generate, RunsOneStepAhead) {
  ScriptedSource source({1});
  const PieceTokenizer tokenizer({"<eos>", "a"});
  (void)generate(source, &tokenizer, kPrompt, limit(10));
  EXPECT_EQ(source.most_ahead, 2);
}

TEST(Generate, ReceivesWhatItLaunchedAhead) {
  ScriptedSource source({1, 0});
  const PieceTokenizer tokenizer({"<eos>", "a"});
  GenerateOptions o = limit(10);
  o.eos_ids = {0};
  const GenerateResult r = generate(source, &tokenizer, kPrompt, o);
  EXPECT_EQ(r.finish, FinishReason::eos);
  EXPECT_THAT(r.ids, ElementsAre(1, 0));
  EXPECT_EQ(r.text, "a");
  EXPECT_EQ(source.received, source.launched);
}

TEST(Generate, ZeroTokensGiveNothing) {
  ScriptedSource source({1});
  const PieceTokenizer tokenizer({"<eos>", "a"});
  const GenerateResult r = generate(source, &tokenizer, kPrompt, limit(0));
  EXPECT_THAT(r.ids, IsEmpty());
  EXPECT_EQ(r.text, "");
  EXPECT_EQ(r.finish, FinishReason::length);
  EXPECT_EQ(source.received, source.launched);
}

TEST(Generate, WithoutALimitItEndsAtTheEndOfText) {
  std::vector<int32_t> script(1000, 1);
  script.push_back(0);
  ScriptedSource source(script);
  const PieceTokenizer tokenizer({"<eos>", "a"});
  GenerateOptions o = limit(-1);
  o.eos_ids = {7, 0};
  EXPECT_EQ(generate(source, &tokenizer, kPrompt, o).text, std::string(1000, 'a'));
}

TEST(Generate, StopStringMayStraddleTokens) {
  ScriptedSource source({1, 2, 3, 4});
  const PieceTokenizer tokenizer({"<eos>", "one E", "N", "D two", "never"});
  GenerateOptions o = limit(10);
  o.stops = {"END"};
  std::vector<std::string> shown;
  const GenerateResult r = generate(source, &tokenizer, kPrompt, o,
                                    [&](const GeneratedToken& t) { shown.emplace_back(t.text); });
  EXPECT_EQ(r.text, "one ");
  EXPECT_EQ(r.finish, FinishReason::stop);
  EXPECT_THAT(r.ids, ElementsAre(1, 2, 3));
  EXPECT_THAT(shown, ElementsAre("one ", "", ""));
}

TEST(Generate, TextHeldBackForAStopStringComesAtTheEnd) {
  ScriptedSource source({1, 2});
  const PieceTokenizer tokenizer({"<eos>", "a E", "N"});
  GenerateOptions o = limit(2);
  o.stops = {"END"};
  std::vector<int32_t> ids;
  const GenerateResult r = generate(source, &tokenizer, kPrompt, o,
                                    [&](const GeneratedToken& t) { ids.push_back(t.id); });
  EXPECT_EQ(r.text, "a EN");
  EXPECT_EQ(r.finish, FinishReason::length);
  EXPECT_THAT(ids, ElementsAre(1, 2, -1)) << "the rest belongs to no token";
}

TEST(Generate, NeverShowsHalfACharacter) {
  ScriptedSource source({1, 2, 1});
  const PieceTokenizer tokenizer({"<eos>", "\xc3", "\xa9!"});  // é in two tokens, then half of one
  std::vector<std::string> shown;
  const GenerateResult r = generate(source, &tokenizer, kPrompt, limit(3),
                                    [&](const GeneratedToken& t) { shown.emplace_back(t.text); });
  EXPECT_THAT(shown, ElementsAre("", "\xc3\xa9!", "", "\xef\xbf\xbd"));
  EXPECT_EQ(r.text, "\xc3\xa9!\xef\xbf\xbd");
}

TEST(Generate, CancelKeepsWhatIsThere) {
  ScriptedSource source({1});
  const PieceTokenizer tokenizer({"<eos>", "a"});
  int asked = 0;
  const GenerateResult r =
      generate(source, &tokenizer, kPrompt, limit(100), {}, [&] { return ++asked > 3; });
  EXPECT_EQ(r.finish, FinishReason::cancelled);
  EXPECT_EQ(r.text, "aaa");
  EXPECT_EQ(source.received, source.launched);
}

TEST(Generate, CancelDuringThePrompt) {
  ScriptedSource source({1});
  const GenerateResult r = generate(source, nullptr, kPrompt, limit(100), {}, [] { return true; });
  EXPECT_EQ(r.finish, FinishReason::cancelled);
  EXPECT_THAT(r.ids, IsEmpty());
}

TEST(Generate, WorksWithoutATokenizer) {
  ScriptedSource source({1, 2});
  const GenerateResult r = generate(source, nullptr, kPrompt, limit(2));
  EXPECT_THAT(r.ids, ElementsAre(1, 2));
  EXPECT_EQ(r.text, "");
}

TEST(Generate, LogprobsComeFromTheStepsOwnLogits) {
  ScriptedSource source({1, 1});
  source.logits_of_step = {std::log(1.0F), std::log(2.0F), std::log(5.0F)};
  GenerateOptions o = limit(2);
  o.n_logprobs = 2;
  int tokens = 0;
  (void)generate(source, nullptr, kPrompt, o, [&](const GeneratedToken& t) {
    ++tokens;
    EXPECT_NEAR(t.logprob, std::log(2.0 / 8), 1e-6);
    ASSERT_EQ(t.top.size(), 2U);
    EXPECT_EQ(t.top[0].id, 2);
    EXPECT_NEAR(t.top[0].logprob, std::log(5.0 / 8), 1e-6);
    EXPECT_EQ(t.top[1].id, 1);
  });
  EXPECT_EQ(tokens, 2);
}

TEST(LogProbabilities, LargeLogitsDoNotOverflowAndTiesGoToTheLowerId) {
  const std::vector<float> logits{1000.0F, 1000.0F, -INFINITY};
  EXPECT_NEAR(log_probability(logits, 1), std::log(0.5), 1e-6);
  EXPECT_EQ(log_probability(logits, 2), -INFINITY);
  const auto top = top_log_probabilities(logits, 5);
  ASSERT_EQ(top.size(), 3U) << "no more than there are";
  EXPECT_EQ(top[0].id, 0);
  EXPECT_EQ(top[1].id, 1);
}

}  // namespace
}  // namespace krait::test
