// A direct convolution by a sparse weight: rows in bands (CSR, FanIn, VectorNM, BSR), or GroupedNM.
//
// A tile is a few rows of an output image, or a window of their columns, in up to eight vectors. What it needs of the
// input is copied to a panel that fits the first-level cache, a block of channels at a time; then every entry of the
// weight multiplies all vectors of the tile, which stay in registers. In a panel the pixels that one entry multiplies
// lie side by side for any stride, and padding is zeros.
//
// Where rows do not share their columns, loads take longer than multiply-adds, and twice as long where they cross a
// cache line. So a panel of a 3x3 kernel may be `spread`: a row of 32 pixels is the vectors of its even and of its odd
// columns, and of each the one that is shifted by a pixel.
//
// An image narrower than a vector is computed `flat`: vectors run across the ends of rows, and the sums that lie
// between two rows are dropped. Where they would make more vectors, the panel is `packed`: it has a copy of the rows for
// each column of the kernel, without what lies between them.
#include <cstring>
#include <utility>

#include "linear.h"

namespace sten {
namespace {

constexpr int64_t kPanelBytes = 32 << 10;
constexpr int64_t kMostCopies = 7;       // of a packed panel: kernels are wider than that where an image is not
constexpr int64_t kTileColumns = 2;      // vectors: the taller a tile, the fewer rows are copied twice
constexpr int64_t kLeastTiles = 2;       // from which on deriving the offsets pays
constexpr int64_t kLine = 64;            // bytes of a cache line
constexpr int64_t kLeastEntries = 16;    // of a row in a block, or reading and writing the sums would take longer

// What the driver asks of a weight, whichever its format.
struct Sizes {
  double entries;
  int64_t columns, bands, offsets;    // with padding; lists or rows of blocks; of all entries
  int64_t unit;                       // rows that are better not divided
  int64_t together;                   // rows that have the same columns
  bool single;    // an entry is one column, so that its offset can be looked up
};

Sizes sizes_of(const Bands& w) {
  const int64_t bands = w.bands(), offsets = w.crow ? w.crow[bands] * w.width : bands * w.count;
  return {entries(w), w.columns, bands, offsets, kUnit, w.height, w.width == 1};
}

Sizes sizes_of(const Grouped& w) {
  const int64_t columns = w.chunks * w.columns();
  return {entries(w), columns, 0, w.strips * columns, w.m, w.n, false};
}

struct Tiling {
  bool flat, packed, derived;    // derived: the offset of every entry is computed once, and not looked up for every tile
  int64_t columns, windows;    // of a window, and how many there are; the last one may overlap
  int64_t rows, tiles;         // of the highest tile
  int64_t spread;              // vectors of a row of a tile whose columns take turns, or 0
  int64_t row_floats;          // of the input, for a row of a window
  int64_t phases, between;     // of columns in a panel, and how many columns of the input lie between two
  int64_t pitch, panel_rows, plane;    // floats of a row, rows of a phase and floats of a channel in a panel
  int64_t channels, blocks;    // of a block

