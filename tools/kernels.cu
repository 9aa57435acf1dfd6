/* kernels.cu - the kernels of qwen3_cuda.cu one by one on other people's data, for comparisons. No part of the library.

   As a shared library (make build/libqwen3_kernels.so) for tools/compare_torch.py and tools/sweep_rmsnorm.py; linked
   with bench.c (make build/bench_fused) for `bench --fused-baseline`. Without a GPU, for the errors alone:

       g++ -O2 -std=c++17 -x c++ -Itests/cuda_on_cpu -I. -c tools/kernels.cu -o build/kernels.o
       cc -O2 -DQWEN3_WITH_FUSED_BASELINE bench.c build/kernels.o -o build/bench_fused -lstdc++ -lm -lpthread

   All functions return NULL or an error's text. */
#include "../tests/cuda_lab.cu"

#include <algorithm>
#include <vector>

namespace {

char lab_text[512];                     /* where errors are written */
const qwen3i_err lab_err = {lab_text, sizeof lab_text};

const char *lab_failed(qwen3_result r) { return r == QWEN3_OK ? NULL : lab_text; }

/* ================================================================================================
   RMSNORM on device memory
   ================================================================================================ */
template <class T> cudaError_t rmsnorm_as(cudaStream_t s, T *y, const T *x, const float *gain, int rows, int width,
                                          float eps, norm_shape shape) {
    if (shape.lanes == 0) return launch_rmsnorm(false, s, y, width, x, width, NULL, gain, rows, 1, width, 0, eps);
#define QWEN3_SHAPE(K) case K: return launch_rmsnorm_shape<T, T, K>(false, s, shape, y, width, x, width, NULL, gain, \
                                                                    rows, 1, width, 0, eps)
    switch (shape.k) { QWEN3_SHAPE(1); QWEN3_SHAPE(2); QWEN3_SHAPE(4); QWEN3_SHAPE(8); }
#undef QWEN3_SHAPE
    return cudaErrorInvalidValue;
}

} /* namespace */

/* y = rmsnorm(x) on a stream: x, y [rows, width] of one type (1 F32, 2 F16, 3 BF16), gain [width] float32. lanes 0: as
   the library launches it; else so many threads a row with k vectors each, and `together` rows a block. */
extern "C" const char *lab_rmsnorm(void *stream, void *y, const void *x, const float *gain, int type, int rows,
                                   int width, float eps, int k, int lanes, int together) {
    const norm_shape shape = {k, lanes, together};
    const cudaStream_t s = (cudaStream_t)stream;
    const cudaError_t e =
        type == QWEN3I_F32   ? rmsnorm_as(s, (float *)y, (const float *)x, gain, rows, width, eps, shape)
        : type == QWEN3I_F16 ? rmsnorm_as(s, (half_t *)y, (const half_t *)x, gain, rows, width, eps, shape)
                             : rmsnorm_as(s, (bf16_t *)y, (const bf16_t *)x, gain, rows, width, eps, shape);
    return e == cudaSuccess ? NULL : cudaGetErrorString(e);
}

/* ================================================================================================
   A MODEL layer by layer
   ================================================================================================ */
struct lab_model { qwen3_model *model; void *state, *ctx; int rows; };

extern "C" void lab_close(lab_model *l) {
    if (l->ctx) free_ctx(l->ctx);
    if (l->state) free_model(l->state);
    qwen3_free(l->model);
    delete l;
}

/* Load a model directory; evaluate `rows` tokens at most. kv: QWEN3_KV_*. NULL on failure: see lab_error(). */
extern "C" lab_model *lab_open(const char *path, int rows, int kv) {
    static qwen3_load_desc load;
    static const qwen3_ctx_desc zero = qwen3_ctx_desc();
    lab_model *l = new lab_model();
    qwen3_ctx_desc desc = zero;
    load.path = path;
    desc.max_ctx = desc.prefill_chunk = rows;
    desc.max_seqs = 1;
    desc.kv_type = kv;
    qwen3_result r = qwen3_load(&l->model, &load, lab_text, sizeof lab_text);
    if (r == QWEN3_OK) r = create_model(&l->state, l->model, &load, &lab_err);
    if (r == QWEN3_OK) r = create_ctx(&l->ctx, l->state, l->model, &desc, &lab_err);
    if (r == QWEN3_OK) return l;
    lab_close(l);
    return NULL;
}

extern "C" const char *lab_error() { return lab_text; }

namespace {

qwen3_result lab_begin(lab_model *l, const int *tokens, int n) {
    std::vector<int32_t> seqs((size_t)n, 0), positions((size_t)n);
    qwen3i_batch b = qwen3i_batch();
    for (int i = 0; i < n; i++) positions[(size_t)i] = i;
    b.tokens = tokens; b.seqs = seqs.data(); b.positions = positions.data(); b.n_rows = n;
    l->rows = n;
    return lab_set_rows(l->ctx, &b, &lab_err);
}

qwen3_result lab_states(lab_model *l, float *states) {
    cuda_ctx *c = (cuda_ctx *)l->ctx;
    const size_t size = (size_t)l->rows * c->m->config.n_embd;
    pass p = make_pass(c, c->stream, l->rows, lab_batch.tiles, &lab_err);
    TRY(embed(&p));
    for (int i = 0; i < c->m->config.n_layer; i++) {
        TRY(lab_get(c, LAB_X, states + (size_t)i * size, &lab_err));
        TRY(decoder_layer(&p, i));
    }
    return lab_get(c, LAB_X, states + (size_t)c->m->config.n_layer * size, &lab_err);
}

qwen3_result lab_kv(cuda_ctx *c, int layer, int n, float *k, float *v) {
    std::vector<char> raw_k((size_t)n * kv_row_bytes(c)), raw_v(raw_k.size());
    const qwen3i_type type = (qwen3i_type)c->desc.kv_type;
    TRY(kv_read(c, 0, layer, n, raw_k.data(), raw_v.data(), &lab_err));
    for (size_t i = 0; i < (size_t)n * c->kv_dim; i++) {
        k[i] = qwen3i_value(raw_k.data(), type, (int)i);
        v[i] = qwen3i_value(raw_v.data(), type, (int)i);
    }
    return QWEN3_OK;
}

qwen3_result lab_parts(lab_model *l, int layer, const float *x, float *q, float *k, float *v, float *a,
                       float *product, float *out) {
    cuda_ctx *c = (cuda_ctx *)l->ctx;
    pass p = make_pass(c, c->stream, l->rows, lab_batch.tiles, &lab_err);
    TRY(lab_put(c, LAB_X, x, &lab_err));
    TRY(lab_one(&p, LAB_NORM_QKV, layer));
    TRY(lab_get(c, LAB_Q, q, &lab_err));
    TRY(lab_kv(c, layer, l->rows, k, v));
    TRY(lab_one(&p, LAB_ATTENTION, layer));
    TRY(lab_get(c, LAB_A, a, &lab_err));
    TRY(lab_one(&p, LAB_O_PROJ, layer));
    TRY(lab_one(&p, LAB_NORM_MLP, layer));
    TRY(lab_get(c, LAB_M, product, &lab_err));
    TRY(lab_one(&p, LAB_DOWN, layer));
    return lab_get(c, LAB_X, out, &lab_err);
}

} /* namespace */

