// What the kernels share: instructions by name, and the end of a product.
// Macros: STAGES of a pipeline, BF16 (else fp16), ACTIVATION (0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu).
typedef unsigned int u32;
typedef unsigned short u16;

struct alignas(16) Piece { u32 word[4]; };
struct alignas(8) Pair { u32 word[2]; };

#ifndef EMULATED  // by a test, on a CPU
__device__ __forceinline__ u32 highest_bit(u32 bits) { u32 at; asm("bfind.u32 %0, %1;" : "=r"(at) : "r"(bits)); return at; }
__device__ __forceinline__ void copy_async(char* to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_word_async(char* to, const char* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// The bytes behind the first ``bytes`` become 0.
__device__ __forceinline__ void copy_some_async(char* to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_oldest() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory"); }
__device__ __forceinline__ u32 count_bits(u32 bits) { return __popc(bits); }
__device__ __forceinline__ u32 shifted(u32 low, u32 high, u32 bits) { return __funnelshift_r(low, high, bits); }
// A byte of a word, times a factor below 256, plus ``to``.
__device__ __forceinline__ u32 add_byte(u32 word, int byte, u32 factor, u32 to) { return __dp4a(word, factor << 8 * byte, to); }
__device__ __forceinline__ u32 permuted(u32 low, u32 high, u32 bytes) { return __byte_perm(low, high, bytes); }
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
