// GroupedNM: y = x W^T + bias and its two gradients.
//
// Letters: a chunk holds P * g columns, a strip m rows.
#include <cstring>

#include "linear.h"

namespace sten {
namespace {

constexpr int64_t kPanelBytes = 40 << 10;    // activations of one block: most of a 48 KB first-level cache
constexpr int64_t kTransposeTokens = 128;    // from which on sorting single entries by columns pays
constexpr int64_t kLongPanels = 4;           // most panels whose tokens are summed in registers for the values' gradient
constexpr int64_t kSkew = 256;               // floats between panels, or all would fall into the same cache sets
constexpr int64_t kTokenFloats = 4096;       // one token: partial sums that stay in the first-level cache

// y of one token from its sums: acc is (strips, P, g, n)
void token_rows(const Problem& p, const Grouped& w, int64_t strip0, int64_t strip1, const float* acc) {
  for (int64_t s = strip0; s < strip1; ++s) {
    const int64_t base = s * w.m;
    for (int64_t r = base; r < std::min(base + w.m, p.out); ++r) p.y[r] = p.bias ? p.bias[r] : 0.0f;
    for (int64_t q = 0; q < w.patterns; ++q, acc += static_cast<int64_t>(w.g) * w.n)
      for (int i = 0; i < w.n; ++i) {
        float sum = 0.0f;
        for (int j = 0; j < w.g; ++j) sum += acc[j * w.n + i];
        const int64_t r = base + w.rows[q * w.n + i];
        if (r < p.out) p.y[r] += sum;
      }
  }
}

void one_token(const Problem& p, const Grouped& w, const Kernels& k, const Pool& pool) {
  const int64_t columns = w.columns(), block = columns * w.n, padded = w.chunks * columns;
  const int64_t together = std::max<int64_t>(1, kTokenFloats / block);
  Scratch<int32_t> spread(Role::cuts, static_cast<int64_t>(w.n) * k.width);
  for (int phase = 0; phase < w.n; ++phase)
    for (int l = 0; l < k.width; ++l) spread.get()[phase * k.width + l] = (phase + l) / w.n;
  // Padding columns exist in x and are zero; a vector load may pass the end of a chunk.
  Scratch<float> x(Role::small, padded + kTokenPadding);
  std::memcpy(x.get(), p.x, p.in * sizeof(float));
  std::memset(x.get() + p.in, 0, (padded + kTokenPadding - p.in) * sizeof(float));
  const int64_t tasks = std::min<int64_t>(pool.threads, w.strips);
  pool.each(tasks, [&](int64_t begin, int64_t end) {
    Scratch<float> acc(Role::sums, together * block), gathered(Role::panel, columns + k.width);
    std::memset(gathered.get(), 0, (columns + k.width) * sizeof(float));
    const int64_t first = part(w.strips, tasks, begin).begin, last = part(w.strips, tasks, end - 1).end;
    for (int64_t s = first; s < last; s += together) {
      const int64_t stop = std::min(s + together, last);
      std::memset(acc.get(), 0, (stop - s) * block * sizeof(float));
      for (int64_t c = 0; c < w.chunks; ++c)
        k.grouped_token(w, c, s, stop, x.get() + c * columns, spread.get(), gathered.get(), acc.get());
      token_rows(p, w, s, stop, acc.get());
    }
    finish_rows(p, {first * w.m, std::min(last * w.m, p.out)}, {0, 1}, k);
  });
}

template <typename E>
void panel_task(const ProblemOf<E>& p, const GroupedOf<E>& w, const Panels<E>& panels, const Kernels& k, Range strips,
                Range tokens, E* panel, float* start, float* acc) {
  const int64_t count = tokens.end - tokens.begin, columns = w.columns();
  const int v = static_cast<int>(ceil_div(count, k.width));
  const int64_t row_floats = static_cast<int64_t>(v) * k.width;
  const int64_t most = std::max<int64_t>(1, kPanelBytes / (columns * row_floats * static_cast<int64_t>(sizeof(E))));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(w.chunks, most));    // one without columns: y is the bias
  for (int64_t b = 0; b < blocks; ++b) {
    const Range chunks = part(w.chunks, blocks, b);
    const int64_t k0 = chunks.begin * columns, width = (chunks.end - chunks.begin) * columns;
    const int64_t real = std::min(width, p.in - k0);
    panels.load(p.x + tokens.begin * p.in + k0, p.in, count, real, v, panel);
    std::memset(panel + real * row_floats, 0, (width - real) * row_floats * sizeof(E));
    panels.grouped(w, {chunks.begin, chunks.end, strips.begin, strips.end}, b == 0 ? start : nullptr, panel, v, acc);
  }
  store_and_finish(p, acc, {strips.begin * w.m, std::min(strips.end * w.m, p.out)}, tokens, panels, k);
}

template <typename E>
void many_tokens(const ProblemOf<E>& p, const GroupedOf<E>& w, const Panels<E>& panels, const Kernels& k,
                 const Pool& pool) {
  const Problem sizes = sizes_of(p);
  const Grid grid = make_grid(sizes, k, pool.threads, std::min(pieces_for_cache(sizes, k), w.strips), w.strips);
  const int64_t most = grid.panel_tokens, most_rows = ceil_div(w.strips, grid.pieces) * w.m;
  const int64_t panel_floats = std::max(kPanelBytes / static_cast<int64_t>(sizeof(E)), w.columns() * most);
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<E> panel(Role::panel, panel_floats);
    Scratch<float> acc(Role::sums, most_rows * (most + 1));
    float* start = acc.get() + most_rows * most;
    // Piece after piece, so that its weights stay in the second-level cache from panel to panel.
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task % grid.panels * grid.panel_tokens;
      const Range strips = part(w.strips, grid.pieces, task / grid.panels);
      fill_start(p, strips.begin * w.m, (strips.end - strips.begin) * w.m, start);
      panel_task(p, w, panels, k, strips, {t0, std::min(t0 + grid.panel_tokens, p.tokens)}, panel.get(), start, acc.get());
    }
  });
}

}  // namespace

