// CSR: y = x W^T + bias.
//
// For few tokens the kernel reads the stored format. For many tokens it is repacked, once per call: the columns are
// split into k-blocks whose activations fit the first-level cache, and inside each the rows are sorted by their count
// and combined in groups of equal length.
//
// Letters: B columns in a k-block, L rows in a group, T entries of a row together (pairs of bfloat16).
#include <cstring>
#include <optional>
#include <stdexcept>

#include "linear.h"

namespace sten {
namespace {

template <typename E>
constexpr int64_t kBlock = 128 * kTogether<E>;    // B: 32 KB at 64 tokens
constexpr int64_t kOwnRows = 256;       // rows from which on a thread transposes activations for itself

// One repacked k-block of one piece of rows; row and count are stored before it, see Repacked.
template <typename E>
struct Packed {
  int64_t groups, steps;
  int32_t *row, *count;
  uint16_t* col;
  E* value;
};

// order: the rows by falling count (a counting sort), with the dummy row `rows` filling up the last group
template <int64_t kMost>
void sort_rows(const int32_t* first, const int32_t* last, int64_t rows, int group, int32_t* order) {
  int64_t start[kMost + 2] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t count = last[r] - first[r];
    if (count > kMost)
      throw std::invalid_argument("sten::csr_linear: Expected columns that ascend within a row, got others");
    ++start[kMost - count + 1];
  }
  for (int64_t c = 0; c <= kMost; ++c) start[c + 1] += start[c];
  for (int64_t r = 0; r < rows; ++r) order[start[kMost - (last[r] - first[r])]++] = static_cast<int32_t>(r);
  for (int64_t r = rows; r % group; ++r) order[r] = static_cast<int32_t>(rows);
}

// One group: entry i of row l is stored at (i / T * L + l) * T + i % T; short rows are filled up with the row of zeros.
template <typename E>
void fill_group(const CsrOf<E>& w, int64_t k0, int64_t steps, int group, const int32_t* from, const int32_t* own,
                uint16_t* col, E* value) {
  constexpr int T = kTogether<E>;
  const int64_t common = own[group - 1] / T;
  for (int64_t i = 0; i < common; ++i)
    for (int l = 0; l < group; ++l)
      for (int t = 0; t < T; ++t) {
        *col++ = static_cast<uint16_t>(w.col[from[l] + i * T + t] - k0);
        *value++ = w.values[from[l] + i * T + t];
      }
  for (int64_t i = common; i < steps; ++i)
    for (int l = 0; l < group; ++l)
      for (int t = 0; t < T; ++t) {
        const bool real = i * T + t < own[l];
        *col++ = static_cast<uint16_t>(real ? w.col[from[l] + i * T + t] - k0 : kBlock<E>);
        *value++ = real ? w.values[from[l] + i * T + t] : E{};
      }
}

// The rows `all`: pieces of rows times k-blocks.
template <typename E>
class Repacked {
 public:
  Repacked(const CsrOf<E>& w, int64_t in, Range all, int group, const Pool& pool, int64_t pieces)
      : r0_(all.begin),
        out_(all.end - all.begin),
        blocks_(ceil_div(in, kBlock<E>)),
        pieces_(pieces),
        group_(group),
        packed_(pieces * blocks_),
        where_(Role::cuts, (blocks_ + 1) * out_),
        // a piece of n rows has at most n + L - 1 slots and as many counts
        orders_(Role::small, 2 * blocks_ * (out_ + pieces * group_)) {
    const int64_t cuts = std::min<int64_t>(out_, pool.threads * 4);
    pool.each(cuts, [&](int64_t begin, int64_t end) {
      find_blocks(w, part(out_, cuts, begin).begin, part(out_, cuts, end - 1).end);
    });
    pool.each(pieces * blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) plan(i);
    });
    int64_t entries = 0;
    for (const Packed<E>& q : packed_) entries += q.steps * group_ * kTogether<E>;
    entries_.emplace(Role::repacked, entries * (sizeof(E) + sizeof(uint16_t)));
    E* value = reinterpret_cast<E*>(entries_->get());
    uint16_t* col = reinterpret_cast<uint16_t*>(value + entries);
    for (Packed<E>& q : packed_) {
      q.value = value;
      q.col = col;
      value += q.steps * group_ * kTogether<E>;
      col += q.steps * group_ * kTogether<E>;
    }
    pool.each(pieces * blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill(w, i);
    });
  }

  int64_t blocks() const { return blocks_; }
  Range rows(int64_t piece) const {
    const Range r = part(out_, pieces_, piece);
    return {r0_ + r.begin, r0_ + r.end};
  }
  CsrBlockOf<E> block(int64_t piece, int64_t b) const {
    const Packed<E>& q = packed_[piece * blocks_ + b];
    return {q.groups, q.count, q.row, q.col, q.value};
  }

 private:
  void find_blocks(const CsrOf<E>& w, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int32_t i = w.crow[r0_ + r];
      const int32_t stop = w.crow[r0_ + r + 1];
      for (int64_t b = 0; b < blocks_; ++b) {
        where_.get()[b * out_ + r] = i;
        const int64_t limit = (b + 1) * kBlock<E>;
        while (i < stop && w.col[i] < limit) ++i;
      }
      where_.get()[blocks_ * out_ + r] = stop;
    }
  }

  void plan(int64_t i) {
    const int64_t b = i % blocks_;
    const Range r = part(out_, pieces_, i / blocks_);
    const int64_t groups = ceil_div(r.end - r.begin, group_);
    const int32_t *first = where_.get() + b * out_ + r.begin, *last = first + out_;
    Packed<E>& q = packed_[i];
    q.row = orders_.get() + 2 * (b * (out_ + pieces_ * group_) + r.begin + i / blocks_ * group_);
    q.count = q.row + groups * group_;
    sort_rows<kBlock<E>>(first, last, r.end - r.begin, group_, q.row);
    q.steps = q.groups = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t longest = q.row[g * group_];
      q.count[g] = static_cast<int32_t>(ceil_div(last[longest] - first[longest], kTogether<E>));
      q.steps += q.count[g];
      if (q.count[g] || b == 0) q.groups = g + 1;    // the first block starts every row; later ones skip empty rows
    }
  }

  void fill(const CsrOf<E>& w, int64_t i) {
    const int64_t b = i % blocks_;
    const Range r = part(out_, pieces_, i / blocks_);
    const int32_t *first = where_.get() + b * out_ + r.begin, *last = first + out_;
    const Packed<E>& q = packed_[i];
    uint16_t* col = q.col;
    E* value = q.value;
    for (int64_t g = 0; g < q.groups; ++g) {
      int32_t from[kMostGroup], own[kMostGroup];
      for (int l = 0; l < group_; ++l) {
        const int32_t row = q.row[g * group_ + l];
        const bool real = row < r.end - r.begin;
        from[l] = real ? first[row] : 0;
        own[l] = real ? last[row] - first[row] : 0;
      }
      fill_group(w, b * kBlock<E>, q.count[g], group_, from, own, col, value);
      col += q.count[g] * group_ * kTogether<E>;
      value += q.count[g] * group_ * kTogether<E>;
    }
  }

  static constexpr int kMostGroup = 8;
  int64_t r0_, out_, blocks_, pieces_;
  int group_;
  std::vector<Packed<E>> packed_;
  Scratch<int32_t> where_;     // (blocks + 1, out): where[b, r] = first entry of row r from column b * B on
  Scratch<int32_t> orders_;
  std::optional<Scratch<char>> entries_;
};

