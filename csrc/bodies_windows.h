// Products of single entries by groups within a window of activations, whose registers are permuted (AVX-512, bfloat16).

#include "kernels.h"

namespace sten::STEN_ISA {

// from[offset], for offsets below kWindow; zero for those that are not in `some`, whose offset is zero
STEN_INLINE wide select(const bf16* from, wide offset, __mmask32 some) {
  const __mmask32 second = _mm512_test_epi16_mask(offset, _mm512_set1_epi16(64));
  const __mmask32 upper = _mm512_test_epi16_mask(offset, _mm512_set1_epi16(128));
  const wide a = _mm512_maskz_permutex2var_epi16(some, load_wide(from), offset, load_wide(from + 32));
  const wide b = _mm512_permutex2var_epi16(load_wide(from + 64), offset, load_wide(from + 96));
  const wide c = _mm512_permutex2var_epi16(load_wide(from + 128), offset, load_wide(from + 160));
  const wide d = _mm512_permutex2var_epi16(load_wide(from + 192), offset, load_wide(from + 224));
  return _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(a, second, b), upper, _mm512_mask_mov_epi16(c, second, d));
}

template <int T>
STEN_FN void window_rows(const WindowsOf<elem>& w, int64_t row, int64_t rows, const elem* x, int64_t ld, float* sums) {
  constexpr int kAheadGroups = 64;
  vec all[T][4];
  for (int64_t r = 0; r < rows; ++r) {
    const elem* values = w.values + w.crow[row + r];
    vec a[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) a[t] = zero();
    for (int64_t g = w.first[row + r]; g < w.first[row + r + 1]; ++g) {
      const uint32_t count = w.head[g] & 63, base = w.head[g] >> 6 << 5;
      const __mmask32 some = first_elements(count);
      __builtin_prefetch(w.offset + (g + kAheadGroups) * kGroup);
      __builtin_prefetch(values + kAheadGroups * kGroup);
      const wide v = _mm512_maskz_loadu_epi16(some, values);
      const wide offset =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.offset + g * kGroup)));
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) a[t] = multiply_add(v, select(x + t * ld + base, offset, some), a[t]);
      values += count;
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) all[t][r % 4] = a[t];
    if (r % 4 < 3 && r + 1 < rows) continue;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      for (int64_t l = r % 4 + 1; l < 4; ++l) all[t][l] = zero();
      sum_four(all[t], sums + t * kSumRows + r / 4 * 4);
    }
  }
}

STEN_FN void windows_dots(const WindowsOf<elem>& w, const elem* bias, int64_t r0, int64_t r1, const elem* x, int64_t ld,
                          int64_t tokens, elem* y) {
  constexpr decltype(&window_rows<1>) some_tokens[] = {window_rows<1>, window_rows<2>, window_rows<3>, window_rows<4>};
  float sums[4 * kSumRows];
  for (int64_t row = r0; row < r1; row += kSumRows) {
    const int64_t rows = r1 - row < kSumRows ? r1 - row : kSumRows;
    for (int64_t t = 0, some; t < tokens; t += some) {
      some = tokens - t < 4 ? tokens - t : 4;
      some_tokens[some - 1](w, row, rows, x + t * ld, ld, sums);
      store_all(sums, bias, row, rows, some, w.rows, y + t * w.rows);
    }
  }
}

}  // namespace sten::STEN_ISA
