#!/bin/sh
# The chat program for Windows, by MinGW's gcc and by clang in the mode of Visual C++ (against MinGW's headers), without
# warnings, and run by Wine on a model whose path is not ASCII. usage: sh tests/check_windows.sh
set -eu
command -v x86_64-w64-mingw32-gcc >/dev/null || { echo 'skip  no MinGW'; exit 0; }
dir=$(mktemp -d)
trap '{ WINEPREFIX=$dir/wine wineserver -w || sleep 5; } 2>/dev/null; rm -rf "$dir" || true' EXIT
model="$dir/モデル é"
cp -r demo "$model"
warn='-Wall -Wextra -Wshadow -Wconversion -Werror'
run() {
    command -v wine >/dev/null || { echo "ok    $1: compiled; no Wine to run it"; return; }
    WINEDEBUG=-all WINEPREFIX=$dir/wine wine "$dir/$1.exe" "$model" -p hi >"$dir/said" 2>"$dir/log"
    grep -q Welcome "$dir/said" && echo "ok    $1: runs"
}
verbatim() {                    # a path that begins with \\?\, which Windows takes as it is
    command -v wine >/dev/null || return 0
    WINEDEBUG=-all WINEPREFIX=$dir/wine wine "$dir/$1.exe" '\\?\Z:'"$(printf %s "$model" | tr / '\\')" -p hi >"$dir/said" 2>"$dir/log"
    grep -q Welcome "$dir/said" && echo "ok    $1: runs on a path as it is"
}

x86_64-w64-mingw32-gcc -std=c99 $warn -O2 example.c -o "$dir/mingw.exe"
run mingw
verbatim mingw
x86_64-w64-mingw32-gcc -std=c99 $warn -O2 -DQWEN3_UNALIGNED_MOVES -Wa,-muse-unaligned-vector-move example.c -o "$dir/vectors.exe"
run vectors

command -v clang >/dev/null || { echo 'skip  no clang'; exit 0; }
mkdir "$dir/headers"            # MinGW's hide attributes from a compiler that is not GNU's
cp /usr/share/mingw-w64/include/_mingw*.h "$dir/headers"
sed -i 's|^# define __attribute__(x).*||; s|__declspec(noreturn)||; s|__declspec(deprecated)||' "$dir/headers/_mingw.h"
cat >"$dir/intrin.h" <<'END'
long long _InterlockedOr64(long long volatile *, long long);
long long _InterlockedExchange64(long long volatile *, long long);
long long _InterlockedExchangeAdd64(long long volatile *, long long);
static __inline void __cpuidex(int *r, int leaf, int sub) {
    __asm__("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}
END
printf '__asm__(".globl __chkstk\\n__chkstk: jmp ___chkstk_ms\\n");\nint _fltused = 1;\n' >"$dir/runtime.c"
clang --target=x86_64-pc-windows-msvc -fms-compatibility -fms-extensions -fmsc-version=1939 -D_CRT_SECURE_NO_WARNINGS \
    -D__USE_MINGW_ANSI_STDIO=0 -nostdlibinc -include "$dir/intrin.h" -isystem "$dir/headers" \
    -isystem /usr/share/mingw-w64/include -std=c11 $warn -O2 -c example.c -o "$dir/example.o"
x86_64-w64-mingw32-gcc "$dir/example.o" "$dir/runtime.c" -o "$dir/msvc.exe" -lshell32
run msvc
