// The operators' schemas and argument checks; only register*.cpp use torch. Dtypes and sizes are checked at every call,
// the contents of crow, col and index unless the caller says that it has had this version of them checked (`trusted`).
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "register.h"

namespace sten {

std::string text(int64_t number) { return std::to_string(number); }

std::string text(at::IntArrayRef sizes) {
  std::string all = "(";
  for (size_t i = 0; i < sizes.size(); ++i) all += (i ? ", " : "") + std::to_string(sizes[i]);
  return all + ")";
}

void check(const Tensor& t, const char* op, const char* name, int64_t dim, at::ScalarType dtype) {
  TORCH_CHECK(t.device().is_cpu(), op, ": Expected ", name, " on the CPU, got ", t.device().str());
  TORCH_CHECK(t.scalar_type() == dtype, op, ": Expected ", name, " of dtype ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK(t.dim() == dim, op, ": Expected ", name, " with ", text(dim), " dimension(s), got ", text(t.dim()));
  TORCH_CHECK(t.is_contiguous(), op, ": Expected a contiguous ", name, ", got strides ", text(t.strides()),
              "; call .contiguous() on it");
}

void check_input(const Tensor& x, const char* op, int64_t out, at::ScalarType dtype) {
  TORCH_CHECK(x.device().is_cpu(), op, ": Expected x on the CPU, got ", x.device().str());
  TORCH_CHECK(x.scalar_type() == dtype, op, ": Expected x of dtype ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK(x.dim() >= 1, op, ": Expected x with at least one dimension, got a scalar");
  TORCH_CHECK(out >= 0, op, ": Expected out_features >= 0, got ", text(out));
}

Tensor empty_part(at::IntArrayRef size, const at::TensorOptions& options) {
  const Tensor t = at::empty(size, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (begin + t.nbytes()) / kHuge * kHuge;
  if (t.nbytes() >= 2 * kHuge) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);    // or not
#endif
  return t;
}

// C(m, n), or limit + 1 when it is larger than limit
int64_t count_patterns(int64_t m, int64_t n, int64_t limit) {
  int64_t c = 1;
  n = std::min(n, m - n);
  for (int64_t i = 1; i <= n; ++i) {
    c = c * (m - n + i) / i;
    if (c > limit) return limit + 1;
  }
  return c;
}

namespace {

Tensor csr_linear_op(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                     const std::optional<Tensor>& bias, int64_t out, int64_t activation, bool trusted) {
  static constexpr const char* op = "sten::csr_linear";
  check_input(x, op, out);
  check(values, op, "values", 1, at::kFloat);
  check(crow, op, "crow", 1, at::kInt);
  check(col, op, "col", 1, at::kInt);
  TORCH_CHECK(crow.size(0) == out + 1, op, ": Expected crow of out_features + 1 = ", text(out + 1), " entries, got ",
              text(crow.size(0)));
  TORCH_CHECK(values.size(0) == col.size(0), op, ": Expected values and col of equal size, got ",
              text(values.size(0)), " and ", text(col.size(0)));
  const Csr w{values.const_data_ptr<float>(), crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  TORCH_CHECK(w.crow[0] == 0 && w.crow[out] >= 0 && w.crow[out] <= col.size(0), op,
              ": Expected crow from 0 to at most ", text(col.size(0)), ", got ", text(w.crow[0]), " to ",
              text(w.crow[out]));
  Tensor owner, y;
  const Problem p = make_problem(op, x, bias, out, owner, y, activation);
  TORCH_CHECK_VALUE(trusted || csr_in_bounds(w, out, col.size(0), p.in, make_pool()), op,
                    ": Expected crow that never falls and columns below ", text(p.in),
                    " that ascend within a row, got others; make the parts with pack.");
  csr_linear(p, w, kernels(), make_pool());
  return y;
}

// What sten.load asks of a pattern, in one pass over it.
bool compressed_in_bounds_op(const Tensor& crow, const Tensor& col, int64_t columns) {
  static constexpr const char* op = "sten::compressed_in_bounds";
  check(crow, op, "crow", 1, at::kInt);
  check(col, op, "col", 1, at::kInt);
  if (crow.size(0) == 0) return false;
  const Csr w{nullptr, crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
  return csr_in_bounds(w, crow.size(0) - 1, col.size(0), columns, make_pool());
}

// The pattern of a weight (out, in), checked, without values, whose shape `full` receives.
Grouped grouped_pattern(const char* op, const Tensor& index, int64_t n, int64_t m, int64_t g, int64_t out, int64_t in,
                        bool trusted, std::vector<int64_t>& full) {
  constexpr int64_t kMostColumns = 32767;    // an int16 offset reaches every column of a chunk
  check(index, op, "index", 4, at::kShort);
  TORCH_CHECK(1 <= n && n <= m && m <= kMostColumns && 1 <= g && g <= kMostColumns, op,
              ": Expected 1 <= n <= m and g >= 1, got n, m, g = ", text({n, m, g}));
  const int64_t count = count_patterns(m, n, kMostColumns);
  TORCH_CHECK(count * g <= kMostColumns, op, ": Expected C(m, n) * g <= ", text(kMostColumns), ", got n, m, g = ",
              text({n, m, g}));
  const int64_t chunks = ceil_div(in, count * g), strips = ceil_div(out, m);
  const std::vector<int64_t> slots{chunks, strips, count, g};
  full = {chunks, strips, count, g, n};
  TORCH_CHECK(index.sizes() == at::IntArrayRef(slots), op, ": Expected index (chunks, strips, patterns, g) = ",
              text(slots), " for a weight ", text({out, in}), ", got ", text(index.sizes()));
  const Patterns& order = patterns(static_cast<int>(n), static_cast<int>(m));
  const Grouped w{nullptr, index.const_data_ptr<int16_t>(), order.rows.data(), order.exchanges.data(),
                  static_cast<int>(n), static_cast<int>(m), static_cast<int>(g), count, chunks, strips};
  TORCH_CHECK_VALUE(trusted || grouped_in_bounds(w, make_pool()), op, ": Expected index from 0 to ",
                    text(w.columns() - 1), ", got others; make the parts with pack.");
  return w;
}

}  // namespace

template <typename E>
GroupedOf<E> make_grouped(const char* op, const Tensor& values, const Tensor& index, int64_t n, int64_t m, int64_t g,
                          int64_t out, int64_t in, bool trusted) {
  check(values, op, "values", 5, dtype_of<E>);
  std::vector<int64_t> full;
  const Grouped w = grouped_pattern(op, index, n, m, g, out, in, trusted, full);
  TORCH_CHECK(values.sizes() == at::IntArrayRef(full), op, ": Expected values (chunks, strips, patterns, g, n) = ",
              text(full), " for a weight ", text({out, in}), ", got ", text(values.sizes()));
  return {data_of<E>(values), w.index, w.rows, w.exchanges, w.n, w.m, w.g, w.patterns, w.chunks, w.strips};
}

template Grouped make_grouped<float>(const char*, const Tensor&, const Tensor&, int64_t, int64_t, int64_t, int64_t,
                                     int64_t, bool);

namespace {

Tensor grouped_nm_linear_op(const Tensor& x, const Tensor& values, const Tensor& index,
                            const std::optional<Tensor>& bias, int64_t n, int64_t m, int64_t g, int64_t out,
                            int64_t activation, bool trusted) {
  static constexpr const char* op = "sten::grouped_nm_linear";
  const bool half = x.scalar_type() == at::kBFloat16;
  const Dots<bf16>* dots = bf16_dots();
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  if (half && (!dots || n > kPairRows || tokens == 1))    // one token: float32 selects activations by permutation
    return grouped_nm_linear_op(single(x), single(values), index, single(bias), n, m, g, out, activation, trusted)
        .to(at::kBFloat16);
  check_input(x, op, out, half ? at::kBFloat16 : at::kFloat);
  const auto product = [&]<typename E>(const Dots<E>& kernels_of) {
    const GroupedOf<E> w = make_grouped<E>(op, values, index, n, m, g, out, x.size(-1), trusted);
    Tensor owner, y;
    grouped_linear(make_problem<E>(op, x, bias, out, owner, y, activation), w, kernels_of.panels, kernels(), make_pool());
    return y;
  };
  return half ? product(*dots) : product(kernels().dots);
}

Tensor grouped_nm_grad_input_op(const Tensor& grad, const Tensor& values, const Tensor& index, int64_t n, int64_t m,
                                int64_t g, int64_t in, bool trusted) {
  static constexpr const char* op = "sten::grouped_nm_grad_input";
  check_input(grad, op, in);
  const Grouped w = make_grouped(op, values, index, n, m, g, grad.size(-1), in, trusted);
  Tensor owner, y;
  grouped_grad_input(make_problem(op, grad, std::nullopt, in, owner, y), w, kernels(), make_pool());
  return y;
}

Tensor grouped_nm_grad_values_op(const Tensor& grad, const Tensor& x, const Tensor& index, int64_t n, int64_t m,
                                 int64_t g, bool trusted) {
  static constexpr const char* op = "sten::grouped_nm_grad_values";
  check_input(grad, op, 0);
  check_input(x, op, 0);
  TORCH_CHECK(grad.sizes().slice(0, grad.dim() - 1) == x.sizes().slice(0, x.dim() - 1), op,
              ": Expected grad and x with the same leading dimensions, got ", text(grad.sizes()), " and ",
              text(x.sizes()));
  std::vector<int64_t> full;
  const int64_t rows = grad.size(-1), in = x.size(-1);
  const Grouped w = grouped_pattern(op, index, n, m, g, rows, in, trusted, full);
  const Tensor left = grad.contiguous(), right = x.contiguous(), out = at::zeros(full, x.options());
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  grouped_grad_values(left.const_data_ptr<float>(), right.const_data_ptr<float>(), tokens, rows, in, w,
                      out.mutable_data_ptr<float>(), kernels(), make_pool());
  return out;
}

}  // namespace
}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def(
      "csr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, int out_features, *, "
      "int activation=0, bool trusted=False) -> Tensor");
  m.def(
      "grouped_nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, int n, int m, int g, "
      "int out_features, *, int activation=0, bool trusted=False) -> Tensor");
  m.def(
      "grouped_nm_grad_input(Tensor grad, Tensor values, Tensor index, int n, int m, int g, int in_features, *, "
      "bool trusted=False) -> Tensor");
  m.def(
      "grouped_nm_grad_values(Tensor grad, Tensor x, Tensor index, int n, int m, int g, *, bool trusted=False) -> "
      "Tensor");
  m.def("compressed_in_bounds(Tensor crow, Tensor col, int columns) -> bool");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) {
  m.impl("csr_linear", &sten::csr_linear_op);
  m.impl("grouped_nm_linear", &sten::grouped_nm_linear_op);
  m.impl("grouped_nm_grad_input", &sten::grouped_nm_grad_input_op);
  m.impl("grouped_nm_grad_values", &sten::grouped_nm_grad_values_op);
  m.impl("compressed_in_bounds", &sten::compressed_in_bounds_op);
}
