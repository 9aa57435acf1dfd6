#!/bin/sh
# Test the web page: the kernels' tests as WebAssembly under node, and that relaxed SIMD gives the bits of the native
# program, plain SIMD those of plain C; then the page in headless Chromium. What is missing is installed from the
# system's packages if we may.
set -eu
cd "$(dirname "$0")/.."
web/build.sh
make -s build/quantize
if ! command -v chromedriver >/dev/null 2>&1 || ! /usr/bin/python3 -c 'import selenium' 2>/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "web/test.sh: sudo apt-get install chromium chromium-driver python3-selenium"; exit 1; }
    apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver python3-selenium
fi
export NODE_PATH="${NODE_PATH:-/usr/share/nodejs}"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
run_wasm() { node --stack-size=4000 --no-experimental-fetch --experimental-wasm-relaxed-simd "$@"; }   # fetch knows no files
build_wasm() {                          # build_wasm SOURCE FLAGS...
    emcc -std=c99 -O2 -I. -sNODERAWFS -sALLOW_MEMORY_GROWTH -sTOTAL_STACK=2MB -sEXIT_RUNTIME "$@" -o "$dir/program.js" -lm
    case $* in *relaxed*) python3 web/relaxed.py "$dir/program.wasm" ;; esac
}
same_bits() {                           # same_bits "FLAGS OF EMCC" FLAGS OF CC...
    build_wasm tools/logits.c $1
    shift
    cc -std=c99 -O2 -I. "$@" tools/logits.c -o "$dir/native" -lm -lpthread
    "$dir/native" demo "$dir/tokens" "$dir/native.logits"
    run_wasm "$dir/program.js" demo "$dir/tokens" "$dir/wasm.logits"
    cmp "$dir/native.logits" "$dir/wasm.logits"
}
python3 -c 'import array, sys; sys.stdout.buffer.write(array.array("i", [i * i % 300 for i in range(90)]))' >"$dir/tokens"
same_bits -msimd128 -DQWEN3_NO_SIMD && echo 'ok    the bits of plain C'
[ "$(uname -m)" != x86_64 ] || ! grep -q ' fma ' /proc/cpuinfo ||
    { same_bits '-msimd128 -mrelaxed-simd' && echo 'ok    relaxed SIMD: the bits of AVX2 and AVX-512'; }
for simd in -msimd128 '-msimd128 -mrelaxed-simd' -DQWEN3_NO_SIMD; do
    build_wasm test.c $simd
    for name in cpu parity format gguf sampler; do run_wasm "$dir/program.js" -q -k $name; done
done
/usr/bin/python3 tests/test_web.py "$@"
