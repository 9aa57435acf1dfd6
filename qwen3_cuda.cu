/* qwen3_cuda.cu - the CUDA backend of qwen3.h, behind one symbol: qwen3_cuda_backend().

       nvcc -O3 -std=c++17 -arch=native -c qwen3_cuda.cu
       cc -O2 app.c qwen3_cuda.o -lcublasLt -lcudart -lstdc++ -lm -lpthread

   Compute capability 7.5 and up. Everything between the matrices is float32: residual, norms, gains,
   rotation, scores, softmax, the SwiGLU product and all accumulators.

   WEIGHTS  F32 and F16 as stored. BF16 is held as F16 times a power of two, one per matrix, which is the
     same two bytes and the same value for everything within 2^32 of the matrix's largest (below that the
     error is under 2^-40 of the largest). So there is one 16-bit format, every tensor core since sm_75
     multiplies it, and what is rounded to it loses 2^-12 instead of 2^-9.
   INPUTS   of a product with at most 8 rows stay float32. With more rows and 16-bit weights each row is
     rounded once, to F16 times a power of two of its own: nothing overflows, whatever its size. The input of
     q, k and v keeps 22 bits, as two such terms and two products: the gains of the norms after it, up to 100
     in real models, blow up what is lost there before the softmax.
   PATHS    FUSED, or STANDARD: cuBLASLt and one plain kernel for each operation.
   ORDER    No sum depends on timing: splits follow from shapes, partial sums are added in a fixed order,
     and atomics only count integers. The same input gives the same bits.

   Rooms: errors and memory, device helpers, kernels in the order of the layer, sampling, matrix products,
   model, context, layer, graphs, decode steps, the backend, single kernels for tests and benches.       */

#define QWEN3_BACKEND_INTERFACE
#include "qwen3.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

typedef __half        half_t;
typedef __nv_bfloat16 bf16_t;

const int MATVEC_ROWS   = 8;            /* up to here matrix-vector kernels, then cuBLASLt */
const int MATVEC_WARPS  = 8;
const int HEAD_ROWS     = 64;           /* rows whose logits are computed at a time */
const int MAX_SPLITS    = 32;           /* of one row's positions, in attention */
const int SPLIT_WARPS   = 4;
const int TILE_ROWS     = 64;           /* (token, head) rows and ...               */
const int TILE_POS      = 32;           /* ... positions of a tile of attention      */
const int RING          = 4;            /* uploads in flight */
const int MAX_HEAD_DIM  = 256;
const size_t WORKSPACE  = (size_t)32 << 20;
const size_t STAGING    = (size_t)16 << 20;
const float LOG2E       = 1.44269504088896f;
const float LOWEST      = -1e30f;       /* stands for minus infinity */

/* ================================================================================================
   ERRORS AND MEMORY
   ================================================================================================ */
static qwen3_result fail(const qwen3i_err *e, qwen3_result code, const char *format, ...) {
    va_list args;
    if (!e || !e->text || e->cap == 0) return code;
    va_start(args, format);
    vsnprintf(e->text, e->cap, format, args);
    va_end(args);
    return code;
}

static qwen3_result cuda_fail(const qwen3i_err *err, cudaError_t e, const char *what) {
    cudaGetLastError();                 /* or the next launch reports it again */
    return fail(err, e == cudaErrorMemoryAllocation ? QWEN3_ERR_DEVICE_MEMORY : QWEN3_ERR_DEVICE,
                "CUDA: %s: %s", what, cudaGetErrorString(e));
}

#define TRY(call) do { const qwen3_result try_ = (call); if (try_ != QWEN3_OK) return try_; } while (0)
#define CUDA_TRY(call) do { const cudaError_t e_ = (call); if (e_ != cudaSuccess) return cuda_fail(err, e_, #call); } while (0)
#define LT_TRY(call) do { const cublasStatus_t s_ = (call); if (s_ != CUBLAS_STATUS_SUCCESS) \
    return fail(err, QWEN3_ERR_DEVICE, "cuBLASLt: %s: status %d", #call, (int)s_); } while (0)

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

static qwen3_result no_host_memory(const qwen3i_err *err, size_t size) {
    return fail(err, QWEN3_ERR_MEMORY, "out of memory: %llu bytes for the CUDA backend", (unsigned long long)size);
}

/* One block of device (or pinned) memory, handed out in pieces. A dry run (base NULL) measures it. */
struct arena {
    char  *base;
    size_t used;
    template <class T> T *take(size_t n) {
        T *p = base ? (T *)(void *)(base + used) : NULL;
        used += (n * sizeof(T) + 255) / 256 * 256;
        return p;
    }
};

static qwen3_result device_alloc(char **out, size_t size, const char *what, const qwen3i_err *err) {
    size_t free_bytes = 0, total = 0;
    const cudaError_t e = cudaMalloc((void **)out, size);
    if (e == cudaSuccess) return QWEN3_OK;
    *out = NULL;
    if (e != cudaErrorMemoryAllocation) return cuda_fail(err, e, what);
    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total);
    return fail(err, QWEN3_ERR_DEVICE_MEMORY, "out of device memory: %s needs %.1f MiB, %.1f of %.1f MiB are free",
                what, (double)size / 1048576.0, (double)free_bytes / 1048576.0, (double)total / 1048576.0);
}

template <class T> static T least(T a, T b) { return a < b ? a : b; }
template <class T> static T most(T a, T b) { return a > b ? a : b; }
static __host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static __host__ __device__ inline int round_up(int a, int b) { return (a + b - 1) / b * b; }

template <class... P, class... A>
static cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, size_t shared, void (*kernel)(P...), A... args) {
    cudaLaunchConfig_t config = cudaLaunchConfig_t();
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, (P)args...);
}

/* ================================================================================================
   DEVICE HELPERS
   ================================================================================================ */
/* Instructions without a C++ name. An emulator may bring its own. */
#ifndef QWEN3_CUDA_EMULATED
#define QWEN3_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

/* 16 bytes that are read once: past the L1 cache. */
static __device__ __forceinline__ uint4 load_stream(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

static __device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/* 16 bytes from global to shared memory, or zeros if !valid, without waiting (sm_80 on). */
static __device__ __forceinline__ void copy_async(void *dst, const void *src, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(dst)), "l"(src), "r"(valid ? 16 : 0) : "memory");
#else
    *(uint4 *)dst = valid ? *(const uint4 *)src : make_uint4(0, 0, 0, 0);
#endif
}
static __device__ __forceinline__ void copy_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING> static __device__ __forceinline__ void copy_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#endif
}

/* Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. */
static __device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
static __device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

/* d[16, 8] += a[16, 16] b[16, 8] with float32 sums; sm_75 takes two steps of 8. */
static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, half_t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16_t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    (void)d; (void)a; (void)b0; (void)b1;       /* never launched there */
#endif
}
#endif

const unsigned ALL = 0xFFFFFFFFu;

static __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}
static __device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL, v, o));
    return v;
}

/* Over the block, the same bits in every thread: warps by exchange, then the warps in order. shared [32]. */
static __device__ __forceinline__ float block_sum(float v, float *shared) {
    float sum = 0;
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; i++) sum += shared[i];
    __syncthreads();
    return sum;
}
static __device__ __forceinline__ float block_max(float v, float *shared) {
    v = warp_max(v);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; i++) v = fmaxf(v, shared[i]);
    __syncthreads();
    return v;
}

static __device__ __forceinline__ float to_float(float v)  { return v; }
static __device__ __forceinline__ float to_float(half_t v) { return __half2float(v); }
static __device__ __forceinline__ float to_float(bf16_t v) { return __bfloat162float(v); }

/* The one rounding of K and V; values beyond F16's range are clamped. */
static __device__ __forceinline__ void store(float *p, float v)  { *p = v; }
static __device__ __forceinline__ void store(half_t *p, float v) { *p = __float2half_rn(fminf(fmaxf(v, -65504.0f), 65504.0f)); }
static __device__ __forceinline__ void store(bf16_t *p, float v) { *p = __float2bfloat16_rn(v); }

/* 16 bytes of weights or cache to 8 or 4 floats. */
static __device__ __forceinline__ void unpack(float (&f)[8], uint4 v, half_t) {
    const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        f[2 * i] = __half2float(__ushort_as_half((unsigned short)(w[i] & 0xFFFFu)));
        f[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(w[i] >> 16)));
    }
}
static __device__ __forceinline__ void unpack(float (&f)[8], uint4 v, bf16_t) {
    const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        f[2 * i] = __uint_as_float(w[i] << 16);
        f[2 * i + 1] = __uint_as_float(w[i] & 0xFFFF0000u);
    }
}
static __device__ __forceinline__ void unpack(float (&f)[4], uint4 v, float) {
    f[0] = __uint_as_float(v.x); f[1] = __uint_as_float(v.y);
    f[2] = __uint_as_float(v.z); f[3] = __uint_as_float(v.w);
}

/* Two floats as a pair of 16-bit elements, the first in the low half; and what that lost of each. */
static __device__ __forceinline__ unsigned pack(float &a, float &b, half_t) {
    const half_t x = __float2half_rn(a), y = __float2half_rn(b);
    a -= __half2float(x);
    b -= __half2float(y);
    return (unsigned)__half_as_ushort(x) | (unsigned)__half_as_ushort(y) << 16;
}
static __device__ __forceinline__ unsigned pack(float &a, float &b, bf16_t) {
    const bf16_t x = __float2bfloat16_rn(a), y = __float2bfloat16_rn(b);
    a -= __bfloat162float(x);
    b -= __bfloat162float(y);
    return (unsigned)__bfloat16_as_ushort(x) | (unsigned)__bfloat16_as_ushort(y) << 16;
}

/* 2^k such that top * 2^k is in [2^14, 2^15): as far up in F16's range as is safe. 1 for 0 and for what
   is not a number. */
static __device__ __forceinline__ float half_scale(float top) {
    const int exponent = (int)(__float_as_uint(top) >> 23 & 255u);
    if (exponent == 0 || exponent == 255) return 1.0f;
    const int k = 127 + 14 - exponent;
    return __uint_as_float((unsigned)(127 + (k < -100 ? -100 : k > 100 ? 100 : k)) << 23);
}

/* Of n positions the length of each of at most `splits` parts: whole tiles of 32, from n alone. */
static __device__ __forceinline__ int split_length(int n, int splits) { return round_up(ceil_div(n, splits), 32); }

/* ================================================================================================
   KERNELS: rows and cache
   ================================================================================================ */
struct row_info {                       /* row i of a batch, and what is wanted of it; in device memory */
    int token, seq, position;
    int out_row, out_slot, out_target;  /* output i: of which row; where its logits are kept, or -1; its target, or -1 */
};

struct kv_layer {                       /* one layer's cache: [max_seqs, max_ctx, kv_dim] of the KV type */
    void *k, *v;
    int   max_ctx, kv_dim;
};

static __device__ __forceinline__ size_t kv_at(const kv_layer &c, int seq, int pos) {
    return ((size_t)seq * (size_t)c.max_ctx + (size_t)pos) * (size_t)c.kv_dim;
}

/* embed: x[row, :] = E[token, :] * scale, as float32. Exact.
   One block a row. Equal to the CPU's row copy (qwen3i_embed). */
template <class W>
static __global__ void embed_kernel(float *x, const W *table, float scale, const row_info *rows, int width, int ld) {
    const W *from = table + (size_t)rows[blockIdx.x].token * (size_t)ld;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x)
        x[(size_t)blockIdx.x * (size_t)ld + (size_t)i] = to_float(from[i]) * scale;
}

/* rope_table: table[pos, i] = cosine and sine of pos * freqs[i], times scale. One block a position.
   Equals qwen3i_rope_angles: the angle is a float32 product, its cosine is taken in double. */
static __global__ void rope_table_kernel(float2 *table, const float *freqs, int half, float scale) {
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        const float angle = (float)blockIdx.x * freqs[i];
        table[(size_t)blockIdx.x * (size_t)half + (size_t)i] =
            make_float2((float)cos((double)angle) * scale, (float)sin((double)angle) * scale);
    }
}

/* ================================================================================================
   KERNELS: RMSNorm
   ================================================================================================ */
template <int N, class T> static __device__ __forceinline__ void load_n(float (&v)[N], const T *p) {
    if (N == 4 && sizeof(T) == 4) {
        const float4 f = *(const float4 *)(const void *)p;
        v[0] = f.x; v[N > 1 ? 1 : 0] = f.y; v[N > 2 ? 2 : 0] = f.z; v[N > 3 ? 3 : 0] = f.w;
    } else if (N == 4) {
        union { uint2 raw; T t[8 / sizeof(T)]; } u;
        u.raw = *(const uint2 *)(const void *)p;
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = to_float(u.t[i % (8 / (int)sizeof(T))]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = to_float(p[i]);
    }
}
template <int N> static __device__ __forceinline__ void store_n(float *p, const float (&v)[N]) {
    if (N == 4) *(float4 *)(void *)p = make_float4(v[0], v[N > 1 ? 1 : 0], v[N > 2 ? 2 : 0], v[N > 3 ? 3 : 0]);
    else p[0] = v[0];
}

/* rmsnorm: y[row, group, :] = x[row, group, :] * gain / sqrt(mean square + eps), float32 throughout.
   x, y: rows ldx and ldy apart, each of gridDim.y groups of `width`; y may be x; gain [width]; with pad,
   y[row, width .. pad) = 0. Grid (rows, groups). outs: NULL, or row i is made from row out_row of x.
   N elements (4: all aligned, or 1) a thread at a time; order: thread, warp, block.
   Equals qwen3i_rmsnorm; with groups = heads its per-head form. */
template <class T, int N>
static __global__ void __launch_bounds__(1024) rmsnorm_kernel(float *y, int ldy, const T *x, int ldx, const row_info *outs,
                                                       const float *gain, int width, int pad, float eps) {
    __shared__ float shared[32];
    const size_t row = outs ? (size_t)outs[blockIdx.x].out_row : blockIdx.x, group = (size_t)blockIdx.y * (size_t)width;
    const T *in = x + row * (size_t)ldx + group;
    float *out = y + (size_t)blockIdx.x * (size_t)ldy + group;
    const int step = (int)blockDim.x * N, first = (int)threadIdx.x * N;
    float v[N], g[N], sum = 0;
    for (int i = first; i < width; i += step) {
        load_n<N>(v, in + i);
#pragma unroll
        for (int j = 0; j < N; j++) sum += v[j] * v[j];
    }
    const float r = 1.0f / sqrtf(block_sum(sum, shared) / (float)width + eps);
    for (int i = first; i < width; i += step) {
        load_n<N>(v, in + i);
        load_n<N>(g, gain + i);
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = v[j] * r * g[j];
        store_n<N>(out + i, v);
    }
    for (int i = width + (int)threadIdx.x; i < pad; i += (int)blockDim.x) out[i] = 0;
}

/* The input of a matrix product with many rows: float32, or F16 with row r standing for data * scale[r]. With
   rest not 0 what the rounding lost goes that many elements further: the sum of both has 22 bits. */
static __device__ __forceinline__ void store_input(float *p, float v, float, size_t) { *p = v; }
static __device__ __forceinline__ void store_input(half_t *p, float v, float up, size_t rest) {
    const float scaled = v * up;
    const half_t high = __float2half_rn(scaled);
    *p = high;
    if (rest) p[rest] = __float2half_rn(scaled - __half2float(high));
}

/* add_rmsnorm: x[row, :] += add[row, :] * add_scale[row], then out = rmsnorm(x) rounded once to the product's
   input. x [rows, ld] float32 residual; add [rows, ld] or NULL; out [rows, ld], zero from width to ld.
   One block a row; order as rmsnorm. Equals qwen3i_add, qwen3i_rmsnorm, and one rounding. */
template <class O>
static __global__ void __launch_bounds__(1024) add_rmsnorm_kernel(O *out, float *out_scale, float *x, const float *add,
                                                           const float *add_scale, const float *gain,
                                                           int width, int ld, size_t rest, float eps) {
    __shared__ float shared[32];
    const size_t base = (size_t)blockIdx.x * (size_t)ld;
    const float s = add_scale ? add_scale[blockIdx.x] : 1.0f;
    float sum = 0, top = 0, up = 1;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        float v = x[base + (size_t)i];
        if (add) x[base + (size_t)i] = v = v + add[base + (size_t)i] * s;
        sum += v * v;
        top = fmaxf(top, fabsf(v * gain[i]));
    }
    const float r = 1.0f / sqrtf(block_sum(sum, shared) / (float)width + eps);
    if (sizeof(O) == 2) {
        up = half_scale(block_max(top, shared) * r);
        if (threadIdx.x == 0) out_scale[blockIdx.x] = 1.0f / up;
    }
    for (int i = (int)threadIdx.x; i < ld; i += (int)blockDim.x)
        store_input(&out[base + (size_t)i], i < width ? x[base + (size_t)i] * r * gain[i] : 0.0f, up, rest);
}

/* round_rows: the input of a product from float32 rows. in [rows, ld_in], out [rows, ld], zero from width on.
   One block a row. */
template <class O>
static __global__ void round_rows_kernel(O *out, float *out_scale, const float *in, int ld_in, int width, int ld, size_t rest) {
    __shared__ float shared[32];
    const float *from = in + (size_t)blockIdx.x * (size_t)ld_in;
    float top = 0, up = 1;
    if (sizeof(O) == 2) {
        for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) top = fmaxf(top, fabsf(from[i]));
        up = half_scale(block_max(top, shared));
        if (threadIdx.x == 0) out_scale[blockIdx.x] = 1.0f / up;
    }
    for (int i = (int)threadIdx.x; i < ld; i += (int)blockDim.x)
        store_input(&out[(size_t)blockIdx.x * (size_t)ld + (size_t)i], i < width ? from[i] : 0.0f, up, rest);
}

/* add_rows: x[row, :] += add[row, :] * scale[row] (scale NULL: 1). One block a row. Equals qwen3i_add. */
static __global__ void add_rows_kernel(float *x, const float *add, const float *scale, int width, int ld) {
    const size_t base = (size_t)blockIdx.x * (size_t)ld;
    const float s = scale ? scale[blockIdx.x] : 1.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) x[base + (size_t)i] += add[base + (size_t)i] * s;
}

/* scale_rows: x[row, 0 .. width) *= scale[row], after a product of scaled rows. One block a row. */
static __global__ void scale_rows_kernel(float *x, const float *scale, int width, int ld) {
    const float s = scale[blockIdx.x];
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) x[(size_t)blockIdx.x * (size_t)ld + (size_t)i] *= s;
}

/* ================================================================================================
   KERNELS: matrix times 1 to 8 vectors
   ================================================================================================ */
struct matvec_in {
    const void  *w;                     /* [n, ldw], rows 16-byte aligned, zero from k to ldw */
    float        scale;                 /* W = w * scale */
    int          n, k, ldw;
    const float *x;                     /* [rows, ldx] */
    int          rows, ldx;
};

/* x for k in [k0, k0 + TILE) to shared memory, zero past k and past the rows. Groups of V are kept as V / 4
   planes of float4, so that the lanes of a warp read neighbouring 16 bytes. */
