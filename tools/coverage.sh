#!/usr/bin/env bash
# Line coverage of qwen3.h by the tests, section by section: tools/coverage.sh [-l]    (-l: list what is not covered)
set -u
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
gcc -std=c99 -O0 --coverage -I. -c test.c -o "$tmp/test.o" && gcc --coverage "$tmp/test.o" -o "$tmp/test" -lm -lpthread || exit 2
"$tmp/test" -q || exit 1
cp qwen3.h test.c "$tmp/" && (cd "$tmp" && gcov -o . test.gcda >/dev/null 2>&1)
awk -v list="${1:-}" '
    function row(name, lines, hit) { if (lines) printf "%6.2f %%  %5d of %5d  %s\n", 100 * hit / lines, hit, lines, name }
    { split($0, part, ":"); count = part[1]; line = part[2] + 0; gsub(/ /, "", count); text = $0; sub(/^[^:]*:[^:]*:/, "", text) }
    bar && text ~ /^   [A-Z]/ { sub(/^ */, "", text); sub(/[:.(].*/, "", text); section = text; order[++n] = section; kernels = text ~ /NUMBER FORMATS/ }
    { bar = text ~ /^\/\* =====/ }
    count == "-" { next }
    { lines[section]++; if (!kernels) all++ }
    count !~ /^[#=]/ { hit[section]++; if (!kernels) got++; next }
    list == "-l" { printf "%5d: %s\n", line, text }
    END { for (i = 1; i <= n; i++) row(order[i], lines[order[i]], hit[order[i]]); row("all but the vector kernels", all, got) }
' "$tmp/qwen3.h.gcov"
