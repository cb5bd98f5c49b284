// One token of GroupedNM without gathers: a chunk's activations fit in registers, and are looked up by permutations.
//
// Letters: T pairs of registers hold 32 T activations; N values a column.
#pragma once

#include "kernels.h"
#include "simd_avx512.h"

#define STEN_LOOKUP

namespace sten::avx512 {

template <int T>
STEN_INLINE vec look_up(const vec* table, __m512i index) {
  vec looked_up[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) looked_up[t] = _mm512_permutex2var_ps(table[2 * t], index, table[2 * t + 1]);
  if constexpr (T == 1) return looked_up[0];
  const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  const vec low = _mm512_mask_blend_ps(odd, looked_up[0], looked_up[1]);
  if constexpr (T == 2) return low;
  const vec high = T == 3 ? looked_up[2] : _mm512_mask_blend_ps(odd, looked_up[2], looked_up[T - 1]);
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(64)), low, high);
}

// acc[f] += value[f] * x[index[f / N]] for the 16 N values of up to 16 columns
template <int T, int N, bool kWhole>
STEN_INLINE void look_up_step(const vec* table, const __m512i* spread, const int16_t* index, const float* value,
                              int64_t columns, float* acc) {
  const __mmask16 some = first(columns);
  const __m256i narrow = kWhole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index))
                                : _mm256_maskz_loadu_epi16(some, index);
  const vec x = look_up<T>(table, _mm512_cvtepi16_epi32(narrow));
#pragma GCC unroll 4
  for (int q = 0; q < N; ++q) {
    const vec e = N == 1 ? x : _mm512_permutexvar_ps(spread[q], x);
    if constexpr (kWhole) {
      store(acc + 16 * q, madd(e, load(value + 16 * q), load(acc + 16 * q)));
    } else {
      const int64_t left = columns * N - 16 * q;
      const __mmask16 k = first(left < 0 ? 0 : left);
      const vec sum = madd(e, _mm512_maskz_loadu_ps(k, value + 16 * q), _mm512_maskz_loadu_ps(k, acc + 16 * q));
      _mm512_mask_storeu_ps(acc + 16 * q, k, sum);
    }
  }
}

template <int T, int N>
STEN_FN void look_up_strips(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, const float* x,
                            float* acc) {
  vec table[2 * T];
  __m512i spread[N];
#pragma GCC unroll 8
  for (int t = 0; t < 2 * T; ++t) table[t] = load(x + 16 * t);
#pragma GCC unroll 4
  for (int q = 0; q < N; ++q) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    spread[q] = _mm512_add_epi32(_mm512_srli_epi32(lane, N / 2), _mm512_set1_epi32(16 / N * q));    // N is 1, 2 or 4
  }
  const int64_t width = w.columns();
  for (int64_t s = strip0; s < strip1; ++s, acc += width * N) {
    const int16_t* index = w.index + (chunk * w.strips + s) * width;
    const float* value = w.values + (chunk * w.strips + s) * width * N;
    int64_t j = 0;
    for (; j + 16 <= width; j += 16)
      look_up_step<T, N, true>(table, spread, index + j, value + j * N, 16, acc + j * N);
    if (j < width) look_up_step<T, N, false>(table, spread, index + j, value + j * N, width - j, acc + j * N);
  }
}

template <int N>
STEN_FN bool look_up_n(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, const float* x, float* acc) {
  const int64_t width = w.columns();
  if (width <= 32) return look_up_strips<1, N>(w, chunk, strip0, strip1, x, acc), true;
  if (width <= 64) return look_up_strips<2, N>(w, chunk, strip0, strip1, x, acc), true;
  if (width <= 96) return look_up_strips<3, N>(w, chunk, strip0, strip1, x, acc), true;
  if (width <= 128) return look_up_strips<4, N>(w, chunk, strip0, strip1, x, acc), true;
  return false;
}

// False where the chunk is too wide or n has no kernel here; see Kernels::grouped_token.
STEN_FN inline bool lookup_token(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, const float* x,
                                 float* acc) {
  if (w.n == 1) return look_up_n<1>(w, chunk, strip0, strip1, x, acc);
  if (w.n == 2) return look_up_n<2>(w, chunk, strip0, strip1, x, acc);
  if (w.n == 4) return look_up_n<4>(w, chunk, strip0, strip1, x, acc);
  return false;
}

}  // namespace sten::avx512
