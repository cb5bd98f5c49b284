// bfloat16 with AVX-512: thirty-two elements in a vector, products summed by pairs in float.
#pragma once

#include "kernels.h"
#include "simd_avx512.h"

#undef STEN_FN
#define STEN_FN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx2,fma,popcnt")))

namespace sten::avx512_bf16 {

using avx512::add;
using avx512::broadcast;
using avx512::first;
using avx512::kRegisters;
using avx512::kWidth;
using avx512::load;
using avx512::store;
using avx512::sum_four;
using avx512::vec;
using avx512::zero;
using elem = bf16;
using wide = __m512i;
constexpr int kDot = 32;

STEN_INLINE __mmask32 first_elements(int64_t n) {
  return n >= 32 ? 0xffffffff : static_cast<__mmask32>((1ull << n) - 1);
}
STEN_INLINE wide load_wide(const bf16* p) { return _mm512_loadu_si512(p); }
STEN_INLINE wide load_wide_first(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16(first_elements(n), p); }
STEN_INLINE wide sixteen(const bf16* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
STEN_INLINE void store_wide(bf16* p, wide a) { _mm512_storeu_si512(p, a); }
STEN_INLINE vec multiply_add(wide a, wide b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
STEN_INLINE wide hold(wide a) {
  __asm__("" : "+v"(a));
  return a;
}

// Values of a unit in their columns. On Zen 4 an expansion waits for the last use of its register, though it zeroes
// the other elements; the exclusive or says that it need not.
// kHalf: of at most 16 values, which lie in fewer cache lines than 32.
template <bool kHalf = false>
STEN_INLINE void expand_unit(uint32_t mask, const bf16* values, wide* out) {
  const wide v = kHalf ? sixteen(values) : load_wide(values);
  __asm__("vpxord %x0, %x0, %x0\n\tvpexpandw %1, %0%{%2%}%{z%}" : "=&v"(out[0]) : "v"(v), "Yk"(__mmask32(mask)));
}
// The elements of a unit whose bits are 1, followed by others.
STEN_INLINE void collect_unit(uint32_t mask, const bf16* from, bf16* to) {
  wide v;
  __asm__("vpxord %x0, %x0, %x0\n\tvpcompressw %1, %0%{%2%}%{z%}"
          : "=&v"(v)
          : "v"(load_wide(from)), "Yk"(__mmask32(mask)));
  store_wide(to, v);
}

STEN_INLINE vec to_float(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }

// y[i] = sums[i] + bias[i]
STEN_INLINE void store_sums(const float* sums, const bf16* bias, int64_t n, bf16* y) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 k = first(n - i);
    vec a = _mm512_maskz_loadu_ps(k, sums + i);
    if (bias) a = add(a, to_float(_mm256_maskz_loadu_epi16(k, bias + i)));
    _mm256_mask_storeu_epi16(y + i, k, (__m256i)_mm512_cvtneps_pbh(a));
  }
}

STEN_INLINE wide narrow(__m512i low, __m512i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
}

// from[c], for c below 128, or 256
STEN_INLINE wide look_up(const bf16* from, wide c, bool near) {
  const __mmask32 odd = _mm512_test_epi16_mask(c, _mm512_set1_epi16(64));
  wide a = _mm512_permutex2var_epi16(load_wide(from), c, load_wide(from + 32));
  a = _mm512_mask_mov_epi16(a, odd, _mm512_permutex2var_epi16(load_wide(from + 64), c, load_wide(from + 96)));
  if (near) return a;
  const wide d = _mm512_permutex2var_epi16(load_wide(from + 128), c, load_wide(from + 160));
  const wide e = _mm512_permutex2var_epi16(load_wide(from + 192), c, load_wide(from + 224));
  return _mm512_mask_mov_epi16(a, _mm512_test_epi16_mask(c, _mm512_set1_epi16(128)), _mm512_mask_mov_epi16(d, odd, e));
}

// out[i] = x[index[i]], indices ascending; x may be read 256 elements beyond the last of them.
STEN_INLINE void gather(const bf16* x, const int32_t* index, int64_t n, bf16* out) {
  for (int64_t i = 0; i < n; i += 32) {
    const int64_t left = n - i < 32 ? n - i : 32;
    const int32_t base = index[i], span = index[i + left - 1] - base;
    const bf16* from = x + base;
    if (span >= 256) {
      for (int64_t l = 0; l < left; ++l) out[i + l] = x[index[i + l]];
      continue;
    }
    const __mmask32 k = first_elements(left);
    const __m512i start = _mm512_set1_epi32(base);
    const __m512i low = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(first(left), index + i), start);
    const __m512i high =
        _mm512_sub_epi32(_mm512_maskz_loadu_epi32(first(left < 16 ? 0 : left - 16), index + i + 16), start);
    const wide a = look_up(from, narrow(low, high), span < 128);
    _mm512_mask_storeu_epi16(out + i, k, a);
  }
}