template <int V, int R, int TILE> static __device__ __forceinline__ void stage_x(float4 *xs, const matvec_in &in, int k0) {
    for (int i = (int)threadIdx.x; i < R * TILE / 4; i += (int)blockDim.x) {
        const int r = i / (TILE / 4), q = i % (TILE / 4), k = k0 + 4 * q;
        float4 v = make_float4(0, 0, 0, 0);
        if (r < in.rows && k < in.k) {
            const float *p = in.x + (size_t)r * (size_t)in.ldx + k;
            if (k + 4 <= in.k) v = *(const float4 *)(const void *)p;
            else { v.x = p[0]; if (k + 1 < in.k) v.y = p[1]; if (k + 2 < in.k) v.z = p[2]; }
        }
        xs[r * (TILE / 4) + q % (V / 4) * (TILE / V) + q / (V / 4)] = v;
    }
}

/* acc[j][r] = sum over k of W[rows[j]][k] x[r][k], in every lane of the warp. The first weights are asked for
   before anything of x is read. Order: lane l takes elements V l .. V l + V - 1 of each 32 V, lanes are added
   by exchange: it depends on k alone. */
template <class W, int R, int NR>
static __device__ __forceinline__ void dot_rows(float (&acc)[NR][R], const int (&rows)[NR], const matvec_in &in, float4 *xs) {
    const int V = 16 / (int)sizeof(W), U = 8 / NR, BATCH = U * 32 * V, TILE = 8192 / R;
    static_assert(TILE % BATCH == 0, "a batch of loads stays within a tile of x");
    const int lane = (int)threadIdx.x % 32;
    const W *w = (const W *)in.w;
    uint4 next[U][NR], now[U][NR];
#define QWEN3_LOAD(k0) do { \
        _Pragma("unroll") for (int u = 0; u < U; u++) \
        _Pragma("unroll") for (int j = 0; j < NR; j++) { \
            const int at = (k0) + (u * 32 + lane) * V; \
            next[u][j] = at < in.ldw ? load_stream(w + (size_t)rows[j] * (size_t)in.ldw + at) : make_uint4(0, 0, 0, 0); \
        } } while (0)
#pragma unroll
    for (int j = 0; j < NR; j++)
#pragma unroll
        for (int r = 0; r < R; r++) acc[j][r] = 0;
    QWEN3_LOAD(0);
    for (int tile = 0; tile < in.k; tile += TILE) {
        __syncthreads();
        stage_x<V, R, TILE>(xs, in, tile);
        __syncthreads();
        const int end = tile + TILE < in.k ? tile + TILE : in.k;
        for (int k = tile; k < end; k += BATCH) {
#pragma unroll
            for (int u = 0; u < U; u++)
#pragma unroll
                for (int j = 0; j < NR; j++) now[u][j] = next[u][j];
            if (k + BATCH < in.k) QWEN3_LOAD(k + BATCH);
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int at = (k - tile) / V + u * 32 + lane;
                float f[NR][V];
#pragma unroll
                for (int j = 0; j < NR; j++) unpack(f[j], now[u][j], W());
#pragma unroll
                for (int r = 0; r < R; r++)
#pragma unroll
                    for (int p = 0; p < V / 4; p++) {
                        const float4 x = xs[r * (TILE / 4) + p * (TILE / V) + at];
#pragma unroll
                        for (int j = 0; j < NR; j++) {
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
#pragma unroll
    for (int j = 0; j < NR; j++)
#pragma unroll
        for (int r = 0; r < R; r++) acc[j][r] = warp_sum(acc[j][r]) * in.scale;
}

/* The NR rows of W that belong to this warp; past the end the last one, whose result is not used. */
template <int NR> static __device__ __forceinline__ int matvec_rows(int (&rows)[NR], int n) {
    const int first = ((int)blockIdx.x * MATVEC_WARPS + (int)threadIdx.x / 32) * NR;
#pragma unroll
    for (int j = 0; j < NR; j++) rows[j] = first + j < n ? first + j : n - 1;
    return first;
}

/* matvec: y[slot(r), i] = (W x[r])_i, or += with ADD. x [rows, ldx] float32, rows <= R; y [.., ldy] float32;
   slot(r) = outs ? its out_slot : r; none if that is -1. One warp for NR rows of W, 8 warps a block.
   Equals qwen3i_matmul; with ADD the residual is added in float32. */
template <class W, int R, int NR, bool ADD>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS) matvec_kernel(matvec_in in, float *y, int ldy, const row_info *outs) {
    __shared__ float4 xs[8192 / 4];
    int rows[NR];
    float acc[NR][R];
    const int first = matvec_rows<NR>(rows, in.n);
    dot_rows<W, R, NR>(acc, rows, in, xs);
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (r >= in.rows) break;
        const int slot = outs ? outs[r].out_slot : r;
        float *out = y + (size_t)slot * (size_t)ldy + first;
        if (slot < 0) continue;
#pragma unroll
        for (int j = 0; j < NR; j++) if (first + j < in.n) out[j] = ADD ? out[j] + acc[j][r] : acc[j][r];
    }
}

static __device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

/* mlp: y[r, i] = silu(gate_i) * up_i in float32, where gate = W[0 .. n_ff) x[r] and up = W[n_ff .. 2 n_ff) x[r].
   One warp for P pairs of rows. Equals qwen3i_swiglu of the two products. */
template <class W, int R, int P>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS) mlp_kernel(matvec_in in, float *y, int ldy) {
    __shared__ float4 xs[8192 / 4];
    const int n_ff = in.n / 2;
    int pair[P], rows[2 * P];
    float acc[2 * P][R];
    const int first = matvec_rows<P>(pair, n_ff);
#pragma unroll
    for (int j = 0; j < P; j++) { rows[2 * j] = pair[j]; rows[2 * j + 1] = n_ff + pair[j]; }
    dot_rows<W, R, 2 * P>(acc, rows, in, xs);
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int j = 0; j < P; j++)
            if (r < in.rows && first + j < n_ff) y[(size_t)r * (size_t)ldy + first + j] = silu(acc[2 * j][r]) * acc[2 * j + 1][r];
}

/* ================================================================================================
   KERNELS: Q, K and V
   ================================================================================================ */
struct qkv_args {
    float        *qkv;                  /* [rows, ld]: projections in, rotated q out; ld = q_dim + 2 kv_dim */
    int           ld, n_head, n_head_kv, head_dim;
    float         eps;
    const float  *q_norm, *k_norm;      /* [head_dim] */
    const float2 *rope;                 /* [max_ctx, head_dim / 2] cosine, sine */
    const row_info *rows;
    kv_layer      kv;
};

/* One head of one row, by one warp: RMSNorm over its head_dim values, rotate-half, then q back in float32 or
   k to the cache with one rounding. in [head_dim], times scale. */
template <class T>
static __device__ __forceinline__ void norm_rope_head(const qkv_args &a, int row, int head, float scale) {
    const int half = a.head_dim / 2, lane = (int)threadIdx.x % 32, pos = a.rows[row].position;
    float *v = a.qkv + (size_t)row * (size_t)a.ld + (size_t)head * (size_t)a.head_dim;
    const float *gain = head < a.n_head ? a.q_norm : a.k_norm;
    const float2 *turn = a.rope + (size_t)pos * (size_t)half;
    T *k = (T *)a.kv.k + kv_at(a.kv, a.rows[row].seq, pos) + (size_t)(head - a.n_head) * (size_t)a.head_dim;
    float lo[MAX_HEAD_DIM / 64], hi[MAX_HEAD_DIM / 64], sum = 0;
#pragma unroll
    for (int j = 0; j < MAX_HEAD_DIM / 64; j++) {
        const int i = lane + 32 * j;
        lo[j] = i < half ? __ldcg(v + i) * scale : 0.0f;
        hi[j] = i < half ? __ldcg(v + i + half) * scale : 0.0f;
        sum += lo[j] * lo[j] + hi[j] * hi[j];
    }
    const float r = 1.0f / sqrtf(warp_sum(sum) / (float)a.head_dim + a.eps);
#pragma unroll
    for (int j = 0; j < MAX_HEAD_DIM / 64; j++) {
        const int i = lane + 32 * j;
        if (i >= half) break;
        const float x = lo[j] * r * gain[i], y = hi[j] * r * gain[i + half];
        const float2 t = turn[i];
        const float p = x * t.x - y * t.y, q = y * t.x + x * t.y;
        if (head < a.n_head) { v[i] = p; v[i + half] = q; }
        else { store(k + i, p); store(k + i + half, q); }
    }
}

/* qkv_rope: q, k and v of 1 to 8 rows from their *normalised* hidden states, in one pass over x and W.
   in: W [q_dim + 2 kv_dim, n_embd], x [rows, n_embd] float32. The block that finishes a head last norms and
   rotates it; v goes straight from the sum into the cache. tickets [n_head + n_head_kv], zero before and after.
   Equals qwen3i_matmul of wq, wk, wv, then qwen3i_rmsnorm a head, qwen3i_rope, one rounding of k and v. */
template <class W, class T, int R, int NR>
static __global__ void __launch_bounds__(32 * MATVEC_WARPS) qkv_rope_kernel(matvec_in in, qkv_args a, unsigned *tickets) {
    __shared__ float4 xs[8192 / 4];
    __shared__ int finished[MATVEC_WARPS * NR];
    int rows[NR];
    float acc[NR][R];
    const int first = matvec_rows<NR>(rows, in.n), rotated = (a.n_head + a.n_head_kv) * a.head_dim;
    dot_rows<W, R, NR>(acc, rows, in, xs);
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int j = 0; j < NR; j++) {
                const int i = first + j;
                if (r >= in.rows || i >= in.n) continue;
                if (i < rotated) a.qkv[(size_t)r * (size_t)a.ld + i] = acc[j][r];
                else store((T *)a.kv.v + kv_at(a.kv, a.rows[r].seq, a.rows[r].position) + (i - rotated), acc[j][r]);
            }
    }
    const int from = (int)blockIdx.x * MATVEC_WARPS * NR;
    const int to = from + MATVEC_WARPS * NR < rotated ? from + MATVEC_WARPS * NR : rotated;
    if (from >= rotated) return;
    const int head0 = from / a.head_dim, n_heads = (to - 1) / a.head_dim - head0 + 1;
    __threadfence();
    __syncthreads();
    if ((int)threadIdx.x < n_heads) {
        const int begin = (head0 + (int)threadIdx.x) * a.head_dim, end = begin + a.head_dim;
        const unsigned mine = (unsigned)((end < to ? end : to) - (begin > from ? begin : from));
        const unsigned before = atomicAdd(&tickets[head0 + (int)threadIdx.x], mine);
        finished[threadIdx.x] = before + mine == (unsigned)a.head_dim;
        if (finished[threadIdx.x]) tickets[head0 + (int)threadIdx.x] = 0;
    }
    __syncthreads();
    __threadfence();
    for (int h = 0; h < n_heads; h++)
        if (finished[h])
            for (int r = (int)threadIdx.x / 32; r < in.rows; r += MATVEC_WARPS) norm_rope_head<T>(a, r, head0 + h, 1.0f);
}

/* norm_rope_store: the same after a cuBLASLt product, for any number of rows: qkv [rows, ld] times scale[row].
   Grid (rows, ceil(heads / 8)), one warp a head of q, k or v. */
template <class T>
static __global__ void norm_rope_store_kernel(qkv_args a, const float *scale) {
    const int row = (int)blockIdx.x, head = (int)blockIdx.y * 8 + (int)threadIdx.x / 32;
    const float s = scale ? scale[row] : 1.0f;
    if (head >= a.n_head + 2 * a.n_head_kv) return;
    if (head < a.n_head + a.n_head_kv) { norm_rope_head<T>(a, row, head, s); return; }
    const int offset = (head - a.n_head - a.n_head_kv) * a.head_dim;
    const float *v = a.qkv + (size_t)row * (size_t)a.ld + (size_t)head * (size_t)a.head_dim;
    T *to = (T *)a.kv.v + kv_at(a.kv, a.rows[row].seq, a.rows[row].position) + offset;
    for (int i = (int)threadIdx.x % 32; i < a.head_dim; i += 32) store(to + i, v[i] * s);
}

/* rope (standard path): q and k heads of qkv in place. Grid (rows, n_head + n_head_kv). Equals qwen3i_rope. */
static __global__ void rope_kernel(qkv_args a) {
    const int half = a.head_dim / 2;
    float *v = a.qkv + (size_t)blockIdx.x * (size_t)a.ld + (size_t)blockIdx.y * (size_t)a.head_dim;
    const float2 *turn = a.rope + (size_t)a.rows[blockIdx.x].position * (size_t)half;
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        const float x = v[i], y = v[i + half];
        v[i] = x * turn[i].x - y * turn[i].y;
        v[i + half] = y * turn[i].x + x * turn[i].y;
    }
}

/* kv_store (standard path): k and v of qkv to the cache, one rounding. One block a row. */
template <class T>
static __global__ void kv_store_kernel(qkv_args a) {
    const float *k = a.qkv + (size_t)blockIdx.x * (size_t)a.ld + (size_t)a.n_head * (size_t)a.head_dim;
    const size_t at = kv_at(a.kv, a.rows[blockIdx.x].seq, a.rows[blockIdx.x].position);
    for (int i = (int)threadIdx.x; i < a.kv.kv_dim; i += (int)blockDim.x) {
        store((T *)a.kv.k + at + i, k[i]);
        store((T *)a.kv.v + at + i, k[a.kv.kv_dim + i]);
    }
}

/* ================================================================================================
   KERNELS: attention
   ================================================================================================ */
struct attention_args {
    const float *q; int ldq;            /* [rows, n_head, head_dim] */
    float       *out; int ldo;          /* [rows, n_head, head_dim] */
    int          n_head, n_head_kv, head_dim;
    float        scale;                 /* 1 / sqrt(head_dim) */
    const row_info *rows;
    kv_layer     kv;
    float       *parts;                 /* [rows, n_head, splits, head_dim + 2] */
    unsigned    *tickets;               /* [rows, gridDim.y], zero before and after */
};

template <class T> struct kv_vector { uint4 raw[sizeof(T) / 2]; };      /* 8 elements */

template <class T> static __device__ __forceinline__ kv_vector<T> kv_load(const T *p, bool valid) {
    kv_vector<T> v;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(T) / 2); i++) v.raw[i] = valid ? ((const uint4 *)(const void *)p)[i] : make_uint4(0, 0, 0, 0);
    return v;
}
template <class T> static __device__ __forceinline__ void kv_unpack(float (&f)[8], const kv_vector<T> &v) { unpack(f, v.raw[0], T()); }
template <> __device__ __forceinline__ void kv_unpack<float>(float (&f)[8], const kv_vector<float> &v) {
    float lo[4], hi[4];
    unpack(lo, v.raw[0], 0.0f);
    unpack(hi, v.raw[1], 0.0f);
#pragma unroll
    for (int i = 0; i < 4; i++) { f[i] = lo[i]; f[4 + i] = hi[i]; }
}

/* Softmax over one warp's share of the positions, for G heads at once: top, sum and weighted v of each.
   A lane holds 8 of the head_dim values; `lanes` of them make a position, so a warp reads 32 / lanes at a time. */
template <class T, int G>
struct split_state { float q[G][8], o[G][8], top[G], sum[G]; };

template <class T, int G, int U>
static __device__ __forceinline__ void split_step(split_state<T, G> &s, const T *k, const T *v, int stride, int left, int lanes, bool owner) {
    const int sub = (int)threadIdx.x % 32 / lanes, each = 32 / lanes;
    kv_vector<T> kr[U], vr[U];
    float score[U][G], f[8];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int p = u * each + sub;
        kr[u] = kv_load<T>(k + (size_t)p * (size_t)stride, owner && p < left);
        vr[u] = kv_load<T>(v + (size_t)p * (size_t)stride, owner && p < left);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        kv_unpack<T>(f, kr[u]);
#pragma unroll
        for (int g = 0; g < G; g++) {
            float d = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) d += s.q[g][i] * f[i];
            for (int o = lanes / 2; o > 0; o >>= 1) d += __shfl_xor_sync(ALL, d, o);
            score[u][g] = u * each + sub < left ? d : LOWEST;
        }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
        float top = s.top[g];
#pragma unroll
        for (int u = 0; u < U; u++) top = fmaxf(top, score[u][g]);
        for (int o = 16; o >= lanes; o >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        const float keep = exp2f(s.top[g] - top);
        s.top[g] = top;
        s.sum[g] *= keep;
#pragma unroll
        for (int i = 0; i < 8; i++) s.o[g][i] *= keep;
#pragma unroll
        for (int u = 0; u < U; u++) {
            score[u][g] = u * each + sub < left ? exp2f(score[u][g] - top) : 0.0f;
            s.sum[g] += score[u][g];
        }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        kv_unpack<T>(f, vr[u]);
#pragma unroll
        for (int g = 0; g < G; g++)
#pragma unroll
            for (int i = 0; i < 8; i++) s.o[g][i] += score[u][g] * f[i];
    }
}

/* attention, any rows: out[row, head, :] = softmax(q k^T * scale) v over positions 0 .. position of the
   row's sequence, all float32. Grid (rows, n_head_kv * ceil(group / G), splits), 4 warps: a block takes one part
   of the positions for up to G heads of one group, which share its reads of k and v; its warps take turns of
   positions. The block of a row that finishes last joins the parts, in order. How the positions are split
   depends on the row's own length and on gridDim.z. Equals qwen3i_attention. */
template <class T, int G, int LANES>
static __global__ void __launch_bounds__(32 * SPLIT_WARPS) attention_split_kernel(attention_args a) {
    __shared__ float part[SPLIT_WARPS][G][MAX_HEAD_DIM], part_top[SPLIT_WARPS][G], part_sum[SPLIT_WARPS][G];
    __shared__ int last;
    const int U = G >= 8 ? 2 : 4;
    const int group = a.n_head / a.n_head_kv, chunks = ceil_div(group, G);
    const int row = (int)blockIdx.x, kv_head = (int)blockIdx.y / chunks, g0 = (int)blockIdx.y % chunks * G;
    const int n_g = group - g0 < G ? group - g0 : G, head0 = kv_head * group + g0, dim = a.head_dim;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int n = a.rows[row].position + 1, length = split_length(n, (int)gridDim.z), active = ceil_div(n, length);
    const int begin = (int)blockIdx.z * length, end = begin + length < n ? begin + length : n;
    if (begin >= n) return;

    int lanes = LANES;
    if (LANES == 0) for (lanes = 1; lanes * 8 < dim; lanes *= 2) {}
    const int at = lane % lanes * 8, turn = U * (32 / lanes);
    const bool owner = at < dim;
    const T *k = (const T *)a.kv.k + kv_at(a.kv, a.rows[row].seq, 0) + (size_t)kv_head * (size_t)dim + at;
    const T *v = (const T *)a.kv.v + kv_at(a.kv, a.rows[row].seq, 0) + (size_t)kv_head * (size_t)dim + at;
    split_state<T, G> s;
#pragma unroll
    for (int g = 0; g < G; g++) {
        s.top[g] = LOWEST;
        s.sum[g] = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            s.o[g][i] = 0;
            s.q[g][i] = owner && g < n_g ? a.q[(size_t)row * (size_t)a.ldq + (size_t)(head0 + g) * (size_t)dim + at + i] * (a.scale * LOG2E) : 0.0f;
        }
    }
    for (int p = begin + warp * turn; p < end; p += SPLIT_WARPS * turn)
        split_step<T, G, U>(s, k + (size_t)p * (size_t)a.kv.kv_dim, v + (size_t)p * (size_t)a.kv.kv_dim, a.kv.kv_dim, end - p, lanes, owner);

