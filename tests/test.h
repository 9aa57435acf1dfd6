/* The checks that every test file uses. A test is a `static void name(void)`; a suite calls RUN on each. */
#ifndef QWEN3_TESTS_TEST_H
#define QWEN3_TESTS_TEST_H
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int test_passed, test_failed, test_skipped, test_bad;   /* tests; failed checks of the running test */
static const char *test_filter;                                /* run only tests whose name contains this */
static int test_verbose, test_quiet;                           /* figures and seconds; only what fails */
static int test_short;                                         /* fewer repetitions, for tools that slow them down */

#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
static int test_check(int ok, const char *file, int line, const char *format, ...) {
    va_list args;
    if (ok) return 1;
    if (test_bad++ < 10) {              /* the first failures of a test say it all */
        fprintf(stderr, "  %s:%d: ", file, line);
        va_start(args, format);
        vfprintf(stderr, format, args);
        va_end(args);
        fputc('\n', stderr);
    }
    return 0;
}

/* Both evaluate to whether the condition held; the test goes on. */
#define CHECK(cond)          test_check(!!(cond), __FILE__, __LINE__, "%s", #cond)
#define CHECK_MSG(cond, ...) test_check(!!(cond), __FILE__, __LINE__, __VA_ARGS__)

static void test_run(const char *name, void (*test)(void)) {
    clock_t start;
    if (test_filter && !strstr(name, test_filter)) return;
    test_bad = 0;
    start = clock();
    test();
    if (test_verbose) printf("%5.1f ", (double)(clock() - start) / CLOCKS_PER_SEC);
    if (test_bad) { test_failed++; printf("FAIL  %s (%d checks)\n", name, test_bad); }
    else { test_passed++; if (!test_quiet) printf("ok    %s\n", name); }
    fflush(stdout);
}
#define RUN(test) test_run(#test, test)

#if defined(__GNUC__)
__attribute__((unused))
#endif
static void test_skip(const char *name, const char *why) {
    if (test_filter && !strstr(name, test_filter)) return;
    test_skipped++;
    printf("skip  %s: %s\n", name, why);
}
#endif
