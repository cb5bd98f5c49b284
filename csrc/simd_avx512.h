// Sixteen floats in a vector. Shared names of the three simd_*.h: vec, kWidth, kRows and the functions below.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#define STEN_FN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")))
#define STEN_INLINE STEN_FN __attribute__((always_inline)) inline

namespace sten::avx512 {

using vec = __m512;
constexpr int kWidth = 16;
constexpr int kRegisters = 32;

STEN_INLINE __mmask16 first(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}
STEN_INLINE vec zero() { return _mm512_setzero_ps(); }
STEN_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
STEN_INLINE vec load_row(const bf16* p) {    // of bfloat16
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
STEN_INLINE vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
STEN_INLINE void store(float* p, vec a) { _mm512_storeu_ps(p, a); }
STEN_INLINE void store_first(float* p, vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }
STEN_INLINE vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
STEN_INLINE vec madd(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
// Keeps a value in a register: the compiler would rather load it again for each use, and loads are scarcer.
STEN_INLINE vec keep(vec a) {
  __asm__("" : "+v"(a));
  return a;
}
STEN_INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }

// The vectors of a row of `size` floats in a spread panel that begins with its column `begin`: lane l of vector v is column
// begin + l * spread + v, or zero beside the row. Reading the row once, and no part of it twice, leaves the stores.
struct RowSpread {
  __mmask16 part[3];
  int64_t begin, spread, halo;
  STEN_INLINE RowSpread(int64_t from, int64_t size, int64_t s, int64_t h) : begin(from), spread(s), halo(h) {
    for (int64_t v = 0; v < 3; ++v) {
      const int64_t at = from + v * (s == 1 ? 1 : 16), skip = at < 0 ? -at : 0;
      part[v] = size <= at || skip > 15 ? 0 : first(size - at) & static_cast<__mmask16>(0xffff << skip);
    }
  }
  STEN_INLINE void store_row(const float* p, float* to) const {
    p += begin;
    if (spread == 1) {
      for (int64_t v = 0; v <= halo; ++v) store(to + 16 * v, _mm512_maskz_loadu_ps(part[v], p + v));
      return;
    }
    const __m512i one = _mm512_set1_epi32(1);
    const __m512i next = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const vec a = _mm512_maskz_loadu_ps(part[0], p), b = _mm512_maskz_loadu_ps(part[1], p + 16);
    const vec c = _mm512_maskz_loadu_ps(part[2], p + 32);
    const vec v0 = _mm512_permutex2var_ps(a, even, b), v1 = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, one), b);
    store(to, v0);
    store(to + 16, v1);
    store(to + 32, _mm512_permutex2var_ps(v0, next, c));
    if (halo == 2) store(to + 48, _mm512_permutex2var_ps(v1, _mm512_mask_add_epi32(next, 0x8000, next, one), c));
  }
};
// two vectors in turn
STEN_INLINE void join_pairs(vec even, vec odd, float* p) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store(p, _mm512_permutex2var_ps(even, low, odd));
  store(p + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}

// b[c][r] = a[r][c] of 16 x 16; a is used up
STEN_INLINE void transpose_vectors(vec* a, vec* b) {
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d p = _mm512_castps_pd(b[i]), q = _mm512_castps_pd(b[i + 1]);
    const __m512d r = _mm512_castps_pd(b[i + 2]), s = _mm512_castps_pd(b[i + 3]);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {   // a[4 i + j] holds column 4 l + j of rows 4 i to 4 i + 3 in its 128-bit lane l
    const vec lo = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), hi = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const vec lo2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const vec hi2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    b[j] = _mm512_shuffle_f32x4(lo, lo2, 0x88);
    b[8 + j] = _mm512_shuffle_f32x4(lo, lo2, 0xdd);
    b[4 + j] = _mm512_shuffle_f32x4(hi, hi2, 0x88);
    b[12 + j] = _mm512_shuffle_f32x4(hi, hi2, 0xdd);
  }
}

// dst[c, r] = src[r, c] for r < rows, c < cols; lanes r >= rows are written as zero when `fill`, else left alone
STEN_INLINE void transpose(const float* src, int64_t ls, int rows, int cols, float* dst, int64_t ld, bool fill) {
  const __mmask16 mc = first(cols), mr = fill ? first(16) : first(rows);
  vec a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_maskz_loadu_ps(mc, src + i * ls) : zero();
  transpose_vectors(a, b);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i < cols) _mm512_mask_storeu_ps(dst + i * ld, mr, b[i]);
}

