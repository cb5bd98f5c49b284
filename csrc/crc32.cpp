// CRC-32 (that of zlib and PNG) by carry-less multiplication.
//
// The message is a polynomial over GF(2), bit-reflected: the lowest bit of the first byte has the highest power. Its CRC
// does not change when 64 bits are replaced by their product with x^d mod P, d bits further on, so four accumulators of
// 128 bits are folded over the message, 512 bits at a time, then into one; what is left is divided bit by bit.
#include "crc32.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sten {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;    // P without x^32, reflected

constexpr uint32_t times_x(uint32_t r) { return (r >> 1) ^ ((r & 1) ? kPolynomial : 0); }

uint32_t divided(const unsigned char* data, size_t size, uint32_t remainder) {
  for (size_t i = 0; i < size; ++i) {
    remainder ^= data[i];
    for (int bit = 0; bit < 8; ++bit) remainder = times_x(remainder);
  }
  return remainder;
}

#if defined(__x86_64__)
// x^n mod P, reflected, one bit up: the product of two reflected numbers lies one bit too low
constexpr int64_t power(int n) {
  uint32_t r = 0x80000000;
  for (; n; --n) r = times_x(r);
  return static_cast<int64_t>(r) << 1;
}

// `from` moved on by the distance of `powers`, x^(d + 32) for its first 64 bits and x^(d - 32) for the others, on `to`
__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i from, __m128i powers, __m128i to) {
  const __m128i first = _mm_clmulepi64_si128(from, powers, 0x00), second = _mm_clmulepi64_si128(from, powers, 0x11);
  return _mm_xor_si128(_mm_xor_si128(first, second), to);
}

__attribute__((target("pclmul,sse4.1"))) inline __m128i load(const unsigned char* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// of a multiple of 64 bytes
__attribute__((target("pclmul,sse4.1"))) uint32_t folded(const unsigned char* data, size_t size, uint32_t remainder) {
  const __m128i far = _mm_set_epi64x(power(512 - 32), power(512 + 32));
  const __m128i near = _mm_set_epi64x(power(128 - 32), power(128 + 32));
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(remainder)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (size_t i = 64; i < size; i += 64) {
    a = fold(a, far, load(data + i));
    b = fold(b, far, load(data + i + 16));
    c = fold(c, far, load(data + i + 32));
    d = fold(d, far, load(data + i + 48));
  }
  d = fold(fold(fold(a, near, b), near, c), near, d);
  unsigned char last[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(last), d);
  return divided(last, 16, 0);
}
#endif

}  // namespace

bool has_crc32() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
#else
  return false;
#endif
}

uint32_t crc32(const unsigned char* data, size_t size, uint32_t before) {
  uint32_t remainder = ~before;
  size_t done = 0;
#if defined(__x86_64__)
  if (size >= 64) {
    done = size / 64 * 64;
    remainder = folded(data, done, remainder);
  }
#endif
  return ~divided(data + done, size - done, remainder);
}

}  // namespace sten
