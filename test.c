/* Every test of qwen3.h in one program.

       cc -O2 test.c -o test -lm -lpthread && ./test [-k part-of-a-name] [-v | -q] [-s] [--data DIR]

   It includes the library with its internals. Compiled with -DQWEN3_WITH_CUDA and linked with
   qwen3_cuda.cu it also tests that backend, with -s more shortly, for compute-sanitizer. The last line
   says how many tests passed and failed. */
#include <stdint.h>
#include <stddef.h>
static void *test_malloc(size_t size);
static void  test_free(void *p);
#define QWEN3_MALLOC(size) test_malloc(size)
#define QWEN3_FREE(ptr)    test_free(ptr)
#include "tests/system.h"
#define QWEN3I_ALL_SETS       /* of vector kernels, also where the compiler could do without some */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"

#include "tests/test.h"
#include "tests/fixture.h"
#include "tests/test_cpu.h"
#include "tests/test_formats.h"
#include "tests/test_tokenizer.h"
#include "tests/test_chat.h"
#include "tests/test_parity.h"
#include "tests/test_sampler.h"
#include "tests/test_api.h"
#include "tests/test_stream.h"
#include "tests/test_grammar.h"
#include "tests/test_speculation.h"
#include "tests/test_tools.h"
#include "tests/test_faults.h"
#include "tests/test_malformed.h"
#include "tests/test_checkpoints.h"
#include "tests/test_gguf.h"
#include "tests/test_packed.h"
#include "tests/test_cache.h"
#include "tests/test_quantize.h"
#include "tests/test_experts.h"
#include "tests/test_threads.h"
#if defined(QWEN3_WITH_CUDA) && !defined(QWEN3_TEST_CUDA)
  #define QWEN3_TEST_CUDA
#endif
#ifdef QWEN3_TEST_CUDA
  #include "tests/test_cuda.h"
  #include "tests/test_ranks.h"
#endif
#include "tests/test_stability.h"

static int usage(const char *program) {
    fprintf(stderr, "usage: %s [-k part-of-a-name] [-v | -q] [-s] [--data DIR]\n", program);
    return 2;
}

static int data_missing(void) {
    char path[1024];
    FILE *f;
    snprintf(path, sizeof path, "%s/sampler.ref", test_data);
    f = fopen(path, "rb");
    if (f) { fclose(f); return 0; }
    fprintf(stderr, "cannot open %s: run this from the top of the repository, or use --data\n", path);
    return 1;
}

int main(int argc, char **argv) {
    int i;
    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-k") == 0 && i + 1 < argc) test_filter = argv[++i];
        else if (strcmp(argv[i], "--data") == 0 && i + 1 < argc) test_data = argv[++i];
        else if (strcmp(argv[i], "-v") == 0) test_verbose = 1;
        else if (strcmp(argv[i], "-q") == 0) test_quiet = 1;
        else if (strcmp(argv[i], "-s") == 0) test_short = 1;
        else return usage(argv[0]);
    }
    if (data_missing()) return 2;
    suite_cpu();
    suite_formats();
    suite_tokenizer();
    suite_chat();
    suite_parity();
    suite_sampler();
    suite_api();
    suite_stream();
    suite_grammar();
    suite_speculation();
    suite_tools();
    suite_faults();
    suite_malformed();
    suite_checkpoints();
    suite_experts();
    suite_gguf();
    suite_packed();
    suite_cache();
    suite_quantize();
    suite_threads();
    suite_stability();
#ifdef QWEN3_TEST_CUDA
    suite_cuda();
    suite_ranks();
#endif
    printf("%d passed, %d failed", test_passed, test_failed);
    if (test_skipped) printf(", %d skipped", test_skipped);
    printf("\n");
    return test_failed != 0;
}
