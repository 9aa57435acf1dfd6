#!/bin/sh
# The recipes in the comment at the top of qwen3.h: each compiles without a warning, as C and as C++, and runs.
# usage: sh tests/check_recipes.sh [model directory]   (from the repository's root)
set -eu
model=${1:-demo}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
awk '/^   RECIPES/ { on = 1; next }  on && /^   [A-Z]/ { exit }
     on && /^    \/\/ Recipe: / { if (n) print "    return r;\n}\n"; n++
         print "static qwen3_result recipe_" n "(qwen3_model *model, qwen3_ctx *ctx) {"
         print "    qwen3_result r = QWEN3_OK; int n = 0; char err[256] = \"\";\n    (void)model; (void)ctx; (void)err; (void)n;" }
     on { print }
     END { print "    return r;\n}\n\n#define RECIPES " n
           printf "static qwen3_result (*const recipes[RECIPES])(qwen3_model *, qwen3_ctx *) = {"
           for (i = 1; i <= n; i++) printf("%srecipe_%d", (i > 1 ? ", " : ""), i)
           print "};" }' qwen3.h > "$dir/recipes.inc"
cp tests/recipes.c "$dir/recipes.c"
cp tests/recipes.c "$dir/recipes.cpp"
warn='-Wall -Wextra -Wno-missing-field-initializers -Werror'
${CC:-cc} -std=c99 -O1 $warn -I. -I"$dir" "$dir/recipes.c" -o "$dir/recipes" -lm -lpthread
${CXX:-c++} -std=c++11 -O1 $warn -I. -I"$dir" "$dir/recipes.cpp" -o "$dir/recipes++" -lm -lpthread
"$dir/recipes" "$model" > "$dir/out"
"$dir/recipes++" "$model" > "$dir/out++"
cmp "$dir/out" "$dir/out++"
tail -1 "$dir/out"
