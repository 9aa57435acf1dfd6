# make            build everything (with CUDA if there is a GPU, and nvcc on the PATH)
# make run        chat with the demo model, or MODEL=path/to/Qwen3-0.6B
# make test       run the tests
# make cuda       build everything with CUDA, GPU or not: takes minutes; NCCL=1: several GPUs can share a model
# make help       all targets
CFLAGS   ?= -O3
WARN      = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion
MODEL    ?= demo
PREFIX   ?= /usr/local
VERSION   = 1.0.0
SOVERSION = 1.0
NVCC     ?= $(shell command -v nvcc 2>/dev/null)
CUDA     ?= $(if $(NVCC),$(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1))
CUDA_ARCH ?= $(shell tools/cuda_arch.sh "$(NVCC)")
LAB_ARCH ?= $(CUDA_ARCH)
NVCCFLAGS = -O3 -std=c++17 --threads 0 -Xcompiler -Wall,-Wextra -Werror all-warnings $(NVCC_SIZE)
# kernels packed as small as this nvcc can
NVCC_SIZE = $(shell "$(NVCC)" --help 2>/dev/null | grep -q -e --compress-mode && echo --compress-mode=size)
LDLIBS    = -lm -lpthread
DEPS      = qwen3.h Makefile

ifeq ($(CUDA),0)
override CUDA =
endif
ifneq ($(CUDA),)
ifeq ($(NVCC),)
$(error CUDA=1, but there is no nvcc on the PATH: name it with NVCC=/path/to/nvcc)
endif
CUDA_OBJ  = build/qwen3_cuda.o
CUDA_LAB  = build/cuda_lab.o
CUDA_DEF  = -DQWEN3_WITH_CUDA
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
ifneq ($(NCCL),)
ifeq ($(wildcard $(CUDA_HOME)/include/nccl.h /usr/include/nccl.h /usr/local/include/nccl.h),)
$(error NCCL=1, but there is no nccl.h in $(CUDA_HOME)/include, /usr/include or /usr/local/include)
endif
endif
LDLIBS   += -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -L$(CUDA_HOME)/lib -Wl,-rpath,$(CUDA_HOME)/lib \
            $(if $(NO_CUBLASLT),,-lcublasLt) $(if $(NCCL),-lnccl) -lcudart -lstdc++
NVCCFLAGS += $(if $(NO_CUBLASLT),-DQWEN3_CUDA_NO_CUBLASLT) $(if $(NCCL),-DQWEN3_CUDA_NCCL)
endif

all: example bench build/check lib

cuda:
	@$(MAKE) CUDA=1 all

example: example.c $(DEPS) $(CUDA_OBJ) build/with_cuda
	$(CC) -std=c99 $(CFLAGS) $(WARN) $(CUDA_DEF) example.c $(CUDA_OBJ) -o $@ $(LDLIBS)

bench: bench.c tests/cuda_lab.h $(DEPS) $(CUDA_LAB) build/with_cuda
	$(CC) -std=c99 $(CFLAGS) $(WARN) $(CUDA_DEF) bench.c $(CUDA_LAB) -o $@ $(LDLIBS)

build/quantize: tools/quantize.c $(DEPS) | build
	$(CC) -std=c99 $(CFLAGS) $(WARN) -I. tools/quantize.c -o $@ -lm -lpthread

build/check: tools/check.c $(DEPS) | build
	$(CC) -std=c99 $(CFLAGS) $(WARN) tools/check.c -o $@ -lm -lpthread

