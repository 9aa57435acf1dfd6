/* example - chat with a Qwen3 model in a terminal or a pipe. Usage: example --help
   Build: cc -O2 example.c -o example -lm -lpthread      (the Makefile adds CUDA where nvcc is found)
   Exit status: 0 all went well, 1 the model cannot be used, 2 wrong usage, 3 an answer or a check failed.   */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include "tools/check.h"
#include "tools/cli.h"
#include "tools/conversation.h"
#include <signal.h>
#ifndef QWEN3_WITH_CUDA
  #define qwen3_cuda_backend() ((const qwen3_backend *)NULL)
#endif

enum { PROMPT, SYSTEM, NO_THINK, TEMP, TOP_P, TOP_K, MIN_P, SEED, MAX, BUDGET, CTX, THREADS, TOOLS, CUDA, CPU, CHECK,
       NUL, THOUGHTS, HELP, N_OPTIONS };
static const cli_option options[N_OPTIONS] = {
    {"-p", "TEXT", 0, 0, "ask this, print the answer, and leave"},
    {"-s", "TEXT", 0, 0, "system prompt (@FILE: from a file)"},
    {"--no-think", NULL, 0, 0, "answer without thinking first"},
    {"--temp", "T", 0, 100, "temperature; 0 is greedy (the model's advice is the default of these four)"},
    {"--top-p", "P", 0, 1, "sample from the tokens that have this probability together"},
    {"--top-k", "K", 0, 1e9, "sample from the K most probable tokens"},
    {"--min-p", "P", 0, 1, "sample from tokens with P times the largest probability"},
    {"--seed", "N", 0, 9e15, "of the random numbers (default 42)"},
    {"--max", "N", 0, 1e9, "tokens in an answer at most"},
    {"--think-budget", "N", 0, 1e9, "tokens of thinking at most"},
    {"--ctx", "N", 1, 1e9, "positions of context (default 4096)"},
    {"--threads", "N", 0, 256, "CPU threads (default: one a core)"},
    {"--tools", "FILE", 0, 0, "tools the model may call, a JSON object a line; answer a call with /tool TEXT"},
    {"--cuda", NULL, 0, 0, "insist on the GPU (default: the GPU if there is one)"},
    {"--cpu", NULL, 0, 0, "insist on the CPU"},
    {"--check", NULL, 0, 0, "no chat: how large the numbers in the model get on the text of -p (or one of its own),\n"
                            "                      and whether the default cache is precise enough for it"},
    {"-0", NULL, 0, 0, "in a pipe, end each answer with a NUL byte instead of a newline"},
    {"--thoughts", NULL, 0, 0, "in a pipe, print thoughts, too"},
    {"--help", NULL, 0, 0, "this"},
};
static const char *text[N_OPTIONS];      /* what was given; NULL: the option was not */
static double number[N_OPTIONS];

static const char usage[] = "usage: example MODEL_DIR [options]    chat with a Qwen3 model (Hugging Face directory)\n";
static const char commands[] =
    "In the chat: /help /reset /system TEXT /save FILE /load FILE /tool TEXT /stats /quit; Ctrl-C stops an answer,\n"
    "Ctrl-D ends the chat.\n";

typedef struct chat {
    qwen3_model *model;
    qwen3_ctx *ctx;
    qwen3_sampler sampler;
    conversation said;
    const char *tools[64]; int n_tools;
    cli_string answer;
    int colour, dimmed;                 /* stdout is a terminal; what is being printed on it is thinking */
} chat;

static volatile sig_atomic_t interrupted;
static void on_interrupt(int signal_number) { (void)signal_number; interrupted = 1; }
static int is_interrupted(void *user) { (void)user; return interrupted; }

static int show_progress(float done, void *user) {
    (void)user;
    cli_progress("loading", (double)done);
    return interrupted;
}

