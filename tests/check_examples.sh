#!/bin/sh
# The programs of examples/: each compiles without a warning and runs on the demo model. What a library is missing for is
# skipped; RAYLIB='flags' says how to link raylib. usage: sh tests/check_examples.sh   (from the root)
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
build() { ${CC:-cc} -std=c99 -O2 -Wall -Wextra -Wpedantic -Werror -D_GNU_SOURCE -I. "examples/$1.c" -o "$dir/$1" $2 -lm -lpthread; }

lines() { n=$(sed '1,/\*\//d' "examples/$1.c" | grep -c .); [ "$n" -le "$2" ] || { echo "$1: $n lines"; exit 1; }; }
lines frame 40; lines raylib 40; lines continue 40; lines sqlite 80
build frame ''
"$dir/frame" demo 2000 | tail -1
build continue ''
[ -n "$(printf 'Hello, how can I' | "$dir/continue" demo)" ] || { echo "continue: said nothing"; exit 1; }
! printf 'Hello' | "$dir/continue" no/such/model 2>/dev/null || exit 1
echo "continue: ran"

if echo '#include <sqlite3ext.h>' | ${CC:-cc} -E - >/dev/null 2>&1 && command -v sqlite3 >/dev/null; then
    ${CC:-cc} -std=c99 -O2 -Wall -Wextra -Werror -fPIC -shared -I. examples/sqlite.c -o "$dir/qwen3_sqlite.so" -lm -lpthread
    sqlite3 :memory: ".load $dir/qwen3_sqlite" "SELECT qwen3_open('demo');" \
        "SELECT 'asked', length(qwen3_ask('You keep a shop.', 'Hello!')) > 0;" \
        "SELECT 'near', qwen3_distance(qwen3_vector('a rope'), qwen3_vector('a rope')) < 1e-5;" \
        "SELECT 'far', qwen3_distance(qwen3_vector('a rope'), qwen3_vector('good morning')) > 1e-3;" > "$dir/out"
    printf '\nasked|1\nnear|1\nfar|1\n' | diff - "$dir/out"
    ! sqlite3 :memory: ".load $dir/qwen3_sqlite" "SELECT qwen3_vector('');" 2> "$dir/log" || exit 1
    grep -q "qwen3_open first" "$dir/log"
    ! sqlite3 :memory: ".load $dir/qwen3_sqlite" "SELECT qwen3_vector('a rope');" 2> "$dir/log" || exit 1
    grep -q 'qwen3_open first' "$dir/log"
    ! sqlite3 :memory: ".load $dir/qwen3_sqlite" "SELECT qwen3_open('no/such');" 2> "$dir/log" || exit 1
    grep -q 'no such directory' "$dir/log"
    echo "sqlite: asked, compared, refused"
else echo "sqlite: skipped, no sqlite3ext.h or no sqlite3"; fi

raylib=${RAYLIB:--lraylib}
if ! printf '#include "raylib.h"\nint main(void) { return IsWindowReady(); }' |
     ${CC:-cc} -x c - -x none $raylib -o "$dir/x" -lm -lpthread >/dev/null 2>&1; then echo "raylib: skipped, not there"
elif ! command -v xvfb-run >/dev/null; then echo "raylib: compiles; not run without xvfb-run"; build raylib "$raylib"
else build raylib "$raylib"; xvfb-run -a "$dir/raylib" demo 'Hello!' 2>&1 | tail -1 | cut -c1-100; fi
