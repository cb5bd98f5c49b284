// GroupedNM: y = x W^T + bias.
//
// Letters: a chunk holds P * g columns, a strip m rows; S floats in a panel line.
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "linear.h"

namespace sten {
namespace {

constexpr int64_t kPanelBytes = 40 << 10;    // activations of one block: most of a 48 KB first-level cache
constexpr int64_t kAccRows = 4096;           // rows of accumulators: 1 MB at 64 tokens, half a second-level cache
constexpr int64_t kTokenFloats = 4096;       // one token: partial sums kept in the first-level cache

// Appends A(m, n), reversed if asked, each with `high` (elements above m - 1, descending) added.
void revolve(int m, int n, bool reversed, std::vector<int32_t>& high, std::vector<int32_t>& out) {
  auto lowest = [&] {
    for (int i = 0; i < n; ++i) out.push_back(i);
    out.insert(out.end(), high.rbegin(), high.rend());
  };
  if (n == 0) return lowest();
  if (!reversed) lowest();
  for (int i = n; i < m; ++i) {
    const int k = reversed ? m - 1 - (i - n) : i;
    high.push_back(k);
    revolve(k, n - 1, !reversed, high, out);
    high.pop_back();
  }
  if (reversed) lowest();
}

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
  Buffer<int32_t> spread(static_cast<int64_t>(w.n) * k.width);
  for (int phase = 0; phase < w.n; ++phase)
    for (int l = 0; l < k.width; ++l) spread.get()[phase * k.width + l] = (phase + l) / w.n;
  Buffer<float> copy;
  const float* x = p.x;
  if (padded != p.in) {    // the last chunk's padding columns have a place of their own, and it is zero
    copy = Buffer<float>(padded);
    std::memcpy(copy.get(), p.x, p.in * sizeof(float));
    std::memset(copy.get() + p.in, 0, (padded - p.in) * sizeof(float));
    x = copy.get();
  }
  const int64_t tasks = std::min<int64_t>(pool.threads, w.strips);
  pool.each(tasks, [&](int64_t begin, int64_t end) {
    Buffer<float> acc(together * block), gathered(columns + k.width);
    std::memset(gathered.get(), 0, (columns + k.width) * sizeof(float));
    const int64_t last = w.strips * end / tasks;
    for (int64_t s = w.strips * begin / tasks; s < last; s += together) {
      const int64_t stop = std::min(s + together, last);
      std::memset(acc.get(), 0, (stop - s) * block * sizeof(float));
      for (int64_t c = 0; c < w.chunks; ++c)
        k.grouped_token(w, c, s, stop, x + c * columns, spread.get(), gathered.get(), acc.get());
      token_rows(p, w, s, stop, acc.get());
    }
  });
}

// One panel of tokens, strips s0 to s1 - 1.
void panel_task(const Problem& p, const Grouped& w, const Kernels& k, int64_t t0, int64_t tokens, int64_t s0,
                int64_t s1, float* panel, float* acc, int64_t strips_at_once, int64_t panel_bytes) {
  const int v = static_cast<int>(ceil_div(tokens, k.width));
  const int64_t line = static_cast<int64_t>(v) * k.width, columns = w.columns();
  const int64_t step = std::max<int64_t>(1, panel_bytes / (columns * line * static_cast<int64_t>(sizeof(float))));
  for (int64_t s = s0; s < s1; s += strips_at_once) {
    const int64_t stop = std::min(s + strips_at_once, s1), r0 = s * w.m, rows = (stop - s) * w.m;
    fill_panel(p, r0, rows, line, acc);
    for (int64_t c = 0; c < w.chunks; c += step) {
      const int64_t end = std::min(c + step, w.chunks), k0 = c * columns, width = (end - c) * columns;
      const int64_t real = std::min(width, p.in - k0);
      k.load_panel(p.x + t0 * p.in + k0, p.in, tokens, real, v, panel);
      std::memset(panel + real * line, 0, (width - real) * line * sizeof(float));
      k.grouped_block(w, c, end, s, stop, panel, v, acc);
    }
    k.store_panel(acc, std::min(rows, p.out - r0), tokens, v, p.y + t0 * p.out + r0, p.out);
  }
}

void many_tokens(const Problem& p, const Grouped& w, const Kernels& k, const Pool& pool) {
  const Grid grid = make_grid(p, k, pool.threads, w.strips);
  const int64_t most = kMaxVectors * k.width, columns = w.columns();
  const int64_t panel_floats = std::max(kPanelBytes / static_cast<int64_t>(sizeof(float)), columns * most);
  const int64_t strips_at_once =
      std::min(ceil_div(w.strips, grid.pieces), std::max<int64_t>(1, kAccRows / w.m));
  pool.each(grid.tasks(), [&](int64_t begin, int64_t end) {
    Buffer<float> panel(panel_floats), acc(strips_at_once * w.m * most);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task / grid.pieces * grid.panel_tokens, piece = task % grid.pieces;
      const int64_t tokens = std::min(grid.panel_tokens, p.tokens - t0);
      const int64_t s0 = w.strips * piece / grid.pieces, s1 = w.strips * (piece + 1) / grid.pieces;
      panel_task(p, w, k, t0, tokens, s0, s1, panel.get(), acc.get(), strips_at_once, kPanelBytes);
    }
  });
}

}  // namespace

const std::vector<int32_t>& patterns(int n, int m) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, std::vector<int32_t>> made;    // references into a map stay valid
  const std::lock_guard<std::mutex> lock(mutex);
  auto [found, fresh] = made.try_emplace({n, m});
  if (fresh) {
    std::vector<int32_t> high;
    revolve(m, n, false, high, found->second);
  }
  return found->second;
}

void grouped_linear(const Problem& p, const Grouped& w, const Kernels& k, Pool pool) {
  const double kept = static_cast<double>(w.chunks) * w.strips * w.columns() * w.n;
  pool.threads = useful_threads(pool.threads, kept * p.tokens);
  if (p.tokens == 1) return one_token(p, w, k, pool);
  many_tokens(p, w, k, pool);
}

}  // namespace sten
