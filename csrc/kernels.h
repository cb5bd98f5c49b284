// The interface between the drivers and the kernels of an instruction set: raw pointers, no torch.
//
// Letters: T tokens, K inputs (columns), O outputs (rows); x is (T, K), y is (T, O), both row-major.
// A panel is a block of at most four vectors of tokens stored feature-major, (features, v * width), so that one row of
// it, one feature of all its tokens, is v consecutive vectors.
#pragma once

#include <cstdint>

namespace sten {

constexpr int kMaxVectors = 4;      // vectors of tokens in a panel
constexpr int kTokenPadding = 256;  // elements that may be read beyond one token's activations
constexpr int kConvVectors = 8;     // vectors of pixels that a convolution holds in registers

enum class bf16 : uint16_t {};      // the bits of a bfloat16

template <typename E>
struct ProblemOf {
  const E* x;      // (tokens, in)
  const E* bias;   // (out,) or null
  E* y;            // (tokens, out)
  int64_t tokens, in, out;
  int activation = 0;   // of y, a number of `Activation` in epilogue.h
};
using Problem = ProblemOf<float>;

template <typename E>
struct CsrOf {
  const E* values;
  const int32_t* crow;   // (out + 1,)
  const int32_t* col;
};
using Csr = CsrOf<float>;

template <typename E>
struct GroupedOf {
  const E* values;           // (chunks, strips, patterns, g, n)
  const int16_t* index;      // (chunks, strips, patterns, g)
  const int32_t* rows;       // (patterns, n): rows of a pattern inside its strip, ascending
  // (patterns, 2 + n): for a kernel with n rows in n registers: the register whose row is exchanged for this pattern,
  // its new row, and for each register the position of its row among the pattern's rows
  const int32_t* exchanges;
  int n, m, g;
  int64_t patterns, chunks, strips;
  int64_t columns() const { return patterns * g; }   // of one chunk
};
using Grouped = GroupedOf<float>;
constexpr int kPairRows = 4;    // the largest n that bfloat16 is multiplied with

struct GroupedBlock {
  int64_t c0, c1, strip0, strip1;
};

// How many entries of a row one instruction multiplies and sums: pairs of bfloat16.
template <typename E>
constexpr int kTogether = static_cast<int>(sizeof(float) / sizeof(E));

// Rows of one k-block, sorted by their count and cut into groups of `rows_at_once`; a shorter row of a group is filled
// up with zeros whose column is an extra panel row of zeros, so that they never multiply an infinite activation.
template <typename E>
struct CsrBlockOf {
  int64_t groups;
  const int32_t* count;    // (groups,) steps of a group
  const int32_t* row;      // (groups, rows_at_once) row of the accumulator panel
  const uint16_t* col;     // (sum count, rows_at_once, kTogether) row of the activation panel
  const E* value;          // as col
};

// Rows in bands of `height`, the rows of a band with the same columns (VectorNM, FanIn with height 1, BSR). An entry of
// a band is one column of all its rows (lists) or a block of `width` consecutive ones (blocks).
template <typename E>
struct BandsOf {
  const E* values;         // lists: (rows, count); blocks: (entries, height, width)
  const int32_t* crow;     // blocks: (bands + 1,); null for lists, `count` entries a band
  const int32_t* col;      // lists: (bands, count), ascending in a band; blocks: (entries,), in units of width
  int64_t rows, columns;   // columns: a multiple of width, and as many as col may name, padding included
  int64_t height, width, count;
  int64_t bands() const { return (rows + height - 1) / height; }
};
using Bands = BandsOf<float>;

// Rows r0 to r1 - 1, and of every band the entries from `begin` to `end`: positions in its list, or in col for blocks.
// Panels begin at column k0.
struct BandRange {
  int64_t r0, r1, k0;
  const int32_t *begin, *end;   // (bands,)
};

// A panel of any number of tokens: pieces of a panel row's floats, `step` floats apart.
struct LongPanel {
  const float* data;
  int64_t step;
};

// NM: of every m columns of a row, n are stored. The index has a bit for each column (bits 1), or packed positions.
// Any pattern: a bitmap with n = m = kUnitColumns and the `first` value of each row.
template <typename E>
struct BitmapOf {
  const E* values;         // (rows, groups * n), or those of each row, ascending in a row
  const uint8_t* index;    // (rows, row_bytes)
  int64_t rows, groups, row_bytes;
  int n, m, bits;
  const int32_t* first = nullptr;    // (rows + 1,); null: each row has `slots`
  int64_t slots() const { return groups * n; }    // of a row; at most so many with `first`
  int64_t begin(int64_t row) const { return first ? first[row] : row * slots(); }
  int64_t units() const { return (groups * m + kUnitColumns - 1) / kUnitColumns; }
  // how many values a unit has; 0: as many as bits, which differs
  int64_t step() const { return kUnitColumns % m == 0 && !first ? kUnitColumns / m * n : 0; }
  static constexpr int kUnitColumns = 32;    // whose bits are one word
};

// Memory for one task of a bitmap's kernels; the values and rows of x begin at multiples of a cache line.
template <typename E>
struct BitmapScratch {
  uint8_t* bits;     // Dots::bitmap_rows times mask_bytes: of rows whose index is no bitmap, or not of whole units
  E* values;         // value_count: of a row at the end of memory, or collected
  E* rows;           // Dots::bitmap_rows rows, row_count apart
  static int64_t mask_bytes(const BitmapOf<E>& w) { return w.units() * 4 + 64; }    // a wrong position adds up to 32
  static int64_t value_count(const BitmapOf<E>& w) { return (w.units() + 2) * BitmapOf<E>::kUnitColumns; }
  static int64_t row_count(const BitmapOf<E>& w) { return (w.units() + 1) * BitmapOf<E>::kUnitColumns; }
};

// A pattern of single entries in groups: up to 32 of a row that follow each other and lie within kWindow columns.
template <typename E>
struct WindowsOf {
  const E* values;         // as in CSR
  const int32_t* crow;     // (rows + 1,)
  const int32_t* first;    // (rows + 1,) groups of a row
  const uint32_t* head;    // (groups,) the window's first column, a multiple of 32, times two, plus the number of entries
  const uint8_t* offset;   // (groups, 32) columns from the first on; zeros behind the entries
  int64_t rows;
};
constexpr int kWindow = 256, kGroup = 32;

// Panels of E, whose sums are panels of floats. A panel of bfloat16 has its tokens by halves of two vectors, so that the
// pairs that an interleaving of two of its rows makes are in order: bodies_panels.h and simd_bf16.h.
template <typename E>
struct Panels {
  // panel[k, t] = x[t, k] for k < cols; tokens of the panel beyond those of x become zero
  void (*load)(const E* x, int64_t ld, int64_t tokens, int64_t cols, int v, E* panel);
  // y[t, r] = sums[r, t]
  void (*store)(const float* sums, int64_t rows, int64_t tokens, int v, E* y, int64_t ld);
  // acc[row, :] += sum of value * panel[col, :]; with `start`, acc[row, :] = start[row] + that sum
  void (*csr)(const CsrBlockOf<E>& block, const float* start, const E* panel, int v, float* acc);
  // acc[r - r0, :] += sum of value * panel[column - k0, :]; `start`, per row of acc, as above
  void (*bands)(const BandsOf<E>& w, const BandRange& range, const float* start, const E* panel, int v, float* acc);
  // acc[row - strip0 * m, :] += chunks c0 to c1 - 1 of strips strip0 to strip1 - 1; panel begins at chunk c0; `start`
  // as above; n of bfloat16 is at most kPairRows
  void (*grouped)(const GroupedOf<E>& w, const GroupedBlock& block, const float* start, const E* panel, int v, float* acc);
};

constexpr int kTileRows = 4;     // rows of a weight that dot products multiply together
constexpr int kDotTokens = 48;   // the most tokens of one call of `bands` below

// Dot products along the columns, for one token and for a few, and panels; sums in float, rounded once.
template <typename E>
struct Dots {
  // y[t, r] for rows r0 to r1 - 1, where rows of y are w.rows long; rows of x are `ld` long, at least `columns` and
  // kTokenPadding more; `gathered` has tokens * (count + kTokenPadding) elements
  void (*bands)(const BandsOf<E>& w, const E* bias, int64_t r0, int64_t r1, const E* x, int64_t ld, int64_t tokens,
                E* gathered, E* y);
  // the same; rows of x have whole units of columns
  void (*bitmap)(const BitmapOf<E>& w, const E* bias, int64_t r0, int64_t r1, const E* x, int64_t ld, int64_t tokens,
                 const BitmapScratch<E>& scratch, E* y);
  // dense[r, c], (rows, columns), for rows r0 to r1 - 1
  void (*expand)(const BitmapOf<E>& w, int64_t r0, int64_t r1, int64_t columns, const BitmapScratch<E>& scratch,
                 E* dense);
  // values[r, slot] of dense[r, c]: zero in slots of columns that the matrix does not have; w.values is not read
  void (*collect)(const BitmapOf<E>& w, int64_t r0, int64_t r1, int64_t columns, const E* dense,
                  const BitmapScratch<E>& scratch, E* values);
  Panels<E> panels;
  int bitmap_tokens, bitmap_rows;    // the most tokens of one call of `bitmap`, and the rows of its scratch memory
  int few_tokens;                    // the most tokens for which `bands` may be faster than panels
  // as `bands`; null where registers do not hold a window
  void (*windows)(const WindowsOf<E>& w, const E* bias, int64_t r0, int64_t r1, const E* x, int64_t ld, int64_t tokens,
                  E* y) = nullptr;
};

// The images of one group of a convolution. A stride divides the rows and columns of the input into phases, those with
// the same remainder, and a panel holds (channels, row phases, column phases, rows, pitch).
struct ConvShape {
  int64_t channels, h, w, out, out_h, out_w;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t row_phases, column_phases;
};

// What a panel holds: `rows` rows of each phase, from this row and column of the input on, which may be padding; of
// columns there are `phases`, each `between` columns behind the one before.
struct ConvWindow {
  int64_t row, column, rows, pitch, phases, between;
};

// Rows (outputs) r0 to r1 - 1 by a block of columns, for `vectors` vectors of pixels: what entry e of a band multiplies is
// panel[x_at[vector] + index[e]], or with a table panel[x_at[vector] + table[index[e]]], and the sum belongs to
// out[(row - r0) * ld + y_at[vector]].
struct ConvBlock {
  int64_t r0, r1;
  const int32_t *begin, *end;    // (bands,) positions as in BandRange
  const int32_t *index, *table;  // index is shaped as col, or without a table has `width` offsets for a block
  const float* panel;
  int64_t vectors;
  const int64_t *x_at, *y_at;
  const float* start;    // (r1 - r0,) the sums begin with these; null for single rows: with what `out` holds
  float* out;
  int64_t ld;
  bool join;    // single entries only: the vectors 2 i and 2 i + 1 are the even and the odd columns of 2 * width pixels of out
};

// Rows of a dense matrix with `ld` numbers a row: float32, or bfloat16 as its 16 bits.
template <typename E>
struct Table {
  const E* data;
  int64_t ld;
};
// One instruction set. `v` is the number of vectors in a panel row, 1 to kMaxVectors.
struct Kernels {
  const char* name;
  int width;           // floats in a vector
  int rows_at_once;    // rows a CSR group holds

