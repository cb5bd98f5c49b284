// Rows that share their columns (VectorNM, FanIn, BSR): y = x W^T + bias and its two gradients.
//
// All three read the stored format. Columns are cut into blocks whose panel rows fit a cache; `Cuts` says where each
// band crosses from one block to the next. One token multiplies along the columns, without a panel.
#include <cstring>

#include "linear.h"

namespace sten {
namespace {

// Panel of a block: a part of the second-level cache. Blocks in the first-level cache would read and write the sums once
// for each, which took up to twice the time from 3072 columns on.
#ifdef STEN_POISON
constexpr int64_t kBlockBytes = 1 << 10;    // the sanitizer build tries several blocks of its small weights
#else
constexpr int64_t kBlockBytes = 256 << 10;
#endif
constexpr int64_t kRowsTogether = 128;
constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kLeastColumns = 128;
constexpr int64_t kTransposeTokens = 128;     // from which on sorting single entries by columns pays
constexpr int64_t kSkew = 256;                // floats between panels, or all would fall into the same cache sets
constexpr int64_t kFewTokens = 64;
constexpr int64_t kSharedRows = 4;            // from which on gathering activations for a band pays
constexpr int64_t kLongPanels = 4;            // panels whose tokens are summed in registers for the values' gradient

int64_t panel_floats(const Kernels& k, int64_t tokens) {
  return std::min<int64_t>(kMaxVectors, ceil_div(tokens, k.width)) * k.width;
}

// How many columns a block has, a multiple of the width of an entry; at least `parts` blocks, if columns suffice.
template <typename E>
int64_t block_columns(const BandsOf<E>& w, int64_t row_floats, int64_t parts = 1) {
  const int64_t most = std::min(kBlockBytes / (row_floats * static_cast<int64_t>(sizeof(E))), ceil_div(w.columns, parts));
  const int64_t fit = std::max(kLeastColumns, most);
  return std::max<int64_t>(w.width, fit / w.width * w.width);
}

// Where each band crosses into each block of columns: positions as in BandRange.
class Cuts {
 public:
  Cuts(const Bands& w, int64_t columns, const Pool& pool)
      : columns_(columns),
        bands_(w.bands()),
        blocks_(std::max<int64_t>(1, ceil_div(w.columns, columns))),
        at_(Role::cuts, (blocks_ + 1) * bands_) {
    const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(bands_, pool.threads * 4));
    pool.each(tasks, [&](int64_t begin, int64_t end) {
      for (int64_t band = part(bands_, tasks, begin).begin; band < part(bands_, tasks, end - 1).end; ++band)
        find(w, band);
    });
  }

  int64_t blocks() const { return blocks_; }
  int64_t columns() const { return columns_; }
  BandRange range(int64_t block, int64_t r0, int64_t r1) const {
    const int32_t* begin = at_.get() + block * bands_;
    return {r0, r1, block * columns_, begin, begin + bands_};
  }

 private:
  void find(const Bands& w, int64_t band) {
    const int32_t* col = w.crow ? w.col : w.col + band * w.count;
    int32_t i = w.crow ? w.crow[band] : 0;
    const int32_t stop = w.crow ? w.crow[band + 1] : static_cast<int32_t>(w.count);
    for (int64_t b = 0; b < blocks_; ++b) {
      at_.get()[b * bands_ + band] = i;
      const int64_t limit = (b + 1) * columns_ / w.width;
      if (b + 1 == blocks_) i = stop;
      while (i < stop && col[i] < limit) ++i;
    }
    at_.get()[blocks_ * bands_ + band] = stop;
  }

