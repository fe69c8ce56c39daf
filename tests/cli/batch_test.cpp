// krait batch from the outside: the shipped model on the CPU, files in and out.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <thread>

#include "support/test_support.h"

namespace krait::test {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;
using Answers = std::map<int64_t, Json>;  ///< by line, without what is different each time

std::vector<Json> lines_of(const std::string& text) {
  std::vector<Json> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
  return lines;
}

/// Fails where a line is answered twice.
Answers answers_in(const std::string& text) {
  Answers answers;
  for (Json& j : lines_of(text)) {
    j.erase("seconds");
    EXPECT_TRUE(answers.emplace(j["line"].get<int64_t>(), j).second) << j;
  }
  return answers;
}

class BatchTest : public ::testing::Test {
 protected:
  [[nodiscard]] std::string path(const std::string& name) const {
    return (dir_.path() / name).string();
  }
  std::string write(const std::string& name, const std::string& text) const {
    write_file(path(name), text);
    return path(name);
  }
  [[nodiscard]] std::string read(const std::string& name) const { return read_file(path(name)); }

  [[nodiscard]] RunResult batch(const std::vector<std::string>& more,
                                const std::string& input = {}) const {
    std::vector<std::string> args{"batch", "--device", "cpu"};
    args.insert(args.end(), more.begin(), more.end());
    return run_krait(args, input);
  }

  /// Prompts of different lengths, with limits and seeds of their own.
  static std::string prompts(int n) {
    std::mt19937 random(5);
    const std::vector<std::string> words{"the", "dog", "a", "tree", "and", "saw", "little", "sun"};
    std::string text;
    for (int i = 0; i < n; ++i) {
      std::string prompt = "Once";
      for (auto k = random() % 30; k > 0; --k) prompt += " " + words[random() % words.size()];
      Json j = {{"prompt", prompt}, {"max_tokens", 1 + random() % 24}};
      if (i % 3 == 0) j["temperature"] = 0;
      if (i % 7 == 0) j["stop"] = "a";
      text += j.dump() + "\n";
    }
    return text;
  }

