// A part of driver.cpp: masks, NM's index and GroupedNM.

std::vector<uint8_t> random_mask(int64_t n, int one_in) {
  std::vector<uint8_t> mask(n);
  for (uint8_t& m : mask) m = generator() % one_in == 0 ? static_cast<uint8_t>(1 + generator() % 255) : 0;
  return mask;
}

// The highest scores, by a stable sort of their numbers; NaN is lowest.
void compare_top(const std::vector<float>& score, int64_t first, int64_t size, int64_t count, const bool* keep) {
  std::vector<int64_t> order(size);
  for (int64_t i = 0; i < size; ++i) order[i] = i;
  const auto value = [&](int64_t i) { return std::isnan(score[first + i]) ? -INFINITY : score[first + i]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return value(a) > value(b); });
  for (int64_t i = 0; i < size; ++i) failures += keep[order[i]] != (i < count);
}

void try_select(int64_t groups, int64_t m, int threads) {
  std::vector<float> score = random_floats(groups * m);
  for (size_t i = 0; i < score.size(); ++i)
    if (generator() % 3 == 0) score[i] = i % 7 ? score[generator() % score.size()] : i % 2 ? NAN : -INFINITY;
  const auto keep = std::make_unique<bool[]>(groups * m);
  for (const int64_t count : {int64_t{0}, int64_t{1}, groups * m / 2, groups * m}) {
    top_mask(score.data(), groups * m, count, keep.get(), {threads, run_tasks});
    compare_top(score, 0, groups * m, count, keep.get());
  }
  for (const int64_t n : {int64_t{1}, m / 2, m}) {
    top_of_groups(score.data(), groups, m, n, keep.get(), {threads, run_tasks});
    for (int64_t g = 0; g < groups; ++g) compare_top(score, g * m, m, n, keep.get() + g * m);
  }
  const std::vector<uint8_t> mask = random_mask(groups * m, 3);
  std::vector<int64_t> crow(groups + 1);
  count_rows(mask.data(), groups, m, crow.data(), {threads, run_tasks});
  std::vector<uint32_t> numbers(groups * m), values(crow[groups]);
  std::vector<int32_t> col(crow[groups]);
  compress(numbers.data(), mask.data(), groups, m, crow.data(), values.data(), col.data(), {threads, run_tasks});
  int64_t slot = 0;
  for (int64_t i = 0; i < groups * m; ++i)
    if (mask[i]) failures += col[slot++] != i % m;
  failures += slot != crow[groups];
}

void try_block_sums(int64_t rows, int64_t columns, int64_t height, int64_t width, int threads) {
  const int64_t down = ceil_div(rows, height), across = ceil_div(columns, width);
  const std::vector<float> x = random_floats(rows * columns);
  const std::vector<uint8_t> mask = random_mask(rows * columns, 3);
  std::vector<double> sums(down * across), counts(down * across), right(down * across), count(down * across);
  block_sums(x.data(), rows, columns, height, width, sums.data(), {threads, run_tasks});
  block_sums(mask.data(), rows, columns, height, width, counts.data(), {threads, run_tasks});
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t block = i / columns / height * across + i % columns / width;
    right[block] += x[i];
    count[block] += mask[i] != 0;
  }
  for (int64_t i = 0; i < down * across; ++i) failures += counts[i] != count[i] || std::abs(sums[i] - right[i]) > 1e-9;
}

// Any mask either has too many entries somewhere, or an index whose bits and positions hold all of them.
void try_nm_index(int64_t n, int64_t m, int threads) {
  const int64_t rows = 5, groups = 7;
  for (const int64_t bits : {int64_t{1}, int64_t{m <= 4 ? 2 : m <= 16 ? 4 : 8}}) {
    if (bits == 1 && m % 8 != 0) continue;
    const int64_t width = bits == 1 ? groups * m / 8 : ceil_div(groups * n * bits, 8);
    const std::vector<uint8_t> mask = random_mask(rows * groups * m, static_cast<int>(m / n + 3));
    std::vector<uint8_t> index(rows * width);
    const int64_t free = nm_index(mask.data(), rows, groups, n, m, bits, width, index.data(), {threads, run_tasks});
    if (free < 0 || bits > 1) continue;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < groups * m; ++c)
        failures += mask[r * groups * m + c] && !(index[r * width + c / 8] >> (c % 8) & 1);
  }
}

// mask -> index -> values -> dense: the mask's entries and nothing else; then with an index of hostile numbers.
void try_grouped(const Kernels& k, int64_t n, int64_t m, int64_t g, int64_t rows, int64_t columns, int threads) {
  const Pool pool{threads, run_tasks};
  const GroupedShape s(n, m, g, rows, columns);
  std::vector<float> score = random_floats(rows * columns);
  if (!score.empty()) score[score.size() / 2] = NAN;
  const auto keep = std::make_unique<bool[]>(rows * columns), unsolved = std::make_unique<bool[]>(s.chunks * s.strips);
  grouped_mask(s, score.data(), keep.get(), k, pool);
  const std::vector<uint8_t> mask(keep.get(), keep.get() + rows * columns);
  std::vector<int16_t> index(s.chunks * s.strips * s.width);
  grouped_index(s, mask.data(), index.data(), unsolved.get(), pool);
  std::vector<uint32_t> numbers(rows * columns), dense(rows * columns), values(index.size() * n);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint32_t>(i + 1);
  for (int64_t i = 0; i < s.chunks * s.strips; ++i) failures += unsolved[i] && i % s.strips * m + m <= rows;
  if (rows % m == 0) {
    failures += !grouped_collect(s, numbers.data(), index.data(), values.data(), pool);
    failures += !grouped_expand(s, values.data(), index.data(), dense.data(), pool);
    for (int64_t i = 0; i < rows * columns; ++i) failures += dense[i] != (keep[i] ? numbers[i] : 0);
  }
  for (int16_t& i : index) i = static_cast<int16_t>(generator());
  grouped_collect(s, numbers.data(), index.data(), values.data(), pool);
  grouped_expand(s, values.data(), index.data(), dense.data(), pool);
  const std::vector<uint8_t> other = random_mask(rows * columns, 2);
  grouped_index(s, other.data(), index.data(), unsolved.get(), pool);
}

void try_pack(const Kernels& k) {
  for (const int threads : {1, 3}) {
    for (const int64_t m : {1, 3, 4, 8, 16, 32, 33, 65, 300, 3000}) try_select(11, m, threads);
    for (const int64_t size : {1, 3, 16, 5000}) try_block_sums(37, 2100, size, 1 + size % 64, threads);
    try_block_sums(37, 2100, 1, 2100, threads);
    try_select(300, 40, threads);
    try_nm_index(2, 4, threads);
    try_nm_index(3, 7, threads);
    try_nm_index(5, 8, threads);
    try_nm_index(16, 32, threads);
    for (const int64_t rows : {1, 8, 30, 64})
      for (const int64_t columns : {1, 47, 48, 130}) {
        try_grouped(k, 2, 4, 8, rows, columns, threads);
        try_grouped(k, 1, 10, 2, rows, columns, threads);
        try_grouped(k, 3, 3, 2, rows, columns, threads);
        try_grouped(k, 5, 6, 1, rows, columns, threads);
      }
  }
}
