// What simd_avx512.h has for spread panels, in plain loops: simd_avx2.h and simd_portable.h include this file within their
// namespaces, so there is no include guard. Panels are spread by AVX-512 only.
struct RowSpread {
  int64_t begin, size, spread, halo;
  STEN_INLINE void store_row(const float* p, float* to) const {
    for (int64_t i = 0; i < (spread + halo) * kWidth; ++i) {
      const int64_t c = begin + i % kWidth * spread + i / kWidth;
      to[i] = c >= 0 && c < size ? p[c] : 0.0f;
    }
  }
};
// two vectors in turn
STEN_INLINE void join_pairs(vec even, vec odd, float* p) {
  float pair[2][kWidth];
  store(pair[0], even), store(pair[1], odd);
  for (int i = 0; i < 2 * kWidth; ++i) p[i] = pair[i % 2][i / 2];
}
