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
#include <sys/stat.h>
#include <sys/wait.h>

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

/* ---- another process ---------------------------------------------------------------------------------------------- */
/* A child's exit status, or -1; it called alarm(), so that it ends if it hangs. */
static int thread_child_status(pid_t child) {
    int status = -1;
    return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* A context from before fork() works in the child, with the same logits, and can be freed there; the parent's goes on.
   jobs: the host's job system has no threads there either. */
static void thread_fork(qwen3_jobs jobs, int threads) {
    const qwen3_token tokens[6] = {1, 2, 3, 4, 5, 6};
    fixture f;
    qwen3_ctx_desc d = ctx_desc(64, 1, 2, QWEN3_KV_F16);
    qwen3_ctx *ctx;
    float *plain;
    pid_t child;
    if (!fixture_open(&f, "plain")) return;
    plain = plain_logits(f.model, tokens, 6, QWEN3_KV_F16);
    d.jobs = jobs;
    d.threads = threads;
    ctx = ctx_open_desc(f.model, &d);
    if (ctx && CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, 3, 0))) {
        child = fork();
        if (child == 0) {
            int ok;
            alarm(20);
            ok = qwen3_sync(ctx, 0, tokens, 6, 0) == QWEN3_OK &&
                     same_logits(ctx, 0, plain + 5 * f.info.n_vocab, f.info.n_vocab);
            qwen3_ctx_free(ctx);
            qwen3_free(f.model);
            _exit(ok ? 0 : 1);
        }
        CHECK_MSG(child > 0 && thread_child_status(child) == 0, "the child hangs, or its logits differ");
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, 6, 0));
        CHECK(same_logits(ctx, 0, plain + 5 * f.info.n_vocab, f.info.n_vocab));
    }
    qwen3_ctx_free(ctx);
    free(plain);
    fixture_close(&f);
}

static pid_t thread_jobs_process;
static void thread_jobs_here(void *user, int count, void (*fn)(void *arg, int index), void *arg) {
    (void)user;
    if (getpid() != thread_jobs_process) _exit(2);
    while (count > 0) fn(arg, --count);
}

static void test_threads_fork(void) {
    qwen3_jobs none, here;
    memset(&none, 0, sizeof none);
    memset(&here, 0, sizeof here);
    here.parallel_for = thread_jobs_here;
    thread_jobs_process = getpid();
    thread_fork(none, 4);
    thread_fork(here, 4);
}

/* ---- signals, and the floating-point mode ---------------------------------------------------------------------- */
#ifdef __linux__
/* SigBlk of each thread of this process but the first: how many there are, and how many block the signal. */
static int thread_blocks(int signal_number, int *n) {
    int blocked = 0;
    long tid;
    *n = 0;
    for (tid = (long)getpid() + 1; tid < (long)getpid() + 4096; tid++) {
        char path[96], line[256];
        unsigned long long mask = 0;
        FILE *file;
        snprintf(path, sizeof path, "/proc/%ld/task/%ld/status", (long)getpid(), tid);
        file = fopen(path, "r");
        if (!file) continue;
        while (fgets(line, sizeof line, file)) if (sscanf(line, "SigBlk: %llx", &mask) == 1) break;
        fclose(file);
        ++*n;
        blocked += (int)(mask >> (signal_number - 1) & 1);
    }
    return blocked;
}

/* A context's threads block all signals; the caller's mask stays. */
static void test_threads_signals(void) {
    fixture f;
    qwen3_ctx_desc d = ctx_desc(16, 1, 0, QWEN3_KV_F16);
    qwen3_ctx *ctx;
    int before = 0, n = 0, was, blocked;
    if (!fixture_open(&f, "plain")) return;
    was = thread_blocks(SIGTERM, &before);
    d.threads = 6;
    ctx = ctx_open_desc(f.model, &d);
    thread_wait_ms(20);                 /* while a thread starts, the C library blocks them */
    blocked = thread_blocks(SIGTERM, &n);
    if (n - before == 5) CHECK_MSG(blocked - was == 5, "%d of 5 threads block signals", blocked - was);
    else CHECK_MSG(n == before, "%d threads", n - before);       /* no /proc */
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}
#endif

static const int thread_roundings[] = {
    FE_TONEAREST
#ifdef FE_UPWARD
    , FE_UPWARD
#endif
#ifdef FE_DOWNWARD
    , FE_DOWNWARD
#endif
#ifdef FE_TOWARDZERO
    , FE_TOWARDZERO
#endif
};

