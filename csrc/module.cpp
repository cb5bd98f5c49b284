// The Python module sten._C: functions without tensors, and those of register_direct.cpp. The operators are in
// torch.ops.sten (register.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "crc32.h"
#include "linear.h"

namespace sten {
void define_direct(pybind11::module_& m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled CPU kernels of sten.";
  sten::define_direct(m);
  m.def(
      "cpu_features",
      [] {
        std::vector<std::string> names;
        for (const char* name : {"amx", "avx512", "avx2", "portable"})
          if (sten::has_instruction_set(name)) names.emplace_back(name);
        return names;
      },
      "The instruction sets this processor can run, fastest first.");
  m.def(
      "instruction_set", [] { return std::string(sten::kernels().name); }, "The instruction set the kernels use.");
  m.def(
      "set_instruction_set", [](const std::string& name) { sten::set_instruction_set(name.c_str()); },
      pybind11::arg("name"), "Use amx, avx512, avx2 or portable from now on; auto is the fastest one.");
  m.def(
      "bfloat16", [] { return sten::bf16_dots() != nullptr; }, "Whether the instruction set in use multiplies bfloat16.");
  m.def(
      "patterns",
      [](int n, int m) {
        if (n < 1 || n > m || m > 32)
          throw std::invalid_argument("Expected 1 <= n <= m <= 32, got n = " + std::to_string(n) +
                                      ", m = " + std::to_string(m));
        const std::vector<int32_t>& flat = sten::patterns(n, m).rows;
        std::vector<std::vector<int>> rows;
        for (size_t i = 0; i < flat.size(); i += n) rows.emplace_back(flat.begin() + i, flat.begin() + i + n);
        return rows;
      },
      pybind11::arg("n"), pybind11::arg("m"), "GroupedNM's patterns in the order the kernels assume.");
  m.def("has_crc32", &sten::has_crc32, "Whether crc32 runs on this processor.");
  m.def(
      "crc32",
      [](const pybind11::buffer& data, uint32_t value) {
        if (!sten::has_crc32()) throw std::runtime_error("Expected a processor with PCLMULQDQ; use zlib.crc32.");
        const pybind11::buffer_info bytes = data.request();
        if (bytes.ndim != 1 || bytes.itemsize != 1 || bytes.strides[0] != 1)
          throw std::invalid_argument("Expected contiguous bytes, got another buffer.");
        const pybind11::gil_scoped_release released;
        return sten::crc32(static_cast<const unsigned char*>(bytes.ptr), bytes.size, value);
      },
      pybind11::arg("data"), pybind11::arg("value") = 0, "zlib.crc32, by carry-less multiplication.");
}