/* The residual stream of n tokens, [n_layer + 1, n, n_embd]: the embedding, then after each layer. */
extern "C" const char *lab_forward(lab_model *l, const int *tokens, int n, float *states) {
    qwen3_result r = lab_begin(l, tokens, n);
    if (r == QWEN3_OK) r = lab_states(l, states);
    return lab_failed(r);
}

/* One layer on x [n, n_embd]: q [n, q_dim] and k, v [n, kv_dim] as attention gets them, its result a [n, q_dim],
   silu(gate) * up [n, n_ff], and the residual after the layer. Positions 0 to n - 1. */
extern "C" const char *lab_layer(lab_model *l, int layer, int n, const float *x, float *q, float *k, float *v, float *a,
                                 float *product, float *out) {
    std::vector<int> tokens((size_t)n, 0);
    qwen3_result r = lab_begin(l, tokens.data(), n);
    if (r == QWEN3_OK) r = lab_parts(l, layer, x, q, k, v, a, product, out);
    return lab_failed(r);
}

/* Logits [n, n_vocab] of n tokens in one batch. */
extern "C" const char *lab_logits(lab_model *l, const int *tokens, int n, float *logits) {
    const size_t vocab = (size_t)((cuda_ctx *)l->ctx)->m->config.n_vocab;
    std::vector<int32_t> seqs((size_t)n, 0), positions((size_t)n);
    std::vector<qwen3i_out> outs((size_t)n, qwen3i_out());
    qwen3i_batch b = qwen3i_batch();
    for (int i = 0; i < n; i++) {
        positions[(size_t)i] = i;
        outs[(size_t)i].row = i;
        outs[(size_t)i].keep_seq = -1;
        outs[(size_t)i].logits = logits + (size_t)i * vocab;
    }
    b.tokens = tokens; b.seqs = seqs.data(); b.positions = positions.data(); b.n_rows = n;
    b.outs = outs.data(); b.n_outs = n;
    return lab_failed(forward(l->ctx, &b, &lab_err));
}

/* ================================================================================================
   THE FUSED BASELINE: RMSNorm + Q K V (+ norm of heads + RoPE) in one, to compare the separate norm with.

   What fused designs do: the gains are multiplied into the weights beforehand, the raw residual goes into the product,
   and 1 / rms is applied to the result. The sum of squares, too, is found by the kernel that multiplies, from what it
   has in registers or shared memory anyway. Same inner loops as the separate side, same rotation, same cache:

   - 1 row: as stream_qkv_heads and stream_qkv_rope; each warp adds up the squares of x as it multiplies by it.
   - On Hopper 2 to 64 rows as skinny_product, and more as large_product: the multiplying warps read the tiles of x while the
     tensor core works on them. The input is the residual in F16 times a power of two for each row, which the kernel
     before is taken to have written: making it is not timed. (A kernel that writes a tile of a row does not know the
     row's largest element, so this favours the fused side a little.)
   - Elsewhere as vector_product up to 8 rows, then cuBLASLt on the same 16-bit input and a kernel that finds 1 / rms and
     finishes heads.

   The separate side is timed as a step runs it: its kernels for one row norm their input themselves, in float32, before they
   multiply; as "own norm" with a kernel for the norm.
   ================================================================================================ */
