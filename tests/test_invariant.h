/* Invariant contexts of the CUDA backend: a row's logits are the same bits alone and among up to 16 rows. Included by
   test_cuda.h. */
#ifndef QWEN3_TESTS_TEST_INVARIANT_H
#define QWEN3_TESTS_TEST_INVARIANT_H

enum { SAME_SEQS = 3, SAME_TOKENS = 16, SAME_BEFORE = 19 };

/* Each of SAME_SEQS sequences has SAME_BEFORE tokens and SAME_TOKENS more, of which these bits were seen. */
typedef struct same_bench {
    const qwen3_backend *backend;
    void        *ctx;
    const char  *name;
    int          vocab;
    qwen3_token  tokens[SAME_SEQS][SAME_BEFORE + SAME_TOKENS];
    float       *alone;                 /* [SAME_SEQS, SAME_TOKENS, vocab] */
    qwen3i_err  *err;
} same_bench;

/* Evaluates n tokens of each of n_seqs sequences from position `at` on, and gives the logits of every each-th row. */
static void same_forward(const same_bench *b, int first, int n_seqs, int at, int n, int each, float *logits) {
    qwen3_token tokens[SAME_SEQS * 64];
    int32_t seqs[SAME_SEQS * 64], positions[SAME_SEQS * 64];
    qwen3i_out outs[SAME_SEQS * 64];
    qwen3i_batch batch;
    int s, i;
    memset(&batch, 0, sizeof batch);
    memset(outs, 0, sizeof outs);
    for (s = 0; s < n_seqs; s++) for (i = 0; i < n; i++, batch.n_rows++) {
        tokens[batch.n_rows] = b->tokens[first + s][at + i];
        seqs[batch.n_rows] = first + s;
        positions[batch.n_rows] = at + i;
        if (!logits || batch.n_rows % each) continue;
        outs[batch.n_outs].row = batch.n_rows;
        outs[batch.n_outs].keep_seq = -1;
        outs[batch.n_outs].logits = logits + (size_t)batch.n_outs * (size_t)b->vocab;
        batch.n_outs++;
    }
    batch.tokens = tokens;
    batch.seqs = seqs;
    batch.positions = positions;
    batch.outs = outs;
    CHECK_MSG(b->backend->forward(b->ctx, &batch, b->err) == QWEN3_OK, "%s", b->err->text);
}

/* The same rows, n of each of n_seqs sequences in a step, against what each gave alone. */
static void same_compare(const same_bench *b, int n_seqs, int at, int n, int each) {
    float *logits = floats((size_t)(n_seqs * n) * (size_t)b->vocab);
    int row, k;
    same_forward(b, 0, n_seqs, SAME_BEFORE + at, n, each, logits);
    for (row = k = 0; row < n_seqs * n; row += each, k++) {
        const size_t vocab = (size_t)b->vocab, of = (size_t)(row / n * SAME_TOKENS + at + row % n);
        const float *got = logits + (size_t)k * vocab, *want = b->alone + of * vocab;
        CHECK_MSG(memcmp(got, want, vocab * sizeof *got) == 0,
                  "%s: row %d of %d of %d sequences, at %d, off by %.2g", b->name, row, n_seqs * n, n_seqs, at,
                  cuda_error(got, want, vocab));
    }
    free(logits);
}

static void same_check(const qwen3_backend *backend, void *ctx, int vocab, const char *name, qwen3i_err *err) {
    static same_bench b;
    uint64_t seed = 5;
    int s, i;
    b.backend = backend;
    b.ctx = ctx;
    b.name = name;
    b.vocab = vocab;
    b.err = err;
    b.alone = floats((size_t)(SAME_SEQS * SAME_TOKENS) * (size_t)vocab);
    for (s = 0; s < SAME_SEQS; s++) {
        random_tokens(&seed, b.tokens[s], SAME_BEFORE + SAME_TOKENS, vocab);
        same_forward(&b, s, 1, 0, SAME_BEFORE, 1, NULL);
        for (i = 0; i < (s ? 5 : SAME_TOKENS); i++)
            same_forward(&b, s, 1, SAME_BEFORE + i, 1, 1, b.alone + (size_t)(s * SAME_TOKENS + i) * (size_t)vocab);
    }
    same_compare(&b, 1, 0, 2, 1);
    same_compare(&b, 1, 2, 5, 1);
    same_compare(&b, 3, 0, 1, 1);
    same_compare(&b, 3, 0, 5, 1);       /* 15 rows */
    same_compare(&b, 1, 0, 16, 1);
    same_compare(&b, 1, 0, 16, 5);      /* of which the last layer keeps few */
    same_compare(&b, 1, 15, 1, 1);      /* alone again, on what they left in the cache */
    free(b.alone);
}

