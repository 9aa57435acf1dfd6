/* logits - writes the logits of every position of a token sequence, for comparison with other programs.
   usage: logits MODEL_DIR TOKENS OUT [--cuda] [--standard] [--kv f32|f16|bf16] [--chunk N]
   TOKENS: int32 little-endian; OUT: float32 [n, n_vocab]. Build: cc -O3 -I. tools/logits.c -lm -lpthread */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"

static int fail(const char *what, const char *detail) {
    fprintf(stderr, "logits: %s: %s\n", what, detail);
    return 1;
}

static int run(qwen3_ctx *ctx, int n_vocab, FILE *in, FILE *out) {
    enum { STEP = 32 };
    qwen3_token tokens[STEP];
    float *logits = (float *)malloc(sizeof *logits * STEP * (size_t)n_vocab);
    qwen3_item item;
    size_t n;
    int bad = !logits;
    memset(&item, 0, sizeof item);
    item.tokens = tokens;
    item.all_logits = logits;
    while (!bad && (n = fread(tokens, sizeof *tokens, STEP, in)) > 0) {
        item.n = (int)n;
        if (qwen3_eval(ctx, &item, 1) != QWEN3_OK) bad = fail("eval", qwen3_ctx_error(ctx));
        else bad = fwrite(logits, sizeof *logits, n * (size_t)n_vocab, out) != n * (size_t)n_vocab;
    }
    free(logits);
    return bad;
}

int main(int argc, char **argv) {
    static qwen3_load_desc load;
    static qwen3_ctx_desc desc;
    qwen3_model *model;
    qwen3_ctx *ctx;
    char err[512];
    FILE *in, *out;
    int i, bad;
    if (argc < 4) return fail("usage", "logits MODEL_DIR TOKENS OUT [--cuda] [--standard] [--kv f32|f16|bf16] [--chunk N]");
    load.path = argv[1];
    desc.kv_type = QWEN3_KV_F32;
    for (i = 4; i < argc; i++) {
#ifdef QWEN3_WITH_CUDA
        if (!strcmp(argv[i], "--cuda")) load.backend = qwen3_cuda_backend();
#endif
        if (!strcmp(argv[i], "--standard")) desc.kernels = QWEN3_PATH_STANDARD;
        if (!strcmp(argv[i], "--kv") && i + 1 < argc)
            desc.kv_type = !strcmp(argv[i + 1], "f16") ? QWEN3_KV_F16 : !strcmp(argv[i + 1], "bf16") ? QWEN3_KV_BF16 : QWEN3_KV_F32;
        if (!strcmp(argv[i], "--chunk") && i + 1 < argc) desc.prefill_chunk = atoi(argv[i + 1]);
    }
    if (qwen3_load(&model, &load, err, sizeof err) != QWEN3_OK) return fail("load", err);
    if (qwen3_ctx_create(&ctx, model, &desc, err, sizeof err) != QWEN3_OK) return fail("context", err);
    in = fopen(argv[2], "rb");
    out = fopen(argv[3], "wb");
    if (!in || !out) return fail("cannot open", in ? argv[3] : argv[2]);
    bad = run(ctx, qwen3_get_info(model).n_vocab, in, out);
    bad |= fclose(out) != 0;
    fclose(in);
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return bad;
}
