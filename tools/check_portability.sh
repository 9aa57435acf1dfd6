#!/usr/bin/env bash
# Does qwen3.h compile without a warning wherever it is dropped, and do the tests pass there?
#     tools/check_portability.sh [part-of-a-name]
# One line a check; the last says how many passed. No program takes more than LIMIT seconds of processor time, no check
# more than four times that. As root on Debian it installs what is missing.
set -u -a                               # -a: what is defined here is known to the shells that the checks run in
cd "$(dirname "$0")/.."
only=${1:-}
LIMIT=${LIMIT:-900}
passed=0; failed=0; skipped=0; tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
WARN='-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror'

have() { command -v "$1" >/dev/null 2>&1; }
need() {                                # need COMMAND PACKAGE...: is the command there, perhaps only now?
    local command=$1; shift
    have "$command" && return 0
    [ "$(id -u)" = 0 ] && have apt-get || return 1
    [ -e "$tmp/updated" ] || apt-get update -q >"$tmp/updated" 2>&1
    apt-get install -y -q --no-install-recommends "$@" >/dev/null 2>&1
    have "$command"
}
check() {                               # check NAME COMMAND...
    local name=$1 start=$SECONDS; shift
    case $name in *"$only"*) ;; *) return ;; esac
    if timeout -k 5 $((4 * LIMIT)) bash -c 'ulimit -t "$LIMIT"; "$@"' - "$@" >"$tmp/log" 2>&1; then
        passed=$((passed + 1))
        printf 'ok    %-50s %4d s\n' "$name" $((SECONDS - start))
    else
        failed=$((failed + 1))
        printf 'FAIL  %-50s %4d s\n' "$name" $((SECONDS - start))
        tail -20 "$tmp/log"
    fi
}
skip() {                                # skip NAME WHY
    case $1 in *"$only"*) skipped=$((skipped + 1)); printf 'skip  %s: %s\n' "$1" "$2" ;; esac
}

# ---- no warnings -------------------------------------------------------------------------------------
strict() {                              # strict COMPILER STANDARD FLAGS...: the implementation and the API alone
    local cc=$1 std=$2 lang=c; shift 2
    case $std in *++*) lang=c++ ;; esac
    "$cc" -std="$std" -x $lang $WARN "$@" -DQWEN3_IMPLEMENTATION -c qwen3.h -o "$tmp/strict.o" &&
    "$cc" -std="$std" -x $lang $WARN "$@" -c qwen3.h -o "$tmp/api.o"
}
# gcc-multilib would do, too, but on Debian it cannot be installed beside compilers for other processors
M32='-m32 -isystem /usr/include/x86_64-linux-gnu'
echo 'int main(void) { return 0; }' >"$tmp/empty.c"
has_m32() { "$1" $M32 "$tmp/empty.c" -o "$tmp/empty" 2>/dev/null; }
has_m32 gcc || need none libc6-dev-i386 lib32gcc-12-dev lib32stdc++-12-dev
need clang clang
for cc in gcc clang; do
    have $cc || { skip "strict $cc" 'not installed'; continue; }
    for std in c99 c11 c17 c2x c++11 c++17 c++20; do
        check "strict $cc $std -O2" strict $cc $std -O2
    done
    for std in c99 c++11; do
        check "strict $cc $std -O0" strict $cc $std -O0
        check "strict $cc $std -O3 -ffast-math" strict $cc $std -O3 -ffast-math
        check "strict $cc $std bare" strict $cc $std -O2 -DQWEN3_NO_STDIO -DQWEN3_NO_THREADS -DQWEN3_NO_SIMD
    done
    if has_m32 $cc; then
        for std in c99 c++11; do check "strict $cc $std -m32" strict $cc $std -O2 $M32; done
    else skip "strict $cc -m32" 'no 32-bit headers'; fi
done

