#include "tokenizer/sentencepiece_model.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace krait {

namespace {

[[noreturn]] void fail(const std::string& name, const std::string& what) {
  throw Error(ErrorKind::format, fmt::format("{} is not a SentencePiece model: {}", name, what),
              "The file may be cut short, or a pointer file of a large-file store.");
}

/// Reads the fields of one message: https://protobuf.dev/programming-guides/encoding/
class Message {
 public:
  Message(std::string_view bytes, const std::string& name) : bytes_(bytes), name_(name) {}

  /// Moves to the next field; false at the end.
  bool next() {
    if (pos_ == bytes_.size()) return false;
    const uint64_t key = varint();
    number_ = key >> 3;
    wire_ = key & 7;
    if (number_ == 0) fail(name_, "a field has the number 0");
    switch (wire_) {
      case 0:
        value_ = varint();
        break;
      case 1:
        data_ = take(8);
        break;
      case 2:
        data_ = take(varint());
        break;
      case 5:
        data_ = take(4);
        break;
      default:
        fail(name_, fmt::format("a field has the unknown wire type {}", wire_));
    }
    return true;
  }

  [[nodiscard]] uint64_t number() const { return number_; }

  [[nodiscard]] std::string_view text() const {
    expect(2);
    return data_;
  }
  [[nodiscard]] uint64_t integer() const {
    expect(0);
    return value_;
  }
  [[nodiscard]] float real() const {
    expect(5);
    uint32_t bits = 0;
    for (size_t i = 4; i-- > 0;) bits = bits << 8 | static_cast<uint8_t>(data_[i]);
    return std::bit_cast<float>(bits);
  }

 private:
  void expect(uint64_t wire) const {
    if (wire_ != wire) {
      fail(name_, fmt::format("field {} has wire type {}, expected {}", number_, wire_, wire));
    }
  }

  uint64_t varint() {
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto b = static_cast<uint8_t>(take(1)[0]);
      v |= uint64_t{b & 0x7FU} << shift;
      if (b < 0x80) return v;
    }
    fail(name_, "a number has more than 64 bits");
  }

  std::string_view take(uint64_t n) {
    if (n > bytes_.size() - pos_) {
      fail(name_, fmt::format("a field of {} bytes begins {} bytes before the end of its message",
                              n, bytes_.size() - pos_));
    }
    const std::string_view part = bytes_.substr(pos_, n);
    pos_ += n;
    return part;
  }

  std::string_view bytes_;
  const std::string& name_;
  size_t pos_ = 0;
  uint64_t number_ = 0;
  uint64_t wire_ = 0;
  uint64_t value_ = 0;
  std::string_view data_;
};

uint64_t in_range(uint64_t v, uint64_t low, uint64_t high, std::string_view what,
                  const std::string& name) {
  if (v < low || v > high) fail(name, fmt::format("{} {} is unknown", what, v));
  return v;
}

SentencePieceModel::Piece read_piece(std::string_view bytes, const std::string& name) {
  SentencePieceModel::Piece piece;
  for (Message m(bytes, name); m.next();) {
    if (m.number() == 1) piece.text = m.text();
    if (m.number() == 2) piece.score = m.real();
    if (m.number() == 3) {
      piece.type = static_cast<SentencePieceModel::Type>(
          in_range(m.integer(), 1, 6, "the piece type", name));
    }
  }
  if (piece.text.empty()) fail(name, "a piece is empty");
  // The library's tries take pieces for C strings and order them by score.
  if (piece.text.find('\0') != std::string::npos) fail(name, "a piece holds the character U+0000");
  if (!std::isfinite(piece.score)) fail(name, "a piece has a score that is not a finite number");
  return piece;
}

uint32_t little_endian(std::string_view bytes, size_t at) {
  uint32_t v = 0;
  for (size_t i = 4; i-- > 0;) v = v << 8 | static_cast<uint8_t>(bytes[at + i]);
  return v;
}