  // panel[k, t] = x[t, k] for k < cols; tokens of the panel beyond those of x become zero
  void (*load_panel)(const float* x, int64_t ld, int64_t tokens, int64_t cols, int v, float* panel);
  // y[t, r] = panel[r, t]
  void (*store_panel)(const float* panel, int64_t rows, int64_t tokens, int v, float* y, int64_t ld);

  // out[r - r0, :] = sum over row r of value * panel[col, :] + bias[r]; rows r0 to r1 - 1
  void (*csr_rows)(const Csr& w, const float* bias, int64_t r0, int64_t r1, const float* panel, int v, float* out);
  // one token: y[r] for rows r0 to r1 - 1
  void (*csr_token)(const Csr& w, const float* bias, int64_t r0, int64_t r1, const float* x, float* y);

  // one token, one chunk: acc[strip - strip0, slot, i] += value * x[index]; x begins at the chunk and kTokenPadding
  // floats beyond it may be read, `gathered` has columns() + width floats, and
  // spread[phase, lane] = (phase + lane) / n for phase < n
  void (*grouped_token)(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, const float* x,
                        const int32_t* spread, float* gathered, float* acc);
  // acc[column, :] += the sum over all strips of value * grad[row, :], for the columns of one chunk
  void (*grouped_input)(const Grouped& w, int64_t chunk, const float* grad, int v, float* acc);
  // out[chunk, strip, pattern, j, i] += grad[row, :] * x[column, :], summed as in bands_values; grad begins at strip0, x
  // at the chunk
  void (*grouped_values)(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, LongPanel grad, LongPanel x,
                         int64_t pieces, int v, float* out);

