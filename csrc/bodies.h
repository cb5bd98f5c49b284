// The kernels, written once over the names of simd_*.h. Each isa_*.cpp defines STEN_ISA, includes its simd_*.h and then
// this file, so there is no include guard. Every function carries STEN_FN: nothing here may be shared between the
// instruction sets, and nothing but <cstdint> and the intrinsics may be called.
//
// Letters: V vectors of tokens in a panel row, R weight rows at a time, S = V * kWidth floats in a panel row.

#include "kernels.h"

namespace sten::STEN_ISA {

// ---- the names of bodies_panels.h and bodies_dots.h for float

using elem = float;
using wide = vec;
constexpr int kDot = kWidth;
STEN_INLINE wide load_wide(const float* p) { return load(p); }
STEN_INLINE wide load_wide_first(const float* p, int64_t n) { return load_first(p, n); }
STEN_INLINE void store_wide(float* p, wide a) { store(p, a); }
STEN_INLINE vec multiply_add(wide a, wide b, vec c) { return madd(a, b, c); }
STEN_INLINE wide hold(wide a) { return keep(a); }
STEN_INLINE void store_sums(const float* sums, const float* bias, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = bias ? sums[i] + bias[i] : sums[i];
}
STEN_INLINE wide broadcast_entries(const float* value) { return broadcast(value); }
STEN_INLINE wide broadcast_last(const float* value) { return broadcast(value); }
template <int V>
STEN_INLINE void interleave(const float* x, const float*, wide* out) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) out[v] = load(x + v * kWidth);
}

}  // namespace sten::STEN_ISA

#include "bodies_panels.h"

namespace sten::STEN_ISA {

constexpr int kMaxRows = kRegisters == 32 ? 6 : 3;           // rows of a pattern that fit with four vectors each

// ---- panels

STEN_INLINE int at_most_width(int64_t n) { return n <= 0 ? 0 : n < kWidth ? static_cast<int>(n) : kWidth; }

// One vector of tokens at a time, along all columns: with all the tokens of a panel in turn, 64 pages are in use at
// once, and rows whose length is a multiple of 4 KB map to one cache set: two to three times slower at 3072 columns.
template <int V>
STEN_FN void load_panel_v(const float* x, int64_t ld, int64_t tokens, int64_t cols, float* panel) {
  constexpr int S = V * kWidth;
  for (int v = 0; v < V; ++v) {
    const int r = at_most_width(tokens - v * kWidth);
    const float* from = r ? x + v * kWidth * ld : x;
    for (int64_t k = 0; k < cols; k += kWidth) {
      transpose(from + k, ld, r, at_most_width(cols - k), panel + k * S + v * kWidth, S, true);
    }
  }
}

template <int V>
STEN_FN void store_panel_v(const float* panel, int64_t rows, int64_t tokens, float* y, int64_t ld) {
  constexpr int S = V * kWidth;
  for (int64_t t = 0; t < tokens; t += kWidth)
    for (int64_t r = 0; r < rows; r += kWidth)
      transpose(panel + r * S + t, S, at_most_width(rows - r), at_most_width(tokens - t), y + t * ld + r, ld, false);
}

// Weights are read in pieces of a few hundred bytes with a jump after each, which the hardware prefetcher handles
// badly. Two kilobytes ahead is far enough for the third-level cache.
template <typename T>
STEN_INLINE void prefetch(const T* p, int64_t count) {
  constexpr int64_t kAhead = 512, kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + kAhead + i);
}

template <int V>
STEN_INLINE void add_scaled(const float* x, vec value, vec* a) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) a[v] = madd(value, load(x + v * kWidth), a[v]);
}

// ---- CSR

// Row by row, from the stored format; C independent sums hide the latency of an addition.
template <int V>
STEN_FN void csr_rows_v(const Csr& w, const float* bias, int64_t r0, int64_t r1, const float* panel, float* out) {
  constexpr int S = V * kWidth, C = V == 1 ? 8 : V == 2 ? 4 : 2;
  for (int64_t r = r0; r < r1; ++r, out += S) {
    vec a[C][V];
    int64_t i = w.crow[r];
    const int64_t end = w.crow[r + 1];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) a[c][v] = c == 0 && bias ? broadcast(bias + r) : zero();
    for (; i + C <= end; i += C) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const float* x_row = panel + static_cast<int64_t>(w.col[i + c]) * S;
        const vec s = broadcast(w.values + i + c);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) a[c][v] = madd(s, load(x_row + v * kWidth), a[c][v]);
      }
    }
    for (; i < end; ++i) {
      const float* x_row = panel + static_cast<int64_t>(w.col[i]) * S;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) a[0][v] = madd(broadcast(w.values + i), load(x_row + v * kWidth), a[0][v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
      for (int c = 1; c < C; ++c) a[0][v] = add(a[0][v], a[c][v]);
      store(out + v * kWidth, a[0][v]);
    }
  }
}

