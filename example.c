/* example - chat with a Qwen3 model in a terminal or a pipe. Usage: example --help
   Build: cc -O2 example.c -o example -lm -lpthread      (the Makefile can add CUDA)
   Exit status: 0 all went well, 1 no such model, 2 wrong usage, 3 an answer or a command failed. */
#define _DEFAULT_SOURCE                 /* isatty under -std=c99 */
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

/* ---- options ---------------------------------------------------------------------------------------- */
enum { PROMPT, SYSTEM, NO_THINK, TEMP, TOP_P, TOP_K, MIN_P, SEED, MAX, BUDGET, DRAFT, CTX, SHIFT, THREADS,
       TOOLS, HELD, CUDA = HELD + 3, CPU, DEVICES, UNPACK, NUL, THOUGHTS, HELP, N_OPTIONS };
static const struct { const char *name, *value; double high; const char *help; } options[N_OPTIONS] = {
    {"-p", "TEXT", 0, "ask this, print the answer, and leave"},       /* high > 0: a number from 0 to that */
    {"-s", "TEXT", 0, "system prompt (@FILE: from a file)"},
    {"--no-think", "", 0, "answer without thinking first"},
    {"--temp", "T", 100, "temperature; 0 is greedy (the model's advice is the default of these four)"},
    {"--top-p", "P", 1, "sample from the tokens that have this probability together"},
    {"--top-k", "K", 1e9, "sample from the K most probable tokens"},
    {"--min-p", "P", 1, "sample from tokens with P times the largest probability"},
    {"--seed", "N", 9e15, "of the random numbers (default 42)"},
    {"--max", "N", 1e9, "tokens in an answer at most"},
    {"--think-budget", "N", 1e9, "tokens of thinking at most"},
    {"--draft", "M", 0, "guess ahead by a smaller model, or by `lookup` of what was said: the same text, faster"},
    {"--ctx", "N", 1e9, "positions of context (default 4096)"},
    {"--shift", "", 0, "forget the oldest turns when the context is full"},
    {"--threads", "N", 256, "CPU threads (default: one a core)"},
    {"--tools", "FILE", 0, "tools the model may call, a JSON object a line; answer a call with /tool TEXT"},
    {"--json-schema", "FILE", 0, "answers are JSON that this schema allows"},
    {"--regex", "TEXT", 0, "answers match this regular expression"},
    {"--grammar", "FILE", 0, "answers are of this grammar, in llama.cpp's notation"},
    {"--cuda", "", 0, "insist on the GPU (default: the GPU if there is one)"}, {"--cpu", "", 0, "insist on the CPU"},
    {"--devices", "LIST", 0, "GPUs that share the model, as in 0,1"},
    {"--unpack", "", 0, "quantised weights become F16 on the GPU: more memory, more speed for small models"},
    {"-0", "", 0, "in a pipe, end each answer with a NUL byte instead of a newline"},
    {"--thoughts", "", 0, "in a pipe, print thoughts, too"}, {"--help", "", 0, "this"},
};
static const char *text[N_OPTIONS];     /* what was given after it; NULL: the option was not given */
static double number[N_OPTIONS];
static const char commands[] = "In the chat: /help /reset /system TEXT /save FILE /load FILE /tool TEXT /quit"
                               "; Ctrl-C stops an answer, Ctrl-D ends the chat.\n";