  int64_t columns_, bands_, blocks_;
  Scratch<int32_t> at_;
};

// panel[k - k0, :] for columns k0 to k1 - 1 of x; those beyond `in` become zero
template <typename E>
void load_columns(const Panels<E>& panels, int width, const E* x, int64_t in, int64_t tokens, int64_t k0, int64_t k1,
                  int v, E* panel) {
  const int64_t real = std::max<int64_t>(0, std::min(k1, in) - k0), row_floats = static_cast<int64_t>(v) * width;
  if (real) panels.load(x + k0, in, tokens, real, v, panel);
  std::memset(panel + real * row_floats, 0, (k1 - k0 - real) * row_floats * sizeof(E));
}

// A block of y, which is then in the caches when it is written: its rows are far apart, and every line would be waited for.
template <typename E>
void fetch_block(const ProblemOf<E>& p, Range rows, Range tokens) {
#ifdef __GNUC__
  for (int64_t t = tokens.begin; t < tokens.end; ++t)
    for (int64_t r = rows.begin; r < rows.end; r += kLine / sizeof(E)) __builtin_prefetch(p.y + t * p.out + r, 1);
#endif
}

template <typename E>
void many_tokens(const ProblemOf<E>& p, const BandsOf<E>& w, const Panels<E>& panels, const Kernels& k,
                 const Pool& pool) {
  const Problem sizes = sizes_of(p);
  const int64_t units = ceil_div(p.out, kUnit), row_floats = panel_floats(k, p.tokens);
  const Grid grid = make_grid(sizes, k, pool.threads, std::min(pieces_for_cache(sizes, k), units), units);
  const Cuts cuts({nullptr, w.crow, w.col, w.rows, w.columns, w.height, w.width, w.count},
                  block_columns(w, row_floats), pool);
  const int64_t most = ceil_div(units, grid.pieces) * kUnit, columns = std::min(cuts.columns(), w.columns);
  // Rows whose sums are complete before the next ones begin: of whole bands, whose columns are then looked up once.
  const bool once = cuts.blocks() == 1;
  const int64_t together = once ? w.height * std::max<int64_t>(1, kRowsTogether / w.height) : most;
  const int64_t acc_rows = std::min(most, together);
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<E> panel(Role::panel, columns * row_floats);
    Scratch<float> acc(Role::sums, acc_rows * row_floats + most);
    float* start = acc.get() + acc_rows * row_floats;
    // Piece after piece, so that its weights stay in the second-level cache from panel to panel.
    for (int64_t task = begin; task < end; ++task) {
      const Range rows = piece_rows(p.out, grid.pieces, task / grid.panels);
      const int64_t t0 = task % grid.panels * grid.panel_tokens, count = std::min(grid.panel_tokens, p.tokens - t0);
      const int v = static_cast<int>(ceil_div(count, k.width));
      fill_start(p, rows.begin, rows.end - rows.begin, start);
      for (int64_t r = rows.begin, r1; r < rows.end; r = r1) {
        r1 = once ? std::min(rows.end, (r / together + 1) * together) : rows.end;
        if (once) fetch_block(p, {r, r1}, {t0, t0 + count});
        for (int64_t b = 0; b < cuts.blocks(); ++b) {
          const int64_t k0 = b * cuts.columns(), k1 = std::min(k0 + cuts.columns(), w.columns);
          if (r == rows.begin)
            load_columns(panels, k.width, p.x + t0 * p.in, p.in, count, k0, k1, v, panel.get());
          panels.bands(w, cuts.range(b, r, r1), b == 0 ? start + r - rows.begin : nullptr, panel.get(), v, acc.get());
        }
        store_and_finish(p, acc.get(), {r, r1}, {t0, t0 + count}, panels, k);
      }
    }
  });
}

// Several panels and single entries in single rows: CSR, or FanIn with the rows' offsets.
template <typename E>
void single_entries(const ProblemOf<E>& p, const BandsOf<E>& w, const Panels<E>& panels, const Kernels& k,
                    const Pool& pool) {
  if (w.crow) return csr_panels(p, {w.values, w.crow, w.col}, panels, k, pool);
  Scratch<int32_t> crow(Role::bits, w.rows + 1);
  for (int64_t r = 0; r <= w.rows; ++r) crow.get()[r] = static_cast<int32_t>(r * w.count);
  csr_panels(p, {w.values, crow.get(), w.col}, panels, k, pool);
}

