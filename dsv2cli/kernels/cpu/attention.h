// The attention of a layer over the compressed cache: heads mix latents, not values. attention.py says in
// plain torch what is computed here (attend_reference, and `attend` for what is absorbed).
#pragma once
#include "latents.h"

// A layer's attention as Python hands it over; native.py's AttentionPart is its twin. k_up and v_up are
// kv_b_proj by heads: [rank, nope], which is transposed there, and [value, rank]. q_a may be NONE.
struct Attention {
  const uint16_t *norm, *q_a_norm, *kv_a_norm;
  Matrix q_a, q, kv_a, k_up, v_up, o;
  int32_t hidden, heads, nope, rope, value, rank, q_rank;
  float eps, scale;
};

namespace {

constexpr int CACHED_AT_A_TIME = 32;  // cached tokens: they and the heads' sums stay near the processor
constexpr int SCORED_AT_A_TIME = BROAD ? 16 : 4;  // cached tokens whose scores stay in registers
constexpr float LATENT_EPS = 1e-6f;  // of q_a_layernorm and kv_a_layernorm, fixed in the official code

// Neighbouring pairs rotated by the angles of one position; table [2, size / 2] holds cos and sin.
NOINLINE void rotate(float* x, const float* table, int size) {
  const float *cosine = table, *sine = table + size / 2;
  for (int i = 0; i < size / 2; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = a * sine[i] + b * cosine[i];
  }
}

// ---- one query over some cached tokens --------------------------------------------------------------------
// 16 heads are taken at a time, one a lane: scores then need no sums across lanes.

// Cached tokens, one after the other: rows [count, width], whose first `rank` numbers are the latent.
struct Cached {
  const Cell* rows;
  int width, rank, count;
};

// What of a query, or of weights, lies beside that of the next head: a pair of bf16, or one float.
typedef std::conditional_t<FLOATS, float, uint32_t> Side;
constexpr int SIDE = FLOATS ? 1 : 2;  // numbers in it

// A query [heads, width] laid out so that for each Side of it those of 16 heads are side by side.
NOINLINE void side_by_side(const uint16_t* query, int heads, int width, Side* out) {
  for (int g = 0; g < heads; g += LANES, out += (size_t)width / SIDE * LANES)
    for (int c = 0; c < width / SIDE; c++)
      for (int h = 0; h < LANES; h++) {
        const uint16_t* const at = query + (size_t)(g + h) * width + SIDE * c;
        Side& to = out[(size_t)c * LANES + h];
        if (g + h >= heads) to = 0;
        else if constexpr (FLOATS) to = widen(*at);
        else to = load_as<uint32_t>(at);
      }
}

// scores[t] = 16 heads of one query times T cached tokens.
template <int T> void score(const Side* query, const Cell* rows, int width, F* scores) {
  F acc[T];
  for (int t = 0; t < T; t++) acc[t] = (F){};
#pragma GCC unroll 4
  for (int k = 0; k < width; k += SIDE) {
    const Side* const side = query + (size_t)k / SIDE * LANES;
    for (int t = 0; t < T; t++) {
      const Cell* const cell = rows + (size_t)t * width + k;
      if constexpr (FLOATS) acc[t] += load_as<F>(side) * *cell;
      else dot_bf16(acc[t], (B)((U){} + load_as<uint32_t>(cell)), load_as<B>(side));
    }
  }
  for (int t = 0; t < T; t++) scores[t] = acc[t];
}
INLINE void score_each(const Side* query, const Cached& cached, F* scores) {
  const int width = cached.width;
  int t = 0;
  for (; t + SCORED_AT_A_TIME <= cached.count; t += SCORED_AT_A_TIME)
    score<SCORED_AT_A_TIME>(query, cached.rows + (size_t)t * width, width, scores + t);
  for (; t < cached.count; t++) score<1>(query, cached.rows + (size_t)t * width, width, scores + t);
}

// Softmax goes on: scores -> weights[t / SIDE][16 heads]; the pair of a last odd token ends in a zero. most and
// divisor [16] follow. Gives the factor by which earlier sums have to shrink.
INLINE F weigh(F* scores, int count, float scale, float* most, float* divisor, Side* weights) {
  const F before = load_as<F>(most);
  F top = before, added = {};
  for (int t = 0; t < count; t++) {
    scores[t] *= scale;
    top = larger(scores[t], top);
  }
  for (int t = 0; t < count; t += 2) {
    const F one = exp_of(scores[t] - top), two = t + 1 < count ? exp_of(scores[t + 1] - top) : (F){};
    added += one + two;
    if constexpr (FLOATS) {
      store(weights + t * LANES, one), store(weights + (t + 1) * LANES, two);
      continue;
    }
    const U high = (U){} + 0xffff0000u, half = (U){} + 0x8000u;  // rounded; they are positive and finite
    const U pair = (((U)one + half) >> 16) | (((U)two + half) & high);
    store(weights + t / 2 * LANES, pair);
  }
  const F shrink = exp_of(before - top), sum = load_as<F>(divisor) * shrink + added;
  store(most, top);
  store(divisor, sum);
  return shrink;
}
INLINE void shrink_sums(const F& shrink, int heads, int rank, float* sums) {
  for (int h = 0; h < heads; h++)
    if (shrink[h] != 1.0f)
      for (int c = 0; c < rank; c++) sums[(size_t)h * rank + c] *= shrink[h];
}

INLINE float weight_of(const float* weights, int t) { return weights[t * LANES]; }
INLINE float weight_of(const uint32_t* weights, int t) {
  return widen((uint16_t)(weights[t / 2 * LANES] >> (t % 2 * 16)));
}

#if defined(__AVX512BF16__)
// As `mix` below, 64 columns at a time and two tokens with one instruction. Gives how many columns it did.
template <int HEADS>
INLINE int mix_pairs(const uint32_t* weights, const Cached& cached, float* sums, const char*& soon) {
  const int rank = cached.rank;
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; i++)
    for (int half = 0; half < 2; half++) order[half][i] = (uint16_t)(half * 16 + i / 2 + (i % 2) * 32);
  const __m512i lower = _mm512_load_si512(order[0]), upper = _mm512_load_si512(order[1]);
  int c = 0;
  for (; c + 64 <= rank; c += 64) {
    F acc[HEADS][4];
    for (int h = 0; h < HEADS; h++)
      for (int i = 0; i < 4; i++) acc[h][i] = load_as<F>(sums + (size_t)h * rank + c + 16 * i);
    for (int t = 0; t < cached.count; t += 2) {  // where there is no second token the first is read twice
      const uint16_t* one = cached.rows + (size_t)t * cached.width + c;
      const uint16_t* two = t + 1 < cached.count ? one + cached.width : one;
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
      for (int i = 0; i < 4; i++) store(sums + (size_t)h * rank + c + 16 * i, acc[h][i]);
  }
  return c;
}
#else
template <int HEADS> INLINE int mix_pairs(const Side*, const Cached&, float*, const char*&) { return 0; }
#endif

// sums [HEADS, rank] += sum over the cached tokens of weights times the token's latent. Meanwhile the memory
// from `soon` on is asked for.
template <int HEADS> void mix(const Side* weights, const Cached& cached, float* sums, const char*& soon) {
  const int rank = cached.rank, width = cached.width, count = cached.count;
  const auto weight = [&](int h, int t) { return weight_of(weights + h, t); };
  int c = mix_pairs<HEADS>(weights, cached, sums, soon);
  for (; c + 16 <= rank; c += 16) {
    F acc[HEADS];
    for (int h = 0; h < HEADS; h++) acc[h] = load_as<F>(sums + (size_t)h * rank + c);
    for (int t = 0; t < count; t++) {
      const F v = floats_of(cached.rows + (size_t)t * width + c);
      for (int h = 0; h < HEADS; h++) acc[h] += v * weight(h, t);
    }
    for (int h = 0; h < HEADS; h++) store(sums + (size_t)h * rank + c, acc[h]);
  }
  for (; c < rank; c++)
    for (int h = 0; h < HEADS; h++)
      for (int t = 0; t < count; t++)
        sums[(size_t)h * rank + c] += weight(h, t) * float_of(cached.rows[(size_t)t * width + c]);
}
INLINE void mix_heads(const Side* weights, const Cached& cached, int heads, float* sums) {
  const char* soon = (const char*)(cached.rows + (size_t)cached.count * cached.width);
  int h = 0;
  for (; h + 6 <= heads; h += 6) mix<6>(weights + h, cached, sums + (size_t)h * cached.rank, soon);
  for (; h + 4 <= heads; h += 4) mix<4>(weights + h, cached, sums + (size_t)h * cached.rank, soon);
  for (; h < heads; h++) mix<1>(weights + h, cached, sums + (size_t)h * cached.rank, soon);
}

// What attention over some cached tokens gives: sums [heads, rank] that are not yet divided, and for each
// head its largest score and its divisor.
struct Partial {
  float *sums, *most, *divisor;
};

// A query of all heads, side by side, that looks at the tokens of its sequence before `end`.
struct Looking {
  const Side* query;
  int end;
  Partial out;
  std::vector<float> most, divisor;  // of all heads, and of those that fill the last group up

