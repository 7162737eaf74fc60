// The MLP of a layer: RMSNorm, the router, routed experts, shared experts; or the one dense MLP in the place
// of the shared ones. experts.py and linear.py say in plain torch what is computed here.
#pragma once
#include <numeric>

#include "ahead.h"
#include "streams.h"

// Which experts the system is asked for before they are needed; cpu.py's AHEAD is its twin.
enum Asked : int32_t { NOTHING, CHOSEN, GUESS };

// A layer's MLP as Python hands it over; native.py's MlpPart is its twin.
struct Mlp {
  const uint16_t* norm;  // null: x is taken as it is
  const float* gate;     // the router
  Matrix gate_up, down, shared_gate_up, shared_down;
  int32_t hidden, width, shared_width, experts, top_k, groups, top_groups, normalise;
  float eps, factor;
  int32_t ahead;  // of experts in a file that does not fit, an Asked
};

namespace {

// ---- the router's choice, see experts.route ---------------------------------------------------------------

INLINE void softmax(float* scores, int count) {
  float most = scores[0], total = 0;
  for (int e = 1; e < count; e++) most = std::max(most, scores[e]);
  for (int e = 0; e < count; e++) total += scores[e] = std::exp(scores[e] - most);
  for (int e = 0; e < count; e++) scores[e] /= total;
}
// Experts outside the best groups get the score 0; a group's score is its best expert's.
INLINE void keep_best_groups(const Mlp& p, float* scores) {
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
// The best top_k experts of one token, in falling order, and their weights.
NOINLINE void choose(const Mlp& p, float* scores, int32_t* index, float* weight) {
  softmax(scores, p.experts);
  if (p.groups > 1) keep_best_groups(p, scores);
  std::vector<char> open(p.experts, 1);
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

// to = silu(gates) * ups, in whole vectors.
NOINLINE void silu_times(const float* gates, const float* ups, float* to, int count) {
  for (int i = 0; i < count; i += NATIVE / 4) {
    const NF g = load_as<NF>(gates + i);
    store(to + i, g / (1.0f + exp_of(-g)) * load_as<NF>(ups + i));
  }
}

// ---- what lies between the phases -------------------------------------------------------------------------

// Columns of gate and up in one job: whole groups of the down projection.
constexpr int LEAST_UNIT = 64, MOST_UNIT = 128;
constexpr int DOWN_JOBS = 8;   // jobs a thread of the down projections of one token: long streams
constexpr int LOGITS = 8;      // of the router, in one job

// Of more experts than these a phase asks only for those whose turn comes soon: a layer of them may be larger
// than memory.
constexpr int ASKED_AHEAD = 8;
// What layers that run one after the other tell each other of experts that lie in a file.
struct Ahead {
  const Mlp* next = nullptr;         // the MLP after this one, if its choice is to be guessed
  const int32_t* guessed = nullptr;  // [n, top_k]: this one's choice as the one before guessed it, or below 0
  int32_t* guess = nullptr;          // the same of the next one
};
std::atomic<int64_t> all_guesses{0}, right_guesses{0};  // of experts, since the library was loaded

// A slot is one expert of one token; there are n * top_k. In `sums` each thread has its sums of a down job
// [n, rows of the job], and behind them room for products and for copies of tokens.
struct MlpScratch {
  Rows in, shared_in;  // norm(x), for the routed experts, and for the shared ones where they take it otherwise
  Rows routed, shared;  // silu(gate) * up of each slot, sorted by expert, and of each token
  bool alike;           // whether all take the same norm(x)
  float *normed, *logits, *weight, *sums;
  float *next_normed, *next_logits, *next_weight;  // of the guess
  int32_t *index, *order, *tokens, *starts, *active, *actives, *all;
  size_t sums_length, products_length, thread_length;

  MlpScratch(const Mlp& p, int n, int threads, Scratch& scratch, const Mlp* next = nullptr) {
    const size_t slots = (size_t)n * p.top_k;
    const size_t down_rows = n > 1 ? JOB_ROWS : (blocks_of(p.hidden) / (DOWN_JOBS * threads) + 1) * LANES;
    in.claim(scratch, p.experts ? p.gate_up : p.shared_gate_up, n);
    alike = !p.shared_width || in.suit(p.shared_gate_up);
    if (!alike) shared_in.claim(scratch, p.shared_gate_up, n);
    if (p.experts) routed.claim(scratch, p.down, slots);
    if (p.shared_width) shared.claim(scratch, p.shared_down, n);
    normed = scratch.take<float>((size_t)n * p.hidden);
    logits = scratch.take<float>((size_t)n * p.experts);
    index = scratch.take<int32_t>(slots);  // the expert of each slot
    weight = scratch.take<float>(slots);
    order = scratch.take<int32_t>(slots);           // slots sorted by expert
    tokens = scratch.take<int32_t>(slots);          // the token of order[i]
    starts = scratch.take<int32_t>(p.experts + 1);  // where each expert's slots begin in `order`
    active = scratch.take<int32_t>(p.experts + 1);  // the experts that have tokens
    actives = scratch.take<int32_t>(1);             // and how many they are
    all = scratch.take<int32_t>(n);                 // 0, 1, ...
    sums_length = n * down_rows;
    products_length = std::max<size_t>(TILE_TOKENS * TILE_ROWS, down_rows);
    thread_length = sums_length + products_length + room_for_copies(std::min<size_t>(slots, TILE_TOKENS), in) / 4;
    sums = scratch.take<float>(threads * thread_length);
    if (!next) return;
    next_normed = scratch.take<float>((size_t)n * next->hidden);
    next_logits = scratch.take<float>((size_t)n * next->experts);
    next_weight = scratch.take<float>((size_t)n * next->top_k);
  }
};

// The experts that a router outside has chosen, both [n, top_k]; one below 0 is another process's.
struct Choice {
  const int32_t* index = nullptr;
  const float* weight = nullptr;
};

// A job of gate and up: `columns` of the width of one expert (or of the shared ones) for all of its tokens.
struct UpJob {
  Matrix gate_up;
  int width;
  Span columns;
  const Rows* from;
  Rows* to;
  const int32_t* rows_in;  // row rows_in[i] of the input gives row first_to + i of `to`
  int first_to, count;

  int first_up() const { return gate_up.kind == BF16 ? width : blocks_of(width) * LANES; }
  Halves addresses() const {
    return {address_of(gate_up, columns.begin), address_of(gate_up, first_up() + columns.begin)};
  }
};

// ---- one pass of n tokens through the MLP, as one thread sees it; its phases in order ---------------------

struct MlpPass {
  const Mlp& p;
  const int n;
  Thread& thread;
  const Ahead ahead;
  MlpScratch s;
  const bool has_routed, has_shared;
  const int slots, unit, units, shared_units;  // units: jobs of gate and up for one expert
  float *const sums, *const products;          // this thread's
  int8_t* const copies;

  MlpPass(const Mlp& p, int n, Scratch scratch, Thread& thread, const Ahead& ahead)
      : p(p),
        n(n),
        thread(thread),
        ahead(ahead),
        s(p, n, thread.asked, scratch, ahead.next),
        has_routed(p.experts > 0),
        has_shared(p.shared_width > 0),
        slots(has_routed ? n * p.top_k : 0),
        unit(std::max({LEAST_UNIT, has_routed ? p.down.group : 0, has_shared ? p.shared_down.group : 0})),
        units(has_routed ? (p.width + unit - 1) / unit : 0),
        shared_units((p.shared_width + unit - 1) / unit),
        sums(s.sums + thread.number * s.thread_length),
        products(sums + s.sums_length),
        copies((int8_t*)(products + s.products_length)) {}

  void normalise(const uint16_t* x) {
    thread.each(n, [&](int t) {
      float* row = s.normed + (size_t)t * p.hidden;
      widen_row(x + (size_t)t * p.hidden, p.hidden, row);
      if (p.norm) norm_row(row, p.norm, p.hidden, p.eps, row);
      s.in.put(t, 0, p.hidden, row);
      if (!s.alike) s.shared_in.put(t, 0, p.hidden, row);
      if (!ahead.next) return;
      float* other = s.next_normed + (size_t)t * p.hidden;
      widen_row(x + (size_t)t * p.hidden, p.hidden, other);
      norm_row(other, ahead.next->norm, p.hidden, ahead.next->eps, other);
    });
    if (thread.number != 0) return;
    *s.actives = s.active[0] = 0;
    std::iota(s.all, s.all + n, 0);
  }

  void router_logits() {
    const int chunks = (p.experts + LOGITS - 1) / LOGITS;
    const int after = ahead.next ? (ahead.next->experts + LOGITS - 1) / LOGITS : 0;
    thread.each(n * (chunks + after), [&](int job) {
      const int t = job / (chunks + after), chunk = job % (chunks + after);
      if (chunk < chunks) some_logits(p, t, chunk, s.normed, s.logits);
      else some_logits(*ahead.next, t, chunk - chunks, s.next_normed, s.next_logits);
    });
  }
  INLINE void some_logits(const Mlp& of, int t, int chunk, const float* normed, float* logits) {
    const int begin = chunk * LOGITS, end = std::min(of.experts, begin + LOGITS);
    for (int e = begin; e < end; e++) {
      const float *row = normed + (size_t)t * of.hidden, *w = of.gate + (size_t)e * of.hidden;
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int i = 0; i < of.hidden; i++) total += row[i] * w[i];
      logits[(size_t)t * of.experts + e] = total;
    }
  }

  void choose_experts() {
    thread.each(n * (ahead.next ? 2 : 1), [&](int job) {
      const int t = job % n;
      const Mlp& of = job < n ? p : *ahead.next;
      float* logits = (job < n ? s.logits : s.next_logits) + (size_t)t * of.experts;
      const size_t first = (size_t)t * of.top_k;
      choose(of, logits, (job < n ? s.index : ahead.guess) + first, (job < n ? s.weight : s.next_weight) + first);
    });
  }

  // Asks for what the products of this layer will read, and then for what the next one's are likely to. Of many
  // experts those whose turn is soon: each thread begins at its own share of them.
  void ask() {
    const int here = *s.actives, after = ahead.next ? n * ahead.next->top_k : 0;
    const int first = few() ? 2 * here : thread.threads * ASKED_AHEAD;
    thread.each(first + 2 * after, [&](int job) {
      if (job >= first) {
        const int guess = job - first;
        return ask_for(guess < after ? ahead.next->gate_up : ahead.next->down, ahead.guess[guess % after]);
      }
      if (few()) return ask_for(job < here ? p.gate_up : p.down, s.active[job % here]);
      const int a = here * (job % thread.threads) / thread.threads + job / thread.threads;
      if (a < here) ask_for(p.gate_up, s.active[a]);
    });
  }
  bool few() const { return *s.actives <= ASKED_AHEAD; }
  // Of many experts, as a job of gate and up begins: the first of an expert asks for its down projection, and
  // for a later expert.
  void ask_later(int job) {
    if (!p.ahead || !has_routed || few() || job % units || job / units >= *s.actives) return;
    const int a = job / units;
    if (a + ASKED_AHEAD < *s.actives) ask_for(p.gate_up, s.active[a + ASKED_AHEAD]);
    ask_for(p.down, s.active[a]);
  }
  void count_right_guesses() {
    if (!ahead.guessed || !slots || ahead.guessed[0] < 0) return;
    for (int i = 0; i < slots; i++) {
      const int32_t* own = s.index + i / p.top_k * p.top_k;
      all_guesses++;
      right_guesses += std::find(own, own + p.top_k, ahead.guessed[i]) != own + p.top_k;
    }
  }

  // By the first thread alone: slots by expert, and which experts have any.
  void sort_slots(Choice choice) {
    if (thread.number != 0) return;
    if (choice.index) {
      memcpy(s.index, choice.index, slots * sizeof(int32_t));
      memcpy(s.weight, choice.weight, slots * sizeof(float));
    }
    count_right_guesses();
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
      s.order[at] = i, s.tokens[at] = i / p.top_k;
    }
  }

  // silu(gate) * up, into s.routed and s.shared: first the jobs of each active expert, then the shared ones'.
  void gate_and_up() {
    const int jobs = *s.actives * units + shared_units;
    thread.each_ahead(jobs, [&](int job, int after) {
      ask_later(job);
      const Halves next = after < jobs ? up_job(after).addresses() : Halves{};
      const UpJob here = up_job(job);
      if (here.count == 1) gate_and_up_one(here, next);
      else gate_and_up_many(here);
    });
  }
  UpJob up_job(int job) {
    const int shared_job = job - *s.actives * units;
    if (shared_job >= 0) {
      const Span columns = unit_of(p.shared_width, shared_job);
      const Rows* from = s.alike ? &s.in : &s.shared_in;
      return {p.shared_gate_up, p.shared_width, columns, from, &s.shared, s.all, 0, n};
    }
    const int e = s.active[job / units], first = s.starts[e], count = s.starts[e + 1] - first;
    const Span columns = unit_of(p.width, job % units);
    const Matrix gate_up = p.gate_up.of_stack(e);
    return {gate_up, p.width, columns, &s.in, &s.routed, s.tokens + first, first, count};
  }
  Span unit_of(int width, int i) const { return {i * unit, std::min(unit, width - i * unit)}; }
  void gate_and_up_one(const UpJob& job, const Halves& next) {
    float gates[MOST_UNIT], ups[MOST_UNIT];
    const Span columns = job.columns;
    const int firsts[2] = {columns.begin, job.first_up() + columns.begin};
    float* const outs[2] = {gates, ups};
    stream<2>(job.gate_up, firsts, columns.count, job.from->row(*job.rows_in), outs, next.at);
    silu_times(gates, ups, gates, columns.count);
    job.to->put(job.first_to, columns.begin, columns.count, gates);
  }
  void gate_and_up_many(const UpJob& job) {
    float both[TILE_TOKENS * TILE_ROWS], inner[TILE_TOKENS * MOST_UNIT];
    const Span columns = job.columns;
    for (int t = 0; t < job.count; t += TILE_TOKENS) {
      const int count = std::min(TILE_TOKENS, job.count - t);
      Row x[TILE_TOKENS];
      for (int i = 0; i < count; i++) x[i] = job.from->row(job.rows_in[t + i]);
      space_evenly(x, count, copies);
      for (int c = 0; c < columns.count; c += LANES) {
        const int firsts[2] = {columns.begin + c, job.first_up() + columns.begin + c};
        multiply(job.gate_up, firsts, 2, x, count, both);
        for (int i = 0; i < count; i++) {
          const float* gates = both + i * TILE_ROWS;
          silu_times(gates, gates + LANES, inner + i * MOST_UNIT + c, LANES);
        }
      }
      for (int i = 0; i < count; i++)
        job.to->put(job.first_to + t + i, columns.begin, columns.count, inner + i * MOST_UNIT);
    }
  }

  // to += the down projections, weighted. A job is some rows of all active experts and of the shared ones.
  void down(uint16_t* to) {
    const int jobs = n > 1 ? (p.hidden + JOB_ROWS - 1) / JOB_ROWS : DOWN_JOBS * thread.asked;
    thread.each_ahead(jobs, [&](int job, int after) {
      const Span rows = down_rows(job), rows_after = down_rows(after);
      const Halves job_after = rows_after.count > 0 ? down_addresses(0, rows_after) : Halves{};
      const size_t stride = blocks_of(rows.count) * LANES;
      memset(sums, 0, n * stride * sizeof(float));
      for (int a = 0; a < *s.actives; a++) {
        const bool more = a + 1 < *s.actives || has_shared;
        down_routed(s.active[a], rows, more ? down_addresses(a + 1, rows) : job_after);
      }
      if (has_shared) down_shared(rows, job_after);
      for (int t = 0; t < n; t++)
        add_to(to + (size_t)t * p.hidden + rows.begin, sums + t * stride, rows.count);
    });
  }
  // One token's jobs are an eighth of a thread's share. Past the last job there are no rows.
  Span down_rows(int job) const {
    return {first_down_row(job), first_down_row(job + 1) - first_down_row(job)};
  }
  int first_down_row(int job) const {
    if (n > 1) return std::min(p.hidden, job * JOB_ROWS);
    const int64_t block = (int64_t)blocks_of(p.hidden) * job / (DOWN_JOBS * thread.asked);
    return (int)std::min<int64_t>(p.hidden, block * LANES);
  }
  // Where these rows of the a-th active expert begin; past the last one, of the shared ones if there are any.
  Halves down_addresses(int a, Span rows) const {
    if (a >= *s.actives && has_shared) return halves_of(p.shared_down, rows);
    return halves_of(p.down.of_stack(s.active[a]), rows);
  }
  void down_routed(int e, Span rows, const Halves& next) {
    const size_t stride = blocks_of(rows.count) * LANES;
    const Matrix w = p.down.of_stack(e);
    for (int i = s.starts[e]; i < s.starts[e + 1]; i += TILE_TOKENS) {
      const int count = std::min(TILE_TOKENS, s.starts[e + 1] - i);
      multiply_down(w, rows, s.routed, i, count, next);
      for (int j = 0; j < count; j++) {
        const float factor = s.weight[s.order[i + j]], *from = products + j * TILE_ROWS;
        float* sum = sums + s.tokens[i + j] * stride;
        for (int l = 0; l < rows.count; l++) sum[l] += factor * from[l];
      }
    }
  }
  void down_shared(Span rows, const Halves& next) {
    const size_t stride = blocks_of(rows.count) * LANES;
    for (int t = 0; t < n; t += TILE_TOKENS) {
      const int count = std::min(TILE_TOKENS, n - t);
      multiply_down(p.shared_down, rows, s.shared, t, count, next);
      for (int i = 0; i < count; i++) {
        const float* from = products + i * TILE_ROWS;
        float* sum = sums + (t + i) * stride;
        for (int l = 0; l < rows.count; l++) sum[l] += from[l];
      }
    }
  }
  // products = rows of w times some rows of x.
  void multiply_down(const Matrix& w, Span rows, const Rows& x, int first, int count, const Halves& next) {
    if (count == 1) return stream_halves(w, rows, x.row(first), products, next);
    const int firsts[2] = {rows.begin, rows.begin + LANES};
    Row some[TILE_TOKENS];
    for (int i = 0; i < count; i++) some[i] = x.row(first + i);
    multiply(w, firsts, blocks_of(rows.count), some, count, products);
  }
};

// to += MLP(norm(x)) for x and to [n, hidden] in bf16, which may be the same. A choice replaces the router.
void run_mlp(const Mlp& p, const uint16_t* x, uint16_t* to, Choice choice, int n, Scratch scratch,
             Thread& thread, const Ahead& ahead = {}) {
  MlpPass pass(p, n, scratch, thread, ahead);
  pass.normalise(x);
  thread.meet();
  if (pass.has_routed && !choice.index) {
    pass.router_logits();
    thread.meet();
    pass.choose_experts();
    thread.meet();
  }
  if (pass.has_routed) {
    pass.sort_slots(choice);
    thread.meet();
    if (p.ahead) pass.ask(), thread.meet();
  }
  pass.gate_and_up();
  thread.meet();
  pass.down(to);
}

}  // namespace