#pragma unroll
    for (int g = 0; g < G; g++) {       /* the positions that this warp read side by side */
        for (int o = 16; o >= lanes; o >>= 1) {
            s.sum[g] += __shfl_xor_sync(ALL, s.sum[g], o);
#pragma unroll
            for (int i = 0; i < 8; i++) s.o[g][i] += __shfl_xor_sync(ALL, s.o[g][i], o);
        }
        if (lane < lanes && owner)
#pragma unroll
            for (int i = 0; i < 8; i++) part[warp][g][at + i] = s.o[g][i];
        if (lane == 0) { part_top[warp][g] = s.top[g]; part_sum[warp][g] = s.sum[g]; }
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n_g * dim; i += 32 * SPLIT_WARPS) {
        const int g = i / dim, d = i % dim;
        float top = LOWEST, sum = 0, o = 0;
        for (int w = 0; w < SPLIT_WARPS; w++) top = fmaxf(top, part_top[w][g]);
        for (int w = 0; w < SPLIT_WARPS; w++) {
            const float keep = exp2f(part_top[w][g] - top);
            sum += part_sum[w][g] * keep;
            if (part_sum[w][g] > 0) o += part[w][g][d] * keep;
        }
        if (active == 1) a.out[(size_t)row * (size_t)a.ldo + (size_t)(head0 + g) * (size_t)dim + d] = o / sum;
        else {
            float *to = a.parts + (((size_t)row * (size_t)a.n_head + (size_t)(head0 + g)) * gridDim.z + blockIdx.z) * (size_t)(dim + 2);
            to[d] = o;
            if (d == 0) { to[dim] = top; to[dim + 1] = sum; }
        }
    }
    if (active == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned *ticket = &a.tickets[(size_t)row * gridDim.y + blockIdx.y];
        last = atomicAdd(ticket, 1u) == (unsigned)active - 1;
        if (last) *ticket = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = (int)threadIdx.x; i < n_g * dim; i += 32 * SPLIT_WARPS) {
        const int g = i / dim, d = i % dim;
        const float *from = a.parts + ((size_t)row * (size_t)a.n_head + (size_t)(head0 + g)) * gridDim.z * (size_t)(dim + 2);
        float top = LOWEST, sum = 0, o = 0;
        for (int p = 0; p < active; p++) top = fmaxf(top, __ldcg(from + (size_t)p * (size_t)(dim + 2) + dim));
        for (int p = 0; p < active; p++) {
            const float *one = from + (size_t)p * (size_t)(dim + 2);
            const float keep = exp2f(__ldcg(one + dim) - top);
            sum += __ldcg(one + dim + 1) * keep;
            o += __ldcg(one + d) * keep;
        }
        a.out[(size_t)row * (size_t)a.ldo + (size_t)(head0 + g) * (size_t)dim + d] = o / sum;
    }
}

struct attention_tile { int row0, n_tokens, seq, pos0; };   /* consecutive tokens of one sequence */

/* Where element (row, 8 * chunk) of a [rows, D] tile lies in shared memory: chunks are mixed so that eight rows
   of one column of chunks fall into different banks. */
template <int D> static __device__ __forceinline__ int tile_at(int row, int chunk) { return row * D + ((chunk ^ (row & 7)) * 8); }

/* 32 positions of k and v to shared memory; zeros past n. */
template <class T, int D>
static __device__ __forceinline__ void load_kv_tile(T *ks, T *vs, const T *k, const T *v, int stride, int p0, int n) {
    for (int i = (int)threadIdx.x; i < TILE_POS * D / 8; i += 128) {
        const int p = i / (D / 8), chunk = i % (D / 8);
        const bool valid = p0 + p < n;
        const size_t from = (size_t)(valid ? p0 + p : 0) * (size_t)stride + (size_t)(chunk * 8);
        copy_async(ks + tile_at<D>(p, chunk), k + from, valid);
        copy_async(vs + tile_at<D>(p, chunk), v + from, valid);
    }
    copy_commit();
}

/* One row of q as TERMS 16-bit rows that add up to q * 2^k; returns 2^-k. By one warp. */
template <class T, int D, int TERMS>
static __device__ __forceinline__ float split_q_row(T *qs, int row, const float *q) {
    const int lane = (int)threadIdx.x % 32;
    float v[D / 32], top = 0;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        v[i] = q ? q[lane * (D / 32) + i] : 0.0f;
        top = fmaxf(top, fabsf(v[i]));
    }
    const float up = half_scale(warp_max(top));
#pragma unroll
    for (int i = 0; i < D / 32; i++) v[i] *= up;
#pragma unroll
    for (int t = 0; t < TERMS; t++)
#pragma unroll
        for (int i = 0; i < D / 32; i += 2) {
            const int d = lane * (D / 32) + i;
            *(unsigned *)(void *)(qs + (size_t)t * TILE_ROWS * D + tile_at<D>(row, d / 8) + d % 8) = pack(v[i], v[i + 1], T());
        }
    return 1.0f / up;
}

/* attention, many rows of a sequence: the same result by tensor cores. A tile is up to 64 (token, head) rows of
   one group of heads, token-major; grid (tiles, n_head_kv), 4 warps of 16 rows; positions in steps of 32, two
   stages in shared memory. q and the weights p go in as TERMS 16-bit terms each (2 of F16, 3 of BF16), so what
   is lost is float32's rounding, not theirs; each step's sums start from zero and are added in float32.
   Equals qwen3i_attention. Needs head_dim D, group <= 64 and a 16-bit cache; BF16 needs sm_80. */
template <class T, int D, int TERMS>
static __global__ void __launch_bounds__(128) attention_tile_kernel(attention_args a, const attention_tile *tiles) {
    QWEN3_DYNAMIC_SHARED(memory);
    T *qs = (T *)(void *)memory, *ks = qs + TERMS * TILE_ROWS * D, *vs = ks + 2 * TILE_POS * D;
    const attention_tile tile = tiles[gridDim.x - 1 - blockIdx.x];      /* the longest first */
    const int group = a.n_head / a.n_head_kv, kv_head = (int)blockIdx.y;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2;
    const int n = tile.pos0 + tile.n_tokens, stride = a.kv.kv_dim;
    const T *k = (const T *)a.kv.k + kv_at(a.kv, tile.seq, 0) + (size_t)kv_head * D;
    const T *v = (const T *)a.kv.v + kv_at(a.kv, tile.seq, 0) + (size_t)kv_head * D;
    load_kv_tile<T, D>(ks, vs, k, v, stride, 0, n);

    float scale[2] = {0, 0};            /* of this thread's two rows: to scores in powers of two */
    for (int i = 0; i < 16; i++) {
        const int row = warp * 16 + i, token = row / group;
        const float *q = token < tile.n_tokens ? a.q + (size_t)(tile.row0 + token) * (size_t)a.ldq + (size_t)(kv_head * group + row % group) * D : NULL;
        const float s = split_q_row<T, D, TERMS>(qs, row, q) * a.scale * LOG2E;
        if (i == quad) scale[0] = s;
        if (i == quad + 8) scale[1] = s;
    }
    int last[2];                        /* the last position that each of them sees */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int token = (warp * 16 + quad + 8 * i) / group;
        last[i] = tile.pos0 + (token < tile.n_tokens ? token : tile.n_tokens - 1);
    }
    float o[D / 8][4], top[2] = {LOWEST, LOWEST}, sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[i][j] = 0;

    for (int p0 = 0, stage = 0; p0 < n; p0 += TILE_POS, stage ^= 1) {
        if (p0 + TILE_POS < n) {
            load_kv_tile<T, D>(ks + (stage ^ 1) * TILE_POS * D, vs + (stage ^ 1) * TILE_POS * D, k, v, stride, p0 + TILE_POS, n);
            copy_wait<1>();
        } else copy_wait<0>();
        __syncthreads();
        const T *kt = ks + stage * TILE_POS * D, *vt = vs + stage * TILE_POS * D;

        float s[TILE_POS / 8][4];       /* scores: rows quad, quad + 8; positions 8 i + pair, + 1 */
#pragma unroll
        for (int i = 0; i < TILE_POS / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) s[i][j] = 0;
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            unsigned b[TILE_POS / 16][4], f[4];
#pragma unroll
            for (int i = 0; i < TILE_POS / 16; i++)
                load_matrices(b[i], kt + tile_at<D>(i * 16 + lane % 8 + lane / 16 * 8, d + lane / 8 % 2));
#pragma unroll
            for (int t = TERMS - 1; t >= 0; t--) {
                load_matrices(f, qs + t * TILE_ROWS * D + tile_at<D>(warp * 16 + lane % 16, d + lane / 16));
#pragma unroll
                for (int i = 0; i < TILE_POS / 16; i++) {
                    multiply(s[2 * i], f, b[i][0], b[i][1], T());
                    multiply(s[2 * i + 1], f, b[i][2], b[i][3], T());
                }
            }
        }

        float keep[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float high = top[r], part = 0;
#pragma unroll
            for (int i = 0; i < TILE_POS / 8; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &x = s[i][2 * r + j];
                    x = p0 + i * 8 + pair + j <= last[r] ? x * scale[r] : LOWEST;
                    high = fmaxf(high, x);
                }
            high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
            high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
            keep[r] = exp2f(top[r] - high);
            top[r] = high;
#pragma unroll
            for (int i = 0; i < TILE_POS / 8; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &x = s[i][2 * r + j];
                    x = exp2f(x - high + 14.0f);        /* times 2^14: F16 then has the small ones, too */
                    part += x;
                }
            sum[r] = sum[r] * keep[r] + part;
        }

        unsigned p[TERMS][TILE_POS / 16][4];            /* the weights, as left operands */
#pragma unroll
        for (int t = 0; t < TERMS; t++)
#pragma unroll
            for (int i = 0; i < TILE_POS / 16; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) p[t][i][j] = pack(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1], T());
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            float t0[4] = {0, 0, 0, 0}, t1[4] = {0, 0, 0, 0};
            unsigned b[4];
#pragma unroll
            for (int i = 0; i < TILE_POS / 16; i++) {
                load_matrices_transposed(b, vt + tile_at<D>(i * 16 + lane % 16, d + lane / 16));
#pragma unroll
                for (int t = TERMS - 1; t >= 0; t--) {
                    multiply(t0, p[t][i], b[0], b[1], T());
                    multiply(t1, p[t][i], b[2], b[3], T());
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                o[d][j] = o[d][j] * keep[j / 2] + t0[j];
                o[d + 1][j] = o[d + 1][j] * keep[j / 2] + t1[j];
            }
        }
        __syncthreads();                /* before the next step overwrites this stage */
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = warp * 16 + quad + 8 * r, token = row / group;
        sum[r] += __shfl_xor_sync(ALL, sum[r], 1);
        sum[r] += __shfl_xor_sync(ALL, sum[r], 2);
        if (token >= tile.n_tokens) continue;
        float *to = a.out + (size_t)(tile.row0 + token) * (size_t)a.ldo + (size_t)(kv_head * group + row % group) * D + pair;
#pragma unroll
        for (int i = 0; i < D / 8; i++) *(float2 *)(void *)(to + i * 8) = make_float2(o[i][2 * r] / sum[r], o[i][2 * r + 1] / sum[r]);
    }
}

template <class T, int D, int TERMS> static size_t attention_tile_shared() {
    return sizeof(T) * ((size_t)TERMS * TILE_ROWS * D + 4 * (size_t)TILE_POS * D);
}

/* ================================================================================================
   KERNELS: MLP after cuBLASLt
   ================================================================================================ */
/* swiglu: m = silu(gate) * up for gate_up [rows, 2 n_ff], times scale[row] before, as the input of the down
   projection [rows, ld], zero from n_ff on. The product is float32; only the scaled result is rounded.
   One block a row. Equals qwen3i_swiglu, and one rounding. */
template <class O>
static __global__ void swiglu_kernel(O *out, float *out_scale, const float *gate_up, const float *scale, int n_ff, int ld_in, int ld, size_t rest) {
    __shared__ float shared[32];
    const float *gate = gate_up + (size_t)blockIdx.x * (size_t)ld_in, *up_in = gate + n_ff;
    const float s = scale ? scale[blockIdx.x] : 1.0f;
    float top = 0, up = 1;
    if (sizeof(O) == 2) {
        for (int i = (int)threadIdx.x; i < n_ff; i += (int)blockDim.x) top = fmaxf(top, fabsf(silu(gate[i] * s) * (up_in[i] * s)));
        up = half_scale(block_max(top, shared));
    }
    for (int i = (int)threadIdx.x; i < ld; i += (int)blockDim.x)
        store_input(&out[(size_t)blockIdx.x * (size_t)ld + (size_t)i], i < n_ff ? silu(gate[i] * s) * (up_in[i] * s) : 0.0f, up, rest);
    if (sizeof(O) == 2 && threadIdx.x == 0) out_scale[blockIdx.x] = 1.0f / up;
}

/* ================================================================================================
   KERNELS: logits
   ================================================================================================ */
/* keep_logits: kept[out_slot, :] = logits[row, :] * scale[row] (NULL: 1); slot -1: not kept. Grid (blocks, rows). */
static __global__ void keep_logits_kernel(float *kept, const float *logits, const float *scale, const row_info *outs, int n) {
    const int slot = outs[blockIdx.y].out_slot;
    const float s = scale ? scale[blockIdx.y] : 1.0f;
    if (slot < 0) return;
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
        kept[(size_t)slot * (size_t)n + (size_t)i] = logits[(size_t)blockIdx.y * (size_t)n + (size_t)i] * s;
}

/* logprob: ln P(out_target) under logits [row, :]; 0 for target -1. One block a row. Equals qwen3i_log_prob. */
static __global__ void logprob_kernel(float *out, const float *logits, const row_info *outs, int n) {
    __shared__ float shared[32];
    const float *l = logits + (size_t)blockIdx.x * (size_t)n;
    float top = LOWEST, sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) top = fmaxf(top, l[i]);
    top = block_max(top, shared);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) sum += expf(l[i] - top);
    sum = block_sum(sum, shared);
    const int target = outs[blockIdx.x].out_target;
    if (threadIdx.x == 0) out[blockIdx.x] = target >= 0 ? (l[target] - top) - logf(sum) : 0.0f;
}

/* ================================================================================================
   KERNELS: sampling. The twin of qwen3i_choose: sums of integer weights do not depend on their order,
   so blocks and threads may add them as they come and the choice is the CPU's, bit for bit.
   ================================================================================================ */
typedef unsigned long long u64;

struct listed { int token; float bias; };

struct choice {                         /* what one row's choice depends on */
    float temperature, top_p, min_p, repeat, presence;
    int   top_k;
    u64   random;
    int   slot;                         /* of its kept logits */
    int   list_at, n_bias, n_seen;      /* lists[list_at ..]: biases, then tokens to penalise */
    int   chain;                        /* chosen[row], of the step before, is penalised, too */
    int   adjust;                       /* bias or penalties: choose from the copy */
};

const int LIST_KEYS   = 4096;           /* candidates that are sorted in shared memory */
const int WEIGHT_BINS = 720;            /* sixteenths of an octave below the top; weights end at 45 octaves */
const int CHOOSE_THREADS = 1024;

/* Larger for what ranks before: higher logit, then lower id. 0: may not be chosen. */
static __device__ __forceinline__ u64 rank_key(float logit, int id) {
    const unsigned u = __float_as_uint(logit + 0.0f);
    if ((u & 0x7F800000u) == 0x7F800000u || !(logit > LOWEST)) return 0;
    return (u64)(u & 0x80000000u ? ~u : u | 0x80000000u) << 32 | (0xFFFFFFFFu - (unsigned)id);
}
static __device__ __forceinline__ int key_id(u64 key) { return (int)(0xFFFFFFFFu - (unsigned)(key & 0xFFFFFFFFu)); }
static __device__ __forceinline__ float key_logit(u64 key) {
    const unsigned u = (unsigned)(key >> 32);
    return __uint_as_float(u & 0x80000000u ? u & 0x7FFFFFFFu : ~u);
}

static __device__ __forceinline__ float octaves_below(float logit, float top, float temperature) {
    return (top - logit) / temperature * 1.44269504f;
}

/* Equals qwen3i_weight. */
static __device__ u64 choice_weight(float octaves) {
    const unsigned c[5] = {1488521986u, 515877902u, 119165493u, 20571132u, 2737501u};
    u64 p = 234126u;
    if (!(octaves < 45.0f)) return 0;
    const unsigned fixed = (unsigned)(octaves * 1048576.0f), f = fixed & 0xFFFFFu;
#pragma unroll
    for (int i = 4; i >= 0; i--) p = c[i] - (p * f >> 20);
    return (2147483648u - (p * f >> 20)) << 14 >> (fixed >> 20);
}

/* Equals qwen3i_share_of. */
static __device__ __forceinline__ u64 share_of(u64 total, float share) {
    const u64 s = (u64)((double)share * 4294967296.0);
    return (total >> 32) * s + ((total & 0xFFFFFFFFu) * s >> 32);
}

/* adjust: bias and penalties on a copy of the row's logits. copy [rows, n] (made before); one block a row; a bit
   for each token in shared memory. Equals qwen3i_adjust without the filter. */
static __global__ void adjust_kernel(float *copy, const choice *choices, const listed *lists, const int *chosen, int n) {
    QWEN3_DYNAMIC_SHARED(memory);
    unsigned *seen = (unsigned *)(void *)memory;
    const choice c = choices[blockIdx.x];
    const listed *bias = lists + c.list_at, *past = bias + c.n_bias;
    float *l = copy + (size_t)blockIdx.x * (size_t)n;
    if (!c.adjust) return;
    for (int i = (int)threadIdx.x; i < ceil_div(n, 32); i += (int)blockDim.x) seen[i] = 0;
    for (int i = (int)threadIdx.x; i < c.n_bias; i += (int)blockDim.x) {
        const int t = bias[i].token;
        bool first = t >= 0 && t < n;   /* of its entries; it adds them all, in order */
        for (int j = 0; j < i && first; j++) first = bias[j].token != t;
        for (int j = i; j < c.n_bias && first; j++) if (bias[j].token == t) l[t] += bias[j].bias;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < c.n_seen + c.chain; i += (int)blockDim.x) {
        const int t = i < c.n_seen ? past[i].token : chosen[blockIdx.x];
        if (t < 0 || t >= n || (atomicOr(&seen[t / 32], 1u << (t % 32)) >> (t % 32) & 1u)) continue;
        const float v = l[t] - c.presence;
        l[t] = v > 0 ? v / c.repeat : v * c.repeat;
    }
}

