#include "tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <queue>

#include "base/error.h"
#include "base/log.h"
#include "tokenizer/unicode.h"

namespace krait {

namespace {

// Covers the whole byte-level alphabet, whose last character is U+0143.
constexpr char32_t kDirect = 0x180;

// Up to this many symbols the plain quadratic loop beats the heap.
constexpr size_t kShortWord = 32;

}  // namespace

void MergeTable::reserve(size_t count) {
  // At most half full, so that probes stay short.
  slots_.assign(std::bit_ceil(2 * count + 2), Slot{});
  mask_ = slots_.size() - 1;
}

size_t MergeTable::slot_of(uint64_t key) const {
  // Fibonacci hashing; the high bits of the product are the good ones.
  size_t i = ((key ^ key >> 32) * 0x9E3779B97F4A7C15U >> 20) & mask_;
  while (slots_[i].key != key && slots_[i].key != kEmpty) i = (i + 1) & mask_;
  return i;
}

void MergeTable::insert(int32_t left, int32_t right, Merge merge) {
  const uint64_t key = uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  slots_[slot_of(key)] = {key, merge};  // a pair listed twice keeps its last rank
}

MergeTable::Merge MergeTable::find(int32_t left, int32_t right) const {
  const uint64_t key = uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  return slots_[slot_of(key)].merge;
}

Bpe::Bpe(const JsonNode& model) {
  // Files older than the "type" key hold BPE if they have merges.
  const std::string type = model.optional_string("type").value_or(
      model.has("merges") ? "BPE" : "without type and merges");
  if (type != "BPE") model.unsupported(fmt::format("the model {} is not built", type));
  if (model.has("dropout") && model.at("dropout").value() != 0) {
    spdlog::warn("{}: dropout is for training and is not applied", model.where());
  }
  prefix_ = model.optional_string("continuing_subword_prefix").value_or("");
  suffix_ = model.optional_string("end_of_word_suffix").value_or("");
  fuse_unk_ = model.boolean("fuse_unk", false);
  ignore_merges_ = model.boolean("ignore_merges", false);

  read_vocab(model.at("vocab"));
  read_merges(model.at("merges"));

  if (const auto unk = model.optional_string("unk_token")) {
    unk_ = token_id(*unk);
    if (!unk_) model.fail(fmt::format("the unk_token {} is not in the vocabulary", *unk));
  }
  if (model.boolean("byte_fallback", false)) {
    for (int b = 0; b < 256; ++b) {
      byte_ids_.push_back(token_id(fmt::format("<0x{:02X}>", b)).value_or(-1));
    }
  }
  ascii_and_latin_.resize(kDirect);
  for (char32_t c = 0; c < kDirect; ++c) {
    std::string s;
    unicode::append(s, c);
    ascii_and_latin_[c] = token_id(s).value_or(-1);
  }
}

void Bpe::read_vocab(const JsonNode& vocab) {
  vocab.expect_object();
  const size_t count = vocab.value().size();
  // Ids are nearly dense; a stray large one must not allocate a table of its size.
  const auto limit = static_cast<int64_t>(2 * count + 65536);
  ids_.reserve(count);
  for (const auto& [token, id] : vocab.value().items()) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= limit) {
      vocab.fail(fmt::format("the id of token \"{}\" should be a number from 0 to {}, found {}",
                             token, limit - 1, id.dump()));
    }
    const auto index = id.get<size_t>();
    if (index >= tokens_.size()) tokens_.resize(index + 1);
    tokens_[index] = token;
  }
  // Only now do the strings stay where they are.
  for (size_t id = 0; id < tokens_.size(); ++id) {
    if (!tokens_[id].empty()) ids_.emplace(tokens_[id], static_cast<int32_t>(id));
  }
}

