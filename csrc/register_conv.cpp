// band_conv2d: a direct convolution, for the weights of register_bands.cpp whose entries are single columns.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "register.h"

namespace sten {
namespace {

constexpr int64_t kMostOffset = 2147483647;

Tensor band_conv2d_op(const Tensor& x, const Tensor& values, const std::optional<Tensor>& crow, const Tensor& col,
                      const std::optional<Tensor>& bias, int64_t height, int64_t columns, bool inputs_last,
                      at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      int64_t groups, int64_t out, bool trusted) {
  static constexpr const char* op = "sten::band_conv2d";
  check_input(x, op, out);
  TORCH_CHECK(x.dim() == 4, op, ": Expected x (images, channels, rows, columns), got shape ", text(x.sizes()));
  for (const at::IntArrayRef sizes : {kernel, stride, padding, dilation})
    TORCH_CHECK(sizes.size() == 2, op, ": Expected two numbers for each of kernel_size, stride, padding and dilation, ",
                "got ", text(sizes));
  TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0 && out % groups == 0, op, ": Expected channels and outputs in ",
              text(groups), " groups, got ", text(x.size(1)), " and ", text(out));
  ConvShape s{x.size(1) / groups, x.size(2), x.size(3), out / groups, 0, 0, {}, {}, {}, {}, 0, 0};
  int64_t out_size[2], span[2], most = std::max<int64_t>(s.channels, 1) + 1;
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(kernel[i] >= 1 && stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0 && kernel[i] <= kMostOffset &&
                    stride[i] <= kMostOffset && dilation[i] <= kMostOffset / kernel[i] && padding[i] < kMostOffset / 4,
                op, ": Expected a kernel, stride and dilation of at least 1 and a padding of at least 0, got ",
                text(kernel), ", ", text(stride), ", ", text(dilation), " and ", text(padding));
    s.kernel[i] = kernel[i], s.stride[i] = stride[i], s.padding[i] = padding[i], s.dilation[i] = dilation[i];
    const int64_t size = x.size(2 + i) + 2 * padding[i];
    span[i] = (kernel[i] - 1) * dilation[i];
    TORCH_CHECK(span[i] < size, op, ": Expected an image with its padding of at least ", text(span[i] + 1),
                " pixels a side for this kernel, got ", text(size));
    out_size[i] = (size - span[i] - 1) / stride[i] + 1;
    // of both directions: a panel has a few rows and columns more than the image
    TORCH_CHECK(most <= kMostOffset / (size + stride[i] + 128), op, ": Expected an image of fewer than ",
                text(kMostOffset), " numbers with its padding, got shape ", text(x.sizes()));
    most *= size + stride[i] + 128;
  }
  s.out_h = out_size[0], s.out_w = out_size[1];
  s.row_phases = std::min(stride[0], span[0] + 1), s.column_phases = std::min(stride[1], span[1] + 1);
  const int64_t positions = kernel[0] * kernel[1];
  TORCH_CHECK(inputs_last ? columns % positions == 0 && columns >= s.channels * positions
                          : columns == s.channels * positions,
              op, ": Expected the columns of ", text(s.channels), " channels by ", text(positions),
              " kernel positions, got ", text(columns));
  if (bias) {
    check(*bias, op, "bias", 1, at::kFloat);
    TORCH_CHECK(bias->size(0) == out, op, ": Expected a bias of ", text(out), " entries, got ", text(bias->size(0)));
  }
  const Bands w = make_weight(op, values, crow, col, height, columns, out, trusted);
  TORCH_CHECK(w.width == 1 && (!crow || height == 1), op, ": Expected entries of single columns, got blocks");
  const Tensor owner = x.contiguous();
  const Tensor y = at::empty({x.size(0), out, s.out_h, s.out_w}, x.options().memory_format(at::MemoryFormat::Contiguous));
  bands_conv(s, x.size(0), groups, owner.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
             y.mutable_data_ptr<float>(), w, inputs_last, kernels(), make_pool());
  return y;
}

}  // namespace
}  // namespace sten

TORCH_LIBRARY_FRAGMENT(sten, m) {
  m.def(
      "band_conv2d(Tensor x, Tensor values, Tensor? crow, Tensor col, Tensor? bias, int height, int columns, "
      "bool inputs_last, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "int out_channels, *, bool trusted=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(sten, CPU, m) { m.impl("band_conv2d", &sten::band_conv2d_op); }
