// Tiles: one or two 16-row blocks of a matrix times several tokens, so that weights are read once for all of
// them. What they add up stays in registers; how many tokens one takes therefore depends on the processor.
#pragma once
#include "amx.h"

namespace {

constexpr int TILE_TOKENS = AMX ? 3 * AMX_TOKENS : 12;  // that `multiply` takes at most
constexpr int AHEAD = 2048;                             // bytes by which weights are asked for early

// ---- codes ------------------------------------------------------------------------------------------------

// matrix.h's, of floats.
INLINE void add_scaled(bool, F& total, const F& acc, const Scales& s, const float*, const int32_t*, int) {
  add_product(total, acc, s.scale);
}

// The rows of M tokens.
template <int M> struct TileRows {
  const int8_t* int8[M];
  const float *scale[M], *floats[M];
  const int32_t* sum[M];
  const int group, groups;

  INLINE explicit TileRows(const Row* x) : group(x[0].group), groups(x[0].groups) {
    for (int m = 0; m < M; m++)
      int8[m] = x[m].int8, scale[m] = x[m].scale, floats[m] = x[m].floats, sum[m] = x[m].sum;
  }
};

// One group of columns of R blocks, whose codes begin at `at`, times M tokens; `at` moves to the next group.
template <int R, int M>
INLINE void add_int8_group(I (&acc)[R][M], const uint8_t* (&at)[R], const TileRows<M>& x, int g) {
  const int group = x.group, begin = g * group;
#pragma GCC unroll 4
  for (int k = 0; k < group; k += 4) {
    B w[R];
    for (int r = 0; r < R; r++) {
      w[r] = from_code(load_as<B>(at[r]));
      if (M <= 2) __builtin_prefetch(at[r] + AHEAD);
      at[r] += 64;
    }
    for (int m = 0; m < M; m++) {
      const int32_t a = load_as<int32_t>(x.int8[m] + begin + k);
      for (int r = 0; r < R; r++) dot4(acc[r][m], w[r], a);
    }
  }
}
template <int KIND, int R, int M>
INLINE void add_int4_group(I (&acc)[R][M], const uint8_t* (&at)[R], NB table, const TileRows<M>& x, int g) {
  const int group = x.group, begin = g * group;
#pragma GCC unroll 2
  for (int k = 0; k < group; k += 8) {
    B w[R], v[R];
    for (int r = 0; r < R; r++) {
      look_up_both(table, load_as<B>(at[r]), w[r], v[r]);
      if (M <= 2) __builtin_prefetch(at[r] + AHEAD);
      at[r] += 64;
    }
    for (int m = 0; m < M; m++) {
      const int8_t* four = x.int8[m] + begin + k;
      const int32_t a = load_as<int32_t>(four), b = load_as<int32_t>(four + 4);
      for (int r = 0; r < R; r++) dot_codes<KIND>(acc[r][m], w[r], a, v[r], b);
    }
  }
}

template <int R, int M>
INLINE void add_float8_group(F (&acc)[R][M], const uint8_t* (&at)[R], const TileRows<M>& x, int g) {
  for (int k = g * x.group; k < (g + 1) * x.group; k += 4)
    for (int r = 0; r < R; r++) {
      const B w = load_as<B>(at[r]);
      if (M <= 2) __builtin_prefetch(at[r] + AHEAD);
      at[r] += 64;
      for (int m = 0; m < M; m++) dot_e4m3(acc[r][m], w, x.floats[m] + k);
    }
}

// R blocks times M tokens. out[token][TILE_ROWS]
template <int KIND, int R, int M>
INLINE void tile_blocks(const Matrix& w, const Address* from, const TileRows<M>& x, float* out) {
  typedef std::conditional_t<KIND == FLOAT8, F, I> Sum;
  const NB table = table_for<KIND>(w);
  const bool offset = has_offset(w);
  F total[R][M];
  const uint8_t* at[R];
  for (int r = 0; r < R; r++) {
    at[r] = from[r].codes;
    for (int m = 0; m < M; m++) total[r][m] = (F){};
  }
  for (int g = 0; g < x.groups; g++) {
    Sum acc[R][M];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) {
        acc[r][m] = (Sum){};
        if constexpr (KIND != FLOAT8) acc[r][m] += begin_at<KIND>(w, x.sum[m][g]);
      }
    if constexpr (KIND == FLOAT8) add_float8_group(acc, at, x, g);
    else if constexpr (KIND == INT8) add_int8_group(acc, at, x, g);
    else add_int4_group<KIND>(acc, at, table, x, g);
    for (int r = 0; r < R; r++) {
      const Scales s = scales_of(w, from[r], g);
      for (int m = 0; m < M; m++) add_scaled(offset, total[r][m], acc[r][m], s, x.scale[m], x.sum[m], g);
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) store(out + m * TILE_ROWS + r * LANES, total[r][m]);
}

// Two blocks times M tokens: both at once where there are registers for it.
template <int KIND, int M>
NOINLINE void tile_codes(const Matrix& w, const Address* from, const Row* x, float* out) {
  const TileRows<M> rows(x);
  constexpr int R = BROAD ? 2 : 1;
  for (int first = 0; first < 2; first += R)
    tile_blocks<KIND, R, M>(w, from + first, rows, out + first * LANES);
}

template <int KIND>
NOINLINE void tiles_codes(const Matrix& w, const Address* from, const Row* x, int count, float* out) {
  while (count > 0) {
    int done = 1;
    if (BROAD && count >= 12) tile_codes<KIND, 12>(w, from, x, out), done = 12;
    else if (BROAD && count >= 8) tile_codes<KIND, 8>(w, from, x, out), done = 8;
    else if (count >= 4) tile_codes<KIND, 4>(w, from, x, out), done = 4;
    else if (count >= 2) tile_codes<KIND, 2>(w, from, x, out), done = 2;
    else tile_codes<KIND, 1>(w, from, x, out);
    count -= done, x += done, out += done * TILE_ROWS;
  }
}

// ---- bf16 -------------------------------------------------------------------------------------------------
//
// out[token][TILE_ROWS] = some rows of w, `cols` long, times M tokens; what is beyond a token's end is not read.

// R rows at once, one sum after the other.
template <int R, int M>
NOINLINE void tile_bf16(const uint16_t* const* w, const Row* x, int cols, float* out) {
  constexpr int lanes = NATIVE / 2;
  static_assert(FLOATS || RUN == lanes, "a run is a vector");
  const int whole = cols / ROUND * ROUND, end = cols / lanes * lanes;
  NF sums[R][M][SUMS];
  for (int part = 0; part < SUMS; part++) {
    NF acc[R][M];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) acc[r][m] = (NF){};
    const auto add = [&](int k) {
      NB a[R];
      for (int r = 0; r < R; r++) {
        a[r] = load_as<NB>(w[r] + k);
        if (M <= 2) __builtin_prefetch(w[r] + k + AHEAD / 4);
      }
      for (int m = 0; m < M; m++) {
        const NB b = load_as<NB>(x[m].bf16 + k);
        for (int r = 0; r < R; r++) dot_bf16(acc[r][m], a[r], b);
      }
    };
    for (int k = part * lanes; k < whole; k += ROUND) add(k);
    for (int k = whole; part == 0 && k < end; k += lanes) add(k);
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) sums[r][m][part] = acc[r][m];
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) out[m * TILE_ROWS + r] = row_sum(sums[r][m], w[r], x[m].bf16, cols);
}

