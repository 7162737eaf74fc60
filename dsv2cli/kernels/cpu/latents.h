// Latents in the pages of the pool: as they are in bf16, or in codes of 8, 6 or 4 bits. latents.py says in plain
// torch what codes stand for and how a page holds them.
#pragma once
#include "streams.h"

// The pages of some tokens' sequences; native.py's Pages is its twin. `page` is the way from one page to the
// next, in bytes. With 16 bits a layer of a page holds latents one after the other, else codes, keys, scales.
struct Pages {
  char* const* layers;         // [layers]: where the first page of each begins
  const int32_t* const* rows;  // [n]: of each token the numbers of its sequence's pages, in order
  int64_t page;
  int32_t bits;
};

namespace {

constexpr int PAGE_TOKENS = 64;  // formats.py's PAGE

INLINE uint16_t narrow_finite(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE float middle_of(int bits) { return ((1 << bits) - 1) * 0.5f; }  // what is taken from a code

// A number of a cached token as attention takes it; and numbers in bf16 as such, in `room` where they must be.
typedef std::conditional_t<FLOATS, float, uint16_t> Cell;
INLINE void to_cells(const uint16_t* x, int size, float* out) { widen_row(x, size, out); }
INLINE void to_cells(const uint16_t* x, int size, uint16_t* out) { memcpy(out, x, 2 * size); }
INLINE const float* as_cells(const uint16_t* x, int size, float* room) { return widen_row(x, size, room), room; }
INLINE const uint16_t* as_cells(const uint16_t* x, int, uint16_t*) { return x; }

// Codes of `bits` bits as numbers, in plane after plane, see latents.py's `together`.
NOINLINE void apart(const uint8_t* data, int bits, int size, float scale, Cell* out) {
  const float middle = middle_of(bits);
  const auto put = [&](int i, int code) {
    const float value = ((float)code - middle) * scale;
    if constexpr (FLOATS) out[i] = value;
    else out[i] = narrow_finite(value);
  };
  const int half = size / 2, quarter = size / 4;
  if (bits == 8)
    for (int i = 0; i < size; i++) put(i, data[i]);
  if (bits == 4)
    for (int i = 0; i < half; i++) put(i, data[i] & 15), put(half + i, data[i] >> 4);
  if (bits == 6) {
    const uint8_t* const two = data + half;
    for (int i = 0; i < quarter; i++) {
      put(i, (data[i] & 15) | ((two[i] & 3) << 4));
      put(quarter + i, (data[quarter + i] & 15) | ((two[i] >> 2 & 3) << 4));
      put(half + i, data[i] >> 4 | ((two[i] >> 4 & 3) << 4));
      put(half + quarter + i, data[quarter + i] >> 4 | (two[i] >> 6) << 4);
    }
  }
  if (bits == 12)
    for (int i = 0; i < half; i++) {
      const int four = data[size + i];
      put(i, data[i] | (four & 15) << 8), put(half + i, data[half + i] | (four >> 4) << 8);
    }
}
// The other way round. Gives the scale, in bf16.
NOINLINE uint16_t together(const float* x, int bits, int size, uint8_t* to) {
  const float middle = middle_of(bits);
  const uint16_t scale = narrow(std::max(largest(x, size) / middle, 1e-30f));
  const float divisor = widen(scale);
  const auto code = [&](int i) {
    return (int)std::min(std::max(std::nearbyintf(x[i] / divisor + middle), 0.0f), 2 * middle);
  };
  const int half = size / 2, quarter = size / 4;
  if (bits == 8)
    for (int i = 0; i < size; i++) to[i] = (uint8_t)code(i);
  if (bits == 4)
    for (int i = 0; i < half; i++) to[i] = (uint8_t)(code(i) | code(half + i) << 4);
  if (bits == 6) {
    memset(to + half, 0, quarter);
    for (int i = 0; i < half; i++) {
      const int low = code(i), high = code(half + i);
      to[i] = (uint8_t)((low & 15) | (high & 15) << 4);
      to[half + i % quarter] |= (uint8_t)((low >> 4) << 2 * (i / quarter) | (high >> 4) << 2 * (i / quarter + 2));
    }
  }
  if (bits == 12)
    for (int i = 0; i < half; i++) {
      const int low = code(i), high = code(half + i);
      to[i] = (uint8_t)low, to[half + i] = (uint8_t)high;
      to[size + i] = (uint8_t)(low >> 8 | (high >> 8) << 4);
    }
  return scale;
}
// x [size] in blocks of the largest power of two, each times the orthonormal Hadamard matrix; room [size].
NOINLINE void turn(float* x, int size, float* room) {
  const int block = size & -size, half = block / 2;
  const float root = std::sqrt((float)block);
  for (float* at = x; at < x + size; at += block) {
    float *from = at, *to = room;
    for (int stage = 1; stage < block; stage *= 2, std::swap(from, to))
      for (int i = 0; i < half; i++)
        to[i] = from[2 * i] + from[2 * i + 1], to[half + i] = from[2 * i] - from[2 * i + 1];
    for (int i = 0; i < block; i++) at[i] = from[i] / root;
  }
}

// The latents of one sequence in one layer.
struct Latents {
  char* base;
  const int32_t* pages;
  int64_t page;
  int bits, rank, rope;

  Latents(const Pages& all, int layer, int token, int rank, int rope)
      : base(all.layers[layer]), pages(all.rows[token]), page(all.page), bits(all.bits), rank(rank), rope(rope) {}

  int width() const { return rank + rope; }
  int code_bytes() const { return rank * bits / 8; }
  int key_bits() const { return bits == 8 ? 16 : 12; }
  int key_bytes() const { return rope * key_bits() / 8; }
  int scale_count() const { return bits == 8 ? 1 : 2; }
  char* page_of(int token) const { return base + pages[token / PAGE_TOKENS] * page; }
  // Where the codes, the key and the scales of a token lie.
  uint8_t* codes(int token) const { return (uint8_t*)page_of(token) + token % PAGE_TOKENS * code_bytes(); }
  uint8_t* key(int token) const {
    return (uint8_t*)page_of(token) + PAGE_TOKENS * code_bytes() + token % PAGE_TOKENS * key_bytes();
  }
  uint16_t* scales(int token) const {
    char* const begin = page_of(token) + PAGE_TOKENS * (code_bytes() + key_bytes());
    return (uint16_t*)begin + token % PAGE_TOKENS * scale_count();
  }
  uint16_t* row(int token) const { return (uint16_t*)page_of(token) + (size_t)(token % PAGE_TOKENS) * width(); }

  // Tokens of one page, one after the other: where they lie, if they lie as they are taken, else in `room`. Of
  // codes below 8 bits it is the turned latent.
  const Cell* rows(int first, int count, Cell* room) const {
    if (bits == 16) return as_cells(row(first), count * width(), room);
    for (int t = first; t < first + count; t++) {
      Cell* const out = room + (size_t)(t - first) * width();
      const uint16_t* const scale = scales(t);
      apart(codes(t), bits, rank, widen(scale[0]), out);
      if (key_bits() == 12) apart(key(t), 12, rope, widen(scale[1]), out + rank);
      else to_cells((uint16_t*)key(t), rope, out + rank);
    }
    return room;
  }
  // A new token [rank + rope], which may be changed; room [rank].
  void put(int token, float* x, float* room) const {
    if (bits == 16) return narrow_row(x, width(), row(token));
    for (int i = 0; i < width(); i++) x[i] = rounded(x[i]);
    if (bits < 8) {
      turn(x, rank, room);
      for (int i = 0; i < rank; i++) x[i] = rounded(x[i]);
    }
    uint16_t* const scale = scales(token);
    scale[0] = together(x, bits, rank, codes(token));
    if (key_bits() == 16) narrow_row(x + rank, rope, (uint16_t*)key(token));
    else scale[1] = together(x + rank, 12, rope, key(token));
  }
};

}  // namespace
