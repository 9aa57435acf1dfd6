/* The CUDA backend: every kernel against its CPU twin, whole models against the reference, and what a decode
   step promises. Without a GPU only that error is tested - or everything, more slowly, if qwen3_cuda.cu was
   compiled with tests/cuda_on_cpu. */
#ifndef QWEN3_TESTS_TEST_CUDA_H
#define QWEN3_TESTS_TEST_CUDA_H
#include "fixture.h"
#include "test_formats.h"
#include "test_parity.h"
#include "test_stream.h"
#include "cuda_lab.h"

#define CUDA_EXACT   1e-6       /* float32 results: ||a - b|| / ||b|| */
#define CUDA_PRODUCT 4e-6       /* through cuBLASLt: the tensor cores cut their sums off instead of rounding them */
#define CUDA_ROUNDED 5e-4       /* rounded once to 11 bits on the way */
#define CUDA_INTS    1e-4       /* to 16 bits, of which the largest of 32 elements has all */
#ifndef CUDA_DRAWS              /* tokens chosen by random samplers: without a GPU 100,000 take half an hour */
  #ifdef QWEN3_TEST_CUDA_ON_CPU
    #define CUDA_DRAWS 1280
  #else
    #define CUDA_DRAWS 100000
  #endif
#endif

/* ---- comparing -------------------------------------------------------------------------------------- */
static double cuda_error(const float *a, const float *b, size_t n) {
    double difference = 0, size = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        difference += d * d;
        size += (double)b[i] * (double)b[i];
        if (!(d * d < 1e60)) return 1e30;       /* NaN, too */
    }
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}

/* Are these within one rounding to type of each other, apart from the error of a float32 sum? */
static int cuda_one_rounding(const float *a, const float *b, size_t n, qwen3i_type type, double error) {
    const double ulp = type == QWEN3I_F32 ? 0 : type == QWEN3I_F16 ? 1.0 / 1024 : 1.0 / 128;
    double size = 0;
    size_t i;
    for (i = 0; i < n; i++) size += (double)b[i] * (double)b[i];
    size = error * sqrt(size / (double)n);
    for (i = 0; i < n; i++)
        if (!(fabs((double)a[i] - (double)b[i]) <= ulp * fabs((double)b[i]) + size)) return 0;
    return 1;
}

static const char *cuda_type_name(qwen3i_type t) { return qwen3i_format_of(t)->name; }

/* ---- a model of one layer with random weights, on both sides ------------------------------------------ */
typedef struct lab {
    qwen3_model  model;
    qwen3i_layer layer, layers[64];      /* copies of it */
    qwen3_ctx_desc desc;
    qwen3i_exec  exec;
    qwen3i_pool  pool;
    void        *state, *ctx;
    int          kernels;               /* LAB_FUSED, or LAB_STANDARD */
    qwen3i_type  other;                 /* of v, up and down; 0: as all */
    void        *owned[32];
    int          n_owned;
    uint64_t     seed;
    char         text[256];
    qwen3i_err   err;
} lab;

typedef struct lab_shape {
    int n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, n_layer;
} lab_shape;

#define LAB_OK(l, call) CHECK_MSG((call) == QWEN3_OK, "%s: %s", #call, (l)->text)

static float lab_random(uint64_t *seed, float size) {
    return size * ((float)(int)(test_random(seed) & 0xFFFF) / 32768.0f - 1.0f);
}

/* n values that F16 holds exactly even after scaling by a power of two: eleven bits, about `size`, a power of two */
static float *lab_values(lab *l, size_t n, float size) {
    float *v = floats(n);
    size_t i;
    for (i = 0; i < n; i++) v[i] = size * (float)((int)(test_random(&l->seed) % 2047) - 1023) / 512.0f;
    return v;
}

static void *lab_own(lab *l, void *p) { return l->owned[l->n_owned++] = p; }

typedef struct lab_filling { const lab *l; qwen3i_matrix m; float size; uint64_t seed; } lab_filling;

/* Every row has random numbers of its own, so that any thread may fill it. */
static void lab_fill_rows(void *args, int begin, int end, int lane) {
    const lab_filling *f = (const lab_filling *)args;
    const size_t cols = (size_t)f->m.cols, row_bytes = cols * qwen3i_type_size(f->m.type);
    float *v = floats(cols);
    size_t r, i;
    (void)lane;
    for (r = (size_t)begin; r < (size_t)end; r++) {
        uint64_t seed = (f->seed + r) * 0x9E3779B97F4A7C15u;
        seed ^= seed >> 29;
        for (i = 0; i < cols; i++) v[i] = lab_random(&seed, f->size) * ((r * cols + i) % 97 == 0 ? 4.0f : 1.0f);
        f->l->exec.simd->store((char *)(uintptr_t)f->m.data + r * row_bytes, v, f->m.type, f->m.cols);
    }
    free(v);
}

static qwen3i_matrix lab_matrix(lab *l, int rows, int cols, qwen3i_type type, float size) {
    lab_filling f;
    if (qwen3i_is_block(type)) {
        f.m = formats_matrix(type, rows, cols);
        lab_own(l, (void *)(uintptr_t)f.m.data);
        return f.m;
    }
    f.l = l;
    f.size = size;
    f.seed = (uint64_t)test_random(&l->seed) << 31;
    f.m.rows = rows;
    f.m.cols = cols;
    f.m.type = type;
    f.m.factor = 0;
    f.m.data = lab_own(l, malloc((size_t)rows * (size_t)cols * qwen3i_type_size(type)));
    qwen3i_parallel(&l->pool, rows, 16, lab_fill_rows, &f);
    return f.m;
}

static const float *lab_gain(lab *l, int n, float size) {
    float *v = (float *)lab_own(l, floats((size_t)n));
    int i;
    for (i = 0; i < n; i++) v[i] = i % 13 == 0 ? size : 1.0f + lab_random(&l->seed, 0.5f);
    return v;
}

static void lab_weights(lab *l, const lab_shape *s, qwen3i_type type) {
    int q = s->n_head * s->head_dim, kv = s->n_head_kv * s->head_dim, i;
    float in = 2.0f / sqrtf((float)s->n_embd);
    const qwen3i_type other = l->other ? l->other : type;
    l->layer.attn_norm = lab_gain(l, s->n_embd, 8);
    l->layer.mlp_norm = lab_gain(l, s->n_embd, 8);
    l->layer.q_norm = lab_gain(l, s->head_dim, 2);
    l->layer.k_norm = lab_gain(l, s->head_dim, 8);
    l->layer.wq = lab_matrix(l, q, s->n_embd, type, in);
    l->layer.wk = lab_matrix(l, kv, s->n_embd, type, in);
    l->layer.wv = lab_matrix(l, kv, s->n_embd, other, in);
    l->layer.wo = lab_matrix(l, s->n_embd, q, type, 2.0f / sqrtf((float)q));
    l->layer.w_gate = lab_matrix(l, s->n_ff, s->n_embd, type, in);
    l->layer.w_up = lab_matrix(l, s->n_ff, s->n_embd, other, in);
    l->layer.w_down = lab_matrix(l, s->n_embd, s->n_ff, other, 2.0f / sqrtf((float)s->n_ff));
    l->model.weights.embed = lab_matrix(l, s->n_vocab, s->n_embd, type, 1);
    l->model.weights.head =
        s->n_vocab > 100000 ? l->model.weights.embed : lab_matrix(l, s->n_vocab, s->n_embd, type, in);
    l->model.weights.final_norm = lab_gain(l, s->n_embd, 8);
    for (i = 0; i < 64; i++) l->layers[i] = l->layer;
    l->model.weights.layers = l->layers;
}

/* The model; the CPU's side of it on every processor if it is as large as a real one. */
static int lab_load_by(lab *l, const lab_shape *s, qwen3i_type type, qwen3i_type other, int flags) {
    qwen3_ctx_desc desc = ctx_desc(0, 0, 0, 0);
    qwen3_load_desc load;
    qwen3i_config *c = &l->model.config;
    memset(l, 0, sizeof *l);
    l->other = other;
    memset(&load, 0, sizeof load);
    load.flags = flags;
    l->seed = 7 + (uint64_t)s->n_embd;
    l->err.text = l->text;
    l->err.cap = sizeof l->text;
    l->exec.simd = qwen3i_simd_level(0);
    l->exec.pool = &l->pool;
    c->n_layer = s->n_layer;
    c->n_embd = s->n_embd;
    c->n_head = s->n_head;
    c->n_head_kv = s->n_head_kv;
    c->head_dim = s->head_dim;
    c->n_ff = s->n_ff; c->n_vocab = s->n_vocab;
    c->rms_eps = 1e-6f;
    c->rope_theta = 1e6;
    desc.threads = s->n_embd < 1024;
    if (!LAB_OK(l, qwen3i_pool_create(&l->pool, &desc, &l->err))) return 0;
    l->exec.panels = (qwen3i_panels *)(void *)lab_own(l, floats((size_t)l->pool.n_lanes * sizeof(qwen3i_panels) / 4));
    l->exec.parts = (qwen3i_rounded *)(void *)lab_own(l, floats((size_t)20 * 256 * 1024));
    lab_weights(l, s, type);
    return LAB_OK(l, qwen3_cuda_backend()->model_create(&l->state, &l->model, &load, &l->err));
}

static int lab_load_mixed(lab *l, const lab_shape *s, qwen3i_type type, qwen3i_type other) { return lab_load_by(l, s, type, other, 0); }
static int lab_load(lab *l, const lab_shape *s, qwen3i_type type) { return lab_load_mixed(l, s, type, QWEN3I_NO_TYPE); }

static const qwen3_backend *lab_backend(int kernels) {
    return kernels == LAB_STANDARD ? cuda_lab_standard() : qwen3_cuda_backend();
}

static int lab_context(lab *l, const qwen3_ctx_desc *desc) {
    l->desc = *desc;
    l->model.config.max_ctx = desc->max_ctx;
    return LAB_OK(l, lab_backend(l->kernels)->ctx_create(&l->ctx, l->state, &l->model, desc, &l->err));
}

static int lab_choose_context(lab *l, const qwen3_ctx_desc *desc, int kernels) {
    l->kernels = kernels;
    return lab_context(l, desc);
}

static int lab_open(lab *l, const lab_shape *s, qwen3i_type type, const qwen3_ctx_desc *desc) {
    return lab_load(l, s, type) && lab_context(l, desc);
}

static void lab_close(lab *l) {
    const qwen3_backend *b = qwen3_cuda_backend();
    int i;
    b->ctx_free(l->ctx);
    b->model_free(l->state);
    qwen3i_pool_destroy(&l->pool);
    for (i = 0; i < l->n_owned; i++) free(l->owned[i]);
}

/* Rows 0 .. n - 1: n_seqs sequences that follow `before` positions each */
typedef struct lab_rows { qwen3_token tokens[2100]; int32_t seqs[2100], positions[2100]; qwen3i_batch batch; } lab_rows;

static void lab_make_rows(lab *l, lab_rows *r, int n, int n_seqs, int before) {
    int i;
    memset(&r->batch, 0, sizeof r->batch);
    for (i = 0; i < n; i++) {
        r->seqs[i] = (int32_t)((long)i * n_seqs / n);
        r->positions[i] = i > 0 && r->seqs[i] == r->seqs[i - 1] ? r->positions[i - 1] + 1 : before + 3 * r->seqs[i];
        r->tokens[i] = random_below(&l->seed, l->model.config.n_vocab);
    }
    r->batch.tokens = r->tokens;
    r->batch.seqs = r->seqs;
    r->batch.positions = r->positions;
    r->batch.n_rows = n;
    LAB_OK(l, cuda_lab()->rows(l->ctx, &r->batch, &l->err));
}

static void lab_run(lab *l, lab_op op) {
    LAB_OK(l, cuda_lab()->run(l->ctx, op, 0, 1, NULL, &l->err));
}
static void lab_put(lab *l, lab_buffer b, const float *v) {
    LAB_OK(l, cuda_lab()->put(l->ctx, b, v, &l->err));
}
static void lab_get(lab *l, lab_buffer b, float *v) {
    LAB_OK(l, cuda_lab()->get(l->ctx, b, v, &l->err));
}

/* What a buffer holds against what it should, then both are freed. */
static void lab_check(lab *l, const char *what, lab_buffer b, float *want, int rows, int width, double limit) {
    float *got = floats((size_t)rows * (size_t)width);
    double e;
    lab_get(l, b, got);
    e = cuda_error(got, want, (size_t)rows * (size_t)width);
    if (test_verbose) printf("    %-10s %4d rows, width %5d: %.2e\n", what, rows, width, e);
    CHECK_MSG(e <= limit, "%s, %d rows, width %d, head_dim %d, %s cache, %s: error %.3g", what, rows, width,
              l->model.config.head_dim, cuda_type_name((qwen3i_type)l->desc.kv_type),
              l->kernels ? "standard" : "fused", e);
    free(got);
    free(want);
}

/* A flat [n, n_head_kv, head_dim] to one sequence of the CPU's cache, [n_head_kv, max_ctx, head_dim]. */
static void lab_spread(const lab *l, char *cache, const char *flat, int n) {
    size_t heads = (size_t)l->model.config.n_head_kv,
           row = (size_t)l->model.config.head_dim * qwen3i_type_size((qwen3i_type)l->desc.kv_type), h;
    int p;
    for (p = 0; p < n; p++)
        for (h = 0; h < heads; h++)
            memcpy(cache + (h * (size_t)l->desc.max_ctx + (size_t)p) * row, flat + ((size_t)p * heads + h) * row, row);
}

/* Random keys and values at positions [0, n) of all sequences: on the device, and in k and v as the CPU has them. */
static void lab_fill_cache(lab *l, int n, char **k, char **v) {
    const qwen3i_type type = (qwen3i_type)l->desc.kv_type;
    size_t kv_dim = (size_t)(l->model.config.n_head_kv * l->model.config.head_dim), size = qwen3i_type_size(type);
    size_t each = (size_t)l->desc.max_ctx * kv_dim * size, count = (size_t)n * kv_dim;
    char *flat_k = (char *)malloc(count * size), *flat_v = (char *)malloc(count * size);
    int s;
    *k = (char *)calloc((size_t)l->desc.max_seqs, each);
    *v = (char *)calloc((size_t)l->desc.max_seqs, each);
    for (s = 0; s < l->desc.max_seqs; s++) {
        float *x = lab_values(l, count, 2), *y = lab_values(l, count, 1);
        l->exec.simd->store(flat_k, x, type, (int)count);
        l->exec.simd->store(flat_v, y, type, (int)count);
        lab_spread(l, *k + (size_t)s * each, flat_k, n);
        lab_spread(l, *v + (size_t)s * each, flat_v, n);
        LAB_OK(l, qwen3_cuda_backend()->kv_write(l->ctx, s, 0, n, flat_k, flat_v, &l->err));
        free(x);
        free(y);
    }
    free(flat_k);
    free(flat_v);
}

/* ---- each operation ------------------------------------------------------------------------------------- */
static int lab_own_products(const lab *l, int n) { return cuda_lab()->own_products(l->ctx, n); }

static double lab_exact(const lab *l, int n) {
    return (n > 8 || l->kernels == LAB_STANDARD) && !lab_own_products(l, n) ? CUDA_PRODUCT : CUDA_EXACT;
}

/* Of a product: with weights in blocks its input has whole numbers of 16 bits for up to four rows; for more it is
   rounded, for many the weights are, too. */
static double lab_product(const lab *l, int n) {
    if (!qwen3i_is_block(l->layer.wq.type) && !qwen3i_is_block(l->layer.wv.type)) return lab_exact(l, n);
    if (lab_own_products(l, n)) return 2 * CUDA_ROUNDED;
    return n > (l->desc.invariant ? 0 : 4) || l->kernels == LAB_STANDARD ? CUDA_ROUNDED : CUDA_INTS;
}

static int lab_rounds(const lab *l, int n);

/* Of silu(gate) * up: two of them. */
static double lab_products(const lab *l, int n) {
    const double limit = 2 * lab_product(l, n);
    return lab_rounds(l, n) && limit < CUDA_ROUNDED ? CUDA_ROUNDED : limit;
}

