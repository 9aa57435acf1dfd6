#!/bin/sh
# How large what is compiled for size becomes, in KB of 1,024 bytes, beside its limit: the header, the hello program and
# the chat program; and that without grammars the demo says the same. usage: sh tests/check_sizes.sh   (from the root)
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
[ "$(uname -m)" = x86_64 ] || { echo "sizes: skipped, the limits are those of x86-64"; exit; }
sections='-fno-asynchronous-unwind-tables -ffunction-sections -fdata-sections'
small="-std=c99 -Os $sections -DQWEN3_STATIC"
failed=0
check() {                               # name, KB at most, bytes
    kb=$((($3 + 1023) / 1024))
    echo "sizes: $1: $kb KB (at most $2)"
    [ $kb -le "$2" ] || failed=1
}
header() {                              # name, KB at most, flags...: code and data of the header alone
    name=$1 most=$2; shift 2
    gcc -std=c99 -Os -fno-asynchronous-unwind-tables "$@" -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o "$dir/header.o"
    check "header, $name" "$most" "$(size "$dir/header.o" | awk 'NR == 2 { print $1 + $2 }')"
}
program() {                             # name, KB at most, flags...: the file of the chat program, which says the same
    name=$1 most=$2; shift 2
    gcc $small "$@" example.c -o "$dir/chat" -Wl,--gc-sections -s -lm -lpthread
    check "chat program, $name" "$most" "$(wc -c < "$dir/chat")"
    "$dir/chat" demo -p 'What do you sell?' > "$dir/said"
    [ -s "$dir/words" ] || cp "$dir/said" "$dir/words"
    cmp "$dir/words" "$dir/said" || failed=1
}
hello() {                               # name, KB at most, flags...: the file of the header's hello program, stripped
    name=$1 most=$2; shift 2
    gcc -Os $sections "$@" -I. "$dir/hello.c" -o "$dir/hello" -Wl,--gc-sections -s -lm -lpthread
    check "hello program, $name" "$most" "$(wc -c < "$dir/hello")"
}
awk '/^   HELLO WORLD/ { on = 1; next }  on && /^   [A-Z]/ { exit }  on { sub(/^    /, ""); print }' qwen3.h > "$dir/hello.c"
hello all 312
hello 'without grammars' 232 -DQWEN3_NO_GRAMMAR
header all 305
header 'without grammars' 228 -DQWEN3_NO_GRAMMAR
header 'for AVX-512, without grammars' 210 -DQWEN3_NO_GRAMMAR -march=x86-64-v4
header 'plain C, without grammars' 186 -DQWEN3_NO_GRAMMAR -DQWEN3_NO_SIMD
program all 325
program 'without grammars' 245 -DQWEN3_NO_GRAMMAR
! "$dir/chat" demo -p Hi --regex a 2> "$dir/said" && grep -q 'left out by QWEN3_NO_GRAMMAR' "$dir/said" || failed=1
exit $failed
