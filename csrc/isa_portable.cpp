#include "simd_portable.h"
#define STEN_ISA portable
#include "bodies.h"

namespace sten {
const Kernels* kernels_portable() {
  static constexpr Kernels kernels = portable::make("portable");
  return &kernels;
}
}  // namespace sten
