// The parts of a SentencePiece .model file (a protocol buffer, sentencepiece_model.proto) that
// krait reads by itself, and the checks that the file must pass before the library may see it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

struct SentencePieceModel {
  enum class Type { normal = 1, unknown, control, user_defined, unused, byte };
  enum class Algorithm { unigram = 1, bpe, word, character };
  struct Piece {
    std::string text;
    float score = 0;
    Type type = Type::normal;
  };
  std::vector<Piece> pieces;  ///< index = id
  Algorithm algorithm = Algorithm::unigram;
  int64_t unknown_id = 0, bos_id = 1, eos_id = 2, padding_id = -1;  ///< -1: none
  std::string charsmap;  ///< table of the normaliser; empty: it changes nothing
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  std::string unknown_surface = " \u2047 ";  ///< what an unknown token decodes to
};

/// `bytes` is the file; `name` stands in front of messages. Error of kind format if the file is no
/// such model, is damaged, or holds what would lead the library out of its tables.
[[nodiscard]] SentencePieceModel read_sentencepiece_model(std::string_view bytes,
                                                          const std::string& name);

}  // namespace krait
