// The operators of sparse activations: see codes.cpp. `weight` is input-major, (columns, out_features).
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "register.h"

namespace sten {
namespace {

void check_matrix(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, op, ": Expected ", name,
              " of dtype Float or BFloat16, got ", t.scalar_type());
  check(t, op, name, 2, t.scalar_type());
}


// A band's numbers are single ones of `height` tokens; those of CSR have one dimension.
Bands make_codes(const char* op, const float* values, at::IntArrayRef size, const std::optional<Tensor>& crow,
                 const Tensor& index, int64_t height, int64_t columns, int64_t tokens) {
  const Bands s = make_bands(op, values, size, crow, index, height, columns, tokens, false);
  TORCH_CHECK(s.width == 1, op, ": Expected blocks of width 1, got ", text(s.width));
  const int64_t entries = crow ? index.size(0) * height : tokens * s.count;
  TORCH_CHECK(entries <= INT32_MAX, op, ": Expected fewer than 2**31 entries, got ", text(entries));
  return s;
}

Tensor float_values(const char* op, const Tensor& values, const std::optional<Tensor>& crow, const Tensor& matrix) {
  check(values, op, "values", !crow ? 2 : values.dim() == 1 ? 1 : 3, matrix.scalar_type());
  return values.to(at::kFloat);
}

// run(table, pointer to a tensor of its numbers)
template <typename F>
void by_dtype(const Tensor& matrix, F&& run) {
  if (matrix.scalar_type() == at::kFloat)
    return run(Table<float>{matrix.const_data_ptr<float>(), matrix.size(1)},
               [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); });
  run(Table<bf16>{static_cast<const bf16*>(matrix.const_data_ptr()), matrix.size(1)},
      [](const Tensor& t) { return static_cast<bf16*>(t.data_ptr()); });
}

Tensor codes_linear_op(const Tensor& values, const std::optional<Tensor>& crow, const Tensor& index,
                       const Tensor& weight, const std::optional<Tensor>& bias, int64_t height, int64_t tokens) {
  static constexpr const char* op = "sten::codes_linear";
  check_matrix(op, "weight", weight);
  const Tensor numbers = float_values(op, values, crow, weight);
  const Bands s = make_codes(op, numbers.const_data_ptr<float>(), numbers.sizes(), crow, index, height,
                             weight.size(0), tokens);
  Tensor start;
  if (bias) {
    check(*bias, op, "bias", 1, weight.scalar_type());
    TORCH_CHECK(bias->size(0) == weight.size(1), op, ": Expected a bias of ", text(weight.size(1)), " entries, got ",
                text(bias->size(0)));
    start = bias->to(at::kFloat);
  }
  const Tensor y = at::empty({tokens, weight.size(1)}, weight.options());
  by_dtype(weight, [&](auto table, auto data) {
    codes_linear(s, table, bias ? start.const_data_ptr<float>() : nullptr, data(y), kernels(), make_pool());
  });
  return y;
}

Tensor codes_grad_values_op(const Tensor& grad, const std::optional<Tensor>& crow, const Tensor& index,
                            const Tensor& weight, int64_t height, bool blocks) {
  static constexpr const char* op = "sten::codes_grad_values";
  check_matrix(op, "weight", weight);
  check(grad, op, "grad", 2, weight.scalar_type());
  TORCH_CHECK(grad.size(1) == weight.size(1), op, ": Expected grad of ", text(weight.size(1)), " columns, got ",
              text(grad.size(1)));
  TORCH_CHECK(index.dim() >= 1, op, ": Expected a list of columns, got a scalar");
  std::vector<int64_t> size{crow ? index.size(0) : grad.size(0)};
  if (!crow) size.push_back(index.size(-1));
  else if (blocks) size.insert(size.end(), {height, 1});
  const Bands s = make_codes(op, nullptr, size, crow, index, height, weight.size(0), grad.size(0));
  const Tensor out = at::zeros(size, weight.options().dtype(at::kFloat));
  by_dtype(weight, [&](auto table, auto data) {
    codes_grad_values(s, table, data(grad), out.mutable_data_ptr<float>(), kernels(), make_pool());
  });
  return out.to(weight.scalar_type());
}

Tensor codes_grad_weight_op(const Tensor& values, const std::optional<Tensor>& crow, const Tensor& index,
                            const Tensor& grad, int64_t height, int64_t columns) {
  static constexpr const char* op = "sten::codes_grad_weight";
  check_matrix(op, "grad", grad);
  const Tensor numbers = float_values(op, values, crow, grad);
  const Bands s = make_codes(op, numbers.const_data_ptr<float>(), numbers.sizes(), crow, index, height, columns,
                             grad.size(0));
  const Tensor out = at::empty({columns, grad.size(1)}, grad.options());
  by_dtype(grad, [&](auto table, auto data) {
    codes_grad_weight(s, table, data(out), kernels(), make_pool());
  });
  return out;
}

Tensor codes_topk_op(const Tensor& x, int64_t count) {
  static constexpr const char* op = "sten::codes_topk";
  check_matrix(op, "x", x);
  TORCH_CHECK(1 <= count && count <= x.size(1) && x.size(1) <= INT32_MAX, op, ": Expected a count from 1 to the ",
              text(x.size(1)), " columns of x, got ", text(count));
  const Tensor out = at::empty({x.size(0), count}, x.options().dtype(at::kInt));
  by_dtype(x, [&](auto table, auto) {
    codes_topk(table.data, x.size(0), x.size(1), count, out.mutable_data_ptr<int32_t>(), make_pool());
  });
  return out;
}

}  // namespace
}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def(
      "codes_linear(Tensor values, Tensor? crow, Tensor index, Tensor weight, Tensor? bias, int height, int tokens) "
      "-> Tensor");
  m.def(
      "codes_grad_values(Tensor grad, Tensor? crow, Tensor index, Tensor weight, int height, bool blocks) -> Tensor");
  m.def(
      "codes_grad_weight(Tensor values, Tensor? crow, Tensor index, Tensor grad, int height, int columns) -> Tensor");
  m.def("codes_topk(Tensor x, int count) -> Tensor");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) {
  m.impl("codes_linear", &sten::codes_linear_op);
  m.impl("codes_grad_values", &sten::codes_grad_values_op);
  m.impl("codes_grad_weight", &sten::codes_grad_weight_op);
  m.impl("codes_topk", &sten::codes_topk_op);
}
