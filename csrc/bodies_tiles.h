// Products in AMX's tiles: bitmaps, and rows that share their columns. isa_bf16.cpp includes this file after
// bodies_dots.h, whose kernels take what is too small for tiles.
//
// A tile of weights has 16 rows and 32 columns. One of activations has 16 pairs of columns, and of each the pairs of 16
// tokens; one of sums, 16 rows and 16 tokens. So weights are tiles as they are stored, and activations are put into
// pairs once for all the rows that they multiply. Numbers in rows or tokens that do not exist reach no sum that is stored.

#include "tiles.h"

namespace sten::avx512_bf16 {

constexpr int kTile = 16;                        // rows of a tile, and tokens
constexpr int kTileColumns = 32;                 // columns of a tile of weights
constexpr int kTileSize = kTile * kTileColumns;  // its elements
constexpr int kTwoTiles = 2 * kTile;             // rows, or tokens, that are multiplied together
constexpr int kLeastTileTokens = 4;              // fewer tokens of a bitmap are dot products, measured
constexpr int kLeastTileRows = 8;                // a band with fewer rows is multiplied without tiles
constexpr int kFewTileTokens = 5;                // of a band that are dot products, measured: more are panels

// Tiles that are filled in part: the build for tests detects what is multiplied and was not written.
template <int64_t N>
STEN_INLINE void poison([[maybe_unused]] elem (&tiles)[N]) {
#ifdef STEN_POISON
  for (elem& e : tiles) e = static_cast<elem>(0xffff);    // NaN
#endif
}

// What R tiles of rows and T of tokens have in registers: sums in 0 to 3, weights in 4 and 5, activations in 6 and 7.
template <int R, int T>
STEN_INLINE void load_sums(const float* sums, int64_t ld) {
  const int64_t step = ld * static_cast<int64_t>(sizeof(float));
  tiles::load<0>(sums, step);
  if constexpr (T > 1) tiles::load<1>(sums + kTile, step);
  if constexpr (R > 1) tiles::load<2>(sums + kTile * ld, step);
  if constexpr (R > 1 && T > 1) tiles::load<3>(sums + kTile * ld + kTile, step);
}
template <int R, int T>
STEN_INLINE void store_sums_of(float* sums, int64_t ld) {
  const int64_t step = ld * static_cast<int64_t>(sizeof(float));
  tiles::store<0>(sums, step);
  if constexpr (T > 1) tiles::store<1>(sums + kTile, step);
  if constexpr (R > 1) tiles::store<2>(sums + kTile * ld, step);
  if constexpr (R > 1 && T > 1) tiles::store<3>(sums + kTile * ld + kTile, step);
}
// One tile along the columns: w (R * 16, ld), x the T tiles of pairs, `next` elements apart.
template <int R, int T>
STEN_INLINE void multiply_tiles(const elem* w, int64_t ld, const elem* x, int64_t next) {
  constexpr int64_t kPairs16 = kTile * 2 * sizeof(elem);
  const int64_t step = ld * static_cast<int64_t>(sizeof(elem));
  tiles::load<4>(w, step);
  tiles::load<6>(x, kPairs16);
  tiles::multiply<0, 4, 6>();
  if constexpr (R > 1) {
    tiles::load<5>(w + kTile * ld, step);
    tiles::multiply<2, 5, 6>();
  }
  if constexpr (T > 1) {
    tiles::load<7>(x + next, kPairs16);
    tiles::multiply<1, 4, 7>();
    if constexpr (R > 1) tiles::multiply<3, 5, 7>();
  }
}

// ---- bitmaps

STEN_INLINE vec single(const elem* p) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(*p) << 16)));
}

