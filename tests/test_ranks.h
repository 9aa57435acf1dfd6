/* Several devices that share a model: beside transformers, one device and the CPU. Where there is one GPU they are skipped. */
#ifndef QWEN3_TESTS_TEST_RANKS_H
#define QWEN3_TESTS_TEST_RANKS_H
#include "test_cuda.h"
#include <pthread.h>

#ifdef QWEN3_TEST_CUDA_ON_CPU
extern void cuda_on_cpu_devices(int n);
extern void cuda_on_cpu_leave(int rank);
enum { test_ranks_on_cpu = 1 };
#else
static void cuda_on_cpu_devices(int n) { (void)n; }
enum { test_ranks_on_cpu = 0 };
#endif

static const int ranks_devices[4] = {0, 1, 2, 3};
static int ranks_present;               /* devices, up to 4 */

static qwen3_load_desc ranks_load(const char *path, int n) {
    qwen3_load_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.path = path;
    desc.backend = qwen3_cuda_backend();
    desc.devices = ranks_devices;
    desc.n_devices = n;
    return desc;
}

static int ranks_fixture(fixture *f, const char *name, int n) {
    char path[1024], err[512] = "";
    qwen3_load_desc desc;
    memset(f, 0, sizeof *f);
    model_path(path, sizeof path, name, "reference.ref");
    if (!ref_open(&f->ref, path)) return 0;
    model_path(path, sizeof path, name, "");
    desc = ranks_load(path, n);
    if (!CHECK_MSG(qwen3_load(&f->model, &desc, err, sizeof err) == QWEN3_OK, "%s, %d devices: %s", name, n, err)) {
        ref_close(&f->ref);
        return 0;
    }
    f->info = qwen3_get_info(f->model);
    return 1;
}

/* Logits of all prompts, many rows and few at a time; key/value heads divided, and fewer than devices. */
static void test_ranks_models(void) {
    static const struct { const char *name; int n; } cases[] = {
        {"chat", 4}, {"chat", 2}, {"theta", 2}, {"plain", 2}, {"experts8", 2}
    };
    int i, chunk;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++)
        for (chunk = 0; chunk <= 8; chunk += 8) {
            const qwen3_ctx_desc desc = ctx_desc(256, 1, chunk, QWEN3_KV_F32);
            cuda_distance d;
            fixture f;
            if (cases[i].n > ranks_present || !ranks_fixture(&f, cases[i].name, cases[i].n)) continue;
            d = cuda_distance_of(&f, &desc);
            if (test_verbose) printf("    %-10s %d devices, chunks of %d: worst %.2e, KL %.2e\n", cases[i].name, cases[i].n, chunk, d.worst, d.kl);
            CHECK_MSG(d.worst <= (chunk ? 2e-4 : 1e-2), "%s, %d devices, chunks of %d: %.3g", cases[i].name, cases[i].n, chunk, d.worst);
            fixture_close(&f);
        }
}