template <typename E>
void grouped_linear(const ProblemOf<E>& p, const GroupedOf<E>& w, const Panels<E>& panels, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  pool.threads = useful_threads(pool.threads, entries(w) * p.tokens);
  if constexpr (std::is_same_v<E, float>)
    if (p.tokens == 1 && w.chunks > 0) return one_token(p, w, k, pool);
  many_tokens(p, w, panels, k, pool);
}

template void grouped_linear(const Problem&, const Grouped&, const Panels<float>&, const Kernels&, Pool);
template void grouped_linear(const ProblemOf<bf16>&, const GroupedOf<bf16>&, const Panels<bf16>&, const Kernels&, Pool);

namespace {

// each(column, row, entry) for the entries of a chunk that are no padding; rows ascend within a column
template <typename F>
void each_entry(const Grouped& w, int64_t chunk, int64_t rows, int64_t columns, F&& each) {
  for (int64_t s = 0; s < w.strips; ++s)
    for (int64_t q = 0; q < w.patterns; ++q)
      for (int64_t j = 0; j < w.g; ++j) {
        const int64_t slot = ((chunk * w.strips + s) * w.patterns + q) * w.g + j;
        const int64_t column = chunk * w.columns() + w.index[slot];
        for (int i = 0; i < w.n && column < columns; ++i) {
          const int64_t row = s * w.m + w.rows[q * w.n + i];
          if (row < rows) each(column, row, slot * w.n + i);
        }
      }
}

// Single entries, sorted by columns, as a CSR weight of the transposed product.
void transposed_linear(const Problem& p, const Grouped& w, const Kernels& k, const Pool& pool) {
  const int64_t all = w.chunks * w.strips * w.columns() * w.n;
  Scratch<float> values(Role::values, all);
  Scratch<int32_t> index(Role::index, 2 * p.out + 1 + all);
  int32_t *crow = index.get(), *next = crow + p.out + 1, *row = next + p.out;
  std::fill(crow, crow + p.out + 1, 0);
  const auto each_chunk = [&](auto&& each) {    // whose columns are its own
    pool.each(w.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) each_entry(w, c, p.in, p.out, each);
    });
  };
  each_chunk([&](int64_t column, int64_t, int64_t) { ++crow[column + 1]; });
  for (int64_t c = 0; c < p.out; ++c) {
    next[c] = crow[c];
    crow[c + 1] += crow[c];
  }
  each_chunk([&](int64_t column, int64_t r, int64_t slot) {
    values.get()[next[column]] = w.values[slot];
    row[next[column]++] = static_cast<int32_t>(r);
  });
  csr_linear(p, {values.get(), crow, row}, k, pool);
}

}  // namespace

