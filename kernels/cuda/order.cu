// x (T, I) -> (I / 128, 4 steps, TILES, 32 lanes, 8): what each lane multiplies, so that a warp reads it as one piece of memory.
//
// Lane (g, t) gets eight columns of token g of a tile, 0 where there is no such token: with SEGMENTS columns 32 t + 8 step
// to + 7 of the 128, else 32 step + 8 i + 2 t and the one after, for i from 0 to 3, as b of mma_sparse.
//
// Macros: TILES, SEGMENTS (0, 1).
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) order(const u16* x, Piece* ordered, int T, int I) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const int at = blockIdx.x * 256 + threadIdx.x, lane = at % 32, t = lane % 4;
  const int token = at / 32 % TILES * 8 + lane / 4, step = at / (32 * TILES) % 4, block = at / (128 * TILES);
  if (block >= I / 128) return;
  Piece piece = {0, 0, 0, 0};
  if (token < T) {
    const u16* from = x + (size_t)token * I + block * 128;
    if (SEGMENTS) {
      piece = *(const Piece*)(from + t * 32 + step * 8);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) piece.word[i] = *(const u32*)(from + step * 32 + 8 * i + 2 * t);
    }
  }
  ordered[at] = piece;
}
