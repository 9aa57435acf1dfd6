/* The sampler: its order of steps, its distribution, and that it repeats. tests/data/sampler.ref holds the
   probabilities that NumPy computes from the documented order (tools/make_reference.py). */
#ifndef QWEN3_TESTS_TEST_SAMPLER_H
#define QWEN3_TESTS_TEST_SAMPLER_H
#include "fixture.h"

#define SAMPLER_VOCAB 4096
#define SAMPLER_DRAWS 40000
static qwen3i_candidate sampler_candidates[SAMPLER_VOCAB];
static float sampler_logits[SAMPLER_VOCAB];

static qwen3_result choose_of(const float *logits, int n_vocab, int n_choose, const qwen3_token *seq, int n,
                              qwen3_sampler *s, qwen3_token *out) {
    char text[256] = "";
    qwen3i_err err;
    qwen3i_sampler_scratch scratch;
    qwen3_result r;
    err.text = text;
    err.cap = sizeof text;
    scratch.logits = sampler_logits;
    scratch.candidates = sampler_candidates;
    scratch.mask = NULL;
    scratch.banned = 0;
    r = qwen3i_choose(logits, n_vocab, n_choose, seq, n, s, &scratch, out, &err);
    CHECK((r < 0) == (text[0] != '\0'));
    return r;
}

static qwen3_token choose(const float *logits, int n_vocab, qwen3_sampler *s) {
    qwen3_token t = -1;
    CHECK(choose_of(logits, n_vocab, n_vocab, NULL, 0, s, &t) == QWEN3_OK);
    return t;
}

static qwen3_sampler sampler_of(float temperature, int top_k, float top_p, float min_p, uint64_t seed) {
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, seed);
    s.temperature = temperature;
    s.top_k = top_k;
    s.top_p = top_p;
    s.min_p = min_p;
    return s;
}

static void test_sampler_presets(void) {
    qwen3_sampler g = qwen3_sampler_preset(QWEN3_GREEDY, 7), t = qwen3_sampler_preset(QWEN3_THINKING, 8),
                  n = qwen3_sampler_preset(QWEN3_NON_THINKING, 9);
    CHECK(g.temperature == 0 && g.rng == 7 && g.n_bias == 0 && !g.filter);
    CHECK(t.temperature == 0.6f && t.top_p == 0.95f && t.top_k == 20 && t.min_p == 0 && t.rng == 8);
    CHECK(n.temperature == 0.7f && n.top_p == 0.8f && n.top_k == 20 && n.min_p == 0 && n.rng == 9);
}

static void test_sampler_greedy(void) {
    float logits[SAMPLER_VOCAB];
    uint64_t seed = 5;
    int i, k, best, n = SAMPLER_VOCAB;
    for (k = 0; k < 50; k++) {
        qwen3_sampler zero = qwen3_sampler_preset(QWEN3_GREEDY, 1), top1 = sampler_of(1.0f, 1, 0, 0, 3), cold = sampler_of(1e-20f, 0, 0, 0, 4);
        for (i = best = 0; i < n; i++) {
            logits[i] = (float)random_below(&seed, 1000) / 16.0f - 40.0f;   /* many ties */
            if (logits[i] > logits[best]) best = i;
        }
        CHECK(choose(logits, n, NULL) == best);
        CHECK(choose(logits, n, &zero) == best && zero.rng == 1);
        CHECK(choose(logits, n, &top1) == best);
        i = choose(logits, n, &cold);
        CHECK(logits[i] == logits[best]);
    }
}