/* copy_logits: copy[row, :] = kept[slot of row, :] for the rows to adjust. Grid (blocks, rows). */
static __global__ void copy_logits_kernel(float *copy, const float *kept, const choice *choices, int n) {
    const choice *c = &choices[blockIdx.y];
    if (!c->adjust) return;
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
        copy[(size_t)blockIdx.y * (size_t)n + (size_t)i] = kept[(size_t)c->slot * (size_t)n + (size_t)i];
}

static __device__ __forceinline__ const float *choice_logits(const choice &c, const float *kept, const float *copy, int row, int n) {
    return c.adjust ? copy + (size_t)row * (size_t)n : kept + (size_t)c.slot * (size_t)n;
}

/* best: first stage of the choice: best[row] = the largest key of ids below n_choose. Grid (blocks, rows);
   best [rows], zero before. */
static __global__ void best_kernel(u64 *best, const float *kept, const float *copy, const choice *choices, int n, int n_choose) {
    const choice c = choices[blockIdx.y];
    const float *l = choice_logits(c, kept, copy, (int)blockIdx.y, n);
    u64 top = 0;
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n_choose; i += (int)(gridDim.x * blockDim.x)) {
        const u64 key = rank_key(l[i], i);
        top = key > top ? key : top;
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const u64 other = __shfl_xor_sync(ALL, top, o);
        top = other > top ? other : top;
    }
    if (threadIdx.x % 32 == 0 && top) atomicMax(&best[blockIdx.y], top);
}

struct choose_shared {
    u64 bins[WEIGHT_BINS + 1];          /* counts or weights */
    u64 keys[LIST_KEYS];
    u64 sums[CHOOSE_THREADS / 32];
    u64 value, need;                    /* what one thread found for all */
    unsigned n_keys, bin;
};

struct row_logits { const float *l; int n; float top, temperature; };

static __device__ __forceinline__ int weight_bin(float octaves) { return octaves < 45.0f ? (int)(octaves * 16.0f) : WEIGHT_BINS; }

/* Sorts keys[0 .. n) from large to small; n <= LIST_KEYS. By the block. */
static __device__ void sort_keys(u64 *keys, int n) {
    int size = 1;
    while (size < n) size *= 2;
    for (int i = n + (int)threadIdx.x; i < size; i += (int)blockDim.x) keys[i] = 0;
    for (int k = 2; k <= size; k *= 2)
        for (int j = k / 2; j > 0; j /= 2) {
            __syncthreads();
            for (int i = (int)threadIdx.x; i < size; i += (int)blockDim.x) {
                const int other = i ^ j;
                if (other <= i) continue;
                const u64 a = keys[i], b = keys[other];
                if ((a < b) == ((i & k) == 0)) { keys[i] = b; keys[other] = a; }
            }
        }
    __syncthreads();
}

/* Sum over the block, in every thread. */
static __device__ u64 block_sum_u64(choose_shared &s, u64 v) {
    u64 sum = 0;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; i++) sum += s.sums[i];
    return sum;
}

/* Histogram over bins of weight_bin: counts, or weights, of the keys from `least` on. */
static __device__ void fill_bins(choose_shared &s, const row_logits &r, u64 least, bool weights) {
    for (int i = (int)threadIdx.x; i <= WEIGHT_BINS; i += (int)blockDim.x) s.bins[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < r.n; i += (int)blockDim.x) {
        const u64 key = rank_key(r.l[i], i);
        if (key == 0 || key < least) continue;
        const float octaves = octaves_below(r.l[i], r.top, r.temperature);
        atomicAdd(&s.bins[weight_bin(octaves)], weights ? choice_weight(octaves) : 1ull);
    }
    __syncthreads();
}

/* The first bin up to which the bins add up to need (0: that share of their total, but at least 1), or
   WEIGHT_BINS if they never do. s.value: the sum before it; s.need: need. By the first warp. */
static __device__ int find_bin(choose_shared &s, u64 need, float share) {
    const int run = ceil_div(WEIGHT_BINS, 32), begin = (int)threadIdx.x * run;
    const int end = begin + run < WEIGHT_BINS ? begin + run : WEIGHT_BINS;
    if (threadIdx.x < 32) {
        u64 sum = 0, upto;
        for (int b = begin; b < end; b++) sum += s.bins[b];
        upto = sum;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const u64 v = __shfl_up_sync(ALL, upto, (unsigned)o);
            if ((int)threadIdx.x >= o) upto += v;
        }
        const u64 total = __shfl_sync(ALL, upto, 31);
        if (need == 0) need = share_of(total, share);
        if (need == 0) need = 1;
        if (threadIdx.x == 0) { s.need = need; s.bin = (unsigned)WEIGHT_BINS; }
        __syncwarp();
        upto -= sum;
        for (int b = begin; b < end && upto < need; b++) {
            if (upto + s.bins[b] >= need) { s.bin = (unsigned)b; s.value = upto; break; }
            upto += s.bins[b];
        }
    }
    __syncthreads();
    return (int)s.bin;
}

/* Gathers the keys of bins from .. to into s.keys; s.n_keys is how many there are, of which LIST_KEYS fit. */
static __device__ void gather_keys(choose_shared &s, const row_logits &r, u64 least, int from, int to) {
    if (threadIdx.x == 0) s.n_keys = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < r.n; i += (int)blockDim.x) {
        const u64 key = rank_key(r.l[i], i);
        if (key == 0 || key < least) continue;
        const int bin = weight_bin(octaves_below(r.l[i], r.top, r.temperature));
        if (bin < from || bin > to) continue;
        const unsigned at = atomicAdd(&s.n_keys, 1u);
        if (at < (unsigned)LIST_KEYS) s.keys[at] = key;
    }
    __syncthreads();
}

/* The largest key such that the keys from it on count, or weigh, at least need: bit by bit, for the rare rows
   with thousands of logits alike. */
static __device__ u64 bisect_keys(choose_shared &s, const row_logits &r, u64 least, u64 need, bool weights) {
    u64 key = 0;
    for (int bit = 63; bit >= 0; bit--) {
        const u64 probe = key | 1ull << bit;
        u64 sum = 0;
        for (int i = (int)threadIdx.x; i < r.n; i += (int)blockDim.x) {
            const u64 k = rank_key(r.l[i], i);
            if (k < probe || k < least || k == 0) continue;
            sum += weights ? choice_weight(octaves_below(r.l[i], r.top, r.temperature)) : 1ull;
        }
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
        do sum += choice_weight(octaves_below(key_logit(s.keys[i]), r.top, r.temperature)); while (sum < need && ++i < (int)s.n_keys);
        s.value = s.keys[i < (int)s.n_keys ? i : (int)s.n_keys - 1];
    }
    __syncthreads();
    return s.value;
}

/* Walks the kept tokens in order of id until a random share of their total weight is reached. Each thread takes
   a run of ids. Equals qwen3i_draw. */
static __device__ int draw(choose_shared &s, const row_logits &r, u64 least_key, float min_p, u64 random) {
    const int run = ceil_div(r.n, (int)blockDim.x), begin = (int)threadIdx.x * run, lane = (int)threadIdx.x % 32;
    const int end = begin + run < r.n ? begin + run : r.n;
    const u64 least = share_of(1ull << 45, min_p);
    u64 mine = 0, before, total = 0;
    for (int i = begin; i < end; i++) {
        if (rank_key(r.l[i], i) < least_key) continue;
        const u64 w = choice_weight(octaves_below(r.l[i], r.top, r.temperature));
        if (w >= least) mine += w;
    }
    before = mine;                      /* sums of the threads before this one: warp scan, then warps in order */
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
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
    u64 target = __umul64hi(random, total);
    if (target >= before && target - before < mine) {
        target -= before;
        for (int i = begin; i < end; i++) {
            if (rank_key(r.l[i], i) < least_key) continue;
            const u64 w = choice_weight(octaves_below(r.l[i], r.top, r.temperature));
            if (w < least) continue;
            if (target < w) { s.bin = (unsigned)i; break; }
            target -= w;
        }
    }
    __syncthreads();
    return (int)s.bin;
}

/* choose: second stage: the row's token, chosen[row] and report[row] (host memory) = the choice; -1 if everything is banned.
   One block of 1024 a row. best [rows] is zero again afterwards. Equals qwen3i_choose. */
static __global__ void __launch_bounds__(CHOOSE_THREADS) choose_kernel(row_info *rows, int *chosen, int *report, u64 *best, const float *kept, const float *copy,
                                                                const choice *choices, int n, int n_choose) {
    QWEN3_DYNAMIC_SHARED(memory);
    choose_shared &s = *(choose_shared *)(void *)memory;
    const choice c = choices[blockIdx.x];
    const u64 first = best[blockIdx.x];
    int id = first ? key_id(first) : -1;
    if (first && c.temperature > 0) {
        row_logits r;
        u64 least = 1;
        r.l = choice_logits(c, kept, copy, (int)blockIdx.x, n);
        r.n = n_choose;
        r.top = key_logit(first);
        r.temperature = c.temperature;
        if (c.top_k > 0 && c.top_k < n_choose) least = cut_top_k(s, r, c.top_k);
        if (c.top_p > 0 && c.top_p < 1) least = cut_top_p(s, r, least, c.top_p);
        id = draw(s, r, least, c.min_p, c.random);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        rows[blockIdx.x].token = id < 0 ? 0 : id;       /* the step goes on with something valid */
        chosen[blockIdx.x] = id;
        report[blockIdx.x] = id;
        best[blockIdx.x] = 0;
    }
}

/* ================================================================================================
   MODEL: weights in device memory
   ================================================================================================ */
struct matrix {                         /* W [rows, cols] = data * scale; rows ld apart, zero from cols to ld */
    void       *data;
    int         rows, cols, ld;
    qwen3i_type type;                   /* F32 or F16 */
    int         terms;                  /* 16-bit terms of its input when there are many rows */
    float       scale;
};

/* Elements from the first term of n rows of a product's input to the second; 0: there is only one. */
static size_t rest_of(const matrix &w, int n) { return w.terms == 2 ? (size_t)n * (size_t)w.ld : 0; }

struct layer_weights {
    float *attn_norm, *q_norm, *k_norm, *mlp_norm;
    matrix qkv, wo, gate_up, w_down;    /* q, k, v below each other, as are gate and up */
};

struct cuda_model {
    qwen3_allocator allocator;
    qwen3i_config   config;
    int             device, n_sm, capability;   /* 90 for 9.0 */
    char            name[256];
    char           *memory;                     /* all weights */
    size_t          size;
    layer_weights  *layers;
    matrix          embed, head;
    float          *final_norm;
};

static size_t type_size(qwen3i_type t) { return t == QWEN3I_F32 ? 4 : 2; }

/* The matrices that are stored below each other: as one type, F32 if theirs differ. BF16 until it is converted. */
struct weight_group { matrix *to; const qwen3i_matrix *from[3]; int n; };

static qwen3i_type group_type(const weight_group &g) {
    for (int i = 1; i < g.n; i++) if (g.from[i]->type != g.from[0]->type) return QWEN3I_F32;
    return g.from[0]->type;
}

static weight_group make_group(matrix *to, const qwen3i_matrix *a, const qwen3i_matrix *b, const qwen3i_matrix *c) {
    weight_group g;
    g.to = to;
    g.from[0] = a; g.from[1] = b; g.from[2] = c;
    g.n = c ? 3 : b ? 2 : 1;
    return g;
}

/* Group i of the model: 4 a layer, then the embedding, then a head of its own. Returns 0 past the end. */
static int model_group(cuda_model *m, const qwen3i_weights *w, int i, weight_group *g) {
    const int layer = i / 4, rest = i - 4 * m->config.n_layer;
    if (rest == 0) { *g = make_group(&m->embed, &w->embed, NULL, NULL); return 1; }
    if (rest == 1 && w->head.data != w->embed.data) { *g = make_group(&m->head, &w->head, NULL, NULL); return 1; }
    if (rest >= 1) return 0;
    const qwen3i_layer *from = &w->layers[layer];
    layer_weights *to = &m->layers[layer];
    switch (i % 4) {
        case 0: *g = make_group(&to->qkv, &from->wq, &from->wk, &from->wv); break;
        case 1: *g = make_group(&to->wo, &from->wo, NULL, NULL); break;
        case 2: *g = make_group(&to->gate_up, &from->w_gate, &from->w_up, NULL); break;
        default: *g = make_group(&to->w_down, &from->w_down, NULL, NULL);
    }
    return 1;
}

/* Lay the weights out; a dry run measures them. tops: the largest |w| of each group, as bits. */
static void lay_out_model(cuda_model *m, const qwen3i_weights *w, arena *a, unsigned **tops) {
    const size_t n_embd = (size_t)m->config.n_embd, head_dim = (size_t)m->config.head_dim;
    weight_group g;
    int n = 0;
    for (; model_group(m, w, n, &g); n++) {
        g.to->type = group_type(g);
        g.to->cols = g.from[0]->cols;
        g.to->ld = round_up(g.to->cols, 8);
        g.to->scale = 1;
        g.to->terms = g.n == 3 && g.to->type != QWEN3I_F32 ? 2 : 1;     /* q and k: see the head of this file */
        g.to->rows = 0;
        for (int i = 0; i < g.n; i++) g.to->rows += g.from[i]->rows;
        g.to->data = a->take<char>((size_t)g.to->rows * (size_t)g.to->ld * type_size(g.to->type));
    }
    for (int i = 0; i < m->config.n_layer; i++) {
        layer_weights *l = &m->layers[i];
        l->attn_norm = a->take<float>(n_embd);
        l->mlp_norm = a->take<float>(n_embd);
        l->q_norm = a->take<float>(head_dim);
        l->k_norm = a->take<float>(head_dim);
    }
    m->final_norm = a->take<float>(n_embd);
    *tops = a->take<unsigned>((size_t)n);
}