  Tiling(const ConvShape& s, int64_t images, int64_t groups, const Sizes& w, bool inputs_last, int64_t width) {
    const int64_t halo[] = {(s.kernel[0] - 1) * s.dilation[0] / s.stride[0],
                            (s.kernel[1] - 1) * s.dilation[1] / s.stride[1]};
    flat = s.out_w < width;
    columns = std::min(s.out_w, width * std::max(kTileColumns, kConvVectors / s.out_h));
    windows = ceil_div(s.out_w, columns);
    row_floats = columns + halo[1];
    const int64_t each = static_cast<int64_t>(w.entries) / std::max<int64_t>(1, groups * s.out);
    const bool possible = !flat && w.together == 1 && width * sizeof(float) == kLine;
    const bool whole = s.stride[1] == 1 && columns % width == 0 && columns / width <= kTileColumns;
    spread = possible && whole && halo[1] > 0 && halo[1] <= kTileColumns ? columns / width : 0;
    pitch = spread ? (spread + halo[1]) * width : row_floats;
    const int64_t most = flat ? (kConvVectors * width - s.out_w) / pitch + 1 : kConvVectors / ceil_div(columns, width);
    tiles = ceil_div(s.out_h, most);
    rows = ceil_div(s.out_h, tiles);
    phases = s.column_phases, between = 1;
    const int64_t whole_tiles = ceil_div(s.out_h * s.out_w, kConvVectors * width);    // of packed rows
    const int64_t fewer = ceil_div(s.out_h, whole_tiles);
    packed = flat && s.kernel[1] > 1 && s.kernel[1] <= kMostCopies && s.out_h / whole_tiles * s.out_w >= width &&
             fewer * s.out_w <= kConvVectors * width &&
             whole_tiles * ceil_div(fewer * s.out_w, width) < tiles * ceil_div((rows - 1) * pitch + s.out_w, width);
    if (packed) {
      flat = false, tiles = whole_tiles, rows = fewer;
      pitch = row_floats = s.out_w, phases = s.kernel[1], between = s.dilation[1];
    }
    panel_rows = rows + halo[0];
    plane = s.row_phases * phases * panel_rows * pitch;
    const int64_t bytes = s.channels * plane * static_cast<int64_t>(sizeof(float));
    derived = images * tiles * windows >= kLeastTiles || !w.single;
    const bool by_rows = derived && w.single && w.together == 1 && !inputs_last;
    const int64_t most_bytes = spread || packed ? 2 * kPanelBytes : kPanelBytes;    // of pixels stored more than once
    blocks = by_rows ? std::min(ceil_div(bytes, most_bytes), each / kLeastEntries) : 1;
    blocks = std::max<int64_t>(1, std::min(blocks, s.channels));
    channels = ceil_div(s.channels, blocks);
    blocks = std::max<int64_t>(1, ceil_div(s.channels, channels));
  }
};

// offset[column - first column of a block]; columns of padding are the zeros behind the panel
void fill_offsets(const ConvShape& s, const Tiling& t, int64_t columns, bool inputs_last, int64_t width, int32_t* offset) {
  const int64_t positions = s.kernel[0] * s.kernel[1], step = inputs_last ? columns / positions : 1;
  const auto zeros = static_cast<int32_t>(t.channels * t.plane);
  if (t.blocks == 1) std::fill(offset, offset + columns, zeros);
  for (int64_t i = 0, at = 0; i < s.kernel[0]; ++i)
    for (int64_t j = 0; j < s.kernel[1]; ++j, ++at) {
      const int64_t row = i * s.dilation[0], column = j * s.dilation[1];
      const int64_t phase = row % s.stride[0] * t.phases + (t.packed ? j : column % s.stride[1]);
      const int64_t first = (phase * t.panel_rows + row / s.stride[0]) * t.pitch +
                            (t.packed ? 0 : column / s.stride[1] * (t.spread ? width : 1));
      for (int64_t c = 0; c < t.channels; ++c)
        offset[inputs_last ? at * step + c : c * positions + at] = static_cast<int32_t>(c * t.plane + first);
    }
}

// Where the vectors of a tile of `rows` rows begin; returns how many there are.
int64_t place_vectors(const ConvShape& s, const Tiling& t, int64_t rows, int64_t width, int64_t* x_at, int64_t* y_at) {
  int64_t n = 0;
  if (t.flat) {
    for (; n * width < (rows - 1) * t.pitch + s.out_w; ++n) x_at[n] = y_at[n] = n * width;
    return n;
  }
  if (t.packed) {
    const int64_t pixels = rows * s.out_w;
    for (; n * width < pixels; ++n) x_at[n] = y_at[n] = std::min(n * width, pixels - width);
    return n;
  }
  for (int64_t h = 0; t.spread && h < rows; ++h)
    for (int64_t u = 0; u < t.spread; ++u, ++n) x_at[n] = h * t.pitch + u * width, y_at[n] = h * s.out_w + u * width;
  for (int64_t h = 0; !t.spread && h < rows; ++h)
    for (int64_t u = 0; u < t.columns; u += width, ++n) {
      const int64_t column = std::min(u, t.columns - width);
      x_at[n] = h * t.pitch + column;
      y_at[n] = h * s.out_w + column;
    }
  return n;
}

// The offset of every column of every entry, and where each band crosses from one block of columns to the next:
// begin[block][band].
void derive(const Bands& w, int64_t columns, int64_t blocks, const int32_t* table, int32_t* index, int32_t* begin,
            const Pool& pool) {
  const int64_t bands = w.bands(), tasks = std::max<int64_t>(1, std::min<int64_t>(pool.threads, bands));
  pool.each(tasks, [&](int64_t first, int64_t last) {
    for (int64_t band = part(bands, tasks, first).begin; band < part(bands, tasks, last - 1).end; ++band) {
      const int64_t skip = w.crow ? 0 : band * w.count;
      const int32_t* col = w.col + skip;
      int64_t e = w.crow ? w.crow[band] : 0;
      const int64_t end = w.crow ? w.crow[band + 1] : w.count;
      for (int64_t b = 0; b < blocks; ++b) {
        begin[b * bands + band] = static_cast<int32_t>(e);
        if (!index) break;
        const int64_t k0 = b * columns, k1 = b + 1 == blocks ? w.columns : k0 + columns;
        if (w.width > 1)
          for (; e < end; ++e) std::copy_n(table + col[e] * w.width, w.width, index + e * w.width);
        for (; e < end && col[e] < k1; ++e) index[skip + e] = table[col[e] - k0];
      }
      begin[blocks * bands + band] = static_cast<int32_t>(end);
    }
  });
}

void derive(const Grouped& w, int64_t, int64_t, const int32_t* table, int32_t* index, int32_t*, const Pool& pool) {
  const int64_t columns = w.columns(), chunk = w.strips * columns;
  pool.each(w.chunks, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      for (int64_t i = c * chunk; i < (c + 1) * chunk; ++i) index[i] = table[c * columns + w.index[i]];
  });
}

void multiply(const Bands& w, ConvBlock block, const Kernels& k) {
  if (block.table) block.index = w.col;
  k.conv_block(w, block);
}
void multiply(const Grouped& w, const ConvBlock& block, const Kernels& k) { k.conv_grouped(w, block); }

}  // namespace

