// The decode step and the matrix products on a CPU, fused: one call for all layers, one parallel region a call.
// What each function computes is said by the plain torch code beside it (linear.py, attention.py, experts.py,
// quantized.py); this file only does the same faster. Activations enter a product as bf16 (bf16 weights) or as int8
// with one scale a group (int8 and int4 weights); sums are kept in fp32 or int32. Compiled on first use by native.py
// for the processor at hand: AVX-512 (VNNI, BF16), AVX2, or whatever the compiler makes of 64-byte vectors.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
static inline int omp_get_num_threads() { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART __attribute__((noinline))  // long, and called from several places: copies would only cost time to compile

// Vectors of the width in which the processor multiplies bytes.
#if defined(__AVX512VNNI__)
constexpr int NATIVE = 64;  // bytes
#elif defined(__AVX2__)
constexpr int NATIVE = 32;
#else
constexpr int NATIVE = 16;
#endif
constexpr bool BROAD = NATIVE == 64;
typedef float NF __attribute__((vector_size(NATIVE)));
typedef int32_t NI __attribute__((vector_size(NATIVE)));
typedef uint32_t NU __attribute__((vector_size(NATIVE)));
typedef uint8_t NB __attribute__((vector_size(NATIVE)));
typedef uint16_t NH __attribute__((vector_size(NATIVE / 2)));

constexpr int LANES = 16;  // rows of a quantised matrix that lie interleaved
constexpr int MOST = 12;   // tokens in one tile
constexpr int BLOCK = 32;  // cached tokens that attention takes at a time: they and the heads' sums stay near the processor

enum Kind { NONE = 0, INT4 = 4, INT8 = 8, BF16 = 16 };

extern "C" {
// rows x cols weights. bf16: row after row. int8, int4: see quantized.py; `blocks` is the number of 16-row blocks.
// A stack of matrices (experts) lies one after the other, `codes_step` bytes and `scales_step` scales apart.
struct Matrix {
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t codes_step, scales_step;
  int32_t kind, rows, cols, group;
};
struct Attention {
  const uint16_t *norm, *q_a_norm, *kv_a_norm;
  Matrix q_a, q, kv_a, k_up, v_up, o;  // k_up and v_up are kv_b_proj by heads: [rank, nope], which is turned, and [value, rank]
  int32_t hidden, heads, nope, rope, value, rank, q_rank;
  float eps, scale;
};
struct Mlp {
  const uint16_t* norm;
  const float* gate;
  Matrix gate_up, down, shared_gate_up, shared_down;
  int32_t hidden, width, shared_width, experts, top_k, groups, top_groups, normalise;
  float eps, factor;
};
struct Layer {
  Attention attention;
  Mlp mlp;
};
}

// ---- numbers ----------------------------------------------------------------------------------------------------

INLINE float widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
INLINE uint16_t narrow(float x) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE float rounded(float x) { return widen(narrow(x)); }

// Vectors of 64 bytes: F, I, U and B. Of those that are wider than the processor's GCC keeps every value in memory, which is ten
// and more times as slow; so they are pairs of narrower ones, or pairs of pairs, which it keeps in registers.
template <class V> struct Pair {
  typedef V Half;
  V low, high;
  template <class W> explicit operator Pair<W>() const { return {(W)low, (W)high}; }
  auto operator[](int i) const {
    constexpr int half = sizeof(V) / 4;
    return i < half ? low[i] : high[i - half];
  }
};
template <class V, int BYTES> struct Grown {
  typedef typename Grown<Pair<V>, BYTES * 2>::Type Type;
};
template <class V> struct Grown<V, 64> {
  typedef V Type;
};
typedef Grown<NF, NATIVE>::Type F;
typedef Grown<NI, NATIVE>::Type I;
typedef Grown<NU, NATIVE>::Type U;
typedef Grown<NB, NATIVE>::Type B;

#define EACH_HALF(op)                                                                                                         \
  template <class V> INLINE Pair<V> operator op(Pair<V> a, Pair<V> b) { return {a.low op b.low, a.high op b.high}; }             \
  template <class V, class S> INLINE Pair<V> operator op(Pair<V> a, S b) { return {a.low op b, a.high op b}; }                   \
  template <class V, class S> INLINE Pair<V> operator op(S a, Pair<V> b) { return {a op b.low, a op b.high}; }                   \
  template <class V, class S> INLINE Pair<V>& operator op##=(Pair<V>& a, S b) { return a = a op b; }
EACH_HALF(+)
EACH_HALF(-)
EACH_HALF(*)
EACH_HALF(/)
EACH_HALF(&)
EACH_HALF(|)
EACH_HALF(<<)
EACH_HALF(>>)

template <class T> constexpr bool whole = true;
template <class V> constexpr bool whole<Pair<V>> = false;
template <class T> INLINE T load(const void* p) {
  if constexpr (whole<T>) {
    T out;
    memcpy(&out, p, sizeof(T));
    return out;
  } else {
    typedef typename T::Half V;
    return {load<V>(p), load<V>((const char*)p + sizeof(V))};
  }
}
template <class T> INLINE void store(void* p, T x) {
  if constexpr (whole<T>) memcpy(p, &x, sizeof(T));
  else store(p, x.low), store((char*)p + sizeof(x.low), x.high);
}
template <class T> INLINE T larger(T a, T b) {
  if constexpr (whole<T>) return a > b ? a : b;
  else return {larger(a.low, b.low), larger(a.high, b.high)};
}
INLINE NF as_floats(NI x) { return __builtin_convertvector(x, NF); }
template <class V> INLINE auto as_floats(Pair<V> x) -> Pair<decltype(as_floats(x.low))> { return {as_floats(x.low), as_floats(x.high)}; }
template <class T> INLINE T widened(const uint16_t* p) {
  if constexpr (whole<T>) {
    return (NF)(__builtin_convertvector(load<NH>(p), NU) << 16);
  } else {
    typedef typename T::Half V;
    return {widened<V>(p), widened<V>(p + sizeof(V) / 4)};
  }
}
INLINE F widen16(const uint16_t* p) { return widened<F>(p); }

APART static void widen_row(const uint16_t* x, int size, float* out) {
  for (int i = 0; i < size; i++) out[i] = widen(x[i]);
}
APART static void add_to(uint16_t* x, const float* values, int count) {  // the residual, with one rounding of each term
  for (int i = 0; i < count; i++) x[i] = narrow(widen(x[i]) + rounded(values[i]));
}
APART static void narrow_row(const float* x, int size, uint16_t* out) {
  for (int i = 0; i < size; i++) out[i] = narrow(x[i]);
}
// e to the power of x, to the last bit or two; beyond -87 and 88 as there, which is nearly zero and nearly infinite.
INLINE NF exp_of(NF x) {
  x = x < -87.0f ? (NF){} - 87.0f : x > 88.0f ? (NF){} + 88.0f : x;
  const NF scaled = x * 1.44269504f;
  const NI whole = __builtin_convertvector(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f, NI);
  const NF n = as_floats(whole);
  const NF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  NF e = (NF){} + 1.0f / 720;
  e = e * r + 1.0f / 120, e = e * r + 1.0f / 24, e = e * r + 1.0f / 6, e = e * r + 0.5f, e = e * r + 1.0f, e = e * r + 1.0f;
  return e * (NF)((whole + 127) << 23);
}
template <class V> INLINE Pair<V> exp_of(Pair<V> x) { return {exp_of(x.low), exp_of(x.high)}; }
INLINE float largest(const float* x, int count) {  // without its sign
  constexpr int lanes = NATIVE / 4;
  NF most = {};
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    const NF v = load<NF>(x + i);
    most = larger(v < 0.0f ? -v : v, most);
  }
  float out = 0;
  for (int lane = 0; lane < lanes; lane++) out = std::max(out, most[lane]);
  for (; i < count; i++) out = std::max(out, std::fabs(x[i]));
  return out;
}
INLINE float sum(NF x) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float out = 0;
  for (int i = 0; i < NATIVE / 4; i++) out += x[i];
  return out;
#endif
}

