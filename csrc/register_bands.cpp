// The operators of rows that share their columns: VectorNM and FanIn (lists, without crow), BSR (blocks, with crow) and
// the gradients of CSR (single entries, with crow; their values have one dimension).
//
//   band_linear       y = x W^T + bias; bfloat16 is converted where the processor does not multiply it; with a
//                     table of a pattern of single entries, which is not checked, activations are selected by it,
//                     or many tokens multiplied by a dense copy
//   pattern_bits      the table of dense patterns: bit c % 8 of byte c / 8 of a row is column c
//   pattern_windows   the table of sparse ones: groups of entries (WindowsOf)
//   band_grad_input   y = grad W
//   band_grad_values  grad^T x at the stored entries
//
// `height` rows share their columns; `columns` are those of the weight, with its padding.
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "register.h"

namespace sten {

Bands make_bands(const char* op, const float* values, at::IntArrayRef size, const std::optional<Tensor>& crow,
                 const Tensor& col, int64_t height, int64_t columns, int64_t rows, bool trusted) {
  constexpr int64_t kMostColumns = 2147483647;
  TORCH_CHECK(height >= 1 && rows >= 0 && columns >= 0 && columns <= kMostColumns, op,
              ": Expected a height of at least 1 and sizes of 0 to ", text(kMostColumns),
              ", got height, rows, columns = ", text({height, rows, columns}));
  const int64_t bands = ceil_div(rows, height);
  Bands w{values, nullptr, nullptr, rows, columns, height, 1, 0};
  if (crow) {
    check(*crow, op, "crow", 1, at::kInt);
    check(col, op, "col", 1, at::kInt);
    TORCH_CHECK(crow->size(0) == bands + 1, op, ": Expected crow of ", text(bands + 1), " entries, got ",
                text(crow->size(0)));
    const bool single = size.size() == 1 && height == 1;
    TORCH_CHECK(size[0] == col.size(0) && (single || (size.size() == 3 && size[1] == height && size[2] >= 1)), op,
                ": Expected values (", text(col.size(0)), ", ", text(height), ", width), got ", text(size));
    w.width = single ? 1 : size[2];
    TORCH_CHECK(columns % w.width == 0, op, ": Expected columns, with their padding, in blocks of ", text(w.width),
                ", got ", text(columns));
    w.crow = crow->const_data_ptr<int32_t>();
  } else {
    check(col, op, "col", 2, at::kInt);
    w.count = col.size(1);
    TORCH_CHECK(col.size(0) == bands, op, ": Expected col of ", text(bands), " rows, one for ", text(height),
                " rows of values, got ", text(col.size(0)));
    TORCH_CHECK(size == at::IntArrayRef({rows, w.count}), op, ": Expected values ", text({rows, w.count}), ", got ",
                text(size));
  }
  w.col = col.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(trusted || bands_in_bounds(w, col.size(0), make_pool()), op, ": Expected crow that never falls and ",
                    "columns below ", text(columns / w.width), " that ascend within a row, got others; make the parts ",
                    "with pack.");
  return w;
}

template <typename E>
BandsOf<E> make_weight(const char* op, const Tensor& values, const std::optional<Tensor>& crow, const Tensor& col,
                  int64_t height, int64_t columns, int64_t rows, bool trusted) {
  check(values, op, "values", !crow ? 2 : values.dim() == 1 ? 1 : 3, dtype_of<E>);
  const Bands w = make_bands(op, nullptr, values.sizes(), crow, col, height, columns, rows, trusted);
  return {data_of<E>(values), w.crow, w.col, w.rows, w.columns, w.height, w.width, w.count};
}

template Bands make_weight<float>(const char*, const Tensor&, const std::optional<Tensor>&, const Tensor&, int64_t,
                                  int64_t, int64_t, bool);

namespace {

constexpr int64_t kBitTokens = 128;    // the most tokens that bits are read again for

void check_columns(const char* op, int64_t in, int64_t columns) {
  TORCH_CHECK(in <= columns, op, ": Expected at most ", text(columns), " input features, got ", text(in));
}

int64_t bits_row(int64_t columns) { return ceil_div(columns, 32) * 4; }

Tensor pattern_bits_op(const std::optional<Tensor>& crow, const Tensor& col, int64_t columns, int64_t rows) {
  static constexpr const char* op = "sten::pattern_bits";
  const Bands w = make_bands(op, nullptr, col.sizes(), crow, col, 1, columns, rows, false);
  const Tensor bits = at::zeros({rows, bits_row(columns)}, col.options().dtype(at::kByte));
  set_bits(w, static_cast<uint32_t*>(bits.mutable_data_ptr()), make_pool());
  return bits;
}

Tensor pattern_windows_op(const std::optional<Tensor>& crow, const Tensor& col, int64_t columns, int64_t rows) {
  static constexpr const char* op = "sten::pattern_windows";
  const Bands w = make_bands(op, nullptr, col.sizes(), crow, col, 1, columns, rows, false);
  const Tensor counts = at::zeros({rows + 1}, col.options());
  int32_t* first = counts.mutable_data_ptr<int32_t>();
  count_windows(w, first, make_pool());
  for (int64_t r = 0; r < rows; ++r) first[r + 1] += first[r];
  const int64_t groups = first[rows];
  const Tensor table = at::zeros({rows + 1 + groups * (1 + kGroup / 4)}, col.options());
  int32_t* begin = table.mutable_data_ptr<int32_t>();
  std::copy(first, first + rows + 1, begin);
  uint32_t* head = reinterpret_cast<uint32_t*>(begin + rows + 1);
  set_windows(w, first, head, reinterpret_cast<uint8_t*>(head + groups), make_pool());
  return table;
}

Tensor band_linear_op(const Tensor& x, const Tensor& values, const std::optional<Tensor>& crow, const Tensor& col,
                      const std::optional<Tensor>& bias, int64_t height, int64_t columns, int64_t out,
                      const std::optional<Tensor>& table, int64_t activation, bool trusted) {
  static constexpr const char* op = "sten::band_linear";
  const Dots<bf16>* dots = bf16_dots();
  if (x.scalar_type() == at::kBFloat16 && !dots)
    return band_linear_op(single(x), single(values), crow, col, single(bias), height, columns, out, {}, activation, trusted)
        .to(at::kBFloat16);
  check_input(x, op, out, x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat);
  check_columns(op, x.size(-1), columns);
  const auto product = [&]<typename E>(const Dots<E>& kernels_of) {
    const BandsOf<E> w = make_weight<E>(op, values, crow, col, height, columns, out, trusted);
    Tensor owner, y;
    const ProblemOf<E> p = make_problem<E>(op, x, bias, out, owner, y, activation);
    const bool single = w.height == 1 && w.width == 1;
    if (table && table->dim() == 1 && kernels_of.windows) {
      check(*table, op, "table", 1, at::kInt);
      TORCH_CHECK(single && table->size(0) >= out + 1, op, ": Expected a table of single entries, got ",
                  text(table->sizes()), " for ", text({out, columns}));
      windows_linear(p, w, table->const_data_ptr<int32_t>(), kernels_of, kernels(), make_pool());
    } else if (table && table->dim() == 2 && all_finite(p.x, p.tokens * p.in)) {
      check(*table, op, "table", 2, at::kByte);
      TORCH_CHECK(single && table->sizes() == at::IntArrayRef({out, bits_row(columns)}), op, ": Expected a table ",
                  text({out, bits_row(columns)}), " of single entries, got ", text(table->sizes()));
      const uint8_t* bits = table->const_data_ptr<uint8_t>();
      if (p.tokens > kBitTokens) {
        const Tensor dense = at::empty({out, p.in}, values.options());
        bits_expand(w, bits, p.in, kernels_of, static_cast<E*>(dense.mutable_data_ptr()), make_pool());
        return finish(op, at::linear(x, dense, bias), activation);
      }
      bits_linear(p, w, bits, kernels_of, kernels(), make_pool());
    } else {
      bands_linear(p, w, kernels_of, kernels(), make_pool());
    }
    return y;
  };
  return x.scalar_type() == at::kBFloat16 ? product(*dots) : product(kernels().dots);
}

Tensor band_grad_input_op(const Tensor& grad, const Tensor& values, const std::optional<Tensor>& crow,
                          const Tensor& col, int64_t height, int64_t columns, int64_t in, bool trusted) {
  static constexpr const char* op = "sten::band_grad_input";
  check_input(grad, op, in);
  check_columns(op, in, columns);
  const Bands w = make_weight(op, values, crow, col, height, columns, grad.size(-1), trusted);
  Tensor owner, y;
  bands_grad_input(make_problem(op, grad, std::nullopt, in, owner, y), w, kernels(), make_pool());
  return y;
}

Tensor band_grad_values_op(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& crow, const Tensor& col,
                           int64_t height, int64_t width, int64_t columns, bool trusted) {
  static constexpr const char* op = "sten::band_grad_values";
  check_input(grad, op, 0);
  check_input(x, op, 0);
  check_columns(op, x.size(-1), columns);
  TORCH_CHECK(grad.sizes().slice(0, grad.dim() - 1) == x.sizes().slice(0, x.dim() - 1), op,
              ": Expected grad and x with the same leading dimensions, got ", text(grad.sizes()), " and ",
              text(x.sizes()));
  const int64_t rows = grad.size(-1);
  TORCH_CHECK(width >= 0 && col.dim() >= 1, op, ": Expected a width of at least 0 and a list of columns");
  std::vector<int64_t> size{crow ? col.size(0) : rows};
  if (!crow) size.push_back(col.size(-1));
  else if (width > 0) size.insert(size.end(), {height, width});
  const Bands w = make_bands(op, nullptr, size, crow, col, height, columns, rows, trusted);
  const Tensor g = grad.contiguous(), inputs = x.contiguous(), out = at::zeros(size, x.options());
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  bands_grad_values(g.const_data_ptr<float>(), inputs.const_data_ptr<float>(), tokens, x.size(-1), w,
                    out.mutable_data_ptr<float>(), kernels(), make_pool());
  return out;
}

}  // namespace
}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def(
      "band_linear(Tensor x, Tensor values, Tensor? crow, Tensor col, Tensor? bias, int height, int columns, "
      "int out_features, *, Tensor? table=None, int activation=0, bool trusted=False) -> Tensor");
  m.def("pattern_bits(Tensor? crow, Tensor col, int columns, int rows) -> Tensor");
  m.def("pattern_windows(Tensor? crow, Tensor col, int columns, int rows) -> Tensor");
  m.def(
      "band_grad_input(Tensor grad, Tensor values, Tensor? crow, Tensor col, int height, int columns, "
      "int in_features, *, bool trusted=False) -> Tensor");
  m.def(
      "band_grad_values(Tensor grad, Tensor x, Tensor? crow, Tensor col, int height, int width, int columns, *, "
      "bool trusted=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) {
  m.impl("band_linear", &sten::band_linear_op);
  m.impl("pattern_bits", &sten::pattern_bits_op);
  m.impl("pattern_windows", &sten::pattern_windows_op);
  m.impl("band_grad_input", &sten::band_grad_input_op);
  m.impl("band_grad_values", &sten::band_grad_values_op);
}
