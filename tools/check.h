/* check.h - example --check: how large the numbers in a model get, layer by layer, and what that means for it.
   Included by example.c, after the implementation of qwen3.h.

   It evaluates a text on the CPU in float32 and reports extremes: of the norms' gains, of what is computed, and of the
   attention scores, with how far an F16 or BF16 cache would move those. A score that moves by e changes its weight in
   the softmax by a factor exp(e). docs/QWEN3_NUMERICAL_STABILITY_GUIDE.md explains the table. */
#ifndef QWEN3_CHECK_H
#define QWEN3_CHECK_H

#define CHECK_HALF_MOST 65504.0         /* F16 ends there */
#define CHECK_MOVED     0.1             /* a score that moves by less is harmless: a weight by a tenth */

static const char check_sample[] =      /* to evaluate if there is nothing better */
    "The quick brown fox jumps over the lazy dog. int main(void) { return 42; } In 1687 Newton published the "
    "Principia; sqrt(2) is 1.41421356... \xE4\xBD\xA0\xE5\xA5\xBD\xEF\xBC\x8C\xE4\xB8\x96\xE7\x95\x8C";

enum { CHECK_VALUES = QWEN3_VALUE_RESIDUAL + 1 };

typedef struct check_layer { double value[CHECK_VALUES], score, moved[2]; } check_layer;    /* moved: by F16, by BF16 */

typedef struct check {
    const qwen3_model *model;
    check_layer *layers;                /* [n_layer] */
    const float *q;                     /* of the layer being shown */
    char        *rounded;               /* [rows, kv_dim] keys in 16 bits */
    float       *scores, *other;        /* [rows] */
    int          broken;                /* first layer with a value that is not finite, counted from 1 */
} check;

/* The largest |v|; infinite if one is not a number. */
static double check_most(const float *v, size_t n) {
    double most = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        const double size = fabs((double)v[i]);
        if (!(size <= FLT_MAX)) return HUGE_VAL;
        if (size > most) most = size;
    }
    return most;
}

/* Scores of all queries with the keys as they are, and with keys of 16 bits. */
static void check_scores(check *c, check_layer *l, const float *k, int n, int kv_dim) {
    const qwen3i_config *g = &c->model->config;
    const qwen3i_simd *simd = qwen3i_simd_level(0);
    const double scale = 1 / sqrt((double)g->head_dim);
    const int group = g->n_head / g->n_head_kv, q_dim = g->n_head * g->head_dim;
    int type, i, h, p;
    for (type = QWEN3I_F16; type <= QWEN3I_BF16; type++) {
        simd->store(c->rounded, k, (qwen3i_type)type, n * kv_dim);
        for (i = 0; i < n; i++)
            for (h = 0; h < g->n_head; h++) {
                const float *q = c->q + (size_t)i * (size_t)q_dim + (size_t)(h * g->head_dim);
                const size_t at = (size_t)(h / group * g->head_dim);
                simd->dot(c->scores, 0, k + at, (size_t)kv_dim, QWEN3I_F32, i + 1, q, 0, 1, g->head_dim, 0);
                simd->dot(c->other, 0, c->rounded + 2 * at, (size_t)kv_dim, (qwen3i_type)type, i + 1, q, 0, 1,
                          g->head_dim, 0);
                for (p = 0; p <= i; p++) {
                    const double s = scale * fabs((double)c->scores[p]),
                                 d = scale * fabs((double)(c->scores[p] - c->other[p]));
                    if (s > l->score) l->score = s;
                    if (d > l->moved[type - QWEN3I_F16]) l->moved[type - QWEN3I_F16] = d;
                }
            }
    }
}

static void check_show(int layer, qwen3_value what, const float *data, int n_rows, int width, void *user) {
    check *c = (check *)user;
    check_layer *l = &c->layers[layer];
    l->value[what] = check_most(data, (size_t)n_rows * (size_t)width);
    if (l->value[what] > FLT_MAX && !c->broken) c->broken = layer + 1;
    if (what == QWEN3_VALUE_Q) c->q = data;
    if (what == QWEN3_VALUE_K) check_scores(c, l, data, n_rows, width);
}

