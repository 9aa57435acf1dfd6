/* Numerical stability: every operation of a decoder layer, and whole models, on values that break half-precision
   implementations, against float64. The same tests run on the CPU backend and, where it is linked, on CUDA.

       build/test -v -k stability          prints the table of errors

   Errors are relative, of the worst row; bounds are a few times what float32 sums, and the roundings that the design
   allows, can do. test_stability_tells_mistakes shows that the classic shortcuts exceed them. */
#ifndef QWEN3_TESTS_TEST_STABILITY_H
#define QWEN3_TESTS_TEST_STABILITY_H
#include "cuda_lab.h"
#include "fixture.h"
#include "test_cpu.h"

/* The largest gains of k_norm published for Qwen3-0.6B: layers 0 to 5 (3 is one of those between 1 and 10). */
static const float stab_gains[] = {96.5f, 44.5f, 44.0f, 10.0f, 41.75f, 34.0f};
static const float stab_times[] = {1, 10, 100, 1000};
enum { STAB_LAYERS = 6, STAB_ROWS = 130, STAB_SEQS = 64 };

#define STAB_FLOAT   2e-6       /* sums of float32 products, relative to the size of the row */
#define STAB_ROUNDED 1e-3       /* with roundings to 11 bits on the way */

#ifdef QWEN3_TEST_CUDA_ON_CPU   /* an emulated GPU takes its time */
enum { STAB_MOST_SEQS = 9, STAB_MOST_TOKENS = 65 };
#else
enum { STAB_MOST_SEQS = 64, STAB_MOST_TOKENS = 1 << 20 };
#endif

/* ---- a model with hot gains ------------------------------------------------------------------------------ */
typedef struct stab_shape { int n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab; } stab_shape;
static const stab_shape stab_small = {STAB_LAYERS, 64, 4, 2, 64, 96, 80}, stab_long = {1, 32, 1, 1, 64, 32, 40},
                        stab_wide = {2, 256, 2, 1, 128, 256, 128};  /* fits the kernels for Hopper */

typedef struct stab_model {
    qwen3_model  model;
    qwen3i_layer layers[STAB_LAYERS];
    void        *owned[STAB_LAYERS * 11 + 2];
    int          n_owned;
} stab_model;

static void *stab_own(stab_model *m, void *p) { return m->owned[m->n_owned++] = p; }

static qwen3i_matrix stab_matrix(stab_model *m, int rows, int cols, qwen3i_type type, double size) {
    qwen3i_matrix w;
    w.rows = rows; w.cols = cols; w.type = type; w.factor = 0;
    w.data = stab_own(m, cpu_typed((size_t)rows * (size_t)cols, type, size / sqrt((double)cols)));
    return w;
}

/* Around 1, and one channel that stands out, another a quarter as much. */
static float *stab_gain(stab_model *m, int n, float top) {
    float *g = (float *)stab_own(m, cpu_floats((size_t)n, 0.25));
    int i;
    for (i = 0; i < n; i++) g[i] = i == 7 ? top : i == n / 2 + 3 ? top / 4 : g[i] + 1;
    return g;
}

/* times: of the published gains; mlp_size: of the weights of gate and up. */
static stab_model *stab_create(const stab_shape *s, qwen3i_type type, float times, double mlp_size) {
    stab_model *m = (stab_model *)calloc(1, sizeof *m);
    qwen3i_config *c = &m->model.config;
    const int q_dim = s->n_head * s->head_dim, kv_dim = s->n_head_kv * s->head_dim;
    int i;
    cpu_seed = 11;
    c->n_layer = s->n_layer; c->n_embd = s->n_embd; c->n_head = s->n_head; c->n_head_kv = s->n_head_kv;
    c->head_dim = s->head_dim; c->n_ff = s->n_ff; c->n_vocab = s->n_vocab;
    c->max_ctx = 65536; c->rms_eps = 1e-6f; c->rope_theta = 1e6; c->tied = 1;
    for (i = 0; i < s->n_layer; i++) {
        qwen3i_layer *l = &m->layers[i];
        l->attn_norm = stab_gain(m, s->n_embd, 3);
        l->mlp_norm  = stab_gain(m, s->n_embd, 3);
        l->q_norm    = stab_gain(m, s->head_dim, 2);
        l->k_norm    = stab_gain(m, s->head_dim, stab_gains[i] * times);
        l->wq        = stab_matrix(m, q_dim, s->n_embd, type, 2);
        l->wk        = stab_matrix(m, kv_dim, s->n_embd, type, 2);
        l->wv        = stab_matrix(m, kv_dim, s->n_embd, type, 2);
        l->wo        = stab_matrix(m, s->n_embd, q_dim, type, 2);
        l->w_gate    = stab_matrix(m, s->n_ff, s->n_embd, type, mlp_size);
        l->w_up      = stab_matrix(m, s->n_ff, s->n_embd, type, mlp_size);
        l->w_down    = stab_matrix(m, s->n_embd, s->n_ff, type, 2);
    }
    m->model.weights.embed = m->model.weights.head = stab_matrix(m, s->n_vocab, s->n_embd, type, 2 * sqrt(s->n_embd));
    m->model.weights.final_norm = stab_gain(m, s->n_embd, 15.3f);
    m->model.weights.layers = m->layers;
    return m;
}

static void stab_destroy(stab_model *m) {
    while (m->n_owned > 0) free(m->owned[--m->n_owned]);
    free(m);
}

/* Element i of token's row of the embedding. */
static void stab_embed(const stab_model *m, int token, int i, double v) {
    union { const void *in; void *out; } data;
    data.in = m->model.weights.embed.data;
    cpu_put(data.out, m->model.weights.embed.type, (size_t)(token * m->model.config.n_embd + i), v);
}

/* ---- float64 --------------------------------------------------------------------------------------------- */
/* What a reference may do wrong on purpose, or round as the library promises to. */
enum { STAB_EXACT, STAB_KV_F32 = QWEN3I_F32, STAB_KV_F16 = QWEN3I_F16, STAB_KV_BF16 = QWEN3I_BF16,     /* K and V */
       STAB_BF16_INPUT, STAB_F16_SUM, STAB_F16_PRODUCT, STAB_ROPE_FIRST };

static double stab_f16(double v) {      /* as an F16 register holds it: infinite beyond its range */
    return fabs(v) >= 65520 ? (v > 0 ? HUGE_VAL : -HUGE_VAL) : (double)qwen3i_f16_to_f32(qwen3i_f32_to_f16((float)v));
}

