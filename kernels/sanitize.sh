#!/bin/bash
# compute-sanitizer over the tests of the Triton kernels, on a machine with a GPU: memcheck (reads and writes out of
# bounds) and racecheck (shared memory). Memory is not pooled, so that every tensor has bounds of its own; one
# configuration a kernel, so that it ends. PYTHON names the interpreter; the logs go to the folder $1.
set -u
logs=${1:-build/sanitize}; mkdir -p "$logs"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 STEN_AUTOTUNE=0
for tool in memcheck racecheck; do
    for file in tests/test_triton_{vector_nm,bsr,nm,csr_grouped}.py; do
        compute-sanitizer --tool $tool --error-exitcode 9 "${PYTHON:-python3}" -m pytest -q -p no:xdist -p no:cacheprovider \
            -k "${KEYWORDS:-not inductor and not graph}" "$file" > "$logs/$tool-$(basename "$file" .py).log" 2>&1 &
    done
done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
tail -n 2 "$logs"/*.log
exit $failed
