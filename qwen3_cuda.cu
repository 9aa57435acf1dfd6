/* qwen3_cuda.cu - the CUDA backend of qwen3.h, behind one symbol: qwen3_cuda_backend().

       nvcc -O3 -std=c++17 -arch=native -c qwen3_cuda.cu
       cc -O2 app.c qwen3_cuda.o -lcublasLt -lcudart -lstdc++ -lm -lpthread

   Compute capability 7.5 and up. Everything between the matrices is float32: residual, norms, gains,
   rotation, scores, softmax, the SwiGLU product and all accumulators.

   WEIGHTS  F32 and F16 as stored. BF16 is held as F16 times a power of two, one per matrix, which is the
     same two bytes and the same value for everything within 2^32 of the matrix's largest (below that the
     error is under 2^-40 of the largest). So there is one 16-bit format, every tensor core since sm_75
     multiplies it, and what is rounded to it loses 2^-12 instead of 2^-9.
   INPUTS   of a product with at most 8 rows (on Hopper 1) stay float32. With more rows and 16-bit weights each row is
     rounded once, to F16 times a power of two of its own: nothing overflows, whatever its size. The input of
     q, k and v keeps 22 bits, as two such terms and two products: the gains of the norms after it, up to 100
     in real models, blow up what is lost there before the softmax. (On Hopper it is rounded once, too: beside
     the rounding of the cache that makes no difference that matters. docs/PERFORMANCE.md has the figures.)
   HOPPER has kernels of its own (sm_90a; head_dim 128, widths that are multiples of 128, 16-bit weights) for
     2 rows and more: products whose sums the tensor cores add up 128 elements at a time, since they cut off
     what they add, with everything up to the next product in the same kernel; and, for more than 64 rows,
     attention on an F16 cache.
   PATHS    FUSED, or STANDARD: cuBLASLt and one plain kernel for each operation.
   ORDER    No sum depends on timing: splits follow from shapes, partial sums are added in a fixed order,
     and atomics only count integers. The same input gives the same bits.

   Rooms: errors and memory, model, context, matrix products, layer, steps (uploads, graphs, batches, decode
   steps), the backend. The kernels: qwen3_cuda_kernels.cuh. tests/cuda_lab.cu includes this file and adds what
   only tests and benches want. */

#define QWEN3_BACKEND_INTERFACE
#include "qwen3.h"

#include "qwen3_cuda_kernels.cuh"

#include <cublasLt.h>
#include <stdlib.h>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace {

const int RING          = 4;            /* uploads in flight */
const size_t WORKSPACE  = (size_t)32 << 20;
const size_t PIECE      = (size_t)2 << 20;      /* of an upload of weights */
const int SLOTS         = 16;           /* so many pieces are filled or on their way */
#ifdef QWEN3_CUDA_EMULATED
const size_t SCALES_PIECE = 16;         /* bytes of the scales that come back at a time: few, so that tests see pieces */
#else
const size_t SCALES_PIECE = PIECE;
#endif
const int MOST_HELPERS  = 8;

/* ================================================================================================
   ERRORS AND MEMORY
   ================================================================================================ */
static qwen3_result cuda_fail(const qwen3i_err *err, cudaError_t e, const char *what) {
    cudaGetLastError();                 /* or the next launch reports it again */
    return qwen3i_fail(err, e == cudaErrorMemoryAllocation ? QWEN3_ERR_DEVICE_MEMORY : QWEN3_ERR_DEVICE,
                "CUDA: %s: %s", what, cudaGetErrorString(e));
}

#define TRY(call) do { const qwen3_result try_ = (call); if (try_ != QWEN3_OK) return try_; } while (0)
#define CUDA_TRY(call)                                                                                                 \
    do {                                                                                                               \
        const cudaError_t e_ = (call);                                                                                 \
        if (e_ != cudaSuccess) return cuda_fail(err, e_, #call);                                                       \
    } while (0)
#define LT_TRY(call) do { const cublasStatus_t s_ = (call); if (s_ != CUBLAS_STATUS_SUCCESS) \
    return qwen3i_fail(err, QWEN3_ERR_DEVICE, "cuBLASLt: %s: status %d", #call, (int)s_); } while (0)

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
    return qwen3i_fail(err, QWEN3_ERR_MEMORY, "out of memory: %llu bytes for the CUDA backend", (unsigned long long)size);
}

/* One block of device (or pinned) memory, handed out in pieces. A dry run (base NULL) measures it. */
struct arena {
    char  *base;
    size_t used;
    template <class T> T *take(size_t n) {
        T *p = base ? (T *)(void *)(base + used) : NULL;
        used += (n * sizeof(T) + 255) / 256 * 256;
#ifdef QWEN3_CUDA_EMULATED              /* a gap that nobody may touch */
        if (base) emulated::forbid(base + used, 256);
        used += 256;
#endif
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
    return qwen3i_fail(err, QWEN3_ERR_DEVICE_MEMORY, "out of device memory: %s needs %.1f MiB, %.1f of %.1f MiB are free",
                what, (double)size / 1048576.0, (double)free_bytes / 1048576.0, (double)total / 1048576.0);
}

template <class T> static T most(T a, T b) { return a > b ? a : b; }

template <class... P, class... A>
static cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, size_t shared, void (*kernel)(P...), A... args) {
    cudaLaunchConfig_t config = cudaLaunchConfig_t();
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, (P)args...);
}

/* The same in clusters of so many blocks; 1: none, or what the kernel itself says. early: as below. */
template <class... P, class... A>
static cudaError_t launch_clusters(bool early, int blocks, cudaStream_t stream, dim3 grid, int threads, size_t shared,
                                   void (*kernel)(P...), A... args) {
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

/* For a kernel that calls wait_for_previous(): where the chip can (sm_90 on), it may start before the one before it
   has ended. */
template <class... P, class... A>
static cudaError_t launch_early(bool can, cudaStream_t stream, dim3 grid, int threads, size_t shared,
                                void (*kernel)(P...), A... args) {
    return launch_clusters(can, 1, stream, grid, threads, shared, kernel, args...);
}

/* ================================================================================================
   MODEL: weights in device memory
   ================================================================================================ */
struct stored_map { u64 words[sizeof(CUtensorMap) / 8]; };      /* how TMA finds tiles; without the type's alignment */

struct matrix {                         /* W [rows, cols] = data * scale; rows ld apart, zero from cols to ld */
    void       *data;
    int         rows, cols, ld;
    qwen3i_type type;                   /* F32 or F16 */
    int         terms;                  /* 16-bit terms of its input when there are many rows */
    float       scale;
    stored_map  map, map_more;          /* of a wide model's: for tiles of WIDE_N and of WIDE_N_MORE rows */
    float      *bounds;                 /* of gate_up, in a wide model: see wide_norm */
};

/* Elements from the first term of n rows of a product's input to the second; 0: there is only one. */
static size_t rest_of(const matrix &w, int n) { return w.terms == 2 ? (size_t)n * w.ld : 0; }

struct layer_weights {
    float *attn_norm, *q_norm, *k_norm, *mlp_norm;
    matrix qkv, wo, gate_up, w_down;    /* q, k, v below each other, as are gate and up */
};

struct cuda_model {
    qwen3_allocator allocator;
    qwen3i_config   config;
    int             device, n_sm, capability;   /* 90 for 9.0 */
    size_t          block_shared, sm_shared;    /* bytes of shared memory: the most of a block; of a multiprocessor */
    size_t          cache_bytes;                /* of the second level */
    char            name[256];
    char           *memory;                     /* all weights */
    size_t          size;
    layer_weights  *layers;
    matrix          embed, head;
    float          *final_norm;
    bool            wide;               /* products with many rows can go through the kernels for Hopper */
};

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
        g.to->data = a->take<char>((size_t)g.to->rows * g.to->ld * qwen3i_type_size(g.to->type));
    }
    for (int i = 0; i < m->config.n_layer; i++) {
        layer_weights *l = &m->layers[i];
        l->attn_norm = a->take<float>(n_embd);
        l->mlp_norm = a->take<float>(n_embd);
        l->q_norm = a->take<float>(head_dim);
        l->k_norm = a->take<float>(head_dim);
        l->gate_up.bounds = a->take<float>(2);
    }
    m->final_norm = a->take<float>(n_embd);
    *tops = a->take<unsigned>((size_t)n);
}

/* Weights go to the device in pieces, through pinned buffers. Several threads fill these from the file, because one
   cannot read a mapped file as fast as a bus carries it; the caller's own thread sends them off in order, and fills
   what no other has begun. Only that thread calls CUDA and the user's progress(). */
struct piece {                          /* rows of a matrix, from the file to the device */
    char       *to;
    const char *from;
    int         rows, cols, ld;
    qwen3i_type to_type, from_type;
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
    int          begun, room;           /* pieces that are being filled, or that can be: their slots are free */
    int          filled[SLOTS];         /* piece + 1 that lies there */
    std::thread  helpers[MOST_HELPERS];
};

/* To rows [ld] of the device's type, zero from cols on. */
static void pack_rows(char *to, const piece &p) {
    const size_t in = (size_t)p.cols * qwen3i_type_size(p.from_type), out = (size_t)p.ld * qwen3i_type_size(p.to_type);
    const char *from = p.from;
    if (p.to_type == p.from_type && p.ld == p.cols) { memcpy(to, from, in * (size_t)p.rows); return; }
    for (int r = 0; r < p.rows; r++, to += out, from += in) {
        memset(to, 0, out);
        if (p.to_type == p.from_type) memcpy(to, from, in);
        else for (int i = 0; i < p.cols; i++) {
            const float f = qwen3i_value(from, p.from_type, i);
            memcpy(to + 4 * i, &f, 4);
        }
    }
}

static size_t piece_bytes(const piece &p) { return (size_t)p.rows * (size_t)p.ld * qwen3i_type_size(p.to_type); }

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

/* As many threads as help; fewer if the system has no more. */
static void call_helpers(uploader *u) {
    const int cores = (int)std::thread::hardware_concurrency(), want = least(least(cores, MOST_HELPERS), u->n / SLOTS);
    try {
        for (int i = 0; i < want; i++) u->helpers[i] = std::thread(help_uploading, u);
    } catch (const std::exception &) { }
}

