/* frame.c - two villagers speak in a game loop of 60 frames a second, on one model; prints the worst frame.
   cc -O2 -I. examples/frame.c -o frame -lm -lpthread && ./frame demo [microseconds a frame may give, 4000]
   With CUDA, on a stream of the game's: cc -DQWEN3_WITH_CUDA -include cuda_runtime_api.h ... qwen3_cuda.o */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include <time.h>

static int hear(const char *utf8, int n_bytes, int kind, void *user) {
    char *said = (char *)user;
    if (kind == QWEN3_TEXT_ANSWER) strncat(said, utf8, (size_t)n_bytes);
    return strlen(said) > 4000;
}

static double now_ms(void) {
    struct timespec t;
    return timespec_get(&t, TIME_UTC) ? 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec : 0;
}

int main(int argc, char **argv) {
    static char said[2][4096]; const char *who[2] = {"You keep a small shop.", "You guard the gate."};
    qwen3_load_desc load = {.path = argc > 1 ? argv[1] : "demo"};
    qwen3_ctx_desc desc = {.max_seqs = 2};
    qwen3_model *model = NULL; qwen3_ctx *ctx = NULL; char err[256] = "";
    qwen3_stream reply[2], *replies[2] = {&reply[0], &reply[1]};
    double worst = 0; int frames = 0;
#ifdef QWEN3_WITH_CUDA
    if (load.backend = qwen3_cuda_backend(), cudaStreamCreate((cudaStream_t *)&desc.stream)) return 1;
#endif
    qwen3_result r = qwen3_load(&model, &load, err, sizeof err);
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, &desc, err, sizeof err);
    for (int i = 0; i < 2 && r >= 0; i++) {
        const qwen3_msg msgs[2] = {{.text = who[i]}, {.role = QWEN3_USER, .text = "Hello!"}};
        const qwen3_chat_desc chat = {.msgs = msgs, .n_msgs = 2, .flags = QWEN3_CHAT_NO_THINK};
        const qwen3_gen_desc gen = {.max_tokens = 100, .on_text = hear, .user = said[i]};
        r = qwen3_stream_begin(ctx, i, &chat, &gen, &reply[i]);
    }
    for (int more = r >= 0; more; frames++, more = r == QWEN3_MORE) {    /* the rest is the game's */
        const double start = now_ms();
        r = qwen3_stream_step(ctx, replies, 2, argc > 2 ? atoi(argv[2]) : 4000);
        worst = now_ms() - start > worst ? now_ms() - start : worst;
    }
    if (r < 0) fprintf(stderr, "%s: %s\n", qwen3_result_string(r), ctx ? qwen3_ctx_error(ctx) : err);
    else printf("%s\n%s\n%d frames, at most %.1f ms each\n", said[0], said[1], frames, worst);
    qwen3_ctx_free(ctx); qwen3_free(model);
    return r < 0;
}
