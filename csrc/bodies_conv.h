// The kernels of a direct convolution, a part of bodies.h.
//
// Letters: R rows (outputs) of a band at a time, N vectors of pixels, L partial sums.

constexpr int kSharedVectors = kRegisters == 32 ? 4 : 2;    // with four rows that share their columns

// One phase of a row: dst[u] = row[first + u * step], zero outside of the image. May write kWidth - 1 floats beyond.
STEN_INLINE void load_pixels(const float* row, int64_t size, int64_t first, int64_t step, int64_t count, float* dst) {
  int64_t lo = first < 0 ? (step - 1 - first) / step : 0, hi = first < size ? (size - first + step - 1) / step : 0;
  hi = hi < count ? hi : count;
  lo = lo < hi ? lo : hi;
  int64_t u = 0;
  for (; u < lo; u += kWidth) store(dst + u, zero());
  row += first + lo * step;
  dst += lo;
  const int64_t n = hi - lo;
  u = 0;
  if (step == 1) {
    for (; u + kWidth <= n; u += kWidth) store(dst + u, load(row + u));
    if (u < n) store(dst + u, load_first(row + u, n - u)), u += kWidth;
  } else {
    if (step == 2)
      for (; u < n; ++u) dst[u] = row[2 * u];
    for (; u < n; ++u) dst[u] = row[step * u];
  }
  for (; u < count - lo; u += kWidth) store(dst + u, zero());
}

STEN_FN void conv_load(const ConvShape& s, const ConvWindow& b, const float* x, int64_t channels, float* panel) {
  for (int64_t c = 0; c < channels; ++c, x += s.h * s.w)
    for (int64_t i = 0; i < s.row_phases; ++i)
      for (int64_t j = 0; j < s.column_phases; ++j)
        for (int64_t t = 0; t < b.rows; ++t, panel += b.pitch) {
          const int64_t row = b.row + t * s.stride[0] + i;
          const bool inside = row >= 0 && row < s.h;
          load_pixels(inside ? x + row * s.w : x, inside ? s.w : 0, b.column + j, s.stride[1], b.pitch, panel);
        }
}

STEN_FN void conv_store(const float* sums, int64_t rows, int64_t height, int64_t columns, int64_t pitch, int64_t ls,
                        float* y, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < height; ++h)
      store_first(y + r * ld + h * columns, load(sums + r * ls + h * pitch), columns);
}

// One row, its entries from `e` on; returns the first one of the next block.
template <int N, int L>
STEN_INLINE int64_t conv_row(const Bands& w, const ConvBlock& b, int64_t row, const int32_t* col, const float* value,
                             int64_t e, int64_t end, int64_t v0) {
  vec a[L][N];
  const float* at[N];
  float* out = b.out + (row - b.r0) * b.ld;
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    at[v] = b.panel + b.x_at[v0 + v];
    a[0][v] = b.start ? broadcast(b.start + row - b.r0) : load(out + b.y_at[v0 + v]);
  }
#pragma GCC unroll 8
  for (int l = 1; l < L; ++l)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) a[l][v] = zero();
  const int32_t* offset = b.offset - b.k0;
  const int32_t k1 = static_cast<int32_t>(b.k1);
  for (; e + L <= end && col[e + L - 1] < k1; e += L)
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l) {
      const int64_t o = offset[col[e + l]];
      const vec s = broadcast(value + e + l);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) a[l][v] = madd(s, load(at[v] + o), a[l][v]);
    }
  if constexpr (L > 1)
    for (; e < end && col[e] < k1; ++e) {
      const int64_t o = offset[col[e]];
      const vec s = broadcast(value + e);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) a[0][v] = madd(s, load(at[v] + o), a[0][v]);
    }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
#pragma GCC unroll 8
    for (int l = 1; l < L; ++l) a[0][v] = add(a[0][v], a[l][v]);
    store(out + b.y_at[v0 + v], a[0][v]);
  }
  return e;
}

template <int R, int N>
STEN_INLINE int64_t conv_rows(const Bands& w, const ConvBlock& b, int64_t row, const int32_t* col, const float* value,
                              int64_t e, int64_t end, int64_t v0) {
  vec a[R][N];
  const float* at[N];
  float* out = b.out + (row - b.r0) * b.ld;
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) at[v] = b.panel + b.x_at[v0 + v];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v)
      a[r][v] = b.start ? broadcast(b.start + row - b.r0 + r) : load(out + r * b.ld + b.y_at[v0 + v]);
  const int32_t* offset = b.offset - b.k0;
  const int32_t k1 = static_cast<int32_t>(b.k1);
  const int64_t step = w.count;
  for (; e < end && col[e] < k1; ++e) {
    const int64_t o = offset[col[e]];
    vec xs[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) xs[v] = keep(load(at[v] + o));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vec s = broadcast(value + r * step + e);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) a[r][v] = madd(s, xs[v], a[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(out + r * b.ld + b.y_at[v0 + v], a[r][v]);
  return e;
}

// The rows of one piece of a band, all vectors; kernels with fewer rows and vectors for what is left.
template <int R, int N>
STEN_FN int64_t conv_some(int64_t rows, int64_t vectors, const Bands& w, const ConvBlock& b, int64_t row,
                          const int32_t* col, const float* value, int64_t e, int64_t end, int64_t v0) {
  if constexpr (R > 1)
    if (rows < R) return conv_some<R - 1, R == 2 ? kConvVectors : N>(rows, vectors, w, b, row, col, value, e, end, v0);
  if constexpr (N > 1)
    if (vectors < N) return conv_some<R, N - 1>(rows, vectors, w, b, row, col, value, e, end, v0);
  if constexpr (R > 1) return conv_rows<R, N>(w, b, row, col, value, e, end, v0);
  else return conv_row<N, N == 1 ? 8 : N == 2 ? 4 : N <= 4 ? 2 : 1>(w, b, row, col, value, e, end, v0);
}

STEN_FN void conv_block(const Bands& w, const ConvBlock& b) {
  for (int64_t band = b.r0 / w.height; band * w.height < b.r1; ++band) {
    const int64_t lo = band * w.height, hi = lo + w.height, r1 = hi < b.r1 ? hi : b.r1;
    const int32_t* col = columns_of(w, band);
    const int64_t begin = b.next[band - b.r0 / w.height], end = w.crow ? w.crow[band + 1] : w.count;
    int64_t next = begin;
    for (int64_t row = lo > b.r0 ? lo : b.r0, n; row < r1; row += n) {
      n = next_rows(r1 - row, 4);
      const float* value = w.crow ? w.values : w.values + row * w.count;
      const int64_t most = n == 1 ? kConvVectors : kSharedVectors;
      for (int64_t v = 0, some; v < b.vectors; v += some) {
        some = next_rows(b.vectors - v, static_cast<int>(most));
        next = conv_some<4, kSharedVectors>(n, some, w, b, row, col, value, begin, end, v);
      }
    }
    b.next[band - b.r0 / w.height] = static_cast<int32_t>(next);
  }
}
