/* frame.c - two shopkeepers speak in a game loop of 60 frames a second, on one model; prints the worst frame.
   cc -O2 -I. examples/frame.c -o frame -lm -lpthread && ./frame demo [microseconds a frame may give, 4000] */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include <time.h>

typedef struct keeper { char said[4096]; qwen3_sampler sampler; qwen3_stream reply; } keeper;

static int hear(const char *utf8, int n_bytes, int kind, void *user) {
    keeper *k = (keeper *)user;
    if (kind == QWEN3_TEXT_ANSWER) strncat(k->said, utf8, (size_t)n_bytes);
    return strlen(k->said) > 4000;
}

static double now_ms(void) {
    struct timespec t;
    return timespec_get(&t, TIME_UTC) ? 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec : 0;
}

int main(int argc, char **argv) {
    static keeper keepers[2];
    qwen3_stream *replies[2] = {&keepers[0].reply, &keepers[1].reply};
    qwen3_msg msgs[2] = {{QWEN3_SYSTEM, "You keep a small shop.", NULL, NULL, 0},
                         {QWEN3_USER, "Hello! What do you sell?", NULL, NULL, 0}};
    qwen3_chat_desc chat = {msgs, 2, NULL, 0, QWEN3_CHAT_NO_THINK, 0, NULL, NULL};
    qwen3_load_desc load = {0}; qwen3_ctx_desc desc = {0}; qwen3_gen_desc gen = {0};
    qwen3_model *model = NULL; qwen3_ctx *ctx = NULL; char err[256] = "";
    const int64_t budget = argc > 2 ? atol(argv[2]) : 4000;
    double worst = 0, start; int frames = 0, i; qwen3_result r;
    load.path = argc > 1 ? argv[1] : "demo";
    desc.max_seqs = 2; desc.max_ctx = 1024; gen.max_tokens = 100;
    r = qwen3_load(&model, &load, err, sizeof err);
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, &desc, err, sizeof err);
    for (i = 0; i < 2 && r == QWEN3_OK; i++) {
        keepers[i].sampler = qwen3_sampler_preset(QWEN3_NON_THINKING, (uint64_t)i);
        gen.sampler = &keepers[i].sampler; gen.on_text = hear; gen.user = &keepers[i];
        r = qwen3_stream_begin(ctx, i, &chat, &gen, &keepers[i].reply);
    }
    for (r = r == QWEN3_OK ? QWEN3_MORE : r; r == QWEN3_MORE; frames++) {  /* the rest is the game's */
        start = now_ms();
        r = qwen3_stream_step(ctx, replies, 2, budget);
        if (now_ms() - start > worst) worst = now_ms() - start;
    }
    if (r < 0) fprintf(stderr, "%s: %s\n", qwen3_result_string(r), ctx ? qwen3_ctx_error(ctx) : err);
    for (i = 0; i < 2 && r >= 0; i++) puts(keepers[i].said);
    printf("%d frames of at most %d us, the worst %.1f ms\n", frames, (int)budget, worst);
    qwen3_ctx_free(ctx); qwen3_free(model);
    return r < 0;
}
