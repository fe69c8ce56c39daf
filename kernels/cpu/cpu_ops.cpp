#include "kernels/cpu/cpu_ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

namespace krait {

namespace {

constexpr size_t kAlignment = 256;

/// A line of /proc/meminfo in bytes; 0 if there is none.
size_t meminfo(std::string_view key) {
  std::ifstream in("/proc/meminfo");
  std::string name;
  size_t kib = 0;
  std::string unit;
  while (in >> name >> kib) {
    std::getline(in, unit);
    if (name == key) return kib * 1024;
  }
  return 0;
}

/// The first line of that name in /proc/cpuinfo; "" if there is none.
std::string cpuinfo(std::string_view key) {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    const size_t colon = line.find(": ");
    if (colon != std::string::npos && line.starts_with(key)) return line.substr(colon + 2);
  }
  return {};
}

template <typename To, typename From>
void convert(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
}

}  // namespace

DeviceInfo CpuOps::info() const {
  const std::string mhz = cpuinfo("cpu MHz");  // of this moment
  return {.name = fmt::format("CPU ({}, {} thread{})", vectors_, pool_.size(),
                              pool_.size() == 1 ? "" : "s"),
          .processor = cpuinfo("model name"),
          .driver = {},
          .clocks = mhz.empty() ? mhz : mhz.substr(0, mhz.find('.')) + " MHz",
          .memory_total = meminfo("MemTotal:"),
          .memory_free = meminfo("MemAvailable:")};
}

Buffer CpuOps::allocate(size_t bytes, std::string_view what) {
  // The system promises memory that it does not have, and ends the process that uses it: ask first.
  const size_t available = meminfo("MemAvailable:");
  void* data = nullptr;
  if (available == 0 || bytes <= available) {
    const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    data = std::aligned_alloc(kAlignment, rounded);
  }
  if (data == nullptr) {
    throw Error(ErrorKind::device,
                fmt::format("not enough memory for {}: {} bytes are needed, {} are free", what,
                            bytes, available),
                "use a smaller model or type, fewer sequences or a smaller --prefill-chunk");
  }
  return {data, bytes, [](void* p, size_t) noexcept { std::free(p); }};
}

void CpuOps::upload(void* dst, const void* src, size_t bytes) { copy(dst, src, bytes); }

void CpuOps::download(void* dst, const void* src, size_t bytes) { copy(dst, src, bytes); }

void CpuOps::copy(void* dst, const void* src, size_t bytes) {
  if (bytes > 0) std::memmove(dst, src, bytes);
}

void CpuOps::zero(void* dst, size_t bytes) {
  if (bytes > 0) std::memset(dst, 0, bytes);
}

Tensor CpuOps::import_weight(const Tensor& host, DType dtype) {
  const auto address = reinterpret_cast<uintptr_t>(host.data);
  if (host.dtype == dtype && address % itemsize(dtype) == 0) return host;

  const int64_t n = host.numel();
  Buffer buffer = allocate(static_cast<size_t>(n) * itemsize(dtype), "a converted weight");
  visit_dtype(host.dtype, "a weight of the file", [&](auto from) {
    visit_dtype(dtype, "a weight", [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const auto* source = static_cast<const std::byte*>(host.data);
      auto* target = static_cast<To*>(buffer.data());
      pool_.parallel_for(n, 1 << 16, [&](int64_t begin, int64_t end) {
        // A file need not align its tensors, so elements pass through a small aligned copy.
        From part[1024];
        for (int64_t i = begin; i < end; i += std::ssize(part)) {
          const int64_t m = std::min<int64_t>(end - i, std::ssize(part));
          std::memcpy(part, source + static_cast<size_t>(i) * sizeof(From),
                      static_cast<size_t>(m) * sizeof(From));
          convert(target + i, part, m);
        }
      });
    });
  });
  const Tensor weight(buffer.data(), dtype, host.shape);
  weights_.push_back(std::move(buffer));
  return weight;
}

void CpuOps::post(std::vector<int32_t> tokens) {
  constexpr size_t kMaxPosts = 8;
  if (mailbox_.size() == kMaxPosts) {
    throw Error(ErrorKind::runtime, "sample: 8 posts wait in the mailbox, no more fit");
  }
  mailbox_.push_back(std::move(tokens));
}

void CpuOps::receive(std::span<int32_t> tokens) {
  if (mailbox_.empty() || mailbox_.front().size() != tokens.size()) {
    throw Error(
        ErrorKind::runtime,
        fmt::format("receive: expected {} tokens in the mailbox, found {}", tokens.size(),
                    mailbox_.empty() ? "no post" : std::to_string(mailbox_.front().size())));
  }
  std::copy(mailbox_.front().begin(), mailbox_.front().end(), tokens.begin());
  mailbox_.pop_front();
}

namespace {

/// One long range for each thread: the hardware prefetcher likes that best.
int64_t range_of_a_thread(int64_t n, int threads) { return (n + threads - 1) / threads; }

}  // namespace

double CpuOps::seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void CpuOps::stream_copy(void* dst, const void* src, size_t bytes) {
  // memcpy goes past the caches from some size on, which spares reading what it overwrites.
  const auto n = static_cast<int64_t>(bytes);
  pool_.parallel_for(n, range_of_a_thread(n, pool_.size()), [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<std::byte*>(dst) + begin, static_cast<const std::byte*>(src) + begin,
                static_cast<size_t>(end - begin));
  });
}

void CpuOps::stream_read(void* sum, const void* src, size_t bytes) {
  std::atomic<uint32_t> total{0};
  const auto* words = static_cast<const uint32_t*>(src);
  const auto n = static_cast<int64_t>(bytes / sizeof(uint32_t));
  pool_.parallel_for(n, range_of_a_thread(n, pool_.size()), [&](int64_t begin, int64_t end) {
    uint32_t part = 0;
    for (int64_t i = begin; i < end; ++i) part ^= words[i];
    total ^= part;
  });
  *static_cast<uint32_t*>(sum) = total;
}

}  // namespace krait
