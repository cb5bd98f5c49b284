// GroupedNM in panels of bfloat16, n at most kPairRows: two columns of a pattern at a time. Includes after
// bodies_panels.h.

namespace sten::avx512_bf16 {

// The values of two columns, or with kLast of one and zeros, in each quarter of a vector: (j, i) and (j + 1, i).
template <int N, bool kLast>
STEN_INLINE wide two_columns(const bf16* value) {
  const auto* bits = reinterpret_cast<const __m128i*>(value);
  if constexpr (kLast) return _mm512_broadcast_i32x4(_mm_maskz_loadu_epi16((1 << N) - 1, value));
  if constexpr (N == 3) return _mm512_broadcast_i32x4(_mm_maskz_loadu_epi16(0x3f, value));
  if constexpr (N == 4) return _mm512_broadcast_i32x4(_mm_loadu_si128(bits));
  return _mm512_broadcastq_epi64(_mm_loadl_epi64(bits));
}

// Row i's pair of them, in each lane.
template <int N>
STEN_INLINE wide pair_of_row(wide values, int i) {
  const int first = 2 * i, second = 2 * (N + i);
  return _mm512_shuffle_epi8(values, _mm512_set1_epi32(first | (first + 1) << 8 | second << 16 | (second + 1) << 24));
}

template <int N, int V, bool kLast>
STEN_INLINE void add_two_columns(const bf16* value, const bf16* x, const bf16* y, vec (*a)[V]) {
  static constexpr bf16 kZeros[kMaxVectors * kWidth] = {};
  wide xs[V];
  interleave<V>(x, kLast ? kZeros : y, xs);
  const wide values = two_columns<N, kLast>(value);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) xs[v] = hold(xs[v]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const wide s = pair_of_row<N>(values, i);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[i][v] = multiply_add(s, xs[v], a[i][v]);
  }
}

// n = N > 1: the rows of a pattern stay in registers for all chunks of the block.
template <int N, int V>
STEN_FN void grouped_strip(const GroupedOf<bf16>& w, const GroupedBlock& b, int64_t strip, const bf16* panel, float* acc) {
  constexpr int S = V * kWidth;
  const int64_t step = w.strips * w.columns();
  for (int64_t p = 0; p < w.patterns; ++p) {
    const int32_t* rows = w.rows + p * N;
    vec a[N][V];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) begin_row<V>(nullptr, rows[i], acc, a[i]);
    const bf16* x = panel;
    for (int64_t c = b.c0; c < b.c1; ++c, x += w.columns() * S) {
      const int64_t slot = c * step + (strip * w.patterns + p) * w.g;
      const int16_t* index = w.index + slot;
      const bf16* value = w.values + slot * N;
      int j = 0;
      for (; j + 2 <= w.g; j += 2)
        add_two_columns<N, V, false>(value + j * N, x + index[j] * S, x + index[j + 1] * S, a);
      if (j < w.g) add_two_columns<N, V, true>(value + j * N, x + index[j] * S, x, a);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) end_row<V>(rows[i], acc, a[i]);
  }
}

// n = 1: a list of g columns for each row, R rows at a time.
template <int R, int V>
STEN_FN void grouped_rows(const GroupedOf<bf16>& w, const GroupedBlock& b, const float* start, int64_t row,
                          const bf16* panel, float* acc) {
  constexpr int S = V * kWidth;
  const int64_t step = w.strips * w.columns();
  vec a[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) begin_row<V>(start, row + r, acc, a[r]);
  for (int64_t c = b.c0; c < b.c1; ++c, panel += w.columns() * S) {
    const int64_t slot = c * step + (b.strip0 * w.m + row) * w.g;
    const int16_t* index = w.index + slot;
    const bf16* value = w.values + slot;
    int j = 0;
    for (; j + 2 <= w.g; j += 2)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64_t e = r * w.g + j;
        add_entries<V>(value + e, panel + index[e] * S, panel + index[e + 1] * S, a[r]);
      }
    if (j < w.g)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64_t e = r * w.g + j;
        add_entries<V, true>(value + e, panel + index[e] * S, panel, a[r]);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) end_row<V>(row + r, acc, a[r]);
}

template <int V>
STEN_FN void grouped_block_v(const GroupedOf<bf16>& w, const GroupedBlock& b, const float* start, const bf16* panel,
                             float* acc) {
  constexpr int R = V == 1 ? 8 : 4;
  const int64_t rows = (b.strip1 - b.strip0) * w.m;
  if (w.n == 1) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) grouped_rows<R, V>(w, b, start, r, panel, acc);
    for (; r < rows; ++r) grouped_rows<1, V>(w, b, start, r, panel, acc);
    return;
  }
  for (int64_t r = 0; start && r < rows * V; ++r) store(acc + r * kWidth, broadcast(start + r / V));
  for (int64_t s = b.strip0; s < b.strip1; ++s, acc += static_cast<int64_t>(w.m) * V * kWidth) {
    if (w.n == 2) grouped_strip<2, V>(w, b, s, panel, acc);
    if (w.n == 3) grouped_strip<3, V>(w, b, s, panel, acc);
    if (w.n == 4) grouped_strip<4, V>(w, b, s, panel, acc);
  }
}

STEN_FN void grouped_block(const GroupedOf<bf16>& w, const GroupedBlock& b, const float* start, const bf16* panel, int v,
                           float* acc) {
  if (v == 1) return grouped_block_v<1>(w, b, start, panel, acc);
  if (v == 2) return grouped_block_v<2>(w, b, start, panel, acc);
  if (v == 3) return grouped_block_v<3>(w, b, start, panel, acc);
  return grouped_block_v<4>(w, b, start, panel, acc);
}

}  // namespace sten::avx512_bf16
