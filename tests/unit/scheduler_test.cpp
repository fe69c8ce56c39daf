// The scheduler against a device that is only a table: what each slot has been fed. Random mixes of
// lengths, limits, parents and early ends, with the one plan of delay that launching ahead brings.
#include "runtime/scheduler.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>
#include <set>

#include "support/test_support.h"

namespace krait::test {
namespace {

/// One token: whose it is, and its place in that sequence's own prompt or text.
using Fed = std::vector<std::pair<int64_t, int64_t>>;

/// Follows plans, and fails where one asks for what a device could not do.
class Table {
 public:
  Table(int64_t n_slot, int64_t chunk) : scheduler({n_slot, chunk}), chunk_(chunk) {
    slots_.resize(static_cast<size_t>(n_slot));
    owner_.assign(static_cast<size_t>(n_slot), -1);
  }

  void submit(int64_t id, const SequenceSpec& spec, int64_t ends_after = -1) {
    specs_[id] = spec;
    ends_after_[id] = ends_after;
    scheduler.submit(id, spec);
  }

  /// One round: launch a plan, then read the one before. False when there is nothing left.
  bool round() {
    const bool could_decode = decoding() > 0;
    const Scheduler::Plan plan = scheduler.next();
    const bool any = !plan.empty() || !unread_.empty();
    std::vector<int64_t> drawn;
    int64_t tokens = 0;
    std::map<int64_t, Fed> before;  // this plan's copies see what earlier plans left
    for (size_t s = 0; s < slots_.size(); ++s) before[static_cast<int64_t>(s)] = slots_[s];
    std::set<int32_t> used;
    for (const Scheduler::Piece& p : plan.prefill) {
      const SequenceSpec& spec = specs_.at(p.id);
      EXPECT_TRUE(used.insert(p.slot).second) << "slot twice in a prefill";
      EXPECT_GT(p.n, 0);
      tokens += p.n;
      Fed& slot = slots_[static_cast<size_t>(p.slot)];
      if (p.begin == 0) {
        owner_[static_cast<size_t>(p.slot)] = p.id;
        slot.clear();
        EXPECT_EQ(p.copy_from >= 0, spec.parent >= 0);
        if (p.copy_from >= 0) slot = before.at(p.copy_from);
        order.push_back(p.id);
      }
      EXPECT_EQ(owner_[static_cast<size_t>(p.slot)], p.id) << "somebody else's slot";
      for (int64_t i = 0; i < p.n; ++i) slot.emplace_back(p.id, p.begin + i);
      EXPECT_EQ(p.ends, p.begin + p.n == spec.n_prompt);
      EXPECT_EQ(p.draws, p.ends && spec.max_new != 0 && spec.n_children == 0);
      if (p.ends) {
        Fed want = spec.parent >= 0 ? prompts_.at(spec.parent) : Fed();
        for (int64_t i = 0; i < spec.n_prompt; ++i) want.emplace_back(p.id, i);
        EXPECT_EQ(slot, want) << "sequence " << p.id;
        prompts_[p.id] = slot;
      }
      if (p.draws) drawn.push_back(p.id);
    }
    EXPECT_LE(tokens, chunk_);
    used.clear();
    for (const Scheduler::Row& r : plan.decode) {
      EXPECT_TRUE(used.insert(r.slot).second) << "slot twice in a step";
      EXPECT_EQ(owner_[static_cast<size_t>(r.slot)], r.id) << "somebody else's slot";
      EXPECT_GT(n_drawn_[r.id], 0) << "a step before the first draw";
      drawn.push_back(r.id);
    }
    for (const int64_t id : drawn) {
      ++n_drawn_[id];
      EXPECT_TRUE(specs_.at(id).max_new < 0 || n_drawn_[id] <= specs_.at(id).max_new);
    }
    largest_step = std::max(largest_step, std::ssize(plan.decode));
    prefills_alone =
        plan.decode.empty() && !plan.prefill.empty() && could_decode ? prefills_alone + 1 : 0;
    EXPECT_LT(prefills_alone, Scheduler::kMaxPrefillsInARow) << "decoding starves";

    for (const int64_t id : unread_) {
      ++n_read_[id];
      if (n_read_[id] == ends_after_[id]) scheduler.finish(id);
    }
    unread_ = drawn;
    return any;
  }

  void run() {
    int rounds = 0;
    while (round()) ASSERT_LT(++rounds, 200000) << "no end";
    EXPECT_EQ(scheduler.waiting(), 0);
  }

  /// Every sequence got all its tokens, and at most one too many after an early end.
  void expect_complete() {
    for (const auto& [id, spec] : specs_) {
      EXPECT_TRUE(prompts_.contains(id)) << "sequence " << id << " never ran";
      if (spec.n_children > 0 || spec.max_new == 0) {
        EXPECT_EQ(n_drawn_[id], 0);
        continue;
      }
      const int64_t end = ends_after_[id];
      const int64_t want = end > 0 && (spec.max_new < 0 || end < spec.max_new) ? end : spec.max_new;
      EXPECT_GE(n_read_[id], want) << "sequence " << id;
      EXPECT_LE(n_drawn_[id], want + (want == end ? 2 : 0)) << "sequence " << id;
    }
  }

