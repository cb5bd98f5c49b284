// The kernels of a direct convolution, a part of bodies.h.
//
// Letters: R rows (outputs) at a time, N vectors of pixels, L partial sums.

// One phase of a row: dst[u] = row[u * step] for lo <= u < hi, else zero, for u < count. What lies below `lo` is zero
// already, and as much behind `count` is made so for the next row.
STEN_INLINE void load_pixels(const float* row, int64_t lo, int64_t hi, int64_t step, int64_t count, float* dst) {
  int64_t u = lo;
  if (step == 1) {
    for (; u + kWidth <= hi; u += kWidth) store(dst + u, load(row + u));
    if (u < hi) store(dst + u, load_first(row + u, hi - u)), u += kWidth;
  } else {
    if (step == 2)
      for (; u < hi; ++u) dst[u] = row[2 * u];
    for (; u < hi; ++u) dst[u] = row[step * u];
  }
  for (; u < count; u += kWidth) store(dst + u, keep(zero()));    // else the compiler calls memset for each row
}

STEN_FN void conv_load(const ConvShape& s, const ConvWindow& b, const float* x, int64_t channels, float* panel) {
  const int64_t step = s.stride[1], margin = b.column < 0 ? (step - 1 - b.column) / step : 0;
  for (int64_t u = 0; u < margin; u += kWidth) store(panel + u, zero());
  for (int64_t c = 0; c < channels; ++c, x += s.h * s.w)
    for (int64_t i = 0; i < s.row_phases; ++i)
      for (int64_t j = 0; j < b.phases; ++j) {
        const int64_t first = b.column + j * b.between;
        int64_t lo = first < 0 ? -first : 0, hi = first < s.w ? s.w - first : 0;
        if (step > 1) lo = (lo + step - 1) / step, hi = (hi + step - 1) / step;    // a division takes as long as a row
        hi = hi < b.pitch ? hi : b.pitch;
        lo = lo < hi ? lo : hi;
        for (int64_t t = 0; t < b.rows; ++t, panel += b.pitch) {
          const int64_t row = b.row + t * s.stride[0] + i;
          if (row >= 0 && row < s.h) load_pixels(x + row * s.w + first, lo, hi, step, b.pitch + margin, panel);
          else load_pixels(x, 0, 0, 1, b.pitch + margin, panel);
        }
      }
}

STEN_FN void conv_store(const float* sums, int64_t rows, int64_t height, int64_t columns, int64_t pitch, int64_t ls,
                        float* y, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < height; ++h)
      store_first(y + r * ld + h * columns, load(sums + r * ls + h * pitch), columns);
}

STEN_FN void conv_load_spread(const ConvShape& s, const ConvWindow& b, const float* x, int64_t channels, int64_t spread,
                              float* panel) {
  const int64_t halo = b.pitch - spread * kWidth, step = (spread + halo) * kWidth;
  const RowSpread q{b.column, s.w, spread, halo};
  for (int64_t c = 0; c < channels; ++c, x += s.h * s.w)
    for (int64_t i = 0; i < s.row_phases; ++i)
      for (int64_t t = 0; t < b.rows; ++t, panel += step) {
        const int64_t row = b.row + t * s.stride[0] + i;
        if (row >= 0 && row < s.h) q.store_row(x + row * s.w, panel);
        else for (int64_t u = 0; u < step; u += kWidth) store(panel + u, zero());
      }
}

STEN_FN void conv_join(int64_t rows, int64_t height, float* y, int64_t step, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < height; ++h) {
      float* at = y + r * ld + h * step;
      join_pairs(load(at), load(at + kWidth), at);
    }
}

// What an entry multiplies, from the place of a vector in the panel on: the offset itself, or that of its column.
template <bool kTable>
STEN_INLINE int64_t offset_of(const ConvBlock& b, const int32_t* index, int64_t e) {
  return kTable ? b.table[index[e]] : index[e];
}

template <int N>
STEN_INLINE void begin_pixels(const ConvBlock& b, int64_t row, const float* out, const int64_t* y_at, vec* a) {
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) a[v] = b.start ? broadcast(b.start + row - b.r0) : load(out + y_at[v]);
}

