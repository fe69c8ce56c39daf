#include "tokenizer/sentencepiece.h"

#include <sentencepiece_processor.h>

#include <random>

#include "support/test_support.h"
#include "tokenizer/sentencepiece_model.h"

namespace krait {
namespace {

using test::data_dir;
using test::read_file;
using test::ScratchDir;
using test::throws;
using test::write_file;
using Ids = std::vector<int32_t>;

const std::vector<std::string> kModels{"mistral-v1", "mistral-v3", "spm-unigram-nfkc-1k",
                                       "spm-unigram-nmt-nfkc-4k"};

std::string bytes_of(const std::string& name) {
  return read_file(data_dir() / "tokenizers" / (name + ".model"));
}

std::unique_ptr<Tokenizer> model(const std::string& name, const SpecialNames& names = {}) {
  return parse_sentencepiece(bytes_of(name), name, names);
}

TEST(SentencePiece, KnownIds) {
  const auto t = model("mistral-v3");
  EXPECT_EQ(t->encode("Hello world"), (Ids{23325, 2294}));
  EXPECT_EQ(t->encode(" Hello"), (Ids{29473, 23325}));
  EXPECT_EQ(t->encode("def f(x):\n    return x"),
            (Ids{1569, 1053, 29500, 29512, 2097, 781, 3055, 1372, 2086}));
  EXPECT_EQ(t->encode(""), Ids{});
}

TEST(SentencePiece, Listing) {
  const auto t = model("mistral-v3");
  EXPECT_EQ(t->vocab_size(), 32768);
  EXPECT_EQ(t->description(), "sentencepiece bpe");
  EXPECT_EQ(model("spm-unigram-nfkc-1k")->description(), "sentencepiece unigram");
  EXPECT_EQ(t->token_text(781), "<0x0A>");
  EXPECT_EQ(t->token_id("[INST]"), 3);
  EXPECT_EQ(t->token_id("no such piece"), std::nullopt);
  EXPECT_EQ(t->token_text(-1), "");
  EXPECT_EQ(t->token_text(32768), "");
  EXPECT_TRUE(t->is_special(1) && t->is_special(3) && t->is_special(750));
  EXPECT_FALSE(t->is_special(770) || t->is_special(781) || t->is_special(-1));
  EXPECT_EQ(t->bos_id(), 1);
  EXPECT_EQ(t->eos_id(), 2);
}

TEST(SentencePiece, ControlPiecesAreNeverReadFromTextAndUserDefinedOnesAlwaysAre) {
  const auto mistral = model("mistral-v3");
  for (const int32_t id : mistral->encode("[INST] <s>")) EXPECT_FALSE(mistral->is_special(id));
  const auto small = model("spm-unigram-nmt-nfkc-4k");
  const Ids ids = small->encode("a<|endoftext|>b", {.parse_special = false});
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 4), 1);
}

TEST(SentencePiece, BeginAndEnd) {
  const Ids plain = model("mistral-v3")->encode("Hello");
  EXPECT_EQ(plain, Ids{23325});
  EXPECT_EQ(model("mistral-v3")->encode("Hello", {.add_special = true}), (Ids{1, 23325}));
  EXPECT_EQ(model("mistral-v3", {.add_bos = false, .add_eos = true})
                ->encode("Hello", {.add_special = true}),
            (Ids{23325, 2}));
  const auto named = model("mistral-v3", {.bos = "[INST]", .eos = "[/INST]"});
  EXPECT_EQ(named->bos_id(), 3);
  EXPECT_EQ(named->eos_id(), 4);
}

TEST(SentencePiece, BytesOfTokens) {
  const auto t = model("mistral-v3");
  const int32_t hello = 23325;  // ▁Hello
  EXPECT_EQ(t->token_bytes(hello, true, false), "Hello");
  EXPECT_EQ(t->token_bytes(hello, false, false), " Hello");
  EXPECT_EQ(t->token_bytes(781, true, false), "\n");
  EXPECT_EQ(t->token_bytes(771 + 0xFF, false, false), "\xFF");
  EXPECT_EQ(t->token_bytes(3, false, false), "");
  EXPECT_EQ(t->token_bytes(3, false, true), "[INST]");
  EXPECT_EQ(t->token_bytes(3055, false, false), "   ");
  EXPECT_EQ(t->token_bytes(0, false, false), " \u2047 ");
  EXPECT_EQ(t->token_bytes(99999, false, false), "");
}

// The library's own decoding is the reference for ids that encoding gives.
TEST(SentencePiece, DecodesAsTheLibraryDoes) {
  const std::string text =
      "The quick  brown fox (3.14) na\u00EFve \u65E5\u672C \U0001F642 \u20AC\n\ttail \u0130 ";
  for (const std::string& name : kModels) {
    sentencepiece::SentencePieceProcessor library;
    ASSERT_TRUE(library.LoadFromSerializedProto(bytes_of(name)).ok());
    const auto t = model(name);
    const Ids ids = t->encode(text);
    EXPECT_EQ(t->decode(ids), library.DecodeIds(ids)) << name;
  }
}