/* Many rows of which the last is wanted: the same as by few rows, whose sums go another way, and twice the same bits. */
static void test_ranks_many(void) {
    static const char *const names[] = {"chat", "plain", "theta"};
    static const int chunks[] = {0, 0, 5};
    int i, k;
    for (i = 0; i < (int)(sizeof names / sizeof *names); i++) {
        const int n = test_ranks_on_cpu ? 99 : 1500;
        float *logits[3];
        qwen3_token *prompt = (qwen3_token *)malloc((size_t)n * sizeof *prompt);
        fixture f;
        if (!prompt || !ranks_fixture(&f, names[i], 2)) { free(prompt); return; }
        for (k = 0; k < 3; k++) {
            qwen3_ctx_desc desc = ctx_desc(n + 8, 1, chunks[k] ? chunks[k] : n, QWEN3_KV_F16);
            qwen3_ctx *ctx;
            uint64_t seed = 5;
            desc.yarn_factor = 4;
            ctx = ctx_open_desc(f.model, &desc);
            logits[k] = floats((size_t)f.info.n_vocab);
            random_tokens(&seed, prompt, n, f.info.n_vocab);
            if (ctx) CHECK_OK(ctx, eval(ctx, 0, prompt, n, NULL));
            if (ctx && CHECK(qwen3_logits(ctx, 0) != NULL))
                memcpy(logits[k], qwen3_logits(ctx, 0), (size_t)f.info.n_vocab * sizeof(float));
            qwen3_ctx_free(ctx);
        }
        CHECK_MSG(memcmp(logits[0], logits[1], (size_t)f.info.n_vocab * sizeof(float)) == 0, "%s: other bits in the second run", names[i]);
        CHECK_MSG(parity_error(logits[0], logits[2], 1, f.info.n_vocab) <= 1e-2, "%s: of many rows logits differ by %.3g", names[i],
                  parity_error(logits[0], logits[2], 1, f.info.n_vocab));
        for (k = 0; k < 3; k++) free(logits[k]);
        free(prompt);
        fixture_close(&f);
    }
}

/* The devices choose what the host chooses, one sequence or several. */
static void test_ranks_next(void) {
    qwen3_sampler s[3];
    fixture f;
    int i;
    if (!ranks_fixture(&f, "chat", 2)) return;
    for (i = 0; i < 3; i++) s[i] = qwen3_sampler_preset(i == 0 ? QWEN3_GREEDY : i == 1 ? QWEN3_THINKING : QWEN3_NON_THINKING, (uint64_t)i);
    s[2].repeat_penalty = 1.3f;
    for (i = 0; i < 3; i++) cuda_check_next(&f, &s[i], LAB_FUSED);
    fixture_close(&f);
}


/* A state goes to one device, to the CPU, and back; a copy of a sequence goes on alike. */
static void test_ranks_states(void) {
    fixture two, one, cpu;
    qwen3_ctx *a, *b, *c;
    if (!ranks_fixture(&two, "chat", 2)) return;
    if (!cuda_fixture(&one, "chat")) { fixture_close(&two); return; }
    if (!fixture_open(&cpu, "chat")) { fixture_close(&two); fixture_close(&one); return; }
    a = cuda_prompted(&two, 2, LAB_FUSED, 41);
    b = ctx_open(one.model, 160, 1, 0, QWEN3_KV_F16);
    c = ctx_open(cpu.model, 160, 1, 0, QWEN3_KV_F16);
    if (a && b && c) {
        const uint64_t size = state_size(a, 0);
        void *state = malloc((size_t)size), *back = malloc((size_t)size);
        qwen3_token t[4] = {-1, -2, -3, -4};
        int i;
        CHECK_OK(a, state_save(a, 0, state, size, NULL));
        CHECK_OK(b, state_load(b, 0, state, size));
        CHECK_OK(c, state_load(c, 0, state, size));
        CHECK_OK(b, state_save(b, 0, back, size, NULL));
        CHECK(memcmp(state, back, (size_t)size) == 0);
        CHECK_OK(a, state_load(a, 1, back, size));
        for (i = 0; i < 6; i++) {
            CHECK(qwen3_next(a, 0, NULL, &t[0]) >= 0 && qwen3_next(a, 1, NULL, &t[1]) >= 0 && qwen3_next(b, 0, NULL, &t[2]) >= 0 &&
                  qwen3_next(c, 0, NULL, &t[3]) >= 0);
            CHECK_MSG(t[0] == t[1] && t[0] == t[2] && t[0] == t[3], "token %d: %d, copied %d, one device %d, CPU %d", i, t[0], t[1], t[2], t[3]);
        }
        CHECK_OK(a, qwen3_seq_copy(a, 1, 0));
        CHECK(same_logits(a, 1, qwen3_logits(a, 0), 0) && qwen3_next(a, 0, NULL, &t[0]) >= 0 && qwen3_next(a, 1, NULL, &t[1]) >= 0 && t[0] == t[1]);
        free(state);
        free(back);
    }
    qwen3_ctx_free(a); qwen3_ctx_free(b); qwen3_ctx_free(c);
    fixture_close(&two); fixture_close(&one); fixture_close(&cpu);
}

