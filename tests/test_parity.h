/* Logits: against transformers' float32 within a bound that every classic mistake exceeds, and against
   the library itself bit for bit however a sequence was arrived at. */
#ifndef QWEN3_TESTS_TEST_PARITY_H
#define QWEN3_TESTS_TEST_PARITY_H
#include "fixture.h"

#define PARITY 1e-4             /* largest difference in a row over the largest value in that row */

/* The worst row's difference between a and the reference b, [rows, n] each, relative to b's largest value. */
static double parity_error(const float *a, const float *b, int rows, int n) {
    double worst = 0;
    int i, j;
    for (i = 0; i < rows; i++) {
        double d = 0, top = 0;
        for (j = 0; j < n; j++) {
            double x = a[(size_t)i * (size_t)n + (size_t)j], y = b[(size_t)i * (size_t)n + (size_t)j];
            if (fabs(x - y) > d) d = fabs(x - y);
            if (fabs(y) > top) top = fabs(y);
        }
        if (d > worst * top) worst = d / top;
    }
    return worst;
}

/* Evaluate every prompt of a fixture in one go; the worst relative errors of logits and hidden states. */
static void fixture_errors(const fixture *f, const qwen3_ctx_desc *desc, double *logits_error, double *hidden_error) {
    qwen3_ctx *ctx = ctx_open_desc(f->model, desc);
    int i, n, count, vocab = f->info.n_vocab, embd = f->info.n_embd;
    const qwen3_token *tokens;
    *logits_error = *hidden_error = 0;
    for (i = 0; ctx && (tokens = ref_tokens(&f->ref, i, "tokens", &n)) != NULL; i++) {
        const float *logits = ref_f32(&f->ref, i, "logits", &count), *hidden;
        float *got_logits = floats((size_t)n * (size_t)vocab), *got_hidden = floats((size_t)n * (size_t)embd);
        qwen3_item it = item_of(0, tokens, n);
        double e;
        if (CHECK(logits && count == n * vocab) && CHECK((hidden = ref_f32(&f->ref, i, "hidden", &count)) && count == n * embd)) {
            it.all_logits = got_logits;
            it.all_hidden = got_hidden;
            CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 0));
            CHECK_OK(ctx, qwen3_eval(ctx, &it, 1));
            e = parity_error(got_logits, logits, n, vocab);
            if (!(e <= *logits_error)) *logits_error = e;
            e = parity_error(got_hidden, hidden, n, embd);
            if (!(e <= *hidden_error)) *hidden_error = e;
            CHECK(same_logits(ctx, 0, got_logits + (size_t)(n - 1) * (size_t)vocab, vocab));
        }
        free(got_logits);
        free(got_hidden);
    }
    CHECK_MSG(i > 0, "no prompts");
    qwen3_ctx_free(ctx);
}

static void test_parity_float32(void) {
    int i;
    for (i = 0; i < N_MODELS; i++) {
        qwen3_ctx_desc desc = ctx_desc(256, 1, 0, QWEN3_KV_F32);
        fixture f;
        double logits, hidden;
        if (!fixture_open(&f, model_names[i])) continue;
        fixture_errors(&f, &desc, &logits, &hidden);
        CHECK_MSG(logits <= PARITY, "%s: logits differ by %.2e of the largest", model_names[i], logits);
        CHECK_MSG(hidden <= PARITY, "%s: hidden states differ by %.2e of the largest", model_names[i], hidden);
        if (test_verbose) printf("      %-9s logits %.1e  hidden %.1e\n", model_names[i], logits, hidden);
        fixture_close(&f);
    }
}

