// GroupedNM: the choice of patterns, and the way from dense to stored and back. Letters as in grouped_linear.cpp.
#include <atomic>
#include <cmath>
#include <cstring>

#include "pack.h"

namespace sten {
namespace {

constexpr int kPriceSteps = 6;
constexpr float kPriceRate = 0.8f;
constexpr int kSwapRounds = 4;
constexpr int kSingleBits = 32;

// One problem: a strip's columns of one chunk. Tables are (patterns, columns).
class Assignment {
 public:
  Assignment(const GroupedShape& s, const Kernels& k)
      : s_(s), k_(k), score(s.m * s.width), energy_(s.patterns * s.width), table_(s.patterns * s.width),
        best_(s.width), second_(s.width), own_(s.width), price_(s.patterns), demand_(s.patterns),
        move_(s.patterns * s.patterns), which_(s.width), who_(s.patterns * s.patterns), free_(s.patterns),
        column_(s.width), lead_(s.width) {}

  // A pattern for each column of `score`, each of them g times.
  const int32_t* solve() {
    k_.pattern_energy(score.data(), s_.order, s_.n, s_.patterns, s_.width, energy_.data());
    auction();
    greedy();
    if (s_.patterns > 1) exchange();
    return which_.data();
  }

 private:
  void best() {
    k_.best_patterns(energy_.data(), price_.data(), s_.patterns, s_.width, best_.data(), second_.data(), which_.data());
  }

  // The price of a pattern that too many columns choose rises, until demand is nearly even.
  void auction() {
    std::fill(price_.begin(), price_.end(), 0.0f);
    best();
    if (s_.patterns == 1) return;
    // Columns to which all patterns are equal, as to padding, take what is left: they raise no price, and where there
    // are some, no pattern needs a negative price.
    std::vector<float>& decided = own_;
    std::fill(decided.begin(), decided.end(), 0.0f);
    for (int64_t p = 1; p < s_.patterns; ++p)
      for (int64_t c = 0; c < s_.width; ++c)
        if (energy_[p * s_.width + c] != energy_[c]) decided[c] = 1.0f;
    float leads = 0.0f, count = 0.0f;
    for (int64_t c = 0; c < s_.width; ++c) {
      leads += best_[c] - second_[c];
      count += decided[c];
    }
    const float least = count == static_cast<float>(s_.width) ? -HUGE_VALF : 0.0f;
    const float step = kPriceRate * leads / std::max(count, 1.0f);
    for (int k = 0; k < kPriceSteps; ++k) {
      if (k > 0) best();
      std::fill(demand_.begin(), demand_.end(), 0.0f);
      for (int64_t c = 0; c < s_.width; ++c) demand_[which_[c]] += decided[c];
      const float rate = step / std::sqrt(static_cast<float>(k + 1)), even = static_cast<float>(s_.g + 1);
      for (int64_t p = 0; p < s_.patterns; ++p)
        price_[p] = std::max(price_[p] + rate * std::log((demand_[p] + 1.0f) / even), least);
    }
    best();
  }

  // Each column in turn, by how much its best pattern beats its second, takes the best free pattern.
  void greedy() {
    for (int64_t c = 0; c < s_.width; ++c) {
      const float lead = s_.patterns == 1 ? 0.0f : best_[c] - second_[c];
      uint32_t bits;
      std::memcpy(&bits, &lead, sizeof bits);
      lead_[c] = static_cast<uint64_t>(~bits) << kSingleBits | static_cast<uint64_t>(c);
    }
    std::sort(lead_.begin(), lead_.end());
    std::fill(free_.begin(), free_.end(), s_.g);
    for (const uint64_t turn : lead_) {
      const int64_t c = static_cast<int64_t>(turn & 0xffffffffu);
      int32_t pick = which_[c];
      if (free_[pick] == 0) {
        float most = 0.0f;
        pick = -1;
        for (int64_t p = 0; p < s_.patterns; ++p) {
          const float value = energy_[p * s_.width + c] - price_[p];
          if (free_[p] > 0 && (pick < 0 || value > most)) {
            pick = static_cast<int32_t>(p);
            most = value;
          }
        }
      }
      --free_[pick];
      which_[c] = pick;
    }
  }