namespace {

/* 1 / rms of the rows of x. Where they fit they lie in shared memory already, as stage_x left them for 16-bit W. */
template <int R> __device__ void fused_scales(float (&r)[R], const matvec_in &in, const float4 *xs, float (*part)[R]) {
    const int TILE = MATVEC_TILE / R;
    float sum[R];
#pragma unroll
    for (int i = 0; i < R; i++) sum[i] = 0;
    for (int q = tid(); q < in.k / 4; q += n_threads())
#pragma unroll
        for (int i = 0; i < R; i++) {
            if (i >= in.rows) break;
            const float4 v = in.k <= TILE ? xs[i * (TILE / 4) + q % 2 * (TILE / 8) + q / 2]
                                          : *(const float4 *)(const void *)(in.x + (size_t)i * in.ldx + 4 * q);
            sum[i] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
#pragma unroll
    for (int i = 0; i < R; i++) {
        sum[i] = warp_sum(sum[i]);
        if (lane_id() == 0) part[warp_id()][i] = sum[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < R; i++) {
        float all = 0;
        for (int w = 0; w < MATVEC_WARPS; w++) all += part[w][i];
        r[i] = 1.0f / sqrtf(all / (float)in.k + in.eps);
    }
}

/* This warp's rows of W, at most NR; -1 for those that it has not. */
template <int NR> __device__ __forceinline__ void fused_rows(int (&rows)[NR], int n) {
    const row_range mine = warp_share(n);
#pragma unroll
    for (int j = 0; j < NR; j++) rows[j] = mine.first + j < mine.end ? mine.first + j : -1;
}

/* vector_product_kernel with heads on the raw residual, 1 to 8 rows. scales: NULL, or 1 / rms of each row. */
template <class W, class T, int R, int NR> __global__ void __launch_bounds__(32 * MATVEC_WARPS)
    fused_qkv_kernel(matvec_in in, qkv_args a, unsigned *tickets, const float *scales) {
    __shared__ float4 xs[MATVEC_TILE / 4];
    __shared__ float part[MATVEC_WARPS][R];
    __shared__ int finished[MATVEC_WARPS * NR];
    int rows[NR];
    float acc[NR][R], scale[R];
    const int rotated = (a.n_head + a.n_head_kv) * a.head_dim;
    fused_rows<NR>(rows, in.n);
    const row_angles angles = load_row_angles(a, warp_id() < in.rows ? warp_id() : 0);
    dot_rows<W, R, NR>(acc, rows, in, xs);
    fused_scales<R>(scale, in, xs, part);
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int j = 0; j < NR; j++) {
                const int i = rows[j];
                if (r >= in.rows || i < 0) continue;
                const float y = acc[j][r] * (scales ? scales[r] : scale[r]);
                if (i < rotated) a.qkv[(size_t)r * a.ld + i] = y;
                else store((T *)a.kv.v + kv_at(a.kv, a.rows[r].seq, a.rows[r].position) + (i - rotated), y);
            }
    }
    finish_heads(block_share(in.n), in.rows, a, tickets, finished, MATVEC_WARPS * NR, angles);
}

/* norm_rope_store_kernel that finds 1 / rms of its row of x [rows, ld] (16-bit, times scale[row]) by itself */
template <class T> __global__ void __launch_bounds__(256)
    fused_store_kernel(qkv_args a, const half_t *x, const float *scale, int width, int ld, float eps) {
    __shared__ float shared[32];
    const int row = block_x(), rotated = a.n_head + a.n_head_kv;
    float sum = 0, f[8];
    for (int i = 8 * tid(); i < width; i += 8 * n_threads()) {
        unpack(f, *(const uint4 *)(const void *)(x + (size_t)row * ld + i), half_t());
#pragma unroll
        for (int j = 0; j < 8; j++) sum += f[j] * f[j];
    }
    const float up = scale[row], s = up / sqrtf(block_sum(sum, shared) * up * up / (float)width + eps);
    const row_angles t = load_row_angles(a, row);
    for (int head = warp_id(); head < rotated; head += n_threads() / 32) norm_rope_head(a, row, head, s, t);
    const float *v = a.qkv + (size_t)row * a.ld + (size_t)rotated * a.head_dim;
    T *to = (T *)a.kv.v + kv_at(a.kv, t.seq, t.position);
    for (int i = 2 * tid(); i < a.kv.kv_dim; i += 2 * n_threads()) {
        const float2 y = *(const float2 *)(const void *)(v + i);
        store_2(to + i, y.x * s, y.y * s);
    }
}

/* 1 / rms of the one row of x, of whose squares each lane has added up those that it multiplied. */
__device__ __forceinline__ float fused_rms(float squares, const matvec_in &in) {
    return 1.0f / sqrtf(warp_sum(squares) / (float)in.k + in.eps);
}
__device__ __forceinline__ void add_squares(float &sum, float4 a, float4 b) {
    sum += a.x * a.x; sum += a.y * a.y; sum += a.z * a.z; sum += a.w * a.w;
    sum += b.x * b.x; sum += b.y * b.y; sum += b.z * b.z; sum += b.w * b.w;
}

/* stream_qkv_heads_kernel and stream_qkv_rope_kernel on the raw residual. scale: NULL, or 1 / rms. */
template <int NR, int RING> __global__ void __launch_bounds__(32 * MATVEC_WARPS, 2)
    fused_stream_heads_kernel(matvec_in in, qkv_args a, int parts, const float *scale) {
    QWEN3_DYNAMIC_SHARED(memory);
    mbarrier *arrived = (mbarrier *)(void *)(memory + stream_bytes(in.ldw, RING));
    float *values = (float *)(void *)(arrived + 2), squares = 0;
    const int lane = lane_id(), dim = a.head_dim, rotated = a.n_head + a.n_head_kv;
    const int head = block_x() / parts, rank = block_x() % parts, row0 = head * dim;
    const int warp = rank * MATVEC_WARPS + warp_id(), warps = parts * MATVEC_WARPS;
    const row_range rows = {row0 + warp * dim / warps, row0 + (warp + 1) * dim / warps};
    const bool finishes = head < rotated && rank == 0 && warp_id() == 0;
    const row_angles angles = load_row_angles(a, 0);
    const head_part<HEAD_PAIRS> gain = load_head<32, HEAD_PAIRS>(head_gain(a, head), finishes ? dim / 2 : 0);
    float *v = (float *)a.kv.v + kv_at(a.kv, angles.seq, angles.position) - rotated * dim;
    if (rank == 0 && tid() == 0) {
        barrier_init(arrived, 1);
        barriers_ready();
        barrier_expect(arrived, (unsigned)dim * 4);
    }
    __syncwarp();
    cluster_arrive();
    stream_rows<NR, false, RING, true>(
        in, rows, memory, [] { cluster_wait(); }, [&](int, int) { return squares = 0; },
        [&](int row, int left, const float (&acc)[NR], float) {
            const int i = row + lane;
            const float r = scale ? *scale : fused_rms(squares, in);
            if (lane >= NR || lane >= left) return;
            if (head < rotated) send_to_block(values + (i - row0), 0, pick(acc, lane) * r, arrived);
            else store(v + i, pick(acc, lane) * r);
        },
        [&](float4 lo, float4 hi) { add_squares(squares, lo, hi); });
    if (!finishes) return;
    barrier_wait(arrived, 0);
    head_part<HEAD_PAIRS> p = load_head<32, HEAD_PAIRS>(values, dim / 2);
    norm_rope<32>(p, gain, angles.angles, dim, a.eps, 1.0f);
    store_head(a, 0, head, p, angles);
}

template <int NR, int RING> __global__ void __launch_bounds__(32 * MATVEC_WARPS, 2)
    fused_stream_rope_kernel(matvec_in in, qkv_args a, unsigned *tickets, const float *scale) {
    QWEN3_DYNAMIC_SHARED(memory);
    __shared__ int finished[STREAM_HEADS];
    const int lane = lane_id(), rotated = (a.n_head + a.n_head_kv) * a.head_dim;
    const row_angles angles = load_row_angles(a, 0);
    float *v = (float *)a.kv.v + kv_at(a.kv, angles.seq, angles.position) - rotated, squares = 0;
    stream_rows<NR, false, RING, true>(
        in, warp_share(in.n), memory, [] {}, [&](int, int) { return squares = 0; },
        [&](int row, int left, const float (&acc)[NR], float) {
            const int i = row + lane;
            const float r = scale ? *scale : fused_rms(squares, in);
            if (lane >= NR || lane >= left) return;
            if (i < rotated) a.qkv[i] = pick(acc, lane) * r;
            else store(v + i, pick(acc, lane) * r);
        },
        [&](float4 lo, float4 hi) { add_squares(squares, lo, hi); });
    finish_heads(block_share(in.n), 1, a, tickets, finished, STREAM_HEADS, angles);
}

#ifdef QWEN3_WGMMA
/* Where a lane, one of LANES that share a row, begins in a tile of x; its next 16 bytes are at (this ^ 16 LANES), (this ^
   32 LANES) ...: no bank twice. */
template <int LANES> __device__ __forceinline__ int squares_at(int row, int lane) {
    return 128 * row + 16 * (LANES * row + lane) % 128;
}
/* Adds this lane's squares of its row. Which elements they are does not matter, so neither does the swizzle. A loop, because
   the compiler moves what is none behind the wait for the products, during which it is to be done. */
template <int LANES> __device__ __forceinline__ void add_squares(float &sum, const unsigned char *x, int at) {
#pragma unroll 1
    for (int j = 0; j < 128; j += 16 * LANES) {
        float f[8];
        unpack(f, *(const uint4 *)(const void *)(x + (at ^ j)), half_t());
#pragma unroll
        for (int i = 0; i < 8; i++) sum += f[i] * f[i];
    }
    __syncwarp();                       /* all have read before one of them releases the stage */
}
/* Over those lanes. */
template <int LANES> __device__ __forceinline__ float join_squares(float v) {
#pragma unroll
    for (int o = 1; o < LANES; o *= 2) v += __shfl_xor_sync(ALL, v, o);
    return v;
}
/* What the sums of a row are times; squares: of x / down. */
__device__ __forceinline__ float fused_scale(const hopper_args &g, float w_scale, float down, float squares) {
    return w_scale * down / sqrtf(squares * down * down / (float)g.k + g.qkv.eps);
}

/* skinny_sum, and the squares of the block's part of each row of x: beside the sums of the row, which are SKINNY_LD apart. */
template <int R> __device__ void fused_skinny_sum(const ring_of_tiles &ring, int steps, int group) {
    const int mine = squares_at<4>(tid() / 4, tid() % 4);
    float squares = 0;
    skinny_sum<HOPPER_M, R>(ring, steps, group,
                            [&](const unsigned char *x) { if (tid() < 4 * R) add_squares<4>(squares, x, mine); });
    squares = join_squares<4>(squares);
    if (tid() < 4 * R && tid() % 4 == 0)
        store_2((float *)(void *)ring.memory + tid() / 4 * SKINNY_LD + HOPPER_M, squares, 0);
}

/* skinny_multiply; r.scale is only the input's until the sums are there. The squares are joined for all of the warp's rows at
   once: lanes of the same l / parts have the parts of one of them. */
template <int R> __device__ __forceinline__ void fused_skinny_multiply(const hopper_args &g, const ring_of_tiles &ring,
                                                                       int rank, int tile, int steps, int warp, float w_scale) {
    const int n = R / g.parts, end = least(rank * n + n, g.rows), row = rank * n + warp;
    const int mine = least(row + lane_id() / g.parts * 8, end - 1);
    const float *sums = (const float *)(const void *)ring.memory;
    float2 squares = make_float2(0, 0);
    skinny_row r, next;
    skinny_ask_early<to_heads<float> >(r, g, row, tile);
    skinny_ask_early<to_heads<float> >(next, g, row + 8, tile);
    wait_for_previous();
    skinny_ask<to_heads<float> >(r, g, row, tile);
    skinny_ask<to_heads<float> >(next, g, row + 8, tile);
    fused_skinny_sum<R>(ring, steps, warp / 4);
    cluster_meet();
    if (row < end) load_from_block(squares, sums + mine * SKINNY_LD + HOPPER_M, (unsigned)(lane_id() % g.parts));
    for (int o = 1; o < g.parts; o *= 2) squares.x += __shfl_xor_sync(ALL, squares.x, o);
    skinny_finish_rows<to_heads<float> >(g, sums + 2 * lane_id(), row, end, tile, r, next, [&](skinny_row &at, int i) {
        at.scale = fused_scale(g, w_scale, at.scale, __shfl_sync(ALL, squares.x, i * g.parts));
    });
}

/* Each warp adds up the squares of the 16 rows that it finishes: a lane those of row lane / 2. */
struct input_squares {
    int mine;                           /* squares_at the row */
    float w_scale, sum;
    __device__ __forceinline__ void begin() { sum = 0; }
    __device__ __forceinline__ void see(const unsigned char *x) { add_squares<2>(sum, x, mine); }
    __device__ __forceinline__ void end() { sum = join_squares<2>(sum); }
    __device__ __forceinline__ float of(const hopper_args &g, float in, int r) const {
        return fused_scale(g, w_scale, in, __shfl_sync(ALL, sum, lane_id() / 4 * 2 + 16 * r));
    }
};
#endif

/* skinny_product_kernel and large_product_kernel on the residual in F16: x = in * in_scale, whose RMSNorm is meant.
   g.w_scale is 1, W = w * w_scale. */
template <int R> __global__ void __launch_bounds__(SKINNY_THREADS, 2)
    fused_skinny_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, hopper_args g,
                        float w_scale) {
#ifdef QWEN3_WGMMA
    QWEN3_DYNAMIC_SHARED(raw);
    const ring_of_tiles ring = make_ring(raw, skinny_memory<HOPPER_M, R>(g.stages), g.stages, 8);
    const int rank = block_x() % g.parts, tile = block_x() / g.parts, steps = g.k / g.parts / HOPPER_K;
    const int warp = __shfl_sync(ALL, warp_id(), 0);
    __syncthreads();
    let_next_start();
    if (warp == 8) {
        if (lane_id() == 0)
            skinny_load<HOPPER_M, R>(&x_map, &w_map, g, ring, tile, rank * steps * HOPPER_K, steps);
        __syncwarp();
        cluster_meet();
    } else fused_skinny_multiply<R>(g, ring, rank, tile, steps, warp, w_scale);
    cluster_sync();
#else
    (void)x_map; (void)w_map; (void)g; (void)w_scale;
#endif
}