  ScratchDir dir_;
};

TEST_F(BatchTest, EachLineIsWhatRunGives) {
  const std::string in = write("in.jsonl", prompts(12));
  const RunResult r = batch({"-i", in, "-o", path("out.jsonl"), "--max-batch", "5"});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  const Answers answers = answers_in(read("out.jsonl"));
  const std::vector<Json> asked = lines_of(read("in.jsonl"));
  ASSERT_EQ(answers.size(), asked.size());
  for (const auto& [line, answer] : answers) {
    const Json& j = asked[static_cast<size_t>(line) - 1];
    std::vector<std::string> args{"run", "--device", "cpu", "--json", "-n", j["max_tokens"].dump(),
                                  "-p",  j["prompt"]};
    if (answer.contains("seed")) args.insert(args.end(), {"--seed", answer["seed"].dump()});
    if (j.contains("temperature")) args.emplace_back("--greedy");
    if (j.contains("stop")) args.insert(args.end(), {"--stop", j["stop"]});
    const Json alone = Json::parse(run_krait(args).out);
    EXPECT_EQ(answer["text"], alone["text"]) << j;
    EXPECT_EQ(answer["finish_reason"], alone["finish_reason"]);
    EXPECT_EQ(answer["usage"], alone["usage"]);
  }
}

TEST_F(BatchTest, NothingDependsOnHowItIsRun) {
  const std::string in = write("in.jsonl", prompts(40));
  EXPECT_EQ(batch({"-i", in, "-o", path("ref.jsonl")}).exit_code, 0);
  const Answers want = answers_in(read("ref.jsonl"));
  EXPECT_EQ(want.size(), 40U);
  const auto expect_same = [&](const std::vector<std::string>& how) {
    std::vector<std::string> args{"-i", in, "-o", path("out.jsonl"), "--overwrite"};
    args.insert(args.end(), how.begin(), how.end());
    const RunResult r = run_krait([&] {
      std::vector<std::string> all{"batch"};
      all.insert(all.end(), args.begin(), args.end());
      return all;
    }());
    EXPECT_EQ(r.exit_code, 0) << r.err;
    EXPECT_EQ(answers_in(read("out.jsonl")), want) << ::testing::PrintToString(how);
  };
  expect_same({"--device", "cpu", "--max-batch", "1"});
  expect_same({"--device", "cpu", "--max-batch", "3", "--prefill-chunk", "7"});
  expect_same({"--device", "cpu,cpu", "-t", "1"});
  expect_same({"--device", "cpu", "--shared-prefix", "auto", "--ordered"});
  int64_t expected = 1;
  for (const Json& j : lines_of(read("out.jsonl"))) EXPECT_EQ(j["line"], expected++);

  // From a stream, which gives no file to look through first.
  const RunResult piped = batch({"-i", "-", "-o", "-"}, read("in.jsonl"));
  EXPECT_EQ(piped.exit_code, 0) << piped.err;
  EXPECT_EQ(answers_in(piped.out), want);
}

TEST_F(BatchTest, GpuGivesTheSameHoweverItIsRun) {
  // f32, so that other shapes of the products move logits by roundings alone. Two engines on one
  // device work beside each other as on two.
  const std::string in = write("in.jsonl", prompts(60));
  const auto run = [&](const std::vector<std::string>& how) {
    std::vector<std::string> args{"batch",   "-i",  in,         "-o",         path("out.jsonl"),
                                  "--dtype", "f32", "--greedy", "--overwrite"};
    args.insert(args.end(), how.begin(), how.end());
    const RunResult r = run_krait(args);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    return answers_in(read("out.jsonl"));
  };
  const Answers want = run({"--device", "cuda", "--max-batch", "1"});
  EXPECT_EQ(want.size(), 60U);
  EXPECT_EQ(run({"--device", "cuda"}), want);
  EXPECT_EQ(run({"--device", "cuda", "--max-batch", "7", "--prefill-chunk", "33"}), want);
  EXPECT_EQ(run({"--device", "cuda", "--shared-prefix", "auto"}), want);
  EXPECT_EQ(run({"--device", "cuda:0,0"}), want);
  EXPECT_EQ(run({"--device", "cpu"}), want);
}

TEST_F(BatchTest, OpenAILinesAreAnsweredInTheirForm) {
  const std::string in = write(
      "in.jsonl",
      R"({"custom_id": "x-1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "The dog", "max_tokens": 6, "n": 3, "logprobs": 2, "seed": 7, "temperature": 1}})"
      "\n");
  const RunResult r = batch({"-i", in, "-o", path("out.jsonl")});
  EXPECT_EQ(r.exit_code, 0) << r.err;
  const Json j = lines_of(read("out.jsonl")).at(0);
  EXPECT_EQ(j["custom_id"], "x-1");
  EXPECT_TRUE(j["error"].is_null());
  EXPECT_EQ(j["response"]["status_code"], 200);
  const Json& body = j["response"]["body"];
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["model"], "m");
  ASSERT_EQ(body["choices"].size(), 3U);
  EXPECT_NE(body["choices"][0]["text"], body["choices"][1]["text"]);
  EXPECT_EQ(body["usage"]["completion_tokens"], 18);
  const Json& logprobs = body["choices"][2]["logprobs"];
  EXPECT_EQ(logprobs["tokens"].size(), 6U);
  EXPECT_EQ(logprobs["top_logprobs"][0].size(), 2U);
  // The first choice is the seed's text.
  const RunResult alone =
      run_krait({"run", "--device", "cpu", "--seed", "7", "--temp", "1", "-n", "6", "The dog"});
  EXPECT_EQ(body["choices"][0]["text"], alone.out);
}

