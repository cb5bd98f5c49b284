// GroupedNM: y = x W^T + bias.
//
// Letters: a chunk holds P * g columns, a strip m rows.
#include <cstring>

#include "linear.h"

namespace sten {
namespace {

constexpr int64_t kPanelBytes = 40 << 10;    // activations of one block: most of a 48 KB first-level cache
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
    const int64_t last = part(w.strips, tasks, end - 1).end;
    for (int64_t s = part(w.strips, tasks, begin).begin; s < last; s += together) {
      const int64_t stop = std::min(s + together, last);
      std::memset(acc.get(), 0, (stop - s) * block * sizeof(float));
      for (int64_t c = 0; c < w.chunks; ++c)
        k.grouped_token(w, c, s, stop, x.get() + c * columns, spread.get(), gathered.get(), acc.get());
      token_rows(p, w, s, stop, acc.get());
    }
  });
}

void panel_task(const Problem& p, const Grouped& w, const Kernels& k, Range strips, Range tokens, float* panel,
                float* start, float* acc) {
  const int64_t count = tokens.end - tokens.begin, columns = w.columns();
  const int v = static_cast<int>(ceil_div(count, k.width));
  const int64_t row_floats = static_cast<int64_t>(v) * k.width;
  const int64_t most = std::max<int64_t>(1, kPanelBytes / (columns * row_floats * static_cast<int64_t>(sizeof(float))));
  const int64_t blocks = ceil_div(w.chunks, most);
  for (int64_t b = 0; b < blocks; ++b) {
    const Range chunks = part(w.chunks, blocks, b);
    const int64_t k0 = chunks.begin * columns, width = (chunks.end - chunks.begin) * columns;
    const int64_t real = std::min(width, p.in - k0);
    k.load_panel(p.x + tokens.begin * p.in + k0, p.in, count, real, v, panel);
    std::memset(panel + real * row_floats, 0, (width - real) * row_floats * sizeof(float));
    k.grouped_block(w, {chunks.begin, chunks.end, strips.begin, strips.end}, b == 0 ? start : nullptr, panel, v, acc);
  }
  const int64_t r0 = strips.begin * w.m, rows = std::min(strips.end * w.m, p.out) - r0;
  k.store_panel(acc, rows, count, v, p.y + tokens.begin * p.out + r0, p.out);
}

void many_tokens(const Problem& p, const Grouped& w, const Kernels& k, const Pool& pool) {
  const Grid grid = make_grid(p, k, pool.threads, std::min(pieces_for_cache(p, k), w.strips), w.strips);
  const int64_t most = grid.panel_tokens, most_rows = ceil_div(w.strips, grid.pieces) * w.m;
  const int64_t panel_floats = std::max(kPanelBytes / static_cast<int64_t>(sizeof(float)), w.columns() * most);
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<float> panel(Role::panel, panel_floats), acc(Role::sums, most_rows * (most + 1));
    float* start = acc.get() + most_rows * most;
    // Piece after piece, so that its weights stay in the second-level cache from panel to panel.
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task % grid.panels * grid.panel_tokens;
      const Range strips = part(w.strips, grid.pieces, task / grid.panels);
      fill_start(p, strips.begin * w.m, (strips.end - strips.begin) * w.m, start);
      panel_task(p, w, k, strips, {t0, std::min(t0 + grid.panel_tokens, p.tokens)}, panel.get(), start, acc.get());
    }
  });
}

// A weight without columns: y is the bias.
void no_columns(const Problem& p) {
  for (int64_t t = 0; t < p.tokens; ++t) fill_start(p, 0, p.out, p.y + t * p.out);
}

}  // namespace

void grouped_linear(const Problem& p, const Grouped& w, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  if (w.chunks == 0) return no_columns(p);
  const double entries = static_cast<double>(w.chunks) * w.strips * w.columns() * w.n;
  pool.threads = useful_threads(pool.threads, entries * p.tokens);
  if (p.tokens == 1) return one_token(p, w, k, pool);
  many_tokens(p, w, k, pool);
}

}  // namespace sten