  Looking(const Side* query, int end, Partial out, const Attention& p)
      : query(query), end(end), out(out), most(blocks_of(p.heads) * LANES, -INFINITY), divisor(most.size()) {
    memset(out.sums, 0, (size_t)p.heads * p.rank * sizeof(float));
  }
  void look_at(const Attention& p, const Cached& cached) {
    for (int first = 0; first < p.heads; first += LANES) {
      const int heads = std::min(LANES, p.heads - first);
      float* sums = out.sums + (size_t)first * p.rank;
      F scores[CACHED_AT_A_TIME];
      Side weights[CACHED_AT_A_TIME / SIDE * LANES];
      score_each(query + (size_t)first * cached.width / SIDE, cached, scores);
      const F shrink = weigh(scores, cached.count, p.scale, &most[first], &divisor[first], weights);
      shrink_sums(shrink, heads, p.rank, sums);
      mix_heads(weights, cached, heads, sums);
    }
  }
  void finish(const Attention& p) const {
    std::copy_n(most.begin(), p.heads, out.most), std::copy_n(divisor.begin(), p.heads, out.divisor);
  }
};

// Some queries over the tokens of their sequence from `begin` on, which are read once for all of them; room
// [CACHED_AT_A_TIME, width].
NOINLINE void attend(const Attention& p, std::vector<Looking>& queries, const Latents& latents, int begin,
                     Cell* room) {
  int end = begin;
  for (const Looking& each : queries) end = std::max(end, each.end);
  for (int at = begin; at < end; at += CACHED_AT_A_TIME) {
    Cached cached = {nullptr, latents.width(), p.rank, std::min(CACHED_AT_A_TIME, end - at)};
    cached.rows = latents.rows(at, cached.count, room);
    for (Looking& each : queries) {
      cached.count = std::min(CACHED_AT_A_TIME, each.end - at);
      if (cached.count > 0) each.look_at(p, cached);
    }
  }
  for (const Looking& each : queries) each.finish(p);
}

// ---- what lies between the phases -------------------------------------------------------------------------

constexpr int TOGETHER = 8;  // tokens of a sequence that look at its latents in one job, at most

// What each of n new tokens sees, in chunks. Into how many a token's latents are cut follows from their number
// alone, so that its sums do not depend on the other tokens. A job is a chunk of a group: of tokens of one
// sequence that are cut alike, fewer where there would not be jobs enough for all threads.
struct Context {
  const float* rotary;     // [n, 2, rope / 2]
  const int32_t* lengths;  // [n]: a token is the last of the first so many in its pages
  const Pages* pages;
  int n, most_chunks;
  std::vector<int> firsts;  // [n + 1]: the first chunk of each token among those of all
  std::vector<Span> groups;
  std::vector<int> jobs;  // [groups + 1]: the first job of each
  int together = 1;       // tokens of a group, at most
  Context(const float* rotary, const int32_t* lengths, const Pages* pages, int n, int threads)
      : rotary(rotary), lengths(lengths), pages(pages), n(n), most_chunks(std::min(4 * threads, 64)) {
    if (!lengths) return;
    firsts.push_back(0);
    for (int t = 0; t < n; t++) firsts.push_back(firsts[t] + chunks(t));
    together = std::min(TOGETHER, std::max(1, all_chunks() / (4 * threads)));
    for (int t = 0; t < n; t++) {
      const bool same = t > 0 && pages->rows[t] == pages->rows[t - 1] && chunk(t) == chunk(t - 1);
      if (same && groups.back().count < together) groups.back().count++;
      else groups.push_back({t, 1});
    }
    jobs.push_back(0);
    for (const Span& group : groups) {
      int most = 0;
      for (int i = 0; i < group.count; i++) most = std::max(most, chunks(group.begin + i));
      jobs.push_back(jobs.back() + most);
    }
  }
  int chunks(int t) const { return (lengths[t] + chunk(t) - 1) / chunk(t); }
  int chunk(int t) const {  // latents in each of its chunks but the last
    const int tile = CACHED_AT_A_TIME;
    return std::max(tile, (lengths[t] / most_chunks + tile - 1) / tile * tile);
  }
  int all_chunks() const { return firsts.empty() ? 0 : firsts[n]; }
};

struct AttentionScratch {
  Rows in, latent_in;  // norm(x), for the queries, and for the latent where it takes it otherwise
  bool alike;
  Rows low, nope, mixed, last;
  float *q_a, *q, *kv_a, *out, *sums, *most, *divisor, *rows;
  uint16_t* query;          // [n, heads, rank + rope]: absorbed, and rotated
  Side* laid;               // a thread's queries, side by side
  Cell* unpacked;           // a thread's latents, where they do not lie as they are taken
  size_t row, laid_length;  // numbers of a thread's `rows` and of a query in `laid`

