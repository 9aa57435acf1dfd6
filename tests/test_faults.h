/* Everything that can fail from outside fails here, at every place: memory, reading, and the caller's wish
   to stop. Each time there is an error, nothing leaks, and what was there before still works. */
#ifndef QWEN3_TESTS_TEST_FAULTS_H
#define QWEN3_TESTS_TEST_FAULTS_H
#include "fixture.h"

#define FAULT_LIMIT 20000       /* a run that still fails then never ends */

static const char *const fault_models[] = {"chat", "sharded", "odd"};

static void check_heap_empty(const test_heap *h, const char *what, long at) {
    CHECK_MSG(h->live == 0 && h->bytes == 0, "%s: %ld blocks leak when allocation %ld fails", what, h->live, at);
    CHECK_MSG(h->bad == 0, "%s: %ld wrong frees when allocation %ld fails", what, h->bad, at);
}

/* ---- memory ------------------------------------------------------------------------------------------- */
/* A model from its directory, from memory, or through callbacks, with the N-th allocation failing. */
static void fault_load(const char *name, const qwen3_load_desc *from, int by_hook) {
    test_heap hook, *h = by_hook ? &hook : &heap_default;
    long at, live = heap_default.live;
    qwen3_load_desc d = *from;
    for (at = 1; at < FAULT_LIMIT; at++) {
        qwen3_model *m = (qwen3_model *)&hook;
        char err[256] = "";
        qwen3_result r;
        if (by_hook) d.allocator = heap_allocator(&hook);
        h->calls = h->failed = 0;
        h->fail_at = at;
        r = qwen3_load(&m, &d, err, sizeof err);
        h->fail_at = 0;
        if (!h->failed) {
            CHECK_MSG(r == QWEN3_OK && at > 3, "%s: %s: %s", name, qwen3_result_string(r), err);
            qwen3_free(m);
            if (by_hook) check_heap_empty(h, name, 0);
            break;
        }
        CHECK_MSG(r == QWEN3_ERR_MEMORY && m == NULL && err[0], "%s: allocation %ld failed, but: %s '%s'", name, at,
                  qwen3_result_string(r), err);
        if (by_hook) check_heap_empty(h, name, at);
        CHECK_MSG(heap_default.live == live, "%s: allocation %ld: the hook was not used, or a leak", name, at);
        if (test_bad > 5) break;
    }
    CHECK(at < FAULT_LIMIT);
}

static void test_fault_memory_load(void) {
    int i;
    for (i = 0; i < 3; i++) {
        load_io io;
        qwen3_load_desc d;
        char path[1024];
        memset(&io, 0, sizeof io);
        if (!model_files_read(&io.files, fault_models[i])) return;
        d = load_desc_io(&io);
        fault_load(fault_models[i], &d, 1);
        memset(&d, 0, sizeof d);
        model_path(path, sizeof path, fault_models[i], "");
        d.path = path;
        fault_load(fault_models[i], &d, 1);
        fault_load(fault_models[i], &d, 0);
        d.flags = QWEN3_LOAD_NO_MMAP;
        fault_load(fault_models[i], &d, 1);
        model_files_free(&io.files);
    }
}

static void test_fault_memory_context(void) {
    fixture f;
    long at, n_threads;
    if (!fixture_open(&f, "plain")) return;
    for (n_threads = 1; n_threads <= 3; n_threads += 2) for (at = 1; at < FAULT_LIMIT; at++) {
        test_heap h;
        qwen3_ctx_desc d = ctx_desc(64, 2, 0, QWEN3_KV_F16);
        qwen3_ctx *ctx = (qwen3_ctx *)&h;
        char err[256] = "";
        qwen3_result r;
        d.threads = (int)n_threads;
        d.allocator = heap_allocator(&h);
        h.fail_at = at;
        r = qwen3_ctx_create(&ctx, f.model, &d, err, sizeof err);
        if (!h.failed) {
            CHECK_MSG(r == QWEN3_OK, "%s", err);
            qwen3_ctx_free(ctx);
            check_heap_empty(&h, "context", 0);
            break;
        }
        CHECK_MSG(r == QWEN3_ERR_MEMORY && ctx == NULL && err[0], "allocation %ld failed, but: %s '%s'", at,
                  qwen3_result_string(r), err);
        check_heap_empty(&h, "context", at);
    }
    fixture_close(&f);
}