/* Ties go to the lower id, also where top_k and top_p cut between equals. */
static void test_sampler_ties(void) {
    float logits[64];
    int i, k, seen[64];
    qwen3_sampler s = sampler_of(1.0f, 10, 0, 0, 11), p = sampler_of(1.0f, 0, 0.25f, 0, 12);
    for (i = 0; i < 64; i++) logits[i] = 1.5f;
    CHECK(choose(logits, 64, NULL) == 0);
    memset(seen, 0, sizeof seen);
    for (k = 0; k < 2000; k++) seen[choose(logits, 64, &s)]++;
    for (i = 0; i < 64; i++) CHECK_MSG((seen[i] > 0) == (i < 10), "top_k 10: id %d was drawn %d times", i, seen[i]);
    memset(seen, 0, sizeof seen);
    for (k = 0; k < 2000; k++) seen[choose(logits, 64, &p)]++;
    for (i = 0; i < 64; i++) CHECK_MSG((seen[i] > 0) == (i < 16), "top_p 0.25 of 64: id %d was drawn %d times", i, seen[i]);
}

/* Draws against expected probabilities: Pearson's chi-square, bins below 8 expected draws pooled. */
static void check_distribution(int which, const int *counts, const float *probs, int n, int draws) {
    double chi = 0, rest_want = 0, rest_got = 0;
    int i, df = -1;
    for (i = 0; i < n; i++) {
        double want = (double)probs[i] * draws;
        if (want < 1e-12) { CHECK_MSG(counts[i] == 0, "case %d: id %d cannot be drawn, but was %d times", which, i, counts[i]); continue; }
        if (want < 8) { rest_want += want; rest_got += counts[i]; continue; }
        chi += (counts[i] - want) * (counts[i] - want) / want;
        df++;
    }
    if (rest_want > 8) { chi += (rest_got - rest_want) * (rest_got - rest_want) / rest_want; df++; }
    CHECK_MSG(df > 0 && chi < df + 4 * sqrt(2.0 * df) + 4, "case %d: chi-square %.1f with %d degrees of freedom", which, chi, df);
    if (test_verbose) printf("      case %d: chi-square %.1f, %d degrees of freedom\n", which, chi, df);
}

static void sampler_distribution_case(const ref_file *r, int which) {
    int n, n_params, n_probs, n_history, n_bias, i, draws = SAMPLER_DRAWS, *counts;
    const float *logits = ref_f32(r, which, "logits", &n), *p = ref_f32(r, which, "params", &n_params);
    const float *probs = ref_f32(r, which, "probs", &n_probs), *bias;
    const qwen3_token *history = ref_tokens(r, which, "history", &n_history), *ids = ref_tokens(r, which, "bias_ids", &n_bias);
    qwen3_bias list[8];
    qwen3_sampler s;
    if (!CHECK(logits && p && n_params == 7 && probs && n_probs == n && n <= SAMPLER_VOCAB && n_bias <= 8)) return;
    s = sampler_of(p[0], (int)p[3], p[1], p[2], 1234u + (uint64_t)which);
    s.repeat_penalty = p[4];
    s.presence_penalty = p[5];
    s.penalty_last_n = (int)p[6];
    bias = ref_f32(r, which, "bias", &n_bias);
    for (i = 0; i < n_bias; i++) { list[i].token = ids[i]; list[i].bias = bias[i]; }
    s.bias = list;
    s.n_bias = n_bias;
    counts = (int *)calloc((size_t)n, sizeof *counts);
    if (n > 1000) draws /= 4;
    for (i = 0; i < draws; i++) {
        qwen3_token t = -1;
        if (!CHECK(choose_of(logits, n, n, history, n_history, &s, &t) == QWEN3_OK && t >= 0 && t < n)) break;
        counts[t]++;
    }
    check_distribution(which, counts, probs, n, draws);
    free(counts);
}

static void test_sampler_distribution(void) {
    char path[1024];
    ref_file r;
    int i, n;
    snprintf(path, sizeof path, "%s/sampler.ref", test_data);
    if (!ref_open(&r, path)) return;
    for (i = 0; ref_f32(&r, i, "logits", &n); i++) sampler_distribution_case(&r, i);
    CHECK_MSG(i >= 10, "%d cases", i);
    ref_close(&r);
}

