#include <cmath>
#include <numeric>

#include "base/stats.h"
#include "cli/bench_result.h"
#include "cli/console.h"
#include "cli/version.h"

namespace krait {

namespace {

double mean(const std::vector<double>& v) {
  return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
}

/// Of the sample, as llama-bench has it.
double standard_deviation(const std::vector<double>& v) {
  if (v.size() < 2) return 0;
  const double m = mean(v);
  double squares = 0;
  for (const double x : v) squares += (x - m) * (x - m);
  return std::sqrt(squares / static_cast<double>(v.size() - 1));
}

std::vector<double> rates(const BenchRow& row) {
  std::vector<double> r;
  r.reserve(row.seconds.size());
  for (const double s : row.seconds) r.push_back(row.rate(s));
  return r;
}

std::vector<int64_t> nanoseconds(const std::vector<double>& seconds) {
  std::vector<int64_t> ns;
  ns.reserve(seconds.size());
  for (const double s : seconds) ns.push_back(std::llround(s * 1e9));
  return ns;
}

std::vector<int64_t> megahertz(const std::vector<double>& hertz) {
  std::vector<int64_t> mhz;
  mhz.reserve(hertz.size());
  for (const double f : hertz) mhz.push_back(std::llround(f / 1e6));
  return mhz;
}

/// "2995 GB/s" of bytes per second, "771 TFLOP/s" of flops.
std::string bandwidth(double v) {
  return v < 100e9 ? fmt::format("{:.1f} GB/s", v / 1e9) : fmt::format("{:.0f} GB/s", v / 1e9);
}
std::string products(double v) {
  if (v < 1e12) return fmt::format("{:.0f} GFLOP/s", v / 1e9);
  return v < 10e12 ? fmt::format("{:.2f} TFLOP/s", v / 1e12)
                   : fmt::format("{:.0f} TFLOP/s", v / 1e12);
}

std::string percent(double share) { return fmt::format("{:.1f}%", 100 * share); }

std::string join(const std::vector<std::string>& parts, std::string_view between) {
  return fmt::format("{}", fmt::join(parts, between));
}

// ---- Markdown -----------------------------------------------------------------------------------

class MarkdownWriter final : public BenchWriter {
 public:
  using BenchWriter::BenchWriter;

  void row(const BenchRow& r) override {
    if (!begun_) head();
    begun_ = true;
    const BenchModel& m = r.model;
    std::vector<std::string> cells{m.name,
                                   human_bytes(m.bytes),
                                   fmt::format("{:.1f} M", static_cast<double>(m.parameters) / 1e6),
                                   machine_.backend,
                                   std::string(dtype_name(m.dtype)),
                                   std::string(dtype_name(m.state_dtype)) +
                                       (m.state_rounding == "stochastic" ? " stochastic" : ""),
                                   fmt::format("{}", r.test.n_batch),
                                   r.test.name()};
    if (!r.error.empty()) {
      cells.insert(cells.end(), {"failed", "", "", "", "", "", "", ""});
      notes_.push_back(
          fmt::format("{}, batch {} of {}: {}.", r.test.name(), r.test.n_batch, m.name, r.error));
    } else {
      measured(r, cells);
    }
    write_("| " + join(cells, " | ") + " |\n");
  }

  void end() override {
    if (!begun_) return;
    std::string text;
    for (const std::string& note : notes_) text += note + "\n";
    if (!ceilings_.empty()) text += "Ceilings of this device: " + join(ceilings_, "; ") + ".\n";
    if (!loads_.empty()) text += "Loaded: " + join(loads_, "; ") + ".\n";
    if (!hashes_.empty()) {
      text += "Hash of the logits after a prompt, equal for equal results: " + join(hashes_, "; ") +
              ".\n";
    }
    if (!text.empty()) write_("\n" + text);
  }

 private:
  void head() {
    const DeviceInfo& d = machine_.device;
    std::vector<std::string> parts{d.name};
    if (!d.processor.empty()) parts.push_back(d.processor);
    if (!d.driver.empty()) parts.push_back("driver " + d.driver);
    if (!d.clocks.empty()) parts.push_back(d.clocks);
    write_(fmt::format(
        "krait {} ({}) on {}\n\nMedian of {} after a warm-up; spread: slowest to fastest; MHz: of "
        "the cores. ms: a step of tg, the whole of pp. GB/s and TFLOP/s by count (each weight read "
        "once a step, the state read and written).\n\n",
        version(), commit(), join(parts, "; "), machine_.repetitions));
    write_(
        "| model | size | params | backend | dtype | state | batch | test | t/s | spread | MHz | "
        "ms | first token ms | GB/s | TFLOP/s | of floor |\n");
    write_(
        "| --- | ---: | ---: | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | "
        "---: | ---: | ---: |\n");
  }