  // acc[column - k0, :] += sum of value * grad[r - r0, :]
  void (*bands_input)(const Bands& w, const BandRange& range, const float* grad, int v, float* acc);
  // out[r, entry] += sum over `pieces` of v vectors of tokens of grad[r - r0, :] * x[column, :]; out is shaped as values
  void (*bands_values)(const Bands& w, const BandRange& range, LongPanel grad, LongPanel x, int64_t pieces, int v,
                       float* out);
  // the same for few tokens and rows that share columns: out += grad^T x, both row-major, x as in Dots::bands;
  // `scratch` has tokens * (count + kTokenPadding) floats
  void (*bands_values_few)(const Bands& w, int64_t r0, int64_t r1, const float* grad, const float* x, int64_t ld,
                           int64_t tokens, float* scratch, float* out);

  // fills a panel with `channels` channels; may write a row and a vector beyond it
  void (*conv_load)(const ConvShape& s, const ConvWindow& window, const float* x, int64_t channels, float* panel);
  // the same with columns that take turns: lane l of vector v of a row is its column l * spread + v, so that the pixels
  // which one entry multiplies are whole vectors
  void (*conv_load_spread)(const ConvShape& s, const ConvWindow& window, const float* x, int64_t channels, int64_t spread,
                           float* panel);
  void (*conv_block)(const Bands& w, const ConvBlock& block);
  // the same, of all columns; the index is shaped as that of w
  void (*conv_grouped)(const Grouped& w, const ConvBlock& block);
  // y[r * ld + h * columns + i] = sums[r * ls + h * pitch + i] for i < columns, fewer than a vector
  void (*conv_store)(const float* sums, int64_t rows, int64_t height, int64_t columns, int64_t pitch, int64_t ls,
                     float* y, int64_t ld);
  // y[r * ld + h * step + 2 * l + v] = y[r * ld + h * step + v * width + l] for v = 0 and 1, as ConvBlock::join
  void (*conv_join)(int64_t rows, int64_t height, float* y, int64_t step, int64_t ld);