static void ranks_refused(qwen3_load_desc desc, qwen3_result want, const char *says) {
    char err[512] = "";
    qwen3_model *model = NULL;
    CHECK(qwen3_load(&model, &desc, err, sizeof err) == want && !model);
    CHECK_MSG(strstr(err, says) != NULL, "'%s' does not say '%s'", err, says);
}

static void test_ranks_grammar(void) {
    grammar_bench b;
    memset(&b, 0, sizeof b);
    if (!ranks_fixture(&b.f, "chat", 2)) return;
    cuda_check_grammar(&b, 1);
    grammar_close(&b);
}

/* With guesses the same text, sampler and state as without. */
static void test_ranks_speculation(void) {
    grammar_bench b;
    fixture other;
    memset(&b, 0, sizeof b);
    if (!ranks_fixture(&b.f, "chat", 2)) return;
    if (fixture_open(&other, "chat")) {
        speculate_on_prompts(&b, &other, test_ranks_on_cpu ? 1 : 20);
        fixture_close(&other);
    }
    grammar_close(&b);
}

/* Logits of n tokens, evaluated `chunk` at a time */
static float *ranks_logits(const qwen3_load_desc *d, const char *name, const qwen3_token *tokens, int n, int chunk, int *n_vocab) {
    qwen3_model *model = NULL;
    qwen3_ctx *ctx;
    float *logits;
    char err[512] = "";
    if (!CHECK_MSG(qwen3_load(&model, d, err, sizeof err) == QWEN3_OK, "%s, %d devices: %s", name, d->n_devices, err)) return NULL;
    *n_vocab = qwen3_get_info(model).n_vocab;
    logits = floats((size_t)n * (size_t)*n_vocab);
    ctx = ctx_open(model, 32, 1, chunk, QWEN3_KV_F32);
    if (ctx) CHECK_OK(ctx, eval(ctx, 0, tokens, n, logits));
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return logits;
}

/* A model that several devices have, beside one: tokens one at a time, which differ by up to `bound`, and all at once */
static void ranks_compare(qwen3_load_desc d, const char *name, double bound) {
    enum { TOKENS = 7 };
    static const int chunks[] = {1, TOKENS};
    const int n = d.n_devices;
    qwen3_token tokens[TOKENS];
    uint64_t rng = 3;
    int k, n_vocab = 0;
    random_tokens(&rng, tokens, TOKENS, 64);
    for (k = 0; k < 2; k++) {
        float *one, *all;
        double e = 1;
        d.n_devices = 1;
        one = ranks_logits(&d, name, tokens, TOKENS, chunks[k], &n_vocab);
        d.n_devices = n;
        all = ranks_logits(&d, name, tokens, TOKENS, chunks[k], &n_vocab);
        if (one && all) e = experts_off(all, one, TOKENS * n_vocab);
        if (test_verbose) printf("    %-24s %d devices, chunks of %d: %.2e\n", name, n, chunks[k], e);
        CHECK_MSG(e <= (k == 0 ? bound : 2e-3), "%s, %d devices, chunks of %d: off by %.3g", name, n, chunks[k], e);
        free(one); free(all);
    }
}