/* top_bits: *top = the largest |w| of a BF16 matrix, as bits (they order like the values). *top is 0 before. */
static __global__ void top_bits_kernel(unsigned *top, const unsigned short *w, size_t n) {
    unsigned most_bits = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        const unsigned bits = (unsigned)(w[i] & 0x7FFFu) << 16;
        most_bits = bits > most_bits ? bits : most_bits;
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
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

/* half_scale() on the host, inverted. */
static float half_unscale(unsigned top_bits) {
    const int exponent = (int)(top_bits >> 23 & 255u), k = 127 + 14 - exponent;
    if (exponent == 0 || exponent == 255) return 1.0f;
    return (float)ldexp(1.0, -(k < -100 ? -100 : k > 100 ? 100 : k));
}

/* Copies weights through two pinned buffers: while one is on its way, the other is filled from the file. */
struct uploader {
    cudaStream_t stream;
    char        *buffer[2];
    cudaEvent_t  sent[2];
    int          turn;
    const qwen3_load_desc *desc;
    double       done, total;           /* bytes */
};

static void close_uploader(uploader *u) {
    if (u->stream) cudaStreamSynchronize(u->stream);
    for (int i = 0; i < 2; i++) {
        if (u->buffer[i]) cudaFreeHost(u->buffer[i]);
        if (u->sent[i]) cudaEventDestroy(u->sent[i]);
    }
    if (u->stream) cudaStreamDestroy(u->stream);
}

static qwen3_result open_uploader(uploader *u, const qwen3_load_desc *desc, double total, const qwen3i_err *err) {
    memset(u, 0, sizeof *u);
    u->desc = desc;
    u->total = total;
    CUDA_TRY(cudaStreamCreateWithFlags(&u->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        CUDA_TRY(cudaHostAlloc((void **)&u->buffer[i], STAGING, cudaHostAllocDefault));
        CUDA_TRY(cudaEventCreateWithFlags(&u->sent[i], cudaEventDisableTiming));
    }
    return QWEN3_OK;
}

static float host_float(const void *p, size_t i, qwen3i_type type) {
    unsigned short half;
    unsigned bits;
    float f;
    if (type == QWEN3I_F32) { memcpy(&f, (const char *)p + 4 * i, 4); return f; }
    memcpy(&half, (const char *)p + 2 * i, 2);
    if (type == QWEN3I_F16) return __half2float(__ushort_as_half(half));
    bits = (unsigned)half << 16;
    memcpy(&f, &bits, 4);
    return f;
}

/* n rows [cols] to rows [ld] of the group's type, zero from cols on. */
static void pack_rows(char *to, qwen3i_type to_type, int ld, const char *from, const qwen3i_matrix *w, int n) {
    const size_t in = (size_t)w->cols * type_size(w->type), out = (size_t)ld * type_size(to_type);
    if (to_type == w->type && ld == w->cols) { memcpy(to, from, in * (size_t)n); return; }
    for (int r = 0; r < n; r++, to += out, from += in) {
        memset(to, 0, out);
        if (to_type == w->type) memcpy(to, from, in);
        else for (int i = 0; i < w->cols; i++) {
            const float f = host_float(from, (size_t)i, w->type);
            memcpy(to + 4 * (size_t)i, &f, 4);
        }
    }
}

/* One matrix to rows [ld] of the given type in device memory. */
static qwen3_result upload_matrix(uploader *u, char *to, qwen3i_type type, int ld, const qwen3i_matrix *w, const qwen3i_err *err) {
    const size_t in = (size_t)w->cols * type_size(w->type), out = (size_t)ld * type_size(type);
    const int step = (int)least((size_t)w->rows, most(STAGING / out, (size_t)1));
    const char *from = (const char *)w->data;
    if (out > STAGING) return fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: a matrix has rows of %llu bytes", (unsigned long long)out);
    for (int r = 0; r < w->rows; r += step, u->turn ^= 1) {
        const int n = least(step, w->rows - r);
        CUDA_TRY(cudaEventSynchronize(u->sent[u->turn]));
        pack_rows(u->buffer[u->turn], type, ld, from + (size_t)r * in, w, n);
        CUDA_TRY(cudaMemcpyAsync(to + (size_t)r * out, u->buffer[u->turn], (size_t)n * out, cudaMemcpyHostToDevice, u->stream));
        CUDA_TRY(cudaEventRecord(u->sent[u->turn], u->stream));
        u->done += (double)n * (double)out;
        if (u->desc->progress && u->desc->progress((float)(u->done / u->total), u->desc->progress_user))
            return fail(err, QWEN3_STOPPED, "loading was cancelled");
    }
    return QWEN3_OK;
}

static qwen3_result upload_group(uploader *u, const weight_group &g, const qwen3i_err *err) {
    char *to = (char *)g.to->data;
    for (int i = 0; i < g.n; i++) {
        TRY(upload_matrix(u, to, g.to->type, g.to->ld, g.from[i], err));
        to += (size_t)g.from[i]->rows * (size_t)g.to->ld * type_size(g.to->type);
    }
    return QWEN3_OK;
}

static qwen3_result upload_gain(uploader *u, float *to, const float *from, int n, const qwen3i_err *err) {
    qwen3i_matrix w;
    w.data = from;
    w.rows = 1;
    w.cols = n;
    w.type = QWEN3I_F32;
    return upload_matrix(u, (char *)to, QWEN3I_F32, n, &w, err);
}

/* BF16 to F16, in place on the device, and the scales back. */
static qwen3_result convert_groups(uploader *u, cuda_model *m, const qwen3i_weights *w, unsigned *tops, const qwen3i_err *err) {
    weight_group g;
    for (int i = 0; model_group(m, w, i, &g); i++) {
        const size_t n = (size_t)g.to->rows * (size_t)g.to->ld;
        unsigned top = 0;
        if (g.to->type != QWEN3I_BF16) continue;
        CUDA_TRY(cudaMemsetAsync(&tops[i], 0, sizeof *tops, u->stream));
        CUDA_TRY(launch(u->stream, dim3((unsigned)(8 * m->n_sm)), 256, 0, top_bits_kernel, &tops[i], (const unsigned short *)g.to->data, n));
        CUDA_TRY(launch(u->stream, dim3((unsigned)(8 * m->n_sm)), 256, 0, bf16_to_f16_kernel, (unsigned short *)g.to->data, n, (const unsigned *)&tops[i]));
        CUDA_TRY(cudaMemcpyAsync(&top, &tops[i], sizeof top, cudaMemcpyDeviceToHost, u->stream));
        CUDA_TRY(cudaStreamSynchronize(u->stream));
        g.to->type = QWEN3I_F16;
        g.to->scale = half_unscale(top);
    }
    return QWEN3_OK;
}

static qwen3_result upload_weights(uploader *u, cuda_model *m, const qwen3i_weights *w, unsigned *tops, const qwen3i_err *err) {
    const int n_embd = m->config.n_embd, head_dim = m->config.head_dim;
    weight_group g;
    for (int i = 0; model_group(m, w, i, &g); i++) TRY(upload_group(u, g, err));
    for (int i = 0; i < m->config.n_layer; i++) {
        const qwen3i_layer *l = &w->layers[i];
        TRY(upload_gain(u, m->layers[i].attn_norm, l->attn_norm, n_embd, err));
        TRY(upload_gain(u, m->layers[i].mlp_norm, l->mlp_norm, n_embd, err));
        TRY(upload_gain(u, m->layers[i].q_norm, l->q_norm, head_dim, err));
        TRY(upload_gain(u, m->layers[i].k_norm, l->k_norm, head_dim, err));
    }
    TRY(upload_gain(u, m->final_norm, w->final_norm, n_embd, err));
    TRY(convert_groups(u, m, w, tops, err));
    if (m->head.data == NULL) m->head = m->embed;
    CUDA_TRY(cudaStreamSynchronize(u->stream));
    return QWEN3_OK;
}

/* Is there such a device, does the driver know this CUDA, and has this build code for the chip? */
static qwen3_result open_device(cuda_model *m, int device, const qwen3i_err *err) {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    cudaDeviceProp prop;
    cudaFuncAttributes code;
    if (e != cudaSuccess) cudaGetLastError();
    if (e == cudaErrorInsufficientDriver) return fail(err, QWEN3_ERR_DEVICE, "CUDA: the NVIDIA driver is older than this build's CUDA %d.%d needs", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (e != cudaSuccess || n == 0) return fail(err, QWEN3_ERR_DEVICE, "CUDA: no usable GPU: %s", e == cudaSuccess ? "none found" : cudaGetErrorString(e));
    if (device < 0 || device >= n) return fail(err, QWEN3_ERR_DEVICE, "CUDA: there is no device %d; 0 to %d exist", device, n - 1);
    device_guard guard(device);
    CUDA_TRY(guard.status);
    CUDA_TRY(cudaGetDeviceProperties(&prop, device));
    m->device = device;
    m->n_sm = prop.multiProcessorCount;
    m->capability = prop.major * 10 + prop.minor;
    snprintf(m->name, sizeof m->name, "%s", prop.name);
    if (m->capability < 75) return fail(err, QWEN3_ERR_DEVICE, "CUDA: %s has compute capability %d.%d; 7.5 is the least", m->name, prop.major, prop.minor);
    e = cudaFuncGetAttributes(&code, rope_table_kernel);
    if (e != cudaSuccess) { cudaGetLastError(); return fail(err, QWEN3_ERR_DEVICE, "CUDA: this build has no code for %s (sm_%d): %s", m->name, m->capability, cudaGetErrorString(e)); }
    return QWEN3_OK;
}

static qwen3_result check_shapes(const qwen3i_config *c, const qwen3i_err *err) {
    if (c->head_dim % 8 != 0 || c->head_dim > MAX_HEAD_DIM)
        return fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: head_dim is %d; multiples of 8 up to %d can be run", c->head_dim, MAX_HEAD_DIM);
    return QWEN3_OK;
}

static void free_model(void *model_state) {
    cuda_model *m = (cuda_model *)model_state;
    if (!m) return;
    const qwen3_allocator a = m->allocator;
    if (m->memory) {
        device_guard guard(m->device);
        cudaFree(m->memory);
    }
    host_free(&a, m->layers, (size_t)m->config.n_layer * sizeof *m->layers);
    host_free(&a, m, sizeof *m);
}

static qwen3_result fill_model(cuda_model *m, const qwen3i_model_view *view, const qwen3_load_desc *desc, const qwen3i_err *err) {
    arena a = {NULL, 0};
    unsigned *tops = NULL;
    uploader u;
    qwen3_result r;
    TRY(check_shapes(&m->config, err));
    TRY(open_device(m, desc->device, err));
    m->layers = (layer_weights *)host_alloc(&m->allocator, (size_t)m->config.n_layer * sizeof *m->layers);
    if (!m->layers) return no_host_memory(err, (size_t)m->config.n_layer * sizeof *m->layers);
    device_guard guard(m->device);
    CUDA_TRY(guard.status);
    lay_out_model(m, view->weights, &a, &tops);
    TRY(device_alloc(&m->memory, a.used, "the model", err));
    m->size = a.used;
    a.base = m->memory;
    a.used = 0;
    lay_out_model(m, view->weights, &a, &tops);
    r = open_uploader(&u, desc, (double)m->size, err);
    if (r == QWEN3_OK) r = upload_weights(&u, m, view->weights, tops, err);
    close_uploader(&u);
    return r;
}

static qwen3_result create_model_from(void **model_state, const qwen3i_model_view *view, const qwen3_load_desc *desc, const qwen3i_err *err) {
    cuda_model *m = (cuda_model *)host_alloc(view->allocator, sizeof *m);
    *model_state = NULL;
    if (!m) return no_host_memory(err, sizeof *m);
    m->allocator = *view->allocator;
    m->config = *view->config;
    const qwen3_result r = fill_model(m, view, desc, err);
    if (r == QWEN3_OK) *model_state = m;
    else free_model(m);
    return r;
}

static qwen3_result create_model(void **model_state, const qwen3_model *model, const qwen3_load_desc *desc, const qwen3i_err *err) {
    const qwen3i_model_view view = qwen3i_view(model);
    return create_model_from(model_state, &view, desc, err);
}

static const char *device_name(const void *model_state) { return ((const cuda_model *)model_state)->name; }

/* ================================================================================================
   CONTEXT: everything one user of a model needs, taken at once
   ================================================================================================ */
const int LISTED_MAX = 1 << 15;         /* biases and penalised tokens in one step */
const int N_PLANS    = 256;

struct upload_slot {                    /* pinned memory, copied to its twin on the device */
    row_info       *rows;               /* [max_rows] */
    attention_tile *tiles;              /* [max_rows] */
    choice         *choices;            /* [max_seqs] */
    listed         *lists;              /* [LISTED_MAX] */
    int            *report;             /* [max_seqs] written by the device: the tokens chosen */
};

struct plan {                           /* a matrix product of one shape, and how cuBLASLt does it best */
    int                    n, rows, k, ldy, aligned;
    qwen3i_type            type;
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

struct run_ahead {                      /* a step that was begun before it was asked for */
    int           n;                    /* its sequences; 0: none */
    int           slot;
    int          *seqs, *lengths;       /* [max_seqs] each one's tokens before the step, ... */
    int          *last;                 /* [max_seqs] ... and the last of them */
    qwen3_sampler *samplers;            /* [max_seqs] as they must be when it is asked for */
    u64          *bias_hashes;          /* [max_seqs] */
};

struct cuda_ctx {
    const cuda_model *m;
    qwen3_ctx_desc    desc;
    int               max_rows, group, kv_dim, q_dim, qkv_ld, act_ld, embd_ld, ff_ld;
    bool              own_stream, tiles;        /* tiles: the tensor core kernel does this model's attention */
    const qwen3_token *eos; int n_eos;          /* the model's */
    int               n_choose;                 /* ids below this may be chosen */
    cudaStream_t      stream, capture;
    cublasLtHandle_t  lt;
    plan             *plans; int next_plan;     /* [N_PLANS] */
    cudaGraphExec_t  *graphs;                   /* [max_seqs + 1] a decode step of so many rows; ... */
    int              *runs;                     /* ... made when it has run once and all code is loaded */
    char             *memory, *pinned;
    size_t            memory_size, pinned_size, host_size;
    char             *host;                     /* plans, graphs, parity, run-ahead */

    /* device memory */
    char   *k, *v;                              /* [n_layer, max_seqs, max_ctx, kv_dim] of the KV type */
    size_t  kv_layer_bytes;
    float  *kept;                               /* [max_seqs, 2, n_vocab]: the current logits and the next */
    float2 *rope;                               /* [max_ctx, head_dim / 2] */
    float  *freqs;
    float  *x, *h, *tmp;                        /* [max_rows, n_embd padded]: residual, normalised, a product */
    float  *qkv, *attn, *gate_up, *ff;          /* [max_rows, qkv_ld | q_dim | 2 n_ff | n_ff padded] */
    void   *act; float *act_scale;              /* [max_rows, act_ld] input of a product */
    float  *logits, *logprobs;                  /* [head_rows, n_vocab], [head_rows] */
    float  *parts;
    unsigned *qkv_tickets, *attn_tickets;
    void   *workspace;
    row_info *rows; attention_tile *tile_list; choice *choices; listed *lists;
    int    *chosen; u64 *best;                  /* [max_seqs] */

    /* pinned host memory */
    upload_slot slots[RING];
    cudaEvent_t uploaded[RING], reported[RING];
    int         turn;
    float      *host_logits;                    /* [n_vocab] */

    int        *parity;                         /* [max_seqs] which half of kept is current */
    run_ahead   ahead;
    int         lab_rows, lab_tiles;            /* of the batch that single kernels work on */
};

static int head_rows(const cuda_ctx *c) { return least(HEAD_ROWS, c->max_rows); }

/* How many parts the positions of a row are split into: enough to fill the chip, from the shape alone. */
static int attention_splits(const cuda_ctx *c, int rows) {
    const int want = 2 * c->m->n_sm / (c->m->config.n_head_kv * rows);
    return want < 1 ? 1 : want > MAX_SPLITS ? MAX_SPLITS : want;
}

static void lay_out_device(cuda_ctx *c, arena *a) {
    const qwen3i_config *g = &c->m->config;
    const size_t rows = (size_t)c->max_rows, seqs = (size_t)c->desc.max_seqs, vocab = (size_t)g->n_vocab;
    const size_t embd = (size_t)c->embd_ld, half = (size_t)g->head_dim / 2, ctx = (size_t)c->desc.max_ctx;
    const size_t part_rows = (size_t)most(MAX_SPLITS, 2 * c->m->n_sm / g->n_head_kv);
    c->kv_layer_bytes = seqs * ctx * (size_t)c->kv_dim * type_size((qwen3i_type)c->desc.kv_type);
    c->k = a->take<char>((size_t)g->n_layer * c->kv_layer_bytes);
    c->v = a->take<char>((size_t)g->n_layer * c->kv_layer_bytes);
    c->kept = a->take<float>(seqs * 2 * vocab);
    c->rope = a->take<float2>(ctx * half);
    c->freqs = a->take<float>(half);
    c->x = a->take<float>(rows * embd);
    c->h = a->take<float>(rows * embd);
    c->tmp = a->take<float>(rows * embd);
    c->qkv = a->take<float>(rows * (size_t)c->qkv_ld);
    c->attn = a->take<float>(rows * (size_t)c->q_dim);
    c->gate_up = a->take<float>(rows * 2 * (size_t)c->ff_ld);
    c->ff = a->take<float>((c->desc.kernels == QWEN3_PATH_STANDARD ? rows : (size_t)least(c->max_rows, MATVEC_ROWS)) * (size_t)c->ff_ld);
    c->act = a->take<float>(rows * (size_t)c->act_ld);
    c->act_scale = a->take<float>(rows);
    c->logits = a->take<float>((size_t)head_rows(c) * vocab);
    c->logprobs = a->take<float>((size_t)head_rows(c));
    c->parts = a->take<float>(part_rows * (size_t)g->n_head * (size_t)(g->head_dim + 2));
    c->qkv_tickets = a->take<unsigned>((size_t)(g->n_head + g->n_head_kv));
    c->attn_tickets = a->take<unsigned>(rows * (size_t)g->n_head);
    c->workspace = a->take<char>(WORKSPACE);
    c->rows = a->take<row_info>(rows);
    c->tile_list = a->take<attention_tile>(rows);
    c->choices = a->take<choice>(seqs);
    c->lists = a->take<listed>((size_t)LISTED_MAX);
    c->chosen = a->take<int>(seqs);
    c->best = a->take<u64>(seqs);
}

static void lay_out_pinned(cuda_ctx *c, arena *a) {
    const size_t rows = (size_t)c->max_rows, seqs = (size_t)c->desc.max_seqs;
    for (int i = 0; i < RING; i++) {
        c->slots[i].rows = a->take<row_info>(rows);
        c->slots[i].tiles = a->take<attention_tile>(rows);
        c->slots[i].choices = a->take<choice>(seqs);
        c->slots[i].lists = a->take<listed>((size_t)LISTED_MAX);
        c->slots[i].report = a->take<int>(seqs);
    }
    c->host_logits = a->take<float>((size_t)c->m->config.n_vocab);
}

static void lay_out_host(cuda_ctx *c, arena *a) {
    const size_t seqs = (size_t)c->desc.max_seqs;
    c->plans = a->take<plan>((size_t)N_PLANS);
    c->graphs = a->take<cudaGraphExec_t>(seqs + 1);
    c->runs = a->take<int>(seqs + 1);
    c->parity = a->take<int>(seqs);
    c->ahead.seqs = a->take<int>(seqs);
    c->ahead.lengths = a->take<int>(seqs);
    c->ahead.last = a->take<int>(seqs);
    c->ahead.samplers = a->take<qwen3_sampler>(seqs);
    c->ahead.bias_hashes = a->take<u64>(seqs);
}

/* What follows from the model and the descriptor. */
static void shape_ctx(cuda_ctx *c, const cuda_model *m, const qwen3_ctx_desc *desc) {
    const qwen3i_config *g = &m->config;
    memset(c, 0, sizeof *c);
    c->m = m;
    c->desc = *desc;
    c->max_rows = most(desc->prefill_chunk, desc->max_seqs);
    c->group = g->n_head / g->n_head_kv;
    c->q_dim = g->n_head * g->head_dim;
    c->kv_dim = g->n_head_kv * g->head_dim;
    c->qkv_ld = c->q_dim + 2 * c->kv_dim;
    c->embd_ld = round_up(g->n_embd, 8);
    c->ff_ld = round_up(g->n_ff, 8);
    c->act_ld = round_up(most(most(g->n_embd, g->n_ff), c->q_dim), 8);
    c->tiles = (g->head_dim == 64 || g->head_dim == 128) && c->group <= TILE_ROWS &&
               (desc->kv_type == QWEN3_KV_F16 || (desc->kv_type == QWEN3_KV_BF16 && m->capability >= 80));
}

static qwen3_memory ctx_memory(const void *model_state, const qwen3_model *, const qwen3_ctx_desc *desc) {
    qwen3_memory bytes;
    arena device = {NULL, 0}, pinned = {NULL, 0}, host = {NULL, 0};
    cuda_ctx c;
    shape_ctx(&c, (const cuda_model *)model_state, desc);
    lay_out_device(&c, &device);
    lay_out_pinned(&c, &pinned);
    lay_out_host(&c, &host);
    bytes.device_bytes = device.used;
    bytes.host_bytes = pinned.used + host.used + sizeof c;
    return bytes;
}

static void free_ctx(void *ctx_state) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    if (!c) return;
    const qwen3_allocator a = c->desc.allocator;
    {
        device_guard guard(c->m->device);
        if (c->stream) cudaStreamSynchronize(c->stream);
        for (int i = 0; c->plans && i < N_PLANS; i++) destroy_plan(&c->plans[i]);
        for (int i = 0; c->graphs && i <= c->desc.max_seqs; i++) if (c->graphs[i]) cudaGraphExecDestroy(c->graphs[i]);
        for (int i = 0; i < RING; i++) {
            if (c->uploaded[i]) cudaEventDestroy(c->uploaded[i]);
            if (c->reported[i]) cudaEventDestroy(c->reported[i]);
        }
        if (c->lt) cublasLtDestroy(c->lt);
        if (c->own_stream && c->stream) cudaStreamDestroy(c->stream);
        if (c->capture) cudaStreamDestroy(c->capture);
        if (c->pinned) cudaFreeHost(c->pinned);
        if (c->memory) cudaFree(c->memory);
    }
    host_free(&a, c->host, c->host_size);
    host_free(&a, c, sizeof *c);
}

static qwen3_result take_memory(cuda_ctx *c, const qwen3i_err *err) {
    arena device = {NULL, 0}, pinned = {NULL, 0}, host = {NULL, 0};
    lay_out_device(c, &device);
    lay_out_pinned(c, &pinned);
    lay_out_host(c, &host);
    c->memory_size = device.used;
    c->pinned_size = pinned.used;
    c->host_size = host.used;
    c->plans = NULL;
    c->graphs = NULL;
    c->host = (char *)host_alloc(&c->desc.allocator, c->host_size);
    if (!c->host) return no_host_memory(err, c->host_size);
    host.base = c->host;
    host.used = 0;
    lay_out_host(c, &host);
    if (cudaHostAlloc((void **)&c->pinned, c->pinned_size, cudaHostAllocMapped) != cudaSuccess) {
        cudaGetLastError();
        return no_host_memory(err, c->pinned_size);
    }
    pinned.base = c->pinned;
    pinned.used = 0;
    lay_out_pinned(c, &pinned);
    TRY(device_alloc(&c->memory, c->memory_size, "the context", err));
    device.base = c->memory;
    device.used = 0;
    lay_out_device(c, &device);
    return QWEN3_OK;
}

static qwen3_result allow_tile_shared(const cuda_ctx *c, const qwen3i_err *err);

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
    LT_TRY(cublasLtCreate(&c->lt));
    TRY(allow_tile_shared(c, err));
    CUDA_TRY(cudaFuncSetAttribute(choose_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(choose_shared)));
    scale = qwen3i_rotation(freqs, g, (double)c->desc.yarn_factor);
    CUDA_TRY(cudaMemcpyAsync(c->freqs, freqs, (size_t)g->head_dim / 2 * sizeof(float), cudaMemcpyHostToDevice, c->stream));
    CUDA_TRY(launch(c->stream, dim3((unsigned)c->desc.max_ctx), 64, 0, rope_table_kernel, c->rope, (const float *)c->freqs, g->head_dim / 2, scale));
    CUDA_TRY(cudaMemsetAsync(c->kept, 0, (size_t)c->desc.max_seqs * 2 * (size_t)g->n_vocab * sizeof(float), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->qkv_tickets, 0, (size_t)(g->n_head + g->n_head_kv) * sizeof(unsigned), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->attn_tickets, 0, (size_t)c->max_rows * (size_t)g->n_head * sizeof(unsigned), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->best, 0, (size_t)c->desc.max_seqs * sizeof(u64), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->chosen, 0, (size_t)c->desc.max_seqs * sizeof(int), c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

static qwen3_result create_ctx(void **ctx_state, void *model_state, const qwen3_model *model, const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    const cuda_model *m = (const cuda_model *)model_state;
    cuda_ctx *c = (cuda_ctx *)host_alloc(&desc->allocator, sizeof *c);
    *ctx_state = NULL;
    if (!c) return no_host_memory(err, sizeof *c);
    shape_ctx(c, m, desc);
    const qwen3i_model_view view = qwen3i_view(model);      /* the tokenizer may have come after the weights */
    c->eos = view.eos;
    c->n_eos = view.n_eos;
    c->n_choose = least(view.n_tokens, m->config.n_vocab);
    device_guard guard(m->device);
    const qwen3_result r = guard.status == cudaSuccess ? fill_ctx(c, err) : cuda_fail(err, guard.status, "cudaSetDevice");
    if (r == QWEN3_OK) *ctx_state = c;
    else free_ctx(c);
    return r;
}

/* ================================================================================================
   MATRIX PRODUCTS by cuBLASLt: a plan for each shape, made once
   ================================================================================================ */
static qwen3_result describe_plan(plan *p, const qwen3i_err *err) {
    const cudaDataType_t in = p->type == QWEN3I_F32 ? CUDA_R_32F : CUDA_R_16F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    LT_TRY(cublasLtMatmulDescCreate(&p->op, p->type == QWEN3I_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT_TRY(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->w, in, (uint64_t)p->k, (uint64_t)p->n, p->k));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->x, in, (uint64_t)p->k, (uint64_t)p->rows, p->k));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->y, CUDA_R_32F, (uint64_t)p->n, (uint64_t)p->rows, p->ldy));
    return QWEN3_OK;
}

/* The fastest algorithm by cuBLASLt's own estimate, among those whose sums have a fixed order. */
static qwen3_result choose_algorithm(const cuda_ctx *c, plan *p, const qwen3i_err *err) {
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found[1];
    const uint64_t workspace = WORKSPACE;
    const uint32_t align_in = 16, align_out = p->aligned ? 16 : 4, reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int n = 0;
    LT_TRY(cublasLtMatmulPreferenceCreate(&wish));
    cublasStatus_t s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_in, sizeof align_in);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_in, sizeof align_in);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_out, sizeof align_out);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_out, sizeof align_out);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulAlgoGetHeuristic(c->lt, p->op, p->w, p->x, p->y, p->y, wish, 1, found, &n);
    cublasLtMatmulPreferenceDestroy(wish);
    if (s != CUBLAS_STATUS_SUCCESS || n == 0)
        return fail(err, QWEN3_ERR_DEVICE, "cuBLASLt has no algorithm for [%d, %d] times [%d, %d] (status %d)", p->rows, p->k, p->k, p->n, (int)s);
    p->algo = found[0].algo;
    return QWEN3_OK;
}

