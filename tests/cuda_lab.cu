/* The laboratory: the operations of the CUDA backend one by one, what the device can do, and the standard path. Tests,
   bench and tools link this instead of qwen3_cuda.cu, which it includes. tests/cuda_lab.h says what is here. */
#include "../qwen3_cuda.cu"
#include "cuda_lab.h"

namespace {

/* ---- kernels ---------------------------------------------------------------------------------------------- */
/* act_to_float: out[row, :] = act[row, :] * scale[row]. One block a row. */
template <class O> static __global__ void act_to_float_kernel(float *out, const O *act, const float *scale, int width,
                                                              int ld, size_t rest) {
    for (int i = tid(); i < width; i += n_threads()) {
        const size_t at = (size_t)blockIdx.x * ld + i;
        out[at] = (to_float(act[at]) + (rest ? to_float(act[at + rest]) : 0.0f)) * (scale ? scale[blockIdx.x] : 1.0f);
    }
}

/* random_halves: n F16 values of about [-1, 1). */
static __global__ void random_halves_kernel(half_t *p, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned h = (unsigned)i * 2654435761u;
        h = (h ^ h >> 15) * 2246822519u;
        h = (h ^ h >> 13) * 3266489917u;
        p[i] = __float2half_rn((float)(int)(h >> 16) / 32768.0f - 1.0f);
    }
}

/* read: n times 16 bytes, eight on their way in each thread. *sum is written so that the loads stay. */
static __global__ void __launch_bounds__(512) read_kernel(unsigned *sum, const uint4 *p, size_t n) {
    const size_t step = (size_t)gridDim.x * blockDim.x;
    unsigned total = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int u = 0; u < 8; u++) v[u] = i + u * step < n ? load_stream(p + i + u * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < 8; u++) total += v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    if (total == 1) *sum = total;
}

/* ff_scale: for rows of h that hopper_norm has not made. in [rows, width]; one block a row. */
static __global__ void ff_scale_kernel(float *ff_scale, const float *bounds, const float *in, int width) {
    __shared__ float shared[32];
    float sum = 0;
    for (int i = tid(); i < width; i += n_threads()) {
        const float v = in[(size_t)blockIdx.x * width + i];
        sum += v * v;
    }
    sum = block_sum(sum, shared);
    if (tid() == 0) ff_scale[blockIdx.x] = ff_scale_of(sqrtf(sum), bounds);
}

/* ---- operations ------------------------------------------------------------------------------------------- */
static const char *lab_no_device() {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaSuccess && n > 0 && (e = cudaFree(NULL)) == cudaSuccess) return NULL;      /* the first use */
    cudaGetLastError();
    return e == cudaSuccess ? "there is no CUDA device" : cudaGetErrorString(e);
}

static int lab_own_products(const void *ctx_state, int rows) {
    const cuda_ctx *c = (const cuda_ctx *)ctx_state;
    return path_for(c, rows) == &SKINNY_PATH || path_for(c, rows) == &LARGE_PATH;
}

static int lab_two_kernels(const void *ctx_state) { return ((const cuda_ctx *)ctx_state)->two; }

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

static qwen3_result lab_norm_on_device(char *memory, float *y, const void *x, qwen3i_type type, const float *gain,
                                       int n, int width, float eps, int repeat, float *us, const qwen3i_err *err) {
    const size_t count = (size_t)n * width, bytes = (count * 4 + 255) / 256 * 256;
    float *dy = (float *)(void *)memory, *dg = (float *)(void *)(memory + 2 * bytes);
    char *dx = memory + bytes;
    timer t;
    CUDA_TRY(cudaMemcpy(dx, x, count * qwen3i_type_size(type), cudaMemcpyHostToDevice));
    CUDA_TRY(cudaMemcpy(dg, gain, (size_t)width * 4, cudaMemcpyHostToDevice));
    CUDA_TRY(t.start(0));
    for (int i = 0; i < repeat; i++) {
        if (type == QWEN3I_F32)
            CUDA_TRY(launch_rmsnorm(false, 0, repeat > 1 ? dy : (float *)(void *)dx, width,
                                           (const float *)(void *)dx, width, NULL, dg, n, 1, width, 0, eps));
        else if (type == QWEN3I_F16)
            CUDA_TRY(launch_rmsnorm(false, 0, dy, width, (const half_t *)(void *)dx, width, NULL, dg, n, 1,
                                            width, 0, eps));
        else
            CUDA_TRY(launch_rmsnorm(false, 0, dy, width, (const bf16_t *)(void *)dx, width, NULL, dg, n, 1,
                                            width, 0, eps));
    }
    CUDA_TRY(t.stop(0, repeat, us));
    CUDA_TRY(cudaMemcpy(y, type == QWEN3I_F32 && repeat == 1 ? (const float *)(void *)dx : dy, count * 4,
                        cudaMemcpyDeviceToHost));
    return QWEN3_OK;
}

