// Runs every driver and instruction set over odd shapes without torch, for the sanitizers; see run.sh. Inputs are in
// heap blocks of exactly their size, so that any access beyond them is detected, and scratch memory begins as NaN.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <type_traits>

#include "../crc32.h"
#include "../linear.h"

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

// Compares y with x W^T + bias in double precision, where dense is W, (out, in).
void compare(const char* what, const Problem& p, const std::vector<double>& dense) {
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t r = 0; r < p.out; ++r) {
      double sum = p.bias ? p.bias[r] : 0.0, scale = std::abs(sum);
      for (int64_t k = 0; k < p.in; ++k) {
        const double product = dense[r * p.in + k] * static_cast<double>(p.x[t * p.in + k]);
        sum += product;
        scale += std::abs(product);
      }
      if (std::abs(p.y[t * p.out + r] - sum) <= 2e-6 * scale) continue;
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
        problem{x.data(), biased ? bias.data() : nullptr, y.data(), tokens, in, out} {}
};

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

void try_grouped(const Kernels& k, int64_t tokens, int64_t in, int64_t out, int n, int m, int g, bool biased,
                 int threads) {
  Data data(tokens, in, out, biased);
  const Patterns& order = patterns(n, m);
  const int64_t count = static_cast<int64_t>(order.rows.size()) / n, width = count * g;
  const int64_t chunks = ceil_div(in, width), strips = ceil_div(out, m);
  std::vector<float> values = random_floats(chunks * strips * width * n);
  std::vector<int16_t> index(chunks * strips * width);
  std::vector<double> dense(out * in);
  for (int64_t block = 0; block < chunks * strips; ++block) {
    int16_t* begin = index.data() + block * width;
    for (int64_t i = 0; i < width; ++i) begin[i] = static_cast<int16_t>(i);
    std::shuffle(begin, begin + width, generator);
    for (int64_t slot = 0; slot < width; ++slot)
      for (int i = 0; i < n; ++i) {
        const int64_t row = block % strips * m + order.rows[slot / g * n + i];
        const int64_t column = block / strips * width + begin[slot];
        float& value = values[(block * width + slot) * n + i];
        if (row >= out || column >= in) value = 0.0f;
        else dense[row * in + column] = value;
      }
  }
  const Grouped w{values.data(), index.data(), order.rows.data(), order.exchanges.data(), n, m, g, count, chunks, strips};
  grouped_linear(data.problem, w, k, {threads, run_tasks});
  compare("grouped", data.problem, dense);
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
  bands_linear(data.problem, w, k, {threads, run_tasks});
  compare("bands", data.problem, dense);
  Data back(tokens, out, in, false);
  bands_grad_input(back.problem, w, k, {threads, run_tasks});
  compare("bands, gradient of the input", back.problem, transposed);
  std::vector<float> gradient(values.size());
  bands_grad_values(back.x.data(), data.x.data(), tokens, in, w, gradient.data(), k, {threads, run_tasks});
  for (int64_t i = 0; i < out * in; ++i) {
    if (at[i] < 0) continue;
    double sum = 0.0, scale = 0.0;
    for (int64_t t = 0; t < tokens; ++t) {
      const double product = static_cast<double>(back.x[t * out + i / in]) * data.x[t * in + i % in];
      sum += product;
      scale += std::abs(product);
    }
    if (std::abs(gradient[at[i]] - sum) <= 2e-6 * scale) continue;
    std::printf("bands, gradient of the values: %g instead of %g\n", gradient[at[i]], sum);
    ++failures;
    return;
  }
}

float to_float(float a) { return a; }
float to_float(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

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

// y against x W^T + bias, dense (out, in); rounded to 8 bits if E is bf16.
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
      const double error = std::abs(to_float(p.y[t * p.out + r]) - sum);
      if (error <= 2e-6 * scale + (std::is_same_v<E, bf16> ? std::abs(sum) / 256 : 0.0)) continue;
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
        problem{x.data(), biased ? bias.data() : nullptr, y.data(), tokens, in, out} {}
};

// NM: a bitmap, or positions of `bits` bits; with `hostile`, of random bytes, where no result is compared.
template <typename E>
void try_bitmap(const Dots<E>& dots, int64_t tokens, int64_t in, int64_t out, int n, int m, int bits, bool hostile,
                int threads) {
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
  bitmap_linear(data.problem, w, dots, pool);
  bitmap_expand(w, in, dots, expanded.data(), pool);
  bitmap_collect(w, in, expanded.data(), dots, collected.data(), pool);
  if (hostile) return;
  compare_dots("bitmap", data.problem, dense);
  for (int64_t i = 0; i < out * in; ++i) failures += to_float(expanded[i]) != dense[i];
  for (size_t i = 0; i < values.size(); ++i) failures += to_float(collected[i]) != to_float(values[i]);
}

