// y = x W^T + bias for the stored formats: the drivers that split the work into tasks. No torch, no intrinsics.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace sten {

template <typename E>
double entries(const BandsOf<E>& w) {
  return w.crow ? static_cast<double>(w.crow[w.bands()]) * w.height * w.width : static_cast<double>(w.rows) * w.count;
}

template <typename E>
double entries(const GroupedOf<E>& w) {
  return static_cast<double>(w.chunks * w.strips) * w.columns() * w.n;
}

// How tasks are spread over threads; `run` calls body(context, begin, end) for ranges that cover 0 to tasks - 1.
struct Pool {
  int threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);

  template <typename F>
  void each(int64_t tasks, F&& body) const {
    using Body = std::remove_reference_t<F>;
    auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); };
    if (tasks <= 0) return;
    if (tasks == 1 || threads == 1) return body(static_cast<int64_t>(0), tasks);
    run(tasks, call, const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// Uninitialized memory, aligned to a cache line. A thread caches what it freed last, one piece per role, for its next
// call: a new megabyte costs a page fault every 4 KB, which was a fifth of a whole call.
enum class Role { panel, sums, repacked, cuts, small, values, index, bits, count };

void* take_scratch(Role role, size_t bytes, size_t* capacity);
void give_scratch(Role role, void* memory, size_t capacity) noexcept;

template <typename T>
class Scratch {
 public:
  Scratch(Role role, int64_t n)
      : role_(role), memory_(static_cast<T*>(take_scratch(role, static_cast<size_t>(n) * sizeof(T), &capacity_))) {}
  ~Scratch() { give_scratch(role_, memory_, capacity_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return memory_; }

 private:
  Role role_;
  size_t capacity_ = 0;
  T* memory_;
};

// The grid of tasks: panels of tokens times pieces of rows.
struct Grid {
  int64_t panel_tokens;   // of every panel but the last
  int64_t panels, pieces;
  int64_t tasks() const { return panels * pieces; }
};

// At least `least` pieces, and as many as keep the threads busy, up to `most`.
Grid make_grid(const Problem& p, const Kernels& k, int threads, int64_t least, int64_t most);

// Pieces of rows whose sums for a whole panel fit a second-level cache together with the weights of the piece.
int64_t pieces_for_cache(const Problem& p, const Kernels& k);

struct Range {
  int64_t begin, end;
};
inline Range part(int64_t all, int64_t parts, int64_t i) { return {all * i / parts, all * (i + 1) / parts}; }

// The rows of piece `i`: multiples of kUnit.
constexpr int64_t kUnit = 8;    // rows that are not divided between tasks
Range piece_rows(int64_t out, int64_t pieces, int64_t i);

// Into how many pieces to divide each of `tasks` tasks: every piece reads its panel again, so the fewest that leave no
// thread idle for long.
int64_t pieces_for_threads(int64_t tasks, int threads, int64_t least, int64_t most);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of threads that pays for this many multiply-adds.
inline int useful_threads(int threads, double work) {
  constexpr double kWorkPerThread = 16384.0;
  return static_cast<int>(std::max(1.0, std::min(static_cast<double>(threads), work / kWorkPerThread)));
}

inline float to_float(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// start[r] = bias[r0 + r] for r < rows, zero where there is none
void fill_start(const Problem& p, int64_t r0, int64_t rows, float* start);
inline void fill_start(const ProblemOf<bf16>& p, int64_t r0, int64_t rows, float* start) {
  for (int64_t r = 0; r < rows; ++r) start[r] = p.bias && r0 + r < p.out ? to_float(p.bias[r0 + r]) : 0.0f;
}

// y = an activation of y
inline void activate(int activation, float* y, int64_t n, const Kernels& k) { k.activate(activation, y, n); }
inline void activate(int activation, bf16* y, int64_t n, const Kernels& k) {
  constexpr int64_t kSome = 512;
  float numbers[kSome];
  for (int64_t i = 0; i < n && activation; i += kSome) {
    const int64_t some = std::min(kSome, n - i);
    k.widen(y + i, some, numbers);
    k.activate(activation, numbers, some);
    k.narrow(numbers, some, y + i);
  }
}

// What a task does with the block of y that it has just computed, which the caches hold.
template <typename E>
void finish_rows(const ProblemOf<E>& p, Range rows, Range tokens, const Kernels& k) {
  for (int64_t t = tokens.begin; t < tokens.end && p.activation; ++t)
    activate(p.activation, p.y + t * p.out + rows.begin, rows.end - rows.begin, k);
}

// The same from a panel of sums, which are rounded afterwards; with few tokens much of a panel is padding.
template <typename E>
void store_and_finish(const ProblemOf<E>& p, float* sums, Range rows, Range tokens, const Panels<E>& panels,
                      const Kernels& k) {
  const int64_t count = tokens.end - tokens.begin, v = ceil_div(count, k.width), all = rows.end - rows.begin;
  const bool padding = 2 * p.tokens <= k.width;
  if (!padding) k.activate(p.activation, sums, all * v * k.width);
  panels.store(sums, all, count, static_cast<int>(v), p.y + tokens.begin * p.out + rows.begin, p.out);
  if (padding) finish_rows(p, rows, tokens, k);
}

// The numbers alone, for the functions that cut the work.
template <typename E>
Problem sizes_of(const ProblemOf<E>& p) {
  return {nullptr, nullptr, nullptr, p.tokens, p.in, p.out};
}

// Whether every index of the pattern lies in its operands; columns must ascend within a row.
bool csr_in_bounds(const Csr& w, int64_t rows, int64_t slots, int64_t in, const Pool& pool);
bool grouped_in_bounds(const Grouped& w, const Pool& pool);

bool bands_in_bounds(const Bands& w, int64_t entries, const Pool& pool);
// The bitmap of a pattern of single entries: bits, zero before, has a word for each 32 columns of a row.
void set_bits(const Bands& w, uint32_t* bits, const Pool& pool);
// The groups of a pattern of single entries, see WindowsOf: counts[r + 1] of row r; then, by their sums, the groups
void count_windows(const Bands& w, int32_t* counts, const Pool& pool);
void set_windows(const Bands& w, const int32_t* first, uint32_t* head, uint8_t* offset, const Pool& pool);
bool all_finite(const float* x, int64_t n);
bool all_finite(const bf16* x, int64_t n);

void csr_linear(const Problem& p, const Csr& w, const Kernels& k, Pool pool);
// the same for several panels of tokens, where repacking the weight pays
constexpr int64_t kRepackPanels = 2;
template <typename E>
void csr_panels(const ProblemOf<E>& p, const CsrOf<E>& w, const Panels<E>& panels, const Kernels& k, Pool pool);
template <typename E>
void grouped_linear(const ProblemOf<E>& p, const GroupedOf<E>& w, const Panels<E>& panels, const Kernels& k, Pool pool);
// y = x W: p.x is the gradient of the output, p.y that of the input
void grouped_grad_input(const Problem& p, const Grouped& w, const Kernels& k, Pool pool);
// out, shaped as w.values and zero before: grad^T x, (rows, in), at the stored entries; w.values is not read
void grouped_grad_values(const float* grad, const float* x, int64_t tokens, int64_t rows, int64_t in, const Grouped& w,
                         float* out, const Kernels& k, Pool pool);

// Dot products along the columns, and the number of tokens up to which they are the fastest way: lists if width is 0.
int64_t most_dots(int64_t height, int64_t width);
template <typename E>
void dots_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const Dots<E>& dots, const Kernels& k, Pool pool);
template <typename E>
void bitmap_linear(const ProblemOf<E>& p, const BitmapOf<E>& w, const Dots<E>& dots, const Kernels& k, Pool pool);
// single entries in single rows, by the bitmap of their pattern; x is finite, since zeros between entries multiply it
template <typename E>
void bits_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const uint8_t* bits, const Dots<E>& dots, const Kernels& k,
                 Pool pool);
// the dense matrix of the first `columns` of them
template <typename E>
void bits_expand(const BandsOf<E>& w, const uint8_t* bits, int64_t columns, const Dots<E>& dots, E* dense, Pool pool);
// bits_linear by their groups, at `table`: first, head and offset, one after the other; dots.windows exists
template <typename E>
void windows_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const int32_t* table, const Dots<E>& dots, const Kernels& k,
                    Pool pool);
