// Which entries to keep: the highest of a whole weight, or of each group; a mask as compressed rows and as NM's index.
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "pack.h"

namespace sten {
namespace {

constexpr int kDigit = 11;            // bits of a key that one pass sorts by; the last one has 10
constexpr int64_t kBins = 1 << kDigit;
constexpr int64_t kPieces = 64;       // each with counts of its own
constexpr int64_t kCounted = 2048;    // columns of a group from which on digits are counted
constexpr int64_t kStrip = 1024;      // columns whose sums the first-level cache holds
constexpr int64_t kRanked = 64;       // columns of a group up to which comparing all pairs is the fastest way

template <typename T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};

// Whole numbers in the order of the scores; both zeros are one, and NaN is minus infinity.
template <typename T>
typename KeyOf<T>::type key_of(T x) {
  using Key = typename KeyOf<T>::type;
  x = x != x ? static_cast<T>(-HUGE_VAL) : x + T(0);
  Key bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Key sign = bits >> (8 * sizeof(Key) - 1);
  return bits ^ (sign & static_cast<Key>(~(Key(1) << (8 * sizeof(Key) - 1))));
}

uint32_t radix_key(float x) { return static_cast<uint32_t>(key_of(x)) ^ 0x80000000u; }

// M columns, or any number if M is 0.
template <int M, typename T>
void rank_groups(const T* score, int64_t groups, int64_t any, int64_t n, bool* keep) {
  using Key = typename KeyOf<T>::type;
  const int m = M ? M : static_cast<int>(any);
  Key key[kRanked], beaten[kRanked];    // as wide as a key, for the compiler's vectors
  for (int64_t g = 0; g < groups; ++g, score += m, keep += m) {
    for (int c = 0; c < m; ++c) {
      key[c] = key_of(score[c]);
      beaten[c] = 0;
    }
    for (int i = 0; i < m; ++i) {
      const Key own = key[i];
      for (int c = 0; c < m; ++c) beaten[c] += own + (c > i) > key[c];    // no key is the highest number
    }
    for (int c = 0; c < m; ++c) keep[c] = beaten[c] < static_cast<Key>(n);
  }
}

// Of long groups, only keys that begin with the digit of the edge are ordered.
template <typename T>
void select_groups(const T* score, int64_t groups, int64_t m, int64_t n, bool* keep) {
  using Key = typename KeyOf<T>::type;
  constexpr int shift = 8 * sizeof(Key) - kDigit;
  std::vector<Key> keys(m), some(m);
  std::vector<int32_t> counts(m >= kCounted ? kBins : 0);
  for (int64_t g = 0; g < groups; ++g, score += m, keep += m) {
    for (int64_t c = 0; c < m; ++c) keys[c] = key_of(score[c]);
    int64_t size = m, most = n;    // the edge is the most-th highest of the first `size` of `some`
    if (counts.empty()) {
      some = keys;
    } else {
      std::fill(counts.begin(), counts.end(), 0);
      for (int64_t c = 0; c < m; ++c) ++counts[(keys[c] >> shift) + kBins / 2];
      Key digit = kBins / 2 - 1;
      for (; counts[digit + kBins / 2] < most; --digit) most -= counts[digit + kBins / 2];
      size = 0;
      for (int64_t c = 0; c < m; ++c) {
        some[size] = keys[c];
        size += keys[c] >> shift == digit;
      }
    }
    const auto begin = some.begin(), place = begin + (size - most), end = begin + size;
    std::nth_element(begin, place, end);
    const Key edge = *place;
    int64_t ties = most - std::count_if(place, end, [&](Key k) { return k > edge; });
    for (int64_t c = 0; c < m; ++c) {
      const Key k = keys[c];
      keep[c] = k > edge || (k == edge && ties-- > 0);
    }
  }
}

template <typename F>
void each_piece(int64_t size, Pool pool, F&& body) {
  pool.each(kPieces, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) body(piece, part(size, kPieces, piece));
  });
}

}  // namespace

