#include "tokenizer/normalizer.h"

#include <fmt/format.h>

#include <functional>
#include <utility>
#include <vector>

#include "tokenizer/pattern.h"
#include "tokenizer/unicode.h"

namespace krait {

namespace {

/// A normaliser that is one function.
class Function : public Normalizer {
 public:
  explicit Function(std::function<std::string(std::string_view)> f) : f_(std::move(f)) {}
  [[nodiscard]] std::string normalize(std::string_view text) const override { return f_(text); }

 private:
  std::function<std::string(std::string_view)> f_;
};

class Sequence : public Normalizer {
 public:
  explicit Sequence(std::vector<std::unique_ptr<Normalizer>> steps) : steps_(std::move(steps)) {}
  [[nodiscard]] std::string normalize(std::string_view text) const override {
    std::string s(text);
    for (const auto& step : steps_) s = step->normalize(s);
    return s;
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> steps_;
};

std::string strip(std::string_view text, bool left, bool right) {
  size_t begin = 0;
  size_t end = text.size();
  while (left && begin < end) {
    const unicode::Char c = unicode::next(text, begin);
    if (!unicode::is_white_space(c.code)) break;
    begin += c.length;
  }
  while (right && end > begin) {
    const size_t last = unicode::previous(text, end);
    if (!unicode::is_white_space(unicode::next(text, last).code)) break;
    end = last;
  }
  return std::string(text.substr(begin, end - begin));
}

std::string strip_marks(std::string_view text) {
  std::string out;
  for (size_t pos = 0; pos < text.size();) {
    const unicode::Char c = unicode::next(text, pos);
    if (!unicode::is_mark(c.code)) out.append(text, pos, c.length);
    pos += c.length;
  }
  return out;
}

std::unique_ptr<Normalizer> function(std::function<std::string(std::string_view)> f) {
  return std::make_unique<Function>(std::move(f));
}

std::unique_ptr<Normalizer> form(unicode::Form f) {
  return function([f](std::string_view text) { return unicode::normalize(text, f); });
}

}  // namespace

std::unique_ptr<Normalizer> make_normalizer(const JsonNode& node, int depth) {
  const std::string type = node.string("type");
  if (type == "NFC") return form(unicode::Form::nfc);
  if (type == "NFD") return form(unicode::Form::nfd);
  if (type == "NFKC") return form(unicode::Form::nfkc);
  if (type == "NFKD") return form(unicode::Form::nfkd);
  if (type == "Lowercase") return function(unicode::to_lower);
  if (type == "StripAccents") return function(strip_marks);
  if (type == "Strip") {
    const bool left = node.boolean("strip_left", true);
    const bool right = node.boolean("strip_right", true);
    return function([=](std::string_view text) { return strip(text, left, right); });
  }
  if (type == "Prepend") {
    return function([prefix = node.string("prepend")](std::string_view text) {
      return text.empty() ? std::string() : prefix + std::string(text);
    });
  }
  if (type == "Replace") {
    return function([pattern = Pattern::from_json(node.at("pattern")),
                     content = node.string("content")](std::string_view text) {
      return pattern.replace_all(text, content);
    });
  }
  if (type == "Sequence") {
    if (depth > 16) node.fail("sequences are nested too deeply");
    const JsonNode list = node.at("normalizers");
    std::vector<std::unique_ptr<Normalizer>> steps;
    for (size_t i = 0; i < list.array_size(); ++i) {
      steps.push_back(make_normalizer(list.item(i), depth + 1));
    }
    return std::make_unique<Sequence>(std::move(steps));
  }
  node.unsupported(fmt::format("the normalizer {} is not built", type));
}

}  // namespace krait
