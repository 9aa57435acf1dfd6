/* Enough of CUDA to run qwen3_cuda.cu on a CPU, so that its kernels can be tested where there is no GPU:

       c++ -std=c++17 -x c++ -Itests/cuda_on_cpu -I. -c qwen3_cuda.cu

   A block's threads are coroutines of one host thread. They switch only where CUDA threads meet: barriers, warp
   exchanges, matrix instructions. Who runs first, and whether a warp runs ahead of the others, changes from block to
   block, and blocks run in a shuffled order: a missing barrier, or a dependence between blocks, shows as a changing
   result. Memory starts as NaN; a warp whose lanes do not all arrive at an exchange, or a block that can never go on,
   is an error that aborts. Sums of matrix instructions are exact float32 here, timing means nothing, and streams do
   their work at once. */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H
#include <atomic>
#include <functional>
#include <mutex>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utility>
#include <vector>

#define QWEN3_CUDA_EMULATED 1
#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __shared__ static thread_local
#define QWEN3_DYNAMIC_SHARED(name) unsigned char *const name = emulated::now().dynamic

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
static inline uint2 make_uint2(unsigned x, unsigned y) { uint2 v = {x, y}; return v; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { uint4 v = {x, y, z, w}; return v; }
static inline float2 make_float2(float x, float y) { float2 v = {x, y}; return v; }
static inline float4 make_float4(float x, float y, float z, float w) { float4 v = {x, y, z, w}; return v; }

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

/* ---- coroutines ------------------------------------------------------------------------------------ */
#if !defined(__x86_64__)
#error "cuda_on_cpu switches stacks for x86-64 only"
#endif
extern "C" void emulated_switch(void **save, void *to);
__asm__(".text\n.weak emulated_switch\n.type emulated_switch, @function\nemulated_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
        ".size emulated_switch, .-emulated_switch\n.section .note.GNU-stack,\"\",@progbits\n.text\n");

namespace emulated {

const size_t STACK = 128 * 1024;

struct product {                        /* of a warpgroup's instruction, this thread's part; done when it is waited for */
    float   *d;
    int      columns, group;
    bool     add, a_in_registers;
    uint64_t a, b;
    float    a_rows[2][16];
};
struct thread { void *sp; char *stack; bool done; std::vector<product> products; int groups; unsigned cluster_turn; };
struct meeting { int waiting; unsigned turn; };         /* a barrier */
struct block_state {
    int live;
    meeting all, named[16];
    uint3 index;
    unsigned char *dynamic;
    long registers;                     /* that its threads have now beyond what they were launched with */
};
struct warp { uint64_t word[2][32][8]; int arrived, live; unsigned turn; };

struct device_block { char *begin, *end; };
inline std::vector<device_block> &device_blocks() { static std::vector<device_block> all; return all; }
inline std::mutex &device_lock() { static std::mutex lock; return lock; }

/* If this is device memory, reads and writes there are errors from now on, with the address sanitizer. */
inline void forbid(void *p, size_t n) {
#ifdef __SANITIZE_ADDRESS__
    const std::lock_guard<std::mutex> held(device_lock());
    for (size_t i = 0; i < device_blocks().size(); i++)
        if ((char *)p >= device_blocks()[i].begin && (char *)p < device_blocks()[i].end)
            __asan_poison_memory_region(p, n);
#else
    (void)p; (void)n;
#endif
}
inline void allow(void *p, size_t n) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(p, n);
#else
    (void)p; (void)n;
#endif
}

struct machine {                        /* one multiprocessor for each host thread */
    std::vector<thread> threads;
    std::vector<warp> warps;
    std::vector<block_state> blocks;    /* of a cluster */
    std::function<void()> body;
    void *scheduler;
    int current, live, block_threads;
    meeting cluster;
    long progress;
    unsigned char *dynamic;
    std::vector<unsigned char> dynamic_memory;
    uint64_t random;
    machine()
        : scheduler(NULL), current(0), live(0), block_threads(32), progress(0), dynamic(NULL), random(1) {}
    ~machine() { for (size_t i = 0; i < threads.size(); i++) free(threads[i].stack); }
};
inline machine &now() { static thread_local machine m; return m; }

inline void die(const char *why) { fprintf(stderr, "cuda_on_cpu: %s\n", why); abort(); }

inline uint64_t random_number() {
    machine &m = now();
    m.random = m.random * 6364136223846793005u + 1442695040888963407u;
    return m.random >> 33;
}

inline void yield() {
    machine &m = now();
    emulated_switch(&m.threads[(size_t)m.current].sp, m.scheduler);
}

inline block_state &block() { return now().blocks[(size_t)(now().current / now().block_threads)]; }

inline void meet(meeting &m, int all) {
    const unsigned turn = m.turn;
    now().progress++;
    if (++m.waiting >= all) { m.waiting = 0; m.turn++; return; }
    while (m.turn == turn) yield();
}

/* The two halves of a barrier of the cluster. */
inline void cluster_arrive() {
    machine &m = now();
    m.threads[(size_t)m.current].cluster_turn = m.cluster.turn;
    m.progress++;
    if (++m.cluster.waiting >= m.live) { m.cluster.waiting = 0; m.cluster.turn++; }
}
inline void cluster_wait() {
    machine &m = now();
    while (m.cluster.turn == m.threads[(size_t)m.current].cluster_turn) yield();
}

/* The same place in another block of the cluster. */
template <class T> T *in_block(T *p, unsigned rank) {
    if (rank >= now().blocks.size()) die("there is no such block in the cluster");
    return (T *)(void *)((char *)p - (char *)block().dynamic + (char *)now().blocks[rank].dynamic);
}

inline void leave() {                   /* a thread has returned */
    machine &m = now();
    block_state &b = block();
    m.threads[(size_t)m.current].done = true;
    m.live--;
    b.live--;
    m.warps[(size_t)m.current / 32].live--;
    m.progress++;
    if (b.live > 0 && b.all.waiting == b.live) { b.all.waiting = 0; b.all.turn++; }
    yield();
    die("a finished thread was resumed");
}

inline void enter() { now().body(); leave(); }

inline void barrier() { meet(block().all, block().live); }

/* From now on this thread has n registers; it began with its share of the 65,536 of a multiprocessor, a multiple of 8. */
inline void have_registers(int n) { block().registers += n - 65536 / now().block_threads / 8 * 8; }

/* All lanes of the warp hand in n words; each gets to see all of them until the next exchange but one. */
inline const uint64_t (*exchange(const uint64_t *words, int n))[8] {
    machine &m = now();
    warp &w = m.warps[(size_t)m.current / 32];
    const unsigned turn = w.turn;
    if (w.live != 32) die("a warp exchanges values after some of its lanes have returned");
    memcpy(w.word[turn & 1][m.current % 32], words, (size_t)n * 8);
    m.progress++;
    if (++w.arrived == 32) { w.arrived = 0; w.turn++; }
    else while (w.turn == turn) yield();
    return w.word[turn & 1];
}

inline void start_thread(int i) {
    machine &m = now();
    thread &t = m.threads[(size_t)i];
    if (!t.stack) t.stack = (char *)aligned_alloc(64, STACK);
    void **sp = (void **)(void *)(t.stack + STACK);
    *--sp = NULL;                       /* keeps the stack aligned as after a call */
    *--sp = (void *)enter;
    for (int r = 0; r < 6; r++) *--sp = NULL;
    t.sp = sp;
    t.done = false;
    t.products.clear();
    t.groups = 0;
}

/* Let each of these threads go on once, in some order. */
inline void run_threads(int begin, int n) {
    machine &m = now();
    const int first = (int)(random_number() % (uint64_t)n), step = random_number() % 2 ? 1 : n - 1;
    for (int k = 0, i = first; k < n; k++, i = (i + step) % n) {
        if (m.threads[(size_t)(begin + i)].done) continue;
        m.current = begin + i;
        threadIdx.x = (unsigned)((begin + i) % m.block_threads);
        blockIdx = block().index;
        m.dynamic = block().dynamic;
        emulated_switch(&m.scheduler, m.threads[(size_t)(begin + i)].sp);
    }
}

/* The blocks of a cluster, side by side. (Only one block at a time has static shared memory of its own.) */
inline void run_cluster(const std::vector<uint3> &indices, dim3 block, size_t shared) {
    machine &m = now();
    const int each = (int)(block.x * block.y * block.z), n = each * (int)indices.size();
    const size_t room = (shared + 2047) / 1024 * 1024;
    if (block.y != 1 || block.z != 1 || each % 32 != 0 || each > 1024)
        die("blocks must have a multiple of 32 threads in x");
    while (m.threads.size() < (size_t)n) {
        const thread none = {NULL, NULL, true, std::vector<product>(), 0, 0};
        m.threads.push_back(none);
    }
    m.warps.assign((size_t)n / 32, warp());
    for (size_t i = 0; i < m.warps.size(); i++) m.warps[i].live = 32;
    m.dynamic_memory.assign(room * indices.size() + 1024, 0xFF);
    m.blocks.assign(indices.size(), block_state());
    for (size_t i = 0; i < indices.size(); i++) {
        unsigned char *memory = m.dynamic_memory.data();
        m.blocks[i].live = each;
        m.blocks[i].index = indices[i];
        m.blocks[i].dynamic = memory + (1024 - (uintptr_t)memory % 1024) % 1024 + i * room;
    }
    m.cluster = meeting();
    m.block_threads = each;
    m.live = n;
    for (int i = 0; i < n; i++) start_thread(i);
    const bool fair = random_number() % 2 != 0;         /* or each warp for as long as it can go on */
    int idle = 0;                       /* rounds; who polls what another block writes may go on some times unseen */
    while (m.live > 0) {
        const long before = m.progress;
        if (fair) run_threads(0, n);
        else for (int k = 0, w = (int)(random_number() % (uint64_t)(n / 32)); k < n / 32; k++, w = (w + 1) % (n / 32)) {
            long mine;
            do { mine = m.progress; run_threads(32 * w, 32); } while (m.progress != mine);
        }
        idle = m.progress == before ? idle + 1 : 0;
        if (idle > (indices.size() > 2 ? 1000 : 0)) die("a block can never go on: its threads wait for each other");
    }
    for (size_t i = 0; i < m.blocks.size(); i++)
        if (m.blocks[i].registers > 0) die("more registers than the block was launched with: it would wait for them for ever");
}

inline void run_grid(dim3 grid, dim3 block, size_t shared, unsigned cluster, const std::function<void()> &body) {
    machine &m = now();
    const size_t n = (size_t)grid.x * grid.y * grid.z;
    std::vector<uint32_t> order(n / cluster);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        die("the grid is empty or too large");
    if (grid.x % cluster) die("the grid is not a whole number of clusters");
    for (size_t i = 0; i < order.size(); i++) order[i] = (uint32_t)i;
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
    gridDim = grid;
    blockDim = block;
    threadIdx.y = threadIdx.z = 0;
    m.body = body;
    for (size_t i = 0; i < order.size(); i++) {
        std::vector<uint3> indices(cluster);
        for (unsigned k = 0; k < cluster; k++) {
            const uint32_t at = order[i] * cluster + k;
            indices[k].x = at % grid.x;
            indices[k].y = at / grid.x % grid.y;
            indices[k].z = at / grid.x / grid.y;
        }
        run_cluster(indices, block, shared);
    }
}

inline uint64_t bits_of(const void *p, size_t n) { uint64_t v = 0; memcpy(&v, p, n); return v; }

template <class T> T shuffle(T v, int from) {
    const uint64_t word = bits_of(&v, sizeof v);
    const uint64_t (*all)[8] = exchange(&word, 1);
    T out;
    memcpy(&out, &all[from], sizeof out);
    return out;
}

} /* namespace emulated */

