/* example - chat with a Qwen3 model in a terminal or a pipe. Usage: example --help
   Build: cc -O2 example.c -o example -lm -lpthread      (the Makefile can add CUDA)
   Exit status: 0 all went well, 1 the model cannot be used, 2 wrong usage, 3 an answer or a command failed. */
#ifndef _DEFAULT_SOURCE
  #define _DEFAULT_SOURCE               /* sigaction and isatty under -std=c99 */
#endif
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#ifdef _WIN32
  #include <io.h>
  #include <shellapi.h>
  #define isatty _isatty
#endif
#ifndef QWEN3_WITH_CUDA
  #define qwen3_cuda_backend() ((const qwen3_backend *)NULL)
#endif

/* ---- options ---------------------------------------------------------------------------------------- */
enum { PROMPT, SYSTEM, NO_THINK, TEMP, TOP_P, TOP_K, MIN_P, SEED, MAX, BUDGET, CTX, SHIFT, THREADS, TOOLS, CUDA, CPU,
       NUL, THOUGHTS, HELP, N_OPTIONS };
static const struct { const char *name, *value; double low, high; const char *help; } options[N_OPTIONS] = {
    {"-p", "TEXT", 0, 0, "ask this, print the answer, and leave"},       /* high > 0: a number between these */
    {"-s", "TEXT", 0, 0, "system prompt (@FILE: from a file)"},
    {"--no-think", "", 0, 0, "answer without thinking first"},
    {"--temp", "T", 0, 100, "temperature; 0 is greedy (the model's advice is the default of these four)"},
    {"--top-p", "P", 0, 1, "sample from the tokens that have this probability together"},
    {"--top-k", "K", 0, 1e9, "sample from the K most probable tokens"},
    {"--min-p", "P", 0, 1, "sample from tokens with P times the largest probability"},
    {"--seed", "N", 0, 9e15, "of the random numbers (default 42)"},
    {"--max", "N", 0, 1e9, "tokens in an answer at most"},
    {"--think-budget", "N", 0, 1e9, "tokens of thinking at most"},
    {"--ctx", "N", 1, 1e9, "positions of context (default 4096)"},
    {"--shift", "", 0, 0, "forget the oldest turns when the context is full"},
    {"--threads", "N", 0, 256, "CPU threads (default: one a core)"},
    {"--tools", "FILE", 0, 0, "tools the model may call, a JSON object a line; answer a call with /tool TEXT"},
    {"--cuda", "", 0, 0, "insist on the GPU (default: the GPU if there is one)"},
    {"--cpu", "", 0, 0, "insist on the CPU"},
    {"-0", "", 0, 0, "in a pipe, end each answer with a NUL byte instead of a newline"},
    {"--thoughts", "", 0, 0, "in a pipe, print thoughts, too"},
    {"--help", "", 0, 0, "this"},
};
static const char *text[N_OPTIONS];     /* what was given after it; NULL: the option was not given */
static double number[N_OPTIONS];

static const char commands[] = "In the chat: /help /reset /system TEXT /save FILE /load FILE /tool TEXT /quit; "
                               "Ctrl-C stops an answer, Ctrl-D ends the chat.\n";