STEN_FN void csr_token(const Csr& w, const float* bias, int64_t r0, int64_t r1, const float* x, float* y) {
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t i = w.crow[r];
    y[r] = dot(x, w.values + i, w.col + i, w.crow[r + 1] - i) + (bias ? bias[r] : 0.0f);
  }
}

// ---- GroupedNM

// n = 1: pattern p is row p, so that a chunk has one list of columns per row; G columns, or g when G is 0.
template <int R, int V, int G>
STEN_INLINE void lists(const Grouped& w, const GroupedBlock& b, int64_t list, const float* panel, vec (*a)[V]) {
  constexpr int S = V * kWidth;
  const int64_t step = w.strips * w.columns(), g = G ? G : w.g;
  for (int64_t c = b.c0; c < b.c1; ++c, panel += w.columns() * S) {
    const int16_t* index = w.index + c * step + list * g;
    const float* value = w.values + c * step + list * g;
    prefetch(value, R * g);
    prefetch(index, R * g);
    int64_t j = 0;
    for (; j + 4 <= g; j += 4) {
      uint64_t columns[R];    // one load for four columns: the loop is bound by loads
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_memcpy(&columns[r], index + r * g + j, 4 * sizeof(int16_t));
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          add_scaled<V>(panel + static_cast<int64_t>(columns[r] >> 16 * u & 0xffff) * S,
                      broadcast(value + r * g + j + u), a[r]);
    }
    for (; j < g; ++j)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        add_scaled<V>(panel + static_cast<int64_t>(index[r * g + j]) * S, broadcast(value + r * g + j), a[r]);
  }
}

template <int R, int V, int G>
STEN_INLINE void list_rows(const Grouped& w, const GroupedBlock& b, const float* start, int64_t row,
                           const float* panel, float* acc) {
  vec a[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) begin_row<V>(start, row + r, acc, a[r]);
  lists<R, V, G>(w, b, b.strip0 * w.m + row, panel, a);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) end_row<V>(row + r, acc, a[r]);
}

template <int V, int G>
STEN_FN void grouped_lists(const Grouped& w, const GroupedBlock& b, const float* start, const float* panel,
                           float* acc) {
  constexpr int R = V == 1 ? 2 * kRows : kRows;
  const int64_t rows = (b.strip1 - b.strip0) * w.m;
  int64_t r = 0;
  for (; r + R <= rows; r += R) list_rows<R, V, G>(w, b, start, r, panel, acc);
  for (; r < rows; ++r) list_rows<1, V, G>(w, b, start, r, panel, acc);
}

// One pattern of 2:4, rows A and B, in one chunk; G columns, or g when G is 0.
template <int A, int B, int V, int G>
STEN_INLINE void pair(const int16_t*& index, const float*& value, int g, const float* panel, vec (*a)[V]) {
  const int count = G ? G : g;
  prefetch(value, 2 * count);
  prefetch(index, count);
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    const float* x_row = panel + static_cast<int64_t>(index[j]) * (V * kWidth);
    const vec s = broadcast(value + 2 * j), t = broadcast(value + 2 * j + 1);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const vec x = keep(load(x_row + v * kWidth));
      a[A][v] = madd(s, x, a[A][v]);
      a[B][v] = madd(t, x, a[B][v]);
    }
  }
  index += count;
  value += 2 * count;
}

// n = 2, m = 4: all four rows stay in registers.
template <int V, int G>
STEN_FN void grouped_pairs(const Grouped& w, const GroupedBlock& b, const float* start, const float* panel,
                           float* acc) {
  const int64_t step = w.strips * w.columns();
  for (int64_t s = b.strip0, row = 0; s < b.strip1; ++s, row += 4) {
    vec a[4][V];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) begin_row<V>(start, row + r, acc, a[r]);
    const float* x = panel;
    for (int64_t c = b.c0; c < b.c1; ++c, x += w.columns() * V * kWidth) {
      const int16_t* index = w.index + c * step + s * w.columns();
      const float* value = w.values + (c * step + s * w.columns()) * 2;
      pair<0, 1, V, G>(index, value, w.g, x, a);    // the revolving-door order
      pair<1, 2, V, G>(index, value, w.g, x, a);
      pair<0, 2, V, G>(index, value, w.g, x, a);
      pair<2, 3, V, G>(index, value, w.g, x, a);
      pair<1, 3, V, G>(index, value, w.g, x, a);
      pair<0, 3, V, G>(index, value, w.g, x, a);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) end_row<V>(row + r, acc, a[r]);
  }
}

