#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers, without torch, and runs them over odd shapes.
# Fails on any finding and on any wrong result.  Usage: csrc/sanitize/run.sh
set -e
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++20 -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -DSTEN_POISON"
for file in band_linear check codes conv2d crc32 csr_linear grouped_linear isa_avx2 isa_avx512 isa_portable schedule select sanitize/driver; do
  ${CXX:-g++} $flags -c "$file.cpp" -o "$out/$(basename $file).o"
done
${CXX:-g++} $flags "$out"/*.o -pthread -o "$out/driver"
"$out/driver"
