// Activations of finished outputs; included by bodies.h, so there is no include guard. Without branches, so that compilers
// make vectors of the loops; a NaN stays one.

STEN_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
STEN_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// |x|, or `most` if that is less. By integers: of a comparison of numbers compilers make branches, and no vectors.
STEN_INLINE float size_up_to(float x, float most) {
  const uint32_t size = bits_of(x) & 0x7fffffff, limit = bits_of(most);
  return float_of(size < limit ? size : limit);
}

// 2^x within 2e-7 of itself, for x from -126 to 127.
STEN_INLINE float power_of_two(float x) {
  const float shifted = x + 12582912.0f;    // 1.5 * 2^23: the lowest bits are the rounded exponent
  const float r = x - (shifted - 12582912.0f);
  float p = 1.5345812e-4f;    // the polynomial with the least relative error for |r| <= 1/2, 2e-8
  p = p * r + 1.3399931e-3f;
  p = p * r + 9.6184891e-3f;
  p = p * r + 5.5503286e-2f;
  p = p * r + 2.4022646e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000);
}

// y times the normal distribution function, as max(y, 0) less |y| times its upper tail, so that small results keep their
// digits. The tail within 7.5e-8: Abramowitz and Stegun, 26.2.17 without the factor of the density; at 13 it is 1e-38.
STEN_INLINE float gelu(float y) {
  const float size = size_up_to(y, 13.0f), t = 1.0f / (1.0f + 0.2316419f * size);
  float p = 0.5307027145f;
  p = p * t - 0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  return (y < 0.0f ? 0.0f : y) - size * p * t * power_of_two(-0.72134752f * size * size);
}

// y / (1 + 2^-x)
STEN_INLINE float gated(float y, float x) {
  const float near = float_of(bits_of(size_up_to(x, 126.0f)) | (bits_of(x) & 0x80000000));
  return y / (1.0f + power_of_two(-near));
}

// the numbers of `Activation` in epilogue.h
STEN_FN void activate(int activation, float* y, int64_t n) {
  if (activation == 1)
    for (int64_t i = 0; i < n; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
  if (activation == 2)
    for (int64_t i = 0; i < n; ++i) y[i] = gelu(y[i]);
  if (activation == 3)    // y / (1 + e^-2u), tanh(u) of torch's formula
    for (int64_t i = 0; i < n; ++i) y[i] = gated(y[i], 2.3022082f * (y[i] + 0.044715f * y[i] * y[i] * y[i]));
  if (activation == 4)
    for (int64_t i = 0; i < n; ++i) y[i] = gated(y[i], 1.44269504f * y[i]);
}