/* What a context does, one step at a time, so that the N-th allocation can fail in each. */
typedef struct fault_world {
    fixture f;
    qwen3_ctx *ctx;
    test_heap heap;
    qwen3_token prompt[64];
    int n_prompt;
    float *plain;               /* logits of the prompt, [n_prompt, n_vocab] */
    unsigned char *state;
    uint64_t state_size;
    float *vector;
} fault_world;

static const char long_text[] = "The quick brown fox jumps over the lazy dog. \xC3\x84pfel, 12345 \xF0\x9F\x98\x80 and "
    "e\xCC\x81" "e\xCC\x81" "e\xCC\x81 yes no yes no the capital of France is Paris <|im_end|> the the the the the the";

static int fault_encode(fault_world *w) {
    qwen3_token out[256];
    int a = qwen3_encode(w->f.model, long_text, sizeof long_text - 1, 0, out, 256, NULL, 0);
    if (a < 0) return a;
    return qwen3_encode(w->f.model, long_text, sizeof long_text - 1, QWEN3_PARSE_SPECIAL, out, 256, NULL, 0);
}

static const char *const fault_tools[] = {
    "{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {}}}"
};

static void fault_chat_desc(qwen3_chat_desc *chat, qwen3_msg msgs[4], qwen3_tool_call *call) {
    memset(chat, 0, sizeof *chat);
    memset(msgs, 0, 4 * sizeof *msgs);
    msgs[0].role = QWEN3_SYSTEM;    msgs[0].text = "yes";
    msgs[1].role = QWEN3_USER;      msgs[1].text = "the \xC3\xA9 fox";
    msgs[2].role = QWEN3_ASSISTANT; msgs[2].text = "<think>\nthe\n</think>\n\nno"; msgs[2].calls = call;
    msgs[2].n_calls = 1;
    msgs[3].role = QWEN3_TOOL;      msgs[3].text = "42";
    call->name = "f";
    call->arguments = "{\"a\": 1}";
    chat->msgs = msgs;
    chat->n_msgs = 4;
    chat->tools = fault_tools;
    chat->n_tools = 1;
}

static int fault_render(fault_world *w) {
    qwen3_msg msgs[4];
    qwen3_tool_call call;
    qwen3_chat_desc chat;
    qwen3_token out[512];
    fault_chat_desc(&chat, msgs, &call);
    return qwen3_chat_render(w->f.model, &chat, out, 512, NULL, 0);
}

static int fault_chat(fault_world *w) {
    qwen3_msg msgs[4];
    qwen3_tool_call call;
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    int r;
    static const char *const stop[] = {"abc", "xyz"};
    memset(&gen, 0, sizeof gen);
    gen.max_tokens = 2;
    gen.stop = stop;
    gen.n_stop = 2;
    fault_chat_desc(&chat, msgs, &call);
    r = qwen3_chat(w->ctx, 1, &chat, &gen);
    return r == QWEN3_END ? QWEN3_OK : r;
}

static int fault_save(fault_world *w) { return state_save(w->ctx, 0, w->state, w->state_size, NULL); }
static int fault_restore(fault_world *w) { return state_load(w->ctx, 1, w->state, w->state_size); }
static int fault_sync(fault_world *w) {
    const int left = qwen3_sync(w->ctx, 1, w->prompt, w->n_prompt, 0);
    return left > 0 ? QWEN3_STOPPED : left;
}
static int fault_copy(fault_world *w) { return qwen3_seq_copy(w->ctx, 1, 0); }
static int fault_next(fault_world *w) {
    qwen3_token t;
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_THINKING, 1);
    int r = qwen3_next(w->ctx, 1, &s, &t);
    return r == QWEN3_END ? QWEN3_OK : r;
}
static int fault_embed(fault_world *w) { return qwen3_embed(w->ctx, 1, "find it", long_text, w->vector); }
static int fault_rerank(fault_world *w) {
    float score;
    return qwen3_rerank(w->ctx, 1, NULL, "the fox", long_text, &score);
}

