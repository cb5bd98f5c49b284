// x (T, I) times NM as a bitmap, for up to 8 * TILES tokens, by mma: activation(x @ W.T + bias) * gate, (T, O).
//
// N of each 32 columns of a row are stored, and a warp takes a block of 32 rows x 128 columns at a time. Lane (g, t) of an mma
// fragment owns segment t of rows g, g + 8, g + 16 and g + 24, and each step of 16 columns takes four of every segment: the order
// of columns is free in a sum. x comes in the order of order.cu with SEGMENTS, one step ahead. The values of a segment are a queue in
// registers. Two columns at a time: two bits say which bytes of its first word they are, and by how many values the queue
// moves on. It is read from memory a block ahead, and no shared memory is used: reading values from there at the places
// that the bits say took twice as long.
//
// Macros: N (even), TILES (1, 2, 4, 8), WARPS, BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int WORDS = N / 2, LOADED = N % 8 == 0 ? 4 : N % 4 == 0 ? 2 : 1;  // of a segment, and of a load
constexpr bool AHEAD = N <= 16;                                           // whether registers hold the next block, too
struct alignas(4 * LOADED) Load { u32 word[LOADED]; };

extern "C" __global__ void __launch_bounds__(WARPS * 32)
bitmap_many(const Piece* x, const char* values, const char* index, const u16* bias, const u16* gate, u16* y, int T, int O, int I) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = I / 128, first = blockIdx.x * 32;
  const size_t row_values = (size_t)I / 16 * N, row_bits = I / 8;  // bytes

  u32 queue[4][WORDS], coming_values[4][WORDS], mask[4], counts[4], coming_masks[4];
  auto fetch = [&](int block, u32 (&to)[4][WORDS]) {
#pragma unroll
    for (int u = 0; u < 4; u++) {
      const size_t row = min(first + g + 8 * u, O - 1);
      coming_masks[u] = *(const u32*)(index + row * row_bits + (size_t)block * 16 + t * 4);
      const Load* from = (const Load*)(values + row * row_values + ((size_t)block * 4 + t) * 2 * N);
#pragma unroll
      for (int i = 0; i < WORDS / LOADED; i++) {
        const Load words = from[i];
#pragma unroll
        for (int j = 0; j < LOADED; j++) to[u][i * LOADED + j] = words.word[j];
      }
    }
  };
  Piece coming[TILES];
  auto fetch_x = [&](int block, int pair) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
      if (block < blocks) coming[j] = x[((size_t)(block * 4 + pair) * TILES + j) * 32 + lane];
  };

  float acc[2][TILES][4] = {};
  if (AHEAD && warp < blocks) fetch(warp, coming_values);
  // weights may be read before: order.cu let this kernel start, when all that is before it had ended
  wait_for_kernel_before();
  if (TILES <= 2) let_next_kernel_start();  // with more, kernels that share a multiprocessor take longer than one by one
  fetch_x(warp, 0);
  for (int block = warp; block < blocks; block += WARPS) {
    if (!AHEAD) fetch(block, queue);
#pragma unroll
    for (int u = 0; u < 4; u++) {
      mask[u] = coming_masks[u], counts[u] = mask[u] - (mask[u] >> 1 & 0x55555555);  // the bits of each two columns
#pragma unroll
      for (int i = 0; i < WORDS && AHEAD; i++) queue[u][i] = coming_values[u][i];
    }
    if (AHEAD && block + WARPS < blocks) fetch(block + WARPS, coming_values);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {  // of steps: eight columns of each segment
      Piece given[TILES];
#pragma unroll
      for (int j = 0; j < TILES; j++) given[j] = coming[j];
      fetch_x(pair < 3 ? block : block + WARPS, (pair + 1) % 4);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 a[2][4];
#pragma unroll
        for (int two = 0; two < 2; two++) {
          const int at = 4 * pair + 2 * half + two;  // which two columns
#pragma unroll
          for (int u = 0; u < 4; u++) {
            const u32 bits = mask[u] >> 2 * at & 3;
            const u32 bytes = permuted(0x44104444, 0x32101044, bits * 0x22 + 0x10);  // 4444, 4410, 1044 or 3210: 4 is a zero
            a[u / 2][2 * two + u % 2] = permuted(queue[u][0], 0, bytes);
            const u32 moves = (at < 2 ? counts[u] << 4 - 2 * at : counts[u] >> 2 * at - 4) & 48;  // 16 bits for each of them
#pragma unroll
            for (int i = 0; i < WORDS && i < 15 - at; i++) queue[u][i] = moved(queue[u][i], i + 1 < WORDS ? queue[u][i + 1] : 0, moves);
          }
        }
#pragma unroll
        for (int rows = 0; rows < 2; rows++)
#pragma unroll
          for (int j = 0; j < TILES; j++) mma(acc[rows][j], a[rows], given[j].word[2 * half], given[j].word[2 * half + 1]);
      }
    }
  }
  write_sums(acc, memory, first, bias, gate, y, T, O);
}
