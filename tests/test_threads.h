/* Threads: many users of one model at once, cancelling from outside, pools that sleep, threads that cannot be
   had; and a long random life of a context against a plain model of what it must hold. */
#ifndef QWEN3_TESTS_TEST_THREADS_H
#define QWEN3_TESTS_TEST_THREADS_H
#include "fixture.h"
#include "tiny.h"
#include "long_run.h"

#if !defined(_WIN32) && !defined(QWEN3_NO_THREADS)
#include <sys/resource.h>
#include <sys/select.h>

static void thread_wait_ms(int ms) {
    struct timeval t;
    t.tv_sec = 0;
    t.tv_usec = 1000 * ms;
    select(0, NULL, NULL, NULL, &t);
}

/* ---- eight threads on one model -------------------------------------------------------------------------- */
typedef struct thread_user {
    const qwen3_model *model;
    int                number, ok, n_tokens;
    const float       *want;            /* logits after the prompt, and then of each generated token's place */
    const qwen3_token *prompt, *reply;
    int                n_prompt, n_reply;
} thread_user;

enum { THREADS = 8, PROMPT = 24, REPLY = 12 };
static const char thread_text[] = "The quick brown fox, caf\xC3\xA9 12 \xF0\x9F\x98\x80 <|im_end|> the the";

/* Encode, render, look up, evaluate, generate: all must come out as it did alone. */
static void *thread_use(void *arg) {
    thread_user *u = (thread_user *)arg;
    qwen3_ctx_desc d = ctx_desc(64, 2, 8, QWEN3_KV_F16);
    qwen3_token tokens[128], t;
    qwen3_msg msg;
    qwen3_chat_desc chat;
    qwen3_ctx *ctx = NULL;
    int i, round, n;
    memset(&msg, 0, sizeof msg);
    memset(&chat, 0, sizeof chat);
    msg.role = QWEN3_USER;
    msg.text = thread_text;
    chat.msgs = &msg;
    chat.n_msgs = 1;
    d.threads = 1 + u->number % 2;      /* some with a pool of their own */
    for (round = 0; round < 3 && u->ok; round++) {
        u->ok &= qwen3_encode(u->model, thread_text, sizeof thread_text - 1, u->number & 1, tokens, 128, NULL, 0) == u->n_tokens;
        u->ok &= qwen3_chat_render(u->model, &chat, NULL, 0, NULL, 0) > 0 && token_id(u->model, "<|im_end|>") > 0;
        u->ok &= qwen3_token_bytes(u->model, tokens[0], &n) != NULL && qwen3_get_info(u->model).n_vocab > 0;
        if (qwen3_ctx_create(&ctx, u->model, &d, NULL, 0) != QWEN3_OK) { u->ok = 0; break; }
        u->ok &= qwen3_sync(ctx, round % 2, u->prompt, u->n_prompt, 0) == QWEN3_OK;
        u->ok &= same_logits(ctx, round % 2, u->want, qwen3_get_info(u->model).n_vocab);
        for (i = 0; i < u->n_reply && u->ok; i++)
            u->ok &= qwen3_next(ctx, round % 2, NULL, &t) >= 0 && t == u->reply[i];
        qwen3_ctx_free(ctx);
        ctx = NULL;
    }
    return NULL;
}

static void test_threads_share_a_model(void) {
    fixture f;
    thread_user u[THREADS];
    pthread_t id[THREADS];
    qwen3_token prompt[PROMPT], reply[REPLY];
    uint64_t seed = 5;
    float *want;
    qwen3_ctx *ctx;
    int i, n = 0, length[2];
    if (!fixture_open(&f, "chat")) return;
    random_tokens(&seed, prompt, PROMPT, f.info.n_tokens);
    want = floats((size_t)f.info.n_vocab);
    ctx = ctx_open(f.model, 64, 1, 0, QWEN3_KV_F16);
    CHECK_OK(ctx, qwen3_sync(ctx, 0, prompt, PROMPT, 0));
    memcpy(want, qwen3_logits(ctx, 0), (size_t)f.info.n_vocab * sizeof *want);
    while (n < REPLY && qwen3_next(ctx, 0, NULL, &reply[n]) == QWEN3_OK) n++;
    for (i = 0; i < 2; i++) length[i] = qwen3_encode(f.model, thread_text, sizeof thread_text - 1, i, NULL, 0, NULL, 0);
    for (i = 0; i < THREADS; i++) {
        u[i].model = f.model; u[i].number = i; u[i].ok = 1; u[i].n_tokens = length[i & 1]; u[i].want = want;
        u[i].prompt = prompt; u[i].reply = reply; u[i].n_prompt = PROMPT; u[i].n_reply = n;
        CHECK(pthread_create(&id[i], NULL, thread_use, &u[i]) == 0);
    }
    for (i = 0; i < THREADS; i++) { pthread_join(id[i], NULL); CHECK_MSG(u[i].ok, "thread %d got something else", i); }
    qwen3_ctx_free(ctx);
    free(want);
    fixture_close(&f);
}