static void die(int status, const char *what, const char *detail) {
    fprintf(stderr, "example: %s%s%s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(status);
}

/* Fills text and number; returns the model's directory. */
static const char *parse(int argc, char **argv) {
    const char *model = NULL;
    for (int i = 1; i < argc; i++) {
        int o = 0;
        while (o < N_OPTIONS && strcmp(options[o].name, argv[i]) != 0) o++;
        if (o == N_OPTIONS && (argv[i][0] == '-' || model)) die(2, "unknown argument (see --help)", argv[i]);
        if (o == N_OPTIONS) { model = argv[i]; continue; }
        if (*options[o].value && i + 1 == argc) die(2, "missing value after", argv[i]);
        text[o] = *options[o].value ? argv[++i] : "";
        if (options[o].high <= 0) continue;
        char *end;
        number[o] = strtod(text[o], &end);
        if (end != text[o] && !*end && number[o] >= 0 && number[o] <= options[o].high) continue;
        fprintf(stderr, "example: %s: a number up to %g, not %s\n", argv[i - 1], options[o].high, argv[i]);
        exit(2);
    }
    if (model && !text[HELP]) return model;
    FILE *f = text[HELP] ? stdout : stderr;
    fputs("usage: example MODEL [options]    chat with a Qwen3 model (Hugging Face directory or GGUF file)\n", f);
    for (int o = 0; o < N_OPTIONS; o++)
        fprintf(f, "  %-14s %-4s %s\n", options[o].name, options[o].value, options[o].help);
    fputs(commands, f);
    exit(text[HELP] ? 0 : 2);
}

/* ---- strings and files ------------------------------------------------------------------------------ */
typedef struct string { char *bytes; size_t n, cap; } string;   /* grows; bytes[n] is NUL */

static void resize(string *s, size_t n) {
    if (n >= s->cap) s->bytes = (char *)realloc(s->bytes, s->cap = (n + 1) * 2);
    if (!s->bytes) die(3, "out of memory", NULL);
    s->bytes[s->n = n] = '\0';
}

static void append(string *s, const void *bytes, size_t n) {
    resize(s, s->n + n);
    memcpy(s->bytes + s->n - n, bytes, n);
}

/* Replace s by what comes before the next `end` (EOF: by all). Returns 0 if nothing more comes. */
static int read_until(string *s, FILE *f, int end) {
    int next;
    resize(s, 0);
    while ((next = getc(f)) != EOF && next != end) append(s, &(char){(char)next}, 1);
    return next != EOF || s->n > 0;
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
    qwen3_model *model, *draft_model; qwen3_ctx *ctx, *draft; qwen3_grammar *grammar;
    int positions;                      /* of ctx */
    qwen3_sampler sampler;
    string said;                        /* each message: its role as a digit, its text, NUL */
    string msgs;                        /* the same as an array of qwen3_msg, for describe */
    string tools, tools_file;           /* an array of const char *; the text that they point into */
    string answer;
    int terminal;                       /* stdout is one */
} chat;

/* ---- the conversation ------------------------------------------------------------------------------- */
static void add(string *said, qwen3_role role, const char *what) {
    append(said, &"0123"[role], 1);
    append(said, what, strlen(what) + 1);
}

/* Begin anew with this system prompt. Returns 0 if it is @FILE and cannot be read. */
static int set_system(string *said, const char *what) {
    string file = {NULL, 0, 0};
    const int ok = what[0] != '@' || read_file(&file, what + 1);
    if (ok) said->n = 0, add(said, QWEN3_SYSTEM, file.bytes ? file.bytes : what);
    free(file.bytes);
    return ok;
}

/* The evaluated sequence, the state of the random numbers and what was said go into one file. */
static int save(chat *c, const char *path) {
    qwen3_state s = {.path = path, .sampler = &c->sampler, .user = c->said.bytes, .user_size = c->said.n};
    const int ok = qwen3_seq_save(c->ctx, 0, &s) == QWEN3_OK;
    fprintf(stderr, ok ? "saved to %s\n" : "cannot save to %s: %s\n", path, qwen3_ctx_error(c->ctx));
    return ok;
}

/* The chat stays as it was if the file is no saved chat of this model. */
static int load(chat *c, const char *path) {
    const size_t before = c->said.n, room = 1 << 24;    /* for what was said there */
    resize(&c->said, before + room);
    qwen3_state s = {.path = path, .sampler = &c->sampler, .user = c->said.bytes + before, .user_size = room};
    const int ok = qwen3_seq_load(c->ctx, 0, &s) == QWEN3_OK;
    if (ok) memmove(c->said.bytes, s.user, s.user_size);
    resize(&c->said, ok ? s.user_size : before);
    fprintf(stderr, ok ? "loaded %s\n" : "cannot load %s: %s\n", path, qwen3_ctx_error(c->ctx));
    return ok;
}

/* The conversation as the library takes it, until it is described again. With --shift a quarter of the
   context is left for the answer. */
static qwen3_chat_desc describe(chat *c) {
    c->msgs.n = 0;
    for (const char *p = c->said.bytes, *end = p + c->said.n; p < end; p += strlen(p) + 1) {
        const qwen3_msg m = {.role = (qwen3_role)(*p - '0'), .text = p + 1};
        append(&c->msgs, &m, sizeof m);
    }
    return (qwen3_chat_desc){
        .msgs = (const qwen3_msg *)(void *)c->msgs.bytes, .n_msgs = (int)(c->msgs.n / sizeof(qwen3_msg)),
        .tools = (const char **)(void *)c->tools.bytes, .n_tools = (int)(c->tools.n / sizeof(char *)),
        .flags = (text[NO_THINK] ? QWEN3_CHAT_NO_THINK : 0) | (c->tools.n ? QWEN3_CHAT_TOOLS_AUTO : 0),
        .max_prompt = text[SHIFT] ? c->positions - c->positions / 4 : 0
    };
}

/* ---- answers ---------------------------------------------------------------------------------------- */
static volatile sig_atomic_t interrupted;
static int is_interrupted(void *user) { (void)user; return interrupted; }

/* A terminal obeys control characters, so it gets none but newline and tab from a model. */
static void print(const char *utf8, int n, int dimmed) {
    if (dimmed) fputs("\033[2m", stdout);
    for (int i = 0; i < n; i++) {
        const int byte = (unsigned char)utf8[i];
        const int c1 = byte == 0xC2 && (unsigned char)utf8[i + 1] < 0xA0;      /* U+0080 to U+009F */
        if (!c1 && byte != 0x7F && (byte >= 0x20 || byte == '\n' || byte == '\t')) putchar(byte);
        else { fputs("\xEF\xBF\xBD", stdout); i += c1; }
    }
    if (dimmed) fputs("\033[0m", stdout);
}

/* Thinking is dimmed on a terminal and left out of a pipe, unless it is asked for. */
static int put(const char *utf8, int n, int kind, void *user) {
    chat *c = (chat *)user;
    const int thinking = (kind & QWEN3_TEXT_THINKING) != 0;
    append(&c->answer, utf8, (size_t)n);
    if (c->terminal) print(utf8, n, thinking);
    else if (!thinking || text[THOUGHTS]) fwrite(utf8, 1, (size_t)n, stdout);
    fflush(stdout);
    return interrupted || ferror(stdout);
}

/* Let the model answer. Question and answer join the conversation, or neither does. Returns 0 on failure. */
static int reply(chat *c, qwen3_role role, const char *what) {
    const size_t n_before = c->said.n;
    add(&c->said, role, what);
    interrupted = 0, resize(&c->answer, 0);
    const qwen3_chat_desc d = describe(c);
    const qwen3_gen_desc g = {.sampler = &c->sampler, .grammar = c->grammar, .max_tokens = (int)number[MAX],
                              .think_budget = (int)number[BUDGET], .on_text = put, .user = c,
                              .draft_tokens = text[DRAFT] ? 8 : 0, .draft = c->draft};
    const qwen3_result r = qwen3_chat(c->ctx, 0, &d, &g);
    putchar(text[NUL] ? '\0' : '\n'), fflush(stdout);
    if (r >= 0) add(&c->said, QWEN3_ASSISTANT, c->answer.bytes);
    else c->said.n = n_before;
    if (r < 0) fprintf(stderr, "example: %s (the question is taken back)\n", qwen3_ctx_error(c->ctx));
    if (r == QWEN3_ERR_CONTEXT_FULL) fputs("/reset begins anew, --shift forgets the oldest turns\n", stderr);
    if (r == QWEN3_STOPPED) fputs("[stopped]\n", stderr);
    const qwen3_stats s = qwen3_ctx_stats(c->ctx);      /* of all that was said */
    if (c->terminal) fprintf(stderr, "[prompts %.0f tokens/s, answers %.1f]\n", 1e3 * (double)s.n_prefill /
                             (s.prefill_ms + 1e-9), 1e3 * (double)s.n_decode / (s.decode_ms + 1e-9));
    return r >= 0 && (r != QWEN3_STOPPED || c->terminal);
}

/* ---- commands --------------------------------------------------------------------------------------- */
/* A line that starts with '/'. Returns 0 if that failed. */
static int command(chat *c, char *line) {
    char *arg = strchr(line, ' ');
    if (arg) *arg++ = '\0';
    if (arg && strcmp(line, "/system") == 0) return set_system(&c->said, arg);
    if (arg && strcmp(line, "/save") == 0)   return save(c, arg);
    if (arg && strcmp(line, "/load") == 0)   return load(c, arg);
    if (arg && strcmp(line, "/tool") == 0)   return reply(c, QWEN3_TOOL, arg);
    if (strcmp(line, "/reset") != 0)         return fputs(commands, stderr), 1;
    c->said.n = c->said.n && c->said.bytes[0] == '0' + QWEN3_SYSTEM ? strlen(c->said.bytes) + 1 : 0;
    return 1;
}

/* Questions and commands, line by line, until there are no more. Returns 0 if one failed. */
static int talk(chat *c) {
    string line = {NULL, 0, 0}; int ok = 1;
    const qwen3_info f = qwen3_get_info(c->model);
    if (c->terminal) fprintf(stderr, "%.0f million parameters, %s, %.0f MB (%.2f bits a weight), on %s (%s). %s",
                             (double)f.n_params * 1e-6, f.weight_type, (double)f.weight_bytes * 1e-6,
                             8 * (double)f.weight_bytes / (double)f.n_params, f.backend_name, f.device_name, commands);
    while (c->terminal || !interrupted) {
        if (c->terminal) { fputs("\n> ", stdout); fflush(stdout); }
        if (!read_until(&line, stdin, '\n')) break;
        line.bytes[strcspn(line.bytes, "\r")] = '\0';
        if (strcmp(line.bytes, "/quit") == 0) break;
        if (line.bytes[0] == '/') ok &= command(c, line.bytes);
        else if (line.bytes[0]) ok &= reply(c, QWEN3_USER, line.bytes);
    }
    free(line.bytes);
    return ok;
}

/* ---- start ------------------------------------------------------------------------------------------ */
/* Not sigaction: Windows has none, and elsewhere, too, a call that waits for input goes on after this. */
static void on_interrupt(int which) { interrupted = 1; signal(which, on_interrupt); }

#ifdef _WIN32
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
}
#else
  #define set_up(argc, argv) ((void)0)          /* they are as they should be */