/* Experts in blocks of each format that can be divided. Of seven blocks one device has four. */
static void test_ranks_formats(void) {
    static const odd_shape odd = {64, 224, 64, 7, 3, 40};
    int type;
    for (type = QWEN3I_Q8_0; type <= QWEN3I_N_TYPES; type++) {
        const int seven = type == QWEN3I_N_TYPES;
        const qwen3i_format *format = qwen3i_format_of(seven ? QWEN3I_Q8_0 : (qwen3i_type)type);
        qwen3_load_desc d = ranks_load(NULL, 2);
        experts_model x;
        qwen3_file file;
        if (format->gguf < 0) continue;
        if (seven) experts_odd(&x, odd, QWEN3I_BF16, 0, NULL);
        else experts_of_type(&x, (qwen3i_type)type, 0);
        file.name = "m.gguf"; file.data = x.bytes.p; file.size = x.bytes.n;
        d.files = &file; d.n_files = 1; d.quantize = seven ? QWEN3_Q8_0 : 0;
        if (format->elements > EX_FF / 2) ranks_refused(d, QWEN3_ERR_UNSUPPORTED, "rows of 256 in blocks of 256 cannot be divided among 2 devices");
        else ranks_compare(d, seven ? "seven blocks" : format->name, 2e-3);
        experts_free(&x);
    }
}

/* A quantised directory on several devices */
static void ranks_packed(const packed_shape *shape, int scheme, int n, const char *refused) {
    const packed_scheme *s = &packed_schemes[scheme];
    tiny_text weights = packed_weights(s, shape, 0);
    packed_files p;
    char name[64];
    packed_files_make(&p, shape, s->config, &weights);
    p.desc.backend = qwen3_cuda_backend();
    p.desc.devices = ranks_devices;
    p.desc.n_devices = n;
    snprintf(name, sizeof name, "scheme %d, %d wide%s", scheme, shape->ff, shape->experts ? ", experts" : "");
    if (refused) ranks_refused(p.desc, QWEN3_ERR_UNSUPPORTED, refused);
    else ranks_compare(p.desc, name, packed_is_fp8(s) ? 2e-6 : 2e-3);    /* one row of x is not rounded beside FP8 */
    free(p.config.p);
    free(weights.p);
}

/* An MLP whose last block is not full: of 336 rows in blocks of 128 two devices have 128 and 208. Three blocks cannot be divided
   among four. */
static void test_ranks_half_blocks(void) {
    static const packed_shape shape = {256, 4, 4, 64, 336, 64, "model.", 0}, experts = {256, 4, 1, 64, 336, 64, "model.", 8};
    int i;
    for (i = 0; i < QWEN3I_COUNT(packed_schemes) && packed_is_fp8(&packed_schemes[i]); i++) ranks_packed(&shape, i, 2, NULL);
    ranks_packed(&experts, 0, 2, NULL);
    if (ranks_present >= 4) ranks_packed(&shape, 0, 4, "rows of 336 in blocks of 128 cannot be divided among 4 devices");
}

/* Quantised directories among three: half a block is the last one's; four groups of 128, in blocks of 32, are 5, 5 and 6. */
static void test_ranks_three(void) {
    static const packed_shape half = {256, 6, 6, 64, 336, 66, "model.", 0}, groups = {256, 6, 3, 64, 512, 66, "model.", 0};
    static const int schemes[] = {0, 3, 4, 6, 7, 8, 15};        /* each format and size of a group */
    int i;
    for (i = 0; ranks_present >= 3 && i < QWEN3I_COUNT(schemes); i++)
        ranks_packed(packed_is_fp8(&packed_schemes[schemes[i]]) ? &half : &groups, schemes[i], 3, NULL);
}

/* Quantised while they are loaded: three blocks; two and a half, which stay BF16; and widened again. */
static void test_ranks_quantised(void) {
    static const struct { const char *name; int quantize, flags; } cases[] = {
        {"chat", QWEN3_Q8_0, 0}, {"sharded", QWEN3_Q8_0, 0}, {"chat", QWEN3_Q8_0, QWEN3_LOAD_UNPACK}
    };
    int i;
    for (i = 0; i < QWEN3I_COUNT(cases); i++) {
        char path[1024];
        qwen3_load_desc d;
        model_path(path, sizeof path, cases[i].name, "");
        d = ranks_load(path, 2);
        d.quantize = cases[i].quantize;
        d.flags = cases[i].flags;
        ranks_compare(d, cases[i].name, 2e-3);
    }
}

