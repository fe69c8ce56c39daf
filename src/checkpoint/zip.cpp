// Zip (PKWARE APPNOTE 6.3): local headers with data, then the central directory, then its end
// record.
#include "checkpoint/zip.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "checkpoint/parse.h"

namespace krait {
namespace {

constexpr uint32_t kLocalHeader = 0x04034b50;
constexpr uint32_t kCentralHeader = 0x02014b50;
constexpr uint32_t kEnd = 0x06054b50;
constexpr uint32_t kEnd64 = 0x06064b50;
constexpr uint32_t kEnd64Locator = 0x07064b50;
constexpr size_t kLocalSize = 30;
constexpr size_t kCentralSize = 46;
constexpr size_t kEndSize = 22;
constexpr size_t kEnd64Size = 56;
constexpr size_t kLocatorSize = 20;
constexpr size_t kMaxComment = 0xffff;
constexpr uint16_t kExtra64 = 0x0001;
constexpr uint16_t kEncrypted = 0x0001;

class Reader {
 public:
  Reader(std::span<const std::byte> file, const std::string& name) : file_(file), name_(name) {}

  template <typename T>
  [[nodiscard]] T get(uint64_t at) const {
    T v;
    std::memcpy(&v, range(at, sizeof v).data(), sizeof v);
    return v;
  }
  [[nodiscard]] std::span<const std::byte> range(uint64_t at, uint64_t n) const {
    if (at > file_.size() || n > file_.size() - at) {
      fail(fmt::format("expected {} bytes at offset {}, the file has {}", n, at, file_.size()));
    }
    return file_.subspan(at, n);
  }
  [[nodiscard]] std::string_view text(uint64_t at, uint64_t n) const {
    return {reinterpret_cast<const char*>(range(at, n).data()), n};
  }
  void expect(uint64_t at, uint32_t signature, const char* what) const {
    if (get<uint32_t>(at) != signature) fail(fmt::format("expected {} at offset {}", what, at));
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::format, fmt::format("{}: in the zip archive: {}", name_, what),
                "The file is damaged or its download is incomplete.");
  }

 private:
  std::span<const std::byte> file_;
  const std::string& name_;
};

struct Directory {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t entries = 0;
};

/// The end record is the last thing in the file but for a comment, whose length it states.
Directory find_directory(const Reader& r, size_t size) {
  uint64_t end = 0;
  bool found = false;
  for (size_t comment = 0; comment <= kMaxComment && comment + kEndSize <= size; ++comment) {
    end = size - kEndSize - comment;
    found = r.get<uint32_t>(end) == kEnd && r.get<uint16_t>(end + 20) == comment;
    if (found) break;
  }
  if (!found) r.fail("expected the end record of the archive, found none");
  Directory d{r.get<uint32_t>(end + 16), r.get<uint32_t>(end + 12), r.get<uint16_t>(end + 10)};
  if (d.offset != UINT32_MAX && d.bytes != UINT32_MAX && d.entries != UINT16_MAX) return d;
  if (end < kLocatorSize) r.fail("expected a ZIP64 locator before the end record");
  r.expect(end - kLocatorSize, kEnd64Locator, "a ZIP64 locator");
  const auto end64 = r.get<uint64_t>(end - kLocatorSize + 8);
  (void)r.range(end64, kEnd64Size);
  r.expect(end64, kEnd64, "a ZIP64 end record");
  return {r.get<uint64_t>(end64 + 48), r.get<uint64_t>(end64 + 40), r.get<uint64_t>(end64 + 32)};
}

}  // namespace

std::map<std::string, ZipEntry> parse_zip(std::span<const std::byte> file,
                                          const std::string& name) {
  const Reader r(file, name);
  const Directory directory = find_directory(r, file.size());
  (void)r.range(directory.offset, directory.bytes);

  std::map<std::string, ZipEntry> entries;
  std::vector<std::pair<uint64_t, uint64_t>> ranges;  // local header to end of data
  const uint64_t end = directory.offset + directory.bytes;
  uint64_t at = directory.offset;
  while (at < end) {
    if (end - at < kCentralSize) r.fail("the central directory ends inside an entry");
    r.expect(at, kCentralHeader, "an entry of the central directory");
    const auto flags = r.get<uint16_t>(at + 8);
    const auto method = r.get<uint16_t>(at + 10);
    uint64_t stored = r.get<uint32_t>(at + 20);
    uint64_t unpacked = r.get<uint32_t>(at + 24);
    const uint64_t name_size = r.get<uint16_t>(at + 28);
    const uint64_t extra_size = r.get<uint16_t>(at + 30);
    const uint64_t comment_size = r.get<uint16_t>(at + 32);
    uint64_t header = r.get<uint32_t>(at + 42);
    if (end - at - kCentralSize < name_size + extra_size + comment_size) {
      r.fail("the central directory ends inside an entry");
    }
    const std::string entry(r.text(at + kCentralSize, name_size));

    // ZIP64: the extra field has those of the three that do not fit 32 bits, in this order.
    uint64_t extra = at + kCentralSize + name_size;
    const uint64_t extra_end = extra + extra_size;
    while (extra_end - extra >= 4) {
      const auto id = r.get<uint16_t>(extra);
      const uint64_t n = r.get<uint16_t>(extra + 2);
      if (n > extra_end - extra - 4) r.fail(printable(entry) + " has a broken extra field");
      if (id == kExtra64) {
        uint64_t field = extra + 4;
        for (uint64_t* v : {&unpacked, &stored, &header}) {
          if (*v != UINT32_MAX) continue;
          if (extra + 4 + n - field < 8) r.fail(printable(entry) + " has a broken ZIP64 field");
          *v = r.get<uint64_t>(field);
          field += 8;
        }
      }
      extra += 4 + n;
    }
    at = extra_end + comment_size;

    // The local extra field pads the data to a multiple of 64 and differs from the central one. Its
    // sizes may be zero (they then follow the data), so the central ones count.
    r.expect(header, kLocalHeader, "the header of an entry");
    const uint64_t local_name = r.get<uint16_t>(header + 26);
    const uint64_t local_extra = r.get<uint16_t>(header + 28);
    if (r.text(header + kLocalSize, local_name) != entry) {
      r.fail(printable(entry) + " has another name in its own header");
    }
    const uint64_t begin = header + kLocalSize + local_name + local_extra;
    const bool plain = method == 0 && (flags & kEncrypted) == 0;
    if (plain && stored != unpacked) r.fail(printable(entry) + " has two different sizes");
    const auto data = r.range(begin, stored);
    if (begin + stored > directory.offset) {
      r.fail(printable(entry) + " overlaps the central directory");
    }
    ranges.emplace_back(header, begin + stored);
    if (!entries.emplace(entry, ZipEntry{data, plain}).second) {
      r.fail(printable(entry) + " occurs twice");
    }
  }
  if (entries.size() != directory.entries) {
    r.fail(fmt::format("expected {} entries, found {}", directory.entries, entries.size()));
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) r.fail("two entries overlap");
  }
  return entries;
}

}  // namespace krait
