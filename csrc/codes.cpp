// Sparse activations ("codes") times a dense matrix, whose rows belong to their columns: only the rows in use are read.
//
//   codes_linear       y = S W + bias
//   codes_grad_values  grad W^T at the entries of S
//   codes_grad_weight  S^T grad: the rows of grad, added up by columns of S; in the order of the tokens, so that the
//                      result is the same in each run
//   codes_topk         the columns of the largest magnitudes of each row of a dense matrix
//
// S (tokens, columns) has a token a row: `Bands` of width 1, whose rows in a band share their columns.
#include <cstring>

#include "linear.h"

namespace sten {
namespace {

constexpr int64_t kPiece = 4096;    // bytes of a row that are read before the next row: a page
constexpr int64_t kShared = 16;     // tokens of a band at a time; their sums stay in a second-level cache
constexpr int64_t kEntries = 8;     // rows that all of them read before the next ones

struct Entries {
  int64_t begin, end;       // in the list of row numbers
  const int32_t* row;       // begins at `begin`
};

Entries entries_of(const Bands& s, int64_t band) {
  const int64_t begin = s.crow ? s.crow[band] : band * s.count, end = s.crow ? s.crow[band + 1] : begin + s.count;
  return {begin, end, s.col + begin};
}

// Where the value of a token's entry is stored, and how far from it the next one's.
struct Values {
  int64_t at, step;
};

Values values_of(const Bands& s, int64_t band, int64_t token, const Entries& entries) {
  if (s.crow) return {entries.begin * s.height + token - band * s.height, s.height};
  return {token * s.count, 1};
}

double work(const Bands& s, int64_t width) {
  const double all = s.crow ? static_cast<double>(s.crow[s.bands()]) * s.height : static_cast<double>(s.rows) * s.count;
  return all * width;
}

void add(const Kernels& k, Table<float> t, const int32_t* row, int64_t count, const float* value, int64_t step,
         int64_t n, float* acc) {
  k.add_rows(t, row, count, value, step, n, acc);
}
void add(const Kernels& k, Table<bf16> t, const int32_t* row, int64_t count, const float* value, int64_t step,
         int64_t n, float* acc) {
  k.add_rows_bf16(t, row, count, value, step, n, acc);
}
void dot(const Kernels& k, Table<float> t, const int32_t* row, int64_t count, const float* grad, int64_t n, float* out,
         int64_t step) {
  k.dot_rows(t, row, count, grad, n, out, step);
}
void dot(const Kernels& k, Table<bf16> t, const int32_t* row, int64_t count, const float* grad, int64_t n,
         float* out, int64_t step) {
  k.dot_rows_bf16(t, row, count, grad, n, out, step);
}
void put(const Kernels&, const float* from, int64_t n, float* to) { std::copy(from, from + n, to); }
void put(const Kernels& k, const float* from, int64_t n, bf16* to) { k.narrow(from, n, to); }
const float* numbers(const Kernels&, const float* from, int64_t, float*) { return from; }
const float* numbers(const Kernels& k, const bf16* from, int64_t n, float* scratch) {
  k.widen(from, n, scratch);
  return scratch;
}

// y[:, columns] of the tokens of a band
template <typename E>
void band_piece(const Bands& s, int64_t band, Table<E> table, const float* bias, Range columns, const Kernels& k,
                float* acc, E* y) {
  const Entries entries = entries_of(s, band);
  const int64_t last = std::min((band + 1) * s.height, s.rows), n = columns.end - columns.begin;
  const Table<E> piece{table.data + columns.begin, table.ld};
  for (int64_t t0 = band * s.height; t0 < last; t0 += kShared) {
    const int64_t t1 = std::min(t0 + kShared, last), count = entries.end - entries.begin;
    for (int64_t t = t0; t < t1; ++t) {
      if (bias) std::copy(bias + columns.begin, bias + columns.end, acc + (t - t0) * n);
      else std::fill(acc + (t - t0) * n, acc + (t - t0 + 1) * n, 0.0f);
    }
    const int64_t together = t1 - t0 == 1 ? count : kEntries;
    for (int64_t e = 0; e < count; e += together)
      for (int64_t t = t0; t < t1; ++t) {
        const Values v = values_of(s, band, t, entries);
        add(k, piece, entries.row + e, std::min(together, count - e), s.values + v.at + e * v.step, v.step, n,
            acc + (t - t0) * n);
      }
    for (int64_t t = t0; t < t1; ++t) put(k, acc + (t - t0) * n, n, y + t * table.ld + columns.begin);
  }
}

}  // namespace

template <typename E>
void codes_linear(const Bands& s, Table<E> table, const float* bias, E* y, const Kernels& k, Pool pool) {
  const int64_t bands = s.bands(), most = kPiece / static_cast<int64_t>(sizeof(E));
  if (s.rows == 0 || table.ld == 0) return;
  pool.threads = useful_threads(pool.threads, work(s, table.ld));
  int64_t pieces = ceil_div(table.ld, most);
  if (bands < 2 * pool.threads) pieces = ceil_div(pieces, pool.threads) * pool.threads;
  pieces = std::min(pieces, ceil_div(table.ld, k.width));
  pool.each(bands * pieces, [&](int64_t begin, int64_t end) {
    Scratch<float> acc(Role::sums, std::min(s.height, kShared) * ceil_div(table.ld, pieces));
    for (int64_t task = begin; task < end; ++task)
      band_piece(s, task / pieces, table, bias, part(table.ld, pieces, task % pieces), k, acc.get(), y);
  });
}

template <typename E>
void codes_grad_values(const Bands& s, Table<E> table, const E* grad, float* out, const Kernels& k, Pool pool) {
  if (s.rows == 0) return;
  pool.threads = useful_threads(pool.threads, work(s, table.ld));
  pool.each(s.rows, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(Role::panel, table.ld);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t band = token / s.height;
      const Entries entries = entries_of(s, band);
      const Values v = values_of(s, band, token, entries);
      const float* g = numbers(k, grad + token * table.ld, table.ld, scratch.get());
      dot(k, table, entries.row, entries.end - entries.begin, g, table.ld, out + v.at, v.step);
    }
  });
}