// Units of columns of at most 32 rows; one is expanded while the one before is multiplied.
template <int R, int T>
STEN_FN void multiply_bitmap(const uint8_t* const* bits, const elem** values, int64_t rows, int64_t units, int64_t step,
                             int64_t ahead, const elem* x, int64_t next, float* sums) {
  alignas(64) elem w[2][R * kTileSize];
  poison(w[0]);
  poison(w[1]);
  load_sums<R, T>(sums, T * kTile);
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t mask = word_at(bits[r] + 4 * u);
      wide expanded[1];
      expand_unit(mask, values[r], expanded);
      __builtin_prefetch(values[r] + ahead, 0, 2);    // to the second level: measured
      values[r] += next_values(step, mask);
      store_wide(w[u % 2] + r * kTileColumns, expanded[0]);
    }
    if (u > 0) multiply_tiles<R, T>(w[(u - 1) % 2], kTileColumns, x + (u - 1) * kTileSize, next);
  }
  if (units > 0) multiply_tiles<R, T>(w[(units - 1) % 2], kTileColumns, x + (units - 1) * kTileSize, next);
  store_sums_of<R, T>(sums, T * kTile);
}

STEN_FN void bitmap_tiles(const BitmapOf<elem>& w, const elem* bias, int64_t r0, int64_t r1, const elem* x, int64_t ld,
                          int64_t tokens, const BitmapScratch<elem>& scratch, elem* y) {
  int64_t last = tokens < kLeastTileTokens ? r0 : r1;
  while (last > r0 && w.begin(last) + kUnitColumns > w.begin(w.rows)) --last;    // or more would be read than there is
  if (last < r1) bitmap_dots(w, bias, last, r1, x, ld, tokens, scratch, y);
  if (last == r0) return;
  static_assert(kTileColumns == kUnitColumns && kDot == kUnitColumns);
  const int64_t units = w.units(), next = kTile * BitmapScratch<elem>::row_count(w);
  const int T = tokens > kTile ? 2 : 1;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t u = 0; u < units; ++u)    // as pairs, which are as large as a float
      avx512::transpose(reinterpret_cast<const float*>(x + t * kTile * ld + u * kTileColumns), ld / 2,
                        tokens - t * kTile < kTile ? static_cast<int>(tokens - t * kTile) : kTile, kTile,
                        reinterpret_cast<float*>(scratch.rows + t * next + u * kTileSize), kTile, true);
  const tiles::InUse in_use;
  alignas(64) float sums[kTwoTiles * kTwoTiles];
  const uint8_t* bits[kTwoTiles];
  const elem* values[kTwoTiles];
  for (int64_t row = r0, rows; row < last; row += rows) {
    rows = last - row < kTwoTiles ? last - row : kTwoTiles;
    for (int64_t r = 0; r < rows; ++r) {
      bits[r] = bits_of_row(w, row + r, scratch.bits + r * BitmapScratch<elem>::mask_bytes(w));
      values[r] = w.values + w.begin(row + r);
      for (int64_t t = 0; t < T; ++t)
        store(sums + (r * T + t) * kTile, bias ? single(bias + row + r) : zero());
    }
    const auto multiply = rows > kTile ? (T > 1 ? multiply_bitmap<2, 2> : multiply_bitmap<2, 1>)
                                       : (T > 1 ? multiply_bitmap<1, 2> : multiply_bitmap<1, 1>);
    multiply(bits, values, rows, units, w.step(), kTwoTiles * w.begin(w.rows) / w.rows, scratch.rows, next, sums);
    store_panel(sums, rows, tokens, T, y + row, w.rows);
  }
}

// ---- rows that share their columns

#ifdef STEN_POISON
constexpr int kPairTiles = 8;    // the build for tests tries several blocks of its small weights
#else
constexpr int kPairTiles = 32;    // of activations as pairs, which take half of a first-level cache or two thirds
#endif
template <int V>
constexpr int kBlockTiles = kPairTiles / V;    // along the columns, for V tiles of tokens
template <int V>
constexpr int kBlockEntries = kBlockTiles<V> * kTileColumns;
constexpr int kRowStep = kPairTiles * kTileColumns + kTileColumns;    // of what is copied: an odd number of cache lines

template <int V>
STEN_INLINE void add_pair(const elem* first, const elem* second, elem* x, int64_t& at) {
  wide pairs[V];
  interleave<V>(first, second, pairs);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store_wide(x + v * kBlockTiles<V> * kTileSize + at, pairs[v]);
  at += 2 * kTile;
}

