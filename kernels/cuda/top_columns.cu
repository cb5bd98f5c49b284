// x (rows, C) -> values and out (rows, K): the entries of the K largest magnitudes of each row, and their columns, ascending.
// A CTA a row.
//
// Keys are the bits of the magnitude plus one, 0 for NaN; of equal keys the first columns are taken. The K-th largest of the
// threads' own maxima is a lower bound of the K-th largest key, which few entries reach: these candidates are compared with
// each other. Where there are more than MOST of them (many equal keys, a large K), the K-th largest key is found by bisection,
// and the columns are written as they are counted.
//
// Macros: WARPS; SIZE, bytes of an entry (2, 4); INF, the bits of infinity; VECTOR, entries of a load, of which a row has a
// multiple; RELU, whether negative entries count as 0. K <= C.
#include "common.cuh"

constexpr int THREADS = WARPS * 32, MOST = 1024;
#if SIZE == 4
typedef u32 Bits;
#else
typedef u16 Bits;
#endif
struct alignas(VECTOR * SIZE) Entries { Bits bits[VECTOR]; };

constexpr u32 MAGNITUDE = SIZE == 4 ? 0x7fffffff : 0x7fff;

// An entry as it is stored: of a negative one, with RELU, the bits of 0.
__device__ __forceinline__ Bits stored(Bits bits) {
  const u32 magnitude = bits & MAGNITUDE;
  return RELU && bits > magnitude && magnitude <= INF ? 0 : bits;
}

__device__ __forceinline__ int key(const Entries& entries, int i) {
  const u32 magnitude = stored(entries.bits[i]) & MAGNITUDE;
  return magnitude > INF ? 0 : (int)magnitude + 1;
}

// The sum of ``mine`` over the threads before this one; ``sums`` has that of all threads up to each.
__device__ __forceinline__ int sum_before(int mine, int* sums) {
  __syncthreads();
  sums[threadIdx.x] = mine;
  for (int distance = 1; distance < THREADS; distance *= 2) {
    __syncthreads();
    const int more = threadIdx.x >= distance ? sums[threadIdx.x - distance] : 0;
    __syncthreads();
    sums[threadIdx.x] += more;
  }
  __syncthreads();
  return sums[threadIdx.x] - mine;
}

extern "C" __global__ void __launch_bounds__(THREADS) top_columns(const void* x, Bits* values, int* out, int C, int K) {
  extern __shared__ __align__(16) char memory[];
  wait_for_kernel_before();
  let_next_kernel_start();
  const Entries* row = (const Entries*)((const char*)x + (size_t)blockIdx.x * C * SIZE);
  const int thread = threadIdx.x, loads = C / VECTOR;
  int *sums = (int*)memory, *keys = sums + THREADS, *columns = keys + MOST, *kept = columns + MOST, *number = kept + MOST;
  values += (size_t)blockIdx.x * K, out += (size_t)blockIdx.x * K;
  auto write = [&](int place, int column) { out[place] = column, values[place] = stored(((const Bits*)row)[column]); };

  int highest = -1;
#pragma unroll 4
  for (int at = thread; at < loads; at += THREADS) {
    const Entries entries = row[at];
    for (int i = 0; i < VECTOR; i++) highest = max(highest, key(entries, i));
  }
  sums[thread] = highest;
  if (thread < 2) number[thread] = 0;
  __syncthreads();
  int rank = 0, most = -1;
  for (int other = 0; other < THREADS; other++) {
    const int theirs = sums[other];
    rank += theirs > highest || (theirs == highest && other < thread);
    most = max(most, theirs);
  }
  if (rank == K - 1) number[1] = max(highest, 0);
  __syncthreads();
  const int bound = number[1];  // 0, which all keys reach, if K threads have no entry each
  bool room = true;
#pragma unroll 4
  for (int at = thread; at < loads && room; at += THREADS) {
    const Entries entries = row[at];
    for (int i = 0; i < VECTOR; i++) {
      const int k = key(entries, i);
      if (k < bound || !room) continue;
      const int slot = atomicAdd(number, 1);
      room = slot < MOST;
      if (room) keys[slot] = k, columns[slot] = at * VECTOR + i;
    }
  }
  __syncthreads();
  const int candidates = number[0];
  if (candidates <= MOST) {
    for (int at = thread; at < candidates; at += THREADS) {
      int before = 0;
      for (int i = 0; i < candidates; i++) before += keys[i] > keys[at] || (keys[i] == keys[at] && columns[i] < columns[at]);
      if (before < K) kept[before] = columns[at];
    }
    __syncthreads();
    for (int at = thread; at < K; at += THREADS) {
      int place = 0;
      for (int i = 0; i < K; i++) place += kept[i] < kept[at];
      write(place, kept[at]);
    }
    return;
  }
  int low = bound, high = most + 1;  // at least K keys are ``low`` or more, and fewer ``high`` or more
  int above = 0;                     // which are ``high`` or more
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    __syncthreads();
    if (thread == 0) number[0] = 0;
    __syncthreads();
    int enough = 0;
    for (int at = thread; at < loads; at += THREADS) {
      const Entries entries = row[at];
      for (int i = 0; i < VECTOR; i++) enough += key(entries, i) >= middle;
    }
    atomicAdd(number, enough);
    __syncthreads();
    if (number[0] >= K) low = middle;
    else high = middle, above = number[0];
  }
  int ties = K - above, written = 0;  // which are still to be taken, and written before these loads
  for (int first = 0; first < loads; first += THREADS) {
    const bool there = first + thread < loads;
    const Entries entries = row[there ? first + thread : 0];
    int equal = 0, keep = 0;
    for (int i = 0; i < VECTOR && there; i++) equal += key(entries, i) == low;
    const int tie = sum_before(equal, sums), all = sums[THREADS - 1];
    auto taken = [&](int i, int& t) { return key(entries, i) > low || (key(entries, i) == low && t++ < ties); };
    for (int i = 0, t = tie; i < VECTOR && there; i++) keep += taken(i, t);
    int place = written + sum_before(keep, sums);
    written += sums[THREADS - 1];
    for (int i = 0, t = tie; i < VECTOR && there; i++)
      if (taken(i, t)) write(place++, (first + thread) * VECTOR + i);
    ties = max(ties - all, 0);
  }
}