  // y[i] = an activation of it, a number of `Activation` in epilogue.h, for i < n
  void (*activate)(int activation, float* y, int64_t n);

  // acc[i] += the sum over the rows e < count of value[e * step] * table[row[e], i], for i < n
  void (*add_rows)(Table<float> table, const int32_t* row, int64_t count, const float* value, int64_t step, int64_t n,
                   float* acc);
  void (*add_rows_bf16)(Table<bf16> table, const int32_t* row, int64_t count, const float* value, int64_t step,
                        int64_t n, float* acc);
  // out[e * step] = the sum over i < n of grad[i] * table[row[e], i]
  void (*dot_rows)(Table<float> table, const int32_t* row, int64_t count, const float* grad, int64_t n, float* out,
                   int64_t step);
  void (*dot_rows_bf16)(Table<bf16> table, const int32_t* row, int64_t count, const float* grad, int64_t n,
                        float* out, int64_t step);
  void (*widen)(const bf16* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, bf16* to);    // rounds to the nearest, ties to even
  Dots<float> dots;

  // choosing GroupedNM's patterns: bodies_assign.h
  void (*pattern_energy)(const float* score, const int32_t* rows, int64_t n, int64_t patterns, int64_t columns,
                         float* energy);
  void (*best_patterns)(const float* energy, const float* price, int64_t patterns, int64_t columns, float* best,
                        float* second, int32_t* which);
  void (*best_moves)(const float* table, int64_t g, int64_t patterns, float* own, float* move, int32_t* who);
};

const Kernels* kernels_avx512();     // null if this build has none
const Kernels* kernels_avx2();
const Kernels* kernels_portable();
const Dots<bf16>* bf16_dots_avx512();    // needs AVX512_VBMI2 and AVX512_BF16 as well; null if this build has none
const Dots<bf16>* bf16_dots_amx();       // the same with products in AMX's tiles, which the kernel has to permit

// The fastest set this processor has, unless STEN_CPU or set_instruction_set named another; throws
// std::invalid_argument for a name that is unknown or that this processor lacks.
const Kernels& kernels();
void set_instruction_set(const char* name);     // "auto" returns to the fastest
bool has_instruction_set(const char* name);

// Dot products of bfloat16 in the instruction set in use; null if it has none.
const Dots<bf16>* bf16_dots();

}  // namespace sten
