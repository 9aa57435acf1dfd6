#!/bin/sh
# The library as a package: installed by make and by CMake, found by pkg-config, CMake and Conan, as a subdirectory.
# usage: sh tests/test_packages.sh   (from the repository's root)
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
root=$dir/tree                          # of its own, as other checks build in this one
mkdir "$root"
cp -r Makefile CMakeLists.txt qwen3.h qwen3_cuda.cu LICENSE packaging tools demo "$root"
cd "$root"
consumer=packaging/conan/test_package
runs() { "$@" "$root/demo" >"$dir/said" || { cat "$dir/said"; exit 1; }; grep -q 'loaded$' "$dir/said"; echo "ok    $name"; }

make -s install PREFIX="$dir/made" CUDA=0
PKG_CONFIG_PATH=$dir/made/lib/pkgconfig; export PKG_CONFIG_PATH
lib=$dir/made/lib/libqwen3.so

name='make install, pkg-config, shared'
cc $consumer/consumer.c -o "$dir/shared" $(pkg-config --cflags --libs qwen3)
runs env LD_LIBRARY_PATH="$dir/made/lib" "$dir/shared"

name='make install, pkg-config, static'
cc $consumer/consumer.c -o "$dir/static" $(pkg-config --static --cflags --libs qwen3 | sed 's/-lqwen3/-l:libqwen3.a/')
runs "$dir/static"

name='soname and exported names'
objdump -p "$lib" | grep -q 'SONAME *libqwen3.so.1.0$'
nm -D --defined-only "$lib" | awk '{ print $3 }' >"$dir/names"
[ "$(wc -l <"$dir/names")" -gt 30 ]
if grep -v '^qwen3_' "$dir/names"; then exit 1; fi
echo "ok    $name: $(wc -l <"$dir/names")"

name='a library of another version is refused'
sed 's/#define QWEN3_VERSION 100/#define QWEN3_VERSION 110/' qwen3.h >"$dir/qwen3.h"
cc -I"$dir" $consumer/consumer.c -o "$dir/newer" -L"$dir/made/lib" -lqwen3
if LD_LIBRARY_PATH=$dir/made/lib "$dir/newer" "$root/demo" >"$dir/said"; then exit 1; fi
grep -q 'compiled for version 1.1, the library is version 1.0' "$dir/said"
echo "ok    $name"

for shared in OFF ON; do
    name="make install, find_package, shared $shared"
    cmake -S $consumer -B "$dir/found$shared" -DCMAKE_PREFIX_PATH="$dir/made" -DBUILD_SHARED_LIBS=$shared >"$dir/log"
    cmake --build "$dir/found$shared" >>"$dir/log"
    runs "$dir/found$shared/consumer"

    name="cmake --install, find_package, shared $shared"
    cmake -S . -B "$dir/build$shared" -DBUILD_SHARED_LIBS=$shared -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_C_FLAGS_RELEASE=-O1 >"$dir/log"
    cmake --build "$dir/build$shared" >>"$dir/log"
    cmake --install "$dir/build$shared" --prefix "$dir/installed$shared" >>"$dir/log"
    cmake -S $consumer -B "$dir/again$shared" -DCMAKE_PREFIX_PATH="$dir/installed$shared" >>"$dir/log"
    cmake --build "$dir/again$shared" >>"$dir/log"
    runs "$dir/again$shared/consumer"
done
nm -D --defined-only "$dir/installedON/lib/libqwen3.so" | awk '{ print $3 }' | cmp - "$dir/names"
if cmake -S $consumer -B "$dir/none" -DCMAKE_PREFIX_PATH="$dir/made" -Dqwen3_FIND_REQUIRED_cuda=1 >"$dir/log" 2>&1; then exit 1; fi

name='add_subdirectory'
mkdir "$dir/parent"
cp $consumer/consumer.c "$dir/parent"
cat >"$dir/parent/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.18)
project(parent LANGUAGES C)
add_subdirectory("$root" qwen3)
add_executable(consumer consumer.c)
target_link_libraries(consumer PRIVATE qwen3::qwen3)
END
cmake -S "$dir/parent" -B "$dir/sub" -DCMAKE_C_FLAGS_RELEASE=-O1 >"$dir/log" && cmake --build "$dir/sub" >>"$dir/log"
runs "$dir/sub/consumer"

