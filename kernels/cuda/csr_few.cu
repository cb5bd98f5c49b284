// x (T, I) times CSR, for one to four tokens: activation(x @ W.T + bias) * gate, (T, O).
//
// LANES lanes of a warp own a row, and a lane eight values of it at a time, a piece of 16 bytes where CSR stores them: a warp
// reads consecutive memory, whatever the lengths of rows are. Each lane takes PIECES of them at a time, and loads the next
// ones meanwhile, of the next row, if need be. CTAs stay until all rows are done.
//
// A column is the one before plus a step, 4 bits, or 6 or 8 where a row needs them; a sum over the lanes finds the column
// before a piece. Parts of a row with a longer step, which is rare, read ``col`` itself. Steps of other rows in a row's first
// and last piece count as 0, so that every lane points to a column of its row. The activations of all columns are in shared
// memory, the tokens of a column beside each other.
//
// ``table`` (csr_few.table): a Row for each row, longest first; for each piece the low four bits of its steps, a word; the two
// bits above, in the order in which they are spread over bytes here, a half; the two highest, likewise.
//
// Macros: TOKENS (1, 2, 4), WARPS, CTAS of a multiprocessor, LANES, PIECES (1, 2, 4), BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"
constexpr int COLUMN = 2 * TOKENS;           // bytes of a column of x
constexpr int ROWS = 32 / LANES;             // of a warp
constexpr int BATCH = 8 * LANES * PIECES, UNIT = 256;  // entries
constexpr int WORDS = (PIECES + 1) / 2;      // of sums of steps: of two pieces, 16 bits each
constexpr u32 NIBBLES = 0x0f0f0f0f, MIDDLE = 0x30303030, HIGH = 0xc0c0c0c0, ONES = 0x01010101;
// ``widths``: for each eighth of the row, in units of 32 pieces: the planes of steps that it needs above the low one, or 3 if a step
// does not fit into 8 bits
struct alignas(16) Row { int begin, end, row; u16 start, widths; };
struct Batch { Piece values[PIECES]; u32 low[PIECES], middle[PIECES], high[PIECES], width; };

extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
csr_few(const u16* x, const u16* values, const char* table, const int* col, const u16* bias, const u16* gate, u16* y,
        int T, int O, int I, int entries, int ready, int chunk) {
  extern __shared__ __align__(16) char memory[];
  if (!ready) wait_for_kernel_before();
  let_next_kernel_start();
  const int lane = threadIdx.x % LANES, part = threadIdx.x % 32 / LANES, pieces = (entries + 7) / 8 + O;
  const int groups = ((O + ROWS - 1) / ROWS + gridDim.x - 1 - blockIdx.x) / gridDim.x;  // of rows, of this CTA
  const Row* rows = (const Row*)table;
  const u32* lows = (const u32*)(rows + O);
  const u16 *middles = (const u16*)(lows + pieces), *highs = middles + pieces;
  const u32 columns = place_of(memory);
  int* counter = (int*)(memory + (I + 7) / 8 * 16 * TOKENS);
  float* results = (float*)(counter + 4);  // of each row and chunk

  auto place_of_row = [&](int group) { return (group * (int)gridDim.x + (int)blockIdx.x) * ROWS; };
  auto row_of = [&](int group) {
    const int at = place_of_row(group) + part;
    return at < O ? rows[at] : Row{0, 0, O, 0, 0};
  };
  auto batches_of = [&](const Row& row) {  // the first of a warp's rows is the longest
    return from_lane((row.end - row.begin / 8 * 8 + BATCH - 1) / BATCH, 0);
  };
  auto width_of = [&](const Row& row) {
    const u32 w = row.widths;
    return largest(w & w >> 1 & 0x5555 ? 3 : w & 0xaaaa ? 2 : w ? 1 : 0);
  };
  auto load = [&](Batch& to, const Row& row, int entry, u32 width) {
    bool mine[PIECES];
    const int piece = entry / 8 + row.row;
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      mine[j] = entry + j * LANES * 8 < row.end;
      to.low[j] = to.middle[j] = to.high[j] = 0;
      if (mine[j]) to.low[j] = lows[piece + j * LANES];
    }
    if (row.end <= entries / 8 * 8) {
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (mine[j]) to.values[j] = load_once((const Piece*)(values + entry) + j * LANES);
    } else {  // the last piece of all is not whole
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        to.values[j] = Piece{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int k = entry + j * LANES * 8 + i;
          if (k < row.end) to.values[j].word[i / 2] |= (u32)values[k] << 16 * (i % 2);
        }
      }
    }
    if (width == 3) {
      const int begin = row.begin / 8 * 8, last = max(row.end - begin - 1, 0) / UNIT;
      const u32 scale = highest_bit(last / 8) + 1;  // of a unit to the width that holds for it
      width = 0;
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (mine[j]) width = max(width, (u32)row.widths >> 2 * ((entry - begin + j * LANES * 8) / UNIT >> scale) & 3);
      width = largest(width);
    }
    to.width = width;
    if (width == 1 || width == 2) {
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (mine[j]) to.middle[j] = middles[piece + j * LANES];
    }
    if (width == 2) {
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (mine[j]) to.high[j] = highs[piece + j * LANES];
    }
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
  int slot = 0, entry = 0, end = 0, left = 0;  // of the item that is multiplied now: the place of its sum, its batches that are left
  u32 head = 0, base = 0;                      // which entries of the first piece are its own; the column before the batch
  // An item is a chunk of the rows of a group: the first ones of all groups, then the second ones.
  struct Item { int chunk, group; };
  auto item_of = [&](int number) { const int c = number / groups; return Item{c, number - c * groups}; };
  Item item = item_of(threadIdx.x / 32), item_after = item_of(threadIdx.x / 32 + WARPS);
  Row next = row_of(item.group), after = row_of(item_after.group);
  const int all = batches_of(row_of(0)), chunks = max(1, (all + chunk - 1) / chunk), size = (all + chunks - 1) / chunks;  // batches
  int next_entry, next_left;
  u32 next_width, next_base;
  bool starts = true;  // the next batch an item
  auto begin_item = [&]() {
    const int first = next.begin / 8 * 8 + item.chunk * size * BATCH;
    next_left = item.chunk < chunks ? min(batches_of(next) - item.chunk * size, size) : 1;
    next_entry = first + lane * 8, next_width = width_of(next);
    next_base = item.chunk > 0 && item.chunk < chunks && first < next.end ? col[first - 1] : next.start;
  };
  begin_item();
  next_left = max(next_left, 1);  // it may be empty, as may all
  if (ready) {
    const int piece = next_entry / 8 - lane, stop = min((next.end + 7) / 8, piece + LANES * PIECES);
    for (int i = piece + lane * 8; i < stop; i += LANES * 8) fetch_early(values + 8 * (size_t)i);
    for (int i = piece + lane * 32; i < stop; i += LANES * 32) fetch_early(lows + i + next.row);
    wait_for_kernel_before();
  }
  // Loads a batch, and multiplies the one that was loaded before; false at the end.
  auto advance = [&](Batch& now, Batch& ahead) {
    if (item.chunk < chunks) load(ahead, next, next_entry, next_width);
    if (left == 0) {
      stage_x();
      for (int i = threadIdx.x; i < groups * ROWS * chunks * TOKENS; i += WARPS * 32) results[i] = 0;
      if (threadIdx.x == 0) *counter = 2 * WARPS;
      __syncthreads();
    } else {
      u32 even[PIECES], odd[PIECES], valid[PIECES], sums[WORDS];
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        valid[j] = ones_below(max(end - entry - j * LANES * 8, 0));
        if (j == 0) valid[j] &= head;
        even[j] = now.low[j] & NIBBLES, odd[j] = now.low[j] >> 4 & NIBBLES;
      }
      if (now.width > 0)
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
          const u32 spread = now.middle[j] | now.middle[j] << 14, top = now.high[j] | now.high[j] << 14;
          even[j] |= (spread << 4 & MIDDLE) | (top << 6 & HIGH), odd[j] |= (spread & MIDDLE) | (top << 2 & HIGH);
        }
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        const u32 sum = add_bytes(even[j], ONES, add_bytes(odd[j], ONES, 0));
        sums[j / 2] = j % 2 ? sums[j / 2] | sum << 16 : sum;
      }
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
      if (now.width < 3) {
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
        }
      } else {
#pragma unroll
        for (int j = 0; j < PIECES; j++)
#pragma unroll
          for (int k = 0; k < 8; k++)
            multiply(j, k, columns + (valid[j] & 1u << k ? col[entry + j * LANES * 8 + k] : 0) * COLUMN);
        const int last = min(end, entry + BATCH - lane * 8) - 1;
        if (last >= 0) base = col[last];
      }
      if (left == 1) {
        if (TOKENS == 1) acc[0] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          const float sum = sum_of_lanes<LANES>(acc[t]);
          if (lane == t) results[slot + t] = sum;
        }
#pragma unroll
        for (int t = 0; t < 4; t++) acc[t] = 0;
      }
    }
    if (item.chunk >= chunks) return false;
    entry = next_entry, left = next_left, head = ~0u;
    if (starts) {
      end = next.end, base = next_base, slot = ((item.group * ROWS + part) * chunks + item.chunk) * TOKENS;
      if (lane == 0 && item.chunk == 0) head = ~0u << next.begin % 8;
    }
    next_entry += BATCH, next_left--;
    starts = next_left == 0;
    if (starts) do {
        item = item_after, next = after;
        item_after = item_of(take(counter)), after = row_of(item_after.group);
        begin_item();
        if (next_left <= 0) skip_to(counter, (item.chunk + 1) * groups);  // rows behind are not longer
      } while (next_left <= 0);
    return true;
  };
  Batch one, other;
  while (advance(one, other)) one = other;

  __syncthreads();
  for (int i = threadIdx.x; i < groups * ROWS * T; i += WARPS * 32) {
    const int r = i / T, t = i % T, at = place_of_row(r / ROWS) + r % ROWS;
    if (at >= O) continue;
    float sum = 0;
    for (int c = 0; c < chunks; c++) sum += results[(r * chunks + c) * TOKENS + t];
    finish(sum, t, rows[at].row, O, bias, gate, y);
  }
}