static int fault_world_open(fault_world *w, test_heap *model_heap) {
    qwen3_load_desc d;
    qwen3_ctx_desc c = ctx_desc(512, 2, 16, QWEN3_KV_F16);
    char path[1024];
    uint64_t seed = 3;
    memset(w, 0, sizeof *w);
    if (!fixture_open(&w->f, "chat")) return 0;
    qwen3_free(w->f.model);                             /* load again, with the counting heap */
    memset(&d, 0, sizeof d);
    model_path(path, sizeof path, "chat", "");
    d.path = path;
    d.allocator = heap_allocator(model_heap);
    if (!CHECK(qwen3_load(&w->f.model, &d, NULL, 0) == QWEN3_OK)) return 0;
    w->n_prompt = 40;
    random_tokens(&seed, w->prompt, w->n_prompt, w->f.info.n_tokens);
    w->plain = plain_logits(w->f.model, w->prompt, w->n_prompt, QWEN3_KV_F16);
    c.allocator = heap_allocator(&w->heap);
    w->ctx = ctx_open_desc(w->f.model, &c);
    if (!w->ctx || !CHECK_OK(w->ctx, eval(w->ctx, 0, w->prompt, w->n_prompt, NULL))) return 0;
    w->state_size = state_size(w->ctx, 0);
    w->state = (unsigned char *)malloc((size_t)w->state_size);
    w->vector = floats((size_t)w->f.info.n_embd);
    return CHECK_OK(w->ctx, state_save(w->ctx, 0, w->state, w->state_size, NULL));
}

static void fault_world_close(fault_world *w) {
    qwen3_ctx_free(w->ctx);
    fixture_close(&w->f);
    free(w->plain);
    free(w->state);
    free(w->vector);
}

/* The untouched sequence 0, and sequence 1 after a sync, still give the right logits. */
static void check_world(fault_world *w, const char *what, long at) {
    const int vocab = w->f.info.n_vocab;
    const float *last = w->plain + (size_t)(w->n_prompt - 1) * (size_t)vocab;
    CHECK_MSG(seq_len(w->ctx, 0) == w->n_prompt && same_logits(w->ctx, 0, last, vocab),
              "%s, fault %ld: a neighbour has changed", what, at);
    CHECK_MSG(qwen3_sync(w->ctx, 1, w->prompt, w->n_prompt, 0) == QWEN3_OK && same_logits(w->ctx, 1, last, vocab),
              "%s, fault %ld: the context is no longer right: %s", what, at, qwen3_ctx_error(w->ctx));
}

static void test_fault_memory_use(void) {
    static const struct { const char *name; int (*run)(fault_world *); } steps[] = {
        {"encode", fault_encode}, {"render", fault_render}, {"chat", fault_chat}, {"save", fault_save},
        {"restore", fault_restore}, {"sync", fault_sync}, {"copy", fault_copy}, {"next", fault_next},
        {"embed", fault_embed}, {"rerank", fault_rerank}
    };
    test_heap model_heap;
    fault_world w;
    size_t i;
    int which;
    long at;
    if (!fault_world_open(&w, &model_heap)) return;
    for (i = 0; i < sizeof steps / sizeof *steps; i++) for (which = 0; which < 2; which++) {
        test_heap *h = which ? &model_heap : &w.heap;
        for (at = 1; at < FAULT_LIMIT; at++) {
            long model_live = model_heap.live, ctx_live = w.heap.live;
            int r;
            h->calls = h->failed = 0;
            h->fail_at = at;
            r = steps[i].run(&w);
            h->fail_at = 0;
            CHECK_MSG(model_heap.live == model_live && w.heap.live == ctx_live, "%s: a leak when allocation %ld fails",
                      steps[i].name, at);
            if (!h->failed) { CHECK_MSG(r >= 0, "%s: %d %s", steps[i].name, r, qwen3_ctx_error(w.ctx)); break; }
            CHECK_MSG(r == QWEN3_ERR_MEMORY, "%s: allocation %ld failed, but the result is %d", steps[i].name, at, r);
            check_world(&w, steps[i].name, at);
            if (test_bad > 5) break;
        }
        check_world(&w, steps[i].name, 0);
    }
    fault_world_close(&w);
    check_heap_empty(&w.heap, "context", 0);
    check_heap_empty(&model_heap, "model", 0);
}