template <int N>
STEN_INLINE void end_pixels(const ConvBlock& b, float* out, const vec* a) {
  if (N % 2 == 0 && b.join) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < N; v += 2) join_pairs(a[v], a[v + 1], out + b.y_at[v]);
    return;
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) store(out + b.y_at[v], a[v]);
}

// Rows one by one, because no two have the same columns; all vectors of a tile together, because two may overlap, and
// what one has added to `out` must not be read by the other.
template <int N, bool kTable>
STEN_FN void conv_single(const Bands& w, const ConvBlock& b) {
  constexpr int L = N == 1 ? 8 : N == 2 ? 4 : N <= 4 ? 2 : 1;
  const float* at[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) at[v] = b.panel + b.x_at[v];
  float* out = b.out;
  for (int64_t row = b.r0; row < b.r1; ++row, out += b.ld) {
    vec a[L][N];
    begin_pixels<N>(b, row, out, b.y_at, a[0]);
#pragma GCC unroll 8
    for (int l = 1; l < L; ++l)
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) a[l][v] = zero();
    const int64_t skip = w.crow ? 0 : row * w.count;
    const int32_t* index = b.index + skip;
    const float* value = w.values + skip;
    int64_t e = b.begin[row];
    const int64_t end = b.end[row];
    for (; e + L <= end; e += L)
#pragma GCC unroll 8
      for (int l = 0; l < L; ++l) {
        const int64_t o = offset_of<kTable>(b, index, e + l);
        const vec s = broadcast(value + e + l);
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) a[l][v] = madd(s, load(at[v] + o), a[l][v]);
      }
    for (; e < end; ++e) {
      const int64_t o = offset_of<kTable>(b, index, e);
      const vec s = broadcast(value + e);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) a[0][v] = madd(s, load(at[v] + o), a[0][v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
#pragma GCC unroll 8
      for (int l = 1; l < L; ++l) a[0][v] = add(a[0][v], a[l][v]);
    }
    end_pixels<N>(b, out, a[0]);
  }
}

// The entries of a few rows: runs of columns that these rows share. What column c of a run multiplies is given by
// index[run * index_step + c], and its value in the i-th row is values[run * value_step + c * column_step + i * row_step].
struct ConvRuns {
  const int32_t* index;
  const float* values;
  int64_t runs, count;
  int64_t index_step, value_step, column_step, row_step;
};

constexpr int kSharedRows = 4;
constexpr int32_t kNextRows[kSharedRows] = {0, 1, 2, 3};

// How many vectors of pixels go with R rows.
constexpr int shared_vectors(int64_t rows) {
  return kRegisters == 32 ? (rows <= 2 ? 8 : 4) : rows == 1 ? 8 : rows == 2 ? 4 : 2;
}