// acc[i] += sum of 4 products of w with the 4 signed bytes of a; w is unsigned, or where only a signed product is at hand SIGNED:
// 128 has been taken from it.
#if defined(__AVX512VNNI__)
constexpr bool SIGNED = false;
INLINE void dot4(NI& acc, NB w, int32_t a) { acc = (NI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a)); }
#elif defined(__AVX2__)
constexpr bool SIGNED = true;
INLINE void dot4(NI& acc, NB w, int32_t a) {  // |w| times a with w's sign: no sum of two leaves 16 bits
  const __m256i v = (__m256i)w, pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(_mm256_set1_epi32(a), v));
  acc += (NI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr bool SIGNED = false;
INLINE void dot4(NI& acc, NB w, int32_t a) {
  const int8_t* v = (const int8_t*)&a;
  for (int i = 0; i < NATIVE / 4; i++) acc[i] += w[4 * i] * v[0] + w[4 * i + 1] * v[1] + w[4 * i + 2] * v[2] + w[4 * i + 3] * v[3];
}
#endif
template <class V, class W> INLINE void dot4(Pair<V>& acc, Pair<W> w, int32_t a) { dot4(acc.low, w.low, a), dot4(acc.high, w.high, a); }
INLINE NB from_code(NB code) { return SIGNED ? code ^ 128 : code; }
template <class V> INLINE Pair<V> from_code(Pair<V> code) { return {from_code(code.low), from_code(code.high)}; }

// acc += products of bf16 with bf16, in any order of lanes.
INLINE void dot_bf16(NF& acc, NB w, NB x) {
#if defined(__AVX512BF16__)
  acc = (NF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  const NU high = (NU){} + 0xffff0000u;
  acc += (NF)((NU)w << 16) * (NF)((NU)x << 16);
  acc += (NF)((NU)w & high) * (NF)((NU)x & high);
#endif
}
template <class V, class W> INLINE void dot_bf16(Pair<V>& acc, Pair<W> w, Pair<W> x) {
  dot_bf16(acc.low, w.low, x.low), dot_bf16(acc.high, w.high, x.high);
}

static NB codebook;  // the 16 values of an int4 code as dot4 wants them, over and over; set by dsv2_codebook
INLINE NB look_up(NB index) {
#if defined(__AVX512VNNI__)
  return (NB)_mm512_shuffle_epi8((__m512i)codebook, (__m512i)index);
#elif defined(__AVX2__)
  return (NB)_mm256_shuffle_epi8((__m256i)codebook, (__m256i)index);
#else
  NB out;
  for (int i = 0; i < NATIVE; i++) out[i] = codebook[index[i]];
  return out;
#endif
}
template <class V> INLINE Pair<V> look_up(Pair<V> index) { return {look_up(index.low), look_up(index.high)}; }

// ---- memory and work --------------------------------------------------------------------------------------------

// Scratch of the calling thread, which the team shares: grows and is never given back.
struct Arena {
  char* base = nullptr;
  size_t size = 0;
  char* hold(size_t wanted) {
    if (wanted > size) {
      free(base);
      size = (wanted + wanted / 4 + 63) / 64 * 64;
      base = (char*)aligned_alloc(64, size);
    }
    return base;
  }
  ~Arena() { free(base); }
};
static thread_local Arena arena;

// Hands scratch out, one array after the other. From zero on it only finds out how much is wanted.
struct Scratch {
  uintptr_t at;
  template <class T> T* take(size_t count) {
    T* out = (T*)at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return out;
  }
};

#if defined(_OPENMP)
#define PARALLEL _Pragma("omp parallel num_threads(threads)")
static inline void barrier() {
#pragma omp barrier
}
#else
#define PARALLEL
static inline void barrier() {}
#endif

// One thread of the team and how it comes by its jobs, phase by phase. A thread has a share of consecutive ones, because memory
// gives most to a thread that reads one run of addresses; who is done with them helps the next: on a shared machine one core may
// be slower than the other.
struct alignas(64) Counter {
  std::atomic<int> next{0};
};
struct Worker {
  Counter* counters;  // [3][threads]: of the phase before, which may be set to zero now, of this one and of the next
  int me, threads, asked, phase = 0;  // OpenMP may give fewer threads than asked for, for which scratch and jobs are laid out
  explicit Worker(std::vector<Counter>& counters)
      : counters(counters.data()), me(omp_get_thread_num()), threads(omp_get_num_threads()), asked((int)counters.size() / 3) {}
  void meet() {  // what was written before is seen by all after it
    barrier();
    phase = (phase + 1) % 3;
    counters[(phase + 1) % 3 * threads + me].next.store(0, std::memory_order_relaxed);
  }
  int take(int count) {
    for (int turn = 0; turn < threads; turn++) {
      const int64_t owner = (me + turn) % threads;
      const int begin = (int)(count * owner / threads), end = (int)(count * (owner + 1) / threads);
      std::atomic<int>& next = counters[phase * threads + owner].next;
      if (begin + next.load(std::memory_order_relaxed) >= end) continue;
      const int job = begin + next.fetch_add(1, std::memory_order_relaxed);
      if (job < end) return job;
    }
    return count;
  }
};
#define TEAM(counters) std::vector<Counter> counters(3 * (size_t)threads)
#define EACH(job, count) for (int job; (job = worker.take(count)) < (count);)
// The same with the number of the job that this thread does after it, so that its weights can be asked for in time.
#define EACH_AHEAD(job, after, count) \
  for (int job = worker.take(count), after; job < (count) && (after = worker.take(count), true); job = after)

// Activations ready to be multiplied: bf16 rows, or int8 rows with a scale and minus 128 times the sum of each group.
struct Rows {
  int kind, cols, padded, group, groups;
  uint16_t* bf;
  int8_t* q;
  float* scale;
  int32_t* zero;
  void claim(Scratch& scratch, const Matrix& w, int count) {
    kind = w.kind == BF16 ? BF16 : INT8;
    cols = w.cols;
    group = kind == BF16 ? 32 : w.group;
    groups = (cols + group - 1) / group;
    padded = groups * group;
    bf = nullptr, q = nullptr, scale = nullptr, zero = nullptr;
    if (kind == BF16) {
      bf = scratch.take<uint16_t>((size_t)count * padded);
    } else {
      q = scratch.take<int8_t>((size_t)count * padded);
      scale = scratch.take<float>((size_t)count * groups);
      zero = scratch.take<int32_t>((size_t)count * groups);
    }
  }
  // Columns [from, from + count) of one row; `from` begins a group and only the last call may end within one.
  APART void put(int row, int from, int count, const float* x) {
    if (kind == BF16) {
      narrow_row(x, count, bf + (size_t)row * padded + from);
      const int end = std::min(padded, (from + count + 31) / 32 * 32);
      for (int i = from + count; i < end; i++) bf[(size_t)row * padded + i] = 0;
      return;
    }
    for (int begin = 0; begin < count; begin += group) {
      const int here = std::min(group, count - begin), g = (from + begin) / group;
      const float most = largest(x + begin, here), inverse = most > 0 ? 127.0f / most : 0.0f;
      int8_t* to = q + (size_t)row * padded + from + begin;
      int32_t total = 0;
      for (int i = 0; i < here; i++) {
        const int32_t v = (int32_t)std::nearbyintf(x[begin + i] * inverse);
        to[i] = (int8_t)v;
        total += v;
      }
      for (int i = here; i < group; i++) to[i] = 0;
      scale[(size_t)row * groups + g] = most / 127.0f;
      zero[(size_t)row * groups + g] = SIGNED ? 0 : -128 * total;
    }
  }
};

// Where row `first` of matrix e begins, or its block; null: not known.
struct Place {
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
};
INLINE Place place(const Matrix& w, int e, int first) {
  const uint8_t* base = w.codes + e * w.codes_step;
  if (w.kind == BF16) return {base + (size_t)std::min(first, w.rows - 1) * w.cols * 2};
  const size_t block = first / LANES, groups = (w.cols + w.group - 1) / w.group;
  return {base + block * groups * w.group * LANES * w.kind / 8, w.scales + e * w.scales_step + block * groups * LANES};
}

// ---- tiles: two 16-row blocks of a matrix times a few tokens ----------------------------------------------------------

// out[token][block][lane]
template <int BITS, int M>
APART static void tile_codes(const Place* from, const Rows& x, const int* rows, float* out) {
  constexpr int R = BROAD ? 2 : 1;  // blocks at a time: their sums stay in registers
  const int8_t* q[M];
  const float* scale[M];
  const int32_t* zero[M];
  for (int m = 0; m < M; m++) {
    q[m] = x.q + (size_t)rows[m] * x.padded;
    scale[m] = x.scale + (size_t)rows[m] * x.groups;
    zero[m] = x.zero + (size_t)rows[m] * x.groups;
  }
  const int group = x.group;
  const B low = (B)((U){} + 0x0f0f0f0fu);
  for (int first = 0; first < 2; first += R, from += R, out += R * LANES) {
    F total[R][M];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) total[r][m] = (F){};
    const uint8_t* at[R];
    for (int r = 0; r < R; r++) at[r] = from[r].codes;
    for (int g = 0; g < x.groups; g++) {
      I acc[R][M];
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = (I){} + zero[m][g];
      const int begin = g * group;
      if (BITS == 8) {
#pragma GCC unroll 4
        for (int k = 0; k < group; k += 4) {
          B w[R];
          for (int r = 0; r < R; r++) {
            w[r] = from_code(load<B>(at[r]));
            if (M <= 2) __builtin_prefetch(at[r] + 2048);
            at[r] += 64;
          }
          for (int m = 0; m < M; m++) {
            const int32_t a = load<int32_t>(q[m] + begin + k);
            for (int r = 0; r < R; r++) dot4(acc[r][m], w[r], a);
          }
        }
      } else {
#pragma GCC unroll 2
        for (int k = 0; k < group; k += 8) {
          B w[R], v[R];
          for (int r = 0; r < R; r++) {
            const B both = load<B>(at[r]);
            if (M <= 2) __builtin_prefetch(at[r] + 2048);
            w[r] = look_up(both & low);
            v[r] = look_up((B)((U)both >> 4) & low);
            at[r] += 64;
          }
          for (int m = 0; m < M; m++) {
            const int32_t a = load<int32_t>(q[m] + begin + k), b = load<int32_t>(q[m] + begin + k + 4);
            for (int r = 0; r < R; r++) dot4(acc[r][m], w[r], a);
            for (int r = 0; r < R; r++) dot4(acc[r][m], v[r], b);
          }
        }
      }
      for (int r = 0; r < R; r++) {
        const F s = widen16(from[r].scales + (size_t)g * LANES);
        for (int m = 0; m < M; m++) total[r][m] += as_floats(acc[r][m]) * (s * scale[m][g]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) store(out + (m * 2 + r) * LANES, total[r][m]);
  }
}

// out[m * step + r] = row r of w times row m of x, both bf16, `cols` long; what is beyond x's end is not read.
template <int R, int M>
APART static void tile_bf16(const uint16_t* const* w, const uint16_t* const* x, int cols, float* out, int step) {
  constexpr int lanes = NATIVE / 2;
  NF acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = (NF){};
  int k = 0;
  for (; k + lanes <= cols; k += lanes) {
    NB a[R];
    for (int r = 0; r < R; r++) {
      a[r] = load<NB>(w[r] + k);
      if (M <= 2) __builtin_prefetch(w[r] + k + 512);
    }
    for (int m = 0; m < M; m++) {
      const NB b = load<NB>(x[m] + k);
      for (int r = 0; r < R; r++) dot_bf16(acc[r][m], a[r], b);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float total = sum(acc[r][m]);
      for (int i = k; i < cols; i++) total += widen(w[r][i]) * widen(x[m][i]);
      out[m * step + r] = total;
    }
}

template <int R> APART static void tiles_bf16(const uint16_t* const* w, const uint16_t* const* x, int m, int cols, float* out, int step) {
  while (m > 0) {
    int done = 1;
    if (BROAD && m >= 6) tile_bf16<R, 6>(w, x, cols, out, step), done = 6;
    else if (BROAD && m >= 4) tile_bf16<R, 4>(w, x, cols, out, step), done = 4;
    else if (m >= 2) tile_bf16<R, 2>(w, x, cols, out, step), done = 2;
    else tile_bf16<R, 1>(w, x, cols, out, step);
    m -= done, x += done, out += done * step;
  }
}

template <int BITS> APART static void tiles_codes(const Place* from, const Rows& x, const int* rows, int m, float* out) {
  while (m > 0) {
    int done = 1;
    if (BROAD && m >= 12) tile_codes<BITS, 12>(from, x, rows, out), done = 12;
    else if (BROAD && m >= 8) tile_codes<BITS, 8>(from, x, rows, out), done = 8;
    else if (m >= 4) tile_codes<BITS, 4>(from, x, rows, out), done = 4;
    else if (m >= 2) tile_codes<BITS, 2>(from, x, rows, out), done = 2;
    else tile_codes<BITS, 1>(from, x, rows, out);
    m -= done, rows += done, out += done * 2 * LANES;
  }
}

INLINE int blocks_of(int rows) { return (rows + LANES - 1) / LANES; }

// `count` (1 or 2) blocks of matrix e times m <= MOST rows of x: out[m][2][16]. `first` are row numbers; a block
// that reaches beyond the last row gives zeros (quantised) or repeats (bf16) there, and where there is no second one anything.
APART static void multiply(const Matrix& w, int e, const int* first, int count, const Rows& x, const int* rows, int m, float* out) {
  if (w.kind == BF16) {
    const uint16_t* xs[MOST];
    for (int i = 0; i < m; i++) xs[i] = x.bf + (size_t)rows[i] * x.padded;
    for (int b = 0; b < count; b++)
      for (int r = 0; r < LANES; r += 4) {
        const uint16_t* from[4];
        for (int i = 0; i < 4; i++) from[i] = (const uint16_t*)place(w, e, first[b] + r + i).codes;
        tiles_bf16<4>(from, xs, m, w.cols, out + b * LANES + r, 2 * LANES);
      }
    return;
  }
  const Place from[2] = {place(w, e, first[0]), place(w, e, first[count - 1])};
  if (w.kind == INT8) tiles_codes<8>(from, x, rows, m, out);
  else tiles_codes<4>(from, x, rows, m, out);
}

// ---- streams: consecutive rows of a matrix times one token --------------------------------------------------------
// One token is bounded by memory, and memory gives most to a thread that reads one run of addresses. Weights are asked
// for AHEAD bytes early; near the end of a run, what is asked for is the run that comes `next`.
constexpr int AHEAD = 2048;       // bytes
constexpr int SCALES_AHEAD = 512;  // scales, that is 1 KB

template <int R> APART static void stream_bf16(const Place* from, int count, const uint16_t* x, int cols, float* const* out, const Place* next) {
  constexpr int lanes = NATIVE / 2;
  const size_t all = (size_t)count * cols, last = all > AHEAD / 2 ? all - AHEAD / 2 : 0;
  for (int row = 0; row < count; row++) {
    const size_t begin = (size_t)row * cols;
    const uint16_t* w[R];
    NF acc[R][4] = {};
    for (int r = 0; r < R; r++) w[r] = (const uint16_t*)from[r].codes + begin;
    int k = 0;
    for (; k + 4 * lanes <= cols; k += 4 * lanes)
      for (int r = 0; r < R; r++) {
        const uint16_t* ahead = next[r].codes && begin + k >= last ? (const uint16_t*)next[r].codes + (begin + k - last) : w[r] + k + AHEAD / 2;
        for (int i = 0; i < 4; i++) {
          if (lanes * i % 32 == 0) __builtin_prefetch(ahead + lanes * i);
          dot_bf16(acc[r][i], load<NB>(w[r] + k + lanes * i), load<NB>(x + k + lanes * i));
        }
      }
    for (; k + lanes <= cols; k += lanes)
      for (int r = 0; r < R; r++) dot_bf16(acc[r][0], load<NB>(w[r] + k), load<NB>(x + k));
    for (int r = 0; r < R; r++) {
      float total = sum((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
      for (int i = k; i < cols; i++) total += widen(w[r][i]) * widen(x[i]);
      out[r][row] = total;
    }
  }
}

// R runs of blocks side by side: gate and up, which both go on in the next job, or the halves of many rows; all else is one run.
template <int BITS, int R>
APART static void stream_codes(const Place* from, int blocks, const Rows& x, int row, float* const* out, const Place* next) {
  const int8_t* q = x.q + (size_t)row * x.padded;
  const float* scale = x.scale + (size_t)row * x.groups;
  const int32_t* zero = x.zero + (size_t)row * x.groups;
  const int group = x.group, all = blocks * x.groups, codes_left = AHEAD / (group * LANES * BITS / 8), scales_left = SCALES_AHEAD / LANES;
  const B low = (B)((U){} + 0x0f0f0f0fu);
  const uint8_t *at[R], *ahead[R];
  const uint16_t *s[R], *scales_ahead[R];
  for (int r = 0; r < R; r++) {
    at[r] = from[r].codes, ahead[r] = at[r] + AHEAD;
    s[r] = from[r].scales, scales_ahead[r] = s[r] + SCALES_AHEAD;
  }
  for (int b = 0, done = 0; b < blocks; b++) {
    F total[R] = {};
    for (int g = 0; g < x.groups; g++, done++) {
      for (int r = 0; r < R; r++) {
        if (next[r].codes && done == std::max(0, all - codes_left)) ahead[r] = next[r].codes;
        if (next[r].codes && done == std::max(0, all - scales_left)) scales_ahead[r] = next[r].scales;
      }
      I acc[R];
      for (int r = 0; r < R; r++) acc[r] = (I){} + zero[g];
      const int8_t* a = q + (size_t)g * group;
      for (int r = 0; r < R; r++) __builtin_prefetch(scales_ahead[r]), scales_ahead[r] += LANES;
#pragma GCC unroll 4
      for (int k = 0; k < group; k += 32 / BITS) {
        B w[R];
        for (int r = 0; r < R; r++) {
          w[r] = load<B>(at[r]);
          __builtin_prefetch(ahead[r]);
          at[r] += 64, ahead[r] += 64;
          dot4(acc[r], BITS == 8 ? from_code(w[r]) : look_up(w[r] & low), load<int32_t>(a + k));
        }
        if (BITS == 4)
          for (int r = 0; r < R; r++) dot4(acc[r], look_up((B)((U)w[r] >> 4) & low), load<int32_t>(a + k + 4));
      }
      for (int r = 0; r < R; r++) {
        total[r] += as_floats(acc[r]) * (widen16(s[r]) * scale[g]);
        s[r] += LANES;
      }
    }
    for (int r = 0; r < R; r++) store(out[r] + b * LANES, total[r]);
  }
}

// out[r][i] = row first[r] + i of matrix e times row `row` of x, for `count` rows and R runs of them; `next` likewise.
template <int R>
APART static void stream(const Matrix& w, int e, const int* first, int count, const Rows& x, int row, float* const* out, const Place* next) {
  Place from[R];
  for (int r = 0; r < R; r++) from[r] = place(w, e, first[r]);
  if (w.kind == INT8) stream_codes<8, R>(from, blocks_of(count), x, row, out, next);
  else if (w.kind == INT4) stream_codes<4, R>(from, blocks_of(count), x, row, out, next);
  else stream_bf16<R>(from, std::min(count, w.rows - first[R - 1]), x.bf + (size_t)row * x.padded, w.cols, out, next);
}
INLINE void stream(const Matrix& w, int e, int first, int count, const Rows& x, int row, float* out, Place next) {
  stream<1>(w, e, &first, count, x, row, &out, &next);
}
// Many rows as two runs side by side: the processor then waits less for each sum, and memory gives a little more.
struct Halves {
  Place at[2];
};
INLINE Halves halves(const Matrix& w, int e, int first, int count) { return {place(w, e, first), place(w, e, first + count / 2)}; }
APART static void stream_halves(const Matrix& w, int e, int first, int count, const Rows& x, int row, float* out, const Halves& next) {
  const int half = count / 2, firsts[2] = {first, first + half};
  float* const outs[2] = {out, out + half};
  if (count % (2 * LANES)) stream(w, e, first, count, x, row, out, next.at[0]);
  else stream<2>(w, e, firsts, half, x, row, outs, next.at);
}

constexpr int WIDE = 2 * LANES;   // rows of a job
constexpr int WIDEST = 8 * WIDE;  // at most, where one token passes through: the longer the runs, the better

// Where the results of a product go, and what is done with them there: (token, row) is to[token * step + row].
struct Target {
  enum { FLOATS, ROUNDED, NARROW, ADDED } how;  // fp32; fp32 rounded to bf16; bf16; bf16 added to what is there
  void* to;
  size_t step;
  APART void give(int token, int row, const float* values, int count) const {
    const size_t at = token * step + row;
    float* wide = (float*)to + at;
    uint16_t* narrowed = (uint16_t*)to + at;
    if (how == FLOATS) memcpy(wide, values, count * sizeof(float));
    else if (how == ROUNDED) for (int i = 0; i < count; i++) wide[i] = rounded(values[i]);
    else if (how == NARROW) narrow_row(values, count, narrowed);
    else add_to(narrowed, values, count);
  }
};

// Rows [first, first + count) of matrix e times rows `from`, `from + step`, ... of x, n of them; `next` is what is read after it.
APART static void product(const Matrix& w, int e, int first, int count, const Rows& x, int from, int step, int n, Place next, const Target& target) {
  float out[MOST * WIDE];
  const int end = first + count, most = n == 1 ? WIDEST : WIDE;
  for (; first < end; first += most) {
    const int here = std::min(most, end - first), blocks = blocks_of(here), firsts[2] = {first, first + LANES};
    if (n == 1) {
      stream(w, e, first, here, x, from, out, first + most < end ? place(w, e, first + most) : next);
      target.give(0, first, out, here);
      continue;
    }
    for (int t = 0; t < n; t += MOST) {
      const int m = std::min(MOST, n - t);
      int rows[MOST];
      for (int i = 0; i < m; i++) rows[i] = from + (t + i) * step;
      multiply(w, e, firsts, blocks, x, rows, m, out);
      for (int i = 0; i < m; i++) target.give(t + i, first, out + i * WIDE, here);
    }
  }
}
// Jobs of WIDE rows of w times the first n rows of x.
INLINE int jobs_of(const Matrix& w) { return (w.rows + WIDE - 1) / WIDE; }
APART static void product_job(const Matrix& w, int job, int after, const Rows& x, int n, const Target& target) {
  const int first = job * WIDE;
  product(w, 0, first, std::min(WIDE, w.rows - first), x, 0, 1, n, after < jobs_of(w) ? place(w, 0, after * WIDE) : Place{}, target);
}

// RMSNorm of a row that was rounded to bf16, rounded twice as the plain path does; into floats.
APART static void norm_row(const float* x, const uint16_t* weight, int size, float eps, float* out) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < size; i++) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / size + eps);
  for (int i = 0; i < size; i++) out[i] = rounded(widen(weight[i]) * rounded(x[i] * factor));
}

// ---- the functions --------------------------------------------------------------------------------------------------

extern "C" void dsv2_codebook(const uint8_t* values) {
  for (int i = 0; i < NATIVE; i++) codebook[i] = values[i % 16];
  codebook = from_code(codebook);
}
extern "C" const char* dsv2_path() {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  return "AVX-512 (VNNI, BF16)";
#elif defined(__AVX512VNNI__)
  return "AVX-512 (VNNI)";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return "portable C++";
#endif
}

// x [n, cols] in bf16 times w -> out [n, rows], bf16 or fp32.
extern "C" void dsv2_linear(const Matrix* w, const uint16_t* x, int n, void* out, int wide, int threads) {
  Rows in;
  float* rows = nullptr;
  auto claim = [&](Scratch scratch) {
    in.claim(scratch, *w, n);
    rows = scratch.take<float>((size_t)threads * w->cols);
    return scratch.at;
  };
  claim({(uintptr_t)arena.hold(claim({0}))});
  TEAM(counters);
  PARALLEL {
    Worker worker(counters);
    float* row = rows + (size_t)worker.me * w->cols;
    EACH(t, n) {
      widen_row(x + (size_t)t * w->cols, w->cols, row);
      in.put(t, 0, w->cols, row);
    }
    worker.meet();
    EACH_AHEAD(job, after, jobs_of(*w)) product_job(*w, job, after, in, n, {wide ? Target::FLOATS : Target::NARROW, out, (size_t)w->rows});
  }
}

// to = silu(gates) * ups, in whole vectors.
APART static void gate(const float* gates, const float* ups, float* to, int count) {
  for (int i = 0; i < count; i += NATIVE / 4) {
    const NF g = load<NF>(gates + i);
    store(to + i, g / (1.0f + exp_of(-g)) * load<NF>(ups + i));
  }
}

// Softmax over the experts and the best top_k of them, in falling order; see experts.route.
APART static void route(const Mlp& p, float* scores, int32_t* index, float* weight) {
  float most = scores[0], total = 0;
  for (int e = 1; e < p.experts; e++) most = std::max(most, scores[e]);
  for (int e = 0; e < p.experts; e++) total += scores[e] = std::exp(scores[e] - most);
  for (int e = 0; e < p.experts; e++) scores[e] /= total;
  std::vector<char> open(p.experts, 1);
  if (p.groups > 1) {
    const int size = p.experts / p.groups;
    std::vector<char> kept(p.groups, 0);
    for (int k = 0; k < p.top_groups; k++) {
      int best = -1;
      float value = -1;
      for (int g = 0; g < p.groups; g++) {
        const float top = *std::max_element(scores + g * size, scores + (g + 1) * size);
        if (!kept[g] && top > value) best = g, value = top;
      }
      kept[best] = 1;
    }
    for (int e = 0; e < p.experts; e++)
      if (!kept[e / size]) scores[e] = 0;
  }
  float chosen = 0;
  for (int k = 0; k < p.top_k; k++) {
    int best = -1;
    for (int e = 0; e < p.experts; e++)
      if (open[e] && (best < 0 || scores[e] > scores[best])) best = e;
    open[best] = 0;
    index[k] = best;
    chosen += weight[k] = scores[best];
  }
  for (int k = 0; k < p.top_k; k++)
    weight[k] = p.normalise && p.top_k > 1 ? weight[k] / (chosen + 1e-20f) : weight[k] * p.factor;
}

// Where job `job` of the down projections begins. One token's jobs are an eighth of a thread's share: long runs of addresses.
constexpr int DOWN_JOBS = 8;
INLINE int down_begin(int job, int rows, int n, int threads) {
  if (n > 1) return std::min(rows, job * WIDE);
  return (int)std::min<int64_t>(rows, (int64_t)blocks_of(rows) * job / (DOWN_JOBS * threads) * LANES);
}

// Where an MLP keeps what lies between its phases.
struct MlpScratch {
  Rows in, h_routed, h_shared;
  float *normed, *logits, *weight, *sums;
  int32_t *index, *order, *tokens, *starts, *active, *actives, *all;
  size_t out, of_thread;  // a thread's sums [n, rows of a down job], and where its products begin behind them
  MlpScratch(const Mlp& p, int n, int threads, Scratch& scratch) {
    const size_t slots = (size_t)n * p.top_k, job = n > 1 ? WIDE : (blocks_of(p.hidden) / (DOWN_JOBS * threads) + 1) * LANES;
    in.claim(scratch, p.experts ? p.gate_up : p.shared_gate_up, n);
    if (p.experts) h_routed.claim(scratch, p.down, slots);
    if (p.shared_width) h_shared.claim(scratch, p.shared_down, n);
    normed = scratch.take<float>((size_t)n * p.hidden);
    logits = scratch.take<float>((size_t)n * p.experts);
    index = scratch.take<int32_t>(slots);
    weight = scratch.take<float>(slots);
    order = scratch.take<int32_t>(slots);   // slots by expert
    tokens = scratch.take<int32_t>(slots);  // the token of order[i]
    starts = scratch.take<int32_t>(p.experts + 1);
    active = scratch.take<int32_t>(p.experts + 1);
    actives = scratch.take<int32_t>(1);
    all = scratch.take<int32_t>(n);
    out = n * job;
    of_thread = out + std::max<size_t>(MOST * WIDE, job);
    sums = scratch.take<float>(threads * of_thread);
  }
};

// to += MLP(norm(x)) for x and to [n, hidden] in bf16, which may be the same: routed experts, shared experts, or the one dense
// MLP ("shared" alone). Without a norm x is taken as it is. `chosen` and `factors` [n, top_k] take the router's place where
// they are given; an expert below 0 is another process's.
static void run_mlp(const Mlp& p, const uint16_t* x, uint16_t* to, const int32_t* chosen, const float* factors, int n, Scratch scratch,
                    Worker& worker) {
  const bool routed = p.experts > 0, shared = p.shared_width > 0;
  const int slots = routed ? n * p.top_k : 0, k = p.top_k;
  MlpScratch s(p, n, worker.asked, scratch);
  float *mine = s.sums + worker.me * s.of_thread, *out = mine + s.out;
  const int unit = s.in.kind == BF16 ? 64 : (routed ? p.down.group : p.shared_down.group);
  const int units = routed ? (p.width + unit - 1) / unit : 0, shared_units = (p.shared_width + unit - 1) / unit;

  // `unit` columns of silu(gate) * up for some tokens of one expert, rounded into h.
  auto gate_up = [&](const Matrix& w, int e, int width, int u, const int* from, const int* to, int count, Rows& h, const Place* next) {
    float out[MOST * 2 * LANES], tile[MOST * 64];
    const int rows = w.kind == BF16 ? width : blocks_of(width) * LANES;  // where `up` begins
    if (count == 1) {
      const int begin = u * unit, wide = std::min(unit, width - begin);
      const int first[2] = {begin, rows + begin};
      float* const outs[2] = {tile, out};
      stream<2>(w, e, first, wide, s.in, *from, outs, next);
      gate(tile, out, tile, wide);
      h.put(*to, begin, wide, tile);
      return;
    }
    for (int t = 0; t < count; t += MOST) {
      const int m = std::min(MOST, count - t), begin = u * unit, end = std::min(width, begin + unit);
      for (int c = begin; c < end; c += LANES) {
        const int first[2] = {c, rows + c};
        multiply(w, e, first, 2, s.in, from + t, m, out);
        for (int i = 0; i < m; i++) gate(out + i * WIDE, out + i * WIDE + LANES, tile + i * 64 + c - begin, LANES);
      }
      for (int i = 0; i < m; i++) h.put(to[t + i], begin, end - begin, tile + i * 64);
    }
  };

  EACH(t, n) {
    float* row = s.normed + (size_t)t * p.hidden;
    widen_row(x + (size_t)t * p.hidden, p.hidden, row);
    if (p.norm) norm_row(row, p.norm, p.hidden, p.eps, row);
    s.in.put(t, 0, p.hidden, row);
    s.all[t] = t;
  }
  if (worker.me == 0) *s.actives = s.active[0] = 0;
  worker.meet();
  if (routed && !chosen) {
    const int chunk = 8, chunks = (p.experts + chunk - 1) / chunk;
    EACH(job, n * chunks) {
      const int t = job / chunks, begin = job % chunks * chunk;
      const float* row = s.normed + (size_t)t * p.hidden;
      for (int e = begin; e < std::min(p.experts, begin + chunk); e++) {
        const float* w = p.gate + (size_t)e * p.hidden;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < p.hidden; i++) total += row[i] * w[i];
        s.logits[(size_t)t * p.experts + e] = total;
      }
    }
    worker.meet();
    EACH(t, n) route(p, s.logits + (size_t)t * p.experts, s.index + t * k, s.weight + t * k);
    worker.meet();
  }
  if (routed) {
    if (worker.me == 0) {
      if (chosen) memcpy(s.index, chosen, slots * sizeof(int32_t)), memcpy(s.weight, factors, slots * sizeof(float));
      memset(s.starts, 0, (p.experts + 1) * sizeof(int32_t));
      for (int i = 0; i < slots; i++)
        if (s.index[i] >= 0) s.starts[s.index[i] + 1]++;
      for (int e = 0; e < p.experts; e++) {
        if (s.starts[e + 1]) s.active[(*s.actives)++] = e;
        s.starts[e + 1] += s.starts[e];
      }
      std::vector<int32_t> next(s.starts, s.starts + p.experts);
      for (int i = 0; i < slots; i++) {
        if (s.index[i] < 0) continue;
        const int at = next[s.index[i]]++;
        s.order[at] = i, s.tokens[at] = i / k;
      }
    }
    worker.meet();
  }
  const int actives = *s.actives, routed_jobs = actives * units, up_jobs = routed_jobs + shared_units;
  EACH_AHEAD(job, after, up_jobs) {
    const bool more = after < routed_jobs;
    const Matrix& w = more ? p.gate_up : p.shared_gate_up;
    const int e = more ? s.active[after / units] : 0, begin = (more ? after % units : after - routed_jobs) * unit;
    const int up = w.kind == BF16 ? w.rows / 2 : blocks_of(more ? p.width : p.shared_width) * LANES;
    const Place next[2] = {after < up_jobs ? place(w, e, begin) : Place{}, after < up_jobs ? place(w, e, up + begin) : Place{}};
    if (job < routed_jobs) {
      const int e = s.active[job / units], begin = s.starts[e];
      gate_up(p.gate_up, e, p.width, job % units, s.tokens + begin, s.order + begin, s.starts[e + 1] - begin, s.h_routed, next);
    } else {
      gate_up(p.shared_gate_up, 0, p.shared_width, job - routed_jobs, s.all, s.all, n, s.h_shared, next);
    }
  }
  worker.meet();
  const int down_jobs = n > 1 ? (p.hidden + WIDE - 1) / WIDE : DOWN_JOBS * worker.asked;
  EACH_AHEAD(job, after, down_jobs) {
    const auto begins = [&](int job) { return down_begin(job, p.hidden, n, worker.asked); };
    const int begin = begins(job), count = begins(job + 1) - begin, begin_after = begins(after), count_after = begins(after + 1) - begin_after;
    const Halves next_job = count_after > 0 ? halves(routed ? p.down : p.shared_down, s.active[0], begin_after, count_after) : Halves{};
    const int first[2] = {begin, begin + LANES}, blocks = blocks_of(count), wide = blocks * LANES;
    memset(mine, 0, (size_t)n * wide * 4);
    for (int a = 0; a < actives; a++) {
      const int e = s.active[a];
      const Halves next = a + 1 < actives ? halves(p.down, s.active[a + 1], begin, count) : shared ? halves(p.shared_down, 0, begin, count) : next_job;
      for (int i = s.starts[e]; i < s.starts[e + 1]; i += MOST) {
        const int m = std::min(MOST, s.starts[e + 1] - i);
        if (m == 1) stream_halves(p.down, e, begin, count, s.h_routed, s.order[i], out, next);
        else multiply(p.down, e, first, blocks, s.h_routed, s.order + i, m, out);
        for (int j = 0; j < m; j++) {
          const float factor = s.weight[s.order[i + j]];
          float* sum = mine + (size_t)s.tokens[i + j] * wide;
          for (int l = 0; l < count; l++) sum[l] += factor * out[j * WIDE + l];
        }
      }
    }
    for (int t = 0; shared && t < n; t += MOST) {
      const int m = std::min(MOST, n - t);
      if (m == 1) stream_halves(p.shared_down, 0, begin, count, s.h_shared, t, out, next_job);
      else multiply(p.shared_down, 0, first, blocks, s.h_shared, s.all + t, m, out);
      for (int i = 0; i < m; i++)
        for (int l = 0; l < count; l++) mine[(size_t)(t + i) * wide + l] += out[i * WIDE + l];
    }
    for (int t = 0; t < n; t++) add_to(to + (size_t)t * p.hidden + begin, mine + (size_t)t * wide, count);
  }
}

// out = MLP(x), or the chosen experts' weighted sum; out is zero before.
extern "C" void dsv2_feed(const Mlp* part, const uint16_t* x, const int32_t* chosen, const float* factors, uint16_t* out, int n, int threads) {
  Scratch measure{0};
  MlpScratch(*part, n, threads, measure);
  const Scratch scratch{(uintptr_t)arena.hold(measure.at)};
  TEAM(counters);
  PARALLEL {
    Worker worker(counters);
    run_mlp(*part, x, out, chosen, factors, n, scratch, worker);
  }
}

// Neighbouring pairs turned by the angles of one position; table [2, size / 2] holds cos and sin.
APART static void turn(float* x, const float* table, int size) {
  const float *cosine = table, *sine = table + size / 2;
  for (int i = 0; i < size / 2; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = a * sine[i] + b * cosine[i];
  }
}

// Attention takes 16 heads at a time, one a lane: scores then need no sums across lanes. A query [heads, width] is laid out so that
// for each pair of numbers those of 16 heads are side by side.
APART static void side_by_side(const uint16_t* query, int heads, int width, uint32_t* out) {
  for (int g = 0; g < heads; g += LANES, out += (size_t)width / 2 * LANES)
    for (int c = 0; c < width / 2; c++)
      for (int h = 0; h < LANES; h++) out[(size_t)c * LANES + h] = g + h < heads ? load<uint32_t>(query + (size_t)(g + h) * width + 2 * c) : 0;
}

// scores[t] = 16 heads of one query times T cached tokens.
template <int T> static void score(const uint32_t* query, const uint16_t* cached, int width, F* scores) {
  F acc[T];
  for (int t = 0; t < T; t++) acc[t] = (F){};
#pragma GCC unroll 4
  for (int k = 0; k < width; k += 2) {
    const B q = load<B>(query + (size_t)k / 2 * LANES);
    for (int t = 0; t < T; t++) dot_bf16(acc[t], (B)((U){} + load<uint32_t>(cached + (size_t)t * width + k)), q);
  }
  for (int t = 0; t < T; t++) scores[t] = acc[t];
}

// total[HEADS][rank] += sum over `count` cached tokens of weights times the token's latent; weights[t / 2][16 heads] are
// pairs of bf16, and the pair of a last odd token ends in a zero. Meanwhile what lies at `soon` is asked for, which goes on.
template <int HEADS>
static void mix(const uint32_t* weights, const uint16_t* cached, int width, int count, int rank, float* total, const char*& soon) {
  int c = 0;
#if defined(__AVX512BF16__)
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; i++)
    for (int half = 0; half < 2; half++) order[half][i] = (uint16_t)(half * 16 + i / 2 + (i % 2) * 32);
  const __m512i lower = _mm512_load_si512(order[0]), upper = _mm512_load_si512(order[1]);
  for (; c + 64 <= rank; c += 64) {
    F acc[HEADS][4];
    for (int h = 0; h < HEADS; h++)
      for (int i = 0; i < 4; i++) acc[h][i] = load<F>(total + (size_t)h * rank + c + 16 * i);
    for (int t = 0; t < count; t += 2) {  // where there is no second token the first is read twice
      const uint16_t *one = cached + (size_t)t * width + c, *two = t + 1 < count ? one + width : one;
      const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);
      __builtin_prefetch(soon, 0, 2), __builtin_prefetch(soon + 64, 0, 2), soon += 128;
      const __m512i d = _mm512_loadu_si512(one + 32), e = _mm512_loadu_si512(two + 32);
      const __m512i v[4] = {_mm512_permutex2var_epi16(a, lower, b), _mm512_permutex2var_epi16(a, upper, b),
                            _mm512_permutex2var_epi16(d, lower, e), _mm512_permutex2var_epi16(d, upper, e)};
      for (int h = 0; h < HEADS; h++) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32((int32_t)weights[t / 2 * LANES + h]);
        for (int i = 0; i < 4; i++) acc[h][i] = (F)_mm512_dpbf16_ps((__m512)acc[h][i], (__m512bh)v[i], w);
      }
    }
    for (int h = 0; h < HEADS; h++)
      for (int i = 0; i < 4; i++) store(total + (size_t)h * rank + c + 16 * i, acc[h][i]);
  }