static int lab_rounds(const lab *l, int n) {
    return l->layer.wq.type != QWEN3I_F32 &&
           (n > 8 || lab_own_products(l, n) || l->kernels == LAB_STANDARD);
}

/* With these kernels q and what attention gives are rounded once, as the cache is, if that is F16. */
static int lab_halves(const lab *l, int n) {
    return n > 64 && lab_own_products(l, n) && l->desc.kv_type == QWEN3_KV_F16;
}

static void lab_check_embed(lab *l, const lab_rows *r) {
    int n = r->batch.n_rows, width = l->model.config.n_embd;
    float *want = floats((size_t)n * (size_t)width);
    qwen3i_embed(&l->exec, want, &l->model.weights.embed, r->tokens, n);
    lab_run(l, LAB_EMBED);
    lab_check(l, "embed", LAB_X, want, n, width, 0);
}

/* RMSNorm of a row x of the residual, in double: float32 sums over rows as wide as real ones would put nearly as much
   error into what is wanted as is allowed. */
static void lab_norm_row(const lab *l, double *y, const float *x, const float *gain) {
    const int width = l->model.config.n_embd;
    double sum = 0;
    int i;
    for (i = 0; i < width; i++) sum += (double)x[i] * (double)x[i];
    sum = 1 / sqrt(sum / width + (double)l->model.config.rms_eps);
    for (i = 0; i < width; i++) y[i] = (double)x[i] * sum * (double)gain[i];
}

static void lab_check_norm(lab *l, int n, float size) {
    const int width = l->model.config.n_embd;
    float *x = lab_values(l, (size_t)n * (size_t)width, size), *want = floats((size_t)n * (size_t)width);
    double *y = (double *)malloc((size_t)width * sizeof *y);
    int i, k;
    for (i = 0; i < n; i++) {
        const size_t row = (size_t)i * (size_t)width;
        lab_norm_row(l, y, x + row, l->layer.attn_norm);
        for (k = 0; k < width; k++) want[row + (size_t)k] = (float)y[k];
    }
    lab_put(l, LAB_X, x);
    lab_run(l, LAB_NORM);
    lab_check(l, "norm", LAB_H, want, n, width, lab_rounds(l, n) ? CUDA_ROUNDED : lab_exact(l, n));
    free(x);
    free(y);
}

/* One layer's k or v of the rows, as the device has them and as floats. */
static float *lab_cached(lab *l, const lab_rows *r, int layer, int value) {
    const qwen3_backend *b = qwen3_cuda_backend();
    size_t kv_dim = (size_t)(l->model.config.n_head_kv * l->model.config.head_dim),
           size = qwen3i_type_size((qwen3i_type)l->desc.kv_type);
    char *k = (char *)malloc((size_t)l->desc.max_ctx * kv_dim * size),
         *v = (char *)malloc((size_t)l->desc.max_ctx * kv_dim * size);
    float *out = floats((size_t)r->batch.n_rows * kv_dim);
    int i, end;
    for (i = 0; i < r->batch.n_rows; i++) {
        for (end = i; end + 1 < r->batch.n_rows && r->seqs[end + 1] == r->seqs[i];) end++;
        if (i == 0 || r->seqs[i] != r->seqs[i - 1])
            LAB_OK(l, b->kv_read(l->ctx, r->seqs[i], layer, r->positions[end] + 1, k, v, &l->err));
        l->exec.simd->load(out + (size_t)i * kv_dim, (value ? v : k) + (size_t)r->positions[i] * kv_dim * size,
                           (qwen3i_type)l->desc.kv_type, (int)kv_dim);
    }
    free(k);
    free(v);
    return out;
}

/* Norm and product as a step does them, where the product may norm its input itself, beside the CPU's. */
static void lab_check_normed_mlp(lab *l, int n) {
    const qwen3i_config *c = &l->model.config;
    const size_t size = (size_t)n * (size_t)c->n_embd;
    float *x = lab_values(l, size, 3), *h = floats(size), *want = floats((size_t)n * (size_t)c->n_ff);
    qwen3i_rmsnorm(&l->exec, h, x, l->layer.mlp_norm, n, c->n_embd, c->rms_eps);
    qwen3i_swiglu(&l->exec, want, &l->layer.w_gate, &l->layer.w_up, h, n);
    lab_put(l, LAB_X, x);
    lab_run(l, LAB_NORM_MLP);
    lab_check(l, "norm, mlp", LAB_M, want, n, c->n_ff, lab_products(l, n));
    free(x);
    free(h);
}

/* From h; or, normed, from x as a step does it. */
static void lab_check_qkv(lab *l, const lab_rows *r, int normed) {
    const qwen3i_config *c = &l->model.config;
    const qwen3i_type kv = (qwen3i_type)l->desc.kv_type;
    int n = r->batch.n_rows, q_dim = c->n_head * c->head_dim, kv_dim = c->n_head_kv * c->head_dim,
        half = c->head_dim / 2, i;
    float *h = lab_values(l, (size_t)n * (size_t)c->n_embd, 1), *q = floats((size_t)n * (size_t)q_dim), *got;
    float *x = lab_values(l, (size_t)n * (size_t)c->n_embd, 3);
    float *k = floats((size_t)n * (size_t)kv_dim), *v = floats((size_t)n * (size_t)kv_dim);
    float *cosines = floats((size_t)n * (size_t)half), *sines = floats((size_t)n * (size_t)half), freqs[128], scale;
    if (normed) qwen3i_rmsnorm(&l->exec, h, x, l->layer.attn_norm, n, c->n_embd, c->rms_eps);
    qwen3i_matmul_qkv(&l->exec, q, k, v, &l->layer, h, n);
    scale = qwen3i_rope_freqs(freqs, c, 0);
    qwen3i_rope_angles(cosines, sines, r->positions, n, freqs, half, scale);
    for (i = 0; i < n; i++) {
        float *qi = q + (size_t)i * (size_t)q_dim, *ki = k + (size_t)i * (size_t)kv_dim;
        qwen3i_rmsnorm_heads(l->exec.simd, qi, l->layer.q_norm, c->n_head, c->head_dim, c->rms_eps);
        qwen3i_rmsnorm_heads(l->exec.simd, ki, l->layer.k_norm, c->n_head_kv, c->head_dim, c->rms_eps);
        qwen3i_rope(qi, cosines + (size_t)i * (size_t)half, sines + (size_t)i * (size_t)half, c->n_head, c->head_dim);
        qwen3i_rope(ki, cosines + (size_t)i * (size_t)half, sines + (size_t)i * (size_t)half, c->n_head_kv,
                    c->head_dim);
    }
    lab_put(l, normed ? LAB_X : LAB_H, normed ? x : h);
    lab_run(l, normed ? LAB_NORM_QKV : LAB_QKV_ROPE);
    lab_check(l, normed ? "norm, q" : "q", LAB_Q, q, n, q_dim,
              normed && lab_rounds(l, n) ? 2 * CUDA_ROUNDED :
              lab_halves(l, n) && lab_product(l, n) < CUDA_ROUNDED ? CUDA_ROUNDED : (1 + 3 * normed) * lab_product(l, n));
    free(x);
    if (normed) { free(h); free(k); free(v); free(cosines); free(sines); return; }
    got = lab_cached(l, r, 0, 0);
    const double cache = (qwen3i_is_block(l->layer.wq.type) ? 20 : 5) * lab_product(l, n);  /* the gains are in it */
    CHECK_MSG(cuda_one_rounding(got, k, (size_t)n * (size_t)kv_dim, kv, cache),
              "k, %d rows: more than one rounding to %s", n, cuda_type_name(kv));
    free(got);
    got = lab_cached(l, r, 0, 1);
    CHECK_MSG(cuda_one_rounding(got, v, (size_t)n * (size_t)kv_dim, kv, cache),
              "v, %d rows: more than one rounding to %s", n, cuda_type_name(kv));
    free(got); free(h); free(k); free(v); free(cosines); free(sines);
}

/* Up to 64 rows that need no tiles of attention, because they are few or each is of another sequence: it gives F16 */
static int lab_own_halves(const lab *l, const lab_rows *r) {
    int n = r->batch.n_rows, i, same = 0;
    for (i = 1; i < n; i++) same += r->seqs[i] == r->seqs[i - 1];
    return (n <= 8 || same == 0) && lab_own_products(l, n) && l->desc.kv_type == QWEN3_KV_F16;
}

static void lab_check_attention(lab *l, const lab_rows *r, float size) {
    const qwen3i_config *c = &l->model.config;
    int n = r->batch.n_rows, q_dim = c->n_head * c->head_dim, i, top = 0;
    float *q = lab_values(l, (size_t)n * (size_t)q_dim, size), *want = floats((size_t)n * (size_t)q_dim);
    float *scratch = floats((size_t)l->pool.n_lanes * qwen3i_attention_scratch(l->desc.max_ctx, c->head_dim));
    char *k, *v;
    qwen3i_attention_args a;
    for (i = 0; i < n; i++) top = qwen3i_max(top, r->positions[i]);
    lab_fill_cache(l, top + 1, &k, &v);
    memset(&a, 0, sizeof a);
    a.a = want; a.q = q; a.k = k; a.v = v; a.type = (qwen3i_type)l->desc.kv_type;
    a.seqs = r->seqs; a.positions = r->positions; a.n = n;
    a.n_head = c->n_head; a.n_head_kv = c->n_head_kv; a.head_dim = c->head_dim; a.max_ctx = l->desc.max_ctx;
    a.scratch = scratch;
    qwen3i_attention(&l->exec, &a);
    lab_put(l, LAB_Q, q);
    lab_run(l, LAB_ATTENTION);
    lab_check(l, "attention", LAB_A, want, n, q_dim,
              lab_halves(l, n) || lab_own_halves(l, r) ? CUDA_ROUNDED : 2 * CUDA_EXACT);    /* the twin's own error is in it */
    free(q); free(scratch); free(k); free(v);
}

static void lab_check_add(lab *l, const char *what, lab_op op, lab_buffer from, const qwen3i_matrix *w,
                          int n, float size) {
    int width = l->model.config.n_embd;
    float *x = lab_values(l, (size_t)n * (size_t)width, 1), *in = lab_values(l, (size_t)n * (size_t)w->cols, size);
    lab_put(l, LAB_X, x);
    lab_put(l, from, in);
    lab_run(l, op);
    qwen3i_matmul_add(&l->exec, x, w, in, n);
    lab_check(l, what, LAB_X, x, n, width, lab_product(l, n));
    free(in);
}

static void lab_check_mlp(lab *l, int n, float size) {
    const qwen3i_config *c = &l->model.config;
    float *h = lab_values(l, (size_t)n * (size_t)c->n_embd, size), *want = floats((size_t)n * (size_t)c->n_ff);
    qwen3i_swiglu(&l->exec, want, &l->layer.w_gate, &l->layer.w_up, h, n);
    lab_put(l, LAB_H, h);
    lab_run(l, LAB_MLP);
    lab_check(l, "mlp", LAB_M, want, n, c->n_ff, lab_products(l, n));
    free(h);
}

/* The logits of n rows x, in double, too */
typedef struct lab_head { const lab *l; const double *h; float *want; int n; } lab_head;

static void lab_head_rows(void *args, int begin, int end, int lane) {
    const lab_head *a = (const lab_head *)args;
    const qwen3i_matrix *w = &a->l->model.weights.head;
    const size_t cols = (size_t)w->cols;
    float *row = floats(cols);
    int r, i;
    size_t k;
    (void)lane;
    for (r = begin; r < end; r++) {
        const char *data = (const char *)w->data + (size_t)r * (size_t)qwen3i_row_bytes(w->type, w->cols);
        a->l->exec.simd->load(row, data, w->type, w->cols);
        for (i = 0; i < a->n; i++) {
            double sum = 0;
            for (k = 0; k < cols; k++) sum += a->h[(size_t)i * cols + k] * (double)row[k];
            a->want[(size_t)i * (size_t)w->rows + (size_t)r] = (float)sum;
        }
    }
    free(row);
}

static float *lab_logits(lab *l, const float *x, int n) {
    const qwen3i_config *c = &l->model.config;
    const size_t width = (size_t)c->n_embd;
    double *h = (double *)malloc((size_t)n * width * sizeof *h);
    lab_head a;
    size_t i;
    for (i = 0; i < (size_t)n; i++) lab_norm_row(l, h + i * width, x + i * width, l->model.weights.final_norm);
    a.l = l;
    a.h = h;
    a.want = floats((size_t)n * (size_t)c->n_vocab);
    a.n = n;
    qwen3i_parallel(&l->pool, c->n_vocab, 16, lab_head_rows, &a);
    free(h);
    return a.want;
}

static void lab_check_head(lab *l, lab_rows *r) {
    const qwen3i_config *c = &l->model.config;
    int n = qwen3i_min(r->batch.n_rows, 64), i;
    float *x = lab_values(l, (size_t)r->batch.n_rows * (size_t)c->n_embd, 1);
    qwen3i_out outs[64];
    memset(outs, 0, sizeof outs);
    for (i = 0; i < n; i++) { outs[i].row = i; outs[i].keep_seq = -1; }
    r->batch.outs = outs;
    r->batch.n_outs = n;
    LAB_OK(l, cuda_lab()->rows(l->ctx, &r->batch, &l->err));
    lab_put(l, LAB_X, x);
    lab_run(l, LAB_HEAD);
    if (r->batch.n_rows <= 64)
        lab_check(l, "head", LAB_LOGITS, lab_logits(l, x, n), n, c->n_vocab,
                  lab_rounds(l, n) ? CUDA_ROUNDED : lab_product(l, n));
    free(x);
}

/* Everything in a context of its own */
static void lab_check_rows(lab *l, int kv_type, int kernels, int n, int n_seqs, int before) {
    const qwen3i_config *c = &l->model.config;
    qwen3_ctx_desc desc = ctx_desc(before + n + 3 * n_seqs + 40, n_seqs, qwen3i_max(n, 1), kv_type);
    lab_rows *r = (lab_rows *)malloc(sizeof *r);
    l->kernels = kernels;
    if (test_verbose)
        printf("  %d x %d/%d x %d, ff %d, %s weights, %s cache, %s, %d rows of %d after %d\n", c->n_embd, c->n_head,
               c->n_head_kv, c->head_dim, c->n_ff, cuda_type_name(l->layer.wq.type),
               cuda_type_name((qwen3i_type)kv_type), kernels ? "standard" : "fused", n, n_seqs, before);
    if (lab_context(l, &desc)) {
        lab_make_rows(l, r, n, n_seqs, before);
        lab_check_embed(l, r);
        lab_check_norm(l, n, 1);
        lab_check_norm(l, n, 20000);
        lab_check_norm(l, n, 1e-4f);
        lab_check_normed_mlp(l, n);
        lab_check_qkv(l, r, 1);
        lab_check_qkv(l, r, 0);
        lab_check_attention(l, r, 1);
        lab_check_attention(l, r, 8);
        lab_check_add(l, "o_proj", LAB_O_PROJ, LAB_A, &l->layer.wo, n, 1);
        lab_check_mlp(l, n, 1);
        lab_check_mlp(l, n, 1024);              /* products far beyond 65504 */
        lab_check_add(l, "down", LAB_DOWN, LAB_M, &l->layer.w_down, n, 1);
        lab_check_add(l, "down", LAB_DOWN, LAB_M, &l->layer.w_down, n, 1048576.0f);
        if (n > 32 && n <= 64 && n_seqs < n) {      /* logits of more than 32 rows at once take as many sequences */
            qwen3_cuda_backend()->ctx_free(l->ctx);
            desc.max_seqs = n;
            if (lab_context(l, &desc)) lab_make_rows(l, r, n, n_seqs, before);
        }
        if (l->ctx) lab_check_head(l, r);
    }
    qwen3_cuda_backend()->ctx_free(l->ctx);
    l->ctx = NULL;
    free(r);
}

