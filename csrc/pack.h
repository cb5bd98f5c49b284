// Packing: choosing masks, and storing weights in NM and GroupedNM. No torch, no intrinsics.
#pragma once

#include "linear.h"

namespace sten {

// A mask that is read is bytes, zero or not, as a bool tensor made by `view` may have other numbers than 0 and 1.

// keep[i]: the `count` highest of `size` scores, or the n highest of each group of m; ties go to the lower index, NaN
// counts as the lowest.
void top_mask(const float* score, int64_t size, int64_t count, bool* keep, Pool pool);
template <typename T>
void top_of_groups(const T* score, int64_t groups, int64_t m, int64_t n, bool* keep, Pool pool);

// The sums over blocks of height x width of a matrix, row by row; of a mask, how many entries each has. In float64, so that
// what they decide does not depend on how a device adds up.
template <typename T>    // float, double or uint8_t, a mask
void block_sums(const T* x, int64_t rows, int64_t columns, int64_t height, int64_t width, double* sums, Pool pool);

// Rows of a mask as compressed rows: first the offsets, crow[rows] of them in all, then what they are.
void count_rows(const uint8_t* mask, int64_t rows, int64_t columns, int64_t* crow, Pool pool);
template <typename T>
void compress(const T* dense, const uint8_t* mask, int64_t rows, int64_t columns, const int64_t* crow, T* values,
              int32_t* col, Pool pool);

// The index of NM(n, m) for a mask of groups, with the lowest free columns added to those of fewer than n entries:
// a bitmap if `bits` is 1, else positions of so many bits. Returns the most that were added to a group, or -1 if one has
// more than n, and then the index is not complete.
int64_t nm_index(const uint8_t* mask, int64_t rows, int64_t groups, int64_t n, int64_t m, int64_t bits, int64_t width,
              uint8_t* index, Pool pool);

// A weight (rows, columns) in GroupedNM(n, m, g); its last strip and chunk may be short.
struct GroupedShape {
  GroupedShape(int64_t n, int64_t m, int64_t g, int64_t rows, int64_t columns);
  int64_t n, m, g, rows, columns;
  const int32_t* order;    // (patterns, n), see Grouped::rows
  int64_t patterns, width, chunks, strips;    // `width` columns of a chunk
  int64_t first_slot(int64_t chunk, int64_t strip) const { return (chunk * strips + strip) * width; }
  int64_t rows_of(int64_t strip) const { return std::min(m, rows - strip * m); }
  int64_t columns_of(int64_t chunk) const { return std::min(width, columns - chunk * width); }
};

// The mask of (nearly) the highest total score: auction, greedy choice, exchanges (sten/layouts/grouped_nm.py).
void grouped_mask(const GroupedShape& s, const float* score, bool* mask, const Kernels& k, Pool pool);
// The index of a mask; unsolved[chunk, strip] where a column that is no padding has not n entries, or a pattern is used
// more than g times: there the index is not written.
void grouped_index(const GroupedShape& s, const uint8_t* mask, int16_t* index, bool* unsolved, Pool pool);
// The dense matrix, and the values of one; T is as wide as their dtype. An index beyond a chunk is left out, and makes
// the result false.
template <typename T>
bool grouped_expand(const GroupedShape& s, const T* values, const int16_t* index, T* dense, Pool pool);
template <typename T>
bool grouped_collect(const GroupedShape& s, const T* dense, const int16_t* index, T* values, Pool pool);

}  // namespace sten