// sum of v[i] * x[col[i]], columns ascending; x may be read 256 elements beyond the last of them. Thirty-two that lie
// close together are selected from registers, which takes less time than loading them one by one.
STEN_INLINE float dot(const bf16* x, const bf16* v, const int32_t* col, int64_t n) {
  __m128 a[2] = {_mm_setzero_ps(), _mm_setzero_ps()};
  vec sum = zero();
  int64_t i = 0;
  for (int32_t span; i + 32 <= n && (span = col[i + 31] - col[i]) < 256; i += 32) {
    const __m512i base = _mm512_set1_epi32(col[i]);
    const wide c = narrow(_mm512_sub_epi32(_mm512_loadu_si512(col + i), base),
                          _mm512_sub_epi32(_mm512_loadu_si512(col + i + 16), base));
    sum = multiply_add(look_up(x + col[i], c, span < 96), load_wide(v + i), sum);
  }
  for (; i < n; i += 16)
#pragma GCC unroll 2
    for (int l = 0; l < 2; ++l) {
      const int64_t at = i + 8 * l, left = n - at;
      __m128i some = _mm_setzero_si128();
      if (left >= 8) {
        const auto bits = [x, c = col + at](int e) { return static_cast<int>(x[c[e]]); };
        some = _mm_insert_epi16(some, bits(0), 0);
        some = _mm_insert_epi16(some, bits(1), 1);
        some = _mm_insert_epi16(some, bits(2), 2);
        some = _mm_insert_epi16(some, bits(3), 3);
        some = _mm_insert_epi16(some, bits(4), 4);
        some = _mm_insert_epi16(some, bits(5), 5);
        some = _mm_insert_epi16(some, bits(6), 6);
        some = _mm_insert_epi16(some, bits(7), 7);
        a[l] = _mm_dpbf16_ps(a[l], (__m128bh)some, (__m128bh)_mm_loadu_si128(reinterpret_cast<const __m128i*>(v + at)));
      } else if (left > 0) {
        alignas(16) bf16 rest[8] = {};
        for (int64_t e = 0; e < left; ++e) rest[e] = x[col[at + e]];
        const __m128i values = _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << left) - 1), v + at);
        a[l] = _mm_dpbf16_ps(a[l], (__m128bh)_mm_load_si128(reinterpret_cast<const __m128i*>(rest)), (__m128bh)values);
      }
    }
  const __m128 all = _mm_add_ps(a[0], a[1]), two = _mm_add_ps(all, _mm_movehl_ps(all, all));
  return _mm512_reduce_add_ps(sum) + _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// out[i]: of each half of a byte its image in the table
STEN_INLINE void translate(const uint8_t* bytes, int64_t n, const uint8_t* table, uint8_t* out) {
  avx512::translate(bytes, n, table, out);
}

// ---- panels: each entry of a pair and its column, interleaved

STEN_INLINE wide broadcast_entries(const bf16* value) {
  int32_t pair;
  __builtin_memcpy(&pair, value, sizeof pair);
  return _mm512_set1_epi32(pair);
}
STEN_INLINE wide broadcast_last(const bf16* value) { return _mm512_set1_epi32(static_cast<uint16_t>(*value)); }

