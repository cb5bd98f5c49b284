// Dot products along the columns, for one token and a few: NM, VectorNM, BSR. Written once over the names of bodies.h
// (float) and simd_bf16.h, each of which includes this file, so there is no include guard.
//
// Letters: R rows of the weight and T tokens at a time, L partial sums of each product, `wide` is kDot elements.

#include "kernels.h"

namespace sten::STEN_ISA {

constexpr int kTileTokens = kRegisters == 32 ? 6 : 2;    // whose sums with kTileRows rows fit the registers
constexpr int kSumRows = 64;                             // rows whose sums are collected before they are stored
constexpr int kUnitColumns = BitmapOf<elem>::kUnitColumns;

// A sum of products has to wait for the one before, so few of them are cut into partial ones.
constexpr int partial_sums(int sums) { return sums >= 6 ? 1 : sums >= 3 ? 2 : 4; }

// What is prefetched while a tile is multiplied: a cache line for each of its rows, `row` elements apart, `step` further
// with each vector.
struct Ahead {
  const elem* from;
  int64_t row, step;
};

// a[l][r][t] += w[r] * x[t] over `count` columns
template <int R, int T, int L, bool kAhead>
STEN_INLINE void add_tile(const elem* w, int64_t step, const elem* x, int64_t ld, int64_t count, Ahead ahead,
                          vec (*a)[R][T]) {
  int64_t j = 0;
  for (; j + L * kDot <= count; j += L * kDot)
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      const elem *ws = w + j + l * kDot, *xs = x + j + l * kDot;
      if (kAhead) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) __builtin_prefetch(ahead.from + r * ahead.row);
        ahead.from += ahead.step;
      }
      if constexpr (T == 1) {
        const wide one = hold(load_wide(xs));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) a[l][r][0] = multiply_add(load_wide(ws + r * step), one, a[l][r][0]);
      } else {
        wide rows[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) rows[r] = hold(load_wide(ws + r * step));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const wide one = hold(load_wide(xs + t * ld));
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) a[l][r][t] = multiply_add(rows[r], one, a[l][r][t]);
        }
      }
    }
  for (; j < count; j += kDot) {
    const int64_t left = count - j < kDot ? count - j : kDot;
    wide rows[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) rows[r] = load_wide_first(w + r * step + j, left);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const wide one = load_wide_first(x + t * ld + j, left);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) a[0][r][t] = multiply_add(rows[r], one, a[0][r][t]);
    }
  }
}

// Where a tile's rows lie: one list of columns, or blocks whose columns are those of col.
struct TileRows {
  const elem* values;
  int64_t step;              // from one row to the next
  const int32_t *col, *end;  // of blocks
  int64_t width, block;      // columns of the list, or of a block; elements of a block, 0 for a list
  Ahead ahead;               // of a list
};

// sums[t, r] of R rows and T tokens
template <int R, int T>
STEN_FN void sum_rows(const TileRows& w, const elem* x, int64_t ld, float* sums) {
  constexpr int L = partial_sums(R * T), kSums = (R + 3) / 4 * 4;
  vec a[L][R][T];
#pragma GCC unroll 4
  for (int l = 0; l < L; ++l)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) a[l][r][t] = zero();
  if (w.block) {
    const elem* values = w.values;
    for (const int32_t* c = w.col; c < w.end; ++c, values += w.block)
      add_tile<R, T, 1, false>(values, w.step, x + *c * w.width, ld, w.width, {}, a);
  } else {
    add_tile<R, T, L, true>(w.values, w.step, x, ld, w.width, w.ahead, a);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    vec all[kSums];
    float out[kSums];
#pragma GCC unroll 16
    for (int r = 0; r < kSums; ++r) {
      all[r] = r < R ? a[0][r < R ? r : 0][t] : zero();
#pragma GCC unroll 4
      for (int l = 1; l < L; ++l)
        if (r < R) all[r] = add(all[r], a[l][r < R ? r : 0][t]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r += 4) sum_four(all + r, out + r);
    for (int r = 0; r < R; ++r) sums[t * kSumRows + r] = out[r];
  }
}

