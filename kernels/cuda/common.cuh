// What the kernels share: instructions by name, and the end of a product.
// Macros: WARPS of a CTA, STAGES of a pipeline, TILES of 8 tokens, BF16 (else fp16), ACTIVATION (0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu).
typedef unsigned int u32;
typedef unsigned short u16;

struct alignas(16) Piece { u32 word[4]; };
struct alignas(8) Pair { u32 word[2]; };
struct alignas(16) Floats { float value[4]; };

#ifndef EMULATED  // by a test, on a CPU
// The kernel may have been started while the one before it in the stream still ran (PDL): wait for its end and its writes.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {  // which waits for this one to end
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ Piece load_once(const Piece* from) {  // which is not read again: around the L1 cache
  Piece r;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3]) : "l"(from));
  return r;
}
// A line to the L2 cache, also before the end of a kernel that writes it: it is written there.
__device__ __forceinline__ void fetch_early(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
__device__ __forceinline__ u32 ones_below(u32 bit) { u32 above; asm("shl.b32 %0, %1, %2;" : "=r"(above) : "r"(~0u), "r"(bit)); return ~above; }
__device__ __forceinline__ u32 highest_bit(u32 bits) { u32 at; asm("bfind.u32 %0, %1;" : "=r"(at) : "r"(bits)); return at; }
__device__ __forceinline__ u32 bits_below(u32 bits, u32 count) {  // the lowest ``count``; one instruction, where a shift and a mask are two
  u32 r;
  asm("szext.clamp.u32 %0, %1, %2;" : "=r"(r) : "r"(bits), "r"(count));
  return r;
}
__device__ __forceinline__ void copy_async(u32 to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async(char* to, const char* from) { copy_async((u32)__cvta_generic_to_shared(to), from); }
// The bytes behind the first ``bytes`` become 0.
__device__ __forceinline__ void copy_some_async(char* to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
#ifdef STAGES
__device__ __forceinline__ void wait_for_oldest() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory"); }
#endif
// Shared memory by its own 32-bit addresses, to which constants are added for nothing.
__device__ __forceinline__ u32 place_of(const char* shared) { return (u32)__cvta_generic_to_shared(shared); }
// A number that the compiler keeps, in place of computing it again wherever it is used.
__device__ __forceinline__ u32 kept(u32 number) { asm volatile("" : "+r"(number)); return number; }
__device__ __forceinline__ u16 half_at(u32 place) { u16 r; asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(place)); return r; }
__device__ __forceinline__ u32 word_at(u32 place) { u32 r; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(place)); return r; }
__device__ __forceinline__ Pair pair_at(u32 place) {
  Pair r;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r.word[0]), "=r"(r.word[1]) : "r"(place));
  return r;
}
// sum += a * b if the condition is not 0, by a predicate: a branch would be taken for each value.
__device__ __forceinline__ void add_product_if(u32 condition, float& sum, float a, float b) {
  asm("{.reg .pred p; setp.ne.u32 p, %1, 0; @p fma.rn.f32 %0, %2, %3, %0;}" : "+f"(sum) : "r"(condition), "f"(a), "f"(b));
}
// The low word of two, moved to the right by up to 32 bits.
__device__ __forceinline__ u32 moved(u32 low, u32 high, u32 bits) { return __funnelshift_rc(low, high, bits); }
// The high word of two, moved to the left by up to 32 bits.
__device__ __forceinline__ u32 moved_up(u32 low, u32 high, u32 bits) { return __funnelshift_lc(low, high, bits); }
// A byte of a word, times a factor below 256, plus ``to``.
__device__ __forceinline__ u32 add_byte(u32 word, int byte, u32 factor, u32 to) { return __dp4a(word, factor << 8 * byte, to); }
// The products of the bytes of two words, plus ``to``.
__device__ __forceinline__ u32 add_bytes(u32 a, u32 b, u32 to) { return __dp4a(a, b, to); }
// Of WIDTH lanes beside each other: a value of another lane, and sums; of the whole warp the largest.
template <int WIDTH = 32, class Value> __device__ __forceinline__ Value from_lane(Value value, int lane) { return __shfl_sync(~0u, value, lane, WIDTH); }
template <int WIDTH> __device__ __forceinline__ u32 add_lane_before(u32 value, int by) {  // of so many lanes before, if there is one
  asm volatile("{.reg .pred p; .reg .u32 r; shfl.sync.up.b32 r|p, %0, %1, %2, -1; @p add.u32 %0, r, %0;}" : "+r"(value) : "r"(by), "n"((32 - WIDTH) << 8));
  return value;
}
template <int WIDTH> __device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int by = WIDTH / 2; by > 0; by /= 2) value += __shfl_xor_sync(~0u, value, by);
  return value;
}
__device__ __forceinline__ u32 largest(u32 value) { return __reduce_max_sync(~0u, value); }
// Bytes of two words; each of four nibbles of ``bytes`` is below 8 (__byte_perm takes an instruction to make it so).
__device__ __forceinline__ u32 permuted(u32 low, u32 high, u32 bytes) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(bytes));
  return r;
}
__device__ __forceinline__ float as_float(u32 word) { return __uint_as_float(word); }
#if BF16
#define MMA_TYPE "bf16"
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u16 rounded(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#else
#define MMA_TYPE "f16"
__device__ __forceinline__ float low(u32 pair) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)pair)); return f; }
__device__ __forceinline__ float high(u32 pair) { return low(pair >> 16); }
__device__ __forceinline__ u16 rounded(float f) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#endif
// c (16, 8) += a (16, 16) @ b (16, 8): lane (g, t) has rows g, g + 8 of a and c, column g of b.
__device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c (16, 8) += a (16, 32 of which 16 are stored, 2:4) @ b (32, 8): lane (g, t) has rows g, g + 8 of c, of the values and, if
// t / 2 is SELECTOR, of 16 columns of the positions: those of row g in the low half of ``positions``.
template <int SELECTOR>
__device__ __forceinline__ void mma_sparse(float* c, const u32* a, const u32* b, u32 positions) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions), "n"(SELECTOR));
}
// Four matrices of 8 rows of 16 bytes; lane 8 i + r has the address of row r of matrix i, and gets word t of row g of each.
__device__ __forceinline__ void load_matrices(u32* a, const char* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"((u32)__cvta_generic_to_shared(at)) : "memory");
}
#endif