cat >"$dir/gpu.c" <<'END'
#include <qwen3.h>
#include <stdio.h>
int main(int argc, char **argv) {       /* loads onto a GPU, or says that there is none */
    static qwen3_load_desc load;
    qwen3_model *model;
    char err[256] = "loaded";
    qwen3_result r;
    load.path = argv[argc - 1];
    load.backend = qwen3_cuda_backend();
    r = qwen3_load(&model, &load, err, sizeof err);
    puts(err);
    qwen3_free(model);
    return r != QWEN3_OK && r != QWEN3_ERR_DEVICE;
}
END
gpu_consumer() {                        # gpu_consumer PREFIX: what find_package needs to link qwen3::cuda
    mkdir -p "$1.gpu" && cp "$dir/gpu.c" "$1.gpu"
    cat >"$1.gpu/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.18)
project(gpu LANGUAGES C)
find_package(qwen3 1.0 REQUIRED COMPONENTS cuda CONFIG)
add_executable(gpu gpu.c)
target_link_libraries(gpu PRIVATE qwen3::cuda)
END
    cmake -S "$1.gpu" -B "$1.gpu" -DCMAKE_PREFIX_PATH="$1" >"$dir/log" && cmake --build "$1.gpu" >>"$dir/log"
    "$1.gpu/gpu" demo >"$dir/said"
    ldd "$1.gpu/gpu" >"$dir/needs"
}
if command -v nvcc >/dev/null; then     # for one kind of GPU, left to the driver to translate
    nccl=; [ ! -f "$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")/include/nccl.h" ] || nccl=1
    name="make install CUDA=1 NCCL=$nccl, find_package"
    make -s install PREFIX="$dir/cuda" CUDA=1 NCCL=$nccl NVCCFLAGS="-O1 -std=c++17 ${nccl:+-DQWEN3_CUDA_NCCL}" \
        CUDA_ARCH=-gencode=arch=compute_90a,code=compute_90a >"$dir/log"
    gpu_consumer "$dir/cuda"
    [ -z "$nccl" ] || grep -q nccl "$dir/needs"
    grep -q cublasLt "$dir/needs"
    echo "ok    $name"

    name='cmake --install with CUDA, without NCCL and cuBLASLt, find_package'
    cmake -S . -B "$dir/plain" -DQWEN3_CUDA=ON -DQWEN3_CUDA_NO_CUBLASLT=ON -DCMAKE_CUDA_ARCHITECTURES=90a-virtual \
        -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CUDA_FLAGS_RELEASE=-O1 >"$dir/log"
    cmake --build "$dir/plain" >>"$dir/log"
    cmake --install "$dir/plain" --prefix "$dir/nolt" >>"$dir/log"
    gpu_consumer "$dir/nolt"
    if grep 'nccl\|cublas' "$dir/needs"; then exit 1; fi
    echo "ok    $name"
else echo 'skip  CUDA: nvcc is not installed'; fi

name='Conan'
if command -v conan >/dev/null; then
    CONAN_HOME=$dir/conan; export CONAN_HOME
    conan profile detect >/dev/null 2>&1
    conan create packaging/conan --no-remote >"$dir/log" 2>&1 || { tail -30 "$dir/log"; exit 1; }
    grep -q 'compiled for 100: .*no/such/model' "$dir/log"
    echo "ok    $name"
else echo "skip  $name: not installed"; fi

name='vcpkg'
python3 -c 'import json; assert json.load(open("packaging/vcpkg/vcpkg.json"))["version"] == "1.0.0"'
if command -v vcpkg >/dev/null && [ -n "${VCPKG_ROOT:-}" ]; then        # its formatter, its checks of a port, and a consumer
    cp packaging/vcpkg/vcpkg.json "$dir/vcpkg.json"
    vcpkg format-manifest "$dir/vcpkg.json" >"$dir/log"
    cmp "$dir/vcpkg.json" packaging/vcpkg/vcpkg.json
    VCPKG_FORCE_SYSTEM_BINARIES=1 vcpkg install qwen3 --overlay-ports=packaging/vcpkg --x-install-root="$dir/vcpkg" \
        --x-buildtrees-root="$dir/vcpkg.build" --x-packages-root="$dir/vcpkg.packages" >"$dir/log" || { tail "$dir/log"; exit 1; }
    if grep warning: "$dir/log"; then exit 1; fi
    cmake -S $consumer -B "$dir/ported" -DCMAKE_TOOLCHAIN_FILE="$VCPKG_ROOT/scripts/buildsystems/vcpkg.cmake" \
        -DVCPKG_INSTALLED_DIR="$dir/vcpkg" -DVCPKG_MANIFEST_MODE=OFF >"$dir/log" && cmake --build "$dir/ported" >>"$dir/log"
    runs "$dir/ported/consumer"
else echo "ok    $name: its manifest is JSON; no vcpkg with VCPKG_ROOT here to check the rest"; fi