  void measured(const BenchRow& r, std::vector<std::string>& cells) {
    const double s = median(r.seconds);
    cells.push_back(fmt::format("{:.1f}", r.rate(s)));
    cells.push_back(percent(r.spread()));
    cells.push_back(r.clock.empty() ? "" : fmt::format("{:.0f}", median(r.clock) / 1e6));
    cells.push_back(fmt::format("{:.3f}", s * 1e3 / static_cast<double>(r.test.n_timed())));
    cells.push_back(r.first_token.empty() ? ""
                                          : fmt::format("{:.2f}", median(r.first_token) * 1e3));
    cells.push_back(r.work ? fmt::format("{:.1f}", r.work->bytes / s / 1e9) : "");
    cells.push_back(r.work ? fmt::format("{:.3f}", r.work->flops() / s / 1e12) : "");
    cells.push_back(r.floor ? percent(r.floor->seconds / s) : "");
    const BenchModel& m = r.model;
    if (r.floor) {
      if (ceilings_.empty()) {
        ceilings_ = {"copy " + bandwidth(r.floor->memory.copy),
                     "read " + bandwidth(r.floor->memory.read)};
      }
      add(ceilings_,
          fmt::format("{} products {}", dtype_name(m.dtype), products(r.floor->product)));
    }
    if (!r.logits_hash.empty()) {
      hashes_.push_back(fmt::format("{} of {} in {} {}", r.test.name(), m.name, dtype_name(m.dtype),
                                    r.logits_hash));
    }
    add(loads_, fmt::format("{} in {}, {:.2f} s", m.name, dtype_name(m.dtype), m.load_seconds));
  }

  static void add(std::vector<std::string>& to, const std::string& text) {
    if (std::find(to.begin(), to.end(), text) == to.end()) to.push_back(text);
  }

  bool begun_ = false;
  std::vector<std::string> notes_;
  std::vector<std::string> ceilings_;
  std::vector<std::string> loads_;
  std::vector<std::string> hashes_;
};

// ---- JSON and CSV -------------------------------------------------------------------------------

class JsonWriter final : public BenchWriter {
 public:
  using BenchWriter::BenchWriter;
  void row(const BenchRow& r) override { all_.push_back(bench_json(machine_, r)); }
  void end() override { write_(dump_json(all_, 2)); }

 private:
  OrderedJson all_ = OrderedJson::array();
};

class JsonLinesWriter final : public BenchWriter {
 public:
  using BenchWriter::BenchWriter;
  void row(const BenchRow& r) override { write_(dump_json(bench_json(machine_, r))); }
};

/// RFC 4180: one line of keys, then the values; the samples of a row stand in one cell.
class CsvWriter final : public BenchWriter {
 public:
  using BenchWriter::BenchWriter;
  void row(const BenchRow& r) override {
    std::string keys;
    std::string values;
    const OrderedJson all = bench_json(machine_, r);
    for (const auto& [key, value] : all.items()) {
      const char* comma = keys.empty() ? "" : ",";
      keys += comma + key;
      values += comma + cell(value);
    }
    write_((begun_ ? "" : keys + "\n") + values + "\n");
    begun_ = true;
  }