static void same_check_lab(const lab_shape *s, qwen3i_type type, qwen3i_type other, int kv_type, const char *name) {
    qwen3_ctx_desc desc = ctx_desc(64, SAME_SEQS, 40, kv_type);
    lab *l = (lab *)malloc(sizeof *l);
    desc.invariant = 1;
    if (lab_load_mixed(l, s, type, other) && lab_context(l, &desc))
        same_check(qwen3_cuda_backend(), l->ctx, s->n_vocab, name, &l->err);
    lab_close(l);
    free(l);
}

static void same_check_fixture(const char *name) {
    qwen3_ctx_desc desc = ctx_desc(64, SAME_SEQS, 40, QWEN3_KV_F16);
    fixture f;
    qwen3_ctx *ctx;
    desc.invariant = 1;
    if (!cuda_fixture(&f, name)) return;
    ctx = ctx_open_desc(f.model, &desc);
    if (ctx) {
        qwen3i_err err = qwen3i_ctx_err(ctx);
        same_check(f.model->backend, ctx->state, f.info.n_vocab, name, &err);
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

static void test_cuda_invariant(void) {
    static const lab_shape blocks = {256, 4, 2, 64, 320, 100, 2}, deep = {48, 4, 2, 16, 80, 100, 2},
                           large = {1024, 16, 8, 128, 3072, 512, 2};
    (void)large;
    same_check_lab(&deep, QWEN3I_BF16, QWEN3I_NO_TYPE, QWEN3_KV_F32, "BF16");
    same_check_lab(&deep, QWEN3I_F32, QWEN3I_NO_TYPE, QWEN3_KV_F16, "F32");
    same_check_lab(&blocks, QWEN3I_BF16, QWEN3I_NO_TYPE, QWEN3_KV_BF16, "BF16, tiles");
    same_check_lab(&blocks, QWEN3I_Q8_0, QWEN3I_NO_TYPE, QWEN3_KV_F16, "Q8_0");
    same_check_lab(&blocks, QWEN3I_Q4_K, QWEN3I_Q6_K, QWEN3_KV_F16, "Q4_K and Q6_K");
    same_check_fixture("experts8");
    same_check_fixture("fused128");
#ifndef QWEN3_TEST_CUDA_ON_CPU
    same_check_lab(&large, QWEN3I_BF16, QWEN3I_NO_TYPE, QWEN3_KV_F16, "BF16, wide");
    same_check_lab(&large, QWEN3I_F32, QWEN3I_NO_TYPE, QWEN3_KV_F16, "F32, wide");
    same_check_lab(&large, QWEN3I_Q8_0, QWEN3I_NO_TYPE, QWEN3_KV_F16, "Q8_0, wide");
    same_check_lab(&large, QWEN3I_Q4_K, QWEN3I_Q6_K, QWEN3_KV_F16, "Q4_K and Q6_K, wide");
#endif
}

static void test_cuda_invariant_hopper(void) {
    static const lab_shape shape = {256, 2, 1, 128, 256, 128, 2};
    cuda_on_cpu_chip(90);
    cuda_on_cpu_size(40);               /* so that clusters share heads, and positions are split */
    same_check_lab(&shape, QWEN3I_BF16, QWEN3I_NO_TYPE, QWEN3_KV_F16, "Hopper, BF16");
    cuda_on_cpu_size(5);
    same_check_lab(&shape, QWEN3I_F16, QWEN3I_NO_TYPE, QWEN3_KV_F32, "Hopper, an F32 cache");
    same_check_lab(&shape, QWEN3I_Q8_0, QWEN3I_NO_TYPE, QWEN3_KV_F16, "Hopper, Q8_0");
    same_check_lab(&shape, QWEN3I_Q4_K, QWEN3I_Q6_K, QWEN3_KV_F16, "Hopper, Q4_K and Q6_K");
    same_check_lab(&lab_small, QWEN3I_BF16, QWEN3I_NO_TYPE, QWEN3_KV_F16, "sm_90, narrow heads");
    cuda_on_cpu_chip(80);
}
/* What the backend chooses behind a sequence is what the host does. */
static void same_choice(qwen3_ctx *ctx, qwen3_sampler sampler) {
    const qwen3i_err err = qwen3i_ctx_err(ctx);
    qwen3i_next item;
    qwen3_token there = -2, here = -3;
    memset(&item, 0, sizeof item);
    item.tokens = qwen3_seq_tokens(ctx, 0, &item.n);
    item.sampler = &sampler;
    CHECK(ctx->model->backend->choose(ctx->state, &item, -1, 1, &there, &err) == QWEN3_OK);
    CHECK_OK(ctx, qwen3_sample(ctx, 0, &sampler, &here));
    CHECK_MSG(there == here, "%d, not %d", there, here);
}

/* Speculation in an invariant context: text, sampler, logits, keys and values as without, bit for bit; guesses from the
   text, from a model that is always right when greedy, or where they seem to pay. */
static void same_speculate(const char *name, int each) {
    static outcome plain, guessed;
    const qwen3_bias bias = {70, 3.0f};
    qwen3_ctx_desc desc = ctx_desc(100, 1, 0, QWEN3_KV_F16);
    fixture f, other;
    qwen3_ctx *a, *b, *draft;
    int i, way;
    if (!cuda_fixture(&f, name)) return;
    if (!fixture_open(&other, name)) { fixture_close(&f); return; }
    desc.invariant = 1;
    a = ctx_open_desc(f.model, &desc);
    b = ctx_open_desc(f.model, &desc);
    draft = ctx_open(other.model, 90, 1, 0, QWEN3_KV_F16);
    for (i = 0; a && b && draft && i < 4; i += each) {
        qwen3_gen_desc gen;
        qwen3_sampler sampler = qwen3_sampler_preset(i % 2 ? QWEN3_THINKING : QWEN3_GREEDY, (uint64_t)i);
        memset(&gen, 0, sizeof gen);
        gen.max_tokens = i == 2 ? 0 : 30;
        gen.think_budget = i == 2 ? 7 : 0;
        if (i == 3) { sampler.bias = &bias; sampler.n_bias = 1; sampler.presence_penalty = 0.5f; }
        reply_to(a, f.info.n_vocab, (uint64_t)i, gen, &sampler, &plain);
        for (way = i % 2; way < 3; way += 1 + i % 2) {
            b->pace.always_guess = way < 2;
            gen.draft_tokens = way == 1 ? 16 : 5;
            gen.draft = way == 0 ? NULL : draft;
            reply_to(b, f.info.n_vocab, (uint64_t)i, gen, &sampler, &guessed);
            check_same(&plain, &guessed, i, gen.draft_tokens);
        }
        same_choice(b, sampler);
    }
    CHECK(b && qwen3_ctx_stats(b).n_accepted > 20);
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
    qwen3_ctx_free(draft);
    fixture_close(&f);
    fixture_close(&other);
}

/* 200 prompts of 256 tokens where there is a GPU. The draft is of the CPU. */
static void test_cuda_invariant_prompts(void) {
    grammar_bench b;
    fixture other;
    memset(&b, 0, sizeof b);
    if (!cuda_fixture(&b.f, "chat")) return;
    if (fixture_open(&other, "chat")) {
#ifdef QWEN3_TEST_CUDA_ON_CPU
        speculate_on_prompts(&b, &other, 1);
#else
        speculate_on_prompts(&b, &other, 200);
#endif
        fixture_close(&other);
    }
    grammar_close(&b);
}

static void test_cuda_invariant_speculation(void) {
    same_speculate("chat", 1);
    cuda_on_cpu_chip(90);
    same_speculate("chat", 3);
    cuda_on_cpu_chip(80);
}
#endif
