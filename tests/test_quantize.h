/* The quantiser: what it makes of numbers, and models that are made smaller while they are loaded. */
#ifndef QWEN3_TESTS_TEST_QUANTIZE_H
#define QWEN3_TESTS_TEST_QUANTIZE_H
#include "fixture.h"

static const struct quantize_type { qwen3i_type type; double error; } quantize_types[] = {
    {QWEN3I_Q8_0, 0.0052}, {QWEN3I_Q6_K, 0.018}, {QWEN3I_Q5_K, 0.036}, {QWEN3I_Q4_K, 0.072}, {QWEN3I_Q4_0, 0.085}
};  /* of normal numbers: the root of the mean square error at most, a little below what rounding by the extremes gives */

#define QUANTIZE_N (1 << 14)

/* Normal numbers: sums of twelve even ones */
static void quantize_numbers(float *x, uint32_t seed) {
    int i, k;
    for (i = 0; i < QUANTIZE_N; i++) {
        x[i] = -6;
        for (k = 0; k < 12; k++) { seed = seed * 1664525u + 1013904223u; x[i] += (float)(seed >> 8) / 16777216.0f; }
    }
}

static double quantize_error(qwen3i_type type, const float *x) {
    static uint8_t blocks[2 * QUANTIZE_N];
    static float y[QUANTIZE_N];
    double e = 0;
    int i;
    qwen3i_quantize(blocks, type, x, QWEN3I_F32, QUANTIZE_N);
    qwen3i_decode(y, blocks, type, QUANTIZE_N);
    for (i = 0; i < QUANTIZE_N; i++) e += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
    return sqrt(e / QUANTIZE_N);
}

static void test_quantize_error(void) {
    static float x[QUANTIZE_N];
    size_t i;
    int k;
    for (i = 0; i < sizeof quantize_types / sizeof *quantize_types; i++) {
        const char *name = qwen3i_format_of(quantize_types[i].type)->name;
        double e;
        quantize_numbers(x, 1);
        e = quantize_error(quantize_types[i].type, x);
        CHECK_MSG(e < quantize_types[i].error && e > 0.5 * quantize_types[i].error, "%s: %g", name, e);
        for (k = 0; k < QUANTIZE_N; k++) x[k] *= 1e-3f;         /* the same at another scale */
        CHECK_MSG(quantize_error(quantize_types[i].type, x) < 1.3e-3 * quantize_types[i].error, "%s: small", name);
        for (k = 0; k < QUANTIZE_N; k++) x[k] = k % 3 ? 0.0f : 1.0f;
        CHECK_MSG(quantize_error(quantize_types[i].type, x) < 1e-3, "%s: two values", name);
        for (k = 0; k < QUANTIZE_N; k++) x[k] = 0;
        CHECK_MSG(quantize_error(quantize_types[i].type, x) == 0, "%s: zeros", name);
    }
}

/* Numbers that are none, and those beyond half precision, harm nothing but their block. */
static void test_quantize_odd_numbers(void) {
    static const float odd[] = {(float)NAN, (float)INFINITY, -(float)INFINITY, FLT_MAX, -FLT_MAX, 1e-45f, 1e6f, -0.0f};
    uint8_t blocks[2 * 256];
    float x[256], y[256];
    size_t i, k;
    int n;
    for (i = 0; i < sizeof quantize_types / sizeof *quantize_types; i++) for (k = 0; k < sizeof odd / sizeof *odd; k++) {
        for (n = 0; n < 256; n++) x[n] = n % 7 == 3 ? odd[k] : (float)n / 256;
        qwen3i_quantize(blocks, quantize_types[i].type, x, QWEN3I_F32, 256);
        qwen3i_decode(y, blocks, quantize_types[i].type, 256);
        for (n = 0; n < 256; n++) CHECK_MSG(y[n] - y[n] == 0, "%s: %g gives %g", qwen3i_format_of(quantize_types[i].type)->name, (double)odd[k], (double)y[n]);
    }
}

static void test_quantize_mixes(void) {
    static const int more28[] = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27};
    qwen3i_config c;
    int i, k = 0;
    memset(&c, 0, sizeof c);
    c.n_layer = 28;
    c.tied = 1;
    for (i = 0; i < 28; i++) {
        const int more = k < 14 && more28[k] == i;
        k += more;
        CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_K_M, QWEN3I_W_V, i, &c, 1024) == (more ? QWEN3I_Q6_K : QWEN3I_Q4_K));
        CHECK(qwen3i_mix_type(QWEN3I_MIX_Q5_K_M, QWEN3I_W_DOWN, i, &c, 3072) == (more ? QWEN3I_Q6_K : QWEN3I_Q5_K));
        CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_K_M, QWEN3I_W_UP, i, &c, 1024) == QWEN3I_Q4_K);
    }
    CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_K_M, QWEN3I_W_EMBED, -1, &c, 1024) == QWEN3I_Q6_K);
    CHECK(qwen3i_mix_type(QWEN3I_MIX_Q8_0, QWEN3I_W_EMBED, -1, &c, 1024) == QWEN3I_Q8_0);
    CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_0, QWEN3I_W_Q, 0, &c, 1024) == QWEN3I_Q4_0);
    c.tied = 0;
    CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_K_M, QWEN3I_W_EMBED, -1, &c, 1024) == QWEN3I_Q4_K);
    CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_K_M, QWEN3I_W_HEAD, -1, &c, 1024) == QWEN3I_Q6_K);
    CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_K_M, QWEN3I_W_Q, 0, &c, 96) == QWEN3I_Q8_0);
    CHECK(qwen3i_mix_type(QWEN3I_MIX_Q4_K_M, QWEN3I_W_Q, 0, &c, 100) == QWEN3I_NO_TYPE);
    CHECK(qwen3i_mix_type(QWEN3I_MIX_NONE, QWEN3I_W_Q, 0, &c, 1024) == QWEN3I_NO_TYPE);
}

