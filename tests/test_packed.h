/* Quantised directories, FP8, AWQ, GPTQ and compressed-tensors: their values, and what is refused. */
#ifndef QWEN3_TESTS_TEST_PACKED_H
#define QWEN3_TESTS_TEST_PACKED_H
#include "fixture.h"
#include "tiny_packed.h"
#include "test_malformed.h"

static int packed_load_threads = 3;

typedef struct packed_files { tiny_text config; qwen3_file files[2]; qwen3_load_desc desc; } packed_files;

static void packed_files_make(packed_files *p, const packed_shape *shape, const char *quantization, const tiny_text *weights) {
    memset(p, 0, sizeof *p);
    p->config = packed_config(shape, quantization);
    p->files[0].name = "config.json"; p->files[0].data = p->config.p; p->files[0].size = p->config.n;
    p->files[1].name = "model.safetensors"; p->files[1].data = weights->p; p->files[1].size = weights->n;
    p->desc.files = p->files; p->desc.n_files = 2; p->desc.flags = QWEN3_LOAD_CHECK;
    p->desc.threads = packed_load_threads;
}

static qwen3_result packed_load_from(qwen3_model **m, const packed_shape *shape, const char *quantization, const tiny_text *weights,
                                     char err[512]) {
    packed_files p;
    packed_files_make(&p, shape, quantization, weights);
    const qwen3_result r = qwen3_load(m, &p.desc, err, 512);
    free(p.config.p);
    return r;
}

static void packed_load_without_memory(const packed_shape *shape, const char *quantization, const tiny_text *weights) {
    packed_files p;
    packed_files_make(&p, shape, quantization, weights);
    check_load_without_memory(&p.desc, quantization);
    free(p.config.p);
}

static qwen3_result packed_load(qwen3_model **m, const char *quantization, const tiny_text *weights, char err[512]) {
    return packed_load_from(m, &packed_usual, quantization, weights, err);
}

/* Logits [64] after five tokens at once and one more */
static int packed_logits(const qwen3_model *m, float *out) {
    static const qwen3_token tokens[6] = {3, 60, 17, 22, 9, 41};
    qwen3_ctx_desc d;
    qwen3_ctx *c = NULL;
    qwen3_item item;
    memset(&d, 0, sizeof d);
    d.threads = 2;
    d.kv_type = QWEN3_KV_F32;           /* F16 would turn a last bit into a whole step */
    if (!CHECK(qwen3_ctx_create(&c, m, &d, NULL, 0) == QWEN3_OK)) return 0;
    memset(&item, 0, sizeof item);
    item.tokens = tokens; item.n = 5;
    int ok = qwen3_eval(c, &item, 1) == QWEN3_OK;
    item.tokens = tokens + 5; item.n = 1;
    ok = ok && qwen3_eval(c, &item, 1) == QWEN3_OK;
    if (CHECK(ok)) memcpy(out, qwen3_logits(c, 0), 64 * sizeof *out);
    qwen3_ctx_free(c);
    return ok;
}

static void packed_near(const float *a, const float *b, int scheme) {   /* products keep 15 bits of x */
    float most = 0;
    for (int i = 0; i < 64; i++) most = fabsf(b[i]) > most ? fabsf(b[i]) : most;
    for (int i = 0; i < 64; i++) CHECK_MSG(fabsf(a[i] - b[i]) < 1e-4f * most, "scheme %d: logit %d is %g, not %g", scheme, i, (double)a[i], (double)b[i]);
}

/* One thread makes the same blocks as any number of them. */
static void packed_threads(const packed_shape *shape, const packed_scheme *s, const tiny_text *weights, const qwen3_model *many) {
    qwen3_model *one = NULL;
    char err[512];
    packed_load_threads = 1;
    if (CHECK_MSG(packed_load_from(&one, shape, s->config, weights, err) == QWEN3_OK, "%s", err)) {
        const qwen3i_matrix *a = &one->weights.layers[0].w_down, *b = &many->weights.layers[0].w_down;
        CHECK(a->type == b->type && a->rows == b->rows);
        CHECK(a->rows == 0 || memcmp(a->data, b->data, (size_t)a->rows * (size_t)qwen3i_row_bytes(a->type, a->cols)) == 0);
    }
    packed_load_threads = 3;
    qwen3_free(one);
}