/* Cancelling is asked for between steps, and what was evaluated stays. */
static void test_ranks_cancel(void) {
    qwen3_ctx_desc desc = ctx_desc(200, 1, 20, QWEN3_KV_F16);
    qwen3_token prompt[100], t, whole = -1;
    uint64_t seed = 6;
    int left = 1 << 30, polls, before = -1;
    qwen3_ctx *ctx;
    fixture f;
    if (!ranks_fixture(&f, "plain", 2)) return;
    desc.cancel = cuda_cancel_after;
    desc.cancel_user = &left;
    ctx = ctx_open_desc(f.model, &desc);
    random_tokens(&seed, prompt, 100, f.info.n_vocab);
    for (polls = 0; ctx && polls < 5; polls++) {
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 0));
        left = polls;
        CHECK(eval(ctx, 0, prompt, 100, NULL) == QWEN3_STOPPED);
        CHECK_MSG(seq_len(ctx, 0) > before, "after %d polls %d tokens are there", polls, seq_len(ctx, 0));
        before = seq_len(ctx, 0);
        left = 1 << 30;
        CHECK_OK(ctx, eval(ctx, 0, prompt + seq_len(ctx, 0), 100 - seq_len(ctx, 0), NULL));
        CHECK_OK(ctx, qwen3_next(ctx, 0, NULL, &t));
        if (polls == 0) whole = t;
        CHECK_MSG(t == whole, "after %d polls the next token is %d, not %d", polls, (int)t, (int)whole);
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* Loading goes on from device to device, never back, and says how many there are. */
static int ranks_progress(float done, void *before) {
    CHECK_MSG(done >= *(float *)before, "from %g back to %g", (double)*(float *)before, (double)done);
    *(float *)before = done;
    return 0;
}

static void test_ranks_loading(void) {
    char path[1024], err[512] = "";
    model_path(path, sizeof path, "chat", "");
    for (int n = 1; n <= 2; n++) {
        qwen3_load_desc desc = ranks_load(path, n);
        qwen3_model *model = NULL;
        float done = 0;
        desc.progress = ranks_progress;
        desc.progress_user = &done;
        CHECK_MSG(qwen3_load(&model, &desc, err, sizeof err) == QWEN3_OK, "%s", err);
        CHECK(done == 1.0f && model && (n == 1 || strncmp(qwen3_get_info(model).device_name, "2 x ", 4) == 0));
        qwen3_free(model);
    }
}

static void test_ranks_refuses(void) {
    char path[1024];
    qwen3_load_desc d;
    model_path(path, sizeof path, "chat", "");
    d = ranks_load(path, 3);
    ranks_refused(d, QWEN3_ERR_UNSUPPORTED, "4 heads cannot be divided among 3 devices");
    d.n_devices = -1;
    ranks_refused(d, QWEN3_ERR_ARG, "n_devices is -1");
    d.n_devices = 2; d.devices = NULL;
    ranks_refused(d, QWEN3_ERR_ARG, "devices is NULL");
    d = ranks_load(path, 2);
    d.backend = NULL;
    ranks_refused(d, QWEN3_ERR_UNSUPPORTED, "the cpu backend runs on one device");
    d = ranks_load(path, 0);
    d.n_ranks = 2; d.rank = 2;
    ranks_refused(d, QWEN3_ERR_ARG, "rank is 2 of 2");
    d.rank = 1;
    ranks_refused(d, QWEN3_ERR_ARG, "nccl_id is NULL");
    d.nccl_id = path; d.n_devices = 2;
    ranks_refused(d, QWEN3_ERR_ARG, "one of several ranks has one device");
}

#ifdef QWEN3_TEST_CUDA_ON_CPU
/* For one of two processes, each with its device */
static qwen3_load_desc ranks_load_one(const char *path, int rank, const void *id) {
    qwen3_load_desc d = ranks_load(path, 0);
    d.device = d.rank = rank;
    d.n_ranks = 2;
    d.nccl_id = id;
    return d;
}