static void lab_check_all(const lab_shape *s, qwen3i_type type, int kv_type, int kernels, int n, int n_seqs,
                          int before) {
    lab *l = (lab *)malloc(sizeof *l);
    if (lab_load(l, s, type)) lab_check_rows(l, kv_type, kernels, n, n_seqs, before);
    lab_close(l);
    free(l);
}

/* Every format, or every step-th, alone and beside another, with these rows. */
static void lab_check_blocks(const lab_shape *s, const lab_shape *odd, int n, int n_seqs, int step) {
    for (int type = QWEN3I_BF16 + 1; type < QWEN3I_N_TYPES; type += step) {
        const int other = type + 5 < QWEN3I_N_TYPES ? type + 5 : type - 13, mixed = (type + n) % 2;
        lab *l = (lab *)malloc(sizeof *l);
        if (lab_load_mixed(l, type >= QWEN3I_FP8 && !mixed ? odd : s, (qwen3i_type)type, (qwen3i_type)(mixed ? other : 0)))
            lab_check_rows(l, n % 2 ? QWEN3_KV_F16 : QWEN3_KV_F32, LAB_FUSED, n, n_seqs, 5);
        lab_close(l);
        free(l);
    }
}

static const lab_shape lab_small = {48, 4, 2, 16, 80, 100, 1}, lab_odd = {37, 6, 2, 24, 51, 77, 1},
                       lab_wide = {520, 10, 2, 128, 600, 150, 1}, lab_mid = {64, 8, 1, 64, 96, 130, 1},
                       lab_real = {1024, 16, 8, 128, 3072, 512, 1};

static void test_cuda_kernels_fused(void) {
    lab_check_all(&lab_small, QWEN3I_F32,  QWEN3_KV_F32,  LAB_FUSED, 1, 1, 0);
    lab_check_all(&lab_small, QWEN3I_F16,  QWEN3_KV_F16,  LAB_FUSED, 2, 1, 62);
    lab_check_all(&lab_small, QWEN3I_BF16, QWEN3_KV_BF16, LAB_FUSED, 3, 3, 63);
    lab_check_all(&lab_odd,   QWEN3I_F32,  QWEN3_KV_F16,  LAB_FUSED, 5, 2, 64);
    lab_check_all(&lab_odd,   QWEN3I_BF16, QWEN3_KV_F32,  LAB_FUSED, 8, 8, 130);
    lab_check_all(&lab_odd,   QWEN3I_BF16, QWEN3_KV_F32,  LAB_FUSED, 9, 1, 20);
    lab_check_all(&lab_wide,  QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 1, 1, 999);
    lab_check_all(&lab_wide,  QWEN3I_F16,  QWEN3_KV_BF16, LAB_FUSED, 4, 4, 65);
    lab_check_all(&lab_mid,   QWEN3I_F32,  QWEN3_KV_BF16, LAB_FUSED, 6, 1, 0);
    lab_check_all(&lab_mid,   QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 7, 7, 31);
}

#ifdef QWEN3_TEST_CUDA_ON_CPU
extern void cuda_on_cpu_chip(int capability);
extern void cuda_on_cpu_size(int multiprocessors);
#else
static void cuda_on_cpu_chip(int capability) { (void)capability; }
static void cuda_on_cpu_size(int multiprocessors) { (void)multiprocessors; }
#endif

/* Weights in blocks: a whole tile and a part of one, blocks that are not full, matrices of other formats below. */
static void test_cuda_kernels_blocks(void) {
    static const lab_shape shape = {256, 4, 2, 64, 1280, 100, 1}, odd = {328, 4, 2, 24, 1100, 77, 1};
    lab_check_blocks(&shape, &odd, 1, 1, 1);
    lab_check_blocks(&shape, &odd, 2, 1, 3);
    lab_check_blocks(&shape, &odd, 9, 3, 1);
}

/* Every format at the row counts where one kernel takes over from another. */
static void test_cuda_kernels_blocks_rows(void) {
    static const lab_shape shape = {256, 2, 1, 64, 256, 64, 1};
    static const int rows[] = {2, 8, 63, 64, 65};
    for (int i = 0; i < (int)QWEN3I_COUNT(rows); i++) lab_check_blocks(&shape, &shape, rows[i], 1, 1);
}

/* The same where there are kernels for Hopper: from two rows on through F16. */
static void test_cuda_kernels_hopper_blocks(void) {
    static const lab_shape shape = {256, 2, 1, 128, 256, 300, 1};
    cuda_on_cpu_chip(90);
    lab_check_blocks(&shape, &shape, 67, 2, 5);
    lab_check_blocks(&shape, &shape, 64, 64, 7);
    lab_check_blocks(&shape, &shape, 5, 5, 4);
    cuda_on_cpu_chip(80);
}

/* One row at a time: their weights are on their way before their input exists. */
static void test_cuda_kernels_one(void) {
    cuda_on_cpu_chip(90);
    lab_check_all(&lab_small, QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 1, 1, 30);
    lab_check_all(&lab_odd,   QWEN3I_F16,  QWEN3_KV_F32,  LAB_FUSED, 1, 1, 7);
    lab_check_all(&lab_mid,   QWEN3I_BF16, QWEN3_KV_BF16, LAB_FUSED, 1, 1, 200);
    lab_check_all(&lab_wide,  QWEN3I_F16,  QWEN3_KV_F16,  LAB_FUSED, 1, 1, 300);
    cuda_on_cpu_chip(80);
}

/* Few rows where clusters of blocks have heads and positions: one cluster and several, rows that see each other, groups
   that do not fill their blocks. */
static void test_cuda_kernels_clusters(void) {
    static const lab_shape pairs = {256, 4, 2, 128, 384, 128, 1}, threes = {256, 6, 2, 128, 256, 128, 1},
                           ones = {128, 2, 2, 128, 256, 128, 1}, narrow = {128, 2, 1, 64, 256, 128, 1};
    cuda_on_cpu_chip(90);
    cuda_on_cpu_size(40);
    lab_check_all(&pairs,  QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 1, 1, 0);
    lab_check_all(&pairs,  QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 1, 1, 544);
    lab_check_all(&pairs,  QWEN3I_F16,  QWEN3_KV_BF16, LAB_FUSED, 1, 1, 2500);
    lab_check_all(&pairs,  QWEN3I_F16,  QWEN3_KV_F32,  LAB_FUSED, 2, 1, 127);
    lab_check_all(&pairs,  QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 3, 2, 1023);
    lab_check_all(&threes, QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 1, 1, 63);
    lab_check_all(&ones,   QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 1, 1, 1300);
    lab_check_all(&narrow, QWEN3I_BF16, QWEN3_KV_BF16, LAB_FUSED, 1, 1, 30);
    cuda_on_cpu_size(5);
    cuda_on_cpu_chip(80);
}

static void test_cuda_kernels_batched(void) {
    lab_check_all(&lab_wide,  QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 65, 1, 0);
    lab_check_all(&lab_wide,  QWEN3I_F32,  QWEN3_KV_BF16, LAB_FUSED, 17, 1, 64);
    lab_check_all(&lab_mid,   QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 63, 3, 5);
    lab_check_all(&lab_mid,   QWEN3I_F16,  QWEN3_KV_BF16, LAB_FUSED, 30, 2, 33);
    lab_check_all(&lab_mid,   QWEN3I_F16,  QWEN3_KV_F16,  LAB_FUSED, 12, 12, 40);
    lab_check_all(&lab_odd,   QWEN3I_F16,  QWEN3_KV_F16,  LAB_FUSED, 40, 2, 7);
}

/* The smallest shapes that go through the kernels for Hopper, where there is one. */
static void test_cuda_kernels_hopper(void) {
    static const lab_shape shape = {256, 4, 2, 128, 384, 128, 1}, tiles_of_160 = {640, 2, 1, 128, 128, 128, 1},
                           threes = {256, 6, 2, 128, 256, 128, 1};
    cuda_on_cpu_chip(90);
    lab_check_all(&threes, QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 200, 2, 77);
    lab_check_all(&tiles_of_160, QWEN3I_BF16, QWEN3_KV_F16, LAB_FUSED, 65, 1, 0);
    lab_check_all(&tiles_of_160, QWEN3I_BF16, QWEN3_KV_BF16, LAB_FUSED, 520, 2, 0);
    lab_check_all(&shape, QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 65, 1, 0);
    lab_check_all(&shape, QWEN3I_F16,  QWEN3_KV_F16,  LAB_FUSED, 130, 3, 100);
    lab_check_all(&shape, QWEN3I_F16,  QWEN3_KV_BF16, LAB_FUSED, 66, 1, 5);
    lab_check_all(&shape, QWEN3I_BF16, QWEN3_KV_F32,  LAB_FUSED, 66, 2, 5);
    lab_check_all(&shape, QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 9, 9, 5);
    lab_check_all(&shape, QWEN3I_F16,  QWEN3_KV_BF16, LAB_FUSED, 33, 2, 5);
    lab_check_all(&shape, QWEN3I_BF16, QWEN3_KV_F32,  LAB_FUSED, 64, 64, 3);
    lab_check_all(&shape, QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 70, 70, 3);
#ifdef QWEN3_TEST_CUDA_ON_CPU           /* tiles of two parts, and of one after them: where the chip takes several turns */
    cuda_on_cpu_size(2);
    lab_check_all(&shape, QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 300, 2, 9);
    lab_check_all(&tiles_of_160, QWEN3I_F16, QWEN3_KV_BF16, LAB_FUSED, 66, 1, 0);
    cuda_on_cpu_size(5);
#else
    static const lab_shape large = {2048, 8, 4, 128, 1024, 128, 1}, mixed = {2304, 12, 4, 128, 1152, 128, 1};
    lab_check_all(&large,  QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 1281, 2, 100);
    lab_check_all(&large,  QWEN3I_F16,  QWEN3_KV_BF16, LAB_FUSED, 1300, 1, 0);
    lab_check_all(&mixed,  QWEN3I_BF16, QWEN3_KV_F16,  LAB_FUSED, 2000, 1, 0);
#endif
    cuda_on_cpu_chip(80);
}

/* ---- the rows that leave the last layer early ------------------------------------------------------------ */
/* Logits [n_outs, n_vocab] of every `each`-th row from `first` on, through all layers. */
static float *lab_forward(lab *l, lab_rows *r, int first, int each, int *n_outs) {
    static qwen3i_out outs[256];
    size_t vocab = (size_t)l->model.config.n_vocab;
    float *logits = floats(256 * vocab);
    int row;
    *n_outs = 0;
    memset(outs, 0, sizeof outs);
    for (row = first; row < r->batch.n_rows; row += each, ++*n_outs) {
        outs[*n_outs].row = row;
        outs[*n_outs].keep_seq = -1;
        outs[*n_outs].logits = logits + (size_t)*n_outs * vocab;
    }
    r->batch.outs = outs;
    r->batch.n_outs = *n_outs;
    LAB_OK(l, qwen3_cuda_backend()->forward(l->ctx, &r->batch, &l->err));
    return logits;
}

/* Whether all rows are wanted or few: the few are the same but for roundings, and the same twice. With none wanted k
   and v are stored nevertheless. */
static void lab_check_wanted(const lab_shape *s, int kv_type, int kernels, int n, int n_seqs) {
    static const int firsts[] = {0, 3, 1, 5}, steps[] = {1000, 20, 3, 2};
    const size_t vocab = (size_t)s->n_vocab, kv = (size_t)(n * s->n_head_kv * s->head_dim);
    qwen3_ctx_desc desc = ctx_desc(n + 3 * n_seqs + 40, n_seqs, n, kv_type);
    lab *l = (lab *)malloc(sizeof *l);
    lab_rows *r = (lab_rows *)malloc(sizeof *r);
    if (lab_load(l, s, QWEN3I_BF16) && lab_choose_context(l, &desc, kernels)) {
        float *none, *all, *v_none, *v_all;
        int count, i, k;
        lab_make_rows(l, r, n, n_seqs, 0);
        none = lab_forward(l, r, n, 1, &count);
        v_none = lab_cached(l, r, s->n_layer - 1, 1);
        all = lab_forward(l, r, 0, 1, &count);
        v_all = lab_cached(l, r, s->n_layer - 1, 1);
        CHECK(cuda_error(v_all, v_none, kv) == 0);
        for (i = 0; i < 4; i++) {
            const int first = qwen3i_min(firsts[i], n - 1);
            float *few = lab_forward(l, r, first, steps[i], &count), *again = lab_forward(l, r, first, steps[i], &count);
            CHECK(memcmp(few, again, (size_t)count * vocab * sizeof *few) == 0);
            for (k = 0; k < count; k++) {
                const int row = first + k * steps[i];
                const double e = cuda_error(few + (size_t)k * vocab, all + (size_t)row * vocab, vocab);
                if (test_verbose) printf("    %d of %d rows, row %d: %.2e\n", count, n, row, e);
                CHECK_MSG(e <= 2 * CUDA_ROUNDED, "%d of %d rows wanted, row %d: error %.3g", count, n, row, e);
            }
            free(few);
            free(again);
        }
        free(none); free(all); free(v_none); free(v_all);
    }
    lab_close(l);
    free(r);
    free(l);
}

static void test_cuda_wanted(void) {
    static const lab_shape shape = {256, 4, 2, 128, 384, 128, 2};
    cuda_on_cpu_chip(90);
    lab_check_wanted(&shape, QWEN3_KV_F16, LAB_FUSED, 150, 1);
    lab_check_wanted(&shape, QWEN3_KV_BF16, LAB_FUSED, 140, 2);
    lab_check_wanted(&shape, QWEN3_KV_F16, LAB_FUSED, 40, 2);
    cuda_on_cpu_chip(80);
    lab_check_wanted(&shape, QWEN3_KV_F16, LAB_FUSED, 70, 1);
    lab_check_wanted(&shape, QWEN3_KV_F32, LAB_STANDARD, 30, 3);
    lab_check_wanted(&lab_odd, QWEN3_KV_F16, LAB_FUSED, 7, 1);
}

/* A layer as a step goes through it, where products norm their input themselves, beside its operations one by one with the
   CPU's norms. */
static void lab_check_layer(const lab_shape *s, int kv_type, int n, int n_seqs) {
    static qwen3i_out outs[64];
    const size_t size = (size_t)n * (size_t)s->n_embd;
    qwen3_ctx_desc desc = ctx_desc(n + 3 * n_seqs + 40, n_seqs, n, kv_type);
    lab *l = (lab *)malloc(sizeof *l);
    lab_rows *r = (lab_rows *)malloc(sizeof *r);
    if (lab_open(l, s, QWEN3I_BF16, &desc)) {
        float *whole = floats(size), *x = floats(size), *h = floats(size);
        int i, k;
        lab_make_rows(l, r, n, n_seqs, 0);
        memset(outs, 0, sizeof outs);
        for (i = 0; i < n; i++) { outs[i].row = i; outs[i].keep_seq = -1; }
        r->batch.outs = outs;
        r->batch.n_outs = n;
        LAB_OK(l, qwen3_cuda_backend()->forward(l->ctx, &r->batch, &l->err));
        lab_get(l, LAB_X, whole);
        lab_run(l, LAB_EMBED);
        for (k = 0; k < 2; k++) {
            const float *gain = k ? l->layer.mlp_norm : l->layer.attn_norm;
            lab_get(l, LAB_X, x);
            qwen3i_rmsnorm(&l->exec, h, x, gain, n, s->n_embd, l->model.config.rms_eps);
            lab_put(l, LAB_H, h);
            lab_run(l, k ? LAB_MLP : LAB_QKV_ROPE);
            if (k == 0) lab_run(l, LAB_ATTENTION);
            lab_run(l, k ? LAB_DOWN : LAB_O_PROJ);
        }
        memcpy(x, whole, size * sizeof *x);
        free(whole);
        free(h);
        lab_check(l, "layer", LAB_X, x, n, s->n_embd, kv_type == QWEN3_KV_F32 ? CUDA_PRODUCT : CUDA_ROUNDED);
    }
    lab_close(l);
    free(r);
    free(l);
}