static void die(int status, const char *what, const char *detail) {
    fprintf(stderr, "example: %s%s%s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(status);
}

/* Fills text and number; returns the model's directory. */
static const char *parse(int argc, char **argv) {
    const char *model = NULL;
    for (int i = 1; i < argc; i++) {
        int o = 0;
        char *end;
        while (o < N_OPTIONS && strcmp(options[o].name, argv[i]) != 0) o++;
        if (o == N_OPTIONS && (argv[i][0] == '-' || model)) die(2, "unknown argument (see --help)", argv[i]);
        if (o == N_OPTIONS) { model = argv[i]; continue; }
        if (*options[o].value && i + 1 == argc) die(2, "missing value after", argv[i]);
        text[o] = *options[o].value ? argv[++i] : "";
        if (options[o].high <= 0) continue;
        number[o] = strtod(text[o], &end);
        if (end != text[o] && !*end && number[o] >= options[o].low && number[o] <= options[o].high) continue;
        fprintf(stderr, "example: %s takes a number from %g to %g, not %s\n", options[o].name, options[o].low,
                options[o].high, text[o]);
        exit(2);
    }
    if (model && !text[HELP]) return model;
    FILE *f = text[HELP] ? stdout : stderr;
    fputs("usage: example MODEL_DIR [options]    chat with a Qwen3 model (Hugging Face directory)\n", f);
    for (int o = 0; o < N_OPTIONS; o++) fprintf(f, "  %-14s %-4s %s\n", options[o].name, options[o].value, options[o].help);
    fputs(commands, f);
    exit(text[HELP] ? 0 : 2);
}

/* ---- strings and files ------------------------------------------------------------------------------ */
typedef struct string { char *bytes; size_t n, cap; } string;   /* grows; bytes[n] is NUL */

static void *room(void *block, size_t size) {
    block = realloc(block, size);
    if (!block) die(3, "out of memory", NULL);
    return block;
}

static void append(string *s, const char *bytes, size_t n) {
    if (s->n + n >= s->cap) s->bytes = (char *)room(s->bytes, s->cap = (s->n + n + 1) * 2);
    memcpy(s->bytes + s->n, bytes, n);
    s->n += n;
    s->bytes[s->n] = '\0';
}

/* Replace s by what comes before the next `end` (EOF: by all). Returns 0 if nothing more comes. */
static int read_until(string *s, FILE *f, int end) {
    int next = getc(f);
    const int more = next != EOF;
    s->n = 0;
    append(s, "", 0);
    for (; next != EOF && next != end; next = getc(f)) { const char c = (char)next; append(s, &c, 1); }
    return more;
}

/* Replace s by a file (path in UTF-8). Returns 0 and says why if it cannot be read. */
static int read_file(string *s, const char *path) {
#ifdef _WIN32
    static wchar_t wide[32768];
    FILE *f = MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 32768) ? _wfopen(wide, L"rb") : NULL;
#else
    FILE *f = fopen(path, "rb");
#endif
    const int ok = f && (read_until(s, f, EOF) || !ferror(f));
    if (!ok) fprintf(stderr, "example: cannot read %s: %s\n", path, strerror(errno));
    if (f) fclose(f);
    return ok;
}

typedef struct chat {
    qwen3_model *model;
    qwen3_ctx *ctx;
    int positions;                      /* of ctx */
    qwen3_sampler sampler;
    string said;                        /* each message: its role as a digit, its text, NUL */
    string msgs;                        /* the same as an array of qwen3_msg, for describe */
    string tools_file; const char *tools[64]; int n_tools;
    string answer;
    int terminal, dimmed;               /* stdout is one; what is being printed on it is thinking */
} chat;

/* ---- the conversation ------------------------------------------------------------------------------- */
static void add(string *said, qwen3_role role, const char *what) {
    const char digit = (char)('0' + role);
    append(said, &digit, 1);
    append(said, what, strlen(what) + 1);
}

/* Bytes of the message at p; of the system prompt at the beginning, if there is one */
static size_t length(const char *p) { return strlen(p) + 1; }
static size_t system_length(const string *said) {
    return said->n && said->bytes[0] == '0' + QWEN3_SYSTEM ? length(said->bytes) : 0;
}

/* Begin anew with this system prompt. Returns 0 if it is @FILE and cannot be read. */
static int set_system(string *said, const char *what) {
    string file = {NULL, 0, 0};
    const int ok = what[0] != '@' || read_file(&file, what + 1);
    if (ok) { said->n = 0; add(said, QWEN3_SYSTEM, what[0] == '@' ? file.bytes : what); }
    free(file.bytes);
    return ok;
}

/* The evaluated sequence, the state of the random numbers and what was said go into one file. */
static int save(chat *c, const char *path) {
    qwen3_state s = {path, NULL, 0, &c->sampler, c->said.bytes, c->said.n};
    const int ok = qwen3_seq_save(c->ctx, 0, &s) == QWEN3_OK;
    fprintf(stderr, ok ? "saved to %s\n" : "cannot save to %s: %s\n", path, qwen3_ctx_error(c->ctx));
    return ok;
}