static qwen3_result find_plan(cuda_ctx *c, const plan &want, plan **out, const qwen3i_err *err) {
    for (int i = 0; i < N_PLANS; i++) {
        plan *p = &c->plans[i];
        if (p->op && p->n == want.n && p->rows == want.rows && p->k == want.k && p->ldy == want.ldy &&
            p->aligned == want.aligned && p->type == want.type) { *out = p; return QWEN3_OK; }
    }
    plan *p = &c->plans[c->next_plan];
    c->next_plan = (c->next_plan + 1) % N_PLANS;
    destroy_plan(p);
    *p = want;
    qwen3_result r = describe_plan(p, err);
    if (r == QWEN3_OK) r = choose_algorithm(c, p, err);
    if (r != QWEN3_OK) destroy_plan(p);
    *out = p;
    return r;
}

/* y[rows, n] (rows ldy apart) = x[rows, w.ld] W^T for rows [first, first + n) of W; x of W's type. */
static qwen3_result product(cuda_ctx *c, cudaStream_t s, float *y, int ldy, const matrix &w, int first, int n, const void *x, int rows, const qwen3i_err *err) {
    plan want, *p = NULL;
    memset(&want, 0, sizeof want);
    want.n = n; want.rows = rows; want.k = w.ld; want.ldy = ldy; want.type = w.type;
    want.aligned = (size_t)y % 16 == 0 && ldy % 4 == 0;
    TRY(find_plan(c, want, &p, err));
    const char *data = (const char *)w.data + (size_t)first * (size_t)w.ld * type_size(w.type);
    for (int term = w.terms - 1; term >= 0; term--) {           /* the small one first */
        const float beta = term == w.terms - 1 ? 0.0f : 1.0f;
        const char *in = (const char *)x + (size_t)term * rest_of(w, rows) * type_size(w.type);
        LT_TRY(cublasLtMatmul(c->lt, p->op, &w.scale, data, p->w, in, p->x, &beta, y, p->y, y, p->y, &p->algo, c->workspace, WORKSPACE, s));
    }
    return QWEN3_OK;
}

/* ================================================================================================
   LAYER: the operations on the rows of a batch, each in three ways
   ================================================================================================ */
enum mode { MATVEC, GEMM, STANDARD };   /* fused up to 8 rows, fused with cuBLASLt, one kernel an operation */

struct pass {                           /* one batch on its way through the layers */
    cuda_ctx          *c;
    cudaStream_t       s;
    int                n, n_tiles;      /* n_tiles 0: attention row by row */
    mode               how;
    bool               pending;         /* tmp is still to be added to x ... */
    const float       *pending_scale;   /* ... times this */
    const qwen3i_err  *err;
};

#define RUN(...) do { const cudaError_t e_ = launch(p->s, __VA_ARGS__); if (e_ != cudaSuccess) return cuda_fail(p->err, e_, "kernel launch"); } while (0)

static pass make_pass(cuda_ctx *c, cudaStream_t s, int n, int n_tiles, const qwen3i_err *err) {
    pass p;
    p.c = c; p.s = s; p.n = n; p.n_tiles = n_tiles;
    p.how = c->desc.kernels == QWEN3_PATH_STANDARD ? STANDARD : n <= MATVEC_ROWS ? MATVEC : GEMM;
    p.pending = false;
    p.pending_scale = NULL;
    p.err = err;
    return p;
}

static dim3 grid1(int x)        { return dim3((unsigned)x); }
static dim3 grid2(int x, int y) { return dim3((unsigned)x, (unsigned)y); }

/* Threads for a block that works on rows of n elements, `each` at a time: fewer if there are many rows. */
static int row_threads(int n, int each, int rows) {
    const int want = round_up(ceil_div(n, each), 32), limit = rows > 512 ? 256 : 1024;
    return want < 32 ? 32 : want > limit ? limit : want;
}

template <class T>
static cudaError_t launch_rmsnorm(cudaStream_t s, float *y, int ldy, const T *x, int ldx, const row_info *outs, const float *gain,
                           int rows, int groups, int width, int pad, float eps) {
    const bool four = width % 4 == 0 && ldx % 4 == 0 && ldy % 4 == 0 && (size_t)x % 16 == 0 && (size_t)y % 16 == 0 && (size_t)gain % 16 == 0;
    if (four) return launch(s, grid2(rows, groups), row_threads(width, 4, rows), 0, rmsnorm_kernel<T, 4>, y, ldy, x, ldx, outs, gain, width, pad, eps);
    return launch(s, grid2(rows, groups), row_threads(width, 1, rows), 0, rmsnorm_kernel<T, 1>, y, ldy, x, ldx, outs, gain, width, pad, eps);
}

/* Input of a product with W: float32 rows to c->act in W's type. */
static qwen3_result round_rows(const pass *p, const matrix &w, const float *in, int ld_in, int n) {
    cuda_ctx *c = p->c;
    const int threads = row_threads(w.ld, 4, n);
    if (w.type == QWEN3I_F32) RUN(grid1(n), threads, 0, round_rows_kernel<float>, (float *)c->act, c->act_scale, in, ld_in, w.cols, w.ld, rest_of(w, n));
    else RUN(grid1(n), threads, 0, round_rows_kernel<half_t>, (half_t *)c->act, c->act_scale, in, ld_in, w.cols, w.ld, rest_of(w, n));
    return QWEN3_OK;
}

const float *act_scale(const pass *p, const matrix &w) { return w.type == QWEN3I_F32 ? NULL : p->c->act_scale; }

/* y = W act, without the rows' scales */
static qwen3_result act_product(const pass *p, float *y, int ldy, const matrix &w, int first, int n) {
    return product(p->c, p->s, y, ldy, w, first, n, p->c->act, p->n, p->err);
}

static qwen3_result add_pending(pass *p) {
    cuda_ctx *c = p->c;
    if (!p->pending) return QWEN3_OK;
    RUN(grid1(p->n), row_threads(c->embd_ld, 4, p->n), 0, add_rows_kernel, c->x, (const float *)c->tmp, p->pending_scale, c->m->config.n_embd, c->embd_ld);
    p->pending = false;
    return QWEN3_OK;
}

/* ---- matrix-vector kernels by type, rows and rows a warp ---------------------------------------- */
static matvec_in vector_input(const pass *p, const matrix &w, const float *x, int ldx) {
    matvec_in in;
    in.w = w.data; in.scale = w.scale; in.n = w.rows; in.k = w.cols; in.ldw = w.ld;
    in.x = x; in.rows = p->n; in.ldx = ldx;
    return in;
}

/* Rows a warp: as many as leave a block for every multiprocessor. */
static int rows_a_warp(const pass *p, int n, int most_rows) {
    int r = most_rows;
    while (r > 1 && ceil_div(n, MATVEC_WARPS * r) * 10 < p->c->m->n_sm * 9) r /= 2;
    return r;
}

template <class W, int R, int NR, bool ADD>
static cudaError_t launch_matvec(const pass *p, const matvec_in &in, float *y, int ldy, const row_info *outs) {
    return launch(p->s, grid1(ceil_div(in.n, MATVEC_WARPS * NR)), 32 * MATVEC_WARPS, 0, matvec_kernel<W, R, NR, ADD>, in, y, ldy, outs);
}
template <class W, bool ADD> static cudaError_t matvec_rows_of(const pass *p, const matvec_in &in, float *y, int ldy, const row_info *outs) {
    if (in.rows > 4) return launch_matvec<W, 8, 2, ADD>(p, in, y, ldy, outs);
    if (in.rows > 2) return launch_matvec<W, 4, 2, ADD>(p, in, y, ldy, outs);
    if (in.rows > 1) return launch_matvec<W, 2, 2, ADD>(p, in, y, ldy, outs);
    switch (rows_a_warp(p, in.n, 4)) {
        case 4:  return launch_matvec<W, 1, 4, ADD>(p, in, y, ldy, outs);
        case 2:  return launch_matvec<W, 1, 2, ADD>(p, in, y, ldy, outs);
        default: return launch_matvec<W, 1, 1, ADD>(p, in, y, ldy, outs);
    }
}
/* y (+)= W x */
template <bool ADD> static qwen3_result matvec(const pass *p, float *y, int ldy, const row_info *outs, const matrix &w, const float *x, int ldx, int rows) {
    matvec_in in = vector_input(p, w, x, ldx);
    in.rows = rows;
    const cudaError_t e = w.type == QWEN3I_F32 ? matvec_rows_of<float, ADD>(p, in, y, ldy, outs) : matvec_rows_of<half_t, ADD>(p, in, y, ldy, outs);
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, "matvec");
}

template <class W, int R, int P> static cudaError_t launch_mlp(const pass *p, const matvec_in &in, float *y, int ldy) {
    return launch(p->s, grid1(ceil_div(in.n / 2, MATVEC_WARPS * P)), 32 * MATVEC_WARPS, 0, mlp_kernel<W, R, P>, in, y, ldy);
}
template <class W> static cudaError_t mlp_rows_of(const pass *p, const matvec_in &in, float *y, int ldy) {
    if (in.rows > 4) return launch_mlp<W, 8, 1>(p, in, y, ldy);
    if (in.rows > 2) return launch_mlp<W, 4, 1>(p, in, y, ldy);
    if (in.rows > 1) return launch_mlp<W, 2, 1>(p, in, y, ldy);
    return rows_a_warp(p, in.n / 2, 2) == 2 ? launch_mlp<W, 1, 2>(p, in, y, ldy) : launch_mlp<W, 1, 1>(p, in, y, ldy);
}

template <class W, class T, int R, int NR> static cudaError_t launch_qkv(const pass *p, const matvec_in &in, const qkv_args &a) {
    return launch(p->s, grid1(ceil_div(in.n, MATVEC_WARPS * NR)), 32 * MATVEC_WARPS, 0, qkv_rope_kernel<W, T, R, NR>, in, a, p->c->qkv_tickets);
}
template <class W, class T> static cudaError_t qkv_rows_of(const pass *p, const matvec_in &in, const qkv_args &a) {
    if (in.rows > 4) return launch_qkv<W, T, 8, 2>(p, in, a);
    if (in.rows > 2) return launch_qkv<W, T, 4, 2>(p, in, a);
    if (in.rows > 1) return launch_qkv<W, T, 2, 2>(p, in, a);
    switch (rows_a_warp(p, in.n, 4)) {
        case 4:  return launch_qkv<W, T, 1, 4>(p, in, a);
        case 2:  return launch_qkv<W, T, 1, 2>(p, in, a);
        default: return launch_qkv<W, T, 1, 1>(p, in, a);
    }
}
template <class T> static cudaError_t fused_qkv(const pass *p, const matrix &w, const matvec_in &in, const qkv_args &a) {
    return w.type == QWEN3I_F32 ? qkv_rows_of<float, T>(p, in, a) : qkv_rows_of<half_t, T>(p, in, a);
}

/* Calls F<T>(...) with T as the type of the cache. */
#define BY_KV_TYPE(c, call) ((c)->desc.kv_type == QWEN3_KV_F32 ? call(float) : (c)->desc.kv_type == QWEN3_KV_BF16 ? call(bf16_t) : call(half_t))

/* ---- x = embedding of the rows' tokens ------------------------------------------------------------- */
static qwen3_result embed(const pass *p) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->embed;
    const int threads = row_threads(w.cols, 4, p->n);
    if (w.type == QWEN3I_F32) RUN(grid1(p->n), threads, 0, embed_kernel<float>, c->x, (const float *)w.data, w.scale, (const row_info *)c->rows, w.cols, w.ld);
    else RUN(grid1(p->n), threads, 0, embed_kernel<half_t>, c->x, (const half_t *)w.data, w.scale, (const row_info *)c->rows, w.cols, w.ld);
    return QWEN3_OK;
}

/* ---- h = RMSNorm(x), as the input of w ---------------------------------------------------------------- */
static qwen3_result norm(pass *p, const float *gain, const matrix &w) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const int threads = row_threads(c->embd_ld, 4, p->n);
    const float *add = p->pending ? c->tmp : NULL;
    if (p->how != GEMM) {
        const cudaError_t e = launch_rmsnorm<float>(p->s, c->h, c->embd_ld, c->x, c->embd_ld, NULL, gain, p->n, 1, g->n_embd, c->embd_ld, g->rms_eps);
        if (e != cudaSuccess) return cuda_fail(p->err, e, "rmsnorm");
        return p->how == STANDARD ? round_rows(p, w, c->h, c->embd_ld, p->n) : QWEN3_OK;
    }
    if (w.type == QWEN3I_F32) RUN(grid1(p->n), threads, 0, add_rmsnorm_kernel<float>, (float *)c->act, c->act_scale, c->x, add, p->pending_scale, gain, g->n_embd, c->embd_ld, rest_of(w, p->n), g->rms_eps);
    else RUN(grid1(p->n), threads, 0, add_rmsnorm_kernel<half_t>, (half_t *)c->act, c->act_scale, c->x, add, p->pending_scale, gain, g->n_embd, c->embd_ld, rest_of(w, p->n), g->rms_eps);
    p->pending = false;
    return QWEN3_OK;
}

/* ---- q, k, v = RoPE(RMSNorm_head(W h)); k, v into the cache --------------------------------------------- */
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
    return a;
}

template <class T> static cudaError_t norm_rope_store(const pass *p, const qkv_args &a, const float *scale) {
    return launch(p->s, grid2(p->n, ceil_div(a.n_head + 2 * a.n_head_kv, 8)), 256, 0, norm_rope_store_kernel<T>, a, scale);
}
template <class T> static cudaError_t kv_store(const pass *p, const qkv_args &a) {
    return launch(p->s, grid1(p->n), row_threads(a.kv.kv_dim, 4, p->n), 0, kv_store_kernel<T>, a);
}

static qwen3_result standard_qkv(const pass *p, const matrix &w, const qkv_args &a) {
    cuda_ctx *c = p->c;
    const float *scale = act_scale(p, w);
    float *q = c->qkv, *k = q + c->q_dim;
    TRY(act_product(p, q, a.ld, w, 0, c->q_dim));
    TRY(act_product(p, k, a.ld, w, c->q_dim, c->kv_dim));
    TRY(act_product(p, k + c->kv_dim, a.ld, w, c->q_dim + c->kv_dim, c->kv_dim));
    if (scale) RUN(grid1(p->n), row_threads(a.ld, 4, p->n), 0, scale_rows_kernel, q, scale, a.ld, a.ld);
    cudaError_t e = launch_rmsnorm<float>(p->s, q, a.ld, q, a.ld, NULL, a.q_norm, p->n, a.n_head, a.head_dim, 0, a.eps);
    if (e == cudaSuccess) e = launch_rmsnorm<float>(p->s, k, a.ld, k, a.ld, NULL, a.k_norm, p->n, a.n_head_kv, a.head_dim, 0, a.eps);
    if (e == cudaSuccess) e = launch(p->s, grid2(p->n, a.n_head + a.n_head_kv), row_threads(a.head_dim / 2, 1, p->n), 0, rope_kernel, a);
#define CALL(T) kv_store<T>(p, a)
    if (e == cudaSuccess) e = BY_KV_TYPE(c, CALL);
#undef CALL
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, "q, k and v");
}

static qwen3_result qkv_rope(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].qkv;
    const qkv_args a = qkv_arguments(p, layer);
    cudaError_t e;
    if (p->how == STANDARD) return standard_qkv(p, w, a);
    if (p->how == MATVEC) {
        const matvec_in in = vector_input(p, w, c->h, c->embd_ld);
#define CALL(T) fused_qkv<T>(p, w, in, a)
        e = BY_KV_TYPE(c, CALL);
#undef CALL
    } else {
        TRY(act_product(p, c->qkv, a.ld, w, 0, w.rows));
#define CALL(T) norm_rope_store<T>(p, a, act_scale(p, w))
        e = BY_KV_TYPE(c, CALL);
#undef CALL
    }
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, "qkv_rope");
}

