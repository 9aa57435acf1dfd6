/* A cache in Q8_0: close to one in float32, the same bits however a prompt is cut up, and states that carry it. */
#ifndef QWEN3_TESTS_TEST_CACHE_H
#define QWEN3_TESTS_TEST_CACHE_H
#include "fixture.h"
#include "test_packed.h"

#define CACHE_N 30
static const packed_shape cache_shape = {64, 6, 2, 32, 64, 64, "model.", 0};

static void cache_tokens(qwen3_token *t) { for (int i = 0; i < CACHE_N; i++) t[i] = (i * 29 + 11) % 64; }

/* Logits of all positions [CACHE_N, 64], evaluated so many tokens at a time */
static float *cache_logits(const qwen3_model *m, int kv, int chunk, int threads) {
    float *out = floats(CACHE_N * 64);
    qwen3_token tokens[CACHE_N];
    qwen3_ctx_desc d = ctx_desc(32, 2, chunk, kv);
    d.threads = threads;
    qwen3_ctx *ctx = ctx_open_desc(m, &d);
    cache_tokens(tokens);
    if (ctx) CHECK_OK(ctx, eval(ctx, 1, tokens, CACHE_N, out));
    qwen3_ctx_free(ctx);
    return out;
}

/* What one block holds: the largest number is 127, the others are the nearest ones. */
static void test_cache_rounding(void) {
    float x[32], y[32];
    uint8_t b[34];
    for (int i = 0; i < 32; i++) x[i] = (float)((i * 37) % 61 - 30) * 0.01f;
    qwen3i_round_q8_0(b, x);
    qwen3i_decode(y, b, QWEN3I_Q8_0, 32);
    for (int i = 0; i < 32; i++) CHECK(fabsf(y[i] - x[i]) <= 0.3f / 127 / 2 * 1.01f);
    for (int i = 0; i < 32; i++) x[i] = 0;
    qwen3i_round_q8_0(b, x);
    qwen3i_decode(y, b, QWEN3I_Q8_0, 32);
    for (int i = 0; i < 32; i++) CHECK(y[i] == 0);
}

static void test_cache_logits(void) {
    tiny_text file = packed_weights(&packed_schemes[0], &cache_shape, 1);
    qwen3_model *m = NULL;
    char err[512];
    if (CHECK_MSG(packed_load_from(&m, &cache_shape, "null", &file, err) == QWEN3_OK, "%s", err)) {
        float *exact = cache_logits(m, QWEN3_KV_F32, 0, 1), *q8 = cache_logits(m, QWEN3_KV_Q8_0, 0, 1), top = 0, off = 0;
        for (int i = 0; i < CACHE_N * 64; i++) {
            top = fabsf(exact[i]) > top ? fabsf(exact[i]) : top;
            off = fabsf(exact[i] - q8[i]) > off ? fabsf(exact[i] - q8[i]) : off;
        }
        CHECK_MSG(off > 0 && off < 0.02f * top, "off by %g of %g", (double)off, (double)top);
        for (int chunk = 1; chunk < 9; chunk += 3) for (int threads = 1; threads < 4; threads += 2) {
            float *other = cache_logits(m, QWEN3_KV_Q8_0, chunk, threads);
            CHECK(memcmp(other, q8, CACHE_N * 64 * sizeof *q8) == 0);
            free(other);
        }
        free(exact); free(q8);
    }
    qwen3_free(m);
    free(file.p);
}

/* Half the memory; a sequence that is copied, and one that is saved and loaded, go on with the same bits. */
static void test_cache_states(void) {
    tiny_text file = packed_weights(&packed_schemes[0], &cache_shape, 1);
    qwen3_model *m = NULL;
    char err[512];
    if (CHECK_MSG(packed_load_from(&m, &cache_shape, "null", &file, err) == QWEN3_OK, "%s", err)) {
        qwen3_ctx_desc d = ctx_desc(32, 3, 0, QWEN3_KV_Q8_0), f16 = ctx_desc(32, 3, 0, QWEN3_KV_F16);
        const uint64_t positions = 2 * 3 * 32 * 64;     /* K and V, sequences, positions, numbers */
        CHECK(qwen3_ctx_memory(m, &f16).host_bytes - qwen3_ctx_memory(m, &d).host_bytes == positions * 2 - positions / 32 * 34);
        qwen3_ctx *a = ctx_open_desc(m, &d), *b = ctx_open_desc(m, &d), *c = ctx_open_desc(m, &f16);
        qwen3_token tokens[CACHE_N];
        float *want = cache_logits(m, QWEN3_KV_Q8_0, 0, 1), got[64];
        cache_tokens(tokens);
        CHECK_OK(a, eval(a, 0, tokens, CACHE_N - 1, NULL));
        const uint64_t size = state_size(a, 0);
        void *state = malloc((size_t)size);
        CHECK_OK(a, state_save(a, 0, state, size, NULL));
        CHECK_OK(a, qwen3_seq_copy(a, 2, 0));
        CHECK_OK(b, state_load(b, 1, state, size));
        CHECK(state_load(c, 1, state, size) == QWEN3_ERR_MISMATCH && strstr(qwen3_ctx_error(c), "KV type"));
        CHECK_OK(a, eval(a, 2, tokens + CACHE_N - 1, 1, got));
        CHECK(memcmp(got, want + 64 * (CACHE_N - 1), sizeof got) == 0);
        CHECK_OK(b, eval(b, 1, tokens + CACHE_N - 1, 1, got));
        CHECK(memcmp(got, want + 64 * (CACHE_N - 1), sizeof got) == 0);
        free(state); free(want);
        qwen3_ctx_free(a); qwen3_ctx_free(b); qwen3_ctx_free(c);
    }
    qwen3_free(m);
    free(file.p);
}

/* Heads that are no whole blocks */
static void test_cache_refused(void) {
    tiny_text file = packed_weights(&packed_schemes[0], &packed_least, 1);
    qwen3_model *m = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_ctx_desc d = ctx_desc(8, 1, 0, QWEN3_KV_Q8_0);
    char err[512];
    if (CHECK_MSG(packed_load_from(&m, &packed_least, "null", &file, err) == QWEN3_OK, "%s", err))
        CHECK(qwen3_ctx_create(&ctx, m, &d, err, sizeof err) == QWEN3_ERR_UNSUPPORTED && !ctx && strstr(err, "blocks of 32"));
    d.kv_type = 5;
    if (m) CHECK(qwen3_ctx_create(&ctx, m, &d, err, sizeof err) == QWEN3_ERR_ARG && strstr(err, "kv_type 5"));
    qwen3_free(m);
    free(file.p);
}

static void suite_cache(void) {
    RUN(test_cache_rounding);
    RUN(test_cache_logits);
    RUN(test_cache_states);
    RUN(test_cache_refused);
}
#endif