template <typename E>
void panel_task(const ProblemOf<E>& p, const Panels<E>& panels, const Kernels& k, const Repacked<E>& w, int64_t piece,
                Range tokens, E* panel, float* start, float* acc) {
  const int64_t count = tokens.end - tokens.begin;
  const int v = static_cast<int>(ceil_div(count, k.width));
  const int64_t row_floats = static_cast<int64_t>(v) * k.width;
  std::memset(panel + kBlock<E> * row_floats, 0, row_floats * sizeof(E));
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const int64_t k0 = b * kBlock<E>;
    panels.load(p.x + tokens.begin * p.in + k0, p.in, count, std::min(kBlock<E>, p.in - k0), v, panel);
    panels.csr(w.block(piece, b), b == 0 ? start : nullptr, panel, v, acc);
  }
  store_and_finish(p, acc, w.rows(piece), tokens, panels, k);
}

// Tasks begin to end - 1 of the grid, piece after piece, so that the weights of a piece stay in the second-level cache
// from panel to panel.
template <typename E>
void panel_tasks(const ProblemOf<E>& p, const Panels<E>& panels, const Kernels& k, const Repacked<E>& w, const Grid& grid,
                 int64_t begin, int64_t end) {
  const Range first = w.rows(0), last = w.rows(grid.pieces - 1);
  const int64_t most = grid.panel_tokens, most_rows = ceil_div(last.end - first.begin, grid.pieces) + 1;
  Scratch<E> panel(Role::panel, (kBlock<E> + 1) * most);
  Scratch<float> acc(Role::sums, most_rows * (most + 1));
  float* start = acc.get() + most_rows * most;    // one more row than there are: the dummy
  for (int64_t task = begin; task < end; ++task) {
    const int64_t piece = task / grid.panels, t0 = task % grid.panels * grid.panel_tokens;
    const Range rows = w.rows(piece);
    fill_start(p, rows.begin, rows.end - rows.begin, start);
    start[rows.end - rows.begin] = 0.0f;
    panel_task(p, panels, k, w, piece, {t0, std::min(t0 + grid.panel_tokens, p.tokens)}, panel.get(), start, acc.get());
  }
}

