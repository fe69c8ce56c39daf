// Which sequences the device works on next: the order of work when more prompts wait than slots are
// there. Pure logic: it knows lengths and slots, but no model, no tokens and no clock.
//
// Each plan is a packed piece of prefill and one decode step, and is launched before the results of
// the one before it are read. A slot is given away as soon as its sequence's last launch is
// planned: work is done in the order of the plans, so whoever opens the slot later comes after it.
// A sequence that ends early (a stop string, the end of the text) is reported with finish(), and
// what was planned for it in the meantime is to be thrown away.
#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

namespace krait {

struct SchedulerOptions {
  int64_t n_slot = 1;
  int64_t chunk = 512;  ///< prompt tokens of one plan at most
};

struct SequenceSpec {
  int64_t n_prompt = 1;  ///< tokens to prefill, beyond those it takes from `parent`
  int64_t max_new = -1;  ///< tokens to draw; -1: until finish(); 0: the prompt is all there is
  int64_t parent = -1;   ///< the sequence whose prompt comes before this one's; -1: none
  /// Sequences that name this one as their parent: it keeps its slot until so many have started,
  /// and draws nothing.
  int64_t n_children = 0;
};

class Scheduler {
 public:
  /// A part of a prompt: tokens [begin, begin + n) of the sequence's own n_prompt.
  struct Piece {
    int64_t id = 0;
    int32_t slot = 0;
    int32_t copy_from = -1;  ///< the parent's slot, whose state is the start; -1: an empty text
    int64_t begin = 0;       ///< 0: the slot is opened
    int64_t n = 0;
    bool draws = false;  ///< the last piece of a sequence that draws its first token here
    bool ends = false;   ///< the last piece
  };
  struct Row {
    int64_t id = 0;
    int32_t slot = 0;
  };
  /// To be launched in this order.
  struct Plan {
    std::vector<Piece> prefill;
    std::vector<Row> decode;  ///< each feeds the token it drew last and draws the next
    [[nodiscard]] bool empty() const noexcept { return prefill.empty() && decode.empty(); }
  };

  /// A plan prefills at most this many times in a row without a decode step for the others.
  static constexpr int kMaxPrefillsInARow = 4;

  explicit Scheduler(const SchedulerOptions& options);

  /// Adds a sequence to those that wait. Ids are the caller's, each used once; a parent comes
  /// before its children. Errors: runtime (an unknown parent, a parent where there is one slot).
  void submit(int64_t id, const SequenceSpec& spec);

  /// What to launch now; empty when nothing is left to do.
  [[nodiscard]] Plan next();

  /// The sequence needs no more steps. One that is not there any more is no error.
  void finish(int64_t id);

  /// Sequences without a slot, and those with one.
  [[nodiscard]] int64_t waiting() const noexcept { return n_waiting_; }
  /// Tokens that those without a slot have to prefill.
  [[nodiscard]] int64_t waiting_tokens() const noexcept { return n_waiting_tokens_; }
  [[nodiscard]] int64_t running() const noexcept { return n_slot_ - std::ssize(free_); }
  [[nodiscard]] int64_t n_slot() const noexcept { return n_slot_; }

 private:
  struct Sequence {
    SequenceSpec spec;
    int32_t slot = -1;
    int64_t prefilled = 0;
    int64_t planned = 0;  ///< draws
    int64_t children_left = 0;
    std::vector<int64_t> blocked;  ///< children that wait for this prompt
  };

  [[nodiscard]] bool startable(const Sequence& s) const;
  [[nodiscard]] bool worth_a_prefill() const;
  void plan_prefill(Plan& plan);
  void start(Sequence& s, Piece& piece);
  void retire(int64_t id);

  int64_t n_slot_;
  int64_t chunk_;
  std::unordered_map<int64_t, Sequence> sequences_;
  std::deque<int64_t> queue_;      ///< waiting, and able to start when there is a slot
  std::vector<int32_t> free_;      ///< slots; the lowest last
  std::vector<int64_t> decoding_;  ///< in the order in which they began
  int64_t partial_ = -1;           ///< the sequence whose prompt is half prefilled; -1: none
  int64_t n_waiting_ = 0;
  int64_t n_waiting_tokens_ = 0;
  int64_t n_parents_ = 0;  ///< with a slot
  int prefills_in_a_row_ = 0;
};

}  // namespace krait
