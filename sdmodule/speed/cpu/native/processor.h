// What the files of this folder share: tiles of bfloat16, the unit that multiplies them, powers of two.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "this processor multiplies no bfloat16 in AVX-512"
#endif

namespace {

using bfloat16 = std::uint16_t;

// A row of a tile: 32 numbers along what is summed over, or 16 queries' pairs of them.
struct alignas(64) Line {
  bfloat16 numbers[32];
};

constexpr long TILE = 16;  // lines

__mmask16 first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

// In bytes, where each of 16 tokens begins.
__m512i every(long stride) {
  const __m512i counted = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mullo_epi32(counted, _mm512_set1_epi32(int(stride * sizeof(bfloat16))));
}

#ifdef __AMX_BF16__

// The registers of a matrix unit, as they are needed here, and as they were before.
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

  // Whether the system gives them to this process.
  static bool allowed() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

 private:
  struct alignas(64) Configuration {
    std::uint8_t palette, start, reserved[14];
    std::uint16_t bytes[16];
    std::uint8_t rows[16];
  };

  // Not by the compiler's own function: GCC 12.2 takes it to read the first 8 bytes alone, and may leave out the others.
  static void load(const Configuration& configuration) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }

  Configuration before;
};

#else

struct Unit {
  static bool allowed() { return true; }
};

#endif

// Two to the power of x, a ten thousandth of it off at most and right at whole numbers.
__m512 exp2(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 power = _mm512_set1_ps(0.07826797f);
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.22630768f));
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.69542435f));
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1));
  return _mm512_scalef_ps(power, x);
}

}  // namespace