// a bitmap as a dense matrix (rows, columns), and the values of a dense matrix
template <typename E>
void bitmap_expand(const BitmapOf<E>& w, int64_t columns, const Dots<E>& dots, E* dense, Pool pool);
template <typename E>
void bitmap_collect(const BitmapOf<E>& w, int64_t columns, const E* dense, const Dots<E>& dots, E* values, Pool pool);

// VectorNM, FanIn, BSR, and CSR of bfloat16; x may have fewer columns than the weight, whose last ones are padding.
template <typename E>
void bands_linear(const ProblemOf<E>& p, const BandsOf<E>& w, const Dots<E>& dots, const Kernels& k, Pool pool);
// y = x W: p.x is the gradient of the output (tokens, w.rows), p.y that of the input
void bands_grad_input(const Problem& p, const Bands& w, const Kernels& k, Pool pool);
// out, shaped as w.values and zero before: grad^T x at the stored entries; w.values is not read
void bands_grad_values(const float* grad, const float* x, int64_t tokens, int64_t in, const Bands& w, float* out,
                       const Kernels& k, Pool pool);

// A convolution of images (images, groups * channels, h, w), computed directly: no matrix of patches is made. A column
// of w is (channel, kernel row, kernel column), or with `inputs_last` (kernel row, kernel column, channel), where the
// channels have their padding.
template <typename W>    // Bands or Grouped
void convolve(ConvShape s, int64_t images, int64_t groups, const float* x, const float* bias, float* y, const W& w,
              bool inputs_last, const Kernels& k, Pool pool);

