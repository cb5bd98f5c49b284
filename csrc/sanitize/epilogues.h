// Epilogues against what the definitions say, entry by entry; included by driver.cpp.
double activation_of(int number, double z) {
  const auto activation = static_cast<Activation>(number);
  if (activation == Activation::relu) return z < 0 ? 0 : z;
  if (activation == Activation::gelu) return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
  if (activation == Activation::gelu_tanh)
    return 0.5 * z * (1 + std::tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)));
  return activation == Activation::silu ? z / (1 + std::exp(-z)) : z;
}

// Whether an entry of the activated row f is kept.
template <typename E>
bool keeps(const Epilogue& e, const E* f, const float* uniform, int64_t columns, int64_t i) {
  const auto size = [&](int64_t c) { return std::abs(to_float(f[c])); };
  if (e.keep == Keep::magnitude) return size(i) > e.edge;
  if (e.keep == Keep::above) return to_float(f[i]) > e.edge;
  if (e.keep == Keep::random) return uniform[i] < e.edge;
  if (e.keep == Keep::all) return true;
  const int64_t first = e.keep == Keep::row ? 0 : i / e.block * e.block;
  const int64_t last = e.keep == Keep::row ? columns : first + e.block;
  int64_t before = 0;
  for (int64_t c = first; c < last; ++c) before += c < i ? size(c) >= size(i) : size(c) > size(i);
  return before < e.count;
}

template <typename E>
void try_epilogue(const Kernels& k, const Epilogue& e, int64_t rows, int64_t columns, int threads) {
  const Pool pool{threads, run_tasks};
  const std::vector<E> x = random_numbers<E>(rows * columns);
  std::vector<float> uniform = random_floats(e.keep == Keep::random ? rows * columns : 0);
  for (float& u : uniform) u = std::abs(u);
  const float* u = uniform.empty() ? nullptr : uniform.data();
  std::vector<E> y = x;
  std::vector<int32_t> crow(rows + 1);
  failures += !count_kept(e, x.data(), u, rows, columns, y.data(), crow.data(), k, pool);
  std::vector<E> values(crow[rows]), before(crow[rows]), finished = x;
  std::vector<int32_t> col(crow[rows]);
  store_kept(e, x.data(), y.data(), u, rows, columns, crow.data(), values.data(), col.data(), before.data(), k, pool);
  if (!u) finish_rows(e, finished.data(), rows, columns, k, pool);
  const double rounding = std::is_same_v<E, float> ? 4e-7 : 1.0 / 256;
  for (int64_t r = 0, at = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * columns + c;
      const double z = to_float(x[i]), exact = activation_of(static_cast<int>(e.activation), z), f = to_float(y[i]);
      const bool keep = keeps(e, y.data() + r * columns, u ? u + r * columns : nullptr, columns, c);
      failures += !(std::abs(f - exact) <= 1e-6 + rounding * std::abs(exact));
      if (!u) failures += to_float(finished[i]) != (keep ? f : 0.0);
      if (!keep) continue;
      const double value = u ? f / e.edge : f;
      const bool right = at < crow[r + 1] && col[at] == c && to_float(before[at]) == z &&
                         std::abs(to_float(values[at]) - value) <= rounding * std::abs(value);
      failures += !right;
      ++at;
    }
}

void try_epilogues(const Kernels& k) {
  for (int activation = 0; activation < static_cast<int>(Activation::count); ++activation)
    for (const int64_t columns : {1, 4, 24, 100, 300})
      for (const int64_t rows : {0, 1, 5, 70}) {
        const auto a = static_cast<Activation>(activation);
        for (const Epilogue& e :
             {Epilogue{a, Keep::all, 0, 0, 0}, Epilogue{a, Keep::magnitude, 0.3f, 0, 0}, Epilogue{a, Keep::above, 0.1f, 0, 0},
              Epilogue{a, Keep::random, 0.5f, 0, 0}, Epilogue{a, Keep::row, 0, columns / 3 + 1, 0},
              Epilogue{a, Keep::blocks, 0, 2, 4}, Epilogue{a, Keep::blocks, 0, 1, 2}, Epilogue{a, Keep::blocks, 0, 3, 6}}) {
          if (e.keep == Keep::blocks && columns % e.block) continue;
          try_epilogue<float>(k, e, rows, columns, rows == 70 ? 3 : 1);
          try_epilogue<bf16>(k, e, rows, columns, rows == 70 ? 3 : 1);
        }
      }
}