static double stab_rounded(double v, int type) {
    if (type == STAB_KV_F32)  return (double)(float)v;
    if (type == STAB_KV_F16)  return (double)qwen3i_f16_to_f32(qwen3i_f32_to_f16((float)v));
    if (type == STAB_KV_BF16) return (double)qwen3i_bf16_to_f32(qwen3i_f32_to_bf16((float)v));
    return v;
}

static void stab_norm(double *y, const double *x, const float *gain, int n, int how) {
    double sum = 0, r;
    int i;
    for (i = 0; i < n; i++) sum = how == STAB_F16_SUM ? stab_f16(sum + stab_f16(x[i] * x[i])) : sum + x[i] * x[i];
    r = 1 / sqrt(sum / n + (double)1e-6f);
    for (i = 0; i < n; i++) y[i] = x[i] * r * (double)gain[i];
}

/* y (+)= W x */
static void stab_product(double *y, const qwen3i_matrix *w, const double *x, int add) {
    int r, k;
    for (r = 0; r < w->rows; r++) {
        double sum = add ? y[r] : 0;
        for (k = 0; k < w->cols; k++) sum += cpu_at(w->data, w->type, (size_t)(r * w->cols + k)) * x[k];
        y[r] = sum;
    }
}

static void stab_rope(double *x, int dim, int pos) {
    int j, half = dim / 2;
    for (j = 0; j < half; j++) {
        double angle = pos * pow(1e6, -2.0 * j / (double)dim), a = x[j], b = x[j + half];
        x[j] = a * cos(angle) - b * sin(angle);
        x[j + half] = a * sin(angle) + b * cos(angle);
    }
}

static void stab_heads(double *x, const float *gain, int n_head, int dim, int pos, int how) {
    for (; n_head > 0; n_head--, x += dim) {
        if (how == STAB_ROPE_FIRST) stab_rope(x, dim, pos);
        stab_norm(x, x, gain, dim, STAB_EXACT);
        if (how != STAB_ROPE_FIRST) stab_rope(x, dim, pos);
    }
}

/* q [q_dim], k and v [kv_dim] of one normalised row */
static void stab_qkv(double *q, double *k, double *v, const qwen3i_config *c, const qwen3i_layer *w, const double *h,
                     int pos, int how) {
    const int kv_dim = c->n_head_kv * c->head_dim;
    double *in = (double *)malloc((size_t)c->n_embd * 8);
    int i;
    for (i = 0; i < c->n_embd; i++) in[i] = how == STAB_BF16_INPUT ? stab_rounded(h[i], STAB_KV_BF16) : h[i];
    stab_product(q, &w->wq, in, 0);
    stab_product(k, &w->wk, in, 0);
    stab_product(v, &w->wv, in, 0);
    stab_heads(q, w->q_norm, c->n_head, c->head_dim, pos, how);
    stab_heads(k, w->k_norm, c->n_head_kv, c->head_dim, pos, how);
    for (i = 0; i < kv_dim; i++) { k[i] = stab_rounded(k[i], how); v[i] = stab_rounded(v[i], how); }
    free(in);
}

/* a [q_dim] of one row over n positions: k, v [n, kv_dim]. Returns the largest |score|. */
static double stab_attention(double *a, const qwen3i_config *c, const double *q, const double *k, const double *v,
                             int n) {
    const int dim = c->head_dim, kv_dim = c->n_head_kv * dim, group = c->n_head / c->n_head_kv;
    double *s = (double *)malloc((size_t)n * 8), highest = 0;
    int h, p, d;
    for (h = 0; h < c->n_head; h++) {
        const double *kh = k + h / group * dim, *vh = v + h / group * dim;
        double top = -1e300, sum = 0;
        for (p = 0; p < n; p++) {
            for (s[p] = 0, d = 0; d < dim; d++) s[p] += q[h * dim + d] * kh[(size_t)p * (size_t)kv_dim + (size_t)d];
            s[p] /= sqrt((double)dim);
            if (s[p] > top) top = s[p];
            if (fabs(s[p]) > highest) highest = fabs(s[p]);
        }
        for (p = 0; p < n; p++) sum += s[p] = exp(s[p] - top);
        for (d = 0; d < dim; d++) a[h * dim + d] = 0;
        for (p = 0; p < n; p++)
            for (d = 0; d < dim; d++) a[h * dim + d] += s[p] / sum * vh[(size_t)p * (size_t)kv_dim + (size_t)d];
    }
    free(s);
    return highest;
}

static void stab_swiglu(double *m, const qwen3i_layer *w, const double *h, int how) {
    const int n = w->w_gate.rows;
    double *gate = (double *)malloc((size_t)n * 8);
    int i;
    stab_product(gate, &w->w_gate, h, 0);
    stab_product(m, &w->w_up, h, 0);
    for (i = 0; i < n; i++) m[i] *= gate[i] / (1 + exp(-gate[i]));
    for (i = 0; i < n && how == STAB_F16_PRODUCT; i++) m[i] = stab_f16(m[i]);
    free(gate);
}

typedef struct stab_extremes { double x, product, score; } stab_extremes;

static void stab_most(double *top, const double *v, int n) {
    int i;
    for (i = 0; i < n; i++) if (!(fabs(v[i]) <= *top)) *top = fabs(v[i]);
}

/* The model on one sequence from its start: logits [rows, n_vocab] of the last `rows` tokens. Layers before the last
   need all rows, the last only those. */
static stab_extremes stab_forward(double *logits, int rows, const stab_model *m, const qwen3_token *tokens, int n,
                                  int how) {
    const qwen3i_config *c = &m->model.config;
    const size_t embd = (size_t)c->n_embd, q_dim = (size_t)(c->n_head * c->head_dim),
                 kv_dim = (size_t)(c->n_head_kv * c->head_dim);
    double *x = (double *)malloc((size_t)n * embd * 8), *h = (double *)malloc(embd * 8),
           *q = (double *)malloc((size_t)n * q_dim * 8), *k = (double *)malloc((size_t)n * kv_dim * 8),
           *v = (double *)malloc((size_t)n * kv_dim * 8), *a = (double *)malloc(q_dim * 8),
           *ff = (double *)malloc((size_t)c->n_ff * 8);
    stab_extremes top = {0, 0, 0};
    int l, i, j;
    for (i = 0; i < n; i++)
        for (j = 0; j < c->n_embd; j++)
            x[(size_t)i * embd + (size_t)j] = cpu_at(m->model.weights.embed.data, m->model.weights.embed.type,
                                                     (size_t)tokens[i] * embd + (size_t)j);
    for (l = 0; l < c->n_layer; l++) {
        const qwen3i_layer *w = &m->layers[l];
        for (i = 0; i < n; i++) {
            stab_norm(h, x + (size_t)i * embd, w->attn_norm, c->n_embd, how);
            stab_qkv(q + (size_t)i * q_dim, k + (size_t)i * kv_dim, v + (size_t)i * kv_dim, c, w, h, i, how);
        }
        for (i = l == c->n_layer - 1 ? n - rows : 0; i < n; i++) {
            double *xi = x + (size_t)i * embd, score = stab_attention(a, c, q + (size_t)i * q_dim, k, v, i + 1);
            stab_product(xi, &w->wo, a, 1);
            stab_norm(h, xi, w->mlp_norm, c->n_embd, how);
            stab_swiglu(ff, w, h, how);
            stab_product(xi, &w->w_down, ff, 1);
            stab_most(&top.x, xi, c->n_embd);
            stab_most(&top.product, ff, c->n_ff);
            stab_most(&top.score, &score, 1);
        }
    }
    for (i = 0; i < rows; i++) {
        stab_norm(h, x + (size_t)(n - rows + i) * embd, m->model.weights.final_norm, c->n_embd, how);
        stab_product(logits + (size_t)i * (size_t)c->n_vocab, &m->model.weights.head, h, 0);
    }
    free(x); free(h); free(q); free(k); free(v); free(a); free(ff);
    return top;
}

