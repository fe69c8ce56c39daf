#include "tokenizer/gguf_vocabulary.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/log.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/sentencepiece_model.h"
#include "tokenizer/tokenizer_json.h"
#include "tokenizer/unicode.h"

namespace krait {

namespace {

using Json = nlohmann::json;
using V = GgufVocabulary;

[[noreturn]] void fail(const V& v, const std::string& what) {
  throw Error(ErrorKind::format, fmt::format("{}: {}", v.file, what));
}

int64_t type_of(const V& v, size_t id) { return v.types.empty() ? V::normal : v.types[id]; }

/// The number of ids that mean something: converters fill a padded embedding's last rows with
/// unused tokens ("[PAD50277]"), which must not be sampled.
size_t used_size(const V& v) {
  size_t n = v.tokens.size();
  while (n > 1 && type_of(v, n - 1) == V::unused) --n;
  return n;
}

void check(const V& v) {
  const size_t n = v.tokens.size();
  if (n == 0 || n > INT32_MAX) {
    fail(v, fmt::format("tokenizer.ggml.tokens: expected tokens, found {}", n));
  }
  const auto same_length = [&](const char* key, size_t length) {
    if (length != 0 && length != n) {
      fail(v, fmt::format("tokenizer.ggml.{}: expected one for each of {} tokens, found {}", key, n,
                          length));
    }
  };
  same_length("token_type", v.types.size());
  same_length("scores", v.scores.size());
  for (const int64_t t : v.types) {
    if (t < V::normal || t > V::byte) {
      fail(v, fmt::format("tokenizer.ggml.token_type: expected numbers from 1 to 6, found {}", t));
    }
  }
  const auto utf8 = [&](const char* key, const std::vector<std::string>& texts) {
    for (size_t i = 0; i < texts.size(); ++i) {
      if (!unicode::is_valid(texts[i])) {
        fail(v, fmt::format("tokenizer.ggml.{}: number {} is not UTF-8", key, i));
      }
    }
  };
  utf8("tokens", v.tokens);
  utf8("merges", v.merges);
  for (const auto& id : {v.bos_id, v.eos_id, v.unknown_id, v.padding_id}) {
    if (id && (*id < 0 || static_cast<size_t>(*id) >= n)) {
      fail(v, fmt::format("tokenizer.ggml: a special token is number {} of {}", *id, n));
    }
  }
}

// ---- gpt2 -------------------------------------------------------------------------------------

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

Json split(const char* regex) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", regex}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

Json sequence(std::initializer_list<Json> steps) {
  return {{"type", "Sequence"}, {"pretokenizers", Json(steps)}};
}

/// How the values of tokenizer.ggml.pre cut text into words, and whether their tokenizers
/// normalise. llama.cpp leaves normalisation out and cuts Falcon's text a little differently; here
/// the tokenizers that the models were trained with are followed.
enum class Cut { gpt2, gpt2_nfc, single_digits, falcon, llama3, qwen2 };
struct PreType {
  std::string_view name;
  Cut cut;
};
constexpr PreType kPreTypes[] = {
    {"gpt-2", Cut::gpt2},
    {"phi-2", Cut::gpt2},
    {"jais", Cut::gpt2},
    {"olmo", Cut::gpt2_nfc},  // GPT-NeoX-20B's tokenizer, by either name
    {"mpt", Cut::gpt2_nfc},
    {"starcoder", Cut::single_digits},
    {"refact", Cut::single_digits},
    {"command-r", Cut::single_digits},
    {"smollm", Cut::single_digits},
    {"falcon", Cut::falcon},
    {"llama-bpe", Cut::llama3},
    {"llama3", Cut::llama3},
    {"llama-v3", Cut::llama3},
    {"falcon3", Cut::llama3},
    {"qwen2", Cut::qwen2},
};

Cut cut_of(const V& v) {
  for (const PreType& p : kPreTypes) {
    if (p.name == v.pre) return p.cut;
  }
  spdlog::warn(
      "{}: tokenizer.ggml.pre {}: words are cut as GPT-2 does, which may not be what the "
      "model was trained with",
      v.file, v.pre.empty() ? "is missing" : fmt::format("\"{}\" is unknown", v.pre));
  return Cut::gpt2;
}

Json pre_tokenizer(Cut cut) {
  switch (cut) {
    case Cut::gpt2:
    case Cut::gpt2_nfc:
      break;
    case Cut::single_digits:
      return sequence({{{"type", "Digits"}, {"individual_digits", true}}, byte_level(true)});
    case Cut::falcon:
      return sequence({{{"type", "Punctuation"}, {"behavior", "Contiguous"}},
                       byte_level(true),
                       {{"type", "Digits"}, {"individual_digits", false}},
                       split("[0-9][0-9][0-9]")});
    case Cut::llama3:
      return sequence(
          {split("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
                 " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"),
           byte_level(false)});
    case Cut::qwen2:
      return sequence({split("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
                             " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"),
                       byte_level(false)});
  }
  return byte_level(true);
}

/// What add_bos and add_eos put around a text.
Json post_processor(const V& v, const SpecialNames& names) {
  Json single = Json::array();
  Json special = Json::object();
  const auto add = [&](const std::optional<int64_t>& id) {
    const std::string& text = v.tokens[static_cast<size_t>(*id)];
    single.push_back({{"SpecialToken", {{"id", text}, {"type_id", 0}}}});
    special[text] = {{"id", text}, {"ids", {*id}}, {"tokens", {text}}};
  };
  if (names.add_bos.value_or(false)) add(v.bos_id);
  single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
  if (names.add_eos.value_or(false)) add(v.eos_id);
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", single},
          {"special_tokens", special}};
}

// ---- llama, t5 --------------------------------------------------------------------------------

/// Writes the fields of a protocol buffer: https://protobuf.dev/programming-guides/encoding/
class Message {
 public:
  void integer(uint32_t field, uint64_t v) {
    varint(field << 3);
    varint(v);
  }
  void real(uint32_t field, float v) {
    varint(field << 3 | 5);
    char bytes[sizeof v];
    std::memcpy(bytes, &v, sizeof v);
    bytes_.append(bytes, sizeof v);
  }
  void text(uint32_t field, std::string_view v) {
    varint(field << 3 | 2);
    varint(v.size());
    bytes_ += v;
  }
  [[nodiscard]] const std::string& bytes() const { return bytes_; }