/* The chat stays as it was if the file is no saved chat of this model. */
static int load(chat *c, const char *path) {
    qwen3_state s = {path, NULL, 0, NULL, NULL, 0};
    int ok = qwen3_seq_load(c->ctx, 0, &s) == QWEN3_OK;         /* says how long the conversation is */
    if (ok) {
        string said = {(char *)room(NULL, s.user_size + 1), s.user_size, s.user_size + 1};
        s.user = said.bytes;
        s.sampler = &c->sampler;
        ok = qwen3_seq_load(c->ctx, 0, &s) == QWEN3_OK;
        said.bytes[said.n] = '\0';
        if (ok) { string old = c->said; c->said = said; said = old; }
        free(said.bytes);
    }
    fprintf(stderr, ok ? "loaded %s\n" : "cannot load %s: %s\n", path, qwen3_ctx_error(c->ctx));
    return ok;
}

/* The conversation as the library takes it, until the next one is described. With --shift it leaves the oldest turns
   out where there would be no room for an answer. */
static qwen3_chat_desc describe(chat *c) {
    const int answer = number[MAX] > 0 && number[MAX] < c->positions ? (int)number[MAX] : c->positions / 4;
    qwen3_chat_desc d;
    memset(&d, 0, sizeof d);
    c->msgs.n = 0;
    for (const char *p = c->said.bytes, *end = p + c->said.n; p < end; p += length(p)) {
        const qwen3_msg m = {(qwen3_role)(*p - '0'), p + 1, NULL, NULL, 0};
        append(&c->msgs, (const char *)&m, sizeof m);
        d.n_msgs++;
    }
    d.msgs = (const qwen3_msg *)(const void *)c->msgs.bytes;
    d.tools = c->tools; d.n_tools = c->n_tools;
    d.flags = text[NO_THINK] ? QWEN3_CHAT_NO_THINK : 0;
    d.max_prompt = text[SHIFT] ? c->positions - answer : 0;
    return d;
}

/* ---- answers ---------------------------------------------------------------------------------------- */
static volatile sig_atomic_t interrupted;
static int is_interrupted(void *user) { (void)user; return interrupted; }

/* A terminal obeys control characters, so it gets none but newline and tab from a model; a pipe gets all. */
static void print(chat *c, const char *utf8, int n, int dimmed) {
    if (c->terminal && dimmed != c->dimmed) fputs(dimmed ? "\033[2m" : "\033[0m", stdout);
    c->dimmed = dimmed;
    for (int i = 0; i < n; i++) {
        const int byte = (unsigned char)utf8[i];
        const int c1 = byte == 0xC2 && i + 1 < n && (unsigned char)utf8[i + 1] < 0xA0;     /* U+0080 to U+009F */
        const int control = c1 || byte == 0x7F || (byte < 0x20 && byte != '\n' && byte != '\t');
        if (!c->terminal || !control) putchar(byte);
        else { fputs("\xEF\xBF\xBD", stdout); i += c1; }
    }
}

/* Thinking is dimmed on a terminal and left out of a pipe, unless it is asked for. */
static int put(const char *utf8, int n, int kind, void *user) {
    chat *c = (chat *)user;
    const int thinking = (kind & QWEN3_TEXT_THINKING) != 0;
    append(&c->answer, utf8, (size_t)n);
    if (thinking && !c->terminal && !text[THOUGHTS]) return interrupted;
    print(c, utf8, n, thinking);
    fflush(stdout);
    return interrupted || ferror(stdout);
}