/* Two ranks that are processes of their own, but for the test: the same calls, the same choices. */
typedef struct ranks_process {
    int rank, polls;                    /* the caller of rank 1 cancels once, both stop */
    qwen3_token tokens[12];
    qwen3_result result, stopped;
    char err[256];
    void *state; uint64_t size;
} ranks_process;

static int ranks_cancel_once(void *process) {
    ranks_process *p = (ranks_process *)process;
    return p->rank == 1 && p->polls++ == 0;
}

static void *ranks_main(void *arg) {
    static const char id[128] = {7};
    ranks_process *p = (ranks_process *)arg;
    qwen3_ctx_desc desc = ctx_desc(100, 1, 0, QWEN3_KV_F16);
    qwen3_model *model = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_token prompt[30];
    uint64_t seed = 3;
    char path[1024];
    qwen3_load_desc load;
    int i;
    model_path(path, sizeof path, "chat", "");
    load = ranks_load_one(path, p->rank, id);
    desc.cancel = ranks_cancel_once;
    desc.cancel_user = p;
    p->result = qwen3_load(&model, &load, p->err, sizeof p->err);
    if (p->result == QWEN3_OK) p->result = qwen3_ctx_create(&ctx, model, &desc, p->err, sizeof p->err);
    random_tokens(&seed, prompt, 30, 300);
    if (p->result == QWEN3_OK) p->stopped = eval(ctx, 0, prompt, 30, NULL);
    if (p->result == QWEN3_OK) p->result = eval(ctx, 0, prompt, 30, NULL);
    if (p->result == QWEN3_OK) {
        p->size = state_size(ctx, 0);
        p->state = malloc((size_t)p->size);
        p->result = state_save(ctx, 0, p->state, p->size, NULL);
        if (p->result == QWEN3_OK) p->result = state_load(ctx, 0, p->state, p->size);
    }
    for (i = 0; i < 12 && p->result == QWEN3_OK; i++) p->result = qwen3_next(ctx, 0, NULL, &p->tokens[i]);
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return NULL;
}

