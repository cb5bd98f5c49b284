// The interface between the drivers and the kernels of an instruction set: raw pointers, no torch.
//
// Letters: T tokens, K inputs (columns), O outputs (rows); x is (T, K), y is (T, O), both row-major.
// A panel is a block of at most four vectors of tokens stored feature-major, (features, v * width), so that one row of
// it, one feature of all its tokens, is v consecutive vectors.
#pragma once

#include <cstdint>

namespace sten {

constexpr int kMaxVectors = 4;      // vectors of tokens in a panel
constexpr int kTokenPadding = 128;  // floats that may be read beyond one token's activations
constexpr int kConvVectors = 8;     // vectors of pixels that a convolution holds in registers

struct Problem {
  const float* x;      // (tokens, in)
  const float* bias;   // (out,) or null
  float* y;            // (tokens, out)
  int64_t tokens, in, out;
};

struct Csr {
  const float* values;
  const int32_t* crow;   // (out + 1,)
  const int32_t* col;
};

struct Grouped {
  const float* values;       // (chunks, strips, patterns, g, n)
  const int16_t* index;      // (chunks, strips, patterns, g)
  const int32_t* rows;       // (patterns, n): rows of a pattern inside its strip, ascending
  // (patterns, 2 + n): for a kernel with n rows in n registers: the register whose row is exchanged for this pattern,
  // its new row, and for each register the position of its row among the pattern's rows
  const int32_t* exchanges;
  int n, m, g;
  int64_t patterns, chunks, strips;
  int64_t columns() const { return patterns * g; }   // of one chunk
};

struct GroupedBlock {
  int64_t c0, c1, strip0, strip1;
};

// Rows of one k-block, sorted by their count and cut into groups of `rows_at_once`; a shorter row of a group is filled
// up with zeros whose column is an extra panel row of zeros, so that they never multiply an infinite activation.
struct CsrBlock {
  int64_t groups;
  const int32_t* count;    // (groups,) steps of a group
  const int32_t* row;      // (groups, rows_at_once) row of the accumulator panel
  const uint16_t* col;     // (sum count, rows_at_once) row of the activation panel
  const float* value;      // (sum count, rows_at_once)
};

// Rows in bands of `height`, the rows of a band with the same columns (VectorNM, FanIn with height 1, BSR). An entry of
// a band is one column of all its rows (lists) or a block of `width` consecutive ones (blocks).
struct Bands {
  const float* values;     // lists: (rows, count); blocks: (entries, height, width)
  const int32_t* crow;     // blocks: (bands + 1,); null for lists, `count` entries a band
  const int32_t* col;      // lists: (bands, count), ascending in a band; blocks: (entries,), in units of width
  int64_t rows, columns;   // columns: a multiple of width, and as many as col may name, padding included
  int64_t height, width, count;
  int64_t bands() const { return (rows + height - 1) / height; }
};

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

// The images of one group of a convolution. A stride divides the rows and columns of the input into phases, those with
// the same remainder, and a panel holds (channels, row phases, column phases, rows, pitch).
struct ConvShape {
  int64_t channels, h, w, out, out_h, out_w;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t row_phases, column_phases;
};

// What a panel holds: `rows` rows of each phase, from this row and column of the input on, which may be padding.
struct ConvWindow {
  int64_t row, column, rows, pitch;
};

// Rows (outputs) r0 to r1 - 1 by a block of columns, for `vectors` vectors of pixels: what entry e of a band multiplies is
// panel[x_at[vector] + index[e]], or with a table panel[x_at[vector] + table[index[e]]], and the sum belongs to
// out[(row - r0) * ld + y_at[vector]].
struct ConvBlock {
  int64_t r0, r1;
  const int32_t *begin, *end;    // (bands,) positions as in BandRange
  const int32_t *index, *table;  // index is shaped as col
  const float* panel;
  int64_t vectors;
  const int64_t *x_at, *y_at;
  const float* start;    // (r1 - r0,) the sums begin with these; null for single rows: with what `out` holds
  float* out;
  int64_t ld;
};

// Rows of a dense matrix with `ld` numbers a row: float32, or bfloat16 as its 16 bits.
template <typename E>
struct Table {
  const E* data;
  int64_t ld;
};
using Bfloat16 = uint16_t;

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
  // acc[row, :] += sum of value * panel[col, :]; with `start`, acc[row, :] = start[row] + that sum
  void (*csr_block)(const CsrBlock& block, const float* start, const float* panel, int v, float* acc);
  // one token: y[r] for rows r0 to r1 - 1
  void (*csr_token)(const Csr& w, const float* bias, int64_t r0, int64_t r1, const float* x, float* y);

