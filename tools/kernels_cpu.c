/* kernels_cpu.c - what tools/kernels.cu gives tools/compare_torch.py, from the CPU backend (make
   build/libqwen3_kernels_cpu.so). All functions return NULL or an error's text. */
#define QWEN3_IMPLEMENTATION
#include "../qwen3.h"

typedef struct lab_model {
    qwen3_model *model;
    qwen3_ctx   *ctx;
    float       *states;                /* where the probe copies the residual stream to, layer after layer */
    float       *part[QWEN3_VALUE_RESIDUAL + 1];    /* where it copies one layer's values to, or NULL */
} lab_model;

static char lab_text[512];

const char *lab_error(void) { return lab_text; }

static void lab_show(int layer, qwen3_value what, const float *data, int n_rows, int width, void *user) {
    lab_model *l = (lab_model *)user;
    const size_t n = (size_t)n_rows * (size_t)width;
    if (what == QWEN3_VALUE_RESIDUAL && l->states) memcpy(l->states + (size_t)(layer + 1) * n, data, n * sizeof *data);
    if (l->part[what]) memcpy(l->part[what], data, n * sizeof *data);
}

void lab_close(lab_model *l) {
    qwen3_ctx_free(l->ctx);
    qwen3_free(l->model);
    free(l);
}

lab_model *lab_open(const char *path, int rows, int kv) {
    lab_model *l = (lab_model *)calloc(1, sizeof *l);
    qwen3_load_desc load;
    qwen3_ctx_desc desc;
    memset(&load, 0, sizeof load);
    memset(&desc, 0, sizeof desc);
    load.path = path;
    desc.max_ctx = desc.prefill_chunk = rows;
    desc.kv_type = kv;
    desc.probe.show = lab_show;
    desc.probe.user = l;
    if (qwen3_load(&l->model, &load, lab_text, sizeof lab_text) == QWEN3_OK &&
        qwen3_ctx_create(&l->ctx, l->model, &desc, lab_text, sizeof lab_text) == QWEN3_OK) return l;
    lab_close(l);
    return NULL;
}

static const char *lab_eval(lab_model *l, const int *tokens, int n, float *logits) {
    qwen3_item item;
    memset(&item, 0, sizeof item);
    item.tokens = tokens;
    item.n = n;
    item.all_logits = logits;
    if (qwen3_seq_truncate(l->ctx, 0, 0) == QWEN3_OK && qwen3_eval(l->ctx, &item, 1) == QWEN3_OK) return NULL;
    return qwen3_ctx_error(l->ctx);
}

const char *lab_logits(lab_model *l, const int *tokens, int n, float *logits) { return lab_eval(l, tokens, n, logits); }

const char *lab_forward(lab_model *l, const int *tokens, int n, float *states) {
    const qwen3i_cpu *c = (const qwen3i_cpu *)l->ctx->state;
    const char *error;
    qwen3i_embed(&c->exec, states, &c->weights->embed, tokens, n);
    l->states = states;
    error = lab_eval(l, tokens, n, NULL);
    l->states = NULL;
    return error;
}

const char *lab_layer(lab_model *l, int layer, int n, const float *x, float *q, float *k, float *v, float *a,
                      float *product, float *out) {
    qwen3i_cpu *c = (qwen3i_cpu *)l->ctx->state;
    float *const parts[] = {q, k, v, a, NULL, product, out};
    int32_t *seqs = (int32_t *)calloc((size_t)n, sizeof *seqs), *positions = (int32_t *)calloc((size_t)n, sizeof *seqs);
    qwen3i_batch b;
    int i;
    memset(&b, 0, sizeof b);
    for (i = 0; i < n; i++) positions[i] = i;
    b.seqs = seqs; b.positions = positions; b.n_rows = n;
    memcpy(l->part, parts, sizeof parts);
    memcpy(c->x, x, (size_t)n * (size_t)c->config->n_embd * sizeof *x);
    qwen3i_rope_angles(c->cosines, c->sines, positions, n, c->freqs, c->config->head_dim / 2, c->rope_scale);
    qwen3i_decoder_layer(c, &b, layer);
    memset(l->part, 0, sizeof l->part);
    free(seqs);
    free(positions);
    return NULL;
}