template <int R>
NOINLINE void tiles_bf16(const uint16_t* const* w, const Row* x, int count, int cols, float* out) {
  while (count > 0) {
    int done = 1;
    if (count >= 6) tile_bf16<R, 6>(w, x, cols, out), done = 6;
    else if (count >= 4) tile_bf16<R, 4>(w, x, cols, out), done = 4;
    else if (count >= 2) tile_bf16<R, 2>(w, x, cols, out), done = 2;
    else tile_bf16<R, 1>(w, x, cols, out);
    count -= done, x += done, out += done * TILE_ROWS;
  }
}

// A block where products are of floats: the tokens' numbers are floats already (see place_of), and a weight
// becomes one once for several of them.

// For up to 3 tokens there are registers for all sums, row after row.
template <int M> NOINLINE void rows_bf16(const uint16_t* const* rows, const Row* x, int cols, float* out) {
  constexpr int lanes = NATIVE / 2;
  const int whole = cols / ROUND * ROUND, end = cols / lanes * lanes, second = second_floats(cols);
  for (int r = 0; r < LANES; r++) {
    const uint16_t* w = rows[r];
    NF acc[M][SUMS] = {};
    const auto add = [&](int part, int k, int at) {
      const NB both = load_as<NB>(w + k);
      const NF one = one_half(both), other = other_half(both);
      for (int m = 0; m < M; m++) acc[m][part] += one * load_as<NF>(x[m].floats + at);
      for (int m = 0; m < M; m++) acc[m][part] += other * load_as<NF>(x[m].floats + at + lanes / 2);
    };
    for (int k = 0, at = 0; k < whole; k += ROUND, at += RUN) {
      for (int i = 0; i < ROUND; i += 32) __builtin_prefetch(w + k + AHEAD / 2 + i);
#pragma GCC unroll 4
      for (int i = 0; i < RUN; i += lanes) add(0, k + i, at + i), add(1, k + RUN + i, second + at + i);
    }
    for (int k = whole; k < end; k += lanes) add(0, k, k - whole / 2);
    for (int m = 0; m < M; m++) out[m * TILE_ROWS + r] = row_sum(acc[m], w, x[m].bf16, cols);
  }
}

