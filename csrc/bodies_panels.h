// Products of panels: CSR's blocks, and rows that share their columns (Bands). Written once over the names of bodies.h
// (float) and simd_bf16.h, each of which includes this file, so there is no include guard.
//
// Letters: R rows of a band at a time, V vectors of sums in a panel row. R is a constant inside a kernel; each kernel
// passes fewer rows on to itself with a smaller R. kTogether entries of a row are multiplied by one instruction.

#include "kernels.h"

namespace sten::STEN_ISA {

constexpr int kRows = kRegisters / 8;    // 4 x 4 or 2 x 4 accumulators in a many-token kernel
constexpr int kPairs = kTogether<elem>;

// ---- one row's sums: V registers

template <int V>
STEN_INLINE void begin_row(const float* start, int64_t row, const float* acc, vec* a) {
  constexpr int S = V * kWidth;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) a[v] = start ? broadcast(start + row) : load(acc + row * S + v * kWidth);
}

template <int V>
STEN_INLINE void end_row(int64_t row, float* acc, const vec* a) {
  constexpr int S = V * kWidth;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(acc + row * S + v * kWidth, a[v]);
}

// a += value[0] * x + value[1] * y, or with one entry left of a pair, value[0] * x
template <int V, bool kLast = false>
STEN_INLINE void add_entries(const elem* value, const elem* x, const elem* y, vec* a) {
  static constexpr elem kZeros[kMaxVectors * kWidth] = {};
  wide xs[V];
  interleave<V>(x, kLast ? kZeros : y, xs);
  const wide s = kLast ? broadcast_last(value) : broadcast_entries(value);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) a[v] = multiply_add(s, xs[v], a[v]);
}

// ---- CSR

template <int V>
STEN_FN void csr_block_v(const CsrBlockOf<elem>& block, const float* start, const elem* panel, float* acc) {
  constexpr int S = V * kWidth;
  const uint16_t* col = block.col;
  const elem* value = block.value;
  for (int64_t q = 0; q < block.groups; ++q) {
    vec a[kRows][V];
    const int32_t* row = block.row + q * kRows;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) begin_row<V>(start, row[r], acc, a[r]);
    for (int32_t i = block.count[q]; i > 0; --i, col += kRows * kPairs, value += kRows * kPairs) {
      uint64_t columns[kPairs] = {};    // few loads for all the rows: the loop is bound by loads
      __builtin_memcpy(columns, col, kRows * kPairs * sizeof(uint16_t));
      const auto at = [&](int e) { return panel + static_cast<int64_t>(columns[e / 4] >> 16 * (e % 4) & 0xffff) * S; };
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        add_entries<V>(value + r * kPairs, at(r * kPairs), at(r * kPairs + kPairs - 1), a[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) end_row<V>(row[r], acc, a[r]);
  }
}

// ---- rows that share their columns

constexpr int most_rows(int v) { return kRegisters == 32 ? (v < 4 ? 8 : 4) : v == 1 ? 8 : v < 4 ? 4 : 2; }

struct BandRows {
  int64_t band, lo, hi;    // of a band, the rows of a range
  int64_t begin, end;      // its entries
};

template <typename E>
STEN_INLINE BandRows rows_of(const BandsOf<E>& w, const BandRange& b, int64_t band) {
  const int64_t lo = band * w.height, hi = lo + w.height;
  return {band, lo > b.r0 ? lo : b.r0, hi < b.r1 ? hi : b.r1, b.begin[band], b.end[band]};
}

// How many of the `rows` left come next, so that pieces are about equal.
STEN_INLINE int64_t next_rows(int64_t rows, int most) {
  const int64_t pieces = (rows + most - 1) / most;
  return (rows + pieces - 1) / pieces;
}

// The values of row r, entry e of a band, and the distance from one row's to the next.
template <typename E>
STEN_INLINE int64_t value_at(const BandsOf<E>& w, int64_t band, int64_t r, int64_t e) {
  return w.crow ? (e * w.height + r - band * w.height) * w.width : r * w.count + e;
}
template <typename E>
STEN_INLINE int64_t row_step(const BandsOf<E>& w) {
  return w.crow ? w.width : w.count;
}
template <typename E>
STEN_INLINE const int32_t* columns_of(const BandsOf<E>& w, int64_t band) {
  return w.crow ? w.col : w.col + band * w.count;
}

// The same as add_entries for R rows, whose values are `step` apart.
template <int R, int V, bool kLast = false>
STEN_INLINE void add_columns(const elem* value, int64_t step, const elem* x, const elem* y, vec (*a)[V]) {
  static constexpr elem kZeros[kMaxVectors * kWidth] = {};
  wide xs[V];
  interleave<V>(x, kLast ? kZeros : y, xs);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) xs[v] = hold(xs[v]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const wide s = kLast ? broadcast_last(value + r * step) : broadcast_entries(value + r * step);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[r][v] = multiply_add(s, xs[v], a[r][v]);
  }
}