/* ---- comparing ------------------------------------------------------------------------------------------- */
/* The worst row of got [rows, width] against want: ||got - want|| / ||want||; 1e30 if anything is not finite. A row
   smaller than `least` counts as that. */
static double stab_error(const float *got, const double *want, int rows, int width, double least) {
    double worst = 0;
    int i, j;
    if (!cpu_finite(got, (size_t)rows * (size_t)width)) return 1e30;
    for (i = 0; i < rows; i++, got += width, want += width) {
        double difference = 0, size = 0;
        for (j = 0; j < width; j++) {
            difference += ((double)got[j] - want[j]) * ((double)got[j] - want[j]);
            size += want[j] * want[j];
        }
        difference = sqrt(difference) / (sqrt(size) > least ? sqrt(size) : least);
        if (!(difference <= worst)) worst = difference;
    }
    return worst;
}

/* ---- a backend under test: its operations one by one --------------------------------------------------------- */
typedef struct stab_bench {
    const qwen3_backend *backend;
    const stab_model *model;
    qwen3_ctx_desc desc;
    void *model_state, *state;
    qwen3_token tokens[STAB_ROWS];
    int32_t seqs[STAB_ROWS], positions[STAB_ROWS];
    qwen3i_batch batch;
    char text[256];
    qwen3i_err err;
} stab_bench;

#define STAB_OK(b, call) CHECK_MSG((call) == QWEN3_OK, "%s: %s", #call, (b)->text)

/* What runs the tests now. */
static const qwen3_backend *stab_backend;
static int stab_kernels;                /* LAB_FUSED, or LAB_STANDARD */
static int stab_is_cuda(void) { return strcmp(stab_backend->name, "cuda") == 0; }
static const char *stab_name(void) { return !stab_is_cuda() ? "cpu" : stab_kernels ? "cuda, standard" : "cuda"; }
static const char *stab_type(qwen3i_type t) { return t == QWEN3I_F32 ? "F32" : t == QWEN3I_F16 ? "F16" : "BF16"; }

/* Are inputs of products rounded to 11 bits when there are so many rows, whoever does them? */
static int stab_rounds(qwen3i_type weights, int rows) {
    return stab_is_cuda() && weights != QWEN3I_F32 && (stab_kernels == LAB_STANDARD || rows > 8);
}
/* The input of Q, K and V as well? By products of our own, yes; else it keeps 22 bits: see the head of qwen3_cuda.cu. */
static int stab_own_products(const stab_bench *b, int rows) {
#ifdef QWEN3_TEST_CUDA
    return stab_is_cuda() && cuda_lab()->own_products(b->state, rows);
#else
    (void)b; (void)rows;
    return 0;
#endif
}
static double stab_bound(const stab_bench *b, qwen3i_type weights, int rows) {
    return stab_rounds(weights, rows) || stab_own_products(b, rows) ? STAB_ROUNDED : STAB_FLOAT;
}

/* Within its bound? Also a line of the table. */
static void stab_report(const char *what, const char *how, qwen3i_type weights, int kv, int rows, double error,
                        double bound) {
    if (test_verbose)
        printf("      %-10s %-26s %-4s weights, %-4s KV, %5d rows or positions: %8.1e (bound %.0e)\n", what, how,
               stab_type(weights), stab_type((qwen3i_type)kv), rows, error, bound);
    CHECK_MSG(error <= bound, "%s: %s, %s: %s weights, %s KV, %d rows or positions: error %.2e, bound %.0e",
              stab_name(), what, how, stab_type(weights), stab_type((qwen3i_type)kv), rows, error, bound);
}

/* The backend, or for contexts of the other path the one that makes them. */
static const qwen3_backend *stab_contexts(void) {
#ifdef QWEN3_TEST_CUDA
    if (stab_kernels == LAB_STANDARD) return cuda_lab_standard();
#endif
    return stab_backend;
}

static int stab_open(stab_bench *b, const stab_model *m, int max_ctx, int max_seqs, int chunk, int kv) {
    qwen3_load_desc load;
    memset(b, 0, sizeof *b);
    memset(&load, 0, sizeof load);
    b->backend = stab_backend;
    b->model = m;
    b->desc = ctx_desc(max_ctx, max_seqs, chunk, kv);
    b->err.text = b->text;
    b->err.cap = sizeof b->text;
    return STAB_OK(b, b->backend->model_create(&b->model_state, &m->model, &load, &b->err)) &&
           STAB_OK(b, stab_contexts()->ctx_create(&b->state, b->model_state, &m->model, &b->desc, &b->err));
}

static void stab_close(stab_bench *b) {
    b->backend->ctx_free(b->state);
    b->backend->model_free(b->model_state);
}

/* n rows of sequence 0 from position `before` on */
static void stab_rows(stab_bench *b, int n, int before) {
    int i;
    memset(&b->batch, 0, sizeof b->batch);
    for (i = 0; i < n; i++) {
        b->tokens[i] = i % b->model->model.config.n_vocab;
        b->seqs[i] = 0;
        b->positions[i] = before + i;
    }
    b->batch.tokens = b->tokens; b->batch.seqs = b->seqs; b->batch.positions = b->positions; b->batch.n_rows = n;
#ifdef QWEN3_TEST_CUDA
    if (stab_is_cuda()) STAB_OK(b, cuda_lab()->rows(b->state, &b->batch, &b->err));
    else
#endif
    {
        qwen3i_cpu *c = (qwen3i_cpu *)b->state;
        qwen3i_rope_angles(c->cosines, c->sines, b->positions, n, c->freqs, c->config->head_dim / 2, c->rope_scale);
    }
}

