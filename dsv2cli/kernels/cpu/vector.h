// Numbers and vectors: bf16 and fp32, and vectors of 64 bytes with the few operations that the kernels need,
// for AVX-512 (VNNI, BF16), for AVX2 (VNNI), for NEON (dot products, BF16), or for whatever the compiler makes of
// them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
// For what is long and called from several places: copies would only cost time to compile.
#define NOINLINE __attribute__((noinline))

namespace {

// ---- numbers ----------------------------------------------------------------------------------------------

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

// ---- vectors ----------------------------------------------------------------------------------------------

// Bytes of the vectors in which the processor multiplies bytes.
#if defined(__AVX512VNNI__)
constexpr int NATIVE = 64;
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
typedef int8_t NQ __attribute__((vector_size(NATIVE / 4)));

// F, I, U and B are vectors of 64 bytes. GCC keeps vectors that are wider than the processor's in memory,
// which is ten and more times as slow; so these are pairs of narrower ones, or pairs of pairs, which it keeps
// in registers.
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

#define EACH_HALF(op)                                                      \
  template <class V> INLINE Pair<V> operator op(Pair<V> a, Pair<V> b) {    \
    return {a.low op b.low, a.high op b.high};                             \
  }                                                                        \
  template <class V, class S> INLINE Pair<V> operator op(Pair<V> a, S b) { \
    return {a.low op b, a.high op b};                                      \
  }                                                                        \
  template <class V, class S> INLINE Pair<V> operator op(S a, Pair<V> b) { \
    return {a op b.low, a op b.high};                                      \
  }                                                                        \
  template <class V, class S> INLINE Pair<V>& operator op##=(Pair<V>& a, S b) { return a = a op b; }
EACH_HALF(+)
EACH_HALF(-)
EACH_HALF(*)
EACH_HALF(/)
EACH_HALF(&)
EACH_HALF(|)
EACH_HALF(<<)
EACH_HALF(>>)
#undef EACH_HALF

template <class T> constexpr bool is_pair = false;
template <class V> constexpr bool is_pair<Pair<V>> = true;

template <class T> INLINE T load_as(const void* p) {
  if constexpr (is_pair<T>) {
    typedef typename T::Half V;
    return {load_as<V>(p), load_as<V>((const char*)p + sizeof(V))};
  } else {
    T out;
    memcpy(&out, p, sizeof(T));
    return out;
  }
}
template <class T> INLINE void store(void* p, T x) {
  if constexpr (is_pair<T>) store(p, x.low), store((char*)p + sizeof(x.low), x.high);
  else memcpy(p, &x, sizeof(T));
}
template <class T> INLINE T larger(T a, T b) {
  if constexpr (is_pair<T>) return {larger(a.low, b.low), larger(a.high, b.high)};
  else return a > b ? a : b;
}
INLINE NF as_floats(NI x) { return __builtin_convertvector(x, NF); }
template <class V> INLINE auto as_floats(Pair<V> x) -> Pair<decltype(as_floats(x.low))> {
  return {as_floats(x.low), as_floats(x.high)};
}
template <class T> INLINE T widen_as(const uint16_t* p) {
  if constexpr (is_pair<T>) {
    typedef typename T::Half V;
    return {widen_as<V>(p), widen_as<V>(p + sizeof(V) / 4)};
  } else {
#if defined(__aarch64__)  // GCC would take the numbers one by one
    return (NF)vshll_n_u16((uint16x4_t)load_as<NH>(p), 16);
#else
    return (NF)(__builtin_convertvector(load_as<NH>(p), NU) << 16);
#endif
  }
}
INLINE F widen16(const uint16_t* p) { return widen_as<F>(p); }
// Halves, which are finite, and signed bytes.
template <class T> INLINE T halves_as(const uint16_t* p) {
  if constexpr (is_pair<T>) {
    typedef typename T::Half V;
    return {halves_as<V>(p), halves_as<V>(p + sizeof(V) / 4)};
  } else {
#if defined(__AVX512VNNI__)
    return (NF)_mm512_cvtph_ps((__m256i)load_as<NH>(p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (NF)_mm256_cvtph_ps((__m128i)load_as<NH>(p));
#elif defined(__aarch64__)
    return (NF)vcvt_f32_f16((float16x4_t)load_as<NH>(p));
#else
    const NU half = __builtin_convertvector(load_as<NH>(p), NU);
    const NF size = (NF)((half & 0x7fff) << 13) * 0x1p112f;  // the exponent counts from another zero
    return (NF)((NU)size | ((half & 0x8000) << 16));
#endif
  }
}
template <class T> INLINE T bytes_as(const int8_t* p) {
  if constexpr (is_pair<T>) {
    typedef typename T::Half V;
    return {bytes_as<V>(p), bytes_as<V>(p + sizeof(V) / 4)};
  } else {
#if defined(__AVX512VNNI__)  // GCC would take the numbers one by one
    return as_floats((NI)_mm512_cvtepi8_epi32((__m128i)load_as<NQ>(p)));
#elif defined(__AVX2__)
    return as_floats((NI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(__aarch64__)
    const int8x8_t four = vreinterpret_s8_s32(vdup_n_s32(load_as<int32_t>(p)));
    return as_floats((NI)vmovl_s16(vget_low_s16(vmovl_s8(four))));
#else
    return as_floats(__builtin_convertvector(load_as<NQ>(p), NI));
#endif
  }
}
INLINE F halves16(const uint16_t* p) { return halves_as<F>(p); }
INLINE F bytes16(const int8_t* p) { return bytes_as<F>(p); }
INLINE F floats_of(const uint16_t* p) { return widen16(p); }
INLINE F floats_of(const float* p) { return load_as<F>(p); }
INLINE float float_of(uint16_t x) { return widen(x); }
INLINE float float_of(float x) { return x; }

// acc += a * b with one rounding, where the processor has that. Written as a sum it depends on what stands around
// it whether compilers join the two.
INLINE void add_product(NF& acc, NF a, NF b) {
#if defined(__AVX512VNNI__)
  acc = (NF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
#elif defined(__AVX2__) && defined(__FMA__)
  acc = (NF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc);
#elif defined(__aarch64__)
  acc = (NF)vfmaq_f32((float32x4_t)acc, (float32x4_t)a, (float32x4_t)b);
#else
  acc += a * b;
#endif
}
template <class V> INLINE void add_product(Pair<V>& acc, Pair<V> a, Pair<V> b) {
  add_product(acc.low, a.low, b.low), add_product(acc.high, a.high, b.high);
}
INLINE float sum(NF x) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  const __m256 v = (__m256)x;
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#elif defined(__aarch64__)
  return vaddvq_f32((float32x4_t)x);
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// e to the power of x, to the last bit or two; x below -87 or above 88 counts as these, so the result stays
// finite.
INLINE NF exp_of(NF x) {
  x = x < -87.0f ? (NF){} - 87.0f : x > 88.0f ? (NF){} + 88.0f : x;
  const NF scaled = x * 1.44269504f;
  const NI whole = __builtin_convertvector(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f, NI);
  const NF n = as_floats(whole);
  const NF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two terms
  NF e = (NF){} + 1.0f / 720;
  e = e * r + 1.0f / 120, e = e * r + 1.0f / 24, e = e * r + 1.0f / 6;
  e = e * r + 0.5f, e = e * r + 1.0f, e = e * r + 1.0f;
  return e * (NF)((whole + 127) << 23);
}
template <class V> INLINE Pair<V> exp_of(Pair<V> x) { return {exp_of(x.low), exp_of(x.high)}; }

// ---- products of vectors ----------------------------------------------------------------------------------

// dot4: acc[i] += sum of 4 products of bytes of w with the 4 signed bytes of a. The bytes of w are unsigned
// codes, or, where the processor only multiplies signed ones (SIGNED), codes from which 128 has been taken.
#if defined(__AVX512VNNI__)
constexpr bool SIGNED = false;
INLINE void dot4(NI& acc, NB w, int32_t a) {
  acc = (NI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a));
}
#elif defined(__AVX2__) && defined(__AVXVNNI__)
constexpr bool SIGNED = false;
INLINE void dot4(NI& acc, NB w, int32_t a) {
  acc = (NI)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(a));
}
#elif defined(__AVX2__)
constexpr bool SIGNED = true;
INLINE void dot4(NI& acc, NB w, int32_t a) {  // |w| times a with w's sign: no sum of two leaves 16 bits
  const __m256i v = (__m256i)w;
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(_mm256_set1_epi32(a), v));
  acc += (NI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__aarch64__)
constexpr bool SIGNED = true;
INLINE void dot4(NI& acc, NB w, int32_t a) {
  const int8x16_t v = (int8x16_t)w, four = (int8x16_t)vdupq_n_s32(a);
#if defined(__ARM_FEATURE_DOTPROD)
  acc = (NI)vdotq_s32((int32x4_t)acc, v, four);
#else  // no sum of two leaves 16 bits: no number of a is -128
  const int16x8_t low = vmull_s8(vget_low_s8(v), vget_low_s8(four)), high = vmull_high_s8(v, four);
  acc = (NI)vpadalq_s16((int32x4_t)acc, vpaddq_s16(low, high));
#endif
}
#else
constexpr bool SIGNED = false;
INLINE void dot4(NI& acc, NB w, int32_t a) {
  const int8_t* v = (const int8_t*)&a;
  for (int i = 0; i < NATIVE / 4; i++)
    acc[i] += w[4 * i] * v[0] + w[4 * i + 1] * v[1] + w[4 * i + 2] * v[2] + w[4 * i + 3] * v[3];
}
#endif
template <class V, class W> INLINE void dot4(Pair<V>& acc, Pair<W> w, int32_t a) {
  dot4(acc.low, w.low, a), dot4(acc.high, w.high, a);
}
// dot_six: acc[i] += 4 products of w with a and 4 of v with b, where no byte of w and v leaves 6 bits, which lets
// AVX2 add their sums of two in 16 bits (SIX).
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr bool SIX = true;
INLINE void dot_six(NI& acc, NB w, int32_t a, NB v, int32_t b) {
  const __m256i first = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(a));
  const __m256i second = _mm256_maddubs_epi16((__m256i)v, _mm256_set1_epi32(b));
  acc += (NI)_mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
}
#else
constexpr bool SIX = false;
INLINE void dot_six(NI& acc, NB w, int32_t a, NB v, int32_t b) { dot4(acc, w, a), dot4(acc, v, b); }
#endif
template <class V, class W> INLINE void dot_six(Pair<V>& acc, Pair<W> w, int32_t a, Pair<W> v, int32_t b) {
  dot_six(acc.low, w.low, a, v.low, b), dot_six(acc.high, w.high, a, v.high, b);
}
INLINE NB from_code(NB code) { return SIGNED ? code ^ 128 : code; }
template <class V> INLINE Pair<V> from_code(Pair<V> code) {
  return {from_code(code.low), from_code(code.high)};
}

// acc += products of bf16 with bf16, in any order of lanes. A processor that has no such products (FLOATS) takes
// those of floats: of one half of the numbers of a vector, and of the other.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)  // by shuffles: the multipliers stay free
INLINE NF one_half(NB x) { return (NF)_mm256_unpacklo_epi16(__m256i(), (__m256i)x); }
INLINE NF other_half(NB x) { return (NF)_mm256_unpackhi_epi16(__m256i(), (__m256i)x); }
#else
INLINE NF one_half(NB x) { return (NF)((NU)x << 16); }
INLINE NF other_half(NB x) { return (NF)((NU)x & ((NU){} + 0xffff0000u)); }
#endif
#if defined(__AVX512BF16__)
constexpr bool FLOATS = false;
INLINE void dot_bf16(NF& acc, NB w, NB x) {
  acc = (NF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool FLOATS = false;
INLINE void dot_bf16(NF& acc, NB w, NB x) {  // each sum is rounded to odd
  acc = (NF)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)w, (bfloat16x8_t)x);
}
#else
constexpr bool FLOATS = true;
INLINE void dot_bf16(NF& acc, NB w, NB x) {
  acc += one_half(w) * one_half(x);
  acc += other_half(w) * other_half(x);
}
#endif
template <class V, class W> INLINE void dot_bf16(Pair<V>& acc, Pair<W> w, Pair<W> x) {
  dot_bf16(acc.low, w.low, x.low), dot_bf16(acc.high, w.high, x.high);
}
// x in a register, once: GCC would load it again for each product it is a factor of.
INLINE NF in_register(NF x) {
#if defined(__AVX2__)
  asm("" : "+v"(x));
#endif
  return x;
}

// The 16 values of a 4-bit code, less `least`, over and over.
INLINE NB table_of(const int8_t* values, int least) {
  typedef uint8_t Sixteen __attribute__((vector_size(16)));
  const Sixteen one = load_as<Sixteen>(values) - (uint8_t)least;
  NB out;
  for (int i = 0; i < NATIVE; i += 16) memcpy((char*)&out + i, &one, 16);
  return out;
}
INLINE NB look_up(NB table, NB index) {
#if defined(__AVX512VNNI__)
  return (NB)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__)
  return (NB)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#elif defined(__aarch64__)
  return (NB)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
  NB out;
  for (int i = 0; i < NATIVE; i++) out[i] = table[index[i]];
  return out;
#endif
}
template <class V> INLINE Pair<V> look_up(NB table, Pair<V> index) {
  return {look_up(table, index.low), look_up(table, index.high)};
}

// The values of two codes a byte: of those in the low halves, and of those in the high ones.
INLINE void look_up_both(NB table, B codes, B& low, B& high) {
  const B half = (B)((U){} + 0x0f0f0f0fu);
  low = look_up(table, codes & half);
  high = look_up(table, (B)((U)codes >> 4) & half);
}

// acc[i] += sum of 4 products of 8-bit floats (E4M3), the bytes of w, with 4 floats.
INLINE NF e4m3(NU sign_and_rest) {  // in the highest byte; its exponent counts from another zero
  return (NF)((NU)((NI)sign_and_rest >> 4) & 0x87f00000u) * 0x1p120f;
}
INLINE void dot_e4m3(NF& acc, NB w, const float* x) {
  const NU four = (NU)w;
  acc += e4m3(four << 24) * x[0];
  acc += e4m3(four << 16) * x[1];
  acc += e4m3(four << 8) * x[2];
  acc += e4m3(four) * x[3];
}
template <class V, class W> INLINE void dot_e4m3(Pair<V>& acc, Pair<W> w, const float* x) {
  dot_e4m3(acc.low, w.low, x), dot_e4m3(acc.high, w.high, x);
}

// ---- rows of numbers --------------------------------------------------------------------------------------

NOINLINE void widen_row(const uint16_t* x, int size, float* out) {
  for (int i = 0; i < size; i++) out[i] = widen(x[i]);
}
NOINLINE void narrow_row(const float* x, int size, uint16_t* out) {
  for (int i = 0; i < size; i++) out[i] = narrow(x[i]);
}
// A residual: x += values, with one rounding of each.
NOINLINE void add_to(uint16_t* x, const float* values, int count) {
  for (int i = 0; i < count; i++) x[i] = narrow(widen(x[i]) + rounded(values[i]));
}
INLINE float largest(const float* x, int count) {  // without its sign
  constexpr int lanes = NATIVE / 4;
  NF most = {};
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    const NF v = load_as<NF>(x + i);
    most = larger(v < 0.0f ? -v : v, most);
  }
  float out = 0;
  for (int lane = 0; lane < lanes; lane++) out = std::max(out, most[lane]);
  for (; i < count; i++) out = std::max(out, std::fabs(x[i]));
  return out;
}
// RMSNorm of a row that was rounded to bf16, rounded twice as plain torch does it; into floats.
NOINLINE void norm_row(const float* x, const uint16_t* weight, int size, float eps, float* out) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < size; i++) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / size + eps);
  for (int i = 0; i < size; i++) out[i] = rounded(widen(weight[i]) * rounded(x[i] * factor));
}

}  // namespace