static qwen3_result open_uploader(uploader *u, const qwen3i_err *err) {
    CUDA_TRY(cudaStreamCreateWithFlags(&u->stream, cudaStreamNonBlocking));
    CUDA_TRY(cudaStreamCreateWithFlags(&u->converting, cudaStreamNonBlocking));
    CUDA_TRY(cudaHostAlloc((void **)&u->buffers, SLOTS * PIECE, cudaHostAllocDefault));
    for (cudaEvent_t &e : u->sent) CUDA_TRY(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    call_helpers(u);
    return QWEN3_OK;
}

/* Rows [ld] of the given type from a matrix; a dry run (no pieces yet) counts. */
static qwen3_result add_pieces(uploader *u, char *to, qwen3i_type type, int ld, const qwen3i_matrix &w,
                               const qwen3i_err *err) {
    const size_t in = (size_t)w.cols * qwen3i_type_size(w.type), out = (size_t)ld * qwen3i_type_size(type);
    const int step = (int)least((size_t)w.rows, PIECE / out);
    if (step == 0)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: a matrix has rows of %llu bytes", (unsigned long long)out);
    for (int r = 0; r < w.rows; r += step, u->n++) {
        const piece p = {to + (size_t)r * out, (const char *)w.data + (size_t)r * in, least(step, w.rows - r), w.cols, ld,
                         type, w.type, -1};
        if (u->pieces) u->pieces[u->n] = p;
        else u->total += (double)piece_bytes(p);
    }
    return QWEN3_OK;
}

static qwen3_result add_gain(uploader *u, float *to, const float *from, int n, const qwen3i_err *err) {
    const qwen3i_matrix w = {from, 1, n, QWEN3I_F32};
    return add_pieces(u, (char *)to, QWEN3I_F32, n, w, err);
}

static qwen3_result add_model(uploader *u, cuda_model *m, const qwen3i_weights *w, const qwen3i_err *err) {
    const int n_embd = m->config.n_embd, head_dim = m->config.head_dim;
    weight_group g;
    for (int i = 0; model_group(m, w, i, &g); i++) {
        char *to = (char *)g.to->data;
        for (int k = 0; k < g.n; k++) {
            TRY(add_pieces(u, to, g.to->type, g.to->ld, *g.from[k], err));
            to += (size_t)g.from[k]->rows * g.to->ld * qwen3i_type_size(g.to->type);
        }
        if (u->pieces) u->pieces[u->n - 1].ends = i;
    }
    for (int i = 0; i < m->config.n_layer; i++) {
        const qwen3i_layer *l = &w->layers[i];
        TRY(add_gain(u, m->layers[i].attn_norm, l->attn_norm, n_embd, err));
        TRY(add_gain(u, m->layers[i].mlp_norm, l->mlp_norm, n_embd, err));
        TRY(add_gain(u, m->layers[i].q_norm, l->q_norm, head_dim, err));
        TRY(add_gain(u, m->layers[i].k_norm, l->k_norm, head_dim, err));
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

/* Group i from BF16 to F16, in place on the device, when it is there. top: the largest |w|, as bits; 0 as yet. */
static qwen3_result convert_group(uploader *u, cuda_model *m, const qwen3i_weights *w, int i, cudaEvent_t there,
                                  unsigned *top, const qwen3i_err *err) {
    const dim3 grid((unsigned)(8 * m->n_sm));
    weight_group g;
    model_group(m, w, i, &g);
    if (g.to->type != QWEN3I_BF16) return QWEN3_OK;
    unsigned short *data = (unsigned short *)g.to->data;
    const size_t n = (size_t)g.to->rows * g.to->ld;
    CUDA_TRY(cudaStreamWaitEvent(u->converting, there, 0));
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
        CUDA_TRY(cudaMemcpyAsync(p.to, u->buffers + (size_t)slot * PIECE, piece_bytes(p), cudaMemcpyHostToDevice,
                                 u->stream));
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

/* What convert_group() has multiplied by; through the upload buffers, which are free by now, as many as fit at a time. */
static qwen3_result fetch_scales(uploader *u, cuda_model *m, const qwen3i_weights *w, const unsigned *tops, int n_groups,
                                 const qwen3i_err *err) {
    const unsigned *host = (const unsigned *)(const void *)u->buffers;
    const int room = (int)(SCALES_PIECE / sizeof *tops);
    weight_group g;
    for (int i = 0; i < n_groups; i++) {
        if (i % room == 0) {
            const size_t n = (size_t)least(room, n_groups - i);
            CUDA_TRY(cudaMemcpyAsync(u->buffers, tops + i, n * sizeof *tops, cudaMemcpyDeviceToHost, u->converting));
            CUDA_TRY(cudaStreamSynchronize(u->converting));
        }
        model_group(m, w, i, &g);
        if (g.to->type != QWEN3I_BF16) continue;
        g.to->type = QWEN3I_F16;
        g.to->scale = 1.0f / half_scale(qwen3i_float_from_bits(host[i % room]));
    }
    return QWEN3_OK;
}

/* A map of [z, y, x] 16-bit elements at p, read in tiles of [tile_z, tile_y, 64]. */
static qwen3_result make_map(stored_map *out, const void *p, u64 x, u64 y, u64 z, int tile_y, int tile_z,
                             const qwen3i_err *err) {
    typedef CUresult (*encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                               const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                               CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    const cuuint64_t sizes[3] = {x, y, z}, strides[2] = {2 * x, 2 * x * y};
    const cuuint32_t tile[3] = {(cuuint32_t)WIDE_K, (cuuint32_t)tile_y, (cuuint32_t)tile_z}, steps[3] = {1, 1, 1};
    CUtensorMap map;
    cudaDriverEntryPointQueryResult found;
    void *function = NULL;
#if CUDART_VERSION >= 12050
    CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    CUDA_TRY(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess || !function)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: the driver has no cuTensorMapEncodeTiled");
    const CUresult r =
        ((encode)function)(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, z ? 3 : 2, (void *)p, sizes, strides, tile, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: cuTensorMapEncodeTiled: error %d", (int)r);
    memcpy(out, &map, sizeof *out);
    return QWEN3_OK;
}

static qwen3_result make_map(stored_map *out, const void *p, u64 x, u64 y, int tile_y, const qwen3i_err *err) {
    return make_map(out, p, x, y, 0, tile_y, 1, err);
}

static CUtensorMap get_map(const stored_map &m) {
    CUtensorMap map;
    memcpy(&map, &m, sizeof map);
    return map;
}

/* Are the shapes, types and the chip such that products with many rows can go through the kernels for Hopper? */
static bool fits_wide(const cuda_model *m) {
    const qwen3i_config *g = &m->config;
    if (m->capability != 90 || g->head_dim != WIDE_DIM || g->n_head / g->n_head_kv > WIDE_M) return false;
    if (g->n_embd % WIDE_N || g->n_ff % WIDE_N || g->n_embd > 4 * 8 * norm_threads(8)) return false;
    for (int i = 0; i < g->n_layer; i++) {
        const layer_weights &l = m->layers[i];
        if (l.qkv.type != QWEN3I_F16 || l.wo.type != QWEN3I_F16 || l.gate_up.type != QWEN3I_F16 ||
            l.w_down.type != QWEN3I_F16) return false;
    }
    return (m->head.data ? m->head : m->embed).type == QWEN3I_F16;
}

static qwen3_result prepare_wide(uploader *u, cuda_model *m, const qwen3i_err *err) {
    const int n_ff = m->config.n_ff;
    int *answer = (int *)(void *)m->layers[0].gate_up.bounds, yes = 0;
    if (!fits_wide(m)) return QWEN3_OK;
    CUDA_TRY(launch(u->stream, dim3(1), 32, 0, has_wgmma_kernel, answer));
    CUDA_TRY(cudaMemcpyAsync(&yes, answer, sizeof yes, cudaMemcpyDeviceToHost, u->stream));
    CUDA_TRY(cudaStreamSynchronize(u->stream));
    if (!yes) return QWEN3_OK;          /* built for another chip of this generation */
    for (int i = 0; i < m->config.n_layer; i++) {
        layer_weights *l = &m->layers[i];
        matrix *const all[4] = {&l->qkv, &l->wo, &l->gate_up, &l->w_down}, &w = l->gate_up;
        for (int k = 0; k < 4; k++) {
            TRY(make_map(&all[k]->map, all[k]->data, (u64)all[k]->ld, (u64)all[k]->rows, WIDE_N / 2, err));
            TRY(make_map(&all[k]->map_more, all[k]->data, (u64)all[k]->ld, (u64)all[k]->rows, WIDE_N_MORE / 2, err));
        }
        CUDA_TRY(cudaMemsetAsync(w.bounds, 0, 2 * sizeof(float), u->stream));
        for (int k = 0; k < 2; k++)
            CUDA_TRY(launch(u->stream, dim3((unsigned)ceil_div(n_ff, 8)), 256, 0, row_norms_kernel, w.bounds + k,
                            (const half_t *)w.data + (size_t)k * n_ff * w.ld, n_ff, w.cols, w.ld, w.scale));
    }
    matrix &head = m->head.data ? m->head : m->embed;
    TRY(make_map(&head.map, head.data, (u64)head.ld, (u64)head.rows, WIDE_N / 2, err));
    m->wide = true;
    return QWEN3_OK;
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
    TRY(prepare_wide(u, m, err));
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
    if (e == cudaErrorInsufficientDriver)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: there is no NVIDIA driver, or it is older than CUDA %d.%d needs",
                    CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (e != cudaSuccess || n == 0)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: no usable GPU: %s",
                    e == cudaSuccess ? "none found" : cudaGetErrorString(e));
    if (device < 0 || device >= n)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: there is no device %d; 0 to %d exist", device, n - 1);
    device_guard guard(device);
    CUDA_TRY(guard.status);
    CUDA_TRY(cudaGetDeviceProperties(&prop, device));
    m->device = device;
    m->n_sm = prop.multiProcessorCount;
    m->block_shared = prop.sharedMemPerBlockOptin;
    m->sm_shared = prop.sharedMemPerMultiprocessor;
    m->cache_bytes = (size_t)prop.l2CacheSize;
    m->capability = prop.major * 10 + prop.minor;
    snprintf(m->name, sizeof m->name, "%s", prop.name);
    if (m->capability < 75)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: %s has compute capability %d.%d; 7.5 is the least", m->name,
                    prop.major, prop.minor);
    e = cudaFuncGetAttributes(&code, rope_table_kernel);
    if (e != cudaSuccess) {
        cudaGetLastError();
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "CUDA: this build has no code for %s (sm_%d): %s", m->name, m->capability,
                    cudaGetErrorString(e));
    }
    return QWEN3_OK;
}

static qwen3_result check_shapes(const qwen3i_config *c, const qwen3i_err *err) {
    if (c->head_dim % 8 != 0 || c->head_dim > MAX_HEAD_DIM)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: head_dim is %d; multiples of 8 up to %d can be run", c->head_dim,
                    MAX_HEAD_DIM);
    if (c->n_ff > 1024 * 4 * VECTORS)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "CUDA: the MLP is %d wide; up to %d can be run", c->n_ff,
                    1024 * 4 * VECTORS);
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

static qwen3_result fill_model(cuda_model *m, const qwen3i_model_view *view, const qwen3_load_desc *desc,
                               const qwen3i_err *err) {
    arena a = {NULL, 0};
    unsigned *tops = NULL;
    uploader u = uploader();
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
    u.desc = desc;
    u.allocator = &m->allocator;
    u.room = SLOTS;
    const qwen3_result r = upload_weights(&u, m, view->weights, tops, err);
    close_uploader(&u);
    return r;
}

static qwen3_result create_model_from(void **model_state, const qwen3i_model_view *view, const qwen3_load_desc *desc,
                                      const qwen3i_err *err) {
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

static qwen3_result create_model(void **model_state, const qwen3_model *model, const qwen3_load_desc *desc,
                                 const qwen3i_err *err) {
    const qwen3i_model_view view = qwen3_backend_view(model);
    return create_model_from(model_state, &view, desc, err);
}

static const char *device_name(const void *model_state) { return ((const cuda_model *)model_state)->name; }

/* ================================================================================================
   CONTEXT: everything one user of a model needs, taken at once
   ================================================================================================ */
const int LISTED_MAX = 1 << 15;         /* biases and penalised tokens in one step */
const int N_PLANS    = 256;
const int KEPT       = 3;               /* logits of a sequence: see cuda_ctx */

struct upload_slot {                    /* pinned memory, copied to its twin on the device or read there */
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
    bool              standard;                 /* one plain kernel for each operation: see tests/cuda_lab.cu */
    bool              own_stream, tiles;        /* tiles: the tensor core kernel does this model's attention */
    bool              wide, wide_kv;            /* many rows go through the kernels for Hopper; attention, too; ... */
    int               few_room[4];              /* clusters of 1, 2, 4, 8 blocks of few_product that run at once */
    int               narrow_rows;              /* ... and only up to so many need float32 rows of q and attention */
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
    float  *kept;                               /* [max_seqs, KEPT, n_vocab]: the current logits, those of a step and */
                                                /* of the one begun ahead of it, in turn                            */
    float2 *rope;                               /* [max_ctx, head_dim / 2] */
    float  *freqs;
    float  *x, *h, *tmp;                        /* [max_rows, n_embd padded]: residual, normalised, a product */
    float  *qkv, *attn, *gate_up, *ff;          /* [max_rows, qkv_ld | q_dim | 2 n_ff | n_ff padded] */
    struct { float *at; size_t n; } results[4]; /* those of them, and logits, that cuBLASLt writes */
    void   *act; float *act_scale;              /* [max_rows, act_ld] input of a product */
    half_t *wide_act, *wide_q, *wide_m;         /* [max_rows, n_embd or q_dim | q_dim | n_ff] the same on Hopper */
    float  *ff_scale;                           /* [max_rows] of wide_m */
    stored_map wide_h_map, wide_a_map, wide_m_map, q_map, k_map, v_map;
    stored_map few_h_map, few_a_map, few_m_map;                 /* the same in smaller tiles */
    float  *logits, *logprobs;                  /* [head_rows, n_vocab], [head_rows] */
    float  *parts;
    unsigned *qkv_tickets, *attn_tickets;
    void   *workspace;                          /* of cuBLASLt */
    size_t  workspace_size;
    row_info *rows; attention_tile *tile_list; listed *lists;
    int    *chosen; u64 *best;                  /* [max_seqs] */
    candidates *listed_keys;                    /* [choice_rows] */

    /* pinned host memory */
    upload_slot slots[RING];
    cudaEvent_t uploaded[RING], reported[RING];
    int         turn;
    float      *host_logits;                    /* [n_vocab] */

    int        *current;                        /* [max_seqs] which of its KEPT logits are the sequence's */
    run_ahead   ahead;
};

/* Rows whose logits are computed at a time: all sequences', as far as possible, and at least half of the most. */
static int head_rows(const cuda_ctx *c) { return least(least(HEAD_ROWS, c->max_rows), most(HEAD_ROWS / 2, c->desc.max_seqs)); }
/* Sequences that choose at a time. */
static int choice_rows(const cuda_ctx *c) { return least(head_rows(c), c->desc.max_seqs); }

/* How many parts the positions of a row are split into: enough to fill the chip, from the shape alone. */
static int attention_splits(const cuda_ctx *c, int rows) {
    const int want = 2 * c->m->n_sm / (c->m->config.n_head_kv * rows);
    return want < 1 ? 1 : want > MAX_SPLITS ? MAX_SPLITS : want;
}

/* One for each head of a row, or for each of the blocks of attention_decode that are there at once. */
static size_t attention_tickets(const cuda_ctx *c) {
    return most((size_t)c->max_rows * c->m->config.n_head, (size_t)(2 * c->m->n_sm));
}

static float *take_result(cuda_ctx *c, arena *a, int i, size_t n) {
    c->results[i].n = n;
    return c->results[i].at = a->take<float>(n);
}

static void lay_out_device(cuda_ctx *c, arena *a) {
    const qwen3i_config *g = &c->m->config;
    const size_t rows = (size_t)c->max_rows, narrow = (size_t)c->narrow_rows;
    const size_t gemm = c->wide ? 0 : rows;
    const size_t seqs = (size_t)c->desc.max_seqs, vocab = (size_t)g->n_vocab;
    const size_t embd = (size_t)c->embd_ld, half = (size_t)g->head_dim / 2, ctx = (size_t)c->desc.max_ctx;
    const size_t part_rows = (size_t)most(MAX_SPLITS, 2 * c->m->n_sm / g->n_head_kv);
    c->kv_layer_bytes = seqs * ctx * c->kv_dim * qwen3i_type_size((qwen3i_type)c->desc.kv_type);
    c->k = a->take<char>((size_t)g->n_layer * c->kv_layer_bytes);
    c->v = a->take<char>((size_t)g->n_layer * c->kv_layer_bytes);
    c->kept = a->take<float>(seqs * KEPT * vocab);
    c->rope = a->take<float2>(ctx * half);
    c->freqs = a->take<float>(half);
    c->x = a->take<float>(rows * embd);
    c->h = a->take<float>(narrow * embd);
    c->tmp = take_result(c, a, 0, gemm * embd);
    c->qkv = take_result(c, a, 1, (c->wide_kv ? narrow : rows) * c->qkv_ld);
    c->attn = a->take<float>((c->wide_kv ? narrow : rows) * c->q_dim);
    c->gate_up = take_result(c, a, 2, gemm * 2 * c->ff_ld);
    c->ff = a->take<float>((c->standard ? rows : (size_t)least(c->max_rows, MATVEC_ROWS)) *
                           c->ff_ld);
    c->act = a->take<float>(gemm * c->act_ld);
    c->act_scale = a->take<float>(rows);
    if (c->wide) {
        c->wide_act = a->take<half_t>(rows * most(c->q_dim, g->n_embd));
        c->wide_q = a->take<half_t>(c->wide_kv ? rows * c->q_dim : 0);
        c->wide_m = a->take<half_t>(rows * g->n_ff);
        c->ff_scale = a->take<float>(rows);
    }
    c->logits = take_result(c, a, 3, (size_t)head_rows(c) * vocab);
    c->logprobs = a->take<float>((size_t)head_rows(c));
    c->parts = a->take<float>(part_rows * g->n_head * (size_t)(3 * g->head_dim));
    c->qkv_tickets = a->take<unsigned>((size_t)(g->n_head + g->n_head_kv));
    c->attn_tickets = a->take<unsigned>(attention_tickets(c));
    c->workspace = a->take<char>(c->workspace_size);
    c->rows = a->take<row_info>(rows);
    c->tile_list = a->take<attention_tile>(rows);
    c->listed_keys = a->take<candidates>((size_t)choice_rows(c));
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
    c->current = a->take<int>(seqs);
    c->ahead.seqs = a->take<int>(seqs);
    c->ahead.lengths = a->take<int>(seqs);
    c->ahead.last = a->take<int>(seqs);
    c->ahead.samplers = a->take<qwen3_sampler>(seqs);
    c->ahead.bias_hashes = a->take<u64>(seqs);
}

/* What follows from the model and the descriptor. */
static void shape_ctx(cuda_ctx *c, const cuda_model *m, const qwen3_ctx_desc *desc, bool standard) {
    const qwen3i_config *g = &m->config;
    memset(c, 0, sizeof *c);
    c->m = m;
    c->desc = *desc;
    c->standard = standard;
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
    c->wide = m->wide && !standard;
    c->wide_kv = c->wide && desc->kv_type == QWEN3_KV_F16;
    c->workspace_size = c->wide ? 0 : WORKSPACE;         /* its products are all our own */
    c->narrow_rows = c->wide ? least(c->max_rows, most(desc->max_seqs, FEW_MOST)) : c->max_rows;
}

static qwen3_memory ctx_memory(const void *model_state, const qwen3_model *, const qwen3_ctx_desc *desc) {
    qwen3_memory bytes;
    arena device = {NULL, 0}, pinned = {NULL, 0}, host = {NULL, 0};
    cuda_ctx c;
    shape_ctx(&c, (const cuda_model *)model_state, desc, false);
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

template <class K> static qwen3_result allow_shared(K *kernel, size_t bytes, const qwen3i_err *err) {
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return QWEN3_OK;
}

template <int R> static qwen3_result allow_few_shared(const qwen3i_err *err) {
    const size_t bytes = FEW_SHARED;
    TRY(allow_shared(few_product_kernel<WIDE_ADD, half_t, WIDE_M / 2, R>, bytes, err));
    TRY(allow_shared(few_product_kernel<WIDE_ADD, half_t, WIDE_M, R>, bytes, err));
    TRY(allow_shared(few_product_kernel<WIDE_QKV, half_t, WIDE_M, R>, bytes, err));
    TRY(allow_shared(few_product_kernel<WIDE_QKV, bf16_t, WIDE_M, R>, bytes, err));
    TRY(allow_shared(few_product_kernel<WIDE_QKV, float, WIDE_M, R>, bytes, err));
    TRY(allow_shared(few_product_kernel<WIDE_SWIGLU, half_t, WIDE_M, R>, bytes, err));
    return allow_shared(few_product_kernel<WIDE_STORE, half_t, WIDE_M, R>, bytes, err);
}

/* A cluster lies within one of the chip's groups of multiprocessors: of 264 places for blocks, 30 clusters of 8 find one. */
static qwen3_result find_few_room(cuda_ctx *c, const qwen3i_err *err) {
    for (int i = 0; i < 4; i++) {
        cudaLaunchConfig_t config = cudaLaunchConfig_t();
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = 1u << i;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(1u << i);
        config.blockDim = dim3((unsigned)FEW_THREADS);
        config.dynamicSmemBytes = FEW_SHARED;
        config.attrs = &cluster;
        config.numAttrs = 1;
        CUDA_TRY(cudaOccupancyMaxActiveClusters(&c->few_room[i], few_product_kernel<WIDE_SWIGLU, half_t, WIDE_M, FEW_MOST>,
                                                &config));
        c->few_room[i] = most(c->few_room[i], 1);
    }
    return QWEN3_OK;
}

template <int P> static qwen3_result allow_wide_shared(const qwen3i_err *err) {
    const size_t bytes = wide_product_shared<WIDE_N, P>();
    TRY(allow_shared(wide_product_kernel<WIDE_ADD, half_t, WIDE_N, P>, bytes, err));
    TRY(allow_shared(wide_product_kernel<WIDE_QKV, half_t, WIDE_N, P>, bytes, err));
    TRY(allow_shared(wide_product_kernel<WIDE_QKV, bf16_t, WIDE_N, P>, bytes, err));
    TRY(allow_shared(wide_product_kernel<WIDE_QKV, float, WIDE_N, P>, bytes, err));
    return allow_shared(wide_product_kernel<WIDE_SWIGLU, half_t, WIDE_N, P>, bytes, err);
}

static qwen3_result prepare_wide_ctx(cuda_ctx *c, const qwen3i_err *err) {
    const qwen3i_config *g = &c->m->config;
    const u64 rows = (u64)c->max_rows, ctx = (u64)c->desc.max_ctx, sets = (u64)c->desc.max_seqs * (u64)g->n_layer;
    TRY(make_map(&c->wide_h_map, c->wide_act, (u64)g->n_embd, rows, WIDE_M, err));
    TRY(make_map(&c->wide_a_map, c->wide_act, (u64)c->q_dim, rows, WIDE_M, err));
    TRY(make_map(&c->wide_m_map, c->wide_m, (u64)g->n_ff, rows, WIDE_M, err));
    TRY(make_map(&c->few_h_map, c->wide_act, (u64)g->n_embd, rows, FEW_X_TILE, err));
    TRY(make_map(&c->few_a_map, c->wide_act, (u64)c->q_dim, rows, FEW_X_TILE, err));
    TRY(make_map(&c->few_m_map, c->wide_m, (u64)g->n_ff, rows, FEW_X_TILE, err));
    TRY(allow_few_shared<32>(err));
    TRY(allow_few_shared<64>(err));
    TRY(find_few_room(c, err));
    TRY(allow_wide_shared<1>(err));
    TRY(allow_wide_shared<2>(err));
    TRY(allow_shared(wide_product_kernel<WIDE_ADD, half_t, WIDE_N_MORE, 1>, wide_product_shared<WIDE_N_MORE, 1>(), err));
    if (!c->wide_kv) return QWEN3_OK;
    TRY(make_map(&c->q_map, c->wide_q, WIDE_DIM, (u64)g->n_head, rows, c->group, WIDE_M / c->group, err));
    TRY(make_map(&c->k_map, c->k, (u64)c->kv_dim, ctx, sets, WIDE_POS, 1, err));
    TRY(make_map(&c->v_map, c->v, (u64)c->kv_dim, ctx, sets, WIDE_POS, 1, err));
    TRY(allow_shared(wide_attention_kernel, WIDE_ATTENTION_SHARED, err));
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
    LT_TRY(cublasLtCreate(&c->lt));
    TRY(allow_tile_shared(c, err));
    if (c->wide) TRY(prepare_wide_ctx(c, err));
    CUDA_TRY(
        cudaFuncSetAttribute(choose_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(choose_shared)));
    scale = qwen3_backend_rotation(freqs, g, (double)c->desc.yarn_factor);
    CUDA_TRY(
        cudaMemcpyAsync(c->freqs, freqs, (size_t)g->head_dim / 2 * sizeof(float), cudaMemcpyHostToDevice, c->stream));
    CUDA_TRY(launch(c->stream, dim3((unsigned)c->desc.max_ctx), 64, 0, rope_table_kernel, c->rope,
                    (const float *)c->freqs, g->head_dim / 2, scale));
    CUDA_TRY(cudaMemsetAsync(c->k, 0, (size_t)g->n_layer * c->kv_layer_bytes, c->stream));
    CUDA_TRY(cudaMemsetAsync(c->v, 0, (size_t)g->n_layer * c->kv_layer_bytes, c->stream));
    CUDA_TRY(cudaMemsetAsync(c->kept, 0, (size_t)c->desc.max_seqs * KEPT * g->n_vocab * sizeof(float), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->qkv_tickets, 0, (size_t)(g->n_head + g->n_head_kv) * sizeof(unsigned), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->attn_tickets, 0, attention_tickets(c) * sizeof(unsigned), c->stream));
    if (c->wide) {                      /* tiles are read whole, whatever is in the rows that a batch has not */
        CUDA_TRY(cudaMemsetAsync(c->wide_act, 0, (size_t)c->max_rows * most(c->q_dim, g->n_embd) * 2, c->stream));
        CUDA_TRY(cudaMemsetAsync(c->wide_m, 0, (size_t)c->max_rows * g->n_ff * 2, c->stream));
    }
    if (!c->wide)    /* for initcheck, which does not see that cuBLASLt writes by bulk stores */
        for (const auto &r : c->results) CUDA_TRY(cudaMemsetAsync(r.at, 0, r.n * sizeof(float), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->best, 0, (size_t)c->desc.max_seqs * sizeof(u64), c->stream));
    CUDA_TRY(cudaMemsetAsync(c->listed_keys, 0, (size_t)choice_rows(c) * sizeof(candidates), c->stream)); /* read whole */
    CUDA_TRY(cudaMemsetAsync(c->chosen, 0, (size_t)c->desc.max_seqs * sizeof(int), c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

static qwen3_result create_ctx_for(bool standard, void **ctx_state, void *model_state, const qwen3_model *model,
                                   const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    const cuda_model *m = (const cuda_model *)model_state;
    cuda_ctx *c = (cuda_ctx *)host_alloc(&desc->allocator, sizeof *c);
    *ctx_state = NULL;
    if (!c) return no_host_memory(err, sizeof *c);
    shape_ctx(c, m, desc, standard);
    const qwen3i_model_view view = qwen3_backend_view(model);      /* the tokenizer may have come after the weights */
    c->eos = view.eos;
    c->n_eos = view.n_eos;
    c->n_choose = least(view.n_tokens, m->config.n_vocab);
    device_guard guard(m->device);
    const qwen3_result r =
        guard.status == cudaSuccess ? fill_ctx(c, err) : cuda_fail(err, guard.status, "cudaSetDevice");
    if (r == QWEN3_OK) *ctx_state = c;
    else free_ctx(c);
    return r;
}

static qwen3_result create_ctx(void **ctx_state, void *model_state, const qwen3_model *model,
                               const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    return create_ctx_for(false, ctx_state, model_state, model, desc, err);
}

/* ================================================================================================
   MATRIX PRODUCTS by cuBLASLt: a plan for each shape, made once
   ================================================================================================ */
static qwen3_result describe_plan(plan *p, const qwen3i_err *err) {
    const cudaDataType_t in = p->type == QWEN3I_F32 ? CUDA_R_32F : CUDA_R_16F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    LT_TRY(cublasLtMatmulDescCreate(&p->op, p->type == QWEN3I_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F,
                                    CUDA_R_32F));
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
    const uint64_t workspace = c->workspace_size;
    const uint32_t align_in = 16, align_out = p->aligned ? 16 : 4, reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
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
        s = cublasLtMatmulAlgoGetHeuristic(c->lt, p->op, p->w, p->x, p->y, p->y, wish, 1, found, &n);
    cublasLtMatmulPreferenceDestroy(wish);
    if (s != CUBLAS_STATUS_SUCCESS || n == 0)
        return qwen3i_fail(err, QWEN3_ERR_DEVICE, "cuBLASLt has no algorithm for [%d, %d] times [%d, %d] (status %d)", p->rows,
                    p->k, p->k, p->n, (int)s);
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
static qwen3_result product(cuda_ctx *c, cudaStream_t s, float *y, int ldy, const matrix &w, int first, int n,
                            const void *x, int rows, const qwen3i_err *err) {
    plan want, *p = NULL;
    memset(&want, 0, sizeof want);
    want.n = n; want.rows = rows; want.k = w.ld; want.ldy = ldy; want.type = w.type;
    want.aligned = (size_t)y % 16 == 0 && ldy % 4 == 0;
    TRY(find_plan(c, want, &p, err));
    const char *data = (const char *)w.data + (size_t)first * w.ld * qwen3i_type_size(w.type);
    for (int term = w.terms - 1; term >= 0; term--) {           /* the small one first */
        const float beta = term == w.terms - 1 ? 0.0f : 1.0f;
        const char *in = (const char *)x + (size_t)term * rest_of(w, rows) * qwen3i_type_size(w.type);
        LT_TRY(cublasLtMatmul(c->lt, p->op, &w.scale, data, p->w, in, p->x, &beta, y, p->y, y, p->y, &p->algo,
                              c->workspace, c->workspace_size, s));
    }
    return QWEN3_OK;
}

/* ================================================================================================
   LAYER: the operations on the rows of a batch, each in three ways
   ================================================================================================ */
enum mode {
    MATVEC, GEMM,                       /* fused: up to 8 rows, and with cuBLASLt */
    FEW, WIDE,                          /* the same as GEMM, by the kernels for Hopper: up to 64 rows, and more */
    STANDARD                            /* one plain kernel for each operation */
};

struct pass {                           /* one batch on its way through the layers */
    cuda_ctx          *c;
    cudaStream_t       s;
    int                n, n_tiles;      /* n_tiles 0: attention row by row */
    mode               how;
    int                n_outs;          /* so many rows are wanted, the outs of c->rows; ... */
    bool               only_wanted;     /* ... they are all that is left, in order */
    bool               early;           /* kernels may start early: see launch_early */
    bool               layers;          /* all of them, one after the other, not a single operation for tests */
    const float       *gain;            /* not NULL: the next one is to do it, with this gain */
    bool               pending;         /* tmp is still to be added to x ... */
    const float       *pending_scale;   /* ... times this */
    const qwen3i_err  *err;
};

/* CALL(T) with T as the type of a product's weights and input, or of the cache */
#define BY_WEIGHT_TYPE(w, CALL) ((w).type == QWEN3I_F32 ? CALL(float) : CALL(half_t))
#define BY_KV_TYPE(c, CALL) ((c)->desc.kv_type == QWEN3_KV_F32 ? CALL(float) : \
                             (c)->desc.kv_type == QWEN3_KV_BF16 ? CALL(bf16_t) : CALL(half_t))
#define RUN(...)                                                                                                       \
    do {                                                                                                               \
        const cudaError_t e_ = launch(p->s, __VA_ARGS__);                                                              \
        if (e_ != cudaSuccess) return cuda_fail(p->err, e_, "kernel launch");                                          \
    } while (0)

static qwen3_result launched(const pass *p, cudaError_t e, const char *what) {
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(p->err, e, what);
}

static bool goes_wide(const cuda_ctx *c, int n) {
    return c->wide && n > FEW_MOST;
}

/* Up to so many rows go through the matrix-vector kernels. */
static int matvec_rows(const cuda_ctx *c) { return c->wide ? FEW_LEAST - 1 : MATVEC_ROWS; }

/* Are q and what attention gives F16? */
static bool halves(const pass *p) { return p->how == WIDE && p->c->wide_kv && p->n_tiles > 0; }

/* Is what attention gives F16? */
static bool gives_halves(const pass *p) {
    return p->c->wide_kv && (p->how == WIDE || (p->how == FEW && p->n_tiles == 0));
}

static pass make_pass(cuda_ctx *c, cudaStream_t s, int n, int n_tiles, const qwen3i_err *err) {
    pass p;
    p.c = c; p.s = s; p.n = n; p.n_tiles = n_tiles;
    p.how = c->standard ? STANDARD : n <= matvec_rows(c) ? MATVEC :
            goes_wide(c, n) ? WIDE : c->wide ? FEW : GEMM;
    p.n_outs = n;
    p.only_wanted = false;
    p.early = c->m->capability >= 90;
    p.layers = false;
    p.gain = NULL;
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

/* How rows of so many vectors of 16 bytes are normed: `lanes` threads a row with k vectors each, `together` rows a block;
   k 0: one element at a time. Few rows want one short pass, many want several loads in flight and full blocks; what suits
   the widths of the models was found by tools/sweep_rmsnorm.py. */
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
static cudaError_t launch_rmsnorm_shape(bool early, cudaStream_t s, norm_shape shape, O *y, int ldy, const T *x,
                                        int ldx, const row_info *outs, const float *gain, int rows, int groups,
                                        int width, int pad, float eps) {
    return launch_early(early, s, grid2(ceil_div(rows, shape.together), groups), shape.lanes * shape.together, 0,
                        rmsnorm_kernel<O, T, K>, y, ldy, x, ldx, outs, gain, rows, width, pad, eps, shape.lanes);
}

template <class O, class T> static cudaError_t launch_rmsnorm(bool early, cudaStream_t s, O *y, int ldy, const T *x,
                                                              int ldx, const row_info *outs, const float *gain,
                                                              int rows, int groups, int width, int pad, float eps) {
    const int v = vector_of<T>::N;
    const bool aligned = width % v == 0 && ldx % v == 0 && ldy % v == 0 && (size_t)x % 16 == 0 && (size_t)y % 16 == 0 &&
                         (size_t)gain % 16 == 0;
    const norm_shape shape = rmsnorm_shape(ceil_div(width, v), sizeof(T) == 2, (long long)rows * groups);
#define QWEN3_SHAPE(K) case K: return launch_rmsnorm_shape<O, T, K>(early, s, shape, y, ldy, x, ldx, outs, gain, rows, \
                                                                    groups, width, pad, eps)
    switch (aligned ? shape.k : 0) { QWEN3_SHAPE(1); QWEN3_SHAPE(2); QWEN3_SHAPE(4); QWEN3_SHAPE(8); }
#undef QWEN3_SHAPE
    return launch_early(early, s, grid2(rows, groups), row_threads(width, 1, rows), 0, rmsnorm_any_kernel<O, T>, y, ldy,
                        x, ldx, outs, gain, width, pad, eps);
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

static const float *act_scale(const pass *p, const matrix &w) { return w.type == QWEN3I_F32 ? NULL : p->c->act_scale; }

/* y = W act, without the rows' scales */
static qwen3_result act_product(const pass *p, float *y, int ldy, const matrix &w, int first, int n) {
    return product(p->c, p->s, y, ldy, w, first, n, p->c->act, p->n, p->err);
}

static qwen3_result add_pending(pass *p) {
    cuda_ctx *c = p->c;
    if (!p->pending) return QWEN3_OK;
    RUN(grid1(p->n), row_threads(c->embd_ld, 4, p->n), 0, add_rows_kernel, c->x, (const float *)c->tmp,
        p->pending_scale, c->m->config.n_embd, c->embd_ld);
    p->pending = false;
    return QWEN3_OK;
}

/* ---- matrix-vector kernels by type, rows and rows a warp ---------------------------------------- */
static matvec_in vector_input(const pass *p, const matrix &w, const float *x, int ldx, int rows) {
    matvec_in in;
    in.w = w.data; in.scale = w.scale; in.n = w.rows; in.k = w.cols; in.ldw = w.ld;
    in.x = x; in.rows = rows; in.ldx = ldx;
    in.gain = NULL; in.eps = p->c->m->config.rms_eps;
    in.near = (size_t)w.rows * w.ld * qwen3i_type_size(w.type) <= p->c->m->cache_bytes / 4;
    return in;
}

/* h as such an input, or x with the norm that is still to be done */
static matvec_in normalised_input(const pass *p, const matrix &w) {
    matvec_in in = vector_input(p, w, p->gain ? p->c->x : p->c->h, p->c->embd_ld, p->n);
    in.gain = p->gain;
    return in;
}

struct share { int blocks, rows; };     /* rows: the most that a warp gets */

/* n rows of W for warps that take at most most_rows: blocks that fill the chip once, or a whole number of times. */
static share matvec_share(const pass *p, int n, int most_rows) {
    const int fill = p->c->m->n_sm, times = ceil_div(ceil_div(n, fill * MATVEC_WARPS), most_rows);
    share s;
    s.blocks = least(fill * times, ceil_div(n, MATVEC_WARPS));
    s.rows = ceil_div(n, s.blocks * MATVEC_WARPS);
    return s;
}

static size_t stream_shared(const matvec_in &in, int ring) { return stream_bytes(in.ldw, ring); }

/* The ring that lets two kernels' blocks be on a multiprocessor; where x is long, the short one; 0: neither fits. */
static int stream_ring(const pass *p, const matvec_in &in, const matrix &w) {
    const cuda_model *m = p->c->m;
    if (in.rows != 1 || w.type == QWEN3I_F32 || m->capability < 80) return 0;
    if (stream_shared(in, STREAM_RING) <= m->sm_shared / 2 - 1024) return STREAM_RING;
    return stream_shared(in, STREAM_RING_SHORT) <= m->block_shared ? STREAM_RING_SHORT : 0;
}

/* In clusters of so many blocks, with as much shared memory as the kernel asks for. */
template <class... P, class... A>
static cudaError_t launch_shared(const pass *p, int cluster, dim3 grid, int threads, size_t shared, void (*kernel)(P...),
                                 A... args) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return e != cudaSuccess ? e : launch_clusters(p->early, cluster, p->s, grid, threads, shared, kernel, args...);
}
template <class... P, class... A>
static cudaError_t launch_stream(const pass *p, const matvec_in &in, int ring, int units, void (*kernel)(P...),
                                 A... args) {
    return launch_shared(p, 1, grid1(least(p->c->m->n_sm, ceil_div(units, MATVEC_WARPS))), 32 * MATVEC_WARPS,
                         stream_shared(in, ring), kernel, args...);
}

/* Rows that a warp takes at a time of the `each` that it has: few turns, few of them idle. */
static int stream_rows_at_once(int each) {
    return each >= 4 && ceil_div(each, 3) * 3 < ceil_div(each, 4) * 4 ? 3 : least(each, 4);
}
static int stream_each(const pass *p, int units) { return ceil_div(units, p->c->m->n_sm * MATVEC_WARPS); }

template <int RING, bool ADD>
static cudaError_t stream_matvec(const pass *p, const matvec_in &in, float *y, int ldy, const row_info *outs) {
#define CALL(NR) launch_stream(p, in, RING, in.n, stream_matvec_kernel<NR, RING, ADD>, in, y, outs, ldy)
    switch (stream_rows_at_once(stream_each(p, in.n))) {
        case 1:  return CALL(1);
        case 2:  return CALL(2);
        case 3:  return CALL(3);
        default: return CALL(4);
    }
#undef CALL
}
template <int RING> static cudaError_t stream_mlp(const pass *p, const matvec_in &in, float *y) {
    const int each = stream_each(p, in.n / 2);
#define CALL(P) launch_stream(p, in, RING, in.n / 2, stream_mlp_kernel<P, RING>, in, y)
    return each == 1 ? CALL(1) : each == 3 && RING == STREAM_RING ? CALL(3) : CALL(2);
#undef CALL
}

/* Blocks that share a head of q, k or v as a cluster; 0: where that would leave much of the chip idle, as 48 heads do
   with 132 multiprocessors, all blocks share all rows. */
static int head_parts(const pass *p, const qkv_args &a) {
    const int heads = a.n_head + 2 * a.n_head_kv, n_sm = p->c->m->n_sm;
    int parts = 8;
    if (p->c->m->capability < 90) return 0;
    while (parts > 1 && (heads * parts > n_sm || a.head_dim < parts * MATVEC_WARPS)) parts /= 2;
    return heads * parts <= n_sm && 8 * heads * parts >= 7 * n_sm ? parts : 0;
}
template <class T, int RING> static cudaError_t stream_qkv(const pass *p, const matvec_in &in, const qkv_args &a) {
    const int parts = head_parts(p, a), blocks = parts * (a.n_head + 2 * a.n_head_kv);
    const size_t shared = stream_shared(in, RING) + 2 * sizeof(mbarrier) + (size_t)a.head_dim * sizeof(float);
#define CALL(NR) launch_shared(p, parts, grid1(blocks), 32 * MATVEC_WARPS, shared, stream_qkv_heads_kernel<T, NR, RING>, in, \
                               a, parts)
    if (parts > 0) return a.head_dim <= 2 * parts * MATVEC_WARPS ? CALL(2) : CALL(4);
#undef CALL
#define CALL(NR) launch_stream(p, in, RING, in.n, stream_qkv_rope_kernel<T, NR, RING>, in, a, p->c->qkv_tickets)
    return stream_rows_at_once(stream_each(p, in.n)) == 3 ? CALL(3) : CALL(4);
#undef CALL
}
#define BY_RING(ring, CALL) ((ring) == STREAM_RING ? CALL(STREAM_RING) : CALL(STREAM_RING_SHORT))

template <class W, int R, int NR, bool ADD>
static cudaError_t launch_matvec(const pass *p, const matvec_in &in, float *y, int ldy, const row_info *outs) {
    const share s = matvec_share(p, in.n, R == 1 ? 4 : NR);
    return launch_early(p->early, p->s, grid1(s.blocks), 32 * MATVEC_WARPS, 0, matvec_kernel<W, R, NR, ADD>, in, y, ldy,
                        outs);
}
template <class W, bool ADD>
static cudaError_t matvec_rows_of(const pass *p, const matvec_in &in, float *y, int ldy, const row_info *outs) {
    if (in.rows > 4) return launch_matvec<W, 8, 2, ADD>(p, in, y, ldy, outs);
    if (in.rows > 2) return launch_matvec<W, 4, 2, ADD>(p, in, y, ldy, outs);
    if (in.rows > 1) return launch_matvec<W, 2, 2, ADD>(p, in, y, ldy, outs);
    switch (matvec_share(p, in.n, 4).rows) {
        case 1:  return launch_matvec<W, 1, 1, ADD>(p, in, y, ldy, outs);
        case 2:  return launch_matvec<W, 1, 2, ADD>(p, in, y, ldy, outs);
        case 3:  return launch_matvec<W, 1, 3, ADD>(p, in, y, ldy, outs);
        default: return launch_matvec<W, 1, 4, ADD>(p, in, y, ldy, outs);
    }
}

/* y (+)= W x */
template <bool ADD> static qwen3_result matvec(const pass *p, float *y, int ldy, const row_info *outs, const matrix &w,
                                               const float *x, int ldx, int rows) {
    const matvec_in in = vector_input(p, w, x, ldx, rows);
    const int ring = stream_ring(p, in, w);
#define CALL(RING) stream_matvec<RING, ADD>(p, in, y, ldy, outs)
    if (ring) return launched(p, BY_RING(ring, CALL), "matvec");
#undef CALL
#define CALL(T) matvec_rows_of<T, ADD>(p, in, y, ldy, outs)
    return launched(p, BY_WEIGHT_TYPE(w, CALL), "matvec");
#undef CALL
}

/* Pairs that a warp takes of n: three if that does all of them at once; otherwise two, with more of each on the way. */
static int pairs_a_warp(const pass *p, int n) { return ceil_div(n, p->c->m->n_sm * MATVEC_WARPS) <= 3 ? 3 : 2; }

template <class W, int R, int P>
static cudaError_t launch_mlp(const pass *p, const matvec_in &in, float *y, int ldy) {
    const share s = matvec_share(p, in.n / 2, R == 1 ? pairs_a_warp(p, in.n / 2) : P);
    return launch_early(p->early, p->s, grid1(s.blocks), 32 * MATVEC_WARPS, 0, mlp_kernel<W, R, P>, in, y, ldy);
}
template <class W> static cudaError_t mlp_rows_of(const pass *p, const matvec_in &in, float *y, int ldy) {
    if (in.rows > 4) return launch_mlp<W, 8, 1>(p, in, y, ldy);
    if (in.rows > 2) return launch_mlp<W, 4, 1>(p, in, y, ldy);
    if (in.rows > 1) return launch_mlp<W, 2, 1>(p, in, y, ldy);
    switch (matvec_share(p, in.n / 2, pairs_a_warp(p, in.n / 2)).rows) {
        case 1:  return launch_mlp<W, 1, 1>(p, in, y, ldy);
        case 2:  return launch_mlp<W, 1, 2>(p, in, y, ldy);
        default: return launch_mlp<W, 1, 3>(p, in, y, ldy);
    }
}

template <class W, class T, int R, int NR>
static cudaError_t launch_qkv(const pass *p, const matvec_in &in, const qkv_args &a) {
    const share s = matvec_share(p, in.n, R == 1 ? 4 : NR);
    return launch_early(p->early, p->s, grid1(s.blocks), 32 * MATVEC_WARPS, 0, qkv_rope_kernel<W, T, R, NR>, in, a,
                        p->c->qkv_tickets);
}
template <class W, class T> static cudaError_t qkv_rows_of(const pass *p, const matvec_in &in, const qkv_args &a) {
    if (in.rows > 4) return launch_qkv<W, T, 8, 2>(p, in, a);
    if (in.rows > 2) return launch_qkv<W, T, 4, 2>(p, in, a);
    if (in.rows > 1) return launch_qkv<W, T, 2, 2>(p, in, a);
    switch (matvec_share(p, in.n, 4).rows) {
        case 1:  return launch_qkv<W, T, 1, 1>(p, in, a);
        case 2:  return launch_qkv<W, T, 1, 2>(p, in, a);
        case 3:  return launch_qkv<W, T, 1, 3>(p, in, a);
        default: return launch_qkv<W, T, 1, 4>(p, in, a);
    }
}
template <class T>
static cudaError_t fused_qkv(const pass *p, const matrix &w, const matvec_in &in, const qkv_args &a) {
    const int ring = stream_ring(p, in, w);
#define CALL(RING) stream_qkv<T, RING>(p, in, a)
    if (ring) return BY_RING(ring, CALL);
#undef CALL
    return w.type == QWEN3I_F32 ? qkv_rows_of<float, T>(p, in, a) : qkv_rows_of<half_t, T>(p, in, a);
}

/* ---- x = embedding of the rows' tokens ------------------------------------------------------------- */
template <class W> static cudaError_t launch_embed(const pass *p, const matrix &w) {
    return launch_early(p->early, p->s, grid1(p->n), row_threads(w.cols, 4, p->n), 0, embed_kernel<W>,
                  p->c->x, (const W *)w.data, w.scale, (const row_info *)p->c->rows, w.cols, w.ld);
}
static qwen3_result embed(const pass *p) {
    const matrix &w = p->c->m->embed;
#define CALL(T) launch_embed<T>(p, w)
    return launched(p, BY_WEIGHT_TYPE(w, CALL), "embed");
#undef CALL
}

/* ---- arguments of products on Hopper, and how few rows share the chip ----------------------------------------- */
static wide_args wide_arguments(const pass *p, const matrix &w, const float *in_scale) {
    wide_args a;
    memset(&a, 0, sizeof a);
    a.rows = p->n;
    a.k = w.cols;
    a.n_tiles = w.rows / WIDE_N;
    a.step = WIDE_N;
    a.half = WIDE_N / 2;
    a.w_scale = w.scale;
    a.in_scale = in_scale;
    return a;
}

/* About how many microseconds so many blocks, all at once, need for so many steps each: the busiest multiprocessor takes in
   45 KB of W and x in one, memory gives 22.5 KB of W for each, and the rest of a kernel takes 3. */
static float few_time(const pass *p, int blocks, int steps, int m, int r) {
    const float w = (float)(m * WIDE_K * 2), x = (float)(r * WIDE_K * 2), n_sm = (float)p->c->m->n_sm;
    const float in = (float)ceil_div(blocks, p->c->m->n_sm) * (w + x) / 45e3f, from = (float)blocks * w / n_sm / 22.5e3f;
    return 3 + (float)steps * (in > from ? in : from);
}

/* Tiles of m rows of W, each shared by so many blocks, each with so many steps. */
struct few_plan { int m, parts, steps; float time; };

/* The better of a plan and of what tiles of m rows allow. */
static few_plan few_better(const pass *p, const wide_args &a, int m, int r, few_plan best) {
    const int tiles = a.n_tiles * (WIDE_M / m), steps = a.k / WIDE_K;
    for (int i = 0, parts = 1; parts <= FEW_PARTS && steps % parts == 0; i++, parts *= 2) {
        const int room = p->c->few_room[i], left = tiles % room;
        const float time = (float)(tiles / room) * few_time(p, room * parts, steps / parts, m, r) +
                           (left ? few_time(p, left * parts, steps / parts, m, r) : 0);
        if (best.m == 0 || time <= best.time) best = {m, parts, steps / parts, time};
    }
    return best;
}

/* Few rows of few elements are normed where they are multiplied: all of x has a place beside the weights. */
static bool few_norms_itself(const pass *p, const matrix &w) {
    const few_plan none = {0, 0, 0, 0}, plan = few_better(p, wide_arguments(p, w, NULL), WIDE_M, 32, none);
    return p->n <= FEW_NORM && w.cols <= FEW_WIDTH && few_stages<WIDE_M, 32>(plan.steps) == plan.steps;
}

/* ---- h = RMSNorm(x), as the input of w ---------------------------------------------------------------- */
template <class O> static cudaError_t launch_add_rmsnorm(const pass *p, const float *gain, const matrix &w) {
    cuda_ctx *c = p->c;
    const float *add = p->pending ? c->tmp : NULL;
    return launch(p->s, grid1(p->n), row_threads(c->embd_ld, 4, p->n), 0, add_rmsnorm_kernel<O>, (O *)c->act,
                  c->act_scale, c->x, add, p->pending_scale, gain, c->m->config.n_embd, c->embd_ld, rest_of(w, p->n),
                  c->m->config.rms_eps);
}

static norm_args norm_arguments(const pass *p, const float *gain, const matrix &w) {
    const norm_args a = {p->c->x, p->c->embd_ld, gain, w.bounds, p->c->m->config.rms_eps, p->c->ff_scale};
    return a;
}

static cudaError_t launch_wide_norm(const pass *p, const norm_args &a) {
    const cuda_ctx *c = p->c;
    const int width = c->m->config.n_embd;
    norm_shape s = rmsnorm_shape(width / 4, false, p->n);
    s.lanes = round_up(s.lanes, 32);
    s.together = p->n > 512 && s.lanes == 32 ? 8 : 1;
#define QWEN3_SHAPE(K) case K: return launch_early(p->early, p->s, grid1(ceil_div(p->n, s.together)), s.lanes * s.together, \
                                                   0, wide_norm_kernel<K>, c->wide_act, c->act_scale, a, p->n, width, s.lanes)
    switch (s.k) { QWEN3_SHAPE(1); QWEN3_SHAPE(2); QWEN3_SHAPE(4); QWEN3_SHAPE(8); }
#undef QWEN3_SHAPE
    return cudaErrorInvalidValue;       /* no model that is wide has such rows */
}

/* Will the product with w do the norm of its input, which each of its blocks holds, itself? */
static bool norms_itself(const pass *p, const matrix &w) {
    if (p->how == FEW) return few_norms_itself(p, w);
    return p->how == MATVEC && w.cols % 4 == 0 && w.cols <= STREAM_NORM * 4 * 32 * MATVEC_WARPS &&
           stream_ring(p, vector_input(p, w, p->c->x, p->c->embd_ld, p->n), w) > 0;
}

static qwen3_result norm(pass *p, const float *gain, const matrix &w) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    p->gain = p->layers && norms_itself(p, w) ? gain : NULL;
    if (p->gain) return QWEN3_OK;
    if (p->how == WIDE || p->how == FEW)
        return launched(p, launch_wide_norm(p, norm_arguments(p, gain, w)), "wide_norm");
    if (p->how == GEMM) {
#define CALL(T) launch_add_rmsnorm<T>(p, gain, w)
        TRY(launched(p, BY_WEIGHT_TYPE(w, CALL), "add_rmsnorm"));
#undef CALL
        p->pending = false;
        return QWEN3_OK;
    }
    TRY(launched(p, launch_rmsnorm(p->early, p->s, c->h, c->embd_ld, c->x, c->embd_ld, NULL, gain,
                                          p->n, 1, g->n_embd, c->embd_ld, g->rms_eps), "rmsnorm"));
    return p->how == STANDARD ? round_rows(p, w, c->h, c->embd_ld, p->n) : QWEN3_OK;
}

/* ---- the same products on Hopper ------------------------------------------------------------------------ */
template <int KIND, class T, int M, int R>
static qwen3_result launch_few_product(const pass *p, const stored_map &in, const matrix &w, wide_args a, few_plan plan) {
    a.parts = plan.parts;
    a.stages = few_stages<M, R>(plan.steps);
    return launched(p, launch_clusters(p->early, a.parts, p->s, grid1(a.n_tiles * a.parts), FEW_THREADS,
                                       few_product_shared<M, R>(a.stages), few_product_kernel<KIND, T, M, R>, get_map(in),
                                       get_map(w.map), a), "few_product");
}

template <int KIND, class T, int R>
static qwen3_result few_product(const pass *p, const stored_map &in, const matrix &w, wide_args a) {
    few_plan plan = {0, 0, 0, 0};
    plan = few_better(p, a, WIDE_M, R, plan);
    if constexpr (KIND == WIDE_ADD) {
        plan = few_better(p, a, WIDE_M / 2, R, plan);
        if (plan.m == WIDE_M / 2) {
            a.n_tiles *= 2;
            a.step /= 2;
            return launch_few_product<KIND, T, WIDE_M / 2, R>(p, in, w, a, plan);
        }
    }
    return launch_few_product<KIND, T, WIDE_M, R>(p, in, w, a, plan);
}

static int wide_pairs(const pass *p) { return ceil_div(p->n, 2 * WIDE_M); }

template <int KIND, class T, int N, int P>
static qwen3_result launch_wide_product(const pass *p, const stored_map &in, const stored_map &w, const wide_args &a) {
    const int clusters = least(wide_pairs(p) * (a.n_tiles - a.whole), p->c->m->n_sm / 2);
    return launched(p, launch_clusters(p->early, WIDE_CLUSTER, p->s, grid1(2 * clusters), WIDE_THREADS,
                                       wide_product_shared<N, P>(), wide_product_kernel<KIND, T, N, P>, get_map(in),
                                       get_map(w), a), "wide_product");
}

/* How long the busiest cluster works on so many columns of parts, of which the first go in `whole` tiles of two: in the time
   of one part. Two take 1.8 (measured). */
static float wide_time(const pass *p, int columns, int whole) {
    const int clusters = p->c->m->n_sm / 2, pairs = wide_pairs(p);
    return (float)ceil_div(pairs * (columns - whole), clusters) + 0.8f * (float)ceil_div(pairs * whole, clusters);
}

/* The fastest number of tiles of two: none, all, or as many as keep all clusters busy. */
static int wide_whole(const pass *p, int columns) {
    const int all = columns / 2, fill = p->c->m->n_sm / 2, turns = wide_pairs(p) * all / fill * fill / wide_pairs(p);
    const int best = wide_time(p, columns, turns) < wide_time(p, columns, all) ? turns : all;
    return wide_time(p, columns, best) < wide_time(p, columns, 0) ? best : 0;
}

/* in: the map for many rows, or for few */
template <int KIND, class T>
static qwen3_result wide_product(const pass *p, const stored_map &in, const matrix &w, wide_args a) {
    if (p->how == FEW) return p->n <= 32 ? few_product<KIND, T, 32>(p, in, w, a) : few_product<KIND, T, 64>(p, in, w, a);
    a.whole = wide_whole(p, a.n_tiles);
    return a.whole > 0 ? launch_wide_product<KIND, T, WIDE_N, 2>(p, in, w.map, a)
                       : launch_wide_product<KIND, T, WIDE_N, 1>(p, in, w.map, a);
}

/* x += W in, in the tiles that are done first: 2,560 columns of 2,048 rows are 2.4 turns of 128, but 1.9 of 160. */
static qwen3_result wide_add(const pass *p, const stored_map &in, const matrix &w, wide_args a) {
    const float more = (float)WIDE_N_MORE / WIDE_N * wide_time(p, w.rows / WIDE_N_MORE, 0);
    a.x = p->c->x;
    a.ldx = p->c->embd_ld;
    if (p->how == FEW || w.rows % WIDE_N_MORE || wide_time(p, a.n_tiles, wide_whole(p, a.n_tiles)) <= more)
        return wide_product<WIDE_ADD, half_t>(p, in, w, a);
    a.n_tiles = w.rows / WIDE_N_MORE;
    a.step = WIDE_N_MORE;
    a.half = WIDE_N_MORE / 2;
    return launch_wide_product<WIDE_ADD, half_t, WIDE_N_MORE, 1>(p, in, w.map_more, a);
}

static const stored_map &wide_map(const pass *p, const stored_map &wide, const stored_map &few) {
    return p->how == FEW ? few : wide;
}

/* x += W a, of what attention gives */
static qwen3_result wide_o_proj(const pass *p, const matrix &w) {
    cuda_ctx *c = p->c;
    const bool as_it_is = gives_halves(p);
    if (!as_it_is)
        TRY(launched(p, launch_early(p->early, p->s, grid1(p->n), row_threads(w.ld, 4, p->n), 0,
                                     round_rows_kernel<half_t>, c->wide_act, c->act_scale, (const float *)c->attn,
                                     c->q_dim, w.cols, w.ld, (size_t)0), "round_rows"));
    return wide_add(p, wide_map(p, c->wide_a_map, c->few_a_map), w,
                    wide_arguments(p, w, as_it_is ? NULL : c->act_scale));
}

/* x += W m */
static qwen3_result wide_down(const pass *p, const matrix &w) {
    cuda_ctx *c = p->c;
    return wide_add(p, wide_map(p, c->wide_m_map, c->few_m_map), w, wide_arguments(p, w, c->ff_scale));
}

/* The norm that the product is to do itself, if it is. */
static void set_norm(const pass *p, const matrix &w, wide_args *a) {
    if (!p->gain) return;
    a->norm = norm_arguments(p, p->gain, w);
    a->in_scale = a->out_scale = NULL;
}

static qwen3_result wide_qkv(const pass *p, const matrix &w, const qkv_args &qkv) {
    cuda_ctx *c = p->c;
    wide_args a = wide_arguments(p, w, c->act_scale);
    a.out = halves(p) ? c->wide_q : NULL;
    a.ldo = c->q_dim;
    a.qkv = qkv;
    set_norm(p, w, &a);
#define CALL(T) wide_product<WIDE_QKV, T>(p, wide_map(p, c->wide_h_map, c->few_h_map), w, a)
    return BY_KV_TYPE(c, CALL);
#undef CALL
}

static qwen3_result wide_swiglu(const pass *p, const matrix &w) {
    cuda_ctx *c = p->c;
    const int n_ff = c->m->config.n_ff;
    wide_args a = wide_arguments(p, w, c->act_scale);
    a.step = WIDE_N / 2;
    a.half = n_ff;
    a.out = c->wide_m;
    a.ldo = n_ff;
    a.out_scale = c->ff_scale;
    set_norm(p, w, &a);
    return wide_product<WIDE_SWIGLU, half_t>(p, wide_map(p, c->wide_h_map, c->few_h_map), w, a);
}

/* y[slot(r), :] = W h[r] for n rows of h; slot as in matvec */
static qwen3_result few_logits(const pass *p, float *y, const row_info *outs, const matrix &w, int n) {
    cuda_ctx *c = p->c;
    wide_args a = wide_arguments(p, w, c->act_scale);
    a.rows = n;
    a.n = w.rows;
    a.n_tiles = ceil_div(w.rows, WIDE_N);
    a.y = y;
    a.ldy = w.rows;
    a.outs = outs;
    TRY(launched(p, launch_early(p->early, p->s, grid1(n), row_threads(w.ld, 4, n), 0, round_rows_kernel<half_t>,
                                 c->wide_act, c->act_scale, (const float *)c->h, c->embd_ld, w.cols, w.ld, (size_t)0),
                 "round_rows"));
    return n <= 32 ? few_product<WIDE_STORE, half_t, 32>(p, c->few_h_map, w, a)
                   : few_product<WIDE_STORE, half_t, 64>(p, c->few_h_map, w, a);
}

static qwen3_result wide_attention(const pass *p, const attention_args &from, int layer) {
    const cuda_ctx *c = p->c;
    wide_attention_args a;
    a.out = c->wide_act;
    a.n_head = from.n_head;
    a.group = c->group;
    a.layer = layer;
    a.max_seqs = c->desc.max_seqs;
    a.scale = from.scale;
    return launched(p, launch_early(p->early, p->s, grid2(from.n_head_kv, p->n_tiles), WIDE_THREADS,
                                    WIDE_ATTENTION_SHARED, wide_attention_kernel, get_map(c->q_map), get_map(c->k_map),
                                    get_map(c->v_map), a, (const attention_tile *)c->tile_list), "wide_attention");
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
    return launch(p->s, grid1(p->n), 256, 0, norm_rope_store_kernel<T>, a, scale);
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
    cudaError_t e =
        launch_rmsnorm(p->early, p->s, q, a.ld, q, a.ld, NULL, a.q_norm, p->n, a.n_head, a.head_dim, 0, a.eps);
    if (e == cudaSuccess)
        e = launch_rmsnorm(p->early, p->s, k, a.ld, k, a.ld, NULL, a.k_norm, p->n, a.n_head_kv, a.head_dim, 0,
                                  a.eps);
    if (e == cudaSuccess)
        e = launch(p->s, grid2(p->n, a.n_head + a.n_head_kv), row_threads(a.head_dim / 2, 1, p->n), 0, rope_kernel, a);
#define CALL(T) kv_store<T>(p, a)
    if (e == cudaSuccess) e = BY_KV_TYPE(c, CALL);
#undef CALL
    return launched(p, e, "q, k and v");
}

static qwen3_result qkv_rope(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].qkv;
    const qkv_args a = qkv_arguments(p, layer);
    cudaError_t e;
    if (p->how == STANDARD) return standard_qkv(p, w, a);
    if (p->how == WIDE || p->how == FEW) return wide_qkv(p, w, a);
    if (p->how == MATVEC) {
        const matvec_in in = normalised_input(p, w);
#define CALL(T) fused_qkv<T>(p, w, in, a)
        e = BY_KV_TYPE(c, CALL);
#undef CALL
    } else {
        TRY(act_product(p, c->qkv, a.ld, w, 0, w.rows));
#define CALL(T) norm_rope_store<T>(p, a, act_scale(p, w))
        e = BY_KV_TYPE(c, CALL);
#undef CALL
    }
    return launched(p, e, "qkv_rope");
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
    a.halves = gives_halves(p) ? c->wide_act : NULL;
    return a;
}

template <class T, int G> static cudaError_t launch_split(const pass *p, const attention_args &a) {
    const int group = a.n_head / a.n_head_kv, splits = attention_splits(p->c, p->n);
    const dim3 grid((unsigned)p->n, (unsigned)(a.n_head_kv * ceil_div(group, G)), (unsigned)splits);
    if (a.head_dim == 128)
        return launch_early(p->early, p->s, grid, 32 * SPLIT_WARPS, 0, attention_split_kernel<T, G, 16>, a);
    return launch_early(p->early, p->s, grid, 32 * SPLIT_WARPS, 0, attention_split_kernel<T, G, 0>, a);
}

/* How attention_decode is launched for rows of n_groups groups of heads: ranks 0: not at all. */
struct decode_shape { int ranks, clusters, n_groups; };

/* Two blocks fit on a multiprocessor, but one each leaves room for the kernels before and after. */
static decode_shape shape_decode(const pass *p, const attention_args &a) {
    const cuda_model *m = p->c->m;
    const bool halves = p->c->desc.kv_type != QWEN3_KV_F32, clusters = m->capability >= 90;
    decode_shape s = {0, 1, a.n_head_kv * ceil_div(a.n_head / a.n_head_kv, DECODE_HEADS)};
    if (!halves || a.head_dim != DECODE_DIM || m->capability < 80 || sizeof(decode_shared) > m->block_shared) return s;
    s.ranks = 1;
    while (clusters && s.ranks < DECODE_RANKS && 2 * s.ranks * s.n_groups * p->n <= 2 * m->n_sm) s.ranks *= 2;
    s.clusters = least(most(m->n_sm / (s.ranks * s.n_groups * p->n), 1), DECODE_CLUSTERS);
    return s;
}
template <class T, int TERMS>
static cudaError_t launch_decode(const pass *p, attention_args a, const decode_shape &s) {
    const dim3 grid((unsigned)(s.clusters * s.ranks), (unsigned)s.n_groups, (unsigned)p->n);
    a.ranks = s.ranks;
    return launch_shared(p, s.ranks, grid, 32 * DECODE_WARPS, sizeof(decode_shared), attention_decode_kernel<T, TERMS>, a);
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
    return c->desc.kv_type == QWEN3_KV_BF16 ? tile_kernel_of<bf16_t, 3>(c->m->config.head_dim)
                                            : tile_kernel_of<half_t, 2>(c->m->config.head_dim);
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
    if (halves(p)) return wide_attention(p, a, layer);
    if (p->n_tiles > 0) {
        const tile_kernel k = choose_tile_kernel(c);
        e = launch(p->s, grid2(p->n_tiles, a.n_head_kv), 128, k.shared, k.kernel, a,
                   (const attention_tile *)c->tile_list);
    } else {
        const decode_shape s = shape_decode(p, a);
#define CALL(T) attention_split<T>(p, a)
        e = s.ranks == 0 ? BY_KV_TYPE(c, CALL) :
            c->desc.kv_type == QWEN3_KV_BF16 ? launch_decode<bf16_t, 3>(p, a, s) : launch_decode<half_t, 2>(p, a, s);
#undef CALL
    }
    return launched(p, e, "attention");
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
    if (p->how == WIDE || p->how == FEW) return wide_o_proj(p, w);
    TRY(round_rows(p, w, c->attn, c->q_dim, p->n));
    return product_to_add(p, w);
}

/* ---- m = silu(Wgate h) * (Wup h), as the input of Wdown ------------------------------------------------------- */
template <class O>
static cudaError_t launch_swiglu(const pass *p, O *out, const matrix &gate_up, size_t rest) {
    cuda_ctx *c = p->c;
    const int n_ff = c->m->config.n_ff, want = round_up(ceil_div(n_ff, 16), 32), threads = want > 1024 ? 1024 : want;
    const float *in = c->gate_up, *scale = act_scale(p, gate_up);
    if (n_ff % 4 == 0)
        return launch(p->s, grid1(p->n), threads, 0, swiglu_kernel<O, 4>, out, c->act_scale, in, scale, n_ff,
                      2 * c->ff_ld, c->ff_ld, rest);
    return launch(p->s, grid1(p->n), threads, 0, swiglu_kernel<O, 1>, out, c->act_scale, in, scale, n_ff, 2 * c->ff_ld,
                  c->ff_ld, rest);
}

static qwen3_result standard_mlp(const pass *p, const matrix &w, const matrix &down) {
    cuda_ctx *c = p->c;
    const int n_ff = c->m->config.n_ff, ld = 2 * c->ff_ld;
    TRY(act_product(p, c->gate_up, ld, w, 0, n_ff));
    TRY(act_product(p, c->gate_up + n_ff, ld, w, n_ff, n_ff));
    TRY(launched(p, launch_swiglu<float>(p, c->ff, w, 0), "swiglu"));
    return round_rows(p, down, c->ff, c->ff_ld, p->n);
}

static qwen3_result mlp(const pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].gate_up, &down = c->m->layers[layer].w_down;
    if (p->how == STANDARD) return standard_mlp(p, w, down);
    if (p->how == WIDE || p->how == FEW) return wide_swiglu(p, w);
    if (p->how == MATVEC) {
        const matvec_in in = normalised_input(p, w);
        const int ring = stream_ring(p, in, w);
#define CALL(RING) stream_mlp<RING>(p, in, c->ff)
        if (ring) return launched(p, BY_RING(ring, CALL), "mlp");
#undef CALL
#define CALL(T) mlp_rows_of<T>(p, in, c->ff, c->ff_ld)
        return launched(p, BY_WEIGHT_TYPE(w, CALL), "mlp");
#undef CALL
    }
    TRY(act_product(p, c->gate_up, 2 * c->ff_ld, w, 0, w.rows));
#define CALL(T) launch_swiglu<T>(p, (T *)c->act, w, rest_of(down, p->n))
    return launched(p, BY_WEIGHT_TYPE(down, CALL), "swiglu");
#undef CALL
}

static qwen3_result down_proj(pass *p, int layer) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].w_down;
    if (p->how == MATVEC) return matvec<true>(p, c->x, c->embd_ld, NULL, w, c->ff, c->ff_ld, p->n);
    if (p->how == WIDE || p->how == FEW) return wide_down(p, w);
    return product_to_add(p, w);
}

