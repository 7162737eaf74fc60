// Streams: consecutive rows of a matrix times one token. Memory bounds this, and gives most to a thread that
// reads consecutive addresses. And products, which take streams for one token and tiles for more.
#pragma once
#include "tiles.h"

namespace {

// Codes are asked for AHEAD bytes early, scales 1 KB. Near the end of a stream what is asked for is the stream
// that comes `next`.
constexpr int SCALES_AHEAD = 1024;

// ---- R streams side by side: gate and up, or the halves of many rows --------------------------------------

template <int R>
NOINLINE void stream_bf16(const Address* from, int count, const Row& x, int cols, float* const* out,
                          const Address* next) {
  constexpr int lanes = NATIVE / 2, early = AHEAD / 2;
  const size_t all = (size_t)count * cols, last = all > early ? all - early : 0;
  for (int row = 0; row < count; row++) {
    const size_t begin = (size_t)row * cols;
    const uint16_t* w[R];
    NF acc[R][SUMS] = {};
    for (int r = 0; r < R; r++) w[r] = (const uint16_t*)from[r].codes + begin;
    int k = 0;
    for (; k + ROUND <= cols; k += ROUND)
      for (int r = 0; r < R; r++) {
        const bool ends = next[r].codes && begin + k >= last;
        const uint16_t* ahead = ends ? (const uint16_t*)next[r].codes + (begin + k - last) : w[r] + k + early;
        for (int i = 0; i < ROUND; i += lanes) {
          if (i % 32 == 0) __builtin_prefetch(ahead + i);
          dot_bf16(acc[r][i / RUN], load_as<NB>(w[r] + k + i), load_as<NB>(x.bf16 + k + i));
        }
      }
    for (; k + lanes <= cols; k += lanes)
      for (int r = 0; r < R; r++) dot_bf16(acc[r][0], load_as<NB>(w[r] + k), load_as<NB>(x.bf16 + k));
    for (int r = 0; r < R; r++) out[r][row] = row_sum(acc[r], w[r], x.bf16, cols);
  }
}

// Where R streams of blocks of codes are read, and where they are asked for.
template <int KIND, int R> struct Reading {
  typedef std::conditional_t<KIND == FLOAT8, F, I> Sum;
  const Matrix& w;
  const NB table;
  const uint8_t *codes[R], *codes_ahead[R], *scales[R], *scales_ahead[R];
  const uint16_t* supers[R];
  Scales super[R] = {};
  const int group, record, codes_left, scales_left;

  INLINE Reading(const Matrix& w, const Address* from, int all)
      : w(w),
        table(table_for<KIND>(w)),
        group(w.group),
        record(w.scale_bytes()),
        codes_left(std::min(all, AHEAD / (group * LANES * w.bits() / 8))),
        scales_left(std::min(all, SCALES_AHEAD / record)) {
    for (int r = 0; r < R; r++) {
      codes[r] = from[r].codes, codes_ahead[r] = codes[r] + AHEAD;
      scales[r] = from[r].scales, scales_ahead[r] = scales[r] + SCALES_AHEAD;
      supers[r] = from[r].supers;
    }
  }
  // Before a group, of which `left` are still to be read: from here on `next` may be what is asked for.
  INLINE void look_at(const Address* next, int left) {
    for (int r = 0; r < R; r++) {
      if (next[r].codes && left == codes_left) codes_ahead[r] = next[r].codes;
      if (next[r].codes && left == scales_left) scales_ahead[r] = next[r].scales;
    }
  }
  // acc[r] = group g of columns times x.
  INLINE void multiply_group(Sum (&acc)[R], const Row& x, int g) {
    for (int r = 0; r < R; r++) __builtin_prefetch(scales_ahead[r]), scales_ahead[r] += record;
    if constexpr (KIND == FLOAT8) {
      for (int r = 0; r < R; r++) acc[r] = (F){};
      for (int k = g * group; k < (g + 1) * group; k += 4)
        for (int r = 0; r < R; r++) {
          dot_e4m3(acc[r], load_as<B>(codes[r]), x.floats + k);
          __builtin_prefetch(codes_ahead[r]);
          codes[r] += 64, codes_ahead[r] += 64;
        }
    } else {
      for (int r = 0; r < R; r++) acc[r] = (I){} + begin_at<KIND>(w, x.sum[g]);
      add_group(acc, x.int8 + (size_t)g * group);
    }
  }
  INLINE void add_group(I (&acc)[R], const int8_t* x) {
    constexpr int BITS = is_int4(KIND) ? 4 : 8;
#pragma GCC unroll 4
    for (int k = 0; k < group; k += 32 / BITS)
      for (int r = 0; r < R; r++) {
        const B w = load_as<B>(codes[r]);
        const int32_t four = load_as<int32_t>(x + k);
        __builtin_prefetch(codes_ahead[r]);
        codes[r] += 64, codes_ahead[r] += 64;
        if constexpr (BITS == 8) dot4(acc[r], from_code(w), four);
        else {
          B first, second;
          look_up_both(table, w, first, second);
          dot_codes<KIND>(acc[r], first, four, second, load_as<int32_t>(x + k + 4));
        }
      }
  }
  // total[r] += acc[r] times the group's scales, of the weights and of x.
  INLINE void scale_group(F (&total)[R], const Sum (&acc)[R], const Row& x, int g) {
    const bool begins = w.number == OF_I8 && g * group % SUPER == 0;
    for (int r = 0; r < R; r++) {
      if (begins) super[r] = supers_at(w, supers[r]), supers[r] += w.numbers();
      add_scaled(has_offset(w), total[r], acc[r], scales_at(w, scales[r], super[r]), x.scale, x.sum, g);
      scales[r] += record;
    }
  }
};

template <int KIND, int R>
NOINLINE void stream_codes(const Matrix& w, const Address* from, int blocks, const Row& x, float* const* out,
                           const Address* next) {
  const int groups = x.groups, all = blocks * groups;
  Reading<KIND, R> at(w, from, all);
  for (int b = 0, left = all; b < blocks; b++) {
    F total[R] = {};
    for (int g = 0; g < groups; g++, left--) {
      at.look_at(next, left);
      typename Reading<KIND, R>::Sum acc[R];
      at.multiply_group(acc, x, g);
      at.scale_group(total, acc, x, g);
    }
    for (int r = 0; r < R; r++) store(out[r] + b * LANES, total[r]);
  }
}

// out[r][i] = row firsts[r] + i of w times x, for `count` rows and R streams of them; `next` likewise.
template <int R>
NOINLINE void stream(const Matrix& w, const int* firsts, int count, const Row& x, float* const* out,
                     const Address* next) {
  Address from[R];
  for (int r = 0; r < R; r++) from[r] = address_of(w, firsts[r]);
  if (w.kind == BF16) return stream_bf16<R>(from, std::min(count, w.rows - firsts[R - 1]), x, w.cols, out, next);
  with_kind(w, [&](auto kind) { stream_codes<kind, R>(w, from, blocks_of(count), x, out, next); });
}
INLINE void stream_one(const Matrix& w, Span rows, const Row& x, float* out, Address next) {
  stream<1>(w, &rows.begin, rows.count, x, &out, &next);
}

// Many rows as two streams side by side: the processor waits less for each sum, and memory gives more.
struct Halves {
  Address at[2];
};
INLINE Halves halves_of(const Matrix& w, Span rows) {
  return {address_of(w, rows.begin), address_of(w, rows.begin + rows.count / 2)};
}
NOINLINE void stream_halves(const Matrix& w, Span rows, const Row& x, float* out, const Halves& next) {
  if (rows.count % (2 * LANES)) return stream_one(w, rows, x, out, next.at[0]);
  const int half = rows.count / 2, firsts[2] = {rows.begin, rows.begin + half};
  float* const outs[2] = {out, out + half};
  stream<2>(w, firsts, half, x, outs, next.at);
}

// ---- products: a matrix times some tokens -----------------------------------------------------------------

constexpr int JOB_ROWS = TILE_ROWS;        // rows of a job
constexpr int STREAM_ROWS = 8 * JOB_ROWS;  // at most, where one token passes through: the longer, the better

// Where the results of a product go: (token, row) to to[token * stride + row]. And as what: fp32, fp32 that
// is rounded to bf16, bf16, or bf16 that is added to what is there.
struct Target {
  enum { FLOATS, ROUNDED, NARROW, ADDED } how;
  void* to;
  size_t stride;
  NOINLINE void write(int token, int row, const float* values, int count) const {
    const size_t at = token * stride + row;
    float* wide = (float*)to + at;
    uint16_t* narrowed = (uint16_t*)to + at;
    if (how == FLOATS) return (void)memcpy(wide, values, count * sizeof(float));
    if (how == NARROW) return narrow_row(values, count, narrowed);
    if (how == ADDED) return add_to(narrowed, values, count);
    for (int i = 0; i < count; i++) wide[i] = rounded(values[i]);
  }
};

// Rows `first`, `first + stride`, ... of activations, `count` of them.
struct Tokens {
  const Rows& x;
  int first, stride, count;
  Row operator[](int token) const { return x.row(first + token * stride); }
};

INLINE void stream_product(const Matrix& w, Span rows, const Row& x, Address next, const Target& target) {
  float out[STREAM_ROWS];
  const int end = rows.begin + rows.count;
  for (int first = rows.begin; first < end; first += STREAM_ROWS) {
    const int after = first + STREAM_ROWS;
    const Span here = {first, std::min(STREAM_ROWS, end - first)};
    stream_one(w, here, x, out, after < end ? address_of(w, after) : next);
    target.write(0, first, out, here.count);
  }
}
INLINE void tile_product(const Matrix& w, Span rows, const Tokens& tokens, const Target& target) {
  float out[TILE_TOKENS * TILE_ROWS];
  const int end = rows.begin + rows.count;
  for (int first = rows.begin; first < end; first += TILE_ROWS) {
    const int here = std::min(TILE_ROWS, end - first), firsts[2] = {first, first + LANES};
    for (int t = 0; t < tokens.count; t += TILE_TOKENS) {
      const int count = std::min(TILE_TOKENS, tokens.count - t);
      Row x[TILE_TOKENS];
      for (int i = 0; i < count; i++) x[i] = tokens[t + i];
      multiply(w, firsts, blocks_of(here), x, count, out);
      for (int i = 0; i < count; i++) target.write(t + i, first, out + i * TILE_ROWS, here);
    }
  }
}
// Some rows of w times some tokens; `next` is what this thread reads after it.
NOINLINE void product(const Matrix& w, Span rows, const Tokens& tokens, Address next, const Target& target) {
  if (tokens.count == 1) stream_product(w, rows, tokens[0], next, target);
  else tile_product(w, rows, tokens, target);
}

// The same as jobs of JOB_ROWS rows, for the first `count` rows of x.
INLINE int jobs_of(const Matrix& w) { return (w.rows + JOB_ROWS - 1) / JOB_ROWS; }
NOINLINE void product_job(const Matrix& w, int job, int after, const Rows& x, int count,
                          const Target& target) {
  const Span rows = {job * JOB_ROWS, std::min(JOB_ROWS, w.rows - job * JOB_ROWS)};
  const Address next = after < jobs_of(w) ? address_of(w, after * JOB_ROWS) : Address{};
  product(w, rows, {x, 0, 1, count}, next, target);
}

}  // namespace
