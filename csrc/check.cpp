// The bounds of a pattern: after these checks no kernel reads or writes beyond its operands.
//
// Each is one pass over the index. register_direct.cpp passes `trusted` while the pattern is the one, in the version, that
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

namespace {

// body(row, the row's first entry, its end) for all rows
template <typename F>
void each_row(const Bands& w, const Pool& pool, F&& body) {
  const int64_t tasks = std::min<int64_t>(useful_threads(pool.threads, entries(w)), w.rows);
  pool.each(tasks, [&](int64_t first, int64_t last) {
    for (int64_t r = part(w.rows, tasks, first).begin; r < part(w.rows, tasks, last - 1).end; ++r)
      body(r, w.crow ? w.crow[r] : r * w.count, w.crow ? w.crow[r + 1] : (r + 1) * w.count);
  });
}

// The end of the group that begins with entry i.
int64_t group_end(const int32_t* col, int64_t i, int64_t end) {
  const int64_t limit = col[i] / 32 * 32 + kWindow;
  end = std::min<int64_t>(end, i + kGroup);
  while (i < end && col[i] < limit) ++i;
  return i;
}

}  // namespace

void set_bits(const Bands& w, uint32_t* bits, const Pool& pool) {
  const int64_t words = ceil_div(w.columns, 32);
  each_row(w, pool, [&](int64_t r, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) bits[r * words + (w.col[i] >> 5)] |= 1u << (w.col[i] & 31);
  });
}

void count_windows(const Bands& w, int32_t* counts, const Pool& pool) {
  each_row(w, pool, [&](int64_t r, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i = group_end(w.col, i, end)) ++counts[r + 1];
  });
}

void set_windows(const Bands& w, const int32_t* first, uint32_t* head, uint8_t* offset, const Pool& pool) {
  each_row(w, pool, [&](int64_t r, int64_t begin, int64_t end) {
    int64_t group = first[r];
    for (int64_t i = begin; i < end; ++group) {
      const int64_t stop = group_end(w.col, i, end);
      const int32_t base = w.col[i] / 32 * 32;
      head[group] = static_cast<uint32_t>(base) << 1 | static_cast<uint32_t>(stop - i);
      for (uint8_t* to = offset + group * kGroup; i < stop; ++i) *to++ = static_cast<uint8_t>(w.col[i] - base);
    }
  });
}

// Without a branch, so that the loops become vector instructions.
bool all_finite(const float* x, int64_t n) {
  uint32_t some = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    some |= (bits & 0x7f800000) == 0x7f800000;
  }
  return !some;
}

bool all_finite(const bf16* x, int64_t n) {
  uint16_t some = 0;
  for (int64_t i = 0; i < n; ++i) some |= (static_cast<uint16_t>(x[i]) & 0x7f80) == 0x7f80;
  return !some;
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