// N values a column for the N rows in registers; value[position[i]] belongs to row i.
template <int N, int V>
STEN_INLINE void columns(const Grouped& w, const GroupedBlock& b, int64_t slot, const int64_t* position,
                         const float* panel, vec (*a)[V]) {
  constexpr int S = V * kWidth;
  const int64_t step = w.strips * w.columns();
  for (int64_t c = b.c0; c < b.c1; ++c, panel += w.columns() * S) {
    const int16_t* index = w.index + c * step + slot;
    const float* value = w.values + (c * step + slot) * w.n;
    prefetch(value, w.g * w.n);
    prefetch(index, w.g);
    for (int j = 0; j < w.g; ++j, value += w.n) {
      const float* x_row = panel + static_cast<int64_t>(index[j]) * S;
      vec x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = keep(load(x_row + v * kWidth));
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const vec s = broadcast(value + position[i]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) a[i][v] = madd(s, x[v], a[i][v]);
      }
    }
  }
}

// n = N: the rows of a pattern stay in registers, and one of them is exchanged for the next pattern.
template <int N, int V>
STEN_FN void exchange_strip(const Grouped& w, const GroupedBlock& b, int64_t strip, const float* panel, float* acc) {
  vec a[N][V];
  int64_t row[N], position[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) begin_row<V>(nullptr, row[i] = i, acc, a[i]);
  const int32_t* exchange = w.exchanges;
  for (int64_t p = 0; p < w.patterns; ++p, exchange += 2 + N) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      position[i] = exchange[2 + i];
      if (p > 0 && exchange[0] == i) {
        end_row<V>(row[i], acc, a[i]);
        begin_row<V>(nullptr, row[i] = exchange[1], acc, a[i]);
      }
    }
    columns<N, V>(w, b, (strip * w.patterns + p) * w.g, position, panel, a);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) end_row<V>(row[i], acc, a[i]);
}

// Any n: the rows of a pattern are loaded and stored N at a time.
template <int N, int V>
STEN_INLINE void some_rows(const Grouped& w, const GroupedBlock& b, int64_t slot, int first, const int32_t* rows,
                           const float* panel, float* acc) {
  vec a[N][V];
  int64_t position[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    position[i] = first + i;
    begin_row<V>(nullptr, rows[first + i], acc, a[i]);
  }
  columns<N, V>(w, b, slot, position, panel, a);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) end_row<V>(rows[first + i], acc, a[i]);
}

template <int V>
STEN_FN void any_strip(const Grouped& w, const GroupedBlock& b, int64_t strip, const float* panel, float* acc) {
  for (int64_t p = 0; p < w.patterns; ++p) {
    const int64_t slot = (strip * w.patterns + p) * w.g;
    const int32_t* rows = w.rows + p * w.n;
    int i = 0;
    for (; i + kMaxRows <= w.n; i += kMaxRows) some_rows<kMaxRows, V>(w, b, slot, i, rows, panel, acc);
    for (; i < w.n; ++i) some_rows<1, V>(w, b, slot, i, rows, panel, acc);
  }
}

template <int V>
STEN_FN void grouped_patterns(const Grouped& w, const GroupedBlock& b, const float* start, const float* panel,
                              float* acc) {
  for (int64_t s = b.strip0; s < b.strip1; ++s, acc += static_cast<int64_t>(w.m) * V * kWidth) {
    if (start) {
      for (int r = 0; r < w.m; ++r, ++start)
        for (int v = 0; v < V; ++v) store(acc + (r * V + v) * kWidth, broadcast(start));
    }
    switch (w.n <= kMaxRows ? w.n : 0) {
      case 2: exchange_strip<2, V>(w, b, s, panel, acc); break;
      case 3: exchange_strip<3, V>(w, b, s, panel, acc); break;
      case 4: exchange_strip<kMaxRows >= 4 ? 4 : 2, V>(w, b, s, panel, acc); break;
      case 5: exchange_strip<kMaxRows >= 5 ? 5 : 2, V>(w, b, s, panel, acc); break;
      case 6: exchange_strip<kMaxRows >= 6 ? 6 : 2, V>(w, b, s, panel, acc); break;
      default: any_strip<V>(w, b, s, panel, acc);
    }
  }
}

