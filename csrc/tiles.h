// AMX: eight registers, called tiles, of 16 rows of 64 bytes, and their product of bfloat16. Written as instructions: GCC's
// intrinsics take literal numbers only, and do not say that a load reads memory.
#pragma once

#include <cstdint>

namespace sten::tiles {

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};    // of a row of each tile
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define STEN_TILE __attribute__((always_inline)) inline

#ifdef STEN_TILES
}  // namespace sten::tiles
#include STEN_TILES    // the same functions for a processor without them: tests/tiles_emulated.h
namespace sten::tiles {
#else

STEN_TILE void configure(const Shapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
STEN_TILE void release() { __asm__ volatile("tilerelease" : : : "memory"); }

// Rows `step` bytes apart.
template <int N>
STEN_TILE void load(const void* rows, int64_t step) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(step), "i"(N) : "memory");
}
template <int N>
STEN_TILE void store(void* rows, int64_t step) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(step), "i"(N) : "memory");
}
// C[i, j] += the sum over k < 16 of A[i, 2k] B[k, 2j] + A[i, 2k + 1] B[k, 2j + 1]; subnormal numbers are zero
template <int C, int A, int B>
STEN_TILE void multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

// Held while tiles are in use. They belong to the thread, and oneDNN uses them with shapes of its own: nothing is assumed of
// what they were before, and at the end they are given back as they are in a new thread.
class InUse {
 public:
  STEN_TILE InUse() { configure({}); }
  STEN_TILE ~InUse() { release(); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;
};

}  // namespace sten::tiles