/* Rounding K and V once is a small error, even where the gains of k_norm are large. */
static void test_parity_half_kv(void) {
    static const double bound[] = {0.03, 0.15};     /* eleven and eight bits of significand */
    int i, kv;
    for (i = 0; i < N_MODELS; i++) {
        fixture f;
        if (!fixture_open(&f, model_names[i])) continue;
        for (kv = QWEN3_KV_F16; kv <= QWEN3_KV_BF16; kv++) {
            qwen3_ctx_desc desc = ctx_desc(256, 1, 0, kv);
            double logits, hidden;
            fixture_errors(&f, &desc, &logits, &hidden);
            CHECK_MSG(logits <= bound[kv - QWEN3_KV_F16], "%s, kv type %d: logits differ by %.2e", model_names[i], kv, logits);
            if (test_verbose) printf("      %-9s kv %s logits %.1e\n", model_names[i], kv == QWEN3_KV_F16 ? "f16 " : "bf16", logits);
        }
        fixture_close(&f);
    }
}

/* Greedy continuations by qwen3_next, with the ids that end a turn banned, as the reference has it. */
static void greedy_case(const fixture *f, qwen3_ctx *ctx, int i, const char *model) {
    int n, n_eos, n_greedy, n_margin, k;
    const qwen3_token *tokens = ref_tokens(&f->ref, i, "tokens", &n), *want = ref_tokens(&f->ref, i, "greedy", &n_greedy);
    const qwen3_token *eos = (const qwen3_token *)ref_find(&f->ref, "eos", REF_I32, &n_eos);
    const float *margin = ref_f32(&f->ref, i, "margin", &n_margin);
    qwen3_bias ban[8];
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_GREEDY, 0);
    if (!CHECK(tokens && want && eos && n_eos <= 8 && margin && n_margin == n_greedy && n_greedy >= 20)) return;
    for (k = 0; k < n_eos; k++) { ban[k].token = eos[k]; ban[k].bias = -1e30f; }
    s.bias = ban;
    s.n_bias = n_eos;
    CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, n, 0));
    for (k = 0; k < n_greedy; k++) {
        qwen3_token t = -1;
        if (!CHECK_OK(ctx, qwen3_next(ctx, 0, &s, &t))) return;
        if (t == want[k]) continue;
        CHECK_MSG(margin[k] < 2 * PARITY, "%s, prompt %d: token %d is %d, not %d (margin %.1e)", model, i, k, t, want[k], (double)margin[k]);
        return;                             /* a tie within the rounding: from here on all may differ */
    }
    CHECK(seq_len(ctx, 0) == n + n_greedy);
}

static void test_parity_greedy(void) {
    int i, p, n;
    for (i = 0; i < N_MODELS; i++) {
        fixture f;
        qwen3_ctx *ctx;
        if (!fixture_open(&f, model_names[i])) continue;
        ctx = ctx_open(f.model, 256, 1, 0, QWEN3_KV_F32);
        for (p = 0; ctx && ref_tokens(&f.ref, p, "tokens", &n); p++) greedy_case(&f, ctx, p, model_names[i]);
        qwen3_ctx_free(ctx);
        fixture_close(&f);
    }
}

/* Is the bound sharp? What each classic mistake computes must lie far outside of it. */
static void test_parity_tells_mistakes(void) {
    static const char *const mistakes[] = {"norm_after_rope", "norm_skipped", "interleaved", "gqa"};
    fixture f;
    int i, n, count, vocab;
    const qwen3_token *tokens;
    float *got;
    if (!fixture_open(&f, "controls")) return;
    vocab = f.info.n_vocab;
    tokens = ref_tokens(&f.ref, 0, "tokens", &n);
    got = plain_logits(f.model, tokens, n, QWEN3_KV_F32);
    for (i = 0; i < 4; i++) {
        char name[32];
        const float *wrong;
        double e;
        snprintf(name, sizeof name, "wrong.%s", mistakes[i]);
        wrong = (const float *)ref_find(&f.ref, name, REF_F32, &count);
        if (!CHECK_MSG(wrong && count == n * vocab, "no array %s", name)) continue;
        e = parity_error(got, wrong, n, vocab);
        CHECK_MSG(e > 10 * PARITY, "%s would pass: it differs by %.1e", mistakes[i], e);
    }
    free(got);
    fixture_close(&f);
}