template <int P> __global__ void QWEN3_CLUSTER_OF_2 __launch_bounds__(LARGE_THREADS, 1)
    fused_large_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, hopper_args g,
                       float w_scale) {
#ifdef QWEN3_WGMMA
    const int row = (warp_id() - 4) * 16 + lane_id() / 2;
    const input_squares scales = {squares_at<2>(row, lane_id() % 2), w_scale, 0};
    large_multiply_rows<to_heads<float>, HOPPER_N, P>(&x_map, &w_map, g, scales);
#else
    (void)x_map; (void)w_map; (void)g; (void)w_scale;
#endif
}

/* What stream_qkv, skinny_product and launch_large_product do. */
template <int RING> cudaError_t fused_stream(const pass *p, const matvec_in &in, const qkv_args &a, const float *scale) {
    const int parts = head_parts(p, a), blocks = parts * (a.n_head + 2 * a.n_head_kv);
    const size_t shared = stream_shared(in, RING) + 2 * sizeof(mbarrier) + (size_t)a.head_dim * sizeof(float);
#define CALL(NR) launch_shared(p->early, parts, p->s, grid1(blocks), 32 * MATVEC_WARPS, shared, fused_stream_heads_kernel<NR, RING>, \
                               in, a, parts, scale)
    if (parts > 0) return a.head_dim <= 2 * parts * MATVEC_WARPS ? CALL(2) : CALL(4);