// Pairs of the columns that entries `begin` to `end` of a band name, for V tiles of tokens; what fills up the last tile
// is zero. Returns how many tiles there are along the columns.
template <int V>
STEN_INLINE int64_t pair_columns(const BandsOf<elem>& w, const BandRange& b, int64_t band, int64_t begin, int64_t end,
                                 const elem* panel, elem* x) {
  static constexpr elem kZeros[kMaxVectors * kWidth] = {};
  constexpr int64_t S = V * kWidth;
  const int32_t* col = columns_of(w, band);
  const elem* from = panel - b.k0 * S;
  int64_t at = 0, e = begin;
  if (w.crow) {
    for (; e < end; ++e)
      for (int64_t c = col[e] * w.width; c < (col[e] + 1) * w.width; c += 2)
        add_pair<V>(from + c * S, from + (c + 1) * S, x, at);
  } else {
    for (; e + 2 <= end; e += 2) add_pair<V>(from + col[e] * S, from + col[e + 1] * S, x, at);
    if (e < end) add_pair<V>(from + col[e] * S, kZeros, x, at);
  }
  while (at % kTileSize) add_pair<V>(kZeros, kZeros, x, at);
  return at / kTileSize;
}

// Some entries of a row, one after another, followed by zeros.
STEN_INLINE void copy_entries(const BandsOf<elem>& w, int64_t band, int64_t row, int64_t begin, int64_t end, elem* out) {
  const int64_t width = w.crow ? w.width : end - begin, pieces = w.crow ? end - begin : 1;
  const elem* from = w.values + value_at(w, band, row, begin);
  store_wide(out + pieces * width, _mm512_setzero_si512());
  for (int64_t p = 0; p < pieces; ++p, from += w.height * w.width, out += width)
    for (int64_t i = 0; i < width; i += kDot)
      store_wide(out + i, width - i < kDot ? load_wide_first(from + i, width - i) : load_wide(from + i));
}

// `depth` tiles along the columns, `ld` from row to row; the last one may lie elsewhere, filled up with zeros.
struct WeightTiles {
  const elem* rows;
  int64_t ld, depth;
  const elem* last;
  int64_t last_ld;
};
// The sums that a block begins with: `ld` from row to row, `next` from one tile of tokens to the next.
struct FirstSums {
  const float* rows;
  int64_t ld, next;
};

template <int R, int T>
STEN_FN void multiply_block(const WeightTiles& w, const elem* x, int64_t next, const FirstSums& first, float* sums,
                            int64_t ld) {
  const int64_t step = first.ld * static_cast<int64_t>(sizeof(float));
  tiles::load<0>(first.rows, step);
  if constexpr (T > 1) tiles::load<1>(first.rows + first.next, step);
  if constexpr (R > 1) tiles::load<2>(first.rows + kTile * first.ld, step);
  if constexpr (R > 1 && T > 1) tiles::load<3>(first.rows + kTile * first.ld + first.next, step);
  for (int64_t d = 0; d + 1 < w.depth; ++d)
    multiply_tiles<R, T>(w.rows + d * kTileColumns, w.ld, x + d * kTileSize, next);
  multiply_tiles<R, T>(w.last, w.last_ld, x + (w.depth - 1) * kTileSize, next);
  store_sums_of<R, T>(sums, ld);
}

// What the sums of at most two tiles of `rows` rows begin with.
STEN_INLINE void spread_start(const float* start, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows && r < kTwoTiles; ++r) store(out + r * kWidth, broadcast(start + r));
}

