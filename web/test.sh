#!/bin/sh
# Test the web page: the kernels' tests as WebAssembly under node, then the page in headless Chromium. What is missing
# is installed from the system's packages if we may.
set -eu
cd "$(dirname "$0")/.."
web/build.sh
make -s build/quantize
if ! command -v chromedriver >/dev/null 2>&1 || ! /usr/bin/python3 -c 'import selenium' 2>/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "web/test.sh: sudo apt-get install chromium chromium-driver python3-selenium"; exit 1; }
    apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver python3-selenium
fi
export NODE_PATH="${NODE_PATH:-/usr/share/nodejs}"
for simd in -msimd128 -DQWEN3_NO_SIMD; do       # of one file, so that node need not find the other
    emcc -O2 $simd -sSINGLE_FILE -sNODERAWFS -sALLOW_MEMORY_GROWTH -sTOTAL_STACK=2MB -sEXIT_RUNTIME test.c -o build/web/test.js -lm
    for name in cpu parity format gguf sampler; do node --stack-size=4000 build/web/test.js -q -k $name; done
done
rm build/web/test.js
exec /usr/bin/python3 tests/test_web.py "$@"