static void test_cuda_layer(void) {
    static const lab_shape shape = {256, 4, 2, 128, 384, 128, 1};
    cuda_on_cpu_chip(90);
    lab_check_layer(&shape, QWEN3_KV_F16, 1, 1);
    lab_check_layer(&shape, QWEN3_KV_F32, 2, 1);
    lab_check_layer(&shape, QWEN3_KV_F16, 2, 2);
    lab_check_layer(&shape, QWEN3_KV_BF16, 7, 3);
    lab_check_layer(&shape, QWEN3_KV_F16, 8, 8);
    lab_check_layer(&shape, QWEN3_KV_F16, 9, 9);
#ifndef QWEN3_TEST_CUDA_ON_CPU
    lab_check_layer(&lab_real, QWEN3_KV_F32, 2, 2);
    lab_check_layer(&lab_real, QWEN3_KV_F16, 8, 1);
    lab_check_layer(&lab_real, QWEN3_KV_F16, 60, 60);
#endif
    cuda_on_cpu_chip(80);
    lab_check_layer(&shape, QWEN3_KV_F32, 3, 1);
}

/* ---- two kernels a layer ---- */
/* A row's k or v to one sequence of the CPU's cache. */
static void lab_cache_row(const lab *l, char *cache, const float *row, int position) {
    const qwen3i_type type = (qwen3i_type)l->desc.kv_type;
    const size_t dim = (size_t)l->model.config.head_dim, size = dim * qwen3i_type_size(type);
    int h;
    for (h = 0; h < l->model.config.n_head_kv; h++)
        l->exec.simd->store(cache + ((size_t)h * (size_t)l->desc.max_ctx + (size_t)position) * size,
                            row + (size_t)h * dim, type, (int)dim);
}

/* x += the layer's attention of x, a row after `position` others whose keys and values are in the cache; into which its
   own go, kv: [2, kv dim] in float32. */
static void lab_first_half(const lab *l, float *x, char *cache_k, char *cache_v, int position, float *kv) {
    const qwen3i_config *c = &l->model.config;
    const int half = c->head_dim / 2;
    const int32_t seq = 0, at = position;
    float *h = floats((size_t)c->n_embd), *q = floats((size_t)(c->n_head * c->head_dim)), *a = floats((size_t)(c->n_head * c->head_dim)),
          *k = kv, *v = kv + c->n_head_kv * c->head_dim,
          *scratch = floats((size_t)l->pool.n_lanes * qwen3i_attention_scratch(l->desc.max_ctx, c->head_dim));
    float cosines[128], sines[128], freqs[128], scale;
    qwen3i_attention_args args;
    qwen3i_rmsnorm(&l->exec, h, x, l->layer.attn_norm, 1, c->n_embd, c->rms_eps);
    qwen3i_matmul_qkv(&l->exec, q, k, v, &l->layer, h, 1);
    scale = qwen3i_rope_freqs(freqs, c, 0);
    qwen3i_rope_angles(cosines, sines, &at, 1, freqs, half, scale);
    qwen3i_rmsnorm_heads(l->exec.simd, q, l->layer.q_norm, c->n_head, c->head_dim, c->rms_eps);
    qwen3i_rmsnorm_heads(l->exec.simd, k, l->layer.k_norm, c->n_head_kv, c->head_dim, c->rms_eps);
    qwen3i_rope(q, cosines, sines, c->n_head, c->head_dim);
    qwen3i_rope(k, cosines, sines, c->n_head_kv, c->head_dim);
    lab_cache_row(l, cache_k, k, position);
    lab_cache_row(l, cache_v, v, position);
    memset(&args, 0, sizeof args);
    args.a = a; args.q = q; args.k = cache_k; args.v = cache_v; args.type = (qwen3i_type)l->desc.kv_type;
    args.seqs = &seq; args.positions = &at; args.n = 1;
    args.n_head = c->n_head; args.n_head_kv = c->n_head_kv; args.head_dim = c->head_dim; args.max_ctx = l->desc.max_ctx;
    args.scratch = scratch;
    qwen3i_attention(&l->exec, &args);
    qwen3i_matmul_add(&l->exec, x, &l->layer.wo, a, 1);
    free(h); free(q); free(a); free(scratch);
}

/* W as F16 has it, times any power of two */
static void lab_unpack(lab *l, qwen3i_matrix *w) {
    const size_t row = (size_t)qwen3i_row_bytes(w->type, w->cols);
    float *v = (float *)lab_own(l, floats((size_t)w->rows * (size_t)w->cols));
    int i;
    for (i = 0; i < w->rows; i++) qwen3i_decode(v + (size_t)i * (size_t)w->cols, (const char *)w->data + (size_t)i * row, w->type, w->cols);
    for (i = 0; i < w->rows * w->cols; i++) {
        const unsigned bits = qwen3i_bits_from_float(v[i]);
        v[i] = qwen3i_float_from_bits((bits + 0xFFFu + (bits >> 13 & 1u)) & ~0x1FFFu);
    }
    w->data = v;
    w->type = QWEN3I_F32;
}

static void lab_check_halves(const lab_shape *s, qwen3i_type type, int kv_type, int before) {
    qwen3_ctx_desc desc = ctx_desc(before + 2, 1, 1, kv_type);
    lab *l = (lab *)malloc(sizeof *l);
    lab_rows *r = (lab_rows *)malloc(sizeof *r);
    if (lab_load_by(l, s, type, QWEN3I_NO_TYPE, QWEN3_LOAD_UNPACK) && lab_context(l, &desc)) {
        const qwen3i_config *c = &l->model.config;
        const size_t kv_dim = (size_t)(c->n_head_kv * c->head_dim);
        float *x = lab_values(l, (size_t)c->n_embd, 3), *kv = floats(2 * kv_dim), *want = floats((size_t)c->n_embd), *again = floats((size_t)c->n_embd),
              *h = floats((size_t)c->n_embd), *m = floats((size_t)c->n_ff);
        qwen3i_matrix *w[7] = {&l->layer.wq, &l->layer.wk, &l->layer.wv, &l->layer.wo, &l->layer.w_gate, &l->layer.w_up, &l->layer.w_down};
        char *k, *v;
        int i;
        for (i = 0; qwen3i_is_block(type) && i < 7; i++) lab_unpack(l, w[i]);
        lab_fill_cache(l, before + 1, &k, &v);
        lab_make_rows(l, r, 1, 1, before);
#ifdef QWEN3_TEST_CUDA_ON_CPU
        CHECK(cuda_lab()->two_kernels(l->ctx));
#endif
        if (cuda_lab()->two_kernels(l->ctx)) {
            memcpy(want, x, (size_t)c->n_embd * sizeof *x);
            lab_first_half(l, want, k, v, before, kv);
            lab_put(l, LAB_X, x);
            lab_run(l, LAB_FIRST_HALF);
            lab_get(l, LAB_X, again);
            lab_check(l, "first half", LAB_X, want, 1, c->n_embd, 4 * CUDA_EXACT);
            for (i = 0; i < 2; i++) {
                float *got = lab_cached(l, r, 0, i);
                CHECK_MSG(cuda_one_rounding(got, kv + (size_t)i * kv_dim, kv_dim, (qwen3i_type)kv_type, 20 * CUDA_EXACT),
                          "the new position's %s after %d others", i ? "value" : "key", before);
                free(got);
            }
            lab_put(l, LAB_X, x);
            lab_run(l, LAB_FIRST_HALF);
            want = floats((size_t)c->n_embd);
            lab_get(l, LAB_X, want);
            CHECK(same_floats(want, again, c->n_embd));
            qwen3i_rmsnorm(&l->exec, h, x, l->layer.mlp_norm, 1, c->n_embd, c->rms_eps);
            qwen3i_swiglu(&l->exec, m, &l->layer.w_gate, &l->layer.w_up, h, 1);
            memcpy(want, x, (size_t)c->n_embd * sizeof *x);
            qwen3i_matmul_add(&l->exec, want, &l->layer.w_down, m, 1);
            lab_put(l, LAB_X, x);
            lab_run(l, LAB_SECOND_HALF);
            qwen3i_rmsnorm(&l->exec, h, want, l->model.weights.final_norm, 1, c->n_embd, c->rms_eps);
            lab_check(l, "second half", LAB_X, want, 1, c->n_embd, 4 * CUDA_EXACT);
            lab_check(l, "what the head takes", LAB_H, h, 1, c->n_embd, 4 * CUDA_EXACT);
            h = NULL;
        } else free(want);
        free(x); free(kv); free(again); free(h); free(m); free(k); free(v);
    }
    lab_close(l);
    free(r);
    free(l);
}

/* A part of a round of positions, whole ones, more than are on their way; blocks without columns and without positions. */
static void test_cuda_two_kernels(void) {
    static const lab_shape shape = {1024, 4, 2, 128, 512, 128, 1};
#ifndef QWEN3_TEST_CUDA_ON_CPU
    static const lab_shape real = {1024, 16, 8, 128, 3072, 128, 1};
    lab_check_halves(&real, QWEN3I_BF16, QWEN3_KV_F16, 511);
    lab_check_halves(&real, QWEN3I_BF16, QWEN3_KV_F16, 9000);
#endif
    cuda_on_cpu_chip(90);
    cuda_on_cpu_size(40);
    lab_check_halves(&shape, QWEN3I_BF16, QWEN3_KV_F16, 0);
    lab_check_halves(&shape, QWEN3I_F16, QWEN3_KV_BF16, 37);
    lab_check_halves(&shape, QWEN3I_BF16, QWEN3_KV_F16, 511);
    lab_check_halves(&shape, QWEN3I_BF16, QWEN3_KV_F16, 1700);
    lab_check_halves(&shape, QWEN3I_Q8_0, QWEN3_KV_F16, 37);
    lab_check_halves(&shape, QWEN3I_Q4_K, QWEN3_KV_F16, 37);
    lab_check_layer(&shape, QWEN3_KV_F16, 1, 1);
    cuda_on_cpu_size(5);
    cuda_on_cpu_chip(80);
}

static void test_cuda_kernels_standard(void) {
    lab_check_all(&lab_small, QWEN3I_F32,  QWEN3_KV_F16,  LAB_STANDARD, 1, 1, 5);
    lab_check_all(&lab_odd,   QWEN3I_BF16, QWEN3_KV_F32,  LAB_STANDARD, 3, 3, 9);
    lab_check_all(&lab_wide,  QWEN3I_F16,  QWEN3_KV_BF16, LAB_STANDARD, 33, 1, 3);
}

/* Sizes of real models: only where a GPU makes that quick. */
static void test_cuda_kernels_real_shapes(void) {
    static const lab_shape shapes[] = {
        {1024, 16, 8, 128, 3072, 1000, 1}, {2048, 16, 8, 128, 6144, 1000, 1}, {2560, 32, 8, 128, 9728, 1000, 1},
        {4096, 32, 8, 128, 12288, 1000, 1}, {5120, 40, 8, 128, 17408, 1000, 1}, {5120, 64, 8, 128, 25600, 1000, 1}
    };
    static const int rows[] = {1, 8, 16, 33, 65};
    lab *l = (lab *)malloc(sizeof *l);
    int i, k;
    for (i = 0; i < 6; i++) {
        if (lab_load(l, &shapes[i], i % 2 ? QWEN3I_F16 : QWEN3I_BF16))
            for (k = 0; k < 5; k++)
                lab_check_rows(l, QWEN3_KV_F16, LAB_FUSED, rows[k], 1, i == 0 ? 1000 : 63);
        lab_close(l);
    }
    free(l);
    lab_check_all(&lab_real, QWEN3I_BF16, QWEN3_KV_BF16, LAB_FUSED, 1000, 1, 0);
    lab_check_all(&lab_real, QWEN3I_F16, QWEN3_KV_F32, LAB_FUSED, 130, 1, 20);
    lab_check_all(&lab_real, QWEN3I_F16, QWEN3_KV_BF16, LAB_FUSED, 9, 9, 40);
    lab_check_all(&lab_real, QWEN3I_BF16, QWEN3_KV_F16, LAB_FUSED, 64, 64, 100);
    lab_check_all(&lab_real, QWEN3I_BF16, QWEN3_KV_F32, LAB_FUSED, 40, 2, 3);
    lab_check_all(&lab_real, QWEN3I_BF16, QWEN3_KV_F16, LAB_FUSED, 100, 100, 30);
    lab_check_all(&lab_real, QWEN3I_BF16, QWEN3_KV_F16, LAB_FUSED, 200, 7, 200);
    lab_check_all(&lab_real, QWEN3I_BF16, QWEN3_KV_F16, LAB_FUSED, 1000, 2, 17);
    lab_check_all(&lab_real, QWEN3I_F32, QWEN3_KV_F32, LAB_FUSED, 64, 1, 64);
    lab_check_all(&lab_real, QWEN3I_BF16, QWEN3_KV_F16, LAB_STANDARD, 8, 8, 300);
}

/* RMSNorm by itself: any width and type, tiny and huge values, against double. */
static void test_cuda_rmsnorm(void) {
    static const int widths[] = {1, 63, 64, 65, 1000, 1024, 2048, 2560, 4096, 5120};
    static const float sizes[] = {1, 1e-4f, 6e4f, 1e15f};
    uint64_t seed = 3;
    const qwen3i_simd *simd = qwen3i_simd_level(0);
    char text[256] = "";
    qwen3i_err err;
    int i, t, n = 3;
    err.text = text;
    err.cap = sizeof text;
    for (i = 0; i < 10; i++)
        for (t = 0; t < 3 * 4; t++) {
            const qwen3i_type type = (qwen3i_type)(1 + t % 3);
            const size_t count = (size_t)(n * widths[i]);
            float *x = floats(count), *y = floats(count), *want = floats(count), *gain = floats((size_t)widths[i]);
            void *stored = malloc(count * 4);
            double e;
            size_t k;
            int r;
            for (k = 0; k < count; k++) x[k] = sizes[t / 3] * ((float)random_below(&seed, 20001) / 10000.0f - 1.0f);
            for (k = 0; k < (size_t)widths[i]; k++) gain[k] = (float)random_below(&seed, 1000) / 10.0f;
            simd->store(stored, x, type, (int)count);
            simd->load(x, stored, type, (int)count);
            for (r = 0; r < n; r++) {
                double sum = 0, scale;
                const float *in = x + (size_t)(r * widths[i]);
                for (k = 0; k < (size_t)widths[i]; k++) sum += (double)in[k] * (double)in[k];
                scale = 1 / sqrt(sum / widths[i] + (double)1e-6f);
                for (k = 0; k < (size_t)widths[i]; k++)
                    want[(size_t)(r * widths[i]) + k] = (float)((double)in[k] * scale * (double)gain[k]);
            }
            CHECK_MSG(cuda_lab()->rmsnorm(y, stored, type, gain, n, widths[i], 1e-6f, 1, NULL, &err) ==
                          QWEN3_OK,
                      "%s", text);
            e = cuda_error(y, want, count);
            CHECK_MSG(e <= CUDA_EXACT, "rmsnorm, width %d, %s, about %g: error %.3g", widths[i], cuda_type_name(type),
                      (double)sizes[t / 3], e);
            free(x); free(y); free(want); free(gain); free(stored);
        }
}

/* ---- whole models ------------------------------------------------------------------------------------------ */
static int cuda_fixture(fixture *f, const char *name) {
    if (!fixture_open_on(f, name, qwen3_cuda_backend())) return 0;
    CHECK(strcmp(f->info.backend_name, "cuda") == 0 && f->info.device_name[0]);
    return 1;
}

static double cuda_row_kl(const float *p, const float *q, int n) {
    double a = qwen3i_log_sum_exp(p, n), b = qwen3i_log_sum_exp(q, n), sum = 0;
    int i;
    for (i = 0; i < n; i++) sum += exp((double)p[i] - a) * (((double)p[i] - a) - ((double)q[i] - b));
    return sum;
}

static int cuda_argmax(const float *l, int n) {
    int i, best = 0;
    for (i = 1; i < n; i++) if (l[i] > l[best]) best = i;
    return best;
}