#endif

static int show_progress(float done, void *user) {
    (void)user;
    if (isatty(2)) fprintf(stderr, done < 1 ? "\rloading %3d %%" : "\r\033[K", (int)(done * 100));
    return interrupted;
}

/* Load on the GPU if there is one and it is wanted, else on the CPU, and create a context. */
static qwen3_ctx *open_model(const char *path, qwen3_model **model) {
    char err[512] = "", *at = (char *)text[DEVICES]; int devices[16]; qwen3_ctx *ctx;
    qwen3_load_desc d = {.path = path, .devices = devices, .progress = show_progress};
    d.flags = text[UNPACK] ? QWEN3_LOAD_UNPACK : 0;
    for (; at && *at && d.n_devices < 16; at += *at == ',') devices[d.n_devices++] = (int)strtol(at, &at, 10);
#ifdef QWEN3_WITH_CUDA
    d.backend = text[CPU] ? NULL : qwen3_cuda_backend();
#endif
    const int insists = text[CUDA] || text[DEVICES];
    if (insists && !d.backend) die(2, "no GPU: not in this program; `make cuda` builds it in", NULL);
    qwen3_result r = qwen3_load(model, &d, err, sizeof err);
    if (d.backend && !insists && (r == QWEN3_ERR_DEVICE || r == QWEN3_ERR_DEVICE_MEMORY))
        d.backend = NULL, r = qwen3_load(model, &d, err, sizeof err);
    if (r != QWEN3_OK) die(1, err, NULL);
    const qwen3_ctx_desc k = {(int)number[CTX], .threads = (int)number[THREADS], .cancel = is_interrupted,
                              .invariant = text[DRAFT] != NULL};
    if (qwen3_ctx_create(&ctx, *model, &k, err, sizeof err) != QWEN3_OK) die(1, "no context", err);
    return ctx;
}

