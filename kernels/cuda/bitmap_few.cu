// x (T, I) times NM as a bitmap, for one to four tokens: activation(x @ W.T + bias) * gate, (T, O).
//
// N of each 32 columns of a row are stored, so that every value has a place that is known here. A lane owns a row, and a warp
// a block of 32 rows x 128 columns at a time. The blocks of the matrix, row after row of them, are divided evenly among the
// CTAs, whatever rows they belong to, and the warps of a CTA take turns. Rows come to shared memory in pieces of 16 bytes
// (cp.async), where a row's pitch is an odd number of pieces, so that lanes which read the same piece of their own rows have no
// bank conflict. A lane reads all its values of a block at once, and the next block comes to the same place meanwhile. x of
// the block stands beside, as 32-bit words: the 32 columns of a segment lie in 32 banks, and lanes that gather from one segment
// have no conflict either. The highest bit of a mask belongs to the last value of its segment.
//
// ``partial`` has 2 x TOKENS x 32 floats for each CTA: sums of rows that it shares with others. ``counters`` has a zero for each
// 32 rows, and has it again at the end: the CTA that comes last adds up, in the order of the CTAs.
//
// Macros: N (even), TOKENS (1, 2, 4), WARPS, STAGES, BF16 (else fp16), ACTIVATION (see common.cuh).
#define GROUPS 1
#include "common.cuh"

constexpr int WORDS = TOKENS == 4 ? 2 : 1;          // of x for each column: fp32, or pairs of tokens
constexpr int WARP = STAGES * STAGE + WORDS * 512;  // bytes of a warp
#ifndef PREFETCH
#define PREFETCH 0
#endif
#ifndef BOUND
#define BOUND CTAS
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, BOUND)
bitmap_few(const u16* x, const char* values, const char* index, const u16* bias, const u16* gate, u16* y, float* partial,
           int* counters, int T, int O, int I, int ctas) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Share share(O, I, ctas);
  const int first_group = (u32)share.begin / share.blocks, touched = (u32)(share.end - 1) / share.blocks - first_group + 1;
  char* own = memory + warp * WARP;
  Piece* xs = (Piece*)(own + STAGES * STAGE);
  float* sums = (float*)(memory + WARPS * WARP);  // (touched, WARPS, TOKENS, 32)
  Place now(share);
  Copies copies(share, values, index, own, O, I);
  Pair ahead[TOKENS];  // four columns of each token; of a token that does not exist, those of the last one
  u32 token_at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) token_at[t] = min(t, T - 1) * I + lane * 4;
  auto fetch_x = [&](const Place& place) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) ahead[t] = *(const Pair*)(x + (token_at[t] + place.block * 128));
  };

  {
    Place coming = now;
    for (int s = 0; s < PREFETCH; s++, coming.advance(share)) {
      const int first = coming.group * 32, rows = coming.at < share.end ? min(32, O - first) : 0;
      for (int i = lane; i < rows * PIECES / 2; i += 32)  // by 32 bytes
        prefetch(values + (size_t)(first + i / (PIECES / 2)) * copies.row_values + (coming.block * PIECES + i % (PIECES / 2) * 2) * 16);
      if (lane < rows) prefetch(index + (size_t)(first + lane) * copies.row_masks + coming.block * 16);
    }
  }
  for (int i = lane; i < touched * TOKENS * 32; i += 32) sums[(i / (TOKENS * 32) * WARPS + warp) * TOKENS * 32 + i % (TOKENS * 32)] = 0;
  wait_for_kernel_before();
  let_next_kernel_start();