static int quantize_threads;

/* The logits of a few tokens [4, n_vocab]; free them. NULL: it did not load */
static float *quantize_logits(const char *name, int how, uint64_t *bytes, uint64_t *fingerprint) {
    static const qwen3_token tokens[] = {5, 40, 17, 3};
    qwen3_ctx_desc cd = ctx_desc(16, 1, 0, QWEN3_KV_F32);
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_ctx *ctx = NULL;
    float *logits = NULL;
    char path[1024], err[256] = "";
    memset(&d, 0, sizeof d);
    model_path(path, sizeof path, name, "");
    d.path = path;
    d.quantize = how;
    d.threads = quantize_threads;
    d.flags = QWEN3_LOAD_NO_MMAP;       /* the file's bytes are let go of: read them again and sanitizers see it */
    if (!CHECK_MSG(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK, "%s", err)) return NULL;
    *bytes = qwen3_get_info(m).weight_bytes;
    *fingerprint = qwen3_get_info(m).fingerprint;
    logits = (float *)malloc(4 * sizeof(float) * (size_t)m->config.n_vocab);
    if (CHECK(qwen3_ctx_create(&ctx, m, &cd, NULL, 0) == QWEN3_OK)) CHECK_OK(ctx, eval(ctx, 0, tokens, 4, logits));
    qwen3_ctx_free(ctx);
    qwen3_free(m);
    return logits;
}

/* Any number of threads gives the same bytes. */
static void test_quantize_threads(void) {
    uint64_t fingerprint[3];
    int how, threads, i;
    for (how = 1; how < 3; how++) {
        float *logits[3];
        for (threads = 1, i = 0; i < 3; threads += 2, i++) {
            uint64_t bytes;
            quantize_threads = threads;
            logits[i] = quantize_logits("plain", how, &bytes, &fingerprint[i]);
        }
        for (i = 1; i < 3 && logits[0] && logits[i]; i++)
            CHECK(fingerprint[i] == fingerprint[0] && memcmp(logits[i], logits[0], 400 * sizeof(float)) == 0);
        for (i = 0; i < 3; i++) free(logits[i]);
    }
    quantize_threads = 0;
}

static void test_quantize_load(void) {
    uint64_t bytes[3] = {0, 0, 0}, fingerprint[3] = {0, 0, 0};
    float *logits[3];
    int how, i;
    for (how = 0; how < 3; how++) logits[how] = quantize_logits("plain", how, &bytes[how], &fingerprint[how]);
    for (how = 1; how < 3 && logits[0] && logits[how]; how++) {
        double off = 0, all = 0;
        for (i = 0; i < 400; i++) {
            off += fabs((double)logits[how][i] - (double)logits[0][i]);
            all += fabs((double)logits[0][i]);
        }
        CHECK_MSG(off > 0 && off < 0.05 * all, "%d: %g of %g", how, off, all);
        CHECK_MSG(bytes[how] < bytes[0], "%llu bytes, before %llu", (unsigned long long)bytes[how], (unsigned long long)bytes[0]);
        CHECK(fingerprint[how] != fingerprint[0]);
    }
    for (how = 0; how < 3; how++) free(logits[how]);
}

static void test_quantize_refused(void) {
    qwen3_backend none;
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    char err[256] = "", path[1024];
    memset(&d, 0, sizeof d);
    memset(&none, 0, sizeof none);
    none.version = QWEN3_VERSION;
    none.name = "other";
    model_path(path, sizeof path, "plain", "");
    d.path = path;
    d.quantize = 3;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_ARG && strstr(err, "quantize is 3"));
    d.quantize = -1;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_ARG);
    d.quantize = QWEN3_Q8_0;
    d.threads = -1;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_ARG && strstr(err, "threads is -1"));
    d.threads = 0;
    d.backend = &none;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_UNSUPPORTED && strstr(err, "other"));
}

static void suite_quantize(void) {
    RUN(test_quantize_error);
    RUN(test_quantize_odd_numbers);
    RUN(test_quantize_mixes);
    RUN(test_quantize_load);
    RUN(test_quantize_threads);
    RUN(test_quantize_refused);
}
#endif