static void test_ranks_processes(void) {
    ranks_process p[2];
    pthread_t thread;
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token prompt[30], t;
    uint64_t seed = 3;
    int i;
    memset(p, 0, sizeof p);
    p[1].rank = 1;
    if (!CHECK(pthread_create(&thread, NULL, ranks_main, &p[1]) == 0)) return;
    ranks_main(&p[0]);
    pthread_join(thread, NULL);
    for (i = 0; i < 2; i++) {
        CHECK_MSG(p[i].result == QWEN3_OK, "rank %d: %s", i, p[i].err);
        CHECK_MSG(p[i].stopped == QWEN3_STOPPED, "rank %d was not stopped: %d", i, (int)p[i].stopped);
    }
    CHECK(memcmp(p[0].tokens, p[1].tokens, sizeof p[0].tokens) == 0);
    CHECK(p[0].size == p[1].size && p[0].state && p[1].state && memcmp(p[0].state, p[1].state, (size_t)p[0].size) == 0);
    if (!ranks_fixture(&f, "chat", 2)) return;
    ctx = ctx_open(f.model, 100, 1, 0, QWEN3_KV_F16);
    random_tokens(&seed, prompt, 30, 300);
    if (ctx && p[0].state) CHECK_OK(ctx, state_load(ctx, 0, p[0].state, p[0].size));
    for (i = 0; ctx && i < 12; i++) {
        CHECK_OK(ctx, qwen3_next(ctx, 0, NULL, &t));
        CHECK_MSG(t == p[0].tokens[i], "token %d: %d, in one process %d", i, (int)p[0].tokens[i], (int)t);
    }
    free(p[0].state);
    free(p[1].state);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* A rank that is gone, without a word: whatever call the other is in ends with an error that names it, and releasing does not wait
   either. Its device is stuck meanwhile: to synchronise with it, before the sum is given up, would abort. */
typedef struct ranks_lonely { int rank, steps; qwen3_model *model; qwen3_ctx *ctx; } ranks_lonely;

static int ranks_go_on(void *nothing) { (void)nothing; return 0; }

static void *ranks_steps(void *arg) {
    static const char id[128] = {9};
    ranks_lonely *p = (ranks_lonely *)arg;
    qwen3_ctx_desc desc = ctx_desc(100, 2, 0, QWEN3_KV_F16);
    qwen3_load_desc load;
    qwen3_token prompt[30], t;
    char path[1024], err[256] = "";
    uint64_t seed = 3;
    int i;
    model_path(path, sizeof path, "plain", "");
    load = ranks_load_one(path, p->rank, id);
    if (p->steps == 0) desc.cancel = ranks_go_on;       /* which is a meeting, too */
    random_tokens(&seed, prompt, 30, 200);
    CHECK_MSG(qwen3_load(&p->model, &load, err, sizeof err) == QWEN3_OK, "%s", err);
    if (p->model) CHECK_MSG(qwen3_ctx_create(&p->ctx, p->model, &desc, err, sizeof err) == QWEN3_OK, "%s", err);
    for (i = 0; p->ctx && i < p->steps; i++) {
        if (i == 0) CHECK_OK(p->ctx, eval(p->ctx, 0, prompt, 30, NULL));
        else CHECK_OK(p->ctx, qwen3_next(p->ctx, 0, NULL, &t));
    }
    if (p->rank == 1) cuda_on_cpu_leave(1);
    return NULL;
}

static void test_ranks_lost(void) {
    static const char *const calls[] = {"eval", "next", "logits", "save", "free"};
    const long live = cuda_on_cpu_live(), blocks = heap_default.live;
    int way, i;
    for (way = 0; way < QWEN3I_COUNT(calls); way++) {
        const char *says = "rank 0 of 2: rank 1 does not answer";
        ranks_lonely p[2];
        pthread_t thread;
        qwen3_result r = QWEN3_OK;
        qwen3_token t;
        memset(p, 0, sizeof p);
        p[1].rank = 1;
        p[0].steps = p[1].steps = way == 0 ? 0 : 2;
        if (!CHECK(pthread_create(&thread, NULL, ranks_steps, &p[1]) == 0)) return;
        ranks_steps(&p[0]);
        pthread_join(thread, NULL);
        if (!CHECK(p[0].ctx && p[1].ctx)) return;
        t = 5;
        if (way == 0) r = eval(p[0].ctx, 0, &t, 1, NULL);
        for (i = 0; way > 0 && r >= 0 && i < (way == 1 ? 9 : 1); i++) r = qwen3_next(p[0].ctx, 0, NULL, &t);
        if (way > 1) CHECK_MSG(r >= 0, "%s: %s", calls[way], qwen3_ctx_error(p[0].ctx));
        if (way == 2) CHECK(!qwen3_logits(p[0].ctx, 0));
        if (way == 3) {
            const uint64_t size = state_size(p[0].ctx, 0);
            void *state = malloc((size_t)size);
            r = state_save(p[0].ctx, 0, state, size, NULL);
            free(state);
        }
        if (way < 2 || way == 3) CHECK_MSG(r == QWEN3_ERR_DEVICE, "%s: %d", calls[way], (int)r);
        t = 5;
        if (way < 4) {
            CHECK_MSG(strstr(qwen3_ctx_error(p[0].ctx), says) != NULL, "%s: '%s'", calls[way], qwen3_ctx_error(p[0].ctx));
            CHECK(eval(p[0].ctx, 1, &t, 1, NULL) == QWEN3_ERR_DEVICE);  /* at once: nothing can be done with it any more */
        }
        qwen3_ctx_free(p[0].ctx);
        qwen3_free(p[0].model);
        cuda_on_cpu_leave(-1);
        if (way == 1) {                 /* and who is told that the other has given up */
            CHECK(eval(p[1].ctx, 1, &t, 1, NULL) == QWEN3_ERR_DEVICE);
            CHECK_MSG(strstr(qwen3_ctx_error(p[1].ctx), "rank 1 of 2: rank 0 has failed") != NULL, "'%s'", qwen3_ctx_error(p[1].ctx));
        }
        qwen3_ctx_free(p[1].ctx);
        qwen3_free(p[1].model);
        CHECK(cuda_on_cpu_live() == live && heap_default.live == blocks);
    }
}

/* Every seventh call of CUDA or NCCL fails once: an error on all ranks, nobody waits for ever, everything is released. */
static qwen3_result ranks_whole_run(const char *path) {
    qwen3_ctx_desc desc = ctx_desc(64, 2, 32, QWEN3_KV_F16);
    qwen3_load_desc load = ranks_load(path, 2);
    qwen3_model *model = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_token prompt[34], t;
    char err[256] = "";
    int i;
    qwen3_result r = qwen3_load(&model, &load, err, sizeof err);
    for (i = 0; i < 34; i++) prompt[i] = 3 + i;
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, &desc, err, sizeof err);
    if (r == QWEN3_OK) r = eval(ctx, 0, prompt, 34, NULL);
    for (i = 0; i < 3 && r == QWEN3_OK; i++) r = qwen3_next(ctx, 0, NULL, &t);
    if (ctx) {                          /* which says why, whichever device it was */
        CHECK((r >= 0) == (qwen3_ctx_error(ctx)[0] == '\0'));
        CHECK_MSG(!strstr(qwen3_ctx_error(ctx), "rank 0 of 2") && !strstr(qwen3_ctx_error(ctx), "rank 1 of 2"), "'%s'", qwen3_ctx_error(ctx));
    }
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return r;
}