/* ---- the last layer's rows of which nothing is wanted leave it after its attention ------------------------------ */
template <class O, class T> static cudaError_t launch_keep_wanted(const pass *p, O *to, const T *from) {
    cuda_ctx *c = p->c;
    return launch_early(p->early, p->s, grid1(ceil_div((c->embd_ld + c->q_dim) / 4, 64)), 64, 0,
                        keep_wanted_kernel<O, T>, c->x, c->embd_ld, to, from, c->q_dim, (const row_info *)c->rows,
                        p->n_outs);
}

static qwen3_result keep_wanted(pass *p) {
    cuda_ctx *c = p->c;
    pass kept = make_pass(c, p->s, p->n_outs, p->n_tiles, p->err);
    if (p->n_outs == p->n) return QWEN3_OK;
    kept.only_wanted = true;
    TRY(launched(p, !gives_halves(p)      ? launch_keep_wanted(p, c->attn, (const float *)c->attn)
                    : gives_halves(&kept) ? launch_keep_wanted(p, c->wide_act, (const half_t *)c->wide_act)
                                          : launch_keep_wanted(p, c->attn, (const half_t *)c->wide_act), "keep_wanted"));
    *p = kept;
    return QWEN3_OK;
}

/* ---- one decoder layer: x in place; the last one keeps only the rows that are wanted --------------------------- */
static qwen3_result decoder_layer(pass *p, int layer) {
    const layer_weights *w = &p->c->m->layers[layer];
    const bool last = layer == p->c->m->config.n_layer - 1;
    TRY(norm(p, w->attn_norm, w->qkv));             /* h = RMSNorm(x)                                    */
    TRY(qkv_rope(p, layer));                        /* q, k, v = W h; q, k = RoPE(RMSNorm(q, k)); cache  */
    if (last && p->n_outs == 0) return QWEN3_OK;
    TRY(attention(p, layer));                       /* a = softmax(q k / sqrt(d)) v                      */
    if (last) TRY(keep_wanted(p));
    TRY(o_proj(p, layer));                          /* x = x + Wo a                                      */
    TRY(norm(p, w->mlp_norm, w->gate_up));          /* h = RMSNorm(x)                                    */
    TRY(mlp(p, layer));                             /* m = silu(Wgate h) * (Wup h)                       */
    return down_proj(p, layer);                     /* x = x + Wdown m                                   */
}

