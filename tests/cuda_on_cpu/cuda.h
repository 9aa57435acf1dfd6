/* The part of the driver's interface that qwen3_cuda.cu names - tensor maps - and the instructions of Hopper that read
   and multiply tiles. A product is done when it is waited for, not before: what it reads must be there until then. */
#ifndef CUDA_ON_CPU_DRIVER_H
#define CUDA_ON_CPU_DRIVER_H
#include "cuda_runtime.h"
#include <sched.h>

typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
struct alignas(64) CUtensorMap { cuuint64_t base, size[3], stride[2], tile[3], rank, swizzle, none[4]; };
enum CUresult { CUDA_SUCCESS = 0 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };

static CUresult emulated_encode(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *base,
                                const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *tile,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
    memset(map, 0, sizeof *map);
    map->base = (cuuint64_t)(uintptr_t)base;
    map->rank = rank;
    map->swizzle = swizzle;
    for (cuuint32_t i = 0; i < 3; i++) {
        map->size[i] = i < rank ? size[i] : 1;
        map->tile[i] = i < rank ? tile[i] : 1;
        if (i > 0 && i < rank) map->stride[i - 1] = stride[i - 1];
    }
    return map->base % 16 || map->tile[0] > 256 || map->tile[0] % 8 || (swizzle && map->tile[0] > 64) || map->tile[1] > 256 || map->stride[0] % 16 || map->stride[1] % 16
               ? (CUresult)1 : CUDA_SUCCESS;
}
static inline cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **f, unsigned, unsigned long long,
                                                           cudaDriverEntryPointQueryResult *found) {
    *f = (void *)emulated_encode;
    *found = cudaDriverEntryPointSuccess;
    return emulated_call();
}

/* ---- barriers that count arrivals and bytes ------------------------------------------------------------------ */
struct mbarrier { short arrivals, left; int bytes : 31; unsigned phase : 1; };
static_assert(sizeof(mbarrier) == 8, "as on the chip");

namespace emulated {

inline void check(mbarrier *b) {
    now().progress++;
    if (b->left < 0) die("more arrivals at a barrier than it was made for");
    if (b->left == 0 && b->bytes == 0) { b->phase ^= 1; b->left = b->arrivals; }
}

inline uintptr_t swizzled(uintptr_t at) { return at ^ ((at >> 7 & 7) << 4); }
inline float half_at(uintptr_t at) {
    __half h;
    memcpy(&h, (const void *)swizzled(at), 2);
    return __half2float(h);
}

inline void load_tile(void *to, const CUtensorMap *m, const int (&from)[3], mbarrier *b) {
    if ((uintptr_t)to % (m->swizzle ? 1024 : 128)) die("a tile that is loaded does not begin where it must");
    const uint64_t rows = m->tile[1] * m->tile[2], width = m->tile[0];
    for (uint64_t row = 0; row < rows; row++)
        for (uint64_t x = 0; x < width; x++) {
            const uint64_t at[3] = {from[0] + x, from[1] + row % m->tile[1], from[2] + row / m->tile[1]};
            unsigned short v = 0;
            if (at[0] < m->size[0] && at[1] < m->size[1] && at[2] < m->size[2])
                memcpy(&v, (const char *)(uintptr_t)m->base + 2 * at[0] + m->stride[0] * at[1] + m->stride[1] * at[2], 2);
            const uintptr_t place = (uintptr_t)to + 2 * (width * row + x);
            memcpy((void *)(m->swizzle ? swizzled(place) : place), &v, 2);
        }
    b->bytes -= (int)(2 * width * rows);
    check(b);
}

/* d[64, columns] of four warps: this thread's elements. b's rows are the columns of the result, or the sum's index. */
inline void multiply(const product &p, int warp, int lane) {
    const uintptr_t a = (uintptr_t)(p.a << 16 >> 12), b = (uintptr_t)(p.b << 16 >> 12);
    const uintptr_t block = (uintptr_t)(p.b >> 48) * 16;
    for (int i = 0; i < p.columns / 2; i++) {
        const int half = i / 2 % 2, row = 16 * warp + lane / 4 + 8 * half, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = p.add ? p.d[i] : 0;
        for (int k = 0; k < 16; k++) {
            const float x = p.a_in_registers ? p.a_rows[half][k] : half_at(a + (uintptr_t)(128 * row + 2 * k));
            const uintptr_t y = p.a_in_registers
                                    ? b + (uintptr_t)(col / 64) * block + (uintptr_t)(128 * k + col % 64 * 2)
                                    : b + (uintptr_t)(128 * col + 2 * k);
            sum += x * half_at(y);
        }
        p.d[i] = sum;
    }
}

} /* namespace emulated */

static inline unsigned shared_address(const void *p) { return (unsigned)(uintptr_t)p; }

