// Byte pair encoding (Sennrich et al. 2016) of one word by a ranked list of merges: the "model" of
// a tokenizer.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/json_node.h"

namespace krait {

/// (left id, right id) -> rank and id of the merged token: a flat hash table, built once.
class MergeTable {
 public:
  struct Merge {
    uint32_t rank;
    int32_t id;
  };
  static constexpr uint32_t kNoRank = UINT32_MAX;

  void reserve(size_t count);  ///< before the first insert; at most `count` inserts may follow
  void insert(int32_t left, int32_t right, Merge merge);
  /// Rank kNoRank if the pair does not merge.
  [[nodiscard]] Merge find(int32_t left, int32_t right) const;

 private:
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge{kNoRank, -1};
  };
  static constexpr uint64_t kEmpty = UINT64_MAX;  // no pair: ids are not negative
  [[nodiscard]] size_t slot_of(uint64_t key) const;
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

class Bpe {
 public:
  explicit Bpe(const JsonNode& model);
  Bpe(const Bpe&) = delete;
  Bpe& operator=(const Bpe&) = delete;

  /// Appends the ids of a word (valid UTF-8). Takes O(n log n) steps for n characters.
  void encode(std::string_view word, std::vector<int32_t>& ids) const;

  [[nodiscard]] std::optional<int32_t> token_id(std::string_view token) const;
  /// Null for an id that is not in the vocabulary.
  [[nodiscard]] const std::string* token(int32_t id) const;
  [[nodiscard]] int32_t size() const { return static_cast<int32_t>(tokens_.size()); }

 private:
  void read_vocab(const JsonNode& vocab);
  void read_merges(const JsonNode& merges);
  /// The word's characters as tokens; for one that is none its bytes, the unknown token or nothing.
  void characters(std::string_view word, std::vector<int32_t>& ids) const;
  /// token_id() with a table for single characters; -1 for none. `s` is not empty.
  [[nodiscard]] int32_t symbol(std::string_view s) const;
  void merge_short(std::vector<int32_t>& ids, size_t from) const;
  void merge_long(std::vector<int32_t>& ids, size_t from) const;

  std::vector<std::string> tokens_;  // by id; an id without a token holds an empty string
  std::unordered_map<std::string_view, int32_t> ids_;  // keys are views of tokens_
  std::vector<int32_t> ascii_and_latin_;  // ids of the characters below U+0180, -1 where none
  MergeTable merges_;
  std::string prefix_;  // continuing_subword_prefix
  std::string suffix_;  // end_of_word_suffix
  std::optional<int32_t> unk_;
  std::vector<int32_t> byte_ids_;  // <0x00>..<0xFF>, -1 where none; empty without byte_fallback
  bool fuse_unk_ = false;
  bool ignore_merges_ = false;
};

/// Remembers the ids of the words seen in one call of encode(): a text has far fewer different
/// words than words.
class WordCache {
 public:
  /// Appends the ids of `word`, from memory or from `bpe`.
  void encode(const Bpe& bpe, std::string_view word, std::vector<int32_t>& ids);

 private:
  static constexpr size_t kMaxWord = 64;        // bytes; longer words rarely come twice
  static constexpr size_t kMaxWords = 1 << 17;  // bounds memory to some 20 MB
  struct Entry {
    size_t hash = 0;
    uint32_t key = 0;     // where the word begins in keys_
    uint32_t length = 0;  // its bytes; 0: the slot is free
    uint32_t ids = 0;     // where its ids begin in ids_
    uint32_t count = 0;
  };
  [[nodiscard]] Entry& slot_of(std::string_view word, size_t hash);
  void grow();
  std::vector<Entry> table_;  // open addressing, at most half full
  size_t size_ = 0;
  std::string keys_;
  std::vector<int32_t> ids_;
};

}  // namespace krait
