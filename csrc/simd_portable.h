// Four floats in a compiler's own vector type, for any processor; the names are those of simd_avx512.h.
#pragma once

#include <cstdint>
#include <cstring>

#define STEN_FN
#define STEN_INLINE __attribute__((always_inline)) inline

namespace sten::portable {

typedef float vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kRegisters = 16;

STEN_INLINE vec zero() { return vec{0.0f, 0.0f, 0.0f, 0.0f}; }
STEN_INLINE vec load(const float* p) {
  vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
STEN_INLINE vec load_row(const uint16_t* p) {    // of bfloat16
  const uint32_t bits[] = {uint32_t{p[0]} << 16, uint32_t{p[1]} << 16, uint32_t{p[2]} << 16, uint32_t{p[3]} << 16};
  vec a;
  std::memcpy(&a, bits, sizeof a);
  return a;
}
STEN_INLINE vec load_first(const float* p, int64_t n) {
  vec a = zero();
  std::memcpy(&a, p, static_cast<size_t>(n) * sizeof(float));
  return a;
}
STEN_INLINE void store(float* p, vec a) { std::memcpy(p, &a, sizeof a); }
STEN_INLINE void store_first(float* p, vec a, int64_t n) {
  std::memcpy(p, &a, static_cast<size_t>(n) * sizeof(float));
}
STEN_INLINE vec broadcast(const float* p) { return vec{*p, *p, *p, *p}; }
STEN_INLINE vec madd(vec a, vec b, vec c) { return a * b + c; }
STEN_INLINE vec keep(vec a) { return a; }
STEN_INLINE vec add(vec a, vec b) { return a + b; }

STEN_INLINE void transpose(const float* src, int64_t ls, int rows, int cols, float* dst, int64_t ld, bool fill) {
  for (int c = 0; c < cols; ++c)
    for (int r = 0; r < (fill ? kWidth : rows); ++r) dst[c * ld + r] = r < rows ? src[r * ls + c] : 0.0f;
}

STEN_INLINE void sum_four(const vec* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
}

STEN_INLINE float dot(const float* x, const float* v, const int32_t* col, int64_t n) {
  float a[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int l = 0; l < 4; ++l) a[l] += v[i + l] * x[col[i + l]];
  for (; i < n; ++i) a[0] += v[i] * x[col[i]];
  return (a[0] + a[1]) + (a[2] + a[3]);
}

template <typename Index>
STEN_INLINE void gather(const float* x, const Index* index, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[index[i]];
}

STEN_INLINE void spread_madd(const float* x, const float* v, int n, const int32_t*, int64_t count, float* acc) {
  for (int64_t f = 0, j = 0; f < count; f += n, ++j)
    for (int i = 0; i < n; ++i) acc[f + i] += v[f + i] * x[j];
}

}  // namespace sten::portable
