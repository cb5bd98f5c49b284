// Dot products along the columns (VectorNM, BSR, FanIn, NM): the work cut into rows and tokens; NM to dense and back.
//
// A task copies its tokens, so that whole vectors can be read beyond their ends, and then iterates over its rows.
#include <cstring>
#include <numeric>

#include "linear.h"

namespace sten {
namespace {

// The fewest pieces of rows that keep all threads busy: each of them copies, and gathers, its tokens again.
struct Cut {
  Cut(int64_t tokens, int64_t rows, int threads, int most)
      : rows(rows), tokens(tokens), blocks(ceil_div(tokens, most)) {
    pieces = std::min<int64_t>(ceil_div(rows, kUnit), threads / std::gcd(static_cast<int64_t>(threads), blocks));
  }
  int64_t tasks() const { return blocks * pieces; }
  Range tokens_of(int64_t task) const { return part(tokens, blocks, task % blocks); }
  Range rows_of(int64_t task) const { return piece_rows(rows, pieces, task / blocks); }
  int64_t rows, tokens, blocks, pieces;
};

template <typename E>
void copy_tokens(const ProblemOf<E>& p, Range tokens, int64_t ld, E* out) {
  for (int64_t t = tokens.begin; t < tokens.end; ++t, out += ld) {
    std::copy(p.x + t * p.in, p.x + (t + 1) * p.in, out);
    std::memset(out + p.in, 0, (ld - p.in) * sizeof(E));
  }
}

// What a task of a bitmap's kernels needs.
template <typename E>
class Memory {
 public:
  explicit Memory(const BitmapOf<E>& w, int rows = 1)
      : bits_(Role::bits, rows * BitmapScratch<E>::mask_bytes(w)),
        values_(Role::values, BitmapScratch<E>::value_count(w)),
        rows_(Role::panel, rows * BitmapScratch<E>::row_count(w)) {}
  BitmapScratch<E> get() const { return {bits_.get(), values_.get(), rows_.get()}; }

 private:
  Scratch<uint8_t> bits_;
  Scratch<E> values_, rows_;
};

template <typename F>
void each_row_piece(int64_t rows, double work, Pool pool, F&& body) {
  const int64_t tasks = std::min<int64_t>(useful_threads(pool.threads, work), rows);
  pool.each(tasks, [&](int64_t begin, int64_t end) { body(part(rows, tasks, begin).begin, part(rows, tasks, end - 1).end); });
}

}  // namespace

// Measured on Zen 4, in both types. Beyond these numbers panels are faster: dot products gather activations for each list,
// and waste the lanes that a block does not fill.
int64_t most_dots(int64_t height, int64_t width) {
  if (width == 0) return height >= 64 ? 12 : height >= 16 ? 8 : height >= 4 ? 4 : 1;
  return width >= 16 ? 8 : width > 1 ? 2 : 1;
}

template <typename E>
void dots_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const Dots<E>& dots, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  pool.threads = useful_threads(pool.threads, entries(w) * static_cast<double>(p.tokens));
  const Cut cut(p.tokens, p.out, pool.threads, kDotTokens);
  const int64_t ld = w.columns + kTokenPadding, most = ceil_div(p.tokens, cut.blocks);
  pool.each(cut.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<E> x(Role::small, most * ld), gathered(Role::panel, w.crow ? 1 : most * (w.count + kTokenPadding));
    for (int64_t task = begin; task < end; ++task) {
      const Range tokens = cut.tokens_of(task), rows = cut.rows_of(task);
      copy_tokens(p, tokens, ld, x.get());
      dots.bands(w, p.bias, rows.begin, rows.end, x.get(), ld, tokens.end - tokens.begin, gathered.get(),
                 p.y + tokens.begin * p.out);
      finish_rows(p, rows, tokens, k);
    }
  });
}

template <typename E>
void bitmap_linear(const ProblemOf<E>& p, const BitmapOf<E>& w, const Dots<E>& dots, const Kernels& k, Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  pool.threads = useful_threads(pool.threads, static_cast<double>(w.begin(w.rows)) * static_cast<double>(p.tokens));
  const Cut cut(p.tokens, p.out, pool.threads, dots.bitmap_tokens);
  const int64_t ld = BitmapScratch<E>::row_count(w), most = ceil_div(p.tokens, cut.blocks);
  pool.each(cut.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<E> x(Role::small, most * ld);
    const Memory<E> memory(w, dots.bitmap_rows);
    for (int64_t task = begin; task < end; ++task) {
      const Range tokens = cut.tokens_of(task), rows = cut.rows_of(task);
      copy_tokens(p, tokens, ld, x.get());
      dots.bitmap(w, p.bias, rows.begin, rows.end, x.get(), ld, tokens.end - tokens.begin, memory.get(),
                  p.y + tokens.begin * p.out);
      finish_rows(p, rows, tokens, k);
    }
  });
}

