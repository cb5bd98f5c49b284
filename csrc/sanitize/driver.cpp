// Runs every driver and instruction set over odd shapes without torch, for the sanitizers; see run.sh. Inputs are in
// heap blocks of exactly their size, so that any access beyond them is detected, and scratch memory begins as NaN.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>

#include "../crc32.h"
#include "../epilogue.h"
#include "../linear.h"
#include "../pack.h"

namespace {

using namespace sten;

std::mt19937 generator(0);
int failures = 0;

void run_tasks(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  std::vector<std::thread> threads;
  const int64_t count = std::min<int64_t>(tasks, 3);
  for (int64_t i = 0; i < count; ++i)
    threads.emplace_back([=] { body(context, part(tasks, count, i).begin, part(tasks, count, i).end); });
  for (std::thread& t : threads) t.join();
}

std::vector<float> random_floats(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& v : out) v = normal(generator);
  out.shrink_to_fit();
  return out;
}

double activation_of(int activation, double z);    // epilogues.h

// Compares y with activation(x W^T + bias) in double precision, where dense is W, (out, in).
void compare(const char* what, const Problem& p, const std::vector<double>& dense) {
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t r = 0; r < p.out; ++r) {
      double sum = p.bias ? p.bias[r] : 0.0, scale = std::abs(sum);
      for (int64_t k = 0; k < p.in; ++k) {
        const double product = dense[r * p.in + k] * static_cast<double>(p.x[t * p.in + k]);
        sum += product;
        scale += std::abs(product);
      }
      sum = activation_of(p.activation, sum);
      if (std::abs(p.y[t * p.out + r] - sum) <= 2e-6 * scale + (p.activation ? 1e-6 : 0.0)) continue;
      std::printf("%s: %ld tokens, %ld -> %ld, row %ld: %g instead of %g\n", what, static_cast<long>(p.tokens),
                  static_cast<long>(p.in), static_cast<long>(p.out), static_cast<long>(r), p.y[t * p.out + r], sum);
      ++failures;
      return;
    }
}

struct Data {
  std::vector<float> x, bias, y;
  Problem problem;
  Data(int64_t tokens, int64_t in, int64_t out, bool biased)
      : x(random_floats(tokens * in)),
        bias(random_floats(out)),
        y(tokens * out, NAN),
        problem{x.data(), biased ? bias.data() : nullptr, y.data(), tokens, in, out, biased * int(generator() % 5)} {}
};

// The gradient of the values, where at[row, column] is the entry, against grad^T x.
void compare_values(const char* what, const Data& grad, const Data& x, const std::vector<int64_t>& at,
                    const std::vector<float>& gradient) {
  const int64_t out = grad.problem.in, in = x.problem.in;
  for (int64_t i = 0; i < out * in; ++i) {
    if (at[i] < 0) continue;
    double sum = 0.0, scale = 0.0;
    for (int64_t t = 0; t < x.problem.tokens; ++t) {
      const double product = static_cast<double>(grad.x[t * out + i / in]) * x.x[t * in + i % in];
      sum += product;
      scale += std::abs(product);
    }
    if (std::abs(gradient[at[i]] - sum) <= 2e-6 * scale) continue;
    std::printf("%s, gradient of the values: %g instead of %g\n", what, gradient[at[i]], sum);
    ++failures;
    return;
  }
}