/* ---- reading ------------------------------------------------------------------------------------------- */
static void test_fault_read(void) {
    int i;
    for (i = 0; i < 3; i++) {
        load_io io;
        qwen3_load_desc d;
        test_heap h;
        long at;
        memset(&io, 0, sizeof io);
        if (!model_files_read(&io.files, fault_models[i])) return;
        for (at = 1; at < FAULT_LIMIT; at++) {
            qwen3_model *m = (qwen3_model *)&h;
            char err[256] = "";
            qwen3_result r;
            d = load_desc_io(&io);
            d.allocator = heap_allocator(&h);
            io.calls = 0;
            io.fail_at = at;
            r = qwen3_load(&m, &d, err, sizeof err);
            if (io.calls < at) { CHECK_MSG(r == QWEN3_OK && at > 2, "%s", err); qwen3_free(m); break; }
            CHECK_MSG(r == QWEN3_ERR_IO && m == NULL && strstr(err, "."), "%s: read %ld failed, but: %s '%s'",
                      fault_models[i], at, qwen3_result_string(r), err);
            check_heap_empty(&h, "read", at);
        }
        model_files_free(&io.files);
    }
}

/* Callbacks that promise more bytes than they can read, or fewer, or absurdly many. */
static const char *lying_name;          /* of this file the size is wrong, */
static int64_t lying_by;                /* by so much, or it is so large */
static int64_t lying_size(void *user, const char *name) {
    int64_t size = load_io_size(user, name);
    if (strcmp(name, lying_name) != 0) return size;
    return lying_by > INT32_MAX ? lying_by : size + lying_by;
}

static void test_fault_lying_sizes(void) {
    static const int64_t by[] = {1, -1, -8, INT64_MAX, (int64_t)1 << 50};
    load_io io;
    int k, i;
    memset(&io, 0, sizeof io);
    if (!model_files_read(&io.files, "chat")) return;
    for (k = 0; k < io.files.n; k++) for (i = 0; i < 5; i++) {
        qwen3_load_desc d = load_desc_io(&io);
        test_heap h;
        qwen3_model *m = (qwen3_model *)&h;
        char err[256] = "";
        qwen3_result r;
        lying_name = io.files.file[k].name;
        lying_by = by[i];
        d.io.size = lying_size;
        d.allocator = heap_allocator(&h);
        r = qwen3_load(&m, &d, err, sizeof err);
        if (by[i] == -1 && r == QWEN3_OK) {     /* a last newline is no loss */
            qwen3_free(m);
            m = NULL;
            r = QWEN3_ERR_FORMAT;
        }
        CHECK_MSG((r == (by[i] == 1 ? QWEN3_ERR_IO : by[i] < 0 ? QWEN3_ERR_FORMAT : QWEN3_ERR_MEMORY)) && !m,
                  "%s, size %lld: %s '%s'", lying_name, (long long)by[i], qwen3_result_string(r), err);
        check_heap_empty(&h, lying_name, i);
    }
    model_files_free(&io.files);
}

/* Files that are shorter or longer than they should be, or absent. */
static void test_fault_sizes(void) {
    int i, k;
    size_t cut;
    for (i = 0; i < 3; i++) {
        model_files files;
        if (!model_files_read(&files, fault_models[i])) return;
        for (k = 0; k < files.n; k++) for (cut = 0; cut < 3; cut++) {
            qwen3_file whole = files.file[k];
            qwen3_load_desc d;
            test_heap h;
            qwen3_model *m = NULL;
            char err[256] = "";
            qwen3_result r;
            memset(&d, 0, sizeof d);
            d.files = files.file;
            d.n_files = files.n;
            d.allocator = heap_allocator(&h);
            files.file[k].size = cut == 0 ? 0 : cut == 1 ? whole.size / 2 : whole.size - 2;
            r = qwen3_load(&m, &d, err, sizeof err);
            CHECK_MSG(r == QWEN3_ERR_FORMAT && !m && err[0], "%s/%s cut to %lu bytes: %s '%s'", fault_models[i],
                      whole.name, (unsigned long)files.file[k].size, qwen3_result_string(r), err);
            check_heap_empty(&h, "cut", (long)cut);
            qwen3_free(m);
            m = NULL;
            files.file[k] = whole;
            files.file[k].name = "absent";
            r = qwen3_load(&m, &d, err, sizeof err);
            if (strcmp(whole.name, "generation_config.json") == 0 || strcmp(whole.name, "tokenizer.json") == 0)
                CHECK_MSG(r == QWEN3_OK, "without %s: %s", whole.name, err);
            else CHECK_MSG(r == QWEN3_ERR_IO && !m, "without %s: %s '%s'", whole.name, qwen3_result_string(r), err);
            qwen3_free(m);
            check_heap_empty(&h, "absent", 0);
            files.file[k] = whole;
        }
        model_files_free(&files);
    }
}

