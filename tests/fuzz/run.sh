#!/usr/bin/env bash
# Fuzz: tests/fuzz/run.sh SECONDS [TARGET...]    (all targets, two at a time; JOBS=1 for one)
# The last line says whether all targets passed; findings are left in build/fuzz/found. BUILD says what is run:
#   scalar   clang's libFuzzer with address and undefined behaviour sanitizer, without the vector kernels (the default)
#   simd     the same with them; target model
#   cuda     models on the CUDA backend, which tests/cuda_on_cpu emulates; target model
#   afl      AFL++ (4.04 or later) with the same sanitizers
# CORPUS=DIR keeps what was learnt there; FUZZER=PROGRAM is one that was built; RUNS=N ends each of libFuzzer's
# targets after so many runs, if the time is not over before.
set -u
cd "$(dirname "$0")/../.."
seconds=${1:?usage: tests/fuzz/run.sh SECONDS [TARGET...]}; shift
build=${BUILD:-scalar}
all='json config generation safetensors index tokenizer vocab encode chat state model gguf fp8 awq gptq compressed quantization schema regex gbnf reply'
case $build in simd|cuda) all=model ;; esac
targets=${*:-$all}
out=build/fuzz; corpus=${CORPUS:-$out/corpus}; fuzzer=${FUZZER:-$out/fuzz-$build}
mkdir -p "$out/found"

compile() {
    local clang=${CC:-clang}
    local flags='-g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=fuzzer,address'
    local libs='-lm -lpthread'
    case $build in
        scalar) $clang $flags,undefined -DQWEN3_NO_SIMD tests/fuzz/fuzz.c -o "$fuzzer" $libs ;;
        simd)   $clang $flags,undefined tests/fuzz/fuzz.c -o "$fuzzer" $libs ;;
        cuda)   $clang $flags -w -std=c++17 -x c++ -Itests/cuda_on_cpu -I. -c qwen3_cuda.cu -o "$out/cuda.o" &&
                $clang $flags,undefined -DQWEN3_NO_SIMD -DFUZZ_CUDA tests/fuzz/fuzz.c "$out/cuda.o" -o "$fuzzer" $libs -lstdc++ ;;
        afl)    AFL_QUIET=1 AFL_USE_ASAN=1 AFL_USE_UBSAN=1 afl-clang-fast -g -O1 -fno-sanitize-recover=all -fsanitize=fuzzer \
                    -DQWEN3_NO_SIMD tests/fuzz/fuzz.c -o "$fuzzer" $libs ;;
        *)      echo "BUILD=$build: unknown" >&2; return 1 ;;
    esac
}
[ -n "${FUZZER:-}" ] || compile || exit 2

libfuzzer() {                           # libfuzzer TARGET DICTIONARY: sets runs, edges; not 0 if something was found
    mkdir -p "$corpus/$1"
    nice -n 10 "$fuzzer" -max_total_time="$seconds" -runs="${RUNS:--1}" -timeout=60 -rss_limit_mb=2048 -max_len=16384 \
        -print_final_stats=1 -artifact_prefix="$out/found/$1-" ${2:+-dict=$2} "$corpus/$1" tests/fuzz/seeds/"$1" >"$log" 2>&1
    local rc=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -1)
    return $rc
}
afl() {                                 # the same with AFL++
    local dir=$out/afl-$1 stats=$out/afl-$1/default/fuzzer_stats
    rm -rf "$dir"
    AFL_NO_UI=1 AFL_SKIP_CPUFREQ=1 AFL_NO_AFFINITY=1 AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES=1 nice -n 10 \
        afl-fuzz -V "$seconds" -i tests/fuzz/seeds/"$1" -o "$dir" ${2:+-x "$2"} -- "$fuzzer" >"$log" 2>&1 || return
    runs=$(sed -n 's/^execs_done *: *//p' "$stats")
    edges=$(sed -n 's/^edges_found *: *//p' "$stats")
    grep -q '^saved_crashes *: 0$' "$stats" && grep -q '^saved_hangs *: 0$' "$stats" && return
    echo "ERROR: crashes or hangs, see $dir" >>"$log"
    return 1
}
one() {                                 # one TARGET: a line about it; not 0 if something was found
    local log=$out/$1.log dict=tests/fuzz/json.dict runs='' edges='' run=libfuzzer
    case $1 in state|model|encode|gguf|fp8|awq|gptq|compressed|regex|gbnf) dict= ;; esac
    [ "$build" = afl ] && run=afl
    if FUZZ_TARGET=$1 $run "$1" "$dict"; then printf 'ok    fuzz %-12s %10s runs, %5s edges\n' "$1" "$runs" "$edges"
    else printf 'FAIL  fuzz %s\n' "$1"; grep -m1 -A12 -E 'ERROR|runtime error|violated|ABORT' "$log"; return 1; fi
}
export -f one libfuzzer afl; export out corpus seconds build fuzzer
printf '%s\n' $targets | xargs -P "${JOBS:-2}" -I{} bash -c 'one {}'
rc=$?
echo "fuzz: $(printf '%s\n' $targets | wc -l) targets, $([ $rc -eq 0 ] && echo all passed || echo FINDINGS in $out/found)"
exit $rc