// Pairs (x[t], y[t]) of V times sixteen tokens; load_panel has put them in the order that this makes right.
template <int V>
STEN_INLINE void interleave(const bf16* x, const bf16* y, wide* out) {
#pragma GCC unroll 2
  for (int v = 0; v + 2 <= V; v += 2) {
    const wide a = load_wide(x + 16 * v), b = load_wide(y + 16 * v);
    out[v] = _mm512_unpacklo_epi16(a, b);
    out[v + 1] = _mm512_unpackhi_epi16(a, b);
  }
  if constexpr (V % 2) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i pairs = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    out[V - 1] = _mm512_permutex2var_epi16(sixteen(x + 16 * (V - 1)), pairs, sixteen(y + 16 * (V - 1)));
  }
}

// pairs[c, t] = columns 2 c and 2 c + 1 of token t, in 32 bits, for 16 tokens and 32 columns, some of which exist
STEN_INLINE void transpose_pairs(const bf16* x, int64_t ld, int64_t tokens, __mmask32 some, float* pairs) {
  alignas(64) float rows[16 * 16];
  for (int64_t t = 0; t < 16; ++t)
    store(rows + 16 * t, _mm512_castsi512_ps(t < tokens ? _mm512_maskz_loadu_epi16(some, x + t * ld) : _mm512_setzero_si512()));
  avx512::transpose(rows, 16, 16, 16, pairs, 16, true);
}

// A quarter of a vector of 32 tokens holds four of the first half and four of the second, which is how 32-bit numbers of
// two vectors are packed.
STEN_FN inline void load_panel(const bf16* x, int64_t ld, int64_t tokens, int64_t cols, int v, bf16* panel) {
  alignas(64) float pairs[2][16 * 16];
  const __m512i low = _mm512_set1_epi32(0xffff);
  for (int i = 0; i < v; i += 2) {
    const bool both = i + 1 < v;
    for (int64_t k = 0; k < cols; k += 32) {
      const __mmask32 some = first_elements(cols - k);
      transpose_pairs(x + 16 * i * ld + k, ld, tokens - 16 * i, some, pairs[0]);
      if (both) transpose_pairs(x + 16 * (i + 1) * ld + k, ld, tokens - 16 * (i + 1), some, pairs[1]);
      for (int64_t c = k; c < k + 32 && c < cols; ++c) {
        const bool odd = (c - k) % 2;
        const int64_t at = (c - k) / 2 * 16;
        const __m512i a = _mm512_castps_si512(load(pairs[0] + at)), b = _mm512_castps_si512(load(pairs[both] + at));
        const __m512i one = odd ? _mm512_srli_epi32(a, 16) : _mm512_and_si512(a, low);
        bf16* to = panel + (c * v + i) * 16;
        if (both)
          store_wide(to, _mm512_packus_epi32(one, odd ? _mm512_srli_epi32(b, 16) : _mm512_and_si512(b, low)));
        else
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(one));
      }
    }
  }
}

// y[t, r] = sums[r, t] for 16 tokens and 32 rows, rounded by two rows, whose pairs are transposed as 32 bits.
template <bool kAll>
STEN_INLINE void store_rows(const float* sums, int64_t step, int64_t rows, int64_t tokens, bf16* y, int64_t ld) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  vec a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const vec one = kAll || 2 * i < rows ? load(sums + 2 * i * step) : zero();
    const vec two = kAll || 2 * i + 1 < rows ? load(sums + (2 * i + 1) * step) : zero();
    a[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(two, one)));
  }
  avx512::transpose_vectors(a, b);
  const __mmask32 some = first_elements(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (kAll || i < tokens) _mm512_mask_storeu_epi16(y + i * ld, some, _mm512_castps_si512(b[i]));
}

STEN_FN inline void store_panel(const float* sums, int64_t rows, int64_t tokens, int v, bf16* y, int64_t ld) {
  for (int64_t r = 0; r < rows; r += 32)
    for (int64_t t = 0; t < tokens; t += 16) {
      const bool all = rows - r >= 32 && tokens - t >= 16;
      const float* from = sums + r * v * 16 + t;
      if (all) store_rows<true>(from, v * 16, 32, 16, y + t * ld + r, ld);
      else store_rows<false>(from, v * 16, rows - r, tokens - t, y + t * ld + r, ld);
    }
}

}  // namespace sten::avx512_bf16

#define STEN_ISA avx512_bf16
