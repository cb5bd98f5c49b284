// The kernels, written once over the names of simd_*.h. Each isa_*.cpp defines STEN_ISA, includes its simd_*.h and then
// this file, so there is no include guard. Every function carries STEN_FN: nothing here may be shared between the
// instruction sets, and nothing but <cstdint> and the intrinsics may be called.
//
// Letters: V vectors of tokens in a panel line, R rows done at once, S = V * kWidth floats in a panel line.

#include "kernels.h"

namespace sten::STEN_ISA {

constexpr int kRows = kRegisters / 8;                        // 4 x 4 or 2 x 4 accumulators in a many-token kernel
constexpr int kMaxLive = kRegisters == 32 ? 6 : 2;           // rows of a pattern that fit with four vectors each

// ---- panels

template <int V>
STEN_FN void load_panel_v(const float* x, int64_t ld, int64_t tokens, int64_t cols, float* panel) {
  constexpr int S = V * kWidth;
  for (int64_t k = 0; k < cols; k += kWidth) {
    const int c = cols - k < kWidth ? static_cast<int>(cols - k) : kWidth;
    for (int v = 0; v < V; ++v) {
      const int64_t left = tokens - v * kWidth;
      const int r = left < 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
      const float* from = r ? x + v * kWidth * ld + k : x;
      transpose(from, ld, r, c, panel + k * S + v * kWidth, S, true);
    }
  }
}

template <int V>
STEN_FN void store_panel_v(const float* panel, int64_t rows, int64_t tokens, float* y, int64_t ld) {
  constexpr int S = V * kWidth;
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int n = rows - r < kWidth ? static_cast<int>(rows - r) : kWidth;
    for (int64_t t = 0; t < tokens; t += kWidth) {
      const int c = tokens - t < kWidth ? static_cast<int>(tokens - t) : kWidth;
      transpose(panel + r * S + t, S, n, c, y + t * ld + r, ld, false);
    }
  }
}

// ---- CSR

// Rows one after the other, straight from the stored format; C independent sums hide the latency of an addition.
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
        const float* line = panel + static_cast<int64_t>(w.col[i + c]) * S;
        const vec s = broadcast(w.values + i + c);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) a[c][v] = madd(s, load(line + v * kWidth), a[c][v]);
      }
    }
    for (; i < end; ++i) {
      const float* line = panel + static_cast<int64_t>(w.col[i]) * S;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) a[0][v] = madd(broadcast(w.values + i), load(line + v * kWidth), a[0][v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
      for (int c = 1; c < C; ++c) a[0][v] = add(a[0][v], a[c][v]);
      store(out + v * kWidth, a[0][v]);
    }
  }
}

template <int V>
STEN_FN void csr_block_v(const CsrBlock& block, const float* panel, float* acc) {
  constexpr int S = V * kWidth;
  const uint16_t* col = block.col;
  const float* value = block.value;
  for (int64_t q = 0; q < block.groups; ++q) {
    vec a[kRows][V];
    const int32_t* row = block.row + q * kRows;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) a[r][v] = load(acc + static_cast<int64_t>(row[r]) * S + v * kWidth);
    for (int32_t i = block.count[q]; i > 0; --i, col += kRows, value += kRows) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const float* line = panel + static_cast<int64_t>(col[r]) * S;
        const vec s = broadcast(value + r);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) a[r][v] = madd(s, load(line + v * kWidth), a[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(acc + static_cast<int64_t>(row[r]) * S + v * kWidth, a[r][v]);
  }
}

STEN_FN void csr_token(const Csr& w, const float* bias, int64_t r0, int64_t r1, const float* x, float* y) {
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t i = w.crow[r];
    y[r] = dot(x, w.values + i, w.col + i, w.crow[r + 1] - i) + (bias ? bias[r] : 0.0f);
  }
}

// ---- GroupedNM

