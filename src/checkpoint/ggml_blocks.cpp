// Layouts, fields in the order of the file; d, m, dmin are IEEE halves, lo and hi the nibbles of a
// byte, x[j] the value of element j:
//
//   Q4_0  32 elements, 18 bytes   d, q[16]             x[j] = d * (lo(q[j]) - 8), x[j+16] from hi
//   Q4_1  32           20         d, m, q[16]          x[j] = d * lo(q[j]) + m, x[j+16] from hi
//   Q5_0  32           22         d, h[4], q[16]       as Q4_0 with bit j of h as bit 4, minus 16
//   Q5_1  32           24         d, m, h[4], q[16]    as Q4_1 with bit j of h as bit 4
//   Q8_0  32           34         d, q[32]             x[j] = d * q[j], q signed
//
// Super-blocks of 256 elements; sub-block s has a scale (and a minimum) of a few bits:
//
//   Q2_K  84 bytes   scale[16], q[64], d, dmin         16 sub-blocks of 16 elements of 2 bits
//   Q3_K  110        h[32], q[64], scale[12], d        16 of 16; h holds bit 2, inverted
//   Q4_K  144        d, dmin, scale[12], q[128]        8 of 32 elements of 4 bits
//   Q5_K  176        d, dmin, scale[12], h[32], q[128] 8 of 32; h holds bit 4
//   Q6_K  210        q[128], h[64], scale[16], d       16 of 16; h holds bits 4 and 5, minus 32
//
// The order of the float operations is that of the gguf Python package and of ggml, so that values
// are equal bit for bit (tests/unit/ggml_blocks_test.cpp). No expression here may be contracted
// into a fused multiply-add, which would round once where the reference rounds twice.
#include "checkpoint/ggml_blocks.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/dtype.h"

namespace krait {

namespace {

constexpr int kSuper = 256;  // elements of a super-block

/// The fields of one block, read in their order.
class Fields {
 public:
  explicit Fields(const std::byte* block) : at_(reinterpret_cast<const uint8_t*>(block)) {}

  [[nodiscard]] const uint8_t* bytes(int n) {
    const uint8_t* field = at_;
    at_ += n;
    return field;
  }
  [[nodiscard]] float half() {
    f16_t h;
    std::memcpy(&h.bits, bytes(2), sizeof h.bits);
    return static_cast<float>(h);
  }
  [[nodiscard]] uint32_t word() {
    uint32_t w = 0;
    std::memcpy(&w, bytes(4), sizeof w);
    return w;
  }

