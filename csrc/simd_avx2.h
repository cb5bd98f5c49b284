// Eight floats in a vector; the names are those of simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#define STEN_FN __attribute__((target("avx2,fma,popcnt")))
#define STEN_INLINE STEN_FN __attribute__((always_inline)) inline

namespace sten::avx2 {

using vec = __m256;
constexpr int kWidth = 8;
constexpr int kRegisters = 16;

STEN_INLINE vec zero() { return _mm256_setzero_ps(); }
STEN_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
STEN_INLINE vec load_row(const bf16* p) {    // of bfloat16
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
STEN_INLINE vec load_first(const float* p, int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
}
STEN_INLINE void store(float* p, vec a) { _mm256_storeu_ps(p, a); }
STEN_INLINE void store_first(float* p, vec a, int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane), a);
}
STEN_INLINE vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
STEN_INLINE vec madd(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
// Keeps a value in a register: the compiler would rather load it again for each use, and loads are scarcer.
STEN_INLINE vec keep(vec a) {
  __asm__("" : "+x"(a));
  return a;
}
STEN_INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
#include "bodies_spread.h"

STEN_INLINE void transpose(const float* src, int64_t ls, int rows, int cols, float* dst, int64_t ld, bool fill) {
  if (rows < 8 || cols < 8) {
    for (int c = 0; c < cols; ++c)
      for (int r = 0; r < (fill ? 8 : rows); ++r) dst[c * ld + r] = r < rows ? src[r * ls + c] : 0.0f;
    return;
  }
  vec a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load(src + i * ls);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(dst + j * ld, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    store(dst + (4 + j) * ld, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}

STEN_INLINE void sum_four(const vec* a, float* out) {
  const vec all = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

STEN_INLINE __m128 four(const float* x, const int32_t* col) {
  const __m128 a = _mm_insert_ps(_mm_load_ss(x + col[0]), _mm_load_ss(x + col[1]), 0x10);
  return _mm_insert_ps(_mm_insert_ps(a, _mm_load_ss(x + col[2]), 0x20), _mm_load_ss(x + col[3]), 0x30);
}

// sum of v[i] * x[col[i]]. Four numbers are loaded into a vector one by one: a gather instruction takes longer.
STEN_INLINE float dot(const float* x, const float* v, const int32_t* col, int64_t n) {
  __m128 a[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) a[l] = _mm_fmadd_ps(_mm_loadu_ps(v + i + 4 * l), four(x, col + i + 4 * l), a[l]);
  for (; i + 4 <= n; i += 4) a[0] = _mm_fmadd_ps(_mm_loadu_ps(v + i), four(x, col + i), a[0]);
  const __m128 all = _mm_add_ps(_mm_add_ps(a[0], a[1]), _mm_add_ps(a[2], a[3]));
  const __m128 two = _mm_add_ps(all, _mm_movehl_ps(all, all));
  float sum = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  for (; i < n; ++i) sum = __builtin_fmaf(v[i], x[col[i]], sum);
  return sum;
}

STEN_INLINE void gather(const float* x, const int16_t* index, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index + i));
    store(out + i, _mm256_i32gather_ps(x, _mm256_cvtepi16_epi32(c), 4));
  }
  for (; i < n; ++i) out[i] = x[index[i]];
}

STEN_INLINE void gather(const float* x, const int32_t* index, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[index[i]];
}

STEN_INLINE void spread_madd(const float* x, const float* v, int n, const int32_t* spread, int64_t count, float* acc) {
  int64_t base = 0, f = 0;
  int phase = 0;
  const int whole = 8 / n, rest = 8 % n;
  for (; f + 8 <= count; f += 8) {
    const __m256i lane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(spread + 8 * phase));
    const vec e = _mm256_permutevar8x32_ps(load(x + base), lane);
    store(acc + f, madd(e, load(v + f), load(acc + f)));
    base += whole;
    phase += rest;
    if (phase >= n) {
      phase -= n;
      ++base;
    }
  }
  for (; f < count; ++f) acc[f] += v[f] * x[f / n];
}

// of a byte, for each of its bits that is 1, with the sign bit set: how many bits before it are
struct Places {
  alignas(32) int32_t of[256][8];
};
constexpr Places make_places() {
  Places p{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0, before = 0; bit < 8; ++bit)
      if (byte >> bit & 1) p.of[byte][bit] = before++ | INT32_MIN;
  return p;
}
inline constexpr Places kPlaces = make_places();

// Values of a unit in their columns: a permutation, and zero where the sign bit is not set.
template <bool kHalf = false>
STEN_INLINE void expand_unit(uint32_t mask, const float* values, vec* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = mask >> 8 * i & 255;
    const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlaces.of[byte]));
    out[i] = _mm256_blendv_ps(zero(), _mm256_permutevar8x32_ps(load(values), place), _mm256_castsi256_ps(place));
    values += __builtin_popcount(byte);
  }
}

// The elements of a unit whose bits are 1, followed by others.
STEN_INLINE void collect_unit(uint32_t mask, const float* from, float* to) {
  for (int i = 0; i < 32; ++i) {
    *to = from[i];
    to += mask >> i & 1;
  }
}

// out[i]: of each half of a byte its image in the table, (16,)
STEN_INLINE void translate(const uint8_t* bytes, int64_t n, const uint8_t* table, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(table[bytes[i] & 15] | table[bytes[i] >> 4] << 4);
}

}  // namespace sten::avx2
