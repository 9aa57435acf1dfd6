/* example - chat with a Qwen3 model in a terminal or a pipe. Usage: example --help
   Build: cc -O2 example.c -o example -lm -lpthread      (the Makefile adds CUDA where nvcc is found)
   Exit status: 0 all went well, 1 the model cannot be used, 2 wrong usage, 3 an answer or a check failed.         */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tools/check.h"
#if defined(_WIN32)
  #include <io.h>
  #define IS_TERMINAL(stream) _isatty(_fileno(stream))
#else
  #include <unistd.h>
  #define IS_TERMINAL(stream) isatty(stream == stdin ? 0 : stream == stdout ? 1 : 2)
#endif

static const char usage[] =
    "usage: example MODEL_DIR [options]      chat with a Qwen3 model (Hugging Face directory)\n"
    "  -p TEXT          ask this, print the answer, and leave\n"
    "  -s TEXT          system prompt (@FILE: from a file)\n"
    "  --no-think       answer without thinking first\n"
    "  --temp T --top-p P --top-k K --min-p P    sampling; --temp 0 is greedy (default: the model's advice)\n"
    "  --seed N         of the random numbers (default 42)\n"
    "  --max N          tokens in an answer at most\n"
    "  --think-budget N tokens of thinking at most\n"
    "  --ctx N          positions of context (default 4096)\n"
    "  --threads N      CPU threads (default: one a core)\n"
    "  --tools FILE     tools the model may call, a JSON object a line; answer a call with /tool TEXT\n"
    "  --cuda, --cpu    insist on the GPU, or on the CPU (default: the GPU if there is one)\n"
    "  --check          no chat: how large the numbers in the model get on the text of -p (or one of its own),\n"
    "                   and whether the default cache is precise enough for it\n"
    "  -0               in a pipe, end each answer with a NUL byte instead of a newline\n"
    "In the chat: /help /reset /system TEXT /save FILE /load FILE /tool TEXT /stats /quit; Ctrl-C stops an answer.\n";

#ifdef QWEN3_WITH_CUDA
enum { HAVE_CUDA = 1 };
#else
enum { HAVE_CUDA = 0 };
static const qwen3_backend *no_backend(void) { return NULL; }
#define qwen3_cuda_backend no_backend
#endif

typedef struct options {
    const char *model, *prompt, *system, *tools_file;
    double temp, top_p, min_p, top_k;   /* below 0: the model's advice */
    double ctx, threads, max_tokens, think_budget, seed;
    int no_think, cuda, cpu, nul, check, help;
} options;

typedef struct text { char *bytes; size_t n, cap; } text;        /* a growing string */

typedef struct chat {
    qwen3_model *model;
    qwen3_ctx *ctx;
    qwen3_sampler sampler;
    options opt;
    qwen3_msg msgs[1024]; int n_msgs;
    char *tools_text; const char *tools[64]; int n_tools;
    text answer;
    int colour, dimmed;
} chat;

static volatile sig_atomic_t interrupted;
static void on_interrupt(int signal_number) { (void)signal_number; interrupted = 1; }
static int poll_interrupt(void *user) { (void)user; return interrupted; }