 private:
  void varint(uint64_t v) {
    for (; v >= 0x80; v >>= 7) bytes_ += static_cast<char>(v | 0x80);
    bytes_ += static_cast<char>(v);
  }
  std::string bytes_;
};

// ---- the other way ----------------------------------------------------------------------------

/// Whether a component of a tokenizer.json says what `ours` says. What it leaves out is as the
/// reference has it by default; trim_offsets does not change the ids.
bool says(const Json& theirs, const Json& ours) {
  if (!ours.is_object() || !theirs.is_object()) {
    if (!ours.is_array() || !theirs.is_array()) return theirs == ours;
    return std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                      [](const Json& o, const Json& t) { return says(t, o); });
  }
  for (const auto& [key, value] : ours.items()) {
    if (key == "trim_offsets") continue;
    const auto it = theirs.find(key);
    const bool by_default = (key == "use_regex" && value == true) ||
                            ((key == "invert" || key == "individual_digits") && value == false);
    if (it == theirs.end() ? !by_default : !says(*it, value)) return false;
  }
  return true;
}

/// The value of tokenizer.ggml.pre that cuts as the tokenizer.json does; empty: there is none.
std::string_view pre_type_of(const Json& tokenizer) {
  const Json none;
  const Json& cuts = tokenizer.value("pre_tokenizer", none);
  const Json& normalizer = tokenizer.value("normalizer", none);
  const bool nfc = normalizer.is_object() && normalizer.value("type", "") == "NFC";
  if (!nfc && !normalizer.is_null()) return {};
  for (const PreType& p : kPreTypes) {
    if ((p.cut == Cut::gpt2_nfc) == nfc && says(cuts, pre_tokenizer(p.cut))) return p.name;
  }
  return {};
}

