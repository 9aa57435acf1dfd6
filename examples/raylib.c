/* raylib.c - ask a shopkeeper in a window: type, Enter; 60 frames a second throughout.
   cc -O2 -I. examples/raylib.c -o shop -lraylib -lm -lpthread && ./shop demo [asked at once]
   With CUDA, on a stream of the game's: cc -DQWEN3_WITH_CUDA -include cuda_runtime_api.h ... qwen3_cuda.o */
#include "raylib.h"
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"

static char said[8192];
static int hear(const char *utf8, int n_bytes, int kind, void *user) {
    (void)user;
    if (kind == QWEN3_TEXT_ANSWER) strncat(said, utf8, (size_t)n_bytes);
    return strlen(said) > 8000;
}

int main(int argc, char **argv) {
    char asked[256] = "", line[256] = "", err[256] = "";
    qwen3_model *model = NULL; qwen3_ctx *ctx = NULL; qwen3_stream reply = {0}, *replies[1] = {&reply};
    qwen3_load_desc load = {.path = argc > 1 ? argv[1] : "demo"}; qwen3_ctx_desc desc = {0};
#ifdef QWEN3_WITH_CUDA
    if (load.backend = qwen3_cuda_backend(), cudaStreamCreate((cudaStream_t *)&desc.stream)) return 1;
#endif
    qwen3_result r = qwen3_load(&model, &load, err, sizeof err);
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, &desc, err, sizeof err);
    if (argc > 2) snprintf(line, sizeof line, "%s", argv[2]);
    InitWindow(640, 360, "shop"); SetTargetFPS(60);
    while (r >= 0 && !WindowShouldClose() && (argc < 3 || !said[0] || reply.result == QWEN3_MORE)) {
        const size_t n = strlen(line); const int key = GetCharPressed();
        if (key > 0 && key < 127 && n < 250) line[n] = (char)key, line[n + 1] = '\0';
        if (IsKeyPressed(KEY_BACKSPACE) && n > 0) line[n - 1] = '\0';
        if (reply.result != QWEN3_MORE && n > 0 && (IsKeyPressed(KEY_ENTER) || argc > 2)) {
            const qwen3_msg msg = {.role = QWEN3_USER, .text = strcpy(asked, line)};
            const qwen3_chat_desc chat = {.msgs = &msg, .n_msgs = 1, .flags = QWEN3_CHAT_NO_THINK};
            const qwen3_gen_desc gen = {.max_tokens = 200, .on_text = hear};
            line[0] = said[0] = '\0';
            r = qwen3_stream_begin(ctx, 0, &chat, &gen, &reply);
        }
        if (reply.result == QWEN3_MORE) r = qwen3_stream_step(ctx, replies, 1, 4000);
        BeginDrawing(); ClearBackground(RAYWHITE);
        DrawText(TextFormat("> %s", line[0] ? line : asked), 20, 20, 20, DARKGRAY);
        DrawText(said, 20, 60, 20, MAROON); EndDrawing();
    }
    CloseWindow(); printf("%s%s\n", said, r < 0 ? (ctx ? qwen3_ctx_error(ctx) : err) : "");
    qwen3_ctx_free(ctx); qwen3_free(model);
    return r < 0;
}
