// krait bench through the built program: what it prints must add up, in every format, and a test
// that can't be run must not take the others with it.
#include <gmock/gmock.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <sstream>

#include "cli/cli_support.h"

namespace krait::test {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

/// What makes a call quick.
const Args kQuick{"-r", "1", "--no-ceilings", "--warmup", "0"};
Args quick(const Args& more) {
  return Args{"bench", "--device", "cpu", "-m", tiny()} + kQuick + more;
}

Json run_json(const Args& args, int exit_code = 0) {
  const RunResult r = run_krait(args + Args{"-o", "json"});
  EXPECT_EQ(r.exit_code, exit_code) << r.err;
  return Json::parse(r.out);
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> all;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) all.push_back(line);
  return all;
}

TEST(Bench, JsonAddsUp) {
  const RunResult r = run_krait({"bench", "--device", "cpu", "-m", tiny(), "-p", "16,33", "-n", "8",
                                 "-b", "1,3", "-r", "5", "--warmup", "0", "-o", "json"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const Json tests = Json::parse(r.out);
  ASSERT_EQ(tests.size(), 4U);
  EXPECT_EQ(tests[0]["n_prompt"], 16);
  EXPECT_EQ(tests[1]["n_prompt"], 33);
  EXPECT_EQ(tests[2]["n_batch"], 1);
  EXPECT_EQ(tests[3]["n_batch"], 3);
  EXPECT_EQ(tests[1]["test"], "pp33");
  EXPECT_EQ(tests[3]["test"], "tg8");
  for (const Json& t : tests) {
    ASSERT_EQ(t["samples_ts"].size(), 5U);
    const double tokens =
        t["n_batch"].get<double>() * (t["n_prompt"].get<double>() + t["n_gen"].get<double>());
    std::vector<double> rates;
    double seconds = 0;
    for (size_t i = 0; i < 5; ++i) {
      const double rate = t["samples_ts"][i].get<double>();
      rates.push_back(rate);
      seconds += t["samples_ns"][i].get<double>() / 1e9;
      EXPECT_NEAR(rate * t["samples_ns"][i].get<double>() / 1e9, tokens, 1e-3 * tokens);
    }
    std::sort(rates.begin(), rates.end());
    EXPECT_NEAR(t["median_ts"].get<double>(), rates[2], 1e-6 * rates[2]);
    EXPECT_NEAR(t["min_ts"].get<double>(), rates[0], 1e-6 * rates[0]);
    EXPECT_NEAR(t["max_ts"].get<double>(), rates[4], 1e-6 * rates[4]);
    EXPECT_NEAR(t["avg_ns"].get<double>(), seconds / 5 * 1e9, 10);
    EXPECT_GT(t["stddev_ns"].get<double>(), 0);
    EXPECT_NEAR(t["spread"].get<double>(), rates[2] / rates[0] - rates[2] / rates[4], 1e-6);

    // Everything by count follows from the bytes, the flops and the median.
    const double s = tokens / rates[2];
    EXPECT_NEAR(t["gb_per_s"].get<double>() * s * 1e9, t["bytes"].get<double>(), 1);
    EXPECT_NEAR(t["tflop_per_s"].get<double>() * s * 1e12, t["flops"].get<double>(), 1);
    EXPECT_NEAR(t["share_of_floor"].get<double>(), rates[2] / t["floor_ts"].get<double>(), 1e-6);
    EXPECT_GT(t["ceiling_copy_gb_per_s"].get<double>(), 0.1);
    EXPECT_GT(t["ceiling_read_gb_per_s"].get<double>(), 0.1);
    EXPECT_GT(t["ceiling_product_tflop_per_s"].get<double>(), 1e-4);
    EXPECT_EQ(t["backends"], "cpu");
    EXPECT_EQ(t["dtype"], "f32");
    EXPECT_GT(t["load_seconds"].get<double>(), 0);
    EXPECT_FALSE(t["build_commit"].get<std::string>().empty());
    EXPECT_FALSE(t["cpu_info"].get<std::string>().empty());
    EXPECT_TRUE(t["median_mhz"].is_null());  // of a GPU alone
    EXPECT_EQ(t["samples_mhz"].size(), 0U);
    EXPECT_TRUE(t["error"].is_null());
  }
  // A prompt's time is the time to its first token; generating alone has none.
  EXPECT_NEAR(tests[0]["first_token_ms"].get<double>(),
              tests[0]["median_ms_per_step"].get<double>(),
              0.1 * tests[0]["median_ms_per_step"].get<double>());
  EXPECT_TRUE(tests[2]["first_token_ms"].is_null());
  EXPECT_EQ(tests[0]["logits_hash"].get<std::string>().size(), 16U);
  EXPECT_NE(tests[0]["logits_hash"], tests[1]["logits_hash"]);
  EXPECT_TRUE(tests[2]["logits_hash"].is_null());
  // Weights once a step: three sequences move less than three times what one does.
  EXPECT_LT(tests[3]["bytes"].get<double>(), 3 * tests[2]["bytes"].get<double>());
  EXPECT_GT(tests[3]["bytes"].get<double>(), tests[2]["bytes"].get<double>());
}

TEST(Bench, PromptThenGenerate) {
  const Json tests =
      run_json(quick({"-p", "0", "-n", "0", "-b", "1,2", "-pg", "12,4", "--n-prompt-gen", "3,1"}));
  ASSERT_EQ(tests.size(), 4U);
  EXPECT_EQ(tests[0]["test"], "pp12+tg4");
  EXPECT_EQ(tests[1]["n_batch"], 2);
  EXPECT_EQ(tests[2]["test"], "pp3+tg1");
  for (const Json& t : tests) {
    const double s = t["samples_ns"][0].get<double>() / 1e9;
    const double tokens =
        t["n_batch"].get<double>() * (t["n_prompt"].get<double>() + t["n_gen"].get<double>());
    EXPECT_NEAR(t["median_ts"].get<double>() * s, tokens, 1e-3 * tokens);
    EXPECT_GT(t["first_token_ms"].get<double>(), 0);
    EXPECT_LE(t["first_token_ms"].get<double>(), 1e3 * s);
    EXPECT_TRUE(t["share_of_floor"].is_null());  // --no-ceilings
  }
}

TEST(Bench, LogitsAreTheSameOnEachRun) {
  const Args args = quick({"-p", "40", "-n", "0", "-pg", "40,4"});
  const Json first = run_json(args);
  const Json second = run_json(args + Args{"--prefill-chunk", "64"});
  for (const size_t i : {0U, 1U}) EXPECT_EQ(first[i]["logits_hash"], second[i]["logits_hash"]);
  EXPECT_EQ(first[0]["logits_hash"], first[1]["logits_hash"]);
  EXPECT_NE(run_json(args + Args{"--dtype", "bf16"})[0]["logits_hash"], first[0]["logits_hash"]);
}

TEST(Bench, ModelsAndTypesMultiply) {
  const Json tests =
      run_json(Args{"bench", "--device", "cpu", "-m", tiny(), "-m", golden("mamba1-hf-odd"),
                    "--dtype", "f32,bf16", "--state-dtype", "f32,f16", "-p", "4", "-n", "2"} +
               kQuick);
  ASSERT_EQ(tests.size(), 16U);
  std::set<std::string> kinds;
  for (const Json& t : tests) {
    kinds.insert(t["model"].get<std::string>() + t["dtype"].get<std::string>() +
                 t["state_dtype"].get<std::string>() + t["test"].get<std::string>());
  }
  EXPECT_EQ(kinds.size(), 16U);
  // 16-bit weights and state are counted as such.
  const auto bytes = [&](size_t i) { return tests[i]["bytes"].get<double>(); };
  EXPECT_EQ(tests[1]["test"], "tg2");
  EXPECT_LT(bytes(3), bytes(1));
  EXPECT_LT(bytes(5), bytes(1));
}

TEST(Bench, RowsSayHowTheStateIsRounded) {
  const Args args = quick({"-p", "0", "-n", "2", "--state-dtype", "f32,bf16"});
  const Json nearest = run_json(args);
  EXPECT_EQ(nearest[0]["state_rounding"], "");
  EXPECT_EQ(nearest[1]["state_rounding"], "nearest");
  const Json stochastic = run_json(args + Args{"--state-rounding", "stochastic"});
  EXPECT_EQ(stochastic[0]["state_rounding"], "");
  EXPECT_EQ(stochastic[1]["state_rounding"], "stochastic");
  EXPECT_THAT(run_krait(args + Args{"--state-rounding", "stochastic", "-o", "md"}).out,
              HasSubstr("| bf16 stochastic |"));
}

TEST(Bench, MarkdownTable) {
  const RunResult r = run_krait(
      {"bench", "--device", "cpu", "-m", tiny(), "-p", "8", "-n", "4", "-r", "2", "--warmup", "0"});
  ASSERT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("krait 0."));
  EXPECT_THAT(r.out, HasSubstr("CPU ("));
  EXPECT_THAT(r.out, HasSubstr("| f32 | f32 | 1 | pp8 |"));
  EXPECT_THAT(r.out, HasSubstr("| f32 | f32 | 1 | tg4 |"));
  EXPECT_THAT(r.out, HasSubstr("Ceilings of this device: copy "));
  EXPECT_THAT(r.out, HasSubstr("f32 products "));
  EXPECT_THAT(r.out, HasSubstr("Loaded: "));
  // Every line of the table has as many cells as its head.
  std::set<ptrdiff_t> bars;
  for (const std::string& line : lines(r.out)) {
    if (line.starts_with("|")) bars.insert(std::count(line.begin(), line.end(), '|'));
  }
  EXPECT_EQ(bars.size(), 1U);
}

TEST(Bench, JsonLinesAndCsvSayTheSame) {
  const RunResult jsonl = run_krait(quick({"-p", "8", "-n", "4", "-o", "jsonl"}));
  ASSERT_EQ(jsonl.exit_code, 0) << jsonl.err;
  const std::vector<std::string> objects = lines(jsonl.out);
  ASSERT_EQ(objects.size(), 2U);
  EXPECT_EQ(Json::parse(objects[0])["test"], "pp8");
  EXPECT_EQ(Json::parse(objects[1])["test"], "tg4");

  const RunResult csv = run_krait(quick({"-p", "8", "-n", "4", "-o", "csv"}));
  ASSERT_EQ(csv.exit_code, 0) << csv.err;
  const std::vector<std::string> rows = lines(csv.out);
  ASSERT_EQ(rows.size(), 3U);
  std::string keys;
  const auto ordered = nlohmann::ordered_json::parse(objects[0]);
  for (const auto& [key, value] : ordered.items()) {
    keys += (keys.empty() ? "" : ",") + key;
  }
  EXPECT_EQ(rows[0], keys);
  EXPECT_THAT(rows[1], HasSubstr("\"pp8\""));
  EXPECT_THAT(rows[2], HasSubstr("\"tg4\""));
}

TEST(Bench, WarmsUpAsLongAsItIsTold) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  EXPECT_EQ(run_json({"bench", "--device", "cpu", "-m", tiny(), "-p", "0", "-n", "4", "-r", "1",
                      "--no-ceilings", "--warmup", "1"})
                .size(),
            1U);
  EXPECT_GT(Clock::now() - start, std::chrono::seconds(1));
}

