// x (T, I) times NM as a bitmap, for one to four tokens: activation(x @ W.T + bias) * gate, (T, O).
//
// N of each 32 columns of a row are stored, so that every value has a place that is known here. A lane owns a row, and a warp
// a block of 32 rows x 128 columns at a time. Rows come to shared memory in pieces of 16 bytes (cp.async, STAGES - 1 blocks
// ahead); a row's pitch there is an odd number of pieces, so that lanes which read the same piece of their own rows have no
// bank conflict. x of the block stands beside, as 32-bit words: the 32 columns of a segment lie in 32 banks, and lanes that
// gather from one segment have no conflict either. The highest bit of a mask belongs to the last value of its segment.
//
// Macros: N (even), TOKENS (1, 2, 4), WARPS, STAGES, BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int PIECES = N / 2;                       // of the values of a row in a block, 16 bytes each
constexpr int PITCH = PIECES | 1;                   // of a row in shared memory, in pieces
constexpr int VALUES = 32 * PITCH * 16, STAGE = VALUES + 32 * 16;  // bytes: values, then masks
constexpr int WORDS = TOKENS == 4 ? 2 : 1;          // of x for each column: fp32, or pairs of tokens
constexpr int WARP = STAGES * STAGE + WORDS * 512;  // bytes of a warp
constexpr int MEMORY = WARPS * WARP;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
bitmap_few(const u16* x, const char* values, const char* index, const u16* bias, const u16* gate, u16* y, int T, int O, int I) {
  extern __shared__ __align__(16) char memory[];
  wait_for_kernel_before();
  let_next_kernel_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = I / 128, first = blockIdx.x * 32;
  const size_t row_values = (size_t)I / 16 * N, row_bits = I / 8;  // bytes
  char* own = memory + warp * WARP;
  u32* xs = (u32*)(own + STAGES * STAGE);

  auto fetch = [&](int block, int stage) {
    char* to = own + stage * STAGE;
    if (block < blocks) {
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int k = lane + 32 * i, r = k / PIECES, piece = k % PIECES, row = min(first + r, O - 1);
        copy_async(to + (r * PITCH + piece) * 16, values + row * row_values + ((size_t)block * PIECES + piece) * 16);
      }
      copy_async(to + VALUES + lane * 16, index + min(first + lane, O - 1) * row_bits + (size_t)block * 16);
    }
    commit();  // also of nothing, so that the oldest group is always that of the block which is next
  };
  Pair ahead[TOKENS];  // four columns of each token
  auto fetch_x = [&](int block) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      ahead[t] = Pair{0, 0};
      if (block < blocks && t < T) ahead[t] = *(const Pair*)(x + (size_t)t * I + block * 128 + lane * 4);
    }
  };

  float acc[4] = {0, 0, 0, 0};  // of the four segments of one token, or of up to four tokens
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(warp + s * WARPS, s);
  fetch_x(warp);
  int stage = 0;
  for (int block = warp; block < blocks; block += WARPS) {
    fetch(block + (STAGES - 1) * WARPS, stage == 0 ? STAGES - 1 : stage - 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      auto number = [&](int t) { u32 pair = ahead[t].word[i / 2]; return i % 2 ? pair >> 16 : pair & 0xffff; };
      if (TOKENS == 1) {
        float f = i % 2 ? high(ahead[0].word[i / 2]) : low(ahead[0].word[i / 2]);
        ((float*)xs)[lane * 4 + i] = f;
      } else {
#pragma unroll
        for (int w = 0; w < WORDS; w++)
          xs[w * 128 + lane * 4 + i] = number(2 * w < TOKENS ? 2 * w : 0) | number(2 * w + 1 < TOKENS ? 2 * w + 1 : 0) << 16;
      }
    }
    fetch_x(block + WARPS);
    wait_for_oldest();
    __syncwarp();
    const Piece* piece = (const Piece*)(own + stage * STAGE);
    Piece v[PIECES], masks = piece[32 * PITCH + lane];
#pragma unroll
    for (int j = 0; j < PIECES; j++) v[j] = piece[lane * PITCH + j];
#pragma unroll
    for (int i = N - 1; i >= 0; i--)
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const int at = s * N + i;
        const u32 c = highest_bit(masks.word[s]), pair = v[at / 8].word[at / 2 % 4];
        masks.word[s] ^= 1u << c;
        const float value = at % 2 ? high(pair) : low(pair);
        if (TOKENS == 1) {
          acc[s] = fmaf(value, ((float*)xs)[s * 32 + c], acc[s]);
        } else {
#pragma unroll
          for (int w = 0; w < WORDS; w++) {
            const u32 two = xs[w * 128 + s * 32 + c];
            acc[2 * w] = fmaf(value, low(two), acc[2 * w]);
            acc[2 * w + 1] = fmaf(value, high(two), acc[2 * w + 1]);
          }
        }
      }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    __syncwarp();  // the next copies overwrite this stage, the next x these words
  }

  add_warps(acc, memory, [&](int i) { return first + i; }, bias, gate, y, T, O);
}
