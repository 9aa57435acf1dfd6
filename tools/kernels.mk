# For comparisons only: see tools/kernels.cu, tools/kernels_cpu.c, tools/compare_torch.py
build/kernels.o: tools/kernels.cu tests/cuda_lab.cu tests/cuda_lab.h qwen3_cuda.cu $(DEPS) | build
	$(NVCC) $(NVCCFLAGS) $(CUDA_ARCH) -Xcompiler -fPIC -c tools/kernels.cu -o $@

build/libqwen3_kernels.so: build/kernels.o build/qwen3.o
	$(CC) -shared $^ -o $@ $(LDLIBS)

build/bench_fused: bench.c build/kernels.o
	$(CC) -std=c99 $(CFLAGS) $(WARN) $(CUDA_DEF) -DQWEN3_WITH_FUSED_BASELINE $^ -o $@ $(LDLIBS)

build/libqwen3_kernels_cpu.so: tools/kernels_cpu.c $(DEPS) | build
	$(CC) -std=c99 $(CFLAGS) $(WARN) -shared -fPIC tools/kernels_cpu.c -o $@ -lm -lpthread
