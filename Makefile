# make            build everything (with CUDA if nvcc is on the PATH)
# make run        chat with the demo model, or MODEL=path/to/Qwen3-0.6B
# make test       run the tests
# make help       all targets
CFLAGS   ?= -O3
WARN      = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion
MODEL    ?= demo
PREFIX   ?= /usr/local
NVCC     ?= $(shell command -v nvcc 2>/dev/null)
CUDA_ARCH ?= $(shell tools/cuda_arch.sh "$(NVCC)")
NVCCFLAGS = -O3 -std=c++17 --threads 0 -Xcompiler -Wall,-Wextra -Werror all-warnings $(CUDA_ARCH)
LDLIBS    = -lm -lpthread
DEPS      = qwen3.h Makefile

ifneq ($(NVCC),)
CUDA_OBJ  = build/qwen3_cuda.o
CUDA_LAB  = build/cuda_lab.o
CUDA_DEF  = -DQWEN3_WITH_CUDA
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
LDLIBS   += -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcublasLt -lcudart -lstdc++
endif

all: example bench lib

example: example.c tools/check.h tools/cli.h tools/conversation.h $(DEPS) $(CUDA_OBJ)
	$(CC) -std=c99 $(CFLAGS) $(WARN) $(CUDA_DEF) example.c $(CUDA_OBJ) -o $@ $(LDLIBS)

bench: bench.c tests/cuda_lab.h $(DEPS) $(CUDA_LAB)
	$(CC) -std=c99 $(CFLAGS) $(WARN) $(CUDA_DEF) bench.c $(CUDA_LAB) -o $@ $(LDLIBS)

build/test: test.c tests/*.h $(DEPS) $(CUDA_LAB) | build
	$(CC) -std=c99 $(CFLAGS) $(WARN) $(CUDA_DEF) test.c $(CUDA_LAB) -o $@ $(LDLIBS)

build/qwen3_cuda.o: qwen3_cuda.cu $(DEPS) | build
	$(NVCC) $(NVCCFLAGS) -Xcompiler -fPIC -c qwen3_cuda.cu -o $@

# the same with what tests and benches look into
build/cuda_lab.o: tests/cuda_lab.cu tests/cuda_lab.h qwen3_cuda.cu $(DEPS) | build
	$(NVCC) $(NVCCFLAGS) -c tests/cuda_lab.cu -o $@

build/qwen3.o: $(DEPS) | build
	$(CC) -std=c99 $(CFLAGS) $(WARN) -fPIC -DQWEN3_IMPLEMENTATION -x c -c qwen3.h -o $@

build/libqwen3.a: build/qwen3.o $(CUDA_OBJ)
	rm -f $@ && $(AR) rcs $@ $^

include tools/kernels.mk

build:
	mkdir -p build

lib: build/libqwen3.a

run: example
	@tools/welcome.sh "$(MODEL)"
	@./example "$(MODEL)" $(if $(wildcard $(MODEL)/system.txt),-s @$(MODEL)/system.txt) $(ARGS)

test: build/test
	build/test

download: MODEL = Qwen/Qwen3-0.6B
download:
	tools/download.sh $(MODEL)

install: lib
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib
	install -m 644 qwen3.h qwen3_cuda.cu $(DESTDIR)$(PREFIX)/include
	install -m 644 build/libqwen3.a $(DESTDIR)$(PREFIX)/lib

web:                                    # the demo in a browser; needs Emscripten
	web/build.sh

test-web:                               # ... and in headless Chromium
	web/test.sh

clean:
	rm -rf build example bench

help:
	@echo "all       example, bench and build/libqwen3.a$(if $(NVCC), with CUDA ($(NVCC)),; no nvcc found: CPU only)"
	@echo "run       chat with MODEL (default: the demo); ARGS=... are passed on"
	@echo "test      build and run the tests"
	@echo "bench     build the benchmark; ./bench --help"
	@echo "download  fetch MODEL=Qwen/Qwen3-0.6B (or another) into models/"
	@echo "install   header, CUDA source and static library under PREFIX ($(PREFIX))"
	@echo "web       the demo as a web page in build/web (Emscripten); python3 web/serve.py shows it"
	@echo "test-web  test that page in headless Chromium"
	@echo "clean     remove what was built"

.PHONY: all run test web test-web lib download install clean help