/* Of a directory and its twin */
static void packed_compare(const packed_shape *shape, int scheme) {
    const packed_scheme *s = &packed_schemes[scheme];
    tiny_text files[2];
    float logits[2][64];
    char err[512];
    int ok = 1;
    for (int twin = 0; twin < 2; twin++) {
        qwen3_model *m = NULL;
        files[twin] = packed_weights(s, shape, twin);
        ok = CHECK_MSG(packed_load_from(&m, shape, twin ? "null" : s->config, &files[twin], err) == QWEN3_OK, "scheme %d: %s", scheme, err) &&
             packed_logits(m, logits[twin]) && ok;
        if (!twin && m) packed_threads(shape, s, &files[0], m);
        if (!twin && m) CHECK_MSG(m->info.weight_bytes < files[0].n * 5 / 4, "scheme %d is widened", scheme);
        qwen3_free(m);
    }
    if (ok && !packed_is_fp8(s)) packed_near(logits[0], logits[1], scheme);      /* x keeps 15 bits in these products */
    else if (ok) CHECK_MSG(cpu_same(logits[0], logits[1], 64) && cpu_finite(logits[0], 64), "scheme %d: the logits differ", scheme);
    free(files[0].p); free(files[1].p);
}

static void test_packed_values(void) {
    const fenv_t mode = qwen3i_float_enter();   /* as evaluation has it: -ffast-math makes zeros of subnormal numbers */
    for (int i = 0; i < PACKED_SCHEMES; i++) packed_compare(&packed_usual, i);
    for (int i = 0; i < PACKED_SCHEMES; i += 4) packed_compare(&packed_wrapped, i);
    qwen3i_float_leave(mode);
}

/* Each is refused, by name. */
static void test_packed_refused(void) {
    static const struct { int scheme; const char *config, *from, *to, *message; } cases[] = {
        {3, "{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true}", NULL, NULL, "bitsandbytes"},
        {3, "{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"version\":\"gemv\"}", NULL, NULL, "gemv"},
        {3, "{\"quant_method\":\"awq\",\"bits\":3,\"group_size\":128,\"version\":\"gemm\"}", NULL, NULL, "3 bits"},
        {11, "{\"quant_method\":\"compressed-tensors\",\"format\":\"nvfp4-pack-quantized\"}", NULL, NULL, "nvfp4-pack-quantized"},
        {5, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":24}", NULL, NULL, "groups of 24"},
        {5, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":64}", NULL, NULL, "qzeros"},
        {5, NULL, "q_proj.qzeros\"", "q_proj.qzerox\"", "q_proj.qzeros"},
        {5, NULL, "q_proj.scales\":{\"dtype\":\"F16\"", "q_proj.scales\":{\"dtype\":\"I16\"", "dtype I16"},
        {0, NULL, "q_proj.weight_scale_inv\"", "q_proj.weight_scale_inw\"", "q_proj.weight_scale"},
        {0, "null", NULL, NULL, "F8_E4M3"}
    };
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        tiny_text file = packed_weights(&packed_schemes[cases[i].scheme], &packed_usual, 0);
        char err[512] = "";
        qwen3_model *m = NULL;
        for (size_t at = 8; cases[i].from && at + strlen(cases[i].from) < file.n; at++)
            if (!memcmp(file.p + at, cases[i].from, strlen(cases[i].from))) memcpy(file.p + at, cases[i].to, strlen(cases[i].to));
        qwen3_result r = packed_load(&m, cases[i].config ? cases[i].config : packed_schemes[cases[i].scheme].config, &file, err);
        CHECK_MSG(r < 0 && !m && strstr(err, cases[i].message), "case %d: %d, '%s'", i, (int)r, err);
        qwen3_free(m);
        free(file.p);
    }
}

/* What a tensor that is found by a part of its name begins with */
static unsigned char *packed_data(const tiny_text *file, const char *part) {
    char *at = NULL;
    unsigned long begin = 0;
    uint64_t header = 0;
    for (size_t i = 8; i + strlen(part) < file->n && !at; i++) if (!memcmp(file->p + i, part, strlen(part))) at = file->p + i;
    if (!CHECK_MSG(at && sscanf(strstr(at, "offsets\":[") + 10, "%lu", &begin) == 1, "there is no %s", part)) return NULL;
    for (int i = 7; i >= 0; i--) header = header << 8 | (unsigned char)file->p[i];
    return (unsigned char *)file->p + 8 + header + begin;
}

