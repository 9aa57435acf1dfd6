#!/bin/sh
# tests/uses.c, a program that uses every public function, without a warning and running: static and not, optimised in
# many ways, by each compiler that is there. usage: sh tests/check_uses.sh [-1]   (from the root; -1: one way only)
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
api=$(sed -n '1,/^#endif \/\* QWEN3_H \*\//p' qwen3.h | sed -n 's/^QWEN3_API .*[ *]\(qwen3_[a-z_]*\)(.*/\1/p')
for f in $api; do grep -q "${f%_for}(" tests/uses.c || { echo "uses: $f is not used"; exit 1; }; done
n=$(echo "$api" | wc -l)
[ "$n" -le 38 ] || { echo "uses: $n public functions"; exit 1; }
use() {                                 # compiler, flags...
    "$@" -Wall -Wextra -Werror -I. tests/uses.c -o "$dir/uses" -lm -lpthread || { echo "uses: $*"; exit 1; }
    "$dir/uses" demo >/dev/null || { echo "uses: failed: $*"; exit 1; }
}
if [ "${1:-}" = -1 ]; then use cc -O2 -DQWEN3_STATIC; echo "uses: $n functions"; exit; fi
for cc in gcc clang; do
    command -v $cc >/dev/null || continue
    for o in -O1 -O2 -O3 -Os; do use $cc -std=c99 $o -DQWEN3_STATIC; done
    use $cc -std=c99 -O2
    [ $cc = clang ] || use $cc -std=c99 -O2 -flto=2
done
echo "uses: $n functions, in every way"