/* ---- stopping ------------------------------------------------------------------------------------------- */
typedef struct stopper { long calls, stop_at; float last; int wrong; } stopper;

static int stop_progress(float done, void *user) {
    stopper *s = (stopper *)user;
    if (!(done >= s->last && done >= 0 && done <= 1)) s->wrong = 1;
    s->last = done;
    return ++s->calls == s->stop_at;
}
static int stop_cancel(void *user) {
    stopper *s = (stopper *)user;
    return ++s->calls == s->stop_at;
}

static void test_fault_cancel_load(void) {
    int i;
    for (i = 0; i < 3; i++) {
        long at;
        char path[1024];
        model_path(path, sizeof path, fault_models[i], "");
        for (at = 1; at < FAULT_LIMIT; at++) {
            qwen3_load_desc d;
            test_heap h;
            stopper s;
            qwen3_model *m = (qwen3_model *)&h;
            qwen3_result r;
            memset(&d, 0, sizeof d);
            memset(&s, 0, sizeof s);
            s.stop_at = at;
            d.path = path;
            d.progress = stop_progress;
            d.progress_user = &s;
            d.allocator = heap_allocator(&h);
            r = qwen3_load(&m, &d, NULL, 0);
            CHECK_MSG(!s.wrong, "progress goes backwards, or is not 0 to 1");
            if (s.calls < at) {
                CHECK_MSG(r == QWEN3_OK && at > 2 && s.last > 0.999f, "%s: progress was called %ld times, last with %g",
                          fault_models[i], s.calls, (double)s.last);
                qwen3_free(m);
                break;
            }
            CHECK_MSG(r == QWEN3_STOPPED && m == NULL, "%s: stopped at call %ld, but: %s", fault_models[i], at,
                      qwen3_result_string(r));
            check_heap_empty(&h, "stopped load", at);
        }
        CHECK(at < FAULT_LIMIT);
    }
}

#ifdef TEST_SYSTEM
/* A model from its directory where mapping fails, the N-th read fails, or both, and where the caller stops then. */
static void fault_path(const char *name, int no_map, int flags) {
    long at;
    char path[1024];
    model_path(path, sizeof path, name, "");
    for (at = 1; at < FAULT_LIMIT; at++) {
        qwen3_load_desc d;
        test_heap h;
        qwen3_model *m = (qwen3_model *)&h;
        char err[256] = "";
        qwen3_result r;
        memset(&d, 0, sizeof d);
        memset(&test_system, 0, sizeof test_system);
        d.path = path;
        d.flags = flags;
        d.allocator = heap_allocator(&h);
        test_system.no_map = no_map;
        test_system.read_fails_at = at;
        r = qwen3_load(&m, &d, err, sizeof err);
        if (test_system.reads < at) {
            CHECK_MSG(r == QWEN3_OK && at > 1, "%s: %s '%s'", name, qwen3_result_string(r), err);
            CHECK_MSG((test_system.maps > 0) == !(flags & QWEN3_LOAD_NO_MMAP), "%s: %ld maps", name, test_system.maps);
            qwen3_free(m);
        } else CHECK_MSG(r == QWEN3_ERR_IO && !m && strstr(err, "."), "%s: read %ld failed, but: %s '%s'", name, at,
                         qwen3_result_string(r), err);
        CHECK_MSG(test_system.live == 0 && !test_system.bad_unmap, "%s, read %ld: %ld maps left, %d wrong unmaps", name, at,
                  test_system.live, test_system.bad_unmap);
        check_heap_empty(&h, "read", at);
        if (test_system.reads < at) break;
    }
    CHECK(at < FAULT_LIMIT);
    test_system.read_fails_at = 0;
}