/* The same for what config.json says: parity must fail when eps or theta is another. */
static void test_parity_tells_config(void) {
    static const char *const edits[][2] = {
        {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-05"}, {"\"rope_theta\": 1000000", "\"rope_theta\": 10000"}
    };
    int i;
    for (i = 0; i < 2; i++) {
        qwen3_ctx_desc desc = ctx_desc(256, 1, 0, QWEN3_KV_F32);
        model_files files;
        fixture f;
        double right, wrong, hidden;
        if (!fixture_open(&f, "controls") || !model_files_read(&files, "controls")) return;
        fixture_errors(&f, &desc, &right, &hidden);
        qwen3_free(f.model);
        CHECK(model_files_edit(&files, "config.json", edits[i][0], edits[i][1]));
        f.model = model_files_load(&files);
        if (f.model) {
            fixture_errors(&f, &desc, &wrong, &hidden);
            CHECK_MSG(right <= PARITY && wrong > 10 * PARITY, "%s would pass: %.1e, right %.1e", edits[i][1], wrong, right);
        }
        fixture_close(&f);
        model_files_free(&files);
    }
}

/* YaRN by the descriptor of a context is YaRN by config.json. */
static void test_parity_yarn_by_desc(void) {
    fixture f;
    model_files files;
    qwen3_ctx_desc desc = ctx_desc(256, 1, 0, QWEN3_KV_F32);
    double logits, hidden;
    if (!fixture_open(&f, "yarn") || !model_files_read(&files, "yarn")) return;
    qwen3_free(f.model);
    CHECK(model_files_edit(&files, "config.json", "\"max_position_embeddings\": 16384", "\"max_position_embeddings\": 4096"));
    CHECK(model_files_edit(&files, "config.json", "\"rope_scaling\": {", "\"rope_scaling\": null, \"unused\": {"));
    f.model = model_files_load(&files);
    if (f.model) {
        fixture_errors(&f, &desc, &logits, &hidden);
        CHECK_MSG(logits > 10 * PARITY, "without YaRN the logits differ by only %.1e", logits);
        desc.yarn_factor = 4;
        fixture_errors(&f, &desc, &logits, &hidden);
        CHECK_MSG(logits <= PARITY, "with yarn_factor 4 the logits differ by %.1e", logits);
    }
    fixture_close(&f);
    model_files_free(&files);
}

/* ---- bit for bit ------------------------------------------------------------------------------------ */
/* Models that between them have all GQA ratios, head sizes and number formats, and odd sizes. */
static const char *const identity_models[] = {"plain", "hot", "sharded", "odd", "mixed", "theta"};
#define N_IDENTITY ((int)(sizeof identity_models / sizeof *identity_models))
#define IDENTITY_TOKENS 72                  /* more than a chunk of 64 */

typedef struct identity { fixture f; int kv_type, vocab; qwen3_token tokens[IDENTITY_TOKENS]; float *plain; } identity;

/* Run a check on each model and KV type. plain: the logits of tokens, evaluated plainly. */
static void for_each_identity(void (*check)(const identity *)) {
    int i, kv;
    for (i = 0; i < N_IDENTITY; i++) {
        identity id;
        uint64_t seed = 42;
        if (!fixture_open(&id.f, identity_models[i])) continue;
        id.vocab = id.f.info.n_vocab;
        random_tokens(&seed, id.tokens, IDENTITY_TOKENS, id.vocab);
        for (kv = QWEN3_KV_F32; kv <= QWEN3_KV_BF16; kv++) {
            int before = test_bad;
            id.kv_type = kv;
            id.plain = plain_logits(id.f.model, id.tokens, IDENTITY_TOKENS, kv);
            check(&id);
            free(id.plain);
            if (test_bad != before) fprintf(stderr, "  (model %s, kv type %d)\n", identity_models[i], kv);
        }
        fixture_close(&id.f);
    }
}

static const float *plain_row(const identity *id, int i) { return id->plain + (size_t)i * (size_t)id->vocab; }

/* Append tokens [from, to) to a sequence that holds those before, and compare every row. */
static void check_rows(const identity *id, qwen3_ctx *ctx, int seq, int from, int to) {
    float *got = floats((size_t)(to - from) * (size_t)id->vocab);
    CHECK_OK(ctx, eval(ctx, seq, id->tokens + from, to - from, got));
    CHECK_MSG(same_floats(got, plain_row(id, from), (to - from) * id->vocab), "rows %d to %d differ", from, to);
    CHECK_MSG(same_logits(ctx, seq, plain_row(id, to - 1), id->vocab), "the kept logits of row %d differ", to - 1);
    free(got);
}