void grouped_grad_input(const Problem& p, const Grouped& w, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  if (w.n == 1 && p.tokens >= kTransposeTokens && entries(w) < INT32_MAX) return transposed_linear(p, w, k, pool);
  pool.threads = useful_threads(pool.threads, entries(w) * p.tokens);
  const Grid grid = make_grid(p, k, pool.threads, 1, w.chunks);
  const int64_t columns = w.columns();
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<float> panel(Role::panel, w.strips * w.m * grid.panel_tokens), acc(Role::sums, columns * grid.panel_tokens);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task / grid.pieces * grid.panel_tokens, count = std::min(grid.panel_tokens, p.tokens - t0);
      const int v = static_cast<int>(ceil_div(count, k.width));
      const int64_t row_floats = static_cast<int64_t>(v) * k.width;
      if (loaded != t0) {
        k.load_panel(p.x + t0 * p.in, p.in, count, p.in, v, panel.get());
        std::memset(panel.get() + p.in * row_floats, 0, (w.strips * w.m - p.in) * row_floats * sizeof(float));
      }
      loaded = t0;
      const Range chunks = part(w.chunks, grid.pieces, task % grid.pieces);
      for (int64_t c = chunks.begin; c < chunks.end; ++c) {
        std::memset(acc.get(), 0, columns * row_floats * sizeof(float));
        k.grouped_input(w, c, panel.get(), v, acc.get());
        k.store_panel(acc.get(), std::min(columns, p.out - c * columns), count, v, p.y + t0 * p.out + c * columns, p.out);
      }
    }
  });
}

// The entries of padding are zero, also if an activation or a gradient is infinite.
static void clear_padding(const Grouped& w, int64_t rows, int64_t in, float* out) {
  for (int64_t c = 0; c < w.chunks; ++c)
    for (int64_t s = 0; s < w.strips; ++s) {
      if ((c + 1) * w.columns() <= in && (s + 1) * w.m <= rows) continue;
      for (int64_t e = 0; e < w.columns(); ++e) {
        const int64_t slot = (c * w.strips + s) * w.columns() + e;
        for (int i = 0; i < w.n; ++i)
          if (c * w.columns() + w.index[slot] >= in || s * w.m + w.rows[e / w.g * w.n + i] >= rows)
            out[slot * w.n + i] = 0.0f;
      }
    }
}

void grouped_grad_values(const float* grad, const float* x, int64_t tokens, int64_t rows, int64_t in, const Grouped& w,
                         float* out, const Kernels& k, Pool pool) {
  if (tokens == 0 || rows == 0 || in == 0) return;
  pool.threads = useful_threads(pool.threads, entries(w) * tokens);
  const int v = static_cast<int>(std::min<int64_t>(kMaxVectors, ceil_div(tokens, k.width)));
  const int64_t row_floats = static_cast<int64_t>(v) * k.width, panels = ceil_div(tokens, row_floats);
  const int64_t columns = w.columns(), bytes = columns * row_floats * static_cast<int64_t>(sizeof(float));
  const int64_t together = std::min(panels, std::max<int64_t>(1, std::min(kLongPanels, kPanelBytes / bytes)));
  const int64_t pieces = std::min<int64_t>(pool.threads, w.strips);
  pool.each(pieces, [&](int64_t begin, int64_t end) {
    const Range strips{part(w.strips, pieces, begin).begin, part(w.strips, pieces, end - 1).end};
    const int64_t r0 = strips.begin * w.m, padded = (strips.end - strips.begin) * w.m;
    const int64_t own = std::min(rows, strips.end * w.m) - r0;
    const int64_t x_step = columns * row_floats + kSkew, grad_step = padded * row_floats + kSkew;
    Scratch<float> xs(Role::panel, together * x_step), gs(Role::sums, together * grad_step);
    const LongPanel x_panel{xs.get(), x_step}, grad_panel{gs.get(), grad_step};
    const auto load = [&](const float* from, int64_t ld, int64_t t0, int64_t real, int64_t all, float* to) {
      k.load_panel(from + t0 * ld, ld, std::min(row_floats, tokens - t0), real, v, to);
      std::memset(to + real * row_floats, 0, (all - real) * row_floats * sizeof(float));
    };
    for (int64_t panel = 0; panel < panels; panel += together) {
      const int64_t now = std::min(together, panels - panel);
      for (int64_t i = 0; i < now; ++i)
        load(grad + r0, rows, (panel + i) * row_floats, own, padded, gs.get() + i * grad_step);
      for (int64_t c = 0; c < w.chunks; ++c) {
        for (int64_t i = 0; i < now; ++i)
          load(x + c * columns, in, (panel + i) * row_floats, std::min(columns, in - c * columns), columns,
               xs.get() + i * x_step);
        k.grouped_values(w, c, strips.begin, strips.end, grad_panel, x_panel, now, v, out);
      }
    }
  });
  clear_padding(w, rows, in, out);
}

}  // namespace sten