/* The caller's rounding, when it creates a context and when it uses it, changes no bit, and is as it was afterwards. */
static void test_threads_rounding(void) {
    fixture f;
    qwen3_token prompt[40];
    qwen3_sampler warm = qwen3_sampler_preset(QWEN3_THINKING, 1);
    uint64_t seed = 9;
    float *plain;
    size_t create, use;
    int threads;
    if (!fixture_open(&f, "plain")) return;
    random_tokens(&seed, prompt, 40, f.info.n_vocab);
    plain = plain_logits(f.model, prompt, 40, QWEN3_KV_F16);
    warm.repeat_penalty = 1.3f;
    warm.presence_penalty = 0.7f;
    for (threads = 1; threads <= 3; threads++)
        for (create = 0; create < sizeof thread_roundings / sizeof *thread_roundings; create++)
            for (use = 0; use < sizeof thread_roundings / sizeof *thread_roundings; use++) {
                qwen3_ctx_desc d = ctx_desc(64, 1, 16, QWEN3_KV_F16);
                qwen3_sampler s = warm;
                qwen3_ctx *ctx;
                qwen3_token t = -1;
                static qwen3_token first;
                d.threads = threads;
                fesetround(thread_roundings[create]);
                ctx = ctx_open_desc(f.model, &d);
                fesetround(thread_roundings[use]);
                CHECK_OK(ctx, qwen3_sync(ctx, 0, prompt, 40, 0));
                CHECK_OK(ctx, qwen3_sample(ctx, 0, &s, &t));
                CHECK(fegetround() == thread_roundings[use]);
                fesetround(FE_TONEAREST);
                if (threads == 1 && create == 0 && use == 0) first = t;
                CHECK_MSG(same_logits(ctx, 0, plain + 39 * f.info.n_vocab, f.info.n_vocab) && t == first,
                          "%d threads, rounding %d, then %d", threads, (int)create, (int)use);
                qwen3_ctx_free(ctx);
            }
    free(plain);
    fixture_close(&f);
}

/* ---- stacks ------------------------------------------------------------------------------------------------------ */
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static int thread_put(const char *text, int n, int kind, void *user) { (void)text; (void)n; (void)kind; (void)user; return 0; }

/* Load, evaluate, render, generate, embed: on a thread with little stack. */
static void *thread_with_little(void *arg) {
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_msg msg;
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    float vector[1024];
    memset(&d, 0, sizeof d);
    memset(&msg, 0, sizeof msg);
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    d.path = (const char *)arg;
    msg.role = QWEN3_USER;
    msg.text = thread_text;
    chat.msgs = &msg;
    chat.n_msgs = 1;
    gen.on_text = thread_put;
    gen.max_tokens = 3;
    if (qwen3_load(&m, &d, NULL, 0) != QWEN3_OK || qwen3_get_info(m).n_embd > 1024) return NULL;
    if (qwen3_ctx_create(&ctx, m, NULL, NULL, 0) == QWEN3_OK && qwen3_chat(ctx, 0, &chat, &gen) >= 0 &&
        qwen3_embed(ctx, 0, "find", thread_text, vector) == QWEN3_OK) d.n_files = 1;
    qwen3_ctx_free(ctx);
    qwen3_free(m);
    return d.n_files ? arg : NULL;
}

/* What the header promises: 64 KB are enough. */
static void test_threads_stack(void) {
    char path[1024];
    pthread_attr_t attributes;
    pthread_t id;
    void *done = NULL;
    model_path(path, sizeof path, "chat", "");
    CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstacksize(&attributes, 64 * 1024) == 0);
    if (pthread_create(&id, &attributes, thread_with_little, path) == 0) {
        pthread_join(id, &done);
        CHECK(done != NULL);
    } else {                            /* the thread-local data of CUDA's libraries takes more than that */
      #ifndef QWEN3_WITH_CUDA
        CHECK_MSG(0, "no thread of 64 KB can be made");
      #endif
    }
    pthread_attr_destroy(&attributes);
}
#endif

/* ---- how many ---------------------------------------------------------------------------------------------------- */
#ifdef __linux__
/* A file under a directory that stands for the system's root, with the directories that it needs. */
static void thread_system_file(const char *root, const char *name, const char *text) {
    char path[600], *at;
    FILE *file;
    snprintf(path, sizeof path, "%s%s", root, name);
    for (at = path + strlen(root) + 1; (at = strchr(at, '/')) != NULL; at++) { *at = '\0'; mkdir(path, 0700); *at = '/'; }
    file = fopen(path, "w");
    if (!CHECK_MSG(file != NULL, "cannot write %s", path)) return;
    fputs(text, file);
    fclose(file);
}

static qwen3i_cpu_set thread_cpu_set(const char *cpus) {        /* '1' for each that is in it */
    qwen3i_cpu_set set;
    size_t i;
    memset(&set, 0, sizeof set);
    for (i = 0; cpus[i]; i++) if (cpus[i] == '1') {
        unsigned long word;
        char *at = (char *)&set + i / (8 * sizeof word) * sizeof word;
        memcpy(&word, at, sizeof word);
        word |= 1ul << i % (8 * sizeof word);
        memcpy(at, &word, sizeof word);
    }
    return set;
}