#endif
  auto weight = [&](int h, int t) { return widen((uint16_t)(weights[t / 2 * LANES + h] >> (t % 2 * 16))); };
  for (; c + 16 <= rank; c += 16) {
    F acc[HEADS];
    for (int h = 0; h < HEADS; h++) acc[h] = load<F>(total + (size_t)h * rank + c);
    for (int t = 0; t < count; t++) {
      const F v = widen16(cached + (size_t)t * width + c);
      for (int h = 0; h < HEADS; h++) acc[h] += v * weight(h, t);
    }
    for (int h = 0; h < HEADS; h++) store(total + (size_t)h * rank + c, acc[h]);
  }
  for (; c < rank; c++)
    for (int h = 0; h < HEADS; h++)
      for (int t = 0; t < count; t++) total[(size_t)h * rank + c] += weight(h, t) * widen(cached[(size_t)t * width + c]);
}

// One query of all heads, side by side, over cached tokens [begin, end): sums not yet divided, with each head's maximum and divisor.
APART static void attend(const Attention& p, const uint32_t* query, const uint16_t* cached, int begin, int end, float* total, float* most,
                   float* divisor) {
  const int width = p.rank + p.rope, groups = blocks_of(p.heads);
  std::vector<float> tops((size_t)groups * LANES, -INFINITY), sums((size_t)groups * LANES, 0.0f);
  memset(total, 0, (size_t)p.heads * p.rank * 4);
  for (int at = begin; at < end; at += BLOCK) {
    const int count = std::min(BLOCK, end - at);
    for (int g = 0; g < groups; g++) {
      F scores[BLOCK];
      const uint32_t* first = query + (size_t)g * width / 2 * LANES;
      int done = 0;
      constexpr int several = BROAD ? 16 : 4;
      for (; done + several <= count; done += several) score<several>(first, cached + (size_t)(at + done) * width, width, scores + done);
      for (; done < count; done++) score<1>(first, cached + (size_t)(at + done) * width, width, scores + done);
      const F before = load<F>(tops.data() + g * LANES);
      F top = before, added = {};
      for (int t = 0; t < count; t++) {
        scores[t] *= p.scale;
        top = larger(scores[t], top);
      }
      uint32_t weights[BLOCK / 2 * LANES];
      for (int t = 0; t < count; t += 2) {
        const F one = exp_of(scores[t] - top), two = t + 1 < count ? exp_of(scores[t + 1] - top) : (F){};
        added += one + two;
        const U high = (U){} + 0xffff0000u, half = (U){} + 0x8000u;  // rounded; they are positive and finite
        const U pair = (((U)one + half) >> 16) | (((U)two + half) & high);
        store(weights + t / 2 * LANES, pair);
      }
      const F shrink = exp_of(before - top), sum = load<F>(sums.data() + g * LANES) * shrink + added;
      store(tops.data() + g * LANES, top);
      store(sums.data() + g * LANES, sum);
      const int heads = std::min(LANES, p.heads - g * LANES);
      float* to = total + (size_t)g * LANES * p.rank;
      for (int h = 0; h < heads; h++)
        if (shrink[h] != 1.0f)
          for (int c = 0; c < p.rank; c++) to[(size_t)h * p.rank + c] *= shrink[h];
      int h = 0;
      const uint16_t* rows = cached + (size_t)at * width;
      const char* soon = (const char*)(rows + (size_t)count * width);
      for (; h + 6 <= heads; h += 6) mix<6>(weights + h, rows, width, count, p.rank, to + (size_t)h * p.rank, soon);
      for (; h + 4 <= heads; h += 4) mix<4>(weights + h, rows, width, count, p.rank, to + (size_t)h * p.rank, soon);
      for (; h < heads; h++) mix<1>(weights + h, rows, width, count, p.rank, to + (size_t)h * p.rank, soon);
    }
  }
  memcpy(most, tops.data(), p.heads * 4);
  memcpy(divisor, sums.data(), p.heads * 4);
}