static void check_print(const check *c) {
    const qwen3i_config *g = &c->model->config;
    int i;
    puts("         gains of the norms           largest value                                       scores: cache of\n"
         "layer  input     q     k   mlp     q      k      v mlp in product residual    largest  F16 or BF16 moves");
    for (i = 0; i < g->n_layer; i++) {
        const qwen3i_layer *w = &c->model->weights.layers[i];
        const check_layer *l = &c->layers[i];
        const double *v = l->value;
        printf("%5d  %5.3g %5.3g %5.3g %5.3g", i, check_most(w->attn_norm, (size_t)g->n_embd),
               check_most(w->q_norm, (size_t)g->head_dim), check_most(w->k_norm, (size_t)g->head_dim),
               check_most(w->mlp_norm, (size_t)g->n_embd));
        printf(" %5.3g %6.4g %6.4g %6.4g %7.4g %8.4g", v[QWEN3_VALUE_Q], v[QWEN3_VALUE_K], v[QWEN3_VALUE_V],
               v[QWEN3_VALUE_MLP_INPUT], v[QWEN3_VALUE_PRODUCT], v[QWEN3_VALUE_RESIDUAL]);
        printf("    %7.4g %8.2g %8.2g\n", l->score, l->moved[0], l->moved[1]);
    }
}

/* What the table means. Returns 0 if the model should not be used as it is. */
static int check_verdict(const check *c) {
    check_layer top;
    int i, k;
    memset(&top, 0, sizeof top);
    for (i = 0; i < c->model->config.n_layer; i++) {
        const check_layer *l = &c->layers[i];
        for (k = 0; k < CHECK_VALUES; k++) if (l->value[k] > top.value[k]) top.value[k] = l->value[k];
        for (k = 0; k < 2; k++) if (l->moved[k] > top.moved[k]) top.moved[k] = l->moved[k];
    }
    if (c->broken) {
        printf("verdict: BROKEN. Layer %d computes values that are not finite; its weights are damaged.\n",
               c->broken - 1);
        return 0;
    }
    if (top.value[QWEN3_VALUE_PRODUCT] > CHECK_HALF_MOST || top.value[QWEN3_VALUE_RESIDUAL] > CHECK_HALF_MOST)
        puts("note: values beyond 65504. Programs that compute in half precision fail on this model; this one does "
             "not.");
    if (top.value[QWEN3_VALUE_K] > CHECK_HALF_MOST || top.value[QWEN3_VALUE_V] > CHECK_HALF_MOST) {
        puts("verdict: keys or values do not fit into an F16 cache. Set qwen3_ctx_desc.kv_type to QWEN3_KV_F32.");
        return 0;
    }
    if (top.moved[0] > CHECK_MOVED) {
        printf("verdict: an F16 cache moves scores by up to %.2g. Set qwen3_ctx_desc.kv_type to QWEN3_KV_F32.\n",
               top.moved[0]);
        return 0;
    }
    printf("verdict: fine. An F16 cache, the default, moves no score by more than %.2g%s\n", top.moved[0],
           top.moved[1] <= CHECK_MOVED ? "; BF16 will do, too." : "; do not use BF16 for it.");
    return 1;
}

/* Check a model on a text of at most 256 tokens. Returns 0 if it should not be used as it is, -1 if it cannot be. */
static int check_model(const qwen3_model *m, const char *text, int threads, char *err, size_t err_size) {
    enum { MOST = 256 };
    const qwen3i_config *g = &m->config;
    qwen3_token tokens[MOST];
    qwen3_ctx_desc d;
    qwen3_ctx *ctx = NULL;
    check c;
    int n = qwen3_encode(m, text, strlen(text), 0, tokens, MOST, NULL, 0), result = -1;
    const size_t kv_dim = (size_t)(g->n_head_kv * g->head_dim);
    if (n > MOST) n = MOST;
    memset(&c, 0, sizeof c);
    memset(&d, 0, sizeof d);
    c.model = m;
    c.layers = (check_layer *)calloc((size_t)g->n_layer, sizeof *c.layers);
    c.rounded = (char *)malloc(MOST * kv_dim * 2);
    c.scores = (float *)malloc(2 * MOST * sizeof *c.scores);
    c.other = c.scores + MOST;
    d.max_ctx = d.prefill_chunk = n;    /* all in one step */
    d.kv_type = QWEN3_KV_F32;
    d.threads = threads;
    d.probe.show = check_show;
    d.probe.user = &c;
    if (!c.layers || !c.rounded || !c.scores) snprintf(err, err_size, "out of memory");
    else if (n <= 0) snprintf(err, err_size, "there is no text to check it with");
    else if (qwen3_ctx_create(&ctx, m, &d, err, err_size) == QWEN3_OK) {
        if (qwen3_sync(ctx, 0, tokens, n, 0) == QWEN3_OK) {
            printf("%d tokens, evaluated in float32 on the CPU; absolute values\n", n);
            check_print(&c);
            result = check_verdict(&c);
        } else snprintf(err, err_size, "%s", qwen3_ctx_error(ctx));
        qwen3_ctx_free(ctx);
    }
    free(c.layers); free(c.rounded); free(c.scores);
    return result;
}
#endif