  AttentionScratch(const Attention& p, const Context& context, int threads, Scratch& scratch) {
    const size_t n = context.n, heads = p.heads, width = p.rank + p.rope;
    const size_t partials = context.all_chunks() * heads;
    in.claim(scratch, p.q_a.kind != NONE ? p.q_a : p.q, n);
    alike = in.suit(p.kv_a);
    if (!alike) latent_in.claim(scratch, p.kv_a, n);
    if (p.q_a.kind != NONE) low.claim(scratch, p.q, n);
    nope.claim(scratch, p.k_up, n * heads);
    mixed.claim(scratch, p.v_up, n * heads);
    last.claim(scratch, p.o, n);
    q_a = scratch.take<float>(n * p.q_rank);
    q = scratch.take<float>(n * heads * (p.nope + p.rope));
    kv_a = scratch.take<float>(n * width);
    query = scratch.take<uint16_t>(n * heads * width);
    laid_length = blocks_of(heads) * LANES * width / SIDE;
    laid = scratch.take<Side>(threads * context.together * laid_length);
    unpacked = scratch.take<Cell>(threads * CACHED_AT_A_TIME * width);
    sums = scratch.take<float>(partials * p.rank);
    most = scratch.take<float>(partials);
    divisor = scratch.take<float>(partials);
    out = scratch.take<float>(n * heads * p.value);
    row = std::max({p.hidden, p.q_rank, p.rank}) + 16;
    rows = scratch.take<float>(threads * row);
  }
};

// ---- one pass of n tokens through attention, as one thread sees it; its phases in order -------------------

struct AttentionPass {
  const Attention& p;
  const Context& context;
  const int layer;
  Thread& thread;
  AttentionScratch s;
  const int n, heads, width;  // width: numbers of a cached token
  const bool has_low;         // queries come from a low rank
  float* const row;           // this thread's