static void test_ranks_faults(void) {
    const long live = heap_default.live;
    char path[1024];
    long n, total;
    model_path(path, sizeof path, "theta", "");
    cuda_on_cpu_fail(0);
    CHECK(ranks_whole_run(path) >= 0);
    total = cuda_on_cpu_calls();
    for (n = 1; n <= total; n += 7) {
        qwen3_result r;
        cuda_on_cpu_fail(n);
        r = ranks_whole_run(path);
        CHECK_MSG(r < 0 || n > total - 200, "call %ld failed, and nobody noticed", n);
        CHECK_MSG(cuda_on_cpu_live() == 0 && heap_default.live == live, "call %ld failed: %ld device objects, %ld blocks are left", n,
                  cuda_on_cpu_live(), heap_default.live - live);
    }
    cuda_on_cpu_fail(0);
}
#endif

static void suite_ranks(void) {
    char path[1024], err[512] = "";
    qwen3_load_desc desc;
    qwen3_model *model = NULL;
    cuda_on_cpu_devices(4);
    model_path(path, sizeof path, "plain", "");
    for (ranks_present = 4; ranks_present > 1; ranks_present -= 2) {
        desc = ranks_load(path, ranks_present);
        if (qwen3_load(&model, &desc, err, sizeof err) == QWEN3_OK) break;
    }
    if (ranks_present < 2) { test_skip("test_ranks", err); return; }
    qwen3_free(model);
    RUN(test_ranks_models);
    RUN(test_ranks_many);
    RUN(test_ranks_next);
    RUN(test_ranks_states);
    RUN(test_ranks_grammar);
    RUN(test_ranks_speculation);
    RUN(test_ranks_formats);
    RUN(test_ranks_half_blocks);
    RUN(test_ranks_three);
    RUN(test_ranks_quantised);
    RUN(test_ranks_cancel);
    RUN(test_ranks_loading);
    RUN(test_ranks_refuses);
#ifdef QWEN3_TEST_CUDA_ON_CPU
    RUN(test_ranks_processes);
    RUN(test_ranks_lost);
    RUN(test_ranks_faults);
    cuda_on_cpu_devices(1);
#endif
}
#endif