static inline void barrier_init(mbarrier *b, unsigned arrivals) {
    memset(b, 0, sizeof *b);
    b->arrivals = b->left = (short)arrivals;
}
static inline void barrier_expect(mbarrier *b, unsigned bytes) {
    b->bytes += (int)bytes;
    b->left--;
    emulated::check(b);
}
static inline void barrier_arrive(mbarrier *b) { b->left--; emulated::check(b); }
static inline void barrier_arrive_at(mbarrier *b, unsigned rank) { barrier_arrive(emulated::in_block(b, rank)); }
static inline void store_for_all(unsigned *p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline unsigned load_of_all(const unsigned *p) {
    const unsigned v = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    sched_yield();
    return v;
}
static inline void store_tagged(uint4 *p, float2 v, unsigned tag) {
    uint64_t *to = (uint64_t *)(void *)p;
    __atomic_store_n(to, (uint64_t)tag << 32 | __float_as_uint(v.x), __ATOMIC_RELEASE);
    __atomic_store_n(to + 1, (uint64_t)tag << 32 | __float_as_uint(v.y), __ATOMIC_RELEASE);
}
static inline uint4 load_tagged(const uint4 *p) {
    const uint64_t *from = (const uint64_t *)(const void *)p;
    const uint64_t x = __atomic_load_n(from, __ATOMIC_ACQUIRE), y = __atomic_load_n(from + 1, __ATOMIC_ACQUIRE);
    sched_yield();
    return {(unsigned)x, (unsigned)(x >> 32), (unsigned)y, (unsigned)(y >> 32)};
}
static inline void barrier_wait(mbarrier *b, unsigned parity) { while (b->phase == parity) emulated::yield(); }
static inline void barriers_ready() {}
/* Sent values are there at once; the barrier counts their bytes. */
static inline void send_to_block(float *p, unsigned rank, float v, mbarrier *b) {
    mbarrier *there = emulated::in_block(b, rank);
    *emulated::in_block(p, rank) = v;
    there->bytes -= 4;
    emulated::check(there);
}
static inline void copy_bulk(void *to, const void *from, unsigned bytes, mbarrier *b) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) emulated::die("a copy is not of whole 16 bytes");
    memcpy(to, from, bytes);
    b->bytes -= (int)bytes;
    emulated::check(b);
}
static inline void cluster_sync() { emulated::meet(emulated::now().cluster, emulated::now().live); }
static inline void cluster_meet() { cluster_sync(); }
static inline void prefetch_map(const CUtensorMap *) {}
static inline void load_from_block(float2 &v, const float *p, unsigned rank) {
    v = *(const float2 *)(const void *)emulated::in_block(p, rank);
}
static inline void load_from_block(float2 &v, float2 &w, const float *p, unsigned rank) {
    load_from_block(v, p, rank);
    load_from_block(w, p + 64, rank);
}
static inline void add_2_there(float *to, float x, float y) { to[0] += x; to[1] += y; }
static inline void stores_ready() {}
static inline void group_sync(int id, int threads) { emulated::meet(emulated::block().named[id], threads); }
template <int N> void fewer_registers() { emulated::have_registers(N); }
template <int N> void more_registers() { emulated::have_registers(N); }

static inline void load_tile(void *to, const CUtensorMap *map, int x, int y, int z, mbarrier *b) {
    const int from[3] = {x, y, z};
    emulated::load_tile(to, map, from, b);
}
static inline void load_tile(void *to, const CUtensorMap *map, int x, int y, mbarrier *b) {
    load_tile(to, map, x, y, 0, b);
}
static inline void load_tile_twice(void *to, const CUtensorMap *map, int x, int y, mbarrier *b) {
    for (unsigned rank = 0; rank < 2; rank++)
        load_tile(emulated::in_block((char *)to, rank), map, x, y, 0, emulated::in_block(b, rank));
}

/* ---- products of a warpgroup ------------------------------------------------------------------------------------ */
static inline emulated::thread &emulated_thread() {
    return emulated::now().threads[(size_t)emulated::now().current];
}
static inline uint64_t operand(const void *p, unsigned block = 16) {
    return (uint64_t)(uintptr_t)p >> 4 | (uint64_t)(block >> 4) << 48;
}
static inline void products_begin() {}
static inline void products_commit() { emulated_thread().groups++; }
template <int PENDING> void products_wait() {
    emulated::thread &t = emulated_thread();
    size_t n = 0;
    for (; n < t.products.size() && t.products[n].group < t.groups - PENDING; n++)
        emulated::multiply(t.products[n], (int)threadIdx.x / 32 % 4, (int)threadIdx.x % 32);
    t.products.erase(t.products.begin(), t.products.begin() + (long)n);
    __syncwarp();                       /* no lane goes on before all have what they waited for */
}
template <int N> void products_done(float (&)[N]) {}
static inline void products_read(unsigned (&)[8][4]) {}

template <int N> emulated::product emulated_product(float (&d)[N], uint64_t b, int add) {
    emulated::product p = emulated::product();
    p.d = d;
    p.columns = 2 * N;
    p.group = emulated_thread().groups;
    p.add = add != 0;
    p.b = b;
    return p;
}
template <int N> void wgmma(float (&d)[N], uint64_t a, uint64_t b, int add) {
    emulated::product p = emulated_product(d, b, add);
    p.a = a;
    emulated_thread().products.push_back(p);
}
static inline void wgmma(float (&d)[64], const unsigned (&a)[4], uint64_t b, int add) {
    emulated::product p = emulated_product(d, b, add);
    const uint64_t words[4] = {a[0], a[1], a[2], a[3]};
    const uint64_t (*all)[8] = emulated::exchange(words, 4);
    const int quad = emulated::now().current % 32 / 4 * 4;
    p.a_in_registers = true;
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 16; k++)
            p.a_rows[half][k] = emulated_element((unsigned)all[quad + k % 8 / 2][half + k / 8 * 2], k % 2, __half());
    emulated_thread().products.push_back(p);
}

static inline float exp2_fast(float x) { return exp2f(x); }
static inline float reciprocal_fast(float x) { return 1.0f / x; }
static inline unsigned round_halves(float a, float b) {
    return (unsigned)__half_as_ushort(__float2half_rn(a)) | (unsigned)__half_as_ushort(__float2half_rn(b)) << 16;
}
static inline unsigned pack_halves(float a, float b) {
    return round_halves(fminf(fmaxf(a, -65504.0f), 65504.0f), fminf(fmaxf(b, -65504.0f), 65504.0f));
}
#endif
