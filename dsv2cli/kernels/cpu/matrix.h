// What a product multiplies: weights as Python hands them over, in bf16 or in codes of 8 or 4 bits, and
// activations, made ready for one of these.
#pragma once
#include "work.h"

constexpr int LANES = 16;             // rows of a quantised matrix that lie interleaved: a block
constexpr int TILE_ROWS = 2 * LANES;  // of what several tokens are multiplied with at once: [token][TILE_ROWS]

// How a matrix holds its weights; native.py's Kind is its twin. INT4: codes that stand for numbers of a table.
// FLOAT8: floats of 8 bits, E4M3.
enum Kind : int32_t { NONE = 0, INT4 = 4, INT8 = 8, FLOAT8 = 9, BF16 = 16 };
constexpr int INT4_SIX = 5;  // INT4 whose numbers dot_six multiplies
enum Number : int32_t { OF_BF16, OF_F16, OF_F32, OF_I8 };  // type of the scales and offsets
enum Offset : int32_t { WITHOUT, ADDED, ZERO };            // see formats.Coding

constexpr int SUPER = 256;  // columns that share what scales in 8 bits are multiplied by

// Weights [rows, cols], or a stack of such matrices; native.py's Matrix is its twin. bf16: row after row, no
// scales. The others: blocks of 16 rows, and for each block and group of columns 16 scales and, where there
// are any, 16 offsets; for each SUPER columns supers likewise. See quantized.py.
struct Matrix {
  const uint8_t *codes, *scales;
  const uint16_t* supers;
  int64_t codes_stride, scales_stride, supers_stride;  // from one matrix of the stack to the next, in bytes
  int32_t kind, rows, cols, group, number, offset;
  int32_t bias;           // what is added to each value; of int8 codes that are no less than 0 it is 128
  int8_t table[16];       // of INT4
  int32_t least, span;    // the smallest of these, and how far the largest is from it

  Matrix of_stack(int index) const {
    Matrix out = *this;
    out.codes += index * codes_stride;
    out.scales += index * scales_stride;
    out.supers += index * supers_stride / 2;
    return out;
  }
  int bits() const { return kind == INT4 ? 4 : 8; }
  int groups() const { return (cols + group - 1) / group; }
  int numbers() const { return offset ? 2 * LANES : LANES; }  // for one group
  int scale_bytes() const { return numbers() * (number == OF_F32 ? 4 : number == OF_I8 ? 1 : 2); }
};