/* Weights are 2^-octaves as whole numbers down to 1, and then 0: where they end is part of every choice. */
static void test_sampler_weights(void) {
    int i;
    for (i = 0; i < QWEN3I_OCTAVES; i++)
        CHECK_MSG(qwen3i_weight((float)i) == QWEN3I_WEIGHT_ONE >> i, "%d octaves: %llu", i, (unsigned long long)qwen3i_weight((float)i));
    CHECK(QWEN3I_OCTAVES == 39 && qwen3i_weight(38.999f) == 1 && qwen3i_weight(39.0f) == 0 && qwen3i_weight(1e30f) == 0);
    for (i = 1; i < 1000; i++) {
        const double weight = (double)qwen3i_weight((float)i / 1000), want = 549755813888.0 * pow(2, -(double)i / 1000);
        CHECK_MSG(fabs(weight - want) < 2e-6 * want, "%d / 1000 octaves: %g, not %g", i, weight, want);
    }
}

/* The same seed gives the same choices, on every machine: the sequences are written down here. */
static void test_sampler_golden(void) {
    static const qwen3_token want[3][16] = {
        {389, 105, 142, 173, 31, 457, 136, 426, 173, 315, 105, 278, 278, 284, 321, 105},
        {445, 217, 19, 488, 57, 167, 93, 389, 130, 476, 204, 383, 266, 280, 352, 266},
        {448, 457, 112, 212, 352, 414, 470, 130, 384, 7, 8, 404, 3, 433, 105, 340}
    };
    float logits[500];
    int i, k;
    for (i = 0; i < 500; i++) logits[i] = (float)((i * 7919) % 500) / 64.0f;
    for (k = 0; k < 3; k++) {
        qwen3_sampler s = k == 0 ? qwen3_sampler_preset(QWEN3_THINKING, 42) : k == 1 ? sampler_of(1.3f, 0, 0.9f, 0, 0) : sampler_of(2.0f, 0, 0, 0.05f, 0xFFFFFFFFFFFFFFFFu);
        qwen3_sampler replay = s;
        qwen3_token got[16];
        int same = 1;
        for (i = 0; i < 16; i++) got[i] = choose(logits, 500, &s);
        for (i = 0; i < 16; i++) same &= (choose(logits, 500, &replay) == got[i]) & (got[i] == want[k][i]);
        if (!CHECK_MSG(same, "sequence %d has changed", k))
            for (i = 0; i < 16; i++) fprintf(stderr, i < 15 ? "%d, " : "%d\n", got[i]);
        CHECK(s.rng == replay.rng);
    }
}

static void test_sampler_bias(void) {
    float logits[4] = {1, 2, 3, 4};
    static const qwen3_token seq[4] = {0, 1, 2, 3};
    qwen3_bias bias[4] = {{3, -1e30f}, {0, 5}, {-1, 1e9f}, {4, 1e9f}};      /* ids out of range are ignored */
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, 0);
    qwen3_token t;
    int i;
    s.bias = bias;
    s.n_bias = 1;
    CHECK(choose(logits, 4, &s) == 2);
    s.n_bias = 4;
    CHECK(choose(logits, 4, &s) == 0);
    CHECK(logits[0] == 1 && logits[3] == 4);        /* the model's logits are not touched */
    for (i = 0; i < 4; i++) { bias[i].token = i; bias[i].bias = -1e30f; }
    s.n_bias = 4;
    t = 77;
    CHECK(choose_of(logits, 4, 4, NULL, 0, &s, &t) == QWEN3_ERR_ARG);
    s.temperature = 1;
    s.top_p = 0.9f;
    CHECK(choose_of(logits, 4, 4, NULL, 0, &s, &t) == QWEN3_ERR_ARG);
    s.repeat_penalty = 0.5f;                        /* which rewards: but what is banned stays so */
    CHECK(choose_of(logits, 4, 4, seq, 4, &s, &t) == QWEN3_ERR_ARG);
}