/* The same with an allocation that fails, and with a caller who wants no more. */
static void fault_path_stops(const char *name) {
    long at;
    int cancel;
    char path[1024];
    model_path(path, sizeof path, name, "");
    for (cancel = 0; cancel < 2; cancel++) for (at = 1; at < FAULT_LIMIT; at++) {
        qwen3_load_desc d;
        test_heap h;
        qwen3_model *m = (qwen3_model *)&h;
        stopper s;
        qwen3_result r;
        memset(&d, 0, sizeof d);
        memset(&s, 0, sizeof s);
        memset(&test_system, 0, sizeof test_system);
        test_system.no_map = 1;
        d.path = path;
        d.progress = stop_progress;
        d.progress_user = &s;
        d.allocator = heap_allocator(&h);
        if (cancel) s.stop_at = at; else h.fail_at = at;
        r = qwen3_load(&m, &d, NULL, 0);
        if (r == QWEN3_OK) qwen3_free(m);
        else CHECK_MSG(r == (cancel ? QWEN3_STOPPED : QWEN3_ERR_MEMORY), "%s: %s", name, qwen3_result_string(r));
        CHECK_MSG(test_system.live == 0 && !test_system.bad_unmap, "%s: %ld maps left", name, test_system.live);
        check_heap_empty(&h, "stopped load", at);
        if (r == QWEN3_OK) break;
    }
    test_system.no_map = 0;
}

static void test_fault_mapping(void) {
    int i;
    for (i = 0; i < 3; i++) {
        fault_path(fault_models[i], 0, 0);
        fault_path(fault_models[i], 1, 0);
        fault_path(fault_models[i], 0, QWEN3_LOAD_NO_MMAP);
        fault_path_stops(fault_models[i]);
    }
    CHECK((test_system.flags & O_NOCTTY) && (test_system.flags & QWEN3I_CLOEXEC) && QWEN3I_CLOEXEC);
}

#endif

/* Cancel a prefill of three chunks at every poll: whole steps stay, and going on gives the right logits. */
static void test_fault_cancel_prefill(void) {
    enum { N = 40, CHUNK = 16 };
    fixture f;
    qwen3_token tokens[N];
    uint64_t seed = 5;
    float *plain;
    long at, stopped = 0;
    int kept[N + 1], vocab, len;
    if (!fixture_open(&f, "plain")) return;
    vocab = f.info.n_vocab;
    random_tokens(&seed, tokens, N, vocab);
    plain = plain_logits(f.model, tokens, N, QWEN3_KV_F16);
    memset(kept, 0, sizeof kept);
    for (at = 1; at < FAULT_LIMIT; at++) {
        qwen3_ctx_desc d = ctx_desc(N, 2, CHUNK, QWEN3_KV_F16);
        stopper s;
        qwen3_ctx *ctx;
        qwen3_result r;
        memset(&s, 0, sizeof s);
        d.cancel = stop_cancel;
        d.cancel_user = &s;
        ctx = ctx_open_desc(f.model, &d);
        if (!ctx) break;
        CHECK_OK(ctx, eval(ctx, 0, tokens, 3, NULL));           /* something to lose */
        s.calls = 0;
        s.stop_at = at;
        r = eval(ctx, 0, tokens + 3, N - 3, NULL);
        s.stop_at = 0;
        len = seq_len(ctx, 0);
        if (r == QWEN3_OK) { qwen3_ctx_free(ctx); break; }
        stopped++;
        CHECK_MSG(r == QWEN3_STOPPED, "cancelled at poll %ld: %s", at, qwen3_result_string(r));
        CHECK_MSG(len < N && (len - 3) % CHUNK == 0 &&
                  memcmp(qwen3_seq_tokens(ctx, 0, NULL), tokens, (size_t)len * sizeof *tokens) == 0,
                  "%d tokens are left", len);
        kept[len]++;
        CHECK_MSG(same_logits(ctx, 0, plain + (size_t)(len - 1) * (size_t)vocab, vocab),
                  "logits after cancelling at poll %ld, %d tokens", at, len);
        CHECK_OK(ctx, eval(ctx, 0, tokens + len, N - len, NULL));
        CHECK_MSG(same_logits(ctx, 0, plain + (size_t)(N - 1) * (size_t)vocab, vocab),
                  "going on after poll %ld, %d tokens", at, len);
        qwen3_ctx_free(ctx);
    }
    CHECK_MSG(stopped >= 3 && kept[3] && kept[3 + CHUNK] && kept[3 + 2 * CHUNK], "cancelled %ld times only", stopped);
    free(plain);
    fixture_close(&f);
}

