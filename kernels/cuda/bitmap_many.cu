// x (T, I) times NM as a bitmap, for up to 8 * TILES tokens, by mma: activation(x @ W.T + bias) * gate, (T, O).
//
// As in bitmap_few.cu, N of each 32 columns of a row are stored, and a warp takes a block of 32 rows x 128 columns at a time. Lane
// (g, t) of an mma fragment owns segment t of rows g, g + 8, g + 16 and g + 24, and each step of 16 columns takes four of
// every segment: the order of columns is free in a sum. x comes in the order of order.cu with SEGMENTS, one step ahead. Values
// come to shared memory in words; the pitch of a row is odd, so that lanes which read the same word of their rows have few bank
// conflicts. Four columns at a time: their values begin behind the bits before (popc), two shifts align them, a table says
// which bytes go where.
//
// Macros: N (even), TILES (1, 2, 4, 8), WARPS, STAGES, BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int ROW = 2 * N, PITCH = ROW | 1;         // words of a row in a block, and of its place in shared memory
constexpr int STAGE = (32 * PITCH + 2) * 4;         // bytes; the last lane reads up to two words behind its own
constexpr int WARP = STAGES * STAGE;                // bytes of a warp
constexpr int TABLE = 128;                          // bytes
constexpr int MEMORY = TABLE + WARPS * WARP > WARPS * SUMS * 128 ? TABLE + WARPS * WARP : WARPS * SUMS * 128;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
bitmap_many(const Piece* x, const char* values, const char* index, const u16* bias, const u16* gate, u16* y, int T, int O, int I) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = I / 128, first = blockIdx.x * 32;
  const size_t row_values = (size_t)I / 16 * N, row_bits = I / 8;  // bytes
  u32* table = (u32*)memory;  // of 16 patterns of four columns: bytes of the first pair and the second, mask of the second
  char* own = memory + TABLE + warp * WARP;
  if (threadIdx.x < 16) {
    const u32 bits = threadIdx.x, low_two = bits & 3, begin = 2 * (low_two == 3 ? 2 : low_two != 0);
    const u32 next = begin + (bits & 4 ? 2 : 0);
    const u32 pair = low_two == 3 ? 0x3210 : low_two == 2 ? 0x1044 : low_two == 1 ? 0x4410 : 0x4444;
    const u32 other = (begin & 7) | ((begin + 1) & 7) << 4 | (next & 7) << 8 | ((next + 1) & 7) << 12;
    table[2 * bits] = pair | other << 16;
    table[2 * bits + 1] = (bits & 4 ? 0xffffu : 0) | (bits & 8 ? 0xffff0000u : 0);
  }
  __syncthreads();

  u32 ahead[4];  // masks of the next block
  auto fetch = [&](int block, int stage) {
    if (block < blocks) {
      char* to = own + stage * STAGE;
#pragma unroll 4  // all of them would keep their addresses in registers
      for (int i = 0; i < ROW; i++) {
        const int k = lane + 32 * i, r = k / ROW, word = k % ROW, row = min(first + r, O - 1);
        copy_word_async(to + (r * PITCH + word) * 4, values + row * row_values + ((size_t)block * ROW + word) * 4);
      }
    }
    commit();  // also of nothing, so that the oldest group is always that of the block which is next
  };
  auto fetch_masks = [&](int block) {
#pragma unroll
    for (int u = 0; u < 4; u++)
      if (block < blocks) ahead[u] = *(const u32*)(index + min(first + g + 8 * u, O - 1) * row_bits + (size_t)block * 16 + t * 4);
  };

  Piece coming[TILES];
  auto fetch_x = [&](int block, int pair) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
      if (block < blocks) coming[j] = x[((size_t)(block * 4 + pair) * TILES + j) * 32 + lane];
  };

  float acc[2][TILES][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(warp + s * WARPS, s);
  fetch_masks(warp);
  // weights may be read before: order.cu let this kernel start, when all that is before it had ended
  wait_for_kernel_before();
  if (TILES <= 2) let_next_kernel_start();  // with more, kernels that share a multiprocessor take longer than one by one
  fetch_x(warp, 0);
  int stage = 0;
  for (int block = warp; block < blocks; block += WARPS) {
    fetch(block + (STAGES - 1) * WARPS, stage == 0 ? STAGES - 1 : stage - 1);
    u32 mask[4];
#pragma unroll
    for (int u = 0; u < 4; u++) mask[u] = ahead[u];
    fetch_masks(block + WARPS);
    wait_for_oldest();
    __syncwarp();
    const u32* words = (const u32*)(own + stage * STAGE) + t * (N / 2);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {  // of steps: eight columns of each segment
      Piece given[TILES];
#pragma unroll
      for (int j = 0; j < TILES; j++) given[j] = coming[j];
      fetch_x(pair < 3 ? block : block + WARPS, (pair + 1) % 4);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 a[2][4];
        const int step = 4 * (2 * pair + half);
#pragma unroll
        for (int u = 0; u < 4; u++) {
          const u32 before = count_bits(mask[u] & ((1u << step) - 1)), four = mask[u] >> step & 15;
          const u32* at = words + (g + 8 * u) * PITCH + before / 2;
          const u32 low_two = shifted(at[0], at[1], before * 16), high_two = shifted(at[1], at[2], before * 16);
          const u32 bytes = table[2 * four];
          a[u / 2][u % 2] = permuted(low_two, 0, bytes);
          a[u / 2][2 + u % 2] = permuted(low_two, high_two, bytes >> 16) & table[2 * four + 1];
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