template <int R, int T>
STEN_FN void sum_rows_or_fewer(int64_t rows, const TileRows& w, const elem* x, int64_t ld, float* sums) {
  if constexpr (R > 1)
    if (rows < R) return sum_rows_or_fewer<R - 1, T>(rows, w, x, ld, sums);
  sum_rows<R, T>(w, x, ld, sums);
}

// At most kTileRows rows, `tokens` at most T.
template <int T>
STEN_FN void add_tokens(int64_t rows, const TileRows& w, const elem* x, int64_t ld, int64_t tokens, float* sums) {
  if constexpr (T > 1)
    if (tokens < T) return add_tokens<T - 1>(rows, w, x, ld, tokens, sums);
  sum_rows_or_fewer<kTileRows, T>(rows, w, x, ld, sums);
}

STEN_INLINE int64_t equal_pieces(int64_t all, int64_t most) {
  const int64_t pieces = (all + most - 1) / most;
  return (all + pieces - 1) / pieces;
}

STEN_INLINE void add_all_tokens(int64_t rows, const TileRows& w, const elem* x, int64_t ld, int64_t tokens, float* sums) {
  const int64_t most = equal_pieces(tokens, kTileTokens);
  for (int64_t t = 0; t < tokens; t += most)
    add_tokens<kTileTokens>(rows, w, x + t * ld, ld, tokens - t < most ? tokens - t : most, sums + t * kSumRows);
}

STEN_INLINE void store_all(const float* sums, const elem* bias, int64_t row, int64_t rows, int64_t tokens, int64_t ld,
                           elem* y) {
  for (int64_t t = 0; t < tokens; ++t)
    store_sums(sums + t * kSumRows, bias ? bias + row : bias, rows, y + t * ld + row);
}

// ---- rows that share their columns

STEN_FN void bands_dots(const BandsOf<elem>& w, const elem* bias, int64_t r0, int64_t r1, const elem* x, int64_t ld,
                        int64_t tokens, elem* gathered, elem* y) {
  constexpr int kBlockRows = kRegisters / 2;    // of blocks, with one token
  float sums[kDotTokens * kSumRows];
  const int64_t gathered_ld = w.count + kTokenPadding;
  for (int64_t band = r0 / w.height; band * w.height < r1; ++band) {
    const int64_t lo = band * w.height < r0 ? r0 : band * w.height;
    const int64_t hi = (band + 1) * w.height < r1 ? (band + 1) * w.height : r1;
    const int64_t begin = w.crow ? w.crow[band] : band * w.count;
    const bool single = w.height == 1 && w.width == 1;    // nothing is shared
    if (!w.crow && !single)
      for (int64_t t = 0; t < tokens; ++t) gather(x + t * ld, w.col + band * w.count, w.count, gathered + t * gathered_ld);
    for (int64_t row = lo, rows; row < hi; row += rows) {
      rows = hi - row < kSumRows ? hi - row : kSumRows;
      if (single) {
        const int64_t count = w.crow ? w.crow[band + 1] - begin : w.count;
        for (int64_t t = 0; t < tokens; ++t) sums[t * kSumRows] = dot(x + t * ld, w.values + begin, w.col + begin, count);
        store_all(sums, bias, row, 1, tokens, w.rows, y);
        continue;
      }
      const bool alone = w.crow && tokens == 1;
      // long rows one at a time, so that memory is read in its order
      const bool stream = !w.crow && tokens == 1 && w.count * static_cast<int64_t>(sizeof(elem)) >= 1024;
      const int64_t most = equal_pieces(rows, alone ? kBlockRows : stream ? 1 : kTileRows);
      for (int64_t r = 0; r < rows; r += most) {
        const int64_t some = rows - r < most ? rows - r : most;
        float* to = sums + r;
        if (w.crow) {
          const int64_t first_row = row + r - band * w.height;
          const TileRows tile{w.values + (begin * w.height + first_row) * w.width, w.width, w.col + begin,
                              w.col + w.crow[band + 1], w.width, w.height * w.width, {}};
          if (alone) sum_rows_or_fewer<kBlockRows, 1>(some, tile, x, ld, to);
          else add_all_tokens(some, tile, x, ld, tokens, to);
        } else {
          const elem* values = w.values + (row + r) * w.count;
          const Ahead ahead{values + (some == 1 ? 1024 / sizeof(elem) : some * w.count), w.count, kDot};
          const TileRows tile{values, w.count, nullptr, nullptr, w.count, 0, ahead};
          add_all_tokens(some, tile, gathered, gathered_ld, tokens, to);
        }
      }
      store_all(sums, bias, row, rows, tokens, w.rows, y);
    }
  }
}

