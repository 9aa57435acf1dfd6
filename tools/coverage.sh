#!/usr/bin/env bash
# Line and branch coverage of qwen3.h by the tests, section by section: tools/coverage.sh [-l]
# -l: list the lines that are not covered. A branch is one way out of a condition, also within a line.
set -u
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
gcc -std=c99 -O0 --coverage -I. -c test.c -o "$tmp/test.o" && gcc --coverage "$tmp/test.o" -o "$tmp/test" -lm -lpthread || exit 2
"$tmp/test" -q || exit 1
cp qwen3.h test.c "$tmp/" && (cd "$tmp" && gcov -b -c -o . test.gcda >/dev/null 2>&1)
awk -v list="${1:-}" '
    function row(name, lines, hit, ways, taken) {
        if (lines) printf "%6.2f %% of %5d lines  %6.2f %% of %5d branches  %s\n", 100 * hit / lines, lines,
                          100 * taken / (ways ? ways : 1), ways, name
    }
    /^branch/ {
        ways[section]++; if (!kernels) all_ways++
        if ($0 ~ /taken [1-9]/) { taken[section]++; if (!kernels) all_taken++ }
        next
    }
    /^(call|function|unconditional)/ { next }
    {
        split($0, part, ":"); count = part[1]; line = part[2] + 0; gsub(/ /, "", count)
        text = $0; sub(/^[^:]*:[^:]*:/, "", text)
    }
    bar && text ~ /^   [A-Z]/ {
        sub(/^ */, "", text); sub(/[:.(].*/, "", text)
        section = text; order[++n] = section; kernels = text ~ /VECTOR KERNELS/
    }
    { bar = text ~ /^\/\* =====/ }
    count == "-" { next }
    { lines[section]++; if (!kernels) all++ }
    count !~ /^[#=]/ { hit[section]++; if (!kernels) got++; next }
    list == "-l" { printf "%5d: %s\n", line, text }
    END {
        for (i = 1; i <= n; i++) { s = order[i]; row(s, lines[s], hit[s], ways[s], taken[s]) }
        row("all but the vector kernels", all, got, all_ways, all_taken)
    }
' "$tmp/qwen3.h.gcov"
