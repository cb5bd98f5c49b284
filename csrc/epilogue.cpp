// Activations and sparsifiers at the end of an operator: see epilogue.h.
#include "epilogue.h"

#include <cmath>
#include <cstring>

namespace sten {
namespace {

float number(float x) { return x; }
float number(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
void round_to(const Kernels&, float x, float* to) { *to = x; }
void round_to(const Kernels& k, float x, bf16* to) { k.narrow(&x, 1, to); }

// The columns of the largest of every block of M (0: of e.block): each is compared with all others of its block. One more
// than there are may be written.
template <int M>
int32_t* largest_of_blocks(const Epilogue& e, const uint32_t* key, int64_t columns, int32_t* out) {
  const int64_t m = M ? M : e.block;
  for (int64_t b = 0; b + m <= columns; b += m)
    for (int64_t i = 0; i < m; ++i) {
      int64_t larger = 0;
      for (int64_t j = 0; j < m; ++j) larger += j < i ? key[b + j] >= key[b + i] : key[b + j] > key[b + i];
      *out = static_cast<int32_t>(b + i);
      out += larger < e.count;
    }
  return out;
}

template <typename E>
void block_columns(const Epilogue& e, const E* f, int64_t columns, uint32_t* key, int32_t* out) {
  for (int64_t i = 0; i < columns; ++i) key[i] = magnitude_key(f[i]);
  if (e.block == 4) largest_of_blocks<4>(e, key, columns, out);
  else if (e.block == 8) largest_of_blocks<8>(e, key, columns, out);
  else largest_of_blocks<0>(e, key, columns, out);
}

// Whether an entry is kept by itself.
template <typename E, typename F>
void each_choice(const Epilogue& e, const E* f, const float* uniform, int64_t n, F&& use) {
  const float edge = e.edge;
  if (e.keep == Keep::all)
    for (int64_t i = 0; i < n; ++i) use(i, true);
  if (e.keep == Keep::magnitude)
    for (int64_t i = 0; i < n; ++i) use(i, std::fabs(number(f[i])) > edge);
  if (e.keep == Keep::above)
    for (int64_t i = 0; i < n; ++i) use(i, number(f[i]) > edge);
  if (e.keep == Keep::random)
    for (int64_t i = 0; i < n; ++i) use(i, uniform[i] < edge);
}

// The kept columns of a row, ascending; `out` has n + 1 elements, key 2 n.
template <typename E>
int64_t kept_columns(const Epilogue& e, const E* f, const float* uniform, int64_t n, uint32_t* key, int32_t* out) {
  if (e.keep == Keep::row) {
    for (int64_t i = 0; i < n; ++i) key[i] = magnitude_key(f[i]);
    top_columns(key, n, e.count, key + n, out);
    return e.count;
  }
  if (e.keep == Keep::blocks) {
    block_columns(e, f, n, key, out);
    return e.entries(n);
  }
  int64_t found = 0;
  each_choice(e, f, uniform, n, [&](int64_t i, bool keeps) {
    out[found] = static_cast<int32_t>(i);
    found += keeps;
  });
  return found;
}

Pool pool_for(Pool pool, int64_t rows, int64_t columns) {
  pool.threads = useful_threads(pool.threads, 8.0 * static_cast<double>(rows) * static_cast<double>(columns));
  return pool;
}

}  // namespace

template <typename E>
void finish_rows(const Epilogue& e, E* y, int64_t ld, int64_t rows, int64_t columns, const Kernels& k) {
  Scratch<uint32_t> keys(Role::index, e.counts() ? 2 * columns : 1);
  Scratch<int32_t> kept(Role::cuts, e.counts() ? columns + 1 : 1);
  Scratch<E> copy(Role::values, e.counts() ? columns : 1);
  for (int64_t r = 0; r < rows; ++r, y += ld) {
    activate(static_cast<int>(e.activation), y, columns, k);
    if (!e.counts()) {
      if (e.keep != Keep::all)
        each_choice(e, y, nullptr, columns, [&](int64_t i, bool keeps) { y[i] = keeps ? y[i] : E{}; });
      continue;
    }
    const int64_t n = kept_columns(e, y, nullptr, columns, keys.get(), kept.get());
    std::memcpy(copy.get(), y, static_cast<size_t>(columns) * sizeof(E));
    std::memset(static_cast<void*>(y), 0, static_cast<size_t>(columns) * sizeof(E));
    for (int64_t i = 0; i < n; ++i) y[kept.get()[i]] = copy.get()[kept.get()[i]];
  }
}

template <typename E>
void finish_rows(const Epilogue& e, E* y, int64_t rows, int64_t columns, const Kernels& k, Pool pool) {
  if (columns == 0) return;
  pool_for(pool, rows, columns).each(rows, [&](int64_t begin, int64_t end) {
    finish_rows(e, y + begin * columns, columns, end - begin, columns, k);
  });
}

template <typename E>
bool count_kept(const Epilogue& e, const E* x, const float* uniform, int64_t rows, int64_t columns, E* y, int32_t* crow,
                const Kernels& k, Pool pool) {
  crow[0] = 0;
  pool_for(pool, rows, columns).each(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * columns;
      if (e.activation != Activation::none) {
        std::copy(x + at, x + at + columns, y + at);
        activate(static_cast<int>(e.activation), y + at, columns, k);
      }
      int32_t count = 0;
      if (e.counts()) count = static_cast<int32_t>(e.entries(columns));
      else each_choice(e, y + at, uniform ? uniform + at : nullptr, columns, [&](int64_t, bool keeps) { count += keeps; });
      crow[r + 1] = count;
    }
  });
  int64_t all = 0;
  for (int64_t r = 0; r < rows; ++r) {
    all += crow[r + 1];
    if (all > INT32_MAX) return false;
    crow[r + 1] = static_cast<int32_t>(all);
  }
  return true;
}

template <typename E>
void store_kept(const Epilogue& e, const E* x, const E* y, const float* uniform, int64_t rows, int64_t columns,
                const int32_t* crow, E* values, int32_t* col, E* before, const Kernels& k, Pool pool) {
  pool_for(pool, rows, columns).each(rows, [&](int64_t begin, int64_t end) {
    Scratch<uint32_t> keys(Role::index, e.counts() ? 2 * columns : 1);
    Scratch<int32_t> kept(Role::cuts, columns + 1);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * columns, to = crow[r];
      const int64_t n = kept_columns(e, y + at, uniform ? uniform + at : nullptr, columns, keys.get(), kept.get());
      for (int64_t i = 0; i < n; ++i) {
        const int32_t c = kept.get()[i];
        col[to + i] = c;
        if (before) before[to + i] = x[at + c];
        if (e.keep == Keep::random) round_to(k, number(y[at + c]) / e.edge, values + to + i);
        else values[to + i] = y[at + c];
      }
    }
  });
}

#define STEN_INSTANTIATE(E)                                                                                       \
  template void finish_rows(const Epilogue&, E*, int64_t, int64_t, int64_t, const Kernels&);                      \
  template void finish_rows(const Epilogue&, E*, int64_t, int64_t, const Kernels&, Pool);                         \
  template bool count_kept(const Epilogue&, const E*, const float*, int64_t, int64_t, E*, int32_t*, const Kernels&, \
                           Pool);                                                                                 \
  template void store_kept(const Epilogue&, const E*, const E*, const float*, int64_t, int64_t, const int32_t*, E*, \
                           int32_t*, E*, const Kernels&, Pool);
STEN_INSTANTIATE(float)
STEN_INSTANTIATE(bf16)

}  // namespace sten