// ---- bitmaps

// The bits of a row in whole units, copied or made from positions.
STEN_FN const uint8_t* make_bits(const BitmapOf<elem>& w, int64_t row, uint8_t* out) {
  static constexpr uint8_t kPairs[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};    // of two positions
  const uint8_t* index = w.index + row * w.row_bytes;
  const int64_t bytes = w.units() * 4;
  const bool pairs = w.m == 4 && w.n == 2;
  if (pairs) translate(index, w.row_bytes, kPairs, out);
  for (int64_t i = w.bits == 1 || pairs ? w.row_bytes : 0; i < bytes; ++i) out[i] = 0;
  if (w.bits == 1) {
    for (int64_t i = 0; i < w.row_bytes; ++i) out[i] = index[i];
  } else if (pairs) {
    if (w.groups % 2) out[w.row_bytes - 1] &= 15;    // the spare bits of the last byte
  } else {
    for (int64_t slot = 0, bit = 0, group = 0; slot < w.slots(); ++slot, bit += w.bits) {
      if (slot == (group + 1) * w.n) ++group;
      const int64_t column = group * w.m + (index[bit >> 3] >> (bit & 7) & ((1 << w.bits) - 1));
      out[column >> 3] = static_cast<uint8_t>(out[column >> 3] | 1 << (column & 7));
    }
  }
  return out;
}

// The same, from the index where that has them.
STEN_INLINE const uint8_t* bits_of_row(const BitmapOf<elem>& w, int64_t row, uint8_t* out) {
  return w.bits == 1 && w.row_bytes % 4 == 0 ? w.index + row * w.row_bytes : make_bits(w, row, out);
}

__attribute__((noinline)) STEN_FN const elem* copy_values(const BitmapOf<elem>& w, int64_t row, elem* copy) {
  const int64_t begin = w.begin(row), slots = w.begin(row + 1) - begin;
  for (int64_t i = 0; i < slots; ++i) copy[i] = w.values[begin + i];
  for (int64_t i = slots; i < slots + kUnitColumns; ++i) copy[i] = elem{};
  return copy;
}

// The values of a row; those at the end of memory are copied, since kernels read whole vectors.
STEN_INLINE const elem* values_of_row(const BitmapOf<elem>& w, int64_t row, elem* copy) {
  return w.begin(row + 1) + kUnitColumns <= w.begin(w.rows) ? w.values + w.begin(row) : copy_values(w, row, copy);
}

STEN_INLINE uint32_t word_at(const uint8_t* bytes) {
  uint32_t word;
  __builtin_memcpy(&word, bytes, sizeof word);
  return word;
}

STEN_INLINE int64_t next_values(int64_t step, uint32_t mask) { return step ? step : __builtin_popcount(mask); }