/* Let the model answer. Question and answer join the conversation, or neither does. Returns 0 if that failed. */
static int reply(chat *c, qwen3_role role, const char *what) {
    const qwen3_stats before = qwen3_ctx_stats(c->ctx);
    qwen3_gen_desc g;
    memset(&g, 0, sizeof g);
    g.sampler = &c->sampler; g.on_text = put; g.user = c;
    g.max_tokens = (int)number[MAX]; g.think_budget = (int)number[BUDGET];
    add(&c->said, role, what);
    const size_t question = length(what) + 1;
    interrupted = 0;
    c->answer.n = 0;
    append(&c->answer, "", 0);
    const qwen3_chat_desc d = describe(c);
    const qwen3_result r = qwen3_chat(c->ctx, 0, &d, &g);
    print(c, text[NUL] ? "" : "\n", 1, 0);
    fflush(stdout);
    if (r >= 0) add(&c->said, QWEN3_ASSISTANT, c->answer.bytes);
    else c->said.n -= question;
    if (r < 0) fprintf(stderr, "example: %s\n", qwen3_ctx_error(c->ctx));
    if (r == QWEN3_ERR_CONTEXT_FULL) fputs("The question is taken back: /reset begins anew, --shift forgets "
                                           "the oldest turns, --ctx N makes room.\n", stderr);
    if (r == QWEN3_STOPPED) fputs("[stopped]\n", stderr);
    if (c->terminal) {
        int n;
        const qwen3_stats s = qwen3_ctx_stats(c->ctx);
        qwen3_seq_tokens(c->ctx, 0, &n);
        const double prompt = (double)(s.n_prefill - before.n_prefill), made = (double)(s.n_decode - before.n_decode);
        fprintf(stderr, "[prompt %.0f tokens, %.0f/s; answer %.0f, %.1f/s; %d of %d in the context]\n",
                prompt, 1e3 * prompt / (s.prefill_ms - before.prefill_ms + 1e-9),
                made, 1e3 * made / (s.decode_ms - before.decode_ms + 1e-9), n, c->positions);
    }
    return r >= 0 && (r != QWEN3_STOPPED || c->terminal);
}

/* ---- commands --------------------------------------------------------------------------------------- */
/* A line that starts with '/'. Returns 0 to leave; *ok turns 0 if it failed. */
static int command(chat *c, char *line, int *ok) {
    char *arg = strchr(line, ' ');
    if (arg) *arg++ = '\0';
    if (strcmp(line, "/quit") == 0) return 0;
    if (strcmp(line, "/reset") == 0)              c->said.n = system_length(&c->said);
    else if (strcmp(line, "/system") == 0 && arg) *ok &= set_system(&c->said, arg);
    else if (strcmp(line, "/save") == 0 && arg)   *ok &= save(c, arg);
    else if (strcmp(line, "/load") == 0 && arg)   *ok &= load(c, arg);
    else if (strcmp(line, "/tool") == 0 && arg)   *ok &= reply(c, QWEN3_TOOL, arg);
    else                                          fputs(commands, stderr);
    return 1;
}

/* Questions and commands, line by line, until there are no more. Returns 0 if one failed. */
static int talk(chat *c) {
    string line = {NULL, 0, 0};
    int ok = 1, go_on = 1;
    const qwen3_info f = qwen3_get_info(c->model);
    if (c->terminal) fprintf(stderr, "%.0f million parameters, %s, %.0f MB (%.1f bits each) on %s (%s). %s",
                             (double)f.n_params * 1e-6, f.weight_type, (double)f.weight_bytes * 1e-6,
                             8 * (double)f.weight_bytes / (double)f.n_params, f.backend_name, f.device_name, commands);
    while (go_on && (c->terminal || !interrupted)) {
        if (c->terminal) { fputs("\n> ", stdout); fflush(stdout); }
        if (!read_until(&line, stdin, '\n')) break;
        line.bytes[strcspn(line.bytes, "\r")] = '\0';
        if (line.bytes[0] == '/') go_on = command(c, line.bytes, &ok);
        else if (line.bytes[0]) ok &= reply(c, QWEN3_USER, line.bytes);
    }
    free(line.bytes);
    return ok;
}

/* ---- start ------------------------------------------------------------------------------------------ */
#ifdef _WIN32
static void on_interrupt(int which) { interrupted = 1; signal(which, on_interrupt); }