STEN_FN void grouped_token(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, const float* x,
                           const int32_t* spread, float* gathered, float* acc) {
#ifdef STEN_LOOKUP
  if (lookup_token(w, chunk, strip0, strip1, x, acc)) return;
#endif
  const int64_t width = w.columns(), block = width * w.n;
  for (int64_t s = strip0; s < strip1; ++s, acc += block) {
    const int64_t slot = (chunk * w.strips + s) * width;
    gather(x, w.index + slot, width, gathered);
    spread_madd(gathered, w.values + slot * w.n, w.n, spread, block, acc);
  }
}

// ---- the choice of V

STEN_FN void load_panel(const float* x, int64_t ld, int64_t tokens, int64_t cols, int v, float* panel) {
  if (v == 1) return load_panel_v<1>(x, ld, tokens, cols, panel);
  if (v == 2) return load_panel_v<2>(x, ld, tokens, cols, panel);
  if (v == 3) return load_panel_v<3>(x, ld, tokens, cols, panel);
  return load_panel_v<4>(x, ld, tokens, cols, panel);
}

STEN_FN void store_panel(const float* panel, int64_t rows, int64_t tokens, int v, float* y, int64_t ld) {
  if (v == 1) return store_panel_v<1>(panel, rows, tokens, y, ld);
  if (v == 2) return store_panel_v<2>(panel, rows, tokens, y, ld);
  if (v == 3) return store_panel_v<3>(panel, rows, tokens, y, ld);
  return store_panel_v<4>(panel, rows, tokens, y, ld);
}

STEN_FN void csr_rows(const Csr& w, const float* bias, int64_t r0, int64_t r1, const float* panel, int v, float* out) {
  if (v == 1) return csr_rows_v<1>(w, bias, r0, r1, panel, out);
  if (v == 2) return csr_rows_v<2>(w, bias, r0, r1, panel, out);
  if (v == 3) return csr_rows_v<3>(w, bias, r0, r1, panel, out);
  return csr_rows_v<4>(w, bias, r0, r1, panel, out);
}

template <int V>
STEN_FN void grouped_block_v(const Grouped& w, const GroupedBlock& b, const float* start, const float* panel,
                             float* acc) {
  if (w.n == 1 && w.g == 8) return grouped_lists<V, 8>(w, b, start, panel, acc);
  if (w.n == 1 && w.g == 16) return grouped_lists<V, 16>(w, b, start, panel, acc);
  if (w.n == 1) return grouped_lists<V, 0>(w, b, start, panel, acc);
  if constexpr (kRegisters == 32) {
    if (w.n == 2 && w.m == 4 && w.g == 8) return grouped_pairs<V, 8>(w, b, start, panel, acc);
    if (w.n == 2 && w.m == 4) return grouped_pairs<V, 0>(w, b, start, panel, acc);
  }
  return grouped_patterns<V>(w, b, start, panel, acc);
}

STEN_FN void grouped_block(const Grouped& w, const GroupedBlock& b, const float* start, const float* panel, int v,
                           float* acc) {
  if (v == 1) return grouped_block_v<1>(w, b, start, panel, acc);
  if (v == 2) return grouped_block_v<2>(w, b, start, panel, acc);
  if (v == 3) return grouped_block_v<3>(w, b, start, panel, acc);
  return grouped_block_v<4>(w, b, start, panel, acc);
}

#include "bodies_bands.h"
#include "bodies_grouped.h"
#include "bodies_conv.h"
#include "bodies_codes.h"
#include "bodies_epilogue.h"
#include "bodies_assign.h"

}  // namespace sten::STEN_ISA

#include "bodies_dots.h"

namespace sten::STEN_ISA {

constexpr Kernels make(const char* name) {
  return {name,     kWidth,    kRows,     load_panel,    store_panel,
          csr_rows, csr_token, grouped_token, grouped_input, grouped_values,
          bands_input, bands_values, bands_values_few,
          conv_load, conv_load_spread, conv_block, conv_grouped, conv_store, conv_join,
          activate,
          add_rows<float>, add_rows<bf16>, dot_rows<float>, dot_rows<bf16>, widen, narrow, make_dots(),
          pattern_energy, best_patterns, best_moves};
}

}  // namespace sten::STEN_ISA
