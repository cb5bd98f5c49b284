// CRC-32 of zlib and PNG; no torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sten {

// Whether this processor multiplies without carries; without that, zlib is faster.
bool has_crc32();

// The CRC-32 of what `before` is the CRC-32 of, followed by `data`; needs has_crc32().
uint32_t crc32(const unsigned char* data, size_t size, uint32_t before);

}  // namespace sten