static float *stab_cpu_buffer(const qwen3i_cpu *c, lab_buffer buffer, int *width) {
    const qwen3i_config *g = c->config;
    *width = g->n_embd;
    if (buffer == LAB_Q || buffer == LAB_A) *width = g->n_head * g->head_dim;
    if (buffer == LAB_M) *width = g->n_ff;
    switch (buffer) {
        case LAB_H: return c->h;
        case LAB_Q: return c->q;
        case LAB_A: return c->a;
        case LAB_M: return c->ff;
        default:           return c->x;
    }
}

static void stab_put(stab_bench *b, lab_buffer buffer, const float *from) {
    float *to;
    int width;
#ifdef QWEN3_TEST_CUDA
    if (stab_is_cuda()) { STAB_OK(b, cuda_lab()->put(b->state, buffer, from, &b->err)); return; }
#endif
    to = stab_cpu_buffer((qwen3i_cpu *)b->state, buffer, &width);
    memcpy(to, from, (size_t)b->batch.n_rows * (size_t)width * 4);
}

static void stab_get(stab_bench *b, lab_buffer buffer, float *to) {
    const float *from;
    int width;
#ifdef QWEN3_TEST_CUDA
    if (stab_is_cuda()) { STAB_OK(b, cuda_lab()->get(b->state, buffer, to, &b->err)); return; }
#endif
    from = stab_cpu_buffer((qwen3i_cpu *)b->state, buffer, &width);
    memcpy(to, from, (size_t)b->batch.n_rows * (size_t)width * 4);
}

/* One operation on layer 0, from and to the buffers that lab_op names. */
static void stab_run(stab_bench *b, lab_op op) {
    qwen3i_cpu *c = (qwen3i_cpu *)b->state;
    const qwen3i_layer *w = b->model->layers;
    const int n = b->batch.n_rows;
    qwen3i_step step;
#ifdef QWEN3_TEST_CUDA
    if (stab_is_cuda()) { STAB_OK(b, cuda_lab()->run(b->state, op, 0, 1, NULL, &b->err)); return; }
#endif
    step.c = c; step.batch = &b->batch; step.layer = 0;
    switch (op) {
        case LAB_NORM:
            qwen3i_rmsnorm(&c->exec, c->h, c->x, w->attn_norm, n, c->config->n_embd, c->config->rms_eps);
            break;
        case LAB_QKV_ROPE:
            qwen3i_matmul_qkv(&c->exec, c->q, c->key, c->value, w, c->h, n);
            qwen3i_parallel(&c->pool, n, 4, qwen3i_place_rows, &step);
            break;
        case LAB_ATTENTION: qwen3i_attend(&step); break;
        case LAB_O_PROJ: qwen3i_matmul_add(&c->exec, c->x, &w->wo, c->a, n); break;
        case LAB_MLP:    qwen3i_swiglu(&c->exec, c->ff, &w->w_gate, &w->w_up, c->h, n); break;
        default:                qwen3i_matmul_add(&c->exec, c->x, &w->w_down, c->ff, n);
    }
}

/* The cached k or v of the rows [n, kv_dim], as floats */
static float *stab_cached(stab_bench *b, int value) {
    const qwen3i_config *c = &b->model->model.config;
    const qwen3i_type type = (qwen3i_type)b->desc.kv_type;
    const size_t kv_dim = (size_t)(c->n_head_kv * c->head_dim), n = (size_t)(b->positions[0] + b->batch.n_rows);
    char *k = (char *)malloc(n * kv_dim * 4), *v = (char *)malloc(n * kv_dim * 4);
    float *out = floats((size_t)b->batch.n_rows * kv_dim);
    STAB_OK(b, b->backend->kv_read(b->state, 0, 0, (int)n, k, v, &b->err));
    qwen3i_simd_level(0)->load(out, (value ? v : k) + (size_t)b->positions[0] * kv_dim * qwen3i_type_size(type), type,
                               b->batch.n_rows * (int)kv_dim);
    free(k);
    free(v);
    return out;
}

static double *stab_doubles(const float *x, size_t n) {         /* x NULL: zeros */
    double *y = (double *)calloc(n, 8);
    size_t i;
    for (i = 0; x && i < n; i++) y[i] = (double)x[i];
    return y;
}

/* ---- single operations ---------------------------------------------------------------------------------------- */
typedef struct stab_rows_case { const char *name; double size, outlier; } stab_rows_case;
static const stab_rows_case stab_cases[] = {    /* of a row's values, and of one channel in it */
    {"plain", 1, 0}, {"one channel of 1e4", 1, 1e4}, {"squares beyond half", 300, 0}, {"zeros", 0, 0},
    {"denormal", 1e-41, 0}, {"tiny", 1e-12, 0}, {"huge", 1e15, 0}
};
enum { STAB_CASES = sizeof stab_cases / sizeof *stab_cases };

static float *stab_values(int rows, int width, const stab_rows_case *c) {
    float *x = cpu_floats((size_t)rows * (size_t)width, c->size);
    int i;
    for (i = 0; i < rows && c->outlier != 0; i++)
        x[i * width + (5 + i) % width] = (float)(i % 2 ? c->outlier : -c->outlier);
    return x;
}

static void stab_check_norm(stab_bench *b, int rows, const stab_rows_case *c) {
    const int width = b->model->model.config.n_embd;
    const qwen3i_type type = b->model->layers[0].wq.type;
    float *x = stab_values(rows, width, c), *got = floats((size_t)rows * (size_t)width);
    double *want = stab_doubles(x, (size_t)rows * (size_t)width);
    int i;
    for (i = 0; i < rows; i++)
        stab_norm(want + i * width, want + i * width, b->model->layers[0].attn_norm, width, STAB_EXACT);
    stab_put(b, LAB_X, x);
    stab_run(b, LAB_NORM);
    stab_get(b, LAB_H, got);
    stab_report("norm", c->name, type, b->desc.kv_type, rows, stab_error(got, want, rows, width, 1e-25),
                stab_bound(b, type, rows));
    free(x); free(got); free(want);
}

