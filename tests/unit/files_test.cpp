// MappedFile and OutputFile: ownership, and what is left behind.
#include <gtest/gtest.h>

#include "base/mapped_file.h"
#include "base/output_file.h"
#include "support/test_support.h"

namespace krait::test {
namespace {

namespace fs = std::filesystem;

std::string text(const MappedFile& f) {
  return {reinterpret_cast<const char*>(f.bytes().data()), f.bytes().size()};
}

TEST(MappedFile, MovesItsMapping) {
  const ScratchDir dir;
  write_file(dir.path() / "a", "alpha");
  write_file(dir.path() / "b", "beta");
  MappedFile a(dir.path() / "a");
  const std::byte* where = a.bytes().data();
  MappedFile b(std::move(a));
  EXPECT_EQ(b.bytes().data(), where) << "views into the mapping stay valid";
  b = MappedFile(dir.path() / "b");
  EXPECT_EQ(text(b), "beta");
}

TEST(MappedFile, OutlivesTheName) {
  const ScratchDir dir;
  write_file(dir.path() / "a", "alpha");
  const MappedFile a(dir.path() / "a");
  fs::remove(dir.path() / "a");
  EXPECT_EQ(text(a), "alpha");
}

TEST(MappedFile, EmptyFileHasNoBytes) {
  const ScratchDir dir;
  write_file(dir.path() / "e", "");
  EXPECT_TRUE(MappedFile(dir.path() / "e").bytes().empty());
}

TEST(MappedFile, SaysWhatIsWrong) {
  const ScratchDir dir;
  EXPECT_TRUE(throws(ErrorKind::file, "No such file", [&] { MappedFile(dir.path() / "none"); }));
  EXPECT_TRUE(throws(ErrorKind::file, "found a folder", [&] { MappedFile(dir.path()); }));
}

TEST(OutputFile, AppearsWholeOrNotAtAll) {
  const ScratchDir dir;
  const fs::path file = dir.path() / "f";
  const auto bytes = [](std::string_view s) { return std::as_bytes(std::span(s)); };
  write_file(file, "old");
  {
    OutputFile out(file);
    out.write(bytes("new, but never finished"));
    EXPECT_EQ(read_file(file), "old");
  }
  EXPECT_EQ(read_file(file), "old");
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path()), {}), 1) << "a temporary file is left";
  {
    // Two writers of one file do not share a temporary file; the last to commit wins.
    OutputFile first(file);
    OutputFile second(file);
    first.write(bytes("first"));
    second.write(bytes("second"));
    second.commit();
    first.commit();
  }
  EXPECT_EQ(read_file(file), "first");
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path()), {}), 1);
}

}  // namespace
}  // namespace krait::test