/* Groups that are not full, that there are not, or that others do not share */
static void test_packed_bad_order(void) {
    static const struct { const char *tensor; int byte, value; const char *message; } cases[] = {
        {"q_proj.g_idx", 0, 1, "groups of 128"}, {"q_proj.g_idx", 3, 0x80, "groups of 128"}, {"down_proj.g_idx", 4, 3, "groups of 128"}
    };
    const packed_scheme *s = packed_schemes;
    char err[512] = "";
    qwen3_model *m = NULL;
    while (s->kind != PACKED_GPTQ_ORDER) s++;
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        tiny_text file = packed_weights(s, &packed_usual, 0);
        unsigned char *g_idx = packed_data(&file, cases[i].tensor);
        if (g_idx) g_idx[cases[i].byte] = (unsigned char)cases[i].value;
        CHECK_MSG(packed_load(&m, s->config, &file, err) == QWEN3_ERR_FORMAT && !m && strstr(err, cases[i].message), "case %d: %s", i, err);
        free(file.p);
    }
    tiny_text file = packed_weights(s, &packed_usual, 0);
    unsigned char *g_idx = packed_data(&file, "up_proj.g_idx");
    for (int i = 0; g_idx && i < 256; i++) {
        const uint32_t other = (uint32_t)i % 2;
        memcpy(g_idx + 4 * i, &other, 4);
    }
    CHECK_MSG(packed_load(&m, s->config, &file, err) == QWEN3_ERR_UNSUPPORTED && !m && strstr(err, "up_proj.weight") && strstr(err, "of its own"), "%s", err);
    free(file.p);
}

/* ---- hostile files ----------------------------------------------------------------------------------------- */
/* A model with the least matrices, as its two files */
typedef struct packed_small { tiny_text config, weights; size_t header; } packed_small;

static packed_small packed_small_of(int scheme) {
    packed_small s;
    s.config = packed_config(&packed_least, packed_schemes[scheme].config);
    s.weights = packed_weights(&packed_schemes[scheme], &packed_least, 0);
    s.header = 8 + (size_t)(unsigned char)s.weights.p[0] + ((size_t)(unsigned char)s.weights.p[1] << 8);
    return s;
}

static void packed_small_free(packed_small *s) { free(s->config.p); free(s->weights.p); }

/* The file is copied to where it just fits, so that reading on is seen. */
static qwen3_result packed_load_small(const packed_small *s, size_t n, char err[512]) {
    qwen3_file files[2];
    void *copy = malloc(n ? n : 1);
    memcpy(copy, s->weights.p, n);
    files[0].name = "config.json"; files[0].data = s->config.p; files[0].size = s->config.n;
    files[1].name = "model.safetensors"; files[1].data = copy; files[1].size = n;
    const qwen3_result r = malformed_load_files(files, 2, n + s->config.n, err);
    free(copy);
    return r;
}

/* Cut off at each byte of the header, and at some of the data: never a model */
static void test_packed_truncated(void) {
    char err[512];
    for (int i = 0; i < PACKED_SCHEMES; i++) {
        packed_small s = packed_small_of(i);
        CHECK_MSG(packed_load_small(&s, s.weights.n, err) == QWEN3_OK, "scheme %d: %s", i, err);
        for (size_t n = 0; n < s.weights.n; n += test_short ? 97 : n < s.header ? 1 : 61)
            CHECK_MSG(packed_load_small(&s, n, err) == QWEN3_ERR_FORMAT, "scheme %d, %lu bytes: %s", i, (unsigned long)n, err);
        packed_small_free(&s);
    }
}

/* A bit of each byte of the header, of the configuration and of some of the data inverted: an error, or it runs. */
static void test_packed_bits(void) {
    char err[512];
    for (int i = 0; i < PACKED_SCHEMES; i++) {
        packed_small s = packed_small_of(i);
        int loaded = 0, count = 0;
        for (size_t k = 0; k < s.config.n + s.weights.n; k += test_short ? 97 : k < s.config.n + s.header ? 1 : 61, count++) {
            char *byte = k < s.config.n ? s.config.p + k : s.weights.p + (k - s.config.n), was = *byte;
            *byte = (char)(was ^ 1 << (k * 5 + k / 8) % 8);
            const qwen3_result r = packed_load_small(&s, s.weights.n, err);
            CHECK_MSG(r == QWEN3_OK || r == QWEN3_ERR_FORMAT || r == QWEN3_ERR_UNSUPPORTED, "scheme %d, byte %lu: %s", i, (unsigned long)k, err);
            loaded += r == QWEN3_OK;
            *byte = was;
        }
        CHECK_MSG(loaded > 0 && loaded < count, "scheme %d: %d of %d load", i, loaded, count);
        packed_small_free(&s);
    }
}

/* Memory that runs out at each allocation: an error, and nothing leaks. */
static void test_packed_memory(void) {
    for (int i = 0; i < PACKED_SCHEMES; i++) {
        packed_small s = packed_small_of(i);
        packed_load_without_memory(&packed_least, packed_schemes[i].config, &s.weights);
        packed_small_free(&s);
    }
}

static void suite_packed(void) {
    RUN(test_packed_values);
    RUN(test_packed_refused);
    RUN(test_packed_bad_order);
    RUN(test_packed_truncated);
    RUN(test_packed_bits);
    RUN(test_packed_memory);
}
#endif
