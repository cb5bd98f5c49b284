// Which instruction set runs: the fastest one the processor has, the one STEN_CPU names, or the one that was set.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sten {
namespace {

// Whether this process may use AMX's tiles. Linux grants them to all threads of a process that asked, if the processor has
// them, and refuses where a thread's alternate signal stack is too small for their 8 KB.
bool tiles_permitted() {
#ifdef STEN_TILES
  return true;    // emulated
#elif defined(__x86_64__) && defined(__linux__)
  static const bool permitted = [] {
    constexpr unsigned kTiles = 1u << 24 | 1u << 22;    // AMX-TILE, AMX-BF16
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return permitted;
#else
  return false;
#endif
}

bool has_bf16() {
#if defined(__x86_64__)
  return kernels_avx512() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Those of AVX-512, whose products of bfloat16 are others.
const Kernels* kernels_amx() {
  static const Kernels kernels = [] {
    Kernels k = *kernels_avx512();
    k.name = "amx";
    return k;
  }();
  return &kernels;
}

const Kernels* supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "amx" && supported("avx512") && has_bf16() && tiles_permitted()) return kernels_amx();
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kernels_avx512();
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
#endif
  return name == "portable" ? kernels_portable() : nullptr;
}

const Kernels* fastest() {
  for (const char* name : {"amx", "avx512", "avx2"})
    if (const Kernels* set = supported(name)) return set;
  return kernels_portable();
}

const Kernels* named(const std::string& name) {
  if (name.empty() || name == "auto") return fastest();
  if (const Kernels* set = supported(name)) return set;
  throw std::invalid_argument("Expected an instruction set of this processor (auto, amx, avx512, avx2 or portable), got '" +
                              name + "'");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_relaxed);
  if (!k) {
    const char* name = std::getenv("STEN_CPU");
    k = named(name ? name : "auto");
    current.store(k, std::memory_order_relaxed);
  }
  return *k;
}

const Dots<bf16>* bf16_dots() {
  const Kernels* k = &kernels();
  if (!has_bf16()) return nullptr;
  return k == kernels_amx() ? bf16_dots_amx() : k == kernels_avx512() ? bf16_dots_avx512() : nullptr;
}

void set_instruction_set(const char* name) { current.store(named(name), std::memory_order_relaxed); }

bool has_instruction_set(const char* name) { return supported(name) != nullptr; }

}  // namespace sten