void Bpe::read_merges(const JsonNode& merges) {
  const size_t count = merges.array_size();
  merges_.reserve(count);
  uint32_t rank = 0;
  std::string merged;
  for (size_t i = 0; i < count; ++i) {
    const nlohmann::json& m = merges.value()[i];
    std::string_view left;
    std::string_view right;
    if (m.is_string()) {  // "a b"
      const std::string_view text = m.get_ref<const std::string&>();
      if (text.starts_with("#version")) continue;
      const size_t space = text.find(' ');
      if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
        merges.item(i).fail(
            fmt::format("expected two tokens with a space between, found \"{}\"", text));
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string()) {
      left = m[0].get_ref<const std::string&>();
      right = m[1].get_ref<const std::string&>();
    } else {
      merges.item(i).fail(R"(expected "a b" or ["a", "b"], found )" + m.dump());
    }
    if (right.size() < prefix_.size()) {
      merges.item(i).fail("the second token is shorter than the continuing_subword_prefix");
    }
    merged = left;
    merged += right.substr(prefix_.size());
    const auto a = token_id(left);
    const auto b = token_id(right);
    const auto ab = token_id(merged);
    if (!a || !b || !ab) {
      merges.item(i).fail(fmt::format("the token \"{}\" is not in the vocabulary",
                                      !a   ? left
                                      : !b ? right
                                           : std::string_view(merged)));
    }
    merges_.insert(*a, *b, {rank++, *ab});
  }
}

std::optional<int32_t> Bpe::token_id(std::string_view token) const {
  const auto it = ids_.find(token);
  if (it == ids_.end()) return std::nullopt;
  return it->second;
}

const std::string* Bpe::token(int32_t id) const {
  if (id < 0 || id >= size() || tokens_[static_cast<size_t>(id)].empty()) return nullptr;
  return &tokens_[static_cast<size_t>(id)];
}

int32_t Bpe::symbol(std::string_view s) const {
  const unicode::Char c = unicode::next(s, 0);
  return c.length == s.size() && c.code < kDirect ? ascii_and_latin_[c.code]
                                                  : token_id(s).value_or(-1);
}

void Bpe::characters(std::string_view word, std::vector<int32_t>& ids) const {
  bool unknown = false;  // an unknown stretch is open: its token is due
  const auto close = [&] {
    if (unknown) ids.push_back(*unk_);
    unknown = false;
  };
  const bool plain = prefix_.empty() && suffix_.empty();
  std::string decorated;
  for (size_t pos = 0; pos < word.size();) {
    std::string_view c = word.substr(pos, unicode::next(word, pos).length);
    const bool first = pos == 0;
    pos += c.size();
    if (!plain) {
      decorated = first ? "" : prefix_;
      decorated += c;
      if (pos == word.size()) decorated += suffix_;
      c = decorated;
    }
    const int32_t id = symbol(c);
    if (id >= 0) {
      close();
      ids.push_back(id);
      continue;
    }
    const auto byte_id = [&](char b) { return byte_ids_[static_cast<unsigned char>(b)]; };
    if (!byte_ids_.empty() &&
        std::all_of(c.begin(), c.end(), [&](char b) { return byte_id(b) >= 0; })) {
      close();
      for (const char b : c) ids.push_back(byte_id(b));
      continue;
    }
    if (!unk_) continue;  // dropped
    if (!fuse_unk_) close();
    unknown = true;
  }
  close();
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto id = token_id(word)) {
      ids.push_back(*id);
      return;
    }
  }
  const size_t from = ids.size();
  characters(word, ids);
  if (ids.size() - from <= kShortWord) {
    merge_short(ids, from);
  } else {
    merge_long(ids, from);
  }
}

// Repeat: of the adjacent pairs that merge take the one of lowest rank, the leftmost on a tie.
void Bpe::merge_short(std::vector<int32_t>& ids, size_t from) const {
  const size_t n = ids.size() - from;
  if (n < 2) return;
  int32_t* const s = ids.data() + from;
  MergeTable::Merge pair[kShortWord];  // pair[i] merges s[i] and s[i + 1]
  for (size_t i = 0; i + 1 < n; ++i) pair[i] = merges_.find(s[i], s[i + 1]);
  size_t pairs = n - 1;
  while (pairs > 0) {
    const auto* best = std::min_element(
        pair, pair + pairs, [](const auto& a, const auto& b) { return a.rank < b.rank; });
    if (best->rank == MergeTable::kNoRank) break;
    const auto i = static_cast<size_t>(best - pair);
    s[i] = best->id;
    std::copy(s + i + 2, s + pairs + 1, s + i + 1);
    std::copy(pair + i + 1, pair + pairs, pair + i);
    --pairs;
    if (i > 0) pair[i - 1] = merges_.find(s[i - 1], s[i]);
    if (i < pairs) pair[i] = merges_.find(s[i], s[i + 1]);
  }
  ids.resize(from + pairs + 1);
}