#undef CALL
#define CALL(NR) launch_stream(p, in, RING, in.n, fused_stream_rope_kernel<NR, RING>, in, a, p->c->qkv_tickets, scale)
    return stream_rows_at_once(stream_each(p, in.n)) == 3 ? CALL(3) : CALL(4);
#undef CALL
}

template <int R> cudaError_t fused_skinny(const pass *p, const matrix &w, hopper_args a) {
    const skinny_plan none = {0, 0, 0, 0}, plan = skinny_better(p, a, HOPPER_M, R, none);
    a.parts = plan.parts;
    a.stages = skinny_stages<HOPPER_M, R>(plan.steps);
    return launch_shared(p->early, a.parts, p->s, grid1(a.n_tiles * a.parts), SKINNY_THREADS, skinny_product_shared<HOPPER_M, R>(a.stages),
                         fused_skinny_kernel<R>, get_map(p->c->skinny_h_map), get_map(w.map), a, w.scale);
}

template <int P> cudaError_t fused_large(const pass *p, const matrix &w, const hopper_args &a) {
    const int clusters = least(large_pairs(p) * (a.n_tiles - a.whole), p->c->m->n_sm / 2);
    return launch_shared(p->early, LARGE_CLUSTER, p->s, grid1(2 * clusters), LARGE_THREADS, large_product_shared<HOPPER_N, P>(),
                         fused_large_kernel<P>, get_map(p->c->large_h_map), get_map(w.map), a, w.scale);
}

cudaError_t fused_product(const pass *p, const matrix &w, const qkv_args &qkv) {
    hopper_args a = hopper_arguments(p, w, p->c->act_scale);
    a.w_scale = 1;
    a.qkv = qkv;
    a.whole = p->path == &LARGE_PATH ? large_whole(p, a.n_tiles) : 0;
    if (p->path == &LARGE_PATH) return a.whole > 0 ? fused_large<2>(p, w, a) : fused_large<1>(p, w, a);
    return p->n <= 32 ? fused_skinny<32>(p, w, a) : fused_skinny<64>(p, w, a);
}

template <int R, int NR> cudaError_t launch_fused(const pass *p, const matvec_in &in, const qkv_args &a,
                                                  const float *scales) {
    return launch_early(p->early, p->s, grid1(matvec_blocks(p, in.n, NR)), 32 * MATVEC_WARPS, 0, fused_qkv_kernel<half_t, float, R, NR>,
                        in, a, p->c->qkv_tickets, scales);
}

/* The fused operation on c->x or on its 16-bit form (see trial_put), with the weights of `layer`. scales: as above, of
   c->x only. */
qwen3_result fused_qkv(const pass *p, int layer, const float *scales) {
    cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    matrix w = c->m->layers[layer].qkv;
    const qkv_args a = qkv_arguments(p, layer);
    w.terms = 1;
    if (p->path == &LARGE_PATH || p->path == &SKINNY_PATH) return launched(p, fused_product(p, w, a), "fused_product");
    if (p->path != &VECTOR_PATH) {
        TRY(act_product(p, c->qkv, a.ld, w, 0, w.rows));
        return launched(p, launch(p->s, grid1(p->n), 256, 0, fused_store_kernel<float>, a, (const half_t *)c->act,
                                  (const float *)c->act_scale, g->n_embd, w.ld, g->rms_eps), "fused_store");
    }
    const input x = {c->x, c->embd_ld, NULL, NULL};
    const matvec_in in = vector_input(p, w, x, p->n);
    const int ring = stream_ring(p, in, w);
    cudaError_t e;
#define CALL(RING) fused_stream<RING>(p, in, a, scales)
    if (ring) e = BY_RING(ring, CALL);
#undef CALL
    else e = p->n > 4 ? launch_fused<8, 2>(p, in, a, scales) : p->n > 1 ? launch_fused<4, 2>(p, in, a, scales) :
                                                                           launch_fused<1, 2>(p, in, a, scales);
    return launched(p, e, "fused_qkv");
}

