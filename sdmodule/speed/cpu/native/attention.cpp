// Attention in bfloat16 on processors with AVX-512, whose scores never leave the cache (Dao et al. 2022).
//
// Scores are kept transposed, keys by queries: a register then holds one key's scores of 16 queries, a maximum or a sum
// over keys is taken lane by lane, and weights lie as the second product reads them.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <new>

#include "processor.h"

namespace {

constexpr long QUERIES = 32;  // at a time: two registers of float32
constexpr long KEYS = 128;    // between two looks for a new maximum

// Where a head's tokens lie: numbers from image to image, head to head and token to token.
struct Strides {
  long image, head, token;
};

struct Sizes {
  long images, heads, queries, keys, width;
  long steps() const { return (width + 31) / 32; }
  long tiles() const { return (width + 15) / 16; }
  long padded() const { return (keys + 31) / 32 * 32; }
  long lines_of_keys() const { return padded() / 16 * steps() * TILE; }
  long lines_of_values() const { return padded() / 32 * tiles() * TILE; }
};

// Tiles of 16 keys by 32 numbers, [keys / 16][steps].
void pack_keys(const bfloat16* from, long stride, const Sizes& sizes, Line* to) {
  for (long key = 0; key < sizes.padded(); key++) {
    for (long step = 0; step < sizes.steps(); step++) {
      const long count = key < sizes.keys ? std::min(32L, sizes.width - step * 32) : 0;
      const __mmask32 there = count == 32 ? ~0u : (1u << count) - 1;
      Line* line = to + (key / 16 * sizes.steps() + step) * TILE + key % 16;
      _mm512_store_si512(line, _mm512_maskz_loadu_epi16(there, from + key * stride + step * 32));
    }
  }
}

// Tiles of 16 numbers by 32 keys, [keys / 32][tiles].
void pack_values(const bfloat16* from, long stride, const Sizes& sizes, Line* to) {
  const __m512i none = _mm512_setzero_si512(), low = _mm512_set1_epi32(0xffff), at = every(2 * stride);
  for (long key = 0; key < sizes.padded(); key += 32) {
    const __mmask16 even = first((sizes.keys - key + 1) / 2), odd = first((sizes.keys - key) / 2);
    const bfloat16* token = from + key * stride;
    for (long number = 0; number < sizes.width; number += 2, token += 2) {
      const __m512i one = _mm512_mask_i32gather_epi32(none, even, at, token, 1);
      const __m512i next = _mm512_mask_i32gather_epi32(none, odd, at, token + stride, 1);
      Line* line = to + (key / 32 * sizes.tiles() + number / 16) * TILE + number % 16;
      _mm512_store_si512(line, _mm512_or_si512(_mm512_and_si512(one, low), _mm512_slli_epi32(next, 16)));
      _mm512_store_si512(line + 1, _mm512_or_si512(_mm512_srli_epi32(one, 16), _mm512_andnot_si512(low, next)));
    }
  }
}

// Pairs of numbers by queries, [steps][2] tiles.
void pack_queries(const bfloat16* from, long stride, long count, const Sizes& sizes, Line* to) {
  const __m512i none = _mm512_setzero_si512(), at = every(stride);
  for (long pair = 0; pair < sizes.steps() * 16; pair++) {
    for (long half = 0; half < 2; half++) {
      const __mmask16 there = 2 * pair < sizes.width ? first(count - half * 16) : 0;
      const bfloat16* token = from + half * 16 * stride + 2 * pair;
      _mm512_store_si512(to + (pair / 16 * 2 + half) * TILE + pair % 16,
                         _mm512_mask_i32gather_epi32(none, there, at, token, 1));
    }
  }
}

// A product that has tiles on its left, `along` lines apart in the direction of the sum and `down` across it.
struct Left {
  const Line* tiles;
  long along, down;
};

#ifdef __AMX_BF16__

// sums[rows][32] = left[rows][2 * pairs] * right[2 * pairs][32], or that is added to them.
template <bool ADD>
void multiply(float* sums, Left left, const Line* right, long rows, long pairs) {
  constexpr long stride = QUERIES * sizeof(float);
  asm volatile("" ::: "memory");  // what is loaded was stored: GCC's functions do not say that they read
  for (long row = 0; row < rows; row += 32) {
    const bool both = rows - row > 16;
    float *top = sums + row * QUERIES, *bottom = top + 16 * QUERIES;
    if (ADD) {
      _tile_loadd(0, top, stride);
      _tile_loadd(1, top + 16, stride);
      if (both) {
        _tile_loadd(2, bottom, stride);
        _tile_loadd(3, bottom + 16, stride);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const Line* tile = left.tiles + row / 16 * left.down;
    for (long step = 0; step * 16 < pairs; step++, tile += left.along) {
      _tile_loadd(4, tile, sizeof(Line));
      _tile_loadd(6, right + step * 2 * TILE, sizeof(Line));
      _tile_loadd(7, right + (step * 2 + 1) * TILE, sizeof(Line));
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, tile + left.down, sizeof(Line));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, top, stride);
    _tile_stored(1, top + 16, stride);
    if (both) {
      _tile_stored(2, bottom, stride);
      _tile_stored(3, bottom + 16, stride);
    }
  }
}

#else

// sums[rows][32] = left[rows][2 * pairs] * right[2 * pairs][32], or that is added to them.
template <bool ADD>
void multiply(float* sums, Left left, const Line* right, long rows, long pairs) {
  constexpr long TOGETHER = 8;  // rows whose sums fit into registers
  for (long row = 0; row < rows; row += TOGETHER) {
    __m512 sum[TOGETHER][2];
    float* to = sums + row * QUERIES;
    for (long i = 0; i < TOGETHER; i++)
      for (long half = 0; half < 2; half++)
        sum[i][half] = ADD ? _mm512_load_ps(to + i * QUERIES + half * 16) : _mm512_setzero_ps();
    const Line* tile = left.tiles + row / 16 * left.down + row % 16;
    for (long pair = 0; pair < pairs; pair++) {
      const Line* line = right + pair / 16 * 2 * TILE + pair % 16;
      const __m512bh one = (__m512bh)_mm512_load_si512(line), other = (__m512bh)_mm512_load_si512(line + TILE);
      const Line* numbers = tile + pair / 16 * left.along;
      for (long i = 0; i < TOGETHER; i++) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(((const int*)(numbers + i))[pair % 16]);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], one, both);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], other, both);
      }
    }
    for (long i = 0; i < TOGETHER; i++)
      for (long half = 0; half < 2; half++) _mm512_store_ps(to + i * QUERIES + half * 16, sum[i][half]);
  }
}