build/test: test.c tests/*.h $(DEPS) $(CUDA_LAB) build/with_cuda
	$(CC) -std=c99 $(CFLAGS) $(WARN) $(CUDA_DEF) test.c $(CUDA_LAB) -o $@ $(LDLIBS)

build/qwen3_cuda.o: qwen3_cuda.cu $(DEPS) | build
	@echo "Compiling the GPU's kernels takes minutes; make CUDA=0 leaves them out."
	$(NVCC) $(NVCCFLAGS) $(CUDA_ARCH) -Xcompiler -fPIC -c qwen3_cuda.cu -o $@

# the same with what tests and benches look into
build/cuda_lab.o: tests/cuda_lab.cu tests/cuda_lab.h qwen3_cuda.cu $(DEPS) | build
	@echo "Compiling the GPU's kernels takes minutes; make CUDA=0 leaves them out."
	$(NVCC) $(NVCCFLAGS) $(LAB_ARCH) -c tests/cuda_lab.cu -o $@

build/qwen3.o: $(DEPS) | build
	$(CC) -std=c99 $(CFLAGS) $(WARN) -fPIC -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o $@

build/libqwen3.a: build/qwen3.o
	rm -f $@ && $(AR) rcs $@ $^

build/libqwen3_cuda.a: build/qwen3_cuda.o
	rm -f $@ && $(AR) rcs $@ $^

# only what the header declares is seen from outside; minor versions may add fields, so they have a soname each
build/libqwen3.so.$(VERSION): build/qwen3.o build/libqwen3.map
	$(CC) -shared -Wl,-soname,libqwen3.so.$(SOVERSION) -Wl,--version-script=build/libqwen3.map build/qwen3.o -o $@ -lm -lpthread

build/libqwen3.map: Makefile | build
	echo '{ global: qwen3_*; local: *; };' > $@

# holds what CUDA is, and changes with it alone: what is built otherwise is built again
build/with_cuda: always | build
	@echo "$(CUDA)" | cmp -s - $@ || echo "$(CUDA)" > $@

include tools/kernels.mk

build:
	mkdir -p build

lib: build/libqwen3.a build/libqwen3.so.$(VERSION) $(if $(CUDA),build/libqwen3_cuda.a)

run: example
	@tools/welcome.sh "$(MODEL)"
	@./example "$(MODEL)" $(if $(wildcard $(MODEL)/system.txt),-s @$(MODEL)/system.txt) $(ARGS)

test: build/test
	build/test

download: MODEL = Qwen/Qwen3-0.6B
download:
	tools/download.sh $(if $(FILE),-f $(FILE)) $(MODEL)

install: lib
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib/pkgconfig $(DESTDIR)$(PREFIX)/lib/cmake/qwen3
	install -m 644 qwen3.h qwen3_cuda.cu $(DESTDIR)$(PREFIX)/include
	install -m 644 build/libqwen3.a $(if $(CUDA),build/libqwen3_cuda.a) $(DESTDIR)$(PREFIX)/lib
	install -m 755 build/libqwen3.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib
	ln -sf libqwen3.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libqwen3.so.$(SOVERSION)
	ln -sf libqwen3.so.$(SOVERSION) $(DESTDIR)$(PREFIX)/lib/libqwen3.so
	sed 's,@prefix@,$(PREFIX),; s,@version@,$(VERSION),' packaging/qwen3.pc.in > $(DESTDIR)$(PREFIX)/lib/pkgconfig/qwen3.pc
	install -m 644 packaging/qwen3-config.cmake packaging/qwen3-config-version.cmake $(DESTDIR)$(PREFIX)/lib/cmake/qwen3

web:                                    # the demo in a browser; needs Emscripten
	web/build.sh

test-web:                               # ... and in headless Chromium
	web/test.sh

clean:
	rm -rf build example bench

help:
	@echo "all       example, bench, build/check and the libraries, $(if $(CUDA),with CUDA,for the CPU)"
	@echo "cuda      the same with CUDA (nvcc: $(or $(NVCC),none found)); otherwise it is built where a GPU is found"
	@echo "          CUDA=1, CUDA=0: with and without for any target; a first build with CUDA takes minutes; NCCL=1: several GPUs"
	@echo "run       chat with MODEL (default: the demo); ARGS=... are passed on"
	@echo "test      build and run the tests"
	@echo "build/check   is a model's cache precise enough? build/check MODEL"
	@echo "bench     build the benchmark; ./bench --help"
	@echo "download  fetch MODEL=Qwen/Qwen3-0.6B (or another) into models/; of a model of GGUF files the one that FILE names"
	@echo "install   header, CUDA source, static and shared library, qwen3.pc and a CMake package under PREFIX ($(PREFIX))"
	@echo "web       the demo as a web page in build/web (Emscripten); python3 web/serve.py shows it"
	@echo "test-web  test that page in headless Chromium"
	@echo "clean     remove what was built"

.PHONY: all cuda run test web test-web lib download install clean help always