/* Cancel a decode step, a batch of them, and a generation, at every poll. */
static void test_fault_cancel_decode(void) {
    fixture f;
    qwen3_token tokens[12], t;
    uint64_t seed = 6;
    float *plain, *plain1;
    int vocab, seqs[2] = {0, 1}, what;
    long at, stopped[3] = {0, 0, 0};
    if (!fixture_open(&f, "plain")) return;
    vocab = f.info.n_vocab;
    random_tokens(&seed, tokens, 12, vocab);
    plain = plain_logits(f.model, tokens, 12, QWEN3_KV_F16);
    plain1 = plain_logits(f.model, tokens + 4, 7, QWEN3_KV_F16);
    for (what = 0; what < 3; what++) for (at = 1; at < FAULT_LIMIT; at++) {
        qwen3_ctx_desc d = ctx_desc(12, 2, 0, QWEN3_KV_F16);
        qwen3_sampler sampler = qwen3_sampler_preset(QWEN3_THINKING, 3), sampler1 = sampler, *list[2];
        qwen3_token out[2];
        stopper s;
        qwen3_ctx *ctx;
        qwen3_result r, results[2];
        list[0] = &sampler;
        list[1] = &sampler1;
        memset(&s, 0, sizeof s);
        d.cancel = stop_cancel;
        d.cancel_user = &s;
        ctx = ctx_open_desc(f.model, &d);
        if (!ctx) break;
        CHECK_OK(ctx, eval(ctx, 0, tokens, 11, NULL));
        CHECK_OK(ctx, eval(ctx, 1, tokens + 4, 7, NULL));
        s.calls = 0;
        s.stop_at = at;
        if (what == 0) r = eval(ctx, 0, tokens + 11, 1, NULL);
        else if (what == 1) r = qwen3_next(ctx, 0, &sampler, &t);
        else r = qwen3_next_batch(ctx, seqs, 2, list, out, results);
        s.stop_at = 0;
        if (r != QWEN3_STOPPED) {
            CHECK_MSG(r == QWEN3_OK || r == QWEN3_END, "%s: %s", qwen3_result_string(r), qwen3_ctx_error(ctx));
            qwen3_ctx_free(ctx);
            break;
        }
        stopped[what]++;
        CHECK_MSG(seq_len(ctx, 0) == 11 && seq_len(ctx, 1) == 7, "step %d, poll %ld: a token was kept",
                  what, at);
        CHECK_MSG(same_logits(ctx, 0, plain + (size_t)10 * (size_t)vocab, vocab),
                  "step %d, poll %ld: the logits have changed", what, at);
        CHECK_MSG(same_logits(ctx, 1, plain1 + (size_t)6 * (size_t)vocab, vocab),
                  "step %d, poll %ld: a neighbour's logits have changed", what, at);
        CHECK_MSG(sampler.rng == 3 && sampler1.rng == 3, "step %d, poll %ld: the random state has moved", what, at);
        CHECK_OK(ctx, eval(ctx, 0, tokens + 11, 1, NULL));
        CHECK(same_logits(ctx, 0, plain + (size_t)11 * (size_t)vocab, vocab));
        qwen3_ctx_free(ctx);
    }
    for (what = 0; what < 3; what++) CHECK_MSG(stopped[what] > 0, "step %d never polls", what);
    free(plain);
    free(plain1);
    fixture_close(&f);
}