#pragma unroll
  for (int s = 0; s < STAGES; s++) copies.fetch(share, s);
  fetch_x(now);

  float acc[4] = {0, 0, 0, 0};  // of the four segments of one token, or of up to four tokens
  int stage = 0;
  while (now.at < share.end) {
    wait_for_oldest();
    __syncwarp();
    char* place = own + stage * STAGE;
    const Piece* piece = (const Piece*)place;
    Piece v[PIECES], masks = piece[32 * PITCH + lane];
#pragma unroll
    for (int j = 0; j < PIECES; j++) v[j] = piece[lane * PITCH + j];
    if (TOKENS == 1) {
      ((Floats*)xs)[lane] = Floats{low(ahead[0].word[0]), high(ahead[0].word[0]), low(ahead[0].word[1]), high(ahead[0].word[1])};
    } else {
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const Pair a = ahead[2 * w], b = ahead[2 * w + 1];
        xs[w * 32 + lane] = Piece{permuted(a.word[0], b.word[0], 0x5410), permuted(a.word[0], b.word[0], 0x7632),
                                  permuted(a.word[1], b.word[1], 0x5410), permuted(a.word[1], b.word[1], 0x7632)};
      }
    }
    __syncwarp();  // all have read this stage, and written x
    copies.fetch(share, stage);
    const int group = now.group;
    now.advance(share);
    fetch_x(now);  // also behind the last one, where there are columns, too
#pragma unroll
    for (int i = N - 1; i >= 0; i--)
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const int at = s * N + i;
        const u32 c = highest_bit(masks.word[s]), pair = v[at / 8].word[at / 2 % 4];
        masks.word[s] = bits_below(masks.word[s], c);
        const float value = at % 2 ? high(pair) : low(pair);
        if (TOKENS == 1) {
          acc[s] = fmaf(value, ((float*)xs)[s * 32 + c], acc[s]);
        } else {
#pragma unroll
          for (int w = 0; w < WORDS; w++) {
            const u32 two = ((u32*)xs)[w * 128 + s * 32 + c];
            acc[2 * w] = fmaf(value, low(two), acc[2 * w]);
            acc[2 * w + 1] = fmaf(value, high(two), acc[2 * w + 1]);
          }
        }
      }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    if (now.at >= share.end || now.group != group) {
      if (TOKENS == 1) acc[0] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) sums[(((group - first_group) * WARPS + warp) * TOKENS + t) * 32 + lane] = acc[t];
#pragma unroll
      for (int t = 0; t < 4; t++) acc[t] = 0;
    }
  }

  // the rows of a group: its sums are here, or with those of the CTAs that have its other blocks
  __syncthreads();
  for (int i = threadIdx.x; i < touched * TOKENS * 32; i += WARPS * 32) {
    const int k = i / (TOKENS * 32), t = i / 32 % TOKENS, group = first_group + k, row = group * 32 + i % 32;
    float sum = 0;
#pragma unroll 4
    for (int w = 0; w < WARPS; w++) sum += sums[((k * WARPS + w) * TOKENS + t) * 32 + i % 32];
    if (!share.whole(group)) {
      share.of_group(partial, blockIdx.x, group, TOKENS * 32)[i % (TOKENS * 32)] = sum;
    } else if (t < T && row < O) {
      finish(sum, t, row, O, bias, gate, y);
    }
  }
  // the first group and the last one may be shared; each is looked at by a thread
  const int last_group = first_group + touched - 1;
  if (share.whole(first_group) && share.whole(last_group)) return;
  int* come = (int*)memory;
  __threadfence();
  __syncthreads();
  if (threadIdx.x < 2) {
    const int group = threadIdx.x ? last_group : first_group;
    const bool shared = !share.whole(group) && (threadIdx.x == 0 || touched > 1);
    come[threadIdx.x] = shared && comes_last(counters + group, share.last_owner(group) - share.first_owner(group) + 1);
  }
  __syncthreads();
  for (int k = 0; k < 2; k++) {
    if (!come[k]) continue;
    const int group = k ? last_group : first_group, from = share.first_owner(group), to = share.last_owner(group);
    for (int i = threadIdx.x; i < TOKENS * 32; i += WARPS * 32) {
      const int t = i / 32, row = group * 32 + i % 32;
      if (t >= T || row >= O) continue;
      float sum = 0;
      for (int cta = from; cta <= to; cta++) sum += fresh(share.of_group(partial, cta, group, TOKENS * 32) + i);
      finish(sum, t, row, O, bias, gate, y);
    }
  }
}