static qwen3_result lab_rmsnorm(float *y, const void *x, qwen3i_type type, const float *gain, int n, int width,
                                float eps, int repeat, float *us, const qwen3i_err *err) {
    const size_t bytes = ((size_t)n * width * 4 + 255) / 256 * 256;
    char *memory = NULL;
    TRY(device_alloc(&memory, 2 * bytes + (size_t)width * 4, "a test", err));
    const qwen3_result r = lab_norm_on_device(memory, y, x, type, gain, n, width, eps, repeat, us, err);
    cudaFree(memory);
    return r;
}

/* The rows that the operations below work on. */
struct lab_rows_now { int rows, tiles; };
static lab_rows_now lab_batch;

static qwen3_result lab_set_rows(void *ctx_state, const qwen3i_batch *b, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    c->ahead.n = 0;
    lab_batch.rows = b->n_rows;
    return upload_batch(c, b, &lab_batch.tiles, err);
}

struct lab_view { float *data; int width, ld; const matrix *act; };     /* act: the rows are c->act, as input of this */

static lab_view lab_place(const pass *p, lab_buffer buffer) {
    const cuda_ctx *c = p->c;
    const qwen3i_config *g = &c->m->config;
    const layer_weights *w = &c->m->layers[0];
    lab_view v = {c->x, g->n_embd, c->embd_ld, NULL};
    const bool act = p->path != &VECTOR_PATH;
    switch (buffer) {
        case LAB_H: v.data = c->h; if (act) v.act = &w->qkv; break;
        case LAB_Q: v.data = c->qkv; v.width = c->q_dim; v.ld = c->qkv_ld; break;
        case LAB_A: v.data = c->attn; v.width = v.ld = c->q_dim; break;
        case LAB_M:
            v.data = act ? c->gate_up : c->ff;
            v.width = g->n_ff;
            v.ld = c->ff_ld;
            if (act) v.act = &w->w_down;
            break;
        case LAB_LOGITS: v.data = c->logits; v.width = v.ld = g->n_vocab; break;
        default: break;
    }
    return v;
}

/* Where the operations find h when put() has set it: as norm() would leave it. */
static input lab_input(const pass *p) {
    const cuda_ctx *c = p->c;
    const input rows = {c->h, c->embd_ld, NULL, NULL}, made = {NULL, 0, c->act_scale, NULL}, floats = {NULL, 0, NULL, NULL};
    return p->path == &VECTOR_PATH ? rows : c->m->layers[0].qkv.type == QWEN3I_F32 ? floats : made;
}

/* The rows of a batch that goes through the kernels for Hopper; scale NULL: they are F16 as they are. */
struct hopper_view { half_t *rows; float *scale; int width; };

static bool hopper_buffer(const pass *p, lab_buffer buffer, hopper_view *v) {
    const cuda_ctx *c = p->c;
    const hopper_view h = {c->hopper_act, c->act_scale, c->m->config.n_embd}, q = {c->hopper_q, NULL, c->q_dim},
                    a = {c->hopper_act, NULL, c->q_dim}, m = {c->hopper_m, c->ff_scale, c->m->config.n_ff};
    if ((p->path != &LARGE_PATH && p->path != &SKINNY_PATH) || buffer == LAB_X || buffer == LAB_LOGITS) return false;
    if ((buffer == LAB_Q && !p->q_halves) || (buffer == LAB_A && !p->halves)) return false;
    *v = buffer == LAB_H ? h : buffer == LAB_Q ? q : buffer == LAB_A ? a : m;
    return true;
}