typedef struct cuda_distance {
    double kl, worst;
    int rows, differ;
} cuda_distance; /* differ: top-1, where it is no tie */

static void cuda_compare(cuda_distance *d, const float *want, const float *got, int n, int vocab) {
    int i;
    for (i = 0; i < n; i++, want += vocab, got += vocab) {
        int a = cuda_argmax(want, vocab), b = cuda_argmax(got, vocab);
        d->kl += cuda_row_kl(want, got, vocab);
        d->rows++;
        d->differ += a != b && (double)(want[a] - want[b]) > 1e-3 * fabs((double)want[a]);
    }
}

/* Every prompt of a fixture against transformers' float32. */
static cuda_distance cuda_distance_of(const fixture *f, const qwen3_ctx_desc *desc) {
    cuda_distance d = {0, 0, 0, 0};
    qwen3_ctx *ctx = ctx_open_desc(f->model, desc);
    const qwen3_token *tokens;
    int i, n, count, vocab = f->info.n_vocab;
    for (i = 0; ctx && (tokens = ref_tokens(&f->ref, i, "tokens", &n)) != NULL; i++) {
        const float *want = ref_f32(&f->ref, i, "logits", &count);
        float *got = floats((size_t)n * (size_t)vocab);
        double e;
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 0));
        if (CHECK(want && count == n * vocab)) {
            CHECK_OK(ctx, eval(ctx, 0, tokens, n, got));
            cuda_compare(&d, want, got, n, vocab);
            e = parity_error(got, want, n, vocab);
            if (!(e <= d.worst)) d.worst = e;
        }
        free(got);
    }
    qwen3_ctx_free(ctx);
    d.kl /= d.rows > 0 ? d.rows : 1;
    return d;
}

/* kl: on top of what the CPU's rounding of the cache does */
static void cuda_check_models(int kv_type, int kernels, int chunk, double worst, double kl) {
    int i;
    for (i = 0; i < N_MODELS; i++) {
        qwen3_ctx_desc desc = ctx_desc(256, 1, chunk, kv_type);
        cuda_distance d, cpu;
        fixture f;
        if (!fixture_open(&f, model_names[i])) continue;
        cpu = cuda_distance_of(&f, &desc);
        fixture_close(&f);
        if (!cuda_fixture(&f, model_names[i])) continue;
        f.model->backend = lab_backend(kernels);
        d = cuda_distance_of(&f, &desc);
        if (test_verbose)
            printf("    %-10s %s cache, %s, chunks of %d: worst %.2e, KL %.2e, top-1 differs %d of %d\n",
                   model_names[i], cuda_type_name((qwen3i_type)kv_type), kernels ? "standard" : "fused", chunk, d.worst,
                   d.kl, d.differ, d.rows);
        CHECK_MSG(d.worst <= worst, "%s: logits differ by %.3g of their largest", model_names[i], d.worst);
        CHECK_MSG(d.kl <= kl + 1.2 * fabs(cpu.kl), "%s: mean KL divergence %.3g", model_names[i], d.kl);
        CHECK_MSG((d.differ - cpu.differ) * 1000 <= d.rows, "%s: top-1 differs in %d of %d", model_names[i], d.differ,
                  d.rows);
        fixture_close(&f);
    }
}

/* Mixtures of experts beside transformers: one row, few, and (16-bit weights, whose inputs are rounded) many at a time; the same bits
   whatever is beside a row. */
static void test_cuda_experts(void) {
    static const char *const names[] = {"experts8", "experts128", "experts64", "fused", "fused128"};
    static const int chunks[] = {1, 7, 0};
    int i, k, n, way;
    for (i = 0; i < (int)(sizeof names / sizeof *names); i++) {
        const int exact = i == 0 || i == 3;     /* float32 */
        fixture f;
        if (!cuda_fixture(&f, names[i])) continue;
        for (k = 0; k < 3; k++) {
            qwen3_ctx_desc desc = ctx_desc(256, 2, chunks[k], QWEN3_KV_F32);
            const cuda_distance d = cuda_distance_of(&f, &desc);
            if (test_verbose) printf("    %-10s chunks of %d: worst %.2e, KL %.2e\n", names[i], chunks[k], d.worst, d.kl);
            CHECK_MSG(d.worst <= (exact || k == 0 ? 1e-5 : 6e-3), "%s, chunks of %d: %.3g", names[i], chunks[k], d.worst);
        }
        for (k = 0; k < 2; k++) {       /* a few rows, or many, beside two different others */
            const qwen3_ctx_desc desc = ctx_desc(256, 2, 0, QWEN3_KV_F16);
            const qwen3_token *tokens = ref_tokens(&f.ref, 1, "tokens", &n);
            float *first = floats((size_t)f.info.n_vocab);
            for (way = 0; way < 2; way++) {
                qwen3_ctx *ctx = ctx_open_desc(f.model, &desc);
                qwen3_item items[2];
                items[0] = item_of(0, tokens, k ? n / 2 : 3);
                items[1] = item_of(1, tokens + 5 * way, k ? n / 2 : 3);
                if (ctx) CHECK_OK(ctx, qwen3_eval(ctx, items, 2));
                if (ctx && !way) memcpy(first, qwen3_logits(ctx, 0), (size_t)f.info.n_vocab * sizeof *first);
                if (ctx && way) CHECK_MSG(same_logits(ctx, 0, first, f.info.n_vocab), "%s: other bits beside another", names[i]);
                qwen3_ctx_free(ctx);
            }
            free(first);
        }
        fixture_close(&f);
    }
}

/* A mixture of one layer, larger than what lies in the repository */
enum { ODD_VOCAB = 64, ODD_MOST = 7 };
typedef struct { int embd, ff, head_dim, n, used, rows; } odd_shape;

static void experts_odd(experts_model *out, odd_shape s, qwen3i_type type, int quantize, const qwen3_backend *backend) {
    const size_t embd = (size_t)s.embd, mlp = (size_t)s.ff * embd, head = (size_t)s.head_dim,
                 pool = (size_t)s.n * 3 * mlp + (6 * head + ODD_VOCAB) * embd, size = qwen3i_type_size(type);
    char *w = (char *)malloc(pool * size), *at = w;
    float *ones = floats(embd), *router = floats((size_t)s.n * embd);
    qwen3i_matrix list[3][ODD_MOST];
    qwen3i_experts e;
    qwen3i_layer l;
    qwen3_model m;
    qwen3_load_desc d;
    qwen3_file file;
    char err[512] = "";
    uint64_t rng = 5;
    size_t i;
    int k, x;
    memset(&m, 0, sizeof m);
    memset(&l, 0, sizeof l);
    memset(&d, 0, sizeof d);
    m.config.n_layer = 1; m.config.n_embd = s.embd; m.config.n_head = 2; m.config.n_head_kv = 1; m.config.head_dim = s.head_dim; m.config.n_ff = s.ff;
    m.config.max_ctx = 256; m.config.n_vocab = ODD_VOCAB; m.config.n_expert = s.n; m.config.n_expert_used = s.used; m.config.n_ff_expert = s.ff;
    m.config.rms_eps = 1e-6f; m.config.rope_theta = 10000; m.config.tied = 1;
    for (i = 0; i < embd; i++) ones[i] = 1.0f + (float)(i % 5) * 0.1f;
    for (i = 0; i < (size_t)s.n * embd; i++) router[i] = ((float)random_below(&rng, 2001) - 1000) * 2e-4f;
    for (i = 0; i < pool; i++) {
        const float f = ((float)random_below(&rng, 2001) - 1000) * 6e-5f;
        const uint16_t h = qwen3i_f32_to_bf16(f);
        if (size == 4) memcpy(w + 4 * i, &f, 4); else memcpy(w + 2 * i, &h, 2);
    }
    l.attn_norm = l.mlp_norm = l.q_norm = l.k_norm = m.weights.final_norm = ones;
    l.wq.data = at; l.wq.rows = 2 * s.head_dim; l.wq.cols = s.embd; l.wq.type = type;
    l.wk = l.wv = m.weights.embed = e.router = l.wq;
    l.wk.rows = l.wv.rows = s.head_dim;
    m.weights.embed.rows = ODD_VOCAB;
    l.wk.data = at += 2 * head * embd * size;
    l.wv.data = at += head * embd * size;
    l.wo = l.wq;
    l.wo.data = at += head * embd * size; l.wo.rows = s.embd; l.wo.cols = 2 * s.head_dim;
    m.weights.embed.data = at += 2 * head * embd * size;
    e.router.data = router; e.router.rows = s.n; e.router.type = QWEN3I_F32;
    at += ODD_VOCAB * embd * size;
    for (k = 0; k < 3; k++) for (x = 0; x < s.n; x++, at += mlp * size) {
        list[k][x].data = at; list[k][x].type = type; list[k][x].factor = 0;
        list[k][x].rows = k < 2 ? s.ff : s.embd;
        list[k][x].cols = k < 2 ? s.embd : s.ff;
    }
    l.experts = &e;
    m.weights.layers = &l;
    e.gate = list[0]; e.up = list[1]; e.down = list[2];
    experts_make(&out->file, &m, 0);
    out->bytes = gg_write(&out->file);
    file.name = "m.gguf"; file.data = out->bytes.p; file.size = out->bytes.n;
    d.files = &file; d.n_files = 1; d.backend = backend; d.quantize = quantize;
    out->model = NULL;
    CHECK_MSG(qwen3_load(&out->model, &d, err, sizeof err) == QWEN3_OK, "%s", err);
    free(w);
    free(ones);
    free(router);
}

/* Beside the CPU: sizes that are no multiples of any tile, and exceed each; those of Hopper's kernels, with tiles of entries that are
   full, more than half full, and less. */
static void test_cuda_experts_odd(void) {
    static const odd_shape odd = {1120, 224, 64, 7, 3, 40}, hopper = {256, 128, 128, 3, 2, 230};
    static const struct { const char *name; const odd_shape *shape; qwen3i_type type; int quantize; double few, many; } kinds[] = {
        {"F32", &odd, QWEN3I_F32, 0, 3e-6, 3e-6}, {"BF16", &odd, QWEN3I_BF16, 0, 3e-6, 1e-3}, {"Q8_0", &odd, QWEN3I_BF16, 1, 2e-4, 3e-3},
        {"BF16, Hopper", &hopper, QWEN3I_BF16, 0, 1e-3, 1e-3}, {"Q8_0, Hopper", &hopper, QWEN3I_BF16, 1, 2e-4, 3e-3}
    };
    qwen3_token tokens[256];
    uint64_t rng = 3;
    int t, k;
    random_tokens(&rng, tokens, 256, ODD_VOCAB);
    for (t = 0; t < QWEN3I_COUNT(kinds); t++) {
        const int rows = kinds[t].shape->rows, chunks[] = {1, 6, 20, rows};
        experts_model cpu, gpu;
        cuda_on_cpu_chip(kinds[t].shape == &hopper ? 90 : 80);
        float *want, *got = floats((size_t)rows * ODD_VOCAB);
        experts_odd(&cpu, *kinds[t].shape, kinds[t].type, kinds[t].quantize, NULL);
        experts_odd(&gpu, *kinds[t].shape, kinds[t].type, kinds[t].quantize, qwen3_cuda_backend());
        want = cpu.model ? plain_logits(cpu.model, tokens, rows, QWEN3_KV_F32) : NULL;
        for (k = 0; k < 4 && gpu.model && want; k++) {
            const int n = k < 3 ? 20 : rows;
            qwen3_ctx *ctx = ctx_open(gpu.model, 256, 1, chunks[k], QWEN3_KV_F32);
            double e;
            if (ctx) CHECK_OK(ctx, eval(ctx, 0, tokens, n, got));
            e = cuda_error(got, want, (size_t)n * ODD_VOCAB);
            if (test_verbose) printf("    %s, chunks of %d: %.2e\n", kinds[t].name, chunks[k], e);
            CHECK_MSG(e <= (k >= 2 || (k == 1 && kinds[t].quantize) ? kinds[t].many : kinds[t].few), "%s, chunks of %d: off by %.3g", kinds[t].name, chunks[k], e);
            qwen3_ctx_free(ctx);
        }
        free(want);
        free(got);
        experts_free(&cpu);
        experts_free(&gpu);
    }
    cuda_on_cpu_chip(80);
}

/* Experts in blocks of each format, and with numbers beside them: one row, few and many at a time beside their values in float32 on
   the CPU, whose inputs are not rounded; the same bits whatever is beside a row. */
static void test_cuda_experts_blocks(void) {
    static const int chunks[] = {1, 6, 30};
    qwen3_token tokens[30];
    uint64_t rng = 3;
    int type, k, mixed;
    random_tokens(&rng, tokens, 30, 64);
    for (type = QWEN3I_Q8_0; type < QWEN3I_N_TYPES; type++) for (mixed = 0; mixed < (type == QWEN3I_Q4_K ? 2 : 1); mixed++) {
        const char *name = qwen3i_format_of((qwen3i_type)type)->name;
        experts_model x, twin;
        qwen3_load_desc d;
        qwen3_file file;
        qwen3_model *gpu = NULL;
        float *want, *got = floats(30 * 64), *alone = floats(30 * 64);
        char err[256] = "";
        if (qwen3i_format_of((qwen3i_type)type)->gguf < 0) continue;
        experts_of_type(&x, (qwen3i_type)type, mixed ? EX_UP : 0);
        experts_of_type(&twin, (qwen3i_type)type, EX_TWIN);
        memset(&d, 0, sizeof d);
        file.name = "m.gguf"; file.data = x.bytes.p; file.size = x.bytes.n;
        d.files = &file; d.n_files = 1; d.backend = qwen3_cuda_backend();
        CHECK_MSG(qwen3_load(&gpu, &d, err, sizeof err) == QWEN3_OK, "%s: %s", name, err);
        want = twin.model ? plain_logits(twin.model, tokens, 30, QWEN3_KV_F32) : NULL;
        for (k = 0; k < 3 && gpu && want; k++) {
            qwen3_ctx *ctx = ctx_open(gpu, 32, 1, chunks[k], QWEN3_KV_F32);
            double e;
            if (ctx) CHECK_OK(ctx, eval(ctx, 0, tokens, 30, got));
            e = cuda_error(got, want, 30 * 64);
            if (test_verbose) printf("    %-8s chunks of %d: %.2e\n", name, chunks[k], e);
            CHECK_MSG(e <= (k == 2 ? 2e-3 : 1e-4), "%s, chunks of %d: off by %.3g", name, chunks[k], e);
            qwen3_ctx_free(ctx);
        }
        if (gpu && want && type == QWEN3I_Q4_K) {   /* two rows beside two different fives */
            qwen3_ctx_desc desc = ctx_desc(32, 2, 0, QWEN3_KV_F32);
            int way;
            for (way = 0; way < 2; way++) {
                qwen3_ctx *ctx = ctx_open_desc(gpu, &desc);
                qwen3_item items[2];
                items[0] = item_of(0, tokens, 2);
                items[1] = item_of(1, tokens + 9 * way, 5);
                if (ctx) CHECK_OK(ctx, qwen3_eval(ctx, items, 2));
                if (ctx && !way) memcpy(alone, qwen3_logits(ctx, 0), 64 * sizeof *alone);
                if (ctx && way) CHECK_MSG(same_logits(ctx, 0, alone, 64), "%s: other bits beside another", name);
                qwen3_ctx_free(ctx);
            }
        }
        qwen3_free(gpu);
        free(want); free(got); free(alone);
        experts_free(&x);
        experts_free(&twin);
    }
}

/* The logits of a prompt of 40 tokens, `chunk` rows at a time and then three alone, of a model that is quantised when it
   is loaded; NULL backend: the CPU. */