/// Fills `v` from the JSON of a tokenizer that krait could open.
void read_json(const Json& json, GgufVocabulary& v) {
  v.model = "gpt2";
  v.pre = pre_type_of(json);
  const Json& model = json.at("model");
  if (v.pre.empty() || model.value("byte_fallback", false)) {
    throw Error(
        ErrorKind::unsupported,
        fmt::format("{}: GGUF has no word for the way in which this tokenizer cuts text", v.file),
        "convert with --no-tokenizer, or use the tokenizer.model of the same release");
  }
  const auto put = [&](int64_t id, const std::string& text, int64_t type) {
    const auto at = static_cast<size_t>(id);
    for (size_t i = v.tokens.size(); i <= at; ++i) {
      v.tokens.push_back(fmt::format("[PAD{}]", i));
      v.types.push_back(V::unused);
    }
    v.tokens[at] = text;
    v.types[at] = type;
  };
  for (const auto& [text, id] : model.at("vocab").items()) put(id.get<int64_t>(), text, V::normal);
  for (const Json& token : json.value("added_tokens", Json::array())) {
    put(token.at("id").get<int64_t>(), token.at("content").get<std::string>(),
        token.value("special", false) ? V::control : V::user_defined);
  }
  for (const Json& m : model.at("merges")) {
    v.merges.push_back(m.is_string() ? m.get<std::string>()
                                     : m[0].get<std::string>() + " " + m[1].get<std::string>());
  }
}

void read_model(std::string_view bytes, GgufVocabulary& v) {
  const SentencePieceModel model = read_sentencepiece_model(bytes, v.file);
  using Algorithm = SentencePieceModel::Algorithm;
  if (model.algorithm != Algorithm::bpe && model.algorithm != Algorithm::unigram) {
    throw Error(ErrorKind::unsupported,
                fmt::format("{}: GGUF knows SentencePiece models of the kinds bpe and unigram only",
                            v.file),
                "convert with --no-tokenizer");
  }
  v.model = model.algorithm == Algorithm::bpe ? "llama" : "t5";
  v.pre = "default";
  for (const SentencePieceModel::Piece& p : model.pieces) {
    v.tokens.push_back(p.text);
    v.scores.push_back(p.score);
    v.types.push_back(static_cast<int64_t>(p.type));
  }
  v.charsmap = model.charsmap;
  v.add_space_prefix = model.add_dummy_prefix;
  v.remove_extra_whitespaces = model.remove_extra_whitespaces;
  const auto id = [&](int64_t i) { return i >= 0 ? std::optional(i) : std::nullopt; };
  v.unknown_id = id(model.unknown_id);
  v.bos_id = id(model.bos_id);
  v.eos_id = id(model.eos_id);
  v.padding_id = id(model.padding_id);
}

}  // namespace

GgufVocabulary read_gguf_vocabulary(const std::filesystem::path& file) {
  const auto tokenizer = open_tokenizer(file);  // refuses what is damaged
  const std::string bytes = read_tokenizer_file(file);
  GgufVocabulary v;
  v.file = file.string();
  if (file.extension() == ".json") {
    read_json(parse_json(bytes, v.file), v);
  } else {
    read_model(bytes, v);
  }
  // What the files around it say, as the tokenizer itself understood them.
  if (const auto bos = tokenizer->bos_id()) v.bos_id = bos;
  if (const auto eos = tokenizer->eos_id()) v.eos_id = eos;
  const std::vector<int32_t> around = tokenizer->encode("", {.add_special = true});
  const auto adds = [&](const std::optional<int64_t>& id, bool front) {
    return id && !around.empty() && (front ? around.front() : around.back()) == *id;
  };
  v.add_bos = adds(v.bos_id, true);
  v.add_eos = adds(v.eos_id, false) && (around.size() > 1 || !*v.add_bos);
  return v;
}

bool is_sentencepiece(const GgufVocabulary& v) { return v.model == "llama" || v.model == "t5"; }

SpecialNames gguf_special_names(const GgufVocabulary& v) {
  check(v);
  SpecialNames names;
  names.found = true;
  const auto text = [&](const std::optional<int64_t>& id) {
    return id ? std::optional(v.tokens[static_cast<size_t>(*id)]) : std::nullopt;
  };
  names.bos = text(v.bos_id);
  names.eos = text(v.eos_id);
  // llama.cpp's defaults where the file does not say.
  const bool bos = v.model == "llama" || (v.model == "gpt2" && v.pre.starts_with("llama"));
  names.add_bos = v.bos_id && v.add_bos.value_or(bos);
  names.add_eos = v.eos_id && v.add_eos.value_or(v.model == "t5");
  return names;
}

