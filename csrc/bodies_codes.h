// Sparse activations times a dense matrix; included by bodies.h, so there is no include guard. A row of the matrix is
// read from its first number to its last, four rows at a time, so that the hardware's prefetcher follows them.


constexpr int kTogether = 4;

STEN_INLINE vec load_row(const float* p) { return load(p); }

STEN_INLINE float number(float x) { return x; }
STEN_INLINE float number(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

// The rows are known in advance, and lie anywhere: the next ones are fetched while these are added.
template <int R, typename E>
STEN_INLINE void fetch(Table<E> table, const int32_t* row, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(E), kFirst = 2048 / sizeof(E);
  for (int r = 0; r < R; ++r)
    for (int64_t i = 0; i < n && i < kFirst; i += kLine) __builtin_prefetch(table.data + row[r] * table.ld + i, 0, 2);
}

template <int R, typename E>
STEN_INLINE void add_some(Table<E> table, const int32_t* row, const float* value, int64_t step, int64_t n,
                          float* acc) {
  const E* from[R];
  vec s[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    from[r] = table.data + row[r] * table.ld;
    s[r] = broadcast(value + r * step);
  }
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vec a = load(acc + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a = madd(s[r], load_row(from[r] + i), a);
    store(acc + i, a);
  }
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r) acc[i] += value[r * step] * number(from[r][i]);
}

template <typename E>
STEN_FN void add_rows(Table<E> table, const int32_t* row, int64_t count, const float* value, int64_t step, int64_t n,
                      float* acc) {
  int64_t e = 0;
  for (; e + kTogether <= count; e += kTogether) {
    if (e + 2 * kTogether <= count) fetch<kTogether>(table, row + e + kTogether, n);
    add_some<kTogether>(table, row + e, value + e * step, step, n, acc);
  }
  for (; e < count; ++e) add_some<1>(table, row + e, value + e * step, step, n, acc);
}

template <int R, typename E>
STEN_INLINE void dot_some(Table<E> table, const int32_t* row, const float* grad, int64_t n, float* out,
                          int64_t step) {
  const E* from[R];
  vec a[kTogether];
#pragma GCC unroll 4
  for (int r = 0; r < kTogether; ++r) {
    if (r < R) from[r] = table.data + row[r] * table.ld;
    a[r] = zero();
  }
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const vec g = load(grad + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a[r] = madd(g, load_row(from[r] + i), a[r]);
  }
  float sums[kTogether];
  sum_four(a, sums);
  for (int r = 0; r < R; ++r) {
    for (int64_t j = i; j < n; ++j) sums[r] += grad[j] * number(from[r][j]);
    out[r * step] = sums[r];
  }
}

template <typename E>
STEN_FN void dot_rows(Table<E> table, const int32_t* row, int64_t count, const float* grad, int64_t n, float* out,
                      int64_t step) {
  int64_t e = 0;
  for (; e + kTogether <= count; e += kTogether) {
    if (e + 2 * kTogether <= count) fetch<kTogether>(table, row + e + kTogether, n);
    dot_some<kTogether>(table, row + e, grad, n, out + e * step, step);
  }
  for (; e < count; ++e) dot_some<1>(table, row + e, grad, n, out + e * step, step);
}

STEN_FN void widen(const bf16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = number(from[i]);
}

STEN_FN void narrow(const float* from, int64_t n, bf16* to) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i] = static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