void try_csr(const Kernels& k, int64_t tokens, int64_t in, int64_t out, double density, bool biased, int threads) {
  Data data(tokens, in, out, biased);
  std::bernoulli_distribution keep(density);
  std::vector<double> dense(out * in);
  std::vector<int32_t> crow{0}, col;
  for (int64_t r = 0; r < out; ++r) {
    for (int64_t c = 0; c < in; ++c)
      if (r % 7 != 3 && keep(generator)) col.push_back(static_cast<int32_t>(c));
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  std::vector<float> values = random_floats(static_cast<int64_t>(col.size()));
  col.shrink_to_fit();
  for (int64_t r = 0; r < out; ++r)
    for (int32_t i = crow[r]; i < crow[r + 1]; ++i) dense[r * in + col[i]] = values[i];
  csr_linear(data.problem, {values.data(), crow.data(), col.data()}, k, {threads, run_tasks});
  compare("csr", data.problem, dense);
}

void try_bf16_grouped(int64_t tokens, int64_t in, int64_t out, const Grouped& w, const std::vector<int64_t>& at,
                      const Kernels& k, int threads);    // dots.h

void try_grouped(const Kernels& k, int64_t tokens, int64_t in, int64_t out, int n, int m, int g, bool biased,
                 int threads) {
  Data data(tokens, in, out, biased);
  const Patterns& order = patterns(n, m);
  const int64_t count = static_cast<int64_t>(order.rows.size()) / n, width = count * g;
  const int64_t chunks = ceil_div(in, width), strips = ceil_div(out, m);
  std::vector<float> values = random_floats(chunks * strips * width * n);
  std::vector<int16_t> index(chunks * strips * width);
  std::vector<double> dense(out * in), transposed(out * in);
  std::vector<int64_t> at(out * in, -1);    // the entry stored there
  for (int64_t block = 0; block < chunks * strips; ++block) {
    int16_t* begin = index.data() + block * width;
    for (int64_t i = 0; i < width; ++i) begin[i] = static_cast<int16_t>(i);
    std::shuffle(begin, begin + width, generator);
    for (int64_t slot = 0; slot < width; ++slot)
      for (int i = 0; i < n; ++i) {
        const int64_t row = block % strips * m + order.rows[slot / g * n + i];
        const int64_t column = block / strips * width + begin[slot];
        const int64_t entry = (block * width + slot) * n + i;
        float& value = values[entry];
        if (row >= out || column >= in) value = 0.0f;
        else at[row * in + column] = entry, dense[row * in + column] = transposed[column * out + row] = value;
      }
  }
  const Grouped w{values.data(), index.data(), order.rows.data(), order.exchanges.data(), n, m, g, count, chunks, strips};
  grouped_linear(data.problem, w, k.dots.panels, k, {threads, run_tasks});
  compare("grouped", data.problem, dense);
  Data back(tokens, out, in, false);
  grouped_grad_input(back.problem, w, k, {threads, run_tasks});
  compare("grouped, gradient of the input", back.problem, transposed);
  std::vector<float> gradient(values.size());
  grouped_grad_values(back.x.data(), data.x.data(), tokens, out, in, w, gradient.data(), k, {threads, run_tasks});
  compare_values("grouped", back, data, at, gradient);
  if (n <= kPairRows && bf16_dots()) try_bf16_grouped(tokens, in, out, w, at, k, threads);
}

// Lists (width 0) or blocks: y, and the gradients as the products that they are.
void try_bands(const Kernels& k, int64_t tokens, int64_t in, int64_t out, int64_t height, int64_t width, double density,
               bool biased, int threads) {
  const bool blocks = width > 0;
  const int64_t unit = std::max<int64_t>(width, 1), slots = ceil_div(in, unit) + (in % 3 == 1 && !blocks);
  const int64_t bands = ceil_div(out, height), count = static_cast<int64_t>(static_cast<double>(slots) * density);
  std::bernoulli_distribution keep(density);
  std::vector<int32_t> crow{0}, col;
  for (int64_t band = 0; band < bands; ++band) {
    std::vector<int32_t> all(slots);
    for (int64_t i = 0; i < slots; ++i) all[i] = static_cast<int32_t>(i);
    if (!blocks) {
      std::shuffle(all.begin(), all.end(), generator);
      all.resize(count);
      std::sort(all.begin(), all.end());
    }
    for (const int32_t c : all)
      if (!blocks || (band % 7 != 3 && keep(generator))) col.push_back(c);
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  col.shrink_to_fit();
  std::vector<float> values = random_floats(blocks ? static_cast<int64_t>(col.size()) * height * width : out * count);
  const Bands w{values.data(), blocks ? crow.data() : nullptr, col.data(), out, slots * unit, height, unit, count};
  std::vector<double> dense(out * in), transposed(out * in);
  std::vector<int64_t> at(out * in, -1);    // where an entry is stored
  for (int64_t band = 0; band < bands; ++band)
    for (int64_t e = crow[band]; e < crow[band + 1]; ++e)
      for (int64_t r = band * height; r < std::min((band + 1) * height, out); ++r)
        for (int64_t c = 0; c < unit; ++c) {
          const int64_t i = blocks ? (e * height + r % height) * width + c : r * count + e - band * count;
          const int64_t column = col[e] * unit + c;
          if (column >= in) values[i] = 0.0f;
          else at[r * in + column] = i, dense[r * in + column] = transposed[column * out + r] = values[i];
        }
  if (!bands_in_bounds(w, static_cast<int64_t>(col.size()), {threads, run_tasks})) ++failures;
  Data data(tokens, in, out, biased);
  bands_linear(data.problem, w, k.dots, k, {threads, run_tasks});
  compare("bands", data.problem, dense);
  Data back(tokens, out, in, false);
  bands_grad_input(back.problem, w, k, {threads, run_tasks});
  compare("bands, gradient of the input", back.problem, transposed);
  std::vector<float> gradient(values.size());
  bands_grad_values(back.x.data(), data.x.data(), tokens, in, w, gradient.data(), k, {threads, run_tasks});
  compare_values("bands", back, data, at, gradient);
}

bf16 to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float to_float(float value) { return value; }
template <typename E>
std::vector<E> random_numbers(int64_t n) {
  std::vector<E> out;
  out.reserve(n);
  for (const float v : random_floats(n)) {
    if constexpr (std::is_same_v<E, float>) out.push_back(v);
    else out.push_back(to_bfloat(v));
  }
  return out;
}

// Whether all of `got` (rows, columns) is left (rows, n) times right (n, columns), where `stored` is not zero.
template <typename G>
void compare_codes(const char* what, const G* got, int64_t rows, int64_t columns, int64_t n, auto left, auto right,
                   double rounding) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0.0, scale = 0.0;
      for (int64_t k = 0; k < n; ++k) {
        const double product = left(i, k) * right(k, j);
        sum += product;
        scale += std::abs(product);
      }
      if (std::abs(to_float(got[i * columns + j]) - sum) <= 2e-6 * scale + rounding * std::abs(sum)) continue;
      std::printf("%s: (%ld, %ld) of (%ld, %ld): %g instead of %g\n", what, static_cast<long>(i), static_cast<long>(j),
                  static_cast<long>(rows), static_cast<long>(columns), to_float(got[i * columns + j]), sum);
      ++failures;
      return;
    }
}