template <typename W>
void convolve(ConvShape s, int64_t images, int64_t groups, const float* x, const float* bias, float* y, const W& w,
              bool inputs_last, const Kernels& k, Pool pool) {
  const int64_t group_rows = s.out, positions = s.kernel[0] * s.kernel[1];
  if (images == 0 || groups * group_rows == 0 || s.out_h == 0 || s.out_w == 0) return;
  if (positions == 1 && s.stride[0] * s.stride[1] == 1 && s.padding[0] + s.padding[1] == 0) {
    s.w *= std::exchange(s.h, 1);    // one long row
    s.out_w *= std::exchange(s.out_h, 1);
  }
  const Sizes sizes = sizes_of(w);
  const Tiling t(s, images, groups, sizes, inputs_last, k.width);
  pool.threads = useful_threads(pool.threads, sizes.entries * images * s.out_h * s.out_w);
  const int64_t slack = kConvVectors * k.width, zeros = sizes.columns > s.channels * positions ? t.plane : 0;
  Scratch<int32_t> offsets(Role::index, std::max(sizes.columns, t.channels * positions));
  fill_offsets(s, t, sizes.columns, inputs_last, k.width, offsets.get());
  const int64_t bands = sizes.bands;
  Scratch<int32_t> derived(Role::repacked, t.derived ? sizes.offsets : 0), cuts(Role::cuts, (t.blocks + 1) * bands);
  int32_t* index = t.derived ? derived.get() : nullptr;
  const Pool few{useful_threads(pool.threads, static_cast<double>(sizes.offsets)), pool.run};
  derive(w, t.channels * positions, t.blocks, offsets.get(), index, cuts.get(), few);

  const int64_t image_tiles = images * groups * t.tiles, units = ceil_div(group_rows, sizes.unit);
  const int64_t pieces = pieces_for_threads(image_tiles, pool.threads, 1, units);
  const int64_t most_rows = ceil_div(units, pieces) * sizes.unit;
  const bool join = t.spread == 2 && sizes.single;    // in registers
  pool.each(pieces * image_tiles, [&](int64_t begin, int64_t end) {
    Scratch<float> panel(Role::panel, t.channels * t.plane + zeros + t.pitch + s.padding[1] + slack);
    Scratch<float> sums(Role::sums, most_rows * (t.flat ? slack + 1 : 1) + k.width);
    float* start = sums.get() + (t.flat ? most_rows * slack : 0);
    int64_t x_at[kConvVectors], y_at[kConvVectors];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task % image_tiles / t.tiles, group = image % groups;
      const Range high = part(s.out_h, t.tiles, task % t.tiles);
      const Range some = part(units, pieces, task / image_tiles);
      const int64_t first = group * group_rows, r0 = first + some.begin * sizes.unit;
      const int64_t r1 = first + std::min(some.end * sizes.unit, group_rows);
      if (r0 == r1) continue;
      for (int64_t r = r0; r < r1; ++r) start[r - r0] = bias ? bias[r] : 0.0f;
      const int64_t vectors = place_vectors(s, t, high.end - high.begin, k.width, x_at, y_at);
      const float* from = x + image * s.channels * s.h * s.w;
      const int64_t size = s.out_h * s.out_w;
      float* to = y + (image / groups * groups * group_rows + r0) * size + high.begin * s.out_w;
      for (int64_t window = 0; window < t.windows; ++window) {
        const int64_t column = std::min(window * t.columns, s.out_w - t.columns);
        const ConvWindow read{high.begin * s.stride[0] - s.padding[0], column * s.stride[1] - s.padding[1],
                              t.panel_rows, t.row_floats, t.phases, t.between};
        for (int64_t c0 = 0, b = 0; b < t.blocks; ++b, c0 += t.channels) {
          const int64_t count = std::min(t.channels, s.channels - c0);
          if (t.spread) k.conv_load_spread(s, read, from + c0 * s.h * s.w, count, t.spread, panel.get());
          else k.conv_load(s, read, from + c0 * s.h * s.w, count, panel.get());
          if (zeros) std::memset(panel.get() + count * t.plane, 0, (t.plane + slack) * sizeof(float));
          const int32_t* from_entry = cuts.get() + b * bands;
          multiply(w, {r0, r1, from_entry, from_entry + bands, index, t.derived ? nullptr : offsets.get(), panel.get(),
                       vectors, x_at, y_at, b ? nullptr : start, t.flat ? sums.get() : to + column, t.flat ? slack : size,
                       join && b + 1 == t.blocks},
                   k);
        }
        if (t.flat) k.conv_store(sums.get(), r1 - r0, high.end - high.begin, s.out_w, t.pitch, slack, to, size);
        if (t.spread == 2 && !join) k.conv_join(r1 - r0, high.end - high.begin, to + column, s.out_w, size);
      }
    }
  });
}

template void convolve(ConvShape, int64_t, int64_t, const float*, const float*, float*, const Bands&, bool,
                       const Kernels&, Pool);
template void convolve(ConvShape, int64_t, int64_t, const float*, const float*, float*, const Grouped&, bool,
                       const Kernels&, Pool);

}  // namespace sten