/* q and, in the cache, k and v, of rows h; errors of k beside what its one rounding may do. */
static void stab_check_qkv(stab_bench *b, int rows, float times, const stab_rows_case *c) {
    static const double ulp[] = {0, 0, 1.0 / 2048, 1.0 / 256};  /* half of one: a rounding's most, by KV type */
    const qwen3i_config *g = &b->model->model.config;
    const qwen3i_type type = b->model->layers[0].wq.type;
    const int q_dim = g->n_head * g->head_dim, kv_dim = g->n_head_kv * g->head_dim, dim = g->head_dim;
    float *h = stab_values(rows, g->n_embd, c), *got = floats((size_t)rows * (size_t)q_dim), *got_k, *got_v;
    double *in = stab_doubles(h, (size_t)rows * (size_t)g->n_embd),
           *q = stab_doubles(NULL, (size_t)rows * (size_t)q_dim),
           *k = stab_doubles(NULL, (size_t)rows * (size_t)kv_dim),
           *v = stab_doubles(NULL, (size_t)rows * (size_t)kv_dim);
    const double angles = (b->positions[0] + rows) / 16777216.0;        /* they are float32 products */
    const double bound = angles + 2 * (stab_own_products(b, rows) ? STAB_ROUNDED : STAB_FLOAT);
    char name[64];
    int i, clamped = 0;
    for (i = 0; i < rows; i++)
        stab_qkv(q + i * q_dim, k + i * kv_dim, v + i * kv_dim, g, b->model->layers, in + i * g->n_embd,
                 b->positions[i], STAB_EXACT);
    for (i = 0; i < rows * kv_dim; i++) clamped |= b->desc.kv_type == QWEN3_KV_F16 && fabs(k[i]) > 65504;
    for (i = 0; i < rows * kv_dim && clamped; i++) k[i] = k[i] > 65504 ? 65504 : k[i] < -65504 ? -65504 : k[i];
    stab_put(b, LAB_H, h);
    stab_run(b, LAB_QKV_ROPE);
    stab_get(b, LAB_Q, got);
    got_k = stab_cached(b, 0);
    got_v = stab_cached(b, 1);
    snprintf(name, sizeof name, "%s, gains x %g%s", c->name, (double)times, clamped ? ", clamped" : "");
    stab_report("q", name, type, b->desc.kv_type, rows, stab_error(got, q, rows * g->n_head, dim, 1e-25),
                bound);
    stab_report("k", name, type, b->desc.kv_type, rows, stab_error(got_k, k, rows * g->n_head_kv, dim, 1e-25),
                bound + ulp[b->desc.kv_type]);
    stab_report("v", name, type, b->desc.kv_type, rows, stab_error(got_v, v, rows, kv_dim, 1e-7),
                bound + ulp[b->desc.kv_type]);
    free(h); free(got); free(got_k); free(got_v); free(in); free(q); free(k); free(v);
}

/* silu(gate) * up beyond F16's range, and what Wdown makes of it. */
static void stab_check_mlp(stab_bench *b, int rows, double size) {
    const qwen3i_config *g = &b->model->model.config;
    const qwen3i_layer *w = b->model->layers;
    const stab_rows_case c = {"", size, 0};
    const double bound = stab_bound(b, w->w_gate.type, rows);
    float *h = stab_values(rows, g->n_embd, &c), *x = stab_values(rows, g->n_embd, &stab_cases[0]),
          *m = floats((size_t)rows * (size_t)g->n_ff), *got = floats((size_t)rows * (size_t)g->n_embd);
    double *in = stab_doubles(h, (size_t)rows * (size_t)g->n_embd),
           *want_x = stab_doubles(x, (size_t)rows * (size_t)g->n_embd),
           *want_m = stab_doubles(NULL, (size_t)rows * (size_t)g->n_ff), top = 0;
    char name[64];
    int i;
    for (i = 0; i < rows; i++) {
        stab_swiglu(want_m + i * g->n_ff, w, in + i * g->n_embd, STAB_EXACT);
        stab_product(want_x + i * g->n_embd, &w->w_down, want_m + i * g->n_ff, 1);
    }
    stab_most(&top, want_m, rows * g->n_ff);
    CHECK_MSG(size < 100 || top > 65504, "the product reaches only %g", top);
    stab_put(b, LAB_H, h);
    stab_run(b, LAB_MLP);
    stab_get(b, LAB_M, m);
    stab_put(b, LAB_X, x);
    stab_run(b, LAB_DOWN);
    stab_get(b, LAB_X, got);
    snprintf(name, sizeof name, "product up to %.1e", top);
    stab_report("swiglu", name, w->w_gate.type, b->desc.kv_type, rows, stab_error(m, want_m, rows, g->n_ff, 1e-25),
                bound);
    stab_report("down", name, w->w_gate.type, b->desc.kv_type, rows, stab_error(got, want_x, rows, g->n_embd, 1e-25),
                2 * bound);
    free(h); free(x); free(m); free(got); free(in); free(want_x); free(want_m);
}

/* Attention of the last `rows` of n positions, with keys as large as such gains make them. Float32 scores of size S are
   off by S * 2^-24 a product, and the softmax feels that as such. */
static void stab_check_attention(stab_bench *b, int n, int rows, float times) {
    const qwen3i_config *g = &b->model->model.config;
    const qwen3i_type type = (qwen3i_type)b->desc.kv_type;
    const size_t q_dim = (size_t)(g->n_head * g->head_dim), kv_dim = (size_t)(g->n_head_kv * g->head_dim),
                 count = (size_t)n * kv_dim;
    const float *gain = b->model->layers[0].k_norm;
    float *q = cpu_floats((size_t)rows * q_dim, 2), *k = cpu_floats(count, 1.5), *v = cpu_floats(count, 1),
          *got = floats((size_t)rows * q_dim);
    char *stored_k = (char *)malloc(count * 4), *stored_v = (char *)malloc(count * 4);
    double *want = stab_doubles(NULL, (size_t)rows * q_dim), *in = stab_doubles(q, (size_t)rows * q_dim), *keys,
           *values, score = 0;
    char name[64];
    size_t i;
    int r;
    for (i = 0; i < count; i++) k[i] *= gain[i % (size_t)g->head_dim];
    qwen3i_simd_level(0)->store(stored_k, k, type, (int)count);
    qwen3i_simd_level(0)->store(stored_v, v, type, (int)count);
    qwen3i_simd_level(0)->load(k, stored_k, type, (int)count);
    qwen3i_simd_level(0)->load(v, stored_v, type, (int)count);
    keys = stab_doubles(k, count);
    values = stab_doubles(v, count);
    stab_rows(b, rows, n - rows);
    STAB_OK(b, b->backend->kv_write(b->state, 0, 0, n, stored_k, stored_v, &b->err));
    stab_put(b, LAB_Q, q);
    stab_run(b, LAB_ATTENTION);
    stab_get(b, LAB_A, got);
    for (r = 0; r < rows; r++) {
        const double s =
            stab_attention(want + (size_t)r * q_dim, g, in + (size_t)r * q_dim, keys, values, n - rows + r + 1);
        if (s > score) score = s;
    }
    snprintf(name, sizeof name, "gains x %g, scores %.0e", (double)times, score);
    stab_report("attention", name, b->model->layers[0].wq.type, b->desc.kv_type, n,
                stab_error(got, want, rows, (int)q_dim, 1e-25), STAB_FLOAT + score / 4194304);
    free(q); free(k); free(v); free(got); free(stored_k); free(stored_v);
    free(want); free(in); free(keys); free(values);
}

