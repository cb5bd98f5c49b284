// The gradients of rows that share their columns (Bands), a part of bodies.h.
//
// Letters: R rows of a band at a time, V vectors of tokens in a panel row, C columns at a time. R is a constant inside
// a kernel; each kernel passes fewer rows on to itself with a smaller R.

// ---- panels: the gradient of x

template <int R, int V>
STEN_INLINE void spread_column(const float* value, int64_t step, const vec (*g)[V], float* acc) {
  vec a[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) a[v] = load(acc + v * kWidth);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vec s = broadcast(value + r * step);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[v] = madd(s, g[r][v], a[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(acc + v * kWidth, a[v]);
}

template <int R, int V>
STEN_FN void bands_input_rows(int64_t rows, const Bands& w, const BandRange& b, const BandRows& q, int64_t row,
                              const float* grad, float* acc) {
  if constexpr (R > 1)
    if (rows < R) return bands_input_rows<R - 1, V>(rows, w, b, q, row, grad, acc);
  constexpr int S = V * kWidth;
  vec g[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) g[r][v] = keep(load(grad + (row - b.r0 + r) * S + v * kWidth));
  const int32_t* col = columns_of(w, q.band);
  const int64_t step = row_step(w);
  const float* value = w.values + value_at(w, q.band, row, q.begin);
  if (w.crow) {
    for (int64_t e = q.begin; e < q.end; ++e, value += w.height * w.width) {
      float* to = acc + (col[e] * w.width - b.k0) * S;
      for (int64_t c = 0; c < w.width; ++c, to += S) spread_column<R, V>(value + c, step, g, to);
    }
  } else {
    for (int64_t e = q.begin; e < q.end; ++e, ++value) spread_column<R, V>(value, step, g, acc + (col[e] - b.k0) * S);
  }
}

template <int V>
STEN_FN void bands_input_v(const Bands& w, const BandRange& b, const float* grad, float* acc) {
  constexpr int kMost = most_rows(V);
  for (int64_t band = b.r0 / w.height; band * w.height < b.r1; ++band) {
    const BandRows q = rows_of(w, b, band);
    if (q.begin == q.end) continue;
    for (int64_t row = q.lo, n; row < q.hi; row += n) {
      n = next_rows(q.hi - row, kMost);
      bands_input_rows<kMost, V>(n, w, b, q, row, grad, acc);
    }
  }
}

// ---- long panels: the gradient of the values

constexpr int kGradientRows = kRegisters == 32 ? 4 : 2;

// out[r, c] += dot(grad[r], x[c]) for R rows and C columns; S floats are a row of either panel; steps of rows, columns
template <int R, int C>
STEN_FN inline void add_dots(const float* const* grad, int64_t grad_step, const float* const* x, int64_t x_step,
                             int64_t pieces, int64_t S, float* out, int64_t step, int64_t column_step) {
  constexpr int kSums = (R * C + 3) / 4 * 4;
  vec a[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) a[i] = zero();
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t t = 0; t < S; t += kWidth) {
      vec xs[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) xs[c] = keep(load(x[c] + piece * x_step + t));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec g = keep(load(grad[r] + piece * grad_step + t));
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) a[r * C + c] = madd(g, xs[c], a[r * C + c]);
      }
    }
  float sums[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += 4) sum_four(a + i, sums + i);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * step + c * column_step] += sums[r * C + c];
}

template <int R>
STEN_FN void bands_values_rows(int64_t rows, const Bands& w, const BandRange& b, const BandRows& q, int64_t row,
                               LongPanel grad, LongPanel x, int64_t pieces, int64_t S, float* out) {
  if constexpr (R > 1)
    if (rows < R) return bands_values_rows<R - 1>(rows, w, b, q, row, grad, x, pieces, S, out);
  const int32_t* col = columns_of(w, q.band);
  const bool list = !w.crow || (w.width == 1 && w.height == 1);
  const int64_t step = row_step(w), width = list ? 1 : w.width, count = (q.end - q.begin) * width;
  const float* rows_of_grad[R];
  for (int r = 0; r < R; ++r) rows_of_grad[r] = grad.data + (row - b.r0 + r) * S;
  for (int64_t i = 0, n; i < count; i += n) {
    const int64_t e = q.begin + i / width, c = i % width, left = list ? count - i : width - c;
    float* to = out + value_at(w, q.band, row, e) + c;
    const float* from[4];
    n = left < 4 ? 1 : 4;
    for (int64_t j = 0; j < n; ++j)
      from[j] = x.data + (list ? static_cast<int64_t>(col[e + j]) : col[e] * width + c + j) * S;
    const auto add = n == 4 ? add_dots<R, 4> : add_dots<R, 1>;
    add(rows_of_grad, grad.step, from, x.step, pieces, S, to, step, 1);
  }
}