/* ---- device functions ----------------------------------------------------------------------------------- */
static inline void __syncthreads() { emulated::barrier(); }
static inline void __syncwarp(unsigned = 0xFFFFFFFFu) { const uint64_t none = 0; emulated::exchange(&none, 1); }
static inline void __threadfence() {}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) {
    return emulated::shuffle(v, (emulated::now().current % 32) ^ mask);
}
template <class T> T __shfl_sync(unsigned, T v, int lane) { return emulated::shuffle(v, lane % 32); }
template <class T> T __shfl_up_sync(unsigned, T v, unsigned by) {
    const int lane = emulated::now().current % 32;
    return emulated::shuffle(v, lane >= (int)by ? lane - (int)by : lane);
}
static inline unsigned __ballot_sync(unsigned, int is) {
    unsigned all = is ? 1u << emulated::now().current % 32 : 0;
    for (int o = 16; o > 0; o >>= 1) all |= __shfl_xor_sync(0xFFFFFFFFu, all, o);
    return all;
}
static inline unsigned __reduce_max_sync(unsigned, unsigned v) {
    for (int o = 16; o > 0; o >>= 1) {
        const unsigned other = __shfl_xor_sync(0xFFFFFFFFu, v, o);
        v = other > v ? other : v;
    }
    return v;
}
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T atomicAdd(T *p, T v) { const T old = *p; *p = old + v; return old; }
static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long v) {
    const unsigned long long old = *p;
    *p = old + v;
    return old;
}
template <class T> T atomicMax(T *p, T v) { const T old = *p; if (v > old) *p = v; return old; }
template <class T> T atomicOr(T *p, T v) { const T old = *p; *p = old | v; return old; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline int __float2int_rn(float f) { return f == f ? (int)lrintf(fmaxf(fminf(f, 2147483520.0f), -2147483648.0f)) : 0; }
/* c + the sum of the products of four signed bytes each */
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
    return c;
}
/* Byte i of the result is that of eight which nibble i of s names. */
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const unsigned long long all = (unsigned long long)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(all >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

/* ---- 16-bit floats --------------------------------------------------------------------------------------- */
struct __half { unsigned short bits; };
static inline __half __ushort_as_half(unsigned short u) { __half h; h.bits = u; return h; }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }

static inline float __half2float(__half h) {
    const unsigned sign = (unsigned)(h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31u, fraction = h.bits & 1023u;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 5.9604644775390625e-8f;
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Round to nearest, ties to even. */
static inline __half __float2half_rn(float f) {
    const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return __ushort_as_half(0x7FFF);
    if (a >= 0x477FF000u) return __ushort_as_half((unsigned short)(sign | 0x7C00u));
    if (a < 0x38800000u)
        return __ushort_as_half((unsigned short)(sign | (unsigned)lrintf(__uint_as_float(a) * 16777216.0f)));
    return __ushort_as_half((unsigned short)(sign | (a - 0x38000000u + 0xFFFu + (a >> 13 & 1u)) >> 13));
}

struct __nv_bfloat16 { unsigned short bits; };
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
static inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((unsigned)h.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    const unsigned u = __float_as_uint(f);
    __nv_bfloat16 h;
    h.bits = (u & 0x7FFFFFFFu) > 0x7F800000u ? (unsigned short)0x7FFF
                                             : (unsigned short)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
    return h;
}

static inline uint4 load_stream(const void *p) {
    uint4 v;
    if ((uintptr_t)p % 16 != 0) emulated::die("a 16-byte load is not aligned");
    memcpy(&v, p, 16);
    return v;
}
static inline uint4 load_ahead(const void *p) { return load_stream(p); }
static inline void prefetch(const void *) {}
static inline void prefetch_bulk(const void *, unsigned) {}
static inline void cluster_arrive() { emulated::cluster_arrive(); }
static inline void cluster_wait() { emulated::cluster_wait(); }
static inline void copy_async(void *dst, const void *src, bool valid) {
    if ((uintptr_t)dst % 16 != 0 || (uintptr_t)src % 16 != 0) emulated::die("a 16-byte copy is not aligned");
    if (valid) memcpy(dst, src, 16);
    else memset(dst, 0, 16);
}
static inline void copy_once(void *dst, const void *src, bool valid) { copy_async(dst, src, valid); }
static inline void copy_commit() {}
template <int PENDING> void copy_wait() {}

static inline void load_matrices_of(unsigned (&r)[4], const void *row, bool transposed) {
    const int lane = emulated::now().current % 32;
    const uint64_t word = (uint64_t)(uintptr_t)row;
    if ((uintptr_t)row % 16 != 0) emulated::die("a matrix row is not aligned");
    const uint64_t (*all)[8] = emulated::exchange(&word, 1);
    for (int i = 0; i < 4; i++) {
        unsigned short e[2];
        for (int j = 0; j < 2; j++) {
            const int y = transposed ? lane % 4 * 2 + j : lane / 4, x = transposed ? lane / 4 : lane % 4 * 2 + j;
            memcpy(&e[j], (const char *)(uintptr_t)all[i * 8 + y][0] + 2 * x, 2);
        }
        r[i] = (unsigned)e[0] | (unsigned)e[1] << 16;
    }
    emulated::exchange(&word, 1);       /* nobody overwrites the matrices before all have read */
}
static inline void load_matrices(unsigned (&r)[4], const void *row) { load_matrices_of(r, row, false); }
static inline void load_matrices_transposed(unsigned (&r)[4], const void *row) { load_matrices_of(r, row, true); }

/* Lane l has row l / 4, columns l % 4 * 2 and the next. */
static inline unsigned transpose_matrix(unsigned v) {
    const int lane = emulated::now().current % 32;
    const uint64_t word = v;
    const uint64_t (*all)[8] = emulated::exchange(&word, 1);
    unsigned out = 0;
    for (int i = 0; i < 2; i++) {
        const int row = lane % 4 * 2 + i, col = lane / 4;
        out |= ((unsigned)all[row * 4 + col / 2][0] >> (16 * (col % 2)) & 0xFFFFu) << (16 * i);
    }
    return out;
}

static inline float emulated_element(unsigned pair, int i, __half) {
    return __half2float(__ushort_as_half((unsigned short)(pair >> (16 * i))));
}
static inline float emulated_element(unsigned pair, int i, __nv_bfloat16) {
    return __uint_as_float(pair >> (16 * i) << 16);
}

static inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
static inline unsigned add_halves(unsigned a, unsigned b) {
    unsigned sum = 0;
    for (int i = 0; i < 2; i++)
        sum |= (unsigned)__half_as_ushort(__float2half_rn(emulated_element(a, i, __half()) +
                                                          emulated_element(b, i, __half()))) << (16 * i);
    return sum;
}

/* d[16, 8] += a[16, 16] b[16, 8]: which lane holds what is the hardware's fragment layout of m16n8k16. */
template <class T> void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T type) {
    const int lane = emulated::now().current % 32;
    const uint64_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const uint64_t (*all)[8] = emulated::exchange(words, 6);
    for (int j = 0; j < 4; j++) {
        const int row = lane / 4 + (j >= 2 ? 8 : 0), col = lane % 4 * 2 + j % 2;
        for (int k = 0; k < 16; k++) {
            const unsigned x = (unsigned)all[row % 8 * 4 + k % 8 / 2][(row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0)];
            const unsigned y = (unsigned)all[col * 4 + k % 8 / 2][4 + (k >= 8 ? 1 : 0)];
            d[j] += emulated_element(x, k % 2, type) * emulated_element(y, k % 2, type);
        }
    }
}

/* ---- the runtime ------------------------------------------------------------------------------------------ */
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDevice = 101,
    cudaErrorPeerAccessAlreadyEnabled = 704,
    cudaErrorNoDevice = 100,
    cudaErrorNotReady = 600
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0, cudaHostAllocMapped = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef std::vector<std::function<void()> > *cudaGraph_t, *cudaGraphExec_t;
struct emulated_stream { cudaGraph_t graph; };
typedef emulated_stream *cudaStream_t;
struct emulated_event {
    long copies;                        /* to the host, that were enqueued before it */
    int  device; bool behind;           /* what a device that is stuck does not get to */
};
typedef emulated_event *cudaEvent_t;
struct cudaDeviceProp {
    int major, minor, multiProcessorCount, l2CacheSize;
    size_t sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    char name[256];
};
struct cudaFuncAttributes { int numRegs; };
enum {
    cudaLaunchAttributeProgrammaticStreamSerialization,
    cudaLaunchAttributeClusterDimension,
    cudaLaunchAttributeCooperative
};
struct cudaLaunchAttribute {
    int id;
    struct { int programmaticStreamSerializationAllowed, cooperative; dim3 clusterDim; } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

inline int emulated_capability = 80;    /* tests may change these: the chip, its size, */
inline int emulated_sms = 5;
inline size_t emulated_memory = (size_t)4 << 30;
inline std::atomic<size_t> emulated_used;
inline int emulated_devices = 1;
inline thread_local int emulated_device;
inline std::atomic<long> emulated_calls, emulated_fail_at;  /* the call that fails, counted from 1; 0: none */
inline std::atomic<long> emulated_live;         /* objects and blocks of memory that exist */
inline std::atomic<long> emulated_copies, emulated_waited;  /* copies to or from the host: enqueued, and waited for */

/* For tests in C: let the n-th call from now fail (0: none); how many calls there were; what has not been freed. */
extern "C" __attribute__((used)) inline void cuda_on_cpu_fail(long n) {
    emulated_calls = 0;
    emulated_fail_at = n;
}
extern "C" __attribute__((used)) inline void cuda_on_cpu_chip(int capability) { emulated_capability = capability; }
extern "C" __attribute__((used)) inline void cuda_on_cpu_devices(int n) { emulated_devices = n; }
extern "C" __attribute__((used)) inline void cuda_on_cpu_size(int multiprocessors) { emulated_sms = multiprocessors; }
extern "C" __attribute__((used)) inline long cuda_on_cpu_calls(void) { return emulated_calls; }
extern "C" __attribute__((used)) inline long cuda_on_cpu_live(void) { return emulated_live; }
/* Copies to or from the host that nobody has waited for. (They are done at once, but a GPU would still be at them.) */
extern "C" __attribute__((used)) inline long cuda_on_cpu_under_way(void) { return emulated_copies - emulated_waited; }

/* A device is stuck while it waits for a rank that is gone: it does nothing more, and nothing ends. */
inline std::atomic<bool> emulated_stuck[8];
inline std::atomic<int> emulated_gone{-1};      /* this rank does not come to meetings any more; -1: all do */
extern "C" __attribute__((used)) inline void cuda_on_cpu_leave(int rank) { emulated_gone = rank; }
static inline void emulated_sync(int device) {
    if (emulated_stuck[device]) emulated::die("the host waits for ever");
}

static inline cudaError_t emulated_call() {
    return ++emulated_calls == emulated_fail_at ? cudaErrorMemoryAllocation : cudaSuccess;
}
static inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                 ? "no error"
           : e == cudaErrorMemoryAllocation ? "out of memory"
           : e == cudaErrorNoDevice         ? "no device"
                                            : "an error";
}
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline cudaError_t cudaGetDeviceCount(int *n) {
    *n = emulated_devices;
    return emulated_devices ? cudaSuccess : cudaErrorNoDevice;
}
static inline cudaError_t cudaGetDevice(int *d) { *d = emulated_device; return cudaSuccess; }
static inline cudaError_t cudaSetDevice(int d) {
    emulated_device = d;
    return d < emulated_devices ? cudaSuccess : cudaErrorInvalidDevice;
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    p->major = emulated_capability / 10;
    p->minor = emulated_capability % 10;
    p->multiProcessorCount = emulated_sms;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->l2CacheSize = 1 << 20;
    snprintf(p->name, sizeof p->name, "CUDA on CPU");
    return cudaSuccess;
}
static inline cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) {
    *can = from != to && to < emulated_devices;
    return emulated_call();
}
static inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return emulated_call(); }
template <class K> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, K *) { return cudaSuccess; }
template <class K> cudaError_t cudaFuncSetAttribute(K *, cudaFuncAttribute, int) { return cudaSuccess; }