static void check_chunks(const identity *id) {
    static const int chunks[] = {1, 7, 64, 500};
    int i, at;
    for (i = 0; i < 4; i++) {
        qwen3_ctx *ctx = ctx_open(id->f.model, IDENTITY_TOKENS, 1, chunks[i], id->kv_type);
        if (!ctx) return;
        check_rows(id, ctx, 0, 0, IDENTITY_TOKENS);
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 0));
        for (at = 0; at < IDENTITY_TOKENS; at++) check_rows(id, ctx, 0, at, at + 1);    /* one by one */
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 5));                                   /* in uneven pieces */
        for (at = 5; at < IDENTITY_TOKENS; at += 11) check_rows(id, ctx, 0, at, at + 11 < IDENTITY_TOKENS ? at + 11 : IDENTITY_TOKENS);
        qwen3_ctx_free(ctx);
    }
}
static void test_identical_chunks(void) { for_each_identity(check_chunks); }

/* With inputs in BF16: other bits where the processor has what that needs, not far away, and the same ones for any
   step and number of threads. */
static void test_identical_bf16(void) {
    static const int chunks[] = {500, 1, 7};
    qwen3_token tokens[IDENTITY_TOKENS];
    float *plain, *want = NULL;
    fixture f;
    uint64_t seed = 42;
    int i, n;
    if (!fixture_open(&f, "plain")) return;
    n = IDENTITY_TOKENS * f.info.n_vocab;
    random_tokens(&seed, tokens, IDENTITY_TOKENS, f.info.n_vocab);
    plain = plain_logits(f.model, tokens, IDENTITY_TOKENS, QWEN3_KV_F32);
    for (i = 0; i < 3; i++) {
        qwen3_ctx_desc d = ctx_desc(IDENTITY_TOKENS, 1, chunks[i], QWEN3_KV_F32);
        float *got = floats((size_t)n);
        qwen3_ctx *ctx;
        d.bf16 = 1;
        d.threads = 1 + i;
        ctx = ctx_open_desc(f.model, &d);
        if (ctx) CHECK_OK(ctx, eval(ctx, 0, tokens, IDENTITY_TOKENS, got));
        if (i == 0) {
            double off = 0, top = 0;
            want = got;
            for (int k = 0; k < n; k++) { off = fmax(off, fabs((double)got[k] - (double)plain[k])); top = fmax(top, fabs((double)plain[k])); }
            CHECK_MSG((off > 0) == (qwen3i_find_pairs() != NULL) && off < 0.03 * top, "off by %g of %g", off, top);
        } else {
            CHECK_MSG(same_floats(got, want, n), "chunk %d: other bits", chunks[i]);
            free(got);
        }
        qwen3_ctx_free(ctx);
    }
    free(want);
    free(plain);
    fixture_close(&f);
}

/* Several sequences in one call: what the neighbours are must not change a bit. Sequence s holds, after its
   first `shift` tokens of its own, nothing shared with the others; sequence 0 holds the tokens themselves. */