static float *cuda_quantised_logits(const char *name, int quantize, int flags, const qwen3_backend *backend, int chunk, int *vocab) {
    qwen3_ctx_desc ctx_of = ctx_desc(64, 1, chunk, QWEN3_KV_F32);
    char path[1024], err[256] = "";
    qwen3_load_desc desc;
    qwen3_model *model = NULL;
    qwen3_token tokens[43];
    float *logits = NULL;
    int i;
    model_path(path, sizeof path, name, "");
    memset(&desc, 0, sizeof desc);
    desc.path = path;
    desc.quantize = quantize;
    desc.flags = flags;
    desc.backend = backend;
    if (!CHECK_MSG(qwen3_load(&model, &desc, err, sizeof err) == QWEN3_OK, "%s: %s", name, err)) return NULL;
    qwen3_ctx *ctx = ctx_open_desc(model, &ctx_of);
    *vocab = qwen3_get_info(model).n_vocab;
    for (i = 0; i < 43; i++) tokens[i] = (3 + 7 * i) % *vocab;
    if (ctx) {
        logits = floats((size_t)43 * (size_t)*vocab);
        CHECK_OK(ctx, eval(ctx, 0, tokens, 40, logits));
        for (i = 40; i < 43; i++) CHECK_OK(ctx, eval(ctx, 0, tokens + i, 1, logits + (size_t)i * (size_t)*vocab));
    }
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return logits;
}

/* Of these, rows of 32 are quantised, and rows of other lengths are not. */
static void check_models_blocks(const char *name, int quantize, int flags, int chunk) {
    int vocab = 0;
    float *want = cuda_quantised_logits(name, quantize, 0, NULL, chunk, &vocab),
          *got = cuda_quantised_logits(name, quantize, flags, qwen3_cuda_backend(), chunk, &vocab);
    const double e = want && got ? parity_error(got, want, 43, vocab) : 1;
    if (test_verbose) printf("    %s, quantized to %d, flags %d, chunks of %d: %.2e\n", name, quantize, flags, chunk, e);
    CHECK_MSG(e < (chunk > 4 ? 1e-2 : 1e-3), "%s, quantized to %d, flags %d, chunks of %d: logits differ by %.2e",
              name, quantize, flags, chunk, e);
    free(want);
    free(got);
}
static void test_cuda_models_blocks(void) {
    static const char *const names[] = {"chat", "plain", "theta", "hot", "odd", "yarn"};
    for (int i = 0; i < (int)QWEN3I_COUNT(names); i++)
        for (int quantize = QWEN3_Q8_0; quantize <= QWEN3_Q4_K_M; quantize++) {
            check_models_blocks(names[i], quantize, 0, 8);
            check_models_blocks(names[i], quantize, 0, 40);
            check_models_blocks(names[i], quantize, QWEN3_LOAD_UNPACK, 8);
        }
}

/* The logits of 70 tokens, `chunk` rows at a time and then three alone, of a directory quantised as a scheme has it. */
static float *cuda_packed_logits(const packed_shape *shape, const packed_scheme *s, const tiny_text *weights, int flags,
                                 const qwen3_backend *backend, int chunk) {
    qwen3_ctx_desc ctx_of = ctx_desc(80, 1, chunk, QWEN3_KV_F32);
    packed_files files;
    qwen3_model *model = NULL;
    float *logits = floats((size_t)73 * (size_t)shape->vocab);
    qwen3_token tokens[73];
    char err[512] = "";
    ctx_of.yarn_factor = 4;             /* for more positions than such a model has */
    packed_files_make(&files, shape, s->config, weights);
    files.desc.flags |= flags;
    files.desc.backend = backend;
    for (int i = 0; i < 73; i++) tokens[i] = (5 + 11 * i) % shape->vocab;
    CHECK_MSG(qwen3_load(&model, &files.desc, err, sizeof err) == QWEN3_OK, "%s: %s", s->config, err);
    qwen3_ctx *ctx = model ? ctx_open_desc(model, &ctx_of) : NULL;
    if (ctx) CHECK_OK(ctx, eval(ctx, 0, tokens, 70, logits));
    for (int i = 70; i < 73 && ctx; i++)
        CHECK_OK(ctx, eval(ctx, 0, tokens + i, 1, logits + (size_t)i * (size_t)shape->vocab));
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    free(files.config.p);
    return logits;
}

static void cuda_check_packed(const packed_shape *shape, int scheme, int flags, int chunk) {
    const packed_scheme *s = &packed_schemes[scheme];
    tiny_text weights = packed_weights(s, shape, 0);
    float *want = cuda_packed_logits(shape, s, &weights, 0, NULL, chunk),
          *got = cuda_packed_logits(shape, s, &weights, flags, qwen3_cuda_backend(), chunk),
          *again = chunk == 70 ? cuda_packed_logits(shape, s, &weights, flags, qwen3_cuda_backend(), chunk) : NULL;
    const double e = parity_error(got, want, 73, shape->vocab);
    if (test_verbose) printf("    scheme %d, flags %d, chunks of %d: %.2e\n", scheme, flags, chunk, e);
    CHECK_MSG(e < (chunk > 4 ? 1e-2 : 1e-3), "scheme %d, chunks of %d: logits differ by %.2e", scheme, chunk, e);
    CHECK_MSG(!again || same_floats(got, again, 73 * shape->vocab), "scheme %d, chunks of %d: other bits", scheme, chunk);
    free(weights.p); free(want); free(got); free(again);
}

/* Directories quantised as others do it, with inputs in order of activation, too: every way through the layers. */
static void test_cuda_models_packed(void) {
    static const packed_shape large = {256, 2, 1, 128, 256, 64, "model.", 0};
    for (int i = 0; i < PACKED_SCHEMES; i++) {
        const int ordered = packed_is_ordered(&packed_schemes[i]);
        if (ordered || i % 3 == 0) cuda_check_packed(&packed_usual, i, 0, i % 2 ? 35 : 8);
        if (!ordered) continue;
        cuda_check_packed(&packed_usual, i, 0, i % 2 ? 2 : 20);
        cuda_on_cpu_chip(90);
        cuda_check_packed(&large, i, 0, i % 2 ? 70 : 50);
        if (i % 2) cuda_check_packed(&large, i, QWEN3_LOAD_UNPACK, 6);
        cuda_on_cpu_chip(80);
    }
}

/* At most 8 rows at a time nothing is rounded but the cache. */
static void test_cuda_models_exact(void)    { cuda_check_models(QWEN3_KV_F32, LAB_FUSED, 8, 2e-4, 1e-7); }
static void test_cuda_models_fused(void)    { cuda_check_models(QWEN3_KV_F32, LAB_FUSED, 0, 1e-2, 1e-5); }
static void test_cuda_models_standard(void) { cuda_check_models(QWEN3_KV_F32, LAB_STANDARD, 0, 1e-2, 1e-5); }
static void test_cuda_models_f16(void)      { cuda_check_models(QWEN3_KV_F16, LAB_FUSED, 13, 4e-2, 1e-5); }
static void test_cuda_models_bf16(void)     { cuda_check_models(QWEN3_KV_BF16, LAB_FUSED, 0, 1e-1, 1e-5); }

/* ---- decode steps ------------------------------------------------------------------------------------------- */
static qwen3_ctx *cuda_prompted(const fixture *f, int max_seqs, int kernels, uint64_t seed) {
    qwen3_ctx_desc desc = ctx_desc(160, max_seqs, 0, QWEN3_KV_F16);
    qwen3_ctx *ctx;
    qwen3_token prompt[16];
    int s;
    f->model->backend = lab_backend(kernels);
    ctx = ctx_open_desc(f->model, &desc);
    for (s = 0; ctx && s < max_seqs; s++) {
        random_tokens(&seed, prompt, 16, f->info.n_vocab);
        CHECK_OK(ctx, eval(ctx, s, prompt, 5 + s % 7, NULL));
    }
    return ctx;
}

/* next() chooses what the CPU's sampler chooses from the same logits, and evaluates as qwen3_eval does, whether
   it runs ahead (two calls in a row) or not (logits asked for in between). */
static void cuda_check_next(const fixture *f, const qwen3_sampler *like, int kernels) {
    qwen3_ctx *a = cuda_prompted(f, 1, kernels, 11), *b = cuda_prompted(f, 1, kernels, 11);
    qwen3_sampler sa = *like, sb = *like;
    int i, vocab = f->info.n_vocab;
    for (i = 0; a && b && i < (test_short ? 6 : 24); i++) {
        qwen3_token x = -1, y = -2;
        qwen3_result r = qwen3_next(a, 0, &sa, &x);
        CHECK_OK(b, qwen3_sample(b, 0, &sb, &y));
        CHECK_MSG(x == y && sa.rng == sb.rng, "step %d: the device chose %d, the host %d", i, (int)x, (int)y);
        if (r == QWEN3_END) {
            CHECK_MSG(same_logits(a, 0, qwen3_logits(b, 0), vocab), "step %d: the end changed the logits", i);
            CHECK(seq_len(a, 0) == seq_len(b, 0));
            break;
        }
        CHECK_OK(a, r);
        CHECK_OK(b, eval(b, 0, &y, 1, NULL));
        if (i % 3 == 0) CHECK_MSG(same_logits(a, 0, qwen3_logits(b, 0), vocab), "step %d: logits differ", i);
        if (x != y) break;
    }
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
}

static void test_cuda_next(void) {
    static const qwen3_bias bias[3] = {{5, 3.0f}, {7, -1e30f}, {5, 0.25f}};
    qwen3_sampler s[7];
    fixture f;
    int i;
    if (!cuda_fixture(&f, "chat")) return;
    for (i = 0; i < 7; i++)
        s[i] = qwen3_sampler_preset(i == 0 ? QWEN3_GREEDY : i == 1 ? QWEN3_THINKING : QWEN3_NON_THINKING, (uint64_t)i);
    s[2].top_k = 0;
    s[3].top_k = 0; s[3].top_p = 0; s[3].temperature = 3;
    s[4].presence_penalty = 1.5f;
    s[5].repeat_penalty = 1.3f; s[5].penalty_last_n = 4; s[5].bias = bias; s[5].n_bias = 3;
    s[6].temperature = 0; s[6].repeat_penalty = 1.2f; s[6].penalty_last_n = -1;
    for (i = 0; i < 7; i++) {
        cuda_check_next(&f, &s[i], LAB_FUSED);
        if (i < 2) cuda_check_next(&f, &s[i], LAB_STANDARD);
    }
    fixture_close(&f);
}

#ifdef QWEN3_TEST_CUDA_ON_CPU           /* a GPU is what it is */
static void test_cuda_next_hopper(void) {
    cuda_on_cpu_chip(90);
    test_cuda_next();
    cuda_on_cpu_chip(80);
}
#endif

/* A batch gives each sequence the same bits with other neighbours, and what was begun ahead is dropped when the
   batch changes. */
static void test_cuda_next_batch(void) {
    qwen3_ctx *a, *b;
    fixture f;
    int i, s, seqs[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    if (!cuda_fixture(&f, "plain")) return;
    a = cuda_prompted(&f, 12, LAB_FUSED, 21);
    b = cuda_prompted(&f, 12, LAB_FUSED, 21);
    for (s = 1; b && s < 12; s++) {             /* other neighbours of the same length */
        qwen3_token other[16];
        uint64_t seed = 100 + (uint64_t)s;
        int n = seq_len(b, s);
        random_tokens(&seed, other, 16, f.info.n_vocab);
        CHECK_OK(b, qwen3_sync(b, s, other, n, 0));
    }
    for (i = 0; a && b && i < 8; i++) {
        qwen3_token x[12], y[12];
        const int n = i < 3 ? 12 : i < 6 ? 5 : 3;
        qwen3_result rx[12], ry[12];
        CHECK_OK(a, qwen3_next_batch(a, seqs, n, NULL, x, rx));
        CHECK_OK(b, qwen3_next_batch(b, seqs, n, NULL, y, ry));
        CHECK_MSG(x[0] == y[0] && rx[0] == ry[0], "step %d: %d and %d", i, (int)x[0], (int)y[0]);
        if (rx[0] == QWEN3_OK) CHECK(same_logits(a, 0, qwen3_logits(b, 0), f.info.n_vocab));
        if (i == 5) {
            CHECK_OK(a, qwen3_seq_truncate(a, 0, seq_len(a, 0) - 2));
            CHECK_OK(b, qwen3_seq_truncate(b, 0, seq_len(b, 0) - 2));
        }
    }
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
    fixture_close(&f);
}

/* The device's choice for given logits is the CPU's, also for flat, tied, huge and banned ones. */
static void test_cuda_choose(void) {
    qwen3_ctx *ctx;
    fixture f;
    uint64_t seed = 77;
    int i, k, vocab;
    if (!cuda_fixture(&f, "plain")) return;
    ctx = cuda_prompted(&f, 1, LAB_FUSED, 31);
    vocab = f.info.n_vocab;
    for (i = 0; ctx && i < 60; i += test_short ? 11 : 1) {
        float *l = floats((size_t)vocab);
        qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, (uint64_t)i), t;
        qwen3_token x = -1, y = -2;
        qwen3i_err err = qwen3i_ctx_err(ctx);
        for (k = 0; k < vocab; k++) {
            l[k] = (float)random_below(&seed, 4001) / 200.0f - 10.0f;
            if (i % 5 == 1) l[k] = floorf(l[k]);
            if (i % 5 == 2) l[k] = 1;
            if (i % 5 == 3) l[k] *= 1000;
            if (i % 5 == 4 && k % 3) l[k] = -1e30f;
        }
        s.temperature = i % 7 == 0 ? 0.0f : 0.3f * (float)(i % 7);
        s.top_k = i % 4 == 0 ? 0 : i % 4 == 1 ? 20 : i % 4 == 2 ? 1 : vocab;
        s.top_p = i % 3 == 0 ? 0.0f : i % 3 == 1 ? 0.9f : 0.05f;
        s.min_p = i % 6 == 5 ? 0.2f : 0.0f;
        CHECK(ctx->model->backend->set_logits(ctx->state, 0, l, &err) == QWEN3_OK);
        ctx->seqs[0].fresh = 1;
        t = s;
        CHECK_OK(ctx, qwen3_sample(ctx, 0, &s, &x));
        CHECK((qwen3_next(ctx, 0, &t, &y)) >= 0);
        CHECK_MSG(x == y && s.rng == t.rng, "%d: the host chose %d, the device %d", i, (int)x, (int)y);
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 3));
        free(l);
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* The same with a vocabulary that many blocks share, where the first stage lists candidates - or finds too many. */
static void lab_check_choice(lab *l, int kind, const qwen3_sampler *like) {
    const qwen3_backend *b = qwen3_cuda_backend();
    const int vocab = l->model.config.n_vocab;
    float *logits = floats((size_t)vocab), *copy = floats((size_t)vocab);
    qwen3i_candidate *scratch = (qwen3i_candidate *)malloc((size_t)vocab * sizeof *scratch);
    qwen3_sampler here = *like, there = *like;
    qwen3i_sampler_scratch room = {NULL, NULL, NULL, 0};
    qwen3i_next item;
    qwen3_token want = -1, tokens[3] = {1, 2, 3};
    int i;
    for (i = 0; i < vocab; i++) {
        logits[i] = (float)random_below(&l->seed, 200001) / 10000.0f - 10.0f;
        if (kind == 1) logits[i] = floorf(logits[i]);           /* many ties at the top */
        if (kind == 2) logits[i] = 2;
        if (kind == 3) logits[i] = i < vocab / 64 ? logits[i] + 30 : logits[i];    /* all the best in one block */
    }
    memset(&item, 0, sizeof item);
    item.tokens = tokens;
    item.n = 3;
    item.sampler = &there;
    room.logits = copy;
    room.candidates = scratch;
    LAB_OK(l, b->set_logits(l->ctx, 0, logits, &l->err));
    LAB_OK(l, qwen3i_choose(logits, vocab, vocab, tokens, 3, &here, &room, &want, &l->err));
    LAB_OK(l, b->next(l->ctx, &item, 1, &l->err));
    CHECK_MSG(item.out == want && here.rng == there.rng,
              "kind %d, top_k %d, top_p %g, min_p %g: the host chose %d, the device %d", kind, like->top_k,
              (double)like->top_p, (double)like->min_p, (int)want, (int)item.out);
    free(logits);
    free(copy);
    free(scratch);
}