// out[i] = the sum of a[i], for four vectors
STEN_INLINE void sum_four(const vec* a, float* out) {
  const vec ab = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const vec cd = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  const vec all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
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

// out[i] = x[index[i]]
STEN_INLINE void gather(const float* x, const int16_t* index, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 k = first(n - i);
    const __m512i c = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(k, index + i));
    _mm512_mask_storeu_ps(out + i, k, _mm512_mask_i32gather_ps(zero(), k, c, x, 4));
  }
}

// The same for ascending indices; x may be read 128 floats beyond the last of them. Sixteen that lie close together are
// selected from registers: a gather takes longer than four permutations, and than sixteen scalar loads.
STEN_INLINE void gather(const float* x, const int32_t* index, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const int32_t base = index[i], span = index[i + 15] - base;
    const float* from = x + base;
    if (span < 128) {
      const __m512i c = _mm512_sub_epi32(_mm512_loadu_si512(index + i), _mm512_set1_epi32(base));
      vec a = _mm512_permutex2var_ps(load(from), c, load(from + 16));
      if (span >= 32) {
        const vec b = _mm512_permutex2var_ps(load(from + 32), c, load(from + 48));
        a = _mm512_mask_mov_ps(a, _mm512_test_epi32_mask(c, _mm512_set1_epi32(32)), b);
      }
      if (span >= 64) {
        const vec b = _mm512_permutex2var_ps(load(from + 64), c, load(from + 80));
        const vec d = _mm512_permutex2var_ps(load(from + 96), c, load(from + 112));
        const vec e = _mm512_mask_mov_ps(b, _mm512_test_epi32_mask(c, _mm512_set1_epi32(32)), d);
        a = _mm512_mask_mov_ps(a, _mm512_test_epi32_mask(c, _mm512_set1_epi32(64)), e);
      }
      store(out + i, a);
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) out[i + l] = x[index[i + l]];
    }
  }
  for (; i < n; ++i) out[i] = x[index[i]];
}

// acc[f] += v[f] * x[f / n] for f < count; spread is described in kernels.h
STEN_INLINE void spread_madd(const float* x, const float* v, int n, const int32_t* spread, int64_t count, float* acc) {
  int64_t base = 0;
  int phase = 0;
  const int whole = 16 / n, rest = 16 % n;
  for (int64_t f = 0; f < count; f += 16) {
    const __mmask16 k = first(count - f);
    const vec e = _mm512_permutexvar_ps(_mm512_loadu_si512(spread + 16 * phase), load(x + base));
    const vec a = _mm512_maskz_loadu_ps(k, acc + f);
    _mm512_mask_storeu_ps(acc + f, k, madd(e, _mm512_maskz_loadu_ps(k, v + f), a));
    base += whole;
    phase += rest;
    if (phase >= n) {
      phase -= n;
      ++base;
    }
  }
}

// Values of a unit in their columns. On Zen 4 an expansion waits for the last use of its register, though it zeroes
// the other elements; the exclusive or says that it need not.
template <bool kHalf = false>
STEN_INLINE void expand_unit(uint32_t mask, const float* values, vec* out) {
  const uint32_t low = mask & 0xffff, high = mask >> 16;
  const vec v = load(values), w = load(values + __builtin_popcount(low));
  __asm__("vpxord %x0, %x0, %x0\n\tvexpandps %1, %0%{%2%}%{z%}" : "=&v"(out[0]) : "v"(v), "Yk"(__mmask16(low)));
  __asm__("vpxord %x0, %x0, %x0\n\tvexpandps %1, %0%{%2%}%{z%}" : "=&v"(out[1]) : "v"(w), "Yk"(__mmask16(high)));
}

// The elements of a unit whose bits are 1, followed by others.
STEN_INLINE void collect_unit(uint32_t mask, const float* from, float* to) {
  const uint32_t low = mask & 0xffff, high = mask >> 16;
  store(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(low), load(from)));
  store(to + __builtin_popcount(low), _mm512_maskz_compress_ps(static_cast<__mmask16>(high), load(from + 16)));
}

// out[i]: of each half of a byte its image in the table, (16,). Up to 63 more are written: the words of a masked store
// could not be read before it has reached the cache.
STEN_INLINE void translate(const uint8_t* bytes, int64_t n, const uint8_t* table, uint8_t* out) {
  const __m512i images = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  const __m512i half = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 k = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
    const __m512i b = _mm512_maskz_loadu_epi8(k, bytes + i);
    const __m512i low = _mm512_shuffle_epi8(images, _mm512_and_si512(b, half));
    const __m512i high = _mm512_shuffle_epi8(images, _mm512_and_si512(_mm512_srli_epi16(b, 4), half));
    _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi16(high, 4)));
  }
}

}  // namespace sten::avx512
