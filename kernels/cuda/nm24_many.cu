// x (T, I) times NM(2, 4), for up to 8 * TILES tokens, by mma.sp: activation(x @ W.T + bias) * gate, (T, O).
//
// A warp takes a block of 32 rows x 128 columns at a time, whose values and positions come to shared memory as they are stored:
// two tiles of 16 rows, four steps of 32 columns. The pitch of a row of values is an odd number of pieces, so that ldmatrix has no
// bank conflict. Positions of eight values are 16 bits, and those of a lane stand at byte 2 t of each eight of its rows. x comes in
// the order of order.cu, one step ahead.
//
// Macros: TILES (1, 2, 4, 8), WARPS, STAGES, BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int PITCH = 9, VALUES = 32 * PITCH * 16;  // of a row in pieces, of which it fills 8; bytes
constexpr int STAGE = VALUES + 32 * 16;             // bytes: values, then positions
constexpr int WARP = STAGES * STAGE;                // bytes of a warp
constexpr int MEMORY = WARPS * WARP > WARPS * SUMS * 128 ? WARPS * WARP : WARPS * SUMS * 128;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
nm24_many(const Piece* x, const char* values, const char* index, const u16* bias, const u16* gate, u16* y, int T, int O, int I) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = I / 128, first = blockIdx.x * 32;
  const size_t row_values = I, row_positions = I / 8;  // bytes
  char* own = memory + warp * WARP;

  auto fetch = [&](int block, int stage) {
    if (block < blocks) {
      char* to = own + stage * STAGE;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int r = lane / 8 + 4 * i, piece = lane % 8, row = min(first + r, O - 1);
        copy_async(to + (r * PITCH + piece) * 16, values + row * row_values + (size_t)block * 128 + piece * 16);
      }
      copy_async(to + VALUES + lane * 16, index + min(first + lane, O - 1) * row_positions + (size_t)block * 16);
    }
    commit();  // also of nothing, so that the oldest group is always that of the block which is next
  };
  Piece coming[TILES];
  auto fetch_x = [&](int block, int step) {
#pragma unroll
    for (int j = 0; j < TILES; j++)
      if (block < blocks) coming[j] = x[((size_t)(block * 4 + step) * TILES + j) * 32 + lane];
  };

  float acc[2][TILES][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(warp + s * WARPS, s);
  // weights may be read before: order.cu let this kernel start, when all that is before it had ended
  wait_for_kernel_before();
  if (TILES <= 2) let_next_kernel_start();  // with more, kernels that share a multiprocessor take longer than one by one
  fetch_x(warp, 0);
  int stage = 0;
  for (int block = warp; block < blocks; block += WARPS) {
    fetch(block + (STAGES - 1) * WARPS, stage == 0 ? STAGES - 1 : stage - 1);
    wait_for_oldest();
    __syncwarp();
    const char* from = own + stage * STAGE;
    u32 positions[2][2];  // of each tile: steps 0 and 1, steps 2 and 3
#pragma unroll
    for (int rows = 0; rows < 2; rows++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const char* at = from + VALUES + (rows * 16 + g) * 16 + 8 * i + 2 * t;
        positions[rows][i] = *(const u16*)at | (u32)*(const u16*)(at + 8 * 16) << 16;
      }
#pragma unroll
    for (int step = 0; step < 4; step++) {
      Piece given[TILES];
#pragma unroll
      for (int j = 0; j < TILES; j++) given[j] = coming[j];
      fetch_x(step < 3 ? block : block + WARPS, (step + 1) % 4);
#pragma unroll
      for (int rows = 0; rows < 2; rows++) {
        u32 a[4];
        load_matrices(a, from + ((rows * 16 + lane % 16) * PITCH + 2 * step + lane / 16) * 16);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
          if (step % 2) mma_sparse<1>(acc[rows][j], a, given[j].word, positions[rows][step / 2]);
          else mma_sparse<0>(acc[rows][j], a, given[j].word, positions[rows][step / 2]);
        }
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    __syncwarp();  // the next copies overwrite this stage
  }
  write_sums(acc, memory, first, bias, gate, y, T, O);
}
