// Products of bytes by AMX: two blocks of rows times 16 tokens at once. A matrix's codes are made signed numbers
// first, some columns at a time, which the L1 cache holds for all tokens. The sums of a group are whole numbers:
// what comes out has the bits of every other product.
#pragma once
#include "matrix.h"
#if (defined(__AMX_INT8__) || defined(__AMXINT8__)) && defined(__AVX512VNNI__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX
#endif

namespace {

constexpr int AMX_TOKENS = 16;    // of a tile
constexpr int AMX_LEAST = 12;     // tokens; for fewer it does not pay
constexpr int AMX_COLUMNS = 256;  // whose numbers are made at a time,
constexpr int AMX_GROUPS = 8;     // in so many groups at most

#if defined(HAS_AMX)
constexpr bool AMX = true;

// Linux gives the memory for tiles to a process that asks for it, and may have none.
INLINE bool amx_allowed() {
  constexpr int ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
  return allowed;
}

// What each tile holds: sums of 16 tokens with the first and the second block, and these tokens; the same of the
// fewer tokens that come last; and the two blocks.
enum Tile { WHOLE_SUMS, WHOLE_TOKENS = 2, LAST_SUMS, LAST_TOKENS = 5, BLOCKS };

// The shapes of tiles, as the processor reads and writes them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int columns, int last_tokens) {
    for (int tile = 0; tile < 8; tile++) {
      bytes[tile] = tile == WHOLE_TOKENS || tile == LAST_TOKENS ? columns : 4 * LANES;
      rows[tile] = tile >= BLOCKS ? columns / 4 : tile >= LAST_SUMS ? last_tokens : AMX_TOKENS;
    }
  }
};
// Sets them while it lives, and then those again that others gave who share the thread.
struct Shaped {
  uint8_t before[sizeof(TileShapes)];
  INLINE explicit Shaped(const TileShapes& shapes) {
    asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before) : "m"(shapes));
  }
  INLINE ~Shaped() { asm volatile("ldtilecfg %0" ::"m"(before)); }
};

// The compilers' own functions do not take the constants of a template, and GCC's do not say that they read and
// write memory.
template <int TILE> INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
template <int TILE> INLINE void load_tile(const void* from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> INLINE void store_tile(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"((size_t)64), "i"(TILE) : "memory");
}
template <int SUMS, int TOKENS, int BLOCK> INLINE void multiply_tiles() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(TOKENS), "i"(BLOCK));
}

// The numbers of `columns` columns of a block, of which four lie together; `codes` moves behind them.
template <int KIND> INLINE void signed_numbers(const uint8_t*& codes, NB table, int columns, B* to) {
  for (const B* const end = to + columns / 4; to < end; codes += 64)
    if constexpr (KIND == INT8) *to++ = load_as<B>(codes) ^ 128;
    else look_up_both(table, load_as<B>(codes), to[0], to[1]), to += 2;
}

// to[block][token] = a group of columns of some tokens, which lie `stride` apart, times two blocks' numbers.
template <int SUMS, int TOKENS>
INLINE void multiply_group(const int8_t* x, size_t stride, const B* first, const B* second, int group, I* to) {
  zero_tile<SUMS>(), zero_tile<SUMS + 1>();
  for (int k = 0; k < group; k += 64) {
    load_tile<TOKENS>(x + k, stride);
    load_tile<BLOCKS>(first + k / 4, 64), load_tile<BLOCKS + 1>(second + k / 4, 64);
    multiply_tiles<SUMS, TOKENS, BLOCKS>(), multiply_tiles<SUMS + 1, TOKENS, BLOCKS + 1>();
  }
  store_tile<SUMS>(to), store_tile<SUMS + 1>(to + AMX_TOKENS);
}