  // Exchanges of two columns: of each pair of patterns the best one, all at once.
  void exchange() {
    const int64_t count = s_.patterns, width = s_.width;
    sort_columns(which_.data(), column_.data());
    for (int64_t q = 0; q < count; ++q)
      for (int64_t slot = 0; slot < width; ++slot) table_[q * width + slot] = energy_[q * width + column_[slot]];
    std::vector<float>& gain = best_;
    std::vector<int32_t>& partner = which_;
    for (int round = 0; round < kSwapRounds; ++round) {
      k_.best_moves(table_.data(), s_.g, count, own_.data(), move_.data(), who_.data());
      for (int64_t p = 0; p < count; ++p)
        for (int64_t q = 0; q <= p; ++q)
          move_[p * count + q] = move_[q * count + p] = move_[p * count + q] + move_[q * count + p];
      std::fill(price_.begin(), price_.end(), 0.0f);
      k_.best_patterns(move_.data(), price_.data(), count, count, gain.data(), second_.data(), partner.data());
      // Patterns that are each other's best partner: such pairs do not overlap, so their gains add up.
      bool any = false;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t q = partner[p];
        if (q <= p || partner[q] != p || !(gain[p] > 0.0f)) continue;
        const int64_t a = who_[q * count + p] * count + p, b = who_[p * count + q] * count + q;
        for (int64_t r = 0; r < count; ++r) std::swap(table_[r * width + a], table_[r * width + b]);
        std::swap(column_[a], column_[b]);
        any = true;
      }
      if (!any) break;
    }
    for (int64_t slot = 0; slot < width; ++slot) which_[column_[slot]] = static_cast<int32_t>(slot % count);
  }

  // The columns of each pattern, ascending: slot j * patterns + p is the j-th of pattern p.
  void sort_columns(const int32_t* chosen, int32_t* column) {
    std::fill(free_.begin(), free_.end(), 0);
    for (int64_t c = 0; c < s_.width; ++c) {
      const int64_t p = chosen[c];
      column[free_[p]++ * s_.patterns + p] = static_cast<int32_t>(c);
    }
  }

  const GroupedShape& s_;
  const Kernels& k_;

 public:
  std::vector<float> score;    // (m, columns), zero where the weight ends

 private:
  std::vector<float> energy_, table_, best_, second_, own_, price_, demand_, move_;
  std::vector<int32_t> which_, who_;
  std::vector<int64_t> free_;
  std::vector<int32_t> column_;
  std::vector<uint64_t> lead_;
};

// The largest finite magnitude, or 1 if it is zero.
float largest_of(const float* score, int64_t size, Pool pool) {
  constexpr int64_t kPieces = 64;
  std::vector<float> most(kPieces, 0.0f);
  pool.each(kPieces, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const Range range = part(size, kPieces, piece);
      float held = 0.0f;
      for (int64_t i = range.begin; i < range.end; ++i) {
        const float x = std::fabs(score[i]);
        held = x < HUGE_VALF && x > held ? x : held;
      }
      most[piece] = held;
    }
  });
  const float largest = *std::max_element(most.begin(), most.end());
  return largest == 0.0f ? 1.0f : largest;
}

// In [-1, 1], so that sums and differences are finite; NaN and -inf below, +inf above.
float comparable(float x, float largest, float beyond) {
  if (std::fabs(x) < HUGE_VALF) return x / largest;
  return x == HUGE_VALF ? beyond : -beyond;
}

template <typename F>
void each_slot(const GroupedShape& s, int64_t strip, F&& body) {
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    const int64_t first = s.first_slot(chunk, strip);
    for (int64_t i = 0; i < s.width; ++i) body(first + i, s.order + i / s.g * s.n, chunk);
  }
}

}  // namespace

GroupedShape::GroupedShape(int64_t n, int64_t m, int64_t g, int64_t rows, int64_t columns)
    : n(n), m(m), g(g), rows(rows), columns(columns) {
  const std::vector<int32_t>& all = sten::patterns(static_cast<int>(n), static_cast<int>(m)).rows;
  order = all.data();
  patterns = static_cast<int64_t>(all.size()) / n;
  width = patterns * g;
  chunks = ceil_div(columns, width);
  strips = ceil_div(rows, m);
}

void grouped_mask(const GroupedShape& s, const float* score, bool* mask, const Kernels& k, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(s.rows) * s.columns * s.patterns);
  const float largest = largest_of(score, s.rows * s.columns, pool), beyond = 2.0f * static_cast<float>(s.n);
  pool.each(s.strips, [&](int64_t begin, int64_t end) {
    Assignment assignment(s, k);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t height = s.rows_of(strip), first = strip * s.m * s.columns;
      std::memset(mask + first, 0, height * s.columns);
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
        const int64_t count = s.columns_of(chunk), at = first + chunk * s.width;
        if (height < s.m || count < s.width) std::fill(assignment.score.begin(), assignment.score.end(), 0.0f);
        for (int64_t r = 0; r < height; ++r)
          for (int64_t c = 0; c < count; ++c)
            assignment.score[r * s.width + c] = comparable(score[at + r * s.columns + c], largest, beyond);
        const int32_t* chosen = assignment.solve();
        for (int64_t c = 0; c < count; ++c)
          for (int64_t i = 0; i < s.n; ++i) {
            const int64_t r = s.order[chosen[c] * s.n + i];
            if (r < height) mask[at + r * s.columns + c] = true;
          }
      }
    }
  });
}