// For more, one sum after the other, and of a long row some runs after the others, so that the tokens' floats
// stay in the L1 cache for all rows: two rows times 3 to 6 tokens, whose numbers are read once for both.
constexpr int PART_TOKENS = 6, PART_RUNS = 32;
struct Part {
  int sum, column, place;  // where its first run begins, and the floats of that
  int runs, rest;          // and columns that are left after the last round
  bool begins;             // the sum
};
// What lies at `soon` is asked for, two lines of 64 bytes a run.
template <int M>
NOINLINE void pair_bf16(const uint16_t* const* rows, const Row* x, const Part& part, const uint16_t* soon,
                        NF (*sums)[PART_TOKENS][SUMS]) {
  constexpr int lanes = NATIVE / 2;
  const uint16_t *w = rows[0] + part.column, *v = rows[1] + part.column;
  const ptrdiff_t next = 2 * (v - w);  // the pair after this one follows it
  NF acc[2][M];
  const float* from[M];
  for (int m = 0; m < M; m++) from[m] = x[m].floats + part.place;
  for (int i = 0; i < 2; i++)
    for (int m = 0; m < M; m++) acc[i][m] = part.begins ? (NF){} : sums[i][m][part.sum];
  const auto add = [&](int i, int k) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const NB a = load_as<NB>(w + i), b = load_as<NB>(v + i);
      const NF first = half ? other_half(a) : one_half(a), second = half ? other_half(b) : one_half(b);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++) {
        const NF number = in_register(load_as<NF>(from[m] + k + half * lanes / 2));
        acc[0][m] += first * number, acc[1][m] += second * number;
      }
    }
  };
  int k = 0;
  for (int run = 0; run < part.runs; run++, w += ROUND, v += ROUND, k += RUN) {
    if (soon) __builtin_prefetch(soon + k * 2, 0, 2), __builtin_prefetch(soon + k * 2 + 32, 0, 2);
    __builtin_prefetch(w + next), __builtin_prefetch(v + next);
#pragma GCC unroll 4
    for (int i = 0; i < RUN; i += lanes) add(i, k + i);
  }
  for (int i = 0; i < part.rest; i += lanes) add(i, k + i);
  for (int i = 0; i < 2; i++)
    for (int m = 0; m < M; m++) sums[i][m][part.sum] = acc[i][m];
}
NOINLINE void block_floats(const uint16_t* const* rows, const Row* x, int count, int cols, float* out) {
  if (count == 1) return rows_bf16<1>(rows, x, cols, out);
  if (count == 2) return rows_bf16<2>(rows, x, cols, out);
  if (count == 3) return rows_bf16<3>(rows, x, cols, out);
  constexpr int lanes = NATIVE / 2;
  const int end = cols / lanes * lanes, rounds = cols / ROUND;
  const int parts = std::max(1, (rounds + PART_RUNS - 1) / PART_RUNS);  // of one sum
  const uint16_t* soon = rows[0] + (size_t)LANES * cols;
  NF sums[LANES][PART_TOKENS][SUMS];
  for (int t = 0, turns = (count + PART_TOKENS - 1) / PART_TOKENS; turns > 0; turns--) {
    const int some = (count - t + turns - 1) / turns;
    const auto add = some == 6   ? pair_bf16<6>
                     : some == 5 ? pair_bf16<5>
                     : some == 4 ? pair_bf16<4>
                                 : pair_bf16<3>;
    for (int job = 0; job < SUMS * parts; job++) {
      const int i = job / parts, c = job % parts, begin = rounds * c / parts, after = rounds * (c + 1) / parts;
      const int place = (i ? second_floats(cols) : 0) + begin * RUN;
      const int rest = job == parts - 1 ? end - rounds * ROUND : 0;
      const Part part = {i, begin * ROUND + i * RUN, place, after - begin, rest, c == 0};
      for (int r = 0; r < LANES; r += 2) {
        add(rows + r, x + t, part, t ? nullptr : soon, &sums[r]);
        soon += 2 * RUN * part.runs;
      }
    }
    for (int r = 0; r < LANES; r++)
      for (int m = 0; m < some; m++)
        out[(t + m) * TILE_ROWS + r] = row_sum(sums[r][m], rows[r], x[t + m].bf16, cols);
    t += some;
  }
}

