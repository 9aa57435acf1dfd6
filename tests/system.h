/* What the library asks of the system, so that tests can make it fail. Included before qwen3.h. */
#ifndef QWEN3_TESTS_SYSTEM_H
#define QWEN3_TESTS_SYSTEM_H
#if !defined(_WIN32) && !defined(QWEN3_NO_MMAP)
#define TEST_SYSTEM
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct test_system {
    int  no_map;                        /* mapping fails */
    long reads, read_fails_at, maps, live;  /* calls; the read that fails, counted from 1; maps less unmaps */
    int  bad_unmap, flags;              /* an unmap of what was not mapped; of the last open */
} test_system_;
static test_system_ test_system;

static void *system_mmap(void *at, size_t size, int protection, int flags, int file, off_t offset) {
    test_system.maps++;
    if (test_system.no_map) { errno = ENOMEM; return MAP_FAILED; }
    test_system.live++;
    return mmap(at, size, protection, flags, file, offset);
}

static int system_munmap(void *at, size_t size) {
    test_system.live--;
    if (!at || test_system.live < 0) { test_system.bad_unmap++; return -1; }
    return munmap(at, size);
}

static ssize_t system_read(int file, void *to, size_t n) {
    if (++test_system.reads == test_system.read_fails_at) { errno = EIO; return -1; }
    return read(file, to, n);
}

static int system_open(const char *path, int flags, ...) {
    test_system.flags = flags;
    return open(path, flags, 0600);
}
#define mmap   system_mmap
#define munmap system_munmap
#define read   system_read
#define open   system_open
#endif
#endif