static void test_cuda_choose_many(void) {
    static const lab_shape shape = {16, 2, 1, 16, 16, 20011, 1};
    static const int top_k[] = {20, 1, 64, 65, 0, 5000};
    qwen3_ctx_desc desc = ctx_desc(16, 1, 4, QWEN3_KV_F16);
    lab *l = (lab *)malloc(sizeof *l);
    int i, kind;
    if (lab_open(l, &shape, QWEN3I_F16, &desc))
        for (i = 0; i < 6; i++)
            for (kind = 0; kind < 4; kind++) {
                qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, (uint64_t)(10 * i + kind));
                if (test_short && (i + kind) % 3 != 0) continue;
                s.temperature = kind == 1 ? 5.0f : 0.7f;
                s.top_k = top_k[i];
                s.top_p = i % 2 ? 0.0f : 0.8f;
                s.min_p = kind == 3 ? 0.05f : 0.0f;
                lab_check_choice(l, kind, &s);
            }
    lab_close(l);
    free(l);
}

/* Random samplers, all fields at once: bans, biases, ties, infinities, penalties of what was there several times. */
#define DRAW_SEQS   64
#define DRAW_VOCAB  300
#define DRAW_TOKENS 40
typedef struct drawing {
    float           logits[DRAW_VOCAB];
    qwen3_token     tokens[DRAW_TOKENS], want;
    qwen3_bias bias[6];
    qwen3_sampler   here, there;
} drawing;

static float draw_of(uint64_t *seed, const float *of, int n) { return of[random_below(seed, n)]; }

static void draw_logits(uint64_t *seed, float *l) {
    static const float odd[] = {INFINITY, -INFINITY, NAN, -1e30f, -1.5e30f, -9e29f, 3e38f, -0.0f, 1e-40f};
    const int kind = random_below(seed, 8);
    int i;
    for (i = 0; i < DRAW_VOCAB; i++) {
        l[i] = (float)random_below(seed, 200001) / 10000.0f - 10.0f;
        if (kind == 1) l[i] = floorf(l[i]);
        if (kind == 2) l[i] = 1;
        if (kind == 3) l[i] *= 1000;
        if (kind == 4 && i % 7) l[i] = -1e30f;
        if (kind == 5 && random_below(seed, 20) == 0) l[i] = draw_of(seed, odd, 9);
        if (kind == 6) l[i] *= 1e-4f;
    }
}

static void draw_sampler(uint64_t *seed, drawing *d, int n) {
    static const float temperatures[] = {0, 1e-20f, 0.01f, 0.3f, 0.7f, 1, 1, 3, 100, 1e4f},
                       top_p[] = {0, 0, 0.01f, 0.3f, 0.8f, 0.95f, 0.99999f, 1}, min_p[] = {0, 0, 0, 0.001f, 0.05f, 0.5f, 1},
                       repeats[] = {0, 1, 1, 0.5f, 1.1f, 2, 1e4f}, presences[] = {0, 0, 0.5f, 2, -1, 1e4f},
                       biases[] = {-INFINITY, -1e30f, -2e30f, INFINITY, 5, -3, 0.25f};
    static const int top_k[] = {0, 0, 1, 2, 20, 50, 64, 65, 200, DRAW_VOCAB, 1000}, lasts[] = {0, -1, 1, 3, 20, 100};
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, test_random(seed));
    int i;
    s.temperature = draw_of(seed, temperatures, 10);
    s.top_p = draw_of(seed, top_p, 8);
    s.min_p = draw_of(seed, min_p, 7);
    s.top_k = top_k[random_below(seed, 11)];
    s.repeat_penalty = draw_of(seed, repeats, 7);
    s.presence_penalty = draw_of(seed, presences, 6);
    s.penalty_last_n = lasts[random_below(seed, 6)];
    s.n_bias = qwen3i_max(random_below(seed, 10) - 3, 0);
    for (i = 0; i < s.n_bias; i++) {            /* some twice, some of what is penalised, too */
        d->bias[i].token = i % 3 == 2 ? d->bias[i - 1].token : i % 3 ? d->tokens[random_below(seed, n)] : random_below(seed, DRAW_VOCAB);
        d->bias[i].bias = draw_of(seed, biases, 7);
    }
    s.bias = d->bias;
    d->here = d->there = s;
}

/* One that the host can choose from; n tokens so far. */
static void draw_one(uint64_t *seed, drawing *d, int n) {
    static float copy[DRAW_VOCAB];
    static qwen3i_candidate candidates[DRAW_VOCAB];
    qwen3i_sampler_scratch room = {NULL, NULL, NULL, 0};
    int i;
    room.logits = copy;
    room.candidates = candidates;
    do {
        for (i = 0; i < n; i++) d->tokens[i] = random_below(seed, 2) ? random_below(seed, 12) : random_below(seed, DRAW_VOCAB);
        draw_logits(seed, d->logits);
        draw_sampler(seed, d, n);
    } while (qwen3i_choose(d->logits, DRAW_VOCAB, DRAW_VOCAB, d->tokens, n, &d->here, &room, &d->want, NULL) != QWEN3_OK);
}

/* As many at a time as there are sequences. Returns how many went wrong. */
static int draw_batch(lab *l, drawing *all) {
    const qwen3_backend *b = qwen3_cuda_backend();
    static qwen3i_next items[DRAW_SEQS];
    int i, wrong = 0;
    memset(items, 0, sizeof items);
    for (i = 0; i < DRAW_SEQS; i++) {
        items[i].seq = i;
        items[i].n = 1 + random_below(&l->seed, DRAW_TOKENS);
        draw_one(&l->seed, &all[i], items[i].n);
        items[i].tokens = all[i].tokens;
        items[i].sampler = &all[i].there;
        LAB_OK(l, b->set_logits(l->ctx, i, all[i].logits, &l->err));
    }
    LAB_OK(l, b->next(l->ctx, items, DRAW_SEQS, &l->err));
    for (i = 0; i < DRAW_SEQS; i++) {
        const qwen3_sampler *s = &all[i].here;
        wrong += !CHECK_MSG(items[i].out == all[i].want && s->rng == all[i].there.rng,
                            "temperature %g, top_k %d, top_p %g, min_p %g, repeat %g, presence %g, last %d, %d biases: "
                            "the host chose %d, the device %d", (double)s->temperature, s->top_k, (double)s->top_p,
                            (double)s->min_p, (double)s->repeat_penalty, (double)s->presence_penalty, s->penalty_last_n,
                            s->n_bias, (int)all[i].want, (int)items[i].out);
    }
    return wrong;
}

static void test_cuda_draws(void) {
    static const lab_shape shape = {16, 2, 1, 16, 16, DRAW_VOCAB, 1};
    const int n = test_short ? 640 : CUDA_DRAWS;
    qwen3_ctx_desc desc = ctx_desc(DRAW_TOKENS + 4, DRAW_SEQS, DRAW_SEQS, QWEN3_KV_F16);
    lab *l = (lab *)malloc(sizeof *l);
    drawing *all = (drawing *)malloc(DRAW_SEQS * sizeof *all);
    int i = 0, wrong = 0;
    if (lab_open(l, &shape, QWEN3I_F32, &desc))
        for (i = 0; i < n && wrong == 0; i += DRAW_SEQS) wrong = draw_batch(l, all);
    if (test_verbose) printf("    %d draws\n", i);
    lab_close(l);
    free(all);
    free(l);
}

/* ---- speed: with -v, on a GPU ---------------------------------------------------------------------------- */
/* Each operation alone, its weights alternating between layers that do not fit the cache together. */
static void lab_time(lab *l, const char *what, lab_op op, double megabytes) {
    const cuda_lab_functions *k = cuda_lab();
    float us = 0, best = 1e30f;
    int i;
    for (i = 0; i < 5; i++) {
        LAB_OK(l, k->run(l->ctx, op, -1, i == 0 ? 8 : 64, &us, &l->err));
        if (i > 0 && us < best) best = us;
    }
    printf("    %-10s %9.2f us", what, (double)best);
    if (megabytes > 0) printf("   %6.2f TB/s", megabytes / (double)best);
    printf("\n");
}

static void lab_speed(const lab_shape *s, const char *name, int rows, int n_seqs, int before, int kernels) {
    qwen3_ctx_desc desc = ctx_desc(before + rows + 1, n_seqs, rows, QWEN3_KV_F16);
    const double mb = 2e-6, q = s->n_head * s->head_dim, kv = s->n_head_kv * s->head_dim;
    lab *l = (lab *)malloc(sizeof *l);
    lab_rows *r = (lab_rows *)malloc(sizeof *r);
    char *k, *v;
    if (lab_load(l, s, QWEN3I_BF16) && lab_choose_context(l, &desc, kernels)) {
        printf("  %s, %d rows of %d sequences after %d positions, %s\n", name, rows, n_seqs, before,
               kernels ? "standard" : "fused");
        lab_make_rows(l, r, rows, n_seqs, before);
        lab_fill_cache(l, before + 1, &k, &v);
        free(k);
        free(v);
        lab_run(l, LAB_EMBED);
        lab_time(l, "norm", LAB_NORM, 0);
        lab_time(l, "qkv_rope", LAB_QKV_ROPE, mb * s->n_embd * (q + 2 * kv));
        lab_time(l, "attention", LAB_ATTENTION, rows == n_seqs ? mb * 2 * kv * before * rows : 0);
        lab_time(l, "o_proj", LAB_O_PROJ, mb * s->n_embd * q);
        lab_time(l, "mlp", LAB_MLP, mb * 2 * s->n_embd * s->n_ff);
        lab_time(l, "down", LAB_DOWN, mb * s->n_embd * s->n_ff);
        lab_time(l, "head", LAB_HEAD, mb * s->n_embd * s->n_vocab);
        if (rows == n_seqs) lab_time(l, "step", LAB_STEP, 0);
    }
    lab_close(l);
    free(r);
    free(l);
}

static const lab_shape lab_06b = {1024, 16, 8, 128, 3072, 151936, 28}, lab_8b = {4096, 32, 8, 128, 12288, 16384, 6};

static void test_cuda_speed_one(void) {
    lab_speed(&lab_06b, "0.6B", 1, 1, 512, LAB_FUSED);
    lab_speed(&lab_8b, "8B, 6 layers", 1, 1, 512, LAB_FUSED);
}

static void test_cuda_speed_more(void) {
    lab_speed(&lab_06b, "0.6B", 4, 4, 512, LAB_FUSED);
    lab_speed(&lab_06b, "0.6B", 64, 64, 512, LAB_FUSED);
    lab_speed(&lab_06b, "0.6B", 2048, 1, 0, LAB_FUSED);
    lab_speed(&lab_8b, "8B, 6 layers", 2048, 1, 0, LAB_FUSED);
    lab_speed(&lab_06b, "0.6B", 1, 1, 512, LAB_STANDARD);
}

/* ---- contexts ----------------------------------------------------------------------------------------------- */
static void test_cuda_same_twice(void) {
    fixture f;
    qwen3_token prompt[40];
    uint64_t seed = 5;
    float *one, *two;
    if (!cuda_fixture(&f, "sharded")) return;
    random_tokens(&seed, prompt, 40, f.info.n_vocab);
    one = plain_logits(f.model, prompt, 40, QWEN3_KV_F16);
    two = plain_logits(f.model, prompt, 40, QWEN3_KV_F16);
    CHECK(same_floats(one, two, 40 * f.info.n_vocab));
    free(one);
    free(two);
    fixture_close(&f);
}

/* A sequence moves between sequences, contexts and backends. */
static void test_cuda_states(void) {
    fixture f, cpu;
    qwen3_ctx *a, *b, *c;
    uint64_t size;
    void *state;
    if (!cuda_fixture(&f, "chat")) return;
    if (!fixture_open(&cpu, "chat")) { fixture_close(&f); return; }
    a = cuda_prompted(&f, 3, LAB_FUSED, 41);
    b = ctx_open(f.model, 160, 1, 0, QWEN3_KV_F16);
    c = ctx_open(cpu.model, 160, 1, 0, QWEN3_KV_F16);
    if (a && b && c) {
        qwen3_token x, y, z;
        CHECK_OK(a, qwen3_seq_copy(a, 2, 0));
        CHECK(same_logits(a, 2, qwen3_logits(a, 0), 0) && seq_len(a, 2) == seq_len(a, 0));
        CHECK(qwen3_next(a, 0, NULL, &x) >= 0 && qwen3_next(a, 2, NULL, &y) >= 0 && x == y);
        size = state_size(a, 0);
        state = malloc((size_t)size);
        CHECK_OK(a, state_save(a, 0, state, size, NULL));
        CHECK_OK(b, state_load(b, 0, state, size));
        CHECK_OK(c, state_load(c, 0, state, size));
        CHECK(qwen3_next(a, 0, NULL, &x) >= 0 && qwen3_next(b, 0, NULL, &y) >= 0 && qwen3_next(c, 0, NULL, &z) >= 0 &&
              x == y && x == z);
        free(state);
    }
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
    qwen3_ctx_free(c);
    fixture_close(&cpu);
    fixture_close(&f);
}

static int cuda_cancel_after(void *user) { return --*(int *)user < 0; }

static void test_cuda_cancel(void) {
    fixture f;
    qwen3_ctx_desc desc = ctx_desc(200, 1, 20, QWEN3_KV_F16);
    qwen3_token prompt[150];
    uint64_t seed = 6;
    int left, polls;
    if (!cuda_fixture(&f, "plain")) return;
    random_tokens(&seed, prompt, 150, f.info.n_vocab);
    desc.cancel = cuda_cancel_after;
    desc.cancel_user = &left;
    for (polls = 0; polls < 12; polls += 3) {
        qwen3_ctx *ctx = ctx_open_desc(f.model, &desc);
        left = polls;
        CHECK(eval(ctx, 0, prompt, 150, NULL) == QWEN3_STOPPED);
        CHECK(seq_len(ctx, 0) % 20 == 0 && seq_len(ctx, 0) < 150);
        left = 1 << 30;
        CHECK_OK(ctx, qwen3_sync(ctx, 0, prompt, 150, 0));
        qwen3_ctx_free(ctx);
    }
    fixture_close(&f);
}

/* Three replies step by step under a budget: each token is the one that the CPU's logits have at the top. */
static void cuda_stream_case(const fixture *cpu, qwen3_ctx *ctx, qwen3_ctx *judge, int64_t budget) {
    enum { N = 3 };
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    qwen3_stream stream[N], *list[N];
    qwen3_item item;
    heard got[N];
    const int n_vocab = cpu->info.n_vocab;
    float *logits = floats((size_t)256 * (size_t)n_vocab);
    int i, k, t, steps = 0;
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    memset(got, 0, sizeof got);
    chat.msgs = stream_msgs;
    gen.on_text = hear;
    gen.max_tokens = 20;
    for (i = 0; i < N; i++) {
        gen.user = &got[i];
        chat.n_msgs = 1 + i % 2;
        list[i] = &stream[i];
        CHECK_OK(ctx, qwen3_stream_begin(ctx, i, &chat, &gen, &stream[i]));
    }
    while (qwen3_stream_step(ctx, list, N, budget) == QWEN3_MORE && steps < 1000) steps++;
    CHECK_MSG(budget == 0 ? steps == 0 : steps > 0 && steps < 1000, "%d steps", steps);
    for (i = 0; i < N; i++) {
        memset(&item, 0, sizeof item);
        item.tokens = qwen3_seq_tokens(ctx, i, &item.n);
        item.all_logits = logits;
        CHECK((stream[i].result == QWEN3_OK && stream[i].n_tokens == 20) || stream[i].result == QWEN3_END);
        if (!CHECK(item.n <= 256 && got[i].calls > 0)) continue;
        CHECK_OK(judge, qwen3_seq_truncate(judge, 0, 0));
        CHECK_OK(judge, qwen3_eval(judge, &item, 1));
        for (k = item.n - stream[i].n_tokens; k < item.n; k++) {
            const float *row = logits + (size_t)(k - 1) * (size_t)n_vocab;
            float best = row[0];
            for (t = 1; t < cpu->info.n_tokens; t++) if (row[t] > best) best = row[t];
            CHECK_MSG(row[item.tokens[k]] > best - 0.02f * (1 + (best < 0 ? -best : best)),
                      "reply %d, position %d: %g, the best is %g", i, k, (double)row[item.tokens[k]], (double)best);
        }
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, i, 0));
    }
    free(logits);
}

