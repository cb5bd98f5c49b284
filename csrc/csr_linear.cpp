// CSR: y = x W^T + bias.
//
// Few tokens read the stored format as it is. Many tokens are worth repacking it, once a call: the columns are cut into
// k-blocks whose activations fit the first-level cache, and inside each the rows are sorted by their count and put
// together in groups that run in step.
//
// Letters: B columns in a k-block, S floats in a panel line.
#include <cstring>

#include "linear.h"

namespace sten {
namespace {

constexpr int64_t kBlock = 128;         // B: 32 KB at 64 tokens
constexpr int64_t kTileRows = 4096;     // rows of accumulators: 1 MB at 64 tokens, half a second-level cache
constexpr int64_t kRepackPanels = 2;    // from this many panels on, repacking pays

// The rows r0 to r0 + rows - 1 of one k-block, repacked.
struct Packed {
  CsrBlock view;
  Buffer<int32_t> count, row;
  Buffer<uint16_t> col;
  Buffer<float> value;
};

// where[b, r] = first entry of row r0 + r whose column is at least b * B, for b = 0 to blocks
void find_blocks(const Csr& w, int64_t r0, int64_t rows, int64_t begin, int64_t end, int64_t blocks, int32_t* where) {
  for (int64_t r = begin; r < end; ++r) {
    int32_t i = w.crow[r0 + r];
    const int32_t stop = w.crow[r0 + r + 1];
    for (int64_t b = 0; b < blocks; ++b) {
      where[b * rows + r] = i;
      const int64_t limit = (b + 1) * kBlock;
      while (i < stop && w.col[i] < limit) ++i;
    }
    where[blocks * rows + r] = stop;
  }
}

// order: the rows by falling count (a counting sort), with the dummy row `rows` filling up the last group
void sort_rows(const int32_t* first, const int32_t* last, int64_t rows, int group, int32_t* order) {
  int64_t place[kBlock + 2] = {};
  for (int64_t r = 0; r < rows; ++r) ++place[kBlock - (last[r] - first[r]) + 1];
  for (int64_t c = 0; c <= kBlock; ++c) place[c + 1] += place[c];
  for (int64_t r = 0; r < rows; ++r) order[place[kBlock - (last[r] - first[r])]++] = static_cast<int32_t>(r);
  for (int64_t r = rows; r % group; ++r) order[r] = static_cast<int32_t>(rows);
}

Packed pack(const Csr& w, int64_t block, int64_t rows, const int32_t* first, const int32_t* last, int group) {
  Packed out;
  const int64_t groups = ceil_div(rows, group);
  out.row = Buffer<int32_t>(groups * group);
  out.count = Buffer<int32_t>(groups);
  int32_t* order = out.row.get();
  sort_rows(first, last, rows, group, order);
  int64_t steps = 0, used = 0;
  for (int64_t q = 0; q < groups; ++q) {
    const int32_t r = order[q * group];
    out.count.get()[q] = last[r] - first[r];
    steps += last[r] - first[r];
    if (last[r] > first[r]) used = q + 1;    // groups of empty rows come last and are dropped
  }
  out.col = Buffer<uint16_t>(steps * group);
  out.value = Buffer<float>(steps * group);
  uint16_t* col = out.col.get();
  float* value = out.value.get();
  for (int64_t q = 0; q < used; ++q) {
    const int64_t n = out.count.get()[q];
    for (int l = 0; l < group; ++l) {
      const int32_t r = order[q * group + l];
      const int64_t from = r < rows ? first[r] : 0, own = r < rows ? last[r] - first[r] : 0;
      for (int64_t i = 0; i < own; ++i) {
        col[i * group + l] = static_cast<uint16_t>(w.col[from + i] - block * kBlock);
        value[i * group + l] = w.values[from + i];
      }
      for (int64_t i = own; i < n; ++i) {
        col[i * group + l] = kBlock;
        value[i * group + l] = 0.0f;
      }
    }
    col += n * group;
    value += n * group;
  }
  out.view = {used, out.count.get(), order, out.col.get(), out.value.get()};
  return out;
}

// The rows of tile `i` of `tiles`.
struct Tile {
  int64_t r0, rows;
};
Tile tile_of(int64_t out, int64_t tiles, int64_t i) {
  const int64_t r0 = out * i / tiles;
  return {r0, out * (i + 1) / tiles - r0};
}

std::vector<Packed> repack(const Problem& p, const Csr& w, const Kernels& k, const Pool& pool, int64_t tiles) {
  const int64_t blocks = ceil_div(p.in, kBlock);
  std::vector<Packed> packed(tiles * blocks);
  for (int64_t i = 0; i < tiles; ++i) {
    const auto [r0, rows] = tile_of(p.out, tiles, i);
    Buffer<int32_t> where((blocks + 1) * rows);
    const int64_t cuts = std::min<int64_t>(rows, pool.threads * 4);
    pool.each(cuts, [&, r0 = r0, rows = rows](int64_t begin, int64_t end) {
      find_blocks(w, r0, rows, rows * begin / cuts, rows * end / cuts, blocks, where.get());
    });
    pool.each(blocks, [&, rows = rows](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int32_t* first = where.get() + b * rows;
        packed[i * blocks + b] = pack(w, b, rows, first, first + rows, k.rows_at_once);
      }
    });
  }
  return packed;
}

void many_tokens(const Problem& p, const Csr& w, const Kernels& k, const Pool& pool, const Grid& grid) {
  const int64_t tiles = std::max(grid.pieces, ceil_div(p.out, kTileRows)), blocks = ceil_div(p.in, kBlock);
  const std::vector<Packed> packed = repack(p, w, k, pool, tiles);
  const int64_t most = kMaxVectors * k.width;
  pool.each(grid.panels * tiles, [&](int64_t begin, int64_t end) {
    Buffer<float> panel((kBlock + 1) * most), acc((ceil_div(p.out, tiles) + 1) * most);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task / tiles * grid.panel_tokens, tile = task % tiles;
      const int64_t tokens = std::min(grid.panel_tokens, p.tokens - t0);
      const int v = static_cast<int>(ceil_div(tokens, k.width));
      const int64_t line = static_cast<int64_t>(v) * k.width;
      const auto [r0, rows] = tile_of(p.out, tiles, tile);
      std::memset(panel.get() + kBlock * line, 0, line * sizeof(float));
      fill_panel(p, r0, rows, line, acc.get());
      std::memset(acc.get() + rows * line, 0, line * sizeof(float));    // the dummy row
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t k0 = b * kBlock;
        k.load_panel(p.x + t0 * p.in + k0, p.in, tokens, std::min(kBlock, p.in - k0), v, panel.get());
        k.csr_block(packed[tile * blocks + b].view, panel.get(), v, acc.get());
      }
      k.store_panel(acc.get(), rows, tokens, v, p.y + t0 * p.out + r0, p.out);
    }
  });
}

