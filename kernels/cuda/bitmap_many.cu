// x (T, I) times NM as a bitmap, for up to 8 * TILES tokens, by mma: activation(x @ W.T + bias) * gate, (T, O).
//
// A warp takes a block of 32 rows x 128 columns at a time (``Copies`` in common.cuh). Lane (g, t) of an mma fragment owns segment t
// of rows g, g + 8, g + 16 and g + 24, and each step of 16 columns takes four of every segment: the order of columns is free in a
// sum. x comes in the order of order.cu with SEGMENTS, one step ahead. The values of a segment are a queue in registers, which moves
// on by up to two values for each two columns. The second half of the columns takes them from its other end, beginning with the
// last: half as many words are left to be moved.
//
// Macros: N (even), TILES (1, 2, 4, 8), WARPS, CTAS of a multiprocessor, STAGES, BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int WORDS = N / 2, READ = N % 8 == 0 ? 4 : N % 4 == 0 ? 2 : 1;  // of a segment, and of one that is read at once
struct alignas(4 * READ) Read { u32 word[READ]; };

extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
bitmap_many(const Piece* x, const char* values, const char* index, const u16* bias, const u16* gate, u16* y, int T, int O, int I) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = I / 128, first = blockIdx.x * 32;
  char* own = memory + warp * STAGES * STAGE;
  Copies copies(values, index, own, first, O, I);
  // weights may be read before: order.cu let this kernel start, when all that is before it had ended
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) copies.fetch(s);
  wait_for_kernel_before();
  if (TILES <= 2) let_next_kernel_start();  // with more, kernels that share a multiprocessor take longer than one by one
  Piece coming[TILES];
  auto fetch_x = [&](int block, int pair) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
      if (block < blocks) coming[j] = x[(block * 4 + pair) * TILES * 32 + j * 32 + lane];
  };
  fetch_x(warp, 0);

  float acc[2][TILES][4] = {};
  int stage = 0;
  for (int block = warp; block < blocks; block += WARPS) {
    const char* place = own + stage * STAGE;
    copies.fetch(stage == 0 ? STAGES - 1 : stage - 1);
    wait_for_oldest();
    __syncwarp();
    u32 queue[4][WORDS], mask[4];
#pragma unroll
    for (int u = 0; u < 4; u++) mask[u] = *(const u32*)(place + VALUES + (g + 8 * u) * 16 + t * 4);
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {  // eight columns of each segment: the first, the second, the last, the third
      const bool up = turn < 2;
      const int pair = up ? turn : 5 - turn;
      if (turn % 2 == 0) {
#pragma unroll
        for (int u = 0; u < 4; u++)
#pragma unroll
          for (int i = 0; i < WORDS / READ; i++) {
            const Read words = ((const Read*)(place + (g + 8 * u) * PITCH * 16 + t * 2 * N))[i];
#pragma unroll
            for (int j = 0; j < READ; j++) queue[u][i * READ + j] = words.word[j];
          }
      }
      Piece given[TILES];
#pragma unroll
      for (int j = 0; j < TILES; j++) given[j] = coming[j];
      if (turn < 3) fetch_x(block, turn == 0 ? 1 : turn == 1 ? 3 : 2); else fetch_x(block + WARPS, 0);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int half = up ? h : 1 - h;
        u32 a[2][4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int two = up ? k : 1 - k, at = 4 * pair + 2 * half + two;  // which two columns
          const int after = up ? 7 - at : at - 8;                           // how many pairs are left for the queue
#pragma unroll
          for (int u = 0; u < 4; u++) {
            const u32 bits = mask[u] >> 2 * at & 3 | 0x4440;  // 4 is a zero
            const u32 moves = permuted(0x20101000, 0, bits);    // 16 bits for each of them
            const u32 which = (bits - 0x4440) * 0x22 + 0x10;    // a byte of ...
            u32& built = a[u / 2][2 * two + u % 2];
            if (up) {
              built = permuted(queue[u][0], 0, permuted(0x44104444, 0x32101044, which));  // 4444, 4410, 1044 or 3210
#pragma unroll
              for (int i = 0; i < WORDS && i < after; i++)
                queue[u][i] = moved(queue[u][i], i + 1 < WORDS ? queue[u][i + 1] : 0, moves);
            } else {
              built = permuted(queue[u][WORDS - 1], 0, permuted(0x44324444, 0x32103244, which));
#pragma unroll
              for (int i = WORDS - 1; i >= 0 && WORDS - 1 - i < after; i--)
                queue[u][i] = moved_up(i > 0 ? queue[u][i - 1] : 0, queue[u][i], moves);
            }
          }
        }
#pragma unroll
        for (int rows = 0; rows < 2; rows++)
#pragma unroll
          for (int j = 0; j < TILES; j++) mma(acc[rows][j], a[rows], given[j].word[2 * half], given[j].word[2 * half + 1]);
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    __syncwarp();  // the next copies overwrite this stage
  }
  write_sums(acc, memory, first, bias, gate, y, T, O);
}