// What the queries of a step see, and how it is divided among the threads.
struct Sight {
  const float* rotary;     // [n, 2, rope / 2]
  const int32_t* lengths;  // [n]: a token is the last of the first so many rows of its cache
  int n, chunk = 0, chunks = 0;
  Sight(const float* rotary, const int32_t* lengths, int n, int threads) : rotary(rotary), lengths(lengths), n(n) {
    if (!lengths) return;
    const int longest = *std::max_element(lengths, lengths + n);
    chunk = std::max(BLOCK, (longest * n / (4 * threads) + BLOCK - 1) / BLOCK * BLOCK);
    chunks = (longest + chunk - 1) / chunk;
  }
};

// Where attention keeps what lies between its phases.
struct AttentionScratch {
  Rows in, middle, nope, mixed, last;
  float *q_a, *q, *kv_a, *out, *totals, *mosts, *divisors, *rows;
  uint16_t* query;
  uint32_t* laid;  // [threads] queries side by side
  size_t row, laid_of_thread;
  AttentionScratch(const Attention& p, const Sight& sight, int threads, Scratch& scratch) {
    const size_t n = sight.n, heads = p.heads, width = p.rank + p.rope, parts = n * sight.chunks * heads;
    in.claim(scratch, p.kv_a, n);
    if (p.q_a.kind != NONE) middle.claim(scratch, p.q, n);
    nope.claim(scratch, p.k_up, n * heads);
    mixed.claim(scratch, p.v_up, n * heads);
    last.claim(scratch, p.o, n);
    q_a = scratch.take<float>(n * p.q_rank);
    q = scratch.take<float>(n * heads * (p.nope + p.rope));
    kv_a = scratch.take<float>(n * width);
    query = scratch.take<uint16_t>(n * heads * width);
    laid_of_thread = blocks_of(heads) * LANES * width / 2;
    laid = scratch.take<uint32_t>(threads * laid_of_thread);
    totals = scratch.take<float>(parts * p.rank);
    mosts = scratch.take<float>(parts);
    divisors = scratch.take<float>(parts);
    out = scratch.take<float>(n * heads * p.value);
    row = std::max({p.hidden, p.q_rank, p.rank}) + 16;
    rows = scratch.take<float>(threads * row);
  }
};