// Sparse activations as lists (height 0) or blocks of `height` tokens, times a matrix of E: y and the two gradients.
template <typename E>
void try_codes(const Kernels& k, int64_t tokens, int64_t in, int64_t out, int64_t height, double density, int threads) {
  const bool blocks = height > 0;
  const int64_t band = std::max<int64_t>(height, 1), bands = ceil_div(tokens, band);
  const int64_t count = static_cast<int64_t>(static_cast<double>(in) * density);
  std::bernoulli_distribution keep(density);
  std::vector<int32_t> crow{0}, col;
  for (int64_t b = 0; b < bands; ++b) {
    std::vector<int32_t> all(in);
    for (int64_t i = 0; i < in; ++i) all[i] = static_cast<int32_t>(i);
    std::shuffle(all.begin(), all.end(), generator);
    if (!blocks) all.resize(count);
    std::sort(all.begin(), all.end());
    for (const int32_t c : all)
      if (!blocks || (b % 7 != 3 && keep(generator))) col.push_back(c);
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  col.shrink_to_fit();
  const std::vector<float> values = random_floats(static_cast<int64_t>(col.size()) * band);
  const Bands s{values.data(), blocks ? crow.data() : nullptr, col.data(), tokens, in, band, 1, count};
  const Pool pool{threads, run_tasks};
  if (!bands_in_bounds(s, static_cast<int64_t>(col.size()), pool)) ++failures;
  std::vector<double> dense(tokens * in);
  std::vector<int64_t> at(tokens * in, -1);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t e = crow[t / band]; e < crow[t / band + 1]; ++e) {
      const int64_t i = blocks ? e * band + t % band : e;
      at[t * in + col[e]] = i, dense[t * in + col[e]] = values[i];
    }
  const std::vector<E> weight = random_numbers<E>(in * out), grad = random_numbers<E>(tokens * out);
  const double rounding = std::is_same_v<E, float> ? 0.0 : 1.0 / 256;
  std::vector<E> y(tokens * out), dw(in * out);
  std::vector<float> dv(values.size(), 0.0f);
  codes_linear(s, Table<E>{weight.data(), out}, nullptr, y.data(), k, pool);
  codes_grad_values(s, Table<E>{weight.data(), out}, grad.data(), dv.data(), k, pool);
  codes_grad_weight(s, Table<E>{grad.data(), out}, dw.data(), k, pool);
  compare_codes("codes", y.data(), tokens, out, in, [&](int64_t t, int64_t c) { return dense[t * in + c]; },
                [&](int64_t c, int64_t o) { return static_cast<double>(to_float(weight[c * out + o])); }, rounding);
  compare_codes("codes, gradient of the weight", dw.data(), in, out, tokens,
                [&](int64_t c, int64_t t) { return dense[t * in + c]; },
                [&](int64_t t, int64_t o) { return static_cast<double>(to_float(grad[t * out + o])); }, rounding);
  for (int64_t i = 0; i < tokens * in; ++i)
    if (at[i] >= 0)
      compare_codes("codes, gradient of the values", dv.data() + at[i], 1, 1, out,
                    [&](int64_t, int64_t o) { return static_cast<double>(to_float(grad[i / in * out + o])); },
                    [&](int64_t o, int64_t) { return static_cast<double>(to_float(weight[i % in * out + o])); }, 0.0);
}