// The entries of padding columns are zero, also if the gradient of the output is infinite.
void clear_padding(const Bands& w, int64_t in, float* out) {
  for (int64_t band = 0; band < w.bands(); ++band) {
    const int32_t* col = w.crow ? w.col : w.col + band * w.count;
    const int64_t begin = w.crow ? w.crow[band] : 0, end = w.crow ? w.crow[band + 1] : w.count;
    for (int64_t e = end; e > begin && (col[e - 1] + 1) * w.width > in; --e)
      for (int64_t r = band * w.height; r < std::min((band + 1) * w.height, w.rows); ++r) {
        float* row = w.crow ? out + ((e - 1) * w.height + r % w.height) * w.width : out + r * w.count + e - 1;
        std::fill(row + std::max<int64_t>(0, in - col[e - 1] * w.width), row + w.width, 0.0f);
      }
  }
}

}  // namespace

template <typename E>
void bands_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const Dots<E>& dots, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  if (p.tokens <= std::min<int64_t>(most_dots(w.height, w.crow ? w.width : 0), dots.few_tokens))
    return dots_linear(p, w, dots, k, pool);
  pool.threads = useful_threads(pool.threads, entries(w) * p.tokens);
  const bool single = w.height == 1 && w.width == 1 && 0 < p.in && p.in == w.columns && entries(w) < INT32_MAX;
  if (single && p.tokens > (kRepackPanels - 1) * kMaxVectors * k.width)
    return single_entries(p, w, dots.panels, k, pool);
  many_tokens(p, w, dots.panels, k, pool);
}

template void bands_linear(const Problem&, const Bands&, const Dots<float>&, const Kernels&, Pool);
template void bands_linear(const ProblemOf<bf16>&, const BandsOf<bf16>&, const Dots<bf16>&, const Kernels&, Pool);

namespace {

// Single entries in single rows, sorted by columns, as a CSR weight of the transposed product.
void transposed_linear(const Problem& p, const Bands& w, const Kernels& k, const Pool& pool) {
  const int64_t all = w.crow ? w.crow[w.rows] : w.rows * w.count;
  Scratch<float> values(Role::values, all);
  Scratch<int32_t> index(Role::index, w.columns + 1 + all);
  int32_t *crow = index.get(), *row = crow + w.columns + 1;
  std::fill(crow, crow + w.columns + 1, 0);
  for (int64_t i = 0; i < all; ++i) ++crow[w.col[i]];
  for (int64_t c = 1; c <= w.columns; ++c) crow[c] += crow[c - 1];
  for (int64_t r = w.rows; r-- > 0;) {    // backwards, so that each offset ends up as the first one of its column
    const int64_t begin = w.crow ? w.crow[r] : r * w.count, end = w.crow ? w.crow[r + 1] : begin + w.count;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t to = --crow[w.col[i]];
      values.get()[to] = w.values[i];
      row[to] = static_cast<int32_t>(r);
    }
  }
  csr_linear(p, {values.get(), crow, row}, k, pool);
}

}  // namespace

void bands_grad_input(const Problem& p, const Bands& w, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  if (w.height == 1 && w.width == 1 && p.tokens >= kTransposeTokens && entries(w) < INT32_MAX)
    return transposed_linear(p, w, k, pool);
  pool.threads = useful_threads(pool.threads, entries(w) * p.tokens);
  const int64_t row_floats = panel_floats(k, p.tokens);
  // with few tokens, threads share the columns
  const int64_t parts = ceil_div(p.tokens, row_floats) < 4 * pool.threads ? pool.threads : 1;
  const Cuts cuts(w, block_columns(w, row_floats, parts), pool);
  const Grid grid = make_grid(p, k, pool.threads, 1, cuts.blocks());
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<float> panel(Role::panel, w.rows * row_floats), acc(Role::sums, cuts.columns() * row_floats);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task / grid.pieces * grid.panel_tokens, count = std::min(grid.panel_tokens, p.tokens - t0);
      const int v = static_cast<int>(ceil_div(count, k.width));
      if (loaded != t0) k.load_panel(p.x + t0 * p.in, p.in, count, w.rows, v, panel.get());
      loaded = t0;
      const Range blocks = part(cuts.blocks(), grid.pieces, task % grid.pieces);
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int64_t k0 = b * cuts.columns(), real = std::min(cuts.columns(), p.out - k0);
        std::memset(acc.get(), 0, cuts.columns() * v * k.width * sizeof(float));
        k.bands_input(w, cuts.range(b, 0, w.rows), panel.get(), v, acc.get());
        if (real > 0) k.store_panel(acc.get(), real, count, v, p.y + t0 * p.out + k0, p.out);
      }
    }
  });
}