void grouped_index(const GroupedShape& s, const uint8_t* mask, int16_t* index, bool* unsolved, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(s.rows) * s.columns);
  // The number of a pattern in the revolving-door order is a sum over its rows (Knuth 7.2.1.3).
  std::vector<int32_t> term(s.m * (s.n + 1), 0);
  for (int64_t r = 0; r < s.m; ++r) {
    double choose = 1.0;    // C(r + 1, k)
    for (int64_t k = 1; k <= std::min(s.n, r + 1); ++k) {
      choose = choose * static_cast<double>(r + 2 - k) / static_cast<double>(k);
      if (choose > static_cast<double>(s.patterns)) continue;    // in no pattern is row r the k-th
      term[r * (s.n + 1) + k] = static_cast<int32_t>((s.n - k) % 2 ? -choose : choose);
    }
  }
  pool.each(s.strips, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> count(s.width), rank(s.width);
    std::vector<int64_t> load(s.patterns);
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
        const int64_t columns = s.columns_of(chunk);
        std::fill(count.begin(), count.end(), 0);
        std::fill(rank.begin(), rank.end(), static_cast<int32_t>(-(s.n % 2)));
        for (int64_t r = 0; r < s.rows_of(strip); ++r) {
          const uint8_t* row = mask + (strip * s.m + r) * s.columns + chunk * s.width;
          const int32_t* terms = term.data() + r * (s.n + 1);
          for (int64_t c = 0; c < columns; ++c) {
            count[c] += row[c] != 0;
            rank[c] += row[c] && count[c] <= s.n ? terms[count[c]] : 0;
          }
        }
        std::fill(load.begin(), load.end(), 0);
        bool solved = true;
        for (int64_t c = 0; c < columns && solved; ++c) solved = count[c] == s.n && ++load[rank[c]] <= s.g;
        unsolved[chunk * s.strips + strip] = !solved;
        if (!solved) continue;
        for (int64_t c = columns, p = 0; c < s.width; ++c) {    // padding takes what is left
          while (load[p] == s.g) ++p;
          ++load[p];
          rank[c] = static_cast<int32_t>(p);
        }
        for (int64_t p = 0; p < s.patterns; ++p) load[p] = s.first_slot(chunk, strip) + p * s.g;
        for (int64_t c = 0; c < s.width; ++c) index[load[rank[c]]++] = static_cast<int16_t>(c);
      }
  });
}

template <typename T>
bool grouped_expand(const GroupedShape& s, const T* values, const int16_t* index, T* dense, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(s.rows) * s.columns);
  std::atomic<bool> fits{true};
  pool.each(s.strips, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t height = s.rows_of(strip);
      T* out = dense + strip * s.m * s.columns;
      std::memset(static_cast<void*>(out), 0, height * s.columns * sizeof(T));
      each_slot(s, strip, [&](int64_t slot, const int32_t* rows, int64_t chunk) {
        if (index[slot] < 0 || index[slot] >= s.width) fits.store(false, std::memory_order_relaxed);
        if (index[slot] < 0 || index[slot] >= s.columns_of(chunk)) return;
        T* column = out + chunk * s.width + index[slot];
        for (int64_t i = 0; i < s.n; ++i)
          if (rows[i] < height) column[rows[i] * s.columns] = values[slot * s.n + i];
      });
    }
  });
  return fits.load();
}

template <typename T>
bool grouped_collect(const GroupedShape& s, const T* dense, const int16_t* index, T* values, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(s.rows) * s.columns);
  std::atomic<bool> fits{true};
  pool.each(s.strips, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t height = s.rows_of(strip);
      const T* from = dense + strip * s.m * s.columns;
      each_slot(s, strip, [&](int64_t slot, const int32_t* rows, int64_t chunk) {
        if (index[slot] < 0 || index[slot] >= s.width) fits.store(false, std::memory_order_relaxed);
        const bool real = index[slot] >= 0 && index[slot] < s.columns_of(chunk);
        for (int64_t i = 0; i < s.n; ++i)
          values[slot * s.n + i] =
              real && rows[i] < height ? from[rows[i] * s.columns + chunk * s.width + index[slot]] : T(0);
      });
    }
  });
  return fits.load();
}

#define STEN_INSTANTIATE(T)                                                                     \
  template bool grouped_expand(const GroupedShape&, const T*, const int16_t*, T*, Pool);        \
  template bool grouped_collect(const GroupedShape&, const T*, const int16_t*, T*, Pool);
STEN_INSTANTIATE(uint8_t)
STEN_INSTANTIATE(uint16_t)
STEN_INSTANTIATE(uint32_t)
STEN_INSTANTIATE(uint64_t)

}  // namespace sten