// x += Attention(norm(x)) for n tokens x [n, hidden] in bf16. caches[i] [capacity, rank + rope] is token i's, in bf16; its own row is
// written here.
static void run_attention(const Attention& p, uint16_t* x, const Sight& sight, uint16_t* const* caches, Scratch scratch, Worker& worker) {
  const int n = sight.n, width = p.rank + p.rope, head = p.nope + p.rope, heads = p.heads;
  const bool low = p.q_a.kind != NONE;
  AttentionScratch s(p, sight, worker.asked, scratch);
  const Matrix& first = low ? p.q_a : p.q;
  float* mine = s.rows + worker.me * s.row;
  EACH(t, n) {
    widen_row(x + (size_t)t * p.hidden, p.hidden, mine);
    norm_row(mine, p.norm, p.hidden, p.eps, mine);
    s.in.put(t, 0, p.hidden, mine);
  }
  worker.meet();
  const int first_jobs = jobs_of(first);
  EACH_AHEAD(job, after, first_jobs + jobs_of(p.kv_a)) {
    if (job < first_jobs) product_job(first, job, after, s.in, n, {Target::ROUNDED, low ? s.q_a : s.q, (size_t)first.rows});
    else product_job(p.kv_a, job - first_jobs, after - first_jobs, s.in, n, {Target::ROUNDED, s.kv_a, (size_t)width});
  }
  worker.meet();
  if (low) {
    EACH(t, n) {
      norm_row(s.q_a + (size_t)t * p.q_rank, p.q_a_norm, p.q_rank, 1e-6f, mine);
      s.middle.put(t, 0, p.q_rank, mine);
    }
    worker.meet();
    EACH_AHEAD(job, after, jobs_of(p.q)) product_job(p.q, job, after, s.middle, n, {Target::ROUNDED, s.q, (size_t)p.q.rows});
    worker.meet();
  }
  EACH_AHEAD(job, after, heads + n) {
    if (job >= heads) {  // the new row of the cache
      const int t = job - heads;
      float* row = s.kv_a + (size_t)t * width;
      uint16_t* to = caches[t] + (size_t)(sight.lengths[t] - 1) * width;
      norm_row(row, p.kv_a_norm, p.rank, 1e-6f, row);
      turn(row + p.rank, sight.rotary + (size_t)t * p.rope, p.rope);
      narrow_row(row, width, to);
      continue;
    }
    for (int t = 0; t < n; t++) {
      float* from = s.q + ((size_t)t * heads + job) * head;
      s.nope.put(t * heads + job, 0, p.nope, from);
      turn(from + p.nope, sight.rotary + (size_t)t * p.rope, p.rope);
      narrow_row(from + p.nope, p.rope, s.query + ((size_t)t * heads + job) * width + p.rank);
    }
    const Place next = after < heads ? place(p.k_up, after, 0) : Place{};
    product(p.k_up, job, 0, p.rank, s.nope, job, heads, n, next, {Target::NARROW, s.query + (size_t)job * width, (size_t)heads * width});
  }
  worker.meet();
  EACH(job, n * sight.chunks) {
    const int t = job / sight.chunks, begin = job % sight.chunks * sight.chunk, end = std::min(sight.lengths[t], begin + sight.chunk);
    const size_t at = (size_t)job * heads;
    uint32_t* query = s.laid + worker.me * s.laid_of_thread;
    if (begin >= end) continue;
    side_by_side(s.query + (size_t)t * heads * width, heads, width, query);
    attend(p, query, caches[t], begin, end, s.totals + at * p.rank, s.mosts + at, s.divisors + at);
  }
  worker.meet();
  EACH_AHEAD(h, after, heads) {
    for (int t = 0; t < n; t++) {
      const int used = (sight.lengths[t] + sight.chunk - 1) / sight.chunk;
      float top = -INFINITY, divisor = 0;
      for (int i = 0; i < used; i++) top = std::max(top, s.mosts[((size_t)t * sight.chunks + i) * heads + h]);
      std::fill(mine, mine + p.rank, 0.0f);
      for (int i = 0; i < used; i++) {
        const size_t at = ((size_t)t * sight.chunks + i) * heads + h;
        const float factor = std::exp(s.mosts[at] - top);
        divisor += s.divisors[at] * factor;
        for (int c = 0; c < p.rank; c++) mine[c] += s.totals[at * p.rank + c] * factor;
      }
      for (int c = 0; c < p.rank; c++) mine[c] /= divisor;
      s.mixed.put(t * heads + h, 0, p.rank, mine);
    }
    const Place next = after < heads ? place(p.v_up, after, 0) : Place{};
    product(p.v_up, h, 0, p.value, s.mixed, h, heads, n, next, {Target::FLOATS, s.out + (size_t)h * p.value, (size_t)heads * p.value});
  }
  worker.meet();
  EACH(t, n) s.last.put(t, 0, heads * p.value, s.out + (size_t)t * heads * p.value);
  worker.meet();
  EACH_AHEAD(job, after, jobs_of(p.o)) product_job(p.o, job, after, s.last, n, {Target::ADDED, x, (size_t)p.hidden});
}