TEST_F(BatchTest, ChatsGoThroughTheTemplate) {
  const std::string in = write(
      "in.jsonl",
      R"({"custom_id": "good", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "The dog"}], "max_tokens": 12, "temperature": 0, "logprobs": true, "top_logprobs": 2}})"
      "\n"
      R"({"custom_id": "bad", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user"}]}})"
      "\n"
      R"({"custom_id": "refused", "url": "/v1/chat/completions", "body": {"messages": [{"role": "x", "content": "y"}]}})"
      "\n");
  const std::string refusing =
      write("t.jinja",
            read_file(data_dir() / "chat" / "chatml.jinja") +
                "{%- if messages[0].role == 'x' %}{{ raise_exception('who is x?') }}{% endif %}");
  const RunResult r = batch({"-i", in, "-o", path("out.jsonl"), "--chat-template", refusing});
  EXPECT_EQ(r.exit_code, 6) << r.err;
  const std::vector<Json> answers = lines_of(read("out.jsonl"));
  ASSERT_EQ(answers.size(), 1U);
  const Json& body = answers[0]["response"]["body"];
  EXPECT_EQ(body["object"], "chat.completion");
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["message"]["role"], "assistant");
  const RunResult alone = run_krait({"run", "--device", "cpu", "--chat", "--chat-template",
                                     refusing, "--greedy", "-n", "12", "The dog"});
  EXPECT_EQ(choice["message"]["content"], alone.out);
  EXPECT_FALSE(alone.out.empty());
  EXPECT_EQ(choice["logprobs"]["content"].size(), 12U);
  EXPECT_EQ(choice["logprobs"]["content"][0]["top_logprobs"].size(), 2U);
  const std::string errors = read("out.errors.jsonl");
  EXPECT_THAT(errors, HasSubstr("\\\"content\\\""));
  EXPECT_THAT(errors, HasSubstr("who is x?"));
}

TEST_F(BatchTest, BadLinesFailAloneAndAreNamed) {
  const std::string text =
      "{\"prompt\": \"Once\", \"max_tokens\": 2}\n"
      "{\"prompt\": \"Once\", \"max_tokens\": 2\n"
      "{\"prompt\": \"Once\", \"tmperature\": 1}\n"
      "{\"prompt\": \"Once\", \"temperature\": \"hot\"}\n"
      "{\"prompt\": \"Once\", \"top_p\": 2}\n"
      "{\"prompt\": \"Once\", \"max_tokens\": -2}\n"
      "{\"prompt\": \"\"}\n"
      "{\"max_tokens\": 4}\n"
      "{\"prompt\": \"\xff\"}\n"
      "{\"prompt\": [1, 99999999]}\n"
      "{\"prompt\": [\"a\", \"b\"]}\n"
      "[1, 2]\n"
      "{\"id\": \"a\", \"prompt\": \"Once\", \"max_tokens\": 2}\n"
      "{\"id\": \"a\", \"prompt\": \"Once\", \"max_tokens\": 2}\n"
      "{\"custom_id\": \"q\", \"url\": \"/v1/embeddings\", \"body\": {}}\n"
      "{\"prompt\": \"Once\", \"stop\": [\"\"]}\n"
      "{\"prompt\": \"Once\", \"n\": 0}\n"
      "{\"prompt\": \"Once\", \"logit_bias\": {\"x\": 1}}\n"
      "{\"prompt\": \"Once\", \"seed\": 18446744073709551615}\n"
      "{\"prompt\": \"Once\", \"max_tokens\": 1e400}\n"
      "\n"
      "{\"id\": 22, \"prompt\": [5, 6], \"max_tokens\": 0}";
  const std::map<int64_t, std::string> want{
      {2, "not JSON"},         {3, "unknown field \"tmperature\""},
      {4, "\"temperature\""},  {5, "from 0 to 1"},
      {6, "from -1"},          {7, "\"prompt\" is empty"},
      {8, "missing"},          {9, "not UTF-8"},
      {10, "from 0 to"},       {11, "several lines"},
      {12, "object"},          {14, "that of line 13"},
      {15, "/v1/completions"}, {16, "none empty"},
      {17, "from 1 to"},       {18, "token ids from 0"},
      {19, "whole number"},    {20, "cannot be read"}};
  const std::string in = write("in.jsonl", text);
  const RunResult r = batch({"-i", in, "-o", path("out.jsonl")});
  EXPECT_EQ(r.exit_code, 6);
  EXPECT_THAT(r.err, HasSubstr("line 2: not JSON"));
  EXPECT_THAT(r.err, HasSubstr("18 failed, see"));
  const Answers good = answers_in(read("out.jsonl"));
  EXPECT_EQ(good.size(), 3U);
  EXPECT_EQ(good.at(22)["text"], "");
  EXPECT_EQ(good.at(22)["id"], 22);
  EXPECT_EQ(good.at(13)["id"], "a");
  std::map<int64_t, std::string> got;
  for (const Json& j : lines_of(read("out.errors.jsonl"))) {
    if (j.contains("line")) {
      got[j["line"].get<int64_t>()] = j["error"];
    } else {
      EXPECT_EQ(j["id"], "batch_req_15");
      EXPECT_EQ(j["custom_id"], "q");
      got[15] = j["error"]["message"];
    }
  }
  for (const auto& [line, part] : want) EXPECT_THAT(got[line], HasSubstr(part)) << line;
  EXPECT_EQ(got.size(), want.size());

  // Once more: nothing is done twice, and the exit code still tells.
  const std::string before = read("out.errors.jsonl");
  EXPECT_EQ(batch({"-i", in, "-o", path("out.jsonl")}).exit_code, 6);
  EXPECT_EQ(read("out.errors.jsonl"), before);
  EXPECT_EQ(answers_in(read("out.jsonl")).size(), 3U);

  const RunResult strict = batch({"-i", in, "-o", path("strict.jsonl"), "--strict"});
  EXPECT_EQ(strict.exit_code, 3);
  EXPECT_THAT(strict.err, HasSubstr("line 2: not JSON"));
  EXPECT_EQ(read("strict.jsonl"), "") << "something was answered before the input was checked";

  // A chat needs a template.
  const std::string chat = write(
      "chat.jsonl",
      R"({"custom_id": "c", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}]}})");
  EXPECT_EQ(batch({"-i", chat, "-o", path("chat.out.jsonl")}).exit_code, 6);
  EXPECT_THAT(read("chat.out.errors.jsonl"), HasSubstr("chat template"));
}

