// What Python calls, through ctypes: all layers of a decode step, single products and MLPs, packing.
// This is the one translation unit: native.py compiles it on first use, for the processor at hand.
//
// What is computed is said by plain torch (linear.py, attention.py, experts.py, quantized.py); these files do
// it faster. Activations enter a product as bf16 where weights are bf16, as floats where they are 8-bit floats,
// else as int8 with a scale a group; sums are kept in fp32 or int32. One token is bounded by memory, and the
// data are laid out for that.
#include "attention.h"
#include "mlp.h"
#include "pack.h"
#include "unpack.h"

struct Layer {
  Attention attention;
  Mlp mlp;
};

extern "C" {

const char* dsv2_path() {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  return amx_allowed() ? "AVX-512 (VNNI, BF16), AMX" : "AVX-512 (VNNI, BF16)";
#elif defined(__AVX512VNNI__)
  return "AVX-512 (VNNI)";
#elif defined(__AVX2__) && defined(__AVXVNNI__)
  return "AVX2 (VNNI)";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return "NEON (dot products, BF16)";
#elif defined(__ARM_FEATURE_DOTPROD)
  return "NEON (dot products)";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "portable C++";
#endif
}

// x [n, cols] times w -> out [n, rows], both bf16.
void dsv2_linear(const Matrix* w, const uint16_t* x, int n, uint16_t* out, int threads) {
  Rows in;
  float* rows = nullptr;
  const auto claim = [&](Scratch scratch) {
    in.claim(scratch, *w, n);
    rows = scratch.take<float>((size_t)threads * w->cols);
    return scratch.at;
  };
  claim({arena.hold(claim({0}))});
  parallel(threads, [&](Thread& thread) {
    float* row = rows + (size_t)thread.number * w->cols;
    thread.each(n, [&](int t) {
      widen_row(x + (size_t)t * w->cols, w->cols, row);
      in.put(t, 0, w->cols, row);
    });
    thread.meet();
    const Target target = {Target::NARROW, out, (size_t)w->rows};
    thread.each_ahead(jobs_of(*w), [&](int job, int after) { product_job(*w, job, after, in, n, target); });
  });
}

// out += MLP(x), x and out [n, hidden], or with index and weight [n, top_k] the chosen experts' weighted sum.
void dsv2_mlp(const Mlp* mlp, const uint16_t* x, const int32_t* index, const float* weight, uint16_t* out,
              int n, int threads) {
  Scratch measure{0};
  MlpScratch(*mlp, n, threads, measure);
  const Scratch scratch{arena.hold(measure.at)};
  parallel(threads, [&](Thread& thread) { run_mlp(*mlp, x, out, {index, weight}, n, scratch, thread); });
}

// to += the attention of x, both [n, hidden], which may be the same.
void dsv2_attention(const Attention* attention, const uint16_t* x, uint16_t* to, int n, const float* rotary,
                    const int32_t* lengths, const Pages* pages, int threads) {
  const Context context(rotary, lengths, pages, n, threads);
  Scratch measure{0};
  AttentionScratch(*attention, context, threads, measure);
  const Scratch scratch{arena.hold(measure.at)};
  parallel(threads, [&](Thread& thread) { run_attention(*attention, x, to, context, 0, scratch, thread); });
}

// x [n, hidden] through `count` layers, or through their MLP alone.
void dsv2_layers(const Layer* layers, int count, int attention, uint16_t* x, int n, const float* rotary,
                 const int32_t* lengths, const Pages* pages, int threads) {
  const Context context(rotary, lengths, pages, n, threads);
  // The MLP after the i-th, where its choice is to be guessed: one of few tokens, that leaves some out.
  const auto next_of = [&](int i) -> const Mlp* {
    if (i + 1 == count || !layers[i].mlp.experts) return nullptr;
    const Mlp& next = layers[i + 1].mlp;
    return next.ahead == GUESS && n * next.top_k <= next.experts ? &next : nullptr;
  };
  const int slots = n * layers[count - 1].mlp.top_k;
  std::vector<int32_t> guesses((size_t)(count + 1) * slots, -1);
  size_t wanted = 0;
  for (int i = 0; i < count; i++) {
    Scratch one{0}, other{0};
    if (attention) AttentionScratch(layers[i].attention, context, threads, one);
    MlpScratch(layers[i].mlp, n, threads, other, next_of(i));
    wanted = std::max({wanted, (size_t)one.at, (size_t)other.at});
  }
  const Scratch scratch{arena.hold(wanted)};
  parallel(threads, [&](Thread& thread) {
    for (int i = 0; i < count; i++) {
      if (attention) run_attention(layers[i].attention, x, x, context, i, scratch, thread), thread.meet();
      const Ahead ahead = {next_of(i), guesses.data() + i * slots, guesses.data() + (i + 1) * slots};
      run_mlp(layers[i].mlp, x, x, {}, n, scratch, thread, ahead), thread.meet();
    }
  });
}

// How many experts were guessed, and how many of these were then chosen, since the library was loaded.
void dsv2_guesses(int64_t* to) { to[0] = all_guesses, to[1] = right_guesses; }

// weights [rows, cols] in fp32 -> codes and scales. shrinks [candidates], codebook [16]: see Packing.
void dsv2_pack(const float* weights, int rows, int cols, int bits, int group, const float* shrinks,
               int candidates, const int8_t* codebook, uint8_t* codes, uint16_t* scales, int threads) {
  const Packing packing = {weights, rows, cols, bits, group, shrinks, candidates, codebook, codes, scales};
  parallel(threads, [&](Thread& thread) {
    Packer packer(packing);
    thread.each(blocks_of(rows), [&](int block) { packer.pack_block(block); });
  });
}

// Rows of GGUF blocks of a ggml type into codes, scales and supers as `w` has them; 0 for an unknown type.
int dsv2_unpack(int type, const uint8_t* raw, int rows, const Matrix* w, uint8_t* codes, uint8_t* scales,
                uint16_t* supers) {
  return unpack_rows(type, raw, rows, *w, codes, scales, supers);
}

// values [rows, cols], a code a byte, into interleaved codes.
void dsv2_interleave(const uint8_t* values, int rows, int cols, int bits, int group, uint8_t* codes) {
  interleave_rows(values, rows, cols, bits, group, codes);
}

// Reads `count` bytes with all threads: what the memory can give. The sum keeps it from being optimised away.
uint64_t dsv2_read(const uint8_t* data, int64_t count, int threads) {
  const int64_t piece = 1 << 18;
  std::atomic<uint64_t> total{0};
  parallel(threads, [&](Thread& thread) {
    U acc[4] = {};
    thread.each((int)(count / piece), [&](int job) {
      const uint8_t* at = data + job * piece;
      for (int64_t i = 0; i < piece; i += 256)
        for (int j = 0; j < 4; j++) {
          __builtin_prefetch(at + i + 64 * j + AHEAD);
          acc[j] += load_as<U>(at + i + 64 * j);
        }
    });
    const U together = acc[0] + acc[1] + acc[2] + acc[3];
    uint64_t mine = 0;
    for (int i = 0; i < 16; i++) mine += together[i];
    total += mine;
  });
  return total;
}

}  // extern "C"
