// Convolutions against their definition, a part of driver.cpp.

enum class Form { csr, lists, blocks, grouped };

// The convolution by w, where dense is its matrix (groups * out, channels * positions).
template <typename W>
void check_conv(const Kernels& k, const ConvShape& s, int64_t images, int64_t groups, const W& w, bool inputs_last,
                const std::vector<double>& dense, int threads) {
  const int64_t rows = groups * s.out, positions = s.kernel[0] * s.kernel[1], oh = s.out_h, ow = s.out_w;
  const std::vector<float> x = random_floats(images * groups * s.channels * s.h * s.w), bias = random_floats(rows);
  std::vector<float> y(images * rows * oh * ow, NAN);
  convolve(s, images, groups, x.data(), bias.data(), y.data(), w, inputs_last, k, {threads, run_tasks});
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    const int64_t q = i % ow, p = i / ow % oh, r = i / (ow * oh) % rows, image = i / (ow * oh * rows);
    double sum = bias[r], scale = std::abs(sum);
    for (int64_t e = 0; e < s.channels * positions; ++e) {
      const double value = dense[r * s.channels * positions + e];
      if (value == 0.0) continue;
      const int64_t a = p * s.stride[0] - s.padding[0] + e % positions / s.kernel[1] * s.dilation[0];
      const int64_t b = q * s.stride[1] - s.padding[1] + e % s.kernel[1] * s.dilation[1];
      if (a < 0 || a >= s.h || b < 0 || b >= s.w) continue;
      const int64_t channel = (image * groups + r / s.out) * s.channels + e / positions;
      const double product = value * x[(channel * s.h + a) * s.w + b];
      sum += product;
      scale += std::abs(product);
    }
    if (std::abs(y[i] - sum) <= 2e-6 * scale) continue;
    std::printf("conv: %ld x %ld, kernel %ld, stride %ld, padding %ld, dilation %ld: %g instead of %g\n",
                static_cast<long>(s.h), static_cast<long>(s.w), static_cast<long>(s.kernel[0]),
                static_cast<long>(s.stride[0]), static_cast<long>(s.padding[0]), static_cast<long>(s.dilation[0]), y[i],
                sum);
    ++failures;
    return;
  }
}

// Bands of rows: `lists` have the channels last in a row, and two more of them, which are padding.
void try_conv_bands(const Kernels& k, const ConvShape& s, int64_t images, int64_t groups, Form form, int threads) {
  const bool lists = form == Form::lists;
  const int64_t rows = groups * s.out, positions = s.kernel[0] * s.kernel[1], real = s.channels * positions;
  const int64_t height = form == Form::csr ? 1 : 1 + generator() % 5, width = form == Form::blocks ? 1 + generator() % 9 : 1;
  const int64_t padded = s.channels + 2, columns = lists ? positions * padded : ceil_div(real, width) * width;
  const int64_t bands = ceil_div(rows, height), all_entries = columns / width, count = columns / 3;
  std::vector<int32_t> crow{0}, col;
  for (int64_t b = 0; b < bands; ++b) {
    std::vector<int32_t> all(all_entries);
    for (int64_t i = 0; i < all_entries; ++i) all[i] = static_cast<int32_t>(i);
    std::shuffle(all.begin(), all.end(), generator);
    all.resize(lists ? count : generator() % (all_entries + 1));
    std::sort(all.begin(), all.end());
    col.insert(col.end(), all.begin(), all.end());
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  col.shrink_to_fit();
  const std::vector<float> values = random_floats(lists ? rows * count : static_cast<int64_t>(col.size()) * height * width);
  std::vector<double> dense(rows * real);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = crow[r / height]; e < crow[r / height + 1]; ++e)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t c = col[e] * width + i, channel = lists ? c % padded : c / positions;
        if (channel >= s.channels) continue;
        dense[r * real + (lists ? channel * positions + c / padded : c)] =
            values[lists ? r * count + e - crow[r / height] : (e * height + r % height) * width + i];
      }
  const Bands w{values.data(), lists ? nullptr : crow.data(), col.data(), rows, columns, height, width, lists ? count : 0};
  check_conv(k, s, images, groups, w, lists, dense, threads);
}

void try_conv_grouped(const Kernels& k, const ConvShape& s, int64_t images, int64_t groups, int threads) {
  const int n = 1 + static_cast<int>(generator() % 5), m = n + static_cast<int>(generator() % 3);
  const int g = 1 + static_cast<int>(generator() % 5);
  const int64_t rows = groups * s.out, real = s.channels * s.kernel[0] * s.kernel[1];
  const Patterns& order = patterns(n, m);
  const int64_t count = static_cast<int64_t>(order.rows.size()) / n, width = count * g;
  const int64_t chunks = ceil_div(real, width), strips = ceil_div(rows, m);
  std::vector<int16_t> index(chunks * strips * width);
  const std::vector<float> values = random_floats(static_cast<int64_t>(index.size()) * n);
  std::vector<double> dense(rows * real);
  for (int64_t i = 0; i < chunks * strips; ++i) {
    for (int64_t j = 0; j < width; ++j) index[i * width + j] = static_cast<int16_t>(j);
    std::shuffle(index.begin() + i * width, index.begin() + (i + 1) * width, generator);
    for (int64_t j = 0; j < width * n; ++j) {
      const int64_t column = i / strips * width + index[i * width + j / n];
      const int64_t row = i % strips * m + order.rows[j / (n * g) * n + j % n];
      if (row < rows && column < real) dense[row * real + column] = values[i * width * n + j];
    }
  }
  const Grouped w{values.data(), index.data(), order.rows.data(), order.exchanges.data(), n, m, g, count, chunks, strips};
  check_conv(k, s, images, groups, w, false, dense, threads);
}

void try_convs(const Kernels& k, int rounds) {
  const int64_t sizes[] = {1, 3, 4, 7, 8, 15, 16, 17, 32, 33, 40};
  auto among = [&](auto... values) {
    return std::array<int64_t, sizeof...(values)>{values...}[generator() % sizeof...(values)];
  };
  for (int round = 0; round < rounds; ++round) {
    const int64_t images = among(1, 1, 2), groups = among(1, 1, 3), kernel = among(1, 2, 3, 3, 5);
    const int64_t stride = among(1, 1, 2, 3), padding = among(0, 1, 1, 2, 9), dilation = among(1, 1, 2);
    ConvShape s{among(1, 2, 5, 20), sizes[generator() % std::size(sizes)], sizes[generator() % std::size(sizes)],
                among(1, 3, 9), 0, 0, {kernel, kernel}, {stride, stride}, {padding, padding}, {dilation, dilation}, 0, 0};
    const int64_t reach = (kernel - 1) * dilation + 1;
    if (s.h + 2 * padding < reach || s.w + 2 * padding < reach) continue;
    s.out_h = (s.h + 2 * padding - reach) / stride + 1;
    s.out_w = (s.w + 2 * padding - reach) / stride + 1;
    s.row_phases = s.column_phases = std::min(stride, reach);
    const Form form = static_cast<Form>(round % 4);
    const int threads = generator() % 2 ? 3 : 1;
    if (form == Form::grouped) try_conv_grouped(k, s, images, groups, threads);
    else try_conv_bands(k, s, images, groups, form, threads);
  }
}
