// What the files that register operators share; defined in register.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "linear.h"

namespace sten {

using at::Tensor;

// Numbers as text: a std::ostream in this library crashed with torch 2.11's own C++ runtime.
std::string text(int64_t number);
std::string text(at::IntArrayRef sizes);

Pool make_pool();

void check(const Tensor& t, const char* op, const char* name, int64_t dim, at::ScalarType dtype);
void check_input(const Tensor& x, const char* op, int64_t out);

// The pattern of rows in bands (register_bands.cpp), checked; `values` may be null, `size` is theirs.
Bands make_bands(const char* op, const float* values, at::IntArrayRef size, const std::optional<Tensor>& crow,
                 const Tensor& col, int64_t height, int64_t columns, int64_t rows, bool trusted);

// Checks x and bias, allocates y and fills in the problem; `owner` holds a contiguous x; y is not written.
Problem make_problem(const char* op, const Tensor& x, const std::optional<Tensor>& bias, int64_t out, Tensor& owner,
                     Tensor& y);

// A weight as the operators of register_bands.cpp take it, checked.
Bands make_weight(const char* op, const Tensor& values, const std::optional<Tensor>& crow, const Tensor& col,
                  int64_t height, int64_t columns, int64_t rows, bool trusted);

}  // namespace sten
