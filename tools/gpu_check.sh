#!/bin/sh
# Checks the CUDA backend on a machine with an NVIDIA GPU: builds the tests for its chip, runs them, runs the
# kernel tests under compute-sanitizer, and benches. Logs go to $OUT (default ./gpu_out); a table comes last.
#
#     tools/gpu_check.sh [model directory]
#
# In one call of less than 400 s on an H200: tests, sanitizers, speed of SIZES with single operations and pictures, long
# prompts, batches, and transformers beside ours. QUICK=1 leaves the sanitizers out, VARIANTS="registers cublas late early" compares
# build options with VARIANT_SIZES (0.6B), VARIANT_BATCH (1,16,64) and the single operations of VARIANT_KERNELS (none), COMPARE=
# leaves transformers out, PROOF= what takes up to five minutes more: a fused kernel, PyTorch, RMSNorm's shapes, Nsight Compute.
# LIMIT (seconds, default 60) bounds each of the sanitizers' runs.
OUT=${OUT:-gpu_out}
LIMIT=${LIMIT:-60}
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

# build NAME FLAGS...: build/gpu_check_NAME_test and _bench
build() {
    name=$1; shift
    "$NVCC" -O3 -std=c++17 -lineinfo -gencode "arch=compute_$chip,code=sm_$chip" -Werror all-warnings \
        -Xcompiler -Wall,-Wextra -Xptxas -v "$@" -c qwen3_cuda.cu -o "build/gpu_check_$name.o" || return 1
    for program in test bench; do
        cc -std=c99 -O3 -DQWEN3_WITH_CUDA $program.c "build/gpu_check_$name.o" -o "build/gpu_check_${name}_$program" \
            -L"$CUDA/lib64" -Wl,-rpath,"$CUDA/lib64" -lcublasLt -lcudart -lstdc++ -lm -lpthread || return 1
    done
}
# what is to be compared with the defaults: one row by matrix-vector kernels that keep weights in registers, few rows by
# cuBLASLt, late starts, early starts; of batches: clusters of at most 4 blocks, of at least 4, tiles of 128 or of 64 rows
# alone, products that start after the norm does, attention with two turns of positions on their way, with two heads a
# block, without splits
flags() {
    case $1 in
        cublas)    echo -DQWEN3_CUDA_FEW=0 ;;
        late)      echo -DQWEN3_CUDA_PDL=0 ;;
        early)     echo -DQWEN3_CUDA_PDL=2 ;;
        registers) echo -DQWEN3_CUDA_STREAM=0 ;;
        few_4)     echo -DQWEN3_CUDA_FEW_PARTS=4 ;;
        few_from_4) echo -DQWEN3_CUDA_FEW_LEAST=4 ;;
        few_128)   echo -DQWEN3_CUDA_FEW_M=128 ;;
        few_64)    echo -DQWEN3_CUDA_FEW_M=64 ;;
        norm_late) echo -DQWEN3_CUDA_NORM_EARLY=0 ;;
        turns_2)   echo -DQWEN3_CUDA_SPLIT_TURNS=2 ;;
        heads_2)   echo -DQWEN3_CUDA_SPLIT_HEADS=2 ;;
        splits_1)  echo -DQWEN3_CUDA_BATCH_SPLITS=1 ;;
    esac
}
VARIANTS=${VARIANTS-registers}
for v in $VARIANTS; do ( build $v $(flags $v) ) > "$OUT/build.$v.log" 2>&1 & done
( build plain ) > "$OUT/build.log" 2>&1 || { note build "FAILED: $(grep -m 1 error "$OUT/build.log")"; cat "$OUT/table"; exit 1; }
wait
note build "ok, $(grep -c 'Compiling entry' "$OUT/build.log") kernels, $(grep 'bytes spill stores' "$OUT/build.log" | grep -cv ' 0 bytes spill stores') spill"

run tests 200 build/gpu_check_plain_test -k test_cuda
run stability 120 build/gpu_check_plain_test -v -k stability
for v in $VARIANTS; do run tests.$v 60 build/gpu_check_${v}_test -k test_cuda; done

