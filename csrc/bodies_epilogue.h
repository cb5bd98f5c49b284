// Activations of finished outputs; included by bodies.h, so there is no include guard. Without branches, so that compilers
// make vectors of the loops; a NaN stays one.

// e^x within 2e-7 of itself from -87 to 88, and constant beyond: Cephes' polynomial.
STEN_INLINE float exponential(float x) {
  const float near = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = near * 1.44269504f + 12582912.0f;    // 1.5 * 2^23: the lowest bits are the rounded exponent
  const float n = shifted - 12582912.0f;
  const float r = near - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// y (1 + erf(y / sqrt 2)) / 2 as y less y erfc / 2, so that small results keep their digits; erfc within 1.5e-7:
// Abramowitz and Stegun, 7.1.26.
STEN_INLINE float gelu(float y) {
  const float size = y < 0.0f ? -y : y, near = size > 20.0f ? 20.0f : size, a = near * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return (y < 0.0f ? 0.0f : y) - 0.5f * near * p * t * exponential(-a * a);
}

// the numbers of `Activation` in epilogue.h
STEN_FN void activate(int activation, float* y, int64_t n) {
  if (activation == 1)
    for (int64_t i = 0; i < n; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
  if (activation == 2)
    for (int64_t i = 0; i < n; ++i) y[i] = gelu(y[i]);
  if (activation == 3)
    for (int64_t i = 0; i < n; ++i)
      y[i] = y[i] / (1.0f + exponential(-1.5957691216f * (y[i] + 0.044715f * y[i] * y[i] * y[i])));
  if (activation == 4)
    for (int64_t i = 0; i < n; ++i) y[i] = y[i] / (1.0f + exponential(-y[i]));
}

