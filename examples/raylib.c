/* raylib.c - ask a shopkeeper in a window: type, Enter; 60 frames a second throughout.
   cc -O2 -I. examples/raylib.c -o shop -lraylib -lm -lpthread && ./shop demo [asked at once] */
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
    qwen3_msg msg = {QWEN3_USER, asked, NULL, NULL, 0};
    qwen3_chat_desc chat = {&msg, 1, NULL, 0, QWEN3_CHAT_NO_THINK, 0, NULL, NULL};
    qwen3_load_desc load = {0}; qwen3_ctx_desc desc = {0}; qwen3_gen_desc gen = {0};
    qwen3_model *model = NULL; qwen3_ctx *ctx = NULL; qwen3_stream reply, *replies[1] = {&reply};
    int key, n = 0, frames = 0; qwen3_result r;
    load.path = argc > 1 ? argv[1] : "demo"; desc.max_ctx = 1024;
    r = qwen3_load(&model, &load, err, sizeof err);
    if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, &desc, err, sizeof err);
    gen.on_text = hear; gen.max_tokens = 200;
    if (argc > 2) snprintf(line, sizeof line, "%s", argv[2]);
    InitWindow(640, 360, "shop"); SetTargetFPS(60);
    for (; r >= 0 && !WindowShouldClose() && !(argc > 2 && r == QWEN3_OK && frames > 10); frames++) {
        while ((key = GetCharPressed()) > 0) if (key < 127 && n < 250) line[n++] = (char)key, line[n] = 0;
        if (IsKeyPressed(KEY_BACKSPACE) && n > 0) line[--n] = 0;
        if (line[0] && r != QWEN3_MORE && (IsKeyPressed(KEY_ENTER) || (argc > 2 && frames == 0))) {
            memcpy(asked, line, sizeof asked); line[n = 0] = said[0] = 0;
            r = qwen3_stream_begin(ctx, 0, &chat, &gen, &reply);
            if (r == QWEN3_OK) r = QWEN3_MORE;
        }
        if (r == QWEN3_MORE) r = qwen3_stream_step(ctx, replies, 1, 4000);
        BeginDrawing(); ClearBackground(RAYWHITE);
        DrawText(TextFormat("> %s", line[0] ? line : asked), 20, 20, 20, DARKGRAY);
        DrawText(said, 20, 60, 20, MAROON); EndDrawing();
    }
    CloseWindow();
    printf("%d frames: %s%s\n", frames, said, r < 0 ? (ctx ? qwen3_ctx_error(ctx) : err) : "");
    qwen3_ctx_free(ctx); qwen3_free(model);
    return r < 0;
}