// n = 1: a pattern is one row, so the chunk is R lists of g columns, one a row, with row-major lists.
template <int R, int V>
STEN_INLINE void lists(const Grouped& w, int64_t c0, int64_t c1, int64_t list, const float* panel, float* acc) {
  constexpr int S = V * kWidth;
  const int64_t step = w.strips * w.columns(), width = w.columns();
  vec a[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[r][v] = load(acc + r * S + v * kWidth);
  for (int64_t c = c0; c < c1; ++c, panel += width * S) {
    const int16_t* index = w.index + c * step + list * w.g;
    const float* value = w.values + c * step + list * w.g;
    for (int j = 0; j < w.g; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float* line = panel + static_cast<int64_t>(index[r * w.g + j]) * S;
        const vec s = broadcast(value + r * w.g + j);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) a[r][v] = madd(s, load(line + v * kWidth), a[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(acc + r * S + v * kWidth, a[r][v]);
}

template <int V>
STEN_FN void grouped_lists(const Grouped& w, int64_t c0, int64_t c1, int64_t strip0, int64_t strip1,
                           const float* panel, float* acc) {
  constexpr int S = V * kWidth, R = V == 1 ? 2 * kRows : kRows;
  int64_t r = strip0 * w.m;
  const int64_t end = strip1 * w.m;
  for (; r + R <= end; r += R, acc += R * S) lists<R, V>(w, c0, c1, r, panel, acc);
  for (; r < end; ++r, acc += S) lists<1, V>(w, c0, c1, r, panel, acc);
}

// N rows of one pattern, beginning with its row number `first`: every activation is loaded once for N products.
template <int N, int V>
STEN_INLINE void pattern_rows(const Grouped& w, int64_t c0, int64_t c1, int64_t slot, int first, const int32_t* rows,
                              const float* panel, float* acc) {
  constexpr int S = V * kWidth;
  const int64_t step = w.strips * w.columns(), width = w.columns();
  vec a[N][V];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[i][v] = load(acc + static_cast<int64_t>(rows[first + i]) * S + v * kWidth);
  for (int64_t c = c0; c < c1; ++c, panel += width * S) {
    const int16_t* index = w.index + c * step + slot;
    const float* value = w.values + (c * step + slot) * w.n + first;
    for (int j = 0; j < w.g; ++j, value += w.n) {
      const float* line = panel + static_cast<int64_t>(index[j]) * S;
      vec x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(line + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const vec s = broadcast(value + i);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) a[i][v] = madd(s, x[v], a[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(acc + static_cast<int64_t>(rows[first + i]) * S + v * kWidth, a[i][v]);
}

template <int V>
STEN_FN void grouped_patterns(const Grouped& w, int64_t c0, int64_t c1, int64_t strip0, int64_t strip1,
                              const float* panel, float* acc) {
  for (int64_t s = strip0; s < strip1; ++s, acc += static_cast<int64_t>(w.m) * V * kWidth) {
    for (int64_t p = 0; p < w.patterns; ++p) {
      const int64_t slot = (s * w.patterns + p) * w.g;
      const int32_t* rows = w.rows + p * w.n;
      int i = 0;
      if constexpr (kMaxLive >= 6)
        for (; i + 6 <= w.n; i += 6) pattern_rows<6, V>(w, c0, c1, slot, i, rows, panel, acc);
      if constexpr (kMaxLive >= 4)
        for (; i + 4 <= w.n; i += 4) pattern_rows<4, V>(w, c0, c1, slot, i, rows, panel, acc);
      for (; i + 2 <= w.n; i += 2) pattern_rows<2, V>(w, c0, c1, slot, i, rows, panel, acc);
      for (; i < w.n; ++i) pattern_rows<1, V>(w, c0, c1, slot, i, rows, panel, acc);
    }
  }
}

STEN_FN void grouped_token(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, const float* x,
                           const int32_t* spread, float* gathered, float* acc) {
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

STEN_FN void csr_block(const CsrBlock& block, const float* panel, int v, float* acc) {
  if (v == 1) return csr_block_v<1>(block, panel, acc);
  if (v == 2) return csr_block_v<2>(block, panel, acc);
  if (v == 3) return csr_block_v<3>(block, panel, acc);
  return csr_block_v<4>(block, panel, acc);
}

template <int V>
STEN_FN void grouped_block_v(const Grouped& w, int64_t c0, int64_t c1, int64_t strip0, int64_t strip1,
                             const float* panel, float* acc) {
  if (w.n == 1) return grouped_lists<V>(w, c0, c1, strip0, strip1, panel, acc);
  return grouped_patterns<V>(w, c0, c1, strip0, strip1, panel, acc);
}

STEN_FN void grouped_block(const Grouped& w, int64_t c0, int64_t c1, int64_t strip0, int64_t strip1,
                           const float* panel, int v, float* acc) {
  if (v == 1) return grouped_block_v<1>(w, c0, c1, strip0, strip1, panel, acc);
  if (v == 2) return grouped_block_v<2>(w, c0, c1, strip0, strip1, panel, acc);
  if (v == 3) return grouped_block_v<3>(w, c0, c1, strip0, strip1, panel, acc);
  return grouped_block_v<4>(w, c0, c1, strip0, strip1, panel, acc);
}

constexpr Kernels make(const char* name) {
  return {name,     kWidth,    kRows,     load_panel,    store_panel,
          csr_rows, csr_block, csr_token, grouped_block, grouped_token};
}

}  // namespace sten::STEN_ISA
