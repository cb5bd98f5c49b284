#if defined(__x86_64__)
#include "simd_avx2.h"
#define STEN_ISA avx2
#include "bodies.h"

namespace sten {
const Kernels* kernels_avx2() {
  static constexpr Kernels kernels = avx2::make("avx2");
  return &kernels;
}
}  // namespace sten
#else
#include "kernels.h"

namespace sten {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace sten
#endif
