// GGUF's blocks -> codes, scales and supers in the interleaved order, and codes that are one a byte likewise.
// checkpoint/formats/gguf.py says in plain torch what each type means; this does it at the disk's pace.
#pragma once
#include "matrix.h"

namespace {

constexpr int MOST_BLOCK = 256;  // weights of a block, at most

// One block of one row: its codes, one a byte; scales and offsets of its groups as the bits they have in a
// matrix, and what these are multiplied by.
struct Block {
  uint8_t values[MOST_BLOCK];
  uint16_t scales[16], offsets[16];
  uint16_t super, super_offset;
};

INLINE uint16_t half_at(const uint8_t* at) { return (uint16_t)(at[0] | at[1] << 8); }
constexpr uint16_t MINUS = 0x8000;

// `count` bytes' low halves, and behind them their high ones.
INLINE void put_nibbles(const uint8_t* from, int count, uint8_t* to) {
  for (int i = 0; i < count; i++) to[i] = from[i] & 15, to[count + i] = from[i] >> 4;
}
// Bits of column i, `bits` of them from bit i / run * bits of byte i % run on, moved up by `up`, added in.
INLINE void add_bits(const uint8_t* from, int run, int bits, int up, uint8_t* to) {
  for (int part = 0; part < 8 / bits; part++)
    for (int i = 0; i < run; i++)
      to[part * run + i] |= (uint8_t)(((from[i] >> (part * bits)) & ((1 << bits) - 1)) << up);
}
INLINE void add_fifth_bits(const uint8_t* from, uint8_t* to) {
  for (int i = 0; i < 32; i++) to[i] |= (uint8_t)((from[i / 8] >> (i % 8) & 1) << 4);
}
INLINE void add_to_all(uint8_t* to, int count, int what) {
  for (int i = 0; i < count; i++) to[i] = (uint8_t)(to[i] + what);
}
// The eight 6-bit scales and minima of Q4_K and Q5_K, in 12 bytes.
INLINE void put_scales_and_minima(const uint8_t* from, Block& to) {
  for (int i = 0; i < 4; i++) {
    const uint8_t a = from[i], b = from[4 + i], c = from[8 + i];
    to.scales[i] = a & 63, to.scales[4 + i] = (c & 15) | (a >> 2 & 48);
    to.offsets[i] = b & 63, to.offsets[4 + i] = c >> 4 | (b >> 2 & 48);
  }
}
INLINE void put_supers(const uint8_t* at, Block& to) {  // the second is that of what is taken away
  to.super = half_at(at), to.super_offset = half_at(at + 2) ^ MINUS;
}

void q4_0(const uint8_t* from, Block& to) {
  to.scales[0] = half_at(from);
  put_nibbles(from + 2, 16, to.values);
}
void q4_1(const uint8_t* from, Block& to) {
  to.scales[0] = half_at(from), to.offsets[0] = half_at(from + 2);
  put_nibbles(from + 4, 16, to.values);
}
void q5_0(const uint8_t* from, Block& to) {
  to.scales[0] = half_at(from);
  put_nibbles(from + 6, 16, to.values);
  add_fifth_bits(from + 2, to.values);
  add_to_all(to.values, 32, 128 - 16);
}
void q5_1(const uint8_t* from, Block& to) {
  to.scales[0] = half_at(from), to.offsets[0] = half_at(from + 2);
  put_nibbles(from + 8, 16, to.values);
  add_fifth_bits(from + 4, to.values);
  add_to_all(to.values, 32, 128);
}
void q8_0(const uint8_t* from, Block& to) {
  to.scales[0] = half_at(from);
  for (int i = 0; i < 32; i++) to.values[i] = from[2 + i] ^ 128;
}
void q2_k(const uint8_t* from, Block& to) {
  for (int g = 0; g < 16; g++) to.scales[g] = from[g] & 15, to.offsets[g] = from[g] >> 4;
  put_supers(from + 80, to);
  memset(to.values, 0, 256);
  for (int half = 0; half < 2; half++) add_bits(from + 16 + 32 * half, 32, 2, 0, to.values + 128 * half);
}
void q3_k(const uint8_t* from, Block& to) {
  for (int g = 0; g < 16; g++) {
    const int low = g < 8 ? from[96 + g] & 15 : from[96 + g - 8] >> 4;
    const int high = from[104 + g % 4] >> (g / 4 * 2) & 3;
    to.scales[g] = (uint8_t)((low | high << 4) - 32);
  }
  to.super = half_at(from + 108);
  memset(to.values, 0, 256);
  for (int half = 0; half < 2; half++) add_bits(from + 32 + 32 * half, 32, 2, 0, to.values + 128 * half);
  add_bits(from, 32, 1, 2, to.values);
  add_to_all(to.values, 256, 4);
}
void q4_k(const uint8_t* from, Block& to) {
  put_supers(from, to);
  put_scales_and_minima(from + 4, to);
  for (int run = 0; run < 4; run++) put_nibbles(from + 16 + 32 * run, 32, to.values + 64 * run);
}
void q5_k(const uint8_t* from, Block& to) {
  put_supers(from, to);
  put_scales_and_minima(from + 4, to);
  for (int run = 0; run < 4; run++) put_nibbles(from + 48 + 32 * run, 32, to.values + 64 * run);
  add_bits(from + 16, 32, 1, 4, to.values);
  add_to_all(to.values, 256, 128);
}
void q6_k(const uint8_t* from, Block& to) {
  for (int g = 0; g < 16; g++) to.scales[g] = from[192 + g];
  to.super = half_at(from + 208);
  for (int half = 0; half < 2; half++) {
    put_nibbles(from + 64 * half, 64, to.values + 128 * half);
    add_bits(from + 128 + 32 * half, 32, 2, 4, to.values + 128 * half);
  }
  add_to_all(to.values, 256, 128 - 32);
}
void iq4_xs(const uint8_t* from, Block& to) {
  for (int g = 0; g < 8; g++) {
    const int low = from[4 + g / 2] >> (g % 2 * 4) & 15, high = from[2 + g / 4] >> (g % 4 * 2) & 3;
    to.scales[g] = (uint8_t)((low | high << 4) - 32);
  }
  to.super = half_at(from);
  for (int run = 0; run < 8; run++) put_nibbles(from + 8 + 16 * run, 16, to.values + 32 * run);
}

// By the numbers that ggml gives its types.
struct BlockType {
  int number, weights, bytes;
  void (*unpack)(const uint8_t*, Block&);
};
constexpr BlockType BLOCK_TYPES[] = {
    {2, 32, 18, q4_0},    {3, 32, 20, q4_1},    {6, 32, 22, q5_0},    {7, 32, 24, q5_1},
    {8, 32, 34, q8_0},    {10, 256, 84, q2_k},  {11, 256, 110, q3_k}, {12, 256, 144, q4_k},
    {13, 256, 176, q5_k}, {14, 256, 210, q6_k}, {20, 32, 18, q4_0},   {23, 256, 136, iq4_xs},
};

// Rows [rows, cols] of blocks into w, which has their kind, group and scales. False for an unknown type.
bool unpack_rows(int type, const uint8_t* raw, int rows, const Matrix& w, uint8_t* codes, uint8_t* scales,
                 uint16_t* supers) {
  const auto* found = std::find_if(std::begin(BLOCK_TYPES), std::end(BLOCK_TYPES),
                                   [=](const BlockType& each) { return each.number == type; });
  if (found == std::end(BLOCK_TYPES)) return false;
  const int groups = w.groups(), each = found->weights / w.group, blocks = w.cols / found->weights;
  const int numbers = w.numbers(), record = w.scale_bytes();
  const size_t width = (size_t)groups * w.group * LANES * w.bits() / 8, stride = (size_t)blocks * found->bytes;
  Block block = {};
  const auto put_number = [&](uint8_t* at, int lane, uint16_t number) {
    if (w.number == OF_I8) at[lane] = (uint8_t)number;
    else memcpy(at + 2 * lane, &number, 2);
  };
  for (int row = 0; row < blocks_of(rows) * LANES; row++) {
    const int lane = row % LANES;
    uint8_t* const to = codes + row / LANES * width;
    uint8_t* const scale = scales + (size_t)(row / LANES) * groups * record;
    const size_t super_at = (size_t)(row / LANES) * blocks * numbers + lane;
    if (row >= rows) block = {};  // zeros stand beyond the last row
    for (int b = 0; b < blocks; b++) {
      if (row < rows) found->unpack(raw + row * stride + (size_t)b * found->bytes, block);
      put_codes(block.values, b * found->weights, found->weights, w.bits(), lane, to);
      for (int g = 0; g < each; g++) {
        uint8_t* const at = scale + (size_t)(b * each + g) * record;
        put_number(at, lane, block.scales[g]);
        if (w.offset) put_number(at + record / 2, lane, block.offsets[g]);
      }
      if (w.number != OF_I8) continue;
      uint16_t* const super = supers + super_at + (size_t)b * numbers;
      super[0] = block.super;
      if (w.offset) super[LANES] = block.super_offset;
    }
  }
  return true;
}

// values [rows, cols], a code a byte, to codes of whole blocks and groups; zeros stand beyond.
void interleave_rows(const uint8_t* values, int rows, int cols, int bits, int group, uint8_t* codes) {
  const int padded = (cols + group - 1) / group * group;
  std::vector<uint8_t> row(padded, 0);
  for (int r = 0; r < blocks_of(rows) * LANES; r++) {
    if (r < rows) memcpy(row.data(), values + (size_t)r * cols, cols);
    else std::fill(row.begin(), row.end(), 0);
    put_codes(row.data(), 0, padded, bits, r % LANES, codes + (size_t)(r / LANES) * padded * LANES * bits / 8);
  }
}

}  // namespace