// Lists (width 0) or blocks in bfloat16.
void try_bf16_bands(const Dots<bf16>& dots, int64_t tokens, int64_t in, int64_t out, int64_t height, int64_t width,
                    int threads) {
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
  dots_linear(data.problem, w, dots, {threads, run_tasks});
  compare_dots("bands of bfloat16", data.problem, dense);
}

template <typename E>
void try_bitmaps(const Dots<E>& dots) {
  const int layouts[][3] = {{16, 32, 1}, {5, 16, 1}, {2, 8, 1}, {32, 32, 1}, {2, 4, 2}, {1, 4, 2}, {1, 1, 2},
                            {3, 7, 4},   {1, 16, 4}, {3, 32, 8}, {9, 64, 8}};
  const int64_t sizes[][2] = {{1, 1}, {17, 3}, {64, 70}, {130, 63}, {300, 5}};
  for (const int64_t tokens : {1, 2, 3, 6, 49})
    for (const auto& size : sizes)
      for (const int threads : {1, 3})
        for (const auto& nm : layouts)
          for (const bool hostile : {false, true})
            try_bitmap<E>(dots, tokens, size[0], size[1], nm[0], nm[1], nm[2], hostile, threads);
}

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
      bands_linear(data.problem, u, k, {3, run_tasks});
      bands_grad_values(data.y.data(), data.x.data(), tokens, in, u, gradient.data(), k, {3, run_tasks});
      bands_grad_input({data.y.data(), nullptr, data.x.data(), tokens, out, in}, u, k, {3, run_tasks});
      ++passed;
    }
    const Patterns& order = patterns(2, 4);
    const int64_t count = 6, g = 2, width = count * g, chunks = ceil_div(in, width), strips = ceil_div(out, 4);
    std::vector<float> more = random_floats(chunks * strips * width * 2);
    std::vector<int16_t> index(chunks * strips * width);
    for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int16_t>(i % width);
    index[generator() % index.size()] = static_cast<int16_t>(number());
    const Grouped v{more.data(), index.data(), order.rows.data(), order.exchanges.data(), 2, 4, static_cast<int>(g),
                    count, chunks, strips};
    if (grouped_in_bounds(v, {3, run_tasks})) {
      grouped_linear(data.problem, v, k, {3, run_tasks});
      ++passed;
    }
  }
  return passed;
}

void try_all(const Kernels& k) {
  const int64_t sizes[][2] = {{1, 1}, {17, 3}, {3, 63}, {100, 37}, {63, 130}, {300, 65}, {0, 5}, {5, 0}};
  const int groups[][3] = {{1, 10, 8}, {1, 4, 16}, {1, 3, 5}, {2, 4, 8}, {2, 4, 3}, {2, 5, 1},
                           {3, 5, 2},  {4, 8, 4},  {5, 6, 2}, {7, 9, 1}, {4, 4, 3}};
  const int bands[][2] = {{1, 0}, {3, 0}, {8, 0}, {9, 0}, {500, 0}, {1, 1}, {4, 3}, {16, 16}, {9, 40}};
  for (const int64_t tokens : {1, 2, 4, 12, 16, 17, 40, 65, 200})
    for (const auto& size : sizes)
      for (const int threads : {1, 3}) {
        for (const double density : {0.0, 0.1, 0.7, 1.0})
          try_csr(k, tokens, size[0], size[1], density, threads == 1, threads);
        for (const auto& nmg : groups)
          try_grouped(k, tokens, size[0], size[1], nmg[0], nmg[1], nmg[2], threads == 1, threads);
        for (const auto& band : bands)
          try_bands(k, tokens, size[0], size[1], band[0], band[1], 0.4, threads == 1, threads);
      }
  try_bitmaps<float>(k.dots);
  if (const Dots<bf16>* dots = bf16_dots()) {
    try_bitmaps<bf16>(*dots);
    for (const int64_t tokens : {1, 2, 7, 50})
      for (const auto& size : sizes)
        for (const int threads : {1, 3})
          for (const auto& band : bands)
            try_bf16_bands(*dots, tokens, size[0], size[1], band[0], band[1], threads);
  }
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
  for (const char* name : {"avx512", "avx2", "portable"}) {
    if (!has_instruction_set(name)) continue;
    set_instruction_set(name);
    try_all(kernels());
    int passed = 0;
    for (const int64_t tokens : {1, 5, 64, 200}) passed += try_hostile(kernels(), tokens, 500);
    std::printf("%s: done; %d of 6000 hostile patterns are in bounds\n", name, passed);
  }
  std::printf("%d wrong results\n", failures);
  return failures != 0;
}