Json gguf_tokenizer_json(const GgufVocabulary& v) {
  check(v);
  const Cut cut = cut_of(v);
  const size_t n = used_size(v);
  Json vocab = Json::object();
  Json added = Json::array();
  // Where two tokens read the same, the normal one is the one that merges make.
  for (size_t id = 0; id < n; ++id) {
    if (type_of(v, id) == V::normal) vocab.emplace(v.tokens[id], id);
  }
  for (size_t id = 0; id < n; ++id) {
    const int64_t type = type_of(v, id);
    if (type != V::normal) vocab.emplace(v.tokens[id], id);
    if ((type != V::control && type != V::user_defined) || v.tokens[id].empty()) continue;
    added.push_back({{"id", id},
                     {"content", v.tokens[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", type == V::control}});
  }
  Json normalizer;  // null
  if (cut == Cut::gpt2_nfc) normalizer = {{"type", "NFC"}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", std::move(added)},
          {"normalizer", std::move(normalizer)},
          {"pre_tokenizer", pre_tokenizer(cut)},
          {"post_processor", post_processor(v, gguf_special_names(v))},
          {"decoder", byte_level(true)},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", cut == Cut::llama3},
            {"vocab", std::move(vocab)},
            {"merges", v.merges}}}};
}

std::string gguf_sentencepiece(const GgufVocabulary& v) {
  check(v);
  if (v.scores.empty())
    fail(v, "tokenizer.ggml.scores: expected a score for each token, found none");
  constexpr uint64_t kUnigram = 1;
  constexpr uint64_t kBpe = 2;
  const size_t n = used_size(v);
  Message model;
  bool byte_fallback = false;
  for (size_t id = 0; id < n; ++id) {
    Message piece;
    piece.text(1, v.tokens[id]);
    piece.real(2, v.scores[id]);
    piece.integer(3, static_cast<uint64_t>(type_of(v, id)));
    model.text(1, piece.bytes());
    byte_fallback = byte_fallback || type_of(v, id) == V::byte;
  }
  Message trainer;
  trainer.integer(3, v.model == "llama" ? kBpe : kUnigram);
  trainer.integer(4, n);
  trainer.integer(35, byte_fallback ? 1 : 0);
  // The ids and, a few fields on, the texts of unknown, bos, eos and padding; -1: none.
  const std::optional<int64_t> ids[] = {v.unknown_id, v.bos_id, v.eos_id, v.padding_id};
  for (uint32_t i = 0; i < 4; ++i) {
    trainer.integer(40 + i, static_cast<uint64_t>(ids[i].value_or(-1)));
    if (ids[i]) trainer.text(45 + i, v.tokens[static_cast<size_t>(*ids[i])]);
  }
  Message normalizer;
  normalizer.text(1, v.charsmap.empty() ? "identity" : "gguf");
  normalizer.text(2, v.charsmap);
  normalizer.integer(3, v.add_space_prefix.value_or(true) ? 1 : 0);
  normalizer.integer(4, v.remove_extra_whitespaces.value_or(false) ? 1 : 0);
  normalizer.integer(5, 1);
  model.text(2, trainer.bytes());
  model.text(3, normalizer.bytes());
  return model.bytes();
}

std::unique_ptr<Tokenizer> make_gguf_tokenizer(const GgufVocabulary& v) {
  if (is_sentencepiece(v)) {
    return parse_sentencepiece(gguf_sentencepiece(v), v.file, gguf_special_names(v));
  }
  if (v.model != "gpt2") {
    throw Error(ErrorKind::unsupported,
                fmt::format("{}: tokenizer.ggml.model \"{}\" is not built", v.file,
                            unicode::to_valid(v.model.substr(0, 60))),
                "krait reads gpt2, llama and t5; give another tokenizer with --tokenizer");
  }
  const Json json = gguf_tokenizer_json(v);
  return make_tokenizer_json(JsonNode(json, v.file), gguf_special_names(v),
                             fmt::format("bpe (gguf, {})", v.pre.empty() ? "default" : v.pre));
}

}  // namespace krait