void top_mask(const float* score, int64_t size, int64_t count, bool* keep, Pool pool) {
  if (count <= 0 || count >= size) return void(std::fill_n(keep, size, count > 0));
  pool.threads = useful_threads(pool.threads, static_cast<double>(size));
  using Counts = std::array<uint32_t, kBins>;
  std::vector<Counts> counts(kPieces);
  uint32_t edge = 0;    // its highest bits, found so far
  int64_t more = count;    // how many entries of those that agree with it to keep
  for (int shift : {21, 10, 0}) {
    const int known = shift == 21 ? 0 : shift == 10 ? 11 : 22, width = shift == 0 ? 10 : kDigit;
    each_piece(size, pool, [&](int64_t piece, Range range) {
      Counts& mine = counts[piece];
      mine.fill(0);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const uint32_t key = radix_key(score[i]);
        if (known == 0 || key >> (32 - known) == edge >> (32 - known)) ++mine[key >> shift & ((1u << width) - 1)];
      }
    });
    int64_t digit = (1 << width) - 1;
    for (;; --digit) {
      int64_t equal = 0;
      for (const Counts& each : counts) equal += each[digit];
      if (equal >= more) break;
      more -= equal;
    }
    edge |= static_cast<uint32_t>(digit) << shift;
  }
  std::vector<int64_t> ties(kPieces);    // of the entries that equal the edge, how many to keep: the first ones
  for (int64_t piece = 0; piece < kPieces; ++piece) {
    ties[piece] = more;
    more -= std::min<int64_t>(more, counts[piece][edge & ((1u << 10) - 1)]);
  }
  each_piece(size, pool, [&](int64_t piece, Range range) {
    int64_t left = ties[piece];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const uint32_t key = radix_key(score[i]);
      keep[i] = key > edge || (key == edge && left-- > 0);
    }
  });
}

template <typename T>
void top_of_groups(const T* score, int64_t groups, int64_t m, int64_t n, bool* keep, Pool pool) {
  if (n <= 0 || n >= m) return void(std::fill_n(keep, groups * m, n > 0));
  pool.threads = useful_threads(pool.threads, static_cast<double>(groups) * m);
  const int64_t tasks = std::min<int64_t>(groups, kPieces);
  pool.each(tasks, [&](int64_t begin, int64_t end) {
    const Range range{part(groups, tasks, begin).begin, part(groups, tasks, end - 1).end};
    const T* from = score + range.begin * m;
    bool* to = keep + range.begin * m;
    const int64_t some = range.end - range.begin;
    if (m == 4) return rank_groups<4>(from, some, m, n, to);
    if (m == 8) return rank_groups<8>(from, some, m, n, to);
    if (m == 16) return rank_groups<16>(from, some, m, n, to);
    if (m == 32) return rank_groups<32>(from, some, m, n, to);
    if (m <= kRanked) return rank_groups<0>(from, some, m, n, to);
    select_groups(from, some, m, n, to);
  });
}
template void top_of_groups(const float*, int64_t, int64_t, int64_t, bool*, Pool);
template void top_of_groups(const double*, int64_t, int64_t, int64_t, bool*, Pool);