/* Quotas of both versions of control groups, from the group or from one above it; chips whose cores differ. */
static void test_threads_default(void) {
    static const struct { const char *group, *name, *text, *name2, *text2; int want; } quotas[] = {
        {"0::/\n", "/sys/fs/cgroup/cpu.max", "max 100000\n", NULL, NULL, 0},
        {"0::/\n", "/sys/fs/cgroup/cpu.max", "200000 100000\n", NULL, NULL, 2},
        {"0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max", "150000 100000\n", NULL, NULL, 2},
        {"0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max", "800000 100000\n", "/sys/fs/cgroup/a/cpu.max", "300000 100000\n", 3},
        {"0::/../x\n", "/sys/fs/cgroup/cpu.max", "50000 100000", NULL, NULL, 1},
        {"3:memory:/m\n4:cpu,cpuacct:/d/e\n", "/sys/fs/cgroup/cpu/d/e/cpu.cfs_quota_us", "400000\n",
         "/sys/fs/cgroup/cpu/d/e/cpu.cfs_period_us", "100000\n", 4},
        {"4:cpuset,cpu:/gone\n0::/\n", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n",
         "/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n", 1},
        {"4:cpu:/d\n", "/sys/fs/cgroup/cpu/d/cpu.cfs_quota_us", "-1\n", "/sys/fs/cgroup/cpu/d/cpu.cfs_period_us", "100000\n", 0},
        {"4:cpuset:/d\n", "/sys/fs/cgroup/cpu/d/cpu.cfs_quota_us", "100000\n", "/sys/fs/cgroup/cpu/d/cpu.cfs_period_us", "100000\n", 0},
        {"nonsense", "/sys/fs/cgroup/cpu.max", "100000 100000", NULL, NULL, 0},
        {"0::/\n", "/sys/fs/cgroup/cpu.max", "9223372036854775807 1", NULL, NULL, INT_MAX},
    };
    const qwen3i_cpu_set eight = thread_cpu_set("11111111"), slow = thread_cpu_set("0000000011"), odd = thread_cpu_set("1000100011");
    char root[64], command[128];
    size_t i;
    snprintf(root, sizeof root, "/tmp/qwen3-root-%ld", (long)getpid());
    snprintf(command, sizeof command, "rm -rf %s", root);
    for (i = 0; i < sizeof quotas / sizeof *quotas; i++) {
        CHECK(mkdir(root, 0700) == 0);
        thread_system_file(root, "/proc/self/cgroup", quotas[i].group);
        thread_system_file(root, quotas[i].name, quotas[i].text);
        if (quotas[i].name2) thread_system_file(root, quotas[i].name2, quotas[i].text2);
        CHECK_MSG(qwen3i_cpu_quota(root) == quotas[i].want, "quota %d is %d", (int)i, qwen3i_cpu_quota(root));
        if (quotas[i].want == 1) CHECK(qwen3i_cpu_threads(root) == 1);
        CHECK(system(command) == 0);
    }
    CHECK(qwen3i_cpu_quota(root) == 0 && qwen3i_cpus_fast(root, &eight) == 8 && qwen3i_cpus_fast(root, &odd) == 4);
    CHECK(mkdir(root, 0700) == 0);
    for (i = 0; i < 10; i++) {
        char name[80];
        snprintf(name, sizeof name, "/sys/devices/system/cpu/cpu%d/cpu_capacity", (int)i);
        thread_system_file(root, name, i == 0 ? "1024\n" : i < 4 ? "820\n" : "310\n");
    }
    CHECK(qwen3i_cpus_fast(root, &eight) == 4 && qwen3i_cpus_fast(root, &slow) == 2 && qwen3i_cpus_fast(root, &odd) == 1);
    thread_system_file(root, "/sys/devices/cpu_core/cpus", "0-5,8\n");
    CHECK(qwen3i_cpus_fast(root, &eight) == 6 && qwen3i_cpus_fast(root, &slow) == 1 && qwen3i_cpus_fast(root, &odd) == 3);
    CHECK(system(command) == 0);
}

/* On one processor a context has one thread. In another process, as the mask stays. */
static void test_threads_affinity(void) {
    pid_t child;
    fflush(stdout);
    child = fork();
    if (child == 0) {
        char command[128];
        alarm(20);
        snprintf(command, sizeof command, "taskset -cp 0 %ld >/dev/null 2>&1", (long)getpid());
        _exit(system(command) != 0 ? 77 : qwen3i_default_threads() == 1 ? 0 : 1);
    }
    if (child > 0) {
        const int status = thread_child_status(child);
        CHECK_MSG(status == 0 || status == 77, "status %d", status);    /* 77: no taskset */
    }
}
#endif

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
    RUN(test_threads_fork);
    RUN(test_threads_rounding);
  #if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    RUN(test_threads_stack);
  #endif
  #ifdef __linux__
    RUN(test_threads_signals);
    RUN(test_threads_default);
    RUN(test_threads_affinity);
  #endif
#endif
    RUN(test_long_run);
}
#endif
