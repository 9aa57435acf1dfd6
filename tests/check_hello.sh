#!/bin/sh
# The program in the comment at the top of qwen3.h: at most 30 lines, compiles as C and as C++ without
# a warning, and runs. usage: sh tests/check_hello.sh [model directory]   (from the repository's root)
set -eu
model=${1:-tests/data/models/chat}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
awk '/^   HELLO WORLD/ { on = 1; next }  on && /^   [A-Z]/ { exit }  on { sub(/^    /, ""); print }' qwen3.h |
    sed -e '/./,$!d' > "$dir/hello.c"
lines=$(awk 'NF { n = NR } END { print n }' "$dir/hello.c")
[ "$lines" -ge 10 ] && [ "$lines" -le 30 ] || { echo "hello: $lines lines"; exit 1; }
cp "$dir/hello.c" "$dir/hello.cpp"
build() {   # what, command...
    what=$1; shift
    start=$(date +%s)
    "$@" 2> "$dir/log" || { head -20 "$dir/log"; echo "hello: does not compile as $what"; exit 1; }
    [ ! -s "$dir/log" ] || { head -5 "$dir/log"; grep -c warning: "$dir/log"; echo "hello: warnings as $what"; exit 1; }
    echo "hello: compiled as $what in $(($(date +%s) - start)) s"
}
build C "${CC:-cc}" -O2 -Wall -Wextra -I. "$dir/hello.c" -o "$dir/hello" -lm -lpthread
build C++ "${CXX:-c++}" -O2 -Wall -Wextra -I. "$dir/hello.cpp" -o "$dir/hello++" -lm -lpthread
"$dir/hello" "$model" > "$dir/out"
"$dir/hello++" "$model" > "$dir/out++"
cmp "$dir/out" "$dir/out++"
[ -s "$dir/out" ] || { echo "hello: said nothing"; exit 1; }
! "$dir/hello" no/such/model 2> "$dir/log" || { echo "hello: no error without a model"; exit 1; }
grep -q no/such/model "$dir/log"
echo "hello: $lines lines, ran twice, $(wc -c < "$dir/out") bytes said"
