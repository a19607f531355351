// Shared by the kernels of this folder: bfloat16 tiles and their products, with AMX or AVX-512, and exp2.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "needs AVX-512 with bfloat16"
#endif

namespace {

using bfloat16 = std::uint16_t;

// A row of a tile: 32 elements along the summed dimension, or pairs of elements of 16 queries.
struct alignas(64) Line {
  bfloat16 numbers[32];
};

constexpr long TILE = 16;     // lines of a tile
constexpr long QUERIES = 32;  // queries of a block: two float32 registers

__mmask16 first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

// Byte offsets of 16 tokens.
__m512i every(long stride) {
  const __m512i counted = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mullo_epi32(counted, _mm512_set1_epi32(int(stride * sizeof(bfloat16))));
}

#ifdef __AMX_BF16__

// Configures the AMX tile registers, and restores their configuration at the end.
class Unit {
 public:
  Unit() {
    asm volatile("sttilecfg %0" : "=m"(before));
    Configuration configuration = {};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
      configuration.bytes[tile] = sizeof(Line);
      configuration.rows[tile] = TILE;
    }
    load(configuration);
  }
  ~Unit() { load(before); }

  // Whether the system lets this process use AMX.
  static bool allowed() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

 private:
  struct alignas(64) Configuration {
    std::uint8_t palette, start, reserved[14];
    std::uint16_t bytes[16];
    std::uint8_t rows[16];
  };

  // Instead of the compiler's intrinsic, which GCC 12.2 takes to read 8 bytes only and may optimize the rest away.
  static void load(const Configuration& configuration) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }

  Configuration before;
};

#else

struct Unit {
  static bool allowed() { return true; }
};

#endif

// The left operand of a product: tiles that are `along` lines apart in the summed dimension and `down` in the other, and
// whose own lines are `line` apart.
struct Left {
  const Line* tiles;
  long along, down, line = 1;
};

#ifdef __AMX_BF16__

// sums[rows][32] = left[rows][2 * pairs] * right[2 * pairs][32]; with ADD, the product is added to the sums.
template <bool ADD>
void multiply(float* sums, Left left, const Line* right, long rows, long pairs) {
  constexpr long stride = QUERIES * sizeof(float);
  asm volatile("" ::: "memory");  // GCC's intrinsics do not declare that they read memory: finish all stores first
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
      _tile_loadd(4, tile, left.line * sizeof(Line));
      _tile_loadd(6, right + step * 2 * TILE, sizeof(Line));
      _tile_loadd(7, right + (step * 2 + 1) * TILE, sizeof(Line));
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, tile + left.down, left.line * sizeof(Line));
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

// sums[rows][32] = left[rows][2 * pairs] * right[2 * pairs][32]; with ADD, the product is added to the sums.
template <bool ADD>
void multiply(float* sums, Left left, const Line* right, long rows, long pairs) {
  constexpr long TOGETHER = 8;  // rows whose sums fit into the registers
  for (long row = 0; row < rows; row += TOGETHER) {
    __m512 sum[TOGETHER][2];
    float* to = sums + row * QUERIES;
    for (long i = 0; i < TOGETHER; i++)
      for (long half = 0; half < 2; half++)
        sum[i][half] = ADD ? _mm512_load_ps(to + i * QUERIES + half * 16) : _mm512_setzero_ps();
    const Line* tile = left.tiles + row / 16 * left.down + row % 16 * left.line;
    for (long pair = 0; pair < pairs; pair++) {
      const Line* line = right + pair / 16 * 2 * TILE + pair % 16;
      const __m512bh one = (__m512bh)_mm512_load_si512(line), other = (__m512bh)_mm512_load_si512(line + TILE);
      const Line* numbers = tile + pair / 16 * left.along;
      for (long i = 0; i < TOGETHER; i++) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(((const int*)(numbers + i * left.line))[pair % 16]);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], one, both);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], other, both);
      }
    }
    for (long i = 0; i < TOGETHER; i++)
      for (long half = 0; half < 2; half++) _mm512_store_ps(to + i * QUERIES + half * 16, sum[i][half]);
  }
}

#endif

// 2^x with a relative error of at most 1e-4, exact at integers.
__m512 exp2(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 power = _mm512_set1_ps(0.07826797f);
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.22630768f));
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.69542435f));
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1));
  return _mm512_scalef_ps(power, x);
}

}  // namespace
