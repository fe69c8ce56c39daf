#include "tokenizer/sentencepiece.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "tokenizer/sentencepiece_model.h"
#include "tokenizer/stream.h"
#include "tokenizer/unicode.h"

// Exported by the library, declared in no installed header.
namespace sentencepiece::logging {
void SetMinLogLevel(int level);  // NOLINT(readability-identifier-naming): the library's name
}

namespace krait {

namespace {

using Type = SentencePieceModel::Type;

constexpr std::string_view kSpace = "\u2581";  // ▁

std::string_view algorithm_name(SentencePieceModel::Algorithm a) {
  switch (a) {
    case SentencePieceModel::Algorithm::unigram:
      return "unigram";
    case SentencePieceModel::Algorithm::bpe:
      return "bpe";
    case SentencePieceModel::Algorithm::word:
      return "word";
    case SentencePieceModel::Algorithm::character:
      return "character";
  }
  return "";
}

std::string with_spaces(std::string_view piece) {
  std::string out;
  for (size_t at = 0; at < piece.size();) {
    if (piece.substr(at).starts_with(kSpace)) {
      out += ' ';
      at += kSpace.size();
    } else {
      out += piece[at++];
    }
  }
  return out;
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view bytes, const std::string& name, const SpecialNames& names)
      : model_(read_sentencepiece_model(bytes, name)) {
    constexpr int kFatal = 3;  // an error is reported by us, and once
    sentencepiece::logging::SetMinLogLevel(kFatal);
    std::string problem;
    try {
      const auto status = processor_.LoadFromSerializedProto({bytes.data(), bytes.size()});
      if (!status.ok()) problem = status.ToString();
    } catch (const std::exception& e) {  // from its tries
      problem = e.what();
    }
    if (!problem.empty()) {
      throw Error(ErrorKind::format,
                  fmt::format("{} is not a SentencePiece model: {}", name, problem));
    }

    for (size_t id = 0; id < model_.pieces.size(); ++id) {
      const auto& piece = model_.pieces[id];
      ids_.emplace(piece.text, static_cast<int32_t>(id));
      if (piece.type == Type::control) {
        control_starts_[static_cast<unsigned char>(piece.text[0])] = true;
        longest_control_ = std::max(longest_control_, piece.text.size());
      }
    }
    bos_ = known(names.bos, processor_.bos_id());
    eos_ = known(names.eos, processor_.eos_id());
    // Models of this kind are run with a beginning-of-sequence token unless their files say no.
    add_bos_ = bos_ && names.add_bos.value_or(true);
    add_eos_ = eos_ && names.add_eos.value_or(false);
  }

  [[nodiscard]] int64_t vocab_size() const override {
    return static_cast<int64_t>(model_.pieces.size());
  }

  // Pieces of type control never match text and user-defined ones always do, whatever
  // parse_special says: so the library works.
  [[nodiscard]] std::vector<int32_t> encode(std::string_view text,
                                            EncodeOptions options) const override {
    std::string repaired;
    if (!unicode::is_valid(text)) text = repaired = unicode::to_valid(text);
    std::vector<int> ids;
    if (options.rendered) {
      encode_rendered(text, ids);
    } else {
      encode_plain(processor_, text, ids);
    }
    if (options.add_special && add_bos_) ids.insert(ids.begin(), *bos_);
    if (options.add_special && add_eos_) ids.push_back(*eos_);
    return ids;
  }

  [[nodiscard]] std::string token_bytes(int32_t id, bool first, bool special) const override {
    const SentencePieceModel::Piece* piece = find(id);
    if (piece == nullptr) return {};
    std::string_view text = piece->text;
    switch (piece->type) {
      case Type::control:
        return special ? std::string(text) : std::string();
      case Type::unknown:
        return model_.unknown_surface;
      case Type::byte:  // <0xHH>, which the library has checked
        return {static_cast<char>(std::stoi(std::string(text.substr(3, 2)), nullptr, 16))};
      case Type::normal:
      case Type::user_defined:
      case Type::unused:
        break;
    }
    // The space that encoding put in front of the text.
    const bool has_prefix = model_.add_dummy_prefix || model_.remove_extra_whitespaces;
    if (first && has_prefix && text.starts_with(kSpace)) text.remove_prefix(kSpace.size());
    return with_spaces(text);
  }

