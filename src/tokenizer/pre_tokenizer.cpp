#include "tokenizer/pre_tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <utility>

#include "tokenizer/byte_level.h"
#include "tokenizer/pattern.h"
#include "tokenizer/unicode.h"

namespace krait {

Words::Words(std::string section, bool starts_text)
    : text(std::move(section)), at_start(starts_text) {
  if (!text.empty()) spans.push_back({0, text.size()});
}

namespace {

/// What becomes of the text a delimiter matched.
enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behavior behavior_of(const JsonNode& node) {
  static constexpr std::array<std::string_view, 5> kNames{
      "Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
  const std::string name = node.string();
  const auto* const it = std::find(kNames.begin(), kNames.end(), name);
  if (it == kNames.end()) node.unsupported(fmt::format("the behaviour {} is not built", name));
  return static_cast<Behavior>(it - kNames.begin());
}

/// A stretch of a word: a delimiter or what lies between two.
struct Part {
  size_t begin;
  size_t end;
  bool is_match;
};

/// Matches and the stretches between them, covering `size` bytes; `invert` swaps the two.
std::vector<Part> cover(const std::vector<Match>& matches, size_t size, bool invert) {
  std::vector<Part> parts;
  size_t done = 0;
  for (const Match& m : matches) {
    if (m.begin > done) parts.push_back({done, m.begin, invert});
    parts.push_back({m.begin, m.end, !invert});
    done = m.end;
  }
  if (size > done) parts.push_back({done, size, invert});
  return parts;
}

/// Appends the words that `parts` leave under a behaviour, moved by `base`. "a--b" with delimiter
/// "-": Removed a b; Isolated a - - b; MergedWithPrevious a- - b; MergedWithNext a - -b;
/// Contiguous a -- b.
void emit(std::vector<Part> parts, Behavior behavior, size_t base,
          std::vector<Words::Span>& spans) {
  const auto put = [&](const Part& p) {
    if (p.end > p.begin) spans.push_back({base + p.begin, base + p.end});
  };
  if (behavior == Behavior::removed || behavior == Behavior::isolated) {
    for (const Part& p : parts) {
      if (behavior == Behavior::isolated || !p.is_match) put(p);
    }
    return;
  }
  // Joining is the same from either side: a part is glued to the one before it in walking order.
  const bool backwards = behavior == Behavior::merged_with_next;
  if (backwards) std::reverse(parts.begin(), parts.end());
  std::vector<Part> joined;
  bool previous_match = false;
  for (const Part& p : parts) {
    const bool glue = behavior == Behavior::contiguous ? p.is_match == previous_match
                                                       : p.is_match && !previous_match;
    if (glue && !joined.empty()) {
      joined.back().begin = std::min(joined.back().begin, p.begin);
      joined.back().end = std::max(joined.back().end, p.end);
    } else {
      joined.push_back(p);
    }
    previous_match = p.is_match;
  }
  if (backwards) std::reverse(joined.begin(), joined.end());
  for (const Part& p : joined) put(p);
}

/// Cuts every word at the matches of a finder.
class Splitter : public PreTokenizer {
 public:
  using Finder = std::function<std::vector<Match>(std::string_view)>;
  Splitter(Finder find, Behavior behavior, bool invert = false)
      : find_(std::move(find)), behavior_(behavior), invert_(invert) {}

  void apply(Words& words) const override {
    std::vector<Words::Span> spans;
    spans.reserve(words.spans.size());
    for (const Words::Span& s : words.spans) {
      const std::vector<Match> matches = find_(words.word(s));
      if (matches.empty() && !invert_) {
        spans.push_back(s);
        continue;
      }
      emit(cover(matches, s.end - s.begin, invert_), behavior_, s.begin, spans);
    }
    if (!spans.empty() && spans.front().begin != words.spans.front().begin) words.at_start = false;
    words.spans = std::move(spans);
  }

 private:
  Finder find_;
  Behavior behavior_;
  bool invert_;
};

/// Each character of a class is a match of its own.
template <bool (*is_in_class)(char32_t)>
std::vector<Match> characters(std::string_view text) {
  std::vector<Match> matches;
  for (size_t pos = 0; pos < text.size();) {
    const unicode::Char c = unicode::next(text, pos);
    if (is_in_class(c.code)) matches.push_back({pos, pos + c.length});
    pos += c.length;
  }
  return matches;
}

/// \w+|[^\w\s]+
std::vector<Match> words_and_symbols(std::string_view text) {
  enum class Kind { space, word, symbol };
  std::vector<Match> matches;
  Kind current = Kind::space;
  for (size_t pos = 0; pos < text.size();) {
    const unicode::Char c = unicode::next(text, pos);
    const Kind kind = unicode::is_word(c.code)          ? Kind::word
                      : unicode::is_white_space(c.code) ? Kind::space
                                                        : Kind::symbol;
    if (kind != Kind::space) {
      if (kind != current) matches.push_back({pos, pos});
      matches.back().end = pos + c.length;
    }
    current = kind;
    pos += c.length;
  }
  return matches;
}

/// Optionally a space in front of each word, optionally GPT-2's word pattern, then each byte as its
/// character.
class ByteLevel : public PreTokenizer {
 public:
  ByteLevel(bool add_prefix_space, bool use_regex)
      : add_prefix_space_(add_prefix_space), use_regex_(use_regex) {}

  void apply(Words& words) const override {
    std::string mapped(2 * (words.text.size() + words.spans.size()), '\0');
    char* out = mapped.data();
    std::vector<Words::Span> spans;
    std::vector<size_t> ends;
    std::string prefixed;
    for (const Words::Span& s : words.spans) {
      std::string_view word = words.word(s);
      if (add_prefix_space_ && !word.starts_with(' ')) {
        prefixed = " ";
        prefixed += word;
        word = prefixed;
      }
      ends.clear();
      if (use_regex_) {
        byte_level::split_words(word, ends);
      } else {
        ends.push_back(word.size());
      }
      size_t done = 0;
      for (const size_t end : ends) {
        const auto begin = static_cast<size_t>(out - mapped.data());
        out = byte_level::map(word.substr(done, end - done), out);
        spans.push_back({begin, static_cast<size_t>(out - mapped.data())});
        done = end;
      }
    }
    mapped.resize(static_cast<size_t>(out - mapped.data()));
    words.text = std::move(mapped);
    words.spans = std::move(spans);
  }

 private:
  bool add_prefix_space_;
  bool use_regex_;
};

/// Spaces become a visible character (▁), one of which may be put in front; each begins a word.
class Metaspace : public PreTokenizer {
 public:
  enum class Prepend { never, first, always };
  Metaspace(const std::string& replacement, Prepend prepend, bool split)
      : replacement_(replacement),
        space_(Pattern::literal(" ")),
        mark_(Pattern::literal(replacement)),
        prepend_(prepend),
        split_(split) {}

  void apply(Words& words) const override {
    std::string text;
    std::vector<Words::Span> spans;
    for (size_t i = 0; i < words.spans.size(); ++i) {
      std::string word = space_.replace_all(words.word(words.spans[i]), replacement_);
      const bool wanted =
          prepend_ == Prepend::always || (prepend_ == Prepend::first && i == 0 && words.at_start);
      if (wanted && !word.starts_with(replacement_)) word.insert(0, replacement_);
      const size_t base = text.size();
      text += word;
      if (split_) {
        emit(cover(mark_.find_all(word), word.size(), false), Behavior::merged_with_next, base,
             spans);
      } else {
        spans.push_back({base, text.size()});
      }
    }
    words.text = std::move(text);
    words.spans = std::move(spans);
  }

 private:
  std::string replacement_;
  Pattern space_;
  Pattern mark_;
  Prepend prepend_;
  bool split_;
};

class Sequence : public PreTokenizer {
 public:
  explicit Sequence(std::vector<std::unique_ptr<PreTokenizer>> steps) : steps_(std::move(steps)) {}
  void apply(Words& words) const override {
    for (const auto& step : steps_) step->apply(words);
  }

 private:
  std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

Metaspace::Prepend prepend_of(const JsonNode& node) {
  // Old files say add_prefix_space; where both stand, the scheme decides.
  if (!node.has("prepend_scheme")) {
    return node.boolean("add_prefix_space", true) ? Metaspace::Prepend::always
                                                  : Metaspace::Prepend::never;
  }
  const JsonNode scheme = node.at("prepend_scheme");
  const std::string name = scheme.string();
  if (name == "always") return Metaspace::Prepend::always;
  if (name == "first") return Metaspace::Prepend::first;
  if (name == "never") return Metaspace::Prepend::never;
  scheme.unsupported(fmt::format("the scheme {} is not built", name));
}

}  // namespace

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const JsonNode& node, int depth) {
  const std::string type = node.string("type");
  const auto split = [](Splitter::Finder find, Behavior behavior, bool invert = false) {
    return std::make_unique<Splitter>(std::move(find), behavior, invert);
  };
  if (type == "ByteLevel") {
    return std::make_unique<ByteLevel>(node.boolean("add_prefix_space", true),
                                       node.boolean("use_regex", true));
  }
  if (type == "Split") {
    const Pattern pattern = Pattern::from_json(node.at("pattern"));
    return split([pattern](std::string_view text) { return pattern.find_all(text); },
                 behavior_of(node.at("behavior")), node.boolean("invert", false));
  }
  if (type == "Digits") {
    const bool individual = node.boolean("individual_digits", false);
    return split(characters<unicode::is_numeric>,
                 individual ? Behavior::isolated : Behavior::contiguous);
  }
  if (type == "Punctuation") {
    return split(characters<unicode::is_punctuation>,
                 node.has("behavior") ? behavior_of(node.at("behavior")) : Behavior::isolated);
  }
  if (type == "Whitespace") return split(words_and_symbols, Behavior::removed, true);
  if (type == "WhitespaceSplit") {
    return split(characters<unicode::is_white_space>, Behavior::removed);
  }
  if (type == "Metaspace") {
    return std::make_unique<Metaspace>(node.string("replacement"), prepend_of(node),
                                       node.boolean("split", true));
  }
  if (type == "Sequence") {
    if (depth > 16) node.fail("sequences are nested too deeply");
    const JsonNode list = node.at("pretokenizers");
    std::vector<std::unique_ptr<PreTokenizer>> steps;
    for (size_t i = 0; i < list.array_size(); ++i) {
      steps.push_back(make_pre_tokenizer(list.item(i), depth + 1));
    }
    return std::make_unique<Sequence>(std::move(steps));
  }
  node.unsupported(fmt::format("the pre-tokenizer {} is not built", type));
}

}  // namespace krait