// precompiled_charsmap: u32 size, a trie of that size, then the replacements as C strings. The trie
// is a double array (Yata 2007) as darts-clone lays it out: u32 units with
//   bit 31      this unit is a value (bits 0-30), reached by byte 0 of its parent
//   bits 10-30  offset, shifted left by 8 more if bit 9 is set
//   bit 8       the unit has a value;  bits 0-7  the byte that leads here
// The children of unit p are units p ^ offset ^ byte. The library follows them without a look at
// the size of the array, so every unit must keep all its possible children inside.
void check_charsmap(std::string_view bytes, const std::string& name) {
  if (bytes.empty()) return;
  const auto bad = [&](const std::string& what) {
    fail(name, "its table of character replacements " + what);
  };
  if (bytes.size() <= 4) bad("is cut short");
  const size_t trie_size = little_endian(bytes, 0);
  if (trie_size >= bytes.size() - 4 || trie_size % 4 != 0 || trie_size == 0) {
    bad(fmt::format("has {} bytes, its trie alone {}", bytes.size(), trie_size));
  }
  const std::string_view trie = bytes.substr(4, trie_size);
  const std::string_view replacements = bytes.substr(4 + trie_size);
  if (replacements.back() != '\0') bad("does not end with a zero byte");

  const size_t n = trie.size() / 4;
  for (size_t p = 0; p < n; ++p) {
    const uint32_t unit = little_endian(trie, 4 * p);
    if (p != 0 && (unit >> 31) != 0) continue;  // no label matches it; the root is never matched
    const size_t offset = size_t{unit >> 10} << ((unit & (1U << 9)) >> 6);
    const size_t children = p ^ offset;
    if ((children | 0xFF) >= n) bad("points outside of itself");
    const bool has_value = (unit >> 8 & 1) != 0;
    const uint32_t value = little_endian(trie, 4 * children) & 0x7FFFFFFF;
    if (has_value && value >= replacements.size()) bad("points outside of itself");
  }
}

void read_trainer(std::string_view bytes, SentencePieceModel& model, const std::string& name) {
  for (Message m(bytes, name); m.next();) {
    if (m.number() == 3) {
      model.algorithm = static_cast<SentencePieceModel::Algorithm>(
          in_range(m.integer(), 1, 4, "the model type", name));
    }
    if (m.number() == 40) model.unknown_id = static_cast<int32_t>(m.integer());
    if (m.number() == 41) model.bos_id = static_cast<int32_t>(m.integer());
    if (m.number() == 42) model.eos_id = static_cast<int32_t>(m.integer());
    if (m.number() == 43) model.padding_id = static_cast<int32_t>(m.integer());
    if (m.number() == 44) model.unknown_surface = m.text();
  }
}

void read_normalizer(std::string_view bytes, SentencePieceModel& model, const std::string& name) {
  for (Message m(bytes, name); m.next();) {
    if (m.number() == 2) {
      check_charsmap(m.text(), name);
      model.charsmap = m.text();
    }
    if (m.number() == 3) model.add_dummy_prefix = m.integer() != 0;
    if (m.number() == 4) model.remove_extra_whitespaces = m.integer() != 0;
  }
}

}  // namespace

SentencePieceModel read_sentencepiece_model(std::string_view bytes, const std::string& name) {
  SentencePieceModel model;
  for (Message m(bytes, name); m.next();) {
    if (m.number() == 1) model.pieces.push_back(read_piece(m.text(), name));
    if (m.number() == 2) read_trainer(m.text(), model, name);
    if (m.number() == 3) read_normalizer(m.text(), model, name);
    if (m.number() == 5) {  // the denormalizer is of the same type; the library loads it too
      SentencePieceModel unused;
      read_normalizer(m.text(), unused, name);
    }
  }
  if (model.pieces.empty()) fail(name, "it has no pieces");
  return model;
}

}  // namespace krait
