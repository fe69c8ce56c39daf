#include "tokenizer/added_tokens.h"

#include <algorithm>

#include "tokenizer/unicode.h"

namespace krait {

namespace {

// Far above any vocabulary; ids index tables.
constexpr int64_t kMaxId = (1 << 24) - 1;

AddedToken read_token(const JsonNode& node) {
  return {static_cast<int32_t>(node.at("id").integer(0, kMaxId)),
          node.string("content"),
          node.boolean("single_word", false),
          node.boolean("lstrip", false),
          node.boolean("rstrip", false),
          node.boolean("normalized", true),
          node.boolean("special", false)};
}

bool ends_with_word(std::string_view text) {
  return !text.empty() &&
         unicode::is_word(unicode::next(text, unicode::previous(text, text.size())).code);
}

bool starts_with_word(std::string_view text) {
  return !text.empty() && unicode::is_word(unicode::next(text, 0).code);
}

}  // namespace

AddedTokens::AddedTokens(const JsonNode* list, const Normalizer* normalizer) {
  if (list == nullptr) return;
  for (size_t i = 0; i < list->array_size(); ++i) {
    AddedToken token = read_token(list->item(i));
    if (!token.content.empty()) tokens_.insert_or_assign(token.id, std::move(token));
  }
  // Where two tokens read the same, a special one wins, then the lower id.
  for (const bool special : {true, false}) {
    for (const auto& [id, token] : tokens_) {
      if (token.special != special) continue;
      if (!token.normalized) {
        raw_.insert(token.content, &token);
      } else {
        normalized_.insert(normalizer ? normalizer->normalize(token.content) : token.content,
                           &token);
      }
    }
  }
}

void AddedTokens::Trie::insert(std::string_view text, const AddedToken* token) {
  if (text.empty()) return;
  if (root_.empty()) root_.assign(256, -1);
  const auto add = [&](char byte, int32_t sibling) {
    nodes_.push_back({byte, -1, sibling, nullptr});
    return static_cast<int32_t>(nodes_.size() - 1);
  };
  int32_t& first = root_[static_cast<unsigned char>(text[0])];
  if (first < 0) first = add(text[0], -1);
  int32_t node = first;
  for (const char byte : text.substr(1)) {
    int32_t next = child(node, byte);
    if (next < 0) {
      next = add(byte, nodes_[static_cast<size_t>(node)].child);
      nodes_[static_cast<size_t>(node)].child = next;
    }
    node = next;
  }
  Node& last = nodes_[static_cast<size_t>(node)];
  if (last.token == nullptr) last.token = token;
}

int32_t AddedTokens::Trie::child(int32_t node, char byte) const {
  int32_t c = nodes_[static_cast<size_t>(node)].child;
  while (c >= 0 && nodes_[static_cast<size_t>(c)].byte != byte) {
    c = nodes_[static_cast<size_t>(c)].sibling;
  }
  return c;
}

std::pair<const AddedToken*, size_t> AddedTokens::Trie::longest(std::string_view text, size_t pos,
                                                                bool special) const {
  std::pair<const AddedToken*, size_t> best{nullptr, 0};
  if (!begins(text[pos])) return best;
  int32_t node = root_[static_cast<unsigned char>(text[pos])];
  for (size_t i = pos + 1; node >= 0; ++i) {
    const AddedToken* token = nodes_[static_cast<size_t>(node)].token;
    if (token != nullptr && (special || !token->special)) best = {token, i - pos};
    if (i >= text.size()) break;
    node = child(node, text[i]);
  }
  return best;
}

std::vector<Section> AddedTokens::split(std::string_view text, bool normalized,
                                        bool special) const {
  const Trie& trie = normalized ? normalized_ : raw_;
  std::vector<Section> sections;
  size_t done = 0;  // everything before is in a section
  for (size_t pos = 0; pos < text.size();) {
    if (!trie.begins(text[pos])) {
      ++pos;
      continue;
    }
    const auto [token, length] = trie.longest(text, pos, special);
    if (token == nullptr) {
      ++pos;
      continue;
    }
    size_t begin = pos;
    size_t end = pos + length;
    pos = end;  // also behind a match that is discarded, as the reference does
    if (token->single_word &&
        (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end)))) {
      continue;
    }
    if (token->lstrip) {
      while (begin > done) {
        const size_t before = unicode::previous(text, begin);
        if (!unicode::is_white_space(unicode::next(text, before).code)) break;
        begin = before;
      }
      // What the token before has taken along is gone, and with it this token if that is all.
      begin = std::max(begin, done);
      if (begin >= end) continue;
    }
    if (token->rstrip) {
      while (end < text.size()) {
        const unicode::Char c = unicode::next(text, end);
        if (!unicode::is_white_space(c.code)) break;
        end += c.length;
      }
    }
    if (begin > done) sections.push_back({text.substr(done, begin - done), std::nullopt});
    sections.push_back({text.substr(begin, end - begin), token->id});
    done = end;
  }
  if (done < text.size()) sections.push_back({text.substr(done), std::nullopt});
  return sections;
}

const AddedToken* AddedTokens::find(int32_t id) const {
  const auto it = tokens_.find(id);
  return it == tokens_.end() ? nullptr : &it->second;
}

const AddedToken* AddedTokens::find(std::string_view content) const {
  const auto it = std::find_if(tokens_.begin(), tokens_.end(),
                               [&](const auto& entry) { return entry.second.content == content; });
  return it == tokens_.end() ? nullptr : &it->second;
}

int32_t AddedTokens::largest_id() const { return tokens_.empty() ? -1 : tokens_.rbegin()->first; }

}  // namespace krait