template <class K> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, K *, int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}
template <class K> cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, K *, const cudaLaunchConfig_t *c) {
    *clusters = 2 * emulated_sms / (int)c->attrs[0].val.clusterDim.x;
    return emulated_call();
}
enum cudaDeviceAttr { cudaDevAttrCooperativeLaunch, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                      cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth };
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    static const int values[] = {1, 232448, 2619000, 5120};
    *value = values[what];
    return cudaSuccess;
}

static inline cudaError_t cudaMalloc(void **p, size_t size) {
    *p = NULL;
    if (emulated_call() != cudaSuccess || size > emulated_memory - emulated_used) return cudaErrorMemoryAllocation;
    char *block = (char *)aligned_alloc(256, (size + 511) / 256 * 256);
    if (!block) return cudaErrorMemoryAllocation;
    memcpy(block, &size, sizeof size);
    memset(block + 256, 0xFF, (size + 255) / 256 * 256);        /* NaN */
    emulated_used += size;
    emulated_live++;
    const emulated::device_block range = {block + 256, block + 256 + size};
    const std::lock_guard<std::mutex> held(emulated::device_lock());
    emulated::device_blocks().push_back(range);
    *p = block + 256;
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    size_t size;
    if (!p) return cudaSuccess;
    memcpy(&size, (char *)p - 256, sizeof size);
    emulated_used -= size;
    emulated_live--;
    emulated::allow(p, size);
    const std::lock_guard<std::mutex> held(emulated::device_lock());
    for (size_t i = 0; i < emulated::device_blocks().size(); i++)
        if (emulated::device_blocks()[i].begin == (char *)p) {
            emulated::device_blocks().erase(emulated::device_blocks().begin() + (long)i);
            break;
        }
    free((char *)p - 256);
    return cudaSuccess;
}
static inline cudaError_t cudaHostAlloc(void **p, size_t size, unsigned) {
    *p = emulated_call() == cudaSuccess ? malloc(size) : NULL;
    if (*p) memset(*p, 0xFF, size);
    emulated_live += *p != NULL;
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
static inline cudaError_t cudaFreeHost(void *p) {
    emulated_live -= p != NULL;
    free(p);
    return cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t *f, size_t *total) {
    *f = emulated_memory - emulated_used;
    *total = emulated_memory;
    return cudaSuccess;
}

/* Do it now, or note it down if the stream is being captured. */
static inline cudaError_t emulated_enqueue(cudaStream_t s, const std::function<void()> &work) {
    const cudaError_t e = emulated_call();
    if (e != cudaSuccess) return e;
    if (s && s->graph) s->graph->push_back(work);
    else if (!emulated_stuck[emulated_device]) work();
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t s) {
    return emulated_enqueue(s, [=] {
        memmove(to, from, n);
        if (kind != cudaMemcpyDeviceToDevice) emulated_copies++;
    });
}
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind) {
    memmove(to, from, n);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                            size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t s) {
    return emulated_enqueue(s, [=] {
        if (kind != cudaMemcpyDeviceToDevice) emulated_copies++;
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    });
}
static inline cudaError_t cudaMemsetAsync(void *to, int v, size_t n, cudaStream_t s) {
    return emulated_enqueue(s, [=] { memset(to, v, n); });
}
static inline cudaError_t cudaMemset2DAsync(void *to, size_t pitch, int v, size_t width, size_t height,
                                            cudaStream_t s) {
    return emulated_enqueue(s, [=] { for (size_t i = 0; i < height; i++) memset((char *)to + i * pitch, v, width); });
}
/* What a test counts: streams, events and graphs that are there */
template <class T, class... A> cudaError_t emulated_create(T **made, const A &...from) {
    *made = NULL;
    if (emulated_call() != cudaSuccess) return cudaErrorMemoryAllocation;
    *made = new T(from...);
    emulated_live++;
    return cudaSuccess;
}
template <class T> cudaError_t emulated_destroy(T *made) {
    emulated_live--;
    delete made;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return emulated_create(s); }