// The columns of the largest magnitudes against a stable sort; with ties, and NaN, which is lowest.
template <typename E>
void try_topk(int64_t rows, int64_t columns, int threads) {
  std::vector<E> x = random_numbers<E>(rows * columns);
  for (size_t i = 0; i < x.size(); ++i)
    if (generator() % 4 == 0) x[i] = x[generator() % x.size()];
  if constexpr (std::is_same_v<E, float>)
    for (size_t i = 0; i < x.size(); i += 7) x[i] = i % 3 ? NAN : i % 2 ? 0.0f : -INFINITY;
  for (const int64_t count : {int64_t{1}, columns / 3 + 1, columns}) {
    std::vector<int32_t> got(rows * count);
    codes_topk(x.data(), rows, columns, count, got.data(), {threads, run_tasks});
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int32_t> order(columns);
      for (int64_t i = 0; i < columns; ++i) order[i] = static_cast<int32_t>(i);
      const auto size = [&](int32_t i) {
        const float value = std::abs(to_float(x[r * columns + i]));
        return std::isnan(value) ? -1.0f : value;
      };
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return size(a) > size(b); });
      order.resize(count);
      std::sort(order.begin(), order.end());
      failures += !std::equal(order.begin(), order.end(), got.begin() + r * count);
    }
  }
}

#include "conv.h"
#include "dots.h"
#include "epilogues.h"
#include "packing.h"

// Patterns with a few numbers replaced, as a hostile file has them: either they are out of bounds by the check, or every
// kernel runs on them without a finding. Returns how many the check let pass.
int try_hostile(const Kernels& k, int64_t tokens, int rounds) {
  const int32_t extremes[] = {INT32_MIN, -1, 0, 1, 29, 30, 31, 127, 128, 200, 32767, 65535, 65536, INT32_MAX};
  auto number = [&] { return extremes[generator() % std::size(extremes)]; };
  int passed = 0;
  for (int round = 0; round < rounds; ++round) {
    const int64_t in = 31, out = 20;
    Data data(tokens, in, out, true);
    std::vector<int32_t> crow{0}, col;
    for (int64_t r = 0; r < out; ++r) {
      for (int64_t c = 0; c < in; ++c)
        if (generator() % 3 == 0) col.push_back(static_cast<int32_t>(c));
      crow.push_back(static_cast<int32_t>(col.size()));
    }
    col.shrink_to_fit();
    std::vector<float> values = random_floats(static_cast<int64_t>(col.size()));
    for (int i = 0; i < 1 + round % 3; ++i) {
      std::vector<int32_t>& part = generator() % 2 ? crow : col;
      part[generator() % part.size()] = number();
    }
    const Csr w{values.data(), crow.data(), col.data()};
    if (csr_in_bounds(w, out, static_cast<int64_t>(col.size()), in, {3, run_tasks})) {
      csr_linear(data.problem, w, k, {3, run_tasks});
      ++passed;
    }
    std::vector<int32_t> list(7 * 9);    // bands of 3 rows, 9 columns each
    for (size_t i = 0; i < list.size(); ++i) list[i] = static_cast<int32_t>(i % 9 * 3);
    list[generator() % list.size()] = number();
    std::vector<float> entries = random_floats(out * 9), gradient(entries.size());
    const Bands u{entries.data(), nullptr, list.data(), out, in, 3, 1, 9};
    if (bands_in_bounds(u, static_cast<int64_t>(list.size()), {3, run_tasks})) {
      bands_linear(data.problem, u, k.dots, k, {3, run_tasks});
      bands_grad_values(data.y.data(), data.x.data(), tokens, in, u, gradient.data(), k, {3, run_tasks});
      bands_grad_input({data.y.data(), nullptr, data.x.data(), tokens, out, in}, u, k, {3, run_tasks});
      const std::vector<float> matrix = random_floats(in * tokens), grad = random_floats(out * tokens);
      std::vector<float> product(out * tokens), weight(in * tokens);
      codes_linear(u, Table<float>{matrix.data(), tokens}, nullptr, product.data(), k, {3, run_tasks});
      codes_grad_values(u, Table<float>{matrix.data(), tokens}, grad.data(), gradient.data(), k, {3, run_tasks});
      codes_grad_weight(u, Table<float>{grad.data(), tokens}, weight.data(), k, {3, run_tasks});
      ++passed;
    }
    const int n = 1 + round % 2;
    const Patterns& order = patterns(n, 4);
    const int64_t count = n == 1 ? 4 : 6, g = 2, width = count * g, chunks = ceil_div(in, width), strips = ceil_div(out, 4);
    std::vector<float> more = random_floats(chunks * strips * width * n), changes(more.size());
    std::vector<int16_t> index(chunks * strips * width);
    for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int16_t>(i % width);
    index[generator() % index.size()] = static_cast<int16_t>(number());
    const Grouped v{more.data(), index.data(), order.rows.data(), order.exchanges.data(), n, 4, static_cast<int>(g),
                    count, chunks, strips};
    if (grouped_in_bounds(v, {3, run_tasks})) {
      grouped_linear(data.problem, v, k.dots.panels, k, {3, run_tasks});
      grouped_grad_values(data.y.data(), data.x.data(), tokens, out, in, v, changes.data(), k, {3, run_tasks});
      grouped_grad_input({data.y.data(), nullptr, data.x.data(), tokens, out, in}, v, k, {3, run_tasks});
      ++passed;
    }
  }
  return passed;
}