static void check_batch_of(const identity *id, int n_seqs, int chunk) {
    qwen3_ctx *ctx = ctx_open(id->f.model, IDENTITY_TOKENS, n_seqs, chunk, id->kv_type);
    qwen3_token other[8][IDENTITY_TOKENS];
    qwen3_item items[8];
    float *got[8], *want;
    int s, at, len[8], step;
    uint64_t seed = (uint64_t)(n_seqs * 1000 + chunk);
    if (!ctx) return;
    memcpy(other[0], id->tokens, sizeof other[0]);
    for (s = 0; s < n_seqs; s++) {
        if (s > 0) random_tokens(&seed, other[s], IDENTITY_TOKENS, id->vocab);
        len[s] = s == 0 ? IDENTITY_TOKENS : 1 + random_below(&seed, IDENTITY_TOKENS - 1);
        got[s] = floats((size_t)IDENTITY_TOKENS * (size_t)id->vocab);
    }
    for (at = 0; at < IDENTITY_TOKENS; at += step) {        /* pieces of several tokens, then single steps */
        int n_items = 0;
        step = at < 48 ? 24 : 1;
        for (s = n_seqs - 1; s >= 0; s--) {                 /* not in order of the sequences */
            int n = len[s] - at < step ? len[s] - at : step;
            if (n <= 0) continue;
            items[n_items] = item_of(s, other[s] + at, n);
            items[n_items++].all_logits = got[s] + (size_t)at * (size_t)id->vocab;
        }
        CHECK_OK(ctx, qwen3_eval(ctx, items, n_items));
    }
    for (s = 0; s < n_seqs; s++) {
        want = s == 0 ? id->plain : plain_logits(id->f.model, other[s], len[s], id->kv_type);
        CHECK_MSG(same_floats(got[s], want, len[s] * id->vocab), "sequence %d of %d, chunk %d differs", s, n_seqs, chunk);
        CHECK(same_logits(ctx, s, want + (size_t)(len[s] - 1) * (size_t)id->vocab, id->vocab));
        CHECK(seq_len(ctx, s) == len[s] && memcmp(qwen3_seq_tokens(ctx, s, NULL), other[s], (size_t)len[s] * sizeof(qwen3_token)) == 0);
        if (s > 0) free(want);
        free(got[s]);
    }
    qwen3_ctx_free(ctx);
}

static void check_batches(const identity *id) {
    int n;
    for (n = 1; n <= 8; n++) check_batch_of(id, n, n % 3 == 0 ? 64 : n % 3 == 1 ? 7 : 0);
    check_batch_of(id, 8, 1);
}
static void test_identical_batches(void) { for_each_identity(check_batches); }

/* qwen3_sync from any state to any other: shorter, longer, equal, diverging, empty. */
static void check_sync(const identity *id) {
    qwen3_ctx *ctx = ctx_open(id->f.model, IDENTITY_TOKENS, 2, 7, id->kv_type);
    qwen3_token other[IDENTITY_TOKENS];
    int i, previous = 0;
    static const int lengths[] = {30, 30, 12, 72, 1, 71, 72, 29};
    if (!ctx) return;
    for (i = 0; i < 8; i++) {
        qwen3_stats before = qwen3_ctx_stats(ctx), after;
        int n = lengths[i], reused = n < previous ? n : previous;
        CHECK_OK(ctx, qwen3_sync(ctx, 0, id->tokens, n, 0));
        after = qwen3_ctx_stats(ctx);
        CHECK_MSG(seq_len(ctx, 0) == n, "%d tokens, not %d", seq_len(ctx, 0), n);
        CHECK_MSG(same_logits(ctx, 0, plain_row(id, n - 1), id->vocab), "after sync from %d to %d tokens", previous, n);
        CHECK_MSG(after.n_reused - before.n_reused >= reused - 1 && after.n_reused - before.n_reused <= reused,
                  "sync from %d to %d reused %d", previous, n, (int)(after.n_reused - before.n_reused));
        previous = n;
    }
    for (i = 0; i < IDENTITY_TOKENS; i += 10) {             /* diverge at position i, and back */
        memcpy(other, id->tokens, sizeof other);
        other[i] = (other[i] + 1) % id->vocab;
        CHECK_OK(ctx, qwen3_sync(ctx, 0, other, 65, 0));
        CHECK(memcmp(qwen3_seq_tokens(ctx, 0, NULL), other, 65 * sizeof *other) == 0);
        CHECK_OK(ctx, qwen3_sync(ctx, 0, id->tokens, 66, 0));
        CHECK_MSG(same_logits(ctx, 0, plain_row(id, 65), id->vocab), "after diverging at %d", i);
    }
    CHECK_OK(ctx, qwen3_sync(ctx, 0, NULL, 0, 0));
    CHECK(seq_len(ctx, 0) == 0 && qwen3_logits(ctx, 0) == NULL);
    qwen3_ctx_free(ctx);
}
static void test_identical_sync(void) { for_each_identity(check_sync); }

