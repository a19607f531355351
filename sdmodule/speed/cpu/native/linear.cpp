// Linear layers in bfloat16 for AVX-512 and AMX, with weights packed once: tokens are read where they lie, sums stay in
// the cache until the bias is added and the gate applied, and idle threads take over what busy ones have not begun.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "processor.h"

namespace {

constexpr long PANEL = QUERIES;  // outputs that are computed together
constexpr long BLOCK = 1 << 19;  // numbers of the tokens of one task: they stay in a core's cache
constexpr long LONGEST = 512;    // tokens of one task

struct Sizes {
  long tokens, inputs, outputs;
  long steps() const { return inputs / 32; }
  long panels() const { return outputs / PANEL; }
};

// Row of the weights that is column `column` of a panel. With a gate, which is the second half of the weights, each
// panel holds 16 outputs and their 16 gates.
long row_of(long panel, long column, const Sizes& sizes, bool gated) {
  if (!gated) return panel * PANEL + column;
  return panel * 16 + column % 16 + column / 16 * (sizes.outputs / 2);
}

// GELU (Hendrycks and Gimpel 2016), the error function by Abramowitz and Stegun 7.1.26.
__m512 gelu(__m512 x) {
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  const __m512 z = _mm512_mul_ps(_mm512_xor_ps(x, sign), _mm512_set1_ps(float(M_SQRT1_2)));
  const __m512 t = _mm512_div_ps(_mm512_set1_ps(1), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1)));
  __m512 tail = _mm512_set1_ps(1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(factor));
  const __m512 power = exp2(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-float(M_LOG2E))));
  tail = _mm512_mul_ps(_mm512_mul_ps(tail, t), power);  // 1 - erf(z)
  const __m512 error = _mm512_or_ps(_mm512_sub_ps(_mm512_set1_ps(1), tail), sign);
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  return _mm512_fmadd_ps(half, error, half);
}

// Adds the bias to sums [tokens][32], applies the gates, rounds, and writes them.
void finish(const float* sums, const float* bias, long tokens, bool gated, bfloat16* to, long stride) {
  const __m512 low = _mm512_load_ps(bias), high = _mm512_load_ps(bias + 16);
  for (const float* end = sums + tokens * PANEL; sums < end; sums += PANEL, to += stride) {
    const __m512 one = _mm512_add_ps(_mm512_load_ps(sums), low), other = _mm512_add_ps(_mm512_load_ps(sums + 16), high);
    if (gated)
      _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(one, gelu(other))));
    else
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(other, one));
  }
}

}  // namespace

extern "C" {

int available() { return Unit::allowed(); }

// Packs weights [outputs][inputs] and a bias (or null) of bfloat16 into panels of tiles, and of float32.
void pack(const bfloat16* weights, const bfloat16* bias, const Sizes* shape, int gated, Line* to, float* to_bias) {
  const Sizes sizes = *shape;
#pragma omp parallel for
  for (long panel = 0; panel < sizes.panels(); panel++) {
    for (long column = 0; column < PANEL; column++) {
      const long row = row_of(panel, column, sizes, gated);
      const std::uint32_t number = bias ? std::uint32_t(bias[row]) << 16 : 0;
      std::memcpy(to_bias + panel * PANEL + column, &number, sizeof(number));
      const bfloat16* from = weights + row * sizes.inputs;
      for (long pair = 0; pair < sizes.inputs / 2; pair++) {
        Line& line = to[((panel * sizes.steps() + pair / 16) * 2 + column / 16) * TILE + pair % 16];
        line.numbers[column % 16 * 2] = from[2 * pair];
        line.numbers[column % 16 * 2 + 1] = from[2 * pair + 1];
      }
    }
  }
}

// The layer for at least 32 tokens [tokens][inputs]; inputs and outputs are multiples of 32. With a gate the result has
// half as many outputs.
void linear(const bfloat16* tokens, const Line* panels, const float* bias, bfloat16* result, const Sizes* shape,
            int gated) {
  const Sizes sizes = *shape;
  const long height = std::clamp(BLOCK / sizes.inputs / 32 * 32, 32L, LONGEST);
  const long blocks = (sizes.tokens + height - 1) / height, width = gated ? PANEL / 2 : PANEL;
  const long stride = sizes.panels() * width;
#pragma omp parallel
  {
    Unit unit;
    Line sums[32 * 2];
#pragma omp for schedule(dynamic)
    for (long task = 0; task < blocks * sizes.panels(); task++) {
      const long panel = task % sizes.panels(), begin = task / sizes.panels() * height;
      const Line* weights = panels + panel * sizes.steps() * 2 * TILE;
      for (long row = begin; row < std::min(begin + height, sizes.tokens); row += 32) {
        // the last rows begin earlier, and are computed again, instead of reading past the end
        const long start = std::min(row, sizes.tokens - 32);
        const Line* from = (const Line*)(tokens + start * sizes.inputs);
        bfloat16* to = result + row * stride + panel * width;
        const long count = std::min(32L, sizes.tokens - row);
        for (long i = 0; i < count; i++) __builtin_prefetch(to + i * stride, 1);
        multiply<false>((float*)sums, {from, 1, sizes.steps() * TILE, sizes.steps()}, weights, 32, sizes.inputs / 2);
        finish((float*)(sums + (row - start) * 2), bias + panel * PANEL, count, gated, to, stride);
      }
    }
  }
}
}
