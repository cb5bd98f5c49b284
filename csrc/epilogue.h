// What happens to finished rows of an output: an activation, and which entries of it are kept.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "linear.h"

namespace sten {

enum class Activation { none, relu, gelu, gelu_tanh, silu, count };

// Of the activated row f, rounded to its dtype:
//   all         every entry
//   magnitude   |f| > edge
//   above       f > edge
//   random      uniform < edge, divided by edge
//   row         the `count` largest |f|, where ties go to the lower column; NaN is lowest
//   blocks      of every `block` columns the `count` largest |f|, likewise
enum class Keep { all, magnitude, above, random, row, blocks, kinds };

struct Epilogue {
  Activation activation;
  Keep keep;
  float edge;
  int64_t count, block;
  bool counts() const { return keep == Keep::row || keep == Keep::blocks; }    // as many entries in each row
  int64_t entries(int64_t columns) const { return keep == Keep::row ? count : columns / block * count; }
};

// In place, with zeros for what is dropped: rows of `columns` entries, `ld` apart. Not for `random`.
template <typename E>
void finish_rows(const Epilogue& e, E* y, int64_t ld, int64_t rows, int64_t columns, const Kernels& k);
template <typename E>
void finish_rows(const Epilogue& e, E* y, int64_t rows, int64_t columns, const Kernels& k, Pool pool);

// The kept entries in compressed rows, in two passes. The first one writes crow, (rows + 1,), and the activated rows to
// `y`, which may be x where there is no activation; the second one the rest, (crow[rows],): `before`, if not null, gets the
// entries of x. `uniform`, as large as x, is read for `random`. False: there are 2**31 entries or more.
template <typename E>
bool count_kept(const Epilogue& e, const E* x, const float* uniform, int64_t rows, int64_t columns, E* y, int32_t* crow,
                const Kernels& k, Pool pool);
template <typename E>
void store_kept(const Epilogue& e, const E* x, const E* y, const float* uniform, int64_t rows, int64_t columns,
                const int32_t* crow, E* values, int32_t* col, E* before, const Kernels& k, Pool pool);

}  // namespace sten
