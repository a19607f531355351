// Attention in bfloat16 for AVX-512 and AMX, whose scores never leave the cache (FlashAttention, Dao et al. 2022).
//
// Scores are stored transposed, keys by queries. A register then holds one key's scores for 16 queries, a maximum or a
// sum over keys is lane-wise, and the weights already have the layout that the second product reads.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <new>

#include "processor.h"

namespace {

constexpr long KEYS = 128;  // keys between two updates of the running maximum

// Strides in elements between images, heads and tokens.
struct Strides {
  long image, head, token;
};

struct Sizes {
  long images, heads, queries, keys, width;
  long steps() const { return (width + 31) / 32; }
  long tiles() const { return (width + 15) / 16; }
  long padded() const { return (keys + 31) / 32 * 32; }
  long key_lines() const { return padded() / 16 * steps() * TILE; }
  long value_lines() const { return padded() / 32 * tiles() * TILE; }
};

// Packs keys into tiles of 16 keys by 32 elements, [keys / 16][steps].
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

// Packs values into tiles of 16 elements by 32 keys, [keys / 32][tiles].
void pack_values(const bfloat16* from, long stride, const Sizes& sizes, Line* to) {
  const __m512i none = _mm512_setzero_si512(), low = _mm512_set1_epi32(0xffff), at = every(2 * stride);
  for (long key = 0; key < sizes.padded(); key += 32) {
    const __mmask16 even = first((sizes.keys - key + 1) / 2), odd = first((sizes.keys - key) / 2);
    const bfloat16* token = from + key * stride;
    for (long element = 0; element < sizes.width; element += 2, token += 2) {
      const __m512i one = _mm512_mask_i32gather_epi32(none, even, at, token, 1);
      const __m512i next = _mm512_mask_i32gather_epi32(none, odd, at, token + stride, 1);
      Line* line = to + (key / 32 * sizes.tiles() + element / 16) * TILE + element % 16;
      _mm512_store_si512(line, _mm512_or_si512(_mm512_and_si512(one, low), _mm512_slli_epi32(next, 16)));
      _mm512_store_si512(line + 1, _mm512_or_si512(_mm512_srli_epi32(one, 16), _mm512_andnot_si512(low, next)));
    }
  }
}

// Packs queries into tiles of pairs of elements by queries, [steps][2].
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

// Rounds positive float32 numbers of two keys to pairs of bfloat16.
__m512i paired(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_add_epi32(_mm512_castps_si512(odd), half));
}

// Running softmax of a block of 32 queries, in two halves of 16.
class Queries {
 public:
  explicit Queries(const Sizes& sizes)
      : sizes(sizes),
        lines(new Line[3 * KEYS + (sizes.tiles() + sizes.steps()) * 2 * TILE]),
        scores((float*)lines.get()),
        weights(lines.get() + 2 * KEYS),
        sums((float*)(weights + KEYS)),
        packed(weights + KEYS + sizes.tiles() * 2 * TILE) {}

  void start(const bfloat16* from, long stride, long count) {
    pack_queries(from, stride, count, sizes, packed);
    std::fill_n(sums, sizes.tiles() * 16 * QUERIES, 0.0f);
    for (long half = 0; half < 2; half++) {
      largest[half] = _mm512_set1_ps(-FLT_MAX);
      total[half] = _mm512_setzero_ps();
    }
  }

  // Adds `count` keys and values, of which the first `known` are no padding.
  void add(const Line* keys, const Line* values, long count, long known, __m512 scale) {
    multiply<false>(scores, {keys, TILE, sizes.steps() * TILE}, packed, count, (sizes.width + 1) / 2);
    if (known < count) std::fill(scores + known * QUERIES, scores + count * QUERIES, -INFINITY);
    update_maximum(count, scale);
    exponentiate(count, scale);
    multiply<true>(sums, {values, sizes.tiles() * TILE, TILE}, weights, (sizes.width + 7) / 8 * 8, count / 2);
  }

  void finish(bfloat16* to, long stride, long count) const {
    const __m512i at = every(stride);
    for (long half = 0; half < 2; half++) {
      const __m512 share = _mm512_div_ps(_mm512_set1_ps(1), total[half]);
      for (long element = 0; element < sizes.width; element += 2) {
        const float* sum = sums + element * QUERIES + half * 16;
        const __m512 even = _mm512_mul_ps(_mm512_load_ps(sum), share);
        const __m512 odd = _mm512_mul_ps(_mm512_load_ps(sum + QUERIES), share);
        const __m512i pairs = interleaved((__m512i)_mm512_cvtne2ps_pbh(odd, even));
        _mm512_mask_i32scatter_epi32(to + half * 16 * stride + element, first(count - half * 16), at, pairs, 1);
      }
    }
  }

 private:
  // Updates the running maximum and rescales the sums (online softmax, Milakov and Gimelshein 2018).
  void update_maximum(long count, __m512 scale) {
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
      for (long element = 0; element < sizes.width; element++) {
        float* sum = sums + element * QUERIES + half * 16;
        _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), less));
      }
    }
  }

  // The total sums up the rounded weights, so that the weights of a query add up to one in spite of rounding.
  void exponentiate(long count, __m512 scale) {
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
  const std::unique_ptr<Line[]> lines;  // storage of the following four
  float* const scores;                  // [keys][32]
  Line* const weights;                  // [keys / 32][2] tiles of pairs of keys
  float* const sums;                    // [elements][32]
  Line* const packed;
  __m512 largest[2], total[2];
};

}  // namespace

extern "C" {

int available() { return Unit::allowed(); }

// Attention of `heads` heads of `images` images; a token's elements are contiguous and even in number; `scale` includes
// log2(e), for exp2. Returns 0 if there is not enough memory.
int attention(const bfloat16* query, const bfloat16* key, const bfloat16* value, bfloat16* result, const Sizes* shape,
              const Strides* strides, float scale) {
  const Sizes sizes = *shape;
  const long key_size = sizes.key_lines(), value_size = sizes.value_lines();
  const long heads = sizes.images * sizes.heads, blocks = (sizes.queries + QUERIES - 1) / QUERIES;
  const std::unique_ptr<Line[]> keys(new (std::nothrow) Line[heads * key_size]);
  const std::unique_ptr<Line[]> values(new (std::nothrow) Line[heads * value_size]);
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
      pack_keys(key + at(1, head, 0), strides[1].token, sizes, keys.get() + head * key_size);
      pack_values(value + at(2, head, 0), strides[2].token, sizes, values.get() + head * value_size);
    }
#pragma omp for schedule(dynamic)  // a busy core must not hold up the others
    for (long block = 0; block < heads * blocks; block++) {
      const long head = block / blocks, begin = block % blocks * QUERIES;
      const long count = std::min(QUERIES, sizes.queries - begin);
      queries.start(query + at(0, head, begin), strides[0].token, count);
      for (long done = 0; done < sizes.padded(); done += KEYS) {
        queries.add(keys.get() + head * key_size + done / 16 * sizes.steps() * TILE,
                    values.get() + head * value_size + done / 32 * sizes.tiles() * TILE,
                    std::min(KEYS, sizes.padded() - done), std::max(0L, sizes.keys - done), _mm512_set1_ps(scale));
      }
      queries.finish(result + at(3, head, begin), strides[3].token, count);
    }
  }
  return true;
}
}
