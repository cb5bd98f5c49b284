// What a kernel of kernels/cuda needs in order to run on a CPU: a thread for each of CUDA's, one CTA after the other.
// Asynchronous copies are done at once or, if ``late``, when they are waited for: a kernel is right with both.
#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __shared__
#define __align__(bytes)
#define __forceinline__ inline
#define __launch_bounds__(...)
using std::max, std::min;
static int atomicAdd(int* to, int more) { return __atomic_fetch_add(to, more, __ATOMIC_RELAXED); }

struct Index { unsigned x; };
static thread_local Index threadIdx;
static Index blockIdx, gridDim;
alignas(16) char memory[1 << 18];
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static std::unique_ptr<std::barrier<>> cta;
static void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
static void __syncthreads() { cta->arrive_and_wait(); }

static void wait_for_kernel_before() {}
static void let_next_kernel_start() {}
static unsigned place_of(const char* shared) { return shared - memory; }
static unsigned kept(unsigned number) { return number; }
static unsigned short half_at(unsigned place) { unsigned short r; return std::memcpy(&r, memory + place, 2), r; }
static unsigned word_at(unsigned place) { unsigned r; return std::memcpy(&r, memory + place, 4), r; }
struct Loaded {
  const void* from;
  template <class Piece> operator Piece() const { Piece r; return std::memcpy(&r, from, sizeof r), r; }
};
static Loaded load_once(const void* from) { return {from}; }
static void fetch_early(const void*) {}
static unsigned ones_below(unsigned bit) { return bit > 31 ? ~0u : (1u << bit) - 1; }
struct Words {
  unsigned place;
  template <class Pair> operator Pair() const { Pair r; return std::memcpy(&r, memory + place, sizeof r), r; }
};
static Words pair_at(unsigned place) { return {place}; }
static void add_product_if(unsigned condition, float& sum, float a, float b) { sum = condition ? std::fma(a, b, sum) : sum; }
static unsigned moved(unsigned low, unsigned high, unsigned bits) { return ((unsigned long)high << 32 | low) >> min(bits, 32u); }
static unsigned moved_up(unsigned low, unsigned high, unsigned bits) { return (((unsigned long)high << 32 | low) << min(bits, 32u)) >> 32; }
static unsigned permuted(unsigned low, unsigned high, unsigned bytes) {
  unsigned long both = (unsigned long)high << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (both >> 8 * (bytes >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
struct Copy { char* to; const char* from; int bytes, zeros; };
extern "C" { int late = 0; }
static thread_local std::vector<std::vector<Copy>> groups(1);  // the last one is open
static void done(const Copy& c) { std::memset(c.to, 0, c.zeros), std::memcpy(c.to, c.from, c.bytes); }
static void copied(Copy c) { late ? groups.back().push_back(c) : done(c); }
static unsigned bits_below(unsigned bits, unsigned count) { return count > 31 ? bits : bits & (1u << count) - 1; }
static unsigned highest_bit(unsigned bits) { return 31 - std::countl_zero(bits); }
static void copy_async(char* to, const char* from) { copied({to, from, 16, 16}); }
static void copy_async(unsigned to, const char* from) { copied({memory + to, from, 16, 16}); }
static void copy_some_async(char* to, const char* from, int bytes) { copied({to, from, bytes, 16}); }
static unsigned add_byte(unsigned word, int byte, unsigned factor, unsigned to) { return to + (word >> 8 * byte & 255) * factor; }
static unsigned add_bytes(unsigned a, unsigned b, unsigned to) {
  for (int i = 0; i < 4; i++) to += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return to;
}
static unsigned of_lanes[32][32];
template <class Value, class Take> Value exchanged(Value value, Take take) {  // take(lane) of what the lanes give
  auto& all = of_lanes[threadIdx.x / 32];
  std::memcpy(&all[threadIdx.x % 32], &value, 4);
  __syncwarp();
  const Value taken = take([&](int lane) { Value v; return std::memcpy(&v, &all[lane], 4), v; });
  __syncwarp();
  return taken;
}
template <int WIDTH = 32, class Value> Value from_lane(Value value, int lane) {
  return exchanged(value, [&](auto given) { return given(threadIdx.x % 32 / WIDTH * WIDTH + lane); });
}
template <int WIDTH> unsigned add_lane_before(unsigned value, int by) {
  const int lane = threadIdx.x % WIDTH;
  const unsigned other = from_lane<WIDTH>(value, lane < by ? lane : lane - by);
  return value + (lane < by ? 0 : other);
}
template <int WIDTH> float sum_of_lanes(float value) {
  for (int by = WIDTH / 2; by > 0; by /= 2) value += exchanged(value, [&](auto given) { return given((threadIdx.x ^ by) % 32); });
  return value;
}
static unsigned largest(unsigned value) {
  return exchanged(value, [](auto given) { unsigned most = 0; for (int i = 0; i < 32; i++) most = max(most, given(i)); return most; });
}
static void commit() { groups.emplace_back(); }
#ifdef STAGES
static void wait_for_oldest() {  // of the closed groups all but STAGES - 1
  for (; groups.size() > STAGES; groups.erase(groups.begin())) std::for_each(groups[0].begin(), groups[0].end(), done);
}
#endif
static float as_float(unsigned word) { return std::bit_cast<float>(word); }
#if BF16
static float low(unsigned pair) { return std::bit_cast<float>(pair << 16); }
static unsigned short rounded(float f) { return (std::bit_cast<unsigned>(f) + 0x7fff + (std::bit_cast<unsigned>(f) >> 16 & 1)) >> 16; }
#else
static float low(unsigned pair) { return (float)std::bit_cast<_Float16>((unsigned short)pair); }
static unsigned short rounded(float f) { return std::bit_cast<unsigned short>((_Float16)f); }
#endif
static float high(unsigned pair) { return low(pair >> 16); }

// The fragments as the PTX ISA has them: a[0] is (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8).
static unsigned fragments[32][32][6];
static void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto& all = fragments[warp];
  for (int i = 0; i < 4; i++) all[lane][i] = a[i];
  all[lane][4] = b0, all[lane][5] = b1;
  __syncwarp();
  auto half = [](unsigned pair, int k) { return k % 2 ? high(pair) : low(pair); };
  for (int e = 0; e < 4; e++)
    for (int k = 0; k < 16; k++) {
      const int row = g + e / 2 * 8, column = 2 * t + e % 2, owner = k % 8 / 2;
      const float left = half(all[row % 8 * 4 + owner][row / 8 + k / 8 * 2], k);
      c[e] += left * half(all[column * 4 + owner][4 + k / 8], k);
    }
  __syncwarp();
}

// Positions of 2:4 are two bits each, of four groups of a row in 16 bits; SELECTOR says whose are used, threads 0, 1 or 2, 3.
static unsigned sparse_fragments[32][32][9];
template <int SELECTOR> static void mma_sparse(float* c, const unsigned* a, const unsigned* b, unsigned positions) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto& all = sparse_fragments[warp];
  for (int i = 0; i < 4; i++) all[lane][i] = a[i], all[lane][4 + i] = b[i];
  all[lane][8] = positions;
  __syncwarp();
  auto half = [](unsigned pair, int k) { return k % 2 ? high(pair) : low(pair); };
  for (int e = 0; e < 4; e++)
    for (int slot = 0; slot < 16; slot++) {
      const int row = g + e / 2 * 8, column = 2 * t + e % 2, group = slot / 2, quad = row % 8 * 4;
      const unsigned four = all[quad + 2 * SELECTOR + group / 4][8] >> row / 8 * 16 + group % 4 * 4;
      const int k = 4 * group + (four >> slot % 2 * 2 & 3);
      const float left = half(all[quad + group % 4][row / 8 + group / 4 * 2], slot);
      c[e] += left * half(all[column * 4 + k % 8 / 2][4 + k / 8], k);
    }
  __syncwarp();
}
static const char* addresses[32][32];
static void load_matrices(unsigned* a, const char* at) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  addresses[warp][lane] = at;
  __syncwarp();
  for (int i = 0; i < 4; i++) std::memcpy(a + i, addresses[warp][8 * i + lane / 4] + lane % 4 * 4, 4);
  __syncwarp();
}

// Runs `kernel(arguments...)` on `ctas` CTAs of `threads` threads.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, int ctas, int threads, Arguments... arguments) {
  for (int b = 0; b < ctas; b++) {
    blockIdx.x = b, gridDim.x = ctas;
    cta = std::make_unique<std::barrier<>>(threads);
    warps.clear();
    for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::memset(memory, 0xff, sizeof memory);  // NaN
    std::vector<std::jthread> running;
    for (int t = 0; t < threads; t++) running.emplace_back([=] { threadIdx.x = t; kernel(arguments...); });
  }
}
