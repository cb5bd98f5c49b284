// Which instruction set runs: the fastest one the processor has, the one STEN_CPU names, or the one that was set.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sten {
namespace {

const Kernels* supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kernels_avx512();
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
#endif
  return name == "portable" ? kernels_portable() : nullptr;
}

const Kernels* fastest() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* set = supported(name)) return set;
  return kernels_portable();
}

const Kernels* named(const std::string& name) {
  if (name.empty() || name == "auto") return fastest();
  if (const Kernels* set = supported(name)) return set;
  throw std::invalid_argument("Expected an instruction set of this processor (auto, avx512, avx2 or portable), got '" +
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
#if defined(__x86_64__)
  if (kernels_avx512() && &kernels() == kernels_avx512() && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512bf16"))
    return bf16_dots_avx512();
#endif
  return nullptr;
}

void set_instruction_set(const char* name) { current.store(named(name), std::memory_order_relaxed); }

bool has_instruction_set(const char* name) { return supported(name) != nullptr; }

}  // namespace sten