static void stab_operations_of(const stab_shape *shape) {
    static const int rows[] = {1, 63, 64, 128};
    int t, kv, i, k;
    for (t = 0; t < 3; t++)
        for (i = 0; i < 4; i++) {
            stab_model *m = stab_create(shape, cpu_types[t], stab_times[i], 2);
            for (kv = QWEN3_KV_F32; kv <= QWEN3_KV_BF16; kv++) {
                stab_bench b;
                if (stab_open(&b, m, 136, 1, 128, kv)) {
                    for (k = 0; k < 4 && (i == 0 || k < 2); k++) {
                        stab_rows(&b, rows[k], 5);
                        stab_check_qkv(&b, rows[k], stab_times[i], &stab_cases[k % 2]);
                        if (i > 0 || kv > QWEN3_KV_F32) continue;
                        stab_check_mlp(&b, rows[k], 1);
                        stab_check_mlp(&b, rows[k], 400);
                    }
                    for (k = 0; k < STAB_CASES && i == 0 && kv == QWEN3_KV_F32; k++) {
                        stab_rows(&b, k % 2 ? 3 : 17, 0);
                        stab_check_norm(&b, k % 2 ? 3 : 17, &stab_cases[k]);
                    }
                    stab_check_attention(&b, 65, 20, stab_times[i]);
                }
                stab_close(&b);
            }
            stab_destroy(m);
        }
}

/* The chip that is emulated, if one is. */
static void stab_chip(int capability) {
#ifdef QWEN3_TEST_CUDA
    cuda_on_cpu_chip(capability);
#else
    (void)capability;
#endif
}

static void stab_operations(void) {
    stab_operations_of(&stab_small);
    if (!stab_is_cuda()) return;
    stab_chip(90);                      /* whose own products take 2 rows and more */
    stab_operations_of(&stab_wide);
    stab_chip(80);
}

static void stab_lengths(void) {
    static const int lengths[] = {1, 2, 63, 64, 65, 4095, 40960};
    int kv, i, k;
    for (k = 0; k < 4; k += 3) {
        stab_model *m = stab_create(&stab_long, QWEN3I_BF16, stab_times[k], 2);
        for (kv = QWEN3_KV_F32; kv <= QWEN3_KV_BF16; kv++) {
            stab_bench b;
            if (stab_open(&b, m, 40960, 1, 16, kv))
                for (i = 0; i < 7; i++)
                    stab_check_attention(&b, lengths[i], lengths[i] < 3 || lengths[i] > 40000 ? 1 : 12, stab_times[k]);
            stab_close(&b);
        }
        stab_destroy(m);
    }
}

/* ---- whole models ------------------------------------------------------------------------------------------- */
static void stab_tokens(qwen3_token *tokens, int n, int n_vocab, int seed) {
    int i;
    for (i = 0; i < n; i++) tokens[i] = (qwen3_token)(((long)i * 31 + (long)i * i * 7 + seed * 13 + 5) % n_vocab);
}

/* Evaluate n tokens of a sequence, in steps of the bench's chunk; logits of the last `rows` of them, all in one step */
static void stab_eval(stab_bench *b, const qwen3_token *tokens, int n, float *logits, int rows) {
    const int vocab = b->model->model.config.n_vocab, chunk = b->desc.prefill_chunk;
    int32_t *seqs = (int32_t *)calloc((size_t)chunk, 4), *positions = (int32_t *)malloc((size_t)chunk * 4);
    qwen3i_out *outs = (qwen3i_out *)calloc((size_t)rows, sizeof *outs);
    qwen3i_batch batch;
    int at, i;
    for (at = 0; at < n; at += batch.n_rows) {
        memset(&batch, 0, sizeof batch);
        batch.n_rows = qwen3i_min(chunk, at < n - rows ? n - rows - at : n - at);
        for (i = 0; i < batch.n_rows; i++) positions[i] = at + i;
        batch.tokens = tokens + at; batch.seqs = seqs; batch.positions = positions; batch.outs = outs;
        for (i = 0; i < batch.n_rows && at >= n - rows; i++) {
            qwen3i_out *o = &outs[batch.n_outs++];
            o->row = i;
            o->keep_seq = -1;
            o->logits = logits + (at + i - (n - rows)) * vocab;
        }
        STAB_OK(b, b->backend->forward(b->state, &batch, &b->err));
    }
    free(seqs); free(positions); free(outs);
}

/* How far off the logits of a reference are that does something `how`, and nothing else. */
static double stab_reference_error(const double *want, int rows, const stab_model *m, const qwen3_token *tokens, int n,
                                   int how) {
    const int vocab = m->model.config.n_vocab;
    double *other = stab_doubles(NULL, (size_t)(rows * vocab)), e;
    float *got = floats((size_t)(rows * vocab));
    int i;
    stab_forward(other, rows, m, tokens, n, how);
    for (i = 0; i < rows * vocab; i++) got[i] = (float)other[i];
    e = stab_error(got, want, rows, vocab, 1e-25);
    free(other);
    free(got);
    return e;
}

/* What a model in float32 may be off by: so many times what rounding K and V to float32 does by itself. Hot gains
   make a model feel every rounding, and this measures by how much. `rounds`: inputs of products have 11 bits. */
static double stab_model_bound(const double *want, int rows, const stab_model *m, const qwen3_token *tokens, int n,
                               int rounds) {
    return rounds ? 6 * stab_reference_error(want, rows, m, tokens, n, STAB_KV_F16) + 10 * STAB_ROUNDED
                  : 64 * stab_reference_error(want, rows, m, tokens, n, STAB_KV_F32) + 10 * STAB_FLOAT;
}

