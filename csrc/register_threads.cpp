// How tasks are spread over torch's threads.
//
// Each thread begins with a range of tasks of its own, and then takes what others have left, so that a thread that the
// system does not run holds up no more than the tasks it has begun. A parallel region also ends with a barrier, at which
// even a thread that has done nothing must arrive: with other processes on the cores that takes a time slice, hundreds
// of times a short call. So where waiting twice in a row took longer than the others' share of the work would have, this
// thread computes alone for a while. Neither changes a result: a task owns its outputs, and the cut into tasks
// depends on the number of threads that torch is set to, not on who runs them.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "register.h"

namespace sten {
namespace {

constexpr int64_t kLoss = 100'000;          // nanoseconds: less is the time to wake a thread
constexpr int64_t kAlone = 16;              // alone for so many times the time that was lost
constexpr int64_t kLongest = 1'000'000'000;
constexpr int64_t kClaims = 8;              // of one thread's range: the tasks that it takes at a time are an eighth

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What a calling thread has seen of its helpers.
struct Crowd {
  int64_t alone_until = 0;
  bool lost_before = false;

  void record(int64_t loss, int64_t time) {
    if (loss <= kLoss) {
      lost_before = false;
      return;
    }
    if (lost_before) alone_until = time + std::min(kAlone * loss, kLongest);
    lost_before = true;
  }
};
thread_local Crowd crowd;

struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end, claim;
};

using Body = void (*)(void* context, int64_t begin, int64_t end);

// All of this thread's share, then what is left of the others'; returns how many tasks it did.
int64_t work_through(std::vector<Share>& shares, int64_t first, Body body, void* context) {
  const int64_t count = static_cast<int64_t>(shares.size());
  int64_t done = 0;
  for (int64_t i = 0; i < count; ++i) {
    Share& share = shares[(first + i) % count];
    for (;;) {
      const int64_t begin = share.next.fetch_add(share.claim, std::memory_order_relaxed);
      if (begin >= share.end) break;
      const int64_t end = std::min(begin + share.claim, share.end);
      body(context, begin, end);
      done += end - begin;
    }
  }
  return done;
}

void run_tasks(int64_t tasks, Body body, void* context) {
  if (now() < crowd.alone_until) return body(context, 0, tasks);
  const int64_t count = std::min<int64_t>(at::get_num_threads(), tasks);
  std::vector<Share> shares(count);
  for (int64_t i = 0; i < count; ++i) {
    const Range range = part(tasks, count, i);
    shares[i].next.store(range.begin, std::memory_order_relaxed);
    shares[i].end = range.end;
    shares[i].claim = std::max<int64_t>(1, (range.end - range.begin) / kClaims);
  }
  int64_t begun = 0, finished = 0, done = 0;    // of the calling thread
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t) {
    if (first != 0) {
      work_through(shares, first, body, context);
      return;
    }
    begun = now();
    done = work_through(shares, first, body, context);
    finished = now();
  });
  if (done == 0) return;
  const int64_t time = now(), helped = (finished - begun) / done * (tasks - done);    // tasks are about equal
  crowd.record(time - finished - helped, time);
}

}  // namespace

Pool make_pool() { return {at::in_parallel_region() ? 1 : at::get_num_threads(), run_tasks}; }

}  // namespace sten