/* Truncate to every length: the logits there, and the next token's, are the plain ones. */
static void check_truncate(const identity *id) {
    qwen3_ctx *ctx = ctx_open(id->f.model, IDENTITY_TOKENS, 1, 0, id->kv_type);
    const float *logits;
    int len;
    if (!ctx) return;
    CHECK_OK(ctx, eval(ctx, 0, id->tokens, IDENTITY_TOKENS, NULL));
    for (len = IDENTITY_TOKENS - 1; len >= 0; len -= 9) {
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, len));
        CHECK(seq_len(ctx, 0) == len);
        logits = qwen3_logits(ctx, 0);
        if (len > 0) CHECK_MSG(same_floats(logits, plain_row(id, len - 1), id->vocab), "logits after truncating to %d", len);
        else CHECK(logits == NULL);
        CHECK(seq_len(ctx, 0) == len);
        check_rows(id, ctx, 0, len, len + 1);
    }
    qwen3_ctx_free(ctx);
}
static void test_identical_truncate(void) { for_each_identity(check_truncate); }

/* Copies go on independently of their source, and overwrite what was there. */
static void check_copy(const identity *id) {
    qwen3_ctx *ctx = ctx_open(id->f.model, IDENTITY_TOKENS, 3, 0, id->kv_type);
    if (!ctx) return;
    CHECK_OK(ctx, eval(ctx, 1, id->tokens, 40, NULL));
    CHECK_OK(ctx, eval(ctx, 2, id->tokens + 20, 50, NULL));
    CHECK_OK(ctx, qwen3_seq_copy(ctx, 2, 1));
    CHECK(seq_len(ctx, 2) == 40 && same_logits(ctx, 2, plain_row(id, 39), id->vocab));
    CHECK_OK(ctx, qwen3_seq_truncate(ctx, 1, 3));
    CHECK_OK(ctx, eval(ctx, 1, id->tokens, 30, NULL));      /* something else in the source */
    check_rows(id, ctx, 2, 40, IDENTITY_TOKENS);
    CHECK_OK(ctx, qwen3_seq_copy(ctx, 0, 2));
    CHECK_OK(ctx, qwen3_seq_copy(ctx, 0, 0));               /* onto itself: nothing changes */
    CHECK(same_logits(ctx, 0, plain_row(id, IDENTITY_TOKENS - 1), id->vocab));
    CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 50));
    check_rows(id, ctx, 0, 50, 60);
    CHECK_OK(ctx, qwen3_seq_truncate(ctx, 2, 0));
    CHECK_OK(ctx, qwen3_seq_copy(ctx, 0, 2));               /* an empty one */
    CHECK(seq_len(ctx, 0) == 0 && qwen3_logits(ctx, 0) == NULL);
    qwen3_ctx_free(ctx);
}
static void test_identical_copy(void) { for_each_identity(check_copy); }

/* A saved sequence goes on in another context of another shape, on a second load of the model. */
static void check_restore(const identity *id) {
    qwen3_ctx *from = ctx_open(id->f.model, 60, 2, 0, id->kv_type), *to = ctx_open(id->f.model, IDENTITY_TOKENS, 3, 7, id->kv_type);
    uint64_t size = 0, written = 0;
    unsigned char *state = NULL;
    if (from && to) {
        CHECK_OK(from, eval(from, 1, id->tokens, 50, NULL));
        size = state_size(from, 1);
        state = (unsigned char *)malloc((size_t)size + 1);
        state[size] = 0x77;
        CHECK_OK(from, state_save(from, 1, state, size, &written));
        CHECK(written == size && state[size] == 0x77);
        CHECK_OK(to, eval(to, 2, id->tokens + 9, 20, NULL));        /* gets overwritten */
        CHECK_OK(to, state_load(to, 2, state, size));
        CHECK(seq_len(to, 2) == 50 && memcmp(qwen3_seq_tokens(to, 2, NULL), id->tokens, 50 * sizeof(qwen3_token)) == 0);
        CHECK(same_logits(to, 2, plain_row(id, 49), id->vocab));
        check_rows(id, to, 2, 50, IDENTITY_TOKENS);
        CHECK_OK(from, state_load(from, 0, state, size));
        CHECK_OK(from, qwen3_seq_truncate(from, 0, 33));
        check_rows(id, from, 0, 33, 60);
    }
    free(state);
    qwen3_ctx_free(from);
    qwen3_ctx_free(to);
}
static void test_identical_restore(void) { for_each_identity(check_restore); }