/* ---- a = softmax(q k / sqrt(d)) v ------------------------------------------------------------------------ */
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
    return a;
}

template <class T, int G> static cudaError_t launch_split(const pass *p, const attention_args &a) {
    const int group = a.n_head / a.n_head_kv, splits = attention_splits(p->c, p->n);
    const dim3 grid((unsigned)p->n, (unsigned)(a.n_head_kv * ceil_div(group, G)), (unsigned)splits);
    if (a.head_dim == 128) return launch(p->s, grid, 32 * SPLIT_WARPS, 0, attention_split_kernel<T, G, 16>, a);
    return launch(p->s, grid, 32 * SPLIT_WARPS, 0, attention_split_kernel<T, G, 0>, a);
}
template <class T> static cudaError_t attention_split(const pass *p, const attention_args &a) {
    const int group = a.n_head / a.n_head_kv;
    return group == 1 ? launch_split<T, 1>(p, a) : group == 2 ? launch_split<T, 2>(p, a) :
           group <= 4 ? launch_split<T, 4>(p, a) : launch_split<T, 8>(p, a);
}

struct tile_kernel { void (*kernel)(attention_args, const attention_tile *); size_t shared; };

template <class T, int TERMS> static tile_kernel tile_kernel_of(int head_dim) {
    const tile_kernel wide = {attention_tile_kernel<T, 128, TERMS>, attention_tile_shared<T, 128, TERMS>()};
    const tile_kernel narrow = {attention_tile_kernel<T, 64, TERMS>, attention_tile_shared<T, 64, TERMS>()};
    return head_dim == 128 ? wide : narrow;
}

/* The tensor core kernel for this context, and its shared memory. */
static tile_kernel choose_tile_kernel(const cuda_ctx *c) {
    return c->desc.kv_type == QWEN3_KV_BF16 ? tile_kernel_of<bf16_t, 3>(c->m->config.head_dim) : tile_kernel_of<half_t, 2>(c->m->config.head_dim);
}

static qwen3_result allow_tile_shared(const cuda_ctx *c, const qwen3i_err *err) {
    if (!c->tiles) return QWEN3_OK;
    const tile_kernel k = choose_tile_kernel(c);
    CUDA_TRY(cudaFuncSetAttribute(k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)k.shared));
    return QWEN3_OK;
}

static qwen3_result attention(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const attention_args a = attention_arguments(p, layer);
    cudaError_t e;
    if (p->n_tiles > 0) {
        const tile_kernel k = choose_tile_kernel(c);
        e = launch(p->s, grid2(p->n_tiles, a.n_head_kv), 128, k.shared, k.kernel, a, (const attention_tile *)c->tile_list);
    } else {
#define CALL(T) attention_split<T>(p, a)
        e = BY_KV_TYPE(c, CALL);
#undef CALL
    }
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, "attention");
}

/* ---- x = x + W act ------------------------------------------------------------------------------------------ */
/* Leaves the product in tmp; the next norm adds it, except on the standard path. */
static qwen3_result product_to_add(pass *p, const matrix &w) {
    TRY(act_product(p, p->c->tmp, p->c->embd_ld, w, 0, w.rows));
    p->pending = true;
    p->pending_scale = act_scale(p, w);
    return p->how == STANDARD ? add_pending(p) : QWEN3_OK;
}

static qwen3_result o_proj(pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].wo;
    if (p->how == MATVEC) return matvec<true>(p, c->x, c->embd_ld, NULL, w, c->attn, c->q_dim, p->n);
    TRY(round_rows(p, w, c->attn, c->q_dim, p->n));
    return product_to_add(p, w);
}

/* ---- m = silu(Wgate h) * (Wup h), as the input of Wdown ------------------------------------------------------- */
static qwen3_result mlp(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].gate_up, &down = c->m->layers[layer].w_down;
    const int n_ff = c->m->config.n_ff, ld = 2 * c->ff_ld, threads = row_threads(n_ff, 4, p->n);
    if (p->how == MATVEC) {
        const matvec_in in = vector_input(p, w, c->h, c->embd_ld);
        const cudaError_t e = w.type == QWEN3I_F32 ? mlp_rows_of<float>(p, in, c->ff, c->ff_ld) : mlp_rows_of<half_t>(p, in, c->ff, c->ff_ld);
        return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, "mlp");
    }
    if (p->how == STANDARD) {
        TRY(act_product(p, c->gate_up, ld, w, 0, n_ff));
        TRY(act_product(p, c->gate_up + n_ff, ld, w, n_ff, n_ff));
        RUN(grid1(p->n), threads, 0, swiglu_kernel<float>, c->ff, c->act_scale, (const float *)c->gate_up, act_scale(p, w), n_ff, ld, c->ff_ld, (size_t)0);
        return round_rows(p, down, c->ff, c->ff_ld, p->n);
    }
    TRY(act_product(p, c->gate_up, ld, w, 0, w.rows));
    if (down.type == QWEN3I_F32) RUN(grid1(p->n), threads, 0, swiglu_kernel<float>, (float *)c->act, c->act_scale, (const float *)c->gate_up, act_scale(p, w), n_ff, ld, c->ff_ld, rest_of(down, p->n));
    else RUN(grid1(p->n), threads, 0, swiglu_kernel<half_t>, (half_t *)c->act, c->act_scale, (const float *)c->gate_up, act_scale(p, w), n_ff, ld, c->ff_ld, rest_of(down, p->n));
    return QWEN3_OK;
}

static qwen3_result down_proj(pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].w_down;
    if (p->how == MATVEC) return matvec<true>(p, c->x, c->embd_ld, NULL, w, c->ff, c->ff_ld, p->n);
    return product_to_add(p, w);
}

/* ---- one decoder layer: x in place ------------------------------------------------------------------------------ */
static qwen3_result decoder_layer(pass *p, int layer) {
    const layer_weights *w = &p->c->m->layers[layer];
    TRY(norm(p, w->attn_norm, w->qkv));             /* h = RMSNorm(x)                                    */
    TRY(qkv_rope(p, layer));                        /* q, k, v = W h; q, k = RoPE(RMSNorm(q, k)); cache  */
    TRY(attention(p, layer));                       /* a = softmax(q k / sqrt(d)) v                      */
    TRY(o_proj(p, layer));                          /* x = x + Wo a                                      */
    TRY(norm(p, w->mlp_norm, w->gate_up));          /* h = RMSNorm(x)                                    */
    TRY(mlp(p, layer));                             /* m = silu(Wgate h) * (Wup h)                       */
    return down_proj(p, layer);                     /* x = x + Wdown m                                   */
}

static int cancelled(const cuda_ctx *c) { return c->desc.cancel && c->desc.cancel(c->desc.cancel_user); }

static qwen3_result all_layers(pass *p, bool may_cancel) {
    TRY(embed(p));
    for (int i = 0; i < p->c->m->config.n_layer; i++) {
        if (may_cancel && cancelled(p->c)) return fail(p->err, QWEN3_STOPPED, "cancelled");
        TRY(decoder_layer(p, i));
    }
    return add_pending(p);
}

/* ---- final norm and logits of `n` wanted rows from `first` on ------------------------------------------------------ */
/* h = RMSNorm(x[out_row]) */
static qwen3_result head_norm(const pass *p, int first, int n) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const cudaError_t e = launch_rmsnorm<float>(p->s, c->h, c->embd_ld, c->x, c->embd_ld, c->rows + first, c->m->final_norm, n, 1, g->n_embd, c->embd_ld, g->rms_eps);
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, "rmsnorm");
}

/* Logits of h to c->logits or, with keep_only, straight to where they are kept. */
static qwen3_result head_logits(const pass *p, int first, int n, bool keep_only) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->head;
    const int vocab = c->m->config.n_vocab;
    const float *scale = NULL;
    if (n <= MATVEC_ROWS && p->how != STANDARD)
        TRY(matvec<false>(p, keep_only ? c->kept : c->logits, vocab, keep_only ? c->rows + first : NULL, w, c->h, c->embd_ld, n));
    else {
        TRY(round_rows(p, w, c->h, c->embd_ld, n));
        TRY(product(c, p->s, c->logits, vocab, w, 0, w.rows, c->act, n, p->err));
        scale = act_scale(p, w);
        if (scale && !keep_only) RUN(grid1(n), 1024, 0, scale_rows_kernel, c->logits, scale, vocab, vocab);
    }
    if (keep_only && n <= MATVEC_ROWS && p->how != STANDARD) return QWEN3_OK;
    RUN(grid2(32, n), 256, 0, keep_logits_kernel, c->kept, (const float *)c->logits, keep_only ? scale : NULL, (const row_info *)c->rows + first, vocab);
    return QWEN3_OK;
}

/* ================================================================================================
   STEPS: uploads, graphs, batches
   ================================================================================================ */
/* The next slot for an upload, once its last one is done. */
static qwen3_result begin_upload(cuda_ctx *c, int *slot, const qwen3i_err *err) {
    *slot = c->turn;
    c->turn = (c->turn + 1) % RING;
    CUDA_TRY(cudaEventSynchronize(c->uploaded[*slot]));
    return QWEN3_OK;
}

template <class T> static cudaError_t send(cuda_ctx *c, T *to, const T *from, int n) {
    return n > 0 ? cudaMemcpyAsync(to, from, (size_t)n * sizeof(T), cudaMemcpyHostToDevice, c->stream) : cudaSuccess;
}

/* The tiles of attention: consecutive tokens of one sequence. Returns how many. */
static int make_tiles(const cuda_ctx *c, const qwen3i_batch *b, attention_tile *tiles) {
    const int most_tokens = TILE_ROWS / c->group;
    int n = 0;
    for (int i = 0; i < b->n_rows; i += tiles[n++].n_tokens) {
        attention_tile *t = &tiles[n];
        t->row0 = i;
        t->seq = b->seqs[i];
        t->pos0 = b->positions[i];
        t->n_tokens = 1;
        while (i + t->n_tokens < b->n_rows && t->n_tokens < most_tokens && b->seqs[i + t->n_tokens] == t->seq &&
               b->positions[i + t->n_tokens] == t->pos0 + t->n_tokens) t->n_tokens++;
    }
    return n;
}

static bool one_row_each(const qwen3i_batch *b) {
    for (int i = 1; i < b->n_rows; i++) if (b->seqs[i] == b->seqs[i - 1]) return false;
    return true;
}

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
        r->out_slot = o && o->keep_seq >= 0 ? 2 * o->keep_seq + c->parity[o->keep_seq] : -1;
        r->out_target = o && o->logprob ? o->target : -1;
    }
    *n_tiles = c->tiles && b->n_rows > MATVEC_ROWS && !one_row_each(b) ? make_tiles(c, b, slot->tiles) : 0;
    CUDA_TRY(send(c, c->rows, slot->rows, b->n_rows));
    CUDA_TRY(send(c, c->tile_list, slot->tiles, *n_tiles));
    CUDA_TRY(cudaEventRecord(c->uploaded[at], c->stream));
    return QWEN3_OK;
}

/* A decode step of n rows that are on the device: all layers, and logits to where they are kept. */
static qwen3_result enqueue_step(cuda_ctx *c, cudaStream_t s, int n, const qwen3i_err *err) {
    pass p = make_pass(c, s, n, 0, err);
    TRY(all_layers(&p, false));
    for (int first = 0; first < n; first += HEAD_ROWS) {
        const int count = least(n - first, head_rows(c));
        TRY(head_norm(&p, first, count));
        TRY(head_logits(&p, first, count, true));
    }
    return QWEN3_OK;
}

static qwen3_result capture_step(cuda_ctx *c, int n, const qwen3i_err *err) {
    cudaGraph_t graph = NULL;
    CUDA_TRY(cudaStreamBeginCapture(c->capture, cudaStreamCaptureModeThreadLocal));
    const qwen3_result r = enqueue_step(c, c->capture, n, err);
    const cudaError_t e = cudaStreamEndCapture(c->capture, &graph);
    if (r != QWEN3_OK) { if (graph) cudaGraphDestroy(graph); return r; }
    CUDA_TRY(e);
    const cudaError_t made = cudaGraphInstantiate(&c->graphs[n], graph, 0);
    cudaGraphDestroy(graph);
    CUDA_TRY(made);
    return QWEN3_OK;
}

/* The same by its graph: plainly the first time, which loads all code and makes all plans. */
static qwen3_result run_step(cuda_ctx *c, int n, const qwen3i_err *err) {
    if (c->runs[n] == 0) { c->runs[n] = 1; return enqueue_step(c, c->stream, n, err); }
    if (!c->graphs[n]) TRY(capture_step(c, n, err));
    CUDA_TRY(cudaGraphLaunch(c->graphs[n], c->stream));
    return QWEN3_OK;
}

/* Does the batch ask for no more than a decode step gives? */
static bool is_step(const cuda_ctx *c, const qwen3i_batch *b) {
    if (b->n_rows > c->desc.max_seqs || b->n_outs != b->n_rows || !one_row_each(b)) return false;
    for (int i = 0; i < b->n_outs; i++) {
        const qwen3i_out *o = &b->outs[i];
        if (o->row != i || o->keep_seq < 0 || o->logits || o->hidden || o->logprob) return false;
    }
    return true;
}

/* Outs first .. first + n to the host and to where they are kept. */
static qwen3_result deliver(const pass *p, const qwen3i_out *outs, int first, int n) {
    cuda_ctx *c = p->c;
    const qwen3i_err *err = p->err;
    const size_t embd = (size_t)c->m->config.n_embd, vocab = (size_t)c->m->config.n_vocab;
    bool any = false, more = false, probs = false;
    for (int i = first; i < first + n; i++) {
        any = any || outs[i].keep_seq >= 0 || outs[i].logits || outs[i].logprob;
        more = more || outs[i].logits || outs[i].logprob;
        probs = probs || outs[i].logprob;
    }
    TRY(head_norm(p, first, n));
    for (int i = 0; i < n; i++)
        if (outs[first + i].hidden)
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].hidden, c->h + (size_t)i * (size_t)c->embd_ld, embd * sizeof(float), cudaMemcpyDeviceToHost, p->s));
    if (any) TRY(head_logits(p, first, n, !more));
    for (int i = 0; i < n; i++)
        if (outs[first + i].logits)
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].logits, c->logits + (size_t)i * vocab, vocab * sizeof(float), cudaMemcpyDeviceToHost, p->s));
    if (!probs) return QWEN3_OK;
    RUN(grid1(n), 1024, 0, logprob_kernel, c->logprobs, (const float *)c->logits, (const row_info *)c->rows + first, (int)vocab);
    for (int i = 0; i < n; i++)
        if (outs[first + i].logprob)
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].logprob, c->logprobs + i, sizeof(float), cudaMemcpyDeviceToHost, p->s));
    return QWEN3_OK;
}

/* Wait for all that was enqueued, asking the cancel hook meanwhile. */
static qwen3_result wait(cuda_ctx *c, const qwen3i_err *err) {
    cudaEvent_t done = c->uploaded[(c->turn + RING - 1) % RING];        /* of the upload before, which is over by then */
    cudaError_t e;
    CUDA_TRY(cudaEventRecord(done, c->stream));
    while (c->desc.cancel && (e = cudaEventQuery(done)) != cudaSuccess) {
        if (e != cudaErrorNotReady) return cuda_fail(err, e, "evaluating");
        if (cancelled(c)) { CUDA_TRY(cudaEventSynchronize(done)); return fail(err, QWEN3_STOPPED, "cancelled"); }
    }
    CUDA_TRY(cudaEventSynchronize(done));
    return QWEN3_OK;
}

static qwen3_result forward(void *ctx_state, const qwen3i_batch *b, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    int n_tiles;
    CUDA_TRY(guard.status);
    if (cancelled(c)) return fail(err, QWEN3_STOPPED, "cancelled");
    c->ahead.n = 0;
    TRY(upload_batch(c, b, &n_tiles, err));
    if (is_step(c, b)) return run_step(c, b->n_rows, err);
    pass p = make_pass(c, c->stream, b->n_rows, n_tiles, err);
    TRY(all_layers(&p, true));
    for (int i = 0; i < b->n_outs; i += head_rows(c)) {
        if (i > 0 && cancelled(c)) return fail(err, QWEN3_STOPPED, "cancelled");
        TRY(deliver(&p, b->outs, i, least(head_rows(c), b->n_outs - i)));
    }
    return wait(c, err);
}

/* ---- decode steps that choose for themselves ------------------------------------------------------- */
const uint64_t RNG_STEP = 0x9E3779B97F4A7C15u;

