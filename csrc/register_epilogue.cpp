// The operators of epilogues: see epilogue.h.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "register.h"

namespace sten {
namespace {

Epilogue make_epilogue(const char* op, int64_t activation, int64_t keep, double edge, int64_t count, int64_t block,
                       int64_t columns) {
  check_activation(op, activation);
  TORCH_CHECK(0 <= keep && keep < static_cast<int64_t>(Keep::kinds), op, ": Expected the number of a rule, got ",
              text(keep));
  const Epilogue e{static_cast<Activation>(activation), static_cast<Keep>(keep), static_cast<float>(edge), count, block};
  TORCH_CHECK(columns <= INT32_MAX, op, ": Expected fewer than 2**31 columns, got ", text(columns));
  if (e.keep == Keep::row)
    TORCH_CHECK(1 <= count && count <= columns, op, ": Expected a count from 1 to the ", text(columns),
                " columns, got ", text(count));
  if (e.keep == Keep::blocks)
    TORCH_CHECK(1 <= count && count <= block && columns % block == 0, op, ": Expected 1 <= count <= block and whole "
                "blocks of the ", text(columns), " columns, got ", text({count, block}));
  return e;
}

void expect_rows(const char* op, const Tensor& y) {
  TORCH_CHECK(y.dim() >= 1, op, ": Expected rows, got a scalar");
  TORCH_CHECK(y.scalar_type() == at::kFloat || y.scalar_type() == at::kBFloat16, op,
              ": Expected Float or BFloat16, got ", y.scalar_type());
  check(y, op, "tensor", y.dim(), y.scalar_type());
}

template <typename F>
void by_dtype(const Tensor& t, F&& run) {
  if (t.scalar_type() == at::kFloat) run(float{});
  else run(bf16{});
}

void epilogue_op(Tensor& y, int64_t activation, int64_t keep, double edge, int64_t count, int64_t block) {
  static constexpr const char* op = "sten::epilogue_";
  expect_rows(op, y);
  const int64_t columns = y.size(-1);
  const Epilogue e = make_epilogue(op, activation, keep, edge, count, block, columns);
  TORCH_CHECK(e.keep != Keep::random, op, ": Expected a rule without random numbers, got ", text(keep));
  if (y.numel() == 0) return;
  by_dtype(y, [&](auto zero) {
    using E = decltype(zero);
    finish_rows(e, static_cast<E*>(y.mutable_data_ptr()), y.numel() / columns, columns, kernels(), make_pool());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compress_op(const Tensor& x, int64_t activation, int64_t keep, double edge,
                                                       int64_t count, int64_t block,
                                                       const std::optional<Tensor>& uniform, bool before) {
  static constexpr const char* op = "sten::compress";
  expect_rows(op, x);
  TORCH_CHECK(x.dim() == 2, op, ": Expected a matrix, got shape ", text(x.sizes()));
  const int64_t rows = x.size(0), columns = x.size(1);
  const Epilogue e = make_epilogue(op, activation, keep, edge, count, block, columns);
  TORCH_CHECK(uniform.has_value() == (e.keep == Keep::random), op, ": Expected uniform numbers for a random rule only");
  if (uniform) {
    check(*uniform, op, "uniform", 2, at::kFloat);
    TORCH_CHECK(uniform->sizes() == x.sizes(), op, ": Expected uniform of shape ", text(x.sizes()), ", got ",
                text(uniform->sizes()));
  }
  const auto index = x.options().dtype(at::kInt);
  const Tensor y = e.activation == Activation::none ? x : at::empty_like(x), crow = at::empty({rows + 1}, index);
  const float* u = uniform ? uniform->const_data_ptr<float>() : nullptr;
  Tensor values, col, z;
  by_dtype(x, [&](auto zero) {
    using E = decltype(zero);
    const E* from = data_of<E>(x);
    E* to = const_cast<E*>(data_of<E>(y));    // not written where it is x
    TORCH_CHECK(count_kept(e, from, u, rows, columns, to, crow.mutable_data_ptr<int32_t>(), kernels(), make_pool()), op,
                ": Expected fewer than 2**31 entries, got more");
    const int32_t* first = crow.const_data_ptr<int32_t>();
    const int64_t all = first[rows];
    values = at::empty({all}, x.options());
    col = at::empty({all}, index);
    z = at::empty({before ? all : 0}, x.options());
    store_kept(e, from, to, u, rows, columns, first, static_cast<E*>(values.mutable_data_ptr()),
               col.mutable_data_ptr<int32_t>(), before ? static_cast<E*>(z.mutable_data_ptr()) : nullptr, kernels(),
               make_pool());
  });
  return {values, crow, col, z};
}

}  // namespace
}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def("epilogue_(Tensor(a!) y, int activation, int keep, float edge, int count, int block) -> ()");
  m.def(
      "compress(Tensor x, int activation, int keep, float edge, int count, int block, Tensor? uniform, bool before) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) {
  m.impl("epilogue_", &sten::epilogue_op);
  m.impl("compress", &sten::compress_op);
}