  AttentionPass(const Attention& p, const Context& context, int layer, Scratch scratch, Thread& thread)
      : p(p),
        context(context),
        layer(layer),
        thread(thread),
        s(p, context, thread.asked, scratch),
        n(context.n),
        heads(p.heads),
        width(p.rank + p.rope),
        has_low(p.q_a.kind != NONE),
        row(s.rows + thread.number * s.row) {}

  void normalise(const uint16_t* x) {
    thread.each(n, [&](int t) {
      widen_row(x + (size_t)t * p.hidden, p.hidden, row);
      norm_row(row, p.norm, p.hidden, p.eps, row);
      s.in.put(t, 0, p.hidden, row);
      if (!s.alike) s.latent_in.put(t, 0, p.hidden, row);
    });
  }

  // Queries (or their low rank), and the new latents with their keys.
  void project() {
    const Matrix& first = has_low ? p.q_a : p.q;
    const Target queries = {Target::ROUNDED, has_low ? s.q_a : s.q, (size_t)first.rows};
    const Target latents = {Target::ROUNDED, s.kv_a, (size_t)width};
    const int jobs = jobs_of(first);
    thread.each_ahead(jobs + jobs_of(p.kv_a), [&](int job, int after) {
      if (job < jobs) product_job(first, job, after, s.in, n, queries);
      else product_job(p.kv_a, job - jobs, after - jobs, s.alike ? s.in : s.latent_in, n, latents);
    });
  }
  void normalise_low() {
    thread.each(n, [&](int t) {
      norm_row(s.q_a + (size_t)t * p.q_rank, p.q_a_norm, p.q_rank, LATENT_EPS, row);
      s.low.put(t, 0, p.q_rank, row);
    });
  }
  void expand_queries() {
    const Target queries = {Target::ROUNDED, s.q, (size_t)p.q.rows};
    thread.each_ahead(jobs_of(p.q),
                      [&](int job, int after) { product_job(p.q, job, after, s.low, n, queries); });
  }