static void die(int status, const char *what, const char *detail) {
    fprintf(stderr, "example: %s%s%s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(status);
}

static void append(text *t, const char *bytes, size_t n) {
    if (t->n + n + 1 > t->cap) {
        t->cap = (t->n + n + 1) * 2;
        t->bytes = (char *)realloc(t->bytes, t->cap);
        if (!t->bytes) die(3, "out of memory", NULL);
    }
    memcpy(t->bytes + t->n, bytes, n);
    t->n += n;
    t->bytes[t->n] = '\0';
}

static char *copy(const char *s) {
    text t = {0, 0, 0};
    append(&t, s, strlen(s));
    return t.bytes;
}

/* A whole file as a string; NULL if it cannot be read. */
static char *read_file(const char *path, size_t *n) {
    text t = {0, 0, 0};
    char buf[65536];
    size_t got;
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    append(&t, "", 0);
    while ((got = fread(buf, 1, sizeof buf, f)) > 0) append(&t, buf, got);
    fclose(f);
    if (n) *n = t.n;
    return t.bytes;
}

/* One line without its end; 0 at the end of the input. */
static int read_line(text *t) {
    int c;
    t->n = 0;
    append(t, "", 0);
    while ((c = getchar()) != EOF && c != '\n') { char ch = (char)c; append(t, &ch, 1); }
    if (t->n && t->bytes[t->n - 1] == '\r') t->bytes[--t->n] = '\0';
    return c != EOF || t->n > 0;
}

typedef struct flag { const char *name; double *number, low, high; const char **text; int *on; } flag;

/* Take one option from the arguments at argv[i]; returns how many it used, 0 if it is none of ours. */
static int take(const flag *flags, char **argv, int i, int argc) {
    char *end;
    const flag *f = flags;
    while (f->name && strcmp(f->name, argv[i])) f++;
    if (!f->name) return 0;
    if (f->on) { *f->on = 1; return 1; }
    if (i + 1 == argc) die(2, "missing value after", argv[i]);
    if (f->text) { *f->text = argv[i + 1]; return 2; }
    *f->number = strtod(argv[i + 1], &end);
    if (end == argv[i + 1] || *end || *f->number < f->low || *f->number > f->high) die(2, "bad value after", argv[i]);
    return 2;
}

static options parse(int argc, char **argv) {
    static options o;
    const flag flags[] = {
        {"--temp", &o.temp, 0, 100, 0, 0}, {"--top-p", &o.top_p, 0, 1, 0, 0}, {"--min-p", &o.min_p, 0, 1, 0, 0},
        {"--top-k", &o.top_k, 0, 1e9, 0, 0}, {"--seed", &o.seed, 0, 9e15, 0, 0}, {"--max", &o.max_tokens, 0, 1e9, 0, 0},
        {"--think-budget", &o.think_budget, 0, 1e9, 0, 0}, {"--ctx", &o.ctx, 1, 1e9, 0, 0}, {"--threads", &o.threads, 0, 256, 0, 0},
        {"-p", 0, 0, 0, &o.prompt, 0}, {"-s", 0, 0, 0, &o.system, 0}, {"--tools", 0, 0, 0, &o.tools_file, 0},
        {"--no-think", 0, 0, 0, 0, &o.no_think}, {"--cuda", 0, 0, 0, 0, &o.cuda}, {"--cpu", 0, 0, 0, 0, &o.cpu},
        {"-0", 0, 0, 0, 0, &o.nul}, {"--check", 0, 0, 0, 0, &o.check},
        {"--help", 0, 0, 0, 0, &o.help}, {"-h", 0, 0, 0, 0, &o.help}, {0, 0, 0, 0, 0, 0}
    };
    int i, used;
    o.temp = o.top_p = o.min_p = o.top_k = -1;
    o.seed = 42;
    for (i = 1; i < argc; i += used) {
        used = take(flags, argv, i, argc);
        if (used == 0 && (argv[i][0] == '-' || o.model)) die(2, "unknown argument (see --help)", argv[i]);
        if (used == 0) { o.model = argv[i]; used = 1; }
    }
    if (o.help || !o.model) { fputs(usage, o.help ? stdout : stderr); exit(o.help ? 0 : 2); }
    if (o.cuda && !HAVE_CUDA) die(2, "--cuda: this program was built without CUDA (make, with nvcc on the PATH, builds it in)", NULL);
    return o;
}

static int show_progress(float done, void *user) {
    int i, full = (int)(done * 30);
    (void)user;
    fputs("\rloading [", stderr);
    for (i = 0; i < 30; i++) fputc(i < full ? '#' : '.', stderr);
    fprintf(stderr, "] %3d %%", (int)(done * 100));
    if (done >= 1) fputs("\r\033[K", stderr);
    return interrupted;
}

/* Load on the GPU if there is one and it is wanted, else on the CPU. */
static void load(chat *c) {
    qwen3_load_desc d;
    char err[512];
    qwen3_result r = QWEN3_ERR_DEVICE;
    memset(&d, 0, sizeof d);
    d.path = c->opt.model;
    if (IS_TERMINAL(stderr)) d.progress = show_progress;
    if (HAVE_CUDA && !c->opt.cpu && !c->opt.check) {
        d.backend = qwen3_cuda_backend();
        r = qwen3_load(&c->model, &d, err, sizeof err);
        if (c->opt.cuda && r != QWEN3_OK) die(1, qwen3_result_string(r), err);
    }
    if (r == QWEN3_ERR_DEVICE || r == QWEN3_ERR_DEVICE_MEMORY) {
        d.backend = NULL;
        r = qwen3_load(&c->model, &d, err, sizeof err);
    }
    if (r != QWEN3_OK) die(1, qwen3_result_string(r), err);
    if (qwen3_get_info(c->model).n_tokens == 0) die(1, "the model has no tokenizer files, so it cannot chat", c->opt.model);
}

static void create_context(chat *c) {
    const options *o = &c->opt;
    qwen3_ctx_desc d;
    char err[512];
    memset(&d, 0, sizeof d);
    d.max_ctx = (int)o->ctx;
    d.threads = (int)o->threads;
    d.cancel = poll_interrupt;
    if (qwen3_ctx_create(&c->ctx, c->model, &d, err, sizeof err) != QWEN3_OK) die(1, "cannot create a context", err);
    c->sampler = qwen3_get_info(c->model).sampler;
    c->sampler.rng = (uint64_t)o->seed;
    if (o->temp  >= 0) c->sampler.temperature = (float)o->temp;
    if (o->top_p >= 0) c->sampler.top_p = (float)o->top_p;
    if (o->min_p >= 0) c->sampler.min_p = (float)o->min_p;
    if (o->top_k >= 0) c->sampler.top_k = (int)o->top_k;
}

/* The whole of --check; returns the exit status. */
static int check_numbers(const chat *c) {
    static const char sample[] =
        "The quick brown fox jumps over the lazy dog. int main(void) { return 42; } In 1687 Newton published the "
        "Principia; sqrt(2) is 1.41421356... \xE4\xBD\xA0\xE5\xA5\xBD\xEF\xBC\x8C\xE4\xB8\x96\xE7\x95\x8C";
    char err[512];
    const int fine = check_model(c->model, c->opt.prompt ? c->opt.prompt : sample, (int)c->opt.threads, err, sizeof err);
    if (fine < 0) die(1, "cannot check the model", err);
    return fine ? 0 : 3;
}

static void load_tools(chat *c) {
    char *line;
    if (!c->opt.tools_file) return;
    c->tools_text = read_file(c->opt.tools_file, NULL);
    if (!c->tools_text) die(2, "cannot read", c->opt.tools_file);
    for (line = strtok(c->tools_text, "\r\n"); line && c->n_tools < 64; line = strtok(NULL, "\r\n")) c->tools[c->n_tools++] = line;
}

static int say(chat *c, qwen3_role role, const char *what) {
    if (c->n_msgs == QWEN3I_COUNT(c->msgs)) { fputs("the conversation is too long; /reset starts a new one\n", stderr); return 0; }
    memset(&c->msgs[c->n_msgs], 0, sizeof *c->msgs);
    c->msgs[c->n_msgs].role = role;
    c->msgs[c->n_msgs++].text = copy(what);
    return 1;
}

static void forget(chat *c, int keep) {
    while (c->n_msgs > keep) free((char *)(uintptr_t)c->msgs[--c->n_msgs].text);
}

static void set_system(chat *c, const char *what) {
    char *file = what[0] == '@' ? read_file(what + 1, NULL) : NULL;
    if (what[0] == '@' && !file) { fprintf(stderr, "cannot read %s\n", what + 1); return; }
    forget(c, 0);
    say(c, QWEN3_SYSTEM, file ? file : what);
    free(file);
}

/* Thinking is dimmed on a terminal and left out of a pipe. */
static int put(const char *utf8, int n, int thinking, void *user) {
    chat *c = (chat *)user;
    append(&c->answer, utf8, (size_t)n);
    if (thinking && !c->colour) return interrupted;
    if (thinking != c->dimmed && c->colour) fputs(thinking ? "\033[2m" : "\033[0m", stdout);
    c->dimmed = thinking;
    fwrite(utf8, 1, (size_t)n, stdout);
    fflush(stdout);
    return interrupted || ferror(stdout);
}

static void show_speed(const qwen3_stats *before, const qwen3_stats *after) {
    double pre_ms = after->prefill_ms - before->prefill_ms, dec_ms = after->decode_ms - before->decode_ms;
    long long pre = after->n_prefill - before->n_prefill, dec = after->n_decode - before->n_decode;
    fprintf(stderr, "\033[2m[%lld prompt tokens, %.0f/s; %lld generated, %.1f/s; %lld reused]\033[0m\n", pre, pre_ms > 0 ? 1e3 * (double)pre / pre_ms : 0,
            dec, dec_ms > 0 ? 1e3 * (double)dec / dec_ms : 0, (long long)(after->n_reused - before->n_reused));
}

/* Let the model answer the conversation so far; its answer joins it. Returns 0 if that failed. */
static int reply(chat *c) {
    qwen3_chat_desc d;
    qwen3_gen_desc g;
    qwen3_stats before = qwen3_ctx_stats(c->ctx), after;
    qwen3_result r;
    memset(&d, 0, sizeof d);
    memset(&g, 0, sizeof g);
    d.msgs = c->msgs; d.n_msgs = c->n_msgs; d.tools = c->tools; d.n_tools = c->n_tools;
    d.flags = c->opt.no_think ? QWEN3_CHAT_NO_THINK : 0;
    g.sampler = &c->sampler; g.on_text = put; g.user = c;
    g.max_tokens = (int)c->opt.max_tokens; g.think_budget = (int)c->opt.think_budget;
    interrupted = 0;
    c->answer.n = 0;
    append(&c->answer, "", 0);
    r = qwen3_chat(c->ctx, 0, &d, &g);
    if (c->dimmed && c->colour) fputs("\033[0m", stdout);
    c->dimmed = 0;
    putchar(c->opt.nul ? '\0' : '\n');
    fflush(stdout);
    if (r < 0) fprintf(stderr, "example: %s: %s\n", qwen3_result_string(r), qwen3_ctx_error(c->ctx));
    if (r == QWEN3_STOPPED && c->colour) fputs("[stopped]\n", stderr);
    after = qwen3_ctx_stats(c->ctx);
    if (c->colour) show_speed(&before, &after);
    interrupted = 0;
    return say(c, QWEN3_ASSISTANT, c->answer.bytes) && r >= 0;
}

/* ---- /save and /load: the messages as text, then the evaluated sequence ------------------------------- */
static void save(chat *c, const char *path) {
    uint64_t n = qwen3_seq_state_size(c->ctx, 0);
    char *state = (char *)malloc((size_t)n);
    FILE *f = state ? fopen(path, "wb") : NULL;
    int i, ok = f && qwen3_seq_save(c->ctx, 0, state, n, NULL) == QWEN3_OK;
    if (ok) fprintf(f, "qwen3-chat %d\n", c->n_msgs);
    for (i = 0; ok && i < c->n_msgs; i++)
        ok = fprintf(f, "%d %lu\n%s\n", (int)c->msgs[i].role, (unsigned long)strlen(c->msgs[i].text), c->msgs[i].text) > 0;
    ok = ok && fwrite(state, 1, (size_t)n, f) == n;
    if (f) ok = fclose(f) == 0 && ok;
    free(state);
    fprintf(stderr, ok ? "saved to %s\n" : "cannot save to %s\n", path);
}

/* Parse one saved message at *p; 0 if it is not one. */
static int load_message(chat *c, char **p, const char *end) {
    int role, used = 0;
    unsigned long n;
    char saved;
    if (sscanf(*p, "%d %lu%n", &role, &n, &used) != 2 || role < 0 || role > 3 || n + 2 > (unsigned long)(end - *p) - (unsigned long)used) return 0;
    *p += used + 1;
    saved = (*p)[n];
    (*p)[n] = '\0';
    if (saved != '\n' || !say(c, (qwen3_role)role, *p)) return 0;
    *p += n + 1;
    return 1;
}

static void restore(chat *c, const char *path) {
    size_t n = 0;
    char *file = read_file(path, &n), *p = file;
    int count = 0, i, used = 0;
    if (!file || sscanf(file, "qwen3-chat %d%n", &count, &used) != 1) { fprintf(stderr, "%s is not a saved chat\n", path); free(file); return; }
    forget(c, 0);
    p += used + 1;
    for (i = 0; i < count && load_message(c, &p, file + n); i++) { }
    if (i < count) fprintf(stderr, "%s is damaged: %d of %d messages were read\n", path, i, count);
    else if (qwen3_seq_load(c->ctx, 0, p, (uint64_t)(file + n - p)) != QWEN3_OK)
        fprintf(stderr, "the messages were loaded, the evaluated state was not: %s\n", qwen3_ctx_error(c->ctx));
    else fprintf(stderr, "loaded %s: %d messages, %d tokens\n", path, count, qwen3_seq_len(c->ctx, 0));
    free(file);
}

static void stats(const chat *c) {
    const qwen3_info f = qwen3_get_info(c->model);
    const qwen3_stats s = qwen3_ctx_stats(c->ctx);
    fprintf(stderr, "%.0f million parameters on %s (%s); %d tokens in the context; %lld evaluated in prompts, %lld generated, %lld reused\n",
            (double)f.n_params * 1e-6, f.backend_name, f.device_name, qwen3_seq_len(c->ctx, 0), (long long)s.n_prefill, (long long)s.n_decode, (long long)s.n_reused);
}

/* Returns 0 to leave. *ok turns 0 if an answer failed. */
static int command(chat *c, const char *line, int *ok) {
    const char *arg = strchr(line, ' ');
    size_t n = arg ? (size_t)(arg++ - line) : strlen(line);
#define IS(name) (n == sizeof(name) - 1 && memcmp(line, name, n) == 0)
    if (IS("/quit") || IS("/exit"))  return 0;
    else if (IS("/reset"))           forget(c, c->n_msgs && c->msgs[0].role == QWEN3_SYSTEM);
    else if (IS("/stats"))           stats(c);
    else if (IS("/system") && arg)   set_system(c, arg);
    else if (IS("/save") && arg)     save(c, arg);
    else if (IS("/load") && arg)     restore(c, arg);
    else if (IS("/tool") && arg)     { if (say(c, QWEN3_TOOL, arg)) *ok &= reply(c); }
    else                             fputs(usage, stderr);
#undef IS
    return 1;
}

int main(int argc, char **argv) {
    static chat c;
    text line = {0, 0, 0};
    int ok = 1;
    c.opt = parse(argc, argv);
    c.colour = IS_TERMINAL(stdout);
    signal(SIGINT, on_interrupt);
    load(&c);
    if (c.opt.check) return check_numbers(&c);
    create_context(&c);
    load_tools(&c);
    if (c.opt.system) set_system(&c, c.opt.system);
    if (c.opt.prompt) ok = say(&c, QWEN3_USER, c.opt.prompt) && reply(&c);
    else {
        if (c.colour) { stats(&c); fputs("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat\n", stderr); }
        for (;;) {
            if (c.colour) { fputs("\n> ", stdout); fflush(stdout); }
            if (!read_line(&line)) break;
            if (line.bytes[0] == '/') { if (!command(&c, line.bytes, &ok)) break; }
            else if (line.n && say(&c, QWEN3_USER, line.bytes)) ok &= reply(&c);
        }
    }
    forget(&c, 0);
    qwen3_ctx_free(c.ctx);
    qwen3_free(c.model);
    free(c.tools_text); free(c.answer.bytes); free(line.bytes);
    return ok ? 0 : 3;
}
