// The bounds of a pattern: after these checks no kernel reads or writes beyond its operands.
//
// Each is one pass over the index. The Python side passes `trusted` while the pattern is the one, in the version, that
// its last call checked; any other caller pays for a check at every call.
#include <atomic>

#include "linear.h"

namespace sten {

bool csr_in_bounds(const Csr& w, int64_t rows, int64_t slots, int64_t in, const Pool& pool) {
  std::atomic<bool> good{w.crow[0] == 0};
  if (rows == 0) return good;
  const int64_t tasks = std::min<int64_t>(useful_threads(pool.threads, static_cast<double>(slots)), rows);
  pool.each(tasks, [&](int64_t first, int64_t last) {
    const Range own{part(rows, tasks, first).begin, part(rows, tasks, last - 1).end};
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t begin = w.crow[r], end = w.crow[r + 1];
      if (begin < 0 || begin > end || end > slots) {
        good = false;
        return;
      }
      if (begin == end) continue;
      // ascending, so that the first and the last column tell the range
      bool falls = w.col[begin] < 0 || w.col[end - 1] >= in;
      for (int64_t i = begin + 1; i < end; ++i) falls |= w.col[i] <= w.col[i - 1];
      if (falls) good = false;
    }
  });
  return good;
}

bool bands_in_bounds(const Bands& w, int64_t entries, const Pool& pool) {
  const int64_t bands = w.bands(), limit = w.columns / w.width;
  if (w.crow) return csr_in_bounds({nullptr, w.crow, w.col}, bands, entries, limit, pool);
  std::atomic<bool> good{true};
  if (bands == 0 || w.count == 0) return true;
  const int64_t tasks = std::min<int64_t>(useful_threads(pool.threads, static_cast<double>(bands) * w.count), bands);
  pool.each(tasks, [&](int64_t first, int64_t last) {
    for (int64_t band = part(bands, tasks, first).begin; band < part(bands, tasks, last - 1).end; ++band) {
      const int32_t* col = w.col + band * w.count;
      bool falls = col[0] < 0 || col[w.count - 1] >= limit;
      for (int64_t i = 1; i < w.count; ++i) falls |= col[i] <= col[i - 1];
      if (falls) good = false;
    }
  });
  return good;
}

bool grouped_in_bounds(const Grouped& w, const Pool& pool) {
  const int64_t slots = w.chunks * w.strips * w.columns();
  const uint32_t columns = static_cast<uint32_t>(w.columns());
  std::atomic<bool> good{true};
  const int64_t tasks = useful_threads(pool.threads, static_cast<double>(slots));
  if (slots == 0) return true;
  pool.each(tasks, [&](int64_t first, int64_t last) {
    bool beyond = false;
    const int64_t end = part(slots, tasks, last - 1).end;
    for (int64_t i = part(slots, tasks, first).begin; i < end; ++i)
      beyond |= static_cast<uint16_t>(w.index[i]) >= columns;
    if (beyond) good = false;
  });
  return good;
}

}  // namespace sten