TEST(Bench, ZeroLeavesATestOut) {
  EXPECT_EQ(run_json(quick({"-p", "0", "-n", "4"})).size(), 1U);
  const RunResult r = run_krait(quick({"-p", "0", "-n", "0"}));
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_THAT(r.err, HasSubstr("nothing to measure"));
}

/// 1048576 sequences of this shape take terabytes of state.
const Args kTooLarge =
    Args{"bench", "--device", "cpu", "--random-weights", "130m", "--dtype", "bf16", "-p",
         "0",     "-n",       "1"} +
    kQuick;

TEST(Bench, WhatDoesNotFitIsOneSentenceAndTheRestComes) {
  const RunResult r = run_krait(kTooLarge + Args{"-b", "1048576,1", "-o", "jsonl"});
  EXPECT_EQ(r.exit_code, 5) << r.err;
  EXPECT_THAT(r.err,
              HasSubstr("error: 130m bf16, state f32: tg1, batch 1048576: not enough memory"));
  const std::vector<std::string> rows = lines(r.out);
  ASSERT_EQ(rows.size(), 2U);
  const Json failed = Json::parse(rows[0]);
  EXPECT_THAT(failed["error"].get<std::string>(), HasSubstr("not enough memory"));
  EXPECT_TRUE(failed["median_ts"].is_null());
  EXPECT_EQ(failed["n_batch"], 1048576);
  EXPECT_TRUE(Json::parse(rows[1])["error"].is_null());

  const RunResult md = run_krait(kTooLarge + Args{"-b", "1048576,1"});
  EXPECT_THAT(md.out, HasSubstr("| 1048576 | tg1 | failed |"));
  EXPECT_THAT(md.out, HasSubstr("tg1, batch 1048576 of 130m: not enough memory"));
}