/* Logits of the last rows of n tokens against float64. */
static void stab_check_model(const stab_model *m, const char *name, int kv, int n, int rows) {
    const qwen3i_config *c = &m->model.config;
    const size_t count = (size_t)(rows * c->n_vocab);
    const qwen3i_type type = m->layers[0].wq.type;
    const int rounds = stab_rounds(type, n);        /* then K and V are not rounded from the very same values */
    double *want = stab_doubles(NULL, count), least = 0;
    float *got = floats(count);
    qwen3_token *tokens = (qwen3_token *)malloc((size_t)n * sizeof *tokens);
    stab_extremes top;
    stab_bench b;
    stab_tokens(tokens, n, c->n_vocab, 0);
    top = stab_forward(want, rows, m, tokens, n, STAB_EXACT);
    if (kv != QWEN3_KV_F32) least = stab_reference_error(want, rows, m, tokens, n, kv);
    if (stab_open(&b, m, n, 1, qwen3i_min(n, 128), kv)) stab_eval(&b, tokens, n, got, rows);
    stab_close(&b);
    if (test_verbose)
        printf("      %-10s residual %.1e, product %.1e, scores %.1e%s", "", top.x, top.product, top.score,
               kv == QWEN3_KV_F32 ? "\n" : "");
    if (test_verbose && kv != QWEN3_KV_F32) printf("; rounding K and V alone: %.1e\n", least);
    stab_report("model", name, type, kv, n, stab_error(got, want, rows, c->n_vocab, 1e-25),
                (rounds ? 4 : 2) * least + stab_model_bound(want, rows, m, tokens, n, rounds));
    free(want); free(got); free(tokens);
}

static void stab_models(void) {
    int t, kv, i;
    char name[64];
    for (t = 0; t < 3; t++) {
        for (i = 0; i < 4; i++) {
            stab_model *m = stab_create(&stab_small, cpu_types[t], stab_times[i], 2);
            snprintf(name, sizeof name, "gains x %g", (double)stab_times[i]);
            for (kv = QWEN3_KV_F32; kv <= QWEN3_KV_BF16; kv++) {
                stab_check_model(m, name, kv, 24, 24);
                if (kv == QWEN3_KV_F32) stab_check_model(m, name, kv, 8, 8);
            }
            stab_destroy(m);
        }
    }
}

static void stab_outliers(void) {
    int t, i, j;
    for (t = 0; t < 3; t++) {
        stab_model *m = stab_create(&stab_small, cpu_types[t], 1, 2);
        for (i = 0; i < m->model.config.n_vocab; i++) {
            stab_embed(m, i, 7, i % 2 ? 1e4 : -1e4);
            for (j = 0; j < m->model.config.n_embd && i % 16 < 3; j++)
                stab_embed(m, i, j, i % 16 == 0 ? 0 : i % 16 == 1 ? 1e-41 : 5e4);
        }
        stab_check_model(m, "outliers, zeros, denormals", QWEN3_KV_F32, 24, 24);
        stab_destroy(m);
    }
}

/* SwiGLU products beyond F16 within a model. */
static void stab_products(void) {
    static const int rows[] = {1, 63, 64, 128};
    int t, i;
    for (t = 0; t < 3; t++) {
        stab_model *m = stab_create(stab_is_cuda() ? &stab_wide : &stab_small, cpu_types[t], 1, 300);
        stab_chip(cpu_types[t] == QWEN3I_BF16 ? 90 : 80);
        for (i = 0; i < 4; i++) stab_check_model(m, "products beyond 65504", QWEN3_KV_F32, rows[i], rows[i]);
        stab_destroy(m);
    }
    stab_chip(80);
}

static void stab_long_models(void) {
    static const int lengths[] = {1, 2, 63, 64, 65, 4095};
    int i;
    stab_model *m = stab_create(&stab_long, QWEN3I_BF16, 1, 2);
    for (i = 0; i < 6 && lengths[i] <= STAB_MOST_TOKENS; i++)
        stab_check_model(m, "long", QWEN3_KV_F16, lengths[i], qwen3i_min(lengths[i], 2));
    stab_destroy(m);
}

#define STAB_LENGTH(s) (1 + (s) * 7 % 11)

/* n sequences of different lengths in one batch, then a token more of each: rows of the step [n] */
static void stab_check_batch(const stab_model *m, int n_seqs, double *const *want, const double *bounds) {
    const int vocab = m->model.config.n_vocab;
    qwen3_token *tokens = (qwen3_token *)malloc(STAB_SEQS * 12 * sizeof *tokens), last[STAB_SEQS];
    int32_t *seqs = (int32_t *)malloc(STAB_SEQS * 12 * 4), *positions = (int32_t *)malloc(STAB_SEQS * 12 * 4);
    float *got = floats((size_t)n_seqs * (size_t)vocab);
    qwen3i_out outs[STAB_SEQS];
    qwen3i_batch batch;
    double worst = 0, bound = 0;
    stab_bench b;
    int s, i;
    memset(&batch, 0, sizeof batch);
    memset(outs, 0, sizeof outs);
    batch.tokens = tokens; batch.seqs = seqs; batch.positions = positions; batch.outs = outs;
    for (s = 0; s < n_seqs; s++) {
        const int length = STAB_LENGTH(s);
        qwen3_token all[12];
        stab_tokens(all, length + 1, vocab, s);
        for (i = 0; i < length; i++) {
            tokens[batch.n_rows] = all[i];
            seqs[batch.n_rows] = s;
            positions[batch.n_rows++] = i;
        }
        last[s] = all[length];
        outs[s].row = s;
        outs[s].keep_seq = -1;
        outs[s].logits = got + s * vocab;
    }
    if (stab_open(&b, m, 16, n_seqs, batch.n_rows, QWEN3_KV_F32)) {
        STAB_OK(&b, b.backend->forward(b.state, &batch, &b.err));
        for (s = 0; s < n_seqs; s++) { seqs[s] = s; positions[s] = STAB_LENGTH(s); }
        batch.tokens = last; batch.n_rows = batch.n_outs = n_seqs;
        STAB_OK(&b, b.backend->forward(b.state, &batch, &b.err));
    }
    stab_close(&b);
    for (s = 0; s < n_seqs; s++) {
        const double e = stab_error(got + s * vocab, want[s], 1, vocab, 1e-25) / bounds[s];
        if (!(e <= worst)) { worst = e; bound = bounds[s]; }
    }
    stab_report("batch", "different lengths", m->layers[0].wq.type, QWEN3_KV_F32, n_seqs, worst * bound, bound);
    free(tokens); free(seqs); free(positions); free(got);
}

static void stab_batches(void) {
    static const int sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64};
    int t, s, i;
    for (t = 0; t < 3; t++) {
        stab_model *m = stab_create(&stab_small, cpu_types[t], 1, 2);
        double *want[STAB_SEQS], bounds[STAB_SEQS];
        for (s = 0; s < STAB_SEQS; s++) {
            qwen3_token tokens[12];
            stab_tokens(tokens, STAB_LENGTH(s) + 1, m->model.config.n_vocab, s);
            want[s] = stab_doubles(NULL, (size_t)m->model.config.n_vocab);
            stab_forward(want[s], 1, m, tokens, STAB_LENGTH(s) + 1, STAB_EXACT);
            bounds[s] =
                stab_model_bound(want[s], 1, m, tokens, STAB_LENGTH(s) + 1, stab_rounds(cpu_types[t], STAB_ROWS));
        }
        for (i = 0; i < 16 && sizes[i] <= STAB_MOST_SEQS; i++) stab_check_batch(m, sizes[i], want, bounds);
        for (s = 0; s < STAB_SEQS; s++) free(want[s]);
        stab_destroy(m);
    }
}