void few_tokens(const Problem& p, const Csr& w, const Kernels& k, const Pool& pool, const Grid& grid) {
  const int64_t most = kMaxVectors * k.width;
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Buffer<float> panel(p.in * most), out(k.width * most);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task / grid.pieces * grid.panel_tokens, piece = task % grid.pieces;
      const int64_t tokens = std::min(grid.panel_tokens, p.tokens - t0);
      const int v = static_cast<int>(ceil_div(tokens, k.width));
      if (loaded != t0) k.load_panel(p.x + t0 * p.in, p.in, tokens, p.in, v, panel.get());
      loaded = t0;
      const auto [r0, rows] = tile_of(p.out, grid.pieces, piece);
      for (int64_t r = r0; r < r0 + rows; r += k.width) {
        const int64_t stop = std::min(r + k.width, r0 + rows);
        k.csr_rows(w, p.bias, r, stop, panel.get(), v, out.get());
        k.store_panel(out.get(), stop - r, tokens, v, p.y + t0 * p.out + r, p.out);
      }
    }
  });
}

void one_token(const Problem& p, const Csr& w, const Kernels& k, const Pool& pool) {
  const int64_t tasks = std::min<int64_t>(pool.threads, p.out);
  pool.each(tasks, [&](int64_t begin, int64_t end) {
    k.csr_token(w, p.bias, p.out * begin / tasks, p.out * end / tasks, p.x, p.y);
  });
}

}  // namespace

Grid make_grid(const Problem& p, const Kernels& k, int threads, int64_t most_pieces) {
  Grid grid;
  grid.panel_tokens = std::min<int64_t>(kMaxVectors * k.width, ceil_div(p.tokens, k.width) * k.width);
  grid.panels = ceil_div(p.tokens, grid.panel_tokens);
  double least = 1e9;
  grid.pieces = 1;
  // Every piece transposes its panel anew, so take the fewest that leave no thread idle for long.
  for (int64_t pieces = 1; pieces <= std::min<int64_t>(2 * threads, most_pieces); ++pieces) {
    const int64_t tasks = grid.panels * pieces;
    const double waste = static_cast<double>(ceil_div(tasks, threads) * threads) / static_cast<double>(tasks);
    if (waste < least - 0.05) {
      least = waste;
      grid.pieces = pieces;
    }
  }
  return grid;
}

void fill_panel(const Problem& p, int64_t r0, int64_t rows, int64_t line, float* acc) {
  if (!p.bias) {
    std::memset(acc, 0, rows * line * sizeof(float));
    return;
  }
  for (int64_t r = r0; r < r0 + rows; ++r, acc += line) std::fill(acc, acc + line, r < p.out ? p.bias[r] : 0.0f);
}

void csr_linear(const Problem& p, const Csr& w, const Kernels& k, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(w.crow[p.out]) * p.tokens);
  if (p.tokens == 1) return one_token(p, w, k, pool);
  const Grid grid = make_grid(p, k, pool.threads, p.out);
  if (grid.panels >= kRepackPanels) return many_tokens(p, w, k, pool, grid);
  few_tokens(p, w, k, pool, grid);
}

}  // namespace sten