TEST_F(BatchTest, WrongFilesAreSentences) {
  const std::string in = write("in.txt", "Once\n");
  const auto fails = [&](const std::vector<std::string>& args, int code, const std::string& part) {
    const RunResult r = batch(args);
    EXPECT_EQ(r.exit_code, code) << r.err;
    EXPECT_THAT(r.err, HasSubstr(part));
    EXPECT_THAT(r.err, HasSubstr("krait: error: "));
  };
  fails({"-i", in}, 2, "-i and -o");
  fails({"-i", in, "-o", in}, 2, "is the input");
  fails({"-i", in, "-o", path("."), "-q"}, 3, "cannot write");
  fails({"-i", path("none"), "-o", path("o")}, 3, "cannot read");
  fails({"-i", path("."), "-o", path("o")}, 3, "is a folder");
  fails({"-i", in, "-o", path("none/o")}, 3, "cannot write");
  fails({"-i", in, "-o", path("o"), "--summary", path("none/s")}, 3, "cannot write");
  fails({"-i", in, "-o", path("o"), "--shard", "3/2"}, 2, "--shard");
  fails({"-i", in, "-o", path("o"), "--seed", "-1"}, 2, "seed");
  fails({"-i", in, "-o", path("o"), "--errors", path("o")}, 2, "the same");
  fails({"-i", in, "-o", in, "--overwrite"}, 2, "is the input");
  EXPECT_EQ(read("in.txt"), "Once\n");
  fails({"-i", "-", "-o", path("o"), "--shared-prefix", "auto"}, 2, "file");
  fails({"-i", in, "-o", "/dev/full", "-n", "1"}, 1, "No space left");
  // A file that is no output of a batch is not touched.
  const std::string notes = write("notes.txt", "my notes");
  fails({"-i", in, "-o", notes}, 3, "notes.txt, line 1");
  EXPECT_EQ(read("notes.txt"), "my notes");
}

TEST_F(BatchTest, AHalfWrittenLineIsRepaired) {
  const std::string in = write("in.jsonl", prompts(6));
  const std::vector<std::string> args{"-i", in, "-o", path("out.jsonl"), "--ordered"};
  EXPECT_EQ(batch(args).exit_code, 0);
  const std::string whole = read("out.jsonl");
  const Answers want = answers_in(whole);
  for (const size_t cut : {whole.size() - 1, whole.size() / 2, size_t{30}, size_t{3}, size_t{0}}) {
    write("out.jsonl", whole.substr(0, cut));
    const RunResult r = batch(args);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    EXPECT_EQ(answers_in(read("out.jsonl")), want) << "cut at " << cut;
  }
}