// A block of rows, whichever way is the faster.
NOINLINE void block_bf16(const uint16_t* const* rows, const Row* x, int count, int cols, float* out) {
  if constexpr (FLOATS) return block_floats(rows, x, count, cols, out);
  for (int r = 0; r < LANES; r += 4) tiles_bf16<4>(rows + r, x, count, cols, out + r);
}

// ---- both -------------------------------------------------------------------------------------------------

// 1 or 2 blocks of w, which begin at rows `firsts`, times up to TILE_TOKENS tokens: out[token][TILE_ROWS].
// Beyond the last row stand zeros (quantised) or its own results again (bf16), and in place of a second block
// that was not asked for anything.
NOINLINE void multiply(const Matrix& w, const int* firsts, int blocks, const Row* x, int count, float* out) {
  if (w.kind == BF16) {
    for (int b = 0; b < blocks; b++) {
      const uint16_t* rows[LANES];
      for (int r = 0; r < LANES; r++) rows[r] = (const uint16_t*)address_of(w, firsts[b] + r).codes;
      block_bf16(rows, x, count, w.cols, out + b * LANES);
    }
    return;
  }
  const Address from[2] = {address_of(w, firsts[0]), address_of(w, firsts[blocks - 1])};
  with_kind(w, [&](auto kind) {
    if constexpr (kind != FLOAT8)
      if (suits_amx(x, count) && evenly_spaced(x, count)) return multiply_amx<kind>(w, from, x, count, out);
    tiles_codes<kind>(w, from, x, count, out);
  });
}

}  // namespace
