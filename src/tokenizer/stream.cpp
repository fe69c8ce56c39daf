#include "tokenizer/stream.h"

#include <algorithm>
#include <utility>

#include "tokenizer/unicode.h"

namespace krait {

std::string StreamDecoder::push(int32_t id) {
  // Tokens that are not shown leave the next one at the start of the text.
  const bool shown =
      id >= 0 && id < tokenizer_.vocab_size() && (special_ || !tokenizer_.is_special(id));
  if (!shown) return {};
  held_ += tokenizer_.token_bytes(id, first_, special_);
  first_ = false;
  return unicode::take_valid(held_, false);
}

std::string StreamDecoder::finish() { return unicode::take_valid(held_, true); }

std::string decode_by_stream(const Tokenizer& tokenizer, std::span<const int32_t> ids,
                             bool special) {
  StreamDecoder decoder(tokenizer, true, special);
  std::string text;
  for (const int32_t id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase(stops_, "");  // would stop before any text
}

std::string StopMatcher::push(std::string_view text) {
  if (stopped_) return {};
  held_ += text;

  // The stop string that is complete first wins, and of two that end together the longer: so the
  // result does not depend on how the text is cut into pieces.
  size_t end = std::string::npos;
  size_t begin = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at == std::string::npos) continue;
    if (at + stop.size() < end || (at + stop.size() == end && at < begin)) {
      begin = at;
      end = at + stop.size();
    }
  }
  if (begin != std::string::npos) {
    stopped_ = true;
    std::string shown = held_.substr(0, begin);
    held_.clear();
    return shown;
  }

  // Hold back the longest end of the text that begins a stop string.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    const std::string_view view = held_;
    for (size_t n = std::min(stop.size() - 1, view.size()); n > keep; --n) {
      if (view.ends_with(std::string_view(stop).substr(0, n))) keep = n;
    }
  }
  std::string shown = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return shown;
}

std::string StopMatcher::finish() { return std::exchange(held_, {}); }

}  // namespace krait
