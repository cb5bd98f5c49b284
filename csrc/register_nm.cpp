// The operators of NM: n of every m columns of a row, by a bitmap or packed positions (docs/formats.md).
//
//   nm_linear    y = x W^T + bias: up to `few_tokens` from the stored format, else by a dense copy and torch
//   nm_expand    the dense matrix
//   nm_collect   the values of a dense matrix at the pattern
//
// float32, and 16-bit types where the processor expands and multiplies them, else by float32.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "register.h"

namespace sten {
namespace {

// The pattern, checked: any numbers in it are safe, since a unit's bits choose among the values behind its first.
template <typename E>
BitmapOf<E> make_bitmap(const char* op, const E* values, const Tensor& index, int64_t n, int64_t m, int64_t in) {
  TORCH_CHECK(1 <= n && n <= m && m <= 256, op, ": Expected 1 <= n <= m <= 256, got n, m = ", text({n, m}));
  check(index, op, "index", index.dim(), at::kByte);
  const int64_t width = m <= 4 ? 2 : m <= 16 ? 4 : 8, groups = ceil_div(in, m);
  const bool bitmap = (m == 8 || m == 16 || m == 32) && n * width >= m;
  const int64_t rows = index.dim() ? index.size(0) : 0;
  std::vector<int64_t> size{rows, bitmap ? groups : ceil_div(groups * n * width, 8)};
  if (bitmap) size.push_back(m / 8);
  TORCH_CHECK(index.sizes() == at::IntArrayRef(size), op, ": Expected index ", text(size), " for ", text(n), ":",
              text(m), " of ", text(in), " columns, got ", text(index.sizes()));
  return {values, index.const_data_ptr<uint8_t>(), rows, groups, bitmap ? groups * m / 8 : size[1], static_cast<int>(n),
          static_cast<int>(m), bitmap ? 1 : static_cast<int>(width)};
}

template <typename E>
BitmapOf<E> make_weight(const char* op, const Tensor& values, const Tensor& index, int64_t n, int64_t m, int64_t in) {
  check(values, op, "values", 2, values.scalar_type());
  const BitmapOf<E> w = make_bitmap<E>(op, data_of<E>(values), index, n, m, in);
  TORCH_CHECK(values.sizes() == at::IntArrayRef({w.rows, w.slots()}), op, ": Expected values ",
              text({w.rows, w.slots()}), ", got ", text(values.sizes()));
  return w;
}

void check_dtype(const Tensor& t, const char* op, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat || is_half(t.scalar_type()), op, ": Expected ", name,
              " of dtype Float, BFloat16 or Half, got ", t.scalar_type());
}

Tensor nm_expand_op(const Tensor& values, const Tensor& index, int64_t n, int64_t m, int64_t in) {
  static constexpr const char* op = "sten::nm_expand";
  check_dtype(values, op, "values");
  TORCH_CHECK(in >= 0, op, ": Expected in_features >= 0, got ", text(in));
  const Dots<bf16>* dots = bf16_dots();
  if (is_half(values.scalar_type()) && !dots)
    return nm_expand_op(single(values), index, n, m, in).to(values.scalar_type());
  const Tensor dense = at::empty({values.size(0), in}, values.options());
  if (is_half(values.scalar_type()))
    bitmap_expand(make_weight<bf16>(op, values, index, n, m, in), in, *dots, static_cast<bf16*>(dense.mutable_data_ptr()),
                  make_pool());
  else
    bitmap_expand(make_weight<float>(op, values, index, n, m, in), in, kernels().dots, dense.mutable_data_ptr<float>(),
                  make_pool());
  return dense;
}

Tensor nm_collect_op(const Tensor& dense, const Tensor& index, int64_t n, int64_t m) {
  static constexpr const char* op = "sten::nm_collect";
  check_dtype(dense, op, "dense");
  check(dense, op, "dense", 2, dense.scalar_type());
  const Dots<bf16>* dots = bf16_dots();
  if (is_half(dense.scalar_type()) && !dots) return nm_collect_op(single(dense), index, n, m).to(dense.scalar_type());
  const int64_t rows = dense.size(0), in = dense.size(1);
  const BitmapOf<bf16> half = make_bitmap<bf16>(op, nullptr, index, n, m, in);
  TORCH_CHECK(half.rows == rows, op, ": Expected index of ", text(rows), " rows, got ", text(half.rows));
  const Tensor values = empty_part({rows, half.slots()}, dense.options());
  if (is_half(dense.scalar_type()))
    bitmap_collect(half, in, data_of<bf16>(dense), *dots, static_cast<bf16*>(values.mutable_data_ptr()), make_pool());
  else
    bitmap_collect(make_bitmap<float>(op, nullptr, index, n, m, in), in, data_of<float>(dense), kernels().dots,
                   values.mutable_data_ptr<float>(), make_pool());
  return values;
}

template <typename E>
Tensor few(const char* op, const Tensor& x, const Tensor& values, const Tensor& index, const std::optional<Tensor>& bias,
           int64_t n, int64_t m, int64_t out, int64_t activation, const Dots<E>& dots) {
  Tensor owner, y;
  bitmap_linear(make_problem<E>(op, x, bias, out, owner, y, activation),
                make_weight<E>(op, values, index, n, m, x.size(-1)), dots, kernels(), make_pool());
  return y;
}

Tensor nm_linear_op(const Tensor& x, const Tensor& values, const Tensor& index, const std::optional<Tensor>& bias,
                    int64_t n, int64_t m, int64_t few_tokens, int64_t out, int64_t activation) {
  static constexpr const char* op = "sten::nm_linear";
  check_dtype(values, op, "values");
  check_input(x, op, out, values.scalar_type());
  TORCH_CHECK(values.dim() == 2 && values.size(0) == out, op, ": Expected values of ", text(out), " rows, got ",
              text(values.sizes()));
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  if (tokens > few_tokens) return finish(op, at::linear(x, nm_expand_op(values, index, n, m, x.size(-1)), bias), activation);
  if (x.scalar_type() == at::kFloat) return few(op, x, values, index, bias, n, m, out, activation, kernels().dots);
  const Dots<bf16>* dots = bf16_dots();
  if (x.scalar_type() == at::kBFloat16 && dots) return few(op, x, values, index, bias, n, m, out, activation, *dots);
  return few(op, single(x), single(values), index, single(bias), n, m, out, activation, kernels().dots)
      .to(x.scalar_type());
}

}  // namespace

Tensor finish(const char* op, const Tensor& y, int64_t activation) {
  check_activation(op, activation);
  if (activation == 0 || y.numel() == 0) return y;
  if (y.scalar_type() == at::kHalf) return finish(op, single(y), activation).to(at::kHalf);
  const Epilogue end{static_cast<Activation>(activation), Keep::all, 0.0f, 0, 0};
  const int64_t columns = y.size(-1), rows = y.numel() / columns;
  void* data = y.mutable_data_ptr();
  if (y.scalar_type() == at::kFloat) finish_rows(end, static_cast<float*>(data), rows, columns, kernels(), make_pool());
  else finish_rows(end, static_cast<bf16*>(data), rows, columns, kernels(), make_pool());
  return y;
}

}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def(
      "nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, int n, int m, int few_tokens, "
      "int out_features, *, int activation=0) -> Tensor");
  m.def("nm_expand(Tensor values, Tensor index, int n, int m, int in_features) -> Tensor");
  m.def("nm_collect(Tensor dense, Tensor index, int n, int m) -> Tensor");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) {
  m.impl("nm_linear", &sten::nm_linear_op);
  m.impl("nm_expand", &sten::nm_expand_op);
  m.impl("nm_collect", &sten::nm_collect_op);
}