static void start(chat *c, const char *path) {
    c->ctx = open_model(path, &c->model);
    if (text[DRAFT] && strcmp(text[DRAFT], "lookup")) c->draft = open_model(text[DRAFT], &c->draft_model);
    const qwen3_info f = qwen3_get_info(c->model);
    c->positions = number[CTX] > 0 ? (int)number[CTX] : f.max_ctx < 4096 ? f.max_ctx : 4096;
    c->sampler = f.sampler;
    c->sampler.rng = text[SEED] ? (uint64_t)number[SEED] : 42;
    if (text[TEMP])  c->sampler.temperature = (float)number[TEMP];
    if (text[TOP_P]) c->sampler.top_p = (float)number[TOP_P];
    if (text[TOP_K]) c->sampler.top_k = (int)number[TOP_K];
    if (text[MIN_P]) c->sampler.min_p = (float)number[MIN_P];
}

/* Each line of a file is a tool. */
static void read_tools(chat *c, const char *path) {
    if (!read_file(&c->tools_file, path)) exit(2);
    for (char *line = strtok(c->tools_file.bytes, "\r\n"); line; line = strtok(NULL, "\r\n"))
        append(&c->tools, &line, sizeof line);
}

/* Answers are to be of a grammar: an expression, or what a file has. */
static void hold(chat *c, const char *what, int kind) {
    char err[512] = "";
    string s = {NULL, 0, 0};
    if (kind == QWEN3_GRAMMAR_REGEX) append(&s, what, strlen(what));
    else if (!read_file(&s, what)) exit(2);
    const qwen3_grammar_desc d = {(qwen3_grammar_kind)kind, s.bytes, s.n, 0, 0, 0, 0};
    if (qwen3_grammar_create(&c->grammar, c->model, &d, err, sizeof err) != QWEN3_OK) die(2, what, err);
}

int main(int argc, char **argv) {
    static chat c;
    set_up(&argc, argv); signal(SIGINT, on_interrupt);
    const char *path = parse(argc, argv);
    c.terminal = isatty(1);
    if (text[SYSTEM] && !set_system(&c.said, text[SYSTEM])) return 2;
    start(&c, path);
    if (text[TOOLS]) read_tools(&c, text[TOOLS]);
    for (int i = 0; i < 3; i++) if (text[HELD + i] && !c.grammar) hold(&c, text[HELD + i], i);
    int ok = text[PROMPT] ? reply(&c, QWEN3_USER, text[PROMPT]) : talk(&c);
    qwen3_ctx_free(c.ctx); qwen3_ctx_free(c.draft); qwen3_grammar_free(c.grammar);
    qwen3_free(c.model); qwen3_free(c.draft_model);
    if (fflush(stdout) != 0 || ferror(stdout)) die(3, "cannot write the output", NULL);
    return ok ? 0 : 3;
}
