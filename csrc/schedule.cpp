// Shared by the drivers: scratch memory, the grid of tasks, GroupedNM's patterns.
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "linear.h"

namespace sten {
namespace {

constexpr std::align_val_t kLine{64};
constexpr size_t kMaxCached = 16u << 20;         // bytes that a thread caches for each role
constexpr int64_t kSumBytes = 448 << 10;        // sums of one piece and panel: a quarter of a 2 MB second-level cache

struct ScratchCache {
  void* memory[static_cast<int>(Role::count)] = {};
  size_t capacity[static_cast<int>(Role::count)] = {};
  ~ScratchCache() {
    for (void* m : memory)
      if (m) ::operator delete(m, kLine);
  }
};
thread_local ScratchCache cache;

// Appends A(m, n), reversed if `reversed`, each subset with `high` (elements above m - 1, descending) added.
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

std::vector<int32_t> exchanges_of(const std::vector<int32_t>& rows, int n) {
  std::vector<int32_t> exchanges, rows_held(rows.begin(), rows.begin() + n);
  for (size_t p = 0; p < rows.size(); p += n) {
    const auto first = rows.begin() + p, last = first + n;
    int32_t position = 0, added = rows_held[0];
    for (int i = 0; i < n; ++i)
      if (!std::binary_search(first, last, rows_held[i])) position = i;
    for (auto r = first; r != last; ++r)
      if (std::find(rows_held.begin(), rows_held.end(), *r) == rows_held.end()) added = *r;
    rows_held[position] = added;
    exchanges.insert(exchanges.end(), {position, added});
    for (int i = 0; i < n; ++i)
      exchanges.push_back(static_cast<int32_t>(std::lower_bound(first, last, rows_held[i]) - first));
  }
  return exchanges;
}

// The sanitizer build detects reads of uninitialized memory, and accesses out of bounds.
#ifdef STEN_POISON
constexpr bool kPoison = true;
#else
constexpr bool kPoison = false;
#endif

}  // namespace

void* take_scratch(Role role, size_t bytes, size_t* capacity) {
  const int i = static_cast<int>(role);
  if (!kPoison && cache.memory[i] && cache.capacity[i] >= bytes) {
    *capacity = cache.capacity[i];
    return std::exchange(cache.memory[i], nullptr);
  }
  *capacity = kPoison ? bytes : std::max<size_t>(bytes, 64);
  void* memory = ::operator new(*capacity, kLine);
  if (kPoison) std::memset(memory, 0xff, bytes);    // NaN, or -1
  return memory;
}

void give_scratch(Role role, void* memory, size_t capacity) noexcept {
  const int i = static_cast<int>(role);
  if (!kPoison && capacity <= kMaxCached) {
    std::swap(memory, cache.memory[i]);
    cache.capacity[i] = capacity;
  }
  if (memory) ::operator delete(memory, kLine);
}

int64_t pieces_for_threads(int64_t tasks, int threads, int64_t least, int64_t most) {
  int64_t best = least;
  double smallest = HUGE_VAL;
  for (int64_t pieces = least; pieces <= std::min(least + 2 * threads, most); ++pieces) {
    const int64_t all = tasks * pieces;
    const double waste = static_cast<double>(ceil_div(all, threads) * threads) / static_cast<double>(all);
    if (waste < smallest - 0.05) {
      smallest = waste;
      best = pieces;
    }
  }
  return best;
}

Range piece_rows(int64_t out, int64_t pieces, int64_t i) {
  const Range units = part(ceil_div(out, kUnit), pieces, i);
  return {units.begin * kUnit, std::min(units.end * kUnit, out)};
}

Grid make_grid(const Problem& p, const Kernels& k, int threads, int64_t least, int64_t most) {
  Grid grid;
  grid.panel_tokens = std::min<int64_t>(kMaxVectors * k.width, ceil_div(p.tokens, k.width) * k.width);
  grid.panels = ceil_div(p.tokens, grid.panel_tokens);
  grid.pieces = pieces_for_threads(grid.panels, threads, least, most);
  return grid;
}

int64_t pieces_for_cache(const Problem& p, const Kernels& k) {
  const int64_t row_floats = std::min<int64_t>(kMaxVectors, ceil_div(p.tokens, k.width)) * k.width;
  return std::max<int64_t>(1, ceil_div(p.out * row_floats * static_cast<int64_t>(sizeof(float)), kSumBytes));
}

void fill_start(const Problem& p, int64_t r0, int64_t rows, float* start) {
  const int64_t real = p.bias ? std::min(rows, p.out - r0) : 0;
  if (real > 0) std::copy(p.bias + r0, p.bias + r0 + real, start);
  std::fill(start + real, start + rows, 0.0f);
}

const Patterns& patterns(int n, int m) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, Patterns> made;    // references into a map stay valid
  const std::lock_guard<std::mutex> lock(mutex);
  auto [entry, added] = made.try_emplace({n, m});
  if (added) {
    std::vector<int32_t> high;
    revolve(m, n, false, high, entry->second.rows);
    entry->second.exchanges = exchanges_of(entry->second.rows, n);
  }
  return entry->second;
}

}  // namespace sten