/* The random number that qwen3i_random draws from a state advanced by `steps`. */
static u64 random_at(uint64_t state, int steps) {
    uint64_t z = state + (uint64_t)steps * RNG_STEP;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* A sampler without what does not matter here, so that two can be compared. */
static qwen3_sampler plain_sampler(const qwen3_sampler *s) {
    qwen3_sampler out;
    memset(&out, 0, sizeof out);
    if (!s) return out;
    out.temperature = s->temperature; out.top_p = s->top_p; out.min_p = s->min_p; out.top_k = s->top_k;
    out.repeat_penalty = s->repeat_penalty; out.presence_penalty = s->presence_penalty; out.penalty_last_n = s->penalty_last_n;
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

static bool has_penalties(const qwen3_sampler *s) {
    return s && (s->presence_penalty < 0 || s->presence_penalty > 0 || (s->repeat_penalty > 0 && (s->repeat_penalty < 1 || s->repeat_penalty > 1)));
}

/* How item i is to choose, `ahead` (0 or 1) steps after what it holds. Returns 0 if the lists do not fit. */
static int make_choice(const cuda_ctx *c, const qwen3i_next *item, int ahead, upload_slot *slot, choice *out, int *n_lists) {
    const qwen3_sampler *s = item->sampler;
    const int now = 2 * item->seq + (c->parity[item->seq] ^ ahead), length = item->n + ahead;
    memset(out, 0, sizeof *out);
    out->slot = now;
    out->repeat = 1;
    out->list_at = *n_lists;
    if (!s) return 1;
    out->temperature = s->temperature; out->top_p = s->top_p; out->min_p = s->min_p > 0 ? s->min_p : 0; out->top_k = s->top_k;
    out->random = random_at(s->rng, 1 + ahead);
    if (s->n_bias > LISTED_MAX / 8 || s->n_bias > LISTED_MAX - *n_lists) return 0;
    for (int i = 0; i < s->n_bias; i++) {
        slot->lists[*n_lists].token = s->bias[i].token;
        slot->lists[(*n_lists)++].bias = s->bias[i].bias;
    }
    out->n_bias = s->n_bias;
    if (has_penalties(s)) {
        const int last = s->penalty_last_n == 0 ? 256 : s->penalty_last_n < 0 ? length : least(s->penalty_last_n, length);
        const int from = most(length - last, 0);
        if (item->n - from > LISTED_MAX - *n_lists) return 0;
        for (int i = from; i < item->n; i++) slot->lists[(*n_lists)++].token = item->tokens[i];
        out->n_seen = most(item->n - from, 0);
        out->chain = ahead;
        out->presence = s->presence_penalty;
        out->repeat = s->repeat_penalty > 0 ? s->repeat_penalty : 1;
    }
    out->adjust = out->n_bias + out->n_seen + out->chain > 0;
    return 1;
}

/* Enqueue the choice of a token for n sequences whose choices are on the device. */
static qwen3_result enqueue_choices(cuda_ctx *c, int n, bool adjust, int *report, const qwen3i_err *err) {
    const int vocab = c->m->config.n_vocab, n_choose = c->n_choose, group = head_rows(c);
    for (int i = 0; i < n; i += group) {
        const int count = least(group, n - i);
        const choice *choices = c->choices + i;
        const float *kept = c->kept, *copy = c->logits;
        if (adjust) {
            CUDA_TRY(launch(c->stream, grid2(32, count), 256, 0, copy_logits_kernel, c->logits, kept, choices, vocab));
            CUDA_TRY(launch(c->stream, grid1(count), 1024, (size_t)ceil_div(vocab, 32) * 4, adjust_kernel, c->logits, choices, (const listed *)c->lists, (const int *)c->chosen + i, vocab));
        }
        CUDA_TRY(launch(c->stream, grid2(32, count), 256, 0, best_kernel, c->best + i, kept, copy, choices, vocab, n_choose));
        CUDA_TRY(launch(c->stream, grid1(count), CHOOSE_THREADS, sizeof(choose_shared), choose_kernel, c->rows + i, c->chosen + i, report + i, c->best + i,
                        kept, copy, choices, vocab, n_choose));
    }
    return QWEN3_OK;
}

/* Enqueue a step of n sequences: choose from the logits kept after what they hold (and, ahead, the token chosen
   before), report, evaluate, keep the new logits in the other half. UNSUPPORTED: nothing was done. */
static qwen3_result begin_step(cuda_ctx *c, const qwen3i_next *items, int n, int ahead, int *slot_at, const qwen3i_err *err) {
    int n_lists = 0;
    bool adjust = false;
    TRY(begin_upload(c, slot_at, err));
    upload_slot *slot = &c->slots[*slot_at];
    for (int i = 0; i < n; i++) {
        row_info *r = &slot->rows[i];
        if (!make_choice(c, &items[i], ahead, slot, &slot->choices[i], &n_lists)) return QWEN3_ERR_UNSUPPORTED;
        adjust = adjust || slot->choices[i].adjust;
        r->token = 0;
        r->seq = items[i].seq;
        r->position = items[i].n + ahead;
        r->out_row = i;
        r->out_slot = slot->choices[i].slot ^ 1;
        r->out_target = -1;
    }
    if (adjust && ceil_div(c->m->config.n_vocab, 32) * 4 > 48 * 1024) return QWEN3_ERR_UNSUPPORTED;
    CUDA_TRY(send(c, c->rows, slot->rows, n));
    CUDA_TRY(send(c, c->choices, slot->choices, n));
    CUDA_TRY(send(c, c->lists, slot->lists, n_lists));
    CUDA_TRY(cudaEventRecord(c->uploaded[*slot_at], c->stream));
    TRY(enqueue_choices(c, n, adjust, slot->report, err));
    CUDA_TRY(cudaEventRecord(c->reported[*slot_at], c->stream));
    return run_step(c, n, err);
}

/* Is the step that was begun ahead the one that is asked for now? */
static bool ahead_fits(const cuda_ctx *c, const qwen3i_next *items, int n) {
    const run_ahead *a = &c->ahead;
    if (a->n != n) return false;
    for (int i = 0; i < n; i++) {
        const qwen3_sampler s = plain_sampler(items[i].sampler);
        if (a->seqs[i] != items[i].seq || a->lengths[i] != items[i].n || a->last[i] != items[i].tokens[items[i].n - 1] ||
            memcmp(&s, &a->samplers[i], sizeof s) != 0 || a->bias_hashes[i] != bias_hash(items[i].sampler)) return false;
    }
    return true;
}

/* Begin the step after this one, if all sequences have room for it. */
static qwen3_result begin_ahead(cuda_ctx *c, const qwen3i_next *items, int n, const qwen3i_err *err) {
    run_ahead *a = &c->ahead;
    a->n = 0;
    for (int i = 0; i < n; i++) {
        if (items[i].n + 1 >= c->desc.max_ctx) return QWEN3_OK;
        a->seqs[i] = items[i].seq;
        a->lengths[i] = items[i].n + 1;
        a->samplers[i] = plain_sampler(items[i].sampler);
        if (a->samplers[i].temperature > 0) a->samplers[i].rng += RNG_STEP;
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
static qwen3_result take_choices(cuda_ctx *c, qwen3i_next *items, int n, const int *report, const qwen3i_err *err) {
    for (int i = 0; i < n; i++) {
        if (report[i] >= 0) continue;
        c->ahead.n = 0;
        return fail(err, QWEN3_ERR_ARG, "every token is banned by bias, or the logits are not numbers");
    }
    for (int i = 0; i < n; i++) {
        items[i].out = report[i];
        items[i].ended = ends_turn(c, report[i]);
        if (items[i].sampler && items[i].sampler->temperature > 0) items[i].sampler->rng += RNG_STEP;
        c->ahead.last[i] = report[i];
        if (items[i].ended) c->ahead.n = 0;
        else c->parity[items[i].seq] ^= 1;
    }
    return QWEN3_OK;
}

static qwen3_result next(void *ctx_state, qwen3i_next *items, int n, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    int slot = c->ahead.slot;
    CUDA_TRY(guard.status);
    if (cancelled(c)) return fail(err, QWEN3_STOPPED, "cancelled");
    if (!ahead_fits(c, items, n)) {
        c->ahead.n = 0;
        TRY(begin_step(c, items, n, 0, &slot, err));
    }
    TRY(begin_ahead(c, items, n, err));
    CUDA_TRY(cudaEventSynchronize(c->reported[slot]));
    return take_choices(c, items, n, c->slots[slot].report, err);
}

/* ================================================================================================
   THE REST OF THE BACKEND
   ================================================================================================ */
static float *kept_logits(const cuda_ctx *c, int seq) {
    return c->kept + (size_t)(2 * seq + c->parity[seq]) * (size_t)c->m->config.n_vocab;
}

static qwen3_result logits(void *ctx_state, int seq, const float **out, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    CUDA_TRY(cudaMemcpyAsync(c->host_logits, kept_logits(c, seq), (size_t)c->m->config.n_vocab * sizeof(float), cudaMemcpyDeviceToHost, c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    *out = c->host_logits;
    return QWEN3_OK;
}

static qwen3_result set_logits(void *ctx_state, int seq, const float *from, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    c->ahead.n = 0;
    CUDA_TRY(cudaMemcpyAsync(kept_logits(c, seq), from, (size_t)c->m->config.n_vocab * sizeof(float), cudaMemcpyHostToDevice, c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

static size_t kv_row_bytes(const cuda_ctx *c) { return (size_t)c->kv_dim * type_size((qwen3i_type)c->desc.kv_type); }

/* The byte in c->k or c->v where a sequence's positions begin. */
static size_t kv_begin(const cuda_ctx *c, int seq, int layer) {
    return (size_t)layer * c->kv_layer_bytes + (size_t)seq * (size_t)c->desc.max_ctx * kv_row_bytes(c);
}

static qwen3_result seq_copy(void *ctx_state, int dst, int src, int n_pos, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const size_t bytes = (size_t)n_pos * kv_row_bytes(c), pitch = c->kv_layer_bytes, layers = (size_t)c->m->config.n_layer;
    CUDA_TRY(guard.status);
    if (dst == src) return QWEN3_OK;
    c->ahead.n = 0;
    if (bytes > 0) {
        CUDA_TRY(cudaMemcpy2DAsync(c->k + kv_begin(c, dst, 0), pitch, c->k + kv_begin(c, src, 0), pitch, bytes, layers, cudaMemcpyDeviceToDevice, c->stream));
        CUDA_TRY(cudaMemcpy2DAsync(c->v + kv_begin(c, dst, 0), pitch, c->v + kv_begin(c, src, 0), pitch, bytes, layers, cudaMemcpyDeviceToDevice, c->stream));
    }
    CUDA_TRY(cudaMemcpyAsync(kept_logits(c, dst), kept_logits(c, src), (size_t)c->m->config.n_vocab * sizeof(float), cudaMemcpyDeviceToDevice, c->stream));
    return QWEN3_OK;
}

static qwen3_result kv_read(void *ctx_state, int seq, int layer, int n_pos, void *k, void *v, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const size_t bytes = (size_t)n_pos * kv_row_bytes(c), at = kv_begin(c, seq, layer);
    CUDA_TRY(guard.status);
    if (bytes == 0) return QWEN3_OK;
    CUDA_TRY(cudaMemcpyAsync(k, c->k + at, bytes, cudaMemcpyDeviceToHost, c->stream));
    CUDA_TRY(cudaMemcpyAsync(v, c->v + at, bytes, cudaMemcpyDeviceToHost, c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

static qwen3_result kv_write(void *ctx_state, int seq, int layer, int n_pos, const void *k, const void *v, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const size_t bytes = (size_t)n_pos * kv_row_bytes(c), at = kv_begin(c, seq, layer);
    CUDA_TRY(guard.status);
    c->ahead.n = 0;
    if (bytes == 0) return QWEN3_OK;
    CUDA_TRY(cudaMemcpyAsync(c->k + at, k, bytes, cudaMemcpyHostToDevice, c->stream));
    CUDA_TRY(cudaMemcpyAsync(c->v + at, v, bytes, cudaMemcpyHostToDevice, c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

/* ================================================================================================
   SINGLE KERNELS for tests and benches
   ================================================================================================ */
static const char *lab_no_device() {
    int n = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaSuccess && n > 0) return NULL;
    cudaGetLastError();
    return e == cudaSuccess ? "there is no CUDA device" : cudaGetErrorString(e);
}

struct timer {                          /* of the device, over what is enqueued between start and stop */
    cudaEvent_t from, to;
    timer() : from(NULL), to(NULL) {}
    ~timer() { if (from) cudaEventDestroy(from); if (to) cudaEventDestroy(to); }
    cudaError_t start(cudaStream_t s) {
        cudaError_t e = cudaEventCreate(&from);
        if (e == cudaSuccess) e = cudaEventCreate(&to);
        return e == cudaSuccess ? cudaEventRecord(from, s) : e;
    }
    cudaError_t stop(cudaStream_t s, int repeat, float *us) {
        float ms = 0;
        cudaError_t e = cudaEventRecord(to, s);
        if (e == cudaSuccess) e = cudaEventSynchronize(to);
        if (e == cudaSuccess) e = cudaEventElapsedTime(&ms, from, to);
        if (us) *us = 1000 * ms / (float)repeat;
        return e;
    }
private:
    timer(const timer &);
    timer &operator=(const timer &);
};

static qwen3_result lab_norm_on_device(char *memory, float *y, const void *x, qwen3i_type type, const float *gain, int n, int width, float eps,
                                int repeat, float *us, const qwen3i_err *err) {
    const size_t count = (size_t)n * (size_t)width, bytes = (count * 4 + 255) / 256 * 256;
    float *dy = (float *)(void *)memory, *dg = (float *)(void *)(memory + 2 * bytes);
    char *dx = memory + bytes;
    timer t;
    CUDA_TRY(cudaMemcpy(dx, x, count * type_size(type), cudaMemcpyHostToDevice));
    CUDA_TRY(cudaMemcpy(dg, gain, (size_t)width * 4, cudaMemcpyHostToDevice));
    CUDA_TRY(t.start(0));
    for (int i = 0; i < repeat; i++) {
        if (type == QWEN3I_F32) CUDA_TRY(launch_rmsnorm<float>(0, repeat > 1 ? dy : (float *)(void *)dx, width, (const float *)(void *)dx, width, NULL, dg, n, 1, width, 0, eps));
        else if (type == QWEN3I_F16) CUDA_TRY(launch_rmsnorm<half_t>(0, dy, width, (const half_t *)(void *)dx, width, NULL, dg, n, 1, width, 0, eps));
        else CUDA_TRY(launch_rmsnorm<bf16_t>(0, dy, width, (const bf16_t *)(void *)dx, width, NULL, dg, n, 1, width, 0, eps));
    }
    CUDA_TRY(t.stop(0, repeat, us));
    CUDA_TRY(cudaMemcpy(y, type == QWEN3I_F32 && repeat == 1 ? (const float *)(void *)dx : dy, count * 4, cudaMemcpyDeviceToHost));
    return QWEN3_OK;
}

static qwen3_result lab_rmsnorm(float *y, const void *x, qwen3i_type type, const float *gain, int n, int width, float eps, int repeat, float *us, const qwen3i_err *err) {
    const size_t bytes = ((size_t)n * (size_t)width * 4 + 255) / 256 * 256;
    char *memory = NULL;
    TRY(device_alloc(&memory, 2 * bytes + (size_t)width * 4, "a test", err));
    const qwen3_result r = lab_norm_on_device(memory, y, x, type, gain, n, width, eps, repeat, us, err);
    cudaFree(memory);
    return r;
}

/* The rows that the operations below work on. */
static qwen3_result lab_rows(void *ctx_state, const qwen3i_batch *b, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    c->ahead.n = 0;
    c->lab_rows = b->n_rows;
    return upload_batch(c, b, &c->lab_tiles, err);
}

struct lab_view { float *data; int width, ld; const matrix *act; };     /* act: the rows are c->act, as input of this */

static lab_view lab_buffer(const pass *p, qwen3_cuda_buffer buffer) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const layer_weights *w = &c->m->layers[0];
    lab_view v = {c->x, g->n_embd, c->embd_ld, NULL};
    const bool act = p->how != MATVEC;
    switch (buffer) {
        case QWEN3_CUDA_H: v.data = c->h; if (act) v.act = &w->qkv; break;
        case QWEN3_CUDA_Q: v.data = c->qkv; v.width = c->q_dim; v.ld = c->qkv_ld; break;
        case QWEN3_CUDA_A: v.data = c->attn; v.width = v.ld = c->q_dim; break;
        case QWEN3_CUDA_M: v.data = act ? c->gate_up : c->ff; v.width = g->n_ff; v.ld = c->ff_ld; if (act) v.act = &w->w_down; break;
        case QWEN3_CUDA_LOGITS: v.data = c->logits; v.width = v.ld = g->n_vocab; break;
        default: break;
    }
    return v;
}

static qwen3_result lab_put(void *ctx_state, qwen3_cuda_buffer buffer, const float *from, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const pass p = make_pass(c, c->stream, c->lab_rows, c->lab_tiles, err);
    const lab_view v = lab_buffer(&p, buffer);
    CUDA_TRY(guard.status);
    CUDA_TRY(cudaMemset2DAsync(v.data, (size_t)v.ld * 4, 0, (size_t)v.width * 4, (size_t)p.n, c->stream));
    CUDA_TRY(cudaMemcpy2DAsync(v.data, (size_t)v.ld * 4, from, (size_t)v.width * 4, (size_t)v.width * 4, (size_t)p.n, cudaMemcpyHostToDevice, c->stream));
    if (v.act) TRY(round_rows(&p, *v.act, v.data, v.ld, p.n));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

/* act_to_float: out[row, :] = act[row, :] * scale[row]. One block a row. */
template <class O> static __global__ void act_to_float_kernel(float *out, const O *act, const float *scale, int width, int ld, size_t rest) {
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        const size_t at = (size_t)blockIdx.x * (size_t)ld + (size_t)i;
        out[at] = (to_float(act[at]) + (rest ? to_float(act[at + rest]) : 0.0f)) * (scale ? scale[blockIdx.x] : 1.0f);
    }
}

static qwen3_result lab_get(void *ctx_state, qwen3_cuda_buffer buffer, float *to, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const pass p_ = make_pass(c, c->stream, c->lab_rows, c->lab_tiles, err), *p = &p_;
    const lab_view v = lab_buffer(p, buffer);
    CUDA_TRY(guard.status);
    if (v.act && v.act->type == QWEN3I_F32) RUN(grid1(p->n), 256, 0, act_to_float_kernel<float>, v.data, (const float *)c->act, (const float *)NULL, v.width, v.ld, (size_t)0);
    else if (v.act) RUN(grid1(p->n), 256, 0, act_to_float_kernel<half_t>, v.data, (const half_t *)c->act, (const float *)c->act_scale, v.width, v.ld, rest_of(*v.act, p->n));
    CUDA_TRY(cudaMemcpy2DAsync(to, (size_t)v.width * 4, v.data, (size_t)v.ld * 4, (size_t)v.width * 4, (size_t)p->n, cudaMemcpyDeviceToHost, c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

static qwen3_result lab_one(pass *p, qwen3_cuda_op op, int layer) {
    const layer_weights *w = &p->c->m->layers[layer];
    const int n = least(p->n, head_rows(p->c));
    switch (op) {
        case QWEN3_CUDA_EMBED:     return embed(p);
        case QWEN3_CUDA_NORM:      return norm(p, w->attn_norm, w->qkv);
        case QWEN3_CUDA_QKV_ROPE:  return qkv_rope(p, layer);
        case QWEN3_CUDA_ATTENTION: return attention(p, layer);
        case QWEN3_CUDA_O_PROJ:    TRY(o_proj(p, layer)); return add_pending(p);
        case QWEN3_CUDA_MLP:       return mlp(p, layer);
        case QWEN3_CUDA_DOWN:      TRY(down_proj(p, layer)); return add_pending(p);
        case QWEN3_CUDA_HEAD:      TRY(head_norm(p, 0, n)); return head_logits(p, 0, n, false);
        case QWEN3_CUDA_STEP:      return run_step(p->c, p->n, p->err);
    }
    return fail(p->err, QWEN3_ERR_ARG, "there is no operation %d", (int)op);
}

static qwen3_result lab_run(void *ctx_state, qwen3_cuda_op op, int layer, int repeat, float *us, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    pass p = make_pass(c, c->stream, c->lab_rows, c->lab_tiles, err);
    timer t;
    CUDA_TRY(guard.status);
    CUDA_TRY(t.start(c->stream));
    for (int i = 0; i < repeat; i++) TRY(lab_one(&p, op, layer));
    CUDA_TRY(t.stop(c->stream, repeat, us));
    return QWEN3_OK;
}

} /* namespace */

extern "C" const qwen3_backend *qwen3_cuda_backend(void) {
    static const qwen3_backend backend = {
        QWEN3_VERSION, "cuda", 2048,
        create_model, free_model, device_name,
        ctx_memory, create_ctx, free_ctx, forward, logits, next, seq_copy, kv_read, kv_write, set_logits
    };
    return &backend;
}

extern "C" const qwen3_cuda_kernels *qwen3_cuda_get_kernels(void) {
    static const qwen3_cuda_kernels kernels = { lab_no_device, lab_rmsnorm, lab_rows, lab_put, lab_get, lab_run };
    return &kernels;
}
