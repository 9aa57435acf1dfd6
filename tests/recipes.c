/* What tests/check_recipes.sh compiles the recipes of qwen3.h with, and runs them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"

static int frames, allocations, jobs;
static const char *model_dir;

static int put(const char *utf8, int n_bytes, int kind, void *user) {
    (void)kind; (void)user;
    return fwrite(utf8, 1, (size_t)n_bytes, stdout) == 0;
}
static int keep(const char *utf8, int n_bytes, int kind, void *user) {
    char *said = (char *)user;
    const size_t n = strlen(said);
    (void)kind;
    if (n + (size_t)n_bytes > 4095) return 1;
    memcpy(said + n, utf8, (size_t)n_bytes);
    said[n + (size_t)n_bytes] = '\0';
    return 0;
}
static void draw_frame(void) { frames++; }
static void *my_alloc(size_t size, void *user) { (void)user; allocations++; return malloc(size); }
static void my_free(void *p, size_t size, void *user) { (void)size; (void)user; allocations--; free(p); }
static void my_parallel_for(void *user, int count, void (*fn)(void *arg, int index), void *arg) {
    (void)user;
    for (jobs++; count > 0; count--) fn(arg, count - 1);
}

static const void *pak_find(const char *name, size_t *size) {
    char path[512];
    static void *kept[8];
    static int n;
    FILE *f;
    long bytes;
    snprintf(path, sizeof path, "%s/%s", model_dir, name);
    f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0 || (bytes = ftell(f)) < 0) exit(1);
    rewind(f);
    kept[n] = malloc((size_t)bytes + 1);
    *size = fread(kept[n], 1, (size_t)bytes, f);
    fclose(f);
    return kept[n++];
}

#include "recipes.inc"

int main(int argc, char **argv) {
    qwen3_load_desc load = {NULL};
    qwen3_ctx_desc desc = {0};
    qwen3_model *model = NULL;
    qwen3_ctx *ctx = NULL;
    char err[256] = "";
    int i, failed = 0;
    model_dir = load.path = argc > 1 ? argv[1] : "demo";
    desc.max_seqs = 3;
    desc.max_ctx = 1024;
    if (qwen3_load(&model, &load, err, sizeof err) != QWEN3_OK ||
        qwen3_ctx_create(&ctx, model, &desc, err, sizeof err) != QWEN3_OK) { fprintf(stderr, "%s\n", err); return 1; }
    for (i = 0; i < RECIPES; i++) {
        qwen3_result r;
        int k;
        for (k = 0; k < 3; k++) qwen3_seq_truncate(ctx, k, 0);
        printf("\n--- recipe %d\n", i + 1);
        fflush(stdout);
        r = recipes[i](model, ctx);
        if (r >= 0) continue;
        fprintf(stderr, "recipe %d: %s: %s\n", i + 1, qwen3_result_string(r), qwen3_ctx_error(ctx));
        failed++;
    }
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    remove("character.state");
    printf("\nrecipes: %d of %d ran\n", RECIPES - failed, RECIPES);
    if (frames == 0 || allocations != 0 || jobs == 0)
        fprintf(stderr, "%d frames, %d blocks not freed, %d jobs\n", frames, allocations, jobs);
    return failed || frames == 0 || allocations != 0 || jobs == 0;
}