/* Whoever does the work, and however many. */
static void jobs_backwards(void *user, int count, void (*fn)(void *arg, int index), void *arg) {
    int i;
    ++*(int *)user;
    for (i = count - 1; i >= 0; i--) fn(arg, i);
}

static void check_threads(const identity *id) {
    int n_threads, used = 0;
    for (n_threads = 0; n_threads <= 5; n_threads++) {
        qwen3_ctx_desc d = ctx_desc(IDENTITY_TOKENS, 1, 0, id->kv_type);
        qwen3_ctx *ctx;
        d.threads = n_threads;
        if (n_threads == 5) {
            d.threads = 3;
            d.jobs.parallel_for = jobs_backwards;
            d.jobs.user = &used;
        }
        ctx = ctx_open_desc(id->f.model, &d);
        if (!ctx) return;
        check_rows(id, ctx, 0, 0, 60);
        check_rows(id, ctx, 0, 60, 61);
        check_rows(id, ctx, 0, 61, IDENTITY_TOKENS);
        qwen3_ctx_free(ctx);
    }
    CHECK_MSG(used > 0, "the host's job system was not used");
}
static void test_identical_threads(void) { for_each_identity(check_threads); }

/* From the directory, mapped or read, from memory and through callbacks: the same model. */
static void test_identical_sources(void) {
    int i;
    for (i = 0; i < N_IDENTITY; i++) {
        identity id;
        model_files files;
        uint64_t seed = 42;
        float *again;
        qwen3_model *model;
        if (!fixture_open(&id.f, identity_models[i]) || !model_files_read(&files, identity_models[i])) continue;
        random_tokens(&seed, id.tokens, IDENTITY_TOKENS, id.f.info.n_vocab);
        id.plain = plain_logits(id.f.model, id.tokens, IDENTITY_TOKENS, QWEN3_KV_F32);
        model = model_files_load(&files);
        if (model) {
            again = plain_logits(model, id.tokens, IDENTITY_TOKENS, QWEN3_KV_F32);
            CHECK(same_floats(again, id.plain, IDENTITY_TOKENS * id.f.info.n_vocab));
            CHECK(qwen3_get_info(model).fingerprint == id.f.info.fingerprint);
            free(again);
            qwen3_free(model);
        }
        free(id.plain);
        model_files_free(&files);
        fixture_close(&id.f);
    }
}

