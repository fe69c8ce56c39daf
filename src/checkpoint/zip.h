// The zip archive around a PyTorch checkpoint. torch.save stores its entries uncompressed, so that
// an entry is a range of the file.
#pragma once

#include <map>
#include <span>
#include <string>

namespace krait {

struct ZipEntry {
  std::span<const std::byte> data;  ///< as stored
  bool plain = true;                ///< neither compressed nor encrypted
};

/// Entries by name, ZIP64 included. Every range lies inside the file and no two overlap. Checksums
/// are not compared: that would read the whole file, and torch.save may leave them out.
[[nodiscard]] std::map<std::string, ZipEntry> parse_zip(std::span<const std::byte> file,
                                                        const std::string& name);

}  // namespace krait