STEN_FN void bands_values(const Bands& w, const BandRange& b, LongPanel grad, LongPanel x, int64_t pieces, int v,
                          float* out) {
  for (int64_t band = b.r0 / w.height; band * w.height < b.r1; ++band) {
    const BandRows q = rows_of(w, b, band);
    for (int64_t row = q.lo, n; row < q.hi; row += n) {
      n = next_rows(q.hi - row, kGradientRows);
      bands_values_rows<kGradientRows>(n, w, b, q, row, grad, x, pieces, static_cast<int64_t>(v) * kWidth, out);
    }
  }
}

// ---- few tokens: the gradient of the values, vectors along the columns

constexpr int64_t kGradRow = 8;    // rows of a band at a time, and floats in a row of `grads`

template <int R>
STEN_INLINE void add_outer(const float* grads, const float* x, int64_t ld, int64_t tokens, int64_t count, float* out,
                           int64_t step) {
  for (int64_t j = 0; j < count; j += kWidth) {
    const int64_t left = count - j < kWidth ? count - j : kWidth;
    vec a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load_first(out + r * step + j, left);
    for (int64_t t = 0; t < tokens; ++t) {
      const vec xs = load_first(x + t * ld + j, left);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) a[r] = madd(broadcast(grads + t * kGradRow + r), xs, a[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store_first(out + r * step + j, a[r], left);
  }
}

template <int R>
STEN_FN void bands_values_few_rows(int64_t rows, const Bands& w, const BandRows& q, int64_t row, const float* grads,
                                   const float* x, int64_t ld, int64_t tokens, float* out) {
  if constexpr (R > 1)
    if (rows < R) return bands_values_few_rows<R - 1>(rows, w, q, row, grads, x, ld, tokens, out);
  if (w.crow) {
    for (int64_t e = q.begin; e < q.end; ++e)
      add_outer<R>(grads, x + w.col[e] * w.width, ld, tokens, w.width, out + value_at(w, q.band, row, e), w.width);
  } else {
    add_outer<R>(grads, x, ld, tokens, w.count, out + value_at(w, q.band, row, 0), w.count);
  }
}

STEN_FN void bands_values_few(const Bands& w, int64_t r0, int64_t r1, const float* grad, const float* x, int64_t ld,
                              int64_t tokens, float* scratch, float* out) {
  const int64_t gathered_ld = w.count + kTokenPadding - kGradRow;
  float* grads = scratch + tokens * gathered_ld;
  for (int64_t band = r0 / w.height; band * w.height < r1; ++band) {
    const int64_t lo = band * w.height, hi = lo + w.height;
    const BandRows q{band, lo > r0 ? lo : r0, hi < r1 ? hi : r1, w.crow ? w.crow[band] : 0,
                     w.crow ? w.crow[band + 1] : w.count};
    if (q.begin == q.end) continue;
    if (!w.crow)
      for (int64_t t = 0; t < tokens; ++t) gather(x + t * ld, w.col + band * w.count, w.count, scratch + t * gathered_ld);
    for (int64_t row = q.lo, n; row < q.hi; row += n) {
      n = next_rows(q.hi - row, kGradRow);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < n; ++r) grads[t * kGradRow + r] = grad[t * w.rows + row + r];
      bands_values_few_rows<kGradRow>(n, w, q, row, grads, w.crow ? x : scratch, w.crow ? ld : gathered_ld, tokens, out);
    }
  }
}

// ---- the choice of V

STEN_FN void bands_input(const Bands& w, const BandRange& b, const float* grad, int v, float* acc) {
  if (v == 1) return bands_input_v<1>(w, b, grad, acc);
  if (v == 2) return bands_input_v<2>(w, b, grad, acc);
  if (v == 3) return bands_input_v<3>(w, b, grad, acc);
  return bands_input_v<4>(w, b, grad, acc);
}