template <int R, int V>
STEN_FN void bands_block_rows(int64_t rows, const BandsOf<elem>& w, const BandRange& b, const BandRows& q, int64_t row,
                              const float* start, const elem* panel, float* acc) {
  if constexpr (R > 1)
    if (rows < R) return bands_block_rows<R - 1, V>(rows, w, b, q, row, start, panel, acc);
  constexpr int S = V * kWidth;
  vec a[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) begin_row<V>(start, row - b.r0 + r, acc, a[r]);
  const int32_t* col = columns_of(w, q.band);
  const int64_t step = row_step(w);
  const elem* value = w.values + value_at(w, q.band, row, q.begin);
  if (w.crow) {
    for (int64_t e = q.begin; e < q.end; ++e, value += w.height * w.width) {
      const elem* x = panel + (col[e] * w.width - b.k0) * S;
      int64_t c = 0;
      for (; c + kPairs <= w.width; c += kPairs, x += kPairs * S)
        add_columns<R, V>(value + c, step, x, x + (kPairs - 1) * S, a);
      if (c < w.width) add_columns<R, V, true>(value + c, step, x, x, a);
    }
  } else {
    const elem* from = panel - b.k0 * S;
    int64_t e = q.begin;
    for (; e + kPairs <= q.end; e += kPairs, value += kPairs)
      add_columns<R, V>(value, step, from + static_cast<int64_t>(col[e]) * S,
                        from + static_cast<int64_t>(col[e + kPairs - 1]) * S, a);
    if (e < q.end) add_columns<R, V, true>(value, step, from + static_cast<int64_t>(col[e]) * S, from, a);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) end_row<V>(row - b.r0 + r, acc, a[r]);
}

// One row alone has too few sums to hide the latency of an addition: L partial ones.
template <int V>
STEN_FN void bands_block_row(const BandsOf<elem>& w, const BandRange& b, const BandRows& q, const float* start,
                             const elem* panel, float* acc) {
  constexpr int S = V * kWidth, L = V == 1 ? 8 : V == 2 ? 4 : 2;
  vec a[L][V];
  begin_row<V>(start, q.lo - b.r0, acc, a[0]);
#pragma GCC unroll 8
  for (int l = 1; l < L; ++l)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[l][v] = zero();
  const int32_t* col = columns_of(w, q.band);
  const elem* value = w.values + (w.crow ? 0 : q.band * w.count);
  const elem* from = panel - b.k0 * S;
  const auto at = [&](int64_t e) { return from + static_cast<int64_t>(col[e]) * S; };
  int64_t e = q.begin;
  for (; e + L * kPairs <= q.end; e += L * kPairs)
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l)
      add_entries<V>(value + e + l * kPairs, at(e + l * kPairs), at(e + l * kPairs + kPairs - 1), a[l]);
  for (; e + kPairs <= q.end; e += kPairs) add_entries<V>(value + e, at(e), at(e + kPairs - 1), a[0]);
  if (e < q.end) add_entries<V, true>(value + e, at(e), at(e), a[0]);
#pragma GCC unroll 8
  for (int l = 1; l < L; ++l)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[0][v] = add(a[0][v], a[l][v]);
  end_row<V>(q.lo - b.r0, acc, a[0]);
}

template <int V>
STEN_FN void bands_block_v(const BandsOf<elem>& w, const BandRange& b, const float* start, const elem* panel,
                           float* acc) {
  constexpr int kMost = most_rows(V);
  for (int64_t band = b.r0 / w.height; band * w.height < b.r1; ++band) {
    const BandRows q = rows_of(w, b, band);
    if (q.begin == q.end && !start) continue;
    if (w.height == 1 && w.width == 1) {
      bands_block_row<V>(w, b, q, start, panel, acc);
      continue;
    }
    for (int64_t row = q.lo, n; row < q.hi; row += n) {
      n = next_rows(q.hi - row, kMost);
      bands_block_rows<kMost, V>(n, w, b, q, row, start, panel, acc);
    }
  }
}

// ---- the choice of V

STEN_FN void csr_block(const CsrBlockOf<elem>& block, const float* start, const elem* panel, int v, float* acc) {
  if (v == 1) return csr_block_v<1>(block, start, panel, acc);
  if (v == 2) return csr_block_v<2>(block, start, panel, acc);
  if (v == 3) return csr_block_v<3>(block, start, panel, acc);
  return csr_block_v<4>(block, start, panel, acc);
}

STEN_FN void bands_block(const BandsOf<elem>& w, const BandRange& b, const float* start, const elem* panel, int v,
                         float* acc) {
  if (v == 1) return bands_block_v<1>(w, b, start, panel, acc);
  if (v == 2) return bands_block_v<2>(w, b, start, panel, acc);
  if (v == 3) return bands_block_v<3>(w, b, start, panel, acc);
  return bands_block_v<4>(w, b, start, panel, acc);
}

}  // namespace sten::STEN_ISA
