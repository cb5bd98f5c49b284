// y = x W^T + b for a weight stored as one bit an entry and the non-zeros, row by row.
//   T tokens, R outputs, C inputs, B = ceil(C / 8) bytes of mask a row
// A row is decoded once into (column, value) pairs and then serves every token.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>

#include <vector>

namespace {

at::Tensor bitmask_linear(const at::Tensor& x_in, const at::Tensor& values, const at::Tensor& bits,
                          const at::Tensor& start, const std::optional<at::Tensor>& bias, int64_t C) {
  const int64_t R = bits.size(0), B = bits.size(1);
  TORCH_CHECK(x_in.scalar_type() == at::kFloat && values.scalar_type() == at::kFloat, "bitmask_linear is float32");
  TORCH_CHECK(bits.scalar_type() == at::kByte && start.scalar_type() == at::kLong, "bits are uint8, start is int64");
  TORCH_CHECK(x_in.dim() > 0 && x_in.size(-1) == C && B == (C + 7) / 8 && start.numel() == R + 1, "sizes do not fit");
  TORCH_CHECK(bits.is_contiguous() && values.is_contiguous() && start.is_contiguous(), "parts must be contiguous");
  const at::Tensor x = x_in.contiguous();
  const int64_t T = C ? x.numel() / C : 0;
  auto shape = x.sizes().vec();
  shape.back() = R;
  at::Tensor y = at::empty(shape, x.options());
  const at::Tensor b = bias ? bias->to(at::kFloat).contiguous() : at::zeros({R}, x.options());
  TORCH_CHECK(b.numel() == R, "the bias has ", b.numel(), " entries for ", R, " outputs");
  const float *px = x.const_data_ptr<float>(), *pv = values.const_data_ptr<float>(), *pb = b.const_data_ptr<float>();
  const uint8_t* pm = bits.const_data_ptr<uint8_t>();
  const int64_t* ps = start.const_data_ptr<int64_t>();
  float* py = y.mutable_data_ptr<float>();
  at::parallel_for(0, R, 16, [&](int64_t first, int64_t last) {
    std::vector<int32_t> column;
    for (int64_t r = first; r < last; ++r) {
      column.clear();
      for (int64_t byte = 0; byte < B; ++byte)
        for (unsigned m = pm[r * B + byte]; m; m &= m - 1) column.push_back(int32_t(8 * byte + __builtin_ctz(m)));
      const float* v = pv + ps[r];
      for (int64_t t = 0; t < T; ++t) {
        float sum = pb[r];
        for (size_t i = 0; i < column.size(); ++i) sum += v[i] * px[t * C + column[i]];
        py[t * R + r] = sum;
      }
    }
  });
  return y;
}

TORCH_LIBRARY(sten_bitmask, m) {
  m.def("linear(Tensor x, Tensor values, Tensor bits, Tensor start, Tensor? bias, int columns) -> Tensor");
}
TORCH_LIBRARY_IMPL(sten_bitmask, CPU, m) { m.impl("linear", bitmask_linear); }

}  // namespace

PyMODINIT_FUNC PyInit__C() {  // importing the module loads the library, and with it the operator
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