#endif

// Positive numbers of two keys as pairs of bfloat16, rounded to the nearest.
__m512i paired(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_add_epi32(_mm512_castps_si512(odd), half));
}

// What is known of 32 queries once they have seen some keys; 16 of them are a half.
class Queries {
 public:
  explicit Queries(const Sizes& sizes)
      : sizes(sizes),
        lines(new Line[3 * KEYS + (sizes.tiles() + sizes.steps()) * 2 * TILE]),
        scores((float*)lines.get()),
        weights(lines.get() + 2 * KEYS),
        sums((float*)(weights + KEYS)),
        packed(weights + KEYS + sizes.tiles() * 2 * TILE) {}

  void begin(const bfloat16* from, long stride, long count) {
    pack_queries(from, stride, count, sizes, packed);
    std::fill_n(sums, sizes.tiles() * 16 * QUERIES, 0.0f);
    for (long half = 0; half < 2; half++) {
      largest[half] = _mm512_set1_ps(-FLT_MAX);
      total[half] = _mm512_setzero_ps();
    }
  }

  // See some keys, of which `known` are no padding.
  void see(const Line* keys, const Line* values, long count, long known, __m512 scale) {
    multiply<false>(scores, {keys, TILE, sizes.steps() * TILE}, packed, count, (sizes.width + 1) / 2);
    if (known < count) std::fill(scores + known * QUERIES, scores + count * QUERIES, -INFINITY);
    find_largest(count, scale);
    weigh(count, scale);
    multiply<true>(sums, {values, sizes.tiles() * TILE, TILE}, weights, (sizes.width + 7) / 8 * 8, count / 2);
  }

  void finish(bfloat16* to, long stride, long count) const {
    const __m512i at = every(stride);
    for (long half = 0; half < 2; half++) {
      const __m512 share = _mm512_div_ps(_mm512_set1_ps(1), total[half]);
      for (long number = 0; number < sizes.width; number += 2) {
        const float* sum = sums + number * QUERIES + half * 16;
        const __m512 even = _mm512_mul_ps(_mm512_load_ps(sum), share);
        const __m512 odd = _mm512_mul_ps(_mm512_load_ps(sum + QUERIES), share);
        const __m512i pairs = interleaved((__m512i)_mm512_cvtne2ps_pbh(odd, even));
        _mm512_mask_i32scatter_epi32(to + half * 16 * stride + number, first(count - half * 16), at, pairs, 1);
      }
    }
  }