TEST(Bench, AModelThatIsNotThereIsOneSentenceAndTheRestComes) {
  const RunResult r = run_krait(Args{"bench", "--device", "cpu", "-m", "/no/such/model", "-m",
                                     tiny(), "-p", "4", "-n", "2", "-o", "json"} +
                                kQuick);
  EXPECT_EQ(r.exit_code, 3) << r.err;
  EXPECT_THAT(r.err, HasSubstr("error: /no/such/model: "));
  EXPECT_EQ(Json::parse(r.out).size(), 2U);

  const RunResult none = run_krait({"bench", "--random-weights", "13b,14b"});
  EXPECT_EQ(none.exit_code, 2);
  EXPECT_EQ(none.out, "");
  EXPECT_THAT(none.err, HasSubstr("13b"));
  EXPECT_THAT(none.err, HasSubstr("none of the 4 tests could be run"));
}

TEST(Bench, SaysWhatItDoesOnStderrUnlessQuiet) {
  const RunResult r = run_krait(quick({"-p", "4", "-n", "2"}));
  EXPECT_THAT(r.err, HasSubstr("[1/2]"));
  EXPECT_THAT(r.err, HasSubstr("[2/2]"));
  const RunResult q = run_krait(quick({"-p", "4", "-n", "2", "-q"}));
  EXPECT_EQ(q.err, "");
  EXPECT_THAT(q.out, HasSubstr("| tg2 |"));
}