  [[nodiscard]] std::string decode(std::span<const int32_t> ids, bool special) const override {
    return decode_by_stream(*this, ids, special);
  }

  [[nodiscard]] std::string token_text(int32_t id) const override {
    const SentencePieceModel::Piece* piece = find(id);
    return piece == nullptr ? std::string() : piece->text;
  }

  [[nodiscard]] std::optional<int32_t> token_id(std::string_view token) const override {
    const auto it = ids_.find(token);
    if (it == ids_.end()) return std::nullopt;
    return it->second;
  }

  [[nodiscard]] bool is_special(int32_t id) const override {
    const SentencePieceModel::Piece* piece = find(id);
    return piece != nullptr && piece->type == Type::control;
  }

  [[nodiscard]] std::optional<int32_t> bos_id() const override { return bos_; }
  [[nodiscard]] std::optional<int32_t> eos_id() const override { return eos_; }

  [[nodiscard]] std::string description() const override {
    return fmt::format("sentencepiece {}", algorithm_name(model_.algorithm));
  }

 private:
  using Processor = sentencepiece::SentencePieceProcessor;

  static void encode_plain(const Processor& processor, std::string_view text,
                           std::vector<int>& ids) {
    std::vector<int> more;
    const auto status = processor.Encode({text.data(), text.size()}, &more);
    if (!status.ok()) {
      throw Error(ErrorKind::runtime, "the text cannot be encoded: " + status.ToString());
    }
    ids.insert(ids.end(), more.begin(), more.end());
  }

  /// Cuts the text at control pieces. What stands between two of them is no beginning of a text, so
  /// it gets no space in front.
  void encode_rendered(std::string_view text, std::vector<int>& ids) const {
    std::call_once(bare_once_, [this] {
      // A field that comes twice is merged: this overrides normalizer_spec.add_dummy_prefix.
      constexpr std::string_view kNoDummyPrefix("\x1a\x02\x18\x00", 4);
      const std::string model = processor_.serialized_model_proto().append(kNoDummyPrefix);
      const auto status = bare_.LoadFromSerializedProto({model.data(), model.size()});
      if (!status.ok()) throw Error(ErrorKind::runtime, "internal error: " + status.ToString());
    });
    size_t begin = 0;
    const auto flush = [&](size_t end) {
      if (end > begin) {
        encode_plain(begin == 0 ? processor_ : bare_, text.substr(begin, end - begin), ids);
      }
    };
    for (size_t at = 0; at < text.size();) {
      const std::optional<int32_t> control = control_at(text.substr(at, longest_control_));
      if (!control) {
        ++at;
        continue;
      }
      flush(at);
      ids.push_back(*control);
      at += model_.pieces[static_cast<size_t>(*control)].text.size();
      begin = at;
    }
    flush(text.size());
  }

  /// The longest control piece that `text` begins with.
  [[nodiscard]] std::optional<int32_t> control_at(std::string_view text) const {
    if (!control_starts_[static_cast<unsigned char>(text[0])]) return std::nullopt;
    for (; !text.empty(); text.remove_suffix(1)) {
      const auto id = token_id(text);
      if (id && is_special(*id)) return id;
    }
    return std::nullopt;
  }

  [[nodiscard]] const SentencePieceModel::Piece* find(int32_t id) const {
    if (id < 0 || id >= vocab_size()) return nullptr;
    return &model_.pieces[static_cast<size_t>(id)];
  }

  /// The token the side files name, else the model's own (-1: none).
  [[nodiscard]] std::optional<int32_t> known(const std::optional<std::string>& named,
                                             int own) const {
    if (named) {
      if (const auto id = token_id(*named)) return id;
    }
    return own >= 0 ? std::optional<int32_t>(own) : std::nullopt;
  }

  SentencePieceModel model_;
  Processor processor_;
  mutable std::once_flag bare_once_;
  mutable Processor bare_;  ///< without the dummy prefix; made when first needed
  std::array<bool, 256> control_starts_{};
  size_t longest_control_ = 1;
  std::unordered_map<std::string_view, int32_t> ids_;  // keys are views of model_.pieces
  std::optional<int32_t> bos_;
  std::optional<int32_t> eos_;
  bool add_bos_ = false;
  bool add_eos_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> parse_sentencepiece(std::string_view bytes, const std::string& name,
                                               const SpecialNames& names) {
  return std::make_unique<SentencePieceTokenizer>(bytes, name, names);
}

}  // namespace krait