// Sparse activations S (tokens, columns), bands of width 1, times a dense matrix of s.columns rows: codes.cpp
template <typename E>
void codes_linear(const Bands& s, Table<E> table, const float* bias, E* y, const Kernels& k, Pool pool);
// out, shaped as s.values, which is not read; where s.rows ends within a band, the rest of it is not written
template <typename E>
void codes_grad_values(const Bands& s, Table<E> table, const E* grad, float* out, const Kernels& k, Pool pool);
// out (s.columns, grad.ld)
template <typename E>
void codes_grad_weight(const Bands& s, Table<E> grad, E* out, const Kernels& k, Pool pool);
// out (rows, count), ascending in a row: the columns of the largest |x|, where ties go to the lower column; NaN is lowest
template <typename E>
void codes_topk(const E* x, int64_t rows, int64_t columns, int64_t count, int32_t* out, Pool pool);

// Ascending with the magnitude; a NaN is below zero.
inline uint32_t magnitude_key(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffff;
  return bits > 0x7f800000 ? 0 : bits + 1;
}
inline uint32_t magnitude_key(bf16 x) {
  const uint32_t bits = (static_cast<uint32_t>(x) & 0x7fff) << 16;
  return bits > 0x7f800000 ? 0 : bits + 1;
}
// The columns of the `count` highest of n keys, ascending; of equal keys the first ones. `candidates` has n elements.
void top_columns(const uint32_t* key, int64_t n, int64_t count, uint32_t* candidates, int32_t* out);

// All n-subsets of range(m) in revolving-door order; made once for each (n, m).
struct Patterns {
  std::vector<int32_t> rows;   // (patterns, n), see Grouped::rows
  std::vector<int32_t> exchanges;   // (patterns, 2 + n), see Grouped::exchanges
};
const Patterns& patterns(int n, int m);

}  // namespace sten