static int cancelled(const cuda_ctx *c) { return c->desc.cancel && c->desc.cancel(c->desc.cancel_user); }

static qwen3_result all_layers(pass *p, bool may_cancel) {
    p->layers = true;
    TRY(embed(p));
    for (int i = 0; i < p->c->m->config.n_layer; i++) {
        if (may_cancel && cancelled(p->c)) return qwen3i_fail(p->err, QWEN3_STOPPED, "cancelled");
        TRY(decoder_layer(p, i));
    }
    return add_pending(p);
}

/* ---- final norm and logits of `n` wanted rows from `first` on ------------------------------------ */
/* h = RMSNorm(x[out_row]) */
static qwen3_result head_norm(const pass *p, int first, int n) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const float *x = c->x + (p->only_wanted ? (size_t)first * c->embd_ld : 0);
    const row_info *outs = p->only_wanted ? NULL : c->rows + first;
    const cudaError_t e = launch_rmsnorm(p->early, p->s, c->h, c->embd_ld, x, c->embd_ld, outs, c->m->final_norm, n, 1,
                                         g->n_embd, c->embd_ld, g->rms_eps);
    return launched(p, e, "rmsnorm");
}

/* Logits of h to c->logits or, with keep_only, straight to where they are kept. */
static qwen3_result head_logits(const pass *p, int first, int n, bool keep_only) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->head;
    const int vocab = c->m->config.n_vocab;
    const float *scale = NULL;
    if (n <= matvec_rows(c) && p->how != STANDARD)
        TRY(matvec<false>(p, keep_only ? c->kept : c->logits, vocab, keep_only ? c->rows + first : NULL, w, c->h,
                          c->embd_ld, n));
    else if (c->wide) {
        TRY(few_logits(p, keep_only ? c->kept : c->logits, keep_only ? c->rows + first : NULL, w, n));
        if (keep_only) return QWEN3_OK;
    } else {
        TRY(round_rows(p, w, c->h, c->embd_ld, n));
        TRY(product(c, p->s, c->logits, vocab, w, 0, w.rows, c->act, n, p->err));
        scale = act_scale(p, w);
        if (scale && !keep_only) RUN(grid1(n), 1024, 0, scale_rows_kernel, c->logits, scale, vocab, vocab);
    }
    if (keep_only && n <= matvec_rows(c) && p->how != STANDARD) return QWEN3_OK;
    RUN(grid2(32, n), 256, 0, keep_logits_kernel, c->kept, (const float *)c->logits, keep_only ? scale : NULL,
        (const row_info *)c->rows + first, vocab);
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
    const int most_tokens = (c->wide_kv && goes_wide(c, b->n_rows) ? WIDE_POS : TILE_ROWS) / c->group;
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

