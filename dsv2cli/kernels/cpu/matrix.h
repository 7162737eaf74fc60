// What a product multiplies: weights as Python hands them over, in bf16, int8 or int4, and activations, made
// ready for one of these.
#pragma once
#include "work.h"

constexpr int LANES = 16;  // rows of a quantised matrix that lie interleaved: a block

// How a matrix holds its weights; native.py's Kind is its twin. INT4 and INT8 are also the bits of a code.
enum Kind : int32_t { NONE = 0, INT4 = 4, INT8 = 8, BF16 = 16 };

// Weights [rows, cols], or a stack of such matrices; native.py's Matrix is its twin. bf16: row after row, no
// scales. int8 and int4: blocks of 16 rows, and a scale for each row and group of columns, see quantized.py.
struct Matrix {
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t codes_stride, scales_stride;  // from one matrix of the stack to the next, in bytes and in scales
  int32_t kind, rows, cols, group;

  Matrix of_stack(int index) const {
    Matrix out = *this;
    out.codes += index * codes_stride;
    out.scales += index * scales_stride;
    return out;
  }
};

namespace {

INLINE int blocks_of(int rows) { return (rows + LANES - 1) / LANES; }

// Where a row of a matrix begins, or the block that begins with that row; null where it is not known.
struct Address {
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
};
INLINE Address address_of(const Matrix& w, int row) {
  if (w.kind == BF16) return {w.codes + (size_t)std::min(row, w.rows - 1) * w.cols * 2};
  const size_t block = row / LANES, groups = (w.cols + w.group - 1) / w.group;
  return {w.codes + block * groups * w.group * LANES * w.kind / 8, w.scales + block * groups * LANES};
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
  const int32_t* shift;
  int group, groups;
};

// Activations ready to be multiplied with a kind of weights. For bf16: bf16, and where products are of floats the
// same as floats, of each vector of bf16 first the even numbers and then the odd ones. For int8 and int4: int8, and for
// each group a scale and a shift: -128 times its sum, because codes are 128 more than the numbers meant.
struct Rows {
  int kind, cols, padded, group, groups;
  uint16_t* bf16;
  float* floats;
  int8_t* int8;
  float* scale;
  int32_t* shift;

  void claim(Scratch& scratch, const Matrix& w, int count) {
    kind = w.kind == BF16 ? BF16 : INT8;
    cols = w.cols;
    group = kind == BF16 ? 32 : w.group;
    groups = (cols + group - 1) / group;
    padded = groups * group;
    bf16 = nullptr, floats = nullptr, int8 = nullptr, scale = nullptr, shift = nullptr;
    if (kind == BF16) {
      bf16 = scratch.take<uint16_t>((size_t)count * padded);
      if (FLOATS) floats = scratch.take<float>((size_t)count * padded);
    } else {
      int8 = scratch.take<int8_t>((size_t)count * padded);
      scale = scratch.take<float>((size_t)count * groups);
      shift = scratch.take<int32_t>((size_t)count * groups);
    }
  }
  Row row(int number) const {
    const size_t at = (size_t)number * padded, group_at = (size_t)number * groups;
    if (kind == BF16) return {bf16 + at, FLOATS ? floats + at : nullptr, nullptr, nullptr, nullptr, group, groups};
    return {nullptr, nullptr, int8 + at, scale + group_at, shift + group_at, group, groups};
  }
  // Columns [from, from + count) of one row; `from` begins a group and only the last call may end within one.
  NOINLINE void put(int row, int from, int count, const float* x) {
    if (kind == BF16) return put_bf16(row, from, count, x);
    for (int begin = 0; begin < count; begin += group)
      put_group(row, (from + begin) / group, std::min(group, count - begin), x + begin);
  }

 private:
  INLINE void put_bf16(int row, int from, int count, const float* x) {
    uint16_t* const to = bf16 + (size_t)row * padded;
    narrow_row(x, count, to + from);
    const int end = std::min(padded, (from + count + 31) / 32 * 32);
    for (int i = from + count; i < end; i++) to[i] = 0;
    if (!FLOATS) return;
    for (int i = from; i < end; i += NATIVE / 2) {
      const NB both = load_as<NB>(to + i);
      float* const wide = floats + (size_t)row * padded + i;
      store(wide, evens(both)), store(wide + NATIVE / 4, odds(both));
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
    shift[(size_t)row * groups + g] = SIGNED ? 0 : -128 * total;
  }
};

}  // namespace