static void test_sampler_penalties(void) {
    float logits[6] = {4.0f, 3.9f, -1.0f, 2.0f, 3.0f, -2.0f};
    qwen3_token seq[6] = {0, 0, 0, 1, 5, 5};
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, 0);
    qwen3_token t;
    s.presence_penalty = 0.5f;                      /* once for each token, not each time */
    CHECK(choose_of(logits, 6, 6, seq, 3, &s, &t) == QWEN3_OK && t == 1);
    CHECK(choose_of(logits, 6, 6, seq, 4, &s, &t) == QWEN3_OK && t == 0);
    s.presence_penalty = 1.5f;
    CHECK(choose_of(logits, 6, 6, seq, 4, &s, &t) == QWEN3_OK && t == 4);
    s.penalty_last_n = 2;                           /* only 5 is looked back at */
    CHECK(choose_of(logits, 6, 6, seq, 6, &s, &t) == QWEN3_OK && t == 0);
    s.presence_penalty = 0;
    s.penalty_last_n = 0;
    s.repeat_penalty = 2.0f;
    CHECK(choose_of(logits, 6, 6, seq, 6, &s, &t) == QWEN3_OK && t == 4);
    s.repeat_penalty = 1.0f;
    CHECK(choose_of(logits, 6, 6, seq, 6, &s, &t) == QWEN3_OK && t == 0);
}

/* A negative logit is multiplied: a penalty never makes a token more likely. */
static void test_sampler_negative_logits(void) {
    float logits[2] = {-1.0f, -1.5f};
    qwen3_token seq[1] = {0}, t;
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, 0);
    s.repeat_penalty = 2.0f;
    CHECK(choose_of(logits, 2, 2, seq, 1, &s, &t) == QWEN3_OK && t == 1);
}

typedef struct filter_log { int calls, n_vocab, n; const qwen3_token *seq; qwen3_token only; } filter_log;
static void filter_only(float *logits, int n_vocab, const qwen3_token *seq, int n, void *user) {
    filter_log *f = (filter_log *)user;
    int i;
    f->calls++; f->n_vocab = n_vocab; f->n = n; f->seq = seq;
    for (i = 0; i < n_vocab; i++) if (i != f->only) logits[i] = i % 2 ? -1e30f : (float)-HUGE_VAL;
}

