#!/bin/bash
# compute-sanitizer over the tests of the kernels, on a machine with a GPU: memcheck (reads and writes out of
# bounds) and racecheck (shared memory). Memory is not pooled, so that every tensor has bounds of its own; one
# configuration a kernel, so that it ends. Each test function runs by itself, JOBS at a time. PYTHON names the
# interpreter; the logs go to the folder $1 of the repository; FILES are other tests to run.
set -u
cd "$(dirname "$0")/.." || exit
all=$(echo tests/test_triton_{nm,vector_nm,bsr,csr_grouped,finish,codes,above}.py tests/test_cuda_{sources,csr,top_columns}.py)
files=${FILES:-$all}
logs=${1:-build/sanitize}; mkdir -p "$logs"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 STEN_AUTOTUNE=0
check() {  # logs, tool, file::function
    log="$1/$2-${3##*::}-$(basename "${3%%::*}" .py).log"
    compute-sanitizer --tool "$2" --error-exitcode 9 "${PYTHON:-python3}" -m pytest -q -p no:xdist -p no:cacheprovider \
        -k "${KEYWORDS:-not inductor and not graph and not compile and not on_a_cpu}" "$3" > "$log" 2>&1
    code=$?  # pytest's 5: no test of this function is selected
    if [ $code != 0 ] && [ $code != 5 ]; then echo "$code $log"; tail -n 3 "$log"; return 1; fi
}
export -f check
for tool in racecheck memcheck; do  # the slower one first
    for file in $files; do
        grep -o "^def test_[a-z0-9_]*" "$file" | sed "s|^def |$tool $file::|"
    done
done | xargs -P "${JOBS:-8}" -L 1 bash -c 'check "$0" "$1" "$2"' "$logs"
code=$?
grep -h "ERROR SUMMARY\|RACECHECK SUMMARY" "$logs"/*.log | sort | uniq -c
exit $code
