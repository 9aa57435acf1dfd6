#!/bin/sh
# Checks the CUDA backend on a machine with an NVIDIA GPU: builds the tests for its chip, runs them, runs the
# kernel tests under compute-sanitizer, and benches. Logs go to $OUT (default ./gpu_out); a table comes last.
#
#     tools/gpu_check.sh [model directory]
#
# QUICK=1 leaves the sanitizer out. LIMIT (seconds, default 150) bounds each of its runs.
OUT=${OUT:-gpu_out}
LIMIT=${LIMIT:-150}
NVCC=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
CUDA=$(dirname "$(dirname "$(realpath "$NVCC")")")
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || ls "$CUDA"/bin/compute-sanitizer /opt/nvidia/*/*/compute-sanitizer 2>/dev/null | head -n 1)}
MODEL=$1
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT" build || exit 1
: > "$OUT/table"

note() { printf '%-28s %s\n' "$1" "$2" >> "$OUT/table"; }

# run NAME SECONDS COMMAND...: its output to NAME.log, its result and time to the table
run() {
    name=$1; seconds=$2; shift 2
    start=$(date +%s)
    timeout "$seconds" "$@" > "$OUT/$name.log" 2>&1
    code=$?
    took=$(($(date +%s) - start))
    case $code in
        0)   note "$name" "ok, ${took} s" ;;
        124) note "$name" "still running after ${took} s, stopped: $(tail -n 1 "$OUT/$name.log")" ;;
        *)   note "$name" "FAILED ($code), ${took} s: $(grep -m 1 -E 'FAIL|ERROR|error|[0-9]+ failed' "$OUT/$name.log" || tail -n 1 "$OUT/$name.log")" ;;
    esac
    return $code
}

chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
[ -n "$chip" ] || { echo "no GPU: nvidia-smi names none" >&2; exit 2; }
[ "$chip" = 90 ] && chip=90a
note "GPU" "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n 1), sm_$chip"

build() {
    "$NVCC" -O3 -std=c++17 -lineinfo -gencode "arch=compute_$chip,code=sm_$chip" -Werror all-warnings \
        -Xcompiler -Wall,-Wextra -Xptxas -v -c qwen3_cuda.cu -o build/gpu_check_cuda.o &&
    for program in test bench; do
        if [ -f $program.c ]; then
            cc -std=c99 -O3 -DQWEN3_WITH_CUDA $program.c build/gpu_check_cuda.o -o build/gpu_check_$program \
                -L"$CUDA/lib64" -Wl,-rpath,"$CUDA/lib64" -lcublasLt -lcudart -lstdc++ -lm -lpthread || return 1
        fi
    done
}
( build ) > "$OUT/build.log" 2>&1 || { note build "FAILED: $(grep -m 1 error "$OUT/build.log")"; cat "$OUT/table"; exit 1; }
note build "ok, $(grep -c 'Compiling entry' "$OUT/build.log") kernels, $(grep 'bytes spill stores' "$OUT/build.log" | grep -cv ' 0 bytes spill stores') spill"

run tests 300 build/gpu_check_test -v -k test_cuda
if [ -z "$QUICK" ] && [ -n "$SANITIZER" ]; then
    for tool in memcheck racecheck initcheck; do
        for suite in test_cuda_kernels_fused test_cuda_kernels_batched test_cuda_kernels_standard test_cuda_next test_cuda_choose; do
            run "$tool.$suite" "$LIMIT" "$SANITIZER" --tool $tool --error-exitcode 9 build/gpu_check_test -k "$suite"
        done
    done
elif [ -z "$QUICK" ]; then note sanitizer "compute-sanitizer was not found"
fi
if [ -x build/gpu_check_bench ] && [ -n "$MODEL" ]; then run bench 300 build/gpu_check_bench --cuda "$MODEL"; fi
cat "$OUT/table"
! grep -q FAILED "$OUT/table"
