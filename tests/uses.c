/* A program that uses every public function: tests/check_uses.sh compiles it in many ways without a warning. */
#include <stdio.h>
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"

static int put(const char *utf8, int n_bytes, int kind, void *user) {
    (void)user;
    return kind == QWEN3_TEXT_ANSWER && fwrite(utf8, 1, (size_t)n_bytes, stdout) == 0;
}

static int text(const qwen3_model *model, qwen3_token *tokens, int cap) {
    char bytes[64], err[100];
    int n = qwen3_encode(model, "the fox", 7, QWEN3_PARSE_SPECIAL, tokens, cap, err, sizeof err), k = 0;
    if (n <= 0 || n > cap) return n;
    qwen3_detokenize(model, tokens, n, QWEN3_SHOW_SPECIAL, bytes, sizeof bytes);
    return qwen3_token_bytes(model, tokens[0], &k) && k > 0 ? n : -1;
}

static int sequences(qwen3_ctx *ctx, const qwen3_token *tokens, int n) {
    qwen3_item item = {0, tokens, n, NULL, NULL, NULL, NULL, 0};
    qwen3_sampler sampler = qwen3_sampler_preset(QWEN3_THINKING, 1), *samplers[1];
    qwen3_state state = {NULL, NULL, 0, NULL, NULL, 0};
    qwen3_token out;
    qwen3_prob top[4];
    int seq = 1, len = 0;
    samplers[0] = &sampler;
    if (qwen3_eval(ctx, &item, 1) != QWEN3_OK || qwen3_sync(ctx, 1, tokens, n, 1) != n - 1) return -1;
    if (qwen3_seq_copy(ctx, 1, 0) != QWEN3_OK || !qwen3_logits(ctx, 1) || qwen3_top_probs(ctx, 1, top, 4) != 4) return -2;
    if (qwen3_sample(ctx, 1, &sampler, &out) != QWEN3_OK || qwen3_next(ctx, 1, NULL, &out) < 0) return -3;
    if (qwen3_next_batch(ctx, &seq, 1, samplers, &out, NULL) != QWEN3_OK) return -4;
    if (!qwen3_seq_tokens(ctx, 1, &len) || qwen3_seq_truncate(ctx, 1, 1) != QWEN3_OK) return -5;
    if (qwen3_seq_save(ctx, 1, &state) != QWEN3_OK) return -6;
    return qwen3_seq_load(ctx, 1, &state) == QWEN3_ERR_ARG && len >= n ? 0 : -7;
}

static int replies(const qwen3_model *model, qwen3_ctx *ctx) {
    qwen3_msg msg = {QWEN3_USER, "Hello!", NULL, NULL, 0};
    qwen3_chat_desc chat = {&msg, 1, NULL, 0, QWEN3_CHAT_NO_THINK, 0, NULL, NULL};
    char memory[256];
    qwen3_gen_desc gen;
    qwen3_stream stream, *list[1];
    memset(&gen, 0, sizeof gen);
    gen.max_tokens = 4;
    gen.on_text = put;
    list[0] = &stream;
    if (qwen3_chat_render(model, &chat, NULL, 0, NULL, 0) <= 0) return -10;
    if (qwen3_chat(ctx, 0, &chat, &gen) < 0 || qwen3_generate(ctx, 0, &gen) < 0) return -11;
    if (qwen3_reply_parse("Hello!", 6, QWEN3_TEXT_ANSWER, &msg, memory, sizeof memory, NULL, 0) > 256 || strcmp(msg.text, "Hello!") != 0) return -14;
    if (qwen3_stream_begin(ctx, 0, &chat, &gen, &stream) != QWEN3_OK) return -12;
    while (qwen3_stream_step(ctx, list, 1, 1000) == QWEN3_MORE) {}
    return qwen3_stream_feed(&stream, 0) == stream.result ? 0 : -13;
}

static int grammars(const qwen3_model *model, qwen3_ctx *ctx) {
    qwen3_grammar *grammar = NULL;
    qwen3_grammar_desc desc;
    qwen3_gen_desc gen;
    int r = -30;
    memset(&desc, 0, sizeof desc);
    memset(&gen, 0, sizeof gen);
    desc.kind = QWEN3_GRAMMAR_REGEX;
    desc.text = "yes|no";
    desc.n_bytes = 6;
    gen.max_tokens = 8;
    if (qwen3_grammar_create(&grammar, model, &desc, NULL, 0) == QWEN3_OK) {
        gen.grammar = grammar;
        r = qwen3_generate(ctx, 0, &gen) == QWEN3_END ? 0 : -31;
        qwen3_seq_truncate(ctx, 0, 0);
    }
    qwen3_grammar_free(grammar);
    return r;
}

static int scores(const qwen3_model *model, qwen3_ctx *ctx) {
    float *vector = (float *)malloc((size_t)qwen3_get_info(model).n_embd * sizeof *vector), score;
    int r = vector ? (int)qwen3_embed(ctx, 0, NULL, "the fox", vector) : -20;
    free(vector);
    if (qwen3_rerank(ctx, 0, NULL, "fox", "the fox", &score) == QWEN3_ERR_ARG) return -21;     /* no "yes": unsupported */
    return r;
}

int main(int argc, char **argv) {
    qwen3_load_desc load;
    qwen3_ctx_desc desc;
    qwen3_model *model = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_token tokens[16];
    char err[256] = "";
    int n, r = 1;
    memset(&load, 0, sizeof load);
    memset(&desc, 0, sizeof desc);
    load.path = argc > 1 ? argv[1] : "demo";
    desc.max_seqs = 2;
    if (qwen3_version() != QWEN3_VERSION) return 2;
    if (qwen3_load(&model, &load, err, sizeof err) == QWEN3_OK && qwen3_ctx_memory(model, &desc).host_bytes > 0 &&
        qwen3_ctx_create(&ctx, model, &desc, err, sizeof err) == QWEN3_OK) {
        n = text(model, tokens, 16);
        r = n > 1 ? sequences(ctx, tokens, n) : n;
        if (r == 0) r = replies(model, ctx);
        if (r == 0) r = grammars(model, ctx);
        if (r == 0) r = scores(model, ctx);
        if (r == 0) r = qwen3_ctx_stats(ctx).n_prefill == 0;
        if (r) fprintf(stderr, "%d: %s\n", r, qwen3_ctx_error(ctx));
    } else fprintf(stderr, "%s: %s\n", qwen3_result_string(QWEN3_ERR_ARG), err);
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    return r != 0;
}