/* ---- what it is tried on: layers of random weights, the gains of k_norm as hot as published -------------- */
#ifdef QWEN3_CUDA_EMULATED              /* tests/cuda_on_cpu: the errors are right, the times mean nothing */
enum { MOST_ROWS = 64, WEIGHT_BYTES = 1 };
#else
enum { MOST_ROWS = 2048, WEIGHT_BYTES = 200000000 };    /* far beyond the L2 cache */
#endif
enum { FOLDED = 1 };                    /* layer 1 has the weights of layer 0 with its gains multiplied in */

struct trial {
    cuda_model  *m;
    cuda_ctx    *c;
    qwen3i_config config;
    std::vector<qwen3i_layer> layers;
    std::vector<unsigned short> w, folded, rest;        /* F16: q, k and v below each other; for all else */
    std::vector<float> attn_norm, q_norm, k_norm, x;
    uint64_t seed;
};

float trial_random(trial *t) {          /* about N(0, 1) */
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        t->seed = t->seed * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(t->seed >> 40) / 16777216.0f - 0.5f;
    }
    return sum * 1.7320508f;
}

unsigned short to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }

qwen3i_matrix trial_matrix(const unsigned short *data, int rows, int cols) {
    qwen3i_matrix m;
    m.data = data; m.rows = rows; m.cols = cols; m.type = QWEN3I_F16; m.factor = 0;
    return m;
}

void trial_gains(trial *t, std::vector<float> &g, int n, float top) {
    g.resize((size_t)n);
    for (float &v : g) v = 1 + 0.25f * trial_random(t);
    g[7] = top;
    g[(size_t)n / 2 + 3] = top / 4;
}

void trial_weights(trial *t) {
    const qwen3i_config &g = t->config;
    const int q = g.n_head * g.head_dim, kv = g.n_head_kv * g.head_dim;
    const size_t embd = (size_t)g.n_embd, n = (size_t)(q + 2 * kv) * embd;
    trial_gains(t, t->attn_norm, g.n_embd, 8);
    trial_gains(t, t->q_norm, g.head_dim, 2);
    trial_gains(t, t->k_norm, g.head_dim, 96.5f);
    t->w.resize(n);
    t->folded.resize(n);
    t->rest.assign((size_t)std::max(q, g.n_ff) * embd, to_half(0.01f));
    for (size_t i = 0; i < n; i++) {
        t->w[i] = to_half(0.02f * trial_random(t));
        t->folded[i] = to_half(__half2float(__ushort_as_half(t->w[i])) * t->attn_norm[i % embd]);
    }
    for (int i = 0; i < g.n_layer; i++) {
        const unsigned short *w = i == FOLDED ? t->folded.data() : t->w.data();
        qwen3i_layer l = qwen3i_layer();
        l.attn_norm = l.mlp_norm = t->attn_norm.data();
        l.q_norm = t->q_norm.data();
        l.k_norm = t->k_norm.data();
        l.wq = trial_matrix(w, q, g.n_embd);
        l.wk = trial_matrix(w + (size_t)q * embd, kv, g.n_embd);
        l.wv = trial_matrix(w + (size_t)(q + kv) * embd, kv, g.n_embd);
        l.wo = trial_matrix(t->rest.data(), g.n_embd, q);
        l.w_gate = l.w_up = trial_matrix(t->rest.data(), g.n_ff, g.n_embd);
        l.w_down = trial_matrix(t->rest.data(), g.n_embd, g.n_ff);
        t->layers.push_back(l);
    }
    t->x.resize((size_t)MOST_ROWS * embd);      /* a residual with an outlier channel */
    for (size_t i = 0; i < t->x.size(); i++) t->x[i] = trial_random(t) * (i % embd == 5 ? 300.0f : 1.0f);
}

qwen3_result trial_open(trial *t, int embd, int heads) {
    static const qwen3_allocator allocator = qwen3_allocator();
    static const qwen3_load_desc load = qwen3_load_desc();
    qwen3i_weights w;
    qwen3i_model_view view = qwen3i_model_view();
    qwen3_ctx_desc desc = qwen3_ctx_desc();
    void *state = NULL;
    qwen3i_config &g = t->config;
    memset(&g, 0, sizeof g);
    g.n_embd = embd; g.n_head = heads; g.n_head_kv = 8; g.head_dim = 128; g.n_ff = 256; g.n_vocab = 64;
    g.n_layer = most(2, ceil_div(WEIGHT_BYTES, (heads + 16) * 128 * embd * 2));
    g.max_ctx = MOST_ROWS; g.rms_eps = 1e-6f; g.rope_theta = 1e6;
    t->seed = 1;
    trial_weights(t);
    w.embed = w.head = trial_matrix(t->rest.data(), 64, embd);
    w.final_norm = t->attn_norm.data();
    w.layers = t->layers.data();
    view.config = &g; view.weights = &w; view.allocator = &allocator;
    TRY(create_model_from(&state, &view, &load, &lab_err));
    t->m = (cuda_model *)state;
    desc.max_ctx = desc.prefill_chunk = MOST_ROWS;
    desc.max_seqs = 1;
    desc.kv_type = QWEN3_KV_F32;        /* so that the errors are those of the computation */
    t->c = (cuda_ctx *)host_alloc(&desc.allocator, sizeof *t->c);
    shape_ctx(t->c, t->m, &desc, paths_of(t->m, &desc));
    return fill_ctx(t->c, &lab_err);
}

/* ---- float64 ---------------------------------------------------------------------------------------------- */
void trial_normed(const trial *t, const float *x, std::vector<double> &h) {
    double sum = 0;
    h.resize((size_t)t->config.n_embd);
    for (size_t i = 0; i < h.size(); i++) sum += (double)x[i] * (double)x[i];
    for (size_t i = 0; i < h.size(); i++)
        h[i] = x[i] / sqrt(sum / (double)h.size() + (double)1e-6f) * t->attn_norm[i];
}

