/* qwen3_cuda.cu - the CUDA backend of qwen3.h, behind one symbol: qwen3_cuda_backend().

       nvcc -O3 -std=c++17 -arch=native -c qwen3_cuda.cu
       cc -O2 app.c qwen3_cuda.o -lcublasLt -lcudart -lstdc++ -lm -lpthread
   With -DQWEN3_CUDA_NO_CUBLASLT that library is not needed: products of many rows are then done by a kernel
   of this file's wherever Hopper's own do not serve. With -DQWEN3_CUDA_NCCL and -lnccl (2.18 or later)
   several devices can share a model; a rank that waits for another longer than QWEN3_CUDA_RANK_SECONDS (30)
   gives up with an error.

   Compute capability 7.5 and up. Everything between the matrices is float32: residual, norms, gains,
   rotation, scores, softmax, the SwiGLU product and all accumulators.

   WEIGHTS  F32 and F16 as stored. BF16 is held as F16 times a power of two, one per matrix, which is the
     same two bytes and the same value for everything within 2^32 of the matrix's largest (below that the
     error is under 2^-40 of the largest). So there is one 16-bit format, every tensor core since sm_75
     multiplies it, and what is rounded to it loses 2^-12 instead of 2^-9. Quantised weights stay as they
     are, but for where the parts of a block lie. Up to 4 rows are multiplied by their whole numbers, 5 to
     32 as F16 by tensor cores that take the codes as they are; for more, and without 160 KB of shared
     memory from 9 on, the matrix in hand becomes F16 in a scratch. With
     QWEN3_LOAD_UNPACK they become F16 when they are loaded.
   INPUTS   of a product with at most 8 rows (on Hopper 1) stay float32. With more rows and 16-bit weights
     each row is rounded once, to F16 times a power of two of its own: nothing overflows, whatever its size.
     With quantised weights up to 4 rows become whole numbers of 16 bits instead, with a scale for each 32.
     The input of q, k and v keeps 22 bits, as two such terms and two products: the gains of the norms after
     it, up to 100 in real models, blow up what is lost there before the softmax. (On Hopper it is rounded
     once, too: beside the rounding of the cache that makes no difference that matters: docs/PERFORMANCE.md.)
   HOPPER has kernels of its own (sm_90a; head_dim 128, widths that are multiples of 128, 16-bit weights) for
     2 rows and more: products whose sums the tensor cores add up 128 elements at a time, since they cut off
     what they add, with everything up to the next product in the same kernel; and, for more than 64 rows,
     attention on an F16 cache.
   PATHS    How a batch goes through the layers depends on its rows and on the chip. Each path is a table of
     functions (struct path), chosen in one place (path_for). tests/cuda_lab.cu has one more, with one plain
     kernel for each operation, to compare with.
   ORDER    No sum depends on timing: splits follow from shapes, partial sums are added in a fixed order,
     and atomics only count integers. The same input gives the same bits. In an invariant context a row's bits
     do not depend on the others of a batch of up to 16 rows either: all of these go one way, by kernels whose
     sums depend on the row alone.
   WORDS    A row is a token's vector (a row of x) or a row of a matrix; a tile is what a block multiplies at
     a time, a ring the stages in shared memory that tiles come to by asynchronous copies. In names vector_ is
     1 to 8 rows, their weights in registers; stream_ is one row, its weights by a ring; block_ is quantised
     weights by 1 to 8 rows, few_ by 5 to 32 on tensor cores; gemm_ is any number of rows by cuBLASLt. On
     Hopper skinny_ is a batch of 2 to 64 rows, where the bytes of the weights count, large_ is more rows,
     where the speed of the tensor cores does, and hopper_ is what both share; two_ is one row, two kernels a
     layer. halves are F16.

   Rooms: errors, memory, launching; device helpers; model and context; weights; then the operations, each
   with its kernels and what launches them: rows, norm, product, Q K V, attention, output, MLP, few rows, two
   kernels a layer, experts, logits, choice; then paths, creating a context, steps, the backend. A kernel's
   head comment gives shapes, launch, order of the sums, and the function of qwen3.h that it equals.
   tests/cuda_lab.cu includes this file and adds what only tests and benches want. */

#define QWEN3_BACKEND_INTERFACE
#include "qwen3.h"

#include <cuda.h>               /* types only */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifndef QWEN3_CUDA_NO_CUBLASLT
  #include <cublasLt.h>
#endif
#ifdef QWEN3_CUDA_NCCL
  #include <nccl.h>
  #ifndef QWEN3_CUDA_RANK_SECONDS
    #define QWEN3_CUDA_RANK_SECONDS 30
  #endif
#endif
#include <limits.h>
#include <stdlib.h>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#ifndef _WIN32
  #include <signal.h>
#endif
#include <type_traits>

namespace {

typedef __half        half_t;
typedef __nv_bfloat16 bf16_t;
typedef unsigned long long u64;

#define DEVICE    static __device__ __forceinline__
#define UNROLL    _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#ifdef QWEN3_CUDA_EMULATED
#define NO_INLINE
#else
#define NO_INLINE __noinline__
#endif

const int RING          = 4;            /* uploads in flight */
#ifdef QWEN3_CUDA_NO_CUBLASLT
const size_t WORKSPACE  = 0;            /* of cuBLASLt */
#else
const size_t WORKSPACE  = (size_t)32 << 20;
#endif
const size_t PIECE      = (size_t)1 << 20;      /* of an upload of weights */
const int SLOTS         = 32;           /* so many pieces are filled or on their way */
#ifdef QWEN3_CUDA_EMULATED
/* bytes of the scales that come back at a time: few, so that tests see pieces */
const size_t SCALES_PIECE = 16;
/* up to so many rows experts read each weight for a few, then by tiles; in blocks on Hopper */
const int GROUP_LEAST   = 16, GROUP_LEAST_BLOCKS = 16;
#else
const size_t SCALES_PIECE = PIECE;
const int GROUP_LEAST   = 64, GROUP_LEAST_BLOCKS = 24;
#endif
const int MOST_HELPERS  = 14;
const int MATVEC_ROWS   = 8;            /* up to here matrix-vector kernels, then cuBLASLt */
/* in an invariant context a row of up to so many has the bits that it has alone; where its attention is not
   attention_decode's, it is split as that of ... rows */
const int SAME_ROWS     = QWEN3I_SAME_ROWS;
const int SAME_SPLIT    = 4;
const int MATVEC_WARPS  = 8;
const int MATVEC_TILE   = 8192;         /* floats of x that a block holds at a time */
const int HEAD_ROWS     = 64;           /* the most rows whose logits are computed at a time */
const int MOST_RANKS    = 16;           /* of one process */
const int PEER_ROWS     = 64;           /* sums over ranks of up to so many rows go by peer access, ... */
const int PEER_BLOCKS   = 256;          /* ... by up to so many blocks */
#ifdef QWEN3_CUDA_NCCL
const int PEER_THREADS  = 128;
const int PEER_PATIENCE = 4096;         /* polls before a block asks the host, over the bus, if it goes on */
const int RANK_SECONDS  = QWEN3_CUDA_RANK_SECONDS;      /* that a rank waits for another */
#endif
const int MAX_SPLITS    = 32;           /* of one row's positions, in attention */
const int SPLIT_WARPS   = 4;
const int TILE_ROWS     = 64;           /* (token, head) rows and ...               */
const int TILE_POS      = 32;           /* ... positions of a tile of attention      */
const int MAX_HEAD_DIM  = 256;
const int VECTORS       = 8;            /* of four, of a row of the MLP that a thread keeps */
const float LOG2E       = 1.44269504088896f;
const float LOWEST      = QWEN3I_BANNED;        /* stands for minus infinity */

static __host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
template <class T> static __host__ __device__ inline T least(T a, T b) { return a < b ? a : b; }
static __host__ __device__ inline int round_up(int a, int b) { return (a + b - 1) / b * b; }
template <class T> static T most(T a, T b) { return a > b ? a : b; }

/* The most threads of a block, of which each keeps K vectors of a row. */
static constexpr __host__ __device__ int norm_threads(int k) { return k > 4 ? 256 : k > 2 ? 512 : 1024; }

/* ================================================================================================
   ERRORS, MEMORY, LAUNCHING
   ================================================================================================ */
static qwen3_result cuda_fail(const qwen3i_err *err, cudaError_t e, const char *what) {
    cudaGetLastError();                 /* or the next launch reports it again */
    return qwen3i_fail(err, e == cudaErrorMemoryAllocation ? QWEN3_ERR_DEVICE_MEMORY : QWEN3_ERR_DEVICE,
                "CUDA: %s: %s", what, cudaGetErrorString(e));
}

#define TRY(call) do { const qwen3_result try_ = (call); if (try_ != QWEN3_OK) return try_; } while (0)
#define CUDA_TRY(call) \
    do { \
        const cudaError_t e_ = (call); \
        if (e_ != cudaSuccess) return cuda_fail(err, e_, #call); \
    } while (0)

#ifdef QWEN3_CUDA_NCCL
#define NCCL_TRY(call) \
    do { \
        const ncclResult_t e_ = (call); \
        if (e_ != ncclSuccess) \
            return qwen3i_fail(err, QWEN3_ERR_DEVICE, "NCCL: %s: %s", #call, ncclGetErrorString(e_)); \
    } while (0)
#endif

/* Makes a device current and afterwards restores the caller's. */
struct device_guard {
    int before;
    cudaError_t status;
    explicit device_guard(int device) : before(device), status(cudaGetDevice(&before)) {
        if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
        now = device;
    }
    ~device_guard() { if (before != now) cudaSetDevice(before); }
private:
    int now;
    device_guard(const device_guard &);
    device_guard &operator=(const device_guard &);
};

static void *host_alloc(const qwen3_allocator *a, size_t size) {
    void *p = a->alloc ? a->alloc(size, a->user) : malloc(size);
    if (p) memset(p, 0, size);
    return p;
}

static void host_free(const qwen3_allocator *a, void *p, size_t size) {
    if (!p) return;
    if (a->free) a->free(p, size, a->user);
    else free(p);
}

static qwen3_result no_host_memory(const qwen3i_err *err, u64 size) {
    return qwen3i_fail(err, QWEN3_ERR_MEMORY, "out of memory: %llu bytes for the CUDA backend",
                       (unsigned long long)size);
}

/* One block of device or host memory, handed out in pieces. Without a block (NULL) it is measured. */
struct arena {
    qwen3i_arena all;
    explicit arena(void *block) : all(qwen3i_arena_at(block, 256)) {}
    template <class T> T *take(u64 n, u64 times = 1) {
        T *p = (T *)qwen3i_arena_take(&all, n, times, sizeof(T));
#ifdef QWEN3_CUDA_EMULATED              /* a gap that nobody may touch */
        void *gap = qwen3i_arena_take(&all, 256, 1, 1);
        if (gap) emulated::forbid(gap, 256);
#endif
        return p;
    }
    u64 size() const { return qwen3i_arena_size(&all); }
};

static qwen3_result device_alloc(char **out, u64 size, const char *what, const qwen3i_err *err) {
    size_t free_bytes = 0, total = 0;
    const cudaError_t e =
        qwen3i_size_fits(size) ? cudaMalloc((void **)out, (size_t)size) : cudaErrorMemoryAllocation;
    if (e == cudaSuccess) return QWEN3_OK;
    *out = NULL;
    if (e != cudaErrorMemoryAllocation) return cuda_fail(err, e, what);
    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total);
    return qwen3i_fail(err, QWEN3_ERR_DEVICE_MEMORY,
                       "out of device memory: %s needs %.1f MiB, %.1f of %.1f MiB are free", what,
                       (double)size / 1048576.0, (double)free_bytes / 1048576.0, (double)total / 1048576.0);
}

/* In clusters of so many blocks; 1: none, or what the kernel itself says. early: as below. */
template <class... P, class... A>
static cudaError_t launch_clusters(bool early, int blocks, cudaStream_t stream, dim3 grid, int threads,
                                   size_t shared, void (*kernel)(P...), A... args) {
    cudaLaunchConfig_t config = cudaLaunchConfig_t();
    cudaLaunchAttribute attributes[2];
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 0;
    if (early) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (blocks > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = (unsigned)blocks;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, (P)args...);
}

template <class... P, class... A>
static cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, size_t shared, void (*kernel)(P...),
                          A... args) {
    return launch_clusters(false, 1, stream, grid, threads, shared, kernel, args...);
}

/* For a kernel that calls wait_for_previous(): where the chip can (sm_90 on), it may start before the one
   before it has ended (programmatic dependent launch). */
template <class... P, class... A>
static cudaError_t launch_early(bool can, cudaStream_t stream, dim3 grid, int threads, size_t shared,
                                void (*kernel)(P...), A... args) {
    return launch_clusters(can, 1, stream, grid, threads, shared, kernel, args...);
}

/* The same with as much shared memory as the kernel asks for. */
template <class... P, class... A>
static cudaError_t launch_shared(bool early, int cluster, cudaStream_t stream, dim3 grid, int threads,
                                 size_t shared, void (*kernel)(P...), A... args) {
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return e != cudaSuccess ? e :
                              launch_clusters(early, cluster, stream, grid, threads, shared, kernel, args...);
}

template <class K> static qwen3_result allow_shared(K *kernel, size_t bytes, const qwen3i_err *err) {
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return QWEN3_OK;
}

static dim3 grid1(int x)        { return dim3((unsigned)x); }
static dim3 grid2(int x, int y) { return dim3((unsigned)x, (unsigned)y); }

/* Threads for a block that works on rows of n elements, `each` at a time: fewer if there are many rows. */
static int row_threads(int n, int each, int rows) {
    const int want = round_up(ceil_div(n, each), 32), limit = rows > 512 ? 256 : 1024;
    return want < 32 ? 32 : want > limit ? limit : want;
}

/* ================================================================================================
   DEVICE HELPERS
   ================================================================================================ */
/* Programmatic dependent launch (sm_90 on; on an H200 worth 11 % of the decode speed of 0.6B, 1 % of that of
   8B): a kernel starts while the one before it still runs. It waits for that one's results before it reads
   anything but weights and older data, and lets the next kernel start when its own blocks have little left to
   do. */
DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Instructions without a C++ name. An emulator may bring its own. */
#ifndef QWEN3_CUDA_EMULATED
#ifdef QWEN3_CUDA_NCCL
/* What this block has written before its last barrier is there for all devices that see this value; ... */
DEVICE void store_for_all(unsigned *p, unsigned v) {
    __threadfence_system();
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
/* ... and who has seen it sees that, too. */
DEVICE unsigned load_of_all(const unsigned *p) {
    unsigned v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
/* Two values, each beside a tag in eight bytes that are written at once, also to another device: who sees the
   tag has the value, without a fence. */
DEVICE void store_tagged(uint4 *p, float2 v, unsigned tag) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(p), "r"(__float_as_uint(v.x)),
                 "r"(tag), "r"(__float_as_uint(v.y)) : "memory");
}
DEVICE uint4 load_tagged(const uint4 *p) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
#endif
#define QWEN3_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

/* 16 bytes that are read once: past the L1 cache. */
DEVICE uint4 load_stream(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/* Brings a line to the L2; 16 n bytes (sm_90 on). */
DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE void prefetch_bulk(const void *p, unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(p), "r"(bytes) : "memory");
#endif
}

DEVICE unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

/* 16 bytes from global to shared memory, or zeros if !valid, without waiting (sm_80 on). */
DEVICE void copy_async(void *dst, const void *src, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(dst)), "l"(src), "r"(valid ? 16 : 0) : "memory");
#else
    *(uint4 *)dst = valid ? *(const uint4 *)src : make_uint4(0, 0, 0, 0);
#endif
}
/* The same for what is read once in a step: the L2 evicts it first. */
DEVICE void copy_once(void *dst, const void *src, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 :: "r"(shared_address(dst)), "l"(src), "r"(valid ? 16 : 0), "l"(policy) : "memory");
#else
    copy_async(dst, src, valid);
#endif
}
DEVICE void copy_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING> DEVICE void copy_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#endif
}

/* Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. */
DEVICE void load_matrices(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

/* An 8x8 matrix of 16-bit elements, of which each lane has two of a row, transposed. */
DEVICE unsigned transpose_matrix(unsigned v) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
    return v;
}

/* d[16, 8] += a[16, 16] b[16, 8] with float32 sums; sm_75 takes two steps of 8. */
DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, half_t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, "
        "%1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16_t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    (void)d; (void)a; (void)b0; (void)b1;       /* never launched there */
#endif
}

/* (a & b) | c, at once */
DEVICE unsigned and_or(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/* Two F16 plus two */
DEVICE unsigned add_halves(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

/* Clusters (sm_90 on): blocks that run side by side and reach each other's shared memory. All threads of all
   blocks arrive and wait, which orders nothing but the barriers that have been initialised before. */
typedef unsigned long long mbarrier;    /* in shared memory */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
DEVICE void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
DEVICE void barrier_init(mbarrier *b, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
                 : "memory");
}
DEVICE void barriers_ready() {       /* for copies and other blocks of the cluster */
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
/* Arrive, and expect so many bytes to be copied or sent. */
DEVICE void barrier_expect(mbarrier *b, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(b)), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(mbarrier *b, unsigned parity) {
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
                 :: "r"(shared_address(b)), "r"(parity) : "memory");
}
/* To this place in block `rank` of the cluster, which must have begun, counted by its barrier b. */
DEVICE void send_to_block(float *p, unsigned rank, float v, mbarrier *b) {
    asm volatile("{\n.reg .b32 there, counts;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mapa.shared::cluster.u32 counts, %3, %1;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %2, [counts];\n}" ::"r"(
                     shared_address(p)),
                 "r"(rank), "r"(__float_as_uint(v)), "r"(shared_address(b))
                 : "memory");
}
#else
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
DEVICE void barrier_init(mbarrier *, unsigned) {}
DEVICE void barriers_ready() {}
DEVICE void barrier_expect(mbarrier *, unsigned) {}
DEVICE void barrier_wait(mbarrier *, unsigned) {}
DEVICE void send_to_block(float *, unsigned, float, mbarrier *) {}
#endif
#endif

const unsigned ALL = 0xFFFFFFFFu;

DEVICE int tid()       { return (int)threadIdx.x; }
DEVICE int lane_id()   { return (int)threadIdx.x % 32; }
DEVICE int warp_id()   { return (int)threadIdx.x / 32; }
DEVICE int n_threads() { return (int)blockDim.x; }
DEVICE int block_x()   { return (int)blockIdx.x; }
DEVICE int block_y()   { return (int)blockIdx.y; }

DEVICE float warp_sum(float v) {
    UNROLL for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}
DEVICE float warp_max(float v) {
    UNROLL for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL, v, o));
    return v;
}

/* Over the block, the same bits in every thread: warps by exchange, then the warps in order. shared [32]. */
DEVICE float block_sum(float v, float *shared) {
    float sum = 0;
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; i++) sum += shared[i];
    __syncthreads();
    return sum;
}
DEVICE float block_max(float v, float *shared) {
    v = warp_max(v);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; i++) v = fmaxf(v, shared[i]);
    __syncthreads();
    return v;
}

DEVICE float to_float(float v) { return v; }
template <class T> DEVICE float to_float(T v) {
    if constexpr (std::is_same<T, half_t>::value) return __half2float(v);
    else return __bfloat162float(v);
}

/* The one rounding of K and V; values beyond F16's range are clamped. */
DEVICE void store(float *p, float v)  { *p = v; }
DEVICE void store(half_t *p, float v) {
    *p = __float2half_rn(fminf(fmaxf(v, -65504.0f), 65504.0f));
}
DEVICE void store(bf16_t *p, float v) { *p = __float2bfloat16_rn(v); }

/* 16 bytes of weights or cache to 8 or 4 floats. */
DEVICE void unpack(float (&f)[8], uint4 v, half_t) {
    const unsigned w[4] = {v.x, v.y, v.z, v.w};
    UNROLL for (int i = 0; i < 4; i++) {
        f[2 * i] = __half2float(__ushort_as_half((unsigned short)(w[i] & 0xFFFFu)));
        f[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(w[i] >> 16)));
    }
}
DEVICE void unpack(float (&f)[8], uint4 v, bf16_t) {
    const unsigned w[4] = {v.x, v.y, v.z, v.w};
    UNROLL for (int i = 0; i < 4; i++) {
        f[2 * i] = __uint_as_float(w[i] << 16);
        f[2 * i + 1] = __uint_as_float(w[i] & 0xFFFF0000u);
    }
}
DEVICE void unpack(float (&f)[4], uint4 v, float) {
    f[0] = __uint_as_float(v.x); f[1] = __uint_as_float(v.y);
    f[2] = __uint_as_float(v.z); f[3] = __uint_as_float(v.w);
}

/* Two floats as a pair of 16-bit elements, the first in the low half; and what that lost of each. */
DEVICE unsigned pack(float &a, float &b, half_t) {
    const half_t x = __float2half_rn(a), y = __float2half_rn(b);
    a -= __half2float(x);
    b -= __half2float(y);
    return (unsigned)__half_as_ushort(x) | (unsigned)__half_as_ushort(y) << 16;
}
DEVICE unsigned pack(float &a, float &b, bf16_t) {
    const bf16_t x = __float2bfloat16_rn(a), y = __float2bfloat16_rn(b);
    a -= __bfloat162float(x);
    b -= __bfloat162float(y);
    return (unsigned)__bfloat16_as_ushort(x) | (unsigned)__bfloat16_as_ushort(y) << 16;
}

/* 2^k such that top * 2^k is in [2^14, 2^15): as far up in F16's range as is safe. 1 for 0 and for what
   is not a number. */
static __host__ __device__ __forceinline__ float half_scale(float top) {
    const int exponent = (int)(qwen3i_bits_from_float(top) >> 23 & 255u);
    if (exponent == 0 || exponent == 255) return 1.0f;
    const int k = 127 + 14 - exponent;
    return qwen3i_float_from_bits((unsigned)(127 + (k < -100 ? -100 : k > 100 ? 100 : k)) << 23);
}

/* Of n positions the length of each of at most `splits` parts: whole tiles of 32, from n alone. */
DEVICE int split_length(int n, int splits) { return round_up(ceil_div(n, splits), 32); }

/* ---- Hopper (sm_90a): tiles come by TMA to shared memory, where products of warpgroups read them ---- */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(QWEN3_CUDA_EMULATED)
#define QWEN3_WGMMA 1
#endif

const int HOPPER_M       = 128;           /* rows of x and ... */
/* ... of W in a part of a tile of a product, of which there are one or two; ... */
const int HOPPER_N       = 128;
/* ... or these in a single part, where they divide the work better */
const int HOPPER_N_MORE = 160;
/* elements of a row that are loaded at once: 128 bytes, as they are swizzled */
const int HOPPER_K       = 64;
const int LARGE_THREADS = 384;           /* a warpgroup that loads, two that multiply */
const int LARGE_POS     = 128;           /* positions of a tile of attention, and its rows */
const int HEAD_DIM     = 128;           /* of all that tensor cores do with heads: every released model's */
const size_t HOPPER_HALF = (size_t)HOPPER_M * HOPPER_K * 2;   /* bytes of a tile of 128 rows, 64 wide */
/* What a product takes in at a time, in shared memory: P parts of N rows of W each, then R rows of x. */
template <int N, int R, int P = 1> struct product_tile {
    enum { W_BYTES = N * HOPPER_K * 2, X_AT = P * W_BYTES, BYTES = X_AT + R * HOPPER_K * 2 };
};
template <int N, int P>
struct large_tile : product_tile<N, HOPPER_M, P> { enum { STAGES = P == 1 ? 6 : 4 }; };

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define QWEN3_CLUSTER_OF_2 __cluster_dims__(2, 1, 1)
#else
#define QWEN3_CLUSTER_OF_2
#endif
#ifdef QWEN3_CUDA_EMULATED
const int LARGE_CLUSTER = 2;             /* what a launch has to say of it */
#else
const int LARGE_CLUSTER = 1;
#endif

/* Instructions without a C++ name; the emulator brings its own. */
#if defined(QWEN3_WGMMA) && !defined(QWEN3_CUDA_EMULATED)
/* load_stream, asked for before any wait that follows: the compiler may move that one behind it. */
DEVICE uint4 load_ahead(const void *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

DEVICE void barrier_arrive(mbarrier *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(b)) : "memory");
}
/* The same at this place in block `rank` of the cluster. */
DEVICE void barrier_arrive_at(mbarrier *b, unsigned rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
                 :: "r"(shared_address(b)), "r"(rank) : "memory");
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
/* The same, and what each block has written to its shared memory before is seen by all after it. A release of
   everything would wait for global memory, too: a MEMBAR.ALL.GPU, as long as the whole exchange. */
DEVICE void cluster_meet() {
#if CUDART_VERSION >= 12080
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
    cluster_sync();
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
/* Two floats at this place in block `rank` of the cluster; or two, and two that lie 64 further. */
DEVICE void load_from_block(float2 &v, const float *p, unsigned rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %2, %3;\n"
                 "ld.shared::cluster.v2.f32 {%0, %1}, [there];\n}"
                 : "=f"(v.x), "=f"(v.y) : "r"(shared_address(p)), "r"(rank) : "memory");
}
DEVICE void load_from_block(float2 &v, float2 &w, const float *p, unsigned rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v2.f32 {%0, %1}, [there];\nld.shared::cluster.v2.f32 {%2, %3}, [there + 256];\n}"
        : "=f"(v.x), "=f"(v.y), "=f"(w.x), "=f"(w.y)
        : "r"(shared_address(p)), "r"(rank)
        : "memory");
}
/* Brings what TMA reads of a map before its first tile. */
DEVICE void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}
/* A tile by TMA; its bytes are counted by the barrier. */
DEVICE void load_tile(void *to, const CUtensorMap *map, int x, int y, mbarrier *b) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
                 "{%2, %3}], [%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(shared_address(b))
                 : "memory");
}
DEVICE void load_tile(void *to, const CUtensorMap *map, int x, int y, int z, mbarrier *b) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(b))
                 : "memory");
}
/* So many bytes, a multiple of 16, in a row. */
DEVICE void copy_bulk(void *to, const void *from, unsigned bytes, mbarrier *b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)) : "memory");
}
/* To this place, and this barrier, in both blocks of the cluster. */
DEVICE void load_tile_twice(void *to, const CUtensorMap *map, int x, int y, mbarrier *b) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(shared_address(b)), "h"((unsigned short)3)
        : "memory");
}

/* to[0] += x, to[1] += y, where the memory is: nothing is read here, and nobody waits. Numbers below 1.2e-38
   become zero. */
DEVICE void add_2_there(float *to, float x, float y) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" :: "l"(to), "f"(x), "f"(y) : "memory");
}

/* What this thread has stored in shared memory is seen by products and copies that begin after the next
   barrier. */
DEVICE void stores_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/* A barrier for some of the block's threads. */
DEVICE void group_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
/* The registers of a thread of this warpgroup from here on. */
template <int N> DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}

DEVICE void products_begin()  { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Wait until at most PENDING groups of products are under way. */
template <int PENDING> DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
/* From here on d is what the products made of it. */
template <int N> DEVICE void products_done(float (&d)[N]) {
    UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
/* p must be complete before products that read it begin. */
DEVICE void products_read(unsigned (&p)[8][4]) {
    UNROLL for (int i = 0; i < 32; i++) asm volatile("" : "+r"(p[i / 4][i % 4]) :: "memory");
}

/* Where an operand lies: rows of 128 swizzled bytes, groups of eight rows 1,024 bytes apart. If its rows are
   those of the sum (k and not n is outside), blocks of 64 columns are `block` bytes apart. */
DEVICE u64 operand(const void *p, unsigned block = 16) {
    return (u64)(shared_address(p) >> 4 & 0x3FFFu) | (u64)(block >> 4) << 16 | (u64)(1024 >> 4) << 32 |
           (u64)1 << 62;
}

/* The first 8, 16 ... operands of an instruction, and as many sums. */
#define QWEN3_R8  "%0, %1, %2, %3, %4, %5, %6, %7"
#define QWEN3_R16 QWEN3_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QWEN3_R32 QWEN3_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QWEN3_R64 QWEN3_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QWEN3_R80 QWEN3_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define QWEN3_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
    "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define QWEN3_F32(d)   QWEN3_F8(d, 0), QWEN3_F8(d, 8), QWEN3_F8(d, 16), QWEN3_F8(d, 24)
#define QWEN3_F64(d)   QWEN3_F32(d), QWEN3_F8(d, 32), QWEN3_F8(d, 40), QWEN3_F8(d, 48), QWEN3_F8(d, 56)
#define QWEN3_MULTIPLY(n, sums, a_at, b_at, add_at, ...) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
                 "k16.f32.f16.f16 {" sums "}, " a_at ", " b_at ", p, 1, 1, 0, 0;\n}" \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(add))

/* d[64, N] = a[64, 16] b[N, 16]^T, or += with add, for N = 16, 32, 64, 128, 160: by a warpgroup; d as in
   mma.sync, warp w has rows 16 w on. */
DEVICE void wgmma(float (&d)[8], u64 a, u64 b, int add) {
    QWEN3_MULTIPLY("16", QWEN3_R8, "%8", "%9", "%10", QWEN3_F8(d, 0));
}
DEVICE void wgmma(float (&d)[16], u64 a, u64 b, int add) {
    QWEN3_MULTIPLY("32", QWEN3_R16, "%16", "%17", "%18", QWEN3_F8(d, 0), QWEN3_F8(d, 8));
}
DEVICE void wgmma(float (&d)[32], u64 a, u64 b, int add) {
    QWEN3_MULTIPLY("64", QWEN3_R32, "%32", "%33", "%34", QWEN3_F32(d));
}
DEVICE void wgmma(float (&d)[64], u64 a, u64 b, int add) {
    QWEN3_MULTIPLY("128", QWEN3_R64, "%64", "%65", "%66", QWEN3_F64(d));
}
DEVICE void wgmma(float (&d)[80], u64 a, u64 b, int add) {
    QWEN3_MULTIPLY("160", QWEN3_R80, "%80", "%81", "%82", QWEN3_F64(d), QWEN3_F8(d, 64), QWEN3_F8(d, 72));
}
/* d[64, 128] += a[64, 16] b[16, 128], a in registers, b with its rows outside. */
DEVICE void wgmma(float (&d)[64], const unsigned (&a)[4], u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" QWEN3_R64 "}, {%64, %65, %66, %67}, "
                 "%68, p, 1, 1, 1;\n}"
                 : QWEN3_F64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Two floats as F16, the first in the low half. */
DEVICE unsigned round_halves(float a, float b) {
    const __half2 h = __floats2half2_rn(a, b);
    return *(const unsigned *)(const void *)&h;
}
/* The same, clamped to its range. */
DEVICE unsigned pack_halves(float a, float b) {
    unsigned h;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
    return h;
}
#endif

#ifdef QWEN3_WGMMA
/* silu() for what is rounded to 16 bits afterwards. */
DEVICE float silu_fast(float x) {
    return x * reciprocal_fast(1.0f + exp2_fast(-x * LOG2E));
}

/* The four lanes of a quad hold two neighbouring columns of each of four blocks of 8; afterwards lane i has
   block i. */
DEVICE uint4 gather_quad(unsigned (&w)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    unsigned a = odd ? w[0] : w[1], b = odd ? w[2] : w[3];
    a = __shfl_xor_sync(ALL, a, 1);
    b = __shfl_xor_sync(ALL, b, 1);
    w[0] = odd ? a : w[0]; w[2] = odd ? b : w[2];
    w[1] = odd ? w[1] : a; w[3] = odd ? w[3] : b;
    a = high ? w[0] : w[2]; b = high ? w[1] : w[3];
    a = __shfl_xor_sync(ALL, a, 2);
    b = __shfl_xor_sync(ALL, b, 2);
    w[0] = high ? a : w[0]; w[1] = high ? b : w[1];
    w[2] = high ? w[2] : a; w[3] = high ? w[3] : b;
    return make_uint4(w[0], w[1], w[2], w[3]);
}

/* 8 N columns of a row, two of each 8 in w, to 16-bit elements at `to`, if it is not NULL. By all lanes. */
template <int N, class T> DEVICE void store_words(T *to, const unsigned (&w)[N]) {
    UNROLL for (int i = 0; i < N; i += 4) {
        unsigned four[4] = {w[i], w[i + 1], w[i + 2], w[i + 3]};
        const uint4 v = gather_quad(four);
        if (to) *(uint4 *)(void *)(to + 8 * (i + (int)(threadIdx.x & 3))) = v;
    }
}
#endif

/* ================================================================================================
   MODEL AND CONTEXT
   ================================================================================================ */
/* how TMA finds tiles; without the type's alignment */
struct stored_map { u64 words[sizeof(CUtensorMap) / 8]; };

/* Rows of a matrix in blocks, row_bytes apart, of any format: see BLOCKS. */
struct block_part { unsigned char *data; int rows, type, units, row_bytes; };

/* W [rows, cols] = data * scale; rows ld apart, zero from cols to ld */
struct matrix {
    void       *data;
    int         rows, cols, ld;
    qwen3i_type type;                   /* F32 or F16 */
    /* not 0: instead of data, these below each other; scale is that of their elements as F16 */
    int         n_parts;
    block_part  parts[3];
    int         each;                   /* of experts: rows of a part that are one's; else 0 */
    /* few_product may serve: all parts are in blocks. Gate and up are served only if down is, and down if
       they are: what lies between has one form. */
    bool        few;
    int         kind;                   /* q k v, output, gate and up, down, embedding or head */
    int         terms;                  /* 16-bit terms of its input when there are many rows */
    float       scale;
    stored_map  map, map_more;          /* on Hopper: for tiles of HOPPER_N, of HOPPER_N_MORE rows */
    float      *bounds;                 /* of gate_up, on Hopper: see hopper_norm */
    int        *order;                  /* column j is for input order[j]; NULL: for input j */
};

/* Elements from the first term of n rows of a product's input to the second; 0: there is only one. */
static size_t rest_of(const matrix &w, int n) { return w.terms == 2 ? (size_t)n * w.ld : 0; }

const int OUT_KIND = 1, DOWN_KIND = 3, HEAD_KIND = 4, KINDS = 5;

#ifdef QWEN3_CUDA_NCCL
typedef ncclComm_t communicator;
#else
typedef void *communicator;
#endif

struct layer_weights {
    float *attn_norm, *q_norm, *k_norm, *mlp_norm;
    matrix qkv, wo, gate_up, w_down;    /* q, k, v below each other, as are gate and up */
    stored_map down_columns;            /* see two_mlp */
    float *router;          /* [n_expert, n_embd]; not NULL: gate_up and w_down are those of all experts */
};

struct cuda_model {
    qwen3_allocator allocator;
    qwen3i_config   config;
    int             device, n_sm, capability;   /* 90 for 9.0 */
    /* bytes of shared memory: the most of a block; of a multiprocessor */
    size_t          block_shared, sm_shared;
    size_t          cache_bytes;                /* of the L2 */
    float           stream;                     /* bytes that memory gives in a microsecond, about */
    char            name[256];
    char           *memory;                     /* all weights */
    layer_weights  *layers;
    matrix          embed, head;
    float          *final_norm;
    bool            hopper;               /* products with many rows can go through the kernels for Hopper */
    int             rank, n_ranks;      /* see RANKS; one of one: config and weights are the model's own */
    int             all_kv, all_ff, all_ff_expert;      /* of the model: kv heads, rows of gate and up */
    bool            unpack;             /* blocks become F16, see QWEN3_LOAD_UNPACK */
    communicator    comm;
    /* [n_ranks] those of this process; NULL: one device, or one a process */
    cuda_model    **fellows;
};

struct rank_group;                      /* see RANKS */
struct peer_ranks {                     /* of each rank, on its device: */
    uint4    *parts[MOST_RANKS];        /* tagged, two sums by turns [2, n_ranks, PEER_ROWS, embd_ld / 2] */
    float    *kept[MOST_RANKS];         /* logits */
    unsigned *flags[MOST_RANKS];        /* [n_ranks, PEER_BLOCKS] how often a block has sent its part */
};

struct row_info {                       /* row i of a batch, and what is wanted of it; in device memory */
    int token, seq, position;
    /* output i: of which row; where its logits are kept, or -1; its target, or -1 */
    int out_row, out_slot, out_target;
};

struct kv_layer {                       /* one layer's cache: [max_seqs, max_ctx, kv_dim] of the KV type */
    void *k, *v;
    int   max_ctx, kv_dim;
};

DEVICE size_t kv_at(const kv_layer &c, int seq, int pos) {
    return ((size_t)seq * c.max_ctx + (size_t)pos) * c.kv_dim;
}

struct attention_tile { int row0, n_tokens, seq, pos0; };   /* consecutive tokens of one sequence */

struct listed;                          /* of the choice: see there */
struct choice;
struct candidates;
struct plan;                            /* of products by cuBLASLt */

const int LISTED_MAX = 1 << 15;         /* biases and penalised tokens in one step */
const int KEPT       = 3;               /* logits of a sequence: see cuda_ctx */

struct upload_slot {                    /* pinned memory, copied to its twin on the device or read there */
    row_info       *rows;               /* [max_rows] */
    attention_tile *tiles;              /* [max_rows] */
    choice         *choices;            /* [choices_at_most] */
    listed         *lists;              /* [LISTED_MAX] */
    int            *report;             /* [choices_at_most] written by the device: the tokens chosen */
    unsigned       *masks;              /* [max_seqs, mask_words] bits: which tokens may come */
};

struct run_ahead {                      /* a step that was begun before it was asked for */
    int           n;                    /* its sequences; 0: none */
    int           slot;
    int          *seqs, *lengths;       /* [max_seqs] each one's tokens before the step, ... */
    int          *last;                 /* [max_seqs] ... and the last of them */
    qwen3_sampler *samplers;            /* [max_seqs] as they must be when it is asked for */
    u64          *bias_hashes;          /* [max_seqs] */
};

struct expert_tile { int expert, rows; };       /* rows that are there; expert -1: no tile is any more */

struct expert_buffers {                 /* of layers with experts; an entry is a row and one of its picks */
    float  *logits;                     /* [max_rows, n_expert] */
    int    *picked;                     /* [entries] experts, in order */
    float  *share;                      /* [entries] their weights */
    int    *lists, *counts;             /* [n_expert, max_rows] the entries of each; [n_expert] */
    int    *active;                     /* [1 + n_expert] see route_few_args */
    float  *m, *y; int ldy;             /* [entries of few rows, ff], [entries, ldy] */
    half_t *act, *m16;                  /* the inputs of the products of many rows, and what they stand for */
    float  *act_scale, *m_scale;
    /* On Hopper, instead, by tiles of HOPPER_M entries of one expert: how many there may be, 0 if its kernel
       does not serve; which; the entry of each of their rows, or -1; maps of act, of m16, and of matrices in
       the scratch. */
    int          n_tiles;
    expert_tile *tiles;
    int         *entry;
    stored_map   act_map, m_map, up_map, down_map;
};

struct cuda_ctx {
    const cuda_model *m;
    qwen3_ctx_desc    desc;
    int               max_rows, group, kv_dim, q_dim, qkv_ld, act_ld, embd_ld, ff_ld;
    const struct path_set *paths;               /* the ways through the layers, by rows */
    /* tiles: the tensor core kernel does this model's attention */
    bool              own_stream, tiles;
    /* many rows go through the kernels for Hopper; attention, too; ... */
    bool              hopper, hopper_kv;
    bool              two;                      /* one row takes two kernels a layer */
    /* clusters of 1, 2, 4, 8 blocks of skinny_product that run at once */
    int               skinny_room[4];
    /* ... and only up to so many need float32 rows of q and attention */
    int               narrow_rows;
    const qwen3_token *eos; int n_eos;          /* the model's */
    int               n_choose;                 /* ids below this may be chosen */
    cudaStream_t      stream, capture;
    void             *lt;                       /* cuBLASLt's handle */
    plan             *plans; int next_plan;     /* [N_PLANS] */
    cudaGraphExec_t  *graphs;                   /* [max_seqs + 1] a decode step of so many rows; ... */
    int              *runs;                     /* ... made when it has run once and all code is loaded */
    char             *memory, *pinned;
    size_t            host_size;
    char             *host;                     /* plans, graphs, parity, run-ahead */

    /* device memory */
    char   *k, *v;                              /* [n_layer, max_seqs, max_ctx, kv_dim] of the KV type */
    size_t  kv_layer_bytes;
    /* [max_seqs, KEPT, n_vocab]: the current logits, those of a step and */
    float  *kept;
                                                /* of the one begun ahead of it, in turn
                                                    */
    float2 *rope;                               /* [max_ctx, head_dim / 2] */
    float  *freqs;
    /* [max_rows, n_embd padded]: residual, normalised, a product; what products add to: x, or zeros of its
       own (see RANKS) */
    float  *x, *h, *tmp, *sum;
    float  *ordered;                            /* x as the columns of a matrix with an order meet it */
    float  *qkv, *attn, *gate_up, *ff;          /* [max_rows, qkv_ld | q_dim | 2 n_ff | n_ff padded] */
    struct { float *at; size_t n; } results[4]; /* those of them, and logits, that cuBLASLt writes */
    void   *act; float *act_scale;              /* [max_rows, act_ld] input of a product */
    /* [max_rows, n_embd or q_dim | q_dim | n_ff] the same on Hopper */
    half_t *hopper_act, *hopper_q, *hopper_m;
    float  *two_parts;                          /* [2, TWO_PARTS, TWO_WIDTH] of x, that each half leaves */
    float  *ff_scale;                           /* [max_rows] of hopper_m */
    stored_map large_h_map, large_a_map, large_m_map, q_map, k_map, v_map;
    stored_map skinny_h_map, skinny_a_map, skinny_m_map;                 /* the same in smaller tiles */
    float  *logits, *logprobs;                  /* [head_rows, n_vocab], [head_rows] */
    float  *parts;
    unsigned *qkv_tickets, *attn_tickets;
    half_t *scratch; size_t scratch_size;       /* rows of a matrix in blocks as F16; bytes */
    char   *few; unsigned *few_tickets;         /* input of few rows with weights in blocks; [n_sm] */
    matrix  halves[KINDS];                      /* on Hopper: a matrix of each kind that lies there */
    void   *workspace;                          /* of cuBLASLt */
    size_t  workspace_size;
    row_info *rows; attention_tile *tile_list; listed *lists;
    int    *chosen;                             /* [max_seqs], and behind them SAME_ROWS guesses' */
    u64    *best;                               /* [choices_at_most] */
    candidates *listed_keys;                    /* [choice_rows] */

    expert_buffers experts;

    communicator comm;                          /* see RANKS */
    /* this one's own parts and flags, how many sums, and exchanges of logits, each block has done, and where
       those of the others are */
    peer_ranks   peers;
    bool         has_peers;                     /* all of them can be reached */
    uint4       *peer_parts;
    unsigned    *peer_flags, *peer_counts;      /* [2, PEER_BLOCKS] */
    int         *abandoned;                     /* pinned: another rank's part may never come */
    rank_group  *ranks;                         /* of rank 0: the others, if they are in this process */
    /* of all ranks: logits [n_ranks, head_rows, n_vocab / n_ranks]; ... */
    char        *gathered;
    size_t       gathered_size;                 /* ... keys and values; bytes */
    int         *stopped;                       /* on the device: has the caller of a rank cancelled? */
    /* the caller's of rank 0, or of each process: asked for between steps */
    int        (*cancel)(void *user);
    void        *cancel_user;

    /* pinned host memory */
    upload_slot slots[RING];
    cudaEvent_t uploaded[RING], reported[RING];
    int         next_slot;              /* for an upload */
    float      *host_logits;                    /* [n_vocab] */

    int        *current;                        /* [max_seqs] which of its KEPT logits are the sequence's */
    run_ahead   ahead;
};

/* Rows whose logits are computed at a time: all sequences', as far as possible, and at least half of the
   most. */
static int head_rows(const cuda_ctx *c) {
    return least(least(HEAD_ROWS, c->max_rows), most(HEAD_ROWS / 2, c->desc.max_seqs));
}
/* Sequences, or rows of guesses, that one call chooses for; and at a time. */
static int choices_at_most(const cuda_ctx *c) { return most(c->desc.max_seqs, SAME_ROWS); }
static int choice_rows(const cuda_ctx *c) { return least(head_rows(c), choices_at_most(c)); }

struct pass {                           /* one batch on its way through the layers */
    cuda_ctx          *c;
    cudaStream_t       s;
    int                n, n_tiles;      /* n_tiles 0: attention row by row */
    const struct path *path;
    bool               q_halves, halves;        /* q, and what attention gives, is F16 */
    int                n_outs;          /* so many rows are wanted, the outs of c->rows; ... */
    bool               only_wanted;     /* ... they are all that is left, in order */
    bool               early;           /* kernels may start early: see launch_early */
    bool               two;             /* layers go by two_kernels */
    const float       *x;               /* [n, embd_ld] what a norm reads: the residual, or it in order */
    const qwen3i_err  *err;
};

/* The rows that a product reads, as norm has left them for it. */
struct input {
    const float *x; int ldx;            /* float32 rows; NULL: they are in c->act or c->hopper_act, ... */
    const float *scale;                 /* ... of which each stands for this much (NULL: 1) */
    /* not NULL: x is the residual, and the product does the norm itself */
    const float *gain;
};

/* One way through a layer: see the tables. h: what norm gave. */
struct path {
    /* h = RMSNorm(x), for w */
    qwen3_result (*norm)(const pass *p, const float *gain, const matrix &w, input *h);
    /* will the product with w do that? NULL: no */
    bool         (*norms_itself)(const pass *p, const matrix &w);
    /* q, k, v = W h, normed and rotated; cache */
    qwen3_result (*qkv)(const pass *p, int layer, const input &h);
    qwen3_result (*attention)(const pass *p, int layer);                /* a = softmax(q k / sqrt(d)) v */
    qwen3_result (*o_proj)(const pass *p, int layer);                   /* x = x + Wo a */
    qwen3_result (*mlp)(const pass *p, int layer, const input &h);      /* m = silu(Wgate h) * (Wup h) */
    qwen3_result (*down)(const pass *p, int layer);                     /* x = x + Wdown m */
    /* Logits of n rows of c->h, wanted from output `first` on: to c->logits or, with keep_only, to where they
       are kept */
    qwen3_result (*head)(const pass *p, int first, int n, bool keep_only);
    bool          tiles_of_halves;      /* with an F16 cache, attention by tiles reads and gives F16 ... */
    bool          halves;               /* ... and row by row it gives F16 */
};

struct path_step { int rows; const struct path *path; };        /* up to so many rows */

/* The ways of a context, from few rows to many, and the memory that they need. */
struct path_set {
    path_step    steps[4];
    bool         hopper;                /* many rows go through the kernels for Hopper */
    void         (*memory)(cuda_ctx *c, arena *a);
    qwen3_result (*prepare)(cuda_ctx *c, const qwen3i_err *err);
};

/* May a kernel do so many rows whose sums have an order that only one row has? */
static bool goes_alone(const cuda_ctx *c, int rows) { return rows == 1 && !c->desc.invariant; }

static const path *path_for(const cuda_ctx *c, int n) {
    const path_step *s = c->paths->steps;
    while (n > s->rows) s++;
    return s->path;
}

/* So many rows always go through attention one by one, and at most so many through matrix-vector kernels. */
static int most_single(const cuda_ctx *c) { return c->desc.invariant ? SAME_ROWS : MATVEC_ROWS; }

/* All that depends on how many rows a batch has is decided here. */
static pass make_pass(cuda_ctx *c, cudaStream_t s, int n, int n_tiles, const qwen3i_err *err) {
    pass p;
    p.c = c; p.s = s; p.n = n; p.n_tiles = n_tiles;
    p.path = path_for(c, n);
    p.q_halves = c->hopper_kv && p.path->tiles_of_halves && n_tiles > 0;
    p.halves = p.q_halves || (c->hopper_kv && p.path->halves && n_tiles == 0);
    p.n_outs = n;
    p.only_wanted = false;
    p.early = c->m->capability >= 90;
    p.two = c->two && n_tiles == 0 && goes_alone(c, n);
    p.x = c->x;
    p.err = err;
    return p;
}

/* CALL(T) with T as the type of a product's weights and input, or of the cache */
#define BY_WEIGHT_TYPE(w, CALL) ((w).type == QWEN3I_F32 ? (CALL(float)) : (CALL(half_t)))
#define BY_KV_TYPE(c, CALL) ((c)->desc.kv_type == QWEN3_KV_F32 ? CALL(float) : \
                             (c)->desc.kv_type == QWEN3_KV_BF16 ? CALL(bf16_t) : CALL(half_t))
/* the same of a cache that is not F32 */
#define BY_HALF_TYPE(c, CALL) ((c)->desc.kv_type == QWEN3_KV_BF16 ? CALL(bf16_t) : CALL(half_t))
#define RUN(...) \
    do { \
        const cudaError_t e_ = launch(p->s, __VA_ARGS__); \
        if (e_ != cudaSuccess) return cuda_fail(p->err, e_, "kernel launch"); \
    } while (0)

static qwen3_result launched(const pass *p, cudaError_t e, const char *what) {
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, what);
}

/* ================================================================================================
   BLOCKS: quantised weights. A row is taken apart once, in place, when it has come to the device: into tiles
   of 32 units of 32 elements, so that what the lanes of a warp read lies side by side. A tile has a plane of
   the low bits of all codes, one of the bits that are left, and the blocks' scales as they are in the file;
   but for the six-bit ones of Q4_K and Q5_K; it ends at a multiple of 16 bytes. What stands in a block is
   told by the room WEIGHT FORMATS of qwen3.h.
   ================================================================================================ */
/* Of a format: the bits of a code in the first plane and in the second, and where a block has its scales,
   which are one piece of bytes or two. Numbers by themselves (low 0) lie in tiles as they are. */
struct block_format { int low, high, head, head_at, tail, tail_at; };

static constexpr __host__ __device__ block_format block_format_of(int type) {
    switch (type) {
        case QWEN3I_Q8_0:  return {8, 0, 2, 0, 0, 0};
        case QWEN3I_Q4_0:  return {4, 0, 2, 0, 0, 0};
        case QWEN3I_Q4_1:  return {4, 0, 4, 0, 0, 0};
        case QWEN3I_Q5_0:  return {4, 1, 2, 0, 0, 0};
        case QWEN3I_Q5_1:  return {4, 1, 4, 0, 0, 0};
        case QWEN3I_Q2_K:  return {2, 0, 16, 0, 4, 80};
        case QWEN3I_Q3_K:  return {2, 1, 14, 96, 0, 0};
        case QWEN3I_Q4_K:  return {4, 0, 16, 0, 0, 0};
        case QWEN3I_Q5_K:  return {4, 1, 16, 0, 0, 0};
        case QWEN3I_Q6_K:  return {4, 2, 18, 192, 0, 0};
        case QWEN3I_IQ4_NL: return {4, 0, 2, 0, 0, 0};
        case QWEN3I_IQ4_XS: return {4, 0, 8, 0, 0, 0};
        case QWEN3I_MXFP4: return {4, 0, 1, 0, 0, 0};
        case QWEN3I_NVFP4: case QWEN3I_INT4: case QWEN3I_INT4S: return {4, 0, 4, 0, 0, 0};
        case QWEN3I_FP8: case QWEN3I_INT8: return {8, 0, 4, 0, 0, 0};
        default:           return {0, 0, 0, 0, 0, 0};
    }
}
#define QWEN3_ELEMENTS(name, function, gguf, elements, bytes) case QWEN3I_##name: return elements;
#define QWEN3_BYTES(name, function, gguf, elements, bytes) case QWEN3I_##name: return bytes;
static constexpr __host__ __device__ int block_elements(int type) {
    switch (type) { QWEN3I_TYPES(QWEN3_ELEMENTS) default: return 1; }
}
static constexpr __host__ __device__ int block_bytes(int type) {
    switch (type) { QWEN3I_TYPES(QWEN3_BYTES) default: return 0; }
}
#undef QWEN3_ELEMENTS
#undef QWEN3_BYTES

static constexpr __host__ __device__ bool is_block(int type) { return block_format_of(type).low > 0; }
/* Are its codes numbers in floating point, or no codes at all? Else they are whole numbers of 8 bits. */
static constexpr __host__ __device__ bool is_float(int type) { return !is_block(type) || type == QWEN3I_FP8; }

/* Do codes stand for numbers in a table? */
static constexpr __host__ __device__ bool has_table(int type) {
    return type == QWEN3I_IQ4_NL || type == QWEN3I_IQ4_XS || type == QWEN3I_MXFP4 || type == QWEN3I_NVFP4;
}

/* Units of a block */
static constexpr __host__ __device__ int units_of(int type) {
    return is_block(type) ? block_elements(type) / 32 : 1;
}
static constexpr __host__ __device__ int scale_bytes(int type) {
    return block_format_of(type).head + block_format_of(type).tail;
}
/* Where the second plane and the scales of a tile of n units begin. */
static constexpr __host__ __device__ int high_plane(int type, int n) {
    return 4 * n * block_format_of(type).low;
}
static constexpr __host__ __device__ int scale_plane(int type, int n) {
    return 4 * n * (block_format_of(type).low + block_format_of(type).high);
}
static constexpr __host__ __device__ int tile_units(int type) {
    return is_block(type) ? 32 : type == QWEN3I_F32 ? 8 : 16;
}
static constexpr __host__ __device__ int tile_bytes(int type, int n) {
    const int scales = n / units_of(type) * scale_bytes(type);
    return is_block(type) ? (scale_plane(type, n) + scales + 15) & ~15 : 32 * n * block_bytes(type);
}
/* Of a row of so many elements: units; bytes on the device; bytes in a file. */
static int block_units(int type, int cols) {
    const int elements = is_block(type) ? block_elements(type) : 32;
    return ceil_div(cols, elements) * (elements / 32);
}
static int block_row_bytes(int type, int cols) {
    const int n = block_units(type, cols), each = tile_units(type);
    return n / each * tile_bytes(type, each) + tile_bytes(type, n % each);
}
static size_t stored_row_bytes(int type, int cols) {
    return (size_t)ceil_div(cols, block_elements(type)) * (size_t)block_bytes(type);
}

/* ---- taking blocks apart ---- */
DEVICE unsigned nibble(const unsigned char *b, int half, int e) {
    return (unsigned)b[e % half] >> (e < half ? 0 : 4) & 15u;
}
DEVICE unsigned bit_of(const unsigned char *b, int e) { return (unsigned)b[e / 8] >> e % 8 & 1u; }

/* The code of element e of a block, as it is stored. */
static __device__ unsigned block_code(int type, const unsigned char *b, int e) {
    switch (type) {
        case QWEN3I_Q8_0:  return b[2 + e];
        case QWEN3I_Q4_0: case QWEN3I_IQ4_NL: return nibble(b + 2, 16, e);
        case QWEN3I_Q4_1: case QWEN3I_INT4S:  return nibble(b + 4, 16, e);
        case QWEN3I_Q5_0:  return nibble(b + 6, 16, e) | bit_of(b + 2, e) << 4;
        case QWEN3I_Q5_1:  return nibble(b + 8, 16, e) | bit_of(b + 4, e) << 4;
        case QWEN3I_Q2_K:  return (unsigned)b[16 + 32 * (e / 128) + e % 32] >> 2 * (e / 32 % 4) & 3u;
        case QWEN3I_Q3_K:
            return ((unsigned)b[32 + 32 * (e / 128) + e % 32] >> 2 * (e / 32 % 4) & 3u) |
                   ((unsigned)b[e % 32] >> e / 32 & 1u) << 2;
        case QWEN3I_Q4_K:  return nibble(b + 16 + 32 * (e / 64), 32, e % 64);
        case QWEN3I_Q5_K:
            return nibble(b + 48 + 32 * (e / 64), 32, e % 64) |
                   ((unsigned)b[16 + e % 32] >> e / 32 & 1u) << 4;
        case QWEN3I_Q6_K:
            return nibble(b + 64 * (e / 128), 64, e % 128) |
                   ((unsigned)b[128 + 32 * (e / 128) + e % 32] >> 2 * (e / 32 % 4) & 3u) << 4;
        case QWEN3I_IQ4_XS: return nibble(b + 8 + 16 * (e / 32), 16, e % 32);
        case QWEN3I_MXFP4: return nibble(b + 1, 16, e);
        case QWEN3I_NVFP4: return nibble(b + 4 + 8 * (e / 16), 8, e % 16);
        case QWEN3I_INT4:  return nibble(b + 4 + 16 * (e / 32), 16, e % 32);
        default:           return b[4 + e];
    }
}

/* Where in a unit a place of a plane is: four codes, in the bytes of a word, are elements 4 j on. One half of
   a unit is at the even places, so that each of the four lanes that share a row of a tensor core's operand
   finds what it has of both halves in the same words. */
static constexpr __host__ __device__ int place_of(int j) { return 2 * (j % 4) + j / 4; }
static constexpr __host__ __device__ int at_place(int p) { return p / 2 + 4 * (p % 2); }

/* Words of `bits` bits a code for unit i of n: place p of four codes has bits `bits` * p % 8 on of each byte
   of word `bits` * p / 8. from: the first element's place; shift: of the bits in the code. */
DEVICE void store_plane(unsigned char *plane, int n, int i, int bits, int type, const unsigned char *block,
                        int from, int shift) {
    for (int w = 0; w < bits; w++) {
        unsigned word = 0;
        for (int k = 0; k < 32 / bits; k++) {
            const unsigned code =
                block_code(type, block, from + 4 * at_place(8 / bits * w + k / 4) + k % 4);
            word |= (code >> shift & ((1u << bits) - 1)) << (8 * (k % 4) + bits * (k / 4));
        }
        const int at = bits == 8 ? w % 2 * 16 * n + 16 * i + 4 * (w / 2) : 4 * bits * i + 4 * w;
        *(unsigned *)(void *)(plane + at) = word;
    }
}

/* Of Q4_K and Q5_K: the six-bit scale of group g and the two low bits of its offset in byte 4 + g, the other
   four from bit 4 g of the last word on. */
DEVICE void store_scales_k(unsigned char *to, const unsigned char *block) {
    const unsigned char *s = block + 4;
    unsigned high = 0;
    for (int k = 0; k < 4; k++) to[k] = block[k];
    for (int g = 0; g < 8; g++) {
        const unsigned scale = g < 4 ? s[g] & 63u : (s[g + 4] & 15u) | (unsigned)(s[g - 4] >> 6) << 4,
                       offset = g < 4 ? s[g + 4] & 63u :
                                        (unsigned)(s[g + 4] >> 4) | (unsigned)(s[g] >> 6) << 4;
        to[4 + g] = (unsigned char)(scale | (offset & 3u) << 6);
        high |= (offset >> 2) << 4 * g;
    }
    *(unsigned *)(void *)(to + 12) = high;
}

DEVICE void store_unit(unsigned char *tile, int n, int i, int type, const unsigned char *block, int from) {
    const block_format f = block_format_of(type);
    unsigned char *scales = tile + scale_plane(type, n) + i / units_of(type) * scale_bytes(type);
    store_plane(tile, n, i, f.low, type, block, from, 0);
    if (f.high > 0) store_plane(tile + high_plane(type, n), n, i, f.high, type, block, from, f.low);
    if (from > 0) return;
    if (type == QWEN3I_Q4_K || type == QWEN3I_Q5_K) { store_scales_k(scales, block); return; }
    for (int k = 0; k < f.head; k++) scales[k] = block[f.head_at + k];
    for (int k = 0; k < f.tail; k++) scales[f.head + k] = block[f.tail_at + k];
}

/* repack: rows of blocks as the file has them, row_bytes apart, to tiles, in place. A block takes turns of
   rows; shared: a row. */
static __global__ void repack_kernel(block_part p) {
    QWEN3_DYNAMIC_SHARED(row);
    for (int r = block_x(); r < p.rows; r += (int)gridDim.x) {
        unsigned char *to = p.data + (size_t)r * p.row_bytes;
        for (int i = 16 * tid(); i < p.row_bytes; i += 16 * n_threads())
            *(uint4 *)(void *)(row + i) = *(const uint4 *)(const void *)(to + i);
        __syncthreads();
        for (int u = tid(); u < p.units; u += n_threads()) {
            const int first = u / 32 * 32, n = least(32, p.units - first);
            store_unit(to + u / 32 * tile_bytes(p.type, 32), n, u - first, p.type,
                       row + u / units_of(p.type) * block_bytes(p.type), 32 * (u % units_of(p.type)));
        }
        __syncthreads();
    }
}

/* ---- a unit: what its lane makes of it ---- */
/* Codes j, j + 1, j + 2, j + 3 for j = 0, 4 ... 28 of a plane, in the bytes of a word each. */
template <int BITS> DEVICE void load_plane(unsigned (&q)[8], const unsigned char *plane, int n, int i) {
    if constexpr (BITS == 8) {
        const uint4 lo = *(const uint4 *)(const void *)(plane + 16 * i),
                    hi = *(const uint4 *)(const void *)(plane + 16 * (n + i));
        q[0] = lo.x; q[1] = lo.y; q[2] = lo.z; q[3] = lo.w;
        q[4] = hi.x; q[5] = hi.y; q[6] = hi.z; q[7] = hi.w;
    } else {
        const unsigned mask = ((1u << BITS) - 1) * 0x01010101u;
        unsigned w[4] = {0, 0, 0, 0};
        if constexpr (BITS == 4) {
            const uint4 v = *(const uint4 *)(const void *)(plane + 16 * i);
            w[0] = v.x; w[1] = v.y; w[2] = v.z; w[3] = v.w;
        } else if constexpr (BITS == 2) {
            const uint2 v = *(const uint2 *)(const void *)(plane + 8 * i);
            w[0] = v.x; w[1] = v.y;
        } else
            w[0] = *(const unsigned *)(const void *)(plane + 4 * i);
        UNROLL for (int j = 0; j < 8; j++)
            q[j] = w[place_of(j) * BITS / 8] >> place_of(j) * BITS % 8 & mask;
    }
}

/* One of 16 bytes for each of the eight codes of four bits in a word of a plane */
DEVICE void table_bytes(unsigned &low_four, unsigned &high_four, unsigned word, const unsigned (&table)[4]) {
    const unsigned low = word & 0x77777777u, half = 0x32103210u | (word & 0x88888888u) >> 1;
    const unsigned a = __byte_perm(__byte_perm(table[0], table[1], low & 0xFFFFu),
                                   __byte_perm(table[2], table[3], low & 0xFFFFu), half & 0xFFFFu),
                   b = __byte_perm(__byte_perm(table[0], table[1], low >> 16),
                                   __byte_perm(table[2], table[3], low >> 16), half >> 16);
    low_four = __byte_perm(a, b, 0x6420);
    high_four = __byte_perm(a, b, 0x7531);
}
template <int T> DEVICE void table_bytes(unsigned &low_four, unsigned &high_four, unsigned word) {
    const bool fp4 = T == QWEN3I_MXFP4 || T == QWEN3I_NVFP4;      /* twice E2M1 */
    const unsigned table[4] = {fp4 ? 0x03020100u : 0xBFAD9881u, fp4 ? 0x0C080604u : 0xF6EADDCFu,
                               fp4 ? 0xFDFEFF00u : 0x26190D01u, fp4 ? 0xF4F8FAFCu : 0x71594535u};
    table_bytes(low_four, high_four, word, table);
}
template <int T> DEVICE void table_codes(unsigned (&q)[8], const unsigned char *plane, int i) {
    const uint4 v = *(const uint4 *)(const void *)(plane + 16 * i);
    table_bytes<T>(q[0], q[4], v.x);
    table_bytes<T>(q[1], q[5], v.y);
    table_bytes<T>(q[2], q[6], v.z);
    table_bytes<T>(q[3], q[7], v.w);
}

/* The whole numbers of unit i of a tile of n, each eight bits with a sign, four in a word. */
template <int T> DEVICE void unit_codes(unsigned (&q)[8], const unsigned char *tile, int n, int i) {
    constexpr block_format f = block_format_of(T);
    if constexpr (has_table(T)) table_codes<T>(q, tile, i);
    else load_plane<f.low>(q, tile, n, i);
    if constexpr (f.high > 0) {
        unsigned high[8];
        load_plane<f.high>(high, tile + high_plane(T, n), n, i);
        UNROLL for (int j = 0; j < 8; j++) q[j] |= high[j] << f.low;
    }
}

DEVICE float half_at(const unsigned char *p) { return __half2float(*(const half_t *)(const void *)p); }
DEVICE unsigned word_at(const unsigned char *p) { return *(const unsigned *)(const void *)p; }

/* Scale and offset of both halves of a unit: element e is d[e / 16] * code + m[e / 16]. */
struct unit_scales { float d[2], m[2]; };
DEVICE unit_scales both(float d, float m) { const unit_scales s = {{d, d}, {m, m}}; return s; }

/* Of 32 elements g of a block of Q4_K and Q5_K: see store_scales_k. */
DEVICE unit_scales scales_k(const unsigned char *h, int g) {
    const uint4 v = *(const uint4 *)(const void *)h;
    const unsigned low = (g < 4 ? v.y : v.z) >> 8 * (g % 4), s = low & 63u,
                   o = (low >> 6 & 3u) | (v.w >> 4 * g << 2 & 60u);
    return both(__half2float(__ushort_as_half((unsigned short)(v.x & 0xFFFFu))) * (float)s,
                -__half2float(__ushort_as_half((unsigned short)(v.x >> 16))) * (float)o);
}

/* Half of the number of E8M0, and E4M3 without a sign */
DEVICE float e8m0_half(unsigned x) { return __uint_as_float(x < 2 ? 0x200000u << x : (x - 1) << 23); }
DEVICE float ue4m3(unsigned x) {
    x &= 0x7Fu;
    return x == 0x7Fu ? 0.0f : __half2float(__ushort_as_half((unsigned short)(x << 7))) * 256.0f;
}

/* Those of unit g of a block whose scales are at h. */
template <int T> DEVICE unit_scales scales_at(const unsigned char *h, int g) {
    const float none = -0.0f;
    if constexpr (T == QWEN3I_Q4_K || T == QWEN3I_Q5_K) return scales_k(h, g);
    else if constexpr (T == QWEN3I_Q4_0) return both(half_at(h), -8 * half_at(h));
    else if constexpr (T == QWEN3I_Q5_0) return both(half_at(h), -16 * half_at(h));
    else if constexpr (T == QWEN3I_Q4_1 || T == QWEN3I_Q5_1) return both(half_at(h), half_at(h + 2));
    else if constexpr (T == QWEN3I_Q6_K) {
        const float d = half_at(h + 16);
        const float a = d * (float)(signed char)h[2 * g], b = d * (float)(signed char)h[2 * g + 1];
        const unit_scales s = {{a, b}, {-32 * a, -32 * b}};
        return s;
    } else if constexpr (T == QWEN3I_Q2_K) {
        const float d = half_at(h + 16), m = half_at(h + 18);
        const unit_scales s = {{d * (float)(h[2 * g] & 15), d * (float)(h[2 * g + 1] & 15)},
                               {-m * (float)(h[2 * g] >> 4), -m * (float)(h[2 * g + 1] >> 4)}};
        return s;
    } else if constexpr (T == QWEN3I_Q3_K) {
        const float d = half_at(h + 12);
        unit_scales s;
        UNROLL for (int k = 0; k < 2; k++) {
            const int i = 2 * g + k;
            const int low = h[i % 8] >> 4 * (i / 8) & 15, high = h[8 + i % 4] >> 2 * (i / 4) & 3;
            s.d[k] = d * (float)((low | high << 4) - 32);
            s.m[k] = -4 * s.d[k];
        }
        return s;
    } else if constexpr (T == QWEN3I_IQ4_XS) {
        const int low = h[4 + g / 2] >> 4 * (g % 2) & 15, high = (h[2] | h[3] << 8) >> 2 * g & 3;
        return both(half_at(h) * (float)((low | high << 4) - 32), none);
    } else if constexpr (T == QWEN3I_MXFP4) return both(e8m0_half(h[0]), none);
    else if constexpr (T == QWEN3I_NVFP4) {
        const unit_scales s = {{ue4m3(h[2 * g]) / 2, ue4m3(h[2 * g + 1]) / 2}, {none, none}};
        return s;
    } else if constexpr (T == QWEN3I_FP8) return both(__uint_as_float(word_at(h)), none);
    else if constexpr (T == QWEN3I_INT4 || T == QWEN3I_INT4S || T == QWEN3I_INT8) {
        const float d = __uint_as_float(word_at(h) & ~255u);
        return both(d, -d * (float)((int)(word_at(h) & 255u) - (T == QWEN3I_INT8 ? 128 : 0)));
    } else return both(half_at(h), none);
}
template <int T> DEVICE unit_scales load_scales(const unsigned char *tile, int n, int i) {
    const unsigned u = (unsigned)i, each = (unsigned)units_of(T);
    return scales_at<T>(tile + scale_plane(T, n) + (int)(u / each) * scale_bytes(T), (int)(u % each));
}

/* Four numbers of E4M3 as F16, 2^8 times too small. */
DEVICE void fp8_halves(float (&f)[4], unsigned word) {
    UNROLL for (int k = 0; k < 2; k++) {
        const unsigned pair = __byte_perm(word, 0, k == 0 ? 0x1404 : 0x3424),
                       halves = (pair & 0x80008000u) | (pair & 0x7F007F00u) >> 1;
        f[2 * k] = __half2float(__ushort_as_half((unsigned short)(halves & 0xFFFFu)));
        f[2 * k + 1] = __half2float(__ushort_as_half((unsigned short)(halves >> 16)));
    }
}

/* Elements 4 j .. 4 j + 3 of unit i of what is_float(); of FP8 without its scale, and 2^8 times too small. */
template <int T> DEVICE void load_floats(float (&f)[4], const unsigned char *tile, int n, int i, int j) {
    if constexpr (T == QWEN3I_FP8) fp8_halves(f, word_at(tile + j / 4 * 16 * n + 16 * i + 4 * (j % 4)));
    else
        UNROLL for (int k = 0; k < 4; k++) {
            const int at = 32 * i + 4 * j + k;
            if constexpr (T == QWEN3I_F32) f[k] = ((const float *)(const void *)tile)[at];
            else if constexpr (T == QWEN3I_F16) f[k] = to_float(((const half_t *)(const void *)tile)[at]);
            else f[k] = to_float(((const bf16_t *)(const void *)tile)[at]);
        }
}

/* The elements of a unit as the CPU decodes them: only the sum is rounded. */
template <int T> DEVICE void unit_values(float (&v)[32], const unsigned char *tile, int n, int i) {
    if constexpr (is_float(T)) {
        float d = 1;
        if constexpr (T == QWEN3I_FP8) d = 256 * load_scales<T>(tile, n, i).d[0];
        UNROLL for (int j = 0; j < 8; j++) {
            float f[4];
            load_floats<T>(f, tile, n, i, j);
            UNROLL for (int k = 0; k < 4; k++) v[4 * j + k] = f[k] * d;
        }
    } else {
        unsigned q[8];
        const unit_scales s = load_scales<T>(tile, n, i);
        unit_codes<T>(q, tile, n, i);
        UNROLL for (int e = 0; e < 32; e++)
            v[e] = fmaf(s.d[e / 16], (float)(signed char)(q[e / 4] >> 8 * (e % 4) & 255u), s.m[e / 16]);
    }
}

/* The same of unit u of row r. */
template <int T> DEVICE void row_values(float (&v)[32], const block_part &p, int r, int u) {
    constexpr int EACH = tile_units(T), BYTES = tile_bytes(T, EACH);
    const int tile = (int)((unsigned)u / EACH), first = tile * EACH;
    unit_values<T>(v, p.data + (size_t)r * p.row_bytes + tile * BYTES, least(EACH, p.units - first),
                   u - first);
}
#define QWEN3_CASE(name, function, gguf, elements, bytes) \
    case QWEN3I_##name: row_values<QWEN3I_##name>(v, p, r, u); break;
DEVICE void part_values(float (&v)[32], const block_part &p, int r, int u) {
    switch (p.type) { QWEN3I_TYPES(QWEN3_CASE) default: break; }
}
#undef QWEN3_CASE
/* What block_decode makes of rows: F16 times up; the elements, of the rows' tokens; the largest |w|, as
   bits. each: not 0: so many rows lie below each other, then as many are another's. */
struct block_decoded {
    half_t *halves; float up; float *floats; const row_info *rows; unsigned *top; int each;
};

/* block_decode: out[i, :] = row first + i, zero from cols to ld; *top is less before. A thread a unit of one
   of n rows. Exact but for one rounding to F16. Equal to qwen3i_decode, qwen3i_embed. */
static __global__ void __launch_bounds__(256)
    block_decode_kernel(block_decoded out, block_part p, int first, int n, int cols, int ld) {
    const unsigned at = blockIdx.x * 256 + threadIdx.x;
    const int i = (int)(at / (unsigned)p.units), u = (int)(at % (unsigned)p.units), row = i < n ? i : n - 1;
    float v[32], largest = 0;
    if (out.rows) {
        wait_for_previous();
        let_next_start();               /* but nobody may read F16 early */
    }
    part_values(v, p, out.rows ? out.rows[row].token : first + row, u);
    if (!out.rows) wait_for_previous();
    UNROLL for (int e = 0; e < 32; e++) {
        v[e] = 32 * u + e < cols ? v[e] : 0.0f;
        largest = fmaxf(largest, fabsf(v[e]));
    }
    if (out.top) {
        largest = warp_max(largest);
        if (lane_id() == 0) atomicMax(out.top, __float_as_uint(largest));
    }
    const int to_row = out.each ? row + row / out.each * out.each : row, left = i < n ? ld - 32 * u : 0;
    if (out.floats)
        UNROLL for (int e = 0; e < 32; e++)
            if (e < left) out.floats[(size_t)to_row * ld + 32 * u + e] = v[e];
    if (!out.halves) return;
    /* a warp's units change places, so that neighbouring lanes store neighbouring bytes */
    __shared__ uint4 places[256 * 4];
    uint4 *mine = places + warp_id() * 128;
    UNROLL for (int e = 0; e < 32; e++) v[e] *= out.up;
    UNROLL for (int e = 0; e < 32; e += 8)
        mine[4 * lane_id() + (e / 8 ^ lane_id() / 2 % 4)] =
            make_uint4(pack(v[e], v[e + 1], half_t()), pack(v[e + 2], v[e + 3], half_t()),
                       pack(v[e + 4], v[e + 5], half_t()), pack(v[e + 6], v[e + 7], half_t()));
    __syncwarp();
    UNROLL for (int k = 0; k < 4; k++) {
        const int from = 8 * k + lane_id() / 4, piece = lane_id() % 4;
        const int its_row = __shfl_sync(ALL, to_row, from), its_u = __shfl_sync(ALL, u, from),
                  its_left = __shfl_sync(ALL, left, from);
        if (8 * piece < its_left)
            *(uint4 *)(void *)(out.halves + (size_t)its_row * ld + 32 * its_u + 8 * piece) =
                mine[4 * from + (piece ^ from / 2 % 4)];
    }
}

static cudaError_t launch_decode(bool early, cudaStream_t s, const block_decoded &out, const block_part &p,
                                 int first, int n, int cols, int ld) {
    const size_t blocks = ((size_t)n * (size_t)p.units + 255) / 256;
    return launch_early(early, s, dim3((unsigned)blocks), 256, 0, block_decode_kernel, out, p, first, n, cols,
                        ld);
}

/* Rows [first, first + n) of W as F16, divided by w.scale. */
static qwen3_result decode_rows(half_t *to, bool early, cudaStream_t s, const matrix &w, int first, int n,
                                const qwen3i_err *err) {
    for (int i = 0; i < w.n_parts && n > 0; first -= w.parts[i++].rows) {
        const block_part &p = w.parts[i];
        if (first >= p.rows) continue;
        const int count = least(n, p.rows - first);
        const block_decoded out = {to, 1 / w.scale, NULL, NULL, NULL, 0};
        CUDA_TRY(launch_decode(early, s, out, p, first, count, w.cols, w.ld));
        to += (size_t)count * w.ld;
        n -= count;
        first += count;
    }
    return QWEN3_OK;
}

/* All experts' of W, each one's gate and up below each other. */
static qwen3_result decode_experts(half_t *to, cudaStream_t s, const matrix &w, const qwen3i_err *err) {
    for (int i = 0; i < w.n_parts; i++) {
        const block_part &p = w.parts[i];
        const block_decoded out = {to + (size_t)i * w.each * w.ld, 1 / w.scale, NULL, NULL, NULL,
                                   w.n_parts > 1 ? w.each : 0};
        CUDA_TRY(launch_decode(false, s, out, p, 0, p.rows, w.cols, w.ld));
    }
    return QWEN3_OK;
}

/* One row times a matrix in blocks: see the room after the MLP. */
static bool block_norms_itself(const pass *p, const matrix &w);
static qwen3_result block_matvec(const pass *p, float *y, int ldy, const row_info *outs, const matrix &w,
                                 const input &h, int rows, bool add);
static qwen3_result block_qkv(const pass *p, int layer, const input &h);
static qwen3_result block_mlp(const pass *p, int layer, const input &h);
static bool few_serves(const cuda_ctx *c, const matrix &w, int rows);
static bool few_possible(const cuda_model *m);
static size_t few_bytes(int k);
static bool few_pairs(const pass *p, int layer);
static qwen3_result few_down(const pass *p, int layer);
const int FEW_LEAST = 5, FEW_MOST = 32; /* rows that it takes */

/* ================================================================================================
   WEIGHTS: to the device
   ================================================================================================ */
/* top_bits: *top = the largest |w| of a BF16 matrix, as bits (they order like the values). *top is 0
   before. */
static __global__ void top_bits_kernel(unsigned *top, const unsigned short *w, size_t n) {
    unsigned most_bits = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        const unsigned bits = (unsigned)(w[i] & 0x7FFFu) << 16;
        most_bits = bits > most_bits ? bits : most_bits;
    }
    UNROLL for (int o = 16; o > 0; o >>= 1) {
        const unsigned other = __shfl_xor_sync(ALL, most_bits, o);
        most_bits = other > most_bits ? other : most_bits;
    }
    if (threadIdx.x % 32 == 0) atomicMax(top, most_bits);
}

/* bf16_to_f16: w = w * 2^k in place, with 2^k as half_scale() of the largest. */
static __global__ void bf16_to_f16_kernel(unsigned short *w, size_t n, const unsigned *top) {
    const float up = half_scale(__uint_as_float(*top));
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        w[i] = __half_as_ushort(__float2half_rn(__uint_as_float((unsigned)w[i] << 16) * up));
}

/* row_norms: *most = the largest norm of n rows of W = w * scale, one warp a row; *most is 0 before. After
   each `each` rows as many are left out. */
static __global__ void row_norms_kernel(float *most, const half_t *w, int n, int each, int k, int ld,
                                        float scale) {
    const int i = block_x() * (n_threads() / 32) + warp_id(), row = i + i / each * each;
    float sum = 0;
    if (i >= n) return;
    for (int j = lane_id(); j < k; j += 32) {
        const float v = to_float(w[(size_t)row * ld + j]) * scale;
        sum += v * v;
    }
    sum = sqrtf(warp_sum(sum));
    /* they order like the values */
    if (lane_id() == 0) atomicMax((unsigned *)(void *)most, __float_as_uint(sum));
}

/* Was this kernel compiled for a chip with these instructions? */
static __global__ void has_wgmma_kernel(int *yes) {
#ifdef QWEN3_WGMMA
    *yes = 1;
#else
    *yes = 0;
#endif
}

/* The matrices that are stored below each other: as one type, F32 if theirs differ. BF16 until it is
   converted. */
struct weight_group { matrix *to; const qwen3i_matrix *from[3]; int n; const qwen3i_experts *experts; };

/* Matrix i of them. All experts': gate, up, gate, up, ... or their downs */
static const qwen3i_matrix &group_from(const weight_group &g, int i) {
    return !g.experts ? *g.from[i] : g.from[1] ? g.from[i % 2][i / 2] : g.from[0][i];
}

static bool has_blocks(const weight_group &g) {
    for (int i = 0; i < g.n; i++) if (is_block(group_from(g, i).type)) return true;
    return false;
}

/* F16 for blocks: so products of many rows have them. */
static qwen3i_type group_type(const weight_group &g) {
    if (has_blocks(g)) return QWEN3I_F16;
    const qwen3i_type first = group_from(g, 0).type;
    for (int i = 1; i < g.n; i++) if (group_from(g, i).type != first) return QWEN3I_F32;
    return first;
}

static weight_group make_group(matrix *to, const qwen3i_matrix *a, const qwen3i_matrix *b,
                               const qwen3i_matrix *c) {
    weight_group g;
    g.to = to;
    g.from[0] = a; g.from[1] = b; g.from[2] = c;
    g.n = c ? 3 : b ? 2 : 1;
    g.experts = NULL;
    return g;
}
static weight_group make_experts(matrix *to, const qwen3i_experts *e, const qwen3i_matrix *a,
                                 const qwen3i_matrix *b, int n) {
    weight_group g = make_group(to, a, b, NULL);
    g.n *= n;
    g.experts = e;
    return g;
}

/* Group i of the model: 4 a layer, then the embedding, then a head of its own. Returns 0 past the end. */
static int model_group(cuda_model *m, const qwen3i_weights *w, int i, weight_group *g) {
    const int layer = i / 4, rest = i - 4 * m->config.n_layer;
    if (rest == 0) { *g = make_group(&m->embed, &w->embed, NULL, NULL); return 1; }
    if (rest == 1 && w->head.data != w->embed.data) {
        *g = make_group(&m->head, &w->head, NULL, NULL);
        return 1;
    }
    if (rest >= 1) return 0;
    const qwen3i_layer *from = &w->layers[layer];
    layer_weights *to = &m->layers[layer];
    switch (i % 4) {
        case 0: *g = make_group(&to->qkv, &from->wq, &from->wk, &from->wv); break;
        case 1: *g = make_group(&to->wo, &from->wo, NULL, NULL); break;
        case 2:
            *g = from->experts ? make_experts(&to->gate_up, from->experts, from->experts->gate,
                                              from->experts->up, m->config.n_expert) :
                                 make_group(&to->gate_up, &from->w_gate, &from->w_up, NULL);
            break;
        default:
            *g = from->experts ? make_experts(&to->w_down, from->experts, from->experts->down, NULL,
                                              m->config.n_expert) :
                                 make_group(&to->w_down, &from->w_down, NULL, NULL);
    }
    return 1;
}

/* Parts that it has in blocks: experts' gates lie below each other, their ups, and their downs. */
static int group_parts(const weight_group &g) { return !g.experts ? g.n : g.from[1] ? 2 : 1; }

/* n matrices as w, below each other */
static void lay_out_part(block_part *p, const qwen3i_matrix &w, int n, arena *a) {
    p->rows = n * w.rows;
    p->type = (int)w.type;
    p->units = block_units(p->type, w.cols);
    p->row_bytes = block_row_bytes(p->type, w.cols);
    p->data = a->take<unsigned char>((u64)p->rows, (u64)p->row_bytes);
}

/* f(matrix, the order of its inputs, the gain that they come with): NULL: there is none */
template <class F> static void each_order(layer_weights *to, const qwen3i_layer &from, F f) {
    f(&to->qkv, from.qkv_order, to->attn_norm);
    f(&to->wo, from.o_order, (float *)NULL);
    f(&to->gate_up, from.mlp_order, to->mlp_norm);
    f(&to->w_down, from.down_order, (float *)NULL);
}

/* Lay the weights out; a dry run measures them. packed: blocks that are unpacked; tops: the largest |w| of
   each group, as bits. */
static void lay_out_model(cuda_model *m, const qwen3i_weights *w, arena *a, arena *packed, unsigned **tops) {
    const size_t n_embd = (size_t)m->config.n_embd, head_dim = (size_t)m->config.head_dim;
    const bool unpack = m->unpack;
    weight_group g;
    int n = 0;
    for (; model_group(m, w, n, &g); n++) {
        g.to->type = group_type(g);
        g.to->cols = group_from(g, 0).cols;
        g.to->ld = round_up(g.to->cols, 8);
        g.to->scale = 1;
        /* q and k: see the head of this file */
        g.to->terms = g.from[2] && g.to->type != QWEN3I_F32 ? 2 : 1;
        g.to->rows = 0;
        for (int i = 0; i < g.n; i++) g.to->rows += group_from(g, i).rows;
        g.to->n_parts = has_blocks(g) ? group_parts(g) : 0;
        g.to->each = g.experts ? group_from(g, 0).rows : 0;
        g.to->kind = n < 4 * m->config.n_layer ? n % 4 : HEAD_KIND;
        g.to->few = g.to->n_parts > 0 && !unpack;
        for (int i = 0; i < g.to->n_parts; i++) {
            lay_out_part(&g.to->parts[i], group_from(g, i), g.n / g.to->n_parts, unpack ? packed : a);
            g.to->few = g.to->few && is_block(g.to->parts[i].type);
        }
        if (g.to->n_parts > 0 && !unpack) continue;
        g.to->data = a->take<char>((u64)g.to->rows * (u64)g.to->ld, qwen3i_type_size(g.to->type));
    }
    for (int i = 0; i < m->config.n_layer; i++) {
        layer_weights *l = &m->layers[i];
        each_order(l, w->layers[i], [&](matrix *to, const int32_t *order, float *) {
            to->order = order ? a->take<int>((size_t)to->cols) : NULL;
        });
        l->gate_up.few = l->w_down.few = l->gate_up.few && l->w_down.few;
        l->attn_norm = a->take<float>(n_embd);
        l->mlp_norm = a->take<float>(n_embd);
        l->q_norm = a->take<float>(head_dim);
        l->k_norm = a->take<float>(head_dim);
        l->gate_up.bounds = a->take<float>(2);
        l->router = w->layers[i].experts ? a->take<float>(n_embd, (u64)m->config.n_expert) : NULL;
    }
    m->final_norm = a->take<float>(n_embd);
    *tops = a->take<unsigned>((size_t)n);
}

/* Weights go to the device in pieces, through pinned buffers. Several threads fill these from the file,
   because one cannot read a mapped file as fast as a bus carries it; the caller's own thread sends them off
   in order, and fills what no other has begun. Only that thread calls CUDA and the user's progress(). */
struct piece {                          /* rows of a matrix, from the file to the device */
    char       *to;
    const char *from;
    int         rows, cols;
    size_t      in, out, stride;        /* bytes of a row; from row to row of the file */
    qwen3i_type to_type, from_type;     /* they differ: numbers that become F32 */
    int         ends;                   /* the group that it completes, or -1 */
};

struct uploader {
    const qwen3_load_desc *desc;
    const qwen3_allocator *allocator;
    cudaStream_t stream, converting;
    cudaEvent_t  sent[SLOTS];
    char        *buffers;               /* SLOTS of PIECE bytes */
    piece       *pieces;
    int          n;
    double       total;                 /* bytes */
    std::mutex              lock;       /* of what follows */
    std::condition_variable filled_one, emptied_one;
    /* pieces that are being filled, or that can be: their slots are free */
    int          begun, room;
    int          filled[SLOTS];         /* piece + 1 that lies there */
    std::thread  helpers[MOST_HELPERS];
};

/* To rows of the device's type, zero from the last element on. */
static void pack_rows(char *to, const piece &p) {
    const char *from = p.from;
    if (p.to_type == p.from_type && p.in == p.out && p.in == p.stride) {
        memcpy(to, from, p.in * (size_t)p.rows);
        return;
    }
    for (int r = 0; r < p.rows; r++, to += p.out, from += p.stride) {
        memset(to, 0, p.out);
        if (p.to_type == p.from_type) memcpy(to, from, p.in);
        else for (int i = 0; i < p.cols; i++) {
            const float f = qwen3i_value(from, p.from_type, i);
            memcpy(to + 4 * i, &f, 4);
        }
    }
}

static size_t piece_bytes(const piece &p) {
    return (size_t)p.rows * p.out;
}

static void fill_next(uploader *u, std::unique_lock<std::mutex> &held) {
    const int i = u->begun++;
    held.unlock();
    pack_rows(u->buffers + (size_t)(i % SLOTS) * PIECE, u->pieces[i]);
    held.lock();
    u->filled[i % SLOTS] = i + 1;
    u->filled_one.notify_one();
}

static void help_uploading(uploader *u) {
    std::unique_lock<std::mutex> held(u->lock);
    while (u->begun < u->n)
        if (u->begun < u->room) fill_next(u, held);
        else u->emptied_one.wait(held);
}

static void close_uploader(uploader *u) {
    u->lock.lock();
    u->begun = u->n;                    /* after an error there are pieces that nobody wants */
    u->lock.unlock();
    u->emptied_one.notify_all();
    for (std::thread &t : u->helpers) if (t.joinable()) t.join();
    for (cudaStream_t s : {u->stream, u->converting}) if (s) cudaStreamSynchronize(s);
    for (cudaEvent_t e : u->sent) if (e) cudaEventDestroy(e);
    if (u->buffers) cudaFreeHost(u->buffers);
    for (cudaStream_t s : {u->stream, u->converting}) if (s) cudaStreamDestroy(s);
    host_free(u->allocator, u->pieces, (size_t)u->n * sizeof *u->pieces);
}

/* f() on a thread of its own, if the system has one more. Signals stay with the caller's threads. */
template <class F> static bool begin_thread(std::thread *t, F f) {
    bool begun = true;
#ifndef _WIN32
    sigset_t all, callers;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &callers);       /* a thread begins with the mask of its maker */
#endif
    try {
        *t = std::thread(f);
    } catch (const std::exception &) { begun = false; }
#ifndef _WIN32
    pthread_sigmask(SIG_SETMASK, &callers, NULL);
#endif
    return begun;
}

/* As many threads as help */
static void call_helpers(uploader *u) {
    const int cores = (int)std::thread::hardware_concurrency(),
              want = least(least(cores, MOST_HELPERS), u->n / SLOTS);
    for (int i = 0; i < want && begin_thread(&u->helpers[i], [=] { help_uploading(u); }); i++) { }
}

static qwen3_result open_uploader(uploader *u, const qwen3i_err *err) {
    CUDA_TRY(cudaStreamCreateWithFlags(&u->stream, cudaStreamNonBlocking));
    CUDA_TRY(cudaStreamCreateWithFlags(&u->converting, cudaStreamNonBlocking));
    CUDA_TRY(cudaHostAlloc((void **)&u->buffers, SLOTS * PIECE, cudaHostAllocDefault));
    for (cudaEvent_t &e : u->sent) CUDA_TRY(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    call_helpers(u);
    return QWEN3_OK;
}

/* Rows of so many bytes of the given type from a matrix, or some columns of one with `whole` of them;
   a dry run (no pieces yet) counts. */
static qwen3_result add_pieces(uploader *u, char *to, qwen3i_type type, size_t out, const qwen3i_matrix &w,
                               int whole, const qwen3i_err *err) {
    const size_t in = stored_row_bytes((int)w.type, w.cols), stride = stored_row_bytes((int)w.type, whole);
    const int step = (int)least((size_t)w.rows, PIECE / out);
    if (step == 0)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: a matrix has rows of %llu bytes",
                           (unsigned long long)out);
    for (int r = 0; r < w.rows; r += step, u->n++) {
        const piece p = {to + (size_t)r * out,
                         (const char *)w.data + (size_t)r * stride,
                         least(step, w.rows - r),
                         w.cols,
                         in,
                         out,
                         stride,
                         type,
                         w.type,
                         -1};
        if (u->pieces) u->pieces[u->n] = p;
        else u->total += (double)piece_bytes(p);
    }
    return QWEN3_OK;
}

static qwen3_result add_gain(uploader *u, float *to, const float *from, int n, const qwen3i_err *err) {
    const qwen3i_matrix w = {from, 1, n, QWEN3I_F32, 0};
    return add_pieces(u, (char *)to, QWEN3I_F32, (size_t)n * sizeof *to, w, n, err);
}

/* Columns of the matrix that a rank has `cols` of */
static int whole_columns(const cuda_model *m, const matrix &to, int cols) {
    if (m->n_ranks == 1) return cols;
    if (to.kind == DOWN_KIND) return to.each > 0 ? m->all_ff_expert : m->all_ff;
    return to.kind == OUT_KIND ? cols * m->n_ranks : cols;
}

static qwen3_result add_model(uploader *u, cuda_model *m, const qwen3i_weights *w, const qwen3i_err *err) {
    const int n_embd = m->config.n_embd, head_dim = m->config.head_dim;
    weight_group g;
    for (int i = 0; model_group(m, w, i, &g); i++) {
        const size_t row = (size_t)g.to->ld * qwen3i_type_size(g.to->type);
        const int whole = whole_columns(m, *g.to, group_from(g, 0).cols);
        char *to = (char *)g.to->data;
        for (int k = 0; k < g.n; k++) {
            const qwen3i_matrix &from = group_from(g, k);
            if (g.to->n_parts > 0) {
                const block_part &p = g.to->parts[k % g.to->n_parts];
                const size_t first = (size_t)(k / g.to->n_parts) * (size_t)from.rows;
                TRY(add_pieces(u, (char *)p.data + first * (size_t)p.row_bytes, from.type,
                               (size_t)p.row_bytes, from, whole, err));
            } else TRY(add_pieces(u, to, g.to->type, row, from, whole, err));
            to += (size_t)from.rows * row;
        }
        if (u->pieces) u->pieces[u->n - 1].ends = i;
    }
    for (int i = 0; i < m->config.n_layer; i++) {
        const qwen3i_layer *l = &w->layers[i];
        TRY(add_gain(u, m->layers[i].attn_norm, l->attn_norm, n_embd, err));
        TRY(add_gain(u, m->layers[i].mlp_norm, l->mlp_norm, n_embd, err));
        TRY(add_gain(u, m->layers[i].q_norm, l->q_norm, head_dim, err));
        TRY(add_gain(u, m->layers[i].k_norm, l->k_norm, head_dim, err));
        if (l->experts)
            TRY(add_pieces(u, (char *)m->layers[i].router, QWEN3I_F32, (size_t)n_embd * sizeof(float),
                           l->experts->router, n_embd, err));
    }
    return add_gain(u, m->final_norm, w->final_norm, n_embd, err);
}

static qwen3_result list_pieces(uploader *u, cuda_model *m, const qwen3i_weights *w, const qwen3i_err *err) {
    TRY(add_model(u, m, w, err));
    u->pieces = (piece *)host_alloc(u->allocator, (size_t)u->n * sizeof *u->pieces);
    if (!u->pieces) return no_host_memory(err, (size_t)u->n * sizeof *u->pieces);
    u->n = 0;
    return add_model(u, m, w, err);
}

static void wait_until_filled(uploader *u, int i) {
    std::unique_lock<std::mutex> held(u->lock);
    if (u->begun == i) fill_next(u, held);
    while (u->filled[i % SLOTS] != i + 1) u->filled_one.wait(held);
}

/* Piece i has left its slot, as have those before it. */
static void make_room(uploader *u, int i) {
    u->lock.lock();
    u->room = i + 1 + SLOTS;
    u->lock.unlock();
    u->emptied_one.notify_all();
}

/* Blocks are taken apart, in place. */
static qwen3_result convert_blocks(uploader *u, const cuda_model *m, const matrix &w, unsigned *top,
                                   const qwen3i_err *err) {
    for (int k = 0; k < w.n_parts; k++) {
        const block_part &p = w.parts[k];
        const dim3 grid((unsigned)least(p.rows, 16 * m->n_sm));
        if (is_block(p.type))
            CUDA_TRY(launch_shared(false, 1, u->converting, grid, 128, (size_t)p.row_bytes, repack_kernel,
                                   p));
        const block_decoded out = {NULL, 1, NULL, NULL, top, 0};
        CUDA_TRY(launch_decode(false, u->converting, out, p, 0, p.rows, w.cols, w.ld));
    }
    return QWEN3_OK;
}

/* Group i from BF16 to F16, in place on the device, when it is there. top: the largest |w|, as bits; 0 as
   yet. */
static qwen3_result convert_group(uploader *u, cuda_model *m, const qwen3i_weights *w, int i,
                                  cudaEvent_t there, unsigned *top, const qwen3i_err *err) {
    const dim3 grid((unsigned)(8 * m->n_sm));
    weight_group g;
    model_group(m, w, i, &g);
    if (g.to->type != QWEN3I_BF16 && g.to->n_parts == 0) return QWEN3_OK;
    unsigned short *data = (unsigned short *)g.to->data;
    const size_t n = (size_t)g.to->rows * g.to->ld;
    CUDA_TRY(cudaStreamWaitEvent(u->converting, there, 0));
    if (g.to->n_parts > 0) return convert_blocks(u, m, *g.to, top, err);
    CUDA_TRY(launch(u->converting, grid, 256, 0, top_bits_kernel, top, data, n));
    CUDA_TRY(launch(u->converting, grid, 256, 0, bf16_to_f16_kernel, data, n, top));
    return QWEN3_OK;
}

static qwen3_result send_pieces(uploader *u, cuda_model *m, const qwen3i_weights *w, unsigned *tops,
                                const qwen3i_err *err) {
    double done = 0;
    for (int i = 0; i < u->n; i++) {
        const piece &p = u->pieces[i];
        const int slot = i % SLOTS, before = i - SLOTS / 4;
        wait_until_filled(u, i);
        CUDA_TRY(cudaMemcpyAsync(p.to, u->buffers + (size_t)slot * PIECE, piece_bytes(p),
                                 cudaMemcpyHostToDevice, u->stream));
        CUDA_TRY(cudaEventRecord(u->sent[slot], u->stream));
        if (p.ends >= 0) TRY(convert_group(u, m, w, p.ends, u->sent[slot], &tops[p.ends], err));
        if (before >= 0) {
            CUDA_TRY(cudaEventSynchronize(u->sent[before % SLOTS]));
            make_room(u, before);
        }
        done += (double)piece_bytes(p);
        if (u->desc->progress && u->desc->progress((float)(done / u->total), u->desc->progress_user))
            return qwen3i_fail(err, QWEN3_STOPPED, "loading was cancelled");
    }
    CUDA_TRY(cudaStreamSynchronize(u->stream));
    return QWEN3_OK;
}

/* What convert_group() has multiplied by; through the upload buffers, which are free by now, as many as fit
   at a time. */
static qwen3_result fetch_scales(uploader *u, cuda_model *m, const qwen3i_weights *w, const unsigned *tops,
                                 int n_groups, const qwen3i_err *err) {
    const unsigned *host = (const unsigned *)(const void *)u->buffers;
    const int room = (int)(SCALES_PIECE / sizeof *tops);
    weight_group g;
    for (int i = 0; i < n_groups; i++) {
        if (i % room == 0) {
            const size_t n = (size_t)least(room, n_groups - i);
            CUDA_TRY(cudaMemcpyAsync(u->buffers, tops + i, n * sizeof *tops, cudaMemcpyDeviceToHost,
                                     u->converting));
            CUDA_TRY(cudaStreamSynchronize(u->converting));
        }
        model_group(m, w, i, &g);
        if (g.to->type != QWEN3I_BF16 && g.to->n_parts == 0) continue;
        g.to->type = QWEN3I_F16;
        g.to->scale = 1.0f / half_scale(qwen3i_float_from_bits(host[i % room]));
    }
    return QWEN3_OK;
}

/* Blocks to F16, when its scale is known */
static qwen3_result unpack_blocks(uploader *u, cuda_model *m, const qwen3i_weights *w,
                                  const qwen3i_err *err) {
    weight_group g;
    for (int i = 0; m->unpack && model_group(m, w, i, &g); i++) {
        TRY(decode_rows((half_t *)g.to->data, false, u->stream, *g.to, 0, g.to->rows, err));
        g.to->n_parts = 0;
    }
    return QWEN3_OK;
}

/* A map of [z, y, x] 16-bit elements at p, read in tiles of [tile_z, tile_y, tile_x], whose rows are swizzled
   if they have the 128 bytes that this takes. */
static qwen3_result make_map(stored_map *out, const void *p, u64 x, u64 y, u64 z, int tile_x, int tile_y,
                             int tile_z, const qwen3i_err *err) {
    typedef CUresult (*encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                               const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                               CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                               CUtensorMapFloatOOBfill);
    const cuuint64_t sizes[3] = {x, y, z}, strides[2] = {2 * x, 2 * x * y};
    const cuuint32_t tile[3] = {(cuuint32_t)tile_x, (cuuint32_t)tile_y, (cuuint32_t)tile_z},
                     steps[3] = {1, 1, 1};
    CUtensorMap map;
    cudaDriverEntryPointQueryResult found;
    void *function = NULL;
#if CUDART_VERSION >= 12050
    CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                              &found));
#else
    CUDA_TRY(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess || !function)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: the driver has no cuTensorMapEncodeTiled");
    const CUresult r =
        ((encode)function)(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, z ? 3 : 2, (void *)p, sizes, strides, tile,
                           steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           tile_x == HOPPER_K ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: cuTensorMapEncodeTiled: error %d", (int)r);
    memcpy(out, &map, sizeof *out);
    return QWEN3_OK;
}

static qwen3_result make_map(stored_map *out, const void *p, u64 x, u64 y, int tile_y,
                             const qwen3i_err *err) {
    return make_map(out, p, x, y, 0, HOPPER_K, tile_y, 1, err);
}

static CUtensorMap get_map(const stored_map &m) {
    CUtensorMap map;
    memcpy(&map, &m, sizeof map);
    return map;
}

/* Are the shapes, types and the chip such that products with many rows can go through the kernels for
   Hopper? */
static bool fits_hopper(const cuda_model *m) {
    const qwen3i_config *g = &m->config;
    if (m->capability != 90 || g->head_dim != HEAD_DIM || g->n_head / g->n_head_kv > HOPPER_M) return false;
    if (g->n_embd % HOPPER_N || g->n_ff % HOPPER_N || g->n_embd > 4 * 8 * norm_threads(8)) return false;
    for (int i = 0; i < g->n_layer; i++) {
        const layer_weights &l = m->layers[i];
        if (l.qkv.type != QWEN3I_F16 || l.wo.type != QWEN3I_F16) return false;
        if (!l.router && (l.gate_up.type != QWEN3I_F16 || l.w_down.type != QWEN3I_F16)) return false;
    }
    return (m->head.rows ? m->head : m->embed).type == QWEN3I_F16;
}

/* Maps of a matrix of F16 */
static qwen3_result map_matrix(matrix *w, const qwen3i_err *err) {
    TRY(make_map(&w->map, w->data, (u64)w->ld, (u64)w->rows, HOPPER_N / 2, err));
    if (w->kind == HEAD_KIND || w->each > 0) return QWEN3_OK;
    return make_map(&w->map_more, w->data, (u64)w->ld, (u64)w->rows, HOPPER_N_MORE / 2, err);
}

/* The largest norms of a row of gate and of one of up */
static qwen3_result bound_rows(uploader *u, const matrix &w, const half_t *data, const qwen3i_err *err) {
    const int n = w.rows / 2, each = w.each > 0 ? w.each : n;
    CUDA_TRY(cudaMemsetAsync(w.bounds, 0, 2 * sizeof(float), u->stream));
    for (int k = 0; k < 2; k++)
        CUDA_TRY(launch(u->stream, dim3((unsigned)ceil_div(n, 8)), 256, 0, row_norms_kernel, w.bounds + k,
                        data + (size_t)k * each * w.ld, n, each, w.cols, w.ld, w.scale));
    return QWEN3_OK;
}

/* Of those that lie in blocks: one after the other through memory that is needed no longer. */
static qwen3_result bound_blocks(uploader *u, const cuda_model *m, const qwen3i_err *err) {
    char *memory = NULL;
    size_t bytes = 0;
    qwen3_result r = QWEN3_OK;
    for (int i = 0; i < m->config.n_layer; i++) {
        const matrix &w = m->layers[i].gate_up;
        if (w.n_parts > 0) bytes = most(bytes, (size_t)w.rows * w.ld * sizeof(half_t));
    }
    if (bytes > 0) TRY(device_alloc(&memory, bytes, "loading", err));
    for (int i = 0; i < m->config.n_layer && r == QWEN3_OK; i++) {
        const matrix &w = m->layers[i].gate_up;
        if (w.n_parts == 0) continue;
        half_t *data = (half_t *)(void *)memory;
        r = w.each > 0 ? decode_experts(data, u->stream, w, err) :
                         decode_rows(data, false, u->stream, w, 0, w.rows, err);
        if (r == QWEN3_OK) r = bound_rows(u, w, data, err);
    }
    const cudaError_t e = cudaStreamSynchronize(u->stream);
    if (memory) cudaFree(memory);
    return r == QWEN3_OK && e != cudaSuccess ? cuda_fail(err, e, "loading") : r;
}

static qwen3_result map_columns(cuda_model *m, const qwen3i_err *err);

static qwen3_result prepare_maps(uploader *u, cuda_model *m, const qwen3i_err *err) {
    int *answer = (int *)(void *)m->layers[0].gate_up.bounds, yes = 0;
    if (!fits_hopper(m)) return QWEN3_OK;
    CUDA_TRY(launch(u->stream, dim3(1), 32, 0, has_wgmma_kernel, answer));
    CUDA_TRY(cudaMemcpyAsync(&yes, answer, sizeof yes, cudaMemcpyDeviceToHost, u->stream));
    CUDA_TRY(cudaStreamSynchronize(u->stream));
    if (!yes) return QWEN3_OK;          /* built for another chip of this generation */
    for (int i = 0; i < m->config.n_layer; i++) {
        layer_weights *l = &m->layers[i];
        for (matrix *w : {&l->qkv, &l->wo, &l->gate_up, &l->w_down})
            if (w->n_parts == 0 && (w->type == QWEN3I_F16 || !l->router)) TRY(map_matrix(w, err));
        if (l->gate_up.n_parts == 0 && l->gate_up.type == QWEN3I_F16)
            TRY(bound_rows(u, l->gate_up, (const half_t *)l->gate_up.data, err));
    }
    TRY(bound_blocks(u, m, err));
    matrix &head = m->head.rows ? m->head : m->embed;
    if (head.n_parts == 0) TRY(map_matrix(&head, err));
    m->hopper = true;
    return map_columns(m, err);
}

/* A rank's rows of a matrix on the device */
static matrix own_rows(const matrix &w, int rank, int n_ranks) {
    matrix own = w;
    own.rows = w.rows / n_ranks;
    const size_t first = (size_t)rank * own.rows;
    if (w.n_parts == 0) own.data = (char *)w.data + first * w.ld * qwen3i_type_size(w.type);
    else own.parts[0].data += first * (size_t)w.parts[0].row_bytes;
    own.parts[0].rows = own.rows;
    return own;
}

/* order_rows: y[row, j] = x[row, order[j]] for rows ld apart, of at most ORDER_MOST elements; y may be x.
   One block a row. Exact. Equals qwen3i_order_rows. */
const int ORDER_EACH = 32, ORDER_MOST = 1024 * ORDER_EACH;      /* of a thread, of a row */
template <class T>
static __global__ void __launch_bounds__(1024)
    order_rows_kernel(T *y, const T *x, const int *order, int width, int ld) {
    const size_t base = (size_t)blockIdx.x * ld;
    T v[ORDER_EACH];
    UNROLL for (int k = 0; k < ORDER_EACH; k++) {
        const int i = tid() + k * n_threads();
        if (i < width) v[k] = x[base + order[i]];
    }
    __syncthreads();
    UNROLL for (int k = 0; k < ORDER_EACH; k++) {
        const int i = tid() + k * n_threads();
        if (i < width) y[base + i] = v[k];
    }
}

template <class T>
static cudaError_t launch_order(cudaStream_t s, T *y, const T *x, const int *order, int width, int ld,
                                int rows) {
    return launch(s, grid1(rows), least(1024, round_up(width, 32)), 0, order_rows_kernel<T>, y, x, order,
                  width, ld);
}

/* The orders of inputs; gains that come with such inputs are put in order. */
static qwen3_result send_orders(uploader *u, cuda_model *m, const qwen3i_weights *w, const qwen3i_err *err) {
    cudaError_t e = cudaSuccess;
    for (int i = 0; i < m->config.n_layer; i++)
        each_order(&m->layers[i], w->layers[i], [&](matrix *to, const int32_t *order, float *gain) {
            if (!order || e != cudaSuccess) return;
            e = cudaMemcpyAsync(to->order, order, (size_t)to->cols * sizeof *order, cudaMemcpyHostToDevice,
                                u->stream);
            if (e == cudaSuccess && gain)
                e = launch_order(u->stream, gain, (const float *)gain, to->order, to->cols, to->cols, 1);
        });
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(err, e, "loading");
}

static qwen3_result upload_weights(uploader *u, cuda_model *m, const qwen3i_weights *w, unsigned *tops,
                                   const qwen3i_err *err) {
    weight_group g;
    int n_groups = 0;
    while (model_group(m, w, n_groups, &g)) n_groups++;
    TRY(list_pieces(u, m, w, err));
    TRY(open_uploader(u, err));
    CUDA_TRY(cudaMemsetAsync(tops, 0, (size_t)n_groups * sizeof *tops, u->converting));
    TRY(send_pieces(u, m, w, tops, err));
    TRY(fetch_scales(u, m, w, tops, n_groups, err));
    TRY(unpack_blocks(u, m, w, err));
    TRY(send_orders(u, m, w, err));
    if (m->n_ranks > 1 && m->head.rows == 0) m->head = own_rows(m->embed, m->rank, m->n_ranks);
    TRY(prepare_maps(u, m, err));
    if (m->head.rows == 0) m->head = m->embed;
    CUDA_TRY(cudaStreamSynchronize(u->stream));
    return QWEN3_OK;
}

/* Is there such a device, does the driver know this CUDA, and has this build code for the chip? */
/* Of what the chip's data sheet says, seven eighths come. */
static qwen3_result find_stream(cuda_model *m, const qwen3i_err *err) {
    int khz = 0, bits = 0;
    CUDA_TRY(cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, m->device));
    CUDA_TRY(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, m->device));
    m->stream = most((float)khz * 2e-3f * (float)bits / 8 * 0.875f, 1.0f);
    return QWEN3_OK;
}

static qwen3_result open_device(cuda_model *m, int device, const qwen3i_err *err) {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    cudaDeviceProp prop;
    cudaFuncAttributes code;
    if (e != cudaSuccess) cudaGetLastError();
    if (e == cudaErrorInsufficientDriver)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE,
                           "CUDA: there is no NVIDIA driver, or it is older than CUDA %d.%d needs",
                           CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (e != cudaSuccess || n == 0)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: no usable GPU: %s",
                    e == cudaSuccess ? "none found" : cudaGetErrorString(e));
    if (device < 0 || device >= n)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: there is no device %d; 0 to %d exist", device,
                           n - 1);
    device_guard guard(device);
    CUDA_TRY(guard.status);
    CUDA_TRY(cudaGetDeviceProperties(&prop, device));
    m->device = device;
    m->n_sm = prop.multiProcessorCount;
    m->block_shared = prop.sharedMemPerBlockOptin;
    m->sm_shared = prop.sharedMemPerMultiprocessor;
    m->cache_bytes = (size_t)prop.l2CacheSize;
    m->capability = prop.major * 10 + prop.minor;
    TRY(find_stream(m, err));
    snprintf(m->name, sizeof m->name, "%s", prop.name);
    if (m->capability < 75)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: %s has compute capability %d.%d; 7.5 is the least",
                           m->name, prop.major, prop.minor);
    e = cudaFuncGetAttributes(&code, top_bits_kernel);
    if (e != cudaSuccess) {
        cudaGetLastError();
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: this build has no code for %s (sm_%d): %s", m->name,
                           m->capability, cudaGetErrorString(e));
    }
    return QWEN3_OK;
}

static qwen3_result check_shapes(const qwen3i_config *c, const qwen3i_err *err) {
    if (c->head_dim % 8 != 0 || c->head_dim > MAX_HEAD_DIM)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                           "CUDA: head_dim is %d; multiples of 8 up to %d can be run", c->head_dim,
                           MAX_HEAD_DIM);
    if (most(c->n_ff, c->n_ff_expert) > 1024 * 4 * VECTORS)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: the MLP is %d wide; up to %d can be run",
                           most(c->n_ff, c->n_ff_expert), 1024 * 4 * VECTORS);
    if (c->ordered && most(most(c->n_embd, c->n_ff), c->n_head * c->head_dim) > ORDER_MOST)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                           "CUDA: more than %d inputs of a matrix are in order of activation (g_idx)",
                           ORDER_MOST);
    return QWEN3_OK;
}

/* A row of blocks is taken apart in shared memory. */
static qwen3_result check_rows(cuda_model *m, const qwen3i_weights *w, const qwen3i_err *err) {
    weight_group g;
    for (int i = 0; model_group(m, w, i, &g); i++)
        for (int k = 0, parts = group_parts(g); k < g.n; k++) {
            const qwen3i_matrix &from = group_from(g, k);
            if (k >= parts && from.type != group_from(g, k % parts).type && has_blocks(g))
                return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                                   "CUDA: layer %d has experts of several formats", i / 4);
            if (is_block(from.type) && stored_row_bytes((int)from.type, from.cols) > m->block_shared / 2)
                return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                                   "CUDA: a matrix has rows of %d elements in blocks", from.cols);
        }
    return QWEN3_OK;
}

static void free_model(void *model_state) {
    cuda_model *m = (cuda_model *)model_state;
    if (!m) return;
    const qwen3_allocator a = m->allocator;
    for (int i = 1; m->fellows && i < m->n_ranks; i++) free_model(m->fellows[i]);
    {
        device_guard guard(m->device);
#ifdef QWEN3_CUDA_NCCL
        if (m->comm) ncclCommDestroy(m->comm);
#endif
        if (m->memory) cudaFree(m->memory);
    }
    host_free(&a, m->fellows, (size_t)m->n_ranks * sizeof *m->fellows);
    host_free(&a, m->layers, (size_t)m->config.n_layer * sizeof *m->layers);
    host_free(&a, m, sizeof *m);
}

/* ---- a rank's part of a model, as if it were a model of its own ---- */
struct model_share {
    qwen3i_config  config;
    int            first_row, first_expert_row;     /* of gate and up */
    qwen3i_weights weights;
    qwen3i_layer   *layers;             /* [n_layer] */
    qwen3i_experts *experts;            /* [n_layer] */
    qwen3i_matrix  *matrices;           /* [n_layer, 3, n_expert] */
    char           *memory;
    size_t          size;
};

static qwen3i_matrix some_rows(const qwen3i_matrix &w, int first, int n) {
    const qwen3i_matrix part = {(const char *)w.data + (size_t)first * stored_row_bytes((int)w.type, w.cols),
                                n, w.cols, w.type, 0};
    return part;
}
/* Its rows are as far apart as w's. */
static qwen3i_matrix some_cols(const qwen3i_matrix &w, int first, int n) {
    const qwen3i_matrix part = {(const char *)w.data + stored_row_bytes((int)w.type, first), w.rows, n,
                                w.type, 0};
    return part;
}

static qwen3_result check_division(const qwen3i_config *c, int n, const qwen3i_err *err) {
    const struct { const char *what; int count; } counts[] = {
        {"heads", c->n_head}, {"tokens", c->n_vocab}
    };
    for (const auto &k : counts)
        if (k.count % n != 0)
            return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: %d %s cannot be divided among %d devices",
                               k.count, k.what, n);
    if (c->ordered)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                           "CUDA: inputs in order of activation (g_idx) cannot be divided among %d devices",
                           n);
    if (c->n_head_kv % n == 0 || n % c->n_head_kv == 0) return QWEN3_OK;
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                       "CUDA: %d key/value heads cannot be divided among %d devices", c->n_head_kv, n);
}

/* Columns of blocks begin with a block. */
static qwen3_result cannot_divide(int columns, int block, int n, const qwen3i_err *err) {
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                       "CUDA: rows of %d in blocks of %d cannot be divided among %d devices", columns, block,
                       n);
}
static qwen3_result check_columns(const qwen3i_matrix &w, int n, const qwen3i_err *err) {
    const int block = block_elements((int)w.type);
    return w.cols / n % block == 0 ? QWEN3_OK : cannot_divide(w.cols, block, n, err);
}

/* The largest blocks that Wdown lies in, of any layer */
static int largest_down_block(const qwen3i_weights *w, int n_layer) {
    int block = 1;
    for (int i = 0; i < n_layer; i++) {
        const qwen3i_layer &l = w->layers[i];
        block = most(block, block_elements((int)(l.experts ? l.experts->down[0] : l.w_down).type));
    }
    return block;
}

/* Where a rank's rows of gate and up begin, of ff that lie in such blocks, the last of which may not be full:
   some ranks may have one more. */
static int ff_begins(int rank, int ff, int block, int n_ranks) {
    return least((int)((long long)rank * ceil_div(ff, block) / n_ranks) * block, ff);
}
static qwen3_result share_ff(int *own, int *first, int ff, int block, const cuda_model *m,
                             const qwen3i_err *err) {
    *first = ff_begins(m->rank, ff, block, m->n_ranks);
    *own = ff_begins(m->rank + 1, ff, block, m->n_ranks) - *first;
    if (ff == 0 || (block == 1 ? ff % m->n_ranks == 0 : ceil_div(ff, block) >= m->n_ranks)) return QWEN3_OK;
    return cannot_divide(ff, block, m->n_ranks, err);
}

static void share_experts(qwen3i_experts *to, const qwen3i_experts &from, qwen3i_matrix *m, int n, int first,
                          int ff) {
    to->router = from.router;
    to->gate = m; to->up = m + n; to->down = m + 2 * n;
    for (int i = 0; i < n; i++) {
        m[i] = some_rows(from.gate[i], first, ff);
        m[n + i] = some_rows(from.up[i], first, ff);
        m[2 * n + i] = some_cols(from.down[i], first, ff);
    }
}

/* Where a rank's key/value heads begin; of fewer heads than ranks some ranks have the same one. */
static int kv_begins(int rank, int heads, int n_ranks) { return (int)((long long)rank * heads / n_ranks); }

static qwen3_result share_layer(model_share *s, const qwen3i_layer &from, int i, const cuda_model *m,
                                const qwen3i_err *err) {
    const qwen3i_config *g = &s->config;
    const int q = g->n_head * g->head_dim, kv = g->n_head_kv * g->head_dim,
              first_kv = kv_begins(m->rank, m->all_kv, m->n_ranks) * g->head_dim;
    qwen3i_layer *to = &s->layers[i];
    *to = from;
    TRY(check_columns(from.wo, m->n_ranks, err));
    to->wq = some_rows(from.wq, m->rank * q, q);
    to->wk = some_rows(from.wk, first_kv, kv);
    to->wv = some_rows(from.wv, first_kv, kv);
    to->wo = some_cols(from.wo, m->rank * q, q);
    if (from.experts) {
        share_experts(&s->experts[i], *from.experts, s->matrices + (size_t)i * 3 * g->n_expert, g->n_expert,
                      s->first_expert_row, g->n_ff_expert);
        to->experts = &s->experts[i];
        return QWEN3_OK;
    }
    to->w_gate = some_rows(from.w_gate, s->first_row, g->n_ff);
    to->w_up = some_rows(from.w_up, s->first_row, g->n_ff);
    to->w_down = some_cols(from.w_down, s->first_row, g->n_ff);
    return QWEN3_OK;
}

static void lay_out_share(model_share *s, arena *a) {
    s->layers = a->take<qwen3i_layer>((u64)s->config.n_layer);
    s->experts = a->take<qwen3i_experts>((u64)s->config.n_layer);
    s->matrices = a->take<qwen3i_matrix>((u64)s->config.n_layer, 3 * (u64)s->config.n_expert);
}

static qwen3_result make_share(model_share *s, const qwen3i_model_view *view, cuda_model *m,
                               const qwen3i_err *err) {
    const qwen3i_config *all = view->config;
    const int n = m->n_ranks, rows = all->n_vocab / n;
    const int block = largest_down_block(view->weights, all->n_layer);
    arena measured(NULL);
    s->config = *all;
    s->weights = *view->weights;
    if (n == 1) return QWEN3_OK;
    TRY(check_division(all, n, err));
    s->config.n_head /= n;
    s->config.n_head_kv = most(all->n_head_kv / n, 1);
    TRY(share_ff(&s->config.n_ff, &s->first_row, all->n_ff, block, m, err));
    TRY(share_ff(&s->config.n_ff_expert, &s->first_expert_row, all->n_ff_expert, block, m, err));
    lay_out_share(s, &measured);
    s->size = (size_t)measured.size();
    s->memory = (char *)host_alloc(view->allocator, s->size);
    if (!s->memory) return no_host_memory(err, s->size);
    arena taken(s->memory);
    lay_out_share(s, &taken);
    for (int i = 0; i < all->n_layer; i++) TRY(share_layer(s, view->weights->layers[i], i, m, err));
    s->weights.layers = s->layers;
    if (view->weights->head.data != view->weights->embed.data)
        s->weights.head = some_rows(view->weights->head, m->rank * rows, rows);
    return QWEN3_OK;
}

static qwen3_result fill_model(cuda_model *m, const qwen3i_weights *weights, int device,
                               const qwen3_load_desc *desc, const qwen3i_err *err) {
    arena measured(NULL), measured_packed(NULL);
    unsigned *tops = NULL;
    char *packed = NULL;
    uploader u = uploader();
    TRY(check_shapes(&m->config, err));
    TRY(open_device(m, device, err));
    m->layers = (layer_weights *)host_alloc(&m->allocator, (size_t)m->config.n_layer * sizeof *m->layers);
    if (!m->layers) return no_host_memory(err, (size_t)m->config.n_layer * sizeof *m->layers);
    device_guard guard(m->device);
    CUDA_TRY(guard.status);
    TRY(check_rows(m, weights, err));
    lay_out_model(m, weights, &measured, &measured_packed, &tops);
    TRY(device_alloc(&m->memory, measured.size(), "the model", err));
    if (measured_packed.size() > 0) TRY(device_alloc(&packed, measured_packed.size(), "loading", err));
    arena taken(m->memory), taken_packed(packed);
    lay_out_model(m, weights, &taken, &taken_packed, &tops);
    u.desc = desc;
    u.allocator = &m->allocator;
    u.room = SLOTS;
    const qwen3_result r = upload_weights(&u, m, weights, tops, err);
    close_uploader(&u);
    if (packed) cudaFree(packed);
    return r;
}

/* The model of a rank, on a device */
static qwen3_result create_share(cuda_model **out, const qwen3i_model_view *view, int device, int rank,
                                 int n_ranks, const qwen3_load_desc *desc, const qwen3i_err *err) {
    cuda_model *m = (cuda_model *)host_alloc(view->allocator, sizeof *m);
    model_share s = model_share();
    *out = NULL;
    if (!m) return no_host_memory(err, sizeof *m);
    m->allocator = *view->allocator;
    m->rank = rank;
    m->n_ranks = n_ranks;
    m->all_kv = view->config->n_head_kv;
    m->all_ff = view->config->n_ff;
    m->all_ff_expert = view->config->n_ff_expert;
    qwen3_result r = make_share(&s, view, m, err);
    m->config = s.config;
    m->unpack = (desc->flags & QWEN3_LOAD_UNPACK) && m->config.n_expert == 0;
    if (r == QWEN3_OK) r = fill_model(m, &s.weights, device, desc, err);
    host_free(view->allocator, s.memory, s.size);
    if (r == QWEN3_OK) *out = m;
    else free_model(m);
    return r;
}

#ifdef QWEN3_CUDA_NCCL
/* Progress of one of several loads */
struct partial_progress { const qwen3_load_desc *desc; int i, n; };
static int report_part(float done, void *part) {
    const partial_progress *p = (const partial_progress *)part;
    return p->desc->progress(((float)p->i + done) / (float)p->n, p->desc->progress_user);
}

/* The ranks of this process, one after the other; rank 0 has the others as its fellows. */
static qwen3_result create_group(cuda_model **first, const qwen3i_model_view *view,
                                 const qwen3_load_desc *desc, const qwen3i_err *err) {
    ncclComm_t comms[MOST_RANKS] = {NULL};
    cuda_model *m = NULL;
    const int n = desc->n_devices;
    qwen3_load_desc part = *desc;
    partial_progress progress = {desc, 0, n};
    if (n > MOST_RANKS)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: n_devices is %d; up to %d share a model", n,
                           MOST_RANKS);
    part.progress = desc->progress ? report_part : NULL;
    part.progress_user = &progress;
    for (; progress.i < n; progress.i++) {
        TRY(create_share(&m, view, desc->devices[progress.i], progress.i, n, &part, err));
        if (progress.i == 0) {
            *first = m;
            m->fellows = (cuda_model **)host_alloc(&m->allocator, (size_t)n * sizeof *m->fellows);
            if (!m->fellows) return no_host_memory(err, (size_t)n * sizeof *m->fellows);
        }
        (*first)->fellows[progress.i] = m;
    }
    NCCL_TRY(ncclCommInitAll(comms, n, desc->devices));
    for (int i = 0; i < n; i++) (*first)->fellows[i]->comm = comms[i];
    char name[sizeof m->name];
    memcpy(name, (*first)->name, sizeof name);
    snprintf((*first)->name, sizeof m->name, "%d x %.200s", n, name);
    return QWEN3_OK;
}

static qwen3_result join_ranks(cuda_model *m, const qwen3_load_desc *desc, const qwen3i_err *err) {
    ncclUniqueId id;
    device_guard guard(m->device);
    CUDA_TRY(guard.status);
    memcpy(&id, desc->nccl_id, sizeof id);
    NCCL_TRY(ncclCommInitRank(&m->comm, m->n_ranks, id, m->rank));
    return QWEN3_OK;
}
#endif

static qwen3_result create_model_from(void **model_state, const qwen3i_model_view *view,
                                      const qwen3_load_desc *desc, const qwen3i_err *err) {
    const int device = desc->n_devices > 0 ? desc->devices[0] : desc->device;
    cuda_model *m = NULL;
    qwen3_result r;
    *model_state = NULL;
#ifdef QWEN3_CUDA_NCCL
    if (desc->n_devices > 1) r = create_group(&m, view, desc, err);
    else {
        r = create_share(&m, view, device, desc->rank, most(desc->n_ranks, 1), desc, err);
        if (r == QWEN3_OK && m->n_ranks > 1) r = join_ranks(m, desc, err);
    }
#else
    r = create_share(&m, view, device, 0, 1, desc, err);
#endif
    if (r == QWEN3_OK) *model_state = m;
    else free_model(m);
    return r;
}

static qwen3_result create_model(void **model_state, const qwen3_model *model, const qwen3_load_desc *desc,
                                 const qwen3i_err *err) {
    const qwen3i_model_view view = qwen3_backend_view(model);
    return create_model_from(model_state, &view, desc, err);
}

/* The first use of a device takes longer than all that follows of loading a small model. */
struct starting_device {
    qwen3_allocator allocator;
    int             device;
    std::thread     thread;
};

static void start_device(starting_device *s) {
    cudaFuncAttributes code;
    const bool there = cudaSetDevice(s->device) == cudaSuccess && cudaFree(NULL) == cudaSuccess;
    if (!there || cudaFuncGetAttributes(&code, top_bits_kernel) != cudaSuccess) cudaGetLastError();
}

static void *start(const qwen3_load_desc *desc) {
    void *memory = host_alloc(&desc->allocator, sizeof(starting_device));
    if (!memory) return NULL;
    starting_device *s = new (memory) starting_device();
    s->allocator = desc->allocator;
    s->device = desc->n_devices > 0 ? desc->devices[0] : desc->device;
    begin_thread(&s->thread, [=] { start_device(s); });
    return s;
}

static void started(void *starting) {
    starting_device *s = (starting_device *)starting;
    const qwen3_allocator a = s->allocator;
    if (s->thread.joinable()) s->thread.join();
    s->~starting_device();
    host_free(&a, s, sizeof *s);
}

static const char *device_name(const void *model_state) { return ((const cuda_model *)model_state)->name; }

/* ================================================================================================
   ROWS: embedding, rotation, those that are wanted
   ================================================================================================ */
/* embed: x[row, :] = E[token, :] * scale, as float32. Exact.
   One block a row. Equal to the CPU's row copy (qwen3i_embed). */
template <class W>
static __global__ void embed_kernel(float *x, const W *table, float scale, const row_info *rows, int width,
                                    int ld) {
    wait_for_previous();
    let_next_start();
    const W *from = table + (size_t)rows[blockIdx.x].token * ld;
    for (int i = tid(); i < width; i += n_threads())
        x[(size_t)blockIdx.x * ld + i] = to_float(from[i]) * scale;
}

/* x = embedding of the rows' tokens */
template <class W> static cudaError_t launch_embed(const pass *p, const matrix &w) {
    return launch_early(p->early, p->s, grid1(p->n), row_threads(w.cols, 4, p->n), 0, embed_kernel<W>,
                  p->c->x, (const W *)w.data, w.scale, (const row_info *)p->c->rows, w.cols, w.ld);
}
static qwen3_result embed(const pass *p) {
    const matrix &w = p->c->m->embed;
    if (w.n_parts > 0) {
        const block_decoded out = {NULL, 1, p->c->x, p->c->rows, NULL, 0};
        return launched(p, launch_decode(p->early, p->s, out, w.parts[0], 0, p->n, w.cols, w.ld), "embed");
    }
#define CALL(T) launch_embed<T>(p, w)
    return launched(p, BY_WEIGHT_TYPE(w, CALL), "embed");
#undef CALL
}

/* rope_table: table[pos, i] = cosine and sine of pos * freqs[i], times scale. One block a position.
   Equals qwen3i_rope_angles: the angle is a float32 product, its cosine is taken in double. */
static __global__ void rope_table_kernel(float2 *table, const float *freqs, int half, float scale) {
    for (int i = tid(); i < half; i += n_threads()) {
        const float angle = (float)blockIdx.x * freqs[i];
        table[(size_t)blockIdx.x * half + i] =
            make_float2((float)cos((double)angle) * scale, (float)sin((double)angle) * scale);
    }
}

template <int N, class T> DEVICE void load_n(float (&v)[N], const T *p) {
    if (N == 4 && sizeof(T) == 4) {
        const float4 f = *(const float4 *)(const void *)p;
        v[0] = f.x; v[N > 1 ? 1 : 0] = f.y; v[N > 2 ? 2 : 0] = f.z; v[N > 3 ? 3 : 0] = f.w;
    } else if (N == 4) {
        union { uint2 raw; T t[8 / sizeof(T)]; } u;
        u.raw = *(const uint2 *)(const void *)p;
        UNROLL for (int i = 0; i < N; i++) v[i] = to_float(u.t[i % (8 / (int)sizeof(T))]);
    } else {
        UNROLL for (int i = 0; i < N; i++) v[i] = to_float(p[i]);
    }
}
/* The first n of four, then zeros; at once where all fours lie on their boundaries. */
DEVICE void load_4(float (&v)[4], const float *p, int n, bool aligned) {
    if (aligned) load_n<4>(v, p);
    else UNROLL for (int k = 0; k < 4; k++) v[k] = k < n ? p[k] : 0.0f;
}
template <int N> DEVICE void store_n(float *p, const float (&v)[N]) {
    if (N == 4)
        *(float4 *)(void *)p = make_float4(v[0], v[N > 1 ? 1 : 0], v[N > 2 ? 2 : 0], v[N > 3 ? 3 : 0]);
    else p[0] = v[0];
}
#ifdef QWEN3_CUDA_NCCL
/* The first n of four, likewise */
DEVICE void store_4(float *p, const float (&v)[4], int n, bool aligned) {
    if (aligned) store_n(p, v);
    else UNROLL for (int k = 0; k < 4; k++) if (k < n) p[k] = v[k];
}
#endif
DEVICE void store_n(half_t *p, float (&v)[4]) {
    *(uint2 *)(void *)p = make_uint2(pack(v[0], v[1], half_t()), pack(v[2], v[3], half_t()));
}

/* Four columns of n rows: row i of `to` is row out_row of `from`, several on their way at a time. out_row
   rises and is never less than i, so it may be done in place. */
template <class O, class T>
DEVICE void gather_columns(O *to, const T *from, int ld, const row_info *outs, int n) {
    const int U = 8;
    for (int first = 0; first < n; first += U) {
        float v[U][4];
        UNROLL for (int u = 0; u < U; u++)
            if (first + u < n) load_n<4>(v[u], from + (size_t)outs[first + u].out_row * ld);
        UNROLL for (int u = 0; u < U; u++) if (first + u < n) store_n(to + (size_t)(first + u) * ld, v[u]);
    }
}

/* keep_wanted: the n rows of x [rows, ldx] and of what attention gives [rows, lda] that outs name, to their
   beginning; `to` may be `from`. A thread for each four columns of both. Exact. Equals qwen3i_keep_wanted. */
template <class O, class T>
static __global__ void keep_wanted_kernel(float *x, int ldx, O *to, const T *from, int lda,
                                          const row_info *outs, int n) {
    const int col = 4 * (block_x() * n_threads() + tid());
    wait_for_previous();
    let_next_start();
    if (col < ldx) gather_columns(x + col, (const float *)x + col, ldx, outs, n);
    else if (col - ldx < lda) gather_columns(to + (col - ldx), from + (col - ldx), lda, outs, n);
}

template <class O, class T> static cudaError_t launch_keep_wanted(const pass *p, O *to, const T *from) {
    cuda_ctx *c = p->c;
    return launch_early(p->early, p->s, grid1(ceil_div((c->embd_ld + c->q_dim) / 4, 64)), 64, 0,
                        keep_wanted_kernel<O, T>, c->x, c->embd_ld, to, from, c->q_dim,
                        (const row_info *)c->rows, p->n_outs);
}

/* n rows of an input of w, if its columns have an order */
template <class T>
static qwen3_result order_rows(const pass *p, const matrix &w, T *y, const T *x, int ld, int n) {
    return !w.order ? QWEN3_OK : launched(p, launch_order(p->s, y, x, w.order, w.cols, ld, n), "order_rows");
}
template <class T> static qwen3_result order_rows(const pass *p, const matrix &w, T *x, int ld) {
    return order_rows(p, w, x, (const T *)x, ld, p->n);
}

/* ================================================================================================
   NORM
   ================================================================================================ */
template <class T> struct vector_of { enum { N = 16 / (int)sizeof(T) }; };       /* elements in 16 bytes */

/* Sum of v over rows of `lanes` threads (8, 16 or whole warps), the same bits in each of them: by exchange
   within the warps, then once more over the warps. shared [32]. */
template <class S> DEVICE S row_sum(S v, int lanes, S *shared) {
    const int warps = lanes / 32;
    for (int o = lanes < 32 ? lanes / 2 : 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    if (warps <= 1) return v;
    if (lane_id() == 0) shared[warp_id()] = v;
    __syncthreads();
    v = lane_id() < warps ? shared[warp_id() / warps * warps + lane_id()] : 0;
    UNROLL for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}

/* What each of the `lanes` threads of a row has of it: K times the 16 bytes that lie lanes * 16 apart. */
template <class T, int K, int V = vector_of<T>::N>
DEVICE void load_row(float (&v)[K][V], const T *row, int at, int step, int width) {
    UNROLL for (int k = 0; k < K; k++)
        unpack(v[k], at + k * step < width ? *(const uint4 *)(const void *)(row + at + k * step)
                                           : make_uint4(0, 0, 0, 0), T());
}
template <int V> DEVICE void load_gains(float (&g)[V], const float *gain) {
    UNROLL for (int i = 0; i < V; i += 4) {
        const float4 f = *(const float4 *)(const void *)(gain + i);
        g[i] = f.x; g[i + 1] = f.y; g[i + 2] = f.z; g[i + 3] = f.w;
    }
}
/* The gains of as many elements: before the row, where they fit into registers beside it, as they are there
   already. */
template <int K, int V>
DEVICE void load_all_gains(float (&g)[K][V], const float *gain, int at, int step, int width) {
    UNROLL for (int k = 0; k < K; k++) if (at + k * step < width) load_gains(g[k], gain + at + k * step);
}
template <int K, int V> static constexpr __device__ bool gains_first() { return K * V <= 16; }
/* The sum of squares in pairs: where one element is far above the others, few additions round what it has
   made large. */
template <int N> DEVICE float pair_sum(const float *v) {
    if constexpr (N == 1) return v[0] * v[0];
    else return pair_sum<N / 2>(v) + pair_sum<N / 2>(v + N / 2);
}
template <int K, int V> DEVICE float sum_of_squares(const float (&v)[K][V]) {
    float sums[K];
    UNROLL for (int k = 0; k < K; k++) sums[k] = pair_sum<V>(v[k]);
    UNROLL for (int k = 1; k < K; k++) sums[0] += sums[k];
    return sums[0];
}
template <int V, class O> DEVICE void store_vector(O *p, float (&v)[V]) {
    if constexpr (sizeof(O) == 4) {
        UNROLL for (int i = 0; i < V; i += 4)
            *(float4 *)(void *)(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else
        *(uint4 *)(void *)p = make_uint4(pack(v[0], v[1], O()), pack(v[2], v[3], O()), pack(v[4], v[5], O()),
                                         pack(v[6], v[7], O()));
}

/* What threads add up for a row of results of this type: float32 alone shows what rounding the sums would
   do. */
template <class O> struct norm_sum { typedef float type; };
template <> struct norm_sum<float> { typedef double type; };

/* 1 / sqrt(sum / width + eps), as every norm has it; and as the sum of two floats: a step of Newton's on what
   that leaves over. */
DEVICE float rms_scale(float sum, float width, float eps) {
    return 1.0f / sqrtf(fmaf(eps, width, sum) / width);
}
template <class S> DEVICE float2 inverse_rms(S sum, float width, float eps) {
    const float high = (float)sum, all = fmaf(eps, width, high),
                lost = fmaf(eps, width, high - all) + (float)(sum - (S)high);
    const float r = rms_scale(high, width, eps), square = r * r;
    const float left = fmaf(-square, all, width) - fmaf(r, r, -square) * all - square * lost;
    return make_float2(r, fabsf(left) < width ? r * left / (2 * width) : 0.0f);
}
/* x * r * gain, rounded once if y is float32, before it is rounded to y's type otherwise. */
DEVICE float normed(float x, float2 r, float gain, const float *) {
    const float y = x * r.x;
    return fmaf(y, gain, fmaf(x, r.y, fmaf(x, r.x, -y)) * gain);
}
template <class O> DEVICE float normed(float x, float2 r, float gain, const O *) {
    return x * r.x * gain;
}

/* rmsnorm: y[row, group, :] = x[row, group, :] * gain / sqrt(mean square + eps), float32 throughout, one
   rounding to y. x, y: rows ldx and ldy apart, each of gridDim.y groups of `width`; y may be x; gain [width];
   with pad, y[row, width .. pad) = 0. outs: NULL, or row i is made from row out_row of x. `lanes` threads
   work on a row, which they hold in registers (K vectors each), a block on as many rows as it has threads
   for. All 16-byte aligned. Equals qwen3i_rmsnorm; with groups = heads its per-head form. */
template <class O, class T, int K>
static __global__ void __launch_bounds__(norm_threads(K))
    rmsnorm_kernel(O *y, int ldy, const T *x, int ldx, const row_info *outs, const float *gain, int rows,
                   int width, int pad, float eps, int lanes) {
    const int V = vector_of<T>::N;
    typedef typename norm_sum<O>::type S;
    __shared__ S shared[32];
    const int at = tid() % lanes * V, step = lanes * V,
              slot = block_x() * (n_threads() / lanes) + tid() / lanes;
    const bool mine = slot < rows;
    float v[K][V], g[K][V];
    if (gains_first<K, V>()) load_all_gains<K>(g, gain, at, step, width);
    wait_for_previous();
    let_next_start();
    const size_t row = outs && mine ? (size_t)outs[slot].out_row : (size_t)slot,
                 group = (size_t)blockIdx.y * width;
    load_row<T, K>(v, x + (mine ? row * ldx + group : 0), at, step, width);
    const float2 r = inverse_rms(row_sum((S)sum_of_squares(v), lanes, shared), (float)width, eps);
    if (!mine) return;
    O *out = y + (size_t)slot * ldy + group;
    UNROLL for (int k = 0; k < K; k++) {
        if (at + k * step >= width) break;
        if (!gains_first<K, V>()) load_gains(g[k], gain + at + k * step);
        UNROLL for (int i = 0; i < V; i++) v[k][i] = normed(v[k][i], r, g[k][i], y);
        store_vector(out + at + k * step, v[k]);
    }
    for (int i = width + tid() % lanes; i < pad; i += lanes) store(out + i, 0.0f);
}

/* The same for any width and alignment, one element at a time. Grid (rows, groups). */
template <class O, class T>
static __global__ void __launch_bounds__(1024)
    rmsnorm_any_kernel(O *y, int ldy, const T *x, int ldx, const row_info *outs, const float *gain, int width,
                       int pad, float eps) {
    __shared__ float shared[32];
    wait_for_previous();
    let_next_start();
    const size_t row = outs ? (size_t)outs[blockIdx.x].out_row : blockIdx.x,
                 group = (size_t)blockIdx.y * width;
    const T *in = x + row * ldx + group;
    O *out = y + (size_t)blockIdx.x * ldy + group;
    float sum = 0;
    for (int i = tid(); i < width; i += n_threads()) sum += to_float(in[i]) * to_float(in[i]);
    const float2 r = inverse_rms(block_sum(sum, shared), (float)width, eps);
    for (int i = tid(); i < width; i += n_threads()) store(out + i, normed(to_float(in[i]), r, gain[i], y));
    for (int i = width + tid(); i < pad; i += n_threads()) store(out + i, 0.0f);
}

/* How rows of so many vectors of 16 bytes are normed: `lanes` threads a row with k vectors each, `together`
   rows a block; k 0: one element at a time. Few rows want one short pass, many want several loads in flight
   and full blocks; what suits the widths of the models was found by tools/sweep_rmsnorm.py. */
struct norm_shape { int k, lanes, together; };

static norm_shape rmsnorm_shape(int vectors, bool halves, long long rows) {
    norm_shape s = {rows <= 512 ? 1 : halves ? 2 : 4, 0, 1};
    const int most_lanes = rows <= 64 ? 512 : rows > 512 && halves ? 256 : 320;
    while (s.k < 8 && ceil_div(vectors, s.k) > (rows <= 64 && s.k == 2 ? 640 : most_lanes)) s.k *= 2;
    s.lanes = ceil_div(vectors, s.k);
    s.lanes = s.lanes <= 8 ? 8 : s.lanes <= 16 ? 16 : round_up(s.lanes, 32);
    if (rows > 512 && s.lanes < 64) s.together = 256 / s.lanes;
    if (s.lanes < 32) s.together = most(s.together, 32 / s.lanes);
    if (s.lanes > norm_threads(s.k)) s.k = 0;
    return s;
}

template <class O, class T, int K>
static cudaError_t launch_rmsnorm_shape(bool early, cudaStream_t s, norm_shape shape, O *y, int ldy,
                                        const T *x, int ldx, const row_info *outs, const float *gain,
                                        int rows, int groups, int width, int pad, float eps) {
    return launch_early(early, s, grid2(ceil_div(rows, shape.together), groups), shape.lanes * shape.together,
                        0, rmsnorm_kernel<O, T, K>, y, ldy, x, ldx, outs, gain, rows, width, pad, eps,
                        shape.lanes);
}

template <class O, class T>
static cudaError_t launch_rmsnorm(bool early, cudaStream_t s, O *y, int ldy, const T *x, int ldx,
                                  const row_info *outs, const float *gain, int rows, int groups, int width,
                                  int pad, float eps) {
    const int v = vector_of<T>::N;
    const bool aligned = width % v == 0 && ldx % v == 0 && ldy % v == 0 && (size_t)x % 16 == 0 &&
                         (size_t)y % 16 == 0 && (size_t)gain % 16 == 0;
    const norm_shape shape = rmsnorm_shape(ceil_div(width, v), sizeof(T) == 2, (long long)rows * groups);
#define QWEN3_SHAPE(K) \
    case K: return launch_rmsnorm_shape<O, T, K>(early, s, shape, y, ldy, x, ldx, outs, gain, rows, groups, \
                                                 width, pad, eps)
    switch (aligned ? shape.k : 0) { QWEN3_SHAPE(1); QWEN3_SHAPE(2); QWEN3_SHAPE(4); QWEN3_SHAPE(8); }
#undef QWEN3_SHAPE
    return launch_early(early, s, grid2(rows, groups), row_threads(width, 1, rows), 0,
                        rmsnorm_any_kernel<O, T>, y, ldy, x, ldx, outs, gain, width, pad, eps);
}

/* h = RMSNorm(x), float32 rows */
static qwen3_result vector_norm(const pass *p, const float *gain, const matrix &, input *h) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    *h = {c->h, c->embd_ld, NULL, NULL};
    return launched(p,
                    launch_rmsnorm(p->early, p->s, c->h, c->embd_ld, p->x, c->embd_ld, NULL, gain, p->n, 1,
                                   g->n_embd, c->embd_ld, g->rms_eps),
                    "rmsnorm");
}

/* ---- the input of a product with many rows ---- */
/* The input of a matrix product with many rows: float32, or F16 with row r standing for data * scale[r]. With
   rest not 0 what the rounding lost goes that many elements further: the sum of both has 22 bits. */
DEVICE void store_input(float *p, float v, float, size_t) { *p = v; }
DEVICE void store_input(half_t *p, float v, float up, size_t rest) {
    const float scaled = v * up;
    const half_t high = __float2half_rn(scaled);
    *p = high;
    if (rest) p[rest] = __float2half_rn(scaled - __half2float(high));
}

/* round_rows: the input of a product from float32 rows. in [rows, ld_in], out [rows, ld], zero from width on;
   out_scale NULL: F16 as it is. One block a row. */
template <class O>
static __global__ void round_rows_kernel(O *out, float *out_scale, const float *in, int ld_in, int width,
                                         int ld, size_t rest) {
    __shared__ float shared[32];
    const float *from = in + (size_t)blockIdx.x * ld_in;
    float top = 0, up = 1;
    wait_for_previous();
    let_next_start();
    if (sizeof(O) == 2 && out_scale) {
        for (int i = tid(); i < width; i += n_threads()) top = fmaxf(top, fabsf(from[i]));
        up = half_scale(block_max(top, shared));
        if (threadIdx.x == 0) out_scale[blockIdx.x] = 1.0f / up;
    }
    for (int i = tid(); i < ld; i += n_threads())
        store_input(&out[(size_t)blockIdx.x * ld + i], i < width ? from[i] : 0.0f, up, rest);
}

/* Input of a product with W: float32 rows to c->act in W's type. */
template <class O>
static cudaError_t launch_round_rows(const pass *p, const matrix &w, const float *in, int ld_in, int n) {
    return launch(p->s, grid1(n), row_threads(w.ld, 4, n), 0, round_rows_kernel<O>,
                  (O *)p->c->act, p->c->act_scale, in, ld_in, w.cols, w.ld, rest_of(w, n));
}
static qwen3_result round_rows(const pass *p, const matrix &w, const float *in, int ld_in, int n) {
#define CALL(T) launch_round_rows<T>(p, w, in, ld_in, n)
    return launched(p, BY_WEIGHT_TYPE(w, CALL), "round_rows");
#undef CALL
}

static const float *act_scale(const pass *p, const matrix &w) {
    return w.type == QWEN3I_F32 ? NULL : p->c->act_scale;
}

/* ---- on Hopper: normed and rounded in one kernel ---- */
/* What ff_scale is for the norm of a row of h. */
DEVICE float ff_scale_of(float norm, const float *bounds) {
    return 1.0f / half_scale(norm * bounds[0] * (norm * bounds[1]));
}

/* What a row's norm is made of: the squares of x, of x * gain, and the largest of the latter. */
struct row_sums { float x, gained; float top; };

/* This thread's part of it, and its elements times their gains, which are in g if they were loaded FIRST. */
template <bool FIRST, int K>
DEVICE row_sums times_gains(float (&v)[K][4], float (&g)[K][4], const float *gain, int at, int step,
                            int width) {
    row_sums s = {sum_of_squares(v), 0, 0};
    UNROLL for (int k = 0; k < K; k++) {
        if (!FIRST && at + k * step < width) load_gains(g[k], gain + at + k * step);
        UNROLL for (int i = 0; i < 4; i++) {
            v[k][i] = at + k * step < width ? v[k][i] * g[k][i] : 0.0f;
            s.top = fmaxf(s.top, fabsf(v[k][i]));
        }
    }
    s.gained = sum_of_squares(v);
    return s;
}
DEVICE row_sums warp_sums(const row_sums &s) {
    const row_sums all = {warp_sum(s.x), warp_sum(s.gained), warp_max(s.top)};
    return all;
}

/* How a row of inputs of a product is kept: h = x * gain * times, and times up, a power of two, in F16. */
struct row_scale { float times, up, ff; };

DEVICE row_scale scale_row(const row_sums &s, int width, float eps, const float *bounds) {
    const float r = rms_scale(s.x, (float)width, eps);
    const row_scale scale = {r, half_scale(s.top * r),
                             bounds ? ff_scale_of(sqrtf(s.gained) * r, bounds) : 1.0f};
    return scale;
}
DEVICE void store_row(half_t *to, const float (&v)[4], const row_scale &s) {
    float h[4];
    UNROLL for (int i = 0; i < 4; i++) h[i] = v[i] * s.times * s.up;
    store_n(to, h);
}

/* Where products norm up to 8 rows themselves, a warp has one: a lane so many times four elements. */
const int SKINNY_VECTORS = 8;
const int SKINNY_WIDTH   = SKINNY_VECTORS * 4 * 32;

/* What a norm reads, and the row scales that its product leaves to the one after it. */
struct norm_args { const float *x; int ldx; const float *gain, *bounds; float eps; float *ff_scale; };

/* hopper_norm: out[row, :] = rmsnorm(x[row, :]) / scale[row], rounded once to F16; scale is a power of two.
   With bounds, the largest norms of a row of W gate and of W up, also a power of two, ff_scale[row], with
   which the products silu(gate) * up fit F16: |gate| <= |row of W gate| |h|. `lanes` threads (whole warps)
   work on a row, which they hold in registers (K vectors of four each), a block on as many rows as it has
   threads for; width a multiple of 4. Order as rmsnorm. Equals qwen3i_rmsnorm, and one rounding. */
template <int K>
static __global__ void __launch_bounds__(norm_threads(K))
    hopper_norm_kernel(half_t *out, float *scale, norm_args a, int rows, int width, int lanes) {
    __shared__ row_sums sums[32];
    const int at = 4 * (tid() % lanes), step = 4 * lanes,
              row = block_x() * (n_threads() / lanes) + tid() / lanes;
    float v[K][4], g[K][4];
    /* the next one's weights come while the one before this still works */
    let_next_start();
    if (gains_first<K, 4>()) load_all_gains<K>(g, a.gain, at, step, width);
    wait_for_previous();
    load_row<float, K>(v, a.x + (size_t)(row < rows ? row : 0) * a.ldx, at, step, width);
    row_sums s = warp_sums(times_gains<gains_first<K, 4>()>(v, g, a.gain, at, step, width));
    if (lanes > 32) {
        const int warps = lanes / 32;
        if (lane_id() == 0) sums[warp_id()] = s;
        s.x = s.gained = s.top = 0;
        __syncthreads();
        if (lane_id() < warps) s = sums[warp_id() / warps * warps + lane_id()];
        s = warp_sums(s);
    }
    if (row >= rows) return;
    const row_scale h = scale_row(s, width, a.eps, a.bounds);
    if (at == 0) {
        scale[row] = 1.0f / h.up;
        if (a.bounds) a.ff_scale[row] = h.ff;
    }
    UNROLL for (int k = 0; k < K; k++)
        if (at + k * step < width) store_row(out + (size_t)row * width + at + k * step, v[k], h);
}

static norm_args norm_arguments(const pass *p, const float *gain, const matrix &w) {
    const norm_args a = {p->x, p->c->embd_ld, gain, w.bounds, p->c->m->config.rms_eps, p->c->ff_scale};
    return a;
}

static cudaError_t launch_hopper_norm(const pass *p, const norm_args &a) {
    const cuda_ctx *c = p->c;
    const int width = c->m->config.n_embd;
    norm_shape s = rmsnorm_shape(width / 4, false, p->n);
    s.lanes = round_up(s.lanes, 32);
    /* in the order of products that norm their input */
    if (c->desc.invariant && p->n <= SAME_ROWS && width <= SKINNY_WIDTH) s = {SKINNY_VECTORS, 32, 1};
    s.together = p->n > 512 && s.lanes == 32 ? 8 : 1;
#define QWEN3_SHAPE(K) \
    case K: \
        return launch_early(p->early, p->s, grid1(ceil_div(p->n, s.together)), s.lanes * s.together, 0, \
                            hopper_norm_kernel<K>, c->hopper_act, c->act_scale, a, p->n, width, s.lanes)
    switch (s.k) { QWEN3_SHAPE(1); QWEN3_SHAPE(2); QWEN3_SHAPE(4); QWEN3_SHAPE(8); }
#undef QWEN3_SHAPE
    return cudaErrorInvalidValue;       /* no model that goes this way has such rows */
}

/* ================================================================================================
   PRODUCT: y = W x and x = x + W y
   ================================================================================================ */
/* A product to be: y[rows, n] (rows ldy apart) = scale x[rows, k] W[n, k]^T + beta y; x and W of one type. */
struct product_shape { int n, rows, k, ldy, aligned; qwen3i_type type; };

#ifndef QWEN3_CUDA_NO_CUBLASLT
/* ---- by cuBLASLt: a plan for each shape, made once ---- */
#define LT_TRY(call) do { const cublasStatus_t s_ = (call); if (s_ != CUBLAS_STATUS_SUCCESS) \
    return qwen3i_fail(err, QWEN3_ERR_DEVICE, "cuBLASLt: %s: status %d", #call, (int)s_); } while (0)
const int N_PLANS = 256;

struct plan {                           /* one shape of product, and how cuBLASLt does it best */
    product_shape          shape;
    cublasLtMatmulDesc_t   op;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t   algo;
};

static void destroy_plan(plan *p) {
    if (p->op) cublasLtMatmulDescDestroy(p->op);
    if (p->w) cublasLtMatrixLayoutDestroy(p->w);
    if (p->x) cublasLtMatrixLayoutDestroy(p->x);
    if (p->y) cublasLtMatrixLayoutDestroy(p->y);
    memset(p, 0, sizeof *p);
}

static qwen3_result describe_plan(plan *p, const qwen3i_err *err) {
    const product_shape &a = p->shape;
    const cudaDataType_t in = a.type == QWEN3I_F32 ? CUDA_R_32F : CUDA_R_16F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    LT_TRY(cublasLtMatmulDescCreate(
        &p->op, a.type == QWEN3I_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT_TRY(
        cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->w, in, (uint64_t)a.k, (uint64_t)a.n, a.k));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->x, in, (uint64_t)a.k, (uint64_t)a.rows, a.k));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->y, CUDA_R_32F, (uint64_t)a.n, (uint64_t)a.rows, a.ldy));
    return QWEN3_OK;
}

/* The fastest algorithm by cuBLASLt's own estimate, among those whose sums have a fixed order. */
static qwen3_result choose_algorithm(const cuda_ctx *c, plan *p, const qwen3i_err *err) {
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found[1];
    const uint64_t workspace = c->workspace_size;
    const uint32_t align_in = 16, align_out = p->shape.aligned ? 16 : 4,
                   reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int n = 0;
    LT_TRY(cublasLtMatmulPreferenceCreate(&wish));
    cublasStatus_t s = CUBLAS_STATUS_SUCCESS;
#define WISH(what, value) if (s == CUBLAS_STATUS_SUCCESS) \
        s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_##what, &value, sizeof value)
    WISH(MAX_WORKSPACE_BYTES, workspace);
    WISH(REDUCTION_SCHEME_MASK, reduction);
    WISH(MIN_ALIGNMENT_A_BYTES, align_in);
    WISH(MIN_ALIGNMENT_B_BYTES, align_in);
    WISH(MIN_ALIGNMENT_C_BYTES, align_out);
    WISH(MIN_ALIGNMENT_D_BYTES, align_out);
#undef WISH
    if (s == CUBLAS_STATUS_SUCCESS)
        s = cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)c->lt, p->op, p->w, p->x, p->y, p->y, wish, 1,
                                           found, &n);
    cublasLtMatmulPreferenceDestroy(wish);
    if (s != CUBLAS_STATUS_SUCCESS || n == 0)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE,
                           "cuBLASLt has no algorithm for [%d, %d] times [%d, %d] (status %d)", p->shape.rows,
                           p->shape.k, p->shape.k, p->shape.n, (int)s);
    p->algo = found[0].algo;
    return QWEN3_OK;
}

static qwen3_result find_plan(cuda_ctx *c, const product_shape &want, plan **out, const qwen3i_err *err) {
    for (int i = 0; i < N_PLANS; i++) {
        plan *p = &c->plans[i];
        if (p->op && memcmp(&p->shape, &want, sizeof want) == 0) { *out = p; return QWEN3_OK; }
    }
    plan *p = &c->plans[c->next_plan];
    c->next_plan = (c->next_plan + 1) % N_PLANS;
    destroy_plan(p);
    p->shape = want;
    qwen3_result r = describe_plan(p, err);
    if (r == QWEN3_OK) r = choose_algorithm(c, p, err);
    if (r != QWEN3_OK) destroy_plan(p);
    *out = p;
    return r;
}

static void lay_out_plans(cuda_ctx *c, arena *a) { c->plans = a->take<plan>((size_t)N_PLANS); }

static qwen3_result begin_products(cuda_ctx *c, const qwen3i_err *err) {
    LT_TRY(cublasLtCreate((cublasLtHandle_t *)&c->lt));
    return QWEN3_OK;
}

static void forget_plans(cuda_ctx *c) {
    for (int i = 0; c->plans && i < N_PLANS; i++) destroy_plan(&c->plans[i]);
}

static void end_products(cuda_ctx *c) {
    forget_plans(c);
    if (c->lt) cublasLtDestroy((cublasLtHandle_t)c->lt);
}

static qwen3_result multiply_matrices(cuda_ctx *c, cudaStream_t s, float *y, const product_shape &a,
                                      float scale, const void *w, const void *x, float beta,
                                      const qwen3i_err *err) {
    plan *p = NULL;
    TRY(find_plan(c, a, &p, err));
    LT_TRY(cublasLtMatmul((cublasLtHandle_t)c->lt, p->op, &scale, w, p->w, x, p->x, &beta, y, p->y, y, p->y,
                          &p->algo, c->workspace, c->workspace_size, s));
    return QWEN3_OK;
}
#else
/* ---- by a kernel of our own ---- */
const int OWN_N = 128, OWN_K = 32;      /* rows of W in a block; columns at a time */
const int OWN_LD = OWN_K + 8;           /* of a row in shared memory: eight of them lie in different banks */

/* own_product: y[rows, n] = scale x[rows, k] W[n, k]^T + beta y in F16; k is a multiple of 8. A block of 8
   warps has 32 ROW_WARPS rows of x and OWN_N of W; a warp has 32 of the rows. Sums in order of k, 16 columns
   at a time. The product of qwen3i_matmul with rounded inputs. */
template <int ROW_WARPS>
static __global__ void __launch_bounds__(256)
    own_product_kernel(float *y, product_shape a, float scale, float beta, const half_t *w, const half_t *x) {
    constexpr int ROWS = 32 * ROW_WARPS, COLS = OWN_N * ROW_WARPS / 8, CHUNKS = OWN_K / 8;
    __shared__ __align__(16) half_t xs[2][ROWS * OWN_LD], ws[2][OWN_N * OWN_LD];
    const int lane = lane_id(), row0 = blockIdx.y * ROWS, col0 = blockIdx.x * OWN_N;
    const int my_row = warp_id() % ROW_WARPS * 32, my_col = warp_id() / ROW_WARPS * COLS;
    float sum[2][COLS / 8][4] = {};
    auto fetch = [&](int stage, int k0) {
        for (int i = tid(); i < (ROWS + OWN_N) * CHUNKS; i += 256) {
            const int r = i / CHUNKS, at = i % CHUNKS * 8, k = k0 + at, of_w = r >= ROWS;
            const int row = of_w ? col0 + r - ROWS : row0 + r;
            const bool valid = k < a.k && row < (of_w ? a.n : a.rows);
            half_t *to = of_w ? &ws[stage][(r - ROWS) * OWN_LD + at] : &xs[stage][r * OWN_LD + at];
            copy_async(to, (of_w ? w : x) + (valid ? (size_t)row * a.k + k : 0), valid);
        }
        copy_commit();
    };
    fetch(0, 0);
    for (int k0 = 0, stage = 0; k0 < a.k; k0 += OWN_K, stage ^= 1) {
        if (k0 + OWN_K < a.k) { fetch(stage ^ 1, k0 + OWN_K); copy_wait<1>(); } else copy_wait<0>();
        __syncthreads();
        UNROLL for (int k = 0; k < OWN_K; k += 16) {
            unsigned xf[2][4];
            UNROLL for (int t = 0; t < 2; t++)
                load_matrices(xf[t], &xs[stage][(my_row + 16 * t + lane % 16) * OWN_LD + k + lane / 16 * 8]);
            UNROLL for (int c = 0; c < COLS / 16; c++) {
                unsigned wf[4];
                load_matrices(wf, &ws[stage][(my_col + 16 * c + lane / 16 * 8 + lane % 8) * OWN_LD + k +
                                             lane / 8 % 2 * 8]);
                UNROLL for (int t = 0; t < 2; t++) {
                    multiply(sum[t][2 * c], xf[t], wf[0], wf[1], half_t());
                    multiply(sum[t][2 * c + 1], xf[t], wf[2], wf[3], half_t());
                }
            }
        }
        __syncthreads();
    }
    UNROLL for (int t = 0; t < 2; t++) UNROLL for (int c = 0; c < COLS / 8; c++)
    UNROLL for (int i = 0; i < 4; i++) {
        const int row = row0 + my_row + 16 * t + lane / 4 + i / 2 * 8,
                  col = col0 + my_col + 8 * c + lane % 4 * 2 + i % 2;
        if (row >= a.rows || col >= a.n) continue;
        float *to = &y[(size_t)row * a.ldy + col];
        *to = scale * sum[t][c][i] + (beta != 0 ? beta * *to : 0);
    }
}

/* The same in float32: 64 rows of x by 64 of W in a block of 256 threads, 4 by 4 in each; sums in order
   of k. */
static __global__ void __launch_bounds__(256)
    own_product_f32_kernel(float *y, product_shape a, float scale, float beta, const float *w,
                           const float *x) {
    constexpr int TILE = 64, K = 16;
    __shared__ float xs[K][TILE + 1], ws[K][TILE + 1];
    const int row0 = blockIdx.y * TILE, col0 = blockIdx.x * TILE, r = tid() / 16, c = tid() % 16;
    float sum[4][4] = {};
    for (int k0 = 0; k0 < a.k; k0 += K) {
        for (int i = tid(); i < TILE * K; i += 256) {
            const int at = i / K, k = k0 + i % K;
            xs[i % K][at] = k < a.k && row0 + at < a.rows ? x[(size_t)(row0 + at) * a.k + k] : 0;
            ws[i % K][at] = k < a.k && col0 + at < a.n ? w[(size_t)(col0 + at) * a.k + k] : 0;
        }
        __syncthreads();
        for (int k = 0; k < K; k++)
            UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++)
                sum[i][j] = fmaf(xs[k][r + 16 * i], ws[k][c + 16 * j], sum[i][j]);
        __syncthreads();
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++) {
        const int row = row0 + r + 16 * i, col = col0 + c + 16 * j;
        if (row >= a.rows || col >= a.n) continue;
        float *to = &y[(size_t)row * a.ldy + col];
        *to = scale * sum[i][j] + (beta != 0 ? beta * *to : 0);
    }
}

static void lay_out_plans(cuda_ctx *, arena *) {}
static void forget_plans(cuda_ctx *) {}
static qwen3_result begin_products(cuda_ctx *, const qwen3i_err *) { return QWEN3_OK; }
static void end_products(cuda_ctx *c) { forget_plans(c); }

static qwen3_result multiply_matrices(cuda_ctx *, cudaStream_t s, float *y, const product_shape &a,
                                      float scale, const void *w, const void *x, float beta,
                                      const qwen3i_err *err) {
    const int row_warps = a.rows <= 32 ? 1 : 4;
    const dim3 grid = grid2(ceil_div(a.n, OWN_N), ceil_div(a.rows, 32 * row_warps));
    cudaError_t e;
    if (a.type == QWEN3I_F32)
        e = launch(s, grid2(ceil_div(a.n, 64), ceil_div(a.rows, 64)), 256, 0, own_product_f32_kernel, y, a,
                   scale, beta, (const float *)w, (const float *)x);
    else
        e = launch(s, grid, 256, 0, row_warps == 1 ? own_product_kernel<1> : own_product_kernel<4>, y, a,
                   scale, beta, (const half_t *)w, (const half_t *)x);
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(err, e, "a product");
}
#endif

static qwen3_result product(cuda_ctx *c, cudaStream_t s, float *y, int ldy, const matrix &w, int first, int n,
                            const void *x, int rows, const qwen3i_err *err);

/* The same for a matrix in blocks, which become F16 as many rows at a time as the scratch holds. */
static qwen3_result block_product(cuda_ctx *c, cudaStream_t s, float *y, int ldy, const matrix &w, int first,
                                  int n, const void *x, int rows, const qwen3i_err *err) {
    matrix part = w;
    part.n_parts = 0;
    part.data = c->scratch;
    const int step = (int)least((size_t)n, c->scratch_size / ((size_t)w.ld * sizeof(half_t)));
    for (int i = 0; i < n; i += step) {
        part.rows = least(step, n - i);
        TRY(decode_rows(c->scratch, c->m->capability >= 90, s, w, first + i, part.rows, err));
        TRY(product(c, s, y + i, ldy, part, 0, part.rows, x, rows, err));
    }
    return QWEN3_OK;
}

/* y[rows, n] (rows ldy apart) = x[rows, w.ld] W^T for rows [first, first + n) of W; x of W's type. */
static qwen3_result product(cuda_ctx *c, cudaStream_t s, float *y, int ldy, const matrix &w, int first, int n,
                            const void *x, int rows, const qwen3i_err *err) {
    product_shape a;
    if (w.n_parts > 0) return block_product(c, s, y, ldy, w, first, n, x, rows, err);
    memset(&a, 0, sizeof a);
    a.n = n; a.rows = rows; a.k = w.ld; a.ldy = ldy; a.type = w.type;
    a.aligned = (size_t)y % 16 == 0 && ldy % 4 == 0;
    const char *data = (const char *)w.data + (size_t)first * w.ld * qwen3i_type_size(w.type);
    for (int term = w.terms - 1; term >= 0; term--) {           /* the small one first */
        const char *in = (const char *)x + (size_t)term * rest_of(w, rows) * qwen3i_type_size(w.type);
        TRY(multiply_matrices(c, s, y, a, w.scale, data, in, term == w.terms - 1 ? 0.0f : 1.0f, err));
    }
    return QWEN3_OK;
}

/* y = W act, without the rows' scales */
static qwen3_result act_product(const pass *p, float *y, int ldy, const matrix &w, int first, int n) {
    return product(p->c, p->s, y, ldy, w, first, n, p->c->act, p->n, p->err);
}

/* add_rows: x[row, :] += add[row, :] * scale[row] (scale NULL: 1). One block a row: the sum of
   qwen3i_matmul_add. */
static __global__ void add_rows_kernel(float *x, const float *add, const float *scale, int width, int ld) {
    const size_t base = (size_t)blockIdx.x * ld;
    const float s = scale ? scale[blockIdx.x] : 1.0f;
    for (int i = tid(); i < width; i += n_threads()) x[base + i] += add[base + i] * s;
}

/* scale_rows: x[row, 0 .. width) *= scale[row], after a product of scaled rows. One block a row. */
static __global__ void scale_rows_kernel(float *x, const float *scale, int width, int ld) {
    const float s = scale[blockIdx.x];
    for (int i = tid(); i < width; i += n_threads()) x[(size_t)blockIdx.x * ld + i] *= s;
}

/* x += W act */
static qwen3_result product_add(const pass *p, const matrix &w) {
    cuda_ctx *c = p->c;
    TRY(act_product(p, c->tmp, c->embd_ld, w, 0, w.rows));
    RUN(grid1(p->n), row_threads(c->embd_ld, 4, p->n), 0, add_rows_kernel, c->sum, (const float *)c->tmp,
        act_scale(p, w), c->m->config.n_embd, c->embd_ld);
    return QWEN3_OK;
}

/* ---- 1 to 8 rows: weights in registers ---- */
struct matvec_in {
    const void  *w;                     /* [n, ldw], rows 16-byte aligned, zero from k to ldw */
    float        scale;                 /* W = w * scale */
    int          n, k, ldw;
    const float *x;                     /* [rows, ldx] */
    int          rows, ldx;
    const float *gain;                  /* [k]: x is to be normalised first (one row only); NULL: it is */
    float        eps;
    bool         fits_cache;            /* W is small enough for the L2 */
    bool         ask;                   /* one row: the L2 is asked for what follows the ring, too */
};

/* k .. k + 3 of n floats, zero past the end */
DEVICE float4 load_up_to_4(const float *p, int k, int n) {
    float4 v = make_float4(0, 0, 0, 0);
    if (k + 4 <= n) return *(const float4 *)(const void *)(p + k);
    if (k < n) v.x = p[k];
    if (k + 1 < n) v.y = p[k + 1];
    if (k + 2 < n) v.z = p[k + 2];
    return v;
}

/* x for k in [k0, k0 + n) to shared memory, zero past in.k and past the rows. Groups of V are kept as V / 4
   planes of float4, so that the lanes of a warp read neighbouring 16 bytes. */
template <int V, int R, int TILE> DEVICE void stage_x(float4 *xs, const matvec_in &in, int k0, int n) {
    for (int r = 0; r < R; r++)
        for (int q = tid(); q < n / 4; q += n_threads())
            xs[r * (TILE / 4) + q % (V / 4) * (TILE / V) + q / (V / 4)] =
                r < in.rows ? load_up_to_4(in.x + (size_t)r * in.ldx, k0 + 4 * q, in.k) :
                              make_float4(0, 0, 0, 0);
}

/* acc[j][r] = sum over k of W[rows[j]][k] x[r][k], in every lane of the warp; nothing for a row of -1. The
   first weights are asked for before anything of x is read. Order: lane l takes elements V l .. V l + V - 1
   of each 32 V, lanes are added by exchange: it depends on k alone. */
template <class W, int R, int NR>
DEVICE void dot_rows(float (&acc)[NR][R], const int (&rows)[NR], const matvec_in &in, float4 *xs) {
    const int V = 16 / (int)sizeof(W), U = NR > 4 ? 1 : 8 / NR, BATCH = U * 32 * V, TILE = MATVEC_TILE / R;
    static_assert(TILE % BATCH == 0, "a batch of loads stays within a tile of x");
    const int lane = lane_id();
    const W *w = (const W *)in.w;
    uint4 next[U][NR], now[U][NR];
#define QWEN3_LOAD(k0) \
    do { \
        UNROLL for (int u = 0; u < U; u++) UNROLL for (int j = 0; j < NR; j++) { \
            const int at = (k0) + (u * 32 + lane) * V; \
            next[u][j] = at < in.ldw && rows[j] >= 0 ? load_stream(w + (size_t)rows[j] * in.ldw + at) \
                                                     : make_uint4(0, 0, 0, 0); \
        } \
    } while (0)
    UNROLL for (int j = 0; j < NR; j++)
        UNROLL for (int r = 0; r < R; r++) acc[j][r] = 0;
    QWEN3_LOAD(0);
    if (in.fits_cache)          /* ... and the rest brought to the L2 */
        for (int k = BATCH + lane * (128 / (int)sizeof(W)); k < in.ldw; k += 32 * (128 / (int)sizeof(W)))
            UNROLL for (int j = 0; j < NR; j++) if (rows[j] >= 0) prefetch(w + (size_t)rows[j] * in.ldw + k);
    wait_for_previous();
    for (int tile = 0; tile < in.k; tile += TILE) {
        const int left = in.k - tile, n = left < TILE ? round_up(left, BATCH) : TILE;
        __syncthreads();
        stage_x<V, R, TILE>(xs, in, tile, n);
        __syncthreads();
        const int end = left < TILE ? in.k : tile + TILE;
        for (int k = tile; k < end; k += BATCH) {
            UNROLL for (int u = 0; u < U; u++)
                UNROLL for (int j = 0; j < NR; j++) now[u][j] = next[u][j];
            if (k + BATCH < in.k) QWEN3_LOAD(k + BATCH);
            UNROLL for (int u = 0; u < U; u++) {
                const int at = (k - tile) / V + u * 32 + lane;
                float f[NR][V];
                UNROLL for (int j = 0; j < NR; j++) unpack(f[j], now[u][j], W());
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int p = 0; p < V / 4; p++) {
                        const float4 x = xs[r * (TILE / 4) + p * (TILE / V) + at];
                        UNROLL for (int j = 0; j < NR; j++) {
                            acc[j][r] += f[j][4 * p] * x.x;
                            acc[j][r] += f[j][4 * p + 1] * x.y;
                            acc[j][r] += f[j][4 * p + 2] * x.z;
                            acc[j][r] += f[j][4 * p + 3] * x.w;
                        }
                    }
            }
        }
    }
#undef QWEN3_LOAD
    let_next_start();
    UNROLL for (int j = 0; j < NR; j++)
        UNROLL for (int r = 0; r < R; r++) acc[j][r] = warp_sum(acc[j][r]) * in.scale;
}

/* n rows of W are shared evenly by the warps of the grid: where the share of a warp begins. */
DEVICE int share_begin(int warp, int n) {
    return (int)((long long)warp * n / ((int)gridDim.x * MATVEC_WARPS));
}

static matvec_in vector_input(const pass *p, const matrix &w, const input &h, int rows) {
    matvec_in in;
    in.w = w.data; in.scale = w.scale; in.n = w.rows; in.k = w.cols; in.ldw = w.ld;
    in.x = h.x; in.rows = rows; in.ldx = h.ldx;
    in.gain = h.gain; in.eps = p->c->m->config.rms_eps;
    in.fits_cache = (size_t)w.rows * w.ld * qwen3i_type_size(w.type) <= p->c->m->cache_bytes / 4;
    in.ask = false;
    return in;
}

/* Blocks for n rows of W whose warps take at most `each`: they fill the chip once, or a whole number of
   times. */
static int matvec_blocks(const pass *p, int n, int each) {
    const int fill = p->c->m->n_sm, times = ceil_div(ceil_div(n, fill * MATVEC_WARPS), each);
    return least(fill * times, ceil_div(n, MATVEC_WARPS));
}

/* ---- one row: its weights are on their way to shared memory before it exists ---- */
/* Each lane copies for itself what it will multiply, `depth` stages of NR rows times U vectors of 16 bytes
   ahead, so there is nothing to wait for together; `RING` vectors a lane in all. The copies begin before
   wait_for_previous(): with one block a multiprocessor, and two kernels' blocks side by side, a matrix of a
   small model is there as a whole when its input comes, and for a large one the stream of weights hardly
   stops between kernels. */
const int STREAM_RING  = 24, STREAM_RING_SHORT = 16;    /* the short one where x itself takes much */
const int STREAM_HEADS = 32 * MATVEC_WARPS;     /* finished at a time */
/* vectors of 4 that a thread holds of a row that is to be normalised */
const int STREAM_NORM  = 8;

/* What else is to see each vector of x that is multiplied, or each tile of it: nothing. */
struct see_nothing {
    template <class... A> __device__ void operator()(A...) const {}
};

template <int NR, int RING> struct stream_shape {
    enum { U = NR < 4 ? 4 / NR : 1, DEPTH = RING / (NR * U) };
};

/* Rows [first, end) of W, NR at a time; PAIRS: row i and row n / 2 + i one after the other, NR / 2 of
   both. */
template <int NR, bool PAIRS, int RING> struct weight_stream {
    enum {
        V = 8,
        U = stream_shape<NR, RING>::U,
        DEPTH = stream_shape<NR, RING>::DEPTH,
        STEP = PAIRS ? NR / 2 : NR
    };
    const half_t *w;                    /* this lane's first vector */
    uint4        *ring;
    size_t        half;                 /* elements from a pair's first row to its second */
    int           ldw, end, row, column, put, take;

    __device__ __forceinline__ weight_stream(const matvec_in &in, uint4 *shared, int first, int last) {
        w = (const half_t *)in.w + lane_id() * V;
        ring = shared + warp_id() * (RING * 32) + lane_id();
        half = (size_t)(in.n / 2) * in.ldw;
        ldw = in.ldw; end = last; row = first; column = put = take = 0;
    }
    /* the next stage; nothing past the end */
    __device__ __forceinline__ void fetch() {
        uint4 *to = ring + put * (NR * U * 32);
        if (row < end)
            UNROLL for (int j = 0; j < NR; j++) {
                const int i = PAIRS ? j / 2 : j;
                const half_t *from = w + (size_t)(row + i) * ldw + (PAIRS && j % 2 ? half : 0) + column;
                UNROLL for (int u = 0; u < U; u++)
                    copy_once(to + (j * U + u) * 32, from + u * 32 * V,
                              row + i < end && column + (u * 32 + lane_id()) * V < ldw);
            }
        copy_commit();
        put = put + 1 < DEPTH ? put + 1 : 0;
        column += U * 32 * V;
        if (column >= ldw) { column = 0; row += STEP; }
    }
    __device__ __forceinline__ void begin() {
        NO_UNROLL for (int i = 0; i < DEPTH - 1; i++) fetch();
    }
    /* What is left of the rows in the ring, or else the next ones, to the L2. */
    __device__ __forceinline__ void ask() const {
        const int j = lane_id(), i = row + (PAIRS ? j / 2 : j);
        if (j < NR && i < end)
            prefetch_bulk(w - j * V + (size_t)i * ldw + (PAIRS && j % 2 ? half : 0) + column,
                          (unsigned)(ldw - column) * 2);
    }
    /* acc[j] = the sum of row j of the next NR, in every lane: the vectors u, u + U, u + 2 U ... of each lane
       one after the other, then u = 0 .. U - 1, then the lanes by exchange. */
    template <class X>
    __device__ __forceinline__ void sum(float (&acc)[NR], const float4 *xs, float scale, X see) {
        const int plane = round_up(ldw, 32 * V) / V;
        float sums[NR][U];
        UNROLL for (int j = 0; j < NR; j++)
            UNROLL for (int u = 0; u < U; u++) sums[j][u] = 0;
        NO_UNROLL for (int k = 0; k < ldw; k += U * 32 * V) {
            const uint4 *from = ring + take * (NR * U * 32);
            copy_wait<DEPTH - 2>();
            uint4 now[NR * U];
            UNROLL for (int i = 0; i < NR * U; i++) now[i] = from[i * 32];
            fetch();                    /* where the stage before was, which has been multiplied */
            take = take + 1 < DEPTH ? take + 1 : 0;
            UNROLL for (int u = 0; u < U; u++) {
                const int at = k / V + u * 32 + lane_id();
                if (U > 1 && k + u * 32 * V >= ldw) break;
                const float4 lo = xs[at], hi = xs[plane + at];
                see(lo, hi);
                UNROLL for (int j = 0; j < NR; j++) {
                    float f[8];
                    unpack(f, now[j * U + u], half_t());
                    float &sum = sums[j][u];
                    sum += f[0] * lo.x; sum += f[1] * lo.y; sum += f[2] * lo.z; sum += f[3] * lo.w;
                    sum += f[4] * hi.x; sum += f[5] * hi.y; sum += f[6] * hi.z; sum += f[7] * hi.w;
                }
            }
        }
        UNROLL for (int j = 0; j < NR; j++) {
            acc[j] = sums[j][0];
            UNROLL for (int u = 1; u < U; u++) acc[j] += sums[j][u];
            acc[j] = warp_sum(acc[j]) * scale;
        }
    }
};

/* Vectors of 4 of a row of k, a multiple of 4: `first` and each `step` further; zeros past its end. */
template <int C> DEVICE void load_vectors(float4 (&v)[C], const float *x, int first, int step, int k) {
    UNROLL for (int u = 0; u < C; u++)
        v[u] = first + u * step < k / 4 ? ((const float4 *)(const void *)x)[first + u * step] :
                                          make_float4(0, 0, 0, 0);
}
/* The same to two planes, of float4s 0, 2, 4 ... and 1, 3, 5 ..., each of n / 2. */
template <int C> DEVICE void store_vectors(float4 *xs, const float4 (&v)[C], int first, int step, int n) {
    UNROLL for (int u = 0; u < C; u++) {
        const int q = first + u * step;
        if (q < n) xs[q % 2 * (n / 2) + q / 2] = v[u];
    }
}

/* v = RMSNorm(in.x), C vectors of 4 a thread, float32 throughout; the gain comes before the kernel before has
   ended. in: a matvec_in or a block_in. */
template <int C, class IN> DEVICE void load_normed(float4 (&v)[C], const IN &in, float *shared) {
    float4 g[C];
    float sum = 0;
    load_vectors<C>(g, in.gain, tid(), n_threads(), in.k);
    wait_for_previous();
    load_vectors<C>(v, in.x, tid(), n_threads(), in.k);
    UNROLL for (int u = 0; u < C; u++)
        sum += v[u].x * v[u].x + v[u].y * v[u].y + v[u].z * v[u].z + v[u].w * v[u].w;
    const float r = rms_scale(block_sum(sum, shared), (float)in.k, in.eps);
    UNROLL for (int u = 0; u < C; u++)
        v[u] =
            make_float4(v[u].x * r * g[u].x, v[u].y * r * g[u].y, v[u].z * r * g[u].z, v[u].w * r * g[u].w);
}

/* RMSNorm(in.x) to shared memory. */
template <int C> DEVICE void stage_normed(float4 *xs, const matvec_in &in, float *shared, int n) {
    float4 v[C];
    load_normed<C>(v, in, shared);
    store_vectors<C>(xs, v, tid(), n_threads(), n);
}

/* The input to shared memory, in two planes, zero past k. With NORMS and a gain its RMSNorm, which each block
   does for itself: what is multiplied is the normalised vector; the gain comes before the kernel before has
   ended; k is then a multiple of 4 and at most 4 * STREAM_NORM * 256. All blocks wait while this runs, so
   only what a width needs is run. Equals qwen3i_rmsnorm. */
template <bool NORMS> DEVICE void stage_vector(float4 *xs, const matvec_in &in, float *shared) {
    const int n = round_up(in.ldw, 256) / 4, step = n_threads();
    if (NORMS && in.gain) {
        if (in.k <= 4 * step) stage_normed<1>(xs, in, shared, n);
        else if (in.k <= 8 * step) stage_normed<2>(xs, in, shared, n);
        else if (in.k <= 16 * step) stage_normed<4>(xs, in, shared, n);
        else stage_normed<STREAM_NORM>(xs, in, shared, n);
    } else {
        wait_for_previous();
        if (in.k % 4) NO_UNROLL
            for (int q = tid(); q < n; q += step)
                xs[q % 2 * (n / 2) + q / 2] = load_up_to_4(in.x, 4 * q, in.k);
        else
            NO_UNROLL for (int base = tid(); base < n; base += 4 * step) {
                float4 v[4];
                load_vectors<4>(v, in.x, base, step, in.k);
                store_vectors<4>(xs, v, base, step, n);
            }
    }
    __syncthreads();
}

/* This lane's of NR values that all lanes have. */
template <int NR> DEVICE float pick(const float (&acc)[NR], int j) {
    float v = acc[0];
    UNROLL for (int i = 1; i < NR; i++) v = j == i ? acc[i] : v;
    return v;
}

/* Some rows, or pairs of them. */
struct row_range { int first, end; };

/* This warp's of `units`. */
DEVICE row_range warp_share(int units) {
    const int warp = block_x() * MATVEC_WARPS + warp_id();
    const row_range r = {share_begin(warp, units), share_begin(warp + 1, units)};
    return r;
}

/* Bytes of shared memory: x, the ring, and a value a warp. */
static __host__ __device__ inline size_t stream_bytes(int ldw, int ring) {
    return (size_t)round_up(ldw, 256) * sizeof(float) + (size_t)ring * 512 * MATVEC_WARPS +
           32 * sizeof(float);
}

/* What the kernels below share: the stream of this warp's rows begins, the L2 is asked for more (if in.ask),
   x comes, ready() is called, and the rows are handed to done(first of NR or of as many pairs, acc), NR / 2
   or NR of them at a time, after before(first of them). */
template <int NR, bool PAIRS, int RING, bool NORMS, class R, class S, class F, class X = see_nothing>
DEVICE void stream_rows(const matvec_in &in, row_range rows, unsigned char *memory, R ready, S before, F done,
                        X see = X()) {
    float4 *xs = (float4 *)(void *)memory;
    float *shared = (float *)(void *)(memory + stream_bytes(in.ldw, RING)) - 32;
    const int step = PAIRS ? NR / 2 : NR, end = rows.end;
    weight_stream<NR, PAIRS, RING> w(in, (uint4 *)(void *)memory + round_up(in.ldw, 256) / 4, rows.first,
                                     end);
    w.begin();
    let_next_start();
    if (in.ask) w.ask();
    stage_vector<NORMS>(xs, in, shared);
    ready();
    for (int row = rows.first; row < end; row += step) {
        float acc[NR];
        const float old = before(row, end - row);
        w.sum(acc, xs, in.scale, see);
        done(row, end - row, acc, old);
    }
}

/* stream_matvec: y[slot, i] = (W x)_i, or += with `add`, for one row of x, NR rows of W at a time; slot =
   outs ? its out_slot : 0; none if that is -1. Equals qwen3i_matmul, with `add` qwen3i_matmul_add. */
template <int NR, int RING>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS, 2)
    stream_matvec_kernel(matvec_in in, float *y, const row_info *outs, int ldy, bool add) {
    QWEN3_DYNAMIC_SHARED(memory);
    const int lane = lane_id();
    stream_rows<NR, false, RING, false>(
        in, warp_share(in.n), memory, [] {},
        [&](int row, int left) { return add && lane < NR && lane < left ? y[row + lane] : 0.0f; },
        [&](int row, int left, const float (&acc)[NR], float old) {
            const int slot = outs ? outs[0].out_slot : 0;
            if (lane < NR && lane < left && slot >= 0)
                y[(size_t)slot * ldy + row + lane] = old + pick(acc, lane);
        });
}

static size_t stream_shared(const matvec_in &in, int ring) { return stream_bytes(in.ldw, ring); }

/* The ring that lets two kernels' blocks be on a multiprocessor; where x is long, the short one; 0: neither
   fits. */
static int stream_ring(const pass *p, const matvec_in &in, const matrix &w) {
    const cuda_model *m = p->c->m;
    if (!goes_alone(p->c, in.rows) || w.type == QWEN3I_F32 || m->capability < 80) return 0;
    if (stream_shared(in, STREAM_RING) <= m->sm_shared / 2 - 1024) return STREAM_RING;
    return stream_shared(in, STREAM_RING_SHORT) <= m->block_shared ? STREAM_RING_SHORT : 0;
}

template <class... P, class... A>
static cudaError_t launch_stream(const pass *p, const matvec_in &in, int ring, int units,
                                 void (*kernel)(P...), A... args) {
    return launch_shared(p->early, 1, p->s, grid1(least(p->c->m->n_sm, ceil_div(units, MATVEC_WARPS))),
                         32 * MATVEC_WARPS, stream_shared(in, ring), kernel, args...);
}

/* Rows that a warp takes at a time of the `each` that it has: few turns, few of them idle. */
static int stream_rows_at_once(int each) {
    return each >= 4 && ceil_div(each, 3) * 3 < ceil_div(each, 4) * 4 ? 3 : least(each, 4);
}
static int stream_each(const pass *p, int units) { return ceil_div(units, p->c->m->n_sm * MATVEC_WARPS); }

template <int RING>
static cudaError_t stream_matvec(const pass *p, const matvec_in &in, float *y, int ldy, const row_info *outs,
                                 bool add) {
#define CALL(NR) launch_stream(p, in, RING, in.n, stream_matvec_kernel<NR, RING>, in, y, outs, ldy, add)
    switch (stream_rows_at_once(stream_each(p, in.n))) {
        case 1:  return CALL(1);
        case 2:  return CALL(2);
        case 3:  return CALL(3);
        default: return CALL(4);
    }
#undef CALL
}
#define BY_RING(ring, CALL) ((ring) == STREAM_RING ? CALL(STREAM_RING) : CALL(STREAM_RING_SHORT))

/* ---- Hopper: what the products of few and of many rows share ---- */
/* How a product ends: its kinds say more in their rooms. M: rows of W in a tile of a product of few rows. */
struct product_end { enum { M = HOPPER_M, NORMS = 0 }; };
template <int ROWS = HOPPER_M> struct to_residual : product_end { enum { M = ROWS }; };
struct to_mlp : product_end { enum { NORMS = 1 }; };
struct to_logits : product_end {};
/* T: half_t for an F16 cache, void for the others */
template <class T> struct to_heads : product_end { enum { NORMS = 1 }; };

/* Lanes share a head of a row: `LANES` of them have N pairs of neighbours each, in lo, and those half a head
   further, in hi. Here pair j of this lane begins. */
template <int LANES> DEVICE int pair_at(int j) { return 2 * (lane_id() % LANES) + 2 * LANES * j; }
const int HEAD_PAIRS = MAX_HEAD_DIM / 128;      /* of each lane, where a warp has a head of any size */
template <int N> struct head_part { float2 lo[N], hi[N]; };
/* Cosine, sine, cosine, sine of each pair at a position. */
template <int N> struct head_angles { float4 of[N]; };

struct qkv_args {
    float        *qkv;                  /* [rows, ld]: projections in, rotated q out; ld = q_dim + 2 kv_dim */
    int           ld, n_head, n_head_kv, head_dim;
    float         eps;
    int           kv_type;              /* QWEN3_KV_* */
    const float  *q_norm, *k_norm;      /* [head_dim] */
    const float2 *rope;                 /* [max_ctx, head_dim / 2] cosine, sine */
    const row_info *rows;
    kv_layer      kv;
};

/* How a product of 1 to 8 rows ends: y[slot(r), i] = (W x[r])_i or += that, slot(r) = outs ? its out_slot :
   r, none if that is -1; q, k and v to their places; y[r, i] = silu((Wgate x[r])_i) * (Wup x[r])_i. */
enum end_kind { END_STORE, END_ADD, END_HEADS, END_MLP };
struct vector_end {
    end_kind kind;
    float   *y; int ldy;
    const row_info *outs;
    qkv_args  qkv;
    unsigned *tickets;                  /* of END_HEADS: see finish_heads */
};

static vector_end make_end(end_kind kind, float *y, int ldy, const row_info *outs) {
    vector_end e;
    memset(&e, 0, sizeof e);
    e.kind = kind;
    e.y = y;
    e.ldy = ldy;
    e.outs = outs;
    return e;
}

/* The end of the rows from the n-th on. */
static void skip_rows(vector_end *e, int n) {
    if (e->outs) e->outs += n;
    else if (e->y) e->y += (size_t)n * e->ldy;
    if (e->kind != END_HEADS) return;
    e->qkv.qkv += (size_t)n * e->qkv.ld;
    e->qkv.rows += n;
}

/* See the room after the MLP. */
static qwen3_result vector_product(const pass *p, const matvec_in &in, const matrix &w, vector_end e);
static qwen3_result matvec(const pass *p, float *y, int ldy, const row_info *outs, const matrix &w,
                           const float *x, int ldx, int rows, bool add);

struct hopper_args {
    int          rows, k, n_tiles;      /* of W: parts of tiles, of 128 rows */
    int          whole;                 /* tiles of two parts, before those of one; large_product only */
    /* rows of W from a tile to the next, and from its first half to its second */
    int          step, half;
    float        w_scale;               /* W = w * w_scale; x[row] = in[row] * in_scale[row] (NULL: 1) */
    const float *in_scale;
    float       *x;  int ldx;           /* ADD: x[row, i] += (W in)_i */
    half_t      *out; int ldo;          /* QKV: q, or NULL: to qkv.qkv as float32; SWIGLU: m */
    const float *out_scale;             /* SWIGLU: out = m / out_scale[row] */
    qkv_args     qkv;
    /* of skinny_product only */
    int          parts, stages;         /* blocks of a cluster, and steps that each holds at a time */
    norm_args    norm;                  /* gain not NULL: the input is RMSNorm(norm.x), done by every block */
    int          n;                     /* rows of W */
    float       *y; int ldy;            /* STORE: y[slot(row), i] = (W in)_i; slot as in matvec */
    const row_info *outs;
};

#ifdef QWEN3_WGMMA
/* A ring of n tiles in shared memory: one thread has them loaded, two warpgroups multiply them. */
struct ring_stage { mbarrier full, empty; };
struct ring_of_tiles { unsigned char *memory; ring_stage *stages; int n; };

/* A stage of a ring, and the parity of its barrier that is waited for. */
struct ring_place {
    int slot; unsigned parity;
    __device__ __forceinline__ void advance(int n) { if (++slot == n) { slot = 0; parity ^= 1; } }
};

/* A ring whose tiles take so many bytes in all; a stage is empty after so many arrivals. */
DEVICE ring_of_tiles make_ring(unsigned char *raw, size_t bytes, int n, unsigned arrivals) {
    unsigned char *memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
    const ring_of_tiles ring = {memory, (ring_stage *)(void *)(memory + bytes), n};
    if (tid() == 0) {
        NO_UNROLL for (int i = 0; i < n; i++) {
            barrier_init(&ring.stages[i].full, 1);
            barrier_init(&ring.stages[i].empty, arrivals);
        }
        barriers_ready();
    }
    return ring;
}

/* Loads `steps` tiles of so many bytes: W by load_w(i, to, barrier), and x, unless the block makes it itself,
   by load_x(i, to, barrier). The first weights are asked for before x exists. */
template <int BYTES, class W, class X>
DEVICE void fill_ring(const ring_of_tiles &ring, int steps, bool with_x, W load_w, X load_x) {
    const int early = steps < ring.n ? steps : ring.n;
    ring_place at = {0, 1};
    NO_UNROLL for (int i = 0; i < early; i++) load_w(i, ring.memory + BYTES * i, &ring.stages[i].full);
    if (!with_x) return;                /* and there is a stage for each step */
    wait_for_previous();
    NO_UNROLL for (int i = 0; i < steps; i++, at.advance(ring.n)) {
        unsigned char *to = ring.memory + BYTES * at.slot;
        mbarrier *full = &ring.stages[at.slot].full;
        if (i >= early) {
            barrier_wait(&ring.stages[at.slot].empty, at.parity);
            load_w(i, to, full);
        }
        load_x(i, to, full);
    }
}

const int SUM_STEPS = 2;                /* of HOPPER_K: what the tensor core adds up before float32 does */

/* acc[p] = 64 rows of one operand, `a` bytes into a tile, times 2 N rows of part p of the other, `b` bytes
   into it, over `steps` steps, which are EVEN or any number. The tensor core adds up SUM_STEPS of them, from
   zero on; float32 adds those sums. part: what it works in. see() is called with each tile while it is
   multiplied, release() with each stage afterwards. */
template <class TILE, bool EVEN, int PARTS, int N, class S, class F>
DEVICE void sum_tiles(float (&acc)[PARTS][N], float (&part)[N], const ring_of_tiles &ring, ring_place &at,
                      int steps, int a, int b, S see, F release) {
    UNROLL for (int i = 0; i < PARTS * N; i++) acc[i / N][i % N] = 0;
    NO_UNROLL for (int done = 0; done < steps; done += SUM_STEPS) {
        const int n = EVEN || steps - done >= SUM_STEPS ? SUM_STEPS : steps - done;
        ring_place first = at;
        UNROLL for (int p = 0; p < PARTS; p++) {
            ring_place now = first;
#pragma unroll (EVEN ? SUM_STEPS : 1)
            for (int i = 0; i < n; i++, now.advance(ring.n)) {
                const unsigned char *tile = ring.memory + TILE::BYTES * now.slot;
                if (p == 0) barrier_wait(&ring.stages[now.slot].full, now.parity);
                if (p == 0 || i == 0) products_begin();
                UNROLL for (int j = 0; j < HOPPER_K / 16; j++)
                    wgmma(part, operand(tile + a) + 2 * (unsigned)j,
                          operand(tile + b + TILE::W_BYTES * p) + 2 * (unsigned)j, i + j > 0);
                if (!EVEN) products_commit();
                if (p == 0) see(tile);
            }
            at = now;
            if (EVEN) products_commit();
            products_wait<0>();
            products_done(part);
#pragma unroll (EVEN ? SUM_STEPS : 1)
            for (int i = 0; p == PARTS - 1 && i < n; i++, first.advance(ring.n))
                release(&ring.stages[first.slot]);
            UNROLL for (int i = 0; i < N; i++) acc[p][i] += part[i];
        }
    }
}
#endif

/* ---- Hopper: more than 64 rows ---- */
#ifdef QWEN3_WGMMA
/* What a thread needs to finish one of its rows of a tile: asked for before the sums, so that nobody waits
   for it. */
struct large_row { int at; float in, out; int seq, position; };

DEVICE void ask_row(const product_end &, large_row &, const hopper_args &, int) {}

template <class END> DEVICE large_row large_ask(const hopper_args &g, int row) {
    const int i = row < g.rows ? row : g.rows - 1;
    large_row w = {row, 1, 1, 0, 0};
    if (g.in_scale) w.in = g.in_scale[i];
    ask_row(END(), w, g, i);
    return w;
}

/* This thread's two columns of each 8 of a row of part n. */
template <int M>
DEVICE void large_add(const hopper_args &g, const float (&acc)[M], int row, int r, int n, float scale) {
    float *x = g.x + (size_t)row * g.ldx + n * 2 * M + 2 * (lane_id() % 4);
    if (row >= g.rows) return;
    UNROLL for (int j = 0; j < M / 4; j++)
        add_2_there(x + 8 * j, acc[4 * j + 2 * r] * scale, acc[4 * j + 2 * r + 1] * scale);
}

template <int ROWS, int PARTS, int M>
DEVICE void finish_tile(const to_residual<ROWS> &, const hopper_args &g, const float (&acc)[PARTS][M],
                        const large_row &row, int r, int n, float scale) {
    UNROLL for (int p = 0; p < PARTS; p++) large_add(g, acc[p], row.at, r, n + p, scale);
}

/* Which rows of x, in units of a block's, and which part of W a tile begins with, and its parts. */
struct large_place { int rows, first, parts; };

template <int P> DEVICE large_place large_place_of(const hopper_args &g, int tile, int rank) {
    const int pairs = ceil_div(g.rows, 2 * HOPPER_M), column = tile / pairs;
    const bool single = P == 1 || column >= g.whole;
    const large_place at = {tile % pairs * 2 + rank, single ? column + (P - 1) * g.whole : P * column,
                            single ? 1 : P};
    return at;
}
DEVICE int large_tiles(const hopper_args &g) {
    return ceil_div(g.rows, 2 * HOPPER_M) * (g.n_tiles - g.whole);
}

/* Where a thread that loads is: k elements into a tile. It steps on without divisions, which would take it
   longer than the tensor cores take to multiply. */
template <int P> struct large_cursor {
    int k, tile;
    large_place at;
    __device__ __forceinline__ void advance(const hopper_args &g, int clusters, int rank) {
        if ((k += HOPPER_K) < g.k) return;
        k = 0;
        tile += clusters;
        at = large_place_of<P>(g, tile, rank);
    }
};

/* Tiles of x, each block its own, and of W: halves of each part to both blocks of the cluster, of which the
   other loads the other halves. */
template <int N, int P>
static __device__ void large_load(const CUtensorMap *x_map, const CUtensorMap *w_map, const hopper_args &g,
                                  const ring_of_tiles &ring, int rank) {
    typedef large_tile<N, P> tile;
    const int clusters = (int)gridDim.x / 2, first = block_x() / 2,
              n = ceil_div(large_tiles(g) - first, clusters);
    large_cursor<P> w = {0, first, large_place_of<P>(g, first, rank)}, x = w;
    fill_ring<tile::BYTES>(
        ring, n * (g.k / HOPPER_K), true,
        [&](int, unsigned char *to, mbarrier *full) {
            barrier_expect(full, (unsigned)(tile::BYTES - (P - w.at.parts) * tile::W_BYTES));
            UNROLL for (int p = 0; p < P; p++)
                if (p < w.at.parts)
                    load_tile_twice(to + tile::W_BYTES * p + tile::W_BYTES / 2 * rank, w_map, w.k,
                                    (w.at.first + p) * g.step + rank * g.half, full);
            w.advance(g, clusters, rank);
        },
        [&](int, unsigned char *to, mbarrier *full) {
            load_tile(to + tile::X_AT, x_map, x.k, x.at.rows * HOPPER_M, full);
            x.advance(g, clusters, rank);
        });
}

/* How the sums of a row are scaled; the benchmark's fused kernel has another way. It sees each tile of x
   while it is multiplied. */
struct input_scales {
    DEVICE void begin() {}
    DEVICE void see(const unsigned char *) {}
    DEVICE void end() {}
    DEVICE float of(const hopper_args &g, float in, int) { return g.w_scale * in; }
};

/* A tile's rows from row0 and row0 + 8 on, of PARTS parts from n on. */
template <class END, int N, int P, int PARTS, class S>
DEVICE void large_multiply_tile(const hopper_args &g, float (&part)[N / 2], const ring_of_tiles &ring,
                                ring_place &at, int group, int row0, int n, S &scales) {
    typedef large_tile<N, P> tile;
    const large_row rows[2] = {large_ask<END>(g, row0), large_ask<END>(g, row0 + 8)};
    float acc[PARTS][N / 2];
    scales.begin();
    sum_tiles<tile, true>(
        acc, part, ring, at, g.k / HOPPER_K, tile::X_AT + (int)HOPPER_HALF / 2 * group, 0,
        [&](const unsigned char *now) { scales.see(now + tile::X_AT); },
        [](ring_stage *s) { if (lane_id() < 2) barrier_arrive_at(&s->empty, (unsigned)lane_id()); });
    scales.end();
    UNROLL for (int r = 0; r < 2; r++) finish_tile(END(), g, acc, rows[r], r, n, scales.of(g, rows[r].in, r));
}

template <class END, int N, int P, class S>
static __device__ void large_multiply_tiles(const hopper_args &g, const ring_of_tiles &ring, int rank,
                                            int group, S &scales) {
    const int clusters = (int)gridDim.x / 2, n = large_tiles(g),
              first = 64 * group + warp_id() % 4 * 16 + lane_id() / 4;
    float part[N / 2];
    ring_place place = {0, 0};
    UNROLL for (int i = 0; i < N / 2; i++) part[i] = 0;
    for (int t = block_x() / 2; t < n; t += clusters) {
        const large_place at = large_place_of<P>(g, t, rank);
        const int row0 = at.rows * HOPPER_M + first;
        if (at.parts == P)
            large_multiply_tile<END, N, P, P>(g, part, ring, place, group, row0, at.first, scales);
        else large_multiply_tile<END, N, P, 1>(g, part, ring, place, group, row0, at.first, scales);
    }
}

template <class END, int N, int P, class S>
DEVICE void large_multiply_rows(const CUtensorMap *x_map, const CUtensorMap *w_map, const hopper_args &g,
                                S scales) {
    QWEN3_DYNAMIC_SHARED(raw);
    const int rank = block_x() % 2, stages = large_tile<N, P>::STAGES;
    /* both blocks' eight warps that multiply empty a stage */
    const ring_of_tiles ring = make_ring(raw, (size_t)stages * large_tile<N, P>::BYTES, stages, 16);
    cluster_sync();
    let_next_start();
    if (warp_id() < 4) {
        fewer_registers<40>();
        if (tid() == 0) large_load<N, P>(x_map, w_map, g, ring, rank);
        __syncwarp();
    } else {
        more_registers<232>();
        wait_for_previous();
        large_multiply_tiles<END, N, P>(g, ring, rank, __shfl_sync(ALL, warp_id() / 4 - 1, 0), scales);
    }
    cluster_sync();                     /* the other block may still write here */
}
#endif

/* large_product: y = W x for many rows, and what follows it. x [rows, k] F16, W [n, k] F16, k a multiple of
   128. ADD: the residual, in float32; equals qwen3i_matmul_add. SWIGLU: silu(gate) * up of rows of W n_ff
   apart, rounded once; equals qwen3i_swiglu. QKV: each head's RMSNorm and rotation in float32, q rounded
   once, k and v to the cache with one rounding; equals qwen3i_matmul_qkv, qwen3i_rmsnorm_heads, qwen3i_rope;
   head_dim 128; T is the cache's type. Clusters of two blocks take turns of tiles of [256, P N], and then of
   [256, N]; N is 128, for ADD also 160, which changes no sum. Two parts read shared memory and the
   L2 less than two tiles, which both limit a product. Order: the tensor core adds up 128
   elements, which start from zero, and float32 the chunks: the former cuts its sums off, and over a whole row
   that would show; the residual is added to the whole sum. */
template <class END, int N, int P>
static __global__ void QWEN3_CLUSTER_OF_2 __launch_bounds__(LARGE_THREADS, 1)
    large_product_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                         hopper_args g) {
#ifdef QWEN3_WGMMA
    large_multiply_rows<END, N, P>(&x_map, &w_map, g, input_scales());
#else
    (void)x_map; (void)w_map; (void)g;
#endif
}

template <int N, int P> static size_t large_product_shared() {
    return 1024 + large_tile<N, P>::STAGES * ((size_t)large_tile<N, P>::BYTES + 16);
}

/* ---- Hopper: 2 to 64 rows ---- */
const int SKINNY_LEAST   = 2;              /* rows, from ... */
const int SKINNY_MOST    = 64;             /* ... to */
const int SKINNY_X_TILE  = 32;             /* rows of x that are loaded at once */
const int SKINNY_THREADS = 288;            /* two warpgroups that multiply, a warp that loads */
const int SKINNY_LD      = HOPPER_M + 4;     /* floats from a row of sums to the next: no bank twice */
const int SKINNY_PARTS   = 8;              /* blocks of a cluster, at most */
const int SKINNY_NORM    = 8;              /* rows that its blocks norm themselves, one a warp */
const int SKINNY_SHARED  = 112 << 10;      /* bytes of a block: a multiprocessor has room for two */

/* SUMS take the place of the stages. */
template <int M, int R> struct skinny_tile : product_tile<M, R> { enum { SUMS = R * SKINNY_LD * 4 }; };
/* As many stages as there are steps and room. */
template <int M, int R> static int skinny_stages(int steps) {
    const int room = (SKINNY_SHARED - 1024) / (skinny_tile<M, R>::BYTES + 16);
    return steps < room ? steps : room;
}
template <int M, int R> static __host__ __device__ __forceinline__ size_t skinny_memory(int stages) {
    const size_t bytes = (size_t)stages * skinny_tile<M, R>::BYTES, sums = skinny_tile<M, R>::SUMS;
    return bytes < sums ? sums : bytes;
}
template <int M, int R> static size_t skinny_product_shared(int stages) {
    return 1024 + skinny_memory<M, R>(stages) + (size_t)stages * 16;
}

#ifdef QWEN3_WGMMA
/* Steps of 64 elements, from k0 on, of a tile of W and, unless the block makes it itself, of x. */
template <int M, int R>
static __device__ void skinny_load(const CUtensorMap *x_map, const CUtensorMap *w_map, const hopper_args &g,
                                   const ring_of_tiles &ring, int tile, int k0, int steps) {
    typedef skinny_tile<M, R> shape;
    const bool with_x = !g.norm.gain;
    prefetch_map(w_map);
    prefetch_map(x_map);
    fill_ring<shape::BYTES>(
        ring, steps, with_x,
        [&](int i, unsigned char *to, mbarrier *full) {
            const int k = k0 + i * HOPPER_K;
            barrier_expect(full, with_x ? shape::BYTES : shape::W_BYTES);
            load_tile(to, w_map, k, tile * g.step, full);
            if (M == HOPPER_M) load_tile(to + HOPPER_HALF / 2, w_map, k, tile * g.step + g.half, full);
        },
        [&](int i, unsigned char *to, mbarrier *full) {
            UNROLL for (int row = 0; row < R; row += SKINNY_X_TILE)
                load_tile(to + shape::X_AT + row * HOPPER_K * 2, x_map, k0 + i * HOPPER_K, row, full);
        });
}

/* x of all steps is RMSNorm(norm.x) in float32, as hopper_norm, rounded once to F16; a warp has a row.
   scales: how. */
template <int M, int R>
DEVICE void skinny_norm(const hopper_args &g, unsigned char *memory, int k0, int steps, int warp,
                        row_scale *scales, float (&gains)[SKINNY_VECTORS][4]) {
    const int at = 4 * lane_id(), row = warp;
    float v[SKINNY_VECTORS][4];
    if (row < g.rows) {
        load_row<float, SKINNY_VECTORS>(v, g.norm.x + (size_t)row * g.norm.ldx, at, 128, g.k);
        const row_sums sums = warp_sums(times_gains<true>(v, gains, g.norm.gain, at, 128, g.k));
        const row_scale h = scale_row(sums, g.k, g.norm.eps, g.norm.bounds);
        if (at == 0) {
            scales[row] = h;
            if (g.norm.bounds && block_x() == 0) g.norm.ff_scale[row] = h.ff;
        }
        UNROLL for (int k = 0; k < SKINNY_VECTORS; k++) {
            const int col = at + 128 * k - k0, step = col / HOPPER_K, chunk = col % HOPPER_K / 8;
            if (col < 0 || step >= steps) continue;
            store_row((half_t *)(void *)(memory + skinny_tile<M, R>::BYTES * step + skinny_tile<M, R>::X_AT +
                                         128 * row + 16 * (chunk ^ (row & 7))) +
                          col % 8,
                      v[k], h);
        }
    }
    stores_ready();
    group_sync(1, 256);
}

/* 64 rows of W times rows of x, over the block's part of k, to sums [R, SKINNY_LD] over the stages. Of a tile
   of 128 rows of W each warpgroup has half and all rows of x; of one of 64 it has all, and half of the rows
   of x. see() is called with each tile of x while it is multiplied. */
template <int M, int R, class X = see_nothing>
static __device__ void skinny_sum(const ring_of_tiles &ring, int steps, int group, X see = X()) {
    typedef skinny_tile<M, R> tile;
    const int N = M == HOPPER_M ? R : R / 2;
    const int w_at = M == HOPPER_M ? (int)HOPPER_HALF / 2 * group : 0;
    const int x_at = tile::X_AT + (M == HOPPER_M ? 0 : N * HOPPER_K * 2 * group);
    float acc[1][N / 2], part[N / 2];
    ring_place at = {0, 0};
    UNROLL for (int i = 0; i < N / 2; i++) part[i] = 0;
    sum_tiles<tile, false>(
        acc, part, ring, at, steps, w_at, x_at, [&](const unsigned char *now) { see(now + tile::X_AT); },
        [](ring_stage *s) { if (lane_id() == 0) barrier_arrive(&s->empty); });
    group_sync(1, 256);                 /* nobody reads the stages any more */
    float *to = (float *)(void *)ring.memory +
                (lane_id() % 4 * 2 + (M == HOPPER_M ? 0 : N * group)) * SKINNY_LD +
                (M == HOPPER_M ? 64 * group : 0) + warp_id() % 4 * 16 + lane_id() / 4;
    UNROLL for (int j = 0; j < N / 8; j++)
        UNROLL for (int e = 0; e < 2; e++) {
            to[(8 * j + e) * SKINNY_LD] = acc[0][4 * j + e];
            to[(8 * j + e) * SKINNY_LD + 8] = acc[0][4 * j + 2 + e];
        }
}

/* What a lane needs to finish a row, beside its sums. pair: of ADD the residual, of QKV the gains. */
struct skinny_row { float scale, down; head_part<1> pair; int slot; row_info at; head_angles<1> angles; };

/* What the end of a row needs that is weights, or was written long before, asked for before the kernel before
   has ended; and the rest, asked for before the sums are there. */
DEVICE void ask_early(const product_end &, skinny_row &, const hopper_args &, int, int) {}
DEVICE void ask_late(const product_end &, skinny_row &, const hopper_args &, int, int) {}

template <int ROWS>
DEVICE void ask_late(const to_residual<ROWS> &, skinny_row &r, const hopper_args &g, int i, int tile) {
    const float2 *x = (const float2 *)(const void *)(g.x + (size_t)i * g.ldx + tile * ROWS + 2 * lane_id());
    r.pair.lo[0] = x[0];
    if (ROWS == HOPPER_M) r.pair.hi[0] = x[32];
}
template <int ROWS>
DEVICE void finish_row(const to_residual<ROWS> &, const hopper_args &g, const head_part<1> &p,
                       const skinny_row &r, int row, int tile) {
    const float2 lo = r.pair.lo[0], hi = r.pair.hi[0];
    float2 *x = (float2 *)(void *)(g.x + (size_t)row * g.ldx + tile * ROWS + 2 * lane_id());
    x[0] = make_float2(lo.x + p.lo[0].x, lo.y + p.lo[0].y);
    if (ROWS == HOPPER_M) x[32] = make_float2(hi.x + p.hi[0].x, hi.y + p.hi[0].y);
}

template <class END> DEVICE void skinny_ask_early(skinny_row &r, const hopper_args &g, int row, int tile) {
    ask_early(END(), r, g, row < g.rows ? row : g.rows - 1, tile);
}
template <class END> DEVICE void skinny_ask(skinny_row &r, const hopper_args &g, int row, int tile) {
    const int i = row < g.rows ? row : g.rows - 1;
    r.scale = g.w_scale * (g.in_scale ? g.in_scale[i] : 1.0f);
    ask_late(END(), r, g, i, tile);
}

/* Joins the parts of a row in the order of the blocks; all are on their way at a time. */
template <int M> DEVICE head_part<1> skinny_join(const float *sums, int parts) {
    float2 v[SKINNY_PARTS], w[SKINNY_PARTS], lo, hi = make_float2(0, 0);
    UNROLL for (int i = 0; i < SKINNY_PARTS; i++) {
        if (i >= parts) continue;
        if (M == HOPPER_M) load_from_block(v[i], w[i], sums, (unsigned)i);
        else load_from_block(v[i], sums, (unsigned)i);
    }
    lo = v[0];
    if (M == HOPPER_M) hi = w[0];
    UNROLL for (int i = 1; i < SKINNY_PARTS; i++) {
        if (i >= parts) continue;
        lo.x += v[i].x; lo.y += v[i].y;
        if (M == HOPPER_M) { hi.x += w[i].x; hi.y += w[i].y; }
    }
    const head_part<1> sum = {{lo}, {hi}};
    return sum;
}

/* What a row needs, as long as it is one of the block's. */
template <class END>
DEVICE void skinny_ask_all(skinny_row &r, const hopper_args &g, int row, int end, int tile) {
    if (row >= end) return;
    skinny_ask_early<END>(r, g, row, tile);
    skinny_ask<END>(r, g, row, tile);
}

/* Every eighth row from this warp's first one on. look(r, i) sees what is known of the i-th before it is
   finished. */
template <class END, class F>
DEVICE void skinny_finish_rows(const hopper_args &g, const float *sums, int row, int end, int tile,
                               skinny_row r, skinny_row next, F look) {
    NO_UNROLL for (int i = 0; row < end; row += 8, i++) {
        skinny_row later = next;
        skinny_ask_all<END>(later, g, row + 16, end, tile);
        head_part<1> p = skinny_join<END::M>(sums + row * SKINNY_LD, g.parts);
        look(r, i);
        p.lo[0].x *= r.scale; p.lo[0].y *= r.scale; p.hi[0].x *= r.scale; p.hi[0].y *= r.scale;
        finish_row(END(), g, p, r, row, tile);
        r = next;
        next = later;
    }
}

/* The warps that multiply. They are short-lived, so what they do once must not be much code: it comes from
   afar, too. */
template <class END, int R>
DEVICE void skinny_multiply(const hopper_args &g, const ring_of_tiles &ring, int rank, int tile, int steps,
                         int warp) {
    constexpr bool norms = R == 32 && END::NORMS;
    constexpr int M = END::M;
    __shared__ row_scale scales[SKINNY_NORM];
    float gains[SKINNY_VECTORS][4];
    const int n = R / g.parts, end = rank * n + n < g.rows ? rank * n + n : g.rows;
    const float *sums = (const float *)(const void *)ring.memory + 2 * lane_id();
    const int row = rank * n + warp;    /* the first of this warp's of those that the block finishes */
    skinny_row r, next;
    skinny_ask_early<END>(r, g, row, tile);
    skinny_ask_early<END>(next, g, row + 8, tile);
    if (norms && g.norm.gain) load_all_gains(gains, g.norm.gain, 4 * lane_id(), 128, g.k);
    wait_for_previous();
    if (norms && g.norm.gain)
        skinny_norm<M, R>(g, ring.memory, rank * steps * HOPPER_K, steps, warp, scales, gains);
    skinny_ask<END>(r, g, row, tile);
    skinny_ask<END>(next, g, row + 8 < end ? row + 8 : row, tile);
    if (norms && g.norm.gain && row < end) {
        r.scale = g.w_scale / scales[row].up;
        r.down = 1.0f / scales[row].ff;
    }
    skinny_sum<M, R>(ring, steps, warp / 4);
    cluster_meet();
    skinny_finish_rows<END>(g, sums, row, end, tile, r, next, [](skinny_row &, int) {});
}
#endif

/* skinny_product: as large_product for 2 to 64 rows, where the weights' bytes are what counts; also STORE:
   logits. R: 32 or 64, at least the rows. A cluster of g.parts blocks (1, 2, 4 or 8) shares a tile of M rows
   of W, 128 or, for ADD, 64: each of its blocks sums over a part of k, 128 elements by the tensor core at a
   time, and finishes some of the rows from all parts, in order. With norm.gain the input is RMSNorm(norm.x),
   at most SKINNY_NORM rows of SKINNY_WIDTH elements, rounded as by hopper_norm: each block does that for
   itself, and there are as many stages as steps. Grid: tiles times parts; k is 64 times a multiple of parts;
   shared memory for g.stages. */
template <class END, int R>
static __global__ void __launch_bounds__(SKINNY_THREADS, 2)
    skinny_product_kernel(const __grid_constant__ CUtensorMap x_map,
                          const __grid_constant__ CUtensorMap w_map, hopper_args g) {
#ifdef QWEN3_WGMMA
    constexpr int M = END::M;
    QWEN3_DYNAMIC_SHARED(raw);
    const ring_of_tiles ring = make_ring(raw, skinny_memory<M, R>(g.stages), g.stages, 8);
    const int rank = block_x() % g.parts, tile = block_x() / g.parts, steps = g.k / g.parts / HOPPER_K;
    const int warp = __shfl_sync(ALL, warp_id(), 0);
    __syncthreads();
    let_next_start();
    if (warp == 8) {
        if (lane_id() == 0)
            skinny_load<M, R>(&x_map, &w_map, g, ring, tile, rank * steps * HOPPER_K, steps);
        __syncwarp();
        cluster_meet();
    } else skinny_multiply<END, R>(g, ring, rank, tile, steps, warp);
    cluster_sync();                     /* nobody leaves while its sums are read */
#else
    (void)x_map; (void)w_map; (void)g;
#endif
}

/* ---- launching them ---- */
/* n float32 rows as F16, for a product with w. */
static qwen3_result hopper_round(const pass *p, const matrix &w, const float *from, int ld, int n) {
    cuda_ctx *c = p->c;
    return launched(p,
                    launch_early(p->early, p->s, grid1(n), row_threads(w.ld, 4, n), 0,
                                 round_rows_kernel<half_t>, c->hopper_act, c->act_scale, from, ld, w.cols,
                                 w.ld, (size_t)0),
                    "round_rows");
}

static hopper_args hopper_arguments(const pass *p, const matrix &w, const float *in_scale) {
    hopper_args a;
    memset(&a, 0, sizeof a);
    a.rows = p->n;
    a.k = w.cols;
    a.n_tiles = w.rows / HOPPER_N;
    a.step = HOPPER_N;
    a.half = HOPPER_N / 2;
    a.w_scale = w.scale;
    a.in_scale = in_scale;
    return a;
}

/* About how many microseconds so many blocks in clusters, all at once, need for so many steps each: the
   busiest multiprocessor takes in 45 KB of W and x in one, memory gives W as fast as it can, and the rest of
   a kernel takes 3. Clusters of four and more do not find places for one block on each multiprocessor. */
static float skinny_time(const pass *p, int blocks, int parts, int steps, int m, int r) {
    const float w = (float)(m * HOPPER_K * 2), x = (float)(r * HOPPER_K * 2);
    const int busiest = parts >= 4 ? 2 : ceil_div(blocks, p->c->m->n_sm);
    const float in = (float)busiest * (w + x) / 45e3f, from = (float)blocks * w / p->c->m->stream;
    return 3 + (float)steps * (in > from ? in : from);
}

/* Tiles of m rows of W, each shared by so many blocks, each with so many steps. */
struct skinny_plan { int m, parts, steps; float time; };

/* The better of a plan and of what tiles of m rows allow. */
static skinny_plan skinny_better(const pass *p, const hopper_args &a, int m, int r, skinny_plan best) {
    const int tiles = a.n_tiles * (HOPPER_M / m), steps = a.k / HOPPER_K;
    for (int i = 0, parts = 1; parts <= SKINNY_PARTS && steps % parts == 0; i++, parts *= 2) {
        const int room = p->c->skinny_room[i], left = tiles % room;
        const float full = skinny_time(p, room * parts, parts, steps / parts, m, r),
                    rest = left ? skinny_time(p, left * parts, parts, steps / parts, m, r) : 0,
                    time = (float)(tiles / room) * full + rest;
        if (best.m == 0 || time <= best.time) best = {m, parts, steps / parts, time};
    }
    return best;
}

/* Few rows of few elements are normed where they are multiplied: all of x has a place beside the weights. */
static bool skinny_norms_itself(const pass *p, const matrix &w) {
    const skinny_plan none = {0, 0, 0, 0},
                      plan = skinny_better(p, hopper_arguments(p, w, NULL), HOPPER_M, 32, none);
    return p->n <= SKINNY_NORM && w.cols <= SKINNY_WIDTH &&
           skinny_stages<HOPPER_M, 32>(plan.steps) == plan.steps;
}

/* W as F16 for one of these kernels: as it is, or in the scratch. They ask for weights before the kernel
   before them has ended, so after one that makes weights they must not start early. */
struct ready { pass p; const matrix *w; };

static qwen3_result make_ready(const pass *p, const matrix &w, int first, int rows, ready *out) {
    out->p = *p;
    out->w = &w;
    if (w.n_parts == 0) return QWEN3_OK;
    out->p.early = false;
    out->w = &p->c->halves[w.kind];
    return decode_rows(p->c->scratch, p->early, p->s, w, first, rows, p->err);
}

template <class END, int R>
static qwen3_result launch_skinny_product(const pass *p, const stored_map &in, const matrix &w, hopper_args a,
                                          skinny_plan plan) {
    a.parts = plan.parts;
    a.stages = skinny_stages<END::M, R>(plan.steps);
    return launched(p,
                    launch_clusters(p->early, a.parts, p->s, grid1(a.n_tiles * a.parts), SKINNY_THREADS,
                                    skinny_product_shared<END::M, R>(a.stages), skinny_product_kernel<END, R>,
                                    get_map(in), get_map(w.map), a),
                    "skinny_product");
}

template <class END>
static qwen3_result skinny_product(const pass *p, const stored_map &in, const matrix &w,
                                   const hopper_args &a) {
    const skinny_plan none = {0, 0, 0, 0};
    ready r;
    TRY(make_ready(p, w, 0, w.rows, &r));
    return a.rows <= 32 ?
               launch_skinny_product<END, 32>(&r.p, in, *r.w, a, skinny_better(p, a, HOPPER_M, 32, none)) :
               launch_skinny_product<END, 64>(&r.p, in, *r.w, a, skinny_better(p, a, HOPPER_M, 64, none));
}

/* x += W in, by tiles of 128 or of 64 rows of W */
template <int R>
static qwen3_result skinny_add_of(const pass *p, const stored_map &in, const matrix &w, hopper_args a) {
    const skinny_plan none = {0, 0, 0, 0};
    const skinny_plan plan = skinny_better(p, a, HOPPER_M / 2, R, skinny_better(p, a, HOPPER_M, R, none));
    if (plan.m == HOPPER_M) return launch_skinny_product<to_residual<HOPPER_M>, R>(p, in, w, a, plan);
    a.n_tiles *= 2;
    a.step /= 2;
    return launch_skinny_product<to_residual<HOPPER_M / 2>, R>(p, in, w, a, plan);
}
static qwen3_result skinny_add(const pass *p, const stored_map &in, const matrix &w, hopper_args a) {
    ready r;
    TRY(make_ready(p, w, 0, w.rows, &r));
    a.x = p->c->sum;
    a.ldx = p->c->embd_ld;
    return a.rows <= 32 ? skinny_add_of<32>(&r.p, in, *r.w, a) : skinny_add_of<64>(&r.p, in, *r.w, a);
}

static int large_pairs(const pass *p) { return ceil_div(p->n, 2 * HOPPER_M); }

template <class END, int N, int P>
static qwen3_result launch_large_product(const pass *p, const stored_map &in, const stored_map &w,
                                         const hopper_args &a) {
    const int clusters = least(large_pairs(p) * (a.n_tiles - a.whole), p->c->m->n_sm / 2);
    return launched(p,
                    launch_clusters(p->early, LARGE_CLUSTER, p->s, grid1(2 * clusters), LARGE_THREADS,
                                    large_product_shared<N, P>(), large_product_kernel<END, N, P>,
                                    get_map(in), get_map(w), a),
                    "large_product");
}

/* How long the busiest cluster works on so many columns of parts, of which the first go in `whole` tiles of
   two: in the time of one part. Two take 1.8 (measured). */
static float large_time(const pass *p, int columns, int whole) {
    const int clusters = p->c->m->n_sm / 2, pairs = large_pairs(p);
    return (float)ceil_div(pairs * (columns - whole), clusters) +
           0.8f * (float)ceil_div(pairs * whole, clusters);
}

/* The fastest number of tiles of two: none, all, or as many as keep all clusters busy. */
static int large_whole(const pass *p, int columns) {
    const int all = columns / 2, fill = p->c->m->n_sm / 2,
              turns = large_pairs(p) * all / fill * fill / large_pairs(p);
    const int best = large_time(p, columns, turns) < large_time(p, columns, all) ? turns : all;
    return large_time(p, columns, best) < large_time(p, columns, 0) ? best : 0;
}

template <class END>
static qwen3_result large_product(const pass *p, const stored_map &in, const matrix &w, hopper_args a) {
    ready r;
    TRY(make_ready(p, w, 0, w.rows, &r));
    a.whole = large_whole(p, a.n_tiles);
    return a.whole > 0 ? launch_large_product<END, HOPPER_N, 2>(&r.p, in, r.w->map, a)
                       : launch_large_product<END, HOPPER_N, 1>(&r.p, in, r.w->map, a);
}

/* x += W in, in the tiles that are done first: 2,560 columns of 2,048 rows are 2.4 turns of 128, but 1.9 of
   160. */
static qwen3_result large_add(const pass *p, const stored_map &in, const matrix &w, hopper_args a) {
    const float more = (float)HOPPER_N_MORE / HOPPER_N * large_time(p, w.rows / HOPPER_N_MORE, 0);
    a.x = p->c->sum;
    a.ldx = p->c->embd_ld;
    if (w.rows % HOPPER_N_MORE || large_time(p, a.n_tiles, large_whole(p, a.n_tiles)) <= more)
        return large_product<to_residual<> >(p, in, w, a);
    ready r;
    TRY(make_ready(p, w, 0, w.rows, &r));
    a.n_tiles = w.rows / HOPPER_N_MORE;
    a.step = HOPPER_N_MORE;
    a.half = HOPPER_N_MORE / 2;
    return launch_large_product<to_residual<>, HOPPER_N_MORE, 1>(&r.p, in, r.w->map_more, a);
}

/* The norm that the product is to do itself, if it is. */
static void set_norm(const pass *p, const input &h, const matrix &w, hopper_args *a) {
    if (!h.gain) return;
    a->norm = norm_arguments(p, h.gain, w);
    a->in_scale = a->out_scale = NULL;
}

/* ================================================================================================
   Q, K AND V = RoPE(RMSNorm of each head(W h)); K and V into the cache
   ================================================================================================ */
template <int LANES, int N> DEVICE head_angles<N> load_angles(const qkv_args &a, int half, int position) {
    const float2 *from = a.rope + (size_t)position * half;
    head_angles<N> t;
    UNROLL for (int j = 0; j < N; j++) {
        const int i = pair_at<LANES>(j);
        t.of[j] = i < half ? *(const float4 *)(const void *)(from + i) : make_float4(0, 0, 0, 0);
    }
    return t;
}

/* Where a row stands, and its angles. */
struct row_angles { int seq, position; head_angles<HEAD_PAIRS> angles; };

DEVICE row_angles load_row_angles(const qkv_args &a, int row) {
    const row_info at = a.rows[row];
    const row_angles t = {at.seq, at.position, load_angles<32, HEAD_PAIRS>(a, a.head_dim / 2, at.position)};
    return t;
}

DEVICE void store_2(float *p, float x, float y) { *(float2 *)(void *)p = make_float2(x, y); }
template <class T> DEVICE void store_2(T *p, float x, float y) {
    store(p, x);
    store(p + 1, y);
}

/* f(a pointer to element `at` of k or v, as its type is) */
template <class F> DEVICE void in_cache(const qkv_args &a, void *cache, size_t at, F f) {
    if (a.kv_type == QWEN3_KV_F32) f((float *)cache + at);
    else if (a.kv_type == QWEN3_KV_BF16) f((bf16_t *)cache + at);
    else f((half_t *)cache + at);
}

/* This lane's part of a head, or of its gains; 0 past its end. */
template <int LANES, int N, class L> DEVICE head_part<N> load_head(const float *v, int half, L load) {
    head_part<N> p;
    UNROLL for (int j = 0; j < N; j++) {
        const int i = pair_at<LANES>(j);
        p.lo[j] = i < half ? load((const float2 *)(const void *)(v + i)) : make_float2(0, 0);
        p.hi[j] = i < half ? load((const float2 *)(const void *)(v + i + half)) : make_float2(0, 0);
    }
    return p;
}
template <int LANES, int N> DEVICE head_part<N> load_head(const float *v, int half) {
    return load_head<LANES, N>(v, half, [](const float2 *p) { return *p; });
}

DEVICE const float *head_gain(const qkv_args &a, int head) {
    return head < a.n_head ? a.q_norm : a.k_norm;
}

/* RMSNorm and rotate-half of one head, times scale, a power of two. */
template <int LANES, int N>
DEVICE void norm_rope(head_part<N> &p, const head_part<N> &gain, const head_angles<N> &angles, int head_dim,
                      float eps, float scale) {
    float sum = 0;
    UNROLL for (int j = 0; j < N; j++)
        sum += p.lo[j].x * p.lo[j].x + p.lo[j].y * p.lo[j].y + p.hi[j].x * p.hi[j].x + p.hi[j].y * p.hi[j].y;
    UNROLL for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(ALL, sum, o);
    const float r = scale * rms_scale(sum * scale * scale, (float)head_dim, eps);
    UNROLL for (int j = 0; j < N; j++) {
        const float2 lo = p.lo[j], hi = p.hi[j];
        const float4 t = angles.of[j];
        const float x0 = lo.x * r * gain.lo[j].x, y0 = hi.x * r * gain.hi[j].x;
        const float x1 = lo.y * r * gain.lo[j].y, y1 = hi.y * r * gain.hi[j].y;
        p.lo[j] = make_float2(x0 * t.x - y0 * t.y, x1 * t.z - y1 * t.w);
        p.hi[j] = make_float2(y0 * t.x + x0 * t.y, y1 * t.z + x1 * t.w);
    }
}

/* What this lane has of a head, to where the head begins. */
template <int LANES, int N, class T> DEVICE void store_pairs(T *to, int half, const head_part<N> &p) {
    UNROLL for (int j = 0; j < N; j++) {
        const int i = pair_at<LANES>(j);
        if (i >= half) break;
        store_2(to + i, p.lo[j].x, p.lo[j].y);
        store_2(to + i + half, p.hi[j].x, p.hi[j].y);
    }
}

/* A rotated head of one row to its place: q in float32, k in the cache with one rounding. */
DEVICE void store_head(const qkv_args &a, int row, int head, const head_part<HEAD_PAIRS> &p,
                       const row_angles &t) {
    const int half = a.head_dim / 2;
    const size_t at = kv_at(a.kv, t.seq, t.position) + (size_t)(head - a.n_head) * a.head_dim;
    if (head < a.n_head) store_pairs<32>(a.qkv + (size_t)row * a.ld + (size_t)head * a.head_dim, half, p);
    else in_cache(a, a.kv.k, at, [&](auto *to) { store_pairs<32>(to, half, p); });
}

/* Element i of q, k and v of row r: v to the cache, the others to where they are finished from. */
DEVICE void store_projection(const qkv_args &a, int r, int i, float v) {
    const int rotated = (a.n_head + a.n_head_kv) * a.head_dim;
    if (i < rotated) a.qkv[(size_t)r * a.ld + i] = v;
    else
        in_cache(a, a.kv.v, kv_at(a.kv, a.rows[r].seq, a.rows[r].position) + (size_t)(i - rotated),
                 [&](auto *to) { store(to, v); });
}

/* Element i of v of a row, with one rounding. */
DEVICE void store_value(const qkv_args &a, const row_angles &t, int i, float v) {
    in_cache(a, a.kv.v, kv_at(a.kv, t.seq, t.position) + (size_t)i, [&](auto *to) { store(to, v); });
}

/* One head of one row, by one warp, whose projection is in a.qkv, maybe just written by another block:
   RMSNorm over its head_dim values, rotate-half, and to its place. */
DEVICE void norm_rope_head(const qkv_args &a, int row, int head, float scale, const row_angles &t) {
    const int half = a.head_dim / 2;
    const float *from = a.qkv + (size_t)row * a.ld + (size_t)head * a.head_dim;
    head_part<HEAD_PAIRS> p =
        load_head<32, HEAD_PAIRS>(from, half, [](const float2 *v) { return __ldcg(v); });
    norm_rope<32>(p, load_head<32, HEAD_PAIRS>(head_gain(a, head), half), t.angles, a.head_dim, a.eps, scale);
    store_head(a, row, head, p, t);
}

/* The rows of W that this block's warps share. */
DEVICE row_range block_share(int n) {
    const row_range r = {share_begin(block_x() * MATVEC_WARPS, n),
                         share_begin((block_x() + 1) * MATVEC_WARPS, n)};
    return r;
}

/* Adds what this block has summed up of each head to its ticket; the block that completes a head norms and
   rotates it. All threads of the block; finished [most]: shared, a flag a head; angles: this warp's row's. */
DEVICE void finish_heads(row_range done, int rows, const qkv_args &a, unsigned *tickets, int *finished,
                         int most, const row_angles &angles) {
    const int rotated = (a.n_head + a.n_head_kv) * a.head_dim;
    const int from = done.first, to = done.end < rotated ? done.end : rotated;
    if (from >= to) return;
    for (int head0 = from / a.head_dim; head0 * a.head_dim < to; head0 += most) {
        const int left = (to - 1) / a.head_dim - head0 + 1, n_heads = left < most ? left : most;
        __threadfence();
        __syncthreads();
        if (tid() < n_heads) {
            const int begin = (head0 + tid()) * a.head_dim, end = begin + a.head_dim;
            const unsigned mine = (unsigned)((end < to ? end : to) - (begin > from ? begin : from));
            const unsigned before = atomicAdd(&tickets[head0 + tid()], mine);
            finished[threadIdx.x] = before + mine == (unsigned)a.head_dim;
            if (finished[threadIdx.x]) tickets[head0 + tid()] = 0;
        }
        __syncthreads();
        __threadfence();
        for (int h = 0; h < n_heads; h++)
            for (int r = warp_id(); finished[h] && r < rows; r += n_threads() / 32)
                norm_rope_head(a, r, head0 + h, 1.0f, r == warp_id() ? angles : load_row_angles(a, r));
    }
}

static qkv_args qkv_arguments(const pass *p, int layer) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    qkv_args a;
    a.qkv = c->qkv; a.ld = c->qkv_ld;
    a.n_head = g->n_head; a.n_head_kv = g->n_head_kv; a.head_dim = g->head_dim; a.eps = g->rms_eps;
    a.q_norm = c->m->layers[layer].q_norm; a.k_norm = c->m->layers[layer].k_norm;
    a.rope = c->rope;
    a.rows = c->rows;
    a.kv.k = c->k + (size_t)layer * c->kv_layer_bytes;
    a.kv.v = c->v + (size_t)layer * c->kv_layer_bytes;
    a.kv.max_ctx = c->desc.max_ctx;
    a.kv.kv_dim = c->kv_dim;
    a.kv_type = c->desc.kv_type;
    return a;
}

static vector_end heads_end(const pass *p, int layer) {
    vector_end e = make_end(END_HEADS, NULL, 0, NULL);
    e.qkv = qkv_arguments(p, layer);
    e.tickets = p->c->qkv_tickets;
    return e;
}

/* stream_qkv_rope: q, k and v of one row in one pass over W [q_dim + 2 kv_dim, n_embd]. The block that
   finishes a head last norms and rotates it; v goes straight from the sum into the cache. tickets [n_head +
   n_head_kv], zero before and after. Equals qwen3i_matmul of wq, wk, wv, then qwen3i_rmsnorm a head,
   qwen3i_rope, one rounding of k and v. */
template <int NR, int RING>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS, 2)
    stream_qkv_rope_kernel(matvec_in in, qkv_args a, unsigned *tickets) {
    QWEN3_DYNAMIC_SHARED(memory);
    __shared__ int finished[STREAM_HEADS];
    const int lane = lane_id(), rotated = (a.n_head + a.n_head_kv) * a.head_dim;
    const row_angles angles = load_row_angles(a, 0);
    stream_rows<NR, false, RING, true>(
        in, warp_share(in.n), memory, [] {}, [](int, int) { return 0.0f; },
        [&](int row, int left, const float (&acc)[NR], float) {
            const int i = row + lane;
            if (lane >= NR || lane >= left) return;
            if (i < rotated) a.qkv[i] = pick(acc, lane);
            else store_value(a, angles, i - rotated, pick(acc, lane));
        });
    finish_heads(block_share(in.n), 1, a, tickets, finished, STREAM_HEADS, angles);
}

/* stream_qkv_heads: the same on Hopper, where a cluster of `parts` blocks has a head: each sums up some of
   its rows, the first gets the sums through its shared memory, norms and rotates them. No block waits for
   what others have stored in global memory, which takes 2 us of the 7 at 0.6B. Grid: parts times heads of q,
   k and v. */
template <int NR, int RING>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS, 2)
    stream_qkv_heads_kernel(matvec_in in, qkv_args a, int parts) {
    QWEN3_DYNAMIC_SHARED(memory);
    mbarrier *arrived = (mbarrier *)(void *)(memory + stream_bytes(in.ldw, RING));
    float *values = (float *)(void *)(arrived + 2);     /* [head_dim] */
    const int lane = lane_id(), dim = a.head_dim, rotated = a.n_head + a.n_head_kv;
    const int head = block_x() / parts, rank = block_x() % parts, row0 = head * dim;
    const int warp = rank * MATVEC_WARPS + warp_id(), warps = parts * MATVEC_WARPS;
    const row_range rows = {row0 + warp * dim / warps, row0 + (warp + 1) * dim / warps};
    const bool finishes = head < rotated && rank == 0 && warp_id() == 0;
    const row_angles angles = load_row_angles(a, 0);
    const head_part<HEAD_PAIRS> gain = load_head<32, HEAD_PAIRS>(head_gain(a, head), finishes ? dim / 2 : 0);
    if (rank == 0 && tid() == 0) {
        barrier_init(arrived, 1);
        barriers_ready();
        barrier_expect(arrived, (unsigned)dim * 4);
    }
    __syncwarp();
    cluster_arrive();
    stream_rows<NR, false, RING, true>(
        in, rows, memory, [] { cluster_wait(); }, [](int, int) { return 0.0f; },
        [&](int row, int left, const float (&acc)[NR], float) {
            const int i = row + lane;
            if (lane >= NR || lane >= left) return;
            if (head < rotated) send_to_block(values + (i - row0), 0, pick(acc, lane), arrived);
            else store_value(a, angles, i - rotated * dim, pick(acc, lane));
        });
    if (!finishes) return;
    barrier_wait(arrived, 0);
    head_part<HEAD_PAIRS> p = load_head<32, HEAD_PAIRS>(values, dim / 2);
    norm_rope<32>(p, gain, angles.angles, dim, a.eps, 1.0f);
    store_head(a, 0, head, p, angles);
}

/* Blocks that share a head of q, k or v as a cluster; 0: where that would leave much of the chip idle, as 48
   heads do with 132 multiprocessors, all blocks share all rows. */
static int head_parts(const pass *p, const qkv_args &a) {
    const int heads = a.n_head + 2 * a.n_head_kv, n_sm = p->c->m->n_sm;
    int parts = 8;
    if (p->c->m->capability < 90) return 0;
    while (parts > 1 && (heads * parts > n_sm || a.head_dim < parts * MATVEC_WARPS)) parts /= 2;
    return heads * parts <= n_sm && 8 * heads * parts >= 7 * n_sm ? parts : 0;
}
template <int RING> static cudaError_t stream_qkv(const pass *p, const matvec_in &in, const qkv_args &a) {
    const int parts = head_parts(p, a), blocks = parts * (a.n_head + 2 * a.n_head_kv);
    const size_t shared = stream_shared(in, RING) + 2 * sizeof(mbarrier) + (size_t)a.head_dim * sizeof(float);
#define CALL(NR) launch_shared(p->early, parts, p->s, grid1(blocks), 32 * MATVEC_WARPS, shared, \
                               stream_qkv_heads_kernel<NR, RING>, in, a, parts)
    if (parts > 0) return a.head_dim <= 2 * parts * MATVEC_WARPS ? CALL(2) : CALL(4);
#undef CALL
#define CALL(NR) launch_stream(p, in, RING, in.n, stream_qkv_rope_kernel<NR, RING>, in, a, p->c->qkv_tickets)
    return stream_rows_at_once(stream_each(p, in.n)) == 3 ? CALL(3) : CALL(4);
#undef CALL
}

static qwen3_result vector_qkv(const pass *p, int layer, const input &h) {
    const matrix &w = p->c->m->layers[layer].qkv;
    if (w.n_parts > 0) return block_qkv(p, layer, h);
    const matvec_in in = vector_input(p, w, h, p->n);
    const qkv_args a = qkv_arguments(p, layer);
    const int ring = stream_ring(p, in, w);
#define CALL(RING) stream_qkv<RING>(p, in, a)
    if (ring) return launched(p, BY_RING(ring, CALL), "stream_qkv");
#undef CALL
    return vector_product(p, in, w, heads_end(p, layer));
}

/* ---- after a product by cuBLASLt ---- */
/* norm_rope_store: the same after a cuBLASLt product, for any number of rows: qkv [rows, ld] times
   scale[row]. One block a row; its warps take turns of the heads of q, k and v. */
static __global__ void __launch_bounds__(256) norm_rope_store_kernel(qkv_args a, const float *scale) {
    const int row = block_x(), rotated = a.n_head + a.n_head_kv;
    const float s = scale ? scale[row] : 1.0f;
    const row_angles t = load_row_angles(a, row);
    for (int head = warp_id(); head < rotated; head += n_threads() / 32) norm_rope_head(a, row, head, s, t);
    const float *v = a.qkv + (size_t)row * a.ld + (size_t)rotated * a.head_dim;
    in_cache(a, a.kv.v, kv_at(a.kv, t.seq, t.position), [&](auto *to) {
        for (int i = 2 * tid(); i < a.kv.kv_dim; i += 2 * n_threads()) {
            const float2 x = *(const float2 *)(const void *)(v + i);
            store_2(to + i, x.x * s, x.y * s);
        }
    });
}

static qwen3_result gemm_qkv(const pass *p, int layer, const input &h) {
    const matrix &w = p->c->m->layers[layer].qkv;
    const qkv_args a = qkv_arguments(p, layer);
    TRY(act_product(p, a.qkv, a.ld, w, 0, w.rows));
    RUN(grid1(p->n), 256, 0, norm_rope_store_kernel, a, h.scale);
    return QWEN3_OK;
}

/* ---- Hopper: how its products end ---- */
#ifdef QWEN3_WGMMA
/* Two neighbours, the first at an even place, in one 32-bit word. */
DEVICE unsigned pack_pair(float2 v, half_t) { return pack_halves(v.x, v.y); }
DEVICE unsigned pack_pair(float2 v, bf16_t) { return pack(v.x, v.y, bf16_t()); }

/* A head of 128 to `to`, if it is not NULL, of which a quad of lanes has the parts or, N = 1, a warp. */
template <class T, int N> DEVICE void store_head_at(T *to, const head_part<N> &p) {
    if constexpr (sizeof(T) == 4) {
        if (to) store_pairs<32 / N>(to, HEAD_DIM / 2, p);
    } else if constexpr (N == 1) {
        unsigned *words = (unsigned *)(void *)(to + 2 * lane_id());
        words[0] = pack_pair(p.lo[0], T());
        words[HEAD_DIM / 4] = pack_pair(p.hi[0], T());
    } else {
        unsigned w[2 * N];
        UNROLL for (int j = 0; j < N; j++) {
            w[j] = pack_pair(p.lo[j], T());
            w[N + j] = pack_pair(p.hi[j], T());
        }
        store_words<2 * N>(to, w);
    }
}

/* A head of one row of a product on Hopper, times scale, to its place: q and k normed and rotated as by
   norm_rope_head. q is kept as F16 (g.out) for the attention that reads an F16 cache, and as float32 for
   others. All lanes; those of rows that the batch has not store nothing. */
template <class T, int N>
DEVICE void finish_head(const hopper_args &g, head_part<N> &p, const head_part<N> &gain,
                        const head_angles<N> &angles, int row, int seq, int position, int head, float scale) {
    const qkv_args &a = g.qkv;
    const bool valid = N == 1 || row < g.rows;
    const int rotated = a.n_head + a.n_head_kv, kv_head = head < rotated ? head - a.n_head : head - rotated;
    if (head < rotated) norm_rope<32 / N>(p, gain, angles, HEAD_DIM, a.eps, scale);
    else UNROLL for (int j = 0; j < N; j++) {
        p.lo[j].x *= scale; p.lo[j].y *= scale; p.hi[j].x *= scale; p.hi[j].y *= scale;
    }
    if (head >= a.n_head) {
        void *cache = head < rotated ? a.kv.k : a.kv.v;
        const size_t at = kv_at(a.kv, seq, position) + (size_t)kv_head * HEAD_DIM;
        if constexpr (!std::is_void<T>::value) store_head_at(valid ? (T *)cache + at : NULL, p);
        else if (a.kv_type == QWEN3_KV_F32) store_head_at(valid ? (float *)cache + at : NULL, p);
        else store_head_at(valid ? (bf16_t *)cache + at : NULL, p);
    } else if (N > 1 && g.out)
        store_head_at(valid ? g.out + (size_t)row * g.ldo + (size_t)head * HEAD_DIM : NULL, p);
    else store_head_at(valid ? a.qkv + (size_t)row * a.ld + (size_t)head * HEAD_DIM : NULL, p);
}

template <class T> DEVICE void ask_row(const to_heads<T> &, large_row &w, const hopper_args &g, int i) {
    w.seq = g.qkv.rows[i].seq;
    w.position = g.qkv.rows[i].position;
}
template <class T, int PARTS, int M>
DEVICE void finish_tile(const to_heads<T> &, const hopper_args &g, const float (&acc)[PARTS][M],
                        const large_row &row, int r, int n, float scale) {
    const head_angles<8> angles = load_angles<4, 8>(g.qkv, HEAD_DIM / 2, row.position);
    UNROLL for (int part = 0; part < PARTS; part++) {
        head_part<8> p;
        UNROLL for (int j = 0; j < 8; j++) {
            const float *lo = acc[part] + 4 * j + 2 * r, *hi = lo + 32;
            p.lo[j] = make_float2(lo[0], lo[1]);
            p.hi[j] = make_float2(hi[0], hi[1]);
        }
        finish_head<T>(g, p, load_head<4, 8>(head_gain(g.qkv, n + part), HEAD_DIM / 2), angles, row.at,
                       row.seq, row.position, n + part, scale);
    }
}

template <class T>
DEVICE void ask_early(const to_heads<T> &, skinny_row &r, const hopper_args &g, int i, int tile) {
    const qkv_args &a = g.qkv;
    r.at = a.rows[i];
    if (tile >= a.n_head + a.n_head_kv) return;
    r.pair = load_head<32, 1>(head_gain(a, tile), HEAD_DIM / 2);
    r.angles = load_angles<32, 1>(a, HEAD_DIM / 2, r.at.position);
}
template <class T>
DEVICE void finish_row(const to_heads<T> &, const hopper_args &g, head_part<1> p, const skinny_row &r,
                       int row, int tile) {
    finish_head<T>(g, p, r.pair, r.angles, row, r.at.seq, r.at.position, tile, 1.0f);
}
#endif

static hopper_args heads_arguments(const pass *p, int layer, const input &h) {
    const matrix &w = p->c->m->layers[layer].qkv;
    hopper_args a = hopper_arguments(p, w, h.scale);
    a.out = p->q_halves ? p->c->hopper_q : NULL;
    a.ldo = p->c->q_dim;
    a.qkv = qkv_arguments(p, layer);
    set_norm(p, h, w, &a);
    return a;
}

static qwen3_result skinny_qkv(const pass *p, int layer, const input &h) {
    const hopper_args a = heads_arguments(p, layer, h);
    const matrix &w = p->c->m->layers[layer].qkv;
    return p->c->desc.kv_type == QWEN3_KV_F16 ?
               skinny_product<to_heads<half_t> >(p, p->c->skinny_h_map, w, a) :
               skinny_product<to_heads<void> >(p, p->c->skinny_h_map, w, a);
}

static qwen3_result large_qkv(const pass *p, int layer, const input &h) {
    const hopper_args a = heads_arguments(p, layer, h);
    const matrix &w = p->c->m->layers[layer].qkv;
    return p->c->desc.kv_type == QWEN3_KV_F16 ? large_product<to_heads<half_t> >(p, p->c->large_h_map, w, a) :
                                                large_product<to_heads<void> >(p, p->c->large_h_map, w, a);
}

/* ================================================================================================
   ATTENTION: a = softmax(q k / sqrt(d)) v
   ================================================================================================ */
struct attention_args {
    const float *q; int ldq;            /* [rows, n_head, head_dim] */
    float       *out; int ldo;          /* [rows, n_head, head_dim] */
    int          n_head, n_head_kv, head_dim;
    float        scale;                 /* 1 / sqrt(head_dim) */
    const row_info *rows;
    kv_layer     kv;
    int          ranks;                 /* attention_decode: blocks of a cluster */
    /* [rows, n_head, splits, head_dim + 2], or as attention_decode has it */
    float       *parts;
    unsigned    *tickets;               /* [rows, gridDim.y], zero before and after */
    half_t      *halves;                /* not NULL: rows of F16, instead of out */
};

DEVICE void store_attention(const attention_args &a, int row, int col, float v) {
    const size_t at = (size_t)row * a.ldo + (size_t)col;
    if (a.halves) store(a.halves + at, v);
    else a.out[at] = v;
}

/* The number of rows from which it follows how each one's attention is split. */
static int rows_to_split(const cuda_ctx *c, int rows) {
    return c->desc.invariant && rows <= SAME_ROWS ? SAME_SPLIT : rows;
}
/* There may be so many times as many parts, and tickets, as that leads one to expect. */
static int more_splits(const cuda_ctx *c) { return c->desc.invariant ? SAME_ROWS / SAME_SPLIT : 1; }

/* How many parts the positions of a row are split into: enough to fill the chip, from the shape alone. */
static int attention_splits(const cuda_ctx *c, int rows) {
    const int want = 2 * c->m->n_sm / (c->m->config.n_head_kv * rows_to_split(c, rows));
    return want < 1 ? 1 : want > MAX_SPLITS ? MAX_SPLITS : want;
}

/* One for each head of a row, or for each of the blocks of attention_decode that are there at once. */
static size_t attention_tickets(const cuda_ctx *c) {
    return most((size_t)c->max_rows * c->m->config.n_head, (size_t)(2 * c->m->n_sm * more_splits(c)));
}

static attention_args attention_arguments(const pass *p, int layer) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    attention_args a;
    a.q = c->qkv; a.ldq = c->qkv_ld;
    a.out = c->attn; a.ldo = c->q_dim;
    a.n_head = g->n_head; a.n_head_kv = g->n_head_kv; a.head_dim = g->head_dim;
    a.scale = (float)(1.0 / sqrt((double)g->head_dim));
    a.rows = c->rows;
    a.kv = qkv_arguments(p, layer).kv;
    a.parts = c->parts;
    a.tickets = c->attn_tickets;
    a.halves = p->halves ? c->hopper_act : NULL;
    return a;
}

/* ---- row by row, whatever the cache and the heads are ---- */
const int SPLIT_HEADS = 4;              /* of one group, which share reads of k and v */
const int SPLIT_STEPS = 4;              /* positions whose k and v a lane asks for at once */

template <class T> struct kv_vector { uint4 raw[sizeof(T) / 2]; };      /* 8 elements */

template <class T> DEVICE kv_vector<T> kv_load(const T *p, bool valid) {
    kv_vector<T> v;
    UNROLL for (int i = 0; i < (int)(sizeof(T) / 2); i++)
        v.raw[i] = valid ? ((const uint4 *)(const void *)p)[i] : make_uint4(0, 0, 0, 0);
    return v;
}
template <class T> DEVICE void kv_unpack(float (&f)[8], const kv_vector<T> &v) {
    unpack(f, v.raw[0], T());
}
template <> __device__ __forceinline__ void kv_unpack<float>(float (&f)[8], const kv_vector<float> &v) {
    float lo[4], hi[4];
    unpack(lo, v.raw[0], 0.0f);
    unpack(hi, v.raw[1], 0.0f);
    UNROLL for (int i = 0; i < 4; i++) { f[i] = lo[i]; f[4 + i] = hi[i]; }
}

/* Softmax over a share of the positions for one head: the largest score, the sum of the weights, and the
   weighted v. A lane holds 8 of the head_dim values; `lanes` of them make a position, so a warp reads 32 /
   lanes at a time. q comes times what makes scores powers of two. */
struct split_head { float q[8], o[8], top, sum; };

DEVICE void split_begin(split_head &h, const float *q, bool valid, float scale) {
    const float4 zero = make_float4(0, 0, 0, 0);
    const float4 lo = valid ? *(const float4 *)(const void *)q : zero,
                 hi = valid ? *(const float4 *)(const void *)(q + 4) : zero;
    const float all[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
    h.top = LOWEST;
    h.sum = 0;
    UNROLL for (int i = 0; i < 8; i++) { h.o[i] = 0; h.q[i] = all[i] * scale; }
}

/* Scores to weights: the first `left` of them, `each` apart. What came before shrinks as the top rises. */
DEVICE void split_weigh(split_head &h, float (&score)[SPLIT_STEPS], int left, int each, int lanes) {
    float top = h.top;
    UNROLL for (int u = 0; u < SPLIT_STEPS; u++) top = fmaxf(top, score[u]);
    for (int o = 16; o >= lanes; o >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
    const float keep = exp2f(h.top - top);
    h.top = top;
    h.sum *= keep;
    UNROLL for (int i = 0; i < 8; i++) h.o[i] *= keep;
    UNROLL for (int u = 0; u < SPLIT_STEPS; u++) {
        score[u] = u * each < left ? exp2f(score[u] - top) : 0.0f;
        h.sum += score[u];
    }
}

/* Adds the next SPLIT_STEPS times 32 / lanes positions, of which `left` are there; this lane's k and v. */
template <class T>
DEVICE void split_step(split_head (&heads)[SPLIT_HEADS], const T *k, const T *v, int stride, int left,
                       int lanes, bool owner) {
    const int sub = lane_id() / lanes, each = 32 / lanes;
    kv_vector<T> kr[SPLIT_STEPS], vr[SPLIT_STEPS];
    float score[SPLIT_HEADS][SPLIT_STEPS], f[8];
    UNROLL for (int u = 0; u < SPLIT_STEPS; u++) {
        const int p = u * each + sub;
        kr[u] = kv_load<T>(k + (size_t)p * stride, owner && p < left);
        vr[u] = kv_load<T>(v + (size_t)p * stride, owner && p < left);
    }
    UNROLL for (int u = 0; u < SPLIT_STEPS; u++) {
        kv_unpack<T>(f, kr[u]);
        UNROLL for (int g = 0; g < SPLIT_HEADS; g++) {
            float d = 0;
            UNROLL for (int i = 0; i < 8; i++) d += heads[g].q[i] * f[i];
            for (int o = lanes / 2; o > 0; o >>= 1) d += __shfl_xor_sync(ALL, d, o);
            score[g][u] = u * each + sub < left ? d : LOWEST;
        }
    }
    UNROLL for (int g = 0; g < SPLIT_HEADS; g++) split_weigh(heads[g], score[g], left - sub, each, lanes);
    UNROLL for (int u = 0; u < SPLIT_STEPS; u++) {
        kv_unpack<T>(f, vr[u]);
        UNROLL for (int g = 0; g < SPLIT_HEADS; g++)
            UNROLL for (int i = 0; i < 8; i++) heads[g].o[i] += score[g][u] * f[i];
    }
}

struct split_shared {
    float part[SPLIT_WARPS][SPLIT_HEADS][MAX_HEAD_DIM], top[SPLIT_WARPS][SPLIT_HEADS],
          sum[SPLIT_WARPS][SPLIT_HEADS], weight[SPLIT_HEADS][MAX_SPLITS];
    int   last;
};

/* What this warp has of head g, its lanes' positions added up, to shared memory. */
DEVICE void split_store(split_shared &m, split_head &h, int g, int lanes, int at, bool owner) {
    for (int o = 16; o >= lanes; o >>= 1) {
        h.sum += __shfl_xor_sync(ALL, h.sum, o);
        UNROLL for (int i = 0; i < 8; i++) h.o[i] += __shfl_xor_sync(ALL, h.o[i], o);
    }
    if (lane_id() < lanes && owner) UNROLL for (int i = 0; i < 8; i++) m.part[warp_id()][g][at + i] = h.o[i];
    if (lane_id() == 0) { m.top[warp_id()][g] = h.top; m.sum[warp_id()][g] = h.sum; }
}

/* The block's part, from its warps', to where the parts of a row are joined; or done, if it is the only
   one. */
static __device__ void split_publish(const attention_args &a, const split_shared &m, int row, int head0,
                                     int n_g, bool only) {
    const int dim = a.head_dim;
    NO_UNROLL for (int i = tid(); i < n_g * dim; i += 32 * SPLIT_WARPS) {
        const int g = i / dim, d = i % dim;
        float top = LOWEST, sum = 0, o = 0;
        for (int w = 0; w < SPLIT_WARPS; w++) top = fmaxf(top, m.top[w][g]);
        for (int w = 0; w < SPLIT_WARPS; w++) {
            const float keep = exp2f(m.top[w][g] - top);
            sum += m.sum[w][g] * keep;
            if (m.sum[w][g] > 0) o += m.part[w][g][d] * keep;
        }
        if (only) store_attention(a, row, (head0 + g) * dim + d, o / sum);
        else {
            float *to = a.parts +
                        (((size_t)row * a.n_head + (size_t)(head0 + g)) * gridDim.z + blockIdx.z) * (dim + 2);
            to[d] = o;
            if (d == 0) { to[dim] = top; to[dim + 1] = sum; }
        }
    }
}

/* Joins a row's parts, in order, in the block that is the last of `active` to come. */
static __device__ void split_join(const attention_args &a, split_shared &m, int row, int head0, int n_g,
                                  int active) {
    const int dim = a.head_dim;
    const size_t stride = (size_t)(dim + 2);
    const float *parts = a.parts + ((size_t)row * a.n_head + head0) * gridDim.z * stride;
    __threadfence();
    __syncthreads();
    if (tid() == 0) {
        unsigned *ticket = &a.tickets[(size_t)row * gridDim.y + blockIdx.y];
        m.last = atomicAdd(ticket, 1u) == (unsigned)active - 1;
        if (m.last) *ticket = 0;
    }
    __syncthreads();
    if (!m.last) return;
    __threadfence();
    /* how much each part counts: a lane for each */
    NO_UNROLL for (int g = warp_id(); g < n_g; g += SPLIT_WARPS) {
        const int lane = lane_id();
        const float *one = parts + ((size_t)g * gridDim.z + (lane < active ? lane : 0)) * stride + dim;
        const float top = lane < active ? __ldcg(one) : LOWEST, sum = lane < active ? __ldcg(one + 1) : 0.0f;
        const float keep = exp2f(top - warp_max(top));
        m.weight[g][lane] = keep / warp_sum(sum * keep);
    }
    __syncthreads();
    NO_UNROLL for (int i = tid(); i < n_g * dim; i += 32 * SPLIT_WARPS) {
        const int g = i / dim, d = i % dim;
        float o = 0;
        for (int p = 0; p < active; p++)
            o += __ldcg(parts + ((size_t)g * gridDim.z + p) * stride + d) * m.weight[g][p];
        store_attention(a, row, (head0 + g) * dim + d, o);
    }
}

/* attention, any rows: out[row, head, :] = softmax(q k^T * scale) v over positions 0 .. position of the row's
   sequence, all float32; with a.halves, rounded once to F16. Grid (rows, n_head_kv * ceil(group /
   SPLIT_HEADS), splits), 4 warps: a block takes one part of the positions for up to SPLIT_HEADS heads of one
   group; its warps take turns of positions. The block of a row that finishes last joins the parts, in order.
   How the positions are split depends on the row's own length and on gridDim.z. The plain fallback: for a
   cache or heads that no tensor core is used for. Equals qwen3i_attention. */
template <class T>
static __global__ void __launch_bounds__(32 * SPLIT_WARPS) attention_split_kernel(attention_args a) {
    __shared__ split_shared shared;
    const int group = a.n_head / a.n_head_kv, chunks = ceil_div(group, SPLIT_HEADS);
    const int row = block_x(), kv_head = block_y() / chunks, g0 = block_y() % chunks * SPLIT_HEADS;
    const int n_g = least(group - g0, SPLIT_HEADS), head0 = kv_head * group + g0, dim = a.head_dim;
    wait_for_previous();
    let_next_start();
    const int n = a.rows[row].position + 1, length = split_length(n, (int)gridDim.z),
              active = ceil_div(n, length);
    const int begin = (int)blockIdx.z * length, end = least(begin + length, n);
    const size_t first = kv_at(a.kv, a.rows[row].seq, 0) + (size_t)kv_head * dim;
    if (begin >= n) return;
    int lanes = 1;
    while (lanes * 8 < dim) lanes *= 2;
    const int at = lane_id() % lanes * 8, step = SPLIT_STEPS * (32 / lanes);
    const bool owner = at < dim;
    const T *k = (const T *)a.kv.k + first + at, *v = (const T *)a.kv.v + first + at;
    const float *q = a.q + (size_t)row * a.ldq + (size_t)head0 * dim + at;
    split_head heads[SPLIT_HEADS];
    UNROLL for (int g = 0; g < SPLIT_HEADS; g++)
        split_begin(heads[g], q + g * dim, owner && g < n_g, a.scale * LOG2E);
    for (int p = begin + warp_id() * step; p < end; p += SPLIT_WARPS * step)
        split_step<T>(heads, k + (size_t)p * a.kv.kv_dim, v + (size_t)p * a.kv.kv_dim, a.kv.kv_dim, end - p,
                      lanes, owner);
    UNROLL for (int g = 0; g < SPLIT_HEADS; g++) split_store(shared, heads[g], g, lanes, at, owner);
    __syncthreads();
    split_publish(a, shared, row, head0, n_g, active == 1);
    if (active > 1) split_join(a, shared, row, head0, n_g, active);
}

template <class T> static cudaError_t attention_split(const pass *p, const attention_args &a) {
    const int chunks = ceil_div(a.n_head / a.n_head_kv, SPLIT_HEADS), splits = attention_splits(p->c, p->n);
    const dim3 grid((unsigned)p->n, (unsigned)(a.n_head_kv * chunks), (unsigned)splits);
    return launch_early(p->early, p->s, grid, 32 * SPLIT_WARPS, 0, attention_split_kernel<T>, a);
}

/* ---- row by row, by tensor cores ---- */
/* Where element (row, 8 * chunk) of a [rows, HEAD_DIM] tile lies in shared memory: chunks are mixed so that
   eight rows of one column of chunks fall into different banks. */
DEVICE int tile_at(int row, int chunk) { return row * HEAD_DIM + ((chunk ^ (row & 7)) * 8); }

/* attention, decode: the same for rows of which each is the newest of its sequence or nearly so, by tensor
   cores. A block has up to 8 heads of one group as columns of a product, and a part of the positions, of
   which each of its 8 warps takes 16 in turn. What was in the cache before this step is on its way to shared
   memory before the kernel before has ended: each warp has three pieces under way, k and v of 16 positions in
   turn. q and the weights p go in as TERMS 16-bit terms each (2 of F16, 3 of BF16), so what is lost is
   float32's rounding, not theirs; each turn's sums start from zero and are added in float32. The blocks of a
   cluster (`ranks`, sm_90 on) join their parts in each other's shared memory: each finishes a slice of the
   outputs. A further cluster helps where a block would have more than DECODE_EACH positions; then the block
   that finishes a slice last joins those of all clusters, in order. Grid (clusters * ranks, n_head_kv *
   ceil(group / 8), rows). Order of the sums: a warp's turns, warps, blocks, clusters; it depends on the
   row's own length and the grid's shape. Equals qwen3i_attention. Needs head_dim 128 and a 16-bit cache. */
const int DECODE_RANKS  = 8;            /* at most */
const int DECODE_WARPS  = 8;
const int DECODE_HEADS  = 8;
const int DECODE_POS    = 16;
const int DECODE_ROUND  = DECODE_WARPS * DECODE_POS;
const int DECODE_PIECES = 3;
/* of rows in shared memory: different banks for different heads */
const int DECODE_PITCH  = HEAD_DIM + 4;
const int DECODE_EACH   = 512;            /* positions of a block, before a further cluster helps */
const int DECODE_CLUSTERS = 16;         /* at most */
const int DECODE_SAME   = 8;              /* see shape_decode */

struct decode_shared {
    /* then each warp's part: float [HEADS][PITCH] */
    half_t   ring[DECODE_WARPS][DECODE_PIECES][DECODE_POS * HEAD_DIM];
    float    top[DECODE_WARPS][DECODE_HEADS], sum[DECODE_WARPS][DECODE_HEADS];
    /* [ranks][slice]: from every block, what this one finishes, ... */
    float    in[DECODE_HEADS * HEAD_DIM];
    /* ... and of every head */
    float    in_top[DECODE_RANKS][DECODE_HEADS], in_sum[DECODE_RANKS][DECODE_HEADS];
    mbarrier arrived;
    unsigned last;
};

/* What this block has of a row: heads head0 .. head0 + n_g, positions begin .. end of n; of these, those from
   `fresh` on may be of this very batch. It finishes `slice` outputs. */
struct decode_share {
    int row, seq, kv_head, head0, n_g, rank, ranks, cluster, clusters, active, begin, end, fresh, slice;
};

DEVICE decode_share share_of_block(const attention_args &a) {
    const int group = a.n_head / a.n_head_kv, chunks = ceil_div(group, DECODE_HEADS),
              g0 = block_y() % chunks * DECODE_HEADS;
    const row_info info = a.rows[blockIdx.z];
    const int n = info.position + 1;
    decode_share w;
    w.row = (int)blockIdx.z;
    w.seq = info.seq;
    w.kv_head = block_y() / chunks;
    w.head0 = w.kv_head * group + g0;
    w.n_g = least(group - g0, DECODE_HEADS);
    w.ranks = a.ranks;
    w.rank = block_x() % a.ranks;
    w.cluster = block_x() / a.ranks;
    w.clusters = (int)gridDim.x / a.ranks;
    w.active = least(ceil_div(n, a.ranks * DECODE_EACH), w.clusters);
    const int length = round_up(ceil_div(n, w.active * a.ranks), DECODE_POS);
    w.begin = block_x() * length;
    w.end = least(w.begin + length, n);
    w.fresh = n - 1 - w.row;            /* no more rows than this come before it */
    w.slice = w.n_g * HEAD_DIM / a.ranks;
    return w;
}

/* This warp's pieces: k, then v, of 16 positions from `first`, first + ROUND, ... on, up to `end`. A lane
   copies 16 bytes of every other position. */
template <class T> struct decode_stream {
    const T *k, *v;                     /* this lane's, of position 0 */
    T       *ring;
    size_t   stride;
    int      first, end, fresh, piece, put, take;

    __device__ __forceinline__ decode_stream(const attention_args &a, const decode_share &w, half_t *memory,
                                             int begin) {
        const int half = lane_id() / 16, chunk = lane_id() % 16;
        const size_t from = kv_at(a.kv, w.seq, half) + (size_t)w.kv_head * HEAD_DIM + (size_t)(chunk * 8);
        k = (const T *)a.kv.k + from; v = (const T *)a.kv.v + from;
        ring = (T *)(void *)memory;
        stride = (size_t)a.kv.kv_dim;
        first = begin; end = w.end; fresh = least(w.fresh, w.end); piece = put = take = 0;
    }
    /* Of piece i, the positions from `from` to `to`, to its place in the ring; zeros past the end. */
    __device__ __forceinline__ void copy(int i, int place, int from, int to) const {
        const int p0 = first + i / 2 * DECODE_ROUND, half = lane_id() / 16;
        const T *source = (i % 2 ? v : k) + (size_t)p0 * stride;
        T *target = ring + place * (DECODE_POS * HEAD_DIM) + tile_at(half, lane_id() % 16);
        if (p0 >= to || p0 + DECODE_POS <= from) return;
        if (p0 >= from && p0 + DECODE_POS <= to) {
            UNROLL for (int j = 0; j < DECODE_POS / 2; j++)
                copy_once(place_of(target, j), source + (size_t)(2 * j) * stride, true);
            return;
        }
        NO_UNROLL for (int j = 0; j < DECODE_POS / 2; j++) {
            const int p = p0 + 2 * j + half;
            if (p >= end ? p0 < from : p < from || p >= to) continue;   /* nothing is written twice */
            copy_once(place_of(target, j), p < end ? source + (size_t)(2 * j) * stride : k, p < end);
        }
    }
    /* This lane's 16 bytes 2 j positions further: see tile_at. */
    DEVICE T *place_of(T *target, int j) {
        const int chunk = lane_id() % 16 ^ lane_id() / 16;
        return target + 2 * j * HEAD_DIM + ((chunk ^ (2 * j & 7)) - chunk) * 8;
    }
    __device__ __forceinline__ void fetch(int to) {
        copy(piece++, put, 0, to);
        copy_commit();
        put = put + 1 < DECODE_PIECES ? put + 1 : 0;
    }
    /* Before the kernel before has ended: all but what it may write; ... */
    __device__ __forceinline__ void begin() {
        NO_UNROLL for (int i = 0; i < DECODE_PIECES; i++) fetch(fresh);
    }
    /* ... and that, once it has. */
    __device__ __forceinline__ void complete() {
        if (fresh >= end || first + (DECODE_PIECES - 1) / 2 * DECODE_ROUND + DECODE_POS <= fresh) return;
        NO_UNROLL for (int i = 0; i < DECODE_PIECES; i++) copy(i, i, fresh, end);
        copy_commit();
        copy_wait<0>();
    }
    __device__ __forceinline__ const T *next() {
        copy_wait<DECODE_PIECES - 1>();
        __syncwarp();
        return ring + take * (DECODE_POS * HEAD_DIM);
    }
    __device__ __forceinline__ void done() {            /* with what next() gave */
        __syncwarp();
        fetch(end);
        take = take + 1 < DECODE_PIECES ? take + 1 : 0;
    }
};

/* Up to 8 heads: q as right operands (of head quad = lane / 4); and of heads pair = lane % 4 * 2 and pair + 1
   the largest score, the sum of the weights, and the outputs so far: o[i]: dim 16 i + quad of both, then dim
   16 i + quad + 8. */
template <class T, int TERMS> struct decode_state {
    unsigned q[TERMS][HEAD_DIM / 16][2];
    float    scale[2], top[2], sum[2], o[HEAD_DIM / 16][4];

    __device__ __forceinline__ decode_state(const attention_args &a, const decode_share &w) {
        const int quad = lane_id() / 4, pair = lane_id() % 4 * 2;
        const float *from = a.q + (size_t)w.row * a.ldq + (size_t)(w.head0 + quad) * HEAD_DIM + pair;
        float2 v[HEAD_DIM / 8];
        float most = 0;
        UNROLL for (int i = 0; i < HEAD_DIM / 8; i++) {
            v[i] = quad < w.n_g ? *(const float2 *)(const void *)(from + 8 * i) : make_float2(0, 0);
            most = fmaxf(most, fmaxf(fabsf(v[i].x), fabsf(v[i].y)));
        }
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
        const float up = half_scale(most), to_powers = a.scale * LOG2E * (1.0f / up);
        UNROLL for (int i = 0; i < HEAD_DIM / 8; i++) { v[i].x *= up; v[i].y *= up; }
        UNROLL for (int t = 0; t < TERMS; t++)
            UNROLL for (int i = 0; i < HEAD_DIM / 8; i++) q[t][i / 2][i % 2] = pack(v[i].x, v[i].y, T());
        UNROLL for (int h = 0; h < 2; h++) {
            scale[h] = __shfl_sync(ALL, to_powers, (pair + h) * 4);
            top[h] = LOWEST;
            sum[h] = 0;
        }
        UNROLL for (int i = 0; i < HEAD_DIM / 16; i++)
            UNROLL for (int e = 0; e < 4; e++) o[i][e] = 0;
    }
    /* k q: positions quad and quad + 8 of both heads */
    __device__ __forceinline__ void scores(float (&s)[4], const T *k) const {
        const int lane = lane_id();
        UNROLL for (int e = 0; e < 4; e++) s[e] = 0;
        UNROLL for (int d = 0; d < HEAD_DIM / 16; d++) {
            unsigned f[4];
            load_matrices(f, k + tile_at(lane % 16, 2 * d + lane / 16));
            UNROLL for (int t = TERMS - 1; t >= 0; t--) multiply(s, f, q[t][d][0], q[t][d][1], T());
        }
    }
    /* Scores to weights, of the first `left` positions; keep: what the sums so far are to be multiplied
       by. */
    __device__ __forceinline__ void weigh(float (&s)[4], float (&keep)[2], int left) {
        const int quad = lane_id() / 4;
        UNROLL for (int h = 0; h < 2; h++) {
            float &x = s[h], &y = s[2 + h];
            x = quad < left ? x * scale[h] : LOWEST;
            y = quad + 8 < left ? y * scale[h] : LOWEST;
            float high = fmaxf(top[h], fmaxf(x, y));
            UNROLL for (int i = 4; i < 32; i *= 2) high = fmaxf(high, __shfl_xor_sync(ALL, high, i));
            keep[h] = exp2f(top[h] - high);
            top[h] = high;
            x = exp2f(x - high + 14.0f);                /* times 2^14: F16 then has the small ones, too */
            y = exp2f(y - high + 14.0f);
            sum[h] = sum[h] * keep[h] + (x + y);
        }
    }
    __device__ __forceinline__ void add_values(float (&s)[4], const float (&keep)[2], const T *v) {
        const int lane = lane_id();
        /* the weights as right operands: 8 positions by 8 heads, transposed */
        unsigned p[TERMS][2];
        UNROLL for (int t = 0; t < TERMS; t++)
            UNROLL for (int j = 0; j < 2; j++) p[t][j] = transpose_matrix(pack(s[2 * j], s[2 * j + 1], T()));
        UNROLL for (int d = 0; d < HEAD_DIM / 16; d++) {
            float sums[4] = {0, 0, 0, 0};
            unsigned f[4];
            load_matrices_transposed(f,
                                     v + tile_at(lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
            UNROLL for (int t = TERMS - 1; t >= 0; t--) multiply(sums, f, p[t][0], p[t][1], T());
            UNROLL for (int e = 0; e < 4; e++) o[d][e] = o[d][e] * keep[e % 2] + sums[e];
        }
    }
    /* To shared memory: part [HEADS][PITCH], top, sum [HEADS]. */
    __device__ __forceinline__ void store(float *part, float *tops, float *sums) {
        const int quad = lane_id() / 4, pair = lane_id() % 4 * 2;
        UNROLL for (int h = 0; h < 2; h++) {
            UNROLL for (int i = 4; i < 32; i *= 2) sum[h] += __shfl_xor_sync(ALL, sum[h], i);
            if (quad == 0) { tops[pair + h] = top[h]; sums[pair + h] = sum[h]; }
            UNROLL for (int i = 0; i < HEAD_DIM / 16; i++) {
                part[(pair + h) * DECODE_PITCH + 16 * i + quad] = o[i][h];
                part[(pair + h) * DECODE_PITCH + 16 * i + quad + 8] = o[i][2 + h];
            }
        }
    }
};

/* This block's part of every head, from its warps', to the blocks that finish them. */
DEVICE void send_parts(decode_shared &m, const decode_share &w) {
    const int warps = w.end > w.begin ? least(ceil_div(w.end - w.begin, DECODE_POS), DECODE_WARPS) : 0;
    for (int i = tid(); i < w.n_g * HEAD_DIM; i += 32 * DECODE_WARPS) {
        const int g = i / HEAD_DIM, d = i % HEAD_DIM;
        float top = LOWEST, sum = 0, o = 0;
        for (int j = 0; j < warps; j++) top = fmaxf(top, m.top[j][g]);
        for (int j = 0; j < warps; j++) {
            const float keep = exp2f(m.top[j][g] - top);
            sum += m.sum[j][g] * keep;
            o += ((const float *)(const void *)m.ring[j])[g * DECODE_PITCH + d] * keep;
        }
        float *to = &m.in[w.rank * w.slice + i % w.slice];
        if (w.ranks > 1) send_to_block(to, (unsigned)(i / w.slice), o, &m.arrived);
        else *to = o;
        if (d >= w.ranks) continue;
        if (w.ranks > 1) {
            send_to_block(&m.in_top[w.rank][g], (unsigned)d, top, &m.arrived);
            send_to_block(&m.in_sum[w.rank][g], (unsigned)d, sum, &m.arrived);
        } else { m.in_top[0][g] = top; m.in_sum[0][g] = sum; }
    }
}

/* Adds one more part of an output to those so far. */
struct joined { float top, sum, o; };
DEVICE void join(joined &j, float top, float sum, float o) {
    const float high = fmaxf(j.top, top), keep = exp2f(j.top - high), more = exp2f(top - high);
    j.top = high;
    j.sum = j.sum * keep + sum * more;
    j.o = j.o * keep + o * more;
}

/* The outputs that this block finishes: from all blocks of its cluster to `part` of this cluster, or done. */
DEVICE void finish_cluster(const attention_args &a, const decode_shared &m, const decode_share &w,
                           float *part) {
    for (int i = tid(); i < w.slice; i += 32 * DECODE_WARPS) {
        const int at = w.rank * w.slice + i, g = at / HEAD_DIM;
        joined j = {LOWEST, 0, 0};
        for (int r = 0; r < w.ranks; r++) join(j, m.in_top[r][g], m.in_sum[r][g], m.in[r * w.slice + i]);
        if (w.active > 1) { part[3 * i] = j.top; part[3 * i + 1] = j.sum; part[3 * i + 2] = j.o; }
        else store_attention(a, w.row, w.head0 * HEAD_DIM + at, j.o / j.sum);
    }
}

/* The same from all clusters, by the block that is the last to come. */
DEVICE void finish_all(const attention_args &a, decode_shared &m, const decode_share &w, unsigned *ticket,
                       const float *parts) {
    __threadfence();
    __syncthreads();
    if (tid() == 0) {
        m.last = atomicAdd(ticket, 1u) == (unsigned)w.active - 1;
        if (m.last) *ticket = 0;
    }
    __syncthreads();
    if (!m.last) return;
    __threadfence();
    for (int i = tid(); i < w.slice; i += 32 * DECODE_WARPS) {
        joined j = {LOWEST, 0, 0};
        for (int c = 0; c < w.active; c++) {
            const float *part = parts + 3 * (c * w.slice + i);
            join(j, __ldcg(part), __ldcg(part + 1), __ldcg(part + 2));
        }
        store_attention(a, w.row, w.head0 * HEAD_DIM + w.rank * w.slice + i, j.o / j.sum);
    }
}

template <class T, int TERMS>
static __global__ void __launch_bounds__(32 * DECODE_WARPS, TERMS == 2 ? 2 : 1)
    attention_decode_kernel(attention_args a) {
    QWEN3_DYNAMIC_SHARED(memory);
    decode_shared &m = *(decode_shared *)(void *)memory;
    /* the rows were written several kernels before, the cache but for this batch's positions by earlier
       steps */
    const decode_share w = share_of_block(a);
    if (w.cluster >= w.active) return;
    const int warp = warp_id(), first = w.begin + warp * DECODE_POS;
    decode_stream<T> stream(a, w, m.ring[warp][0], first);
    if (w.ranks > 1) {
        if (tid() == 0) {
            barrier_init(&m.arrived, 1);
            barriers_ready();
            barrier_expect(&m.arrived, (unsigned)(w.ranks * (w.slice + 2 * w.n_g) * 4));
        }
        __syncwarp();
        cluster_arrive();
    }
    stream.begin();
    let_next_start();
    wait_for_previous();
    stream.complete();
    decode_state<T, TERMS> state(a, w);
    for (int p = first; p < w.end; p += DECODE_ROUND) {
        float s[4], keep[2];
        state.scores(s, stream.next());
        stream.done();
        state.weigh(s, keep, w.end - p);
        state.add_values(s, keep, stream.next());
        stream.done();
    }
    copy_wait<0>();
    __syncwarp();
    if (first < w.end) state.store((float *)(void *)m.ring[warp], m.top[warp], m.sum[warp]);
    __syncthreads();
    if (w.ranks > 1) cluster_wait();    /* all blocks have begun */
    send_parts(m, w);
    if (w.ranks > 1) barrier_wait(&m.arrived, 0);
    else __syncthreads();
    const size_t place = ((size_t)w.row * gridDim.y + blockIdx.y) * (size_t)w.ranks + (size_t)w.rank;
    float *parts = a.parts + place * (size_t)(3 * w.clusters * w.slice);
    finish_cluster(a, m, w, parts + 3 * w.cluster * w.slice);
    if (w.active > 1) finish_all(a, m, w, &a.tickets[place], parts);
}

/* How attention_decode is launched for rows of n_groups groups of heads: ranks 0: not at all. */
struct decode_shape { int ranks, clusters, n_groups; };

/* Two blocks fit on a multiprocessor, but one each leaves room for the kernels before and after. In an
   invariant context all numbers of rows have the shape of DECODE_SAME, with as many clusters as its room for
   positions can use and half a chip holds: one row of them alone has work for no more. */
static decode_shape shape_decode(const pass *p, const attention_args &a) {
    const cuda_model *m = p->c->m;
    const bool halves = p->c->desc.kv_type != QWEN3_KV_F32, clusters = m->capability >= 90;
    const bool same = p->c->desc.invariant && p->n <= SAME_ROWS;
    const int rows = same ? DECODE_SAME : p->n;
    decode_shape s = {0, 1, a.n_head_kv * ceil_div(a.n_head / a.n_head_kv, DECODE_HEADS)};
    if (!halves || a.head_dim != HEAD_DIM || m->capability < 80 || sizeof(decode_shared) > m->block_shared)
        return s;
    s.ranks = 1;
    while (clusters && s.ranks < DECODE_RANKS && 2 * s.ranks * s.n_groups * rows <= 2 * m->n_sm) s.ranks *= 2;
    s.clusters = least(most(m->n_sm / (s.ranks * s.n_groups * (same ? 2 : rows)), 1), DECODE_CLUSTERS);
    if (same) s.clusters = least(s.clusters, ceil_div(p->c->desc.max_ctx, s.ranks * DECODE_EACH));
    return s;
}
template <class T, int TERMS>
static cudaError_t launch_decode(const pass *p, attention_args a, const decode_shape &s) {
    const dim3 grid((unsigned)(s.clusters * s.ranks), (unsigned)s.n_groups, (unsigned)p->n);
    a.ranks = s.ranks;
    return launch_shared(p->early, s.ranks, p->s, grid, 32 * DECODE_WARPS, sizeof(decode_shared),
                         attention_decode_kernel<T, TERMS>, a);
}

/* ---- many rows of a sequence, by tensor cores ---- */
/* 32 positions of k and v to shared memory; zeros past n. */
template <class T>
DEVICE void load_kv_tile(T *ks, T *vs, const T *k, const T *v, int stride, int p0, int n) {
    for (int i = tid(); i < TILE_POS * HEAD_DIM / 8; i += 128) {
        const int p = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
        const bool valid = p0 + p < n;
        const size_t from = (size_t)(valid ? p0 + p : 0) * stride + (size_t)(chunk * 8);
        copy_async(ks + tile_at(p, chunk), k + from, valid);
        copy_async(vs + tile_at(p, chunk), v + from, valid);
    }
    copy_commit();
}

/* One row of q as TERMS 16-bit rows that add up to q * 2^k; returns 2^-k. By one warp. */
template <class T, int TERMS> DEVICE float split_q_row(T *qs, int row, const float *q) {
    const int lane = lane_id();
    float v[HEAD_DIM / 32], top = 0;
    UNROLL for (int i = 0; i < HEAD_DIM / 32; i++) {
        v[i] = q ? q[lane * (HEAD_DIM / 32) + i] : 0.0f;
        top = fmaxf(top, fabsf(v[i]));
    }
    const float up = half_scale(warp_max(top));
    UNROLL for (int i = 0; i < HEAD_DIM / 32; i++) v[i] *= up;
    UNROLL for (int t = 0; t < TERMS; t++)
        UNROLL for (int i = 0; i < HEAD_DIM / 32; i += 2) {
            const int d = lane * (HEAD_DIM / 32) + i;
            *(unsigned *)(void *)(qs + (size_t)t * TILE_ROWS * HEAD_DIM + tile_at(row, d / 8) + d % 8) =
                pack(v[i], v[i + 1], T());
        }
    return 1.0f / up;
}

/* What is known of this thread's two rows, quad and quad + 8 of its warp's 16: what makes scores powers of
   two, the last position that it sees, the largest score, the sum of the weights. */
struct tile_rows { float scale[2]; int last[2]; float top[2], sum[2]; };

/* The tile's rows of q to shared memory, by the warps that need them. */
template <class T, int TERMS>
DEVICE void tile_begin(tile_rows &rows, T *qs, const attention_args &a, const attention_tile &tile,
                       int kv_head) {
    const int group = a.n_head / a.n_head_kv, warp = warp_id(), quad = lane_id() / 4;
    for (int i = 0; i < 16; i++) {
        const int row = warp * 16 + i, token = row / group;
        const float *q = token < tile.n_tokens ? a.q + (size_t)(tile.row0 + token) * a.ldq +
                                                     (size_t)(kv_head * group + row % group) * HEAD_DIM :
                                                 NULL;
        const float s = split_q_row<T, TERMS>(qs, row, q) * a.scale * LOG2E;
        if (i == quad) rows.scale[0] = s;
        if (i == quad + 8) rows.scale[1] = s;
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const int token = (warp * 16 + quad + 8 * i) / group;
        rows.last[i] = tile.pos0 + (token < tile.n_tokens ? token : tile.n_tokens - 1);
        rows.top[i] = LOWEST;
        rows.sum[i] = 0;
    }
}

/* q k: of rows quad, quad + 8; positions 8 i + pair, + 1 */
template <class T, int TERMS>
DEVICE void tile_scores(float (&s)[TILE_POS / 8][4], const T *qs, const T *kt) {
    const int lane = lane_id();
    UNROLL for (int i = 0; i < TILE_POS / 8; i++)
        UNROLL for (int j = 0; j < 4; j++) s[i][j] = 0;
    UNROLL for (int d = 0; d < HEAD_DIM / 8; d += 2) {
        unsigned b[TILE_POS / 16][4], f[4];
        UNROLL for (int i = 0; i < TILE_POS / 16; i++)
            load_matrices(b[i], kt + tile_at(i * 16 + lane % 8 + lane / 16 * 8, d + lane / 8 % 2));
        UNROLL for (int t = TERMS - 1; t >= 0; t--) {
            load_matrices(f, qs + t * TILE_ROWS * HEAD_DIM +
                                 tile_at(warp_id() * 16 + lane % 16, d + lane / 16));
            UNROLL for (int i = 0; i < TILE_POS / 16; i++) {
                multiply(s[2 * i], f, b[i][0], b[i][1], T());
                multiply(s[2 * i + 1], f, b[i][2], b[i][3], T());
            }
        }
    }
}

/* Scores of positions from p0 on to weights; keep: what the sums so far are to be multiplied by. */
DEVICE void tile_weigh(float (&s)[TILE_POS / 8][4], float (&keep)[2], tile_rows &rows, int p0) {
    const int pair = lane_id() % 4 * 2;
    UNROLL for (int r = 0; r < 2; r++) {
        float high = rows.top[r], part = 0;
        UNROLL for (int i = 0; i < TILE_POS / 8; i++)
            UNROLL for (int j = 0; j < 2; j++) {
                float &x = s[i][2 * r + j];
                x = p0 + i * 8 + pair + j <= rows.last[r] ? x * rows.scale[r] : LOWEST;
                high = fmaxf(high, x);
            }
        high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
        high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
        keep[r] = exp2f(rows.top[r] - high);
        rows.top[r] = high;
        UNROLL for (int i = 0; i < TILE_POS / 8; i++)
            UNROLL for (int j = 0; j < 2; j++) {
                float &x = s[i][2 * r + j];
                x = exp2f(x - high + 14.0f);            /* times 2^14: F16 then has the small ones, too */
                part += x;
            }
        rows.sum[r] = rows.sum[r] * keep[r] + part;
    }
}

/* o = o keep + weights v */
template <class T, int TERMS>
DEVICE void tile_values(float (&o)[HEAD_DIM / 8][4], float (&s)[TILE_POS / 8][4], const float (&keep)[2],
                        const T *vt) {
    const int lane = lane_id();
    unsigned p[TERMS][TILE_POS / 16][4];                /* the weights, as left operands */
    UNROLL for (int t = 0; t < TERMS; t++)
        UNROLL for (int i = 0; i < TILE_POS / 16; i++)
            UNROLL for (int j = 0; j < 4; j++)
                p[t][i][j] = pack(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1], T());
    UNROLL for (int d = 0; d < HEAD_DIM / 8; d += 2) {
        float sums[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        unsigned b[4];
        UNROLL for (int i = 0; i < TILE_POS / 16; i++) {
            load_matrices_transposed(b, vt + tile_at(i * 16 + lane % 16, d + lane / 16));
            UNROLL for (int t = TERMS - 1; t >= 0; t--) {
                multiply(sums[0], p[t][i], b[0], b[1], T());
                multiply(sums[1], p[t][i], b[2], b[3], T());
            }
        }
        UNROLL for (int j = 0; j < 4; j++) {
            o[d][j] = o[d][j] * keep[j / 2] + sums[0][j];
            o[d + 1][j] = o[d + 1][j] * keep[j / 2] + sums[1][j];
        }
    }
}

DEVICE void tile_store(const attention_args &a, const attention_tile &tile, const float (&o)[HEAD_DIM / 8][4],
                       tile_rows &rows, int kv_head) {
    const int group = a.n_head / a.n_head_kv;
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = warp_id() * 16 + lane_id() / 4 + 8 * r, token = row / group;
        rows.sum[r] += __shfl_xor_sync(ALL, rows.sum[r], 1);
        rows.sum[r] += __shfl_xor_sync(ALL, rows.sum[r], 2);
        if (token >= tile.n_tokens) continue;
        const float scale = 1.0f / rows.sum[r];
        float *to = a.out + (size_t)(tile.row0 + token) * a.ldo +
                    (size_t)(kv_head * group + row % group) * HEAD_DIM + lane_id() % 4 * 2;
        UNROLL for (int i = 0; i < HEAD_DIM / 8; i++)
            *(float2 *)(void *)(to + i * 8) = make_float2(o[i][2 * r] * scale, o[i][2 * r + 1] * scale);
    }
}

/* attention, many rows of a sequence: the same result by tensor cores. A tile is up to 64 (token, head) rows
   of one group of heads, token-major; grid (tiles, n_head_kv), 4 warps of 16 rows; positions in steps of 32,
   two stages in shared memory. q and the weights p go in as TERMS 16-bit terms each (2 of F16, 3 of BF16), so
   what is lost is float32's rounding, not theirs; each step's sums start from zero and are added in float32.
   Equals qwen3i_attention. Needs head_dim 128, group <= 64 and a 16-bit cache; BF16 needs sm_80. */
template <class T, int TERMS>
static __global__ void __launch_bounds__(128, 1)
    attention_tile_kernel(attention_args a, const attention_tile *tiles) {
    QWEN3_DYNAMIC_SHARED(memory);
    T *qs = (T *)(void *)memory, *ks = qs + TERMS * TILE_ROWS * HEAD_DIM, *vs = ks + 2 * TILE_POS * HEAD_DIM;
    const attention_tile tile = tiles[gridDim.x - 1 - blockIdx.x];      /* the longest first */
    const int kv_head = block_y(), n = tile.pos0 + tile.n_tokens, stride = a.kv.kv_dim;
    const T *k = (const T *)a.kv.k + kv_at(a.kv, tile.seq, 0) + (size_t)kv_head * HEAD_DIM;
    const T *v = (const T *)a.kv.v + kv_at(a.kv, tile.seq, 0) + (size_t)kv_head * HEAD_DIM;
    tile_rows rows;
    float o[HEAD_DIM / 8][4];
    UNROLL for (int i = 0; i < HEAD_DIM / 8; i++)
        UNROLL for (int j = 0; j < 4; j++) o[i][j] = 0;
    load_kv_tile<T>(ks, vs, k, v, stride, 0, n);
    tile_begin<T, TERMS>(rows, qs, a, tile, kv_head);
    for (int p0 = 0, stage = 0; p0 < n; p0 += TILE_POS, stage ^= 1) {
        const int next = (stage ^ 1) * TILE_POS * HEAD_DIM;
        float s[TILE_POS / 8][4], keep[2];
        if (p0 + TILE_POS < n) {
            load_kv_tile<T>(ks + next, vs + next, k, v, stride, p0 + TILE_POS, n);
            copy_wait<1>();
        } else copy_wait<0>();
        __syncthreads();
        tile_scores<T, TERMS>(s, qs, ks + stage * TILE_POS * HEAD_DIM);
        tile_weigh(s, keep, rows, p0);
        tile_values<T, TERMS>(o, s, keep, vs + stage * TILE_POS * HEAD_DIM);
        __syncthreads();                /* before the next step overwrites this stage */
    }
    tile_store(a, tile, o, rows, kv_head);
}

template <class T, int TERMS> static size_t attention_tile_shared() {
    return sizeof(T) * ((size_t)TERMS * TILE_ROWS * HEAD_DIM + 4 * TILE_POS * HEAD_DIM);
}

struct tile_kernel { void (*kernel)(attention_args, const attention_tile *); size_t shared; };

template <class T, int TERMS> static tile_kernel tile_kernel_of() {
    const tile_kernel k = {attention_tile_kernel<T, TERMS>, attention_tile_shared<T, TERMS>()};
    return k;
}

/* The tensor core kernel for this context, and its shared memory. */
static tile_kernel choose_tile_kernel(const cuda_ctx *c) {
    return c->desc.kv_type == QWEN3_KV_BF16 ? tile_kernel_of<bf16_t, 3>() : tile_kernel_of<half_t, 2>();
}

static qwen3_result allow_tile_shared(const cuda_ctx *c, const qwen3i_err *err) {
    if (!c->tiles) return QWEN3_OK;
    const tile_kernel k = choose_tile_kernel(c);
    CUDA_TRY(cudaFuncSetAttribute(k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)k.shared));
    return QWEN3_OK;
}

static qwen3_result rows_attention(const pass *p, int layer) {
    const attention_args a = attention_arguments(p, layer);
    if (p->n_tiles > 0) {
        const tile_kernel k = choose_tile_kernel(p->c);
        return launched(p, launch(p->s, grid2(p->n_tiles, a.n_head_kv), 128, k.shared, k.kernel, a,
                                  (const attention_tile *)p->c->tile_list), "attention_tile");
    }
    const decode_shape s = shape_decode(p, a);
#define CALL(T) attention_split<T>(p, a)
    return launched(p,
                    s.ranks == 0                        ? BY_KV_TYPE(p->c, CALL) :
                    p->c->desc.kv_type == QWEN3_KV_BF16 ? launch_decode<bf16_t, 3>(p, a, s) :
                                                          launch_decode<half_t, 2>(p, a, s),
                    "attention");
#undef CALL
}

/* ---- many rows of a sequence on Hopper ---- */
struct large_attention_args {
    half_t       *out;                  /* [rows, n_head, 128] */
    int           n_head, group, layer, max_seqs;
    float         scale;                /* 1 / sqrt(head_dim) */
};

#ifdef QWEN3_WGMMA
/* empty: the eight warps that multiply */
struct attention_stage { mbarrier k_full, k_empty, v_full, v_empty; };

const int ATTENTION_STAGES = 2;

DEVICE void load_positions(unsigned char *to, const CUtensorMap *map, int head, int pos, int z,
                           mbarrier *full, mbarrier *empty, unsigned turn) {
    barrier_wait(empty, (turn / ATTENTION_STAGES & 1) ^ 1);
    barrier_expect(full, 2 * (unsigned)HOPPER_HALF);
    load_tile(to, map, head * HEAD_DIM, pos, z, full);
    load_tile(to + HOPPER_HALF, map, head * HEAD_DIM + HOPPER_K, pos, z, full);
}

/* The tile's rows of q, (token, head) after (token, head). Those of tokens that it has not are never
   stored. */
DEVICE void load_large_q(unsigned char *to, const CUtensorMap *map, const attention_tile &tile, int kv_head,
                         int group, mbarrier *full) {
    barrier_expect(full, (unsigned)(HOPPER_M / group * group * HEAD_DIM) * 2);
    load_tile(to, map, 0, kv_head * group, tile.row0, full);
    load_tile(to + HOPPER_HALF, map, HOPPER_K, kv_head * group, tile.row0, full);
}

/* s = q k^T for 128 positions */
DEVICE void large_scores(float (&s)[64], const unsigned char *q, const unsigned char *k) {
    products_begin();
    UNROLL for (int j = 0; j < HEAD_DIM / 16; j++) {
        const size_t at = HOPPER_HALF * (size_t)(j / 4);
        wgmma(s, operand(q + at) + 2 * (unsigned)(j % 4), operand(k + at) + 2 * (unsigned)(j % 4),
              j > 0);
    }
    products_commit();
}

/* o += p v for 128 positions */
DEVICE void large_values(float (&o)[64], const unsigned (&p)[8][4], const unsigned char *v) {
    products_begin();
    UNROLL for (int j = 0; j < LARGE_POS / 16; j++)
        wgmma(o, p[j], operand(v, (unsigned)HOPPER_HALF) + 128 * (unsigned)j, 1);
    products_commit();
}

struct softmax_rows { float top[2], sum[2], keep[2]; int last[2]; };    /* of this thread's two rows */

/* Scores to weights times 2^14 (F16 then has the small ones, too), with what is known of the rows so far. */
DEVICE void large_softmax(float (&s)[64], softmax_rows &rows, int pos, bool mask, float scale) {
    UNROLL for (int r = 0; r < 2; r++) {
        float high = rows.top[r], part = 0;
        if (mask) {
            const int left = rows.last[r] - pos - 2 * (lane_id() % 4);
            UNROLL for (int i = 0; i < 16; i++)
                UNROLL for (int j = 0; j < 2; j++) if (8 * i + j > left) s[4 * i + 2 * r + j] = LOWEST;
        }
        UNROLL for (int i = 0; i < 16; i++) high = fmaxf(high, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
        high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
        high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
        rows.keep[r] = exp2_fast((rows.top[r] - high) * scale);
        rows.top[r] = high;
        const float offset = high * scale - 14.0f;
        UNROLL for (int i = 0; i < 16; i++)
            UNROLL for (int j = 0; j < 2; j++) {
                float &x = s[4 * i + 2 * r + j];
                x = exp2_fast(x * scale - offset);
                part += x;
            }
        rows.sum[r] = rows.sum[r] * rows.keep[r] + part;
    }
}

DEVICE void weights_to_halves(unsigned (&p)[8][4], const float (&s)[64]) {
    UNROLL for (int i = 0; i < 8; i++)
        UNROLL for (int j = 0; j < 4; j++) p[i][j] = round_halves(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
}

static __device__ void large_attend(const large_attention_args &a, const attention_tile &tile,
                                    unsigned char *memory, mbarrier *q_full, attention_stage *stages,
                                    int kv_head, int group) {
    unsigned char *ks = memory + 2 * HOPPER_HALF, *vs = ks + ATTENTION_STAGES * 2 * HOPPER_HALF;
    const unsigned char *q = memory + HOPPER_HALF / 2 * (size_t)group;
    const int first = 64 * group, row0 = first + warp_id() % 4 * 16 + lane_id() / 4;
    const int n = tile.pos0 + tile.n_tokens, steps = ceil_div(n, LARGE_POS);
    const float scale = a.scale * LOG2E;
    float s[64], o[64];
    unsigned p[8][4];
    softmax_rows rows;
    UNROLL for (int r = 0; r < 2; r++) {
        const int token = (row0 + 8 * r) / a.group;
        rows.last[r] = tile.pos0 + (token < tile.n_tokens ? token : tile.n_tokens - 1);
        rows.top[r] = LOWEST;
        rows.sum[r] = 0;
    }
    UNROLL for (int i = 0; i < 64; i++) s[i] = o[i] = 0;
    barrier_wait(q_full, 0);
    barrier_wait(&stages[0].k_full, 0);
    large_scores(s, q, ks);
    products_wait<0>();
    products_done(s);
    if (lane_id() == 0) barrier_arrive(&stages[0].k_empty);
    large_softmax(s, rows, (steps - 1) * LARGE_POS, true, scale);
    weights_to_halves(p, s);
    for (int step = 1; step < steps; step++) {          /* from the last positions to the first */
        const int at = step % ATTENTION_STAGES, before = (step - 1) % ATTENTION_STAGES;
        const int pos = (steps - 1 - step) * LARGE_POS;
        barrier_wait(&stages[at].k_full, (unsigned)(step / ATTENTION_STAGES) & 1);
        products_done(o);
        products_read(p);
        large_scores(s, q, ks + 2 * HOPPER_HALF * (size_t)at);
        barrier_wait(&stages[before].v_full, (unsigned)((step - 1) / ATTENTION_STAGES) & 1);
        large_values(o, p, vs + 2 * HOPPER_HALF * (size_t)before);
        products_wait<1>();
        products_done(s);
        if (lane_id() == 0) barrier_arrive(&stages[at].k_empty);
        if (pos + LARGE_POS - 1 > tile.pos0) large_softmax(s, rows, pos, true, scale);
        else large_softmax(s, rows, pos, false, scale);
        products_wait<0>();
        products_done(o);
        if (lane_id() == 0) barrier_arrive(&stages[before].v_empty);
        UNROLL for (int i = 0; i < 64; i++) o[i] *= rows.keep[i / 2 % 2];
        weights_to_halves(p, s);
    }
    const int at = (steps - 1) % ATTENTION_STAGES;
    barrier_wait(&stages[at].v_full, (unsigned)((steps - 1) / ATTENTION_STAGES) & 1);
    products_done(o);
    products_read(p);
    large_values(o, p, vs + 2 * HOPPER_HALF * (size_t)at);
    products_wait<0>();
    products_done(o);
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = row0 + 8 * r, token = row / a.group;
        rows.sum[r] += __shfl_xor_sync(ALL, rows.sum[r], 1);
        rows.sum[r] += __shfl_xor_sync(ALL, rows.sum[r], 2);
        const float over = 1.0f / rows.sum[r];
        unsigned w[16];
        UNROLL for (int j = 0; j < 16; j++)
            w[j] = pack_halves(o[4 * j + 2 * r] * over, o[4 * j + 2 * r + 1] * over);
        store_words<16>(token < tile.n_tokens ? a.out + ((size_t)(tile.row0 + token) * a.n_head +
                                                         (size_t)(kv_head * a.group + row % a.group)) *
                                                             HEAD_DIM :
                                                NULL,
                        w);
    }
}

/* The tile's positions, from the last to the first. */
DEVICE void large_attention_load(const CUtensorMap *k_map, const CUtensorMap *v_map,
                                 const large_attention_args &a, const attention_tile &tile, unsigned char *ks,
                                 unsigned char *vs, attention_stage *stages, int kv_head) {
    const int steps = ceil_div(tile.pos0 + tile.n_tokens, LARGE_POS), z = a.layer * a.max_seqs + tile.seq;
    for (int step = 0; step <= steps; step++) {
        const int i = step % ATTENTION_STAGES, before = (step + ATTENTION_STAGES - 1) % ATTENTION_STAGES;
        if (step < steps)
            load_positions(ks + 2 * HOPPER_HALF * (size_t)i, k_map, kv_head, (steps - 1 - step) * LARGE_POS,
                           z, &stages[i].k_full, &stages[i].k_empty, (unsigned)step);
        if (step > 0)
            load_positions(vs + 2 * HOPPER_HALF * (size_t)before, v_map, kv_head, (steps - step) * LARGE_POS,
                           z, &stages[before].v_full, &stages[before].v_empty, (unsigned)step - 1);
    }
}
#endif

/* large_attention: as attention_tile, head_dim 128 and an F16 cache. A tile is up to 128 (token, head) rows;
   grid (n_head_kv, tiles). q, the weights and the result are rounded once each to F16; scores, softmax and
   sums are float32. Positions go in steps of 128, backwards: only the first steps need the mask. Equals
   qwen3i_attention. */
static __global__ void __launch_bounds__(LARGE_THREADS, 1)
    large_attention_kernel(const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ CUtensorMap v_map, large_attention_args a,
                           const attention_tile *tiles) {
#ifdef QWEN3_WGMMA
    QWEN3_DYNAMIC_SHARED(raw);
    unsigned char *memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
    unsigned char *ks = memory + 2 * HOPPER_HALF, *vs = ks + ATTENTION_STAGES * 2 * HOPPER_HALF;
    attention_stage *stages = (attention_stage *)(void *)(vs + ATTENTION_STAGES * 2 * HOPPER_HALF);
    mbarrier *q_full = (mbarrier *)(void *)(stages + ATTENTION_STAGES);
    const attention_tile tile = tiles[gridDim.y - 1 - blockIdx.y];      /* the longest first */
    if (tid() == 0) {
        for (int i = 0; i < ATTENTION_STAGES; i++) {
            barrier_init(&stages[i].k_full, 1); barrier_init(&stages[i].k_empty, 8);
            barrier_init(&stages[i].v_full, 1); barrier_init(&stages[i].v_empty, 8);
        }
        barrier_init(q_full, 1);
        barriers_ready();
    }
    __syncthreads();
    wait_for_previous();
    let_next_start();
    if (warp_id() < 4) {
        fewer_registers<24>();
        if (tid() == 0) {
            load_large_q(memory, &q_map, tile, block_x(), a.group, q_full);
            large_attention_load(&k_map, &v_map, a, tile, ks, vs, stages, block_x());
        }
    } else {
        more_registers<240>();
        large_attend(a, tile, memory, q_full, stages, block_x(), __shfl_sync(ALL, warp_id() / 4 - 1, 0));
    }
#else
    (void)q_map; (void)k_map; (void)v_map; (void)a; (void)tiles;
#endif
}

const size_t LARGE_ATTENTION_SHARED = 1024 + (2 + 2 * 2 * 2) * HOPPER_HALF + 2 * 32 + 8;

static qwen3_result large_attention(const pass *p, int layer) {
    const cuda_ctx *c = p->c;
    if (!p->q_halves) return rows_attention(p, layer);
    const attention_args from = attention_arguments(p, layer);
    large_attention_args a;
    a.out = c->hopper_act;
    a.n_head = from.n_head;
    a.group = c->group;
    a.layer = layer;
    a.max_seqs = c->desc.max_seqs;
    a.scale = from.scale;
    return launched(p,
                    launch_early(p->early, p->s, grid2(from.n_head_kv, p->n_tiles), LARGE_THREADS,
                                 LARGE_ATTENTION_SHARED, large_attention_kernel, get_map(c->q_map),
                                 get_map(c->k_map), get_map(c->v_map), a,
                                 (const attention_tile *)c->tile_list),
                    "large_attention");
}

/* ================================================================================================
   RANKS: several devices share a model. Each has some of the heads, some rows of gate and up (of every
   expert, too) and of the head: its configuration is the model's with these numbers divided. Wo and Wdown lie
   by columns: a rank multiplies what it has computed itself, and x = x + W a is a sum over ranks, which NCCL
   adds up, to the same bits on all. Logits are gathered, so every rank chooses, and chooses the same.
   ================================================================================================ */
#ifdef QWEN3_CUDA_NCCL
/* spread: logits[row, rank * width + i] = gathered[rank, row, i]. Grid (ranks, rows). */
static __global__ void spread_kernel(float *logits, const float *gathered, int width) {
    const size_t from = ((size_t)blockIdx.x * gridDim.y + blockIdx.y) * width,
                 to = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * width;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) logits[to + i] = gathered[from + i];
}

/* Sums of few rows by peer access, in one exchange: every rank writes its part to all others, each value with
   the number of the sum, and adds up what came, in order of rank. A block does the same elements in every sum
   and counts its sums, so parts of two sums are enough: who writes the next but one has what all others wrote
   after they had read. */
struct peer_place {                     /* room: vectors of four of PEER_ROWS rows */
    int rank, n_ranks; size_t room;
    unsigned *counts;                   /* of blocks: how many are done */
    const int *abandoned;
};

/* Where the part of a rank is, on any device */
DEVICE size_t part_at(const peer_place &at, int rank, unsigned sum, int i) {
    return 2 * (((sum & 1) * (unsigned)at.n_ranks + (unsigned)rank) * at.room + (size_t)i);
}

/* A block that has waited for long asks the host now and then, over the bus, whether to go on. */
DEVICE bool is_abandoned(const peer_place &at, int polls) {
    return polls % PEER_PATIENCE == 0 && load_of_all((const unsigned *)at.abandoned) != 0;
}

DEVICE float2 wait_for_tagged(const peer_place &at, const uint4 *p, unsigned sum) {
    uint4 v = load_tagged(p);
    for (int polls = 1; (v.y != sum || v.w != sum) && !is_abandoned(at, polls); polls++) v = load_tagged(p);
    return make_float2(__uint_as_float(v.x), __uint_as_float(v.z));
}

/* f(i) for the block's vectors */
template <class F> DEVICE void each_of_peers(int n, F f) {
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += PEER_BLOCKS * PEER_THREADS) f(i);
}

/* x = sum of what all ranks have in own, which is x itself or becomes zero; n vectors of four. Where blocks
   of a launch run one after the other, all must post before one waits: in two launches. */
template <bool POST, bool ADD>
static __global__ void __launch_bounds__(PEER_THREADS)
    peer_sum_kernel(peer_ranks to, peer_place at, float4 *x, float4 *own, int n) {
    let_next_start();
    wait_for_previous();
    const unsigned sum = at.counts[blockIdx.x] + 1;
    if (POST) each_of_peers(n, [&](int i) {
        const float4 v = own[i];
        for (int r = 0; r < at.n_ranks; r++) {
            if (r == at.rank) continue;
            uint4 *p = to.parts[r] + part_at(at, at.rank, sum, i);
            store_tagged(p, make_float2(v.x, v.y), sum);
            store_tagged(p + 1, make_float2(v.z, v.w), sum);
        }
    });
    if (!ADD) return;
    each_of_peers(n, [&](int i) {
        float4 a = make_float4(0, 0, 0, 0);
        for (int r = 0; r < at.n_ranks; r++) {
            float4 v = own[i];
            if (r != at.rank) {
                const uint4 *p = to.parts[at.rank] + part_at(at, r, sum, i);
                const float2 lo = wait_for_tagged(at, p, sum), hi = wait_for_tagged(at, p + 1, sum);
                v = make_float4(lo.x, lo.y, hi.x, hi.y);
            }
            a.x += v.x; a.y += v.y; a.z += v.z; a.w += v.w;
        }
        if (own != x) own[i] = make_float4(0, 0, 0, 0);
        x[i] = a;
    });
    __syncthreads();
    if (threadIdx.x == 0) at.counts[blockIdx.x] = sum;
}

/* kept[out_slot, the rank's part] on all ranks = logits[row, :] * scale[row] (NULL: 1) of so many rows, and
   waits until those of the others are there, too. Nobody reads them yet: all ranks are in this step since its
   first sum. POST, WAIT: as above. */
template <bool POST, bool WAIT>
static __global__ void __launch_bounds__(PEER_THREADS)
    share_logits_kernel(peer_ranks to, peer_place at, const float *logits, const float *scale,
                        const row_info *outs, int rows, int width) {
    wait_for_previous();
    const unsigned count = at.counts[blockIdx.x] + 1;
    for (int row = 0; POST && row < rows; row++) {
        const int slot = outs[row].out_slot;
        const float s = scale ? scale[row] : 1.0f;
        const size_t first = ((size_t)slot * (unsigned)at.n_ranks + (unsigned)at.rank) * (unsigned)width;
        if (slot < 0) continue;
        each_of_peers(ceil_div(width, 4), [&](int i) {
            float v[4];
            load_4(v, logits + (size_t)row * (unsigned)width + 4 * i, width - 4 * i, width % 4 == 0);
            UNROLL for (int k = 0; k < 4; k++) v[k] *= s;
            for (int r = 0; r < at.n_ranks; r++)
                store_4(to.kept[r] + first + 4 * i, v, width - 4 * i, width % 4 == 0);
        });
    }
    __syncthreads();
    const int other = (int)threadIdx.x;
    if (other < at.n_ranks && other != at.rank) {
        if (POST) store_for_all(to.flags[other] + at.rank * PEER_BLOCKS + blockIdx.x, count);
        const unsigned *flag = to.flags[at.rank] + other * PEER_BLOCKS + blockIdx.x;
        for (int polls = 1; WAIT && load_of_all(flag) != count && !is_abandoned(at, polls); polls++) {}
    }
    if (WAIT && threadIdx.x == 0) at.counts[blockIdx.x] = count;
}

static peer_place place_of(const cuda_ctx *c, unsigned *counts) {
    return {c->m->rank, c->m->n_ranks, (size_t)PEER_ROWS * c->embd_ld / 4, counts, c->abandoned};
}

template <bool POST, bool ADD> static qwen3_result peer_sum_by(const pass *p) {
    cuda_ctx *c = p->c;
    const int n = p->n * c->embd_ld / 4;
    return launched(p, launch_early(p->early, p->s, grid1(least(ceil_div(n, PEER_THREADS), PEER_BLOCKS)),
                                    PEER_THREADS, 0, peer_sum_kernel<POST, ADD>, c->peers,
                                    place_of(c, c->peer_counts), (float4 *)(void *)c->x,
                                    (float4 *)(void *)c->sum, n), "peer_sum");
}

template <bool POST, bool WAIT>
static qwen3_result share_logits_by(const pass *p, int first, int n, const float *scale) {
    cuda_ctx *c = p->c;
    return launched(p, launch_early(p->early, p->s, grid1(PEER_BLOCKS), PEER_THREADS, 0,
                                    share_logits_kernel<POST, WAIT>, c->peers,
                                    place_of(c, c->peer_counts + PEER_BLOCKS), (const float *)c->logits,
                                    scale, (const row_info *)c->rows + first, n, c->m->head.rows),
                    "share_logits");
}

#ifdef QWEN3_CUDA_EMULATED
#define IN_TURN(CALL, ...) TRY((CALL<true, false>(__VA_ARGS__))); return CALL<false, true>(__VA_ARGS__)
#else
#define IN_TURN(CALL, ...) return CALL<true, true>(__VA_ARGS__)
#endif
static qwen3_result peer_sum(const pass *p) { IN_TURN(peer_sum_by, p); }
static qwen3_result share_logits(const pass *p, int first, int n, const float *scale) {
    IN_TURN(share_logits_by, p, first, n, scale);
}
#undef IN_TURN
#endif

/* After x = x + W a, which the first rank has added to x, the others to zeros: x becomes the sum on all. */
static qwen3_result sum_ranks(const pass *p) {
#ifdef QWEN3_CUDA_NCCL
    const qwen3i_err *err = p->err;
    cuda_ctx *c = p->c;
    const size_t n = (size_t)p->n * c->embd_ld;
    if (c->m->n_ranks == 1) return QWEN3_OK;
    if (c->has_peers && p->n <= PEER_ROWS) return peer_sum(p);
    NCCL_TRY(ncclAllReduce(c->sum, c->x, n, ncclFloat, ncclSum, c->comm, p->s));
    if (c->sum != c->x) CUDA_TRY(cudaMemsetAsync(c->sum, 0, n * sizeof(float), p->s));
#else
    (void)p;
#endif
    return QWEN3_OK;
}

/* c->logits: from n rows of the rank's own to n rows of all */
static qwen3_result gather_logits(const pass *p, int n) {
#ifdef QWEN3_CUDA_NCCL
    const qwen3i_err *err = p->err;
    cuda_ctx *c = p->c;
    const int width = c->m->head.rows;
    if (c->m->n_ranks == 1) return QWEN3_OK;
    NCCL_TRY(ncclAllGather(c->logits, c->gathered, (size_t)n * width, ncclFloat, c->comm, p->s));
    RUN(grid2(c->m->n_ranks, n), 1024, 0, spread_kernel, c->logits, (const float *)(void *)c->gathered,
        width);
#else
    (void)p; (void)n;
#endif
    return QWEN3_OK;
}

/* ================================================================================================
   OUTPUT: x = x + Wo a
   ================================================================================================ */
static qwen3_result vector_o_proj(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].wo;
    TRY(order_rows(p, w, c->attn, c->q_dim));
    return matvec(p, c->sum, c->embd_ld, NULL, w, c->attn, c->q_dim, p->n, true);
}

static qwen3_result gemm_o_proj(const pass *p, int layer) {
    const matrix &w = p->c->m->layers[layer].wo;
    TRY(order_rows(p, w, p->c->attn, p->c->q_dim));
    TRY(round_rows(p, w, p->c->attn, p->c->q_dim, p->n));
    return product_add(p, w);
}

/* On Hopper: what attention gives as F16, if it is not. scale: of its rows. */
static qwen3_result halve_attention(const pass *p, const matrix &w, const float **scale) {
    cuda_ctx *c = p->c;
    *scale = p->halves ? NULL : c->act_scale;
    TRY(p->halves ? order_rows(p, w, c->hopper_act, c->q_dim) : order_rows(p, w, c->attn, c->q_dim));
    return p->halves ? QWEN3_OK : hopper_round(p, w, c->attn, c->q_dim, p->n);
}

static qwen3_result skinny_o_proj(const pass *p, int layer) {
    const matrix &w = p->c->m->layers[layer].wo;
    const float *scale;
    TRY(halve_attention(p, w, &scale));
    return skinny_add(p, p->c->skinny_a_map, w, hopper_arguments(p, w, scale));
}

static qwen3_result large_o_proj(const pass *p, int layer) {
    const matrix &w = p->c->m->layers[layer].wo;
    const float *scale;
    TRY(halve_attention(p, w, &scale));
    return large_add(p, p->c->large_a_map, w, hopper_arguments(p, w, scale));
}

/* ================================================================================================
   MLP: m = silu(Wgate h) * (Wup h); x = x + Wdown m
   ================================================================================================ */
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

/* stream_mlp: y[i] = silu(gate_i) * up_i in float32 for one row x, where gate = W[0 .. n_ff) x and up =
   W[n_ff .. 2 n_ff) x. A warp takes P pairs of rows at a time. Equals qwen3i_swiglu of the two products. */
template <int P, int RING>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS, 2) stream_mlp_kernel(matvec_in in, float *y) {
    QWEN3_DYNAMIC_SHARED(memory);
    const int lane = lane_id();
    stream_rows<2 * P, true, RING, true>(
        in, warp_share(in.n / 2), memory, [] {}, [](int, int) { return 0.0f; },
        [&](int row, int left, const float (&acc)[2 * P], float) {
            if (lane < P && lane < left) y[row + lane] = silu(pick(acc, 2 * lane)) * pick(acc, 2 * lane + 1);
        });
}

template <int RING> static cudaError_t stream_mlp(const pass *p, const matvec_in &in, float *y) {
    const int each = stream_each(p, in.n / 2);
#define CALL(P) launch_stream(p, in, RING, in.n / 2, stream_mlp_kernel<P, RING>, in, y)
    return each == 1 ? CALL(1) : each == 3 && RING == STREAM_RING ? CALL(3) : CALL(2);
#undef CALL
}

static qwen3_result vector_mlp(const pass *p, int layer, const input &h) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].gate_up;
    if (w.n_parts > 0) return block_mlp(p, layer, h);
    matvec_in in = vector_input(p, w, h, p->n);
    /* attention, before it, leaves memory idle; larger ones do not gain */
    in.ask = c->m->capability == 90 && (size_t)w.rows * w.ld * qwen3i_type_size(w.type) <= c->m->cache_bytes;
    const int ring = stream_ring(p, in, w);
#define CALL(RING) stream_mlp<RING>(p, in, c->ff)
    if (ring) return launched(p, BY_RING(ring, CALL), "mlp");
#undef CALL
    return vector_product(p, in, w, make_end(END_MLP, c->ff, c->ff_ld, NULL));
}

static qwen3_result vector_down(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].w_down;
    if (few_pairs(p, layer)) return few_down(p, layer);
    TRY(order_rows(p, w, c->ff, c->ff_ld));
    return matvec(p, c->sum, c->embd_ld, NULL, w, c->ff, c->ff_ld, p->n, true);
}

/* ---- after a product by cuBLASLt ---- */
/* swiglu: m = silu(gate) * up for gate_up [rows, 2 n_ff], times scale[row] before, as the input of the down
   projection [rows, ld], zero from n_ff on. The product is float32; only the scaled result is rounded. One
   block a row; a thread keeps up to VECTORS vectors of four. Equals qwen3i_swiglu, and one rounding. */
template <class O>
static __global__ void __launch_bounds__(1024)
    swiglu_kernel(O *out, float *out_scale, const float *gate_up, const float *scale, int n_ff, int ld_in,
                  int ld, size_t rest) {
    __shared__ float shared[32];
    const float *gate = gate_up + (size_t)blockIdx.x * ld_in;
    const float s = scale ? scale[blockIdx.x] : 1.0f;
    const int step = n_threads() * 4;
    float m[VECTORS][4], top = 0, up = 1;
    UNROLL for (int j = 0; j < VECTORS; j++) {
        const int i = tid() * 4 + j * step;
        if (i >= n_ff) break;
        float u[4];
        load_4(m[j], gate + i, n_ff - i, n_ff % 4 == 0);
        load_4(u, gate + n_ff + i, n_ff - i, n_ff % 4 == 0);
        UNROLL for (int k = 0; k < 4; k++) {
            m[j][k] = silu(m[j][k] * s) * (u[k] * s);
            top = fmaxf(top, fabsf(m[j][k]));
        }
    }
    if (sizeof(O) == 2) {
        up = half_scale(block_max(top, shared));
        if (tid() == 0) out_scale[blockIdx.x] = 1.0f / up;
    }
    O *to = out + (size_t)blockIdx.x * ld;
    UNROLL for (int j = 0; j < VECTORS; j++) {
        const int i = tid() * 4 + j * step;
        if (i >= ld) break;
        UNROLL for (int k = 0; k < 4; k++) store_input(to + i + k, i < n_ff ? m[j][k] : 0.0f, up, rest);
    }
}

template <class O>
static cudaError_t launch_swiglu(const pass *p, O *out, const matrix &gate_up, size_t rest) {
    cuda_ctx *c = p->c;
    const int n_ff = c->m->config.n_ff, want = round_up(ceil_div(n_ff, 16), 32),
              threads = want > 1024 ? 1024 : want;
    return launch(p->s, grid1(p->n), threads, 0, swiglu_kernel<O>, out, c->act_scale,
                  (const float *)c->gate_up, act_scale(p, gate_up), n_ff, 2 * c->ff_ld, c->ff_ld, rest);
}

static qwen3_result gemm_mlp(const pass *p, int layer, const input &) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].gate_up, &down = c->m->layers[layer].w_down;
    TRY(act_product(p, c->gate_up, 2 * c->ff_ld, w, 0, w.rows));
#define CALL(T) launch_swiglu<T>(p, (T *)c->act, w, rest_of(down, p->n))
    return launched(p, BY_WEIGHT_TYPE(down, CALL), "swiglu");
#undef CALL
}

static qwen3_result gemm_down(const pass *p, int layer) {
    const matrix &w = p->c->m->layers[layer].w_down;
    TRY(w.type == QWEN3I_F32 ? order_rows(p, w, (float *)p->c->act, p->c->ff_ld) :
                               order_rows(p, w, (half_t *)p->c->act, p->c->ff_ld));
    return product_add(p, w);
}

/* ---- Hopper: how its products end ---- */
#ifdef QWEN3_WGMMA
DEVICE void large_swiglu(const hopper_args &g, const float (&acc)[64], int row, int r, int n, float scale,
                         float down) {
    unsigned w[8];
    UNROLL for (int j = 0; j < 8; j++) {
        const int gate = 4 * j + 2 * r, up = gate + 32;
        w[j] = pack_halves(silu_fast(acc[gate] * scale) * (acc[up] * scale) * down,
                           silu_fast(acc[gate + 1] * scale) * (acc[up + 1] * scale) * down);
    }
    store_words<8>(row < g.rows ? g.out + (size_t)row * g.ldo + n * (HOPPER_N / 2) : NULL, w);
}

DEVICE void ask_row(const to_mlp &, large_row &w, const hopper_args &g, int i) { w.out = g.out_scale[i]; }
template <int PARTS, int M>
DEVICE void finish_tile(const to_mlp &, const hopper_args &g, const float (&acc)[PARTS][M],
                        const large_row &row, int r, int n, float scale) {
    const float down = 1.0f / row.out;
    UNROLL for (int p = 0; p < PARTS; p++) large_swiglu(g, acc[p], row.at, r, n + p, scale, down);
}

DEVICE void ask_late(const to_mlp &, skinny_row &r, const hopper_args &g, int i, int) {
    r.down = g.out_scale ? 1.0f / g.out_scale[i] : 1.0f;
}
DEVICE void finish_row(const to_mlp &, const hopper_args &g, const head_part<1> &p, const skinny_row &r,
                       int row, int tile) {
    const float2 lo = p.lo[0], hi = p.hi[0];
    *(unsigned *)(void *)(g.out + (size_t)row * g.ldo + tile * (HOPPER_M / 2) + 2 * lane_id()) =
        pack_halves(silu_fast(lo.x) * hi.x * r.down, silu_fast(lo.y) * hi.y * r.down);
}
#endif

static hopper_args mlp_arguments(const pass *p, int layer, const input &h) {
    cuda_ctx *c = p->c;
    const int n_ff = c->m->config.n_ff;
    const matrix &w = c->m->layers[layer].gate_up;
    hopper_args a = hopper_arguments(p, w, h.scale);
    a.step = HOPPER_N / 2;
    a.half = n_ff;
    a.out = c->hopper_m;
    a.ldo = n_ff;
    a.out_scale = c->ff_scale;
    set_norm(p, h, w, &a);
    return a;
}

static qwen3_result skinny_mlp(const pass *p, int layer, const input &h) {
    return skinny_product<to_mlp>(p, p->c->skinny_h_map, p->c->m->layers[layer].gate_up,
                                  mlp_arguments(p, layer, h));
}
static qwen3_result large_mlp(const pass *p, int layer, const input &h) {
    return large_product<to_mlp>(p, p->c->large_h_map, p->c->m->layers[layer].gate_up,
                                 mlp_arguments(p, layer, h));
}

static qwen3_result skinny_down(const pass *p, int layer) {
    const matrix &w = p->c->m->layers[layer].w_down;
    TRY(order_rows(p, w, p->c->hopper_m, w.cols));
    return skinny_add(p, p->c->skinny_m_map, w, hopper_arguments(p, w, p->c->ff_scale));
}
static qwen3_result large_down(const pass *p, int layer) {
    const matrix &w = p->c->m->layers[layer].w_down;
    TRY(order_rows(p, w, p->c->hopper_m, w.cols));
    return large_add(p, p->c->large_m_map, w, hopper_arguments(p, w, p->c->ff_scale));
}

/* ================================================================================================
   VECTORS: 1 to 8 rows times a matrix, whatever follows it
   ================================================================================================ */
/* Where element i of a product's row r goes, if it is none of q, k, v or of pairs; NULL: nobody wants it. */
DEVICE float *place_of_sum(const vector_end &e, int r, int i) {
    const int slot = e.outs ? e.outs[r].out_slot : r;
    return slot >= 0 ? e.y + (size_t)slot * e.ldy + i : NULL;
}
DEVICE void finish_sum(const vector_end &e, int r, int i, float sum) {
    if (e.kind == END_HEADS) { store_projection(e.qkv, r, i, sum); return; }
    float *out = place_of_sum(e, r, i);
    if (out) *out = e.kind == END_ADD ? *out + sum : sum;
}

/* vector_product: x [rows, in.ldx] float32, rows <= R, times W, and then what vector_end says. A warp has two
   rows of W, or one of gate and one of up; 8 warps a block. It is for what streams do not serve: several
   rows, F32 weights, chips before sm_80. Equals qwen3i_matmul or qwen3i_matmul_add, or what stream_qkv_rope
   and stream_mlp equal. */
template <class W, int R>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS, 2)
    vector_product_kernel(matvec_in in, const __grid_constant__ vector_end e) {
    __shared__ float4 xs[MATVEC_TILE / 4];
    __shared__ int finished[2 * MATVEC_WARPS];
    const bool pairs = e.kind == END_MLP;
    const row_range mine = warp_share(pairs ? in.n / 2 : in.n);
    const int first = mine.first < mine.end ? mine.first : -1;
    const int second = pairs && first >= 0 ? in.n / 2 + first : first + 1 < mine.end ? first + 1 : -1;
    const int rows[2] = {first, first < 0 ? -1 : second};
    float acc[2][R];
    row_angles angles;                  /* written long before, so there is nothing to wait for */
    if (e.kind == END_HEADS) angles = load_row_angles(e.qkv, warp_id() < in.rows ? warp_id() : 0);
    dot_rows<W, R, 2>(acc, rows, in, xs);
    if (lane_id() == 0)
        UNROLL for (int r = 0; r < R; r++) {
            if (r >= in.rows) break;
            if (pairs && first >= 0) e.y[(size_t)r * e.ldy + first] = silu(acc[0][r]) * acc[1][r];
            UNROLL for (int j = 0; j < 2; j++)
                if (!pairs && rows[j] >= 0) finish_sum(e, r, rows[j], acc[j][r]);
        }
    if (e.kind == END_HEADS)
        finish_heads(block_share(in.n), in.rows, e.qkv, e.tickets, finished, 2 * MATVEC_WARPS, angles);
}

/* F32 weights, which are rare, have a kernel for one row and one for all up to 8. */
template <class W>
static cudaError_t launch_vectors(const pass *p, const matvec_in &in, const vector_end &e) {
    const int some = sizeof(W) == 4 ? 8 : 4;
    const int blocks = e.kind == END_MLP ? matvec_blocks(p, in.n / 2, 1) : matvec_blocks(p, in.n, 2);
    return launch_early(p->early, p->s, grid1(blocks), 32 * MATVEC_WARPS, 0,
                        in.rows > some ? vector_product_kernel<W, 8> :
                        in.rows > 1    ? vector_product_kernel<W, some> :
                                         vector_product_kernel<W, 1>, in, e);
}

/* MATVEC_ROWS rows at a time */
static qwen3_result vector_product(const pass *p, const matvec_in &in, const matrix &w, vector_end e) {
    for (int first = 0; first < in.rows; first += MATVEC_ROWS, skip_rows(&e, MATVEC_ROWS)) {
        matvec_in some = in;
        some.x += (size_t)first * in.ldx;
        some.rows = least(MATVEC_ROWS, in.rows - first);
#define CALL(T) launch_vectors<T>(p, some, e)
        TRY(launched(p, BY_WEIGHT_TYPE(w, CALL), "vector_product"));
#undef CALL
    }
    return QWEN3_OK;
}

/* y = W x, or += with `add` */
static qwen3_result matvec(const pass *p, float *y, int ldy, const row_info *outs, const matrix &w,
                           const float *x, int ldx, int rows, bool add) {
    const input h = {x, ldx, NULL, NULL};
    if (w.n_parts > 0) return block_matvec(p, y, ldy, outs, w, h, rows, add);
    const matvec_in in = vector_input(p, w, h, rows);
    const int ring = stream_ring(p, in, w);
#define CALL(RING) stream_matvec<RING>(p, in, y, ldy, outs, add)
    if (ring) return launched(p, BY_RING(ring, CALL), "matvec");
#undef CALL
    return vector_product(p, in, w, make_end(add ? END_ADD : END_STORE, y, ldy, outs));
}

/* ================================================================================================
   BLOCKS: few rows times a matrix that lies in them
   ================================================================================================ */
/* x comes as whole numbers of 16 bits with a scale for each 32, which the chip multiplies as two bytes, four
   at a time: all sums of a unit are exact. Where codes are numbers in floating point, x stays float32. A
   warp takes rows of W two at a time, for one row of x or for four; tiles come by a ring as in
   weight_stream, but the warp copies them together. */
/* With one row of x two kernels' blocks fit on a multiprocessor. */
template <int R> struct block_shape { enum { WARPS = 8, BLOCKS = R == 1 ? 2 : 1 }; };
const int BLOCK_ROWS  = 4;              /* of x, at most */
const int BLOCK_RING  = 10 << 10;       /* bytes of a warp's */
const int INT_PLANES = 5, FLOAT_PLANES = 8;     /* of 32 units of x: 16 bytes of each in a plane */
const int MOST_INT   = 32639;           /* 127 * 256 + 127 */
/* A number plus this has it, rounded, in its low bits, with 128 and 128 * 256 added: so no byte borrows from
   the next, and the top bit of each, flipped, takes them off. */
const float INT_MAGIC = 12582912.0f + 0x8080;

struct block_in {
    block_part   parts[3];
    int          n, k, units;           /* rows of all parts; of x: elements, units that are there */
    bool         ints, floats;          /* how x is wanted */
    const float *x; int ldx, rows;
    const float *gain;                  /* [k]: x is one row, to be normalised first; NULL: it is */
    float        eps;
};
/* What a warp multiplies at a time: at most 32 rows of one part from each of two places. */
struct block_rows { const unsigned char *a, *b; int n_a, n_b; };

static __host__ __device__ inline size_t block_x_bytes(const block_in &in) {
    return (size_t)round_up(in.units, 32) * 16 *
           (size_t)((in.ints ? INT_PLANES : 0) + (in.floats ? FLOAT_PLANES : 0));
}
static size_t block_memory(const block_in &in, int rows, int warps) {
    return (size_t)warps * BLOCK_RING + (size_t)rows * block_x_bytes(in) + 32 * sizeof(float);
}
/* Which 16 bytes those of plane k of unit u are. */
template <int PLANES> DEVICE int x_at(int u, int k) { return (u / 32 * PLANES + k) * 32 + u % 32; }
/* x comes after the rings. */
DEVICE unsigned char *block_planes(unsigned char *memory) { return memory + n_threads() / 32 * BLOCK_RING; }

/* Elements 4 q .. 4 q + 3 of x to their planes. Eight neighbouring lanes have a unit; all lanes take part. */
DEVICE void block_store_x(const block_in &in, unsigned char *planes, int q, float4 v) {
    const int u = q / 8, w = q % 8, n = in.units;
    if (in.ints) {
        float top = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
        UNROLL for (int o = 1; o < 8; o *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        const float up = top > 0 ? (float)MOST_INT / top : 0.0f, down = top * (1.0f / (float)MOST_INT);
        const unsigned a = __float_as_uint(fmaf(v.x, up, INT_MAGIC)),
                       b = __float_as_uint(fmaf(v.y, up, INT_MAGIC)),
                       c = __float_as_uint(fmaf(v.z, up, INT_MAGIC)),
                       d = __float_as_uint(fmaf(v.w, up, INT_MAGIC)),
                       ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
        const unsigned low = __byte_perm(ab, cd, 0x5410) ^ 0x80808080u,
                       high = __byte_perm(ab, cd, 0x7632) ^ 0x80808080u;
        int sum = (int)(a + b + c + d - 4 * __float_as_uint(INT_MAGIC));
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        const int other = __shfl_xor_sync(ALL, sum, 4);
        unsigned *words = (unsigned *)(void *)planes;
        if (u < n) {
            words[4 * x_at<INT_PLANES>(u, w / 4) + w % 4] = high;
            words[4 * x_at<INT_PLANES>(u, 2 + w / 4) + w % 4] = low;
            if (w == 0)
                ((float4 *)(void *)planes)[x_at<INT_PLANES>(u, 4)] =
                    make_float4(down, (float)sum * down, (float)other * down, (float)(sum + other) * down);
        }
        planes += INT_PLANES * 16 * round_up(n, 32);
    }
    if (in.floats && u < n) ((float4 *)(void *)planes)[x_at<FLOAT_PLANES>(u, w)] = v;
}

/* RMSNorm(in.x) to its planes. */
template <int C> DEVICE void block_stage_normed(const block_in &in, unsigned char *planes, float *shared) {
    float4 v[C];
    load_normed<C>(v, in, shared);
    UNROLL for (int u = 0; u < C; u++) block_store_x(in, planes, tid() + u * n_threads(), v[u]);
}

/* A row of x to its planes, zero past k. */
DEVICE void block_stage_row(const block_in &in, unsigned char *planes, const float *x) {
    const int step = n_threads();
    NO_UNROLL for (int q = tid(); q - lane_id() < 8 * in.units; q += 4 * step) {
        float4 v[4];
        UNROLL for (int u = 0; u < 4; u++) v[u] = load_up_to_4(x, 4 * (q + u * step), in.k);
        UNROLL for (int u = 0; u < 4; u++)
            if (q + u * step - lane_id() < 8 * in.units) block_store_x(in, planes, q + u * step, v[u]);
    }
}

/* R rows of x to shared memory, zero past k, the last one instead of those that are not there; with a gain
   the RMSNorm of one, as stage_vector. */
template <int R> static __device__ NO_INLINE void block_stage(const block_in &in) {
    QWEN3_DYNAMIC_SHARED(memory);
    unsigned char *planes = block_planes(memory);
    const int step = n_threads();
    if (R == 1 && in.gain) {
        float *shared = (float *)(void *)(planes + block_x_bytes(in));
        if (in.k <= 8 * step) block_stage_normed<2>(in, planes, shared);
        else if (in.k <= 16 * step) block_stage_normed<4>(in, planes, shared);
        else block_stage_normed<STREAM_NORM>(in, planes, shared);
    } else {
        wait_for_previous();
        NO_UNROLL for (int r = 0; r < R; r++, planes += block_x_bytes(in))
            block_stage_row(in, planes, in.x + (size_t)least(r, in.rows - 1) * in.ldx);
    }
    __syncthreads();
}

/* A unit of x */
struct unit_ints { uint4 high[2], low[2]; float4 sums; };

/* At its first plane */
DEVICE unit_ints load_ints(const unsigned char *at) {
    const uint4 *p = (const uint4 *)(const void *)at;
    const unit_ints x = {{p[0], p[32]}, {p[64], p[96]}, *(const float4 *)(const void *)(p + 128)};
    return x;
}
DEVICE int dot_16(const unsigned *q, uint4 x) {
    return __dp4a((int)q[3], (int)x.w, __dp4a((int)q[2], (int)x.z, __dp4a((int)q[1], (int)x.y,
                  __dp4a((int)q[0], (int)x.x, 0))));
}

/* Does each half of a unit have scales of its own? */
static constexpr __host__ __device__ bool has_halves(int type) {
    return type == QWEN3I_Q6_K || type == QWEN3I_Q2_K || type == QWEN3I_Q3_K || type == QWEN3I_NVFP4;
}
static constexpr __host__ __device__ bool has_offset(int type) {
    return !(type == QWEN3I_Q8_0 || type == QWEN3I_IQ4_NL || type == QWEN3I_IQ4_XS || type == QWEN3I_MXFP4 ||
             type == QWEN3I_NVFP4 || type == QWEN3I_FP8);
}

/* The sum over a unit of these codes and scales */
template <int T> DEVICE float unit_dot(const unsigned (&q)[8], const unit_scales &s, const unit_ints &x) {
    const int a = dot_16(q, x.high[0]) * 256 + dot_16(q, x.low[0]),
              b = dot_16(q + 4, x.high[1]) * 256 + dot_16(q + 4, x.low[1]);
    float sum = has_halves(T) ? (float)a * s.d[0] + (float)b * s.d[1] : (float)(a + b) * s.d[0];
    sum *= x.sums.x;
    if (has_offset(T)) sum += has_halves(T) ? s.m[0] * x.sums.y + s.m[1] * x.sums.z : s.m[0] * x.sums.w;
    return sum;
}

/* sums[j][r] += the sum over unit i of tile j of two, each of n units, and of row r of x, whose unit begins
   at x + r * ld; tiles are `full` bytes apart. */
template <int T, int R>
DEVICE void add_ints(float (&sums)[2][R], const unsigned char *tile, int full, int n, int i,
                     const unsigned char *x, int ld) {
    unsigned q[2][8];
    unit_scales s[2];
    UNROLL for (int j = 0; j < 2; j++) {
        s[j] = load_scales<T>(tile + j * full, n, i);
        unit_codes<T>(q[j], tile + j * full, n, i);
    }
    UNROLL for (int r = 0; r < R; r++) {
        const unit_ints v = load_ints(x + r * ld);
        UNROLL for (int j = 0; j < 2; j++) sums[j][r] += unit_dot<T>(q[j], s[j], v);
    }
}
/* The same with float32 x: elements one after the other */
template <int T, int R>
DEVICE void add_floats(float (&sums)[2][R], const unsigned char *tile, int full, int n, int i,
                       const unsigned char *x, int ld) {
    UNROLL for (int j = 0; j < 2; j++) {
        float sum[R];
        UNROLL for (int r = 0; r < R; r++) sum[r] = 0;
        UNROLL for (int k = 0; k < 8; k++) {
            float f[4];
            load_floats<T>(f, tile + j * full, n, i, k);
            UNROLL for (int r = 0; r < R; r++) {
                const float4 v = ((const float4 *)(const void *)(x + r * ld))[32 * k];
                sum[r] += f[0] * v.x; sum[r] += f[1] * v.y; sum[r] += f[2] * v.z; sum[r] += f[3] * v.w;
            }
        }
        float d = 1;
        if constexpr (T == QWEN3I_FP8) d = 256 * load_scales<T>(tile + j * full, n, i).d[0];
        UNROLL for (int r = 0; r < R; r++) sums[j][r] += sum[r] * d;
    }
}

/* Of row r of x: the sums of this lane's row from each of the two places. */
template <int R> struct block_result { float2 of[R]; };

/* Lane l gets the sums of row l from each of the two places. stage: x is not there yet. Order: lane i takes
   unit i of each tile in turn; lanes are added by exchange. */
template <int T, int R>
static __device__ NO_INLINE block_result<R> block_sums_of(const block_in &in, block_rows rows, int units,
                                                          int row_bytes, bool stage) {
    constexpr int EACH = tile_units(T), FULL = tile_bytes(T, EACH), ROOM = BLOCK_RING / (2 * FULL),
                  DEPTH = ROOM < 8 ? ROOM : 8;
    static_assert(DEPTH >= 2, "while one is multiplied, the next must come");
    QWEN3_DYNAMIC_SHARED(memory);
    const int n = rows.n_a + rows.n_b, lane = lane_id();
    unsigned char *const ring = memory + warp_id() * BLOCK_RING, *const ring_end = ring + DEPTH * 2 * FULL;
    unsigned char *put = ring + 16 * lane;      /* the stages that are fetched and multiplied next */
    const unsigned char *take = ring, *from[2] = {rows.a, rows.a};
    int row = 0, left = n > 0 ? row_bytes : 0;  /* of the rows that are fetched: the first, bytes to come */
    const auto find = [&]() {
        UNROLL for (int j = 0; j < 2; j++) {
            const int r = row + j < n ? row + j : row;
            from[j] = r < rows.n_a ? rows.a + r * row_bytes : rows.b + (r - rows.n_a) * row_bytes;
            from[j] += 16 * lane;
        }
    };
    const auto fetch = [&]() {
        const int mine = least(left, FULL) - 16 * lane;
        UNROLL for (int i = 0; i < FULL; i += 512)
            if (i < mine) {
                copy_once(put + i, from[0] + i, true);
                copy_once(put + FULL + i, from[1] + i, true);
            }
        copy_commit();
        put = put + 2 * FULL < ring_end ? put + 2 * FULL : ring + 16 * lane;
        left -= FULL;
        from[0] += FULL;
        from[1] += FULL;
        if (left <= 0) {
            row += 2;
            left = row < n ? row_bytes : 0;
            if (row < n) find();
        }
    };
    find();
    NO_UNROLL for (int i = 0; i < DEPTH - 1; i++) fetch();
    if (stage) {
        let_next_start();
        block_stage<R>(in);
    }
    const unsigned char *planes = block_planes(memory);
    const int ld = (int)block_x_bytes(in);
    if (is_float(T) && in.ints) planes += INT_PLANES * 16 * round_up(in.units, 32);
    block_result<R> result;
    UNROLL for (int x = 0; x < R; x++) result.of[x] = make_float2(0, 0);
    NO_UNROLL for (int r = 0; r < n; r += 2) {
        float sums[2][R];
        UNROLL for (int x = 0; x < R; x++) sums[0][x] = sums[1][x] = 0;
        NO_UNROLL for (int first = 0; first < units; first += EACH) {
            const int there = least(EACH, units - first);
            copy_wait<DEPTH - 2>();
            __syncwarp();
            if (lane < there) {
                if constexpr (is_float(T))
                    add_floats<T, R>(sums, take, FULL, there, lane,
                                     planes + x_at<FLOAT_PLANES>(first + lane, 0) * 16, ld);
                else
                    add_ints<T, R>(sums, take, FULL, there, lane,
                                   planes + (first * INT_PLANES + lane) * 16, ld);
            }
            fetch();                    /* where the tiles before were, which all lanes have multiplied */
            take = take + 2 * FULL < ring_end ? take + 2 * FULL : ring;
        }
        UNROLL for (int x = 0; x < R; x++)
            UNROLL for (int j = 0; j < 2; j++) {
                const float sum = warp_sum(sums[j][x]);
                const int i = r + j;
                if (i < rows.n_a && i == lane) result.of[x].x = sum;
                if (i >= rows.n_a && i - rows.n_a == lane) result.of[x].y = sum;
            }
    }
    copy_wait<0>();
    __syncwarp();
    return result;
}

#define QWEN3_CASE(name, function, gguf, elements, bytes) \
    case QWEN3I_##name: return block_sums_of<QWEN3I_##name, R>(in, rows, p.units, p.row_bytes, stage);
template <int R>
DEVICE block_result<R> block_sums(const block_in &in, const block_part &p, const block_rows &rows,
                                  bool stage) {
    switch (p.type) { QWEN3I_TYPES(QWEN3_CASE) default: return block_result<R>(); }
}
#undef QWEN3_CASE

/* The sums of rows [mine.first, mine.end): done(r, row, n, sum) with lane l's of rows row + l, l < n, up to
   32 at a time, and of row r of x. stage: x is not there yet; then all warps call this, once. */
template <int R, class F>
DEVICE void block_multiply(const block_in &in, row_range mine, F done, bool stage = true) {
    int part = 0, base = 0;
    for (int row = mine.first; row < mine.end; ) {
        while (row - base >= in.parts[part].rows) base += in.parts[part++].rows;
        const block_part &p = in.parts[part];
        const int n = least(64, least(mine.end, base + p.rows) - row), half = least(32, n);
        const unsigned char *from = p.data + (size_t)(row - base) * p.row_bytes;
        const block_rows rows = {from, from + (size_t)half * p.row_bytes, half, n - half};
        const block_result<R> sums = block_sums<R>(in, p, rows, stage);
        UNROLL for (int r = 0; r < R; r++) {
            done(r, row, half, sums.of[r].x);
            done(r, row + half, n - half, sums.of[r].y);
        }
        row += n;
        stage = false;
    }
    if (stage) {
        let_next_start();
        block_stage<R>(in);
    }
}

/* This warp's of n rows, and this block's: as warp_share, for any number of warps. */
DEVICE int block_share_begin(int warp, int n) {
    return (int)((long long)warp * n / ((int)gridDim.x * (n_threads() / 32)));
}
DEVICE row_range block_warp_share(int n) {
    const int warp = block_x() * (n_threads() / 32) + warp_id();
    const row_range r = {block_share_begin(warp, n), block_share_begin(warp + 1, n)};
    return r;
}

/* Pairs of a row of gate and one of up: done(r, row, n, sums). */
template <int R, class F>
DEVICE void block_multiply_pairs(const block_in &in, row_range mine, F done, bool stage = true) {
    const block_part &gate = in.parts[0], &up = in.parts[1];
    const bool same = gate.type == up.type;
    for (int row = mine.first; row < mine.end || stage; row += 32, stage = false) {
        const int n = mine.end > row ? least(32, mine.end - row) : 0;
        const unsigned char *g = gate.data + (size_t)row * gate.row_bytes,
                            *u = up.data + (size_t)row * up.row_bytes;
        const block_rows first = {g, u, n, same ? n : 0}, second = {u, u, 0, n};
        block_result<R> sums = block_sums<R>(in, gate, first, stage);
        if (!same) {
            const block_result<R> others = block_sums<R>(in, up, second, false);
            UNROLL for (int r = 0; r < R; r++) sums.of[r].y = others.of[r].y;
        }
        UNROLL for (int r = 0; r < R; r++) done(r, row, n, sums.of[r]);
    }
}

/* block_product: up to R rows of x times a matrix in blocks. The warps of the grid share its rows, or pairs
   of them, evenly. One kernel for all ends, and a function in it for each format, which others would only
   repeat. Equals qwen3i_matmul, and what vector_product does after it. */
template <int R>
static __global__ void __launch_bounds__(32 * block_shape<R>::WARPS, block_shape<R>::BLOCKS)
    block_product_kernel(const __grid_constant__ block_in in, const __grid_constant__ vector_end e) {
    __shared__ int finished[STREAM_HEADS];
    const int warps = n_threads() / 32;
    row_angles angles;                  /* written long before, so there is nothing to wait for */
    if (e.kind == END_HEADS) angles = load_row_angles(e.qkv, warp_id() < in.rows ? warp_id() : 0);
    if (e.kind == END_MLP) {
        block_multiply_pairs<R>(in, block_warp_share(in.parts[0].rows),
                                [&](int r, int row, int n, float2 sums) {
            if (lane_id() < n && r < in.rows)
                e.y[(size_t)r * e.ldy + row + lane_id()] = silu(sums.x) * sums.y;
        });
        return;
    }
    block_multiply<R>(in, block_warp_share(in.n), [&](int r, int row, int n, float sum) {
        if (r < in.rows && lane_id() < n) finish_sum(e, r, row + lane_id(), sum);
    });
    if (e.kind != END_HEADS) return;
    const row_range mine = {block_share_begin(block_x() * warps, in.n),
                            block_share_begin((block_x() + 1) * warps, in.n)};
    finish_heads(mine, in.rows, e.qkv, e.tickets, finished, least(STREAM_HEADS, n_threads()), angles);
}

static block_in block_input(const pass *p, const matrix &w, const input &h, int row, int rows) {
    block_in in;
    memset(&in, 0, sizeof in);
    for (int i = 0; i < w.n_parts; i++) {
        in.parts[i] = w.parts[i];
        in.units = most(in.units, w.parts[i].units);
        in.ints = in.ints || !is_float(w.parts[i].type);
        in.floats = in.floats || is_float(w.parts[i].type);
    }
    in.n = w.rows;
    in.k = w.cols;
    in.x = h.x + (size_t)row * h.ldx;
    in.ldx = h.ldx;
    in.rows = rows;
    in.gain = h.gain;
    in.eps = p->c->m->config.rms_eps;
    return in;
}

/* Warps of a block: as many as shared memory has room for; 0: not even one. More than one need not be more
   than the rows of x, of which each wants one. */
template <int R> static int block_warps(const pass *p, const block_in &in) {
    int warps = block_shape<R>::WARPS;
    while (warps > 0 && block_memory(in, R, warps) > p->c->m->block_shared) warps /= 2;
    return warps >= R ? warps : 0;
}

/* Can the kernel do the norm of its input? */
static bool block_norms_itself(const pass *p, const matrix &w) {
    const input h = {p->x, p->c->embd_ld, NULL, NULL};
    return goes_alone(p->c, p->n) && w.cols % 4 == 0 &&
           w.cols <= STREAM_NORM * 4 * 32 * block_warps<1>(p, block_input(p, w, h, 0, 1));
}

/* units: rows, or pairs of them */
template <int R>
static qwen3_result launch_block(const pass *p, const block_in &in, const vector_end &e, int units) {
    const int warps = block_warps<R>(p, in);
    if (warps == 0)
        return qwen3i_fail(p->err, QWEN3_ERR_UNSUPPORTED,
                           "CUDA: rows of %d elements in blocks are too long for %s", in.k, p->c->m->name);
    return launched(p, launch_shared(p->early, 1, p->s, grid1(least(p->c->m->n_sm, ceil_div(units, warps))),
                                     32 * warps, block_memory(in, R, warps), block_product_kernel<R>, in, e),
                    "block_product");
}

/* Rows of x, four at a time if there are several and they have room. */
static qwen3_result block_rows_of(const pass *p, const matrix &w, const input &h, int rows, vector_end e,
                                  int units) {
    for (int r = 0; r < rows; ) {
        const int n = least(BLOCK_ROWS, rows - r);
        const block_in few = block_input(p, w, h, r, n), one = block_input(p, w, h, r, 1);
        const bool together = n > 1 && block_warps<BLOCK_ROWS>(p, few) > 0;
        TRY(together ? launch_block<BLOCK_ROWS>(p, few, e, units) : launch_block<1>(p, one, e, units));
        r += together ? n : 1;
        skip_rows(&e, together ? n : 1);
    }
    return QWEN3_OK;
}

/* ---- 5 to 32 rows of x: by tensor cores ---- */
/* A code is a whole number (or one of E4M3) that F16 holds exactly: the left operand of a product is made of
   16 rows of codes in registers, the right one is x, rounded to F16 times a power of two of each row, 8 rows
   of it at a time. A unit's sum is float32, and is multiplied by the unit's scale then. A warp takes a step
   at a time: 16 rows of W (a tile) by 4 or 8 units, which come by a ring of its own. Blocks have whole tiles,
   and all of k or a slice of it; the warps of a block take whole tiles while there is one for each, then
   shares of those left. */
const int FEW_WARPS  = 16;
const int FEW_UNITS  = 8;               /* of a row: x comes in so many, and they are a step or two */
const int FEW_RING   = 6912;            /* bytes of a warp's: three steps */
const int FEW_SCALES = 1024;            /* the same of what a step is scaled by */
const int FEW_HEAD   = FEW_WARPS * (FEW_RING + FEW_SCALES) + FEW_MOST * 4;     /* of shared memory before x */

struct few_in {
    block_part parts[3];
    int        n_parts;
    int        tile, n_tiles;           /* of W: the first, and how many */
    int        steps, slices;           /* of a row; of k */
    int        rows, sums;              /* of x; planes of its sums that are wanted */
    const unsigned char *x;             /* [units, 8 NT, 32] F16, see few_round */
    const float *x_sums, *x_scale;      /* [2][units, 8 NT]; [8 NT] */
    float4    *partial;                 /* [slices, n_tiles, NT, 32] sums as a warp's lanes have them */
    unsigned  *tickets;                 /* [blocks], zero before and after */
};

/* Is the middle of a format's codes taken off before they are multiplied? Then an offset may be left out. */
static constexpr __host__ __device__ int code_center(int type) {
    return type == QWEN3I_Q4_0 ? 8 : type == QWEN3I_Q5_0 ? 16 : type == QWEN3I_Q6_K ? 32 :
           type == QWEN3I_Q3_K ? 4 : 0;
}
static constexpr __host__ __device__ bool few_offset(int type) {
    return has_offset(type) && code_center(type) == 0;
}
static constexpr __host__ __device__ bool has_signs(int type) {
    return has_table(type) || type == QWEN3I_Q8_0 || type == QWEN3I_INT8;
}
/* Copies of 16 bytes that hold the scales of n units, wherever they begin. */
static constexpr __host__ __device__ int scale_pieces(int type, int n) {
    const int bytes = (n + units_of(type) - 1) / units_of(type) * scale_bytes(type);
    return type == QWEN3I_Q5_0 ? 2 : type == QWEN3I_Q5_1 ? n / 2 :
           bytes <= 8 ? 1 : bytes % 16 == 0 ? bytes / 16 : 2;
}
/* A step of U units in the ring: 16 rows of both planes and the scales. */
template <int T, int U, int RING> struct step_shape {
    enum {
        LOW = U * block_format_of(T).low / 4, HIGH = U * block_format_of(T).high / 4,
        SCALES = scale_pieces(T, U), PITCH = 16 * ((LOW + HIGH + SCALES) | 1), BYTES = 16 * PITCH,
        ROOM = RING / BYTES, DEPTH = ROOM < 8 ? ROOM : 8, UNITS = U
    };
};
static constexpr __host__ __device__ int few_units(int type) {
    const int pieces = 2 * (block_format_of(type).low + block_format_of(type).high) + scale_pieces(type, 8);
    return type == QWEN3I_Q2_K || pieces > 9 ? 4 : 8;
}
template <int T> struct few_shape : step_shape<T, few_units(T), FEW_RING> {
    enum { FIELDS = (has_halves(T) ? 2 : 1) * (few_offset(T) ? 2 : 1) };
};

/* Where a step lies in a row: its tile, that one's units, and its first unit. */
struct few_place { int at, n, first; };
template <int T, int U> DEVICE few_place few_place_of(int units, unsigned step) {
    const int tile = (int)(step / (32u / U));
    const few_place at = {tile * tile_bytes(T, 32), least(32, units - 32 * tile),
                          (int)(step % (32u / U)) * U};
    return at;
}
template <int T> DEVICE int few_scales_at(const few_place &at) {
    return scale_plane(T, at.n) + (int)((unsigned)at.first / units_of(T)) * scale_bytes(T);
}

/* A lane copies piece lane % PIECES of 16 bytes of some of 16 rows: where these are from a tile's first row
   on, which `last` more rows of the matrix follow. */
template <int PIECES> struct copy_rows {
    enum { STEP = 32 / PIECES, N = PIECES > 1 ? 16 / STEP : 1 };
    unsigned at[N];
    __device__ __forceinline__ void find(int row_bytes, int last) {
        UNROLL for (int i = 0; i < N; i++)
            at[i] = (unsigned)(least(lane_id() / PIECES + i * STEP, last) * row_bytes +
                               lane_id() % PIECES * 16);
    }
    /* nothing past `left` bytes */
    template <int PITCH>
    __device__ __forceinline__ void copy(unsigned char *to, const unsigned char *from, int left) const {
        const int piece = lane_id() % PIECES * 16;
        to += lane_id() / PIECES * PITCH + piece;
        UNROLL for (int i = 0; i < N; i++)
            if (PIECES > 1 || lane_id() < 16) copy_once(to + i * STEP * PITCH, from + at[i], piece < left);
    }
};
/* Brings steps of a tile of 16 rows of W, one after the other. */
template <int T, class S> struct step_source {
    enum { LOW = block_format_of(T).low == 8 ? S::LOW / 2 : S::LOW, HIGH = S::HIGH > 0 ? S::HIGH : 1 };
    const unsigned char *tile;          /* its first row */
    int units;                          /* of a row */
    copy_rows<LOW> low;
    copy_rows<HIGH> high;
    copy_rows<S::SCALES> scales;

    __device__ __forceinline__ void find(const unsigned char *data, int row_bytes, int rows, int row) {
        tile = data + (size_t)row * row_bytes;
        low.find(row_bytes, rows - 1 - row);
        if (S::HIGH > 0) high.find(row_bytes, rows - 1 - row);
        scales.find(row_bytes, rows - 1 - row);
    }
    __device__ __forceinline__ void fetch(unsigned char *to, int step) const {
        const few_place at = few_place_of<T, S::UNITS>(units, step);
        const unsigned char *from = tile + at.at;
        const int bytes = tile_bytes(T, at.n), first = 4 * block_format_of(T).low * at.first,
                  scale = few_scales_at<T>(at) / 16 * 16;
        if constexpr (block_format_of(T).low == 8) {
            low.template copy<S::PITCH>(to, from + first / 2, bytes - first / 2);
            low.template copy<S::PITCH>(to + 8 * S::LOW, from + 16 * at.n + first / 2,
                                        bytes - 16 * at.n - first / 2);
        } else low.template copy<S::PITCH>(to, from + first, bytes - first);
        if constexpr (S::HIGH > 0) {
            const int plane = high_plane(T, at.n) + 4 * block_format_of(T).high * at.first;
            high.template copy<S::PITCH>(to + 16 * S::LOW, from + plane, bytes - plane);
        }
        scales.template copy<S::PITCH>(to + 16 * (S::LOW + S::HIGH), from + scale, bytes - scale);
    }
};

/* The scales of a step as float32, those of rows g and g + 8 of a unit side by side; zero past its units. */
template <int T> DEVICE void few_scales(float *to, const unsigned char *stage, const few_place &at) {
    typedef few_shape<T> S;
    const int row = lane_id() % 16, u0 = lane_id() / 16 * (S::UNITS / 2), before = at.first % units_of(T);
    const unsigned char *h = stage + row * S::PITCH + 16 * (S::LOW + S::HIGH) + few_scales_at<T>(at) % 16;
    UNROLL for (int k = 0; k < S::UNITS / 2; k++) {
        const int u = u0 + k;
        const unsigned i = (unsigned)(before + u);
        unit_scales s = scales_at<T>(h + i / units_of(T) * scale_bytes(T), (int)(i % units_of(T)));
        const bool there = u < at.n - at.first;
        UNROLL for (int i = 0; i < 2; i++) {
            s.d[i] = there ? s.d[i] : 0;
            s.m[i] = there ? s.m[i] : 0;
        }
        if (T == QWEN3I_FP8) s.d[0] *= 256;
        float *out = to + ((u * 8 + row % 8) * 2 + row / 8) * S::FIELDS;
        if constexpr (S::FIELDS == 1) *out = s.d[0];
        else if constexpr (S::FIELDS == 4)
            *(float4 *)(void *)out = make_float4(s.d[0], s.d[1], s.m[0], s.m[1]);
        else *(float2 *)(void *)out = make_float2(s.d[0], has_halves(T) ? s.d[1] : s.m[0]);
    }
}
/* Those of both rows of a lane: d and, if there are any, those of the other half or the offsets. */
struct few_factors { float d[2], e[2], m[2], m2[2]; };
template <int T> DEVICE few_factors few_factors_of(const float *scales, int unit) {
    constexpr int F = few_shape<T>::FIELDS;
    const float *at = scales + (unit * 8 + lane_id() / 4) * 2 * F;
    few_factors f = {};
    if constexpr (F == 1) {
        const float2 v = *(const float2 *)(const void *)at;
        f.d[0] = v.x; f.d[1] = v.y;
    } else
        UNROLL for (int r = 0; r < F / 2; r++) {
            const float4 v = ((const float4 *)(const void *)at)[r];
            if constexpr (F == 4) { f.d[r] = v.x; f.e[r] = v.y; f.m[r] = v.z; f.m2[r] = v.w; }
            else {
                f.d[0] = v.x; f.e[0] = f.m[0] = v.y;
                f.d[1] = v.z; f.e[1] = f.m[1] = v.w;
            }
        }
    return f;
}

/* Eight codes in the bytes of two words, and less their middle, as F16: elements 0 and 2, 1 and 3 of each. */
template <int T> DEVICE void bytes_to_halves(unsigned (&h)[4], unsigned low, unsigned high) {
    if constexpr (T == QWEN3I_FP8) {
        const unsigned pairs[4] = {__byte_perm(low, 0, 0x2404), __byte_perm(low, 0, 0x3414),
                                   __byte_perm(high, 0, 0x2404), __byte_perm(high, 0, 0x3414)};
        UNROLL for (int i = 0; i < 4; i++)
            h[i] = (pairs[i] & 0x80008000u) | (pairs[i] & 0x7F007F00u) >> 1;
    } else {
        const unsigned flip = has_signs(T) ? 0x80808080u : 0, magic = 0x64646464u,  /* 1024 + code */
                       less = 0xE400E400u + (unsigned)(has_signs(T) ? 128 : code_center(T)) * 0x10001u;
        low ^= flip;
        high ^= flip;
        h[0] = add_halves(__byte_perm(low, magic, 0x4240), less);
        h[1] = add_halves(__byte_perm(low, magic, 0x4341), less);
        h[2] = add_halves(__byte_perm(high, magic, 0x4240), less);
        h[3] = add_halves(__byte_perm(high, magic, 0x4341), less);
    }
}
/* The same of eight codes of four bits: 1024 + code, and 64 + code. */
template <int T> DEVICE void nibbles_to_halves(unsigned (&h)[4], unsigned word) {
    const unsigned c = (unsigned)code_center(T), less = 0xE400E400u + c * 0x10001u,
                   less_high = 0xD400D400u + 16 * c * 0x10001u;
    h[0] = add_halves(and_or(word, 0x000F000Fu, 0x64006400u), less);
    h[2] = add_halves(and_or(word, 0x00F000F0u, 0x54005400u), less_high);
    word >>= 8;
    h[1] = add_halves(and_or(word, 0x000F000Fu, 0x64006400u), less);
    h[3] = add_halves(and_or(word, 0x00F000F0u, 0x54005400u), less_high);
}

/* Of units u and u + 1 and of rows g and g + 8 the codes of elements 4 t on and of those 16 further, in the
   bytes of two words; as they are stored, in the first, where these are all bits of a code and no table's. */
static constexpr __device__ bool plain_nibbles(int type) {
    return block_format_of(type).low == 4 && block_format_of(type).high == 0 && !has_table(type);
}
template <int T, class S> DEVICE void step_codes(unsigned (&q)[2][2][2], const unsigned char *stage, int u) {
    constexpr block_format f = block_format_of(T);
    const int lane = lane_id(), t = lane % 4;
    if constexpr (f.low == 8)
        UNROLL for (int v = 0; v < 2; v++) {
            unsigned r[4];
            load_matrices(r, stage + lane % 16 * S::PITCH + lane / 16 * 8 * S::LOW + 16 * (u + v));
            UNROLL for (int i = 0; i < 4; i++) q[v][i % 2][i / 2] = r[i];
        }
    else if constexpr (f.low == 4) {
        unsigned r[4];
        load_matrices(r, stage + lane % 16 * S::PITCH + 16 * (lane / 16 + u));
        UNROLL for (int i = 0; i < 4; i++) q[i / 2][i % 2][0] = r[i];
    }
    if constexpr (f.low < 8 && !plain_nibbles(T))
    UNROLL for (int v = 0; v < 2; v++) UNROLL for (int r = 0; r < 2; r++) {
        const unsigned char *row = stage + (lane / 4 + 8 * r) * S::PITCH;
        unsigned &low = q[v][r][0], &high = q[v][r][1];
        if constexpr (has_table(T)) { table_bytes<T>(low, high, low); continue; }
        const unsigned mask = ((1u << f.low) - 1) * 0x01010101u;
        if constexpr (f.low == 2) low = word_at(row + 8 * (u + v) + t / 2 * 4) >> t % 2 * 4;
        high = low >> f.low & mask;
        low &= mask;
        if constexpr (f.high > 0) {
            const unsigned char *at = row + 16 * S::LOW + 4 * f.high * (u + v);
            const unsigned more = ((1u << f.high) - 1) * 0x01010101u,
                           bits = f.high == 2 ? word_at(at + t / 2 * 4) >> t % 2 * 4 : word_at(at) >> 2 * t;
            low |= (bits & more) << f.low;
            high |= (bits >> f.high & more) << f.low;
        }
    }
}
template <int T> DEVICE void codes_to_halves(unsigned (&h)[4], const unsigned (&q)[2]) {
    if constexpr (plain_nibbles(T)) nibbles_to_halves<T>(h, q[0]);
    else bytes_to_halves<T>(h, q[0], q[1]);
}

/* acc[j] += 16 rows of W by a step's units times rows 8 j .. 8 j + 7 of x, in fragments of sums. x, sums: of
   the step's first unit; planes of sums are `plane` apart. Order: the unit's 32 elements by the tensor core,
   units in turn. */
template <int T, int NT>
DEVICE void few_multiply(float (&acc)[NT][4], const unsigned char *stage, const float *scales,
                         const unsigned char *x, const float *sums, int plane) {
    const int lane = lane_id();
    x += lane / 4 * 64 + lane % 4 * 16;
    sums += 2 * (lane % 4);
    _Pragma("unroll (NT == 1 ? 2 : 1)") for (int u = 0; u < few_shape<T>::UNITS; u += 2) {
        unsigned q[2][2][2];
        step_codes<T, few_shape<T> >(q, stage, u);
        UNROLL for (int v = 0; v < 2; v++) {
            unsigned g[4], h[4];        /* of row g, of row g + 8 */
            codes_to_halves<T>(g, q[v][0]);
            codes_to_halves<T>(h, q[v][1]);
            const few_factors f = few_factors_of<T>(scales, u + v);
            const unsigned a[4] = {g[0], h[0], g[1], h[1]}, b[4] = {g[2], h[2], g[3], h[3]};
            UNROLL for (int j = 0; j < NT; j++) {
                const int at = (u + v) * 8 * NT + 8 * j;
                const uint4 w = *(const uint4 *)(const void *)(x + at * 64);
                float one[4] = {0, 0, 0, 0}, two[4] = {0, 0, 0, 0};
                multiply(one, a, w.x, w.y, half_t());
                if constexpr (has_halves(T)) multiply(two, b, w.z, w.w, half_t());
                else multiply(one, b, w.z, w.w, half_t());
                UNROLL for (int i = 0; i < 4; i++) acc[j][i] += one[i] * f.d[i / 2];
                if constexpr (has_halves(T))
                    UNROLL for (int i = 0; i < 4; i++) acc[j][i] += two[i] * f.e[i / 2];
                if constexpr (few_offset(T)) {
                    float2 all = *(const float2 *)(const void *)(sums + at);
                    if constexpr (has_halves(T)) {
                        const float2 first = *(const float2 *)(const void *)(sums + plane + at);
                        all = make_float2(all.x - first.x, all.y - first.y);
                        UNROLL for (int i = 0; i < 4; i++)
                            acc[j][i] += f.m[i / 2] * (i % 2 ? first.y : first.x);
                    }
                    UNROLL for (int i = 0; i < 4; i++)
                        acc[j][i] += (has_halves(T) ? f.m2 : f.m)[i / 2] * (i % 2 ? all.y : all.x);
                }
            }
        }
    }
}

/* The steps of a warp: whole tiles, FEW_WARPS apart, then `tail` steps of the tiles that are left. */
struct few_walk { int steps, tail_tile, tail_step, tail; };
struct few_cursor { int tile, step, left; };
DEVICE few_cursor few_begin(few_walk &w, int steps, int n_tiles) {
    const int rounds = n_tiles / FEW_WARPS, all = n_tiles % FEW_WARPS * steps,
              from = warp_id() * all / FEW_WARPS, to = (warp_id() + 1) * all / FEW_WARPS;
    const few_walk walk = {steps, rounds * FEW_WARPS + from / steps, from % steps, to - from};
    const few_cursor c = {rounds > 0 ? warp_id() : walk.tail_tile, rounds > 0 ? 0 : walk.tail_step,
                          rounds * steps + walk.tail};
    w = walk;
    return c;
}
DEVICE void few_next(few_cursor &c, const few_walk &w) {
    c.left--;
    c.step++;
    if (c.left == w.tail) { c.tile = w.tail_tile; c.step = w.tail_step; }
    else if (c.step == w.steps) { c.step = 0; c.tile += c.left > w.tail ? FEW_WARPS : 1; }
}

/* This block's slice of k, and its part of tiles. */
DEVICE int few_slice(const few_in &in) { return block_x() % in.slices; }
DEVICE row_range few_steps(const few_in &in) {
    const int s = few_slice(in);
    const row_range r = {s * in.steps / in.slices, (s + 1) * in.steps / in.slices};
    return r;
}
DEVICE row_range few_share(const few_in &in) {
    const long long group = block_x() / in.slices, groups = (int)gridDim.x / in.slices;
    const row_range r = {(int)(group * in.n_tiles / groups), (int)((group + 1) * in.n_tiles / groups)};
    return r;
}

/* The slice of x, its sums and scales to shared memory. */
template <int NT> DEVICE void few_stage_x(const few_in &in, unsigned char *memory) {
    const row_range s = few_steps(in);
    const int units = FEW_UNITS * (s.end - s.first), first = FEW_UNITS * s.first;
    unsigned char *x = memory + FEW_HEAD, *sums = x + units * 8 * NT * 64;
    let_next_start();
    wait_for_previous();
    for (int i = tid(); i < units * 8 * NT * 4; i += n_threads())
        copy_async(x + 16 * i, in.x + (size_t)first * 8 * NT * 64 + 16 * i, true);
    for (int p = 0; p < in.sums; p++)
        for (int i = tid(); i < units * NT * 2; i += n_threads())
            copy_async(sums + (p * units * NT * 2 + i) * 16,
                       in.x_sums + ((size_t)p * FEW_UNITS * in.steps + first) * 8 * NT + 4 * i, true);
    if (tid() < 8 * NT) ((float *)(void *)(memory + FEW_HEAD))[tid() - FEW_MOST] = in.x_scale[tid()];
    copy_commit();
    copy_wait<0>();
    __syncthreads();
}

/* Rows of one format that a block multiplies: tiles [first, first + n) of a part whose rows are row0 on of W;
   the first is tile `index` of in's. */
struct few_rows { int first, n, row0, index; };

template <int T, int NT>
static __device__ NO_INLINE void few_tiles(const few_in &in, block_part p, few_rows rows, bool stage) {
    typedef few_shape<T> S;
    QWEN3_DYNAMIC_SHARED(memory);
    static_assert((int)S::DEPTH >= 3 && 2 * NT * 32 * 16 <= FEW_RING, "room for steps, and for sums");
    static_assert(S::UNITS * 64 * S::FIELDS <= FEW_SCALES, "room for a step's scales");
    const row_range slice = few_steps(in);
    const int units = FEW_UNITS * (slice.end - slice.first), steps = units / S::UNITS,
              first = slice.first * (FEW_UNITS / S::UNITS), lane = lane_id(), rest = rows.n % FEW_WARPS;
    unsigned char *const ring = memory + warp_id() * FEW_RING, *const ring_end = ring + S::DEPTH * S::BYTES;
    float *const scales = (float *)(void *)(memory + FEW_WARPS * FEW_RING + warp_id() * FEW_SCALES);
    const unsigned char *const x = memory + FEW_HEAD;
    const float *const sums = (const float *)(const void *)(x + units * 8 * NT * 64);
    float4 *const partial = in.partial + ((size_t)few_slice(in) * in.n_tiles + rows.index) * NT * 32;
    few_walk walk;
    few_cursor c = few_begin(walk, steps, rows.n), ahead = c;
    step_source<T, S> source;
    source.units = p.units;
    source.find(p.data, p.row_bytes, p.rows, 16 * (rows.first + ahead.tile));
    unsigned char *put = ring;
    const unsigned char *take = ring;
    float acc[NT][4], held[NT][4];
    UNROLL for (int j = 0; j < NT; j++) UNROLL for (int i = 0; i < 4; i++) acc[j][i] = held[j][i] = 0;
    NO_UNROLL for (int n = 1; n < S::DEPTH || c.left > 0; n++) {
        if (n >= S::DEPTH) {
            copy_wait<S::DEPTH - 2>();
            __syncwarp();
        }
        if (ahead.left > 0) {           /* to where the step before was, which all lanes have multiplied */
            const int before = ahead.tile;
            source.fetch(put, first + ahead.step);
            few_next(ahead, walk);
            if (ahead.tile != before)
                source.find(p.data, p.row_bytes, p.rows, 16 * (rows.first + ahead.tile));
        }
        copy_commit();
        put = put + S::BYTES < ring_end ? put + S::BYTES : ring;
        if (n < S::DEPTH) {
            if (n == S::DEPTH - 1 && stage) few_stage_x<NT>(in, memory);
            continue;
        }
        few_scales<T>(scales, take, few_place_of<T, S::UNITS>(p.units, first + c.step));
        __syncwarp();
        few_multiply<T, NT>(acc, take, scales, x + c.step * S::UNITS * 8 * NT * 64,
                            sums + c.step * S::UNITS * 8 * NT, units * 8 * NT);
        take = take + S::BYTES < ring_end ? take + S::BYTES : ring;
        const few_cursor was = c;
        const bool whole = was.left > walk.tail;
        few_next(c, walk);
        if (was.step + 1 < steps || (!whole && c.left == 0)) continue;
        UNROLL for (int j = 0; j < NT; j++) {
            const float4 v = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
            if (whole) partial[(was.tile * NT + j) * 32 + lane] = v;
            UNROLL for (int i = 0; i < 4; i++) { held[j][i] = acc[j][i]; acc[j][i] = 0; }
        }
    }
    copy_wait<0>();
    __syncwarp();
    if (rest == 0) return;
    const int all = rest * steps;
    UNROLL for (int j = 0; j < NT; j++) {
        float4 *slot = (float4 *)(void *)ring + j * 32 + lane;
        slot[0] = make_float4(held[j][0], held[j][1], held[j][2], held[j][3]);
        slot[NT * 32] = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
    }
    __syncthreads();
    NO_UNROLL for (int k = tid(); k < rest * NT * 32; k += n_threads()) {
        const int tile = k / (NT * 32);
        float4 sum = make_float4(0, 0, 0, 0);
        NO_UNROLL for (int w = 0; w < FEW_WARPS; w++) {
            const int from = w * all / FEW_WARPS, to = (w + 1) * all / FEW_WARPS;
            if (to <= from || to <= tile * steps || from >= (tile + 1) * steps) continue;
            const float4 v = ((const float4 *)(const void *)(memory + w * FEW_RING))[
                ((to - 1) / steps == tile ? NT * 32 : 0) + k % (NT * 32)];
            sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w;
        }
        partial[(rows.n - rest) * NT * 32 + k] = sum;
    }
    __syncthreads();
}

#define QWEN3_CASE(name, function, gguf, elements, bytes) case QWEN3I_##name: \
    if constexpr (is_block(QWEN3I_##name)) few_tiles<QWEN3I_##name, NT>(in, p, rows, stage); break;
template <int NT>
DEVICE void few_tiles_of(const few_in &in, const block_part &p, const few_rows &rows, bool stage) {
    switch (p.type) { QWEN3I_TYPES(QWEN3_CASE) default: break; }
}
#undef QWEN3_CASE

/* f(part, rows of it) for all of a range of tiles, counted over all parts. */
template <class F> DEVICE void few_each_part(const few_in &in, row_range tiles, F f) {
    for (int i = 0, row0 = 0, tile0 = 0; i < in.n_parts; i++) {
        const int n = ceil_div(in.parts[i].rows, 16), first = tiles.first > tile0 ? tiles.first - tile0 : 0,
                  end = least(n, tiles.end - tile0);
        const few_rows rows = {first, end - first, row0, tile0 + first - in.tile};
        if (end > first) f(in.parts[i], rows);
        row0 += in.parts[i].rows;
        tile0 += n;
    }
}

/* Element i of the sums of a part's tiles, as a lane of a warp has them, to its places. */
template <int NT>
static __device__ NO_INLINE void few_finish(const few_in &in, const vector_end &e, const block_part &p,
                                            few_rows rows, int i, float4 sum, const float *x_scale) {
    const int row = 16 * (rows.first + i / (NT * 32)) + i % 32 / 4, col = i / 32 % NT * 8 + i % 4 * 2;
    const float v[4] = {sum.x, sum.y, sum.z, sum.w};
    if (e.kind == END_HEADS) {
        NO_UNROLL for (int j = 0; j < 4; j++) {
            const int r = row + j / 2 * 8, c = col + j % 2;
            const float value = j < 2 ? j ? v[1] : v[0] : j == 2 ? v[2] : v[3];
            if (r < p.rows && c < in.rows) store_projection(e.qkv, c, rows.row0 + r, value * x_scale[c]);
        }
        return;
    }
    float *to[4], old[4];               /* all loads are on their way before the first is waited for */
    UNROLL for (int j = 0; j < 4; j++) {
        const int r = row + j / 2 * 8, c = col + j % 2;
        to[j] = r < p.rows && c < in.rows ? place_of_sum(e, c, rows.row0 + r) : NULL;
        old[j] = to[j] && e.kind == END_ADD ? *to[j] : 0;
    }
    UNROLL for (int j = 0; j < 4; j++) if (to[j]) *to[j] = old[j] + v[j] * x_scale[col + j % 2];
}

/* Is this the block of its group that ends last? Then it sees what the others have stored. */
DEVICE bool few_last(const few_in &in, int *last) {
    if (in.slices > 1) __threadfence();
    __syncthreads();
    if (in.slices == 1) return true;
    if (tid() == 0) {
        unsigned *ticket = in.tickets + block_x() / in.slices;
        *last = atomicAdd(ticket, 1u) == (unsigned)in.slices - 1;
        if (*last) *ticket = 0;
    }
    __syncthreads();
    if (*last) __threadfence();
    return *last;
}

/* few_product: x [rows, k], as few_round leaves it, times W in blocks, and then what vector_end says, but for
   pairs. Grid: groups of blocks that share tiles, each with a slice of k; the one of a group that ends last
   adds them up, in order. Equals qwen3i_matmul or qwen3i_matmul_add with x rounded, or what block_product
   does. */
template <int NT>
static __global__ void __launch_bounds__(32 * FEW_WARPS, 1)
    few_product_kernel(const __grid_constant__ few_in in, const __grid_constant__ vector_end e) {
    __shared__ int finished[STREAM_HEADS], last;
    QWEN3_DYNAMIC_SHARED(memory);
    const row_range mine = few_share(in), tiles = {in.tile + mine.first, in.tile + mine.end};
    row_range done = {0, 0};
    row_angles angles;                  /* written long before, so there is nothing to wait for */
    bool stage = true;
    if (e.kind == END_HEADS) angles = load_row_angles(e.qkv, warp_id() < in.rows ? warp_id() : 0);
    few_each_part(in, tiles, [&](const block_part &p, const few_rows &rows) {
        if (stage) done.first = rows.row0 + 16 * rows.first;
        done.end = rows.row0 + least(p.rows, 16 * (rows.first + rows.n));
        few_tiles_of<NT>(in, p, rows, stage);
        stage = false;
    });
    if (!few_last(in, &last)) return;
    const float *x_scale = (const float *)(const void *)(memory + FEW_HEAD) - FEW_MOST;
    const size_t step = (size_t)in.n_tiles * NT * 32;
    few_each_part(in, tiles, [&](const block_part &p, const few_rows &rows) {
        const float4 *from = in.partial + (size_t)rows.index * NT * 32;
        NO_UNROLL for (int k = tid(), all = rows.n * NT * 32; k < all; k += 4 * n_threads()) {
            float4 sum[4] = {};
            NO_UNROLL for (int s = 0; s < in.slices; s++)
                UNROLL for (int u = 0; u < 4; u++) {
                    const int i = k + u * n_threads();
                    const float4 v = __ldcg(from + s * step + (i < all ? i : k));
                    sum[u].x += v.x; sum[u].y += v.y; sum[u].z += v.z; sum[u].w += v.w;
                }
            UNROLL for (int u = 0; u < 4; u++) {
                const int i = k + u * n_threads();
                if (i < all) few_finish<NT>(in, e, p, rows, i, sum[u], x_scale);
            }
        }
    });
    if (e.kind == END_HEADS)
        finish_heads(done, in.rows, e.qkv, e.tickets, finished, least(STREAM_HEADS, n_threads()), angles);
}

/* few_round: x [rows, k] float32 to F16 times a power of two of each row, as few_multiply reads it: unit,
   row, and of each lane that shares the row elements 4 t, 4 t + 2, 4 t + 1, 4 t + 3 and those 16 further; its
   sums of units, and of their first halves, as rounded. gain: the RMSNorm of x; up > 0: silu(x[i]) times
   x[up + i]. A block a row; rows that are not there are zero. Equals qwen3i_rmsnorm or qwen3i_swiglu, and one
   rounding. */
struct few_round_args {
    unsigned char *to; float *sums, *scale;
    const float *x; int ldx, k, up, rows, units;
    const float *gain; float eps;
};
static __global__ void __launch_bounds__(1024) few_round_kernel(few_round_args a) {
    __shared__ float shared[32];
    const int row = block_x(), cols = (int)gridDim.x;
    const float *x = a.x + (size_t)(row < a.rows ? row : 0) * a.ldx;
    /* v[i] * w[i] is element 4 q + i; of a norm, of r times it */
    const auto load = [&](float (&v)[4], float (&w)[4], int q) {
        const int left = row < a.rows ? a.k - 4 * q : 0;
        load_4(v, x + 4 * q, left, left >= 4);
        UNROLL for (int i = 0; i < 4; i++) w[i] = 1;
        if (a.gain) load_4(w, a.gain + 4 * q, left, left >= 4);
        if (a.up > 0) load_4(w, x + a.up + 4 * q, left, left >= 4 && a.up % 4 == 0);
    };
    float top = 0, sum = 0;
    wait_for_previous();
    let_next_start();
    for (int q = tid(); 4 * q < a.k; q += n_threads()) {
        float v[4], w[4];
        load(v, w, q);
        UNROLL for (int i = 0; i < 4; i++) {
            sum += v[i] * v[i];
            top = fmaxf(top, fabsf((a.up > 0 ? silu(v[i]) : v[i]) * w[i]));
        }
    }
    top = block_max(top, shared);
    const float r = a.gain ? rms_scale(block_sum(sum, shared), (float)a.k, a.eps) : 1.0f,
                up = half_scale(top * r);
    if (tid() == 0) a.scale[row] = 1 / up;
    for (int q = tid(); q - lane_id() < 8 * a.units; q += n_threads()) {
        const int u = q / 8, w8 = q % 8;
        float v[4], w[4], half = 0;
        half_t h[4];
        load(v, w, q);
        UNROLL for (int i = 0; i < 4; i++) {
            h[i] = __float2half_rn((a.up > 0 ? silu(v[i]) : v[i] * r) * w[i] * up);
            half += __half2float(h[i]);
        }
        half += __shfl_xor_sync(ALL, half, 1);
        half += __shfl_xor_sync(ALL, half, 2);
        const float other = __shfl_xor_sync(ALL, half, 4);
        if (u >= a.units) continue;
        const size_t at = (size_t)u * cols + row;
        *(uint2 *)(void *)(a.to + at * 64 + w8 % 4 * 16 + w8 / 4 * 8) =
            make_uint2((unsigned)__half_as_ushort(h[0]) | (unsigned)__half_as_ushort(h[2]) << 16,
                       (unsigned)__half_as_ushort(h[1]) | (unsigned)__half_as_ushort(h[3]) << 16);
        if (w8 == 0) {
            a.sums[at] = half + other;
            a.sums[(size_t)a.units * cols + at] = half;
        }
    }
}

/* Are products of so many rows with W done by these kernels? */
static bool few_serves(const cuda_ctx *c, const matrix &w, int rows) {
    const bool same = c->desc.invariant && rows <= SAME_ROWS;
    return w.few && c->few && (rows >= FEW_LEAST || same) && rows <= FEW_MOST;
}
/* Rows of x that are multiplied: those that are not there are zero. */
static int few_columns(const cuda_ctx *c, int rows) {
    if (c->desc.invariant && rows <= SAME_ROWS) return SAME_ROWS;
    return rows <= 8 ? 8 : rows <= 16 ? 16 : FEW_MOST;
}
/* Bytes of shared memory that a step's x takes. */
static size_t few_step_bytes(int cols, int sums) { return (size_t)FEW_UNITS * cols * (64 + 4 * sums); }
/* Bytes of x, of rows of so many elements, for the most rows. */
static size_t few_bytes(int k) {
    return (size_t)round_up(ceil_div(k, 32), FEW_UNITS) * FEW_MOST * (64 + 8) + FEW_MOST * sizeof(float);
}
/* Can the chip do this at all? */
static bool few_possible(const cuda_model *m) {
    return m->capability >= 80 && FEW_HEAD + few_step_bytes(FEW_MOST, 2) + 2048 <= m->block_shared;
}

/* Slices of k: as few as x has room for, or those that take the least time, roughly, in clocks: a step of a
   block, what comes of x, and the sums of the slices. */
static int few_slices(const pass *p, const few_in &in, int tiles, int cols) {
    const int n_sm = p->c->m->n_sm;
    const size_t each = few_step_bytes(cols, in.sums), room = p->c->m->block_shared - FEW_HEAD - 2048;
    const int least_slices = ceil_div(in.steps, (int)least((size_t)in.steps, room / each));
    int best = least_slices;
    float best_time = 0;
    for (int s = least_slices; s <= least(in.steps, n_sm); s++) {
        const int steps = ceil_div(in.steps, s), mine = ceil_div(tiles, least(tiles, n_sm / s));
        const float time = (float)ceil_div(mine * steps, FEW_WARPS) * (float)(1500 + 80 * cols) +
                           (float)((size_t)steps * each) / 50 +
                           (s > 1 ? 3500 + 0.3f * (float)(mine * cols * s) : 0);
        if (s == least_slices || time < best_time) { best = s; best_time = time; }
    }
    return best;
}

template <int NT> static cudaError_t launch_few(const pass *p, const few_in &in, const vector_end &e) {
    const size_t x = (size_t)ceil_div(in.steps, in.slices) * few_step_bytes(8 * NT, in.sums);
    const int groups = least(p->c->m->n_sm / in.slices, in.n_tiles);
    return launch_shared(p->early, 1, p->s, grid1(groups * in.slices), 32 * FEW_WARPS, FEW_HEAD + x,
                         few_product_kernel<NT>, in, e);
}

/* Rows of h times W; up: elements from a row's gate to its up, whose SwiGLU the input is. */
static qwen3_result few_product(const pass *p, const matrix &w, const input &h, int rows, int up,
                                const vector_end &e) {
    cuda_ctx *c = p->c;
    const int cols = few_columns(c, rows);
    few_round_args a = {};
    few_in in = {};
    int tiles = 0;
    for (int i = 0; i < w.n_parts; i++) {
        const int type = w.parts[i].type;
        in.parts[i] = w.parts[i];
        in.steps = most(in.steps, ceil_div(w.parts[i].units, FEW_UNITS));
        in.sums = most(in.sums, !few_offset(type) ? 0 : has_halves(type) ? 2 : 1);
        tiles += ceil_div(w.parts[i].rows, 16);
    }
    in.n_parts = w.n_parts;
    in.rows = a.rows = rows;
    a.units = FEW_UNITS * in.steps;
    a.to = (unsigned char *)c->few;
    a.sums = (float *)(void *)(a.to + (size_t)a.units * cols * 64);
    a.scale = a.sums + (size_t)a.units * cols * 2;
    a.x = h.x; a.ldx = h.ldx; a.k = w.cols; a.up = up; a.gain = h.gain; a.eps = c->m->config.rms_eps;
    TRY(launched(p, launch_early(p->early, p->s, grid1(cols), least(1024, round_up(ceil_div(w.cols, 4), 32)),
                                 0, few_round_kernel, a), "few_round"));
    in.x = a.to; in.x_sums = a.sums; in.x_scale = a.scale;
    in.tickets = c->few_tickets;
    in.partial = (float4 *)(void *)c->scratch;
    in.slices = few_slices(p, in, tiles, cols);
    const int step =
        (int)least((size_t)tiles, c->scratch_size / ((size_t)in.slices * cols * 16 * sizeof(float)));
    for (in.tile = 0; in.tile < tiles; in.tile += step) {
        in.n_tiles = least(step, tiles - in.tile);
        TRY(launched(p, cols == 8 ? launch_few<1>(p, in, e) : cols == 16 ? launch_few<2>(p, in, e) :
                                    launch_few<4>(p, in, e), "few_product"));
    }
    return QWEN3_OK;
}

/* Do a layer's gate, up and down go this way? Then the SwiGLU is made where down's input is rounded. */
static bool few_pairs(const pass *p, int layer) {
    return few_serves(p->c, p->c->m->layers[layer].gate_up, p->n);
}
static qwen3_result few_down(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].w_down;
    const input h = {c->ff, 2 * c->ff_ld, NULL, NULL};
    const int up = c->m->layers[layer].gate_up.rows / 2;
    TRY(order_rows(p, w, c->ff, h.ldx));
    TRY(order_rows(p, w, c->ff + up, h.ldx));
    return few_product(p, w, h, p->n, up, make_end(END_ADD, c->sum, c->embd_ld, NULL));
}

/* Rows of h times W, whichever kernels serve; units: rows of W, or pairs of them. */
static qwen3_result block_rows_times(const pass *p, const matrix &w, const input &h, int rows,
                                     const vector_end &e, int units) {
    return few_serves(p->c, w, rows) ? few_product(p, w, h, rows, 0, e) :
                                       block_rows_of(p, w, h, rows, e, units);
}

static qwen3_result block_matvec(const pass *p, float *y, int ldy, const row_info *outs, const matrix &w,
                                 const input &h, int rows, bool add) {
    const vector_end e = make_end(add ? END_ADD : END_STORE, y, ldy, outs);
    return block_rows_times(p, w, h, rows, e, w.rows);
}

static qwen3_result block_qkv(const pass *p, int layer, const input &h) {
    const matrix &w = p->c->m->layers[layer].qkv;
    const vector_end e = heads_end(p, layer);
    return block_rows_times(p, w, h, p->n, e, w.rows);
}

static qwen3_result block_mlp(const pass *p, int layer, const input &h) {
    const matrix &w = p->c->m->layers[layer].gate_up;
    if (few_pairs(p, layer))
        return few_product(p, w, h, p->n, 0, make_end(END_STORE, p->c->ff, 2 * p->c->ff_ld, NULL));
    return block_rows_times(p, w, h, p->n, make_end(END_MLP, p->c->ff, p->c->ff_ld, NULL), w.parts[0].rows);
}

/* ================================================================================================
   TWO KERNELS A LAYER: one row of a small model on Hopper
   ================================================================================================ */
/* At 0.6B what a layer of one row costs is exchanges across the chip, not bytes. So each half of a layer is
   one kernel. A cluster has some rows of its first matrix and the same columns of its second, so only the
   second's sums cross the chip: x is the sum of a part from each cluster, which the next kernel's blocks all
   add up in order. The halves take turns on two groups of multiprocessors: all weights of the one are on
   their way to shared memory and registers while the other works. */
const int TWO_WARPS   = 16, TWO_THREADS = 32 * TWO_WARPS;
const int TWO_SLICE   = 64;                             /* columns of the first matrix that a warp has */
const int TWO_WIDTH   = TWO_WARPS * TWO_SLICE;          /* n_embd */
const int TWO_CLUSTER = 8;
const int TWO_OUT     = TWO_WIDTH / TWO_CLUSTER;        /* elements of a part that a block finishes */
const int TWO_PARTS   = 8;                              /* clusters, at most */
const int TWO_HEADS   = 2;                              /* query heads of each key/value head */

/* x = the sum of n parts [n, TWO_WIDTH] */
struct sum_of_parts { const float *at; int n; };

#ifdef QWEN3_WGMMA
/* 32 columns of a product of 16 rows: w has 16 bytes of row lane / 4 and of row lane / 4 + 8, x as much of
   what they are multiplied by, in columns 0 and 1 of it its two terms. */
DEVICE void two_multiply(float (&d)[4], uint4 w, uint4 more, uint4 x) {
    const unsigned first[4] = {w.x, more.x, w.y, more.y}, second[4] = {w.z, more.z, w.w, more.w};
    multiply(d, first, x.x, x.y, half_t());
    multiply(d, second, x.z, x.w, half_t());
}

/* Two values of each lane of a warp as two F16 terms, 64 of the first ones, then of the second ones; they
   stand for this much. Together they are as exact as float32. */
DEVICE float two_terms(unsigned *terms, float a, float b) {
    const unsigned most_bits = __reduce_max_sync(ALL, __float_as_uint(fmaxf(fabsf(a), fabsf(b))));
    const float up = half_scale(__uint_as_float(most_bits));    /* they order like the values */
    a *= up;
    b *= up;
    terms[lane_id()] = pack(a, b, half_t());
    terms[32 + lane_id()] = pack(a, b, half_t());
    __syncwarp();
    return 1.0f / up;
}
/* Columns 32 c on of them, as a product takes them; only of its column lane / 4, if that is `column` or the
   next one. */
DEVICE uint4 two_operand(const unsigned *terms, int c, int column) {
    const int i = lane_id() / 4 - column;
    return i == 0 || i == 1 ? *(const uint4 *)(const void *)(terms + 32 * i + 16 * c + 4 * (lane_id() % 4)) :
                              make_uint4(0, 0, 0, 0);
}

/* What a warp knows of x: its columns of x times gain, as a product takes them, which stand for so much. */
struct two_input { uint4 x[2]; float scale; };

/* By all threads, after wait_for_previous(): the squares of each warp's columns are left in `squares`, the
   elements of x that this block will finish in `own`. What is multiplied is x times gain; what makes that
   RMSNorm(x) is one factor, which the sums get. */
DEVICE two_input two_take(const sum_of_parts &in, float2 gain, float *own, float *squares,
                          unsigned (*terms)[2 * 32]) {
    const int at = 2 * tid(), mine = (int)(block_x() % TWO_CLUSTER) * TWO_OUT;
    float2 part[TWO_PARTS];
    UNROLL for (int i = 0; i < TWO_PARTS; i++)
        part[i] = i < in.n ? __ldcg((const float2 *)(const void *)(in.at + i * TWO_WIDTH + at)) :
                             make_float2(0, 0);
    float2 x = part[0];
    UNROLL for (int i = 1; i < TWO_PARTS; i++) { x.x += part[i].x; x.y += part[i].y; }
    if (at >= mine && at < mine + TWO_OUT) *(float2 *)(void *)(own + at - mine) = x;
    two_input t;
    t.scale = two_terms(terms[warp_id()], x.x * gain.x, x.y * gain.y);
    const float sum = warp_sum(x.x * x.x + x.y * x.y);
    if (lane_id() == 0) squares[warp_id()] = sum;
    UNROLL for (int c = 0; c < 2; c++) t.x[c] = two_operand(terms[warp_id()], c, 0);
    return t;
}
DEVICE float two_rms(const float *squares, float eps) {
    float sum = 0;
    UNROLL for (int i = 0; i < TWO_WARPS; i++) sum += squares[i];
    return rms_scale(sum, (float)TWO_WIDTH, eps);
}
#endif

/* Rows of a matrix TWO_WIDTH wide in shared memory: even rows of each 8 in one half, odd ones in the other,
   64 bytes off, so that no bank is read twice at a time. */
template <int ROWS> struct two_rows { unsigned char half[2][ROWS / 2 * TWO_WIDTH * 2 + 64]; };
template <int ROWS> DEVICE unsigned char *two_row(two_rows<ROWS> &m, int row) {
    return m.half[row % 2] + (row / 8 * 4 + row % 8 / 2) * TWO_WIDTH * 2;
}
/* This lane's 16 bytes of its warp's columns 32 c on of that row. */
template <int ROWS> DEVICE uint4 two_weights(two_rows<ROWS> &m, int row, int c) {
    const int at = TWO_SLICE * warp_id() + 32 * c + 8 * (lane_id() % 4);
    return *(const uint4 *)(const void *)(two_row(m, row) + 2 * at);
}

/* ---- the half with attention: a cluster has a key/value head ---- */
const int TWO_QKV       = (TWO_HEADS + 2) * HEAD_DIM / TWO_CLUSTER;    /* rows of q, k and v of a block */
const int TWO_RING      = 2;                            /* rounds of positions on their way */
const int TWO_WO_PITCH  = TWO_HEADS * HEAD_DIM * 2 + 64;

struct two_attention_args {
    const half_t *w; int ldw; float scale;              /* q, k and v */
    const half_t *wo; int ldwo; float wo_scale;
    const float  *gain;
    sum_of_parts  in;
    float        *out;                                  /* [n_head_kv, TWO_WIDTH] */
    qkv_args      a;
};
struct two_attention_shared {
    unsigned char wo[TWO_OUT * TWO_WO_PITCH];
    union {                                             /* each warp's own */
        uint4 ring[TWO_RING][4][32];
        float sums[2][TWO_HEADS * HEAD_DIM];            /* of each half of the warp */
    } warp[TWO_WARPS];
    unsigned terms[TWO_WARPS][2 * 32];
    float own[TWO_OUT], squares[TWO_WARPS];
    float part[TWO_WARPS][TWO_QKV + 2];
    float qkv[TWO_HEADS + 2][HEAD_DIM];                 /* from all blocks */
    float q[TWO_HEADS][HEAD_DIM];
    half_t kv[2][HEAD_DIM];                             /* of the new position, as the cache has it */
    float top[TWO_HEADS][TWO_WARPS], sum[TWO_HEADS][TWO_WARPS];
    float all[TWO_CLUSTER][TWO_HEADS * HEAD_DIM], all_top[TWO_CLUSTER][TWO_HEADS],
          all_sum[TWO_CLUSTER][TWO_HEADS];              /* from all blocks */
    unsigned out_terms[TWO_HEADS * HEAD_DIM / TWO_SLICE][2 * 32];
    float out_scale[TWO_HEADS * HEAD_DIM / TWO_SLICE];
    float half[2][TWO_OUT];
    mbarrier sent, merged, got;
};

#ifdef QWEN3_WGMMA
const int TWO_ROUND     = 64;                           /* positions of a round of a block */

/* Which positions of the cache this block has, and lanes of them. */
struct two_positions {
    int seq, position, begin, end;
    __device__ __forceinline__ two_positions(const row_info &row, int rank) {
        const int length = round_up(ceil_div(row.position + 1, TWO_CLUSTER), 4);
        seq = row.seq; position = row.position;
        begin = rank * length;
        end = least(begin + length, position + 1);
    }
    /* Of each half of this warp, two a round. */
    __device__ __forceinline__ int at(int round, int i) const {
        return begin + round * TWO_ROUND + 4 * warp_id() + 2 * i + lane_id() / 16;
    }
    __device__ __forceinline__ bool has_new() const { return position >= begin && position < end; }
};

/* Scores of two heads, the softmax of those so far, and the sum of values: of half a warp's positions, each
   lane 8 elements. Lane i has the weights of head i / 4 % 2, of position i / 8 % 2 of its half. */
template <class T> struct two_softmax {
    float q[TWO_HEADS][8], sums[TWO_HEADS][8], top, sum;

    __device__ __forceinline__ two_softmax(const float (*from)[HEAD_DIM]) {
        UNROLL for (int h = 0; h < TWO_HEADS; h++)
            UNROLL for (int i = 0; i < 8; i++) {
                q[h][i] = from[h][8 * (lane_id() % 16) + i];
                sums[h][i] = 0;
            }
        top = LOWEST;
        sum = 0;
    }
    __device__ __forceinline__ float score(const float (&k)[2][8]) const {
        const bool second = lane_id() & 8, other = lane_id() & 4;
        float s[2][TWO_HEADS];
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int h = 0; h < TWO_HEADS; h++) {
                s[i][h] = 0;
                UNROLL for (int d = 0; d < 8; d++) s[i][h] += k[i][d] * q[h][d];
            }
        UNROLL for (int h = 0; h < TWO_HEADS; h++) {
            const float give = second ? s[0][h] : s[1][h];
            s[0][h] = (second ? s[1][h] : s[0][h]) + __shfl_xor_sync(ALL, give, 8);
        }
        const float give = other ? s[0][0] : s[0][1];
        float v = (other ? s[0][1] : s[0][0]) + __shfl_xor_sync(ALL, give, 4);
        v += __shfl_xor_sync(ALL, v, 2);
        return v + __shfl_xor_sync(ALL, v, 1);
    }
    /* valid: is this lane's position one of the block's? */
    __device__ __forceinline__ void add(const float (&k)[2][8], const float (&v)[2][8], bool valid) {
        const float s = score(k);
        float high = valid ? s : LOWEST;
        high = fmaxf(high, __shfl_xor_sync(ALL, high, 8));
        high = fmaxf(high, __shfl_xor_sync(ALL, high, 16));
        high = fmaxf(top, high);
        const float keep = exp2f(top - high), weight = valid ? exp2f(s - high) : 0.0f;
        float more = weight + __shfl_xor_sync(ALL, weight, 8);
        more += __shfl_xor_sync(ALL, more, 16);
        top = high;
        sum = sum * keep + more;
        UNROLL for (int h = 0; h < TWO_HEADS; h++) {
            const float old = __shfl_sync(ALL, keep, 4 * h);
            UNROLL for (int d = 0; d < 8; d++) sums[h][d] *= old;
            UNROLL for (int i = 0; i < 2; i++) {
                const float w = __shfl_sync(ALL, weight, (lane_id() & 16) + 8 * i + 4 * h);
                UNROLL for (int d = 0; d < 8; d++) sums[h][d] += w * v[i][d];
            }
        }
    }
};

template <class T> DEVICE void two_load(float (&f)[2][8], const uint4 (*ring)[32], const half_t *made,
                                        const two_positions &at, int round) {
    UNROLL for (int i = 0; i < 2; i++) {
        uint4 v = ring[i][lane_id()];
        if (at.at(round, i) == at.position)
            v = *(const uint4 *)(const void *)(made + 8 * (lane_id() % 16));
        unpack(f[i], v, T());
    }
}

/* Positions of a round to this lane's places. */
template <class T>
DEVICE void two_fetch(uint4 (*ring)[32], const qkv_args &a, const two_positions &at, int round, int head) {
    UNROLL for (int i = 0; i < 2; i++) {
        const int position = at.at(round, i);
        const bool valid = position < at.end;
        const size_t from = kv_at(a.kv, at.seq, valid ? position : 0) + (size_t)(head * HEAD_DIM) +
                            8 * (size_t)(lane_id() % 16);
        copy_async(&ring[i][lane_id()], (const T *)a.kv.k + from, valid);
        copy_async(&ring[2 + i][lane_id()], (const T *)a.kv.v + from, valid);
    }
    copy_commit();
}

/* Head `i` of this cluster's q, q, k, v, by a warp: RMSNorm and rotate-half of all but v; q times what makes
   scores exponents of 2; k and v rounded and, by the block that has the position, to the cache. */
template <class T> DEVICE void two_finish_head(two_attention_shared &m, const qkv_args &a, int i, int head,
                                               const head_part<1> &gain, const head_angles<1> &angles,
                                               const two_positions &at) {
    const bool is_q = i < TWO_HEADS;
    head_part<1> p = load_head<32, 1>(m.qkv[i], HEAD_DIM / 2);
    if (i <= TWO_HEADS) norm_rope<32>(p, gain, angles, HEAD_DIM, a.eps, 1.0f);
    if (is_q) {
        const float scale = LOG2E / sqrtf((float)HEAD_DIM);
        p.lo[0].x *= scale; p.lo[0].y *= scale; p.hi[0].x *= scale; p.hi[0].y *= scale;
        store_pairs<32>(m.q[i], HEAD_DIM / 2, p);
        return;
    }
    T *cache = (T *)(i == TWO_HEADS ? a.kv.k : a.kv.v) + kv_at(a.kv, at.seq, at.position) + head * HEAD_DIM;
    store_pairs<32>((T *)(void *)m.kv[i - TWO_HEADS], HEAD_DIM / 2, p);
    if (at.has_new()) store_pairs<32>(cache, HEAD_DIM / 2, p);
}

/* two_attention: out[c, :] = the part of Wo a that cluster c's heads give, of RMSNorm(x), q, k and v, the
   cache, and a = softmax(q k / sqrt(d)) v; part 0 plus x. Grid: clusters of TWO_CLUSTER, one a key/value
   head. Equals qwen3i_rmsnorm, qwen3i_matmul of wq, wk, wv, qwen3i_rmsnorm a head, qwen3i_rope, one rounding
   of k and v, qwen3i_attention and qwen3i_matmul_add. */
template <class T>
static __global__ void __launch_bounds__(TWO_THREADS, 1)
    two_attention_kernel(const __grid_constant__ two_attention_args g) {
    QWEN3_DYNAMIC_SHARED(memory);
    two_attention_shared &m = *(two_attention_shared *)(void *)memory;
    const int t = tid(), warp = warp_id(), lane = lane_id(), quad = lane / 4;
    const int head = block_x() / TWO_CLUSTER, rank = block_x() % TWO_CLUSTER;
    const int first = rank / 2 < TWO_HEADS ? head * TWO_HEADS + rank / 2 :
                      g.a.n_head + (rank / 2 - TWO_HEADS) * g.a.n_head_kv + head;
    const half_t *w = g.w + (size_t)(first * HEAD_DIM + rank % 2 * TWO_QKV) * g.ldw;
    let_next_start();
    if (t == 0) {
        barrier_init(&m.sent, 1); barrier_init(&m.merged, 1); barrier_init(&m.got, 1);
        barriers_ready();
        barrier_expect(&m.sent, sizeof m.qkv);
        barrier_expect(&m.merged, sizeof m.all + sizeof m.all_top + sizeof m.all_sum);
        barrier_expect(&m.got, TWO_OUT * TWO_HEADS * HEAD_DIM * 2);
    }
    __syncthreads();
    if (warp == 0)
        for (int i = lane; i < TWO_OUT; i += 32)
            copy_bulk(m.wo + i * TWO_WO_PITCH,
                      g.wo + (size_t)(rank * TWO_OUT + i) * g.ldwo + head * TWO_HEADS * HEAD_DIM,
                      TWO_HEADS * HEAD_DIM * 2, &m.got);
    __syncwarp();
    cluster_arrive();
    const two_positions at(g.a.rows[0], rank);
    uint4 held[TWO_QKV / 16][4];
    UNROLL for (int i = 0; i < TWO_QKV / 16; i++)
        UNROLL for (int j = 0; j < 4; j++)
            held[i][j] = load_ahead(w + (size_t)(16 * i + j % 2 * 8 + quad) * g.ldw + TWO_SLICE * warp +
                                    j / 2 * 32 + lane % 4 * 8);
    UNROLL for (int i = 0; i < TWO_RING; i++) two_fetch<T>(m.warp[warp].ring[i], g.a, at, i, head);
    const float2 gain = ((const float2 *)(const void *)g.gain)[t];
    const head_part<1> head_gains =
        load_head<32, 1>(warp < TWO_HEADS ? g.a.q_norm : g.a.k_norm, warp <= TWO_HEADS ? HEAD_DIM / 2 : 0);
    const head_angles<1> angles = load_angles<32, 1>(g.a, warp <= TWO_HEADS ? HEAD_DIM / 2 : 0, at.position);
    wait_for_previous();

    /* this block's rows of q, k and v to all blocks */
    const two_input x = two_take(g.in, gain, m.own, m.squares, m.terms);
    float d[TWO_QKV / 16][4] = {};
    UNROLL for (int i = 0; i < TWO_QKV / 16; i++)
        UNROLL for (int c = 0; c < 2; c++) two_multiply(d[i], held[i][2 * c], held[i][2 * c + 1], x.x[c]);
    if (lane % 4 == 0)
        UNROLL for (int i = 0; i < TWO_QKV / 16; i++) {
            m.part[warp][16 * i + quad] = (d[i][0] + d[i][1]) * x.scale;
            m.part[warp][16 * i + 8 + quad] = (d[i][2] + d[i][3]) * x.scale;
        }
    cluster_wait();                     /* all blocks have begun */
    __syncthreads();
    {
        const int row = t / TWO_CLUSTER, to = t % TWO_CLUSTER;
        float v = m.part[2 * to][row] + m.part[2 * to + 1][row];
        UNROLL for (int o = 1; o < TWO_CLUSTER; o *= 2) v += __shfl_xor_sync(ALL, v, o);
        send_to_block(&m.qkv[0][0] + rank * TWO_QKV + row, (unsigned)to,
                      v * (two_rms(m.squares, g.a.eps) * g.scale), &m.sent);
    }
    barrier_wait(&m.sent, 0);
    if (warp < TWO_HEADS + 2) two_finish_head<T>(m, g.a, warp, head, head_gains, angles, at);
    __syncthreads();

    /* this warp's positions */
    two_softmax<T> s(m.q);
    for (int round = 0; at.begin + round * TWO_ROUND + 4 * warp < at.end; round++) {
        uint4 (*ring)[32] = m.warp[warp].ring[round % TWO_RING];
        float k[2][8], v[2][8];
        copy_wait<TWO_RING - 1>();
        two_load<T>(k, ring, m.kv[0], at, round);
        two_load<T>(v, ring + 2, m.kv[1], at, round);
        s.add(k, v, at.at(round, lane / 8 % 2) < at.end);
        two_fetch<T>(ring, g.a, at, round + TWO_RING, head);
    }
    copy_wait<0>();
    __syncwarp();
    UNROLL for (int h = 0; h < TWO_HEADS; h++)
        UNROLL for (int i = 0; i < 8; i += 4)
            *(float4 *)(void *)&m.warp[warp].sums[lane / 16][h * HEAD_DIM + lane % 16 * 8 + i] =
                make_float4(s.sums[h][i], s.sums[h][i + 1], s.sums[h][i + 2], s.sums[h][i + 3]);
    if (lane == 0 || lane == 4) { m.top[lane / 4][warp] = s.top; m.sum[lane / 4][warp] = s.sum; }
    __syncthreads();

    /* from all warps to all blocks, and from all blocks */
    if (t < TWO_HEADS * HEAD_DIM) {
        const int h = t / HEAD_DIM, i = lane % TWO_WARPS, b = t % TWO_CLUSTER;
        float top = m.top[h][i], v = 0;
        UNROLL for (int o = TWO_WARPS / 2; o > 0; o /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        const float share = exp2f(m.top[h][i] - top);
        float sum = m.sum[h][i] * share;
        UNROLL for (int o = TWO_WARPS / 2; o > 0; o /= 2) sum += __shfl_xor_sync(ALL, sum, o);
        UNROLL for (int k = 0; k < TWO_WARPS; k++)
            v += __shfl_sync(ALL, share, k) * (m.warp[k].sums[0][t] + m.warp[k].sums[1][t]);
        UNROLL for (int k = 0; k < TWO_CLUSTER; k++)
            send_to_block(&m.all[rank][t], (unsigned)k, v, &m.merged);
        if (t % HEAD_DIM < TWO_CLUSTER) {
            send_to_block(&m.all_top[rank][h], (unsigned)b, top, &m.merged);
            send_to_block(&m.all_sum[rank][h], (unsigned)b, sum, &m.merged);
        }
    }
    /* meanwhile: this warp's rows of this cluster's columns of Wo, one head's by half of the warps */
    const int half = warp / 8, out_row = warp % 8 * 16 + quad;
    uint4 wo[4][2];
    barrier_wait(&m.got, 0);
    UNROLL for (int c = 0; c < 4; c++)
        UNROLL for (int i = 0; i < 2; i++)
            wo[c][i] = *(const uint4 *)(const void *)(m.wo + (out_row + 8 * i) * TWO_WO_PITCH +
                                                      half * HEAD_DIM * 2 + lane % 4 * 16 + 64 * c);

    barrier_wait(&m.merged, 0);
    if (t < TWO_HEADS * HEAD_DIM / 2) {
        const int h = 2 * t / HEAD_DIM, b = lane % TWO_CLUSTER;
        float top = m.all_top[b][h];
        UNROLL for (int o = TWO_CLUSTER / 2; o > 0; o /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        const float share = exp2f(m.all_top[b][h] - top);
        float sum = m.all_sum[b][h] * share;
        UNROLL for (int o = TWO_CLUSTER / 2; o > 0; o /= 2) sum += __shfl_xor_sync(ALL, sum, o);
        float2 a = make_float2(0, 0);
        UNROLL for (int k = 0; k < TWO_CLUSTER; k++) {
            const float2 v = *(const float2 *)(const void *)&m.all[k][2 * t];
            const float f = __shfl_sync(ALL, share, k);
            a.x += f * v.x;
            a.y += f * v.y;
        }
        const float scale = two_terms(m.out_terms[warp], a.x / sum, a.y / sum);
        if (lane == 0) m.out_scale[warp] = scale;
    }
    __syncthreads();

    float lo = 0, hi = 0, o[4][4] = {};
    UNROLL for (int c = 0; c < 4; c++)
        two_multiply(o[c], wo[c][0], wo[c][1], two_operand(m.out_terms[2 * half + c / 2], c % 2, 0));
    UNROLL for (int c = 0; c < 4; c++) {
        const float scale = m.out_scale[2 * half + c / 2];
        lo += (o[c][0] + o[c][1]) * scale;
        hi += (o[c][2] + o[c][3]) * scale;
    }
    if (lane % 4 == 0) { m.half[half][out_row] = lo; m.half[half][out_row + 8] = hi; }
    __syncthreads();
    if (t < TWO_OUT)
        g.out[head * TWO_WIDTH + rank * TWO_OUT + t] =
            (head == 0 ? m.own[t] : 0.0f) + (m.half[0][t] + m.half[1][t]) * g.wo_scale;
}
#else
template <class T> static __global__ void two_attention_kernel(const __grid_constant__ two_attention_args) {}
#endif

/* ---- the half with the MLP ---- */
const int TWO_UNITS = 7;                /* of 8 columns of m that a block has, at most ... */
const int TWO_UNITS_HELD = 5;           /* ... of which so many units' rows of gate and up are in registers */
const int TWO_DOWN  = TWO_UNITS * 16;   /* bytes of a block's columns of a row of down */
const int TWO_BOX   = 256;              /* rows that come as one tile */

struct two_mlp_args {
    const half_t *w; int ldw; float scale;              /* gate and up */
    float         down_scale;
    const float  *gain;
    float         eps;
    int           n_ff;
    sum_of_parts  in;
    float        *out;                                  /* [clusters, TWO_WIDTH] */
};
struct two_mlp_shared {
    unsigned char down[TWO_WIDTH * TWO_DOWN];
    two_rows<(TWO_UNITS - TWO_UNITS_HELD) * 16> w;      /* 8 of gate, 8 of up ... */
    unsigned terms[TWO_WARPS][2 * 32];
    float own[TWO_OUT], squares[TWO_WARPS];
    float2 part[TWO_WARPS][TWO_UNITS * 8];              /* gate and up */
    float m[64];
    float all[TWO_CLUSTER][TWO_OUT];                    /* from all blocks */
    mbarrier sent, got, got_down;
};

#ifdef QWEN3_WGMMA
/* two_mlp: out[c, :] = the part of Wdown (silu(Wgate h) * (Wup h)) that cluster c's columns give, of h =
   RMSNorm(x); part 0 plus x. Grid: clusters of TWO_CLUSTER, TWO_UNITS * 8 columns a block. Equals
   qwen3i_rmsnorm, qwen3i_swiglu and qwen3i_matmul_add. */
static __global__ void __launch_bounds__(TWO_THREADS, 1)
    two_mlp_kernel(const __grid_constant__ two_mlp_args g, const __grid_constant__ CUtensorMap down) {
    QWEN3_DYNAMIC_SHARED(memory);
    two_mlp_shared &m = *(two_mlp_shared *)(void *)memory;
    const int t = tid(), warp = warp_id(), lane = lane_id(), quad = lane / 4;
    const int rank = block_x() % TWO_CLUSTER, unit0 = block_x() * TWO_UNITS, last = g.n_ff / 8 - 1;
    /* row i of 16 of unit u: 8 of gate, 8 of up; past the end anything */
    auto row = [&](int u, int i) {
        return g.w + (size_t)(i / 8 * g.n_ff + least(unit0 + u, last) * 8 + i % 8) * g.ldw;
    };
    let_next_start();
    if (t == 0) {
        barrier_init(&m.sent, 1); barrier_init(&m.got, 1); barrier_init(&m.got_down, 1);
        barriers_ready();
        barrier_expect(&m.sent, sizeof m.all);
        barrier_expect(&m.got, (TWO_UNITS - TWO_UNITS_HELD) * 16 * TWO_WIDTH * 2);
        barrier_expect(&m.got_down, sizeof m.down);
    }
    __syncthreads();
    if (warp == 0) {
        for (int i = lane; i < (TWO_UNITS - TWO_UNITS_HELD) * 16; i += 32)
            copy_bulk(two_row(m.w, i), row(TWO_UNITS_HELD + i / 16, i % 16), TWO_WIDTH * 2, &m.got);
        if (lane < TWO_WIDTH / TWO_BOX)
            load_tile(m.down + lane * TWO_BOX * TWO_DOWN, &down, unit0 * 8, lane * TWO_BOX, &m.got_down);
    }
    __syncwarp();
    cluster_arrive();
    uint4 held[TWO_UNITS_HELD][4];
    UNROLL for (int i = 0; i < TWO_UNITS_HELD; i++)
        UNROLL for (int j = 0; j < 4; j++)
            held[i][j] = load_ahead(row(i, j % 2 * 8 + quad) + TWO_SLICE * warp + j / 2 * 32 + lane % 4 * 8);
    const float2 gain = ((const float2 *)(const void *)g.gain)[t];
    wait_for_previous();

    /* gate and up, of each warp's columns */
    const two_input x = two_take(g.in, gain, m.own, m.squares, m.terms);
    float d[TWO_UNITS][4] = {};
    UNROLL for (int i = 0; i < TWO_UNITS_HELD; i++)
        UNROLL for (int c = 0; c < 2; c++) two_multiply(d[i], held[i][2 * c], held[i][2 * c + 1], x.x[c]);
    barrier_wait(&m.got, 0);
    UNROLL for (int i = 0; i < TWO_UNITS - TWO_UNITS_HELD; i++)
        UNROLL for (int c = 0; c < 2; c++)
            two_multiply(d[TWO_UNITS_HELD + i], two_weights(m.w, 16 * i + quad, c),
                         two_weights(m.w, 16 * i + 8 + quad, c), x.x[c]);
    if (lane % 4 == 0)
        UNROLL for (int i = 0; i < TWO_UNITS; i++)
            m.part[warp][8 * i + quad] =
                make_float2((d[i][0] + d[i][1]) * x.scale, (d[i][2] + d[i][3]) * x.scale);

    /* meanwhile: this warp's 64 rows of down, 16 at a time. Rows 4 apart are read together: no bank twice. */
    const int order = quad / 2 + quad % 2 * 4;
    uint4 rows[4][2][2];
    barrier_wait(&m.got_down, 0);
    UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int c = 0; c < 2; c++)
            UNROLL for (int j = 0; j < 2; j++)
                rows[i][c][j] = 4 * c + lane % 4 >= TWO_UNITS
                    ? make_uint4(0, 0, 0, 0)
                    : *(const uint4 *)(const void *)(m.down + lane % 4 * 16 + 64 * c +
                                                     (64 * warp + 16 * i + 8 * j + order) * TWO_DOWN);
    __syncthreads();

    /* m, four threads an element, to terms in each warp */
    if (t < 4 * 64) {
        const int i = t / 4;
        const bool valid = i < TWO_UNITS * 8 && unit0 * 8 + i < g.n_ff;
        float gate = 0, up = 0;
        if (valid) UNROLL for (int k = 0; k < TWO_WARPS / 4; k++) {
            const float2 v = m.part[t % 4 * (TWO_WARPS / 4) + k][i];
            gate += v.x;
            up += v.y;
        }
        UNROLL for (int o = 1; o < 4; o *= 2) {
            gate += __shfl_xor_sync(ALL, gate, o);
            up += __shfl_xor_sync(ALL, up, o);
        }
        const float r = two_rms(m.squares, g.eps) * g.scale;
        if (t % 4 == 0) m.m[i] = silu(gate * r) * (up * r);
    }
    __syncthreads();
    const float scale = two_terms(m.terms[warp], m.m[2 * lane], m.m[2 * lane + 1]) * g.down_scale;

    /* lane % 4 gets the sums of those 16 rows, as its operand says */
    float lo = 0, hi = 0;
    UNROLL for (int i = 0; i < 4; i++) {
        float o[4] = {};
        UNROLL for (int c = 0; c < 2; c++)
            two_multiply(o, rows[i][c][0], rows[i][c][1], two_operand(m.terms[warp], c, 2 * i));
        lo += o[0] + o[1];
        hi += o[2] + o[3];
    }
    cluster_wait();                     /* all blocks have begun */
    {
        const int to = 64 * warp / TWO_OUT, i = 64 * warp % TWO_OUT + lane % 4 * 16 + order;
        send_to_block(&m.all[rank][i], (unsigned)to, lo * scale, &m.sent);
        send_to_block(&m.all[rank][i + 8], (unsigned)to, hi * scale, &m.sent);
    }
    barrier_wait(&m.sent, 0);
    if (t >= TWO_OUT) return;
    float v = block_x() < TWO_CLUSTER ? m.own[t] : 0.0f;
    UNROLL for (int i = 0; i < TWO_CLUSTER; i++) v += m.all[i][t];
    g.out[block_x() / TWO_CLUSTER * TWO_WIDTH + rank * TWO_OUT + t] = v;
}
#else
static __global__ void two_mlp_kernel(const __grid_constant__ two_mlp_args,
                                      const __grid_constant__ CUtensorMap) {}
#endif

/* add_parts: x = the sum of its parts, h = RMSNorm(x). Equals qwen3i_rmsnorm. */
static __global__ void __launch_bounds__(TWO_WIDTH)
    add_parts_kernel(float *x, float *h, sum_of_parts in, const float *gain, float eps) {
    __shared__ float shared[32];
    const float g = gain[tid()];
    wait_for_previous();
    let_next_start();
    float v = 0;
    for (int i = 0; i < in.n; i++) v += __ldcg(in.at + i * TWO_WIDTH + tid());
    x[tid()] = v;
    h[tid()] = v * rms_scale(block_sum(v * v, shared), (float)TWO_WIDTH, eps) * g;
}

/* The clusters of the half with the MLP. */
static int two_mlp_clusters(const qwen3i_config *g) {
    return ceil_div(ceil_div(g->n_ff, TWO_UNITS * 8), TWO_CLUSTER);
}

/* Are the shapes such that one row can go this way? */
static bool fits_two(const cuda_model *m) {
    const qwen3i_config *g = &m->config;
    if (!m->hopper || m->n_ranks > 1 || g->n_expert > 0 || g->ordered) return false;
    if (g->n_embd != TWO_WIDTH || g->head_dim != HEAD_DIM) return false;
    if (g->n_head != TWO_HEADS * g->n_head_kv || g->n_head_kv > TWO_PARTS) return false;
    if (two_mlp_clusters(g) > TWO_PARTS) return false;
    for (int i = 0; i < g->n_layer; i++) {
        const layer_weights &l = m->layers[i];
        for (const matrix *w : {&l.qkv, &l.wo, &l.gate_up, &l.w_down}) if (w->n_parts > 0) return false;
    }
    return true;
}

/* Down as tiles of a block's columns */
static qwen3_result map_columns(cuda_model *m, const qwen3i_err *err) {
    for (int i = 0; fits_two(m) && i < m->config.n_layer; i++) {
        layer_weights &l = m->layers[i];
        TRY(make_map(&l.down_columns, l.w_down.data, (u64)l.w_down.ld, (u64)l.w_down.rows, 0, TWO_UNITS * 8,
                     TWO_BOX, 1, err));
    }
    return QWEN3_OK;
}

/* How many clusters of a kernel with so much shared memory run at once */
template <class... P>
static qwen3_result count_clusters(int *room, void (*kernel)(P...), size_t shared, const qwen3i_err *err) {
    cudaLaunchConfig_t config = cudaLaunchConfig_t();
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = TWO_CLUSTER;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = grid1(TWO_PARTS * TWO_CLUSTER);
    config.blockDim = dim3(TWO_THREADS);
    config.dynamicSmemBytes = shared;
    config.attrs = &cluster;
    config.numAttrs = 1;
    TRY(allow_shared(kernel, shared, err));
    CUDA_TRY(cudaOccupancyMaxActiveClusters(room, kernel, &config));
    return QWEN3_OK;
}

/* Both halves must find room side by side, or the one would wait where it should have its weights coming. */
static qwen3_result prepare_two(cuda_ctx *c, const qwen3i_err *err) {
    const qwen3i_config *g = &c->m->config;
    const int clusters = two_mlp_clusters(g) + g->n_head_kv;
    const size_t shared[2] = {sizeof(two_attention_shared), sizeof(two_mlp_shared)};
    int room[2];
    c->two = false;
    if (!fits_two(c->m) || c->desc.kv_type == QWEN3_KV_F32) return QWEN3_OK;
    if (shared[0] > c->m->block_shared || shared[1] > c->m->block_shared) return QWEN3_OK;
#define CALL(T) count_clusters(&room[0], two_attention_kernel<T>, shared[0], err)
    TRY(BY_HALF_TYPE(c, CALL));
#undef CALL
    TRY(count_clusters(&room[1], two_mlp_kernel, shared[1], err));
    c->two = room[0] >= clusters && room[1] >= clusters;
    return QWEN3_OK;
}

/* The parts of x that a half leaves */
static float *two_parts(const cuda_ctx *c, int half) { return c->two_parts + half * TWO_PARTS * TWO_WIDTH; }
static sum_of_parts two_sum(const cuda_ctx *c, int half) {
    const qwen3i_config *g = &c->m->config;
    const sum_of_parts s = {two_parts(c, half), half ? two_mlp_clusters(g) : g->n_head_kv};
    return s;
}

static qwen3_result two_attention(const pass *p, int layer, const sum_of_parts &x) {
    const cuda_ctx *c = p->c;
    const layer_weights *w = &c->m->layers[layer];
    const two_attention_args a = {
        (const half_t *)w->qkv.data, w->qkv.ld, w->qkv.scale,
        (const half_t *)w->wo.data, w->wo.ld, w->wo.scale, w->attn_norm,
        x, two_parts(c, 0), qkv_arguments(p, layer)
    };
#define CALL(T) launch_clusters(p->early, TWO_CLUSTER, p->s, grid1(c->m->config.n_head_kv * TWO_CLUSTER), \
                                TWO_THREADS, sizeof(two_attention_shared), two_attention_kernel<T>, a)
    return launched(p, BY_HALF_TYPE(c, CALL), "two_attention");
#undef CALL
}

static qwen3_result two_mlp(const pass *p, int layer, const sum_of_parts &x) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const layer_weights *w = &c->m->layers[layer];
    const two_mlp_args a = {
        (const half_t *)w->gate_up.data, w->gate_up.ld, w->gate_up.scale, w->w_down.scale, w->mlp_norm,
        g->rms_eps, g->n_ff, x, two_parts(c, 1)
    };
    return launched(p, launch_clusters(p->early, TWO_CLUSTER, p->s, grid1(two_mlp_clusters(g) * TWO_CLUSTER),
                                       TWO_THREADS, sizeof(two_mlp_shared), two_mlp_kernel, a,
                                       get_map(w->down_columns)), "two_mlp");
}

/* x, and what the head takes */
static qwen3_result add_parts(const pass *p, const sum_of_parts &x) {
    cuda_ctx *c = p->c;
    return launched(p, launch_early(p->early, p->s, grid1(1), TWO_WIDTH, 0, add_parts_kernel, c->x, c->h, x,
                                    c->m->final_norm, c->m->config.rms_eps), "add_parts");
}

/* A layer of one row: x comes from c->x and goes back there, but between layers it is in parts. */
static qwen3_result two_kernels(const pass *p, int layer) {
    const cuda_ctx *c = p->c;
    const bool last = layer == c->m->config.n_layer - 1;
    const sum_of_parts whole = {c->x, 1};
    TRY(two_attention(p, layer, layer == 0 ? whole : two_sum(c, 1)));
    if (last && p->n_outs == 0) return QWEN3_OK;
    TRY(two_mlp(p, layer, two_sum(c, 0)));
    return last ? add_parts(p, two_sum(c, 1)) : QWEN3_OK;
}

/* ================================================================================================
   EXPERTS: x = x + the sum over the experts that a row picks of weight * Wdown(silu(Wgate h) * (Wup h))
   ================================================================================================ */
/* An entry is a row and one of its picks: row * used + pick. Experts' matrices lie below each other: gate and
   up of each, and the downs. Sums of an entry depend on it alone. */

/* route: logits[row, i] = router[i] . h[row] in float32: one warp an expert, ROUTE_ROWS rows. Grid: experts
   by warps, rows. Equals qwen3i_matmul. */
const int ROUTE_ROWS = 8, ROUTE_MANY = 16, ROUTE_EXPERTS = 4;
static __global__ void __launch_bounds__(256)
    route_kernel(float *logits, const float *router, const float *h, int ldh, int rows, int n_expert,
                 int width) {
    const int expert = block_x() * 8 + warp_id(), first = block_y() * ROUTE_ROWS, lane = lane_id();
    float acc[ROUTE_ROWS];
    UNROLL for (int r = 0; r < ROUTE_ROWS; r++) acc[r] = 0;
    wait_for_previous();
    let_next_start();
    if (expert >= n_expert) return;
    /* of a row that is not there the last one's: no branch, loads overlap */
    const float *from[ROUTE_ROWS];
    UNROLL for (int r = 0; r < ROUTE_ROWS; r++) from[r] = h + (size_t)least(first + r, rows - 1) * ldh;
    _Pragma("unroll 4") for (int k = lane; k < width; k += 32) {
        const float w = router[(size_t)expert * width + k];
        UNROLL for (int r = 0; r < ROUTE_ROWS; r++) acc[r] += w * from[r][k];
    }
    UNROLL for (int r = 0; r < ROUTE_ROWS; r++) {
        const float sum = warp_sum(acc[r]);
        if (lane == 0 && first + r < rows) logits[(size_t)(first + r) * n_expert + expert] = sum;
    }
}

/* route_many: the same for more rows: ROUTE_EXPERTS a warp, ROUTE_MANY rows; width is a multiple of 4. */
static __global__ void __launch_bounds__(256, 2)
    route_many_kernel(float *logits, const float *router, const float *h, int ldh, int rows, int n_expert,
                      int width) {
    const int E = ROUTE_EXPERTS, R = ROUTE_MANY, expert = (block_x() * 8 + warp_id()) * E,
              first = block_y() * R, lane = lane_id();
    float acc[E][R];
    UNROLL for (int i = 0; i < E * R; i++) acc[i / R][i % R] = 0;
    wait_for_previous();
    let_next_start();
    if (expert >= n_expert) return;
    const auto of_expert = [&](int e) { return router + (size_t)least(expert + e, n_expert - 1) * width; };
    const auto of_row = [&](int r) { return h + (size_t)least(first + r, rows - 1) * ldh; };
    NO_UNROLL for (int k = 4 * lane; k < width; k += 128) {
        float4 w[E];
        UNROLL for (int e = 0; e < E; e++) w[e] = *(const float4 *)(const void *)(of_expert(e) + k);
        UNROLL for (int r = 0; r < R; r++) {
            const float4 x = *(const float4 *)(const void *)(of_row(r) + k);
            UNROLL for (int e = 0; e < E; e++) {
                acc[e][r] += w[e].x * x.x; acc[e][r] += w[e].y * x.y;
                acc[e][r] += w[e].z * x.z; acc[e][r] += w[e].w * x.w;
            }
        }
    }
    UNROLL for (int e = 0; e < E; e++) UNROLL for (int r = 0; r < R; r++) {
        const float sum = warp_sum(acc[e][r]);
        if (lane == 0 && expert + e < n_expert && first + r < rows)
            logits[(size_t)(first + r) * n_expert + expert + e] = sum;
    }
}

/* A probability that was picked has its sign set. */
DEVICE bool is_picked(float p) { return __float_as_uint(p) >> 31; }

/* The numbers of a row, 32 at a time, of which a lane has one: in registers, or where they were. */
struct kept_numbers {
    float v[4];
    __device__ int steps(int) const { return 4; }
    __device__ float &operator[](int j) { return v[j]; }
};
struct stored_numbers {
    float *p;
    __device__ int steps(int n) const { return ceil_div(n, 32); }
    __device__ float &operator[](int j) { return p[32 * j + lane_id()]; }
};

/* The largest of all lanes' floats, none of which is negative but -1; the smallest of their numbers. */
DEVICE float warp_most(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __int_as_float(__reduce_max_sync(ALL, __float_as_int(v)));
#else
    return warp_max(v);
#endif
}
DEVICE int warp_least(int v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_min_sync(ALL, v);
#else
    UNROLL for (int o = 16; o > 0; o >>= 1) v = least(v, __shfl_xor_sync(ALL, v, o));
    return v;
#endif
}

/* Where a row's largest probability is that was not picked; of equal ones the first. By a warp. */
template <class P> DEVICE int most_probable(P &p, int n) {
    float best = -1;
    int at = INT_MAX;
    UNROLL for (int j = 0; j < p.steps(n); j++) {
        const int i = 32 * j + lane_id();
        if (i < n && !is_picked(p[j]) && p[j] > best) { best = p[j]; at = i; }
    }
    return warp_least(best == warp_most(best) ? at : INT_MAX);
}

/* Softmax over the logits of a row, to p; the `used` most probable in order of index, and their weights. By a
   warp. What is no number counts as 0. */
template <class P>
DEVICE void pick_of(P p, int *picked, float *share, const float *logits, int n, int used, int norm) {
    const int lane = lane_id();
    float top = LOWEST, all = 0, sum = 0;
    UNROLL for (int j = 0; j < p.steps(n); j++) {
        if (32 * j + lane < n) p[j] = __ldcg(logits + 32 * j + lane);
        if (32 * j + lane < n) top = fmaxf(top, p[j]);
    }
    top = warp_max(top);
    UNROLL for (int j = 0; j < p.steps(n); j++) {
        if (32 * j + lane >= n) continue;
        const float e = expf(p[j] - top);
        p[j] = e >= 0 && e <= 1 ? e : 0.0f;
        all += p[j];
    }
    all = warp_sum(all);
    for (int k = 0; k < used; k++) {
        const int at = most_probable(p, n);
        UNROLL for (int j = 0; j < p.steps(n); j++) if (32 * j + lane == at) p[j] = -p[j];
    }
    UNROLL for (int j = 0; j < p.steps(n); j++) if (32 * j + lane < n && is_picked(p[j])) sum += -p[j];
    sum = warp_sum(sum);
    const float part = 1.0f / (norm ? sum : all);
    int base = 0;
    UNROLL for (int j = 0; j < p.steps(n); j++) {
        const bool is = 32 * j + lane < n && is_picked(p[j]);
        const unsigned those = __ballot_sync(ALL, is);
        const int at = base + __popc(those & ((1u << lane) - 1));
        if (is) {
            picked[at] = 32 * j + lane;
            share[at] = -p[j] * part;
        }
        base += __popc(those);
    }
}
/* It may overwrite the logits. */
DEVICE void pick_row(int *picked, float *share, float *logits, int n, int used, int norm) {
    if (n <= 128) pick_of(kept_numbers(), picked, share, logits, n, used, norm);
    else pick_of(stored_numbers{logits}, picked, share, logits, n, used, norm);
}

/* pick_experts: pick_row of each row. One warp a row. Equals qwen3i_route_rows. */
static __global__ void __launch_bounds__(256)
    pick_experts_kernel(int *picked, float *share, float *logits, int rows, int n, int used, int norm) {
    const int row = block_x() * 8 + warp_id();
    wait_for_previous();
    let_next_start();
    if (row < rows)
        pick_row(picked + row * used, share + row * used, logits + (size_t)row * n, n, used, norm);
}

/* route_one: for one row all of it: h = RMSNorm(x), the logits, and, by the block that is the last to have
   them, the choice. A block an expert. ticket: zero before and after. Equals qwen3i_rmsnorm, qwen3i_matmul,
   qwen3i_route_rows. */
struct route_args {
    float       *h, *logits;            /* [n_embd], [n_expert] */
    const float *x, *gain, *router;
    int         *picked;
    float       *share;
    unsigned    *ticket;
    int          n_expert, n_embd, used, norm;
    float        eps;
    bool         choose;                /* else who needs the choice makes it of the logits */
};
const int ROUTE_EACH = 8;               /* elements of a row that a thread keeps */
static __global__ void __launch_bounds__(256) route_one_kernel(route_args a) {
    __shared__ float shared[32];
    __shared__ bool last;
    const float *router = a.router + (size_t)block_x() * a.n_embd;
    float w[ROUTE_EACH], gain[ROUTE_EACH], sum = 0, acc = 0;
    UNROLL for (int j = 0; j < ROUTE_EACH; j++) {       /* before the kernel before has ended */
        const int k = tid() + 256 * j, at = k < a.n_embd ? k : 0;
        w[j] = router[at];
        gain[j] = a.gain[at];
    }
    for (int k = tid() + 256 * ROUTE_EACH; k < a.n_embd; k += 256) prefetch(router + k);
    wait_for_previous();
    let_next_start();
    UNROLL for (int j = 0; j < ROUTE_EACH; j++) {
        const int k = tid() + 256 * j;
        const float x = k < a.n_embd ? a.x[k] : 0;
        sum += x * x;
        acc += w[j] * (x * gain[j]);
    }
    for (int k = tid() + 256 * ROUTE_EACH; k < a.n_embd; k += 256) {
        sum += a.x[k] * a.x[k];
        acc += router[k] * (a.x[k] * a.gain[k]);
    }
    const float r = rms_scale(block_sum(sum, shared), (float)a.n_embd, a.eps);
    acc = block_sum(acc, shared) * r;
    if (tid() == 0) a.logits[block_x()] = acc;
    for (int k = block_x() * 256 + tid(); k < a.n_embd; k += (int)gridDim.x * 256)
        a.h[k] = a.x[k] * r * a.gain[k];
    if (!a.choose) return;
    __threadfence();
    __syncthreads();
    if (tid() == 0) {
        last = atomicAdd(a.ticket, 1u) == gridDim.x - 1;
        if (last) *a.ticket = 0;
    }
    __syncthreads();
    if (!last || warp_id() != 0) return;
    __threadfence();
    pick_row(a.picked, a.share, a.logits, a.n_expert, a.used, a.norm);
}

/* group_entries: the entries that have picked each expert, in order: lists [n_expert, rows], counts. One
   block an expert. */
static __global__ void __launch_bounds__(256)
    group_entries_kernel(int *lists, int *counts, const int *picked, int entries, int rows) {
    __shared__ int of_warp[8];
    const int expert = block_x(), warp = warp_id(), lane = lane_id();
    int n = 0;
    wait_for_previous();
    let_next_start();
    for (int first = 0; first < entries; first += 256) {
        const int entry = first + tid();
        const bool is = entry < entries && picked[entry] == expert;
        const unsigned those = __ballot_sync(ALL, is);
        if (lane == 0) of_warp[warp] = __popc(those);
        __syncthreads();
        int at = n;
        for (int w = 0; w < 8; w++) {
            if (w < warp) at += of_warp[w];
            n += of_warp[w];
        }
        if (is) lists[(size_t)expert * rows + at + __popc(those & ((1u << lane) - 1))] = entry;
        __syncthreads();
    }
    if (tid() == 0) counts[expert] = n;
}

/* What a kernel of experts works on. Without lists there is one row, and block y is its pick. */
struct expert_args {
    const void  *w;                     /* [n_expert * rows, ldw], zero from k to ldw */
    float        scale;                 /* W = w * scale */
    int          rows, k, ldw;          /* of one expert */
    const float *x;                     /* entry e has row e / per */
    int          ldx, per;
    const int   *lists, *counts, *picked;
    int          list_rows;             /* of a list */
    float       *y;                     /* [entries, ldy] */
    int          ldy;
};

DEVICE int expert_count(const expert_args &a) { return a.lists ? a.counts[block_y()] : 1; }
DEVICE int expert_index(const expert_args &a) { return a.lists ? block_y() : a.picked[block_y()]; }
DEVICE int expert_entry(const expert_args &a, int i) {
    return a.lists ? a.lists[(size_t)block_y() * a.list_rows + i] : block_y();
}

const int EXPERT_TILE = 1024;           /* elements of x that a block holds at a time */

/* Elements of x of R entries to shared memory as V / 4 planes, so that lanes read neighbouring 16 bytes; zero
   from k on and for entries that there are not. */
template <int V, int R>
DEVICE void stage_entries(float4 *xs, const expert_args &a, const int (&rows)[R], int k0) {
    UNROLL for (int r = 0; r < R; r++)
        for (int q = tid(); q < EXPERT_TILE / 4; q += n_threads())
            xs[r * (EXPERT_TILE / 4) + q % (V / 4) * (EXPERT_TILE / V) + q / (V / 4)] =
                rows[r] >= 0 ? load_up_to_4(a.x + (size_t)rows[r] * a.ldx, k0 + 4 * q, a.k) :
                               make_float4(0, 0, 0, 0);
}

/* acc[j][r] = W[row j] . x[r] for two rows of W; at NULL: nothing to read. By all threads of a block. */
template <class W, int R>
DEVICE void expert_dots(float (&acc)[2][R], const expert_args &a, const W *const (&at)[2],
                        const int (&rows)[R], float4 *xs) {
    const int V = 16 / (int)sizeof(W), U = EXPERT_TILE / (32 * V), lane = lane_id();
    UNROLL for (int j = 0; j < 2; j++) UNROLL for (int r = 0; r < R; r++) acc[j][r] = 0;
    NO_UNROLL for (int k0 = 0; k0 < a.k; k0 += EXPERT_TILE) {
        uint4 w[2][U];
        UNROLL for (int u = 0; u < U; u++) UNROLL for (int j = 0; j < 2; j++) {
            const int k = k0 + (u * 32 + lane) * V;
            w[j][u] = at[j] && k < a.ldw ? load_stream(at[j] + k) : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
        stage_entries<V, R>(xs, a, rows, k0);
        __syncthreads();
        UNROLL for (int u = 0; u < U; u++) {
            float f[2][V];
            UNROLL for (int j = 0; j < 2; j++) unpack(f[j], w[j][u], W());
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < V / 4; p++) {
                const float4 x = xs[r * (EXPERT_TILE / 4) + p * (EXPERT_TILE / V) + u * 32 + lane];
                UNROLL for (int j = 0; j < 2; j++) {
                    acc[j][r] += f[j][4 * p] * x.x;
                    acc[j][r] += f[j][4 * p + 1] * x.y;
                    acc[j][r] += f[j][4 * p + 2] * x.z;
                    acc[j][r] += f[j][4 * p + 3] * x.w;
                }
            }
        }
    }
    UNROLL for (int j = 0; j < 2; j++)
        UNROLL for (int r = 0; r < R; r++) acc[j][r] = warp_sum(acc[j][r]) * a.scale;
}

/* experts: with GLU y[entry, i] = silu(gate_i) * up_i, else y[entry, i] = (W x)_i, of the entries of an
   expert, R at a time: so many share a read of its weights. A warp has two rows of W: gate and up, or
   neighbours. Grid: pairs by warps, experts. Order of the sums: see dot_rows. Equals qwen3i_swiglu,
   qwen3i_matmul. */
template <class W, int R, bool GLU>
static __global__ void __launch_bounds__(256) experts_kernel(expert_args a) {
    __shared__ float4 xs[R * EXPERT_TILE / 4];
    const int pair = block_x() * 8 + warp_id(), half = a.rows / 2;
    const int row[2] = {GLU ? pair : 2 * pair, GLU ? half + pair : 2 * pair + 1};
    const bool any = GLU ? pair < half : 2 * pair < a.rows;
    wait_for_previous();
    let_next_start();
    const W *w = (const W *)a.w + (size_t)expert_index(a) * a.rows * a.ldw;
    const W *const at[2] = {any ? w + (size_t)row[0] * a.ldw : NULL,
                            any && row[1] < a.rows ? w + (size_t)row[1] * a.ldw : NULL};
    const int n = expert_count(a);
    NO_UNROLL for (int first = 0; first < n; first += R) {
        float acc[2][R];
        int rows[R];
        UNROLL for (int r = 0; r < R; r++) rows[r] = first + r < n ? expert_entry(a, first + r) / a.per : -1;
        expert_dots<W, R>(acc, a, at, rows, xs);
        if (lane_id() != 0 || !any) continue;
        UNROLL for (int r = 0; r < R; r++) {
            if (first + r >= n) continue;
            float *y = a.y + (size_t)expert_entry(a, first + r) * a.ldy;
            if (GLU) y[pair] = silu(acc[0][r]) * acc[1][r];
            else {
                y[row[0]] = acc[0][r];
                if (row[1] < a.rows) y[row[1]] = acc[1][r];
            }
        }
    }
}

/* mix_experts: x[row, :] += the sum of share * y over the row's entries, in order of expert. A block has a
   row. */
static __global__ void mix_experts_kernel(float *x, const float *y, const float *share, int used, int width,
                                          int ld, int ldy) {
    const size_t row = blockIdx.x, entry = row * used;
    wait_for_previous();
    let_next_start();
    for (int i = tid(); i < width; i += n_threads()) {
        float sum = 0;
        for (int k = 0; k < used; k++) sum += share[entry + k] * y[(entry + k) * ldy + i];
        x[row * ld + i] += sum;
    }
}

/* expert_sum: for one row x[i] += the sum of share * (W x)_i over its entries, in order of expert. A warp has
   one i, and weights of four experts on their way. Equals qwen3i_experts_mlp after its qwen3i_swiglu. */
template <class W>
static __global__ void __launch_bounds__(256)
    expert_sum_kernel(expert_args a, const float *share, int used, float *x) {
    const int V = 16 / (int)sizeof(W), U = 3, row = block_x() * 8 + warp_id(), lane = lane_id();
    float sum = 0;
    wait_for_previous();
    let_next_start();
    if (row >= a.rows) return;
    NO_UNROLL for (int first = 0; first < used; first += 4) {
        float acc[4] = {0, 0, 0, 0};
        NO_UNROLL for (int k0 = lane * V; k0 < a.ldw; k0 += U * 32 * V) {
            uint4 w[4][U];
            UNROLL for (int j = 0; j < 4; j++) UNROLL for (int u = 0; u < U; u++) {
                const int k = k0 + u * 32 * V;
                const bool is = first + j < used && k < a.ldw;
                const size_t at = is ? (size_t)a.picked[first + j] * a.rows + row : 0;
                w[j][u] = is ? load_stream((const W *)a.w + at * a.ldw + k) : make_uint4(0, 0, 0, 0);
            }
            UNROLL for (int j = 0; j < 4; j++) UNROLL for (int u = 0; u < U; u++) {
                const float *m = a.x + (size_t)(first + j < used ? first + j : 0) * a.ldx;
                float f[V];
                unpack(f, w[j][u], W());
                UNROLL for (int q = 0; q < V; q += 4) {
                    const float4 v = load_up_to_4(m, k0 + u * 32 * V + q, a.k);
                    acc[j] += f[q] * v.x;
                    acc[j] += f[q + 1] * v.y;
                    acc[j] += f[q + 2] * v.z;
                    acc[j] += f[q + 3] * v.w;
                }
            }
        }
        UNROLL for (int j = 0; j < 4; j++) {
            const float dot = warp_sum(acc[j]) * a.scale;
            if (first + j < used) sum += share[first + j] * dot;
        }
    }
    if (lane == 0) x[row] += sum;
}

/* ---- one row of 16-bit weights ---- */
/* Blocks choose the experts for themselves, of the logits: there is no kernel to wait for, and down knows
   them while up works. */
const int ONE_WARPS = 16, ONE_EXPERTS = 512, ONE_USED = 32;
const int UP_VECTORS = 4;               /* of 16 bytes, of a row, that a lane asks for at once */
const int DOWN_ROWS = 4, DOWN_PARTS = 4, DOWN_VECTORS = 6;

struct one_args {
    const float  *logits, *h;           /* [n_expert], [n_embd] */
    int           n_expert, used, norm;
    const half_t *w;                    /* [n_expert, each, ldw] */
    float         scale;                /* W = w * scale */
    int           each, ldw;
    float        *m; int ldm, ff;       /* [used, ldm] share * silu(gate) * up */
    float        *y;                    /* [n_embd]: what is added to */
};
struct one_choice { float share[ONE_USED]; int picked[ONE_USED]; };

/* By the first warp. p: room for n_expert. */
DEVICE void choose_one(one_choice &to, const one_args &a, float *p) {
    if (a.n_expert <= 128) pick_of(kept_numbers(), to.picked, to.share, a.logits, a.n_expert, a.used, a.norm);
    else pick_of(stored_numbers{p}, to.picked, to.share, a.logits, a.n_expert, a.used, a.norm);
}

/* Weights that are asked for before wait_for_previous(). */
DEVICE uint4 load_before(const void *p) {
#ifdef QWEN3_WGMMA
    return load_ahead(p);
#else
    return load_stream(p);
#endif
}

/* Rows of n floats, ld apart, to two planes of float4 each, zero up to a multiple of 256: lanes that read 8
   elements each read neighbouring 16 bytes. By threads [from, n_threads()). */
DEVICE void stage_planes(float4 *xs, const float *x, int rows, int n, int ld, int from) {
    const int each = round_up(n, 256) / 4, step = n_threads() - from;
    _Pragma("unroll 4") for (int i = tid() - from; i < rows * each; i += step) {
        const int row = i / each, q = i % each;
        xs[row * each + q % 2 * (each / 2) + q / 2] = load_up_to_4(x + (size_t)row * ld, 4 * q, n);
    }
}
/* 8 elements of W times those of x */
DEVICE float dot_8(float sum, uint4 w, float4 lo, float4 hi) {
    float f[8];
    unpack(f, w, half_t());
    sum += f[0] * lo.x; sum += f[1] * lo.y; sum += f[2] * lo.z; sum += f[3] * lo.w;
    sum += f[4] * hi.x; sum += f[5] * hi.y; sum += f[6] * hi.z; sum += f[7] * hi.w;
    return sum;
}

/* up_one: m[pick, i] = share * silu(gate_i) * up_i of one row. The warps of the grid share the pairs evenly.
   Order: lane l takes elements 8 l on of each 256, lanes are added by exchange. Equals qwen3i_swiglu. */
static __global__ void __launch_bounds__(32 * ONE_WARPS, 1) up_one_kernel(one_args a) {
    QWEN3_DYNAMIC_SHARED(memory);
    __shared__ one_choice choice;
    float4 *xs = (float4 *)(void *)memory;
    const int room = round_up(a.ldw, 256), pairs = a.each / 2, chunks = ceil_div(a.ldw, UP_VECTORS * 256);
    const size_t half = (size_t)pairs * a.ldw;
    const row_range mine = block_warp_share(a.used * pairs);
    const int turns = (mine.end - mine.first) * chunks, at = lane_id() * 8;
    wait_for_previous();
    let_next_start();                   /* which then knows the logits */
    if (warp_id() == 0) choose_one(choice, a, (float *)(void *)(xs + room / 4));
    else stage_planes(xs, a.h, 1, a.ldw, a.ldw, 32);
    __syncthreads();
    const auto load = [&](uint4 (&w)[2 * UP_VECTORS], int turn) {
        const int pair = mine.first + turn / chunks, k = turn % chunks * (UP_VECTORS * 256) + at;
        if (turn >= turns) return;
        const half_t *from =
            a.w + ((size_t)choice.picked[pair / pairs] * a.each + pair % pairs) * a.ldw + k;
        UNROLL for (int u = 0; u < UP_VECTORS; u++)
            UNROLL for (int j = 0; j < 2; j++)
                w[2 * u + j] = k + 256 * u < a.ldw ? load_stream(from + 256 * u + (j ? half : 0)) :
                                                     make_uint4(0, 0, 0, 0);
    };
    uint4 w[2][2 * UP_VECTORS];
    float gate = 0, up = 0;
    load(w[0], 0);
    load(w[1], 1);
    NO_UNROLL for (int turn = 0; turn < turns; turn += 2)
        UNROLL for (int j = 0; j < 2; j++) {
            if (turn + j >= turns) break;
            const int chunk = (turn + j) % chunks, pair = mine.first + (turn + j) / chunks;
            UNROLL for (int u = 0; u < UP_VECTORS; u++) {
                const int v = (chunk * UP_VECTORS + u) * 32 + lane_id();
                if ((chunk * UP_VECTORS + u) * 256 >= room) break;
                const float4 lo = xs[v], hi = xs[room / 8 + v];
                gate = dot_8(gate, w[j][2 * u], lo, hi);
                up = dot_8(up, w[j][2 * u + 1], lo, hi);
            }
            load(w[j], turn + j + 2);
            if (chunk < chunks - 1) continue;
            gate = warp_sum(gate) * a.scale;
            up = warp_sum(up) * a.scale;
            if (lane_id() == 0)
                a.m[(size_t)(pair / pairs) * a.ldm + pair % pairs] =
                    choice.share[pair / pairs] * (silu(gate) * up);
            gate = up = 0;
        }
}

/* down_one: y += the sum of Wdown m over the experts of one row. A block has DOWN_PARTS times DOWN_ROWS rows
   of W: a warp has so many and a part of the experts, whose weights are on their way before m is there.
   Order: as up_one's, the experts of a part, the parts. Equals qwen3i_experts_mlp after its qwen3i_swiglu. */
static __global__ void __launch_bounds__(32 * ONE_WARPS, 1) down_one_kernel(one_args a) {
    QWEN3_DYNAMIC_SHARED(memory);
    __shared__ one_choice choice;
    __shared__ float parts[DOWN_PARTS][DOWN_PARTS * DOWN_ROWS];
    const int R = DOWN_ROWS, V = DOWN_VECTORS, lane = lane_id(), part = warp_id() / DOWN_PARTS,
              local = warp_id() % DOWN_PARTS * R, row = block_x() * DOWN_PARTS * R + local;
    const int room = round_up(a.ldw, 256), each = room / 256, share = ceil_div(a.used, DOWN_PARTS),
              first = least(part * share, a.used), n = (least(first + share, a.used) - first) * each;
    float4 *xs = (float4 *)(void *)memory;
    uint4 w[V][R];
    float sum[R] = {};
    if (warp_id() == 0) choose_one(choice, a, (float *)(void *)xs);
    __syncthreads();
    const auto load = [&](int from) {
        UNROLL for (int v = 0; v < V; v++) {
            const int pick = first + (from + v) / each, k = ((from + v) % each * 32 + lane) * 8;
            const bool is = from + v < n && k < a.ldw;
            const half_t *at =
                a.w + ((size_t)choice.picked[is ? pick : 0] * a.each + row) * a.ldw + (is ? k : 0);
            UNROLL for (int r = 0; r < R; r++)
                w[v][r] = is && row + r < a.each ? load_before(at + (size_t)r * a.ldw) :
                                                   make_uint4(0, 0, 0, 0);
        }
    };
    load(0);
    wait_for_previous();
    let_next_start();
    stage_planes(xs, a.m, a.used, a.ff, a.ldm, 0);
    __syncthreads();
    NO_UNROLL for (int from = 0; from < n; from += V) {
        UNROLL for (int v = 0; v < V; v++) {
            if (from + v >= n) break;
            const float4 *x = xs + (first + (from + v) / each) * (room / 4) + (from + v) % each * 32 + lane;
            UNROLL for (int r = 0; r < R; r++) sum[r] = dot_8(sum[r], w[v][r], x[0], x[room / 8]);
        }
        if (from + V < n) load(from + V);
    }
    UNROLL for (int r = 0; r < R; r++) {
        sum[r] = warp_sum(sum[r]) * a.scale;
        if (lane == 0) parts[part][local + r] = sum[r];
    }
    __syncthreads();
    const int out = block_x() * DOWN_PARTS * R + tid();
    if (tid() >= DOWN_PARTS * R || out >= a.each) return;
    float all = 0;
    UNROLL for (int i = 0; i < DOWN_PARTS; i++) all += parts[i][tid()];
    a.y[out] += all;
}

/* block_experts: the same of matrices in blocks, R entries at a time; in.parts: all experts' gates and ups,
   or their downs. Grid: warps share an expert's rows, or pairs of them; experts, or one row's picks. */
template <int R, bool GLU>
static __global__ void __launch_bounds__(32 * block_shape<R>::WARPS, block_shape<R>::BLOCKS)
    block_experts_kernel(const __grid_constant__ block_in in, expert_args a) {
    QWEN3_DYNAMIC_SHARED(memory);
    wait_for_previous();
    const int n = expert_count(a), each = GLU ? a.rows / 2 : a.rows, before = expert_index(a) * each;
    row_range mine = block_warp_share(each);
    mine.first += before;
    mine.end += before;
    NO_UNROLL for (int first = 0; first < n; first += R) {
        const auto entry = [&](int r) { return expert_entry(a, least(first + r, n - 1)); };
        const auto put = [&](int r, int row, int rows, float y) {
            if (lane_id() < rows && first + r < n)
                a.y[(size_t)entry(r) * a.ldy + row - before + lane_id()] = y;
        };
        __syncthreads();                /* nobody reads the rows before any more */
        NO_UNROLL for (int r = 0; r < R; r++)
            block_stage_row(in, block_planes(memory) + r * block_x_bytes(in),
                            a.x + (size_t)(entry(r) / a.per) * a.ldx);
        __syncthreads();
        if (GLU)
            block_multiply_pairs<R>(in, mine, [&](int r, int row, int rows, float2 sums) {
                put(r, row, rows, silu(sums.x) * sums.y);
            }, false);
        else block_multiply<R>(in, mine, put, false);
    }
    let_next_start();
}

/* ---- many rows: tiles by the tensor cores ---- */
const int GROUP_M = 64, GROUP_N = 128, GROUP_K = 64;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
const int GROUP_STAGES = 2;             /* a block has 64 KB at most, and copies overlap with nothing */
#else
const int GROUP_STAGES = 3;
#endif
static size_t group_shared(int capability) {
    return (size_t)(capability < 80 ? 2 : 3) * (GROUP_M + GROUP_N) * GROUP_K * 2;
}

/* Where 8 elements of a row of a tile lie, so that those that are read together lie in different banks. */
DEVICE half_t *group_at(half_t *tile, int row, int chunk) {
    return tile + row * GROUP_K + (chunk ^ row % 8) * 8;
}

/* The next GROUP_K columns of the entries' rows and of W on their way to a stage. */
DEVICE void group_load(half_t *stage, const half_t *x, int ldx, const int *rows, const half_t *w, int w_rows,
                       int ldw, int k0) {
    for (int i = tid(); i < (GROUP_M + GROUP_N) * (GROUP_K / 8); i += 256) {
        const int row = i / (GROUP_K / 8), chunk = i % (GROUP_K / 8), k = k0 + 8 * chunk, n = row - GROUP_M;
        const bool of_x = row < GROUP_M, valid = k < ldw && (of_x ? rows[row] >= 0 : n < w_rows);
        const half_t *from = !valid ? w : of_x ? x + (size_t)rows[row] * ldx + k : w + (size_t)n * ldw + k;
        copy_async(group_at(stage + (of_x ? 0 : GROUP_M * GROUP_K), of_x ? row : n, chunk), from, valid);
    }
    copy_commit();
}

/* part += x W^T of one stage: a warp has 32 x 32 */
DEVICE void group_multiply(float (&part)[2][4][4], half_t *stage, int m, int n) {
    const int lane = lane_id();
    half_t *w = stage + GROUP_M * GROUP_K;
    UNROLL for (int k = 0; k < GROUP_K / 8; k += 2) {
        unsigned a[2][4], b[2][4];
        UNROLL for (int i = 0; i < 2; i++)
            load_matrices(a[i], group_at(stage, m + 16 * i + lane % 16, k + lane / 16));
        UNROLL for (int i = 0; i < 2; i++)
            load_matrices(b[i], group_at(w, n + 16 * i + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int j = 0; j < 4; j++)
                multiply(part[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], half_t());
    }
}

/* group_product: y[entry, :] = W x[entry / per] * x_scale of all entries of an expert, 64 at a time by 128
   rows of W. The tensor cores add up 128 elements, the rest is added in float32. Grid: tiles of W, experts,
   tiles of entries, of which a block takes every gridDim.z-th. Equals qwen3i_matmul but for the rounding of
   x. */
static __global__ void __launch_bounds__(256, 2)
    group_product_kernel(expert_args a, const half_t *x, const float *x_scale) {
    QWEN3_DYNAMIC_SHARED(memory);
    __shared__ int entry[GROUP_M], rows[GROUP_M];
    half_t *stages = (half_t *)(void *)memory;
    const int STAGE = (GROUP_M + GROUP_N) * GROUP_K;
    const int n0 = block_x() * GROUP_N, steps = ceil_div(a.ldw, GROUP_K);
    const int m = warp_id() / 4 * 32, n = warp_id() % 4 * 32, lane = lane_id(), count = expert_count(a);
    const half_t *w = (const half_t *)a.w + ((size_t)block_y() * a.rows + n0) * a.ldw;
    for (int first = (int)blockIdx.z * GROUP_M; first < count; first += (int)gridDim.z * GROUP_M) {
        float sum[2][4][4], part[2][4][4];
        __syncthreads();
        if (tid() < GROUP_M) {
            entry[tid()] = first + tid() < count ? expert_entry(a, first + tid()) : -1;
            rows[tid()] = entry[tid()] < 0 ? -1 : entry[tid()] / a.per;
        }
        __syncthreads();
        UNROLL for (int i = 0; i < 32; i++)
            sum[i / 16][i / 4 % 4][i % 4] = part[i / 16][i / 4 % 4][i % 4] = 0;
        for (int s = 0; s < GROUP_STAGES - 1; s++)
            if (s < steps) group_load(stages + s * STAGE, x, a.ldx, rows, w, a.rows - n0, a.ldw, s * GROUP_K);
            else copy_commit();
        NO_UNROLL for (int s = 0; s < steps; s++) {
            const int next = s + GROUP_STAGES - 1;
            copy_wait<GROUP_STAGES - 2>();
            __syncthreads();
            if (next < steps)
                group_load(stages + next % GROUP_STAGES * STAGE, x, a.ldx, rows, w, a.rows - n0, a.ldw,
                           next * GROUP_K);
            else copy_commit();
            group_multiply(part, stages + s % GROUP_STAGES * STAGE, m, n);
            if (s % 2 == 0 && s + 1 < steps) continue;
            UNROLL for (int i = 0; i < 32; i++) {
                sum[i / 16][i / 4 % 4][i % 4] += part[i / 16][i / 4 % 4][i % 4];
                part[i / 16][i / 4 % 4][i % 4] = 0;
            }
        }
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int h = 0; h < 2; h++) {
            const int at = m + 16 * i + 8 * h + lane / 4;
            if (entry[at] < 0) continue;
            const float scale = a.scale * x_scale[rows[at]];
            float *y = a.y + (size_t)entry[at] * a.ldy + n0;
            UNROLL for (int j = 0; j < 4; j++) UNROLL for (int e = 0; e < 2; e++) {
                const int col = n + 8 * j + lane % 4 * 2 + e;
                if (n0 + col < a.rows) y[col] = sum[i][j][2 * h + e] * scale;
            }
        }
    }
}

/* ---- Hopper: tiles of entries of one expert ---- */
/* The t-th tile of all experts', and from which of the expert's entries on; expert -1: there are fewer. By a
   warp. */
DEVICE expert_tile find_tile(const int *counts, int n, int t, int *first) {
    int before = 0;
    for (int base = 0; base < n; base += 32) {
        const int i = base + lane_id(), count = i < n ? counts[i] : 0, tiles = ceil_div(count, HOPPER_M);
        int sum = tiles;
        UNROLL for (int o = 1; o < 32; o *= 2) {
            const int lower = __shfl_up_sync(ALL, sum, o);
            sum += lane_id() >= o ? lower : 0;
        }
        const unsigned those = __ballot_sync(ALL, t < before + sum);
        if (those) {
            const int lane = 32 - __popc(those), at = t - before - __shfl_sync(ALL, sum - tiles, lane);
            *first = at * HOPPER_M;
            const expert_tile tile = {base + lane, least(__shfl_sync(ALL, count, lane) - *first, HOPPER_M)};
            return tile;
        }
        before += __shfl_sync(ALL, sum, 31);
    }
    const expert_tile none = {-1, 0};
    return none;
}

struct gather_args {
    const int    *lists, *counts;
    int           list_rows, n_expert, used, width;
    const half_t *from;                 /* [rows, width], each row times scale[row] */
    const float  *scale, *ff_scale;
    expert_tile  *tiles;
    int          *entry;
    half_t       *to;                   /* [tiles, HOPPER_M, width] */
    float        *to_scale, *m_scale;   /* [tiles, HOPPER_M] */
};

/* gather_entries: the rows of all entries in order of expert, each expert's from a tile's first row on.
   Grid: tiles, GATHER_PARTS of each. */
const int GATHER_PARTS = 4;
static __global__ void __launch_bounds__(256) gather_entries_kernel(gather_args a) {
    const int each = HOPPER_M / GATHER_PARTS, begin = block_y() * each;
    int first = 0;
    wait_for_previous();
    let_next_start();
    const expert_tile tile = find_tile(a.counts, a.n_expert, block_x(), &first);
    if (tid() == 0 && block_y() == 0) a.tiles[block_x()] = tile;
    if (tile.expert < 0) return;
    for (int i = begin + warp_id(); i < begin + each; i += 8) {
        const bool is = i < tile.rows;
        const int entry = is ? a.lists[(size_t)tile.expert * a.list_rows + first + i] : -1,
                  row = entry / a.used;
        const size_t at = (size_t)block_x() * HOPPER_M + i;
        if (lane_id() == 0) {
            a.entry[at] = entry;
            a.to_scale[at] = is ? a.scale[row] : 0;
            a.m_scale[at] = is ? a.ff_scale[row] : 1;
        }
        if (!is) continue;
        const uint4 *from = (const uint4 *)(const void *)(a.from + (size_t)row * a.width);
        uint4 *to = (uint4 *)(void *)(a.to + at * a.width);
        _Pragma("unroll 4") for (int k = lane_id(); k < a.width / 8; k += 32) to[k] = from[k];
    }
}

/* What a product of tiles of entries reads and leaves. */
struct group_args {
    hopper_args        h;               /* rows: of all tiles; n_tiles: of 2 HOPPER_N rows of W */
    const expert_tile *tiles;           /* [h.rows / HOPPER_M] */
    int                each;            /* rows of W of an expert */
    const int         *entry;           /* y[entry, :] */
    float             *y; int ldy;
};
struct to_entries : product_end {};

#ifdef QWEN3_WGMMA
typedef large_tile<HOPPER_N, 2> group_tile;

/* Turn u of all blocks': a tile of entries and one of W; false: there is none any more. */
DEVICE bool group_turn(const group_args &g, int u, int *at, int *column, expert_tile *tile) {
    *at = u / g.h.n_tiles;
    *column = u % g.h.n_tiles;
    if (*at >= g.h.rows / HOPPER_M) return false;
    *tile = g.tiles[*at];
    return tile->expert >= 0;
}

/* Tiles that are less than half full come as half of one. */
static __device__ void group_load(const CUtensorMap *x_map, const CUtensorMap *w_map, const group_args &g,
                                  const ring_of_tiles &ring) {
    const unsigned half = HOPPER_HALF / 2;
    ring_place place = {0, 1};
    expert_tile tile;
    int at, column, filled = 0;
    for (int u = block_x(); group_turn(g, u, &at, &column, &tile); u += (int)gridDim.x) {
        const bool both = tile.rows > HOPPER_M / 2;
        const int row = tile.expert * g.each + 2 * column * g.h.step;
        NO_UNROLL for (int k = 0; k < g.h.k; k += HOPPER_K, place.advance(ring.n), filled++) {
            unsigned char *to = ring.memory + group_tile::BYTES * place.slot;
            ring_stage *stage = &ring.stages[place.slot];
            if (filled >= ring.n) barrier_wait(&stage->empty, place.parity);
            barrier_expect(&stage->full, (unsigned)group_tile::BYTES - (both ? 0 : half));
            UNROLL for (int p = 0; p < 4; p++)
                load_tile(to + half * p, w_map, k, row + p / 2 * g.h.step + p % 2 * g.h.half, &stage->full);
            load_tile(to + group_tile::X_AT, x_map, k, at * HOPPER_M, &stage->full);
            if (both)
                load_tile(to + group_tile::X_AT + half, x_map, k, at * HOPPER_M + HOPPER_M / 2, &stage->full);
        }
    }
}

DEVICE void group_finish(const to_mlp &, const group_args &g, const float (&acc)[64], int at, bool is, int r,
                         int n, float scale) {
    large_swiglu(g.h, acc, is ? at : g.h.rows, r, n, scale, 1.0f / g.h.out_scale[at]);
}
DEVICE void group_finish(const to_entries &, const group_args &g, const float (&acc)[64], int at, bool is,
                         int r, int n, float scale) {
    if (!is) return;
    float *y = g.y + (size_t)g.entry[at] * g.ldy + n * HOPPER_N + 2 * (lane_id() % 4);
    UNROLL for (int j = 0; j < 16; j++)
        *(float2 *)(void *)(y + 8 * j) =
            make_float2(acc[4 * j + 2 * r] * scale, acc[4 * j + 2 * r + 1] * scale);
}

/* Of a full tile each warpgroup has half of the rows, else half of the columns. */
template <class END, int PARTS>
static __device__ void group_multiply_tile(const group_args &g, float (&part)[64], const ring_of_tiles &ring,
                                           ring_place &place, int group, int at, int column, int rows) {
    const int first = (PARTS == 2 ? 64 * group : 0) + warp_id() % 4 * 16 + lane_id() / 4;
    float acc[PARTS][64];
    sum_tiles<group_tile, true>(
        acc, part, ring, place, g.h.k / HOPPER_K,
        group_tile::X_AT + (PARTS == 2 ? (int)HOPPER_HALF / 2 * group : 0),
        PARTS == 2 ? 0 : group_tile::W_BYTES * group, [](const unsigned char *) {},
        [](ring_stage *s) { if (lane_id() == 0) barrier_arrive(&s->empty); });
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = at * HOPPER_M + first + 8 * r;
        const float scale = g.h.w_scale * g.h.in_scale[row];
        UNROLL for (int p = 0; p < PARTS; p++)
            group_finish(END(), g, acc[p], row, first + 8 * r < rows, r,
                         2 * column + (PARTS == 2 ? p : group), scale);
    }
}

template <class END>
static __device__ void group_multiply_tiles(const group_args &g, const ring_of_tiles &ring, int group) {
    float part[64];
    ring_place place = {0, 0};
    expert_tile tile;
    int at, column;
    UNROLL for (int i = 0; i < 64; i++) part[i] = 0;
    for (int u = block_x(); group_turn(g, u, &at, &column, &tile); u += (int)gridDim.x)
        if (tile.rows > HOPPER_M / 2)
            group_multiply_tile<END, 2>(g, part, ring, place, group, at, column, tile.rows);
        else group_multiply_tile<END, 1>(g, part, ring, place, group, at, column, tile.rows);
}
#endif

/* group_hopper: as large_product, of tiles of entries, each by the rows of its expert; to_mlp, or y[entry, :]
   = W m. Blocks take turns of tiles of 128 entries by 256 rows of W: all of an expert's one after the other,
   so that its weights come from memory once. Order: that of large_product. */
template <class END>
static __global__ void __launch_bounds__(LARGE_THREADS, 1)
    group_hopper_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                        group_args g) {
#ifdef QWEN3_WGMMA
    QWEN3_DYNAMIC_SHARED(raw);
    const ring_of_tiles ring = make_ring(raw, (size_t)group_tile::STAGES * group_tile::BYTES,
                                         group_tile::STAGES, 8);
    __syncthreads();
    let_next_start();
    wait_for_previous();
    if (warp_id() < 4) {
        fewer_registers<40>();
        if (tid() == 0) group_load(&x_map, &w_map, g, ring);
        __syncwarp();
    } else {
        more_registers<232>();
        group_multiply_tiles<END>(g, ring, __shfl_sync(ALL, warp_id() / 4 - 1, 0));
    }
#else
    (void)x_map; (void)w_map; (void)g;
#endif
}

/* Do the kernels for Hopper serve, where weights are F16? */
static bool group_fits_hopper(const cuda_ctx *c) {
    const qwen3i_config *g = &c->m->config;
    return c->hopper && g->n_ff_expert % (2 * HOPPER_N / 2) == 0 && g->n_embd % (2 * HOPPER_N) == 0;
}
/* The most tiles that entries of so many rows may take. */
static int group_tiles(const cuda_ctx *c, int rows) {
    const int entries = rows * c->m->config.n_expert_used, n = c->m->config.n_expert;
    return least(entries, entries / HOPPER_M + n);
}

/* ---- Hopper: few rows, each expert's weights once ---- */
/* Rows of x are the columns of products by tensor cores whose left operand is 16 rows of W, straight from
   memory: lane 4 g + t holds 8 elements of rows g and g + 8, from 8 t of 32 on, in the order in which it has
   those of x. All columns are multiplied, whoever picked the expert: what is beside a row changes nothing. */
const int EXPERT_COLUMNS = 16;          /* rows of x at most: tiles are faster from there on */
const int UP_WARPS = 16, UP_STEPS = 4;          /* a warp takes so many times 32 elements at a time */
const int DOWN_WARPS = 12, DOWN_STEPS = 2, DOWN_AHEAD = 4;     /* of so many experts at once */

struct route_few_args {
    route_args    one;                  /* as for one row; x and logits [rows, ...] */
    int           rows, ldx;
    const float  *bounds;               /* see hopper_norm: */
    half_t       *act;                  /* [rows, n_embd] */
    float        *act_scale, *ff_scale;
    int          *active;               /* how many experts are picked, then which, in order */
    int          *lists;                /* [those, rows] the entry of each row, or -1 */
};
const int ROUTE_FEW_ROWS = 8;           /* at a time */

/* The experts that are picked, and by which rows. By a block of 256; at [n_expert, rows]. */
static __device__ void list_active(const route_few_args &a, short *at) {
    __shared__ int of_warp[8];
    const int n = a.one.n_expert, rows = a.rows, warp = warp_id(), lane = lane_id();
    int before = 0;
    for (int i = tid(); i < n * rows; i += 256) at[i] = -1;
    __syncthreads();
    for (int i = tid(); i < rows * a.one.used; i += 256)
        at[a.one.picked[i] * rows + i / a.one.used] = (short)i;
    __syncthreads();
    for (int first = 0; first < n; first += 256) {
        const int expert = first + tid();
        bool is = false;
        for (int r = 0; r < rows && expert < n; r++) is = is || at[expert * rows + r] >= 0;
        const unsigned those = __ballot_sync(ALL, is);
        if (lane == 0) of_warp[warp] = __popc(those);
        __syncthreads();
        int slot = before + __popc(those & ((1u << lane) - 1));
        for (int w = 0; w < 8; w++) {
            if (w < warp) slot += of_warp[w];
            before += of_warp[w];
        }
        if (is) a.active[1 + slot] = expert;
        for (int r = 0; r < rows && is; r++) a.lists[slot * rows + r] = at[expert * rows + r];
        __syncthreads();
    }
    if (tid() == 0) a.active[0] = before;
}

/* The logits of some rows and this block's expert. sums: of each row, squares and products. */
DEVICE void route_rows(const route_few_args &a, int first, float (*sums)[2 * ROUTE_FEW_ROWS]) {
    const int R = ROUTE_FEW_ROWS, width = a.one.n_embd, row = first + tid();
    const float *router = a.one.router + (size_t)block_x() * width;
    float sum[2 * R] = {};
    _Pragma("unroll 2") for (int k = 4 * tid(); k < width; k += 1024) {
        const float4 w = *(const float4 *)(const void *)(router + k),
                     g = *(const float4 *)(const void *)(a.one.gain + k);
        UNROLL for (int r = 0; r < R; r++) {
            const float *x = a.one.x + (size_t)least(first + r, a.rows - 1) * a.ldx + k;
            const float4 v = *(const float4 *)(const void *)x;
            sum[r] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            sum[R + r] += w.x * (v.x * g.x) + w.y * (v.y * g.y) + w.z * (v.z * g.z) + w.w * (v.w * g.w);
        }
    }
    __syncthreads();
    UNROLL for (int i = 0; i < 2 * R; i++) {
        sum[i] = warp_sum(sum[i]);
        if (lane_id() == 0) sums[warp_id()][i] = sum[i];
    }
    __syncthreads();
    if (tid() >= R || row >= a.rows) return;
    float square = 0, dot = 0;
    for (int w = 0; w < 8; w++) {
        square += sums[w][tid()];
        dot += sums[w][R + tid()];
    }
    a.one.logits[(size_t)row * a.one.n_expert + block_x()] =
        dot * rms_scale(square, (float)width, a.one.eps);
}

/* A row as hopper_norm leaves it, by a block. */
DEVICE void route_round(const route_few_args &a, int row, float *shared) {
    const int width = a.one.n_embd;
    const float *x = a.one.x + (size_t)row * a.ldx;
    row_sums s = {0, 0, 0};
    for (int k = tid(); k < width; k += 256) {
        const float y = x[k] * a.one.gain[k];
        s.x += x[k] * x[k];
        s.gained += y * y;
        s.top = fmaxf(s.top, fabsf(y));
    }
    s.x = block_sum(s.x, shared);
    s.gained = block_sum(s.gained, shared);
    s.top = block_max(s.top, shared);
    const row_scale h = scale_row(s, width, a.one.eps, a.bounds);
    for (int k = 4 * tid(); k < width; k += 1024) {
        float v[4];
        UNROLL for (int i = 0; i < 4; i++) v[i] = x[k + i] * a.one.gain[k + i];
        store_row(a.act + (size_t)row * width + k, v, h);
    }
    if (tid() > 0) return;
    a.act_scale[row] = 1.0f / h.up;
    a.ff_scale[row] = h.ff;
}

/* route_few: route_one for some rows: the logits, a block an expert; the choice, by the block that is the
   last to have them; the rows as F16. at [n_expert, rows]: shared memory. Equals qwen3i_rmsnorm,
   qwen3i_matmul, qwen3i_route_rows. */
static __global__ void __launch_bounds__(256) route_few_kernel(route_few_args a) {
    QWEN3_DYNAMIC_SHARED(at);
    __shared__ float sums[8][2 * ROUTE_FEW_ROWS], shared[32];
    __shared__ bool last;
    for (int k = 32 * tid(); k < a.one.n_embd; k += 8192)
        prefetch(a.one.router + (size_t)block_x() * a.one.n_embd + k);
    wait_for_previous();
    let_next_start();
    for (int first = 0; first < a.rows; first += ROUTE_FEW_ROWS) route_rows(a, first, sums);
    __threadfence();
    __syncthreads();
    if (tid() == 0) {
        last = atomicAdd(a.one.ticket, 1u) == gridDim.x - 1;
        if (last) *a.one.ticket = 0;
    }
    __syncthreads();
    if (last) {
        __threadfence();
        for (int r = warp_id(); r < a.rows; r += 8)
            pick_row(a.one.picked + r * a.one.used, a.one.share + r * a.one.used,
                     a.one.logits + (size_t)r * a.one.n_expert, a.one.n_expert, a.one.used, a.one.norm);
        __syncthreads();
        list_active(a, (short *)(void *)at);
    }
    for (int row = block_x(); row < a.rows; row += (int)gridDim.x) route_round(a, row, shared);
}

struct few_experts {
    const half_t *w;                    /* [n_expert, each, ldw] */
    float         scale;                /* W = w * scale */
    int           each, ldw;            /* rows of an expert; their length */
    int           rows, used;           /* of x; picks of each */
    const int    *active, *lists;       /* see route_few_args */
    const half_t *x;                    /* of up [rows, ldw], of down, the result of up, [entries, ldw] */
    const float  *x_scale, *ff_scale, *share;
    half_t       *m; int ldm;           /* the result of up: times share and 1 / ff_scale */
    float        *y; int ldy;           /* that of down is added to it */
};

/* sum += 16 rows of W by 32 STEPS elements times 8 NT columns, some of which are: has. x(c, s): this lane's
   elements of step s of columns 8 c on. */
template <int NT, int STEPS, class X>
DEVICE void expert_multiply(float (&sum)[NT][4], const uint4 (&w)[2 * STEPS], int steps, unsigned has, X x) {
    UNROLL for (int c = 0; c < NT; c++) {
        float part[4] = {0, 0, 0, 0};
        if (!(has >> c & 1)) continue;
        UNROLL for (int s = 0; s < STEPS; s++) {
            if (s >= steps) continue;
            const uint4 &g = w[2 * s], &h = w[2 * s + 1], b = x(c, s);
            const unsigned first[4] = {g.x, h.x, g.y, h.y}, second[4] = {g.z, h.z, g.w, h.w};
            multiply(part, first, b.x, b.y, half_t());
            multiply(part, second, b.z, b.w, half_t());
        }
        UNROLL for (int i = 0; i < 4; i++) sum[c][i] += part[i];
    }
}
/* Of `k` elements from `at` on, steps of 32 that are there. */
DEVICE int steps_left(int at, int k) { return at < k ? ceil_div(k - at, 32) : 0; }

/* The sums of all warps, in order, of what this lane holds of columns 8 c on. */
template <int NT, int WARPS> DEVICE float4 add_warps(const float4 *sums, int c) {
    float4 v = make_float4(0, 0, 0, 0);
    UNROLL for (int w = 0; w < WARPS; w++) {
        const float4 u = sums[(w * NT + c) * 32 + lane_id()];
        v.x += u.x; v.y += u.y; v.z += u.z; v.w += u.w;
    }
    return v;
}

/* What becomes of the sums of a row and an expert: scale times them; share times the result. entry -1: the
   row has not picked it. */
struct picked_row { int entry; float scale, share; };

/* Experts that a block may see, of so many that are active. */
static int up_experts(int active, int n_sm) { return active / n_sm + 2; }
static size_t up_shared(int columns, int ldw, int experts) {
    return (size_t)columns * (2 * (size_t)ldw + 64) + (size_t)2 * UP_WARPS * columns * 64 +
           (size_t)experts * columns * sizeof(picked_row);
}

/* experts_up: m[entry, i] = share * silu(gate_i) * up_i. Blocks share the experts' tiles, 8 rows of gate and
   of up each, evenly; the warps of a block share k. Order: 128 elements by the tensor core, those 2,048
   further, the warps. Equals qwen3i_swiglu but for the rounding of x and m. */
template <int NT>
static __global__ void __launch_bounds__(32 * UP_WARPS, 1) experts_up_kernel(few_experts a) {
    QWEN3_DYNAMIC_SHARED(memory);
    const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4, pitch = 2 * a.ldw + 64,
              tiles = a.each / 16, chunks = ceil_div(a.ldw, 32 * UP_STEPS * UP_WARPS);
    const size_t half = (size_t)(a.each / 2) * a.ldw;
    float4 *sums = (float4 *)(void *)(memory + 8 * NT * pitch);
    picked_row *picks = (picked_row *)(void *)(sums + 2 * UP_WARPS * NT * 32);
    wait_for_previous();
    let_next_start();           /* which then knows that the experts are chosen */
    const long long all = (long long)a.active[0] * tiles;
    const int begin = (int)(all * block_x() / (int)gridDim.x),
              turns = ((int)(all * (block_x() + 1) / (int)gridDim.x) - begin) * chunks;
    const auto column = [&](int turn) { return (turn % chunks * UP_WARPS + warp) * 32 * UP_STEPS; };
    const auto load = [&](uint4 (&w)[2 * UP_STEPS], int turn) {
        const int tile = begin + turn / chunks, k = column(turn) + 8 * t;
        if (turn >= turns) return;
        const half_t *from = a.w + ((size_t)a.active[1 + tile / tiles] * a.each + tile % tiles * 8 + g) *
                                   a.ldw + k;
        UNROLL for (int s = 0; s < UP_STEPS; s++)
            if (k + 32 * s < a.ldw) {
                w[2 * s] = load_stream(from + 32 * s);
                w[2 * s + 1] = load_stream(from + half + 32 * s);
            }
    };
    /* a tile's sums, and by some of the warps what becomes of them */
    const auto finish = [&](float (&sum)[NT][4], int at) {
        float4 *mine = sums + at % 2 * (UP_WARPS * NT * 32);
        const int index = (begin + at) / tiles, i = (begin + at) % tiles * 8 + g,
                  c = (warp + UP_WARPS - at * NT % UP_WARPS) % UP_WARPS;
        UNROLL for (int k = 0; k < NT; k++) {
            mine[(warp * NT + k) * 32 + lane] = make_float4(sum[k][0], sum[k][1], sum[k][2], sum[k][3]);
            UNROLL for (int j = 0; j < 4; j++) sum[k][j] = 0;
        }
        __syncthreads();
        if (c >= NT) return;
        const float4 v = add_warps<NT, UP_WARPS>(mine, c);
        UNROLL for (int j = 0; j < 2; j++) {
            const picked_row &r = picks[(index - begin / tiles) * 8 * NT + 8 * c + 2 * t + j];
            if (r.entry < 0) continue;
            const float m = silu((j ? v.y : v.x) * r.scale) * ((j ? v.w : v.z) * r.scale);
            a.m[(size_t)r.entry * a.ldm + i] = __float2half_rn(m * r.share);
        }
    };
    uint4 w[2][2 * UP_STEPS];
    load(w[0], 0);
    load(w[1], 1);
    for (int i = tid(); i < 8 * NT * (a.ldw / 8); i += 32 * UP_WARPS) {
        const int row = i / (a.ldw / 8), k = i % (a.ldw / 8) * 8;
        copy_async(memory + row * pitch + 2 * k, a.x + (row < a.rows ? (size_t)row * a.ldw + k : 0),
                   row < a.rows);
    }
    copy_commit();
    const int first = begin / tiles, n = turns > 0 ? (begin + turns / chunks - 1) / tiles - first + 1 : 0;
    for (int i = tid(); i < n * 8 * NT; i += 32 * UP_WARPS) {
        const int row = i % (8 * NT),
                  entry = row < a.rows ? a.lists[(first + i / (8 * NT)) * a.rows + row] : -1;
        const picked_row none = {-1, 0, 0};
        picks[i] = none;
        if (entry < 0) continue;
        const picked_row is = {entry, a.scale * a.x_scale[row], a.share[entry] / a.ff_scale[row]};
        picks[i] = is;
    }
    copy_wait<0>();
    __syncthreads();
    float sum[NT][4] = {};
    const unsigned char *x = memory + g * pitch + 16 * t;
    NO_UNROLL for (int turn = 0; turn < turns; turn += 2)
        UNROLL for (int j = 0; j < 2; j++) {
            if (turn + j >= turns) break;
            const int k = column(turn + j);
            expert_multiply<NT, UP_STEPS>(sum, w[j], steps_left(k, a.ldw), ALL, [&](int c, int s) {
                return *(const uint4 *)(const void *)(x + 8 * c * pitch + 2 * (k + 32 * s));
            });
            load(w[j], turn + j + 2);
            if ((turn + j) % chunks == chunks - 1) finish(sum, (turn + j) / chunks);
        }
}

static size_t down_shared(int columns, int n_active) {
    return (size_t)DOWN_WARPS * columns * 64 + (size_t)n_active * columns * sizeof(int);
}

/* experts_down: y[row, :] += the sum of Wdown m over the row's entries. A block has 16 rows of every expert's
   W; its warps share k. The weights are on their way before m is there. Order: 64 elements by the tensor
   core, those 768 further, the experts, the warps. Equals qwen3i_experts_mlp after its qwen3i_swiglu. */
template <int NT>
static __global__ void __launch_bounds__(32 * DOWN_WARPS, 1) experts_down_kernel(few_experts a) {
    QWEN3_DYNAMIC_SHARED(memory);
    const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4, n = a.active[0],
              chunks = ceil_div(a.ldw, 32 * DOWN_STEPS * DOWN_WARPS), turns = n * chunks;
    float4 *sums = (float4 *)(void *)memory;
    int *entries = (int *)(void *)(sums + DOWN_WARPS * NT * 32);
    const auto column = [&](int turn) { return (turn % chunks * DOWN_WARPS + warp) * 32 * DOWN_STEPS; };
    const auto load = [&](uint4 (&w)[2 * DOWN_STEPS], int tile, int turn) {
        const int k = column(turn) + 8 * t;
        if (turn >= turns) return;
        const half_t *from =
            a.w + ((size_t)a.active[1 + turn / chunks] * a.each + tile * 16 + g) * a.ldw + k;
        UNROLL for (int s = 0; s < DOWN_STEPS; s++)
            if (k + 32 * s < a.ldw) {
                w[2 * s] = load_before(from + 32 * s);
                w[2 * s + 1] = load_before(from + (size_t)8 * a.ldw + 32 * s);
            }
    };
    /* zeros of rows that have not picked the expert */
    const auto load_x = [&](uint4 (&x)[NT][DOWN_STEPS], int turn) {
        const int k = column(turn) + 8 * t;
        unsigned has = 0;
        if (turn >= turns) return has;
        UNROLL for (int c = 0; c < NT; c++) {
            const int entry = entries[turn / chunks * (8 * NT) + 8 * c + g];
            const half_t *from = a.x + (size_t)(entry < 0 ? 0 : entry) * a.ldw + k;
            has |= (unsigned)(__ballot_sync(ALL, entry >= 0) != 0) << c;
            UNROLL for (int s = 0; s < DOWN_STEPS; s++)
                x[c][s] = entry >= 0 && k + 32 * s < a.ldw ? *(const uint4 *)(const void *)(from + 32 * s) :
                                                             make_uint4(0, 0, 0, 0);
        }
        return has;
    };
    bool stage = true;
    for (int tile = block_x(); tile < a.each / 16; tile += (int)gridDim.x) {
        uint4 w[DOWN_AHEAD][2 * DOWN_STEPS], x[2][NT][DOWN_STEPS];
        float sum[NT][4] = {};
        unsigned has[2];
        UNROLL for (int j = 0; j < DOWN_AHEAD; j++) load(w[j], tile, j);
        if (stage) {
            for (int i = tid(); i < n * 8 * NT; i += 32 * DOWN_WARPS)
                entries[i] = i % (8 * NT) < a.rows ? a.lists[i / (8 * NT) * a.rows + i % (8 * NT)] : -1;
            wait_for_previous();
            let_next_start();
            stage = false;
        }
        __syncthreads();
        UNROLL for (int j = 0; j < 2; j++) has[j] = load_x(x[j], j);
        NO_UNROLL for (int turn = 0; turn < turns; turn += DOWN_AHEAD)
            UNROLL for (int j = 0; j < DOWN_AHEAD; j++) {
                if (turn + j >= turns) break;
                expert_multiply<NT, DOWN_STEPS>(sum, w[j], steps_left(column(turn + j), a.ldw), has[j % 2],
                                                [&](int c, int s) { return x[j % 2][c][s]; });
                load(w[j], tile, turn + j + DOWN_AHEAD);
                has[j % 2] = load_x(x[j % 2], turn + j + 2);
            }
        UNROLL for (int c = 0; c < NT; c++)
            sums[(warp * NT + c) * 32 + lane] = make_float4(sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
        __syncthreads();
        for (int c = warp; c < NT; c += DOWN_WARPS) {
            const float4 v = add_warps<NT, DOWN_WARPS>(sums, c);
            UNROLL for (int j = 0; j < 2; j++) {
                const int row = 8 * c + 2 * t + j;
                if (row >= a.rows) continue;
                float *y = a.y + (size_t)row * a.ldy + tile * 16 + g;
                const float scale = a.scale * a.ff_scale[row];
                y[0] += (j ? v.y : v.x) * scale;
                y[8] += (j ? v.w : v.z) * scale;
            }
        }
        __syncthreads();
    }
    if (stage) wait_for_previous();
}

/* ---- launching them ---- */
static expert_args expert_arguments(const pass *p, const matrix &w, int rows, const float *x, int ldx,
                                    int per, float *y, int ldy) {
    const cuda_ctx *c = p->c;
    expert_args a;
    a.w = w.data; a.scale = w.scale; a.rows = rows; a.k = w.cols; a.ldw = w.ld;
    a.x = x; a.ldx = ldx; a.per = per; a.y = y; a.ldy = ldy;
    a.lists = goes_alone(c, p->n) ? NULL : c->experts.lists;
    a.counts = c->experts.counts; a.picked = c->experts.picked; a.list_rows = c->max_rows;
    return a;
}

template <class W, int R, bool GLU>
static cudaError_t launch_experts_of(const pass *p, const expert_args &a) {
    const qwen3i_config *g = &p->c->m->config;
    return launch_early(p->early, p->s,
                        grid2(ceil_div(ceil_div(a.rows, 2), 8),
                              goes_alone(p->c, p->n) ? g->n_expert_used : g->n_expert),
                        256, 0, experts_kernel<W, R, GLU>, a);
}
template <class W, bool GLU> static cudaError_t launch_experts(const pass *p, const expert_args &a) {
    return goes_alone(p->c, p->n) ? launch_experts_of<W, 1, GLU>(p, a) :
           p->n <= 16             ? launch_experts_of<W, 2, GLU>(p, a) :
                                    launch_experts_of<W, 8, GLU>(p, a);
}

/* As many blocks as are at work at once, if each expert that may be picked gets as many. */
template <int R, bool GLU>
static qwen3_result launch_block_experts(const pass *p, const block_in &in, const expert_args &a) {
    const qwen3i_config *g = &p->c->m->config;
    const int n = g->n_expert, used = g->n_expert_used, warps = block_warps<R>(p, in),
              room = block_shape<R>::BLOCKS * p->c->m->n_sm,
              blocks = least(ceil_div(room, least(n, p->n * used)),
                             ceil_div(GLU ? a.rows / 2 : a.rows, most(warps, 1)));
    if (warps == 0)
        return qwen3i_fail(p->err, QWEN3_ERR_UNSUPPORTED,
                           "CUDA: experts' rows of %d elements in blocks are too long for %s", in.k,
                           p->c->m->name);
    return launched(p,
                    launch_shared(p->early, 1, p->s, grid2(blocks, a.lists ? n : used), 32 * warps,
                                  block_memory(in, R, warps), block_experts_kernel<R, GLU>, in, a),
                    "block_experts");
}

/* Several rows, unless their inputs do not fit */
template <bool GLU>
static qwen3_result block_experts(const pass *p, const matrix &w, const expert_args &a) {
    const input h = {a.x, a.ldx, NULL, NULL};
    const block_in in = block_input(p, w, h, 0, 1);
    return a.lists && block_warps<BLOCK_ROWS>(p, in) > 0 ? launch_block_experts<BLOCK_ROWS, GLU>(p, in, a) :
                                                           launch_block_experts<1, GLU>(p, in, a);
}

/* Do up_one and down_one serve? */
static size_t one_shared(const layer_weights &l, int used) {
    return most((size_t)used * (size_t)round_up(l.w_down.ld, 256), (size_t)ONE_EXPERTS) * sizeof(float);
}
static bool one_serves(const pass *p, const layer_weights &l) {
    const qwen3i_config *g = &p->c->m->config;
    return goes_alone(p->c, p->n) && l.gate_up.type == QWEN3I_F16 && l.w_down.type == QWEN3I_F16 &&
           l.gate_up.n_parts == 0 && l.w_down.n_parts == 0 && g->n_expert <= ONE_EXPERTS &&
           g->n_expert_used <= ONE_USED && (size_t)round_up(l.gate_up.ld, 256) * sizeof(float) <= 44 << 10 &&
           one_shared(l, g->n_expert_used) <= p->c->m->block_shared - 2048;
}

static route_args route_arguments(const pass *p, const layer_weights &l) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    const route_args a = {c->h, e.logits, c->x, l.mlp_norm, l.router, e.picked, e.share, c->qkv_tickets,
                          g->n_expert, g->n_embd, g->n_expert_used, g->norm_topk, g->rms_eps,
                          !one_serves(p, l)};
    return a;
}

/* h = RMSNorm(x), and which experts it picks, of one row */
static qwen3_result route_one(const pass *p, const layer_weights &l) {
    return launched(p,
                    launch_early(p->early, p->s, grid1(p->c->m->config.n_expert), 256, 0, route_one_kernel,
                                 route_arguments(p, l)),
                    "route_one");
}

/* h = RMSNorm(x), which experts each row picks, and who has picked each */
static qwen3_result route(const pass *p, const layer_weights &l) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    if (goes_alone(c, p->n)) return route_one(p, l);
    input normed;
    TRY(vector_norm(p, l.mlp_norm, l.gate_up, &normed));
    const bool many = p->n > GROUP_LEAST && g->n_embd % 4 == 0;
    const dim3 grid = many ? grid2(ceil_div(g->n_expert, 8 * ROUTE_EXPERTS), ceil_div(p->n, ROUTE_MANY)) :
                             grid2(ceil_div(g->n_expert, 8), ceil_div(p->n, ROUTE_ROWS));
    TRY(launched(p,
                 launch_early(p->early, p->s, grid, 256, 0, many ? route_many_kernel : route_kernel, e.logits,
                              (const float *)l.router, normed.x, normed.ldx, p->n, g->n_expert, g->n_embd),
                 "route"));
    TRY(launched(p,
                 launch_early(p->early, p->s, grid1(ceil_div(p->n, 8)), 256, 0, pick_experts_kernel, e.picked,
                              e.share, e.logits, p->n, g->n_expert, g->n_expert_used, g->norm_topk),
                 "pick_experts"));
    return launched(p, launch_early(p->early, p->s, grid1(g->n_expert), 256, 0, group_entries_kernel, e.lists,
                                    e.counts, (const int *)e.picked, p->n * g->n_expert_used, c->max_rows),
                    "group_entries");
}

/* y = W x of all entries by tiles, x rounded to F16 */
static qwen3_result group_product(const pass *p, const matrix &w, int rows, int per, const half_t *x,
                                  const float *x_scale, float *y, int ldy) {
    expert_args a = expert_arguments(p, w, rows, NULL, w.ld, per, y, ldy);
    if (w.n_parts > 0) {
        a.w = p->c->scratch;
        TRY(decode_experts(p->c->scratch, p->s, w, p->err));
    }
    const dim3 grid((unsigned)ceil_div(rows, GROUP_N), (unsigned)p->c->m->config.n_expert,
                    (unsigned)least(ceil_div(p->n, GROUP_M), 4));
    return launched(p, launch_shared(false, 1, p->s, grid, 256, group_shared(p->c->m->capability),
                                     group_product_kernel, a, x, x_scale),
                    "group_product");
}

static qwen3_result group_mlp(const pass *p, const layer_weights &l) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    const int entries = p->n * g->n_expert_used, ff = g->n_ff_expert, ldm = l.w_down.ld, ldy = e.ldy;
    const int threads = least(1024, round_up(ceil_div(ff, 16), 32));
    RUN(grid1(p->n), row_threads(l.gate_up.ld, 4, p->n), 0, round_rows_kernel<half_t>, e.act, e.act_scale,
        (const float *)c->h, c->embd_ld, g->n_embd, l.gate_up.ld, (size_t)0);
    TRY(group_product(p, l.gate_up, 2 * ff, g->n_expert_used, e.act, e.act_scale, e.y, ldy));
    RUN(grid1(entries), threads, 0, swiglu_kernel<half_t>, e.m16, e.m_scale, (const float *)e.y,
        (const float *)NULL, ff, ldy, ldm, (size_t)0);
    return group_product(p, l.w_down, g->n_embd, 1, e.m16, e.m_scale, e.y, ldy);
}

/* Rows as F16, in order of expert */
static qwen3_result gather_entries(const pass *p, const layer_weights &l, int tiles) {
    const cuda_ctx *c = p->c;
    const expert_buffers &e = c->experts;
    const gather_args a = {e.lists, e.counts, c->max_rows, c->m->config.n_expert, c->m->config.n_expert_used,
                           c->m->config.n_embd, c->hopper_act, c->act_scale, c->ff_scale, e.tiles, e.entry,
                           e.act, e.act_scale, e.m_scale};
    TRY(launched(p, launch_hopper_norm(p, norm_arguments(p, l.mlp_norm, l.gate_up)), "hopper_norm"));
    return launched(p, launch_early(p->early, p->s, grid2(tiles, GATHER_PARTS), 256, 0, gather_entries_kernel,
                                    a), "gather_entries");
}

template <class END>
static qwen3_result group_hopper(const pass *p, const matrix &w, const stored_map &in, const stored_map &map,
                                 const group_args &a) {
    const int turns = a.h.rows / HOPPER_M * a.h.n_tiles;
    if (w.n_parts > 0) TRY(decode_experts(p->c->scratch, p->s, w, p->err));
    return launched(p,
                    launch_clusters(p->early && w.n_parts == 0, 1, p->s, grid1(least(turns, p->c->m->n_sm)),
                                    LARGE_THREADS, large_product_shared<HOPPER_N, 2>(),
                                    group_hopper_kernel<END>, get_map(in),
                                    get_map(w.n_parts > 0 ? map : w.map), a),
                    "group_hopper");
}

/* y = Wdown(silu(Wgate h) * (Wup h)) of all entries */
static qwen3_result hopper_experts(const pass *p, const layer_weights &l) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    const int tiles = group_tiles(c, p->n), ff = g->n_ff_expert;
    group_args up = {hopper_arguments(p, l.gate_up, e.act_scale), e.tiles, 2 * ff, e.entry, NULL, 0},
               down = up;
    TRY(gather_entries(p, l, tiles));
    up.h.rows = down.h.rows = tiles * HOPPER_M;
    up.h.n_tiles = ff / HOPPER_N;
    up.h.step = HOPPER_N / 2;
    up.h.half = ff;
    up.h.out = e.m16;
    up.h.ldo = ff;
    up.h.out_scale = e.m_scale;
    down.h.k = ff;
    down.h.n_tiles = g->n_embd / (2 * HOPPER_N);
    down.h.w_scale = l.w_down.scale;
    down.h.in_scale = e.m_scale;
    down.each = g->n_embd;
    down.y = e.y;
    down.ldy = e.ldy;
    TRY(group_hopper<to_mlp>(p, l.gate_up, e.act_map, e.up_map, up));
    return group_hopper<to_entries>(p, l.w_down, e.m_map, e.down_map, down);
}

/* Fewer rows have few entries of an expert, and weights in blocks are faster as they are. */
static bool goes_to_hopper(const pass *p, const layer_weights &l) {
    const bool blocks = l.gate_up.n_parts > 0 || l.w_down.n_parts > 0;
    return p->c->experts.n_tiles > 0 && p->n > (blocks ? GROUP_LEAST_BLOCKS : most_single(p->c)) &&
           l.gate_up.type == QWEN3I_F16 && l.w_down.type == QWEN3I_F16;
}

/* Few rows: do the kernels for them serve? */
static size_t route_few_shared(const cuda_ctx *c, int rows) {
    return (size_t)c->m->config.n_expert * (size_t)rows * sizeof(short);
}
static int expert_columns(int rows) { return rows <= 8 ? 8 : EXPERT_COLUMNS; }
static bool experts_few(const pass *p, const layer_weights &l) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const int columns = expert_columns(p->n), active = least(g->n_expert, p->n * g->n_expert_used);
    const size_t room = c->m->block_shared - 2048;
    return c->hopper && !goes_alone(c, p->n) && p->n <= EXPERT_COLUMNS && l.gate_up.type == QWEN3I_F16 &&
           l.w_down.type == QWEN3I_F16 && l.gate_up.n_parts == 0 && l.w_down.n_parts == 0 &&
           g->n_embd % 32 == 0 && g->n_ff_expert % 32 == 0 && p->n * g->n_expert_used <= 32767 &&
           route_few_shared(c, p->n) <= room &&
           up_shared(columns, l.gate_up.ld, up_experts(active, c->m->n_sm)) <= room &&
           down_shared(columns, active) <= room;
}

/* One row of 16-bit weights */
static qwen3_result one_row_of_experts(const pass *p, const layer_weights &l) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    const int used = g->n_expert_used, ff = g->n_ff_expert;
    const one_args up = {e.logits, c->h, g->n_expert, used, g->norm_topk, (const half_t *)l.gate_up.data,
                         l.gate_up.scale, 2 * ff, l.gate_up.ld, e.m, l.w_down.ld, ff, NULL},
                   down = {e.logits, NULL, g->n_expert, used, g->norm_topk, (const half_t *)l.w_down.data,
                           l.w_down.scale, g->n_embd, l.w_down.ld, e.m, l.w_down.ld, ff, c->sum};
    TRY(route_one(p, l));
    TRY(launched(p, launch_shared(p->early, 1, p->s, grid1(c->m->n_sm), 32 * ONE_WARPS,
                                  ((size_t)round_up(up.ldw, 256) + (g->n_expert > 128 ? ONE_EXPERTS : 0)) *
                                  sizeof(float), up_one_kernel, up), "up_one"));
    return launched(p, launch_shared(p->early, 1, p->s, grid1(ceil_div(g->n_embd, DOWN_PARTS * DOWN_ROWS)),
                                     32 * ONE_WARPS, one_shared(l, used), down_one_kernel, down), "down_one");
}

static qwen3_result route_few(const pass *p, const layer_weights &l) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    const route_few_args a = {route_arguments(p, l), p->n, c->embd_ld, l.gate_up.bounds, c->hopper_act,
                              c->act_scale, c->ff_scale, e.active, e.lists};
    return launched(p, launch_shared(p->early, 1, p->s, grid1(g->n_expert), 256, route_few_shared(c, p->n),
                                     route_few_kernel, a), "route_few");
}

template <int NT> static qwen3_result experts_by_columns(const pass *p, const layer_weights &l) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    const int active = least(g->n_expert, p->n * g->n_expert_used);
    const few_experts up = {(const half_t *)l.gate_up.data, l.gate_up.scale, 2 * g->n_ff_expert,
                            l.gate_up.ld, p->n, g->n_expert_used, e.active, e.lists, c->hopper_act,
                            c->act_scale, c->ff_scale, e.share, e.m16, l.w_down.ld, NULL, 0},
                      down = {(const half_t *)l.w_down.data, l.w_down.scale, g->n_embd, l.w_down.ld, p->n,
                              g->n_expert_used, e.active, e.lists, e.m16, NULL, c->ff_scale, NULL, NULL, 0,
                              c->sum, c->embd_ld};
    TRY(launched(p, launch_shared(p->early, 1, p->s, grid1(c->m->n_sm), 32 * UP_WARPS,
                                  up_shared(8 * NT, up.ldw, up_experts(active, c->m->n_sm)),
                                  experts_up_kernel<NT>, up), "experts_up"));
    return launched(p, launch_shared(p->early, 1, p->s, grid1(least(c->m->n_sm, g->n_embd / 16)),
                                     32 * DOWN_WARPS, down_shared(8 * NT, active), experts_down_kernel<NT>,
                                     down), "experts_down");
}

static qwen3_result few_rows_of_experts(const pass *p, const layer_weights &l) {
    TRY(route_few(p, l));
    return p->n <= 8 ? experts_by_columns<1>(p, l) : experts_by_columns<2>(p, l);
}

/* y = W m of all entries, or, of one row, x = x + their sum */
static qwen3_result experts_down(const pass *p, const layer_weights &l) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const expert_buffers &e = c->experts;
    const expert_args a = expert_arguments(p, l.w_down, g->n_embd, e.m, l.w_down.ld, 1, e.y, e.ldy);
    if (l.w_down.n_parts > 0) return block_experts<false>(p, l.w_down, a);
#define CALL(T) !goes_alone(c, p->n) ? launch_experts<T, false>(p, a) : \
        launch_early(p->early, p->s, grid1(ceil_div(a.rows, 8)), 256, 0, expert_sum_kernel<T>, a, \
                     (const float *)e.share, g->n_expert_used, c->sum)
    return launched(p, BY_WEIGHT_TYPE(l.w_down, CALL), "experts");
#undef CALL
}

/* x = x + the experts' sum of h = RMSNorm(x) */
static qwen3_result experts_mlp(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const layer_weights &l = c->m->layers[layer];
    const expert_buffers &e = c->experts;
    if (one_serves(p, l)) return one_row_of_experts(p, l);
    if (experts_few(p, l)) return few_rows_of_experts(p, l);
    TRY(route(p, l));
    if (goes_to_hopper(p, l)) TRY(hopper_experts(p, l));
    else if (c->experts.n_tiles == 0 && p->n > GROUP_LEAST && l.gate_up.type == QWEN3I_F16 &&
             l.w_down.type == QWEN3I_F16)
        TRY(group_mlp(p, l));
    else {
        const expert_args up = expert_arguments(p, l.gate_up, 2 * g->n_ff_expert, c->h, c->embd_ld,
                                                g->n_expert_used, e.m, l.w_down.ld);
#define CALL(T) launch_experts<T, true>(p, up)
        if (l.gate_up.n_parts > 0) TRY(block_experts<true>(p, l.gate_up, up));
        else TRY(launched(p, BY_WEIGHT_TYPE(l.gate_up, CALL), "experts"));
#undef CALL
        TRY(experts_down(p, l));
        if (goes_alone(c, p->n) && l.w_down.n_parts == 0) return QWEN3_OK;
    }
    return launched(p, launch_early(p->early, p->s, grid1(p->n), row_threads(g->n_embd, 1, p->n), 0,
                                    mix_experts_kernel, c->sum, (const float *)e.y, (const float *)e.share,
                                    g->n_expert_used, g->n_embd, c->embd_ld, e.ldy), "mix_experts");
}

/* ================================================================================================
   LOGITS
   ================================================================================================ */
/* keep_logits: kept[out_slot, :] = logits[row, :] * scale[row] (NULL: 1); slot -1: not kept. Grid (blocks,
   rows). */
static __global__ void keep_logits_kernel(float *kept, const float *logits, const float *scale,
                                          const row_info *outs, int n) {
    const int slot = outs[blockIdx.y].out_slot;
    const float s = scale ? scale[blockIdx.y] : 1.0f;
    if (slot < 0) return;
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
        kept[(size_t)slot * n + i] = logits[(size_t)blockIdx.y * n + i] * s;
}

/* logprob: ln P(out_target) under logits [row, :]; 0 for target -1. One block a row. Equals
   qwen3i_log_prob. */
static __global__ void logprob_kernel(float *out, const float *logits, const row_info *outs, int n) {
    __shared__ float shared[32];
    const float *l = logits + (size_t)blockIdx.x * n;
    float top = LOWEST, sum = 0;
    for (int i = tid(); i < n; i += n_threads()) top = fmaxf(top, l[i]);
    top = block_max(top, shared);
    for (int i = tid(); i < n; i += n_threads()) sum += expf(l[i] - top);
    sum = block_sum(sum, shared);
    const int target = outs[blockIdx.x].out_target;
    if (threadIdx.x == 0) out[blockIdx.x] = target >= 0 ? (l[target] - top) - logf(sum) : 0.0f;
}

/* h = RMSNorm(x[out_row]) */
static qwen3_result head_norm(const pass *p, int first, int n) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    if (p->two) return QWEN3_OK;        /* add_parts has done it */
    const float *x = c->x + (p->only_wanted ? (size_t)first * c->embd_ld : 0);
    const row_info *outs = p->only_wanted ? NULL : c->rows + first;
    const cudaError_t e = launch_rmsnorm(p->early, p->s, c->h, c->embd_ld, x, c->embd_ld, outs,
                                         c->m->final_norm, n, 1, g->n_embd, c->embd_ld, g->rms_eps);
    return launched(p, e, "rmsnorm");
}

/* To where they are kept, from c->logits, times scale (NULL: 1); without keep_only they are there, too, of
   all ranks. */
static qwen3_result keep_logits(const pass *p, int first, int n, const float *scale, bool keep_only) {
    cuda_ctx *c = p->c;
#ifdef QWEN3_CUDA_NCCL
    if (keep_only && c->has_peers) return share_logits(p, first, n, scale);
#else
    (void)keep_only;
#endif
    TRY(gather_logits(p, n));
    RUN(grid2(32, n), 256, 0, keep_logits_kernel, c->kept, (const float *)c->logits, scale,
        (const row_info *)c->rows + first, c->m->config.n_vocab);
    return QWEN3_OK;
}

static qwen3_result gemm_head(const pass *p, int first, int n, bool keep_only);
static qwen3_result skinny_head(const pass *p, int first, int n, bool keep_only);

/* Weights in blocks may come with a head of others. */
static qwen3_result vector_head(const pass *p, int first, int n, bool keep_only) {
    cuda_ctx *c = p->c;
    const int vocab = c->m->head.rows;
    if (n > most_single(c) && c->m->head.n_parts == 0)
        return c->hopper ? skinny_head(p, first, n, keep_only) : gemm_head(p, first, n, keep_only);
    if (keep_only && c->m->n_ranks == 1)
        return matvec(p, c->kept, vocab, c->rows + first, c->m->head, c->h, c->embd_ld, n, false);
    TRY(matvec(p, c->logits, vocab, NULL, c->m->head, c->h, c->embd_ld, n, false));
    return keep_logits(p, first, n, NULL, keep_only);
}

static qwen3_result gemm_head(const pass *p, int first, int n, bool keep_only) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->head;
    const int vocab = w.rows;
    const float *scale = act_scale(p, w);
    TRY(round_rows(p, w, c->h, c->embd_ld, n));
    TRY(product(c, p->s, c->logits, vocab, w, 0, w.rows, c->act, n, p->err));
    if (scale && !keep_only) RUN(grid1(n), 1024, 0, scale_rows_kernel, c->logits, scale, vocab, vocab);
    return keep_logits(p, first, n, keep_only ? scale : NULL, keep_only);
}

/* ---- Hopper: how its products end ---- */
#ifdef QWEN3_WGMMA
DEVICE void ask_early(const to_logits &, skinny_row &r, const hopper_args &g, int i, int) {
    r.slot = g.outs ? g.outs[i].out_slot : i;
}
DEVICE void finish_row(const to_logits &, const hopper_args &g, const head_part<1> &p, const skinny_row &r,
                       int, int tile) {
    const int at = tile * HOPPER_M + 2 * lane_id();
    float *y = g.y + (size_t)r.slot * g.ldy + at;
    if (r.slot < 0) return;
    if (at < g.n) store_2(y, p.lo[0].x, p.lo[0].y);
    if (at + 64 < g.n) store_2(y + 64, p.hi[0].x, p.hi[0].y);
}
#endif

static qwen3_result skinny_head(const pass *p, int first, int n, bool keep_only) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->head;
    const bool at_once = keep_only && c->m->n_ranks == 1;
    hopper_args a = hopper_arguments(p, w, c->act_scale);
    a.rows = n;
    a.n = a.ldy = w.rows;
    a.n_tiles = ceil_div(w.rows, HOPPER_N);
    a.y = at_once ? c->kept : c->logits;
    a.outs = at_once ? c->rows + first : NULL;
    TRY(hopper_round(p, w, c->h, c->embd_ld, n));
    if (w.n_parts == 0) TRY(skinny_product<to_logits>(p, c->skinny_h_map, w, a));
    for (int i = 0; w.n_parts > 0 && i < w.rows; i += c->halves[HEAD_KIND].rows, a.y += a.n) {
        ready r;
        a.n = least(c->halves[HEAD_KIND].rows, w.rows - i);
        a.n_tiles = ceil_div(a.n, HOPPER_N);
        TRY(make_ready(p, w, i, a.n, &r));
        TRY(skinny_product<to_logits>(&r.p, c->skinny_h_map, *r.w, a));
    }
    return at_once ? QWEN3_OK : keep_logits(p, first, n, NULL, keep_only);
}

/* ================================================================================================
   CHOICE: the twin of qwen3i_choose: sums of integer weights do not depend on their order,
   so blocks and threads may add them as they come and the choice is the CPU's, bit for bit.
   ================================================================================================ */
struct listed { int token; float bias; };

struct choice {                         /* what one row's choice depends on */
    float temperature, top_p, min_p, repeat, presence;
    int   top_k;
    u64   random;
    int   slot;                         /* of its kept logits */
    int   list_at, n_bias, n_seen;      /* lists[list_at ..]: biases, then tokens to penalise */
    int   chain;                        /* chosen[row], of the step before, is penalised, too */
    int   adjust;                       /* bias, penalties or mask: choose from the copy */
    const unsigned *mask;               /* NULL, or bits in host memory: which tokens may come */
};

const int LIST_KEYS   = 4096;           /* candidates that are sorted in shared memory */
const int LIST_TOP    = 64;             /* up to this top_k the first stage lists the candidates */
const int CHUNKS      = LIST_TOP;       /* blocks that a row's logits are shared by in the first stage, ... */
const int CHUNK_THREADS = 256;
const int CHUNK_EACH  = 16;             /* ... logits that a thread holds at a time ... */
const int CHUNK_KEYS  = 128;            /* ... and candidates that a block can list */
const int WEIGHT_BINS = 16 * QWEN3I_OCTAVES;    /* sixteenths of an octave below the top */
const int CHOOSE_THREADS = 1024;

/* Larger for what ranks before: higher logit, then lower id. 0: may not be chosen. */
DEVICE u64 rank_key(float logit, int id) {
    const unsigned u = __float_as_uint(logit + 0.0f);
    if (!qwen3i_allowed(logit)) return 0;
    return (u64)(u & 0x80000000u ? ~u : u | 0x80000000u) << 32 | (0xFFFFFFFFu - (unsigned)id);
}
DEVICE int key_id(u64 key) { return (int)(0xFFFFFFFFu - (unsigned)(key & 0xFFFFFFFFu)); }
DEVICE float key_logit(u64 key) {
    const unsigned u = (unsigned)(key >> 32);
    return __uint_as_float(u & 0x80000000u ? u & 0x7FFFFFFFu : ~u);
}

/* adjust: bias and penalties on a copy of the row's logits. copy [rows, n] (made before); one block a row; a
   bit for each token in shared memory. Equals qwen3i_adjust without the filter. */
static __global__ void adjust_kernel(float *copy, const choice *choices, const listed *lists,
                                     const int *chosen, int n) {
    QWEN3_DYNAMIC_SHARED(memory);
    unsigned *seen = (unsigned *)(void *)memory;
    const choice c = choices[blockIdx.x];
    const listed *bias = lists + c.list_at, *past = bias + c.n_bias;
    float *l = copy + (size_t)blockIdx.x * n;
    if (!c.adjust) return;
    for (int i = tid(); i < ceil_div(n, 32); i += n_threads()) seen[i] = 0;
    for (int i = tid(); i < c.n_bias; i += n_threads()) {
        const int t = bias[i].token;
        bool first = t >= 0 && t < n;   /* of its entries; it adds them all, in order */
        for (int j = 0; j < i && first; j++) first = bias[j].token != t;
        for (int j = i; j < c.n_bias && first; j++) if (bias[j].token == t) l[t] += bias[j].bias;
    }
    __syncthreads();
    for (int i = tid(); i < c.n_seen + c.chain; i += n_threads()) {
        const int t = i < c.n_seen ? past[i].token : chosen[blockIdx.x];
        if (t < 0 || t >= n || (atomicOr(&seen[t / 32], 1u << (t % 32)) >> (t % 32) & 1u)) continue;
        l[t] = qwen3i_penalised(l[t], c.repeat, c.presence);
    }
}

/* copy_logits: copy[row, :] = kept[slot of row, :] for the rows to adjust, no number where the mask forbids
   a token. A warp reads 32 words of the mask, which is far away, at once. Grid (blocks, rows). */
static __global__ void copy_logits_kernel(float *copy, const float *kept, const choice *choices, int n) {
    const choice *c = &choices[blockIdx.y];
    const int lane = lane_id(), step = (int)(gridDim.x * blockDim.x / 32) * 1024;
    if (!c->adjust) return;
    const float *from = kept + (size_t)c->slot * n;
    float *to = copy + (size_t)blockIdx.y * n;
    for (int first = (warp_id() * (int)gridDim.x + (int)blockIdx.x) * 1024; first < n; first += step) {
        const int at = first / 32 + lane;
        const unsigned words = c->mask && at * 32 < n ? c->mask[at] : ~0u;
        UNROLL for (int j = 0; j < 32; j++) {
            const unsigned word = __shfl_sync(ALL, words, j);
            const int i = first + 32 * j + lane;
            if (i < n) to[i] = word >> lane & 1u ? from[i] : -INFINITY;
        }
    }
}

DEVICE const float *choice_logits(const choice &c, const float *kept, const float *copy, int row, int n) {
    return c.adjust ? copy + (size_t)row * n : kept + (size_t)c.slot * n;
}

struct candidates {                     /* a count above CHUNK_KEYS: too many */
    u64 keys[CHUNKS][CHUNK_KEYS], limits[CHUNKS], tops[CHUNKS];        /* tops: the largest of each block */
    unsigned counts[CHUNKS];
};

/* first stage of the choice: best[row] = the largest key of ids below n_choose; best [rows], zero before.
   With a top_k up to LIST_TOP also each block's candidates: the keys from its limit on, the k-th largest of
   what is the largest of two threads each, so its k largest are among them (limit 0: all). Grid (CHUNKS,
   rows). */
static __global__ void __launch_bounds__(CHUNK_THREADS)
    best_kernel(u64 *best, candidates *listed_keys, const float *kept, const float *copy,
                const choice *choices, int n, int n_choose) {
    __shared__ u64 tops[CHUNK_THREADS / 2], limit;
    __shared__ unsigned count;
    /* it may be far away, but it is there before this starts */
    const choice c = choices[blockIdx.y];
    let_next_start();
    wait_for_previous();
    const float *l = choice_logits(c, kept, copy, block_y(), n);
    const int run = ceil_div(n_choose, CHUNKS), begin = block_x() * run;
    const int end = begin + run < n_choose ? begin + run : n_choose;
    u64 keys[CHUNK_EACH], top = 0;
    for (int base = begin + tid(); base < end || base == begin + tid(); base += CHUNK_EACH * CHUNK_THREADS) {
        UNROLL for (int u = 0; u < CHUNK_EACH; u++) {
            const int i = base + u * CHUNK_THREADS;
            keys[u] = i < end ? rank_key(l[i], i) : 0;
            top = keys[u] > top ? keys[u] : top;
        }
    }
    u64 first = top;
    UNROLL for (int o = 1; o < 32; o <<= 1) {
        const u64 other = __shfl_xor_sync(ALL, first, o);
        first = other > first ? other : first;
        if (o == 1) top = first;        /* of two threads */
    }
    if (tid() % 2 == 0) tops[tid() / 2] = top;
    if (lane_id() == 0 && first) atomicMax(&best[blockIdx.y], first);
    if (!(c.temperature > 0) || c.top_k <= 0 || c.top_k > LIST_TOP) return;

    candidates *to = &listed_keys[blockIdx.y];
    int rank = 0;
    /* not all are in registers */
    if (tid() == 0) count = run > CHUNK_EACH * CHUNK_THREADS ? CHUNK_KEYS + 1 : 0;
    __syncthreads();
    if (tid() < CHUNK_THREADS / 2) {
        top = tops[tid()];
        for (int i = 0; i < CHUNK_THREADS / 2; i++) rank += tops[i] > top || (tops[i] == top && i < tid());
        if (rank == c.top_k - 1) {
            limit = top > 0 ? top : 1;
            to->limits[blockIdx.x] = top;
        }
        if (rank == 0) to->tops[blockIdx.x] = top;
    }
    __syncthreads();
    UNROLL for (int u = 0; u < CHUNK_EACH; u++) {
        if (keys[u] < limit) continue;
        const unsigned at = atomicAdd(&count, 1u);
        if (at < (unsigned)CHUNK_KEYS) to->keys[blockIdx.x][at] = keys[u];
    }
    __syncthreads();
    if (tid() == 0) to->counts[blockIdx.x] = count;
}

struct choose_shared {
    unsigned low[WEIGHT_BINS + 1], high[WEIGHT_BINS + 1];      /* counts or weights: the halves of 64 bits */
    u64 weights[LIST_TOP];              /* of the kept; before, the blocks' largest keys */
    u64 keys[LIST_KEYS];
    u64 sums[CHOOSE_THREADS / 32];
    u64 value, need;                    /* what one thread found for all */
    unsigned n_keys, bin;
};

struct row_logits { const float *l; int n; float top, temperature; };

/* f(id, logit) for all ids, each by some thread; eight loads at a time. */
template <class F> DEVICE void each_logit(const row_logits &r, F f) {
    for (int base = tid(); base < r.n; base += 8 * n_threads()) {
        float v[8];
        UNROLL for (int u = 0; u < 8; u++)
            v[u] = base + u * n_threads() < r.n ? r.l[base + u * n_threads()] : 0.0f;
        UNROLL for (int u = 0; u < 8; u++) if (base + u * n_threads() < r.n) f(base + u * n_threads(), v[u]);
    }
}

DEVICE int weight_bin(float octaves) {
    return octaves < (float)QWEN3I_OCTAVES ? (int)(octaves * 16.0f) : WEIGHT_BINS;
}

/* Sorts keys[0 .. n) from large to small; n <= LIST_KEYS. By the block. */
static __device__ void sort_keys(u64 *keys, int n) {
    int size = 1;
    while (size < n) size *= 2;
    for (int i = n + tid(); i < size; i += n_threads()) keys[i] = 0;
    for (int k = 2; k <= size; k *= 2)
        for (int j = k / 2; j > 0; j /= 2) {
            __syncthreads();
            for (int i = tid(); i < size; i += n_threads()) {
                const int other = i ^ j;
                if (other <= i) continue;
                const u64 a = keys[i], b = keys[other];
                if ((a < b) == ((i & k) == 0)) { keys[i] = b; keys[other] = a; }
            }
        }
    __syncthreads();
}

/* The same for few keys that differ, at most one for each thread: each finds its place by counting, with two
   barriers instead of one for each exchange. */
static __device__ void rank_keys(u64 *keys, int n) {
    const u64 mine = tid() < n ? keys[tid()] : 0;
    int rank = 0;
    if (tid() < n)
#pragma unroll 8
        for (int i = 0; i < n; i++) rank += keys[i] > mine;
    __syncthreads();
    if (tid() < n) keys[rank] = mine;
    __syncthreads();
}

/* Sum over the block, in every thread. */
static __device__ u64 block_sum_u64(choose_shared &s, u64 v) {
    u64 sum = 0;
    UNROLL for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; i++) sum += s.sums[i];
    return sum;
}

/* Histogram over bins of weight_bin: counts, or weights, of the keys from `least` on. */
static __device__ void fill_bins(choose_shared &s, const row_logits &r, u64 least, bool weights) {
    for (int i = tid(); i <= WEIGHT_BINS; i += n_threads()) s.low[i] = s.high[i] = 0;
    __syncthreads();
    each_logit(r, [&](int id, float logit) {
        const u64 key = rank_key(logit, id);
        if (key == 0 || key < least) return;
        const float octaves = qwen3i_octaves_below(logit, r.top, r.temperature);
        const int bin = weight_bin(octaves);
        const u64 w = weights ? qwen3i_weight(octaves) : 1ull;
        const unsigned low = (unsigned)(w & 0xFFFFFFFFu), old = atomicAdd(&s.low[bin], low);
        /* and what is carried */
        const unsigned high = (unsigned)(w >> 32) + (old > 0xFFFFFFFFu - low);
        if (high) atomicAdd(&s.high[bin], high);
    });
    __syncthreads();
}
DEVICE u64 bin_value(const choose_shared &s, int b) {
    return (u64)s.high[b] << 32 | s.low[b];
}

/* The first bin up to which the bins add up to need (0: that share of their total, but at least 1), or
   WEIGHT_BINS if they never do. s.value: the sum before it; s.need: need. By the first warp. */
static __device__ int find_bin(choose_shared &s, u64 need, float share) {
    const int run = ceil_div(WEIGHT_BINS, 32), begin = tid() * run;
    const int end = begin + run < WEIGHT_BINS ? begin + run : WEIGHT_BINS;
    if (threadIdx.x < 32) {
        u64 sum = 0, upto;
        for (int b = begin; b < end; b++) sum += bin_value(s, b);
        upto = sum;
        UNROLL for (int o = 1; o < 32; o *= 2) {
            const u64 v = __shfl_up_sync(ALL, upto, (unsigned)o);
            if (tid() >= o) upto += v;
        }
        const u64 total = __shfl_sync(ALL, upto, 31);
        if (need == 0) need = qwen3i_share_of(total, share);
        if (need == 0) need = 1;
        if (threadIdx.x == 0) { s.need = need; s.bin = (unsigned)WEIGHT_BINS; }
        __syncwarp();
        upto -= sum;
        for (int b = begin; b < end && upto < need; b++) {
            if (upto + bin_value(s, b) >= need) { s.bin = (unsigned)b; s.value = upto; break; }
            upto += bin_value(s, b);
        }
    }
    __syncthreads();
    return (int)s.bin;
}

/* Gathers the keys of bins from .. to into s.keys; s.n_keys is how many there are, of which LIST_KEYS fit. */
static __device__ void gather_keys(choose_shared &s, const row_logits &r, u64 least, int from, int to) {
    if (threadIdx.x == 0) s.n_keys = 0;
    __syncthreads();
    each_logit(r, [&](int id, float logit) {
        const u64 key = rank_key(logit, id);
        if (key == 0 || key < least) return;
        const int bin = weight_bin(qwen3i_octaves_below(logit, r.top, r.temperature));
        if (bin < from || bin > to) return;
        const unsigned at = atomicAdd(&s.n_keys, 1u);
        if (at < (unsigned)LIST_KEYS) s.keys[at] = key;
    });
    __syncthreads();
}

/* The largest key such that the keys from it on count, or weigh, at least need: bit by bit, for the rare rows
   with thousands of logits alike. */
static __device__ u64 bisect_keys(choose_shared &s, const row_logits &r, u64 least, u64 need, bool weights) {
    u64 key = 0;
    for (int bit = 63; bit >= 0; bit--) {
        const u64 probe = key | 1ull << bit;
        u64 sum = 0;
        each_logit(r, [&](int id, float logit) {
            const u64 k = rank_key(logit, id);
            if (k < probe || k < least || k == 0) return;
            sum += weights ? qwen3i_weight(qwen3i_octaves_below(logit, r.top, r.temperature)) : 1ull;
        });
        if (block_sum_u64(s, sum) >= need) key = probe;
    }
    return key;
}

/* The key of the k-th in rank: everything from it on is kept. */
static __device__ u64 cut_top_k(choose_shared &s, const row_logits &r, int k) {
    fill_bins(s, r, 1, false);
    const int bin = find_bin(s, (u64)k, 0);
    if (bin == WEIGHT_BINS) return 1;   /* what lies there has no weight: in or out is the same */
    const int before = (int)s.value;
    gather_keys(s, r, 1, bin, bin);
    if (s.n_keys > (unsigned)LIST_KEYS) return bisect_keys(s, r, 1, (u64)k, false);
    sort_keys(s.keys, (int)s.n_keys);
    return s.keys[k - before - 1];
}

/* The key from which on the kept weights reach the share top_p of those from `least` on. */
static __device__ u64 cut_top_p(choose_shared &s, const row_logits &r, u64 least, float top_p) {
    fill_bins(s, r, least, true);
    const int bin = find_bin(s, 0, top_p);
    const u64 need = s.need;
    u64 sum = s.value;
    if (bin == WEIGHT_BINS) return least;
    gather_keys(s, r, least, bin, bin);
    if (s.n_keys > (unsigned)LIST_KEYS) return bisect_keys(s, r, least, need, true);
    sort_keys(s.keys, (int)s.n_keys);
    if (threadIdx.x == 0) {
        int i = 0;
        do sum += qwen3i_weight(qwen3i_octaves_below(key_logit(s.keys[i]), r.top, r.temperature));
        while (sum < need && ++i < (int)s.n_keys);
        s.value = s.keys[i < (int)s.n_keys ? i : (int)s.n_keys - 1];
    }
    __syncthreads();
    return s.value;
}

/* Walks the kept tokens in order of id until a random share of their total weight is reached. Each thread
   takes a run of ids. Equals qwen3i_draw. */
static __device__ int draw(choose_shared &s, const row_logits &r, u64 least_key, float min_p, u64 random) {
    const int run = ceil_div(r.n, n_threads()), begin = tid() * run, lane = lane_id();
    const int end = begin + run < r.n ? begin + run : r.n;
    const u64 least = qwen3i_share_of(QWEN3I_WEIGHT_ONE, min_p);
    u64 mine = 0, before, total = 0;
    for (int base = begin; base < end; base += 8) {
        float v[8];
        UNROLL for (int u = 0; u < 8; u++) v[u] = base + u < end ? r.l[base + u] : LOWEST;
        UNROLL for (int u = 0; u < 8; u++) {
            if (rank_key(v[u], base + u) < least_key) continue;
            const u64 w = qwen3i_weight(qwen3i_octaves_below(v[u], r.top, r.temperature));
            if (w >= least) mine += w;
        }
    }
    /* sums of the threads before this one: warp scan, then warps in order */
    before = mine;
    UNROLL for (int o = 1; o < 32; o *= 2) {
        const u64 v = __shfl_up_sync(ALL, before, (unsigned)o);
        if (lane >= o) before += v;
    }
    __syncthreads();
    if (lane == 31) s.sums[threadIdx.x / 32] = before;
    before -= mine;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; i++) {
        if (i == threadIdx.x / 32) before += total;
        total += s.sums[i];
    }
    u64 target = qwen3i_mul_high(random, total);
    if (target >= before && target - before < mine) {
        target -= before;
        for (int i = begin; i < end; i++) {
            if (rank_key(r.l[i], i) < least_key) continue;
            const u64 w = qwen3i_weight(qwen3i_octaves_below(r.l[i], r.top, r.temperature));
            if (w < least) continue;
            if (target < w) { s.bin = (unsigned)i; break; }
            target -= w;
        }
    }
    __syncthreads();
    return (int)s.bin;
}

/* The choice among the candidates of the first stage, for top_k up to LIST_TOP; -1 if they were too many to
   list. The kept ones are few: one warp weighs them, two to a lane, in order of rank; where a share of the
   weight ends in order of id is found by adding up, for each, all with lower ids. */
static __device__ int choose_listed(choose_shared &s, const candidates *from, const choice &c, float top) {
    const int lane = lane_id(), EACH = CHUNKS * CHUNK_KEYS / CHOOSE_THREADS;
    u64 keys[EACH], floor = 0;
    unsigned counts[EACH];
    UNROLL for (int j = 0; j < EACH; j++) {    /* all on their way before any is looked at */
        const int i = tid() + j * CHOOSE_THREADS;
        counts[j] = from->counts[i / CHUNK_KEYS];
        keys[j] = from->keys[i / CHUNK_KEYS][i % CHUNK_KEYS];
    }
    if (tid() == 0) { s.n_keys = 0; s.value = 0; }
    if (tid() < CHUNKS) { s.weights[tid()] = from->tops[tid()]; floor = from->limits[tid()]; }
    __syncthreads();
    /* what k keys are no less than is as low as a kept one can be: a block's limit, */
    if (tid() < CHUNKS) {
        /* and the k-th of the blocks' largest                                          */
        int rank = 0;
        const u64 top = s.weights[tid()];
        for (int i = 0; i < CHUNKS; i++) rank += s.weights[i] > top;
        if (rank == c.top_k - 1 && top > floor) floor = top;
        atomicMax(&s.value, floor);
    }
    __syncthreads();
    floor = s.value;
    UNROLL for (int j = 0; j < EACH; j++) {
        const unsigned at = (unsigned)((tid() + j * CHOOSE_THREADS) % CHUNK_KEYS);
        if (counts[j] > (unsigned)CHUNK_KEYS) atomicAdd(&s.n_keys, (unsigned)LIST_KEYS + 1);
        else if (at < counts[j] && keys[j] >= floor) {
            const unsigned to = atomicAdd(&s.n_keys, 1u);
            if (to < (unsigned)LIST_KEYS) s.keys[to] = keys[j];
        }
    }
    __syncthreads();
    if (s.n_keys > (unsigned)LIST_KEYS) return -1;
    if (s.n_keys <= (unsigned)CHOOSE_THREADS) rank_keys(s.keys, (int)s.n_keys);
    else sort_keys(s.keys, (int)s.n_keys);
    if (warp_id() == 0) {
        const int kept = c.top_k < (int)s.n_keys ? c.top_k : (int)s.n_keys;
        u64 w[2], upto[2], total = 0;
        UNROLL for (int h = 0; h < 2; h++) {   /* upto: of this rank and those before */
            const int i = lane + 32 * h;
            w[h] = upto[h] =
                i < kept ? qwen3i_weight(qwen3i_octaves_below(key_logit(s.keys[i]), top, c.temperature)) : 0;
            UNROLL for (int o = 1; o < 32; o *= 2) {
                const u64 v = __shfl_up_sync(ALL, upto[h], (unsigned)o);
                if (lane >= o) upto[h] += v;
            }
            upto[h] += total;
            total = __shfl_sync(ALL, upto[h], 31);
        }
        const u64 need = c.top_p > 0 && c.top_p < 1 ? qwen3i_share_of(total, c.top_p) : total,
                  least = qwen3i_share_of(QWEN3I_WEIGHT_ONE, c.min_p);
        u64 sum = 0;
        UNROLL for (int h = 0; h < 2; h++) {
            const int i = lane + 32 * h;
            if ((i > 0 && upto[h] - w[h] >= need) || w[h] < least) w[h] = 0;
            s.weights[i] = w[h];
            sum += w[h];
        }
        UNROLL for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(ALL, sum, o);
        const u64 target = qwen3i_mul_high(c.random, sum);
        __syncwarp();
        UNROLL for (int h = 0; h < 2; h++) {
            const int i = lane + 32 * h, id = key_id(s.keys[i]);
            u64 before = 0;
            if (i >= kept) continue;
            for (int j = 0; j < kept; j++) if (key_id(s.keys[j]) < id) before += s.weights[j];
            if (target >= before && target - before < w[h]) s.bin = (unsigned)id;
        }
    }
    __syncthreads();
    return (int)s.bin;
}

/* The choice by passes over all logits. */
static __device__ int choose_from_all(choose_shared &s, const row_logits &r, const choice &c) {
    u64 least = 1;
    if (c.top_k > 0 && c.top_k < r.n) least = cut_top_k(s, r, c.top_k);
    if (c.top_p > 0 && c.top_p < 1) least = cut_top_p(s, r, least, c.top_p);
    return draw(s, r, least, c.min_p, c.random);
}

/* choose: second stage: row i of the step = steps[i] with the token chosen for it; chosen[i] and report[i]
   (host memory) = the choice, -1 if everything is banned. steps and choices may lie in host memory. One block
   of 1024 a row; best [rows] is zero again afterwards. Equals qwen3i_choose. */
static __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose_kernel(row_info *rows, const row_info *steps, int *chosen, int *report, u64 *best,
                  const candidates *listed_keys, const float *kept, const float *copy, const choice *choices,
                  int n, int n_choose) {
    QWEN3_DYNAMIC_SHARED(memory);
    choose_shared &s = *(choose_shared *)(void *)memory;
    const choice c = choices[blockIdx.x];
    row_info row = steps[blockIdx.x];
    wait_for_previous();
    const u64 first = best[blockIdx.x];
    int id = first ? key_id(first) : -1;
    if (first && c.temperature > 0) {
        row_logits r;
        r.l = choice_logits(c, kept, copy, block_x(), n);
        r.n = n_choose;
        r.top = key_logit(first);
        r.temperature = c.temperature;
        id = c.top_k > 0 && c.top_k <= LIST_TOP ? choose_listed(s, &listed_keys[blockIdx.x], c, r.top) : -1;
        if (id < 0) id = choose_from_all(s, r, c);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        row.token = id < 0 ? 0 : id;    /* the step goes on with something valid */
        rows[blockIdx.x] = row;
        chosen[blockIdx.x] = id;
        report[blockIdx.x] = id;
        best[blockIdx.x] = 0;
    }
}

/* ================================================================================================
   PATHS: the ways through the layers
   ================================================================================================ */
/* For cuBLASLt the product's input is made of the rows. */
static qwen3_result gemm_norm(const pass *p, const float *gain, const matrix &w, input *h) {
    TRY(vector_norm(p, gain, w, h));
    *h = {NULL, 0, act_scale(p, w), NULL};
    return round_rows(p, w, p->c->h, p->c->embd_ld, p->n);
}
static qwen3_result hopper_norm(const pass *p, const float *gain, const matrix &w, input *h) {
    *h = {NULL, 0, p->c->act_scale, NULL};
    return launched(p, launch_hopper_norm(p, norm_arguments(p, gain, w)), "hopper_norm");
}

/* Each of its blocks holds all of the input: */
static bool vector_norms_itself(const pass *p, const matrix &w) {
    const input h = {p->x, p->c->embd_ld, NULL, NULL};
    if (w.n_parts > 0) return few_serves(p->c, w, p->n) || block_norms_itself(p, w);
    return w.cols % 4 == 0 && w.cols <= STREAM_NORM * 4 * 32 * MATVEC_WARPS &&
           stream_ring(p, vector_input(p, w, h, p->n), w) > 0;
}

const path VECTOR_PATH = {
    vector_norm, vector_norms_itself, vector_qkv, rows_attention, vector_o_proj, vector_mlp, vector_down,
    vector_head, false, false
};
const path GEMM_PATH = {
    gemm_norm, NULL, gemm_qkv, rows_attention, gemm_o_proj, gemm_mlp, gemm_down, gemm_head, false, false
};
const path SKINNY_PATH = {
    hopper_norm, skinny_norms_itself, skinny_qkv, rows_attention, skinny_o_proj, skinny_mlp, skinny_down,
    skinny_head, false, true
};
const path LARGE_PATH = {
    hopper_norm, NULL, large_qkv, large_attention, large_o_proj, large_mlp, large_down, skinny_head,
    true, true
};

static void gemm_memory(cuda_ctx *c, arena *a);
static void hopper_memory(cuda_ctx *c, arena *a);
static qwen3_result prepare_nothing(cuda_ctx *, const qwen3i_err *) { return QWEN3_OK; }
static qwen3_result prepare_hopper(cuda_ctx *c, const qwen3i_err *err);

/* Up to SAME_ROWS rows alike. Matrix-vector products norm no input, as some would for so many rows and others
   not; those of Hopper's that do for up to SKINNY_NORM rows have the order of the norm's kernel. */
const path SAME_VECTOR_PATH = {
    vector_norm, NULL, vector_qkv, rows_attention, vector_o_proj, vector_mlp, vector_down, vector_head, false,
    false
};
const path SAME_SKINNY_PATH = {
    hopper_norm, skinny_norms_itself, skinny_qkv, rows_attention, skinny_o_proj, skinny_mlp, skinny_down,
    skinny_head, false, true
};

const path_set PORTABLE = {
    {{MATVEC_ROWS, &VECTOR_PATH}, {INT_MAX, &GEMM_PATH}}, false, gemm_memory, prepare_nothing
};
const path_set HOPPER = {
    {{SKINNY_LEAST - 1, &VECTOR_PATH}, {SKINNY_MOST, &SKINNY_PATH}, {INT_MAX, &LARGE_PATH}},
    true, hopper_memory, prepare_hopper
};

/* With weights in blocks, where there are kernels for few rows of x times them. */
const path_set FEW_PORTABLE = {
    {{FEW_MOST, &VECTOR_PATH}, {INT_MAX, &GEMM_PATH}}, false, gemm_memory, prepare_nothing
};
const path_set FEW_HOPPER = {
    {{FEW_MOST, &VECTOR_PATH}, {SKINNY_MOST, &SKINNY_PATH}, {INT_MAX, &LARGE_PATH}},
    true, hopper_memory, prepare_hopper
};

/* The same of invariant contexts. */
const path_set SAME_PORTABLE = {
    {{SAME_ROWS, &SAME_VECTOR_PATH}, {INT_MAX, &GEMM_PATH}}, false, gemm_memory, prepare_nothing
};
const path_set SAME_HOPPER = {
    {{SAME_ROWS, &SAME_SKINNY_PATH}, {SKINNY_MOST, &SKINNY_PATH}, {INT_MAX, &LARGE_PATH}},
    true, hopper_memory, prepare_hopper
};
const path_set SAME_FEW_PORTABLE = {
    {{SAME_ROWS, &SAME_VECTOR_PATH}, {FEW_MOST, &VECTOR_PATH}, {INT_MAX, &GEMM_PATH}},
    false, gemm_memory, prepare_nothing
};
const path_set SAME_FEW_HOPPER = {
    {{SAME_ROWS, &SAME_VECTOR_PATH}, {FEW_MOST, &VECTOR_PATH}, {SKINNY_MOST, &SKINNY_PATH},
     {INT_MAX, &LARGE_PATH}},
    true, hopper_memory, prepare_hopper
};

/* For w with an order its inputs come in it, x and gain: the sum of squares is the same but for its order. */
static qwen3_result norm(pass *p, const float *gain, const matrix &w, input *h) {
    p->x = w.order ? p->c->ordered : p->c->x;
    TRY(order_rows(p, w, p->c->ordered, (const float *)p->c->x, p->c->embd_ld, p->n));
    *h = {p->x, p->c->embd_ld, NULL, gain};
    return p->path->norms_itself && p->path->norms_itself(p, w) ? QWEN3_OK : p->path->norm(p, gain, w, h);
}

static qwen3_result head_logits(const pass *p, int first, int n, bool keep_only) {
    return path_for(p->c, n)->head(p, first, n, keep_only);
}

/* The last layer's rows of which nothing is wanted leave it after its attention. */
static qwen3_result keep_wanted(pass *p) {
    cuda_ctx *c = p->c;
    pass kept = make_pass(c, p->s, p->n_outs, p->n_tiles, p->err);
    if (p->n_outs == p->n) return QWEN3_OK;
    kept.only_wanted = true;
    TRY(launched(p,
                 !p->halves  ? launch_keep_wanted(p, c->attn, (const float *)c->attn) :
                 kept.halves ? launch_keep_wanted(p, c->hopper_act, (const half_t *)c->hopper_act) :
                               launch_keep_wanted(p, c->attn, (const half_t *)c->hopper_act),
                 "keep_wanted"));
    *p = kept;
    return QWEN3_OK;
}

/* One decoder layer: x in place; the last one keeps only the rows that are wanted. */
static qwen3_result decoder_layer(pass *p, int layer) {
    const layer_weights *w = &p->c->m->layers[layer];
    const bool last = layer == p->c->m->config.n_layer - 1;
    input h;
    if (p->two) return two_kernels(p, layer);
    TRY(norm(p, w->attn_norm, w->qkv, &h));         /* h = RMSNorm(x)                                    */
    TRY(p->path->qkv(p, layer, h));                 /* q, k, v = W h; q, k = RoPE(RMSNorm(q, k)); cache  */
    if (last && p->n_outs == 0) return QWEN3_OK;
    TRY(p->path->attention(p, layer));              /* a = softmax(q k / sqrt(d)) v                      */
    if (last) TRY(keep_wanted(p));
    TRY(p->path->o_proj(p, layer));                 /* x = x + Wo a                                      */
    TRY(sum_ranks(p));
    if (w->router) TRY(experts_mlp(p, layer));      /* x = x + a sum of experts of RMSNorm(x)            */
    else {
        TRY(norm(p, w->mlp_norm, w->gate_up, &h));  /* h = RMSNorm(x)                                    */
        TRY(p->path->mlp(p, layer, h));             /* m = silu(Wgate h) * (Wup h)                       */
        TRY(p->path->down(p, layer));               /* x = x + Wdown m                                   */
    }
    return sum_ranks(p);
}

static int cancelled(const cuda_ctx *c) { return c->desc.cancel && c->desc.cancel(c->desc.cancel_user); }

static qwen3_result all_layers(pass *p, bool may_cancel) {
    TRY(embed(p));
    for (int i = 0; i < p->c->m->config.n_layer; i++) {
        if (may_cancel && cancelled(p->c)) return qwen3i_fail(p->err, QWEN3_STOPPED, "cancelled");
        TRY(decoder_layer(p, i));
    }
    return QWEN3_OK;
}

/* ================================================================================================
   CREATING A CONTEXT: everything one user of a model needs, taken at once
   ================================================================================================ */
static float *take_result(cuda_ctx *c, arena *a, int i, size_t n) {
    c->results[i].n = n;
    return c->results[i].at = a->take<float>(n);
}

/* What products by cuBLASLt need; ... */
static void gemm_memory(cuda_ctx *c, arena *a) {
    const size_t rows = (size_t)c->max_rows;
    c->tmp = take_result(c, a, 0, rows * c->embd_ld);
    c->gate_up = take_result(c, a, 2, rows * 2 * c->ff_ld);
    c->act = a->take<float>(rows * c->act_ld);
    c->workspace_size = WORKSPACE;
    c->workspace = a->take<char>(c->workspace_size);
}
/* ... and Hopper's own. */
static void hopper_memory(cuda_ctx *c, arena *a) {
    const qwen3i_config *g = &c->m->config;
    const size_t rows = (size_t)c->max_rows;
    c->two_parts = a->take<float>(2 * TWO_PARTS * TWO_WIDTH);
    c->hopper_act = a->take<half_t>(rows * most(c->q_dim, g->n_embd));
    c->hopper_q = a->take<half_t>(c->hopper_kv ? rows * c->q_dim : 0);
    c->hopper_m = a->take<half_t>(rows * g->n_ff);
    c->ff_scale = a->take<float>(rows);
}

/* Bytes that the largest matrix of a layer that lies in blocks takes as F16; a head goes in parts of that. */
static size_t largest_in_blocks(const cuda_model *m) {
    size_t bytes = 0;
    for (int i = 0; i < m->config.n_layer; i++) {
        const layer_weights &l = m->layers[i];
        for (const matrix *w : {&l.qkv, &l.wo, &l.gate_up, &l.w_down})
            if (w->n_parts > 0) bytes = most(bytes, (size_t)w->rows * w->ld * sizeof(half_t));
    }
    return bytes > 0 || m->head.n_parts == 0 ? bytes : 256 * (size_t)m->head.ld * sizeof(half_t);
}

/* What layers with experts need. */
static void experts_memory(cuda_ctx *c, arena *a) {
    const qwen3i_config *g = &c->m->config;
    const size_t rows = (size_t)c->max_rows, entries = rows * (size_t)g->n_expert_used;
    const size_t n = (size_t)g->n_expert, ff = (size_t)round_up(g->n_ff_expert, 8);
    expert_buffers *e = &c->experts;
    e->n_tiles = 0;
    if (n == 0) return;
    e->ldy = most(c->embd_ld, 2 * (int)ff);
    e->logits = a->take<float>(rows, n);
    e->picked = a->take<int>(entries);
    e->share = a->take<float>(entries);
    e->lists = a->take<int>(rows, n);
    e->counts = a->take<int>(n);
    e->active = a->take<int>(1 + n);
    e->m = a->take<float>(entries, ff);
    e->y = a->take<float>(entries, (u64)e->ldy);
    e->n_tiles = group_fits_hopper(c) ? group_tiles(c, c->max_rows) : 0;
    const size_t tiled = (size_t)e->n_tiles * HOPPER_M, in = e->n_tiles ? tiled : rows,
                 out = e->n_tiles ? tiled : entries;
    e->act = a->take<half_t>(in, (u64)c->embd_ld);
    e->m16 = a->take<half_t>(out, ff);
    e->act_scale = a->take<float>(in);
    e->m_scale = a->take<float>(out);
    e->tiles = a->take<expert_tile>((size_t)e->n_tiles);
    e->entry = a->take<int>(tiled);
}

static void lay_out_device(cuda_ctx *c, arena *a) {
    const qwen3i_config *g = &c->m->config;
    const size_t rows = (size_t)c->max_rows, narrow = (size_t)c->narrow_rows;
    const size_t seqs = (size_t)c->desc.max_seqs, vocab = (size_t)g->n_vocab;
    const size_t embd = (size_t)c->embd_ld, half = (size_t)g->head_dim / 2, ctx = (size_t)c->desc.max_ctx;
    const bool few = few_possible(c->m) && largest_in_blocks(c->m) > 0;
    const size_t part_rows = (size_t)most(MAX_SPLITS, 2 * c->m->n_sm / g->n_head_kv) * more_splits(c);
    const u64 kv_layer =
        qwen3i_size_mul(seqs * ctx, (u64)c->kv_dim * qwen3i_type_size((qwen3i_type)c->desc.kv_type));
    c->kv_layer_bytes = (size_t)kv_layer;
    c->k = a->take<char>(kv_layer, (u64)g->n_layer);
    c->v = a->take<char>(kv_layer, (u64)g->n_layer);
    c->kept = a->take<float>(seqs * KEPT * vocab);
    c->rope = a->take<float2>(ctx * half);
    c->freqs = a->take<float>(half);
    c->x = a->take<float>(rows * embd);
    c->sum = c->m->rank > 0 ? a->take<float>(rows * embd) : c->x;
    c->ordered = a->take<float>(g->ordered ? rows * embd : 0);
    c->h = a->take<float>((g->n_expert ? rows : narrow) * embd);
    c->qkv = take_result(c, a, 1, (c->hopper_kv ? narrow : rows) * c->qkv_ld);
    c->attn = a->take<float>((c->hopper_kv ? narrow : rows) * c->q_dim);
    /* of few rows with weights in blocks gate and up */
    c->ff = a->take<float>((size_t)most(least(c->max_rows, most_single(c)),
                                        few ? 2 * least(c->max_rows, FEW_MOST) : 0) * c->ff_ld);
    c->act_scale = a->take<float>(rows);
    c->scratch_size = most(largest_in_blocks(c->m), few ? (size_t)1 << 20 : 0);
    c->scratch = (half_t *)(void *)a->take<char>(c->scratch_size);
    c->few = few ? a->take<char>(few_bytes(c->act_ld)) : NULL;
    c->few_tickets = a->take<unsigned>(few ? (size_t)c->m->n_sm : 0);
    c->paths->memory(c, a);
    experts_memory(c, a);
    c->logits = take_result(c, a, 3, (size_t)head_rows(c) * vocab);
    c->gathered_size = c->m->n_ranks == 1 ? 0 : most((size_t)head_rows(c) * vocab * sizeof(float),
                                                     (size_t)c->m->n_ranks * c->kv_dim * sizeof(float));
    c->gathered = a->take<char>(c->gathered_size);
    c->stopped = a->take<int>(1);
    if (c->m->n_ranks > 1) {
        const size_t ranks = (size_t)c->m->n_ranks;
        c->peer_parts = a->take<uint4>(ranks * PEER_ROWS * embd);
        c->peer_flags = a->take<unsigned>(ranks * PEER_BLOCKS);
        c->peer_counts = a->take<unsigned>((size_t)2 * PEER_BLOCKS);
    }
    c->logprobs = a->take<float>((size_t)head_rows(c));
    c->parts = a->take<float>(part_rows * g->n_head * (size_t)(3 * g->head_dim));
    c->qkv_tickets = a->take<unsigned>((size_t)(g->n_head + g->n_head_kv));
    c->attn_tickets = a->take<unsigned>(attention_tickets(c));
    c->rows = a->take<row_info>((size_t)most(c->max_rows, choices_at_most(c)));
    c->tile_list = a->take<attention_tile>(rows);
    c->listed_keys = a->take<candidates>((size_t)choice_rows(c));
    c->lists = a->take<listed>((size_t)LISTED_MAX);
    c->chosen = a->take<int>(seqs + SAME_ROWS);
    c->best = a->take<u64>((size_t)choices_at_most(c));
}

static void lay_out_pinned(cuda_ctx *c, arena *a) {
    const size_t rows = (size_t)c->max_rows, seqs = (size_t)c->desc.max_seqs,
                 choices = (size_t)choices_at_most(c);
    for (int i = 0; i < RING; i++) {
        c->slots[i].rows = a->take<row_info>(rows < choices ? choices : rows);
        c->slots[i].tiles = a->take<attention_tile>(rows);
        c->slots[i].choices = a->take<choice>(choices);
        c->slots[i].lists = a->take<listed>((size_t)LISTED_MAX);
        c->slots[i].report = a->take<int>(choices);
        c->slots[i].masks = a->take<unsigned>(seqs * (size_t)ceil_div(c->m->config.n_vocab, 32));
    }
    c->host_logits = a->take<float>((size_t)c->m->config.n_vocab);
    c->abandoned = a->take<int>(1);
}

static void lay_out_host(cuda_ctx *c, arena *a) {
    const size_t seqs = (size_t)c->desc.max_seqs;
    lay_out_plans(c, a);
    c->graphs = a->take<cudaGraphExec_t>(seqs + 1);
    c->runs = a->take<int>(seqs + 1);
    c->current = a->take<int>(seqs);
    c->ahead.seqs = a->take<int>(seqs);
    c->ahead.lengths = a->take<int>(seqs);
    c->ahead.last = a->take<int>(seqs);
    c->ahead.samplers = a->take<qwen3_sampler>(seqs);
    c->ahead.bias_hashes = a->take<u64>(seqs);
}

/* What follows from the model and the descriptor. */
static void shape_ctx(cuda_ctx *c, const cuda_model *m, const qwen3_ctx_desc *desc, const path_set *paths) {
    const qwen3i_config *g = &m->config;
    memset(c, 0, sizeof *c);
    c->m = m;
    c->desc = *desc;
    c->paths = paths;
    c->max_rows = most(desc->prefill_chunk, desc->max_seqs);
    c->group = g->n_head / g->n_head_kv;
    c->q_dim = g->n_head * g->head_dim;
    c->kv_dim = g->n_head_kv * g->head_dim;
    c->qkv_ld = c->q_dim + 2 * c->kv_dim;
    c->embd_ld = round_up(g->n_embd, 8);
    c->ff_ld = round_up(g->n_ff, 8);
    c->act_ld = round_up(most(most(g->n_embd, g->n_ff), c->q_dim), 8);
    c->tiles = g->head_dim == HEAD_DIM && c->group <= TILE_ROWS &&
               (desc->kv_type == QWEN3_KV_F16 || (desc->kv_type == QWEN3_KV_BF16 && m->capability >= 80));
    c->hopper = paths->hopper;
    c->hopper_kv = c->hopper && desc->kv_type == QWEN3_KV_F16;
    c->narrow_rows = c->hopper ? least(c->max_rows, most(desc->max_seqs, SKINNY_MOST)) : c->max_rows;
}

static const path_set *paths_of(const cuda_model *m, const qwen3_ctx_desc *desc) {
    const layer_weights &l = m->layers[0];
    const bool few = few_possible(m) && (l.router ? l.wo : l.gate_up).n_parts > 0, same = desc->invariant;
    if (few && m->hopper) return same ? &SAME_FEW_HOPPER : &FEW_HOPPER;
    if (few) return same ? &SAME_FEW_PORTABLE : &FEW_PORTABLE;
    return m->hopper ? same ? &SAME_HOPPER : &HOPPER : same ? &SAME_PORTABLE : &PORTABLE;
}

static qwen3_memory ctx_memory(const void *model_state, const qwen3_model *, const qwen3_ctx_desc *desc) {
    qwen3_memory bytes;
    arena device(NULL), pinned(NULL), host(NULL);
    cuda_ctx c;
    const cuda_model *m = (const cuda_model *)model_state;
    shape_ctx(&c, m, desc, paths_of(m, desc));
    lay_out_device(&c, &device);
    lay_out_pinned(&c, &pinned);
    lay_out_host(&c, &host);
    bytes.device_bytes = device.size();
    bytes.host_bytes = qwen3i_size_add(qwen3i_size_add(pinned.size(), host.size()), sizeof c);
    return bytes;
}

static void free_own(cuda_ctx *c) {
    if (!c) return;
    const qwen3_allocator a = c->desc.allocator;
    {
        device_guard guard(c->m->device);
        if (c->stream) cudaStreamSynchronize(c->stream);
        end_products(c);
        for (int i = 0; c->graphs && i <= c->desc.max_seqs; i++)
            if (c->graphs[i]) cudaGraphExecDestroy(c->graphs[i]);
        for (int i = 0; i < RING; i++) {
            if (c->uploaded[i]) cudaEventDestroy(c->uploaded[i]);
            if (c->reported[i]) cudaEventDestroy(c->reported[i]);
        }
#ifdef QWEN3_CUDA_NCCL
        if (c->comm) ncclCommDestroy(c->comm);
#endif
        if (c->own_stream && c->stream) cudaStreamDestroy(c->stream);
        if (c->capture) cudaStreamDestroy(c->capture);
        if (c->pinned) cudaFreeHost(c->pinned);
        if (c->memory) cudaFree(c->memory);
    }
    host_free(&a, c->host, c->host_size);
    host_free(&a, c, sizeof *c);
}

static qwen3_result take_memory(cuda_ctx *c, const qwen3i_err *err) {
    arena device(NULL), pinned(NULL), host(NULL);
    lay_out_device(c, &device);
    lay_out_pinned(c, &pinned);
    lay_out_host(c, &host);
    if (!qwen3i_size_fits(host.size()) || !qwen3i_size_fits(pinned.size()))
        return no_host_memory(err, qwen3i_size_add(host.size(), pinned.size()));
    c->host_size = (size_t)host.size();
    c->host = (char *)host_alloc(&c->desc.allocator, c->host_size);
    if (!c->host) return no_host_memory(err, host.size());
    arena host_taken(c->host);
    lay_out_host(c, &host_taken);
    TRY(device_alloc(&c->memory, device.size(), "the context", err));
    arena device_taken(c->memory);
    lay_out_device(c, &device_taken);
    if (cudaHostAlloc((void **)&c->pinned, (size_t)pinned.size(), cudaHostAllocMapped) != cudaSuccess) {
        cudaGetLastError();
        return no_host_memory(err, pinned.size());
    }
    arena pinned_taken(c->pinned);
    lay_out_pinned(c, &pinned_taken);
    return QWEN3_OK;
}

template <int R> static qwen3_result allow_skinny_shared(const qwen3i_err *err) {
    const size_t bytes = SKINNY_SHARED;
    TRY(allow_shared(skinny_product_kernel<to_residual<HOPPER_M / 2>, R>, bytes, err));
    TRY(allow_shared(skinny_product_kernel<to_residual<HOPPER_M>, R>, bytes, err));
    TRY(allow_shared(skinny_product_kernel<to_heads<half_t>, R>, bytes, err));
    TRY(allow_shared(skinny_product_kernel<to_heads<void>, R>, bytes, err));
    TRY(allow_shared(skinny_product_kernel<to_mlp, R>, bytes, err));
    return allow_shared(skinny_product_kernel<to_logits, R>, bytes, err);
}

/* A cluster lies within one of the chip's groups of multiprocessors: of 264 places for blocks, 30 clusters of
   8 find one. */
static qwen3_result find_skinny_room(cuda_ctx *c, const qwen3i_err *err) {
    for (int i = 0; i < 4; i++) {
        cudaLaunchConfig_t config = cudaLaunchConfig_t();
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = 1u << i;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(1u << i);
        config.blockDim = dim3((unsigned)SKINNY_THREADS);
        config.dynamicSmemBytes = SKINNY_SHARED;
        config.attrs = &cluster;
        config.numAttrs = 1;
        CUDA_TRY(cudaOccupancyMaxActiveClusters(&c->skinny_room[i],
                                                skinny_product_kernel<to_mlp, SKINNY_MOST>, &config));
        c->skinny_room[i] = most(c->skinny_room[i], 1);
    }
    return QWEN3_OK;
}

template <int P> static qwen3_result allow_large_shared(const qwen3i_err *err) {
    const size_t bytes = large_product_shared<HOPPER_N, P>();
    TRY(allow_shared(large_product_kernel<to_residual<>, HOPPER_N, P>, bytes, err));
    TRY(allow_shared(large_product_kernel<to_heads<half_t>, HOPPER_N, P>, bytes, err));
    TRY(allow_shared(large_product_kernel<to_heads<void>, HOPPER_N, P>, bytes, err));
    return allow_shared(large_product_kernel<to_mlp, HOPPER_N, P>, bytes, err);
}

/* What lies in the scratch, as TMA finds it; of a head as many rows as there is room for. */
static qwen3_result prepare_halves(cuda_ctx *c, const qwen3i_err *err) {
    const layer_weights *l = c->m->layers, *dense = l;
    while (dense->router && dense + 1 < l + c->m->config.n_layer) dense++;
    for (const matrix *w : {&l->qkv, &l->wo, &dense->gate_up, &dense->w_down, &c->m->head}) {
        if (c->scratch_size == 0) break;
        if (w->each > 0) continue;      /* experts go through no such map */
        matrix *h = &c->halves[w->kind];
        const size_t room = c->scratch_size / ((size_t)w->ld * sizeof(half_t));
        *h = *w;
        h->n_parts = 0;
        h->data = c->scratch;
        if (w->kind == HEAD_KIND) h->rows = (int)least((size_t)w->rows, room);
        TRY(map_matrix(h, err));
    }
    return QWEN3_OK;
}

/* What tiles of experts are read through. */
static qwen3_result prepare_experts(cuda_ctx *c, const qwen3i_err *err) {
    const qwen3i_config *g = &c->m->config;
    expert_buffers *e = &c->experts;
    const u64 rows = (u64)e->n_tiles * HOPPER_M;
    if (e->n_tiles == 0) return QWEN3_OK;
    TRY(make_map(&e->act_map, e->act, (u64)g->n_embd, rows, HOPPER_M / 2, err));
    TRY(make_map(&e->m_map, e->m16, (u64)g->n_ff_expert, rows, HOPPER_M / 2, err));
    for (int i = 0; i < g->n_layer; i++)
        for (const matrix *w : {&c->m->layers[i].gate_up, &c->m->layers[i].w_down})
            if (w->each > 0 && w->n_parts > 0)
                TRY(make_map(w->kind == DOWN_KIND ? &e->down_map : &e->up_map, c->scratch, (u64)w->ld,
                             (u64)w->rows, HOPPER_N / 2, err));
    TRY(allow_shared(group_hopper_kernel<to_mlp>, large_product_shared<HOPPER_N, 2>(), err));
    return allow_shared(group_hopper_kernel<to_entries>, large_product_shared<HOPPER_N, 2>(), err);
}

static qwen3_result prepare_hopper(cuda_ctx *c, const qwen3i_err *err) {
    const qwen3i_config *g = &c->m->config;
    const u64 rows = (u64)c->max_rows, ctx = (u64)c->desc.max_ctx,
              sets = (u64)c->desc.max_seqs * (u64)g->n_layer;
    TRY(make_map(&c->large_h_map, c->hopper_act, (u64)g->n_embd, rows, HOPPER_M, err));
    TRY(make_map(&c->large_a_map, c->hopper_act, (u64)c->q_dim, rows, HOPPER_M, err));
    TRY(make_map(&c->large_m_map, c->hopper_m, (u64)g->n_ff, rows, HOPPER_M, err));
    TRY(make_map(&c->skinny_h_map, c->hopper_act, (u64)g->n_embd, rows, SKINNY_X_TILE, err));
    TRY(make_map(&c->skinny_a_map, c->hopper_act, (u64)c->q_dim, rows, SKINNY_X_TILE, err));
    TRY(make_map(&c->skinny_m_map, c->hopper_m, (u64)g->n_ff, rows, SKINNY_X_TILE, err));
    TRY(prepare_halves(c, err));
    TRY(prepare_experts(c, err));
    TRY(prepare_two(c, err));
    TRY(allow_skinny_shared<32>(err));
    TRY(allow_skinny_shared<64>(err));
    TRY(find_skinny_room(c, err));
    TRY(allow_large_shared<1>(err));
    TRY(allow_large_shared<2>(err));
    TRY(allow_shared(large_product_kernel<to_residual<>, HOPPER_N_MORE, 1>,
                     large_product_shared<HOPPER_N_MORE, 1>(), err));
    if (!c->hopper_kv) return QWEN3_OK;
    TRY(make_map(&c->q_map, c->hopper_q, HEAD_DIM, (u64)g->n_head, rows, HOPPER_K, c->group,
                 HOPPER_M / c->group, err));
    TRY(make_map(&c->k_map, c->k, (u64)c->kv_dim, ctx, sets, HOPPER_K, LARGE_POS, 1, err));
    TRY(make_map(&c->v_map, c->v, (u64)c->kv_dim, ctx, sets, HOPPER_K, LARGE_POS, 1, err));
    TRY(allow_shared(large_attention_kernel, LARGE_ATTENTION_SHARED, err));
    return QWEN3_OK;
}

static qwen3_result fill_ctx(cuda_ctx *c, const qwen3i_err *err) {
    const qwen3i_config *g = &c->m->config;
    float freqs[MAX_HEAD_DIM / 2];
    float scale;
    CUDA_TRY(cudaStreamCreateWithFlags(&c->capture, cudaStreamNonBlocking));
    c->stream = (cudaStream_t)c->desc.stream;
    if (!c->stream) {
        CUDA_TRY(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking));
        c->own_stream = true;
    }
    TRY(take_memory(c, err));
    for (int i = 0; i < RING; i++) {
        CUDA_TRY(cudaEventCreateWithFlags(&c->uploaded[i], cudaEventDisableTiming));
        CUDA_TRY(cudaEventCreateWithFlags(&c->reported[i], cudaEventDisableTiming));
    }
    TRY(begin_products(c, err));
    TRY(allow_tile_shared(c, err));
    TRY(c->paths->prepare(c, err));
    CUDA_TRY(cudaFuncSetAttribute(choose_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)sizeof(choose_shared)));
    scale = qwen3_backend_rotation(freqs, g, (double)c->desc.yarn_factor);
    CUDA_TRY(cudaMemcpyAsync(c->freqs, freqs, (size_t)g->head_dim / 2 * sizeof(float), cudaMemcpyHostToDevice,
                             c->stream));
    CUDA_TRY(launch(c->stream, dim3((unsigned)c->desc.max_ctx), 64, 0, rope_table_kernel, c->rope,
                    (const float *)c->freqs, g->head_dim / 2, scale));
    CUDA_TRY(cudaMemsetAsync(c->k, 0, (size_t)g->n_layer * c->kv_layer_bytes, c->stream));
    CUDA_TRY(cudaMemsetAsync(c->v, 0, (size_t)g->n_layer * c->kv_layer_bytes, c->stream));
    CUDA_TRY(
        cudaMemsetAsync(c->kept, 0, (size_t)c->desc.max_seqs * KEPT * g->n_vocab * sizeof(float), c->stream));
    CUDA_TRY(
        cudaMemsetAsync(c->qkv_tickets, 0, (size_t)(g->n_head + g->n_head_kv) * sizeof(unsigned), c->stream));
    if (c->few)
        CUDA_TRY(cudaMemsetAsync(c->few_tickets, 0, (size_t)c->m->n_sm * sizeof(unsigned), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->attn_tickets, 0, attention_tickets(c) * sizeof(unsigned), c->stream));
    /* tiles are read whole, whatever is in the rows that a batch has not */
    if (c->hopper) {
        CUDA_TRY(cudaMemsetAsync(c->hopper_act, 0, (size_t)c->max_rows * most(c->q_dim, g->n_embd) * 2,
                                 c->stream));
        CUDA_TRY(cudaMemsetAsync(c->hopper_m, 0, (size_t)c->max_rows * g->n_ff * 2, c->stream));
        const size_t tiled = (size_t)c->experts.n_tiles * HOPPER_M * 2;
        if (tiled > 0) {
            CUDA_TRY(cudaMemsetAsync(c->experts.act, 0, tiled * c->embd_ld, c->stream));
            CUDA_TRY(cudaMemsetAsync(c->experts.m16, 0, tiled * round_up(g->n_ff_expert, 8), c->stream));
        }
    }
    /* for initcheck, which does not see that cuBLASLt writes by bulk stores */
    for (const auto &r : c->results)
        if (r.n > 0) CUDA_TRY(cudaMemsetAsync(r.at, 0, r.n * sizeof(float), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->best, 0, (size_t)choices_at_most(c) * sizeof(u64), c->stream));
    /* read whole */
    CUDA_TRY(cudaMemsetAsync(c->listed_keys, 0, (size_t)choice_rows(c) * sizeof(candidates), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->chosen, 0, (size_t)(c->desc.max_seqs + SAME_ROWS) * sizeof(int), c->stream));
    *c->abandoned = 0;
    if (c->peer_parts) {
        const size_t ranks = (size_t)c->m->n_ranks;
        CUDA_TRY(cudaMemsetAsync(c->sum, 0, (size_t)c->max_rows * c->embd_ld * sizeof(float), c->stream));
        CUDA_TRY(cudaMemsetAsync(c->peer_parts, 0, ranks * PEER_ROWS * c->embd_ld * sizeof(uint4),
                                 c->stream));
        CUDA_TRY(cudaMemsetAsync(c->peer_counts, 0, 2 * PEER_BLOCKS * sizeof(unsigned), c->stream));
        CUDA_TRY(cudaMemsetAsync(c->peer_flags, 0, ranks * PEER_BLOCKS * sizeof(unsigned), c->stream));
    }
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

static qwen3_result create_ctx_for(const path_set *paths, void **ctx_state, void *model_state,
                                   const qwen3_model *model, const qwen3_ctx_desc *desc,
                                   const qwen3i_err *err) {
    const cuda_model *m = (const cuda_model *)model_state;
    cuda_ctx *c = (cuda_ctx *)host_alloc(&desc->allocator, sizeof *c);
    *ctx_state = NULL;
    if (!c) return no_host_memory(err, sizeof *c);
    shape_ctx(c, m, desc, paths);
    /* the tokenizer may have come after the weights */
    const qwen3i_model_view view = qwen3_backend_view(model);
    c->eos = view.eos;
    c->n_eos = view.n_eos;
    c->n_choose = least(view.n_tokens, m->config.n_vocab);
    device_guard guard(m->device);
    const qwen3_result r =
        guard.status == cudaSuccess ? fill_ctx(c, err) : cuda_fail(err, guard.status, "cudaSetDevice");
    if (r == QWEN3_OK) *ctx_state = c;
    else free_own(c);
    return r;
}

/* ================================================================================================
   GROUPS: ranks in one process. A context of rank 0 has those of the others as its fellows; what holds a sum
   over ranks they enqueue at once, each on a thread of its own, and the caller's is rank 0's.
   ================================================================================================ */
struct rank_job {                       /* run(what, context of a rank, its part of the answer) */
    qwen3_result (*run)(const void *what, cuda_ctx *c, int rank, const qwen3i_err *err);
    const void *what;
};

struct fellow {
    cuda_ctx      *c;
    std::thread    thread;
    qwen3_result   result;
    char           text[512];
    qwen3i_next   *items;               /* [max_seqs] of the step, with samplers of its own */
    qwen3_sampler *samplers;
};

struct rank_group {
    int      n;
    fellow   fellows[MOST_RANKS];       /* [0]: the caller's */
    std::mutex              lock;       /* of what follows */
    std::condition_variable begun, ended;
    const rank_job *job;
    long     turn;
    int      at_work;
    bool     over;
    std::atomic<int> broken_by;         /* the rank that failed first, so that no sum comes any more; or -1 */
};

#ifdef QWEN3_CUDA_NCCL
static bool is_broken(const cuda_ctx *c) { return c->ranks && c->ranks->broken_by >= 0; }
#endif

/* After an error the others must not wait for this rank's part of a sum. */
static void give_up(cuda_ctx *c) {
#ifdef QWEN3_CUDA_NCCL
    int nobody = -1;
    if (c->ranks) c->ranks->broken_by.compare_exchange_strong(nobody, c->m->rank);
    for (int i = 0; c->ranks && i < c->ranks->n; i++) {
        const cuda_ctx *other = c->ranks->fellows[i].c;
        if (other && other->abandoned) *(volatile int *)other->abandoned = 1;
    }
    if (c->comm) ncclCommAbort(c->comm);
    c->comm = NULL;
#else
    (void)c;
#endif
}

#ifdef QWEN3_CUDA_NCCL
/* An error that names the lost rank, if there is one other or it has said so itself */
static qwen3_result lost(cuda_ctx *c, const char *how, const qwen3i_err *err) {
    const int rank = c->m->rank, n = c->m->n_ranks, by = c->ranks ? (int)c->ranks->broken_by : -1;
    char other[32] = "another rank";
    if (n == 2 || (by >= 0 && by != rank)) snprintf(other, sizeof other, "rank %d", n == 2 ? 1 - rank : by);
    give_up(c);
    return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: rank %d of %d: %s %s", rank, n, other, how);
}

/* Until an event has come, but no longer than RANK_SECONDS, or until another rank is lost */
static qwen3_result wait_for_ranks(cuda_ctx *c, cudaEvent_t event, const qwen3i_err *err) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(RANK_SECONDS);
    cudaError_t e = cudaErrorNotReady;
    while (e == cudaErrorNotReady) {
        ncclResult_t state = ncclSuccess;
        e = cudaEventQuery(event);
        if (c->comm && !is_broken(c)) NCCL_TRY(ncclCommGetAsyncError(c->comm, &state));
        if (is_broken(c) || !c->comm || (state != ncclSuccess && state != ncclInProgress))
            return lost(c, "has failed", err);
        if (e != cudaErrorNotReady) break;
        if (std::chrono::steady_clock::now() > end)
            return lost(c, "does not answer within QWEN3_CUDA_RANK_SECONDS", err);
        std::this_thread::yield();
    }
    return QWEN3_OK;
}
#endif

static qwen3_result wait_for(cuda_ctx *c, cudaEvent_t event, const qwen3i_err *err) {
#ifdef QWEN3_CUDA_NCCL
    if (c->m->n_ranks > 1) TRY(wait_for_ranks(c, event, err));
#else
    (void)c;
#endif
    CUDA_TRY(cudaEventSynchronize(event));
    return QWEN3_OK;
}

/* For all that was enqueued; an upload's event does, which is then over, too. */
static qwen3_result wait_for_all(cuda_ctx *c, const qwen3i_err *err) {
    cudaEvent_t done = c->uploaded[c->next_slot];
    CUDA_TRY(cudaEventRecord(done, c->stream));
    return wait_for(c, done, err);
}

/* Nothing of the caller's or of an upload is in use any more. */
static qwen3_result end_failed(cuda_ctx *c, qwen3_result r) {
    if (c->m->n_ranks > 1 && (r == QWEN3_ERR_DEVICE || r == QWEN3_ERR_DEVICE_MEMORY)) give_up(c);
    cudaStreamSynchronize(c->stream);
    return r;
}

/* Before a context is released: a step begun ahead may wait for a rank that is lost. */
static void end_work(cuda_ctx *c) {
    const qwen3i_err nobody = {NULL, 0};
    if (!c->stream) return;
    device_guard guard(c->m->device);
#ifdef QWEN3_CUDA_NCCL
    if (c->comm) end_failed(c, wait_for_all(c, &nobody));
#else
    (void)nobody;
#endif
    cudaStreamSynchronize(c->stream);
}

/* ================================================================================================
   STEPS: uploads, graphs, batches
   ================================================================================================ */
/* The next slot for an upload, once its last one is done. */
static qwen3_result begin_upload(cuda_ctx *c, int *slot, const qwen3i_err *err) {
    *slot = c->next_slot;
    c->next_slot = (c->next_slot + 1) % RING;
    return wait_for(c, c->uploaded[*slot], err);
}

template <class T> static cudaError_t send(cuda_ctx *c, T *to, const T *from, int n) {
    return n > 0 ? cudaMemcpyAsync(to, from, (size_t)n * sizeof(T), cudaMemcpyHostToDevice, c->stream) :
                   cudaSuccess;
}

/* The tiles of attention: consecutive tokens of one sequence. Returns how many. */
static int make_tiles(const cuda_ctx *c, const qwen3i_batch *b, attention_tile *tiles) {
    const int most_tokens =
        (c->hopper_kv && path_for(c, b->n_rows)->tiles_of_halves ? LARGE_POS : TILE_ROWS) / c->group;
    int n = 0;
    for (int i = 0; i < b->n_rows; i += tiles[n++].n_tokens) {
        attention_tile *t = &tiles[n];
        t->row0 = i;
        t->seq = b->seqs[i];
        t->pos0 = b->positions[i];
        t->n_tokens = 1;
        while (i + t->n_tokens < b->n_rows && t->n_tokens < most_tokens &&
               b->seqs[i + t->n_tokens] == t->seq && b->positions[i + t->n_tokens] == t->pos0 + t->n_tokens)
            t->n_tokens++;
    }
    return n;
}

static bool one_row_each(const qwen3i_batch *b) {
    for (int i = 1; i < b->n_rows; i++) if (b->seqs[i] == b->seqs[i - 1]) return false;
    return true;
}

/* Where in c->kept a sequence's logits are, and will be `ahead` steps later. */
static int kept_slot(const cuda_ctx *c, int seq, int ahead) {
    return KEPT * seq + (c->current[seq] + ahead) % KEPT;
}
static void kept_advance(cuda_ctx *c, int seq) { c->current[seq] = (c->current[seq] + 1) % KEPT; }

/* Rows and outs to the device. n_tiles: 0 if attention is to go row by row. */
static qwen3_result upload_batch(cuda_ctx *c, const qwen3i_batch *b, int *n_tiles, const qwen3i_err *err) {
    int at;
    TRY(begin_upload(c, &at, err));
    upload_slot *slot = &c->slots[at];
    for (int i = 0; i < b->n_rows; i++) {
        row_info *r = &slot->rows[i];
        const qwen3i_out *o = i < b->n_outs ? &b->outs[i] : NULL;
        r->token = b->tokens[i];
        r->seq = b->seqs[i];
        r->position = b->positions[i];
        r->out_row = o ? o->row : 0;
        r->out_slot = o && o->keep_seq >= 0 ? kept_slot(c, o->keep_seq, 1) : -1;
        r->out_target = o && o->logprob ? o->target : -1;
    }
    *n_tiles = c->tiles && b->n_rows > most_single(c) && (!one_row_each(b) || b->n_rows > c->narrow_rows)
                   ? make_tiles(c, b, slot->tiles) : 0;
    CUDA_TRY(send(c, c->rows, slot->rows, b->n_rows));
    CUDA_TRY(send(c, c->tile_list, slot->tiles, *n_tiles));
    CUDA_TRY(cudaEventRecord(c->uploaded[at], c->stream));
    return QWEN3_OK;
}

/* A decode step of n rows that are on the device: all layers, and logits to where they are kept. */
static qwen3_result enqueue_step(cuda_ctx *c, cudaStream_t s, int n, const qwen3i_err *err) {
    pass p = make_pass(c, s, n, 0, err);
    TRY(all_layers(&p, false));
    for (int first = 0; first < n; first += head_rows(c)) {
        const int count = least(n - first, head_rows(c));
        TRY(head_norm(&p, first, count));
        TRY(head_logits(&p, first, count, true));
    }
    return QWEN3_OK;
}

/* A graph of what enqueue() puts on c->capture. */
template <class F>
static qwen3_result capture(cuda_ctx *c, cudaGraphExec_t *out, F enqueue, const qwen3i_err *err) {
    cudaGraph_t graph = NULL;
    CUDA_TRY(cudaStreamBeginCapture(c->capture, cudaStreamCaptureModeThreadLocal));
    const qwen3_result r = enqueue();
    const cudaError_t e = cudaStreamEndCapture(c->capture, &graph);
    if (r != QWEN3_OK) { if (graph) cudaGraphDestroy(graph); return r; }
    CUDA_TRY(e);
    const cudaError_t made = cudaGraphInstantiate(out, graph, 0);
    cudaGraphDestroy(graph);
    CUDA_TRY(made);
    return QWEN3_OK;
}

/* The same by its graph: plainly the first time, which loads all code and makes all plans. */
static qwen3_result run_step(cuda_ctx *c, int n, const qwen3i_err *err) {
    if (c->runs[n] == 0) { c->runs[n] = 1; return enqueue_step(c, c->stream, n, err); }
    if (!c->graphs[n])
        TRY(capture(c, &c->graphs[n], [&] { return enqueue_step(c, c->capture, n, err); }, err));
    CUDA_TRY(cudaGraphLaunch(c->graphs[n], c->stream));
    return QWEN3_OK;
}

/* Does the batch ask for no more than a decode step gives? */
static bool is_step(const cuda_ctx *c, const qwen3i_batch *b) {
    if (b->n_rows > c->desc.max_seqs || b->n_outs != b->n_rows || !one_row_each(b)) return false;
    for (int i = 0; i < b->n_outs; i++) {
        const qwen3i_out *o = &b->outs[i];
        if (o->row != i || o->keep_seq < 0 || o->logits || o->later || o->hidden || o->logprob) return false;
    }
    return true;
}

/* Outs first .. first + n to the host and to where they are kept. */
static qwen3_result deliver(const pass *p, const qwen3i_out *outs, int first, int n) {
    cuda_ctx *c = p->c;
    const qwen3i_err *err = p->err;
    const size_t embd = (size_t)c->m->config.n_embd, vocab = (size_t)c->m->config.n_vocab;
    const bool mine = !c->ranks || c->m->rank == 0;
    bool any = false, more = false, probs = false;
    for (int i = first; i < first + n; i++) {
        more = more || outs[i].logits || outs[i].later || outs[i].logprob;
        any = any || outs[i].keep_seq >= 0 || more;
        probs = probs || outs[i].logprob;
    }
    TRY(head_norm(p, first, n));
    for (int i = 0; i < n; i++)
        if (outs[first + i].hidden && mine)
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].hidden, c->h + i * c->embd_ld, embd * sizeof(float),
                                     cudaMemcpyDeviceToHost, p->s));
    if (any) TRY(head_logits(p, first, n, !more));
    for (int i = 0; i < n; i++)
        if (outs[first + i].logits && mine)
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].logits, c->logits + i * vocab, vocab * sizeof(float),
                                     cudaMemcpyDeviceToHost, p->s));
    if (!probs) return QWEN3_OK;
    RUN(grid1(n), 1024, 0, logprob_kernel, c->logprobs, (const float *)c->logits,
        (const row_info *)c->rows + first, (int)vocab);
    for (int i = 0; i < n; i++)
        if (outs[first + i].logprob && mine)
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].logprob, c->logprobs + i, sizeof(float),
                                     cudaMemcpyDeviceToHost, p->s));
    return QWEN3_OK;
}

/* Wait for all that was enqueued, asking the cancel hook meanwhile. */
static qwen3_result wait(cuda_ctx *c, const qwen3i_err *err) {
    /* of the upload before, which is over by then */
    cudaEvent_t done = c->uploaded[(c->next_slot + RING - 1) % RING];
    cudaError_t e;
    CUDA_TRY(cudaEventRecord(done, c->stream));
    while (c->desc.cancel && (e = cudaEventQuery(done)) != cudaSuccess) {
        if (e != cudaErrorNotReady) return cuda_fail(err, e, "evaluating");
        if (cancelled(c)) {
            CUDA_TRY(cudaEventSynchronize(done));
            return qwen3i_fail(err, QWEN3_STOPPED, "cancelled");
        }
    }
    return wait_for(c, done, err);
}

/* Need nobody wait for a batch? Rows whose logits are asked for later are, then. */
static bool is_for_later(const cuda_ctx *c, const qwen3i_batch *b) {
    bool later = false;
    for (int i = 0; i < b->n_outs; i++) {
        const qwen3i_out *o = &b->outs[i];
        if (o->logits || o->hidden || o->logprob) return false;
        later = later || o->later;
    }
    return later && !c->desc.cancel;
}

static qwen3_result run_batch(cuda_ctx *c, const qwen3i_batch *b, int n_tiles, const qwen3i_err *err) {
    pass p = make_pass(c, c->stream, b->n_rows, n_tiles, err);
    p.n_outs = b->n_outs;
    TRY(all_layers(&p, true));
    for (int i = 0; i < b->n_outs; i += head_rows(c)) {
        if (i > 0 && cancelled(c)) return qwen3i_fail(err, QWEN3_STOPPED, "cancelled");
        TRY(deliver(&p, b->outs, i, least(head_rows(c), b->n_outs - i)));
    }
    return is_for_later(c, b) ? QWEN3_OK : wait(c, err);
}

static qwen3_result forward_own(cuda_ctx *c, const qwen3i_batch *b, const qwen3i_err *err) {
    device_guard guard(c->m->device);
    int n_tiles;
    if (guard.status != cudaSuccess) return end_failed(c, cuda_fail(err, guard.status, "cudaSetDevice"));
    c->ahead.n = 0;
    qwen3_result r = upload_batch(c, b, &n_tiles, err);
    if (r == QWEN3_OK) r = is_step(c, b) ? run_step(c, b->n_rows, err) : run_batch(c, b, n_tiles, err);
    if (r != QWEN3_OK) return end_failed(c, r);
    for (int i = 0; i < b->n_outs; i++) if (b->outs[i].keep_seq >= 0) kept_advance(c, b->outs[i].keep_seq);
    return QWEN3_OK;
}

/* ---- decode steps that choose for themselves ------------------------------------------------------- */
/* A sampler without what does not matter here, so that two can be compared. */
static qwen3_sampler plain_sampler(const qwen3_sampler *s) {
    qwen3_sampler out;
    memset(&out, 0, sizeof out);
    if (!s) return out;
    out.temperature = s->temperature; out.top_p = s->top_p; out.min_p = s->min_p; out.top_k = s->top_k;
    out.repeat_penalty = s->repeat_penalty;
    out.presence_penalty = s->presence_penalty;
    out.penalty_last_n = s->penalty_last_n;
    out.rng = s->rng;
    out.n_bias = s->n_bias;
    return out;
}

static u64 bias_hash(const qwen3_sampler *s) {
    u64 h = 14695981039346656037u;      /* FNV-1a */
    for (int i = 0; s && i < s->n_bias; i++) {
        unsigned bits;
        memcpy(&bits, &s->bias[i].bias, 4);
        h = (h ^ (unsigned)s->bias[i].token) * 1099511628211u;
        h = (h ^ bits) * 1099511628211u;
    }
    return h;
}

/* How an item, one of the step's, is to choose, `ahead` (0 or 1) steps after what it holds. Returns 0 if the
   lists do not fit. */
static int make_choice(const cuda_ctx *c, const qwen3i_next *item, int index, int ahead, upload_slot *slot,
                       choice *out, int *n_lists) {
    const qwen3_sampler *s = item->sampler;
    const int length = item->n + ahead;
    memset(out, 0, sizeof *out);
    out->slot = kept_slot(c, item->seq, ahead);
    out->list_at = *n_lists;
    if (item->mask) {
        const size_t words = (size_t)ceil_div(c->m->config.n_vocab, 32);
        out->mask = slot->masks + (size_t)index * words;
        memcpy(slot->masks + (size_t)index * words, item->mask, words * sizeof *slot->masks);
        out->adjust = 1;
    }
    if (!s) return 1;
    out->temperature = s->temperature;
    out->top_p = s->top_p;
    out->min_p = s->min_p > 0 ? s->min_p : 0;
    out->top_k = s->top_k;
    out->random = qwen3i_random_at(s->rng, 1 + ahead);
    if (s->n_bias > LISTED_MAX / 8 || s->n_bias > LISTED_MAX - *n_lists) return 0;
    for (int i = 0; i < s->n_bias; i++) {
        slot->lists[*n_lists].token = s->bias[i].token;
        slot->lists[(*n_lists)++].bias = s->bias[i].bias;
    }
    out->n_bias = s->n_bias;
    if (qwen3i_penalises(s)) {
        const int from = qwen3i_penalty_begin(s, length);
        if (item->n - from > LISTED_MAX - *n_lists) return 0;
        for (int i = from; i < item->n; i++) slot->lists[(*n_lists)++].token = item->tokens[i];
        out->n_seen = most(item->n - from, 0);
        out->chain = ahead;
        out->presence = s->presence_penalty;
        out->repeat = s->repeat_penalty;
    }
    out->adjust |= out->n_bias + out->n_seen + out->chain > 0;
    return 1;
}

/* Whose rows the slots of choices are, where those to adjust are copied to, and where the choices go. */
struct choice_rooms { const float *logits; float *copy; int *chosen; };

/* Enqueue the choice of a token for n sequences or rows. What a slot holds of it is read where it is, in host
   memory. */
static qwen3_result enqueue_choices(cuda_ctx *c, int n, bool adjust, const upload_slot *slot,
                                    const choice_rooms &of, const qwen3i_err *err) {
    const int vocab = c->m->config.n_vocab, group = choice_rows(c);
    const size_t seen = (size_t)ceil_div(vocab, 32) * 4;
    const bool early = c->m->capability >= 90;
    for (int i = 0; i < n; i += group) {
        const int count = least(group, n - i);
        const choice *choices = slot->choices + i;
        const row_info *steps = slot->rows + i;
        const float *copy = of.copy;
        if (adjust) {
            CUDA_TRY(launch(c->stream, grid2(CHUNKS, count), 256, 0, copy_logits_kernel, of.copy, of.logits,
                            choices, vocab));
            CUDA_TRY(launch(c->stream, grid1(count), 1024, seen, adjust_kernel, of.copy, choices,
                            (const listed *)c->lists, (const int *)of.chosen + i, vocab));
        }
        CUDA_TRY(launch_early(early, c->stream, grid2(CHUNKS, count), CHUNK_THREADS, 0, best_kernel,
                              c->best + i, c->listed_keys, of.logits, copy, choices, vocab, c->n_choose));
        CUDA_TRY(launch_early(early, c->stream, grid1(count), CHOOSE_THREADS, sizeof(choose_shared),
                              choose_kernel, c->rows + i, steps, of.chosen + i, slot->report + i,
                              c->best + i, (const candidates *)c->listed_keys, of.logits, copy, choices,
                              vocab, c->n_choose));
    }
    return QWEN3_OK;
}

static bool may_adjust(const cuda_ctx *c) {
    return ceil_div(c->m->config.n_vocab, 32) * 4 <= 48 * 1024;
}

/* Enqueue a step of n sequences: choose from the logits kept after what they hold (and, ahead, the token
   chosen before), report, evaluate, keep the new logits. UNSUPPORTED: nothing was done. */
static qwen3_result begin_step(cuda_ctx *c, const qwen3i_next *items, int n, int ahead, int *slot_at,
                               const qwen3i_err *err) {
    int n_lists = 0;
    bool adjust = false;
    TRY(begin_upload(c, slot_at, err));
    upload_slot *slot = &c->slots[*slot_at];
    for (int i = 0; i < n; i++) {
        row_info *r = &slot->rows[i];
        if (!make_choice(c, &items[i], i, ahead, slot, &slot->choices[i], &n_lists))
            return QWEN3_ERR_UNSUPPORTED;
        adjust = adjust || slot->choices[i].adjust;
        r->token = 0;
        r->seq = items[i].seq;
        r->position = items[i].n + ahead;
        r->out_row = i;
        r->out_slot = kept_slot(c, items[i].seq, ahead + 1);
        r->out_target = -1;
    }
    if (adjust && !may_adjust(c)) return QWEN3_ERR_UNSUPPORTED;
    CUDA_TRY(send(c, c->lists, slot->lists, n_lists));
    TRY(enqueue_choices(c, n, adjust, slot, {c->kept, c->logits, c->chosen}, err));
    CUDA_TRY(cudaEventRecord(c->uploaded[*slot_at], c->stream));
    CUDA_TRY(cudaEventRecord(c->reported[*slot_at], c->stream));
    return run_step(c, n, err);
}

/* Is the step that was begun ahead the one that is asked for now? */
static bool ahead_fits(const cuda_ctx *c, const qwen3i_next *items, int n) {
    const run_ahead *a = &c->ahead;
    if (a->n != n) return false;
    for (int i = 0; i < n; i++) {
        const qwen3_sampler s = plain_sampler(items[i].sampler);
        if (items[i].mask || a->seqs[i] != items[i].seq || a->lengths[i] != items[i].n ||
            a->last[i] != items[i].tokens[items[i].n - 1] || memcmp(&s, &a->samplers[i], sizeof s) != 0 ||
            a->bias_hashes[i] != bias_hash(items[i].sampler))
            return false;
    }
    return true;
}

/* Begin the step after this one, if all sequences go on and have room for it, and none needs a mask that is
   not known. */
static qwen3_result begin_ahead(cuda_ctx *c, const qwen3i_next *items, int n, const qwen3i_err *err) {
    run_ahead *a = &c->ahead;
    a->n = 0;
    for (int i = 0; i < n; i++) {
        if (items[i].mask || items[i].room == 1 || items[i].n + 1 >= c->desc.max_ctx) return QWEN3_OK;
        a->seqs[i] = items[i].seq;
        a->lengths[i] = items[i].n + 1;
        a->samplers[i] = plain_sampler(items[i].sampler);
        if (a->samplers[i].temperature > 0) a->samplers[i].rng += QWEN3I_RNG_STEP;
        a->bias_hashes[i] = bias_hash(items[i].sampler);
    }
    const qwen3_result r = begin_step(c, items, n, 1, &a->slot, err);
    if (r == QWEN3_OK) a->n = n;
    return r == QWEN3_ERR_UNSUPPORTED ? QWEN3_OK : r;
}

static int ends_turn(const cuda_ctx *c, qwen3_token t) {
    for (int i = 0; i < c->n_eos; i++) if (c->eos[i] == t) return 1;
    return 0;
}

/* Hand out what the device chose. */
static qwen3_result take_choices(cuda_ctx *c, qwen3i_next *items, int n, const int *report,
                                 const qwen3i_err *err) {
    for (int i = 0; i < n; i++) {
        if (report[i] >= 0) continue;
        c->ahead.n = 0;
        return qwen3i_fail(err, QWEN3_ERR_ARG,
                           "every token is banned by bias, or the logits are not numbers");
    }
    for (int i = 0; i < n; i++) {
        items[i].out = report[i];
        items[i].ended = ends_turn(c, report[i]);
        if (items[i].sampler && items[i].sampler->temperature > 0) items[i].sampler->rng += QWEN3I_RNG_STEP;
        c->ahead.last[i] = report[i];
        if (items[i].ended) c->ahead.n = 0;
        else kept_advance(c, items[i].seq);
    }
    return QWEN3_OK;
}

static qwen3_result next_own(cuda_ctx *c, qwen3i_next *items, int n, const qwen3i_err *err) {
    device_guard guard(c->m->device);
    int slot = c->ahead.slot;
    if (guard.status != cudaSuccess) return end_failed(c, cuda_fail(err, guard.status, "cudaSetDevice"));
    qwen3_result r = QWEN3_OK;
    if (!ahead_fits(c, items, n)) {
        c->ahead.n = 0;
        r = begin_step(c, items, n, 0, &slot, err);
    }
    if (r == QWEN3_OK) r = begin_ahead(c, items, n, err);
    if (r == QWEN3_OK) r = wait_for(c, c->reported[slot], err);
    if (r != QWEN3_OK) return end_failed(c, r);
    return take_choices(c, items, n, c->slots[slot].report, err);
}

/* ================================================================================================
   THE REST OF THE BACKEND
   ================================================================================================ */
static float *kept_logits(const cuda_ctx *c, int seq) {
    return c->kept + (size_t)kept_slot(c, seq, 0) * c->m->config.n_vocab;
}

/* Waits for copies from or to the caller, also if one of them could not be enqueued (e). */
static qwen3_result finish_copies(cuda_ctx *c, cudaError_t e, const qwen3i_err *err) {
    const qwen3_result r = c->m->n_ranks > 1 ? wait_for_all(c, err) : QWEN3_OK;
    if (r != QWEN3_OK) return end_failed(c, r);
    const cudaError_t done = cudaStreamSynchronize(c->stream);
    if (e == cudaSuccess) e = done;
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(err, e, "a copy");
}

/* f(context, rank, err) of every rank at once */
template <class F> static qwen3_result run_job(const void *f, cuda_ctx *c, int rank, const qwen3i_err *err) {
    return (*(const F *)f)(c, rank, err);
}
template <class F> static qwen3_result together(cuda_ctx *c, const F &f, const qwen3i_err *err) {
    rank_group *g = c->ranks;
    if (!g) return f(c, 0, err);
    if (g->broken_by >= 0)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: a device has failed before: free the context");
    const rank_job job = {run_job<F>, &f};
    std::unique_lock<std::mutex> held(g->lock);
    g->job = &job;
    g->turn++;
    g->at_work = g->n - 1;
    g->begun.notify_all();
    held.unlock();
    qwen3_result r = f(c, 0, err);
    held.lock();
    while (g->at_work > 0) g->ended.wait(held);
    /* all have the same result, or one has failed and the others say no more than that */
    const fellow *cause = &g->fellows[g->broken_by > 0 ? (int)g->broken_by : 0];
    if (cause->c == c) return r;
    return qwen3i_fail(err, cause->result, "device %d: %s", cause->c->m->device, cause->text);
}
/* The same one after the other: f has no sum over ranks. */
template <class F> static qwen3_result each_rank(cuda_ctx *c, const F &f, const qwen3i_err *err) {
    for (int i = 0; i < (c->ranks ? c->ranks->n : 1); i++) {
        cuda_ctx *own = c->ranks ? c->ranks->fellows[i].c : c;
        device_guard guard(own->m->device);
        CUDA_TRY(guard.status);
        TRY(f(own));
    }
    return QWEN3_OK;
}

#ifdef QWEN3_CUDA_NCCL
/* A thread of a group, for as long as it is there */
static void serve(rank_group *g, int rank) {
    fellow *own = &g->fellows[rank];
    const qwen3i_err err = {own->text, sizeof own->text};
    long seen = 0;
    std::unique_lock<std::mutex> held(g->lock);
    for (;;) {
        while (g->turn == seen && !g->over) g->begun.wait(held);
        if (g->over) return;
        seen = g->turn;
        held.unlock();
        const qwen3_result r = g->job->run(g->job->what, own->c, rank, &err);
        held.lock();
        own->result = r;
        if (--g->at_work == 0) g->ended.notify_one();
    }
}
#endif

static void end_group(rank_group *g, const qwen3_allocator *a, int max_seqs) {
    g->lock.lock();
    g->over = true;
    g->lock.unlock();
    g->begun.notify_all();
    /* one writes to the memory of another */
    for (int i = 0; i < g->n; i++) if (g->fellows[i].c) end_work(g->fellows[i].c);
    for (int i = 1; i < g->n; i++) {
        fellow *f = &g->fellows[i];
        if (f->thread.joinable()) f->thread.join();
        free_own(f->c);
        host_free(a, f->items, (size_t)max_seqs * sizeof *f->items);
        host_free(a, f->samplers, (size_t)max_seqs * sizeof *f->samplers);
    }
    g->fellows[0].c->ranks = NULL;
    g->~rank_group();
    host_free(a, g, sizeof *g);
}

static void free_ctx(void *ctx_state) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    if (c && c->ranks) end_group(c->ranks, &c->desc.allocator, c->desc.max_seqs);
    else if (c) end_work(c);
    free_own(c);
}

#ifdef QWEN3_CUDA_NCCL
/* A communicator of this context's own for each of its ranks in this process */
static qwen3_result split_ranks(cuda_ctx *c, const qwen3i_err *err) {
    ncclResult_t e = ncclGroupStart();
    const qwen3_result r = each_rank(c, [&](cuda_ctx *own) {
        if (e == ncclSuccess) e = ncclCommSplit(own->m->comm, 0, own->m->rank, &own->comm, NULL);
        return QWEN3_OK;
    }, err);
    const ncclResult_t ended = ncclGroupEnd();
    TRY(r);
    NCCL_TRY(e);
    NCCL_TRY(ended);
    return QWEN3_OK;
}

static qwen3_result begin_fellow(rank_group *g, int i, cuda_ctx *first, const qwen3_model *model,
                                 const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    const size_t seqs = (size_t)desc->max_seqs;
    cuda_model *m = first->m->fellows[i];
    fellow *f = &g->fellows[i];
    void *state = NULL;
    TRY(create_ctx_for(paths_of(m, desc), &state, m, model, desc, err));
    f->c = (cuda_ctx *)state;
    f->c->ranks = g;
    f->items = (qwen3i_next *)host_alloc(&desc->allocator, seqs * sizeof *f->items);
    f->samplers = (qwen3_sampler *)host_alloc(&desc->allocator, seqs * sizeof *f->samplers);
    return f->items && f->samplers ? QWEN3_OK : no_host_memory(err, seqs * sizeof *f->items);
}

/* can: may kernels on one device write to the other's memory? */
static qwen3_result reach(int from, int to, int *can, const qwen3i_err *err) {
    device_guard guard(from);
    CUDA_TRY(guard.status);
    CUDA_TRY(cudaDeviceCanAccessPeer(can, from, to));
    if (!*can) return QWEN3_OK;
    const cudaError_t e = cudaDeviceEnablePeerAccess(to, 0);
    if (e != cudaErrorPeerAccessAlreadyEnabled) CUDA_TRY(e);
    cudaGetLastError();
    return QWEN3_OK;
}

/* Sums of few rows by peer access, if every device reaches all others; else NCCL does them, too. */
static qwen3_result find_peers(rank_group *g, const qwen3i_err *err) {
    peer_ranks all = peer_ranks();
    int can = 1;
    for (int i = 0; i < g->n; i++) {
        const cuda_ctx *c = g->fellows[i].c;
        all.parts[i] = c->peer_parts;
        all.kept[i] = c->kept;
        all.flags[i] = c->peer_flags;
        for (int j = 0; j < g->n && can; j++)
            if (j != i) TRY(reach(c->m->device, g->fellows[j].c->m->device, &can, err));
    }
    for (int i = 0; i < g->n; i++) {
        g->fellows[i].c->peers = all;
        g->fellows[i].c->has_peers = can != 0;
    }
    return QWEN3_OK;
}

/* The others of a context of rank 0 */
static qwen3_result begin_group(cuda_ctx *c, const qwen3_model *model, const qwen3_ctx_desc *desc,
                                const qwen3i_err *err) {
    void *memory = host_alloc(&desc->allocator, sizeof(rank_group));
    qwen3_ctx_desc theirs = *desc;
    if (!memory) return no_host_memory(err, sizeof(rank_group));
    c->ranks = new (memory) rank_group();
    c->ranks->n = c->m->n_ranks;
    c->ranks->broken_by = -1;
    c->ranks->fellows[0].c = c;
    theirs.cancel = NULL;
    theirs.stream = NULL;
    for (int i = 1; i < c->ranks->n; i++) TRY(begin_fellow(c->ranks, i, c, model, &theirs, err));
    TRY(split_ranks(c, err));
    TRY(find_peers(c->ranks, err));
    for (int i = 1; i < c->ranks->n; i++)
        if (!begin_thread(&c->ranks->fellows[i].thread, [=] { serve(c->ranks, i); }))
            return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: no thread could be started for device %d",
                               c->m->fellows[i]->device);
    return QWEN3_OK;
}
#endif

static qwen3_result create_ctx(void **ctx_state, void *model_state, const qwen3_model *model,
                               const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    const cuda_model *m = (const cuda_model *)model_state;
    qwen3_ctx_desc own = *desc;
    qwen3_result r = QWEN3_OK;
    if (m->n_ranks > 1) own.cancel = NULL;
    TRY(create_ctx_for(paths_of(m, &own), ctx_state, model_state, model, &own, err));
#ifdef QWEN3_CUDA_NCCL
    cuda_ctx *c = (cuda_ctx *)*ctx_state;
    if (m->n_ranks > 1) c->cancel = desc->cancel, c->cancel_user = desc->cancel_user;
    if (m->n_ranks > 1) r = m->fellows ? begin_group(c, model, desc, err) : split_ranks(c, err);
#endif
    if (r == QWEN3_OK) return r;
    free_ctx(*ctx_state);
    *ctx_state = NULL;
    return r;
}

#ifdef QWEN3_CUDA_NCCL
/* One process asks its caller; of several all have to know what each was told. */
static qwen3_result agree(cuda_ctx *c, int *stop, const qwen3i_err *err) {
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    CUDA_TRY(cudaMemcpyAsync(c->stopped, stop, sizeof *stop, cudaMemcpyHostToDevice, c->stream));
    NCCL_TRY(ncclAllReduce(c->stopped, c->stopped, 1, ncclInt, ncclMax, c->comm, c->stream));
    CUDA_TRY(cudaMemcpyAsync(stop, c->stopped, sizeof *stop, cudaMemcpyDeviceToHost, c->stream));
    return wait_for_all(c, err);
}
#endif

/* Before each step */
static qwen3_result check_cancelled(cuda_ctx *c, const qwen3i_err *err) {
    int stop = c->cancel ? c->cancel(c->cancel_user) != 0 : cancelled(c);
#ifdef QWEN3_CUDA_NCCL
    if (c->m->n_ranks > 1 && !c->ranks && !c->comm)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: a rank has failed before: free the context");
    if (c->m->n_ranks > 1 && !c->ranks && c->cancel) {
        const qwen3_result r = agree(c, &stop, err);
        if (r != QWEN3_OK) return end_failed(c, r);
    }
#endif
    return stop ? qwen3i_fail(err, QWEN3_STOPPED, "cancelled") : QWEN3_OK;
}

static qwen3_result forward(void *ctx_state, const qwen3i_batch *b, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    TRY(check_cancelled(c, err));
    return together(c, [=](cuda_ctx *own, int, const qwen3i_err *e) { return forward_own(own, b, e); }, err);
}

static qwen3_result next(void *ctx_state, qwen3i_next *items, int n, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    TRY(check_cancelled(c, err));
    for (int k = 1; c->ranks && k < c->ranks->n; k++) {
        const fellow *f = &c->ranks->fellows[k];
        for (int i = 0; i < n; i++) {
            f->items[i] = items[i];
            if (!items[i].sampler) continue;
            f->samplers[i] = *items[i].sampler;
            f->items[i].sampler = &f->samplers[i];
        }
    }
    return together(c, [=](cuda_ctx *own, int rank, const qwen3i_err *e) {
        return next_own(own, rank == 0 ? items : own->ranks->fellows[rank].items, n, e);
    }, err);
}

static qwen3_result logits(void *ctx_state, int seq, const float **out, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    *out = c->host_logits;
    return finish_copies(c,
                         cudaMemcpyAsync(c->host_logits, kept_logits(c, seq),
                                         (size_t)c->m->config.n_vocab * sizeof(float), cudaMemcpyDeviceToHost,
                                         c->stream),
                         err);
}

static qwen3_result set_logits(void *ctx_state, int seq, const float *from, const qwen3i_err *err) {
    return each_rank((cuda_ctx *)ctx_state, [=](cuda_ctx *c) {
        c->ahead.n = 0;
        return finish_copies(c,
                             cudaMemcpyAsync(kept_logits(c, seq), from,
                                             (size_t)c->m->config.n_vocab * sizeof(float),
                                             cudaMemcpyHostToDevice, c->stream),
                             err);
    }, err);
}

/* What deliver left in c->logits */
static qwen3_result row_logits(void *ctx_state, int out, const float **logits, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    const size_t vocab = (size_t)c->m->config.n_vocab;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    *logits = c->host_logits;
    return finish_copies(c,
                         cudaMemcpyAsync(c->host_logits, c->logits + (size_t)out * vocab,
                                         vocab * sizeof(float), cudaMemcpyDeviceToHost, c->stream),
                         err);
}

static qwen3_result keep_row(void *ctx_state, int seq, int out, const qwen3i_err *err) {
    return each_rank((cuda_ctx *)ctx_state, [=](cuda_ctx *c) {
        const size_t vocab = (size_t)c->m->config.n_vocab;
        CUDA_TRY(cudaMemcpyAsync(kept_logits(c, seq), c->logits + (size_t)out * vocab, vocab * sizeof(float),
                                 cudaMemcpyDeviceToDevice, c->stream));
        return QWEN3_OK;
    }, err);
}

/* How the i-th row after what an item holds is to choose, if those before it were right. */
static int make_guess_choice(const cuda_ctx *c, const qwen3i_next *item, int out, int i, upload_slot *slot,
                             int *n_lists) {
    const bool sampled = item->sampler && item->sampler->temperature > 0;
    qwen3i_next row = *item;
    qwen3_sampler sampler;
    row.n += i;
    if (sampled) {
        sampler = *item->sampler;
        sampler.rng += (u64)i * QWEN3I_RNG_STEP;
        row.sampler = &sampler;
    }
    slot->rows[i] = row_info();
    if (!make_choice(c, &row, i, 0, slot, &slot->choices[i], n_lists)) return 0;
    if (out >= 0) slot->choices[i].slot = out + i;
    return 1;
}

/* Of rows' logits, copies lie behind the rows themselves; a step begun ahead keeps its choices. */
static qwen3_result choose(void *ctx_state, const qwen3i_next *item, int out, int n, qwen3_token *chosen,
                           const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    const size_t vocab = (size_t)c->m->config.n_vocab;
    device_guard guard(c->m->device);
    bool adjust = false;
    int n_lists = 0, at;
    CUDA_TRY(guard.status);
    TRY(begin_upload(c, &at, err));
    upload_slot *slot = &c->slots[at];
    for (int i = 0; i < n; i++) {
        if (!make_guess_choice(c, item, out, i, slot, &n_lists)) return QWEN3_ERR_UNSUPPORTED;
        adjust = adjust || slot->choices[i].adjust;
    }
    if (adjust && (!may_adjust(c) || (out >= 0 && head_rows(c) < 2 * SAME_ROWS)))
        return QWEN3_ERR_UNSUPPORTED;
    CUDA_TRY(send(c, c->lists, slot->lists, n_lists));
    const choice_rooms kept = {c->kept, c->logits, c->chosen + c->desc.max_seqs},
                       rows = {c->logits, c->logits + SAME_ROWS * vocab, kept.chosen};
    TRY(enqueue_choices(c, n, adjust, slot, out >= 0 ? rows : kept, err));
    CUDA_TRY(cudaEventRecord(c->uploaded[at], c->stream));
    TRY(wait_for(c, c->uploaded[at], err));
    for (int i = 0; i < n; i++) chosen[i] = slot->report[i];
    return QWEN3_OK;
}

static size_t kv_row_bytes(const cuda_ctx *c) {
    return (size_t)c->kv_dim * qwen3i_type_size((qwen3i_type)c->desc.kv_type);
}

/* The byte in c->k or c->v where a sequence's positions begin. */
static size_t kv_begin(const cuda_ctx *c, int seq, int layer) {
    return (size_t)layer * c->kv_layer_bytes + (size_t)seq * c->desc.max_ctx * kv_row_bytes(c);
}

static qwen3_result seq_copy(void *ctx_state, int dst, int src, int n_pos, const qwen3i_err *err) {
    if (dst == src) return QWEN3_OK;
    return each_rank((cuda_ctx *)ctx_state, [=](cuda_ctx *c) {
        const size_t bytes = (size_t)n_pos * kv_row_bytes(c), pitch = c->kv_layer_bytes,
                     layers = (size_t)c->m->config.n_layer;
        c->ahead.n = 0;
        for (char *cache : {c->k, c->v})
            if (bytes > 0)
                CUDA_TRY(cudaMemcpy2DAsync(cache + kv_begin(c, dst, 0), pitch, cache + kv_begin(c, src, 0),
                                           pitch, bytes, layers, cudaMemcpyDeviceToDevice, c->stream));
        CUDA_TRY(cudaMemcpyAsync(kept_logits(c, dst), kept_logits(c, src),
                                 (size_t)c->m->config.n_vocab * sizeof(float), cudaMemcpyDeviceToDevice,
                                 c->stream));
        return QWEN3_OK;
    }, err);
}

/* Where a rank's heads are in rows of all, whose bytes are *row. */
static size_t kv_share(const cuda_ctx *c, int rank, size_t *row) {
    const size_t head = kv_row_bytes(c) / (size_t)c->m->config.n_head_kv;
    *row = head * (size_t)c->m->all_kv;
    return head * (size_t)kv_begins(rank, c->m->all_kv, c->m->n_ranks);
}

#ifdef QWEN3_CUDA_NCCL
/* Rows of all ranks, of which each process has some columns: all of them make this call. */
static qwen3_result gather_kv(cuda_ctx *c, char *to, const char *cache, int n_pos, const qwen3i_err *err) {
    const size_t own = kv_row_bytes(c), ranks = (size_t)c->m->n_ranks;
    const int step = (int)least((size_t)n_pos, c->gathered_size / (own * ranks));
    size_t row;
    kv_share(c, 0, &row);
    for (int first = 0; first < n_pos; first += step) {
        const size_t n = (size_t)least(step, n_pos - first);
        NCCL_TRY(ncclAllGather(cache + (size_t)first * own, c->gathered, n * own, ncclChar, c->comm,
                               c->stream));
        for (size_t r = 0; r < ranks; r++)
            CUDA_TRY(cudaMemcpy2DAsync(to + (size_t)first * row + kv_share(c, (int)r, &row), row,
                                       c->gathered + r * n * own, own, own, n, cudaMemcpyDeviceToHost,
                                       c->stream));
    }
    return QWEN3_OK;
}
#endif

static qwen3_result kv_read(void *ctx_state, int seq, int layer, int n_pos, void *k, void *v,
                            const qwen3i_err *err) {
    if (n_pos == 0) return QWEN3_OK;
#ifdef QWEN3_CUDA_NCCL
    cuda_ctx *mine = (cuda_ctx *)ctx_state;
    if (mine->m->n_ranks > 1 && !mine->ranks) {
        device_guard guard(mine->m->device);
        const size_t begin = kv_begin(mine, seq, layer);
        CUDA_TRY(guard.status);
        qwen3_result r = gather_kv(mine, (char *)k, mine->k + begin, n_pos, err);
        if (r == QWEN3_OK) r = gather_kv(mine, (char *)v, mine->v + begin, n_pos, err);
        return r == QWEN3_OK ? finish_copies(mine, cudaSuccess, err) : end_failed(mine, r);
    }
#endif
    return each_rank((cuda_ctx *)ctx_state, [=](cuda_ctx *c) {
        size_t row, at = kv_begin(c, seq, layer), own = kv_row_bytes(c), to = kv_share(c, c->m->rank, &row),
                    n = (size_t)n_pos;
        cudaError_t e =
            cudaMemcpy2DAsync((char *)k + to, row, c->k + at, own, own, n, cudaMemcpyDeviceToHost, c->stream);
        if (e == cudaSuccess)
            e = cudaMemcpy2DAsync((char *)v + to, row, c->v + at, own, own, n, cudaMemcpyDeviceToHost,
                                  c->stream);
        return finish_copies(c, e, err);
    }, err);
}

static qwen3_result kv_write(void *ctx_state, int seq, int layer, int n_pos, const void *k, const void *v,
                             const qwen3i_err *err) {
    return each_rank((cuda_ctx *)ctx_state, [=](cuda_ctx *c) {
        size_t row, at = kv_begin(c, seq, layer), own = kv_row_bytes(c), from = kv_share(c, c->m->rank, &row),
                    n = (size_t)n_pos;
        c->ahead.n = 0;
        if (n == 0) return QWEN3_OK;
        cudaError_t e = cudaMemcpy2DAsync(c->k + at, own, (const char *)k + from, row, own, n,
                                          cudaMemcpyHostToDevice, c->stream);
        if (e == cudaSuccess)
            e = cudaMemcpy2DAsync(c->v + at, own, (const char *)v + from, row, own, n, cudaMemcpyHostToDevice,
                                  c->stream);
        return finish_copies(c, e, err);
    }, err);
}

} /* namespace */

extern "C" const qwen3_backend *qwen3_cuda_backend(void) {
    static const qwen3_backend backend = {
        QWEN3_VERSION, "cuda", 2048,
        create_model, free_model, device_name,
        ctx_memory, create_ctx, free_ctx, forward, logits, next, seq_copy, kv_read, kv_write, set_logits,
        row_logits, keep_row, choose,
        1, 1, 1, 0,                     /* matrices in blocks, experts, orders; factors: on the CPU alone */
#ifdef QWEN3_CUDA_NCCL
        1,                              /* several devices */
#else
        0,
#endif
        start, started
    };
    return &backend;
}