TEST_F(BatchTest, ShardsAreMerged) {
  const std::string in = write("in.jsonl", prompts(11));
  EXPECT_EQ(batch({"-i", in, "-o", path("whole.jsonl")}).exit_code, 0);
  std::vector<std::string> args{"-i", in, "-o", path("merged.jsonl"), "--merge"};
  for (const char* i : {"1", "2", "3"}) {
    const std::string part = path(std::string("part") + i);
    EXPECT_EQ(batch({"-i", in, "-o", part, "--shard", std::string(i) + "/3"}).exit_code, 0);
    args.push_back(part);
  }
  EXPECT_EQ(batch(args).exit_code, 0);
  EXPECT_EQ(answers_in(read("merged.jsonl")), answers_in(read("whole.jsonl")));
  args.pop_back();
  const RunResult missing = batch(args);
  EXPECT_EQ(missing.exit_code, 6);
  EXPECT_THAT(missing.err, HasSubstr("3 of 11 lines"));
  args.back() = args[args.size() - 2];
  EXPECT_EQ(batch(args).exit_code, 3);
}

TEST_F(BatchTest, ScoresAreLogLikelihoods) {
  const std::string in = write("in.jsonl",
                               "{\"prompt\": \"Once upon a\", \"continuation\": \" time\"}\n"
                               "{\"prompt\": \"Once upon a\", \"continuation\": \" spoon\"}\n"
                               "{\"prompt\": \"Once upon a\"}\n"
                               "{\"prompt\": \"Once\", \"continuation\": [1]}\n");
  const RunResult r = batch({"-i", in, "-o", path("out.jsonl"), "--score"});
  EXPECT_EQ(r.exit_code, 6) << r.err;
  const Answers answers = answers_in(read("out.jsonl"));
  ASSERT_EQ(answers.size(), 2U);
  EXPECT_EQ(answers.at(1)["is_greedy"], true);
  EXPECT_EQ(answers.at(2)["is_greedy"], false);
  EXPECT_GT(answers.at(1)["logprob"], answers.at(2)["logprob"]);
  double sum = 0;
  for (const Json& t : answers.at(2)["tokens"]) sum += t["logprob"].get<double>();
  EXPECT_NEAR(answers.at(2)["logprob"], sum, 1e-6);
  // The same number as the draw of that token reports.
  const Json drawn = Json::parse(run_krait({"run", "--device", "cpu", "--json", "--greedy", "-n",
                                            "1", "--logprobs", "0", "Once upon a"})
                                     .out);
  EXPECT_NEAR(answers.at(1)["logprob"], drawn["logprobs"][0]["logprob"].get<double>(), 1e-4);
}

TEST_F(BatchTest, SummaryCounts) {
  const std::string in = write("in.txt", "Once\n\nThe dog\r\n");
  const RunResult r =
      batch({"-i", in, "-o", path("out.jsonl"), "-n", "4", "--summary", path("s.json")});
  EXPECT_EQ(r.exit_code, 6) << "an empty line is no prompt";
  const Json s = Json::parse(read("s.json"));
  EXPECT_EQ(s["lines"], 3);
  EXPECT_EQ(s["failed"], 1);
  EXPECT_EQ(s["generated_tokens"], 8);
  EXPECT_EQ(s["interrupted"], false);
  EXPECT_EQ(s["engines"].size(), 1U);
}

// ---- nothing is lost ----------------------------------------------------------------------------

