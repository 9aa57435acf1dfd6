/* logits - writes the logits of every position of a token sequence, for comparison with other programs.
   usage: logits MODEL_DIR TOKENS OUT [--cuda] [--standard] [--kv f32|f16|bf16|q8_0] [--bf16] [--chunk N] [--step N] [--generate N]
   TOKENS: int32 little-endian, evaluated --step (32) at a time; OUT: float32 [n, n_vocab]. --generate appends to TOKENS
   what the model goes on with, greedily. Build: cc -O3 -I. tools/logits.c -lm -lpthread */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include "tests/cuda_lab.h"

static int fail(const char *what, const char *detail) {
    fprintf(stderr, "logits: %s: %s\n", what, detail);
    return 1;
}

static int evaluate(qwen3_ctx *ctx, int n_vocab, int step, FILE *in, FILE *out) {
    qwen3_token *tokens = (qwen3_token *)malloc(sizeof *tokens * (size_t)step);
    float *logits = (float *)malloc(sizeof *logits * (size_t)step * (size_t)n_vocab);
    qwen3_item item;
    size_t n;
    int bad = !logits || !tokens;
    memset(&item, 0, sizeof item);
    item.tokens = tokens;
    item.all_logits = logits;
    while (!bad && (n = fread(tokens, sizeof *tokens, (size_t)step, in)) > 0) {
        item.n = (int)n;
        if (qwen3_eval(ctx, &item, 1) != QWEN3_OK) bad = fail("eval", qwen3_ctx_error(ctx));
        else bad = fwrite(logits, sizeof *logits, n * (size_t)n_vocab, out) != n * (size_t)n_vocab;
    }
    free(tokens);
    free(logits);
    return bad;
}

static int generate(qwen3_ctx *ctx, int n, FILE *tokens) {
    const double start = qwen3i_now_ms();
    int i;
    fseek(tokens, 0, SEEK_END);
    for (i = 0; i < n; i++) {
        qwen3_token t;
        qwen3_result r = qwen3_next(ctx, 0, NULL, &t);
        qwen3_item item;
        memset(&item, 0, sizeof item);
        item.tokens = &t;
        item.n = 1;
        if (r == QWEN3_END) r = qwen3_eval(ctx, &item, 1);      /* a turn's end does not stop it */
        if (r != QWEN3_OK) return fail("next", r < 0 ? qwen3_ctx_error(ctx) : qwen3_result_string(r));
        if (fwrite(&t, sizeof t, 1, tokens) != 1) return fail("cannot write", "TOKENS");
    }
    if (n) fprintf(stderr, "%d tokens generated in %.1f ms\n", i, qwen3i_now_ms() - start);
    return 0;
}

int main(int argc, char **argv) {
    static qwen3_load_desc load;
    static qwen3_ctx_desc desc;
    qwen3_model *model;
    qwen3_ctx *ctx;
    char err[512];
    FILE *in, *out;
    int i, bad, step = 32, n = 0;
    if (argc < 4) return fail("usage", "logits MODEL_DIR TOKENS OUT [--cuda] [--standard] [--kv f32|f16|bf16|q8_0] [--bf16] [--chunk N] "
                                       "[--step N] [--generate N]");
    load.path = argv[1];
    desc.kv_type = QWEN3_KV_F32;
    for (i = 4; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--cuda") || !strcmp(argv[i], "--standard")) {
#ifdef QWEN3_WITH_CUDA
            if (load.backend != cuda_lab_standard())
                load.backend = argv[i][2] == 's' ? cuda_lab_standard() : qwen3_cuda_backend();
#else
            return fail(argv[i], "this program was built without CUDA");
#endif
        }
        else if (!strcmp(argv[i], "--kv"))
            desc.kv_type = !strcmp(value, "f16") ? QWEN3_KV_F16 : !strcmp(value, "bf16") ? QWEN3_KV_BF16 :
                           !strcmp(value, "q8_0") ? QWEN3_KV_Q8_0 : QWEN3_KV_F32, i++;
        else if (!strcmp(argv[i], "--bf16"))     desc.bf16 = 1;
        else if (!strcmp(argv[i], "--chunk"))    desc.prefill_chunk = atoi(value), i++;
        else if (!strcmp(argv[i], "--step"))     step = atoi(value), i++;
        else if (!strcmp(argv[i], "--generate")) n = atoi(value), i++;
        else return fail("unknown argument", argv[i]);
    }
    if (step < 1 || n < 0) return fail("bad value", "--step is at least 1, --generate at least 0");
    if (qwen3_load(&model, &load, err, sizeof err) != QWEN3_OK) return fail("load", err);
    if (qwen3_ctx_create(&ctx, model, &desc, err, sizeof err) != QWEN3_OK) return fail("context", err);
    in = fopen(argv[2], n ? "r+b" : "rb");
    out = fopen(argv[3], "wb");
    if (!in || !out) return fail("cannot open", in ? argv[3] : argv[2]);
    bad = evaluate(ctx, qwen3_get_info(model).n_vocab, step, in, out) || generate(ctx, n, in);
    bad |= fclose(out) != 0;
    bad |= fclose(in) != 0;
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return bad;
}