static inline cudaError_t cudaStreamDestroy(cudaStream_t s) { return emulated_destroy(s); }
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    emulated_sync(emulated_device);
    emulated_waited = emulated_copies.load();
    return cudaSuccess;
}
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return emulated_create(e); }
static inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
static inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return emulated_destroy(e); }
static inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    e->copies = emulated_copies;
    e->device = emulated_device;
    e->behind = emulated_stuck[emulated_device];
    return emulated_call();
}
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return emulated_call(); }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (e->behind) emulated_sync(e->device);
    if (e->copies > emulated_waited) emulated_waited = e->copies;
    return cudaSuccess;
}
static inline cudaError_t cudaEventQuery(cudaEvent_t e) {
    return e->behind && emulated_stuck[e->device] ? cudaErrorNotReady : cudaEventSynchronize(e);
}
static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { *ms = 0; return cudaSuccess; }
static inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (s->graph) return cudaErrorInvalidValue;
    s->graph = new std::vector<std::function<void()> >();
    emulated_live++;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    *g = s->graph;
    s->graph = NULL;
    return *g ? cudaSuccess : cudaErrorInvalidValue;
}
static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long) {
    return emulated_create(e, *g);
}
static inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { return emulated_destroy(g); }
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return emulated_destroy(e); }
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
    if (emulated_call() != cudaSuccess) return cudaErrorMemoryAllocation;
    for (size_t i = 0; i < e->size() && !emulated_stuck[emulated_device]; i++) (*e)[i]();
    return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(P...), A... args) {
    const dim3 grid = c->gridDim, block = c->blockDim;
    const size_t shared = c->dynamicSmemBytes;
    unsigned cluster = 1;
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
        else if (c->attrs[i].id == cudaLaunchAttributeCooperative) cluster = grid.x;    /* all side by side */
    return emulated_enqueue(
        c->stream, [=] { emulated::run_grid(grid, block, shared, cluster, [=] { kernel((P)args...); }); });
}
#endif
