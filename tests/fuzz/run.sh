#!/usr/bin/env bash
# Fuzz: tests/fuzz/run.sh SECONDS [TARGET...]    (all targets, two at a time; JOBS=1 for one)
# Builds with clang's libFuzzer, address and undefined behaviour sanitizer, without the vector kernels (it
# would take clang minutes to instrument them). The last line says whether all targets passed; findings are
# left in build/fuzz/found. CORPUS=DIR keeps what was learnt there; FUZZER=PROGRAM is one that was
# built; RUNS=N ends each target after so many runs, if the time is not over before.
set -u
cd "$(dirname "$0")/../.."
seconds=${1:?usage: tests/fuzz/run.sh SECONDS [TARGET...]}; shift
all='json config generation safetensors index tokenizer vocab encode chat state model'
targets=${*:-$all}
out=build/fuzz; corpus=${CORPUS:-$out/corpus}
mkdir -p "$out/found"
[ -n "${FUZZER:-}" ] || ${CC:-clang} -g -O1 -DQWEN3_NO_SIMD -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
    tests/fuzz/fuzz.c -o "$out/fuzz" -lm -lpthread || exit 2

one() {                                 # one TARGET: a line about it; not 0 if something was found
    local target=$1 log=$out/$1.log dict=
    mkdir -p "$corpus/$target"
    case $target in
        state|model|encode) ;;
        *) dict=-dict=tests/fuzz/json.dict ;;
    esac
    FUZZ_TARGET=$target nice -n 10 "${FUZZER:-$out/fuzz}" -max_total_time="$seconds" -runs="${RUNS:--1}" -timeout=60 -rss_limit_mb=2048 -max_len=16384 \
        -print_final_stats=1 -artifact_prefix="$out/found/$target-" $dict "$corpus/$target" tests/fuzz/seeds/"$target" >"$log" 2>&1
    local rc=$? runs edges
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -1)
    if [ $rc -eq 0 ]; then printf 'ok    fuzz %-12s %10s runs, %5s edges\n' "$target" "$runs" "$edges"
    else printf 'FAIL  fuzz %s\n' "$target"; grep -m1 -A12 -E 'ERROR|runtime error|violated' "$log"; fi
    return $rc
}
export -f one; export out corpus seconds
printf '%s\n' $targets | xargs -P "${JOBS:-2}" -I{} bash -c 'one {}'
rc=$?
echo "fuzz: $(printf '%s\n' $targets | wc -l) targets, $([ $rc -eq 0 ] && echo all passed || echo FINDINGS in $out/found)"
exit $rc