void try_all(const Kernels& k) {
  const int groups[][3] = {{1, 10, 8}, {1, 4, 16}, {1, 3, 5}, {2, 4, 8}, {2, 4, 3}, {2, 5, 1},
                           {3, 5, 2},  {4, 8, 4},  {5, 6, 2}, {7, 9, 1}, {4, 4, 3}};
  for (const int64_t tokens : {1, 2, 4, 12, 16, 17, 40, 65, 200})
    for (const auto& size : sizes)
      for (const int threads : {1, 3}) {
        for (const double density : {0.0, 0.1, 0.7, 1.0})
          try_csr(k, tokens, size[0], size[1], density, threads == 1, threads);
        for (const auto& nmg : groups)
          try_grouped(k, tokens, size[0], size[1], nmg[0], nmg[1], nmg[2], threads == 1, threads);
        for (const auto& band : bands)
          try_bands(k, tokens, size[0], size[1], band[0], band[1], 0.4, threads == 1, threads);
        for (const int64_t height : {0, 1, 4, 200}) {
          try_codes<float>(k, tokens, size[0], size[1], height, 0.4, threads);
          try_codes<bf16>(k, tokens, size[0], size[1], height, 0.4, threads);
        }
      }
  try_codes<float>(k, 2, 40, 2500, 0, 0.5, 3);    // several pieces of a row
  try_codes<bf16>(k, 40, 40, 2500, 40, 0.5, 3);
  try_bitmaps<float>(k.dots, k);
  if (const Dots<bf16>* dots = bf16_dots()) try_bf16(*dots, k);
  try_csr(k, 130, 140, 2000, 0.1, true, 3);    // several pieces of rows
  try_grouped(k, 130, 100, 2000, 1, 10, 8, true, 3);
}

// against the definition, bit by bit; each vector ends where its data do
void try_crc32() {
  for (const size_t size : {0, 1, 63, 64, 65, 200, 4096, 70000}) {
    std::vector<unsigned char> data(size);
    for (unsigned char& byte : data) byte = static_cast<unsigned char>(generator());
    uint32_t want = 0;
    for (const unsigned char byte : data) {
      want = ~want ^ byte;
      for (int bit = 0; bit < 8; ++bit) want = (want >> 1) ^ ((want & 1) ? 0xEDB88320 : 0);
      want = ~want;
    }
    failures += has_crc32() && crc32(data.data(), size, 0) != want;
  }
}

}  // namespace

int main() {
  try_crc32();
  for (const int64_t columns : {1, 2, 63, 5000}) {
    try_topk<float>(5, columns, 3);
    try_topk<bf16>(5, columns, 1);
  }
  if (has_instruction_set("amx")) {    // what it does not share with avx512
    set_instruction_set("amx");
    try_bf16(*bf16_dots(), kernels());
  }
  for (const char* name : {"avx512", "avx2", "portable"}) {
    if (!has_instruction_set(name)) continue;
    set_instruction_set(name);
    try_all(kernels());
    try_pack(kernels());
    try_convs(kernels(), 600);
    try_epilogues(kernels());
    int passed = 0;
    for (const int64_t tokens : {1, 5, 64, 200}) passed += try_hostile(kernels(), tokens, 500);
    std::printf("%s: done; %d of 6000 hostile patterns are in bounds\n", name, passed);
  }
  std::printf("%d wrong results\n", failures);
  return failures != 0;
}
