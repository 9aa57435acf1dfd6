/* continue.c - an editor's "continue" key: text before the cursor on stdin, what may follow on stdout.
   cc -O2 -I. examples/continue.c -o continue -lm -lpthread && ./continue Qwen3-0.6B-Base < text */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"

static int put(const char *utf8, int n_bytes, int kind, void *user) {
    (void)kind; (void)user;
    return fwrite(utf8, 1, (size_t)n_bytes, stdout) == 0;
}

int main(int argc, char **argv) {
    static char text[1 << 16], err[256];
    static qwen3_token tokens[1 << 16];
    static const char *const line[1] = {"\n"};
    qwen3_load_desc load = {0}; qwen3_gen_desc gen = {0};
    qwen3_model *model = NULL; qwen3_ctx *ctx = NULL;
    const size_t size = fread(text, 1, sizeof text, stdin);
    int n, from; qwen3_result r;
    load.path = argc > 1 ? argv[1] : "demo";
    gen.max_tokens = 48; gen.stop = line; gen.n_stop = 1; gen.on_text = put;     /* to the end of the line */
    r = qwen3_load(&model, &load, err, sizeof err);
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, NULL, err, sizeof err);
    if (r == QWEN3_OK) {
        n = qwen3_encode(model, text, size, 0, tokens, 1 << 16, err, sizeof err);
        from = n > 2048 ? n - 2048 : 0;         /* what is far before the cursor does not matter */
        r = n <= 0 ? (qwen3_result)n : (qwen3_result)qwen3_sync(ctx, 0, tokens + from, n - from, 0);
        if (r == QWEN3_OK && n > 0) r = qwen3_generate(ctx, 0, &gen);
    }
    if (r < 0) fprintf(stderr, "%s: %s\n", qwen3_result_string(r), err[0] ? err : qwen3_ctx_error(ctx));
    qwen3_ctx_free(ctx); qwen3_free(model);
    return r < 0;
}
