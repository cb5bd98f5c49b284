#if defined(__x86_64__)
// GCC 12 takes the undefined operands of its own intrinsics for a mistake of the caller.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "simd_bf16.h"
// after the header above
#include "bodies_panels.h"
// after that
#include "bodies_grouped_bf16.h"
#include "bodies_dots.h"
// after that
#include "bodies_windows.h"

namespace sten {
const Dots<bf16>* bf16_dots_avx512() {
  static constexpr Dots<bf16> dots = [] {
    Dots<bf16> all = avx512_bf16::make_dots();
    all.windows = avx512_bf16::windows_dots;
    return all;
  }();
  return &dots;
}
}  // namespace sten
#else
#include "kernels.h"

namespace sten {
const Dots<bf16>* bf16_dots_avx512() { return nullptr; }
}  // namespace sten
#endif
