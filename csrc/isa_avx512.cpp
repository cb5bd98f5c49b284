#if defined(__x86_64__)
// GCC 12 takes the undefined operands of its own intrinsics for a mistake of the caller.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "lookup_avx512.h"
#include "simd_avx512.h"
#define STEN_ISA avx512
#include "bodies.h"

namespace sten {
const Kernels* kernels_avx512() {
  static constexpr Kernels kernels = avx512::make("avx512");
  return &kernels;
}
}  // namespace sten
#else
#include "kernels.h"

namespace sten {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace sten
#endif