/* ---- texts: embeddings and reranking as the model cards do it ---------------------------------------- */
static void test_parity_embed(void) {
    fixture f;
    qwen3_ctx *ctx;
    float *out, *plain;
    int n;
    char *text, *task;
    if (!fixture_open(&f, "chat")) return;
    ctx = ctx_open(f.model, 256, 2, 0, QWEN3_KV_F32);
    out = floats((size_t)f.info.n_embd);
    text = ref_text(&f.ref, "embed.text");
    task = ref_text(&f.ref, "embed.task");
    if (ctx) {
        const float *want = (const float *)ref_find(&f.ref, "embed.plain", REF_F32, &n);
        CHECK_OK(ctx, qwen3_embed(ctx, 1, NULL, text, out));
        CHECK(want && n == f.info.n_embd && parity_error(out, want, 1, n) <= PARITY);
        CHECK(seq_len(ctx, 1) == 0);
        plain = floats((size_t)f.info.n_embd);
        memcpy(plain, out, (size_t)f.info.n_embd * sizeof *out);
        want = (const float *)ref_find(&f.ref, "embed.query", REF_F32, &n);
        CHECK_OK(ctx, qwen3_embed(ctx, 0, task, text, out));
        CHECK(want && n == f.info.n_embd && parity_error(out, want, 1, n) <= PARITY);
        CHECK_OK(ctx, qwen3_embed(ctx, 0, NULL, text, out));
        CHECK_MSG(same_floats(out, plain, f.info.n_embd), "an embedding depends on what came before");
        CHECK_OK(ctx, qwen3_embed(ctx, 0, NULL, "", out));
        free(plain);
    }
    free(text); free(task); free(out);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

static void test_parity_rerank(void) {
    fixture f;
    qwen3_ctx *ctx;
    int i, round, n;
    if (!fixture_open(&f, "chat")) return;
    ctx = ctx_open(f.model, 512, 1, 0, QWEN3_KV_F32);
    for (round = 0; ctx && round < 2; round++) {            /* the second time with a prefix to reuse */
        for (i = 0; i < 3; i++) {
            char name[32], *query, *document;
            const float *want;
            float score = -1;
            snprintf(name, sizeof name, "rerank.%d.query", i);
            query = ref_text(&f.ref, name);
            snprintf(name, sizeof name, "rerank.%d.document", i);
            document = ref_text(&f.ref, name);
            snprintf(name, sizeof name, "rerank.%d.score", i);
            want = (const float *)ref_find(&f.ref, name, REF_F32, &n);
            CHECK_OK(ctx, qwen3_rerank(ctx, 0, NULL, query, document, &score));
            CHECK_MSG(want && fabs((double)(score - *want)) < 1e-3, "pair %d: %g, not %g", i, (double)score, want ? (double)*want : 0.0);
            free(query);
            free(document);
        }
    }
    if (ctx) CHECK_MSG(qwen3_ctx_stats(ctx).n_reused > 100, "the common part of the prompts is not reused");
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* A model that computes what is not a number says so, wherever one number would be the answer. */
static void test_parity_not_a_number(void) {
    model_files files;
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_ctx *ctx;
    qwen3_prob best[3];
    char err[256] = "";
    float *vector, score = 0;
    int i;
    if (!model_files_read(&files, "chat")) return;
    memset(&d, 0, sizeof d);
    d.files = files.file;
    d.n_files = files.n;
    for (i = 0; i < files.n; i++) if (strcmp(files.file[i].name, "model.safetensors") == 0) {
        unsigned char *end = (unsigned char *)files.owned[i] + files.file[i].size;
        end[-2] = 0xC0;                 /* of the last element in the file, whether BF16 or F32 */
        end[-1] = 0x7F;
    }
    CHECK_MSG(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK, "%s", err);
    ctx = ctx_open(m, 512, 2, 0, QWEN3_KV_F16);
    if (ctx) {
        vector = floats((size_t)qwen3_get_info(m).n_embd);
        CHECK(qwen3_embed(ctx, 0, NULL, "yes", vector) == QWEN3_ERR_FORMAT && strstr(qwen3_ctx_error(ctx), "not a number"));
        CHECK(qwen3_rerank(ctx, 0, NULL, "yes", "no", &score) == QWEN3_ERR_FORMAT);
        CHECK(qwen3_top_probs(ctx, 0, best, 3) == QWEN3_ERR_FORMAT);
        free(vector);
    }
    qwen3_ctx_free(ctx);
    qwen3_free(m);
    model_files_free(&files);
}

static void suite_parity(void) {
    RUN(test_parity_float32);
    RUN(test_parity_half_kv);
    RUN(test_parity_greedy);
    RUN(test_parity_tells_mistakes);
    RUN(test_parity_tells_config);
    RUN(test_parity_yarn_by_desc);
    RUN(test_identical_chunks);
    RUN(test_identical_bf16);
    RUN(test_identical_batches);
    RUN(test_identical_sync);
    RUN(test_identical_truncate);
    RUN(test_identical_copy);
    RUN(test_identical_restore);
    RUN(test_identical_threads);
    RUN(test_identical_sources);
    RUN(test_parity_embed);
    RUN(test_parity_rerank);
    RUN(test_parity_not_a_number);
}
#endif