/* All heads of q, then of k, then of v, at a position, in float64 from float64 */
void trial_reference(const trial *t, const std::vector<double> &h, int position, std::vector<double> &y) {
    const qwen3i_config &g = t->config;
    const int heads = g.n_head + g.n_head_kv, dim = g.head_dim;
    y.assign((size_t)((heads + g.n_head_kv) * dim), 0);
    for (size_t r = 0; r < y.size(); r++)
        for (size_t i = 0; i < h.size(); i++)
            y[r] += (double)__half2float(__ushort_as_half(t->w[r * h.size() + i])) * h[i];
    for (int n = 0; n < heads; n++) {
        double *v = &y[(size_t)(n * dim)], sum = 0;
        const float *gain = n < g.n_head ? t->q_norm.data() : t->k_norm.data();
        for (int i = 0; i < dim; i++) sum += v[i] * v[i];
        for (int i = 0; i < dim; i++) v[i] *= gain[i] / sqrt(sum / dim + (double)1e-6f);
        for (int i = 0; i < dim / 2; i++) {
            const double angle = (float)position * (float)(1.0f / (float)pow(1e6, 2.0 * i / dim));
            const double a = v[i], b = v[i + dim / 2];
            v[i] = a * cos(angle) - b * sin(angle);
            v[i + dim / 2] = b * cos(angle) + a * sin(angle);
        }
    }
}

struct trial_error { double k, score; };        /* largest absolute errors: of k, and of the scores q k / sqrt(d) */

/* Of the last of n rows on the device. Where 1 / rms is wrong, the norm of heads hides it in q and k, but not in v. */
qwen3_result trial_compare(const trial *t, int n, int layer, const std::vector<double> &want, trial_error *e) {
    const qwen3i_config &g = t->config;
    const size_t q_dim = (size_t)t->c->q_dim, kv_dim = (size_t)t->c->kv_dim, dim = (size_t)g.head_dim;
    std::vector<float> q((size_t)n * q_dim), k((size_t)n * kv_dim), v((size_t)n * kv_dim);
    TRY(lab_get(t->c, LAB_Q, q.data(), &lab_err));
    TRY(lab_kv(t->c, layer, n, k.data(), v.data()));
    const float *qn = &q[(size_t)(n - 1) * q_dim], *kn = &k[(size_t)(n - 1) * kv_dim];
    double off = 0, most_v = 0;
    e->k = e->score = 0;
    for (size_t i = 0; i < kv_dim; i++) {
        const double exact = want[q_dim + kv_dim + i];
        off = std::max(off, fabs(v[(size_t)(n - 1) * kv_dim + i] - exact));
        most_v = std::max(most_v, fabs(exact));
    }
    if (!(off < 1e-2 * most_v))
        return qwen3i_fail(&lab_err, QWEN3_ERR_DEVICE, "v of row %d of %d is wrong: by %g of %g", n - 1, n, off, most_v);
    for (size_t i = 0; i < kv_dim; i++) e->k = std::max(e->k, fabs(kn[i] - want[q_dim + i]));
    for (size_t h = 0; h < (size_t)g.n_head; h++) {
        const size_t kh = h / (size_t)t->c->group * dim;
        double got = 0, exact = 0;
        for (size_t i = 0; i < dim; i++) {
            got += (double)qn[h * dim + i] * kn[kh + i];
            exact += want[h * dim + i] * want[q_dim + kh + i];
        }
        e->score = std::max(e->score, fabs(got - exact) / sqrt((double)dim));
    }
    return QWEN3_OK;
}

/* ---- the ways to compute it ----------------------------------------------------------------------------------- */
/* the library; with a kernel for the norm in any case; with one 16-bit term of the input; the baseline */
enum way { SEPARATE, SEPARATE_OWN, SEPARATE_1, FUSED };

pass trial_pass(const trial *t, int n) { return make_pass(t->c, t->c->stream, n, 0, &lab_err); }

qwen3_result trial_once(trial *t, pass *p, int layer, way how) {
    cuda_ctx *c = t->c;
    matrix &w = c->m->layers[layer].qkv;
    const int terms = w.terms;
    if (how == FUSED) return fused_qkv(p, layer, NULL);
    if (how == SEPARATE_1) w.terms = 1;
    input h;
    const float *gain = c->m->layers[layer].attn_norm;      /* in a step kernels may norm their input themselves */
    qwen3_result r = how == SEPARATE_OWN ? p->path->norm(p, gain, w, &h) : norm(p, gain, w, &h);
    if (r == QWEN3_OK) r = p->path->qkv(p, layer, h);
    w.terms = terms;
    return r;
}

/* x on the device; for many fused rows in 16 bits, which such a design would have it in already. */
qwen3_result trial_put(trial *t, pass *p, const float *x) {
    cuda_ctx *c = t->c;
    matrix one = c->m->layers[0].qkv;
    one.terms = 1;
    TRY(lab_put(c, LAB_X, x, &lab_err));
    if (p->path == &LARGE_PATH || p->path == &SKINNY_PATH)
        return hopper_round(p, one, c->x, c->embd_ld, p->n);
    return p->path == &VECTOR_PATH ? QWEN3_OK : round_rows(p, one, c->x, c->embd_ld, p->n);
}

/* Microseconds of one: a graph of one a layer, replayed; the median of nine. */
qwen3_result trial_time(trial *t, int n, way how, double *us) {
    const qwen3i_err *err = &lab_err;
    cuda_ctx *c = t->c;
    pass p = trial_pass(t, n);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    std::vector<double> times;
    TRY(trial_put(t, &p, t->x.data()));
    TRY(trial_once(t, &p, 0, how));             /* makes plans, loads code */
    TRY(trial_put(t, &p, t->x.data()));
    CUDA_TRY(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal));
    qwen3_result r = QWEN3_OK;
    for (int i = 0; r == QWEN3_OK && i < 2 * c->m->config.n_layer; i++)
        r = trial_once(t, &p, i % c->m->config.n_layer, how);
    CUDA_TRY(cudaStreamEndCapture(c->stream, &graph));
    TRY(r);
    CUDA_TRY(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 11; i++) {
        float each = 0;
        timer clock;
        CUDA_TRY(clock.start(c->stream));
        CUDA_TRY(cudaGraphLaunch(exec, c->stream));
        CUDA_TRY(clock.stop(c->stream, 2 * c->m->config.n_layer, &each));
        if (i > 1) times.push_back(each);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    std::sort(times.begin(), times.end());
    *us = times[times.size() / 2];
    return QWEN3_OK;
}

