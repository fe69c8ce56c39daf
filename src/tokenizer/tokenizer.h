// Text to token ids and back. A Tokenizer is immutable and may be shared between threads.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

struct EncodeOptions {
  /// Add what the tokenizer's post-processor adds (beginning / end of sequence).
  bool add_special = false;
  /// Recognise special tokens written in the text (`<|endoftext|>`). Off for untrusted text.
  bool parse_special = true;
  /// The text was rendered by a chat template: SentencePiece, which elsewhere never finds control
  /// pieces in a text, finds them here, and puts its space in front of the text's beginning only.
  bool rendered = false;
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// Number of ids: one more than the largest.
  [[nodiscard]] virtual int64_t vocab_size() const = 0;
  /// Text is UTF-8; invalid bytes are read as U+FFFD.
  [[nodiscard]] virtual std::vector<int32_t> encode(std::string_view text,
                                                    EncodeOptions = {}) const = 0;
  /// The raw bytes a token contributes at position `first ? start of text : later`: may end within
  /// a UTF-8 sequence. Special tokens give nothing unless `special`. Ids out of range give nothing.
  [[nodiscard]] virtual std::string token_bytes(int32_t id, bool first, bool special) const = 0;
  /// The whole text of `ids`; incomplete or invalid UTF-8 becomes U+FFFD.
  [[nodiscard]] virtual std::string decode(std::span<const int32_t> ids,
                                           bool special = false) const = 0;
  /// The token as it is written in the vocabulary ("Ġthe", "▁the", "<0x0A>"), for listings.
  [[nodiscard]] virtual std::string token_text(int32_t id) const = 0;
  [[nodiscard]] virtual std::optional<int32_t> token_id(std::string_view token) const = 0;
  [[nodiscard]] virtual bool is_special(int32_t id) const = 0;
  /// Ids of the beginning- and end-of-sequence tokens that the tokenizer's own files name.
  [[nodiscard]] virtual std::optional<int32_t> bos_id() const = 0;
  [[nodiscard]] virtual std::optional<int32_t> eos_id() const = 0;
  /// "bpe (tokenizer.json)", "sentencepiece unigram", ...
  [[nodiscard]] virtual std::string description() const = 0;
};

/// Opens a tokenizer.json or SentencePiece .model file, or a folder that holds tokenizer.json or
/// tokenizer.model (with tokenizer_config.json and special_tokens_map.json read where present).
/// Errors: file, format, unsupported (a component that is not built, by its name).
[[nodiscard]] std::unique_ptr<Tokenizer> open_tokenizer(const std::filesystem::path& path);
/// The file that open_tokenizer() reads: `path` itself, or what the folder holds. Error file.
[[nodiscard]] std::filesystem::path find_tokenizer_file(const std::filesystem::path& path);
/// The tokenizer file of a model's folder, if it holds one: tokenizer.json, else the
/// tokenizer.model of the highest version.
[[nodiscard]] std::optional<std::filesystem::path> tokenizer_in(
    const std::filesystem::path& folder);
[[nodiscard]] std::unique_ptr<Tokenizer> open_tokenizer_json(const std::filesystem::path& file);
[[nodiscard]] std::unique_ptr<Tokenizer> open_sentencepiece(const std::filesystem::path& file);

/// Turns a stream of tokens into text that never ends within a UTF-8 character.
class StreamDecoder {
 public:
  /// `at_start`: the first token begins the text (a SentencePiece dummy space is dropped then).
  explicit StreamDecoder(const Tokenizer& tokenizer, bool at_start = false, bool special = false)
      : tokenizer_(tokenizer), first_(at_start), special_(special) {}
  /// Text that is complete now; bytes that may still become a character are held back.
  [[nodiscard]] std::string push(int32_t id);
  /// What was held back, as U+FFFD where it is no character.
  [[nodiscard]] std::string finish();

 private:
  const Tokenizer& tokenizer_;
  std::string held_;
  bool first_;
  bool special_;
};

/// Finds stop strings in streamed text: text that might begin a stop string is held back until it
/// is decided.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops);
  /// Returns the text that may be shown. After stopped() turned true nothing more comes, and the
  /// stop string itself is not shown.
  [[nodiscard]] std::string push(std::string_view text);
  [[nodiscard]] std::string finish();
  [[nodiscard]] bool stopped() const noexcept { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace krait
