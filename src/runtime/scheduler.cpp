#include "runtime/scheduler.h"

#include <algorithm>

#include "base/error.h"

namespace krait {

Scheduler::Scheduler(const SchedulerOptions& options)
    : n_slot_(options.n_slot), chunk_(options.chunk) {
  for (int64_t slot = n_slot_; slot-- > 0;) free_.push_back(static_cast<int32_t>(slot));
}

void Scheduler::submit(int64_t id, const SequenceSpec& spec) {
  Sequence s;
  s.spec = spec;
  s.children_left = spec.n_children;
  if (spec.n_children > 0 && n_slot_ < 2) {
    throw Error(ErrorKind::runtime, "one slot cannot hold a parent and its children");
  }
  Sequence* parent = nullptr;
  if (spec.parent >= 0) {
    const auto it = sequences_.find(spec.parent);
    if (it == sequences_.end()) {
      throw Error(ErrorKind::runtime, fmt::format("sequence {} has no parent", id));
    }
    parent = &it->second;
  }
  ++n_waiting_;
  n_waiting_tokens_ += spec.n_prompt;
  if (parent != nullptr && parent->prefilled < parent->spec.n_prompt) {
    parent->blocked.push_back(id);
  } else {
    queue_.push_back(id);
  }
  sequences_.emplace(id, std::move(s));
}

bool Scheduler::startable(const Sequence& s) const {
  // One slot stays for those that are no parents: so the children of the others can always start,
  // and the parents' slots come back.
  return !free_.empty() && (s.spec.n_children == 0 || n_parents_ + 1 < n_slot_);
}

bool Scheduler::worth_a_prefill() const {
  if (partial_ >= 0) return true;
  if (queue_.empty() || free_.empty()) return false;
  // A chunk costs the device about the same half full as full, so when slots come free one by one,
  // it pays to let some gather: until they fill a chunk, or are a share of all that hardly matters.
  constexpr int64_t kShare = 16;
  const auto n_free = std::ssize(free_);
  if (n_free * kShare >= n_slot_ || std::ssize(queue_) <= n_free || decoding_.empty()) return true;
  int64_t tokens = 0;
  for (int64_t i = 0; i < n_free && tokens < chunk_; ++i) {
    tokens += sequences_.at(queue_[static_cast<size_t>(i)]).spec.n_prompt;
  }
  return tokens >= chunk_;
}

void Scheduler::start(Sequence& s, Piece& piece) {
  s.slot = free_.back();
  free_.pop_back();
  --n_waiting_;
  n_waiting_tokens_ -= s.spec.n_prompt;
  if (s.spec.n_children > 0) ++n_parents_;
  if (s.spec.parent < 0) return;
  Sequence& parent = sequences_.at(s.spec.parent);
  piece.copy_from = parent.slot;
  --parent.children_left;
}

void Scheduler::plan_prefill(Plan& plan) {
  std::vector<int64_t> done;  // whose slots come free after this plan
  int64_t room = chunk_;
  while (room > 0) {
    if (partial_ < 0) {
      if (queue_.empty() || !startable(sequences_.at(queue_.front()))) break;
      partial_ = queue_.front();
      queue_.pop_front();
    }
    const int64_t id = partial_;
    Sequence& s = sequences_.at(id);
    Piece piece;
    piece.id = id;
    piece.begin = s.prefilled;
    if (s.slot < 0) {
      start(s, piece);
      if (s.spec.parent >= 0 && sequences_.at(s.spec.parent).children_left == 0) {
        done.push_back(s.spec.parent);
      }
    }
    piece.slot = s.slot;
    piece.n = std::min(room, s.spec.n_prompt - s.prefilled);
    room -= piece.n;
    s.prefilled += piece.n;
    piece.ends = s.prefilled == s.spec.n_prompt;
    if (piece.ends) {
      partial_ = -1;
      if (s.spec.n_children > 0) {
        queue_.insert(queue_.begin(), s.blocked.begin(), s.blocked.end());
        s.blocked.clear();
      } else if (s.spec.max_new == 0) {
        done.push_back(id);
      } else {
        piece.draws = true;
        s.planned = 1;
        if (s.spec.max_new == 1) {
          done.push_back(id);
        } else {
          decoding_.push_back(id);
        }
      }
    }
    plan.prefill.push_back(piece);
    // Children copy a state that this plan has yet to make: they start with the next.
    if (piece.ends && s.spec.n_children > 0) break;
  }
  for (const int64_t id : done) retire(id);
}

Scheduler::Plan Scheduler::next() {
  Plan plan;
  const std::vector<int64_t> decoding = decoding_;  // those that have drawn in an earlier plan
  if (worth_a_prefill()) plan_prefill(plan);

  // While the slots fill up, a step of few rows costs nearly as much as one of many: let it wait.
  const bool filling = !plan.prefill.empty() && !decoding.empty() &&
                       std::ssize(decoding) < n_slot_ / 2 && worth_a_prefill();
  if (filling && ++prefills_in_a_row_ < kMaxPrefillsInARow) return plan;
  prefills_in_a_row_ = 0;
  for (const int64_t id : decoding) {
    Sequence& s = sequences_.at(id);
    plan.decode.push_back({id, s.slot});
    if (++s.planned == s.spec.max_new) retire(id);
  }
  return plan;
}

void Scheduler::finish(int64_t id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  if (it->second.planned == 0) {
    throw Error(ErrorKind::runtime, fmt::format("sequence {} has not drawn anything yet", id));
  }
  retire(id);
}

void Scheduler::retire(int64_t id) {
  const auto it = sequences_.find(id);
  // The lowest free slot is used first, so that the order of slots does not depend on luck.
  const int32_t slot = it->second.slot;
  free_.insert(std::upper_bound(free_.begin(), free_.end(), slot, std::greater<>()), slot);
  if (it->second.spec.n_children > 0) --n_parents_;
  std::erase(decoding_, id);
  sequences_.erase(it);
}

}  // namespace krait