/* Many sequences at once, so that logits of some are computed before the call is cancelled. */
static void test_fault_cancel_many(void) {
    enum { SEQS = 20, LEN = 4, MORE = 30 };
    fixture f;
    qwen3_token tokens[SEQS][LEN], more[MORE];
    qwen3_item items[2];
    uint64_t seed = 7;
    float *plain[SEQS], *rows;
    int vocab, i, what;
    long at, stopped = 0;
    if (!fixture_open(&f, "plain")) return;
    vocab = f.info.n_vocab;
    random_tokens(&seed, more, MORE, vocab);
    rows = floats((size_t)MORE * (size_t)vocab);
    for (i = 0; i < SEQS; i++) {
        random_tokens(&seed, tokens[i], LEN, vocab);
        plain[i] = plain_logits(f.model, tokens[i], LEN, QWEN3_KV_F16);
    }
    for (what = 0; what < 2; what++) for (at = 1; at < FAULT_LIMIT; at++) {
        qwen3_ctx_desc d = ctx_desc(64, SEQS, 0, QWEN3_KV_F16);
        qwen3_token out[SEQS];
        qwen3_result r;
        int seqs[SEQS];
        stopper s;
        qwen3_ctx *ctx;
        memset(&s, 0, sizeof s);
        d.cancel = stop_cancel;
        d.cancel_user = &s;
        ctx = ctx_open_desc(f.model, &d);
        if (!ctx) break;
        for (i = 0; i < SEQS; i++) { seqs[i] = i; CHECK_OK(ctx, eval(ctx, i, tokens[i], LEN, NULL)); }
        s.calls = 0;
        s.stop_at = at;
        if (what == 0) r = qwen3_next_batch(ctx, seqs, SEQS, NULL, out, NULL);
        else {
            items[0] = item_of(3, more, 3);
            items[1] = item_of(0, more, MORE);
            items[0].all_logits = items[1].all_logits = rows;
            r = qwen3_eval(ctx, items, 2);
        }
        s.stop_at = 0;
        stopped += r == QWEN3_STOPPED;
        for (i = 0; i < SEQS && r == QWEN3_STOPPED; i++)
            CHECK_MSG(seq_len(ctx, i) == LEN && same_logits(ctx, i, plain[i] + (LEN - 1) * vocab, vocab),
                      "step %d, poll %ld: sequence %d has changed", what, at, i);
        qwen3_ctx_free(ctx);
        if (r != QWEN3_STOPPED) break;
    }
    CHECK(stopped >= 2);
    for (i = 0; i < SEQS; i++) free(plain[i]);
    free(rows);
    fixture_close(&f);
}

static void test_fault_cancel_chat(void) {
    test_heap model_heap;
    fault_world w;
    qwen3_ctx_desc d = ctx_desc(512, 2, 16, QWEN3_KV_F16);
    stopper s;
    long at;
    memset(&s, 0, sizeof s);
    if (!fault_world_open(&w, &model_heap)) return;
    qwen3_ctx_free(w.ctx);
    d.cancel = stop_cancel;
    d.cancel_user = &s;
    w.ctx = ctx_open_desc(w.f.model, &d);
    if (w.ctx) CHECK_OK(w.ctx, eval(w.ctx, 0, w.prompt, w.n_prompt, NULL));
    for (at = 1; w.ctx && at < 60; at++) {
        int i, r;
        static const struct { const char *name; int (*run)(fault_world *); } steps[] = {
            {"chat", fault_chat}, {"sync", fault_sync}, {"embed", fault_embed}, {"rerank", fault_rerank},
            {"next", fault_next}
        };
        for (i = 0; i < 5; i++) {
            CHECK_OK(w.ctx, qwen3_sync(w.ctx, 1, w.prompt + 1, i == 1 ? 20 : 4, 0));
            s.calls = 0;
            s.stop_at = at;
            r = steps[i].run(&w);
            s.stop_at = 0;
            CHECK_MSG(s.calls < at ? r >= 0 && r != QWEN3_STOPPED : r == QWEN3_STOPPED, "%s, poll %ld: %d",
                      steps[i].name, at, r);
            check_world(&w, steps[i].name, at);
        }
    }
    fault_world_close(&w);
    check_heap_empty(&model_heap, "model", 0);
}

static void suite_faults(void) {
    RUN(test_fault_memory_load);
    RUN(test_fault_memory_context);
    RUN(test_fault_memory_use);
    RUN(test_fault_read);
    RUN(test_fault_lying_sizes);
    RUN(test_fault_sizes);
    RUN(test_fault_cancel_load);
#ifdef TEST_SYSTEM
    RUN(test_fault_mapping);
#endif
    RUN(test_fault_cancel_prefill);
    RUN(test_fault_cancel_decode);
    RUN(test_fault_cancel_many);
    RUN(test_fault_cancel_chat);
}
#endif