 private:
  static std::string cell(const OrderedJson& value) {
    if (value.is_null()) return "";
    if (value.is_number()) return value.dump();
    std::string text;
    if (value.is_string()) {
      text = value.get<std::string>();
    } else {
      for (const OrderedJson& v : value) text += (text.empty() ? "" : " ") + v.dump();
    }
    std::string quoted = "\"";
    for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
    return quoted + "\"";
  }
  bool begun_ = false;
};

}  // namespace

std::string BenchTest::name() const {
  std::string s = n_prompt > 0 ? fmt::format("pp{}", n_prompt) : "";
  if (n_gen > 0) s += fmt::format("{}tg{}", s.empty() ? "" : "+", n_gen);
  return s;
}

double BenchRow::spread() const { return relative_range(seconds); }

OrderedJson bench_json(const BenchMachine& machine, const BenchRow& row) {
  const BenchModel& m = row.model;
  const bool gpu = machine.backend != "cpu";
  OrderedJson j = {{"build_commit", commit()},
                   {"build_version", version()},
                   {"cpu_info", machine.processor},
                   {"gpu_info", gpu ? machine.device.name : ""},
                   {"backends", machine.backend},
                   {"device", machine.device.name},
                   {"driver", machine.device.driver},
                   {"clocks", machine.device.clocks},
                   {"model", m.name},
                   {"model_filename", m.file},
                   {"model_type", m.family},
                   {"model_size", m.bytes},
                   {"model_n_params", m.parameters},
                   {"dtype", dtype_name(m.dtype)},
                   {"state_dtype", dtype_name(m.state_dtype)},
                   {"state_rounding", m.state_rounding},
                   {"n_threads", machine.threads},
                   {"load_seconds", m.load_seconds},
                   {"test", row.test.name()},
                   {"n_batch", row.test.n_batch},
                   {"n_prompt", row.test.n_prompt},
                   {"n_gen", row.test.n_gen},
                   {"test_time", row.time}};
  // Every row has every key, so that CSV has one line of them: null where there is nothing to say.
  const bool ok = row.error.empty();
  const OrderedJson none;
  const double s = ok ? median(row.seconds) : 0;
  const std::vector<double> r = rates(row);
  const auto put = [&](const char* key, bool known, auto&& value) {
    if (known && ok) {
      j[key] = value();
    } else {
      j[key] = none;
    }
  };
  put("avg_ns", true, [&] { return std::llround(mean(row.seconds) * 1e9); });
  put("stddev_ns", true, [&] { return std::llround(standard_deviation(row.seconds) * 1e9); });
  put("avg_ts", true, [&] { return mean(r); });
  put("stddev_ts", true, [&] { return standard_deviation(r); });
  put("median_ts", true, [&] { return row.rate(s); });
  put("min_ts", true, [&] { return *std::min_element(r.begin(), r.end()); });
  put("max_ts", true, [&] { return *std::max_element(r.begin(), r.end()); });
  put("spread", true, [&] { return row.spread(); });
  put("median_ms_per_step", true,
      [&] { return s * 1e3 / static_cast<double>(row.test.n_timed()); });
  put("first_token_ms", !row.first_token.empty(), [&] { return median(row.first_token) * 1e3; });
  put("median_mhz", !row.clock.empty(), [&] { return std::llround(median(row.clock) / 1e6); });
  put("logits_hash", !row.logits_hash.empty(), [&] { return row.logits_hash; });
  put("bytes", row.work.has_value(), [&] { return row.work->bytes; });
  put("flops", row.work.has_value(), [&] { return row.work->flops(); });
  put("gb_per_s", row.work.has_value(), [&] { return row.work->bytes / s / 1e9; });
  put("tflop_per_s", row.work.has_value(), [&] { return row.work->flops() / s / 1e12; });
  const bool floor = row.floor.has_value();
  put("floor_ts", floor, [&] { return row.rate(row.floor->seconds); });
  put("share_of_floor", floor, [&] { return row.floor->seconds / s; });
  put("ceiling_copy_gb_per_s", floor, [&] { return row.floor->memory.copy / 1e9; });
  put("ceiling_read_gb_per_s", floor, [&] { return row.floor->memory.read / 1e9; });
  put("ceiling_product_tflop_per_s", floor, [&] { return row.floor->product / 1e12; });
  j["samples_ns"] = nanoseconds(row.seconds);
  j["samples_ts"] = r;
  j["samples_mhz"] = megahertz(row.clock);
  j["error"] = ok ? none : OrderedJson(row.error);
  return j;
}

std::unique_ptr<BenchWriter> make_bench_writer(std::string_view format, BenchMachine machine,
                                               BenchWriter::Write write) {
  if (format == "json") return std::make_unique<JsonWriter>(std::move(machine), std::move(write));
  if (format == "jsonl") {
    return std::make_unique<JsonLinesWriter>(std::move(machine), std::move(write));
  }
  if (format == "csv") return std::make_unique<CsvWriter>(std::move(machine), std::move(write));
  return std::make_unique<MarkdownWriter>(std::move(machine), std::move(write));
}

}  // namespace krait
