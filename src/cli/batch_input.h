// The input of a batch, read line by line: what each line asks for, and in a first pass over a file
// what all of them need. Nothing of a line is kept but its id's hash.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cli/batch_request.h"

namespace krait {

/// Lines of a file, or of stdin for "-". Reading waits for a pipe or terminal, but not for ever:
/// `stop` is asked ten times a second.
class LineReader {
 public:
  /// Errors: file (not there, a folder, unreadable), here and in next().
  LineReader(const std::string& file, std::function<bool()> stop);
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  /// The next line without its end ("\n" or "\r\n"); false at the end of the file or when stopped.
  [[nodiscard]] bool next(std::string& line);
  [[nodiscard]] int64_t number() const noexcept { return number_; }  ///< of the last line, from 1
  /// False where the input can't be read a second time.
  [[nodiscard]] bool is_file() const noexcept { return is_file_; }

 private:
  [[nodiscard]] bool fill();

  std::string name_;
  std::function<bool()> stop_;
  int fd_ = -1;
  bool is_file_ = false;
  std::string buffer_;
  size_t at_ = 0;
  int64_t number_ = 0;
};

/// Lines number, number + of, ... of the input.
struct Shard {
  int64_t number = 1;
  int64_t of = 1;
  [[nodiscard]] bool has(int64_t line) const noexcept { return (line - number) % of == 0; }
};
/// "2/8". Error usage.
[[nodiscard]] Shard parse_shard(const std::string& text);

/// Where each id was first seen: 128-bit hashes, because ids may be long and many.
class SeenIds {
 public:
  /// The line that has this id first: `line` itself if it is new.
  [[nodiscard]] int64_t first_line(const std::string& id, int64_t line);

 private:
  struct Hash {
    uint64_t low = 0;
    uint64_t high = 0;
    bool operator==(const Hash&) const = default;
  };
  struct Low {
    size_t operator()(const Hash& h) const noexcept { return h.low; }
  };
  std::unordered_map<Hash, int64_t, Low> lines_;
};

/// Turns lines into requests, and into BadLine what is none: the line alone, a repeated id, and
/// what `check` has against it.
class RequestReader {
 public:
  RequestReader(BatchRules rules, std::function<void(const BatchRequest&)> check)
      : rules_(rules),
        check_(std::move(check)),
        automatic_(rules.format == BatchFormat::automatic) {}

  /// Empty for a blank line of JSON. Throws BadLine.
  [[nodiscard]] std::optional<BatchRequest> read(const std::string& line, int64_t number);

 private:
  BatchRules rules_;
  std::function<void(const BatchRequest&)> check_;
  bool automatic_;  ///< the format is still to be found
  SeenIds ids_;
};

/// What a first pass over the input finds out.
struct Survey {
  int64_t n_line = 0;      ///< to be answered by this run
  int64_t n_bad = 0;       ///< of them, no requests
  int64_t n_sequence = 0;  ///< texts that they ask for
  bool penalties = false;
  int64_t window = 1;  ///< of the penalties; lines that want all tokens count as their bytes
  int64_t n_bias = 0;  ///< of one line, at most
  bool logprobs = false;
  std::vector<BatchText> examples;  ///< prompts of the first few lines
  BatchText common;                 ///< what all prompts begin with
};

}  // namespace krait