/* ---- cancelling from another thread -------------------------------------------------------------------------- */
static int thread_stop_flag;            /* accessed atomically */
static int thread_stopped(void *user) { (void)user; return __atomic_load_n(&thread_stop_flag, __ATOMIC_ACQUIRE); }
static void *thread_stop_soon(void *arg) {
    (void)arg;
    thread_wait_ms(2);
    __atomic_store_n(&thread_stop_flag, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void test_threads_cancel(void) {
    fixture f;
    qwen3_ctx_desc d = ctx_desc(64, 1, 4, QWEN3_KV_F16);
    qwen3_ctx *ctx;
    qwen3_token prompt[60];
    uint64_t seed = 6;
    float *plain;
    pthread_t id;
    int i, rounds = 0;
    qwen3_result r = QWEN3_OK;
    if (!fixture_open(&f, "plain")) return;
    random_tokens(&seed, prompt, 60, f.info.n_vocab);
    plain = plain_logits(f.model, prompt, 60, QWEN3_KV_F16);
    d.cancel = thread_stopped;
    d.threads = 2;
    ctx = ctx_open_desc(f.model, &d);
    for (i = 0; i < 5; i++) {
        __atomic_store_n(&thread_stop_flag, 0, __ATOMIC_RELEASE);
        CHECK(pthread_create(&id, NULL, thread_stop_soon, NULL) == 0);
        for (rounds = 0; rounds < 100000; rounds++) {           /* until the other thread says so */
            CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 0));
            r = qwen3_sync(ctx, 0, prompt, 60, 0);
            if (r != 0) break;
        }
        pthread_join(id, NULL);
        CHECK_MSG(r > 0 && (int)r == 60 - seq_len(ctx, 0) && seq_len(ctx, 0) % 4 == 0,
                  "%s after %d tokens", qwen3_result_string(r), seq_len(ctx, 0));
        __atomic_store_n(&thread_stop_flag, 0, __ATOMIC_RELEASE);
        CHECK_OK(ctx, qwen3_sync(ctx, 0, prompt, 60, 0));
        CHECK(same_logits(ctx, 0, plain + 59 * f.info.n_vocab, f.info.n_vocab));
    }
    free(plain);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* ---- pools ------------------------------------------------------------------------------------------------------ */
static double thread_cpu_ms(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return 1e3 * (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-3 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* Threads with nothing to do take no processor time, from the first moment on and after work. */
static void test_threads_sleep(void) {
    const qwen3_token tokens[4] = {1, 2, 3, 4};
    fixture f;
    qwen3_ctx_desc d = ctx_desc(64, 1, 0, QWEN3_KV_F16);
    qwen3_ctx *ctx[4];
    double busy;
    int i, k;
    if (!fixture_open(&f, "plain")) return;
    d.threads = 8;
    for (i = 0; i < 4; i++) ctx[i] = ctx_open_desc(f.model, &d);
    for (k = 0; k < 2; k++) {
        thread_wait_ms(20);                     /* they may still be starting, or spinning after work */
        busy = thread_cpu_ms();
        thread_wait_ms(100);
        busy = thread_cpu_ms() - busy;
        CHECK_MSG(busy < 10, "28 idle threads took %.1f ms of processor time in 100 ms", busy);
        if (test_verbose) printf("      28 idle threads took %.3f ms of processor time in 100 ms\n", busy);
        for (i = 0; i < 4; i++) CHECK_OK(ctx[i], qwen3_sync(ctx[i], 0, tokens, 4, 0));
    }
    for (i = 0; i < 4; i++) qwen3_ctx_free(ctx[i]);
    fixture_close(&f);
}

/* More threads than the system gives: an error, and those that were started are gone again. */
static void test_threads_refused(void) {
#if defined(RLIMIT_AS) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    fixture f;
    qwen3_ctx_desc d = ctx_desc(16, 1, 0, QWEN3_KV_F16);
    qwen3_ctx *ctx = NULL;
    struct rlimit old, low;
    char err[256] = "";
    qwen3_result r;
    FILE *status;
    void *volatile probe;
    long pages = 0;
    if (!fixture_open(&f, "plain")) return;
    status = fopen("/proc/self/statm", "r");
    if (!status || fscanf(status, "%ld", &pages) != 1) pages = 0;
    if (status) fclose(status);
    if (pages > 0 && getrlimit(RLIMIT_AS, &old) == 0) {
        low = old;
        low.rlim_cur = (rlim_t)pages * 4096 + 6 * 1024 * 1024;      /* not for 63 stacks, however small */
        d.threads = 64;
        CHECK(setrlimit(RLIMIT_AS, &low) == 0);
        probe = malloc(16 * 1024 * 1024);       /* QEMU does not pass the limit on */
        r = qwen3_ctx_create(&ctx, f.model, &d, err, sizeof err);
        CHECK(setrlimit(RLIMIT_AS, &old) == 0);
        CHECK_MSG(probe || (r == QWEN3_ERR_MEMORY && !ctx && err[0]), "%s '%s'", qwen3_result_string(r), err);
        free(probe);
        qwen3_ctx_free(ctx);
        CHECK(qwen3_ctx_create(&ctx, f.model, &d, err, sizeof err) == QWEN3_OK);
        qwen3_ctx_free(ctx);
    }
    fixture_close(&f);
#endif
}
#endif

/* ---- a long life ------------------------------------------------------------------------------------------------- */
static void test_long_run(void) {
    long_run_result r = long_run(2000, 1);
    CHECK_MSG(r.ok, "%s", r.what);
    if (test_verbose)
        printf("      %ld tokens in %ld steps; %ld shifts, %ld restores, %ld copies, %ld cancels\n", r.tokens, r.steps,
               r.shifts, r.restores, r.copies, r.cancels);
}

static void suite_threads(void) {
#if !defined(_WIN32) && !defined(QWEN3_NO_THREADS)
    RUN(test_threads_share_a_model);
    RUN(test_threads_cancel);
    RUN(test_threads_sleep);
    RUN(test_threads_refused);
#endif
    RUN(test_long_run);
}
#endif