  Scheduler scheduler;
  std::vector<int64_t> order;  ///< in which sequences started
  int64_t largest_step = 0;
  int prefills_alone = 0;

 private:
  [[nodiscard]] int64_t decoding() const {
    int64_t n = 0;
    for (const auto& [id, drawn] : n_drawn_) {
      const auto read = n_read_.find(id);
      const int64_t end = ends_after_.at(id);
      const bool ended = end > 0 && read != n_read_.end() && read->second >= end;
      if (drawn > 0 && drawn != specs_.at(id).max_new && !ended) ++n;
    }
    return n;
  }

  int64_t chunk_;
  std::vector<Fed> slots_;
  std::vector<int64_t> owner_;
  std::map<int64_t, SequenceSpec> specs_;
  std::map<int64_t, int64_t> ends_after_;
  std::map<int64_t, Fed> prompts_;
  std::map<int64_t, int64_t> n_drawn_;
  std::map<int64_t, int64_t> n_read_;
  std::vector<int64_t> unread_;
};

SequenceSpec prompt(int64_t n, int64_t max_new) { return {.n_prompt = n, .max_new = max_new}; }

RC_GTEST_PROP(SchedulerProperty, AnyMixIsDoneOnceAndInOrder, ()) {
  const auto n_slot = *rc::gen::inRange<int64_t>(1, 40);
  const auto chunk = *rc::gen::inRange<int64_t>(1, 200);
  Table table(n_slot, chunk);
  const auto n = *rc::gen::inRange<int64_t>(0, 120);
  std::vector<int64_t> want;
  for (int64_t id = 0; id < n; ++id) {
    // Long and short ones; some arrive while others run.
    const int64_t length = *rc::gen::weightedOneOf<int64_t>(
        {{4, rc::gen::inRange<int64_t>(1, 30)}, {1, rc::gen::inRange<int64_t>(1, 3000)}});
    const auto max_new = *rc::gen::inRange<int64_t>(0, 20);
    const auto end = *rc::gen::inRange<int64_t>(-20, 20);
    table.submit(id, prompt(length, max_new == 19 && end > 0 ? -1 : max_new), end > 0 ? end : -1);
    want.push_back(id);
    for (auto r = *rc::gen::inRange(-6, 4); r > 0; --r) table.round();
  }
  table.run();
  table.expect_complete();
  RC_ASSERT(table.order == want);
  RC_ASSERT(table.scheduler.running() == 0);
}

RC_GTEST_PROP(SchedulerProperty, ChildrenStartFromTheirParents, ()) {
  const auto n_slot = *rc::gen::inRange<int64_t>(4, 40);
  const auto chunk = *rc::gen::inRange<int64_t>(1, 100);
  Table table(n_slot, chunk);
  // A prefix of all, which is never released, and groups that share a prompt which begins with it.
  constexpr int64_t kAll = 1000000;
  const bool shared = *rc::gen::arbitrary<bool>();
  if (shared) {
    table.submit(kAll, {.n_prompt = *rc::gen::inRange<int64_t>(1, 300), .n_children = kAll});
  }
  const int64_t parent_of_all = shared ? kAll : -1;
  int64_t id = 0;
  for (auto groups = *rc::gen::inRange(0, 30); groups > 0; --groups) {
    const auto n_children = *rc::gen::inRange<int64_t>(0, 6);
    int64_t parent = parent_of_all;
    if (n_children > 0) {
      parent = id++;
      table.submit(parent, {.n_prompt = *rc::gen::inRange<int64_t>(1, 150),
                            .parent = parent_of_all,
                            .n_children = n_children});
    }
    for (int64_t c = 0; c < std::max<int64_t>(n_children, 1); ++c) {
      table.submit(id++, {.n_prompt = *rc::gen::inRange<int64_t>(1, 9),
                          .max_new = *rc::gen::inRange<int64_t>(0, 12),
                          .parent = parent});
    }
    if (*rc::gen::arbitrary<bool>()) table.round();
  }
  table.run();
  table.expect_complete();
  RC_ASSERT(table.scheduler.running() == (shared ? 1 : 0));
}

TEST(Scheduler, FillsTheSlotsAndKeepsThemFull) {
  Table table(16, 64);
  for (int64_t id = 0; id < 400; ++id) table.submit(id, prompt(20, 20 + id * 7 % 21));
  int64_t sum = 0;
  int rounds = 0;
  while (table.scheduler.waiting() > 0) {
    table.round();
    if (++rounds > 100) {
      sum += table.scheduler.running();
      // Three or four prompts fit a chunk, so as many end together.
      EXPECT_GE(table.scheduler.running(), 12) << "round " << rounds;
    }
  }
  EXPECT_GE(static_cast<double>(sum) / (rounds - 100), 15.0);
  EXPECT_EQ(table.largest_step, 16);
  table.run();
  table.expect_complete();
}

TEST(Scheduler, ALongPromptDoesNotHoldUpTheOthers) {
  Table table(4, 16);
  table.submit(0, prompt(4, 200));
  for (int i = 0; i < 3; ++i) table.round();
  table.submit(1, prompt(1600, 1));  // 100 chunks
  int steps = 0;
  for (int i = 0; i < 100; ++i) {
    const Scheduler::Plan plan = table.scheduler.next();
    EXPECT_FALSE(plan.prefill.empty());
    steps += plan.decode.empty() ? 0 : 1;
  }
  EXPECT_GE(steps, 25);
}

TEST(Scheduler, GathersFreeSlotsUntilAChunkIsFull) {
  // 64 running, prompts of a quarter of a chunk waiting: they start by fours.
  Scheduler s({64, 400});
  for (int64_t id = 0; id < 64; ++id) s.submit(id, prompt(1, 1000));
  while (s.waiting() > 0) (void)s.next();
  for (int64_t id = 100; id < 200; ++id) s.submit(id, prompt(100, 1000));
  for (int64_t id = 0; id < 3; ++id) {
    s.finish(id);
    EXPECT_TRUE(s.next().prefill.empty()) << id;
  }
  s.finish(3);
  EXPECT_EQ(s.next().prefill.size(), 4U);
  // The last ones have nobody to wait for.
  Scheduler last({64, 400});
  for (int64_t id = 0; id < 64; ++id) last.submit(id, prompt(1, 1000));
  while (last.waiting() > 0) (void)last.next();
  last.submit(100, prompt(5, 10));
  EXPECT_TRUE(last.next().prefill.empty());
  last.finish(7);
  EXPECT_EQ(last.next().prefill.size(), 1U);
}

TEST(Scheduler, CostsLittleMoreThanTheWorkItself) {
  // A device on which a prefill takes 4 ms and 17.5 us a token, a step 2 ms and 17.5 us a row
  // (about a 2.8b model on an H100), and the mix of tools/make_batch_prompts.py. The best there is:
  // full chunks and full steps from the first moment to the last.
  const auto prefill = [](int64_t n) { return n > 0 ? 4 + 0.0175 * static_cast<double>(n) : 0.0; };
  const auto step = [](int64_t n) { return n > 0 ? 2 + 0.0175 * static_cast<double>(n) : 0.0; };
  constexpr int64_t kChunk = 2048;
  for (const int64_t n_slot : {64, 256, 1024}) {
    Scheduler s({n_slot, kChunk});
    std::mt19937 random(1);
    int64_t n_prompt = 0;
    int64_t n_new = 0;
    double ms = 0;
    int64_t id = 0;
    for (;;) {
      while (id < 2000 && s.waiting() < n_slot) {
        const SequenceSpec spec = prompt(16 + static_cast<int64_t>(random() % 1009),
                                         16 + static_cast<int64_t>(random() % 497));
        n_prompt += spec.n_prompt;
        n_new += spec.max_new;
        s.submit(id++, spec);
      }
      const Scheduler::Plan plan = s.next();
      if (plan.empty()) break;
      int64_t tokens = 0;
      for (const Scheduler::Piece& p : plan.prefill) tokens += p.n;
      ms += prefill(tokens) + step(std::ssize(plan.decode));
    }
    const double best =
        static_cast<double>(n_prompt) * prefill(kChunk) / static_cast<double>(kChunk) +
        static_cast<double>(n_new) * step(n_slot) / static_cast<double>(n_slot);
    std::printf("%lld slots: %.1f s, %.1f%% of the best\n", static_cast<long long>(n_slot),
                ms / 1e3, 100 * best / ms);
    EXPECT_GT(best / ms, 0.93) << n_slot << " slots";
  }
}

TEST(Scheduler, WrongUseIsASentence) {
  Scheduler s({1, 8});
  EXPECT_TRUE(
      throws(ErrorKind::runtime, "parent", [&] { s.submit(1, {.n_prompt = 1, .n_children = 2}); }));
  EXPECT_TRUE(
      throws(ErrorKind::runtime, "no parent", [&] { s.submit(1, {.n_prompt = 1, .parent = 7}); }));
  s.submit(2, prompt(20, 3));
  EXPECT_TRUE(throws(ErrorKind::runtime, "not drawn", [&] { s.finish(2); }));
  s.finish(77);
  while (!s.next().empty()) {
  }
  s.finish(2);
  EXPECT_EQ(s.running(), 0);
}

}  // namespace
}  // namespace krait::test
