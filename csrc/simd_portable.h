// Four floats in a compiler's own vector type, for any processor; the names are those of simd_avx512.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

// MSVC has neither vector types nor GCC's built-in functions; clang has both, on Windows, too.
#if defined(_MSC_VER) && !defined(__clang__)
#define STEN_NO_VECTOR_TYPES
#define STEN_INLINE __forceinline
#define __builtin_prefetch(p) ((void)(p))
#define __builtin_memcpy std::memcpy
#else
#define STEN_INLINE __attribute__((always_inline)) inline
#endif
#define STEN_FN

namespace sten::portable {

#ifdef STEN_NO_VECTOR_TYPES  // may be defined for any compiler, which tests it
struct vec {
  float lane[4];
  STEN_INLINE float& operator[](int i) { return lane[i]; }
  STEN_INLINE float operator[](int i) const { return lane[i]; }
};
STEN_INLINE vec operator+(vec a, vec b) { return vec{a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]}; }
STEN_INLINE vec operator*(vec a, vec b) { return vec{a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]}; }
#else
typedef float vec __attribute__((vector_size(16)));
#endif
constexpr int kWidth = 4;
constexpr int kRegisters = 16;

STEN_INLINE vec zero() { return vec{0.0f, 0.0f, 0.0f, 0.0f}; }
STEN_INLINE vec load(const float* p) {
  vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
STEN_INLINE vec load_row(const bf16* p) {    // of bfloat16
  const uint32_t bits[] = {static_cast<uint32_t>(p[0]) << 16, static_cast<uint32_t>(p[1]) << 16,
                           static_cast<uint32_t>(p[2]) << 16, static_cast<uint32_t>(p[3]) << 16};
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
#include "bodies_spread.h"

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

// Values of a unit in their columns.
template <bool kHalf = false>
STEN_INLINE void expand_unit(uint32_t mask, const float* values, vec* out) {
  for (int i = 0; i < 8; ++i) {
    float lanes[kWidth];
    for (float& lane : lanes) {
      lane = mask & 1 ? *values : 0.0f;
      values += mask & 1;
      mask >>= 1;
    }
    out[i] = load(lanes);
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

}  // namespace sten::portable