template <bool kAhead>
STEN_INLINE void expand_row(const uint8_t* bits, const elem* values, int64_t units, int64_t step, elem* out) {
  for (int64_t u = 0; u < units; ++u, out += kUnitColumns) {
    const uint32_t mask = word_at(bits + 4 * u);
    wide w[kUnitColumns / kDot];
    expand_unit(mask, values, w);
    if (kAhead) __builtin_prefetch(values + 512);
    values += next_values(step, mask);
#pragma GCC unroll 8
    for (int i = 0; i < kUnitColumns / kDot; ++i) store_wide(out + i * kDot, w[i]);
  }
}

// How many values a unit has: w.step(), where `half` says that these are at most half of its columns; else its bits,
// where `few` says that these are seldom more than half.
enum class Unit { counted, few, stepped, half };
constexpr int kAhead = 4096;    // bytes of values that are prefetched

template <int T, int L, Unit kUnit>
STEN_INLINE void add_unit(const uint8_t* bits, const elem*& values, int64_t step, const elem* x, int64_t ld, int first,
                          vec (*a)[T]) {
  constexpr int kWides = kUnitColumns / kDot;
  const uint32_t mask = word_at(bits);
  wide expanded[kWides];
  const bool steps = kUnit == Unit::stepped || kUnit == Unit::half;
  const int64_t count = steps ? step : __builtin_popcount(mask);
  if (kUnit == Unit::half || (kUnit == Unit::few && __builtin_expect(count <= kUnitColumns / 2, 1)))
    expand_unit<true>(mask, values, expanded);
  else
    expand_unit(mask, values, expanded);
  __builtin_prefetch(reinterpret_cast<const char*>(values) + kAhead);
  values += count;
#pragma GCC unroll 8
  for (int i = 0; i < kWides; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      vec& sum = a[(first + i) % L][t];
      sum = multiply_add(expanded[i], load_wide(x + t * ld + i * kDot), sum);
    }
}

// Few tokens: what is expanded stays in registers. One row at a time, so that memory is read in its order.
template <int T, Unit kUnit>
STEN_FN void bitmap_tokens(const BitmapOf<elem>& w, int64_t row, int64_t rows, const elem* x, int64_t ld,
                           const BitmapScratch<elem>& scratch, float* sums) {
  constexpr int kWides = kUnitColumns / kDot, L = 4, kUnits = L > kWides ? L / kWides : 1;
  const int64_t units = w.units(), step = w.step();
  vec all[T][4];
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* bits = bits_of_row(w, row + r, scratch.bits);
    const elem* values = values_of_row(w, row + r, scratch.values);
    vec a[L][T];
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) a[l][t] = zero();
    const elem* from = x;
    int64_t u = 0;
    for (; u + kUnits <= units; u += kUnits, bits += 4 * kUnits, from += kUnits * kUnitColumns)
#pragma GCC unroll 4
      for (int i = 0; i < kUnits; ++i)
        add_unit<T, L, kUnit>(bits + 4 * i, values, step, from + i * kUnitColumns, ld, i * kWides, a);
    for (; u < units; ++u, bits += 4, from += kUnitColumns) add_unit<T, L, kUnit>(bits, values, step, from, ld, 0, a);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int l = 1; l < L; ++l) a[0][t] = add(a[0][t], a[l][t]);
      all[t][r % 4] = a[0][t];
    }
    if (r % 4 < 3 && r + 1 < rows) continue;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      for (int64_t l = r % 4 + 1; l < 4; ++l) all[t][l] = zero();
      sum_four(all[t], sums + t * kSumRows + r / 4 * 4);
    }
  }
}

STEN_INLINE Unit unit_of(const BitmapOf<elem>& w) {
  if (w.step()) return w.step() > kUnitColumns / 2 ? Unit::stepped : Unit::half;
  return 3 * w.begin(w.rows) <= w.rows * w.units() * kUnitColumns ? Unit::few : Unit::counted;
}