// A dot product over few tokens would spend its time on the sum at its end.
static void few_tokens_grad_values(const float* grad, const float* x, int64_t tokens, int64_t in, const Bands& w,
                                   float* out, const Kernels& k, const Pool& pool) {
  const int64_t ld = w.columns + kTokenPadding, units = ceil_div(w.rows, kUnit);
  const int64_t pieces = std::min<int64_t>(pool.threads, units);
  Scratch<float> xs(Role::small, tokens * ld);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = xs.get() + t * ld;
    std::copy(x + t * in, x + (t + 1) * in, row);
    std::fill(row + in, row + ld, 0.0f);
  }
  pool.each(pieces, [&](int64_t begin, int64_t end) {
    const Range rows{piece_rows(w.rows, pieces, begin).begin, piece_rows(w.rows, pieces, end - 1).end};
    Scratch<float> scratch(Role::sums, tokens * (w.count + kTokenPadding));
    k.bands_values_few(w, rows.begin, rows.end, grad, xs.get(), ld, tokens, scratch.get(), out);
  });
}

static void many_tokens_grad_values(const float* grad, const float* x, int64_t tokens, int64_t in, const Bands& w,
                                    float* out, const Kernels& k, const Pool& pool) {
  const int64_t row_floats = panel_floats(k, tokens), panels = ceil_div(tokens, row_floats);
  const int v = static_cast<int>(row_floats / k.width);
  const int64_t together = std::min(kLongPanels, panels), units = ceil_div(w.rows, kUnit);
  const Cuts cuts(w, block_columns(w, row_floats), pool);
  const int64_t pieces = std::min<int64_t>(pool.threads, units);
  pool.each(pieces, [&](int64_t begin, int64_t end) {
    const Range rows{piece_rows(w.rows, pieces, begin).begin, piece_rows(w.rows, pieces, end - 1).end};
    const int64_t count = rows.end - rows.begin;
    const int64_t x_step = w.columns * row_floats + kSkew, grad_step = count * row_floats + kSkew;
    Scratch<float> xs(Role::panel, together * x_step), gs(Role::sums, together * grad_step);
    const LongPanel x_panel{xs.get(), x_step}, grad_panel{gs.get(), grad_step};
    for (int64_t panel = 0; panel < panels; panel += together) {
      const int64_t now = std::min(together, panels - panel);
      for (int64_t i = 0; i < now; ++i) {
        const int64_t t0 = (panel + i) * row_floats, some = std::min(row_floats, tokens - t0);
        load_columns(k.dots.panels, k.width, x + t0 * in, in, some, 0, w.columns, v, xs.get() + i * x_panel.step);
        k.load_panel(grad + t0 * w.rows + rows.begin, w.rows, some, count, v, gs.get() + i * grad_panel.step);
      }
      for (int64_t b = 0; b < cuts.blocks(); ++b)
        k.bands_values(w, cuts.range(b, rows.begin, rows.end), grad_panel, x_panel, now, v, out);
    }
  });
}

void bands_grad_values(const float* grad, const float* x, int64_t tokens, int64_t in, const Bands& w, float* out,
                       const Kernels& k, Pool pool) {
  if (tokens == 0 || w.rows == 0 || w.columns == 0) return;
  pool.threads = useful_threads(pool.threads, entries(w) * tokens);
  const bool few = w.height >= kSharedRows && tokens <= (w.crow ? kFewTokens : kFewTokens / 2);
  auto run = few ? few_tokens_grad_values : many_tokens_grad_values;
  run(grad, x, tokens, in, w, out, k, pool);
  if (in < w.columns) clear_padding(w, in, out);
}

}  // namespace sten