/* Where in c->kept a sequence's logits are, and will be `ahead` steps later. */
static int kept_slot(const cuda_ctx *c, int seq, int ahead) { return KEPT * seq + (c->current[seq] + ahead) % KEPT; }
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
    *n_tiles = c->tiles && b->n_rows > MATVEC_ROWS && (!one_row_each(b) || b->n_rows > c->narrow_rows)
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
template <class F> static qwen3_result capture(cuda_ctx *c, cudaGraphExec_t *out, F enqueue, const qwen3i_err *err) {
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
    if (!c->graphs[n]) TRY(capture(c, &c->graphs[n], [&] { return enqueue_step(c, c->capture, n, err); }, err));
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
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].hidden, c->h + i * c->embd_ld, embd * sizeof(float),
                                     cudaMemcpyDeviceToHost, p->s));
    if (any) TRY(head_logits(p, first, n, !more));
    for (int i = 0; i < n; i++)
        if (outs[first + i].logits)
            CUDA_TRY(cudaMemcpyAsync(outs[first + i].logits, c->logits + i * vocab, vocab * sizeof(float),
                                     cudaMemcpyDeviceToHost, p->s));
    if (!probs) return QWEN3_OK;
    RUN(grid1(n), 1024, 0, logprob_kernel, c->logprobs, (const float *)c->logits, (const row_info *)c->rows + first,
        (int)vocab);
    for (int i = 0; i < n; i++)
        if (outs[first + i].logprob)
            CUDA_TRY(
                cudaMemcpyAsync(outs[first + i].logprob, c->logprobs + i, sizeof(float), cudaMemcpyDeviceToHost, p->s));
    return QWEN3_OK;
}

