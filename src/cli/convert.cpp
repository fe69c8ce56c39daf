// krait convert: a model in another format, for other programs: a folder for Hugging Face's
// transformers, or a GGUF file for llama.cpp.
#include <spdlog/spdlog.h>

#include <fstream>
#include <memory>

#include "base/output_file.h"
#include "cli/command.h"
#include "cli/console.h"
#include "cli/gguf_vocabulary.h"
#include "cli/json_out.h"
#include "cli/model_source.h"
#include "model/export.h"
#include "model/model.h"
#include "tokenizer/chat_template.h"

namespace krait {

namespace fs = std::filesystem;

namespace {

struct ConvertFlags {
  std::string source;
  std::string target;
  std::string dtype = "auto";
  std::string tokenizer;
  bool no_tokenizer = false;
};

/// What transformers looks for beside the weights.
constexpr const char* kTokenizerFiles[] = {
    "tokenizer.json",    "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",   "vocab.json",
    "merges.txt"};

/// A source opened for conversion. The members are declared so that each is destroyed before what
/// it refers to.
struct Conversion {
  ModelSource source;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<ModelExport> model;
  std::optional<fs::path> tokenizer;  ///< its file; empty: in the GGUF file, or none
  bool with_tokenizer = true;
};

void write_bytes(const fs::path& file, std::string_view bytes) {
  OutputFile out(file);
  out.write(std::as_bytes(std::span(bytes)));
  out.commit();
}

void copy_if_there(const fs::path& from, const fs::path& to) {
  std::error_code none;
  if (fs::is_regular_file(from, none)) write_bytes(to / from.filename(), read_text(from.string()));
}

/// tokenizer_config.json of a GGUF file's vocabulary.
OrderedJson tokenizer_config(const GgufVocabulary& v, const GgufMetadata& metadata) {
  const SpecialNames names = gguf_special_names(v);
  OrderedJson j;
  if (names.bos) j["bos_token"] = *names.bos;
  if (names.eos) j["eos_token"] = *names.eos;
  if (names.add_bos) j["add_bos_token"] = *names.add_bos;
  if (names.add_eos) j["add_eos_token"] = *names.add_eos;
  if (const auto t = metadata.text("tokenizer.chat_template")) j["chat_template"] = *t;
  return j;
}

void write_tokenizer(const Conversion& c, const fs::path& folder) {
  const GgufMetadata* metadata = c.checkpoint->metadata();
  if (c.tokenizer) {
    for (const char* name : kTokenizerFiles) {
      copy_if_there(c.tokenizer->parent_path() / name, folder);
    }
    // Under its own name where that is not one of the list: tokenizer.model, tokenizer.model.v3.
    write_bytes(folder / c.tokenizer->filename(), read_text(c.tokenizer->string()));
  } else if (metadata != nullptr && has_vocabulary(*metadata)) {
    const GgufVocabulary v = gguf_vocabulary(*metadata);
    if (is_sentencepiece(v)) {
      write_bytes(folder / "tokenizer.model", gguf_sentencepiece(v));
    } else {
      (void)make_gguf_tokenizer(v);  // refuses what is damaged
      write_bytes(folder / "tokenizer.json", gguf_tokenizer_json(v).dump() + "\n");
    }
    write_bytes(folder / "tokenizer_config.json", dump_json(tokenizer_config(v, *metadata), 2));
  }
}

void write_folder(const Conversion& c, const fs::path& folder) {
  std::error_code error;
  if (fs::equivalent(folder, c.source.folder, error)) {
    throw Error(ErrorKind::usage, fmt::format("{} is where the model comes from", folder.string()),
                "name another folder");
  }
  const bool made = fs::create_directories(folder, error);
  if (error) {
    throw Error(ErrorKind::file,
                fmt::format("cannot make the folder {}: {}", folder.string(), error.message()));
  }
  try {
    write_safetensors(folder / "model.safetensors", c.model->hugging_face_tensors());
    if (c.model->config().layout == "huggingface") {
      copy_if_there(c.source.folder / "config.json", folder);
    } else {
      write_bytes(folder / "config.json", dump_json(c.model->hugging_face_config(), 2));
    }
    if (!c.source.gguf) copy_if_there(c.source.folder / "generation_config.json", folder);
    if (c.with_tokenizer) write_tokenizer(c, folder);
  } catch (...) {
    // Nothing is left: neither half a model nor an empty folder.
    if (made) fs::remove_all(folder, error);
    throw;
  }
}

void write_gguf_file(const Conversion& c, const fs::path& file) {
  std::error_code error;
  if (fs::equivalent(file, c.source.checkpoint, error)) {
    throw Error(ErrorKind::usage, fmt::format("{} is the model itself", file.string()),
                "name another file");
  }
  GgufKeys keys;
  c.model->gguf_keys(keys);
  keys.text("general.name", fs::path(c.source.name).lexically_normal().stem().string());
  const GgufMetadata* metadata = c.checkpoint->metadata();
  const int64_t rows = c.model->config().vocab_rows;
  if (c.with_tokenizer && c.tokenizer) {
    add_vocabulary_keys(read_gguf_vocabulary(*c.tokenizer), rows, keys);
    if (const auto t = chat_template_source(c.tokenizer->parent_path())) {
      keys.text("tokenizer.chat_template", *t);
    }
  } else if (c.with_tokenizer && metadata != nullptr && has_vocabulary(*metadata)) {
    const GgufVocabulary v = gguf_vocabulary(*metadata);
    (void)make_gguf_tokenizer(v);  // refuses what is damaged
    add_vocabulary_keys(v, rows, keys);
    if (const auto t = metadata->text("tokenizer.chat_template")) {
      keys.text("tokenizer.chat_template", *t);
    }
  } else {
    keys.text("tokenizer.ggml.model", kNoVocabulary);
  }
  write_gguf(file, keys, c.model->gguf_tensors());
}

int convert(const ConvertFlags& flags, const CommonFlags& common) {
  const fs::path target = flags.target;
  const std::string extension = target.extension().string();
  if (extension == ".safetensors" || extension == ".bin") {
    throw Error(ErrorKind::usage,
                fmt::format("{}: expected a folder or a .gguf file to write", flags.target),
                "a folder gets model.safetensors, config.json and the tokenizer");
  }
  std::optional<DType> dtype;
  if (flags.dtype != "auto") dtype = parse_dtype(flags.dtype);

  Conversion c;
  c.source = find_model(flags.source);
  c.checkpoint = open_checkpoint(c.source.checkpoint);
  const ModelConfig config = read_config(c.source, *c.checkpoint);
  c.model = std::make_unique<ModelExport>(config, *c.checkpoint, dtype);
  c.with_tokenizer = !flags.no_tokenizer;
  if (c.with_tokenizer) c.tokenizer = find_tokenizer_path(c.source, config, flags.tokenizer);
  const bool gguf = extension == ".gguf";
  if (gguf) {
    write_gguf_file(c, target);
  } else {
    write_folder(c, target);
  }
  if (!common.quiet) {
    std::error_code error;
    const fs::path written = gguf ? target : target / "model.safetensors";
    fmt::print(stderr, "{}: {} in {}\n", flags.target, human_bytes(fs::file_size(written, error)),
               dtype_name(c.model->dtype()));
  }
  return 0;
}

}  // namespace

Command add_convert_command(CLI::App& app, CommonFlags& common) {
  CLI::App* sub = app.add_subcommand(
      "convert", "Write a model for transformers (a folder) or llama.cpp (GGUF)");
  auto flags = std::make_shared<ConvertFlags>();
  sub->add_option("SRC", flags->source, "The model, as for -m of run")->required()->type_name("");
  sub->add_option("DST", flags->target, "A folder, or a file that ends in .gguf")
      ->required()
      ->type_name("");
  with_env(sub->add_option("--dtype", flags->dtype,
                           "Matrices as auto (as in SRC; f16 if quantised), f32, bf16, f16"))
      ->check(
          CLI::IsMember({"auto", "f32", "bf16", "f16", "float32", "bfloat16", "float16", "half"}))
      ->type_name("DTYPE");
  with_env(sub->add_option("--tokenizer", flags->tokenizer,
                           "tokenizer.json, tokenizer.model or a folder that holds one (default: "
                           "the model's)"))
      ->type_name("PATH");
  sub->add_flag("--no-tokenizer", flags->no_tokenizer, "Leave the tokenizer out");
  add_common_flags(*sub, common);
  return {sub, [flags, &common] { return convert(*flags, common); }};
}

}  // namespace krait