/// A run of krait that this process may kill.
class Started {
 public:
  Started(const std::vector<std::string>& args, const std::string& err) {
    pid_ = fork();
    if (pid_ != 0) return;
    const int fd = open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(fd, 2);
    const char* moved = std::getenv("KRAIT_TEST_PROGRAM");
    std::vector<std::string> words{moved != nullptr ? moved : KRAIT_TEST_PROGRAM};
    words.insert(words.end(), args.begin(), args.end());
    std::vector<char*> argv;
    for (std::string& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(127);
  }
  /// The exit code, or 128 + the signal. With `signal`, sends it after `after`, if it still runs.
  int wait(int signal = 0, std::chrono::milliseconds after = {}) const {
    const auto end = std::chrono::steady_clock::now() + after;
    int status = 0;
    while (signal != 0 && std::chrono::steady_clock::now() < end) {
      if (waitpid(pid_, &status, WNOHANG) == pid_) return code(status);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (signal != 0) kill(pid_, signal);
    waitpid(pid_, &status, 0);
    return code(status);
  }

 private:
  static int code(int status) {
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  pid_t pid_ = -1;
};

class BatchCrashTest : public BatchTest {
 protected:
  /// Kills runs of `n` lines at random moments until the last one ends by itself, and compares.
  void kill_and_resume(int n_line, int n_kill) {
    const std::string in = write("in.jsonl", prompts(n_line));
    const auto time_of_run = [&] {
      const auto start = std::chrono::steady_clock::now();
      EXPECT_EQ(batch({"-i", in, "-o", path("ref.jsonl")}).exit_code, 0);
      return std::chrono::duration_cast<std::chrono::milliseconds>(
          std::chrono::steady_clock::now() - start);
    };
    const auto whole = time_of_run();
    const auto starting = time_of_run();  // everything is done already
    const Answers want = answers_in(read("ref.jsonl"));

    // From the first moment to some way into the work.
    std::mt19937 random(11);
    int killed = 0;
    int finished = 0;
    std::string log;
    for (int i = 0; i < n_kill; ++i) {
      const Started run(
          {"batch", "--device", "cpu", "-i", in, "-o", path("out.jsonl"), "-q", "--max-batch", "8"},
          path("err"));
      const auto most = starting + 2 * (whole - starting) / n_kill;
      const auto after =
          std::chrono::milliseconds(static_cast<int64_t>(random() % 1000) * most.count() / 1000);
      const int code = run.wait(SIGKILL, after);
      if (code == 128 + SIGKILL) ++killed;
      if (code == 0) ++finished;
      const std::string text = fs::exists(path("out.jsonl")) ? read("out.jsonl") : "";
      const auto lines = std::count(text.begin(), text.end(), '\n');
      log += fmt::format("{} after {} ms: exit {}, {} lines{}\n", i, after.count(), code, lines,
                         text.empty() || text.back() == '\n' ? "" : " and a half");
      ASSERT_TRUE(code == 0 || code == 128 + SIGKILL) << read("err");
    }
    const RunResult last = batch({"-i", in, "-o", path("out.jsonl")});
    EXPECT_EQ(last.exit_code, 0) << last.err;
    EXPECT_EQ(answers_in(read("out.jsonl")), want);
    EXPECT_GT(killed, n_kill / 4);
    std::printf("%s%d killed, %d had finished; %s", log.c_str(), killed, finished,
                last.err.c_str());
  }

  /// Until something is answered: then the guard stands. Beside other work that can take long.
  void await_answers() {
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
    while (std::chrono::steady_clock::now() < end &&
           (!fs::exists(path("out.jsonl")) || read("out.jsonl").empty())) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
};

TEST_F(BatchCrashTest, KilledRunsResume) { kill_and_resume(60, 8); }
TEST_F(BatchCrashTest, SlowFiftyKillsOfFiveHundredLines) { kill_and_resume(500, 50); }

TEST_F(BatchCrashTest, SignalsLeaveWholeLines) {
  const std::string in = write("in.jsonl", prompts(300));
  const std::vector<std::string> args{"batch", "--device",       "cpu", "-i", in,
                                      "-o",    path("out.jsonl")};
  for (const int signal : {SIGINT, SIGTERM}) {
    const Started run(args, path("err"));
    await_answers();
    EXPECT_EQ(run.wait(signal), 130) << read("err");
    EXPECT_THAT(read("err"), HasSubstr("interrupted"));
    const Answers some = answers_in(read("out.jsonl"));
    EXPECT_GT(some.size(), 0U);
    EXPECT_LT(some.size(), 300U);
    EXPECT_EQ(read("out.jsonl").back(), '\n');
    fs::remove(path("out.jsonl"));
  }
}

TEST_F(BatchCrashTest, ASecondRunIsRefused) {
  const std::string in = write("in.jsonl", prompts(300));
  const std::string out = path("out.jsonl");
  const Started run({"batch", "--device", "cpu", "-i", in, "-o", out}, path("err"));
  await_answers();
  const RunResult second = batch({"-i", in, "-o", out});
  EXPECT_EQ(second.exit_code, 3);
  EXPECT_THAT(second.err, HasSubstr("another run"));
  EXPECT_EQ(run.wait(SIGINT), 130);
}

}  // namespace
}  // namespace krait::test
