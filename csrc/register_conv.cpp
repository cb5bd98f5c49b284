// band_conv2d and grouped_nm_conv2d: direct convolutions, by the weights of register_bands.cpp and by GroupedNM.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "register.h"

namespace sten {
namespace {

constexpr int64_t kMostOffset = 2147483647;

// As the operators take it: nine numbers in a list, since each argument of its own costs a call a tenth of a microsecond.
struct Geometry {
  Geometry(const char* op, at::IntArrayRef numbers, int64_t outputs) : out(outputs) {
    TORCH_CHECK(numbers.size() == 9, op, ": Expected a geometry of nine numbers, two for each of kernel_size, stride, ",
                "padding and dilation, and the groups, got ", text(numbers));
    kernel = numbers.slice(0, 2), stride = numbers.slice(2, 2), padding = numbers.slice(4, 2);
    dilation = numbers.slice(6, 2), groups = numbers[8];
  }
  at::IntArrayRef kernel, stride, padding, dilation;
  int64_t groups, out;
};

// Checks everything but the weight.
ConvShape make_shape(const char* op, const Tensor& x, const std::optional<Tensor>& bias, const Geometry& g) {
  check_input(x, op, g.out);
  TORCH_CHECK(x.dim() == 4, op, ": Expected x (images, channels, rows, columns), got shape ", text(x.sizes()));
  TORCH_CHECK(g.groups >= 1 && x.size(1) % g.groups == 0 && g.out % g.groups == 0, op,
              ": Expected channels and outputs in ", text(g.groups), " groups, got ", text(x.size(1)), " and ", text(g.out));
  ConvShape s{x.size(1) / g.groups, x.size(2), x.size(3), g.out / g.groups, 0, 0, {}, {}, {}, {}, 0, 0};
  int64_t out_size[2], span[2], most = std::max<int64_t>(s.channels, 1) + 1;
  for (int i = 0; i < 2; ++i) {
    const int64_t kernel = g.kernel[i], stride = g.stride[i], padding = g.padding[i], dilation = g.dilation[i];
    TORCH_CHECK(kernel >= 1 && stride >= 1 && dilation >= 1 && padding >= 0 && kernel <= kMostOffset &&
                    stride <= kMostOffset && dilation <= kMostOffset / kernel && padding < kMostOffset / 4,
                op, ": Expected a kernel, stride and dilation of at least 1 and a padding of at least 0, got ",
                text(g.kernel), ", ", text(g.stride), ", ", text(g.dilation), " and ", text(g.padding));
    s.kernel[i] = kernel, s.stride[i] = stride, s.padding[i] = padding, s.dilation[i] = dilation;
    const int64_t size = x.size(2 + i) + 2 * padding;
    span[i] = (kernel - 1) * dilation;
    TORCH_CHECK(span[i] < size, op, ": Expected an image with its padding of at least ", text(span[i] + 1),
                " pixels a side for this kernel, got ", text(size));
    out_size[i] = (size - span[i] - 1) / stride + 1;
    // of both directions: a panel has a few rows and columns more than the image
    TORCH_CHECK(most <= kMostOffset / (size + stride + 128), op, ": Expected an image of fewer than ",
                text(kMostOffset), " numbers with its padding, got shape ", text(x.sizes()));
    most *= size + stride + 128;
  }
  s.out_h = out_size[0], s.out_w = out_size[1];
  s.row_phases = std::min(s.stride[0], span[0] + 1), s.column_phases = std::min(s.stride[1], span[1] + 1);
  if (bias) {
    check(*bias, op, "bias", 1, at::kFloat);
    TORCH_CHECK(bias->size(0) == g.out, op, ": Expected a bias of ", text(g.out), " entries, got ", text(bias->size(0)));
  }
  return s;
}

template <typename W>
Tensor result(const ConvShape& s, const Tensor& x, const std::optional<Tensor>& bias, const Geometry& g, const W& w,
              bool inputs_last) {
  const Tensor owner = x.contiguous();
  const Tensor y = at::empty({x.size(0), g.out, s.out_h, s.out_w}, x.options().memory_format(at::MemoryFormat::Contiguous));
  convolve(s, x.size(0), g.groups, owner.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
           y.mutable_data_ptr<float>(), w, inputs_last, kernels(), make_pool());
  return y;
}

Tensor band_conv2d_op(const Tensor& x, const Tensor& values, const std::optional<Tensor>& crow, const Tensor& col,
                      const std::optional<Tensor>& bias, int64_t height, int64_t columns, bool inputs_last,
                      at::IntArrayRef geometry, int64_t out, bool trusted) {
  static constexpr const char* op = "sten::band_conv2d";
  const Geometry g(op, geometry, out);
  const ConvShape s = make_shape(op, x, bias, g);
  const int64_t positions = g.kernel[0] * g.kernel[1], real = s.channels * positions;
  const int64_t width = values.dim() == 3 ? std::max<int64_t>(1, values.size(2)) : 1;
  TORCH_CHECK(!inputs_last || width == 1, op, ": Expected entries of single columns with the channels last, got blocks");
  TORCH_CHECK(inputs_last ? columns % positions == 0 && columns >= real : columns == ceil_div(real, width) * width, op,
              ": Expected the columns of ", text(s.channels), " channels by ", text(positions),
              " kernel positions, got ", text(columns));
  const Bands w = make_weight(op, values, crow, col, height, columns, out, trusted);
  return result(s, x, bias, g, w, inputs_last);
}

Tensor grouped_nm_conv2d_op(const Tensor& x, const Tensor& values, const Tensor& index, const std::optional<Tensor>& bias,
                            int64_t n, int64_t m, int64_t group, at::IntArrayRef geometry, int64_t out,
                            bool trusted) {
  static constexpr const char* op = "sten::grouped_nm_conv2d";
  const Geometry g(op, geometry, out);
  const ConvShape s = make_shape(op, x, bias, g);
  const int64_t columns = s.channels * g.kernel[0] * g.kernel[1];
  return result(s, x, bias, g, make_grouped<float>(op, values, index, n, m, group, out, columns, trusted), false);
}

}  // namespace
}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def(
      "band_conv2d(Tensor x, Tensor values, Tensor? crow, Tensor col, Tensor? bias, int height, int columns, "
      "bool inputs_last, int[] geometry, int out_channels, *, bool trusted=False) -> Tensor");
  m.def(
      "grouped_nm_conv2d(Tensor x, Tensor values, Tensor index, Tensor? bias, int n, int m, int g, int[] geometry, "
      "int out_channels, *, bool trusted=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) {
  m.impl("band_conv2d", &sten::band_conv2d_op);
  m.impl("grouped_nm_conv2d", &sten::grouped_nm_conv2d_op);
}