static void test_sampler_filter(void) {
    float logits[10] = {9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
    qwen3_token seq[2] = {4, 5}, t = -1;
    filter_log log;
    qwen3_sampler s = sampler_of(1.0f, 5, 0.5f, 0.1f, 3);
    memset(&log, 0, sizeof log);
    s.filter = filter_only;
    s.filter_user = &log;
    for (log.only = 0; log.only < 10; log.only++)   /* before top_k: a token that it would have cut */
        CHECK(choose_of(logits, 10, 10, seq, 2, &s, &t) == QWEN3_OK && t == log.only);
    CHECK(log.calls == 10 && log.n_vocab == 10 && log.n == 2 && log.seq == seq);
    log.only = -1;
    CHECK(choose_of(logits, 10, 10, seq, 2, &s, &t) == QWEN3_ERR_ARG);
    log.only = 9;                                   /* an id that may not be chosen */
    CHECK(choose_of(logits, 10, 9, seq, 2, &s, &t) == QWEN3_ERR_ARG);
    CHECK(logits[0] == 9 && logits[9] == 0);
}

/* NaN and infinite logits are never chosen, and do not spoil the others. */
static void test_sampler_not_numbers(void) {
    static const uint32_t bits[] = {0x7FC00000u, 0xFFC00001u, 0x7F800000u, 0xFF800000u};
    float logits[8] = {0, 1, 2, 3, 0, 0, 0, 0};
    int i;
    for (i = 0; i < 4; i++) {
        qwen3_sampler a = sampler_of(1.0f, 0, 0.99f, 0, 5), b = sampler_of(1.0f, 3, 0, 0, 6);
        int k;
        for (k = 4; k < 8; k++) memcpy(&logits[k], &bits[(i + k) % 4], 4);
        CHECK(choose(logits, 8, NULL) == 3);
        for (k = 0; k < 200; k++) { CHECK(choose(logits, 8, &a) < 4); CHECK(choose(logits, 8, &b) < 4); }
        for (k = 0; k < 4; k++) memcpy(&logits[k], &bits[i], 4);
        { qwen3_token t; CHECK(choose_of(logits, 8, 8, NULL, 0, &a, &t) == QWEN3_ERR_ARG); }
        for (k = 0; k < 4; k++) logits[k] = (float)k;
    }
}

static void test_sampler_rejects(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token t = 0;
    float nan;
    uint32_t bits = 0x7FC00000u;
    int i;
    memcpy(&nan, &bits, 4);
    if (!fixture_open(&f, "plain")) return;
    ctx = ctx_open(f.model, 16, 1, 0, QWEN3_KV_F32);
    if (ctx) CHECK_OK(ctx, eval(ctx, 0, &t, 1, NULL));
    for (i = 0; ctx && i < 9; i++) {
        qwen3_sampler s = sampler_of(1.0f, 5, 0.5f, 0.1f, 3);
        if (i == 0) s.temperature = -1;
        if (i == 1) s.temperature = nan;
        if (i == 2) s.top_p = 1.5f;
        if (i == 3) s.top_p = -0.1f;
        if (i == 4) s.min_p = 2;
        if (i == 5) s.top_k = -1;
        if (i == 6) s.repeat_penalty = -1;
        if (i == 7) s.n_bias = 1;                   /* with no list */
        if (i == 8) s.n_bias = -1;
        CHECK_MSG(qwen3_sample(ctx, 0, &s, &t) == QWEN3_ERR_ARG && qwen3_ctx_error(ctx)[0], "wrong sampler %d", i);
        CHECK_MSG(qwen3_next(ctx, 0, &s, &t) == QWEN3_ERR_ARG && seq_len(ctx, 0) == 1, "wrong sampler %d", i);
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* The rows of the embedding that have no text look best to this model; they are never chosen. */
static void test_sampler_padding(void) {
    fixture f;
    qwen3_ctx *ctx;
    const qwen3_token *tokens;
    const float *logits;
    qwen3_token t;
    qwen3_prob top[3];
    int i, n, best = 0, n_tokens;
    if (!fixture_open(&f, "chat")) return;
    ctx = ctx_open(f.model, 128, 1, 0, QWEN3_KV_F32);
    tokens = ref_tokens(&f.ref, 1, "tokens", &n);
    n_tokens = f.info.n_tokens;
    CHECK(n_tokens > 0 && n_tokens < f.info.n_vocab);
    if (ctx && tokens) {
        qwen3_sampler hot = sampler_of(50.0f, 0, 0, 0, 3);
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, n, 0));
        logits = qwen3_logits(ctx, 0);
        for (i = 0; logits && i < f.info.n_vocab; i++) if (logits[i] > logits[best]) best = i;
        CHECK_MSG(best >= n_tokens, "the model no longer prefers padding: the test tests nothing");
        CHECK_OK(ctx, qwen3_sample(ctx, 0, NULL, &t));
        CHECK(t >= 0 && t < n_tokens);
        for (i = 0; i < 1000; i++) {
            CHECK_OK(ctx, qwen3_sample(ctx, 0, &hot, &t));
            if (!CHECK(t >= 0 && t < n_tokens)) break;
        }
        CHECK(qwen3_top_probs(ctx, 0, top, 3) == 3 && top[0].logprob >= top[1].logprob);
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

static void suite_sampler(void) {
    RUN(test_sampler_presets);
    RUN(test_sampler_greedy);
    RUN(test_sampler_ties);
    RUN(test_sampler_distribution);
    RUN(test_sampler_weights);
    RUN(test_sampler_golden);
    RUN(test_sampler_bias);
    RUN(test_sampler_penalties);
    RUN(test_sampler_negative_logits);
    RUN(test_sampler_filter);
    RUN(test_sampler_not_numbers);
    RUN(test_sampler_rejects);
    RUN(test_sampler_padding);
}
#endif