/* Wait for all that was enqueued, asking the cancel hook meanwhile. */
static qwen3_result wait(cuda_ctx *c, const qwen3i_err *err) {
    cudaEvent_t done = c->uploaded[(c->turn + RING - 1) % RING]; /* of the upload before, which is over by then */
    cudaError_t e;
    CUDA_TRY(cudaEventRecord(done, c->stream));
    while (c->desc.cancel && (e = cudaEventQuery(done)) != cudaSuccess) {
        if (e != cudaErrorNotReady) return cuda_fail(err, e, "evaluating");
        if (cancelled(c)) { CUDA_TRY(cudaEventSynchronize(done)); return qwen3i_fail(err, QWEN3_STOPPED, "cancelled"); }
    }
    CUDA_TRY(cudaEventSynchronize(done));
    return QWEN3_OK;
}

static qwen3_result run_batch(cuda_ctx *c, const qwen3i_batch *b, int n_tiles, const qwen3i_err *err) {
    pass p = make_pass(c, c->stream, b->n_rows, n_tiles, err);
    p.n_outs = b->n_outs;
    TRY(all_layers(&p, true));
    for (int i = 0; i < b->n_outs; i += head_rows(c)) {
        if (i > 0 && cancelled(c)) return qwen3i_fail(err, QWEN3_STOPPED, "cancelled");
        TRY(deliver(&p, b->outs, i, least(head_rows(c), b->n_outs - i)));
    }
    return wait(c, err);
}

