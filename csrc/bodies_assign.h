// Choosing GroupedNM's patterns; included by bodies.h, so there is no include guard. Plain loops along columns, which
// the compiler vectorizes: tables have a row for each pattern, one number for each column.

// energy[p, c] = the sum of score[row, c] over the n rows of pattern p
STEN_FN void pattern_energy(const float* __restrict score, const int32_t* rows, int64_t n, int64_t patterns,
                            int64_t columns, float* __restrict energy) {
  for (int64_t p = 0; p < patterns; ++p, rows += n, energy += columns) {
    for (int64_t c = 0; c < columns; ++c) energy[c] = score[rows[0] * columns + c];
    for (int64_t i = 1; i < n; ++i)
      for (int64_t c = 0; c < columns; ++c) energy[c] += score[rows[i] * columns + c];
  }
}

// For each column the best pattern of energy - price, the first of equal ones, and what it and the second best one have.
STEN_FN void best_patterns(const float* __restrict energy, const float* price, int64_t patterns, int64_t columns,
                           float* __restrict best, float* __restrict second, int32_t* __restrict which) {
  for (int64_t c = 0; c < columns; ++c) {
    best[c] = energy[c] - price[0];
    second[c] = -__builtin_inff();
    which[c] = 0;
  }
  for (int64_t p = 1; p < patterns; ++p) {
    const float* __restrict row = energy + p * columns;
    const float cost = price[p];
    const int32_t number = static_cast<int32_t>(p);
    for (int64_t c = 0; c < columns; ++c) {
      const float value = row[c] - cost, held = best[c], next = second[c];
      const bool above = value > held;
      const float lower = above ? held : value;
      second[c] = lower > next ? lower : next;
      best[c] = above ? value : held;
      which[c] = above ? number : which[c];
    }
  }
}

// move[q, p] = the most that any of the g columns of pattern p gains by taking pattern q, who[q, p] the first such column;
// table[q, j, p] is what column j of p has with q
STEN_FN void best_moves(const float* __restrict table, int64_t g, int64_t patterns, float* __restrict own,
                        float* __restrict move, int32_t* __restrict who) {
  for (int64_t p = 0; p < patterns; ++p)
    for (int64_t j = 0; j < g; ++j) own[j * patterns + p] = table[(p * g + j) * patterns + p];
  for (int64_t q = 0; q < patterns; ++q, move += patterns, who += patterns) {
    const float* __restrict row = table + q * g * patterns;
    for (int64_t p = 0; p < patterns; ++p) {
      move[p] = row[p] - own[p];
      who[p] = 0;
    }
    for (int64_t j = 1; j < g; ++j) {
      const float *__restrict has = row + j * patterns, *__restrict had = own + j * patterns;
      const int32_t number = static_cast<int32_t>(j);
      for (int64_t p = 0; p < patterns; ++p) {
        const float gain = has[p] - had[p], held = move[p];
        const bool above = gain > held;
        move[p] = above ? gain : held;
        who[p] = above ? number : who[p];
      }
    }
  }
}