void few_tokens(const Problem& p, const Csr& w, const Kernels& k, const Pool& pool, const Grid& grid) {
  const int64_t most = grid.panel_tokens;
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<float> panel(Role::panel, p.in * most), out(Role::sums, k.width * most);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task / grid.pieces * grid.panel_tokens;
      const int64_t tokens = std::min(grid.panel_tokens, p.tokens - t0);
      const int v = static_cast<int>(ceil_div(tokens, k.width));
      if (loaded != t0) k.load_panel(p.x + t0 * p.in, p.in, tokens, p.in, v, panel.get());
      loaded = t0;
      const Range rows = part(p.out, grid.pieces, task % grid.pieces);
      for (int64_t r = rows.begin; r < rows.end; r += k.width) {
        const int64_t stop = std::min<int64_t>(r + k.width, rows.end);
        k.csr_rows(w, p.bias, r, stop, panel.get(), v, out.get());
        k.store_panel(out.get(), stop - r, tokens, v, p.y + t0 * p.out + r, p.out);
      }
      finish_rows(p, rows, {t0, t0 + tokens}, k);
    }
  });
}

void one_token(const Problem& p, const Csr& w, const Kernels& k, const Pool& pool) {
  const int64_t tasks = std::min<int64_t>(pool.threads, p.out);
  pool.each(tasks, [&](int64_t begin, int64_t end) {
    const Range rows{part(p.out, tasks, begin).begin, part(p.out, tasks, end - 1).end};
    k.csr_token(w, p.bias, rows.begin, rows.end, p.x, p.y);
    finish_rows(p, rows, {0, 1}, k);
  });
}

}  // namespace

template <typename E>
void csr_panels(const ProblemOf<E>& p, const CsrOf<E>& w, const Panels<E>& panels, const Kernels& k, Pool pool) {
  const Problem sizes = sizes_of(p);
  const int64_t least = std::min(pieces_for_cache(sizes, k), p.out), own = ceil_div(least, pool.threads) * pool.threads;
  Grid grid = make_grid(sizes, k, pool.threads, least, p.out);
  // With enough rows per thread, each repacks and multiplies its own, without waiting for others.
  if (pool.threads == 1 || p.out >= own * kOwnRows) {
    const Pool one_thread{1, nullptr};
    grid.pieces = 1;
    return pool.each(own, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Repacked<E> repacked(w, p.in, part(p.out, own, i), k.rows_at_once, one_thread, 1);
        panel_tasks(p, panels, k, repacked, grid, 0, grid.tasks());
      }
    });
  }
  const Repacked<E> repacked(w, p.in, {0, p.out}, k.rows_at_once, pool, grid.pieces);
  pool.each(grid.tasks(),
            [&](int64_t begin, int64_t end) { panel_tasks(p, panels, k, repacked, grid, begin, end); });
}

template void csr_panels(const Problem&, const Csr&, const Panels<float>&, const Kernels&, Pool);
template void csr_panels(const ProblemOf<bf16>&, const CsrOf<bf16>&, const Panels<bf16>&, const Kernels&, Pool);

void csr_linear(const Problem& p, const Csr& w, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  pool.threads = useful_threads(pool.threads, static_cast<double>(w.crow[p.out]) * p.tokens);
  if (p.tokens == 1) return one_token(p, w, k, pool);
  const Grid few = make_grid(p, k, pool.threads, 1, p.out);
  if (p.in == 0 || few.panels < kRepackPanels) return few_tokens(p, w, k, pool, few);
  csr_panels(p, w, k.dots.panels, k, pool);
}

}  // namespace sten
