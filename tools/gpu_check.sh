#!/bin/sh
# Checks the CUDA backend on a machine with an NVIDIA GPU: builds the tests for its chip, runs them, runs the
# kernel tests under compute-sanitizer, and benches. Logs go to $OUT (default ./gpu_out); a table comes last.
#
#     tools/gpu_check.sh [model directory]
#
# STAGES names what runs, all by default, in less than 400 s on an H200:
#     tests        of the kernels, and of numerical stability
#     bench        speed of SIZES (0.6B 1.7B 4B 8B) with single operations and pictures, long prompts, batches
#     compare      transformers beside ours, COMPARE sizes (0.6B 8B)
#     proof        a fused kernel, PyTorch, RMSNorm's shapes, Nsight Compute; up to five minutes more
#     sanitizers   LIMIT (150) seconds for each of 27 runs, all at once; SUITES names fewer
# QUICK=1 leaves the sanitizers out, COMPARE=, PROOF= and PROFILE= (Nsight Compute) those. Two more stages must be asked for;
# with STAGES= they run alone. They need a PYTHON (python3) with PyTorch and transformers:
#     SHAPES="0.6B 1.7B 4B 8B" MKMODEL=mkmodel.py
#         logits and 200 tokens of models of these sizes beside transformers in float32, and the time to the first token.
#         `mkmodel.py SIZE DIRECTORY --format hf $MKARGS` (--hot-knorm) makes one, with random weights in bfloat16; all at once in
#         TMPDIR (29 GB for these four, 10 more for FLOAT32="0.6B 1.7B", those whose float32 copies are compared, too).
#     DEMO=1
#         the demo's scores on the GPU in DIALOGUES (500), its words beside the CPU's and transformers'
# DEVICE (cuda) is where transformers runs.
OUT=${OUT:-gpu_out}
LIMIT=${LIMIT:-150}
STAGES=${STAGES-tests bench compare proof sanitizers}
NVCC=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
CUDA=$(dirname "$(dirname "$(realpath "$NVCC")")")
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || ls "$CUDA"/bin/compute-sanitizer /opt/nvidia/*/*/compute-sanitizer 2>/dev/null | head -n 1)}
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
DEVICE=${DEVICE:-cuda}
MODEL=$1
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT" build || exit 1
: > "$OUT/table"

note() { printf '%-28s %s\n' "$1" "$2" >> "$OUT/table"; }
wanted() { case " $STAGES " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# run NAME SECONDS COMMAND...: its output to NAME.log, its result and time to the table. In a subshell, so that no name
# of its own is another's.
run() (
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
    exit $code
)
# show NAME PATTERN: such lines of a log to the table
show() { grep -E "$2" "$OUT/$1.log" | sed 's/^/    /' >> "$OUT/table"; }

chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
[ -n "$chip" ] || { echo "no GPU: nvidia-smi names none" >&2; exit 2; }
[ "$chip" = 90 ] && chip=90a
note "GPU" "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n 1), sm_$chip"

if [ -n "$SHAPES" ]; then              # they take their time; the build and the tests go on meanwhile
    [ -f "$MKMODEL" ] || { echo "SHAPES needs MKMODEL, a program that makes models: '$MKMODEL' is no file" >&2; exit 2; }
    work=$(mktemp -d "${TMPDIR:-/tmp}/gpu_check.XXXXXX") || exit 1
    trap 'kill $(cat "$work"/*.pid) 2>/dev/null; rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    for size in $SHAPES; do
        timeout 400 "$PYTHON" "$MKMODEL" "$size" "$work/$size" --format hf ${MKARGS---hot-knorm} > "$OUT/make.$size.log" 2>&1 &
        echo $! > "$work/$size.pid"
    done
fi

# compile NAME FLAGS...: the kernels, build/gpu_check_NAME.o
compile() (
    name=$1; shift
    "$NVCC" -O3 -std=c++17 -lineinfo -gencode "arch=compute_$chip,code=sm_$chip" -Werror all-warnings \
        -Xcompiler -Wall,-Wextra -Xptxas -v "$@" -c tests/cuda_lab.cu -o "build/gpu_check_$name.o"
)
# host SOURCE: a program's own side, build/gpu_check.PROGRAM.o
host() { cc -std=c99 -O3 -I. -DQWEN3_WITH_CUDA -c "$1" -o "build/gpu_check.$(basename "$1" .c).o"; }
# link NAME PROGRAM: build/gpu_check_NAME_PROGRAM
link() {
    cc "build/gpu_check.$2.o" "build/gpu_check_$1.o" -o "build/gpu_check_$1_$2" \
        -L"$CUDA/lib64" -Wl,-rpath,"$CUDA/lib64" -lcublasLt -lcudart -lstdc++ -lm -lpthread
}
started=
rm -f build/gpu_check*.o
for source in test.c bench.c example.c tools/logits.c; do
    host $source > "$OUT/build.$(basename $source).log" 2>&1 &
    started="$started $!"
done
compile plain > "$OUT/build.log" 2>&1
wait $started
link_all() {
    for program in test bench example logits; do link plain $program || return 1; done
}
link_all >> "$OUT/build.log" 2>&1 ||
    { note build "FAILED: $(cat "$OUT"/build*.log | grep -m 1 error)"; cat "$OUT/table"; exit 1; }
note build "ok, $(grep -c 'Compiling entry' "$OUT/build.log") kernels, $(grep 'bytes spill stores' "$OUT/build.log" | grep -cv ' 0 bytes spill stores') spill, $(
    grep 'bytes stack frame' "$OUT/build.log" | grep -cv ' 0 bytes stack frame') have arrays in memory"