/* Arguments in UTF-8; a console that shows it, and colours */
static void set_up(int *argc, char **argv) {
    static char utf8[3 * 32768], *at = utf8;
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), argc);
    for (int i = 0; wide && i < *argc; i++) {
        argv[i] = at;
        at += WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, at, (int)(utf8 + sizeof utf8 - at), NULL, NULL);
    }
    SetConsoleOutputCP(CP_UTF8);
    SetConsoleCP(CP_UTF8);
    SetConsoleMode(GetStdHandle(STD_OUTPUT_HANDLE), 7);     /* processed, wrapped, with escape sequences */
    signal(SIGINT, on_interrupt);
}
#else
static void on_interrupt(int which) { (void)which; interrupted = 1; }

static void set_up(int *argc, char **argv) {
    struct sigaction action;
    (void)argc; (void)argv;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, NULL);
}
#endif

static int show_progress(float done, void *user) {
    (void)user;
    if (isatty(2)) fprintf(stderr, done < 1 ? "\rloading %3d %%" : "\r\033[K", (int)(done * 100));
    return interrupted;
}

/* Load on the GPU if there is one and it is wanted, else on the CPU, and create the context. */
static void start(chat *c, const char *path) {
    static qwen3_load_desc d;           /* all zero: all defaults */
    static qwen3_ctx_desc k;
    char err[512] = "";
    d.path = path;
    d.progress = show_progress;
    d.backend = text[CPU] ? NULL : qwen3_cuda_backend();
    if (text[CUDA] && !d.backend) die(2, "--cuda: not in this program; `make cuda` builds it in", NULL);
    qwen3_result r = qwen3_load(&c->model, &d, err, sizeof err);
    if (d.backend && !text[CUDA] && (r == QWEN3_ERR_DEVICE || r == QWEN3_ERR_DEVICE_MEMORY)) {
        d.backend = NULL;
        r = qwen3_load(&c->model, &d, err, sizeof err);
    }
    if (r != QWEN3_OK) die(1, err, NULL);
    const qwen3_info f = qwen3_get_info(c->model);
    if (f.n_tokens == 0) die(1, "the model has no tokenizer files, so it cannot chat", path);
    k.max_ctx = c->positions = text[CTX] ? (int)number[CTX] : f.max_ctx < 4096 ? f.max_ctx : 4096;
    k.threads = (int)number[THREADS];
    k.cancel = is_interrupted;
    if (qwen3_ctx_create(&c->ctx, c->model, &k, err, sizeof err) != QWEN3_OK) die(1, "cannot create a context", err);
    c->sampler = f.sampler;
    c->sampler.rng = text[SEED] ? (uint64_t)number[SEED] : 42;
    if (text[TEMP])  c->sampler.temperature = (float)number[TEMP];
    if (text[TOP_P]) c->sampler.top_p = (float)number[TOP_P];
    if (text[TOP_K]) c->sampler.top_k = (int)number[TOP_K];
    if (text[MIN_P]) c->sampler.min_p = (float)number[MIN_P];
}

/* Each line of a file is a tool; one that cannot be is named at once. */
static void read_tools(chat *c, const char *path) {
    char err[256];
    if (!read_file(&c->tools_file, path)) exit(2);
    for (char *line = strtok(c->tools_file.bytes, "\r\n"); line; line = strtok(NULL, "\r\n")) {
        if (c->n_tools == 64) die(2, "more than 64 tools in", path);
        c->tools[c->n_tools++] = line;
    }
    const size_t before = c->said.n;
    add(&c->said, QWEN3_USER, "hi");
    const qwen3_chat_desc d = describe(c);
    if (qwen3_chat_render(c->model, &d, NULL, 0, err, sizeof err) < 0) die(2, path, err);
    c->said.n = before;
}

int main(int argc, char **argv) {
    static chat c;
    set_up(&argc, argv);
    const char *path = parse(argc, argv);
    c.terminal = isatty(1);
    if (text[SYSTEM] && !set_system(&c.said, text[SYSTEM])) return 2;
    start(&c, path);
    if (text[TOOLS]) read_tools(&c, text[TOOLS]);
    int ok = text[PROMPT] ? reply(&c, QWEN3_USER, text[PROMPT]) : talk(&c);
    if (fflush(stdout) != 0 || ferror(stdout)) { fputs("example: cannot write the output\n", stderr); ok = 0; }
    qwen3_ctx_free(c.ctx);
    qwen3_free(c.model);
    return ok ? 0 : 3;
}