# bench NAME PROGRAM OPTIONS...: its JSON to bench.NAME.log, the figures to the table
bench() {
    name=$1; program=$2; shift 2
    run "bench.$name" 90 "$program" --cuda --repeat 3 --json "$@"
    python3 tools/plot_bench.py --text "$OUT/bench.$name.log" >> "$OUT/table" 2>&1
}
for size in ${SIZES:-0.6B 1.7B 4B 8B}; do
    bench $size build/gpu_check_plain_bench --random $size --kernels 1@512,64@512,2048 \
        --tests pp512,pp2048,pp8192,pp32768,tg128@512
    python3 tools/plot_bench.py "$OUT/bench.$size.log" -o "$OUT/roofline.$size.svg" -t "$size" >> "$OUT/plot.log" 2>&1
done
for v in $VARIANTS; do
    for size in ${VARIANT_SIZES:-0.6B}; do
        bench $size.$v build/gpu_check_${v}_bench --random $size --tests tg64@512 --batch ${VARIANT_BATCH:-1,16,64} \
            ${VARIANT_KERNELS:+--kernels $VARIANT_KERNELS}
    done
done
bench 0.6B.batch build/gpu_check_plain_bench --random 0.6B --tests tg64@512 --batch 4,16,64
bench 8B.batch build/gpu_check_plain_bench --random 8B --tests tg64@512 --batch 32
bench 0.6B.sample build/gpu_check_plain_bench --random 0.6B --tests tg128@512 --sample
bench 0.6B.standard build/gpu_check_plain_bench --random 0.6B --tests pp2048,tg128@512 --standard
[ -n "$MODEL" ] && bench model build/gpu_check_plain_bench "$MODEL" --first
for size in ${COMPARE-0.6B 8B}; do
    run compare.$size 100 python3 tools/compare_speed.py --bench build/gpu_check_plain_bench --sizes $size --repeat 3
    grep '^| [0-9]' "$OUT/compare.$size.log" | sed 's/^/    /' >> "$OUT/table"
done
for v in $VARIANTS; do run speed.$v 30 build/gpu_check_${v}_test -v -k test_cuda_speed_one; done

# each under a minute
if [ -n "${PROOF-1}" ]; then
    PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
    run proof.build 300 make -s build/bench_fused build/libqwen3_kernels.so NVCC="$NVCC" \
        CUDA_ARCH="-gencode=arch=compute_$chip,code=sm_$chip"
    run proof.fused 60 build/bench_fused --fused-baseline && sed 's/^/    /' "$OUT/proof.fused.log" >> "$OUT/table"
    if "$PYTHON" -c 'import torch' 2>/dev/null; then
        run proof.norm 60 "$PYTHON" tools/compare_torch.py --only norm
        run proof.layers 60 "$PYTHON" tools/compare_torch.py --only layers
        run proof.sweep 60 "$PYTHON" tools/sweep_rmsnorm.py
    else note proof.norm "PyTorch is not here"
    fi
    run proof.profile 60 "$PYTHON" tools/profile_kernels.py --bench build/gpu_check_plain_bench --ncu "${NCU:-$(command -v ncu || echo "$CUDA/bin/ncu")}"
fi

# sanitize TOOL SUITE: the suite with fewer repetitions (-s), each kernel as before. What it finds inside of cuBLAS, whose
# kernels are not named *_kernel, is not ours.
sanitize() {
    log="$OUT/$1.$2.log"
    timeout "$LIMIT" "$SANITIZER" --tool $1 --show-backtrace device build/gpu_check_plain_test -s -k "$2" > "$log" 2>&1
    code=$?
    ours=$(grep -c ' at .*_kernel' "$log")
    if [ $code = 124 ]; then note "$1.$2" "still running after $LIMIT s, stopped"
    elif grep -q FAIL "$log" || ! grep -q ' 0 failed' "$log"; then note "$1.$2" "FAILED: $(grep -m 1 FAIL "$log")"
    elif [ "$ours" != 0 ]; then note "$1.$2" "FAILED: $(grep -m 1 ' at .*_kernel' "$log")"
    else note "$1.$2" "ok$(grep -q 'Race reported\|Uninit' "$log" && echo ' (reports on cuBLAS or copies only: see the log)')"
    fi
}
if [ -z "$QUICK" ] && [ -n "$SANITIZER" ]; then
    for tool in memcheck racecheck initcheck; do
        for suite in kernels_fused kernels_batched kernels_hopper kernels_standard next choose; do
            sanitize $tool test_cuda_$suite &
        done
    done
    wait
elif [ -z "$QUICK" ]; then note sanitizer "compute-sanitizer was not found"
fi
cat "$OUT/table"
! grep -q FAILED "$OUT/table"