template <typename E>
void codes_grad_weight(const Bands& s, Table<E> grad, E* out, const Kernels& k, Pool pool) {
  // The entries sorted by columns, and in a column by tokens, as the compressed rows of S^T.
  const int64_t all = s.crow ? s.crow[s.bands()] * s.height : s.rows * s.count;
  Scratch<float> values(Role::values, all);
  Scratch<int32_t> index(Role::index, s.columns + 1 + all);
  int32_t *crow = index.get(), *token = crow + s.columns + 1;
  std::fill(crow, crow + s.columns + 1, 0);
  for (int64_t band = 0; band < s.bands(); ++band) {
    const Entries entries = entries_of(s, band);
    const int64_t tokens = std::min(s.height, s.rows - band * s.height);
    for (int64_t e = 0; e < entries.end - entries.begin; ++e) crow[entries.row[e]] += static_cast<int32_t>(tokens);
  }
  for (int64_t c = 1; c <= s.columns; ++c) crow[c] += crow[c - 1];
  for (int64_t t = s.rows; t-- > 0;) {    // backwards, so that each offset ends up as the first one of its column
    const Entries entries = entries_of(s, t / s.height);
    const Values v = values_of(s, t / s.height, t, entries);
    for (int64_t e = 0; e < entries.end - entries.begin; ++e) {
      const int32_t to = --crow[entries.row[e]];
      values.get()[to] = s.values[v.at + e * v.step];
      token[to] = static_cast<int32_t>(t);
    }
  }
  codes_linear({values.get(), crow, token, s.columns, s.rows, 1, 1, 0}, grad, nullptr, out, k, pool);
}

constexpr int kBins = 2048, kShift = 20;    // of keys below 2^31: the exponent and three more bits

void top_columns(const uint32_t* key, int64_t n, int64_t count, uint32_t* candidates, int32_t* out) {
  int32_t bins[kBins] = {};
  for (int64_t i = 0; i < n; ++i) ++bins[key[i] >> kShift];
  int64_t left = count;
  uint32_t bin = kBins;
  while (bins[--bin] < left) left -= bins[bin];
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    candidates[found] = key[i];
    found += key[i] >> kShift == bin;
  }
  std::nth_element(candidates, candidates + found - left, candidates + found);
  const uint32_t edge = candidates[found - left];
  for (int64_t i = found - left; i < found; ++i) left -= candidates[i] > edge;    // what remains: equal to the edge
  for (int64_t i = 0; i < n && count > 0; ++i) {
    const bool tie = key[i] == edge && left > 0;
    if (key[i] <= edge && !tie) continue;
    left -= tie;
    --count;
    *out++ = static_cast<int32_t>(i);
  }
}

template <typename E>
void codes_topk(const E* x, int64_t rows, int64_t columns, int64_t count, int32_t* out, Pool pool) {
  pool.threads = useful_threads(pool.threads, 8.0 * static_cast<double>(rows) * columns);
  pool.each(rows, [&](int64_t begin, int64_t end) {
    Scratch<uint32_t> keys(Role::index, 2 * columns);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < columns; ++i) keys.get()[i] = magnitude_key(x[r * columns + i]);
      top_columns(keys.get(), columns, count, keys.get() + columns, out + r * count);
    }
  });
}

template void codes_topk(const float*, int64_t, int64_t, int64_t, int32_t*, Pool);
template void codes_topk(const bf16*, int64_t, int64_t, int64_t, int32_t*, Pool);
template void codes_linear(const Bands&, Table<float>, const float*, float*, const Kernels&, Pool);
template void codes_linear(const Bands&, Table<bf16>, const float*, bf16*, const Kernels&, Pool);
template void codes_grad_values(const Bands&, Table<float>, const float*, float*, const Kernels&, Pool);
template void codes_grad_values(const Bands&, Table<bf16>, const bf16*, float*, const Kernels&, Pool);
template void codes_grad_weight(const Bands&, Table<float>, float*, const Kernels&, Pool);
template void codes_grad_weight(const Bands&, Table<bf16>, bf16*, const Kernels&, Pool);

}  // namespace sten