/* ---- are the bounds sharp? ------------------------------------------------------------------------------------- */
/* What each classic shortcut computes must lie far outside of the bound that the library is held to. */
static void test_stability_tells_mistakes(void) {
    static const struct { const char *name; int how; double mlp_size; } mistakes[] = {
        {"bf16 rounding of the normalised input", STAB_BF16_INPUT, 2}, {"half sum of squares", STAB_F16_SUM, 2},
        {"half SwiGLU product", STAB_F16_PRODUCT, 300}, {"norm after rope", STAB_ROPE_FIRST, 2}
    };
    qwen3_token tokens[20];
    int i, j;
    for (i = 0; i < 4; i++) {
        stab_model *m = stab_create(&stab_small, QWEN3I_BF16, 1, mistakes[i].mlp_size);
        double *want = stab_doubles(NULL, (size_t)(20 * m->model.config.n_vocab)), e, bound;
        for (j = 0; j < m->model.config.n_vocab && mistakes[i].how == STAB_F16_SUM; j++) stab_embed(m, j, 7, 1e4);
        stab_tokens(tokens, 20, m->model.config.n_vocab, 0);
        stab_forward(want, 20, m, tokens, 20, STAB_EXACT);
        e = stab_reference_error(want, 20, m, tokens, 20, mistakes[i].how);
        bound = stab_model_bound(want, 20, m, tokens, 20, 0);
        if (test_verbose) printf("      %-40s %8.1e (bound %.0e)\n", mistakes[i].name, e, bound);
        CHECK_MSG(e > 10 * bound, "%s would pass: it is off by %.1e, the bound is %.1e", mistakes[i].name, e, bound);
        free(want);
        stab_destroy(m);
    }
}

/* ---- the probe ------------------------------------------------------------------------------------------------- */
typedef struct stab_seen { int n, rows, bad; float *last; const qwen3_info *info; } stab_seen;

static void stab_show(int layer, qwen3_value what, const float *data, int n_rows, int width, void *user) {
    stab_seen *s = (stab_seen *)user;
    const qwen3_info *f = s->info;
    const int q_dim = f->n_head * f->head_dim, kv_dim = f->n_head_kv * f->head_dim;
    const int widths[] = {q_dim, kv_dim, kv_dim, q_dim, f->n_embd, f->n_ff, f->n_embd};
    s->bad += layer != s->n / 7 % f->n_layer || (int)what != s->n % 7 || width != widths[what];
    if (what == QWEN3_VALUE_Q && layer == 0) s->rows += n_rows;
    if (what == QWEN3_VALUE_RESIDUAL) memcpy(s->last, data + (size_t)(n_rows - 1) * (size_t)width, (size_t)width * 4);
    s->n++;
}

/* It sees every value of every step in order, the last of which gives the hidden state; the results stay the same. */
static void test_stability_probe(void) {
    fixture f;
    qwen3_ctx_desc desc = ctx_desc(64, 1, 8, QWEN3_KV_F32);
    qwen3_token tokens[20];
    qwen3_item it;
    stab_seen seen;
    qwen3_ctx *ctx;
    float *plain, *hidden;
    double *want;
    if (!fixture_open(&f, "hot")) return;
    memset(&seen, 0, sizeof seen);
    seen.info = &f.info;
    seen.last = floats((size_t)f.info.n_embd);
    hidden = floats((size_t)f.info.n_embd);
    stab_tokens(tokens, 20, f.info.n_vocab, 1);
    plain = plain_logits(f.model, tokens, 20, QWEN3_KV_F32);
    desc.probe.show = stab_show;
    desc.probe.user = &seen;
    ctx = ctx_open_desc(f.model, &desc);
    it = item_of(0, tokens, 20);
    it.hidden = hidden;
    CHECK_OK(ctx, qwen3_eval(ctx, &it, 1));
    CHECK(same_logits(ctx, 0, plain + 19 * f.info.n_vocab, f.info.n_vocab));
    CHECK(seen.n == 3 * 7 * f.info.n_layer && seen.rows == 20 && !seen.bad);
    want = stab_doubles(seen.last, (size_t)f.info.n_embd);
    stab_norm(want, want, f.model->weights.final_norm, f.info.n_embd, STAB_EXACT);
    CHECK(stab_error(hidden, want, 1, f.info.n_embd, 1e-25) < STAB_FLOAT);
    qwen3_ctx_free(ctx);
    free(plain); free(hidden); free(want); free(seen.last);
    fixture_close(&f);
}

/* ---- the suite -------------------------------------------------------------------------------------------- */
/* Each of them on the CPU, and on CUDA by both of its paths. */
#ifdef QWEN3_TEST_CUDA
  #define STAB_CUDA_TEST(name) static void test_stability_cuda_##name(void) { \
      stab_backend = qwen3_cuda_backend(); \
      for (stab_kernels = 0; stab_kernels < 2; stab_kernels++) stab_##name(); \
  }
#else
  #define STAB_CUDA_TEST(name)
#endif
#define STAB_TEST(name) \
    static void test_stability_##name(void) { stab_kernels = 0; stab_backend = qwen3i_cpu_backend(); stab_##name(); } \
    STAB_CUDA_TEST(name)
STAB_TEST(operations)
STAB_TEST(lengths)
STAB_TEST(models)
STAB_TEST(outliers)
STAB_TEST(products)
STAB_TEST(long_models)
STAB_TEST(batches)

static void suite_stability(void) {
    RUN(test_stability_operations);
    RUN(test_stability_lengths);
    RUN(test_stability_models);
    RUN(test_stability_outliers);
    RUN(test_stability_products);
    RUN(test_stability_long_models);
    RUN(test_stability_batches);
    RUN(test_stability_tells_mistakes);
    RUN(test_stability_probe);
#ifdef QWEN3_TEST_CUDA
    if (cuda_lab()->no_device()) {
        test_skip("test_stability_cuda", cuda_lab()->no_device());
        return;
    }
    RUN(test_stability_cuda_operations);
    RUN(test_stability_cuda_lengths);
    RUN(test_stability_cuda_models);
    RUN(test_stability_cuda_outliers);
    RUN(test_stability_cuda_products);
    RUN(test_stability_cuda_long_models);
    RUN(test_stability_cuda_batches);
#endif
}
#endif