# ---- as a library --------------------------------------------------------------------------------------
exports() {                             # nothing but qwen3_...
    gcc -O1 -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o "$tmp/lib.o" || return 1
    ! nm -g --defined-only "$tmp/lib.o" | awk '{print $3}' | grep -v '^qwen3_'
}
two_files() {                           # two private copies in one program, each with an allocator of its own
    local i
    for i in 1 2; do
        cat >"$tmp/$i.c" <<END
#include <stddef.h>
static void *take(size_t size);
static void give(void *p);
#define QWEN3_MALLOC(size) take(size)
#define QWEN3_FREE(p)      give(p)
#define QWEN3_STATIC
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
int copy_$i(const char *path);
static long taken, live;
static void *take(size_t size) {        /* 64 bytes in from where malloc says, or 128: the other could not free it */
    char *p = (char *)malloc(size + 64 * $i);
    if (!p) return NULL;
    taken++;
    live++;
    return p + 64 * $i;
}
static void give(void *p) {
    if (!p) return;
    live--;
    free((char *)p - 64 * $i);
}
int copy_$i(const char *path) {         /* the token after 1, or less than 0 */
    qwen3_load_desc desc;
    qwen3_model *model;
    qwen3_ctx *ctx = NULL;
    qwen3_token t = 1;
    memset(&desc, 0, sizeof desc);
    desc.path = path;
    if (qwen3_load(&model, &desc, NULL, 0) != QWEN3_OK || qwen3_ctx_create(&ctx, model, NULL, NULL, 0) != QWEN3_OK) return -1;
    if (qwen3_sync(ctx, 0, &t, 1, 0) != QWEN3_OK || qwen3_next(ctx, 0, NULL, &t) < 0) return -2;
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return taken > 10 && live == 0 ? (int)t : -3;
}
END
        gcc -std=c99 $WARN -O1 -I. -c "$tmp/$i.c" -o "$tmp/$i.o" || return 1
        ! nm -g --defined-only "$tmp/$i.o" | grep qwen3 || { echo 'QWEN3_STATIC exports'; return 1; }
    done
    cat >"$tmp/main.c" <<'END'
int copy_1(const char *path);
int copy_2(const char *path);
int main(void) {
    int t = copy_1("tests/data/models/plain");
    return t < 0 || copy_2("tests/data/models/plain") != t;
}
END
    gcc "$tmp/main.c" "$tmp/1.o" "$tmp/2.o" -o "$tmp/two" -lm -lpthread && "$tmp/two"
}
no_globals() {                          # no writable data in the library
    gcc -O1 -fno-pic -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o "$tmp/lib.o" || return 1
    ! nm "$tmp/lib.o" | grep -E ' [bBdDC] ' | grep -v ' d \.'
}
no_recursion() {                        # tsort names the loops of the call graph, except the shortest
    gcc -O0 -fcallgraph-info -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o "$tmp/calls.o" || return 1
    sed -n 's/.*sourcename: "\([^"]*\)" targetname: "\([^"]*\)".*/\1 \2/p' "$tmp/calls.ci" >"$tmp/calls"
    [ -s "$tmp/calls" ] && tsort "$tmp/calls" >/dev/null && ! awk '$1 == $2' "$tmp/calls" | grep .
}
check 'only qwen3_ is exported' exports
check 'no recursion' no_recursion
check 'two private copies in one program' two_files
check 'no mutable globals' no_globals

# ---- CUDA ----------------------------------------------------------------------------------------------------
cuda() {                                # for one generation of GPUs, with the Makefile's flags: warnings are errors
    nvcc -O3 -std=c++17 -Xcompiler -Wall,-Wextra,-fPIC -Werror all-warnings -gencode="arch=compute_$1,code=sm_$1" \
        -c qwen3_cuda.cu -o "$tmp/cuda.o"
}
if have nvcc; then
    for chip in 75 80 86 89 90a 100 120; do
        nvcc --list-gpu-code | grep -qx "sm_${chip%a}" || { skip "CUDA sm_$chip" 'not known to this nvcc'; continue; }
        check "CUDA sm_$chip, nvcc $(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')" cuda $chip
    done
    make -s build/qwen3.o build/qwen3_cuda.o >"$tmp/made" 2>&1
    check 'CUDA from C++ and in a shared library' sh tests/check_cuda_link.sh
else skip 'CUDA' 'nvcc is not installed'; fi