static void test_cuda_streams(void) {
    fixture gpu, cpu;
    qwen3_ctx *ctx, *judge;
    if (!cuda_fixture(&gpu, "chat")) return;
    if (fixture_open(&cpu, "chat")) {
        ctx = ctx_open(gpu.model, 256, 3, 16, 0);
        judge = ctx_open(cpu.model, 256, 1, 0, 0);
        if (ctx && judge) {
            cuda_stream_case(&cpu, ctx, judge, 0);
            cuda_stream_case(&cpu, ctx, judge, 1);
            cuda_stream_case(&cpu, ctx, judge, 3000);
        }
        qwen3_ctx_free(ctx);
        qwen3_ctx_free(judge);
        fixture_close(&cpu);
    }
    fixture_close(&gpu);
}

/* Loading stops at whichever call of progress() says so. */
static int cuda_stop_loading(float done, void *user) { return done >= 0 && done <= 1 && --*(int *)user < 0; }

static void test_cuda_cancel_load(void) {
    char path[1024];
    const long live = heap_default.live;
    qwen3_load_desc desc;
    qwen3_model *model = NULL;
    qwen3_result r = QWEN3_STOPPED;
    int calls, left;
    memset(&desc, 0, sizeof desc);
    model_path(path, sizeof path, "plain", "");
    desc.path = path;
    desc.backend = qwen3_cuda_backend();
    desc.progress = cuda_stop_loading;
    desc.progress_user = &left;
    for (calls = 0; r == QWEN3_STOPPED; calls++) {
        left = calls;
        r = qwen3_load(&model, &desc, NULL, 0);
        CHECK((r == QWEN3_OK) == (model != NULL) && (model || heap_default.live == live));
    }
    CHECK_MSG(r == QWEN3_OK && calls > 10, "%s after %d calls", qwen3_result_string(r), calls);
    qwen3_free(model);
}

static void test_cuda_memory(void) {
    fixture f;
    qwen3_ctx_desc desc = ctx_desc(512, 4096, 65536, QWEN3_KV_F32);
    qwen3_ctx_desc small = ctx_desc(64, 2, 16, QWEN3_KV_F16);
    qwen3_memory bytes;
    char err[256] = "";
    qwen3_ctx *ctx = NULL;
    if (!cuda_fixture(&f, "hot")) return;
    bytes = qwen3_ctx_memory(f.model, &small);
    CHECK(bytes.device_bytes > 2 * 64 * 2 && bytes.device_bytes < (uint64_t)1 << 30 && bytes.host_bytes > 0);
    bytes = qwen3_ctx_memory(f.model, &desc);
    if (bytes.device_bytes > (uint64_t)4 << 30 && !strcmp(f.info.device_name, "CUDA on CPU")) {
        CHECK(qwen3_ctx_create(&ctx, f.model, &desc, err, sizeof err) == QWEN3_ERR_DEVICE_MEMORY && !ctx);
        CHECK_MSG(strstr(err, "MiB") != NULL, "%s", err);
    }
    fixture_close(&f);
}

/* Sizes that 64 bits do not hold, and blocks in rows that are too long to be taken apart, are refused. */
static void test_cuda_refuses(void) {
    qwen3_ctx_desc desc = ctx_desc(1 << 30, 1 << 30, 1 << 20, QWEN3_KV_F32);
    lab *l = (lab *)malloc(sizeof *l);
    if (lab_load(l, &lab_small, QWEN3I_F32)) {
        const qwen3_backend *b = qwen3_cuda_backend();
        const qwen3_memory bytes = b->ctx_memory(l->state, &l->model, &desc);
        qwen3_load_desc load;
        void *state = NULL;
        CHECK(bytes.device_bytes == UINT64_MAX);
        CHECK(b->ctx_create(&l->ctx, l->state, &l->model, &desc, &l->err) < 0 && !l->ctx && strstr(l->text, "out of"));
        memset(&load, 0, sizeof load);
        l->layers[0].wo.type = QWEN3I_Q8_0;
        l->layers[0].wo.cols = 1 << 20;
        CHECK(b->model_create(&state, &l->model, &load, &l->err) == QWEN3_ERR_UNSUPPORTED && !state);
        CHECK_MSG(strstr(l->text, "1048576 elements") != NULL, "%s", l->text);
    }
    lab_close(l);
    free(l);
}

#ifdef QWEN3_TEST_CUDA_ON_CPU
extern void cuda_on_cpu_fail(long n);
extern long cuda_on_cpu_calls(void);
extern long cuda_on_cpu_live(void);
extern long cuda_on_cpu_under_way(void);

/* Load, evaluate in many and in few rows, choose. The first failure, or OK; nothing else may have changed. */
static qwen3_result cuda_whole_run(const char *path, int quantize) {
    qwen3_ctx_desc desc = ctx_desc(64, 2, 32, QWEN3_KV_F16);
    qwen3_load_desc load;
    qwen3_model *model = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_token prompt[20], t;
    char err[256] = "";
    qwen3_result r;
    int i;
    memset(&load, 0, sizeof load);
    load.path = path;
    load.backend = qwen3_cuda_backend();
    load.quantize = quantize;
    for (i = 0; i < 20; i++) prompt[i] = 3 + i;
    r = qwen3_load(&model, &load, err, sizeof err);
    CHECK((r == QWEN3_OK) == (model != NULL) && (r == QWEN3_OK) == (err[0] == '\0'));
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, &desc, err, sizeof err);
    CHECK((r == QWEN3_OK) == (ctx != NULL) && (r == QWEN3_OK) == (err[0] == '\0'));
    if (ctx) {
        r = eval(ctx, 0, prompt, 20, NULL);
        CHECK(seq_len(ctx, 0) == (r == QWEN3_OK ? 20 : 0));
        for (i = 0; i < 3 && r == QWEN3_OK; i++) {
            r = qwen3_next(ctx, 0, NULL, &t);
            CHECK(seq_len(ctx, 0) == 20 + i + (r == QWEN3_OK));
        }
        CHECK((r >= 0) == (qwen3_ctx_error(ctx)[0] == '\0'));
    }
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return r;
}

/* Logits are on their way to the caller when the cancel hook says stop: nothing arrives after the call has returned. */
static void test_cuda_cancel_copies(void) {
    qwen3_ctx_desc desc = ctx_desc(200, 1, 150, QWEN3_KV_F16);
    lab *l = (lab *)malloc(sizeof *l);
    lab_rows *r = (lab_rows *)malloc(sizeof *r);
    qwen3i_out outs[150];
    int left = 1 << 30, polls, i;
    desc.cancel = cuda_cancel_after;
    desc.cancel_user = &left;
    if (lab_open(l, &lab_small, QWEN3I_F32, &desc)) {
        float *logits = floats(150 * 100);
        lab_make_rows(l, r, 150, 1, 0);
        memset(outs, 0, sizeof outs);
        for (i = 0; i < 150; i++) { outs[i].row = i; outs[i].keep_seq = -1; outs[i].logits = logits + 100 * i; }
        r->batch.outs = outs;
        r->batch.n_outs = 150;
        for (polls = 1; polls < 4; polls++) {
            left = polls;
            CHECK(qwen3_cuda_backend()->forward(l->ctx, &r->batch, &l->err) == QWEN3_STOPPED);
            CHECK_MSG(cuda_on_cpu_under_way() == 0, "stopped at poll %d, and copies are under way", polls);
        }
        left = 1 << 30;
        LAB_OK(l, qwen3_cuda_backend()->forward(l->ctx, &r->batch, &l->err));
        free(logits);
    }
    lab_close(l);
    free(r);
    free(l);
}

/* Every step-th call of CUDA fails once: an error with a message, and everything is released. */
static void cuda_fail_calls(const char *path, int quantize, long step) {
    const long live = heap_default.live;
    long n, total;
    cuda_on_cpu_fail(0);
    CHECK(cuda_whole_run(path, quantize) >= 0);
    total = cuda_on_cpu_calls();
    for (n = 1; n <= total; n += step) {
        qwen3_result r;
        cuda_on_cpu_fail(n);
        r = cuda_whole_run(path, quantize);
        CHECK_MSG(r < 0, "call %ld failed, and nobody noticed", n);
        CHECK_MSG(cuda_on_cpu_under_way() == 0, "call %ld failed: copies are still under way", n);
        CHECK_MSG(cuda_on_cpu_live() == 0 && heap_default.live == live,
                  "call %ld failed: %ld device objects, %ld blocks are left", n, cuda_on_cpu_live(),
                  heap_default.live - live);
    }
    cuda_on_cpu_fail(0);
}

static void test_cuda_faults(void) {
    char path[1024];
    model_path(path, sizeof path, "theta", "");
    cuda_fail_calls(path, 0, 1);
    cuda_fail_calls(path, QWEN3_Q8_0, 3);
}
#endif

static void test_cuda_absent(void) {
    char path[1024], err[512] = "";
    qwen3_load_desc desc;
    qwen3_model *model = NULL;
    memset(&desc, 0, sizeof desc);
    model_path(path, sizeof path, "plain", "");
    desc.path = path;
    desc.backend = qwen3_cuda_backend();
    if (cuda_lab()->no_device() == NULL) desc.device = 1000;
    CHECK(qwen3_load(&model, &desc, err, sizeof err) == QWEN3_ERR_DEVICE && !model);
    CHECK_MSG(strstr(err, "CUDA") != NULL, "'%s'", err);
}

/* A filter that does nothing: then the host chooses. */
static void cuda_idle_filter(float *logits, int n_vocab, const qwen3_token *seq, int n, void *user) {
    (void)logits; (void)n_vocab; (void)seq; (void)n; (void)user;
}

/* With a grammar, or calls held to tools, the device chooses by the mask what the host would, to the last token, also
   where the text is led to its end; several sequences in a step. */
static void cuda_check_grammar(grammar_bench *b, int rounds) {
    static const char *const tool[1] = {"{\"name\": \"f\", \"parameters\": {\"properties\": {\"n\": {\"type\": \"integer\"}}, \"additionalProperties\": false}}"};
    enum { SEQS = 3 };
    static qwen3_token said[SEQS][300];
    qwen3_ctx_desc d = ctx_desc(800, SEQS, 0, 0);
    qwen3_ctx *ctx;
    char err[400];
    int way, round, i, n, lengths[SEQS], led = 0;
    d.yarn_factor = 2;
    ctx = ctx_open_desc(b->f.model, &d);
    CHECK(grammar_set(b, 0, grammar_order, 0, err, sizeof err) == QWEN3_OK);
    for (round = 0; ctx && round < rounds; round++) for (way = 0; way < 2; way++) {
        qwen3_sampler dice[SEQS];
        qwen3_stream s[SEQS], *list[SEQS];
        qwen3_msg msg;
        memset(&msg, 0, sizeof msg);
        msg.role = QWEN3_USER;
        msg.text = "an order";
        for (i = 0; i < SEQS; i++) {
            qwen3_chat_desc chat;
            qwen3_gen_desc gen;
            memset(&chat, 0, sizeof chat);
            memset(&gen, 0, sizeof gen);
            chat.msgs = &msg;
            chat.n_msgs = 1;
            chat.flags = QWEN3_CHAT_NO_THINK | (i == 1 ? QWEN3_CHAT_TOOLS_REQUIRED : 0);
            chat.tools = tool;
            chat.n_tools = i == 1;
            dice[i] = qwen3_sampler_preset(QWEN3_GREEDY, (uint64_t)(10 * round + i));
            dice[i].temperature = i == 2 && round == 0 ? 0.0f : 1.5f;
            dice[i].top_k = round % 2 ? 20 : 0;
            dice[i].presence_penalty = round % 3 ? 0.0f : 0.5f;
            if (way) dice[i].filter = cuda_idle_filter;
            gen.sampler = &dice[i];
            gen.grammar = i == 1 ? NULL : b->g;
            gen.max_tokens = 36 + 8 * round;
            list[i] = &s[i];
            CHECK_OK(ctx, qwen3_seq_truncate(ctx, i, 0));
            CHECK_OK(ctx, qwen3_stream_begin(ctx, i, &chat, &gen, &s[i]));
        }
        ctx->scratch.mask = NULL;
        CHECK_OK(ctx, qwen3_stream_step(ctx, list, SEQS, 0));
        CHECK((ctx->scratch.mask != NULL) == way);      /* who chose by it */
        for (i = 0; i < SEQS; i++) {
            const qwen3_token *tokens = qwen3_seq_tokens(ctx, i, &n);
            CHECK_MSG(s[i].result == QWEN3_END || s[i].result == QWEN3_OK, "%s", qwen3_ctx_error(ctx));
            if (n > 300) { tokens += n - 300; n = 300; }
            if (way == 0) { lengths[i] = n; memcpy(said[i], tokens, (size_t)n * sizeof *tokens); led += s[i].n_tokens > 20; }
            else CHECK_MSG(n == lengths[i] && memcmp(said[i], tokens, (size_t)n * sizeof *tokens) == 0, "round %d, sequence %d: not what the host chooses", round, i);
        }
    }
    CHECK(led > rounds);
    qwen3_ctx_free(ctx);
}

static void test_cuda_grammar(void) {
    grammar_bench b;
    memset(&b, 0, sizeof b);
    if (!cuda_fixture(&b.f, "chat")) return;
    cuda_check_grammar(&b, 2);
    grammar_close(&b);
}

#include "test_invariant.h"

static void suite_cuda(void) {
    const char *why = cuda_lab()->no_device();
    RUN(test_cuda_absent);
    if (why) { test_skip("test_cuda_kernels, _models, _next and others", why); return; }
    RUN(test_cuda_rmsnorm);
    RUN(test_cuda_kernels_fused);
    RUN(test_cuda_kernels_blocks);
    RUN(test_cuda_kernels_blocks_rows);
    RUN(test_cuda_kernels_one);
    RUN(test_cuda_kernels_hopper_blocks);
    RUN(test_cuda_kernels_clusters);
    RUN(test_cuda_kernels_batched);
    RUN(test_cuda_kernels_hopper);
    RUN(test_cuda_layer);
    RUN(test_cuda_two_kernels);
    RUN(test_cuda_wanted);
    RUN(test_cuda_kernels_standard);
#ifdef QWEN3_TEST_CUDA_ON_CPU
    RUN(test_cuda_faults);
    RUN(test_cuda_cancel_copies);
#else
    RUN(test_cuda_kernels_real_shapes);
    if (test_verbose) { RUN(test_cuda_speed_one); RUN(test_cuda_speed_more); }
#endif
    RUN(test_cuda_models_blocks);
    RUN(test_cuda_models_packed);
    RUN(test_cuda_models_exact);
    RUN(test_cuda_experts);
    RUN(test_cuda_experts_odd);
    RUN(test_cuda_experts_blocks);
    RUN(test_cuda_models_fused);
    RUN(test_cuda_models_standard);
    RUN(test_cuda_models_f16);
    RUN(test_cuda_models_bf16);
    RUN(test_cuda_grammar);
    RUN(test_cuda_invariant);
    RUN(test_cuda_invariant_hopper);
    RUN(test_cuda_invariant_speculation);
    RUN(test_cuda_invariant_prompts);
    RUN(test_cuda_next);
#ifdef QWEN3_TEST_CUDA_ON_CPU
    RUN(test_cuda_next_hopper);
#endif
    RUN(test_cuda_next_batch);
    RUN(test_cuda_choose);
    RUN(test_cuda_choose_many);
    RUN(test_cuda_draws);
    RUN(test_cuda_same_twice);
    RUN(test_cuda_states);
    RUN(test_cuda_cancel);
    RUN(test_cuda_streams);
    RUN(test_cuda_cancel_load);
    RUN(test_cuda_memory);
    RUN(test_cuda_refuses);
}
#endif
