// What the drivers share: scratch memory, the grid of tasks, GroupedNM's patterns.
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
constexpr size_t kMostKept = 16u << 20;         // bytes a thread keeps for each role
constexpr int64_t kSumBytes = 448 << 10;        // sums of one piece and panel: a quarter of a 2 MB second-level cache

struct Kept {
  void* memory[static_cast<int>(Role::count)] = {};
  size_t capacity[static_cast<int>(Role::count)] = {};
  ~Kept() {
    for (void* m : memory)
      if (m) ::operator delete(m, kLine);
  }
};
thread_local Kept kept;

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

std::vector<int32_t> walk_of(const std::vector<int32_t>& rows, int n) {
  std::vector<int32_t> walk, held(rows.begin(), rows.begin() + n);
  for (size_t p = 0; p < rows.size(); p += n) {
    const auto first = rows.begin() + p, last = first + n;
    int32_t place = 0, fresh = held[0];
    for (int i = 0; i < n; ++i)
      if (!std::binary_search(first, last, held[i])) place = i;
    for (auto r = first; r != last; ++r)
      if (std::find(held.begin(), held.end(), *r) == held.end()) fresh = *r;
    held[place] = fresh;
    walk.insert(walk.end(), {place, fresh});
    for (int i = 0; i < n; ++i) walk.push_back(static_cast<int32_t>(std::lower_bound(first, last, held[i]) - first));
  }
  return walk;
}

// The sanitizer build wants to see what reads memory that nobody wrote, and what leaves its own piece.
#ifdef STEN_POISON
constexpr bool kPoison = true;
#else
constexpr bool kPoison = false;
#endif

}  // namespace

void* take_scratch(Role role, size_t bytes, size_t* capacity) {
  const int i = static_cast<int>(role);
  if (!kPoison && kept.memory[i] && kept.capacity[i] >= bytes) {
    *capacity = kept.capacity[i];
    return std::exchange(kept.memory[i], nullptr);
  }
  *capacity = kPoison ? bytes : std::max<size_t>(bytes, 64);
  void* memory = ::operator new(*capacity, kLine);
  if (kPoison) std::memset(memory, 0xff, bytes);    // NaN, or -1
  return memory;
}

void give_scratch(Role role, void* memory, size_t capacity) noexcept {
  const int i = static_cast<int>(role);
  if (!kPoison && capacity <= kMostKept) {
    std::swap(memory, kept.memory[i]);
    kept.capacity[i] = capacity;
  }
  if (memory) ::operator delete(memory, kLine);
}

Grid make_grid(const Problem& p, const Kernels& k, int threads, int64_t least, int64_t most) {
  Grid grid;
  grid.panel_tokens = std::min<int64_t>(kMaxVectors * k.width, ceil_div(p.tokens, k.width) * k.width);
  grid.panels = ceil_div(p.tokens, grid.panel_tokens);
  grid.pieces = least;
  double smallest = HUGE_VAL;
  // Every piece transposes its panel anew, so take the fewest that leave no thread idle for long.
  for (int64_t pieces = least; pieces <= std::min(least + 2 * threads, most); ++pieces) {
    const int64_t tasks = grid.panels * pieces;
    const double waste = static_cast<double>(ceil_div(tasks, threads) * threads) / static_cast<double>(tasks);
    if (waste < smallest - 0.05) {
      smallest = waste;
      grid.pieces = pieces;
    }
  }
  return grid;
}

int64_t pieces_for_cache(const Problem& p, const Kernels& k) {
  const int64_t line = std::min<int64_t>(kMaxVectors, ceil_div(p.tokens, k.width)) * k.width;
  return std::max<int64_t>(1, ceil_div(p.out * line * static_cast<int64_t>(sizeof(float)), kSumBytes));
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
  auto [found, fresh] = made.try_emplace({n, m});
  if (fresh) {
    std::vector<int32_t> high;
    revolve(m, n, false, high, found->second.rows);
    found->second.walk = walk_of(found->second.rows, n);
  }
  return found->second;
}

}  // namespace sten