static qwen3_result copy_hopper(const pass *p, lab_buffer buffer, const hopper_view &v, float *floats,
                                const float *from, float *to) {
    const cuda_ctx *c = p->c;
    const size_t bytes = (size_t)p->n * v.width * sizeof(float);
    const qwen3i_err *err = p->err;
    if (from) {
        CUDA_TRY(cudaMemcpyAsync(floats, from, bytes, cudaMemcpyHostToDevice, p->s));
        RUN(grid1(p->n), 256, 0, round_rows_kernel<half_t>, v.rows, v.scale, (const float *)floats, v.width, v.width,
            v.width, (size_t)0);
        if (buffer == LAB_H)
            RUN(grid1(p->n), 256, 0, ff_scale_kernel, c->ff_scale, (const float *)c->m->layers[0].gate_up.bounds,
                (const float *)floats, v.width);
    } else {
        RUN(grid1(p->n), 256, 0, act_to_float_kernel<half_t>, floats, (const half_t *)v.rows, (const float *)v.scale,
            v.width, v.width, (size_t)0);
        CUDA_TRY(cudaMemcpyAsync(to, floats, bytes, cudaMemcpyDeviceToHost, p->s));
    }
    CUDA_TRY(cudaStreamSynchronize(p->s));
    return QWEN3_OK;
}

/* To or from such rows, whichever is not NULL. */
static qwen3_result lab_hopper(const pass *p, lab_buffer buffer, const hopper_view &v, const float *from, float *to) {
    char *floats = NULL;
    TRY(device_alloc(&floats, (size_t)p->n * v.width * sizeof(float), "a test", p->err));
    const qwen3_result r = copy_hopper(p, buffer, v, (float *)(void *)floats, from, to);
    cudaFree(floats);
    return r;
}

/* M of few rows with weights in blocks is gate and up until down's input is rounded: 128, which is its own silu(), and
   m / 128; or what they give. */
static qwen3_result lab_pairs(const pass *p, const float *from, float *to) {
    const cuda_ctx *c = p->c;
    const qwen3i_err *err = p->err;
    const size_t ff = (size_t)c->m->config.n_ff, ld = 2 * (size_t)c->ff_ld, bytes = (size_t)p->n * ld * sizeof(float);
    float *v = (float *)malloc(bytes);
    if (!v) return no_host_memory(err, bytes);
    cudaError_t e = cudaMemcpyAsync(v, c->ff, bytes, cudaMemcpyDeviceToHost, p->s);
    if (e == cudaSuccess) e = cudaStreamSynchronize(p->s);
    for (size_t r = 0; r < (size_t)p->n; r++)
        for (size_t i = 0; i < ff; i++) {
            float *gate = v + r * ld + i, *up = gate + ff;
            if (from) { *gate = 128; *up = from[r * ff + i] / 128; }
            else to[r * ff + i] = *gate / (1 + expf(-*gate)) * *up;
        }
    if (from && e == cudaSuccess) e = cudaMemcpyAsync(c->ff, v, bytes, cudaMemcpyHostToDevice, p->s);
    if (e == cudaSuccess) e = cudaStreamSynchronize(p->s);
    free(v);
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(err, e, "a test");
}