namespace {

constexpr bool is_int4(int kind) { return kind == INT4 || kind == INT4_SIX; }
// f with the kind of w, which is not BF16, as a constant.
template <class F> INLINE void with_kind(const Matrix& w, F f) {
  if (w.kind == INT8) f(std::integral_constant<int, INT8>());
  else if (w.kind == FLOAT8) f(std::integral_constant<int, FLOAT8>());
  else if (SIX && w.span < 64) f(std::integral_constant<int, SIX ? INT4_SIX : INT4>());
  else f(std::integral_constant<int, INT4>());
}
// The numbers of 4-bit codes as they are multiplied.
template <int KIND> INLINE NB table_for(const Matrix& w) {
  if (KIND == INT4_SIX) return table_of(w.table, w.least);
  return is_int4(KIND) ? table_of(w.table, SIGNED ? 0 : -128) : (NB){};
}
// acc += products of two vectors of codes with 4 numbers each.
template <int KIND, class V, class W> INLINE void dot_codes(V& acc, W w, int32_t a, W v, int32_t b) {
  if constexpr (KIND == INT4_SIX) dot_six(acc, w, a, v, b);
  else dot4(acc, w, a), dot4(acc, v, b);
}
// What a group's products begin with, where `sum` is that of the tokens' numbers: what is multiplied is less
// than the numbers meant by the smallest of them, or, where codes are unsigned, more by 128.
template <int KIND> INLINE int32_t begin_at(const Matrix& w, int32_t sum) {
  return KIND == INT4_SIX ? w.least * sum : SIGNED ? 0 : -128 * sum;
}

INLINE int blocks_of(int rows) { return (rows + LANES - 1) / LANES; }

// Where a row of a matrix begins, or the block that begins with that row; null where it is not known.
struct Address {
  const uint8_t *codes = nullptr, *scales = nullptr;
  const uint16_t* supers = nullptr;
};
INLINE Address address_of(const Matrix& w, int row) {
  if (w.kind == BF16) return {w.codes + (size_t)std::min(row, w.rows - 1) * w.cols * 2};
  const size_t block = row / LANES, groups = w.groups(), supers = (w.cols + SUPER - 1) / SUPER;
  return {w.codes + block * groups * w.group * LANES * w.bits() / 8, w.scales + block * groups * w.scale_bytes(),
          w.number == OF_I8 ? w.supers + block * supers * w.numbers() : nullptr};
}

// Codes of columns [from, from + count) of a row, one a byte, to their places in its block of rows.
INLINE void put_codes(const uint8_t* values, int from, int count, int bits, int lane, uint8_t* block) {
  uint8_t* to = block + (size_t)from * LANES * bits / 8 + lane * 4;
  if (bits == 8) {
    for (int i = 0; i < count; i += 4) memcpy(to + (size_t)i * LANES, values + i, 4);
    return;
  }
  for (int i = 0; i < count; i += 8) {  // of 8 columns the first 4 are in the low halves of 4 bytes
    const uint32_t both = load_as<uint32_t>(values + i) | load_as<uint32_t>(values + i + 4) << 4;
    memcpy(to + (size_t)i / 2 * LANES, &both, 4);
  }
}

// The scales and offsets of 16 rows in one group of columns.
struct Scales {
  F scale, offset;
};
INLINE F floats_at(const uint8_t* at, int number) {
  if (number == OF_BF16) return widen16((const uint16_t*)at);
  if (number == OF_F16) return halves16((const uint16_t*)at);
  if (number == OF_I8) return bytes16((const int8_t*)at);
  return load_as<F>(at);
}
INLINE Scales supers_at(const Matrix& w, const uint16_t* at) {
  return {halves16(at), w.offset ? halves16(at + LANES) : (F){}};
}
INLINE Scales scales_at(const Matrix& w, const uint8_t* at, const Scales& super) {
  Scales out = {floats_at(at, w.number), {}};
  if (w.offset) out.offset = floats_at(at + w.scale_bytes() / 2, w.number);
  if (w.number == OF_I8) out.scale = out.scale * super.scale, out.offset = out.offset * super.offset;
  if (w.offset == ZERO) out.offset = out.offset * out.scale * -1.0f;
  if (w.bias) out.offset += out.scale * (float)w.bias;
  return out;
}
// The same of the g-th group of a block.
INLINE Scales scales_of(const Matrix& w, const Address& block, int g) {
  Scales super = {};
  if (w.number == OF_I8) super = supers_at(w, block.supers + (size_t)(g * w.group / SUPER) * w.numbers());
  return scales_at(w, block.scales + (size_t)g * w.scale_bytes(), super);
}
INLINE bool has_offset(const Matrix& w) { return w.offset || w.bias; }
// total += the sum of one group's products, times the group's scales, of the weights and of x.
INLINE void add_scaled(bool offset, F& total, const I& acc, const Scales& s, const float* x_scale,
                       const int32_t* x_sum, int g) {
  add_product(total, as_floats(acc), s.scale * x_scale[g]);
  if (offset) add_product(total, s.offset, (F){} + (float)x_sum[g] * x_scale[g]);
}

// Consecutive rows, columns or tokens.
struct Span {
  int begin, count;
};

// One row of Rows.
struct Row {
  const uint16_t* bf16;
  const float* floats;
  const int8_t* int8;
  const float* scale;
  const int32_t* sum;
  int group, groups;
};

// How the products of a row in bf16 are added up, whoever does it, so that a token gets the same bits from all: a
// run of columns into each of the sums in turn, which is a round; what is left after whole rounds into the first.
constexpr int SUMS = FLOATS ? 2 : 4;
constexpr int RUN = FLOATS ? 32 : NATIVE / 2, ROUND = SUMS * RUN;  // columns
// The sums of a row w times x, and what is left of them after whole vectors.
INLINE float row_sum(const NF (&sums)[SUMS], const uint16_t* w, const uint16_t* x, int cols) {
  NF all = sums[0] + sums[1];
  if constexpr (SUMS == 4) all += sums[2] + sums[3];
  float total = sum(all);
  for (int i = cols / (NATIVE / 2) * (NATIVE / 2); i < cols; i++) total += widen(w[i]) * widen(x[i]);
  return total;
}

// Where the floats of columns from k on lie: those of the first sum, then those of the second.
INLINE int second_floats(int cols) { return cols / ROUND * RUN + (cols % ROUND + 31) / 32 * 32; }
INLINE int place_of(int k, int cols) {
  const int half = cols / ROUND * RUN, place = k / ROUND * RUN + k % RUN;
  if (k >= 2 * half) return k - half;
  return k % ROUND < RUN ? place : second_floats(cols) + place;
}

// Activations ready to be multiplied with a kind of weights. For bf16: bf16, and where products are of floats the
// same as floats, of each vector of bf16 one half and then the other, at its place_of. For 8-bit floats: floats.
// For int8 and int4: int8, and for each group a scale and the sum of its numbers.
struct Rows {
  int kind, cols, padded, group, groups;
  uint16_t* bf16;
  float* floats;
  int8_t* int8;
  float* scale;
  int32_t* sum;

