// A part of driver.cpp: dot products along the columns, NM and bfloat16.

// Numbers that both types have.
template <typename E>
std::vector<E> random_elements(int64_t n) {
  std::vector<E> out(n);
  for (E& e : out) {
    const float f = static_cast<float>(generator() % 255) / 64.0f - 2.0f;
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    if constexpr (std::is_same_v<E, bf16>) e = static_cast<bf16>(bits >> 16);
    else e = to_float(static_cast<bf16>(bits >> 16));
  }
  return out;
}

// y against activation(x W^T + bias), dense (out, in); rounded to 8 bits, once or twice, if E is bf16.
template <typename E>
void compare_dots(const char* what, const ProblemOf<E>& p, const std::vector<float>& dense) {
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t r = 0; r < p.out; ++r) {
      double sum = p.bias ? to_float(p.bias[r]) : 0.0, scale = std::abs(sum);
      for (int64_t k = 0; k < p.in; ++k) {
        const double product = static_cast<double>(dense[r * p.in + k]) * to_float(p.x[t * p.in + k]);
        sum += product;
        scale += std::abs(product);
      }
      const double error = std::abs(to_float(p.y[t * p.out + r]) - activation_of(p.activation, sum));
      const double activating = p.activation ? 1e-6 : 0.0, rounding = p.activation ? 2.2 / 256 : 1.0 / 256;
      if (error <= 2e-6 * scale + activating + (std::is_same_v<E, bf16> ? std::abs(sum) * rounding : 0.0)) continue;
      std::printf("%s: %ld tokens, %ld -> %ld: error %g of %g\n", what, static_cast<long>(p.tokens),
                  static_cast<long>(p.in), static_cast<long>(p.out), error, scale);
      ++failures;
      return;
    }
}

template <typename E>
struct Elements {
  std::vector<E> x, bias, y;
  ProblemOf<E> problem;
  Elements(int64_t tokens, int64_t in, int64_t out, bool biased)
      : x(random_elements<E>(tokens * in)),
        bias(random_elements<E>(out)),
        y(tokens * out),
        problem{x.data(), biased ? bias.data() : nullptr, y.data(), tokens, in, out, int(generator() % 5)} {}
};

// NM: a bitmap, or positions of `bits` bits; with `hostile`, of random bytes, where no result is compared.
template <typename E>
void try_bitmap(const Dots<E>& dots, const Kernels& k, int64_t tokens, int64_t in, int64_t out, int n, int m, int bits,
                bool hostile, int threads) {
  const int64_t groups = ceil_div(in, m), slots = groups * n;
  const int64_t bytes = bits == 1 ? groups * m / 8 : ceil_div(slots * bits, 8);
  std::vector<uint8_t> index(out * bytes);
  std::vector<E> values = random_elements<E>(out * slots), collected(values.size()), expanded(out * in);
  std::vector<float> dense(out * in);
  for (int64_t r = 0; r < out; ++r)
    for (int64_t group = 0; group < groups; ++group) {
      std::vector<int> all(m);
      for (int i = 0; i < m; ++i) all[i] = i;
      std::shuffle(all.begin(), all.end(), generator);
      std::sort(all.begin(), all.begin() + n);
      for (int i = 0; i < n; ++i) {
        const int64_t slot = group * n + i, column = group * m + all[i], bit = bits == 1 ? column : slot * bits;
        uint8_t& byte = index[r * bytes + bit / 8];
        byte = static_cast<uint8_t>(byte | (bits == 1 ? 1 : all[i]) << bit % 8);
        if (column >= in) values[r * slots + slot] = E{};
        else dense[r * in + column] = to_float(values[r * slots + slot]);
      }
    }
  if (hostile)
    for (uint8_t& byte : index) byte = static_cast<uint8_t>(generator());
  const BitmapOf<E> w{values.data(), index.data(), out, groups, bytes, n, m, bits};
  Elements<E> data(tokens, in, out, threads == 1);
  const Pool pool{threads, run_tasks};
  bitmap_linear(data.problem, w, dots, k, pool);
  bitmap_expand(w, in, dots, expanded.data(), pool);
  bitmap_collect(w, in, expanded.data(), dots, collected.data(), pool);
  if (hostile) return;
  compare_dots("bitmap", data.problem, dense);
  for (int64_t i = 0; i < out * in; ++i) failures += to_float(expanded[i]) != dense[i];
  for (size_t i = 0; i < values.size(); ++i) failures += to_float(collected[i]) != to_float(values[i]);
}

