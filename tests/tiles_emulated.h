// What csrc/tiles.h needs in order to run on a processor without AMX, as the manual defines it; a use that would fault,
// or read what nobody wrote, ends the program.
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace sten::tiles {

struct Registers {
  bool configured = false;
  alignas(64) unsigned char data[8][16][64];
};
inline thread_local Registers registers;
inline std::atomic<int64_t> products{0};

inline void expect(bool holds) {
  if (!holds) std::abort();
}

inline void configure(const Shapes& shapes) {
  expect(shapes.palette == 1 && !registers.configured);    // the code under test never loads shapes twice
  for (int i = 0; i < 8; ++i) expect(shapes.rows[i] == 16 && shapes.bytes[i] == 64);
  for (int i = 8; i < 16; ++i) expect(shapes.rows[i] == 0 && shapes.bytes[i] == 0);
  registers.configured = true;
  std::memset(registers.data, 0, sizeof registers.data);
}

inline void release() { registers.configured = false; }

template <int N>
void load(const void* rows, int64_t step) {
  static_assert(0 <= N && N < 8);
  expect(registers.configured);
  for (int i = 0; i < 16; ++i) std::memcpy(registers.data[N][i], static_cast<const char*>(rows) + i * step, 64);
}

template <int N>
void store(void* rows, int64_t step) {
  static_assert(0 <= N && N < 8);
  expect(registers.configured);
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(rows) + i * step, registers.data[N][i], 64);
}

// One of the 32 bfloat16 in a row; subnormal ones are zero.
inline float element(int tile, int row, int i) {
  uint16_t half;
  std::memcpy(&half, registers.data[tile][row] + 2 * i, 2);
  const uint32_t bits = static_cast<uint32_t>((half & 0x7f80) ? half : half & 0x8000) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <int C, int A, int B>
void multiply() {
  static_assert(C != A && C != B && A != B, "an illegal instruction");
  expect(registers.configured);
  ++products;
  float a[16][32], b[16][32], sums[16][16];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 32; ++k) a[i][k] = element(A, i, k), b[i][k] = element(B, i, k);
  std::memcpy(sums, registers.data[C], sizeof sums);
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) {    // products of bfloat16 are exact in float
        sums[i][j] += a[i][2 * k] * b[k][2 * j];
        sums[i][j] += a[i][2 * k + 1] * b[k][2 * j + 1];
      }
  std::memcpy(registers.data[C], sums, sizeof sums);
}

}  // namespace sten::tiles