/* Load on the GPU if there is one and it is wanted, else on the CPU, and create the context. */
static void load(chat *c, const char *path) {
    static qwen3_load_desc d;           /* all zero: all defaults */
    static qwen3_ctx_desc k;
    char err[512];
    qwen3_result r = QWEN3_ERR_DEVICE;
    d.path = path;
    d.progress = CLI_IS_TERMINAL(stderr) ? show_progress : NULL;
    d.backend = text[CPU] || text[CHECK] ? NULL : qwen3_cuda_backend();
    if (text[CUDA] && !d.backend) cli_die(2, "--cuda: not in this program; make builds it in where nvcc is found", NULL);
    if (d.backend) r = qwen3_load(&c->model, &d, err, sizeof err);
    if ((r == QWEN3_ERR_DEVICE || r == QWEN3_ERR_DEVICE_MEMORY) && !text[CUDA]) {
        d.backend = NULL;
        r = qwen3_load(&c->model, &d, err, sizeof err);
    }
    if (r != QWEN3_OK) cli_die(1, qwen3_result_string(r), err);
    if (qwen3_get_info(c->model).n_tokens == 0) cli_die(1, "the model has no tokenizer files, so it cannot chat", path);
    k.max_ctx = (int)number[CTX];
    k.threads = (int)number[THREADS];
    k.cancel = is_interrupted;
    r = qwen3_ctx_create(&c->ctx, c->model, &k, err, sizeof err);
    if (r != QWEN3_OK) cli_die(1, "cannot create a context", err);
    c->sampler = qwen3_get_info(c->model).sampler;
    c->sampler.rng = text[SEED] ? (uint64_t)number[SEED] : 42;
    if (text[TEMP])  c->sampler.temperature = (float)number[TEMP];
    if (text[TOP_P]) c->sampler.top_p = (float)number[TOP_P];
    if (text[TOP_K]) c->sampler.top_k = (int)number[TOP_K];
    if (text[MIN_P]) c->sampler.min_p = (float)number[MIN_P];
}

static void set_system(chat *c, const char *what) {
    char *file = what[0] == '@' ? cli_read_file(what + 1) : NULL;
    if (what[0] == '@' && !file) { fprintf(stderr, "cannot read %s\n", what + 1); return; }
    conversation_cut(&c->said, 0);
    conversation_add(&c->said, QWEN3_SYSTEM, file ? file : what);
    free(file);
}

/* Thinking is dimmed on a terminal and left out of a pipe, unless it is asked for. */
static int put(const char *utf8, int n, int kind, void *user) {
    chat *c = (chat *)user;
    const int thinking = (kind & QWEN3_TEXT_THINKING) != 0;
    cli_append(&c->answer, utf8, (size_t)n);
    if (thinking && !c->colour && !text[THOUGHTS]) return interrupted;
    if (thinking != c->dimmed && c->colour) fputs(thinking ? "\033[2m" : "\033[0m", stdout);
    c->dimmed = thinking;
    fwrite(utf8, 1, (size_t)n, stdout);
    fflush(stdout);
    return interrupted || ferror(stdout);
}

static double per_second(int64_t n, double ms) { return ms > 0 ? 1e3 * (double)n / ms : 0; }

/* What happened since `before` */
static void show_stats(const chat *c, const qwen3_stats *before) {
    const qwen3_stats s = qwen3_ctx_stats(c->ctx);
    const int64_t prompt = s.n_prefill - before->n_prefill, made = s.n_decode - before->n_decode;
    fprintf(stderr, "[%lld prompt tokens, %.0f/s; %lld generated, %.1f/s; %lld reused]\n",
            (long long)prompt, per_second(prompt, s.prefill_ms - before->prefill_ms), (long long)made,
            per_second(made, s.decode_ms - before->decode_ms), (long long)(s.n_reused - before->n_reused));
}

/* Let the model answer what is said now; both join the conversation. Returns 0 if that failed. */
static int reply(chat *c, qwen3_role role, const char *what) {
    const qwen3_stats before = qwen3_ctx_stats(c->ctx);
    static qwen3_chat_desc d;
    static qwen3_gen_desc g;
    qwen3_result r;
    conversation_add(&c->said, role, what);
    d.msgs = c->said.msgs; d.n_msgs = c->said.n; d.tools = c->tools; d.n_tools = c->n_tools;
    d.flags = text[NO_THINK] ? QWEN3_CHAT_NO_THINK : 0;
    g.sampler = &c->sampler; g.on_text = put; g.user = c;
    g.max_tokens = (int)number[MAX]; g.think_budget = (int)number[BUDGET];
    interrupted = 0;
    c->answer.n = 0;
    cli_append(&c->answer, "", 0);
    r = qwen3_chat(c->ctx, 0, &d, &g);
    if (c->dimmed && c->colour) fputs("\033[0m", stdout);
    c->dimmed = 0;
    putchar(text[NUL] ? '\0' : '\n');
    fflush(stdout);
    if (r < 0) fprintf(stderr, "example: %s: %s\n", qwen3_result_string(r), qwen3_ctx_error(c->ctx));
    if (r == QWEN3_STOPPED && c->colour) fputs("[stopped]\n", stderr);
    if (c->colour) { fputs("\033[2m", stderr); show_stats(c, &before); fputs("\033[0m", stderr); }
    interrupted = 0;
    conversation_add(&c->said, QWEN3_ASSISTANT, c->answer.bytes);
    return r >= 0;
}