// x [n, hidden] through `count` layers, or their attention or MLP alone. caches [count, n].
extern "C" void dsv2_layers(const Layer* layers, int count, int attention, int mlp, uint16_t* x, int n, const float* rotary,
                            const int32_t* lengths, uint16_t* const* caches, int threads) {
  const Sight sight(rotary, lengths, n, threads);
  size_t wanted = 0;
  for (int i = 0; i < count; i++) {
    Scratch one{0}, other{0};
    if (attention) AttentionScratch(layers[i].attention, sight, threads, one);
    if (mlp) MlpScratch(layers[i].mlp, n, threads, other);
    wanted = std::max({wanted, (size_t)one.at, (size_t)other.at});
  }
  const Scratch scratch{(uintptr_t)arena.hold(wanted)};
  TEAM(counters);
  PARALLEL {
    Worker worker(counters);
    for (int i = 0; i < count; i++) {
      if (attention) run_attention(layers[i].attention, x, sight, caches + (size_t)i * n, scratch, worker), worker.meet();
      if (mlp) run_mlp(layers[i].mlp, x, x, nullptr, nullptr, n, scratch, worker), worker.meet();
    }
  }
}

// ---- packing ------------------------------------------------------------------------------------------------------

// weights [rows, cols] (fp32) -> codes and scales in the interleaved order; see quantized.pack, which says what for.
extern "C" void dsv2_pack(const float* weights, int rows, int cols, int bits, int group, const float* shrinks, int candidates,
                          uint8_t* codes, uint16_t* scales, int threads) {
  const int groups = (cols + group - 1) / group, blocks = blocks_of(rows);
  float values[16], middles[15];
  for (int i = 0; i < 16; i++) values[i] = SIGNED ? (float)(int8_t)codebook[i] : (float)codebook[i] - 128.0f;
  for (int i = 0; i < 15; i++) middles[i] = (values[i] + values[i + 1]) / 2;
  TEAM(counters);
  PARALLEL {
    Worker worker(counters);
    std::vector<float> x(group), scaled(group);
    std::vector<int32_t> index(group);
    std::vector<uint8_t> bytes(group);
    auto encode = [&](float inverse) {
      for (int i = 0; i < group; i++) scaled[i] = x[i] * inverse, index[i] = 0;
      for (int j = 0; j < 15; j++)
        for (int i = 0; i < group; i++) index[i] += scaled[i] > middles[j];
    };
    EACH(block, blocks) for (int lane = 0; lane < LANES; lane++) for (int g = 0; g < groups; g++) {
      const int row = block * LANES + lane, here = row < rows ? std::min(group, cols - g * group) : 0;
      std::copy_n(weights + (size_t)row * cols + g * group, here, x.data());
      std::fill(x.begin() + here, x.end(), 0.0f);
      const float size = largest(x.data(), group);
      uint16_t* scale = scales + ((size_t)block * groups + g) * LANES + lane;
      if (bits == 8) {
        *scale = narrow(size / 127.0f);
        const float s = widen(*scale), inverse = s > 0 ? 1.0f / s : 0.0f;
        for (int i = 0; i < group; i++) bytes[i] = (uint8_t)(int32_t)(std::min(127.0f, std::max(-127.0f, std::nearbyintf(x[i] * inverse))) + 128.0f);
        for (int i = 0; i < group; i += 4) memcpy(codes + (((size_t)block * groups + g) * group + i) * LANES + lane * 4, bytes.data() + i, 4);
        continue;
      }
      const auto found = std::find_if(x.begin(), x.end(), [=](float v) { return std::fabs(v) == size; });
      const float top = found == x.end() ? 0.0f : *found;
      float best = -1, chosen = 0;
      for (int c = 0; c < candidates && top != 0; c++) {
        encode(shrinks[c] / top);
        float qx = 0, qq = 0;
        for (int i = 0; i < group; i++) {
          const float q = values[index[i]];
          qx += q * x[i], qq += q * q;
        }
        if (qx * qx > best * qq) best = qx * qx / qq, chosen = qx / qq;
      }
      *scale = narrow(chosen);
      const float s = widen(*scale);
      encode(s != 0 ? 1.0f / s : 0.0f);
      for (int i = 0; i < group; i++) {
        const int k = g * group + i;
        uint8_t& to = codes[((size_t)block * groups * group / 2 + k / 8 * 4) * LANES + lane * 4 + k % 4];
        to = k / 4 % 2 ? (uint8_t)((to & 15) | (index[i] << 4)) : (uint8_t)((to & 240) | index[i]);
      }
    }
  }
}

// ---- what the machine can do ----------------------------------------------------------------------------------------

// Reads `count` bytes with all threads; the sum keeps the compiler from leaving it out.
extern "C" uint64_t dsv2_read(const uint8_t* data, int64_t count, int threads) {
  const int64_t piece = 1 << 18;
  const int pieces = (int)(count / piece);
  std::atomic<uint64_t> total{0};
  TEAM(counters);
  PARALLEL {
    Worker worker(counters);
    U acc[4] = {};
    EACH(job, pieces) {
      const uint8_t* at = data + job * piece;
      for (int64_t i = 0; i < piece; i += 256)
        for (int j = 0; j < 4; j++) {
          __builtin_prefetch(at + i + 64 * j + 2048);
          acc[j] += load<U>(at + i + 64 * j);
        }
    }
    const U together = acc[0] + acc[1] + acc[2] + acc[3];
    uint64_t mine = 0;
    for (int i = 0; i < 16; i++) mine += together[i];
    total += mine;
  }
  return total;
}
