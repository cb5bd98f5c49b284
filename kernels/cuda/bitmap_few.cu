// x (T, I) times NM as a bitmap, for one to four tokens: activation(x @ W.T + bias) * gate, (T, O).
//
// N of each 32 columns of a row are stored, so that every value has a place that is known here. A lane owns a row, and a warp
// a block of 32 rows x 128 columns at a time (``Copies`` in common.cuh). A lane reads all its values of a block at once, and the
// block that is STAGES later comes to the same place meanwhile. x of the block stands beside, as 32-bit words, of fp32 if SINGLE, else
// of two tokens, which are fewer words and more instructions: the 32 columns of a segment lie in 32 banks, and lanes that gather
// from one segment have no conflict. The highest bit of a mask belongs to the last value of its segment.
//
// Macros: N (even), TOKENS (1, 2, 4), SINGLE (1 for one token), WARPS, CTAS of a multiprocessor, STAGES, BF16 (else fp16), ACTIVATION (see common.cuh).
#include "common.cuh"

constexpr int WORDS = SINGLE ? TOKENS : TOKENS / 2;  // of x for each column
constexpr int WARP = STAGES * STAGE + WORDS * 512;   // bytes of a warp

extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
bitmap_few(const u16* x, const char* values, const char* index, const u16* bias, const u16* gate, u16* y, int T, int O, int I) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = I / 128, first = blockIdx.x * 32;
  char* own = memory + warp * WARP;
  u32* xs = (u32*)(own + STAGES * STAGE);
  wait_for_kernel_before();
  let_next_kernel_start();
  Copies copies(values, index, own, first, O, I);
#pragma unroll
  for (int s = 0; s < STAGES; s++) copies.fetch(s);

  Pair ahead[TOKENS];  // four columns of each token; of a token that does not exist, those of the last one
  u32 token_at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) token_at[t] = min(t, T - 1) * I + lane * 4;
  auto fetch_x = [&](int block) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      if (block < blocks) ahead[t] = *(const Pair*)(x + (token_at[t] + block * 128));
  };
  fetch_x(warp);

  float acc[4] = {0, 0, 0, 0};  // of the four segments of one token, or of up to four tokens
  int stage = 0;
  for (int block = warp; block < blocks; block += WARPS) {
    wait_for_oldest();
    __syncwarp();
    char* place = own + stage * STAGE;
    const Piece* piece = (const Piece*)place;
    Piece v[PIECES], masks = piece[32 * PITCH + lane];
#pragma unroll
    for (int j = 0; j < PIECES; j++) v[j] = piece[lane * PITCH + j];
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      if (SINGLE) {
        const u32 *four = ahead[w].word;
        ((Floats*)xs)[w * 32 + lane] = Floats{low(four[0]), high(four[0]), low(four[1]), high(four[1])};
      } else {
        const u32 *a = ahead[2 * w].word, *b = ahead[2 * w + 1].word;
        ((Piece*)xs)[w * 32 + lane] = Piece{permuted(a[0], b[0], 0x5410), permuted(a[0], b[0], 0x7632),
                                            permuted(a[1], b[1], 0x5410), permuted(a[1], b[1], 0x7632)};
      }
    }
    __syncwarp();  // all have read this stage, and written x
    copies.fetch(stage);
    fetch_x(block + WARPS);
#pragma unroll
    for (int i = N - 1; i >= 0; i--)
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const int at = s * N + i;
        const u32 c = highest_bit(masks.word[s]), pair = v[at / 8].word[at / 2 % 4];
        masks.word[s] = bits_below(masks.word[s], c);
        const float value = at % 2 ? high(pair) : low(pair);
        const u32* words = xs + c;
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
          const u32 word = words[w * 128 + s * 32];
          if (SINGLE) {
            float& sum = acc[TOKENS == 1 ? s : w];
            sum = fmaf(value, as_float(word), sum);
          } else {
            acc[2 * w] = fmaf(value, low(word), acc[2 * w]);
            acc[2 * w + 1] = fmaf(value, high(word), acc[2 * w + 1]);
          }
        }
      }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }

  add_warps(acc, memory, [&](int i) { return first + i; }, bias, gate, y, T, O);
}