# ---- static analysis -------------------------------------------------------------------------------------
tidy() {        # The header as a file of its own, or only what a file calls would be analysed.
    local checks='-*,clang-analyzer-*,bugprone-*' off
    for off in \
        clang-analyzer-unix.Malloc                             `# blames memory that is freed as const, through a union` \
        clang-analyzer-core.UndefinedBinaryOperatorResult      `# does not see that qwen3i_fail returns its second argument` \
        clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling   `# wants memcpy_s, which C libraries lack` \
        bugprone-macro-parentheses                             `# the kernels' macros take names of types and functions` \
        bugprone-easily-swappable-parameters bugprone-reserved-identifier \
        bugprone-narrowing-conversions bugprone-implicit-widening-of-multiplication-result  `# -Wconversion has a say here`
    do checks="$checks,-$off"; done
    { printf '#define QWEN3_IMPLEMENTATION\n#define QWEN3_NO_SIMD\n'; cat qwen3.h; } >"$tmp/tidy.c"
    clang-tidy --quiet --checks="$checks" --warnings-as-errors='*' "$tmp/tidy.c" -- -std=c99
}
analyse() {     # invalidFunctionArg: log(0), but of at least one logit one is the largest, and exp(0) is 1
                # ctunullpointer: it reads the kernels' macros as if a vector of no elements were dereferenced
    printf '#define QWEN3_IMPLEMENTATION\n#define QWEN3_NO_SIMD\n#include "qwen3.h"\n' >"$tmp/check.c"
    cppcheck --quiet --error-exitcode=1 --enable=warning,portability --inline-suppr --std=c99 -I. -D__linux__ -D__x86_64__ \
        --suppress=missingInclude --suppress=invalidFunctionArg --suppress=ctunullpointer "$tmp/check.c"
}
need clang-tidy clang-tidy && check 'clang-tidy' tidy || have clang-tidy || skip 'clang-tidy' 'not installed'
need cppcheck cppcheck && check 'cppcheck' analyse || have cppcheck || skip 'cppcheck' 'not installed'

# ---- other floating point, C libraries, systems and processors -------------------------------------------------
suite() {                               # suite COMPILER FLAGS...: the tests, built so
    local cc=$1; shift
    "$cc" "$@" test.c -o "$tmp/test" -lm -lpthread && "$tmp/test" -q
}
check 'tests, gcc -O0, as C++20' suite g++ -std=c++20 -O0 -x c++
check 'tests, gcc -O3 -ffast-math' suite gcc -O3 -ffast-math
have clang && check 'tests, clang -O3 -ffast-math' suite clang -O3 -ffast-math
for cc in gcc clang; do
    if has_m32 $cc; then check "tests, $cc -m32" suite $cc -O2 $M32 -msse2 -mfpmath=sse
    else skip "tests, $cc -m32" 'no 32-bit libraries'; fi
done
if need musl-gcc musl-tools; then check 'tests, musl' suite musl-gcc -O2 -static; else skip 'tests, musl' 'not installed'; fi

windows() {
    x86_64-w64-mingw32-gcc -std=c99 $WARN -O2 -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o "$tmp/win.o" &&
    x86_64-w64-mingw32-gcc -O2 -static test.c -o "$tmp/test.exe" -lm
}
wine_suite() { windows && WINEDEBUG=-all WINEPREFIX="$tmp/wine" HOME="$tmp" "$wine" "$tmp/test.exe" -q; }
if need x86_64-w64-mingw32-gcc gcc-mingw-w64-x86-64; then
    need wine64 wine64; wine=$(command -v wine64 || command -v wine || ls /usr/lib/wine/wine64 2>/dev/null)
    if [ -n "$wine" ]; then check 'tests, MinGW-w64 under Wine' wine_suite
    else check 'MinGW-w64 builds' windows; skip 'tests under Wine' 'not installed'; fi
else skip 'MinGW-w64' 'not installed'; fi

arm() {
    aarch64-linux-gnu-gcc -std=c99 $WARN -O2 -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o "$tmp/arm.o" &&
    aarch64-linux-gnu-gcc -O2 -static test.c -o "$tmp/test-arm" -lm -lpthread && qemu-aarch64 "$tmp/test-arm" -q
}
if need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu libc6-dev-arm64-cross && need qemu-aarch64 qemu-user; then check 'tests, aarch64 under QEMU' arm
else skip 'tests, aarch64' 'not installed'; fi

big_endian() {                          # refused, with a reason
    cat >"$tmp/big.c" <<'END'
#include <stdio.h>
#include <string.h>
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
int main(void) {
    char err[256];
    qwen3_model *m;
    qwen3_file file = {"config.json", "{}", 2};
    qwen3_load_desc d;
    qwen3_result r;
    memset(&d, 0, sizeof d);
    d.files = &file;
    d.n_files = 1;
    r = qwen3_load(&m, &d, err, sizeof err);
    puts(err);
    return !(r == QWEN3_ERR_UNSUPPORTED && strstr(err, "big-endian"));
}
END
    s390x-linux-gnu-gcc -O1 -static -I. "$tmp/big.c" -o "$tmp/big" -lm -lpthread && qemu-s390x "$tmp/big"
}
if need s390x-linux-gnu-gcc gcc-s390x-linux-gnu libc6-dev-s390x-cross && need qemu-s390x qemu-user; then check 's390x (big-endian) is refused' big_endian
else skip 's390x' 'not installed'; fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
