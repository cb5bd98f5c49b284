// y = x W^T + bias for the stored formats: the drivers that cut the work into tasks. No torch, no intrinsics.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace sten {

// How tasks are spread over threads; `run` calls body(context, begin, end) for ranges that cover 0 to tasks - 1.
struct Pool {
  int threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);

  template <typename F>
  void each(int64_t tasks, F&& body) const {
    using Body = std::remove_reference_t<F>;
    auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); };
    if (tasks == 1 || threads == 1) return body(static_cast<int64_t>(0), tasks);
    if (tasks > 0) run(tasks, call, const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// Uninitialised memory that begins on a cache line.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T) + 1, kLine))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_) ::operator delete(data_, kLine);
  }
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_ = nullptr;
};

// The grid of tasks: panels of tokens times pieces of rows.
struct Grid {
  int64_t panel_tokens;   // of every panel but the last
  int64_t panels, pieces;
  int64_t tasks() const { return panels * pieces; }
};

Grid make_grid(const Problem& p, const Kernels& k, int threads, int64_t most_pieces);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads worth waking for this many multiply-adds.
inline int useful_threads(int threads, double work) {
  constexpr double kWorkPerThread = 16384.0;
  return static_cast<int>(std::max(1.0, std::min(static_cast<double>(threads), work / kWorkPerThread)));
}

// acc[r, :] = bias[r] for the rows from r0 on, zero where there is none
void fill_panel(const Problem& p, int64_t r0, int64_t rows, int64_t line, float* acc);

void csr_linear(const Problem& p, const Csr& w, const Kernels& k, Pool pool);
void grouped_linear(const Problem& p, const Grouped& w, const Kernels& k, Pool pool);

// All n-subsets of range(m) in revolving-door order, (patterns, n) flattened; made once for each (n, m).
const std::vector<int32_t>& patterns(int n, int m);

}  // namespace sten
