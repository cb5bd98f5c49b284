// What a kernel of kernels/cuda needs in order to run on a CPU: a thread for each of CUDA's, one CTA after the other.
// Copies are done at once, so that waits are not tested, but every address and every number is.
#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __shared__
#define __align__(bytes)
#define __forceinline__ inline
#define __launch_bounds__(threads)
using std::min;

struct Index { unsigned x; };
static thread_local Index threadIdx;
static Index blockIdx;
alignas(16) char memory[1 << 18];
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static std::unique_ptr<std::barrier<>> cta;
static void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
static void __syncthreads() { cta->arrive_and_wait(); }

static unsigned highest_bit(unsigned bits) { return 31 - std::countl_zero(bits); }
static void copy_async(char* to, const char* from) { std::memcpy(to, from, 16); }
static void commit() {}
static void wait_for_oldest() {}
#if BF16
static float low(unsigned pair) { return std::bit_cast<float>(pair << 16); }
static unsigned short rounded(float f) { return (std::bit_cast<unsigned>(f) + 0x7fff + (std::bit_cast<unsigned>(f) >> 16 & 1)) >> 16; }
#else
static float low(unsigned pair) { return (float)std::bit_cast<_Float16>((unsigned short)pair); }
static unsigned short rounded(float f) { return std::bit_cast<unsigned short>((_Float16)f); }
#endif
static float high(unsigned pair) { return low(pair >> 16); }

// Runs `kernel(arguments...)` on `ctas` CTAs of `threads` threads.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, int ctas, int threads, Arguments... arguments) {
  for (int b = 0; b < ctas; b++) {
    blockIdx.x = b;
    cta = std::make_unique<std::barrier<>>(threads);
    warps.clear();
    for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::memset(memory, 0xff, sizeof memory);  // NaN
    std::vector<std::jthread> running;
    for (int t = 0; t < threads; t++) running.emplace_back([=] { threadIdx.x = t; kernel(arguments...); });
  }
}