 private:
  const uint8_t* at_;
};

/// The number of a nibble, bit or pair of bits as the float it counts for.
float real(int v) { return static_cast<float>(v); }

const uint8_t* at(const uint8_t* field, int i) { return field + i; }
int lo(uint8_t byte) { return byte & 15; }
int hi(uint8_t byte) { return byte >> 4; }
int bit(uint32_t word, int i) { return static_cast<int>(word >> i & 1U); }

void q4_0(Fields f, float* x) {
  const float d = f.half();
  const uint8_t* q = f.bytes(16);
  for (int j = 0; j < 16; ++j) {
    x[j] = d * real(lo(q[j]) - 8);
    x[j + 16] = d * real(hi(q[j]) - 8);
  }
}

void q4_1(Fields f, float* x) {
  const float d = f.half();
  const float m = f.half();
  const uint8_t* q = f.bytes(16);
  for (int j = 0; j < 16; ++j) {
    x[j] = d * real(lo(q[j])) + m;
    x[j + 16] = d * real(hi(q[j])) + m;
  }
}

void q5_0(Fields f, float* x) {
  const float d = f.half();
  const uint32_t h = f.word();
  const uint8_t* q = f.bytes(16);
  for (int j = 0; j < 16; ++j) {
    x[j] = d * real((lo(q[j]) | bit(h, j) << 4) - 16);
    x[j + 16] = d * real((hi(q[j]) | bit(h, j + 16) << 4) - 16);
  }
}

void q5_1(Fields f, float* x) {
  const float d = f.half();
  const float m = f.half();
  const uint32_t h = f.word();
  const uint8_t* q = f.bytes(16);
  for (int j = 0; j < 16; ++j) {
    x[j] = d * real(lo(q[j]) | bit(h, j) << 4) + m;
    x[j + 16] = d * real(hi(q[j]) | bit(h, j + 16) << 4) + m;
  }
}

void q8_0(Fields f, float* x) {
  const float d = f.half();
  const uint8_t* q = f.bytes(32);
  for (int j = 0; j < 32; ++j) x[j] = real(static_cast<int8_t>(q[j])) * d;
}

// Q2_K and Q3_K: sub-block s = 8 * half + 2 * pair + side takes bits 2 * pair of the 16 bytes
// q[32 * half + 16 * side ...].

void q2_k(Fields f, float* x) {
  const uint8_t* scale = f.bytes(16);
  const uint8_t* q = f.bytes(64);
  const float d = f.half();
  const float dmin = f.half();
  for (int s = 0; s < 16; ++s) {
    const uint8_t* part = at(q, 32 * (s / 8) + 16 * (s % 2));
    const int shift = 2 * (s / 2 % 4);
    const float ds = d * real(lo(scale[s]));
    const float ms = dmin * real(hi(scale[s]));
    for (int j = 0; j < 16; ++j) x[16 * s + j] = ds * real(part[j] >> shift & 3) - ms;
  }
}

void q3_k(Fields f, float* x) {
  const uint8_t* h = f.bytes(32);
  const uint8_t* q = f.bytes(64);
  const uint8_t* scale = f.bytes(12);
  const float d = f.half();
  for (int s = 0; s < 16; ++s) {
    // Six bits of scale: four from a nibble of the first eight bytes, two from the last four bytes.
    const int low = s < 8 ? lo(scale[s]) : hi(scale[s - 8]);
    const int high = scale[8 + s % 4] >> (2 * (s / 4)) & 3;
    const float ds = d * real((low | high << 4) - 32);
    const uint8_t* part = at(q, 32 * (s / 8) + 16 * (s % 2));
    const uint8_t* part_h = at(h, 16 * (s % 2));
    const int shift = 2 * (s / 2 % 4);
    for (int j = 0; j < 16; ++j) {
      const int below = bit(part_h[j], s / 2) != 0 ? 0 : 4;
      x[16 * s + j] = ds * real((part[j] >> shift & 3) - below);
    }
  }
}

/// Scale and minimum of the eight sub-blocks of Q4_K and Q5_K, six bits each: those of 0 to 3 in
/// the low bits of bytes 0 to 7; of 4 to 7 in bytes 8 to 11, their upper bits in bytes 0 to 7.
struct ScaleMin {
  int scale;
  int min;
};
ScaleMin scale_min(const uint8_t* p, int s) {
  if (s < 4) return {p[s] & 63, p[s + 4] & 63};
  return {lo(p[s + 4]) | (p[s - 4] >> 6) << 4, hi(p[s + 4]) | (p[s] >> 6) << 4};
}

void q4_k(Fields f, float* x) {
  const float d = f.half();
  const float dmin = f.half();
  const uint8_t* scale = f.bytes(12);
  const uint8_t* q = f.bytes(128);
  for (int s = 0; s < 8; ++s) {
    const ScaleMin sm = scale_min(scale, s);
    const float ds = d * real(sm.scale);
    const float ms = dmin * real(sm.min);
    const uint8_t* part = at(q, 32 * (s / 2));
    for (int j = 0; j < 32; ++j) {
      x[32 * s + j] = ds * real(s % 2 == 0 ? lo(part[j]) : hi(part[j])) - ms;
    }
  }
}

void q5_k(Fields f, float* x) {
  const float d = f.half();
  const float dmin = f.half();
  const uint8_t* scale = f.bytes(12);
  const uint8_t* h = f.bytes(32);
  const uint8_t* q = f.bytes(128);
  for (int s = 0; s < 8; ++s) {
    const ScaleMin sm = scale_min(scale, s);
    const float ds = d * real(sm.scale);
    const float ms = dmin * real(sm.min);
    const uint8_t* part = at(q, 32 * (s / 2));
    for (int j = 0; j < 32; ++j) {
      const int low = s % 2 == 0 ? lo(part[j]) : hi(part[j]);
      x[32 * s + j] = ds * real(low | bit(h[j], s) << 4) - ms;
    }
  }
}

void q6_k(Fields f, float* x) {
  const uint8_t* q = f.bytes(128);
  const uint8_t* h = f.bytes(64);
  const uint8_t* scale = f.bytes(16);
  const float d = f.half();
  // Group g of 32 elements: 4 to a half; low bits in nibble g / 2 % 2 of q[64 * half + 32 * (g % 2)
  // ...], high bits at 2 * (g % 4) of h[32 * half ...].
  for (int g = 0; g < 8; ++g) {
    const uint8_t* part = at(q, 64 * (g / 4) + 32 * (g % 2));
    const uint8_t* part_h = at(h, 32 * (g / 4));
    for (int j = 0; j < 32; ++j) {
      const int low = g / 2 % 2 == 0 ? lo(part[j]) : hi(part[j]);
      const int high = part_h[j] >> (2 * (g % 4)) & 3;
      const float ds = d * real(static_cast<int8_t>(scale[2 * g + j / 16]));
      x[32 * g + j] = ds * real((low | high << 4) - 32);
    }
  }
}

template <void (*Block)(Fields, float*), int kElements, int kBytes>
void all_blocks(const std::byte* blocks, int64_t n_block, float* out) {
  for (int64_t i = 0; i < n_block; ++i) Block(Fields(blocks + i * kBytes), out + i * kElements);
}

template <void (*Block)(Fields, float*), int kElements, int kBytes>
constexpr BlockFormat format(std::string_view name) {
  return {name, kElements, kBytes, all_blocks<Block, kElements, kBytes>};
}

constexpr std::array kFormats{
    format<q4_0, 32, 18>("Q4_0"),      format<q4_1, 32, 20>("Q4_1"),
    format<q5_0, 32, 22>("Q5_0"),      format<q5_1, 32, 24>("Q5_1"),
    format<q8_0, 32, 34>("Q8_0"),      format<q2_k, kSuper, 84>("Q2_K"),
    format<q3_k, kSuper, 110>("Q3_K"), format<q4_k, kSuper, 144>("Q4_K"),
    format<q5_k, kSuper, 176>("Q5_K"), format<q6_k, kSuper, 210>("Q6_K"),
};

}  // namespace

const BlockFormat* find_block_format(std::string_view name) {
  const auto* it = std::find_if(kFormats.begin(), kFormats.end(),
                                [&](const BlockFormat& f) { return f.name == name; });
  return it == kFormats.end() ? nullptr : it;
}

}  // namespace krait