if wanted tests; then
    run tests 200 build/gpu_check_plain_test -k test_cuda
    run stability 120 build/gpu_check_plain_test -v -k stability
fi

# bench NAME PROGRAM OPTIONS...: its JSON to bench.NAME.log, the figures to the table
bench() (
    name=$1; program=$2; shift 2
    run "bench.$name" 90 "$program" --cuda --repeat 3 --json "$@"
    code=$?
    "$PYTHON" tools/plot_bench.py --text "$OUT/bench.$name.log" >> "$OUT/table" 2>&1
    exit $code
)

# ---- models of real sizes beside transformers; on Hopper 264 rows, 64 and 1 go through different kernels ----------------------
if [ -n "$SHAPES" ]; then
    export TMPDIR="$work"
    for size in $SHAPES; do
        wait "$(cat "$work/$size.pid")" || { note "shape.$size" "FAILED to make the model: $(tail -n 1 "$OUT/make.$size.log")"; continue; }
        case " ${FLOAT32-0.6B 1.7B} " in *" $size "*) float32='--kv f32 --step 64' ;; *) float32= ;; esac
        run shape.$size 150 "$PYTHON" tools/check_model.py "$work/$size" --program build/gpu_check_plain_logits --args=--cuda \
            --device "$DEVICE" --tokens 64 --generate 200 --rounded='--kv f16 --step 264' --rounded='--kv f16 --step 64' \
            --rounded='--kv f16 --step 1' --rounded='--kv f32 --step 264' --rounded='--kv f32 --step 64' \
            --rounded='--kv f16 --step 64 --standard' --exact='--kv f32 --step 1' ${float32:+--float32="$float32"}
        show shape.$size '^(ok|FAILED|rounding) |positions|generated'
        for time in 1 2; do bench first.$size.$time build/gpu_check_plain_bench "$work/$size" --first --tests ''; done
        rm -rf "${work:?}/$size"
    done
fi

# ---- the demo ------------------------------------------------------------------------------------------------
if [ -n "$DEMO" ]; then
    if "$PYTHON" -c 'import torch, transformers' 2>/dev/null; then
        demo() (
            name=$1; shift
            run "$name" 120 "$PYTHON" tools/eval_demo.py --engine build/gpu_check_plain_example --args=--cuda "$@"
            code=$?
            show "$name" '^\||dialogues: |^  (one|other|apart) '
            exit $code
        )
        demo demo.score --jobs "${JOBS:-16}" --count "${DIALOGUES:-500}"
        demo demo.cpu --jobs "${JOBS:-16}" --compare "${DIALOGUES:-500}" --with build/gpu_check_plain_example --with-args='--cpu --threads 1' --device "$DEVICE"
        demo demo.transformers --jobs 4 --compare 50 --device "$DEVICE"
    else note demo "FAILED: $PYTHON has no torch and transformers"
    fi