namespace {

// crow of single entries in single rows, or of lists
template <typename E>
class Rows {
 public:
  explicit Rows(const BandsOf<E>& w) : crow_(w.crow), own_(Role::cuts, w.crow ? 1 : w.rows + 1) {
    if (crow_) return;
    for (int64_t r = 0; r <= w.rows; ++r) own_.get()[r] = static_cast<int32_t>(r * w.count);
    crow_ = own_.get();
  }
  const int32_t* get() const { return crow_; }

 private:
  const int32_t* crow_;
  Scratch<int32_t> own_;
};

}  // namespace

template <typename E>
static BitmapOf<E> bitmap_of(const BandsOf<E>& w, const uint8_t* bits, const Rows<E>& rows) {
  const int64_t words = ceil_div(w.columns, BitmapOf<E>::kUnitColumns);
  return {w.values, bits, w.rows, words, 4 * words, 32, 32, 1, rows.get()};
}

template <typename E>
void bits_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const uint8_t* bits, const Dots<E>& dots, const Kernels& k,
                 Pool pool) {
  const Rows<E> rows(w);
  bitmap_linear(p, bitmap_of(w, bits, rows), dots, k, pool);
}

template <typename E>
void bits_expand(const BandsOf<E>& w, const uint8_t* bits, int64_t columns, const Dots<E>& dots, E* dense, Pool pool) {
  const Rows<E> rows(w);
  bitmap_expand(bitmap_of(w, bits, rows), columns, dots, dense, pool);
}

template <typename E>
void windows_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const int32_t* table, const Dots<E>& dots, const Kernels& k,
                    Pool pool) {
  if (p.tokens == 0 || p.out == 0) return;
  const Rows<E> rows(w);
  const int64_t groups = table[w.rows];
  const uint32_t* head = reinterpret_cast<const uint32_t*>(table + w.rows + 1);
  const uint8_t* offset = reinterpret_cast<const uint8_t*>(head + groups);
  const WindowsOf<E> windows{w.values, rows.get(), table, head, offset, w.rows};
  pool.threads = useful_threads(pool.threads, entries(w) * static_cast<double>(p.tokens));
  const Cut cut(p.tokens, p.out, pool.threads, kDotTokens);
  const int64_t ld = ceil_div(w.columns, 32) * 32 + kTokenPadding, most = ceil_div(p.tokens, cut.blocks);
  pool.each(cut.tasks(), [&](int64_t begin, int64_t end) {
    Scratch<E> x(Role::small, most * ld);
    for (int64_t task = begin; task < end; ++task) {
      const Range tokens = cut.tokens_of(task), own = cut.rows_of(task);
      copy_tokens(p, tokens, ld, x.get());
      dots.windows(windows, p.bias, own.begin, own.end, x.get(), ld, tokens.end - tokens.begin,
                   p.y + tokens.begin * p.out);
      finish_rows(p, own, tokens, k);
    }
  });
}

template <typename E>
void bitmap_expand(const BitmapOf<E>& w, int64_t columns, const Dots<E>& dots, E* dense, Pool pool) {
  each_row_piece(w.rows, static_cast<double>(w.rows) * columns, pool, [&](int64_t begin, int64_t end) {
    const Memory<E> memory(w);
    dots.expand(w, begin, end, columns, memory.get(), dense);
  });
}

template <typename E>
void bitmap_collect(const BitmapOf<E>& w, int64_t columns, const E* dense, const Dots<E>& dots, E* values, Pool pool) {
  each_row_piece(w.rows, static_cast<double>(w.rows) * columns, pool, [&](int64_t begin, int64_t end) {
    const Memory<E> memory(w);
    dots.collect(w, begin, end, columns, dense, memory.get(), values);
  });
}

#define STEN_INSTANTIATE(E)                                                                             \
  template void dots_linear(const ProblemOf<E>&, const BandsOf<E>&, const Dots<E>&, const Kernels&, Pool);    \
  template void bitmap_linear(const ProblemOf<E>&, const BitmapOf<E>&, const Dots<E>&, const Kernels&, Pool); \
  template void bits_linear(const ProblemOf<E>&, const BandsOf<E>&, const uint8_t*, const Dots<E>&, const Kernels&, Pool); \
  template void bits_expand(const BandsOf<E>&, const uint8_t*, int64_t, const Dots<E>&, E*, Pool);                           \
  template void windows_linear(const ProblemOf<E>&, const BandsOf<E>&, const int32_t*, const Dots<E>&, const Kernels&,    \
                               Pool);                                                                                     \
  template void bitmap_expand(const BitmapOf<E>&, int64_t, const Dots<E>&, E*, Pool);                   \
  template void bitmap_collect(const BitmapOf<E>&, int64_t, const E*, const Dots<E>&, E*, Pool);
STEN_INSTANTIATE(float)
STEN_INSTANTIATE(bf16)

}  // namespace sten