template <int V>
STEN_FN void band_tiles(const BandsOf<elem>& w, const BandRange& b, const BandRows& q, const float* start,
                        const elem* panel, float* acc) {
  constexpr int S = V * kWidth;
  constexpr int64_t kNext = kBlockTiles<V> * kTileSize;
  alignas(64) elem x[V * kNext], copied[kTwoTiles * kRowStep];
  alignas(64) float some[kTwoTiles * S], starts[2][kTwoTiles * kWidth];
  poison(copied);
  if (start) spread_start(start + q.lo - b.r0, q.hi - q.lo, starts[0]);
  if (start && q.begin == q.end)
    for (int64_t row = q.lo - b.r0; row < q.hi - b.r0; ++row)
      for (int v = 0; v < V; ++v) store(acc + row * S + v * kWidth, broadcast(start + row));
  const int64_t most = w.crow ? kBlockEntries<V> / w.width : kBlockEntries<V>;
  for (int64_t e = q.begin, end; e < q.end; e = end) {
    end = q.end - e < most ? q.end : e + most;
    const int64_t depth = pair_columns<V>(w, b, q.band, e, end, panel, x);
    for (int64_t row = q.lo, count; row < q.hi; row += count) {
      count = q.hi - row < kTwoTiles ? q.hi - row : kTwoTiles;
      const bool whole = count % kTile == 0;    // or rows that follow are not those of this band
      WeightTiles tiles{copied, kRowStep, depth, copied + (depth - 1) * kTileColumns, kRowStep};
      if (whole && !w.crow) {
        const elem* from = w.values + value_at(w, q.band, row, e);
        const int64_t left = (end - e) % kTileColumns;
        tiles = {from, w.count, depth, from + (depth - 1) * kTileColumns, w.count};
        if (left) {
          for (int64_t r = 0; r < count; ++r)
            store_wide(copied + r * kTileColumns, load_wide_first(tiles.last + r * w.count, left));
          tiles.last = copied, tiles.last_ld = kTileColumns;
        }
      } else {
        for (int64_t r = 0; r < count; ++r) copy_entries(w, q.band, row + r, e, end, copied + r * kRowStep);
      }
      float* sums = acc + (row - b.r0) * S;
      float* to = whole ? sums : some;
      const bool begins = start && e == q.begin;
      if (begins) spread_start(start + row + count - b.r0, q.hi - row - count, starts[(row - q.lo) / kTwoTiles % 2 ^ 1]);
      if (!whole && !begins)
        for (int64_t i = 0; i < count * S; i += kWidth) store(some + i, load(sums + i));
#pragma GCC unroll 2
      for (int v = 0; v < V; v += 2) {
        constexpr int kRest = V % 2 ? 1 : 2;
        const auto multiply = v + 1 < V ? (count > kTile ? multiply_block<2, 2> : multiply_block<1, 2>)
                                        : (count > kTile ? multiply_block<2, kRest> : multiply_block<1, kRest>);
        const FirstSums first = begins ? FirstSums{starts[(row - q.lo) / kTwoTiles % 2], kWidth, 0}
                                       : FirstSums{to + v * kWidth, S, kWidth};
        multiply(tiles, x + v * kNext, kNext, first, to + v * kWidth, S);
      }
      if (!whole)
        for (int64_t i = 0; i < count * S; i += kWidth) store(sums + i, load(some + i));
    }
  }
}

STEN_FN void bands_tiles(const BandsOf<elem>& w, const BandRange& b, const float* start, const elem* panel, int v,
                         float* acc) {
  if (w.height < kLeastTileRows || (w.crow && (w.width % 2 || w.width > kBlockEntries<kMaxVectors>)))
    return bands_block(w, b, start, panel, v, acc);
  const auto run = v == 1 ? band_tiles<1> : v == 2 ? band_tiles<2> : v == 3 ? band_tiles<3> : band_tiles<4>;
  const tiles::InUse in_use;
  for (int64_t band = b.r0 / w.height; band * w.height < b.r1; ++band) run(w, b, rows_of(w, b, band), start, panel, acc);
}

constexpr Dots<elem> make_tiles() {
  return {bands_dots, bitmap_tiles, bitmap_expand, bitmap_collect,
          {load_panel, store_panel, csr_block, bands_tiles, grouped_block}, kTwoTiles, kTwoTiles, kFewTileTokens};
}

}  // namespace sten::avx512_bf16