static qwen3_result lab_put(void *ctx_state, lab_buffer buffer, const float *from, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const pass p = make_pass(c, c->stream, lab_batch.rows, lab_batch.tiles, err);
    const lab_view v = lab_place(&p, buffer);
    hopper_view wide;
    CUDA_TRY(guard.status);
    if (hopper_buffer(&p, buffer, &wide)) return lab_hopper(&p, buffer, wide, from, NULL);
    if (buffer == LAB_M && p.path == &VECTOR_PATH && few_pairs(&p, 0)) return lab_pairs(&p, from, NULL);
    CUDA_TRY(cudaMemset2DAsync(v.data, (size_t)v.ld * 4, 0, (size_t)v.width * 4, (size_t)p.n, c->stream));
    CUDA_TRY(cudaMemcpy2DAsync(v.data, (size_t)v.ld * 4, from, (size_t)v.width * 4, (size_t)v.width * 4, (size_t)p.n,
                               cudaMemcpyHostToDevice, c->stream));
    if (v.act) TRY(round_rows(&p, *v.act, v.data, v.ld, p.n));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

static qwen3_result lab_get(void *ctx_state, lab_buffer buffer, float *to, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    const pass p_ = make_pass(c, c->stream, lab_batch.rows, lab_batch.tiles, err), *p = &p_;
    const lab_view v = lab_place(p, buffer);
    hopper_view wide;
    CUDA_TRY(guard.status);
    if (hopper_buffer(p, buffer, &wide)) return lab_hopper(p, buffer, wide, NULL, to);
    if (buffer == LAB_M && p->path == &VECTOR_PATH && few_pairs(p, 0)) return lab_pairs(p, NULL, to);
    if (v.act && v.act->type == QWEN3I_F32)
        RUN(grid1(p->n), 256, 0, act_to_float_kernel<float>, v.data, (const float *)c->act, (const float *)NULL,
            v.width, v.ld, (size_t)0);
    else if (v.act)
        RUN(grid1(p->n), 256, 0, act_to_float_kernel<half_t>, v.data, (const half_t *)c->act,
            (const float *)c->act_scale, v.width, v.ld, rest_of(*v.act, p->n));
    CUDA_TRY(cudaMemcpy2DAsync(to, (size_t)v.width * 4, v.data, (size_t)v.ld * 4, (size_t)v.width * 4, (size_t)p->n,
                               cudaMemcpyDeviceToHost, c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return QWEN3_OK;
}

/* Half a layer, from c->x to c->x. */
static qwen3_result lab_half(const pass *p, int layer, int half) {
    const sum_of_parts x = {p->c->x, 1};
    TRY(half ? two_mlp(p, layer, x) : two_attention(p, layer, x));
    return add_parts(p, two_sum(p->c, half));
}

static qwen3_result lab_one(pass *p, lab_op op, int layer) {
    const layer_weights *w = &p->c->m->layers[layer];
    const int n = least(p->n, head_rows(p->c));
    input h = lab_input(p);
    pass alone = *p;                    /* after no layers: */
    alone.two = false;
    if (w->router && (op == LAB_MLP || op == LAB_NORM_MLP)) return experts_mlp(p, layer);   /* from X to X */
    if (w->router && op == LAB_DOWN) return QWEN3_OK;
    switch (op) {
        case LAB_EMBED:     return embed(p);
        case LAB_NORM:      return p->path->norm(p, w->attn_norm, w->qkv, &h);
        case LAB_QKV_ROPE:  return p->path->qkv(p, layer, h);
        case LAB_NORM_QKV:  TRY(norm(p, w->attn_norm, w->qkv, &h)); return p->path->qkv(p, layer, h);
        case LAB_ATTENTION: return p->path->attention(p, layer);
        case LAB_O_PROJ:    return p->path->o_proj(p, layer);
        case LAB_MLP:       return p->path->mlp(p, layer, h);
        case LAB_NORM_MLP:  TRY(norm(p, w->mlp_norm, w->gate_up, &h)); return p->path->mlp(p, layer, h);
        case LAB_DOWN:      return p->path->down(p, layer);
        case LAB_HEAD:      TRY(head_norm(&alone, 0, n)); return head_logits(&alone, 0, n, false);
        case LAB_FIRST_HALF:  return lab_half(p, layer, 0);
        case LAB_SECOND_HALF: return lab_half(p, layer, 1);
        case LAB_STEP:      return run_step(p->c, p->n, p->err);
    }
    return qwen3i_fail(p->err, QWEN3_ERR_ARG, "there is no operation %d", (int)op);
}

/* As one graph, since launches one by one would be what is timed; once before, which makes plans and loads code. */
static qwen3_result lab_time(cuda_ctx *c, lab_op op, int layer, int repeat, float *us, const qwen3i_err *err) {
    pass p = make_pass(c, c->stream, lab_batch.rows, lab_batch.tiles, err);
    cudaGraphExec_t graph = NULL;
    TRY(lab_one(&p, op, most(layer, 0)));
    p = make_pass(c, c->capture, lab_batch.rows, lab_batch.tiles, err);
    TRY(capture(c, &graph, [&]() -> qwen3_result {
        for (int i = 0; i < repeat; i++) TRY(lab_one(&p, op, layer < 0 ? i % c->m->config.n_layer : layer));
        return QWEN3_OK;
    }, err));
    timer t;
    cudaError_t e = t.start(c->stream);
    if (e == cudaSuccess) e = cudaGraphLaunch(graph, c->stream);
    if (e == cudaSuccess) e = t.stop(c->stream, repeat, us);
    cudaGraphExecDestroy(graph);
    return e == cudaSuccess ? QWEN3_OK : cuda_fail(err, e, "a measurement");
}

static qwen3_result lab_run(void *ctx_state, lab_op op, int layer, int repeat, float *us,
                            const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    CUDA_TRY(guard.status);
    if (repeat > 1 && op != LAB_STEP) return lab_time(c, op, layer, repeat, us, err);
    pass p = make_pass(c, c->stream, lab_batch.rows, lab_batch.tiles, err);
    timer t;
    CUDA_TRY(t.start(c->stream));
    for (int i = 0; i < repeat; i++) TRY(lab_one(&p, op, layer < 0 ? i % c->m->config.n_layer : layer));
    CUDA_TRY(t.stop(c->stream, repeat, us));
    return QWEN3_OK;
}

/* The median of five timings of f, in seconds. */
template <class F> static qwen3_result time_of(cudaStream_t s, double *seconds, F f, const qwen3i_err *err) {
    float us[5];
    TRY(f());                           /* makes the plan, loads the code */
    for (int i = 0; i < 5; i++) {
        timer t;
        int at = i;
        CUDA_TRY(t.start(s));
        TRY(f());
        float now = 0;
        CUDA_TRY(t.stop(s, 1, &now));
        for (; at > 0 && us[at - 1] > now; at--) us[at] = us[at - 1];
        us[at] = now;
    }
    *seconds = (double)us[2] * 1e-6;
    return QWEN3_OK;
}

#ifdef QWEN3_CUDA_EMULATED
const int LIMIT_SIZE = 64;
#else
const int LIMIT_SIZE = 8192;            /* rows and columns of the matrices */
#endif

static qwen3_result measure_limits(cuda_ctx *c, char *memory, double *bytes, double *flop, const qwen3i_err *err) {
    const size_t n = (size_t)LIMIT_SIZE * LIMIT_SIZE, size = 8 * n;     /* two of F16, one of float32; read as one */
    const int times = 4;
    const int blocks = 2 * c->m->n_sm;
    float *y = (float *)(void *)memory;
    half_t *x = (half_t *)(void *)(y + n);
    matrix w;
    double seconds = 0;
    memset(&w, 0, sizeof w);
    w.data = x + n;
    w.rows = w.cols = w.ld = LIMIT_SIZE;
    w.type = QWEN3I_F16;
    w.terms = 1;
    w.scale = 1;
    CUDA_TRY(launch(c->stream, grid1(blocks), 256, 0, random_halves_kernel, (half_t *)(void *)memory, size / 2));
    TRY(time_of(c->stream, &seconds, [&]() -> qwen3_result {
        for (int i = 0; i < times; i++)
            CUDA_TRY(launch(c->stream, grid1(c->m->n_sm), 512, 0, read_kernel, (unsigned *)(void *)memory,
                            (const uint4 *)(const void *)memory, size / 16));
        return QWEN3_OK;
    }, err));
    *bytes = times * (double)size / seconds;
    TRY(time_of(c->stream, &seconds, [&]() -> qwen3_result {
        for (int i = 0; i < times; i++)
            TRY(product(c, c->stream, y, LIMIT_SIZE, w, 0, LIMIT_SIZE, x, LIMIT_SIZE, err));
        return QWEN3_OK;
    }, err));
    *flop = times * 2.0 * (double)n * LIMIT_SIZE / seconds;
    return QWEN3_OK;
}

static qwen3_result lab_limits(void *ctx_state, double *bytes, double *flop, const qwen3i_err *err) {
    cuda_ctx *c = (cuda_ctx *)ctx_state;
    device_guard guard(c->m->device);
    char *memory = NULL;
    CUDA_TRY(guard.status);
    void *const workspace = c->workspace;
    const size_t size = c->workspace_size, matrices = 8 * (size_t)LIMIT_SIZE * LIMIT_SIZE;
    TRY(device_alloc(&memory, matrices + WORKSPACE, "a measurement", err));
    c->workspace = memory + matrices;
    c->workspace_size = WORKSPACE;
    const qwen3_result r = measure_limits(c, memory, bytes, flop, err);
    c->workspace = workspace;
    c->workspace_size = size;
    forget_plans(c);                    /* they may ask for what is gone */
    cudaFree(memory);
    return r;
}

/* ---- the standard path: cuBLASLt, and one plain kernel for each operation --------------------------------- */
/* rope (standard path): q and k heads of qkv in place. Grid (rows, n_head + n_head_kv). Equals qwen3i_rope. */
static __global__ void rope_kernel(qkv_args a) {
    const int half = a.head_dim / 2;
    float *v = a.qkv + (size_t)blockIdx.x * a.ld + (size_t)blockIdx.y * a.head_dim;
    const float2 *turn = a.rope + (size_t)a.rows[blockIdx.x].position * half;
    for (int i = tid(); i < half; i += n_threads()) {
        const float x = v[i], y = v[i + half];
        v[i] = x * turn[i].x - y * turn[i].y;
        v[i + half] = y * turn[i].x + x * turn[i].y;
    }
}

/* kv_store (standard path): k and v of qkv to the cache, one rounding. One block a row. */
template <class T>
static __global__ void kv_store_kernel(qkv_args a) {
    const float *k = a.qkv + (size_t)blockIdx.x * a.ld + (size_t)a.n_head * a.head_dim;
    const size_t at = kv_at(a.kv, a.rows[blockIdx.x].seq, a.rows[blockIdx.x].position);
    for (int i = tid(); i < a.kv.kv_dim; i += n_threads()) {
        store((T *)a.kv.k + at + i, k[i]);
        store((T *)a.kv.v + at + i, k[a.kv.kv_dim + i]);
    }
}

template <class T> static cudaError_t kv_store(const pass *p, const qkv_args &a) {
    return launch(p->s, grid1(p->n), row_threads(a.kv.kv_dim, 4, p->n), 0, kv_store_kernel<T>, a);
}

static qwen3_result standard_qkv(const pass *p, int layer, const input &h) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].qkv;
    const qkv_args a = qkv_arguments(p, layer);
    float *q = c->qkv, *k = q + c->q_dim;
    TRY(act_product(p, q, a.ld, w, 0, c->q_dim));
    TRY(act_product(p, k, a.ld, w, c->q_dim, c->kv_dim));
    TRY(act_product(p, k + c->kv_dim, a.ld, w, c->q_dim + c->kv_dim, c->kv_dim));
    if (h.scale) RUN(grid1(p->n), row_threads(a.ld, 4, p->n), 0, scale_rows_kernel, q, h.scale, a.ld, a.ld);
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

static qwen3_result standard_mlp(const pass *p, int layer, const input &) {
    cuda_ctx *c = p->c;
    const matrix &w = c->m->layers[layer].gate_up, &down = c->m->layers[layer].w_down;
    const int n_ff = c->m->config.n_ff, ld = 2 * c->ff_ld;
    TRY(act_product(p, c->gate_up, ld, w, 0, n_ff));
    TRY(act_product(p, c->gate_up + n_ff, ld, w, n_ff, n_ff));
    TRY(launched(p, launch_swiglu<float>(p, c->ff, w, 0), "swiglu"));
    return round_rows(p, down, c->ff, c->ff_ld, p->n);
}

const path STANDARD_PATH = {gemm_norm, NULL, standard_qkv, rows_attention, gemm_o_proj, standard_mlp, gemm_down, gemm_head, false, false};

static void standard_memory(cuda_ctx *c, arena *a) {
    gemm_memory(c, a);
    c->ff = a->take<float>((size_t)c->max_rows * c->ff_ld);
}

const path_set STANDARD = {{{INT_MAX, &STANDARD_PATH}}, false, standard_memory, prepare_nothing};

static qwen3_result create_standard_ctx(void **ctx_state, void *model_state, const qwen3_model *model,
                                        const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    return create_ctx_for(&STANDARD, ctx_state, model_state, model, desc, err);
}

} /* namespace */

extern "C" const qwen3_backend *cuda_lab_standard(void) {
    static qwen3_backend backend = *qwen3_cuda_backend();
    backend.ctx_create = create_standard_ctx;
    return &backend;
}

extern "C" const cuda_lab_functions *cuda_lab(void) {
    static const cuda_lab_functions functions = { lab_no_device, lab_two_kernels, lab_own_products, lab_rmsnorm, lab_set_rows,
                                                  lab_put, lab_get, lab_run, lab_limits };
    return &functions;
}
