// x (T, I) times CSR, for one to four tokens: activation(x @ W.T + bias) * gate, (T, O).
//
// LANES lanes of a warp own a row, and a lane eight values of it at a time, a piece of 16 bytes where CSR stores them: a warp
// reads consecutive memory, whatever the lengths of rows are. A batch is PIECES of them for each lane; the next one, of the
// next row if need be, is loaded meanwhile. CTAs stay until all rows are done.
//
// A column is the one before plus a step, 4 bits, or 6 or 8 where a row needs them; a sum over the lanes finds the column
// before a piece. Parts of a row with a longer step, which is rare, read ``col`` itself. Places of a row's first and last piece
// that are of other rows have steps of 0, so that every lane points to a column of its row. The activations of all columns
// are in shared memory, the tokens of a column beside each other.
//
// ``table`` (csr_few.table_of): a Row for each row, longest first; then the steps of all rows in their order, each row from a
// piece of its own on: for each piece a word of the lowest four bits, a half of the two bits above, in the order in which they
// are spread over bytes here, and a half of the two highest, likewise. If it is ``ready``, no kernel before writes it.
//
// Macros: TOKENS (1, 2, 4), WARPS, CTAS of a multiprocessor, LANES, PIECES (1, 2, 4), BUFFERS (batches in registers: with one, values are
// loaded into those that have just been multiplied), BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int COLUMN = 2 * TOKENS;           // bytes of a column of x
constexpr int ROWS = 32 / LANES;             // of a warp
constexpr int BATCH = 8 * LANES * PIECES, UNIT = 256;  // entries
constexpr int WORDS = (PIECES + 1) / 2;      // of sums of steps: of two pieces, 16 bits each
constexpr u32 NIBBLES = 0x0f0f0f0f, MIDDLE = 0x30303030, HIGH = 0xc0c0c0c0, ONES = 0x01010101;
// ``widths``: two bits for each eighth of the row, or for each unit of a short one: the parts of steps that it needs beside the
// lowest, or 3 if a step has more than 8 bits.
struct alignas(16) Row { int begin, end, row; u16 start, widths; };
struct Batch { Piece values[PIECES]; u32 low[PIECES], middle[PIECES], high[PIECES], width; };

extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
csr_few(const u16* x, const u16* values, const char* table, const int* col, const u16* bias, const u16* gate, u16* y,
        int T, int O, int I, int entries, int ready) {
  extern __shared__ __align__(16) char memory[];
  if (!ready) wait_for_kernel_before();
  let_next_kernel_start();
  const int lane = threadIdx.x % LANES, stride = gridDim.x * WARPS, groups = (O + ROWS - 1) / ROWS, pieces = (entries + 7) / 8 + O;
  const Row* rows = (const Row*)table;
  const u32* lows = (const u32*)(rows + O);
  const u16 *middles = (const u16*)(lows + pieces), *highs = middles + pieces;
  const u32 columns = place_of(memory);

  auto row_of = [&](int group) {
    const int at = group * ROWS + threadIdx.x % 32 / LANES;
    return group < groups && at < O ? rows[at] : Row{0, 0, O, 0, 0};
  };
  auto batches_of = [&](const Row& row) {  // the first of a warp's rows is the longest
    return max(1, from_lane((row.end - row.begin / 8 * 8 + BATCH - 1) / BATCH, 0));
  };
  auto width_of = [&](const Row& row) {
    const u32 w = row.widths;
    return largest(w & w >> 1 & 0x5555 ? 3 : w & 0xaaaa ? 2 : w ? 1 : 0);
  };
  auto stage_x = [&]() {
    for (int c = threadIdx.x * 8; c < I; c += WARPS * 256) {
      Piece given[TOKENS];
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        given[t] = Piece{0, 0, 0, 0};
        const u16* token = x + (size_t)t * I + c;
        if (t < T && I % 8 == 0) given[t] = *(const Piece*)token;
        if (t < T && I % 8 != 0)
#pragma unroll
          for (int i = 0; i < 8; i++)
            if (c + i < I) given[t].word[i / 2] |= (u32)token[i] << 16 * (i % 2);
      }
      u32 words[4 * TOKENS];
#pragma unroll
      for (int i = 0; i < 4 * TOKENS; i++) {  // word i of eight columns: two columns of one token, or two tokens of a column
        const int column = 2 * i / TOKENS, t = 2 * i % TOKENS;
        words[i] = TOKENS == 1 ? given[0].word[i]
                               : permuted(given[t].word[column / 2], given[t + (TOKENS > 1)].word[column / 2], column % 2 ? 0x7632 : 0x5410);
      }
#pragma unroll
      for (int i = 0; i < TOKENS; i++)
        *(Piece*)(memory + c * COLUMN + 16 * i) = Piece{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
    }
  };

  float acc[4] = {0, 0, 0, 0};  // of up to four tokens; of one token four parts of its sum
  int row = O, entry = 0, end = 0, left = 0;  // the row whose values are multiplied now, its batches that are left; none at first
  u32 head = 0, base = 0;                     // which entries of the first piece are its own; the column before the batch
  int group = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  Row next = row_of(group), after = row_of(group + stride);
  int next_entry, next_left, next_whole;  // its entries in whole pieces
  u32 next_width;
  auto begin_row = [&]() {
    next_entry = next.begin / 8 * 8 + lane * 8, next_left = batches_of(next), next_width = width_of(next);
    next_whole = min(next.end, entries / 8 * 8);
  };
  begin_row();
  bool starts = true;  // the next batch a row
  if (ready) {
    const int piece = next.begin / 8, stop = min((next.end + 7) / 8, piece + LANES * PIECES);
    for (int i = piece + lane * 8; i < stop; i += LANES * 8) fetch_early(values + 8 * (size_t)i);
    for (int i = piece + lane * 32; i < stop; i += LANES * 32) fetch_early(lows + i + next.row);
    wait_for_kernel_before();
  }
  auto load_steps = [&](Batch& to) {
    const int piece = next_entry / 8 + next.row;
    auto mine = [&](int j) { return next_entry + j * LANES * 8 < next.end; };
#pragma unroll
    for (int j = 0; j < PIECES; j++) to.low[j] = mine(j) ? lows[piece + j * LANES] : 0;
    to.width = next_width;
    if (next_width == 0) return;
    if (next_width == 3) {
      const int begin = next.begin / 8 * 8, last = max(next.end - begin - 1, 0) / UNIT;
      const u32 scale = highest_bit(last / 8) + 1;  // of a unit to the width that holds for it
      u32 width = 0;
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (mine(j)) width = max(width, (u32)next.widths >> 2 * ((next_entry - begin + j * LANES * 8) / UNIT >> scale) & 3);
      to.width = largest(width);
    }
#pragma unroll
    for (int j = 0; j < PIECES; j++) to.middle[j] = mine(j) ? middles[piece + j * LANES] : 0;
    if (to.width == 1) return;
#pragma unroll
    for (int j = 0; j < PIECES; j++) to.high[j] = mine(j) ? highs[piece + j * LANES] : 0;
  };
  auto load_values = [&](Batch& to, int j) {
    if (next_entry + j * LANES * 8 < next_whole) to.values[j] = load_once((const Piece*)(values + next_entry) + j * LANES);
  };
  auto load_last = [&](Batch& to) {  // the last piece of all may not be whole
    if (next.end > next_whole)
#pragma unroll
      for (int j = 0; j < PIECES; j++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int k = next_entry + j * LANES * 8 + i;
          u32& word = to.values[j].word[i / 2];
          if (k >= next_whole && k < next.end) word = i % 2 ? word & 0xffff | (u32)values[k] << 16 : values[k];
        }
  };
  // Loads a batch, and multiplies the one that was loaded before; false at the end.
  auto advance = [&](Batch& now, Batch& ahead) {
    const bool more = group < groups;
    if (more && (BUFFERS == 2 || left == 0)) {
      load_steps(ahead);
#pragma unroll
      for (int j = 0; j < PIECES; j++) load_values(ahead, j);
      load_last(ahead);
    }
    if (left == 0) {
      stage_x();
      __syncthreads();
    } else {
      u32 even[PIECES], odd[PIECES], valid[PIECES], sums[WORDS];
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        valid[j] = ones_below(max(end - entry - j * LANES * 8, 0));
        if (j == 0) valid[j] &= head;
        even[j] = now.low[j] & NIBBLES, odd[j] = now.low[j] >> 4 & NIBBLES;
      }
      const u32 width = now.width;
      if (width > 0)
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
          const u32 spread = now.middle[j] | now.middle[j] << 14;
          even[j] |= spread << 4 & MIDDLE, odd[j] |= spread & MIDDLE;
        }
      if (width > 1)
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
          const u32 spread = now.high[j] | now.high[j] << 14;
          even[j] |= spread << 6 & HIGH, odd[j] |= spread << 2 & HIGH;
        }
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        const u32 sum = add_bytes(even[j], ONES, add_bytes(odd[j], ONES, 0));
        sums[j / 2] = j % 2 ? sums[j / 2] | sum << 16 : sum;
      }
      if (more && BUFFERS == 1) load_steps(ahead);
      auto multiply = [&](int j, int k, u32 at) {  // j, k are known here: entry k of piece j; ``at``: the place of its activations
        const u32 pair = now.values[j].word[k / 2];
        const float value = k % 2 ? high(pair) : low(pair);
        if (TOKENS == 1) {
          add_product_if(valid[j] & 1u << k, acc[k % 4], value, low(half_at(at)));
        } else {
          Pair two = {0, 0};
          if (TOKENS == 4) two = pair_at(at);
          else two.word[0] = word_at(at);
#pragma unroll
          for (int t = 0; t < TOKENS; t++)
            add_product_if(valid[j] & 1u << k, acc[t], value, t % 2 ? high(two.word[t / 2]) : low(two.word[t / 2]));
        }
      };
      if (width < 3) {
        u32 to[WORDS], all[WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; w++) to[w] = sums[w];
#pragma unroll
        for (int by = 1; by < LANES; by *= 2)
#pragma unroll
          for (int w = 0; w < WORDS; w++) to[w] = add_lane_before<LANES>(to[w], by);
#pragma unroll
        for (int w = 0; w < WORDS; w++) all[w] = from_lane<LANES>(to[w], LANES - 1), to[w] -= sums[w];
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
          u32 at = columns + (base + (j % 2 ? to[j / 2] >> 16 : to[j / 2] & 0xffff)) * COLUMN;
          base += j % 2 ? all[j / 2] >> 16 : all[j / 2] & 0xffff;
#pragma unroll
          for (int k = 0; k < 8; k++) {
            at = add_byte(k % 2 ? odd[j] : even[j], k / 2, COLUMN, at);
            multiply(j, k, at);
          }
          if (more && BUFFERS == 1) load_values(ahead, j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
#pragma unroll
          for (int k = 0; k < 8; k++)
            multiply(j, k, columns + (valid[j] & 1u << k ? col[entry + j * LANES * 8 + k] : 0) * COLUMN);
          if (more && BUFFERS == 1) load_values(ahead, j);
        }
        const int last = min(end, entry + BATCH - lane * 8) - 1;
        if (last >= 0) base = col[last];
      }
      if (more && BUFFERS == 1) load_last(ahead);
      if (left == 1) {
        if (TOKENS == 1) acc[0] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
        float sum = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          const float all = sum_of_lanes<LANES>(acc[t]);
          if (lane == t) sum = all;
        }
        if (lane < T && row < O) finish(sum, lane, row, O, bias, gate, y);
#pragma unroll
        for (int t = 0; t < 4; t++) acc[t] = 0;
      }
    }
    if (!more) return false;
    entry = next_entry, left = next_left, head = ~0u;
    if (starts) row = next.row, end = next.end, base = next.start, head = lane == 0 ? ~0u << next.begin % 8 : ~0u;
    next_entry += BATCH, next_left--;
    starts = next_left == 0;
    if (starts) {
      group += stride;
      next = after, after = row_of(group + stride);
      begin_row();
    }
    return true;
  };
  Batch one, other;
  while (advance(one, BUFFERS == 2 ? other : one))
    if (BUFFERS == 2) one = other;
}
