#!/bin/sh
# The CUDA backend within a C++ program, and in a shared library that a program is linked with or opens itself. Each says
# the same on this machine, with a GPU or without one. usage: sh tests/check_cuda_link.sh   (after make build/qwen3_cuda.o
# build/qwen3.o, from the repository's root)
set -eu
nvcc=${NVCC:-$(command -v nvcc)}
cuda=$(dirname "$(dirname "$(realpath "$nvcc")")")
libs="-L$cuda/lib64 -Wl,-rpath,$cuda/lib64 -lcublasLt -lcudart -lstdc++ -lm -lpthread"
warn='-Wall -Wextra -Wpedantic -Wshadow -Werror -O1 -I.'
[ -z "${NO_CUBLASLT:-}" ] || libs=$(echo "$libs" | sed 's/-lcublasLt//')
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/program.cpp" <<'END'
#include "qwen3.h"
#include <stdio.h>
int main() {                            // on the GPU, or else a plain error, and then on the CPU
    static qwen3_load_desc desc;
    char err[256] = "";
    qwen3_model *model = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_token t = 1;
    desc.path = "tests/data/models/plain";
    desc.backend = qwen3_cuda_backend();
    qwen3_result r = qwen3_load(&model, &desc, err, sizeof err);
    if (r == QWEN3_ERR_DEVICE) {
        printf("%s\n", err);
        desc.backend = NULL;
        r = qwen3_load(&model, &desc, err, sizeof err);
    }
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, NULL, err, sizeof err);
    if (r == QWEN3_OK) r = (qwen3_result)qwen3_sync(ctx, 0, &t, 1, 0);
    if (r == QWEN3_OK) r = qwen3_next(ctx, 0, NULL, &t);
    printf("%s, token %d, on %s\n", qwen3_result_string(r), (int)t, r == QWEN3_OK ? qwen3_get_info(model).backend_name : err);
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return r != QWEN3_OK;
}
END
cat > "$dir/open.c" <<'END'
#include <dlfcn.h>
#include <stdio.h>
int main(int argc, char **argv) {
    void *library = dlopen(argv[argc - 1], RTLD_NOW | RTLD_LOCAL);
    if (!library) { puts(dlerror()); return 1; }
    return !dlsym(library, "qwen3_cuda_backend") || !dlsym(library, "qwen3_load") || dlclose(library) != 0;
}
END
for std in c++11 c++20; do
    g++ -std=$std $warn -DQWEN3_IMPLEMENTATION "$dir/program.cpp" build/qwen3_cuda.o -o "$dir/cpp" $libs
    "$dir/cpp" > "$dir/$std.out"
done
cc -shared -Wl,-z,defs build/qwen3.o build/qwen3_cuda.o -o "$dir/libqwen3.so" $libs
g++ -std=c++17 $warn "$dir/program.cpp" -o "$dir/shared" -L"$dir" -lqwen3 -Wl,-rpath,"$dir" -Wl,-rpath-link,"$cuda/lib64"
"$dir/shared" > "$dir/shared.out"
cc -std=c99 $warn "$dir/open.c" -o "$dir/open" -ldl
"$dir/open" "$dir/libqwen3.so"
cmp "$dir/c++11.out" "$dir/c++20.out"
cmp "$dir/c++11.out" "$dir/shared.out"
[ -s "$dir/shared.out" ] || { echo "link: said nothing"; exit 1; }
echo "link: from C++11 and C++20, with a shared library, and opened: $(tail -n 1 "$dir/shared.out")"