template <typename T>
void block_sums(const T* x, int64_t rows, int64_t columns, int64_t height, int64_t width, double* sums, Pool pool) {
  constexpr bool kMask = std::is_same_v<T, uint8_t>;
  const int64_t down = ceil_div(rows, height), across = ceil_div(columns, width);
  const int64_t strip = std::max<int64_t>(1, kStrip / width) * width;
  pool.threads = useful_threads(pool.threads, static_cast<double>(rows) * columns);
  pool.each(down, [&](int64_t begin, int64_t end) {
    std::vector<std::conditional_t<kMask, int32_t, double>> line(std::min(strip, columns));
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c0 = 0; c0 < columns; c0 += strip) {
        const int64_t count = std::min(strip, columns - c0);
        std::fill_n(line.begin(), count, 0);
        for (int64_t r = i * height; r < std::min(rows, (i + 1) * height); ++r) {
          const T* from = x + r * columns + c0;
          for (int64_t c = 0; c < count; ++c)
            if constexpr (kMask) line[c] += from[c] != 0;
            else line[c] += from[c];
        }
        double* to = sums + i * across + c0 / width;
        for (int64_t c = 0; c < count; c += width)
          *to++ = std::accumulate(line.begin() + c, line.begin() + std::min(c + width, count), 0.0);
      }
  });
}
template void block_sums(const float*, int64_t, int64_t, int64_t, int64_t, double*, Pool);
template void block_sums(const double*, int64_t, int64_t, int64_t, int64_t, double*, Pool);
template void block_sums(const uint8_t*, int64_t, int64_t, int64_t, int64_t, double*, Pool);

void count_rows(const uint8_t* mask, int64_t rows, int64_t columns, int64_t* crow, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(rows) * columns);
  pool.each(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t count = 0;
      for (int64_t first = 0; first < columns; first += 128) {    // so many fit into a byte
        uint8_t some = 0;
        for (int64_t c = first; c < std::min(first + 128, columns); ++c) some += mask[r * columns + c] != 0;
        count += some;
      }
      crow[r + 1] = count;
    }
  });
  crow[0] = 0;
  for (int64_t r = 0; r < rows; ++r) crow[r + 1] += crow[r];
}

template <typename T>
void compress(const T* dense, const uint8_t* mask, int64_t rows, int64_t columns, const int64_t* crow, T* values,
              int32_t* col, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(rows) * columns);
  pool.each(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t slot = crow[r];
      for (int64_t c = 0; c < columns && slot < crow[r + 1]; ++c) {    // a slot is overwritten until its entry comes
        values[slot] = dense[r * columns + c];
        col[slot] = static_cast<int32_t>(c);
        slot += mask[r * columns + c] != 0;
      }
    }
  });
}
#define STEN_INSTANTIATE(T) \
  template void compress(const T*, const uint8_t*, int64_t, int64_t, const int64_t*, T*, int32_t*, Pool);
STEN_INSTANTIATE(uint8_t)
STEN_INSTANTIATE(uint16_t)
STEN_INSTANTIATE(uint32_t)
STEN_INSTANTIATE(uint64_t)

int64_t nm_index(const uint8_t* mask, int64_t rows, int64_t groups, int64_t n, int64_t m, int64_t bits, int64_t width,
                 uint8_t* index, Pool pool) {
  pool.threads = useful_threads(pool.threads, static_cast<double>(rows) * groups * m);
  std::atomic<bool> fits{true};
  std::vector<int64_t> added(rows, 0);
  pool.each(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* group = mask + r * groups * m;
      uint8_t* out = index + r * width;
      std::memset(out, 0, width);
      for (int64_t g = 0, slot = 0; g < groups; ++g, group += m) {
        int64_t free = n;    // slots for columns that are not in the mask
        for (int64_t c = 0; c < m; ++c) free -= group[c] != 0;
        if (free < 0) fits.store(false, std::memory_order_relaxed);
        if (free < 0) return;
        added[r] = std::max(added[r], free);
        for (int64_t c = 0; c < m; ++c) {
          if (!group[c] && free <= 0) continue;
          free -= !group[c];
          if (bits == 1) {
            out[(g * m + c) / 8] |= static_cast<uint8_t>(1u << ((g * m + c) % 8));
          } else {
            out[slot * bits / 8] |= static_cast<uint8_t>(c << (slot * bits % 8));
            ++slot;
          }
        }
      }
    }
  });
  return fits.load() ? (rows ? *std::max_element(added.begin(), added.end()) : 0) : -1;
}

}  // namespace sten
