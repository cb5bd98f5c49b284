#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers, without torch, and runs them over odd shapes.
# Fails on any finding and on any wrong result.  Usage: csrc/sanitize/run.sh
# CXX names another compiler (CXX="clang++"), CXXFLAGS more flags; PLAIN=1 builds without the sanitizers.
set -e
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++17 -O1 -g1 -fno-omit-frame-pointer -DSTEN_POISON $CXXFLAGS"
flags="$flags -DSTEN_TILES=\"$PWD/../tests/tiles_emulated.h\"" # any processor with AVX512_BF16 runs what AMX does
[ -n "$PLAIN" ] || flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all"
for file in $(ls -- *.cpp | grep -v "^module\|^register") sanitize/driver.cpp; do  # what knows nothing of torch
  ${CXX:-g++} $flags -c "$file" -o "$out/$(basename "$file" .cpp).o"
done
${CXX:-g++} $flags "$out"/*.o -pthread -o "$out/driver"
"$out/driver"