// Two blocks times tokens that lie at equal distances. out[token][TILE_ROWS]
template <int KIND>
NOINLINE void multiply_amx(const Matrix& w, const Address* from, const Row* x, int count, float* out) {
  const NB table = is_int4(KIND) ? table_of(w.table, 0) : NB{};
  const int group = x->group, groups = x->groups, most = std::min(AMX_GROUPS, AMX_COLUMNS / group);
  const int lines = most * group * w.bits() / 8 / 4;  // of 64 bytes, that hold the codes of so many groups
  const size_t stride = x[1].int8 - x[0].int8;
  const int last = count % AMX_TOKENS;
  const Shaped shaped(TileShapes(std::min(group, 64), last ? last : AMX_TOKENS));
  const bool offset = has_offset(w);
  B numbers[2][AMX_COLUMNS / 4];
  Scales scales[2][AMX_GROUPS];
  I sums[AMX_GROUPS][2][AMX_TOKENS];
  const uint8_t* codes[2] = {from[0].codes, from[1].codes};
  std::fill_n(out, count * TILE_ROWS, 0.0f);
  for (int begin = 0; begin < groups; begin += most) {
    const int here = std::min(most, groups - begin);
    for (int r = 0; r < 2; r++) {
      signed_numbers<KIND>(codes[r], table, here * group, numbers[r]);
      for (int g = 0; g < here; g++) scales[r][g] = scales_of(w, from[r], begin + g);
    }
    for (int t = 0; t < count; t += AMX_TOKENS) {
      const int some = std::min(AMX_TOKENS, count - t);
      for (int g = 0; g < here; g++) {
        const int8_t* tokens = x[t].int8 + (begin + g) * group;
        const B *first = numbers[0] + g * group / 4, *second = numbers[1] + g * group / 4;
        if (some == AMX_TOKENS)
          multiply_group<WHOLE_SUMS, WHOLE_TOKENS>(tokens, stride, first, second, group, sums[g][0]);
        else multiply_group<LAST_SUMS, LAST_TOKENS>(tokens, stride, first, second, group, sums[g][0]);
      }
      for (int m = 0; m < some; m++)
        for (int r = 0; r < 2; r++) {
          // Meanwhile the next columns' codes are asked for, a share of them for each token.
          for (int line = t + m; line < lines; line += count) __builtin_prefetch(codes[r] + line * 64, 0, 2);
          const Row& token = x[t + m];
          float* const to = out + (t + m) * TILE_ROWS + r * LANES;
          F total = load_as<F>(to);
          const auto add = [&](auto has) {
            for (int g = 0; g < here; g++)
              add_scaled(has, total, sums[g][r][m], scales[r][g], token.scale + begin, token.sum + begin, g);
          };
          if (offset) add(std::true_type());
          else add(std::false_type());
          store(to, total);
        }
    }
  }
}

#else
constexpr bool AMX = false;

INLINE bool amx_allowed() { return false; }
template <int KIND> void multiply_amx(const Matrix&, const Address*, const Row*, int, float*) {}

#endif

// Whether multiply_amx takes these tokens if they lie at equal distances, and whether they do.
INLINE bool suits_amx(const Row* x, int count) {
  return AMX && count >= AMX_LEAST && x->int8 && amx_allowed();
}
INLINE bool evenly_spaced(const Row* x, int count) {
  for (int i = 2; i < count; i++)
    if (x[i].int8 - x[i - 1].int8 != x[1].int8 - x[0].int8) return false;
  return true;
}

// Copies tokens' numbers to where multiply_amx takes them, if it otherwise would not. Some bytes lie between two
// tokens, so that the same columns of all do not share places in the L1 cache.
constexpr int AMX_APART = 64;
INLINE size_t room_for_copies(int count, const Rows& x) {
  return AMX && count >= AMX_LEAST && x.kind == INT8 ? (size_t)count * (x.padded + AMX_APART) : 0;
}
INLINE void space_evenly(Row* x, int count, int8_t* to) {
  if (!suits_amx(x, count) || evenly_spaced(x, count)) return;
  const int columns = x->group * x->groups;
  for (int i = 0; i < count; i++, to += columns + AMX_APART)
    x[i].int8 = (const int8_t*)memcpy(to, x[i].int8, columns);
}

}  // namespace
