// The operators that pack: masks of the highest scores, NM's index, GroupedNM. Whoever calls them converts what they do
// not take, or has a way without them.
//
//   top_mask            the `count` highest scores of a whole weight
//   top_of_groups       the n highest along the last dimension
//   block_sums          the sums over blocks of a matrix, or how many entries of a mask they have; float64
//   compress_masked     the entries of a mask row by row: values, offsets, columns
//   nm_index            the index of a mask, and how many slots a group leaves free at most; -1: one has too many
//   grouped_nm_choose   the mask of a score
//   grouped_nm_index    the index of a mask, and the (chunk, strip) that it leaves to the caller
//   grouped_nm_expand   the dense matrix
//   grouped_nm_collect  the values of a dense matrix at the pattern
#include <torch/library.h>

#include <tuple>

#include "pack.h"
#include "register.h"

namespace sten {
namespace {

// Runs body(T{}) for an unsigned number T as wide as the dtype.
template <typename F>
void by_width(const Tensor& t, const char* op, F&& body) {
  switch (t.element_size()) {
    case 1: return body(uint8_t{});
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    case 8: return body(uint64_t{});
    default: TORCH_CHECK(false, op, ": Expected numbers of 1 to 8 bytes, got ", t.scalar_type());
  }
}

template <typename T>
T* numbers(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor top_mask_op(const Tensor& score, int64_t count) {
  check(score, "sten::top_mask", "score", score.dim(), at::kFloat);
  const Tensor keep = at::empty(score.sizes(), score.options().dtype(at::kBool));
  top_mask(data_of<float>(score), score.numel(), count, numbers<bool>(keep), make_pool());
  return keep;
}

Tensor top_of_groups_op(const Tensor& score, int64_t n) {
  static constexpr const char* op = "sten::top_of_groups";
  TORCH_CHECK(score.scalar_type() == at::kFloat || score.scalar_type() == at::kDouble, op,
              ": Expected score of dtype Float or Double, got ", score.scalar_type());
  TORCH_CHECK(score.dim() >= 1, op, ": Expected score with at least one dimension, got a scalar");
  check(score, op, "score", score.dim(), score.scalar_type());
  const Tensor keep = at::empty(score.sizes(), score.options().dtype(at::kBool));
  if (score.numel() == 0) return keep;
  const int64_t m = score.size(-1), groups = score.numel() / m;
  if (score.scalar_type() == at::kFloat)
    top_of_groups(data_of<float>(score), groups, m, n, numbers<bool>(keep), make_pool());
  else
    top_of_groups(data_of<double>(score), groups, m, n, numbers<bool>(keep), make_pool());
  return keep;
}

Tensor block_sums_op(const Tensor& matrix, int64_t height, int64_t width) {
  static constexpr const char* op = "sten::block_sums";
  check(matrix, op, "matrix", 2, matrix.scalar_type());
  TORCH_CHECK(height >= 1 && width >= 1, op, ": Expected a height and a width of at least 1, got ", text({height, width}));
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  height = std::min(height, std::max<int64_t>(rows, 1)), width = std::min(width, std::max<int64_t>(columns, 1));
  const Tensor sums = at::empty({ceil_div(rows, height), ceil_div(columns, width)}, matrix.options().dtype(at::kDouble));
  const auto add = [&](const auto* x) {
    block_sums(x, rows, columns, height, width, numbers<double>(sums), make_pool());
  };
  switch (matrix.scalar_type()) {
    case at::kFloat: add(data_of<float>(matrix)); break;
    case at::kDouble: add(data_of<double>(matrix)); break;
    case at::kBool: add(data_of<uint8_t>(matrix)); break;
    default: TORCH_CHECK(false, op, ": Expected a matrix of dtype Float, Double or Bool, got ", matrix.scalar_type());
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> compress_masked_op(const Tensor& dense, const Tensor& mask) {
  static constexpr const char* op = "sten::compress_masked";
  check(dense, op, "dense", 2, dense.scalar_type());
  check(mask, op, "mask", 2, at::kBool);
  TORCH_CHECK(dense.sizes() == mask.sizes() && dense.size(1) <= INT32_MAX, op, ": Expected a mask of the shape ",
              text(dense.sizes()), ", got ", text(mask.sizes()));
  const int64_t rows = dense.size(0), columns = dense.size(1);
  const Tensor crow = at::empty({rows + 1}, mask.options().dtype(at::kLong));
  count_rows(data_of<uint8_t>(mask), rows, columns, numbers<int64_t>(crow), make_pool());
  const int64_t count = data_of<int64_t>(crow)[rows];
  const Tensor values = empty_part({count}, dense.options());
  const Tensor col = empty_part({count}, mask.options().dtype(at::kInt));
  by_width(dense, op, [&](auto number) {
    using T = decltype(number);
    compress(data_of<T>(dense), data_of<uint8_t>(mask), rows, columns, data_of<int64_t>(crow), numbers<T>(values),
             numbers<int32_t>(col), make_pool());
  });
  return {values, crow, col};
}

std::tuple<Tensor, int64_t> nm_index_op(const Tensor& mask, int64_t n, bool bitmap) {
  static constexpr const char* op = "sten::nm_index";
  check(mask, op, "mask", 3, at::kBool);
  const int64_t rows = mask.size(0), groups = mask.size(1), m = mask.size(2);
  TORCH_CHECK(1 <= n && n <= m && m <= 256 && (!bitmap || m % 8 == 0), op, ": Expected 1 <= n <= m <= 256, m a multiple ",
              "of 8 for a bitmap, got n, m = ", text({n, m}));
  const int64_t bits = bitmap ? 1 : m <= 4 ? 2 : m <= 16 ? 4 : 8;
  const int64_t width = bitmap ? groups * m / 8 : ceil_div(groups * n * bits, 8);
  std::vector<int64_t> size{rows, bitmap ? groups : width};
  if (bitmap) size.push_back(m / 8);
  const Tensor index = empty_part(size, mask.options().dtype(at::kByte));
  const int64_t free = nm_index(data_of<uint8_t>(mask), rows, groups, n, m, bits, width, numbers<uint8_t>(index), make_pool());
  return {index, free};
}

GroupedShape make_shape(const char* op, int64_t n, int64_t m, int64_t g, int64_t rows, int64_t columns) {
  constexpr int64_t kMost = 32767;
  TORCH_CHECK(1 <= n && n <= m && m <= 256 && 1 <= g && g <= kMost, op,
              ": Expected 1 <= n <= m <= 256 and g >= 1, got n, m, g = ", text({n, m, g}));
  TORCH_CHECK(count_patterns(m, n, kMost) * g <= kMost, op, ": Expected C(m, n) * g <= ", text(kMost),
              ", got n, m, g = ", text({n, m, g}));
  TORCH_CHECK(rows >= 0 && columns >= 0, op, ": Expected a shape, got ", text({rows, columns}));
  return {n, m, g, rows, columns};
}

Tensor grouped_nm_choose_op(const Tensor& score, int64_t n, int64_t m, int64_t g) {
  static constexpr const char* op = "sten::grouped_nm_choose";
  check(score, op, "score", 2, at::kFloat);
  const GroupedShape s = make_shape(op, n, m, g, score.size(0), score.size(1));
  const Tensor mask = at::empty(score.sizes(), score.options().dtype(at::kBool));
  grouped_mask(s, data_of<float>(score), numbers<bool>(mask), kernels(), make_pool());
  return mask;
}

std::tuple<Tensor, Tensor> grouped_nm_index_op(const Tensor& mask, int64_t n, int64_t m, int64_t g) {
  static constexpr const char* op = "sten::grouped_nm_index";
  check(mask, op, "mask", 2, at::kBool);
  const GroupedShape s = make_shape(op, n, m, g, mask.size(0), mask.size(1));
  const Tensor index = empty_part({s.chunks, s.strips, s.patterns, g}, mask.options().dtype(at::kShort));
  const Tensor unsolved = at::empty({s.chunks, s.strips}, mask.options());
  grouped_index(s, data_of<uint8_t>(mask), numbers<int16_t>(index), numbers<bool>(unsolved), make_pool());
  return {index, unsolved};
}

void check_slots(const char* op, const Tensor& index, const GroupedShape& s) {
  check(index, op, "index", 4, at::kShort);
  const std::vector<int64_t> slots{s.chunks, s.strips, s.patterns, s.g};
  TORCH_CHECK(index.sizes() == at::IntArrayRef(slots), op, ": Expected index (chunks, strips, patterns, g) = ",
              text(slots), ", got ", text(index.sizes()));
}

Tensor grouped_nm_expand_op(const Tensor& values, const Tensor& index, int64_t n, int64_t m, int64_t g, int64_t rows,
                            int64_t columns) {
  static constexpr const char* op = "sten::grouped_nm_expand";
  const GroupedShape s = make_shape(op, n, m, g, rows, columns);
  check_slots(op, index, s);
  check(values, op, "values", 5, values.scalar_type());
  const std::vector<int64_t> full{s.chunks, s.strips, s.patterns, s.g, s.n};
  TORCH_CHECK(values.sizes() == at::IntArrayRef(full), op, ": Expected values (chunks, strips, patterns, g, n) = ",
              text(full), ", got ", text(values.sizes()));
  const Tensor dense = at::empty({rows, columns}, values.options());
  by_width(values, op, [&](auto number) {
    using T = decltype(number);
    TORCH_CHECK_INDEX(grouped_expand(s, data_of<T>(values), data_of<int16_t>(index), numbers<T>(dense), make_pool()), op,
                      ": Expected index from 0 to ", text(s.width - 1), ", got others; make the parts with pack.");
  });
  return dense;
}

Tensor grouped_nm_collect_op(const Tensor& dense, const Tensor& index, int64_t n, int64_t m, int64_t g) {
  static constexpr const char* op = "sten::grouped_nm_collect";
  check(dense, op, "dense", 2, dense.scalar_type());
  const GroupedShape s = make_shape(op, n, m, g, dense.size(0), dense.size(1));
  check_slots(op, index, s);
  const Tensor values = empty_part({s.chunks, s.strips, s.patterns, s.g, s.n}, dense.options());
  by_width(dense, op, [&](auto number) {
    using T = decltype(number);
    TORCH_CHECK_INDEX(grouped_collect(s, data_of<T>(dense), data_of<int16_t>(index), numbers<T>(values), make_pool()), op,
                      ": Expected index from 0 to ", text(s.width - 1), ", got others; make the parts with pack.");
  });
  return values;
}

}  // namespace
}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def("top_mask(Tensor score, int count) -> Tensor");
  m.def("top_of_groups(Tensor score, int n) -> Tensor");
  m.def("block_sums(Tensor matrix, int height, int width) -> Tensor");
  m.def("compress_masked(Tensor dense, Tensor mask) -> (Tensor, Tensor, Tensor)");
  m.def("nm_index(Tensor mask, int n, bool bitmap) -> (Tensor, int)");
  m.def("grouped_nm_choose(Tensor score, int n, int m, int g) -> Tensor");
  m.def("grouped_nm_index(Tensor mask, int n, int m, int g) -> (Tensor, Tensor)");
  m.def("grouped_nm_expand(Tensor values, Tensor index, int n, int m, int g, int rows, int columns) -> Tensor");
  m.def("grouped_nm_collect(Tensor dense, Tensor index, int n, int m, int g) -> Tensor");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) {
  m.impl("top_mask", &sten::top_mask_op);
  m.impl("top_of_groups", &sten::top_of_groups_op);
  m.impl("block_sums", &sten::block_sums_op);
  m.impl("compress_masked", &sten::compress_masked_op);
  m.impl("nm_index", &sten::nm_index_op);
  m.impl("grouped_nm_choose", &sten::grouped_nm_choose_op);
  m.impl("grouped_nm_index", &sten::grouped_nm_index_op);
  m.impl("grouped_nm_expand", &sten::grouped_nm_expand_op);
  m.impl("grouped_nm_collect", &sten::grouped_nm_collect_op);
}