 private:
  // Scale sums down where a larger score has come, as softmax needs it (Milakov and Gimelshein 2018).
  void find_largest(long count, __m512 scale) {
    __m512 even[2], odd[2];
    for (long half = 0; half < 2; half++) even[half] = odd[half] = _mm512_set1_ps(-INFINITY);
    for (const float *score = scores, *end = scores + count * QUERIES; score < end; score += 2 * QUERIES) {
      for (long half = 0; half < 2; half++) {
        even[half] = _mm512_max_ps(even[half], _mm512_load_ps(score + half * 16));
        odd[half] = _mm512_max_ps(odd[half], _mm512_load_ps(score + QUERIES + half * 16));
      }
    }
    for (long half = 0; half < 2; half++) {
      const __m512 larger = _mm512_max_ps(largest[half], _mm512_max_ps(even[half], odd[half]));
      if (!_mm512_cmp_ps_mask(larger, largest[half], _CMP_NEQ_UQ)) continue;
      const __m512 less = exp2(_mm512_mul_ps(_mm512_sub_ps(largest[half], larger), scale));
      largest[half] = larger;
      total[half] = _mm512_mul_ps(total[half], less);
      for (long number = 0; number < sizes.width; number++) {
        float* sum = sums + number * QUERIES + half * 16;
        _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), less));
      }
    }
  }

  // What is summed up are weights as they are multiplied, so that those of a query make one whatever rounding does.
  void weigh(long count, __m512 scale) {
    for (long half = 0; half < 2; half++) {
      const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
      const __m512 top = largest[half];
      __m512 sum = total[half];
      for (long key = 0; key < count; key += 32) {
        const float* score = scores + key * QUERIES + half * 16;
        Line* line = weights + (key / 32 * 2 + half) * TILE;
        for (const Line* end = line + TILE; line < end; line++, score += 2 * QUERIES) {
          const __m512 even = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(score), top), scale));
          const __m512 odd = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(score + QUERIES), top), scale));
          const __m512i pairs = paired(even, odd);
          sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs, ones);
          _mm512_store_si512(line, pairs);
        }
      }
      total[half] = sum;
    }
  }

  static __m512i interleaved(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
  }

  const Sizes& sizes;
  const std::unique_ptr<Line[]> lines;  // of which the following are parts
  float* const scores;                  // [keys][32]
  Line* const weights;                  // [keys / 32][2] tiles of pairs of keys
  float* const sums;                    // [numbers][32]
  Line* const packed;
  __m512 largest[2], total[2];
};

}  // namespace

extern "C" {

int available() { return Unit::allowed(); }

// Attention of `heads` of `images`, whose numbers, an even count, lie beside each other; `scale` is for powers of two.
// Whether there was memory for it.
int attention(const bfloat16* query, const bfloat16* key, const bfloat16* value, bfloat16* result, const Sizes* given,
              const Strides* strides, float scale) {
  const Sizes sizes = *given;
  const long of_keys = sizes.lines_of_keys(), of_values = sizes.lines_of_values();
  const long heads = sizes.images * sizes.heads, blocks = (sizes.queries + QUERIES - 1) / QUERIES;
  const std::unique_ptr<Line[]> keys(new (std::nothrow) Line[heads * of_keys]);
  const std::unique_ptr<Line[]> values(new (std::nothrow) Line[heads * of_values]);
  if (!keys || !values) return false;
  const auto at = [&](int which, long head, long token) {
    const Strides& along = strides[which];
    return head / sizes.heads * along.image + head % sizes.heads * along.head + token * along.token;
  };
#pragma omp parallel
  {
    Unit unit;
    Queries queries(sizes);
#pragma omp for
    for (long head = 0; head < heads; head++) {
      pack_keys(key + at(1, head, 0), strides[1].token, sizes, keys.get() + head * of_keys);
      pack_values(value + at(2, head, 0), strides[2].token, sizes, values.get() + head * of_values);
    }
#pragma omp for
    for (long block = 0; block < heads * blocks; block++) {
      const long head = block / blocks, begin = block % blocks * QUERIES;
      const long count = std::min(QUERIES, sizes.queries - begin);
      queries.begin(query + at(0, head, begin), strides[0].token, count);
      for (long seen = 0; seen < sizes.padded(); seen += KEYS) {
        queries.see(keys.get() + head * of_keys + seen / 16 * sizes.steps() * TILE,
                    values.get() + head * of_values + seen / 32 * sizes.tiles() * TILE,
                    std::min(KEYS, sizes.padded() - seen), std::max(0L, sizes.keys - seen), _mm512_set1_ps(scale));
      }
      queries.finish(result + at(3, head, begin), strides[3].token, count);
    }
  }
  return true;
}
}