__device__ __forceinline__ float activated(float y) {
#if ACTIVATION == 1
  return y < 0 ? 0 : y;  // a maximum would turn NaN into 0
#elif ACTIVATION == 2
  return 0.5f * y * (1 + erff(y * 0.7071067811865476f));
#elif ACTIVATION == 3
  return y / (1 + expf(-2 * 0.7978845608028654f * (y + 0.044715f * y * y * y)));
#elif ACTIVATION == 4
  return y / (1 + expf(-y));
#else
  return y;
#endif
}

__device__ __forceinline__ void finish(float sum, int token, int row, int O, const u16* bias, const u16* gate, u16* y) {
  const size_t at = (size_t)token * O + row;
  if (bias) sum += low(bias[row]);
  sum = activated(sum);
  if (gate) sum *= low(gate[at]);
  y[at] = rounded(sum);
}

#if defined(N) && defined(STAGES)
// Blocks of 32 rows x 128 columns of a bitmap, of which a warp copies every WARPS-th to shared memory, in pieces of 16 bytes: N of
// each 32 columns are stored, and a row has PIECES of values in a block. Its pitch is an odd number of pieces, so that lanes which
// read the same piece of their own rows have no bank conflict.
constexpr int PIECES = N / 2, PITCH = PIECES | 1, AT_ONCE = 32 / PIECES;  // AT_ONCE rows are copied by one instruction
constexpr int VALUES = 32 * PITCH * 16, STAGE = VALUES + 32 * 16;         // bytes of a block: values, then masks
struct Copies {  // by this lane: of pieces of rows that are AT_ONCE apart, and of the masks of one row
  const char *values, *masks;
  u32 values_to, masks_to, row_values;  // places, bytes
  int block, blocks, row, rows;         // the next one, and all; rows of the matrix from the first one that is copied on
  __device__ __forceinline__ Copies(const char* all_values, const char* all_masks, char* own, int first, int O, int I)
      : block(threadIdx.x / 32), blocks(I / 128), rows(min(32, O - first)) {
    const int lane = threadIdx.x % 32, piece = lane % PIECES;
    row = lane / PIECES, row_values = I / 16 * N;
    values = all_values + (size_t)(first + row) * row_values + (block * PIECES + piece) * 16;
    masks = all_masks + (size_t)(first + lane) * (I / 8) + block * 16;
    values_to = kept(place_of(own) + (row * PITCH + piece) * 16), masks_to = kept(place_of(own) + VALUES + lane * 16);
    row = kept(row < AT_ONCE ? row : 32);
  }
  __device__ __forceinline__ void fetch(int stage) {
    const int there = block < blocks ? rows : 0, below = there - row;
    const u32 to = kept(values_to + stage * STAGE);
#pragma unroll
    for (int i = 0; i < 32; i += AT_ONCE)
      if (i < below) copy_async(to + i * PITCH * 16, values + (size_t)(row_values * i));
    if ((int)(threadIdx.x % 32) < there) copy_async(masks_to + stage * STAGE, masks);
    commit();  // also of nothing, so that the oldest group of copies is always that of the block which is next
    block += WARPS, values += WARPS * PIECES * 16, masks += WARPS * 16;
  }
};
#endif

