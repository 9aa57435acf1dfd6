/* Times grammars and checks what they accept: reads schemas with texts.
   Usage: grammar_bench MODEL [TEXTS] < cases > results
   TEXTS: so many random texts of each grammar, "G ended room bytes" and the text, instead of following the cases'.
   Cases (tools/grammar_cases.py): lines "S bytes", the schema; then "T valid bytes", a text; each followed by its bytes and a newline. */
#define QWEN3_IMPLEMENTATION
#include "../qwen3.h"

enum { MAX_TEXT = 1 << 22 };
static char text[MAX_TEXT];
static qwen3_token tokens[MAX_TEXT];
static qwen3i_guide guide;

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

static size_t read_bytes(size_t n) {
    if (n >= MAX_TEXT || fread(text, 1, n, stdin) != n) exit(1);
    text[n] = '\0';
    getchar();
    return n;
}

/* Follow a text with masks: prints "R accepted stop bytes" and the time of each mask. */
static void follow(const qwen3_model *model, const qwen3_grammar *g, qwen3i_masker *k, size_t bytes) {
    int n = qwen3_encode(model, text, bytes, 0, tokens, MAX_TEXT, NULL, 0), i, ok = 1, length, at = 0, ends;
    double start, us;
    qwen3i_guide_begin(k, &guide, g);
    printf("M");
    for (i = 0; i <= n && ok; i++) {
        const char *p;
        start = now_us();
        ends = qwen3i_guide_mask(k, &guide);
        us = now_us() - start;
        if (i < n || ends) printf(" %.1f", us);
        if (i == n) { ok = ends; break; }
        p = qwen3_token_bytes(model, tokens[i], &length);
        ok = (int)(k->mask[tokens[i] >> 5] >> (tokens[i] & 31) & 1u);
        if (ok != qwen3i_guide_bytes(k, &guide, p, length)) { printf("\nX mask and machine disagree at byte %d\n", at); ok = 0; break; }
        at += length;
    }
    printf("\nR %d %d\n", ok, at);
}

static uint64_t seed = 1;

/* A token of the mask by chance; -1: the end, where that may be. */
static qwen3_token any_token(const qwen3i_masker *k, int ends) {
    static int32_t list[1 << 20];
    int n = 0, i, b;
    for (i = 0; i < k->v->n_words; i++)
        for (b = 0; k->mask[i] && b < 32; b++) if (k->mask[i] >> b & 1u) list[n++] = 32 * i + b;
    if (ends && qwen3i_random(&seed) % 8 == 0) return -1;
    return n > 0 ? list[qwen3i_random(&seed) % (uint64_t)n] : -1;
}

/* A text of random tokens, led to its end where only so many more than the shortest one has bytes are left. */
static void random_text(const qwen3_model *model, const qwen3_grammar *g, qwen3i_masker *k, int room) {
    int n = 0, length, ends = 0;
    qwen3i_guide_begin(k, &guide, g);
    for (room += qwen3i_guide_cost(k, &guide, NULL, 0); room > 0; room--) {
        qwen3_token t;
        const char *p;
        ends = qwen3i_guide_mask(k, &guide);
        t = any_token(k, ends);
        if (t >= 0) {
            p = qwen3_token_bytes(model, t, &length);
            if (qwen3i_guide_cost(k, &guide, p, length) > room - 1) t = qwen3i_guide_shortest(k, &guide);
        }
        if (t < 0) break;
        p = qwen3_token_bytes(model, t, &length);
        if (!qwen3i_guide_bytes(k, &guide, p, length)) { printf("X dead end\n"); break; }
        memcpy(text + n, p, (size_t)length);
        n += length;
    }
    printf("G %d %d %d\n", qwen3i_guide_mask(k, &guide), room, n);
    fwrite(text, 1, (size_t)n, stdout);
    printf("\n");
}

int main(int argc, char **argv) {
    static qwen3_load_desc load;
    qwen3_grammar *g = NULL;
    qwen3i_masker *k = NULL;
    qwen3_model *model;
    qwen3_allocator a;
    const int texts = argc > 2 ? atoi(argv[2]) : 0;
    char kind, err[512];
    int i;
    unsigned long bytes;
    int valid;
    double start;
    memset(&a, 0, sizeof a);
    load.path = argc > 1 ? argv[1] : ".";
    load.flags = QWEN3_LOAD_VOCAB_ONLY;
    setvbuf(stdout, NULL, _IOLBF, 1 << 16);
    if (qwen3_load(&model, &load, err, sizeof err) != QWEN3_OK) { fprintf(stderr, "%s\n", err); return 1; }
    while (scanf(" %c", &kind) == 1) {
        qwen3_grammar_desc desc;
        memset(&desc, 0, sizeof desc);
        if (kind == 'T') {
            if (scanf("%d %lu", &valid, &bytes) != 2) return 1;
            getchar();
            read_bytes(bytes);
            if (g && !texts) follow(model, g, k, bytes);
            continue;
        }
        if (scanf("%lu", &bytes) != 1) return 1;
        getchar();
        desc.text = text;
        desc.n_bytes = read_bytes(bytes);
        qwen3_grammar_free(g);
        start = now_us();
        if (qwen3_grammar_create(&g, model, &desc, err, sizeof err) != QWEN3_OK) { printf("E %.1f %s\n", now_us() - start, err); g = NULL; continue; }
        printf("C %.1f\n", now_us() - start);
        if (!k) k = qwen3i_masker_make(&a, g->vocab);
        for (i = 0; i < texts; i++) random_text(model, g, k, 10 * i);
    }
    qwen3_grammar_free(g);
    qwen3i_masker_free(&a, k);
    qwen3_free(model);
    return 0;
}
