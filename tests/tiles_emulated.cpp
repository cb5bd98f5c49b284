// The products of csrc/bodies_tiles.h by their drivers, for ctypes.
#include <thread>

#include "../csrc/linear.h"
#include "../csrc/tiles.h"

using namespace sten;

static void run_tasks(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(body, context, i, i + 1);
  for (std::thread& t : threads) t.join();
}

// What these drivers take from the other kernels.
static Kernels kernels_of_test() {
  Kernels k{};
  k.width = 16;
  k.rows_at_once = 4;
  k.activate = [](int, float*, int64_t) {};
  return k;
}

extern "C" {

int64_t products() { return tiles::products; }    // of tiles, since the program began

void nm_linear(const bf16* x, const bf16* bias, bf16* y, int64_t tokens, int64_t in, int64_t out, int threads,
               const bf16* values, const uint8_t* index, int64_t groups, int64_t row_bytes, int n, int m, int bits) {
  const BitmapOf<bf16> w{values, index, out, groups, row_bytes, n, m, bits};
  bitmap_linear<bf16>({x, bias, y, tokens, in, out}, w, *bf16_dots_amx(), kernels_of_test(), {threads, run_tasks});
}

// single entries by the bits of their pattern, a word for each 32 columns of a row
void csr_bits_linear(const bf16* x, const bf16* bias, bf16* y, int64_t tokens, int64_t in, int64_t out, int threads,
                     const bf16* values, const int32_t* crow, const uint8_t* bits) {
  const BandsOf<bf16> w{values, crow, nullptr, out, in, 1, 1, 0};
  bits_linear<bf16>({x, bias, y, tokens, in, out}, w, bits, *bf16_dots_amx(), kernels_of_test(), {threads, run_tasks});
}

void band_linear(const bf16* x, const bf16* bias, bf16* y, int64_t tokens, int64_t in, int64_t out, int threads,
                 const bf16* values, const int32_t* crow, const int32_t* col, int64_t columns, int64_t height,
                 int64_t width, int64_t count) {
  const BandsOf<bf16> w{values, crow, col, out, columns, height, width, count};
  bands_linear<bf16>({x, bias, y, tokens, in, out}, w, *bf16_dots_amx(), kernels_of_test(), {threads, run_tasks});
}
}