static qwen3_result forward(void *ctx_state, const qwen3i_batch *b, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    int n_tiles;
    CUDA_TRY(guard.status);
    if (cancelled(c)) return qwen3i_fail(err, QWEN3_STOPPED, "cancelled");
    c->ahead.n = 0;
    qwen3_result r = upload_batch(c, b, &n_tiles, err);
    if (r == QWEN3_OK) r = is_step(c, b) ? run_step(c, b->n_rows, err) : run_batch(c, b, n_tiles, err);
    if (r != QWEN3_OK) { cudaStreamSynchronize(c->stream); return r; }     /* no copy to the caller is under way any more */
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

/* How item i is to choose, `ahead` (0 or 1) steps after what it holds. Returns 0 if the lists do not fit. */
static int make_choice(const cuda_ctx *c, const qwen3i_next *item, int ahead, upload_slot *slot, choice *out,
                       int *n_lists) {
    const qwen3_sampler *s = item->sampler;
    const int length = item->n + ahead;
    memset(out, 0, sizeof *out);
    out->slot = kept_slot(c, item->seq, ahead);
    out->list_at = *n_lists;
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
    out->adjust = out->n_bias + out->n_seen + out->chain > 0;
    return 1;
}

/* Enqueue the choice of a token for n sequences. What a slot holds of it is read where it is, in host memory. */
static qwen3_result enqueue_choices(cuda_ctx *c, int n, bool adjust, const upload_slot *slot, const qwen3i_err *err) {
    const int vocab = c->m->config.n_vocab, group = choice_rows(c);
    const size_t seen = (size_t)ceil_div(vocab, 32) * 4;
    const bool early = c->m->capability >= 90;
    for (int i = 0; i < n; i += group) {
        const int count = least(group, n - i);
        const choice *choices = slot->choices + i;
        const row_info *steps = slot->rows + i;
        const float *kept = c->kept, *copy = c->logits;
        if (adjust) {
            CUDA_TRY(
                launch(c->stream, grid2(CHUNKS, count), 256, 0, copy_logits_kernel, c->logits, kept, choices, vocab));
            CUDA_TRY(launch(c->stream, grid1(count), 1024, seen, adjust_kernel, c->logits, choices,
                            (const listed *)c->lists, (const int *)c->chosen + i, vocab));
        }
        CUDA_TRY(launch_early(early, c->stream, grid2(CHUNKS, count), CHUNK_THREADS, 0, best_kernel, c->best + i,
                              c->listed_keys, kept, copy, choices, vocab, c->n_choose));
        CUDA_TRY(launch_early(early, c->stream, grid1(count), CHOOSE_THREADS, sizeof(choose_shared), choose_kernel,
                              c->rows + i, steps, c->chosen + i, slot->report + i, c->best + i,
                              (const candidates *)c->listed_keys, kept, copy, choices, vocab, c->n_choose));
    }
    return QWEN3_OK;
}

/* Enqueue a step of n sequences: choose from the logits kept after what they hold (and, ahead, the token chosen
   before), report, evaluate, keep the new logits. UNSUPPORTED: nothing was done. */
static qwen3_result begin_step(cuda_ctx *c, const qwen3i_next *items, int n, int ahead, int *slot_at,
                               const qwen3i_err *err) {
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
        r->out_slot = kept_slot(c, items[i].seq, ahead + 1);
        r->out_target = -1;
    }
    if (adjust && ceil_div(c->m->config.n_vocab, 32) * 4 > 48 * 1024) return QWEN3_ERR_UNSUPPORTED;
    CUDA_TRY(send(c, c->lists, slot->lists, n_lists));
    TRY(enqueue_choices(c, n, adjust, slot, err));
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
        if (a->seqs[i] != items[i].seq || a->lengths[i] != items[i].n ||
            a->last[i] != items[i].tokens[items[i].n - 1] || memcmp(&s, &a->samplers[i], sizeof s) != 0 ||
            a->bias_hashes[i] != bias_hash(items[i].sampler))
            return false;
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
static qwen3_result take_choices(cuda_ctx *c, qwen3i_next *items, int n, const int *report, const qwen3i_err *err) {
    for (int i = 0; i < n; i++) {
        if (report[i] >= 0) continue;
        c->ahead.n = 0;
        return qwen3i_fail(err, QWEN3_ERR_ARG, "every token is banned by bias, or the logits are not numbers");
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

static qwen3_result next(void *ctx_state, qwen3i_next *items, int n, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    int slot = c->ahead.slot;
    CUDA_TRY(guard.status);
    if (cancelled(c)) return qwen3i_fail(err, QWEN3_STOPPED, "cancelled");
    qwen3_result r = QWEN3_OK;
    if (!ahead_fits(c, items, n)) {
        c->ahead.n = 0;
        r = begin_step(c, items, n, 0, &slot, err);
    }
    if (r == QWEN3_OK) r = begin_ahead(c, items, n, err);
    if (r != QWEN3_OK) { cudaStreamSynchronize(c->stream); return r; }     /* what the slot holds is read no more */
    CUDA_TRY(cudaEventSynchronize(c->reported[slot]));
    return take_choices(c, items, n, c->slots[slot].report, err);
}

/* ================================================================================================
   THE REST OF THE BACKEND
   ================================================================================================ */
static float *kept_logits(const cuda_ctx *c, int seq) {
    return c->kept + (size_t)kept_slot(c, seq, 0) * c->m->config.n_vocab;
}

/* Waits for copies from or to the caller, also if one of them could not be enqueued (e). */
static qwen3_result finish_copies(const cuda_ctx *c, cudaError_t e, const qwen3i_err *err) {
    const cudaError_t done = cudaStreamSynchronize(c->stream);
    if (e == cudaSuccess) e = done;
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(err, e, "a copy");
}

static qwen3_result logits(void *ctx_state, int seq, const float **out, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    *out = c->host_logits;
    return finish_copies(c, cudaMemcpyAsync(c->host_logits, kept_logits(c, seq),
                                            (size_t)c->m->config.n_vocab * sizeof(float), cudaMemcpyDeviceToHost,
                                            c->stream), err);
}

static qwen3_result set_logits(void *ctx_state, int seq, const float *from, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    c->ahead.n = 0;
    return finish_copies(c, cudaMemcpyAsync(kept_logits(c, seq), from, (size_t)c->m->config.n_vocab * sizeof(float),
                                            cudaMemcpyHostToDevice, c->stream), err);
}

static size_t kv_row_bytes(const cuda_ctx *c) { return (size_t)c->kv_dim * qwen3i_type_size((qwen3i_type)c->desc.kv_type); }

/* The byte in c->k or c->v where a sequence's positions begin. */
static size_t kv_begin(const cuda_ctx *c, int seq, int layer) {
    return (size_t)layer * c->kv_layer_bytes + (size_t)seq * c->desc.max_ctx * kv_row_bytes(c);
}

static qwen3_result seq_copy(void *ctx_state, int dst, int src, int n_pos, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const size_t bytes = (size_t)n_pos * kv_row_bytes(c), pitch = c->kv_layer_bytes,
                 layers = (size_t)c->m->config.n_layer;
    CUDA_TRY(guard.status);
    if (dst == src) return QWEN3_OK;
    c->ahead.n = 0;
    if (bytes > 0) {
        CUDA_TRY(cudaMemcpy2DAsync(c->k + kv_begin(c, dst, 0), pitch, c->k + kv_begin(c, src, 0), pitch, bytes, layers,
                                   cudaMemcpyDeviceToDevice, c->stream));
        CUDA_TRY(cudaMemcpy2DAsync(c->v + kv_begin(c, dst, 0), pitch, c->v + kv_begin(c, src, 0), pitch, bytes, layers,
                                   cudaMemcpyDeviceToDevice, c->stream));
    }
    CUDA_TRY(cudaMemcpyAsync(kept_logits(c, dst), kept_logits(c, src), (size_t)c->m->config.n_vocab * sizeof(float),
                             cudaMemcpyDeviceToDevice, c->stream));
    return QWEN3_OK;
}

static qwen3_result kv_read(void *ctx_state, int seq, int layer, int n_pos, void *k, void *v, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const size_t bytes = (size_t)n_pos * kv_row_bytes(c), at = kv_begin(c, seq, layer);
    CUDA_TRY(guard.status);
    if (bytes == 0) return QWEN3_OK;
    cudaError_t e = cudaMemcpyAsync(k, c->k + at, bytes, cudaMemcpyDeviceToHost, c->stream);
    if (e == cudaSuccess) e = cudaMemcpyAsync(v, c->v + at, bytes, cudaMemcpyDeviceToHost, c->stream);
    return finish_copies(c, e, err);
}

static qwen3_result kv_write(void *ctx_state, int seq, int layer, int n_pos, const void *k, const void *v,
                             const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const size_t bytes = (size_t)n_pos * kv_row_bytes(c), at = kv_begin(c, seq, layer);
    CUDA_TRY(guard.status);
    c->ahead.n = 0;
    if (bytes == 0) return QWEN3_OK;
    cudaError_t e = cudaMemcpyAsync(c->k + at, k, bytes, cudaMemcpyHostToDevice, c->stream);
    if (e == cudaSuccess) e = cudaMemcpyAsync(c->v + at, v, bytes, cudaMemcpyHostToDevice, c->stream);
    return finish_copies(c, e, err);
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