TEST(SentencePiece, FoldersThatHoldOne) {
  const ScratchDir dir;
  EXPECT_EQ(tokenizer_in(dir.path()), std::nullopt);
  write_file(dir.path() / "tokenizer.model.v3", bytes_of("mistral-v3"));
  EXPECT_EQ(open_tokenizer(dir.path())->vocab_size(), 32768);
  write_file(dir.path() / "tokenizer_config.json",
             R"({"add_bos_token": false, "eos_token": "[/INST]"})");
  const auto t = open_tokenizer(dir.path());
  EXPECT_EQ(t->eos_id(), 4);
  EXPECT_EQ(t->encode("Hello", {.add_special = true}), Ids{23325});
}

TEST(SentencePieceModel, Reads) {
  const SentencePieceModel m = read_sentencepiece_model(bytes_of("mistral-v3"), "m");
  EXPECT_EQ(m.pieces.size(), 32768U);
  EXPECT_EQ(m.algorithm, SentencePieceModel::Algorithm::bpe);
  EXPECT_TRUE(m.add_dummy_prefix);
  EXPECT_FALSE(m.remove_extra_whitespaces);
  EXPECT_EQ(m.pieces[1029].text, "\u2581t");
  EXPECT_EQ(m.pieces[1029].score, -2.0F);
  EXPECT_EQ(m.pieces[781].type, SentencePieceModel::Type::byte);
  EXPECT_EQ(m.pieces[751].type, SentencePieceModel::Type::user_defined);
  EXPECT_TRUE(
      read_sentencepiece_model(bytes_of("spm-unigram-nfkc-1k"), "m").remove_extra_whitespaces);
}

/// A message field of wire type 2.
std::string field(int number, const std::string& data) {
  std::string out{static_cast<char>(number << 3 | 2)};
  size_t n = data.size();
  for (; n >= 0x80; n >>= 7) out += static_cast<char>((n & 0x7F) | 0x80);
  return out + static_cast<char>(n) + data;
}

TEST(SentencePieceModel, Damage) {
  const auto fails = [](const char* part, const std::string& bytes) {
    return throws(ErrorKind::format, part, [&] { (void)parse_sentencepiece(bytes, "m"); });
  };
  const std::string unknown_type{"\x18\x02"};
  const std::string piece = field(1, field(1, "<unk>") + unknown_type) + field(1, field(1, "a"));
  EXPECT_EQ(parse_sentencepiece(piece, "m")->vocab_size(), 2);

  EXPECT_TRUE(fails("it has no pieces", ""));
  EXPECT_TRUE(fails("the unknown wire type", "version https://git-lfs"));
  EXPECT_TRUE(fails("a field of 127 bytes begins 0 bytes before the end", "\x0A\x7F"));
  EXPECT_TRUE(fails("more than 64 bits", "\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF"));
  EXPECT_TRUE(fails("a piece is empty", field(1, "")));
  EXPECT_TRUE(fails("U+0000", field(1, field(1, std::string("a\0b", 3)))));
  EXPECT_TRUE(fails("the piece type 7 is unknown", field(1, field(1, "a") + "\x18\x07")));
  EXPECT_TRUE(fails("the model type 9 is unknown", piece + field(2, "\x18\x09")));
  EXPECT_TRUE(fails("not a finite number", field(1, field(1, "a") + "\x15" + "\xFF\xFF\xFF\x7F")));
  EXPECT_TRUE(fails("has wire type 0, expected 2", field(1, std::string("\x08\x01"))));
  EXPECT_TRUE(fails("unk", field(1, field(1, "a"))));  // from the library
  EXPECT_TRUE(fails("a is already defined", piece + field(1, field(1, "a"))));

  const auto charsmap = [&](const std::string& bytes) { return piece + field(3, field(2, bytes)); };
  const std::string trie_size{"\x00\x04\x00\x00", 4};  // 256 units of four bytes
  const std::string units(1024, '\0');
  EXPECT_TRUE(fails("is cut short", charsmap("abc")));
  EXPECT_TRUE(fails("its trie alone 1024", charsmap(trie_size + units)));
  EXPECT_TRUE(fails("does not end with a zero byte", charsmap(trie_size + units + "x")));
  std::string far = units;
  far[2] = '\x7F';  // an offset far outside
  EXPECT_TRUE(fails("points outside of itself", charsmap(trie_size + far + std::string(1, '\0'))));
  far[3] = '\x80';  // at the root, the mark of a value does not keep the library from following it
  EXPECT_TRUE(fails("points outside of itself", charsmap(trie_size + far + std::string(1, '\0'))));
}

TEST(SentencePieceModel, DamagedBytesNeverCrash) {
  for (const std::string& name : {std::string("spm-unigram-nfkc-1k"), std::string("mistral-v1")}) {
    const std::string whole = bytes_of(name);
    std::mt19937 random(1);
    for (int round = 0; round < 60; ++round) {
      std::string bytes = whole;
      if (round % 3 == 0) bytes.resize(random() % bytes.size());
      for (int i = 0; i < 1 + round % 5; ++i) {
        if (!bytes.empty()) bytes[random() % bytes.size()] = static_cast<char>(random());
      }
      try {
        (void)parse_sentencepiece(bytes, name)->encode("Hello  w\u00F6rld \u65E5 \uFB01");
      } catch (const Error&) {
      }
    }
  }
}

}  // namespace
}  // namespace krait