/* ---- commands ------------------------------------------------------------------------------------------------- */
static void show_model(const chat *c) {
    const qwen3_info f = qwen3_get_info(c->model);
    qwen3_stats start;
    int n;
    qwen3_seq_tokens(c->ctx, 0, &n);
    memset(&start, 0, sizeof start);
    fprintf(stderr, "%.0f million parameters on %s (%s); %d tokens in the context\n",
            (double)f.n_params * 1e-6, f.backend_name, f.device_name, n);
    show_stats(c, &start);
}

/* A line that starts with '/'. Returns 0 to leave; *ok turns 0 if an answer failed. */
static int command(chat *c, char *line, int *ok) {
    char *arg = strchr(line, ' ');
    const int prompt = c->said.n > 0 && c->said.msgs[0].role == QWEN3_SYSTEM;
    if (arg) *arg++ = '\0';
    if (strcmp(line, "/quit") == 0)                return 0;
    else if (strcmp(line, "/reset") == 0)          conversation_cut(&c->said, prompt);
    else if (strcmp(line, "/stats") == 0)          show_model(c);
    else if (strcmp(line, "/system") == 0 && arg)  set_system(c, arg);
    else if (strcmp(line, "/save") == 0 && arg)    conversation_save(&c->said, c->ctx, arg);
    else if (strcmp(line, "/load") == 0 && arg)    conversation_load(&c->said, c->ctx, arg);
    else if (strcmp(line, "/tool") == 0 && arg)    *ok &= reply(c, QWEN3_TOOL, arg);
    else                                           fputs(commands, stderr);
    return 1;
}

/* Questions and commands, line by line, until there are no more. Returns 0 if an answer failed. */
static int talk(chat *c) {
    int ok = 1, go_on = 1;
    if (c->colour) { show_model(c); fputs(commands, stderr); }
    while (go_on) {
        cli_string line;
        if (c->colour) { fputs("\n> ", stdout); fflush(stdout); }
        line = cli_read_line(stdin);
        if (line.n == 0 && feof(stdin)) go_on = 0;
        if (line.bytes[0] == '/') go_on = command(c, line.bytes, &ok);
        else if (line.n) ok &= reply(c, QWEN3_USER, line.bytes);
        free(line.bytes);
    }
    return ok;
}

static int check_numbers(const chat *c) {
    char err[512];
    const char *what = text[PROMPT] ? text[PROMPT] : check_sample;
    const int fine = check_model(c->model, what, (int)number[THREADS], err, sizeof err);
    if (fine < 0) cli_die(1, "cannot check the model", err);
    return fine;
}

int main(int argc, char **argv) {
    static chat c;
    const char *path = cli_parse(argc, argv, options, N_OPTIONS, text, number, usage, commands);
    char *tools = text[TOOLS] ? cli_read_file(text[TOOLS]) : NULL, *line;
    int ok;
    if (text[TOOLS] && !tools) cli_die(2, "cannot read", text[TOOLS]);
    for (line = tools ? strtok(tools, "\r\n") : NULL; line && c.n_tools < 64; line = strtok(NULL, "\r\n"))
        c.tools[c.n_tools++] = line;
    c.colour = CLI_IS_TERMINAL(stdout);
    signal(SIGINT, on_interrupt);
    load(&c, path);
    if (text[SYSTEM]) set_system(&c, text[SYSTEM]);
    if (text[CHECK])       ok = check_numbers(&c);
    else if (text[PROMPT]) ok = reply(&c, QWEN3_USER, text[PROMPT]);
    else                   ok = talk(&c);
    conversation_free(&c.said);
    qwen3_ctx_free(c.ctx);
    qwen3_free(c.model);
    free(tools);
    free(c.answer.bytes);
    return ok ? 0 : 3;
}