// The same with a heap of candidates over a linked list. A candidate is (rank, position) in one
// number; it is stale, and skipped, if the pair that now stands there has another rank.
void Bpe::merge_long(std::vector<int32_t>& ids, size_t from) const {
  struct Symbol {
    int32_t id;  // -1: merged into the symbol before it
    uint32_t previous;
    uint32_t next;
  };
  constexpr uint32_t kEnd = UINT32_MAX;
  const size_t n = ids.size() - from;
  if (n >= kEnd) throw Error(ErrorKind::usage, "a word of more than 4 GiB cannot be encoded");
  std::vector<Symbol> symbols(n);
  for (size_t i = 0; i < n; ++i) {
    symbols[i] = {ids[from + i], static_cast<uint32_t>(i) - 1,
                  i + 1 < n ? static_cast<uint32_t>(i) + 1 : kEnd};
  }
  symbols[0].previous = kEnd;

  const auto merge_at = [&](uint32_t i) -> MergeTable::Merge {
    if (i == kEnd || symbols[i].id < 0 || symbols[i].next == kEnd) return {MergeTable::kNoRank, -1};
    return merges_.find(symbols[i].id, symbols[symbols[i].next].id);
  };
  const auto key = [](uint32_t rank, uint32_t i) { return uint64_t{rank} << 32 | i; };
  std::vector<uint64_t> first;
  for (uint32_t i = 0; i + 1 < n; ++i) {
    const uint32_t rank = merge_at(i).rank;
    if (rank != MergeTable::kNoRank) first.push_back(key(rank, i));
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap(std::greater<>{},
                                                                            std::move(first));
  while (!heap.empty()) {
    const auto rank = static_cast<uint32_t>(heap.top() >> 32);
    const auto i = static_cast<uint32_t>(heap.top());
    heap.pop();
    const MergeTable::Merge merge = merge_at(i);
    if (merge.rank != rank) continue;
    Symbol& left = symbols[i];
    Symbol& right = symbols[left.next];
    left.id = merge.id;
    left.next = right.next;
    right.id = -1;
    if (left.next != kEnd) symbols[left.next].previous = i;
    for (const uint32_t j : {left.previous, i}) {
      const uint32_t r = merge_at(j).rank;
      if (r != MergeTable::kNoRank) heap.push(key(r, j));
    }
  }
  ids.resize(from);
  for (uint32_t i = 0; i != kEnd; i = symbols[i].next) ids.push_back(symbols[i].id);
}

WordCache::Entry& WordCache::slot_of(std::string_view word, size_t hash) {
  const size_t mask = table_.size() - 1;
  size_t i = hash & mask;
  while (table_[i].length != 0 &&
         !(table_[i].hash == hash &&
           word == std::string_view(keys_).substr(table_[i].key, table_[i].length))) {
    i = (i + 1) & mask;
  }
  return table_[i];
}

void WordCache::grow() {
  std::vector<Entry> old(std::max<size_t>(64, 4 * table_.size()));
  old.swap(table_);
  for (const Entry& e : old) {
    if (e.length != 0) slot_of(std::string_view(keys_).substr(e.key, e.length), e.hash) = e;
  }
}

void WordCache::encode(const Bpe& bpe, std::string_view word, std::vector<int32_t>& ids) {
  if (word.empty() || word.size() > kMaxWord) return bpe.encode(word, ids);
  if (2 * size_ >= table_.size() && size_ < kMaxWords) grow();
  const size_t hash = std::hash<std::string_view>{}(word);
  Entry& entry = slot_of(word, hash);
  if (entry.length != 0) {
    const auto begin = ids_.begin() + entry.ids;
    ids.insert(ids.end(), begin, begin + entry.count);
    return;
  }
  const size_t from = ids.size();
  bpe.encode(word, ids);
  if (size_ >= kMaxWords) return;
  entry = {hash, static_cast<uint32_t>(keys_.size()), static_cast<uint32_t>(word.size()),
           static_cast<uint32_t>(ids_.size()), static_cast<uint32_t>(ids.size() - from)};
  keys_ += word;
  ids_.insert(ids_.end(), ids.begin() + static_cast<ptrdiff_t>(from), ids.end());
  ++size_;
}

}  // namespace krait
