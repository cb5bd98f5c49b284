// What the files that register operators share; defined in register.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <string>

#include "epilogue.h"
#include "linear.h"

namespace sten {

using at::Tensor;

// Numbers as text: a std::ostream in this library crashed with torch 2.11's own C++ runtime.
std::string text(int64_t number);
std::string text(at::IntArrayRef sizes);

Pool make_pool();

// Memory for a part, in huge pages where Linux has them and the part is large: a product of one token reads it once, and
// takes a fifth longer with pages of 4 KB. Advice before the first write costs nothing.
Tensor empty_part(at::IntArrayRef size, const at::TensorOptions& options);

// C(m, n), or limit + 1 when it is larger than limit
int64_t count_patterns(int64_t m, int64_t n, int64_t limit);

void check(const Tensor& t, const char* op, const char* name, int64_t dim, at::ScalarType dtype);
void check_input(const Tensor& x, const char* op, int64_t out, at::ScalarType dtype = at::kFloat);

// The pattern of rows in bands (register_bands.cpp), checked; `values` may be null, `size` is theirs.
Bands make_bands(const char* op, const float* values, at::IntArrayRef size, const std::optional<Tensor>& crow,
                 const Tensor& col, int64_t height, int64_t columns, int64_t rows, bool trusted);

inline void check_activation(const char* op, int64_t number) {
  TORCH_CHECK(0 <= number && number < static_cast<int64_t>(Activation::count), op,
              ": Expected the number of an activation, got ", text(number));
}

// The dtype of the elements of a kernel.
template <typename E>
constexpr at::ScalarType dtype_of = at::kFloat;
template <>
inline constexpr at::ScalarType dtype_of<bf16> = at::kBFloat16;

template <typename E>
const E* data_of(const Tensor& t) {
  return static_cast<const E*>(t.const_data_ptr());
}

// Checks the bias, allocates y and fills in the problem; `owner` holds a contiguous x; y is not written.
template <typename E = float>
ProblemOf<E> make_problem(const char* op, const Tensor& x, const std::optional<Tensor>& bias, int64_t out,
                          Tensor& owner, Tensor& y, int64_t activation = 0) {
  check_activation(op, activation);
  if (bias) {
    check(*bias, op, "bias", 1, dtype_of<E>);
    TORCH_CHECK(bias->size(0) == out, op, ": Expected a bias of ", text(out), " entries, got ", text(bias->size(0)));
  }
  owner = x.contiguous();
  auto shape = x.sizes().vec();
  const int64_t in = shape.back();
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= shape[i];
  shape.back() = out;
  y = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  return {data_of<E>(owner), bias ? data_of<E>(*bias) : nullptr, static_cast<E*>(y.mutable_data_ptr()), tokens, in,
          out, static_cast<int>(activation)};
}

// activation(y), a pass over it (register_nm.cpp)
Tensor finish(const char* op, const Tensor& y, int64_t activation);

inline bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

// A tensor, or the bias, in float32.
inline Tensor single(const Tensor& t) { return t.to(at::kFloat); }
inline std::optional<Tensor> single(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(t->to(at::kFloat)) : t;
}

// A weight as the operators of register_bands.cpp take it, checked.
template <typename E = float>
BandsOf<E> make_weight(const char* op, const Tensor& values, const std::optional<Tensor>& crow, const Tensor& col,
                       int64_t height, int64_t columns, int64_t rows, bool trusted);

// The same of GroupedNM (register.cpp): a weight (out, in).
template <typename E = float>
GroupedOf<E> make_grouped(const char* op, const Tensor& values, const Tensor& index, int64_t n, int64_t m, int64_t g,
                          int64_t out, int64_t in, bool trusted);

}  // namespace sten