// Single entries by the tables of their pattern: CSR, of which some rows are empty, or lists.
template <typename E>
void try_tables(const Dots<E>& dots, const Kernels& k, int64_t tokens, int64_t in, int64_t out, bool lists, int threads) {
  std::vector<int32_t> crow{0}, col;
  const int64_t count = (in + 1) / 3;
  for (int64_t r = 0; r < out; ++r) {
    std::vector<int32_t> all(in);
    for (int64_t i = 0; i < in; ++i) all[i] = static_cast<int32_t>(i);
    std::shuffle(all.begin(), all.end(), generator);
    const int64_t own = lists ? count : r % 3 == 0 ? 0 : r % 3 == 1 ? in : count;
    std::sort(all.begin(), all.begin() + own);
    col.insert(col.end(), all.begin(), all.begin() + own);
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  col.shrink_to_fit();
  const std::vector<E> values = random_elements<E>(static_cast<int64_t>(col.size()));
  std::vector<float> dense(out * in);
  for (int64_t r = 0; r < out; ++r)
    for (int64_t e = crow[r]; e < crow[r + 1]; ++e) dense[r * in + col[e]] = to_float(values[e]);
  const Pool pool{threads, run_tasks};
  std::vector<uint32_t> bits(out * ceil_div(in, 32));
  set_bits({nullptr, lists ? nullptr : crow.data(), col.data(), out, in, 1, 1, count}, bits.data(), pool);
  Elements<E> data(tokens, in, out, threads == 1);
  const BandsOf<E> w{values.data(), lists ? nullptr : crow.data(), col.data(), out, in, 1, 1, count};
  bits_linear(data.problem, w, reinterpret_cast<const uint8_t*>(bits.data()), dots, k, pool);
  compare_dots("bits", data.problem, dense);
  std::vector<E> expanded(out * in);
  bits_expand(w, reinterpret_cast<const uint8_t*>(bits.data()), in, dots, expanded.data(), pool);
  for (int64_t i = 0; i < out * in; ++i) failures += to_float(expanded[i]) != dense[i];
  if (!dots.windows) return;
  std::vector<int32_t> first(out + 1);
  const Bands pattern{nullptr, w.crow, w.col, out, in, 1, 1, count};
  count_windows(pattern, first.data(), pool);
  for (int64_t r = 0; r < out; ++r) first[r + 1] += first[r];
  std::vector<int32_t> table(first);
  table.resize(out + 1 + first[out] * (1 + kGroup / 4));
  table.shrink_to_fit();
  uint32_t* head = reinterpret_cast<uint32_t*>(table.data() + out + 1);
  set_windows(pattern, first.data(), head, reinterpret_cast<uint8_t*>(head + first[out]), pool);
  windows_linear(data.problem, w, table.data(), dots, k, pool);
  compare_dots("windows", data.problem, dense);
}

// Lists (width 0) or blocks in bfloat16.
void try_bf16_bands(const Dots<bf16>& dots, const Kernels& k, int64_t tokens, int64_t in, int64_t out, int64_t height,
                    int64_t width, int threads) {
  const int64_t unit = std::max<int64_t>(width, 1), slots = ceil_div(in, unit), bands = ceil_div(out, height);
  const int64_t count = (slots + 1) / 3;
  std::vector<int32_t> crow{0}, col;
  for (int64_t band = 0; band < bands; ++band) {
    std::vector<int32_t> all(slots);
    for (int64_t i = 0; i < slots; ++i) all[i] = static_cast<int32_t>(i);
    std::shuffle(all.begin(), all.end(), generator);
    std::sort(all.begin(), all.begin() + count);
    col.insert(col.end(), all.begin(), all.begin() + count);
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  col.shrink_to_fit();
  std::vector<bf16> values = random_elements<bf16>(width ? static_cast<int64_t>(col.size()) * height * width : out * count);
  std::vector<float> dense(out * in);
  for (int64_t r = 0; r < out; ++r)
    for (int64_t e = crow[r / height]; e < crow[r / height + 1]; ++e)
      for (int64_t c = 0; c < unit; ++c) {
        bf16& value = values[width ? (e * height + r % height) * width + c : r * count + e - r / height * count];
        if (col[e] * unit + c < in) dense[r * in + col[e] * unit + c] = to_float(value);
        else value = bf16{};
      }
  Elements<bf16> data(tokens, in, out, threads == 1);
  const BandsOf<bf16> w{values.data(), width ? crow.data() : nullptr, col.data(), out, slots * unit, height, unit, count};
  bands_linear(data.problem, w, dots, k, {threads, run_tasks});
  compare_dots("bands of bfloat16", data.problem, dense);
  dots_linear(data.problem, w, dots, k, {threads, run_tasks});
  compare_dots("dot products of bfloat16", data.problem, dense);
}

// GroupedNM in bfloat16, with the pattern of w, where at[row, column] is the entry.
void try_bf16_grouped(int64_t tokens, int64_t in, int64_t out, const Grouped& w, const std::vector<int64_t>& at,
                      const Kernels& k, int threads) {
  const std::vector<bf16> values = random_elements<bf16>(w.chunks * w.strips * w.columns() * w.n);
  std::vector<float> dense(out * in);
  for (size_t i = 0; i < dense.size(); ++i) dense[i] = at[i] < 0 ? 0.0f : to_float(values[at[i]]);
  Elements<bf16> data(tokens, in, out, threads == 1);
  const GroupedOf<bf16> half{values.data(), w.index, w.rows, w.exchanges, w.n, w.m, w.g, w.patterns, w.chunks, w.strips};
  grouped_linear(data.problem, half, bf16_dots()->panels, k, {threads, run_tasks});
  compare_dots("grouped, bfloat16", data.problem, dense);
}

template <typename E>
void try_bitmaps(const Dots<E>& dots, const Kernels& k) {
  const int layouts[][3] = {{16, 32, 1}, {5, 16, 1}, {2, 8, 1}, {32, 32, 1}, {2, 4, 2}, {1, 4, 2}, {1, 1, 2},
                            {3, 7, 4},   {1, 16, 4}, {3, 32, 8}, {9, 64, 8}};
  const int64_t sizes[][2] = {{1, 1}, {17, 3}, {64, 70}, {130, 63}, {300, 5}, {1100, 4}};
  for (const int64_t tokens : {1, 2, 3, 6, 20, 49})
    for (const auto& size : sizes)
      for (const int threads : {1, 3}) {
        for (const bool lists : {false, true}) try_tables<E>(dots, k, tokens, size[0], size[1], lists, threads);
        for (const auto& nm : layouts)
          for (const bool hostile : {false, true})
            try_bitmap<E>(dots, k, tokens, size[0], size[1], nm[0], nm[1], nm[2], hostile, threads);
      }
}

constexpr int64_t sizes[][2] = {{1, 1}, {17, 3}, {3, 63}, {100, 37}, {63, 130}, {300, 65}, {0, 5}, {5, 0}};
constexpr int bands[][2] = {{1, 0}, {3, 0}, {8, 0}, {9, 0}, {500, 0}, {1, 1}, {4, 3}, {16, 16}, {9, 40}};

void try_bf16(const Dots<bf16>& dots, const Kernels& k) {
  try_bitmaps<bf16>(dots, k);
  for (const int64_t tokens : {1, 2, 7, 17, 50, 64, 130})
    for (const auto& size : sizes)
      for (const int threads : {1, 3})
        for (const auto& band : bands)
          try_bf16_bands(dots, k, tokens, size[0], size[1], band[0], band[1], threads);
}