fi

# ---- speed -----------------------------------------------------------------------------------------------------
if wanted bench; then
    for size in ${SIZES-0.6B 1.7B 4B 8B}; do
        bench $size build/gpu_check_plain_bench --random $size --kernels 1@512,64@512,2048 \
            --tests pp512,pp2048,pp8192,pp32768,tg128@512
        "$PYTHON" tools/plot_bench.py "$OUT/bench.$size.log" -o "$OUT/roofline.$size.svg" -t "$size" >> "$OUT/plot.log" 2>&1
    done
    bench 0.6B.batch build/gpu_check_plain_bench --random 0.6B --tests tg64@512 --batch 4,16,64
    bench 8B.batch build/gpu_check_plain_bench --random 8B --tests tg64@512 --batch 32
    bench 0.6B.sample build/gpu_check_plain_bench --random 0.6B --tests tg128@512 --sample
    bench 0.6B.standard build/gpu_check_plain_bench --random 0.6B --tests pp2048,tg128@512 --standard
    [ -z "$MODEL" ] || bench model build/gpu_check_plain_bench "$MODEL" --first
fi
if wanted compare; then
    for size in ${COMPARE-0.6B 8B}; do
        run compare.$size 150 "$PYTHON" tools/compare_speed.py --bench build/gpu_check_plain_bench --sizes $size --repeat 10
        show compare.$size '^\| [0-9]'
    done
fi

# each under a minute but the last
if wanted proof && [ -n "${PROOF-1}" ]; then
    run proof.build 300 make -s build/bench_fused build/libqwen3_kernels.so NVCC="$NVCC" \
        CUDA_ARCH="-gencode=arch=compute_$chip,code=sm_$chip"
    run proof.fused 60 build/bench_fused --fused-baseline && show proof.fused .
    if "$PYTHON" -c 'import torch' 2>/dev/null; then
        run proof.norm 60 "$PYTHON" tools/compare_torch.py --only norm
        run proof.layers 60 "$PYTHON" tools/compare_torch.py --only layers
        run proof.sweep 60 "$PYTHON" tools/sweep_rmsnorm.py
    else note proof.norm "PyTorch is not here"
    fi
    [ -z "${PROFILE-1}" ] || run proof.profile 150 "$PYTHON" tools/profile_kernels.py --sizes 0.6B,8B --bench build/gpu_check_plain_bench --ncu "${NCU:-$(command -v ncu || echo "$CUDA/bin/ncu")}"
fi

# sanitize TOOL SUITE: the suite with fewer repetitions (-s), each kernel as before. What it finds inside of cuBLAS, whose
# kernels are not named *_kernel, is not ours.
sanitize() (
    log="$OUT/$1.$2.log"
    timeout "$LIMIT" "$SANITIZER" --tool $1 --show-backtrace device build/gpu_check_plain_test -s -k "$2" > "$log" 2>&1
    code=$?
    ours=$(grep -c ' at .*_kernel' "$log")
    if [ $code = 124 ]; then note "$1.$2" "still running after $LIMIT s, stopped"
    elif grep -q FAIL "$log" || ! grep -q ' 0 failed' "$log"; then note "$1.$2" "FAILED: $(grep -m 1 FAIL "$log")"
    elif [ "$ours" != 0 ]; then note "$1.$2" "FAILED: $(grep -m 1 ' at .*_kernel' "$log")"
    else note "$1.$2" "ok$(grep -q 'Race reported\|Uninit' "$log" && echo ' (reports on cuBLAS or copies only: see the log)')"
    fi
)
if ! wanted sanitizers || [ -n "$QUICK" ]; then :
elif [ -n "$SANITIZER" ]; then
    for tool in memcheck racecheck initcheck; do
        for suite in ${SUITES:-kernels_fused kernels_one kernels_clusters kernels_batched kernels_hopper kernels_standard layer next \
                               choose}; do
            sanitize $tool test_cuda_$suite &
        done
    done
    wait
else note sanitizer "compute-sanitizer was not found"
fi
cat "$OUT/table"
! grep -qE 'FAILED|still running' "$OUT/table"