struct trial_errors { trial_error separate, separate_1, after, folded, bf16; };

/* Each way's errors. `after`: fused in float32, the gains not in the weights; by the matrix-vector kernels alone. */
qwen3_result trial_errors_of(trial *t, int n, trial_errors *e) {
    const qwen3i_err *err = &lab_err;
    const size_t embd = (size_t)t->config.n_embd, last = (size_t)(n - 1) * embd;
    std::vector<double> h, want;
    std::vector<float> other(t->x.begin(), t->x.begin() + (long)((size_t)n * embd)), scales(8, 0);
    pass p = trial_pass(t, n);
    trial_normed(t, &t->x[last], h);
    trial_reference(t, h, n - 1, want);
    TRY(trial_put(t, &p, t->x.data()));
    TRY(trial_once(t, &p, 0, SEPARATE));
    TRY(trial_compare(t, n, 0, want, &e->separate));
    TRY(trial_once(t, &p, 0, SEPARATE_1));
    TRY(trial_compare(t, n, 0, want, &e->separate_1));
    TRY(trial_put(t, &p, t->x.data()));
    TRY(fused_qkv(&p, FOLDED, NULL));
    TRY(trial_compare(t, n, FOLDED, want, &e->folded));
    for (size_t i = 0; i < other.size(); i++) other[i] *= t->attn_norm[i % embd];
    for (size_t r = 0; r < (size_t)least(n, 8); r++) {
        float sum = 0;
        for (size_t i = 0; i < embd; i++) sum += t->x[r * embd + i] * t->x[r * embd + i];
        scales[r] = 1.0f / sqrtf(sum / (float)embd + 1e-6f);
    }
    e->after = e->folded;
    if (p.path == &VECTOR_PATH) {
        CUDA_TRY(cudaMemcpy(t->c->act_scale, scales.data(), (size_t)n * 4, cudaMemcpyHostToDevice));
        TRY(trial_put(t, &p, other.data()));
        TRY(fused_qkv(&p, 0, t->c->act_scale));
        TRY(trial_compare(t, n, 0, want, &e->after));
    }
    for (size_t r = 0; r < (size_t)n; r++) {    /* what is normalised rounded to bfloat16, as most engines keep it */
        trial_normed(t, &t->x[r * embd], h);
        for (size_t i = 0; i < embd; i++) other[r * embd + i] = __bfloat162float(__float2bfloat16_rn((float)h[i]));
    }
    TRY(lab_put(t->c, LAB_H, other.data(), &lab_err));
    TRY(lab_one(&p, LAB_QKV_ROPE, 0));
    return trial_compare(t, n, 0, want, &e->bf16);
}

qwen3_result trial_rows(trial *t, const char *size, int n) {
    std::vector<int32_t> seqs((size_t)n, 0), positions((size_t)n), tokens((size_t)n, 0);
    qwen3i_batch b = qwen3i_batch();
    trial_errors e;
    double separate = 0, own = 0, one = 0, fused = 0;
    for (int i = 0; i < n; i++) positions[(size_t)i] = i;
    b.tokens = tokens.data(); b.seqs = seqs.data(); b.positions = positions.data(); b.n_rows = n;
    TRY(lab_set_rows(t->c, &b, &lab_err));
    TRY(trial_errors_of(t, n, &e));
#ifndef QWEN3_CUDA_EMULATED
    TRY(trial_time(t, n, SEPARATE, &separate));
    TRY(trial_time(t, n, SEPARATE_OWN, &own));
    TRY(trial_time(t, n, SEPARATE_1, &one));
    TRY(trial_time(t, n, FUSED, &fused));
#endif
    const trial_error all[] = {e.separate, e.separate_1, e.after, e.folded, e.bf16};
    printf("%-5s %5d %9.2f %9.2f %9.2f %9.2f  %5.2f %5.2f ", size, n, separate, own, one, fused,
           fused > 0 ? separate / fused : 0, fused > 0 ? one / fused : 0);
    for (const trial_error &each : all) printf("  %.1e %.1e", each.k, each.score);
    printf("\n");
    fflush(stdout);
    return QWEN3_OK;
}

} /* namespace */

/* The table of one size, or of all (NULL). */
extern "C" const char *lab_fused_baseline(const char *size) {
    static const struct { const char *name; int embd, heads; } sizes[] = {
        {"0.6B", 1024, 16}, {"1.7B", 2048, 16}, {"4B", 2560, 32}, {"8B", 4096, 32}
    };
    static const int rows[] = {1, 2, 8, 64, 512, 2048};
    printf("RMSNorm + QKV + norm of heads + RoPE + cache, microseconds; absolute errors of k and of scores, k_norm "
           "gains of 96.5\n%-5s %5s %9s %9s %9s %9s  %5s %5s   %-15s  %-15s  %-15s  %-15s  %-15s\n", "size", "rows",
           "separate", "own norm", "1 term", "fused", "ratio", "1 t.", "separate", "1 term", "scale after", "gains folded",
           "bf16 input");
    for (int i = 0; i < 4; i++) {
        if (size && strcmp(size, sizes[i].name)) continue;
        trial *t = new trial();
        qwen3_result r = trial_open(t, sizes[i].embd, sizes[i].heads);
        for (int k = 0; r == QWEN3_OK && k < 6 && rows[k] <= MOST_ROWS; k++) r = trial_rows(t, sizes[i].name, rows[k]);
        if (t->c) free_ctx(t->c);
        if (t->m) free_model(t->m);
        delete t;
        if (r != QWEN3_OK) return lab_text;
    }
    return NULL;
}