// R rows, row + which[i], and N vectors from v0 on. `fresh`: the sums begin with `start`, else with what `out` holds.
template <int R, int N, bool kTable>
STEN_INLINE void conv_rows(const ConvRuns& q, const ConvBlock& b, int64_t row, const int32_t* which, bool fresh,
                           int64_t v0) {
  vec a[R][N];
  const float* at[N];
  float* out[R];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) at[v] = b.panel + b.x_at[v0 + v];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const int64_t own = row + which[r] - b.r0;
    out[r] = b.out + own * b.ld;
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) a[r][v] = fresh ? broadcast(b.start + own) : load(out[r] + b.y_at[v0 + v]);
  }
  for (int64_t run = 0; run < q.runs; ++run) {
    const int32_t* index = q.index + run * q.index_step;
    const float* value = q.values + run * q.value_step;
    for (int64_t c = 0; c < q.count; ++c, value += q.column_step) {
      const int64_t o = offset_of<kTable>(b, index, c);
      vec xs[N];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) xs[v] = keep(load(at[v] + o));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec s = broadcast(value + r * q.row_step);
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) a[r][v] = madd(s, xs[v], a[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(out[r] + b.y_at[v0 + v], a[r][v]);
}

template <int R, int N, bool kTable>
STEN_FN void conv_some(int64_t rows, int64_t vectors, const ConvRuns& q, const ConvBlock& b, int64_t row,
                       const int32_t* which, bool fresh, int64_t v0) {
  if constexpr (R > 1)
    if (rows < R) return conv_some<R - 1, shared_vectors(R - 1), kTable>(rows, vectors, q, b, row, which, fresh, v0);
  if constexpr (N > 1)
    if (vectors < N) return conv_some<R, N - 1, kTable>(rows, vectors, q, b, row, which, fresh, v0);
  conv_rows<R, N, kTable>(q, b, row, which, fresh, v0);
}

template <int N, bool kTable>
STEN_FN void conv_singles(const Bands& w, const ConvBlock& b) {
  if constexpr (N > 1)
    if (b.vectors < N) return conv_singles<N - 1, kTable>(w, b);
  conv_single<N, kTable>(w, b);
}

// Bands of several rows have one block of columns, so `out` is not read.
template <bool kTable>
STEN_FN void conv_block_t(const Bands& w, const ConvBlock& b) {
  if (w.height == 1 && w.width == 1) return conv_singles<kConvVectors, kTable>(w, b);
  for (int64_t band = b.r0 / w.height; band * w.height < b.r1; ++band) {
    const int64_t lo = band * w.height, hi = lo + w.height, r1 = hi < b.r1 ? hi : b.r1;
    for (int64_t row = lo > b.r0 ? lo : b.r0, n; row < r1; row += n) {
      n = next_rows(r1 - row, kSharedRows);
      ConvRuns q{b.index + band * w.count, w.values + row * w.count, 1, w.count, 0, 0, 1, w.count};
      if (w.crow) {
        const int64_t first = b.begin[band], size = w.height * w.width;
        q = {b.index + first * w.width, w.values + first * size + (row - lo) * w.width, b.end[band] - first, w.width,
             w.width, size, 1, w.width};
      }
      for (int64_t v = 0, some; v < b.vectors; v += some) {
        some = next_rows(b.vectors - v, shared_vectors(n));
        conv_some<kSharedRows, shared_vectors(kSharedRows), kTable>(n, some, q, b, row, kNextRows, true, v);
      }
    }
  }
}

STEN_FN void conv_block(const Bands& w, const ConvBlock& b) {
  if (b.table) return conv_block_t<true>(w, b);
  conv_block_t<false>(w, b);
}

constexpr int64_t kRunColumns = 64;    // of a pattern together

// The sums of a pattern's rows are written after a few chunks, and read again for the next pattern that has the row: the
// values are read almost in order, and what they multiply stays in the first-level cache. A few vectors at a time: of
// two that overlap, those in one call are read together, and a later one begins anew.
STEN_FN void conv_grouped(const Grouped& w, const ConvBlock& b) {
  const int64_t columns = w.columns(), chunk = w.strips * columns, most = w.g < kRunColumns ? kRunColumns / w.g : 1;
  for (int64_t v = 0, some; v < b.vectors; v += some) {
    some = next_rows(b.vectors - v, shared_vectors(w.n < kSharedRows ? w.n : kSharedRows));
    for (int64_t r = 0; r < b.r1 - b.r0; ++r)
      for (int64_t i = v; i < v + some; ++i) store(b.out + r * b.ld + b.y_at[i], broadcast(b.start + r));
    for (int64_t c = 0; c < w.chunks; c += most) {
      const int64_t runs = c + most < w.chunks ? most : w.chunks - c;
      for (int64_t strip = b.r0 / w.m; strip * w.m < b.r1; ++strip) {
        const int64_t row = strip * w.m;
        for (int64_t p = 0; p < w.patterns; ++p) {
          const int32_t* rows = w.rows + p * w.n;
          const int64_t slot = c * chunk + strip * columns + p * w.g;
          int64_t i = 0, end = w.n;
          while (i < end && row + rows[i] < b.r0) ++i;
          while (i < end && row + rows[end - 1] >= b.r1) --end;
          for (int64_t n; i < end; i += n) {
            n = next_rows(end - i, kSharedRows);
            const ConvRuns q{b.index + slot, w.values + slot * w.n + i, runs, w.g, chunk, chunk * w.n, w.n, 1};
            conv_some<kSharedRows, shared_vectors(kSharedRows), false>(n, some, q, b, row, rows + i, false, v);
          }
        }
      }
    }
  }
}