  // Each head's queries for the latent; and the new rows of the cache.
  void absorb_and_remember() {
    thread.each_ahead(heads + n, [&](int job, int after) {
      if (job < heads) absorb(job, after < heads ? address_of(p.k_up.of_stack(after), 0) : Address{});
      else remember(job - heads);
    });
  }
  void absorb(int h, Address next) {
    const int head = p.nope + p.rope;
    for (int t = 0; t < n; t++) {
      float* from = s.q + ((size_t)t * heads + h) * head;
      s.nope.put(t * heads + h, 0, p.nope, from);
      rotate(from + p.nope, context.rotary + (size_t)t * p.rope, p.rope);
      narrow_row(from + p.nope, p.rope, s.query + ((size_t)t * heads + h) * width + p.rank);
    }
    const Target queries = {Target::NARROW, s.query + (size_t)h * width, (size_t)heads * width};
    product(p.k_up.of_stack(h), {0, p.rank}, {s.nope, h, heads, n}, next, queries);
  }
  void remember(int t) {
    float* from = s.kv_a + (size_t)t * width;
    norm_row(from, p.kv_a_norm, p.rank, LATENT_EPS, from);
    rotate(from + p.rank, context.rotary + (size_t)t * p.rope, p.rope);
    latents_of(t).put(context.lengths[t] - 1, from, row);
  }

  Latents latents_of(int t) const { return {*context.pages, layer, t, p.rank, p.rope}; }

