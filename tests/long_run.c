/* cc -O2 tests/long_run.c -o long_run -lm -lpthread && ./long_run [TOKENS [SEED]]
   The long random life of a context, see long_run.h; a short one is among the tests. */
#define QWEN3_IMPLEMENTATION
#include "../qwen3.h"
#include "long_run.h"

int main(int argc, char **argv) {
    long_run_result r = long_run(argc > 1 ? atol(argv[1]) : 100000, argc > 2 ? (uint64_t)atol(argv[2]) : 1);
    printf("%ld tokens in %ld steps; %ld shifts, %ld restores, %ld copies, %ld cancels; "
           "%ld bytes at first, %ld at last\n",
           r.tokens, r.steps, r.shifts, r.restores, r.copies, r.cancels, r.bytes_first, r.bytes_last);
    puts(r.ok ? "ok" : r.what);
    return !r.ok;
}