  static int kind_for(const Matrix& w) { return w.kind == INT4 ? INT8 : w.kind; }
  // Whether these, claimed for another matrix, are right for w too.
  bool suit(const Matrix& w) const { return kind == kind_for(w) && (kind == BF16 || group == w.group); }

  void claim(Scratch& scratch, const Matrix& w, int count) {
    kind = kind_for(w);
    cols = w.cols;
    group = kind == BF16 ? 32 : w.group;
    groups = (cols + group - 1) / group;
    padded = groups * group;
    bf16 = nullptr, floats = nullptr, int8 = nullptr, scale = nullptr, sum = nullptr;
    if (kind == BF16) bf16 = scratch.take<uint16_t>((size_t)count * padded);
    if (kind == FLOAT8 || (kind == BF16 && FLOATS)) floats = scratch.take<float>(floats_at_row(count));
    if (kind == INT8) {
      int8 = scratch.take<int8_t>((size_t)count * padded);
      scale = scratch.take<float>((size_t)count * groups);
      sum = scratch.take<int32_t>((size_t)count * groups);
    }
  }
  Row row(int number) const {
    const size_t at = (size_t)number * padded, group_at = (size_t)number * groups;
    if (kind == INT8) return {nullptr, nullptr, int8 + at, scale + group_at, sum + group_at, group, groups};
    const float* const wide = floats ? floats + floats_at_row(number) : nullptr;
    return {bf16 ? bf16 + at : nullptr, wide, nullptr, nullptr, nullptr, group, groups};
  }
  // Columns [from, from + count) of one row; `from` begins a group and only the last call may end within one.
  NOINLINE void put(int row, int from, int count, const float* x) {
    if (kind == BF16) return put_bf16(row, from, count, x);
    if (kind == FLOAT8) return put_floats(row, from, count, x);
    for (int begin = 0; begin < count; begin += group)
      put_group(row, (from + begin) / group, std::min(group, count - begin), x + begin);
  }

 private:
  // A quarter of a row lies between two: else the same columns of all would share places in the L1 cache.
  INLINE size_t floats_at_row(int row) const { return (size_t)row * (padded / 4 * 5); }
  INLINE void put_floats(int row, int from, int count, const float* x) {
    float* const to = floats + floats_at_row(row) + from;
    std::copy_n(x, count, to);
    std::fill(to + count, to + (count + group - 1) / group * group, 0.0f);
  }
  INLINE void put_bf16(int row, int from, int count, const float* x) {
    uint16_t* const to = bf16 + (size_t)row * padded;
    narrow_row(x, count, to + from);
    const int end = std::min(padded, (from + count + 31) / 32 * 32);
    for (int i = from + count; i < end; i++) to[i] = 0;
    if (!FLOATS) return;
    for (int i = from; i < end; i += NATIVE / 2) {
      const NB both = load_as<NB>(to + i);
      float* const wide = floats + floats_at_row(row) + place_of(i, cols);
      store(wide, one_half(both)), store(wide + NATIVE / 4, other_half(both));
    }
  }
  INLINE void put_group(int row, int g, int count, const float* x) {
    const float most = largest(x, count), inverse = most > 0 ? 127.0f / most : 0.0f;
    int8_t* to = int8 + (size_t)row * padded + g * group;
    int32_t total = 0;
    for (int i = 0; i < count; i++) {
      const int32_t v = (int32_t)std::nearbyintf(x[i] * inverse);
      to[i] = (int8_t)v;
      total += v;
    }
    for (int i = count; i < group; i++) to[i] = 0;
    scale[(size_t)row * groups + g] = most / 127.0f;
    sum[(size_t)row * groups + g] = total;
  }
};

}  // namespace
