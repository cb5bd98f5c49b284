// x (T, I) times CSR, for one to four tokens: activation(x @ W.T + bias) * gate, (T, O).
//
// A CTA owns a slice of 32 rows, a lane a row; slices have rows of like length (csr_few.py sorts them). A block is 32 values of
// each row, and the warps share the blocks of the slice. Values are read where CSR stores them, in pieces of 16 bytes: those of
// a row begin at the piece that holds its first value, and of each block a lane knows which of its 32 values are its own.
// Columns are steps from value to value, 4 bits each, or 6 or 8 where a block needs them; a block with a longer step, which is
// rare, reads ``col`` itself. A step is added to the address of an activation, all of which are in shared memory.
//
// ``table`` (csr_few.table): rows, {row, its first entry, the one behind its last, 0}, int32, for each lane; the first block of
// each slice, int32; of each block the pieces that its record needs, int32; records of RECORD bytes.
//
// Macros: TOKENS (1, 2, 4), WARPS, STAGES, BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int GUARD = 8, BEHIND = 32;               // columns that values of other rows may point to, before and behind x
constexpr int COLUMN = 2 * TOKENS;                  // bytes of a column of x
constexpr int PITCH = 5, VALUES = 32 * PITCH * 16;  // of a row of a block in pieces, an odd number; bytes of a block
// of a block: a start (u16) for each lane; low four bits of 32 steps for each, then the two bits above, then the two highest
constexpr int LOW = 64, MIDDLE = LOW + 512, HIGH = MIDDLE + 256, RECORD = HIGH + 256;
constexpr int STAGE = VALUES + RECORD + 16;         // bytes; the last word is the number of pieces of the record
constexpr int WARP = STAGES * STAGE;                // bytes of a warp
template <int N> struct Number { static constexpr int value = N; };
struct alignas(16) Row { int row, begin, end, none; };

extern "C" __global__ void __launch_bounds__(WARPS * 32)
csr_few(const u16* x, const char* values, const char* table, const int* col, const u16* bias, const u16* gate, u16* y,
        int T, int O, int I, int blocks) {
  extern __shared__ __align__(16) char memory[];
  wait_for_kernel_before();
  let_next_kernel_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = (O + 31) / 32;
  const Row* rows = (const Row*)table + blockIdx.x * 32;
  const int* firsts = (const int*)((const Row*)table + slices * 32);
  const int* sizes = firsts + (slices + 4) / 4 * 4;
  const char* records = (const char*)(sizes + blocks);
  const int first = firsts[blockIdx.x], count = firsts[blockIdx.x + 1] - first;
  char* xs = memory;
  const u32 columns = place_of(xs);
  char* own = memory + ((I + GUARD + BEHIND) * COLUMN + 15) / 16 * 16 + warp * WARP;

  const Row mine = rows[lane];
  int from[4], to[4];  // entries of the rows whose pieces this lane copies
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const Row row = rows[lane / 4 + 8 * i];
    from[i] = (row.begin & ~7) + lane % 4 * 8;
    to[i] = row.end;
  }
  auto size_of = [&](int block) { return block < count ? sizes[first + block] : 0; };
  auto fetch = [&](int block, int stage, int size) {
    char* at = own + stage * STAGE;
    if (block < count) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int entry = from[i] + 32 * block, left = to[i] - entry;
        copy_some_async(at + ((lane / 4 + 8 * i) * PITCH + lane % 4) * 16, values + 2 * (size_t)(left > 0 ? entry : 0),
                        left > 8 ? 16 : left > 0 ? 2 * left : 0);
      }
      const char* record = records + (size_t)(first + block) * RECORD;
