// The gradients of GroupedNM, a part of bodies.h. The rows of a pattern are taken R at a time.

// acc[index[j], :] += value[j, i] * grad[rows[i], :] for the g columns of a pattern and R of its n rows
template <int R, int V>
STEN_FN void spread_pattern(int64_t rows_left, const Grouped& w, const int32_t* rows, const int16_t* index,
                            const float* value, const float* grad, float* acc) {
  if constexpr (R > 1)
    if (rows_left < R) return spread_pattern<R - 1, V>(rows_left, w, rows, index, value, grad, acc);
  constexpr int S = V * kWidth;
  vec g[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) g[r][v] = keep(load(grad + rows[r] * S + v * kWidth));
  for (int j = 0; j < w.g; ++j) spread_column<R, V>(value + j * w.n, 1, g, acc + index[j] * S);
}

template <int V>
STEN_FN void grouped_input_v(const Grouped& w, int64_t chunk, const float* grad, float* acc) {
  constexpr int kMost = kRegisters == 32 ? 4 : 2;
  const int16_t* index = w.index + chunk * w.strips * w.columns();
  const float* value = w.values + chunk * w.strips * w.columns() * w.n;
  for (int64_t s = 0; s < w.strips; ++s, grad += static_cast<int64_t>(w.m) * V * kWidth)
    for (int64_t p = 0; p < w.patterns; ++p, index += w.g, value += w.g * w.n) {
      prefetch(value, w.g * w.n);
      for (int64_t i = 0; i < w.n; i += kMost)
        spread_pattern<kMost, V>(w.n - i, w, w.rows + p * w.n + i, index, value + i, grad, acc);
    }
}

// out[j, i] += dot(grad[rows[i]], x[index[j]])
template <int R>
STEN_FN void pattern_values(int64_t rows_left, const Grouped& w, const int32_t* rows, const int16_t* index,
                            LongPanel grad, LongPanel x, int64_t pieces, int64_t S, float* out) {
  if constexpr (R > 1)
    if (rows_left < R) return pattern_values<R - 1>(rows_left, w, rows, index, grad, x, pieces, S, out);
  const float *left[R], *right[4];
  for (int r = 0; r < R; ++r) left[r] = grad.data + rows[r] * S;
  for (int j = 0, count; j < w.g; j += count) {
    count = w.g - j < 4 ? 1 : 4;
    for (int c = 0; c < count; ++c) right[c] = x.data + index[j + c] * S;
    const auto add = count == 4 ? add_dots<R, 4> : add_dots<R, 1>;
    add(left, grad.step, right, x.step, pieces, S, out + j * w.n, 1, w.n);
  }
}

STEN_FN void grouped_values(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, LongPanel grad, LongPanel x,
                            int64_t pieces, int v, float* out) {
  const int64_t S = static_cast<int64_t>(v) * kWidth, slot = (chunk * w.strips + strip0) * w.columns();
  const int16_t* index = w.index + slot;
  out += slot * w.n;
  for (int64_t s = strip0; s < strip1; ++s, grad.data += w.m * S)
    for (int64_t p = 0; p < w.patterns; ++p, index += w.g, out += w.g * w.n)
      for (int64_t i = 0; i < w.n; i += kGradientRows)
        pattern_values<kGradientRows>(w.n - i, w, w.rows + p * w.n + i, index, grad, x, pieces, S, out + i);
}

STEN_FN void grouped_input(const Grouped& w, int64_t chunk, const float* grad, int v, float* acc) {
  if (v == 1) return grouped_input_v<1>(w, chunk, grad, acc);
  if (v == 2) return grouped_input_v<2>(w, chunk, grad, acc);
  if (v == 3) return grouped_input_v<3>(w, chunk, grad, acc);
  return grouped_input_v<4>(w, chunk, grad, acc);
}
