#!/bin/sh
# Build the web page into build/web. Emscripten comes from the system's packages; it is installed if it is missing
# and we may. Four programs: one thread, and threads for pages that are cross-origin isolated; with plain SIMD, and with
# relaxed SIMD for browsers that fuse multiplications and additions.
set -eu
cd "$(dirname "$0")/.."
out=build/web
if ! command -v emcc >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || { echo "web/build.sh: emcc is missing: sudo apt-get install emscripten node-acorn"; exit 1; }
    apt-get update -q && apt-get install -y -q --no-install-recommends emscripten node-acorn
fi
NODE_PATH=${NODE_PATH:-/usr/share/nodejs}       # where Debian keeps acorn, which emcc's optimiser wants
export NODE_PATH
mkdir -p "$out/demo"

exports=_malloc,_free,_web_file,_web_file_room,_web_file_data,_web_file_end,_web_load,_web_about,_web_system
exports=$exports,_web_say,_web_step,_web_finish,_web_reset,_web_error
build() {                               # build NAME FLAGS...
    name=$1; shift
    emcc -O3 -std=c99 -Wall -Wextra -msimd128 "$@" -I. web/qwen3_web.c -o "$out/$name.js" \
        -sMODULARIZE -sEXPORT_NAME=Qwen3 -sENVIRONMENT=worker -sFILESYSTEM=0 -sEXPORTED_FUNCTIONS=$exports \
        -sEXPORTED_RUNTIME_METHODS=UTF8ToString,stringToUTF8,lengthBytesUTF8 \
        -sALLOW_MEMORY_GROWTH -sMAXIMUM_MEMORY=4GB -sTOTAL_STACK=1MB
}
threads='-pthread -Wno-pthreads-mem-growth -sPTHREAD_POOL_SIZE=navigator.hardwareConcurrency'
build qwen3
build qwen3_threads $threads
build qwen3_relaxed -mrelaxed-simd
build qwen3_threads_relaxed $threads -mrelaxed-simd
python3 web/relaxed.py "$out/qwen3_relaxed.wasm" "$out/qwen3_threads_relaxed.wasm"
cp web/index.html web/page.js web/worker.js "$out/"
cp demo/*.json demo/system.txt demo/model.safetensors "$out/demo/"
du -ch "$out"/*.js "$out"/*.wasm | tail -1
echo "built $out: python3 web/serve.py shows it"
