// Packing: weights in fp32 -> int8 or int4 codes and their scales, in the interleaved order.
// quantized.pack_reference says in plain torch what is computed here.
#pragma once
#include "matrix.h"

namespace {

constexpr int ENTRIES = 16;  // of the codebook

// What is packed, and where to: weights [rows, cols], codes and scales of whole blocks and groups.
struct Packing {
  const float* weights;
  int rows, cols, bits, group;
  const float* shrinks;  // what a group's largest number may become; the best of these `candidates` is taken
  int candidates;
  const int8_t* codebook;
  uint8_t* codes;
  uint16_t* scales;
};

// One thread's packing of one group of a row after the other.
struct Packer {
  const Packing& p;
  const int groups;                             // of a row
  float values[ENTRIES], middles[ENTRIES - 1];  // the codebook, and the borders between its entries
  std::vector<float> x, scaled;                 // a group as it is, and divided by a scale
  std::vector<int32_t> index;                   // its codes
  std::vector<uint8_t> bytes;

  explicit Packer(const Packing& p)
      : p(p),
        groups((p.cols + p.group - 1) / p.group),
        x(p.group),
        scaled(p.group),
        index(p.group),
        bytes(p.group) {
    for (int i = 0; i < ENTRIES; i++) values[i] = p.codebook[i];
    for (int i = 0; i < ENTRIES - 1; i++) middles[i] = (values[i] + values[i + 1]) / 2;
  }

  void pack_block(int block) {
    for (int lane = 0; lane < LANES; lane++)
      for (int g = 0; g < groups; g++) {
        read_group(block * LANES + lane, g);
        uint16_t* scale = p.scales + ((size_t)block * groups + g) * LANES + lane;
        if (p.bits == 8) *scale = pack8(block, lane, g);
        else *scale = pack4(block, lane, g);
      }
  }

 private:
  // Zeros stand beyond the last row and column.
  void read_group(int row, int g) {
    const int here = row < p.rows ? std::min(p.group, p.cols - g * p.group) : 0;
    std::copy_n(p.weights + (size_t)row * p.cols + g * p.group, here, x.data());
    std::fill(x.begin() + here, x.end(), 0.0f);
  }
  uint16_t pack8(int block, int lane, int g) {
    const uint16_t scale = narrow(largest(x.data(), p.group) / 127.0f);
    const float s = widen(scale), inverse = s > 0 ? 1.0f / s : 0.0f;
    const int group = p.group;
    const float* from = x.data();
    uint8_t* packed = bytes.data();
    for (int i = 0; i < group; i++) {
      const float code = std::min(127.0f, std::max(-127.0f, std::nearbyintf(from[i] * inverse)));
      packed[i] = (uint8_t)(int32_t)(code + 128.0f);
    }
    put_codes(packed, g * group, group, 8, lane, p.codes + (size_t)block * groups * group * LANES);
    return scale;
  }
  uint16_t pack4(int block, int lane, int g) {
    const uint16_t scale = narrow(best_scale());
    const float s = widen(scale);
    encode(s != 0 ? 1.0f / s : 0.0f);
    for (int i = 0; i < p.group; i++) bytes[i] = (uint8_t)index[i];
    uint8_t* const to = p.codes + (size_t)block * groups * p.group * LANES / 2;
    put_codes(bytes.data(), g * p.group, p.group, 4, lane, to);
    return scale;
  }
  // The one with the least squared error among the candidates, each refitted to the codes that it leads to.
  float best_scale() {
    const float size = largest(x.data(), p.group);
    const auto found = std::find_if(x.begin(), x.end(), [=](float v) { return std::fabs(v) == size; });
    const float top = found == x.end() ? 0.0f : *found;
    float best = -1, chosen = 0;
    for (int c = 0; c < p.candidates && top != 0; c++) {
      encode(p.shrinks[c] / top);
      float qx = 0, qq = 0;
#pragma omp simd reduction(+ : qx, qq)
      for (int i = 0; i < p.group; i++) {
        const float q = values[index[i]];
        qx += q * x[i], qq += q * q;
      }
      if (qx * qx > best * qq) best = qx * qx / qq, chosen = qx / qq;
    }
    return chosen;
  }
  // index = the codebook's entry nearest to x * inverse. Sizes and addresses are local: the compiler knows
  // then that nothing written here changes them, and makes vectors of the loops.
  void encode(float inverse) {
    const int group = p.group;
    const float* from = x.data();
    float* to = scaled.data();
    int32_t* codes = index.data();
    for (int i = 0; i < group; i++) to[i] = from[i] * inverse, codes[i] = 0;
    for (int j = 0; j < ENTRIES - 1; j++) {
      const float middle = middles[j];
      for (int i = 0; i < group; i++) codes[i] += to[i] > middle;
    }
  }
};

}  // namespace