  // acc[row - strip0 * m, :] += chunks c0 to c1 - 1 of strips strip0 to strip1 - 1; panel begins at chunk c0; `start`
  // as in csr_block
  void (*grouped_block)(const Grouped& w, const GroupedBlock& block, const float* start, const float* panel, int v,
                        float* acc);
  // one token, one chunk: acc[strip - strip0, slot, i] += value * x[index]; x begins at the chunk and kTokenPadding
  // floats beyond it may be read, `gathered` has columns() + width floats, and
  // spread[phase, lane] = (phase + lane) / n for phase < n
  void (*grouped_token)(const Grouped& w, int64_t chunk, int64_t strip0, int64_t strip1, const float* x,
                        const int32_t* spread, float* gathered, float* acc);

  // acc[r - r0, :] += sum of value * panel[column - k0, :]; `start`, per row of acc, as in csr_block
  void (*bands_block)(const Bands& w, const BandRange& range, const float* start, const float* panel, int v,
                      float* acc);
  // one token, all entries: y[r] for rows r0 to r1 - 1; x has `columns` floats and kTokenPadding
  // more, `gathered` has `columns`
  void (*bands_token)(const Bands& w, const float* bias, int64_t r0, int64_t r1, const float* x, float* gathered,
                      float* y);
  // acc[column - k0, :] += sum of value * grad[r - r0, :]
  void (*bands_input)(const Bands& w, const BandRange& range, const float* grad, int v, float* acc);
  // out[r, entry] += sum over `pieces` of v vectors of tokens of grad[r - r0, :] * x[column, :]; out is shaped as values
  void (*bands_values)(const Bands& w, const BandRange& range, LongPanel grad, LongPanel x, int64_t pieces, int v,
                       float* out);
  // the same for few tokens and rows that share columns: out += grad^T x, both row-major, x as in bands_token with `ld`
  // floats a row; `scratch` has tokens * (count + kTokenPadding) floats
  void (*bands_values_few)(const Bands& w, int64_t r0, int64_t r1, const float* grad, const float* x, int64_t ld,
                           int64_t tokens, float* scratch, float* out);

  // fills a panel with `channels` channels; may write a row and a vector beyond it
  void (*conv_load)(const ConvShape& s, const ConvWindow& window, const float* x, int64_t channels, float* panel);
  // BSR has no such kernel
  void (*conv_block)(const Bands& w, const ConvBlock& block);
  // y[r * ld + h * columns + i] = sums[r * ls + h * pitch + i] for i < columns, fewer than a vector
  void (*conv_store)(const float* sums, int64_t rows, int64_t height, int64_t columns, int64_t pitch, int64_t ls,
                     float* y, int64_t ld);

  // acc[i] += the sum over the rows e < count of value[e * step] * table[row[e], i], for i < n
  void (*add_rows)(Table<float> table, const int32_t* row, int64_t count, const float* value, int64_t step, int64_t n,
                   float* acc);
  void (*add_rows_bf16)(Table<Bfloat16> table, const int32_t* row, int64_t count, const float* value, int64_t step,
                        int64_t n, float* acc);
  // out[e * step] = the sum over i < n of grad[i] * table[row[e], i]
  void (*dot_rows)(Table<float> table, const int32_t* row, int64_t count, const float* grad, int64_t n, float* out,
                   int64_t step);
  void (*dot_rows_bf16)(Table<Bfloat16> table, const int32_t* row, int64_t count, const float* grad, int64_t n,
                        float* out, int64_t step);
  void (*widen)(const Bfloat16* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, Bfloat16* to);    // rounds to the nearest, ties to even
};

const Kernels* kernels_avx512();     // null if this build has none
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// The fastest set this processor has, unless STEN_CPU or set_instruction_set named another; throws
// std::invalid_argument for a name that is unknown or that this processor lacks.
const Kernels& kernels();
void set_instruction_set(const char* name);     // "auto" returns to the fastest
bool has_instruction_set(const char* name);

}  // namespace sten