#pragma unroll
      for (int i = 0; i < RECORD / 16; i += 32)
        if (lane + i < size) copy_async(at + VALUES + (lane + i) * 16, record + (lane + i) * 16);
      if (lane == 0) *(int*)(at + VALUES + RECORD) = size;
    }
    commit();  // also of nothing, so that the oldest group is always that of the block which is next
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(warp + s * WARPS, s, size_of(warp + s * WARPS));
  int ahead = size_of(warp + (STAGES - 1) * WARPS);

  for (int c = threadIdx.x * 8; c < I; c += WARPS * 256) {  // the tokens of a column beside each other
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
      *(Piece*)(xs + (GUARD + c) * COLUMN + 16 * i) = Piece{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
  }
  __syncthreads();

  float acc[4] = {0, 0, 0, 0};  // of up to four tokens; of one token four parts of its sum
  int stage = 0;
  for (int block = warp; block < count; block += WARPS) {
    fetch(block + (STAGES - 1) * WARPS, stage == 0 ? STAGES - 1 : stage - 1, ahead);
    ahead = size_of(block + STAGES * WARPS);
    wait_for_oldest();
    __syncwarp();
    const char* record = own + stage * STAGE + VALUES;
    const int pieces = *(const int*)(record + RECORD), base = (mine.begin & ~7) + 32 * block;
    const int before = mine.begin - base, until = mine.end - base;
    u32 valid = until >= 32 ? ~0u : until <= 0 ? 0 : (1u << until) - 1;
    if (before > 0) valid &= ~0u << before;  // at most 7
    Piece v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = ((const Piece*)(own + stage * STAGE))[lane * PITCH + j];
    auto multiply = [&](int k, u32 at) {  // k is known here: entry k of the block; ``at``: the place of its activations
      const u32 pair = v[k / 8].word[k / 2 % 4];
      const float value = k % 2 ? high(pair) : low(pair);
      if (TOKENS == 1) {
        add_product_if(valid & 1u << k, acc[k % 4], value, low(half_at(at)));
      } else {
        Pair two = {0, 0};
        if (TOKENS == 4) two = pair_at(at);
        else two.word[0] = word_at(at);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
          add_product_if(valid & 1u << k, acc[t], value, t % 2 ? high(two.word[t / 2]) : low(two.word[t / 2]));
      }
    };
    auto by_steps = [&](auto planes) {  // of two bits, above the lowest four
      u32 at = columns + ((const u16*)record)[lane] * COLUMN;
      const Piece lows = ((const Piece*)(record + LOW))[lane];
      const Pair middle = planes.value > 0 ? ((const Pair*)(record + MIDDLE))[lane] : Pair{0, 0};
      const Pair top = planes.value > 1 ? ((const Pair*)(record + HIGH))[lane] : Pair{0, 0};
#pragma unroll
      for (int k = 0; k < 32; k++) {
        const u32 nibbles = lows.word[k / 8] >> 4 * (k % 2) & 0x0f0f0f0f;
        at = add_byte(nibbles, k % 8 / 2, COLUMN, at);
        if (planes.value > 0) {
          const int shift = 2 * (k % 4);
          u32 more = middle.word[k / 16] >> shift & 0x03030303;
          if (planes.value > 1) more |= (shift ? top.word[k / 16] >> (shift ? shift - 2 : 0) : top.word[k / 16] << 2) & 0x0c0c0c0c;
          at = add_byte(more, k % 16 / 4, 16 * COLUMN, at);
        }
        multiply(k, at + k * COLUMN);
      }
    };
    if (pieces == MIDDLE / 16) {
      by_steps(Number<0>());
    } else if (pieces == HIGH / 16) {
      by_steps(Number<1>());
    } else if (pieces == RECORD / 16) {
      by_steps(Number<2>());
    } else {
#pragma unroll
      for (int k = 0; k < 32; k++) multiply(k, columns + ((valid & 1u << k ? col[base + k] : 0) + GUARD) * COLUMN);
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    __syncwarp();  // the next copies overwrite this stage
  }

  add_warps(acc, memory, [&](int i) { return rows[i].row; }, bias, gate, y, T, O);
}