TEST(Bench, PlotSaysWhatIsMissing) {
  const RunResult wrong = run_krait(quick({"--plot", "bench.gif"}));
  EXPECT_EQ(wrong.exit_code, 2);
  EXPECT_THAT(wrong.err, HasSubstr(".png or .svg"));
  const RunResult none =
      run_krait(quick({"--plot", "b.png"}), "", {{"KRAIT_PYTHON", "/no/python"}});
  EXPECT_EQ(none.exit_code, 1);
  EXPECT_EQ(none.out, "");  // before anything is measured
  EXPECT_THAT(none.err, HasSubstr("/no/python could not be started"));
  EXPECT_THAT(none.err, HasSubstr("KRAIT_PYTHON"));
}

/// An interpreter that stands in for Python: it checks as it is told, and keeps what it is given.
TEST(Bench, PlotHandsTheRowsToTheScript) {
  const ScratchDir dir;
  const auto python = dir.path() / "python";
  const auto seen = dir.path() / "seen.json";
  const std::string file = (dir.path() / "b.svg").string();
  write_file(python, "#!/bin/sh\n[ \"$2\" = --check ] && exit $CHECK\n[ \"$2\" = " + file +
                         " ] && cat >" + seen.string() + "\n");
  std::filesystem::permissions(python, std::filesystem::perms::owner_all);
  const std::map<std::string, std::string> env{{"KRAIT_PYTHON", python.string()}};

  auto lacking = env;
  lacking["CHECK"] = "3";
  const RunResult without = run_krait(quick({"--plot", file}), "", lacking);
  EXPECT_EQ(without.exit_code, 1);
  EXPECT_THAT(without.err, HasSubstr("has no matplotlib"));

  auto fine = env;
  fine["CHECK"] = "0";
  const RunResult r = run_krait(quick({"-p", "4", "-n", "2", "--plot", file}), "", fine);
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("| pp4 |"));
  const Json rows = Json::parse(read_file(seen));
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[1]["test"], "tg2");
}

TEST(Bench, Mistakes) {
  for (const auto& [args, part] :
       std::vector<std::pair<Args, std::string>>{{{"-pg", "12"}, "-pg: expected two numbers"},
                                                 {{"-pg", "12,0"}, "-pg: expected two numbers"},
                                                 {{"--dtype", "f32,f8"}, "f8"},
                                                 {{"--state-dtype", "auto"}, "auto"},
                                                 {{"-o", "xml"}, "xml"},
                                                 {{"-b", "1,0"}, "0"},
                                                 {{"--warmup", "-1"}, "-1"}}) {
    const RunResult r = run_krait(quick(args));
    EXPECT_EQ(r.exit_code, 2) << r.err;
    EXPECT_EQ(r.out, "");
    EXPECT_THAT(r.err, HasSubstr(part));
  }
}

TEST(Bench, GpuMeasuresAgainstItsCeilings) {
  const Json tests = run_json({"bench", "--random-weights", "130m", "--device", "cuda", "--dtype",
                               "bf16", "-p", "512", "-n", "32", "-b", "1,1024", "-r", "3"});
  ASSERT_EQ(tests.size(), 3U);
  for (const Json& t : tests) {
    EXPECT_EQ(t["backends"], "cuda");
    EXPECT_EQ(t["gpu_info"], t["device"]);
    EXPECT_THAT(t["driver"].get<std::string>(), HasSubstr("CUDA"));
    EXPECT_GT(t["share_of_floor"].get<double>(), 0.001);
    EXPECT_LT(t["share_of_floor"].get<double>(), 1.1);
    EXPECT_EQ(t["samples_mhz"].size(), 3U);
    EXPECT_GT(t["median_mhz"].get<int>(), 100);
    EXPECT_LT(t["median_mhz"].get<int>(), 5000);
  }
}

}  // namespace
}  // namespace krait::test