  // Softmax and sums of latents, chunk by chunk of what each token sees.
  void attend_chunks() {
    const auto& jobs = context.jobs;
    thread.each(jobs.empty() ? 0 : jobs.back(), [&](int job) {
      const int g = (int)(std::upper_bound(jobs.begin(), jobs.end(), job) - jobs.begin()) - 1;
      const Span group = context.groups[g];
      const int number = job - jobs[g], chunk = context.chunk(group.begin), begin = number * chunk;
      std::vector<Looking> queries;
      for (int t = group.begin; t < group.begin + group.count; t++) {
        if (number >= context.chunks(t)) continue;
        const size_t at = (size_t)(context.firsts[t] + number) * heads;
        Side* const query = s.laid + (thread.number * context.together + queries.size()) * s.laid_length;
        side_by_side(s.query + (size_t)t * heads * width, heads, width, query);
        const Partial out = {s.sums + at * p.rank, s.most + at, s.divisor + at};
        queries.emplace_back(query, std::min(context.lengths[t], begin + chunk), out, p);
      }
      Cell* const room = s.unpacked + (size_t)thread.number * CACHED_AT_A_TIME * width;
      attend(p, queries, latents_of(group.begin), begin, room);
    });
  }

  // Each head's chunks become one mix of latents, and that the head's values.
  void merge_and_lead_out() {
    thread.each_ahead(heads, [&](int h, int after) {
      for (int t = 0; t < n; t++) merge(t, h);
      const Address next = after < heads ? address_of(p.v_up.of_stack(after), 0) : Address{};
      const Target values = {Target::FLOATS, s.out + (size_t)h * p.value, (size_t)heads * p.value};
      product(p.v_up.of_stack(h), {0, p.value}, {s.mixed, h, heads, n}, next, values);
    });
  }
  void merge(int t, int h) {
    const int used = context.firsts[t + 1] - context.firsts[t];
    const auto partial = [&](int i) { return ((size_t)context.firsts[t] + i) * heads + h; };
    float top = -INFINITY, divisor = 0;
    for (int i = 0; i < used; i++) top = std::max(top, s.most[partial(i)]);
    std::fill(row, row + p.rank, 0.0f);
    for (int i = 0; i < used; i++) {
      const float factor = std::exp(s.most[partial(i)] - top), *sums = s.sums + partial(i) * p.rank;
      divisor += s.divisor[partial(i)] * factor;
      for (int c = 0; c < p.rank; c++) row[c] += sums[c] * factor;
    }
    for (int c = 0; c < p.rank; c++) row[c] /= divisor;
    s.mixed.put(t * heads + h, 0, p.rank, row);
  }

  void join_heads() {
    const int all = heads * p.value;
    thread.each(n, [&](int t) { s.last.put(t, 0, all, s.out + (size_t)t * all); });
  }
  void output(uint16_t* to) {
    const Target sum = {Target::ADDED, to, (size_t)p.hidden};
    thread.each_ahead(jobs_of(p.o),
                      [&](int job, int after) { product_job(p.o, job, after, s.last, n, sum); });
  }
};

// to += Attention(norm(x)) for x and to [n, hidden] in bf16, which may be the same. Each token's row of its
// cache is written here.
void run_attention(const Attention& p, const uint16_t* x, uint16_t* to, const Context& context, int layer,
                   Scratch scratch, Thread& thread) {
  AttentionPass pass(p, context, layer, scratch, thread);
  pass.normalise(x);
  thread.meet();
  pass.project();
  thread.meet();
  if (pass.has_low) {
    pass.normalise_low();
    thread.meet();
    pass.expand_queries();
    thread.meet();
  }
  pass.absorb_and_remember();
  thread.meet();
  pass.attend_chunks();
  thread.meet();
  pass.merge_and_lead_out();
  thread.meet();
  pass.join_heads();
  thread.meet();
  pass.output(to);
}

}  // namespace