STEN_FN void bitmap_dots(const BitmapOf<elem>& w, const elem* bias, int64_t r0, int64_t r1, const elem* x, int64_t ld,
                         int64_t tokens, const BitmapScratch<elem>& scratch, elem* y) {
  float sums[kDotTokens * kSumRows];
  const int64_t row_count = BitmapScratch<elem>::row_count(w);
  for (int64_t row = r0, rows; row < r1; row += rows) {
    rows = r1 - row < kSumRows ? r1 - row : kSumRows;
    if (tokens <= 2) {
      constexpr decltype(&bitmap_tokens<1, Unit::half>) one[] = {
          bitmap_tokens<1, Unit::counted>, bitmap_tokens<1, Unit::few>, bitmap_tokens<1, Unit::stepped>,
          bitmap_tokens<1, Unit::half>};
      constexpr decltype(&bitmap_tokens<2, Unit::half>) two[] = {
          bitmap_tokens<2, Unit::counted>, bitmap_tokens<2, Unit::few>, bitmap_tokens<2, Unit::stepped>,
          bitmap_tokens<2, Unit::half>};
      (tokens == 1 ? one : two)[static_cast<int>(unit_of(w))](w, row, rows, x, ld, scratch, sums);
    } else {
      const int64_t count = w.units() * kUnitColumns, next = kTileRows * w.begin(w.rows) / w.rows;    // values of a tile
      for (int64_t r = 0, some; r < rows; r += some) {
        some = rows - r < kTileRows ? rows - r : kTileRows;
        for (int64_t i = 0; i < some; ++i)
          expand_row<false>(bits_of_row(w, row + r + i, scratch.bits), values_of_row(w, row + r + i, scratch.values),
                            w.units(), w.step(), scratch.rows + i * row_count);
        const Ahead ahead{w.values + w.begin(row + r + some), 64 / sizeof(elem), next * kDot / count};
        add_all_tokens(some, {scratch.rows, row_count, nullptr, nullptr, count, 0, ahead}, x, ld, tokens, sums + r);
      }
    }
    store_all(sums, bias, row, rows, tokens, w.rows, y);
  }
}

STEN_FN void bitmap_expand(const BitmapOf<elem>& w, int64_t r0, int64_t r1, int64_t columns,
                           const BitmapScratch<elem>& scratch, elem* dense) {
  const bool whole = columns == w.units() * kUnitColumns;
  for (int64_t row = r0; row < r1; ++row) {
    elem* out = whole ? dense + row * columns : scratch.rows;
    expand_row<true>(bits_of_row(w, row, scratch.bits), values_of_row(w, row, scratch.values), w.units(), w.step(), out);
    if (!whole)
      for (int64_t c = 0; c < columns; ++c) dense[row * columns + c] = out[c];
  }
}

STEN_FN void bitmap_collect(const BitmapOf<elem>& w, int64_t r0, int64_t r1, int64_t columns, const elem* dense,
                            const BitmapScratch<elem>& scratch, elem* values) {
  const int64_t units = w.units(), slots = w.slots();
  const bool whole = columns == units * kUnitColumns;
  for (int64_t row = r0; row < r1; ++row) {
    const uint8_t* bits = bits_of_row(w, row, scratch.bits);
    const elem* from = whole ? dense + row * columns : scratch.rows;
    if (!whole)
      for (int64_t c = 0; c < units * kUnitColumns; ++c)
        scratch.rows[c] = c < columns ? dense[row * columns + c] : elem{};
    int64_t count = 0;
    for (int64_t u = 0; u < units; ++u) {
      const uint32_t mask = word_at(bits + 4 * u);
      collect_unit(mask, from + u * kUnitColumns, scratch.values + count);
      count += __builtin_popcount(mask);
    }
    for (int64_t i = 0; i < slots; ++i) values[row * slots + i] = i < count ? scratch.values[i] : elem{};
  }
}

constexpr Dots<elem> make_dots() {
  return {bands_dots, bitmap_dots, bitmap_expand, bitmap_collect,
          {load_panel, store_panel, csr_block, bands_block, grouped_block}};
}

}  // namespace sten::STEN_ISA