#if defined(WARPS) && defined(TOKENS)
// The end of a product on CUDA cores whose warps share the columns of 32 rows, a lane a row: ``acc`` has the sums of each warp, of
// one token in four parts; ``row_of(i)`` is the i-th row, and (WARPS, TOKENS, 32) floats of memory are for them.
template <int SUMS, class RowOf>
__device__ __forceinline__ void add_warps(
    float (&acc)[SUMS], char* memory, RowOf row_of, const u16* bias, const u16* gate, u16* y, int T, int O) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = (float*)memory;
  __syncthreads();
  if (TOKENS == 1) acc[0] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) sums[(warp * TOKENS + t) * 32 + lane] = acc[t];
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * 32; i += WARPS * 32) {
    const int t = i / 32, row = row_of(i % 32);
    if (t >= T || row >= O) continue;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[(w * TOKENS + t) * 32 + i % 32];
    finish(sum, t, row, O, bias, gate, y);
  }
}
#endif

#if defined(WARPS) && defined(TILES)
// The end of a product by mma whose warps share the columns of 32 rows: ``acc`` has the sums of each warp, in fragments of two
// tiles of rows; (WARPS, 32, SUMS) floats of memory are for them.
constexpr int SUMS = 8 * TILES + 1;
__device__ __forceinline__ void write_sums(
    const float (&acc)[2][TILES][4], char* memory, int first, const u16* bias, const u16* gate, u16* y, int T, int O) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = (float*)memory;
  __syncthreads();
#pragma unroll
  for (int rows = 0; rows < 2; rows++)
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        sums[(warp * 32 + rows * 16 + lane / 4 + e / 2 * 8) * SUMS + 8 * j + lane % 4 * 2 + e % 2] = acc[rows][j][e];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * T; i += WARPS * 32) {
    const int token = i / 32, row = first + i % 32;
    if (row >= O) continue;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[(w * 32 + i % 32) * SUMS + token];
    finish(sum, token, row, O, bias, gate, y);
  }
}
#endif
